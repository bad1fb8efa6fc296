"""How Agent Swarm scales: 1 to 100,000 subagents that cost nothing, and 100 of a real model in one batched engine — K2.5 report 3, E.8.

    python swarm.py bench                                 all of it: 8 minutes of a processor
    python swarm.py bench --largest 1000 --skip-live      the beginning, in one minute

**Null policy.** The orchestrator creates an agent and gives N subtasks away in its first answer; each subagent searches a small corpus
and answers with what it found; the orchestrator ends. All of it goes through the real Swarm with a slot for everybody, so that
N answers are under way at once. Each trial runs in a process of its own. Per N:

    tasks/s                 by the clock
    µs of a step            processor time / answers of everybody, 2N + 2
    overhead of a step      this less what the same calls of policy and tool take one after the other without the runtime (`plain`):
                            tasks, slots, time limits, budgets, checks, the log. `collector`: the part of Python's search for garbage
    kB of a task, resident  largest resident memory over that before, which says little below 1,000 tasks
    kB of a task, Python's  the most that Python held, by tracemalloc, in a run that is not timed, up to 10,000; events: the log's part

**Live.** Subagents of a model are sampled through policies.Local, two answers each at most. Side by side: all are given away in
one step, and the engine batches them. One after another: one in each step. What they say must be the same, token for token.

Public names: BenchError, Scripted, towers, subtasks, plain, play, timed, traced, on_disk, trial, TRIALS, measure, summarise, live, report, plot,
run, models, main.
Letters: none.     Tests: pytest tests/test_swarm_bench.py
"""

import argparse
import asyncio
import dataclasses
import gc
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from corpus import Corpus, Tools
from critical import critical_steps, total_steps
from policies import Local
from sandbox import resident_peak
from swarm import Limits, Slots, Swarm, rare_collections
from swarm_log import Log, episode
from template import Message, ToolCall

COUNTS = (1, 10, 100, 1_000, 10_000, 100_000)
DISK, TRACED = 1_000, 10_000  # subagents at most whose log is on the disk, each event flushed, and whose memory is traced: it takes long
ROUND = 1_000  # subtasks of a timed trial at least: small runs are repeated within it
FITTED = 100  # subagents from which on the exponent is fitted; below, what a run costs once counts
GOALS = {"kilobytes": 40, "speedup": 4.5}


class BenchError(ValueError):
    """Options with which nothing can be measured, or a measurement that failed."""


# ------------------------------------------------------------------------------------------- the work


def towers():
    """The corpus: 64 pages."""
    return Corpus.of({f"tower{n:02}.md": f"# A tower\nThe tower number{n:02} is {20 + n} metres high.\n" for n in range(64)})


def subtasks(count):
    """Prompts, all different."""
    return [f"height of number{n % 64:02}, measurement {n:06}" for n in range(count)]


def _called(number, name, /, **arguments):
    return ToolCall(f"functions.{name}:{number}", name, number, arguments, json.dumps(arguments))


class Scripted:
    """A policy that answers at once; one for each run.

    prompts: of the subtasks, which the orchestrator gives away `width` in a step, default all in one. A subagent searches for its
    prompt and answers with the first line that comes back. most: answers under way at once.
    """

    def __init__(self, prompts, width=None):
        self.prompts, self.width, self.given, self.now, self.most = prompts, width or len(prompts), 0, 0, 0

    def __str__(self):
        return "scripted"

    async def answer(self, messages, tools, agent):
        """The next Message."""
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)  # everybody else's turn
        self.now -= 1
        return self._main() if agent == "main" else self._sub(messages)

    def _main(self):
        first, self.given = self.given, min(self.given + self.width, len(self.prompts))
        calls = [] if first else [_called(0, "create_subagent", name="reader", system_prompt="You look one thing up.")]
        calls += [_called(n, "assign_task", agent="reader", prompt=self.prompts[n - 1]) for n in range(first + 1, self.given + 1)]
        return Message("", "", tuple(calls), ()) if self.given > first else Message("", "all is done", (), ())

    def _sub(self, messages):
        if len(messages) == 2:
            return Message("", "", (_called(0, "search", query=messages[1]["content"]),), ())
        return Message("", messages[-1]["content"].partition("\n")[0], (), ())


def plain(prompts, corpus):
    """The work of a run without the runtime: the same calls of policy and tool, one after the other. Returns what the subtasks return."""

    def value(coroutine):  # nobody else has a turn
        try:
            while True:
                coroutine.send(None)
        except StopIteration as end:
            return end.value

    policy, tools, texts = Scripted(prompts), Tools(corpus), []
    given = value(policy.answer([], tools.declarations, "main"))
    for call in given.tool_calls[1:]:
        messages = [{"role": "system", "content": "You look one thing up."}, {"role": "user", "content": call.arguments["prompt"]}]
        asked = value(policy.answer(messages, tools.declarations, str(call.index)))
        messages.append(asked.as_dict())
        for use in asked.tool_calls:
            messages.append({"role": "tool", "tool_call_id": use.id, "content": value(getattr(tools, use.name)(**use.arguments))})
        texts.append(value(policy.answer(messages, tools.declarations, str(call.index))).content)
    value(policy.answer([], tools.declarations, "main"))
    return texts


async def play(prompts, corpus, log, width=None, subpolicy=None):
    """The same through the runtime, with a slot for everybody. width: as of Scripted; subpolicy: of the subagents, default the same.

    Returns (the Swarm, what the subtasks return, most scripted answers at once). Raises BenchError unless the run ends as it should.
    """
    count, policy = len(prompts), Scripted(prompts, width)
    limits = Limits(main_steps=count + 1, sub_steps=2, critical_steps=3 * count + 1, tool_calls=3 * count + 1, agents=count, context=1 << 40)
    swarm = Swarm("What is to be measured?", policy, corpus, log, limits, subpolicy=subpolicy, slots=Slots(count + 1, 0.0))
    outcome = await swarm.run()
    if (outcome.status, len(swarm.results)) != ("done", count):
        raise BenchError(f"{count} subtasks: the run ended with {len(swarm.results)} results, {outcome.status} {outcome.why}".rstrip())
    return swarm, [swarm.results[task]["text"] for task in range(1, count + 1)], policy.most


# -------------------------------------------------------------------------------------------- null policy


class _Collector:
    """Processor seconds that the search for circular garbage takes, added up in `seconds` inside a `with`."""

    def __enter__(self):
        self.seconds, self._begun = 0.0, 0.0
        gc.callbacks.append(self._heard)
        return self

    def __exit__(self, *_):
        gc.callbacks.remove(self._heard)

    def _heard(self, phase, info):
        if phase == "start":
            self._begun = time.process_time()
        else:
            self.seconds += time.process_time() - self._begun


def timed(count):
    """Runs of `count` subtasks with the log in memory, and `plain`. Returns a dict: rounds, seconds, processor, collector, plain (seconds),
    resident (bytes of the first run), most (answers at once)."""
    corpus, prompts, rounds = towers(), subtasks(count), -(-ROUND // count)

    async def script():
        before = resident_peak()
        begun, used, resident = time.perf_counter(), time.process_time(), 0
        for number in range(rounds):
            _, texts, most = await play(prompts, corpus, Log(None))
            if not number:
                resident = resident_peak() - before
        return time.perf_counter() - begun, time.process_time() - used, resident, texts, most

    asyncio.run(play(prompts[:1], corpus, Log(None)))  # what is made once
    with rare_collections(), _Collector() as collector:
        seconds, processor, resident, texts, most = asyncio.run(script())
    used = time.process_time()
    for _ in range(rounds):
        expected = plain(prompts, corpus)
    used = time.process_time() - used
    if texts != expected or most != count:
        raise BenchError(f"{count} subtasks: {most} answers at once, and results are {'' if texts == expected else 'not '}those of plain calls")
    return {"rounds": rounds, "seconds": seconds, "processor": processor, "collector": collector.seconds, "plain": used, "resident": resident,
            "most": most}  # fmt: skip


def traced(count):
    """One run under tracemalloc. Returns a dict: peak, kept (bytes at the most, and of the log after it), events (their number)."""
    corpus, prompts, log = towers(), subtasks(count), Log(None)
    asyncio.run(play(prompts[:1], corpus, Log(None)))
    tracemalloc.start()
    asyncio.run(play(prompts, corpus, log))  # of which only the log stays
    gc.collect()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"peak": peak, "kept": kept, "events": len(log.events)}


def on_disk(count, folder):
    """One run whose log is below a folder, every event flushed. Returns a dict: seconds, events."""
    corpus, prompts = towers(), subtasks(count)
    with tempfile.TemporaryDirectory(dir=folder) as own, Log(pathlib.Path(own) / "events.jsonl") as log:
        begun = time.perf_counter()
        asyncio.run(play(prompts, corpus, log))
        return {"seconds": time.perf_counter() - begun, "events": len(log.events)}


TRIALS = {"traced": traced, "timed": timed, "disk": on_disk}


def trial(kind, count, *options):
    """One of TRIALS, in a process of its own. Raises BenchError when that dies."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(TRIALS[kind], count, *options).result()
        except BrokenProcessPool:
            raise BenchError(f"{count} subtasks: the process died, as it does without memory; choose a smaller --largest") from None


def _trials(counts, repeats):
    once = [(kind, count) for kind, most in (("traced", TRACED), ("disk", DISK)) for count in counts if count <= most]
    return once + [("timed", count) for _ in range(repeats) for count in counts]


def measure(counts, repeats, folder, bar):
    """All trials: once traced, up to TRACED, and with the log below a folder, up to DISK; then `repeats` times timed, in turn. bar: of tqdm.

    Returns {count: {kind: list of what its trials return}}.
    """
    found = {count: {kind: [] for kind in TRIALS} for count in counts}
    for kind, count in _trials(counts, repeats):
        bar.set_postfix_str(f"{count:,} subagents, {kind}")
        found[count][kind].append(trial(kind, count, *([folder] if kind == "disk" else [])))
        bar.update()
    return found


MEASURES = ("tasks/s", "step", "plain", "overhead", "collector", "resident")


def summarise(found):
    """What swarm_bench.json says of the null policy: points with medians and their samples, and the fit of the overhead."""
    points = []
    for count, kinds in found.items():
        rows = []
        for raw in kinds["timed"]:
            steps = raw["rounds"] * (2 * count + 2) / 1e6  # in millions, for µs
            rows.append({"tasks/s": raw["rounds"] * count / raw["seconds"], "step": raw["processor"] / steps, "plain": raw["plain"] / steps,
                         "overhead": (raw["processor"] - raw["plain"]) / steps, "collector": raw["collector"] / steps,
                         "resident": raw["resident"] / count / 1e3})  # fmt: skip
        samples = {key: [row[key] for row in rows] for key in MEASURES}
        points.append({"count": count, "most": kinds["timed"][0]["most"], "samples": samples,
                       "median": {key: statistics.median(values) for key, values in samples.items()},
                       "python": [raw["peak"] / count / 1e3 for raw in kinds["traced"]],
                       "events": [raw["kept"] / count / 1e3 for raw in kinds["traced"]],
                       "disk": [count / raw["seconds"] for raw in kinds["disk"]], "raw": kinds})  # fmt: skip
    return {"points": points, "fit": _fit(points)}


def _fit(points):
    """The exponent of overhead over agents as a dict; None with fewer than two points."""
    from scale_bench import fit

    taken = [p for p in points if p["count"] >= FITTED]
    taken = taken if len(taken) > 1 else points
    if len(taken) < 2:
        return None
    return dataclasses.asdict(fit([p["count"] for p in taken], [p["median"]["overhead"] for p in taken])) | {"from": taken[0]["count"]}


# -------------------------------------------------------------------------------------------------- live


def live(model, name, agents=100, new_tokens=48, repeats=3, seed=0, bar=None):
    """Subagents of a K25 side by side and one after another, in turn. name: of the model; bar: of tqdm.

    Returns a dict: seconds and processor (lists of each way), their medians and ratios, tokens, steps (critical and in all), same (every
    token and log-prob was the same in all). Raises BenchError when one was not.
    """
    from engine import Engine
    from rollout import Handle, RolloutManager, Sampling
    from tokenizer import Tokenizer

    corpus, prompts = towers(), subtasks(agents)
    ways = {"side by side": None, "one after another": 1}  # subtasks of a step
    spent, steps, said = {clock: {way: [] for way in ways} for clock in ("seconds", "processor")}, {}, []

    def speak(width):
        engine = Engine(model, agents, 512)
        manager = RolloutManager(engine, None, Tokenizer(engine.model.vocab_size), Sampling(new_tokens))
        sub, log = Local(Handle(manager, "swarm", seed, 0, 0), declare=False), Log(None)
        begun, used = time.perf_counter(), time.process_time()
        asyncio.run(play(prompts, corpus, log, width, sub))
        return time.perf_counter() - begun, time.process_time() - used, log.events

    for _ in range(repeats):
        for way, width in ways.items():
            if bar:
                bar.set_postfix_str(f"{name}, {way}")
            seconds, processor, events = speak(width)
            spent["seconds"][way].append(seconds)
            spent["processor"][way].append(processor)
            steps[way] = {"critical": critical_steps(episode(events)), "all": total_steps(episode(events))}
            said.append({(e["agent"], e["step"]): e["message"]["sampled"] for e in events if e["kind"] == "answer" and e["agent"] != "main"})
            if bar:
                bar.update()
    if any(other != said[0] for other in said):
        raise BenchError(f"{name}: subagents did not say the same side by side and one after another")
    medians = {clock: {way: statistics.median(values) for way, values in each.items()} for clock, each in spent.items()}
    ratios = {clock: each["one after another"] / each["side by side"] for clock, each in medians.items()}
    return {"model": name, "agents": agents, "new_tokens": new_tokens, "answers": len(said[0]),
            "tokens": sum(len(each["ids"]) for each in said[0].values()), "steps": steps, "same": True, "median": medians, "ratio": ratios,
            **spent}  # fmt: skip


# ------------------------------------------------------------------------------------------------ report


def _judged(reached):
    return "reached" if reached else "**missed**"


def report(told):
    """What swarm_bench.json says, as Markdown."""
    about, points, f = told["about"], told["null"]["points"], told["null"]["fit"]
    last = points[-1]
    lines = ["# How Agent Swarm scales", "",
             f"{about['device']}, {about['cores']} cores, Python {about['python']}, load {about['load_before']:.1f} before and "
             f"{about['load_after']:.1f} after; medians of {about['repeats']} interleaved repeats (least … most). One process, one thread.", "",
             "## A policy that computes nothing", "",
             "| subagents at once | tasks/s | µs of a step | of these without the runtime | overhead of a step, µs | of it collector | "
             "kB of a task, resident | kB, Python's | events | tasks/s, log on disk |", "|---" * 10 + "|"]  # fmt: skip
    for p in points:
        values, m = p["samples"], p["median"]
        python, events, disk = (f"{p[key][0]:,.{digits}f}" if p[key] else "" for key, digits in (("python", 1), ("events", 1), ("disk", 0)))
        lines.append(f"| {p['count']:,} | {m['tasks/s']:,.0f} ({min(values['tasks/s']):,.0f} … {max(values['tasks/s']):,.0f}) | {m['step']:.1f} | "
                     f"{m['plain']:.1f} | {m['overhead']:.1f} ({min(values['overhead']):.1f} … {max(values['overhead']):.1f}) | "
                     f"{m['collector']:.1f} | {m['resident']:.1f} | {python} | {events} | {disk} |")  # fmt: skip
    lines += ["", f"Memory of a task: {last['median']['resident']:.1f} kB resident at {last['count']:,}; to reach: less than "
              f"{GOALS['kilobytes']}, {_judged(last['median']['resident'] < GOALS['kilobytes'])}.", ""]  # fmt: skip
    if f:
        interval = "" if f["low"] is None else f" (95 %: {f['low']:+.3f} … {f['high']:+.3f})"
        judged = "" if f["low"] is None else f"; to reach: no growth, {_judged(f['low'] <= 0)}"
        lines += [f"Overhead of a step ∝ agents^{f['exponent']:+.3f}{interval}, {f['points']} points from {f['from']:,} on{judged}.", ""]
    lines += ["![tasks per second, memory and overhead over the number of agents](scale.png)"]
    if rows := told["live"]:
        lines += ["", "## A model", "", f"{rows[0]['agents']} subagents in one engine of as many slots, answers of at most "
                  f"{rows[0]['new_tokens']} tokens, tools not declared. The engine computes on one thread: what is gained is gained by batching.",
                  "",
                  "| model | answers | tokens of one | side by side, s | one after another, s | ratio | processor time, s | ratio | critical steps | "
                  "steps of all |", "|---" * 10 + "|"]  # fmt: skip
        for row in rows:
            spans = [f"{row['median']['seconds'][way]:.2f} ({min(values):.2f} … {max(values):.2f})" for way, values in row["seconds"].items()]
            processor = [f"{seconds:.2f}" for seconds in row["median"]["processor"].values()]
            steps = [" / ".join(f"{each[key]:,}" for each in row["steps"].values()) for key in ("critical", "all")]
            lines.append(f"| {row['model']} | {row['answers']} | {row['tokens'] / row['answers']:.1f} | {spans[0]} | {spans[1]} | "
                         f"{row['ratio']['seconds']:.2f}× | {' / '.join(processor)} | {row['ratio']['processor']:.2f}× | {steps[0]} | "
                         f"{steps[1]} |")  # fmt: skip
        lines += ["", f"Every token and log-prob was the same in both. To reach by the clock with {rows[0]['model']}: {GOALS['speedup']}×, "
                  f"{_judged(rows[0]['ratio']['seconds'] >= GOALS['speedup'])}. Where answers are short, most of the time goes into reading the "
                  "prompts, which side by side is as much work as one after another."]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(told, path):
    """Tasks per second, memory and overhead over the number of agents, log–log; and seconds of the live runs."""
    from rl_report import BLUE, GREY, ORANGE, plt, save_figure

    points, f, rows = told["null"]["points"], told["null"]["fit"], told["live"]
    figure, panels = plt.subplots(1, 3 + bool(rows), figsize=(4.6 * (3 + bool(rows)), 4.2), layout="constrained")
    counts = [p["count"] for p in points]

    def curve(panel, key, colour, label, marker="o-"):
        middle = [p["median"][key] for p in points]
        spread = [[m - min(p["samples"][key]) for m, p in zip(middle, points)], [max(p["samples"][key]) - m for m, p in zip(middle, points)]]
        panel.errorbar(counts, middle, yerr=spread, fmt=marker, color=colour, capsize=3, markersize=5, label=label)

    curve(panels[0], "tasks/s", BLUE, "log in memory")

    def once(panel, key, style, colour, label):
        panel.plot(*zip(*[(p["count"], p[key][0]) for p in points if p[key]]), style, color=colour, markersize=5, label=label)

    once(panels[0], "disk", "s--", GREY, "log on disk")
    panels[0].set(title="agent tasks per second", yscale="log")
    curve(panels[1], "overhead", BLUE, "overhead of the runtime")
    curve(panels[1], "plain", GREY, "the work itself")
    curve(panels[1], "collector", ORANGE, "of the overhead: collector", "o:")
    if f:
        taken = [n for n in counts if n >= f["from"]]
        panels[1].plot(taken, [f["factor"] * n ** f["exponent"] for n in taken], color="black", linewidth=1,
                       label=f"∝ agents^{f['exponent']:+.3f}")  # fmt: skip
    panels[1].set(title="processor time of an agent's step, µs")
    panels[1].set_ylim(bottom=0)
    large = [p for p in points if p["count"] >= 1000]  # below, resident memory comes in pieces larger than a run
    if large:
        panels[2].plot([p["count"] for p in large], [p["median"]["resident"] for p in large], "o-", color=BLUE, markersize=5, label="resident")
    once(panels[2], "python", "s--", ORANGE, "of Python's objects")
    once(panels[2], "events", "^:", GREY, "of these, events of the log")
    panels[2].axhline(GOALS["kilobytes"], color="black", linestyle=":", label=f"limit, {GOALS['kilobytes']} kB")
    panels[2].set(title="memory of a task at the peak, kB")
    panels[2].set_ylim(bottom=0)
    for panel in panels[:3]:
        panel.set(xscale="log", xlabel="subagents at once")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    if rows:
        for place, row in enumerate(rows):
            for shift, (way, colour) in enumerate((("one after another", GREY), ("side by side", BLUE))):
                bar = panels[3].bar(place + 0.4 * shift - 0.2, row["median"]["seconds"][way], 0.38, color=colour, label=None if place else way)
                panels[3].bar_label(bar, [f"{row['median']['seconds'][way]:.1f} s"])
        panels[3].set_xticks(range(len(rows)), [f"{row['model']}\n{row['ratio']['seconds']:.1f}×" for row in rows])
        panels[3].set(title=f"{rows[0]['agents']} subagents of a model, seconds")
        panels[3].margins(y=0.12)
        panels[3].legend(fontsize=8)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------ command line


def run(largest, repeats, models, out):
    """Measure and write report.md, swarm_bench.json and scale.png into a folder. models: {name: K25}. Raises BenchError."""
    from tqdm import tqdm

    from checkpoint import write_file

    counts, before = [*(n for n in COUNTS if n < largest), largest], os.getloadavg()[0]
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(_trials(counts, repeats)) + 2 * repeats * len(models), unit="trial", dynamic_ncols=True) as bar:
        null = summarise(measure(counts, repeats, out, bar))
        rows = [live(model, name, repeats=repeats, bar=bar) for name, model in models.items()]
    about = {"device": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(), "repeats": repeats, "load_before": before,
             "load_after": os.getloadavg()[0]}  # fmt: skip
    told = json.loads(json.dumps({"about": about, "goals": GOALS, "null": null, "live": rows}))  # what is printed is what is read back
    write_file(out / "swarm_bench.json", json.dumps(told, indent=1) + "\n")
    write_file(out / "report.md", report(told))
    plot(told, out / "scale.png")
    print(f"{report(told)}{out / 'report.md'}, {out / 'swarm_bench.json'}, {out / 'scale.png'}")


TOY = pathlib.Path("runs/toy/model")


def models(folder, skip):
    """{name: K25} to be measured live: preset toy with random weights, and a checkpoint; folder: None for that of the toy's run, if any."""
    if skip:
        return {}
    import torch

    from k25 import K25, K25Config, load

    torch.manual_seed(0)
    found = {"toy, random weights": K25(K25Config.preset("toy"))}
    if folder or TOY.is_dir():
        found[f"{folder or TOY}"] = load(folder or TOY)
    return found


def main(arguments=None):
    """The command line. Returns the exit code: 2 on misuse, 1 where a measurement failed."""
    cli = argparse.ArgumentParser(prog="swarm.py bench", description=__doc__.split("\n")[0])
    cli.add_argument("--largest", type=int, default=COUNTS[-1], metavar="N", help=f"the most subagents, default {COUNTS[-1]}")
    cli.add_argument("--repeats", type=int, default=3, help="of what is timed")
    cli.add_argument("--skip-live", action="store_true", help="without a model")
    cli.add_argument("--model", type=pathlib.Path, metavar="FOLDER", help=f"a checkpoint to be sampled as well, default {TOY} if it is there")
    cli.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/swarm-bench"), metavar="FOLDER")
    flags = cli.parse_args(arguments)
    try:
        if flags.largest < 1 or flags.repeats < 1:
            raise ValueError("--largest and --repeats must be at least 1")
        if flags.model and flags.skip_live:
            raise ValueError("--model is sampled live: leave --skip-live out")
        chosen = models(flags.model, flags.skip_live)
    except (ValueError, OSError) as error:
        print(f"swarm.py bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        run(flags.largest, flags.repeats, chosen, flags.out)
    except (ValueError, OSError) as error:  # of the bench, and of all that it plays through
        print(f"swarm.py bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
