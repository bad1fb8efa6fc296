"""Claims about swarm.py: budgets hold, failures are observations, nothing finished is lost, and both kinds of policy drive it.

A real HTTP server plays a competent orchestrator and subagents that go wrong as they are told. Numbers after `bug` are those of the
public bug list.
Run: .venv/bin/python -m pytest tests/test_swarm.py
"""

import asyncio
import collections
import contextlib
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
from test_rl import CONFIG

import swarm as command
from corpus import Corpus
from critical import critical_steps, finish_reward, item_f1, longest_path, parallel_reward, total_steps
from engine import Completion, Engine
from gateway import Gateway
from interpreter import InterpreterPool
from k25 import K25, save
from policies import KEY_VARIABLE, Endpoint, Local, PolicyError, SwarmError
from rollout import Handle, RolloutManager, Sampling
from swarm import Limits, Slots, Swarm
from swarm_log import Log, View, episode, read_calls, read_log, refused, step_graph
from swarm_trace import trace
from template import Message
from tokenizer import Tokenizer

web = pytest.importorskip("aiohttp.web")
ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENIZER = Tokenizer()
HEIGHTS = {"ash": 31, "birch": 47, "cedar": 52, "elm": 28, "fir": 63, "oak": 39}


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    for tower, height in HEIGHTS.items():
        (folder / f"{tower}.md").write_text(f"# The {tower} tower\nIt is {height} metres high.\n")
    return folder


def said(content="", *calls, reasoning=""):
    """A message of OpenAI's form; calls: (name, arguments), with ids that are no Kimi's (bug 39)."""
    made = [{"id": f"call_{os.urandom(4).hex()}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for name, arguments in calls]  # fmt: skip
    return {"role": "assistant", "content": content or None, "reasoning_content": reasoning} | ({"tool_calls": made} if made else {})


def subagent(messages):
    """Searches, reads and answers."""
    tower = messages[1]["content"].split()[-1]
    seen = [message["content"] for message in messages if message["role"] == "tool"]
    if not seen:
        return said("", ("search", {"query": tower}))
    if len(seen) == 1:
        return said("", ("browse", {"page": seen[0].split()[0]}))
    return said(f"{tower}: " + re.search(r"is (\d+)", seen[1])[1])


def orchestrator(messages):
    """Gives every tower away, once more what failed, and adds up."""
    towers = messages[1]["content"].split(": ")[1].split()
    results = [message["content"] for message in messages if message["role"] == "tool" and not message["content"].startswith("Error")]
    found = dict(re.findall(r"(\w+): (\d+)", "\n".join(results)))
    missing = [tower for tower in towers if tower not in found]
    if not missing or len([m for m in messages if m["role"] == "assistant"]) > 3:
        return said(" ".join(f"{tower}={found.get(tower, '?')}" for tower in towers))
    create = [] if len(messages) > 2 else [("create_subagent", {"name": "reader", "system_prompt": "You look one thing up."})]
    return said("", *create, *(("assign_task", {"agent": "reader", "prompt": f"Height of {tower}"}) for tower in missing))


class Server:
    """Answers by `orchestrator` and `subagent`; `trouble(who, number, body)` may return another web.Response, or wait.

    who: "main" or the tower that is asked for; number: of its requests so far. asked: requests by who; most: at once; bodies: all.
    """

    def __init__(self, trouble=None, main=orchestrator, sub=subagent):
        self.trouble, self.main, self.sub = trouble, main, sub
        self.asked, self.most, self.now, self.bodies, self.headers = collections.Counter(), collections.Counter(), collections.Counter(), [], []

    async def chat(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        main = any(tool["function"]["name"] == "assign_task" for tool in body["tools"])
        who = "main" if main else body["messages"][1]["content"].split()[-1]
        kind = "main" if main else "sub"
        number, self.asked[who] = self.asked[who], self.asked[who] + 1
        self.now[kind] += 1
        self.most[kind] = max(self.most[kind], self.now[kind])
        self.most["all"] = max(self.most["all"], sum(self.now.values()))
        try:
            await asyncio.sleep(0)
            if self.trouble and (found := await self.trouble(who, number, body)) is not None:
                return found
            message = (self.main if main else self.sub)(body["messages"])
            return web.json_response({"choices": [{"message": message, "finish_reason": "tool_calls" if message.get("tool_calls") else "stop"}]})
        finally:
            self.now[kind] -= 1

    @contextlib.asynccontextmanager
    async def serving(self):
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()

    @contextlib.contextmanager
    def in_thread(self):
        """The same for a child process to ask."""
        loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

        async def serve():
            async with self.serving() as self.url:
                ready.set()
                await stop.wait()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        try:
            ready.wait()
            yield self.url
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()


QUESTION = "Heights of: ash birch cedar"


def play(server, notes, question=QUESTION, log=None, slots=None, **options):
    """A run against a Server. Returns (Outcome, the Log, the Swarm)."""
    limits = {key: options.pop(key) for key in list(options) if key in Limits.__dataclass_fields__}
    log = log or Log(None)

    async def script():
        async with server.serving() as url, Endpoint(url, "kimi-k2.5", **{"backoff": 0.001, "retries": 2} | options) as policy:
            swarm = Swarm(question, policy, Corpus(notes), log, Limits(**limits), slots=slots)
            return await swarm.run(), log, swarm

    return asyncio.run(script())


def results(log):
    return {event["task"]: event for event in log.events if event["kind"] == "result"}


# The whole way


def test_a_competent_orchestrator_gets_its_answer_in_the_critical_steps_of_one_subagent(notes):
    outcome, log, swarm = play(Server(), notes)
    assert (outcome.status, outcome.answer) == ("done", "ash=31 birch=47 cedar=52")
    stages = episode(log.events)
    assert [(stage.main, [subtask.steps for subtask in stage.subtasks]) for stage in stages] == [(1, [3, 3, 3]), (1, [])]
    assert (critical_steps(stages), total_steps(stages), swarm.critical, finish_reward(stages)) == (5, 11, 5, 1.0)
    assert len(longest_path(step_graph(log.events))) == 5


@pytest.mark.parametrize("tools", [["create_subagent", "name", "system_prompt"], ["assign_task", "agent", "prompt"]], ids=lambda tool: tool[0])
def test_the_orchestrators_tools_are_those_of_the_report(tools):
    name, *arguments = tools
    (declared,) = [tool["function"] for tool in command.DELEGATION if tool["function"]["name"] == name]
    parameters = declared["parameters"]
    assert list(parameters["properties"]) == parameters["required"] == arguments
    assert {kind["type"] for kind in parameters["properties"].values()} == {"string"}


def test_only_results_enter_the_orchestrators_context_and_no_prompt_speaks_of_parallelism(notes):
    server = Server()
    play(server, notes)
    mine = [json.dumps(body) for body in server.bodies if body["messages"][1]["content"] == QUESTION]
    theirs = [json.dumps(body) for body in server.bodies if body["messages"][1]["content"] != QUESTION]
    assert len(mine) == 2 and len(theirs) == 9
    assert "metres" not in "".join(mine) and QUESTION not in "".join(theirs) and "assign_task" not in "".join(theirs)
    assert not re.search("parallel|concurren|side by side|at once", "".join(mine + theirs), re.IGNORECASE)


def test_call_ids_in_the_history_are_kimis_and_count_over_the_conversation_bug_39(notes):
    server = Server()
    play(server, notes)
    for body in server.bodies:
        ids = [call["id"] for message in body["messages"] for call in message.get("tool_calls", ())]
        assert [call.rsplit(":")[1] for call in ids] == [str(number) for number in range(len(ids))]
        assert all(call.startswith("functions.") for call in ids)
        assert [message["tool_call_id"] for message in body["messages"] if message["role"] == "tool"] == ids


def test_calls_that_a_server_left_in_kimis_tokens_are_read_bug_40(notes):
    def raw(messages):
        message = orchestrator(messages)
        calls = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.pop("tool_calls", [])]
        return message | ({"content": kimis("So.", *calls).removesuffix("<|im_end|>")} if calls else {})

    outcome, log, _ = play(Server(main=raw), notes)
    assert outcome.answer == "ash=31 birch=47 cedar=52" and len(results(log)) == 3


# Failures


async def never():
    await asyncio.get_running_loop().create_future()


def status(number, **headers):
    return web.json_response({"error": {"message": "not now"}}, status=number, headers=headers)


def empty():
    return web.json_response({"choices": [{"message": {"role": "assistant", "content": " "}, "finish_reason": "stop"}]})


def wrong_call():
    return web.json_response({"choices": [{"message": said("", ("search", {"query": 3}), ("fly", {}))}]})


TROUBLES = {  # requests that go wrong, what they are answered, what the orchestrator is told
    "500": (3, lambda: status(500), "answers 500: .*not now.* .3 tries."),
    "429": (3, lambda: status(429), "answers 429"),
    "403": (1, lambda: status(403), "answers 403"),
    "hang": (3, never, "no answer within 0.2 seconds"),
    "no JSON": (3, lambda: web.Response(text="<html>"), "what is no JSON"),
    "no completion": (3, lambda: web.json_response({"choices": []}), "no chat completion"),
    "no words": (3, empty, "3 answers in a row could not be used"),
    "no steps left": (4, wrong_call, "its 4 steps are spent"),
    "full": (1, lambda: web.json_response({"error": {"code": "context_length_exceeded"}}, status=400), "its context is full"),
}


@pytest.mark.parametrize("kind", TROUBLES)
def test_a_subagent_in_trouble_is_an_observation_and_its_task_is_given_again(notes, kind):
    count, answer, told = TROUBLES[kind]

    async def trouble(who, number, body):
        if who == "birch" and number < count:
            found = answer()
            return await found if asyncio.iscoroutine(found) else found

    server = Server(trouble)
    outcome, log, _ = play(server, notes, timeout=0.2 if kind == "hang" else 30, sub_steps=4)
    assert (outcome.status, outcome.answer) == ("done", "ash=31 birch=47 cedar=52")
    assert {task: event["status"] == "done" for task, event in results(log).items()} == {1: True, 2: False, 3: True, 4: True}
    assert re.search(rf"^Error: not finished after \d steps: .*{told}.*; the task may be assigned again", results(log)[2]["text"])
    assert server.asked == {"main": 3, "ash": 3, "birch": count + 3, "cedar": 3}  # what was finished was not asked again
    assert len(longest_path(step_graph(log.events))) == critical_steps(episode(log.events))


def test_what_goes_better_on_a_retry_is_no_failure(notes):
    async def trouble(who, number, body):
        return [status(429, **{"Retry-After": "0"}), status(503), None][min(number, 2)]

    outcome, log, _ = play(Server(trouble), notes)
    assert outcome.status == "done" and {event["status"] for event in results(log).values()} == {"done"}


def test_a_policy_that_never_returns_or_raises_anything_ends_its_agent_alone(notes):
    class Odd(Endpoint):
        async def answer(self, messages, tools, agent):
            if agent == "1":
                await never()
            if agent == "2":
                raise RuntimeError("a fault of the policy")
            return await super().answer(messages, tools, agent)

    async def script():
        async with Server().serving() as url, Endpoint(url, "m") as main, Odd(url, "m") as sub:
            swarm = Swarm(QUESTION, main, Corpus(notes), Log(None), Limits(seconds=0.3), subpolicy=sub)
            return await swarm.run(), swarm.log

    outcome, log = asyncio.run(script())
    assert outcome.answer == "ash=31 birch=47 cedar=52"
    assert "the model did not answer within 0.3 seconds" in results(log)[1]["text"] and "RuntimeError: a fault" in results(log)[2]["text"]


def test_an_orchestrator_without_a_model_stops_the_run_which_goes_on_later(notes):
    down = True

    async def trouble(who, number, body):
        return status(503) if down and who == "main" and number else None

    server, log = Server(trouble), Log(None)
    with pytest.raises(PolicyError, match="answers 503"):
        play(server, notes, log=log)
    down = False
    outcome, _, _ = play(server, notes, log=log)
    assert outcome.status == "done" and server.asked["ash"] == 3


# Budgets


def test_a_subtask_given_twice_is_refused_with_the_reason_bug_64(notes):
    def eager(messages):
        if len(messages) == 2:
            return said("", ("create_subagent", {"name": "r", "system_prompt": "s"}), ("assign_task", {"agent": "r", "prompt": "Height of ash"}),
                        ("assign_task", {"agent": "r", "prompt": "  height OF ash. "}))  # fmt: skip
        if len(messages) == 6:
            return said("", ("assign_task", {"agent": "r", "prompt": "height of ash"}), ("assign_task", {"agent": "x", "prompt": "elm"}),
                        ("create_subagent", {"name": "r", "system_prompt": "other"}), ("assign_task", {"agent": "r", "prompt": " "}))  # fmt: skip
        return said("31")

    server = Server(main=eager)
    outcome, log, swarm = play(server, notes)
    told = [event["text"] for event in log.events if event["kind"] == "call" and event["agent"] == "main"]
    assert "Refused: r was given this very task, number 1, and is at work" in told
    assert "Refused: r was given this very task, number 1, and has finished; its result stands above" in told
    assert "Error: no agent 'x': create it first" in told and "Error: the prompt is empty" in told
    assert any("'r' was created with another prompt" in text for text in told)
    assert refused(log.events) == 2 and finish_reward(episode(log.events)) == 1 / 3  # both repetitions count, as unfinished
    assert critical_steps(episode(log.events)) == 6 and parallel_reward(episode(log.events), 4) == 1 / 4
    assert server.asked["ash"] == 3 and len(swarm.assigned) == 1 and outcome.status == "done"


def test_a_task_that_was_refused_for_want_of_an_agent_is_no_repetition(notes):
    task = ("assign_task", {"agent": "r", "prompt": "Height of ash"})

    def late(messages):
        if len(messages) == 2:
            return said("", task)
        return said("", ("create_subagent", {"name": "r", "system_prompt": "s"}), task) if len(messages) == 4 else said("31")

    _, log, _ = play(Server(main=late), notes)
    assert refused(log.events) == 0 and [len(stage.subtasks) for stage in episode(log.events)] == [0, 1, 0]
    assert finish_reward(episode(log.events)) == 1.0


@pytest.mark.parametrize("limit", range(1, 9))
def test_critical_steps_never_exceed_their_budget_and_leave_one_for_the_answer(notes, limit):
    outcome, log, swarm = play(Server(), notes, critical_steps=limit)
    assert critical_steps(episode(log.events)) == swarm.critical <= limit
    assert (outcome.status, swarm.critical) == (("done", 5) if limit >= 5 else ("critical steps", limit))
    if limit == 4:  # two steps each, and one for the answer
        assert re.search(r"its 2 steps are spent; .*\nIt had: # The ash tower\nIt is 31", results(log)[1]["text"], re.DOTALL)
        assert {event["steps"] for event in results(log).values()} == {2}
    if limit == 2:
        assert not results(log) and "Refused: the critical steps that are left are needed for the answer" in json.dumps(log.events)


@pytest.mark.parametrize("limit", [1, 4, 7, 10])
def test_no_more_tools_are_called_than_the_budget_has(notes, limit):
    outcome, log, swarm = play(Server(), notes, tool_calls=limit, sub_steps=4)
    calls = [event for event in log.events if event["kind"] == "call"]
    assert sum(event["ran"] for event in calls) == swarm.calls == min(limit, 10)
    assert (limit == 10) != any(f"the {limit} tool calls of this run are spent" in event["text"] for event in calls)


def test_an_orchestrator_that_never_answers_ends_at_its_steps_and_is_warned_before_the_last(notes):
    server = Server(main=lambda messages: said("thinking", ("search", {"query": "ash"})))
    outcome, log, _ = play(server, notes, main_steps=3)
    assert (outcome.status, outcome.answer, server.asked["main"]) == ("steps", "thinking", 3)
    warned = [body["messages"][-1]["content"].endswith("[One step is left: answer now.]") for body in server.bodies]
    assert warned == [False, False, True]


def test_a_context_is_bounded_and_its_agent_ends_with_what_it_has(notes):
    server = Server(sub=lambda messages: said("so far: 31", ("search", {"query": "ash tower"})))
    _, log, _ = play(server, notes, "Heights of: ash", context=6000, observation=300)
    sizes = [len(json.dumps([body["messages"], body["tools"]])) for body in server.bodies]
    assert max(sizes) <= 6000 and all(len(event["text"]) < 400 for event in log.events if event["kind"] == "call")
    assert results(log)[1]["status"] == "context"
    assert re.search(r"its context is full, more than 6000 characters; .*\nIt had: so far: 31", results(log)[1]["text"], re.DOTALL)


def test_a_hundred_subagents_work_at_once_and_no_more(notes):
    meeting, here = asyncio.Event(), 0

    async def trouble(who, number, body):
        nonlocal here
        if who != "main":
            here += 1
            if here == 100:
                meeting.set()
            async with asyncio.timeout(60):
                await meeting.wait()

    def main(messages):
        if len(messages) == 2:
            return said("", ("create_subagent", {"name": "r", "system_prompt": "s"}),
                        *(("assign_task", {"agent": "r", "prompt": f"number {n}"}) for n in range(101)))  # fmt: skip
        return said(messages[-1]["content"])

    server = Server(trouble, main, lambda messages: said("seen"))
    outcome, log, swarm = play(server, notes, slots=Slots(101, 0.0), timeout=120)
    assert server.most["sub"] == 100 and len(results(log)) == 100 and swarm.critical == 3
    assert outcome.answer == "Refused: 100 agents are at work, the most at once; assign it again after this step"


@pytest.mark.parametrize(("before", "after", "most"), [((2, 0.5), (7, 0.15), 6), ((7, 0.15), (3, 0.6), 1), ((9, 0.3), (9, 0.9), 1)])
def test_slots_are_shared_as_told_and_the_share_can_change_while_they_run(before, after, most):
    slots, running, seen, gate = Slots(*before), collections.Counter(), collections.Counter(), asyncio.Event()

    async def worker(main):
        async with slots.hold(main):
            running[main] += 1
            assert running[main] <= max(slots.quota[main], seen[main]) and sum(running.values()) <= max(slots.cap, sum(seen.values()))
            await gate.wait()
            running[main] -= 1

    async def script():
        tasks = [asyncio.create_task(worker(main)) for main in [True] * 20 + [False] * 20]
        await asyncio.sleep(0.01)
        assert running == slots.quota == slots.running and sum(running.values()) == before[0]
        seen.update(running)
        slots.change(*after)
        await asyncio.sleep(0.01)
        assert slots.quota[False] == most
        assert all(running[main] <= max(slots.quota[main], seen[main]) for main in running)  # those that run are left alone
        assert sum(running.values()) == max(before[0], after[0])
        for task in tasks[:5]:
            task.cancel()
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert slots.running == {True: 0, False: 0}

    asyncio.run(script())
    for wrong in ((1, 0.5), (4, 1.5)):
        with pytest.raises(SwarmError, match="at least 2, and a share of 0 to 1"):
            Slots(*wrong)


def test_a_run_keeps_to_its_slots(notes):
    async def meet(who, number, body):
        while who in ("ash", "birch") and number == 0 and server.asked["ash"] + server.asked["birch"] < 2:
            await asyncio.sleep(0)

    server = Server(meet)
    play(server, notes, "Heights of: ash birch cedar elm fir oak", slots=Slots(3, 0.34))
    assert server.most == {"main": 1, "sub": 2, "all": 2}


def test_a_program_that_does_not_end_is_killed_and_the_next_one_runs_bug_62(notes):
    def sub(messages):
        if len(messages) < 4:
            return said("", ("python", {"code": "while True: pass" if len(messages) == 2 else "print(1)"}))
        return said(messages[-1]["content"])

    async def script():
        async with Server(sub=lambda messages: sub([m for m in messages if m["role"] != "assistant"])).serving() as url, Endpoint(url, "m") as policy:
            with InterpreterPool() as pool:
                swarm = Swarm("Heights of: ash", policy, Corpus(notes), Log(None), Limits(seconds=0.5), pool=pool)
                await swarm.run()
                return swarm.log

    log = asyncio.run(script())
    texts = [event["text"] for event in log.events if event["kind"] == "call" and event["agent"] == 1]
    assert texts == ["Error: the tool did not answer within 0.5 seconds", "1"] and results(log)[1]["text"] == "1"


def test_slots_are_read_from_a_file_while_a_run_goes_on(tmp_path, capsys):
    slots = Slots(4, 0.5)
    (tmp_path / "slots").write_text("10 0.2\n")
    command._retune(slots, tmp_path / "slots")
    assert slots.quota == {True: 2, False: 8}
    for wrong in ("1 0.2", "many", ""):
        (tmp_path / "slots").write_text(wrong)
        command._retune(slots, tmp_path / "slots")
        assert "should hold two numbers, CAP SHARE" in capsys.readouterr().err and slots.quota == {True: 2, False: 8}


# Kill and resume


def test_a_run_cut_after_any_event_goes_on_without_repeating_what_it_has(notes):
    async def trouble(who, number, body):
        return status(403) if who == "birch" and number == 0 else None

    outcome, whole, _ = play(Server(trouble), notes)
    answers = sum(event["kind"] == "answer" for event in whole.events)
    assert outcome.answer == "ash=31 birch=47 cedar=52" and answers == 12
    for cut in range(1, len(whole.events)):
        log = Log(None)
        log.events = whole.events[:cut]
        have = sum(event["kind"] == "answer" for event in log.events)
        failed = any(event["kind"] == "result" and event["status"] != "done" for event in log.events)
        server = Server()
        again, _, swarm = play(server, notes, log=log)
        assert again == outcome, cut
        steps = [(event["agent"], event["step"]) for event in log.events if event["kind"] == "answer"]
        assert len(steps) == len(set(steps)) and sum(server.asked.values()) == len(steps) - have, cut
        done = [event["task"] for event in log.events if event["kind"] == "result"]
        assert len(done) == len(set(done)) and len(done) == 3 + failed
        assert swarm.critical == critical_steps(episode(log.events)) == len(longest_path(step_graph(log.events)))
        assert swarm.calls == sum(event["ran"] for event in log.events if event["kind"] == "call")


def test_a_killed_process_is_resumed_from_its_log(notes, tmp_path):
    child, kills = None, {("birch", 1), ("main", 1)}

    async def trouble(who, number, body):
        if (who, number) in kills:
            kills.discard((who, number))
            child.send_signal(signal.SIGKILL)
            await never()

    server = Server(trouble)
    with server.in_thread() as url:
        words = [sys.executable, "swarm.py", "run", "--base-url", url, "--corpus", str(notes), "--no-python", "--run", str(tmp_path / "run")]
        codes, more = [], [QUESTION]
        for _ in range(3):
            child = subprocess.Popen([*words, *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            out, err = child.communicate(timeout=120)
            codes.append(child.returncode)
            more = ["--resume"]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0] and out == "ash=31 birch=47 cedar=52\n"
    assert err.startswith("done: 5 critical steps, 11 in all, 3 subtasks, 0 refused, 10 tool calls")
    events = read_log(tmp_path / "run" / "events.jsonl")
    steps = [(event["agent"], event["step"]) for event in events if event["kind"] == "answer"]
    assert len(steps) == len(set(steps)) == 11 and [event["kind"] for event in events].count("resume") == 2
    assert sum(server.asked.values()) <= 11 + 2 + 2  # the two whose answer was killed, and what was under way beside the first


def test_a_log_of_another_question_or_corpus_is_refused(notes, tmp_path):
    _, log, _ = play(Server(), notes)
    for question, folder in (("another", notes), (QUESTION, tmp_path)):
        (tmp_path / "a.md").write_text("x")
        with pytest.raises(SwarmError, match="the log is of another"):
            Swarm(question, None, Corpus(folder), log)
    with pytest.raises(SwarmError, match="the log is of another system"):
        Swarm(QUESTION, None, Corpus(notes), log, system="Be brief.")
    del log.events[0]["system"]  # an older log
    assert Swarm(QUESTION, None, Corpus(notes), log)._end and "unfinished" not in trace(log.events)


@pytest.mark.parametrize("spoil, words", [
    (lambda events: events[0]["limits"].update(hours=1), "not that of a swarm, or of another version: .*hours"),
    (lambda events: events[0].update(limits=None), "not that of a swarm, or of another version: TypeError"),
    (lambda events: events[0].pop("question"), "not that of a swarm, or of another version: KeyError 'question'"),
    (lambda events: events[1].update(kind="end"), "not that of a swarm, or of another version: KeyError"),
    (lambda events: events.pop(0), "its first event is not a start"),
])  # fmt: skip
def test_a_log_that_does_not_fit_is_refused_and_left_as_it_is(spoil, words, notes):
    _, log, _ = play(Server(), notes)
    spoil(log.events)
    before = json.dumps(log.events)
    with pytest.raises(SwarmError, match=words):
        Swarm(QUESTION, None, Corpus(notes), log)
    assert json.dumps(log.events) == before


@pytest.mark.parametrize("words", [[], ["x"]])
def test_resuming_a_log_without_a_question_is_one_line(words, notes, tmp_path, capsys):
    with Log(tmp_path / "events.jsonl") as log:
        log.add("start", limits={}, models=[])
    before = (tmp_path / "events.jsonl").read_bytes()
    flags = ["run", "--base-url", "http://127.0.0.1:9/v1", "--corpus", str(notes), "--run", str(tmp_path), "--no-python", "--resume"]
    assert command.main([*flags, *words]) == 2
    err = capsys.readouterr().err
    assert ("question" in err) and err.count("\n") == 1 and (tmp_path / "events.jsonl").read_bytes() == before


# The endpoint


def answered(trouble, **options):
    """The Message of one request, the waits between tries and the Server."""
    server, waits, sleep = Server(trouble, main=lambda messages: said("yes")), [], asyncio.sleep

    async def patient(seconds, result=None):
        waits.append(seconds)
        return await sleep(0, result)

    async def script():
        async with server.serving() as url, Endpoint(url, "m", **options) as policy:
            return await policy.answer([{"role": "user", "content": "?"}, {"role": "user", "content": "?"}], command.DELEGATION, "main")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "sleep", patient)
        try:
            found = asyncio.run(script())
        except PolicyError as error:
            found = error
    return found, [seconds for seconds in waits if seconds], server


def test_waits_double_with_jitter_from_the_seed_and_a_server_that_asks_for_more_gets_it():
    async def down(who, number, body):
        return status(500) if number < 4 else None

    waits = {seed: answered(down, backoff=0.5, seed=seed)[1] for seed in (0, 1)}
    assert answered(down, backoff=0.5)[1] == waits[0] != waits[1]
    assert all(0.25 * 2**n <= wait <= 0.5 * 2**n for some in waits.values() for n, wait in enumerate(some)) and len(waits[0]) == 4

    async def busy(who, number, body):
        return status(429, **{"Retry-After": "7"}) if number < 2 else None

    message, waited, _ = answered(busy, backoff=0.5)
    assert message.content == "yes" and waited == [7.0, 7.0]
    error, waited, _ = answered(busy, patience=5)
    assert "answers 429" in str(error) and "asks to wait 7 seconds (1 tries)" in str(error) and not waited

    async def dated(who, number, body):
        return status(503, **{"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"})

    assert "asks to wait 2" in str(answered(dated)[0])


def test_the_key_comes_from_the_environment_and_is_told_to_nobody_else(notes, monkeypatch, tmp_path):
    monkeypatch.setenv(KEY_VARIABLE, "sk-very-secret")

    async def echo(who, number, body):
        return web.json_response({"error": {"message": "Incorrect API key sk-very-secret"}}, status=401)

    error, _, server = answered(echo)
    assert "answers 401" in str(error) and "secret" not in str(error) and server.headers[0]["Authorization"] == "Bearer sk-very-secret"

    async def sends_away(who, number, body):
        return web.Response(status=307, headers={"Location": "/v1/elsewhere"})

    assert "answers 307" in str(answered(sends_away)[0])

    async def trouble(who, number, body):
        return (await echo(who, number, body)) if who == "birch" and number == 0 else None

    with Log(tmp_path / "events.jsonl") as log:
        outcome, _, _ = play(Server(trouble), notes, log=log)
    assert outcome.status == "done" and "secret" not in (tmp_path / "events.jsonl").read_text()
    monkeypatch.delenv(KEY_VARIABLE)
    assert "Authorization" not in answered(None)[2].headers[0]


# A K25 in this process



@pytest.fixture(scope="module")
def tiny():
    """A tiny K25 of random weights."""
    torch.manual_seed(0)
    return K25(CONFIG)


class Planned:
    """A policy that gives these prompts away and then answers."""

    def __init__(self, *prompts):
        self.prompts = prompts

    async def answer(self, messages, tools, agent):
        calls = [("create_subagent", {"name": "r", "system_prompt": "Speak."}), *(("assign_task", {"agent": "r", "prompt": p}) for p in self.prompts)]
        made, errors = read_calls(said("", *calls)["tool_calls"] if len(messages) == 2 else [], 0)
        return Message("", "" if made else "done", tuple(made), tuple(errors))


def speak(engine, notes, log, cap=16):
    """Three subagents of a real model under a planned orchestrator: their Rollouts, and how many were sampled at once."""
    most, decode = 0, engine.model.decode

    async def script():
        nonlocal most
        manager = RolloutManager(engine, None, TOKENIZER, Sampling(6))
        sub = Local(Handle(manager, "swarm", 7, 0, 0))

        def counted(tokens, places):
            nonlocal most
            most = max(most, len(tokens))
            return decode(tokens, places)

        engine.model.decode = counted
        swarm = Swarm("?", Planned("a", "bb", "ccc"), Corpus(notes), log, Limits(garbage=2), subpolicy=sub, slots=Slots(cap, 0.1))
        await swarm.run()
        return [sub.rollout(str(task)) for task in (1, 2, 3)]

    try:
        return asyncio.run(script()), most
    finally:
        engine.model.decode = decode


def sampled(log):
    return {(event["agent"], event["step"]): event["message"]["sampled"] for event in log.events if "sampled" in event.get("message", {})}


def test_subagents_of_a_real_model_are_batched_and_say_the_same_in_any_company_and_after_a_cut(tiny, notes):
    engine = Engine(tiny, slots=4, capacity=2048)
    rollouts, most = speak(engine, notes, together := Log(None))
    tokens = sampled(together)
    assert most == 3 and len(tokens) == 6 and all(result["status"] == "garbage" for result in results(together).values())
    for task, rollout in enumerate(rollouts, 1):  # token in, token out: what is trained on is what the log holds
        generated = [token for token, flag in zip(rollout.ids, rollout.generated) if flag]
        assert generated == tokens[task, 0]["ids"] + tokens[task, 1]["ids"]
        assert list(rollout.logprobs) == tokens[task, 0]["logprobs"] + tokens[task, 1]["logprobs"]
    _, most = speak(engine, notes, alone := Log(None), cap=2)
    assert most == 1 and sampled(alone) == tokens
    first = [n for n, event in enumerate(together.events) if event["kind"] == "answer" and event["agent"] in (1, 2, 3)]
    cut = Log(None)
    cut.events = together.events[: first[2] + 1]  # each has answered once
    again, _ = speak(engine, notes, cut)
    assert sampled(cut) == tokens and [rollout.ids for rollout in again] == [rollout.ids for rollout in rollouts]


def kimis(text, *calls, first=0):
    """An answer in Kimi's tokens."""
    made = "".join(f"<|tool_call_begin|>functions.{name}:{n}<|tool_call_argument_begin|>{json.dumps(arguments)}<|tool_call_end|>"
                   for n, (name, arguments) in enumerate(calls, first))  # fmt: skip
    return text + (f"<|tool_calls_section_begin|>{made}<|tool_calls_section_end|>" if made else "") + "<|im_end|>"


class Replay:
    """An engine that plays `orchestrator` and `subagent` in Kimi's tokens."""

    capacity = 8192

    async def generate(self, request):
        text = TOKENIZER.decode(request.ids)
        turns = re.findall(r"<\|im_(\w+)\|>(\w+)<\|im_middle\|>(?:## Return of \S+\n)?(.*?)<\|im_end\|>", text, re.DOTALL)
        messages = [{"role": name, "content": content} for _, name, content in turns if name != "tool_declare"]
        message = (orchestrator if "assign_task" in text else subagent)(messages)
        calls = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls", ())]
        ids = TOKENIZER.encode(kimis(message["content"] or "", *calls, first=text.count("<|tool_call_begin|>")))
        return Completion(tuple(ids), (-0.5,) * len(ids), (3,) * len(ids), "stop")

    def forget(self, session):
        """Nothing is kept."""


def test_an_episode_of_a_manager_is_a_rollout_in_which_the_subagents_tokens_are_no_loss(notes):
    logs = []

    async def rollout(task, handle, seed):
        log, policy = Log(None), Local(handle)
        logs.append(log)
        outcome = await Swarm(task, policy, Corpus(notes), log, Limits()).run()
        return policy.rollout("main", item_f1(outcome.answer.split(), ["ash=31", "birch=47"]))

    async def script():
        manager = RolloutManager(Replay(), rollout, TOKENIZER, Sampling(1000))
        manager.submit("Heights of: ash birch", [1, 2])
        return (await manager.collect(1))[0]

    some = asyncio.run(script())
    for one, log in zip(some, logs):
        assert one.valid and one.reward == 1.0, one.info
        assert critical_steps(episode(log.events)) == 5 and [call.name for call in one.info.calls] == ["create_subagent", *["assign_task"] * 2]
        mine = TOKENIZER.decode([token for token, flag in zip(one.ids, one.generated) if flag])
        whole = TOKENIZER.decode(one.ids)
        assert f"<|im_system|>system<|im_middle|>{command.ORCHESTRATOR}<|im_end|><|im_user|>user<|im_middle|>Heights of: ash birch<|im_end|>" in whole
        assert mine.endswith("ash=31 birch=47<|im_end|>") and "ash: 31" in whole and "ash: 31" not in mine and "metres" not in whole
        assert set(one.versions) == {3} and len(one.logprobs) == sum(one.generated)


def test_a_checkpoint_is_run_from_the_command_line(tiny, notes, tmp_path, capsys):
    save(tiny, tmp_path / "model")
    words = ["run", "--local", str(tmp_path / "model"), "--slots", "2", "--capacity", "4096", "--max-tokens", "4", "--instant", "--no-python"]
    assert command.main([*words, "--corpus", str(notes), "--run", str(tmp_path / "run"), "--main-steps", "2", QUESTION]) == 1
    assert capsys.readouterr().err.startswith("steps: 2 critical steps")
    assert len(sampled(log := Log(tmp_path / "run" / "events.jsonl"))) == 2
    log.close()
    assert command.main([*words[:1], "--local", str(tmp_path / "none"), "--corpus", str(notes), "--run", str(tmp_path / "other"), "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# The project's own gateway


def test_the_gateway_serves_a_run_of_a_model_that_talks_nonsense(tiny, notes, tmp_path, capsys):
    with Gateway(Engine(tiny, slots=4, capacity=4096, deterministic=False), thinking=False).in_thread() as url:
        words = ["run", "--base-url", url, "--corpus", str(notes), "--max-tokens", "6", "--no-python"]
        assert command.main([*words, "--run", str(tmp_path / "one"), "--main-steps", "2", QUESTION]) == 1
        assert capsys.readouterr().err.startswith("steps: 2 critical steps, 2 in all, 0 subtasks, 0 refused, 0 tool calls")
        assert command.main([*words, "--run", str(tmp_path / "two"), QUESTION]) == 1
        assert capsys.readouterr().err.startswith("garbage: 3 critical steps")
        assert command.main([*words, "--run", str(tmp_path / "two"), "--resume"]) == 1  # it has ended: nobody is asked
        assert capsys.readouterr().err.startswith("garbage: 3 critical steps")
        assert [event["kind"] for event in read_log(tmp_path / "two" / "events.jsonl")] == ["start", *["answer"] * 3, "end"]
    with Gateway(Engine(tiny, slots=4, capacity=256, deterministic=False), thinking=False).in_thread() as url:
        assert command.main([*words[:2], url, *words[3:], "--run", str(tmp_path / "three"), QUESTION]) == 1
        assert re.match(r"context \(the model's server answers 400: .*at most 256.*\): 0 critical steps", capsys.readouterr().err)


# The command line


def test_misuse_is_told_in_one_line_with_exit_code_2(notes, tmp_path, capsys, monkeypatch):
    def refused(match, *words, url="http://127.0.0.1:9/v1"):
        words = ["run", "--base-url", url, "--corpus", str(notes), "--run", str(tmp_path / "run"), "--no-python", *words]
        assert command.main(words) == 2
        err = capsys.readouterr().err
        assert re.search(match, err) and err.count("\n") == 1, err

    refused("there is no question")
    refused("is no address", "x", url="ftp://somewhere")
    refused("holds a password", "x", url="https://me:secret@somewhere/v1")
    refused("is no folder", "x", "--corpus", str(tmp_path / "none"))
    refused("main_steps is 0", "x", "--main-steps", "0")
    refused("at least 2, and a share", "x", "--slots", "1")
    refused("keeps its limits: leave --main-steps out", "--resume", "--main-steps", "3")
    refused("cannot be reached: .*; go on later with --resume", "x", "--retries", "0")
    refused("has a run already", "x")
    refused("another question", "--resume", "y")
    monkeypatch.setenv(KEY_VARIABLE, "two words")
    refused("characters that no header carries", "--resume")


def test_the_view_shows_agents_and_budgets_on_a_terminal_only(notes):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    log, shown = Log(None), []

    async def script(stream):
        async with Server().serving() as url, Endpoint(url, "m") as policy:
            swarm = Swarm(QUESTION, policy, Corpus(notes), log, Limits())
            view = View(swarm, stream)
            log.heard.append(lambda event: shown.append(view.lines()))
            await swarm.run()

    asyncio.run(script(screen := Screen()))
    assert screen.getvalue().startswith("critical 0/1000") and "\x1b[" in screen.getvalue()
    assert any(len(lines) == 5 and "agents 3/100" in lines[0] and lines[1].startswith("  main") and "reader" in lines[2] for lines in shown)
    assert "subtasks 3/3" in shown[-1][0] and "calls 10/1500" in shown[-1][0]
    log.events.clear()
    asyncio.run(script(quiet := io.StringIO()))
    assert not quiet.getvalue()
