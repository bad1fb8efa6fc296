"""Claims about MoonViT-3D: clips say what their questions ask, arms read as many tokens as they should, figures are those of the cells.

Run: .venv/bin/python -m pytest tests/test_vision_claims.py
"""

import dataclasses
import random

import numpy as np
import pytest

import vision_claims
from data import encode_example
from lab import DIRECTION, NOT, REPLICATES, Scale
from pictures import COLOURS
from tokenizer import Tokenizer
from vision_claims import ARMS, CORNERS, FRAMES, IMAGES, LEARNED, ORDERED, SEEN, moonvit3d, shuffled

WAYS = {"left": (-14, 0), "right": (14, 0), "up": (0, -14), "down": (0, 14)}


def draw(source, count=12, split="train"):
    return [source.draw(random.Random(f"{source.name} {number}"), split) for number in range(count)]


def pixels(image):
    return np.asarray(image, dtype=int)


def inked(image):
    """The rows and columns that are not paper."""
    return np.nonzero((pixels(image) != 255).any(axis=2))


def colour(image):
    """The colour that most of the ink has."""
    rows, columns = inked(image)
    found = [min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - pixel).sum()) for pixel in pixels(image)[rows, columns]]
    return max(set(found), key=found.count)


def lit(clip):
    """The frames that show anything, in order."""
    return [frame for frame in clip.frames if len(inked(frame)[0])]


# Pictures and clips


def test_questions_about_pictures_are_true():
    asked = {source.name: source for source in IMAGES}
    for example in draw(asked["colour"]):
        assert example.media[0].size == (28, 28) and colour(example.media[0]) == example.answer
    for example in draw(asked["where"]):
        rows, columns = inked(example.media[0])
        assert CORNERS[2 * (rows.min() >= 14) + (columns.min() >= 14)] == example.answer
        assert (rows.min() >= 14) == (rows.max() >= 14) and (columns.min() >= 14) == (columns.max() >= 14)  # within one cell


def test_a_thing_that_passes_moves_once_to_the_neighbouring_cell():
    for example in draw(ORDERED[0], 30):
        (clip,) = example.media
        corners = [tuple(int(axis.min()) for axis in inked(frame)[::-1]) for frame in clip.frames]
        assert len(clip.frames) == FRAMES and len(set(corners)) == 2
        assert tuple(np.subtract(corners[-1], corners[0])) == WAYS[example.answer]
        assert sum(a != b for a, b in zip(corners, corners[1:])) == 1


@pytest.mark.parametrize("source, place", [(ORDERED[1], 0), (ORDERED[2], -1)], ids=("first", "last"))
def test_flashes_are_two_frames_of_one_thing_each_and_their_order_is_asked(source, place):
    for example in draw(source, 30):
        shown = [colour(frame) for frame in lit(example.media[0])]
        assert len(shown) == 2 and shown[place] == example.answer and set(shown) <= set(example.choices) and shown[0] != shown[1]


def test_a_clip_asks_for_what_images_taught():
    for example in draw(SEEN[0]):
        assert {colour(frame) for frame in example.media[0].frames} == {example.answer} and example.text.startswith("<video>Q:colour?A:")


def test_every_answer_of_an_interview_is_true():
    for example in draw(LEARNED["still"]):
        assert f"Q:colour?A:{colour(example.media[0])}\n" in example.text and example.text.count("?A:") == 3
    for example in draw(LEARNED["flashes"]):
        first, last = (colour(frame) for frame in lit(example.media[0]))
        assert f"Q:first?A:{first}\n" in example.text and f"Q:last?A:{last}\n" in example.text
    for example in draw(LEARNED["album"]):
        assert len(example.media) == 2 and (f"A:{colour(example.media[0])}\n" in example.text) == ("colour" in example.text)


def test_no_picture_of_a_question_is_learned_from_alone_or_in_a_clip():
    """Frame by frame, and the same split for a picture whatever is asked of it."""
    seen = lambda sources, split, count: {frame.tobytes() for source in sources for example in draw(source, count, split)  # noqa: E731
                                          for medium in example.media for frame in getattr(medium, "frames", [medium]) if len(inked(frame)[0])}  # fmt: skip
    learned, asked = seen(LEARNED.values(), "train", 150), seen((*IMAGES, *SEEN, *ORDERED), "heldout", 40)
    assert learned.isdisjoint(asked) and len(learned) > 500 and len(asked) > 100


# Arms


@pytest.mark.parametrize("arm, items, frames", [("chunks", 2, 8), ("fewer", 2, 2), ("frames", 8, 8)])
def test_an_arm_reads_a_clip_in_its_own_way(arm, items, frames):
    """A picture is 2 × 2 patches and one token; a chunk of four frames is one token too."""
    tokenizer, (example,) = Tokenizer(), draw(ORDERED[1], 1)
    encoded = encode_example(example, tokenizer, ARMS[arm])
    assert encoded.ids.count(tokenizer.media_pad) == items == len(encoded.items)
    assert sum(len(item.patches) for item in encoded.items) == 4 * frames and {item.grid for item in encoded.items} == {(frames // items, 2, 2)}


def test_fewer_frames_are_the_first_and_the_last():
    (example,) = draw(ORDERED[0], 1)
    apart, fewer = (encode_example(example, Tokenizer(), ARMS[arm]).items for arm in ("frames", "fewer"))
    assert all((a.patches == b.patches).all() for a, b in zip(fewer, (apart[0], apart[-1])))


def test_shuffling_keeps_the_question_and_the_frames():
    examples = draw(ORDERED[1], 20)
    changed = [shuffled(example, random.Random(number)) for number, example in enumerate(examples)]
    assert all(dataclasses.replace(after, media=()) == dataclasses.replace(before, media=()) for before, after in zip(examples, changed))
    frames = lambda example: [frame.tobytes() for frame in example.media[0].frames]  # noqa: E731
    assert all(sorted(frames(before)) == sorted(frames(after)) for before, after in zip(examples, changed))
    assert sum(frames(before) != frames(after) for before, after in zip(examples, changed)) > 10


def test_right_is_what_was_chosen(monkeypatch):
    seen = []
    monkeypatch.setattr(vision_claims.evaluate, "answer", lambda model, examples, tokenizer, blind, **_: seen.append(blind) or [0] * len(examples))
    found = vision_claims._right(None, ORDERED[:2], 80, blind=True)
    assert set(found) == {"moves", "first"} and seen == [True, True] and all(len(right) == 80 and 0.1 < np.mean(right) < 0.4 for right in found.values())


# Claims


def cell(images, seen, ordered, documents=10):
    """A cell with two questions per source, answered alike."""
    right = {source.name: values for sources, values in ((IMAGES, images), (SEEN, seen), (ORDERED, ordered)) for source in sources}
    return {"right": right, "documents": {"still": documents, "passing": 5, "flashes": 5}}


def test_claims_are_judged_on_their_own_questions():
    """Chunks see all, fewer frames half, all frames apart as much; images alone are as good; zero-shot from grey 0 to 1."""
    whole, half = [1, 1], [1, 0]
    start = {"right": cell(whole, whole, half)["right"], "blind": {s.name: [0, 0] for s in SEEN}, "untrained": {s.name: half for s in SEEN}}
    read = {"zero-shot": [start] * 2, "chunks": [cell(whole, whole, whole) | {"shuffled": {s.name: half for s in ORDERED}}] * 2, "fewer": [cell(whole, whole, half)] * 2,
            "frames": [cell(whole, whole, whole)] * 2, "images": [cell(whole, whole, whole, 12)] * 2}  # fmt: skip
    same, longer, order, zero = vision_claims._claims(read)
    assert same.verdict == REPLICATES and "10 images and 10 clips" in same.setup and "12 images alone" in same.setup
    assert "gain 0.500" in longer.found and longer.verdict == REPLICATES and "shuffled 0.500" in longer.found
    assert order.verdict == REPLICATES and "difference 0.000" in order.found
    assert "gain 1.000 [1.000, 1.000]" in zero.found and zero.verdict == REPLICATES and "untrained 0.500" in zero.found
    read |= {"chunks": read["fewer"], "fewer": read["chunks"], "images": [cell(whole, whole, whole)] * 2}
    read["chunks"] = [dict(one, shuffled={s.name: half for s in ORDERED}) for one in read["chunks"]]
    assert [claim.verdict for claim in vision_claims._claims(read)] == [REPLICATES, NOT, NOT, REPLICATES]


def test_the_whole_experiment_runs_and_is_kept(tmp_path):
    scale = Scale(tmp_path, (1,), quick=True, workers=0)
    claims = moonvit3d(scale)
    assert len(claims) == 4 and {claim.verdict for claim in claims} <= {REPLICATES, DIRECTION, NOT}
    assert (tmp_path / "moonvit3d" / claims[0].plot).stat().st_size > 10000
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "moonvit3d" / "cells").glob("*.json")}
    assert {path.stem for path in kept} == {f"{name}-1" for name in ("start", *ARMS)}
    assert moonvit3d(scale) == claims
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "moonvit3d" / "cells").glob("*.json")} == kept
