#!/bin/bash
# Once for each release, on the head node when it starts or is updated, or by hand on a login node: makes its environment
# below /fsx/envs. It is never changed afterwards: runs under way use it to their end, and all nodes link to it.
#
# build_environment.sh RELEASE SOURCE    SOURCE is a checkout, or an archive that tar can read, here or at s3://...
#
# Run again, it goes on from nothing after a failure, and does nothing after a success. From s3:// it waits for another
# build of the release instead of failing: head nodes of several clusters start at the same time.
set -euo pipefail
release=${1:?name of the release} source=${2:?checkout or archive}
root=${SUPERRES_ROOT:-} # Everything below another folder, to try it.
environment=$root/fsx/envs/$release
PATH=$PATH:/usr/local/bin # Where ParallelCluster has the AWS command line.

say() { echo "build_environment: $*" >&2; }
fail() { say "error: $*"; exit 1; }

[[ $release =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] ||
    fail "$release is no name of a release. Use letters, digits, dots and hyphens."
[[ $source == s3://* ]] || [ -e "$source" ] || fail "there is no $source. Name a checkout or an archive."
[ -d "$root/fsx" ] || fail "there is no /fsx. Run this on a node of the cluster."

mkdir -p "$root/fsx/envs"
exec 9>"$root/fsx/envs/.$release.lock"
if ! flock --nonblock 9; then
    [[ $source == s3://* ]] || fail "another build of $release is under way. Wait for it."
    say "another build of $release is under way, waiting for it"
    # The system lets go of it when that build ends, or its node.
    flock 9
fi
if [ -f "$environment/.complete" ]; then
    say "$release is there already"
    exit 0
fi

if [[ $source == s3://* ]]; then
    command -v aws >/dev/null || fail "there is no aws on this machine. Run this on a node of the cluster."
    archive=$(mktemp --suffix .tar.gz)
    trap 'rm -f "$archive"' EXIT
    aws s3 cp --only-show-errors "$source" "$archive" >&2 || fail "cannot read $source"
    source=$archive
fi

# Built where it will stay: the scripts of a virtual environment name their interpreter by its full path.
rm -rf "$environment"
mkdir "$environment"
if [ -d "$source" ]; then
    # What belongs to the project, not what was made in the checkout.
    git -C "$source" archive HEAD | tar -x -C "$environment"
    from=$(git -C "$source" rev-parse HEAD)
else
    tar -x -f "$source" -C "$environment" || fail "$source is no archive that tar can read. Make it with git archive."
    from=$(sha256sum "$source" | cut -d' ' -f1)
fi
[ -f "$environment/deployments/environment.sh" ] ||
    fail "$source is no checkout of this project: it has no deployments/environment.sh."

# GPU nodes and CPU nodes share it.
SUPERRES_TORCH=${SUPERRES_TORCH:-cuda} sh "$environment/deployments/environment.sh"
# Nobody can write there any more, so what Python would cache at first use is made now.
(cd "$environment" && .venv/bin/python -m compileall -q -x '/\.venv/' .)

chmod -R a-w,a+rX "$environment"
chmod u+w "$environment"
echo "$from" >"$environment/.complete"
chmod a-w "$environment" "$environment/.complete"
say "$release is complete, made from $from"
