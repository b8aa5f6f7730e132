"""The layouts that must all be the same training, and how close to one process each has to come."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One layout of the matrix."""

    name: str
    processes: int
    changes: dict[str, object]
    """Settings with "__" for the dot."""
    of_both: dict[str, object] = field(default_factory=dict)
    """Settings that the single process has as well: what is computed, not where."""
    loss: float = 1e-5
    """Largest difference of a loss in ten steps, in nats."""
    first_gradient: float = 2e-6
    """Largest relative difference (2-norm) of a parameter's gradient at the first step, from equal weights."""
    gradient: float | None = 5e-3
    """The same over all ten steps: Adam divides small gradients by their size, so that rounding grows.
    None: shown in the table, without a limit."""
    slow: bool = False
    """A variant of something that a faster cell covers."""


def _parallel(**degrees: int) -> dict[str, object]:
    return {f"parallel__{name}": degree for name, degree in degrees.items()}


AOT = {"compile__enabled": "true", "compile__backend": "aot_eager"}
INDUCTOR = {"compile__enabled": "true"}
DOCUMENTS = {"training__document_mask": "true"}
PIPELINE = _parallel(pipeline=2) | {"training__micro_batch_size": 2}
ZERO_BUBBLE = PIPELINE | {"parallel__pipeline_schedule": "zero_bubble"}
# The layers' backward is their own function, which schedules with a backward in two parts take apart.
FAILING_WEIGHTS = {"transforms": '[{ kind = "bitflip", weight = { mantissa = 0.001 } }]'}
# Scales of inputs and gradients belong to a device's own rows, so layouts round differently (docs/parallelism.md).
FLOAT8 = {"loss": 0.1, "first_gradient": 0.03, "gradient": None}


def _float8(recipe: str) -> dict[str, object]:
    return {"float8__recipe": recipe, "float8__min_size": 16}


def _checkpointed(mode: str) -> dict[str, object]:
    return {"activation_checkpointing__mode": mode}


CELLS = [
    # Two processes, eager
    Cell("replicate 2", 2, _parallel(replicate=2)),
    Cell("FSDP 2", 2, _parallel(shard=2)),
    Cell(
        "FSDP 2, resharded after forward",
        2,
        _parallel(shard=2) | {"parallel__reshard_after_forward": "true"},
        slow=True,
    ),
    Cell("FSDP 2, 4 micro-batches", 2, _parallel(shard=2) | {"training__micro_batch_size": 1}),
    Cell(
        "FSDP 2, 4 micro-batches reduced once",
        2,
        _parallel(shard=2) | {"training__micro_batch_size": 1, "parallel__reduce_each_micro_batch": "false"},
    ),
    Cell("FSDP 2, offloaded to the host", 2, _parallel(shard=2) | {"parallel__cpu_offload": "true"}),
    Cell("FSDP 2, full checkpointing", 2, _parallel(shard=2) | _checkpointed("full"), slow=True),
    Cell("FSDP 2, selective checkpointing", 2, _parallel(shard=2) | _checkpointed("selective"), slow=True),
    Cell("TP 2", 2, _parallel(tensor=2)),
    Cell("TP 2, full checkpointing", 2, _parallel(tensor=2) | _checkpointed("full"), slow=True),
    Cell("TP 2, selective checkpointing", 2, _parallel(tensor=2) | _checkpointed("selective"), slow=True),
    Cell("TP 2, loss in chunks", 2, _parallel(tensor=2) | {"training__loss_chunk_tokens": 48}),
    Cell("TP 2, tied embeddings", 2, _parallel(tensor=2), {"model__shape__tied_embeddings": "true"}),
    Cell("CP 2", 2, _parallel(context=2)),
    Cell("CP 2, full checkpointing", 2, _parallel(context=2) | _checkpointed("full"), slow=True),
    Cell("PP 2, gpipe", 2, PIPELINE | {"parallel__pipeline_schedule": "gpipe"}, slow=True),
    Cell("PP 2, 1f1b", 2, PIPELINE),
    Cell("PP 2, interleaved 1f1b", 2, PIPELINE | {"parallel__pipeline_schedule": "interleaved_1f1b"}),
    Cell("PP 2, zero bubble", 2, ZERO_BUBBLE),
    Cell("PP 2, zbv", 2, PIPELINE | {"parallel__pipeline_schedule": "zbv"}),
    Cell("PP 2, zero bubble, full checkpointing", 2, ZERO_BUBBLE | _checkpointed("full"), slow=True),
    Cell("PP 2, zero bubble, weights that fail", 2, ZERO_BUBBLE, FAILING_WEIGHTS, slow=True),
    Cell("PP 2, zero bubble, compiled, selective", 2, ZERO_BUBBLE | AOT | _checkpointed("selective"), slow=True),
    Cell("PP 2, full checkpointing", 2, PIPELINE | _checkpointed("full"), slow=True),
    # Documents
    Cell("FSDP 2, documents", 2, _parallel(shard=2), DOCUMENTS, slow=True),
    Cell("TP 2, documents", 2, _parallel(tensor=2), DOCUMENTS, slow=True),
    Cell("CP 2, documents", 2, _parallel(context=2), DOCUMENTS),
    Cell("PP 2, documents", 2, PIPELINE, DOCUMENTS),
    Cell("CP 2, documents, compiled", 2, _parallel(context=2) | AOT, DOCUMENTS, slow=True),
    # Compiled
    Cell("FSDP 2, compiled", 2, _parallel(shard=2) | AOT),
    Cell("FSDP 2, compiled by Inductor", 2, _parallel(shard=2) | INDUCTOR, slow=True),
    Cell("FSDP 2, compiled, budget", 2, _parallel(shard=2) | AOT | _checkpointed("budget"), slow=True),
    Cell("TP 2, compiled", 2, _parallel(tensor=2) | AOT, slow=True),
    Cell("TP 2, compiled by Inductor", 2, _parallel(tensor=2) | INDUCTOR, slow=True),
    Cell("TP 2, compiled, full checkpointing", 2, _parallel(tensor=2) | AOT | _checkpointed("full"), slow=True),
    Cell("TP 2, compiled, selective", 2, _parallel(tensor=2) | AOT | _checkpointed("selective"), slow=True),
    Cell(
        "TP 2, compiled, loss in chunks", 2, _parallel(tensor=2) | AOT | {"training__loss_chunk_tokens": 48}, slow=True
    ),
    Cell("CP 2, compiled", 2, _parallel(context=2) | AOT, slow=True),
    Cell("CP 2, compiled by Inductor", 2, _parallel(context=2) | INDUCTOR, slow=True),
    Cell("PP 2, 1f1b, compiled", 2, PIPELINE | AOT, slow=True),
    Cell("PP 2, zero bubble, compiled", 2, ZERO_BUBBLE | AOT, slow=True),
    Cell("TP 2, compiled, budget", 2, _parallel(tensor=2) | AOT | _checkpointed("budget"), slow=True),
    # float8, emulated
    Cell("FSDP 2, float8 tensorwise", 2, _parallel(shard=2), _float8("tensorwise"), **FLOAT8, slow=True),
    Cell("TP 2, float8 tensorwise", 2, _parallel(tensor=2), _float8("tensorwise"), **FLOAT8, slow=True),
    Cell("FSDP 2, float8 rowwise", 2, _parallel(shard=2), _float8("rowwise"), **FLOAT8, slow=True),
    Cell("TP 2, float8 rowwise", 2, _parallel(tensor=2), _float8("rowwise"), **FLOAT8),
    Cell("TP 2, float8 tensorwise, compiled", 2, _parallel(tensor=2) | AOT, _float8("tensorwise"), **FLOAT8, slow=True),
    Cell(
        "FSDP 2, float8 tensorwise, compiled", 2, _parallel(shard=2) | AOT, _float8("tensorwise"), **FLOAT8, slow=True
    ),
    # Four processes
    Cell("HSDP 2 x 2", 4, _parallel(replicate=2, shard=2), slow=True),
    Cell("FSDP 4", 4, _parallel(shard=4), slow=True),
    Cell("TP 2 x FSDP 2", 4, _parallel(tensor=2, shard=2)),
    Cell("TP 2 x FSDP 2, compiled", 4, _parallel(tensor=2, shard=2) | AOT, slow=True),
    Cell("PP 2 x TP 2", 4, PIPELINE | _parallel(tensor=2), slow=True),
    Cell("PP 2 x FSDP 2", 4, PIPELINE | _parallel(shard=2), slow=True),
    Cell("PP 2 x FSDP 2, zero bubble", 4, ZERO_BUBBLE | _parallel(shard=2), slow=True),
    Cell("PP 4, 1f1b", 4, _parallel(pipeline=4) | {"training__micro_batch_size": 2}, slow=True),
    # A vocabulary of 257, padded to 384: the fourth device has nothing but padding.
    Cell("TP 4, vocabulary that does not divide", 4, _parallel(tensor=4), {"model__shape__num_kv_heads": 4}, slow=True),
    Cell("CP 2 x FSDP 2", 4, _parallel(context=2, shard=2), slow=True),
    Cell("CP 4", 4, _parallel(context=4), slow=True),
    Cell("CP 2 x TP 2", 4, _parallel(context=2, tensor=2), slow=True),
    Cell("CP 2 x PP 2, documents", 4, PIPELINE | _parallel(context=2), DOCUMENTS, slow=True),
    Cell("TP 2 x FSDP 2, float8 rowwise", 4, _parallel(tensor=2, shard=2), _float8("rowwise"), **FLOAT8, slow=True),
]
