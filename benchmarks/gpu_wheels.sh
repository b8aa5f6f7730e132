#!/usr/bin/env bash
# Download what a GPU machine without network lacks beside torch, Triton, transformers and pytest, as wheels for its Python:
#   bash benchmarks/gpu_wheels.sh [FOLDER]      default .whl; 6.4 MiB, in the versions of constraints.txt
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.whl}
python=${PYTHON:-.venv/bin/python}
packages=(torchao pydantic pydantic_core typing_extensions typing-inspection annotated-types tomli tomli_w torchdata
  universal-pathlib pathlib-abc)
pinned=()
for package in "${packages[@]}"; do
  line=$(grep -i "^$package==" constraints.txt) || { echo "constraints.txt has no $package" >&2; exit 1; }
  pinned+=("$line")
done
rm -rf "$folder" # two versions of one package stop the whole installation there
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  --platform manylinux1_x86_64 --dest "$folder" "${pinned[@]}"
test "$(find "$folder" -type f | wc -l)" = "${#packages[@]}"
du -sh "$folder"
