"""Claims about ops_experts.py: every mistake is caught and named, every right way passes, NumPy's loops agree.

Run: .venv/bin/python -m pytest tests/test_ops_experts.py
"""

import math

import numpy as np
import pytest
import torch
from conftest import assert_close, right_and_wrong
from hypothesis import given, settings

import adapter
from conformance import check_op
from ops_experts import OPS, balance_bias, balance_loss, experts, load_counts, route, swiglu

EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
BY_NAME = {op.name: op for op in OPS}
F64 = torch.float64


# Independent versions, from the formulas


def numpy_swiglu(x, gate, up, down):
    z = x @ gate.T
    return (z / (1 + np.exp(-z)) * (x @ up.T)) @ down.T


def numpy_route(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
    """One token at a time, ranking by sorted tuples (−value, index)."""
    scores = 1 / (1 + np.exp(-x @ weight.T))
    size = len(weight) // n_group
    best = lambda values, n: [i for _, i in sorted((-value, i) for i, value in enumerate(values))][:n]  # noqa: E731
    index = []
    for row in scores + bias:
        pairs = [np.sort(row[g * size : (g + 1) * size])[-2:].sum() for g in range(n_group)]
        kept = best(pairs, topk_group)
        index.append(best([value if e // size in kept else -np.inf for e, value in enumerate(row)], top_k))
    index = np.array(index) if pinned is None else pinned
    chosen = np.take_along_axis(scores, index, 1)
    return scale * chosen / chosen.sum(1, keepdims=True), index


def numpy_experts(x, weights, index, gate, up, down):
    y = np.zeros_like(x)
    for t, k in np.ndindex(index.shape):
        e = index[t, k]
        y[t] += weights[t, k] * numpy_swiglu(x[t], gate[e], up[e], down[e])
    return y


def numpy_load_counts(index, n_experts, valid):
    counts = np.zeros(n_experts, dtype=np.int64)
    for t, k in np.ndindex(index.shape):
        counts[index[t, k]] += 1 if valid is None else valid[t]
    return counts


def numpy_balance_bias(bias, counts, gamma):
    return np.array([b + gamma * ((c < counts.mean()) - int(c > counts.mean())) for b, c in zip(bias, counts)], dtype=bias.dtype)


def numpy_balance_loss(scores, index, valid):
    losses = []
    for b, (s, i) in enumerate(zip(scores, index)):
        tokens = [t for t in range(len(s)) if valid is None or valid[b, t]]
        if tokens:
            f = [sum(e in i[t] for t in tokens) * s.shape[1] / (i.shape[1] * len(tokens)) for e in range(s.shape[1])]
            p = [np.mean([s[t, e] / s[t].sum() for t in tokens]) for e in range(s.shape[1])]
            losses.append(np.dot(f, p))
    return np.array(np.mean(losses) if losses else 0.0, dtype=scores.dtype)


NUMPY = {
    "swiglu": numpy_swiglu, "route": numpy_route, "experts": numpy_experts, "load_counts": numpy_load_counts,
    "balance_bias": numpy_balance_bias, "balance_loss": numpy_balance_loss,
}  # fmt: skip


@EACH
def test_numpy_from_the_formulas_agrees(op):
    caller = lambda op, arguments, *_: adapter.run(NUMPY[op.name], arguments, op.outputs, arrays="numpy")  # noqa: E731
    finding = check_op(op, caller, (F64,))
    assert finding is None, finding.text()


@pytest.mark.parametrize("name", [op.name for op in OPS if op.differentiable])
def test_gradients_are_those_of_finite_differences(name):
    op = BY_NAME[name]
    for case in drawn(name, 4):
        case = {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in case.items()}
        if "pinned" in case:  # steps must not reroute tokens that tie
            case["pinned"] = route(**case)[1]
        leaves = [case[n].requires_grad_() for n in op.differentiable]

        def values(*leaves, case=case):
            result = op.reference(**case | dict(zip(op.differentiable, leaves)))
            return result[0] if isinstance(result, tuple) else result

        assert torch.autograd.gradcheck(values, leaves)


# Worked by hand


def test_route_of_a_hand_worked_token():
    """Scores 1/2, 3/4, 1/4, 3/4. The bias lifts expert 2 above its betters, and its weight stays 1/4."""
    x, weight = torch.ones(1, 1, dtype=F64), torch.tensor([0.0, 1.0, -1.0, 1.0], dtype=F64)[:, None] * math.log(3)
    bias = torch.tensor([0.0, 0.0, 0.625, 0.0])
    weights, index = route(x, weight, bias, 2, 1, 1, 2.0, None)
    assert index.tolist() == [[2, 1]]  # 0.875, then the first of two at 0.75
    assert_close(weights, torch.tensor([[0.5, 1.5]], dtype=F64))
    weights, index = route(x, weight, bias, 2, 2, 1, 2.0, None)
    assert index.tolist() == [[2, 3]]  # 0.875 + 0.75 beats 0.75 + 0.5
    weights, index = route(x, weight, bias, 2, 1, 1, 2.0, torch.tensor([[0, 1]]))
    assert_close(weights, torch.tensor([[0.8, 1.2]], dtype=F64))


def test_experts_of_a_hand_worked_token():
    """Expert e of one neuron multiplies silu(x) · x by e + 1; experts 0 and 2 with weights 1 and 10 give a factor of 31."""
    ones, x = torch.ones(3, 1, 1), torch.tensor([[2.0]])
    y = experts(x, torch.tensor([[1.0, 10.0]]), torch.tensor([[0, 2]]), ones, ones, torch.tensor([1.0, 2, 3])[:, None, None])
    assert_close(y, torch.tensor([[31 * 4 / (1 + math.exp(-2))]]))
    assert_close(swiglu(x, ones[0], ones[0], ones[0]), y / 31)


def test_balancing_of_a_hand_worked_batch():
    """Three tokens, the last one padding: expert 0 got 2, expert 1 got 1, expert 2 got 1."""
    index, valid = torch.tensor([[0, 1], [2, 0], [2, 1]]), torch.tensor([True, True, False])
    counts = load_counts(index, 3, valid)
    assert counts.tolist() == [2, 1, 1]
    assert_close(balance_bias(torch.ones(3), counts, 0.25), torch.tensor([0.75, 1.25, 1.25]))
    assert_close(balance_bias(torch.ones(3), torch.tensor([4, 2, 0]), 0.25), torch.tensor([0.75, 1.0, 1.25]))


def test_balance_loss_of_a_hand_worked_sequence():
    """f = 3/(2·2) · (2, 1, 1) and P = (1/2, 1/4, 1/4) from two equal tokens; the padding token says otherwise."""
    scores = torch.tensor([[[0.8, 0.4, 0.4], [0.4, 0.2, 0.2], [0.1, 0.1, 0.9]]])
    index, valid = torch.tensor([[[0, 1], [2, 0], [2, 1]]]), torch.tensor([[True, True, False]])
    assert_close(balance_loss(scores, index, valid), torch.tensor(1.125))


# Mistakes and right ways


test_right_implementations_pass_in_every_dtype, test_a_mistake_is_caught_and_named = right_and_wrong(OPS)


# Corners of the inputs


def drawn(name, number=60):
    cases = []
    settings(max_examples=number, database=None)(given(BY_NAME[name].cases)(lambda case: cases.append(case)))()
    return cases


def test_routers_are_asked_with_ties_replays_and_limited_groups():
    cases = drawn("route")
    ties = lambda case: (case["x"] @ case["weight"].T + case["bias"]).round(decimals=4)[0].unique().numel()  # noqa: E731
    assert any(ties(case) < len(case["bias"]) for case in cases)
    assert any(case["pinned"] is not None for case in cases)
    assert any(1 <= case["topk_group"] < case["n_group"] for case in cases)


def test_no_rounding_decides_where_a_token_goes():
    """The choice is the same in three dtypes, so a kernel that sums in another order is never called wrong."""
    for case in drawn("route"):
        choices = [route(**case | {"x": case["x"].to(dtype), "weight": case["weight"].to(dtype)})[1]
                   for dtype in (torch.bfloat16, torch.float32, F64)]  # fmt: skip
        assert torch.equal(choices[0], choices[1]) and torch.equal(choices[1], choices[2])


def test_experts_are_asked_with_experts_that_no_token_chose():
    assert any(case["index"].unique().numel() < len(case["gate"]) for case in drawn("experts"))


def test_balance_loss_is_asked_with_sequences_that_are_all_padding_beside_others():
    masks = [case["valid"] for case in drawn("balance_loss") if case["valid"] is not None]
    assert any(mask.any(1).any() and not mask.any(1).all() for mask in masks)
