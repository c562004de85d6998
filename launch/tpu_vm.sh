#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a job on every worker of a Cloud TPU slice, requested as a queued resource, and reruns it
# after a preemption. Copies the clone's committed files to the workers. From the clone's root:
#   NAME=run1 ZONE=us-east5-b TYPE=v6e-16 launch/tpu_vm.sh [--dry-run] \
#       --config=configs/phase1.py --workdir=gs://BUCKET/run1
# The workers' service account must be allowed to write BUCKET. The slice outlives the job; delete
# it with:
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail

NAME=${NAME:?name of the slice}
ZONE=${ZONE:?zone with such TPUs}
TYPE=${TYPE:-v5litepod-16}               # accelerator type
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}  # runtime version for the type
SPOT=${SPOT:-yes}                        # cheaper, but preemptible
RESTARTS=${RESTARTS:-20}
POLL=${POLL:-30}                         # seconds between polls of a pending resource
DRY=; if [[ ${1:-} == --dry-run ]]; then DRY=1 && shift; fi
(($#)) || { echo "error: no job; pass the flags of python -m dcae_jax.main" >&2 && exit 2; }

tpu() {
  set -- gcloud compute tpus "$@" --zone="$ZONE" --quiet
  if [[ $DRY ]]; then printf '%q ' "$@" >&2 && echo >&2; else "$@"; fi
}
# Empty if there is none; UNKNOWN if the query failed, which is then retried.
state() { tpu queued-resources list --filter="name~/$NAME\$" --format='value(state.state)' || echo UNKNOWN; }
worker() { tpu tpu-vm ssh "$NAME" --worker=all --command="$1"; }

ready() {  # waits for the slice; requests it if there is none, and again after a preemption
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      "")
        tpu queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
          --runtime-version="$RUNTIME" ${SPOT:+$([[ $SPOT == yes ]] && echo --spot)} ;;
      SUSPENDED | FAILED) tpu queued-resources delete "$NAME" --force ;;
    esac
    if [[ $DRY ]]; then break; fi
    sleep "$POLL"
  done
}

archive=$(mktemp -d)/dcae_jax.tar
trap 'rm -rf "${archive%/*}"' EXIT
git archive --output="$archive" HEAD
job="cd ~/dcae_jax && exec .venv/bin/python -m dcae_jax.main $(printf '%q ' "$@")"
for ((run = 0; run <= RESTARTS; run++)); do
  ready
  status=0
  { tpu tpu-vm scp "$archive" "$NAME:" --worker=all && worker "set -e
    mkdir -p ~/dcae_jax && tar -xf dcae_jax.tar -C ~/dcae_jax && cd ~/dcae_jax
    python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,gcs]'" &&
    worker "$job"; } || status=$?
  case $status in 0 | 1 | 2) exit "$status" ;; esac  # 1 and 2 would happen again
  echo "status $status: rerunning" >&2
done
exit 75
