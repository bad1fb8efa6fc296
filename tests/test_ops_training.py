"""Claims about ops_training.py: every mistake is caught and named, every right way passes, NumPy agrees.

Run: .venv/bin/python -m pytest tests/test_ops_training.py
"""

import numpy as np
import pytest
import torch
from conftest import assert_close, right_and_wrong
from hypothesis import given, settings

import adapter
from conformance import check_op
from ops_training import OPS, adamw_update, cross_entropy, muon_update, newton_schulz, qk_clip

EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
BY_NAME = {op.name: op for op in OPS}


# Independent versions, from the formulas


def numpy_cross_entropy(hidden, head, targets):
    losses = []
    for row, target in zip(hidden.astype(np.float64), targets):
        logits = head @ row
        losses.append(0.0 if target == -100 else np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])
    return np.array(losses, dtype=hidden.dtype)


def numpy_cross_entropy_backward(hidden, head, targets, upstream):
    """Rows of softmax minus one-hot, times what comes in: of hidden and of head."""
    logits = hidden.astype(np.float64) @ head.T
    slope = np.exp(logits - logits.max(axis=1, keepdims=True))
    slope /= slope.sum(axis=1, keepdims=True)
    slope[np.arange(len(targets)), np.maximum(targets, 0)] -= 1
    slope *= (upstream * (targets != -100))[:, None]
    return (slope @ head).astype(hidden.dtype), (slope.T @ hidden).astype(head.dtype)


def numpy_newton_schulz(stack, steps):
    """The quintic on the singular values themselves: an SVD instead of matrix products."""
    left, values, right = np.linalg.svd(stack.astype(np.float64), full_matrices=False)
    values = values / (np.sqrt((values**2).sum(axis=1, keepdims=True)) + 1e-7)
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values[:, None] @ right).astype(stack.dtype)


def numpy_muon_update(weight, gradient, momentum, lr, beta, weight_decay):
    momentum = beta * momentum + gradient
    update = numpy_newton_schulz((gradient + beta * momentum)[None], 5)[0]
    shrunk = weight - lr * weight_decay * weight
    return shrunk - lr * 0.2 * max(weight.shape) ** 0.5 * update, momentum


def numpy_adamw_update(weight, gradient, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay):
    """Number by number."""
    new = [np.empty_like(weight) for _ in range(3)]
    for at in np.ndindex(weight.shape):
        mean = beta1 * exp_avg[at] + (1 - beta1) * gradient[at]
        square = beta2 * exp_avg_sq[at] + (1 - beta2) * gradient[at] ** 2
        move = mean / (1 - beta1**step) / (np.sqrt(square / (1 - beta2**step)) + eps)
        new[0][at], new[1][at], new[2][at] = weight[at] - lr * weight_decay * weight[at] - lr * move, mean, square
    return tuple(new)


def numpy_qk_clip(q_b, kv_b, max_logits, tau, nope_dim, rope_dim, value_dim):
    """Row by row."""
    q_b, kv_b = q_b.copy(), kv_b.copy()
    for head, largest in enumerate(max_logits.tolist()):
        gamma = tau / largest if largest > tau else 1.0
        for row in range(nope_dim + rope_dim):
            q_b[head * (nope_dim + rope_dim) + row] *= gamma**0.5 if row < nope_dim else gamma
        for row in range(nope_dim):
            kv_b[head * (nope_dim + value_dim) + row] *= gamma**0.5
    return q_b, kv_b


NUMPY = {
    "cross_entropy": numpy_cross_entropy, "newton_schulz": numpy_newton_schulz, "muon_update": numpy_muon_update,
    "adamw_update": numpy_adamw_update, "qk_clip": numpy_qk_clip,
}  # fmt: skip
BACKWARD = {"cross_entropy": numpy_cross_entropy_backward}


@EACH
def test_numpy_from_the_formulas_agrees(op):
    def caller(op, arguments, cotangents, wanted):
        return adapter.run(NUMPY[op.name], arguments, op.outputs, wanted, cotangents, "numpy", BACKWARD.get(op.name))

    finding = check_op(op, caller, (torch.float64,))
    assert finding is None, finding.text()


# Worked by hand


def test_cross_entropy_of_a_hand_worked_token():
    """Logits 0, ln 2, ln 5 are probabilities 1/8, 2/8, 5/8."""
    head = torch.tensor([1.0, 2.0, 5.0]).double().log()[:, None]
    loss = cross_entropy(torch.ones(3, 1).double(), head, torch.tensor([2, -100, 0]))
    assert_close(loss, torch.tensor([1.6, 1.0, 8.0]).double().log(), 1e-7)


def test_newton_schulz_of_a_hand_worked_stack():
    """(3, 4) has the one singular value 5, normalised to 1: 3.4445 − 4.7750 + 2.0315 = 0.701 of (0.6, 0.8)."""
    stack = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]]).double()
    assert_close(newton_schulz(stack, 1), torch.tensor([[[0.4206, 0.5608]], [[0.0, 0.0]]]).double(), 1e-6)


def test_muon_step_of_a_hand_worked_row():
    """One step of lr 1 on a row: the direction is that of the gradient, of length 0.2 √2 · f(f(f(f(f(1)))))."""
    one = torch.ones(1, 1).double()
    value = newton_schulz(one[None], 5).item()
    gradient, zero = torch.tensor([[3.0, 4.0]]).double(), torch.zeros(1, 2).double()
    weight, momentum = muon_update(torch.ones(1, 2).double(), gradient, zero, 1.0, 0.9, 0.5)
    assert_close(weight, 0.5 - 0.2 * 2**0.5 * value * torch.tensor([[0.6, 0.8]]).double(), 1e-6)
    assert torch.equal(momentum, gradient)


def test_first_adamw_step_moves_by_lr_against_the_sign():
    weight, gradient, zero = torch.ones(1, 2), torch.tensor([[0.5, -20.0]]), torch.zeros(1, 2)
    weight, mean, square = adamw_update(weight, gradient, zero, zero, 1, 0.1, 0.9, 0.95, 1e-8, 0.5)
    assert_close(weight, torch.tensor([[0.85, 1.05]]))
    assert_close(mean, gradient / 10)
    assert_close(square, torch.tensor([[0.0125, 20.0]]))


def test_qk_clip_of_a_hand_worked_head():
    """A largest logit of 400 and τ = 100: γ is 1/4, its root 1/2. The quiet head keeps its bits."""
    q_b, kv_b = qk_clip(torch.ones(4, 1), torch.ones(4, 1), torch.tensor([400.0, 99.0]), 100.0, 1, 1, 1)
    assert q_b.flatten().tolist() == [0.5, 0.25, 1, 1] and kv_b.flatten().tolist() == [0.5, 1, 1, 1]


# Mistakes and right ways


test_right_implementations_pass_in_every_dtype, test_a_mistake_is_caught_and_named = right_and_wrong(OPS)


# Corners of the inputs


def drawn(name):
    cases = []
    settings(max_examples=60, database=None)(given(BY_NAME[name].cases)(lambda case: cases.append(case)))()
    return cases


def test_cross_entropy_is_asked_with_ignored_tokens_and_with_logits_that_overflow():
    cases = drawn("cross_entropy")
    assert any((case["targets"] == -100).any() for case in cases)
    assert any((case["hidden"] @ case["head"].T).max() > 100 for case in cases)
    for case in cases:  # exact in bfloat16: no rounding decides whether an implementation is right
        wide = case["hidden"].bfloat16().double() @ case["head"].bfloat16().double().T
        assert torch.equal(torch.nn.functional.linear(case["hidden"].bfloat16(), case["head"].bfloat16()).double(), wide)


def test_muon_is_asked_with_tall_and_wide_and_newton_schulz_with_zero_matrices():
    shapes = [case["weight"].shape for case in drawn("muon_update")]
    assert any(m > n for m, n in shapes) and any(m < n for m, n in shapes)
    assert any((case["stack"].flatten(1) == 0).all(1).any() for case in drawn("newton_schulz"))


def test_qk_clip_is_asked_with_quiet_heads_beside_loud_ones():
    largest = [case["max_logits"] for case in drawn("qk_clip")]
    assert any((x > 100).any() and (x == -torch.inf).any() for x in largest)
    assert any((x > 100).any() and (x < -1).any() for x in largest)
