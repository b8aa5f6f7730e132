"""Whatever happens to prepared shards, positions and stream states: the same rows, or a DataError."""

from __future__ import annotations

import json

import numpy as np
from damage import contents_of, damages, edits, fuzz, write_to
from hypothesis import given
from hypothesis import strategies as st
from support import quietly, write_jsonl

from models.hf import shape_from_hf
from train import records
from train.config import SourceConfig
from train.corpus import DataError, documents
from train.data import Resumed, counts_after, open_data
from train.prepare import run_tokenizer
from train.run_folder import RunFolder
from train.shards import MANIFEST
from train.streaming import read_state
from train.tokenizer import load_tokenizer

TEXTS = [f"Document {i}: " + "some words " * (i % 9) for i in range(80)]


def rows(config) -> list[list[int]]:
    tokenizer = run_tokenizer(config)
    found, held_out = open_data(config, tokenizer, tokenizer.vocab_size)
    out = np.empty(17, np.int64)
    read = []
    for i in range(5):
        found.read(i, out)
        read.append(out.tolist())
    held_out.read(0, out)
    return [*read, out.tolist(), [held_out.count]]


def test_prepared_shards(configure, tmp_path):
    config = configure("--data.validation_fraction", 0.2, paths=[write_jsonl(tmp_path / "a.jsonl", TEXTS)])
    [folder] = quietly(config)
    expected, good = rows(config), contents_of(folder)
    record = json.loads(good[MANIFEST])
    del record[records.SEAL]

    @fuzz(120)
    @given(damages(good))
    def damaged(files):
        write_to(folder, files)
        try:
            found = rows(config)
        except DataError:
            return
        assert found == expected

    @fuzz(120)
    @given(edits(record))
    def edited(changed):
        """Without its seal, so that the types and the sums are what refuses."""
        write_to(folder, good | {MANIFEST: json.dumps(changed).encode("utf-8", "surrogatepass")})
        try:
            rows(config)
        except DataError:
            return

    damaged()
    edited()


def test_records_of_where_a_run_stands_in_its_data(configure, tmp_path):
    config = configure(paths=[write_jsonl(tmp_path / "a.jsonl", TEXTS)])
    quietly(config)
    found, _ = open_data(config, run_tokenizer(config), 257)
    stretch = {"step": 0, "row": 0, "tokens": 0, "rows_per_step": 8, "tokens_per_step": 128}
    state = {"epoch": 0, "seed": config.run.seed, "rows_consumed": 16, "fingerprint": found.fingerprint}
    state["stretches"] = [stretch, stretch | {"step": 1, "row": 8, "tokens": 128}]
    assert counts_after(Resumed(tmp_path, 2, state), found, config).rows(2) == 16

    @fuzz(80)
    @given(edits(state))
    def check(changed):
        try:
            counts_after(Resumed(tmp_path, 2, changed), found, config)
        except DataError:
            return

    check()


def test_states_of_streams(tmp_path):
    state = {"rank": 0, "size": 1, "seed": 1, "fingerprint": "f", "step": 3, "loader": {"a": [1, {"b": 2.5}]}}
    (tmp_path / "stream-rank-00000.json").write_text(records.sealed(state))
    good = contents_of(tmp_path)

    @fuzz(80)
    @given(damages(good))
    def check(files):
        write_to(tmp_path, files)
        try:
            assert read_state(tmp_path, 0) == state
        except DataError:
            return

    check()


def test_texts_of_a_corpus(tmp_path):
    file = tmp_path / "a.jsonl"
    deep = [b'{"text":' + b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}", b"[]", b"3", b'{"text": "\\ud800"}']
    lines = st.lists(st.binary(max_size=20) | st.sampled_from([b'{"text": "a"}', *deep]), max_size=4)

    @fuzz(60)
    @given(lines)
    def check(content):
        file.write_bytes(b"\n".join(content))
        try:
            list(documents(SourceConfig(source="files", paths=[str(file)])))
        except DataError:
            return

    check()


def test_tokenizer_files(tmp_path):
    load_tokenizer("bytes").save_hf(tmp_path)
    good = contents_of(tmp_path)
    settings = json.loads(good["tokenizer_config.json"])

    @fuzz(60)
    @given(damages(good))
    def damaged(files):
        write_to(tmp_path, files)
        try:
            load_tokenizer("hf", str(tmp_path)).encode_batch(["ab"])
        except ValueError:
            return

    @fuzz(60)
    @given(edits(settings))
    def edited(changed):
        write_to(tmp_path, good | {"tokenizer_config.json": json.dumps(changed).encode("utf-8", "surrogatepass")})
        try:
            load_tokenizer("hf", str(tmp_path)).encode_batch(["ab"])
        except ValueError:
            return

    damaged()
    edited()


def test_configurations_of_hugging_face_folders(tmp_path):
    good = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 300, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 64},
    }  # fmt: skip

    @fuzz(200)
    @given(edits(good))
    def check(changed):
        (tmp_path / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        try:
            shape_from_hf(tmp_path)
        except ValueError:
            return

    check()


def test_metrics_of_a_run(tmp_path):
    folder = RunFolder(tmp_path)
    good = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "event": "x"}\n'

    @fuzz(60)
    @given(damages({"metrics.jsonl": good, "other": b'{"step": ' + b"[" * 100_000 + b"\n"}))
    def check(files):
        folder.metrics_file.write_bytes(files.get("metrics.jsonl", b""))
        folder.cut_metrics_after(2)
        assert all(json.loads(line)["step"] <= 2 for line in folder.metrics_file.read_text().splitlines())

    check()
