"""Claims about systems that are named beside Kimi K2.5, with its tower and its decoder at toy scale.

    pixels             DeepSeek-OCR: a page of r letters per vision token ─▶ tower ─▶ the decoder writes them out, r = 2 … 20
    reading_order      DeepSeek-OCR 2: tiles ─▶ tower ─▶ causal queries ─▶ the decoder writes the tiles' letters in the order of their numbers
    block_attention    MoBA: records, then keys to look up ─▶ a decoder whose queries see their own block and the k best of those before

Causal queries (DeepEncoder V2): behind the V vision tokens of a page stand V learned queries; in some more layers each sees all vision
tokens and the queries before it, and what becomes of the queries is all that the decoder gets. Block attention: how good a block is for a
query is q · mean of the block's keys, for each head by itself; no gradient goes through the choice.

Public names: GRIDS, Page, Tiles, order_mask, CausalQueries, chosen_blocks, cost_of_blocks, cost_of_window, equal_window, BlockMLA, WindowMLA,
write_out, read_pages, dense, look_up, pixels, reading_order, block_attention.     Tests: pytest tests/test_beside.py
"""

import functools
import random
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from data import Batch, encode_example, pack_rows
from example import Draft, Source, split_of
from k25 import Block, load, save
from lab import Claim, blend, decoder, judge, judge_alike, pretrain
from media import MediaConfig
from mla import MLA, RMSNorm, rope_table
from moe import normal_init_
from pictures import COLOURS, PAPER, font
from rl_report import plot_arms
from sft import SFTConfig
from study import bootstrap, intervals
from tokenizer import Tokenizer
from vit3d import VisionConfig

TILE = 28  # pixels: one vision token
LETTERS = "ABCDEFGHIJKLMNOP"
MODEL = {
    "hidden_size": 96, "intermediate_size": 192, "moe_intermediate_size": 48, "n_routed_experts": 4, "q_lora_rank": 48,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
ALIKE = 0.05  # shares right that differ by less count as alike


def _model(seed, rows, columns, layers=2):
    """A decoder of some layers with a tower for pages of rows × columns tiles."""
    tower = VisionConfig(init_pos_emb_height=2 * rows, init_pos_emb_width=2 * columns, vt_hidden_size=96, vt_num_attention_heads=4,
                         vt_num_hidden_layers=2, vt_intermediate_size=192, text_hidden_size=MODEL["hidden_size"])  # fmt: skip
    return decoder(seed, **MODEL | {"num_hidden_layers": layers}, vision=tower)


@torch.no_grad()
def _right(model, batch):
    """Whether the likeliest token is the right one, given those before it: (B,places with loss) floats, 0 or 1. All rows have as many."""
    media = None if batch.patches is None else model.encode_media(batch.patches, batch.grid_thw)
    hidden, _ = model.hidden(model.embed(batch.ids, media), batch.positions, batch.segment_ids)
    best = model.language_model.lm_head(hidden[batch.loss_mask]).argmax(-1)
    return (best == batch.targets[batch.loss_mask]).float().view(len(batch.ids), -1)


def _letters(model, source, asked, change=lambda example: example):
    """Which letters are right in each of the source's held-out examples, which are the same for all seeds and arms: items × letters."""
    examples = [change(source.draw(random.Random(f"{source.name} {number}"), "heldout")) for number in range(asked)]
    documents = [encode_example(example, Tokenizer(), MediaConfig()) for example in examples]
    right = _right(model, pack_rows(documents, asked, len(documents[0].ids), Tokenizer()))
    return right[:, :-2].tolist()  # without the newline and the end


def _table(cells, *keys):
    """Seeds × items × letters (or lookups), of what cells found."""
    return np.array([functools.reduce(lambda found, key: found[key], keys, cell) for cell in cells], float)


# ----------------------------------------------------------------------------------------------- pixels

GRIDS = {2: (1, 2), 4: (2, 2), 9: (3, 3), 20: (4, 5)}  # letters on a page of one vision token: (rows, columns)
TENFOLD, TWENTYFOLD, NEAR = 9, 20, 0.03  # NEAR: what may be lost, 97 % being right


@functools.lru_cache(maxsize=None)
def _face(width, height):
    """The largest mono font whose LETTERS all fit a cell, and how tall they are."""
    for points in range(2 * height, 4, -1):
        boxes = [font("mono", points).getbbox(letter, anchor="ms") for letter in LETTERS]
        if max(right - left for left, _, right, _ in boxes) <= width and max(bottom - top for _, top, _, bottom in boxes) <= height:
            break
    return font("mono", points), -min(top for _, top, _, _ in boxes)


@functools.lru_cache(maxsize=None)
def _glyph(letter, width, height, colour="black"):
    image = Image.new("RGB", (width, height), PAPER)
    face, tall = _face(width, height)
    ImageDraw.Draw(image).text((width / 2, (height + tall) // 2), letter, COLOURS[colour], face, anchor="ms")
    return image


@dataclass(frozen=True)
class Page:
    """As many letters as are asked for, in rows, on 28 × 28 pixels."""

    text: str

    def render(self):
        """The RGB picture."""
        rows, columns = GRIDS[len(self.text)]
        image = Image.new("RGB", (TILE, TILE), PAPER)
        for number, letter in enumerate(self.text):
            row, column = divmod(number, columns)
            image.paste(_glyph(letter, TILE // columns, TILE // rows), (TILE * column // columns, TILE * row // rows))
        return image


def _writing(kind, ratio):
    """The source of one ratio: a page to be written out, or the same text to be copied."""

    def propose(rng):
        text = "".join(rng.choices(LETTERS, k=ratio))
        return Draft((("<image>", text),), text, (), (Page(text),)) if kind == "pictures" else Draft(((f"{text}:", text),), text)

    return Source(f"{kind} {ratio}", "vision" if kind == "pictures" else "text", "", propose)


def write_out(folder, name, log, kind, seed, steps, rows, length, asked):
    """Learn to write out texts of all ratios, from pictures or from text. Returns which letters of held-out texts are right, by ratio."""
    t, model, sources = SFTConfig(steps, rows, length, lr=1e-2, adamw_lr=1e-3), _model(seed, 1, 1), {ratio: _writing(kind, ratio) for ratio in GRIDS}
    pretrain(model, blend([(source, 1.0) for source in sources.values()], float(kind == "pictures"), t, seed), t, log)
    found = {"right": {ratio: _letters(model, source, asked) for ratio, source in sources.items()}}
    if kind == "pictures":
        blank = lambda example: replace(example, media=(Image.new("RGB", (TILE, TILE), PAPER),))  # noqa: E731
        found["blank"] = {ratio: _letters(model, source, asked, blank) for ratio, source in sources.items()}
    return found


def pixels(scale):
    """How many text tokens a vision token can stand for, and pixels.png. scale: lab.Scale. Returns list of Claim."""
    shared = {"rows": 8, "length": 128, "asked": scale.pick(64, 2)}
    steps = {"pictures": scale.pick(1000, 1), "text": scale.pick(250, 1)}
    cells = {f"{kind}-{seed}": {"kind": kind, "seed": seed, "steps": steps[kind]} | shared for seed in scale.seeds for kind in steps}
    found = scale.run("pixels", cells, write_out, {name: cell["steps"] for name, cell in cells.items()})
    read = {kind: [found[f"{kind}-{seed}"] for seed in scale.seeds] for kind in steps}
    parts = {"text tokens": ("text", "right"), "pictures": ("pictures", "right"), "blank pictures": ("pictures", "blank")}
    tables = {name: {ratio: _table(read[kind], part, str(ratio)).mean(2) for ratio in GRIDS} for name, (kind, part) in parts.items()}
    lines = {name: intervals(list(GRIDS), table.values()) for name, table in tables.items()}
    plot_arms({"letters right, against letters per vision token": lines}, scale.folder / "pixels" / "pixels.png")
    setup = (f"random strings of {len(LETTERS)} letters, {', '.join(map(str, GRIDS))} on a page of 28 × 28 pixels (one vision token), one model for all; share of "
             "letters of held-out strings that are right, those before them given; against the same decoder copying the string from text tokens; "
             f"chance {1 / len(LETTERS):.3f}")  # fmt: skip
    pictures, ceiling = tables["pictures"], tables["text tokens"]
    by_ratio = ", ".join(f"{ratio}×: {bootstrap(table)}" for ratio, table in pictures.items())
    gap, fall = bootstrap(ceiling[TENFOLD] - pictures[TENFOLD]), bootstrap(pictures[TENFOLD] - pictures[TWENTYFOLD])
    blank = bootstrap(np.concatenate(list(tables["blank pictures"].values()), 1))
    return [
        Claim("a tenth of the tokens will do", "DeepSeek-OCR", "text as a picture: below 10 text tokens per vision token, 97 % are decoded rightly", setup,
              f"{by_ratio}; copied at {TENFOLD}× {bootstrap(ceiling[TENFOLD])}, so {gap} are lost, of which {NEAR} would be alike; blank pictures {blank}",
              judge_alike(gap, NEAR), "pixels.png"),
        Claim("twice as many do not fit", "DeepSeek-OCR", "97 % below 10×, about 60 % at 20×", setup, f"{TENFOLD}× less {TWENTYFOLD}×: {fall}", judge(fall, 0.37)),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------- reading order

ROWS, COLUMNS = 3, 3  # tiles of a page
PLACES = ROWS * COLUMNS  # V: vision tokens of a page
ORDERS = {"raster": 0, "own tile": 1, "causal": 1}  # arm to its layers of queries
PARTS = 4  # of training, after each of which held-out pages are read


@dataclass(frozen=True)
class Tiles:
    """A page of tiles, a letter on each; the n-th to be read carries n, unless that is the order of the rows."""

    letters: str  # by tile
    order: tuple = ()  # tiles in the order of reading; () is row by row

    def render(self):
        """The RGB picture."""
        image = Image.new("RGB", (TILE * COLUMNS, TILE * ROWS), PAPER)
        half = TILE // 2
        for tile, letter in enumerate(self.letters):
            x, y = TILE * (tile % COLUMNS), TILE * (tile // COLUMNS)
            image.paste(_glyph(letter, half, TILE), (x, y))
            if self.order:
                image.paste(_glyph(str(self.order.index(tile) + 1), half, TILE, "red"), (x + half, y))
        return image

    def read(self):
        """The letters in the order of reading."""
        return "".join(self.letters[tile] for tile in self.order or range(PLACES))


def _pages(kind):
    """The source of one kind of pages. What is held out is the order of reading, or of plain pages the letters."""

    def propose(rng):
        page = Tiles("".join(rng.choices(LETTERS, k=PLACES)), tuple(rng.sample(range(PLACES), PLACES)) if kind == "numbered" else ())
        return Draft((("<image>", page.read()),), str(page.order or page.letters), (), (page,))

    return Source(kind, "vision", "", propose)


PAGES = {kind: _pages(kind) for kind in ("numbered", "plain")}


def order_mask(tokens, causal):
    """Who sees whom among V vision tokens and the V queries behind them, (2V,2V) bool: vision tokens see each other; a query sees all vision
    tokens and the queries up to itself, or, where it is not causal, only the tile whose number it has, and itself."""
    every, own = torch.ones(tokens, tokens, dtype=torch.bool), torch.eye(tokens, dtype=torch.bool)
    queries = (every, every.tril()) if causal else (own, own)
    return torch.cat((torch.cat((every, ~every), 1), torch.cat(queries, 1)))


class CausalQueries(nn.Module):
    """The projector, and behind it learned queries in some layers of the decoder's kind; takes the place of model.mm_projector."""

    def __init__(self, projector, config, tokens, layers, causal):
        super().__init__()
        self.projector, self.config = projector, config
        self.queries = nn.Parameter(torch.empty(tokens, config.hidden_size))
        self.layers = nn.ModuleList(Block(replace(config, first_k_dense_replace=layers), index) for index in range(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("mask", order_mask(tokens, causal), persistent=False)
        with torch.no_grad():
            for weight in (self.queries, *self.layers.parameters()):
                if weight.ndim > 1:
                    normal_init_(weight, config.hidden_size**-0.5)  # so that what a query saw outweighs the query from the start

    def forward(self, merged):
        """(M,4,D), whole pages of V tokens each → (M,C): the outputs of each page's queries."""
        tokens, config = len(self.queries), self.config
        seen = self.projector(merged).unflatten(0, (-1, tokens))  # (B,V,C)
        x = torch.cat((seen, self.queries.expand_as(seen)), 1)  # (B,2V,C)
        table = rope_table(torch.arange(2 * tokens).expand(len(x), -1), config.qk_rope_head_dim, config.rope_theta, config.yarn)
        for layer in self.layers:
            x, _, _ = layer(x, table, self.mask[None, None], None)
        return self.norm(x[:, tokens:]).flatten(0, 1)


def read_pages(folder, name, log, arm, seed, steps, rows, length, asked):
    """Learn to read both kinds of pages in one arm. Returns which letters of held-out pages are right, by kind, after each part of training."""
    t, model, found = SFTConfig(steps, rows, length, lr=1e-2, adamw_lr=1e-3), _model(seed, ROWS, COLUMNS, 1), {kind: [] for kind in PAGES}
    if ORDERS[arm]:
        model.mm_projector = CausalQueries(model.mm_projector, model.config, PLACES, ORDERS[arm], arm == "causal")

    def watch(**row):
        log(**row)
        if (row["step"] + 1) % (steps // PARTS) == 0:
            for kind, source in PAGES.items():
                found[kind].append(_letters(model, source, asked))

    pretrain(model, blend([(source, 1.0) for source in PAGES.values()], 1.0, t, seed), t, watch)
    return found


def reading_order(scale):
    """Whether causal queries read pages in their order, and reading_order.png. scale: lab.Scale. Returns list of Claim."""
    shared = {"steps": scale.pick(240, PARTS), "rows": scale.pick(6, 2), "length": scale.pick(140, 30), "asked": scale.pick(64, 2)}
    cells = {f"{arm.replace(' ', '-')}-{seed}": {"arm": arm, "seed": seed} | shared for seed in scale.seeds for arm in ORDERS}
    found = scale.run("reading-order", cells, read_pages, dict.fromkeys(cells, shared["steps"]))
    read = {arm: [found[f"{arm.replace(' ', '-')}-{seed}"] for seed in scale.seeds] for arm in ORDERS}
    tables = {kind: {arm: [_table(cells, kind, part).mean(2) for part in range(PARTS)] for arm, cells in read.items()} for kind in PAGES}
    at = [shared["steps"] * (part + 1) // PARTS for part in range(PARTS)]
    panels = {f"{kind} pages: letters right, over training": {arm: intervals(at, table) for arm, table in tables[kind].items()} for kind in PAGES}
    plot_arms(panels, scale.folder / "reading-order" / "reading_order.png")
    shares = {kind: ", ".join(f"{arm} {bootstrap(table[-1])}" for arm, table in tables[kind].items()) for kind in PAGES}
    less = lambda kind, other, part=-1: bootstrap(tables[kind]["causal"][part] - tables[kind][other][part])  # noqa: E731
    gains = {other: less("numbered", other) for other in ("raster", "own tile")}
    said, half = "; ".join(f"causal less {other} {gain}" for other, gain in gains.items()), less("numbered", "raster", PARTS // 2 - 1)
    plain, in_rows = less("plain", "raster"), 1 / PLACES + (1 - 1 / PLACES) / len(LETTERS)
    setup = (f"pages of {ROWS} × {COLUMNS} tiles with a letter each, half of them numbered and read in that order, a decoder of one layer, {shared['steps']} steps; "
             "raster: the tower's tokens row by row; causal: a layer with causal queries behind the tower; own tile: the same layer, in which the n-th query sees "
             f"the n-th tile alone; share of letters that are right, those before them given; chance {1 / len(LETTERS):.3f}")  # fmt: skip
    return [
        Claim("causal queries read in the order of the content", "DeepSeek-OCR 2", "visual causal flow instead of raster order: OmniDocBench 87.36 → 91.09, edit "
              "distance of the reading order 0.085 → 0.057", f"{setup}, of reading row by row {in_rows:.3f}; orders that were never seen; judged by the smaller gain",
              f"{shares['numbered']}; {said}; after half of the training causal less raster {half}", judge(min(gains.values(), key=lambda gain: gain.mean)),
              "reading_order.png"),
        Claim("… and change nothing where that is the order of the rows", "DeepSeek-OCR 2", "the gain is one of reading order", f"{setup}; pages without numbers",
              f"{shares['plain']}; causal less raster {plain}, of which {ALIKE} would be alike", judge_alike(plain, ALIKE)),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------- block attention

KEYS, VALUES = 64, 8
ASKED, ANSWERS = KEYS * VALUES, KEYS * (VALUES + 1)  # the first token of each kind; records are those before
VOCABULARY = 1024  # the last 256 are special
LENGTH = 2 * KEYS  # tokens of a document
RATE = 1e-2  # of Muon; AdamW's is half of it
BLOCK, MOST = 8, 2  # tokens of a block, earlier blocks that a query sees
SPARSE = ("full", "blocks", "window", "blocks from scratch")


def _documents(seed, split):
    """Endless documents, each its tokens and targets, and where its records stand: a record of each key, one token each, in any order; then
    all keys in any order, at each of which the value is to be said."""
    rng = random.Random(f"lookups {seed} {split}")
    while True:
        keys, values, places = rng.sample(range(KEYS), KEYS), rng.choices(range(VALUES), k=KEYS), rng.sample(range(KEYS), KEYS)
        ids = [key * VALUES + value for key, value in zip(keys, values)] + [ASKED + keys[place] for place in places]
        if split_of(str(ids)) == split:
            yield ids, [-100] * KEYS + [ANSWERS + values[place] for place in places], places


def _lookup_batch(documents):
    """A Batch of which each row is a document."""
    ids, targets = (torch.tensor([document[part] for document in documents]) for part in (0, 1))
    nothing = torch.zeros_like(ids)
    return Batch(ids, targets, targets >= 0, torch.arange(LENGTH).expand_as(ids), nothing, None, None, None, nothing.bool())


def chosen_blocks(query, key_means, block, most):
    """Which keys each query sees, (B,H,T,T) bool: its own block up to itself, and of the blocks before it the `most` with the largest q · mean key.

    query: (B,H,T,J); key_means: (B,H,T/block,J). Source: MoBA, arXiv 2502.13189."""
    tokens, blocks = query.shape[2], key_means.shape[2]
    own = torch.arange(tokens) // block  # (T,)
    earlier = torch.arange(blocks) < own[:, None]  # (T,blocks)
    affinity = (query @ key_means.mT).masked_fill(~earlier, -torch.inf)  # (B,H,T,blocks)
    best = affinity.topk(min(most, blocks), dim=-1)
    chosen = torch.zeros_like(affinity, dtype=torch.bool).scatter(-1, best.indices, best.values > -torch.inf)
    chosen |= torch.arange(blocks) == own[:, None]
    return chosen.repeat_interleave(block, -1) & torch.ones(tokens, tokens, dtype=torch.bool).tril()


class BlockMLA(MLA):
    """MLA with MoBA's choice of blocks; each row is one segment of whole blocks."""

    def __init__(self, config, block, most):
        super().__init__(config)
        self.block, self.most = block, most

    @torch.no_grad()
    def seen(self, x, table):
        """Which keys each query of x (B,T,C) sees: (B,H,T,T) bool."""
        config = self.config
        q_nope, q_rope, latent, rope_key = self.project(x, table)
        latent, rope_key = (part.unflatten(1, (-1, self.block)).mean(2) for part in (latent, rope_key))  # (B,blocks,R|P): keys are linear in both
        nope_key = self.kv_b_proj(latent).unflatten(2, (config.num_attention_heads, -1))[..., : config.qk_nope_head_dim]  # (B,blocks,H,N)
        key = torch.cat((nope_key, rope_key[:, :, None].expand(*nope_key.shape[:3], -1)), -1)  # (B,blocks,H,J)
        return chosen_blocks(torch.cat((q_nope, q_rope), -1).transpose(1, 2), key.transpose(1, 2), self.block, self.most)

    def forward(self, x, table, mask, cache=None, layer=0, asked=None):
        """As MLA's."""
        return super().forward(x, table, self.seen(x, table), cache, layer, asked)


class WindowMLA(MLA):
    """MLA whose queries see the last `window` keys, their own included."""

    def __init__(self, config, window):
        super().__init__(config)
        self.window = window

    def forward(self, x, table, mask, cache=None, layer=0, asked=None):
        """As MLA's."""
        seen = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(1 - self.window)
        return super().forward(x, table, seen, cache, layer, asked)


def cost_of_blocks(tokens, block, most):
    """Pairs of a query and a key, or a mean of keys, that block attention multiplies over a row; without most blocks it is full attention."""
    return sum(at % block + 1 + block * min(most, at // block) + at // block for at in range(tokens))


def cost_of_window(tokens, window):
    """The same of a sliding window; a window of all tokens is full attention."""
    return sum(min(at + 1, window) for at in range(tokens))


def equal_window(tokens, block, most):
    """The smallest window that costs no less than block attention, or all tokens."""
    cost = cost_of_blocks(tokens, block, most)
    return next((window for window in range(1, tokens) if cost_of_window(tokens, window) >= cost), tokens)


def _attend(model, arm):
    """Give the decoder an arm's attention, its weights kept."""
    if arm == "full":
        return model
    for layer in model.language_model.model.layers:
        full, config = layer.self_attn, model.config
        layer.self_attn = WindowMLA(config, equal_window(LENGTH, BLOCK, MOST)) if arm == "window" else BlockMLA(config, BLOCK, MOST)
        layer.self_attn.load_state_dict(full.state_dict())
    return model


def _reader(seed):
    special, small = Tokenizer(VOCABULARY), {"num_hidden_layers": 2, "first_k_dense_replace": 2, "hidden_size": 64, "intermediate_size": 128}
    return decoder(seed, vocab_size=VOCABULARY, media_placeholder_token_id=special.media_pad, bos_token_id=special.bos, eos_token_id=special.eos,
                   pad_token_id=special.pad, initializer_range=0.04, **MODEL | small)  # fmt: skip


def _study(model, seed, stage, steps, rows, log):
    """Train on documents, each seen once."""
    documents = _documents(f"{seed} {stage}", "train")
    source = (_lookup_batch(list(islice(documents, rows))) for _ in range(steps))
    pretrain(model, source, SFTConfig(steps, rows, LENGTH, lr=RATE, adamw_lr=RATE / 2), log, stage=stage)


def dense(folder, name, log, seed, steps, rows):
    """Full attention from new weights, the start of the arms; kept in models."""
    model = _reader(seed)
    _study(model, seed, "dense", steps, rows, log)
    save(model, folder / "models" / name)


def look_up(folder, name, log, arm, seed, steps, rows, asked):
    """One arm from its seed's dense model, or from new weights. Returns which lookups of held-out documents are right: documents × lookups."""
    scratch = arm == "blocks from scratch"
    model = _attend(_reader(seed) if scratch else load(folder / "models" / f"dense-{seed}", dtype=torch.float32), arm)
    _study(model, seed, "scratch" if scratch else "arm", steps, rows, log)
    return _right(model, _lookup_batch(list(islice(_documents(0, "heldout"), asked)))).tolist()


def _distances(asked):
    """Blocks between each lookup and its record, in the held-out documents of look_up: documents × lookups."""
    at = (KEYS + np.arange(KEYS)) // BLOCK
    return np.array([at - np.array(places) // BLOCK for _, _, places in islice(_documents(0, "heldout"), asked)])


def block_attention(scale):
    """Block attention beside full attention and a window of its cost, and block_attention.png. scale: lab.Scale. Returns list of Claim."""
    rows, asked, first, then = scale.pick((8, 64, 300, 300), (1, 2, 1, 1))
    cells = {f"dense-{seed}": {"seed": seed, "steps": first, "rows": rows} for seed in scale.seeds}
    scale.run("block-attention", cells, dense, dict.fromkeys(cells, first))
    steps = dict.fromkeys(SPARSE, then) | {"blocks from scratch": first + then}
    named, shared = {arm: arm.replace(" ", "-") for arm in SPARSE}, {"rows": rows, "asked": asked}
    cells = {f"{named[arm]}-{seed}": {"arm": arm, "seed": seed, "steps": steps[arm]} | shared for seed in scale.seeds for arm in SPARSE}
    found = scale.run("block-attention", cells, look_up, {name: cell["steps"] for name, cell in cells.items()})
    tables = {arm: _table([found[f"{named[arm]}-{seed}"] for seed in scale.seeds]) for arm in SPARSE}
    far, window = _distances(asked), equal_window(LENGTH, BLOCK, MOST)
    lines = {arm: intervals(np.unique(far), [table[:, far == blocks] for blocks in np.unique(far)]) for arm, table in tables.items()}
    plot_arms({"lookups right, by how many blocks back the record stands": lines}, scale.folder / "block-attention" / "block_attention.png")
    tables = {arm: table.mean(2) for arm, table in tables.items()}
    costs = [cost / LENGTH for cost in (cost_of_window(LENGTH, LENGTH), cost_of_blocks(LENGTH, BLOCK, MOST), cost_of_window(LENGTH, window))]
    setup = (f"{KEYS} records, then all their keys to look up, {LENGTH} tokens; blocks of {BLOCK}, own block and the {MOST} best before it: a query multiplies "
             f"{costs[1]:.1f} keys or means of keys on average, {costs[0]:.1f} in full attention, {costs[2]:.1f} in a window of {window}; held-out documents, "
             f"chance {1 / VALUES:.3f}; ")  # fmt: skip
    dense_start = f"{first} steps of full attention, then {then} of each arm"
    shares = ", ".join(f"{arm} {bootstrap(table)}" for arm, table in tables.items())
    gain, gap, late = (bootstrap(tables[one] - tables[other]) for one, other in (("blocks", "window"), ("full", "blocks"), ("full", "blocks from scratch")))
    return [
        Claim("blocks chosen by content beat a window of their cost", "MoBA", "less structure than a window: the model decides where to attend", setup + dense_start,
              f"{shares}; blocks less window {gain}", judge(gain), "block_attention.png"),
        Claim("blocks do as well as full attention", "MoBA", "as good as full attention at a fraction of its cost, and a dense model can change over",
              setup + dense_start, f"full less blocks {gap}, of which {ALIKE} would be alike", judge_alike(gap, ALIKE)),
        Claim("… also when trained so from the start", "MoBA", "the same scaling law as full attention's, loss within 0.001", setup + f"{first + then} steps of block "
              f"attention from new weights, against full attention for as many ({dense_start})", f"full less blocks {late}", judge_alike(late, ALIKE)),
    ]  # fmt: skip
