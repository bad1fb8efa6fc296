"""OpenAI's chat API as JSON: a request read and checked field by field, and an answer taken apart as its tokens come.

    asked = read_request(parse_body(raw), …)        # or an ApiError: status, message, the field's name
    answer.take(token, logprob, logits)             # → deltas of content, reasoning_content and tool_calls

Whatever would change an answer and is not done here is refused, naming the field; what has no effect is accepted.
`gateway.py` serves it.

Public names: Answer, ApiError, Asked, GatewayError, Picture, Settings, parse_body, read_picture, read_request, shown.
Letters: U vocabulary.     Tests: pytest tests/test_gateway.py
"""

import base64
import binascii
import dataclasses
import difflib
import hashlib
import io
import json
import re
import secrets
from dataclasses import dataclass

from PIL import Image

from media import MediaError, image_item, load_image
from template import StreamParser, TemplateError, declare_tools
from tokenizer import StreamDecoder

LEAST = -9999.0  # written for the log-prob of what cannot be drawn, as OpenAI does: JSON has no −∞


class GatewayError(ValueError):
    """A gateway that cannot be started or records that cannot be read; one line says why."""


class ApiError(Exception):
    """A request that is answered with an error: HTTP status, message, and OpenAI's param and code."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self):
        """The error in OpenAI's form."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Settings:
    """Limits of a gateway, each a flag of `serve`."""

    body: int = 32 << 20  # bytes of a request
    messages: int = 1024  # of a request
    tools: int = 128
    images: int = 32
    pixels: int = 1 << 24  # of one image, before it is decoded
    choices: int = 16  # n
    requests: int = 256  # at once; more are told to come again
    sessions: int = 1024  # whose answers are remembered
    patience: float = 60.0  # seconds for a client to send its request or to take a piece of its answer
    grace: float = 5.0  # seconds for running answers when the gateway is stopped

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if not getattr(self, f.name) > 0 and (f.name, getattr(self, f.name)) != ("grace", 0):
                raise GatewayError(f"{f.name} is {getattr(self, f.name)}: it must be positive")


# --------------------------------------------------------------------------------------- reading a request

_USED = ("model messages tools tool_choice stream stream_options temperature top_p max_tokens max_completion_tokens stop seed n "
         "logprobs top_logprobs thinking chat_template_kwargs user").split()  # fmt: skip
_WITHOUT_EFFECT = "store metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention".split()
_NOT_DONE = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"},
             "parallel_tool_calls": True, "modalities": ["text"]}  # and the only value each may have  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DATA_URL = re.compile(r"data:image/(?:png|jpe?g);base64,", re.IGNORECASE)
_WORDS = {str: "a string", bool: "true or false", int: "an integer", float: "a number", list: "an array", dict: "an object"}


@dataclass(frozen=True)
class Asked:
    """A request, checked. `told` is what the record keeps of the conversation."""

    messages: tuple  # for the template
    urls: tuple  # (url of a picture, where it stands), in order
    tools: tuple
    thinking: bool
    preserve: bool
    stream: bool
    include_usage: bool
    temperature: float
    top_p: float
    max_tokens: int | None  # None: as many as fit
    stop: tuple
    seed: int
    n: int
    tops: int | None  # alternatives to each token; None: no log-probs
    session: str | None


def _field(body, name, kind, default=None, where=""):
    """A field of a JSON object, null counting as absent. Raises ApiError naming it when it has another type."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise ApiError(400, f"{where}{name} must be {_WORDS[kind]}, not {shown(value)}", where + name)
    return value


def _number(body, name, low, high, default=None, kind=int):
    """A number of [low, high]."""
    value = _field(body, name, kind, default)
    if value is not None and not low <= value <= high:
        raise ApiError(400, f"{name} must lie between {low} and {high}, not {shown(value)}", name)
    return value


def shown(value):
    """A value of somebody else's, short enough for a message."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _object(value, where):
    if not isinstance(value, dict):
        raise ApiError(400, f"{where} must be an object, not {shown(value)}", where)
    return value


def parse_body(raw):
    """Bytes to a JSON object. Raises ApiError for anything else: NaN, too deep, too long a number, not UTF-8."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error).splitlines()[0][:100]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {shown(body)}")
    return body


def read_request(body, session, name, settings, thinking):
    """A JSON object to Asked. session: str | None — of the header; name: str — of the model; thinking: bool — when the request
    does not say. Raises ApiError naming the field."""
    for key in body:
        if key not in (*_USED, *_WITHOUT_EFFECT, *_NOT_DONE):
            near = difflib.get_close_matches(key, _USED, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ApiError(400, f"unknown field {shown(key)}{hint}", key[:100], "unknown_parameter")
        if key in _NOT_DONE and body[key] is not None and body[key] != _NOT_DONE[key]:
            raise ApiError(400, f"{key} may only be {shown(_NOT_DONE[key])} here", key, "unsupported_parameter")
    if _field(body, "model", str) is None:
        raise ApiError(400, f"model is missing: this gateway serves {name!r}", "model")
    if body["model"] != name:
        raise ApiError(404, f"there is no model {shown(body['model'])}: this gateway serves {name!r}", "model", "model_not_found")
    messages = _field(body, "messages", list, [])
    if not 1 <= len(messages) <= settings.messages:
        raise ApiError(400, f"messages has {len(messages)} entries: 1 to {settings.messages} are served", "messages")
    urls = []
    read = tuple(_read_message(message, f"messages[{i}]", urls) for i, message in enumerate(messages))
    if len(urls) > settings.images:
        raise ApiError(400, f"messages show {len(urls)} images: at most {settings.images} are served", "messages")
    thinking, preserve = _read_thinking(body, thinking)
    limit, newer = (_number(body, key, 1, 2**31) for key in ("max_tokens", "max_completion_tokens"))
    if limit and newer and limit != newer:
        raise ApiError(400, f"max_tokens is {limit} and max_completion_tokens {newer}: give one of them", "max_completion_tokens")
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop):
        raise ApiError(400, "stop must be one string or at most 16, each of 1 to 256 characters", "stop")
    tops = _number(body, "top_logprobs", 0, 20)
    if tops is not None and not _field(body, "logprobs", bool, False):
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    session = session or _field(body, "user", str)
    if session is not None and not 0 < len(session) <= 256:
        raise ApiError(400, "a session's name (X-Session-Id, or user) has 1 to 256 characters", "user")
    stream = _field(body, "stream", bool, False)
    options = _field(body, "stream_options", dict, {})
    if options and not stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    return Asked(
        read, tuple(urls), _read_tools(body, settings), thinking, preserve, stream, _field(options, "include_usage", bool, False),
        _number(body, "temperature", 0, 2, 1.0 if thinking else 0.6, float), _number(body, "top_p", 1e-6, 1, 0.95, float),
        limit or newer, tuple(stop), _number(body, "seed", -(2**63), 2**63, secrets.randbits(62)),
        _number(body, "n", 1, settings.choices, 1), (tops or 0) if _field(body, "logprobs", bool, False) else None, session,
    )  # fmt: skip


def _read_message(message, where, urls):
    """One message in the template's form; its pictures join `urls`."""
    message, out = _object(message, where), {}
    role = _field(message, "role", str, "", where + ".")
    out["role"] = {"developer": "system"}.get(role, role)
    if out["role"] not in ("system", "user", "assistant", "tool"):
        raise ApiError(400, f"{where}.role is {shown(role)}: use system, developer, user, assistant or tool", where + ".role")
    content = message.get("content")
    if isinstance(content, list):
        content = [_read_part(part, f"{where}.content[{j}]", role, urls) for j, part in enumerate(content)]
    elif not isinstance(content, str | None):
        raise ApiError(400, f"{where}.content must be a string, an array of parts or null, not {shown(content)}", where + ".content")
    out["content"] = content
    for key in ("name", *(["reasoning_content"] if role == "assistant" else ()), *(["tool_call_id"] if role == "tool" else ())):
        if (value := _field(message, key, str, None, where + ".")) is not None:
            out[key] = value
    if role == "assistant" and (calls := _field(message, "tool_calls", list, [], where + ".")):
        out["tool_calls"] = [_read_call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)]
    return out


def _read_part(part, where, role, urls):
    kind = _field(_object(part, where), "type", str, "", where + ".")
    if kind == "text" and (text := _field(part, "text", str, None, where + ".")) is not None:
        return {"type": "text", "text": text}
    if kind != "image_url" or role == "assistant":
        raise ApiError(400, f"{where}.type is {shown(kind)}: text with a text, and (not from the assistant) image_url, are served",
                       where + ".type")  # fmt: skip
    image = part.get("image_url")
    url = image if isinstance(image, str) else _field(_object(image, where + ".image_url"), "url", str, "", where + ".image_url.")
    urls.append((url, where + ".image_url.url"))
    return {"type": "image"}


def _read_call(call, where):
    function = _object(_object(call, where).get("function"), where + ".function")
    name = _field(function, "name", str, "", where + ".function.")
    if not _NAME.fullmatch(name):
        raise ApiError(400, f"{where}.function.name is {shown(name)}: 1 to 64 of A-Z a-z 0-9 _ . -", where + ".function.name")
    arguments = _field(function, "arguments", str, "{}", where + ".function.")
    return {"id": _field(call, "id", str, None, where + "."), "type": "function", "function": {"name": name, "arguments": arguments}}


def _read_tools(body, settings):
    """The tools that the prompt declares, each of which must have a TypeScript form; none with tool_choice "none"."""
    tools, choice = _field(body, "tools", list, []), body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise ApiError(400, f"tool_choice may be auto or none, not {shown(choice)}: a call cannot be forced", "tool_choice")
    if len(tools) > settings.tools:
        raise ApiError(400, f"{len(tools)} tools: at most {settings.tools} are served", "tools")
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        function = _object(_object(tool, where).get("function"), where + ".function")
        if not _NAME.fullmatch(_field(function, "name", str, "", where + ".function.")):
            raise ApiError(400, f"{where}.function.name must be 1 to 64 of A-Z a-z 0-9 _ . -", where + ".function.name")
        _field(function, "description", str, None, where + ".function.")
        try:
            declare_tools([tool])
        except TemplateError as error:
            raise ApiError(400, f"{where}: {error}", where) from None
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):  # a schema may be wrong anywhere
            raise ApiError(400, f"{where}.function.parameters is no JSON schema", where + ".function.parameters") from None
    return () if choice == "none" else tuple(tools)


def _read_thinking(body, default):
    """(thinking, preserve_thinking) from `thinking` and `chat_template_kwargs`, the two ways in use."""
    kwargs = _field(body, "chat_template_kwargs", dict, {})
    if unknown := [key for key in kwargs if key not in ("thinking", "preserve_thinking")]:
        raise ApiError(400, f"chat_template_kwargs has {shown(unknown[0])}: thinking and preserve_thinking are served",
                       "chat_template_kwargs")  # fmt: skip
    told = _field(kwargs, "thinking", bool, None, "chat_template_kwargs.")
    direct = body.get("thinking")
    if isinstance(direct, dict):
        direct = {"enabled": True, "disabled": False}.get(str(direct.get("type")), "")
    if not isinstance(direct, bool | None):
        raise ApiError(400, 'thinking must be true, false, {"type": "enabled"} or {"type": "disabled"}', "thinking")
    if told is not None and direct is not None and told != direct:
        raise ApiError(400, "thinking and chat_template_kwargs.thinking say different things", "thinking")
    thinking = next((value for value in (told, direct) if value is not None), default)
    return thinking, _field(kwargs, "preserve_thinking", bool, False, "chat_template_kwargs.")


@dataclass(frozen=True)
class Picture:
    """A picture as sent and as the model sees it."""

    sha256: str  # of the file
    item: object  # MediaItem


def read_picture(url, where, pixels, config):
    """A data: URL to a Picture. pixels: int — most, looked up before decoding; config: MediaConfig. Raises ApiError."""
    head = _DATA_URL.match(url)
    if not head:
        raise ApiError(400, f"{where} is {shown(url[:40])}: nothing is fetched; send data:image/png;base64,… or image/jpeg", where)
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{where}: the base64 is damaged", where) from None
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            width, height = image.size
            if width * height > pixels:
                raise ApiError(400, f"{where}: {width}x{height} pixels, at most {pixels} are served", where)
            item = image_item(load_image(image), config)
    except (ApiError, MediaError) as error:
        raise error if isinstance(error, ApiError) else ApiError(400, f"{where}: {error}", where) from None
    except Exception as error:  # format plugins raise whatever their parser meets, and the bomb guard its own class
        raise ApiError(400, f"{where} is no PNG or JPEG that can be read: {shown(str(error))}", where) from None
    return Picture(hashlib.sha256(content).hexdigest(), item)


# ----------------------------------------------------------------------------------------------- one answer


class Answer:
    """One choice: takes tokens as the engine draws them, and gives what a client may see of them.

    emit, if set, is called with (answer, delta) for each piece of the stream.
    """

    def __init__(self, tokenizer, asked, engine, first_call, index=0):
        """first_call: int — calls of the conversation so far; index: of the choice."""
        self.tokenizer, self.asked, self.engine, self.index = tokenizer, asked, engine, index
        self.ids, self.logprobs, self.versions, self.finish = [], [], [], None
        self.reasoning, self.content, self.calls, self.errors, self.entries = "", "", [], [], []
        self.stopped, self.job, self.emit = False, None, None  # whether a stop string came; the engine's task
        self._decoder, self._parser = StreamDecoder(tokenizer), StreamParser(asked.thinking)
        self._first_call, self._held, self._pending = first_call, "", []
        self._stops = _stop_scanner(asked.stop)

    def take(self, token, logprob, logits):
        """One more token; the engine calls it. logits: (U,)."""
        if self.stopped:
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.versions.append(self.engine.version)
        if self.asked.tops is not None:
            self._pending.append(self._entry(token, logprob, logits))
            self.entries.append(self._pending[-1])
        if token not in self.tokenizer.stop_ids:
            self._show(self._parser.feed(self._decoder.feed(token)))

    def close(self, finish):
        """The end: what was held back because something might have followed. finish: "stop" | "length" — of the engine."""
        self.finish = finish
        if not self.stopped:
            self._show(self._parser.feed(self._decoder.close(), final=True))
            self._release(len(self._held))
        self.finish = "stop" if self.stopped else self.finish
        if self.calls and self.finish == "stop":
            self.finish = "tool_calls"

    def message(self):
        """The answer in OpenAI's form."""
        message = {"role": "assistant", "content": self.content if self.content or not self.calls else None}
        message |= {"reasoning_content": self.reasoning} if self.asked.thinking else {}
        message |= {"tool_calls": self.calls} if self.calls else {}
        return message | ({"tool_call_errors": self.errors} if self.errors else {})

    def record(self, seed):
        """The answer as it is written down."""
        return {"ids": self.ids, "logprobs": self.logprobs, "versions": self.versions, "seed": seed,
                "finish": self.finish or "cancelled", "message": self.message()}  # fmt: skip

    def pending(self):
        """Log-prob entries not yet sent, which are sent now."""
        entries, self._pending = self._pending, []
        return entries

    def _entry(self, token, logprob, logits):
        """A token in OpenAI's `logprobs.content`. The alternatives' log-probs follow from the drawn one's: log p_k = log p +
        (z_k − z) / temperature."""
        best = logits.double().topk(min(self.asked.tops, len(logits)))
        shift = (best.values - logits[token].double()) / (self.asked.temperature or 1.0) + logprob
        tops = [self._named(k, value) for k, value in zip(best.indices.tolist(), shift.tolist())]
        return self._named(token, logprob) | {"top_logprobs": tops}

    def _named(self, token, logprob):
        content = self.tokenizer.token_bytes(token)
        return {"token": content.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(content)}

    def _show(self, events):
        for event in events:
            if event.kind == "content":
                self._held += event.text
                whole, begun = self._stops
                stop = whole.search(self._held)
                found = stop or begun.search(self._held)
                self._release(found.start() if found else len(self._held))
                if stop:
                    self.stopped = True
                    self.job.cancel()
                    return
                continue
            self._release(len(self._held))
            if event.kind == "reasoning":
                self.reasoning += event.text
                self._send({"reasoning_content": event.text})
            elif event.kind == "error":
                self.errors.append(event.text)
            elif event.kind == "call_end" and self.asked.tools:
                self._call(event.call)
            elif event.kind == "call_end":
                self.errors.append(f"{event.call.id}: no tools were declared")

    def _call(self, call):
        """A complete call. Its index counts all of the conversation, whatever the model wrote."""
        function = {"name": call.name, "arguments": call.raw}
        self.calls.append({"id": f"functions.{call.name}:{self._first_call + len(self.calls)}", "type": "function", "function": function})
        index = len(self.calls) - 1
        self._send({"tool_calls": [{"index": index} | self.calls[-1] | {"function": {"name": call.name, "arguments": ""}}]})
        self._send({"tool_calls": [{"index": index, "function": {"arguments": call.raw}}]})

    def _release(self, n):
        """Show the first n characters of the content held back."""
        text, self._held = self._held[:n], self._held[n:]
        if text:
            self.content += text
            self._send({"content": text})

    def _send(self, delta):
        if self.emit:
            self.emit(self, delta)


def _stop_scanner(stops):
    """Two patterns: of a stop string, and of what may be the start of one at the very end."""
    starts = [re.escape(stop[:n]) for stop in stops for n in range(len(stop) - 1, 0, -1)]
    return re.compile("|".join(map(re.escape, stops)) or "(?!)"), re.compile(rf"(?:{'|'.join(starts) or '(?!)'})\Z")
