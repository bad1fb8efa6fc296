"""Claims about moe.py: routing, experts, balancing, int4. Numbers after `bug` are those of the public bug list.

Run: .venv/bin/python -m pytest tests/test_moe.py
"""

import copy
import math
import re

import numpy as np
import pytest
import torch
from conftest import assert_close
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import moe
from moe import (
    MLP, Experts, MoE, MoEError, Router, balance_bias_, experts_fused, experts_reference, fake_quant, int4_pack,
    int4_unpack, is_int4_expert, load_counts, load_cv, normal_init_, route_fused, route_reference,
    sequence_balance_loss_fused, sequence_balance_loss_reference, swiglu,
)  # fmt: skip

ROUTERS = pytest.mark.parametrize("route", [route_reference, route_fused])
EXPERTS = pytest.mark.parametrize("experts", [experts_reference, experts_fused])
LOSSES = pytest.mark.parametrize("loss", [sequence_balance_loss_reference, sequence_balance_loss_fused])
IMPLS = pytest.mark.parametrize("impl", ["reference", "fused"])


@st.composite
def router_cases(draw):
    """Router inputs by construction: E = n_group * size, K no more than the kept groups hold, T from 0."""
    n_group, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, topk_group * size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens, hidden, n_experts = draw(st.integers(0, 6)), draw(st.integers(1, 9)), n_group * size
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weight = torch.randn(n_experts, hidden, generator=generator, dtype=torch.float64)
    bias = draw(st.sampled_from([0.1, 1.0, 10.0])) * torch.randn(n_experts, generator=generator)
    settings = dict(top_k=top_k, n_group=n_group, topk_group=topk_group, scale=draw(st.sampled_from([1.0, 2.827])))
    return x, weight, bias, settings | {"normalize": draw(st.booleans())}


@st.composite
def expert_cases(draw, widths=st.integers(1, 9)):
    """Expert inputs in float64: few tokens for many experts, so some experts are empty; T from 0, odd widths."""
    tokens, n_experts = draw(st.integers(0, 7)), draw(st.integers(1, 6))
    top_k, hidden, width = draw(st.integers(1, n_experts)), draw(widths), draw(widths)
    return expert_inputs(draw(st.integers(0, 2**31)), tokens, n_experts, top_k, hidden, width)


def expert_inputs(seed, T, E, K, C, F):
    """x, weights, index, gate, up, down in float64."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    shapes = (T, C), (T, K), (E, F, C), (E, F, C), (E, C, F)
    x, weights, *matrices = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, weights, index, *(matrix / math.sqrt(matrix.shape[2]) for matrix in matrices)


def gradients(function, *inputs):
    """Gradients of a fixed random projection of function's result, for each input."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.autograd.grad(result, leaves, direction.to(result))


# Independent NumPy versions, float64, written from the formulas


def numpy_route(x, weight, bias, top_k, n_group, topk_group, scale, normalize):
    scores = 1 / (1 + np.exp(-x @ weight.T))
    biased = scores + bias
    index = []
    for row in biased:
        by_group = row.reshape(n_group, -1)
        group_score = np.sort(by_group)[:, ::-1][:, :2].sum(1)
        kept = np.argsort(-group_score, kind="stable")[:topk_group]
        masked = np.full_like(by_group, -np.inf)
        masked[kept] = by_group[kept]
        index.append(np.argsort(-masked.reshape(-1), kind="stable")[:top_k])
    index = np.array(index, dtype=np.int64).reshape(len(x), top_k)
    weights = np.take_along_axis(scores, index, 1)
    if normalize:
        weights = weights / weights.sum(1, keepdims=True)
    return scale * weights, index, scores


def numpy_experts(x, weights, index, gate, up, down):
    y = np.zeros_like(x)
    for t in range(index.shape[0]):
        for k in range(index.shape[1]):
            e = index[t, k]
            g = gate[e] @ x[t]
            y[t] += weights[t, k] * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ x[t])))
    return y


def numpy_balance_loss(scores, index, valid):
    losses = []
    for s, i, v in zip(scores, index, valid):
        s, i = s[v], i[v]
        if len(s):
            chosen = np.bincount(i.reshape(-1), minlength=s.shape[1])
            f = s.shape[1] / (i.shape[1] * len(s)) * chosen
            losses.append(f @ (s / s.sum(1, keepdims=True)).mean(0))
    return np.mean(losses) if losses else 0.0


# Router


@ROUTERS
@given(case=router_cases())
def test_router_follows_the_formula_in_numpy(route, case):
    x, weight, bias, settings = case
    routing = route(x, weight, bias, **settings)
    weights, index, scores = numpy_route(x.numpy(), weight.numpy(), bias.double().numpy(), **settings)
    assert routing.index.tolist() == index.tolist()
    assert_close(routing.weights, weights, what="weights")
    assert_close(routing.scores, scores, what="scores")
    assert routing.weights.dtype == routing.scores.dtype == torch.float64 and routing.index.dtype == torch.int64


@given(case=router_cases(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_router_twins_agree_forward_and_backward(case, dtype):
    x, weight, bias, settings = case
    x, weight = x.to(dtype), weight.to(dtype)
    reference, fused = (route(x, weight, bias, **settings) for route in (route_reference, route_fused))
    assert torch.equal(reference.index, fused.index)
    assert reference.weights.dtype == fused.weights.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(fused.weights, reference.weights, what="weights")
    assert_close(fused.scores, reference.scores, what="scores")
    both = [
        gradients(lambda x, weight: route(x, weight, bias, **settings).weights, x, weight)
        for route in (route_reference, route_fused)
    ]
    for name, actual, expected in zip(("x", "weight"), both[1], both[0]):
        assert_close(actual, expected, what=f"gradient of {name}")


@ROUTERS
def test_router_weights_of_a_hand_worked_token(route):
    """Scores 1/2, 3/4, 1/4, 3/4 by logits 0, ln 3, -ln 3, ln 3; the bias lifts expert 2 over expert 3's tie."""
    weight = torch.tensor([[0.0], [math.log(3)], [-math.log(3)], [math.log(3)]], dtype=torch.float64)
    x, bias = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0.0, 0.0, 0.625, 0.0])
    routing = route(x, weight, bias, top_k=2, scale=2.0)
    assert routing.index.tolist() == [[2, 1]]  # 0.875 before 0.75; expert 1 before expert 3
    assert_close(routing.weights, [[0.5, 1.5]], 1e-12)  # 2 * (1/4, 3/4) / 1: without the bias


@ROUTERS
def test_bug10_bias_changes_selection_not_weights(route):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    plain = route(x, weight, torch.zeros(6), top_k=2)
    bias = torch.zeros(6)
    bias[5] = 100.0
    biased = route(x, weight, bias, top_k=2)
    assert (biased.index[:, 0] == 5).all() and not torch.equal(biased.index, plain.index)
    assert torch.equal(biased.scores, plain.scores)
    expected = plain.scores.gather(1, biased.index)
    assert_close(biased.weights, expected / expected.sum(1, keepdim=True), what="weights")
    shifted = route(x, weight, torch.full((6,), 3.0), top_k=2)  # the same for all: nothing changes
    assert torch.equal(shifted.index, plain.index) and torch.equal(shifted.weights, plain.weights)


@ROUTERS
def test_bug11_masked_groups_lose_to_negative_scores(route):
    """All biased scores are negative: a mask of 0 instead of -inf would win against the kept group."""
    weight, bias = torch.zeros(4, 2), torch.tensor([-2.0, -2.5, -3.0, -3.5])
    routing = route(torch.ones(1, 2), weight, bias, top_k=2, n_group=2, topk_group=1)
    assert routing.index.tolist() == [[0, 1]]


@ROUTERS
def test_group_score_is_the_sum_of_the_two_best(route):
    """Group 0 has the best single expert, group 1 the better pair, group 2 the best sum of all three."""
    bias = torch.tensor([9.0, 0.0, 0.0, 6.0, 5.0, 0.0, 4.0, 4.0, 4.0])
    routing = route(torch.ones(1, 2), torch.zeros(9, 2), bias, top_k=3, n_group=3, topk_group=1)
    assert routing.index.tolist() == [[3, 4, 5]]
    routing = route(torch.ones(1, 2), torch.zeros(9, 2), bias, top_k=3, n_group=3, topk_group=2)
    assert routing.index.tolist() == [[0, 3, 4]]


@ROUTERS
def test_bug18_ties_go_to_the_lower_index(route):
    """384 bf16 experts of which all, or two halves, tie; and groups that tie."""
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    flat = route(x, torch.zeros(384, 4, dtype=torch.bfloat16), torch.zeros(384), top_k=8)
    assert flat.index.tolist() == [list(range(8))] * 3
    halves = torch.zeros(384)
    halves[200:204] = halves[380:] = 1.0
    two = route(x, torch.zeros(384, 4, dtype=torch.bfloat16), halves, top_k=10)
    assert two.index.tolist() == [[200, 201, 202, 203, 380, 381, 382, 383, 0, 1]] * 3
    grouped = route(x, torch.zeros(8, 4, dtype=torch.bfloat16), torch.zeros(8), 4, n_group=4, topk_group=2)
    assert grouped.index.tolist() == [[0, 1, 2, 3]] * 3


@given(st.integers(0, 2**31), st.integers(1, 12))
def test_bug18_router_twins_agree_among_many_ties(seed, top_k):
    """Scores of three values only, so that nearly every choice is a tie."""
    torch.manual_seed(seed)
    x, weight, bias = torch.randint(-1, 2, (6, 1)).float(), torch.ones(24, 1), torch.randint(0, 2, (24,)).float()
    settings = dict(top_k=top_k, n_group=4, topk_group=2)
    assert torch.equal(
        route_reference(x, weight, bias, **settings).index, route_fused(x, weight, bias, **settings).index
    )


@IMPLS
def test_bug21_forward_twice_is_identical_despite_ties(impl):
    torch.manual_seed(0)
    layer = MoE(8, 4, 16, 3, impl=impl)
    layer.gate.weight.data.round_()  # all zero: every expert ties
    x = torch.randn(2, 5, 8)
    (first, first_stats), (second, second_stats) = layer(x), layer(x)
    assert torch.equal(first, second) and torch.equal(first_stats.counts, second_stats.counts)
    assert torch.equal(first_stats.counts, torch.tensor([10, 10, 10] + [0] * 13))


@ROUTERS
def test_bug22_pinned_experts_keep_the_router_gradient(route):
    """A drifted replay: the pinned experts are not the router's choice, the weights are still its scores."""
    torch.manual_seed(0)
    x, bias = torch.randn(5, 8, dtype=torch.float64), torch.zeros(6)
    weight = torch.randn(6, 8, dtype=torch.float64)
    pinned = route(x, weight, bias, top_k=6).index[:, 3:].contiguous()  # the three worst
    routing = route(x, weight, bias, top_k=3, pinned=pinned)
    assert torch.equal(routing.index, pinned)

    def by_hand(x, weight):
        chosen = torch.stack([torch.sigmoid(weight[pinned[t]] @ x[t]) for t in range(5)])
        return chosen / chosen.sum(1, keepdim=True)

    assert_close(routing.weights, by_hand(x, weight), what="weights")
    actual = gradients(lambda x, weight: route(x, weight, bias, 3, pinned=pinned).weights, x, weight)
    for got, expected in zip(actual, gradients(by_hand, x, weight)):
        assert got.abs().max() > 1e-3
        assert_close(got, expected, what="gradient")


@ROUTERS
def test_pinning_the_own_choice_changes_nothing(route):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
    own = route(x, weight, bias, top_k=3)
    pinned = route(x, weight, bias, top_k=3, pinned=own.index)
    assert torch.equal(own.weights, pinned.weights) and torch.equal(own.index, pinned.index)


@ROUTERS
def test_router_computes_in_float32_for_bf16_tokens(route):
    torch.manual_seed(0)
    x, weight = torch.randn(9, 16).bfloat16(), torch.randn(12, 16).bfloat16()
    routing = route(x, weight, torch.zeros(12), top_k=4)
    exact = torch.sigmoid(x.double() @ weight.double().T)
    assert_close(routing.scores, exact, 1e-6, "scores")


@IMPLS
def test_router_stays_in_float32_under_autocast(impl):
    torch.manual_seed(0)
    router, x = Router(16, 12, 4, impl=impl), torch.randn(9, 16)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x).scores, plain.scores)


@ROUTERS
def test_bug19_one_normalized_choice_gives_no_router_gradient(route):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 8), torch.randn(5, 8), torch.zeros(5)
    for top_k, normalize, learns in ((1, True, False), (1, False, True), (2, True, True)):
        _, grad = gradients(lambda x, w: route(x, w, bias, top_k, normalize=normalize).weights, x, weight)
        assert (grad.abs().max() > 1e-4) == learns


def test_bug19_moe_refuses_one_normalized_choice():
    with pytest.raises(MoEError, match="top_k >= 2"):
        MoE(8, 4, 6, top_k=1)
    MoE(8, 4, 6, top_k=1, normalize=False)


@ROUTERS
def test_router_names_what_is_wrong(route):
    x, weight, bias = torch.zeros(2, 3), torch.zeros(6, 3), torch.zeros(6)
    for message, change in {
        "n_group 4 does not divide 6": dict(n_group=4),
        "topk_group 3 is outside 1..n_group": dict(n_group=2, topk_group=3),
        "top_k 4 is outside 1..3": dict(top_k=4, n_group=2, topk_group=1),
        "top_k 0 is outside": dict(top_k=0),
        "x (2, 4)": dict(x=torch.zeros(2, 4)),
        "bias (5,)": dict(bias=torch.zeros(5)),
        "pinned is torch.int32": dict(pinned=torch.zeros(2, 2, dtype=torch.int32)),
        "should be torch.int64 (2, 2)": dict(pinned=torch.zeros(1, 2, dtype=torch.int64)),
        "expert outside 0..5": dict(pinned=torch.full((2, 2), 6)),
    }.items():
        with pytest.raises(MoEError, match=re.escape(message)):
            route(**(dict(x=x, weight=weight, bias=bias, top_k=2) | change))


# The router's bias


def large_offset_bias():
    """238 biases around 7.5 with a spread of 0.01, as in a trained checkpoint: eight values are left in bf16."""
    return 7.5 + torch.arange(238) * (0.01 / 238)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_bug12_bias_stays_float32_whatever_the_model(cast):
    router = Router(4, 238, 8)
    router.e_score_correction_bias.copy_(large_offset_bias())
    assert large_offset_bias().unique().numel() == 238 and large_offset_bias().bfloat16().unique().numel() < 10
    nested = torch.nn.Sequential(torch.nn.Sequential(router)).to(cast)
    assert router.weight.dtype == cast and nested[0][0] is router
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, large_offset_bias())
    nested.to("cpu", cast).float().half()
    assert torch.equal(nested.state_dict()["0.0.e_score_correction_bias"], large_offset_bias())


def test_bug12_casting_the_model_reroutes_no_token():
    torch.manual_seed(0)
    router, x = Router(16, 238, 8), torch.randn(64, 16).bfloat16()
    router.weight.data = router.weight.data.bfloat16().float()
    router.e_score_correction_bias.copy_(large_offset_bias())
    before = router(x).index
    after = router.bfloat16()(x).index
    assert torch.equal(before, after)


def test_bias_moves_between_devices_and_materialises_as_zeros():
    with torch.device("meta"):
        router = Router(4, 6, 2)
    assert router.e_score_correction_bias.is_meta and router.e_score_correction_bias.dtype == torch.float32
    router.to_empty(device="cpu").bfloat16()
    assert torch.equal(router.e_score_correction_bias, torch.zeros(6))
    assert Router(4, 6, 2).to("meta").e_score_correction_bias.is_meta
    assert copy.deepcopy(router).e_score_correction_bias is not router.e_score_correction_bias


@given(st.integers(0, 2**31), st.integers(1, 9))
def test_bias_rises_for_idle_experts_and_falls_for_busy_ones(seed, n_experts):
    counts = torch.randint(0, 9, (n_experts,), generator=torch.Generator().manual_seed(seed))
    bias = balance_bias_(torch.zeros(n_experts), counts, 0.5)
    assert bias.tolist() == (0.5 * np.sign(counts.double().mean().item() - counts.numpy())).tolist()


def test_bias_update_compares_integers_exactly():
    """Loads beyond float32's integers: a float mean would call 2**25 + 1 equal to 2**25."""
    bias = balance_bias_(torch.zeros(2), torch.tensor([2**25, 2**25 + 1]), 1.0)
    assert bias.tolist() == [1.0, -1.0]


def test_bug13_bias_after_many_steps_is_exact_in_a_bf16_model():
    layer = MoE(8, 4, 4, 2).bfloat16()
    bias, gamma, steps = layer.gate.e_score_correction_bias, 2.0**-10, 3000
    bias += 4.0  # bf16 cannot add 2**-10 to this
    for _ in range(steps):
        assert balance_bias_(bias, torch.tensor([9, 3, 6, 6]), gamma) is bias
    assert bias.tolist() == [4 - steps * gamma, 4 + steps * gamma, 4.0, 4.0]


def test_bug13_bias_refuses_rounded_or_fractional_input():
    with pytest.raises(MoEError, match="torch.bfloat16"):
        balance_bias_(torch.zeros(2, dtype=torch.bfloat16), torch.tensor([1, 2]), 0.1)
    with pytest.raises(MoEError, match="should be integers"):
        balance_bias_(torch.zeros(2), torch.tensor([0.5, 0.5]), 0.1)
    with pytest.raises(MoEError, match=r"should be integers \(2,\)"):
        balance_bias_(torch.zeros(2), torch.tensor([1, 2, 3]), 0.1)


@IMPLS
def test_bug14_checkpointing_changes_neither_counts_nor_gradients(impl):
    torch.manual_seed(0)
    layer, x = MoE(8, 4, 6, 2, impl=impl), torch.randn(2, 5, 8)
    results = []
    for recompute in (False, True):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y, stats = checkpoint(layer, leaf, use_reentrant=False) if recompute else layer(leaf)
        (y.square().sum() + stats.balance_loss).backward()
        balance = balance_bias_(torch.zeros(6), stats.counts, 0.001)
        grads = [leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())]
        results.append([y, stats.counts, stats.balance_loss, balance, *grads])
    for off, on in zip(*results):
        assert torch.equal(off, on)
    assert results[0][1].sum() == 2 * 5 * 2


@IMPLS
def test_bug15_forward_changes_no_buffer(impl):
    torch.manual_seed(0)
    layer = MoE(8, 4, 6, 2, impl=impl)
    before = copy.deepcopy(layer.state_dict())
    for training in (True, False):
        layer.train(training)(torch.randn(2, 5, 8))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_bug16_accumulation_of_four_equals_one_batch():
    torch.manual_seed(0)
    layer, x, valid = MoE(8, 4, 6, 2), torch.randn(4, 7, 8), torch.rand(4, 7) > 0.3
    whole = layer(x, valid)[1].counts
    parts = [layer(x[b : b + 1], valid[b : b + 1])[1].counts for b in range(4)]
    assert torch.equal(sum(parts), whole)
    once = balance_bias_(torch.zeros(6), sum(parts), 0.1)
    each = torch.zeros(6)
    for counts in parts:
        balance_bias_(each, counts, 0.1)
    assert torch.equal(once, balance_bias_(torch.zeros(6), whole, 0.1)) and not torch.equal(once, each)


def test_bug17_layers_balance_independently_in_a_mixed_stack():
    """Dense layers have nothing to balance, a layer that saw only padding stays; the ones behind it still move."""
    torch.manual_seed(0)
    x, nothing = torch.randn(1, 9, 8), torch.zeros(1, 9, dtype=torch.bool)
    stack = [MLP(8, 4), MoE(8, 4, 6, 2), MoE(8, 4, 6, 2), MLP(8, 4), MoE(8, 4, 6, 2)]
    for layer, valid in zip(stack, (None, None, nothing, None, None)):
        if isinstance(layer, MLP):
            x = x + layer(x)
            continue
        y, stats = layer(x, valid)
        balance_bias_(layer.gate.e_score_correction_bias, stats.counts, 0.1)
        x = x + y
    moved = [layer.gate.e_score_correction_bias.abs().max() > 0 for layer in stack if isinstance(layer, MoE)]
    assert moved == [True, False, True]


def test_balancing_evens_out_a_skewed_router():
    """The sign of the update is right: repeated updates bring the coefficient of variation down."""
    torch.manual_seed(0)
    layer, x = MoE(16, 4, 8, 2), torch.randn(4, 64, 16)
    layer.gate.weight.data.normal_()
    layer.gate.e_score_correction_bias[0] = 1.0  # everyone wants expert 0
    first = load_cv(layer(x)[1].counts)
    for _ in range(300):
        balance_bias_(layer.gate.e_score_correction_bias, layer(x)[1].counts, 0.01)
    assert first > 0.5 and load_cv(layer(x)[1].counts) < 0.15


# Experts


@EXPERTS
@given(case=expert_cases())
def test_experts_follow_the_formula_in_numpy(experts, case):
    assert_close(experts(*case), numpy_experts(*(tensor.numpy() for tensor in case)), what="y")


@given(case=expert_cases(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_experts_twins_agree_forward_and_backward(case, dtype):
    check_expert_twins(case, dtype)


@given(case=expert_cases(widths=st.sampled_from([8, 16, 24])), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_experts_twins_agree_where_grouped_gemm_runs(case, dtype):
    check_expert_twins(case, dtype)


def check_expert_twins(case, dtype, device="cpu"):
    """Forward and every gradient of the two twins, for one case, in one dtype."""
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, weights, index, *matrices = (t.to(device) for t in case)
    x, weights, matrices = x.to(dtype), weights.to(weights_dtype), [m.to(dtype) for m in matrices]
    forward, backward = [], []
    for experts in (experts_reference, experts_fused):
        run = lambda x, weights, *matrices: experts(x, weights, index, *matrices)  # noqa: E731
        forward.append(run(x, weights, *matrices))
        backward.append(gradients(run, x, weights, *matrices) if len(x) else [])
    assert forward[1].dtype == dtype
    assert_close(forward[1], forward[0], dtype, "y")
    for name, expected, actual in zip(("x", "weights", "gate", "up", "down"), *backward):
        assert_close(actual, expected, dtype, f"gradient of {name}")


@EXPERTS
@pytest.mark.parametrize("widths", [(8, 16), (7, 5), (1, 1)])
def test_experts_accept_an_expanded_gradient(experts, widths):
    """The gradient of sum() is one number with stride 0; grouped_mm's own backward refuses such a tensor."""
    x, weights, index, *matrices = expert_inputs(0, 6, 4, 2, *widths)
    leaves = [tensor.float().requires_grad_() for tensor in (x, weights, *matrices)]
    y = experts(leaves[0], leaves[1], index, *leaves[2:])
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    y.sum().backward()
    for leaf, grad in zip(leaves, expected):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(16, 8), (7, 16), (16, 7), (4, 12)])
def test_experts_of_widths_grouped_gemm_refuses_still_work(widths, dtype):
    """grouped_mm needs rows at multiples of 16 bytes, forward and backward: other widths take the segment loop."""
    check_expert_twins(expert_inputs(1, 9, 5, 2, *widths), dtype)


def test_grouped_gemm_is_what_runs_by_default(monkeypatch):
    calls = []
    eager = moe._grouped_mm_eager
    monkeypatch.setattr(moe, "_grouped_mm_eager", lambda *a, **k: calls.append(1) or eager(*a, **k))
    x, weights, index, *matrices = (t.float() if t.is_floating_point() else t for t in expert_inputs(0, 6, 4, 2, 8, 16))
    experts_fused(x, weights, index, *matrices)
    assert len(calls) == 3


def test_answering_on_the_cpu_works_with_the_chosen_experts_only(monkeypatch):
    """Without gradients no grouped GEMM walks over all experts: same values, and nothing of expert 1 is read."""
    monkeypatch.setattr(moe, "_grouped_mm_eager", None)
    x, weights, index, *matrices = (t.float() if t.is_floating_point() else t for t in expert_inputs(0, 5, 3, 1, 8, 16))
    index = torch.tensor([[0], [2], [0], [2], [2]])
    for matrix in matrices:
        matrix[1] = float("nan")
    with torch.no_grad():
        actual = experts_fused(x, weights, index, *matrices)
        assert_close(actual, experts_reference(x, weights, index, *matrices), what="y")
        assert experts_fused(x[:0], weights[:0], index[:0], *matrices).shape == (0, 8)


def test_experts_fused_gradients_match_finite_differences():
    x, weights, index, *matrices = expert_inputs(2, 3, 3, 2, 3, 2)
    leaves = [tensor.requires_grad_() for tensor in (x, weights, *matrices)]
    run = lambda x, weights, *matrices: experts_fused(x, weights, index, *matrices)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@EXPERTS
def test_unchosen_experts_get_zero_gradient_and_cost_nothing(experts):
    """Expert 1 is empty and full of NaN: neither the output nor another gradient may see it."""
    x, weights, index, *matrices = (t.float() if t.is_floating_point() else t for t in expert_inputs(0, 5, 3, 1, 8, 8))
    index = torch.tensor([[0], [2], [0], [2], [2]])
    for matrix in matrices:
        matrix[1] = float("nan")
    leaves = [tensor.requires_grad_() for tensor in (x, weights, *matrices)]
    y = experts(leaves[0], leaves[1], index, *leaves[2:])
    y.square().sum().backward()
    assert y.isfinite().all() and all(leaf.grad.isfinite().all() for leaf in leaves)
    assert all((matrix.grad[1] == 0).all() and matrix.grad[0].abs().max() > 0 for matrix in matrices)


@EXPERTS
def test_one_expert_with_weight_one_is_a_plain_mlp(experts):
    x, _, _, gate, up, down = expert_inputs(0, 5, 1, 1, 6, 4)
    y = experts(x, torch.ones(5, 1, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.int64), gate, up, down)
    assert_close(y, swiglu(x, gate[0], up[0], down[0]), what="y")


@EXPERTS
def test_experts_treat_tokens_one_by_one(experts):
    """Permuted tokens give permuted outputs; the order of the choices does not matter."""
    x, weights, index, *matrices = expert_inputs(3, 7, 5, 3, 6, 4)
    y = experts(x, weights, index, *matrices)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert_close(experts(x[order], weights[order], index[order], *matrices), y[order], what="permuted tokens")
    assert_close(experts(x, weights.flip(1), index.flip(1), *matrices), y, what="permuted choices")


@EXPERTS
def test_experts_repeat_bitwise(experts):
    """Output and gradients are the same at each run: no sum has a free order."""
    x, weights, index, *matrices = expert_inputs(4, 64, 8, 3, 16, 8)
    x, weights, matrices = x.float(), weights.float(), [matrix.float() for matrix in matrices]
    run = lambda x, weights, *matrices: experts(x, weights, index, *matrices)  # noqa: E731
    assert torch.equal(run(x, weights, *matrices), run(x, weights, *matrices))
    for first, second in zip(*(gradients(run, x, weights, *matrices) for _ in range(2))):
        assert torch.equal(first, second)


@EXPERTS
def test_experts_name_what_is_wrong(experts):
    good = dict(zip(("x", "weights", "index", "gate", "up", "down"), expert_inputs(0, 4, 3, 2, 6, 5)))
    for name, value in (("x", torch.zeros(4, 7)), ("weights", torch.zeros(4, 3)), ("down", torch.zeros(3, 5, 6))):
        with pytest.raises(MoEError, match=f"experts: {name} is"):
            experts(**(good | {name: value}))


# Load and balance loss


@given(st.integers(0, 2**31), st.integers(0, 7), st.integers(1, 6), st.booleans())
def test_counts_are_a_histogram_of_valid_choices(seed, tokens, n_experts, padded):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, n_experts, (2, tokens, 3), generator=generator)
    valid = torch.rand(2, tokens, generator=generator) > 0.5 if padded else None
    counts = load_counts(index, n_experts, valid)
    kept = index if valid is None else index[valid]
    assert counts.dtype == torch.int64
    assert counts.tolist() == np.bincount(kept.numpy().reshape(-1), minlength=n_experts).tolist()


def test_load_cv_is_standard_deviation_over_mean():
    counts = torch.tensor([[1, 3], [5, 5], [0, 0], [0, 8]])
    assert_close(load_cv(counts), [0.5, 0.0, 0.0, 1.0], 1e-6)


@st.composite
def balance_cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    B, T, E = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    scores = torch.rand(B, T, E, generator=generator, dtype=torch.float64) + 0.01
    index = torch.rand(B, T, E, generator=generator).argsort(2)[:, :, : draw(st.integers(1, E))]
    return scores, index, torch.rand(B, T, generator=generator) > draw(st.sampled_from([-1.0, 0.3, 0.8, 2.0]))


@LOSSES
@given(case=balance_cases())
def test_balance_loss_follows_the_formula_in_numpy(loss, case):
    scores, index, valid = case
    assert_close(loss(scores, index, valid), numpy_balance_loss(*(t.numpy() for t in case)), 1e-12, "loss")


@given(case=balance_cases(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_balance_loss_twins_agree_forward_and_backward(case, dtype):
    scores, index, valid = case
    scores = scores.to(dtype)
    reference, fused = sequence_balance_loss_reference, sequence_balance_loss_fused
    assert fused(scores, index, valid).dtype == dtype
    assert_close(fused(scores, index, valid), reference(scores, index, valid), what="loss")
    (actual,) = gradients(lambda s: fused(s, index, valid), scores)
    (expected,) = gradients(lambda s: reference(s, index, valid), scores)
    assert_close(actual, expected, what="gradient of scores")
    assert (actual[~valid] == 0).all()


@LOSSES
def test_balance_loss_of_a_hand_worked_sequence(loss):
    """Two tokens, E = 2, K = 1, both choose expert 0: f = (2, 0), P = mean of (3/4, 1/2) for expert 0 = 5/8."""
    scores = torch.tensor([[[0.6, 0.2], [0.3, 0.3]]], dtype=torch.float64)
    assert_close(loss(scores, torch.zeros(1, 2, 1, dtype=torch.int64)), 1.25, 1e-12)


@LOSSES
def test_balance_loss_is_one_when_even_and_grows_when_skewed(loss):
    even = torch.full((1, 4, 4), 0.5)
    index = torch.tensor([[[0, 1], [2, 3], [1, 2], [3, 0]]])
    assert_close(loss(even, index), 1.0, 1e-6)
    skewed = even.clone()
    skewed[..., 0] = 1.0
    assert loss(skewed, torch.zeros_like(index[..., :1])) > 1.5


@LOSSES
def test_balance_loss_is_per_sequence_not_per_batch(loss):
    """Each sequence loads one expert only; the batch as a whole is even."""
    scores = torch.tensor([[[0.9, 0.1]] * 3, [[0.1, 0.9]] * 3])
    index = torch.tensor([[[0]] * 3, [[1]] * 3])
    assert_close(loss(scores, index), 1.8, 1e-6)
    assert_close(loss(scores.flatten(0, 1)[None], index.flatten(0, 1)[None]), 1.0, 1e-6)


@LOSSES
def test_balance_loss_ignores_padding(loss):
    torch.manual_seed(0)
    scores, index = torch.rand(1, 3, 4), torch.tensor([[[0, 1], [1, 2], [3, 0]]])
    padded_scores = torch.cat([scores, torch.full((1, 2, 4), float("nan"))], 1)
    padded_index = torch.cat([index, torch.zeros(1, 2, 2, dtype=torch.int64)], 1)
    valid = torch.tensor([[True, True, True, False, False]])
    assert_close(loss(padded_scores, padded_index, valid), loss(scores, index), 1e-6)
    empty = torch.rand(1, 5, 4)
    with_empty = torch.cat([torch.cat([scores, empty[:, :2]], 1), empty])
    valid = torch.cat([valid, torch.zeros(1, 5, dtype=torch.bool)])
    assert_close(loss(with_empty, padded_index.expand(2, -1, -1), valid), loss(scores, index), 1e-6)


# Modules


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2), st.booleans())
def test_moe_twins_agree_forward_and_backward(seed, B, T, n_shared, padded):
    torch.manual_seed(seed)
    settings = dict(n_group=2, topk_group=1, scale=2.827, n_shared=n_shared)
    reference = MoE(7, 5, 6, 2, impl="reference", **settings).double()
    fused = MoE(7, 5, 6, 2, impl="fused", **settings).double()
    reference.gate.weight.data.normal_()
    reference.gate.e_score_correction_bias.normal_()
    fused.load_state_dict(reference.state_dict())
    x = torch.randn(B, T, 7, dtype=torch.float64)
    valid = torch.rand(B, T) > 0.3 if padded else None
    results = []
    for layer in (reference, fused):
        leaf = x.clone().requires_grad_()
        y, stats = layer(leaf, valid)
        grads = torch.autograd.grad(y.square().sum() + stats.balance_loss, [leaf, *layer.parameters()])
        results.append((stats.counts, y, stats.balance_loss, *grads))
    assert torch.equal(results[0][0], results[1][0])
    for expected, actual in zip(*results):
        assert_close(actual, expected, what="y, loss or gradient")


def test_moe_is_routed_experts_plus_shared_experts():
    torch.manual_seed(0)
    layer, x = MoE(8, 4, 6, 2, scale=2.827).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    layer.gate.weight.data.normal_()
    flat = x.flatten(0, 1).numpy()
    p = {name: tensor.detach().double().numpy() for name, tensor in layer.state_dict().items()}
    router = p["gate.weight"], p["gate.e_score_correction_bias"]
    weights, index, scores = numpy_route(flat, *router, top_k=2, n_group=1, topk_group=1, scale=2.827, normalize=True)
    routed = numpy_experts(flat, weights, index, *(p[f"experts.{n}_proj"] for n in ("gate", "up", "down")))
    gate = flat @ p["shared_experts.gate_proj.weight"].T
    shared = gate / (1 + np.exp(-gate)) * (flat @ p["shared_experts.up_proj.weight"].T)
    y, stats = layer(x)
    assert_close(y, (routed + shared @ p["shared_experts.down_proj.weight"].T).reshape(2, 5, 8), what="y")
    assert stats.counts.tolist() == np.bincount(index.reshape(-1), minlength=6).tolist()
    valid = np.ones((2, 5), dtype=bool)
    expected = numpy_balance_loss(scores.reshape(2, 5, 6), index.reshape(2, 5, 2), valid)
    assert_close(stats.balance_loss, expected, what="balance loss")


def test_moe_counts_ignore_padding_but_tokens_do_not_notice():
    torch.manual_seed(0)
    layer, x = MoE(8, 4, 6, 2), torch.randn(2, 5, 8)
    valid = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    y, stats = layer(x, valid)
    assert stats.counts.sum() == 8 * 2
    losses = [layer(x[:1, :3])[1].balance_loss, layer(x[1:])[1].balance_loss]
    assert_close(stats.balance_loss, sum(losses) / 2, what="balance loss")
    assert torch.equal(y, layer(x)[0])
    kept = layer(x[valid][None])[1]
    assert torch.equal(stats.counts, kept.counts)


def test_moe_pinned_experts_are_used_and_counted():
    torch.manual_seed(0)
    layer, x = MoE(8, 4, 6, 2, n_shared=0), torch.randn(2, 5, 8)
    pinned = torch.tensor([4, 1]).expand(2, 5, 2).contiguous()
    y, stats = layer(x, pinned=pinned)
    assert stats.counts.tolist() == [0, 10, 0, 0, 10, 0]
    y.sum().backward()
    assert layer.gate.weight.grad[[4, 1]].abs().max() > 0


def test_module_parameters_have_the_released_names_and_stacked_shapes():
    shapes = {name: tuple(t.shape) for name, t in MoE(8, 4, 6, 2, n_shared=2).state_dict().items()}
    assert shapes == {
        "gate.weight": (6, 8),
        "gate.e_score_correction_bias": (6,),
        "experts.gate_proj": (6, 4, 8),
        "experts.up_proj": (6, 4, 8),
        "experts.down_proj": (6, 8, 4),
        "shared_experts.gate_proj.weight": (8, 8),
        "shared_experts.up_proj.weight": (8, 8),
        "shared_experts.down_proj.weight": (8, 8),
    }
    assert not any(name.startswith("shared") for name in MoE(8, 4, 6, 2, n_shared=0).state_dict())
    with pytest.raises(MoEError, match='"reference" or "fused"'):
        MoE(8, 4, 6, 2, impl="fast")


def test_bug23_initial_weights_are_sampled_in_float32():
    """A bf16 model starts as the rounded float32 one; its standard deviation is the same within 1 %."""
    models = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            torch.manual_seed(0)
            models[dtype] = MoE(63, 31, 31, 2)  # odd: the samplers of the two dtypes differ at the tail
        finally:
            torch.set_default_dtype(torch.float32)
    for exact, rounded in zip(models[torch.float32].parameters(), models[torch.bfloat16].parameters()):
        assert rounded.dtype == torch.bfloat16 and torch.equal(exact.bfloat16(), rounded)
    stack = models[torch.bfloat16].experts.gate_proj.float()
    assert abs(stack.std() / 0.02 - 1) < 0.01 and abs(stack.mean()) < 1e-3
    assert abs(normal_init_(torch.empty(200, 200), std=0.5).std() / 0.5 - 1) < 0.02


def test_experts_act_in_the_dtype_of_the_tokens():
    """Float32 master weights serve bf16 tokens, as under mixed precision."""
    torch.manual_seed(0)
    experts, x = Experts(16, 8, 4), torch.randn(6, 16).bfloat16()
    weights, index = torch.rand(6, 2), torch.tensor([[0, 1], [1, 2], [3, 0], [2, 1], [0, 3], [1, 3]])
    y = experts(x, weights, index)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, copy.deepcopy(experts).bfloat16()(x, weights, index))
    y.sum().backward()
    assert experts.down_proj.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype, fullgraph", [(torch.bfloat16, True), (torch.float32, False)])
def test_moe_compiles(dtype, fullgraph):
    torch.manual_seed(0)
    layer, x = MoE(16, 8, 4, 2).to(dtype), torch.randn(1, 6, 16).to(dtype)
    y, stats = torch.compile(layer, backend="aot_eager", fullgraph=fullgraph)(x)
    assert_close(y, layer(x)[0], what="y")
    assert torch.equal(stats.counts, layer(x)[1].counts)
    y.sum().backward()
    assert layer.experts.gate_proj.grad.abs().max() > 0


# Int4


def numpy_pack(weight):
    """Codes and words of a float32 (O,I) matrix from the layout's text, with bf16 rounding of the scale by hand."""
    groups = weight.reshape(len(weight), -1, 32).astype(np.float32)
    bits = (np.abs(groups).max(2) / np.float32(7)).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16  # to nearest even
    scale = bits.astype(np.uint32).view(np.float32)
    codes = np.rint(np.divide(groups, scale[..., None], out=np.zeros_like(groups), where=scale[..., None] > 0))
    nibbles = (codes.astype(np.int64) + 8).reshape(len(weight), -1, 8)
    words = sum(nibbles[..., j] << (4 * j) for j in range(8))
    return words.astype(np.uint32).view(np.int32), scale


@st.composite
def matrices(draw):
    """(O,I) float32 weights; some groups are zero, some scales extreme, some weights exactly half-way between codes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    O, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    magnitude = 10.0 ** torch.randint(-20, 20, (O, groups, 1), generator=generator)
    magnitude *= torch.rand(O, groups, 1, generator=generator) > 0.2
    weight = torch.randn(O, groups, 32, generator=generator)
    if draw(st.booleans()):
        weight = (weight * 4).round().clamp(-13, 13) / 2
        weight[..., 0], magnitude = 7.0, magnitude.bfloat16().float()  # makes the magnitude the scale
    return (weight * magnitude).flatten(1)


def test_int4_of_a_hand_worked_group():
    """amax 3.5, scale 1/2; codes are 2 w, halves to even; nibbles 8 + code from the low end."""
    weight = torch.tensor(
        [-3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]  # -7..0 -> 1 2 3 4 5 6 7 8
        + [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 0.0]  # 1..7, 0 -> 9 A B C D E F 8
        + [0.0] * 8
        + [0.75, 0.25, -0.25, 1.25, -1.25, -0.75, 0.26, -3.5]  # 2 0 0 2 -2 -2 1 -7 -> A 8 8 A 6 6 9 1
    )
    packed, scale = int4_pack(weight[None])
    assert [word % 2**32 for word in packed[0].tolist()] == [0x87654321, 0x8FEDCBA9, 0x88888888, 0x1966A88A]
    assert scale.tolist() == [[0.5]]
    restored = int4_unpack(packed, scale)[0]
    assert restored[:24].tolist() == weight[:24].tolist()
    assert restored[24:].tolist() == [1.0, 0.0, 0.0, 1.0, -1.0, -1.0, 0.5, -3.5]


@given(matrices())
def test_int4_packs_as_numpy_does(weight):
    packed, scale = int4_pack(weight)
    words, scales = numpy_pack(weight.numpy())
    assert packed.tolist() == words.tolist()
    assert scale.float().tolist() == scales.tolist()


@given(matrices())
def test_int4_error_is_at_most_half_a_step(weight):
    packed, scale = int4_pack(weight)
    error = (int4_unpack(packed, scale) - weight).unflatten(1, (-1, 32)).abs()
    assert (error <= scale.float()[..., None] * 0.51).all()  # the scale itself is rounded to 8 bits


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3), st.integers(-60, 60))
def test_bug24_unpack_and_requantise_returns_every_code(seed, O, groups, exponent):
    """Released codes span -7..7. A divisor of 7.5 or 8 would move them, and so would a float16 scale."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(-7, 8, (O, groups, 32))
    codes[..., generator.integers(32)] = generator.choice([-7, 7], (O, groups))
    nibbles = (codes + 8).reshape(O, -1, 8)
    words = sum(nibbles[..., j] << (4 * j) for j in range(8)).astype(np.uint32).view(np.int32)
    packed = torch.from_numpy(words)
    scale = torch.tensor((1 + generator.random((O, groups))) * 2.0**exponent).bfloat16()
    weight = int4_unpack(packed, scale)
    assert weight.tolist() == (codes * scale.double().numpy()[..., None]).reshape(O, -1).tolist()
    again, scale_again = int4_pack(weight)
    assert torch.equal(again, packed) and torch.equal(scale_again, scale)


def test_bug25_dtypes_and_shapes_survive_a_round_trip(tmp_path):
    packed, scale = int4_pack(torch.randn(6, 64, dtype=torch.float64))
    save_file({"weight_packed": packed, "weight_scale": scale}, tmp_path / "shard.safetensors")
    manifest = {name: (t.dtype, tuple(t.shape)) for name, t in load_file(tmp_path / "shard.safetensors").items()}
    assert manifest == {"weight_packed": (torch.int32, (6, 8)), "weight_scale": (torch.bfloat16, (6, 2))}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert int4_unpack(packed, scale, dtype).dtype == dtype
    with pytest.raises(MoEError, match="torch.int64"):
        int4_unpack(packed.long(), scale)
    with pytest.raises(MoEError, match="4 words per scale"):
        int4_unpack(packed, scale[:, :1])


def released_names(int4):
    """Every tensor name of the released model, routed experts as int4 triples or as plain weights."""
    for name in ("embed_tokens", "norm"):
        yield f"language_model.model.{name}.weight"
    yield "language_model.lm_head.weight"
    attention = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    projections = ("gate_proj", "up_proj", "down_proj")
    for i in range(61):
        layer = f"language_model.model.layers.{i}"
        yield from (f"{layer}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm"))
        yield from (f"{layer}.self_attn.{name}.weight" for name in attention)
        if i == 0:
            yield from (f"{layer}.mlp.{name}.weight" for name in projections)
            continue
        yield from (f"{layer}.mlp.gate.{name}" for name in ("weight", "e_score_correction_bias"))
        yield from (f"{layer}.mlp.shared_experts.{name}.weight" for name in projections)
        for e in range(384):
            for name in projections:
                for suffix in ("_packed", "_scale", "_shape") if int4 else ("",):
                    yield f"{layer}.mlp.experts.{e}.{name}.weight{suffix}"
    both = ("weight", "bias")
    for i in range(27):
        for name in ("norm0", "norm1", "wqkv", "wo", "mlp.fc0", "mlp.fc1"):
            yield from (f"vision_tower.encoder.blocks.{i}.{name}.{part}" for part in both)
    yield "vision_tower.patch_embed.pos_emb.weight"
    for name in ("vision_tower.patch_embed.proj", "vision_tower.encoder.final_layernorm"):
        yield from (f"{name}.{part}" for part in both)
    for name in ("pre_norm", "proj.0", "proj.2"):
        yield from (f"mm_projector.{name}.{part}" for part in both)


def test_bug26_only_routed_experts_are_int4_among_all_names():
    plain, packed = list(released_names(int4=False)), set(released_names(int4=True))
    assert len(packed) == 208_550
    hits = [name for name in plain if is_int4_expert(name)]
    assert len(hits) == 60 * 384 * 3
    stored = {name + suffix for name in hits for suffix in ("_packed", "_scale", "_shape")}
    assert stored | {name for name in plain if not is_int4_expert(name)} == packed
    assert not any(is_int4_expert(name) for name in packed)


@given(matrices(), st.data())
def test_bug27_packing_a_slice_is_a_slice_of_the_packing(weight, data):
    packed, scale = int4_pack(weight)
    start = data.draw(st.integers(0, len(weight)))
    for whole, part in zip((packed, scale), int4_pack(weight[start:])):
        assert torch.equal(whole[start:], part)
    for whole, part in zip((packed, scale), int4_pack(weight[:, 32:])):
        assert torch.equal(whole[:, whole.shape[1] * 32 // weight.shape[1] :], part)
    for whole, part in zip((packed, scale), int4_pack(torch.stack([weight, -weight]))):
        assert torch.equal(part[0], whole)


@given(matrices(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_bug28_fake_quant_is_bitwise_what_will_be_released(weight, dtype):
    weight = weight.to(dtype)
    assert torch.equal(fake_quant(weight), int4_unpack(*int4_pack(weight), dtype=dtype))
    assert torch.equal(fake_quant(weight.float()), fake_quant(fake_quant(weight.float())))


def test_bug28_an_outlier_coarsens_only_its_own_group_of_32():
    torch.manual_seed(0)
    weight = torch.randn(1, 128)
    spoiled = weight.clone()
    spoiled[0, 40] = 1000.0
    same = fake_quant(weight) == fake_quant(spoiled)
    assert same[0, :32].all() and same[0, 64:].all()
    assert (fake_quant(spoiled)[0, 32:64] != 0).sum() == 1


def test_fake_quant_gradient_passes_straight_through():
    torch.manual_seed(0)
    weight, grad = torch.randn(3, 64, requires_grad=True), torch.randn(3, 64)
    fake_quant(weight).backward(grad)
    assert torch.equal(weight.grad, grad)


def test_int4_of_zeros_is_zeros_and_of_nan_an_error():
    packed, scale = int4_pack(torch.zeros(2, 64))
    assert (packed == -0x77777778).all() and (scale == 0).all()  # 0x88888888
    assert torch.equal(int4_unpack(packed, scale), torch.zeros(2, 64))
    assert torch.equal(fake_quant(torch.zeros(2, 64)), torch.zeros(2, 64))
    tiny = torch.full((1, 32), 1e-45)  # amax / 7 underflows to scale 0
    assert torch.equal(fake_quant(tiny), torch.zeros(1, 32))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(MoEError, match="not finite"):
            int4_pack(torch.full((1, 32), bad))
        assert not fake_quant(torch.full((1, 32), bad)).isfinite().any()  # training sees the divergence
    with pytest.raises(MoEError, match="no multiple of 32"):
        int4_pack(torch.zeros(2, 48))


@IMPLS
def test_qat_layer_computes_with_the_released_weights(impl):
    torch.manual_seed(0)
    layer, x = MoE(64, 32, 4, 2, impl=impl, qat=True), torch.randn(1, 6, 64)
    released = MoE(64, 32, 4, 2, impl=impl)
    released.load_state_dict(layer.state_dict())
    for name in ("gate_proj", "up_proj", "down_proj"):
        matrix = getattr(released.experts, name)
        matrix.data = int4_unpack(*int4_pack(matrix.data))
    y, expected = layer(x)[0], released(x)[0]
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert torch.equal(getattr(layer.experts, name).grad, getattr(released.experts, name).grad)
    with pytest.raises(MoEError, match="multiples of 32"):
        MoE(48, 32, 4, 2, qat=True)


# CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_expert_twins_agree_on_cuda_and_repeat_bitwise(dtype):
    case = expert_inputs(0, 300, 16, 4, 64, 32)
    check_expert_twins(case, dtype, "cuda")
    x, weights, index, *matrices = (t.cuda() for t in case)
    run = lambda *inputs: experts_fused(inputs[0], inputs[1], index, *inputs[2:])  # noqa: E731
    inputs = (x.to(dtype), weights.float(), *(matrix.to(dtype) for matrix in matrices))
    for first, second in zip(*(gradients(run, *inputs) for _ in range(2))):
        assert torch.equal(first, second)


@pytest.mark.cuda
def test_router_bias_follows_the_model_to_cuda():
    layer = MoE(64, 32, 8, 2).to("cuda", torch.bfloat16)
    bias = layer.gate.e_score_correction_bias
    assert bias.is_cuda and bias.dtype == torch.float32
    y, stats = layer(torch.randn(2, 9, 64, device="cuda", dtype=torch.bfloat16))
    balance_bias_(bias, stats.counts, 0.1)
    assert y.is_cuda and bias.abs().max() > 0
