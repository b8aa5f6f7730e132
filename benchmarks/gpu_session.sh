#!/usr/bin/env bash
# All GPU checks and figures on a machine with one GPU, without network; from the repository's root, results in $OUT:
#   bash benchmarks/gpu_session.sh                          part 1, 7.5 minutes
#   PART=2 MINUTES=3.5 bash benchmarks/gpu_session.sh       part 2
# .whl (or $WHEELS) holds the wheels that benchmarks/gpu_wheels.sh has downloaded, .session (or $EARLIER) what part 1 has left in
# $OUT (docs/benchmarks.md).
# DEVICE=cpu is a dry run; flags go to gpu_session.py.
set -euo pipefail
: "${OUT:?set OUT to the folder of the results}"
python=${PYTHON:-python3} wheels=${WHEELS:-.whl} earlier=${EARLIER:-.session}
if compgen -G "$wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export SESSION_CACHE=${SESSION_CACHE:-/tmp/session_cache}
# The paths are part of what the compiler's caches are found by.
export TORCHINDUCTOR_CACHE_DIR=$SESSION_CACHE/inductor TRITON_CACHE_DIR=$SESSION_CACHE/triton
mkdir -p "$SESSION_CACHE" "$OUT"
if compgen -G "$earlier/caches.tar.gz.*" >/dev/null; then
  cat "$earlier"/caches.tar.gz.* | tar -xz -C "$SESSION_CACHE" || echo "the compiled code of part 1 cannot be used: it is compiled again"
fi
# Results of part 1 come first, so that part 2 goes on from them.
for file in "$earlier"/*.json "$earlier"/log.txt; do
  if [ -f "$file" ] && [ ! -e "$OUT/$(basename "$file")" ]; then cp "$file" "$OUT/"; fi
done
if command -v nvidia-smi >/dev/null; then nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv || true; fi
exec "$python" benchmarks/gpu_session.py --out "$OUT" --part "${PART:-1}" --minutes "${MINUTES:-7.5}" \
  --device "${DEVICE:-cuda}" --resume "$@"
