"""Agent Swarm: an orchestrator that gives subtasks to subagents of its own making, which work side by side — K2.5 report 3, E.8.

    python swarm.py run --base-url http://127.0.0.1:8000/v1 --model kimi-k2.5 --corpus notes --run runs/swarm "question"
    python swarm.py run --run runs/swarm --resume …           # goes on where it was killed
    python swarm.py run --local runs/toy/model --corpus notes "question"            # a K25 in this process
    python swarm.py trace --run runs/swarm                   # its page, trace.html, which `run` writes too when it ends
    python swarm.py bench                                    # how it scales (swarm_bench.py)

    outcome = await Swarm(question, policy, corpus, Log(None)).run()

The orchestrator has the report's two tools, create_subagent(name, system_prompt) and assign_task(agent, prompt), beside search, browse
and python; subagents have the latter three. Calls of one answer run side by side. A subagent sees its prompts and what
its own tools return, and nothing else; only its last message returns to the orchestrator. Nothing predefines whether, when
and how often work is given away, and no prompt speaks of it.

- **Policies** (policies.py) answer: a server that speaks OpenAI's chat API, or a K25 in this process, token in, token out.
- **Limits** are constraints, not advice. At its limit an agent ends with what it has, and its result says so. One critical step is
  always kept back for the orchestrator's next answer.
- **Failures** are observations: a subagent whose model fails, hangs, writes what cannot be used or comes to a limit returns a line
  that says so, and the subtask may be given again. One that equals another that runs or is finished, but for case and space, is refused.
- **Slots** cap the answers sampled at once and share them between orchestrators and subagents. Both can change meanwhile: `Slots.change`,
  or write CAP SHARE into RUN/slots and send SIGUSR1.
- **The log** (swarm_log.py) holds each answer and result before anything follows from it. A run that was killed asks nobody again
  for what is in it; only calls that had not returned are made once more.

Public names: Limits, Slots, Swarm, Outcome, DELEGATION, rare_collections, main.
Tests: pytest tests/test_swarm.py
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import gc
import importlib
import json
import pathlib
import re
import signal
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass

from corpus import Corpus, Tools, declared, misfit
from critical import critical_steps, normalised, total_steps
from policies import KEY_VARIABLE, ContextFullError, Endpoint, PolicyError, SwarmError, local_policy
from swarm_log import REPEATED, Log, LogError, View, calls_before, episode, plain, read_log, read_message, refused, sendable
from swarm_trace import trace

# ------------------------------------------------------------------------------------------- tools, limits


DELEGATION = [
    declared("create_subagent", "Makes a kind of agent, to be used any number of times.", ["name", "system_prompt"],
              name=("string", "Its name, unlike all others"), system_prompt=("string", "Its role, what it can do and what not")),
    declared("assign_task", "Lets an agent do a task. It returns a single message when it is done.", ["agent", "prompt"],
              agent=("string", "Name of an agent that was created"), prompt=("string", "The task")),
]  # fmt: skip
DELEGATING = tuple(tool["function"]["name"] for tool in DELEGATION)
ORCHESTRATOR = "You answer a question from a corpus of pages. Use the tools; when you know the answer, write it without calling a tool."


@dataclass(frozen=True)
class Limits:
    """Limits of a run, each a flag of `run`. Raises SwarmError unless all are positive."""

    main_steps: int = 15  # answers of the orchestrator
    sub_steps: int = 100  # answers of a subagent, per subtask
    critical_steps: int = 1000  # of the run
    tool_calls: int = 1500  # of the run, everybody's
    own_calls: int = 100  # of one answer, to search, browse and python; what is beyond is refused
    agents: int = 100  # subagents at once
    context: int = 400_000  # characters that an agent sends at most: its messages and tools, as JSON
    observation: int = 8000  # characters of what a tool or a subagent returns
    garbage: int = 3  # answers in a row that cannot be used
    seconds: float = 900.0  # of one answer with its retries, or of one tool call; waiting for a slot is not counted

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if not getattr(self, f.name) > 0:
                raise SwarmError(f"{f.name} is {getattr(self, f.name)}: it must be positive")


class Slots:
    """The cap on answers that are sampled at once, shared between orchestrators and subagents; for any number of runs.

    cap: int ≥ 2; share: of the orchestrators, 0…1, who have at least one slot and leave at least one. Raises SwarmError.
    """

    def __init__(self, cap=16, share=0.25):
        self.running, self._waiting = {True: 0, False: 0}, {True: deque(), False: deque()}
        self.change(cap, share)

    def change(self, cap=None, share=None):
        """Set either or both, at any time: waiting answers begin at once where there is room, running ones are left alone."""
        cap, share = self.cap if cap is None else cap, self.share if share is None else share
        if cap < 2 or not 0 <= share <= 1:
            raise SwarmError(f"{cap} slots, {share} of them for orchestrators: at least 2, and a share of 0 to 1")
        self.cap, self.share = cap, share
        main = min(max(1, round(cap * share)), cap - 1)
        self.quota = {True: main, False: cap - main}
        self._wake()

    @contextlib.asynccontextmanager
    async def hold(self, main):
        """Wait for a slot and have it meanwhile. main: bool — an orchestrator's."""
        ticket = asyncio.get_running_loop().create_future()
        self._waiting[main].append(ticket)
        self._wake()
        try:
            await ticket
            yield
        finally:
            if ticket.done() and not ticket.cancelled():
                self.running[main] -= 1
            else:
                ticket.cancel()
            self._wake()

    def _wake(self):
        # After a change of shares the others may still hold more than theirs: the cap holds for both together.
        for main, waiting in self._waiting.items():
            while waiting and self.running[main] < self.quota[main] and sum(self.running.values()) < self.cap:
                ticket = waiting.popleft()
                if not ticket.done():
                    self.running[main] += 1
                    ticket.set_result(None)


# ------------------------------------------------------------------------------------------------ the swarm


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: str  # "done" | "steps" | "critical steps" | "context" | "garbage"
    answer: str  # "" when there is none
    why: str = ""  # more about a status that is not "done"


@dataclass
class _Agent:
    """One conversation."""

    name: object  # "main", or the number of the subtask
    messages: list
    tools: list
    most: int  # steps
    characters: int  # of what it sends: its tools and the messages that are counted, as JSON
    kind: str = "main"  # as whom it was created
    counted: int = 0  # messages
    steps: int = 0
    said: str = ""  # the last content that it wrote
    state: str = "waits"  # for the view
    why: str = ""  # its context is full, in the model's words

    @property
    def main(self):
        return self.name == "main"

    def measure(self):
        """Characters of [messages, tools] as JSON. Each message is looked at once, and must be as it is going to be sent."""
        self.characters += len(json.dumps(sendable(self.messages[self.counted :])))
        self.counted = len(self.messages)
        return self.characters + 4


async def _together(coroutines):
    """Results of coroutines that run side by side; the first exception ends all of them."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


class Swarm:
    """One run, from a question to an Outcome.

    question: str; policy: of the orchestrator; corpus: Corpus; log: Log — when it has events, the run goes on from them, with the
    limits in them; limits: Limits; subpolicy: of the subagents, default the same; pool: InterpreterPool, or None for no python tool;
    slots: Slots; delegation: False for a single agent; system: what main is told first. agents: those at work, by name; critical,
    calls: spent so far; assigned: subtasks by (step, place) of the call; results: events by subtask. Raises SwarmError when the log
    is of another run.
    """

    def __init__(self, question, policy, corpus, log, limits=Limits(), *, subpolicy=None, pool=None, slots=None, delegation=True,
                 system=ORCHESTRATOR):  # fmt: skip
        self.question, self.policy, self.subpolicy, self.corpus, self.log = question, policy, subpolicy or policy, corpus, log
        self.pool, self.slots, self.limits, self.delegation = pool, slots or Slots(), limits, DELEGATION if delegation else []
        self.system = system
        self.tools = Tools(corpus, pool)
        self.agents, self.kinds, self.critical, self.calls = {}, {}, 0, 0
        self._answers, self._returned, self.assigned, self.results, self._end = {}, {}, {}, {}, None
        self._prompts = {}  # normalised → (task, name of the agent) of subtasks that run or are finished
        self._given = Counter()  # subtasks by step
        self._declared = len(json.dumps(self.tools.declarations))  # characters
        try:
            self._read(log.events)
        except (KeyError, TypeError) as error:
            raise SwarmError(f"the log is not that of a swarm, or of another version: {type(error).__name__} {error}") from error

    def _read(self, events):
        """Take over what a log says."""
        if events and events[0]["kind"] != "start":
            raise SwarmError("the log has no run: its first event is not a start")
        texts = {}  # prompts of subtasks, normalised
        for event in events:
            match event:
                case {"kind": "start"}:
                    self.limits = Limits(**event["limits"])
                    asked = {"question": self.question, "corpus": self.corpus.digest, "python": self.pool is not None, "system": self.system}
                    for key, value in asked.items():
                        if (event.get(key, value) if key == "system" else event[key]) != value:  # system stands in no older log
                            raise SwarmError(f"the log is of another {key}: resume with the same one, or choose another run")
                case {"kind": "answer", "agent": agent, "step": step, "message": message}:
                    self._answers[agent, step] = message
                case {"kind": "create"}:
                    self.kinds[event["name"]] = event["system_prompt"]
                case {"kind": "assign", "task": task, "agent": agent, "prompt": prompt}:
                    self.assigned[event["step"], event["place"]], texts[task] = task, normalised(prompt)
                    self._prompts[texts[task]] = task, agent
                    self._given[event["step"]] += 1
                case {"kind": "result", "task": task, "status": status}:
                    self.results[task] = event
                    if status != "done":
                        self._prompts.pop(texts.get(task), None)
                case {"kind": "call"}:
                    self._returned[event["agent"], event["step"], event["place"]] = event["text"]
                    self.calls += event["ran"]
                case {"kind": "end"}:
                    self._end = Outcome(event["status"], event["text"], event["why"])

    async def run(self):
        """Work until the question is answered or a limit is reached. Returns Outcome.

        Raises PolicyError when the orchestrator's model does not answer; the log is whole, and the run can go on later.
        """
        if self._end:
            return self._end
        if self.log.events:
            self.log.add("resume")
        else:
            self.log.add("start", question=self.question, system=self.system, limits=dataclasses.asdict(self.limits), corpus=self.corpus.digest,
                         python=self.pool is not None, models=[str(self.policy), str(self.subpolicy)])  # fmt: skip
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": self.question}]
        tools = [*self.delegation, *self.tools.declarations]
        main = _Agent("main", messages, tools, self.limits.main_steps, len(json.dumps(tools)))
        status, text = await self._work(main)
        self.log.add("end", status=status, text=text, why=main.why)
        return Outcome(status, text, main.why)

    # -- one agent

    async def _work(self, agent):
        """An agent until it ends. Returns (status, what it says)."""
        self.agents[agent.name] = agent
        useless = 0
        try:
            while True:
                if agent.steps >= agent.most or (agent.main and self.critical >= self.limits.critical_steps):
                    return ("steps" if agent.steps >= agent.most else "critical steps"), agent.said
                try:
                    message = await self._answer(agent)
                except ContextFullError as error:
                    agent.why = str(error)
                    return "context", agent.said
                agent.steps += 1
                agent.said = message.content or agent.said
                self.critical += agent.main
                agent.messages.append(message.as_dict())
                if not message.tool_calls and not message.errors and message.content.strip():
                    return "done", message.content
                useless = 0 if message.tool_calls else useless + 1
                if useless == self.limits.garbage:
                    return "garbage", agent.said
                await self._observe(agent, message)
        finally:
            del self.agents[agent.name]

    async def _answer(self, agent):
        """The next answer of an agent, from the log or from its model."""
        logged = self._answers.pop((agent.name, agent.steps), None)
        if logged is not None:
            return read_message(logged, calls_before(agent.messages))
        if agent.measure() > self.limits.context:
            raise ContextFullError(f"more than {self.limits.context} characters")
        agent.state = "waits"
        async with self.slots.hold(agent.main):
            agent.state, begun = "thinks", time.monotonic()
            policy = self.policy if agent.main else self.subpolicy
            message = await self._in_time(policy.answer(agent.messages, agent.tools, str(agent.name)), "the model")
        self.log.add("answer", agent=agent.name, step=agent.steps, message=message.as_dict() | {"errors": list(message.errors)},
                     seconds=round(time.monotonic() - begun, 3))  # fmt: skip
        return message

    async def _in_time(self, coroutine, who):
        try:
            async with asyncio.timeout(self.limits.seconds) as limit:
                return await coroutine
        except TimeoutError:
            if not limit.expired():
                raise
            raise PolicyError(f"{who} did not answer within {self.limits.seconds:g} seconds") from None

    async def _observe(self, agent, message):
        """Make the calls of an answer side by side, and append what they return, in their order."""
        step, calls = agent.steps - 1, message.tool_calls
        agent.state = ", ".join(sorted({call.name for call in calls})) or "errs"
        stage = []  # steps of the subtasks that this answer gives away
        places = sorted(range(len(calls)), key=lambda place: calls[place].name != "create_subagent")
        own = [place for place, call in enumerate(calls) if call.name not in DELEGATING]
        surplus = set(own[self.limits.own_calls :])
        begun = [self._begin(agent, step, place, calls[place], stage, place in surplus) for place in places]
        texts = dict(zip(places, await _together([self._finish(agent, step, place, work) for place, work in zip(places, begun)])))
        self.critical += max(stage, default=0)
        for place, call in enumerate(calls):
            agent.messages.append({"role": "tool", "tool_call_id": call.id, "content": texts[place]})
        if message.errors or not calls:
            what = "; ".join(message.errors) or "an answer without words and without a call"
            agent.messages.append({"role": "system", "content": f"Error: {what}"[: self.limits.observation]})
        left = agent.most - agent.steps
        if agent.main:
            left = min(left, self.limits.critical_steps - self.critical)
        if left == 1:
            agent.messages[-1]["content"] += "\n[One step is left: answer now.]"

    # -- calls

    def _begin(self, agent, step, place, call, stage, surplus):
        """What is to be done for a call, a function without arguments; or a text where nothing is: it was done, or is refused."""
        task = self.assigned.get((step, place)) if agent.main else None
        if (text := self._returned.get((agent.name, step, place))) is not None:
            if task:
                stage.append(self.results[task]["steps"])
            return text
        if wrong := misfit(call, agent.tools):
            return f"Error: {wrong}"
        if surplus:
            return f"Refused: {self.limits.own_calls} of these calls in one answer, at most"
        if self.calls >= self.limits.tool_calls:
            return f"Refused: the {self.limits.tool_calls} tool calls of this run are spent; answer with what you have"
        if call.name == "assign_task":
            work = self._assign(step, place, task, call.arguments["agent"], call.arguments["prompt"], stage)
        elif call.name == "create_subagent":
            work = functools.partial(asyncio.sleep, 0, self._create(**call.arguments))  # at once: calls beside it may use it
        else:
            work = functools.partial(self._use, call.name, call.arguments)
        self.calls += not isinstance(work, str)
        return work

    async def _finish(self, agent, step, place, work):
        """The text that a call returns, written down."""
        if (agent.name, step, place) in self._returned:
            return work
        ran, begun = not isinstance(work, str), time.monotonic()
        text = await work() if ran else work
        if len(text) > self.limits.observation:
            text = f"{text[: self.limits.observation]}\n[cut: {len(text)} characters]"
        self.log.add("call", agent=agent.name, step=step, place=place, ran=ran, text=text, seconds=round(time.monotonic() - begun, 3))
        return text

    async def _use(self, name, arguments):
        """What one of the tools returns."""
        try:
            return await self._in_time(getattr(self.tools, name)(**arguments), "the tool")
        except PolicyError as error:
            return f"Error: {error}"

    def _create(self, name, system_prompt):
        if not re.fullmatch(r"\S(.{0,62}\S)?", name):
            return "Error: a name has 1 to 64 characters in one line, no space at its ends"
        if self.kinds.get(name, system_prompt) != system_prompt:
            return f"Error: {name!r} was created with another prompt: choose another name"
        if name not in self.kinds:
            self.kinds[name] = system_prompt
            self.log.add("create", name=name, system_prompt=system_prompt)
        return f"{name} was created"

    # -- subtasks

    def _assign(self, step, place, task, kind, prompt, stage):
        """A subtask to be run, or why it is refused. task: its number when the log has it already."""
        if task is None:
            text, left = normalised(prompt), self.limits.critical_steps - self.critical - 1
            if kind not in self.kinds:
                return f"Error: no agent {kind[:64]!r}: create it first"
            if not text:
                return "Error: the prompt is empty"
            if text in self._prompts:
                task, other = self._prompts[text]
                state = "has finished; its result stands above" if task in self.results else "is at work"
                return f"Refused: {other} {REPEATED}, number {task}, and {state}"
            if self._given[step] >= self.limits.agents:
                return f"Refused: {self.limits.agents} agents are at work, the most at once; assign it again after this step"
            if left < 1:
                return "Refused: the critical steps that are left are needed for the answer"
            task = len(self.assigned) + 1
            self.assigned[step, place], self._prompts[text] = task, (task, kind)
            self._given[step] += 1
            self.log.add("assign", task=task, agent=kind, prompt=prompt, step=step, place=place)
        most = min(self.limits.sub_steps, self.limits.critical_steps - self.critical - 1)
        return functools.partial(self._subtask, task, kind, prompt, most, stage)

    async def _subtask(self, task, kind, prompt, most, stage):
        """Run a subtask to its end. Returns what the orchestrator is told."""
        if task not in self.results:
            messages = [{"role": "system", "content": self.kinds[kind]}, {"role": "user", "content": prompt}]
            agent = _Agent(task, messages, self.tools.declarations, most, self._declared, kind)
            try:
                status, text = await self._work(agent)
                why = {"steps": f"its {most} steps are spent", "context": f"its context is full, {agent.why}",
                       "garbage": f"{self.limits.garbage} answers in a row could not be used"}.get(status)  # fmt: skip
            except LogError:
                raise
            except Exception as error:  # of its model: an observation for the orchestrator, nobody else hears of it
                status, text, why = "failed", agent.said, str(error) if isinstance(error, PolicyError) else f"{type(error).__name__}: {error}"
            if why:
                text = text or next((m["content"] for m in reversed(messages) if m["role"] == "tool"), "")
                text = f"Error: not finished after {agent.steps} steps: {why}; the task may be assigned again" + (f"\nIt had: {text}" if text else "")
                self._prompts.pop(normalised(prompt), None)
            self.results[task] = self.log.add("result", task=task, status=status, steps=agent.steps, text=text)
        stage.append(self.results[task]["steps"])
        return self.results[task]["text"]


# --------------------------------------------------------------------------------------------- command line


@contextlib.contextmanager
def rare_collections():
    """Python looks for circular garbage among all that is alive a hundred times more rarely: of 30,000 agents' time it took a third."""
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _retune(slots, path):
    """Set the slots to what a file says, `CAP SHARE`."""
    try:
        cap, share = path.read_text().split()
        slots.change(int(cap), float(share))
    except (ValueError, OSError) as error:
        print(f"swarm.py run: {path} should hold two numbers, CAP SHARE: {error}", file=sys.stderr)


def _write_page(events, path):
    """Write the page of a run."""
    from checkpoint import write_file  # here: it loads torch

    write_file(path, trace(events))


async def _run(options, limits):
    """The command `run`. Returns the exit code."""
    folder = pathlib.Path(options.run)
    sampling = {key: getattr(options, key) for key in ("temperature", "top_p") if getattr(options, key) is not None}
    corpus = Corpus(options.corpus)
    async with contextlib.AsyncExitStack() as stack:
        if options.local:
            longest = {"max_new_tokens": options.max_tokens} if options.max_tokens else {}
            policy = local_policy(options.local, options.slots, options.capacity, options.seed, sampling | longest, not options.instant)
        else:
            extra = {"max_tokens": options.max_tokens} if options.max_tokens else {}
            extra |= {"chat_template_kwargs": {"thinking": False}} if options.instant else {}
            policy = await stack.enter_async_context(Endpoint(options.base_url, options.model, sampling | extra, retries=options.retries,
                                                              timeout=options.timeout, seed=options.seed))  # fmt: skip
        log = stack.enter_context(Log(folder / "events.jsonl"))
        if log.events and not options.resume:
            raise SwarmError(f"{folder} has a run already: --resume it, or choose another folder with --run")
        question = options.question or next((event.get("question") for event in log.events if event["kind"] == "start"), None)
        if not question:
            raise SwarmError("there is no question: write it behind the flags")
        pool = None
        if not options.no_python:
            from interpreter import InterpreterPool

            pool = stack.enter_context(InterpreterPool())
        swarm = Swarm(question, policy, corpus, log, limits, pool=pool, slots=Slots(options.slots, options.share))
        View(swarm, sys.stderr)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _retune, swarm.slots, folder / "slots")
        try:
            outcome = await swarm.run()
        except PolicyError as error:
            raise SwarmError(f"{error}; go on later with --resume") from None
        finally:
            try:
                _write_page(log.events, folder / "trace.html")
            except (LogError, OSError) as error:
                print(f"swarm.py run: {folder / 'trace.html'} is not written: {error}", file=sys.stderr)
        print(plain(outcome.answer, "\n"))
        steps = episode(log.events)
        status = f"{outcome.status} ({plain(outcome.why)})" if outcome.why else outcome.status
        print(f"{status}: {critical_steps(steps)} critical steps, {total_steps(steps)} in all, {len(swarm.assigned)} subtasks, "
              f"{refused(log.events)} refused, "
              f"{swarm.calls} tool calls; {folder / 'events.jsonl'}", file=sys.stderr)  # fmt: skip
        return 0 if outcome.status == "done" else 1


def main(arguments=None):
    """The command line. Returns the exit code: 0 with an answer, 1 when a limit ended the run, 2 for misuse or a model out of reach."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["bench"]:
        return importlib.import_module("swarm_bench").main(words[1:])  # a module above this one
    parser = argparse.ArgumentParser(prog="swarm.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("bench", help="how speed, memory and overhead grow with the agents")
    command = commands.add_parser("trace", help="write the page of a run, also of one that works or was killed")
    command.add_argument("--run", default="runs/swarm", metavar="FOLDER", help="with the event log")
    command.add_argument("--out", metavar="FILE", help="default trace.html in that folder")
    command = commands.add_parser("run", help="answer a question from a corpus")
    command.add_argument("question", nargs="?", help="may be left out with --resume")
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("--base-url", metavar="URL", help=f"of an OpenAI-compatible server, up to /v1; its key comes from {KEY_VARIABLE}")
    model.add_argument("--local", metavar="FOLDER", help="a K25 checkpoint to run in this process")
    command.add_argument("--model", default="k25", help="its name at the server")
    command.add_argument("--corpus", required=True, metavar="FOLDER", help="with .txt and .md files")
    command.add_argument("--run", default="runs/swarm", metavar="FOLDER", help="where the event log is written")
    command.add_argument("--resume", action="store_true", help="go on with the run of that folder, within its limits")
    for flag, kind, default, about in (
        ("slots", int, 16, "answers that are sampled at once"), ("share", float, 0.25, "of the slots for the orchestrator"),
        ("temperature", float, None, "of sampling"), ("top-p", float, None, "of sampling"), ("max-tokens", int, None, "of one answer"),
        ("timeout", float, 300.0, "seconds of one request"), ("retries", int, 5, "of a request that failed"),
        ("capacity", int, 8192, "tokens of a local model's context"), ("seed", int, 0, "of a local model's answers and of the waits between retries"),
    ):  # fmt: skip
        command.add_argument(f"--{flag}", type=kind, default=default, help=about)
    command.add_argument("--no-python", action="store_true", help="leave the python tool out")
    command.add_argument("--instant", action="store_true", help="answers without thinking")
    for f in dataclasses.fields(Limits):
        command.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), help=f"limit, default {f.default}")
    options = parser.parse_args(arguments)
    if options.command == "trace":
        try:
            _write_page(read_log(pathlib.Path(options.run, "events.jsonl")), options.out or pathlib.Path(options.run, "trace.html"))
        except (ValueError, OSError) as error:
            print(f"swarm.py trace: {error}", file=sys.stderr)
            return 2
        return 0
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Limits) if getattr(options, f.name) is not None}
    try:
        if options.resume and given:
            raise SwarmError(f"a resumed run keeps its limits: leave --{next(iter(given)).replace('_', '-')} out")
        with rare_collections():
            return asyncio.run(_run(options, Limits(**given)))
    except (ValueError, OSError) as error:
        print(f"swarm.py run: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("swarm.py run: stopped; go on with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
