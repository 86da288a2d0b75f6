#!/bin/bash
# On login nodes, when they start: the Prefect worker of the cluster, as a unit of systemd.
#
# start_worker.sh RELEASE QUEUES WORK_QUEUE SECRET REGION [BLOCKS]
#
# QUEUES      description of the cluster's queues: production or development
# WORK_QUEUE  queue of the Prefect work pool slurm that the worker looks at
# SECRET      ARN of the secret that becomes /etc/superres/environment
# BLOCKS      s3:// address of a TOML file with more blocks of the site
#
# The first cluster registers deployments; after that they are moved by hand, see docs/aws/upgrades.md.
set -euo pipefail
release=${1:?name of the release} queues=${2:?description of the queues} work_queue=${3:?queue of the work pool}
secret=${4:?ARN of the settings} region=${5:?AWS region} blocks=${6:-}
root=${SUPERRES_ROOT:-} # Everything below another folder, to try it.
environment=$root/fsx/envs/$release
settings=$root/etc/superres

fail() { echo "start_worker: error: $*" >&2; exit 1; }

[ -f "$environment/.complete" ] ||
    fail "/fsx/envs/$release is not complete. Make it: build_environment.sh $release SOURCE"
python=$environment/.venv/bin/python

# Readable by the worker alone: it holds passwords. What is incomplete does not stay.
unit=$root/etc/systemd/system/superres-worker.service
trap 'rm -f "$settings/.environment" "$settings/.blocks.toml" "$unit.new"' EXIT
install -d -o 0 -g 4200 -m 0750 "$settings"
umask 027
"$python" - "$region" "$secret" >"$settings/.environment" <<'PYTHON' || fail "cannot read the secret $secret"
import sys
import boto3

region, secret = sys.argv[1:]
print(boto3.client("secretsmanager", region_name=region).get_secret_value(SecretId=secret)["SecretString"], end="")
PYTHON
# The last line of a name counts: the worker is of the release itself, not of what the link will point at one day.
printf '\nPYTHONPATH=%s\n' "/fsx/envs/$release" >>"$settings/.environment"
(cd "$environment" && "$python" -m infra.aws.cluster pools --queues "$queues") >"$settings/.blocks.toml" ||
    fail "release $release knows no queues called $queues"
if [ -n "$blocks" ]; then
    "$python" - "$region" "$blocks" >>"$settings/.blocks.toml" <<'PYTHON' || fail "cannot read $blocks"
import sys
import boto3

region, address = sys.argv[1:]
bucket, _, key = address.removeprefix("s3://").partition("/")
found = boto3.client("s3", region_name=region).get_object(Bucket=bucket, Key=key)
print("\n" + found["Body"].read().decode(), end="")
PYTHON
fi
chown 0:4200 "$settings/.environment" "$settings/.blocks.toml"
mv "$settings/.environment" "$settings/environment"
mv "$settings/.blocks.toml" "$settings/blocks.toml"

# The unit of the project, in the folder of the release: when the link moves on, the worker does not.
mkdir -p "$(dirname "$unit")"
sed -e "s|/opt/superres|/fsx/envs/$release|g" \
    -e "s|--blocks /etc/superres/blocks.toml|& --work-queue $work_queue --if-new|" \
    -e "s|worker start --pool slurm|& --work-queue $work_queue|" \
    "$environment/deployments/systemd/superres-worker.service" >"$unit.new"
grep -q -- "worker start --pool slurm --work-queue $work_queue" "$unit.new" ||
    fail "the unit of release $release is not as expected"
mv "$unit.new" "$unit"
systemctl ${root:+--root "$root"} enable superres-worker.service
if [ -z "$root" ]; then
    systemctl daemon-reload
    systemctl restart --no-block superres-worker.service
fi
echo "start_worker: release $release looks at $work_queue"
