"""Claims about gateway.py, wire.py and records.py: what the real openai client sees, what is refused, and that every sampled token
is written down and comes back as a rollout.

A real server over a tiny real model in a thread; numbers after `bug` are those of the public bug list.
Run: .venv/bin/python -m pytest tests/test_gateway.py
"""

import asyncio
import base64
import contextlib
import dataclasses
import gzip
import http.client
import io
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_engine import model as random_model
from test_k25 import tiny

import gateway as command
import k25
from engine import Engine, Request
from gateway import Gateway, GatewayError, Settings, read_records
from k25 import K25
from media import image_item, merged_tokens, pack
from records import Recorder, RecordError, Turn, read_lines, reads, splice
from template import parse, render_ids
from tokenizer import Tokenizer
from wire import Answer, ApiError, parse_body, read_request

openai = pytest.importorskip("openai")
aiohttp = pytest.importorskip("aiohttp")

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENIZER = Tokenizer()
MODEL = random_model()
HI = [{"role": "user", "content": "hi"}]
INSTANT = {"chat_template_kwargs": {"thinking": False}}


@pytest.fixture(scope="module", autouse=True)
def no_token():
    """No token from the environment of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(command.TOKEN_VARIABLE, raising=False)
        yield


@dataclasses.dataclass
class Served:
    """A gateway that is being served."""

    gateway: Gateway
    url: str
    records: pathlib.Path

    def client(self, key="unused", kind=openai.OpenAI):
        """The real client, which tries once."""
        return kind(base_url=self.url, api_key=key, max_retries=0)

    def ask(self, messages=HI, **settings):
        """One request of the real client."""
        return self.client().chat.completions.create(model="k25", messages=messages, **{"max_tokens": 12, "seed": 1} | settings)

    def record(self, answer):
        """What was written down of an answer."""
        return next(line for line in read_lines(self.records) if line["id"] == answer.id)

    def raw(self, body, method="POST", path="/v1/chat/completions", **headers):
        """Status, headers and JSON (or text) of a request by hand."""
        connection = http.client.HTTPConnection(self.url.split("/")[2], timeout=30)
        connection.request(method, path, body, {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, response.headers, json.loads(content)


@contextlib.contextmanager
def serving(engine, records, **settings):
    """Served."""
    gateway = Gateway(engine, record=records, **settings)
    with gateway.in_thread() as url:
        yield Served(gateway, url, records)


def quick(model=MODEL, slots=4, capacity=256):
    """An engine that skips the search for widths of equal bits."""
    return Engine(model, slots, capacity, deterministic=False)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A gateway in front of random weights."""
    with serving(Engine(MODEL, slots=8, capacity=512), tmp_path_factory.mktemp("records")) as one:
        yield one


# A model that was taught to call tools

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"},
                                                                                                         "b": {"type": "integer"}}}}}]  # fmt: skip


def call(index, a, b):
    """A tool call of OpenAI's form."""
    function = {"name": "add", "arguments": f'{{"a": {a}, "b": {b}}}'}
    return {"id": f"functions.add:{index}", "type": "function", "function": function}


SUM = [{"role": "user", "content": "2+3, 4+5?"}]
CALLS = {"role": "assistant", "content": "Adding.", "tool_calls": [call(0, 2, 3), call(1, 4, 5)]}
SUMS = [{"role": "tool", "tool_call_id": f"functions.add:{i}", "content": content} for i, content in enumerate(("5", "9"))]
TOTAL = {"role": "assistant", "content": "5 and 9."}
HELLO = {"role": "assistant", "content": "Hello!", "reasoning_content": "A greeting."}


def lesson(messages, answer, thinking, tools):
    """A prompt and the ids of its answer."""
    prompt = render_ids(messages, TOKENIZER, tools=tools, thinking=thinking)
    return prompt, render_ids([*messages, answer], TOKENIZER, tools=tools, add_generation_prompt=False, preserve_thinking=True)[len(prompt) :]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A gateway in front of a tiny model that has learned three answers by heart."""
    torch.manual_seed(0)
    vision = dataclasses.replace(tiny().vision, text_hidden_size=64)
    sizes = dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, q_lora_rank=32,
                 kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8, n_group=1, topk_group=1,
                 initializer_range=0.08, vision=vision)  # fmt: skip
    model = K25(tiny(**sizes))
    (ask, calls), (back, total), (hi, hello) = (lesson(SUM, CALLS, False, TOOLS), lesson([*SUM, CALLS, *SUMS], TOTAL, False, TOOLS),
                                                lesson(HI, HELLO, True, None))  # fmt: skip
    targets = [-100] * (len(ask) - 1) + calls + [-100] * (len(back) - len(ask) - len(calls)) + total + [-100] * len(hi) + hello + [-100]
    rows = [(back + total, 0), (hi + hello, 1)]
    ids, segments = torch.tensor([[token for row, _ in rows for token in row]]), torch.tensor([[n for row, n in rows for _ in row]])
    optimizer = torch.optim.Adam(model.language_model.parameters(), lr=1e-2)
    for step in range(100):
        loss = F.cross_entropy(model(ids, segment_ids=segments)[0], torch.tensor(targets), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 100)
    assert loss < 0.02
    with serving(quick(model.requires_grad_(False), capacity=512), tmp_path_factory.mktemp("taught"), thinking=False) as one:
        yield one


def reassemble(stream):
    """The choices of a stream put together: {index: (message, finish, log-prob entries)}; and the usage."""
    messages, finish, entries, usage = {}, {}, {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            message = messages.setdefault(choice.index, {"content": "", "reasoning_content": "", "tool_calls": []})
            message["content"] += choice.delta.content or ""
            message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
            for delta in choice.delta.tool_calls or ():
                if delta.index == len(message["tool_calls"]):
                    message["tool_calls"].append({"id": delta.id, "name": delta.function.name, "arguments": ""})
                message["tool_calls"][delta.index]["arguments"] += delta.function.arguments
            entries.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else ())
            finish[choice.index] = choice.finish_reason or finish.get(choice.index)
    return {index: (messages[index], finish[index], entries[index]) for index in messages}, usage


def whole(choice):
    """A choice that came at once, in the same form."""
    message = choice.message
    calls = [{"id": c.id, "name": c.function.name, "arguments": c.function.arguments} for c in message.tool_calls or ()]
    told = {"content": message.content or "", "reasoning_content": getattr(message, "reasoning_content", None) or "", "tool_calls": calls}
    return told, choice.finish_reason, list(choice.logprobs.content) if choice.logprobs else []


# What a client sees


def test_the_real_client_is_answered_with_what_the_model_drew(served):
    answer = served.ask(temperature=0.8, top_p=1)
    [told] = served.record(answer)["answers"]
    message = parse(TOKENIZER.decode(told["ids"]), thinking=True)
    assert answer.choices[0].message.reasoning_content == message.reasoning and answer.choices[0].finish_reason == "length"
    assert (answer.model, answer.object, answer.system_fingerprint) == ("k25", "chat.completion", "version-0")
    assert answer.usage.prompt_tokens == len(render_ids(HI, TOKENIZER))
    assert answer.usage.completion_tokens == 12 == answer.usage.completion_tokens_details.reasoning_tokens


def test_seeds_decide_the_answer_and_choices_differ(served):
    first, again, other = served.ask(n=3), served.ask(n=3), served.ask(seed=2)
    contents = [choice.message.reasoning_content for choice in first.choices]
    assert contents == [choice.message.reasoning_content for choice in again.choices] and len(set(contents)) == 3
    assert other.choices[0].message.reasoning_content not in contents
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens == sum(len(told["ids"]) for told in served.record(first)["answers"])
    unseeded = [served.record(served.ask(seed=openai.omit))["answers"][0]["ids"] for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("extra", [{}, INSTANT], ids=["thinking", "instant"])
def test_a_stream_brings_the_same_tokens_as_an_answer_at_once(served, extra):
    for seed in range(2):
        settings = dict(seed=seed, n=2, max_tokens=24, logprobs=True, top_logprobs=2, extra_body=extra, stop=["e", "<|im"])
        at_once = served.ask(**settings)
        choices, usage = reassemble(served.ask(stream=True, stream_options={"include_usage": True}, **settings))
        assert choices == {choice.index: whole(choice) for choice in at_once.choices}
        assert usage == at_once.usage
    first, second = list(read_lines(served.records))[-2:]
    assert first["answers"] == second["answers"]


def test_many_clients_at_once_get_what_each_would_get_alone(served):
    alone = [served.ask(seed=seed, max_tokens=4 + seed).choices[0].message for seed in range(12)]

    async def together():
        async with served.client(kind=openai.AsyncOpenAI) as client:
            asked = [client.chat.completions.create(model="k25", messages=HI, seed=seed, max_tokens=4 + seed) for seed in range(12)]
            return [answer.choices[0].message for answer in await asyncio.gather(*asked)]

    assert asyncio.run(together()) == alone


def test_an_asynchronous_stream(served):
    async def text():
        async with served.client(kind=openai.AsyncOpenAI) as client:
            stream = await client.chat.completions.create(model="k25", messages=HI, seed=1, max_tokens=12, stream=True)
            return "".join([getattr(chunk.choices[0].delta, "reasoning_content", None) or "" async for chunk in stream])

    assert asyncio.run(text()) == served.ask().choices[0].message.reasoning_content


def test_bug41_an_instant_answer_never_lands_in_reasoning(served, taught):
    for extra in (INSTANT, {"thinking": {"type": "disabled"}}, {"thinking": False}):
        message = served.ask(extra_body=extra).choices[0].message
        assert message.content and not hasattr(message, "reasoning_content")
        assert served.ask(extra_body=extra, stream=True).response.status_code == 200
    record = list(read_lines(served.records))[-1]
    assert record["prompt"][-2:] == [TOKENIZER.think, TOKENIZER.end_think] and record["temperature"] == 0.6
    message = taught.ask(temperature=0, max_tokens=40, extra_body={"thinking": {"type": "enabled"}}).choices[0].message
    assert (message.reasoning_content, message.content) == ("A greeting.", "Hello!")


@pytest.mark.parametrize("stream", [False, True])
def test_bug39_tools_make_the_round_trip(taught, stream):
    """Two calls in one answer, their results, the answer: by the client's own objects, in one session."""
    settings = dict(tools=TOOLS, temperature=0, max_tokens=200, user=f"sums {stream}")
    before = len(list(read_lines(taught.records)))
    if stream:
        choices, _ = reassemble(taught.ask(SUM, stream=True, **settings))
        message, finish, _ = choices[0]
        calls = message["tool_calls"]
        sent = {"role": "assistant", "content": message["content"],
                "tool_calls": [{"id": c["id"], "type": "function", "function": {k: c[k] for k in ("name", "arguments")}} for c in calls]}  # fmt: skip
    else:
        choice = taught.ask(SUM, **settings).choices[0]
        sent, finish, calls = choice.message, choice.finish_reason, whole(choice)[0]["tool_calls"]
    assert finish == "tool_calls"
    assert [(c["id"], json.loads(c["arguments"])) for c in calls] == [("functions.add:0", {"a": 2, "b": 3}), ("functions.add:1", {"a": 4, "b": 5})]
    results = [{"role": "tool", "tool_call_id": c["id"], "content": str(sum(json.loads(c["arguments"]).values()))} for c in calls]
    last = taught.ask([*SUM, sent, *results], **settings).choices[0]
    assert (last.message.content, last.finish_reason, last.message.tool_calls) == ("5 and 9.", "stop", None)
    first, second = list(read_lines(taught.records))[before:]
    assert second["prompt"][: len(first["prompt"])] == first["prompt"]
    assert first["answers"][0]["ids"][-1] == TOKENIZER.im_end  # the stop token is sampled too


def test_tool_choice_none_declares_no_tools_and_calls_nothing(taught):
    answer = taught.ask(SUM, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=40)
    assert taught.record(answer)["prompt"] == render_ids(SUM, TOKENIZER, thinking=False)
    assert answer.choices[0].message.tool_calls is None
