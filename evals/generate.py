"""Text from a model."""

from __future__ import annotations

import sys

import torch

from evals.models import EvalModel


@torch.no_grad()
def generate(model: EvalModel, prompt: str, max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
    """Continue `prompt`; the returned text begins with it. Temperature 0 is greedy.

    The tokenizer puts its usual first token before the prompt; an empty prompt starts from BOS (or EOS) alone.

    Raises:
        ValueError: the prompt is empty and the tokenizer has neither BOS nor EOS, or the model is an encoder.
    """
    if model.masked:
        raise ValueError(f"{model.name} is a masked encoder: it fills in tokens and continues no text")
    tokenizer = model.tokenizer
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError("an empty prompt needs a tokenizer with a BOS or EOS token")
        ids = [start]
    if len(ids) + max_new_tokens > model.context:
        print(
            f"note: the model was made for {model.context} tokens, this is {len(ids) + max_new_tokens}", file=sys.stderr
        )
    tokens = torch.tensor([ids], device=model.model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)
