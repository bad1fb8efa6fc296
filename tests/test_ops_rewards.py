"""Claims about ops_rewards.py: every mistake is caught and named, every right way passes, plain Python agrees.

Run: .venv/bin/python -m pytest tests/test_ops_rewards.py
"""

import functools
import itertools
import math
import re
import unicodedata

import numpy as np
import pytest
import torch
from conftest import right_and_wrong
from hypothesis import given, settings

import adapter
from conformance import check_op
from ops_rewards import OPS, box_f1, count_score, ocr_score, point_f1, polygon_iou

EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
BY_NAME = {op.name: op for op in OPS}


# Independent versions, from the formulas


def matched(predicted, targets, weigh):
    """By recursion: the next prediction matches one of the true items that are left, or none."""
    predicted, targets = [list(map(tuple, items.tolist())) for items in (predicted, targets)]
    if not predicted or not targets:
        return (float(not predicted and not targets),) * 3
    usable, left = [], list(targets)
    for item in predicted:  # copies beyond the truth's are set aside
        if item in left:
            left.remove(item)
            usable.append(item)
        elif item not in usable:
            usable.append(item)

    @functools.cache
    def best(row, free):
        if row == len(usable):
            return 0.0
        ways = [weigh(usable[row], targets[column]) + best(row + 1, free - {column}) for column in free]
        return max([best(row + 1, free), *ways])

    total = best(0, frozenset(range(len(targets))))
    precision, recall = total / len(predicted), total / len(targets)
    return 2 * precision * recall / ((precision + recall) or 1.0), precision, recall


def cells(box):
    x1, y1, x2, y2 = box
    return set(itertools.product(range(x1, x2 + 1), range(y1, y2 + 1)))


def plain_box_f1(predicted, targets):
    """Cells as sets."""
    return matched(predicted, targets, lambda a, b: len(cells(a) & cells(b)) / len(cells(a) | cells(b)))


def plain_point_f1(predicted, targets, sigma):
    return matched(predicted, targets, lambda a, b: math.exp(-0.5 * ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / sigma**2))


def inside(x, y, corners):
    """Whether a cell belongs to a polygon: a ray upwards, where the project sends one to the right."""
    crossings = 0
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1]):
        cross = (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1)
        if cross == 0 and min(x1, x2) <= x <= max(x1, x2) and min(y1, y2) <= y <= max(y1, y2):
            return True
        if (x1 > x) != (x2 > x) and (cross > 0) == (x2 > x1):  # it crosses this column, and above the cell
            crossings += 1
    return crossings % 2 == 1


def plain_polygon_iou(predicted, target):
    both = either = 0
    low, high = np.minimum(predicted.min(0), target.min(0)), np.maximum(predicted.max(0), target.max(0))
    for x, y in itertools.product(range(low[0], high[0] + 1), range(low[1], high[1] + 1)):
        found = [inside(x, y, corners.tolist()) for corners in (predicted, target)]
        both, either = both + all(found), either + any(found)
    return both / either


def plain_ocr_score(answer, truth):
    answer, truth = (unicodedata.normalize("NFC", text).strip() for text in (answer, truth))

    @functools.cache
    def edits(i, j):
        if not i or not j:
            return i + j
        return min(edits(i - 1, j) + 1, edits(i, j - 1) + 1, edits(i - 1, j - 1) + (answer[i - 1] != truth[j - 1]))

    longer = max(len(answer), len(truth))
    return 1 - edits(len(answer), len(truth)) / longer if longer else 1.0


def plain_count_score(answer, truth):
    found = re.findall(r"-?[\d,.]*\d", answer)
    count = found[-1].replace(",", "") if found else "none"
    return 1 / (1 + abs(float(count) - truth)) if re.fullmatch(r"\d+(\.0+)?", count) else 0.0


PLAIN = {"box_f1": plain_box_f1, "point_f1": plain_point_f1, "polygon_iou": plain_polygon_iou, "ocr_score": plain_ocr_score,
         "count_score": plain_count_score}  # fmt: skip


@EACH
def test_plain_python_from_the_formulas_agrees(op):
    def caller(op, arguments, cotangents, wanted):
        return adapter.run(PLAIN[op.name], arguments, op.outputs, wanted, cotangents, "numpy")

    finding = check_op(op, caller, max_examples=15 if op.name == "polygon_iou" else 60)
    assert finding is None, finding.text()


# Worked by hand


def test_boxes_and_points_of_hand_worked_answers():
    boxes = torch.tensor([[0, 0, 9, 4], [50, 50, 59, 59]]), torch.tensor([[0, 0, 9, 9]])
    assert box_f1(*boxes) == pytest.approx((1 / 3, 1 / 4, 1 / 2))
    points = torch.tensor([[3, 4]]), torch.tensor([[0, 0], [90, 90]])
    share = math.exp(-0.5)
    assert point_f1(*points, 5.0) == pytest.approx((2 * share / 3, share, share / 2))
    nothing, something = torch.zeros(0, 2).long(), points[0]
    assert point_f1(nothing, nothing, 5.0) == (1, 1, 1) and point_f1(nothing, something, 5.0) == (0, 0, 0)


def test_a_polygon_of_a_hand_worked_answer():
    """Squares of 11×11 and 11×6 cells, one in the other; and a bow tie, which is two triangles that meet in its middle."""
    square, half = [[0, 0], [10, 0], [10, 10], [0, 10]], [[0, 0], [10, 0], [10, 5], [0, 5]]
    assert polygon_iou(torch.tensor(half), torch.tensor(square)) == pytest.approx(66 / 121)
    bow_tie = torch.tensor([[0, 0], [4, 4], [4, 0], [0, 4]])
    counted = sum(inside(x, y, bow_tie.tolist()) for x in range(5) for y in range(5))
    assert counted == 5 + 3 + 1 + 3 + 5  # its columns
    assert polygon_iou(bow_tie, torch.tensor([[0, 0], [4, 0], [4, 4], [0, 4]])) == pytest.approx(17 / 25)


def test_writing_and_counts_of_hand_worked_answers():
    assert ocr_score("kitten", "sitting") == pytest.approx(1 - 3 / 7) and ocr_score(" e\u0301", "é") == 1
    assert count_score("3 red and 5 blue", 4) == 1 / 2 and count_score("none", 0) == 0


# Mistakes and right ways


test_right_implementations_pass, test_a_mistake_is_caught_and_named = right_and_wrong(OPS)


# Corners of the inputs


def drawn(name):
    cases = []
    settings(max_examples=60, database=None)(given(BY_NAME[name].cases)(lambda case: cases.append(case)))()
    return cases


@pytest.mark.parametrize("name", ["box_f1", "point_f1"])
def test_boxes_and_points_are_asked_with_copies_and_with_nothing_on_either_side(name):
    cases = drawn(name)
    sizes = {(len(case["predicted"]) > 0, len(case["targets"]) > 0) for case in cases}
    assert sizes == set(itertools.product((True, False), repeat=2))
    assert any(len(case["predicted"].unique(dim=0)) < len(case["predicted"]) for case in cases)
    assert all(0 <= x.min() and x.max() <= 99 for case in cases for x in (case["predicted"], case["targets"]) if len(x))


def test_polygons_lie_on_the_grid_and_some_cross_themselves():
    cases = drawn("polygon_iou")
    assert all(0 <= case[name].min() and case[name].max() <= 99 for case in cases for name in ("predicted", "target"))
    assert {len(case["target"]) for case in cases} == {3, 4, 5, 6}
