#!/usr/bin/env bash
# Train on this machine: launch/local.sh PROCESSES --config FILE.toml [--section.field value ...]
# PROCESSES is the number of GPUs, or of CPU processes where there is none. Ends with the run's exit code (docs/cluster.md);
# MAX_RESTARTS=N starts all processes again from the latest checkpoint when one has died.
set -euo pipefail
cd "$(dirname "$0")/.."
processes=${1:?usage: launch/local.sh PROCESSES --config FILE.toml [--section.field value ...]}
shift
# One math thread per process unless you say otherwise: several would fight for the same cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Growing one segment instead of many fixed ones keeps long runs from fragmenting GPU memory.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
exec python -m launch.elastic --standalone --nproc_per_node="$processes" --max-restarts="${MAX_RESTARTS:-0}" \
  train/main.py "$@"
