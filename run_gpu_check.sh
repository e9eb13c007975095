#!/usr/bin/env bash
# Checks the CUDA path on your GPU, measures it, trains both 25M models on it as long as time allows,
# and writes reports/gpu.md.
#
#   bash run_gpu_check.sh                                  ten minutes, on tiny Shakespeare
#   MINUTES=60 DATA_PATH=books/ bash run_gpu_check.sh      on your text: a file or a folder
#   STAGES="steps compiled report" bash run_gpu_check.sh   parts of it
#   TINY=1 bash run_gpu_check.sh                           the small form, on a CPU
#
# Every result is a line of runs/NAME/results.jsonl at once, so a kill loses nothing. Call the script
# again to continue: stages that ended well are not repeated, and both trainings go on. The exit code
# is 1 if one failed; to run out of time is no failure.
#
# Settings, given as environment variables, with their defaults:
#   MINUTES=10           in all, once packages and text are there
#   STAGES="correctness tests operator steps compiled training report"
#                        correctness: the operator against float64 on a training's shapes; tests: those
#                        of tests/gravity/test_cuda.py that need a GPU; operator: against flash and cuDNN
#                        attention; steps, compiled: of a training, without and with --compile;
#                        training: both models, each half of the time that is left
#   NAME=gpu             names the report, and the folders below runs/, checkpoints/ and logs/
#   DATA_PATH            (default: tiny Shakespeare, downloaded)
#   TOKEN_DIRECTORY      in its place, a folder of token files, as prepare_data.py writes them from a
#                        BPE of 8192 tokens
#   STEPS=15000          of each training, 16,384 tokens each
#   EXTRA_FLAGS          added to both trainings
#   TORCH=cpu            with TINY=1: install PyTorch without CUDA, as setup_venv.sh says
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_venv.sh
begin "$@"
seen_from_caller DATA_PATH TOKEN_DIRECTORY

TINY=${TINY:-}
MINUTES=${MINUTES:-10}
[[ $MINUTES =~ ^[1-9][0-9]*$ ]] || fail "MINUTES=$MINUTES is not a number of minutes: give at least 1"
if [ -n "$TINY" ]; then
    NAME=${NAME:-gpu_tiny} STEPS=${STEPS:-4}
    STAGES=${STAGES:-correctness tests operator steps training report} # compiling takes long
    device=(--device cpu)
    check=(--batch-size 2 --block-size 24 --longest 40) workers=0
    operator=(--block-sizes 16,32 --batch-tokens 32 --steps 1)
    step=(--preset shakespeare --batch-size 2 --block-size 16 --steps 1)
    shape=(--hidden-dim 16 --num-layers 1 --num-heads 2 --block-size 16 --batch-size 2)
    compile=()
else
    nvidia-smi -L >/dev/null 2>&1 ||
        fail "no NVIDIA GPU is here (nvidia-smi finds none): TINY=1 tries the script on a CPU"
    NAME=${NAME:-gpu} STEPS=${STEPS:-15000}
    STAGES=${STAGES:-correctness tests operator steps compiled training report}
    device=(--device cuda)
    check=(--jobs 4) workers=4 # compiling the kernels is what takes long
    operator=(--dtype bf16 --block-sizes 512,1024,2048,4096,8192,16384 --batch-tokens 8192)
    step=(--dtype bf16 --batch-size 32)
    shape=(--hidden-dim 512 --num-layers 8 --num-heads 8 --block-size 512 --batch-size 32
        --gradient-accumulation-steps 1 --num-parameters 25650000)
    compile=(--compile)
fi
[[ $STEPS =~ ^[1-9][0-9]*$ ]] || fail "STEPS=$STEPS is not a number of steps: give at least 1"
corpus=(--dataset shakespeare)
[ -z "${DATA_PATH:-}" ] || corpus=(--dataset text --data-path "$DATA_PATH")
corpus+=(--tokenizer bpe --bpe-vocab-size 8192)
[ -z "${TOKEN_DIRECTORY:-}" ] || corpus=(--dataset wikitext103 --token-directory "$TOKEN_DIRECTORY")
read_extra_flags

# describe STAGE: sets `command` (what Python is called with) and `share` (percent of the time, at most)
describe() {
    case "$1" in
        correctness) share=20 command=(benchmark.py correctness "${device[@]}" "${check[@]}") ;;
        tests) share=20 command=(-m pytest -n "$workers" -k gpu tests/gravity/test_cuda.py) ;;
        operator) share=15 command=(benchmark.py attention "${device[@]}" "${operator[@]}") ;;
        steps)
            share=12 command=(benchmark.py train "${device[@]}" "${step[@]}" --no-peak --against
                vanilla eager)
            ;;
        compiled)
            share=20 command=(benchmark.py train "${device[@]}" "${step[@]}" --no-peak --against
                vanilla compiled --compile)
            ;;
        training) command=() ;;
        report) command=() ;;
        *) fail "STAGES contains $1, which is unknown: choose from correctness, tests, operator," \
            "steps, compiled, training, report" ;;
    esac
}
for stage in $STAGES; do describe "$stage"; done
use_environment requirements.txt tests/requirements.txt
mkdir -p "runs/$NAME" "logs/$NAME"
results=runs/$NAME/results.jsonl

# note KEY VALUE...: appends a line of JSON to the results
note() {
    python -c 'import json, sys; a = sys.argv[1:]; print(json.dumps(dict(zip(a[::2], a[1::2]))))' \
        "$@" >>"$results"
}

# run_stage STAGE: runs its command for at most its share of the time, and never past the end
run_stage() {
    describe "$1"
    local limit=$((MINUTES * 60 * share / 100)) left=$((end - SECONDS)) began=$SECONDS code=0
    local log=logs/$NAME/$1.log json=()
    if grep -F "\"command\": \"${command[*]}\", \"exit\": \"0\"" "$results" >/dev/null; then
        echo "done already: delete $results to repeat it"
        return
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "no time is left for it"
        return
    fi
    [ "${command[0]}" != benchmark.py ] || json=(--json "$results")
    timeout --foreground -k 10 "$limit" python "${command[@]}" ${json[@]+"${json[@]}"} 2>&1 |
        tee -i "$log" || code=$?
    [ "$code" != 130 ] || exit 130
    [ "$code $1" != "2 correctness" ] || exit 2 # a flag is wrong: the others would fail, too
    [ "$code" = 0 ] || [ "$code" = 124 ] || status=1
    note stage "$1" command "${command[*]}" exit "$code" seconds $((SECONDS - began)) \
        last_line "$(tail -n 1 "$log")"
}

# train SECONDS MODEL FLAGS...: trains a model, or goes on with it, for at most so many seconds
train() {
    local seconds=$1 model=$2 code=0 began=$SECONDS
    shift 2
    if [ "$seconds" -lt 10 ]; then
        echo "no time is left for $model"
        return
    fi
    local flags=("$@" "${corpus[@]}" "${shape[@]}" "${device[@]}" --recipe gpt2 --use-amp
        --learning-rate 6e-4 --min-learning-rate 6e-5 --warmup-steps $((STEPS * 2 / 15))
        --max-steps "$STEPS" --eval-interval $((STEPS < 30 ? 1 : STEPS / 30)) --eval-iters 16
        --checkpoint-interval $((STEPS < 6 ? 1 : STEPS / 6)) --sample-tokens 0
        --checkpoint-path "checkpoints/$NAME/$model.pt" --run-name "$NAME/$model" --resume
        ${extra[@]+"${extra[@]}"})
    # at the end of its time it saves and exits with 143, and timeout with 124. Without setsid Ctrl-C
    # would reach it twice, from the terminal and from timeout: the second would end it unsaved.
    timeout --foreground -k 30 "$seconds" setsid python train_shakespeare.py "${flags[@]}" \
        ${compile[@]+"${compile[@]}"} 2>&1 | tee -ia "logs/$NAME/$model.log" || code=$?
    [ "$code" != 130 ] || exit 130
    if [ "$code" = 1 ] && [ ${#compile[@]} != 0 ]; then
        echo "== the same without --compile"
        compile=()
        train $((seconds - (SECONDS - began))) "$model" "$@"
    elif [ "$code" != 0 ] && [ "$code" != 124 ]; then
        status=1
    fi
}

echo "== the text"
[ -n "${TOKEN_DIRECTORY:-}" ] || python prepare_data.py "${corpus[@]}"
end=$((SECONDS + MINUTES * 60)) status=0
for stage in $STAGES; do
    describe "$stage"
    [ ${#command[@]} = 0 ] || note stage "$stage" command "${command[*]}"
done
for stage in $STAGES; do
    echo
    echo "== $stage ($((end - SECONDS)) s left)"
    case "$stage" in
        training)
            train $(((end - SECONDS) / 2 - 10)) ngt --model ngt
            train $((end - SECONDS - 10)) vanilla --model vanilla --pos rotary
            ;;
        report) python report.py --gpu-check "$NAME" --output "reports/$NAME.md" ;;
        *) run_stage "$stage" ;;
    esac
done
exit $status
