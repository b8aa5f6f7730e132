"""Distillation against plain torch, on every layout that has it, resumed, compiled; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layouts import Record, difference, run, run_on
from support import quietly, read_metrics, tiny_flags
from torch.distributed.tensor import DTensor
from torch.distributions import Categorical, kl_divergence

from models.llama import Llama
from models.loss import IGNORE
from models.sizes import LlamaShape
from train.config import named_shape
from train.config_sources import ConfigError, load_config
from train.distillation import Teacher, distillation_losses
from train.export import export, open_trained
from train.job import JobError, run_job
from train.plan import plan_lines
from train.plan_search import suggest
from train.plan_time import GPUS
from train.trainer import Trainer
from transforms.apply import is_transformed

WEIGHT, TEMPERATURE = 0.3, 1.7
WIDER = {"model__shape__dim": 48, "model__shape__num_layers": 3, "model__shape__ffn_dim": 96}
BITFLIP = '[{ kind = "bitflip", modules = ["*_proj", "lm_head"], weight = { mantissa = 1e-2 }, output = { mantissa = 1e-3 } }]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distillation")


def here(folder: Path, corpus: Path, name: str, **changes: object) -> list[dict]:
    flags = tiny_flags(folder, corpus, name, **changes)
    config = load_config([], flags, 1)
    quietly(config)
    run_job(config)
    return read_metrics(folder / name)


@pytest.fixture(scope="module")
def teacher(folder, text_corpus) -> Path:
    """A wider and deeper model, trained for 60 steps."""
    here(folder, text_corpus, "teacher", **WIDER, training__steps=60, checkpoint__interval=60, validation__interval=0)
    return folder / "teacher"


@pytest.fixture(scope="module")
def exported(teacher) -> Path:
    out = teacher.parent / "exported"
    export(open_trained(teacher), out)
    return out


def settings(teacher: Path | str, **changes: object) -> dict[str, object]:
    plain = {
        "distillation__teacher": teacher,
        "distillation__weight": WEIGHT,
        "distillation__temperature": TEMPERATURE,
        "training__steps": 6,
        "schedule__warmup_steps": 2,
        "checkpoint__interval": 0,
        "validation__interval": 6,
    }
    return plain | changes


def figures(rows: list[dict]) -> list[tuple]:
    keys = ("step", "loss", "distillation_loss", "grad_norm", "val_loss")
    return [tuple(row.get(key) for key in keys) for row in rows]


def plain_model(run: Path) -> Llama:
    trained = open_trained(run)
    model = Llama(trained.shape, context=trained.context)
    padded = model.state_dict()
    for name, tensor in trained.state_dict().items():
        padded[name].zero_()[: len(tensor)] = tensor
    return model


def plain_losses(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses in float64, token by token, by torch.distributions."""
    valid = targets.flatten() != IGNORE
    student, teacher = student.flatten(0, 1)[valid].double(), teacher.flatten(0, 1)[valid].double()
    text = -Categorical(logits=student).log_prob(targets.flatten()[valid]).sum()
    divergence = kl_divergence(Categorical(logits=teacher / TEMPERATURE), Categorical(logits=student / TEMPERATURE))
    return text, TEMPERATURE**2 * divergence.sum()


# The loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients(dtype):
    """The gradient of T^2 KL with regard to the student's logits is T (p_student - p_teacher)."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(3, 5, 37, generator=generator).mul(3).to(dtype) for _ in range(2))
    targets = torch.randint(37, (3, 5), generator=generator)
    targets[0, 2] = targets[2, 4] = IGNORE
    student.requires_grad_()
    text, divergence = distillation_losses(student, teacher, targets, TEMPERATURE)
    for found, expected in zip((text, divergence), plain_losses(student, teacher, targets)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(divergence, student)
    p_student, p_teacher = ((logits.double() / TEMPERATURE).softmax(-1) for logits in (student, teacher))
    expected = TEMPERATURE * (p_student - p_teacher) * (targets != IGNORE)[..., None]
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_no_divergence_from_itself():
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(2))
    _, divergence = distillation_losses(logits, logits.clone(), torch.zeros(2, 3, dtype=torch.int64), TEMPERATURE)
    assert abs(float(divergence)) < 1e-6


# Whole runs


def test_first_step_against_plain_torch(folder, text_corpus, teacher, monkeypatch):
    """Loss, distillation loss and every gradient of a run in micro-batches, from two plain models on the same rows."""
    rows, train_step = [], Trainer.train_step

    def noting(trainer, batch):
        rows.append(batch.clone())
        return train_step(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", noting)
    flags = tiny_flags(folder, text_corpus, "plain", **settings(teacher, training__micro_batch_size=2))
    record = run(flags)
    config = load_config([], flags, 1)
    shape = config.model.shape
    student = Llama(
        LlamaShape(shape.dim, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.ffn_dim, 257),
        context=config.training.sequence_length,
    )
    student.load_state_dict(record.weights, strict=False)
    tokens, targets = rows[0][:, :-1], rows[0][:, 1:]
    with torch.no_grad():
        taught = plain_model(teacher)(tokens)
    losses = [loss / targets.numel() for loss in plain_losses(student(tokens), taught, targets)]
    ((1 - WEIGHT) * losses[0] + WEIGHT * losses[1]).backward()
    logged = read_metrics(folder / "plain")[0]
    assert logged["loss"] == pytest.approx(losses[0].item(), rel=1e-6)
    assert logged["distillation_loss"] == pytest.approx(losses[1].item(), rel=1e-6)
    wanted = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert record.gradients[0].keys() == wanted.keys()
    for name, gradient in wanted.items():
        found = record.gradients[0][name]
        assert float((found - gradient).norm() / gradient.norm()) < 1e-5, name


@pytest.fixture(scope="module")
def references(folder, text_corpus, teacher):
    found: dict[str, tuple[Record, list[dict]]] = {}

    def reference(of_both: dict[str, object]) -> tuple[Record, list[dict]]:
        key = str(of_both)
        if key not in found:
            name = f"reference-{len(found)}"
            record = run(tiny_flags(folder, text_corpus, name, **settings(teacher, **of_both)))
            found[key] = record, read_metrics(folder / name)
        return found[key]

    return reference


AOT = {"compile__enabled": "true", "compile__backend": "aot_eager"}


@pytest.mark.parametrize(
    ("processes", "layout", "of_both"),
    [
        (1, {"training__micro_batch_size": 2, "activation_checkpointing__mode": "full"}, {}),
        pytest.param(1, {"compile__enabled": "true"}, {}, marks=pytest.mark.slow),
        (2, {"parallel__shard": 2}, {}),
        pytest.param(
            2,
            {"parallel__shard": 2, "parallel__cpu_offload": "true", "parallel__reshard_after_forward": "true"},
            {},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2, {"parallel__replicate": 2, "activation_checkpointing__mode": "selective"}, {}, marks=pytest.mark.slow
        ),
        (2, {"parallel__context": 2}, {}),
        pytest.param(
            2,
            {"parallel__shard": 2, **AOT, "activation_checkpointing__mode": "full"},
            {"transforms": BITFLIP},
            marks=pytest.mark.slow,
        ),
        pytest.param(2, {"parallel__context": 2}, {"training__document_mask": "true"}, marks=pytest.mark.slow),
        pytest.param(
            4,
            {"parallel__shard": 2, "parallel__replicate": 2, "training__micro_batch_size": 1},
            {},
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "accumulated, recomputed",
        "compiled by Inductor",
        "FSDP 2",
        "FSDP 2 offloaded, resharded",
        "replicate 2, selective",
        "CP 2",
        "FSDP 2 transformed, compiled, recomputed",
        "CP 2, documents",
        "HSDP 2 x 2, accumulated",
    ],
)
def test_every_layout_learns_alike(references, folder, tmp_path, text_corpus, teacher, processes, layout, of_both):
    expected, wanted = references(of_both)
    flags = tiny_flags(
        tmp_path, text_corpus, "run", **settings(teacher, **of_both, **layout), data__dir=folder / "data"
    )
    found = run(flags) if processes == 1 else run_on(processes, tmp_path, flags)
    first, largest, where = difference(expected, found)
    assert first < 2e-6
    assert largest < 5e-3, where
    rows = read_metrics(tmp_path / "run")
    for key in ("loss", "distillation_loss", "val_loss"):
        values = [row[key] for row in wanted if key in row]
        assert values
        assert [row[key] for row in rows if key in row] == pytest.approx(values, abs=1e-5)


def test_effects_are_the_students_alone(references, folder, text_corpus, teacher, monkeypatch):
    """A student that is the teacher itself diverges from it only where effects are on its own layers."""
    built, build = [], Teacher.__init__

    def noting(self, *arguments):
        build(self, *arguments)
        built.append(self)

    monkeypatch.setattr(Teacher, "__init__", noting)
    same = settings(teacher, checkpoint__resume=teacher, training__steps=61, validation__interval=0, **WIDER)
    clean = here(folder, text_corpus, "itself", **same)
    half = '[{ kind = "bitflip", weight = { mantissa = 0.5 } }]'  # of the mantissas' bits
    noisy = here(folder, text_corpus, "itself-noisy", **same, transforms=half)
    assert len(clean) == len(noisy) == 1
    assert abs(clean[0]["distillation_loss"]) < 1e-6
    assert noisy[0]["distillation_loss"] > 1e-4
    assert not any(is_transformed(module) for module in built[1].model.modules())


def test_the_teacher_is_small(folder, text_corpus, teacher, monkeypatch):
    """Frozen, in the compute type, in shards between its forwards, and without effect on what is saved."""
    seen, logits = [], Teacher.logits

    def noting(self, *arguments):
        found = logits(self, *arguments)
        parameters = list(self.model.parameters())
        assert all(isinstance(p, DTensor) and p.dtype == torch.bfloat16 and not p.requires_grad for p in parameters)
        assert not self.model.training
        seen.append((found.dtype, found.requires_grad, found.shape[-1]))
        return found

    monkeypatch.setattr(Teacher, "logits", noting)
    changes = {"precision__compute": "bfloat16", "training__steps": 2, "checkpoint__interval": 2}
    here(folder, text_corpus, "small", **settings(teacher, **changes))
    assert seen == [(torch.bfloat16, False, 257)] * 2
    here(folder, text_corpus, "alone", training__steps=2, schedule__warmup_steps=1, checkpoint__interval=2)
    saved = [set(open_trained(folder / name).state_dict()) for name in ("small", "alone")]
    assert saved[0] == saved[1]


def test_a_resumed_run_is_the_uninterrupted_one(folder, text_corpus, teacher):
    changes = settings(teacher, checkpoint__interval=3, validation__interval=3)
    straight = here(folder, text_corpus, "straight", **changes)
    here(folder, text_corpus, "pieces", **changes, training__stop_after=3)
    pieces = here(folder, text_corpus, "pieces", **changes)
    assert figures(pieces) == figures(straight)


def test_an_export_is_the_same_teacher(references, folder, text_corpus, exported):
    _, wanted = references({})
    found = here(folder, text_corpus, "from-export", **settings(f"hf:{exported}"))
    assert figures(found) == figures(wanted)


@pytest.mark.slow
def test_a_student_comes_closer_to_its_teacher(folder, text_corpus, teacher):
    """On held-out rows, after 200 steps with the teacher alone and with the text alone."""
    plain = {"training__steps": 200, "checkpoint__interval": 200, "validation__interval": 0}
    learned = settings(teacher, **plain, distillation__weight=1.0, schedule__warmup_steps=4)
    here(folder, text_corpus, "with", **learned)
    here(folder, text_corpus, "without", **plain)
    held_out = (text_corpus / "corpus.txt").read_bytes()[-100 * 64 :]  # within the share that is not trained on
    rows = torch.tensor(list(held_out)).view(100, 64)
    with torch.no_grad():
        taught = plain_model(teacher)(rows)
        apart = {}
        for name in ("with", "without"):
            logits = plain_model(folder / name)(rows)
            apart[name] = float(kl_divergence(Categorical(logits=taught), Categorical(logits=logits)).mean())
    assert apart["with"] < 0.5 * apart["without"], apart


# What is refused


def refusal(folder: Path, corpus: Path, teacher: Path | str, **changes: object) -> str:
    with pytest.raises(JobError) as refused:
        here(folder, corpus, "refused", **settings(teacher, **changes))
    assert refused.value.code == 2
    assert not (folder / "refused" / "config.toml").exists()
    return str(refused.value)


def test_a_teacher_that_is_not_there(folder, text_corpus):
    message = refusal(folder, text_corpus, folder / "nobody")
    assert "distillation.teacher" in message
    assert "neither a run folder" in message
    assert "nobody" in refusal(folder, text_corpus, f"hf:{folder}/nobody")


def test_a_teacher_that_has_saved_nothing(folder, text_corpus, teacher):
    here(folder, text_corpus, "unsaved", training__steps=1, schedule__warmup_steps=0, checkpoint__interval=0)
    assert "no complete checkpoint" in refusal(folder, text_corpus, folder / "unsaved")


def test_another_vocabulary(folder, text_corpus, teacher, exported):
    changes = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 300}
    for name in (teacher, f"hf:{exported}"):
        message = refusal(folder, text_corpus, name, **changes)
        assert "has a vocabulary of 257 tokens, this run's model has 300" in message


def test_another_tokenizer_of_the_same_size(folder, text_corpus, teacher, exported):
    changes = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 257}
    for name in (teacher, f"hf:{exported}"):
        assert "was trained with another tokenizer" in refusal(folder, text_corpus, name, **changes)


def test_rows_longer_than_the_teachers(folder, text_corpus, teacher, exported):
    for name in (teacher, f"hf:{exported}"):
        message = refusal(folder, text_corpus, name, training__sequence_length=128)
        assert "reads rows of at most 64 tokens, this run's have 128" in message


def test_a_teacher_with_adapters(folder, text_corpus, exported):
    changes = {"model__init_from": f"hf:{exported}", "transforms": '[{ kind = "lora", rank = 2 }]'}
    shape = {f"model__shape__{key}": None for key in ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")}
    steps = {"training__steps": 1, "schedule__warmup_steps": 0, "checkpoint__interval": 1, "validation__interval": 0}
    here(folder, text_corpus, "adapted", **shape, **changes, **steps)
    assert "has adapters beside its weights: export it" in refusal(folder, text_corpus, folder / "adapted")


def test_a_teacher_with_norms(folder, text_corpus):
    """They are part of it, and it would run without them."""
    spec = '{ kind = "quantise", weight = { format = "ternary" }, norm = true }'
    steps = {"training__steps": 1, "schedule__warmup_steps": 0, "checkpoint__interval": 1, "validation__interval": 0}
    here(folder, text_corpus, "normed", transforms=f"[{spec}]", **steps)
    export(open_trained(folder / "normed"), folder / "normed-hf")
    for name in (folder / "normed", f"hf:{folder}/normed-hf"):
        assert "was trained with norms before its layers" in refusal(folder, text_corpus, name)


def test_a_teacher_that_is_no_llama(folder, text_corpus):
    other = folder / "gpt2"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "only Llama is supported" in refusal(folder, text_corpus, f"hf:{other}")


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (2, {"parallel.tensor": 2}, "parallel.tensor"),
        (2, {"parallel.pipeline": 2, "training.micro_batch_size": 1}, "parallel.pipeline"),
        (2, {"parallel.tensor": 2, "model.init_from": "hf:y"}, "parallel.tensor"),
        (1, {"training.loss_chunk_tokens": 64}, "training.loss_chunk_tokens"),
        (1, {"distillation.teacher": "hf:"}, "distillation.teacher"),
        (1, {"distillation.weight": 0}, "distillation.weight"),
        (1, {"distillation.weight": 1.5}, "distillation.weight"),
        (1, {"distillation.temperature": 0}, "distillation.temperature"),
        (1, {"distillation.teacher": "", "distillation.weight": 0.1}, "distillation.weight"),
        (1, {"distillation.teacher": "", "distillation.temperature": 3}, "distillation.temperature"),
    ],
)
def test_settings_that_do_not_go_together(world_size, changes, message):
    flags = [
        part for key, value in ({"distillation.teacher": "x"} | changes).items() for part in (f"--{key}", str(value))
    ]
    with pytest.raises(ConfigError) as refused:
        load_config([], flags, world_size)
    assert [problem.key for problem in refused.value.problems] == [message]


def test_suggested_layouts_have_a_teacher_in_them():
    """`newcompute plan --suggest` proposes nothing that the run would then refuse."""
    flags = ["--model.name", "llama3", "--model.size", "8B", "--training.global_batch_size", "64"]
    degrees = {}
    for teacher in ("", "x"):
        config = load_config([], [*flags, "--distillation.teacher", teacher])
        found = suggest(config, named_shape(config.model, 128256), 16, GPUS["h100"], 0.4)
        degrees[teacher] = {(candidate.setup.degrees.tensor, candidate.setup.degrees.pipeline) for candidate in found}
    assert len(degrees[""]) > 1
    assert degrees["x"] == {(1, 1)}


def test_the_plan_names_clipping_and_teacher():
    flags = ["--distillation.teacher", "outputs/clean", "--robust.clip_weights", "2.5", "--robust.clip_per", "tensor"]
    config = load_config([], flags)
    lines = plan_lines(config, named_shape(config.model, 300), "", 1, 0.4)
    assert "clipping     weights at 2.5 standard deviations of their tensor" in lines
    assert "distillation from outputs/clean; its memory and time are not counted below" in lines
