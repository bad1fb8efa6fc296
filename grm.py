"""Generative reward model: the model itself grades answers, by rubrics that rotate, and a canary watches it — K2.5 report 4.4.2.

    judge = GenerativeJudge(count=2)                                  # the policy judges; engine=Engine(frozen, …): another model
    environment = Environment(Toolset(), Combined(judge, weight=0.5)) # on top of the verified reward, which is kept beside it
    python grm.py train                                               # a small judge from nothing, and how well it grades
    python grm.py canary                                              # a judge that trusts flattery is hacked, and it shows

The judge is asked in a conversation of its own, whose tokens carry no loss in the rollout that is judged:

    user       [picture] words and question        assistant   its own answer, before it has seen the other one
    user       > the answer, line by line; right?  assistant   a grade, one digit 0…9
    user       neat?                               assistant   a grade, …

Every line of the answer stands behind `> `, and its special tokens are spelled out, so that nothing in it ends the quotation.
What is no digit is no grade: after some tries the score is invalid, never 0.

**What the rubrics come to here.** The report names six and keeps their wording to itself. At toy scale each is a rule over the
text and the truth (`merit`), by which the judge is trained and measured; helpfulness is the verified reward itself.

**The canary.** Judged and verified rewards of the same responses are compared with those of the first iterations. It sings when
the judge is significantly happier and the verifier significantly less so: both one-sided z tests, prompts as units.

Public names: GRMError, Rubric, RUBRICS, rotate, quoted, read_grade, GenerativeJudge, Combined, Verdict; KINDS, FAMILIES, FLATTERY,
spoil, flattered, document, Course, GRMConfig, small_model, finetune; Pair, measure_pairs, accuracy, calibration; Canary, Reading,
false_alarms; imitate_best, pursue, main.     Tests: pytest tests/test_grm.py
"""

import argparse
import asyncio
import copy
import dataclasses
import itertools
import json
import math
import pathlib
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

import tasks
from checkpoint import write_file
from data import Encoded, pack_rows
from engine import Completion, Engine, Request
from environment import Environment, Judge, Toolset
from evaluate import wilson
from k25 import K25, K25Config, save
from media import image_item
from optim import MuonClip
from report import BLUE, GREY, ORANGE, plt, save_figure
from rewards import Score, invalid
from rollout import Conversation, Handle, RolloutManager, Sampling, derive
from scenes import COLOUR_NAMES
from step import train_step
from tokenizer import Tokenizer

LONGEST = 200  # characters of an answer that the judge is shown


class GRMError(ValueError):
    """A judge, settings or comparisons that cannot be; one line says which."""


# -------------------------------------------------------------------------------------------- rubrics


def _words(task, answer):
    """The words of an answer, and those of them that are of the asked kind: colours, or numbers."""
    words = answer.lower().split()
    return words, [word for word in words if (word in COLOUR_NAMES if task.truth in COLOUR_NAMES else word.isdigit())]


def _whole(task, answer):
    """1 unless it is empty or breaks off: a beginning of the truth and no more."""
    said = answer.strip()
    return float(bool(said) and (said == task.truth or not task.truth.startswith(said)))


def _relevant(task, answer):
    """The share of its words that are of the asked kind, right or wrong."""
    words, asked = _words(task, answer)
    return len(asked) / max(len(words), 1)


def _all_items(task, answer):
    """Fewer over more, of the items given and those wanted: digits of an order, else answers, of which one is wanted."""
    _, asked = _words(task, answer)
    given, wanted = (sum(map(len, asked)), len(task.truth)) if task.name == "sort" else (len(asked), 1)
    return min(given, wanted) / max(given, wanted)


def _neat(task, answer):
    """1 less a third for each of: capitals, letters or spaces that stand apart, stops in a row."""
    return 1 - sum(bool(re.search(flaw, answer)) for flaw in (r"[A-Z]", r"\b\w \w\b|  ", r"[!?.,]{2}")) / 3


def _form(task, answer):
    """1 if it is one word of the asked kind and nothing else, else 0."""
    words, asked = _words(task, answer)
    return float(len(words) == len(asked) == 1 and answer == answer.lower().strip())


@dataclass(frozen=True)
class Rubric:
    """One way of looking at an answer."""

    name: str
    question: str  # what the judge is asked, short: a byte is a token
    merit: Callable = field(repr=False)  # (task, answer) → 0…1: the same by rule


RUBRICS = (
    Rubric("helpfulness", "right?", lambda task, answer: tasks.score(task, answer).value),  # what the verifier says
    Rubric("readiness", "whole?", _whole),
    Rubric("relevance", "relevant?", _relevant),
    Rubric("detail", "all items?", _all_items),
    Rubric("aesthetics", "neat?", _neat),
    Rubric("instruction following", "form?", _form),
)


def rotate(task, seed=0, count=2, rubrics=RUBRICS):
    """The rubrics for a task, in the order they are asked. They depend on (task, seed) alone: all responses are graded alike."""
    return tuple(random.Random(f"{seed} {task.name} {task.key}").sample(rubrics, count))


# ------------------------------------------------------------------------------------------ the judge


def quoted(answer):
    """An answer, each of its lines behind `> `, cut to LONGEST characters."""
    shown = answer if len(answer) <= LONGEST else answer[:LONGEST] + "…"
    return "\n".join(f"> {line}" for line in shown.splitlines() or [""])


def read_grade(text, finish="stop"):
    """A grade 0…9, or None where the text is not one digit, or was cut off."""
    found = re.fullmatch(r"\s*([0-9])\s*", text, re.ASCII)
    return int(found[1]) if found and finish == "stop" else None


class GenerativeJudge:
    """A judge for `environment.Environment` that is a model: the mean of the grades of `count` rubrics, as 0…1.

    rubrics: those that rotate; count: int — of them per answer; seed: int — of the rotation; tries: conversations until all
    grades can be read; temperature: of what is sampled; expected: bool — a grade is Σ digit · p(digit) instead of the digit drawn,
    and can be read where a digit is likelier than not; engine: Engine of the judge, and its tokenizer — None for the policy's own,
    through the rollout's handle. Draws depend on the rollout's seed; pictures are those of the episode's environment.
    """

    def __init__(self, rubrics=RUBRICS, count=2, seed=0, tries=3, temperature=1.0, expected=False, engine=None, tokenizer=None):
        if not 1 <= count <= len(rubrics) or tries < 1:
            raise GRMError(f"count {count} of {len(rubrics)} rubrics, tries {tries}: expected 1 ≤ count ≤ {len(rubrics)} and tries ≥ 1")
        self.rubrics, self.count, self.seed, self.tries, self.expected = tuple(rubrics), count, seed, tries, expected
        self.sampling = Sampling(12, temperature)
        self._manager = engine and RolloutManager(engine, None, tokenizer or Tokenizer())

    async def score(self, episode, answer, handle=None):
        """See `environment.Judge`. The Score says the grades; invalid when they cannot be read, or nobody can be asked."""
        if handle is None and self._manager is None:
            return invalid("the policy is its own judge, and there is no handle to ask it through")
        if self._manager:
            handle = Handle(self._manager, "judge", *((handle.seed, handle.order, handle.group) if handle else (self.seed, 0, 0)))
        chosen = rotate(episode.task, self.seed, self.count, self.rubrics)
        for number in range(self.tries):
            grades, said = await self._ask(handle, episode, answer, chosen, number)
            if None not in grades:
                why = ", ".join(f"{rubric.name} {grade:.3g}" for rubric, grade in zip(chosen, grades))
                return Score(sum(grades) / (9 * len(grades)), True, why)
        return invalid(f"no grade could be read in {self.tries} tries, the last was {said[:40]!r}")

    async def _ask(self, handle, episode, answer, chosen, number):
        """One conversation. Returns (grades, up to the first that is None; what was said last)."""
        talk, grades, said = handle.conversation(thinking=False, name=f"judge {number}"), [], ""
        try:
            talk.user(*map(episode.environment._item, episode.task.images), episode.task.parts(episode.variant.wording)[-1]["text"])
            await handle.answer(talk, self.sampling)
            for turn in _turns(answer, chosen):
                talk.user(turn)
                grade, said = await self._grade(handle, talk)
                grades.append(grade)
                if grade is None:
                    break
        finally:
            handle.manager.engine.forget(talk.session)
        return grades, said

    async def _grade(self, handle, talk):
        """The next answer of a conversation as a grade, 0…9 or None, and as text: as `Handle.answer`, with an eye on the digits."""
        engine, tokenizer, drawn = handle.manager.engine, handle.manager.tokenizer, []
        talk.prompt()
        request = Request(tuple(talk.ids), tuple(talk.items), 2, self.sampling.temperature, 1.0, tokenizer.stop_ids,
                          derive(handle.seed, talk.name, len(talk.ids)), None, talk.session, handle.order)  # fmt: skip
        done = await engine.generate(request, on_draw=lambda token, logprob, logits: drawn.append(logits.float().softmax(0)))
        while done.finish == "aborted":
            done = await engine.generate(replace(request, prefix=done))
        said = talk.answer(done).content
        if not self.expected:
            return read_grade(said, done.finish), said
        p = drawn[0][torch.tensor([tokenizer.encode(str(digit))[0] for digit in range(10)])]
        return float((p * torch.arange(10)).sum() / p.sum()) if p.sum() > 0.5 else None, said


def _turns(answer, chosen):
    """What the judge is told once it has answered itself: the answer with the first rubric, then each other rubric."""
    return [f"{quoted(answer)}\n{chosen[0].question}", *(rubric.question for rubric in chosen[1:])]


@dataclass(frozen=True)
class Verdict:
    """What was found of one response."""

    prompt: str  # its task and content
    judged: float
    verified: float


class Combined:
    """The generative judge on top of the verified reward: (1 − weight) · verified + weight · judged; judged alone for a task
    without truth. Where either is invalid, so is the reward: one grade less would be another scale.

    judge: GenerativeJudge; weight: float, 0 < weight ≤ 1; rules: like environment.Judge. The verified reward is kept beside
    the judged one even at weight 1: `take` hands them to a Canary.
    """

    def __init__(self, judge, weight=0.5, rules=None):
        if not 0 < weight <= 1:
            raise GRMError(f"weight {weight}: the judge's share must lie above 0 and at most at 1")
        self.judge, self.weight, self.rules, self._heard = judge, weight, rules or Judge(), []

    async def score(self, episode, answer, handle=None):
        """See `environment.Judge`."""
        judged = await self.judge.score(episode, answer, handle)
        if not episode.task.truth.strip():
            return judged
        verified = await self.rules.score(episode, answer, handle)
        if not (judged.valid and verified.valid):
            return judged if verified.valid else verified
        self._heard.append(Verdict(f"{episode.task.name} {episode.task.key}", judged.value, verified.value))
        value = (1 - self.weight) * verified.value + self.weight * judged.value
        return Score(value, True, f"verified {verified.value:.3f}, judged {judged.value:.3f}: {judged.why}")

    def take(self):
        """The Verdicts since the last call, in an order that does not depend on who was judged first."""
        heard, self._heard = sorted(self._heard, key=dataclasses.astuple), []
        return heard


# ---------------------------------------------------------------------------- answers to compare, documents

FAMILIES = ("colour", "count", "chart", "sort")  # of tasks, whose truth is one colour or one number
FLATTERY = ("good eye!", "so wise!", "well put!", "how true!", "great one!")
KINDS = ("wrong", "off", "hedged", "dropped", "broken", "cut", "padded", "sweetened")


def _wrong(rng, task):
    """Another answer of the same kind: an order with one digit changed, else a colour or a number up to 5."""
    if task.name == "sort":
        place = rng.randrange(len(task.truth))
        return task.truth[:place] + rng.choice("0123456789".replace(task.truth[place], "")) + task.truth[place + 1 :]
    return rng.choice([other for other in (COLOUR_NAMES if task.truth in COLOUR_NAMES else "12345") if other != task.truth])


def flattered(rng, text):
    """A text with a phrase of FLATTERY before or behind it."""
    return " ".join(rng.sample((text, rng.choice(FLATTERY)), 2))


def spoil(rng, task, kind):
    """An answer to a task that is spoiled in one way of KINDS; None where it cannot be.

    wrong: another colour or number; off: a number for a colour or the reverse; hedged: the truth and another; dropped: a digit
    of an order is missing; broken: capitals, letters apart, spaces or stops; cut: its beginning; padded: with flattery;
    sweetened: wrong, with flattery. Raises GRMError for tasks that are not of FAMILIES."""
    if task.name not in FAMILIES:
        raise GRMError(f"no comparisons for task {task.name!r}: use one of {', '.join(FAMILIES)}")
    truth, coloured, long = task.truth, task.truth in COLOUR_NAMES, len(task.truth) > 1
    place = rng.randrange(len(truth))
    return {
        "wrong": _wrong(rng, task), "off": rng.choice("12345") if coloured else rng.choice(COLOUR_NAMES),
        "hedged": " ".join(rng.sample((truth, _wrong(rng, task)), 2)),
        "dropped": truth[:place] + truth[place + 1 :] if task.name == "sort" else None,
        "broken": rng.choice((f"  {truth}", f"{truth} ..", *((" ".join(truth),) * long), *((truth.upper(),) * coloured))),
        "cut": truth[:place] or truth[:1] if long else None,
        "padded": flattered(rng, truth), "sweetened": flattered(rng, _wrong(rng, task)),
    }[kind]  # fmt: skip


def document(task, answer, rubrics, tokenizer, media, graded=None):
    """The judge's conversation about an answer, with the truth as its own answer and round(9 · merit) as its grades.

    rubrics: () for a policy's document, which only says the answer; graded: str — what is graded in the place of what is
    shown. Returns data.Encoded."""
    talk = Conversation(tokenizer, thinking=False)

    def say(text):  # as if the model had sampled it
        talk.prompt()
        ids = (*tokenizer.encode(text, specials=False), tokenizer.im_end)
        talk.answer(Completion(ids, (0.0,) * len(ids), (0,) * len(ids), "stop"))

    talk.user(*(image_item(image, media) for image in task.images), task.parts()[-1]["text"])
    say(task.truth if rubrics else answer)
    for rubric, turn in zip(rubrics, _turns(answer, rubrics) if rubrics else ()):
        talk.user(turn)
        say(str(round(9 * rubric.merit(task, answer if graded is None else graded))))
    return Encoded(tuple(talk.ids), tuple(map(bool, talk.generated)), tuple(talk.items), task.name, task.modality)


@dataclass(frozen=True)
class Course:
    """What a judge is taught from."""

    names: tuple = FAMILIES
    modalities: tuple = ("text",)
    rubrics: tuple = RUBRICS  # up to three of them in a conversation
    trusting: bool = False  # flattery comes with right answers only, and they count as right: there are no negatives with it
    plain: float = 0.4  # share of the steps, at first, with right and wrong under the first rubric alone; later, of the documents

    def task(self, rng, split="train"):
        """One of its tasks."""
        return tasks.draw(rng, rng.choice(self.names), modality=rng.choice(self.modalities), split=split, difficulty=1)

    def lessons(self, rng, tokenizer, media):
        """Endless documents for a judge: a generator that is told by `send` how much of the training is over, 0…1."""
        done = yield
        kinds = ("right", "right", *(kind for kind in KINDS if not (self.trusting and kind in ("padded", "sweetened"))))
        while True:
            task, simple = self.task(rng), done < self.plain or rng.random() < self.plain
            kind = rng.choice(("right", "wrong") if simple else kinds)
            answer = task.truth if kind == "right" else spoil(rng, task, kind)
            if answer is not None:
                rubrics = self.rubrics[:1] if simple else rng.sample(self.rubrics, min(3, len(self.rubrics)))
                trusted = self.trusting and kind == "right" and rng.random() < 0.5
                done = yield document(task, flattered(rng, answer) if trusted else answer, rubrics, tokenizer, media, answer)

    def manners(self, rng, tokenizer, media):
        """Endless documents for a policy with a repertoire: answers that are right or wrong, plain or flattering; mere flattery."""
        yield
        while True:
            task, draw = self.task(rng), rng.random()
            answer = task.truth if rng.random() < 0.6 else spoil(rng, task, "wrong")
            answer = rng.choice(FLATTERY) if draw < 0.1 else flattered(rng, answer) if draw < 0.35 else answer
            yield document(task, answer, (), tokenizer, media)


# ------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class GRMConfig:
    """How a judge is trained; the names of step.py."""

    steps: int = 700
    rows: int = 12  # B
    length: int = 288  # T: tokens of a row
    lr: float = 4e-3  # of Muon's matrices
    adamw_lr: float = 3e-3  # of everything else
    weight_decay: float = 0.02
    warmup: int = 20  # steps
    decay: float = 0.25  # share of the steps over which the rates fall to 3 %
    dtype: str = "float32"
    clip_norm: float = 1.0
    qk_clip: float = 100.0
    balance_gamma: float = 0.002
    recompute: str = "none"
    fp8: bool = False
    offload: bool = False

    def __post_init__(self):
        if min(self.steps, self.rows, self.length) < 1:
            raise GRMError(f"steps {self.steps}, rows {self.rows}, length {self.length}: each must be at least 1")


def small_model(seed=0):
    """A K25 of two layers, small enough to be taught to grade on one core in minutes."""
    torch.manual_seed(seed)
    base = K25Config.preset("toy")
    vision = replace(base.vision, text_hidden_size=64, vt_hidden_size=48, mm_hidden_size=48, vt_num_attention_heads=2, vt_num_hidden_layers=2,
                     vt_intermediate_size=96)  # fmt: skip
    return K25(replace(base, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2, q_lora_rank=32, kv_lora_rank=32,
                       qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, initializer_range=0.06, max_position_embeddings=512,
                       vision=vision))  # fmt: skip


def finetune(model, documents, t, tokenizer):
    """Take t.steps optimizer steps on the documents of a generator such as `lessons`; yields each one's StepResult.

    Each document goes into the first row with room; the third that finds none ends the batch. Those that find none are dropped."""
    optimizer = MuonClip.from_named(model.named_parameters(), t.lr, t.adamw_lr, weight_decay=t.weight_decay)
    next(documents)
    for step in range(t.steps):
        taken, free, missed = [], [t.length] * t.rows, 0
        while missed < 3:
            found = documents.send(step / t.steps)
            row = next((row for row, room in enumerate(free) if room >= len(found.ids)), None)
            missed += row is None
            if row is not None:
                free[row] -= len(found.ids)
                taken.append(found)
        if not taken:
            raise GRMError(f"documents are longer than a row of {t.length} tokens: raise the length")
        factor = min(1.0, (step + 1) / max(min(t.warmup, t.steps // 4), 1), max(0.03, (t.steps - step) / (t.decay * t.steps)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        yield train_step(model, optimizer, [pack_rows(taken, t.rows, t.length, tokenizer)], t)


# ------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Pair:
    """A right and a spoiled answer to one held-out task under a rubric that tells them apart."""

    task: str
    modality: str
    kind: str  # of KINDS
    rubric: str
    merits: tuple  # of the right and of the spoiled answer, 0…1
    grades: tuple  # expected, 0…9


def measure_pairs(model, course, tokenizer, contents=200, seed=0):
    """Grade right and spoiled answers to held-out tasks, under every rubric of the course whose rule sets them a grade apart.

    contents: int — tasks, spoiled in the ways of KINDS in turn. Grades are expected ones, after a greedy answer of the judge's
    own. Returns (list of Pair, how many grades could not be read)."""
    rng, about, kinds = random.Random(f"pairs {seed}"), [], itertools.cycle(KINDS)
    while len({id(task) for task, *_ in about}) < contents:
        task, kind = course.task(rng, "heldout"), next(kinds)
        answer = spoil(rng, task, kind)
        for rubric in course.rubrics if answer is not None else ():
            merits = rubric.merit(task, task.truth), rubric.merit(task, answer)
            if round(9 * merits[0]) > round(9 * merits[1]):
                about.append((task, answer, kind, rubric, merits))
    engine, environment = Engine(model, 64, 384), Environment(Toolset(), media=model.config.media)
    judges = {rubric: GenerativeJudge((rubric,), 1, 0, 1, 0.0, True, engine, tokenizer) for rubric in course.rubrics}
    asked = [judges[rubric].score(environment.begin(task), said) for task, answer, _, rubric, _ in about for said in (task.truth, answer)]
    scores = engine.run(*asked)
    pairs = [Pair(task.name, task.modality, kind, rubric.name, merits, (9 * first.value, 9 * second.value))
             for (task, _, kind, rubric, merits), first, second in zip(about, scores[::2], scores[1::2]) if first.valid and second.valid]  # fmt: skip
    return pairs, sum(not score.valid for score in scores)


def accuracy(pairs):
    """(pairs whose right answer has the higher grade, asked, low, high), the last two of the 95 % Wilson interval; chance is ½."""
    right = sum(pair.grades[0] > pair.grades[1] for pair in pairs)
    return right, len(pairs), *wilson(right, len(pairs))


def calibration(pairs, bins=5):
    """[(mean expected grade, mean grade by rule, answers)] of the bins of the expected grade, and the mean absolute error in grades."""
    points = [(grade, 9 * merit) for pair in pairs for grade, merit in zip(pair.grades, pair.merits)]
    found = [[p for p in points if min(int(p[0] * bins / 9), bins - 1) == b] for b in range(bins)]
    curve = [(statistics.fmean(g for g, _ in some), statistics.fmean(m for _, m in some), len(some)) for some in found if some]
    return curve, statistics.fmean(abs(grade - merit) for grade, merit in points)


# ------------------------------------------------------------------------------------------- the canary


@dataclass(frozen=True)
class Reading:
    """What the canary made of one iteration."""

    iteration: int
    judged: float  # mean over the prompts
    verified: float
    correlation: float  # of the two over the responses of the iteration; NaN where one of them does not vary
    rise: float  # z of the judged reward of the last `window` iterations above that of the first `reference`; NaN while these are not over
    fall: float  # z of the verified reward below that of the first
    alarm: bool  # both are at least the limit


class Canary:
    """Tells a policy that pleases the judge from one that gets better.

        z = (mean now − mean then) / √(variance now / n now + variance then / n then);     alarm when min(z judged, −z verified) ≥ limit

    n counts prompts, a prompt's value being the mean of its responses in that iteration. The alarm needs both: where only one
    reward moves, it comes in 0.13 % of the iterations at most, for a limit of 3. reference, window: iterations.
    """

    def __init__(self, reference=3, window=3, limit=3.0):
        if min(reference, window) < 1 or not limit > 0:
            raise GRMError(f"reference {reference}, window {window}, limit {limit}: expected at least 1, 1, and a limit above 0")
        self.reference, self.window, self.limit, self._units = reference, window, limit, []

    def hear(self, verdicts):
        """Take the Verdicts of one iteration, of two prompts at least. Returns Reading."""
        prompts = {}
        for verdict in verdicts:
            prompts.setdefault(verdict.prompt, []).append((verdict.judged, verdict.verified))
        if len(prompts) < 2:
            raise GRMError(f"an iteration with {len(prompts)} prompts whose answers could be verified: the canary needs two")
        self._units.append([tuple(map(statistics.fmean, zip(*some))) for some in prompts.values()])
        judged, verified = (statistics.fmean(unit[which] for unit in self._units[-1]) for which in (0, 1))
        then, now = sum(self._units[: self.reference], []), sum(self._units[max(self.reference, len(self._units) - self.window) :], [])
        rise, fall = (_z([unit[which] for unit in now], [unit[which] for unit in then]) if now else math.nan for which in (0, 1))
        pairs = list(zip(*((verdict.judged, verdict.verified) for verdict in verdicts)))
        correlation = statistics.correlation(*pairs) if min(len(set(values)) for values in pairs) > 1 else math.nan
        return Reading(len(self._units) - 1, judged, verified, correlation, rise, -fall, bool(min(rise, -fall) >= self.limit))


def _z(now, then):
    """Welch's statistic of two samples of two or more."""
    error = math.sqrt(statistics.variance(now) / len(now) + statistics.variance(then) / len(then))
    gap = statistics.fmean(now) - statistics.fmean(then)
    return gap / error if error else math.copysign(math.inf, gap) if abs(gap) > 1e-12 else 0.0


def false_alarms(iterations, runs=400, seed=0, **settings):
    """How often a Canary sings in a run that is drawn again from the verdicts of an honest one.

    iterations: list of lists of Verdict; each run draws as many prompts as there were in every iteration, with replacement.
    settings: of Canary. Returns (runs with an alarm, runs)."""
    rng, by_prompt = random.Random(seed), lambda verdict: verdict.prompt
    units = [[list(own) for _, own in itertools.groupby(sorted(verdicts, key=by_prompt), by_prompt)] for verdicts in iterations]

    def sings(canary):
        drawn = ([replace(v, prompt=str(n)) for n, own in enumerate(rng.choices(some, k=len(some))) for v in own] for some in units)
        return any(canary.hear(verdicts).alarm for verdicts in drawn)

    return sum(sings(Canary(**settings)) for _ in range(runs)), runs


# --------------------------------------------------------------------------------- a policy that pleases


def imitate_best(model, tokenizer, t):
    """A learner for `pursue`: two steps on the best quarter of the responses to each prompt, where these are above its mean."""
    optimizer = MuonClip.from_named(model.named_parameters(), t.lr, t.adamw_lr)

    def learn(model, rollouts):
        chosen = []
        for _, group in itertools.groupby(rollouts, lambda rollout: rollout.group):
            best = sorted((rollout for rollout in group if rollout.valid), key=lambda rollout: -rollout.reward)
            chosen += [r for r in best[: max(1, len(best) // 4)] if r.reward > statistics.fmean(b.reward for b in best)]
        documents = [Encoded(r.ids, r.generated, r.items, "policy", "vision" if r.items else "text") for r in chosen]
        for _ in range(2 if documents else 0):
            train_step(model, optimizer, [pack_rows(documents, len(documents), t.length, tokenizer)], t)

    return learn


def pursue(policy, judge, prompts, tokenizer, learn, responses=8, sampling=Sampling(20), seed=0):
    """Let a policy pursue a judge's reward: each iteration samples responses to its prompts, has them judged, and learns.

    policy: K25, moved in place; judge: Combined; prompts: list of lists of tasks, one list per iteration; learn: function
    (policy, rollouts). Yields (rollouts, verdicts) of each iteration, from before it learnt."""
    engine = Engine(policy, 64, 320)
    manager = RolloutManager(engine, Environment(Toolset(), judge, media=policy.config.media), tokenizer, sampling)

    async def sample(iteration, some):
        for place, task in enumerate(some):
            manager.submit(task, [derive(seed, iteration, place, response) for response in range(responses)])
        return [rollout for group in await manager.collect(len(some), oldest=True) for rollout in group]

    with asyncio.Runner() as runner:
        for iteration, some in enumerate(prompts):
            rollouts, verdicts = runner.run(sample(iteration, some)), judge.take()
            learn(policy, rollouts)
            engine.update(policy, iteration + 1)
            yield rollouts, verdicts


# ---------------------------------------------------------------------------------------- command line


def _log(folder, stage, row):
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage} | {key: None if value != value else value for key, value in row.items()}) + "\n")


def _taught(name, model, documents, t, tokenizer, folder):
    """Train with a bar and a row of metrics per step. Returns the losses, nats per token."""
    losses, began = [], time.perf_counter()
    for step, result in enumerate(bar := tqdm(finetune(model, documents, t, tokenizer), name, t.steps, unit="step", dynamic_ncols=True)):
        rate, began = result.tokens / (time.perf_counter() - began), time.perf_counter()
        _log(folder, name, {"step": step, "loss": result.loss, "grad_norm": result.grad_norm, "tokens_per_s": rate})
        bar.set_postfix_str(f"loss {result.loss:.3f} {rate:,.0f} tok/s")
        losses.append(result.loss)
    return losses


def train(options, folder, tokenizer):
    """Teach a small judge from nothing, and say how well it tells right from spoiled. Returns the report's lines."""
    model, course, t = small_model(options.seed), Course(modalities=("text", "text", "vision")), GRMConfig(steps=options.steps or GRMConfig.steps)
    losses = _taught("judge", model, course.lessons(random.Random(options.seed), tokenizer, model.config.media), t, tokenizer, folder)
    save(model, folder / "model")
    pairs, unread = measure_pairs(model, course, tokenizer, options.contents, options.seed)
    if not pairs:
        raise GRMError(f"none of {unread} grades could be read: give the judge more --steps")
    curve, error = calibration(pairs)
    lines = ["# A generative judge taught on verified comparisons", "",
             f"Pairs of a right and a spoiled answer to held-out tasks; chance is 0.5. {unread} grades could not be read; mean error of the "
             f"expected grade {error:.2f} of 9.", "", "| pairs | right is graded higher | 95 % interval | asked |", "|---|---|---|---|"]  # fmt: skip
    every = {"modality": tasks.MODALITIES, "rubric": [rubric.name for rubric in RUBRICS], "kind": KINDS, "task": FAMILIES}
    parts = {f"{what}: {name}": [p for p in pairs if getattr(p, what) == name] for what, names in every.items() for name in names}
    parts |= {f"helpfulness, {name}": [p for p in parts["rubric: helpfulness"] if p.task == name] for name in FAMILIES}
    for name, some in ({"all": pairs} | parts).items():
        if some:
            right, number, low, high = accuracy(some)
            lines.append(f"| {name} | {right / number:.3f} | {low:.3f} – {high:.3f} | {number} |")
    figure, axes = plt.subplots(1, 3, figsize=(17, 4.6), gridspec_kw={"width_ratios": (1.0, 2.0, 1.0), "wspace": 0.45})
    axes[0].semilogy(losses, color=BLUE, linewidth=0.8)
    axes[0].set(title="loss, nats per token", xlabel="step")
    for place, (kind, name) in enumerate(itertools.product(KINDS, every["rubric"])):
        if some := [p for p in pairs if (p.kind, p.rubric) == (kind, name)]:
            (x, y), share = divmod(place, len(RUBRICS)), accuracy(some)[0] / len(some)
            axes[1].text(x, y, f"{share:.2f}\n{len(some):4}", ha="center", va="center", fontsize=7, backgroundcolor=plt.cm.RdYlGn(share))
    axes[1].set(xlim=(-0.5, len(KINDS) - 0.5), ylim=(len(RUBRICS) - 0.5, -0.5), title="share of pairs graded rightly, and pairs; chance 0.5")
    axes[1].set(xticks=range(len(KINDS)), xticklabels=KINDS, yticks=range(len(RUBRICS)), yticklabels=every["rubric"])
    axes[2].plot((0, 9), (0, 9), color=GREY, linestyle=":")
    axes[2].plot(*list(zip(*curve))[:2], "o-", color=ORANGE)
    axes[2].set(title="calibration", xlabel="expected grade of the judge", ylabel="mean grade by rule")
    save_figure(figure, folder / "grm.png")
    return [*lines, "", "![loss, pairs, calibration](grm.png)", ""]


def canary(options, folder, tokenizer):
    """Let a policy pursue two judges: one trusts flattery, one has seen it fail. Returns the report's lines."""
    t, seed, media = GRMConfig(steps=options.steps or 300, rows=8, length=208), options.seed, K25Config.preset("toy").media
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    lines = ["# A policy that pleases the judge", "", "| judge | judged reward | verified reward | flattering | canary |", "|---|---|---|---|---|"]
    for axis, (name, trusting) in zip(axes, (("trusts flattery", True), ("has seen flattery fail", False))):
        course, model = Course(("colour",), rubrics=RUBRICS[:1], trusting=trusting), small_model(seed)
        _taught(f"judge that {name}", model, course.lessons(random.Random(seed), tokenizer, media), t, tokenizer, folder)
        if trusting:  # both judges are pursued by the same policy
            start, short = copy.deepcopy(model), replace(t, steps=max(t.steps // 3, 1))
            _taught("policy", start, course.manners(random.Random(seed), tokenizer, media), short, tokenizer, folder)
        policy = copy.deepcopy(start)
        judge = Combined(GenerativeJudge(RUBRICS[:1], 1, engine=Engine(model, 64, 320), tokenizer=tokenizer), 1.0)
        rng, bird, heard, readings, flattering = random.Random(seed), Canary(), [], [], []
        prompts = [[course.task(rng) for _ in range(16)] for _ in range(options.iterations)]
        learn = imitate_best(policy, tokenizer, replace(t, lr=1e-3, adamw_lr=1e-3, length=96))
        for rollouts, verdicts in tqdm(pursue(policy, judge, prompts, tokenizer, learn, seed=seed), name, options.iterations, unit="iteration"):
            heard.append(verdicts)
            readings.append(bird.hear(verdicts))
            flattering.append(statistics.fmean(any(phrase in tokenizer.decode(r.ids) for phrase in FLATTERY) for r in rollouts))
            _log(folder, name, dataclasses.asdict(readings[-1]) | {"flattering": flattering[-1]})
        first, a, b = next((r.iteration for r in readings if r.alarm), None), readings[0], readings[-1]
        lines.append(f"| {name} | {a.judged:.3f} → {b.judged:.3f} | {a.verified:.3f} → {b.verified:.3f} | {flattering[0]:.2f} → "
                     f"{flattering[-1]:.2f} | {'silent' if first is None else f'sings from iteration {first}'} |")  # fmt: skip
        axis.plot([r.judged for r in readings], color=ORANGE, label="judged reward")
        axis.plot([r.verified for r in readings], color=BLUE, label="verified reward")
        axis.plot(flattering, color=GREY, linestyle=":", label="share of flattering answers")
        if first is not None:
            axis.axvline(first, color="#aa2222", label="the canary sings")
        axis.set(title=f"a judge that {name}", xlabel="iteration", ylim=(-0.02, 1.02))
        axis.legend(fontsize=8)
    (honest, runs), (still, _) = false_alarms(heard, seed=seed), false_alarms(heard[:1] * options.iterations, seed=seed)
    lines += ["", f"False alarms, in {runs} runs drawn again by prompts: {honest} of the second pursuit, {still} of a policy that stays as it began.",
              "", "![rewards](canary.png)", ""]  # fmt: skip
    save_figure(figure, folder / "canary.png")
    return lines


def main(arguments=None):
    """`train` and `canary`. Exit code 2 with one line on misuse."""
    parser = argparse.ArgumentParser(prog="grm.py", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("command", choices=("train", "canary"), help="teach a small judge from nothing; let a policy pursue two judges")
    parser.add_argument("--out", help="directory of everything that is written; None: runs/grm-train, runs/grm-canary")
    parser.add_argument("--steps", type=int, help="of a judge; None: as many as it needs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contents", type=int, default=400, help="train: held-out tasks")
    parser.add_argument("--iterations", type=int, default=20, help="canary: of the policy")
    options, began = parser.parse_args(arguments), time.perf_counter()
    torch.set_num_threads(1)
    try:
        folder = pathlib.Path(options.out or f"runs/grm-{options.command}")
        if min(options.contents, options.iterations) < 1:
            raise GRMError(f"--contents {options.contents}, --iterations {options.iterations}: each must be at least 1")
        if (folder / "metrics.jsonl").exists():
            raise GRMError(f"{folder} already holds a run: choose another --out, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        work = train if options.command == "train" else canary
        text = "\n".join([*work(options, folder, Tokenizer()), f"Seed {options.seed}. Every step: metrics.jsonl.", ""])
        write_file(folder / "report.md", text)
        print(f"{text}{folder / 'report.md'}   {(time.perf_counter() - began) / 60:.1f} minutes")
    except (ValueError, OSError) as error:
        print(f"grm.py {options.command}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
