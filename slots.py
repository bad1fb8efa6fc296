"""A K25 that feeds single tokens of many conversations, with the same bits in any company — for engine.py.

What a token is computed to depends on its own conversation only: not on who is fed beside it, on its slot, on the size
of the cache, or on whether it came by prefill or decode. Floating point would not give that by itself: a matrix product
of another shape may add up in another order. Therefore every token, of a prompt or of an answer, is one row of a *pass*:

- a pass has 8, 16, 32, 64, … rows, padded. Whether a row has the same bits in each of these widths, and in each place,
  is not assumed: `SlotModel` tries them at the start, keeps those that agree, and refuses to start if the widest does not.
  16-bit numbers are too coarse to show it (a sum in another order is rounded to the same bits nearly always): there all
  passes have one width;
- it runs on one CPU thread, and every exp, sigmoid and cosine is taken of a multiple of 64 numbers: the last few of an
  odd number (and of each thread's share) get theirs from other instructions, which differ now and then in the last bit;
- attention adds up blocks of 128 keys in their order (`attend_in_blocks`): nobody else's length counts;
- routed experts run in products of the fixed shape (E,16,C), as many as the fullest expert needs (`experts_in_passes`);
- a token is drawn by a uniform that is a hash of (seed, place in the answer), row by row (`draw`).

Public names: SlotModel, SlotCache, EngineError, attend_in_blocks, experts_in_passes, draw, uniform, one_thread.
Letters: W rows of a pass, T tokens, H heads, C hidden, U vocabulary, R latent rank, N/P/V nope/rope/value head dims,
E experts, K chosen, F expert width, M merged media tokens.     Tests: pytest tests/test_engine.py
"""

import contextlib
import copy
import hashlib
import math
from collections import OrderedDict
from itertools import accumulate

import torch
import torch.nn.functional as F

from media import pack
from mla import rope_table, softmax_scale
from moe import MoE, fake_quant

ROWS = (8, 16, 32)  # of a pass; from 64 on, every multiple of 64
PROMPT = 256  # rows of the widest pass over prompts
KEYS = 128  # keys of one block of attention
LOAD = 16  # tokens of one expert in one product, at least
ALIGNED = 64  # numbers; two vector registers of the narrowest type, on the widest machine
TRIALS = 3  # of each width
REMEMBERED = 512  # media items whose embeddings are kept, those used last
_AGREEING = {}  # shapes to what `SlotModel` found by trying


class EngineError(ValueError):
    """A request or a model that the engine cannot serve; one line says why."""


# --------------------------------------------------------------------------------------------- drawing


@contextlib.contextmanager
def one_thread():
    """Also as a decorator: torch computes on one CPU thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def uniform(seed, place):
    """A number in [0, 1) with 53 random bits, from blake2b of (seed, place): on every machine, in any order, the same."""
    digest = hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@one_thread()
def draw(logits, temperature, top_p, uniforms, never=()):
    """One token per row by inverse CDF, each row by itself.

    logits: (W,U) float; temperature, top_p: (W,) float64 — per row; uniforms: (W,) float64 in [0,1); never: ids that
    are not drawn, whatever their probability. Returns chosen (W,) int64 and their log softmax(logits / temperature)
    (W,), to which neither top-p nor `never` does anything (temperature 1 where it is 0, greedy).
    """
    greedy = temperature == 0
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide)
    logprobs = F.log_softmax(logits / temperature.masked_fill(greedy, 1.0).to(wide)[:, None], dim=-1)  # (W,U)
    kept = logprobs.double().exp()
    kept[:, list(never)] = 0.0
    cut = (top_p < 1)[:, None]
    if cut.any():  # for all rows at once, so that no row sees how many others are cut
        ordered, order = kept.sort(dim=-1, descending=True, stable=True)
        upto = ordered.cumsum(dim=-1)
        outside = cut & (upto - ordered >= top_p[:, None] * upto[:, -1:])
        kept = kept.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), 0.0)
    cdf = kept.cumsum(dim=-1)
    last = torch.where(kept > 0, torch.arange(kept.shape[1], device=kept.device), 0).amax(dim=-1)
    chosen = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0].minimum(last)  # rounding may pass it
    if greedy.any():
        allowed = logits.index_fill(1, torch.tensor(list(never), dtype=torch.long, device=logits.device), -math.inf)
        chosen = torch.where(greedy, allowed.argmax(dim=-1), chosen)
    return chosen, logprobs.gather(1, chosen[:, None])[:, 0]


# ------------------------------------------------------------------------------------------ arithmetic


def experts_in_passes(x, weights, index, gate, up, down, rows=None):
    """`moe.experts_fused`, but a token's result does not depend on how many others chose its experts.

    Each expert gets some places in a batched product of a fixed shape (E,16,C); who finds no place waits for the next.
    Arguments as there; rows: int — only the first so many rows count, the others give 0 (default: all).
    """
    experts, (tokens, top_k) = len(gate), index.shape
    rows = tokens if rows is None else rows
    load = max(LOAD, ALIGNED // math.gcd(ALIGNED, experts * gate.shape[1]))
    flat = index[:rows].flatten()  # (T·K,)
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.long, device=x.device).scatter_add_(0, flat, torch.ones_like(flat))
    first = counts.cumsum(0) - counts
    queue = torch.empty_like(flat)  # the number of each choice among those of its expert
    queue[order] = torch.arange(len(flat), device=x.device) - first[flat[order]]
    passes = -(-int(counts.max()) // load)
    place = queue // load * (experts * load) + flat * load + queue % load
    inputs = x.new_zeros(passes * experts * load, x.shape[1])
    inputs[place] = x[:rows].repeat_interleave(top_k, dim=0)
    factor = weights.new_zeros(len(inputs), 1)
    factor[place, 0] = weights[:rows].flatten()
    outputs = []
    for a, w in zip(inputs.view(passes, experts, load, -1), factor.view(passes, experts, load, 1)):
        hidden = F.silu(a @ gate.mT) * (a @ up.mT)  # (E,16,F)
        outputs.append((hidden * w).to(x.dtype) @ down.mT)
    chosen = torch.stack(outputs).flatten(0, 2)[place].view(rows, top_k, -1)
    total = chosen[:, 0]
    for k in range(1, top_k):  # one after the other: a sum over the dimension may choose its own order
        total = total + chosen[:, k]
    return torch.cat((total, x.new_zeros(tokens - rows, x.shape[1])))


def attend_in_blocks(q_nope, q_rope, groups, kv_b, scale):
    """`mla.mla_attention_absorbed` of one query per row, whose result does not depend on how many blocks of keys there are.

    Every product has the shape of one block, and blocks are added up in their order: one that a row does not see adds 0.

    q_nope: (W,H,N); q_rope: (W,H,P), rotated; groups: list of (first, last, blocks, visible) — rows first … last − 1, padded
    to G rows, see the keys of blocks, a list of (G,KEYS,R+P), each row its own, or of (1,KEYS,R+P), all the same: latent
    and rope_key of the keys, in order; visible: (blocks,G,1,KEYS) bool; kv_b: (H·(N+V),R); scale: float.
    Returns (W,H·V); 0 for rows of no group.
    """
    rows, heads, nope_dim = q_nope.shape
    up = kv_b.view(heads, -1, kv_b.shape[-1])  # (H,N+V,R)
    query = torch.cat((torch.einsum("whn,hnr->whr", q_nope, up[:, :nope_dim]), q_rope), dim=-1) * scale  # (W,H,R+P)
    mixed = query.new_zeros(rows, heads, up.shape[-1])
    for first, last, blocks, visible in groups:
        count, width = visible.shape[:2]
        own = F.pad(query[first:last], (0, 0, 0, 0, 0, width - (last - first)))
        own = own.view(len(blocks[0]), -1, own.shape[-1])  # (G,H,R+P) or (1,G·H,R+P)
        logits = own.new_empty(count, *own.shape[:2], KEYS)
        for part, block in zip(logits, blocks):
            torch.bmm(own, block.mT, out=part)
        logits = logits.view(count, width, heads, KEYS).masked_fill_(~visible, -math.inf)
        weights = logits.to(torch.promote_types(query.dtype, torch.float32))
        weights = weights.sub_(weights.amax(dim=-1, keepdim=True).amax(dim=0)).exp_()
        total = sum(weights.sum(dim=-1, keepdim=True))  # (G,H,1)
        weights = weights.to(query.dtype).view(count, len(own), -1, KEYS)
        values = sum((part @ block[..., : up.shape[-1]]).to(total.dtype) for part, block in zip(weights, blocks))
        mixed[first:last] = (values.view(width, heads, -1) / total)[: last - first].to(query.dtype)
    return torch.einsum("whr,hvr->whv", mixed, up[:, nope_dim:]).flatten(1)


# ----------------------------------------------------------------------------------------------- model


class SlotCache:
    """The latent cache of many conversations: slot i holds one, from place 0 on, each of a length of its own.

    As in `mla.LatentCache`, a token is its normed latent (R) and its rotated key (P), here side by side. Places lie in
    blocks of KEYS. Unused ones hold zeros or older tokens, never NaN: they weigh 0, and 0 · NaN would be NaN.

    layers, slots, capacity: int — capacity a multiple of KEYS; width: int — R + P; dtype, device as the model's.
    """

    def __init__(self, layers, slots, capacity, width, dtype=torch.float32, device="cpu"):
        self.buffer = torch.zeros(layers, capacity // KEYS, slots, KEYS, width, dtype=dtype, device=device)

    def write(self, layer, slots, places, tokens):
        """Store n tokens (n,R+P); slots: (n,) int64 or int; places: (n,) int64."""
        self.buffer[layer, places // KEYS, slots, places % KEYS] = tokens

    def read(self, layer, slot, rows, blocks):
        """The first blocks of slots 0 … rows − 1, or of one slot `rows` times: a list of (rows,KEYS,R+P)."""
        slots = slice(rows) if slot is None else slice(slot, slot + 1)
        return [self.buffer[layer, block, slots].expand(rows, -1, -1) for block in range(blocks)]

    def move(self, source, target):
        """Copy a slot."""
        self.buffer[:, :, target] = self.buffer[:, :, source]

    def park(self, slot, length):
        """A copy of a slot's first places, for `restore`."""
        return self.buffer[:, : -(-length // KEYS), slot].clone()

    def restore(self, slot, parked, length):
        """Put the first `length` places of a parked copy into a slot; the rest of the slot becomes 0."""
        self.buffer[:, :, slot] = 0
        if length:
            places = torch.arange(length, device=self.buffer.device)
            self.buffer[:, places // KEYS, slot, places % KEYS] = parked.flatten(1, 2)[:, :length]


class SlotModel:
    """A private copy of a K25, and the latent cache of its conversations; see the module for why it works in passes.

    model: K25; slots: int — conversations at once; capacity: int — tokens of one, rounded up to whole blocks;
    deterministic: try every width of a pass first. Raises EngineError when even the widest gives a row other bits in
    another place.
    """

    def __init__(self, model, slots, capacity, deterministic=True):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        config, weight = model.config, model.language_model.lm_head.weight
        self.slots, self.capacity, self.device = slots, -(-capacity // KEYS) * KEYS, weight.device
        self.vocab_size, self.media_pad = config.vocab_size, config.media_placeholder_token_id
        self._scale = softmax_scale(config.qk_nope_head_dim, config.qk_rope_head_dim, config.yarn)
        sizes = (config.qk_rope_head_dim // 2, config.n_routed_experts, config.intermediate_size, config.vocab_size,
                 config.moe_intermediate_size * max(1, config.n_shared_experts))  # fmt: skip
        step = ALIGNED // math.gcd(ALIGNED, *sizes)  # rows whose cosines, sigmoids, … are multiples of ALIGNED
        self._prompt_widths, self._decode_widths = _widths(PROMPT, step), _widths(slots, step)
        self._together = True  # the queries of one prompt share a product with its keys
        if weight.element_size() == 2:
            self._prompt_widths = self._decode_widths = _widths(max(slots, 64), step)[-1:]
            self._together = False
        self.cache = SlotCache(config.num_hidden_layers, self._decode_widths[-1], self.capacity,
                               config.kv_lora_rank + config.qk_rope_head_dim, weight.dtype, self.device)  # fmt: skip
        self._embeddings = OrderedDict()  # id of a MediaItem: (the item, (M,C))
        self.load(self.model.state_dict())
        if deterministic:
            self._check_widths()

    def load(self, state):
        """Take over the weights of a state dict; quantises the experts of a QAT model once and for all."""
        self.model.load_state_dict(state)
        for block in self.model.language_model.model.layers:
            if isinstance(block.mlp, MoE) and block.mlp.experts.qat:
                for matrix in block.mlp.experts.parameters():
                    matrix.copy_(fake_quant(matrix))
        self._embeddings.clear()

    @torch.no_grad()
    @one_thread()
    def encode(self, items):
        """Embeddings (M,C) of media items, each encoded by itself, and once for all requests that show the same object."""
        for item in items:
            if id(item) not in self._embeddings:
                patches, grid = (tensor.to(self.device) for tensor in pack([item]))
                self._embeddings[id(item)] = item, self.model.encode_media(patches, grid)  # the item keeps its id alive
            self._embeddings.move_to_end(id(item))
        found = [self._embeddings[id(item)][1] for item in items]
        while len(self._embeddings) > REMEMBERED:
            self._embeddings.popitem(last=False)
        return torch.cat(found) if found else None

    @torch.no_grad()
    def embed(self, ids, media):
        """Token embeddings (T,C) of a list of ids, with the embeddings `media` (M,C) or None in the media places."""
        return self.model.embed(torch.tensor([ids], dtype=torch.long, device=self.device), media)[0]

    @torch.no_grad()
    @one_thread()
    def prefill(self, prompts):
        """Write prompts to the cache. prompts: list of (slot, place of the first token, (T,C) from `embed`)."""
        parts, room = [], self._prompt_widths[-1]
        for slot, place, x in prompts:
            while len(x):
                parts.append((slot, place, x[:room]))
                place, x, room = place + len(parts[-1][2]), x[room:], room - len(parts[-1][2])
                if not room:
                    self._prefill(parts)
                    parts, room = [], self._prompt_widths[-1]
        if parts:
            self._prefill(parts)

    def _prefill(self, parts):
        """One pass over parts of prompts, each of which attends by itself; (W,C)."""
        slots = torch.cat([torch.full((len(x),), slot) for slot, _, x in parts])
        places = torch.cat([torch.arange(place, place + len(x)) for _, place, x in parts])
        ends = accumulate(len(x) for _, _, x in parts)
        groups = [(end - len(x), end, slot) for end, (slot, _, x) in zip(ends, parts)]
        return self._pass(torch.cat([x for _, _, x in parts]), slots, places, groups, self._prompt_widths)

    @torch.no_grad()
    @one_thread()
    def decode(self, tokens, places):
        """Logits (W,U), W ≥ n, after one more token in each of the slots 0 … n − 1; rows from n on mean nothing.

        tokens: list of n ids; places: list of n int — where they come in their slots.
        """
        x, rows = self.model.language_model.model.embed_tokens(torch.tensor(tokens, device=self.device)), len(tokens)
        groups = [(0, rows, None)]
        hidden = self._pass(x, torch.arange(rows), torch.tensor(places), groups, self._decode_widths)
        return self.model.language_model.lm_head(hidden)

    def _pass(self, x, slots, places, groups, widths):
        """The decoder over single tokens (n,C), padded to the next width: (W,C).

        slots, places: (n,) int64, on the CPU — where each token lies; groups: list of (first row, row behind the last,
        slot) — rows that attend together: all of one slot, or with slot None one of each slot from 0 on; widths: list.
        """
        config, decoder = self.model.config, self.model.language_model.model
        rows, width = len(x), _fit(widths, len(x))
        x = F.pad(x, (0, 0, 0, width - rows))
        seen = []  # of each group: how often its keys are read, blocks, visible
        for first, last, slot in groups:
            padded = F.pad(places[first:last], (0, _fit(widths, last - first) - (last - first)))  # padding sees the first key
            blocks = int(padded.max()) // KEYS + 1
            visible = torch.arange(blocks * KEYS).view(blocks, 1, 1, KEYS) <= padded[:, None, None]  # (blocks,G,1,KEYS)
            seen.append((1 if slot is not None and self._together else len(padded), blocks, visible.to(self.device)))
        slots, places = slots.to(self.device), places.to(self.device)
        table = rope_table(F.pad(places, (0, width - rows))[:, None], config.qk_rope_head_dim, config.rope_theta, config.yarn,
                           torch.promote_types(x.dtype, torch.float32))  # fmt: skip
        for block in decoder.layers:
            attention = block.self_attn
            *query, latent, rope_key = (a[:, 0] for a in attention.project(block.input_layernorm(x)[:, None], table))
            self.cache.write(block.index, slots, places, torch.cat((latent, rope_key), dim=-1)[:rows])
            read = [(first, last, self.cache.read(block.index, slot, readers, blocks), visible)
                    for (first, last, slot), (readers, blocks, visible) in zip(groups, seen)]  # fmt: skip
            x = x + attention.o_proj(attend_in_blocks(*query, read, attention.kv_b_proj.weight, self._scale))
            normed = block.post_attention_layernorm(x)
            x = x + (self._experts(block.mlp, normed, rows) if isinstance(block.mlp, MoE) else block.mlp(normed))
        return decoder.norm(x)

    @staticmethod
    def _experts(moe, x, rows):
        """`MoE.forward` of (W,C), the routed part in passes."""
        routing, experts = moe.gate(x), moe.experts
        matrices = (matrix.to(x.dtype) for matrix in (experts.gate_proj, experts.up_proj, experts.down_proj))
        routed = experts_in_passes(x, routing.weights, routing.index, *matrices, rows)
        return routed if moe.shared_experts is None else routed + moe.shared_experts(x)

    def _check_widths(self):
        """Keep only those widths in which each row has the same bits, in every place, in prefill and decode.

        Which do depends on the shapes and on the machine: a process tries them once for models of the same shapes.
        """
        ladders = self._prompt_widths, self._decode_widths
        key = self.model.config, self.cache.buffer.dtype, self.device, self.capacity, *map(tuple, ladders)
        if key not in _AGREEING:
            self._try_widths(ladders)
            _AGREEING[key] = self._together, self._prompt_widths, self._decode_widths
        self._together, self._prompt_widths, self._decode_widths = _AGREEING[key]

    def _try_widths(self, ladders):
        for self._together in (True, False) if self._together else (False,):
            self._prompt_widths, self._decode_widths = agreeing = self._widths_that_agree(*ladders)
            if all(ours and ours[-1] == ladder[-1] for ours, ladder in zip(agreeing, ladders)):
                return
        raise EngineError("what this model computes for a token depends, on this machine, on the row it stands in: choose model "
                          "widths that are multiples of 8 and slots that are a multiple of 64, or deterministic=False")  # fmt: skip

    @torch.no_grad()
    @one_thread()
    def _widths_that_agree(self, prompt, decode):
        """The widths, of prefill and of decode, that on random numbers always give the bits of the widest prefill.

        Eight kinds of row see from one key to all of the first three blocks; each kind stands in every eighth row.
        """
        noise, buffer = torch.Generator().manual_seed(0), self.cache.buffer
        places = torch.linspace(0, min(3 * KEYS, self.capacity) - 1, 8).long()
        agreeing = {(one_slot, width) for one_slot, ladder in ((True, prompt), (False, decode)) for width in ladder}
        for _ in range(TRIALS):
            buffer[:] = torch.randn(buffer[:, :, :1].shape, generator=noise).to(buffer)  # every slot alike
            x = torch.randn(8, self.model.config.hidden_size, generator=noise).to(buffer)
            expected = self._trial(x, places, True, prompt[-1], 8)
            written = buffer[:, places // KEYS, :1, places % KEYS]  # (8,layers,1,R+P)
            for one_slot, width in sorted(agreeing):
                buffer[:, places // KEYS, :, places % KEYS] = written
                result = self._trial(x, places, one_slot, width, width)
                if not all(torch.equal(values, wanted[torch.arange(width) % 8]) for values, wanted in zip(result, expected)):
                    agreeing.remove((one_slot, width))
        buffer.zero_()
        return [w for w in prompt if (True, w) in agreeing], [w for w in decode if (False, w) in agreeing]

    def _trial(self, x, places, one_slot, width, rows):
        """The first rows of logits and log-probs of a pass that is full of the 8 rows x (8,C), over and over."""
        kind = torch.arange(width) % 8
        slots, slot = (kind * 0, 0) if one_slot else (torch.arange(width), None)
        logits = self.model.language_model.lm_head(self._pass(x[kind], slots, places[kind], [(0, width, slot)], [width]))
        ones = torch.ones(width, dtype=torch.float64, device=self.device)
        return logits[:rows], draw(logits, ones, 0.95 * ones, 0.5 * ones)[1][:rows]


def _widths(largest, step):
    """The rows that passes may have: 8, 16, 32, 64, 128, 192, 256, … up to the first that holds `largest`, of these the
    multiples of `step`."""
    every = [width for width in (*ROWS, *range(64, largest + 64, 64)) if width % step == 0]
    return every[: every.index(_fit(every, largest)) + 1]


def _fit(widths, rows):
    """The smallest width that holds so many rows."""
    return next(width for width in widths if width >= rows)
