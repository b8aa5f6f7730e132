#!/usr/bin/env bash
# The whole journey in a few minutes on a CPU: prepare, plan, train, export, evaluate, sample. `make train` runs it.
#   launch/quickstart.sh [PROCESSES]
set -euo pipefail
cd "$(dirname "$0")/.."
processes=${1:-2}
run=outputs/quickstart
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

echo "== text to tokens"
newcompute prepare --config configs/quickstart.toml
echo "== what will run"
newcompute plan --config configs/quickstart.toml --world-size "$processes"
echo "== training on $processes processes"
launch/local.sh "$processes" --config configs/quickstart.toml
echo "== export to a Hugging Face folder"
newcompute export --run $run --out $run/export
echo "== evaluation of the export, on text it has not seen"
python -m evals.held_out_task --run $run --out $run/held_out
newcompute eval --model $run/export --text $run/held_out/held_out.txt --tasks $run/held_out/held_out.yaml --out $run/eval.json
cat <<'END'
Three figures above are bits per byte of text that was held out (lower is better), measured in three ways:
  validation, in the log    400 rows of 256 tokens from all of that text, as in training: to compare steps and runs
  held_out.txt, by eval     its first 20 documents as one file, cut into windows of 256 tokens: to compare models
  held_out, by lm-eval      these documents one by one, each from its own beginning: to compare with other tools
They differ since a token is guessed better the more text before it the model may see, and since these 20 are not all documents.
END
echo "== a sample"
newcompute generate --model $run/export --prompt "def " --max-new-tokens 120 --temperature 0.7
echo
echo "== where things are"
echo "run folder         $run (config.toml, metrics.jsonl, checkpoints/)"
echo "Hugging Face model $run/export"
echo "evaluation         $run/eval.json"
