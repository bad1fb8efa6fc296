"""Claims about YaRN and int4: needles and prose are what they should be, figures are those of the cells, int4 is the released layout's.

Run: .venv/bin/python -m pytest tests/test_context_claims.py
"""

import random
from collections import Counter

import numpy as np
import pytest
import torch

import context_claims
from context_claims import GROUPS, MODEL, SHORTEST, int4, lessons, propose_needles, propose_prose, yarn
from data import encode_example
from k25 import load
from lab import DIRECTION, NOT, REPLICATES, Scale, blend, decoder, loss_on
from mla import Yarn
from sft import SFTConfig
from tokenizer import Tokenizer

QUICK = {"quick": True, "workers": 0, "seeds": (1,)}


# Data


@pytest.mark.parametrize("length, asked", [(SHORTEST, 6), (90, 6), (128, 1), (300, 3)])
def test_a_needle_stands_once_among_words_and_every_question_is_true(length, asked):
    for seed in range(5):
        draft = propose_needles(random.Random(seed), length, asked)
        (first, _), *_ = draft.turns
        words, _, _ = first.partition("?")
        letters = [letter for letter in words if letter.isupper()]
        assert len(letters) == len(GROUPS) and {next(g for g, group in enumerate(GROUPS) if letter in group) for letter in letters} == set(range(6))
        assert len(draft.turns) == asked and all(answer in GROUPS[int(prompt[-1])] and answer in letters for prompt, answer in draft.turns)
        assert set(words) - set(letters) <= set("abcdefghijklmnopqrstuvwxyz ")
        assert draft.choices == tuple(GROUPS[int(draft.turns[-1][0][-1])])
        assert sum(len(prompt) + len(answer) + 1 for prompt, answer in draft.turns) + 1 == length  # a byte is a token, and eos


@pytest.mark.parametrize("depth", (0.0, 0.5, 1.0))
def test_the_needle_that_is_asked_for_stands_at_its_depth(depth):
    for seed in range(5):
        ((prompt, answer),) = propose_needles(random.Random(seed), 160, 1, depth).turns
        assert prompt.index(answer) / prompt.index("?") == pytest.approx(depth, abs=0.06)


def test_lessons_fill_the_length_and_prose_keeps_to_one_split():
    tokenizer, media = Tokenizer(), decoder(0, **MODEL).config.media
    for (source, _), most in zip(lessons(200), (200, 200)):
        sizes = [len(encode_example(source.draw(random.Random(seed)), tokenizer, media).ids) for seed in range(20)]
        assert max(sizes) <= most and min(sizes) >= SHORTEST
    assert len(propose_prose(random.Random(1), 500).turns[0][1]) == 498


# Measures


def test_the_loss_at_every_position_is_that_of_the_softmax():
    model = decoder(3, **MODEL)
    example = context_claims._drawn(lambda rng, _: propose_prose(rng, 41), 1, "prose 40")[0]
    ids = encode_example(example, Tokenizer(), model.config.media).ids
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).double().numpy()[0]
    expected = [np.log(np.exp(row - row.max()).sum()) + row.max() - row[following] for row, following in zip(logits, ids[1:])]
    assert len(expected) == 40
    np.testing.assert_allclose(context_claims._read(model, 40, 1)[0], expected, rtol=1e-4)


def test_a_model_that_knows_the_letters_finds_every_needle_and_a_fixed_answer_one_in_four(monkeypatch):
    monkeypatch.setattr(context_claims.evaluate, "answer", lambda model, examples, *_, **__: [e.choices.index(e.answer) for e in examples])
    assert context_claims._found(None, 128, 8) == [1] * 8
    monkeypatch.setattr(context_claims.evaluate, "answer", lambda model, examples, *_, **__: [0] * len(examples))
    assert 0.15 < np.mean(context_claims._found(None, 128, 200)) < 0.35


def test_the_extension_changes_the_config_alone():
    short, long = decoder(1, **MODEL), decoder(1, **MODEL, yarn=Yarn(8.0, 128))
    assert all(torch.equal(a, b) for a, b in zip(short.state_dict().values(), long.state_dict().values()))
    ids = torch.arange(40)[None] + 60
    assert not torch.allclose(short(ids), long(ids), atol=1e-5)


# Claims by hand


def extended_cell(needles, loss):
    return {"needles": {"1": [1, 1], "8": needles}, "loss": [loss, loss]}


def test_yarn_is_judged_beyond_the_trained_length_only():
    """Sixteen half lengths: the first two lie within the trained length."""
    cells = {"plain": extended_cell([0, 1], [2.0] * 2 + [4.0] * 14), "yarn": extended_cell([1, 1], [3.0] * 2 + [2.5] * 14),
             "plain tuned": extended_cell([0, 1], [2.0] * 2 + [2.5] * 14), "yarn tuned": extended_cell([1, 1], [2.0] * 16)}  # fmt: skip
    perplexity, needles, steps = context_claims._yarn_claims({arm: [cell, cell] for arm, cell in cells.items()}, 8, 40, 128)
    assert "gain 1.500 [1.500, 1.500]" in perplexity.found and perplexity.verdict == REPLICATES and "within the trained length 2.000" in perplexity.found
    assert "gain 0.500" in needles.found and needles.verdict == DIRECTION  # with two questions the interval reaches zero
    assert "gain 0.500 [0.500, 0.500]" in steps.found and "needles, YaRN less plain 0.500" in steps.found


@pytest.mark.parametrize("after_qat, verdicts", [(1.5, (REPLICATES, REPLICATES)), (1.6, (NOT, NOT)), (1.501, (REPLICATES, REPLICATES))])
def test_int4_is_judged_against_as_many_float_steps(after_qat, verdicts):
    cell = lambda float_loss, int4_loss: {"float": {"loss": [float_loss] * 3, "right": [1]}, "int4": {"loss": [int4_loss] * 3, "right": [0]}}  # noqa: E731
    arms = {"base": [cell(1.7, 1.72)] * 2, "float": [cell(1.5, 1.53)] * 2, "qat": [cell(1.49, after_qat)] * 2}
    lossless, better = context_claims._int4_claims(arms, 100, 0.297)
    assert (lossless.verdict, better.verdict) == verdicts and lossless.found.endswith("chance 0.297")
    assert "rounding costs 0.030 [0.030, 0.030] after float steps and 0.020" in better.found


# From end to end


def test_both_experiments_run_and_are_kept(tmp_path):
    scale = Scale(tmp_path, **QUICK)
    claims = {name: experiment(scale) for name, experiment in (("yarn", yarn), ("int4", int4))}
    assert {name: len(found) for name, found in claims.items()} == {"yarn": 3, "int4": 2}
    choices = Counter(len(example.choices) for example in context_claims._questions(3))
    assert claims["int4"][0].found.endswith(f"chance {(choices[2] / 2 + choices[4] / 4) / 3:.3f}") and choices.total() == choices[2] + choices[4]
    choices = Counter(len(example.choices) for example in context_claims._questions(90))
    assert choices == {4: 73, 2: 17}  # so chance is (73 / 4 + 17 / 2) / 90 = 0.297
    assert all((tmp_path / name / found[0].plot).stat().st_size > 5000 for name, found in claims.items())
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/*.json")}
    assert sorted(path.name for path in kept) == sorted(
        [f"{name}-1.json" for name in ("plain", "yarn", "plain-tuned", "yarn-tuned", "base", "float", "qat")])  # fmt: skip
    assert [yarn(scale), int4(scale)] == list(claims.values())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/*.json")} == kept
    check_int4(tmp_path / "int4" / "models", scale)


def check_int4(models, scale):
    """What was measured as int4: experts of 15 levels per group of 32, all else untouched; QAT had trained exactly that."""
    before, after = (load(models / name, dtype=torch.float32).state_dict() for name in ("float-1", "float-1-int4"))
    for name, weight in before.items():
        if ".experts." not in name:
            assert torch.equal(weight, after[name]), name
            continue
        groups, rounded = (w.unflatten(-1, (-1, 32)).double().numpy() for w in (weight, after[name]))
        step = np.abs(groups).max(-1, keepdims=True) / 7
        assert (np.abs(rounded - groups) <= step * 0.51 + 7.5 * step * 2**-8).all() and not np.array_equal(groups, rounded)
        assert all(len(set(group)) <= 15 for group in rounded.reshape(-1, 32))
    batch = [next(blend(lessons(64), 0.0, SFTConfig(1, 2, 64), 5, "heldout"))]
    assert loss_on(load(models / "qat-1", dtype=torch.float32, qat=True), batch) == loss_on(load(models / "qat-1-int4", dtype=torch.float32), batch)
    trained = load(models / "qat-1", dtype=torch.float32).state_dict()
    assert any(not torch.equal(trained[name], weight) for name, weight in before.items())  # from the same base and batches
