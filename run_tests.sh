#!/usr/bin/env bash
# Runs the tests in the active environment, or creates .venv if none is active.
#
#   bash run_tests.sh            the tests that must pass everywhere, minutes on two CPU cores
#   bash run_tests.sh --slow     also the slow tests; all words go to pytest
#   TORCH=cpu bash run_tests.sh  PyTorch without CUDA, as setup_venv.sh says
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_venv.sh
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then begin --help; fi
use_environment requirements.txt tests/requirements.txt

ruff format --check . && ruff check . || fail "run: ruff format . && ruff check --fix ."
exec python -m pytest "$@"
