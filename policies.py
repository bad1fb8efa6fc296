"""Who answers in a swarm: a server that speaks OpenAI's chat API, or a K25 in this process — K2.5 report 3, E.8.

    async with Endpoint("https://HOST/v1", "kimi-k2.5") as policy: message = await policy.answer(messages, tools, "main")
    policy = Local(handle)                       # rollout.Handle; what was sampled is kept, `policy.rollout("main", reward)`

Both have `answer(messages, tools, agent)` → template.Message; messages are OpenAI's dicts, agent names the conversation. The key of an
endpoint comes from OPENAI_API_KEY alone and is written nowhere.

Public names: Endpoint, Local, local_policy, SwarmError, PolicyError, ContextFullError, KEY_VARIABLE.     Tests: pytest tests/test_swarm.py
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import json
import os
import random
import re
import time
import urllib.parse

from swarm_log import Sampled, calls_before, read_calls, sendable
from template import SECTION_BEGIN, Message, ToolCall, parse

KEY_VARIABLE = "OPENAI_API_KEY"


class SwarmError(ValueError):
    """A swarm that cannot be started or go on; one line says why."""


class PolicyError(Exception):
    """A model that does not answer; one line says why. It ends its agent, nothing else.

    after: seconds until another try may go better; None: it will not.
    """

    def __init__(self, what, after=None):
        super().__init__(what)
        self.after = after


class ContextFullError(PolicyError):
    """The model cannot take a conversation that long."""


# ---------------------------------------------------------------------------------------- an endpoint


def _seconds(header):
    """Seconds of a Retry-After header, a number or a date; 0 when it says nothing."""
    for read in (float, lambda date: email.utils.parsedate_to_datetime(date).timestamp() - time.time()):
        with contextlib.suppress(TypeError, ValueError):
            return max(0.0, read(header))
    return 0.0


class Endpoint:
    """A policy that asks a server of OpenAI's chat API. To be used as `async with Endpoint(…) as policy`.

    base_url: str — up to /v1; model: str; options: dict — further fields of each request (temperature, max_tokens, …); retries: int —
    after the first try, of what may go better: 408, 409, 429, 5xx, no or a garbled answer; timeout: seconds of one try;
    backoff: seconds before the first retry, doubled each time and shortened by up to half at random, from the seed; patience:
    seconds, the longest wait a server may ask for. Raises SwarmError.
    """

    LARGEST = 16 << 20  # bytes of an answer

    def __init__(self, base_url, model, options=None, *, retries=5, timeout=300.0, backoff=1.0, patience=120.0, seed=0):
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SwarmError(f"{base_url} is no address: give http://host:port/v1 or https://…")
        if parts.username or parts.password or parts.query:
            raise SwarmError(f"the address holds a password or a query: put the key into {KEY_VARIABLE}")
        self.url, self.model, self.options = base_url.rstrip("/") + "/chat/completions", model, options or {}
        self.retries, self.timeout, self.backoff, self.patience, self.seed = retries, timeout, backoff, patience, seed
        self._key, self._run, self._session = os.environ.get(KEY_VARIABLE) or None, f"{random.SystemRandom().getrandbits(64):016x}", None
        if self._key and not re.fullmatch("[!-~]+", self._key):
            raise SwarmError(f"{KEY_VARIABLE} holds characters that no header carries: use visible ASCII without spaces")

    def __str__(self):
        return f"{self.model} at {self.url}"

    async def __aenter__(self):
        try:
            import aiohttp
        except ImportError:
            raise SwarmError("an endpoint needs the extra `serve`: pip install '.[serve]'") from None
        self._aiohttp = aiohttp
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers,
                                              timeout=aiohttp.ClientTimeout(total=self.timeout))  # fmt: skip
        return self

    async def __aexit__(self, *_):
        await self._session.close()

    async def answer(self, messages, tools, agent):
        """The next answer, a Message. Raises PolicyError, ContextFullError."""
        seed = random.Random(f"{self.seed} {agent} {len(messages)}").getrandbits(53)
        body = {"model": self.model, "messages": sendable(messages), "tools": tools, "seed": seed} | self.options
        for attempt in range(self.retries + 1):
            try:
                return self._read(await self._post(body, agent), calls_before(messages))
            except PolicyError as error:
                if error.after is None:
                    raise
                if attempt == self.retries or error.after > self.patience:
                    asked = f", asks to wait {error.after:.0f} seconds" if error.after > self.patience else ""
                    raise PolicyError(f"{error}{asked} ({attempt + 1} tries)") from None
                jitter = random.Random(f"{self.seed} {agent} {len(messages)} {attempt}").uniform(0.5, 1.0)
                await asyncio.sleep(max(error.after, min(60.0, self.backoff * 2**attempt) * jitter))

    async def _post(self, body, agent):
        """One try: the JSON of an answer."""
        headers, raw = {"X-Session-Id": f"{self._run}-{agent}"}, bytearray()
        try:
            async with self._session.post(self.url, json=body, headers=headers, allow_redirects=False) as response:
                status, after = response.status, _seconds(response.headers.get("Retry-After"))
                async for piece in response.content.iter_chunked(1 << 16):
                    raw += piece
                    if len(raw) > self.LARGEST:
                        raise PolicyError(f"the model's answer has more than {self.LARGEST} bytes")
        except (TimeoutError, self._aiohttp.ClientError, OSError) as error:
            what = f"no answer within {self.timeout:g} seconds" if isinstance(error, TimeoutError) else self._told(f"{type(error).__name__}: {error}")
            raise PolicyError(f"the model cannot be reached: {what}", 0.0) from None
        if status == 200:
            try:
                return json.loads(raw)
            except (ValueError, RecursionError):
                raise PolicyError("the model's server answers what is no JSON", 0.0) from None
        text = self._told(bytes(raw).decode("utf-8", "replace"))
        if status in (400, 413, 422) and re.search(r"context.length|maximum context|too long|too large", text, re.IGNORECASE):
            raise ContextFullError(f"the model's server answers {status}: {text}")
        if status in (408, 409, 429) or status >= 500:
            raise PolicyError(f"the model's server answers {status}: {text}", after)
        raise PolicyError(f"the model's server answers {status}: {text}")

    def _told(self, text):
        """Somebody else's words in one short line, without the key."""
        text = " ".join((text.replace(self._key, "…") if self._key else text).split())
        return text if len(text) <= 200 else text[:199] + "…"

    def _read(self, body, first):
        """JSON of an answer to a Message, its calls numbered from `first`."""
        try:
            choice = body["choices"][0]
            message = choice["message"]
            content, reasoning = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning") or ""
            if isinstance(content, list):
                content = "".join(part.get("text") or "" for part in content)
            if not isinstance(content, str) or not isinstance(reasoning, str):
                raise TypeError
        except (AttributeError, IndexError, KeyError, TypeError):
            raise PolicyError(f"the model's server answers what is no chat completion: {self._told(json.dumps(body)[:300])}", 0.0) from None
        calls, errors = read_calls(message.get("tool_calls"), first)
        if not calls and SECTION_BEGIN in content:  # served without a parser of Kimi's calls
            told = parse(content, thinking=False)
            content, errors = told.content, [*errors, *told.errors]
            calls = [dataclasses.replace(call, id=f"functions.{call.name}:{n}", index=n) for n, call in enumerate(told.tool_calls, first)]
        told = message.get("tool_call_errors")
        errors += [str(error) for error in told] if isinstance(told, list) else []
        errors += ["the answer was cut off at its longest"] if choice.get("finish_reason") == "length" else []
        return Message(reasoning, content, tuple(calls), tuple(errors))


# ------------------------------------------------------------------------------------- a K25 in this process


class Local:
    """A policy that samples a K25 through a rollout.Handle: what was sampled stays as it was, ids are appended and never encoded again.

    handle: rollout.Handle, of the engine that all agents share; sampling: rollout.Sampling, default the manager's; declare: bool —
    False for a model that was trained without declarations of its tools. Agents that answer at once are batched by the engine.
    """

    def __init__(self, handle, sampling=None, declare=True):
        self.handle, self.sampling, self.declare, self._talks = handle, sampling, declare, {}

    def __str__(self):
        return f"a K25, seed {self.handle.seed}"

    def talk(self, agent="main"):
        """The Conversation of an agent that answered in this process."""
        return self._talks[agent][0]

    def rollout(self, agent="main", reward=0.0, **options):
        """The Rollout of an agent that answered in this process; options as of Handle.rollout."""
        return self.handle.rollout(self._talks[agent][0], reward, **options)

    async def answer(self, messages, tools, agent):
        """The next answer, Sampled. Raises ContextFullError when the engine's capacity leaves no room."""
        if agent not in self._talks:
            self._talks[agent] = self.handle.conversation(tools if self.declare else None, name=agent), 0
        talk, told = self._talks[agent]
        for message in messages[told:]:
            role, content = message["role"], message.get("content") or ""
            if role == "assistant":  # of an earlier process
                if "sampled" not in message:
                    raise PolicyError("the log has no tokens of an earlier answer: it was another model's")
                talk.temperature = (self.sampling or self.handle.manager.sampling).temperature
                talk.prompt()
                talk.answer(Sampled("", "", (), (), **message["sampled"]))
            elif role == "tool":
                talk.tool(ToolCall(message["tool_call_id"], "", 0, {}, ""), content)
            else:
                getattr(talk, role)(content)
        before = len(talk.logprobs)
        message = await self.handle.answer(talk, self.sampling)
        self._talks[agent] = talk, len(messages) + 1
        count = len(talk.logprobs) - before
        if not count:
            raise ContextFullError(message.errors[0])
        errors = (*message.errors, *(("the answer was cut off at its longest",) if talk.finish == "length" else ()))
        return Sampled(message.reasoning, message.content, message.tool_calls, errors, tuple(talk.ids[-count:]), tuple(talk.logprobs[-count:]),
                       tuple(talk.versions[-count:]), talk.finish)  # fmt: skip


def local_policy(folder, slots, capacity, seed, sampling, thinking):
    """A Local policy over a checkpoint's folder."""
    from engine import Engine  # here: they load torch
    from k25 import load
    from rollout import Handle, RolloutManager, Sampling
    from tokenizer import Tokenizer

    engine = Engine(load(folder), slots, capacity)
    manager = RolloutManager(engine, None, Tokenizer(engine.model.vocab_size), Sampling(**sampling), thinking)
    return Local(Handle(manager, "swarm", seed, 0, 0))
