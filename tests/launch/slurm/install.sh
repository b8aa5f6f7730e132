#!/usr/bin/env bash
# What `make test-slurm` needs beside the project: SLURM and munge, from the packages of Debian and its relatives.
set -euo pipefail
export PATH=$PATH:/usr/sbin
missing=()
for command in slurmctld slurmd sbatch munged; do
  command -v "$command" >/dev/null || missing+=("$command")
done
if [ "${#missing[@]}" = 0 ]; then exit 0; fi
if ! command -v apt-get >/dev/null; then
  echo "SLURM is not complete here (${missing[*]}), and there is no apt-get to install slurm-wlm and munge with" >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" != 0 ]; then as_root=(sudo); fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y slurm-wlm munge >/dev/null
