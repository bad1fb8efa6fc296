"""Claims about ops_rope.py: every mistake is caught and named, every right way passes, NumPy from the formulas agrees.

Run: .venv/bin/python -m pytest tests/test_ops_rope.py
"""

import math

import hypothesis
import numpy as np
import pytest
import torch
from conftest import right_and_wrong
from hypothesis import given

import adapter
from conformance import check_op
from ops_rope import OPS, softmax_scale

EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


# Independent versions, from the papers: pairs are complex numbers, YaRN counts turns


def numpy_rope(x, cos, sin):
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[:, :, None]
    return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape).astype(x.dtype)


def numpy_rope_half_split(x, cos, sin):
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)[:, :, None]
    return np.concatenate((turned.real, turned.imag), axis=-1).astype(x.dtype)


def numpy_rope_permutation(rope_dim):
    return np.array(sorted(range(rope_dim), key=lambda i: (i % 2, i)))


def numpy_yarn_frequencies(rope_dim, theta, factor, original_length, beta_fast, beta_slow):
    base = np.array([theta ** (-2 * i / rope_dim) for i in range(rope_dim // 2)])
    # the index at which a frequency makes so many turns: original_length · θ^(−2i/P) = 2π · turns
    fast, slow = (math.log(original_length / (2 * math.pi * t), theta) * rope_dim / 2 for t in (beta_fast, beta_slow))
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), rope_dim - 1)
    kept = 1 - np.interp(np.arange(rope_dim // 2), [low, max(high, low + 0.001)], [0, 1]) * (factor > 1)
    return base * (kept + (1 - kept) / factor)


def numpy_rope_table(positions, rope_dim, theta, factor, original_length, beta_fast, beta_slow, mscale, mscale_all_dim):
    frequencies = numpy_yarn_frequencies(rope_dim, theta, factor, original_length, beta_fast, beta_slow)
    growth = math.log(max(factor, 1)) / 10
    turned = np.exp(1j * positions[..., None] * frequencies) * (1 + mscale * growth) / (1 + mscale_all_dim * growth)
    return turned.real.astype(np.float32), turned.imag.astype(np.float32)


def numpy_softmax_scale(nope_dim, rope_dim, factor, mscale, mscale_all_dim):
    return (1 + mscale_all_dim * math.log(max(factor, 1)) / 10) ** 2 / math.sqrt(nope_dim + rope_dim)


@EACH
def test_numpy_from_the_formulas_agrees(op):
    function = globals()[f"numpy_{op.name}"]
    caller = lambda op, arguments, *_: adapter.run(function, arguments, op.outputs, arrays="numpy")  # noqa: E731
    for dtype in {torch.float32, *op.dtypes} - {torch.bfloat16}:
        finding = check_op(op, caller, (dtype,))
        assert finding is None, finding.text()


def test_the_released_softmax_scale():
    assert f"{softmax_scale(128, 64, 64.0, 1.0, 1.0):.6f}" == "0.144680"


test_right_implementations_pass_in_every_dtype, test_a_mistake_is_caught_and_named = right_and_wrong(OPS)


def test_tables_are_asked_beyond_the_original_length_and_for_packed_documents():
    """Position 0 hides nearly every mistake."""
    drawn = []

    @hypothesis.settings(max_examples=50, database=None)
    @given(next(op for op in OPS if op.name == "rope_table").cases)
    def draw(case):
        drawn.append(case)

    draw()
    assert any((case["positions"] >= case["original_length"]).any() for case in drawn)
    assert any((case["positions"].diff() < 0).any() for case in drawn), "no document restarts"
    assert any(len(case["positions"].unique(dim=0)) > 1 for case in drawn), "all rows alike"
