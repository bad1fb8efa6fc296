"""PARL: an orchestrator that learns whether, when and how widely to give work away; its subagents are frozen — K2.5 report 3.

    subagent (SFT on single look-ups, once)  ──frozen──┐
    cold start (serial work, a little bad delegation)  │
        → Swarm on a question of lookups.py, within its budget of critical steps  → tokens of the orchestrator, reward
        → policy objective of rl.py → MuonClip

    r = λ1·r_parallel + λ2·r_finish + r_perf                        critical.py; λ annealed to 0

The policy sees tools and questions; no prompt and no trace shows a good decomposition. What subagents say are observations:
they are sampled by another, smaller model, whose tokens are in no rollout and whose weights never change (`Frozen.check`).
An agent's own calls come one per answer, in the single agent as in the swarm: what is to run side by side must be given away.

Public names: PARLError, SIZES, SUB_STEPS, build, encoded, lookup_documents, table_documents,
order_documents, cold_start, reading_documents, Frozen, Shaping, Record,
SwarmEnvironment, Bounded, REMEDIES, virtual_time, answer_all, schedule_all, score_lookups.     Tests: pytest tests/test_parl.py
"""

import asyncio
import dataclasses
import hashlib
import itertools
import random
import statistics
from dataclasses import dataclass

import torch

import lookups
from corpus import Corpus
from critical import critical_steps, finish_reward, parallel_reward, redundancy, reward, total_steps, width
from data import Encoded
from engine import Engine
from k25 import K25, K25Config
from policies import ContextFullError, Local
from rl import sample_groups
from rollout import Handle, RolloutManager, Sampling, derive
from swarm import Limits, Slots, Swarm
from swarm_log import Log, episode, refused
from traces import Scribe

SUB_STEPS = 5  # of a subagent, per subtask
SIZES = {  # beside preset "toy"; the tower, which sees nothing here, is as small as it gets
    "orchestrator": {"hidden_size": 128, "num_hidden_layers": 3, "qk_nope_head_dim": 32, "v_head_dim": 32},
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "qk_nope_head_dim": 16, "v_head_dim": 16},
    "large": {"hidden_size": 96, "num_hidden_layers": 3, "qk_nope_head_dim": 32, "v_head_dim": 32},
}
TOWER = {"vt_hidden_size": 16, "vt_num_attention_heads": 2, "vt_num_hidden_layers": 1, "vt_intermediate_size": 16}


class PARLError(ValueError):
    """Settings or checkpoints that cannot be; one line says why."""


# ------------------------------------------------------------------------------------------------ models


def build(size, tokenizer, seed):
    """A K25 with new weights. size: a key of SIZES; tokenizer: that of lookups.vocabulary."""
    width, toy = SIZES[size]["hidden_size"], K25Config.preset("toy")
    torch.manual_seed(seed)
    model = K25(dataclasses.replace(
        toy, vocab_size=tokenizer.vocab_size, intermediate_size=2 * width, moe_intermediate_size=width // 2, q_lora_rank=width // 2,
        kv_lora_rank=width // 2, n_routed_experts=8, initializer_range=0.04, max_position_embeddings=1024,
        bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad, media_placeholder_token_id=tokenizer.media_pad,
        vision=dataclasses.replace(toy.vision, text_hidden_size=width, mm_hidden_size=None, **TOWER), **SIZES[size]))  # fmt: skip
    # What tells ninety numbers apart must outweigh what training adds to all of them alike: with the range above, copying is hardly learned.
    torch.nn.init.normal_(model.language_model.model.embed_tokens.weight, 0.0, 1.0)
    return model


# --------------------------------------------------------------------------------- what they learn from


def _limits(steps):
    return Limits(critical_steps=steps, main_steps=steps, sub_steps=SUB_STEPS, own_calls=1)


def encoded(talk, source):
    """A scripted conversation as a document: loss on what the script said."""
    return Encoded(tuple(talk.ids), tuple(map(bool, talk.generated)), (), source, "text")


def _documents(one, number, seed):
    """[await one(rng)], so many, each with a random.Random of its own."""

    async def every():
        return [await one(random.Random(f"{seed} {index}")) for index in range(number)]

    return asyncio.run(every())


def lookup_documents(number, tokenizer, seed):
    """Conversations of single look-ups, by script over real searches: what a subagent is trained on. Some leave few steps, so that the
    runtime asks for the answer."""

    async def one(rng):
        prompt, pages = lookups.single_lookup(rng)
        policy = lookups.scripted(tokenizer, lookups.look_up(prompt))
        limits = _limits(rng.randint(min(3, SUB_STEPS), SUB_STEPS))
        await Swarm(prompt, policy, Corpus.of(pages), Log(None), limits, delegation=False, system=lookups.ROLE).run()
        return encoded(policy.talk(), "look-up")

    return _documents(one, number, f"{seed} look-ups")


def table_documents(number, tokenizer, seed):
    """Conversations in which the findings stand in the question, in any order, and only the table is to be written: practice in reading."""

    async def one(rng):
        kind = rng.choice(lookups.KINDS)
        question = lookups.draw(rng, kind, None if kind in lookups.ALONE else rng.randint(1, 8))
        lines = lookups.findings(question)
        scribe = Scribe(tokenizer, iter([("", lookups.table(question, question.values()), [])]))
        talk = scribe.conversation()
        talk.system(lookups.SYSTEM)
        talk.user("\n".join([question.text, *rng.sample(lines, len(lines))]))
        await scribe.answer(talk)
        return encoded(talk, "table")

    return _documents(one, number, f"{seed} tables")


def order_documents(number, tokenizer, seed):
    """Conversations in which the user says what subagents shall look up, one to four things: practice in the use of the tools. The
    orchestrator is never told so again."""

    async def one(rng):
        prompts, pages = lookups.dictated(rng, rng.randint(1, 4))
        policy = lookups.scripted(tokenizer, lookups.obedient(prompts))
        await Swarm("\n".join(f"{lookups.WORKER} {prompt}" for prompt in prompts), policy, Corpus.of(pages), Log(None), _limits(2 * SUB_STEPS),
                    subpolicy=lookups.ScriptedSubagents(tokenizer), system=lookups.SYSTEM).run()  # fmt: skip
        return encoded(policy.talk(), "order")

    return _documents(one, number, f"{seed} orders")


def _drawn(rng):
    """A question of one to seven rows; its budget is a little more than ever after, or for half of them such that serial work ends."""
    kind = rng.choice(lookups.KINDS)
    return lookups.draw(rng, kind, None if kind in lookups.ALONE else rng.randint(1, 7), steps=rng.choice((lookups.LOOSE[kind], 20)))


async def _orchestrated(question, writer, tokenizer):
    """The conversation of a script whose subagents never err."""
    policy = lookups.scripted(tokenizer, writer)
    await Swarm(question.text, policy, Corpus.of(question.pages), Log(None), _limits(question.steps),
                subpolicy=lookups.ScriptedSubagents(tokenizer), system=lookups.SYSTEM).run()  # fmt: skip
    return policy.talk()


def cold_start(number, tokenizer, seed, delegating):
    """Conversations to begin with: serial work, and for a share of them, `delegating`, careless delegation."""

    async def one(rng):
        question = _drawn(rng)
        writer = (lookups.careless if rng.random() < delegating else lookups.serial)(question, rng)
        return encoded(await _orchestrated(question, writer, tokenizer), f"{question.kind} trace")

    return _documents(one, number, f"{seed} cold")


def reading_documents(number, tokenizer, seed):
    """Conversations in which some look-ups were given away: practice in using what comes back. No loss on the giving away."""

    async def one(rng):
        question = _drawn(rng)
        document = encoded(await _orchestrated(question, lookups.handful(question, rng), tokenizer), "reading")
        loss, start = [], 0
        for own, run in itertools.groupby(document.loss):
            end = start + len(list(run))
            loss += [own and "assign_task" not in tokenizer.decode(document.ids[start:end])] * (end - start)
            start = end
        return dataclasses.replace(document, loss=tuple(loss))

    return _documents(one, number, f"{seed} reading")


# --------------------------------------------------------------------------------------------- subagents


class Frozen:
    """A checkpoint that answers as subagents, greedily, and is never trained: its own engine, its own weights, no gradient.

    model: K25; tokenizer; capacity: tokens of a subagent's conversation. `check` raises PARLError when a parameter has changed or has
    a gradient.
    """

    def __init__(self, model, tokenizer, capacity=320):
        self.manager = RolloutManager(Engine(model, 128, capacity), None, tokenizer, Sampling(40, temperature=0.0))
        self.model = self.manager.engine.model.model  # the engine's own copy: the one that answers
        self.digest = self._digest()

    def _digest(self):
        found = hashlib.sha256()
        for name, parameter in self.model.state_dict().items():
            found.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def check(self):
        """That nothing has touched it. Returns the hash of its parameters, taken now."""
        if any(parameter.grad is not None or parameter.requires_grad for parameter in self.model.parameters()):
            raise PARLError("a subagent's parameter has a gradient: it must be frozen")
        digest = self._digest()
        if digest != self.digest or self.manager.engine.version:
            raise PARLError("the subagents' weights have changed: they must be frozen")
        return digest

    def policy(self, seed):
        """A policy for one run, with draws of its own."""
        return Local(Handle(self.manager, "subagent", derive(seed, "subagents"), 0, 0), declare=False)


# ------------------------------------------------------------------------------------------ environment


@dataclass(frozen=True)
class Shaping:
    """What is added to r_perf, and the controls of the experiments."""

    first: float = 2.0  # λ1 at the beginning, of r_parallel
    second: float = 1.0  # λ2, of r_finish
    enough: int = 6  # distinct subtasks side by side that r_parallel asks for
    shuffled: bool = False  # control: subagents look something else up
    permuted: bool = False  # control: an episode gets the reward of one of the iteration before, in the first its own

    def knots(self):
        """(progress, λ1, λ2) for critical.lambdas: held for two fifths of training, 0 in its last fifth."""
        return ((0.0, self.first, self.second), (0.4, self.first, self.second), (0.8, 0.0, 0.0))


@dataclass(frozen=True)
class Record:
    """What one episode came to."""

    key: str
    kind: str
    seed: int
    performance: float  # item-F1
    critical: int
    total: int
    given: int  # subtasks
    width: int  # most distinct subtasks side by side
    finished: float  # r_finish
    parallel: float  # r_parallel
    redundant: float
    refused: int
    status: str
    time: float  # on the virtual clock: see `virtual_time`


class SwarmEnvironment:
    """Lets a policy orchestrate: what a RolloutManager takes. Only the orchestrator's conversation becomes a Rollout.

    frozen: Frozen, or None for a single agent without delegation; shaping: Shaping; progress: of training, 0…1, moved by whoever
    trains; steps: overrides the questions' budgets; context, remedy: as of Bounded, None for no limit; events: dict, takes (the events,
    the Record) of each question's last episode by the question's key. `take` hands out the Records since the last call.
    """

    def __init__(self, frozen, shaping=Shaping(), steps=None, context=None, remedy="none", events=None):
        self.frozen, self.shaping, self.steps, self.context, self.remedy, self.events = frozen, shaping, steps, context, remedy, events
        self.progress, self._heard, self._earlier = 0.0, [], []

    async def rollout(self, question, handle, seed):
        """One episode of a Question."""
        policy = Bounded(handle, self.context, self.remedy) if self.context else Local(handle, declare=False)
        record, stages = await self.play(question, policy, seed)
        value = reward(stages, record.performance, self.progress, self.shaping.enough, self.shaping.knots())
        self._heard.append((record, value))
        if self.shaping.permuted and self._earlier:
            value = random.Random(seed).choice(self._earlier)
        return policy.rollout(reward=value)

    async def play(self, question, policy, seed):
        """An episode of any policy. Returns (Record, stages)."""
        log, subpolicy = Log(None), self.frozen.policy(seed) if self.frozen else None
        if subpolicy and self.shaping.shuffled:
            subpolicy = _Shuffled(subpolicy, question, seed)
        swarm = Swarm(question.text, policy, Corpus.of(question.pages), log, _limits(self.steps or question.steps), subpolicy=subpolicy,
                      slots=Slots(1 << 20, 0.5), delegation=self.frozen is not None, system=lookups.SYSTEM)  # fmt: skip
        outcome = await swarm.run()
        stages = episode(log.events, lookups.completed)
        record = Record(
            question.key, question.kind, seed, question.score(outcome.answer) if outcome.status == "done" else 0.0, critical_steps(stages),
            total_steps(stages), len(swarm.assigned), width(stages), finish_reward(stages), parallel_reward(stages, self.shaping.enough), redundancy(stages),
            refused(log.events), outcome.status, virtual_time(log.events))  # fmt: skip
        if self.events is not None:
            self.events[question.key] = log.events, record
        return record, stages

    def take(self):
        """Records since the last call, in an order that does not depend on who ended first."""
        heard, self._heard = sorted(self._heard, key=lambda pair: (pair[0].key, pair[0].seed)), []
        self._earlier = [value for _, value in heard]
        return [record for record, _ in heard]


class _Shuffled:
    """A control: every subagent is given another look-up than the one it was assigned."""

    def __init__(self, policy, question, seed):
        self.policy, self.question, self.rng = policy, question, random.Random(seed)
        self._instead = {}

    def __str__(self):
        return f"{self.policy}, shuffled"

    async def answer(self, messages, tools, agent):
        asked = messages[1]["content"]
        if agent not in self._instead:
            names = [page.split("\n")[0] for page in self.question.pages.values()]
            self._instead[agent] = f"{self.rng.choice(names)} {asked.rpartition(' ')[2]}"
        changed = [messages[0], messages[1] | {"content": self._instead[agent]}, *messages[2:]]
        return await self.policy.answer(changed, tools, agent)


REMEDIES = ("none", "hide-tool-result", "discard-all", "summary")
NEXT = 140  # tokens that a step and the answer after it take


class Bounded(Local):
    """A Local whose own conversation may have so many tokens, and what is done when the next step would not fit.

    none: it is told to answer with what it has; hide-tool-result: it goes on with all results but the last blanked; discard-all: with
    the question alone; summary: with the question and the table that it writes when told to answer, which counts as no step. Over the
    limit nonetheless, its context is full. Raises PARLError for another remedy.
    """

    def __init__(self, handle, tokens, remedy="none"):
        if remedy not in REMEDIES:
            raise PARLError(f"remedy {remedy!r}: one of {', '.join(REMEDIES)}")
        super().__init__(handle, declare=False)
        self.tokens, self.remedy, self._view, self._from, self._times, self._late = tokens, remedy, [], 0, 0, False

    def rollout(self, agent="main", reward=0.0, **options):
        """The Rollout of the conversation that it ended with."""
        return super().rollout(self._name(), reward, **options)

    def _name(self):
        return f"main {self._times}"

    async def answer(self, messages, tools, agent):
        """As of Local."""
        if self._name() in self._talks and len(self.talk(self._name()).ids) + NEXT > self.tokens and not self._late:
            await self._relieve(messages, tools)
        answer = await super().answer([*self._view, *messages[self._from :]], tools, self._name())
        if len(self.talk(self._name()).ids) > self.tokens:
            raise ContextFullError(f"more than {self.tokens} tokens")
        return answer

    async def _relieve(self, messages, tools):
        told = [*self._view, *messages[self._from :]]
        told[-1] = told[-1] | {"content": f"{told[-1]['content']}\n{lookups.STEP_LEFT}: answer now.]"}
        if self.remedy == "none":
            self._view, self._late = told, True
        elif self.remedy == "hide-tool-result":
            self._view = [m | {"content": "hidden"} if m["role"] == "tool" else m for m in messages[:-1]] + [messages[-1]]
        elif self.remedy == "discard-all":
            self._view = messages[:2]
        else:
            summary = await super().answer(told, tools, self._name())
            self._view = [messages[0], messages[1] | {"content": f"{messages[1]['content']}\n{summary.content}"}]
        self._from, self._times = len(messages), self._times + (self.remedy != "none")


TOKEN, CALL = 0.02, 0.5  # seconds of the virtual clock: to write a token, to wait for a tool


def virtual_time(events):
    """Seconds that a run would take where a token takes 0.02 s and a tool call 0.5 s, subagents side by side without waiting.

    The longest path through answers and calls, each answer weighing its tokens and, if it calls, one wait."""
    given = {event["task"]: event["step"] for event in events if event["kind"] == "assign"}
    ends, step_ends, last = {}, {}, 0.0  # when a subagent, a step of the orchestrator and its last one were done
    for event in events:
        if event["kind"] != "answer":
            continue
        agent, message = event["agent"], event["message"]
        took = TOKEN * len(message.get("sampled", {}).get("ids", ())) + CALL * bool(message.get("tool_calls"))
        if agent == "main":
            waited = max((ends[task] for task, step in given.items() if step == event["step"] - 1 and task in ends), default=0.0)
            last = max(last, waited) + took
            step_ends[event["step"]] = last
        else:
            ends[agent] = ends.get(agent, step_ends[given[agent]]) + took
    return last


def answer_all(model, environment, questions, tokenizer, seed, slots=64, capacity=1024, max_new_tokens=320):
    """Let a model answer questions, each once. Returns the Records in the order of the questions. Raises PARLError when an episode fails."""
    groups = sample_groups(model, environment, questions, tokenizer, 1, seed, slots=slots, capacity=capacity, sampling=Sampling(max_new_tokens))
    heard, found = {(record.key, record.seed): record for record in environment.take()}, []
    for question, (rollout,) in zip(questions, groups):
        if (question.key, rollout.info.seed) not in heard:
            raise PARLError(f"an episode failed: {rollout.info.reason}")
        found.append(heard[question.key, rollout.info.seed])
    return found


def schedule_all(writer, frozen, questions, tokenizer, seed):
    """Let a script of lookups.py answer questions, with frozen subagents or (None) alone. Returns the Records in their order."""
    environment = SwarmEnvironment(frozen)

    async def one(place, question):
        rng = random.Random(f"{seed} schedule {place}")
        policy = lookups.scripted(tokenizer, writer(question, rng))
        return (await environment.play(question, policy, derive(seed, "schedule", place)))[0]

    async def every():
        return await asyncio.gather(*(one(place, question) for place, question in enumerate(questions)))

    return asyncio.run(every())


def score_lookups(frozen, number, tokenizer, seed):
    """(share right, mean steps) of held-out single look-ups by frozen subagents: right is what the script says."""
    asked = [lookups.single_lookup(random.Random(f"{seed} score {n}"), "heldout") for n in range(number)]

    async def one(index, prompt, pages):
        async def answer(policy, log):
            return await Swarm(prompt, policy, Corpus.of(pages), log, _limits(SUB_STEPS), delegation=False, system=lookups.ROLE).run()

        log, wanted = Log(None), await answer(lookups.scripted(tokenizer, lookups.look_up(prompt)), Log(None))
        return (await answer(frozen.policy(derive(seed, index)), log)).answer == wanted.answer, critical_steps(episode(log.events))

    found = frozen.manager.engine.run(*(one(index, *pair) for index, pair in enumerate(asked)))
    return statistics.fmean(right for right, _ in found), statistics.fmean(steps for _, steps in found)
