#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a job on a TPU slice of a GKE cluster with JobSet installed; the template is jobset.yaml.
#   NAME=run1 IMAGE=REGISTRY/dcae-jax ACCOUNT=trainer launch/gke.sh [--dry-run] \
#       --config=configs/phase1.py --workdir=gs://BUCKET/run1
# ACCOUNT, a Kubernetes service account, must be allowed to write BUCKET (Workload Identity).
# --dry-run prints the manifest. Logs: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME
set -euo pipefail

NAME=${NAME:?name of the job}
IMAGE=${IMAGE:?image built from launch/Dockerfile}
ACCOUNT=${ACCOUNT:-default}                       # service account of the pods
ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice}  # or tpu-v5p-slice, tpu-v6e-slice
TOPOLOGY=${TOPOLOGY:-4x4}                         # of the node pool
CHIPS=${CHIPS:-4}                                 # per host
RESTARTS=${RESTARTS:-20}
DRY=
if [[ ${1:-} == --dry-run ]]; then DRY=1 && shift; fi
(($#)) || { echo "error: no job; pass the flags of python -m dcae_jax.main" >&2 && exit 2; }

HOSTS=$((${TOPOLOGY//x/*} / CHIPS))
((HOSTS)) || { echo "error: TOPOLOGY=$TOPOLOGY has fewer chips than CHIPS=$CHIPS" >&2 && exit 2; }
quoted=()
for argument in "$@"; do
  argument=${argument//\\/\\\\}
  quoted+=("\"${argument//\"/\\\"}\"")
done
# shellcheck disable=SC2034  # read through ${!key}
ARGUMENTS=$(IFS=, && echo "[${quoted[*]}]")

manifest=$(< "$(dirname "$0")/jobset.yaml")
for key in NAME IMAGE ACCOUNT ACCELERATOR TOPOLOGY CHIPS HOSTS RESTARTS ARGUMENTS; do
  manifest=${manifest//"\${$key}"/"${!key}"}
done
if [[ $DRY ]]; then
  printf '%s\n' "$manifest"
else
  kubectl apply -f - <<< "$manifest"
fi
