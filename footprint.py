"""What a rank of the parallel trainer holds, in bytes, without building it: weights, gradients, optimizer state, activations.

Weights are counted by name on the meta device, cut as parallel.py cuts them. What a layer keeps for its backward pass
is written down tensor by tensor (`layer_kept`), as the unfused operations of mla.py and moe.py keep it;
`measure_saved` counts what autograd really keeps, `measure_peak` what is really allocated, and the tests compare.

Public names: Recipe, RECIPES, RECOMPUTE, Kept, layer_kept, selective_kept, embed_kept, head_kept, shared_kept, stage_kept, vision_kept,
measure_saved, measure_peak, live_bytes, Holding, holdings, Store, messages, buffer_bytes, stage_bytes, Fill, fills.
Letters: B rows, T tokens, C hidden, H heads, N/P/V nope, rope and value head dims, J = N + P, Q query rank, R latent rank,
E experts, K chosen, F expert width, U vocabulary.     Tests: pytest tests/test_planner.py
"""

import gc
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from k25 import K25
from optim import SLOTS, partition
from parallel import Place, split_units
from schedule import most_in_flight, pretended, schedule_tables

# ------------------------------------------------------------------------------------------- precisions


@dataclass(frozen=True)
class Recipe:
    """Bytes per number, of what is kept and of what is computed."""

    weights: int
    gradients: int
    state: int  # each of the optimizer's slots
    master: int  # a second copy of the weights beside the optimizer's state, 0 for none
    stream: int  # the residual stream, norms' outputs, pipeline messages
    linear: int  # inputs and outputs of matrix products outside the experts
    experts: int  # the same inside, and the tokens on their way there
    wide: int  # inside norms and routers


# The first three are --dtype of train_small.py: bfloat16 computes by autocast over float32 weights, and the experts in
# the dtype of the tokens, which is the stream's. The last is how K2 was trained: weights in bfloat16, gradients summed
# in float32, a float32 master copy in the optimizer's shard.
RECIPES = {
    "float32": Recipe(4, 4, 4, 0, 4, 4, 4, 4),
    "float64": Recipe(8, 8, 8, 0, 8, 8, 8, 8),
    "bfloat16": Recipe(4, 4, 4, 0, 4, 2, 4, 4),
    "bfloat16-weights": Recipe(2, 4, 4, 4, 2, 2, 2, 4),
}
FP8 = 1 + 4 / 128  # bytes per number: E4M3 in tiles of 128 with one float32 scale
CHUNK = 1024  # tokens of logits at a time, as cross_entropy_fused
RECOMPUTE = ("norms", "swiglu", "mla")


# ------------------------------------------------------------------------------------------- activations


@dataclass(frozen=True)
class Kept:
    """One tensor that waits for the backward pass.

    recomputed: bytes that remain when its group — norms, swiglu or mla — is recomputed; fp8: bytes as FP8, if it may be.
    """

    name: str
    group: str  # norms | swiglu | mla | copies (of weights, in the dtype of the products) | other
    bytes: float
    recomputed: float | None = None
    fp8: float | None = None

    def after(self, recompute=(), fp8=False):
        """Its bytes with some groups recomputed, and what may be in FP8."""
        plain = self.fp8 if fp8 and self.fp8 is not None else self.bytes
        return self.recomputed if self.group in recompute and self.recomputed is not None else plain


def _norm(name, width, n, given, weight, wide, outputs):
    """What RMSNorm keeps of n tokens: its input made wide, 1/rms, what the weight multiplies, and its outputs' copies.

    given, weight, wide: bytes per number of input, weight and inside; outputs: bytes per number of each copy.
    """
    inside = (0 if given == wide else wide) + given + sum(outputs)
    return [Kept(f"{name}: input", "norms", n * width * (given if given == wide else 0), n * width * given),
            Kept(f"{name}: inside and output", "norms", n * (width * inside + wide), 0)]  # fmt: skip


def layer_kept(config, recipe, rows, length, dense, ep=1):
    """All that one decoder layer keeps for its backward pass, routing as even as can be.

    rows, length: B, T of a microbatch; dense: bool — layers before the first MoE layer; ep: ranks that share experts.
    Returns a list of Kept. What all layers of a stage share is in `shared_kept`.
    """
    return _attention_kept(config, recipe, rows, length) + _feed_kept(config, recipe, rows, length, dense, ep)


def _attention_matrices(config):
    """Numbers of the attention's weights."""
    hidden, heads, query, latent = config.hidden_size, config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return [hidden * query, hidden * (latent + rope), query * heads * (nope + rope), latent * heads * (nope + value), heads * value * hidden]


def _attention_kept(config, recipe, rows, length):
    n, c, s, w, p = rows * length, recipe.linear, recipe.stream, recipe.wide, recipe.weights
    hidden, heads, query, latent = config.hidden_size, config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
    rope, value = config.qk_rope_head_dim, config.v_head_dim
    joined = config.qk_nope_head_dim + rope
    cast = p != c  # autocast: each product keeps its own copies of input and weight
    wider = max(joined, value)  # values are padded to it for the flash kernels
    kept = _norm("input_layernorm", hidden, n, s, p, w, [c, c] if cast else [c])
    kept += _norm("q_a_layernorm", query, n, c, p, w, [c])
    split = latent + (rope if c == w else 0)  # a part of kv_a's output is kept as all of it
    return kept + [
        Kept("kv_a_layernorm: input", "norms", n * split * (w if c == w else 0), n * latent * c),
        Kept("kv_a_layernorm: inside and output", "norms", n * (latent * (2 * c + (w if c != w else 0)) + w), 0),
        Kept("query", "mla", n * heads * joined * c, 0),
        Kept("key", "mla", n * heads * joined * c, n * rope * c),
        Kept("value, padded", "mla", n * heads * wider * c, 0),
        Kept("mask, as numbers", "other", n * length * c),
        Kept("attention: output, log-sum-exp", "other", n * heads * (wider * c + w)),
        Kept("o_proj: input", "other", n * heads * value * c),
        Kept("attention's weights in another dtype", "copies", sum(_attention_matrices(config)) * c * cast),
    ]


def _feed_kept(config, recipe, rows, length, dense, ep):
    n, c, w, e, p = rows * length, recipe.linear, recipe.wide, recipe.experts, recipe.weights
    hidden, top_k, width = config.hidden_size, config.num_experts_per_tok, config.moe_intermediate_size
    cast = p != c
    kept = _norm("post_attention_layernorm", hidden, n, recipe.stream, p, w, [])
    if dense:
        inputs, mlp, copies = [c, c] if cast else [c], config.intermediate_size, 0
    else:
        shared = config.n_shared_experts > 0
        inputs = [w] + ([c, c] if cast else [c] if c != w else []) * shared  # router's, shared experts'
        mlp, copies = width * config.n_shared_experts, config.n_routed_experts * hidden * w * (p != w)
    rounded = n * hidden * FP8 * len(inputs) if dense else None  # a router reads the same rows, and needs them exact
    kept += [Kept("post_attention_layernorm: outputs", "norms", n * hidden * sum(inputs), 0, rounded)]
    kept += _swiglu("mlp" if dense else "shared_experts", n * mlp, c, 2)
    kept += [Kept("weights in another dtype", "copies", copies + 3 * hidden * mlp * c * cast)]
    if dense:
        return kept
    chosen = n * top_k
    kept += [Kept("router: scores, order of all experts", "other", n * config.n_routed_experts * (w + 8)),
             Kept("router: weights, sums, rows' order", "other", n * (top_k * (2 * w + 16) + 2 * w + 1)),
             Kept("experts: rows in", "other", chosen * hidden * e, None, chosen * hidden * FP8)]  # fmt: skip
    kept += _swiglu("experts", chosen * width, e, 2 if ep > 1 else 3)  # elsewhere they are weighted after their return
    if ep > 1:
        kept += [Kept("experts: rows back", "other", chosen * (hidden * e + 16 + w), None, chosen * hidden * FP8)]
    return kept


def selective_kept(config, recipe, rows, length, dense):
    """What one layer keeps under activations.py's selective recompute: its two inputs, and what the products that are
    not done again and the attention put out. Returns two lists of Kept, of attention and feed-forward."""
    n, c, w = rows * length, recipe.linear, recipe.wide
    wider = max(config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    narrow = config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim
    width = config.intermediate_size if dense else config.moe_intermediate_size * config.n_shared_experts
    stream = Kept("input", "other", n * config.hidden_size * recipe.stream)
    attention = [stream, Kept("q_a, kv_a", "other", n * narrow * c),
                 Kept("attention: output, log-sum-exp", "other", n * config.num_attention_heads * (wider * c + w))]  # fmt: skip
    feed = [stream, *_swiglu("mlp", n * width, c, 0)]
    if not dense:
        feed += [Kept("router: logits", "other", n * config.n_routed_experts * w)]
        feed += _swiglu("experts", n * config.num_experts_per_tok * config.moe_intermediate_size, recipe.experts, 0)
    return attention, feed


def _swiglu(name, numbers, size, products):
    """Gate and up, and what is made of them: silu(gate), the product, and of the experts also the weighted product."""
    return [Kept(f"{name}: gate and up", "other", 2 * numbers * size, None, 2 * numbers * FP8),
            Kept(f"{name}: silu and products", "swiglu", products * numbers * size, 0, products * numbers * FP8)]  # fmt: skip


def embed_kept(config, rows, length):
    """What the embedding keeps: the ids. Returns a list of Kept."""
    return [Kept("ids", "other", rows * length * 8)]


def head_kept(config, recipe, rows, length):
    """What norm, head and chunked cross-entropy keep. Returns a list of Kept."""
    n, s, p = rows * length, recipe.stream, recipe.weights
    kept = _norm("norm", config.hidden_size, n, s, p, recipe.wide, [])
    if n > CHUNK:  # each chunk is recomputed
        return kept + [Kept("hidden", "other", n * (config.hidden_size * s + 8))]
    copies = config.vocab_size * config.hidden_size * recipe.linear * (p != recipe.linear)
    return kept + [Kept("hidden, logits", "other", n * (config.hidden_size * recipe.linear + config.vocab_size * recipe.wide + 8)),
                   Kept("lm_head in another dtype", "copies", copies)]  # fmt: skip


def _unit_kept(config, recipe, unit, rows, length, ep):
    if unit == "embed":
        return embed_kept(config, rows, length)
    if unit == "head":
        return head_kept(config, recipe, rows, length)
    return layer_kept(config, recipe, rows, length, unit < config.first_k_dense_replace, ep)


def shared_kept(config, recipe, rows, length, full):
    """What the layers of a stage share for one microbatch: cos and sin; of whole-block recompute also the mask."""
    bits = rows * length * (length + 1) if full else 0
    return [Kept("rope table, mask", "other", rows * length * config.qk_rope_head_dim * recipe.wide + bits)]


def _backward_needs(config, recipe, unit, rows, length, ep):
    """Bytes that the backward pass of one unit adds at its fullest, beside all that the unit keeps.

    A gradient is there whole before it is added to the parameter's: the largest matrix or stack of experts; with it, of
    a layer, the gradients of the rows on their two ways through gate and up. The head goes by chunks of logits:
    their log-probabilities and two gradients.
    """
    n = rows * length
    if unit == "embed":
        return config.vocab_size * config.hidden_size * recipe.gradients
    if unit == "head":
        gradient = config.vocab_size * config.hidden_size * recipe.gradients
        logits = min(n, CHUNK) * config.vocab_size * recipe.wide
        return 3 * logits + gradient if n > CHUNK else max(2 * logits, gradient)
    if unit < config.first_k_dense_replace:
        return config.intermediate_size * (config.hidden_size * recipe.gradients + 2 * n * recipe.linear)
    stack = config.n_routed_experts // ep * config.moe_intermediate_size * config.hidden_size
    return stack * recipe.gradients + 2 * n * config.num_experts_per_tok * config.hidden_size * recipe.experts


def _attention_needs(config, recipe, rows, length):
    """The same of an attention alone: gradients of queries, keys and padded values, and of the largest matrix."""
    joined = config.qk_nope_head_dim + config.qk_rope_head_dim
    wider = max(joined, config.v_head_dim)
    return (rows * length * config.num_attention_heads * (2 * joined + wider) * recipe.linear
            + max(_attention_matrices(config)) * recipe.gradients)  # fmt: skip


def stage_kept(config, recipe, units, rows, length, ep=1, recompute=(), fp8=False):
    """Bytes that one microbatch keeps in a stage, and bytes that its backward pass adds to them at its fullest.

    recompute: () or ("block",) or ("selective",), as activations.py does it, or some of RECOMPUTE: all that could go.
    Returns (kept, working).
    """
    full, selective = "block" in recompute, "selective" in recompute

    def total(tensors, *how):
        return sum(t.after(*how) for t in tensors)

    kept, most = 0, 0
    if any(isinstance(unit, int) for unit in units):
        kept = total(shared_kept(config, recipe, rows, length, full or selective))
    for unit in units:  # the backward pass of one meets what those before it keep
        tensors, layer = _unit_kept(config, recipe, unit, rows, length, ep), isinstance(unit, int)
        needs = _backward_needs(config, recipe, unit, rows, length, ep)
        if layer and selective:  # attention and feed-forward are computed again one after the other
            dense = unit < config.first_k_dense_replace
            halves = [total(half, (), fp8) for half in selective_kept(config, recipe, rows, length, dense)]
            feed, attention = _feed_kept(config, recipe, rows, length, dense, ep), _attention_kept(config, recipe, rows, length)
            most = max(most, kept + halves[0] + total(feed) + needs,
                       kept + total(attention) + _attention_needs(config, recipe, rows, length))  # fmt: skip
            kept += sum(halves)
            continue
        stays = rows * length * config.hidden_size * recipe.stream if layer and full else total(tensors, recompute, fp8)
        there = total(tensors, (), fp8 and layer)
        if fp8 and layer:  # what is in FP8 is itself again only while it is used
            needs += max(t.bytes for t in tensors if t.fp8 is not None)
        most = max(most, kept + there + needs)
        kept += stays
    return kept, max(most - kept, 0)


def vision_kept(config, recipe):
    """Bytes that one patch keeps in the tower, an estimate: twelve times the width and twice the MLP's in each block."""
    vision = config.vision
    return vision.vt_num_hidden_layers * (12 * vision.vt_hidden_size + 2 * vision.vt_intermediate_size) * recipe.linear


def measure_saved(run, mine=()):
    """Bytes that autograd keeps of one forward pass: distinct storages, without those of `mine`.

    run: function without arguments; mine: tensors that exist anyway, as parameters. Returns (bytes, result of run).
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in mine}
    found = {}  # storage → (bytes, a tensor that keeps it alive, so that no other takes its address)

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(size for size, _ in found.values()), result


def measure_peak(run):
    """The most bytes that a function has allocated on the CPU at any time, by torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler announces itself otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# ---------------------------------------------------------------------------------- what a rank holds


@dataclass(frozen=True)
class Holding:
    """What one pipeline rank holds through the whole step. Numbers, then bytes."""

    numbers: int  # parameters, and the biases of its routers
    experts: int  # of them in routed experts
    weights: int
    gradients: int
    late: int  # of them: those of the encoder, which with DEP come after the pipeline
    state: int  # with ZeRO-1 of the replica that got most
    reduce: int  # for a moment, while gradients are summed over ranks: Trainer joins those of one group in one tensor
    step: int  # for a moment, while the optimizer steps


def holdings(config, layout, recipe):
    """One Holding per pipeline rank, from the parameters of the meta model by name, as Place deals them out."""
    with torch.device("meta"):
        model = K25(config)
    named = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    biases = [(name, b.numel()) for name, b in model.named_buffers()]  # of the routers: float32 in every recipe, no gradient
    muon = set(partition(model.named_parameters())[0])
    found = []
    for rank in range(layout.pp):
        with pretended(layout.pp * layout.dp, rank * layout.dp):
            place = Place(layout)
            units = {unit for part in place.parts(config.num_hidden_layers).values() for unit in part}
            units |= {"vision"} if layout.encoder == "dep" or rank == 0 else set()
            numbers = experts = vision = 0
            groups = {}  # process group → [(name, shape)]: what it reduces, and ZeRO-1 deals out
            for name, shape in named:
                if _unit_of(name) not in units:
                    continue
                if ".mlp.experts." in name:
                    shape = (shape[0] // layout.ep, *shape[1:])
                    experts += math.prod(shape)
                numbers += math.prod(shape)
                vision += math.prod(shape) * (_unit_of(name) == "vision")
                groups.setdefault(place.group_of(name), []).append((name, shape))
            # With ZeRO-1 each group has an optimizer of its own, and they step in turn.
            dealt = [(members, dist.get_world_size(group)) for group, members in groups.items()]
            dealt = dealt if layout.zero1 else [(sum(groups.values(), []), 1)]
            shares = [_largest_share(members, muon, ranks, recipe) for members, ranks in dealt]
        bias = sum(size for name, size in biases if _unit_of(name) in units)
        most = max(sum(math.prod(shape) for _, shape in members) for members in groups.values())
        found.append(Holding(
            numbers + bias, experts, numbers * recipe.weights + 4 * bias, numbers * recipe.gradients,
            vision * recipe.gradients * (layout.encoder == "dep"), sum(state for state, _ in shares), most * recipe.gradients,
            max(step for _, step in shares)))  # fmt: skip
    return found


def _unit_of(name):
    """embed, a layer's number, head, or vision: where a parameter lives, by its name."""
    parts = name.split(".")
    if parts[0] != "language_model":
        return "vision"
    return int(parts[3]) if parts[2] == "layers" else "embed" if parts[2] == "embed_tokens" else "head"


def _largest_share(members, muon, ranks, recipe):
    """Bytes of optimizer state, and of the step's working tensors, on the rank that got most.

    Whole parameters are dealt out as ZeroRedundancyOptimizer does: group by group of MuonClip, the largest first, each
    to the rank with the fewest numbers. While it steps, Muon holds a direction for each of its matrices, and of the
    shape it is at a stacked copy, the last iterate of Newton–Schulz and its two Gram matrices (bfloat16), and the result.
    """
    kinds = {"muon": [m for m in members if m[0] in muon],
             "matrices": [m for m in members if m[0] not in muon and len(m[1]) > 1],
             "vectors": [m for m in members if m[0] not in muon and len(m[1]) < 2]}  # fmt: skip
    load, state, directions, stacks = [0] * ranks, [0] * ranks, [0] * ranks, [{} for _ in range(ranks)]
    for kind, those in kinds.items():
        slots = len(SLOTS["muon" if kind == "muon" else "adamw"])
        for _, shape in sorted(those, key=lambda member: math.prod(member[1]), reverse=True):
            rank, numbers = load.index(min(load)), math.prod(shape)
            load[rank] += numbers
            state[rank] += numbers * (slots * recipe.state + recipe.master)
            if kind == "muon":
                directions[rank] += numbers * recipe.state
                stacked = numbers * (2 * recipe.state + 2 + 4 * min(shape[-2:]) / max(shape[-2:]))
                stacks[rank][shape[-2:]] = stacks[rank].get(shape[-2:], 0) + stacked
    working = [most + max(stack.values(), default=0) for most, stack in zip(directions, stacks)]
    return max(state), max(working)


# ------------------------------------------------------------------------------------- a rank at its fullest


@dataclass(frozen=True)
class Store:
    """How activations wait for the backward pass.

    recompute: () or ("block",) or ("selective",), as activations.py does it, or some of RECOMPUTE: all that could go.
    """

    recompute: tuple = ()
    fp8: bool = False
    offload: bool = False

    @property
    def again(self):
        """Whether the experts' tokens travel again in the backward pass, and layers keep their inputs."""
        return "block" in self.recompute or "selective" in self.recompute


def messages(layout, rank):
    """How many times per microbatch a rank receives something, which is also how often it sends."""
    return sum((stage > 0) + (stage < layout.stages - 1) for stage in range(rank, layout.stages, layout.pp))


def buffer_bytes(config, layout, recipe, rows, length):
    """Per rank: torch's PipelineStage owns one buffer per microbatch for each input and each incoming gradient, from
    the first step on."""
    message = rows * length * config.hidden_size * recipe.stream
    return [messages(layout, rank) * layout.microbatches * message for rank in range(layout.pp)]


def stage_bytes(config, layout, recipe, rows, length, store=Store(), patches=0):
    """Bytes that a microbatch keeps in each stage, and that its backward pass adds: (kept, working), lists over stages.

    Beside what autograd keeps, each output waits for its backward pass. An input is the pipeline's own buffer, which
    `buffer_bytes` counts. patches: of a microbatch's pictures, which --encoder stage0 keeps in the first stage.
    """
    message = rows * length * config.hidden_size * recipe.stream
    found = []
    for stage, units in enumerate(split_units(config.num_hidden_layers, layout.stages)):
        kept, working = stage_kept(config, recipe, units, rows, length, layout.ep, store.recompute, store.fp8)
        kept += message * (stage < layout.stages - 1)
        kept -= message * (stage > 0 and (store.again or recipe.stream == recipe.wide))
        if stage == 0 and layout.encoder == "stage0":
            kept += patches * vision_kept(config, recipe)
        found.append((kept, working))
    return [kept for kept, _ in found], [working for _, working in found]


@dataclass(frozen=True)
class Fill:
    """What a pipeline rank holds, in bytes: through the whole step, and in its moments on top of that, one at a time."""

    held: Holding
    in_flight: int  # microbatches × stages
    buffers: float  # of the pipeline's messages
    moments: dict  # pipeline: activations; encoder: those of its pictures; reduction and optimizer: as Holding

    @property
    def stays(self):
        """Weights, gradients, optimizer state, buffers."""
        return self.held.weights + self.held.gradients + self.held.state + self.buffers

    def at(self, moment):
        """All that it holds in one of the moments."""
        return self.stays + self.moments[moment] - self.held.late * (moment == "pipeline")

    @property
    def moment(self):
        """When it is at its fullest."""
        return max(self.moments, key=self.at)

    @property
    def peak(self):
        """What it holds then."""
        return self.at(self.moment)


def fills(config, layout, recipe, rows, length, store=Store(), patches=0, held=None):
    """One Fill per pipeline rank. patches: pictures of one microbatch; held: what `holdings` gave, or None."""
    held = held or holdings(config, layout, recipe)
    kept, working = stage_bytes(config, layout, recipe, rows, length, store, patches)
    buffers = buffer_bytes(config, layout, recipe, rows, length)
    encoder = patches * layout.microbatches / layout.pp * vision_kept(config, recipe) if layout.encoder == "dep" else 0
    found = []
    for rank, order in schedule_tables(layout).items():
        activations = most_in_flight(order, kept, working)
        if store.offload:  # one microbatch is worked on, one on its way
            activations = max(2 * kept[stage] + working[stage] for stage in range(rank, layout.stages, layout.pp))
        moments = {"pipeline": activations, "encoder": encoder, "reduction": held[rank].reduce, "optimizer": held[rank].step}
        found.append(Fill(held[rank], most_in_flight(order, [1] * layout.stages), buffers[rank], moments))
    return found


def live_bytes():
    """Bytes of all tensors that Python can reach in this process, each storage once."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":  # isinstance would ask, and wake, lazy ones
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
