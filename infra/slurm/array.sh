#!/bin/bash
# Nodes of a recipe that need no GPU, on as many machines as the array has tasks:
#
#     sbatch --array=0-63 --cpus-per-task=16 infra/slurm/array.sh RECIPE laion-select laion-download laion-filter
#
# A task knows of no other: what is to be done is shared out through the store, and a task that begins late finds less to do.
#SBATCH --job-name=unidiffuser-array
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@60
set -euo pipefail
umask 077

recipe=${1:?"RECIPE is missing: sbatch --array=0-63 infra/slurm/array.sh RECIPE NODE..."}
shift
: "${1:?"NODE is missing: name what is to be made, such as laion-select laion-download"}"
: "${UNIDIFFUSER_STORE:?"set it to the store that every machine sees, such as s3://BUCKET/runs"}"
# Each task has a Ray of its own, on its machine alone.
unset RAY_ADDRESS

trap 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; kill -TERM "$step" 2>/dev/null || true; exit 0' TERM
for node in "$@"; do
    srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python -m stages "$recipe" "$node" &
    step=$!
    wait "$step"
done
