"""Masks and positions: documents in one row are as if each stood alone, and all ways to compute attention agree."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from models import attention
from models.attention import CausalAttention, attention_mask, documents_of, positions_in_documents
from models.llama import Llama
from models.sizes import LlamaShape

BOS = 1
SHAPE = LlamaShape(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, vocab_size=50, max_context=64)
# Two packed rows; the first begins in the middle of a document.
ROWS = torch.tensor([[7, 9, BOS, 4, 4, 8, BOS, BOS, 5, 6, 7, 8], [BOS, 3, 4, 5, 6, 7, 8, 9, 10, BOS, 11, 12]])


def test_documents_and_positions_by_hand():
    documents = documents_of(ROWS, BOS)
    assert documents.tolist() == [[0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3], [1] * 9 + [2] * 3]
    assert positions_in_documents(documents).tolist() == [
        [0, 1, 0, 1, 2, 3, 0, 0, 1, 2, 3, 4],
        [*range(9), 0, 1, 2],
    ]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Llama(SHAPE)


def test_a_packed_row_is_its_documents_one_by_one(model):
    documents = documents_of(ROWS, BOS)
    columns = torch.arange(ROWS.shape[1])
    mask = attention_mask(columns, columns, documents, documents)
    packed = model(ROWS, positions_BT=positions_in_documents(documents), mask=mask)
    for row, numbers, logits in zip(ROWS, documents, packed):
        for number in numbers.unique():
            alone = model(row[numbers == number][None])[0]
            torch.testing.assert_close(logits[numbers == number], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(packed, model(ROWS), atol=1e-3), "without a mask documents see each other"


def test_gradients_stay_within_a_document(model):
    documents = documents_of(ROWS[:1], BOS)
    columns = torch.arange(ROWS.shape[1])
    embedded = model.model.embed_tokens(ROWS[:1]).detach().requires_grad_()
    h, (cos, sin) = embedded, (model.model.rope_cos[:12], model.model.rope_sin[:12])
    for block in model.model.layers.values():
        h = block(h, cos, sin, attention_mask(columns, columns, documents, documents))
    h[0, 10].sum().backward()
    touched = embedded.grad[0].abs().sum(-1) > 0
    assert touched.tolist() == [c in range(7, 11) for c in range(12)]


@pytest.mark.parametrize(
    "given", [pytest.param("no documents", marks=pytest.mark.slow), "documents", "a device's part"]
)
def test_dense_mask_against_a_loop_and_flex_attention(given, monkeypatch):
    if given == "a device's part":  # Inductor writes C++ for it that some compilers refuse
        monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention)
        monkeypatch.setattr(attention, "_compiled_create_block_mask", lambda: create_block_mask)
    generator = torch.Generator().manual_seed(1)
    length = 128  # FlexAttention's block size
    key_columns = torch.cat([torch.arange(64, 96), torch.arange(0, 64), torch.arange(96, 128)])
    query_columns = key_columns[:64] if given == "a device's part" else torch.arange(length)
    key_columns = key_columns if given == "a device's part" else torch.arange(length)
    row = torch.randint(0, 2, (2, length), generator=generator).cumsum(1) // 9
    documents = (None, None) if given == "no documents" else (row[:, query_columns], row[:, key_columns])
    dense = attention_mask(query_columns, key_columns, *documents)
    for b in range(len(dense)):
        for q, query in enumerate(query_columns.tolist()):
            for k, key in enumerate(key_columns.tolist()):
                same = documents[0] is None or row[b, query] == row[b, key]
                assert dense[b, 0, q, k] == (key <= query and bool(same))
    q = torch.randn(2, 4, len(query_columns), 16, generator=generator)
    k, v = (torch.randn(2, 2, length, 16, generator=generator) for _ in range(2))
    attend = CausalAttention(grouped=True)
    with torch.no_grad():
        expected = attend(q, k, v, dense)
        if given == "no documents":
            torch.testing.assert_close(attend(q, k, v), expected)
        blocks = attention_mask(query_columns, key_columns, *documents, blocks=True)
        torch.testing.assert_close(attend(q, k, v, blocks), expected, atol=1e-5, rtol=1e-5)
