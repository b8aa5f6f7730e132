#!/usr/bin/env bash
# A sweep as a SLURM array, one run per line of a file: sbatch --array=0-5%2 launch/array.sh runs.txt [common flags ...]
# Each line of runs.txt holds the flags of one run, and must give each its own name; empty lines and # comments do not count:
#   --config configs/clm_60m.toml --run.name lr1e-3 --optimizer.lr 1e-3
#   --config configs/clm_60m.toml --run.name lr2e-3 --optimizer.lr 2e-3 --run.seed 7
# Task 0 takes the first line. %2 runs two at a time. Each task is a job of its own: preempted, requeued and resumed alone.
#SBATCH --job-name=newcompute-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the repository root}"
list=${1:?usage: sbatch --array=0-N launch/array.sh FILE [common flags ...]}
shift
task=${SLURM_ARRAY_TASK_ID:?submit this script with sbatch --array=0-N}

mapfile -t runs < <(grep -Ev '^[[:space:]]*(#|$)' "$list")
if [ "$task" -ge "${#runs[@]}" ]; then
  echo "task $task of the array, but $list has ${#runs[@]} runs: sbatch --array=0-$((${#runs[@]} - 1))" >&2
  exit 2
fi
# xargs reads quotes as a shell does, and runs nothing.
mapfile -t flags < <(xargs -n 1 printf '%s\n' <<<"${runs[$task]}")
# exec: signals from SLURM reach the script that handles them.
exec bash launch/slurm.sh "${flags[@]}" "$@"
