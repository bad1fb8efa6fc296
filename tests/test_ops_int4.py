"""Claims about ops_int4.py: every mistake is caught and named, every right way passes, plain Python agrees.

Run: .venv/bin/python -m pytest tests/test_ops_int4.py
"""

import pytest
import torch
from conftest import assert_close, right_and_wrong
from hypothesis import given, settings

from conformance import check_op, twin
from ops_int4 import OPS, fake_quant, int4_linear, int4_pack, int4_unpack

EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


# Independent versions in plain Python: numbers, hexadecimal digits, no shifts


def plain_pack(weight):
    words, scales = [], []
    for row in weight.tolist():
        for start in range(0, len(row), 32):
            group = row[start : start + 32]
            scale = torch.tensor(max(map(abs, group)) / 7).bfloat16().item()
            digits = [format(round(w / scale) + 8 if scale else 8, "x") for w in group]
            for word in range(0, 32, 8):
                value = int("".join(reversed(digits[word : word + 8])), 16)  # the first input is the last digit
                words.append(value - 2**32 if value >= 2**31 else value)
            scales.append(scale)
    packed = torch.tensor(words, dtype=torch.int32).view(len(weight), -1)
    return packed, torch.tensor(scales).bfloat16().view(len(weight), -1)


def plain_unpack(packed, scale):
    rows = []
    for words, scales in zip(packed.tolist(), scale.tolist()):
        digits = "".join(format(word % 2**32, "08x")[::-1] for word in words)
        rows.append([(int(digit, 16) - 8) * scales[i // 32] for i, digit in enumerate(digits)])
    return torch.tensor(rows)


def plain_fake_quant(weight):
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return plain_unpack(*plain_pack(weight)).to(weight.dtype)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    return Straight.apply(weight)


def plain_linear(x, packed, scale):
    return (x.double() @ plain_unpack(packed, scale).double().T).to(x.dtype)


PLAIN = {"int4_pack": plain_pack, "int4_unpack": plain_unpack, "fake_quant": plain_fake_quant, "int4_linear": plain_linear}


@EACH
def test_plain_python_agrees(op):
    finding = check_op(op, twin(PLAIN[op.name]), op.dtypes, 10)
    assert finding is None, finding.text()


# Worked by hand


def test_a_hand_worked_group():
    """Largest 3.5, so one step is 1/2; the first word holds codes 7, −7, 1, 0, … as digits f, 1, 9, 8, the first one last."""
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([3.5, -3.5, 0.6])
    packed, scale = int4_pack(weight)
    assert scale.tolist() == [[0.5]] and scale.dtype == torch.bfloat16
    assert [word % 2**32 for word in packed[0].tolist()] == [0x8888891F] + [0x88888888] * 3
    assert int4_unpack(packed, scale)[0, :4].tolist() == [3.5, -3.5, 0.5, 0.0]
    assert fake_quant(weight)[0, :4].tolist() == [3.5, -3.5, 0.5, 0.0]
    assert int4_linear(torch.ones(1, 32), packed, scale).item() == 0.5


def test_fake_quant_lets_the_gradient_of_every_weight_pass():
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    fake_quant(weight).backward(upstream := torch.arange(128.0).view(2, 64))
    assert torch.equal(weight.grad, upstream)


# Mistakes and right ways


test_right_implementations_pass_in_every_dtype, test_a_mistake_is_caught_and_named = right_and_wrong(OPS)


# Corners of the inputs


def drawn_weights():
    cases = []
    strategy = next(op.cases for op in OPS if op.name == "int4_pack")
    settings(max_examples=60, database=None)(given(strategy)(lambda case: cases.append(case["weight"])))()
    return cases


def test_no_weight_lies_near_the_edge_between_two_codes():
    """Dividing, or multiplying by a reciprocal, in any dtype: the codes are the same."""
    for weight in drawn_weights():
        codes = int4_pack(weight)[0]
        assert torch.equal(int4_pack(weight * (1 + 1e-4))[0], codes) and torch.equal(int4_pack(weight * (1 - 1e-4))[0], codes)


def test_weights_have_zero_groups_many_groups_and_largest_values_of_either_sign():
    weights = drawn_weights()
    groups = [weight.unflatten(1, (-1, 32)) for weight in weights]
    assert any((g == 0).all(2).any() for g in groups)
    assert any(g.shape[1] > 4 for g in groups), "groups of 128 and whole rows would be the same"
    assert any((g.amax(2) > -g.amin(2)).any() and (g.amax(2) < -g.amin(2)).any() for g in groups)


def test_repacking_returns_every_code():
    for weight in drawn_weights():
        packed, scale = int4_pack(weight)
        again = int4_pack(int4_unpack(packed, scale))
        assert torch.equal(again[0], packed) and torch.equal(again[1], scale)
        assert_close(int4_unpack(*again), fake_quant(weight), 0.0)
