"""Claims about ops_attention.py: every mistake is caught and named, every right way passes, NumPy's loops agree.

Run: .venv/bin/python -m pytest tests/test_ops_attention.py
"""

import hypothesis
import numpy as np
import pytest
import torch
from conftest import assert_close, right_and_wrong
from hypothesis import given

import adapter
from conformance import check_op
from ops_attention import OPS, cache_update, max_logits, rms_norm

EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


# Independent versions: one query of one head at a time, in loops


def numpy_rms_norm(x, weight, eps):
    rows = [row * weight / np.sqrt(np.dot(row, row) / len(row) + eps) for row in x.reshape(-1, x.shape[-1])]
    return np.array(rows, dtype=x.dtype).reshape(x.shape)


def numpy_visibility(query_segments, key_segments):
    (batch, tokens), keys = query_segments.shape, key_segments.shape[1]
    mask = np.zeros((batch, 1, tokens, keys), dtype=bool)
    for b, t, s in np.ndindex(batch, tokens, keys):
        mask[b, 0, t, s] = keys - tokens + t >= s and query_segments[b, t] == key_segments[b, s]
    return mask


def numpy_rows(q_nope, q_rope, latent, rope_key, kv_b, mask, scale):
    """For every batch row, query and head: its visible logits and their values."""
    batch, tokens, heads, nope = q_nope.shape
    for b, t, h in np.ndindex(batch, tokens, heads):
        seen = mask[b, 0, t]
        rows = kv_b[h * len(kv_b) // heads : (h + 1) * len(kv_b) // heads]
        logits = latent[b, seen] @ (rows[:nope].T @ q_nope[b, t, h]) + rope_key[b, seen] @ q_rope[b, t, h]
        yield h, scale * logits, latent[b, seen] @ rows[nope:].T


def numpy_mla_attention(q_nope, *rest):
    out = [np.exp(x - x.max()) @ value / np.exp(x - x.max()).sum() for _, x, value in numpy_rows(q_nope, *rest)]
    return np.array(out, dtype=q_nope.dtype).reshape(*q_nope.shape[:2], -1)


def numpy_max_logits(q_nope, *rest):
    largest = np.full(q_nope.shape[2], -np.inf, dtype=q_nope.dtype)
    for h, logits, _ in numpy_rows(q_nope, *rest):
        largest[h] = max([largest[h], *logits])
    return largest


def numpy_cache_update(latent_cache, rope_cache, length, latent, rope_key):
    return np.hstack((latent_cache[:, :length], latent)), np.hstack((rope_cache[:, :length], rope_key))


NUMPY = {
    "rms_norm": numpy_rms_norm, "visibility": numpy_visibility, "mla_attention": numpy_mla_attention,
    "mla_decode": numpy_mla_attention, "max_logits": numpy_max_logits, "cache_update": numpy_cache_update,
}  # fmt: skip


@EACH
def test_numpy_from_the_formulas_agrees(op):
    caller = lambda op, arguments, *_: adapter.run(NUMPY[op.name], arguments, op.outputs, arrays="numpy")  # noqa: E731
    for dtype in {torch.float32, *op.dtypes} - {torch.bfloat16}:
        finding = check_op(op, caller, (dtype,))
        assert finding is None, finding.text()


def test_rms_norm_of_a_hand_worked_row():
    """(3, 4): mean square 12.5, and eps makes it 16."""
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([4.0, 8.0])
    assert_close(rms_norm(x, weight, 3.5), torch.tensor([[3.0, 8.0]]))


def test_cache_update_reads_only_what_was_written():
    old, new = torch.tensor([[[1.0], [2.0], [torch.nan], [torch.nan]]]), torch.tensor([[[3.0]]])
    latent, rope_key = cache_update(old, 10 * old, 2, new, 10 * new)
    assert latent.flatten().tolist() == [1, 2, 3] and rope_key.flatten().tolist() == [10, 20, 30]
    assert old.isnan().sum() == 2, "the cache that was given has changed"


def test_max_logits_of_hidden_queries_is_minus_infinity():
    q, latent, kv_b = torch.ones(1, 1, 2, 1), torch.ones(1, 1, 1), torch.ones(4, 1)
    hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    assert max_logits(q, q, latent, latent, kv_b, hidden, 1.0).tolist() == [-torch.inf] * 2
    assert max_logits(q, q, latent, latent, kv_b, ~hidden, 3.0).tolist() == [6.0] * 2


test_right_implementations_pass_in_every_dtype, test_a_mistake_is_caught_and_named = right_and_wrong(OPS)


@pytest.mark.parametrize("op", [op for op in OPS if "kv_b" in op.arguments], ids=lambda op: op.name)
def test_attention_is_asked_with_packs_caches_and_unequal_dimensions(op):
    drawn = []

    @hypothesis.settings(max_examples=60, database=None)
    @given(op.cases)
    def draw(case):
        heads, keys = case["q_nope"].shape[2], case["latent"].shape[1]
        value = len(case["kv_b"]) // heads - case["q_nope"].shape[3]
        drawn.append((heads, case["q_nope"].shape[1], keys, case["q_nope"].shape[3], case["q_rope"].shape[3], value, case["mask"]))

    draw()
    assert all(nope != rope and nope != value for _, _, _, nope, rope, value, _ in drawn)
    assert any(value > nope + rope for *_, nope, rope, value, _ in drawn)
    assert any(heads == 1 for heads, *_ in drawn) and any(tokens == 1 for _, tokens, *_ in drawn)
    assert any(tokens < keys for _, tokens, keys, *_ in drawn), "no cache"
    assert any((~mask[..., -1, 0]).any() for *_, mask in drawn), "no second document"
