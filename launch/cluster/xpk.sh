#!/bin/bash
# TPU slices on Google Kubernetes Engine by xpk (https://github.com/AI-Hypercomputer/xpk), which makes and submits the JobSet:
#
#     CLUSTER=mine PROJECT=mine ZONE=us-east5-a IMAGE=gcr.io/mine/unipic2-tpu TPU_TYPE=v5p-128 SLICES=1 STORAGE=shared \
#         launch/cluster/xpk.sh unipic2-pdtr configs/pdtr.py /shared/runs/pdtr --config.parallel.preset=fsdp
#
# The workdir is a path in STORAGE, which xpk mounts in all pods (docs/clusters.md). A preempted
# workload, and one that lost a pod, is started again by xpk and goes on from its last checkpoint, MAX_RESTARTS times (100).
set -euo pipefail

if (($# < 3)); then
    echo "usage: CLUSTER=.. PROJECT=.. ZONE=.. IMAGE=.. TPU_TYPE=.. STORAGE=.. [SLICES=1] $0 NAME CONFIG WORKDIR [--config.field=value ...]" >&2
    exit 2
fi
name=$1 config=$2 workdir=$3
shift 3
slices=${SLICES:-1}
if [[ $workdir == *://* ]]; then
    echo "The workdir $workdir is an address; give the path at which xpk mounts STORAGE in the pods." >&2
    exit 2
fi

# exec: xpk's shell hands SIGTERM to its child, which is then the training and no other shell.
# The slices of a pod have slow links between them: they are the outer part of the data axis.
train=(exec python -m launch.train "--config=$config" "--workdir=$workdir" --distributed=on "--config.parallel.slices=$slices" "$@")
# 75: a process lost another. xpk restarts after 42 and 127 to 255 and takes every other code for the end of the workload.
exec xpk workload create \
    --cluster="${CLUSTER:?set it to the name of your cluster}" \
    --project="${PROJECT:?set it to your Google Cloud project}" \
    --zone="${ZONE:?set it to the zone of your cluster}" \
    --docker-image="${IMAGE:?set it to an image made from launch/cluster/Dockerfile.tpu}" \
    --tpu-type="${TPU_TYPE:?set it to the type of a slice, as v5p-128}" \
    --storage="${STORAGE:?set it to the storage of the cluster that holds the workdir (xpk storage list)}" \
    --num-slices="$slices" \
    --max-restarts="${MAX_RESTARTS:-100}" \
    --restart-on-exit-codes=75 \
    --termination-grace-period-seconds="${GRACE_SECONDS:-600}" \
    --workload="$name" \
    --command="$(printf '%q ' "${train[@]}")"
