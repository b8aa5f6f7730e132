"""Any model to evaluate as a transformers model with its tokenizer: a run, a checkpoint, or a Hugging Face folder."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

# transformers imports torchao, which reports each of its GPU libraries that a CPU cannot load.
for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES  # noqa: E402

from evals.references import check_reference, check_tokenizer_files, is_local  # noqa: E402
from models.hf import weight_files  # noqa: E402
from parallel.mesh import choose_device  # noqa: E402
from train import read_back  # noqa: E402
from train.export import TrainedModel, is_run_or_checkpoint, open_trained, provenance  # noqa: E402

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "context_length")
"""Names that configurations give the longest sequence by."""
UNLIMITED_CONTEXT = 2048
"""Tokens that a model may be given at once whose configuration names no longest sequence, as BLOOM's and Mamba's."""
_BLOCK = re.compile(r"\.\d+\.")
MAX_DEFAULT_CONTEXT = 512
"""Tokens of a window of text unless told otherwise, of models made for more."""


@dataclass(frozen=True)
class EvalModel:
    """What evaluations work on."""

    model: Any
    """A transformers language model in eval mode, on its device."""
    tokenizer: Any
    """Its AutoTokenizer."""
    context: int
    """Longest sequence it was made for, in tokens; of a run and its exports, the one that it was trained on."""
    name: str
    """The path it came from, with the step of a checkpoint."""
    masked: bool = False
    """An encoder that fills in masked tokens (BERT), not a decoder that continues a text."""


def load_model(reference: str, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> EvalModel:
    """Load a run folder, one of its checkpoints, or a Hugging Face folder or Hub id.

    Args:
        device: "auto" takes a GPU where there is one.
        dtype: "auto" is float32 on CPU and what the weights are stored in on GPU (bfloat16 for runs).
        trust_remote_code: run the Python code that a folder or a Hub repository brings along.

    Raises:
        ValueError: the reference is none of these; RunFolderError, CheckpointError: the run cannot be read.
    """
    place = choose_device(device)
    check_reference(reference)
    path = Path(reference)
    masked = False
    if is_run_or_checkpoint(path):
        trained = open_trained(path)
        model, tokenizer = _from_run(trained)
        kind = torch.bfloat16 if place.type == "cuda" else torch.float32
        context, name = trained.context, str(trained.checkpoint)
    elif path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"{path} is neither a run, a checkpoint nor a Hugging Face folder (no config.json)")
    else:
        if path.is_dir():
            weight_files(path)
            check_tokenizer_files(path)
        trust = {"trust_remote_code": trust_remote_code}  # left out, transformers would ask on the terminal
        # Packed layers compute in the type that they are loaded in, and some cannot change it later.
        wanted = "auto" if dtype == "auto" and place.type == "cuda" else _named(dtype, torch.float32)
        try:
            masked = is_masked(AutoConfig.from_pretrained(reference, **trust))
            tokenizer = _tokenizer(reference, trust)  # before the weights, which take long
            kind_of_model = AutoModelForMaskedLM if masked else AutoModelForCausalLM
            options = {"use_safetensors": True, "output_loading_info": True, **_placement(path, place), **trust}
            model, loaded = kind_of_model.from_pretrained(reference, dtype=wanted, **options)
        except (OSError, ValueError, SafetensorError) as error:
            if "trust_remote_code" in str(error):
                raise ValueError(
                    f"{reference!r} brings Python code of its own, which is not run unless asked for: read it, and if you "
                    "trust it give --trust-remote-code"
                ) from error
            if "Unrecognized configuration class" in str(error):
                raise ValueError(
                    f"{reference!r} is neither a causal nor a masked language model, and only these can be evaluated"
                ) from error
            if not is_local(reference):
                raise ValueError(_not_from_the_hub(reference, error)) from error
            raise ValueError(f"cannot load {reference!r} as a Hugging Face model: {error}") from error
        _check_complete(model, loaded, reference)
        if masked and tokenizer.mask_token_id is None:
            raise ValueError(f"{reference!r} is a masked language model, but its tokenizer has no mask token")
        kind = model.dtype if place.type == "cuda" else torch.float32
        context, name = _context(model), reference
        if path.is_dir():  # an export has positions for more tokens than it has seen
            trained_on = provenance(path).get("sequence_length")
            context = min(context, trained_on) if isinstance(trained_on, int) else context
    kind = _named(dtype, kind)
    return EvalModel(_to(model, place, kind).eval(), tokenizer, context, name, masked)


def _tokenizer(reference: str, trust: dict[str, bool]) -> Any:
    """
    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(reference, **trust)
    except (OSError, ValueError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise
        raise ValueError(f"its tokenizer cannot be loaded, are all of its files there? {error}") from error


def _not_from_the_hub(reference: str, error: Exception) -> str:
    """Why a Hub id cannot be loaded, in a line: there may just be a folder's name misspelt."""
    said = " ".join(str(error).split())
    return f"{reference!r} is no folder here, and cannot be loaded from the Hugging Face Hub: {said}"


def is_masked(config: Any) -> bool:
    """Whether a transformers config is one of an encoder that fills in masked tokens.

    Its architectures decide. Where they name neither kind of language model (`BertForPreTraining`, or none at all), an
    encoder is taken for what it was pretrained as: transformers would also load it as a decoder, and give nonsense.
    """
    names = config.architectures or []
    if any(name.endswith("ForMaskedLM") for name in names):
        return True
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return False
    known = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type, "")
    return known.endswith("ForMaskedLM") and not getattr(config, "is_decoder", False)


def _check_complete(model: Any, loaded: dict[str, Any], reference: str) -> None:
    """
    Raises:
        ValueError: the files lack weights, which transformers has drawn at random, as the head of a bare encoder; or they have
            more blocks than the configuration.
    """
    names = {name for name, _ in model.named_parameters()}
    random = sorted(set(loaded["missing_keys"]) & names)
    if random:
        raise ValueError(
            f"{reference!r} has no weights for {', '.join(random[:3])}{' ...' if len(random) > 3 else ''}: as a "
            f"{type(model).__name__} it would be evaluated with random ones"
        )
    # Others, such as the pooler of an encoder, are for other uses of the model.
    alike = {_BLOCK.sub(".*.", name) for name in names}
    left_out = sorted(name for name in loaded["unexpected_keys"] if _BLOCK.sub(".*.", name) in alike)
    if left_out:
        raise ValueError(
            f"{reference!r} has weights that its config.json leaves out: {', '.join(left_out[:3])}"
            f"{' ...' if len(left_out) > 3 else ''}; evaluated without them it would be another model"
        )


def _context(model: Any) -> int:
    """Tokens that a model has positions for. Those of RoBERTa's kin come after the index of the pad token."""
    for module in model.modules():
        positions = getattr(module, "position_embeddings", None)
        if isinstance(positions, torch.nn.Embedding) and positions.padding_idx is not None:
            return positions.num_embeddings - positions.padding_idx - 1
    # Models of text and images have it in the configuration of their text part.
    configs = (model.config, model.config.get_text_config())
    named = [getattr(config, name, None) for config in configs for name in _CONTEXT_NAMES]
    return next((length for length in named if isinstance(length, int) and length > 0), UNLIMITED_CONTEXT)


def _named(dtype: str, auto: torch.dtype) -> torch.dtype:
    return auto if dtype == "auto" else getattr(torch, dtype)


def _placement(path: Path, place: torch.device) -> dict[str, Any]:
    """Where transformers has to be told: packed weights in the metal layout go to an Apple GPU otherwise."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {"device_map": place} if config["quantization_config"]["quant_method"] == "metal" else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}  # what is wrong with the file, transformers says


def _to(model: Any, place: torch.device, kind: torch.dtype) -> Any:
    """`model.to` that leaves computed tables alone: rotary frequencies in bfloat16 turn distant positions at random."""
    tables = [
        (module, name, table)
        for module in model.modules()
        for name, table in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]
    model.to(place, kind)
    for module, name, table in tables:
        setattr(module, name, table.to(place))
    return model


def _from_run(trained: TrainedModel) -> tuple[Any, Any]:
    if trained.tokenizer is None:
        raise ValueError(
            f"{trained.checkpoint} was trained on random tokens: there is no tokenizer to evaluate it with"
        )
    config = LlamaConfig(**trained.hf_config("float32"))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = trained.state_dict()
    if trained.shape.tied_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    _materialise_buffers(model)
    with tempfile.TemporaryDirectory() as folder:
        trained.tokenizer.save_hf(Path(folder))
        tokenizer = read_back.load_tokenizer(Path(folder))
    read_back.check_tokenizer(tokenizer, trained.tokenizer)
    return model, tokenizer


def _materialise_buffers(model: Any) -> None:
    """The rotary frequencies are no part of a state dict; a fresh module on the CPU computes them."""
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config)
