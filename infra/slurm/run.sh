#!/bin/bash
# A run on a Ray cluster of its own, over the nodes of one Slurm job: sbatch --nodes=4 --gpus-per-node=8 infra/slurm/run.sh RECIPE
# The run goes on where it was when Slurm begins the job again: after a preemption, a node's end, or its time.
#SBATCH --job-name=unidiffuser
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@600
set -euo pipefail
umask 077

recipe=${1:?"RECIPE is missing: sbatch --nodes=4 infra/slurm/run.sh RECIPE"}
: "${UNIDIFFUSER_STORE:?"set it to the store that every node sees, such as s3://BUCKET/runs, or a folder below UNIDIFFUSER_SHARED"}"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(hostname --ip-address)
address=${address%% *}
# Jobs beside this one on a node have numbers, and so ports, of their own.
port=$((20000 + SLURM_JOB_ID % 5000 * 8))
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
folder=${TMPDIR:-/tmp}/unidiffuser-$SLURM_JOB_ID

RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
# As long as a training may take to write a checkpoint when its job is stopped.
RAY_JOB_STOP_WAIT_TIME_S=300
export RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_JOB_STOP_WAIT_TIME_S

# What a recipe's `machines` may name: every node is of both kinds.
ray=(ray start --block --disable-usage-stats --num-cpus="$cpus" --resources='{"cpu-machine": 1, "gpu-machine": 1}'
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=$((port + 2)))
# Whoever may look into Ray's own folder could act as Ray. It goes when Ray has ended.
own='mkdir -m 700 "$0" || exit; "$@" & trap "kill $!" TERM; wait $!; wait $!; rm -rf "$0"'
step=(srun --ntasks-per-node=1 --cpus-per-task="$cpus" --no-kill --kill-on-bad-exit=0 --wait=0)

steps=()
trap 'kill "${steps[@]}" 2> /dev/null || true; wait || true' EXIT
"${step[@]}" --nodes=1 --nodelist="${nodes[0]}" bash -c "$own" "$folder" "${ray[@]}" --head --temp-dir="$folder/ray" \
    --node-ip-address="$address" --port="$port" --ray-client-server-port=$((port + 3)) \
    --dashboard-host="$address" --dashboard-port=$((port + 1)) &
steps+=($!)
for ((waited = 0; ; waited++)); do
    (exec 3<> "/dev/tcp/$address/$((port + 1))") 2> /dev/null && break
    kill -0 "${steps[0]}" 2> /dev/null && ((waited < 600)) ||
        { echo "error: Ray's head has not come up on ${nodes[0]}; its log is above" >&2; exit 1; }
    sleep 1
done
if ((${#nodes[@]} > 1)); then
    "${step[@]}" --nodes=$((${#nodes[@]} - 1)) --exclude="${nodes[0]}" \
        bash -c "$own" "$folder" "${ray[@]}" --address="$address:$port" &
    steps+=($!)
fi

# Slurm says TERM before it takes the nodes: the run then stops its jobs, a training with a checkpoint.
ending='' run=''
trap 'ending=1; kill -TERM "$run" 2> /dev/null || true' TERM
RAY_ADDRESS=http://$address:$((port + 1)) unidiffuser run "$recipe" &
run=$!
code=0
wait "$run" || code=$?
if [[ $ending ]]; then
    # The first wait ends with the signal, this one with the run.
    wait "$run" || true
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
