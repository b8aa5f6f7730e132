#!/usr/bin/env bash
# Train on several nodes: sbatch --nodes=4 launch/slurm.sh --config configs/llama3_8b.toml [--section.field value ...]
# Started again with the same arguments, a run goes on from its latest complete checkpoint.
#SBATCH --job-name=newcompute
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the repository root}"
if [ -x .venv/bin/python ]; then export PATH="$PWD/.venv/bin:$PATH"; fi

# The first node hosts the rendezvous; the port follows from the job, so that two jobs on a node do not meet.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# A collective that fails ends its process with an error instead of hanging the job.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}

# srun takes no --cpus-per-task over from sbatch since Slurm 22.05: without it all workers share one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-96}

srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_NNODES" \
  --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv_id="$SLURM_JOB_ID" \
  --rdzv_backend=c10d \
  --rdzv_endpoint="$head_node:$port" \
  train/main.py "$@"
