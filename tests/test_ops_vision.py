"""The vision tower's operations as the oracle tests them: against loops in NumPy, every known mistake caught and named.

Run: python -m pytest tests/test_ops_vision.py
"""

import math

import numpy as np
import torch

from conftest import assert_close, right_and_wrong
from ops_vision import OPS, patch_embed, pool_merge, position_embedding, project, rope_2d, vit_attention

PACK = [(1, 2, 4), (3, 4, 2), (1, 2, 2)]
PATCHES = 8 + 24 + 4


test_right_implementations_pass_in_every_dtype, test_every_known_mistake_is_caught_and_named = right_and_wrong(OPS)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def check(actual, expected):
    assert_close(actual, torch.from_numpy(np.asarray(expected)), torch.float64)


def seats(grids):
    """Item, frame, row and column of every patch."""
    return [(n, f, i, j) for n, (t, h, w) in enumerate(grids) for f in range(t) for i in range(h) for j in range(w)]


def test_a_patch_is_embedded_as_a_dot_product_with_each_kernel():
    patches, weight, bias = random(2, 12), random(5, 3, 2, 2, seed=1), random(5, seed=2)
    expected = [[sum(patches[n, 4 * c + 2 * y + x] * weight[d, c, y, x] for c in range(3) for y in range(2) for x in range(2))
                 + bias[d] for d in range(5)] for n in range(2)]  # fmt: skip
    check(patch_embed(*map(torch.from_numpy, (patches, weight, bias))), expected)


def test_position_is_the_table_at_its_own_size_plus_the_time_of_clips():
    table = random(4, 2, 6)
    frequency = [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    expected = []
    for n, f, i, j in seats([(3, 4, 2), (1, 4, 2)]):
        time = [math.sin(f * w) for w in frequency] + [math.cos(f * w) for w in frequency]
        expected.append(table[i, j] + (np.array(time) if n == 0 else 0))
    check(position_embedding(torch.from_numpy(table), [(3, 4, 2), (1, 4, 2)]), expected)


def test_a_table_is_enlarged_with_the_cubic_kernel_of_three_quarters():
    # From two rows to four: the first new centre lies at old place -1/4, a quarter before row 0. Neighbours -2, -1, 0, 1
    # are rows 0, 0, 0, 1; the kernel with a = -3/4 gives row 1, at distance 5/4, the weight -0.10546875.
    table = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1).expand(2, 2, 2)
    x, a = 1.25, -0.75
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    assert far == -0.10546875
    position = position_embedding(table, [(1, 4, 2)])
    check(position[0], [far, far])


def test_pairs_turn_by_column_and_row_in_turn():
    x, width, theta = random(PATCHES, 2, 8), 8, 100.0
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    expected = np.empty_like(x)
    for n, (_, _, row, column) in enumerate(seats(PACK)):
        angles = [place * theta ** (-4 * i / width) for i in range(width // 4) for place in (column, row)]
        turned = pairs[n] * np.exp(1j * np.array(angles))
        expected[n, :, 0::2], expected[n, :, 1::2] = turned.real, turned.imag
    check(rope_2d(torch.from_numpy(x), PACK, theta), expected)


def test_every_patch_attends_to_its_own_item_only():
    q, k, v = (random(7, 2, 3, seed=s) for s in range(3))
    expected = np.zeros_like(v)
    for begin, end in [(0, 4), (4, 5), (5, 7)]:
        for i in range(begin, end):
            for head in range(2):
                weights = np.exp([q[i, head] @ k[j, head] / math.sqrt(3) for j in range(begin, end)])
                expected[i, head] = weights / weights.sum() @ v[begin:end, head]
    check(vit_attention(*map(torch.from_numpy, (q, k, v)), [4, 1, 2]), expected)


def test_a_token_is_four_patches_of_the_mean_frame():
    x = random(PATCHES, 3)
    place = {seat: n for n, seat in enumerate(seats(PACK))}
    expected = [[np.mean([x[place[n, f, i + a, j + b]] for f in range(t)], axis=0) for a in range(2) for b in range(2)]
                for n, (t, h, w) in enumerate(PACK) for i in range(0, h, 2) for j in range(0, w, 2)]  # fmt: skip
    check(pool_merge(torch.from_numpy(x), PACK), expected)


def test_the_projector_norms_each_patch_and_gates_by_erf():
    merged, scale, shift = random(2, 4, 3), random(3, seed=1), random(3, seed=2)
    fc0, bias0, fc1, bias1 = random(12, 12, seed=3), random(12, seed=4), random(5, 12, seed=5), random(5, seed=6)
    expected = []
    for token in merged:
        normed = [(patch - patch.mean()) / math.sqrt(patch.var() + 1e-5) * scale + shift for patch in token]
        hidden = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in fc0 @ np.concatenate(normed) + bias0]
        expected.append(fc1 @ hidden + bias1)
    check(project(*map(torch.from_numpy, (merged, scale, shift, fc0, bias0, fc1, bias1)), 1e-5), expected)
