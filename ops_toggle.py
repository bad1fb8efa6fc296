"""The operations of token-efficient learning: Toggle's budgets and rewards, the choice for fine-tuning — K2.5 report 2.3.

Public names: OPS, toggle_budgets, toggle_rewards, rft_select.
Letters: R responses, G prompts.     Tests: pytest tests/test_ops_toggle.py
"""

import math
import random
from types import SimpleNamespace

import torch
from hypothesis import strategies as st

import objective
from op import Op, Suspect

# ---------------------------------------------------------------------------------------------- Toggle


def toggle_budgets(lengths, correct, groups, prompts, percentile):
    """Token budgets for Toggle: of each prompt the percentile of the lengths of its correct responses.

    Of the n lengths, sorted, it is entry (n − 1) · percentile / 100, counted from 0 and interpolated linearly between two
    neighbours. A prompt without a correct response has no budget: ∞.
    lengths: (R,) int64 — generated tokens; correct: (R,) bool; groups: (R,) int64 — prompt of each response, 0…G−1; prompts:
    int — G; percentile: float, 0…100. Returns budgets (G,) float32. Source: K2.5 report 2.3, Toggle.
    """
    budgets = torch.full((prompts,), math.inf)
    for prompt in range(prompts):
        mine = sorted(lengths[(groups == prompt) & correct].tolist())
        if mine:
            place = (len(mine) - 1) * percentile / 100
            below, above = mine[math.floor(place)], mine[math.ceil(place)]
            budgets[prompt] = below + (place - math.floor(place)) * (above - below)
    return budgets


@st.composite
def _budget_cases(draw):
    prompts = draw(st.integers(1, 3))
    row = st.tuples(st.sampled_from([7, 4, 10, 25, 40]), st.sampled_from([True, True, False]), st.integers(0, prompts - 1))
    rows = draw(st.lists(row, min_size=3, max_size=9))
    lengths, correct, groups = (torch.tensor(column) for column in zip(*rows))
    percentile = draw(st.sampled_from([80.0, 50.0, 25.0, 90.0, 0.0, 100.0]))
    return {"lengths": lengths, "correct": correct, "groups": groups, "prompts": prompts, "percentile": percentile}


def _budgets(of=lambda mine, q: mine.double().quantile(q / 100), empty=math.inf, chosen=lambda correct: correct,
             same=lambda groups, prompt: groups == prompt):  # fmt: skip
    """`toggle_budgets`, open to mistakes: of(lengths of a prompt's correct responses, percentile) → its budget."""

    def budgets(lengths, correct, groups, prompts, percentile):
        mine = [lengths[same(groups, prompt) & chosen(correct)] for prompt in range(prompts)]
        none = empty(lengths, correct, percentile) if callable(empty) else empty
        return torch.tensor([float(of(m, percentile)) if len(m) else float(none) for m in mine])

    return budgets


def _rank(rounded):
    """The percentile as one of the lengths: its place rounded by `rounded`."""
    return lambda mine, percentile: mine.sort().values[rounded((len(mine) - 1) * percentile / 100)]


def _global_budget(lengths, correct, percentile):
    return lengths[correct].double().quantile(percentile / 100) if correct.any() else math.inf


def _budgets_of_objective(lengths, correct, groups, prompts, percentile):
    return objective.toggle_budgets([lengths[(groups == p) & correct].tolist() for p in range(prompts)], percentile)


def toggle_rewards(rewards, lengths, groups, valid, budgets, iteration, period, lam):
    """Rewards as Toggle gives them to one iteration.

        phase 0, ⌊iteration / period⌋ even:  r̃_j = r_j · 1{ mean of the prompt's rewards < λ  or  length_j ≤ budget }
        phase 1, odd:                        r̃_j = r_j

    The mean is over the valid responses of the prompt; an invalid one's reward comes back as it is.
    rewards: (R,) float, 0…1, whatever where invalid; lengths: (R,) int64, generated tokens; groups: (R,) int64 — prompt of
    each response, 0…G−1; valid: (R,) bool; budgets: (G,) float, tokens, ∞ for none; iteration: int, from 0; period: int;
    lam: float — λ. Returns shaped (R,), dtype of rewards. Source: K2.5 report 2.3, Toggle.
    """
    shaped = rewards.clone()
    if iteration // period % 2 == 1:
        return shaped
    for j in range(len(rewards)):
        peers = [rewards[k] for k in range(len(rewards)) if groups[k] == groups[j] and valid[k]]
        if valid[j] and not (sum(peers) / len(peers) < lam or lengths[j] <= budgets[groups[j]]):
            shaped[j] = 0.0
    return shaped


# λ → rewards of a prompt's two valid responses, the first of them over the budget, whose mean is above, at and below λ.
_MEANS = {
    0.5: (((1.0, 1.0), (0.25, 1.0)), ((1.0, 0.0), (0.25, 0.75)), ((0.25, 0.5), (0.5, 0.0))),
    0.75: (((1.0, 1.0), (0.625, 1.0)), ((1.0, 0.5), (0.5, 1.0)), ((0.5, 0.25), (1.0, 0.25))),
    0.25: (((0.5, 0.5), (0.125, 0.75)), ((0.25, 0.25), (0.5, 0.0)), ((0.125, 0.25), (0.25, 0.0))),
}


@st.composite
def _toggle_cases(draw):
    """Prompts with a mean above, at and below λ, one response over the budget and one just within it, perhaps a failed one."""
    lam, period = draw(st.sampled_from(list(_MEANS))), draw(st.integers(1, 3))
    rows, budgets = [], []
    for prompt, mean in enumerate([0, *draw(st.lists(st.sampled_from([2, 1, 0]), min_size=1, max_size=3))]):
        budgets.append(draw(st.sampled_from([5.0, 3.0, 6.5, math.inf] if prompt else [5.0, 3.0])))
        most = int(min(budgets[-1], 9))
        over, within = draw(st.sampled_from(_MEANS[lam][mean]))
        rows += [(over, most + draw(st.integers(1, 3)), prompt, True), (within, most, prompt, True)]
        if draw(st.booleans()):
            rows.append((draw(st.sampled_from([0.75, math.nan, 0.0])), most + 1, prompt, False))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).tolist()
    rewards, lengths, groups, valid = (torch.tensor(column) for column in zip(*(rows[place] for place in order)))
    return {
        "rewards": rewards, "lengths": lengths, "groups": groups, "valid": valid, "budgets": torch.tensor(budgets),
        "iteration": draw(st.integers(0, 4 * period)), "period": period, "lam": lam,
    }  # fmt: skip


def _toggle(keep=lambda s: (s.mean < s.lam) | (s.lengths <= s.budget), phase=lambda t, m: t // m % 2,
            mean=lambda s: (s.known * s.members).sum(1) / s.members.sum(1).clamp(min=1),
            cut=lambda s: 0.0 * s.known):  # fmt: skip
    """`toggle_rewards` in parts: keep(s) and cut(s) see the mean of each response's prompt, its length and its budget."""

    def shape(rewards, lengths, groups, valid, budgets, iteration, period, lam):
        s = SimpleNamespace(known=rewards.masked_fill(~valid, 0.0), lengths=lengths, valid=valid, lam=lam, raw=rewards,
                            budget=budgets[groups], members=(groups[:, None] == groups) & valid)  # fmt: skip
        s.mean = mean(s)
        return torch.where(keep(s) | ~valid, rewards, cut(s)) if phase(iteration, period) == 0 else rewards.clone()

    return shape


# ------------------------------------------------------------------- rejection-sampling fine-tuning


def rft_select(responses, rewards, valid, groups, threshold, most):
    """Which responses to fine-tune on: of each prompt at most `most` different ones, valid and with reward ≥ threshold.

    Within a prompt the higher reward comes first, then the shorter response, then the earlier one. A response of the same
    tokens as one that is already taken for its prompt is left out.
    responses: list of lists of token ids; rewards: list of float, whatever where invalid; valid: list of bool; groups: list
    of int — prompt of each; threshold: float; most: int. Returns chosen: list of indices, ascending. Source: K2.5 report 2.3.
    """
    chosen = []
    good = [j for j in range(len(responses)) if valid[j] and rewards[j] >= threshold]
    for j in sorted(good, key=lambda j: (-rewards[j], len(responses[j]), j)):
        mine = [k for k in chosen if groups[k] == groups[j]]
        if len(mine) < most and responses[j] not in [responses[k] for k in mine]:
            chosen.append(j)
    return sorted(chosen)


@st.composite
def _rft_cases(draw):
    """Equal rewards of different lengths, a lower one and equal tokens in one prompt, and whatever else, shuffled."""
    top, threshold = draw(st.sampled_from([1.0, 0.75, 0.5])), draw(st.sampled_from([0.5, 0.75]))
    rows = [([3, 3, 3], top, True, 0), ([1, 2], top, True, 0), ([2], 0.5, True, 0)]
    rows.append(draw(st.sampled_from(rows)))
    tokens, values = st.sampled_from([[1], [2], [1, 2], [3, 3, 3]]), st.sampled_from([1.0, 0.75, 0.5, 0.0])
    rows += draw(st.lists(st.tuples(tokens, values, st.sampled_from([True, True, False]), st.sampled_from([0, 4])), max_size=4))
    random.Random(draw(st.integers(0, 999))).shuffle(rows)
    responses, rewards, valid, groups = (list(column) for column in zip(*rows))
    return {"responses": responses, "rewards": rewards, "valid": valid, "groups": groups, "threshold": threshold,
            "most": draw(st.integers(1, 3))}  # fmt: skip


def _select(order=lambda s, j: (-s.rewards[j], len(s.responses[j]), j), good=lambda s, j: s.valid[j] and s.rewards[j] >= s.threshold,
            prompt=lambda s, j: s.groups[j], content=lambda s, j: tuple(s.responses[j]), result=sorted):  # fmt: skip
    """`rft_select` in parts."""

    def select(responses, rewards, valid, groups, threshold, most):
        s = SimpleNamespace(responses=responses, rewards=rewards, valid=valid, groups=groups, threshold=threshold)
        chosen, counts, known = [], {}, set()
        for j in sorted((j for j in range(len(responses)) if good(s, j)), key=lambda j: order(s, j)):
            place = prompt(s, j)
            if counts.get(place, 0) < most and (groups[j], content(s, j)) not in known:
                chosen.append(j)
                counts[place] = counts.get(place, 0) + 1
                known.add((groups[j], content(s, j)))
        return result(chosen)

    return select


# ------------------------------------------------------------------------------------------------- ops

OPS = (
    Op(
        name="toggle_budgets",
        formula="budget = percentile of the lengths of the prompt's correct responses, infinite without any",
        source="K2.5 report 2.3",
        reference=toggle_budgets,
        cases=_budget_cases(),
        outputs=("budgets",),
        twins={"objective": _budgets_of_objective},
        variants={"by_quantile": _budgets()},
        suspects=(
            Suspect("wrong_ones_too", "lengths of wrong responses count too", _budgets(chosen=torch.ones_like)),
            Suspect("global_without", "a prompt without a correct response gets everybody's percentile", _budgets(empty=_global_budget)),
            Suspect("whole_batch", "one budget for all prompts", _budgets(same=lambda groups, prompt: torch.ones_like(groups) > 0)),
            Suspect("mean", "the mean instead of the percentile", _budgets(of=lambda mine, q: mine.double().mean())),
            Suspect("longest", "the longest correct response instead of the percentile", _budgets(of=lambda mine, q: mine.max())),
            Suspect("shortest", "the shortest correct response instead of the percentile", _budgets(of=lambda mine, q: mine.min())),
            Suspect("rank_below", "the length below is taken; it is interpolated", _budgets(of=_rank(math.floor))),
            Suspect("rank_above", "the length above is taken; it is interpolated", _budgets(of=_rank(math.ceil))),
            Suspect("from_the_top", "the percentile is counted from the longest",
                    _budgets(of=lambda mine, q: mine.double().quantile(1 - q / 100))),
            Suspect("different_lengths", "equal lengths count once", _budgets(of=lambda mine, q: mine.unique().double().quantile(q / 100))),
            Suspect("zero_without", "a prompt without a correct response gets the budget 0: all it says is cut", _budgets(empty=0.0)),
            Suspect("nan_without", "a prompt without a correct response gets NaN, which no length is within", _budgets(empty=math.nan)),
        ),
    ),
    Op(
        name="toggle_rewards",
        formula="phase 0: r 1{mean r < lam or length <= budget}; phase 1: r; phase = floor(iteration / period) mod 2",
        source="K2.5 report 2.3",
        reference=toggle_rewards,
        cases=_toggle_cases(),
        outputs=("shaped",),
        exact=("shaped",),
        dtypes=(torch.float32, torch.float64),
        twins={"objective": lambda rewards, lengths, groups, valid, *rest:
               objective.toggle_rewards(rewards, lengths, groups, *rest, valid=valid)},
        variants={"in_parts": _toggle()},
        suspects=(
            Suspect("misread", "the condition is turned: accuracy above λ keeps the reward; below λ it must be kept",
                    _toggle(keep=lambda s: (s.mean > s.lam) | (s.lengths <= s.budget))),
            Suspect("not_strict", "an accuracy of just λ frees from the budget; < is strict",
                    _toggle(keep=lambda s: (s.mean <= s.lam) | (s.lengths <= s.budget))),
            Suspect("budget_strict", "a response of just the budget is cut; ≤ includes it",
                    _toggle(keep=lambda s: (s.mean < s.lam) | (s.lengths < s.budget))),
            Suspect("both_needed", "or is read as and", _toggle(keep=lambda s: (s.mean < s.lam) & (s.lengths <= s.budget))),
            Suspect("whole_batch", "the accuracy is that of the batch instead of the prompt's",
                    _toggle(mean=lambda s: (s.known.sum() / s.valid.sum()).expand(len(s.known)))),
            Suspect("own_reward", "the response's own reward stands for the accuracy", _toggle(mean=lambda s: s.known)),
            Suspect("rigid", "the budget binds whatever the accuracy is", _toggle(keep=lambda s: s.lengths <= s.budget)),
            Suspect("never", "the budget never binds", _toggle(keep=lambda s: s.valid | ~s.valid)),
            Suspect("failure_is_zero", "invalid responses lower the accuracy as if they were wrong",
                    _toggle(mean=lambda s: (s.known * s.members).sum(1) / (s.members | ~s.valid & _same(s.budget)).sum(1))),
            Suspect("every_other", "the period is ignored: phases alternate with every iteration", _toggle(phase=lambda t, m: t % 2)),
            Suspect("by_remainder", "the phase is iteration mod period instead of the parity of their quotient",
                    _toggle(phase=lambda t, m: t % m)),
            Suspect("from_one", "iterations are counted from 1: phases change one too early", _toggle(phase=lambda t, m: (t + 1) // m % 2)),
            Suspect("always", "there is no second phase: the budget always binds", _toggle(phase=lambda t, m: 0)),
            Suspect("phases_swapped", "the budget binds in the odd phases", _toggle(phase=lambda t, m: 1 - t // m % 2)),
            Suspect("negative", "a response over the budget gets −1 instead of 0", _toggle(cut=lambda s: -torch.ones_like(s.known))),
            Suspect("scaled", "a response over the budget loses in proportion instead of everything",
                    _toggle(cut=lambda s: s.known * s.budget / s.lengths)),
        ),
    ),
    Op(
        name="rft_select",
        formula="per prompt at most `most` different valid responses of reward >= threshold: best, shortest, earliest first",
        source="K2.5 report 2.3",
        reference=rft_select,
        cases=_rft_cases(),
        outputs=("chosen",),
        twins={"objective": objective.rft_select},
        variants={"in_parts": _select()},
        suspects=(
            Suspect("invalid_taken", "invalid responses are taken", _select(good=lambda s, j: s.rewards[j] >= s.threshold)),
            Suspect("threshold_strict", "a reward of just the threshold is refused",
                    _select(good=lambda s, j: s.valid[j] and s.rewards[j] > s.threshold)),
            Suspect("no_threshold", "the threshold is ignored", _select(good=lambda s, j: s.valid[j])),
            Suspect("duplicates_kept", "the same tokens are taken twice for one prompt", _select(content=lambda s, j: j)),
            Suspect("most_of_all", "the limit is of the batch instead of the prompt", _select(prompt=lambda s, j: 0)),
            Suspect("no_limit", "there is no limit per prompt", _select(prompt=lambda s, j: j)),
            Suspect("length_ignored", "of equal rewards the earlier response is taken though another is shorter",
                    _select(order=lambda s, j: (-s.rewards[j], j))),
            Suspect("earliest_first", "the earliest are taken instead of the best", _select(order=lambda s, j: j)),
            Suspect("longest_first", "of equal rewards the longer response is taken",
                    _select(order=lambda s, j: (-s.rewards[j], -len(s.responses[j]), j))),
            Suspect("latest_first", "of equal rewards and lengths the later response is taken",
                    _select(order=lambda s, j: (-s.rewards[j], len(s.responses[j]), -j))),
            Suspect("worst_first", "the lowest rewards are taken first",
                    _select(order=lambda s, j: (s.rewards[j], len(s.responses[j]), j))),
            Suspect("not_sorted", "indices come in the order of choice instead of ascending", _select(result=list)),
        ),
    ),
)  # fmt: skip
