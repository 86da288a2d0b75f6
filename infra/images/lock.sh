#!/bin/sh
# Renews the locks of the images, after "make lock": the same versions as everywhere, without what only tests need.
set -eu
cd "$(dirname "$0")"
root=../..
lock() {
    target=$1 from=$2
    shift 2
    "$root/.venv/bin/uv" pip compile "$@" --universal --python-version 3.11 --no-emit-index-url --no-annotate \
        --no-header --quiet -o "$target"
    sed -i "1i # Made from $from by \"infra/images/lock.sh\"; do not edit." "$target"
}
# Anew: uv would keep what is in the target.
rm -f server.lock worker.lock sbom.lock
lock server.lock "server.in at the versions of requirements.lock" server.in -c "$root/requirements.lock"
lock worker.lock "pyproject.toml at the versions of requirements.lock" "$root/pyproject.toml" \
    -c "$root/requirements.lock"
lock sbom.lock sbom.in sbom.in
