"""Claims about gateway.py, wire.py and records.py: what the real openai client sees, what is refused, and that every sampled token
is written down and comes back as a rollout.

A real server over a tiny real model in a thread; numbers after `bug` are those of the public bug list.
Run: .venv/bin/python -m pytest tests/test_gateway.py
"""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import gzip
import http.client
import io
import json
import os
import pathlib
import shutil
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
from engine import Completion, Engine, Request
from gateway import Gateway, GatewayError, Settings, read_records
from k25 import K25
from media import image_item, merged_tokens, pack
from records import Recorder, RecordError, Turn, read_lines, reads, splice
from rollout import Conversation
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

    @functools.cached_property
    def usual(self):
        """A client for most; it takes a while to make."""
        return self.client()

    def ask(self, messages=HI, **settings):
        """One request of the real client."""
        return self.usual.chat.completions.create(model="k25", messages=messages, **{"max_tokens": 12, "seed": 1} | settings)

    def record(self, answer):
        """What was written down of an answer."""
        return next(line for line in read_lines(self.records) if line["id"] == answer.id)

    def raw(self, body, method="POST", path="/v1/chat/completions", **headers):
        """Status, headers and JSON (or text) of a request by hand."""
        connection = http.client.HTTPConnection(self.url.split("/")[2], timeout=30)
        connection.request(method, path, body, {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()},
                           encode_chunked="Transfer_Encoding" in headers)  # fmt: skip
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

NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": NUMBERS}}]


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
    whole = render_ids([*messages, answer], TOKENIZER, tools=tools, add_generation_prompt=False, preserve_thinking=True)
    return prompt, whole[len(prompt) :]


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
    for step in range(80):
        loss = F.cross_entropy(model(ids, segment_ids=segments)[0], torch.tensor(targets), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 80)
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
    alone = [served.ask(seed=seed, max_tokens=4 + seed).choices[0].message for seed in range(6)]

    async def together():
        async with served.client(kind=openai.AsyncOpenAI) as client:
            asked = [client.chat.completions.create(model="k25", messages=HI, seed=seed, max_tokens=4 + seed) for seed in range(6)]
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
        written = [{"id": c["id"], "type": "function", "function": {k: c[k] for k in ("name", "arguments")}} for c in calls]
        sent = {"role": "assistant", "content": message["content"], "tool_calls": written}
    else:
        choice = taught.ask(SUM, **settings).choices[0]
        sent, finish, calls = choice.message, choice.finish_reason, whole(choice)[0]["tool_calls"]
    assert finish == "tool_calls"
    called = [(c["id"], json.loads(c["arguments"])) for c in calls]
    assert called == [("functions.add:0", {"a": 2, "b": 3}), ("functions.add:1", {"a": 4, "b": 5})]
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


# Pictures


def picture(seed=0, size=(56, 28), kind="PNG"):
    """The bytes of a small picture."""
    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, kind)
    return file.getvalue()


def shown(*contents, text="what?", kind="png"):
    """A user's message with pictures."""
    urls = [f"data:image/{kind};base64,{base64.b64encode(content).decode()}" for content in contents]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_bug34_pictures_take_their_places_and_reach_the_model(served):
    files = picture(1), picture(2, (28, 28))
    answer = served.ask([shown(*files)], temperature=1, top_p=1)
    items = [image_item(Image.open(io.BytesIO(content)), MODEL.config.media) for content in files]
    media = [("image", [(None, merged_tokens(item.grid))]) for item in items]
    record = served.record(answer)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]
    assert record["prompt"] == render_ids([{"role": "user", "content": parts}], TOKENIZER, media)
    assert record["prompt"].count(TOKENIZER.media_pad) == 3
    direct = Engine(MODEL, 8, 512)
    [expected] = direct.run(direct.generate(Request(tuple(record["prompt"]), tuple(items), 12, stop_ids=TOKENIZER.stop_ids, seed=1)))
    assert tuple(record["answers"][0]["ids"]) == expected.ids and tuple(record["answers"][0]["logprobs"]) == expected.logprobs
    blind = served.ask([shown(picture(3), files[1])], temperature=1, top_p=1)
    assert served.record(blind)["answers"][0]["logprobs"] != record["answers"][0]["logprobs"]
    rollout = read_records(served.records)[-2]
    assert all(torch.equal(a.patches, b.patches) and a.grid == b.grid for a, b in zip(rollout.items, items, strict=True))


def test_a_jpeg_may_be_called_jpg_and_its_url_stand_alone(served):
    message = shown(picture(kind="JPEG"), kind="jpg")
    message["content"][0]["image_url"] = message["content"][0]["image_url"]["url"]
    assert served.raw(json.dumps({"model": "k25", "messages": [message], "max_tokens": 1}))[0] == 200


def test_a_tool_may_return_a_picture(served):
    history = [*SUM, CALLS, {"role": "tool", "tool_call_id": "functions.add:0", "content": shown(picture())["content"]}]
    assert served.record(served.ask(history, max_tokens=1))["prompt"].count(TOKENIZER.media_pad) == 2


def bomb(width, height):
    """A PNG of a few bytes that would be width x height pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))  # fmt: skip


@pytest.mark.parametrize(("content", "words"), [
    (bomb(60_000, 60_000), "no PNG or JPEG"), (bomb(5_000, 5_000), "5000x5000 pixels, at most"), (picture()[:-40], "cut short"),
    (b"", "no PNG or JPEG"), (picture(kind="GIF"), "no PNG or JPEG"), (bomb(0, 5), "no PNG or JPEG"),
], ids=["bomb", "large", "cut", "empty", "gif", "flat"])  # fmt: skip
def test_a_bad_picture_is_refused_before_it_is_decoded(served, content, words):
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        served.ask([*HI, shown(picture(), content)])
    assert refused.value.param == "messages[1].content[1].image_url.url"


@pytest.mark.parametrize("url", ["https://example.com/a.png", "file:///etc/passwd", "data:image/svg+xml;base64,AA==",
                                 "data:image/png;base64,?", "data:image/png,AA", ""])  # fmt: skip
def test_nothing_is_fetched(served, url):
    with pytest.raises(openai.BadRequestError, match="nothing is fetched|damaged") as refused:
        served.ask([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert refused.value.param == "messages[0].content[0].image_url.url"


# Refusals


def user(content):
    """One message with this content."""
    return {"messages": [{"role": "user", "content": content}]}


def tool(**function):
    """One tool."""
    return {"tools": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(("change", "status", "param"), [
    ({"model": None}, 400, "model"), ({"model": "gpt-4o"}, 404, "model"), ({"model": 7}, 400, "model"),
    ({"messages": []}, 400, "messages"), ({"messages": None}, 400, "messages"), ({"messages": "hi"}, 400, "messages"),
    ({"messages": HI * 1025}, 400, "messages"), ({"messages": ["hi"]}, 400, "messages[0]"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, 400, "messages[0].role"),
    (user(7), 400, "messages[0].content"), (user([7]), 400, "messages[0].content[0]"),
    (user([{"type": "text"}]), 400, "messages[0].content[0].type"), (user([{"type": "input_audio"}]), 400, "messages[0].content[0].type"),
    (user([{"type": "video_url"}]), 400, "messages[0].content[0].type"),
    (user([{"type": "image_url", "image_url": 7}]), 400, "messages[0].content[0].image_url"),
    ({"messages": [{"role": "assistant", "content": [shown(picture())["content"][0]]}]}, 400, "messages[0].content[0].type"),
    ({"messages": [shown(*[picture()] * 33)]}, 400, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0]"),
    ({"messages": [{"role": "user", "content": "x", "name": 7}]}, 400, "messages[0].name"),
    ({"messages": [{"role": "assistant", "tool_calls": [7]}]}, 400, "messages[0].tool_calls[0]"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]}]}, 400, "messages[0].tool_calls[0].function.name"),
    ({"messages": [{"role": "assistant", "tool_calls": [call(0, 1, 2), call(0, 1, 2)]}]}, 400, "messages[0]"),
    (user("x" * 600), 400, "messages"), ({"max_tokens": 600}, 400, "messages"), ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": "9"}, 400, "max_tokens"), ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_completion_tokens"),
    ({"temperature": -0.1}, 400, "temperature"), ({"temperature": True}, 400, "temperature"), ({"temperature": 1e999}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"), ({"top_p": 1.1}, 400, "top_p"), ({"n": 0}, 400, "n"), ({"n": 17}, 400, "n"), ({"n": 1.5}, 400, "n"),
    ({"seed": "x"}, 400, "seed"), ({"stop": ""}, 400, "stop"), ({"stop": ["a"] * 17}, 400, "stop"), ({"stop": 7}, 400, "stop"),
    ({"stream": "yes"}, 400, "stream"), ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"top_logprobs": 2}, 400, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"logprobs": 5}, 400, "logprobs"),
    ({"tool_choice": "required"}, 400, "tool_choice"), ({"tool_choice": {"type": "function"}}, 400, "tool_choice"),
    ({"tools": {}}, 400, "tools"), ({"tools": [7]}, 400, "tools[0]"), ({"tools": tool(name="a")["tools"] * 129}, 400, "tools"),
    (tool(), 400, "tools[0].function.name"), (tool(name="a\n"), 400, "tools[0].function.name"),
    (tool(name="a", parameters=7), 400, "tools[0].function.parameters"),
    (tool(name="a", parameters={"properties": {"b": 7}}), 400, "tools[0].function.parameters"),
    (tool(name="a", parameters={"properties": {"b": {"description": "x"}}}), 400, "tools[0]"),
    ({"thinking": "yes"}, 400, "thinking"), ({"chat_template_kwargs": {"enable_thinking": False}}, 400, "chat_template_kwargs"),
    ({"thinking": True} | INSTANT, 400, "thinking"), ({"user": "x" * 257}, 400, "user"), ({"max_token": 3}, 400, "max_token"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty"), ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"functions": []}, 400, "functions"),
], ids=lambda value: json.dumps(value)[:40])  # fmt: skip
def test_what_cannot_be_served_is_refused_with_its_name(served, change, status, param):
    body = json.dumps({"model": "k25", "messages": HI, "max_tokens": 5} | change).replace("Infinity", "1e999")
    got, _, answer = served.raw(body)
    assert (got, answer["error"]["param"], answer["error"]["type"]) == (status, param, "invalid_request_error"), answer
    assert "\n" not in answer["error"]["message"] and len(answer["error"]["message"]) < 400


def test_what_has_no_effect_is_accepted(served):
    served.ask(frequency_penalty=0, presence_penalty=0.0, logit_bias={}, response_format={"type": "text"}, parallel_tool_calls=True,
               store=False, metadata={"a": "b"}, service_tier="auto", stop=[], max_tokens=openai.omit, max_completion_tokens=2)  # fmt: skip
    assert served.ask([{"role": "developer", "content": [{"type": "text", "text": "Short."}]}, *HI], max_tokens=1).choices


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"model": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"n":' + b"9" * 5000 + b"}",
                                  b"null"], ids=lambda body: repr(body[:12]))  # fmt: skip
def test_malformed_json_is_a_clear_400(served, body):
    status, _, answer = served.raw(body)
    assert status == 400 and "body" in answer["error"]["message"]


def test_the_clients_exceptions(served):
    with pytest.raises(openai.NotFoundError, match="this gateway serves 'k25'"):
        served.usual.chat.completions.create(model="gpt-4o", messages=HI)
    with pytest.raises(openai.BadRequestError) as refused:
        served.ask([{"role": "user", "content": "x" * 600}])
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.NotFoundError):
        served.usual.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        served.usual.embeddings.create(model="k25", input="x")


def test_models_and_health(served):
    assert [model.id for model in served.usual.models.list()] == ["k25"] == [served.usual.models.retrieve("k25").id]
    assert served.raw(None, "GET", "/health")[::2] == (200, {"status": "ok"})


def test_wrong_methods_paths_types_and_encodings(served):
    good = json.dumps({"model": "k25", "messages": HI, "max_tokens": 1})
    assert served.raw(good)[0] == 200
    status, headers, answer = served.raw(None, "GET")
    assert (status, headers["Allow"], answer["error"]["type"]) == (405, "POST", "invalid_request_error")
    assert served.raw(good, "OPTIONS")[0] == 405  # no page of a browser is let in
    assert served.raw(good, path="/v1/completions")[0] == 404
    assert served.raw(good, Content_Type="text/plain")[0] == 415
    assert served.raw(gzip.compress(good.encode()), Content_Encoding="gzip")[0] == 415
    for host in ("localhost:1", "LOCALHOST", "[::1]:80", "127.1.2.3"):
        assert served.raw(good, Host=host)[0] == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "10.0.0.1", ""):
        assert served.raw(good, Host=host)[0] == 403, host


def test_a_body_too_large_is_refused_announced_or_not(tmp_path):
    with serving(quick(), None, settings=Settings(body=1000)) as small:
        assert small.raw(b" " * 1001)[0] == 413
        status, _, answer = small.raw((b" " * 300 for _ in range(5)), Transfer_Encoding="chunked")
        assert status == 413 and answer["error"]["message"] == "the body is larger than 1000 bytes"
        assert small.raw(json.dumps({"model": "k25", "messages": HI, "max_tokens": 1}))[0] == 200


def test_a_body_that_never_comes_is_not_waited_for(tmp_path):
    with serving(quick(), None, settings=Settings(patience=0.05)) as hasty:
        host, port = hasty.url.split("/")[2].split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                               b"Content-Length: 9\r\n\r\n{")  # fmt: skip
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


# Who may ask


def test_a_token_is_enforced_even_on_loopback_and_never_written_down(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(command.TOKEN_VARIABLE, "s3cret-token")
    with serving(quick(), tmp_path) as one:
        for wrong in ("unused", "s3cret-toke", "s3cret-token2", "S3cret-token"):
            with pytest.raises(openai.AuthenticationError):
                one.client(wrong).chat.completions.create(model="k25", messages=HI, max_tokens=1)
        good = json.dumps({"model": "k25", "messages": HI, "max_tokens": 1})
        assert one.raw(good)[1]["WWW-Authenticate"] == "Bearer"
        assert one.raw(good, Authorization="Basic s3cret-token")[0] == 401
        assert one.raw(good, Authorization="bearer s3cret-token", Host="gateway.example")[0] == 200
        assert one.raw(None, "GET", "/health")[0] == 200 and one.raw(None, "GET", "/v1/models")[0] == 401
        assert one.client("s3cret-token").chat.completions.create(model="k25", messages=HI, max_tokens=1).choices
    assert all(b"s3cret" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "s3cret" not in "".join(capfd.readouterr()) + repr(vars(command)) + repr(one.gateway)


def test_other_machines_need_a_token(monkeypatch):
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com", ""):
        with pytest.raises(GatewayError, match="set K25_GATEWAY_TOKEN"), Gateway(quick()).in_thread(host):
            pass
    monkeypatch.setenv(command.TOKEN_VARIABLE, "s3cret-token")
    with Gateway(quick()).in_thread("0.0.0.0") as url:
        assert url.startswith("http://0.0.0.0:")
    monkeypatch.setenv(command.TOKEN_VARIABLE, "two words\n")
    with pytest.raises(GatewayError, match="visible ASCII") as refused:
        Gateway(quick())
    assert "two" not in str(refused.value)


# Comings and goings


def eventually(condition):
    """Wait until something that other threads bring about is so; a test that never gets it fails by its own assertion."""
    for _ in range(2000):
        if condition():
            return True
        time.sleep(0.01)
    return False


@contextlib.contextmanager
def endless(records, **settings):
    """A gateway whose answers go on until somebody ends them: nothing stops them, and there is room."""
    tokenizer = Tokenizer()
    tokenizer.stop_ids = ()
    with serving(quick(capacity=20_000), records, tokenizer=tokenizer, thinking=False, **settings) as one:
        yield one


def begin(one, **body):
    """Send a request by hand, and leave it unanswered: a socket."""
    host, port = one.url.split("/")[2].split(":")
    body = json.dumps({"model": "k25", "messages": HI, "seed": 1} | body).encode()
    connection = socket.socket()
    connection.settimeout(60)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # what is not read soon fills it
    connection.connect((host, int(port)))
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%b" % (len(body), body))  # fmt: skip
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots_and_its_answer_is_no_rollout(tmp_path, stream):
    with endless(tmp_path) as one:
        with begin(one, stream=stream, n=2):
            assert eventually(lambda: one.gateway.engine.running == 2)
        assert eventually(lambda: not one.gateway.engine.running and not one.gateway._requests)
        assert one.ask(max_tokens=3).choices
        left, answered = read_lines(tmp_path)
    assert [answer["finish"] for answer in left["answers"]] == ["cancelled"] * 2
    assert [rollout.info.task for rollout in read_records(tmp_path)] == [answered["id"]]


def test_a_client_that_does_not_read_is_left(tmp_path):
    name = "k" * 50_000  # is in every piece of the stream, so that the machine's buffers are soon full
    with endless(tmp_path, settings=Settings(patience=0.2), name=name) as one, begin(one, stream=True, n=4, model=name):
        assert eventually(lambda: one.gateway.engine.running == 4) and eventually(lambda: not one.gateway.engine.running)


def test_more_requests_than_allowed_are_told_to_come_again(tmp_path):
    with endless(tmp_path, settings=Settings(requests=2)) as one:
        with begin(one), begin(one):
            assert eventually(lambda: one.gateway.engine.running == 2)
            with pytest.raises(openai.RateLimitError) as refused:
                one.ask()
            assert refused.value.response.headers["Retry-After"] == "1"
        assert eventually(lambda: not one.gateway._requests)
        assert one.ask(max_tokens=3).choices


def test_a_gateway_that_is_stopped_says_so_to_those_who_wait(tmp_path):
    with endless(tmp_path, settings=Settings(grace=0.0)) as one:
        with begin(one) as waiting, begin(one, stream=True) as streaming:
            assert eventually(lambda: one.gateway.engine.running == 2)
            one.gateway.stop()
            assert b"503 Service Unavailable" in read_all(waiting)
            assert b'"the gateway is being stopped"' in read_all(streaming)
    assert [answer["finish"] for record in read_lines(tmp_path) for answer in record["answers"]] == ["cancelled"] * 2


def read_all(connection):
    """Everything until the other side closes."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_a_failing_model_is_a_500_for_all_who_wait(tmp_path, monkeypatch):
    engine = quick()
    with serving(engine, tmp_path) as one:
        monkeypatch.setattr(engine.model, "decode", lambda tokens, places: torch.zeros(7, 7) @ torch.zeros(8))
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            one.ask()
        with pytest.raises(openai.APIError, match="the model failed"):
            list(one.ask(stream=True))
        monkeypatch.undo()
        assert one.ask().choices


def test_a_full_disk_answers_nothing_unrecorded(tmp_path, monkeypatch):
    with serving(quick(), tmp_path) as one:
        one.ask()

        class Full:
            """A file on a disk that takes ten bytes more."""

            def __init__(self, file):
                self.file = file

            def write(self, line):
                return self.file.write(line[:10])

            def __getattr__(self, name):
                return getattr(self.file, name)

        monkeypatch.setattr(one.gateway._recorder, "_file", Full(one.gateway._recorder._file))
        with pytest.raises(openai.InternalServerError, match="nothing unrecorded is answered"):
            one.ask()
        monkeypatch.undo()
        one.ask()
    assert len(list(read_lines(tmp_path))) == 2


def test_pictures_that_cannot_be_kept_are_not_answered(tmp_path):
    with serving(quick(), tmp_path) as one:
        shutil.rmtree(tmp_path / "items")
        (tmp_path / "items").write_text("in the way")
        with pytest.raises(openai.InternalServerError, match="pictures cannot be recorded"):
            one.ask([shown(picture())])
        assert one.ask().choices
    assert len(read_records(tmp_path)) == 1


# Records and rollouts


def answers_of(rollout):
    """How many answers a rollout holds."""
    return sum(own and not before for before, own in zip((False, *rollout.generated), rollout.generated))


def forward_logprobs(model, rollout):
    """The model's own log-probs of a rollout's generated tokens, from one full forward pass."""
    patches, grid = pack(rollout.items) if rollout.items else (None, None)
    logits = model(torch.tensor([rollout.ids]), patches, grid)[0] / rollout.info.temperature
    logprobs = F.log_softmax(logits, dim=-1)[:-1].gather(1, torch.tensor(rollout.ids)[1:, None])[:, 0]
    return logprobs[torch.tensor(rollout.generated)[1:]]


@torch.no_grad()
def test_bug55_recorded_logprobs_are_those_of_a_full_forward_at_the_temperature_sampled_at(served):
    before = len(read_records(served.records))
    served.ask(temperature=0.7, n=2)
    served.ask([shown(picture())], temperature=1.6, top_p=0.5, extra_body=INSTANT)
    history = [*HI, served.ask(temperature=0.9, user="logprobs", extra_body=INSTANT).choices[0].message, *HI]
    answer = served.ask(history, temperature=0.9, user="logprobs", extra_body=INSTANT, logprobs=True, top_logprobs=3)
    assert [entry.logprob for entry in answer.choices[0].logprobs.content] == served.record(answer)["answers"][0]["logprobs"]
    rollouts = read_records(served.records)[before:]
    assert [answers_of(rollout) for rollout in rollouts] == [1, 1, 1, 2]
    assert [rollout.info.temperature for rollout in rollouts] == [0.7, 0.7, 1.6, 0.9]
    for rollout in rollouts:
        assert_close(torch.tensor(rollout.logprobs), forward_logprobs(MODEL, rollout), 2e-4)


@torch.no_grad()
def test_top_logprobs_are_the_most_likely_tokens_in_order(served):
    answer = served.ask(logprobs=True, top_logprobs=4, temperature=0.5, max_tokens=1)
    logits = MODEL(torch.tensor([served.record(answer)["prompt"]]))[0, -1]
    found = [top.logprob for top in answer.choices[0].logprobs.content[0].top_logprobs]
    assert_close(torch.tensor(found), F.log_softmax(logits / 0.5, dim=-1).topk(4).values, 2e-4)
    for entry in served.ask(logprobs=True, top_logprobs=5, temperature=0).choices[0].logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and entry.top_logprobs[0].bytes == entry.bytes
        assert values[0] == pytest.approx(entry.logprob)
    [entry] = served.ask(logprobs=True, max_tokens=1).choices[0].logprobs.content
    assert entry.top_logprobs == []


def test_turns_of_a_session_become_one_rollout_token_in_token_out(served):
    """The answer of random weights is not UTF-8: from its text nobody could encode it again."""
    messages, answers, before = list(HI), [], len(read_records(served.records))
    for turn in range(3):
        answers.append(served.ask(messages, user="three turns", extra_body=INSTANT, max_tokens=20, seed=turn, temperature=1.5))
        messages += [answers[-1].choices[0].message, {"role": "user", "content": f"and {turn}?"}]
    first = served.record(answers[0])["answers"][0]["ids"]
    assert "\ufffd" in messages[1].content and TOKENIZER.encode(messages[1].content, specials=False) != first
    [rollout] = read_records(served.records)[before:]
    records = [served.record(answer) for answer in answers]
    assert rollout.info.task == "three turns" and answers_of(rollout) == 3
    assert list(rollout.ids) == records[-1]["prompt"] + records[-1]["answers"][0]["ids"]
    sampled = [token for record in records for token in record["answers"][0]["ids"]]
    assert [token for token, own in zip(rollout.ids, rollout.generated) if own] == sampled
    assert list(rollout.logprobs) == [value for record in records for value in record["answers"][0]["logprobs"]]
    talk = Conversation(TOKENIZER, thinking=False)  # what an environment would have made of the same
    for question, record in zip(("hi", "and 0?", "and 1?"), records):
        talk.user(question)
        talk.prompt()
        talk.answer(Completion(*(record["answers"][0][key] for key in ("ids", "logprobs", "versions")), "stop"))
    assert (talk.rollout().ids, talk.rollout().generated) == (rollout.ids, rollout.generated)


def test_without_a_session_texts_are_encoded_and_rollouts_stand_alone(served):
    before = len(read_records(served.records))
    first = served.ask(extra_body=INSTANT, temperature=1.5)
    history = [*HI, first.choices[0].message, *HI]
    second = served.ask(history, extra_body=INSTANT)
    told = [{"role": "assistant", "content": first.choices[0].message.content} if i == 1 else message for i, message in enumerate(history)]
    assert served.record(second)["prompt"] == render_ids(told, TOKENIZER, thinking=False)
    assert [rollout.info.task for rollout in read_records(served.records)[before:]] == [first.id, second.id]


def test_a_changed_answer_is_encoded_as_the_client_wrote_it(served):
    served.ask(user="changed", extra_body=INSTANT, max_tokens=4)
    history = [*HI, {"role": "assistant", "content": "something else"}, *HI]
    answer = served.ask(history, user="changed", extra_body=INSTANT)
    assert served.record(answer)["prompt"] == render_ids(history, TOKENIZER, thinking=False)
    assert [answers_of(rollout) for rollout in read_records(served.records) if rollout.info.task == "changed"] == [1, 1]
    turn = Turn((1,), (*b"why", TOKENIZER.end_think, *b"ok", TOKENIZER.im_end), True, ("ok", ()), "why")
    told = [*HI, {"role": "assistant", "content": "ok", "reasoning_content": "other reasons"}]
    ids = render_ids(told, TOKENIZER, preserve_thinking=True)
    assert splice(ids, told, [turn], TOKENIZER, False, True) == ids
    told[1]["reasoning_content"] = "why"
    assert splice(ids, told, [turn], TOKENIZER, False, True) == render_ids(told, TOKENIZER, preserve_thinking=True)


def test_an_answer_that_a_stop_string_cut_is_read_as_the_client_sends_it(taught):
    answer = taught.ask(SUM, user="cut", temperature=0, max_tokens=200, tools=TOOLS, stop=["in"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Add", "stop")
    assert TOKENIZER.decode(taught.record(answer)["answers"][0]["ids"]) == "Addin"
    history = [*SUM, {"role": "assistant", "content": "Add"}, *HI]
    second = taught.ask(history, user="cut", max_tokens=4, tools=TOOLS)
    assert taught.record(second)["prompt"] == render_ids(history, TOKENIZER, tools=TOOLS, thinking=False)


def test_of_answers_that_read_alike_the_one_to_this_prompt_is_meant():
    """Two ways to write one text, as a vocabulary of merges has them: here, bytes of no character."""
    told = [*HI, {"role": "assistant", "content": "\ufffd"}, *HI]
    prompt = tuple(render_ids(HI, TOKENIZER, thinking=False))
    turns = [Turn(p, (byte, TOKENIZER.im_end), False, ("\ufffd", ()), "") for p, byte in (((1,), 200), (prompt, 201), ((2,), 202))]
    for given, byte in ((turns, 201), (turns[::2], 202)):
        ids = splice(render_ids(told, TOKENIZER, thinking=False), told, given, TOKENIZER, False, False)
        assert ids[len(prompt) : len(prompt) + 2] == [byte, TOKENIZER.im_end]


def test_branches_of_a_session_count_every_sampled_token_once(served):
    before, lines = len(read_records(served.records)), len(list(read_lines(served.records)))
    first = served.ask(user="tree", extra_body=INSTANT, n=2, temperature=1.5)
    for choice in (*first.choices, first.choices[0]):
        served.ask([*HI, choice.message, *HI], user="tree", extra_body=INSTANT, temperature=1.5, seed=5)
    rollouts = read_records(served.records)[before:]
    assert [answers_of(rollout) for rollout in rollouts] == [2, 2, 1] and rollouts[0].group == rollouts[1].group != rollouts[2].group
    sampled = [token for record in list(read_lines(served.records))[lines:] for answer in record["answers"] for token in answer["ids"]]
    owned = [token for rollout in rollouts for token, own in zip(rollout.ids, rollout.generated) if own]
    assert sorted(owned) == sorted(sampled)


def test_a_turn_at_another_temperature_or_with_another_picture_is_another_rollout(served):
    before = len(read_records(served.records))
    asked = shown(picture(1))
    answer = served.ask([asked], user="other", extra_body=INSTANT, temperature=1.5).choices[0].message
    served.ask([asked, answer, *HI], user="other", extra_body=INSTANT, temperature=1.4)
    served.ask([shown(picture(2)), answer, *HI], user="other", extra_body=INSTANT, temperature=1.5)
    assert [answers_of(rollout) for rollout in read_records(served.records)[before:]] == [1, 1, 1]


def test_reasoning_that_the_client_lost_is_put_back_while_tools_are_called(served):
    """And leaves, as the template says, when the question is answered."""
    session = {"X-Session-Id": "reasons"}
    prompt, body = lesson(SUM, CALLS | {"reasoning_content": "two sums"}, True, TOOLS)
    served.gateway._sessions["reasons"] = [Turn(tuple(prompt), tuple(body), True, reads(CALLS), "two sums")]
    answer = served.ask([*SUM, CALLS, *SUMS], tools=TOOLS, extra_headers=session, max_tokens=1)
    assert served.record(answer)["prompt"][: len(prompt + body)] == prompt + body
    turn = Turn(tuple(render_ids(SUM, TOKENIZER)), (*b"hm", TOKENIZER.end_think, *b"ok", TOKENIZER.im_end), True, ("ok", ()), "hm")
    served.gateway._sessions["reasons"] = [turn]
    answered = [*SUM, {"role": "assistant", "content": "ok"}]
    prompt = served.record(served.ask([*answered, *HI], extra_headers=session, max_tokens=1))["prompt"]
    assert prompt == render_ids([*answered, *HI], TOKENIZER)
    kept = {"chat_template_kwargs": {"preserve_thinking": True}}
    prompt = served.record(served.ask([*answered, *HI], extra_headers=session, max_tokens=1, extra_body=kept))["prompt"]
    assert tuple(prompt[: len(turn.prompt + turn.ids)]) == turn.prompt + turn.ids


TEXTS = st.text("ab <|>\n\u00e9", max_size=6)


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS, st.integers(0, 2)), min_size=1, max_size=4), st.booleans(), st.booleans(), st.booleans())
def test_splicing_ids_that_spell_the_text_changes_nothing(turns, thinking, preserve, declared):
    """Whatever the conversation: where the sampled ids are those of the template, so is the prompt."""
    messages, remembered, tools, count = [], [], TOOLS if declared else None, 0
    for question, reasoning, content, calls in turns:
        messages.append({"role": "user", "content": question})
        prompt = render_ids(messages, TOKENIZER, tools=tools, thinking=thinking, preserve_thinking=preserve)
        answer = {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if thinking else {})
        answer |= {"tool_calls": [call(count + i, i, i) for i in range(calls)]} if calls else {}
        whole = render_ids([*messages, answer], TOKENIZER, tools=tools, add_generation_prompt=False, preserve_thinking=True)
        start = len(whole) - whole[::-1].index(TOKENIZER.im_assistant) - 1
        sampled = whole[whole.index(TOKENIZER.think, start) + (1 if thinking else 2) :]
        remembered.append(Turn(tuple(prompt), tuple(sampled), thinking, reads(answer), reasoning if thinking else ""))
        messages.append(answer)
        messages += [{"role": "tool", "tool_call_id": f"functions.add:{count + i}", "content": "7"} for i in range(calls)]
        count += calls
    messages.append({"role": "user", "content": "last"})
    ids = render_ids(messages, TOKENIZER, tools=tools, thinking=thinking, preserve_thinking=preserve)
    assert splice(ids, messages, remembered, TOKENIZER, declared, preserve) == ids
    forgetful = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]
    poor = render_ids(forgetful, TOKENIZER, tools=tools, thinking=thinking, preserve_thinking=preserve)
    unique = len({turn.text for turn in remembered}) == len(remembered)
    assert not unique or splice(poor, forgetful, remembered, TOKENIZER, declared, preserve) == ids


def test_bug60_weights_may_change_during_an_answer_and_each_token_says_which(tmp_path):
    with endless(tmp_path) as one:
        stream = iter(one.ask(max_tokens=50, stream=True))
        next(stream), next(stream)
        one.gateway.update(random_model(seed=1).state_dict(), 7)
        assert len(list(stream)) > 2
        late = one.ask()
    first, second = list(read_lines(tmp_path))
    versions = first["answers"][0]["versions"]
    assert versions == sorted(versions) and set(versions) == {0, 7} and set(second["answers"][0]["versions"]) == {7}
    assert late.system_fingerprint == "version-7" and [set(rollout.versions) for rollout in read_records(tmp_path)] == [{0, 7}, {7}]


def test_an_emptied_engine_goes_on_with_the_answer(tmp_path):
    with endless(tmp_path) as one:
        expected = one.ask(max_tokens=30).choices[0].message.content
        stream = iter(one.ask(max_tokens=30, stream=True))
        next(stream), next(stream)
        one.gateway._loop.call_soon_threadsafe(one.gateway.engine.abort_all)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert expected.endswith(text) and text
    first, second = (record["answers"] for record in read_lines(tmp_path))
    assert first == second


def test_only_rewarded_rollouts_are_valid_and_know_their_calls(taught):
    for name, temperature in (("rated", 1), ("rated too", 1), ("unrated", 1), ("greedy", 0)):
        taught.ask(SUM, user=name, tools=TOOLS, temperature=temperature, max_tokens=4 if temperature else 200)
    rollouts = {rollout.info.task: rollout for rollout in read_records(taught.records, {"rated": 0.5, "rated too": 0, "greedy": 1})}
    told = {name: (rollouts[name].reward, rollouts[name].valid) for name in ("rated", "rated too", "unrated", "greedy")}
    assert told == {"rated": (0.5, True), "rated too": (0.0, True), "unrated": (0.0, False), "greedy": (1.0, False)}
    assert "greedy" in rollouts["greedy"].info.reason and "not rewarded" in str(rollouts["unrated"].info)
    assert len({rollout.group for name, rollout in rollouts.items() if name in told}) == 1
    [first, second] = rollouts["greedy"].info.calls
    assert (first.arguments, second.id, second.index) == ({"a": 2, "b": 3}, "functions.add:1", 1)
    assert rollouts["greedy"].info.finish == "stop"


def test_a_line_cut_by_a_crash_is_taken_away_and_damage_is_named(tmp_path):
    recorder = Recorder(tmp_path)
    with pytest.raises(RecordError, match="another gateway records there"):
        Recorder(tmp_path)
    recorder.write({"id": "one"})
    recorder.close()
    path = tmp_path / "records.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"id": "tw')
    assert [record["id"] for record in read_lines(tmp_path)] == ["one"]
    recorder = Recorder(tmp_path)
    recorder.write({"id": "three"})
    recorder.close()
    assert [record["id"] for record in read_lines(tmp_path)] == ["one", "three"] and path.stat().st_mode & 0o77 == 0
    path.write_bytes(b'{"id": "one", "answers": []}\n{"id"\n')
    with pytest.raises(RecordError, match="line 2: damaged"):
        read_records(tmp_path)
    with pytest.raises(RecordError, match="cannot be read"):
        read_records(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecordError, match="cannot be written"):
        Recorder(tmp_path / "file" / "below")


# Taking an answer apart


def answered(text, stop=(), thinking=False, tools=TOOLS, first_call=0):
    """An Answer that was fed a text token by token until it stopped, its deltas, and how many tokens it took."""
    body = {"model": "k25", "messages": HI, "stop": list(stop), "tools": tools} | {"thinking": thinking}
    answer, deltas = Answer(TOKENIZER, read_request(body, None, "k25", Settings(), True), quick_version, first_call), []
    answer.emit = lambda answer, delta: deltas.append(delta)
    answer.job = Cancelled()
    for token in TOKENIZER.encode(text):
        answer.take(token, -1.0, None)
    answer.close("stop")
    return answer, deltas


class Cancelled:
    """A job that may be cancelled."""

    cancel = lambda self: None  # noqa: E731


class quick_version:  # noqa: N801
    """An engine's version."""

    version = 0


@given(st.text("abX", max_size=12), st.lists(st.text("abX", min_size=1, max_size=3), max_size=3))
def test_stop_strings_end_the_content_where_the_first_is_complete(text, stops):
    expected, tokens = text, len(text)
    for end in range(1, len(text) + 1):
        if found := [text[:end].find(stop) for stop in stops if stop in text[:end]]:
            expected, tokens = text[: min(found)], end
            break
    answer, deltas = answered(text, stops)
    assert (answer.content, answer.finish, len(answer.ids)) == (expected, "stop", tokens)
    assert "".join(delta["content"] for delta in deltas) == expected


def test_stop_strings_do_not_stop_reasoning_or_calls():
    text = "ENDing</think>so ENDless"
    answer, _ = answered(text, ["END"], thinking=True)
    assert (answer.reasoning, answer.content) == ("ENDing", "so ")
    called = TOKENIZER.decode(lesson(SUM, CALLS, False, TOOLS)[1])
    answer, _ = answered(called, ["add", "5"])
    assert [c["function"]["arguments"] for c in answer.calls] == ['{"a": 2, "b": 3}', '{"a": 4, "b": 5}'] and answer.finish == "tool_calls"


def test_bug39_call_ids_count_the_conversation_whatever_the_model_wrote():
    answer, deltas = answered(TOKENIZER.decode(lesson(SUM, CALLS, False, TOOLS)[1]), first_call=3)
    assert [c["id"] for c in answer.calls] == ["functions.add:3", "functions.add:4"]
    assert [d["tool_calls"][0]["index"] for d in deltas if "tool_calls" in d] == [0, 0, 1, 1]


def test_bug40_a_broken_call_is_named_and_the_good_one_stays():
    called = TOKENIZER.decode(lesson(SUM, CALLS, False, TOOLS)[1]).replace('{"a": 2, "b": 3}', '{"a": 2, "b"')
    answer, deltas = answered(called)
    assert [c["id"] for c in answer.calls] == ["functions.add:0"] and len(answer.message()["tool_call_errors"]) == 1
    assert "2" not in "".join(json.dumps(delta) for delta in deltas)
    undeclared, _ = answered(TOKENIZER.decode(lesson(SUM, CALLS, False, TOOLS)[1]), tools=None)
    assert undeclared.finish == "stop" and not undeclared.calls and len(undeclared.errors) == 2


# The command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint on disk."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    k25.save(MODEL, directory)
    return directory


def test_misuse_is_one_line_and_exit_code_2(saved, tmp_path, capsys, monkeypatch):
    def fails(*arguments):
        with pytest.raises(SystemExit) as ended:
            command.main(["serve", "--slots", "8", *arguments])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.startswith("gateway.py: ") and error.count("\n") == 1, error
        return error

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}: the port is in use" in fails("--model", str(saved), "--port", port)
    assert "K25_GATEWAY_TOKEN" in fails("--model", str(saved), "--host", "0.0.0.0")
    assert "cannot read" in fails("--model", str(tmp_path / "none"))
    assert "--port between" in fails("--model", str(saved), "--port", "70000")
    assert "pixels is 0" in fails("--model", str(saved), "--pixels", "0")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert "pip install '.[serve]'" in fails("--model", str(saved))


def test_the_command_serves_until_a_signal(saved, tmp_path):
    """In a process of its own; a stream that runs then is ended and written down."""
    arguments = ["serve", "--model", saved, "--port", "0", "--slots", "8", "--record", tmp_path, "--grace", "0", "--instant"]
    process = subprocess.Popen([sys.executable, ROOT / "gateway.py", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        line = process.stdout.readline()
        one = Served(None, line.split()[-1], tmp_path)
        assert line.startswith("gateway.py: k25 at http://127.0.0.1:") and one.ask().choices[0].message.content
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()
    assert len(read_records(tmp_path)) == 1
