"""What a training step would take on machines that are not here: memory, traffic, time — K2.5 report 4.5, appendix C.

    python planner.py --preset k2.5 --gpus 1024 --pp 16 --virtual-stages 2 --ep 16 --gpu h800

The mesh and the schedule are the real ones, built in one process over a fake process group; bytes come from
footprint.py, and how many microbatches are in flight is read off the schedule. Time is arithmetic: floating-point
operations over a rate, bytes over a link, and the schedule's tables run with them. Every number assumed is printed.

Public names: Gpu, GPUS, Work, schedule_tables, Span, simulate, bubble, predict_bubble, most_in_flight, Assumed, unit_flops,
vision_flops, Rung, Plan, make_plan, report, draw, add_arguments, main.
Letters: B rows, T tokens, C hidden, H heads, K chosen.     Tests: pytest tests/test_planner.py
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from footprint import RECIPES, RECOMPUTE, holdings, pretended, stage_kept, vision_kept
from k25 import K25Config, sizes
from parallel import Layout, ParallelError, Place, split_units

# ------------------------------------------------------------------------------------------- machines


@dataclass(frozen=True)
class Gpu:
    """One accelerator and what connects it. Bytes, and per second: operations and bytes in one direction."""

    name: str
    memory: float
    flops: float  # dense bfloat16 matrix products
    flops_float32: float  # float32 ones, without tensor cores
    nvlink: float  # to the others of its node
    link: float  # to other nodes
    node: int  # accelerators in a node
    host: float  # to the CPU's memory


# Vendors' data sheets, SXM forms; links: NVLink in one direction, one 400 Gb/s port, PCIe 5.0 ×16.
GPUS = {
    "h800": Gpu("h800", 80e9, 989e12, 67e12, 200e9, 50e9, 8, 50e9),
    "h100": Gpu("h100", 80e9, 989e12, 67e12, 450e9, 50e9, 8, 50e9),
    "h200": Gpu("h200", 141e9, 989e12, 67e12, 450e9, 50e9, 8, 50e9),
}


def this_cpu():
    """This machine as a Gpu: its memory, and the rate of one float32 product, measured."""
    a = torch.randn(1024, 1024)
    a @ a
    started = time.perf_counter()
    for _ in range(3):
        a @ a
    rate = 3 * 2 * 1024**3 / (time.perf_counter() - started)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Gpu("cpu", memory, rate, rate, 10e9, 10e9, 1, 10e9)


# ------------------------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class Work:
    """One forward (F) or backward (B) pass of a microbatch through a stage."""

    kind: str
    stage: int
    microbatch: int


def schedule_tables(layout):
    """What every pipeline rank does, in order, by the schedule that the Trainer would run.

    Returns {rank: list of Work}, read off torch's schedule on the real mesh.
    """
    with pretended(layout.pp * layout.dp):
        place = Place(layout)
        x = torch.empty(1, 1, device="meta", requires_grad=True)
        stages = [PipelineStage(nn.Identity(), stage, layout.stages, torch.device("cpu"), input_args=(x,), output_args=(x,), group=place.pp)
                  for stage in range(0, layout.stages, layout.pp)]  # fmt: skip
        settings = dict(n_microbatches=layout.microbatches, loss_fn=lambda out, _: out.sum(), scale_grads=False)
        if layout.virtual_stages == 1:
            orders = Schedule1F1B(stages[0], **settings)._get_pipeline_order()
        else:
            orders = ScheduleInterleaved1F1B(stages, **settings).pipeline_order
    kinds, tables = {"FORWARD": "F", "FULL_BACKWARD": "B"}, {}
    for rank, order in orders.items():
        seen, tables[rank] = {}, []  # numbered here: the table that torch prints for 1F1B begins at 1 on the last rank
        for kind, stage in [(kinds[a.computation_type.name], a.stage_index) for a in order if a and a.computation_type.name in kinds]:
            tables[rank].append(Work(kind, stage, seen.setdefault((kind, stage), 0)))
            seen[kind, stage] += 1
    return tables


@dataclass(frozen=True)
class Span:
    """When a rank does a piece of work, in seconds."""

    rank: int
    work: Work
    start: float
    end: float


def simulate(tables, forward, backward, transfer=0.0):
    """Run the tables: each rank in its order, each piece as soon as what it needs has arrived.

    F of a stage needs F of the stage before; B needs its own F and B of the stage after. tables: as schedule_tables;
    forward, backward: seconds per stage, or of each stage a list over its microbatches; transfer: seconds from rank to
    rank. Returns a list of Span.
    """
    owner = {work.stage: rank for rank, order in tables.items() for work in order}
    last, done, spans = max(owner), {}, []
    clock, at = dict.fromkeys(tables, 0.0), dict.fromkeys(tables, 0)

    def ready(rank, work):
        step = -1 if work.kind == "F" else 1
        needs = [Work("F", work.stage, work.microbatch)] if work.kind == "B" else []
        if 0 <= work.stage + step <= last:
            needs.append(Work(work.kind, work.stage + step, work.microbatch))
        if any(need not in done for need in needs):
            return None
        return max([clock[rank]] + [done[need] + transfer * (owner[need.stage] != rank) for need in needs])

    while len(done) < sum(map(len, tables.values())):
        before = len(done)
        for rank, order in tables.items():
            while at[rank] < len(order) and (start := ready(rank, order[at[rank]])) is not None:
                work = order[at[rank]]
                seconds = (forward if work.kind == "F" else backward)[work.stage]
                clock[rank] = done[work] = start + (seconds[work.microbatch] if isinstance(seconds, list) else seconds)
                spans.append(Span(rank, work, start, clock[rank]))
                at[rank] += 1
        if len(done) == before:
            raise ParallelError("the schedule waits for itself: its tables cannot be run")
    return spans


def bubble(spans):
    """Share of all ranks' time, from the first start to the last end, in which they wait."""
    ranks = len({span.rank for span in spans})
    busy = sum(span.end - span.start for span in spans)
    return 1 - busy / (ranks * max(span.end for span in spans))


def predict_bubble(layout, forward, backward, transfer=0.0):
    """The bubble of a layout's schedule. forward, backward: seconds per stage; transfer: seconds from rank to rank."""
    return bubble(simulate(schedule_tables(layout), forward, backward, transfer))


def most_in_flight(order, kept, working=None):
    """The most that a rank ever holds: kept bytes of each (stage, microbatch) from its F to its B, and what B works in.

    order: list of Work; kept, working: per stage. With kept of ones it counts microbatches.
    """
    held, most = 0, 0
    for work in order:
        held += kept[work.stage] if work.kind == "F" else 0
        most = max(most, held + (working[work.stage] if working and work.kind == "B" else 0))
        held -= kept[work.stage] if work.kind == "B" else 0
    return most


# ------------------------------------------------------------------------------------- operations, bytes


@dataclass(frozen=True)
class Assumed:
    """What cannot be known from the layout. Each is a flag of `plan` and is printed."""

    efficiency: float = 0.5  # share of the peak rate that products reach, everything between them included
    hidden: float = 1.0  # share of the all-to-all time that overlaps with computation
    vision: float = 0.10  # share of the tokens that are pictures
    picture: int = 1024  # patches of each picture
    usable: float = 0.92  # share of the memory that tensors get; context, NCCL and fragments take the rest


def unit_flops(config, unit, length):
    """Operations of one token's forward pass, as the modules compute it. Returns (products, experts, in float32).

    Attention meets all T keys, since the mask is explicit, and values as wide as keys; the largest logits for QK-Clip
    expand the keys again and meet the past, T/2 on average.
    """
    hidden, heads, query, latent = config.hidden_size, config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    joined = nope + rope
    if unit == "embed":
        return 0, 0, 0
    if unit == "head":
        return 2 * config.vocab_size * hidden, 0, 0
    up = latent * heads * (nope + value)
    matrices = hidden * (query + latent + rope) + query * heads * joined + 2 * up + heads * value * hidden
    attention = 2 * heads * (joined + max(joined, value)) * length + heads * joined * length
    if unit < config.first_k_dense_replace:
        return 2 * (matrices + 3 * hidden * config.intermediate_size) + attention, 0, 0
    expert = 6 * hidden * config.moe_intermediate_size
    products = 2 * matrices + attention + expert * config.n_shared_experts
    return products, expert * config.num_experts_per_tok, 2 * config.n_routed_experts * hidden


def vision_flops(config, picture):
    """Operations of one patch's forward pass through tower and projector. picture: patches of its item."""
    vision, s = config.vision, sizes(config)
    return 2 * s.vision + 4 * vision.vt_hidden_size * picture * vision.vt_num_hidden_layers + 2 * s.projector / 4


def exchange_seconds(layout, gpu, bytes_out):
    """Time of one all-to-all in which each rank gives away `bytes_out` evenly to all ep ranks, itself among them.

    ep ranks are neighbours: those of one node talk by NVLink, the others by the network, at the same time.
    """
    near = min(layout.ep, gpu.node)
    return max(bytes_out * (layout.ep - near) / layout.ep / gpu.link, bytes_out * (near - 1) / layout.ep / gpu.nvlink)


def all_reduce_seconds(ranks, size, bandwidth):
    """Time of a ring all-reduce of `size` bytes."""
    return 2 * (ranks - 1) / ranks * size / bandwidth


# ------------------------------------------------------------------------------------------------ plan


@dataclass(frozen=True)
class Rung:
    """One way to need less memory, and what the fullest rank then holds."""

    what: str
    peak: float
    moment: str  # when it holds that: in the pipeline, in the optimizer, in the encoder
    offload: float  # bytes per second to the CPU, and as many back, that keep up with 1F1B if all activations go there


@dataclass(frozen=True)
class Plan:
    """All that `report` prints; lists run over pipeline ranks, or over stages where said."""

    config: K25Config
    layout: Layout
    gpu: Gpu
    dtype: str
    rows: int
    length: int
    recompute: tuple
    fp8: bool
    assumed: Assumed
    held: list  # Holding
    parts: list  # per stage: its units
    in_flight: list  # microbatches × stages
    activations: list
    buffers: list  # of the pipeline's messages
    peak: list  # of everything
    ladder: list  # Rung
    exchange: list  # bytes sent in all-to-all per step
    messages: list  # bytes sent along the pipeline per step
    forward: list  # seconds per stage
    backward: list
    spans: list
    reduce: float  # seconds: gradients and ZeRO-1's broadcast
    optimizer: float
    encoder: float  # the three phases of DEP
    exposed: float  # step seconds more if no all-to-all is hidden

    @property
    def tokens(self):
        """Of one step."""
        return self.layout.dp * self.layout.microbatches * self.rows * self.length

    @property
    def pipeline(self):
        """Seconds from the first forward to the last backward pass."""
        return max(span.end for span in self.spans)

    @property
    def step(self):
        """Seconds."""
        return self.pipeline + self.reduce + self.optimizer + self.encoder

    @property
    def model_flops(self):
        """Of one step: 6 per active weight and token, attention over the past; recompute and vision do not count."""
        s = sizes(self.config)
        return 3 * (s.flops + s.flops_context * self.length / 2) * self.tokens

    def mfu(self, seconds):
        """Model FLOPs utilisation of a step that takes `seconds`."""
        return self.model_flops / (seconds * self.layout.pp * self.layout.dp * self.gpu.flops)


def stage_bytes(config, layout, recipe, rows, length, recompute=(), fp8=False, assumed=Assumed()):
    """Bytes that a microbatch keeps in each stage, and that its backward pass adds: (kept, working), lists over stages.

    Beside what autograd keeps, each output waits for its backward pass. An input is the pipeline's own buffer, which
    `buffer_bytes` counts.
    """
    message = rows * length * config.hidden_size * recipe.stream
    found = []
    for stage, units in enumerate(split_units(config.num_hidden_layers, layout.stages)):
        kept, working = stage_kept(config, recipe, units, rows, length, layout.ep, recompute, fp8)
        kept += message * (stage < layout.stages - 1)
        kept -= message * (stage > 0 and (_again(recompute) or recipe.stream == recipe.wide))
        if stage == 0 and layout.encoder == "stage0":
            kept += rows * length * assumed.vision * 4 * vision_kept(config, recipe)
        found.append((kept, working))
    return [kept for kept, _ in found], [working for _, working in found]


def buffer_bytes(config, layout, recipe, rows, length):
    """Per rank: torch's PipelineStage owns one buffer per microbatch for each input and each incoming gradient, from
    the first step on."""
    message = rows * length * config.hidden_size * recipe.stream
    return [_messages(layout, rank) * layout.microbatches * message for rank in range(layout.pp)]


def _messages(layout, rank):
    """How many times per microbatch a rank receives something, which is also how often it sends."""
    return sum((stage > 0) + (stage < layout.stages - 1) for stage in range(rank, layout.stages, layout.pp))


def _again(recompute):
    """Whether the experts' tokens travel again in the backward pass, and layers keep their inputs."""
    return "block" in recompute or "selective" in recompute


def rate(gpu, size):
    """Operations per second on numbers of `size` bytes."""
    return gpu.flops if size == 2 else gpu.flops_float32


def stage_seconds(config, layout, gpu, recipe, units, rows, length, recompute, assumed):
    """Time of one microbatch through a stage, with the part of the all-to-all that nothing hides: (forward, backward)."""
    n, block = rows * length, "block" in recompute
    rates = [assumed.efficiency * rate(gpu, size) for size in (recipe.linear, recipe.experts, recipe.wide)]
    forward = backward = 0.0
    for unit in units:
        seconds = n * sum(flops / at for flops, at in zip(unit_flops(config, unit, length), rates))
        again = seconds if block or unit == "head" else 0.0  # the head's logits are always computed again
        if ("mla" in recompute or "selective" in recompute) and isinstance(unit, int):
            up = config.q_lora_rank * (config.qk_nope_head_dim + config.qk_rope_head_dim)
            up += config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
            again += n * 2 * up * config.num_attention_heads / rates[0]
        forward, backward = forward + seconds, backward + 2 * seconds + again
        if isinstance(unit, int) and unit >= config.first_k_dense_replace and layout.ep > 1:
            once = exchange_seconds(layout, gpu, n * config.num_experts_per_tok * config.hidden_size * recipe.experts)
            forward += 2 * once * (1 - assumed.hidden)  # there and back
            backward += (4 if _again(recompute) else 2) * once * (1 - assumed.hidden)
    return forward, backward


def make_plan(config, layout, gpu, dtype="bfloat16", rows=1, length=4096, recompute=(), fp8=False, assumed=Assumed()):
    """Count and simulate one step. Raises ParallelError for a layout that cannot be. Returns Plan."""
    layout.check(config.num_hidden_layers, config.n_routed_experts, layout.pp * layout.dp)
    recipe, world, n = RECIPES[dtype], layout.pp * layout.dp, rows * length
    parts, tables, held = split_units(config.num_hidden_layers, layout.stages), schedule_tables(layout), holdings(config, layout, recipe)
    patches = layout.dp * layout.microbatches * n * assumed.vision * 4  # of one step; a picture's token is four patches
    encoding = patches * vision_flops(config, assumed.picture) / (assumed.efficiency * rate(gpu, recipe.linear))  # seconds of one GPU

    kept, working = stage_bytes(config, layout, recipe, rows, length, recompute, fp8, assumed)
    activations = [most_in_flight(order, kept, working) for order in tables.values()]
    buffers = buffer_bytes(config, layout, recipe, rows, length)
    vision = patches / world * vision_kept(config, recipe) if layout.encoder == "dep" else 0
    peak = [h.weights + h.gradients + h.state + b + max(a, vision, h.step) for h, a, b in zip(held, activations, buffers)]

    def times(hidden):
        found = [stage_seconds(config, layout, gpu, recipe, units, rows, length, recompute, dataclasses.replace(assumed, hidden=hidden))
                 for units in parts]  # fmt: skip
        forward, backward = [f for f, _ in found], [b for _, b in found]
        if layout.encoder == "stage0":
            share = encoding / (layout.dp * layout.microbatches)
            forward[0], backward[0] = forward[0] + share, backward[0] + 2 * share
        return forward, backward

    message = n * config.hidden_size * recipe.stream
    forward, backward = times(assumed.hidden)
    spans = simulate(tables, forward, backward, message / gpu.link)
    exposed = simulate(tables, *times(0.0), message / gpu.link)
    return Plan(config, layout, gpu, dtype, rows, length, recompute, fp8, assumed, held, parts,
                [most_in_flight(order, [1] * layout.stages) for order in tables.values()], activations, buffers, peak,
                _ladder(config, layout, gpu, dtype, tables, rows, length, assumed, vision),
                [layout.microbatches * _moe_layers(config, layout, parts, rank) * n * config.num_experts_per_tok * config.hidden_size
                 * recipe.experts * (layout.ep - 1) / layout.ep * (6 if _again(recompute) else 4) for rank in range(layout.pp)],
                [_messages(layout, rank) * layout.microbatches * message for rank in range(layout.pp)],
                forward, backward, spans, _reduce_seconds(layout, gpu, recipe, max(held, key=lambda h: h.weights)),
                _optimizer_seconds(config, layout, gpu, assumed, max(held, key=lambda h: h.experts)),
                4 * encoding / world if layout.encoder == "dep" else 0.0,
                max(s.end for s in exposed) - max(s.end for s in spans))  # fmt: skip


def _ladder(config, layout, gpu, dtype, tables, rows, length, assumed, vision):
    """What the fullest rank would hold with less and less kept. Returns a list of Rung."""
    rungs = []
    for weights in dict.fromkeys((dtype, "bfloat16-weights")):
        recipe, held = RECIPES[weights], holdings(config, layout, RECIPES[weights])
        buffers = buffer_bytes(config, layout, recipe, rows, length)
        for what, groups, fp8 in (("nothing recomputed", (), False), ("norms, as far as can be", RECOMPUTE[:1], False),
                                  ("norms, SwiGLU", RECOMPUTE[:2], False), ("norms, SwiGLU, MLA", RECOMPUTE, False),
                                  ("selective", ("selective",), False), ("selective, FP8", ("selective",), True),
                                  ("selective, FP8, rest on the CPU", ("selective",), True), ("block", ("block",), False)):  # fmt: skip
            kept, working = stage_bytes(config, layout, recipe, rows, length, groups, fp8, assumed)
            peaks = []
            for rank, (h, order) in enumerate(zip(held, tables.values())):
                own = range(rank, layout.stages, layout.pp)
                active = most_in_flight(order, kept, working)
                if "CPU" in what:  # one microbatch is worked on, one on its way
                    active = max(2 * kept[stage] + working[stage] for stage in own)
                fullest = max((active, "pipeline"), (vision, "encoder"), (h.step, "optimizer"))
                peaks.append((h.weights + h.gradients + h.state + buffers[rank] + fullest[0], fullest[1]))
            seconds = [sum(stage_seconds(config, layout, gpu, recipe, units, rows, length, groups, assumed))
                       for units in split_units(config.num_hidden_layers, layout.stages)]  # fmt: skip
            offload = max(sum(kept[rank :: layout.pp]) / max(sum(seconds[rank :: layout.pp]), 1e-12) for rank in range(layout.pp))
            rungs.append(Rung(f"{weights}: {what}", *max(peaks), offload))
    return rungs


def _moe_layers(config, layout, parts, rank):
    """Layers with routed experts on a pipeline rank."""
    own = [unit for stage in range(rank, layout.stages, layout.pp) for unit in parts[stage]]
    return sum(isinstance(unit, int) and unit >= config.first_k_dense_replace for unit in own)


def _reduce_seconds(layout, gpu, recipe, held):
    """Sum the gradients over dp, experts over their copies; ZeRO-1 then broadcasts the weights."""
    seconds = all_reduce_seconds(layout.dp, (held.numbers - held.experts) * recipe.gradients, gpu.link)
    seconds += all_reduce_seconds(layout.dp // layout.ep, held.experts * recipe.gradients, gpu.link)
    return seconds + (held.weights / gpu.link if layout.zero1 and layout.dp > 1 else 0.0)


def _optimizer_seconds(config, layout, gpu, assumed, held):
    """Five Newton–Schulz iterations on a rank's share of the experts: 4 m²n + 2 m³ operations for an (m,n) matrix each."""
    small, large = sorted((config.moe_intermediate_size, config.hidden_size))
    share = held.experts / (layout.dp // layout.ep if layout.zero1 else 1)
    return share * 5 * (4 * small + 2 * small**2 / large) / (assumed.efficiency * gpu.flops)


def _gb(size):
    return f"{size / 1e9:8.2f}"


def _units(parts, rank, layout):
    """The units of a rank, as `embed 0–1 | 32–33`: a stage each."""
    shown = []
    for stage in range(rank, layout.stages, layout.pp):
        layers = [unit for unit in parts[stage] if isinstance(unit, int)]
        words = ["embed"] * ("embed" in parts[stage])
        words += [f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else str(layers[0])] if layers else []
        shown.append(" ".join(words + ["head"] * ("head" in parts[stage])))
    return " | ".join(shown)


def report(plan):
    """The plan as text."""
    p, layout, gpu, a, recipe = plan, plan.layout, plan.gpu, plan.assumed, RECIPES[plan.dtype]
    s = sizes(p.config)
    usable, leaving = gpu.memory * a.usable, max(p.exchange) * _cross(layout, gpu)
    lines = [
        f"{layout.pp * layout.dp} × {gpu.name}: {layout.flags()}{' --zero1' if layout.zero1 else ''} --encoder {layout.encoder}",
        f"model: {s.text:,} text + {s.vision + s.projector:,} vision parameters, {s.active:,} active per token",
        f"step: {layout.dp} replicas × {layout.microbatches} microbatches × {p.rows} × {p.length:,} tokens = {p.tokens:,} tokens",
        "",
        "Memory per rank, GB (10⁹ bytes); state: the optimizer's, of the replica that got most; step: while it steps",
        "rank  parameters   weights   grads    state    step   in flight  activations  buffers   peak   units of each stage",
    ]
    worst = p.peak.index(max(p.peak))
    for rank, h in enumerate(p.held):
        lines.append(f"{rank:4d} {h.numbers / 1e9:9.3f} G {_gb(h.weights)} {_gb(h.gradients)} {_gb(h.state)} {_gb(h.step)} "
                     f"{p.in_flight[rank]:9d}   {_gb(p.activations[rank])}   {_gb(p.buffers[rank])} {_gb(p.peak[rank])}   {_units(p.parts, rank, layout)}"
                     f"{'   ← worst' if rank == worst else ''}")  # fmt: skip
    verdict = "fits" if max(p.peak) <= usable else f"does not fit: {(max(p.peak) - usable) / 1e9:.1f} GB too much"
    lines += ["", f"worst is rank {worst}: {max(p.peak) / 1e9:.1f} GB of {usable / 1e9:.1f} usable — {verdict}",
              "", "What would have to be recomputed, stored in FP8 or offloaded (worst rank, GB)"]  # fmt: skip
    for rung in p.ladder:
        over = rung.peak - usable
        verdict = "fits" if over <= 0 else f"{over / 1e9:.1f} too much"
        lines.append(f"  {rung.what:50s} {_gb(rung.peak)}  in the {rung.moment:9s}  {verdict:14s}"
                     f"  all to the CPU and back: {rung.offload / 1e9:5.1f} GB/s each way")  # fmt: skip
    lines += [f"  (the host takes {gpu.host / 1e9:.0f} GB/s in each direction)", "",
              "Traffic per step, sent by one rank",
              f"  all-to-all        {max(p.exchange) / 1e9:10.1f} GB   {leaving / 1e9:.1f} GB of it to other nodes: {leaving / gpu.link:.2f} s at {gpu.link * 8 / 1e9:.0f} Gb/s",
              f"  pipeline          {max(p.messages) / 1e9:10.1f} GB   {max(p.messages) / gpu.link:.2f} s",
              f"  gradients, ZeRO-1                 {p.reduce:.2f} s",
              "", "Time",
              f"  one microbatch: forward {min(p.forward) * 1e3:.1f} … {max(p.forward) * 1e3:.1f} ms in a stage, "
              f"backward {min(p.backward) * 1e3:.1f} … {max(p.backward) * 1e3:.1f} ms",
              f"  bubble            {bubble(p.spans):8.1%}   of the pipeline's time; even stages would have "
              f"{(layout.pp - 1) / (layout.virtual_stages * layout.microbatches + layout.pp - 1):.1%}",
              f"  pipeline          {p.pipeline:8.2f} s",
              f"  gradients, ZeRO-1 {p.reduce:8.2f} s",
              f"  optimizer         {p.optimizer:8.2f} s",
              f"  vision (DEP)      {p.encoder:8.2f} s",
              f"  step              {p.step:8.2f} s   {p.tokens / p.step:,.0f} tokens/s   MFU {p.mfu(p.step):.1%}",
              f"  … nothing hidden  {p.step + p.exposed:8.2f} s   {p.tokens / (p.step + p.exposed):,.0f} tokens/s   "
              f"MFU {p.mfu(p.step + p.exposed):.1%}",
              "", "Assumed",
              f"  --dtype {p.dtype}: bytes of a weight {recipe.weights}, gradient {recipe.gradients}, optimizer slot {recipe.state}, "
              f"master copy {recipe.master}, residual stream {recipe.stream}, products {recipe.linear}, experts {recipe.experts}, norms and router {recipe.wide}",
              f"  --recompute {','.join(p.recompute) or 'none'}{' --fp8' if p.fp8 else ''}; routing is even; activations as the unfused operations "
              "keep them",
              f"  {gpu.name}: {gpu.memory / 1e9:.0f} GB, of which {a.usable:.0%} usable; {gpu.flops / 1e12:.3g} TFLOP/s bfloat16, "
              f"{gpu.flops_float32 / 1e12:.3g} float32; NVLink {gpu.nvlink / 1e9:.0f} GB/s, network {gpu.link / 1e9:.0f} GB/s one way; {gpu.node} per node",
              f"  --efficiency {a.efficiency}: of those rates, with all that is no matrix product; "
              "backward = 2 × forward, and what is recomputed",
              f"  --hidden {a.hidden}: share of the all-to-all that overlaps with computation; "
              "messages of the pipeline delay only their receiver",
              f"  --vision-share {a.vision}, pictures of {a.picture} patches; four encoder forward passes' worth of work, spread evenly",
              "  gradients are reduced after the pipeline, not during it; data come for free; MFU counts neither recompute nor vision"]  # fmt: skip
    return "\n".join(lines)


def _cross(layout, gpu):
    """Of what an all-to-all sends to others, the share that leaves the node."""
    return (layout.ep - min(layout.ep, gpu.node)) / max(layout.ep - 1, 1)


SHADES = {"F": ("#9ecae1", "#3182bd", "#6baed6", "#08519c"), "B": ("#fdd0a2", "#e6550d", "#fdae6b", "#a63603")}


def draw(plan, path):
    """The schedule as a picture: a row per rank, forward blue, backward orange, a shade per stage of the rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    layout = plan.layout
    figure, axes = pyplot.subplots(figsize=(18, 1.6 + 0.42 * layout.pp))
    short = max(span.end for span in plan.spans) / 110
    for span in plan.spans:
        shade = SHADES[span.work.kind][span.work.stage // layout.pp % 4]
        axes.barh(span.rank, span.end - span.start, left=span.start, height=0.86, color=shade, edgecolor="white",
                  linewidth=0.4 if span.end - span.start > short / 4 else 0)  # fmt: skip
        if span.end - span.start > short:
            dark = span.work.stage // layout.pp % 2 == 1
            axes.text((span.start + span.end) / 2, span.rank, span.work.microbatch, ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")  # fmt: skip
    kinds = (("F", "forward"), ("B", "backward"))
    handles = [Patch(color=SHADES[kind][v % 4], label=f"{word}, stages {v * layout.pp} … {(v + 1) * layout.pp - 1}")
               for kind, word in kinds for v in range(layout.virtual_stages)]  # fmt: skip
    axes.legend(handles=handles, ncol=len(handles), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)
    axes.set_yticks(range(layout.pp), [f"rank {rank}" for rank in range(layout.pp)])
    axes.invert_yaxis()
    axes.set_xlim(0, plan.pipeline)
    axes.set_xlabel("seconds")
    axes.set_title(f"{layout.microbatches} microbatches, bubble {bubble(plan.spans):.1%}", loc="right", fontsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------- command line


def add_arguments(parser):
    """The flags of `plan`."""
    parser.add_argument("--preset", default="k2.5", help="toy, small or k2.5")
    parser.add_argument("--gpus", type=int, default=1024)
    parser.add_argument("--gpu", default="h800", choices=[*GPUS, "cpu"])
    parser.add_argument("--pp", type=int, default=16)
    parser.add_argument("--virtual-stages", type=int, default=2)
    parser.add_argument("--ep", type=int, default=16)
    parser.add_argument("--microbatches", type=int, help="per replica and step; default: 4 · pp")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16", choices=list(RECIPES))
    parser.add_argument("--no-zero1", action="store_true", help="every replica keeps the whole optimizer state")
    parser.add_argument("--encoder", default="dep", choices=["dep", "stage0"])
    parser.add_argument("--recompute", default="none", help="none, selective, block (as activations.py), or some of norms,swiglu,mla")
    parser.add_argument("--fp8", action="store_true", help="experts' inputs, gate and up in FP8-E4M3")
    for name, flag, help_text in (
        ("efficiency", "--efficiency", "share of the peak rate reached"), ("hidden", "--hidden", "share of the all-to-all that is hidden"),
        ("vision", "--vision-share", "share of the tokens that are pictures"),
    ):  # fmt: skip
        parser.add_argument(flag, dest=name, type=float, default=getattr(Assumed, name), help=help_text)
    parser.add_argument("--out", type=pathlib.Path, help="directory for plan.txt and schedule.png")


def main(arguments=None):
    """The command line: print the plan. Returns the exit code: 2, with one line, for a layout that cannot be."""
    cli = argparse.ArgumentParser(prog="planner.py", description=__doc__.split("\n")[0])
    add_arguments(cli)
    options = cli.parse_args(arguments)
    recompute = () if options.recompute == "none" else tuple(options.recompute.split(","))
    try:
        if recompute not in (("selective",), ("block",)) and not {*recompute} <= {*RECOMPUTE}:
            raise ParallelError(f"--recompute {options.recompute}: choose none, selective, block, or some of {','.join(RECOMPUTE)}")
        if min(options.gpus, options.pp, options.rows, options.length) < 1:
            raise ParallelError("--gpus, --pp, --rows and --length must be at least 1")
        config = K25Config.preset(options.preset)
        layout = Layout(options.pp, options.virtual_stages, options.ep, max(options.gpus // options.pp, 1),
                        options.microbatches or 4 * options.pp, not options.no_zero1, options.encoder)  # fmt: skip
        layout.check(config.num_hidden_layers, config.n_routed_experts, options.gpus)
        gpu = this_cpu() if options.gpu == "cpu" else GPUS[options.gpu]
        assumed = Assumed(options.efficiency, options.hidden, options.vision)
        plan = make_plan(config, layout, gpu, options.dtype, options.rows, options.length, recompute, options.fp8, assumed)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    print(report(plan))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "plan.txt").write_text(report(plan) + "\n", encoding="utf-8")
        draw(plan, options.out / "schedule.png")
        print(f"\nschedule: {options.out / 'schedule.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
