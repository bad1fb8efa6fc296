"""What the bench measures: pairs of ways to compute one thing, with the work it takes.

Beside transformers, preset `small`: a training step, prefill, decoding behind contexts of several lengths, mixed images
in one packed call. Beside its own reference: every fused operation. On a large accelerator, beside the ceilings only:
one MoE layer, absorbed decoding and the vision tower at the released widths. All are generators: a pair's tensors live
only while it is measured.

Public names: Case, Workload, TARGETS, image_grids, peer_cases, op_cases, released_cases.
Letters: B batch, T tokens, S keys, H heads, C hidden, R latent rank, N/P/V nope/rope/value head dims, E experts,
F expert width, U vocabulary, L patches, p patch side.     Tests: pytest tests/test_bench.py
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import mla
import moe
import vit3d
from k25 import Block, cross_entropy_fused, cross_entropy_reference
from optim import newton_schulz_fused, newton_schulz_reference
from roofline import (Work, absorbed_work, decode_work, decoder_work, experts_work, layer_work, linear_work,
                      max_logits_work, mla_work, newton_schulz_work, vision_attention_work, vision_work)  # fmt: skip

# What the ratio to transformers is to reach on a CPU.
TARGETS = {"train": 1.15, "prefill": 1.15, "decode": 4.0, "decode x16": 3.0, "images": 1.5}


@dataclass(frozen=True)
class Case:
    """Two ways to compute one thing, to be compared and timed.

    ours, theirs: take nothing, return a tensor or a nested sequence of them; theirs is None where there is only a
    ceiling to compare with. against: what theirs is; what: the sizes, in words; target: of the ratio, or None.
    """

    name: str
    what: str
    against: str  # "transformers" | "reference" | "ceiling"
    ours: Callable
    theirs: Callable | None
    work: Work
    target: float | None = None


@dataclass(frozen=True)
class Workload:
    """Sizes of everything that is measured."""

    train: int = 2048  # tokens of the one row of a training step
    prefill: int = 2048
    context: int = 2048  # cached tokens before decoding
    long_context: int = 4096
    short_context: int = 32
    batch: int = 16
    steps: int = 8  # tokens decoded in one turn; a quarter of it for the batch
    images: int = 32
    largest: int = 16  # 2×2 blocks along the longest side of an image
    op_tokens: int = 1024
    loop_tokens: int = 64  # where the reference loops over tokens in Python
    gemm: int = 1024  # side of the ceiling's matrices
    copy: int = 2**24  # numbers that the ceiling copies
    repeats: int = 5


def image_grids(count, largest, seed=0):
    """Grids of images of mixed sizes: each side drawn from 1 … `largest` blocks of 2×2 patches."""
    sides = torch.randint(1, largest + 1, (count, 2), generator=torch.Generator().manual_seed(seed))
    return [(1, 2 * rows, 2 * columns) for rows, columns in sides.tolist()]


def peer_cases(model, peer, work):
    """Yield the cases of K25 beside transformers: training, prefill, decoding, images.

    model: K25 and peer: transformers' model of the same weights, in one dtype; work: Workload.
    """
    weight = model.language_model.lm_head.weight
    config, size, device = model.config, weight.element_size(), weight.device
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.bos_token_id, (1, max(work.train, work.prefill, work.long_context)), generator=draw).to(device)
    named = "transformers"

    batch = ids[:, : work.train]
    yield Case("train", f"forward and backward of one row of {work.train} tokens", named,
               lambda: _train(model, batch), lambda: _train_peer(peer, batch),
               decoder_work(1, work.train, work.train, work.train, config, size) * 3, TARGETS["train"])  # fmt: skip

    prompt = ids[:, : work.prefill]
    yield Case("prefill", f"one prompt of {work.prefill} tokens", named,
               lambda: _prefill(model, prompt), lambda: _prefill_peer(peer, prompt),
               decoder_work(1, work.prefill, work.prefill, 1, config, size), TARGETS["prefill"])  # fmt: skip

    long = ids[:, : work.long_context]
    ours, theirs = _filled(model, long), _filled_peer(peer, long)
    for name, rows, context in (
        ("decode", 1, work.context),
        (f"decode x{work.batch}", work.batch, work.context),
        ("decode long", 1, work.long_context),
        ("decode short", 1, work.short_context),
    ):
        steps = work.steps if rows == 1 else max(work.steps // 4, 1)
        tokens = torch.randint(0, config.bos_token_id, (rows, steps), generator=draw).to(device)
        cache, peer_cache = _cut(model, ours, rows, context, steps), _cut_peer(theirs, rows, context)
        yield Case(name, f"{steps} tokens for each of {rows} rows after {context} tokens", named,
                   lambda c=cache, s=context, t=tokens: _decode(model, c, s, t),
                   lambda c=peer_cache, s=context, t=tokens: _decode_peer(peer, c, s, t),
                   decode_work(rows, context, steps, config, size), TARGETS.get(name))  # fmt: skip
    del ours, theirs, cache, peer_cache

    grids = image_grids(work.images, work.largest)
    patches, grid_thw = _media(grids, config.vision, draw, weight)
    yield Case("images", f"{len(grids)} images, {len(patches)} patches, in one packed call", named,
               lambda: _encode(model, patches, grid_thw), lambda: _encode_peer(peer, patches, grid_thw),
               vision_work(grids, config.vision, size), TARGETS["images"])  # fmt: skip

    # Clips of several lengths beside images are more than the peer's packed call can do: there they go one by one.
    clips = [(1 + i % config.vision.init_pos_emb_time, h, w) for i, (_, h, w) in enumerate(image_grids(work.images, work.largest // 2))]
    frames, clips_thw = _media(clips, config.vision, draw, weight)
    yield Case("images and clips", f"{len(clips)} of 1 to {max(t for t, _, _ in clips)} frames, {len(frames)} patches; theirs one by one",
               named, lambda: _encode(model, frames, clips_thw), lambda: _encode_peer_singly(peer, frames, clips_thw),
               vision_work(clips, config.vision, size))  # fmt: skip


def _media(grids, vision, draw, like):
    """Random patches (L,3pp) of some grids, as the preprocessing makes them, and the grids (I,3)."""
    patches = torch.rand(sum(math.prod(g) for g in grids), 3 * vision.patch_size**2, generator=draw) * 2 - 1
    return patches.to(like), torch.tensor(grids, device=like.device)


@torch.no_grad()
def _encode(model, patches, grid_thw):
    return model.encode_media(patches, grid_thw)


@torch.no_grad()
def _encode_peer(peer, patches, grid_thw):
    pixels = patches.unflatten(1, (3, peer.model.vision_tower.config.patch_size, -1))  # (L,3,p,p)
    return torch.cat(peer.model.get_image_features(pixels, grid_thw).pooler_output)


@torch.no_grad()
def _encode_peer_singly(peer, patches, grid_thw):
    core, side = peer.model, peer.model.vision_tower.config.patch_size
    items = zip(patches.unflatten(1, (3, side, side)).split(grid_thw.prod(dim=1).tolist()), grid_thw)
    merged = [core.vision_tower(pixels, grid_thw=grid[None]).pooler_output for pixels, grid in items]
    return torch.cat([core.mm_projector(tokens).squeeze(1) for tokens in merged])


def _train(model, ids):
    """Loss of the next tokens, and the gradients that reach both ends of the decoder; no optimizer on either side."""
    weight = model.language_model.lm_head.weight
    hidden, _ = model.hidden(model.embed(ids))
    loss = cross_entropy_fused(hidden[:, :-1].flatten(0, 1), weight, ids[:, 1:].flatten()).mean()
    loss.backward()
    gradients = loss, weight.grad, model.language_model.model.embed_tokens.weight.grad
    model.zero_grad(set_to_none=True)
    return gradients


def _train_peer(peer, ids):
    loss = peer(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = loss, peer.lm_head.weight.grad, peer.get_input_embeddings().weight.grad
    peer.zero_grad(set_to_none=True)
    return gradients


@torch.no_grad()
def _prefill(model, ids):
    """Logits of the last token, and the latents of all layers (B,T,R)."""
    cache = model.new_cache(*ids.shape)
    hidden, _ = model.hidden(model.embed(ids), cache=cache)
    return model.language_model.lm_head(hidden[:, -1]), list(cache.latent)


@torch.no_grad()
def _prefill_peer(peer, ids):
    out = peer(input_ids=ids, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], [layer.keys[:, 0] for layer in out.past_key_values.layers]  # it keeps (B,1,T,R)


@torch.no_grad()
def _filled(model, ids):
    """Our cache after one prompt, and the peer's below; each is then cut to a context and repeated over rows."""
    cache = model.new_cache(*ids.shape)
    model.hidden(model.embed(ids), cache=cache)
    return cache


@torch.no_grad()
def _filled_peer(peer, ids):
    return peer(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _cut(model, full, rows, context, room):
    """A cache of `rows` rows whose first `context` tokens are those of `full`, with room for more."""
    cache = model.new_cache(rows, context + room)
    positions = torch.arange(context, device=full.latent.device).expand(rows, -1)
    cache.extend(torch.zeros_like(positions), positions)
    cache.latent[:, :, :context] = full.latent[:, :, :context]
    cache.rope_key[:, :, :context] = full.rope_key[:, :, :context]
    return cache


def _shorten(cache, context):
    """The peer's cache down to `context` tokens; its `crop` takes how many to remove, negative."""
    if excess := cache.get_seq_length() - context:
        cache.crop(-excess)


def _cut_peer(full, rows, context):
    cache = copy.deepcopy(full)
    _shorten(cache, context)
    cache.batch_repeat_interleave(rows)
    return cache


@torch.no_grad()
def _decode(model, cache, context, tokens):
    """Logits (B,U) after each of the given tokens (B,n), one after another behind the first `context` of the cache."""
    cache.length, cache.next_position = context, torch.full_like(cache.next_position, context)
    logits = []
    for token in tokens.split(1, dim=1):
        hidden, _ = model.hidden(model.language_model.model.embed_tokens(token), cache=cache)
        logits.append(model.language_model.lm_head(hidden[:, -1]))
    return logits


@torch.no_grad()
def _decode_peer(peer, cache, context, tokens):
    _shorten(cache, context)
    return [peer(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1] for token in tokens.split(1, dim=1)]


def op_cases(config, work, dtype, device):
    """Yield every fused operation beside its reference, at the widths of a config. work: Workload."""
    draw, size = torch.Generator().manual_seed(0), torch.empty((), dtype=dtype).element_size()

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=draw) * scale).to(device, dtype)

    def pair(name, what, fused, reference, arguments, work, gradients=0):
        """gradients: how many of the arguments, from the first, are differentiated."""
        run = _differentiated if gradients else _plain
        return Case(name, what, "reference", run(fused, arguments, gradients), run(reference, arguments, gradients), work)

    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    rank, value, hidden = config.kv_lora_rank, config.v_head_dim, config.hidden_size
    scale = mla.softmax_scale(nope, rope, config.yarn)

    def attention(tokens, keys):
        return [normal(1, tokens, heads, nope), normal(1, tokens, heads, rope), normal(1, keys, rank), normal(1, keys, rope),
                normal(heads * (nope + value), rank, scale=rank**-0.5), None, scale]  # fmt: skip

    tokens, keys = work.op_tokens, work.long_context
    yield pair("mla attention", f"forward and backward, {tokens} tokens", mla.mla_attention_fused, mla.mla_attention_reference,
               attention(tokens, tokens), mla_work(1, tokens, tokens, config, size) * 3, gradients=5)  # fmt: skip
    yield pair("mla absorbed", f"one token after {keys}", mla.mla_attention_absorbed, mla.mla_attention_reference,
               attention(1, keys), absorbed_work(1, 1, keys, config, size))  # fmt: skip
    yield pair("max logits", f"{tokens} tokens", mla.max_logits_fused, mla.max_logits_reference,
               attention(tokens, tokens), max_logits_work(tokens, config, size))  # fmt: skip

    n, chosen, width = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    router = normal(n, hidden, scale=0.02), torch.zeros(n, device=device), chosen, config.n_group, config.topk_group
    few = work.loop_tokens
    yield pair("route", f"{few} tokens", _routed(moe.route_fused), _routed(moe.route_reference),
               [normal(few, hidden), *router], linear_work(few, n, hidden, size))  # fmt: skip
    matrices = [normal(n, width, hidden, scale=0.02), normal(n, width, hidden, scale=0.02), normal(n, hidden, width, scale=0.02)]
    x = normal(tokens, hidden)
    routing = moe.route_fused(x, *router)
    yield pair("experts", f"forward and backward, {tokens} tokens", _experts(moe.experts_fused, routing.index),
               _experts(moe.experts_reference, routing.index), [x, routing.weights, *matrices],
               experts_work(tokens, config, size) * 3, gradients=5)  # fmt: skip
    one = moe.route_fused(x[:1], *router)
    yield pair("experts, decoding", "one token", _experts(moe.experts_fused, one.index),
               _experts(moe.experts_reference, one.index), [x[:1], one.weights, *matrices],
               experts_work(1, config, size))  # fmt: skip
    routing = moe.route_fused(normal(2 * few, hidden), *router)
    yield pair("balance loss", f"2 rows of {few} tokens", moe.sequence_balance_loss_fused, moe.sequence_balance_loss_reference,
               [routing.scores.unflatten(0, (2, few)), routing.index.unflatten(0, (2, few))],
               Work(4 * routing.scores.numel(), routing.scores.nbytes + routing.index.nbytes))  # fmt: skip

    rows = 2 * tokens
    targets = torch.randint(0, config.vocab_size, (rows,), generator=draw).to(device)
    yield pair("cross entropy", f"forward and backward, {rows} tokens", cross_entropy_fused, cross_entropy_reference,
               [normal(rows, hidden), normal(config.vocab_size, hidden, scale=0.02), targets],
               linear_work(rows, config.vocab_size, hidden, size) * 3, gradients=2)  # fmt: skip
    yield pair("newton schulz", f"{n} matrices {width} x {hidden}, 5 steps", newton_schulz_fused, newton_schulz_reference,
               [normal(n, width, hidden)], newton_schulz_work(n, width, hidden, 5, size))  # fmt: skip

    vision, grids = config.vision, image_grids(work.images // 4, work.largest)
    lengths, inner = [math.prod(g) for g in grids], vision.vt_num_attention_heads
    qkv = [normal(sum(lengths), inner, vision.vt_hidden_size // inner) for _ in range(3)]
    what = f"{len(lengths)} images, {sum(lengths)} patches"
    yield pair("vit attention", f"forward and backward, {what}", vit3d.vit_attention_fused, vit3d.vit_attention_reference,
               [*qkv, lengths], vision_attention_work(lengths, vision.vt_hidden_size, size) * 3, gradients=3)  # fmt: skip
    x = normal(sum(lengths), vision.vt_hidden_size)
    yield pair("pool merge", what, vit3d.pool_merge_fused, vit3d.pool_merge_reference, [x, grids], Work(x.numel(), 2 * x.nbytes))
    embedded = [normal(tokens, vision.vt_hidden_size), normal(tokens, vision.vt_hidden_size)]
    scalars = [torch.tensor(10.0, device=device).log().to(dtype), torch.tensor(-10.0, device=device).to(dtype)]
    yield pair("siglip", f"forward and backward, {tokens} pairs", vit3d.siglip_loss_fused, vit3d.siglip_loss_reference,
               [*embedded, *scalars], linear_work(tokens, tokens, vision.vt_hidden_size, size) * 3, gradients=4)  # fmt: skip


def _plain(function, arguments, _=0):
    @torch.no_grad()
    def run():
        return function(*arguments)

    return run


def _differentiated(function, arguments, count):
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments[:count]]

    def run():
        out = function(*leaves, *arguments[count:])
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return run


def _routed(route):
    def run(*arguments):
        routing = route(*arguments)
        return routing.weights, routing.index, routing.scores

    return run


def _experts(experts, index):
    return lambda x, weights, *matrices: experts(x, weights, index, *matrices)


def released_cases(config, dtype, device, tokens=8192, rows=8, context=32768, side=128):
    """Yield what only a large accelerator holds: one MoE layer, absorbed decoding, the vision tower, at a config's widths.

    tokens: of the layer's one row; rows, context: of decoding; side: patch rows and columns of one image.
    """
    size = torch.empty((), dtype=dtype).element_size()
    block = _empty(lambda: Block(config, config.first_k_dense_replace), dtype, device)
    x = torch.randn(1, tokens, config.hidden_size, device=device).to(dtype)
    positions, valid = torch.arange(tokens, device=device)[None], torch.ones(1, tokens, dtype=torch.bool, device=device)
    table = mla.rope_table(positions, config.qk_rope_head_dim, config.rope_theta, config.yarn)

    def forward():
        return block(x, table, None, valid)[0]

    def backward():
        forward().square().mean().backward()
        block.zero_grad(set_to_none=True)

    work = layer_work(1, tokens, tokens, config, size, False)
    what = f"{config.n_routed_experts} experts, hidden {config.hidden_size}, one row of {tokens} tokens"
    yield Case("layer", what, "ceiling", torch.no_grad()(forward), None, work)
    weights = sum(p.nbytes for p in block.parameters())
    if torch.device(device).type == "cpu" or torch.cuda.mem_get_info(device)[0] > 1.5 * weights:  # gradients and activations
        yield Case("layer, training", f"forward and backward, {what}", "ceiling", backward, None, work * 3)
    del block, x

    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    shapes = ((rows, 1, heads, nope), (rows, 1, heads, rope), (rows, context, config.kv_lora_rank), (rows, context, rope))
    cached = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    up = torch.randn(heads * (nope + config.v_head_dim), config.kv_lora_rank, device=device) * config.kv_lora_rank**-0.5
    arguments = [*cached, up.to(dtype), None, mla.softmax_scale(nope, rope, config.yarn)]
    yield Case("absorbed decoding", f"one token for each of {rows} rows after {context}, one layer", "reference",
               _plain(mla.mla_attention_absorbed, arguments), _plain(mla.mla_attention_reference, arguments),
               absorbed_work(rows, 1, context, config, size))  # fmt: skip
    del cached, arguments

    tower = _empty(lambda: vit3d.MoonViT3d(config.vision), dtype, device)
    projector = _empty(lambda: vit3d.Projector(config.vision), dtype, device)
    grid_thw = torch.tensor([[1, side, side]], device=device)
    patches = torch.rand(side * side, 3 * config.vision.patch_size**2, device=device).to(dtype) * 2 - 1

    @torch.no_grad()
    def encode():
        return projector(tower(patches, grid_thw))

    yield Case("vision tower", f"one image of {side * side} patches, with projector", "ceiling", encode, None,
               vision_work([(1, side, side)], config.vision, size))  # fmt: skip


@torch.no_grad()
def _empty(build, dtype, device):
    """A module made in place in its dtype, never held in float32: matrices normal(0, 0.02), norm weights 1, biases 0."""
    with torch.device("meta"):
        module = build().to(dtype)
    module = module.to_empty(device=device)
    for name, weight in module.named_parameters():
        weight.normal_(0, 0.02) if weight.ndim > 1 else weight.fill_(float(name.endswith("weight")))
    for buffer in module.buffers():
        buffer.zero_()
    return module
