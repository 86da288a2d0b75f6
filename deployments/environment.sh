#!/bin/sh
# Makes .venv from requirements.lock: on a bare Debian 12 with Python 3.11 or 3.12, as root or not.
#
# SUPERRES_PYTHON  the interpreter (default: the first of python3.11, python3.12, python3 that is 3.11 or 3.12)
# SUPERRES_TORCH   cpu or cuda (default: cuda where an NVIDIA GPU is found, else cpu)
set -eu
cd "$(dirname "$0")/.."

say() { echo "setup: $*" >&2; }
fail() { say "error: $*"; exit 1; }

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

python=${SUPERRES_PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3; do
        if fits "$candidate"; then python=$candidate; break; fi
    done
fi
[ -n "$python" ] || fail "no Python 3.11 or 3.12 found. Install one (Debian 12: apt-get install python3) or set SUPERRES_PYTHON."
fits "$python" || fail "$python is not Python 3.11 or 3.12. Set SUPERRES_PYTHON to one that is."

if [ ! -x .venv/bin/python ] || ! fits .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    if ! "$python" -m venv .venv 2>/dev/null; then
        # Debian splits ensurepip off into a package of its own.
        rm -rf .venv
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            say "installing python$version-venv"
            apt-get update -qq && apt-get install -y -qq --no-install-recommends "python$version-venv" >/dev/null
            "$python" -m venv .venv
        else
            fail "$python cannot create virtual environments. Run: sudo apt-get install python$version-venv"
        fi
    fi
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# torch first: on PyPI its Linux build brings several gigabytes of CUDA libraries, which a machine without a GPU does not
# need. The CPU build has its own index; where that cannot be reached, pip's own configuration decides.
build=${SUPERRES_TORCH:-}
if [ -z "$build" ]; then
    if [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null 2>&1; then build=cuda; else build=cpu; fi
fi
torch=$(sed -n 's/^ *"\(torch==[^"]*\)",$/\1/p' pyproject.toml)
cpu_index=https://download.pytorch.org/whl/cpu
reachable() {
    .venv/bin/python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$cpu_index/torch/" 2>/dev/null
}
say "installing $torch ($build build)"
if [ "$build" = cpu ] && reachable; then
    pip install --quiet --extra-index-url "$cpu_index" "$torch"
else
    pip install --quiet "$torch"
fi

say "installing the locked environment"
# --no-deps: the lock is complete, and leaves out on purpose what realesrgan and basicsr would pull in.
pip install --quiet --no-deps -r requirements.lock
pip install --quiet --no-deps --no-build-isolation -e .
# What the lock held once, and slows down every start: see [tool.uv] in pyproject.toml.
pip uninstall --quiet --yes rfc3987-syntax 2>/dev/null
touch .venv/.ready
say "done: $(du -sh .venv | cut -f1) in .venv, $(.venv/bin/python -c 'import torch; print("torch", torch.__version__)')"
