"""All default sources of data; none needs a download (K2.5 report 4.2).

Real: the running Python's standard library, as code, as docstrings, and as words and lines written into
pictures in the fonts that matplotlib ships. Generated: everything of `scenes` and `texts`.

Public: SOURCES (name -> Source), TEXT_WEIGHTS, VISION_WEIGHTS, weighted, Example, Source, SourceError, mirror, needle, sample_sheet.
    rng = random.Random(0)
    SOURCES["colour"].draw(rng, "heldout")   # an Example; all randomness comes from rng
Tests: .venv/bin/python -m pytest tests/test_sources.py
"""

import collections
import functools
import os
import pathlib
import random
import re
import string
import sysconfig
import textwrap

from PIL import Image, ImageDraw

import scenes
import texts
from example import Draft, Example, Source, SourceError, mirror, pick, split_of, twin
from pictures import Clip, Strip, font

__all__ = ["SOURCES", "TEXT_WEIGHTS", "VISION_WEIGHTS", "Example", "Source", "SourceError", "mirror", "needle", "sample_sheet", "weighted"]

# Parts of the standard library that are tests, tables of numbers, or not the library at all.
_SKIPPED = {
    "test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__",
}  # fmt: skip
_DOCSTRING = re.compile(r':\n\s+r?"""(.+?)"""', re.DOTALL)
_MARKER = re.compile(r"<image>|<video>|<\||<think>|</think>")


@functools.lru_cache(maxsize=None)
def _library() -> tuple[pathlib.Path, tuple]:
    """The folder of the standard library and its Python files, sorted, as relative posix paths."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED)
        files += [(pathlib.Path(folder, name)).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    if not files:
        raise SourceError(f"no Python files in {root}: the standard library's source is not installed")
    return root, tuple(sorted(files))


@functools.lru_cache(maxsize=None)
def _read(file: str) -> str:
    return pathlib.Path(_library()[0], file).read_text(encoding="utf-8", errors="ignore")


@functools.lru_cache(maxsize=None)
def _docstrings(file: str) -> tuple:
    """First paragraphs of a file's docstrings, each on one line, of 20 characters or more."""
    paragraphs = (" ".join(found.split("\n\n")[0].split()) for found in _DOCSTRING.findall(_read(file)))
    return tuple(p for p in paragraphs if len(p) >= 20 and _is_plain(p))


def _is_plain(text: str) -> bool:
    return text.isascii() and not _MARKER.search(text)


def propose_code_document(rng: random.Random) -> Draft:
    """Some whole lines of a file of the standard library, 60 to 300 characters."""
    while True:
        file = rng.choice(_library()[1])
        text = _read(file)
        start = text.find("\n", rng.randrange(len(text) + 1)) + 1
        end = text.rfind("\n", start, start + 300)
        if end - start >= 60 and _is_plain(text[start:end]):
            return Draft((("", text[start:end]),), key=f"file {file}")


def propose_docstring(rng: random.Random) -> Draft:
    """The first paragraph of a docstring, cut at a word to 200 characters."""
    while True:
        file = rng.choice(_library()[1])
        if _docstrings(file):
            text = rng.choice(_docstrings(file))
            if len(text) > 200:
                text = text[:200].rsplit(" ", 1)[0]
            return Draft((("", text),), key=f"file {file}")


@functools.lru_cache(maxsize=None)
def _words() -> dict:
    """(length, split) -> the standard library's words of 2 to 5 small letters that five files use."""
    seen = collections.Counter()
    for file in _library()[1]:
        seen.update(set(re.findall(r"\b[a-z]{2,5}\b", _read(file))))
    return _by_length_and_split([word for word, count in seen.items() if count >= 5], range(2, 6))


@functools.lru_cache(maxsize=None)
def _lines() -> dict:
    """(length, split) -> short lines of code, of 4 to 10 characters, that occur in more than one file."""
    seen = collections.Counter()
    for file in _library()[1]:
        lines = {line.strip() for line in _read(file).splitlines() if len(line) < 60}
        seen.update(line for line in lines if 4 <= len(line) <= 10 and any(map(str.isalpha, line)) and _is_plain(line))
    return _by_length_and_split([line for line, count in seen.items() if count >= 2], range(4, 11))


def _by_length_and_split(writings, lengths) -> dict:
    pools = collections.defaultdict(list)
    for writing in sorted(writings):
        pools[len(writing), split_of(_writing_key(writing))].append(writing)
    usable = [n for n in lengths if min(len(pools[n, "train"]), len(pools[n, "heldout"])) >= 4]
    return {(n, split): tuple(pools[n, split]) for n in usable for split in ("train", "heldout")}


def _writing_key(writing: str) -> str:
    return f"writing {writing}"


def _propose_read(rng: random.Random, pools: dict) -> Draft:
    """`Q:read?`: the choices are as long as the answer and of its split, so none stands out as never seen."""
    length = rng.choice(sorted({length for length, _ in pools}))
    train, heldout = pools[length, "train"], pools[length, "heldout"]
    any_writing = rng.randrange(len(train) + len(heldout))
    answer, choices = pick(rng, train if any_writing < len(train) else heldout)
    typeface = "mono" if rng.random() < 0.7 else rng.choice(("sans", "serif", "stix"))
    strip = Strip(answer, typeface, rng.randint(-1, 1), rng.randint(-1, 1))
    return Draft((("<image>Q:read?A:", answer),), _writing_key(answer), choices, (strip,))


def propose_read_word(rng: random.Random) -> Draft:
    """A word of the library's docstrings, written into a strip."""
    return _propose_read(rng, _words())


def propose_read_line(rng: random.Random) -> Draft:
    """A short line of the library's code, written into a strip."""
    return _propose_read(rng, _lines())


def propose_copy(rng: random.Random) -> Draft:
    """The text twin of reading: a word, a line, or letters that no memory of words can help with."""
    if rng.random() < 0.5:
        writing = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8)))
    else:
        draft = rng.choice((propose_read_word, propose_read_line))(rng)
        writing = draft.turns[0][1]
    return Draft(((f'"{writing}".Q:read?A:', writing),), _writing_key(writing))


def needle(rng: random.Random, split: str, length_chars: int, depth: float) -> Example:
    """A needle in a haystack: a retrieval question after at most `length_chars` characters.

    Args: rng, split: as Source.draw; length_chars: int — the longest the text may be (at least 64; it stops
    less than one sentence of 16 characters short of it); depth: float — where the asked statement stands,
    0 at the start, 1 at the end.
    """
    source = Source("needle", "text", "long context", lambda r: texts.pairs_in_filler(r, length_chars, depth))
    return source.draw(rng, split)


_ALL = (
    # Real text
    Source("code_document", "text", "", propose_code_document),
    Source("docstring", "text", "", propose_docstring),
    # Generated text
    Source("copy", "text", "", propose_copy),
    Source("repeat", "text", "", texts.propose_repeat),
    Source("recall", "text", "", texts.propose_recall),
    Source("long_recall", "text", "", texts.propose_long_recall),
    Source("fact_statement", "text", "", texts.propose_fact_statement),
    Source("fact_question", "text", "text knowledge", texts.propose_fact_question, one_in=5),
    Source("sum", "text", "text reasoning", texts.propose_sum),
    Source("next", "text", "text reasoning", texts.propose_next, one_in=5),
    Source("largest", "text", "text reasoning", texts.propose_largest),
    Source("sort", "text", "text reasoning", texts.propose_sort),
    Source("colour_in_words", "text", "text reasoning", twin(scenes.propose_colour)),
    Source("shape_in_words", "text", "text reasoning", twin(scenes.propose_shape)),
    Source("count_in_words", "text", "text reasoning", twin(scenes.propose_count)),
    Source("side_in_words", "text", "text reasoning", twin(scenes.propose_side)),
    Source("highest_in_words", "text", "text reasoning", twin(scenes.propose_chart_highest)),
    Source("value_in_words", "text", "text reasoning", twin(scenes.propose_chart_value)),
    Source("program", "text", "code", texts.propose_program),
    Source("run_sketch", "text", "code", scenes.propose_run_sketch),
    Source("needle", "text", "long context", texts.propose_needle),
    # Pictures to describe
    Source("caption", "vision", "", scenes.propose_caption),
    Source("interview", "vision", "", scenes.propose_interview),
    # Pictures to ask about
    Source("colour", "vision", "vision knowledge", scenes.propose_colour),
    Source("shape", "vision", "vision knowledge", scenes.propose_shape),
    Source("emblem", "vision", "vision knowledge", scenes.propose_emblem),
    Source("count", "vision", "vision reasoning", scenes.propose_count),
    Source("where", "vision", "vision reasoning", scenes.propose_where),
    Source("side", "vision", "vision reasoning", scenes.propose_side),
    Source("chart_highest", "vision", "vision reasoning", scenes.propose_chart_highest),
    Source("chart_value", "vision", "vision reasoning", scenes.propose_chart_value),
    Source("read_word", "vision", "OCR", propose_read_word),
    Source("read_line", "vision", "OCR", propose_read_line),
    Source("ground", "vision", "", scenes.propose_ground),
    Source("click", "vision", "", scenes.propose_click),
    Source("sketch", "vision", "", scenes.propose_sketch),
    # Videos
    Source("motion", "vision", "video", scenes.propose_motion),
    Source("order", "vision", "video", scenes.propose_order),
)
SOURCES = {source.name: source for source in _ALL}

# How often each source is drawn among those of its modality. A document of real code is some ten times as long
# as a question, so code and docstrings of the library are about 15 % of all text tokens.
TEXT_WEIGHTS = {
    "code_document": 0.3, "docstring": 1.0, "repeat": 4.0, "copy": 2.0, "recall": 2.0, "fact_statement": 2.0, "fact_question": 2.0,
    "sum": 2.0, "next": 1.5, "largest": 1.5, "sort": 1.0, "colour_in_words": 0.5, "shape_in_words": 0.5,
    "count_in_words": 0.5, "side_in_words": 0.5, "highest_in_words": 0.5, "value_in_words": 0.5, "program": 2.0,
    "run_sketch": 1.0, "needle": 1.0,
}  # fmt: skip
VISION_WEIGHTS = {
    "caption": 2.0, "interview": 2.0, "colour": 1.0, "shape": 1.0, "emblem": 1.0, "count": 1.0, "where": 0.5,
    "side": 1.0, "chart_highest": 0.7, "chart_value": 0.7, "read_word": 5.0, "read_line": 1.0, "ground": 0.3,
    "click": 0.2, "sketch": 0.3, "motion": 0.7, "order": 0.5,
}  # fmt: skip


def weighted(weights):
    """((Source, weight), …) of {name: weight}: what a data.Blend takes."""
    return tuple((SOURCES[name], weight) for name, weight in weights.items())


def sample_sheet(path, seed: int = 0, columns: int = 6) -> None:
    """Write one PNG with training examples of every vision source, `columns` in a row, texts below them."""
    vision = [source for source in _ALL if source.modality == "vision"]
    width, height, margin = 250, 146, 96
    sheet = Image.new("RGB", (margin + columns * width, len(vision) * height), (235, 235, 235))
    draw, face = ImageDraw.Draw(sheet), font("mono", 11)
    for row, source in enumerate(vision):
        rng = random.Random(f"{seed} {source.name}")
        top = row * height + 4
        draw.text((4, top), source.name, "black", face)
        for column in range(columns):
            example = source.draw(rng, "train")
            left = x = margin + column * width
            for media in example.media:
                for frame in media.frames if isinstance(media, Clip) else [media]:
                    sheet.paste(frame, (x, top))
                    x += frame.width + 2
            written = [*example.text.splitlines(), "|".join(example.choices)]
            lines = [line for part in written for line in textwrap.wrap(part, 34, break_on_hyphens=False)]
            draw.multiline_text((left, top + 86), "\n".join(lines[:4]), "black", face, spacing=1)
    sheet.save(path)
