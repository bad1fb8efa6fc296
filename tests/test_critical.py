"""Claims about critical.py: the two ways to critical steps agree, order changes nothing, and the rewards cannot be gamed.

Numbers after `bug` are those of the public bug list.
Run: .venv/bin/python -m pytest tests/test_critical.py
"""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from critical import (LAMBDAS, Stage, Subtask, critical_steps, finish_reward, item_f1, lambdas, longest_path, normalised, parallel_reward,
                      redundancy, reward, step_graph, table_items, total_steps)  # fmt: skip

SUBTASKS = st.builds(Subtask, st.integers(0, 6), st.sampled_from(["", "a", "A ", "b", "c", "d"]), st.booleans())
EPISODES = st.lists(st.builds(Stage, st.integers(0, 3), st.lists(SUBTASKS, max_size=4).map(tuple)), max_size=4).map(tuple)


def brute_force(graph):
    """The most steps of a chain, by trying all chains."""

    def longest(step):
        return 1 + max(map(longest, graph[step]), default=0)

    return max(map(longest, graph), default=0)


# Steps


def test_the_reports_example_costs_eleven_steps_not_thirty_one():
    assert critical_steps([Stage(1, (Subtask(10),) * 3)]) == 11
    assert total_steps([Stage(1, (Subtask(10),) * 3)]) == 31


@given(EPISODES)
def test_critical_steps_are_the_longest_path_of_the_graph_of_steps(episode):
    graph = step_graph(episode)
    path = longest_path(graph)
    assert len(graph) == total_steps(episode)
    assert len(path) == critical_steps(episode)
    assert all(before in graph[step] for before, step in itertools.pairwise(path))


@given(st.lists(st.lists(st.integers(0, 30)), min_size=1, max_size=7))
def test_the_longest_path_of_any_graph_is_that_of_all_chains_tried(waits):
    graph = {step: tuple({other % step for other in others}) if step else () for step, others in enumerate(waits)}
    backward = dict(reversed(graph.items()))  # the order of the keys does not matter
    assert len(longest_path(graph)) == len(longest_path(backward)) == brute_force(graph)


def test_a_graph_with_a_circle_or_a_hole_is_refused():
    with pytest.raises(ValueError, match="2 steps wait for each other"):
        longest_path({"a": ("b",), "b": ("a",), "c": ()})
    with pytest.raises(ValueError, match="a waits for b, which is no step"):
        longest_path({"a": ("b",)})


@given(EPISODES, st.randoms(use_true_random=False))
def test_the_order_of_subtasks_changes_nothing(episode, rng):
    other = tuple(dataclasses.replace(stage, subtasks=tuple(rng.sample(stage.subtasks, len(stage.subtasks)))) for stage in episode)
    for measure in (critical_steps, total_steps, parallel_reward, finish_reward, redundancy):
        assert measure(other) == measure(episode)


@given(st.integers(0, 40), st.integers(1, 8), st.integers(0, 40))
def test_a_balanced_split_never_costs_more(work, agents, beside):
    def costs(shares):
        return critical_steps([Stage(1, tuple(map(Subtask, [*shares, beside])))])

    balanced = [work // agents + (place < work % agents) for place in range(agents)]
    for first in range(work + 1):  # against every split of which the first agent does so much
        rest = work - first
        others = [rest // (agents - 1) + (place < rest % (agents - 1)) for place in range(agents - 1)] if agents > 1 else []
        if agents > 1 or not rest:
            assert costs(balanced) <= costs([first, *others])
    assert costs(balanced) <= 1 + work + beside


@given(EPISODES, st.data())
def test_an_agent_off_the_longest_path_changes_nothing_and_one_on_it_counts(episode, data):
    if not episode:
        return
    place = data.draw(st.integers(0, len(episode) - 1))
    stage = episode[place]
    longest = max((subtask.steps for subtask in stage.subtasks), default=0)

    def widened(steps):
        wider = dataclasses.replace(stage, subtasks=(*stage.subtasks, Subtask(steps, finished=data.draw(st.booleans()))))
        return (*episode[:place], wider, *episode[place + 1 :])

    assert critical_steps(widened(data.draw(st.integers(0, longest)))) == critical_steps(episode)
    assert critical_steps(widened(longest + 3)) == critical_steps(episode) + 3


@given(st.lists(st.integers(0, 5), max_size=6))
def test_a_serial_episode_costs_its_plain_steps(steps):
    assert critical_steps([Stage(n) for n in steps]) == total_steps([Stage(n) for n in steps]) == sum(steps)


@given(EPISODES)
def test_critical_steps_lie_between_those_of_the_orchestrator_and_all(episode):
    assert sum(stage.main for stage in episode) <= critical_steps(episode) <= total_steps(episode)
    failed = tuple(dataclasses.replace(s, subtasks=tuple(dataclasses.replace(x, finished=False) for x in s.subtasks)) for s in episode)
    assert critical_steps(failed) == critical_steps(episode)  # what failed has taken its time


def test_negative_steps_are_refused():
    for wrong in (lambda: Subtask(-1), lambda: Stage(-1)):
        with pytest.raises(ValueError, match="there are none or more"):
            wrong()


# Rewards


@given(EPISODES)
def test_rewards_lie_between_nothing_and_one(episode):
    for measure in (parallel_reward, finish_reward, redundancy):
        assert 0 <= measure(episode) <= 1
    assert finish_reward(episode) + redundancy(episode) <= 1


def test_finishing_nothing_that_was_given_away_earns_nothing_bug_64():
    assert finish_reward([Stage(1), Stage(1)]) == parallel_reward([Stage(1)]) == 0.0


def test_repeated_subtasks_do_not_count_bug_64():
    once = [Stage(1, (Subtask(3, "the ash"), Subtask(3, "the elm")))]
    padded = [Stage(1, (Subtask(3, "the ash"), Subtask(3, "the elm"), Subtask(3, "The  ASH."), Subtask(1, "the elm")))]
    later = [*once, Stage(1, (Subtask(1, "the ash"),))]
    assert finish_reward(once) == 1.0 and finish_reward(padded) == 0.5 and finish_reward(later) == pytest.approx(2 / 3)
    assert parallel_reward(padded) == parallel_reward(once) == 0.5
    assert redundancy(padded) == 0.5


def test_what_failed_may_be_given_again_and_counts_once():
    episode = [Stage(1, (Subtask(3, "ash", False), Subtask(3, "elm"))), Stage(1, (Subtask(3, "ash"),))]
    assert redundancy(episode) == 0.0 and finish_reward(episode) == pytest.approx(2 / 3)


def test_subtasks_one_after_the_other_are_not_parallel():
    assert parallel_reward([Stage(1, (Subtask(1, name),)) for name in "abcd"]) == 0.25
    assert parallel_reward([Stage(1, tuple(Subtask(1, name) for name in "abcd"))]) == 1.0
    with pytest.raises(ValueError, match="at least one"):
        parallel_reward([], 0)


def test_item_f1_is_that_of_sets_worked_by_hand():
    assert item_f1("abc", "bcde") == pytest.approx(4 / 7)  # precision 2/3, recall 2/4
    assert item_f1(["a", "a", "a"], ["a", "b"]) == pytest.approx(2 / 3)
    assert (item_f1([], "ab"), item_f1([], []), item_f1("ab", "ab")) == (0.0, 1.0, 1.0)
    assert math.isnan(item_f1("ab", None))  # bug 62


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_item_f1_is_symmetric_bounded_and_one_only_for_equals(some, others):
    assert item_f1(some, others) == item_f1(others, some)
    assert 0 <= item_f1(some, others) <= 1 and (item_f1(some, others) == 1) == (some == others)


def test_a_table_is_read_by_row_and_column_wherever_its_columns_stand():
    table = "Here:\n\n| Tower | Height | City |\n|:---|---:|---|\n| Ash | 31 | **Rome** |\n| Elm | | Oslo |\n\nDone."
    assert table_items(table) == {("ash", "tower", "ash"), ("ash", "height", "31"), ("ash", "city", "**rome**"),
                                  ("elm", "tower", "elm"), ("elm", "city", "oslo")}  # fmt: skip
    other = "|tower|city|height|\n|-|-|-|\n| elm | Oslo | |\n|ASH|**Rome**|31|"
    assert table_items(other) == table_items(table) and table_items("no table") == frozenset()


def test_prompts_are_compared_without_case_space_and_ends():
    assert normalised(" Height of\tthe  ASH tower?") == normalised("height of the ash tower") != normalised("height of the ash-tower")


def test_the_shaping_rewards_anneal_to_nothing():
    assert [lambdas(progress) for progress in (-1, 0, 0.5, 1, 2)] == [(0.5, 0.5), (0.5, 0.5), (0.2, 0.2), (0.0, 0.0), (0.0, 0.0)]
    assert lambdas(0.25) == pytest.approx((0.35, 0.35)) and lambdas(0.75) == pytest.approx((0.1, 0.1))
    sizes = [sum(lambdas(step / 50)) for step in range(51)]
    assert sizes == sorted(sizes, reverse=True) and LAMBDAS[-1][1:] == (0.0, 0.0)


def test_the_reward_is_the_weighted_sum_and_unknown_where_the_task_is():
    episode = [Stage(1, (Subtask(3, "a"), Subtask(3, "b", False)))]
    assert reward(episode, 0.75, 0.0) == pytest.approx(0.5 * 0.5 + 0.5 * 0.5 + 0.75)
    assert reward(episode, 0.75, 1.0) == 0.75
    assert math.isnan(reward(episode, math.nan, 0.0))
