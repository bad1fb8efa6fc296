"""Claims about rollout.py: token in, token out; the same bytes in any order; partial rollouts, sub-tasks, failures, cancelling.

Numbers after `bug` are those of the public bug list.
Run: .venv/bin/python -m pytest tests/test_rollout.py
"""

import asyncio
import dataclasses
import json
import random

import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import ITEMS, KEYS, model

import rollout as module
from engine import Completion, Engine
from media import MediaItem, merged_tokens
from rollout import (Conversation, Handle, Info, NullModel, Rollout, RolloutError, RolloutManager, Sampling, derive,
                     digest)  # fmt: skip
from template import parse, render_ids
from tokenizer import Tokenizer

TOKENIZER = Tokenizer()
TOOLS = [{"type": "function", "function": {"name": "look", "description": "looks", "parameters": {
    "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}}]  # fmt: skip
MODEL = model()
CLIP = [dataclasses.replace(ITEMS[2], timestamp=f"00:00:0{i}.000") for i in range(2)]


def completion(ids, finish="stop"):
    """A Completion of some ids with log-probs that name their places."""
    return Completion(tuple(ids), tuple(-0.5 - i for i in range(len(ids))), (0,) * len(ids), finish)


def ids_of(text):
    """Ids of a text whose markers are special tokens, as a model would write it."""
    return TOKENIZER.encode(text)


# Token in, token out

texts = st.text(st.sampled_from("ab é\n<|im_end|>"), max_size=6) | st.just("<|im_end|><|im_user|>") | st.just("</think>")
said = st.text("ab é\n", max_size=6)  # what a model says holds no marker: spelled out, it would be read as one


@st.composite
def histories(draw):
    """(messages, media, turns, thinking, tools): a conversation as OpenAI's dicts and as calls of a Conversation."""
    messages, media, turns, calls = [], [], [], 0
    thinking, tools = draw(st.booleans()), draw(st.sampled_from([None, TOOLS]))
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
        turns.append(("system", [messages[-1]["content"]]))
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(texts | st.sampled_from([*ITEMS[:2], CLIP]), min_size=1, max_size=3))
        content = []
        for part in parts:
            chunks = part if isinstance(part, list) else [part]
            kind = "text" if isinstance(part, str) else "video" if isinstance(part, list) else "image"
            content.append({"type": kind} | ({"text": part} if kind == "text" else {}))
            media += [] if kind == "text" else [(kind, [(chunk.timestamp, merged_tokens(chunk.grid)) for chunk in chunks])]
        messages.append({"role": "user", "content": content})
        turns.append(("user", parts))
        for last in [False] * draw(st.integers(0, 2)) + [True]:
            answer = {"role": "assistant", "content": draw(said), "reasoning_content": draw(said) if thinking else ""}
            made = range(calls, calls + (0 if last else draw(st.integers(1, 2))))
            calls = made.stop
            if made:
                answer["tool_calls"] = [{"id": f"functions.look:{i}", "type": "function", "function": {
                    "name": "look", "arguments": json.dumps({"x": i, "s": draw(said)})}} for i in made]  # fmt: skip
            messages.append(answer)
            turns.append(("answer", len(messages)))
            for i in made:
                messages.append({"role": "tool", "tool_call_id": f"functions.look:{i}", "content": draw(texts)})
                turns.append(("tool", i, messages[-1]["content"]))
    return messages, media, turns, thinking, tools


@settings(max_examples=60)
@given(histories())
def test_a_conversation_is_what_the_template_writes(history):
    """Where answers are written as the template writes them, ids are those of `render_ids`, calls and thoughts included;
    what users and tools write cannot end a turn. Bug 53: generated are the answers' ids and no others."""
    messages, media, turns, thinking, tools = history

    def rendered(count, prompt):
        shown = sum(part["type"] != "text" for m in messages[:count] if m["role"] == "user" for part in m["content"])
        return render_ids(messages[:count], TOKENIZER, media[:shown], tools=tools, thinking=thinking, preserve_thinking=True,
                          add_generation_prompt=prompt)  # fmt: skip

    talk, sampled, answers = Conversation(TOKENIZER, tools, thinking), [], []
    for turn, *said in turns:
        if turn == "answer":
            talk.prompt()
            before, after = rendered(said[0] - 1, True), rendered(said[0], False)
            assert list(talk.ids) == before == after[: len(before)]
            sampled += range(len(before), len(after))
            answers.append((talk.answer(completion(after[len(before) :])), messages[said[0] - 1]))
        elif turn == "tool":
            talk.tool(talk.calls[said[0]], said[1])
        else:
            getattr(talk, turn)(*said[0])
    result = talk.rollout()
    assert list(result.ids) == rendered(len(messages), False)
    assert [i for i, own in enumerate(result.generated) if own] == sampled
    pictures = [part for turn, *said in turns if turn == "user" for part in said[0] if not isinstance(part, str)]
    shown = [chunk for part in pictures for chunk in (part if isinstance(part, list) else [part])]
    assert len(result.items) == len(shown) and all(a is b for a, b in zip(result.items, shown))
    for message, written in answers:
        assert (message.content, message.reasoning, message.errors) == (written["content"], written["reasoning_content"], ())
        assert [(c.id, c.raw) for c in message.tool_calls] == [(c["id"], c["function"]["arguments"]) for c in written.get("tool_calls", ())]


def test_sampled_ids_are_kept_though_no_text_would_encode_to_them():
    """Half a character, an unused special token and no end: decoded and encoded again they would be other ids."""
    odd = [0xC3, 0x28, TOKENIZER.media_end, 0xFF, 0x41]
    assert TOKENIZER.encode(TOKENIZER.decode(odd)) != odd
    talk = Conversation(TOKENIZER, thinking=False)
    talk.user("q")
    talk.prompt()
    start = len(talk.ids)
    talk.answer(completion(odd, "length"))
    talk.user("more")
    assert list(talk.ids[start : start + 5]) == odd and talk.rollout().info.finish == "length"


@pytest.mark.parametrize("end", ["<|im_end|>", "", "[EOS]"])
def test_bug53_multi_turn_mask_by_hand(end):
    """Two answers around a tool result: only their sampled ids are generated; an end that the template adds is not."""
    talk = Conversation(TOKENIZER, thinking=False)
    talk.user("q")
    prompt = ids_of("<|im_user|>user<|im_middle|>q<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>")
    first, second = ids_of("a<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{}"
                           "<|tool_call_end|><|tool_calls_section_end|>" + end), ids_of("b<|im_end|>")  # fmt: skip
    talk.prompt()
    message = talk.answer(completion(first))
    talk.tool(message.tool_calls[0], "r<|im_end|>")
    talk.prompt()
    talk.answer(completion(second))
    added = [] if end == "<|im_end|>" else [TOKENIZER.im_end]
    observed = [*ids_of("<|im_system|>tool<|im_middle|>"), *TOKENIZER.encode("## Return of functions.look:0\nr<|im_end|>", specials=False),
                *ids_of("<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>")]  # fmt: skip
    result = talk.rollout()
    assert list(result.ids) == prompt + first + added + observed + second
    assert list(result.generated) == [False] * len(prompt) + [True] * len(first) + [False] * len(added + observed) + [True] * len(second)
    assert result.logprobs == (*(-0.5 - i for i in range(len(first))), *(-0.5 - i for i in range(len(second))))


def test_bug39_the_index_counts_all_calls_of_the_conversation():
    """A second answer that starts at 0 again gets the template's id for the result, and an error that says so."""
    talk = Conversation(TOKENIZER, TOOLS, thinking=False)
    talk.user("q")
    call = ("<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
            "<|tool_calls_section_end|><|im_end|>")  # fmt: skip
    for number in (0, 1):
        talk.prompt()
        message = talk.answer(completion(ids_of(call)))
        assert [(c.id, c.index) for c in message.tool_calls] == [(f"functions.look:{number}", number)]
        assert message.errors == (() if number == 0 else ("functions.look:0: the next index of this conversation is 1",))
        talk.tool(message.tool_calls[0], "r")
        assert f"Return of functions.look:{number}" in TOKENIZER.decode(talk.ids)
    assert [c.id for c in talk.rollout().info.calls] == ["functions.look:0", "functions.look:1"]


def test_a_broken_call_is_an_error_and_no_call():
    talk = Conversation(TOKENIZER, thinking=True)
    talk.prompt()
    message = talk.answer(completion(ids_of("t</think>c<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|im_end|>")))
    assert (message.reasoning, message.content, message.tool_calls) == ("t", "c", ()) and message.errors
    assert talk.calls == [] and parse("x", False).errors == ()


@pytest.mark.parametrize("changes, message", [
    ({"generated": (True,)}, "2 ids with 1 flags"), ({"logprobs": ()}, "1 generated tokens with 0 log-probs and 1 versions"),
    ({"versions": (0, 0)}, "with 1 log-probs and 2 versions"),
])  # fmt: skip
def test_bug59_a_rollout_has_one_logprob_and_version_per_generated_token(changes, message):
    good = dict(ids=(1, 2), generated=(False, True), logprobs=(-1.0,), versions=(0,))
    assert Rollout(**good).valid
    with pytest.raises(RolloutError, match=message):
        Rollout(**good | changes)


def test_a_digest_sees_the_last_bit_of_everything():
    base = Rollout((1, 2), (False, True), (-1.0,), (0,), (ITEMS[0],), 0.5, True, 3, Info("t", 4, "stop"))
    patches = ITEMS[0].patches.clone()
    patches[0, 0] += 1e-6
    others = [dataclasses.replace(base, **change) for change in (
        {"ids": (1, 3)}, {"generated": (True, False)}, {"logprobs": (-1.0 - 2**-52,)}, {"versions": (1,)}, {"reward": 0.25},
        {"items": (MediaItem(patches, ITEMS[0].grid),)}, {"items": ()}, {"valid": False}, {"group": 4},
        {"info": Info("t", 5)})]  # fmt: skip
    assert len({digest(rollout) for rollout in [base, *others]}) == len(others) + 1
    assert digest(dataclasses.replace(base, items=(MediaItem(ITEMS[0].patches.clone(), ITEMS[0].grid),))) == digest(base)


def test_derived_seeds_differ_by_seed_and_path():
    """By one fixed value, from b2sum, and by their number."""
    assert derive(7, "spawn", 0) == 0x31974F1282C1EB8B >> 1
    assert len({derive(seed, *path) for seed in range(50) for path in [(), (0,), (1,), ("a", 0), ("a", 1)]}) == 250
    assert all(0 <= derive(seed) < 2**63 for seed in range(100))


# The manager


async def play(task, handle, seed):
    """An environment with everything: pictures, tools, waits of random length, a sub-task, two conversations at once."""
    rng = random.Random(seed)

    async def wait():
        for _ in range(WAITS.randrange(4)):
            await asyncio.sleep(0)

    await wait()
    talk = handle.conversation(TOOLS if seed % 2 else None, name="main")
    talk.user(*([ITEMS[seed % 3]] if seed % 3 else []), f"{task} {rng.randrange(100)}")
    aside = handle.conversation(name="aside")
    aside.user("aside")
    _, message = await asyncio.gather(handle.answer(talk), handle.answer(aside, Sampling(3)))
    await wait()
    if task != "sub" and seed % 2:
        below = await asyncio.gather(*(handle.spawn("sub", name=i) for i in range(2)))
        talk.user(" ".join(str(sum(rollout.ids)) for rollout in below))
    else:
        talk.user(message.content)
    await handle.answer(talk)
    await wait()
    return handle.rollout(talk, reward=len(message.content))


WAITS = random.Random(0)


def manager(rollout=play, slots=6, **settings):
    """A manager over the tiny model."""
    return RolloutManager(Engine(MODEL, slots, 2 * KEYS, deterministic=False), rollout, TOKENIZER, Sampling(6, top_p=0.9), **settings)


def digests(groups):
    """Digest of each rollout by task and seed; the group, which counts submissions, left out."""
    return {(r.info.task, r.info.seed): digest(dataclasses.replace(r, group=0)) for group in groups for r in group}


TASKS = [("one", (11, 12, 13)), ("two", (21, 22)), ("three", (31, 32, 33))]


async def play_all(boss, tasks=TASKS):
    """All groups of some tasks."""
    for task, seeds in tasks:
        boss.submit(task, seeds, name=task)
    return await boss.collect(len(tasks))


EXPECTED = digests(asyncio.run(play_all(manager(slots=1))))


@settings(max_examples=4)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 6, 20]))
def test_rollouts_are_byte_identical_in_any_order(seed, slots):
    """Other orders of groups and of seeds, other waits, slots and moments at which everything is aborted or paused."""
    rng = random.Random(seed)
    WAITS.seed(seed)

    async def script():
        boss = manager(slots=slots)
        order = [(task, rng.sample(seeds, len(seeds))) for task, seeds in rng.sample(TASKS, len(TASKS))]
        played = asyncio.ensure_future(play_all(boss, order))
        while not played.done():
            for _ in range(rng.randrange(1, 25)):
                await asyncio.sleep(0)
            rng.choice([boss.engine.abort_all, boss.engine.pause])()
            await asyncio.sleep(0)
            boss.engine.resume()
        return await played, boss.engine.running, boss.engine.waiting

    groups, *held = asyncio.run(script())
    assert digests(groups) == EXPECTED and held == [0, 0] and len(EXPECTED) == 8 == len(set(EXPECTED.values()))


def test_what_a_rollout_recorded_is_what_the_model_says_of_its_ids():
    """One forward pass over the ids gives the recorded log-probs at the generated tokens, bug 54: not one off."""
    for group in asyncio.run(play_all(manager())):
        for r in group:
            patches = torch.cat([item.patches for item in r.items]) if r.items else None
            grid = torch.tensor([item.grid for item in r.items]) if r.items else None
            logprobs = MODEL(torch.tensor([r.ids]), patches, grid)[0].log_softmax(dim=1)
            expected = logprobs[:-1].gather(1, torch.tensor(r.ids)[1:, None])[:, 0][torch.tensor(r.generated)[1:]]
            assert_close(torch.tensor(r.logprobs), expected, 1e-4)
            assert 6 < len(r.logprobs) <= 12 and r.valid and r.info.finish in ("stop", "length")


def test_groups_come_in_order_and_say_which_they_are():
    groups = asyncio.run(play_all(manager()))
    assert [[(r.group, r.info.task, r.info.seed) for r in group] for group in groups] == [
        [(number, task, seed) for seed in seeds] for number, (task, seeds) in enumerate(TASKS)]  # fmt: skip


async def one_answer(task, handle, seed):
    """An answer as long as the task says."""
    talk = handle.conversation()
    talk.user("q")
    await handle.answer(talk, Sampling(task))
    return handle.rollout(talk)


def test_bug60_an_iteration_may_stop_and_the_rest_goes_on_under_newer_weights():
    """Short rollouts are collected, the weights change, and the long ones say which tokens which weights drew."""
    engine = Engine(MODEL, 4, 2 * KEYS, deterministic=False)

    async def script():
        boss = RolloutManager(engine, one_answer, TOKENIZER)
        for length in (40, 3, 40, 5):
            boss.submit(length, [7])
        first = await boss.collect(2)
        assert boss.live == 2
        engine.update(model(seed=1), 1)
        return first, await boss.collect(2)

    first, second = asyncio.run(script())
    assert [r.group for r, in first] == [1, 3] and [r.group for r, in second] == [0, 2]
    assert {v for r, in first for v in r.versions} == {0}
    for r, in second:
        changed = r.versions.index(1)
        assert 5 <= changed <= 12 and r.versions == (0,) * changed + (1,) * (40 - changed)


def test_the_oldest_groups_can_be_waited_for():
    async def script():
        boss = RolloutManager(Engine(NullModel(2, KEYS), 2, KEYS), one_answer, TOKENIZER)
        for length in (40, 3, 9, 5):
            boss.submit(length, [1, 2])
        return [r.group for r, _ in await boss.collect(2, oldest=True)], [r.group for r, _ in await boss.collect(1)]

    assert asyncio.run(script()) == ([0, 1], [2])


def test_a_trainer_that_is_no_coroutine_leaves_rollouts_standing_between_iterations():
    engine = Engine(NullModel(4, KEYS), 4, KEYS)
    with asyncio.Runner() as runner:
        boss = RolloutManager(engine, one_answer, TOKENIZER)

        async def iterate(lengths):
            for length in lengths:
                boss.submit(length, [length])
            return await boss.collect(1)

        first = runner.run(iterate([4, 60]))
        drawn = len(engine._rows[0].logprobs)
        engine.update({}, 1)
        second = runner.run(iterate([4]))
        assert [r.group for (r,) in first + second] == [0, 2] and boss.live == 1
        assert len(engine._rows[0].logprobs) > drawn > 0 and {v for (r,) in second for v in r.versions} == {1}
        runner.run(boss.cancel())


# Failures


def test_a_failing_environment_is_one_invalid_rollout_and_disturbs_no_other():
    async def sometimes(task, handle, seed):
        talk = handle.conversation()
        talk.user("q")
        await handle.answer(talk, Sampling(4))
        if task == "raise":
            raise ValueError("the verifier broke")
        if task == "none":
            return None
        if task == "cancel":
            raise asyncio.CancelledError("by itself")
        if task == "hotter":
            await handle.answer(talk, Sampling(4, temperature=1.5))
        if task == "request":
            talk.ids[0] = 9999
            await handle.answer(talk)
        return handle.rollout(talk, reward=1.0)

    async def script():
        boss = manager(sometimes)
        for number, task in enumerate(["fine", "raise", "none", "cancel", "request", "hotter", "fine"]):
            boss.submit(task, [number], name=task)
        return await boss.collect(7), boss.engine.running, boss.live

    groups, *held = asyncio.run(script())
    rollouts = [r for r, in groups]
    assert held == [0, 0] and [r.valid for r in rollouts] == [True, False, False, False, False, False, True]
    reasons = ["", "ValueError: the verifier broke", "RolloutError: the environment returned a NoneType", "CancelledError: by itself",
               "EngineError: id 9999 lies outside the vocabulary of 512",
               "RolloutError: a conversation sampled at temperature 1.0 goes on at 1.5: keep to one", ""]  # fmt: skip
    assert [r.info.reason for r in rollouts] == reasons
    assert all(len(r.logprobs) == 4 for r in rollouts) and [r.reward for r in rollouts] == [1.0, 0, 0, 0, 0, 0, 1.0]


def test_cancelling_leaves_no_task_no_slot_and_no_unfinished_group():
    """At any moment: before the first step, with requests in slots, in the queue, in sub-tasks; finished ones are kept."""

    async def nested(task, handle, seed):
        if task > 0:
            return (await asyncio.gather(handle.spawn(task - 1), handle.spawn(0)))[0]
        return await one_answer(30, handle, seed)

    async def script(steps):
        boss = manager(nested, slots=2)
        boss.submit(0, [1])
        await boss.collect(1)
        for number in range(4):
            boss.submit(number, [number, 9])
        waiting = asyncio.ensure_future(boss.collect(4))
        for _ in range(steps):
            await asyncio.sleep(0)
        await boss.cancel()
        with pytest.raises(RolloutError, match="cancelled"):
            await waiting
        for _ in range(3):
            await asyncio.sleep(0)
        return boss.live, boss.engine.running, boss.engine.waiting, len(boss._groups), len(asyncio.all_tasks()) - 1

    for steps in (0, 1, 2, 5, 20):
        assert asyncio.run(script(steps)) == (0, 0, 0, 0, 0)


def test_too_few_groups_are_an_error_and_not_a_wait_for_ever():
    with pytest.raises(RolloutError, match="3 groups are wanted and 2 were submitted"):
        asyncio.run(play_more())


async def play_more():
    """Collects more than it submits."""
    boss = manager(one_answer)
    boss.submit(1, [1])
    boss.submit(1, [1])
    await boss.collect(3)


# Sub-tasks and limits


def test_subtasks_need_no_slot_of_their_parents():
    """Three levels deep with one slot: who waits for a sub-task holds none."""

    async def deep(task, handle, seed):
        talk = handle.conversation()
        talk.user(f"level {task}")
        await handle.answer(talk, Sampling(2))
        if task:
            below, = await asyncio.gather(handle.spawn(task - 1))
            talk.user(str(below.reward))
        await handle.answer(talk, Sampling(2))
        return handle.rollout(talk, reward=task)

    async def script():
        boss = manager(deep, slots=1)
        boss.submit(3, [1, 2])
        (group,) = await boss.collect(1)
        return group

    assert [(r.reward, r.valid) for r in asyncio.run(script())] == [(3.0, True)] * 2


def test_a_subtask_ends_with_its_parent_and_its_failure_is_its_own():
    seen = []

    async def parent(task, handle, seed):
        if task == "child":
            try:
                return await one_answer(100, handle, seed)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise
        if task == "bad":
            raise ValueError("bad child")
        handle.spawn("child")
        broken = await handle.spawn("bad")
        return handle.rollout(handle.conversation(), reward=1.0, reason=broken.info.reason)

    async def script():
        boss = manager(parent)
        boss.submit("top", [5], name="top")
        ((result,),) = await boss.collect(1)
        return result, boss.engine.running, len(asyncio.all_tasks())

    result, running, tasks = asyncio.run(script())
    assert (result.valid, result.reward, result.info.reason) == (True, 1.0, "ValueError: bad child")
    assert seen == ["cancelled"] and running == 0 and tasks <= 2


def test_inference_is_capped_and_coroutines_are_not():
    """Two thousand at once, all with their prompts; never more than eight of them in slots."""

    fed = []

    class Counting(NullModel):
        def decode(self, tokens, places):
            fed.append(len(tokens))
            return super().decode(tokens, places)

    async def script():
        boss = RolloutManager(Engine(Counting(8, KEYS), 8, KEYS), one_answer, TOKENIZER)
        for number in range(2000):
            boss.submit(1 + number % 3, [number])
        await asyncio.sleep(0)
        return boss.live, boss.engine.waiting, len(await boss.collect(2000))

    assert asyncio.run(script()) == (2000, 2000, 2000)
    assert max(fed) == 8 and sum(fed) / len(fed) > 7.9


def test_earlier_groups_are_served_first():
    """The second turn of an early rollout goes before the first of a late one."""
    finished = []

    async def two(task, handle, seed):
        talk = handle.conversation()
        for _ in range(2):
            talk.user("q")
            await handle.answer(talk, Sampling(3))
        finished.append(seed)
        return handle.rollout(talk)

    async def script():
        boss = RolloutManager(Engine(NullModel(1, KEYS), 1, KEYS), two, TOKENIZER)
        for number in range(5):
            boss.submit("t", [number])
        await boss.collect(5)

    asyncio.run(script())
    assert finished == [0, 1, 2, 3, 4]


def test_a_full_context_ends_a_conversation_and_samples_nothing():
    async def long(task, handle, seed):
        talk = handle.conversation()
        talk.user("x" * task)
        message = await handle.answer(talk, Sampling(8))
        return handle.rollout(talk, reward=len(message.errors))

    async def script():
        boss = RolloutManager(Engine(NullModel(1, KEYS), 1, KEYS), long, TOKENIZER)
        for length in (KEYS, KEYS - 26, 1):
            boss.submit(length, [2])
        return await boss.collect(3)

    full, tight, short = (r for r, in asyncio.run(script()))
    assert (full.logprobs, full.info.finish, full.reward) == ((), "length", 1.0) and full.valid
    assert 0 < len(tight.logprobs) < 8 and len(tight.ids) == KEYS and len(short.logprobs) == 8


def test_caches_are_let_go_with_their_rollout():
    async def script():
        boss = manager(one_answer)
        for number in range(3):
            boss.submit(3, [number])
        await boss.collect(3)
        return len(boss.engine._parked)

    assert asyncio.run(script()) == 0


# Command line


def test_the_bench_holds_all_of_them_at_once(capsys):
    live, peak, before, _, tokens = module.bench(300, 64, 2)
    assert live == 300 and peak >= before and 300 < tokens <= 1200
    assert "300 coroutines at once" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["bench", "--count", "0"], ["bench", "--new-tokens", "500"]])
def test_misuse_is_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(arguments)
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_handle_is_small():
    """A hundred thousand of them are held: no dictionary of attributes."""
    assert not hasattr(Handle(None, "", 0, 0, 0), "__dict__") and not hasattr(Conversation(TOKENIZER), "__dict__")
