"""How fast the default path is: beside a peer, beside its own references, and against what this machine can do at all.

    python oracle.py bench                      preset `small` on the CPU, beside transformers: about 5 minutes
    python oracle.py bench --quick              the same with shorter texts, in under one
    python oracle.py bench --device cuda        also one layer, decoding and the vision tower at the released size

Two sides of a pair have the same weights, dtype and threads, and run in turn, A B A B …; the ratio is that of their
medians. In the same turns run one matrix product and one copy, whose best rates so far are the machine's ceilings. With
FLOPs and bytes counted by roofline.py,

    share of the ceiling = max(flops / GEMM rate, bytes / copy rate) / seconds of our best turn

Both sides' results are compared before anything is timed. Where a target is missed, or ours is the slower side, a profile
says what it spends its time in.

Public names: BenchError, Disagreement, Entry, WORKLOADS, disagreement, interleave, Ceiling, measure, profile, run, plot,
add_arguments, main.     Tests: pytest tests/test_bench.py
"""

import dataclasses
import json
import math
import os
import pathlib
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from bench_cases import Workload, op_cases, peer_cases, released_cases
from checkpoint import write_file
from k25 import K25, K25Config, save
from peer import Peer, PeerError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest disagreement of two sides. Float32 is judged by its worst row; in bfloat16 near-ties of the router send some
# tokens to other experts, a difference of a quarter and no mistake: there the median row counts, for what it is worth.
AGREEMENT = {torch.float64: (1e-6, 1.0), torch.float32: (1e-4, 1.0), torch.bfloat16: (0.3, 0.5)}  # (bound, quantile)
WORKLOADS = {
    "full": Workload(),
    "quick": Workload(train=512, prefill=512, context=512, long_context=1024, steps=4, images=16, largest=8, op_tokens=256,
                      loop_tokens=32, gemm=768, copy=2**22, repeats=3),
}  # fmt: skip
ENOUGH = 1.0  # seconds for a pair of operations: as many turns as fit, from `repeats` to ten times as many
BLUE, ORANGE, GREY = "#3366aa", "#dd7722", "#999999"


class BenchError(ValueError):
    """Options with which nothing can be measured."""


class Disagreement(RuntimeError):
    """Two sides of a pair whose results are not the same: there is nothing to time."""


@dataclass(frozen=True)
class Entry:
    """What was measured of one case; written to bench.json as it is."""

    name: str
    what: str
    against: str
    seconds: float  # median of ours
    best_seconds: float  # of ours
    their_seconds: float | None
    ratio: float | None  # theirs / ours: above 1, ours is faster
    processor_ratio: float | None  # the same of processor time: steadier where other people's work runs beside; CPU only
    target: float | None
    flops: float
    bytes: float
    gemm_flops_per_s: float  # the machine's best so far
    copy_bytes_per_s: float
    bound: str  # "GEMM" | "copy": the ceiling that is nearer
    share: float  # of that ceiling, in our best turn
    disagreement: float | None  # of the results, see `disagreement`
    turns: int
    load: float  # of the machine over the last minute, other people's work included
    profile: tuple = ()  # (operation, share of our time), where the target was missed or ours is the slower side


def disagreement(ours, theirs, quantile=1.0):
    """How far two results are apart: over all rows (last dimensions), the `quantile` of max|a − b| / max|b| of its tensor.

    ours, theirs: tensors or nested sequences of them. Returns a float; infinite for other shapes or other than finite.
    """
    errors = []
    for a, b in zip(_tensors(ours), _tensors(theirs), strict=True):
        if a.shape != b.shape or not a.isfinite().all():
            return math.inf
        a, b = (x.detach().double().reshape(-1, x.shape[-1] if x.ndim else 1) for x in (a, b))
        errors.append((a - b).abs().amax(dim=1) / b.abs().max().clamp(min=1e-30))
    return float(torch.cat(errors).quantile(quantile)) if errors else 0.0


def _tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in _tensors(part)]


def interleave(sides, repeats, device):
    """Run every side once untimed, then all in turn, A B A B …: `repeats` times, and more often what takes milliseconds.

    sides: {name: callable}. Returns two {name: list of seconds}: by the clock, and of processor time, which leaves out
    the time that other people's work took from ours.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    clock, processor = {name: [] for name in sides}, {name: [] for name in sides}

    def turn():
        for name, side in sides.items():
            wait()
            begun, used = time.perf_counter(), time.process_time()
            side()
            wait()
            clock[name].append(time.perf_counter() - begun)
            processor[name].append(time.process_time() - used)

    turn()
    for _ in range(max(repeats, min(10 * repeats, int(ENOUGH / sum(first for (first,) in clock.values()))))):
        turn()
    return tuple({name: seconds[1:] for name, seconds in times.items()} for times in (clock, processor))


class Ceiling:
    """What the machine can do: the best rates of one matrix product and one copy, over all turns of the run."""

    def __init__(self, side, numbers, dtype, device):
        self.left, self.right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        self.source = torch.zeros(numbers, dtype=dtype, device=device)
        self.target = torch.empty_like(self.source)
        self.sides = {"GEMM": lambda: self.left @ self.right, "copy": lambda: self.target.copy_(self.source)}
        self.best = {name: math.inf for name in self.sides}
        self.hear(interleave(self.sides, 5, device)[0])

    def hear(self, seconds):
        """Take in what interleave measured."""
        self.best = {name: min(best, *seconds[name]) for name, best in self.best.items()}

    def rates(self):
        """FLOPs and bytes per second."""
        return 2 * len(self.left) ** 3 / self.best["GEMM"], 2 * self.source.nbytes / self.best["copy"]


def measure(case, ceiling, repeats, dtype, device):
    """Compare both sides of a case, then time them. Returns Entry. Raises Disagreement."""
    apart = None
    if case.theirs is not None:
        bound, quantile = AGREEMENT[dtype]
        apart = disagreement(case.ours(), case.theirs(), quantile)
        if not apart <= bound:
            raise Disagreement(f"{case.name}: ours and {case.against} differ by {apart:.1e} of the largest value, more "
                               f"than {bound:.0e}: the times would mean nothing")  # fmt: skip
    sides = {"ours": case.ours} | ({case.against: case.theirs} if case.theirs else {}) | ceiling.sides
    seconds, processor = interleave(sides, repeats, device)
    ours, best = statistics.median(seconds["ours"]), min(seconds["ours"])
    theirs = statistics.median(seconds[case.against]) if case.theirs else None
    ratio = theirs / ours if theirs else None
    by_processor = None
    if ratio and torch.device(device).type == "cpu":
        by_processor = statistics.median(processor[case.against]) / statistics.median(processor["ours"])
    slow = ratio is not None and ratio < (case.target or 1)
    ceiling.hear(seconds)
    gemm, copied = ceiling.rates()
    least = {"GEMM": case.work.flops / gemm, "copy": case.work.bytes / copied}
    bound = max(least, key=least.get)
    return Entry(case.name, case.what, case.against, ours, best, theirs, ratio, by_processor, case.target,
                 case.work.flops, case.work.bytes, gemm, copied, bound, least[bound] / best, apart, len(seconds["ours"]), os.getloadavg()[0],
                 profile(case.ours) if slow else ())  # fmt: skip


def profile(function, most=5):
    """The operations that a call spends its time in: ((name, share of all operations' own time), …), largest first."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler announces itself otherwise
    kinds, spent = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if torch.cuda.is_initialized():
        kinds, spent = [*kinds, torch.profiler.ProfilerActivity.CUDA], "self_device_time_total"
    with torch.profiler.profile(activities=kinds) as taken:
        function()
    rows = sorted(((getattr(row, spent), row.key) for row in taken.key_averages()), reverse=True)
    total = sum(own for own, _ in rows) or 1
    return tuple((name, own / total) for own, name in rows[:most])


def run(config, work, peer="transformers", device="cpu", dtype=torch.float32, out=None, released=None):
    """Measure everything and tell it line by line. Returns the list of Entry.

    config: K25Config; work: Workload; peer: "transformers" | "none"; out: directory of bench.json and bench.png, or
    None; released: iterable of further cases, as of released_cases, or None. Raises BenchError without a peer, and
    Disagreement.
    """
    torch.manual_seed(0)
    entries, about = [], machine(dtype, device)
    model = K25(config).to(device, dtype).eval()
    groups = [op_cases(config, work, dtype, device)] + ([released] if released else [])
    if peer == "transformers":
        other = open_peer(model, dtype, device)
        about["peer"] = {"version": other.version, "attention": other.text.config._attn_implementation,
                         "experts": other.text.config._experts_implementation}  # fmt: skip
        groups.insert(0, peer_cases(model, other.model, work))
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    ceiling = Ceiling(work.gemm, work.copy, dtype, device)
    with tqdm(unit="pair", dynamic_ncols=True) as bar:
        for cases in groups:
            for case in cases:
                bar.set_postfix_str(case.name)
                entry = measure(case, ceiling, work.repeats, dtype, device)
                entries.append(entry)
                tqdm.write(line(entry))
                bar.update()
    if out is not None:
        folder = pathlib.Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        report = {"machine": about, "workload": dataclasses.asdict(work), "entries": [dataclasses.asdict(e) for e in entries]}
        write_file(folder / "bench.json", json.dumps(report, indent=2) + "\n")
        plot(entries, folder / "bench.png", about)
    return entries


def open_peer(model, dtype, device):
    """transformers with a model's weights, by way of the released layout. Raises BenchError where it is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, pathlib.Path(folder) / "model")
        try:
            return Peer(pathlib.Path(folder) / "model", dtype, device)
        except PeerError as error:
            raise BenchError(f"{error}; the peer comes with the extra `test`: pip install '.[test]', or --peer none") from None


def machine(dtype, device):
    """What the figures depend on, as a dict of plain values."""
    cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": f"{device} ({name})", "threads": torch.get_num_threads(), "cores": os.cpu_count(),
            "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__, "python": platform.python_version(),
            "load": os.getloadavg()[0]}  # fmt: skip


def line(entry):
    """One entry as text; a second line where a target was missed."""
    told = f"{entry.name:18s} {_time(entry.seconds):>9s}"
    if entry.ratio is not None:
        told += f"   {entry.against} {_time(entry.their_seconds):>9s}   {entry.ratio:6.2f}x"
    if entry.processor_ratio is not None:
        told += f", {entry.processor_ratio:.2f}x by processor time"
    if entry.target is not None:
        told += f" (target {entry.target:g}{'' if entry.ratio >= entry.target else ', missed'})"
    told += f"   {entry.share:4.0%} of the {entry.bound} ceiling   {entry.what}"
    if entry.profile:
        told += "\n    our time: " + ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in entry.profile)
    return told


def _time(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def plot(entries, path, about):
    """Draw the ratios to each other side, with their targets, and the shares of the ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in ("transformers", "reference") if any(e.against == kind for e in entries)]
    heights = [sum(e.against == kind for e in entries) for kind in kinds] + [len(entries)]
    figure, panels = pyplot.subplots(len(heights), 1, figsize=(9, 2 + 0.27 * sum(heights)), height_ratios=heights,
                                     squeeze=False, layout="constrained")  # fmt: skip
    for panel, kind in zip(panels[:, 0], kinds):
        shown = [e for e in entries if e.against == kind][::-1]
        panel.barh([e.name for e in shown], [e.ratio - 1 for e in shown], left=1, color=BLUE, height=0.6)
        for row, e in enumerate(shown):
            panel.text(max(e.ratio, e.processor_ratio or 1, 1), row, f"  {e.ratio:.2f}x", fontsize=8, va="center")
        steadier = [(e.processor_ratio, row) for row, e in enumerate(shown) if e.processor_ratio]
        if steadier:
            panel.plot(*zip(*steadier), ".", color="black", markersize=5, label="by processor time")
        aims = [(e.target, row) for row, e in enumerate(shown) if e.target]
        if aims:
            panel.plot(*zip(*aims), "|", color=ORANGE, markersize=14, markeredgewidth=2.5, label="target")
        if aims or steadier:
            panel.legend(loc="lower right", fontsize=8)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.margins(x=0.12)
        panel.set_xlim(left=min(panel.get_xlim()[0], 0.9))
        ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if panel.get_xlim()[0] < tick < panel.get_xlim()[1]]
        panel.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel(f"how many times as fast as {kind if kind == 'transformers' else 'its reference'}")
    shown, panel = entries[::-1], panels[-1, 0]
    colours = [BLUE if e.bound == "GEMM" else GREY for e in shown]
    bars = panel.barh(range(len(shown)), [100 * e.share for e in shown], color=colours, height=0.6)
    panel.bar_label(bars, [f" {e.share:.0%} {e.bound}" for e in shown], fontsize=8)
    panel.set_yticks(range(len(shown)), [e.name for e in shown])
    panel.set(xlabel="% of the measured ceiling: matrix product (blue) or copy (grey)", xlim=(0, 115))
    for panel in panels[:, 0]:
        panel.grid(axis="x", alpha=0.3)
        panel.tick_params(axis="y", labelsize=8)
        panel.margins(y=0.02)
    figure.suptitle(f"{about['device']}, {about['dtype']}, {about['threads']} thread{'s' * (about['threads'] > 1)}, load {about['load']:.1f}", fontsize=10)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    os.replace(temporary, path)
    pyplot.close(figure)


def add_arguments(parser):
    """The arguments of `oracle.py bench`."""
    parser.add_argument("--peer", choices=("transformers", "none"), default="transformers", help="beside whom")
    parser.add_argument("--preset", default="small", help="the model: toy, small")
    parser.add_argument("--device", default="cpu", help="cuda adds what is measured at the released size")
    parser.add_argument("--dtype", choices=DTYPES, help="of both sides; default float32, on cuda bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU, of both sides; 0: all cores")
    parser.add_argument("--repeats", type=int, help="turns of each pair; default 5, with --quick 3")
    parser.add_argument("--quick", action="store_true", help="shorter texts, fewer turns")
    parser.add_argument("--out", default="runs/bench", metavar="DIR", help="where bench.json and bench.png go")


def main(options):
    """`oracle.py bench`. Returns 0, or 1 where two sides disagree. Raises BenchError on misuse."""
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise BenchError(f"device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    if (options.repeats is not None and options.repeats < 1) or options.threads < 0:
        raise BenchError(f"--repeats {options.repeats}, --threads {options.threads}: expected at least 1 and at least 0")
    cuda = torch.device(options.device).type == "cuda"
    dtype = DTYPES[options.dtype or ("bfloat16" if cuda else "float32")]
    work = WORKLOADS["quick" if options.quick else "full"]
    work = dataclasses.replace(work, repeats=options.repeats or work.repeats)
    if cuda:
        work = dataclasses.replace(work, gemm=8192, copy=2**29)
    released = released_cases(K25Config.preset("k2.5"), dtype, options.device) if cuda else None
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or os.cpu_count())
    try:
        run(K25Config.preset(options.preset), work, options.peer, options.device, dtype, options.out, released)
    except Disagreement as error:
        print(f"oracle.py bench: {error}")
        return 1
    finally:
        torch.set_num_threads(before)
    print(f"{options.out}/bench.json, {options.out}/bench.png")
    return 0
