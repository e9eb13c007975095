#!/usr/bin/env bash
# Trains a vanilla transformer with rotary positions and an NGT of the same size on Shakespeare, and
# shows the result.
#
#   bash run_shakespeare.sh                        minutes on two CPU cores; call again to continue
#   MAX_STEPS=200 bash run_shakespeare.sh          fewer steps
#   DATA_PATH=my.txt NAME=mine bash run_shakespeare.sh
#
# Settings, given as environment variables: MAX_STEPS BATCH_SIZE BLOCK_SIZE HIDDEN_DIM NUM_LAYERS
# NUM_HEADS LEARNING_RATE SEED DATA_PATH DEVICE, NAME (of the run; a new name keeps both runs) and
# EXTRA_FLAGS (added to both trainings). TORCH=cpu installs PyTorch without CUDA, as setup_venv.sh says.
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_venv.sh
begin "$@"
seen_from_caller DATA_PATH
read_extra_flags
use_environment requirements.txt

NAME=${NAME:-shakespeare}
flags=()
for name in MAX_STEPS BATCH_SIZE BLOCK_SIZE HIDDEN_DIM NUM_LAYERS NUM_HEADS LEARNING_RATE SEED \
    DATA_PATH DEVICE; do
    if [ -n "${!name:-}" ]; then
        flag="--$(echo "$name" | tr 'A-Z_' 'a-z-')"
        flags+=("$flag" "${!name}")
    fi
done

# train MODEL NAME FLAGS...
train() {
    local model=$1 name=$2
    shift 2
    python train_shakespeare.py --model "$model" --checkpoint-path "checkpoints/$name.pt" \
        --run-name "$name" --resume "$@" ${flags[@]+"${flags[@]}"} ${extra[@]+"${extra[@]}"}
}

echo
echo "== 1 of 2: vanilla"
train vanilla "${NAME}_vanilla" --pos rotary
echo
echo "== 2 of 2: NGT"
train ngt "$NAME"

echo
echo "== result"
python report.py --runs "${NAME}_vanilla" "$NAME"
for run in "${NAME}_vanilla" "$NAME"; do
    echo
    echo "== a sample of $run"
    python chat.py --checkpoint-path "checkpoints/${run}.pt_best.pt" --prompt "
" --seed 1 --max-new-tokens 300
done
echo
echo "== the map"
python visualize_coords.py --checkpoint-path "checkpoints/${NAME}.pt_best.pt" \
    --output "coords_${NAME}.html"
echo "talk to it:      python chat.py --checkpoint-path checkpoints/${NAME}.pt_best.pt"
echo "see the curves:  tensorboard --logdir runs"
case ":$PATH:" in *"$PWD/.venv/bin:"*) echo "(first: source .venv/bin/activate)" ;; esac
