"""Rollouts, token in, token out, and the manager that runs a hundred thousand of them at once — K2.5 report D.

    async def rollout(task, handle, seed):                       # an environment, as far as this module is concerned
        talk = handle.conversation(tools)
        talk.user(picture, "How many?")
        message = await handle.answer(talk)                      # sampled by the engine, beside everybody else's
        talk.tool(message.tool_calls[0], observation)
        ...
        return handle.rollout(talk, reward)

    manager = RolloutManager(engine, rollout, tokenizer)
    manager.submit(task, seeds)                                  # one group: the responses to one prompt
    groups = await manager.collect(8)                            # the others go on in the next iteration

A conversation is the list of its ids. What was sampled stays as it was sampled, and what is said next is appended as ids:
nothing is decoded and encoded again. Where the model wrote what the template would have written, the list is exactly
`render_ids(history, preserve_thinking=True)`; thoughts of earlier turns stay, since they are what the next tokens saw.

What a rollout becomes depends on its task, its seed and the weights only. Every draw is keyed by (seed, conversation,
place); the engine gives the same bits in any company; so the order in which coroutines run changes nothing. Only where
weights change while rollouts run does it matter how far each has come; each token says which version drew it.

The cap on concurrent inference is the engine's number of slots; coroutines that wait cost some kilobytes each.

Run: python rollout.py bench        (100,000 coroutines over a model that computes nothing)

Public names: Rollout, Info, Conversation, UNSEEN, Sampling, Handle, RolloutManager, RolloutError, NullModel, derive, digest, bench,
main.     Tests: pytest tests/test_rollout.py
"""

import argparse
import asyncio
import dataclasses
import functools
import hashlib
import heapq
import sys
import time
from array import array
from dataclasses import dataclass

import torch

from engine import Engine, Request
from media import MediaItem, merged_tokens
from sandbox import resident_peak
from slots import SlotCache
from template import Message, ToolCall, parse, render_ids
from tokenizer import Tokenizer


class RolloutError(ValueError):
    """A rollout or a request for rollouts that cannot be; one line says why."""


# --------------------------------------------------------------------------------------------- rollouts


@dataclass(frozen=True)
class Info:
    """What is to be known of a rollout beside its tokens."""

    task: str = ""  # its name
    seed: int = 0
    finish: str = ""  # of the last answer: "stop" | "length"; "" when there was none
    calls: tuple[ToolCall, ...] = ()  # well-formed tool calls, in order
    temperature: float | None = None  # of the sampling; None when there was none
    reason: str = ""  # why it is not valid

    def __str__(self):
        return f"{self.task}, seed {self.seed}: {self.reason or self.finish}"


@dataclass(frozen=True)
class Rollout:
    """One response, with all that was said to the model: what is trained on.

    logprobs and versions have one entry per generated token. Raises RolloutError when lengths differ.
    """

    ids: tuple[int, ...]  # the whole sequence: prompts, answers, tool results, as the model saw it
    generated: tuple[bool, ...]  # per id: whether the model sampled it
    logprobs: tuple[float, ...]  # of the engine, under the distribution each was drawn from, before top-p
    versions: tuple[int, ...]  # of the weights that drew each
    items: tuple[MediaItem, ...] = ()  # in the order of their places
    reward: float = 0.0
    valid: bool = True  # False: nothing is known of the reward; not to be trained on, in no baseline
    group: int = 0  # of the responses to one prompt
    info: Info = Info()

    def __post_init__(self):
        if len(self.ids) != len(self.generated):
            raise RolloutError(f"{len(self.ids)} ids with {len(self.generated)} flags: one each")
        if not sum(self.generated) == len(self.logprobs) == len(self.versions):
            raise RolloutError(f"{sum(self.generated)} generated tokens with {len(self.logprobs)} log-probs and "
                               f"{len(self.versions)} versions: one of each per token, none made up")  # fmt: skip


def digest(rollout):
    """A hexadecimal hash of all that a rollout is, patches and the last bits of log-probs included."""
    fields = [getattr(rollout, field.name) for field in dataclasses.fields(rollout) if field.name != "items"]
    found = hashlib.sha256(repr(fields).encode())
    for item in rollout.items:
        found.update(repr((item.grid, item.timestamp)).encode() + item.patches.numpy().tobytes())
    return found.hexdigest()


def derive(seed, *path):
    """A seed below 2^63 for something named by `path` under something seeded by `seed`."""
    name = "/".join(map(str, (seed, *path)))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


UNSEEN = object()


class Conversation:
    """What was said, as ids, and which of them the model sampled.

    tokenizer: Tokenizer; tools: list of dicts, declared first; thinking: bool — whether answers begin with open `<think>`;
    tools_format: see `template.declare_tools`; name: what its draws are keyed by within a rollout.
    A turn's parts are str, MediaItem (a picture), a list of MediaItem (the chunks of a clip), or UNSEEN: a picture's marks with
    nothing between them, for a picture that is spoken of and not shown.
    """

    __slots__ = ("tokenizer", "thinking", "name", "ids", "generated", "logprobs", "versions", "items", "calls", "finish", "session",
                 "temperature")  # fmt: skip

    def __init__(self, tokenizer, tools=None, thinking=True, tools_format="typescript", name=0):
        self.tokenizer, self.thinking, self.name = tokenizer, thinking, name
        self.ids, self.generated, self.logprobs, self.versions = array("i"), bytearray(), array("d"), array("i")
        self.items, self.calls, self.finish, self.temperature = [], [], "", None
        self.session = object()  # the engine's key to its cache
        if tools:
            self._append(render_ids([], tokenizer, tools=tools, tools_format=tools_format, add_generation_prompt=False))

    def system(self, *parts):
        """A system turn."""
        self._turn({"role": "system"}, parts)

    def user(self, *parts):
        """A user's turn."""
        self._turn({"role": "user"}, parts)

    def tool(self, call, *parts):
        """What a tool returned to a ToolCall of this conversation."""
        self._turn({"role": "tool", "tool_call_id": call.id}, parts)

    def prompt(self):
        """The opening of an answer: what comes next is sampled."""
        self._close_turn()
        self._append(_opening(self.tokenizer, self.thinking))

    def answer(self, completion):
        """Append what was sampled behind `prompt`, as it was sampled; returns it parsed, a Message.

        Its calls carry the ids that the template gives them: the index counts all calls of the conversation. Where the
        model wrote another one, the Message's errors say so.
        """
        self.ids.extend(completion.ids)
        self.generated.extend(b"\1" * len(completion.ids))
        self.logprobs.extend(completion.logprobs)
        self.versions.extend(completion.versions)
        self.finish = completion.finish
        message = parse(self.tokenizer.decode(completion.ids), self.thinking)
        calls, errors = [], list(message.errors)
        for number, call in enumerate(message.tool_calls, len(self.calls)):
            if call.index != number:
                errors.append(f"{call.id}: the next index of this conversation is {number}")
            calls.append(dataclasses.replace(call, id=f"functions.{call.name}:{number}", index=number))
        self.calls += calls
        return Message(message.reasoning, message.content, tuple(calls), tuple(errors))

    def rollout(self, reward=0.0, valid=True, group=0, info=Info()):
        """The conversation as a Rollout; info is completed by what the conversation knows."""
        info = dataclasses.replace(info, finish=self.finish, calls=tuple(self.calls), temperature=self.temperature)
        return Rollout(tuple(self.ids), tuple(map(bool, self.generated)), tuple(self.logprobs), tuple(self.versions),
                       tuple(self.items), reward, valid, group, info)  # fmt: skip

    def _turn(self, message, parts):
        self._close_turn()
        content, media = [], []
        for part in parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
                continue
            if part is UNSEEN:
                content.append({"type": "image"})
                media.append(("image", [(None, 0)]))
                continue
            chunks = [part] if isinstance(part, MediaItem) else list(part)
            kind = "image" if isinstance(part, MediaItem) else "video"
            content.append({"type": kind})
            media.append((kind, [(chunk.timestamp, merged_tokens(chunk.grid)) for chunk in chunks]))
            self.items += chunks
        self._append(render_ids([message | {"content": content}], self.tokenizer, media, add_generation_prompt=False))

    def _close_turn(self):
        """End an answer that was cut off, or ended by another token."""
        if self.generated and self.generated[-1] and self.ids[-1] != self.tokenizer.im_end:
            self._append([self.tokenizer.im_end])

    def _append(self, ids):
        self.ids.extend(ids)
        self.generated.extend(bytes(len(ids)))


@functools.lru_cache
def _opening(tokenizer, thinking):
    return tuple(render_ids([], tokenizer, thinking=thinking))


# ------------------------------------------------------------------------------------------- the manager


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    max_new_tokens: int = 64  # of one answer, less where the engine's capacity ends
    temperature: float = 1.0
    top_p: float = 1.0


class Handle:
    """What a rollout does its work with. Made by the manager; also the parent of the rollouts that it starts."""

    __slots__ = ("manager", "name", "seed", "order", "group", "_conversations", "_children")

    def __init__(self, manager, name, seed, order, group):
        self.manager, self.name, self.seed, self.order, self.group = manager, name, seed, order, group
        self._conversations, self._children = [], []

    def conversation(self, tools=None, thinking=None, name=None, **options):
        """A new Conversation with the manager's tokenizer; options as there.

        name: gives it draws of its own; default: how many there were before, which is no name for conversations that
        are begun side by side. thinking: default the manager's.
        """
        thinking = self.manager.thinking if thinking is None else thinking
        name = len(self._conversations) if name is None else name
        self._conversations.append(Conversation(self.manager.tokenizer, tools, thinking, name=name, **options))
        return self._conversations[-1]

    async def answer(self, conversation, sampling=None):
        """Sample the next answer of a conversation; returns a Message, see `Conversation.answer`.

        sampling: Sampling, default the manager's. An answer that was aborted goes on. Where the capacity leaves no room,
        nothing is sampled: finish "length". Raises RolloutError for a second temperature: who trains on it knows one.
        """
        engine, sampling = self.manager.engine, sampling or self.manager.sampling
        if conversation.temperature not in (None, sampling.temperature):
            raise RolloutError(f"a conversation sampled at temperature {conversation.temperature} goes on at {sampling.temperature}: "
                               "keep to one")  # fmt: skip
        conversation.temperature = sampling.temperature
        conversation.prompt()
        room = min(sampling.max_new_tokens, engine.capacity - len(conversation.ids))
        if room < 1:
            conversation.finish = "length"
            return Message("", "", (), (f"the context of {engine.capacity} tokens is full",))
        seed = derive(self.seed, conversation.name, len(conversation.ids))
        request = Request(tuple(conversation.ids), tuple(conversation.items), room, sampling.temperature, sampling.top_p,
                          self.manager.tokenizer.stop_ids, seed, None, conversation.session, self.order)  # fmt: skip
        done = await engine.generate(request)
        while done.finish == "aborted":
            done = await engine.generate(dataclasses.replace(request, prefix=done))
        return conversation.answer(done)

    def spawn(self, task, name=None):
        """Start a rollout of a sub-task; returns a Task to await for its Rollout. It ends, at the latest, with this one.

        name: gives it a seed of its own; default: how many were started before.
        """
        name = len(self._children) if name is None else name
        handle = Handle(self.manager, _name_of(task), derive(self.seed, "spawn", name), self.order, self.group)
        self._children.append(asyncio.ensure_future(self.manager._run(task, handle)))
        return self._children[-1]

    def rollout(self, conversation, reward=0.0, valid=True, reason=""):
        """A conversation as the Rollout of this handle. reward: float; valid: False when the reward could not be found,
        reason: why."""
        return conversation.rollout(float(reward), valid, self.group, Info(self.name, self.seed, reason=reason))

    def _failed(self, error):
        """An invalid Rollout of as much as there is."""
        conversation = self._conversations[0] if self._conversations else Conversation(self.manager.tokenizer)
        return self.rollout(conversation, valid=False, reason=f"{type(error).__name__}: {error}")

    async def _close(self):
        """End what this rollout started and has not awaited; let go of its caches."""
        for conversation in self._conversations:
            self.manager.engine.forget(conversation.session)
        for child in self._children:
            child.cancel()
        if self._children:
            await asyncio.gather(*self._children, return_exceptions=True)


def _name_of(task):
    return str(getattr(task, "name", type(task).__name__))


class RolloutManager:
    """Runs rollouts as coroutines of the running event loop, any number of them at once.

    engine: Engine; rollout: async function (task, handle, seed) → Rollout, or an object that has it as a method; tokenizer:
    Tokenizer; sampling: Sampling; thinking: bool — of conversations. A rollout that raises is returned as not valid, with
    the reason; no other hears of it. A trainer that is no coroutine keeps one `asyncio.Runner` for all iterations: what
    is unfinished stands still while the trainer works.
    """

    def __init__(self, engine, rollout, tokenizer, sampling=Sampling(), thinking=False):
        self.engine, self.tokenizer, self.sampling, self.thinking = engine, tokenizer, sampling, thinking
        self._rollout = getattr(rollout, "rollout", rollout)
        self._submitted, self._tasks, self._groups = 0, set(), {}  # groups by order: rollouts, None where unfinished
        self._finished = set()  # the whole ones of these
        self._awaited, self._missing, self._wake = None, 0, None  # by `collect`: which (None: any), how many; its future

    @property
    def live(self):
        """Rollouts that were submitted and have not finished, sub-tasks not counted."""
        return len(self._tasks)

    def submit(self, task, seeds, name=None):
        """Start one rollout of a task per seed, a group. Returns the group's number: they count up from 0.

        Earlier groups are served first when slots are short. name: of the task, default its `name`.
        """
        group, self._submitted = self._submitted, self._submitted + 1
        self._groups[group] = [None] * len(seeds)
        for place, seed in enumerate(seeds):
            handle = Handle(self, _name_of(task) if name is None else name, seed, group, group)
            self._tasks.add(asyncio.ensure_future(self._member(task, handle, place)))
        return group

    async def collect(self, n, oldest=False):
        """The next n groups that are whole, as tuples of Rollout in the order of their seeds, the groups in order.

        The others go on, under whatever weights come: partial rollouts. oldest: wait for the n groups submitted first, so
        that which groups come does not depend on how fast each was. Raises RolloutError when there are not that many.
        """
        if len(self._groups) < n:
            raise RolloutError(f"{n} groups are wanted and {len(self._groups)} were submitted: submit more first")
        self._awaited = set(heapq.nsmallest(n, self._groups)) if oldest else None
        self._missing = n - len(self._finished & self._awaited if oldest else self._finished)
        if self._missing > 0:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        wanted = heapq.nsmallest(n, self._awaited or self._finished)
        self._finished.difference_update(wanted)
        return [tuple(self._groups.pop(group)) for group in wanted]

    async def cancel(self):
        """Stop all rollouts and wait until they have: no task is left, no slot is held. Unfinished groups are dropped."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.difference_update(tasks)  # those that had not begun did not do it themselves
        self._groups = {group: self._groups[group] for group in self._finished}
        if self._wake and not self._wake.done():
            self._wake.set_exception(RolloutError("the rollouts were cancelled"))

    async def _member(self, task, handle, place):
        """One rollout of a group, up to its place among the results."""
        try:
            rollout = await self._run(task, handle)
        finally:
            self._tasks.discard(asyncio.current_task())
        members = self._groups[handle.group]
        members[place] = rollout
        if None not in members:
            self._finished.add(handle.group)
            self._missing -= self._awaited is None or handle.group in self._awaited
            if self._missing == 0 and self._wake and not self._wake.done():
                self._wake.set_result(None)

    async def _run(self, task, handle):
        """A rollout, whatever happens in it."""
        try:
            rollout = await self._rollout(task, handle, handle.seed)
            if not isinstance(rollout, Rollout):
                raise RolloutError(f"the environment returned a {type(rollout).__name__}")
        except asyncio.CancelledError as error:
            if asyncio.current_task().cancelling():
                raise
            rollout = handle._failed(error)  # it cancelled something itself and let that out
        except Exception as error:
            rollout = handle._failed(error)
        finally:
            await handle._close()
        return dataclasses.replace(rollout, group=handle.group)


# ------------------------------------------------------------------------------------------------- bench


class NullModel:
    """In the place of a SlotModel: every token is equally likely and nothing is computed. For measuring all the rest.

    slots, capacity: int; vocab_size: int, with the special tokens at its end.
    """

    def __init__(self, slots, capacity, vocab_size=512):
        self.slots, self.capacity, self.vocab_size = slots, capacity, vocab_size
        self.media_pad = Tokenizer(vocab_size).media_pad
        self.cache = SlotCache(0, slots, capacity, 0)
        self._logits = torch.zeros(slots, vocab_size)

    def load(self, state):
        """There are no weights."""

    def encode(self, items):
        """No embeddings."""

    def embed(self, ids, media):
        """None again."""

    def prefill(self, prompts):
        """Nothing to write."""

    def decode(self, tokens, places):
        """Logits (n,U), all 0."""
        return self._logits[: len(tokens)]


async def _two_turns(task, handle, seed):
    """The environment of the bench: a question, an answer, what a tool said, another answer."""
    talk = handle.conversation()
    talk.system("You solve the task.")
    talk.user(f"Task {task}: what is its number?")
    await handle.answer(talk)
    talk.tool(ToolCall("functions.look:0", "look", 0, {}, "{}"), str(seed))
    await handle.answer(talk)
    return handle.rollout(talk, reward=float(seed % 2))


def bench(count=100_000, slots=1024, new_tokens=8):
    """Hold so many coroutines at once, each with its conversation, over a NullModel; prints and returns
    (coroutines at once, bytes of memory at the peak, of these before, seconds, tokens)."""

    async def script():
        manager = RolloutManager(Engine(NullModel(slots, 384)), _two_turns, Tokenizer(), Sampling(new_tokens))
        for number in range(count):
            manager.submit(number, [number], name="two turns")
        await asyncio.sleep(0)  # all begin, and come to where they wait for their first token
        live = manager.live
        groups = await manager.collect(count)
        assert manager.live == 0 and manager.engine.running == 0
        return live, sum(len(rollout.logprobs) for group in groups for rollout in group)

    before, begin = resident_peak(), time.perf_counter()
    live, tokens = asyncio.run(script())
    seconds, peak = time.perf_counter() - begin, resident_peak()
    each = (peak - before) / live / 1e3
    print(f"{live:,} coroutines at once: peak {peak / 1e9:.2f} GB, {before / 1e9:.2f} GB before them, {each:.1f} kB "
          f"each; {count:,} rollouts of two answers, {tokens:,} tokens in {seconds:.1f} s")  # fmt: skip
    return live, peak, before, seconds, tokens


def main(arguments=None):
    """`bench`. Exit code 2 with one line on misuse."""
    cli = argparse.ArgumentParser(prog="rollout.py", description=__doc__.split("\n")[0])
    part = cli.add_subparsers(dest="command", required=True).add_parser("bench", help="100,000 coroutines over a null model")
    part.add_argument("--count", type=int, default=100_000)
    part.add_argument("--slots", type=int, default=1024)
    part.add_argument("--new-tokens", type=int, default=8, help="of each of the two answers")
    flags = cli.parse_args(arguments)
    if min(flags.count, flags.slots, flags.new_tokens) < 1 or flags.new_tokens > 128:
        print("rollout.py: --count and --slots must be at least 1, --new-tokens 1 to 128", file=sys.stderr)
        sys.exit(2)
    bench(flags.count, flags.slots, flags.new_tokens)


if __name__ == "__main__":
    main()
