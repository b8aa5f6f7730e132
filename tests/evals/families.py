"""Small transformers models of every family that evaluations are tested on, with random weights, and a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = {
    "en": "The old mill stood by the river. Every morning the miller opened the gate, and the wheel began to turn. ",
    "de": "Die alte Mühle stand am Fluss. Jeden Morgen öffnete der Müller das Tor, und das Rad fing an zu laufen. ",
    "el": "Ο παλιός μύλος ήταν δίπλα στο ποτάμι. Κάθε πρωί ο μυλωνάς άνοιγε την πύλη και ο τροχός γύριζε. ",
    "tr": "Eski değirmen ırmağın kıyısındaydı. Değirmenci her sabah kapağı açar, çark dönmeye başlardı. ",
    "hi": "पुरानी चक्की नदी के किनारे थी। हर सुबह चक्कीवाला फाटक खोलता और पहिया घूमने लगता। ",
    "zh": "老磨坊在河边。每天早上磨坊主打开水闸,水轮就开始转动。",
}
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = 400
PAD = 1
CONTEXT = 24
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": CONTEXT,
}
LLAMA = {**SIZE, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}

CONFIGS = {
    "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **COMMON),
    "opt": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=32, **COMMON),
    "opt350m": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False, **COMMON),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZE, max_position_embeddings=CONTEXT, **COMMON),
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **COMMON),
    "llama": lambda: hf.LlamaConfig(**LLAMA, **COMMON),
    "mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=6, **COMMON),
    "bert": lambda: hf.BertConfig(**SIZE, max_position_embeddings=CONTEXT, **COMMON),
    "xlmr": lambda: hf.XLMRobertaConfig(**SIZE, max_position_embeddings=CONTEXT + PAD + 1, type_vocab_size=1, **COMMON),
}  # fmt: skip
ENCODERS = ("bert", "xlmr")


def build(family: str):
    """A model with random weights, large enough that a context matters."""
    torch.manual_seed(0)
    kind = hf.AutoModelForMaskedLM if family in ENCODERS else hf.AutoModelForCausalLM
    model = kind.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of the texts that puts <s> and </s> around a sentence where it is asked for special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS.values(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL))
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
