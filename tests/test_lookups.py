"""The world to look things up in: what is asked can be found, scripts do what they say, words are tokens.

Run: .venv/bin/python -m pytest tests/test_lookups.py
"""

import asyncio
import random

import pytest

import lookups
from corpus import Corpus
from critical import critical_steps
from lookups import HOPS, KINDS, QuestionError, ScriptedSubagents, draw, merges, pool, scripted, single_lookup, vocabulary
from swarm import Limits, Swarm
from swarm_log import Log, episode


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return vocabulary(tmp_path_factory.mktemp("words") / "vocabulary.tiktoken")


def play(question, writer, tokenizer, steps=40):
    """(outcome, critical steps, log) of a script."""
    log, limits = Log(None), Limits(critical_steps=steps, main_steps=steps, sub_steps=5, own_calls=1)
    swarm = Swarm(question.text, scripted(tokenizer, writer), Corpus.of(question.pages), log, limits, subpolicy=ScriptedSubagents(tokenizer))
    outcome = asyncio.run(swarm.run())
    return outcome, critical_steps(episode(log.events)), log


@pytest.mark.parametrize("kind", KINDS)
def test_every_question_can_be_answered_and_by_looking_alone(kind, tokenizer):
    for seed in range(6):
        question = draw(random.Random(seed), kind)
        outcome, _, _ = play(question, lookups.serial(question), tokenizer)
        assert outcome.status == "done" and question.score(outcome.answer) == 1.0, question
        for row, _, value in question.truth:
            assert value not in question.text and row in question.text


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_suits_the_better_way_to_work(kind, tokenizer):
    for seed in range(6):
        question = draw(random.Random(seed), kind)
        outcome, steps, _ = play(question, lookups.planned(question), tokenizer, question.steps)
        assert question.score(outcome.answer) == 1.0 and steps <= question.steps
    question = draw(random.Random(0), kind, None if kind in ("single", "chain") else 6)
    alone, _, _ = play(question, lookups.serial(question), tokenizer, question.steps)
    assert (question.score(alone.answer) == 1.0) == (kind in ("single", "chain"))


def test_serial_questions_leave_no_time_to_give_work_away(tokenizer):
    question = draw(random.Random(3), "single")

    def delegate():
        yield "", "", lookups._given([f"{question.rows[0]} {question.columns[0]}"])
        yield "", "no idea", []

    outcome, _, log = play(question, delegate(), tokenizer, question.steps)
    result = next(event for event in log.events if event["kind"] == "result")
    assert result["text"].endswith("unknown") and result["steps"] == 2 and question.score(outcome.answer) == 0.0


def test_careless_delegation_is_never_a_good_decomposition(tokenizer):
    """No cold start shows more than half of the rows given away side by side."""
    for seed in range(40):
        question = draw(random.Random(seed), random.Random(seed).choice(("wide", "deep", "document", "download")))
        *_, log = play(question, lookups.careless(question, random.Random(seed)), tokenizer, question.steps)
        given = {event["prompt"] for event in log.events if event["kind"] == "assign"}
        wanted = ["friend"] if question.kind in HOPS else question.columns
        useful = {f"{row} {column}" for row in question.rows for column in wanted} & given
        assert len(useful) <= len(question.rows) / 2, given


def test_a_subtask_is_completed_by_a_finding_of_what_was_asked():
    assert lookups.completed("a27 colour", "a27 colour red")
    assert not any(lookups.completed("a27 colour", answer) for answer in ("a27 colour unknown", "a27 pet cat", "b31 colour red", "red", ""))
    assert not lookups.completed("table of colour for a27", "a27 colour red")


def test_names_of_training_and_heldout_do_not_meet():
    seen = {split: {page.split("\n")[0].removeprefix("old ") for q in pool(120, 0, split=split) for page in q.pages.values()} for split in ("train", "heldout")}
    assert seen["train"] and seen["heldout"] and not seen["train"] & seen["heldout"]


def test_names_say_nothing_about_values():
    """The same name has other values in another question: nothing can be known without looking."""
    values = {}
    for question in pool(600, 0, ("wide",)):
        for row, column, value in question.truth:
            values.setdefault((row, column), set()).add(value)
    assert sum(len(found) > 1 for found in values.values()) > 20


def test_score_counts_values_and_not_the_names_that_the_question_says():
    question = draw(random.Random(0), "wide", 4)
    listed = "\n".join([f"| name | {question.columns[0]} |", "| - | - |", *(f"| {row} | |" for row in question.rows)])
    assert question.score(listed) == question.score("") == 0.0
    known = question.values()
    right = lookups.table(question, known)
    assert question.score(right) == 1.0
    half = lookups.table(question, dict(list(known.items())[:2]))
    assert question.score(half) == pytest.approx(2 * 2 / (2 + len(question.truth)))


def test_single_lookups_find_what_is_there(tokenizer):
    known = 0
    for seed in range(100):
        prompt, pages = single_lookup(random.Random(seed))
        log = Log(None)
        asyncio.run(Swarm(prompt, scripted(tokenizer, lookups.look_up(prompt)), Corpus.of(pages), log, delegation=False).run())
        name, what, value = log.events[-1]["text"].split()
        page = next((text for text in pages.values() if text.split("\n")[0] == name), "")
        moved = next((line.split()[1] for line in page.split("\n") if line.startswith("moved")), None)
        page = next(text for text in pages.values() if text.split("\n")[0] == moved) if moved else page
        known += value != "unknown"
        assert f"{what} {value}" in page.split("\n") if value != "unknown" else f"\n{what} " not in page
    assert 80 < known < 100


def test_findings_say_all_that_the_table_needs():
    for seed, kind in enumerate(KINDS * 3):
        question = draw(random.Random(seed), kind)
        found = {tuple(line.split()[:2]): line.split()[2] for line in lookups.findings(question)}
        for row, column, value in question.truth:
            assert found[found[row, "friend"] if kind in HOPS else row, column] == value


def test_merges_by_hand():
    """aab ×3, ab ×2: first ab (5), then a+ab (3)."""
    assert merges({b"aab": 3, b"ab": 2}, 2)[256:] == [b"ab", b"aab"]
    assert len(merges({b"aab": 3}, 10)) == 258  # nothing left to merge


def test_words_are_single_tokens_and_texts_come_back(tokenizer):
    for word in (" colour", " red", " k", "27", "worker", ".assign", "_task", '"}', " rome", "\n"):
        assert len(tokenizer.encode(word)) == 1, word
    question = draw(random.Random(1), "wide")
    for text in (question.text, *question.pages.values(), "Grüße, 世界"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_is_the_same_file_every_time(tokenizer, tmp_path):
    path = tmp_path / "v.tiktoken"
    vocabulary(path)
    first = path.read_bytes()
    assert vocabulary(path).vocab_size == tokenizer.vocab_size and path.read_bytes() == first


@pytest.mark.parametrize("arguments", [("wider",), ("single", 2), ("wide", 17), ("wide", 3, "test")])
def test_impossible_questions_are_refused(arguments):
    with pytest.raises(QuestionError, match="\\S"):
        draw(random.Random(0), *arguments)


def test_single_look_ups_are_of_all_rows_that_are_asked_of_subagents():
    """A letter that no subagent has seen would be one that it cannot look up."""
    seen = {single_lookup(random.Random(seed))[0][0] for seed in range(600)}
    assert set("abcdefgh") <= seen
