"""The event log of a swarm: one JSON object per line, from which a run goes on after it was killed — K2.5 report 3.

    log = Log("runs/swarm/events.jsonl")        # or Log(None): in memory only
    log.add("answer", agent="main", step=0, message={…})
    episode(log.events)                         # what critical.py works on; step_graph(log.events): the same, step by step

A line is on the disk before anything follows from it. A last line that was cut short counts as never written. Kinds of events, each
with its number `n` and the time `at` in seconds since 1970:

    start     question, system (its prompt), limits, corpus (its digest), python (whether there is that tool), models: once
    answer    agent, step, message, seconds: a model answered; one step. agent is "main" or the number of a subtask, from 1
    create    name, system_prompt: a kind of subagent
    assign    task, agent, prompt, step, place: subtask `task` was given away by call `place` of that step of main
    call      agent, step, place, ran, text, seconds: what a tool call returned; ran: whether it counts against the budget
    result    task, status, steps, text: a subtask ended; "done" is the one good status
    resume    the run goes on
    end       status, text, why: the run ended

`View` shows a run on a terminal while it writes.

Public names: REPEATED, Log, LogError, read_log, Sampled, read_calls, read_message, calls_before, sendable, episode,
refused, step_graph, View, plain.
Tests: pytest tests/test_swarm_log.py
"""

import errno
import json
import os
import pathlib
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass

from critical import Stage, Subtask
from template import Message, ToolCall

REPEATED = "was given this very task"  # why a call is refused that asks for the same twice


class LogError(ValueError):
    """A log that cannot be read or written; one line says why."""


def read_log(path):
    """The events of a file, list of dicts; a last line without its end is left out. Raises LogError."""
    try:
        raw = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise LogError(f"{path}: cannot be read ({error.strerror})") from None
    events = []
    for number, line in enumerate(raw.split(b"\n")[:-1], 1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict) or not isinstance(event.get("kind"), str) or event.get("n") != number - 1:
            raise LogError(f"{path}, line {number}: not event {number - 1} of a swarm; the file was changed")
        events.append(event)
    return events


class Log:
    """Appends events to a file, each flushed to the disk; one process at a time.

    path: of the file, which is made if it is not there and read if it is; None: in memory only. events: list of dicts, all of them;
    heard: functions called with each new one. Raises LogError.
    """

    def __init__(self, path):
        self.events, self.heard, self._file = [], [], None
        if path is None:
            return
        import fcntl  # POSIX only; a log in memory needs none of this

        path = pathlib.Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600))
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LogError(f"{path}: another run writes there") from None
        except OSError as error:
            raise LogError(f"{path}: cannot be written ({error.strerror})") from None
        self.events = read_log(path)
        self._file.seek(0)
        self._file.truncate(sum(len(line) for line in self._file if line.endswith(b"\n")))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def add(self, kind, **fields):
        """Append an event. Returns it; raises LogError when the disk does not take it, which then has nothing of it."""
        event = {"n": len(self.events), "at": round(time.time(), 3), "kind": kind, **fields}
        if self._file:
            line, before = json.dumps(event, allow_nan=False).encode() + b"\n", os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, "no space left")
                os.fsync(self._file.fileno())
            except OSError as error:
                self._file.truncate(before)
                raise LogError(f"{self._file.name}: an event cannot be written ({error.strerror})") from None
        self.events.append(event)
        for heard in self.heard:
            heard(event)
        return event

    def close(self):
        """Let go of the file."""
        if self._file:
            self._file.close()


# --------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Sampled(Message):
    """A Message with the tokens that it was sampled as."""

    ids: tuple = ()
    logprobs: tuple = ()
    versions: tuple = ()
    finish: str = ""

    def as_dict(self):
        """As of Message, with `sampled`."""
        return super().as_dict() | {"sampled": {key: list(getattr(self, key)) for key in ("ids", "logprobs", "versions")} | {"finish": self.finish}}


def read_calls(calls, first):
    """Tool calls of OpenAI's form as ToolCalls, numbered from `first`, and what was wrong with the others."""
    found, errors = [], []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        name, raw = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
        try:
            arguments = json.loads(raw or "{}", parse_constant=int) if isinstance(raw, str | None) else raw
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(name, str) or not re.fullmatch(r"\S{1,64}", name) or not isinstance(arguments, dict):
            errors.append(f"not a tool call with a name and a JSON object: {str(call)[:80]}")
            continue
        index = first + len(found)
        found.append(ToolCall(f"functions.{name}:{index}", name, index, arguments, raw if isinstance(raw, str) and raw else json.dumps(arguments)))
    return found, errors


def read_message(logged, first):
    """The Message that an event holds; its tool calls are numbered from `first`. Sampled where its tokens are there."""
    calls, _ = read_calls(logged.get("tool_calls"), first)
    tokens = logged.get("sampled", {})
    kind = Sampled if tokens else Message
    return kind(logged["reasoning_content"], logged["content"], tuple(calls), tuple(logged["errors"]), **tokens)


def calls_before(messages):
    """How many tool calls a conversation has."""
    return sum(len(message.get("tool_calls") or ()) for message in messages)


def sendable(messages):
    """Messages without what is our own, and without an empty reasoning_content, which not every server knows."""
    own = ("sampled", "errors")
    return [{key: value for key, value in m.items() if key not in own and (key, value) != ("reasoning_content", "")} for m in messages]


# --------------------------------------------------------------------------------------- what it says


def episode(events, completed=lambda prompt, text: True):
    """The stages of a run for critical.py, unfinished ones included. A call that was refused because it repeats a task is a subtask of no
    steps that did not finish: nobody gains by asking twice. completed: function of a subtask's prompt and the subagent's answer, whether
    that is an answer to it. Returns tuple of Stage."""
    steps = Counter(event["agent"] for event in events if event["kind"] == "answer")
    done = {event["task"]: event["text"] for event in events if event["kind"] == "result" and event["status"] == "done"}
    stages = [[] for _ in range(steps["main"])]
    for event in events:
        if event["kind"] == "assign":
            task, prompt = event["task"], event["prompt"]
            stages[event["step"]].append(Subtask(steps[task], prompt, task in done and completed(prompt, done[task])))
    for step, prompt, why in _not_run(events):
        if REPEATED in why:
            stages[step].append(Subtask(0, prompt, False))
    return tuple(Stage(1, tuple(subtasks)) for subtasks in stages)


def _not_run(events):
    """(step, prompt, why) of every assign_task call of main that was not run, in order."""
    calls = {}
    for event in events:
        if event["kind"] == "answer" and event["agent"] == "main":
            calls |= {(event["step"], place): call["function"] for place, call in enumerate(event["message"].get("tool_calls", ()))}
        elif event["kind"] == "call" and event["agent"] == "main" and not event["ran"]:
            function = calls.get((event["step"], event["place"]), {})
            if function.get("name") == "assign_task":
                told, _ = read_calls([{"function": function}], 0)
                yield event["step"], str(told[0].arguments.get("prompt", "")) if told else "", event["text"]


def refused(events):
    """How many assign_task calls were refused, repetitions above all: to be watched beside r_finish (bug 64). Calls in error, such as to an
    agent that was never created, are not counted."""
    return sum(why.startswith("Refused") for _, _, why in _not_run(events))


def step_graph(events):
    """Every answer with those that it waited for, read off the events alone: {(agent, step): tuple of (agent, step)}.

    An answer waits for the one before it of its agent; a subtask's first for the step that gave it away; main also for
    all that its last step gave away. `critical.longest_path` of it is the critical path.
    """
    graph, given, latest = {}, {}, {}
    for event in events:
        if event["kind"] == "assign":
            given[event["task"]] = event["step"]
        elif event["kind"] == "answer":
            agent, step = event["agent"], event["step"]
            waits = [(agent, step - 1)] if step else []
            if agent == "main":
                waits += [(task, latest[task]) for task, stage in given.items() if stage == step - 1 and task in latest]
            elif not step:
                waits = [("main", given[agent])]
            graph[agent, step], latest[agent] = tuple(waits), step
    return graph


# --------------------------------------------------------------------------------------------- the terminal


def plain(text, keep=""):
    """A text of somebody else's that does nothing to a terminal."""
    return "".join(letter if letter.isprintable() or letter in keep else " " for letter in text)


class View:
    """Agents, steps and budgets on a terminal, redrawn in place as events come. stream: of text; nothing is drawn unless it is a tty."""

    def __init__(self, swarm, stream, rows=12):
        self.swarm, self.stream, self.rows, self._drawn, self._at = swarm, stream, rows, 0, 0.0
        if stream.isatty():
            swarm.log.heard.append(self._heard)

    def lines(self):
        """What it shows, list of str."""
        swarm, limits, slots = self.swarm, self.swarm.limits, self.swarm.slots
        agents = [agent for agent in swarm.agents.values() if not agent.main]
        found = [f"critical {swarm.critical}/{limits.critical_steps}  calls {swarm.calls}/{limits.tool_calls}  agents {len(agents)}/{limits.agents}  "
                 f"subtasks {len(swarm.results)}/{len(swarm.assigned)}  slots {slots.running[True]}+{slots.running[False]}/{slots.cap}"]  # fmt: skip
        for agent in [agent for agent in swarm.agents.values() if agent.main] + agents[: self.rows]:
            name = "main" if agent.main else f"{agent.name} {agent.kind}"
            done = min(10, 10 * agent.steps // agent.most)
            found.append(f"  {plain(name)[:24]:24} {'#' * done:.<10} {agent.steps:3}/{agent.most:<4} {plain(agent.state)[:36]}")
        return found + ([f"  and {len(agents) - self.rows} more"] if len(agents) > self.rows else [])

    def _heard(self, event):
        now = time.monotonic()
        if now - self._at >= 0.1 or event["kind"] == "end":
            self._at = now
            lines = [line[: shutil.get_terminal_size().columns - 1] for line in self.lines()]  # one that is wrapped would count as two
            self.stream.write((f"\x1b[{self._drawn}F\x1b[J" if self._drawn else "") + "".join(f"{line}\n" for line in lines))
            self.stream.flush()
            self._drawn = len(lines)
