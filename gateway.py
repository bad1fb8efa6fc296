"""A local endpoint that speaks OpenAI's chat API in front of a K25 and writes down every token — K2.5 report D, 7.

    python gateway.py serve --model runs/toy/model --record runs/records --instant

An agent that nobody can change, in any language, talks to it as to any served model; the records of what it asked and was
answered, token by token, become rollouts to train on. The real client and any framework that takes a base URL:

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")        # or K25_GATEWAY_TOKEN
    client.chat.completions.create(model="k25", messages=[{"role": "user", "content": "sort 3 1 2?"}], top_p=1,
                                   extra_body={"chat_template_kwargs": {"thinking": False}},
                                   extra_headers={"X-Session-Id": "episode-7"})
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=unused some-agent --model k25

From a trainer, in the same process: `with Gateway(model, record="runs/records").in_thread() as url: …`, with `update(state,
version)` between or during answers, and `read_records("runs/records", {"episode-7": reward})` afterwards.

- **Thinking** is on as in the release; off ("instant") by the request's `chat_template_kwargs: {"thinking": false}` or
  `thinking: {"type": "disabled"}`, for all that do not say by `--instant`. Reasoning comes as `reasoning_content`.
  Defaults: temperature 1.0 thinking, 0.6 instant, top_p 0.95. Recorded log-probs are before top-p: agents to be trained
  should send top_p=1.
- **Tool calls** have ids functions.{name}:{index}, the index counting all calls of the conversation. A call goes out when it
  is complete; a malformed one is named in `tool_call_errors` of the message instead.
- **Stop strings** are looked for in the content and end it before them; their tokens are sampled tokens all the same.
- **Sessions**: requests with one `X-Session-Id` (or `user`) are one conversation, or several. There, an assistant message
  that reads as it was answered gets the very ids that were sampled, reasoning that the client did not send back included;
  its text is not encoded again. So the later prompt begins with the earlier one and its answer, the cache is used again,
  and `read_records` makes one rollout of both. Where the template itself changes the past (reasoning is dropped once a
  question is answered, unless `preserve_thinking`), or a stop string cut it, they are two.
- **Not served**: remote URLs (pictures come as data: URLs, PNG or JPEG), video, JSON modes, penalties, forced tool choice.
  Whatever would change the answer and is not done is refused with 400, naming the field.

Without K25_GATEWAY_TOKEN in the environment it serves this machine only, and only those who name it so (no page from
elsewhere, whatever its name resolves to). With it, everything but /health wants it as bearer token. Of the headers only X-Session-Id is
recorded. One thread does it all: while the model computes a step, or a long prompt, nobody is answered, /health neither.

Public names: Gateway, Settings, GatewayError, read_records, main.     Tests: pytest tests/test_gateway.py
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import hmac
import ipaddress
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time
import uuid
from collections import OrderedDict

from safetensors import SafetensorError

from engine import Completion, Engine, EngineError, Request
from k25 import load
from media import merged_tokens
from records import Recorder, Turn, read_records, reads, splice
from rollout import derive
from template import TemplateError, render_ids
from tokenizer import Tokenizer
from wire import Answer, ApiError, GatewayError, Settings, parse_body, read_picture, read_request, shown

__all__ = ["Gateway", "GatewayError", "Settings", "main", "read_records"]

TOKEN_VARIABLE = "K25_GATEWAY_TOKEN"
ITEMS = 64  # pictures kept for requests that show them again


def _web():
    """aiohttp's server."""
    try:
        from aiohttp import web
    except ImportError:
        raise GatewayError("serving needs the extra `serve`: pip install '.[serve]'") from None
    return web


# ------------------------------------------------------------------------------------------------- gateway


def _is_loopback(host):
    """Whether a host is this machine's own, by its number or as localhost."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _seed_of(seed, choice):
    """The seed of one of n choices: the request's own for the first."""
    return derive(seed, "choice", choice) if choice else seed


class Gateway:
    """The endpoint. Serves from one event loop; `update` may be called from any thread.

    model: K25, of which the engine makes a copy, or an Engine to share; name: str — by which it is asked for; record: a directory,
    held while it serves, or None; slots, capacity, version, deterministic: of the engine (default: as many tokens as the model
    has positions, at most 4096); thinking: bool — for requests that do not say; tokenizer: default bytes. Takes the bearer
    token from the environment. Raises GatewayError.
    """

    def __init__(self, model, *, name="k25", record=None, slots=64, capacity=None, version=0, deterministic=True, thinking=True,
                 tokenizer=None, settings=Settings()):  # fmt: skip
        self._web = _web()
        if not isinstance(model, Engine):
            capacity = capacity or min(model.config.max_position_embeddings, 4096)
            model = Engine(model, slots, capacity, version=version, deterministic=deterministic)
        self.engine, self.name, self.thinking, self.settings = model, name, thinking, settings
        self.tokenizer = tokenizer or Tokenizer(self.engine.model.vocab_size)
        self._media = self.engine.model.model.config.media
        self._token = os.environ.get(TOKEN_VARIABLE) or None
        if self._token and not re.fullmatch("[!-~]+", self._token):
            raise GatewayError(f"{TOKEN_VARIABLE} holds characters that no header carries: use visible ASCII without spaces")
        self._record, self._recorder = record, None
        self._requests, self._jobs, self._sessions = 0, set(), OrderedDict()
        self._pictures, self._lock = OrderedDict(), threading.Lock()
        self._loop = self._stopping = None

    # -- for the trainer

    def update(self, model_or_state, version):
        """Take over other weights before the next step of the engine; each token's record says which weights drew it."""

        async def change():
            self.engine.update(model_or_state, version)

        try:
            here = asyncio.get_running_loop()
        except RuntimeError:  # there is none in this thread
            here = None
        if self._loop in (None, here):
            self.engine.update(model_or_state, version)
        else:
            asyncio.run_coroutine_threadsafe(change(), self._loop).result()

    def stop(self):
        """End `serve`, from any thread: nobody new, `grace` seconds for running answers."""
        if self._loop:
            self._loop.call_soon_threadsafe(self._stopping.set)

    @contextlib.contextmanager
    def in_thread(self, host="127.0.0.1", port=0):
        """Serve from a thread meanwhile; gives the base URL. port 0: a free one."""
        ready = concurrent.futures.Future()

        def run():
            try:
                asyncio.run(self.serve(host, port, ready.set_result))
            except BaseException as error:  # the caller waits for either
                ready.done() or ready.set_exception(error)

        thread = threading.Thread(target=run, name="gateway")
        thread.start()
        try:
            yield ready.result()
        finally:
            self.stop()
            thread.join()

    async def serve(self, host="127.0.0.1", port=8000, ready=None):
        """Serve until `stop`, SIGINT or SIGTERM. ready: called with the base URL. Raises GatewayError."""
        if not _is_loopback(host) and not self._token:
            raise GatewayError(f"{host} is reached from other machines: set {TOKEN_VARIABLE}, which clients then send as their API key")
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._recorder = Recorder(self._record) if self._record else None
        runner = self._web.AppRunner(self.app(), handler_cancellation=True, auto_decompress=False, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            try:
                await self._web.TCPSite(runner, host, port).start()
            except (OSError, OverflowError) as error:
                taken = getattr(error, "errno", None) == errno.EADDRINUSE
                raise GatewayError(f"cannot listen on {host}:{port}: "
                                   + ("the port is in use; choose another with --port" if taken else str(error))) from None  # fmt: skip
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    self._loop.add_signal_handler(number, self._stopping.set)
            if ready:
                ready(f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}/v1")
            await self._stopping.wait()
            for site in list(runner.sites):
                await site.stop()
            if self._jobs:
                await asyncio.wait(self._jobs, timeout=self.settings.grace)
            for job in list(self._jobs):
                job.cancel()
        finally:
            await runner.cleanup()
            if self._recorder:
                self._recorder.close()
            self._loop = None

    def app(self):
        """The aiohttp application that `serve` runs: POST /v1/chat/completions, GET /v1/models, /v1/models/NAME and /health."""
        web = self._web

        @web.middleware
        async def guard(request, handler):
            headers = {}
            try:
                self._admit(request)
                return await handler(request)
            except ApiError as error:
                failure = error
                headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status, {})
            except web.HTTPException as error:
                words = {404: f"there is nothing at {shown(request.path)}", 413: f"the body is larger than {self.settings.body} bytes",
                         405: f"{shown(request.path)} takes {error.headers.get('Allow')}"}  # fmt: skip
                failure = ApiError(error.status, words.get(error.status, error.reason))
                headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            return web.json_response(failure.body(), status=failure.status, headers=headers)

        app = web.Application(middlewares=[guard], client_max_size=self.settings.body)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name}", self._models)
        app.router.add_get("/health", self._health)
        return app

    # -- requests

    def _admit(self, request):
        """The token, in constant time; without one, the name that the request used for this machine."""
        if self._token and request.path != "/health":
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token.encode())
            if scheme.lower() != "bearer" or not right:
                raise ApiError(401, "a bearer token is needed, and this is not it", code="invalid_api_key")
        if not self._token:
            host = re.fullmatch(r"\[?(.*?)\]?(:\d+)?", request.host)
            if not host or not _is_loopback(host[1].lower()):
                raise ApiError(403, f"{shown(request.host)} is no name of this machine: without a token only itself is served")

    async def _health(self, request):
        return self._web.json_response({"status": "ok"})

    async def _models(self, request):
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "k25", "max_model_len": self.engine.capacity}
        name = request.match_info.get("name")
        if name not in (None, self.name):
            raise ApiError(404, f"there is no model {shown(name)}: this gateway serves {self.name!r}", "model", "model_not_found")
        return self._web.json_response(model if name else {"object": "list", "data": [model]})

    async def _chat(self, request):
        """One request. The body is read only when it counts among those at once, so that memory is bounded."""
        if self._requests >= self.settings.requests:
            raise ApiError(429, f"{self._requests} requests are being answered: come again", code="rate_limit_exceeded")
        self._requests += 1
        try:
            return await self._answer(request, await self._read(request))
        finally:
            self._requests -= 1

    async def _read(self, request):
        """The body as Asked."""
        if request.content_type != "application/json":
            raise ApiError(415, f"Content-Type is {shown(request.content_type)}: send application/json")
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise ApiError(415, "compressed bodies are not served")
        try:
            async with asyncio.timeout(self.settings.patience):
                raw = await request.read()
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.settings.patience:g} seconds") from None
        return read_request(parse_body(raw), request.headers.get("X-Session-Id"), self.name, self.settings, self.thinking)

    def _prepare(self, asked):
        """Pictures and ids of a prompt; in a thread, since both may take a while. Returns ([Picture], [hash of its item], ids)."""
        pictures = [self._picture(*place) for place in asked.urls]
        media = [("image", [(None, merged_tokens(picture.item.grid))]) for picture in pictures]
        try:
            ids = render_ids(asked.messages, self.tokenizer, media, tools=list(asked.tools), thinking=asked.thinking,
                             preserve_thinking=asked.preserve)  # fmt: skip
        except TemplateError as error:
            place = re.match(r"message (\d+)", str(error))
            raise ApiError(400, str(error), f"messages[{place[1]}]" if place else "messages") from None
        try:
            return pictures, [self._recorder.keep(picture.item) for picture in pictures] if self._recorder else [], ids
        except (OSError, SafetensorError) as error:
            raise ApiError(500, f"the pictures cannot be recorded ({error}): nothing unrecorded is answered") from None

    def _picture(self, url, where):
        """A Picture, the same object as long as it is remembered: the engine knows what it has encoded by that."""
        key = hashlib.sha256(url.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            found = self._pictures.get(key)
        found = found or read_picture(url, where, self.settings.pixels, self._media)
        with self._lock:
            found = self._pictures.setdefault(key, found)
            self._pictures.move_to_end(key)
            while len(self._pictures) > ITEMS:
                self._pictures.popitem(last=False)
        return found

    async def _answer(self, request, asked):
        """Everything after the checks of form."""
        pictures, kept, ids = await asyncio.to_thread(self._prepare, asked)
        turns = self._turns(asked.session)
        prompt = tuple(splice(ids, asked.messages, turns, self.tokenizer, bool(asked.tools), asked.preserve) if turns else ids)
        room = self.engine.capacity - len(prompt)
        if room < (asked.max_tokens or 1):
            raise ApiError(400, f"the prompt has {len(prompt)} tokens and {asked.max_tokens or 1} new ones are asked for: together at "
                           f"most {self.engine.capacity}", "messages", "context_length_exceeded")  # fmt: skip
        if self._stopping.is_set():
            raise ApiError(503, "the gateway is being stopped")
        calls = sum(len(message.get("tool_calls", ())) for message in asked.messages)
        task = _Task(self, asked, prompt, pictures, kept, turns, calls, asked.max_tokens or room)
        try:
            return await (self._stream(request, task) if asked.stream else self._whole(task))
        finally:
            task.end()

    def _turns(self, session):
        """The answers of a session, oldest first; the longest unused session is forgotten."""
        if session is None:
            return []
        turns = self._sessions.setdefault(session, [])
        self._sessions.move_to_end(session)
        while len(self._sessions) > self.settings.sessions:
            self.engine.forget(self._sessions.popitem(last=False)[0])
        return turns

    async def _whole(self, task):
        """The answer as one JSON object."""
        task.start()
        await task.settle()
        choices = [{"index": answer.index, "message": answer.message(), "finish_reason": answer.finish,
                    "logprobs": None if task.asked.tops is None else {"content": answer.entries, "refusal": None}}
                   for answer in task.answers]  # fmt: skip
        return self._web.json_response(task.envelope("chat.completion") | {"choices": choices, "usage": task.usage()})

    async def _stream(self, request, task):
        """The answer as server-sent events."""
        response = self._web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        queue = asyncio.Queue()
        usage = {"usage": None} if task.asked.include_usage else {}

        async def send(value):
            async with asyncio.timeout(self.settings.patience):
                await response.write(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode())

        async def send_delta(answer, delta, entries=(), finish=None):
            logprobs = None if task.asked.tops is None else {"content": list(entries), "refusal": None}
            choice = {"index": answer.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            await send(task.envelope("chat.completion.chunk") | {"choices": [choice]} | usage)

        try:
            for answer in task.answers:
                await send_delta(answer, {"role": "assistant", "content": ""})
            task.start(queue)
            left = len(task.answers)
            while left:
                answer, delta, entries = await queue.get()
                if delta is not None:
                    await send_delta(answer, delta, entries)
                    continue
                left -= 1
                if answer.finish:
                    await send_delta(answer, {}, entries, answer.finish)
            await task.settle()
            if usage:
                await send(task.envelope("chat.completion.chunk") | {"choices": [], "usage": task.usage()})
            await send("[DONE]")
        except ApiError as error:  # too late for a status
            await send(error.body())
        except TimeoutError:  # nobody reads
            if request.transport:
                request.transport.abort()
        return response


class _Task:
    """A request being answered: its choices and their jobs, until it is written down."""

    def __init__(self, gateway, asked, prompt, pictures, kept, turns, calls, max_tokens):
        self.gateway, self.asked, self.prompt, self.pictures, self.kept = gateway, asked, prompt, pictures, kept
        self.turns, self.max_tokens, self.jobs, self.written = turns, max_tokens, [], False
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.answers = [Answer(gateway.tokenizer, asked, gateway.engine, calls, index) for index in range(asked.n)]

    def envelope(self, kind):
        """What every answer of the API begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.gateway.name,
                "system_fingerprint": f"version-{self.gateway.engine.version}"}  # fmt: skip

    def usage(self):
        """Tokens, of all choices together."""
        end, sampled = self.gateway.tokenizer.end_think, [answer.ids for answer in self.answers]
        reasoning = sum(ids.index(end) + 1 if end in ids else len(ids) for ids in sampled) if self.asked.thinking else 0
        new = sum(map(len, sampled))
        return {"prompt_tokens": len(self.prompt), "completion_tokens": new, "total_tokens": len(self.prompt) + new,
                "completion_tokens_details": {"reasoning_tokens": reasoning}}  # fmt: skip

    def start(self, queue=None):
        """Begin all choices. queue: gets (answer, delta, log-prob entries) as they come, and (answer, None, …) at the end of each."""
        items = tuple(picture.item for picture in self.pictures)
        for answer in self.answers:
            if queue:
                answer.emit = lambda answer, delta: queue.put_nowait((answer, delta, answer.pending()))
            request = Request(self.prompt, items, self.max_tokens, self.asked.temperature, self.asked.top_p,
                              self.gateway.tokenizer.stop_ids, _seed_of(self.asked.seed, answer.index),
                              session=None if answer.index else self.asked.session)  # fmt: skip
            self.jobs.append(asyncio.ensure_future(self._generate(answer, request)))
            self.gateway._jobs.add(self.jobs[-1])
            self.jobs[-1].add_done_callback(self.gateway._jobs.discard)

    async def _generate(self, answer, request):
        """Sample one choice, going on after the engine was emptied (`abort_all`), to its end or a stop string."""
        try:
            while True:
                answer.job = asyncio.ensure_future(self.gateway.engine.generate(request, on_draw=answer.take))
                try:
                    done = await answer.job
                except asyncio.CancelledError:
                    if not answer.stopped or asyncio.current_task().cancelling():
                        raise
                    done = Completion((), (), (), "stop")
                if done.finish != "aborted":
                    return answer.close(done.finish)
                request = dataclasses.replace(request, prefix=done)
        finally:
            if answer.emit:
                answer.emit(answer, None)

    async def settle(self):
        """Wait for all choices, write them down and remember them. Raises ApiError when one failed or was stopped."""
        await asyncio.wait(self.jobs)
        for job in self.jobs:
            if job.cancelled():
                raise ApiError(503, "the gateway is being stopped")
            if isinstance(job.exception(), EngineError):
                raise ApiError(500, str(job.exception()))
            job.result()
        try:
            self._write()
        except OSError as error:
            raise ApiError(500, f"the record cannot be written ({error.strerror}): nothing unrecorded is answered") from None
        if self.asked.session is not None:
            self.turns += [
                Turn(self.prompt, tuple(answer.ids), self.asked.thinking, reads(answer.message()), answer.reasoning)
                for answer in self.answers if not answer.stopped  # else its tokens say more than was answered
            ]  # fmt: skip
            del self.turns[:-256]

    def end(self):
        """Write down what there is and stop what still runs, since nobody waits for it."""
        with contextlib.suppress(OSError):  # `settle` has said so
            self._write()
        for job in self.jobs:
            job.cancel()

    def _write(self):
        recorder, asked = self.gateway._recorder, self.asked
        if not recorder or self.written:
            return
        recorder.write({
            "id": self.id, "created": self.created, "model": self.gateway.name, "session": asked.session, "prompt": self.prompt,
            "media": self.kept, "images": [picture.sha256 for picture in self.pictures], "temperature": asked.temperature,
            "top_p": asked.top_p, "max_tokens": self.max_tokens, "stop": asked.stop, "thinking": asked.thinking,
            "messages": asked.messages, "tools": asked.tools,
            "answers": [answer.record(_seed_of(asked.seed, answer.index)) for answer in self.answers],
        })  # fmt: skip
        self.written = True


# -------------------------------------------------------------------------------------------- command line


def main(arguments=None):
    """`serve`. Exit code 2 with one line on misuse, 0 after SIGINT or SIGTERM."""
    cli = argparse.ArgumentParser(prog="gateway.py", description=__doc__.split("\n")[0])
    part = cli.add_subparsers(dest="command", required=True).add_parser("serve", help="an OpenAI-compatible endpoint")
    part.add_argument("--model", required=True, help="directory of a run or of a checkpoint")
    part.add_argument("--host", default="127.0.0.1", help=f"any but this machine's own needs {TOKEN_VARIABLE} in the environment")
    part.add_argument("--port", type=int, default=8000, help="0: a free one")
    part.add_argument("--record", metavar="DIR", help="append every request and its tokens to DIR/records.jsonl")
    part.add_argument("--name", default="k25", help="the model's name for clients")
    part.add_argument("--instant", action="store_true", help="no thinking unless a request asks for it (the toy is trained for that)")
    part.add_argument("--slots", type=int, default=64, help="answers computed at once")
    part.add_argument("--capacity", type=int, help="most tokens of a prompt and its answer (default: the model's, at most 4096)")
    part.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True, help="the same bits in any company")
    part.add_argument("--device", default="cpu")
    part.add_argument("--tokenizer", help="a released tiktoken.model; default: bytes")
    limits = part.add_argument_group("limits")
    for f in dataclasses.fields(Settings):
        limits.add_argument(f"--{f.name}", type=f.type, default=f.default, help=f"default {f.default}")
    flags = cli.parse_args(arguments)
    try:
        _web()
        if min(flags.slots, flags.capacity or 1) < 1 or not 0 <= flags.port < 65536:
            raise GatewayError("--slots and --capacity must be at least 1, --port between 0 and 65535")
        directory = pathlib.Path(flags.model)
        model = load(directory / "model" if (directory / "model").is_dir() else directory, device=flags.device)
        gateway = Gateway(model, name=flags.name, record=flags.record, slots=flags.slots, capacity=flags.capacity,
                          deterministic=flags.deterministic, thinking=not flags.instant,
                          tokenizer=Tokenizer(model.config.vocab_size, flags.tokenizer),
                          settings=Settings(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(Settings)}))  # fmt: skip
        asyncio.run(gateway.serve(flags.host, flags.port, lambda url: print(f"gateway.py: {flags.name} at {url}", flush=True)))
    except ValueError as error:  # all of K25's own errors are ValueErrors with one clear line
        print(f"gateway.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
