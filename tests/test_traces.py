"""Claims about traces.py: programs are right on fresh pictures, zero-vision has no pixel, loss stands on answers and nowhere else.

Run: .venv/bin/python -m pytest tests/test_traces.py
"""

import asyncio
import dataclasses
import json
import random
import re

import pytest
import torch

import tasks
import traces
from data import pack_rows
from environment import Click, Environment, Python, Toolset
from interpreter import InterpreterPool
from template import parse, render_ids
from tokenizer import Tokenizer
from traces import ARMS, STYLES, TraceError, collect, encode, reasoning, scripts

TOKENIZER = Tokenizer()
PROGRAMMED = [name for name in tasks.TASKS if tasks.TASKS[name].ability != "agentic"]


@pytest.fixture(scope="module")
def pool():
    with InterpreterPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def found(pool):
    """Traces of both arms, from the same seeds."""
    return {arm: collect(arm, 70, TOKENIZER, pool, seed=3, text=0.3) for arm in ARMS}


# Programs


@pytest.mark.parametrize("name", PROGRAMMED)
def test_every_program_runs_and_is_right_on_fresh_pictures(name, pool):
    for level in tasks.TASKS[name].levels:
        for seed in range(2):
            task = tasks.draw(random.Random(f"fresh {seed}"), name, modality="vision", split="heldout", difficulty=level)
            variants = scripts(task)
            assert len(variants) >= 2 and len({variant.calls for variant in variants}) == len(variants)
            for script in variants:
                for code in script.calls:
                    seen = pool.call(code, task.files)
                    assert seen.status == "ok" and not seen.refused, (code, seen.text)
                answer = script.answer(seen.text)
                assert tasks.score(task, answer).value >= task.passing, (code, seen.text, task.truth)


@pytest.mark.parametrize("name", PROGRAMMED)
def test_programs_are_written_from_the_question_alone(name):
    for level in tasks.TASKS[name].levels:
        task = tasks.draw(random.Random(level), name, modality="vision", split="heldout", difficulty=level)
        blank = dataclasses.replace(task, truth="", images=(), files=(), key="", words="", app=None)
        assert [script.calls for script in scripts(blank)] == [script.calls for script in scripts(task)]


def test_programs_answer_from_the_picture_and_not_from_the_truth(pool):
    for name in ("count", "box", "sum", "sketch"):
        one, other = (tasks.draw(random.Random(seed), name, modality="vision", difficulty=1) for seed in (1, 4))
        assert one.truth != other.truth and one.questions == other.questions
        script = scripts(one)[0]
        assert tasks.score(other, script.answer(pool.call(script.calls[-1], other.files).text)).value == 1.0


def test_what_is_not_right_is_dropped_and_counted(pool, monkeypatch):
    monkeypatch.setitem(traces._SCRIPTS, "count", lambda task: [traces.Script(("print(5)",))])
    collected = collect("zero-vision", 12, TOKENIZER, pool, names=["count"], text=0.0)
    assert not collected.traces and collected.dropped == {"count": 12}
    monkeypatch.setitem(traces._SCRIPTS, "count", lambda task: [traces.Script(("1/0",))])
    assert collect("zero-vision", 3, TOKENIZER, pool, names=["count"], text=0.0).dropped == {"count": 3}


# Arms


def test_nothing_is_dropped_and_the_arms_have_the_same_questions(found):
    assert not found["zero-vision"].dropped and not found["text+vision"].dropped
    assert len(found["zero-vision"].traces) == len(found["text+vision"].traces) == 70 and found["none"].traces == ()
    for ours, theirs in zip(found["zero-vision"].traces, found["text+vision"].traces):
        assert ours.task.key == theirs.task.key and ours.task.truth == theirs.task.truth


def test_zero_vision_has_no_image_token_and_no_pixel(found):
    for trace in found["zero-vision"].traces:
        assert TOKENIZER.media_pad not in trace.rollout.ids and trace.rollout.items == () and encode(trace).modality == "text"
    assert any(trace.task.modality == "vision" for trace in found["zero-vision"].traces)
    assert any("image.png" in TOKENIZER.decode(trace.rollout.ids) for trace in found["zero-vision"].traces)


def test_the_control_arm_shows_pictures_and_uses_tools_and_looks(found):
    seen = [trace for trace in found["text+vision"].traces if trace.task.modality == "vision"]
    assert seen and all(trace.rollout.items and TOKENIZER.media_pad in trace.rollout.ids for trace in seen)
    programmed = [trace for trace in seen if trace.rollout.info.calls and not trace.task.app]
    assert 0 < len(programmed) < len([trace for trace in seen if not trace.task.app])


def test_zero_vision_traces_of_pictures_always_run_a_program_whose_real_output_they_show(found, pool):
    shown = 0
    for trace in [trace for trace in found["zero-vision"].traces if trace.task.modality == "vision"][:12]:
        text = TOKENIZER.decode(trace.rollout.ids)
        for call in trace.rollout.info.calls:
            output = pool.call(call.arguments["code"], trace.task.files).text.strip()
            assert f"## Return of {call.id}\n{output}<|im_end|>" in text
            shown += 1
    assert shown >= 12


def test_heldout_contents_are_not_in_training_traces(found):
    assert all(trace.task.split == "train" for arm in ARMS for trace in found[arm].traces)


def test_the_same_seed_writes_the_same_traces(found, pool):
    again = collect("zero-vision", 12, TOKENIZER, pool, seed=3, text=0.3)
    assert [t.rollout.ids for t in again.traces] == [t.rollout.ids for t in found["zero-vision"].traces[:12]]


# Tokens and loss


UNSEEN_MARKS = "<|media_begin|>image<|media_content|><|media_end|>\n"


def history(trace):
    """The conversation in OpenAI's form, from the decoded text, for the template to write again."""
    text, messages = TOKENIZER.decode(trace.rollout.ids), []
    for role, name, body in re.findall(r"<\|im_(user|assistant|system)\|>(\w+)<\|im_middle\|>(.*?)<\|im_end\|>", text, re.DOTALL):
        if name == "tool_declare":
            continue
        if role == "assistant":
            messages.append(parse(body.removeprefix("<think>"), True).as_dict())
        elif name == "tool":
            head, _, content = body.partition("\n")
            messages.append({"role": "tool", "tool_call_id": head.removeprefix("## Return of "), "content": content})
        else:
            marked, unseen, body = body.rpartition(UNSEEN_MARKS)
            messages.append({"role": role, "content": [{"type": "image"}] * bool(unseen) + [{"type": "text", "text": body}]})
            assert not marked
    return messages


def test_a_trace_is_what_the_template_writes(found, pool):
    environment = Environment(Toolset(Python(pool), Click()), see=False)
    for trace in found["zero-vision"].traces:
        declared = environment.begin(trace.task).declarations
        talk = history(trace)
        unseen = [("image", [(None, 0)]) for message in talk if isinstance(message["content"], list) for part in message["content"] if part["type"] == "image"]
        wanted = render_ids(talk, TOKENIZER, unseen, tools=declared, add_generation_prompt=False, preserve_thinking=True)
        assert list(trace.rollout.ids) == wanted


def test_loss_covers_exactly_the_answers(found):
    """Between the opening of an assistant's turn and its end, `<|im_end|>` included."""
    for arm in ("zero-vision", "text+vision"):
        for trace in found[arm].traces:
            document, inside, wanted = encode(trace), False, []
            t = TOKENIZER
            for place, token in enumerate(document.ids):
                opened = document.ids[place - 1] == t.think and trace.task.thinking and t.im_assistant in document.ids[max(place - 12, 0) : place]
                closed = document.ids[place - 1] == t.end_think and document.ids[place - 2] == t.think and not trace.task.thinking
                inside = inside or opened or closed
                wanted.append(inside)
                inside = inside and token != t.im_end
            assert list(document.loss) == wanted and any(wanted)


def test_bug53_a_tools_result_and_the_question_carry_no_loss(found):
    for trace in found["zero-vision"].traces:
        document = encode(trace)
        learnt = TOKENIZER.decode([token for token, flag in zip(document.ids, document.loss) if flag])
        assert "Return of" not in learnt and "<|im_user|>" not in learnt and "tool_declare" not in learnt and "image.png?" not in learnt
        assert learnt.endswith("<|im_end|>")


def test_traces_pack_into_rows_with_their_loss(found):
    for arm in ("zero-vision", "text+vision"):
        documents = [encode(trace) for trace in found[arm].traces[:20]]
        batch = pack_rows(documents, 20, 1024, TOKENIZER)
        assert int(batch.loss_mask.sum()) == sum(sum(document.loss) for document in documents)
        assert (batch.patches is None) == (arm == "zero-vision")
        targets = torch.where(batch.loss_mask, batch.targets, -1)
        assert TOKENIZER.im_end in targets and TOKENIZER.media_pad not in targets


def test_traces_are_short(found):
    """Of the tools' declaration 95 bytes, of every trace with tools about 200 tokens are the template's."""
    tokens = sorted(len(trace.rollout.ids) for trace in found["zero-vision"].traces)
    assert tokens[-1] <= 700 and tokens[len(tokens) // 2] <= 480
    assert max(len(json.dumps(code)) for name in PROGRAMMED for level in tasks.TASKS[name].levels
               for script in scripts(tasks.draw(random.Random(1), name, modality="vision", split="heldout", difficulty=level))
               for code in script.calls) < 400  # fmt: skip


# Reasoning


def test_every_style_reaches_the_answer_and_terse_is_shortest():
    for level in tasks.TASKS["chain"].levels:
        for seed in range(10):
            task = tasks.draw(random.Random(seed), "chain", modality="text", split="heldout", difficulty=level)
            written = {style: reasoning(task, style) for style in STYLES}
            assert all(text.endswith(task.truth) for text in written.values())
            numbers = len(task.words.split())
            assert [len(written[style]) for style in ("terse", "full", "long")] == [2 * numbers, 5 * numbers - 1, 9 * numbers - 1]
            total = 0
            for step, pair in zip(written["long"].split(), task.words.split()):
                head, before, digit, after = re.fullmatch(r"(\w\d):(\d)\+(\d)=(\d)", step).groups()
                total = (total + int(digit)) % 10
                assert head == pair and digit == pair[1] and int(after) == total == (int(before) + int(digit)) % 10


def test_chains_are_thought_before_they_are_answered(pool):
    for trace in collect("zero-vision", 6, TOKENIZER, pool, names=["chain"], text=1.0).traces:
        learnt = TOKENIZER.decode([token for token, flag in zip(trace.rollout.ids, trace.rollout.generated) if flag])
        thought, _, answer = learnt.partition("</think>")
        assert thought in [reasoning(trace.task, style) for style in STYLES] and answer == f"{trace.task.truth}<|im_end|>"


# Misuse


def test_what_cannot_be_made_is_refused_in_one_line(pool):
    for wrong in ({"arm": "vision"}, {"names": ["cuont"]}, {"text": 2.0}, {"number": -1}):
        with pytest.raises(TraceError) as error:
            collect(**{"arm": "zero-vision", "number": 1, "tokenizer": TOKENIZER, "pool": pool} | wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(TraceError, match="only chains"):
        reasoning(tasks.draw(random.Random(0), "count", modality="text"), "terse")
    menu = tasks.draw(random.Random(0), "menu", modality="vision")
    with pytest.raises(TraceError, match="text twin"):
        asyncio.run(traces.make("zero-vision", menu, Environment(Toolset(Python(pool), Click())), TOKENIZER, random.Random(0)))


def test_the_command_line_shows_a_trace_and_its_lengths(capsys):
    traces.main(["show", "--task", "count", "--seed", "1"])
    said = capsys.readouterr().out
    assert "⟦<|tool_calls_section_begin|>" in said and "tokens" in said and "image.png" in said
    traces.main(["lengths", "--task", "measure", "--number", "2"])
    assert re.search(r"measure +2 +0", capsys.readouterr().out)
    with pytest.raises(SystemExit) as ended:
        traces.main(["show", "--task", "cuont"])
    assert ended.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
