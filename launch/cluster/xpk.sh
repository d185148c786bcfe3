#!/bin/bash
# TPU slices on Google Kubernetes Engine by xpk (https://github.com/AI-Hypercomputer/xpk), which makes and submits the JobSet:
#
#     CLUSTER=mine PROJECT=mine ZONE=us-east5-a IMAGE=gcr.io/mine/unipic2-tpu TPU_TYPE=v5p-128 SLICES=1 \
#         launch/cluster/xpk.sh unipic2-pdtr configs/pdtr.py gs://mine/runs/pdtr --config.parallel.preset=fsdp
#
# The workdir is a bucket that is mounted in the pods, or any path that all of them see. A preempted workload is started again
# by xpk and goes on from its last checkpoint.
set -euo pipefail

if (($# < 3)); then
    echo "usage: CLUSTER=.. PROJECT=.. ZONE=.. IMAGE=.. TPU_TYPE=.. [SLICES=1] $0 NAME CONFIG WORKDIR [--config.field=value ...]" >&2
    exit 2
fi
name=$1 config=$2 workdir=$3
shift 3
slices=${SLICES:-1}

# The slices of a pod have slow links between them: they are the outer part of the data axis.
train=(python -m launch.train "--config=$config" "--workdir=$workdir" --distributed=on "--config.parallel.slices=$slices" "$@")
exec xpk workload create \
    --cluster="${CLUSTER:?set it to the name of your cluster}" \
    --project="${PROJECT:?set it to your Google Cloud project}" \
    --zone="${ZONE:?set it to the zone of your cluster}" \
    --docker-image="${IMAGE:?set it to an image made from launch/cluster/Dockerfile.tpu}" \
    --tpu-type="${TPU_TYPE:?set it to the type of a slice, as v5p-128}" \
    --num-slices="$slices" \
    --max-restarts="${MAX_RESTARTS:-100}" \
    --workload="$name" \
    --command="$(printf '%q ' "${train[@]}")"
