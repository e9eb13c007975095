#!/usr/bin/env bash
# Checks and measures the CUDA path on a GPU machine, in at most 9.5 minutes, most
# valuable first. Written for commit 8bf4e6d, from whose root it is called. tokens/ beside it, if there, holds
# packed token files: meta.json, vocab.json, {train,valid}.bin.xz.
#
# Environment: BUDGET seconds in all; STAGES of probe check operator tune steps train; STEPS (15000); MODELS (ngt,vanilla)
set -u
here=$(cd "$(dirname "$0")" && pwd)
export OUT=${OUT:-/tmp/out} NGT_REPO=${NGT_REPO:-$PWD} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/ngt-triton} TORCHINDUCTOR_CACHE_DIR=/tmp/ngt-inductor
export TORCHINDUCTOR_FX_GRAPH_CACHE=1 PYTHONWARNINGS=ignore
mkdir -p "$OUT"
BUDGET=${BUDGET:-565} STAGES=" ${STAGES:-probe check operator tune steps train} "
PYTHON=${PYTHON:-python3}
began=$(date +%s) end=$(($(date +%s) + BUDGET))
exec > >(tee -a "$OUT/log.txt") 2>&1
now() { echo $(($(date +%s) - began)); }
wanted() { [[ $STAGES == *" $1 "* ]]; }

# stage LIMIT NAME [ARGS]: at most LIMIT seconds, and never past the end
stage() {
    local limit=$1 left=$((end - $(date +%s)))
    shift
    [ "$limit" -lt "$left" ] || limit=$left
    [ "$limit" -gt 5 ] || { echo "== $1: no time left"; return 9; }
    echo "== $(now) s: $* (at most $limit s)"
    UNTIL=$(($(date +%s) + limit)) timeout -k 5 $((limit + 8)) $PYTHON "$here/gpu_check.py" "$@"
    local code=$?
    echo "== $(now) s: $1 ended with $code"
    return $code
}

nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.max.sm --format=csv || true
background=()
if wanted train || wanted steps; then
    tokens="$NGT_REPO/data/tokens/packed"
    if [ -f "$here/tokens/train.bin.xz" ]; then  # 3 s
        (mkdir -p "$tokens" && cp "$here"/tokens/*.json "$tokens/" && for f in train valid; do
            xz -dc "$here/tokens/$f.bin.xz" >"$tokens/$f.bin" || $PYTHON -c "import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], 'wb'))" "$here/tokens/$f.bin.xz" "$tokens/$f.bin"; done) &
        background+=($!)
    elif [ -d "$here/books" ] && ! compgen -G "$NGT_REPO/data/tokens/*/meta.json" >/dev/null; then  # a minute
        (cd "$NGT_REPO" && nice $PYTHON prepare_data.py --dataset text --data-path "$here/books" --tokenizer bpe \
            --tokenizer-path "$here/bpe8192.json" 2>&1 | tail -n 3) &
        background+=($!)
    fi
fi
wanted probe && stage 45 probe
if wanted tune; then
    for k in 0 1 2 3 4 5; do
        UNTIL=$(($(date +%s) + 90)) timeout 95 nice $PYTHON "$here/gpu_check.py" compile $k 6 >/dev/null 2>&1 &
        background+=($!)
    done
fi
verdict=0
if wanted check; then
    (cd "$NGT_REPO" && timeout 100 nice $PYTHON -m pytest tests/test_gravity_triton.py -k "test_gpu" -n 5 -q -p no:cacheprovider \
        --durations=0 --tb=short 2>&1 | tail -n 60) >"$OUT/tests.txt" &
    background+=($!)
    shards=()
    for k in 0 1 2 3; do  # compiling is what takes long
        stage 100 check $k 4 &
        shards+=($!)
    done
    for pid in "${shards[@]}"; do
        wait "$pid"
        code=$?
        [ $code = 9 ] || [ $code -le $verdict ] || verdict=$code
    done
fi
case $verdict in
    0 | 1 | 9) crashed=no ;;
    124 | 137) grep -q '"good": true' "$OUT/results.jsonl" && crashed=no || crashed=yes ;;  # slow, or a hang
    *) crashed=yes ;;
esac
if [ $crashed = yes ]; then  # an exception, a fault or a hang: where, and go on with what needs no kernel of ours
    echo "== the kernels crashed: memcheck on small shapes"
    TINY=1 UNTIL=$(($(date +%s) + 60)) timeout 75 compute-sanitizer --tool memcheck --print-limit 5 \
        $PYTHON "$here/gpu_check.py" check 2>&1 | grep -v '^{' | head -n 60
    export MODELS=vanilla
fi
while [ "$(now)" -lt 170 ] && [ -n "$(jobs -rp)" ] && [ ${#background[@]} -gt 0 ]; do  # the rest wants a quiet machine
    running=0
    for pid in "${background[@]}"; do kill -0 "$pid" 2>/dev/null && running=1; done
    [ $running = 1 ] || break
    sleep 1
done
echo "== $(now) s: quiet"
[ -f "$OUT/tests.txt" ] && tail -n 15 "$OUT/tests.txt"
if wanted operator; then stage 70 operator; fi
if wanted tune; then stage 40 tune; fi
if wanted steps; then stage 110 steps; fi
if wanted train; then
    for mode in ${MODES:-compiled graph eager}; do
        rm -f "$OUT"/curves.jsonl.partial
        MODE=$mode stage 600 train && break
    done
fi
echo "== $(now) s: done"
ls -l "$OUT"
