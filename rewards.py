"""Rule-based rewards: what a model wrote, and the truth, to a score — K2.5 report 4.4.2, appendix D.

    exact_match    1 if both are the same text after `normalise`, else 0
    number_match   1 if the last number of the answer is the true one, within a relative tolerance, else 0
    count_score    1 / (1 + |count − true count|)
    box_f1         soft F1 of boxes `[x1 y1 x2 y2]`, a match counting its IoU, under optimal matching
    point_f1       soft F1 of points `(x y)`, a match counting exp(−d² / 2σ²), under optimal matching
    polygon_iou    IoU of the masks of contours `{x y x y …}`
    ocr_score      1 − edit distance / length of the longer text
    drawing_iou    IoU of the pictures that two drawing programs draw
    click_inside   1 if the one point lies in the true box, else 0

Each is called as reward(answer, truth), both text in the same notation, and returns a Score. Coordinates are those of
example.py: integers 0…99 of width and height. They name cells of a 100×100 grid, and a box holds both its ends: `[5 5 5 5]`
is one cell. Numbers may be parted by spaces or commas. Brackets without a digit are prose; brackets with digits that
break the notation are *spoiled*: they count as predictions, and match nothing.

An answer that cannot be read scores 0 and is valid: the model's own fault. Truth that is missing (None or blank) or cannot
be read, and a verifier that raises or runs out of time, give an *invalid* score, NaN and never 0: such a response must
leave the batch, baseline included (`collect` makes the mask). An empty list of boxes or points is any text without
brackets, "none" say; against an empty truth it scores 1, everything else 0.

Answers longer than LONGEST characters, or with more than MOST brackets, lines or corners, are malformed. Up to
there reading takes linear time, whatever the text; nothing here raises on an answer.

Public names: Score, collect, invalid, guarded, normalise, exact_match, number_match, count_score, box_f1, point_f1,
polygon_iou, ocr_score, drawing_iou, click_inside; on arrays: box_overlaps, point_weights, soft_f1, polygon_mask, mask_iou,
levenshtein; LONGEST, MOST, GRID, SIGMA.
Letters: N predicted, M true, D numbers of each, V corners.     Tests: pytest tests/test_rewards.py
"""

import functools
import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from pictures import PAPER, DrawError, draw_program

GRID = 100  # cells a side: coordinates are 0…99
LONGEST = 4096  # characters of an answer
MOST = 128  # boxes, points, corners, lines of a program
SIGMA = 5.0  # cells: a point off by this much counts exp(−½) = 0.61


class _MalformedError(ValueError):
    """An answer that breaks its notation; the message says how."""


@dataclass(frozen=True)
class Score:
    """What one answer is worth. Raises ValueError when value and valid contradict each other."""

    value: float  # 0…1; NaN when not valid, so that nobody takes it for a 0
    valid: bool = True  # False: the verifier failed, nothing is known of the answer
    why: str = ""  # one line

    def __post_init__(self):
        if not (0 <= self.value <= 1 if self.valid else math.isnan(self.value)):
            raise ValueError(f"a score of {self.value} that is {'valid' if self.valid else 'invalid'}: "
                             "valid ones lie in 0…1, invalid ones are NaN")  # fmt: skip


def invalid(why):
    """The Score of an answer about which nothing is known."""
    return Score(math.nan, False, why)


def collect(scores):
    """Scores as a batch: rewards (B,) float32, NaN where invalid, and valid (B,) bool."""
    return torch.tensor([score.value for score in scores]), torch.tensor([score.valid for score in scores], dtype=torch.bool)


def guarded(verifier):
    """A verifier (answer, truth, …) → Score or number, as one that never raises.

    Missing truth, any exception (a TimeoutError of a killed process, say) and numbers outside 0…1 become invalid scores.
    It sets no time limit: a busy loop can only be ended from outside, by killing its process. Cancelling an asyncio task
    passes through.
    """

    @functools.wraps(verifier)
    def reward(answer, truth, **settings):
        if truth is None or isinstance(truth, str) and not truth.strip():
            return invalid("no ground truth")
        try:
            found = verifier(answer, truth, **settings)
            return found if isinstance(found, Score) else Score(float(found))
        except Exception as error:  # whatever goes wrong in a verifier says nothing about the answer
            return invalid(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    return reward


def _rule(read):
    """A reward from read(text) → what it says, and the decorated score(answer's, truth's, …) → (value, why)."""

    def decorate(score):
        @functools.wraps(score)
        def reward(answer, truth, **settings):
            try:
                true = read(truth)
            except _MalformedError as error:
                return invalid(f"the truth is malformed: {error}"[:200])
            try:
                given = read(answer)
            except _MalformedError as error:
                return Score(0.0, True, f"malformed: {error}"[:200])
            value, why = score(given, true, **settings)
            return Score(min(max(float(value), 0.0), 1.0), True, why)  # rounding

        return guarded(reward)

    return decorate


# -------------------------------------------------------------------------------------------- reading


def _text(answer):
    if not isinstance(answer, str):
        raise _MalformedError(f"a {type(answer).__name__} instead of a text")
    if len(answer) > LONGEST:
        raise _MalformedError(f"{len(answer)} characters, more than {LONGEST}")
    return answer


def normalise(text):
    """The form in which texts are compared: Unicode NFKC, case folded, runs of white space one space, none of them nor of
    . , ; : ! ? and quotes at the ends. Raises ValueError for what is no text or longer than LONGEST."""
    words = unicodedata.normalize("NFKC", _text(text)).casefold().split()
    return " ".join(words).strip(" .,;:!?'\"`‘’“”")


_NUMBER = re.compile(r"[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?", re.ASCII)


def _number(answer):
    """The last number of a text; 1,234 is one number."""
    found = _NUMBER.findall(_text(str(answer) if isinstance(answer, int | float) else answer))
    if not found:
        raise _MalformedError("no number")
    value = float(found[-1].replace("−", "-").replace(",", ""))
    if not math.isfinite(value):
        raise _MalformedError("a number too large")
    return value


def _count(answer):
    value = _number(answer)
    if value < 0 or value != int(value):
        raise _MalformedError(f"{value:g} is no count")
    return int(value)


_BRACKETS = {"box": re.compile(r"\[([^\[\]]*)\]"), "point": re.compile(r"\(([^()]*)\)"), "contour": re.compile(r"\{([^{}]*)\}")}


def _groups(answer, kind):
    """The numbers of each pair of brackets of that kind, None for a spoiled one."""
    found = [group for group in _BRACKETS[kind].findall(_text(answer)) if any(c.isdigit() for c in group)]
    if len(found) > MOST:
        raise _MalformedError(f"{len(found)} of kind {kind}, more than {MOST}")
    for group in found:
        words = group.replace(",", " ").split()
        good = all(re.fullmatch("[0-9]{1,2}", word) for word in words)
        yield [int(word) for word in words] if good else None


def _boxes(answer):
    """The well-formed boxes (N,4) and the number of spoiled ones."""
    groups = list(_groups(answer, "box"))
    good = [g for g in groups if g and len(g) == 4 and g[0] <= g[2] and g[1] <= g[3]]
    return np.array(good, dtype=np.int64).reshape(-1, 4), len(groups) - len(good)


def _points(answer):
    """The well-formed points (N,2) and the number of spoiled ones."""
    groups = list(_groups(answer, "point"))
    good = [g for g in groups if g and len(g) == 2]
    return np.array(good, dtype=np.int64).reshape(-1, 2), len(groups) - len(good)


def _contours(answer):
    """The mask of all contours together; one spoiled contour spoils the answer."""
    groups = list(_groups(answer, "contour"))
    if not groups:
        raise _MalformedError("no contour")
    if not all(g and len(g) >= 6 and len(g) % 2 == 0 for g in groups):
        raise _MalformedError("a contour wants three or more points of two numbers 0…99")
    if sum(map(len, groups)) > 2 * MOST:
        raise _MalformedError(f"more than {MOST} corners")
    return np.any([polygon_mask(np.array(g).reshape(-1, 2)) for g in groups], axis=0)


def _picture(answer):
    """The pixels that a drawing program draws."""
    if sum(mark in "\n;" for mark in _text(answer)) >= MOST:
        raise _MalformedError(f"more than {MOST} lines")
    try:
        return np.asarray(draw_program(answer))
    except DrawError as error:
        raise _MalformedError(str(error)) from None


# ------------------------------------------------------------------------------------------- matching


def box_overlaps(predicted, targets):
    """IoU of every predicted with every true box, in cells, both ends included.

        w = min(x2, x2') − max(x1, x1') + 1, h likewise;   IoU = w h / (area + area' − w h), 0 where w or h is not positive

    predicted: (N,4) int; targets: (M,4) int — x1 y1 x2 y2. Returns (N,M) float64.
    """
    a, b = predicted[:, None], targets[None]  # (N,1,4), (1,M,4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1  # (N,M,2)
    both = sides.clip(0).prod(-1)  # (N,M)
    area = lambda boxes: (boxes[..., 2:] - boxes[..., :2] + 1).prod(-1)  # noqa: E731
    return both / (area(a) + area(b) - both)


def point_weights(predicted, targets, sigma=SIGMA):
    """exp(−d² / 2σ²) of every predicted with every true point, d their distance in cells.

    predicted: (N,2); targets: (M,2); sigma: float > 0, cells. Returns (N,M) float64.
    """
    square = ((predicted[:, None].astype(float) - targets[None]) ** 2).sum(-1)  # (N,M)
    return np.exp(-square / (2 * sigma**2))


def soft_f1(predicted, targets, weights, spoiled=0):
    """F1 of predictions against the truth, each match counting its weight.

        S = the largest Σ weights[n, m] over pairs in which no n and no m comes twice
        precision = S / N,   recall = S / M,   F1 = 2 S / (N + M)

    A prediction may match as often as it stands in the truth, and once at least; further copies count in N and match
    nothing, so that repeating one never pays. Without predictions and truth all three are 1, without one of them 0.
    predicted: (N,D) int; targets: (M,D) int; weights: (N,M) float in 0…1; spoiled: int — predictions that could not be
    read, which count in N. Returns (F1, precision, recall), floats.
    """
    from scipy.optimize import linear_sum_assignment  # takes half a second, which most users of this module are spared

    wanted, seen = Counter(map(tuple, targets.tolist())), Counter()
    number, true = len(predicted) + spoiled, len(targets)
    if not number or not true:
        same = float(number == true)
        return same, same, same
    weights = weights.copy()
    for row, item in enumerate(map(tuple, predicted.tolist())):
        seen[item] += 1
        if seen[item] > max(wanted[item], 1):
            weights[row] = 0.0
    total = float(weights[linear_sum_assignment(weights, maximize=True)].sum())
    return 2 * total / (number + true), total / number, total / true


def polygon_mask(corners):
    """The cells of a polygon: (V,2) int corners x y, of which the last joins the first, to (GRID,GRID) bool, rows are y.

    A cell belongs to it if its middle lies inside by the even-odd rule, or on an edge. Integers throughout: no rounding
    decides about a cell, so that any program can draw the same mask.
    """
    y, x = np.mgrid[:GRID, :GRID]
    inside, edge = np.zeros((2, GRID, GRID), bool)
    for (x1, y1), (x2, y2) in zip(corners.tolist(), np.roll(corners, -1, axis=0).tolist()):
        side = (x - x1) * (y2 - y1) - (y - y1) * (x2 - x1)  # 0 on the line, its sign tells the sides apart
        within = (min(x1, x2) <= x) & (x <= max(x1, x2)) & (min(y1, y2) <= y) & (y <= max(y1, y2))
        edge |= (side == 0) & within
        inside ^= ((y1 <= y) != (y2 <= y)) & ((side < 0) == (y2 > y1))  # a ray to the right crosses this edge
    return inside | edge


def mask_iou(predicted, target):
    """IoU of two masks of one shape: cells in both over cells in either; 1 when both are empty."""
    either = (predicted | target).sum()
    return float((predicted & target).sum() / either) if either else 1.0


def levenshtein(a, b):
    """Insertions, deletions and substitutions that turn one text into the other. Returns int.

    Hyyrö's bit-parallel form of Myers' algorithm (2003): one column of the table of distances is two numbers, whose bit i
    says that the distance grows (`up`) or falls (`down`) by 1 from row i to row i + 1.
    """
    if not a:
        return len(b)
    where = {}  # character → the places of a where it stands, as bits
    for place, character in enumerate(a):
        where[character] = where.get(character, 0) | 1 << place
    every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = every, 0, len(a)
    for character in b:
        equal = where.get(character, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right_up, right_down = down | ~(diagonal | up) & every, up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up, right_down = (right_up << 1 | 1) & every, right_down << 1 & every
        up, down = right_down | ~(diagonal | right_up) & every, right_up & diagonal
    return distance


# -------------------------------------------------------------------------------------------- rewards


@_rule(normalise)
def exact_match(answer, truth):
    """1 if the texts are the same after `normalise`, else 0."""
    return answer == truth, f"{answer[:40]!r} for {truth[:40]!r}"


@_rule(_number)
def number_match(answer, truth, tolerance=1e-6):
    """1 if the last number of the answer is within tolerance · max(1, |truth|) of the truth, else 0."""
    return abs(answer - truth) <= tolerance * max(1.0, abs(truth)), f"{answer:g} for {truth:g}"


@_rule(_count)
def count_score(answer, truth):
    """1 / (1 + |count − true count|), the count being the last number of the answer; less than 0 or broken is malformed."""
    return 1 / (1 + abs(answer - truth)), f"{answer} for {truth}"


def _f1(answer, truth, weights):
    (given, spoiled), (true, broken) = answer, truth
    if broken:
        raise ValueError("the truth breaks its notation")
    f1, precision, recall = soft_f1(given, true, weights(given, true), spoiled)
    return f1, f"precision {precision:.3f}, recall {recall:.3f}; {len(given)} good and {spoiled} spoiled for {len(true)}"


@_rule(_boxes)
def box_f1(answer, truth):
    """`soft_f1` of boxes `[x1 y1 x2 y2]` by `box_overlaps`."""
    return _f1(answer, truth, box_overlaps)


@_rule(_points)
def point_f1(answer, truth, sigma=SIGMA):
    """`soft_f1` of points `(x y)` by `point_weights`."""
    return _f1(answer, truth, functools.partial(point_weights, sigma=sigma))


@_rule(_contours)
def polygon_iou(answer, truth):
    """IoU of the `polygon_mask`s of contours `{x y x y …}`, several contours being one mask."""
    return mask_iou(answer, truth), f"{answer.sum()} cells for {truth.sum()}"


@_rule(lambda text: unicodedata.normalize("NFC", _text(text)).strip())
def ocr_score(answer, truth):
    """1 − levenshtein / length of the longer one, in code points of Unicode NFC, white space at the ends left out."""
    distance = levenshtein(answer, truth)
    return 1 - distance / max(len(answer), len(truth), 1), f"{distance} edits in {len(truth)} characters"


@_rule(_picture)
def drawing_iou(answer, truth):
    """IoU of what two drawing programs draw: pixels of one colour in both, over pixels that are not paper in either."""
    inked, wanted = ((picture != PAPER).any(-1) for picture in (answer, truth))
    both, either = (inked & wanted & (answer == truth).all(-1)).sum(), (inked | wanted).sum()
    return both / either if either else 1.0, f"{both} of {either} pixels"


@guarded
def click_inside(answer, truth):
    """1 if the only point `(x y)` of the answer lies in the true box `[x1 y1 x2 y2]`, its border included, else 0."""
    boxes, broken = _boxes(truth)
    if len(boxes) != 1 or broken:
        raise ValueError("the truth must be one box")
    try:
        points, spoiled = _points(answer)
    except _MalformedError as error:
        return Score(0.0, True, f"malformed: {error}")
    if len(points) != 1 or spoiled:
        return Score(0.0, True, f"malformed: {len(points) + spoiled} points instead of one")
    (x, y), (x1, y1, x2, y2) = points[0].tolist(), boxes[0].tolist()
    return Score(float(x1 <= x <= x2 and y1 <= y <= y2), True, f"({x} {y}) in {boxes[0]}")
