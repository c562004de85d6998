#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a job on GPU nodes of a Slurm cluster, one process per GPU. From the root of a clone on a
# shared file system, with .venv made by `pip install -e '.[cuda13]'`:
#   NAME=run1 NODES=2 GPUS=8 launch/slurm.sh [--dry-run] --config=configs/phase1.py --workdir=runs/1
# --dry-run prints the batch script.
set -euo pipefail

NAME=${NAME:?name of the job}
NODES=${NODES:-1}
GPUS=${GPUS:-8}              # per node
CPUS=${CPUS:-8}              # per process, for image readers
HOURS=${HOURS:-24}           # time limit; the job saves two minutes earlier and is requeued
PARTITION=${PARTITION:-}     # empty: the cluster's default
PYTHON=${PYTHON:-.venv/bin/python}
RESTARTS=${RESTARTS:-20}
DRY=
if [[ ${1:-} == --dry-run ]]; then DRY=1 && shift; fi
(($#)) || { echo "error: no job; pass the flags of python -m dcae_jax.main" >&2 && exit 2; }

# --gres: with --gpus-per-task, a process would see only its own GPU, not its neighbours'.
read -r -d '' script << END || true
#!/usr/bin/env bash
#SBATCH --job-name=$NAME
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$GPUS
#SBATCH --gres=gpu:$GPUS
#SBATCH --cpus-per-task=$CPUS
#SBATCH --time=$HOURS:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$NAME-%j.log
${PARTITION:+#SBATCH --partition=$PARTITION}
# The first failure is the cause; the other processes fail as a consequence.
first=$NAME-\$SLURM_JOB_ID.status
rm -f "\$first"
status=0
srun --cpus-per-task=$CPUS --kill-on-bad-exit=1 bash -c 'trap : TERM; "\$@" || { s=\$?; echo \$s >> "\$0"; exit \$s; }' \\
  "\$first" $(printf '%q ' "$PYTHON" -m dcae_jax.main "$@") || status=\$?
if [[ -s \$first ]]; then read -r status < "\$first"; fi
case \$status in 0 | 1 | 2) exit "\$status" ;; esac  # 1 and 2 would happen again
if ((\${SLURM_RESTART_COUNT:-0} < $RESTARTS)); then
  echo "status \$status: requeued"
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$status"
END
if [[ $DRY ]]; then
  printf '%s\n' "$script"
else
  sbatch <<< "$script"
fi
