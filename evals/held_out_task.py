"""A run's held-out documents as a text file and as an lm-eval task, so that both can be asked about unseen text.

`python -m evals.held_out_task --run outputs/quickstart --out outputs/quickstart/held_out`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from train.config import SourceConfig
from train.corpus import documents
from train.run_folder import opened

TASK = "held_out"


def write_task(run: Path, out: Path, limit: int) -> tuple[Path, Path]:
    """Write `held_out.txt` and the task `held_out.yaml` over the first `limit` held-out documents of a run's corpora.

    Returns:
        The two paths.
    """
    config = opened(run).read_config()
    streamed = config.data.streaming
    texts = [text for source in config.data.all_sources for text in islice(_held_out(source, streamed), limit)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "held_out.txt").write_text("\n".join(texts), encoding="utf-8")
    data = (out / "held_out.jsonl").resolve()
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    lines = [
        f"task: {TASK}",
        "dataset_path: json",
        "dataset_kwargs:",
        "  data_files:",
        f"    test: {data}",
        "test_split: test",
        "output_type: loglikelihood_rolling",
        'doc_to_text: ""',
        'doc_to_target: "{{text}}"',
        "metric_list:",
        "  - metric: bits_per_byte",
        "  - metric: byte_perplexity",
        "metadata:",
        "  version: 1.0",
    ]
    (out / f"{TASK}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out / "held_out.txt", out / f"{TASK}.yaml"


def _held_out(source: SourceConfig, streamed: bool) -> Iterator[str]:
    if streamed:  # which holds out other documents than `prepare` does
        from train.streaming import Shards

        return Shards(source).held_out_texts()
    return (document.text for document in documents(source) if document.held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--limit", type=int, default=20, help="documents per source")
    options = parser.parse_args()
    for path in write_task(options.run, options.out, options.limit):
        print(path)


if __name__ == "__main__":
    main()
