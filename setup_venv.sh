# Sourced by the run_*.sh scripts: `use_environment FILE...` creates .venv if no environment is
# active, and installs the requirements files unless they are installed already.

# fail MESSAGE...: prints one error line and exits
fail() {
    echo "error: $*" >&2
    exit 1
}

# find_python: prints the first Python of a supported version
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
        echo "installing $* (a few minutes the first time)"
        local files=() file
        for file in "$@"; do files+=(-r "$file"); done
        python -m pip install --disable-pip-version-check "${files[@]}" ||
            fail "the packages could not be installed: see pip's message above, then try again"
        echo "$wanted" >>"$stamp"
    fi
}
