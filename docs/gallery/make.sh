#!/usr/bin/env bash
# Makes the gallery: trains small models on English, Korean and Python code, and writes a page of each.
#
#   bash docs/gallery/make.sh                      about half an hour on two cores; again to continue
#   PAGES=korean bash docs/gallery/make.sh         only this page, a few minutes
#   PAGES="english code" bash docs/gallery/make.sh
#
# The texts come from the network: docs/training.md says from where for Shakespeare, corpora.py beside
# this file for the others. A trained model is kept: delete checkpoints/gallery and runs/gallery to
# train anew.
#
# Settings, given as environment variables: PAGES (which of english, compare, korean and code;
# default: all), DEVICE and EXTRA_FLAGS (added to the trainings). TORCH=cpu installs PyTorch without
# CUDA, as setup_venv.sh says.
set -euo pipefail
cd "$(dirname "$0")"
source ../../setup_venv.sh
begin "$@"
cd ../..
read_extra_flags
use_environment requirements.txt

PAGES=${PAGES:-english compare korean code}
[ -z "${DEVICE:-}" ] || extra+=(--device "$DEVICE")

# train MODEL NAME TEXT FLAGS...
train() {
    local model=$1 name=$2 text=$3
    shift 3
    echo
    echo "== the model $name"
    python train_shakespeare.py --model "$model" --dataset text --data-path "$text" \
        --block-size 128 "$@" --checkpoint-path "checkpoints/gallery/$name.pt" \
        --run-name "gallery/$name" --resume ${extra[@]+"${extra[@]}"}
}

# train_english MODEL NAME
train_english() {
    python prepare_data.py --dataset shakespeare
    train "$1" "$2" data/shakespeare/input.txt --max-steps 2000
}

# page NAME MODEL FLAGS...
page() {
    local name=$1 model=$2
    shift 2
    python visualize_coords.py --checkpoint-path "checkpoints/gallery/$model.pt_best.pt" \
        --text-file "docs/gallery/$model.txt" --output "docs/gallery/$name.html" "$@"
}

for name in $PAGES; do
    case $name in
        english)
            train_english ngt english
            page english english
            ;;
        compare)
            train_english ngt english
            train_english vanilla english_vanilla
            # vanilla reads no more than a window of its training, which is 128 tokens
            page compare english --num-tokens 122 \
                --compare checkpoints/gallery/english_vanilla.pt_best.pt
            ;;
        korean)
            python docs/gallery/corpora.py data/gallery
            train ngt korean data/gallery/korean.txt --max-steps 400 --eval-interval 50 \
                --bpe-vocab-size 1024 --dropout 0.2
            page korean korean
            ;;
        code)
            python docs/gallery/corpora.py data/gallery
            train ngt code data/gallery/code.txt --max-steps 2000
            page code code
            ;;
        *) fail "PAGES=$name is unknown: give english, compare, korean or code" ;;
    esac
done
echo
echo "open docs/gallery/index.html"
