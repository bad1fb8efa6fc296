"""Claims about ops_swarm.py: every mistake is caught and named, every right way passes, NumPy and critical.py agree.

Numbers after `bug` are those of the public bug list.
Run: .venv/bin/python -m pytest tests/test_ops_swarm.py
"""

import math

import numpy as np
import pytest
import torch
from conftest import questions, right_and_wrong
from hypothesis import given
from hypothesis import strategies as st

import adapter
import critical
from conformance import check, check_op, load_implementation
from critical import Stage, Subtask
from ops_swarm import OPS, critical_steps, item_f1, parl_reward, swarm_advantages

EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
KNOTS = torch.tensor(critical.LAMBDAS)
SUBTASKS = st.builds(Subtask, st.integers(0, 6), st.sampled_from(["", "a", "A ", "b", "c", "d"]), st.booleans())
EPISODES = st.lists(st.builds(Stage, st.integers(0, 3), st.lists(SUBTASKS, max_size=4).map(tuple)), max_size=4).map(tuple)


def arrays(episode):
    """main, steps, prompts, given, finished of an episode of critical.py. A prompt of no name is like no other one."""
    width = max((len(stage.subtasks) for stage in episode), default=0)
    numbers = {}
    steps, prompts = (torch.full((len(episode), width), -7) for _ in range(2))
    given, finished = (torch.zeros(len(episode), width, dtype=torch.bool) for _ in range(2))
    for t, stage in enumerate(episode):
        for i, subtask in enumerate(stage.subtasks):
            name = critical.normalised(subtask.prompt) or (t, i)
            steps[t, i], prompts[t, i] = subtask.steps, numbers.setdefault(name, len(numbers))
            given[t, i], finished[t, i] = True, subtask.finished
    return torch.tensor([stage.main for stage in episode], dtype=torch.int64), steps, prompts, given, finished


# Independent versions, from the formulas


def numpy_critical_steps(main, steps, given, finished):
    return np.int64(main.sum() + np.where(given, steps, 0).max(axis=1, initial=0).sum())


def numpy_item_f1(given, truth):
    if truth is None:
        return math.nan
    right = len(np.intersect1d(given, truth))
    precision, recall = (right / len(np.unique(items)) if items.size else float(not max(len(given), len(truth))) for items in (given, truth))
    return 2 * precision * recall / ((precision + recall) or 1.0)


def numpy_parl_reward(prompts, given, finished, performance, progress, enough, knots):
    widths, good, total = [0], 0, 0
    for t in range(len(prompts)):
        earlier = prompts[:t][given[:t] & finished[:t]]
        here = np.setdiff1d(prompts[t][given[t]], earlier)
        widths.append(len(here))
        good += len(np.setdiff1d(prompts[t][given[t] & finished[t]], earlier))
        total += given[t].sum()
    parallel, finish = min(1.0, max(widths) / enough), good / total if total else 0.0
    first, second = (np.interp(progress, knots[:, 0], knots[:, k]) for k in (1, 2))
    reward = first * parallel + second * finish + performance
    return tuple(np.asarray(x, performance.dtype) for x in (reward, parallel, finish, first, second))


def numpy_swarm_advantages(rewards, groups, valid, context, writer):
    mask = (np.maximum(np.abs(context), np.abs(writer)) == 0) & valid[:, None]
    advantages = np.zeros(len(rewards), rewards.dtype)
    for group in np.unique(groups[valid]):
        mine = valid & (groups == group)
        advantages[mine] = rewards[mine] - rewards[mine].mean()
    return advantages[:, None] * mask, mask.sum()


NUMPY = {"critical_steps": numpy_critical_steps, "item_f1": numpy_item_f1, "parl_reward": numpy_parl_reward,
         "swarm_advantages": numpy_swarm_advantages}  # fmt: skip


@EACH
def test_numpy_from_the_formulas_agrees(op):
    def caller(op, arguments, cotangents, wanted):
        return adapter.run(NUMPY[op.name], arguments, op.outputs, wanted, cotangents, "numpy")

    finding = check_op(op, caller, max_examples=40)
    assert finding is None, finding.text()


# The same episode as objects


@given(EPISODES)
def test_critical_steps_of_arrays_are_those_of_objects(episode):
    main, steps, _, there, finished = arrays(episode)
    assert critical_steps(main, steps, there, finished).item() == critical.critical_steps(episode)


@given(EPISODES, st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]), st.integers(1, 5), st.sampled_from([0.0, 0.625, 1.0, math.nan]))
def test_the_reward_of_arrays_is_that_of_objects(episode, progress, enough, performance):
    _, _, prompts, there, finished = arrays(episode)
    knots = KNOTS.double()
    got = parl_reward(prompts, there, finished, torch.tensor(performance).double(), progress, enough, knots)
    expected = [critical.reward(episode, performance, progress, enough, knots.tolist()), critical.parallel_reward(episode, enough),
                critical.finish_reward(episode), *critical.lambdas(progress, knots.tolist())]  # fmt: skip
    assert torch.stack(got).tolist() == pytest.approx(expected, nan_ok=True)


# Worked by hand


def episode_of(*stages):
    """main 1 each, steps, prompts, given, finished of stages of (prompt, steps, finished)."""
    return arrays([Stage(1, tuple(Subtask(steps, str(prompt), finished) for prompt, steps, finished in stage)) for stage in stages])


def test_the_reports_example_costs_eleven_steps():
    main, steps, _, there, finished = episode_of([(1, 10, True), (2, 10, False), (3, 10, True)])
    assert critical_steps(main, steps, there, finished).item() == 11
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert critical_steps(torch.tensor([1, 2]), none, none.bool(), none.bool()).item() == 3


def reward_of(*stages, performance=0.5, progress=0.0):
    _, _, prompts, there, finished = episode_of(*stages)
    return [x.item() for x in parl_reward(prompts, there, finished, torch.tensor(performance), progress, 4, KNOTS)]


def test_a_reward_worked_by_hand():
    """One of three finished, one tried again and finished: 2 of 4. The widest stage has 3 of 4 that are enough."""
    stages = [[(1, 3, True), (2, 4, False), (3, 2, False)], [(2, 1, True)]]
    assert reward_of(*stages) == pytest.approx([0.5 * 0.75 + 0.5 * 0.5 + 0.5, 0.75, 0.5, 0.5, 0.5])
    assert reward_of(*stages, progress=0.5) == pytest.approx([0.2 * 0.75 + 0.2 * 0.5 + 0.5, 0.75, 0.5, 0.2, 0.2])
    assert reward_of(*stages, progress=1.0)[0] == 0.5


def test_neither_giving_nothing_nor_giving_it_again_pays_bug_64():
    assert reward_of([], []) == pytest.approx([0.5, 0.0, 0.0, 0.5, 0.5])
    once, padded = reward_of([(1, 3, True)]), reward_of([(1, 3, True), (1, 3, True)], [(1, 2, True), (1, 1, True)])
    assert once[1:3] == [0.25, 1.0] and padded[1:3] == [0.25, 0.25]


def test_what_nobody_judged_has_no_reward_bug_62():
    assert math.isnan(reward_of([(1, 3, True)], performance=math.nan)[0])
    assert math.isnan(item_f1(torch.tensor([1]), None).item())


def test_f1_of_sets_worked_by_hand():
    """Precision 2/3, recall 2/4; repetitions do not count."""
    assert item_f1(torch.tensor([5, 1, 2, 2, 2]), torch.tensor([1, 2, 3, 4])).item() == pytest.approx(4 / 7)
    none = torch.zeros(0, dtype=torch.int64)
    assert item_f1(none, none).item() == 1.0 and item_f1(none, torch.tensor([1])).item() == 0.0


def test_only_the_orchestrators_own_tokens_learn_bug_53():
    """question, two tokens that give a subtask away, what it returns, the answer | the subtask's prompt, its answer, padding."""
    context = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1], [0, 0, 0, -1, -1, -1, -1, -1]])
    writer = torch.tensor([[-1, 0, 0, 1, 0, 0, 1, -1], [-1, 0, 0, -1, -1, -1, -1, -1]])
    rewards, groups = torch.tensor([1.0, 0.5]), torch.tensor([7, 7])
    advantages, tokens = swarm_advantages(rewards, groups, torch.tensor([True, True]), context, writer)
    assert advantages.tolist() == [[0, 0.25, 0.25, 0, 0.25, 0, 0, 0], [0, -0.25, -0.25, 0, 0, 0, 0, 0]] and tokens.item() == 5
    advantages, tokens = swarm_advantages(torch.tensor([1.0, math.nan]), groups, torch.tensor([True, False]), context, writer)
    assert not advantages.any() and tokens.item() == 3


# Mistakes and right ways


test_right_implementations_pass_in_every_dtype, test_a_mistake_is_caught_and_named = right_and_wrong(OPS)


FOREIGN = [
    ("critical_steps", "failed_left_out", """
def critical_steps(main, steps, given, finished):
    total = 0
    for t in range(len(main)):
        done = [int(n) for n, g, f in zip(steps[t], given[t], finished[t]) if g and f]
        total += int(main[t]) + (max(done) if done else 0)
    return np.int64(total)
"""),
    ("parl_reward", "none_finishes", """
def parl_reward(prompts, given, finished, performance, progress, enough, knots):
    seen, wide, good, n = set(), 0, 0, int(given.sum())
    for p, g, f in zip(prompts, given, finished):
        wide = max(wide, len(set(p[g].tolist()) - seen))
        won = set(p[g & f].tolist()) - seen
        good, seen = good + len(won), seen | won
    rp, rf = min(1, wide / enough), good / n if n > 0 else 1.0
    l1, l2 = [np.interp(progress, knots[:, 0], knots[:, k]) for k in (1, 2)]
    return tuple(np.asarray(x, performance.dtype) for x in (l1 * rp + l2 * rf + performance, rp, rf, l1, l2))
"""),
    ("swarm_advantages", "copies_trained", """
def swarm_advantages(rewards, groups, valid, context, writer):
    out = np.zeros(context.shape, rewards.dtype)
    for j in np.flatnonzero(valid):
        out[j, writer[j] == 0] = rewards[j] - rewards[valid & (groups == groups[j])].mean()
    return out, int(((writer == 0) & valid[:, None]).sum())
"""),
]  # fmt: skip


@pytest.mark.parametrize("name, mistake, text", FOREIGN, ids=[name for name, *_ in FOREIGN])
def test_a_mistake_in_foreign_words_is_named(name, mistake, text, tmp_path):
    (tmp_path / "theirs.py").write_text('ARRAYS = "numpy"\nimport numpy as np\n' + text)
    (row,) = check(load_implementation(str(tmp_path / "theirs.py")), [name])
    assert row.status == "FAIL" and row.finding.suspect == mistake, row.finding and row.finding.text()


# Corners of the inputs


def drawn(name):
    return [asked.arguments for asked in questions(name, torch.float32, 50)]


def test_critical_steps_are_asked_of_stages_with_and_without_subtasks():
    cases = drawn("critical_steps")
    assert any(case["steps"].shape[1] == 0 < len(case["main"]) for case in cases) and any(len(case["main"]) == 0 for case in cases)
    assert any((~case["given"].any(1)).any() and case["given"].any() for case in cases)
    assert any((case["steps"][~case["given"]] > 0).any() for case in cases)


def test_rewards_are_asked_where_nothing_was_given_and_nothing_is_known_on_and_beyond_the_knots():
    cases = drawn("parl_reward")
    assert {bool(case["given"].any()) for case in cases} == {bool(case["performance"].isnan()) for case in cases} == {True, False}
    places = [(case["progress"], case["knots"][:, 0].tolist()) for case in cases]
    assert any(at in knots for at, knots in places)
    assert any(at < knots[0] for at, knots in places) and any(at > knots[-1] for at, knots in places)


def test_tokens_are_asked_of_episodes_with_and_without_subagents_valid_and_not():
    cases = drawn("swarm_advantages")
    assert any((case["context"].amax(1) == 0).any() and (case["context"] > 1).any() for case in cases)
    assert any(not case["valid"].all() for case in cases) and any(case["rewards"].isnan().any() for case in cases)
