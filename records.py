"""What a gateway writes down, and the rollouts it becomes: token in, token out, for agents that only know texts — report D.

    recorder.write({...})                           # one line of DIR/records.jsonl per request, whole or not at all
    rollouts = read_records("runs/records")

An agent sends its whole conversation as text each time. `splice` puts the ids that were sampled in the place of the
answers' texts, so that the later prompt begins with the earlier one and its answer; `read_records` then makes one
rollout of both.

Public names: RecordError, Recorder, Turn, read_lines, read_records, reads, splice.     Tests: pytest tests/test_gateway.py
"""

import errno
import hashlib
import json
import os
import pathlib
import uuid
from dataclasses import dataclass, field

import torch

from checkpoint import load_tensors, save_tensors
from media import MediaItem
from rollout import Info, Rollout
from template import ToolCall


class RecordError(ValueError):
    """Records that cannot be written or read; one line says why."""


# ------------------------------------------------------------------------------------------------ sessions


@dataclass(frozen=True)
class Turn:
    """An answer of a session: what it answered, what was sampled and how it reads."""

    prompt: tuple  # ids
    ids: tuple  # sampled
    thinking: bool
    text: tuple  # as `reads`
    reasoning: str


def reads(message):
    """What of an assistant message a client sends back: content and calls, the arguments as values."""
    content = message.get("content") or ""
    content = content if isinstance(content, str) else "".join(part["text"] for part in content)
    calls = []
    for call in message.get("tool_calls") or ():
        try:
            arguments = json.dumps(json.loads(call["function"]["arguments"]), sort_keys=True)
        except (ValueError, RecursionError):
            arguments = call["function"]["arguments"]
        calls.append((call["function"]["name"], arguments))
    return content, tuple(calls)


def splice(ids, messages, turns, tokenizer, declared, preserve):
    """A rendered prompt with the sampled ids of earlier answers in the place of their texts.

    Special ids in `ids` come from the template alone, so that they tell where each message begins. ids: list of int — from
    `render_ids`; messages: of the same; turns: list of Turn; declared: bool — tools stand before the messages; preserve:
    bool — as for `render_ids`, reasoning of answered questions stays. Returns list of int.
    """
    t = tokenizer
    starts = [place for place, token in enumerate(ids) if token in (t.im_user, t.im_assistant, t.im_system)]
    final = [i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")]
    last = -1 if preserve else max(final, default=-1)
    out = ids[: starts[int(declared)]]
    for i, (message, begin, end) in enumerate(zip(messages, starts[int(declared) :], starts[int(declared) + 1 :])):
        head, answered = ids[begin : ids.index(t.im_middle, begin) + 1], []
        if message["role"] == "assistant":
            text, told = reads(message), message.get("reasoning_content")
            answered = [turn for turn in turns if turn.text == text and told in (None, "", turn.reasoning)]
        if not answered:
            out += ids[begin:end]
            continue
        openings = {True: [t.think], False: [t.think, t.end_think]}
        out += head  # of several answers that read alike, that to this very prompt, else the latest
        turn = next((turn for turn in answered if turn.prompt == (*out, *openings[turn.thinking])), answered[-1])
        body = list(turn.ids)
        if turn.thinking and i <= last:  # the template has dropped its reasoning
            body = body[body.index(t.end_think) + 1 :] if t.end_think in body else []
        out += openings[turn.thinking and i > last] + body
        out += [] if out[-1] == t.im_end else [t.im_end]
    return out + ids[starts[int(declared) + len(messages)] :]


# ------------------------------------------------------------------------------------------------- records


class Recorder:
    """Appends to DIR/records.jsonl, one whole line per request, and keeps the pictures as the model saw them in DIR/items.

    A line cut short by a crash is taken away at the next start. One process writes to a directory. Raises RecordError.
    """

    def __init__(self, directory):
        import fcntl  # POSIX only; serving without records needs none of this

        self.directory = pathlib.Path(directory)
        try:
            (self.directory / "items").mkdir(parents=True, exist_ok=True)
            self._file = open(self.directory / "records.jsonl", "a+b", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600))
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordError(f"{directory}: another gateway records there") from None
        except OSError as error:
            raise RecordError(f"{directory}: cannot be written ({error.strerror})") from None
        self._file.seek(0)
        whole = sum(len(line) for line in self._file if line.endswith(b"\n"))
        self._file.truncate(whole)

    def write(self, entry):
        """Append a dict. Raises OSError when the disk is full, having taken back what it wrote of it."""
        line, before = json.dumps(entry, allow_nan=False).encode() + b"\n", os.fstat(self._file.fileno()).st_size
        if self._file.write(line) != len(line):
            self._file.truncate(before)
            raise OSError(errno.ENOSPC, "the record was cut short")

    def keep(self, item):
        """Store a MediaItem once, under the hash of what the model sees; returns that."""
        content = hashlib.sha256(repr(item.grid).encode() + item.patches.contiguous().numpy().tobytes()).hexdigest()
        path = self.directory / "items" / f"{content}.safetensors"
        if not path.exists():
            temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
            save_tensors({"patches": item.patches, "grid": torch.tensor(item.grid)}, temporary)
            os.replace(temporary, path)
        return content

    def close(self):
        """Let go of the directory."""
        self._file.close()


# ---------------------------------------------------------------------------------------------- rollouts


@dataclass
class _Chain:
    """Answers of one session, each to a prompt that begins with all before it."""

    task: str
    seed: int
    temperature: float
    asked: tuple  # ids and media of the first prompt
    ids: list = field(default_factory=list)
    media: list = field(default_factory=list)
    generated: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    versions: list = field(default_factory=list)
    calls: list = field(default_factory=list)
    finish: str = ""

    def begins(self, record):
        """Whether a record's prompt begins with all of this."""
        ids, media = record["prompt"], record["media"]
        return (self.temperature == record["temperature"] and len(self.ids) < len(ids) and ids[: len(self.ids)] == self.ids
                and media[: len(self.media)] == self.media)  # fmt: skip


def read_lines(directory):
    """The records of a directory, as dicts in the order in which they were answered. Raises RecordError naming the line."""
    path = pathlib.Path(directory) / "records.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # a last one without its end is still being written, or was cut by a crash
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise RecordError(f"{path}, line {number}: damaged ({error})") from None


def read_records(directory, rewards=None):
    """Recorded answers as rollouts, in the order of their first requests. Returns a list of Rollout; raises RecordError.

    A request of a session whose prompt begins with an earlier prompt and its answer (ids and pictures) goes on with that
    rollout, if it was sampled at the same temperature. Several may begin so: the first goes on, the others stand alone, so
    that every sampled token is a generated token of exactly one rollout. Answers that were never finished (the client had
    left) are left out.

    info.task is the session, or the id of a request that had none. rewards: {task: float}; a rollout that has none there is
    not valid, since nothing is known of it, nor is a greedy one. group: rollouts whose first prompts are the same are one.
    """
    directory, chains, sessions = pathlib.Path(directory), [], {}
    for record in read_lines(directory):
        for answer in record["answers"]:
            if answer["finish"] == "cancelled":
                continue
            task = record["id"] if record["session"] is None else record["session"]
            own = sessions.setdefault(task, [])
            chain = max((chain for chain in own if chain.begins(record)), key=lambda chain: len(chain.ids), default=None)
            if chain is None:
                chain = _Chain(task, answer["seed"], record["temperature"], (tuple(record["prompt"]), tuple(record["media"])))
                chains.append(chain)
                own.append(chain)
            chain.generated += [False] * (len(record["prompt"]) - len(chain.ids)) + [True] * len(answer["ids"])
            chain.logprobs += answer["logprobs"]
            chain.versions += answer["versions"]
            chain.ids, chain.media = record["prompt"] + answer["ids"], record["media"]
            chain.calls += map(_tool_call, answer["message"].get("tool_calls", ()))
            chain.finish = "length" if answer["finish"] == "length" else "stop"
    items, groups, rollouts = {}, {}, []
    for content in {content for chain in chains for content in chain.media}:
        tensors = load_tensors(directory / "items" / f"{content}.safetensors")
        items[content] = MediaItem(tensors["patches"], tuple(tensors["grid"].tolist()))
    for chain in chains:
        reward = (rewards or {}).get(chain.task)
        reason = "greedy: drawn from no distribution" if chain.temperature == 0 else "not rewarded" if reward is None else ""
        info = Info(chain.task, chain.seed, chain.finish, tuple(chain.calls), chain.temperature, reason)
        rollouts.append(Rollout(tuple(chain.ids), tuple(chain.generated), tuple(chain.logprobs), tuple(chain.versions),
                                tuple(items[content] for content in chain.media), 0.0 if reward is None else float(reward), not reason,
                                groups.setdefault(chain.asked, len(groups)), info))  # fmt: skip
    return rollouts


def _tool_call(call):
    """A recorded call as the template's."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    return ToolCall(call["id"], name, int(call["id"].rpartition(":")[2]), json.loads(arguments), arguments)
