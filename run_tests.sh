#!/usr/bin/env bash
# Runs the tests; an active environment is used as it is, else .venv is made.
#
#   bash run_tests.sh            what must pass everywhere, minutes on two CPU cores
#   bash run_tests.sh --slow     what takes longer, too; other words go to pytest
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_venv.sh
use_environment requirements.txt tests/requirements.txt

ruff format --check . && ruff check . || fail "run: ruff format . && ruff check --fix ."
exec python -m pytest "$@"
