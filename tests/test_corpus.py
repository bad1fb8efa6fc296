"""Claims about corpus.py: search is BM25 and depends on the files alone, and nothing but the pages can be read.

Run: .venv/bin/python -m pytest tests/test_corpus.py
"""

import asyncio
import math
import re

import pytest

from corpus import B, K1, Corpus, CorpusError, Tools, misfit
from interpreter import InterpreterPool
from template import ToolCall


def written(folder, **pages):
    """A Corpus of these pages; `__` in a name is a slash."""
    for name, text in pages.items():
        path = folder / f"{name.replace('__', '/')}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Corpus(folder)


def test_scores_are_bm25_worked_by_hand(tmp_path):
    corpus = written(tmp_path, a="red red blue", b="blue sky over a wide green land", c="grey")
    hits = corpus.search("red Blue red")
    lengths = {"a": 5, "b": 9, "c": 3}  # the words of the name, md among them, count as well

    def part(n, having, page):
        idf = math.log(1 + (3 - having + 0.5) / (having + 0.5))
        return idf * n * (K1 + 1) / (n + K1 * (1 - B + B * lengths[page] / (17 / 3)))

    assert [hit.page for hit in hits] == ["a.md", "b.md"]
    assert hits[0].score == pytest.approx(part(2, 1, "a") + part(1, 2, "a"))
    assert hits[1].score == pytest.approx(part(1, 2, "b"))


def test_equal_scores_stand_in_the_order_of_names_and_top_cuts(tmp_path):
    corpus = written(tmp_path, m="one word", b="one word", az="one word")
    assert [hit.page for hit in corpus.search("word")] == ["az.md", "b.md", "m.md"]
    assert [hit.page for hit in corpus.search("word", top=2)] == ["az.md", "b.md"]
    assert corpus.search("nothing of it") == corpus.search("") == []


def test_a_hit_shows_the_line_that_fits_best_and_not_too_much_of_it(tmp_path):
    corpus = written(tmp_path, a="# Towers\nThe ash is tall.\nThe ash tower is 31 m high.", b="filler " * 100 + "needle" + " filler" * 100)
    assert corpus.search("height of ash tower")[0].line == "The ash tower is 31 m high."
    line = corpus.search("needle")[0].line
    assert "needle" in line and len(line) <= 200


def test_pieces_of_a_page_put_together_are_the_page(tmp_path):
    text = "".join(f"line {i} ü\n" for i in range(500))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    corpus, found, start = Corpus(tmp_path, piece=700), "", 0
    while True:
        piece, _, foot = corpus.browse("long.txt", start).rpartition("\n")
        assert len(piece) <= 700
        found += piece
        if foot.endswith("the end]"):
            break
        start = int(re.search(r"start=(\d+)", foot)[1])
    assert found == text


def test_only_pages_can_be_read(tmp_path):
    (tmp_path / "secret.md").write_text("hidden")
    inside = tmp_path / "inside"
    (inside / ".git").mkdir(parents=True)
    (inside / ".git" / "note.md").write_text("hidden")
    (inside / "program.py").write_text("hidden")
    (inside / "link.md").symlink_to(tmp_path / "secret.md")
    corpus = written(inside, towers__ash="31 metres")
    assert corpus.names == ("towers/ash.md",) and not corpus.search("hidden")
    for name in ("../secret.md", str(tmp_path / "secret.md"), "towers/../../secret.md", "link.md", ".git/note.md", "program.py", "", "\0"):
        with pytest.raises(CorpusError, match="no page"):
            corpus.browse(name)
    with pytest.raises(CorpusError, match=r"did you mean 'towers/ash.md'\?"):
        corpus.browse("tower/ash.md")
    for start in (-1, 10):
        with pytest.raises(CorpusError, match="start lies between"):
            corpus.browse("towers/ash.md", start)


def test_what_cannot_be_a_corpus_is_said_in_one_line(tmp_path):
    def refused(match, **options):
        with pytest.raises(CorpusError, match=match) as caught:
            Corpus(tmp_path / "notes", **options)
        assert "\n" not in str(caught.value)

    refused("is no folder")
    (tmp_path / "notes").mkdir()
    refused("no .txt or .md file")
    (tmp_path / "notes" / "a.md").write_bytes(b"abc\xff")
    refused(r"a.md: byte 3 is no UTF-8")
    (tmp_path / "notes" / "a.md").write_bytes(b"abcdef")
    refused("larger than 5 bytes", largest=5)
    refused("at least 1", piece=0)


def test_the_digest_changes_with_any_page_and_with_nothing_else(tmp_path):
    first = written(tmp_path / "one", a="x", b="y").digest
    assert written(tmp_path / "two", b="y", a="x").digest == first
    assert written(tmp_path / "three", a="x", b="z").digest != first != written(tmp_path / "four", a="x", c="y").digest


def test_tools_answer_whatever_they_are_asked(tmp_path):
    with InterpreterPool() as pool:
        tools = Tools(written(tmp_path, ash="The ash is 31 metres high."), pool)

        async def script():
            return [await tools.search("ash high"), await tools.search("zebra"), await tools.browse("ash.md", 4), await tools.browse("elm.md"),
                    await tools.python("print(31 + 47)"), await tools.python("1 / 0")]  # fmt: skip

        hit, none, page, missing, total, wrong = asyncio.run(script())
    assert re.fullmatch(r"ash\.md \(0\.\d\d\): The ash is 31 metres high\.", hit) and none == "no page has one of these words"
    assert page.startswith("ash is 31") and missing.startswith("Error: no page 'elm.md'")
    assert total == "78" and "ZeroDivisionError" in wrong
    assert [tool["function"]["name"] for tool in Tools(tools.corpus).declarations] == ["search", "browse"]


@pytest.mark.parametrize(("name", "arguments", "wrong"), [
    ("search", {"query": "x"}, ""), ("browse", {"page": "x"}, ""), ("browse", {"page": "x", "start": 3}, ""),
    ("fly", {}, "no tool 'fly', only search, browse"), ("search", {}, "search takes query: string"),
    ("search", {"query": 3}, "search takes query: string"), ("search", {"query": "x", "top": 3}, "search takes query: string"),
    ("browse", {"page": "x", "start": True}, "browse takes page: string, start: integer"),
])  # fmt: skip
def test_a_wrong_call_is_told_what_is_wrong(tmp_path, name, arguments, wrong):
    tools = Tools(written(tmp_path, a="x")).declarations
    assert misfit(ToolCall("", name, 0, arguments, ""), tools) == wrong


def test_pages_that_are_no_files():
    """The same corpus as of files with these texts; none is refused."""
    pages = {"b.md": "an owl\nsings", "a.txt": "two owls"}
    corpus = Corpus.of(pages)
    assert corpus.names == ("a.txt", "b.md") and [hit.page for hit in corpus.search("owl")] == ["b.md"]
    assert corpus.browse("b.md").startswith("an owl\nsings\n[b.md")
    for pages, piece in (({}, 10), (pages, 0)):
        with pytest.raises(CorpusError):
            Corpus.of(pages, piece)
