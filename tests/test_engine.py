"""Claims about engine.py and slots.py: the same bits in any company, continuous batching, partial answers, weights, pictures, refusals.

Numbers after `bug` are those of the public bug list.
Run: .venv/bin/python -m pytest tests/test_engine.py
"""

import asyncio
import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import naive
from test_k25 import MEDIA, built, tiny

import engine as command
import slots as module
from engine import Completion, Engine, EngineError, Request
from generate import _choose, generate
from media import MediaItem
from mla import mla_attention_reference
from moe import experts_reference
from slots import KEYS, LOAD, SlotCache, SlotModel, attend_in_blocks, draw, experts_in_passes, uniform

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def model(dtype=torch.float32, seed=0, **changes):
    """A tiny model of widths that are multiples of 8, so that rows of a product are alike to the CPU's kernels."""
    vision = dataclasses.replace(tiny().vision, text_hidden_size=32)
    sizes = dict(hidden_size=32, intermediate_size=24, moe_intermediate_size=16, num_attention_heads=4, q_lora_rank=16,
                 kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=8, n_routed_experts=8, n_group=4,
                 vision=vision)  # fmt: skip
    return built(seed, dtype, **sizes | changes)


MODEL = model()
ENGINE = Engine(MODEL, slots=8, capacity=2 * KEYS, deterministic=False)


def item(seed, grid):
    """A picture or clip of random patches."""
    patches = torch.randn(int(np.prod(grid)), 588, generator=torch.Generator().manual_seed(seed))
    return MediaItem(patches, grid, None)


ITEMS = item(1, (1, 2, 4)), item(2, (1, 4, 4)), item(3, (2, 2, 2))  # 2, 4 and 1 places


def requests(count, seed=0, longest=20, **fixed):
    """Requests of all kinds: lengths, temperatures, top-p, stops, pictures."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        ids, items = [rng.randrange(256) for _ in range(rng.randint(1, longest))], ()
        if rng.random() < 0.3:
            items = (rng.choice(ITEMS),)
            ids[:0] = [MEDIA] * {2: 2, 4: 4}.get(items[0].grid[2] * items[0].grid[1] // 4, 1)
        kind = dict(max_new_tokens=rng.randint(1, 12), temperature=rng.choice([0.0, 0.7, 1.0]), top_p=rng.choice([1.0, 0.9]),
                    stop_ids=tuple(range(40)), seed=seed * 1000 + i)  # fmt: skip
        made.append(Request(tuple(ids), items, **kind | fixed))
    return made


def quick(*arguments, **settings):
    """An Engine that skips the search for widths of equal bits."""
    return Engine(*arguments, **settings, deterministic=False)


def answers(engine, asked):
    """Completions of requests that all come at once, in order."""
    return engine.run(*map(engine.generate, asked))


def alone(engine, asked):
    """Completions of requests, one after the other."""
    return [answers(engine, [request])[0] for request in asked]


# The arithmetic


@settings(max_examples=8)
@given(st.integers(0, 2**31), st.integers(1, 3 * KEYS))
def test_attention_in_blocks_is_the_reference(seed, length):
    """And blocks behind the last key change no bit; the same for rows that share their keys."""
    rng = torch.Generator().manual_seed(seed)
    heads, nope, rope, rank, value = 3, 5, 4, 7, 6
    q_nope, q_rope = (torch.randn(8, heads, n, generator=rng, dtype=torch.float64) for n in (nope, rope))
    cache = torch.randn(1, 4 * KEYS, rank + rope, generator=rng, dtype=torch.float64)
    kv_b = torch.randn(heads * (nope + value), rank, generator=rng, dtype=torch.float64)
    places = torch.randint(length, (8,), generator=rng)
    mask = (torch.arange(4 * KEYS) <= places[:, None])[:, None, None]
    latent, rope_key = (a.expand(8, -1, -1) for a in cache.split((rank, rope), dim=-1))
    expected = mla_attention_reference(q_nope[:, None], q_rope[:, None], latent, rope_key, kv_b, mask, 0.3)[:, 0]
    results = []
    for readers in (8, 1):
        for blocks in (int(places.max()) // KEYS + 1, 4):
            seen = [block.expand(readers, -1, -1) for block in cache.split(KEYS, dim=1)[:blocks]]
            visible = torch.arange(blocks * KEYS).view(blocks, 1, 1, KEYS) <= places[:, None, None]
            results.append(attend_in_blocks(q_nope, q_rope, [(0, 8, seen, visible)], kv_b, 0.3))
        assert torch.equal(results[-1], results[-2])
        assert_close(results[-1], expected, 1e-12)
    cut = [(first, last, [block[:1] for block in seen], F.pad(visible[:, first:last], (0, 0, 0, 0, 0, 8 - last + first)))
           for first, last in ((0, 3), (3, 7))]  # fmt: skip
    parts = attend_in_blocks(q_nope, q_rope, cut, kv_b, 0.3)
    assert_close(parts[:7], expected[:7], 1e-12)
    assert (parts[7] == 0).all()


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 3 * LOAD), st.sampled_from([1.0, 0.0]))
def test_experts_in_passes_are_the_reference(seed, tokens, spread):
    """Whether tokens spread or all want the same experts, so that several products are needed; padding gives 0."""
    rng = torch.Generator().manual_seed(seed)
    x, gate, up, down = (torch.randn(*shape, generator=rng, dtype=torch.float64)
                         for shape in ((tokens, 8), (5, 4, 8), (5, 4, 8), (5, 8, 4)))  # fmt: skip
    index = (torch.rand(tokens, 5, generator=rng) * spread).argsort(dim=1, stable=True)[:, :2]
    weights = torch.rand(tokens, 2, generator=rng, dtype=torch.float64)
    rows = tokens - seed % 2 * (tokens > 1)
    result = experts_in_passes(x, weights, index, gate, up, down, rows)
    assert_close(result[:rows], experts_reference(x, weights, index, gate, up, down)[:rows], 1e-12)
    assert (result[rows:] == 0).all()


def test_a_slot_cache_parks_restores_and_moves():
    cache = SlotCache(2, 3, 2 * KEYS, 5)
    places, tokens = torch.arange(KEYS + 9), torch.randn(KEYS + 9, 5)
    for layer in (0, 1):
        cache.write(layer, 1, places, tokens + layer)
    parked = cache.park(1, KEYS + 9)
    cache.buffer[:, :, 1] = 7.0
    cache.restore(1, parked, KEYS + 4)
    cache.move(1, 0)
    for slot in (0, 1):
        read = torch.cat([block[0] for block in cache.read(1, slot, 1, 2)])
        assert torch.equal(read[: KEYS + 4], tokens[: KEYS + 4] + 1) and (read[KEYS + 4 :] == 0).all()
    assert torch.equal(cache.read(0, None, 2, 1)[0][0], cache.read(0, 0, 1, 1)[0][0])


# Drawing


def ones(n, value=1.0):
    """(n,) float64."""
    return torch.full((n,), value, dtype=torch.float64)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8)])
def test_draws_follow_the_distribution(temperature, top_p):
    """20,000 draws with real uniforms; a frequency may be five standard errors off; one id is never drawn."""
    logits, n = torch.tensor([2.0, 0.5, 1.0, -1.0, 1.5, 3.0]), 20_000
    wanted = (logits.double() / temperature).softmax(dim=0)
    wanted[5] = 0.0
    if top_p < 1:
        wanted[[1, 3]] = 0.0  # of the rest, 0.44 + 0.27 + 0.16 pass 0.8
    wanted /= wanted.sum()
    uniforms = torch.tensor([uniform(seed, seed % 7) for seed in range(n)], dtype=torch.float64)
    chosen, logprobs = draw(logits.expand(n, 6), ones(n, temperature), ones(n, top_p), uniforms, never=(5,))
    share = torch.bincount(chosen, minlength=6).double() / n
    assert ((share - wanted).abs() <= 5 * (wanted * (1 - wanted) / n).sqrt()).all(), (share, wanted)
    assert_close(logprobs, (logits / temperature).log_softmax(dim=0)[chosen], 1e-6)


@pytest.mark.parametrize("top_p, kept", [(1.0, 4), (0.95, 4), (0.9, 3), (0.874, 2), (0.76, 2), (0.74, 1), (1e-9, 1)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    """Probabilities 3/4, 1/8, 1/16, 1/16; the last two tie, and the lower id comes first."""
    logits = torch.tensor([1 / 16, 3 / 4, 1 / 16, 1 / 8]).log()
    uniforms = torch.tensor([*np.linspace(0, 1 - 2**-53, 400)], dtype=torch.float64)
    chosen, _ = draw(logits.expand(400, 4), ones(400), ones(400, top_p), uniforms)
    assert set(chosen.tolist()) == set([1, 3, 0, 2][:kept])


@given(st.integers(0, 2**31), st.sampled_from([0.0, 1 - 2**-53]))
def test_an_impossible_token_is_never_drawn(seed, uniform_):
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))
    logits[0, seed % 5] = -torch.inf
    chosen, logprob = draw(logits, ones(1), ones(1), ones(1, uniform_), never=((seed + 1) % 5,))
    assert int(chosen) not in (seed % 5, (seed + 1) % 5) and logprob.isfinite().all()


def test_greedy_takes_the_largest_logit_that_may_be_drawn():
    logits = torch.tensor([[1.0, 9.0, 5.0], [1.0, 0.0, 5.0]])
    before = logits.clone()
    chosen, logprobs = draw(logits, ones(2, 0.0), ones(2, 0.5), ones(2, 0.5), never=(1,))
    assert chosen.tolist() == [2, 2] and torch.equal(logits, before)
    assert_close(logprobs, logits.log_softmax(dim=1)[:, 2], 1e-6)


def test_a_row_is_drawn_as_if_alone():
    """Neighbours that are cut by top-p, or greedy, do not change how a row is drawn."""
    logits, rng = torch.randn(6, 50), np.random.default_rng(0)
    temperature, top_p = torch.tensor([1, 0, 0.5, 1, 2, 0]).double(), torch.tensor([1, 1, 0.9, 0.5, 1, 0.3]).double()
    uniforms = torch.from_numpy(rng.random(6))
    chosen, logprobs = draw(logits, temperature, top_p, uniforms)
    for i in range(6):
        one = slice(i, i + 1)
        assert [a.item() for a in draw(logits[one], temperature[one], top_p[one], uniforms[one])] == [chosen[i], logprobs[i]]


def test_uniforms_are_a_function_of_seed_and_place():
    """A fixed value, so that no version of the hash goes unnoticed; all different; mean and spread of a uniform."""
    assert uniform(7, 3) == uniform(7, 3) == 0.7133945216688186  # by b2sum -l 64
    drawn = np.array([uniform(seed, place) for seed in range(100) for place in range(100)])
    assert len(set(drawn)) == 10_000 and drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.015 and abs(drawn.std() - 12**-0.5) < 0.01


# The same bits in any company


@DTYPES
def test_answers_are_bitwise_those_given_alone(dtype):
    """Twenty requests at once, in another order, one by one, with other slots and another capacity: ids and log-probs."""
    engine, asked = Engine(model(dtype), slots=8, capacity=2 * KEYS), requests(20)
    expected = answers(engine, asked)
    assert len({c.ids for c in expected}) > 15 and {c.finish for c in expected} == {"stop", "length"}
    order = random.Random(1).sample(range(20), 20)
    assert [c for _, c in sorted(zip(order, answers(engine, [asked[i] for i in order])))] == expected
    assert alone(engine, asked[:8]) == expected[:8]
    for slots, capacity in ((1, KEYS), (20, 4 * KEYS)):
        assert answers(Engine(model(dtype), slots, capacity), asked[:12]) == expected[:12]


@settings(max_examples=4)
@given(st.integers(0, 2**31))
def test_bug60_answers_do_not_depend_on_arrival_or_cancellation(seed):
    """Requests come after random waits, while others beside them are cancelled at random moments."""
    asked, rng = requests(14, seed=5), random.Random(seed)

    async def later(request, wait):
        for _ in range(wait):
            await asyncio.sleep(0)
        return await ENGINE.generate(request)

    async def all_of_them():
        tasks = [asyncio.ensure_future(later(request, rng.randrange(30))) for request in rng.sample(asked, len(asked))]
        others = [asyncio.ensure_future(later(request, rng.randrange(10))) for request in requests(10, seed % 97 + 9)]
        for other in others:
            for _ in range(rng.randrange(8)):
                await asyncio.sleep(0)
            other.cancel()
        done = await asyncio.gather(*tasks)
        await asyncio.gather(*others, return_exceptions=True)
        return done, asyncio.all_tasks() - {asyncio.current_task()}

    (done, left), = ENGINE.run(all_of_them())
    assert sorted(done, key=str) == sorted(EXPECTED_14, key=str)
    assert (ENGINE.running, ENGINE.waiting) == (0, 0) and not [task for task in left if not task.done()]


EXPECTED_14 = alone(quick(MODEL, slots=1, capacity=KEYS), requests(14, seed=5))


def test_long_prompts_cross_passes_and_blocks():
    """A prompt that fills several passes and blocks answers as the naive loop, and as the same prompt among others."""
    engine = quick(model(torch.float64), slots=3, capacity=5 * KEYS)
    rng = random.Random(0)
    asked = [Request(tuple(rng.randrange(256) for _ in range(n)), max_new_tokens=3, temperature=0.0) for n in (KEYS * 4, 130, 1, 300)]
    together = answers(engine, asked)
    assert together == alone(engine, asked)
    for request, answer in zip(asked, together):
        ids, logprobs = naive(engine.model.model, request.ids, 3)
        assert answer.ids == ids
        assert_close(torch.tensor(answer.logprobs), torch.tensor(logprobs), 1e-5)


def test_passes_have_multiples_of_64_numbers_everywhere():
    """Six experts: 8 or 16 rows of their scores would end in an odd lot, whose sigmoids other instructions take."""
    six = dict(n_routed_experts=6, n_group=3)
    for changes, widths in (({}, [8, 16, 32, 64]), (six, [32, 64]), ({"intermediate_size": 33}, [64])):
        engine = Engine(model(**changes), 64, KEYS)
        assert engine.model._decode_widths == widths
    asked = requests(20)
    assert answers(Engine(model(**six), 8, KEYS), asked) == alone(Engine(model(**six), 1, KEYS), asked)


def test_passes_run_on_one_thread_and_leave_the_number_as_it_was(monkeypatch):
    seen, attend = [], module.attend_in_blocks
    monkeypatch.setattr(module, "attend_in_blocks", lambda *a: seen.append(torch.get_num_threads()) or attend(*a))
    torch.set_num_threads(2)
    try:
        answers(ENGINE, requests(2))
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_what_a_free_slot_holds_reaches_nobody():
    """Not even NaN, which a weight of 0 would not silence."""
    engine = quick(MODEL, 8, KEYS)
    engine.model.cache.buffer.fill_(torch.nan)
    assert answers(engine, requests(14, seed=5)) == EXPECTED_14


def test_a_width_whose_bits_differ_is_not_used(monkeypatch):
    """And where a row's bits depend on its place, the engine refuses to start, unless asked not to care."""
    attend = module.attend_in_blocks

    def wrong_at_16(q_nope, q_rope, groups, *rest):
        return attend(q_nope, q_rope, groups, *rest) * (1 + 1e-5 * (groups[0][3].shape[1] == 16))

    monkeypatch.setattr(module, "attend_in_blocks", wrong_at_16)
    monkeypatch.setattr(module, "_AGREEING", {})
    slots = SlotModel(MODEL, 30, KEYS)
    assert slots._decode_widths == [8, 32] and slots._prompt_widths == [8, 32, 64, 128, 192, 256]
    assert answers(Engine(MODEL, 30, KEYS), requests(14, seed=5)) == EXPECTED_14

    def by_place(q_nope, *rest):
        return attend(q_nope, *rest) * (1 + 1e-5 * torch.arange(len(q_nope))[:, None])

    monkeypatch.setattr(module, "attend_in_blocks", by_place)
    monkeypatch.setattr(module, "_AGREEING", {})
    with pytest.raises(EngineError, match="depends, on this machine, on the row"):
        SlotModel(MODEL, 8, KEYS)
    assert SlotModel(MODEL, 8, KEYS, deterministic=False)._decode_widths == [8]


def test_queries_of_one_prompt_go_apart_where_together_they_round_differently(monkeypatch):
    attend = module.attend_in_blocks

    def other_when_shared(q_nope, q_rope, groups, *rest):
        return attend(q_nope, q_rope, groups, *rest) * (1 + 1e-5 * (len(groups[0][2][0]) == 1))

    monkeypatch.setattr(module, "attend_in_blocks", other_when_shared)
    monkeypatch.setattr(module, "_AGREEING", {})
    engine = Engine(MODEL, 8, KEYS)
    assert engine.model._together is False
    assert answers(engine, requests(14, seed=5)) == EXPECTED_14


# What is computed


@settings(max_examples=6)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_bug9_greedy_answers_are_those_of_generate(seed, lengths):
    """Another arithmetic, the same function: ids equal, log-probs to rounding."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 256, size=n).tolist() for n in lengths]
    expected = generate(MODEL, prompts, max_new_tokens=5)
    got = answers(ENGINE, [Request(tuple(p), max_new_tokens=5, temperature=0.0) for p in prompts])
    for a, b in zip(got, expected):
        assert (a.ids, a.finish) == (b.ids, b.finish)
        assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), 1e-4)


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("temperature, top_p", [(0.5, 1.0), (1.7, 0.7)])
def test_bug54_bug55_logprobs_are_those_of_scaled_logits(impl, temperature, top_p):
    """log softmax(logits / T) of a full forward pass at each drawn token, before top-p, not one position off."""
    whole = model(torch.float64, impl=impl)
    asked = requests(4, temperature=temperature, top_p=top_p, max_new_tokens=5, stop_ids=())
    for request, answer in zip(asked, answers(quick(whole, 4, KEYS), asked)):
        ids = torch.tensor([[*request.ids, *answer.ids]])
        patches = torch.cat([i.patches for i in request.items]).double() if request.items else None
        grid = torch.tensor([i.grid for i in request.items]) if request.items else None
        logits = whole(ids, patches, grid)[0, len(request.ids) - 1 : -1]
        expected = (logits / temperature).log_softmax(dim=1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert_close(torch.tensor(answer.logprobs, dtype=torch.float64), expected, 1e-9)
        wrong = torch.cat((expected[1:], expected[:1]))
        assert (wrong - expected).abs().max() > 1e-3


def test_qat_models_answer_with_the_quantised_experts():
    whole = model(qat=True, hidden_size=32, moe_intermediate_size=32)
    asked = [Request((1, 2, 3), max_new_tokens=6, temperature=0.0)]
    expected = generate(whole, [[1, 2, 3]], max_new_tokens=6)[0]
    assert answers(quick(whole, 2, KEYS), asked)[0].ids == expected.ids
    unquantised = generate(model(hidden_size=32, moe_intermediate_size=32), [[1, 2, 3]], max_new_tokens=6)[0]
    assert unquantised.logprobs != expected.logprobs


# Seeds


def test_seeds_decide_the_samples():
    """One seed the same, whatever torch's own generator does; other seeds others, though the prompt is one."""
    asked = [Request((1, 2, 3), max_new_tokens=8, seed=seed) for seed in range(6)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = answers(ENGINE, asked)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert answers(ENGINE, asked) == first and len({c.ids for c in first}) == 6


def test_draws_are_keyed_by_seed_and_place_in_the_answer(monkeypatch):
    """Counted from the answer's start, whatever the prompt's length, and on from where a prefix ends."""
    seen = []
    monkeypatch.setattr(command, "uniform", lambda *key: seen.append(key) or uniform(*key))
    prefix = Completion((1, 2), (0.0, 0.0), (0, 0), "aborted")
    answers(ENGINE, [Request((1, 2, 3), max_new_tokens=3, seed=8), Request((1,), max_new_tokens=4, seed=9, prefix=prefix)])
    assert sorted(seen) == [(8, 0), (8, 1), (8, 2), (9, 2), (9, 3)]


def test_one_prompt_of_many_requests_is_prefilled_once(monkeypatch):
    asked, fed, engine = [Request((5, 6, 7, 8), max_new_tokens=4, seed=s) for s in range(6)], [], quick(MODEL, 8, KEYS)
    expected = alone(engine, asked)
    prefill = engine.model.prefill
    monkeypatch.setattr(engine.model, "prefill", lambda prompts: fed.extend(len(x) for *_, x in prompts) or prefill(prompts))
    assert answers(engine, asked) == expected and fed == [3]
    begun = [dataclasses.replace(r, prefix=Completion(*(f[:n] for f in dataclasses.astuple(c)[:3]), "aborted"))
             for n, r, c in zip((0, 2, 0, 1, 3, 0), asked, expected)]  # fmt: skip
    assert answers(engine, begun) == expected  # some of them have more than the prompt


# Partial answers, pauses, weights


@settings(max_examples=4)
@given(st.integers(0, 2**31))
def test_an_aborted_answer_goes_on_to_the_same_bits(seed):
    """Aborted after any number of steps, queued or running, several times; prefix tokens and log-probs are kept."""
    rng, asked = random.Random(seed), requests(14, seed=5)

    async def patient(request):
        parts = [await ENGINE.generate(request)]
        while parts[-1].finish == "aborted":
            parts.append(await ENGINE.generate(dataclasses.replace(request, prefix=parts[-1])))
            assert parts[-1].ids[: len(parts[-2].ids)] == parts[-2].ids
        return parts

    async def all_of_them():
        tasks = [asyncio.ensure_future(patient(request)) for request in asked]
        for _ in range(3):
            for _ in range(rng.randrange(1, 8)):
                await asyncio.sleep(0)
            ENGINE.abort_all()
            assert (ENGINE.running, ENGINE.waiting) == (0, 0)
        return await asyncio.gather(*tasks)

    parts, = ENGINE.run(all_of_them())
    assert [p[-1] for p in parts] == EXPECTED_14 and any(len(p) > 1 for p in parts)


def test_bug60_every_token_says_which_weights_drew_it():
    """Weights change while requests run: tokens before and after differ in version, and the first part is that of the
    old weights alone; what starts later is that of the new weights alone."""
    engine, other = quick(MODEL, 4, KEYS, version=3), model(seed=1)
    request = Request((1, 2, 3), max_new_tokens=20, seed=4)
    expected = [alone(quick(m, 4, KEYS), [request])[0] for m in (MODEL, other)]

    async def both():
        first = asyncio.ensure_future(engine.generate(request))
        while not engine.running or len(engine._rows[0].logprobs) < 6:
            await asyncio.sleep(0)
        engine.update(other, 4)
        second = await engine.generate(request)
        return await first, second

    (first, second), = engine.run(both())
    changed = first.versions.index(4)
    assert first.versions == (3,) * changed + (4,) * (20 - changed) and changed >= 6
    assert first.ids[:changed] == expected[0].ids[:changed] and first.logprobs[:changed] == expected[0].logprobs[:changed]
    assert first.ids != expected[0].ids
    assert (second.ids, second.logprobs, second.versions) == (expected[1].ids, expected[1].logprobs, (4,) * 20)


def test_a_continued_answer_keeps_versions_and_is_recomputed_under_the_new_weights():
    engine, other = quick(MODEL, 4, KEYS), model(seed=1)
    request = Request((1, 2, 3), max_new_tokens=9, seed=4)
    whole = alone(engine, [request])[0]
    part = Completion(whole.ids[:5], whole.logprobs[:5], (0,) * 5, "aborted")
    engine.update(other.state_dict(), 1)
    done = alone(engine, [dataclasses.replace(request, prefix=part)])[0]
    assert done.ids[:5] == part.ids and done.logprobs[:5] == part.logprobs and done.versions == (0,) * 5 + (1,) * 4
    logits = other(torch.tensor([[1, 2, 3, *done.ids[:5]]]))[0, -1]
    assert_close(torch.tensor(done.logprobs[5]), logits.log_softmax(dim=0)[done.ids[5]], 1e-4)


def test_the_engine_keeps_its_own_copy_of_the_weights():
    """Training the model beside it changes nothing before `update`."""
    trained = copy.deepcopy(MODEL)
    engine, asked = quick(trained, 4, KEYS), requests(14, seed=5)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(1.0)
    assert answers(engine, asked) == EXPECTED_14


def test_a_paused_engine_keeps_its_slots_and_goes_on():
    async def script():
        task = asyncio.ensure_future(ENGINE.generate(requests(14, seed=5)[0]))
        await asyncio.sleep(0)
        while not ENGINE.running:
            await asyncio.sleep(0)
        ENGINE.pause()
        drawn = len(ENGINE._rows[0].logprobs)
        for _ in range(50):
            await asyncio.sleep(0)
        assert not task.done() and ENGINE.running == 1 and len(ENGINE._rows[0].logprobs) == drawn
        ENGINE.resume()
        return await task

    assert ENGINE.run(script()) == [EXPECTED_14[0]]


def test_a_cancelled_request_frees_its_slot_even_while_paused():
    async def script():
        tasks = [asyncio.ensure_future(ENGINE.generate(request)) for request in requests(12, max_new_tokens=12, stop_ids=())]
        for _ in range(3):
            await asyncio.sleep(0)
        ENGINE.pause()
        assert ENGINE.running == 8 and ENGINE.waiting == 4
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        ENGINE.resume()
        for _ in range(3):
            await asyncio.sleep(0)
        return ENGINE.running, ENGINE.waiting, len(asyncio.all_tasks())

    assert ENGINE.run(script()) == [(0, 0, 2)]  # the script and who runs it


def test_the_lowest_priority_number_is_served_first():
    engine, order = quick(MODEL, 1, KEYS), []

    async def one(priority):
        await engine.generate(Request((1,), max_new_tokens=2, priority=priority))
        order.append(priority)

    engine.run(*map(one, [5, 3, 9, 1]))
    assert order == [1, 3, 5, 9]


def test_tokens_stream_as_they_come():
    seen, request = [], requests(14, seed=5)[0]
    done, = ENGINE.run(ENGINE.generate(request, seen.append))
    assert tuple(seen) == done.ids


# Sessions


def turns(engine, prefills, session, dropped=False):
    """Three turns of one conversation, each after what the last one drew and something more."""
    ids, done = (1, 2, 3, 4), []
    for turn in range(3):
        done += answers(engine, [Request(ids, max_new_tokens=5, seed=turn, session=session)])
        ids = (*ids, *done[-1].ids, 9, 8, 7)
        if dropped:
            engine.forget(session)
    return done


def test_a_session_feeds_only_what_is_new_and_changes_no_bit(monkeypatch):
    engine, fed = quick(MODEL, 2, KEYS), []
    prefill = engine.model.prefill
    monkeypatch.setattr(engine.model, "prefill", lambda prompts: fed.extend(len(x) for *_, x in prompts) or prefill(prompts))
    expected = turns(engine, fed, None)
    assert fed == [3, 11, 19]
    del fed[:]
    assert turns(engine, fed, "a") == expected and fed == [3, 3, 3]  # the last drawn token and two of the three new ones
    del fed[:]
    assert turns(engine, fed, "b", dropped=True) == expected and fed == [3, 11, 19]
    small = quick(MODEL, 2, KEYS, parked=0)
    assert turns(small, fed, "c") == expected and not small._parked


def test_a_session_whose_prompt_changes_keeps_the_common_prefix_only():
    engine = quick(MODEL, 2, KEYS)
    answers(engine, [Request((1, 2, 3, 4, 5, 6), seed=0, session="s", max_new_tokens=3)])
    changed = Request((1, 2, 9, 4, 5, 6, 7), seed=1, max_new_tokens=6)
    assert answers(engine, [dataclasses.replace(changed, session="s")]) == alone(engine, [changed])


def test_caches_of_other_weights_are_not_reused():
    engine, other = quick(MODEL, 2, KEYS), model(seed=1)
    first, second = Request((1, 2, 3), session="s", max_new_tokens=3), Request((1, 2, 3, 4), session="s", max_new_tokens=3)
    answers(engine, [first])
    engine.update(other, 1)
    expected = alone(quick(other, 2, KEYS), [second])[0]
    assert answers(engine, [second])[0].logprobs == expected.logprobs


def test_a_cache_of_two_versions_is_not_kept():
    """The next turn is that of the new weights alone."""
    engine, other = quick(MODEL, 2, KEYS), model(seed=1)

    async def first():
        task = asyncio.ensure_future(engine.generate(Request((1, 2, 3), session="s", max_new_tokens=9)))
        while not engine.running or len(engine._rows[0].logprobs) < 3:
            await asyncio.sleep(0)
        engine.update(other, 1)
        return await task

    done, = engine.run(first())
    assert set(done.versions) == {0, 1}
    second = Request((1, 2, 3, *done.ids, 4), session="s", max_new_tokens=4)
    assert answers(engine, [second])[0].logprobs == alone(quick(other, 2, KEYS), [second])[0].logprobs


# Pictures


def test_bug38_pictures_count_at_every_step_and_are_encoded_once(monkeypatch):
    engine, calls = quick(model(torch.float64), 4, KEYS), []
    encode = engine.model.model.encode_media
    monkeypatch.setattr(engine.model.model, "encode_media", lambda *a: calls.append(1) or encode(*a))
    ids = (65, MEDIA, MEDIA, 66, *[MEDIA] * 4, 67, MEDIA, 68)
    asked = [Request(ids, ITEMS, max_new_tokens=5, temperature=0.0, seed=s) for s in range(3)]
    done = answers(engine, [*asked, dataclasses.replace(asked[0], ids=(64, *ids))])
    assert len(calls) == 3  # one for each picture, however many requests show it
    patches = torch.cat([i.patches for i in ITEMS]).double()
    ids_, logprobs = naive(engine.model.model, ids, 5, patches, torch.tensor([i.grid for i in ITEMS]))
    assert done[0].ids == ids_
    assert_close(torch.tensor(done[0].logprobs), torch.tensor(logprobs), 1e-5)
    blank = [MediaItem(torch.zeros_like(i.patches), i.grid, None) for i in ITEMS]
    assert answers(engine, [dataclasses.replace(asked[0], items=tuple(blank))])[0].logprobs != done[0].logprobs


def test_of_too_many_pictures_those_used_last_are_remembered(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 2)
    engine, calls = quick(MODEL, 2, KEYS), []
    encode = engine.model.model.encode_media
    monkeypatch.setattr(engine.model.model, "encode_media", lambda *a: calls.append(1) or encode(*a))
    one, two, three = ITEMS[:3]
    for item, encoded in ((one, 1), (two, 2), (one, 2), (three, 3), (one, 3), (two, 4)):
        engine.model.encode([item])
        assert len(calls) == encoded


def test_a_session_goes_on_behind_pictures():
    """A second turn with another picture encodes only that one; the same ids with another first picture reuse nothing."""
    engine, ids = quick(MODEL, 2, KEYS), (65, MEDIA, MEDIA, 66)
    first = Request(ids, ITEMS[:1], max_new_tokens=3, session="s")
    answers(engine, [first])
    second = Request((*ids, 70, *[MEDIA] * 4, 71), ITEMS[:2], max_new_tokens=4, seed=1)
    expected = alone(quick(MODEL, 1, KEYS), [second])
    assert answers(engine, [dataclasses.replace(second, session="s")]) == expected
    answers(engine, [first])
    swapped = dataclasses.replace(second, items=(item(9, (1, 2, 4)), ITEMS[1]))
    assert answers(engine, [dataclasses.replace(swapped, session="s")]) == alone(engine, [swapped]) != expected


def test_a_media_place_is_never_drawn():
    """It would be a place without a picture in the next turn."""
    greedy = copy.deepcopy(MODEL)
    with torch.no_grad():
        greedy.language_model.lm_head.weight[MEDIA] = greedy.language_model.lm_head.weight.abs().sum(dim=0) * 9
    asked = [Request((1, 2, n), max_new_tokens=20, seed=n, temperature=float(n % 2)) for n in range(6)]
    assert MEDIA not in {token for done in answers(quick(greedy, 6, KEYS), asked) for token in done.ids}


def test_a_broken_picture_fails_its_own_request_only():
    good = requests(14, seed=5)[0]
    bad = Request((MEDIA, MEDIA, 1), (MediaItem(ITEMS[0].patches[:-1], (1, 2, 4), None),))

    async def script():
        return await asyncio.gather(ENGINE.generate(bad), ENGINE.generate(good), return_exceptions=True)

    (error, done), = ENGINE.run(script())
    assert isinstance(error, ValueError) and "patches" in str(error) and done == EXPECTED_14[0]
    assert ENGINE.running == 0


# Refusals


@pytest.mark.parametrize("request_, message", [
    (Request(()), "at least one token"), (Request((1, MEDIA), ITEMS[2:]), "must not be a media place"),
    (Request((512,)), "id 512 lies outside"), (Request((-1, 1)), "id -1 lies outside"),
    (Request((1,), temperature=-1.0), "temperature -1.0"), (Request((1,), temperature=float("nan")), "temperature nan"),
    (Request((1,), top_p=0.0), "top_p 0.0"), (Request((1,), max_new_tokens=0), "max_new_tokens 0"),
    (Request((1,), max_new_tokens=1, prefix=Completion((1,), (0.0,), (0,), "aborted")), "more new tokens than the 1 given"),
    (Request((1,), max_new_tokens=2 * KEYS), "do not fit into a capacity of 256"),
    (Request((MEDIA, MEDIA, 1), ITEMS[1:2]), r"has 2 <\|media_pad\|> tokens but its 1 items give 4"),
])  # fmt: skip
def test_bug63_impossible_requests_are_refused_where_they_are_made(request_, message):
    with pytest.raises(EngineError, match=message) as error:
        answers(ENGINE, [request_])
    assert "\n" not in str(error.value) and ENGINE.running == 0


def test_bug59_a_completion_has_one_logprob_and_version_per_token():
    with pytest.raises(EngineError, match="2 tokens has 1 log-probs and 2 versions"):
        Completion((1, 2), (0.0,), (0, 0), "stop")


def test_a_failing_model_fails_all_who_wait_and_the_next_may_work(monkeypatch):
    engine, asked = quick(MODEL, 2, KEYS), requests(5)

    async def script():
        return await asyncio.gather(*map(engine.generate, asked), return_exceptions=True)

    with monkeypatch.context() as patched:
        patched.setattr(engine.model, "decode", lambda *_: 1 / 0)
        errors, = engine.run(script())
    assert all(isinstance(e, EngineError) and "ZeroDivisionError" in str(e) for e in errors)
    assert answers(engine, asked) == answers(ENGINE, asked)


def test_sampling_agrees_with_generate_where_both_see_the_same_uniform(monkeypatch):
    """`draw` and generate's `_choose` are two writings of one rule; they differ only in the precision of the sums."""
    logits = torch.randn(200, 40, generator=torch.Generator().manual_seed(3))
    uniforms = torch.rand(200, generator=torch.Generator().manual_seed(4))
    given = iter(uniforms)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: next(given))
    ids, logprobs = _choose(logits, 0.8, 1.0, [None] * 200)
    order = logits.sort(dim=1, descending=True, stable=True).indices  # generate walks from the likeliest on
    chosen, ours = draw(logits.gather(1, order), ones(200, 0.8), ones(200), uniforms.double())
    assert (order.gather(1, chosen[:, None])[:, 0] == ids).float().mean() > 0.99
    assert_close(ours, logprobs.where(order.gather(1, chosen[:, None])[:, 0] == ids, ours), 1e-6)


# Command line


def test_the_bench_prints_one_line_per_count(capsys):
    rows = command.bench("toy", (2,), slots=2, repeats=1)
    assert rows[0][0] == 2 and min(rows[0]) > 0 and "2 requests" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["bench", "--requests", "0"], ["bench", "--preset", "huge"], ["bench", "--slots", "-1"]])
def test_misuse_is_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.cuda
@DTYPES
def test_answers_on_cuda_are_the_same_in_any_company(dtype):
    engine, asked = Engine(model(dtype).cuda(), slots=64, capacity=2 * KEYS), requests(30)
    assert answers(engine, asked) == alone(engine, asked)
