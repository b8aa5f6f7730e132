#!/usr/bin/env bash
# Train on several nodes: sbatch --nodes=4 launch/slurm.sh --config configs/llama3_8b.toml [--section.field value ...]
# Options of sbatch before the script's name override the lines below. docs/cluster.md explains requeueing and exit codes.
#SBATCH --job-name=newcompute
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
# One log for all starts of the job.
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
# 300 s before the time limit every process gets USR1, saves and exits with 75; the job then goes back into the queue.
#SBATCH --signal=USR1@300
# After a node failure or a preemption SLURM itself puts the job back.
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the repository root}"
if [ -x .venv/bin/python ]; then export PATH="$PWD/.venv/bin:$PATH"; fi

# Processes per node: one per GPU.
processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
# Restarts of all processes within the job after one died, before the job is given back.
max_restarts=${MAX_RESTARTS:-3}
# Times that the job is put back into the queue after a failure which a restart may cure.
max_requeues=${MAX_REQUEUES:-5}
# PREFLIGHT=0 leaves the check of GPUs, links and disk out.
preflight=${PREFLIGHT:-1}

# The first node hosts the rendezvous; the port follows from the job, so that two jobs on a node do not meet.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${nodes[0]}
port=$((20000 + SLURM_JOB_ID % 20000))
start=${SLURM_RESTART_COUNT:-0}

# One process per GPU shares the node's cores; more threads than this fight for them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Growing one segment instead of many fixed ones keeps long runs from fragmenting GPU memory.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# A collective that fails ends its process with an error (3: without waiting for the GPU to clean up, which can hang).
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}
# Warnings name the node and the link of a failure; more detail is too much on many GPUs.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# 4 microseconds x 2^22 = 17 s per retry, seven retries: a switch that restarts a link takes longer than the default's few seconds.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# Which network interface is used is the site's to say: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and NCCL_IB_HCA pass through.

# srun takes no --cpus-per-task over from sbatch since Slurm 22.05: without it all workers share one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# Memory beside the GPU's own PCIe root: batches and checkpoints pass through it. torch binds each process with numactl.
binding=()
if command -v numactl >/dev/null && command -v nvidia-smi >/dev/null; then binding=(--numa-binding=node); fi

# A signal to this script goes on to srun, which passes it to its tasks. bash runs the trap at once only while it waits.
step=
signalled=0
trap 'signalled=1; if [ -n "$step" ]; then kill -USR1 "$step" 2>/dev/null || true; fi' USR1 TERM

# run_step NAME PORT RESTARTS SCRIPT FLAGS...: one launcher on every node; returns the highest exit code.
# The nodes share one fate (--kill-on-bad-exit): a node that is gone ends the step instead of leaving the others waiting.
run_step() {
  local name=$1 step_port=$2 restarts=$3 code=1 ended
  shift 3
  # shellcheck disable=SC2016  # SLURM_NODEID and SLURMD_NODENAME are those of the node
  srun --kill-on-bad-exit=1 bash -c 'exec python -m launch.elastic \
      --rdzv_conf="is_host=$((SLURM_NODEID == 0))" --local_addr="$SLURMD_NODENAME" "$@"' launcher \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$processes" --max-restarts="$restarts" "${binding[@]}" \
    --rdzv_backend=c10d --rdzv_endpoint="$head_node:$step_port" --rdzv_id="$SLURM_JOB_ID-$start-$name" "$@" &
  step=$!
  while true; do # the trap ends a wait before srun has ended; 127: srun's code is already known
    signalled=0
    wait "$step" && ended=0 || ended=$?
    if [ "$ended" != 127 ]; then code=$ended; fi
    if [ "$signalled" = 0 ]; then break; fi
  done
  step=
  return "$code"
}

code=0
if [ "$preflight" != 0 ]; then
  run_step preflight "$((port + 1))" 0 launch/preflight.py "$@" || code=$?
fi
if [ "$code" = 0 ]; then
  run_step train "$port" "$max_restarts" train/main.py "$@" || code=$?
fi

# What comes next: docs/cluster.md has the table of exit codes.
record=slurm-$SLURM_JOB_ID.requeues  # one line per requeue, with its reason
case $code in
  0 | 2 | 3 | 4 | 130) exit "$code" ;;  # finished, a restart would end the same way, or stopped by hand
  75) reason=preempted ;;
  *)
    reason="failed with exit code $code"
    # SLURM_RESTART_COUNT counts preemptions as well; only failures are limited.
    failures=$(grep -c failed "$record" 2>/dev/null || true)
    if [ "${failures:-0}" -ge "$max_requeues" ]; then
      echo "$reason after $max_requeues requeues for failures: giving up"
      exit "$code"
    fi
    ;;
esac
# A job that was cancelled is no longer running, and must not come back.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null || true)
if [ "$state" != RUNNING ]; then
  echo "$reason; the job is ${state:-no longer known}, so it is not put back into the queue"
  exit "$code"
fi
echo "$(date -Is) start $start: $reason" >>"$record"
echo "$reason: back into the queue"
# A requeue ends this script. Where it is refused (a partition without requeue), the job ends with the code.
scontrol requeue "$SLURM_JOB_ID" || exit "$code"
sleep 60
exit "$code"
