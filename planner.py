"""What a training step would take on machines that are not here: memory, traffic, time — K2.5 report 4.5, appendix C.

    python planner.py --preset k2.5 --gpus 1024 --pp 16 --virtual-stages 2 --ep 16 --gpu h800 --out runs/plan
    python parallel.py plan …            the same
    python planner.py --check            the model beside real steps of 2 and 4 processes: runs/plan-check, 2 minutes

The mesh and the schedule are the real ones (schedule.py); bytes come from footprint.py, and how many microbatches are in
flight is read off the schedule. Time is arithmetic: floating-point operations over a rate, bytes over a link, and the
schedule's tables run with them. Every number assumed is printed. What is left open — how activations are stored, how many
microbatches — becomes the fastest choice that fits.

Public names: Gpu, GPUS, Assumed, unit_flops, vision_flops, Plan, make_plan, LADDER, ladder, choose, report, draw, add_arguments,
main.
Letters: B rows, T tokens, C hidden, H heads, K chosen.     Tests: pytest tests/test_planner.py
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
import time
from dataclasses import dataclass

import torch

import k25
import trials
from checkpoint import write_file
from footprint import RECIPES, RECOMPUTE, Store, fills, holdings, messages, stage_bytes, vision_kept
from k25 import K25Config
from parallel import Layout, ParallelError, split_units
from schedule import bubble, draw_spans, most_in_flight, schedule_tables, simulate

sizes = functools.cache(k25.sizes)  # it lists every tensor of the release

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
class Plan:
    """All that `report` prints; lists run over pipeline ranks, or over stages where said."""

    config: K25Config
    layout: Layout
    gpu: Gpu
    dtype: str
    rows: int
    length: int
    store: Store
    assumed: Assumed
    parts: list  # per stage: its units
    fills: list  # Fill
    offload: float  # bytes per second to the CPU, and as many back, that keep up with the pipeline if all activations go there
    host: float  # bytes in the CPU's memory, for each GPU, if they do
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

    @property
    def worst(self):
        """The pipeline rank that is fullest."""
        return max(range(self.layout.pp), key=lambda rank: self.fills[rank].peak)

    @property
    def excess(self):
        """Bytes by which the fullest rank exceeds the usable memory; negative: so many are left."""
        return self.fills[self.worst].peak - self.gpu.memory * self.assumed.usable

    @property
    def fits(self):
        """Whether every rank finds room, and what goes to the CPU gets there in time."""
        return self.excess <= 0 and (not self.store.offload or self.offload <= self.gpu.host)


def rate(gpu, size):
    """Operations per second on numbers of `size` bytes."""
    return gpu.flops if size == 2 else gpu.flops_float32


def stage_seconds(config, layout, gpu, recipe, units, rows, length, store, assumed):
    """Time of one microbatch through a stage, with the part of the all-to-all that nothing hides: (forward, backward)."""
    n = rows * length
    rates = [assumed.efficiency * rate(gpu, size) for size in (recipe.linear, recipe.experts, recipe.wide)]
    forward = backward = 0.0
    for unit in units:
        flops, layer = unit_flops(config, unit, length), isinstance(unit, int)
        seconds = n * sum(each / at for each, at in zip(flops, rates))
        again = seconds if "block" in store.recompute or unit == "head" else 0.0  # the head's logits are always computed again
        if layer and ("mla" in store.recompute or "selective" in store.recompute):
            up = config.q_lora_rank * (config.qk_nope_head_dim + config.qk_rope_head_dim)
            up += config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
            again += n * 2 * up * config.num_attention_heads / rates[0]
        if "selective" in store.recompute and layout.ep > 1:
            again += n * flops[1] / 3 / rates[1]  # what elsewhere nobody reads: rows are weighted after their return
        forward, backward = forward + seconds, backward + 2 * seconds + again
        if layer and unit >= config.first_k_dense_replace and layout.ep > 1:
            once = exchange_seconds(layout, gpu, n * config.num_experts_per_tok * config.hidden_size * recipe.experts)
            forward += 2 * once * (1 - assumed.hidden)  # there and back
            backward += (4 if store.again else 2) * once * (1 - assumed.hidden)
    return forward, backward


def make_plan(config, layout, gpu, dtype="bfloat16-weights", rows=1, length=4096, store=Store(), assumed=Assumed(), held=None):
    """Count and simulate one step. held: what `holdings` gave for this layout and dtype, or None. Returns Plan.

    Raises ParallelError for a layout that cannot be.
    """
    layout.check(config.num_hidden_layers, config.n_routed_experts, layout.pp * layout.dp)
    recipe, world, n = RECIPES[dtype], layout.pp * layout.dp, rows * length
    parts, tables = split_units(config.num_hidden_layers, layout.stages), schedule_tables(layout)
    patches = n * assumed.vision * 4  # of one microbatch; a picture's token is four patches
    flops = patches * layout.dp * layout.microbatches * vision_flops(config, assumed.picture)  # one pass over the step's pictures
    encoding = flops / (assumed.efficiency * rate(gpu, recipe.linear))  # seconds of one GPU

    def times(hidden):
        changed = dataclasses.replace(assumed, hidden=hidden)
        found = [stage_seconds(config, layout, gpu, recipe, units, rows, length, store, changed) for units in parts]
        forward, backward = [f for f, _ in found], [b for _, b in found]
        if layout.encoder == "stage0":
            share = encoding / (layout.dp * layout.microbatches)
            forward[0], backward[0] = forward[0] + share, backward[0] + 2 * share
        return forward, backward

    message = n * config.hidden_size * recipe.stream
    forward, backward = times(assumed.hidden)
    spans = simulate(tables, forward, backward, message / gpu.link)
    exposed = simulate(tables, *times(0.0), message / gpu.link)
    kept, ranks = stage_bytes(config, layout, recipe, rows, length, store, patches)[0], range(layout.pp)
    filled = fills(config, layout, recipe, rows, length, store, patches, held)
    away = n * config.num_experts_per_tok * config.hidden_size * recipe.experts * (layout.ep - 1) / layout.ep
    return Plan(config, layout, gpu, dtype, rows, length, store, assumed, parts, filled,
                max(sum(kept[rank :: layout.pp]) / sum(forward[rank :: layout.pp] + backward[rank :: layout.pp]) for rank in ranks),
                max(most_in_flight(order, kept) for order in tables.values()),
                [layout.microbatches * _moe_layers(config, layout, parts, rank) * away * (6 if store.again else 4) for rank in ranks],
                [messages(layout, rank) * layout.microbatches * message for rank in ranks],
                forward, backward, spans, _reduce_seconds(layout, gpu, recipe, max((f.held for f in filled), key=lambda h: h.weights)),
                _optimizer_seconds(config, layout, gpu, assumed, max((f.held for f in filled), key=lambda h: h.experts)),
                4 * encoding / world if layout.encoder == "dep" else 0.0,
                max(s.end for s in exposed) - max(s.end for s in spans))  # fmt: skip


# How activations may wait, as activations.py does it: a flag of train_small.py each.
LADDER = {
    "everything kept": Store(), "FP8": Store(fp8=True), "selective recompute": Store(("selective",)),
    "selective, FP8": Store(("selective",), fp8=True), "selective, FP8, rest on the CPU": Store(("selective",), fp8=True, offload=True),
    "blocks recomputed": Store(("block",)), "blocks, their inputs on the CPU": Store(("block",), offload=True),
}  # fmt: skip


def ladder(config, layout, gpu, dtypes, rows, length, assumed):
    """{(dtype, name in LADDER): Plan}: the same step with more and more of it stored otherwise."""
    held = {dtype: holdings(config, layout, RECIPES[dtype]) for dtype in dtypes}
    return {(dtype, what): make_plan(config, layout, gpu, dtype, rows, length, store, assumed, held[dtype])
            for dtype in dtypes for what, store in LADDER.items()}  # fmt: skip


def choose(plans):
    """Of some plans the fastest that fits, or where none does the one that comes nearest."""
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda plan: plan.step / plan.tokens) if fitting else min(plans, key=lambda plan: plan.excess)


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


# ---------------------------------------------------------------------------------------------- report


def _gb(size):
    return f"{size / 1e9:8.2f}"


def _units(parts, stages):
    """The units of some stages, as `embed 0–1 | 32–33`."""
    shown = []
    for stage in stages:
        layers = [unit for unit in parts[stage] if isinstance(unit, int)]
        words = ["embed"] * ("embed" in parts[stage])
        words += [f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else str(layers[0])] if layers else []
        shown.append(" ".join(words + ["head"] * ("head" in parts[stage])))
    return " | ".join(shown)


def flags(plan):
    """How a plan's storing is typed."""
    store = plan.store
    return f"--dtype {plan.dtype} --recompute {','.join(store.recompute) or 'none'}{' --fp8' * store.fp8}{' --offload' * store.offload}"


def report(plan, rungs):
    """The plan as text. rungs: what `ladder` gave for its layout."""
    p, layout, gpu, a, recipe = plan, plan.layout, plan.gpu, plan.assumed, RECIPES[plan.dtype]
    s, worst = sizes(p.config), plan.fills[plan.worst]
    usable, leaving = gpu.memory * a.usable, max(p.exchange) * _cross(layout, gpu)
    lines = [
        f"{layout.pp * layout.dp} × {gpu.name}: {layout.flags()}{' --zero1' if layout.zero1 else ''} --encoder {layout.encoder}",
        f"stored: {flags(p)}",
        f"model: {s.text:,} text + {s.vision + s.projector:,} vision parameters, {s.active:,} active per token",
        f"step: {layout.dp} replicas × {layout.microbatches} microbatches × {p.rows} × {p.length:,} tokens = {p.tokens:,} tokens",
        "",
        "Memory per rank, GB (10⁹ bytes). Weights, grads, state (of the replica that got most) and buffers stay; one of the next four",
        "comes on top at a time: activations in the pipeline, the encoder's, the reduction's copy of gradients, the optimizer's step",
        "rank  parameters   weights   grads    state   buffers   in flight  pipeline  encoder reduction optimizer     peak   units of each stage",
    ]
    for rank, f in enumerate(p.fills):
        h = f.held
        lines.append(f"{rank:4d} {h.numbers / 1e9:9.3f} G {_gb(h.weights)} {_gb(h.gradients)} {_gb(h.state)} {_gb(f.buffers)} {f.in_flight:9d}   "
                     f"{' '.join(map(_gb, f.moments.values()))}  {_gb(f.peak)}   {_units(p.parts, range(rank, layout.stages, layout.pp))}"
                     f"{'   ← worst' if rank == p.worst else ''}")  # fmt: skip
    h, verdict = worst.held, f"does not fit: {p.excess / 1e9:.1f} GB too much"
    if p.excess <= 0:
        verdict = "fits" if p.fits else f"fits, if the host took {p.offload / 1e9:.0f} GB/s"
    lines += ["", f"worst is rank {p.worst}, in the {worst.moment}: {worst.peak / 1e9:.1f} GB of {usable / 1e9:.1f} usable — {verdict}",
              f"  in bytes: weights {h.weights:,.0f}, gradients {h.gradients:,.0f}, optimizer state {h.state:,.0f}, "
              f"activations {worst.moments['pipeline']:,.0f}, buffers {worst.buffers:,.0f}",
              "", f"What must be recomputed, stored in FP8 or offloaded to fit {usable / 1e9:.1f} GB (worst rank)",
              f"  {'':51s} GB at most                                if all went to the CPU    step    MFU"]  # fmt: skip
    for (dtype, what), rung in rungs.items():
        told = "fits" if rung.excess <= 0 else f"{rung.excess / 1e9:.1f} too much"
        chosen = " ← chosen" if (rung.dtype, rung.store) == (p.dtype, p.store) else ""
        lines.append(f"  {dtype + ': ' + what:51s} {_gb(rung.fills[rung.worst].peak)}  in the {rung.fills[rung.worst].moment:9s}  {told:15s}"
                     f"{rung.host / 1e9:6.0f} GB, {rung.offload / 1e9:5.1f} GB/s  {rung.step:6.2f} s  {rung.mfu(rung.step):5.1%}{chosen}")  # fmt: skip
    lines.append(f"  (for each GPU, each way; its host takes {gpu.host / 1e9:.0f} GB/s)")
    best = choose(rungs.values())
    if not p.fits:
        lines.append(f"  → {flags(best)} fits" if best.fits else "  → none fits: take more GPUs, --pp or --ep")  # fmt: skip
    seconds = [f + b for f, b in zip(p.forward, p.backward)]
    slow = seconds.index(max(seconds))
    even = (layout.pp - 1) / (layout.virtual_stages * layout.microbatches + layout.pp - 1)
    lines += ["", "Traffic per step, sent by one rank",
              f"  all-to-all        {max(p.exchange) / 1e9:10.1f} GB   {leaving / 1e9:.1f} GB of it to other nodes: {leaving / gpu.link:.2f} s at {gpu.link * 8 / 1e9:.0f} Gb/s",
              f"  pipeline          {max(p.messages) / 1e9:10.1f} GB   {max(p.messages) / gpu.link:.2f} s",
              f"  gradients, ZeRO-1                 {p.reduce:.2f} s",
              "", "Time",
              f"  one microbatch: forward {min(p.forward) * 1e3:.1f} … {max(p.forward) * 1e3:.1f} ms in a stage, "
              f"backward {min(p.backward) * 1e3:.1f} … {max(p.backward) * 1e3:.1f} ms",
              f"  slowest stage     {slow:8d}   ({_units(p.parts, [slow])}): {max(seconds) * 1e3:.1f} ms forward and backward; the mean is "
              f"{sum(seconds) / len(seconds) * 1e3:.1f} ms",
              f"  bubble            {bubble(p.spans):8.1%}   of the pipeline's time; even stages would have {even:.1%}",
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
              *_about_dtype(p.dtype),
              "  routing is even; activations as the unfused operations keep them; of the encoder's an estimate",
              f"  {gpu.name}: {gpu.memory / 1e9:.0f} GB, of which {a.usable:.0%} usable; {gpu.flops / 1e12:.3g} TFLOP/s bfloat16, "
              f"{gpu.flops_float32 / 1e12:.3g} float32; NVLink {gpu.nvlink / 1e9:.0f} GB/s, network {gpu.link / 1e9:.0f} GB/s one way; {gpu.node} per node",
              f"  --efficiency {a.efficiency}: of those rates, with all that is no matrix product; "
              "backward = 2 × forward, and what is recomputed",
              f"  --hidden {a.hidden}: share of the all-to-all that overlaps with computation; "
              "messages of the pipeline delay only their receiver; copies to the CPU cost nothing as long as they keep up",
              f"  --vision-share {a.vision}, pictures of {a.picture} patches; four encoder forward passes' worth of work, spread evenly",
              "  gradients are reduced after the pipeline, not during it; data come for free; MFU counts neither recompute nor vision"]  # fmt: skip
    return "\n".join(lines)


def _about_dtype(dtype):
    """What must be said of a recipe."""
    if dtype == "bfloat16":
        return ["  … of train_small.py: autocast over float32 weights, and experts in the dtype of the stream, float32"]
    return ["  … how K2 was trained; train_small.py has no such --dtype yet"] if dtype == "bfloat16-weights" else []


def _cross(layout, gpu):
    """Of what an all-to-all sends to others, the share that leaves the node."""
    return (layout.ep - min(layout.ep, gpu.node)) / max(layout.ep - 1, 1)


def draw(plan, path):
    """The schedule as a picture: all of it, and below that its beginning, with the microbatches numbered."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layout, height = plan.layout, 1.2 + 0.3 * plan.layout.pp
    begin = min(plan.pipeline, 70 * min(span.end - span.start for span in plan.spans if span.work.stage == layout.stages // 2))
    figure, (whole, start) = pyplot.subplots(2, 1, figsize=(18, 2 * height), layout="constrained")
    draw_spans(whole, plan.spans, layout)
    draw_spans(start, plan.spans, layout, 0.0, begin)
    whole.set_title(f"{layout.pp * layout.dp} × {plan.gpu.name}, {layout.microbatches} microbatches: bubble {bubble(plan.spans):.1%} of "
                    f"{plan.pipeline:.2f} s", loc="right", fontsize=10)  # fmt: skip
    start.set_title(f"the first {begin:.2f} s; numbers: microbatches", loc="right", fontsize=10)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=100, format="png", metadata={"Software": None})
    os.replace(temporary, path)
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
    parser.add_argument("--microbatches", type=int, help="per replica and step; default: 4 · pp, or the next fewer times pp that fit")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16-weights", choices=list(RECIPES))
    parser.add_argument("--no-zero1", action="store_true", help="every replica keeps the whole optimizer state")
    parser.add_argument("--encoder", default="dep", choices=["dep", "stage0"])
    parser.add_argument("--recompute", help="none, selective, block (as activations.py), or some of norms,swiglu,mla; default, without "
                        "--fp8 and --offload too: the fastest that fits")  # fmt: skip
    parser.add_argument("--fp8", action="store_true", help="inputs of experts and MLPs, gate and up in FP8-E4M3")
    parser.add_argument("--offload", action="store_true", help="what is stored waits in the CPU's memory")
    for name, flag, help_text in (
        ("efficiency", "--efficiency", "share of the peak rate reached"), ("hidden", "--hidden", "share of the all-to-all that is hidden"),
        ("vision", "--vision-share", "share of the tokens that are pictures"),
    ):  # fmt: skip
        parser.add_argument(flag, dest=name, type=float, default=getattr(Assumed, name), help=help_text)
    parser.add_argument("--check", action="store_true", help="instead: measure real steps on this machine's CPU beside what is predicted")
    parser.add_argument("--quick", action="store_true", help="with --check: fewer of them")
    parser.add_argument("--out", type=pathlib.Path, help="directory for plan.txt and schedule.png; of --check: default runs/plan-check")


def _asked(options):
    """The Plan that the flags ask for, and the rungs of its layout. Raises ParallelError."""
    recompute = tuple((options.recompute or "none").replace("none", "").split(",")) if options.recompute not in (None, "none") else ()
    if recompute not in (("selective",), ("block",)) and not {*recompute} <= {*RECOMPUTE}:
        raise ParallelError(f"--recompute {options.recompute}: choose none, selective, block, or some of {','.join(RECOMPUTE)}")
    if min(options.gpus, options.pp, options.rows, options.length) < 1:
        raise ParallelError("--gpus, --pp, --rows and --length must be at least 1")
    config, assumed = K25Config.preset(options.preset), Assumed(options.efficiency, options.hidden, options.vision)
    gpu = this_cpu() if options.gpu == "cpu" else GPUS[options.gpu]
    open_store = options.recompute is None and not options.fp8 and not options.offload
    dtypes = tuple(dict.fromkeys((options.dtype, "bfloat16-weights")))
    found = []
    for microbatches in [options.microbatches] if options.microbatches else [times * options.pp for times in (4, 3, 2, 1)]:
        layout = Layout(options.pp, options.virtual_stages, options.ep, max(options.gpus // options.pp, 1), microbatches,
                        not options.no_zero1, options.encoder)  # fmt: skip
        layout.check(config.num_hidden_layers, config.n_routed_experts, options.gpus)
        rungs = ladder(config, layout, gpu, dtypes, options.rows, options.length, assumed)
        plan = choose([rung for rung in rungs.values() if rung.dtype == options.dtype])
        if not open_store:
            store = Store(recompute, options.fp8, options.offload)
            plan = make_plan(config, layout, gpu, options.dtype, options.rows, options.length, store, assumed)
        found.append((plan, rungs))
        if plan.fits:
            break
    return next((pair for pair in found if pair[0].fits), found[0])


def main(arguments=None):
    """The command line: print the plan. Returns the exit code: 2, with one line, for a layout that cannot be."""
    cli = argparse.ArgumentParser(prog="planner.py", description=__doc__.split("\n")[0])
    add_arguments(cli)
    options = cli.parse_args(arguments)
    if options.check:
        return trials.check(options.out or pathlib.Path("runs/plan-check"), options.quick)
    try:
        plan, rungs = _asked(options)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    text = report(plan, rungs)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_file(options.out / "plan.txt", text + "\n")
        draw(plan, options.out / "schedule.png")
        print(f"\nschedule: {options.out / 'schedule.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
