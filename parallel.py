"""The same training step on many processes: pipeline, expert and data parallel, ZeRO-1, DEP — K2.5 report 4.5, appendix C.

    world = pp · dp     a pipeline of pp ranks, dp replicas of it
    ep divides dp       ep consecutive replicas share one set of routed experts, E/ep each; all else is on every replica

One optimizer step takes dp · M microbatches (M = --microbatches), the same that a single process takes with
--accumulation dp · M; microbatch i belongs to replica i mod dp. Every process draws them all, since the data are
deterministic, and so knows the size of every picture of the global batch. What the single process sums, the processes
sum: each loss is divided by the global number of tokens before its backward pass, and gradients are added.

Schedules, meshes, collectives and ZeRO are torch.distributed's. Hand-written is what K2.5 needs beside them: experts on
other ranks (expert_parallel.py), losses and counters of the routers inside a pipeline, and DEP (dep.py).

Run: torchrun --nproc-per-node 4 -- train_small.py --pp 2 --virtual-stages 2 --ep 2        (the training itself)
     python parallel.py plan --preset k2.5 --gpus 1024 --pp 16 --virtual-stages 2 --ep 16 --gpu h800    (planner.py)
     python parallel.py dep-bench        (dep_bench.py)        python parallel.py scale-bench        (scale_bench.py)

Public names: ParallelError, join_processes, ranks, on_first, stop, Layout, split_units, Place, keep_units, Feed, StageModule,
zero1, Trainer, main.
Letters: B rows, T tokens, C hidden, H heads, E experts, M merged media tokens.
Tests: pytest tests/test_parallel.py
"""

import datetime
import importlib
import math
import os
import signal
import sys
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

import dep
from activations import Memory, saving
from expert_parallel import ExpertParallel
from k25 import cross_entropy_fused, cross_entropy_reference
from mla import rope_table, visibility
from moe import MLP, balance_bias_, load_cv
from optim import MuonClip, qk_clip_
from step import StepResult


class ParallelError(ValueError):
    """A layout that cannot be; one line says why and which is the nearest that can."""


# ----------------------------------------------------------------------------------------- processes


def join_processes():
    """Join the processes that torchrun started, over gloo on the CPU and NCCL on CUDA. Returns `ranks()`.

    Without torchrun nothing is done.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group()
    return ranks()


def ranks():
    """(this process's rank, number of processes); (0, 1) for a process of its own."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_first(action):
    """Do something on rank 0 only, such as preparing a directory; its result or its ValueError is everybody's."""
    outcome = [None, None]
    if ranks()[0] == 0:
        try:
            outcome[0] = action()
        except ValueError as error:
            outcome[1] = error
    if ranks()[1] > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise outcome[1]
    return outcome[0]


def stop(code, message):
    """End this process on an error that all processes have met: rank 0 says it for all, and each exits with the code.

    torchrun terminates the rest as soon as one has ended, so they wait for rank 0, and then take no notice.
    """
    rank, world = ranks()
    if rank == 0:
        print(message, file=sys.stderr, flush=True)
    if world > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.barrier()
    sys.exit(code)


# -------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Layout:
    """How the work is split; each field is a flag of train_small.py."""

    pp: int = 1  # pipeline ranks
    virtual_stages: int = 1  # stages per pipeline rank, interleaved
    ep: int = 1  # ranks that share one set of routed experts; divides dp
    dp: int = 1  # replicas of the pipeline
    microbatches: int = 1  # M: microbatches per replica and step
    zero1: bool = False  # split the optimizer state over the replicas
    encoder: str = "dep"  # dep | stage0: who runs the vision tower
    overlap: bool = False  # experts work on one half of the tokens while the other travels

    @property
    def stages(self):
        """Pipeline stages."""
        return self.pp * self.virtual_stages

    def problem(self, layers, experts, world):
        """Why this layout cannot be, or None. layers: int — of the shallowest model; experts: int — E; world: int."""
        if min(self.pp, self.virtual_stages, self.ep, self.dp, self.microbatches) < 1:
            return f"{self.flags()}: each must be at least 1"
        if self.pp * self.dp != world:
            started = f"{world} processes were" if world > 1 else "1 process was"
            return f"--pp {self.pp} · --dp {self.dp} needs {self.pp * self.dp} processes and {started} started"
        if self.dp % self.ep:
            return f"--ep {self.ep} does not divide --dp {self.dp}"
        if experts % self.ep:
            return f"--ep {self.ep} does not divide {experts} experts"
        if self.stages > layers + 2:
            return f"--pp {self.pp} · --virtual-stages {self.virtual_stages} = {self.stages} stages, but embedding, {layers} layers and head are {layers + 2}"
        if self.virtual_stages == 1 and self.microbatches < self.pp:
            return f"--microbatches {self.microbatches} leaves ranks of --pp {self.pp} without work"
        if self.virtual_stages > 1 and self.microbatches % max(self.microbatches // self.pp, 1):
            return f"interleaving takes microbatches in even rounds of about --pp {self.pp}, not --microbatches {self.microbatches}"
        return None

    def check(self, layers, experts, world):
        """Raise ParallelError when this layout cannot be, naming the nearest that can. Arguments as `problem`."""
        if self.encoder not in ("dep", "stage0"):
            raise ParallelError(f"--encoder {self.encoder}: choose dep or stage0")
        problem = self.problem(layers, experts, world)
        if problem:
            raise ParallelError(f"{problem}; nearest: {self.nearest(layers, experts, world).flags()}")

    def nearest(self, layers, experts, world):
        """The possible layout whose numbers differ least from this one's, by the sum of their ratios' logarithms."""

        def distance(other):
            pairs = zip(self.numbers(), other.numbers())
            return sum(abs(math.log(max(mine, 1) / its)) for mine, its in pairs), other.numbers()

        found = [Layout(pp, virtual, ep, world // pp, microbatches)
                 for pp in range(1, world + 1) for virtual in range(1, (layers + 2) // pp + 1) for ep in range(1, world // pp + 1)
                 for microbatches in {max(self.microbatches, 1), pp, math.ceil(max(self.microbatches, 1) / pp) * pp}]  # fmt: skip
        return min((layout for layout in found if not layout.problem(layers, experts, world)), key=distance)

    def numbers(self):
        """pp, virtual stages, ep, dp, microbatches."""
        return self.pp, self.virtual_stages, self.ep, self.dp, self.microbatches

    def flags(self):
        """The layout as it is typed."""
        return "--pp {} --virtual-stages {} --ep {} --dp {} --microbatches {}".format(*self.numbers())


def split_units(layers, stages):
    """The units "embed", 0, 1, … layers − 1, "head" in `stages` contiguous parts as equal as can be, earlier ones larger."""
    units = ["embed", *range(layers), "head"]
    small, extra = divmod(len(units), stages)
    parts, at = [], 0
    for stage in range(stages):
        size = small + (stage < extra)
        parts.append(units[at : at + size])
        at += size
    return parts


class Place:
    """Where this process stands, and whom it talks to.

    Ranks count the pipeline first: rank = pp_rank · dp + dp_rank, so that ranks which share experts are neighbours.
    Groups: `world` of all; `pp` along the pipeline; `dp` over its replicas; `ep` over the ranks that share experts;
    `copies` over those that hold the same experts. layout: Layout; device: of this process;
    patience: seconds that an operation of a group may take before it counts as hung.
    """

    def __init__(self, layout, device="cpu", patience=600):
        self.layout, self.world = layout, dist.group.WORLD
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        plane = init_device_mesh(self.device.type, (layout.pp, layout.dp), mesh_dim_names=("pp", "dp"))
        cube = init_device_mesh(self.device.type, (layout.pp, layout.dp // layout.ep, layout.ep), mesh_dim_names=("pp", "copies", "ep"))
        self.pp, self.dp = plane.get_group("pp"), plane.get_group("dp")
        self.copies, self.ep = cube.get_group("copies"), cube.get_group("ep")
        for group in {self.world, self.pp, self.dp, self.copies, self.ep}:  # a mesh gives its groups torch's default, half an hour
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=patience), group)
        self.rank, self.pp_rank, self.dp_rank, self.ep_rank = map(dist.get_rank, (self.world, self.pp, self.dp, self.ep))

    def group_of(self, name):
        """The ranks that hold a copy of a parameter, by its name: what its gradient is summed over."""
        if ".mlp.experts." in name:
            return self.copies
        return self.world if name.startswith(dep.PREFIXES) and self.layout.encoder == "dep" else self.dp

    def parts(self, layers):
        """{stage: its units} of this pipeline rank."""
        parts = split_units(layers, self.layout.stages)
        return {stage: parts[stage] for stage in range(self.pp_rank, self.layout.stages, self.layout.pp)}

    def cut(self, tensors, names):
        """Of a whole model's tensors, those of `names`, experts cut to this rank's. Returns {name: tensor}."""
        ep = self.layout.ep
        return {name: tensors[name].chunk(ep)[self.ep_rank] if ".mlp.experts." in name and tensors[name].ndim else tensors[name]
                for name in names}  # fmt: skip


def keep_units(model, place):
    """Strip a K25, in place, to what one process holds: its units, and its share of their experts. Names stay the released ones."""
    config, text = model.config, model.language_model.model
    units = [unit for part in place.parts(config.num_hidden_layers).values() for unit in part]
    layers = {str(unit): text.layers[unit] for unit in units if isinstance(unit, int)}
    for block in layers.values():
        if place.layout.ep > 1 and not isinstance(block.mlp, MLP):
            block.mlp.experts = ExpertParallel(block.mlp.experts, place.ep, config.impl, place.layout.overlap)
    text.layers = nn.ModuleDict(layers)
    if "embed" not in units:
        del text.embed_tokens
    if "head" not in units:
        del text.norm, model.language_model.lm_head
    if place.layout.encoder == "stage0" and place.pp_rank:
        del model.vision_tower, model.mm_projector
    return model


# ------------------------------------------------------------------------------------ pipeline stages


class _AttachLoss(torch.autograd.Function):
    """Pass x through, and add `coefficient · loss` to whatever it is that x's gradient comes from."""

    @staticmethod
    def forward(ctx, x, loss, coefficient):
        ctx.gradient = torch.full_like(loss, coefficient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, ctx.gradient, None


@dataclass
class Feed:
    """One microbatch on its way through this process's stages, and what they measured."""

    batch: object  # Batch
    media: torch.Tensor | None  # (M,C) leaf: the embeddings of its media, where DEP made them
    wanted: int  # loss-carrying tokens of the global batch
    share: float  # of the global batch's sequences, how many are in this microbatch
    counts: dict = field(default_factory=dict)  # layer → (E,) int64
    balance: dict = field(default_factory=dict)  # layer → scalar
    largest: dict = field(default_factory=dict)  # layer → (H,) max logits
    per_token: torch.Tensor | None = None  # (B,T) losses, on the last stage


class StageModule(nn.Module):
    """Some consecutive units of the model. Media and targets are ragged and a pipeline's arguments are not, so the
    stage looks its microbatch up by number in `feeds`.

    model: K25 after keep_units; units: list; feeds: list of Feed, filled anew for each step; autocast: bool; memory: Memory;
    encodes: bool — the stage that embeds also runs the vision tower (--encoder stage0).
    """

    def __init__(self, model, units, feeds, autocast, memory, encodes):
        super().__init__()
        self.units, self.feeds, self.autocast, self.memory, self.encodes = units, feeds, autocast, memory, encodes
        self.blocks = nn.ModuleDict({str(unit): model.language_model.model.layers[str(unit)] for unit in units if isinstance(unit, int)})
        self.whole = [model]  # in a list: its other parameters are not this stage's

    def forward(self, x, index):
        """x: (B,T,C) float of the stage before, ignored by the first; index: (1,) int64 — the microbatch's number.
        Returns (B,T,C), or on the last stage (1,): what this microbatch adds to the global loss."""
        feed = self.feeds[int(index)]
        with torch.autocast(feed.batch.ids.device.type, torch.bfloat16, enabled=self.autocast), saving(self.memory, self.whole[0]):
            if "embed" in self.units:
                x = self._embed(feed)
            x = self._layers(x, feed)
            return self._loss(x, feed) if "head" in self.units else x

    def _embed(self, feed):
        model, batch, media = self.whole[0], feed.batch, feed.media
        if self.encodes and batch.patches is not None:
            media = model.encode_media(batch.patches, batch.grid_thw)
        x = model.embed(batch.ids, media)  # (B,T,C)
        # Where all before the first expert is frozen and one replica has no media, the others would wait in backward.
        return x if x.requires_grad else x.requires_grad_()

    def _layers(self, x, feed):
        config, batch = self.whole[0].config, feed.batch
        mask, valid = visibility(batch.segment_ids, batch.segment_ids), batch.segment_ids >= 0
        table = rope_table(batch.positions, config.qk_rope_head_dim, config.rope_theta, config.yarn,
                           torch.promote_types(x.dtype, torch.float32))  # fmt: skip
        for name, block in self.blocks.items():
            x, largest, router = block(x, table, mask, valid, None, True)
            layer = int(name)
            feed.largest[layer] = largest.detach()
            if router:
                feed.counts[layer], feed.balance[layer] = router.counts, router.balance_loss.detach()
                moe_layers = config.num_hidden_layers - config.first_k_dense_replace
                x = _AttachLoss.apply(x, router.balance_loss, config.aux_loss_alpha * feed.share / moe_layers)
        return x

    def _loss(self, x, feed):
        text, batch = self.whole[0].language_model, feed.batch
        cross_entropy = cross_entropy_fused if self.whole[0].config.impl == "fused" else cross_entropy_reference
        targets = batch.targets.masked_fill(~batch.loss_mask, -100)
        per_token = cross_entropy(text.model.norm(x).flatten(0, 1), text.lm_head.weight, targets.flatten())  # (B·T,)
        feed.per_token = per_token.detach().view(batch.ids.shape)
        return (per_token.sum() / feed.wanted).view(1)


# ------------------------------------------------------------------------------------------- the step


def zero1(optimizer, group):
    """ZeRO-1: a new MuonClip's state split over a group of ranks; each steps its parameters and broadcasts them.

    torch's ZeroRedundancyOptimizer gives whole parameters to ranks, as Newton–Schulz needs. It forgets the names that
    MuonClip saves its state under, so they are put back; `.optim` of the result is the MuonClip of this rank's share.
    """
    names = {p: name for g in optimizer.param_groups for name, p in zip(g["param_names"], g["params"])}
    groups = [{key: value for key, value in g.items() if key != "param_names"} for g in optimizer.param_groups]

    def named(groups):
        return MuonClip([g | {"params": [(names[p], p) for p in g["params"]], "param_names": []} for g in groups])

    return ZeroRedundancyOptimizer(groups, named, group)


def _local(optimizer):
    """The MuonClip inside a ZeroRedundancyOptimizer, or the MuonClip itself."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


class Trainer:
    """This process's share of the model, of the optimizer's state, and of every step.

    model: K25 after keep_units; optimizer_of: function of named parameters → MuonClip; t: TrainConfig; place: Place.
    """

    def __init__(self, model, optimizer_of, t, place):
        self.model, self.t, self.place, self.layout, self.config = model, t, place, place.layout, model.config
        self.feeds, self.autocast = [], t.dtype == "bfloat16"
        parts = place.parts(self.config.num_hidden_layers)
        encodes = self.layout.encoder == "stage0"
        memory = Memory.of(t)
        self.modules = {stage: StageModule(model, units, self.feeds, self.autocast, memory, encodes) for stage, units in parts.items()}
        self.weight = next(model.language_model.parameters())  # for its dtype and device
        self.shape, self.schedule = None, None
        named = list(model.named_parameters())
        self.optimizers = [optimizer_of(named)] if not self.layout.zero1 else [
            zero1(optimizer_of([(name, p) for name, p in named if place.group_of(name) is group]), group)
            for group in dict.fromkeys(place.group_of(name) for name, _ in named)]  # fmt: skip

    @property
    def param_groups(self):
        """The groups of all optimizers, for a schedule to set their rates."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, batches):
        """One optimizer step. batches: list of dp · M Batch on the CPU, the same on every process.
        Returns StepResult, the same on every process, and the same as step.train_step's."""
        self.backward(batches)
        return self.update(batches)

    def backward(self, batches):
        """Fill the gradients of this process's parameters with those of the global batch. Arguments as `step`."""
        model, place = self.model, self.place
        wanted = max(sum(int(batch.loss_mask.sum()) for batch in batches), 1)
        sequences = [int((batch.segment_ids >= 0).any(dim=1).sum()) for batch in batches]
        mine = range(place.dp_rank, len(batches), self.layout.dp)
        items, media = [], {}
        if self.layout.encoder == "dep":
            ranks = self.layout.pp * self.layout.dp
            items = dep.share_out(batches, ranks, [number % self.layout.dp for number in range(len(batches))])
        empty = self.weight.new_empty(0, self.config.hidden_size)
        if items:
            with torch.autocast(place.device.type, torch.bfloat16, enabled=self.autocast):
                embedded = dep.balanced_forward(model, batches, items, place.rank)
            media = dep.leaves(items, dep.deliver(embedded, items, "owner", "reader", empty, place.world))
        self.feeds[:] = [Feed(batches[number].to(place.device, self.weight.dtype), media.get(number), wanted,
                              sequences[number] / max(sum(sequences), 1)) for number in mine]  # fmt: skip
        self._run_pipeline()
        if items and any(p.requires_grad for name, p in model.named_parameters() if name.startswith(dep.PREFIXES)):
            gradients = dep.deliver(dep.leaf_gradients(items, media), items, "reader", "owner", empty, place.world)
            with torch.autocast(place.device.type, torch.bfloat16, enabled=self.autocast):
                dep.recompute_backward(model, batches, items, place.rank, gradients)
        self._sum_gradients()

    def _run_pipeline(self):
        shape = self.feeds[0].batch.ids.shape
        if shape != self.shape:
            self.shape, self.schedule = shape, self._new_schedule(shape)
        numbers = torch.arange(self.layout.microbatches)
        first = (numbers.to(self.place.device),) if 0 in self.modules else ()
        last = {"target": numbers, "losses": []} if self.layout.stages - 1 in self.modules else {}
        self.schedule.step(*first, index=numbers, return_outputs=False, **last)

    def _new_schedule(self, shape):
        """The pipeline for microbatches of (B,T) tokens. With static shapes: to find them out, each stage would run one
        more forward pass. Losses come divided by hand: the schedule would not scale the gradient of the media leaf."""
        like = dict(dtype=self.weight.dtype, device="meta", requires_grad=True)
        x, loss = torch.empty(*shape, self.config.hidden_size, **like), torch.empty(1, **like)
        number = torch.empty(1, dtype=torch.int64, device="meta")
        stages = [PipelineStage(module, stage, self.layout.stages, self.place.device, input_args=(x if stage else number,),
                                output_args=(loss if stage == self.layout.stages - 1 else x,), group=self.place.pp)
                  for stage, module in self.modules.items()]  # fmt: skip
        settings = dict(n_microbatches=self.layout.microbatches, loss_fn=lambda out, _: out.sum(), scale_grads=False)
        if self.layout.virtual_stages == 1:
            return Schedule1F1B(stages[0], **settings)
        return ScheduleInterleaved1F1B(stages, **settings)

    def _sum_gradients(self):
        """Sum each gradient over the ranks that hold the parameter. One that nobody has stays None, as in one process."""
        moving = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        for group in dict.fromkeys(self.place.group_of(name) for name, _ in moving):
            members = [p for name, p in moving if self.place.group_of(name) is group]
            found = torch.tensor([p.grad is not None for p in members], dtype=torch.int64, device=self.place.device)
            dist.all_reduce(found, group=group)
            members = [p for p, n in zip(members, found.tolist()) if n]
            if not members:
                continue
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in members])
            dist.all_reduce(flat, group=group)
            for p, piece in zip(members, flat.split([p.numel() for p in members])):
                p.grad = piece.view_as(p)

    def gradient_norm(self):
        """The norm of the whole model's gradient: each square over the number of ranks that hold it, summed over all ranks."""
        square = torch.zeros((), dtype=torch.float64, device=self.place.device)
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                square += p.grad.double().square().sum() / dist.get_world_size(self.place.group_of(name))
        dist.all_reduce(square)
        return square.sqrt().item()

    def update(self, batches):
        """Clip the gradient, step, clip the logits and move the router biases, each once. Returns StepResult."""
        sums, counts, largest = self._measure()
        (text, text_tokens), (vision, vision_tokens), (balance, _) = sums.tolist()
        wanted, norm, clipped = max(text_tokens + vision_tokens, 1), self.gradient_norm(), 0
        total = (text + vision) / wanted
        if math.isfinite(total) and math.isfinite(norm):
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad.mul_(min(1.0, self.t.clip_norm / (norm + 1e-6)))
            for optimizer in self.optimizers:
                optimizer.step()
            clipped = self._clip_and_balance(counts, largest)
        self.model.zero_grad(set_to_none=True)
        cvs = tuple(float(load_cv(count)) for count in counts[self.config.first_k_dense_replace :])
        return StepResult(total, text / text_tokens if text_tokens else math.nan, vision / vision_tokens if vision_tokens else math.nan,
                          balance, norm, float(largest.max()), clipped, max(cvs, default=math.nan), cvs,
                          tuple(largest.amax(dim=1).tolist()), sum(batch.ids.numel() for batch in batches))  # fmt: skip

    def _measure(self):
        """What all stages measured on all microbatches: sums (3,2) — text, vision: loss, tokens; balance loss —,
        counts (layers,E) int64 and largest logits (layers,H), the same on every process."""
        config, device = self.config, self.place.device
        layers, wide = config.num_hidden_layers, torch.float64
        sums = torch.zeros(3, 2, dtype=wide, device=device)
        counts = torch.zeros(layers, config.n_routed_experts, dtype=torch.int64, device=device)
        largest = torch.full((layers, config.num_attention_heads), -math.inf, dtype=wide, device=device)
        for feed in self.feeds:
            for layer, top in feed.largest.items():
                largest[layer] = torch.maximum(largest[layer], top.to(wide))
            for layer, count in feed.counts.items():
                counts[layer] += count
                sums[2, 0] += feed.share * feed.balance[layer].to(wide) / (layers - config.first_k_dense_replace)
            if feed.per_token is not None:
                for kind, mask in enumerate((feed.batch.loss_mask & ~feed.batch.vision, feed.batch.loss_mask & feed.batch.vision)):
                    sums[kind] += torch.stack((feed.per_token.to(wide)[mask].sum(), mask.sum().to(wide)))
        dist.all_reduce(sums)
        dist.all_reduce(counts)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return sums, counts, largest

    def _clip_and_balance(self, counts, largest):
        """QK-Clip and router biases of this process's layers. Returns the heads clipped in all layers."""
        config = self.config
        clipped = torch.zeros((), dtype=torch.int64, device=self.place.device)
        for name, block in self.model.language_model.model.layers.items():
            q_b, kv_b = block.self_attn.q_b_proj.weight, block.self_attn.kv_b_proj.weight
            if q_b.requires_grad:
                clipped += qk_clip_(q_b, kv_b, largest[int(name)], self.t.qk_clip, config.qk_nope_head_dim,
                                    config.qk_rope_head_dim, config.v_head_dim)  # fmt: skip
            if not isinstance(block.mlp, MLP) and block.mlp.gate.weight.requires_grad:
                balance_bias_(block.mlp.gate.e_score_correction_bias, counts[int(name)], self.t.balance_gamma)
        dist.all_reduce(clipped, group=self.place.pp)
        return int(clipped)

    # What is saved: one process's view of the whole

    def state_tensors(self):
        """This process's share of the optimizer's state, as MuonClip.state_tensors."""
        return {name: tensor for o in map(_local, self.optimizers) for name, tensor in o.state_tensors().items()}

    def load_state_tensors(self, tensors):
        """Take over what `own_state` cut from a whole optimizer's state."""
        for o in map(_local, self.optimizers):
            names = {name for group in o.param_groups for name in group["param_names"]}
            o.load_state_tensors({key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] in names})

    def own_state(self, tensors):
        """Of a whole optimizer's state_tensors, this process's part."""
        names = {name for o in map(_local, self.optimizers) for group in o.param_groups for name in group["param_names"]}
        return self.place.cut(tensors, [key for key in tensors if key.rpartition(".")[0] in names])


# ----------------------------------------------------------------------------------------- command line

COMMANDS = {"plan": "planner", "dep-bench": "dep_bench", "scale-bench": "scale_bench"}  # each a module above this one


def main(arguments=None):
    """`python parallel.py COMMAND …` hands the rest to the command's own module. Returns its exit code, 2 on misuse."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if command not in COMMANDS:
        print(f"parallel.py: no command {command!r}: choose one of {', '.join(COMMANDS)}; training itself is torchrun … train_small.py",
              file=sys.stderr)  # fmt: skip
        return 2
    return importlib.import_module(COMMANDS[command]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
