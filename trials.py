"""Real training steps on a few processes of this machine, measured: what a rank holds at most, and when it does what.

planner.py says what both must be; here is what they are, and `check` puts one beside the other (python planner.py --check).
Processes are started once and lent to one measurement after another. Where there are more processes than cores, the clock
says little about a pipeline, so two things stand in for it:

    paced      every pass sleeps after its computation until it has taken a set time, far longer than the computation:
               ranks then wait for each other, not for a core
    processor  the processor time of every pass, put on paper in the order in which its rank really worked

Public names: TrialError, Settings, muon_clip, make_batches, Crew, build, MemoryTrial, memory_trial, Pass, pipeline_trial,
MemoryCase, MEMORY, MemoryRow, compare_memory, PipelineRow, compare_pipeline, check, compare, report.
Letters: B rows, T tokens.     Tests: pytest tests/test_trials.py
"""

import contextlib
import dataclasses
import datetime
import functools
import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import platform
import random
import shutil
import statistics
import tempfile
import time
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.pipelining import PipelineStage
from tqdm import tqdm

from checkpoint import write_file
from data import encode_example, pack_rows
from example import Example
from footprint import RECIPES, Store, fills, live_bytes, measure_peak
from k25 import K25, K25Config
from optim import MuonClip
from parallel import Layout, Place, Trainer, keep_units
from schedule import Span, Work, bubble, draw_spans, schedule_tables, simulate
from tokenizer import Tokenizer


class TrialError(RuntimeError):
    """A measurement that cannot be made; the message says which rank failed, and why."""


@dataclass(frozen=True)
class Settings:
    """Of train_small.TrainConfig, what one training step asks for."""

    dtype: str = "float32"
    recompute: str = "none"
    fp8: bool = False
    offload: bool = False
    clip_norm: float = 1.0
    qk_clip: float = 100.0
    balance_gamma: float = 0.002
    contrastive: float = 0.0


muon_clip = functools.partial(MuonClip.from_named, lr=6e-3, adamw_lr=4e-3, weight_decay=0.02, ns_dtype=torch.bfloat16)
BLOCK = 28  # pixels of one merged token, each way


def make_batches(config, count, rows, length, pictures=0, blocks=4, seed=0):
    """`count` microbatches of random letters and random pixels, every row full to its last token.

    pictures: in each microbatch, dealt to its rows in turn; blocks: their width and height in merged tokens. Returns a
    list of Batch. Raises TrialError when the pictures leave no room.
    """
    tokenizer, rng = Tokenizer(config.vocab_size), random.Random(seed)

    def text(size):
        return Example("".join(rng.choices("abcdefgh ", k=size)))

    def batch():
        documents = []
        for row in range(rows):
            room = length
            for _ in range(len(range(row, pictures, rows))):
                side = BLOCK * blocks
                image = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
                documents.append(encode_example(Example("<image>seen", (image,), modality="vision"), tokenizer, config.media))
                room -= len(documents[-1].ids)
            if room < 2:
                raise TrialError(f"{pictures} pictures of {blocks} × {blocks} tokens do not fit into {rows} rows of {length} tokens")
            documents.append(encode_example(text(room - 1), tokenizer, config.media))  # and its end
        return pack_rows(documents, rows, length, tokenizer)

    return [batch() for _ in range(count)]


# ------------------------------------------------------------------------------------------ processes


class Crew:
    """Processes that wait for work: many short measurements pay once for starting them.

    size: int; device: "cpu" (gloo) or "cuda" (NCCL, a device each); patience: seconds after which a measurement hangs.
    Use it in a `with`.
    """

    def __init__(self, size, device="cpu", patience=300):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the children's: the profiler warns of what it did not see begin
        self.patience, self.folder, self.done = patience, pathlib.Path(tempfile.mkdtemp()), 0
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once, not by each of them
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, its = context.Pipe()
            self.pipes.append(mine)
            self.processes.append(context.Process(target=_serve, args=(its, rank, device, patience), daemon=True))
            self.processes[-1].start()
            its.close()  # so that its end is seen here

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, function, world, *arguments):
        """Call a module's function on ranks 0 … world − 1, in a process group of them where there are several.

        Returns the list of results. Raises TrialError; the crew is then of no more use.
        """
        self.done += 1
        store, deadline = str(self.folder / str(self.done)), time.monotonic() + self.patience
        for pipe in self.pipes[:world]:
            pipe.send((function, world, store, arguments))
        results = [None] * world
        waiting = dict(enumerate(self.pipes[:world]))
        while waiting:
            if not multiprocessing.connection.wait(waiting.values(), max(deadline - time.monotonic(), 0)):
                raise TrialError(f"ranks {', '.join(map(str, waiting))} of {world} have not finished in {self.patience} s")
            for rank, pipe in [(rank, pipe) for rank, pipe in waiting.items() if pipe.poll()]:
                try:
                    failed, results[rank] = pipe.recv()
                except EOFError:
                    raise self._died(rank, world) from None
                if failed:
                    # One that died makes others fail, who may say so before its own end is seen.
                    ends = [process.sentinel for process in self.processes[:world]]
                    if ended := multiprocessing.connection.wait(ends, 2.0):
                        raise self._died(ends.index(ended[0]), world)
                    raise TrialError(f"rank {rank} of {world}: {results[rank]}")
                del waiting[rank]
        return results

    def _died(self, rank, world):
        self.processes[rank].join(30)  # until then it has no exit code
        return TrialError(f"rank {rank} of {world} died with exit code {self.processes[rank].exitcode}")


def _serve(pipe, rank, device, patience):
    """A crew member's life: work for one measurement at a time, until it is killed."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    while True:
        function, world, store, arguments = pipe.recv()
        try:
            if world > 1:
                dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.FileStore(store, world), rank=rank,
                                        world_size=world, timeout=datetime.timedelta(seconds=patience))  # fmt: skip
            result = function(*arguments)
            if world > 1:
                dist.barrier()  # whoever leaves while others still connect makes them fail
                dist.destroy_process_group()
            pipe.send((False, result))
        except Exception as error:  # whatever it is, the parent has to say it
            where = traceback.extract_tb(error.__traceback__)[-1]
            pipe.send((True, f"{type(error).__name__} in {where.name}: {str(error).splitlines()[0] if str(error) else ''}"))
        gc.collect()


def build(config, layout, settings, device="cpu", seed=0):
    """This process's Trainer of a random model; the process group is there. Returns Trainer."""
    place = Place(layout, device)
    torch.manual_seed(seed)
    model = keep_units(K25(config), place).to(place.device)
    return Trainer(model, muon_clip, settings, place)


# --------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class MemoryTrial:
    """What one rank of a real step holds, in bytes."""

    resident: int  # between two steps: weights, optimizer state, the pipeline's buffers
    backward: int  # at most until all gradients are summed
    update: int  # at most while it updates


def memory_trial(config, layout, settings, rows, length, pictures):
    """One rank's MemoryTrial of the second step; the first makes the optimizer's state and the pipeline's buffers.

    Each figure counts all tensors that are there before, and what torch's profiler sees allocated on top of them.
    """
    trainer = build(config, layout, settings)
    batches = make_batches(config, layout.dp * layout.microbatches, rows, length, pictures)
    trainer.step(batches)
    data = sum(t.nbytes for batch in batches for t in vars(batch).values() if t is not None)
    found = []
    for phase in (trainer.backward, trainer.update):
        gc.collect()
        found.append(live_bytes() - data)
        found.append(found[-1] + measure_peak(lambda: phase(batches)))
    return MemoryTrial(found[0], found[1], found[3])


# ------------------------------------------------------------------------------------------- pipeline


@dataclass(frozen=True)
class Pass:
    """A Span of a real pipeline."""

    span: Span  # seconds of the machine's clock, the same for all processes
    processor: float  # seconds of processor time


def pipeline_trial(config, layout, settings, rows, length, forward=(), backward=()):
    """One rank's list of Pass of one step's pipeline, after one step to warm up.

    forward, backward: seconds per stage that each pass is stretched to; () leaves them as they are.
    """
    trainer = build(config, layout, settings)
    batches = make_batches(config, layout.dp * layout.microbatches, rows, length)
    trainer.backward(batches)
    trainer.model.zero_grad(set_to_none=True)
    dist.barrier()
    with _watched(trainer.place.pp_rank, forward, backward) as passes:
        trainer.backward(batches)
    return passes


@contextlib.contextmanager
def _watched(rank, forward, backward):
    """While it is on, each pass of torch's pipeline stages is timed, and stretched. Yields the list of Pass."""
    passes = []

    def stretched(kind, run, seconds):
        def timed(stage, number, *arguments, **named):
            start, used = time.monotonic(), time.process_time()
            result = run(stage, number, *arguments, **named)
            used = time.process_time() - used
            if seconds:
                time.sleep(max(start + seconds[stage.stage_index] - time.monotonic(), 0))
            passes.append(Pass(Span(rank, Work(kind, stage.stage_index, number), start, time.monotonic()), used))
            return result

        return timed

    plain = PipelineStage.forward_one_chunk, PipelineStage.backward_one_chunk
    PipelineStage.forward_one_chunk = stretched("F", plain[0], forward)
    PipelineStage.backward_one_chunk = stretched("B", plain[1], backward)
    try:
        yield passes
    finally:
        PipelineStage.forward_one_chunk, PipelineStage.backward_one_chunk = plain


# ---------------------------------------------------------------------------- measured beside predicted

PATCHES = 4 * 4 * 4  # of the one picture in each microbatch: 4 × 4 embeddings of four patches each
BOUND = 0.1  # how far the memory model may be off


@dataclass(frozen=True)
class MemoryCase:
    """A layout, and how its step is taken."""

    layout: Layout
    settings: Settings = Settings()
    config: K25Config = K25Config.preset("toy")
    rows: int = 8
    length: int = 256

    def store(self):
        """The same as footprint.py says it."""
        recompute = () if self.settings.recompute == "none" else (self.settings.recompute,)
        return Store(recompute, self.settings.fp8, self.settings.offload)


# Offloading is not among them: the CPU's memory is the only one here.
_PP2, _SMALL = Layout(pp=2, microbatches=4), K25Config.preset("small")
MEMORY = {
    "toy": MemoryCase(_PP2),
    "toy, selective": MemoryCase(_PP2, Settings(recompute="selective")),
    "toy, selective, FP8": MemoryCase(_PP2, Settings(recompute="selective", fp8=True)),
    "toy, FP8": MemoryCase(_PP2, Settings(fp8=True)),
    "toy, blocks": MemoryCase(_PP2, Settings(recompute="block")),
    "toy, autocast": MemoryCase(_PP2, Settings("bfloat16")),
    "toy, virtual stages": MemoryCase(Layout(pp=2, virtual_stages=2, microbatches=4)),
    "toy, ep 2, ZeRO-1": MemoryCase(Layout(pp=2, ep=2, dp=2, microbatches=4, zero1=True)),
    "small": MemoryCase(Layout(pp=2, microbatches=2), Settings(), _SMALL, 2),
    "small, selective, FP8": MemoryCase(Layout(pp=2, microbatches=2), Settings(recompute="selective", fp8=True), _SMALL, 2),
    "small, blocks": MemoryCase(Layout(pp=2, microbatches=2), Settings(recompute="block"), _SMALL, 2),
}


@dataclass(frozen=True)
class MemoryRow:
    """One pipeline rank of a case: bytes (measured, predicted), of the fullest replica."""

    case: str
    rank: int
    resident: tuple  # between two steps
    backward: tuple  # at most until all gradients are summed
    update: tuple  # at most while it updates

    @property
    def off(self):
        """The larger of both peaks' relative errors, with its sign."""
        return max((predicted / measured - 1 for measured, predicted in (self.backward, self.update)), key=abs)


def compare_memory(crew, name, case):
    """Measure a MemoryCase. Returns one MemoryRow per pipeline rank."""
    layout = case.layout
    found = crew.run(memory_trial, layout.pp * layout.dp, case.config, layout, case.settings, case.rows, case.length, 1)
    rows = []
    for rank, f in enumerate(fills(case.config, layout, RECIPES[case.settings.dtype], case.rows, case.length, case.store(), PATCHES)):
        own = found[rank * layout.dp : (rank + 1) * layout.dp]
        before = max(f.at(moment) for moment in f.moments if moment != "optimizer")
        predicted = {"resident": f.stays - f.held.gradients, "backward": before, "update": f.at("optimizer")}
        both = {part: (max(getattr(trial, part) for trial in own), size) for part, size in predicted.items()}
        rows.append(MemoryRow(name, rank, **both))
    return rows


@dataclass(frozen=True)
class PipelineRow:
    """One layout and its set times. Bubbles are shares of all ranks' time."""

    layout: Layout
    forward: list  # seconds per stage that passes were stretched to
    backward: list
    measured: list  # bubble of each repeat
    seconds: list  # of each repeat
    replayed: list  # bubble of the tables run with the times that the passes of that repeat really took
    predicted: float  # bubble of the tables run with the set times: planner's
    predicted_seconds: float
    same_order: bool  # whether every rank worked in the tables' order, in all repeats
    processor: float  # bubble, from the processor time of every pass
    processor_predicted: float  # from each stage's median
    timelines: tuple  # measured (of the median repeat) and predicted: lists of Span


def compare_pipeline(crew, layout, forward, backward, repeats=3):
    """Measure the Trainer's pipeline on pp processes, paced and unpaced. forward, backward: seconds per stage. Returns PipelineRow."""
    config = dataclasses.replace(K25Config.preset("toy"), num_hidden_layers=2 * layout.stages - 2)  # two units in each stage
    tables, given = schedule_tables(layout), (config, layout, Settings(), 1, 64)
    timelines, replays, same = [], [], True
    for _ in range(repeats):
        spans = _timeline([each.span for each in sum(crew.run(pipeline_trial, layout.pp, *given, forward, backward), [])])
        timelines.append(spans)
        same = same and _order(spans) == tables
        replays.append(simulate(tables, *_durations(layout, {span.work: span.end - span.start for span in spans})))
    predicted = simulate(tables, forward, backward)
    passes = sum(crew.run(pipeline_trial, layout.pp, *given), [])
    used = _durations(layout, {each.span.work: each.processor for each in passes})
    medians = [[statistics.median(stage) for stage in kind] for kind in used]
    middle = sorted(timelines, key=bubble)[len(timelines) // 2]
    return PipelineRow(layout, forward, backward, [bubble(t) for t in timelines], [max(s.end for s in t) for t in timelines],
                       [bubble(t) for t in replays], bubble(predicted), max(s.end for s in predicted), same,
                       bubble(simulate(_order([each.span for each in passes]), *used)), bubble(simulate(tables, *medians)),
                       (middle, predicted))  # fmt: skip


def _timeline(spans):
    """Spans that begin at 0."""
    first = min(span.start for span in spans)
    return [dataclasses.replace(span, start=span.start - first, end=span.end - first) for span in spans]


def _order(spans):
    """{rank: its Work, as it came}."""
    return {rank: [s.work for s in sorted((s for s in spans if s.rank == rank), key=lambda s: s.start)]
            for rank in sorted({span.rank for span in spans})}  # fmt: skip


def _durations(layout, seconds):
    """{Work: seconds} as `simulate` takes it: of forward and backward passes, per stage a list over microbatches."""
    return [[[seconds[Work(kind, stage, number)] for number in range(layout.microbatches)] for stage in range(layout.stages)]
            for kind in "FB"]  # fmt: skip


def _even(layout, seconds=0.1):
    return layout, [seconds] * layout.stages, [2 * seconds] * layout.stages


def check(out, quick=False):
    """Measure memory and pipelines beside their predictions, and write `compare`'s files. quick: few of them. Returns its exit code."""
    one, two = Layout(pp=4, microbatches=4 if quick else 8), Layout(pp=4, virtual_stages=2, microbatches=4 if quick else 8)
    pipelines = [_even(one), _even(two, 0.05)]
    if not quick:  # the third stage twice as slow; the first half as slow, as where it has one layer less
        pipelines += [(one, [0.1, 0.1, 0.2, 0.1], [0.2, 0.2, 0.4, 0.2]), (two, [0.025] + [0.05] * 7, [0.05] + [0.1] * 7)]
    names = ("toy", "toy, selective, FP8") if quick else MEMORY
    with Crew(4, patience=600) as crew:
        return compare(crew, out, {name: MEMORY[name] for name in names}, pipelines, 1 if quick else 3)


def compare(crew, out, cases, pipelines, repeats):
    """Measure and write report.md, plan_check.json and timeline.png into `out`.

    cases: {name: MemoryCase}; pipelines: list of (Layout, forward, backward), of which the first two are drawn. Returns
    the exit code: 1 where a memory peak is more than 10 % off, or ranks work in another order than planned.
    """
    memory, rows = [], []
    with tqdm(total=len(cases) + len(pipelines), unit="trial", dynamic_ncols=True) as bar:
        for name, case in cases.items():
            bar.set_postfix_str(name)
            memory += compare_memory(crew, name, case)
            bar.update()
        for given in pipelines:
            bar.set_postfix_str(given[0].flags())
            rows.append(compare_pipeline(crew, *given, repeats=repeats))
            bar.update()
    told = {
        "about": {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "memory": [dataclasses.asdict(row) | {"off": row.off} for row in memory],
        "pipelines": [{key: value for key, value in dataclasses.asdict(row).items() if key != "timelines"} | {"flags": row.layout.flags()}
                      for row in rows],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "plan_check.json", json.dumps(told, indent=1) + "\n")
    write_file(out / "report.md", report(told))
    _plot(rows[:2], out / "timeline.png")
    print(report(told) + f"{out / 'report.md'}, {out / 'plan_check.json'}, {out / 'timeline.png'}")
    return 0 if all(abs(row.off) <= BOUND for row in memory) and all(row.same_order for row in rows) else 1


def report(told):
    """What plan_check.json says, as Markdown."""
    about, worst = told["about"], max(told["memory"], key=lambda row: abs(row["off"]))
    lines = [
        "# The plan beside the machine", "",
        f"torch {about['torch']}, Python {about['python']}, {about['cores']} cores, load {about['load']:.1f}; gloo, one thread per process.", "",
        "## Memory of a rank, MB: measured / predicted", "",
        f"Whole training steps. Measured are all tensors and what torch's profiler sees allocated; the largest error of a peak is "
        f"{worst['off']:+.1%} ({worst['case']}, rank {worst['rank']}), allowed are ±{BOUND:.0%}. Offloading cannot be measured where "
        "there is but one memory.", "",
        "| case | rank | between steps | until gradients are summed | while updating | error |", "|---|---|---|---|---|---|",
        *(f"| {row['case']} | {row['rank']} | " + " | ".join("{:.1f} / {:.1f}".format(*(size / 1e6 for size in row[part]))
                                                              for part in ("resident", "backward", "update"))
          + f" | {row['off']:+.1%} |" for row in told["memory"]), "",
        "## Bubble of four processes", "",
        "Paced: each pass sleeps until it has taken its set time, so that ranks wait for each other and not for a core. Predicted: the "
        "schedule's tables run with the set times; replayed: with the times that the passes really took, which other work on the machine "
        "lengthens. By processor: on paper, from the processor time of every pass without pacing, beside the prediction from each stage's median.", "",
        "| layout | ms forward | paced, measured | replayed | predicted | seconds, measured / predicted | order | by processor | predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in told["pipelines"]:
        lines.append(f"| {row['flags']} | {', '.join(f'{1e3 * s:.0f}' for s in row['forward'])} | {_range(row['measured'])} | {_range(row['replayed'])} | "
                     f"{row['predicted']:.1%} | {statistics.median(row['seconds']):.2f} / {row['predicted_seconds']:.2f} | "
                     f"{'as planned' if row['same_order'] else 'ANOTHER'} | {row['processor']:.1%} | {row['processor_predicted']:.1%} |")  # fmt: skip
    return "\n".join(lines) + "\n\n![measured above predicted](timeline.png)\n"


def _range(values):
    middle = f"{statistics.median(values):.1%}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1%} … {max(values):.1%})"


def _plot(rows, path):
    """Timelines, measured above predicted, of some layouts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2 * len(rows), 1, figsize=(16, 2.2 * 2 * len(rows)), layout="constrained")
    for row, pair in zip(rows, panels.reshape(-1, 2)):
        last = max(span.end for timeline in row.timelines for span in timeline)
        for panel, timeline, word in zip(pair, row.timelines, ("measured", "predicted")):
            draw_spans(panel, timeline, row.layout, 0.0, last)
            panel.set_title(f"{word}: {row.layout.flags()}, bubble {bubble(timeline):.1%}", loc="right", fontsize=9)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=100, format="png", metadata={"Software": None})
    os.replace(temporary, path)
    pyplot.close(figure)
