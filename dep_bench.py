"""What DEP buys: multimodal beside text-only training steps, for --encoder dep and stage0 — K2.5 report 4.5, appendix C.

    python parallel.py dep-bench                 4 processes on the CPU, or one per CUDA device: about 4 minutes
    python parallel.py dep-bench --quick         a smaller model and fewer steps, in under one: to see that it works

Two batches of a pair have the same rows, documents and tokens; in one of them some tokens are pictures, as `Spread` draws
them. Both go through both encoders in turn, and are counted in both ways. With E the processor time of the encoder's own
computation (forward, of DEP also the recompute, backward), summed over all R ranks:

    (a) raw           text-only step time / multimodal step time
    (b) discounted    text-only step time / (multimodal step time − E / R): as if a perfect encoder were free
    (c) by operations text-only step time · (1 + encoder's operations / backbone's) / multimodal step time: stricter than (b)
                      where the encoder is slower per operation than the backbone

    one core per rank       a step's time put together from what each rank measured of its own processor time: every
                            forward and backward pass of the pipeline, run through the real schedule's tables, and the
                            phases around it at the pace of the slowest rank; what is sent costs only its copying
    wall clock              the true one. Fewer cores than ranks hide all waiting from it, the thing to be measured.

Public names: BenchError, Spread, Bench, model_config, draw_size, draw_row, documents, global_batch, Phases, MeasuredTrainer,
one_core_each, raw, discounted, figures, imbalances, by_items, run, main.
Letters: R ranks.     Tests: pytest tests/test_dep_bench.py
"""

import argparse
import dataclasses
import datetime
import functools
import gc
import json
import math
import os
import pathlib
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from PIL import Image
from tqdm import tqdm

import dep
from checkpoint import write_file
from data import encode_example, pack_rows
from dep_report import ENCODERS, KINDS, disagreement, markdown, plot_efficiency, plot_imbalance, plot_memory
from example import Example
from footprint import measure_peak
from k25 import K25, K25Config
from optim import MuonClip
from parallel import Layout, ParallelError, Place, Trainer, keep_units, split_units
from planner import unit_flops, vision_flops
from schedule import schedule_tables, simulate
from tokenizer import Tokenizer

BLOCK = 28  # pixels: one embedding of a picture
FRAME, CAPTION = 8, 8  # tokens around a picture, and of the words that follow it


class BenchError(ValueError):
    """Options with which nothing can be measured."""


# --------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Spread:
    """How many pictures a row of tokens has, and how large: most have none, few have many or large ones."""

    text_only: float = 0.6  # share of the rows without a picture
    most: int = 16  # of the others, n = 1 … most pictures with probability ∝ n^−power, as far as they fit
    power: float = 0.5
    median: float = 8.0  # embeddings of a picture: log-normal with this median
    sigma: float = 0.9
    aspect: float = 0.35  # and its height / width: log-normal with median 1
    largest: int = 120  # embeddings; a larger picture is shrunk to it


@dataclass(frozen=True)
class Bench:
    """What is run: every field is written to dep_bench.json."""

    ranks: int = 4
    pp: tuple = (2, 4)  # pipeline ranks of each layout; dp = ranks / pp
    device: str = "cpu"
    seed: int = 0
    repeats: int = 9  # timed steps of each side, each on another batch
    memory_steps: int = 8  # further steps whose peak memory is measured
    global_microbatches: int = 8  # of one step, dealt out to the replicas
    rows: int = 3  # of a microbatch
    length: int = 256  # tokens of a row
    layers: int = 14
    draws: int = 400  # random global batches for each number of items per rank
    spread: Spread = field(default_factory=Spread)
    dtype: str = "float32"  # the rest is what Trainer asks for
    recompute: str = "none"
    fp8: bool = False
    offload: bool = False
    clip_norm: float = 1.0
    qk_clip: float = 100.0
    balance_gamma: float = 0.002

    def layouts(self):
        """{encoder: Layout} for each number of pipeline ranks. Raises BenchError or ParallelError where one cannot be."""
        found, config = [], model_config(self)
        for pp in self.pp:
            if pp < 1 or self.ranks % pp or self.global_microbatches % (self.ranks // pp):
                raise BenchError(f"--pp {pp} does not divide --ranks {self.ranks} into replicas of {self.global_microbatches} microbatches")
            dp = self.ranks // pp
            both = {encoder: Layout(pp, dp=dp, microbatches=self.global_microbatches // dp, zero1=True, encoder=encoder)
                    for encoder in ENCODERS}  # fmt: skip
            both["dep"].check(config.num_hidden_layers, config.n_routed_experts, self.ranks)
            found.append(both)
        return found


QUICK = dict(repeats=2, memory_steps=2, rows=2, length=128, global_microbatches=4, layers=6, draws=60)


def model_config(bench):
    """Preset toy, deeper, with fewer experts, and a tower whose share of a rank's work is K2.5's: K25Config."""
    toy = K25Config.preset("toy")
    vision = dataclasses.replace(toy.vision, vt_hidden_size=80, mm_hidden_size=80, vt_num_hidden_layers=2, vt_intermediate_size=240)
    return dataclasses.replace(toy, num_hidden_layers=bench.layers, n_routed_experts=8, vision=vision)


def draw_size(rng, spread):
    """Rows and columns of a picture in embeddings. rng: random.Random."""
    area = spread.median * math.exp(spread.sigma * rng.gauss(0, 1))
    shape = math.exp(spread.aspect / 2 * rng.gauss(0, 1))
    shrink = min(1.0, math.sqrt(spread.largest / area))
    rows, columns = (max(round(math.sqrt(area) * side * shrink), 1) for side in (shape, 1 / shape))
    while rows * columns > spread.largest:
        rows, columns = (rows - 1, columns) if rows > columns else (rows, columns - 1)
    return rows, columns


def draw_row(rng, spread, length):
    """The pictures of one row of `length` tokens, as many as fit: list of (rows, columns) in embeddings."""
    if rng.random() < spread.text_only:
        return []
    numbers = range(1, spread.most + 1)
    wanted = rng.choices(numbers, [n**-spread.power for n in numbers])[0]
    pictures, room = [], length - 3  # the end of this document, and a text of at least one character with its own
    for rows, columns in (draw_size(rng, spread) for _ in range(wanted)):
        if FRAME + rows * columns + CAPTION <= room:
            pictures.append((rows, columns))
            room -= FRAME + rows * columns + CAPTION
    return pictures


def documents(rng, pictures, length, kind):
    """The Examples of one row: one with all its pictures, and a text that fills the rest. With kind "text" the first is a
    text of as many tokens."""

    def letters(number):
        return "".join(rng.choices("abcdefgh ", k=number))

    first = sum(FRAME + rows * columns + CAPTION for rows, columns in pictures) + 1 if pictures else 0
    if pictures and kind == "text":
        yield Example(letters(first - 1))
    elif pictures:
        images = (Image.frombytes("RGB", (BLOCK * c, BLOCK * r), rng.randbytes(3 * BLOCK * BLOCK * r * c)) for r, c in pictures)
        text = "".join("<image>" + letters(CAPTION) for _ in pictures)
        yield Example(text, tuple(images), modality="vision")
    yield Example(letters(length - first - 1))


def global_batch(bench, number, kind):
    """The microbatches of step `number`, every row full. kind: "text" | "multimodal". Returns a list of Batch."""
    tokenizer, media, found = Tokenizer(), model_config(bench).media, []
    for microbatch in range(bench.global_microbatches):
        rng = random.Random(f"{bench.seed}/{number}/{microbatch}")
        rows = [draw_row(rng, bench.spread, bench.length) for _ in range(bench.rows)]
        examples = [example for pictures in rows for example in documents(rng, pictures, bench.length, kind)]
        found.append(pack_rows([encode_example(e, tokenizer, media) for e in examples], bench.rows, bench.length, tokenizer))
    return found


# ------------------------------------------------------------------------------------------ measurement


@dataclass
class Phases:
    """What one rank spent on one step, in seconds of its processor; on CUDA of the clock, with synchronisation."""

    before: float = 0.0  # until the pipeline: DEP's balanced forward
    pipeline: float = 0.0  # in it, with what follows:
    work: list = field(default_factory=list)  # [F | B, stage, microbatch, seconds]
    after: float = 0.0  # after it: DEP's recompute and backward
    reduce: float = 0.0  # gradients summed over ranks
    update: float = 0.0
    encoder: float = 0.0  # the encoder's own computation, wherever it happened
    wall: float = 0.0  # seconds by the clock


class MeasuredTrainer(Trainer):
    """A Trainer that writes down in `phases` what each step spent on what. Arguments as Trainer."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.phases, self.last, self.encoding = Phases(), 0.0, None
        if hasattr(self.model, "vision_tower"):
            self.model.vision_tower.register_forward_pre_hook(lambda *_: self._encoder_begins())
            self.model.mm_projector.register_forward_hook(lambda module, given, media: self._encoded(media))

    def now(self):
        """Processor seconds of all threads of this process, so that copying of messages counts and waiting does not."""
        if self.place.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def step(self, batches):
        """As Trainer.step; fills `phases`."""
        self.phases, began, self.last = Phases(), time.perf_counter(), self.now()
        result = super().step(batches)
        self.phases.wall = time.perf_counter() - began
        return result

    def update(self, batches):
        """As Trainer.update."""
        result = super().update(batches)
        self._lap("update")
        return result

    def _run_pipeline(self):
        self._lap("before")
        super()._run_pipeline()
        self._lap("pipeline")

    def _sum_gradients(self):
        self._encoder_ends()
        self._lap("after")
        super()._sum_gradients()
        self._lap("reduce")

    def _new_schedule(self, shape):
        schedule = super()._new_schedule(shape)
        for stage in [schedule._stage] if hasattr(schedule, "_stage") else schedule._stages:
            stage.forward_one_chunk = self._timed("F", stage.stage_index, stage.forward_one_chunk)
            stage.backward_one_chunk = self._timed("B", stage.stage_index, stage.backward_one_chunk)
        return schedule

    def _timed(self, kind, stage, chunk):
        @functools.wraps(chunk)
        def timed(microbatch, *arguments, **named):
            began = self.now()
            result = chunk(microbatch, *arguments, **named)
            self._encoder_ends()
            self.phases.work.append([kind, stage, microbatch, self.now() - began])
            return result

        return timed

    def _lap(self, phase):
        now = self.now()
        setattr(self.phases, phase, getattr(self.phases, phase) + now - self.last)
        self.last = now

    def _encoder_begins(self):
        self.encoding = self.now()

    def _encoder_ends(self):
        if self.encoding is not None:
            self.phases.encoder += self.now() - self.encoding
            self.encoding = None

    def _encoded(self, media):
        """The forward pass ends here. Of a backward pass the encoder's part is the last: it begins when the embeddings'
        gradient is known and ends with the pass."""
        self._encoder_ends()
        if media.requires_grad:
            media.register_hook(lambda gradient: self._encoder_begins())


def build(bench, layout):
    """The MeasuredTrainer of this process; the same weights whatever the layout."""
    device = torch.device("cuda", torch.cuda.current_device()) if bench.device == "cuda" else torch.device("cpu")
    torch.manual_seed(bench.seed)
    place = Place(layout, bench.device)
    model = keep_units(K25(model_config(bench)), place).to(device)
    return MeasuredTrainer(model, functools.partial(MuonClip.from_named, lr=2e-3, adamw_lr=1e-3), bench, place)


def peak_bytes(step, device):
    """The most that a step allocates beyond what is there when it begins, in bytes: by torch's profiler on the CPU, by
    the allocator's own count on CUDA."""
    if device.type == "cpu":
        return measure_peak(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(bench, layouts, bar):
    """All steps of one pair of layouts, on every rank. layouts: {encoder: Layout}; bar: tqdm.

    Returns {"samples": [...], "memory": [...]}: what the ranks measured at each step, by rank.
    """
    trainers = {encoder: build(bench, layout) for encoder, layout in layouts.items()}
    sides = [(encoder, kind) for encoder in ENCODERS for kind in KINDS]
    samples, memory = [], []
    for number in range(-1, bench.repeats + bench.memory_steps):
        batches = {kind: global_batch(bench, number, kind) for kind in KINDS}
        for encoder, kind in sides if number % 2 else sides[::-1]:  # nobody is always the first
            trainer, found = trainers[encoder], [None] * bench.ranks
            gc.collect()
            dist.barrier()
            about = {"batch": number, "encoder": encoder, "kind": kind}
            if number < bench.repeats:
                result = trainer.step(batches[kind])
                dist.all_gather_object(found, dataclasses.asdict(trainer.phases))
                samples.append(about | {"loss": result.loss, "load": os.getloadavg()[0], "ranks": found})
            elif kind == "multimodal" or encoder == "dep" and number == bench.repeats:  # of text all steps hold the same
                peak = peak_bytes(functools.partial(trainer.step, batches[kind]), trainer.place.device)
                dist.all_gather_object(found, peak)
                memory.append(about | {"ranks": found})
            bar.update()
    return {"samples": samples, "memory": memory}


def work(rank, bench, folder):
    """One process: measure every pair of layouts; rank 0 leaves what all have measured in `folder`."""
    torch.set_num_threads(1)
    if bench.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if bench.device == "cuda" else "gloo", f"file://{folder}/store", datetime.timedelta(seconds=600),
                            bench.ranks, rank)  # fmt: skip
    with tqdm(total=len(bench.pp) * 4 * (1 + bench.repeats + bench.memory_steps), unit="step", dynamic_ncols=True, disable=rank > 0) as bar:
        measured = [measure(bench, layouts, bar) for layouts in bench.layouts()]
    if rank == 0:
        write_file(pathlib.Path(folder) / "measured.json", json.dumps(measured))
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- figures


def one_core_each(layout, tables, ranks):
    """Seconds of a step in which every rank has a core of its own, from what the ranks spent.

        max before + max over replicas of the pipeline, simulated + max after + max reduce + max update

    What the schedule itself cost a rank, its messages mostly, is spread evenly over the rank's passes.
    tables: as schedule_tables(layout); ranks: list of Phases, by rank.
    """
    seconds = {}  # (replica, F | B, stage, microbatch) → seconds
    for rank, phases in enumerate(ranks):
        own = (phases.pipeline - sum(spent for *_, spent in phases.work)) / len(phases.work)
        seconds |= {(rank % layout.dp, *piece): spent + own for *piece, spent in phases.work}

    def pipeline(replica):
        forward, backward = ([[seconds[replica, kind, stage, number] for number in range(layout.microbatches)]
                              for stage in range(layout.stages)] for kind in "FB")  # fmt: skip
        return max(span.end for span in simulate(tables, forward, backward))

    around = sum(max(getattr(phases, name) for phases in ranks) for name in ("before", "after", "reduce", "update"))
    return around + max(map(pipeline, range(layout.dp)))


def raw(text, multimodal):
    """(a): text-only step time / multimodal step time."""
    return text / multimodal


def discounted(text, multimodal, encoder, workers):
    """(b): text / (multimodal − encoder / workers). encoder: seconds of all ranks together; workers: who could share them."""
    return text / (multimodal - encoder / workers)


def by_flops(text, multimodal, share):
    """(c): text · (1 + share) / multimodal. share: the encoder's operations / the backbone's, which come at one rate."""
    return text * (1 + share) / multimodal


def backbone_flops(config, length):
    """Operations of one token's forward pass through the backbone, as the modules compute it."""
    return sum(sum(unit_flops(config, unit, length)) for unit in [*range(config.num_hidden_layers), "head"])


def encoder_share(config, sizes, tokens, length):
    """The encoder's operations / the backbone's, in one forward pass. sizes: patches of each item; tokens: of the backbone."""
    return sum(size * vision_flops(config, size) for size in sizes) / (tokens * backbone_flops(config, length))


PASSES = {"dep": 4, "stage0": 3}  # forward passes' worth of work of the encoder in one step; the backbone's is 3


def middle(values):
    """(median, lower quartile, upper quartile)."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * list(values)
    return median, low, high


def figures(layouts, samples, tables, workers, shares):
    """What a layout's timed steps come to. Each figure is (median, lower quartile, upper quartile) over the batches.

    layouts: {encoder: Layout}; samples: as `measure` returns them; tables: of the layouts; workers: {"core": R,
    "wall": cores that there are for the ranks}; shares: {batch: encoder_share}.
    Returns {encoder: {"core" | "wall": {"text", "multimodal", "raw", "discounted", "by_flops"}, "encoder": …}}.
    """
    found = {}
    for encoder, layout in layouts.items():
        mine = {(s["batch"], s["kind"]): [Phases(**p) for p in s["ranks"]] for s in samples if s["encoder"] == encoder and s["batch"] >= 0}
        batches = sorted({batch for batch, _ in mine})
        spent = {batch: sum(phases.encoder for phases in mine[batch, "multimodal"]) for batch in batches}
        found[encoder] = {"encoder": middle(list(spent.values()))}
        clocks = {"core": lambda ranks: one_core_each(layout, tables, ranks), "wall": lambda ranks: max(p.wall for p in ranks)}
        for clock, seconds in clocks.items():
            pairs = {batch: [seconds(mine[batch, kind]) for kind in KINDS] for batch in batches}
            found[encoder][clock] = {
                "text": middle([text for text, _ in pairs.values()]),
                "multimodal": middle([both for _, both in pairs.values()]),
                "raw": middle([raw(*pair) for pair in pairs.values()]),
                "discounted": middle([discounted(*pair, spent[batch], workers[clock]) for batch, pair in pairs.items()]),
                "by_flops": middle([by_flops(*pair, shares[batch] * PASSES[encoder] / 3) for batch, pair in pairs.items()]),
            }
    return found


# --------------------------------------------------------------------------------------------- imbalance


def contiguous(items, ranks):
    """Owners by place: the first share of the items goes to rank 0, and so on, whatever their sizes."""
    return [item * ranks // items for item in range(items)]


def imbalances(batches, ranks, dp):
    """Largest / mean patches per rank of one global batch, by who encodes: {"items", "patches", "dep", "contiguous", "stage0"}."""
    items = dep.share_out(batches, ranks, [number % dp for number in range(len(batches))])
    costs = [item.patches for item in items]
    owners = {"dep": [item.owner for item in items], "contiguous": contiguous(len(items), ranks), "stage0": [item.reader for item in items]}
    return {"items": len(items), "patches": costs} | {how: dep.imbalance(costs, owner, ranks) for how, owner in owners.items()}


ITEMS = (1, 2, 4, 8, 16, 32, 64)  # per rank


def by_items(bench):
    """Imbalance of random global batches of so many items per rank, without a model: {items: {"dep": [...], "contiguous": [...]}}."""
    found = {}
    for number in ITEMS:
        rng, found[number] = random.Random(f"{bench.seed}/{number} items"), {"dep": [], "contiguous": []}
        for _ in range(bench.draws):
            costs = [4 * math.prod(draw_size(rng, bench.spread)) for _ in range(number * bench.ranks)]
            for how, owners in (("dep", dep.partition(costs, bench.ranks)), ("contiguous", contiguous(len(costs), bench.ranks))):
                found[number][how].append(dep.imbalance(costs, owners, bench.ranks))
    return found


# ---------------------------------------------------------------------------------------------- report


def run(bench, command):
    """Draw, start the processes, measure and reckon. Returns all of it as plain values, as dep_bench.json has it.

    Raises BenchError and ParallelError before anything is started.
    """
    layouts, config = bench.layouts(), model_config(bench)
    numbers = range(-1, bench.repeats + bench.memory_steps)
    batches = {number: global_batch(bench, number, "multimodal") for number in numbers}
    tokens = bench.global_microbatches * bench.rows * bench.length
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler announces itself otherwise
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # … and its allocator what was there before
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(work, (bench, folder), bench.ranks, start_method="forkserver")
        measured = json.loads((pathlib.Path(folder) / "measured.json").read_text(encoding="utf-8"))
    workers = {"core": bench.ranks, "wall": bench.ranks if bench.device == "cuda" else min(bench.ranks, os.cpu_count())}
    uneven = {dp: {n: imbalances(batches[n], bench.ranks, dp) for n in numbers} for dp in {both["dep"].dp for both in layouts}}
    sizes = {n: imbalances(batches[n], bench.ranks, 1)["patches"] for n in numbers}
    shares = {n: encoder_share(config, sizes[n], tokens, bench.length) for n in numbers}
    found = []
    for both, part in zip(layouts, measured):
        reckoned = figures(both, part["samples"], schedule_tables(both["dep"]), workers, shares)
        layers = [sum(isinstance(unit, int) for unit in units) for units in split_units(config.num_hidden_layers, both["dep"].pp)]
        found.append({"pp": both["dep"].pp, "dp": both["dep"].dp, "layers": layers, "figures": reckoned,
                      "imbalance": uneven[both["dep"].dp]} | part)  # fmt: skip
    return {"command": command, "settings": dataclasses.asdict(bench), "about": about(bench), "model": described(config, bench, shares),
            "drawn": drawn(bench, batches), "workers": workers, "layouts": found, "by_items": by_items(bench)}  # fmt: skip


def about(bench):
    """The machine and the versions, as plain values."""
    name = torch.cuda.get_device_name(0) if bench.device == "cuda" else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": f"{bench.device} ({name})", "cores": os.cpu_count(), "load": os.getloadavg()[0], "torch": torch.__version__,
            "python": platform.python_version()}  # fmt: skip


def described(config, bench, shares):
    """The model, and how its encoder compares with K2.5's, in operations of a forward pass."""
    released, ours = K25Config.preset("k2.5"), backbone_flops(config, bench.length)
    k25 = 0.10 * 4 * vision_flops(released, 1024) / backbone_flops(released, 4096)
    model = K25(config)
    return {"config": config.to_json(), "parameters": sum(p.numel() for p in model.parameters()), "backbone_flops": ours,
            "share": statistics.median(shares.values()), "share_k25": k25, "shares": shares}  # fmt: skip


def drawn(bench, batches):
    """What the distribution gave: shares, numbers and sizes over all steps of the run."""
    rows = [float(pads) / bench.length for step in batches.values() for batch in step
            for pads in (batch.ids == Tokenizer().media_pad).sum(dim=1)]  # fmt: skip
    micro = [sum(rows[at : at + bench.rows]) / bench.rows for at in range(0, len(rows), bench.rows)]
    grids = [batch.grid_thw for step in batches.values() for batch in step if batch.grid_thw is not None]
    patches = torch.cat(grids).prod(dim=1).tolist() if grids else [0]
    items = [sum(len(batch.grid_thw) for batch in step if batch.grid_thw is not None) for step in batches.values()]
    return {"vision_tokens": statistics.mean(rows), "rows_text_only": rows.count(0.0) / len(rows), "microbatch_most": max(micro),
            "items_per_step": [min(items), statistics.median(items), max(items)],
            "patches_per_item": [min(patches), statistics.median(patches), max(patches)]}  # fmt: skip


# ----------------------------------------------------------------------------------------- command line


def write(result, folder):
    """report.md, dep_bench.json and the plots."""
    write_file(folder / "dep_bench.json", json.dumps(result, indent=1) + "\n")
    plot_efficiency(result, folder / "efficiency.png")
    plot_memory(result, folder / "memory.png")
    plot_imbalance(result, folder / "imbalance.png")
    write_file(folder / "report.md", markdown(result))


def main(arguments=None):
    """The command line. Returns 0; 1 where the encoders compute different losses; 2, with one line, on misuse."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    cli = argparse.ArgumentParser(prog="dep-bench", description=__doc__.split("\n")[0])
    cli.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/dep-bench"), metavar="DIR")
    cli.add_argument("--quick", action="store_true", help="a smaller model, fewer and smaller steps")
    cli.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there are two devices")
    cli.add_argument("--ranks", type=int, help="processes; default: 4, on CUDA one per device")
    cli.add_argument("--pp", type=int, nargs="+", help="pipeline ranks of each layout; default: half of the ranks, and all")
    cli.add_argument("--text-only", type=float, default=Spread.text_only, metavar="SHARE", help="of the rows; 0: a picture in each")
    cli.add_argument("--layers", type=int, help="of the backbone")
    cli.add_argument("--repeats", type=int, help="timed steps of each side")
    cli.add_argument("--memory-steps", type=int, help="further steps whose peak memory is measured")
    cli.add_argument("--seed", type=int, default=0)
    options = cli.parse_args(arguments)
    try:
        bench = resolve(options)
        options.out.mkdir(parents=True, exist_ok=True)
        result = run(bench, " ".join(["python parallel.py dep-bench", *arguments]))
    except (BenchError, ParallelError, OSError) as error:
        print(f"dep-bench: {error}", file=sys.stderr)
        return 2
    write(result, options.out)
    print(markdown(result))
    if disagreement(result["layouts"]) > 1e-3:
        print("dep-bench: the encoders compute different losses, so the times mean nothing", file=sys.stderr)
        return 1
    return 0


def resolve(options):
    """The Bench that the command line asks for. Raises BenchError."""
    devices = torch.cuda.device_count()
    cuda = options.device == "cuda" or options.device == "auto" and devices > 1
    ranks = options.ranks if options.ranks is not None else devices if cuda else 4
    if ranks < 2 or cuda and ranks > devices:
        raise BenchError(f"{ranks} ranks: expected at least 2" + (f", and no more than the {devices} CUDA devices" if cuda else ""))
    asked = {"layers": options.layers, "repeats": options.repeats, "memory_steps": options.memory_steps}
    asked = (QUICK if options.quick else {}) | {name: number for name, number in asked.items() if number is not None}
    bench = Bench(ranks=ranks, pp=tuple(options.pp or sorted({ranks, ranks // 2} if ranks % 2 == 0 else {ranks})),
                  device="cuda" if cuda else "cpu", seed=options.seed, spread=Spread(text_only=options.text_only), **asked)  # fmt: skip
    bench = dataclasses.replace(bench, global_microbatches=max(bench.global_microbatches, ranks))
    if not 0 <= options.text_only < 1:
        raise BenchError(f"--text-only {options.text_only}: expected at least 0, and less than 1")
    if min(bench.layers, bench.repeats, bench.memory_steps) < 1:
        raise BenchError("--layers, --repeats and --memory-steps must be at least 1")
    bench.layouts()
    return bench


if __name__ == "__main__":
    sys.exit(main())
