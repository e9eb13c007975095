#!/usr/bin/env bash
# The study: compares gravity with the strongest control we know, rotary attention with smeared keys
# and values and a learned sink, and tries one change of the law at a time.
# Every run has a folder below runs/; call the script again to continue an interrupted study.
#
#   bash run_study.sh                                    all stages on Shakespeare, two CPU cores
#   NAME=study DATASET=text DATA_PATH=books/ bash run_study.sh   any text: as reports/study.md
#   STAGES="headline" SEEDS="1 2 3" bash run_study.sh    parts of it
#
# Settings, given as environment variables, with their defaults:
#   STAGES="rates headline ablations full sizes evaluate report"
#   RECIPE=modern        of both models, or gpt2, which names its runs MODEL_gpt2
#   SIZE=small           or 25m: WikiText-103's setting on the same text, a job for a GPU
#   JOBS=2 THREADS=1     runs at the same time, and CPU threads of each
#   DATASET=shakespeare DATA_PATH BPE_VOCAB_SIZE=2048
#   SEEDS="1 2 3"        seeds of the headline and of the sizes
#   ABLATION_SEEDS="1 2" seeds of the ablations
#   RATE_SEED=100        seed of the runs that compare learning rates
#   RATES="2e-3 4e-3 8e-3 16e-3"   learning rates to try for each model
#   NGT_RATE CONTROL_RATE   learning rates of all other stages (default: 8e-3, under gpt2 4e-3)
#   STEPS=6000           steps of the headline;   SHORT_STEPS=1500   of rates and ablations
#   NAME=study_$DATASET  names the report and the folders below runs/, checkpoints/ and logs/
#   ONLY                 only the runs whose name matches, such as headline/rotary*
#   SIZES="300000 3000000"   parameters of the other sizes, trained on 12 tokens per parameter
#   ABLATIONS            their names (default: the list below)
#   FULL                 names of ablations that also run for all STEPS
#   EXTRA_FLAGS          added to every training
#   TORCH                cpu: install PyTorch without CUDA, as setup_venv.sh says
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_venv.sh
begin "$@"
seen_from_caller DATA_PATH

STAGES=${STAGES:-rates headline ablations full sizes evaluate report}
RECIPE=${RECIPE:-modern}
SIZE=${SIZE:-small}
JOBS=${JOBS:-2}
DATASET=${DATASET:-shakespeare}
NAME=${NAME:-study_$DATASET}
BPE_VOCAB_SIZE=${BPE_VOCAB_SIZE:-2048}
SEEDS=${SEEDS:-1 2 3}
ABLATION_SEEDS=${ABLATION_SEEDS:-1 2}
RATE_SEED=${RATE_SEED:-100}
RATES=${RATES:-2e-3 4e-3 8e-3 16e-3}
STEPS=${STEPS:-6000}
SHORT_STEPS=${SHORT_STEPS:-1500}
FULL=${FULL:-}
SIZES=${SIZES:-300000 3000000}
export OMP_NUM_THREADS=${THREADS:-1}

for stage in $STAGES; do
    case "$stage" in
        rates | ablations | headline | full | sizes | evaluate | report) ;;
        *) fail "STAGES contains $stage, which is unknown: choose from rates, headline, ablations, full," \
            "sizes, evaluate, report" ;;
    esac
done
case "$SIZE" in
    small)
        shape=(--hidden-dim 128 --num-layers 4 --num-heads 4 --block-size 256 --batch-size 8)
        parameters=960000
        ;;
    25m)
        shape=(--hidden-dim 512 --num-layers 8 --num-heads 8 --block-size 512 --batch-size 16
            --gradient-accumulation-steps 2)
        parameters=25650000
        ;;
    *) fail "SIZE=$SIZE is unknown: give small or 25m" ;;
esac

corpus=(--dataset "$DATASET" --tokenizer bpe --bpe-vocab-size "$BPE_VOCAB_SIZE")
[ -z "${DATA_PATH:-}" ] || corpus+=(--data-path "$DATA_PATH")
read_extra_flags
rotary=(--model vanilla --pos rotary)
control=("${rotary[@]}" --smear keys-values --sink)
case "$RECIPE" in
    modern) suffix= rate=8e-3 ;;
    gpt2) suffix=_gpt2 rate=4e-3 ;;
    *) fail "RECIPE=$RECIPE is unknown: give modern or gpt2" ;;
esac
NGT_RATE=${NGT_RATE:-$rate}
CONTROL_RATE=${CONTROL_RATE:-$rate}

# tenth RATE: prints a tenth of a learning rate, the value at which its cosine schedule ends
tenth() { python -c "import sys; print(f'{float(sys.argv[1]) / 10:g}')" "$1"; }

# add NAME SEED STEPS RATE FLAGS...: adds a run to the list that `train_all` starts
add() {
    local name=$NAME/$1 seed=$2 steps=$3 rate=$4
    # shellcheck disable=SC2053  # ONLY is a pattern
    [[ $1 == ${ONLY:-*} ]] || return 0
    shift 4
    jobs+=("$(printf '%q ' "$name" "${corpus[@]}" "${shape[@]}" --num-parameters "$parameters" \
        --recipe "$RECIPE" --seed "$seed" --max-steps "$steps" --warmup-steps 100 --learning-rate "$rate" \
        --min-learning-rate "$(tenth "$rate")" --eval-interval $((steps < 4 ? 1 : steps / 12)) \
        --eval-iters 50 --checkpoint-interval $((steps < 4 ? 1 : steps / 12)) --use-amp "$@" \
        ${extra[@]+"${extra[@]}"})")
}

# train_one NAME FLAGS...: trains one run, with its output in logs/NAME.log
train_one() {
    local name=$1
    shift
    mkdir -p "$(dirname "logs/$name.log")"
    if [ -e "logs/$name.flags" ] && [ "$(cat "logs/$name.flags")" != "$*" ]; then
        echo "error: runs/$name was trained with other flags (logs/$name.flags):" \
            "give another NAME, or delete that run and its flags file" >&2
        return 255
    fi
    echo "$*" >"logs/$name.flags"
    local code=0
    python train_shakespeare.py "$@" --checkpoint-path "checkpoints/$name.pt" \
        --run-name "$name" --resume >>"logs/$name.log" 2>&1 || code=$?
    case $code in
        0) echo "$(date +%H:%M) $name: $(grep -h 'best validation loss' "logs/$name.log" | tail -n 1)" ;;
        130) echo "$(date +%H:%M) $name: stopped" ;;
        *) echo "error: $name failed: $(tail -n 1 "logs/$name.log")" >&2 ;;
    esac
    [ $code = 0 ] || return 255 # makes xargs stop, too
}
export -f train_one

train_all() {
    [ ${#jobs[@]} = 0 ] || printf '%s\n' "${jobs[@]}" |
        xargs -d '\n' -P "$JOBS" -I JOB bash -c 'set -eo pipefail; train_one JOB' |
        tee -i /dev/null # Ctrl-C ends xargs at once, but tee only after the last training has saved
    jobs=()
}

# set_size PARAMETERS: sets `shape`, a narrower or wider model with the same layers and heads
set_size() {
    parameters=$1
    local width=128
    [ "$1" -ge 600000 ] || width=64
    [ "$1" -lt 2000000 ] || width=256
    shape=(--hidden-dim "$width" --num-layers 4 --num-heads 4 --block-size 256 --batch-size 8)
}

# ablation NAME: sets `flags`, what this ablation changes
ablation() {
    case "$1" in
        default) flags=() ;;
        no_background) flags=(--no-background) ;;
        background_*) flags=(--background-start "${1#background_}") ;;
        exponent_*[0-9]) flags=(--exponent "${1#exponent_}") ;;
        head_coord_dim_*) flags=(--head-coord-dim "${1#head_coord_dim_}") ;;
        coord_dim_*) flags=(--coord-dim "${1#coord_dim_}") ;;
        mass_in_value) flags=(--mass-in-value) ;;
        pull) flags=(--coords-from pull) ;;
        no_retardation) flags=(--no-retardation) ;;
        no_retarded_values) flags=(--no-retarded-values) ;;
        learned_farthest) flags=(--no-fixed-farthest) ;;
        farthest_*) flags=(--farthest-time-scale "${1#farthest_}") ;;
        repulsion) flags=(--repulsion) ;;
        radius_*) flags=(--radius-cutoff --radius "${1#radius_}") ;;
        soft_radius_*) flags=(--radius-cutoff --use-soft-cutoff --radius "${1#soft_radius_}") ;;
        tolerance_*) flags=(--field-tolerance "${1#tolerance_}") ;;
        layernorm) flags=(--norm layernorm) ;;
        biases) flags=(--bias) ;;
        gelu) flags=(--activation gelu) ;;
        no_zero_init) flags=(--no-zero-init-outputs) ;;
        no_value_residual) flags=(--no-value-residual) ;;
        no_embedding_skip) flags=(--no-embedding-skip) ;;
        no_softcap) flags=(--logit-softcap 0) ;;
        adamw) flags=(--optimizer adamw) ;;
        published) flags=(--law published --mass-in-value) ;;
        *) fail "no ablation $1: see the names in run_study.sh" ;;
    esac
}
ABLATIONS=${ABLATIONS:-default no_background background_0.0001 background_0.005 background_0.02
    repulsion exponent_3 exponent_6 head_coord_dim_8 head_coord_dim_32 learned_farthest
    pull no_retardation no_retarded_values mass_in_value radius_16 layernorm biases gelu no_zero_init
    no_value_residual no_embedding_skip no_softcap adamw}

for name in $ABLATIONS $FULL; do ablation "$name"; done
use_environment requirements.txt
jobs=()

echo "== the text"
python prepare_data.py "${corpus[@]}"
for stage in $STAGES; do
    echo "== $stage"
    case "$stage" in
        rates)
            for rate in $RATES; do
                add "rates/ngt${suffix}_$rate" "$RATE_SEED" "$SHORT_STEPS" "$rate"
                add "rates/control${suffix}_$rate" "$RATE_SEED" "$SHORT_STEPS" "$rate" "${control[@]}"
            done
            ;;
        headline)
            for seed in $SEEDS; do
                add "headline/ngt${suffix}_$seed" "$seed" "$STEPS" "$NGT_RATE"
                add "headline/control${suffix}_$seed" "$seed" "$STEPS" "$CONTROL_RATE" "${control[@]}"
            done
            add "headline/rotary${suffix}_1" 1 "$STEPS" "$CONTROL_RATE" "${rotary[@]}"
            ;;
        ablations)
            for name in $ABLATIONS; do
                ablation "$name"
                for seed in $ABLATION_SEEDS; do
                    add "ablations/${name}_$seed" "$seed" "$SHORT_STEPS" "$NGT_RATE" ${flags[@]+"${flags[@]}"}
                done
            done
            ;;
        full)
            for name in $FULL; do
                ablation "$name"
                add "full/$name" 1 "$STEPS" "$NGT_RATE" ${flags[@]+"${flags[@]}"}
            done
            ;;
        sizes)
            for size in $SIZES; do
                set_size "$size"
                for seed in $SEEDS; do
                    add "sizes/ngt_${size}_$seed" "$seed" $((12 * size / 2048)) "$NGT_RATE"
                    add "sizes/control_${size}_$seed" "$seed" $((12 * size / 2048)) "$CONTROL_RATE" \
                        "${control[@]}"
                done
            done
            ;;
        evaluate)
            for folder in runs/"$NAME"/{headline/*_1,full/*}; do
                run=${folder#runs/}
                [ ! -e "$folder/config.json" ] || [ -e "$folder/evaluation.json" ] && continue
                echo "$run"
                python evaluate.py --checkpoint-path "checkpoints/$run.pt_best.pt" --long-range 40 \
                    --json "$folder/evaluation.json" >"logs/$run.evaluation.log"
            done
            ;;
        report) python report.py --study "$NAME" --output "reports/$NAME.md" ;;
    esac
    train_all
done
