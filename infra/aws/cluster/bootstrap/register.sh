#!/bin/bash
# On a login node, by hand: runs that start from now on are of this release, and new ones go to this work queue. Those
# under way are left alone. The way back is the same command with the release or the queue before.
#
# register.sh RELEASE WORK_QUEUE
set -euo pipefail
release=${1:?name of the release} work_queue=${2:?queue of the work pool slurm}
root=${SUPERRES_ROOT:-} # Everything below another folder, to try it.
environment=$root/fsx/envs/$release
settings=$root/etc/superres

fail() { echo "register: error: $*" >&2; exit 1; }

[ -f "$environment/.complete" ] ||
    fail "/fsx/envs/$release is not complete. Make it: build_environment.sh $release SOURCE"
[ -f "$settings/environment" ] || fail "there is no /etc/superres/environment. Run this on a login node."

# As systemd reads it: lines of NAME=VALUE, taken as they are.
mapfile -t variables < <(grep -E '^[A-Za-z_]+=' "$settings/environment")
user=(setpriv --reuid 4200 --regid 4200 --clear-groups)
[ -z "$root" ] || user=()
cd "$environment"
exec "${user[@]}" env "${variables[@]}" PYTHONPATH="$environment" \
    "$environment/.venv/bin/python" -m deployments.bootstrap \
    --site slurm --blocks "$settings/blocks.toml" --work-queue "$work_queue"
