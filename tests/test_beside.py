"""Claims about beside.py: who sees whom in causal queries and in block attention, what is on a page, and figures that are those of the cells.

Run: .venv/bin/python -m pytest tests/test_beside.py
"""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import beside
from beside import (GRIDS, BlockMLA, CausalQueries, Page, Tiles, WindowMLA, block_attention, chosen_blocks, cost_of_blocks, cost_of_window, equal_window,
                    order_mask, pixels, reading_order)  # fmt: skip
from conftest import assert_close
from data import encode_example, pack_rows
from example import split_of
from lab import DIRECTION, NOT, REPLICATES, Scale, decoder
from media import MediaConfig
from mla import MLA, apply_rope, rope_table
from tokenizer import Tokenizer

CONFIG = decoder(0, num_hidden_layers=1, hidden_size=32, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4,
                 v_head_dim=6, intermediate_size=48).config  # fmt: skip


def attention(kind, *arguments, seed=0):
    """A layer of attention in float64, an input of 12 tokens and their rotary table."""
    torch.manual_seed(seed)
    layer, x = kind(CONFIG, *arguments).double(), torch.randn(2, 12, 32, dtype=torch.float64)
    return layer, x, rope_table(torch.arange(12).expand(2, -1), 4, CONFIG.rope_theta, CONFIG.yarn, torch.float64)


# ------------------------------------------------------------------------------------------ block attention


def chosen_by_loop(query, means, block, most):
    """The rule in words, one query after the other."""
    batch, heads, tokens, _ = query.shape
    seen = np.zeros((batch, heads, tokens, tokens), bool)
    for b, h, t in np.ndindex(batch, heads, tokens):
        own = t // block
        affinity = [query[b, h, t] @ means[b, h, n] for n in range(own)]
        for n in sorted(range(own), key=lambda n: -affinity[n])[:most]:
            seen[b, h, t, n * block : (n + 1) * block] = True
        seen[b, h, t, own * block : t + 1] = True
    return seen


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 6), st.integers(0, 99))
def test_blocks_are_chosen_by_the_rule(batch, heads, blocks, block, most, seed):
    rng = np.random.default_rng(seed)
    query, means = rng.normal(size=(batch, heads, blocks * block, 3)), rng.normal(size=(batch, heads, blocks, 3))
    chosen = chosen_blocks(torch.tensor(query), torch.tensor(means), block, most)
    np.testing.assert_array_equal(chosen.numpy(), chosen_by_loop(query, means, block, most))


def test_a_layers_blocks_are_those_of_the_means_of_its_keys():
    layer, x, table = attention(BlockMLA, 3, 1)
    q_nope, q_rope, _, _ = layer.project(x, table)
    latent, rope_key = layer.kv_a_proj_with_mqa(x).split((12, 4), -1)
    rope_key, weight = apply_rope(rope_key, table), layer.kv_b_proj.weight.view(2, 14, 12)  # (heads,8 + 6,12)
    keys = torch.stack([torch.cat((layer.kv_a_layernorm(latent) @ weight[head, :8].T, rope_key), -1) for head in range(2)], 1)  # (B,H,T,J)
    means = torch.stack([keys[:, :, start : start + 3].mean(2) for start in range(0, 12, 3)], 2)
    query = torch.cat((q_nope, q_rope), -1).transpose(1, 2)
    expected = chosen_by_loop(query.detach().numpy(), means.detach().numpy(), 3, 1)
    np.testing.assert_array_equal(layer.seen(x, table).numpy(), expected)
    assert (expected[:, 0] != expected[:, 1]).any()  # each head chooses for itself


def test_with_all_blocks_it_is_full_attention_and_with_few_it_is_not():
    layer, x, table = attention(BlockMLA, 3, 9)
    full = MLA(CONFIG).double()
    full.load_state_dict(layer.state_dict())
    assert_close(layer(x, table, None)[0], full(x, table, None)[0])
    layer.most = 1
    few = layer(x, table, None)[0]
    assert_close(few[:, :6], full(x, table, None)[0][:, :6])  # no more than one block stands before these
    assert not torch.allclose(few[:, 6:], full(x, table, None)[0][:, 6:])


def test_gradients_go_through_chosen_blocks_alone():
    layer, x, table = attention(BlockMLA, 3, 1)
    seen = layer.seen(x, table).any(1)  # by any head
    x.requires_grad_()
    layer(x, table, None)[0][0, 11].square().sum().backward()
    assert ((x.grad[0].abs().sum(1) > 0) == seen[0, 11]).all() and not seen[0, 11].all()
    assert x.grad[1].abs().sum() == 0


def test_a_window_sees_its_last_keys():
    layer, x, table = attention(WindowMLA, 4)
    x.requires_grad_()
    layer(x, table, None)[0][0, 8].square().sum().backward()
    assert (x.grad[0].abs().sum(1) > 0).tolist() == [5 <= at <= 8 for at in range(12)]


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 7))
def test_costs_are_the_pairs_of_the_masks(blocks, block, most):
    tokens = blocks * block
    seen = chosen_blocks(torch.randn(1, 1, tokens, 3), torch.randn(1, 1, blocks, 3), block, most)
    means = sum(at // block for at in range(tokens))
    assert cost_of_blocks(tokens, block, most) == int(seen.sum()) + means
    for window in range(1, tokens + 1):
        assert cost_of_window(tokens, window) == int(torch.ones(tokens, tokens).tril().triu(1 - window).sum())
    window, full = equal_window(tokens, block, most), cost_of_window(tokens, tokens)
    assert cost_of_window(tokens, window) >= min(cost_of_blocks(tokens, block, most), full)
    assert window == 1 or cost_of_window(tokens, window - 1) < min(cost_of_blocks(tokens, block, most), full)


def test_a_lookups_value_is_that_of_its_record_and_held_out_documents_are_not_trained_on():
    for split in ("train", "heldout"):
        ids, targets, places = next(beside._documents(3, split))
        assert split_of(str(ids)) == split and targets[: beside.KEYS] == [-100] * beside.KEYS
        records = dict(divmod(token, beside.VALUES) for token in ids[: beside.KEYS])
        assert len(records) == beside.KEYS == len(set(ids[beside.KEYS :]))
        for asked, target, place in zip(ids[beside.KEYS :], targets[beside.KEYS :], places):
            assert target == beside.ANSWERS + records[asked - beside.ASKED] and ids[place] // beside.VALUES == asked - beside.ASKED
        assert max(ids) < beside.ANSWERS and max(targets) < beside.VOCABULARY - 256
    (_, _, places), *_ = islice(beside._documents(0, "heldout"), 1)
    assert beside._distances(1).tolist() == [[(beside.KEYS + n) // beside.BLOCK - place // beside.BLOCK for n, place in enumerate(places)]]


def test_arms_keep_the_dense_models_weights():
    full = beside._attend(beside._reader(1), "full")
    for arm, kind in (("blocks", BlockMLA), ("window", WindowMLA)):
        other = beside._attend(beside._reader(1), arm)
        assert all(isinstance(layer.self_attn, kind) for layer in other.language_model.model.layers)
        assert all(torch.equal(a, b) for a, b in zip(full.state_dict().values(), other.state_dict().values()))


# ------------------------------------------------------------------------------------------- reading order


def test_who_sees_whom_among_tiles_and_queries():
    for causal in (True, False):
        mask = order_mask(3, causal)
        for i, j in np.ndindex(6, 6):
            if i < 3:
                expected = j < 3
            elif causal:
                expected = j <= i
            else:
                expected = j in (i - 3, i)
            assert mask[i, j] == expected, (i, j, causal)


@pytest.mark.parametrize("causal", [True, False])
def test_a_query_depends_on_what_it_sees(causal):
    torch.manual_seed(0)
    layer = CausalQueries(torch.nn.Linear(8, 32), CONFIG, 3, 1, causal)
    layer.projector.forward = lambda merged: torch.nn.functional.linear(merged.flatten(1), layer.projector.weight)
    merged = torch.randn(6, 4, 2, requires_grad=True)  # two pages
    out = layer(merged)
    assert out.shape == (6, 32)
    out[4].square().sum().backward()  # query 1 of page 1
    tiles = (merged.grad.flatten(1).abs().sum(1) > 0).tolist()
    queries = (layer.queries.grad.abs().sum(1) > 0).tolist()
    assert tiles == ([False] * 3 + [True] * 3 if causal else [False] * 4 + [True, False])
    assert queries == ([True, True, False] if causal else [False, True, False])


def test_both_kinds_of_queries_have_as_many_parameters_from_the_same_draw():
    parts = []
    for causal in (True, False):
        torch.manual_seed(0)
        parts.append(CausalQueries(torch.nn.Identity(), CONFIG, 4, 2, causal).state_dict())
    assert all(torch.equal(parts[0][key], parts[1][key]) for key in parts[1]) and parts[0].keys() == parts[1].keys()


def test_a_page_is_read_in_the_order_of_its_numbers():
    letters, tile = "ABCDEFGHI", beside.TILE
    order = (*range(1, 9), 0)  # the first tile comes last
    assert Tiles(letters, order).read() == "BCDEFGHIA" and Tiles(letters).read() == letters
    pixels = np.asarray(Tiles(letters, order).render()).astype(int)
    red = np.argwhere((pixels[:, :, 0] > 200) & (pixels[:, :, 1] < 100))
    assert {(y // tile) * 3 + x // tile for y, x in red} == set(range(9))

    def number(page, place):  # the right half of a tile
        x, y = tile * (place % 3), tile * (place // 3)
        return page.render().crop((x + tile // 2, y, x + tile, y + tile)).tobytes()

    turned, straight = Tiles("P" * 9, order), Tiles(letters, tuple(range(9)))
    assert [number(turned, place) for place in range(9)] == [number(straight, shown) for shown in (8, *range(8))]
    assert len({number(straight, place) for place in range(9)}) == 9 and len({number(Tiles(letters), place) for place in range(9)}) == 1


@pytest.mark.parametrize("kind", beside.PAGES)
def test_pages_of_a_split_are_told_by_their_content(kind):
    source = beside.PAGES[kind]
    for number in range(20):
        train, held = (source.draw(random.Random(number), split) for split in ("train", "heldout"))
        assert split_of(train.key) == "train" and split_of(held.key) == "heldout"
        assert len(held.answer) == beside.PLACES and held.text == f"<image>{held.answer}\n"


# ------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("ratio", GRIDS)
def test_every_letter_of_a_page_stands_in_its_cell_and_no_two_look_alike(ratio):
    rows, columns = GRIDS[ratio]
    assert rows * columns == ratio
    glyphs = {letter: np.asarray(Page(letter * ratio).render()) for letter in beside.LETTERS}
    assert len({glyph.tobytes() for glyph in glyphs.values()}) == len(beside.LETTERS)
    text = "".join(random.Random(0).choices(beside.LETTERS, k=ratio))
    page = np.asarray(Page(text).render())
    for number, letter in enumerate(text):
        row, column = divmod(number, columns)
        top, left = 28 * row // rows, 28 * column // columns
        cell = np.s_[top : top + 28 // rows, left : left + 28 // columns]
        assert (page[cell] == glyphs[letter][cell]).all() and page[cell].min() < 100


def test_a_page_is_one_vision_token_and_the_letters_are_the_text_tokens():
    for ratio in GRIDS:
        document = encode_example(beside._writing("pictures", ratio).draw(random.Random(1)), Tokenizer(), MediaConfig())
        assert sum(token == Tokenizer().media_pad for token in document.ids) == 1 and sum(document.loss) == ratio + 2
        copied = beside._writing("text", ratio).draw(random.Random(1))
        assert copied.text == f"{copied.answer}:{copied.answer}\n" and not copied.media


def test_letters_are_right_where_the_likeliest_token_is():
    model, source = beside._model(1, 1, 1), beside._writing("pictures", 4)
    found = beside._letters(model, source, 3)
    assert np.shape(found) == (3, 4)
    documents = [encode_example(source.draw(random.Random(f"pictures 4 {number}"), "heldout"), Tokenizer(), MediaConfig()) for number in range(3)]
    batch = pack_rows(documents, 3, len(documents[0].ids), Tokenizer())
    with torch.no_grad():
        logits = model(batch.ids, batch.patches, batch.grid_thw, batch.positions, batch.segment_ids).numpy()
    for row, document in enumerate(documents):
        places = [at for at in range(len(document.ids) - 1) if document.loss[at + 1]][:-2]
        assert found[row] == [float(logits[row, at].argmax() == document.ids[at + 1]) for at in places]


# -------------------------------------------------------------------------------------------- experiments


@pytest.mark.parametrize("experiment, claims", [(pixels, 2), (reading_order, 2), (block_attention, 3)])
def test_each_experiment_runs_and_is_kept(experiment, claims, tmp_path):
    name, plot = experiment.__name__.replace("_", "-"), f"{experiment.__name__}.png"
    scale = Scale(tmp_path, (1,), quick=True, workers=0)
    found = experiment(scale)
    assert len(found) == claims and found[0].plot == plot and (tmp_path / name / plot).stat().st_size > 1000
    assert all(claim.verdict in (REPLICATES, DIRECTION, NOT) and "[" in claim.found and "chance" in claim.setup for claim in found)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / name / "cells").iterdir()}
    assert experiment(scale) == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / name / "cells").iterdir()} == before


class Made(Scale):
    """A scale whose cells are made up: {the name's arm: result}."""

    made = None

    def run(self, name, cells, work, rows=None):
        """As Scale's, without running anything."""
        (self.folder / name).mkdir(exist_ok=True)
        return {cell: self.made(cell.rpartition("-")[0]) for cell in cells}


def test_the_figures_of_pixels_are_those_of_the_cells(tmp_path):
    """By hand: all is copied; of four texts at 9× one letter of 36 is lost, at 20× half of the letters."""
    right = {str(ratio): [[1.0] * ratio] * 4 for ratio in GRIDS}
    lost = right | {"9": [[1.0] * 9] * 3 + [[0.0] + [1.0] * 8], "20": [[1.0] * 10 + [0.0] * 10] * 4}
    Made.made = lambda self, arm: {"right": right if arm == "text" else lost, "blank": {str(ratio): [[0.0] * ratio] * 4 for ratio in GRIDS}}
    tenth, twice = pixels(Made(tmp_path, (1, 2)))
    assert "so 0.028 [0.000, 0.083] are lost" in tenth.found and tenth.verdict == DIRECTION
    assert twice.found.startswith("9× less 20×: 0.472") and twice.verdict == REPLICATES


def test_the_figures_of_reading_order_are_those_of_the_cells(tmp_path):
    """By hand: in the end causal reads all, own tile two thirds, raster all but one letter of 36; halfway causal reads nothing."""
    nothing, some, most, whole = ([[1.0] * right + [0.0] * (9 - right)] * 3 + [[1.0] * last + [0.0] * (9 - last)] for right, last in ((0, 0), (6, 6), (9, 8), (9, 9)))
    ends = {"raster": most, "own-tile": some, "causal": whole}
    Made.made = lambda self, arm: {"numbered": [nothing, nothing if arm == "causal" else most, some, ends[arm]], "plain": [whole] * 4}
    ordered, plain = reading_order(Made(tmp_path, (1, 2)))
    assert "causal less own tile 0.333 [0.333, 0.333]" in ordered.found and "causal less raster 0.028 [0.000, 0.083]" in ordered.found
    assert "after half of the training causal less raster -0.972" in ordered.found and ordered.verdict == DIRECTION
    assert "causal less raster 0.000" in plain.found and plain.verdict == REPLICATES


def test_the_figures_of_block_attention_are_those_of_the_cells(tmp_path):
    right = {"full": 64, "blocks": 63, "window": 16, "blocks-from-scratch": 32, "dense": 0}  # of 64 lookups
    Made.made = lambda self, arm: [[1.0] * right[arm] + [0.0] * (64 - right[arm])] * 2
    window, full, scratch = block_attention(Made(tmp_path, (1, 2), quick=True))
    assert "blocks less window 0.734" in window.found and window.verdict == REPLICATES
    assert "full less blocks 0.016" in full.found and full.verdict == REPLICATES
    assert "full less blocks 0.500" in scratch.found and scratch.verdict == NOT
