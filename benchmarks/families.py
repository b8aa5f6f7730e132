"""Which effects act on which Hugging Face architectures, and on how much of their weights.

    python benchmarks/families.py [FAMILY ...] [--table]

A small model of each family, with random weights, meets four kinds of effects alone: int4 weights, int4 inputs, bit errors
in outputs, int8 attention. The weights that act are counted independently of what the transforms say of themselves: while
int4 weights are on, every operation of the forward that multiplies matrices is watched for stored weights that enter it
unchanged. A kind of effect acts if it changes the logits; otherwise the error says why not.

Writes benchmarks/results/families.json and, from it, the table in docs/evaluation.md (`--table`: only that).
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

import torch  # noqa: E402
import transformers as hf  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from benchmarks import common  # noqa: E402
from evals.noise import NoisyModel  # noqa: E402
from transforms.specs import BitflipSpec, CellFaults, Quantised, QuantiseSpec  # noqa: E402

DOCS = ROOT / "docs" / "evaluation.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"

_VOCABULARY = 320
_IDS = {"vocab_size": _VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4}
_PLAIN = {"hidden_size": 64, "intermediate_size": 96, **_DEPTH, **_IDS}
_LLAMA = {**_PLAIN, "num_key_value_heads": 2, "max_position_embeddings": 64}
_HEADS_OF_16 = {**_LLAMA, "head_dim": 16}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **_IDS}
_OPT = {"hidden_size": 64, "ffn_dim": 96, **_DEPTH, "max_position_embeddings": 64, **_IDS}
_FEW_LAYERS = {"hidden_size": 64, "n_layer": 2, "n_head": 4, **_IDS}
_MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, **_IDS}
_TOP_2_OF_4 = {"num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_DEEPSEEK = {**_LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 48, **_LATENT, **_ROUTED}
_BERT = {**_PLAIN, "max_position_embeddings": 64}
_ROBERTA = {**_PLAIN, "max_position_embeddings": 66, "type_vocab_size": 1}
_BARE_IDS = {"vocab_size": _VOCABULARY, "pad_token_id": 1}

FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2Config(**_GPT2),
    "gpt2, scaled by layer": lambda: hf.GPT2Config(
        **_GPT2, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True
    ),
    "opt": lambda: hf.OPTConfig(**_OPT, word_embed_proj_dim=64),
    "opt-350m": lambda: hf.OPTConfig(**_OPT, word_embed_proj_dim=32, do_layer_norm_before=False),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_PLAIN, max_position_embeddings=64),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        window_size=6,
        **_IDS,
    ),
    "gptj": lambda: hf.GPTJConfig(**_GPT2, rotary_dim=8),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**_GPT2),
    "bloom": lambda: hf.BloomConfig(**_FEW_LAYERS),
    "falcon": lambda: hf.FalconConfig(hidden_size=64, **_DEPTH, **_IDS),
    "mpt": lambda: hf.MptConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=64, **_IDS),
    "llama": lambda: hf.LlamaConfig(**_LLAMA),
    "mistral": lambda: hf.MistralConfig(**_LLAMA, sliding_window=6),
    "qwen2": lambda: hf.Qwen2Config(**_LLAMA),
    "qwen3": lambda: hf.Qwen3Config(**_HEADS_OF_16),
    "gemma": lambda: hf.GemmaConfig(**_HEADS_OF_16),
    "gemma2": lambda: hf.Gemma2Config(**_HEADS_OF_16, sliding_window=6, attn_logit_softcapping=5.0),
    "gemma3": lambda: hf.Gemma3TextConfig(**_HEADS_OF_16, sliding_window=6),
    "phi": lambda: hf.PhiConfig(**_LLAMA),
    "phi3": lambda: hf.Phi3Config(**_LLAMA),
    "stablelm": lambda: hf.StableLmConfig(**_LLAMA),
    "cohere": lambda: hf.CohereConfig(**_LLAMA),
    "olmo2": lambda: hf.Olmo2Config(**_LLAMA),
    "granite": lambda: hf.GraniteConfig(**_LLAMA),
    "smollm3": lambda: hf.SmolLM3Config(**_LLAMA),
    "mixtral": lambda: hf.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **_LLAMA, **_TOP_2_OF_4, moe_intermediate_size=48, shared_expert_intermediate_size=48
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**_HEADS_OF_16, **_TOP_2_OF_4, moe_intermediate_size=48),
    "olmoe": lambda: hf.OlmoeConfig(**_LLAMA, **_TOP_2_OF_4),
    "phimoe": lambda: hf.PhimoeConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: hf.GptOssConfig(
        **_HEADS_OF_16, num_local_experts=4, num_experts_per_tok=2, sliding_window=6, rope_parameters=_plain_rope()
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**_DEEPSEEK, first_k_dense_replace=1),
    "deepseek_v32": lambda: hf.DeepseekV32Config(
        **_DEEPSEEK, first_k_dense_replace=2, index_topk=6, index_n_heads=4, index_head_dim=16
    ),
    "jamba": lambda: hf.JambaConfig(
        **_LLAMA,
        **_TOP_2_OF_4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
    ),
    "mamba": lambda: hf.MambaConfig(**_MAMBA),
    "falcon_mamba": lambda: hf.FalconMambaConfig(**_MAMBA),
    "mamba2": lambda: hf.Mamba2Config(**_MAMBA, num_heads=8, head_dim=16, n_groups=1),
    "rwkv": lambda: hf.RwkvConfig(hidden_size=64, num_hidden_layers=2, context_length=64, **_IDS),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(
        **{**_PLAIN, "num_hidden_layers": 3}, lru_width=64, attention_window_size=16
    ),
    "bert": lambda: hf.BertConfig(**_BERT),
    "roberta": lambda: hf.RobertaConfig(**_ROBERTA),
    "xlm-roberta": lambda: hf.XLMRobertaConfig(**_ROBERTA),
    "distilbert": lambda: hf.DistilBertConfig(
        dim=64, n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=64, **_BARE_IDS
    ),
    "albert": lambda: hf.AlbertConfig(**_BERT, embedding_size=32),
    "electra": lambda: hf.ElectraConfig(**_BERT, embedding_size=32),
    "modernbert": lambda: hf.ModernBertConfig(
        **_BERT, global_attn_every_n_layers=2, local_attention=8, cls_token_id=0, sep_token_id=2
    ),
    "deberta-v2": lambda: hf.DebertaV2Config(
        hidden_size=64,
        intermediate_size=96,
        **_DEPTH,
        max_position_embeddings=64,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        **_BARE_IDS,
    ),
}
ENCODERS = {"bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "modernbert", "deberta-v2"}

_INT4, _INT8 = Quantised(format="int4"), Quantised(format="int8")
KINDS: dict[str, Any] = {
    "weights": QuantiseSpec(kind="quantise", weight=_INT4, unmatched="keep"),
    "inputs": QuantiseSpec(kind="quantise", input=_INT4, unmatched="keep"),
    "outputs": BitflipSpec(kind="bitflip", output=CellFaults(mantissa=0.05), unmatched="keep"),
    "attention": QuantiseSpec(kind="quantise", attention=_INT8),
}
_REASONS = {
    "never acted": "multiplies a layer's weight itself",
    "no port": "own attention function",
    "know nothing of": "own attention arguments",
}


def _plain_rope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0}


def build(family: str) -> Any:
    """A model of the family with random weights, large enough that effects change its logits."""
    torch.manual_seed(0)
    kind = hf.AutoModelForMaskedLM if family in ENCODERS else hf.AutoModelForCausalLM
    model = kind.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.mul_(3)
    return model


def is_weight(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix, or several: no norm and no bias."""
    return sum(size > 1 for size in parameter.shape) > 1 and not name.endswith("bias")


class CleanWeights(TorchDispatchMode):
    """Stored parameters that enter an operation which multiplies matrices, by name."""

    def __init__(self, model: Any):
        super().__init__()
        self.found: dict[str, int] = {}
        self._names = {
            p.untyped_storage().data_ptr(): (name, p.numel())
            for name, p in model.named_parameters()
            if is_weight(name, p)
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if re.search("mm|matmul|linear|einsum|conv", func._overloadpacket.__name__):
            for value in tree_leaves((args, kwargs)):
                known = isinstance(value, Tensor) and self._names.get(value.untyped_storage().data_ptr())
                if known:
                    self.found[known[0]] = known[1]
        return func(*args, **(kwargs or {}))


def measure(family: str) -> dict[str, Any]:
    """What acts on a family, and the share of its blocks' weights, of those that enter matmuls, that does."""
    model = build(family)
    ids = torch.arange(3, 45)[None].repeat(2, 1)
    with torch.no_grad():
        watch = CleanWeights(model)
        with watch:
            clean = model(input_ids=ids).logits
        in_blocks = {name: size for name, size in watch.found.items() if re.search(r"\.\d+\.", f".{name}")}
        row: dict[str, Any] = {}
        for kind, spec in KINDS.items():
            row[kind], exact = _acts(model, spec, ids, clean)
            if kind == "weights":
                left = None if exact is None else sum(exact.get(name, 0) for name in in_blocks)
                row["share"] = None if left is None else 1 - left / sum(in_blocks.values())
        default = KINDS["weights"].model_copy(update={"unmatched": "refuse"})
        row["default"], _ = _acts(model, default, ids, clean)
    return row


def _acts(model: Any, spec: Any, ids: Tensor, clean: Tensor) -> tuple[str, dict[str, int] | None]:
    """ "acts", or why not; and the weights that were multiplied exactly."""
    try:
        noisy = NoisyModel(model, [spec], 1)
    except ValueError as error:
        return next((why for part, why in _REASONS.items() if part in str(error)), str(error)), None
    noisy.chip(1)
    watch = CleanWeights(model)
    with watch:
        logits = model(input_ids=ids).logits
    with noisy.clean():
        inside = model(input_ids=ids).logits
    noisy.detach()
    after = model(input_ids=ids).logits
    if not (torch.equal(inside, clean) and torch.equal(after, clean)):
        return "does not leave the model as it was", watch.found
    return ("does nothing" if torch.equal(logits, clean) else "acts"), watch.found


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| family | weights that act | by default | inputs | outputs | attention |", "|---|---|---|---|---|---|"]
    for family, row in rows.items():
        share = row["weights"] if row["share"] is None else f"{row['share']:.1%}"
        default = "yes" if row["default"] == "acts" else f"refused: {row['default'].partition(' ')[0]} not reached"
        others = (
            "yes" if row[kind] == "acts" else f"refused: {row[kind]}" for kind in ("inputs", "outputs", "attention")
        )
        lines.append(f"| {family} | {share} | {default} | {' | '.join(others)} |")
    return "\n".join(lines) + "\n"


def write_table() -> None:
    found = json.loads((common.RESULTS / "families.json").read_text(encoding="utf-8"))
    head, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    DOCS.write_text(head + BEGIN + table(found["families"]) + END + tail, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="only print these")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if not options.table:
        rows = {}
        for family in options.families or FAMILIES:
            rows[family] = measure(family)
            print(f"{family:24} {json.dumps(rows[family])}", flush=True)
        if options.families:
            return
        origin = common.origin("cpu", ("torch", "transformers"))
        common.write_json({"origin": origin, "families": rows}, common.RESULTS / "families.json")
    write_table()


if __name__ == "__main__":
    main()
