"""The operations that say what an answer is worth: boxes, points, polygons, writing, counts — K2.5 report 4.4.2.

Public names: OPS, box_f1, point_f1, polygon_iou, ocr_score, count_score.
Letters: N predicted, M true, V and W corners.     Tests: pytest tests/test_ops_rewards.py
"""

import itertools
import math
import random
import unicodedata
from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st

import rewards as rules
from op import Op, Suspect

# ------------------------------------------------------------------------------------ boxes and points


def box_f1(predicted, targets):
    """Soft F1 of boxes: a match counts its IoU, and predictions are matched with the truth so that the sum is largest.

        S = largest Σ IoU over pairs in which no box comes twice;   precision = S / N, recall = S / M, F1 = 2 S / (N + M)

    A box x1 y1 x2 y2 names cells, both ends included: it holds (x2 − x1 + 1)(y2 − y1 + 1) of them. A predicted box may match
    as often as it stands in the truth, and once at least; further copies count in N and match nothing. Without boxes on
    both sides all three are 1, without boxes on one side 0.
    predicted: (N,4) int64; targets: (M,4) int64 — 0…99, x1 ≤ x2, y1 ≤ y2.
    Returns f1, precision, recall: float. Source: K2.5 report 4.4.2 (grounding).
    """
    weights = [[_iou(a, b) for b in targets.tolist()] for a in predicted.tolist()]
    return _soft_f1(predicted.tolist(), targets.tolist(), weights)


def point_f1(predicted, targets, sigma):
    """Soft F1 of points: a match counts exp(−d² / 2σ²), d its distance; the rest as in box_f1.

        S = largest Σ exp(−d² / 2σ²) over pairs in which no point comes twice;   precision = S / N, recall = S / M,
        F1 = 2 S / (N + M);   copies beyond those in the truth match nothing; nothing on both sides is 1, on one side 0

    predicted: (N,2) int64; targets: (M,2) int64 — x y, 0…99; sigma: float — σ.
    Returns f1, precision, recall: float. Source: K2.5 report 4.4.2 (points).
    """
    weights = [[math.exp(-math.dist(a, b) ** 2 / (2 * sigma**2)) for b in targets.tolist()] for a in predicted.tolist()]
    return _soft_f1(predicted.tolist(), targets.tolist(), weights)


def _iou(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1))
    both = max(width, 0) * max(height, 0)
    area, other = ((c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b))
    return both / (area + other - both)


def _largest_pairs(weights):
    from scipy.optimize import linear_sum_assignment  # takes half a second, which most users of this module are spared

    return linear_sum_assignment(weights, maximize=True)


def _soft_f1(predicted, targets, weights):
    number, true = len(predicted), len(targets)
    if not number or not true:
        same = float(number == true)
        return same, same, same
    for row, item in enumerate(predicted):
        if predicted[:row].count(item) >= max(targets.count(item), 1):
            weights[row] = [0.0] * true
    rows, columns = _largest_pairs(weights)
    total = sum(weights[row][column] for row, column in zip(rows, columns))
    return 2 * total / (number + true), total / number, total / true


def _scattered(draw, make, near, step):
    """Predicted and true items, lists, of which parts are left out now and then:

    - a chain, predicted and true items by turns and the middle two nearest to each other: greedy pairing is wrong;
    - a prediction near a true item, perhaps exact, and one more of either kind;
    - far from these two true items, and one prediction written twice.

    make(rng) → an item; near(rng, item) → another one near it; step: from one to the next of the chain, along x.
    """
    rng = random.Random(draw(st.integers(0, 9999)))
    first, predicted, targets = make(rng), [], []
    parts = draw(st.sampled_from(["chain, one", "copies", "", "chain, copies", "one", "true", "one, copies", "predicted", ""]))
    if "chain" in parts:
        chain = [[value + round(step * k) * (1 - place % 2) for place, value in enumerate(first)] for k in (0, 1, 1.8, 2.8)]
        predicted, targets = rng.sample(chain[::2], 2), rng.sample(chain[1::2], 2)
    if "one" in parts:
        one = near(rng, first)
        predicted, targets = [*predicted, one], [*targets, rng.choice([first, one])]
        (predicted if draw(st.booleans()) else targets).insert(0, near(rng, first))
    if "copies" in parts:
        far = [value + 35 for value in first]
        again = near(rng, far)
        predicted, targets = [*predicted, again, again], [*targets, far, near(rng, far)]
    return predicted + [first] * (parts == "predicted"), targets + [first] * (parts == "true")


def _items(predicted, targets, numbers):
    return {name: torch.tensor(items).long().view(-1, numbers) for name, items in (("predicted", predicted), ("targets", targets))}


@st.composite
def _box_cases(draw):
    def make(rng):
        x, y = rng.randint(10, 25), rng.randint(10, 25)
        return [x, y, x + rng.randint(6, 18), y + rng.randint(6, 18)]

    def near(rng, box):
        x, y = (value + rng.randint(-8, 8) for value in box[:2])
        return [x, y, *(max(value + rng.randint(-8, 8), least) for value, least in zip(box[2:], (x, y)))]

    return _items(*_scattered(draw, make, near, 5), 4)


@st.composite
def _point_cases(draw):
    def near(rng, point):
        return [value + rng.randint(-5, 5) for value in point]

    pair = _scattered(draw, lambda rng: [rng.randint(10, 50), rng.randint(10, 50)], near, 4)
    return _items(*pair, 2) | {"sigma": draw(st.sampled_from([5.0, 3.0]))}


def _gauss(a, b, sigma):
    return math.exp(-math.dist(a, b) ** 2 / (2 * sigma**2))


def _best(weights):
    return weights[_largest_pairs(weights)].sum()


def _by_brute_force(weights):
    """Right: every way to pair the smaller side with the other one."""
    weights = weights if len(weights) <= len(weights[0]) else weights.T
    ways = itertools.permutations(range(weights.shape[1]), len(weights))
    return max(sum(weights[row, column] for row, column in enumerate(way)) for way in ways)


def _in_order(weights):
    weights, total = weights.copy(), 0.0
    for row in weights:  # each takes the best that is left; the rows are views
        column = row.argmax()
        total += row[column]
        weights[:, column] = 0.0
    return total


def _best_pair_first(weights):
    weights, total = weights.copy(), 0.0
    for _ in range(min(weights.shape)):
        row, column = np.unravel_index(weights.argmax(), weights.shape)
        total += weights[row, column]
        weights[row], weights[:, column] = 0.0, 0.0
    return total


def _allowed(predicted, targets):
    """Which predictions may match: not the copies beyond those in the truth."""
    return [predicted[:row].count(item) < max(targets.count(item), 1) for row, item in enumerate(predicted)]


def _f1(weigh, match=_best, allowed=_allowed, mean=lambda s, n, m: (2 * s / (n + m), s / n, s / m),
        empty=lambda n, m: 3 * (float(n == m),), change=lambda items: items):  # fmt: skip
    """`box_f1` or `point_f1`, open to mistakes. weigh(a, b, *sigma); match(weights (N,M) array) → S; empty(N, M) where one
    of them is 0; change: of the list of predictions."""

    def score(predicted, targets, *sigma):
        predicted, targets = change(predicted.tolist()), targets.tolist()
        if not predicted or not targets:
            return empty(len(predicted), len(targets))
        weights = np.array([[weigh(a, b, *sigma) for b in targets] for a in predicted], dtype=float)
        weights *= np.array(allowed(predicted, targets))[:, None]
        return tuple(float(x) for x in mean(match(weights), len(predicted), len(targets)))

    return score


def _copies_out(items):
    return [item for row, item in enumerate(items) if item not in items[:row]]


def _with_sides(sides, union=lambda a, b, both: a + b - both, one=1):
    """An IoU by sides(width, height) → the cells in both; one: what is added to a difference of ends."""

    def weigh(a, b):
        both = sides(*(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + one for i in (0, 1)))
        area, other = ((c[2] - c[0] + one) * (c[3] - c[1] + one) for c in (a, b))
        return both / union(area, other, both)

    return weigh


def _clamped(width, height):
    return max(width, 0) * max(height, 0)


def _corner_and_size(a, b):
    whole = [[x, y, x + width - 1, y + height - 1] for x, y, width, height in (a, b)]
    return _iou(*whole)


# Mistakes that boxes and points have in common: name, cause, changes to _f1.
_MATCHING = (
    ("copies_match", "copies of a prediction match again: repeating it pays",
     dict(allowed=lambda predicted, targets: [True] * len(predicted))),
    ("in_order", "predictions take the best that is left in the order they are written, instead of the best pairing",
     dict(match=_in_order)),
    ("best_pair_first", "the best pair is taken first, then the next: greedy, which is not the best pairing",
     dict(match=_best_pair_first)),
    ("many_to_one", "every prediction counts its best match: one true item is found many times",
     dict(match=lambda w: w.max(1).sum())),
    ("found_anyhow", "every true item counts its best prediction: one prediction finds many",
     dict(match=lambda w: w.max(0).sum())),
    ("by_place", "the n-th prediction is compared with the n-th true item: the order counts", dict(match=np.trace)),
    ("hard", "matches of more than 0.5 count 1 and others 0: nearer earns nothing", dict(match=lambda w: _best((w > 0.5) * 1.0))),
    ("copies_dropped", "copies of a prediction are dropped: repeating it costs nothing", dict(change=_copies_out)),
    ("swapped", "precision and recall are exchanged", dict(mean=lambda s, n, m: (2 * s / (n + m), s / m, s / n))),
    ("arithmetic", "F1 is the arithmetic mean of precision and recall", dict(mean=lambda s, n, m: (s / n / 2 + s / m / 2, s / n, s / m))),
    ("by_larger", "F1 is the sum over the larger number of items", dict(mean=lambda s, n, m: (s / max(n, m), s / n, s / m))),
    ("nothing_is_0", "an answer without items scores 0 where the truth has none either", dict(empty=lambda n, m: (0.0, 0.0, 0.0))),
    ("nothing_is_1", "an answer without items has precision 1", dict(empty=lambda n, m: (float(n == m), float(n == 0), float(m == 0)))),
)  # fmt: skip


def _shared(weigh):
    return tuple(Suspect(name, cause, _f1(weigh, **changes)) for name, cause, changes in _MATCHING)


def _of_rules(weigh):
    """The project's function, as box_f1 and point_f1 are called."""

    def score(predicted, targets, *sigma):
        predicted, targets = predicted.numpy(), targets.numpy()
        return rules.soft_f1(predicted, targets, weigh(predicted, targets, *sigma))

    return score


# ------------------------------------------------------------------------------------------- polygons


def polygon_iou(predicted, target):
    """IoU of two polygons as masks of 100×100 cells: cells in both over cells in either.

    Corners are cells, and the last joins the first. A cell belongs to a polygon if its middle, the point (x, y) itself,
    lies on an edge or inside by the even-odd rule: a ray from it crosses the edges an odd number of times.
    predicted: (V,2) int64; target: (W,2) int64 — corners x y, 0…99, three or more. Returns iou: float.
    Source: K2.5 report 4.4.2 (segmentation).
    """
    return rules.mask_iou(rules.polygon_mask(predicted.numpy()), rules.polygon_mask(target.numpy()))


@st.composite
def _polygon_cases(draw):
    """Polygons round a middle, some of which cross themselves or run round it twice, and the same moved."""
    rng, kind = random.Random(draw(st.integers(0, 9999))), draw(st.sampled_from(["star", "plain", "mixed"]))
    corners = 5 if kind == "star" else draw(st.integers(3, 6))
    angles = sorted(rng.uniform(0, 2 * math.pi) for _ in range(corners))
    angles = {"star": angles[::2] + angles[1::2], "plain": angles, "mixed": rng.sample(angles, corners)}[kind]
    x, y, radius = rng.randint(30, 70), rng.randint(30, 70), rng.randint(4, 24)
    target = [[round(x + radius * math.cos(a)), round(y + radius * math.sin(a))] for a in angles]
    most = draw(st.sampled_from([5, 1]))
    predicted = [[value + rng.randint(-most, most) for value in corner] for corner in target]
    return {"predicted": torch.tensor(predicted), "target": torch.tensor(target)}


def _filled(corners):
    """Right: row by row, spans between crossings in fractions, and edges cell by cell."""
    mask, corners = np.zeros((100, 100), bool), corners.tolist()
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1]):
        steps = math.gcd(x2 - x1, y2 - y1)  # the edge meets so many cells' middles
        for step in range(steps + 1):
            mask[y1 + (y2 - y1) * step // max(steps, 1), x1 + (x2 - x1) * step // max(steps, 1)] = True
    for y in range(100):
        crossings = sorted(
            x1 + Fraction((y - y1) * (x2 - x1), y2 - y1)
            for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1])
            if (y1 <= y) != (y2 <= y)
        )
        for left, right in zip(crossings[::2], crossings[1::2]):
            mask[y, math.ceil(left) : math.floor(right) + 1] = True
    return mask


def _raster(corners, closed=True, shift=0.0, border=True, rule=lambda turns: turns % 2 == 1):
    """`rewards.polygon_mask` by the number of turns of the outline round each cell, open to mistakes."""
    y, x = np.mgrid[:100, :100] + shift
    turns, edge = np.zeros((100, 100), int), np.zeros((100, 100), bool)
    edges = list(zip(corners.tolist(), np.roll(corners, -1, axis=0).tolist()))
    for (x1, y1), (x2, y2) in edges if closed else edges[:-1]:
        side = (x - x1) * (y2 - y1) - (y - y1) * (x2 - x1)
        edge |= (side == 0) & (min(x1, x2) <= x) & (x <= max(x1, x2)) & (min(y1, y2) <= y) & (y <= max(y1, y2))
        turns += (y1 <= y) & (y < y2) & (side < 0)
        turns -= (y2 <= y) & (y < y1) & (side > 0)
    return rule(turns) | edge if border else rule(turns) & ~edge


def _bounding_box(corners):
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    return rules.polygon_mask(np.array([[left, top], [right, top], [right, bottom], [left, bottom]]))


def _masks(draw=rules.polygon_mask, iou=rules.mask_iou):
    """`polygon_iou` by draw(corners (V,2) array) → mask and iou(mask, mask)."""
    return lambda predicted, target: iou(draw(predicted.numpy()), draw(target.numpy()))


def _rastered(**changes):
    return _masks(lambda corners: _raster(corners, **changes))


def _ratio(over):
    return lambda a, b: float((a & b).sum() / over(a, b))


def _area(corners):
    x, y = corners.double().T
    return (x * y.roll(-1) - x.roll(-1) * y).sum().abs().item() / 2


# ------------------------------------------------------------------------------- writing and counting


def ocr_score(answer, truth):
    """1 − edit distance / length of the longer text.

    Both texts are brought into Unicode NFC and lose the white space at their ends. The distance is Levenshtein's: the least
    number of insertions, deletions and substitutions of code points. Two empty texts score 1.
    answer, truth: str. Returns score: float, 0…1. Source: K2.5 report 4.4.2 (OCR).
    """
    answer, truth = (unicodedata.normalize("NFC", text).strip() for text in (answer, truth))
    return 1 - _edits(answer, truth) / max(len(answer), len(truth), 1)


def _edits(a, b, substitution=1, transposition=False):
    """The full table of distances between beginnings."""
    table = [[i + j if not i or not j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            change = table[i - 1][j - 1] + substitution * (a[i - 1] != b[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, change)
            if transposition and i > 1 and j > 1 and a[i - 2 : i] == b[j - 1] + b[j - 2]:
                table[i][j] = min(table[i][j], table[i - 2][j - 2] + 1)
    return table[-1][-1]


# Pieces of the truth, and what may be read for them.
_READINGS = [("ab", "ba"), ("Ab", "ab"), ("a b", "a  b"), ("\u00e9", "e\u0301"), ("a c", "ac"), ("bc", "bxc"), ("漢", "b"), ("cab", "cab")]


@st.composite
def _ocr_cases(draw):
    pieces = draw(st.lists(st.sampled_from(_READINGS), max_size=3))
    truth, answer = ("".join(column) for column in zip(*pieces)) if pieces else ("", "")
    turned = draw(st.booleans())
    answer += draw(st.sampled_from(["", "\n", "b"]))
    return {"answer": truth, "truth": answer} if turned else {"answer": answer, "truth": truth}


def _texts(prepare=lambda text: unicodedata.normalize("NFC", text).strip(), edits=_edits,
           length=lambda a, b: max(len(a), len(b), 1), score=lambda distance, length: 1 - distance / length):  # fmt: skip
    """`ocr_score` in parts."""

    def whole(answer, truth):
        answer, truth = prepare(answer), prepare(truth)
        return float(score(edits(answer, truth), length(answer, truth)))

    return whole


def _nfc(text):
    return unicodedata.normalize("NFC", text).strip()


def count_score(answer, truth):
    """1 / (1 + |count − truth|), the count being the last number of the answer; 0 where it is no count.

    A number is an optional minus, digits, perhaps in groups of three after commas, and an optional fraction: 1,200 is one
    number, and so is 2.50. A text without a number, a negative number and a broken one are no counts.
    answer: str; truth: int. Returns score: float, 0…1. Source: K2.5 report 4.4.2 (counting).
    """
    return rules.count_score(answer, truth).value


@st.composite
def _count_cases(draw):
    parts = st.sampled_from(["I see ", "3", "5", " of ", "-4", "none", " apples."])
    last = draw(st.sampled_from(["-4", "1,200", "3", "2.5", "none", "7.0", "12"]))
    answer = " ".join([*draw(st.lists(parts, max_size=3)), last])
    return {"answer": answer, "truth": draw(st.sampled_from([3, 5, 0, 12, 1200, 4, 7]))}


def _numbers(answer):
    """The numbers of a text by hand: words without what cannot belong to a number."""
    words = (word.strip("abcdefghijklmnopqrstuvwxyzI.") for word in answer.split())
    return [float(word.replace(",", "")) for word in words if word]


def _counted(pick=lambda numbers: numbers[-1], score=lambda count, truth: 1 / (1 + abs(count - truth)), none=0.0,
             numbers=_numbers, allowed=lambda count: count >= 0 and count == int(count)):  # fmt: skip
    """`count_score` in parts."""

    def whole(answer, truth):
        found = numbers(answer)
        if not found:
            return none(truth) if callable(none) else none
        count = pick(found)
        return float(score(count, truth)) if allowed(count) else 0.0

    return whole


# ------------------------------------------------------------------------------------------------- ops

OPS = (
    Op(
        name="box_f1",
        formula="F1 = 2 S / (N + M), S the largest sum of IoU over pairs",
        source="K2.5 report 4.4.2",
        reference=box_f1,
        cases=_box_cases(),
        outputs=("f1", "precision", "recall"),
        twins={"rewards": _of_rules(rules.box_overlaps)},
        variants={"brute_force": _f1(_iou, match=_by_brute_force)},
        suspects=(
            *_shared(_iou),
            Suspect("open_ends", "the last cell is left out: areas are (x2 − x1)(y2 − y1)",
                    _f1(_with_sides(_clamped, lambda a, b, both: max(a + b - both, 1), 0))),
            Suspect("not_clamped", "two negative sides multiply to a positive overlap", _f1(_with_sides(lambda w, h: max(w * h, 0)))),
            Suspect("dice", "twice the overlap over the sum of areas instead of IoU",
                    _f1(_with_sides(_clamped, lambda a, b, both: (a + b) / 2))),
            Suspect("of_the_truth", "the overlap is divided by the true box alone: a box of the whole picture is right",
                    _f1(_with_sides(_clamped, lambda a, b, both: b))),
            Suspect("corner_and_size", "boxes are read as corner and size", _f1(_corner_and_size)),
        ),
    ),
    Op(
        name="point_f1",
        formula="F1 = 2 S / (N + M), S the largest sum of exp(-d^2 / 2 sigma^2) over pairs",
        source="K2.5 report 4.4.2",
        reference=point_f1,
        cases=_point_cases(),
        outputs=("f1", "precision", "recall"),
        twins={"rewards": _of_rules(rules.point_weights)},
        variants={"brute_force": _f1(_gauss, match=_by_brute_force)},
        suspects=(
            Suspect("no_half", "the factor one half is missing: exp(−d² / σ²)", _f1(lambda a, b, s: _gauss(a, b, s) ** 2)),
            Suspect("not_squared", "the distance is not squared", _f1(lambda a, b, s: math.exp(-math.dist(a, b) / (2 * s**2)))),
            Suspect("laplace", "exp(−d / σ) instead of a Gaussian", _f1(lambda a, b, s: math.exp(-math.dist(a, b) / s))),
            Suspect("density", "the Gaussian's density: its peak is 1 / 2πσ² instead of 1",
                    _f1(lambda a, b, s: _gauss(a, b, s) / (2 * math.pi * s**2))),
            Suspect("city_block", "the distance is the sum of both coordinates' differences",
                    _f1(lambda a, b, s: math.exp(-(abs(a[0] - b[0]) + abs(a[1] - b[1])) ** 2 / (2 * s**2)))),
            Suspect("radius", "a point within σ counts 1 and others 0", _f1(lambda a, b, s: float(math.dist(a, b) <= s))),
            *_shared(_gauss),
        ),
    ),
    Op(
        name="polygon_iou",
        formula="cells in both masks / cells in either; even-odd rule at the cells' middles, edges included",
        source="K2.5 report 4.4.2",
        reference=polygon_iou,
        cases=_polygon_cases(),
        outputs=("iou",),
        variants={"row_by_row": _masks(_filled), "by_turns": _rastered()},
        suspects=(
            Suspect("bounding_boxes", "bounding boxes are compared instead of the shapes", _masks(_bounding_box)),
            Suspect("no_border", "cells on an edge are left out", _rastered(border=False)),
            Suspect("not_closed", "the edge from the last corner to the first is missing", _rastered(closed=False)),
            Suspect("winding", "the non-zero rule instead of even-odd: outlines that cross themselves are filled",
                    _rastered(rule=lambda turns: turns != 0)),
            Suspect("half_cell_off", "cells are tested half a cell off their middles", _rastered(shift=0.5)),
            Suspect("dice", "twice the overlap over the sum of both instead of IoU",
                    _masks(iou=lambda a, b: float(2 * (a & b).sum() / (a.sum() + b.sum())))),
            Suspect("of_the_truth", "the overlap is divided by the true mask alone: a mask of everything is right",
                    _masks(iou=_ratio(lambda a, b: b.sum()))),
            Suspect("of_the_answer", "the overlap is divided by the answer's mask alone: a mask of one cell is right",
                    _masks(iou=_ratio(lambda a, b: a.sum()))),
            Suspect("pixel_accuracy", "the share of equal cells, most of which are background",
                    _masks(iou=lambda a, b: float((a == b).mean()))),
            Suspect("areas", "areas are compared, wherever the shapes lie",
                    lambda a, b: min(_area(a), _area(b)) / max(_area(a), _area(b), 1e-9)),
            Suspect("rows_first", "the answer's corners are read as y x", lambda a, b: polygon_iou(a.flip(1), b)),
        ),
    ),
    Op(
        name="ocr_score",
        formula="1 - Levenshtein distance / length of the longer text",
        source="K2.5 report 4.4.2",
        reference=ocr_score,
        cases=_ocr_cases(),
        outputs=("score",),
        twins={"rewards": _texts(edits=rules.levenshtein)},
        variants={"in_parts": _texts()},
        suspects=(
            Suspect("of_the_truth", "the distance is divided by the length of the truth: scores may be negative",
                    _texts(length=lambda a, b: max(len(b), 1))),
            Suspect("transposition", "two exchanged characters cost 1, as in Damerau's distance",
                    _texts(edits=lambda a, b: _edits(a, b, 1, True))),
            Suspect("of_both", "the distance is divided by both lengths together", _texts(length=lambda a, b: max(len(a) + len(b), 1))),
            Suspect("substitution_2", "a substitution costs 2, as in difflib's ratio", _texts(edits=lambda a, b: _edits(a, b, 2))),
            Suspect("case_folded", "capitals and small letters are the same", _texts(lambda text: _nfc(text).casefold())),
            Suspect("white_space_dropped", "white space is left out", _texts(lambda text: "".join(_nfc(text).split()))),
            Suspect("white_space_collapsed", "runs of white space count as one space", _texts(lambda text: " ".join(_nfc(text).split()))),
            Suspect("not_stripped", "white space at the ends counts", _texts(lambda text: unicodedata.normalize("NFC", text))),
            Suspect("not_composed", "texts are not normalised: é in one or two code points differ", _texts(str.strip)),
            Suspect("bytes", "bytes are compared instead of characters", _texts(lambda text: _nfc(text).encode().decode("latin1"))),
            Suspect("by_place", "characters are compared place by place: one insertion ruins the rest",
                    _texts(edits=lambda a, b: sum(x != y for x, y in itertools.zip_longest(a, b)))),
            Suspect("exact", "only equal texts score", _texts(score=lambda distance, length: not distance)),
            Suspect("nothing_is_0", "two empty texts score 0", _texts(score=lambda distance, length: 1 - distance / length,
                                                                   edits=lambda a, b: _edits(a, b) if a or b else 1)),
        ),
    ),
    Op(
        name="count_score",
        formula="1 / (1 + |last number of the answer - truth|), 0 where that is no count",
        source="K2.5 report 4.4.2",
        reference=count_score,
        cases=_count_cases(),
        outputs=("score",),
        variants={"by_hand": _counted()},
        suspects=(
            Suspect("first_number", "the first number is taken instead of the last", _counted(pick=lambda numbers: numbers[0])),
            Suspect("nearest_number", "the number nearest to the truth is taken: listing many pays",
                    lambda answer, truth: max([count_score(str(n), truth) for n in _numbers(answer)], default=0.0)),
            Suspect("relative", "the difference is divided by the truth",
                    _counted(score=lambda count, truth: 1 / (1 + abs(count - truth) / max(truth, 1)))),
            Suspect("linear", "1 − difference / truth",
                    _counted(score=lambda count, truth: max(0, 1 - abs(count - truth) / max(truth, 1)))),
            Suspect("exact", "only the exact count scores", _counted(score=lambda count, truth: count == truth)),
            Suspect("signed", "counts that are too small count as right",
                    _counted(score=lambda count, truth: 1 / (1 + max(count - truth, 0)))),
            Suspect("exponential", "exp(−difference)", _counted(score=lambda count, truth: math.exp(-abs(count - truth)))),
            Suspect("sign_lost", "a negative number is read without its minus", _counted(pick=lambda numbers: abs(numbers[-1]))),
            Suspect("cut_off", "a broken number is cut to a count", _counted(pick=lambda numbers: int(numbers[-1]))),
            Suspect("missing_is_0", "a text without a number is read as the count 0", _counted(none=lambda truth: 1 / (1 + truth))),
            Suspect("commas_part", "a comma parts numbers: 1,200 is read as 200",
                    _counted(numbers=lambda text: _numbers(text.replace(",", " ")))),
        ),
    ),
)  # fmt: skip
