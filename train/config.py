"""The schema of a run: one class per section of the TOML file, every field with its meaning and unit.

Field docstrings are the help text. Where values come from and how errors are reported is in `train/config_sources.py`;
rules that span sections are in `train/config_rules.py`. Torch-free, so that `--help` answers at once.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from models.sizes import SIZES, LlamaShape, RopeScaling, num_parameters_without_embedding, with_overrides
from transforms.specs import Texts, TransformSpec


def _integral(value: Any) -> Any:
    """Counts may be written 1e9: TOML reads that as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_integral), Field(ge=0)]
PositiveCount = Annotated[int, BeforeValidator(_integral), Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Degree = Annotated[int, Field(ge=-1)]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class RunConfig(Section):
    name: FolderName = "run"
    """Name of the run; its folder is `dir`/`name`."""
    dir: str = "outputs"
    """Folder that holds all runs."""
    seed: Count = 1234
    """Seed of initialisation and data order; everything random in a run follows from it."""
    deterministic: bool = False
    """Use deterministic kernels on GPU, so that a resumed run equals the uninterrupted one bit for bit (slower)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; "auto" takes CUDA where there is one."""


class RopeScalingConfig(Section):
    factor: Positive = 8.0
    """Stretch of the long wavelengths: Llama 3.1 has 8, Llama 3.2 has 32."""
    low_frequency: Positive = 1.0
    """Wavelengths above original_context / low_frequency are stretched by the whole factor."""
    high_frequency: Positive = 4.0
    """Wavelengths below original_context / high_frequency are kept."""
    original_context: PositiveCount = 8192
    """Context that the unscaled frequencies are for."""


class ShapeConfig(Section):
    dim: PositiveCount | None = None
    """Model width."""
    num_layers: PositiveCount | None = None
    """Number of blocks."""
    num_heads: PositiveCount | None = None
    """Query heads."""
    num_kv_heads: PositiveCount | None = None
    """Key-value heads."""
    head_dim: PositiveCount | None = None
    """Width of a head; default dim / num_heads."""
    ffn_dim: PositiveCount | None = None
    """Width of the feed-forward layer."""
    vocab_size: PositiveCount | None = None
    """Vocabulary; default the tokenizer's."""
    rope_theta: Positive | None = None
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Llama 3.1's scaling of the rotary frequencies for long contexts; default the size's own."""
    max_context: PositiveCount | None = None
    """Longest context, which an export declares; default the size's own."""
    tied_embeddings: bool | None = None
    """Share the embedding with the output head."""


class ModelConfig(Section):
    name: Literal["clm", "llama3"] = "clm"
    """Model family."""
    size: str | None = None
    """Size within the family: debug, 60M, 200M, 400M, 600M, 1.1B (clm); 1B, 3B, 8B, 70B, 405B (llama3)."""
    init_from: str = ""
    """Start from weights instead of random ones: "hf:FOLDER" or "hf:ORGANISATION/NAME"; the shape comes from there."""
    shape: ShapeConfig = ShapeConfig()
    """Departures from the named size."""


class TokenizerConfig(Section):
    kind: Literal["bpe", "bytes", "hf", "tiktoken"] = "bpe"
    """bpe: trained on the corpus by `prepare`; bytes: 256 bytes and BOS; hf: a tokenizer.json; tiktoken: Llama-3's file."""
    path: str = ""
    """hf: folder or Hub id; tiktoken: the tokenizer.model file."""
    vocab_size: Annotated[int, BeforeValidator(_integral), Field(ge=257)] = 2048
    """bpe: ids to train, BOS included."""


class SourceConfig(Section):
    source: Literal["embedded", "files", "hub", "random"] = "embedded"
    """embedded: source text of this Python's standard library; files: `paths`; hub: `dataset`; random: noise for benchmarks."""
    paths: Texts = []
    """files: globs of .txt, .md, .jsonl or .parquet (all but .parquet also with .gz)."""
    validation_paths: Texts = []
    """files: globs of the held-out text; default: a share of every .txt file's end and of the jsonl/parquet documents."""
    column: str = "text"
    """jsonl, parquet and hub: the field that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """files: bytes that are not UTF-8 are refused, or replaced by U+FFFD and counted."""
    skip_invalid: bool = False
    """files and hub: leave out documents that cannot be used (no JSON, no such field, no text, not UTF-8) and count them,
    instead of stopping at the first one."""
    dataset: str = "HuggingFaceFW/fineweb-edu"
    """hub: dataset id."""
    subset: str = "sample-100BT"
    """hub: configuration of the dataset."""
    split: str = "train"
    """hub: split."""
    revision: str = "main"
    """hub: commit or branch; name a commit to make a corpus repeatable."""
    max_documents: Count = 0
    """Stop after this many documents; 0 takes all."""
    validation_fraction: Fraction = 0.005
    """Share of the documents that is held out for validation."""
    weight: Positive = 1.0
    """Share of the training rows in a mixture of sources, relative to the other weights."""


class DataConfig(SourceConfig):
    dir: str = "data"
    """Folder of prepared token shards; one sub-folder per corpus and tokenizer."""
    streaming: bool = False
    """Read documents and tokenise while training (files and hub) instead of from prepared shards; slower, for a quick start."""
    shuffle_window: PositiveCount = 1024
    """streaming: rows that are shuffled among each other."""
    sources: list[SourceConfig] = []
    """A mixture: `[[data.sources]]` tables with the keys above; what a table does not say it takes from `[data]`."""

    @model_validator(mode="after")
    def _inherit(self) -> DataConfig:
        shared = {key: getattr(self, key) for key in SourceConfig.model_fields if key in self.model_fields_set}
        complete = [
            source.model_copy(update={k: v for k, v in shared.items() if k not in source.model_fields_set})
            for source in self.sources
        ]
        object.__setattr__(self, "sources", complete)  # the model is frozen for everyone else
        return self

    @property
    def all_sources(self) -> list[SourceConfig]:
        if self.sources:
            return list(self.sources)
        return [SourceConfig(**{key: getattr(self, key) for key in SourceConfig.model_fields})]


class TrainingConfig(Section):
    steps: PositiveCount | None = None
    """Length in optimizer steps. Give one of steps, tokens, tokens_per_parameter; a later source replaces an earlier one."""
    tokens: PositiveCount | None = None
    """Length in tokens."""
    tokens_per_parameter: Positive | None = None
    """Length in tokens per parameter, counted without the input embedding (compute-optimal: about 20)."""
    stop_after: PositiveCount | None = None
    """Stop after this step without changing the schedule."""
    global_batch_size: PositiveCount = 8
    """Rows per optimizer step, over all devices."""
    micro_batch_size: PositiveCount | None = None
    """Rows per device in one forward and backward; default all of a device's rows at once."""
    sequence_length: PositiveCount = 256
    """Tokens per row."""
    max_grad_norm: NonNegative = 1.0
    """Clip the global gradient norm to this; 0 does not clip."""
    document_mask: bool = False
    """Attention stays within a document of a packed row, and positions start anew with each (a document begins at BOS)."""
    loss_chunk_tokens: Count = 0
    """Compute head and loss for this many tokens at a time and once more in the backward, where the logits bind memory
    (2048 is a good size); 0: all at once."""


class OptimizerConfig(Section):
    name: Literal["adamw", "muon", "adamw_8bit", "adamw_bf16"] = "adamw"
    """muon: Muon for the blocks' matrices, AdamW for the rest; adamw_8bit, adamw_bf16: AdamW with moments of fewer bits."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of AdamW's first moment."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay of AdamW's second moment."""
    eps: Positive = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices; norms, embeddings and biases have none."""
    momentum: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    """muon: decay of its momentum."""
    nesterov: bool = True
    """muon: Nesterov's momentum."""


class ScheduleConfig(Section):
    name: Literal["cosine", "linear", "wsd", "two_stage"] = "cosine"
    """Shape after warm-up: cosine or linear to the minimum; wsd: stable, then linear decay; two_stage: two linear decays with
    a drop between them, and weight decay in the first only (BitNet's recipe)."""
    warmup_steps: Count | None = None
    """Steps of linear warm-up; default a tenth of the run, at most 100."""
    decay_fraction: Fraction = 0.2
    """wsd: share of the run, at its end, in which the rate decays."""
    stage_fraction: Fraction = 0.5
    """two_stage: share of the run that is its first stage."""
    first_stage_end: Fraction = 0.53
    """two_stage: learning rate at the end of the first stage, relative to the peak."""
    second_stage_start: Fraction = 0.33
    """two_stage: learning rate at the start of the second stage, relative to the peak."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate relative to the peak."""


class ParallelConfig(Section):
    replicate: Degree = -1
    """Copies of the model that train on different rows; -1 takes what is left of the world size."""
    shard: Degree = 1
    """Devices over which parameters, gradients and optimizer state are sharded (FSDP2); -1 takes what is left."""
    context: Degree = 1
    """Devices that split each row along the sequence (context parallel); parameters are sharded over them as well."""
    tensor: Degree = 1
    """Devices that split each matrix (tensor parallel, with sequence parallel and a split vocabulary)."""
    pipeline: Degree = 1
    """Devices that hold different layers (pipeline parallel)."""
    reshard_after_forward: bool = False
    """Free gathered parameters after the forward and gather them again in the backward: less memory, more traffic."""
    reduce_each_micro_batch: bool = True
    """While accumulating, reduce gradients over shards after each micro-batch; false: once per step, which saves that
    traffic and keeps a whole float32 gradient of the model on each device meanwhile."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory, and update there."""
    async_tensor: bool = False
    """Overlap tensor-parallel exchanges with the products beside them (needs compile and NVLink)."""
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv"] = "1f1b"
    """Order of the micro-batches: gpipe keeps all activations; 1f1b at most one per stage; interleaved_1f1b and
    zero_bubble give each device `pipeline_stages` stages, for smaller gaps; zbv has two, and their backward split in two."""
    pipeline_stages: PositiveCount = 2
    """Stages per device with interleaved_1f1b and zero_bubble."""


class PrecisionConfig(Section):
    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of matrix products and activations; "auto": bfloat16 on GPU, float32 on CPU. Parameters are always float32."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are summed over devices."""


class Float8Config(Section):
    recipe: Literal["none", "tensorwise", "rowwise"] = "none"
    """float8 matrix products inside the blocks (torchao): one scale per tensor, with weights gathered as float8; or one per
    row, more exact and slower. On CPU emulated."""
    min_size: Count = 0
    """Leave layers alone whose inputs or outputs are fewer than this; 0: what the recipe gains from on an H100."""
    skip: Texts = []
    """Further layers to leave alone: globs on their names, such as "*.k_proj"."""


class CompileConfig(Section):
    enabled: bool = True
    """torch.compile every block (fullgraph) and the head with its loss."""
    cuda_graphs: bool = False
    """Record each block's kernels and replay them (Inductor's CUDA graphs): small models are bound by launches."""
    backend: Literal["inductor", "aot_eager"] = "inductor"
    """Compiler; aot_eager traces without generating code, for debugging."""


class ActivationCheckpointingConfig(Section):
    mode: Literal["none", "selective", "full", "budget"] = "none"
    """full: keep only block inputs; selective: keep matrix products and attention, recompute the rest; none: keep all;
    budget: the compiler keeps what is costliest to recompute within `budget`."""
    budget: Fraction = 0.5
    """budget: share of the activations of "none" to keep; 0 is near full, 1 is none."""


class CheckpointConfig(Section):
    interval: Count = 500
    """Save every so many steps and at the end; 0 never saves."""
    mode: Literal["async", "sync"] = "async"
    """async: training goes on while a checkpoint is written; sync: it waits."""
    keep: PositiveCount = 2
    """Complete checkpoints to keep, the permanent ones not counted."""
    permanent_interval: Count = 0
    """Checkpoints at multiples of this step, itself a multiple of `interval`, are never deleted; 0: none."""
    dir: str = ""
    """Folder of the run's checkpoints, or a URL that fsspec knows (s3://, gs://, ...); default: RUN/checkpoints."""
    max_unsaved_steps: Count = 0
    """A save that fails is tried again; the run stops when this many steps are not saved. 0: three intervals."""
    resume: str | int = "auto"
    """ "auto": the run's latest complete step, if any; "none": start anew (refused where checkpoints exist); a step; a path."""


class FaultsConfig(Section):
    non_finite: Literal["stop", "skip"] = "stop"
    """When a gradient is not finite: stop the run, or leave the step's update out and count it (the host then waits for
    every step)."""
    max_skipped: PositiveCount = 10
    """skip: stop after so many steps left out in a row."""
    spike: NonNegative = 6.0
    """Flag a loss that is this many standard deviations above the mean of the last 100 logged ones; 0: never."""
    slow_rank: NonNegative = 1.3
    """Name processes whose own work takes this many times the median's; 0: never."""
    timeout: Positive = 600.0
    """Seconds without progress after which a process counts as hanging: stacks are written and the run stops."""
    start_timeout: Positive = 3600.0
    """The same from the start to the first step's end, which compiles."""


class ValidationConfig(Section):
    interval: Count = 500
    """Evaluate the held-out rows every so many steps and at the end; 0 never does."""
    steps: Count = 0
    """Global batches of held-out rows to evaluate; 0 takes all of them."""
    transforms: Literal["same", "clean", "both"] = "same"
    """Evaluate under the run's hardware effects, without them, or both (the clean figures get names ending in _clean)."""


class NoiseConfig(Section):
    seed: Count | None = None
    """Seed of all hardware effects; default run.seed."""
    group_size: Count = 0
    """Rows of the global batch that share one draw of the transient weight noise, as one simulated chip would; a multiple
    of the micro-batch size. 0: all of them, on all devices."""
    warmup_steps: Count = 0
    """Steps over which hardware effects grow to their full strength: probabilities of errors, variances and the part of a
    rounding that acts. Validation and evaluation always see the full strength."""


class RobustConfig(Section):
    clip_weights: NonNegative = 0.0
    """After each update, clamp the weights that hardware effects are on (without any: all matrices of the blocks) to this many
    of their own standard deviations; 0: never."""
    clip_per: Literal["row", "tensor"] = "row"
    """Whose standard deviation: each output row's, or the whole matrix's."""


class DistillationConfig(Section):
    teacher: str = ""
    """A trained model whose probabilities are learned beside the text: a run folder, one of its checkpoints, "hf:FOLDER" or
    "hf:ORGANISATION/NAME"; its vocabulary must be this run's."""
    weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the teacher in the loss; the text has the rest."""
    temperature: Positive = 2.0
    """What the logits of both models are divided by before they are compared."""


class MetricsConfig(Section):
    log_interval: PositiveCount = 10
    """Log every so many steps; the loss is read from the device only then."""
    wandb: bool = False
    """Log to Weights & Biases (WANDB_MODE=offline works)."""
    wandb_project: str = "newcompute"
    """Weights & Biases project."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""


class ProfilingConfig(Section):
    trace_step: Count = 0
    """First step to trace, written to RUN/profiles and summed up in the log; the step before it is the profiler's warm-up.
    0: none. A start of the run beyond this step traces nothing."""
    trace_steps: Annotated[PositiveCount, Field(le=100)] = 3
    """Steps to trace; a trace takes megabytes per step."""
    memory_step: Count = 0
    """Step whose allocations on the GPU are recorded and written as a memory snapshot; 0: none."""
    ranks: Literal["main", "all"] = "main"
    """Processes that write: the main one, or each its own files."""


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    float8: Float8Config = Float8Config()
    compile: CompileConfig = CompileConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    faults: FaultsConfig = FaultsConfig()
    robust: RobustConfig = RobustConfig()
    distillation: DistillationConfig = DistillationConfig()
    metrics: MetricsConfig = MetricsConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    noise: NoiseConfig = NoiseConfig()
    transforms: list[TransformSpec] = []
    """Hardware effects and adapters: `[[transforms]]` tables, each with a `kind` (docs/transforms.md)."""

    @property
    def noise_seed(self) -> int:
        return self.run.seed if self.noise.seed is None else self.noise.seed

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.training.sequence_length


def model_title(model: ModelConfig) -> str:
    """Family and size of a model in words, and what its shape departs in from that size."""
    if model.init_from:
        return f"{model.name} {model.init_from}"
    departs = ", ".join(key for key, value in model.shape.model_dump().items() if value is not None)
    size = model.size or f"{_default_size(model)} (the default size)"
    return f"{model.name} {size}, custom shape ({departs})" if departs else f"{model.name} {size}"


def _default_size(model: ModelConfig) -> str:
    return "debug" if model.name == "clm" else "8B"


def named_shape(model: ModelConfig, vocab_size: int | None = None) -> LlamaShape:
    """The shape a `[model]` section names, with its overrides and the tokenizer's vocabulary. Not for `init_from`.

    Raises:
        ValueError: the size is not one of the family's, or the overrides do not fit together.
    """
    size = model.size or _default_size(model)
    if size not in SIZES[model.name]:
        raise ValueError(
            f'model.size = "{size}" is not a size of {model.name}; choose from {", ".join(SIZES[model.name])}'
        )
    overrides = model.shape.model_dump()
    scaling = overrides["rope_scaling"]
    overrides["rope_scaling"] = RopeScaling(**scaling) if scaling else None
    overrides["vocab_size"] = overrides["vocab_size"] or vocab_size
    return with_overrides(SIZES[model.name][size], **overrides)


def total_steps(config: Config, shape: LlamaShape, trained: tuple[int, int] = (0, 0)) -> int:
    """Length of the schedule in optimizer steps, whichever way it was given (default 1000); rounded up.

    Args:
        trained: steps and tokens that a resumed run has trained on with other batches.
    """
    training, (steps, tokens) = config.training, trained
    if training.steps is not None:
        return training.steps
    wanted: float
    if training.tokens is not None:
        wanted = training.tokens
    elif training.tokens_per_parameter is not None:
        wanted = training.tokens_per_parameter * num_parameters_without_embedding(shape)
    else:
        return 1000
    return steps + max(0, math.ceil((wanted - tokens) / config.tokens_per_step))
