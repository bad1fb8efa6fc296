"""The report page: what is said of Kimi K2.5, measured here at toy scale, claim by claim.

    experiment (lab.Scale) → list of lab.Claim → claims.json beside its cells and plots
    claims.json of all experiments → report.md, report.html

Each experiment has a folder below --run, and goes on where it was interrupted; the towers that fusion starts from are trained in
`stages`. Those with a command of their own (zero-vision, transfer, toggle, parl, dep) are read from where that command left its
summary. What no toy can decide stands at the end, with the reason. The page is one file without network, dark and light, narrow enough for a phone.

Run: python train_small.py experiments [--only fusion,yarn] [--seeds 5] [--quick]

Public names: ExperimentsConfig, EXPERIMENTS, STAGES, PULLED, BEYOND, Result, run_experiment, kept, pull, markdown, page, main.
Tests: pytest tests/test_experiments.py
"""

import base64
import dataclasses
import html
import importlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from checkpoint import write_file
from lab import DIRECTION, NOT, REPLICATES, UNTESTABLE, VERDICTS, Claim, Scale, judge, judge_alike, worst
from parl import REMEDIES
from study import Estimate, StudyError, run_study, spent

EXPERIMENTS = {  # name to (module, function)
    "fusion": ("fusion", "fusion"), "moonvit3d": ("vision_claims", "moonvit3d"), "muonclip": ("training_claims", "muonclip"),
    "balance": ("training_claims", "balance"), "sparsity": ("training_claims", "sparsity"), "yarn": ("context_claims", "yarn"),
    "int4": ("context_claims", "int4"), "pixels": ("beside", "pixels"), "reading-order": ("beside", "reading_order"),
    "block-attention": ("beside", "block_attention"),
}  # fmt: skip
STAGES = {"fusion": "stages"}  # name to the folder of what is trained before it
PULLED = {  # name to (the folder that its command writes, the file in it)
    "zero-vision": ("runs/zero-vision", "summary.json"), "transfer": ("runs/transfer", "summary.json"),
    "toggle": ("runs/toggle", "summary.json"), "parl": ("runs/parl", "summary.json"), "dep": ("runs/dep-bench", "dep_bench.json"),
}  # fmt: skip


@dataclass(frozen=True)
class ExperimentsConfig:
    """The page; each field is a flag."""

    run: str = "runs/experiments"  # with --quick: runs/experiments-quick
    only: str = ""  # names of experiments, with commas between them; all others are left as they are
    seeds: int = 5
    first_seed: int = 1  # seed 0 was used to choose the settings
    quick: bool = False  # tiny sizes: shows that all of it runs, and nothing else
    workers: int = 2  # processes

    def __post_init__(self):
        if self.quick and self.run == ExperimentsConfig.run:
            object.__setattr__(self, "run", f"{self.run}-quick")
        if self.seeds < 1:
            raise StudyError(f"seeds is {self.seeds}: it must be at least 1")
        if unknown := [name for name in self.names() if name not in (*EXPERIMENTS, *PULLED)]:
            raise StudyError(f"no experiment {unknown[0]!r}: use some of {', '.join((*EXPERIMENTS, *PULLED))}")

    def names(self):
        """The experiments to run."""
        return [name.strip() for name in self.only.split(",") if name.strip()] or [*EXPERIMENTS, *PULLED]


@dataclass(frozen=True)
class Result:
    """The claims of one experiment, as they stand in its claims.json."""

    name: str
    claims: tuple  # of Claim
    command: str
    minutes: float | None  # of processor time of all its cells; None: not known
    seeds: int | None = None


# ----------------------------------------------------------------------------------------- run, or read


def run_experiment(name, scale):
    """Run an experiment and keep its claims. Returns Result."""
    module, function = EXPERIMENTS[name]
    claims = getattr(importlib.import_module(module), function)(scale)
    command = f"python train_small.py experiments --only {name}" + (" --quick" if scale.quick else "")
    minutes = [spent(scale.folder / part) for part in (name, STAGES.get(name)) if part]
    result = Result(name, tuple(claims), command, None if None in minutes else sum(minutes), len(scale.seeds))
    _keep(scale.folder, result)
    return result


def _keep(folder, result):
    write_file(folder / result.name / "claims.json", json.dumps(dataclasses.asdict(result), indent=2) + "\n")


def kept(folder):
    """The Results that stand in a folder, in the order of the page."""
    paths = [Path(folder) / name / "claims.json" for name in (*EXPERIMENTS, *PULLED)]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [Result(**(one | {"claims": tuple(Claim(**claim) for claim in one["claims"])})) for one in found]


def pull(name, folder, source=None):
    """Read an experiment that has a command of its own. source: its folder. Returns Result, or None where it has not been run.

    Raises StudyError where that command's file is cut or lacks a figure."""
    source = Path(source or PULLED[name][0])
    path = source / PULLED[name][1]
    if not path.exists():
        return None
    command = "python parallel.py dep-bench" if name == "dep" else f"python train_small.py {name}"
    try:
        claims = tuple(_READERS[name](json.loads(path.read_text())))
    except (ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise StudyError(f"{path} lacks what the page needs ({what}): make it again with `{command}`, or remove it") from error
    (folder / name).mkdir(parents=True, exist_ok=True)
    for claim in claims:
        if claim.plot and (source / claim.plot).exists():
            shutil.copyfile(source / claim.plot, folder / name / claim.plot)
    result = Result(name, claims, command, spent(source))
    _keep(folder, result)
    return result


def _estimate(values, times=1.0):
    low, mean, high = sorted((values["low"] * times, values["mean"] * times, values["high"] * times))
    return Estimate(mean, low, high)


def _points(estimate):
    """An estimate of a share, in percentage points."""
    return f"{100 * estimate.mean:+.1f} points [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def _signed(estimate):
    return f"{estimate.mean:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def _zero_vision(summary):
    tools = _estimate(summary["zero-vision"]["success with tools"])
    beyond = Estimate(*(getattr(tools, part) - summary["none"]["success with tools"]["high"] for part in ("mean", "low", "high")))
    gap = _estimate(summary["zero-vision less text+vision"])
    setup = "SFT of the toy on text-only tool traces, on text and picture traces, or not at all; held-out pictures, right with the interpreter"
    yield Claim("text-only SFT activates tools on pictures", "K2.5 report 2.2", "text data alone activate visual tool use", setup,
                f"success {tools}; without SFT {summary['none']['success with tools']['mean']:.3f}; files of another task "
                f"{summary['zero-vision']['success, shuffled pictures']['mean']:.3f}", judge(beyond), "kinds.png")  # fmt: skip
    yield Claim("text+vision SFT is worse than text alone", "K2.5 report 2.2", "in early experiments SFT with pictures did much worse", setup,
                f"zero-vision less text+vision {_points(gap)}", judge(gap))  # fmt: skip


def _transfer(summary):
    text, joint = _estimate(summary["vision"]["text, change"]), summary["joint less experts"]
    yield Claim("RL on pictures alone helps text", "K2.5 report 2.3, table 2", "MMLU-Pro 84.7 → 86.4, GPQA-Diamond 84.3 → 86.4, LongBench v2 56.7 → 58.9",
                "vision-only RL from zero-vision SFT; held-out text twins of the picture tasks", f"text {_points(text)}; pictures "
                f"{_points(_estimate(summary['vision']['vision, change']))}", judge(text), "reward.png")  # fmt: skip
    for modality in ("vision", "text"):
        gap = _estimate(joint[modality])
        yield Claim(f"joint RL keeps up with the {modality} expert", "K2.5 report 2.3", "RL by ability, not by modality, helps both",
                    "joint RL less the expert of one modality, on that modality's held-out tasks", _points(gap), judge_alike(gap, 0.05))  # fmt: skip


def _toggle(summary):
    fewer = _estimate(summary["toggle"]["tokens against plain's"], -1.0)
    gap = _estimate(summary["toggle"]["accuracy less plain's"])
    setup = "chains in words, a base that thinks in three styles, RL with Toggle against plain RL; held-out chains"
    yield Claim("Toggle uses 25 – 30 % fewer tokens", "K2.5 report 4.4.2", "output tokens −25 … −30 %", setup,
                f"tokens {-100 * fewer.mean:+.1f} % [{-100 * fewer.high:+.1f}, {-100 * fewer.low:+.1f}]", judge(fewer, 0.25), "arms.png")  # fmt: skip
    yield Claim("… at negligible loss", "K2.5 report 4.4.2", "performance almost unchanged", setup, f"accuracy {_points(gap)}", judge_alike(gap, 0.05))


def _parl(summary):
    setup = "a toy orchestrator trained by PARL with frozen subagents, against a single agent trained as long, at equal budgets of critical steps"
    less = lambda name, field, times=1.0, part="heldout": _estimate(summary[f"parl less {name}"][part][field], times)  # noqa: E731
    wide, more = less("single", "performance"), less("single", "performance", part="wider")
    truer, broader = less("base", "performance"), less("base", "given")
    yield Claim("the swarm is better than the single agent", "K2.5 report 5.3, table 6", "BrowseComp 60.6 → 78.4, WideSearch 72.7 → 79.0", setup,
                f"item-F1 {_points(wide)}; on eight rows {_points(more)}", judge(wide))  # fmt: skip
    yield Claim("accuracy and parallelism both rise", "K2.5 report 3, figure 4", "both rise smoothly over training",
                "the orchestrator after RL less its cold start, on held-out questions", f"item-F1 {_points(truer)}; subtasks {_signed(broader)}",
                worst(judge(truer), judge(broader)), "training.png")  # fmt: skip
    times = summary["times"]
    goals = list(zip(times["goals"], times["ratio"]["steps"], times["single"]["steps"], times["parl"]["steps"]))
    ratios, alone = [ratio for _, ratio, *_ in goals if ratio], [goal for goal, _, single, swarm in goals if swarm and not single]
    said = [f"{goal:.0%} {ratio:.2f} ×" for goal, ratio, *_ in goals if ratio] + [f"{goal:.0%} the swarm alone" for goal in alone]
    growing = len(ratios) > 1 and ratios == sorted(ratios) and ratios[-1] >= 3
    verdict = REPLICATES if growing else DIRECTION if alone or ratios and ratios[-1] > 1 else NOT
    yield Claim("3 … 4.5 times faster, growing with the goal", "K2.5 report 5.3, figure 8", "3× at 30 % item-F1 … 4.5× at 70 %", setup,
                f"critical steps to reach 30 … 70 % item-F1, single / swarm: {', '.join(said) or 'no goal is reached with every seed'}", verdict,
                "budgets.png")  # fmt: skip
    for title, says, arm, times in (
        ("without r_parallel all work stays serial", "r_parallel fights serial collapse", "no-parallel", 1.0),
        ("without r_finish work is given away for show", "r_finish fights spurious parallelism", "no-finish", -1.0)):  # fmt: skip
        gap, (full, without) = less(arm, "given", times), (summary[name]["heldout"]["given"]["mean"] for name in ("parl", arm))
        yield Claim(title, "K2.5 report 3", says, "PARL with all rewards, and without this one; subtasks on held-out questions",
                    f"subtasks with it {full:.2f}, without {without:.2f}: a difference of {_signed(gap)}", judge(gap))  # fmt: skip
    for remedy in REMEDIES:
        gaps = {tokens: _estimate(gap) for tokens, gap in summary[f"context, swarm less {remedy}"].items()}
        yield Claim(f"a divided context beats {'an undivided one' if remedy == 'none' else remedy}", "K2.5 report 5.3, figure 7", "subagents keep what they read in contexts of their own",
                    "item-F1 of the swarm less that of the single agent, where one conversation holds so many tokens",
                    ", ".join(f"{tokens}: {_points(gap)}" for tokens, gap in gaps.items()), worst(*map(judge, gaps.values())))  # fmt: skip


def _dep(summary):
    settings, layouts = summary["settings"], summary["layouts"]
    clock, words = ("wall", "wall clock") if settings["device"] == "cuda" else ("core", "one core per rank")
    middle, low, high = min((layout["figures"]["dep"][clock]["discounted"] for layout in layouts), key=lambda figures: figures[0])
    ranks = {2: "two", 4: "four", 8: "eight"}.get(settings["ranks"], settings["ranks"])
    named = " and ".join(f"pp {layout['pp']}" + (f" · dp {layout['dp']}" if layout["dp"] > 1 else "") for layout in layouts)
    chosen = {1: "", 2: "; the worse layout"}.get(len(layouts), "; the worst layout")
    verdict = REPLICATES if low >= 0.9 else DIRECTION if middle >= 0.9 else NOT
    yield Claim("DEP keeps 90 % of text-only efficiency", "K2.5 report 4.5", "multimodal training at 90 % of the efficiency of text-only training",
                f"{ranks} processes, {named}, the encoder's own time discounted, {words}{chosen}",
                f"{100 * middle:.1f} %, quartiles {100 * low:.1f} … {100 * high:.1f}", verdict, "efficiency.png")  # fmt: skip


_READERS = {"zero-vision": _zero_vision, "transfer": _transfer, "toggle": _toggle, "parl": _parl, "dep": _dep}

BEYOND = Result("beyond", tuple(Claim(title, source, says, why, "not run", UNTESTABLE) for title, source, says, why in (
    ("the scores themselves", "K2.5 report 5", "BrowseComp 78.4, WideSearch 79.0, MMLU-Pro 86.4, GPQA-Diamond 86.4, LongBench v2 58.9",
     "what is measured above are differences between toys; how high a toy scores says nothing of a model that knows the world"),
    ("a context of 262,144 tokens", "K2.5 report 4.3", "from 32,768 in two stages, by YaRN",
     "needles and perplexity are measured above, at multiples of a toy's own length"),
    ("which specialists to create is learned", "K2.5 report 3", "no role is given beforehand",
     "a toy's subagents know one trade, to look one thing up: there is nothing to choose between"),
    ("a hundred subagents and 1,500 calls for one question", "K2.5 report 3", "up to so many",
     "the runtime serves more (swarm.py bench), but a toy's questions have few rows to give away"),
)), "", None)  # fmt: skip


# ------------------------------------------------------------------------------------------------ pages


def markdown(results):
    """report.md. results: list of Result."""
    lines = ["# What is said of Kimi K2.5, measured at toy scale", "", _counts(results), "", "| claim | said | found | verdict |", "|---|---|---|---|"]
    lines += [f"| {claim.title} | {claim.says} | {claim.found} | **{claim.verdict}** |" for result in results for claim in result.claims]
    for result in results:
        lines += ["", f"## {result.name}"] + (["", f"    {result.command}", "", _effort(result)] if result.command else [])
        for claim in result.claims:
            lines += ["", f"**{claim.title}** ({claim.source}): {claim.says}.", "", f"- here: {claim.setup}", f"- found: {claim.found}",
                      f"- verdict: **{claim.verdict}**"]  # fmt: skip
            lines += ["", f"![{claim.title}]({result.name}/{claim.plot})"] if claim.plot else []
    return "\n".join([*lines, "", *_rules(), ""])


def _counts(results):
    tally = Counter(claim.verdict for result in results for claim in result.claims)
    return f"{sum(tally.values())} claims: {', '.join(f'{tally[verdict]} {verdict}' for verdict in VERDICTS if tally[verdict])}."


def _effort(result):
    said = [f"{result.seeds} seeds"] if result.seeds else []
    said += [f"{result.minutes:.0f} minutes of one processor"] if result.minutes is not None else []
    return ", ".join(said) or "Minutes were not kept."


def _rules():
    return ["A claim *replicates* when the 95 % interval of the difference excludes zero on its side and reaches the size that is claimed; with a "
            "mean on its side it is *direction only*. \"As good as\" replicates when the whole interval lies within the margin. The rule, the settings "
            "and the questions were fixed on seed 0, which is not among the seeds. A claim of several parts gets the worst of their verdicts. Four "
            "claims are judged otherwise. DEP: by the quartiles over the batches of one seed, seed 0, the lower of which must reach 90 %. "
            "Zero-vision: against the upper end of the interval without SFT, not paired. How much faster a swarm is: by the means of the seeds' "
            "ratios, two at least, which must grow with the goal and reach 3. QK-Clip: besides, the largest logit with it must stay below 2 τ "
            "with every seed. What no toy can decide is *not testable at this scale*."]  # fmt: skip


_STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf7; --card: #fff; --ink: #1d1d1f; --soft: #63636b; --line: #e2e0da; }
@media (prefers-color-scheme: dark) { :root { --ground: #16171a; --card: #202226; --ink: #ececec; --soft: #a2a2aa; --line: #35373d; } }
* { box-sizing: border-box; } body { margin: 0 auto; padding: 1.2rem; max-width: 60rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin: 2.2rem 0 .4rem; } a { color: inherit; }
.claim { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: .9rem 1.1rem; margin: .9rem 0; }
.claim h3 { margin: 0 0 .5rem; font-size: 1.05rem; } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem 1.4rem; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } } .label, .effort { color: var(--soft); font-size: .85rem; }
.verdict { border-radius: 1rem; padding: .1rem .7rem; font-size: .85rem; color: #fff; white-space: nowrap; }
.replicates { background: #1f7a4d; } .direction { background: #a86a00; } .not { background: #b03434; } .untestable { background: #63636b; }
img { max-width: 100%; margin-top: .7rem; border-radius: .5rem; background: #fff; } code { font-size: .9rem; }
nav a { display: inline-block; margin: 0 .8rem .3rem 0; }
"""
_CLASSES = {REPLICATES: "replicates", DIRECTION: "direction", NOT: "not", UNTESTABLE: "untestable"}


def page(results, folder):
    """report.html: one file, its plots within. folder: where the plots of each experiment lie, by its name."""
    said = html.escape
    parts = [f"<h1>What is said of Kimi K2.5, measured at toy scale</h1><p>{said(_counts(results))}</p>",
             "<nav>" + "".join(f'<a href="#{result.name}">{result.name}</a>' for result in results) + "</nav>"]  # fmt: skip
    for result in results:
        parts.append(f'<section id="{result.name}"><h2>{result.name}</h2>')
        parts += [f'<p class="effort"><code>{said(result.command)}</code><br>{_effort(result)}</p>'] if result.command else []
        for claim in result.claims:
            badge = f'<span class="verdict {_CLASSES[claim.verdict]}">{claim.verdict}</span>'
            parts.append(
                f'<article class="claim"><h3>{said(claim.title)} {badge}</h3><div class="pair">'
                f'<div><div class="label">said · {said(claim.source)}</div>{said(claim.says)}</div>'
                f'<div><div class="label">found here</div>{said(claim.found)}</div></div>'
                f'<p class="label">{said(claim.setup)}</p>{_image(Path(folder) / result.name / claim.plot, claim)}</article>')  # fmt: skip
        parts.append("</section>")
    parts += [f"<p class='label'>{said(line)}</p>" for line in _rules()]
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>K25: claims measured</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n")  # fmt: skip


def _image(path, claim):
    if not claim.plot:
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(claim.title)}" src="data:image/png;base64,{data}">'


# -------------------------------------------------------------------------------------------- the command


def _work(folder, t):
    scale = Scale(folder, tuple(range(t.first_seed, t.first_seed + t.seeds)), t.quick, t.workers)
    for name in t.names():
        if name in EXPERIMENTS:
            run_experiment(name, scale)
        elif pull(name, folder) is None:
            print(f"{name}: {PULLED[name][0]} holds no result yet; its own command makes it, see README")
        _write(folder)
    results = kept(folder)
    return [f"{claim.verdict:24} {result.name}: {claim.title}: {claim.found}" for result in results for claim in result.claims]


def _write(folder):
    results = [*kept(folder), BEYOND]
    write_file(folder / "report.md", markdown(results))
    write_file(folder / "report.html", page(results, folder))


def main(arguments=None):
    """Run or go on, then write the page. Exit code 2 with one line on misuse."""
    run_study("experiments", __doc__, ExperimentsConfig, _work, (StudyError, OSError), arguments)


if __name__ == "__main__":
    main()
