#!/usr/bin/env bash
# Train on this machine: launch/local.sh PROCESSES --config FILE.toml [--section.field value ...]
# PROCESSES is the number of GPUs, or of CPU processes where there is none. Files and folders of the command line and of the
# configuration (outputs/, data/) are those of the folder it is called from. Ends with the run's exit code (docs/cluster.md);
# MAX_RESTARTS=N starts all processes again from the latest checkpoint when one has died.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
processes=${1:-}
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh PROCESSES --config FILE.toml [--section.field value ...]" >&2
  exit 2
fi
shift
if ! command -v python >/dev/null; then
  echo "newcompute: there is no python on PATH: run \`make setup\` in $root, then \`source $root/.venv/bin/activate\`" >&2
  exit 2
fi
# One math thread per process unless you say otherwise: several would fight for the same cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Growing one segment instead of many fixed ones keeps long runs from fragmenting GPU memory.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
exec python "$root/launch/elastic.py" --standalone --nproc_per_node="$processes" --max-restarts="${MAX_RESTARTS:-0}" \
  "$root/train/main.py" "$@"
