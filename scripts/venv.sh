# Sourced by the other scripts: `ready run` or `ready dev` makes .venv and installs into it, once.
# Needs nothing but Python 3.11 or newer (on a Mac macOS 14 and an arm64 Python), and leaves the
# system's Python alone. POSIX sh and tools: macOS has bash 3.2, and BSD's sed, awk and wc.

# The suite starts the command line some hundred times: its bytecode is worth keeping.
unset PYTHONDONTWRITEBYTECODE

root=$(cd "$(dirname "$0")/.." && pwd)
venv=$root/.venv

# Exits with 1 in a Python that is too old; prints why MLX has no wheel for this one, or nothing.
fitness='
import platform, sys
if sys.version_info < (3, 11):
    sys.exit(1)
if sys.platform == "darwin":
    if int(platform.mac_ver()[0].split(".")[0] or 0) < 14:
        print("runs on macOS", platform.mac_ver()[0] + "; mlxkv needs macOS 14 or newer")
    elif platform.machine() != "arm64":
        print("is an", platform.machine(), "program; mlxkv needs an M-series Mac and an arm64",
              "Python, such as the one from python.org in a terminal that is not under Rosetta")
'

python3_11() {
    reason="mlxkv needs Python 3.11 or newer; none is on the PATH"
    for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
        unfit=$("$name" -c "$fitness" 2>/dev/null) || continue
        if [ -z "$unfit" ]; then
            echo "$name"
            return
        fi
        reason="$name $unfit"
    done
    echo "$reason" >&2
    exit 1
}

make_venv() {
    python=$(python3_11)
    "$python" -m venv "$venv" >/dev/null 2>&1 && return
    # Debian's Python comes without ensurepip; a pip can still bring virtualenv into a folder.
    rm -rf "$venv"
    if "$python" -m pip install --quiet --target "$root/build/virtualenv" virtualenv 2>/dev/null &&
        PYTHONPATH="$root/build/virtualenv" "$python" -m virtualenv --quiet "$venv"; then
        return
    fi
    echo "$python cannot make a virtual environment; on Debian: apt install python3-venv" >&2
    exit 1
}

# What the kernels of Linux' CPU backend are built with (docs/cpu.md): where this can be installed
# without asking, by root on Debian, it is. Without it mlxkv is slower, and `mlxkv doctor` says so.
get_compiler() {
    [ "$(uname)" = Linux ] && [ "$(id -u)" = 0 ] && [ "${MLXKV_KERNELS:-}" != 0 ] || return 0
    command -v apt-get >/dev/null || return 0
    headers=$("$venv/bin/python" -c 'import os, sysconfig
print(os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))') || return 0
    packages=
    command -v g++ >/dev/null || packages=g++
    # Other Pythons than the system's bring their own.
    [ "$headers" = True ] || packages="$packages python3-dev"
    [ -n "$packages" ] || return 0
    echo "mlxkv: installing$(printf ' %s' $packages) (once)" >&2
    # shellcheck disable=SC2086  # a list of packages
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages; } \
        >/dev/null 2>&1 </dev/null || true
}

# The files of tests that are named ROOM/NAME.
test_files() {
    for name; do
        echo "tests/${name%/*}/test_${name#*/}.py"
    done
}

ready() {
    stamp=$venv/.ready-$1
    if [ -e "$stamp" ] && [ ! "$root/pyproject.toml" -nt "$stamp" ] &&
        { [ "$1" = run ] || [ ! "$root/requirements-dev.txt" -nt "$stamp" ]; }; then
        return
    fi
    [ -x "$venv/bin/python" ] || make_venv
    unfit=$("$venv/bin/python" -c "$fitness") || unfit="is older than 3.11"
    if [ -n "$unfit" ]; then
        echo "the Python of $venv $unfit; remove that folder" >&2
        exit 1
    fi
    echo "mlxkv: installing into .venv (once)" >&2
    if [ "$1" = dev ]; then
        "$venv/bin/python" -m pip install --quiet --require-hashes -r "$root/requirements-dev.txt" >&2
        "$venv/bin/python" -m pip install --quiet --no-deps -e "$root" >&2
    else
        "$venv/bin/python" -m pip install --quiet -e "$root" >&2
    fi
    get_compiler
    touch "$stamp"
}
