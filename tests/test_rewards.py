"""Claims about rewards.py: right answers score 1, nearer ones never less, nothing is won by tricks, failures are not zeros.

Run: .venv/bin/python -m pytest tests/test_rewards.py
"""

import asyncio
import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import rewards
from example import _mirror_text
from pictures import COLOURS, SHAPES, SIDE, Scene, Thing, box_text, contour_text, point_text
from rewards import (
    LONGEST,
    MOST,
    Score,
    box_f1,
    click_inside,
    collect,
    count_score,
    drawing_iou,
    exact_match,
    guarded,
    invalid,
    levenshtein,
    mask_iou,
    normalise,
    number_match,
    ocr_score,
    point_f1,
    polygon_iou,
    polygon_mask,
)

# A right answer for each reward.
RIGHT = {
    exact_match: "Paris", number_match: "3.5", count_score: "4", box_f1: "[1 2 30 40] [50 2 60 9]", point_f1: "(3 4) (50 60)",
    polygon_iou: "{10 10 50 12 30 60}", ocr_score: "Stop sign", drawing_iou: "circle red 0 0;square blue 2 1",
}  # fmt: skip
EVERY = [*RIGHT, click_inside]
TRUTHS = RIGHT | {click_inside: "[1 2 30 40]"}
each = pytest.mark.parametrize("reward", EVERY, ids=lambda reward: reward.__name__)

cells = st.integers(0, 99)
points = st.tuples(cells, cells)
boxes = st.tuples(cells, cells, cells, cells).map(lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])))


def text_of(items, brackets="[]"):
    return " ".join(brackets[0] + " ".join(map(str, item)) + brackets[1] for item in items) or "none"


def f1_of(given_boxes, true_boxes):
    return box_f1(text_of(given_boxes), text_of(true_boxes)).value


def points_f1_of(given_points, true_points, **settings):
    return point_f1(text_of(given_points, "()"), text_of(true_points, "()"), **settings).value


# Scores


def test_a_score_is_in_bounds_or_invalid_and_nan():
    assert Score(0.5).valid and not invalid("judge down").valid and math.isnan(invalid("judge down").value)
    for value, valid in ((1.5, True), (-0.1, True), (math.nan, True), (0.0, False)):
        with pytest.raises(ValueError, match="valid"):
            Score(value, valid)


@pytest.mark.parametrize("reward", RIGHT, ids=lambda reward: reward.__name__)
def test_the_right_answer_scores_1(reward):
    assert reward(RIGHT[reward], RIGHT[reward]) == Score(1.0, True, reward(RIGHT[reward], RIGHT[reward]).why)


@each
@given(st.text(max_size=60) | st.text(alphabet="0123456789 []{}()-.,;\nabe−", max_size=60))
def test_any_answer_gets_a_valid_score_in_bounds(reward, answer):
    score = reward(answer, TRUTHS[reward])
    assert score.valid and 0 <= score.value <= 1


HUGE = {
    "long": "x" * 10**6, "brackets": "[" * 10**6, "nested": "[(" * 2000, "boxes": "[1 2 3 4] " * 5000, "points": "(1 2)" * 5000,
    "corners": "{" + "1 2 " * 5000 + "}", "number": "9" * 10**6, "digits": "9" * 4000, "commas": "1,000" * 800, "nothing": "",
    "nan": "[nan nan nan nan] (nan inf) {nan}", "negative": "[-1 -2 3 4] (-1 2) -5", "floats": "[1.5 2 3 4] (1e1 2)",
    "other digits": "[١ ٢ ٣ ٤] (²  3) ٣", "surrogate": "\ud800 [1 2 3 9]", "zeros": "\x00[1 2 3 9]\x00", "large": "[1 2 3 100]",
    "turned": "[30 40 1 2]", "many": "circle red 0 0;" * 5000, "marks": "e\u0301" * 2000,
}  # fmt: skip


@each
@pytest.mark.parametrize("name", HUGE)
def test_hostile_answers_are_valid_and_far_from_right(reward, name):
    score = reward(HUGE[name], TRUTHS[reward])
    assert score.valid and score.value <= 0.5 and len(score.why) <= 200


@each
@pytest.mark.parametrize("answer", [None, 3, b"(1 2)", ["4"]])
def test_an_answer_that_is_no_text_scores_0(reward, answer):
    assert reward(answer, TRUTHS[reward]).value == 0 or (answer == 3 and reward in (number_match, count_score))


def test_what_is_too_long_or_too_many_is_refused_before_anything_is_matched(monkeypatch):
    monkeypatch.setattr("scipy.optimize.linear_sum_assignment", None)
    assert "5001 characters" in box_f1("x" * 5001, "[1 2 3 4]").why
    assert f"more than {MOST}" in box_f1("[1 2 3 4]" * (MOST + 1), "[1 2 3 4]").why
    assert f"more than {MOST} corners" in polygon_iou("{" + "1 2 " * (MOST + 1) + "}", "{1 2 3 4 9 9}").why
    assert f"more than {MOST} lines" in drawing_iou("circle red 0 0;" * (MOST + 1), "circle red 0 0").why
    assert not box_f1("[1 2 3 4]" * MOST, "[1 2 3 4]").valid  # it would have been matched


# Failures of the verifier are not zeros


@each
@pytest.mark.parametrize("truth", [None, "", "  \n"])
def test_bug62_missing_truth_is_invalid_never_0(reward, truth):
    score = reward("4 (5 5) [1 2 3 4]", truth)
    assert not score.valid and math.isnan(score.value) and "no ground truth" in score.why


@pytest.mark.parametrize(
    "reward, truth",
    [(box_f1, "[1 2 3]"), (box_f1, "[3 4 1 2]"), (box_f1, "[1 2 x9 4]"),
     (point_f1, "(1 100)"), (polygon_iou, "{1 2 3 4}"), (polygon_iou, "none"),
     (count_score, "many"), (count_score, "-1"), (number_match, "?"), (drawing_iou, "oval red 0 0"), (click_inside, "(1 2)"),
     (click_inside, "[1 2 3 4] [5 6 7 8]"), (ocr_score, "x" * (LONGEST + 1)), (exact_match, 5)],
)  # fmt: skip
def test_bug62_truth_that_cannot_be_read_is_invalid(reward, truth):
    score = reward("(1 2)", truth)
    assert not score.valid and score.why


def test_bug62_a_verifier_that_fails_is_invalid_and_a_cancelled_one_passes_on():
    def raises(error):
        @guarded
        def verifier(answer, truth):
            raise error

        return verifier

    for error in (TimeoutError("5 s"), RuntimeError("judge down"), KeyError("score"), MemoryError(), RecursionError()):
        score = raises(error)("a", "b")
        assert not score.valid and type(error).__name__ in score.why
    with pytest.raises(asyncio.CancelledError):
        raises(asyncio.CancelledError())("a", "b")


@pytest.mark.parametrize("number, valid", [(0.5, True), (1, True), (1.5, False), (-1, False), (math.nan, False), ("high", False)])
def test_bug62_numbers_of_a_judge_outside_of_0_to_1_are_invalid(number, valid):
    assert guarded(lambda answer, truth: number)("a", "b").valid is valid


def test_bug62_invalid_scores_can_be_dropped_by_a_mask():
    rewards_, valid = collect([Score(1.0), invalid("x"), Score(0.0)])
    assert valid.tolist() == [True, False, True] and rewards_[valid].tolist() == [1.0, 0.0] and rewards_[1].isnan()
    assert rewards_.dtype == torch.float32 and collect([])[1].dtype == torch.bool


# Texts and numbers


@pytest.mark.parametrize("answer", ["paris", " PARIS. ", '"Paris"!', "Ｐａｒｉｓ", "Paris\n"])
def test_exact_match_forgives_case_ends_and_forms_of_letters(answer):
    assert exact_match(answer, "Paris").value == 1


@pytest.mark.parametrize("answer", ["Paris France", "Pari s", "", "not Paris", "Pariß"])
def test_exact_match_forgives_nothing_else(answer):
    assert exact_match(answer, "Paris").value == 0


@given(st.text(max_size=30))
def test_normalising_twice_is_normalising_once_up_to_what_unicode_folds_again(text):
    assert normalise(normalise(normalise(text))) == normalise(normalise(text))


@pytest.mark.parametrize(
    "answer, value",
    [("7", 1), ("3 + 4 = 7", 1), ("7 or 8", 0), ("7.0", 1), ("−7", 0), ("70e-1", 1), ("seven", 0), ("7,000", 0), ("x7", 1)],
)
def test_the_last_number_counts(answer, value):
    assert number_match(answer, "7").value == value


def test_numbers_match_within_a_tolerance():
    assert number_match("3.1415926", math.pi, tolerance=1e-6).value == 1
    assert number_match("3.14", math.pi).value == 0 and number_match("3.14", math.pi, tolerance=1e-2).value == 1
    assert number_match("1,234,567.5", "1234567.5").value == 1


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_a_nearer_count_never_scores_less_and_counting_is_symmetric(a, b, truth):
    near, far = sorted((a, b), key=lambda n: abs(n - truth))
    assert count_score(str(near), truth).value >= count_score(str(far), truth).value
    assert count_score(str(a), b).value == count_score(str(b), a).value
    assert (count_score(str(a), truth).value == 1) == (a == truth)


@pytest.mark.parametrize("answer, value", [("4", 1), ("5", 1 / 2), ("2 apples", 1 / 3), ("14", 1 / 11), ("-4", 0), ("4.5", 0), ("four", 0)])
def test_a_count_scores_one_over_one_plus_the_difference(answer, value):
    assert count_score(answer, 4).value == pytest.approx(value) and count_score(answer, "4").value == pytest.approx(value)


# Boxes and points


def test_boxes_of_a_hand_worked_case():
    """[0 0 9 9] and [0 0 9 4] are 100 and 50 cells: IoU 1/2. One true box is missed: F1 = 2 · ½ / (1 + 2)."""
    score = box_f1("It is at [0 0 9 4].", "[0 0 9 9] [50 50 60 60]")
    assert score.value == pytest.approx(1 / 3) and "precision 0.500, recall 0.250" in score.why


def test_optimal_matching_beats_greedy():
    """The first answer is nearest to the true box that the second one needs."""
    true, given_ = [(0, 0, 9, 9), (5, 0, 14, 9)], [(4, 0, 13, 9), (6, 0, 15, 9)]
    overlaps = rewards.box_overlaps(np.array(given_), np.array(true))
    best = max(overlaps[0, 0] + overlaps[1, 1], overlaps[0, 1] + overlaps[1, 0])
    assert f1_of(given_, true) == pytest.approx(best / 2) and overlaps[0].argmax() == 1 == overlaps[1].argmax()


@given(st.lists(boxes, max_size=4), st.lists(boxes, max_size=4), st.randoms())
def test_boxes_permutation_invariance_bounds_and_identity(a, b, rng):
    value = f1_of(a, b)
    shuffled = rng.sample(a, len(a)), rng.sample(b, len(b))
    assert 0 <= value <= 1 and f1_of(*shuffled) == pytest.approx(value) and f1_of(a, a) == 1


@given(st.lists(boxes, max_size=4, unique=True), st.lists(boxes, max_size=4, unique=True))
def test_boxes_are_symmetric_without_copies(a, b):
    assert f1_of(a, b) == pytest.approx(f1_of(b, a))


@given(st.lists(points, max_size=4), st.lists(points, max_size=4), st.randoms())
def test_points_permutation_invariance_bounds_and_identity(a, b, rng):
    value = points_f1_of(a, b)
    assert 0 <= value <= 1 and points_f1_of(rng.sample(a, len(a)), rng.sample(b, len(b))) == pytest.approx(value)
    assert points_f1_of(a, a) == pytest.approx(1, abs=1e-12)


@given(st.lists(boxes, min_size=1, max_size=3), st.lists(boxes, max_size=4), st.data())
@example([(0, 0, 9, 9)], [(0, 0, 9, 9), (1, 0, 10, 9)], None)
def test_repeating_a_box_never_raises_f1(given_, true, data):
    """Reward hacking: near true boxes that overlap, a copy would find the second one for nothing."""
    again = given_[0] if data is None else data.draw(st.sampled_from(given_))
    if given_.count(again) >= max(true.count(again), 1):
        assert f1_of([*given_, again], true) <= f1_of(given_, true)


@given(st.lists(points, min_size=1, max_size=3), st.lists(points, max_size=4))
def test_repeating_a_point_never_raises_f1(given_, true):
    if given_.count(given_[0]) >= max(true.count(given_[0]), 1):
        assert points_f1_of([*given_, given_[0]], true) <= points_f1_of(given_, true)


@given(boxes, st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_a_nearer_box_never_scores_less(box, a, b, along_x):
    """A box that is moved further, or grows further, along one axis."""
    near, far = sorted((a, b))
    x1, y1, x2, y2 = box

    def moved(step, grow):
        low = (0, 0) if grow else (step * along_x, step * (not along_x))
        return (x1 + low[0], y1 + low[1], x2 + step * along_x, y2 + step * (not along_x))

    for grow in (False, True):
        if max(moved(far, grow)) <= 99:
            assert f1_of([moved(near, grow)], [box]) >= f1_of([moved(far, grow)], [box])


@given(points, points, points)
def test_a_nearer_point_never_scores_less(a, b, true):
    near, far = sorted((a, b), key=lambda p: math.dist(p, true))
    assert points_f1_of([near], [true]) >= points_f1_of([far], [true])


def test_a_point_off_by_sigma_counts_exp_of_minus_one_half():
    assert points_f1_of([(13, 14)], [(10, 10)]) == pytest.approx(math.exp(-0.5))
    assert points_f1_of([(13, 14)], [(10, 10)], sigma=10.0) == pytest.approx(math.exp(-0.125))


@given(st.lists(boxes, min_size=1, max_size=3), st.lists(boxes, min_size=1, max_size=3))
def test_matching_is_the_best_of_all_pairings(a, b):
    a, b = sorted(set(a)), sorted(set(b))
    weights = rewards.box_overlaps(np.array(a), np.array(b))
    weights = weights if len(a) <= len(b) else weights.T
    ways = itertools.permutations(range(weights.shape[1]), weights.shape[0])
    best = max(sum(weights[row, column] for row, column in enumerate(way)) for way in ways)
    assert f1_of(a, b) == pytest.approx(2 * best / (len(a) + len(b)))


@given(boxes, boxes)
def test_overlaps_are_those_of_counted_cells(a, b):
    grid = np.zeros((2, 100, 100), bool)
    for mask, (x1, y1, x2, y2) in zip(grid, (a, b)):
        mask[y1 : y2 + 1, x1 : x2 + 1] = True
    assert rewards.box_overlaps(np.array([a]), np.array([b])).item() == pytest.approx(mask_iou(*grid))


def test_nothing_where_nothing_is_scores_1_and_nothing_else_does():
    for reward, item in ((box_f1, "[1 2 3 4]"), (point_f1, "(1 2)")):
        assert reward("none", "none").value == 1 and reward("There is no cat (sorry).", "none").value == 1
        assert reward(item, "none").value == 0 and reward("none", item).value == 0 and reward("", item).value == 0


def test_spoiled_brackets_count_as_predictions_and_prose_does_not():
    assert box_f1("[1 2 30 40] [1 2 3]", "[1 2 30 40]").value == pytest.approx(2 / 3)
    assert box_f1("[see above] [1 2 30 40]", "[1 2 30 40]").value == 1
    assert box_f1("[1, 2, 30, 40]", "[1 2 30 40]").value == 1 and box_f1("[1 2 30 100]", "[1 2 30 40]").value == 0
    assert point_f1("(3 4 5)", "(3 4)").value == 0


# Polygons


def test_a_rectangle_is_its_cells():
    mask = polygon_mask(np.array([[10, 20], [30, 20], [30, 25], [10, 25]]))
    assert mask.sum() == 21 * 6 and mask[20:26, 10:31].all()
    assert polygon_iou("{10 20 30 20 30 25 10 25}", "{10 20 19 20 19 25 10 25}").value == pytest.approx(60 / 126)


@given(st.lists(points, min_size=3, max_size=6), st.randoms())
def test_a_polygon_is_its_own_whatever_corner_and_direction_it_begins_with(corners, rng):
    turn = rng.randrange(len(corners))
    turned = corners[turn:] + corners[:turn]
    numbers = [" ".join(f"{x} {y}" for x, y in order) for order in (corners, turned, corners[::-1])]
    assert all(polygon_iou("{%s}" % n, "{%s}" % numbers[0]).value == 1 for n in numbers)
    assert polygon_mask(np.array(corners)).any()


@given(st.lists(points, min_size=3, max_size=4), st.lists(points, min_size=3, max_size=4))
def test_polygons_are_symmetric_and_bounded(a, b):
    a, b = ("{" + " ".join(f"{x} {y}" for x, y in corners) + "}" for corners in (a, b))
    assert 0 <= polygon_iou(a, b).value == polygon_iou(b, a).value <= 1


def test_a_polygon_moved_further_never_scores_more():
    values = [polygon_iou(f"{{{10 + d} 10 {40 + d} 12 {25 + d} 50}}", "{10 10 40 12 25 50}").value for d in range(0, 50, 5)]
    assert values == sorted(values, reverse=True) and values[0] == 1 and values[-1] == 0


@given(st.lists(points, min_size=3, max_size=3))
def test_pillow_draws_the_same_triangle_but_for_its_outline(corners):
    """Pillow's outline covers more cells, all of which touch the edge; none is missing."""
    image = Image.new("1", (100, 100))
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners], fill=1, outline=1)
    theirs, ours = np.array(image), polygon_mask(np.array(corners))
    assert not (ours & ~theirs).any()
    for y, x in np.argwhere(theirs & ~ours):
        gaps = []
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1]):
            length = math.dist((x1, y1), (x2, y2)) or 1.0
            along = max(0.0, min(1.0, ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / length**2))
            gaps.append(math.dist((x, y), (x1 + along * (x2 - x1), y1 + along * (y2 - y1))))
        assert min(gaps) < 1


def test_contours_together_are_one_mask_and_a_spoiled_one_spoils_all():
    halves = "{0 0 9 0 9 9 0 9} {10 0 19 0 19 9 10 9}"
    assert polygon_iou(halves, "{0 0 19 0 19 9 0 9}").value == 1
    assert polygon_iou("{0 0 9 0 9 9 0 9} {1 2 3}", "{0 0 9 0 9 9 0 9}").value == 0


# Writing


@functools.cache
def edits(a, b):
    """The definition, recursively."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.text(alphabet="abé", max_size=7), st.text(alphabet="abé", max_size=7), st.text(alphabet="abé", max_size=7))
def test_the_edit_distance_is_its_definition_and_a_metric(a, b, c):
    assert levenshtein(a, b) == edits(a, b) == levenshtein(b, a)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c) and (levenshtein(a, b) == 0) == (a == b)


def test_the_edit_distance_of_long_texts():
    """Beyond the width of a machine word: a known number of changes."""
    rng = random.Random(0)
    text = "".join(rng.choice("abcd") for _ in range(600))
    changed = "".join("x" if place % 20 == 0 else c for place, c in enumerate(text))
    assert levenshtein(text, changed) == 30 and levenshtein(text, text[5:]) == 5 and levenshtein("", text) == 600


@pytest.mark.parametrize(
    "answer, truth, value",
    [("Stop", "Stop", 1), ("Stap", "Stop", 3 / 4), ("Sto", "Stop", 3 / 4), ("stop", "Stop", 3 / 4), (" Stop\n", "Stop", 1),
     ("", "Stop", 0), ("e\u0301", "é", 1), ("abcdefgh", "Stop", 0)],
)  # fmt: skip
def test_ocr_of_hand_worked_texts(answer, truth, value):
    assert ocr_score(answer, truth).value == pytest.approx(value)


@given(st.text(alphabet="ab é", min_size=1, max_size=8), st.text(alphabet="ab é", min_size=1, max_size=8))
def test_ocr_is_symmetric_and_padding_the_answer_does_not_pay(a, b):
    if a.strip() and b.strip():
        assert ocr_score(a, b).value == pytest.approx(ocr_score(b, a).value)
        assert ocr_score(b + "x" * 50, b).value < 1


# Drawings and clicks


programs = st.lists(
    st.tuples(st.sampled_from(SHAPES), st.sampled_from(sorted(COLOURS)), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4
).map(lambda lines: ";".join(" ".join(map(str, line)) for line in lines))


@given(programs, programs)
def test_drawings_are_symmetric_bounded_and_their_own(a, b):
    assert 0 <= drawing_iou(a, b).value == drawing_iou(b, a).value <= 1 and drawing_iou(a, a).value == 1


def test_a_drawing_needs_shape_place_and_colour():
    truth = "square red 1 2;circle blue 0 0"
    assert drawing_iou("circle blue 0 0\nsquare red 1 2", truth).value == 1
    half = drawing_iou("square red 1 2", truth).value
    assert 0 < drawing_iou("square red 1 2;circle green 0 0", truth).value <= half < 1
    assert drawing_iou("square red 2 2", "square red 1 2").value == 0 and drawing_iou("square rot 1 2", truth).value == 0
    assert drawing_iou(";", truth).value == 0 and drawing_iou(";", ";").value == 1


@pytest.mark.parametrize("answer, value", [("(10 20)", 1), ("(30 40)", 1), ("(31 40)", 0), ("(9 20)", 0), ("click (15, 30).", 1),
                                           ("(15 30) (16 30)", 0), ("(15 30) (1)", 0), ("none", 0)])  # fmt: skip
def test_a_click_is_one_point_in_the_box(answer, value):
    assert click_inside(answer, "[10 20 30 40]").value == value


# With the project's own pictures


def test_what_the_sources_write_is_right():
    """Boxes, points and contours of things as pictures.py writes them, and their mirror images as example.py writes those."""
    things = [Thing("square", "red", 3, 5, 20, 22), Thing("circle", "blue", 30, 30, 50, 51), Thing("triangle", "green", 30, 2, 44, 20)]
    for reward, write in ((box_f1, box_text), (point_f1, point_text), (polygon_iou, contour_text)):
        text = " ".join(map(write, things))
        assert reward(text, " ".join(map(write, things[::-1]))).value == 1
        mirrored = " ".join(map(write, Scene(tuple(things)).mirrored().things))
        assert reward(_mirror_text(text), mirrored).value > 0.85  # rounding of places
        assert reward(text, mirrored).value < 0.75
    assert click_inside(point_text(things[0]), box_text(things[0])).value == 1 and SIDE == 56
