"""Claims about swarm.py: budgets hold, failures are observations, nothing finished is lost, and both kinds of policy drive it.

A real HTTP server plays a competent orchestrator and subagents that go wrong as they are told. Numbers after `bug` are those of the
public bug list.
Run: .venv/bin/python -m pytest tests/test_swarm.py
"""

import asyncio
import collections
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import pytest

import swarm as command
from corpus import Corpus
from critical import critical_steps, finish_reward, longest_path, total_steps
from swarm import Endpoint, Limits, Local, PolicyError, Slots, Swarm, SwarmError
from swarm_log import Log, episode, read_log, step_graph

web = pytest.importorskip("aiohttp.web")
ROOT = pathlib.Path(__file__).resolve().parent.parent
HEIGHTS = {"ash": 31, "birch": 47, "cedar": 52, "elm": 28, "fir": 63, "oak": 39}


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)


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
    found = dict(re.findall(r"(\w+): (\d+)", "\n".join(m["content"] for m in messages if m["role"] == "tool" and not m["content"].startswith("Error"))))
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
