"""Hugging Face folders of Llama models: config.json, generation_config.json and safetensors, read and written.

Our parameter names and the rotary layout are Hugging Face's own, so that import and export only add or strip the
vocabulary's padding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.sizes import LlamaShape, RopeScaling

LARGEST_DIM = 1 << 31
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
VOCABULARY_NAMES = ("model.embed_tokens.weight", "lm_head.weight")


def hf_config(shape: LlamaShape, bos_id: int | None, eos_ids: list[int], dtype: str) -> dict[str, Any]:
    """`config.json` of a shape. The rotary settings stand in the spelling of transformers 5 and of 4."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if shape.rope_scaling is not None:
        scaling = shape.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_context,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_context,
        "rope_parameters": {"rope_theta": shape.rope_theta, **rope},
        "rope_theta": shape.rope_theta,
        "rope_scaling": rope if shape.rope_scaling is not None else None,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else (eos_ids or None),
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def shape_from_hf(folder: Path) -> LlamaShape:
    """The shape of a Hugging Face Llama folder.

    Raises:
        ValueError: it is no Llama, or has a feature that `models/llama.py` does not (biases, another activation, another
            kind of rotary scaling).
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        found = config.get("model_type") if isinstance(config, dict) else None
        raise ValueError(f"{file}: model_type is {found!r}; only Llama is supported")
    try:
        return _shape(config, file)
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]!r}, which a Llama needs") from error
    except (TypeError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{file} does not hold a Llama's settings: {error}") from error


def _shape(config: dict[str, Any], file: Path) -> LlamaShape:
    for key, value in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if config.get(key, value) != value:
            raise ValueError(f"{file}: {key} is {config[key]!r}; only Llama with {key} = {value!r} is supported")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{file}: rope_type is {kind!r}; supported are 'default' and 'llama3'")
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    counts = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    for key in (*counts, "max_position_embeddings", "num_key_value_heads", "head_dim"):
        if config.get(key) is None and key not in counts:
            continue
        if type(config[key]) is not int or not 0 < config[key] <= LARGEST_DIM:
            raise ValueError(
                f"{file}: {key}: expected a whole number from 1 to {LARGEST_DIM}, found {config[key]!r:.80}"
            )
    heads = config["num_attention_heads"]
    return LlamaShape(
        dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        ffn_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        head_dim=config.get("head_dim") or 0,
        max_context=config["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        rope_scaling=scaling,
        tied_embeddings=config.get("tie_word_embeddings", False),
        norm_eps=config.get("rms_norm_eps", 1e-6),
    )


def no_safetensors(folder: Path) -> str:
    """Why a folder without safetensors is refused, and what to do."""
    others = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    found = f" (there is {', '.join(others[:3])})" if others else ""
    return (
        f"{folder} has no .safetensors file{found}; pickled formats are not loaded, since they can run code: convert them, "
        "or ask for the model's safetensors"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder that transformers reads: `model.safetensors`, else what its index names.

    Other safetensors files beside them are no part of the model, as long as they hold none of its tensors.

    Raises:
        ValueError: there are none, one cannot be read or lies elsewhere, or two files hold a tensor of the same name.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    beside = sorted(folder.glob("*.safetensors"))
    if not beside:
        raise ValueError(no_safetensors(folder))
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter (adapter_config.json): merge it into its model, and name that one")
    indexed = _indexed(index) if index.exists() else []
    if single.exists():
        files = [single]
    elif indexed:
        files = [folder / name for name in indexed]
    else:
        raise ValueError(
            f"{folder} has {', '.join(file.name for file in beside[:3])}, but neither model.safetensors nor {INDEX}, which say "
            "where a model's weights are: rename the file that holds them to model.safetensors"
        )
    holder: dict[str, Path] = {}
    for file in [*files, *(file for file in beside if file not in files)]:
        for name in _open(file).keys():  # noqa: SIM118 - not a dict
            if name in holder and (file in files or holder[name] in files):
                raise ValueError(
                    f"{holder[name]} and {file.name} both hold {name}: remove the one that is not meant (transformers reads "
                    f"{single.name if files == [single] else 'the files that ' + INDEX + ' names'})"
                )
            holder.setdefault(name, file)
    return files


def _indexed(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        ValueError: it is no index, or names a file outside its folder.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot read {index}: {error}") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r:.200}, which is no plain name of a file in its folder")
    return sorted(names)


def _open(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file} is missing, which {INDEX} names")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut off: {error}") from error


class HFWeights:
    """The tensors of a folder that transformers would read, read in parts.

    Raises:
        ValueError: as `weight_files`.
    """

    def __init__(self, folder: Path):
        opened = [_open(file) for file in weight_files(folder)]
        self._where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a dict

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> list[int]:
        return self._where[name].get_slice(name).get_shape()

    def read(self, name: str, first_row: int = 0, num_rows: int | None = None) -> Tensor:
        """Rows [first_row, first_row + num_rows) of a tensor; rows past its end are zeros (the vocabulary's padding)."""
        part = self._where[name].get_slice(name)
        total = part.get_shape()[0]
        last = total if num_rows is None else first_row + num_rows
        tensor = part[min(first_row, total) : min(last, total)]
        if num_rows is not None and len(tensor) < num_rows:
            tensor = torch.cat([tensor, tensor.new_zeros(num_rows - len(tensor), *tensor.shape[1:])])
        return tensor


def check_names(weights: HFWeights, expected: dict[str, torch.Size], shape: LlamaShape) -> None:
    """
    Raises:
        ValueError: a tensor of the model is missing in the folder, or has another shape there.
    """
    missing = sorted(set(expected) - weights.names)
    if missing:
        raise ValueError(f"the folder lacks {len(missing)} tensors of this model, the first is {missing[0]}")
    for name, size in expected.items():
        wanted = [shape.vocab_size, *size[1:]] if name in VOCABULARY_NAMES else list(size)
        if weights.shape(name) != wanted:
            raise ValueError(f"{name} has shape {weights.shape(name)} in the folder, this model needs {wanted}")


def write_safetensors(folder: Path, groups: Iterable[dict[str, Tensor]], shape: LlamaShape, dtype: torch.dtype) -> int:
    """`write_files` of a Llama's weights in one type, without the padding rows of the vocabulary."""
    return write_files(
        folder,
        ({name: strip_padding(name, tensor, shape).to(dtype) for name, tensor in group.items()} for group in groups),
    )


def write_files(folder: Path, groups: Iterable[dict[str, Tensor]], metadata: dict[str, str] | None = None) -> int:
    """Write groups of tensors, one safetensors file each, with an index where there are several.

    Groups come lazily, so that a 70B model needs the memory of one file. `metadata` stands in the head of every file.
    Returns the bytes written.
    """
    written: list[tuple[Path, list[str]]] = []
    total = 0
    for i, group in enumerate(groups):
        tensors = {name: tensor.contiguous() for name, tensor in group.items()}
        path = folder / f"part-{i:05d}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"} | (metadata or {}))
        path.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
        written.append((path, list(tensors)))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(written) == 1:
        written[0][0].rename(folder / "model.safetensors")
        return total
    weight_map = {}
    for i, (path, names) in enumerate(written, start=1):
        name = f"model-{i:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / name)
        weight_map.update(dict.fromkeys(names, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)
    return total


def _umask() -> int:
    """The process's file-creation mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def strip_padding(name: str, tensor: Tensor, shape: LlamaShape) -> Tensor:
    return tensor[: shape.vocab_size] if name in VOCABULARY_NAMES else tensor


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
