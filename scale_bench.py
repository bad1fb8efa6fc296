"""How speed and memory of real training steps grow: with ranks, experts, sequence length and pictures — K2.5 report 4.5.

    python parallel.py scale-bench               up to 4 processes on the CPU, or one per CUDA device: 5 minutes
    python parallel.py scale-bench --quick       fewer and smaller points, in under one

Every point is a whole optimizer step: parallel.Trainer on several processes (gloo, or NCCL on CUDA), step.train_step on
one. All points are measured in turn, A B C … A B C …, and their medians are drawn and fitted: y = a · x^exponent by least
squares of the logarithms, with Student's 95 % interval for the exponent, which therefore also says how badly a power law
describes the points.

    tokens/s                        by the clock; more processes than cores share them, and then it says little
    tokens per processor-second     over the processor time of all processes, waiting excluded: what parallelism costs.
                                    On CUDA instead per device-second, waiting included
    peak memory                     of the fullest rank: on the CPU all tensors that are there before a step, and what
                                    torch's profiler sees allocated on top during it; on CUDA max_memory_allocated

Public names: BenchError, Case, Scale, SCALES, sweeps, sample, Fit, fit, measure, summarise, report, plot, main.
Letters: B rows, T tokens, M microbatches.     Tests: pytest tests/test_scale_bench.py
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from scipy import stats
from tqdm import tqdm

from checkpoint import write_file
from footprint import live_bytes, measure_peak
from k25 import K25, K25Config
from parallel import Layout
from step import train_step
from trials import Crew, Settings, TrialError, build, make_batches, muon_clip


class BenchError(ValueError):
    """Options with which nothing can be measured."""


# ------------------------------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Case:
    """One step: how it is split, and what is in it."""

    layout: Layout
    rows: int  # of each microbatch
    length: int
    experts: int = 16
    pictures: int = 0  # in each microbatch

    @property
    def ranks(self):
        """Processes."""
        return self.layout.pp * self.layout.dp

    @property
    def tokens(self):
        """Of one step."""
        return self.layout.dp * self.layout.microbatches * self.rows * self.length


@dataclass(frozen=True)
class Scale:
    """How large the points are and how often they are measured; written to scale_bench.json."""

    layers: int = 6  # of preset toy: eight units, which 1, 2 and 4 pipeline ranks share evenly
    ranks: tuple = (1, 2, 4)
    experts: tuple = (4, 8, 16, 32, 64)  # of which each token uses two
    lengths: tuple = (64, 128, 256, 512, 1024)
    pictures: tuple = (0, 1, 2, 4, 8, 16, 32)
    microbatches: int = 8  # of the global batch that ranks share
    rows: int = 1  # of each of those, of `length` tokens
    length: int = 256
    batch: int = 1024  # tokens of a step in the other sweeps
    repeats: int = 5
    steps: int = 2  # timed in each repeat, after one that is not
    seed: int = 0
    settings: Settings = field(default_factory=Settings)

    def config(self, case):
        """The model of a case: K25Config."""
        return dataclasses.replace(K25Config.preset("toy"), num_hidden_layers=self.layers, n_routed_experts=case.experts)


SCALES = {
    "full": Scale(),
    "quick": Scale(ranks=(1, 2), experts=(4, 16, 64), lengths=(64, 256, 1024), pictures=(0, 2, 8, 32), microbatches=4, repeats=2, steps=1),
}  # fmt: skip


def sweeps(scale):
    """{name of a sweep: {x: Case}}. Global batch, tokens per step and expert width stay what they are along each of them."""
    m, shared = scale.microbatches, dict(rows=scale.rows, length=scale.length)
    one, rows = Layout(microbatches=m), scale.batch // scale.length

    def at(ranks, several):
        return {n: Case(one if n == 1 else several(n), **shared) for n in ranks}

    found = {
        "ranks, data parallel": at(scale.ranks, lambda n: Layout(dp=n, microbatches=m // n, zero1=True)),
        "ranks, expert parallel": at(scale.ranks, lambda n: Layout(dp=n, ep=n, microbatches=m // n, zero1=True)),
        "ranks, pipeline": at(scale.ranks, lambda n: Layout(pp=n, microbatches=m)),
        "experts": {n: Case(Layout(), rows, scale.length, n) for n in scale.experts},
        "tokens per sequence": {n: Case(Layout(), scale.batch // n, n) for n in scale.lengths},
        "pictures per batch": {n: Case(Layout(), rows, scale.length, pictures=n) for n in scale.pictures},
    }
    return {name: points for name, points in found.items() if len(points) > 1}


def sample(scale, case, device, memory):
    """One process's part of one repeat of a case: its timed steps, or instead (memory) its peak.

    Returns {"seconds": [...], "processor": [...], "optimizer": [...], "peak": bytes | None}; optimizer: of the processor's.
    """
    config, cuda = scale.config(case), device == "cuda"
    batches = make_batches(config, case.layout.dp * case.layout.microbatches, case.rows, case.length, case.pictures, seed=scale.seed)
    if dist.is_initialized():
        trainer = build(config, case.layout, scale.settings, device, scale.seed)
        optimizers, step = trainer.optimizers, lambda: trainer.step(batches)
    else:
        torch.manual_seed(scale.seed)
        model = K25(config).to(device)
        optimizer, moved = muon_clip(model.named_parameters()), [batch.to(device) for batch in batches]
        optimizers, step = [optimizer], lambda: train_step(model, optimizer, moved, scale.settings)
    inside = []  # processor seconds of each optimizer's part of a step
    for each in optimizers:
        each.register_step_pre_hook(lambda *_: inside.append(-time.process_time()))
        each.register_step_post_hook(lambda *_: inside.append(time.process_time()))
    step()
    gc.collect()
    told = {"seconds": [], "processor": [], "optimizer": [], "peak": None}
    if memory and not cuda:
        told["peak"] = live_bytes() + measure_peak(step)
        return told
    wait = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(scale.steps):
        inside.clear()
        wait()
        if dist.is_initialized():
            dist.barrier()
        begun, used = time.perf_counter(), time.process_time()
        step()
        wait()
        told["seconds"].append(time.perf_counter() - begun)
        told["processor"].append(time.process_time() - used)
        told["optimizer"].append(sum(inside))
    if cuda:
        told["peak"] = torch.cuda.max_memory_allocated()
    return told


def measure(scale, device="cpu"):
    """All cases of all sweeps in turn. Returns {Case: {"seconds", "processor", "optimizer": lists of one list per step over
    its ranks; "peak": list over ranks}}. Raises TrialError."""
    cases = list(dict.fromkeys(case for points in sweeps(scale).values() for case in points.values()))
    found = {case: {"seconds": [], "processor": [], "optimizer": [], "peak": None} for case in cases}
    turns = [False] * scale.repeats if device == "cuda" else [True] + [False] * scale.repeats  # memory is the same each time
    with Crew(max(case.ranks for case in cases), device, patience=600) as crew:
        with tqdm(total=len(turns) * len(cases), unit="trial", dynamic_ncols=True) as bar:
            for memory in turns:
                for case in cases:
                    bar.set_postfix_str(f"{case.ranks} rank{'s' * (case.ranks > 1)}, {case.rows} × {case.length}, {case.experts} experts")
                    ranks = crew.run(sample, case.ranks, scale, case, device, memory)
                    for what in ("seconds", "processor", "optimizer"):
                        found[case][what] += map(list, zip(*(told[what] for told in ranks)))
                    if ranks[0]["peak"] is not None:
                        found[case]["peak"] = [told["peak"] for told in ranks]
                    bar.update()
    return found


# --------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Fit:
    """y = a · x^exponent."""

    exponent: float
    low: float | None  # Student's 95 % interval; None where two points leave nothing to judge by
    high: float | None
    factor: float  # a
    points: int


def fit(xs, ys):
    """Least squares of log y over log x; the slope's standard error is √(Σ residual² / (n − 2) / Σ (log x − mean)²).

    xs, ys: positive numbers, at least two different x. Returns Fit.
    """
    x, y, n = [math.log(x) for x in xs], [math.log(y) for y in ys], len(xs)
    middle, height = sum(x) / n, sum(y) / n
    spread = sum((a - middle) ** 2 for a in x)
    slope = sum((a - middle) * (b - height) for a, b in zip(x, y)) / spread
    factor, reach = math.exp(height - slope * middle), None
    if n > 2:
        residuals = sum((b - height - slope * (a - middle)) ** 2 for a, b in zip(x, y))
        reach = float(stats.t.ppf(0.975, n - 2)) * math.sqrt(residuals / (n - 2) / spread)
    return Fit(slope, None if reach is None else slope - reach, None if reach is None else slope + reach, factor, n)


# What is fitted: its unit, and what it is in words.
MEASURES = {
    "clock": ("tokens/s", "by the clock"),
    "processor": ("tokens/s", "of processor time"),
    "peak": ("MB", "peak of the fullest rank"),
}


def samples_of(case, raw, device):
    """{measure: list of its samples} of a case, from what `measure` found."""
    if device == "cuda":
        spent = [max(step) * case.ranks for step in raw["seconds"]]
    else:
        spent = [sum(step) for step in raw["processor"]]
    return {"clock": [case.tokens / max(step) for step in raw["seconds"]], "processor": [case.tokens / each for each in spent],
            "peak": [max(raw["peak"]) / 1e6]}  # fmt: skip


def summarise(scale, found, device="cpu"):
    """What scale_bench.json says of each sweep: a list of dicts with its points, fits and one sentence."""
    told = []
    for name, cases in sweeps(scale).items():
        points = []
        for x, case in cases.items():
            raw, samples = found[case], samples_of(case, found[case], device)
            medians = {key: statistics.median(values) for key, values in samples.items()}
            share = sum(map(sum, raw["optimizer"])) / sum(map(sum, raw["processor"]))
            points.append({"x": x, "case": dataclasses.asdict(case), "tokens": case.tokens, "median": medians, "samples": samples,
                           "optimizer_share": share, "raw": raw})  # fmt: skip
        fitted = [point for point in points if point["x"] > 0]
        fits = {key: dataclasses.asdict(fit([p["x"] for p in fitted], [p["median"][key] for p in fitted])) for key in MEASURES}
        told.append({"sweep": name, "points": points, "fits": fits, "sentence": _sentence(name, points)})
    return told


def _sentence(name, points):
    """The sweep in words: what the last point has of the first one's."""
    first, last = points[0], points[-1]
    clock, processor, peak = (last["median"][key] / first["median"][key] for key in MEASURES)
    muon = f"the optimizer's part of the processor time goes from {first['optimizer_share']:.0%} to {last['optimizer_share']:.0%}"
    return (f"From {first['x']} to {last['x']} {name.split(',')[0]}{name.partition(',')[2] and ' (' + name.partition(', ')[2] + ')'}, "
            f"tokens/s become {clock:.2f} times as many, tokens per processor-second {processor:.2f} times, and the fullest rank holds "
            f"{peak:.2f} times the bytes; {muon}.")  # fmt: skip


def _exponent(f):
    """A fit in words, from the JSON."""
    interval = "no interval" if f["low"] is None else f"{f['low']:+.2f} … {f['high']:+.2f}"
    return f"{f['exponent']:+.2f} ({interval}; {f['points']} points)"


def report(told):
    """What scale_bench.json says, as Markdown."""
    about, scale = told["about"], told["scale"]
    cores, most = about["cores"], max(scale["ranks"])
    lines = [
        "# How training steps scale", "",
        f"{about['device']}, torch {about['torch']}, Python {about['python']}, {cores} cores, load {about['load_before']:.1f} before and "
        f"{about['load_after']:.1f} after; preset toy with {scale['layers']} layers, {scale['settings']['dtype']}, seed {scale['seed']}; "
        f"{scale['repeats']} interleaved repeats of {scale['steps']} timed steps, medians (least … most).", "",
    ]  # fmt: skip
    if about["device"].startswith("cpu"):
        shared = f"Up to {most} processes share {cores} cores, so beyond {cores} ranks the clock can show no gain" if most > cores else (
            f"Up to {most} processes have {cores} cores between them")
        lines += [f"{shared}; tokens per processor-second show what splitting a step costs. Memory: all tensors that are there before a "
                  "step, and what torch's profiler sees allocated on top of them."]  # fmt: skip
    else:
        lines += ["Tokens per processor-second are per device-second here. Memory: torch.cuda.max_memory_allocated."]
    for sweep in told["sweeps"]:
        lines += ["", f"## {sweep['sweep'][0].upper()}{sweep['sweep'][1:]}", "", sweep["sentence"], "",
                  f"| {sweep['sweep'].split(',')[0]} | tokens/s | tokens per processor-second | optimizer | peak of the fullest rank, MB |",
                  "|---|---|---|---|---|"]  # fmt: skip
        for p in sweep["points"]:
            lines.append(f"| {p['x']} | {_spread(p, 'clock')} | {_spread(p, 'processor')} | {p['optimizer_share']:.0%} | {p['median']['peak']:.1f} |")
        lines.append("| exponent | " + " | ".join((_exponent(sweep["fits"]["clock"]), _exponent(sweep["fits"]["processor"]), "",
                                                   _exponent(sweep["fits"]["peak"]))) + " |")  # fmt: skip
    return "\n".join(lines) + "\n\n![every sweep](scale_bench.png)\n"


def _spread(point, key):
    values = point["samples"][key]
    return f"{point['median'][key]:,.0f} ({min(values):,.0f} … {max(values):,.0f})"


COLOURS = {"ranks, data parallel": "#4477aa", "ranks, expert parallel": "#228833", "ranks, pipeline": "#cc6677"}


def plot(told, path):
    """A column per kind of sweep, a row per measure, log–log: points with their spread, the fitted line and its exponent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = {}
    for sweep in told["sweeps"]:
        columns.setdefault(sweep["sweep"].split(",")[0], []).append(sweep)
    figure, panels = pyplot.subplots(len(MEASURES), len(columns), figsize=(4.4 * len(columns), 10), squeeze=False, layout="constrained")
    for number, ((title, group), column) in enumerate(zip(columns.items(), panels.T)):
        for (key, (unit, words)), panel in zip(MEASURES.items(), column):
            for sweep in group:
                colour, fitted = COLOURS.get(sweep["sweep"], "#4477aa"), [p for p in sweep["points"] if p["x"] > 0]
                xs, f = [p["x"] for p in fitted], sweep["fits"][key]
                middle = [p["median"][key] for p in fitted]
                below = [m - min(p["samples"][key]) for m, p in zip(middle, fitted)]
                above = [max(p["samples"][key]) - m for m, p in zip(middle, fitted)]
                panel.errorbar(xs, middle, yerr=(below, above), fmt="o", color=colour, markersize=5, capsize=3)
                kind = sweep["sweep"].partition(", ")[2]
                panel.plot(xs, [f["factor"] * x ** f["exponent"] for x in xs], color=colour, alpha=0.6,
                           label=f"{kind + ': ' if kind else ''}exponent {f['exponent']:+.2f}"
                           + ("" if f["low"] is None else f" ({f['low']:+.2f} … {f['high']:+.2f})"))  # fmt: skip
                for p in sweep["points"]:
                    if p["x"] == 0:
                        panel.axhline(p["median"][key], color="grey", linestyle=":", label=f"no {title.split()[0]}")
            panel.set(xscale="log", yscale="log", xlabel=title, ylabel="" if number else f"{unit}, {words}")
            panel.margins(x=0.08)
            ticks = sorted({p["x"] for sweep in group for p in sweep["points"] if p["x"] > 0})
            panel.set_xticks(ticks, list(map(str, ticks)))
            panel.minorticks_off()
            low, high = panel.get_ylim()
            panel.set_ylim(low / 1.15, high * 1.45)  # room for the legend, and a flat line looks flat
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8, loc="upper left")
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=100, format="png", metadata={"Software": None})
    os.replace(temporary, path)
    pyplot.close(figure)


def main(arguments=None):
    """Measure, and write report.md, scale_bench.json and scale_bench.png. Returns the exit code: 2 on misuse, 1 where a measurement failed."""
    cli = argparse.ArgumentParser(prog="scale_bench.py", description=__doc__.split("\n")[0])
    cli.add_argument("--quick", action="store_true", help="fewer and smaller points, two repeats")
    cli.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    cli.add_argument("--ranks", type=int, help="the most ranks; default 4, with --quick 2, on CUDA as many as there are devices")
    cli.add_argument("--repeats", type=int, help="default 5, with --quick 2")
    cli.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: autocast over float32 weights")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/scale-bench"), metavar="DIR")
    options = cli.parse_args(arguments)
    scale = SCALES["quick" if options.quick else "full"]
    try:
        devices = torch.cuda.device_count() if options.device == "cuda" else os.cpu_count()
        if options.device == "cuda" and not devices:
            raise BenchError("--device cuda: there is none here")
        most = options.ranks or (min(max(scale.ranks), devices) if options.device == "cuda" else max(scale.ranks))
        if most < 1 or (options.device == "cuda" and most > devices):
            raise BenchError(f"--ranks {most}: choose 1 … {devices if options.device == 'cuda' else max(SCALES['full'].ranks)}")
        if options.repeats is not None and options.repeats < 1:
            raise BenchError(f"--repeats {options.repeats}: at least 1")
        ranks = tuple(n for n in SCALES["full"].ranks if n <= most)
        scale = dataclasses.replace(scale, ranks=ranks, repeats=options.repeats or scale.repeats, seed=options.seed, settings=Settings(options.dtype))
        run(scale, options.device, options.out)
    except BenchError as error:
        print(f"scale-bench: {error}", file=sys.stderr)
        return 2
    except TrialError as error:
        print(f"scale-bench: {error}", file=sys.stderr)
        return 1
    return 0


def run(scale, device, out):
    """Measure a Scale and write its three files into a directory. Raises TrialError."""
    before = os.getloadavg()[0]
    found = measure(scale, device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    about = {"device": f"{device} ({name})", "cores": os.cpu_count(), "threads": 1, "torch": torch.__version__,
             "python": platform.python_version(), "load_before": before, "load_after": os.getloadavg()[0]}  # fmt: skip
    told = {"about": about, "scale": dataclasses.asdict(scale), "sweeps": summarise(scale, found, device)}
    told = json.loads(json.dumps(told))  # what is printed is what is read back
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "scale_bench.json", json.dumps(told, indent=1) + "\n")
    write_file(out / "report.md", report(told))
    plot(told, out / "scale_bench.png")
    print(report(told) + f"{out / 'report.md'}, {out / 'scale_bench.json'}, {out / 'scale_bench.png'}")


if __name__ == "__main__":
    sys.exit(main())
