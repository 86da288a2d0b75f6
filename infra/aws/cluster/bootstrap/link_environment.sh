#!/bin/bash
# On every node, when it starts: makes /opt/superres the environment of a release, which lies complete on the site's file
# system. Nothing is installed: a node is ready a moment after it has booted.
#
# link_environment.sh RELEASE
set -euo pipefail
release=${1:?name of the release}
root=${SUPERRES_ROOT:-} # Everything below another folder, to try it.
environment=$root/fsx/envs/$release

fail() { echo "link_environment: error: $*" >&2; exit 1; }

[ -d "$root/fsx" ] || fail "there is no /fsx. Is the file system in SharedStorage?"
[ -f "$environment/.complete" ] ||
    fail "/fsx/envs/$release is not complete. Make it: build_environment.sh $release SOURCE"

# Jobs run as the user of the worker, who is the same on all nodes.
if ! grep -q '^superres:' "$root/etc/passwd"; then
    groupadd ${root:+--prefix "$root"} --gid 4200 superres
    useradd ${root:+--prefix "$root"} --uid 4200 --gid 4200 --home-dir /fsx/superres/home --no-create-home \
        --shell /bin/bash superres
fi
for folder in superres superres/home superres/logs superres/scratch; do
    install -d -o 4200 -g 4200 -m 0750 "$root/fsx/$folder"
done

# A link of this name is replaced in one step.
mkdir -p "$root/opt"
ln -sfn "/fsx/envs/$release" "$root/opt/.superres.$$"
mv -T "$root/opt/.superres.$$" "$root/opt/superres"
echo "link_environment: /opt/superres is release $release"
