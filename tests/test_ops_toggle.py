"""Claims about ops_toggle.py: every mistake is caught and named, every right way passes, NumPy agrees.

Run: .venv/bin/python -m pytest tests/test_ops_toggle.py
"""

import math

import numpy as np
import pytest
import torch
from conftest import right_and_wrong
from hypothesis import given, settings

import adapter
from conformance import check, check_op, load_implementation
from ops_toggle import OPS, rft_select, toggle_budgets, toggle_rewards

EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
BY_NAME = {op.name: op for op in OPS}


# Independent versions, from the formulas


def numpy_toggle_budgets(lengths, correct, groups, prompts, percentile):
    mine = [lengths[correct & (groups == prompt)] for prompt in range(prompts)]
    return np.array([np.percentile(m, percentile) if m.size else np.inf for m in mine], dtype=np.float32)


def numpy_toggle_rewards(rewards, lengths, groups, valid, budgets, iteration, period, lam):
    if (iteration // period) % 2:
        return rewards.copy()
    found = rewards.copy()
    for prompt in np.unique(groups[valid]):
        mine = valid & (groups == prompt)
        if not rewards[mine].mean() < lam:
            found[mine & ~(lengths <= budgets[prompt])] = 0
    return found


def numpy_rft_select(responses, rewards, valid, groups, threshold, most):
    """By rounds: each takes one response that is still allowed, the best of all prompts."""
    chosen = []
    while True:
        left = [
            (-rewards[j], len(responses[j]), j)
            for j in range(len(responses))
            if valid[j] and rewards[j] >= threshold
            and sum(groups[k] == groups[j] for k in chosen) < most
            and not any(groups[k] == groups[j] and responses[k] == responses[j] for k in chosen)
        ]  # fmt: skip
        if not left:
            return sorted(chosen)
        chosen.append(min(left)[2])


NUMPY = {"toggle_budgets": numpy_toggle_budgets, "toggle_rewards": numpy_toggle_rewards, "rft_select": numpy_rft_select}


@EACH
def test_numpy_from_the_formulas_agrees(op):
    def caller(op, arguments, cotangents, wanted):
        return adapter.run(NUMPY[op.name], arguments, op.outputs, wanted, cotangents, "numpy")

    finding = check_op(op, caller, max_examples=60)
    assert finding is None, finding.text()


# Worked by hand


def test_budgets_of_hand_worked_prompts():
    """Correct lengths 10, 20, 30 and 40: 80 % of the way lies at place 2.4, so 34. Nobody solved the second prompt."""
    lengths, groups = torch.tensor([40, 10, 99, 30, 20, 7]), torch.tensor([0, 0, 0, 0, 0, 1])
    correct = torch.tensor([True, True, False, True, True, False])
    assert toggle_budgets(lengths, correct, groups, 2, 80.0).tolist() == [34.0, math.inf]


def test_toggle_of_hand_worked_prompts():
    """Accuracies 1, ½ and ½ with a failed verifier, λ = ½: all three bind, where a budget is; the last one has none."""
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5, math.nan])
    lengths, groups = torch.tensor([9, 5, 6, 1, 99, 99]), torch.tensor([0, 0, 1, 1, 2, 2])
    arguments = rewards, lengths, groups, torch.tensor([True] * 5 + [False]), torch.tensor([5.0, 5.0, math.inf])
    first, second = (toggle_rewards(*arguments, iteration, 2, 0.5).tolist() for iteration in (1, 2))
    assert first[:5] == [0, 1, 0, 0, 0.5] and second[:5] == rewards[:5].tolist()
    assert math.isnan(first[5]) and math.isnan(second[5])
    assert toggle_rewards(*arguments, 0, 2, 0.6).tolist()[:5] == [0, 1, 1, 0, 0.5]


def test_a_choice_of_hand_worked_responses():
    responses, groups = [[1, 2], [3], [3], [4], [5], [6]], [0, 0, 0, 0, 1, 1]
    chosen = rft_select(responses, [1.0, 0.9, 0.9, 0.9, 0.4, 1.0], [True] * 5 + [False], groups, 0.5, 3)
    assert chosen == [0, 1, 3]


# Mistakes and right ways


test_right_implementations_pass_in_every_dtype, test_a_mistake_is_caught_and_named = right_and_wrong(OPS)


def test_the_misreading_in_foreign_words_is_named(tmp_path):
    """Written from the widely copied text, without a line of the suspects."""
    (tmp_path / "theirs.py").write_text("""
ARRAYS = "numpy"
import numpy as np
def toggle_rewards(rewards, lengths, groups, valid, budgets, iteration, period, lam):
    out = rewards.copy()
    if iteration // period % 2 == 0:
        for j in np.flatnonzero(valid):
            accuracy = rewards[valid & (groups == groups[j])].mean()
            keeps = accuracy > lam or lengths[j] <= budgets[groups[j]]
            out[j] = rewards[j] if keeps else 0
    return out
""")
    (row,) = check(load_implementation(str(tmp_path / "theirs.py")), ["toggle_rewards"])
    assert row.status == "FAIL" and row.finding.suspect == "misread", row.finding and row.finding.text()


# Corners of the inputs


def drawn(name):
    cases = []
    settings(max_examples=60, database=None)(given(BY_NAME[name].cases)(lambda case: cases.append(case)))()
    return cases


def test_toggle_is_asked_at_lambda_and_at_the_budget_in_both_phases():
    cases = drawn("toggle_rewards")
    assert {case["iteration"] // case["period"] % 2 for case in cases} == {0, 1} and {case["period"] for case in cases} == {1, 2, 3}
    assert all((case["lengths"] == case["budgets"][case["groups"]].floor()).any() for case in cases)
    means = [
        (case["rewards"][(case["groups"] == prompt) & case["valid"]].mean().item(), case["lam"])
        for case in cases
        for prompt in range(len(case["budgets"]))
    ]
    assert {(mean > lam) - (mean < lam) for mean, lam in means} == {-1, 0, 1}
    assert any(case["rewards"].isnan().any() for case in cases) and any(case["budgets"].isinf().any() for case in cases)


def test_budgets_are_asked_of_prompts_that_nobody_solved():
    cases = drawn("toggle_budgets")
    assert any(not (case["correct"] & (case["groups"] == 0)).any() for case in cases)
    assert any(not case["correct"].all() for case in cases)
