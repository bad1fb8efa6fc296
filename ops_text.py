"""The operations on text: messages to prompt and the model's answer back to a message — the released chat template.

Public names: render, parse, OPS.
Tests: pytest tests/test_ops_text.py
"""

import functools
import json
import re

from hypothesis import strategies as st

import template
from op import Op, Suspect
from template import ARGUMENT_BEGIN, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, TURN_END

# What contents are made of: nothing that looks like a marker, much that a careless pattern stumbles over.
_TEXT = st.lists(st.sampled_from(["Hi", " ", "\n", "é 漢字 🙂", "{x}}", "<b>", '"q"', "a.b:0"]), max_size=3).map("".join)
_NAMES = st.sampled_from(["f", "get_weather", "mcp.read-file"])
_ARGUMENTS = st.sampled_from(
    ["{}", '{"q": "é 漢"}', '{"a": {"b": [1, {"c": 2}]}}', '{"html":"<b>x</b>"}', '{"code": "if (x < y) { z }"}', '{"x":1.50}']
)  # fmt: skip
_PARTS = st.sampled_from([{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Look: "}])
_FLAWS = st.sampled_from([(), ("id", "json"), ("again",), ("id", "cut"), ("json", "again"), ("id", "again")])
_REASONING = st.sampled_from([{"reasoning_content": "Think {twice}."}, {}, {"reasoning_content": " 想\n"}])


# Messages to a prompt


def render(messages, tools, thinking):
    """A conversation as one string, ending where the model goes on. Every message is a turn, without newlines between:

        <|im_{user|assistant|system}|>{name or role}<|im_middle|>{content}<|im_end|>

    - Tools, if any, are a turn before all others: <|im_system|>tool_declare<|im_middle|>{TypeScript}<|im_end|>.
    - The message of a tool is a system turn; `## Return of {tool_call_id}` and a newline stand before its content.
    - The content of an assistant begins with <think>{reasoning_content}</think>. The reasoning is left empty up to the
      last assistant message without tool calls, that one included.
    - Its tool calls come after its content: <|tool_calls_section_begin|>, then per call
      <|tool_call_begin|>functions.{name}:{idx}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>, then
      <|tool_calls_section_end|>. idx counts the calls of the whole conversation from 0, whatever ids were given, and the
      messages of tools follow it. Arguments that are text stay as they are; a dict becomes JSON with ", " and ": ",
      its letters not escaped.
    - A part {"type": "image"} is <|media_begin|>image<|media_content|><|media_pad|><|media_end|> and a newline, a video
      <|kimi_k25_video_placeholder|>.
    - The end is <|im_assistant|>assistant<|im_middle|><think>, closed by </think> unless thinking.

    The declaration of tools, each line ended by a newline. Required fields come first, both kinds by name; descriptions,
    bounds and defaults are comments; `namespace` spans all functions; a function without fields is (_: {}):

        # Tools

        ## functions
        namespace functions {
        // What the function does
        type get_weather = (_: {
          // What the field means
          city: string,
          at?: {
            lat: number
          },
          // minimum: 1
          // Default: 3
          days?: number,
          tags?: Array<string>,
          unit?: "C" | "F"
        }) => any;
        }

    messages: list of dicts — role system, user, assistant or tool; content: text, None or a list of parts
    {"type": "text", "text"}, image, video; name, reasoning_content, tool_call_id: text, may be missing; tool_calls: list of
    {"id", "type": "function", "function": {"name", "arguments": text or dict}}; tools: list of {"type": "function",
    "function": {"name", "description", "parameters": JSON schema}} or None; thinking: bool.
    Returns text: str. Source: chat_template.jinja of moonshotai/Kimi-K2.5.
    """
    return template.render(messages, tools, thinking)


_FIELDS = {
    "unit": {"type": "string", "enum": ["C", "F"]},
    "city": {"type": "string", "description": "City name, é"},
    "days": {"type": "integer", "minimum": 1, "default": 3},
    "tags": {"type": "array", "items": {"type": "string"}},
    "at": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
    "brief": {"type": "boolean", "description": "Say less"},
}


@st.composite
def _tools(draw):
    tools = []
    for name in draw(st.lists(_NAMES, min_size=1, max_size=2, unique=True)):
        fields = draw(st.lists(st.sampled_from(sorted(_FIELDS)), max_size=4, unique=True))
        required = [field for field in fields if draw(st.booleans())]
        schema = {"type": "object", "properties": {field: _FIELDS[field] for field in fields}, "required": required}
        tools.append({"type": "function", "function": {"name": name, "description": "Does it.", "parameters": schema}})
    return tools


@st.composite
def _render_cases(draw):
    messages, calls = [], 0
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(_TEXT)})
    foreign = draw(st.sampled_from([True, True, False]))  # whether ids come from another program
    for _ in range(draw(st.integers(1, 2))):
        content = draw(_TEXT | st.lists(_PARTS, min_size=1, max_size=2) | st.none())
        messages.append({"role": "user", "content": content} | draw(st.sampled_from([{}, {"name": "Ann"}])))
        for _ in range(draw(st.sampled_from([1, 0, 2]))):
            said = [(draw(_NAMES), draw(_ARGUMENTS)) for _ in range(draw(st.integers(1, 2)))]
            made = []
            for name, arguments in said:
                arguments = json.loads(arguments) if draw(st.booleans()) else arguments
                call_id = f"call_{calls:04x}" if foreign else f"functions.{name}:{calls}"
                made.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
                calls += 1
            messages.append({"role": "assistant", "content": draw(_TEXT), "tool_calls": made} | draw(_REASONING))
            results = made[::-1] if draw(st.booleans()) else made
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": draw(_TEXT)} for call in results]
        if draw(st.booleans()):
            messages.append({"role": "assistant", "content": draw(_TEXT)} | draw(_REASONING))
    return {"messages": messages, "tools": draw(st.none() | _tools()), "thinking": draw(st.booleans())}


def _with(change, **options):
    """A render of changed messages: change(message) → message."""
    return lambda messages, tools, thinking: template.render([change(m) for m in messages], tools, thinking, **options)


def _written(change):
    """A render whose result is changed: change(text) → text."""
    return lambda messages, tools, thinking: change(render(messages, tools, thinking))


def _calls(change):
    """A render of messages whose calls' arguments are changed: change(arguments) → arguments."""

    def each(message):
        calls = [call | {"function": call["function"] | {"arguments": change(call["function"]["arguments"])}}
                 for call in message.get("tool_calls", ())]  # fmt: skip
        return message | {"tool_calls": calls}

    return _with(each)


def _labelled(label):
    """A render with other ids: label(call, its number in its message) → id."""

    def write(messages, tools, thinking):
        made = [(call, n) for m in messages for n, call in enumerate(m.get("tool_calls", ()))]
        right = [f"functions.{call['function']['name']}:{n}" for n, (call, _) in enumerate(made)]
        wrong = {r: label(call, n) for r, (call, n) in zip(right, made)}
        return re.sub(r"functions\.[\w.-]+:\d+", lambda found: wrong[found[0]], render(messages, tools, thinking))

    return write


def _default_system(messages, tools, thinking):
    system = {"role": "system", "content": "You are Kimi, an AI assistant created by Moonshot AI."}
    return render(messages if messages[0]["role"] == "system" else [system, *messages], tools, thinking)


def _reasoning_since_last_user(messages, tools, thinking):
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    kept = [m if i > last else m | {"reasoning_content": ""} for i, m in enumerate(messages)]
    return template.render(kept, tools, thinking, preserve_thinking=True)


def _tools_after_system(messages, tools, thinking):
    if not tools or messages[0]["role"] != "system":
        return render(messages, tools, thinking)
    declaration, system, rest = render(messages, tools, thinking).split(TURN_END, 2)
    return TURN_END.join((system, declaration, rest))


def _results_in_order(messages, tools, thinking):
    waiting, changed = [], []
    for message in messages:
        waiting += [call["id"] for call in message.get("tool_calls", ())]
        changed.append(message | {"tool_call_id": waiting.pop(0)} if message["role"] == "tool" else message)
    return render(changed, tools, thinking)


def _stripped(message):
    content = message["content"]
    return message | {"content": content.strip() if isinstance(content, str) else content}


def _render_plainly(messages, tools, thinking):
    """The prompt, written without the template's code for turns."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")]
    text, names, count = "", {}, 0
    if tools:
        text = f"<|im_system|>tool_declare<|im_middle|>{template.declare_tools(tools)}<|im_end|>"
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"] or ""
        text += "<|im_system|>" if role in ("system", "tool") else f"<|im_{role}|>"
        text += message.get("name", role) + "<|im_middle|>"
        if role == "assistant":
            thought = message.get("reasoning_content", "") if i > max(answers, default=-1) else ""
            text += f"<think>{thought}</think>"
        elif role == "tool":
            text += f"## Return of {names[message['tool_call_id']]}\n"
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            image = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"
            text += {"image": image, "video": "<|kimi_k25_video_placeholder|>", "text": part.get("text")}[part["type"]]
        for number, call in enumerate(message.get("tool_calls", ())):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            names[call["id"]] = f"functions.{name}:{count}"
            count += 1
            raw = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            text += ("" if number else SECTION_BEGIN) + CALL_BEGIN + names[call["id"]] + ARGUMENT_BEGIN + raw + CALL_END
        text += (SECTION_END if message.get("tool_calls") else "") + "<|im_end|>"
    return text + "<|im_assistant|>assistant<|im_middle|><think>" + ("" if thinking else "</think>")


# An answer to a message


def parse(text, thinking):
    """An answer of the model taken apart: what it wrote after the prompt, with or without <|im_end|>.

        {reasoning}</think>{content}<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>{content}<|im_end|>
        call = <|tool_call_begin|>functions.{name}:{idx}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>

    In thinking mode all is reasoning up to the first </think>, or to the end if that never comes; in instant mode there is
    none. Markers of calls inside the reasoning are part of it. A copy of the tags that ended the prompt (<think>; in
    instant mode <think></think>) is dropped from the beginning. Contents before and after the section are joined; none of
    the texts is stripped. White space between calls means nothing. A name may hold dots and hyphens.

    text: str; thinking: bool — the mode of the prompt. Returns reasoning: str, content: str, calls: list of [id, name,
    arguments], all text, the arguments as they were written, and errors: int, how many things were malformed and left out:
    a call whose id is not functions.{name}:{idx} or whose idx came before in the answer, a call whose arguments are not a
    JSON object, an answer that ends inside its section. Never raises. Source: the released chat template.
    """
    message = template.parse(text, thinking)
    calls = [[call.id, call.name, call.raw] for call in message.tool_calls]
    return message.reasoning, message.content, calls, len(message.errors)


@st.composite
def _parse_cases(draw):
    kind, flaws = draw(st.sampled_from(["instant", "closed", "closed twice", "open"])), draw(_FLAWS)
    thinking = kind != "instant"
    text = ("<think>" if thinking else "<think></think>") if draw(st.sampled_from([False, True, False, False])) else ""
    if thinking:
        text += draw(st.sampled_from(["Well. ", "", "\n"])) + draw(st.sampled_from(["", _call("functions.f:0", "{}")]))
    if kind != "open":
        text += ("</think>" if thinking else "") + draw(_TEXT) + (" </think>" if kind == "closed twice" else "")
        text += _section(draw, flaws)
    return {"text": text + draw(st.sampled_from([TURN_END, ""] if "cut" not in flaws else [""])), "thinking": thinking}


def _call(call_id, arguments):
    return CALL_BEGIN + call_id + ARGUMENT_BEGIN + arguments + CALL_END


def _section(draw, flaws):
    """Tool calls, some of them with a flaw, and the text after them."""
    first, number = draw(st.integers(0, 2)), draw(st.sampled_from([2, 1] if flaws else [2, 1, 0]))
    calls = [_call(f"functions.{draw(_NAMES)}:{first + i}", draw(_ARGUMENTS)) for i in range(number)]
    if "again" in flaws:
        calls.append(_call(f"functions.g:{first}", "{}"))
    if "json" in flaws:
        calls.insert(draw(st.integers(0, number)), _call("functions.f:8", draw(st.sampled_from(['{"a": ', "[1]"]))))
    if "id" in flaws:
        calls.insert(draw(st.integers(0, number)), _call(draw(st.sampled_from(["call_8f3a", "f:9"])), "{}"))
    if "cut" in flaws:
        return SECTION_BEGIN + "".join(calls) + _call("functions.f:9", '{"a": 1}')[: -len(CALL_END) - draw(st.integers(0, 3))]
    between = draw(st.sampled_from(["", "\n"]))
    return SECTION_BEGIN + between.join(calls) + SECTION_END + draw(_TEXT) if calls else ""


def _pattern(call_id=r"(.*?)", arguments=r"(.*?)"):
    parts = re.escape(CALL_BEGIN), call_id, re.escape(ARGUMENT_BEGIN), arguments, re.escape(CALL_END)
    return re.compile("".join(parts), re.DOTALL)


def _parse_by_pattern(
    text, thinking, pattern=_pattern(), identity=r"functions\.(\S+):(\d+)", checked=True, once=True, end="first"
):
    """A parse by one regular expression for all calls of the section; the options after it leave out a check each."""
    text = text.removeprefix("<think>" if thinking else "<think></think>").partition(TURN_END)[0]
    split = text.partition if end == "first" else text.rpartition
    reasoning, _, text = (split("</think>") if "</think>" in text else (text, "", "")) if thinking else ("", "", text)
    before, begin, section = text.partition(SECTION_BEGIN)
    section, closed, after = section.partition(SECTION_END)
    calls, taken, errors = [], set(), int(bool(begin) and not closed)
    for call_id, raw in pattern.findall(section):
        found = re.fullmatch(identity, call_id)
        if not found or found[2] in taken and once or checked and not _is_object(raw):
            errors += 1
        else:
            calls.append([call_id, found[1], raw])
            taken.add(found[2])
    return reasoning, before + after, calls, errors


def _is_object(raw):
    try:
        return isinstance(json.loads(raw, parse_constant=int), dict)
    except ValueError:
        return False


def _by_pattern(*groups, **options):
    return functools.partial(_parse_by_pattern, pattern=_pattern(*groups), **options)


def _answer(change):
    """A parse whose result is changed: change(text, reasoning, content, calls, errors) → the four."""
    return lambda text, thinking: change(text, *parse(text, thinking))


def _each_call(change):
    """A parse whose calls are changed: change(number, id, name, arguments) → [id, name, arguments]."""
    return _answer(lambda text, reasoning, content, calls, errors:
                   (reasoning, content, [change(n, *call) for n, call in enumerate(calls)], errors))  # fmt: skip


def _unclosed_is_content(text, thinking):
    reasoning, content, calls, errors = parse(text, thinking)
    return ("", reasoning, [], 0) if thinking and "</think>" not in text else (reasoning, content, calls, errors)


def _thought_calls_taken(text, thinking):
    reasoning, content, calls, errors = parse(text, thinking)
    thought = [[call_id, call_id[10:-2], raw] for call_id, raw in _pattern().findall(reasoning)]
    return reasoning, content, thought + calls, errors


def _opening_kept(text, thinking):
    reasoning, content, calls, errors = parse(text, thinking)
    opening = "<think>" if thinking else "<think></think>"
    if not text.startswith(opening):
        return reasoning, content, calls, errors
    return (opening + reasoning, content, calls, errors) if thinking else (reasoning, opening + content, calls, errors)


def _calls_left_in_content(text, thinking):
    reasoning, _, calls, errors = parse(text, thinking)
    text = text.removesuffix(TURN_END)
    return reasoning, text.partition("</think>")[2] if thinking else text.removeprefix("<think></think>"), calls, errors


OPS = (
    Op(
        name="render",
        formula="<|im_side|>{name or role}<|im_middle|>{content}<|im_end|> per message",
        source="released chat template",
        reference=render,
        cases=_render_cases(),
        outputs=("text",),
        variants={"plainly": _render_plainly},
        suspects=(
            Suspect("foreign_ids", "ids of calls stay as they were given (UUIDs, say), and the model will imitate them",
                    _labelled(lambda call, n: call["id"]), "ml-explore/mlx-lm#821"),
            Suspect("ids_begin_anew", "idx begins again in every message; it counts the whole conversation",
                    _labelled(lambda call, n: f"functions.{call['function']['name']}:{n}"), "sgl-project/sglang#10607"),
            Suspect("results_in_order", "results take the ids of the calls in their order, not the ids they answer",
                    _results_in_order),
            Suspect("media_start", "<|media_start|> instead of <|media_begin|>: no token of that name exists",
                    _written(lambda text: text.replace("<|media_begin|>", "<|media_start|>"))),
            Suspect("default_system", "a system prompt of its own is put where the conversation has none", _default_system),
            Suspect("instant_left_open", "instant mode does not close <think>: the argument thinking is ignored",
                    lambda messages, tools, thinking: render(messages, tools, True), "cloudflare/workers-sdk#13239"),
            Suspect("reasoning_of_history", "the reasoning of earlier answers is kept",
                    _with(lambda message: message, preserve_thinking=True)),
            Suspect("reasoning_dropped", "all reasoning is dropped, even that of the tool calls still going on",
                    _with(lambda message: message | {"reasoning_content": ""})),
            Suspect("reasoning_since_last_user", "reasoning is kept since the last user's message instead of since the last "
                    "answer without tool calls", _reasoning_since_last_user),
            Suspect("no_empty_think", "<think></think> is missing where an answer has no reasoning",
                    lambda messages, tools, thinking: template.render(messages, tools, add_generation_prompt=False).replace(
                        "<think></think>", "") + render([], None, thinking)),
            Suspect("newlines_between", "turns are ended by a newline",
                    _written(lambda text: text.replace(TURN_END, TURN_END + "\n"))),
            Suspect("tools_as_json", "tools are declared as JSON; K2.5 was trained on TypeScript",
                    _with(lambda message: message, tools_format="json")),
            Suspect("tools_after_system", "tools are declared after the system message instead of before all",
                    _tools_after_system),
            Suspect("ascii_arguments", "letters of arguments are escaped to ASCII",
                    _calls(lambda a: a if isinstance(a, str) else json.dumps(a))),
            Suspect("compact_arguments", "arguments are written without spaces after commas and colons",
                    _calls(lambda a: a if isinstance(a, str) else json.dumps(a, ensure_ascii=False, separators=(",", ":")))),
            Suspect("arguments_quoted", "arguments that are JSON text already are encoded once more",
                    _calls(lambda a: json.dumps(a, ensure_ascii=False))),
            Suspect("section_per_call", "every call gets a section of its own",
                    _written(lambda text: text.replace(CALL_END + CALL_BEGIN,
                                                       CALL_END + SECTION_END + SECTION_BEGIN + CALL_BEGIN))),
            Suspect("content_lost_beside_calls", "the content of a message with tool calls is lost",
                    _with(lambda message: message | {"content": None} if "tool_calls" in message else message)),
            Suspect("name_ignored", "the role is written although the message has a name",
                    _with(lambda message: {key: value for key, value in message.items() if key != "name"})),
            Suspect("stripped", "white space around contents is lost", _with(_stripped)),
            Suspect("no_newline_after_image", "the newline after an image is missing",
                    _written(lambda text: text.replace("<|media_end|>\n", "<|media_end|>"))),
            Suspect("no_generation_prompt", "the beginning of the answer is missing at the end",
                    _with(lambda message: message, add_generation_prompt=False)),
            Suspect("no_return_heading", "the line `## Return of …` before a tool's result is missing",
                    _written(lambda text: re.sub("## Return of .*\n", "", text))),
            Suspect("tool_side", "a tool's message is marked <|im_tool|>; it is a system turn",
                    _written(lambda text: text.replace("<|im_system|>tool<|im_middle|>", "<|im_tool|>tool<|im_middle|>"))),
            Suspect("bos", "[BOS] is put before the prompt", _written(lambda text: "[BOS]" + text)),
        ),
    ),
    Op(
        name="parse",
        formula="{reasoning}</think>{content}<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|><|im_end|>",
        source="released chat template",
        reference=parse,
        cases=_parse_cases(),
        outputs=("reasoning", "content", "calls", "errors"),
        variants={"by_pattern": _parse_by_pattern},
        suspects=(
            Suspect("greedy", "a greedy pattern runs over the end of a call and merges it with the next",
                    _by_pattern("(.*)", "(.*)"), "vllm-project/vllm#24478"),
            Suspect("first_call_only", "only the first of several calls is found",
                    _answer(lambda text, reasoning, content, calls, errors: (reasoning, content, calls[:1], errors)),
                    "vllm-project/vllm#38579"),
            Suspect("instant_as_reasoning", "an instant answer is taken for reasoning: the mode is ignored",
                    lambda text, thinking: parse(text, True), "ikawrakow/ik_llama.cpp#1686"),
            Suspect("ends_at_first_brace", "arguments end at the first closing brace: nested ones are lost",
                    _by_pattern("(.*?)", r"(\s*\{.*?\}).*?")),
            Suspect("no_angle_brackets", "arguments with a < in them are not found", _by_pattern("(.*?)", "([^<]*)")),
            Suspect("no_hyphen", "calls whose name has a hyphen are not found", _by_pattern(r"([\w.:]+)"),
                    "vllm-project/vllm#22149"),
            Suspect("name_with_prefix", "the name keeps its prefix `functions.`",
                    _each_call(lambda n, call_id, name, raw: [call_id, "functions." + name, raw])),
            Suspect("name_after_last_dot", "the name is cut at its last dot",
                    _each_call(lambda n, call_id, name, raw: [call_id, name.rpartition(".")[2], raw])),
            Suspect("ids_numbered_anew", "ids are numbered anew from 0 instead of kept",
                    _each_call(lambda n, call_id, name, raw: [f"functions.{name}:{n}", name, raw]), "sgl-project/sglang#10607"),
            Suspect("arguments_written_anew", "arguments are decoded and written anew: what the model wrote is lost",
                    _each_call(lambda n, call_id, name, raw: [call_id, name, json.dumps(json.loads(raw))])),
            Suspect("end_marker_kept", "<|im_end|> stays in the content",
                    _answer(lambda text, reasoning, content, calls, errors:
                            (reasoning, content + TURN_END * text.endswith(TURN_END), calls, errors))),
            Suspect("stripped", "white space around reasoning and content is lost",
                    _answer(lambda text, reasoning, content, calls, errors:
                            (reasoning.strip(), content.strip(), calls, errors))),
            Suspect("calls_left_in_content", "the calls stay in the content as well", _calls_left_in_content),
            Suspect("text_after_calls_lost", "text after the calls is lost",
                    lambda text, thinking: parse(re.sub(f"(?<={re.escape(SECTION_END)}).*", "", text, flags=re.S), thinking)),
            Suspect("thought_calls_taken", "calls that the model only thought of are taken for calls", _thought_calls_taken),
            Suspect("last_think", "reasoning goes on to the last </think> instead of the first", _by_pattern(end="last")),
            Suspect("unclosed_is_content", "reasoning that was never closed is taken for content", _unclosed_is_content),
            Suspect("opening_kept", "a repeated <think> stays in the text", _opening_kept),
            Suspect("broken_arguments_taken", "a call is taken although its arguments are no JSON object",
                    _by_pattern(checked=False)),
            Suspect("foreign_ids_taken", "a call is taken although its id is not functions.{name}:{idx}",
                    _by_pattern(identity=r"(?:functions\.)?([^:]+):?(\d*)")),
            Suspect("repeated_index_taken", "a call is taken although its idx came before", _by_pattern(once=False)),
            Suspect("errors_not_counted", "malformed calls vanish without a word",
                    _answer(lambda text, reasoning, content, calls, errors: (reasoning, content, calls, 0))),
        ),
    ),
)  # fmt: skip
