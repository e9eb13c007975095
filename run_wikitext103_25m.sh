#!/usr/bin/env bash
# The experiment of NGT's first release: WikiText-103, a BPE of 8192 tokens, about 25M parameters,
# a vanilla transformer with rotary positions and NGT with the mass in the value. Call the script
# again to continue an interrupted run.
#
#   bash run_wikitext103_25m.sh                                  15,000 steps each, a job for a GPU
#   DATASET=text DATA_PATH=books/ bash run_wikitext103_25m.sh    the same on any text
#   MAX_STEPS=50 BATCH_SIZE=2 bash run_wikitext103_25m.sh        small enough for a laptop
#   RUNS="rotary ngt published" NPROC=4 bash run_wikitext103_25m.sh
#
# Settings, given as environment variables, with their defaults:
#   RUNS="rotary ngt"    also: vanilla (learned positions, as in the first release),
#                        ngt_mass_in_weight, published (the first release's law)
#   NAME=w3_25m          names the report and the folders below checkpoints/, logs/ and runs/
#   NPROC=1              processes; more than 1 run under torchrun
#   DATASET=wikitext103 DATA_PATH TOKENIZER=bpe BPE_VOCAB_SIZE=8192 TOKENIZER_PATH
#   HIDDEN_DIM=512 COORD_DIM=64 HEAD_COORD_DIM=16 NUM_LAYERS=8 NUM_HEADS=8 BLOCK_SIZE=512 DROPOUT=0
#   MLP_DIM              of both models (default: 4 x HIDDEN_DIM for NGT; for vanilla the width that
#                        gives it as many parameters)
#   BATCH_SIZE=16 GRADIENT_ACCUMULATION_STEPS=2 MAX_STEPS=15000 LEARNING_RATE=6e-4
#   MIN_LEARNING_RATE    (default: a tenth of LEARNING_RATE)
#   WEIGHT_DECAY=0.1 SEED=1337 DEVICE=auto
#   RECIPE=gpt2          or modern, which nobody has tuned at this size
#   WARMUP_STEPS         (default: 2/15 of the steps)
#   EVAL_INTERVAL        (default: 1/30 of the steps, at least 10);   CHECKPOINT_INTERVAL   the same
#   EVAL_ITERS=16        times 16 validation windows
#   EXTRA_FLAGS          added to every training
#   TORCH                cpu: install PyTorch without CUDA, as setup_venv.sh says
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_venv.sh
begin "$@"
seen_from_caller DATA_PATH TOKENIZER_PATH

NAME=${NAME:-w3_25m}
RUNS=${RUNS:-rotary ngt}
NPROC=${NPROC:-1}
MAX_STEPS=${MAX_STEPS:-15000}
[[ $MAX_STEPS =~ ^[1-9][0-9]*$ ]] || fail "MAX_STEPS=$MAX_STEPS is not a number of steps: give at least 1"
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$NPROC is not a number of processes: give at least 1"
WARMUP_STEPS=${WARMUP_STEPS:-$((MAX_STEPS * 2 / 15))}
EVAL_INTERVAL=${EVAL_INTERVAL:-$((MAX_STEPS < 300 ? 10 : MAX_STEPS / 30))}
CHECKPOINT_INTERVAL=${CHECKPOINT_INTERVAL:-$EVAL_INTERVAL}
: "${DATASET:=wikitext103}" "${TOKENIZER:=bpe}" "${BPE_VOCAB_SIZE:=8192}"
: "${HIDDEN_DIM:=512}" "${COORD_DIM:=64}" "${HEAD_COORD_DIM:=16}" "${NUM_LAYERS:=8}"
: "${NUM_HEADS:=8}" "${BLOCK_SIZE:=512}" "${DROPOUT:=0}" "${BATCH_SIZE:=16}"
: "${GRADIENT_ACCUMULATION_STEPS:=2}" "${LEARNING_RATE:=6e-4}"
: "${RECIPE:=gpt2}" "${WEIGHT_DECAY:=0.1}" "${SEED:=1337}" "${DEVICE:=auto}" "${EVAL_ITERS:=16}"

# collect NAME...: sets `flags` to the command-line flags of the variables that have a value
collect() {
    local name
    flags=()
    for name in "$@"; do
        if [ -n "${!name:-}" ]; then
            flags+=("--$(echo "$name" | tr 'A-Z_' 'a-z-')" "${!name}")
        fi
    done
}
collect DATASET DATA_PATH TOKENIZER BPE_VOCAB_SIZE TOKENIZER_PATH
corpus=("${flags[@]}")
collect RECIPE HIDDEN_DIM COORD_DIM HEAD_COORD_DIM NUM_LAYERS NUM_HEADS MLP_DIM BLOCK_SIZE DROPOUT \
    BATCH_SIZE GRADIENT_ACCUMULATION_STEPS MAX_STEPS LEARNING_RATE MIN_LEARNING_RATE \
    WARMUP_STEPS WEIGHT_DECAY SEED DEVICE EVAL_INTERVAL EVAL_ITERS CHECKPOINT_INTERVAL
sizes=("${flags[@]}")
read_extra_flags

# describe RUN: sets `file` (the name of its files) and `model` (its flags)
describe() {
    case "$1" in
        vanilla) file=vanilla_25m model=(--model vanilla --pos learned) ;;
        rotary) file=vanilla_rotary_25m model=(--model vanilla --pos rotary) ;;
        ngt) file=ngt_mass_in_value model=(--model ngt --mass-in-value) ;;
        ngt_mass_in_weight) file=ngt_mass_in_weight model=(--model ngt) ;;
        published) file=ngt_published model=(--model ngt --law published --mass-in-value) ;;
        *) fail "RUNS contains $1, which is unknown: choose from vanilla, rotary, ngt," \
            "ngt_mass_in_weight, published" ;;
    esac
}
for run in $RUNS; do describe "$run"; done
use_environment requirements.txt

launch=(python)
[ "$NPROC" = 1 ] || launch=(torchrun --standalone --nproc-per-node "$NPROC")

# train LAUNCHER... -- RUN FLAGS...: trains one run, or continues it
train() {
    local launcher=()
    while [ "$1" != -- ]; do launcher+=("$1") && shift; done
    describe "$2"
    shift 2
    "${launcher[@]}" train_shakespeare.py "${model[@]}" "${corpus[@]}" "${sizes[@]}" --use-amp \
        --use-cosine-schedule --checkpoint-path "checkpoints/$NAME/$file.pt" \
        --run-name "$NAME/$file" --resume ${extra[@]+"${extra[@]}"} "$@"
}

echo "== the text"
python prepare_data.py "${corpus[@]}"
echo
echo "== what will be trained"
for run in $RUNS; do train python -- "$run" --dry-run; done
mkdir -p "logs/$NAME"
names=()
for run in $RUNS; do
    describe "$run"
    names+=("$NAME/$file")
    echo
    echo "== training $run (logs/$NAME/$file.log)"
    # -i: tee ignores Ctrl-C, so that the log gets the last lines, too
    train "${launch[@]}" -- "$run" | tee -ia "logs/$NAME/$file.log"
done
echo
echo "== the report"
python report.py --runs "${names[@]}" --reference reports/first_release.json \
    --output "reports/${NAME}_summary.md"
echo "talk to it:      python chat.py --checkpoint-path checkpoints/$NAME/$file.pt_best.pt"
echo "see the curves:  tensorboard --logdir runs/$NAME"
case ":$PATH:" in *"$PWD/.venv/bin:"*) echo "(first: source .venv/bin/activate)" ;; esac
