"""Claims about dep.py: the partition is even and everybody's own; the gradient does not depend on who encodes what.

Run: .venv/bin/python -m pytest tests/test_dep.py
"""

import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import dep
from conftest import assert_close
from data import encode_example, pack_rows
from example import Example
from k25 import K25, K25Config
from tokenizer import Tokenizer
from train_small import model_config
from vit3d import Clip

MODEL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "q_lora_rank": 8,
         "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}  # fmt: skip
VISION = {"vt_hidden_size": 8, "vt_num_attention_heads": 2, "vt_num_hidden_layers": 2, "vt_intermediate_size": 8}
CONFIG = model_config(K25Config.preset("toy"), MODEL, VISION)
TOKENIZER = Tokenizer()
costs = st.lists(st.integers(1, 4096), max_size=40)


@given(costs, st.integers(1, 9))
@example([], 3)
@example([5], 4)
@settings(deadline=None)
def test_the_partition_is_greedy_longest_first_and_the_same_for_everybody(costs, ranks):
    owners = dep.partition(costs, ranks)
    assert owners == dep.partition(list(costs), ranks) and all(0 <= owner < ranks for owner in owners)
    loads = [sum(c for c, o in zip(costs, owners) if o == rank) for rank in range(ranks)]
    best = max([sum(costs) / ranks, *costs])  # nobody can do better than that
    assert max(loads) <= (4 / 3 - 1 / (3 * ranks)) * best + max(costs, default=0) / 3 + 1e-9
    for rank in range(ranks):  # whoever took an item last was the least loaded: taking it away leaves no more than the rest
        mine = [cost for cost, owner in zip(costs, owners) if owner == rank]
        assert not mine or loads[rank] - min(mine) <= min(loads)


def test_ties_go_to_the_earlier_item_and_the_lower_rank():
    assert dep.partition([3, 7, 3, 7, 3], 2) == [0, 0, 1, 1, 0]
    assert dep.partition([1, 2, 3, 4], 1) == [0, 0, 0, 0]


def test_sixteen_items_per_rank_of_realistic_spread_are_within_five_per_cent_of_even():
    """Sides are log-normal, as of pictures on the web; a patch budget cuts the largest."""
    for seed in range(20):
        rng = random.Random(seed)
        sizes = [min(int(rng.lognormvariate(3, 0.6)) * int(rng.lognormvariate(3, 0.6)) + 4, 4096) for _ in range(64)]
        assert dep.imbalance(sizes, dep.partition(sizes, 4), 4) <= 1.05
    assert dep.imbalance([1, 1, 2], [0, 1, 1], 2) == 1.5
    assert dep.imbalance([], [], 4) == 1.0


grids = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))  # frames, rows and columns of 28 pixels


def batch_of(seed, media):
    """One microbatch with these pictures and clips, each in a document of its own."""
    rng, documents = random.Random(seed), []
    for frames, rows, columns in media:
        pixels = [Image.frombytes("RGB", (28 * columns, 28 * rows), rng.randbytes(28 * 28 * 3 * rows * columns)) for _ in range(frames)]
        medium, marker = (pixels[0], "<image>") if frames == 1 else (Clip(tuple(pixels), 2.0), "<video>")
        documents.append(Example(f"{marker}!", (medium,), modality="vision"))
    encoded = [encode_example(d, TOKENIZER, CONFIG.media) for d in [Example("some text"), *documents]]
    return pack_rows(encoded, 1, 320, TOKENIZER).to("cpu", torch.float64)


def backbone(model, batch, media):
    """Some loss of the text model that depends on every embedding."""
    hidden, _ = model.hidden(model.embed(batch.ids, media), batch.positions, batch.segment_ids)
    return (model.language_model.lm_head(hidden).logsumexp(-1) * batch.loss_mask).sum()


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@given(st.lists(st.lists(grids, max_size=3), min_size=1, max_size=3), st.integers(1, 5), st.randoms(use_true_random=False))
@example([[], []], 4, random.Random(0))
@example([[(1, 2, 3)]], 4, random.Random(1))
@settings(max_examples=20, deadline=None)
def test_bug36_bug37_bug46_for_any_partition_the_gradient_is_monolithic_autograds(pictures, ranks, rng):
    """Not only for the even one; of both the tower and the backbone, whatever the sizes and however many."""
    torch.manual_seed(0)
    model = K25(CONFIG).double()
    batches = [batch_of(seed, media) for seed, media in enumerate(pictures)]
    for batch in batches:
        media = None if batch.patches is None else model.encode_media(batch.patches, batch.grid_thw)
        backbone(model, batch, media).backward()
    want = gradients(model)

    shared = dep.share_out(batches, ranks, [0] * len(batches))
    items = [dep.Item(i.batch, i.first, i.grid, rng.randrange(ranks), i.reader) for i in shared]
    embedded = {}
    for rank in range(ranks):
        embedded |= dep.balanced_forward(model, batches, items, rank)
    assert not any(piece.requires_grad for piece in embedded.values()), "phase 1 keeps a graph"
    media = dep.leaves(items, embedded)
    for number, batch in enumerate(batches):
        backbone(model, batch, media.get(number)).backward()
    assert not any(name.startswith(dep.PREFIXES) and p.grad is not None for name, p in model.named_parameters())
    leaves = dep.leaf_gradients(items, media)
    for rank in range(ranks):
        dep.recompute_backward(model, batches, items, rank, {i: g for i, g in leaves.items() if i.owner == rank})
    found = gradients(model)
    assert found.keys() == want.keys() and any(name.startswith(dep.PREFIXES) for name in want) == bool(items)
    for name, gradient in want.items():
        assert_close(found[name], gradient, 1e-11, name)


def test_every_item_is_shared_out_once_with_its_own_patches_and_tokens():
    batches = [batch_of(0, [(1, 1, 2), (3, 2, 1)]), batch_of(1, []), batch_of(2, [(1, 3, 3)])]
    items = dep.share_out(batches, 2, [5, 6, 7])
    assert [(i.batch, i.first, i.grid, i.reader) for i in items] == [(0, 0, (1, 2, 4), 5), (0, 8, (3, 4, 2), 5), (2, 0, (1, 6, 6), 7)]
    assert [i.patches for i in items] == [8, 24, 36] and [i.tokens for i in items] == [2, 2, 9]
    assert [i.owner for i in items] == [1, 1, 0]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_without_items_does_nothing(rank):
    torch.manual_seed(0)
    model, batches = K25(CONFIG).double(), [batch_of(0, [(1, 1, 1)])]
    items = dep.share_out(batches, 3, [0])
    embedded = dep.balanced_forward(model, batches, items, rank)
    assert (len(embedded) == 1) == (rank == 0)
    dep.recompute_backward(model, batches, items, rank, {item: torch.ones_like(piece) for item, piece in embedded.items()})
    assert bool(gradients(model)) == (rank == 0)
