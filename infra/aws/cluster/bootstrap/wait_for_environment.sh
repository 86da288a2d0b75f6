#!/bin/bash
# On nodes but the head node, when they start: waits until that has made the release. Login nodes start while the head
# node does, and compute nodes may while it is updated.
#
# wait_for_environment.sh RELEASE
#
# SUPERRES_WAIT  seconds after which it gives up (default: 1800). A login node that has not started after ten minutes is
#                replaced by its Auto Scaling group; the next one waits on.
set -euo pipefail
release=${1:?name of the release}
root=${SUPERRES_ROOT:-} # Everything below another folder, to try it.
wait=${SUPERRES_WAIT:-1800}

fail() { echo "wait_for_environment: error: $*" >&2; exit 1; }

[ -d "$root/fsx" ] || fail "there is no /fsx. Is the file system in SharedStorage?"
until [ -f "$root/fsx/envs/$release/.complete" ]; do
    [ "$SECONDS" -lt "$wait" ] ||
        fail "/fsx/envs/$release was not complete after $wait seconds. See what build_environment.sh says on the head node."
    sleep 1
done
echo "wait_for_environment: release $release is there"
