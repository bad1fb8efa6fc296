"""Critical steps and the reward of an orchestrator, as pure functions of a recorded episode — K2.5 report 3 and E.8.

    episode = (Stage(1, (Subtask(10), Subtask(10), Subtask(10))), Stage(1))     # three side by side, then an answer
    critical_steps(episode)                                                     # 12; total_steps(episode) is 32

An episode is a sequence of stages. A stage is what the orchestrator does by itself, a step as a rule, and the subtasks that it
gives away with that step: they run side by side, and it waits for all of them. A step is one answer of a model.

    critical steps   Σ_t ( S_main(t) + max_i S_sub,i(t) ), over every subtask: finished, failed, cut off, or without a step
    reward           λ1·r_parallel + λ2·r_finish + r_perf, with λ1 and λ2 annealed to 0
    r_parallel       against serial collapse: distinct subtasks side by side, at most, out of so many that are enough
    r_finish         against spurious parallelism: the share of subtasks given away that were finished; 0 when there was none
    r_perf           the task's own measure, such as item-F1

A subtask given again after it was finished, or while it runs, earns nothing and counts among those given away (bug 64).
The report gives neither the formula of r_parallel nor λ; both are arguments here.

`longest_path` finds critical steps another way: over the graph of single steps, each of which waits for some others.

Public names: Stage, Subtask, critical_steps, total_steps, step_graph, longest_path, normalised, width, parallel_reward, finish_reward,
redundancy, table_items, item_f1, lambdas, LAMBDAS, reward.     Tests: pytest tests/test_critical.py
"""

import math
import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Subtask:
    """One assignment of an episode. Raises ValueError for negative steps."""

    steps: int  # answers that the subagent gave, whatever came of them
    prompt: str = ""  # by which repetitions are known; "" is never one
    finished: bool = True  # whether it returned an answer of its own accord

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"a subtask of {self.steps} steps: there are none or more")


@dataclass(frozen=True)
class Stage:
    """What the orchestrator does by itself, and then what runs side by side. Raises ValueError for negative steps."""

    main: int = 1
    subtasks: tuple[Subtask, ...] = ()

    def __post_init__(self):
        if self.main < 0:
            raise ValueError(f"a stage of {self.main} steps of the orchestrator: there are none or more")


# ------------------------------------------------------------------------------------------------ steps


def critical_steps(episode):
    """Σ_t ( S_main(t) + max_i S_sub,i(t) ), the time of an episode in steps. episode: sequence of Stage. Returns int."""
    return sum(stage.main + max((subtask.steps for subtask in stage.subtasks), default=0) for stage in episode)


def total_steps(episode):
    """Steps of everybody: the work of an episode. Returns int."""
    return sum(stage.main + sum(subtask.steps for subtask in stage.subtasks) for stage in episode)


def step_graph(episode):
    """Every single step with the steps that it waits for: {step: tuple of steps}.

    Steps are named (stage, "main", number) and (stage, place of the subtask, number). The first step of a stage waits for
    the last ones of all before it. Keys are in no order that matters.
    """
    graph, before = {}, ()
    for place, stage in enumerate(episode):
        for number in range(stage.main):
            graph[place, "main", number] = before
            before = ((place, "main", number),)
        ends = []
        for who, subtask in enumerate(stage.subtasks):
            waits = before
            for number in range(subtask.steps):
                graph[place, who, number] = waits
                waits = ((place, who, number),)
            ends += waits if subtask.steps else ()
        before = tuple(ends) or before
    return graph


def longest_path(graph):
    """The steps of a longest chain of waiting, first to last; one of them when there are several.

    graph: {step: steps that it waits for}. Each step is taken once all that it waits for were (Kahn). Returns tuple of steps, whose
    length is the number of critical steps. Raises ValueError for a circle or a step that waits for one that is not there.
    """
    missing, followers = {}, {step: [] for step in graph}
    for step, waits in graph.items():
        missing[step] = len(waits)
        for other in waits:
            if other not in followers:
                raise ValueError(f"{step} waits for {other}, which is no step")
            followers[other].append(step)
    ready = [step for step, count in missing.items() if count == 0]
    length, previous = dict.fromkeys(ready, 1), dict.fromkeys(ready)
    for step in ready:  # grows meanwhile
        for follower in followers[step]:
            if length[step] + 1 > length.get(follower, 0):
                length[follower], previous[follower] = length[step] + 1, step
            missing[follower] -= 1
            if missing[follower] == 0:
                ready.append(follower)
    if len(ready) < len(graph):
        raise ValueError(f"{len(graph) - len(ready)} steps wait for each other in a circle")
    step, path = max(length, key=length.get, default=None), []
    while step is not None:
        path.append(step)
        step = previous[step]
    return tuple(reversed(path))


# ---------------------------------------------------------------------------------------------- rewards


def normalised(text):
    """The form in which prompts and items are compared: NFKC, case folded, runs of white space one space, without
    . , ; : ! ? and quotes at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .,;:!?'\"`‘’“”")


def _repeated(episode):
    """Per stage, whether each of its subtasks repeats one that was finished in an earlier stage, or one beside it.

    Of equal ones side by side a finished one stands for all, wherever it is. One that failed may be given again later.
    """
    finished, flags = set(), []
    for stage in episode:
        names, here = [normalised(subtask.prompt) for subtask in stage.subtasks], set()
        flags.append([False] * len(names))
        for place in sorted(range(len(names)), key=lambda place: not stage.subtasks[place].finished):
            flags[-1][place] = bool(names[place]) and names[place] in finished | here
            here.add(names[place])
        finished |= {name for name, subtask in zip(names, stage.subtasks) if subtask.finished}
    return flags


def width(episode):
    """The most distinct subtasks of one stage. Returns int."""
    return max((flags.count(False) for flags in _repeated(episode)), default=0)


def parallel_reward(episode, enough=4):
    """r_parallel = min(1, width / enough). enough: int ≥ 1. Returns float of 0…1."""
    if enough < 1:
        raise ValueError(f"enough is {enough}: at least one subtask")
    return min(1.0, width(episode) / enough)


def finish_reward(episode):
    """r_finish = distinct finished subtasks / all subtasks given away, repetitions included; 0.0 when there was none."""
    given = [pair for stage, flags in zip(episode, _repeated(episode)) for pair in zip(stage.subtasks, flags)]
    return sum(subtask.finished and not repeated for subtask, repeated in given) / len(given) if given else 0.0


def redundancy(episode):
    """The share of subtasks that repeat another: to be logged beside r_finish. 0.0 when there was none."""
    flags = [flag for stage in _repeated(episode) for flag in stage]
    return sum(flags) / len(flags) if flags else 0.0


def table_items(text):
    """The items of a Markdown table: one (row's name, column's name, value) per cell that is not empty, normalised.

    A row is named by its first cell. Text before, after and without a table is not looked at; of several tables all count.
    Returns frozenset of triples.
    """
    items, head = set(), None
    for line in text.splitlines():
        cells = [normalised(cell) for cell in line.strip().strip("|").split("|")] if "|" in line else []
        if not cells:
            head = None
        elif head is None:
            head = cells
        elif not all(set(cell) <= set("-: ") for cell in line.strip().strip("|").split("|")):
            items |= {(cells[0], column, cell) for column, cell in zip(head, cells) if cell}
    return frozenset(items)


def item_f1(given, truth):
    """r_perf: F1 of a set of items, 2·|both| / (|given| + |truth|). Of two empty sets 1.0.

    given, truth: collections of hashable items, repetitions not counted; truth None: not known. Returns float of 0…1, or NaN where
    the truth is not known, so that nobody takes it for a 0 (bug 62).
    """
    if truth is None:
        return math.nan
    given, truth = set(given), set(truth)
    return 2 * len(given & truth) / (len(given) + len(truth)) if given or truth else 1.0


LAMBDAS = ((0.0, 0.5, 0.5), (0.5, 0.2, 0.2), (1.0, 0.0, 0.0))  # (progress of training, λ1, λ2)


def lambdas(progress, knots=LAMBDAS):
    """(λ1, λ2) at a progress of training, straight between the knots and as at the ends beyond them."""
    for (start, *left), (end, *right) in zip(knots, knots[1:]):
        if progress < end:
            share = max(0.0, (progress - start) / (end - start))
            return tuple(a + share * (b - a) for a, b in zip(left, right))
    return tuple(knots[-1][1:])


def reward(episode, performance, progress, enough=4, knots=LAMBDAS):
    """r = λ1·r_parallel + λ2·r_finish + r_perf. performance: r_perf, 0…1, or NaN when not known; progress: 0…1. Returns float,
    NaN when r_perf is: such an episode must leave the batch."""
    first, second = lambdas(progress, knots)
    return first * parallel_reward(episode, enough) + second * finish_reward(episode) + performance
