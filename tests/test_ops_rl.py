"""Claims about ops_rl.py: every mistake is caught and named, every right way passes, NumPy agrees.

Run: .venv/bin/python -m pytest tests/test_ops_rl.py
"""

import math

import numpy as np
import pytest
import torch
from conftest import assert_close, right_and_wrong
from hypothesis import given, settings

import adapter
from conformance import check, check_op, load_implementation
from ops_rl import OPS, group_advantages, mismatch_weights, policy_objective, token_logprobs

EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
BY_NAME = {op.name: op for op in OPS}
LN2 = math.log(2)


# Independent versions, from the formulas


def numpy_token_logprobs(hidden, head, ids, temperature):
    found = [np.nan]
    for before, token in zip(hidden, ids[1:]):
        logits = head @ before / temperature
        found.append(logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    return np.array(found, dtype=hidden.dtype)


def numpy_token_logprobs_backward(hidden, head, ids, temperature, upstream):
    """One-hot less softmax, over the temperature, times what comes in."""
    logits = hidden @ head.T / temperature
    share = np.exp(logits - logits.max(1, keepdims=True))
    slope = -share / share.sum(1, keepdims=True)
    slope[np.arange(len(ids) - 1), ids[1:]] += 1
    slope = slope[:-1] * upstream[1:, None] / temperature  # (T−1,U)
    return np.concatenate([slope @ head, 0 * hidden[-1:]]), slope.T @ hidden[:-1]


def numpy_group_advantages(rewards, groups, valid):
    found = np.zeros_like(rewards)
    for prompt in np.unique(groups):
        mine = (groups == prompt) & valid
        if mine.any():
            found[mine] = rewards[mine] - rewards[mine].mean()
    return found


def numpy_mismatch_weights(old_logprobs, engine_logprobs, mask, cap):
    ratio = np.exp(old_logprobs[mask]) / np.exp(engine_logprobs[mask])
    weights = np.ones_like(old_logprobs)
    weights[mask] = np.minimum(ratio, cap)
    gap = np.log(ratio)
    statistics = np.abs(gap).mean(), np.abs(gap).max(), (ratio - 1 - gap).mean(), (ratio > cap).mean()
    return weights, *(np.asarray(value, dtype=ratio.dtype) for value in statistics)


def _pieces(logprobs, old_logprobs, engine_logprobs, mask, rewards, groups, valid, tokens, low, high, tau, cap):
    """Of every counted token: its place, w · A, log-ratio, and whether the gradient passes."""
    advantages = numpy_group_advantages(rewards, groups, valid)
    for j, i in np.argwhere(mask & valid[:, None]):
        now, old, engine = logprobs[j, i], old_logprobs[j, i], engine_logprobs[j, i]
        passes = low <= now - old <= high and low <= now - engine <= high
        yield (j, i), min(np.exp(old) / np.exp(engine), cap) * advantages[j], now - old, passes


def numpy_policy_objective(*arguments):
    tokens, low, high, tau, _ = arguments[7:]
    terms = [gain * np.exp(min(max(x, low), high)) - tau * x * x for _, gain, x, _ in _pieces(*arguments)]
    return np.asarray(sum(terms) / tokens, dtype=arguments[0].dtype)


def numpy_policy_objective_backward(*arguments):
    *arguments, upstream = arguments
    tokens, tau = arguments[7], arguments[10]
    slope = np.zeros_like(arguments[0])
    for place, gain, log_ratio, passes in _pieces(*arguments):
        slope[place] = (gain * np.exp(log_ratio) * passes - 2 * tau * log_ratio) / tokens
    return slope * upstream


NUMPY = {
    "token_logprobs": numpy_token_logprobs, "group_advantages": numpy_group_advantages,
    "mismatch_weights": numpy_mismatch_weights, "policy_objective": numpy_policy_objective,
}  # fmt: skip
BACKWARD = {"token_logprobs": numpy_token_logprobs_backward, "policy_objective": numpy_policy_objective_backward}


@EACH
def test_numpy_from_the_formulas_agrees(op):
    def caller(op, arguments, cotangents, wanted):
        return adapter.run(NUMPY[op.name], arguments, op.outputs, wanted, cotangents, "numpy", BACKWARD.get(op.name))

    finding = check_op(op, caller, (torch.float64,))
    assert finding is None, finding.text()


# Worked by hand


def test_log_probs_of_hand_worked_tokens():
    """Logits 0, ln 2, ln 5 are 1/8, 2/8, 5/8; at temperature ½ they are squared: 1/30, 4/30, 25/30."""
    head = torch.tensor([1.0, 2.0, 5.0]).double().log()[:, None]
    for temperature, shares in ((1.0, [2 / 8, 1 / 8]), (0.5, [4 / 30, 1 / 30])):
        found = token_logprobs(torch.ones(3, 1).double(), head, torch.tensor([2, 1, 0]), temperature)
        assert found[0].isnan()
        assert_close(found[1:], torch.tensor(shares, dtype=torch.float64).log(), 1e-7)


def test_advantages_of_hand_worked_prompts():
    rewards = torch.tensor([1.0, 0.5, 0.0, math.nan, 0.5])
    found = group_advantages(rewards, torch.tensor([9, 4, 9, 9, 4]), torch.tensor([True, True, True, False, True]))
    assert found.tolist() == [0.5, 0.0, -0.5, 0.0, 0.0]


def test_mismatch_of_hand_worked_tokens():
    engine = torch.tensor([[-3.0, -1.0, math.nan]]).double()
    old = engine + torch.tensor([[2.0, -1.0, 0.0]]).double() * LN2
    weights, mean, largest, kl, truncated = mismatch_weights(old, engine, torch.tensor([[True, True, False]]), 2.0)
    assert_close(weights, torch.tensor([[2.0, 0.5, 1.0]]).double(), 1e-9)
    assert [mean.item(), largest.item(), truncated.item()] == pytest.approx([1.5 * LN2, 2 * LN2, 0.5])
    assert kl.item() == pytest.approx((3 - 2 * LN2 - 0.5 + LN2) / 2)


def test_the_objective_of_a_hand_worked_batch():
    """Rewards 1 and 0, so advantages ±½; ratios 1 | 2 (clipped to 1.5) and ½; N = 3; the engine found the first token half as
    likely, so it counts 1.5 (the cap): J = (½ · 1.5 − ½ · (1.5 + ½) − ¼ · 2 ln² 2) / 3."""
    now = torch.tensor([[-2.0, math.nan], [-2.0 + LN2, -2.0 - LN2]]).double()
    old = torch.tensor([[-2.0, math.nan], [-2.0, -2.0]]).double()
    engine = torch.tensor([[-2.0 - LN2, math.nan], [-2.0, -2.0]]).double()
    mask, everybody = torch.tensor([[True, False], [True, True]]), torch.ones(2, dtype=torch.bool)
    arguments = mask, torch.tensor([1.0, 0.0]).double(), torch.zeros(2).long(), everybody, 3, -1.0, math.log(1.5), 0.25, 1.5
    now.requires_grad_()
    value = policy_objective(now, old, engine, *arguments)
    assert value.item() == pytest.approx((0.75 - 1 - 0.5 * LN2**2) / 3, abs=1e-6)
    slope = torch.autograd.grad(value, now)[0]
    # The first token's ratio to the engine is 2: beyond the bound, masked.
    assert_close(slope, torch.tensor([[0, 0], [-0.5 * LN2 / 3, (-0.25 + 0.5 * LN2) / 3]]).double(), 1e-6)


# Mistakes and right ways


test_right_implementations_pass_in_every_dtype, test_a_mistake_is_caught_and_named = right_and_wrong(OPS)


# (words that the cause must hold, a module that makes the mistake without a line of the suspects)
FOREIGN = [
    ("by its own length", """
def policy_objective(now, old, engine, mask, rewards, groups, valid, tokens, low, high, tau, cap):
    losses = []
    for j in range(len(rewards)):
        if valid[j] and mask[j].any():
            peers = rewards[(groups == groups[j]) & valid]
            x = now[j][mask[j]] - old[j][mask[j]]
            y = now[j][mask[j]] - engine[j][mask[j]]
            inside = (x > low) & (x < high) & (y > low) & (y < high)
            ratio = inside * x.exp() + (~inside) * x.detach().clamp(low, high).exp()
            w = (old[j] - engine[j])[mask[j]].exp().clamp(max=cap)
            losses.append((w * ratio * (rewards[j] - peers.mean()) - tau * x ** 2).mean())
    return sum(losses) / len(losses)
"""),
    ("sign of the advantage", """
import math, torch
def policy_objective(now, old, engine, mask, rewards, groups, valid, tokens, low, high, tau, cap):
    keep = mask & valid[:, None]
    x = torch.where(keep, now, 0) - torch.where(keep, old, 0)
    w = torch.where(keep, old - engine, 0).exp().clamp(max=cap)
    a = [rewards[j] - rewards[(groups == groups[j]) & valid].mean() if valid[j] else 0 * now.nan_to_num().sum() for j in range(len(groups))]
    a = torch.stack(a)[:, None]
    gain = torch.min(x.exp() * a, x.exp().clamp(math.exp(low), math.exp(high)) * a)
    return (w * gain - tau * x ** 2)[keep].sum() / tokens
"""),
    ("divides the log-probabilities", """
import torch
def token_logprobs(hidden, head, ids, temperature):
    logits = (hidden @ head.T).float() if hidden.dtype == torch.bfloat16 else hidden @ head.T
    logprobs = logits.log_softmax(-1) / temperature
    first = logprobs.new_full((1,), float("nan"))
    return torch.cat([first, logprobs[torch.arange(len(ids) - 1), ids[1:]]])
"""),
    ("standard deviation", """
ARRAYS = "numpy"
import numpy as np
def group_advantages(rewards, groups, valid):
    out = np.zeros_like(rewards)
    for g in np.unique(groups):
        rows = np.flatnonzero((groups == g) & valid)
        if len(rows):
            r = rewards[rows]
            out[rows] = (r - r.mean()) / (r.std() + 1e-6)
    return out
"""),
]  # fmt: skip


@pytest.mark.parametrize("words, text", FOREIGN, ids=[words for words, _ in FOREIGN])
def test_a_mistake_in_foreign_words_is_named(words, text, tmp_path):
    (tmp_path / "theirs.py").write_text(text)
    theirs = load_implementation(str(tmp_path / "theirs.py"))
    (row,) = check(theirs, list(theirs.functions))
    assert row.status == "FAIL" and row.finding.suspect, row.finding and row.finding.text()
    assert words in row.finding.cause, row.finding.text()


def test_the_bugs_of_the_public_list_are_among_the_mistakes():
    """Numbers 44, 50 to 58, 61 and 62."""
    seen = {suspect.seen for op in OPS for suspect in op.suspects}
    threads = {
        "huggingface/trl#2995", "huggingface/trl#3021", "allenai/open-instruct#1137", "PrimeIntellect-ai/prime-rl#600",
        "rllm-org/rllm#605", "NovaSky-AI/SkyRL#1492", "PrimeIntellect-ai/prime-rl#1525", "PrimeIntellect-ai/prime-rl#697",
        "huggingface/trl#4159", "volcengine/verl#6377", "PrimeIntellect-ai/prime-rl#1697", "volcengine/verl#6362",
        "THUDM/slime#657", "radixark/miles#1829", "NVIDIA-NeMo/RL#2207",
    }  # fmt: skip
    assert threads <= seen


# Corners of the inputs


def drawn(name):
    cases = []
    settings(max_examples=60, database=None)(given(BY_NAME[name].cases)(lambda case: cases.append(case)))()
    return cases


def test_the_objective_is_asked_with_everything_that_is_got_wrong():
    cases = drawn("policy_objective")
    ratios = [(case["logprobs"] - case["old_logprobs"])[case["mask"]] for case in cases]
    assert all(((x > case["high"]) | (x < case["low"])).any() for x, case in zip(ratios, cases))
    assert all(min((x - case["low"]).abs().min(), (x - case["high"]).abs().min()) > 0.01 for x, case in zip(ratios, cases))
    for remarkable in (
        lambda c: c["logprobs"].isnan().any(),
        lambda c: not c["valid"].all(),
        lambda c: c["rewards"].isnan().any(),
        lambda c: c["tokens"] > (c["mask"] & c["valid"][:, None]).sum(),
        lambda c: (c["old_logprobs"] == c["engine_logprobs"])[c["mask"]].all(),
        lambda c: (c["old_logprobs"] - c["engine_logprobs"])[c["mask"]].max() > LN2,
        lambda c: len(set(c["mask"].sum(1).tolist())) > 1,
        lambda c: (c["groups"][1:] < c["groups"][:-1]).any(),
    ):
        assert any(remarkable(case) for case in cases)


def test_no_objective_that_is_asked_for_cancels_to_nothing():
    for case in drawn("policy_objective"):
        parts = [policy_objective(*(case | {"tau": tau}).values()).abs().item() for tau in (0.25, 1.0)]
        assert policy_objective(*case.values()).abs().item() == max(parts) > 1e-3
