#!/bin/sh
# Builds a virtual environment inside the checkout, once: a second call with the same inputs returns
# at once and installs nothing. Run it from the root of the checkout.
#
#   sh constraints/venv.sh python                            prints the Python it would use
#   sh constraints/venv.sh checkout DIR CONSTRAINTS [EXTRAS] this project, editable, with its extras
#   sh constraints/venv.sh packages DIR CONSTRAINTS NAME...  only these, without what they ask for
#
# PYTHON=... in the environment names the interpreter; pip's own PIP_* variables hold.
# Exit status 3: no suitable Python, said in one sentence.
set -eu

# A name on PATH proves nothing (pyenv's shims answer to versions that are not active), so every
# candidate is executed: a 64-bit CPython within [$2, $3) that can make an environment with pip.
suitable() {
    "$1" -c '
import ensurepip, sys, sysconfig, venv
lowest, above = (tuple(map(int, version.split("."))) for version in sys.argv[1:])
good = lowest <= sys.version_info[:2] < above and sys.implementation.name == "cpython"
sys.exit(not (good and sys.maxsize > 2**32 and not sysconfig.get_config_var("Py_GIL_DISABLED")))
' "$2" "$3" >/dev/null 2>&1
}

# The newest 3.$1 that pyenv has installed, active or not.
pyenv_python() {
    root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "${HOME:-}/.pyenv")}
    for patch in "$root/versions/3.$1".*; do echo "${patch##*.}"; done | sort -rn |
        while read -r patch; do
            found=$root/versions/3.$1.$patch/bin/python
            if suitable "$found" 3.12 4.0; then echo "$found" && break; fi
        done
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        if suitable "$PYTHON" 3.12 4.0; then echo "$PYTHON" && return; fi
        echo "PYTHON=$PYTHON is not a 64-bit CPython >= 3.12 with the modules venv and ensurepip." >&2
        return 3
    fi
    # 3.12 first: the verified stack was verified on it. All of it has wheels for 3.13 too.
    for minor in 12 13; do
        if suitable "python3.$minor" 3.12 4.0; then echo "python3.$minor" && return; fi
        found=$(pyenv_python "$minor")
        if [ -n "$found" ]; then echo "$found" && return; fi
    done
    # Newer ones last: a wheel may be missing.
    for above in 3.14 4.0; do
        for found in python3 python python3.14; do
            if suitable "$found" 3.12 "$above"; then echo "$found" && return; fi
        done
    done
    echo "No Python >= 3.12 with its venv module was found (looked for python3.12, python3.13," \
        "python3 and pyenv's versions): install one, or run make PYTHON=/path/to/python." >&2
    return 3
}

# All that the environment depends on, its own place too: console scripts hold absolute paths.
key() {
    printf '%s\n' "$request" "${PYTHON:-}" "$PWD"
    cksum pyproject.toml "constraints/$constraints" constraints/venv.sh
    "$dir/bin/python" -V 2>&1
}

if [ "$1" = python ]; then
    find_python
    exit
fi
request=$* mode=$1 dir=$2 constraints=$3
shift 3
# One stamp a request: asking for more extras keeps what was installed for fewer.
stamp=$dir/stamp-$(printf %s "$request" | cksum | cut -d ' ' -f 1)
if [ -f "$stamp" ] && [ "$(key)" = "$(cat "$stamp")" ]; then exit 0; fi

python=$(find_python)
echo "$dir: $("$python" -V 2>&1) with constraints/$constraints; this takes minutes, once" >&2
rm -f "$stamp"
# An environment that still works here is brought up to date instead of downloaded again.
if [ -n "${PYTHON:-}" ] || ! suitable "$dir/bin/python" 3.12 4.0 ||
    ! grep -qF "$PWD/$dir" "$dir/bin/activate"; then
    "$python" -m venv --clear "$dir"
fi
if [ "$mode" = checkout ]; then
    set -- --editable ".${1:+[$1]}"
else
    set -- --no-deps "$@"
fi
[ -t 2 ] || set -- --quiet "$@"
PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    "$dir/bin/python" -m pip install --constraint "constraints/$constraints" "$@" >&2
key >"$stamp"
