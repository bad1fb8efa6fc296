"""Preprocessing and splice as the oracle tests them: worked by hand, and every known mistake caught and named.

Run: python -m pytest tests/test_ops_media.py
"""

import math

import pytest
import torch

from conftest import right_and_wrong
from ops_media import OPS, frame_indices, media_splice, media_tokens, patchify, resize_plan, timestamp


test_right_implementations_pass_in_every_dtype, test_every_known_mistake_is_caught_and_named = right_and_wrong(OPS)


def test_patches_hold_channel_dy_dx_and_stand_row_by_row():
    y, x, c = torch.meshgrid(torch.arange(4), torch.arange(8), torch.arange(3), indexing="ij")
    frame = (100 * y + 10 * x + c).float()
    patches = patchify(torch.stack((frame, frame + 1000)), 2)
    assert patches.shape == (2 * 2 * 4, 3 * 2 * 2)
    assert patches[1].tolist() == [20, 30, 120, 130, 21, 31, 121, 131, 22, 32, 122, 132]  # row 0, column 1
    assert patches[4, 0] == 200 and patches[8, 0] == 1000  # second row of patches; second frame


@pytest.mark.parametrize(
    "width, height, expected",
    [
        (100, 50, (100, 50, 112, 56)),  # small: only padded
        (14, 14, (14, 14, 28, 28)),
        (4000, 3000, (2073, 1554, 2100, 1568)),  # 285·214 whole patches; √(16384 / 60990) = 0.518299
        (14336, 20, (7168, 10, 7168, 28)),  # twice 512 patches long
        (1, 28672, (1, 7168, 28, 7168)),
    ],
)
def test_pictures_are_fitted_as_worked_by_hand(width, height, expected):
    assert resize_plan(width, height, 16384, 14, 512) == expected


def test_bug33_four_seconds_of_30_fps_are_eight_frames():
    assert frame_indices(120, 30.0, 2.0, None) == [0, 17, 34, 51, 68, 85, 102, 119]
    assert frame_indices(120, 30.0, 2.0, 3) == [0, 60, 119]  # 59.5 is rounded to even
    assert frame_indices(3, 1.0, 2.0, None) == [0, 1, 2]
    assert frame_indices(1, 30.0, 2.0, None) == [0]


def test_milliseconds_of_a_timestamp_are_cut():
    assert timestamp(125.8126) == "00:02:05.812"
    assert timestamp(3723.9999) == "01:02:03.999"
    assert timestamp(0.0) == "00:00:00.000"


def test_bug34_an_item_takes_its_merged_patches_whatever_its_frames():
    assert media_tokens([(1, 4, 6), (4, 4, 6), (2, 2, 2)]) == [6, 6, 1]


def test_media_fill_their_places_in_the_order_of_the_text():
    embedded = -torch.arange(1.0, 7).reshape(2, 3, 1)
    ids = torch.tensor([[9, 1, 9], [2, 9, 3]])
    x = media_splice(embedded, ids, torch.tensor([[10.0], [20.0], [30.0]]), 9)
    assert x.flatten().tolist() == [10, -2, 20, -4, 30, -6]


@pytest.mark.parametrize("given", [2, 4])
def test_bug34_a_wrong_number_of_media_is_refused_with_both_counts(given):
    with pytest.raises(ValueError, match=f"3 places for media, but {given} embeddings"):
        media_splice(torch.zeros(1, 3, 2), torch.full((1, 3), 9), torch.ones(given, 2), 9)


def test_fitted_pictures_keep_the_budget_before_padding():
    for width, height in [(5000, 4000), (1793, 1793), (9000, 700)]:
        w, h, padded_w, padded_h = resize_plan(width, height, 1024, 14, 512)
        assert (w // 14) * (h // 14) <= 1024 and padded_w % 28 == padded_h % 28 == 0
        assert math.isclose(w / h, width / height, rel_tol=0.02)
