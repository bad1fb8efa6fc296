"""The operations of a swarm: critical steps, item-F1, the orchestrator's reward, and which tokens learn from it — K2.5 report 3.

An episode is arrays: T stages one after the other, in each of them S places for subtasks that run side by side. `given` says in
which places there is a subtask; what stands in the others may be anything. critical.py has the same as objects.

Public names: OPS, critical_steps, item_f1, parl_reward, swarm_advantages.
Letters: T stages, S subtasks of a stage, N items given, M true, K knots, R episodes, L tokens.     Tests: pytest tests/test_ops_swarm.py
"""

import math
import random
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import critical
import objective
import ops_rl
from op import Op, Suspect


def _random(draw, *drawn):
    """A random.Random of some numbers that are drawn, and of those that were: inputs that differ a little then differ in kind."""
    return random.Random(str([*drawn, *draw(st.lists(st.integers(0, 9999), min_size=3, max_size=3))]))


# -------------------------------------------------------------------------------------- critical steps


def critical_steps(main, steps, given, finished):
    """The time of an episode in steps: of subtasks side by side only the longest counts.

        critical = Σ_t ( main_t + max_i steps_ti )        over every subtask i of stage t; without one the maximum is 0

    A step is one answer of a model. A subtask that failed or was cut off has taken its time like any other.
    main: (T,) int64 — steps of the orchestrator in each stage, 0 or more; steps: (T,S) int64 — answers of each subagent, 0 or
    more; given: (T,S) bool — where there is a subtask; finished: (T,S) bool — whether it returned an answer of its own accord.
    T and S may be 0; steps and finished are whatever where nothing was given.
    Returns critical () int64. Source: K2.5 report 3, critical steps.
    """
    total = 0
    for own, stage, there in zip(main.tolist(), steps.tolist(), given.tolist()):
        total += own + max([count for count, is_one in zip(stage, there) if is_one], default=0)
    return torch.tensor(total)


@st.composite
def _step_cases(draw):
    """Two stages of unlike subtasks side by side, one without any, and what else comes, in any order."""
    rng = _random(draw)
    stages = [[(count, rng.random() < 0.6) for count in rng.sample([0, 1, 2, 3, 5, 8], rng.randint(2, 3))] for _ in range(2)]
    stages += [[] for _ in range(draw(st.sampled_from([1, 1, 0])))]
    stages += draw(st.lists(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=3), max_size=2))
    rng.shuffle(stages)
    kind = draw(st.sampled_from(["", "", "", "", "", "no subtasks", "no stages"]))
    stages = {"": stages, "no subtasks": [[] for _ in stages], "no stages": []}[kind]
    steps, finished, given = _arrays(stages, rng, lambda: (rng.choice([0, 4, 9]), rng.random() < 0.5))
    main = torch.tensor([rng.choice([1, 2, 1, 0, 3]) for _ in stages], dtype=torch.int64)
    return {"main": main, "steps": steps, "given": given, "finished": finished.bool()}


def _arrays(stages, rng, nothing):
    """Stages of pairs of numbers as two arrays (T,S) int64, and which places are filled (T,S); nothing() → what stands in others.

    The subtasks keep their order and leave gaps."""
    width = max(map(len, stages), default=0)
    width += rng.randint(0, 1) if width else 0
    rows, given = [], []
    for stage in stages:
        places = sorted(rng.sample(range(width), len(stage)))
        rows.append([nothing() for _ in range(width)])
        for place, pair in zip(places, stage):
            rows[-1][place] = pair
        given.append([place in places for place in range(width)])
    pairs = torch.tensor(rows, dtype=torch.int64).view(len(stages), width, 2)
    return pairs[..., 0].clone(), pairs[..., 1].clone(), torch.tensor(given, dtype=torch.bool).view(len(stages), width)


def _episode(given, steps=None, prompts=None, finished=None, main=None):
    """The arrays as stages of critical.py; what is not said is one step, unlike all others, finished."""
    stages = []
    for t in range(len(given)):
        places = given[t].nonzero().flatten().tolist()
        subtasks = tuple(critical.Subtask(1 if steps is None else int(steps[t, i]), "" if prompts is None else f"task {int(prompts[t, i])}",
                                          finished is None or bool(finished[t, i])) for i in places)  # fmt: skip
        stages.append(critical.Stage(1 if main is None else int(main[t]), subtasks))
    return stages


def _by_graph(main, steps, given, finished):
    """Another way: the longest chain of single steps that wait for each other."""
    return torch.tensor(len(critical.longest_path(critical.step_graph(_episode(given, steps, main=main)))))


def _critical(counted=lambda s: s.steps * s.given, longest=lambda s: s.counted.amax(1), main=lambda s: s.main,
              total=lambda s: (s.own + s.longest).sum()):  # fmt: skip
    """`critical_steps` in parts. counted: steps (T,S+1), the last of them 0; longest (T,), own (T,)."""

    def whole(main_steps, steps, given, finished):
        steps, given, finished = F.pad(steps, (0, 1)), F.pad(given, (0, 1)), F.pad(finished, (0, 1))
        s = SimpleNamespace(main=main_steps, steps=steps, given=given, finished=finished, number=given.sum(1))
        s.counted = counted(s)
        s.longest, s.own = longest(s), main(s)
        result = total(s)
        return result.long() if result.isfinite() else result

    return whole


def _without(value):
    """The maxima as floats, `value` where a stage has no subtask."""
    return lambda s: torch.where(s.number > 0, s.counted.amax(1).double(), value)


def _first(s):
    return s.steps.gather(1, s.given.int().argmax(1, keepdim=True))[:, 0] * (s.number > 0)


def _shortest(s):
    return s.steps.masked_fill(~s.given, 99).amin(1) * (s.number > 0)


# --------------------------------------------------------------------------------------------- item-F1


def item_f1(given, truth):
    """F1 of a set of items against the true ones.

        F1 = 2 · |both| / (|given| + |truth|),    1 where both are empty, NaN where the truth is not known

    given: (N,) int64, the items' numbers; truth: (M,) int64, or None where it is not known. Both are sets: an item counts once,
    however often it stands there. NaN, so that nobody takes what was not judged for a 0.
    Returns f1 () float32, 0…1 or NaN. Source: K2.5 report 3, 5.2 (WideSearch).
    """
    if truth is None:
        return torch.tensor(math.nan)
    given, truth = set(given.tolist()), set(truth.tolist())
    both = len(given & truth)
    return torch.tensor(2 * both / (len(given) + len(truth)) if given or truth else 1.0)


@st.composite
def _item_cases(draw):
    """Some items of both, some of one alone, some of them twice; empty sets; an unknown truth."""
    common, more, missing = draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    rng = _random(draw, common, more, missing)
    numbers = rng.sample(range(20), 9)
    both, more, missing = numbers[:common], numbers[3 : 3 + more], numbers[6 : 6 + missing]
    twice = rng.choices(both, k=rng.choice([0, 1]))  # on both sides
    given, truth = both + more + twice + rng.choices(both + more, k=rng.choice([0, 1, 2])), both + missing + twice
    rng.shuffle(given)
    rng.shuffle(truth)
    kind = rng.choice(["both", "both", "both", "neither", "unknown", "one side"])
    left = rng.random() < 0.5
    given = [] if kind == "neither" or kind in ("one side", "unknown") and left else given
    truth = [] if kind == "neither" or kind == "one side" and not left else truth
    return {"given": torch.tensor(given).long(), "truth": None if kind == "unknown" else torch.tensor(truth).long()}


def _f1(score=lambda both, given, truth: 2 * both / (given + truth), empty=1.0, unknown=lambda given: math.nan,
        prepare=torch.unique, both=lambda given, truth: int(torch.isin(given, truth).sum())):  # fmt: skip
    """`item_f1` in parts."""

    def whole(given, truth):
        if truth is None:
            return torch.tensor(float(unknown(given)))
        given, truth = prepare(given), prepare(truth)
        if not len(given) and not len(truth):
            return torch.tensor(empty)
        return torch.tensor(float(score(both(given, truth), len(given), len(truth))))

    return whole


def _sorted_merge(given, truth):
    """Right: walk through both sorted lists at once."""
    if truth is None:
        return torch.tensor(math.nan)
    a, b = sorted(set(given.tolist())), sorted(set(truth.tolist()))
    i = j = both = 0
    while i < len(a) and j < len(b):
        both += a[i] == b[j]
        i, j = i + (a[i] <= b[j]), j + (b[j] <= a[i])
    return torch.tensor(both / ((len(a) + len(b)) / 2) if a or b else 1.0)


def _multiset(given, truth):
    return sum(min(int((given == item).sum()), int((truth == item).sum())) for item in given.unique())


def _ratio(a, b):
    return a / b if b else 0.0


def _by_place(given, truth):
    number = min(len(given), len(truth))
    return int((given[:number] == truth[:number]).sum())


# -------------------------------------------------------------------------------------- the reward


def parl_reward(prompts, given, finished, performance, progress, enough, knots):
    """The orchestrator's reward: for trying parallel work, for work that gets finished, and for the answer.

        reward      = λ1 · r_parallel + λ2 · r_finish + performance
        r_parallel  = min(1, most different subtasks of one stage / enough)
        r_finish    = different subtasks that were finished / all subtasks given, repetitions included; 0 when there was none
        λ1, λ2      straight between the knots at `progress`; before the first and after the last as there

    A subtask repeats when one of an equal prompt was finished in an earlier stage, or stands beside it: of equal ones side by side
    one counts, a finished one if there is any. Repetitions are no different subtasks. One that failed may be given again in a later
    stage.
    prompts: (T,S) int64 — equal numbers are equal prompts; given, finished: (T,S) bool; T and S may be 0, and prompts and finished
    are whatever where nothing was given; performance: () float, 0…1, or NaN where it is not known: then so is the reward;
    progress: float, 0…1 of the training; enough: int ≥ 1; knots: (K,3) float — progress (ascending), λ1, λ2.
    Returns reward, r_parallel, r_finish, lambda1, lambda2: each () of the dtype of performance.
    Source: K2.5 report 3, PARL; r_parallel and λ are K25's, the report gives neither.
    """
    done, most, earned, number = set(), 0, 0, 0
    for row, there, ended in zip(prompts.tolist(), given.tolist(), finished.tolist()):
        stage = [(prompt, over) for prompt, is_one, over in zip(row, there, ended) if is_one]
        new = {prompt for prompt, _ in stage} - done
        returned = {prompt for prompt, over in stage if over} - done
        most, earned, number = max(most, len(new)), earned + len(returned), number + len(stage)
        done |= returned
    parallel, finish = min(1.0, most / enough), earned / number if number else 0.0
    first, second = _lambdas(progress, knots.tolist())
    numbers = first * parallel + second * finish + performance.item(), parallel, finish, first, second
    return tuple(torch.tensor(value, dtype=performance.dtype) for value in numbers)


def _lambdas(progress, knots):
    for (start, *left), (end, *right) in zip(knots, knots[1:]):
        if progress < end:
            share = max(0.0, (progress - start) / (end - start))
            return [a + share * (b - a) for a, b in zip(left, right)]
    return knots[-1][1:]


_KNOTS = (
    [[0.0, 0.5, 0.25], [0.25, 0.25, 0.125], [1.0, 0.0, 0.0]],
    [[0.25, 0.5, 0.75], [0.5, 0.25, 0.25], [0.75, 0.125, 0.0]],
    [[0.25, 0.5, 0.5], [0.5, 0.2, 0.2], [0.875, 0.0, 0.0]],
    [[0.125, 0.25, 0.5], [0.75, 0.125, 0.125]],
)


@st.composite
def _reward_cases(draw):
    """Stages that repeat what was finished, what failed and what stands beside, the widest of them too; or nothing given at all."""
    rng = _random(draw)
    *numbers, other = rng.sample(range(9), 6)
    stages = [[(number, rng.random() < 0.6) for number in rng.sample(numbers, rng.choice(sizes))] for sizes in ((2, 3), (4, 4, 3))]
    stages.insert(rng.randint(0, 2), [(other, rng.random() < 0.6)])
    for stage in stages:  # a copy beside it, which mostly ends in the other way
        stage += [(number, over != (rng.random() < 0.7)) for number, over in rng.sample(stage, rng.choice([0, 1, 1]))]
        rng.shuffle(stage)
    stages.insert(rng.randint(0, 3), [])
    stages = [[] for _ in stages] if rng.random() < 0.2 else stages
    prompts, finished, given = _arrays(stages, rng, lambda: (rng.choice(numbers), True))
    return {"prompts": prompts, "given": given, "finished": finished.bool(),
            "performance": torch.tensor(rng.choice([0.5, 0.75, 0.25, math.nan])),
            "progress": draw(st.sampled_from([0.375, 0.0, 0.625, 0.9, 0.5, 1.0])), "enough": rng.choice([2, 3, 4, 5, 6]),
            "knots": torch.tensor(draw(st.sampled_from(_KNOTS)))}  # fmt: skip


def _reward_of_critical(prompts, given, finished, performance, progress, enough, knots):
    stages, schedule = _episode(given, None, prompts, finished), knots.tolist()
    value = critical.reward(stages, performance.item(), progress, enough, schedule)
    parts = critical.parallel_reward(stages, enough), critical.finish_reward(stages), *critical.lambdas(progress, schedule)
    return tuple(torch.tensor(number, dtype=performance.dtype) for number in (value, *parts))


# The reward step by step, over the n subtasks in one row; each of these may be replaced to make a mistake.
_STEPS = {
    "there": lambda s: s.given,
    "stage": lambda s: s.there.nonzero()[:, 0],  # (n,)
    "prompt": lambda s: s.prompts[s.there],
    "done": lambda s: s.finished[s.there],
    "same": lambda s: s.prompt[:, None] == s.prompt,  # (n,n)
    "beside": lambda s: s.stage[:, None] == s.stage,
    "before": lambda s: s.same & s.done & (s.stage[:, None] > s.stage),  # equal, finished, in an earlier stage
    "place": lambda s: torch.arange(len(s.stage)) - 1000 * s.done,  # of equal ones side by side the first counts
    "copies": lambda s: s.same & s.beside & (s.place[:, None] > s.place),
    "new": lambda s: ~(s.before | s.copies).any(1),
    "counted": lambda s: s.new,  # for the width
    "widths": lambda s: _per_stage(s.counted, s),  # (T,)
    "most": lambda s: max(s.widths, default=0),
    "parallel": lambda s: min(1.0, s.most / s.enough),
    "earned": lambda s: int((s.new & s.done).sum()),
    "number": lambda s: len(s.stage),
    "finish": lambda s: s.earned / s.number if s.number else 0.0,
    "lambdas": lambda s: _interpolated(s.progress, s.knots),
    "known": lambda s: s.performance.item(),
    "reward": lambda s: s.lambdas[0] * s.parallel + s.lambdas[1] * s.finish + s.known,
}
_ARGUMENTS = ("prompts", "given", "finished", "performance", "progress", "enough", "knots")


def _parl(**changes):
    """`parl_reward` by _STEPS, some of them replaced."""

    def whole(*arguments):
        s = SimpleNamespace(**dict(zip(_ARGUMENTS, arguments)))
        for name, step in (_STEPS | changes).items():
            setattr(s, name, step(s))
        numbers = s.reward, s.parallel, s.finish, *s.lambdas
        return tuple(torch.tensor(float(number), dtype=s.performance.dtype) for number in numbers)

    return whole


def _per_stage(flags, s):
    return torch.bincount(s.stage[flags], minlength=len(s.given)).tolist()


def _interpolated(progress, knots):
    places, *columns = knots.double().T.numpy()
    return [float(np.interp(progress, places, column)) for column in columns]


def _extrapolated(s):
    places, knots = s.knots[:, 0].tolist(), s.knots.tolist()
    segment = max([k for k in range(len(knots) - 1) if places[k] <= s.progress], default=0)
    (start, *left), (end, *right) = knots[segment : segment + 2]
    return [a + (s.progress - start) / (end - start) * (b - a) for a, b in zip(left, right)]


def _knot_before(s):
    return s.knots[max(int((s.knots[:, 0] <= s.progress).sum()) - 1, 0), 1:].tolist()


def _mean_share(s):
    """The mean over stages of the share that was finished there."""
    numbers, good = _per_stage(s.new | ~s.new, s), _per_stage(s.new & s.done, s)
    shares = [a / b for a, b in zip(good, numbers) if b]
    return sum(shares) / len(shares) if shares else 0.0


# -------------------------------------------------------------------------------- tokens of a swarm


def swarm_advantages(rewards, groups, valid, context, writer):
    """What each token of a batch of episodes is to learn: only what the orchestrator wrote, where it wrote it.

        advantage_jl = r_j − mean of r over the valid episodes of the same prompt   where l is trained, else 0
        l is trained   where episode j is valid, the token stands in the orchestrator's own context and the orchestrator wrote it

    Subagents are frozen: what they write is an observation, in their own contexts and where it returns to the orchestrator's. So are
    system prompts, the question and results of tools. A prompt that the orchestrator gives away stands twice: where it was written,
    and as a copy in the subagent's context, where nobody sampled it.
    rewards: (R,) float, whatever where invalid, NaN too; groups: (R,) int64 — prompt of each episode; valid: (R,) bool;
    context: (R,L) int64 — in whose context the token stands: 0 the orchestrator's, 1, 2, … a subagent's, −1 padding;
    writer: (R,L) int64 — who wrote it: 0 the orchestrator, 1, 2, … a subagent, −1 none of them.
    Returns advantages (R,L), dtype of rewards; tokens () int64 — N, the number of trained tokens of the batch.
    Source: K2.5 report 3 (frozen subagents), 2.3 (equation 1).
    """
    advantages, number = torch.zeros(context.shape, dtype=rewards.dtype), 0
    for j in range(len(rewards)):
        peers = [rewards[k] for k in range(len(rewards)) if groups[k] == groups[j] and valid[k]]
        own = (context[j] == 0) & (writer[j] == 0)  # (L,)
        if valid[j]:
            advantages[j, own] = rewards[j] - sum(peers) / len(peers)
            number += int(own.sum())
    return advantages, torch.tensor(number)


@st.composite
def _token_cases(draw):
    """Episodes with no, one or two subagents each, whose contexts stand behind the orchestrator's; two of unequal reward in a group."""
    rng = _random(draw)
    number = draw(st.sampled_from([4, 3, 5]))
    groups = [5, 5, *(rng.choice([5, 3]) for _ in range(number - 2))]
    rewards, valid = [rng.choice([1.0, 0.0, 0.5, 1.25]) for _ in groups], [True] * number
    rewards[:2] = draw(st.sampled_from([(1.0, 0.25), (0.0, 0.5), (1.25, 0.75)]))
    if draw(st.booleans()):
        valid[-1], rewards[-1] = False, draw(st.sampled_from([0.75, 1.0, math.nan]))
    rows = [_tokens(rng, place < 1 or rng.random() < 0.6) for place in range(number)]
    order, length = rng.sample(range(number), number), max(map(len, rows)) + rng.randint(0, 1)
    rows = torch.tensor([rows[j] + [(-1, -1)] * (length - len(rows[j])) for j in order])
    pick = lambda values: torch.tensor([values[j] for j in order])  # noqa: E731
    return {"rewards": pick(rewards), "groups": pick(groups), "valid": pick(valid),
            "context": rows[..., 0].clone(), "writer": rows[..., 1].clone()}  # fmt: skip


def _tokens(rng, delegates):
    """(context, writer) of each token of an episode."""
    some = lambda context, writer: [(context, writer)] * rng.randint(1, 2)  # noqa: E731
    agents = range(1, 1 + (rng.randint(1, 2) if delegates else 0))
    row = some(0, -1) + some(0, 0)
    row += [token for agent in agents for token in some(0, agent)] or some(0, -1)
    row += some(0, 0)
    for agent in agents:
        row += some(agent, 0) + some(agent, agent) + some(agent, -1) + some(agent, agent)
    return row


def _swarm(trained=lambda s: (s.context == 0) & (s.writer == 0) & s.valid[:, None], advantage=objective.group_advantages,
           spread=lambda s: s.advantage[:, None].expand(s.context.shape), count=lambda s: s.trained.sum()):  # fmt: skip
    """`swarm_advantages` in parts: trained (R,L), advantage (R,), spread (R,L), count ()."""

    def whole(rewards, groups, valid, context, writer):
        s = SimpleNamespace(rewards=rewards, groups=groups, valid=valid, context=context, writer=writer)
        s.advantage, s.trained = advantage(rewards, groups, valid), trained(s)
        return torch.where(s.trained, spread(s), 0.0), count(s)

    return whole


def _by_gradient(rewards, groups, valid, context, writer):
    """Another way: N times the gradient of the policy objective at ρ = 1, where nothing is clipped and the penalty is flat."""
    mask = (context == 0) & (writer == 0)
    number = int((mask & valid[:, None]).sum())
    if not number:
        return torch.zeros(context.shape, dtype=rewards.dtype), torch.tensor(0)
    owner = torch.arange(len(rewards))[:, None].expand(context.shape)
    with torch.enable_grad():
        now = torch.full(context.shape, -1.0, dtype=rewards.dtype, requires_grad=True)
        old = now.detach()
        found = objective.policy_objective_reference(now, old, old, mask, owner, rewards, groups, valid, number, -1.0, 1.0, 1.0, 2.0)
        (gradient,) = torch.autograd.grad(found.value, now)
    return gradient * number, torch.tensor(number)


def _own(s):
    return (s.context == 0) & (s.writer == 0) & s.valid[:, None]


def _run_of_own(last):
    """Only the last, or the first, run of the orchestrator's tokens."""

    def trained(s):
        own = _own(s)
        begins = own & ~F.pad(own, (1, 0))[:, :-1]
        turn = begins.cumsum(1)
        return own & (turn == (begins.sum(1, keepdim=True) if last else 1))

    return trained


def _agents(s):
    """How many contexts each episode has (R,1)."""
    return s.context.amax(1, keepdim=True) + 1


def _weighed(weigh):
    """The mean of the group with every episode weighed by weigh(context, writer) (R,)."""

    def whole(rewards, groups, valid, context, writer):
        weight = weigh(context, writer).to(rewards.dtype) * valid
        members = (groups[:, None] == groups) * weight
        mean = (members * rewards.masked_fill(~valid, 0.0)).sum(1) / members.sum(1).clamp(min=1e-9)
        found = (rewards - mean).masked_fill(~valid, 0.0)
        return _swarm(advantage=lambda *_: found)(rewards, groups, valid, context, writer)

    return whole


_BASELINES = {s.name: s for op in ops_rl.OPS if op.name == "group_advantages" for s in op.suspects}  # mistakes of it are mistakes here


# ------------------------------------------------------------------------------------------------- ops

OPS = (
    Op(
        name="critical_steps",
        formula="critical = sum_t (main_t + max_i steps_ti), over all subtasks given, 0 where there is none",
        source="K2.5 report 3",
        reference=critical_steps,
        cases=_step_cases(),
        outputs=("critical",),
        twins={"critical": lambda main, steps, given, finished:
               torch.tensor(critical.critical_steps(_episode(given, steps, None, finished, main))), "longest_path": _by_graph},
        variants={"vectorised": _critical()},
        suspects=(
            Suspect("sum", "the steps of subtasks side by side are added up: that is the work; only the longest takes time",
                    _critical(longest=lambda s: s.counted.sum(1))),
            Suspect("one_maximum", "one maximum over all stages; each stage has its own, and waits for it",
                    _critical(total=lambda s: s.own.sum() + s.counted.flatten().max() if s.counted.numel() else s.own.sum())),
            Suspect("failed_left_out", "subtasks that failed are left out of the maximum; they have taken their time",
                    _critical(counted=lambda s: s.steps * s.given * s.finished)),
            Suspect("none_is_infinite", "the maximum of a stage without subtasks is −∞ instead of 0", _critical(longest=_without(-math.inf))),
            Suspect("none_is_nan", "the maximum of a stage without subtasks is NaN instead of 0", _critical(longest=_without(math.nan))),
            Suspect("none_is_dropped", "a stage without subtasks is left out, the orchestrator's steps in it too",
                    _critical(total=lambda s: ((s.own + s.longest) * (s.number > 0)).sum())),
            Suspect("none_costs_one", "a stage without subtasks, or with none that took a step, costs one step of a subagent",
                    _critical(longest=lambda s: s.counted.amax(1).clamp(min=1))),
            Suspect("one_main", "a stage counts one step of the orchestrator, however many there were",
                    _critical(main=lambda s: torch.ones_like(s.main))),
            Suspect("no_main", "the orchestrator's steps are left out", _critical(main=lambda s: 0 * s.main)),
            Suspect("main_each", "the orchestrator's steps count once for each subtask of the stage",
                    _critical(main=lambda s: s.main * s.number.clamp(min=1))),
            Suspect("main_beside", "the orchestrator is taken to work beside its subagents: the larger of both counts; it waits",
                    _critical(total=lambda s: torch.maximum(s.own, s.longest).sum())),
            Suspect("padding", "places in which nothing was given count too", _critical(counted=lambda s: s.steps)),
            Suspect("shortest", "the shortest subtask counts: a stage is over when all of its subtasks are", _critical(longest=_shortest)),
            Suspect("first_one", "only the first subtask of a stage counts", _critical(longest=_first)),
            Suspect("mean", "the mean of the subtasks counts instead of the longest",
                    _critical(longest=lambda s: s.counted.sum(1) // s.number.clamp(min=1))),
            Suspect("wrong_axis", "the maximum is taken over the stages instead of over the subtasks of each",
                    _critical(total=lambda s: s.own.sum() + (s.counted.amax(0).sum() if len(s.counted) else 0))),
            Suspect("busiest", "the same place of all stages is taken for one agent, and the busiest one counts",
                    _critical(total=lambda s: s.own.sum() + s.counted.sum(0).max())),
            Suspect("last_left_out", "the last stage is left out: the answer is a step too",
                    _critical(total=lambda s: (s.own + s.longest)[:-1].sum())),
        ),
    ),
    Op(
        name="item_f1",
        formula="F1 = 2 |both| / (|given| + |truth|) of sets; 1 when both are empty, NaN when the truth is not known",
        source="K2.5 report 3, 5.2",
        reference=item_f1,
        cases=_item_cases(),
        outputs=("f1",),
        twins={"critical": lambda given, truth:
               torch.tensor(critical.item_f1(given.tolist(), None if truth is None else truth.tolist()))},
        variants={"vectorised": _f1(), "sorted_merge": _sorted_merge},
        suspects=(
            Suspect("multiset", "repetitions count: an item that stands twice on both sides is found twice",
                    _f1(prepare=lambda items: items, both=_multiset)),
            Suspect("repetitions_found", "an item that is given twice is found twice",
                    lambda given, truth: _f1(prepare=lambda items: items)(given, None if truth is None else truth.unique())),
            Suspect("repetitions_cost", "repetitions of an item count as wrong ones",
                    _f1(prepare=lambda items: items, both=lambda given, truth: int(torch.isin(given.unique(), truth).sum()))),
            Suspect("empty_is_0", "two empty sets score 0", _f1(empty=0.0)),
            Suspect("empty_is_nan", "two empty sets score NaN: 0 is divided by 0", _f1(empty=math.nan)),
            Suspect("unknown_is_0", "an unknown truth scores 0: what was not judged is taken for wrong",
                    _f1(unknown=lambda given: 0.0), "NVIDIA-NeMo/RL#2207"),
            Suspect("unknown_is_empty", "an unknown truth is read as an empty one", _f1(unknown=lambda given: float(not len(given))),
                    "NVIDIA-NeMo/RL#2207"),
            Suspect("of_the_larger", "both over the larger set", _f1(score=lambda both, given, truth: both / max(given, truth))),
            Suspect("precision", "the share of the given items that are right: one sure item is enough",
                    _f1(score=lambda both, given, truth: _ratio(both, given))),
            Suspect("recall", "the share of the true items that are given: giving everything is right",
                    _f1(score=lambda both, given, truth: _ratio(both, truth))),
            Suspect("jaccard", "both over either instead of F1", _f1(score=lambda both, given, truth: both / (given + truth - both))),
            Suspect("no_two", "the factor two is missing", _f1(score=lambda both, given, truth: both / (given + truth))),
            Suspect("arithmetic", "the plain mean of precision and recall instead of the harmonic one",
                    _f1(score=lambda both, given, truth: (_ratio(both, given) + _ratio(both, truth)) / 2)),
            Suspect("geometric", "the geometric mean of precision and recall instead of the harmonic one",
                    _f1(score=lambda both, given, truth: both / math.sqrt(max(given * truth, 1)))),
            Suspect("exact", "only equal sets score", _f1(score=lambda both, given, truth: both == given == truth)),
            Suspect("by_place", "items are compared place by place; a set has no order", _f1(prepare=lambda items: items, both=_by_place)),
        ),
    ),
    Op(
        name="parl_reward",
        formula="lambda1 min(1, widest / enough) + lambda2 finished / given + performance; different subtasks; lambdas annealed",
        source="K2.5 report 3",
        reference=parl_reward,
        cases=_reward_cases(),
        outputs=("reward", "r_parallel", "r_finish", "lambda1", "lambda2"),
        dtypes=(torch.float32, torch.float64),
        twins={"critical": _reward_of_critical},
        variants={"vectorised": _parl()},
        suspects=(
            Suspect("none_finishes", "r_finish is 1 when nothing was given away: that pays the agent that works alone",
                    _parl(finish=lambda s: s.earned / s.number if s.number else 1.0)),
            Suspect("none_is_nan", "r_finish is NaN when nothing was given away: 0 is divided by 0",
                    _parl(finish=lambda s: s.earned / s.number if s.number else math.nan)),
            Suspect("repetitions_finish", "repetitions that were finished count as finished: giving a thing away twice pays",
                    _parl(earned=lambda s: int(s.done.sum()))),
            Suspect("of_different", "repetitions are left out of what r_finish is divided by: they cost nothing",
                    _parl(number=lambda s: int(s.new.sum()))),
            Suspect("of_prompts", "r_finish is divided by the number of different prompts: what failed and was tried again costs nothing",
                    _parl(number=lambda s: len(s.prompt.unique()))),
            Suspect("of_finished", "r_finish is divided by the subtasks that were finished: what failed costs nothing",
                    _parl(number=lambda s: int(s.done.sum()))),
            Suspect("mean_of_stages", "r_finish is the mean of the stages' shares: small stages count as much as large ones",
                    _parl(finish=_mean_share)),
            Suspect("all_stages", "r_parallel counts the subtasks of all stages; only those side by side are parallel",
                    _parl(most=lambda s: sum(s.widths))),
            Suspect("repetitions_widen", "r_parallel counts repetitions: the same subtask, given many times, pays",
                    _parl(counted=lambda s: s.new | ~s.new)),
            Suspect("earlier_ones_widen", "r_parallel counts subtasks that were finished in an earlier stage",
                    _parl(counted=lambda s: ~s.copies.any(1))),
            Suspect("finished_widen", "r_parallel counts only subtasks that were finished; that is what r_finish is for",
                    _parl(counted=lambda s: s.new & s.done)),
            Suspect("mean_width", "r_parallel takes the mean width of the stages instead of the widest one",
                    _parl(most=lambda s: sum(s.widths) / max(len(s.widths), 1))),
            Suspect("first_stage", "r_parallel looks at the first stage alone", _parl(most=lambda s: (s.widths or [0])[0])),
            Suspect("uncapped", "r_parallel is not capped at 1: the wider the better", _parl(parallel=lambda s: s.most / s.enough)),
            Suspect("all_or_nothing", "r_parallel is 1 or 0, enough or not", _parl(parallel=lambda s: float(s.most >= s.enough))),
            Suspect("failed_repeats", "what failed and is given again counts as a repetition",
                    _parl(before=lambda s: s.same & (s.stage[:, None] > s.stage))),
            Suspect("stages_apart", "repetitions are looked for beside a subtask only: what an earlier stage finished counts again",
                    _parl(before=lambda s: torch.zeros_like(s.same))),
            Suspect("beside_apart", "repetitions are looked for in earlier stages only: equal ones side by side count each",
                    _parl(copies=lambda s: torch.zeros_like(s.same))),
            Suspect("first_beside", "of equal subtasks side by side the first counts, though it failed and another was finished",
                    _parl(place=lambda s: torch.arange(len(s.stage)))),
            Suspect("padding", "places in which nothing was given count too", _parl(there=lambda s: torch.ones_like(s.given))),
            Suspect("not_annealed", "λ1 and λ2 are not annealed: they stay as at the first knot",
                    _parl(lambdas=lambda s: s.knots[0, 1:].tolist())),
            Suspect("wrong_end", "λ1 and λ2 are annealed from the wrong end: they grow",
                    _parl(lambdas=lambda s: _interpolated(float(s.knots[0, 0] + s.knots[-1, 0]) - s.progress, s.knots))),
            Suspect("swapped", "λ1 and λ2 are swapped", _parl(lambdas=lambda s: _interpolated(s.progress, s.knots)[::-1])),
            Suspect("steps", "λ1 and λ2 go down in steps, each knot's values up to the next; they are straight in between",
                    _parl(lambdas=_knot_before)),
            Suspect("ends_only", "λ1 and λ2 are straight from the first knot to the last; those between are ignored",
                    _parl(lambdas=lambda s: _interpolated(s.progress, s.knots[[0, -1]]))),
            Suspect("extrapolated", "λ1 and λ2 go on beyond the first and the last knot; they stay as there", _parl(lambdas=_extrapolated)),
            Suspect("unknown_is_0", "an unknown performance counts as 0: an episode that was not judged is trained on",
                    _parl(known=lambda s: s.performance.nan_to_num(nan=0.0).item()), "NVIDIA-NeMo/RL#2207"),
            Suspect("weighed", "the performance is weighed by 1 − λ1 − λ2; it has the weight 1",
                    _parl(reward=lambda s: _STEPS["reward"](s) - sum(s.lambdas) * s.known)),
            Suspect("gated", "r_parallel and r_finish are multiplied by the performance; they are to be earned also where it is 0",
                    _parl(reward=lambda s: (1 + s.lambdas[0] * s.parallel + s.lambdas[1] * s.finish) * s.known)),
        ),
    ),
    Op(
        name="swarm_advantages",
        formula="advantage = r_j - mean r of the prompt where the orchestrator wrote the token in its own context, else 0; N of them",
        source="K2.5 report 3, 2.3",
        reference=swarm_advantages,
        cases=_token_cases(),
        outputs=("advantages", "tokens"),
        dtypes=(torch.float32, torch.float64),
        twins={"objective": _by_gradient},
        variants={"vectorised": _swarm()},
        suspects=(
            Suspect("subagents_trained", "what subagents write in their own contexts is trained: they are frozen",
                    _swarm(trained=lambda s: _own(s) | (s.context > 0) & (s.context == s.writer) & s.valid[:, None])),
            Suspect("subagents_in_tokens", "tokens of subagents are counted in N, though none of them is trained",
                    _swarm(count=lambda s: (_own(s) | (s.context > 0) & (s.context == s.writer) & s.valid[:, None]).sum())),
            Suspect("returns_trained", "what subagents return to the orchestrator is trained: to it they are observations",
                    _swarm(trained=lambda s: (s.context == 0) & (s.writer >= 0) & s.valid[:, None])),
            Suspect("whole_context", "the whole context of the orchestrator is trained, prompts and results too",
                    _swarm(trained=lambda s: (s.context == 0) & s.valid[:, None])),
            Suspect("copies_trained", "what the orchestrator wrote is trained again where it is a subagent's prompt",
                    _swarm(trained=lambda s: (s.writer == 0) & s.valid[:, None])),
            Suspect("last_turn", "only the last turn of the orchestrator is trained: the mask of the last step stands for all",
                    _swarm(trained=_run_of_own(True)), "NovaSky-AI/SkyRL#1492"),
            Suspect("first_turn", "only the first turn of the orchestrator is trained", _swarm(trained=_run_of_own(False))),
            Suspect("shifted", "the mask is off by one position", _swarm(trained=lambda s: F.pad(_own(s), (1, 0))[:, :-1])),
            Suspect("everything", "everything but padding is trained", _swarm(trained=lambda s: (s.context >= 0) & s.valid[:, None])),
            Suspect("by_contexts", "the baseline counts an episode once for each of its contexts: wide ones weigh more",
                    _weighed(lambda context, writer: context.amax(1) + 1)),
            Suspect("by_tokens", "the baseline counts an episode once for each of its trained tokens: long ones weigh more",
                    _weighed(lambda context, writer: ((context == 0) & (writer == 0)).sum(1))),
            Suspect("shared", "the advantage is divided among the agents of an episode",
                    _swarm(spread=lambda s: (s.advantage[:, None] / _agents(s)).expand(s.context.shape))),
            Suspect("per_response", "the advantage is divided by the episode's own tokens; N is those of the batch",
                    _swarm(spread=lambda s: (s.advantage[:, None] / _own(s).sum(1, keepdim=True).clamp(min=1)).expand(s.context.shape)),
                    "huggingface/trl#2995"),
            Suspect("episodes_as_tokens", "N is the number of episodes instead of tokens", _swarm(count=lambda s: s.valid.sum()),
                    "allenai/open-instruct#1137"),
            Suspect("all_positions", "N is the number of all positions, padding included",
                    _swarm(count=lambda s: torch.tensor(s.context.numel()))),
            Suspect("rejected_in_tokens", "tokens of invalid episodes are counted in N",
                    _swarm(count=lambda s: ((s.context == 0) & (s.writer == 0)).sum()), "THUDM/slime#657"),
            *(Suspect(name, _BASELINES[name].cause, _swarm(advantage=_BASELINES[name].wrong), _BASELINES[name].seen)
              for name in ("singletons", "whole_batch", "standardised", "leave_one_out", "no_baseline", "rejected_in_baseline", "sign")),
        ),
    ),
)  # fmt: skip
