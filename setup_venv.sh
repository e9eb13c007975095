#!/usr/bin/env bash
# Installs what the scripts need into the active environment, or into .venv, which it creates if no
# environment is active. The run_*.sh scripts do this themselves.
#
#   bash setup_venv.sh                        then: source .venv/bin/activate
#   PYTHON=python3.12 bash setup_venv.sh      with a certain Python
#
# Settings, given as environment variables, here and for the run_*.sh scripts:
#   PYTHON    the Python that creates .venv, 3.11 to 3.14 (default: the first one found)
#   TORCH     cpu or cuda: which build of PyTorch to install on Linux, with the other packages about
#             450 MB or 3 GB to download (default: cuda if there is an NVIDIA driver, otherwise cpu)

# fail MESSAGE...: prints one error line and exits
fail() {
    echo "error: $*" >&2
    exit 1
}

# manual: prints the comment at the top of the running script
manual() {
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$(basename "$0")"
}

# begin WORD...: a script's first step after its cd; prints the manual for --help, refuses other
# words, and prepares the last line after Ctrl-C
begin() {
    local name
    called_from=${OLDPWD:-$PWD} given=()
    if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
        manual
        exit
    elif [ $# != 0 ]; then
        echo "error: unknown word $1: settings stand before the command, NAME=value bash ${0#./};" \
            "--help lists them" >&2
        exit 2
    fi
    # a setting has four letters or more; the manuals also write GPU and NGT
    for name in $(manual | grep -ow '[A-Z][A-Z_]\{3,\}' | sort -u); do
        [ -z "${!name:-}" ] || given+=("$(printf '%s=%q' "$name" "${!name}")")
    done
    trap 'exit 130' INT # runs when the program has ended that Ctrl-C stopped
    trap say_how_to_continue EXIT
}

say_how_to_continue() {
    case $? in 129 | 130 | 143) ;; *) return ;; esac
    [ ${#given[@]} = 0 ] || echo "with the same settings: ${given[*]}"
    printf 'continue with: bash %q\n' "${0#./}"
}

# seen_from_caller NAME...: makes variables with paths right here: a relative one was meant in the
# directory that the script was called from
seen_from_caller() {
    local name
    for name in "$@"; do
        case "${!name:-}" in
            "" | /*) ;;
            \~ | \~/*) printf -v "$name" %s "$HOME${!name#\~}" ;;
            *) [ "$called_from" -ef . ] || printf -v "$name" %s "$called_from/${!name}" ;;
        esac
    done
}

# read_extra_flags: sets `extra` to the words of EXTRA_FLAGS
read_extra_flags() {
    local i value flag
    read -r -a extra <<<"${EXTRA_FLAGS:-}"
    for ((i = 0; i < ${#extra[@]}; i++)); do
        case "${extra[i]}" in
            --data-path=* | --tokenizer-path=* | --token-directory=* | --resume-from=*)
                flag=${extra[i]%%=*}= value=${extra[i]#*=}
                ;;
            --data-path | --tokenizer-path | --token-directory | --resume-from)
                i=$((i + 1)) flag= value=${extra[i]:-}
                ;;
            *) continue ;;
        esac
        seen_from_caller value
        [ -z "$value" ] || extra[i]=$flag$value
    done
}

# is_supported PYTHON: whether it exists and has a supported version
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

# find_python: prints PYTHON, or the first Python of a supported version
find_python() {
    local candidate candidates=(python3.12 python3.11 python3.13 python3.14 python3 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "${PYTHON:+PYTHON=$PYTHON is none: }Python 3.11 to 3.14 is needed: install one, or name it" \
        "with PYTHON=/path/to/python"
}

CPU_INDEX=https://download.pytorch.org/whl/cpu

# wants_cuda: whether to install PyTorch's build with CUDA
wants_cuda() {
    case "${TORCH:-}" in
        cuda) ;;
        cpu) return 1 ;;
        *) nvidia-smi -L >/dev/null 2>&1 || [ -e /proc/driver/nvidia/version ] ;;
    esac
}

# install FILE...: installs requirements files; says before how much it downloads
install() {
    local pip=(python -m pip install --disable-pip-version-check) files=() file
    for file in "$@"; do files+=(-r "$file"); done
    is_supported python || fail "Python 3.11 to 3.14 is needed, not $(python --version)"
    if [ "$(uname)" = Linux ] && wants_cuda; then
        echo "installing $*: about 3 GB to download, CUDA included (TORCH=cpu: 450 MB)"
    else
        echo "installing $*: about 450 MB to download, a few minutes"
        # PyPI's PyTorch for Linux includes CUDA, so that for CPUs comes from PyTorch's own index. If
        # it does not come, pip finds none installed below and takes PyPI's.
        [ "$(uname)" != Linux ] || "${pip[@]}" --no-deps --retries 0 --timeout 10 \
            --index-url "$CPU_INDEX" "$(grep '^torch==' requirements.txt)" 2>/dev/null ||
            echo "$CPU_INDEX cannot be reached: PyPI's PyTorch includes CUDA, about 3 GB to download"
    fi
    "${pip[@]}" "${files[@]}" ||
        fail "the packages could not be installed: see pip's message above, then try again"
}

# use_environment FILE...: activates or creates an environment with these requirements files
use_environment() {
    local python stamp wanted
    case "${TORCH:-}" in "" | cpu | cuda) ;; *) fail "TORCH=$TORCH is unknown: give cpu or cuda" ;; esac
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
            case "${PYTHON:-}" in */*) seen_from_caller PYTHON ;; esac
            python=$(find_python) || exit 1
            echo "creating .venv with $("$python" --version)"
            "$python" -m venv .venv ||
                fail "the virtual environment could not be created: on Debian, apt install python3-venv"
        fi
        export VIRTUAL_ENV="$PWD/.venv"
        export PATH="$VIRTUAL_ENV/bin:$PATH"
    fi
    stamp="$VIRTUAL_ENV/.newton-gravity-requirements"
    wanted=$(cat "$@" | cksum)
    if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
        install "$@"
        echo "$wanted" >>"$stamp"
    fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    cd "$(dirname "$0")"
    begin "$@"
    use_environment requirements.txt
    case "$VIRTUAL_ENV" in "$PWD/.venv") echo "ready: source .venv/bin/activate" ;; esac
fi
