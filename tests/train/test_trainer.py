"""The loop against a plain PyTorch one, and against itself cut in pieces or spread over processes."""

from __future__ import annotations

import errno
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import fork_python, losses, read_metrics, run_python, tiny_flags

from models.llama import Llama
from parallel.init import init_weights
from train.config import named_shape
from train.config_sources import load_config
from train.data import CorpusRows, open_data
from train.job import JobError
from train.prepare import run_tokenizer


def plain_training(flags: list[str]) -> list[float]:
    """The same training written down independently: no FSDP, no micro-batches, torch's own schedule arithmetic."""
    config = load_config([], flags)
    tokenizer = run_tokenizer(config)
    rows, _ = open_data(config, tokenizer, tokenizer.vocab_size)
    model = Llama(named_shape(config.model, tokenizer.vocab_size), config.training.sequence_length)
    init_weights([model], config.run.seed)
    no_decay = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    decay = [p for n, p in model.named_parameters() if not (p.ndim < 2 or "embed" in n)]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    batch, length = config.training.global_batch_size, config.training.sequence_length
    found = []
    for step in range(20):
        warm = min(1.0, (step + 1) / 4)
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0, step - 3) / 16))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (warm if step < 4 else cosine)
        tokens = np.zeros((batch, length + 1), np.int64)
        for k in range(batch):
            rows.read(step * batch + k, tokens[k])
        x = torch.from_numpy(tokens)
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("length", [64, 33])
def test_losses_equal_a_plain_pytorch_loop(run_here, tmp_path, text_corpus, length):
    rows = run_here(checkpoint__interval=0, training__sequence_length=length)
    ours = [row["loss"] for row in rows if "loss" in row]
    plain = plain_training(tiny_flags(tmp_path, text_corpus, training__sequence_length=length))
    assert ours[-1] < ours[0] - 0.5, "the model must learn, or the comparison says nothing"
    assert ours == pytest.approx(plain, abs=2e-5)


def test_metrics_rows_carry_the_documented_keys(run_here):
    rows = run_here(training__steps=10, checkpoint__interval=0)
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 11))
    expected = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu", "data_wait", "memory_gib"}
    assert expected <= training[0].keys()
    assert training[-1]["tokens"] == 10 * 8 * 64
    assert training[0]["mfu"] is None, "no peak is known for a CPU"
    validation = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in validation] == [10]
    row = validation[0]
    assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))
    # One BOS in front of the held-out text, else one byte per token.
    assert row["val_bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2), rel=1e-3)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles as a run of its own would: Dynamo gives up at the ninth variant of a block in one process."""
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "stops", [pytest.param((6,), id="one resume"), pytest.param((3, 7), marks=pytest.mark.slow, id="two resumes")]
)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run_here, stops):
    settings = {"training__steps": 10, "checkpoint__interval": 1}
    straight = run_here("straight", **settings)
    for stop in stops:
        run_here("pieces", training__stop_after=stop, **settings)
    pieces = run_here("pieces", **settings)
    # A piece that ends validates once more; those rows are no part of the comparison.
    assert [x for x in losses(pieces) if x in losses(straight)] == losses(straight)
    assert {step for step, _ in losses(pieces)} == set(range(1, 11))


def test_resume_from_an_earlier_step_cuts_the_metrics_and_keeps_the_later_checkpoints_aside(run_here, tmp_path):
    straight = run_here()
    again = run_here(checkpoint__resume=10)
    assert losses(again) == losses(straight)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert "step-00000015.superseded" in names
    assert "step-00000020" in names


@pytest.fixture(scope="module")
def plainly_computed() -> dict[tuple, list[float]]:
    """Reference losses by the changes of the model that they belong to."""
    return {}


@pytest.mark.parametrize(
    "changes",
    [
        {"training__micro_batch_size": 2},
        {"activation_checkpointing__mode": "full"},
        {"activation_checkpointing__mode": "selective"},
        {"compile__enabled": "true", "compile__backend": "aot_eager"},
        {"compile__enabled": "true", "compile__backend": "aot_eager", "activation_checkpointing__mode": "selective"},
        {"model__shape__tied_embeddings": "true", "parallel__reshard_after_forward": "true"},
    ],
    ids=lambda changes: ",".join(str(value) for value in changes.values()),
)
def test_how_a_step_is_computed_does_not_change_it(run_here, plainly_computed, changes):
    same = {key: value for key, value in changes.items() if key.startswith("model")}
    short = {"training__steps": 8, "checkpoint__interval": 0}
    key = tuple(same.items())
    if key not in plainly_computed:
        rows = run_here("reference", **short, **same)
        plainly_computed[key] = [row["loss"] for row in rows if "loss" in row]
    changed = [row["loss"] for row in run_here("changed", **short, **changes) if "loss" in row]
    assert changed == pytest.approx(plainly_computed[key], abs=2e-5)


@pytest.mark.slow
def test_models_of_several_head_counts_compile_in_one_process(run_here):
    """A sweep in one process: the compiler takes for variable what it has seen vary."""
    for i, (heads, kv_heads) in enumerate(((4, 2), (2, 1), (8, 4))):
        changes = {"model__shape__num_heads": heads, "model__shape__num_kv_heads": kv_heads}
        changes |= {"training__steps": 4, "checkpoint__interval": 0}
        compiled = run_here(f"compiled-{i}", compile__enabled="true", compile__backend="aot_eager", **changes)
    eager = run_here("eager", **changes)
    assert [loss for _, loss in losses(compiled)] == pytest.approx([loss for _, loss in losses(eager)], abs=2e-5)


def test_inductor_gives_the_eager_losses(run_here):
    eager = [row["loss"] for row in run_here("eager", training__steps=5) if "loss" in row]
    compiled = [
        row["loss"] for row in run_here("compiled", training__steps=5, compile__enabled="true") if "loss" in row
    ]
    assert compiled == pytest.approx(eager, abs=2e-5)


@pytest.mark.parametrize(
    "layout", [pytest.param((2, 1), marks=pytest.mark.slow), (1, 2)], ids=["replicate 2", "shard 2"]
)
def test_two_processes_equal_one(run_here, tmp_path, text_corpus, layout):
    same = {"training__micro_batch_size": 2, "checkpoint__interval": 0}
    one = run_here("one", **same)
    replicate, shard = layout
    flags = tiny_flags(tmp_path, text_corpus, "two", parallel__replicate=replicate, parallel__shard=shard, **same)
    if replicate == 2:
        run_python("train/main.py", *flags, processes=2)
    else:
        fork_python(tmp_path, "train/main.py", *flags, processes=2)
    two = read_metrics(tmp_path / "two")
    assert [step for step, _ in losses(two)] == [step for step, _ in losses(one)]
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], abs=1e-5)
    assert [r["grad_norm"] for r in two if "loss" in r] == pytest.approx(
        [r["grad_norm"] for r in one if "loss" in r], rel=1e-3
    )


@pytest.mark.slow  # tests/parallel/test_resume.py has fast pairs
def test_a_checkpoint_of_two_processes_goes_on_with_one(run_here, tmp_path, text_corpus):
    straight = run_here("straight")
    flags = tiny_flags(
        tmp_path, text_corpus, "moved", parallel__replicate=1, parallel__shard=2, training__stop_after=10
    )
    fork_python(tmp_path, "train/main.py", *flags, processes=2)
    moved = run_here("moved")
    assert [loss for _, loss in losses(moved)] == pytest.approx([loss for _, loss in losses(straight)], abs=1e-5)


def test_weights_of_two_processes_start_bit_identical(tmp_path):
    script = tmp_path / "init.py"
    script.write_text(
        "import sys, torch\n"
        "sys.path.insert(0, '.')\n"
        "from train.config_sources import load_config\n"
        "from train.trainer import build_model\n"
        "from parallel import mesh as meshes\n"
        "from parallel.init import init_weights\n"
        "from train.config import named_shape\n"
        "out, replicate, shard = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n"
        "config = load_config([], ['--run.device', 'cpu', '--compile.enabled', 'false', '--model.shape.num_heads', '3',\n"
        "    '--model.shape.num_kv_heads', '1', '--model.shape.dim', '33', '--model.shape.head_dim', '10'])\n"
        "mesh = meshes.start('cpu', replicate=replicate, shard=shard)\n"
        "model, = build_model(config, mesh, named_shape(config.model, 301)).parts\n"
        "init_weights([model], 5)\n"
        "full = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}\n"
        "if mesh.is_main: torch.save(full, out)\n"
    )
    fork_python(tmp_path, str(script), str(tmp_path / "one.pt"), "1", "1")
    fork_python(tmp_path, str(script), str(tmp_path / "two.pt"), "1", "2", processes=2)
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_non_finite_state_stops_the_run_and_is_never_saved(run_here, tmp_path):
    run_here(training__stop_after=10)
    with pytest.raises(JobError) as stopped:
        run_here(
            "bad", optimizer__lr=1e30, schedule__warmup_steps=0, metrics__log_interval=1000, checkpoint__interval=3
        )
    assert stopped.value.code == 3
    assert "not finite" in str(stopped.value)
    assert "Last good checkpoint: none" in str(stopped.value)
    assert not list((tmp_path / "bad").glob("checkpoints/*/commit.json"))


def test_weights_that_overflow_in_the_last_update_are_not_saved(run_here, tmp_path):
    with pytest.raises(JobError, match="a weight or optimizer moment after step 1 is not finite"):
        run_here(optimizer__lr=1e39, schedule__warmup_steps=0, training__steps=1)
    assert not list((tmp_path / "run").glob("checkpoints/*/commit.json"))


def test_a_disk_that_fails_while_the_run_trains_is_worth_another_start(run_here, tmp_path, monkeypatch):
    """Code 1, which the launchers start again, and not 2: what cannot start at all."""
    straight = run_here("straight")
    read, left = CorpusRows.read, iter(range(8 * 12))  # the rows of twelve steps

    def failing(self, i, out):
        if next(left, None) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "shard-0.bin")
        read(self, i, out)

    monkeypatch.setattr(CorpusRows, "read", failing)
    with pytest.raises(JobError, match=r"shard-0\.bin: Input/output error") as ended:
        run_here()
    assert ended.value.code == 1
    monkeypatch.undo()
    assert losses(run_here()) == losses(straight)


@pytest.mark.slow
def test_a_streamed_run_resumes_exactly_and_only_at_its_size(run_here, quick_workers, tmp_path, text_corpus):
    stream = {"data__streaming": "true", "data__shuffle_window": 8, "training__steps": 9}
    straight = run_here("straight", **stream)
    for stop in (4, 7):
        run_here("pieces", **stream, training__stop_after=stop)
    pieces = run_here("pieces", **stream)
    training = [row for row in losses(pieces) if row in losses(straight)]
    assert training == losses(straight)
    flags = tiny_flags(tmp_path, text_corpus, "pieces", **stream | {"training__steps": 12})
    done = fork_python(tmp_path, "train/main.py", *flags, processes=2, check=False)
    assert "was streamed by 1 processes, this run has 2" in done.stderr
    with pytest.raises(JobError, match="the checkpoint was trained on other data"):
        run_here("other", checkpoint__resume=str(tmp_path / "pieces"))


def test_data_that_does_not_fit_the_checkpoint_is_refused_before_anything_changes(run_here, tmp_path):
    run_here(training__stop_after=10)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "config.toml").unlink()  # else the run folder refuses already
    with pytest.raises(JobError, match="trained on other data"):
        run_here(checkpoint__resume=5, training__sequence_length=32)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "run" / "checkpoints" / "step-00000010" / "commit.json").exists()
