# Sourced by the run_*.sh scripts: `use_environment FILE...` makes .venv where no environment is
# active, and installs the requirements files unless these very files are installed already.

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c \
            'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed: install one, or name it with PYTHON=/path/to/python"
}

use_environment() {
    local python stamp wanted
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
            python=$(find_python) || exit 1
            echo "making .venv with $("$python" --version)"
            "$python" -m venv .venv ||
                fail "no virtual environment could be made: on Debian, apt install python3-venv"
        fi
        export VIRTUAL_ENV="$PWD/.venv"
        export PATH="$VIRTUAL_ENV/bin:$PATH"
    fi
    stamp="$VIRTUAL_ENV/.newton-gravity-requirements"
    wanted=$(cat "$@" | cksum)
    if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
        echo "installing $* (a few minutes the first time)"
        local files=() file
        for file in "$@"; do files+=(-r "$file"); done
        python -m pip install --disable-pip-version-check "${files[@]}" ||
            fail "the packages could not be installed: see pip's message above, then call again"
        echo "$wanted" >>"$stamp"
    fi
}
