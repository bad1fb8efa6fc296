"""Prompts and answers as the oracle tests them: written by hand, and every known mistake caught and named.

Run: python -m pytest tests/test_ops_text.py
"""

import pytest

from conftest import right_and_wrong
from ops_text import OPS, parse, render

SECTION, CALL, ARGUMENTS = "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>"
END_CALL, END_SECTION = "<|tool_call_end|>", "<|tool_calls_section_end|>"


test_right_implementations_pass_in_every_dtype, test_every_known_mistake_is_caught_and_named = right_and_wrong(OPS)


def test_a_prompt_is_written_as_by_hand():
    def call(call_id, arguments):
        return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}

    messages = [
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "See: "}, {"type": "image"}]},
        {"role": "assistant", "content": "old", "reasoning_content": "gone"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": None, "reasoning_content": "kept",
         "tool_calls": [call("8c1d", {"q": "é"}), call("77aa", '{"q":1}')]},
        {"role": "tool", "tool_call_id": "77aa", "content": "2"},
    ]  # fmt: skip
    assert render(messages, None, False) == (
        "<|im_user|>Ann<|im_middle|>See: <|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>old<|im_end|>"
        "<|im_user|>user<|im_middle|>more<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think>kept</think>"
        + SECTION + CALL + "functions.f:0" + ARGUMENTS + '{"q": "é"}' + END_CALL
        + CALL + "functions.f:1" + ARGUMENTS + '{"q":1}' + END_CALL + END_SECTION + "<|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.f:1\n2<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>"
    )  # fmt: skip


def test_the_declaration_of_the_docstring_is_what_is_written():
    fields = {
        "unit": {"type": "string", "enum": ["C", "F"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "days": {"type": "integer", "minimum": 1, "default": 3},
        "at": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
        "city": {"type": "string", "description": "What the field means"},
    }
    function = {"name": "get_weather", "description": "What the function does",
                "parameters": {"type": "object", "properties": fields, "required": ["city"]}}  # fmt: skip
    begin, end = "<|im_system|>tool_declare<|im_middle|>", "<|im_end|>"
    written = render([{"role": "user", "content": ""}], [{"type": "function", "function": function}], True)
    lines = [line.removeprefix("    ") for line in render.__doc__.split("\n")]
    at = lines.index("    # Tools")
    shown = [line.removeprefix("    ") for line in lines[at : lines.index("    }", at) + 1]]
    assert written.startswith(begin) and written[len(begin) :].partition(end)[0] == "\n".join(shown) + "\n"


@pytest.mark.parametrize(
    "text, thinking, expected",
    [
        ("First.</think>\nParis.<|im_end|>", True, ("First.", "\nParis.", [], 0)),
        ("<think>a</think>b </think> c", True, ("a", "b </think> c", [], 0)),
        ("never ended", True, ("never ended", "", [], 0)),
        ("Paris.<|im_end|>", False, ("", "Paris.", [], 0)),
        (f"a{SECTION}{CALL}functions.x.y-z:3{ARGUMENTS}{{}}{END_CALL}\n{CALL}functions.f:4{ARGUMENTS}{{\"a\": {{\"b\":1}}}}"
         f"{END_CALL}{END_SECTION}b", False,
         ("", "ab", [["functions.x.y-z:3", "x.y-z", "{}"], ["functions.f:4", "f", '{"a": {"b":1}}']], 0)),
        (f"{SECTION}{CALL}f:0{ARGUMENTS}{{}}{END_CALL}{CALL}functions.f:1{ARGUMENTS}[]{END_CALL}"
         f"{CALL}functions.f:2{ARGUMENTS}{{}}", False, ("", "", [], 3)),
    ],
)  # fmt: skip
def test_answers_are_taken_apart_as_by_hand(text, thinking, expected):
    assert parse(text, thinking) == expected
