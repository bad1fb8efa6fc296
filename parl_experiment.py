"""Does an orchestrator learn to work in parallel, and what does it gain? PARL at toy scale — K2.5 report 3, tables 6, figures 4, 7, 8.

Once, for all seeds: two frozen subagents (small, large) by SFT on single look-ups, and a cold start of the orchestrator by SFT on serial
work with 8 % of careless delegation (parl.py, lookups.py). From there each arm is RL with seeds of its own, over the same kinds of
questions, with the same budgets of critical steps:

    parl          r_perf + λ1·r_parallel + λ2·r_finish, λ annealed to 0; small subagents, in the last third large ones
    single        no delegation: every look-up by the agent itself
    no-parallel   λ1 = 0: serial collapse?          no-finish     λ2 = 0: spurious parallelism?         outcome   both 0
    shuffled      control: subagents look something else up         permuted   control: rewards of other episodes

Measured on held-out names, one sampled episode per question: item-F1, critical steps, total steps, subtasks; with bounds that no policy
learned: a perfect serial reader, and with the large subagents the best schedule and a random one. Then eight rows, where no episode
of training had more than seven (practice tables had up to eight); item-F1 against the budget, from which the critical steps and the
time on a virtual clock to reach 30 … 70 % follow; and a limit of context, with the report's three remedies for a single agent beside
the swarm.

Run: python train_small.py parl --run runs/parl

Public names: PARLConfig, ARMS, model_cell, subagent_cell, base_cell, start_cell, arm_cell, report, main.
Tests: pytest tests/test_parl_experiment.py
"""

import dataclasses
import json
import pathlib
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

import lookups
from checkpoint import write_file
from k25 import load, save
from parl import REMEDIES, SUB_STEPS, Frozen, PARLError, Shaping, SwarmEnvironment, answer_all, build, cold_start, lookup_documents
from parl import order_documents, reading_documents, schedule_all, score_lookups, table_documents
from rl import Learner, RLConfig, RLError
from rl_report import plot_arms
from rollout import derive
from sft import SFTConfig, SFTError, finetune
from study import StudyError, bootstrap, intervals, read_rows, run_cells, run_study
from swarm_trace import trace

ARMS = {
    "parl": Shaping(), "single": Shaping(0.0, 0.0), "no-parallel": Shaping(first=0.0), "no-finish": Shaping(second=0.0),
    "outcome": Shaping(0.0, 0.0), "shuffled": Shaping(shuffled=True), "permuted": Shaping(permuted=True),
}  # fmt: skip
WIDE, WIDER = (5, 6, 7), 8  # rows: as in training, and more
MEASURED = ("performance", "critical", "total", "given", "width", "finished", "parallel", "redundant", "refused", "time")  # of a Record
BUDGETS = (3, 4, 5, 6, 7, 9, 11, 13, 15, 17)  # critical steps
GOALS = (0.3, 0.4, 0.5, 0.6, 0.7)  # item-F1
CONTEXTS = (256, 384, 512)  # tokens
CAPACITY = 1024  # tokens of a conversation
LONGEST = 320  # tokens of an answer
PRACTICE = SFTConfig(rows=8, length=384, lr=6e-3, adamw_lr=4e-3)  # on short texts
EPISODES = SFTConfig(rows=6, length=768, lr=6e-3, adamw_lr=4e-3)  # on the cold start's; longer ones are left out
SINGLE = 300  # held-out look-ups by which subagents are measured
LOOKED = ("wide", "document", "download")  # kinds that can have more rows


@dataclass(frozen=True)
class PARLConfig:
    """The experiment; each field is a flag."""

    run: str = "runs/parl"
    arms: str = "parl,single,no-parallel,no-finish,outcome,shuffled,permuted"
    seeds: int = 5
    other_seeds: int = 5  # of the arms beside parl and single
    first_seed: int = 1  # seed 0 was used to choose the settings
    look_ups: int = 6000  # traces for the subagents
    practice: int = 6000  # tables for the orchestrator before its cold start, and half as many look-ups and orders each
    small_steps: int = 900  # of SFT
    large_steps: int = 1200
    traces: int = 8000  # of the cold start
    base_steps: int = 600  # of each of its stages, of the last one twice as many
    delegating: float = 0.08  # share of traces with careless delegation
    iterations: int = 30
    prompts: int = 12
    responses: int = 8
    pool: int = 192
    lr: float = 1.5e-3
    adamw_lr: float = 4.5e-4
    questions: int = 20  # held-out, of each kind
    workers: int = 2  # processes

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if f.type is int and f.name not in ("first_seed", "workers") and getattr(self, f.name) < 1:
                raise StudyError(f"{f.name} is {getattr(self, f.name)}: it must be at least 1")
        if unknown := [arm for arm in self.names() if arm not in ARMS]:
            raise StudyError(f"no arm {unknown[0]!r}: use some of {', '.join(ARMS)}")

    def names(self):
        """The arms."""
        return [name.strip() for name in self.arms.split(",") if name.strip()]

    def seeds_of(self, arm):
        """The seeds of an arm."""
        return range(self.first_seed, self.first_seed + (self.seeds if arm in ("parl", "single") else self.other_seeds))


def _tokenizer(folder):
    return lookups.vocabulary(folder / "vocabulary.tiktoken")


def _loaded(folder, name):
    return load(folder / "models" / name, dtype=torch.float32)


def _questions(number, rows=None, kinds=lookups.KINDS):
    """Held-out questions, the same for all seeds and arms."""
    return lookups.pool(number * len(kinds), "parl", kinds, "heldout", rows)


# ------------------------------------------------------------------------------------------------ cells


def model_cell(folder, name, log, **settings):
    """Train a subagent (small, large) or the cold start (base), once for all seeds."""
    return base_cell(folder, name, log, **settings) if name == "base" else subagent_cell(folder, name, log, **settings)


def _taught(model, documents, settings, tokenizer, log, **fields):
    """Fine-tune a model; a row of metrics per step."""
    began, tokens = time.perf_counter(), 0
    for step, result in enumerate(finetune(model, documents, settings, tokenizer, 0)):
        tokens += result.tokens
        log(step=step, loss=result.loss, tokens_per_s=tokens / (time.perf_counter() - began), **fields)


def subagent_cell(folder, name, log, steps, look_ups):
    """SFT on single look-ups; the model is never moved again."""
    tokenizer = _tokenizer(folder)
    model = build(name, tokenizer, 0)
    _taught(model, lookup_documents(look_ups, tokenizer, name), dataclasses.replace(PRACTICE, steps=steps), tokenizer, log)
    save(model, folder / "models" / name)
    frozen = Frozen(model, tokenizer)
    right, steps = score_lookups(frozen, SINGLE, tokenizer, 0)
    return {"right": right, "steps": steps, "digest": frozen.digest, "parameters": sum(p.numel() for p in model.parameters())}


def base_cell(folder, name, log, steps, practice, traces, delegating):
    """SFT on look-ups, orders and tables first, so that copying is learned on short texts; then on whole episodes; then, for longest, on
    episodes and on the reading of what subagents say."""
    tokenizer = _tokenizer(folder)
    short = [*lookup_documents(practice // 2, tokenizer, name), *order_documents(practice // 2, tokenizer, name), *table_documents(practice, tokenizer, name)]
    episodes, model = cold_start(traces, tokenizer, 0, delegating), build("orchestrator", tokenizer, 0)
    both = episodes + reading_documents(traces, tokenizer, 0)
    stages = (("practice", dataclasses.replace(PRACTICE, floor=0.5), short, 1), ("episodes", EPISODES, episodes, 1), ("reading", EPISODES, both, 2))
    for stage, t, documents, times in stages:
        fitting = [document for document in documents if len(document.ids) <= t.length]
        _taught(model, fitting, dataclasses.replace(t, steps=times * steps), tokenizer, log, stage=stage)
    save(model, folder / "models" / name)
    return {"parameters": sum(p.numel() for p in model.parameters())}


def start_cell(folder, name, log, questions):
    """What the cold start can, and bounds that no policy learned: scripts, with the large subagents."""
    tokenizer = _tokenizer(folder)
    frozen, asked = Frozen(_loaded(folder, "large"), tokenizer), _asked(questions)
    bounds = {"serial ceiling": (lookups.serial, None), "best schedule": (lookups.planned, frozen), "random schedule": (lookups.aimless, frozen)}
    found = {part: _records(_answers(_loaded(folder, "base"), frozen, those, tokenizer, 0)) for part, those in asked.items()}
    return found | {"bounds": {
        bound: {part: _records(schedule_all(writer, subagents, those, tokenizer, 0)) for part, those in asked.items()}
        for bound, (writer, subagents) in bounds.items()}}  # fmt: skip


def _asked(number):
    """The questions of both tables."""
    return {"heldout": _questions(number), "wider": _questions(number, WIDER, LOOKED)}


def _answers(model, frozen, questions, tokenizer, seed, **options):
    """Records of a model; options: of SwarmEnvironment."""
    return answer_all(model, SwarmEnvironment(frozen, **options), questions, tokenizer, seed, capacity=CAPACITY, max_new_tokens=LONGEST)


def _records(records):
    """What is kept of episodes: JSON, a list per field."""
    return {name: [getattr(record, name) for record in records] for name in ("kind", "status", *MEASURED)}


def arm_cell(folder, name, log, arm, seed, questions, iterations, pool, **settings):
    """RL of one arm from the cold start, then all measurements."""
    tokenizer, model, shaping = _tokenizer(folder), _loaded(folder, "base"), ARMS[arm]
    crew = {size: Frozen(_loaded(folder, size), tokenizer) for size in ("small", "large")} if arm != "single" else {}
    environment = SwarmEnvironment(crew.get("small"), shaping)
    t = RLConfig(slots=64, capacity=CAPACITY, max_new_tokens=LONGEST, minibatches=2, rows=4, **settings)
    with Learner(model, environment, lookups.pool(pool, f"{seed} pool"), tokenizer, t, derive(seed, "parl")) as learner:
        for iteration in range(iterations):
            environment.progress = iteration / iterations
            environment.frozen = crew.get("small" if iteration < 2 * iterations // 3 else "large")
            _, row = learner.iterate()
            records = environment.take()
            measured = {field: statistics.fmean(getattr(record, field) for record in records) for field in MEASURED}
            by_kind = {f"given {kind}": _mean(record.given for record in records if record.kind == kind) for kind in lookups.KINDS}
            log(**row, **measured, **by_kind)
    save(model, folder / "models" / name)

    def measured(asked, **options):
        return _records(_answers(model, crew.get("large"), asked, tokenizer, derive(seed, "measure"), **options))

    found = {part: measured(asked, shaping=dataclasses.replace(shaping, permuted=False)) for part, asked in _asked(questions).items()}
    if arm in ("parl", "single"):
        found["budgets"] = {str(steps): measured(_questions(questions, WIDER, ("wide",)), steps=steps) for steps in BUDGETS}
        found["contexts"] = {
            f"{remedy} {tokens}": measured(_questions(questions, max(WIDE), ("wide",)), steps=30, context=tokens, remedy=remedy)
            for remedy in (REMEDIES if arm == "single" else ("none",)) for tokens in CONTEXTS}  # fmt: skip
        _show(folder, name, model, crew.get("large"), tokenizer)
    return found | {"digests": {size: frozen.check() for size, frozen in crew.items()}}


def _show(folder, name, model, crew, tokenizer):
    """Pages to look into: an episode of each kind, as swarm_trace.py shows it."""
    events, asked = {}, _questions(1)
    _answers(model, crew, asked, tokenizer, 0, events=events)
    for question in asked:
        happened, record = events[question.key]
        path = folder / "samples" / f"{name}-{question.kind}.html"
        path.parent.mkdir(exist_ok=True)
        write_file(path, trace(happened, {"item-F1": record.performance, "virtual seconds": record.time}))


def _mean(values):
    values = list(values)
    return statistics.fmean(values) if values else float("nan")


# ----------------------------------------------------------------------------------------------- report


def report(folder, t, crew, base, arms):
    """Write report.md, summary.json and plots from the cells. Returns the lines of the first table."""
    folder, seeds = pathlib.Path(folder), range(t.first_seed, t.first_seed + t.seeds)
    table = lambda name, part, field: np.array([arms[f"{name}-{s}"][part][field] for s in t.seeds_of(name)], float)  # noqa: E731
    names, summary, tables = t.names(), {}, {}
    alike = t.seeds == t.other_seeds or not set(names) - {"parl", "single"}
    text = [
        "# PARL: learning to work in parallel", "",
        f"{t.seeds} seeds of RL{'' if alike else f' of parl and single, {t.other_seeds} of the others'}, {t.iterations} iterations of {t.prompts} questions × "
        f"{t.responses} responses, all from one cold start (so that intervals say nothing of other cold starts); held-out names of "
        "the rows, one sampled episode per question, temperature 1; 95 % intervals: bootstrap over seeds and questions. Chance, guessing a value: "
        "0.17 of the rows that are written down.", "",
        f"Frozen subagents: single look-ups right {crew['small']['right']:.2f} (small, {crew['small']['parameters']:,} parameters) and "
        f"{crew['large']['right']:.2f} (large, {crew['large']['parameters']:,}), {crew['small']['steps']:.1f} and {crew['large']['steps']:.1f} steps "
        f"of at most {SUB_STEPS}. Their hashes are the same before and after: {'yes' if _unmoved(crew, arms) else 'NO'}.", "",
    ]  # fmt: skip
    titles = {"heldout": "Held-out questions, rows as in training (table 6)", "wider": f"{WIDER} rows, more than in any episode of training"}
    for part, title in titles.items():
        rows, fixed = [], {"base": base[part]} | {bound: found[part] for bound, found in base["bounds"].items()}
        for name in (*fixed, *names):
            values = (lambda field: np.array([fixed[name][field]], float)) if name in fixed else (lambda field: table(name, part, field))  # noqa: B023
            found = {field: bootstrap(values(field)) for field in ("performance", "critical", "total", "given", "finished")}
            summary.setdefault(name, {})[part] = {field: dataclasses.asdict(value) for field, value in found.items()}
            means = " | ".join(f"{found[field].mean:.2f}" for field in ("critical", "total", "given", "finished"))
            rows.append(f"| {name} | {found['performance']} | {means} |")
        text += [f"## {title}", "", "| arm | item-F1 | critical steps | total steps | subtasks | r_finish |", "|---|---|---|---|---|---|", *rows, ""]
        text += _differences(part, base, table, names, summary)
        tables[part] = rows
    text += _by_kind(base, table, names)
    if {"parl", "single"} <= set(names):
        text += _times(folder, arms, seeds, summary) + _contexts(arms, seeds, summary)
    _curves(folder, t, names)
    score = lambda found: " / ".join(f"{np.mean(found['heldout'][field]):.2f}" for field in ("performance", "given"))  # noqa: E731
    cell = lambda name, s: score(arms[f"{name}-{s}"]) if s in t.seeds_of(name) else "–"  # noqa: E731
    text += ["## Over training (figure 4)", "", "![item-F1, subtasks, r_finish, critical and total steps](training.png)", "",
             "## By seed: item-F1 / subtasks, held-out", "", f"| seed | {' | '.join(names)} |", f"|---|{'---|' * len(names)}",
             *(f"| {s} | {' | '.join(cell(name, s) for name in names)} |" for s in sorted({s for name in names for s in t.seeds_of(name)})), "",
             "Episodes to look into, one of each kind per arm and seed, with every agent's context: samples/*.html.", "",
             "Settings: config.json; every step: cells/*.jsonl. Settings were chosen on seed 0, which is not among these.", ""]  # fmt: skip
    write_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_file(folder / "report.md", "\n".join(text))
    return tables["heldout"]


def _unmoved(crew, arms):
    return all(digest == crew[size]["digest"] for found in arms.values() for size, digest in found["digests"].items())


def _differences(part, base, table, names, summary):
    """What parl has more than the cold start and each other arm, on the same questions and the seeds that both have."""
    if "parl" not in names:
        return []
    lines = ["| parl less … | item-F1 | subtasks | r_finish |", "|---|---|---|---|"]
    for name in ("base", *(name for name in names if name != "parl")):
        found = {}
        for field in ("performance", "given", "finished"):
            ours = table("parl", part, field)
            theirs = np.array([base[part][field]] * len(ours), float) if name == "base" else table(name, part, field)
            shared = min(len(ours), len(theirs))
            found[field] = bootstrap(ours[:shared] - theirs[:shared])
        summary.setdefault(f"parl less {name}", {})[part] = {field: dataclasses.asdict(value) for field, value in found.items()}
        lines.append(f"| {name} | {' | '.join(map(str, found.values()))} |")
    return ["At the same budgets:", "", *lines, ""]


def _by_kind(base, table, names):
    """Item-F1 and subtasks by kind of question: where serial work is better, is nothing given away?"""
    kinds = base["heldout"]["kind"]
    lines = ["## By kind: item-F1 / subtasks", "", f"| kind | base | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for kind in lookups.KINDS:
        which = [place for place, other in enumerate(kinds) if other == kind]
        of = lambda field: [np.array([base["heldout"][field]], float)] + [table(name, "heldout", field) for name in names]  # noqa: E731
        cells = [f"{f1[:, which].mean():.2f} / {given[:, which].mean():.2f}" for f1, given in zip(of("performance"), of("given"))]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return [*lines, ""]


def _reached(goal, xs, ys):
    """The least x at which y reaches a goal, straight between the points, the first of them at the least; NaN where it never does."""
    if ys[0] >= goal:
        return xs[0]
    for (x0, y0), (x1, y1) in zip(zip(xs, ys), zip(xs[1:], ys[1:])):
        if y1 >= goal:
            return x0 + (x1 - x0) * (goal - y0) / (y1 - y0)
    return float("nan")


def _times(folder, arms, seeds, summary):
    """Figure 8: critical steps and virtual seconds to reach an item-F1."""
    curves, lines, found = {}, [], {}
    for name in ("parl", "single"):
        tables = np.array([[arms[f"{name}-{s}"]["budgets"][str(b)]["performance"] for s in seeds] for b in BUDGETS], float)  # (B,S,I)
        scores = tables.mean(2).T  # (S,B)
        clock = np.array([[np.mean(arms[f"{name}-{s}"]["budgets"][str(b)]["time"]) for b in BUDGETS] for s in seeds])
        found[name] = {what: np.array([[_reached(goal, xs, ys) for goal in GOALS] for xs, ys in zip(axis, scores)])
                       for what, axis in (("steps", np.tile(BUDGETS, (len(scores), 1))), ("seconds", clock))}  # fmt: skip
        curves[name] = intervals(BUDGETS, tables)
    found["ratio"] = {what: found["single"][what] / found["parl"][what] for what in ("steps", "seconds")}  # (S,G), by seed
    summary["times"] = {name: {what: _nan_free(values.mean(0)) for what, values in parts.items()} for name, parts in found.items()}
    summary["times"]["goals"] = GOALS
    for place, goal in enumerate(GOALS):
        cells = [f"{found[name][what][:, place].mean():.1f}" for what in ("steps", "seconds") for name in ("single", "parl")]
        ratios = [found["ratio"][what][:, place].mean() for what in ("steps", "seconds")]
        lines.append(f"| {goal:.0%} | {cells[0]} | {cells[1]} | {ratios[0]:.2f} | {cells[2]} | {cells[3]} | {ratios[1]:.2f} |")
    plot_arms({f"item-F1 against the budget of critical steps, {WIDER} rows": curves}, folder / "budgets.png")
    return [f"## Time to reach an item-F1, {WIDER} rows (figure 8)", "",
            "Each budget is a run of its own; the critical steps and the virtual seconds (0.02 s a token, 0.5 s a tool call) at which the mean "
            "item-F1 reaches the goal, means over seeds, ratios of each seed; – where a seed never does. The report claims 3 … 4.5 times "
            "faster, growing with the goal.", "",
            "| item-F1 | steps, single | steps, swarm | ratio | seconds, single | seconds, swarm | ratio |", "|---|---|---|---|---|---|---|",
            *(line.replace("nan", "–") for line in lines), "", "![item-F1 against the budget](budgets.png)", ""]  # fmt: skip


def _nan_free(values):
    return [None if value != value else float(value) for value in values]


def _contexts(arms, seeds, summary):
    """Figure 7: item-F1 under a limit of context."""
    of = lambda name, remedy, tokens: np.array([arms[f"{name}-{s}"]["contexts"][f"{remedy} {tokens}"]["performance"] for s in seeds], float)  # noqa: E731
    lines = []
    for name, remedy in (("parl", "none"), *(("single", remedy) for remedy in REMEDIES)):
        cells = [bootstrap(of(name, remedy, tokens)) for tokens in CONTEXTS]
        label = "swarm" if name == "parl" else f"single agent, {remedy}"
        summary[f"context, {label}"] = {tokens: dataclasses.asdict(cell) for tokens, cell in zip(CONTEXTS, cells)}
        lines.append(f"| {label} | {' | '.join(map(str, cells))} |")
    for remedy in REMEDIES:
        gaps = {tokens: bootstrap(of("parl", "none", tokens) - of("single", remedy, tokens)) for tokens in CONTEXTS}
        summary[f"context, swarm less {remedy}"] = {tokens: dataclasses.asdict(gap) for tokens, gap in gaps.items()}
    return [f"## A limit of context (figure 7): item-F1 on {max(WIDE)} rows, 30 critical steps", "",
            "The limit is of the orchestrator's or single agent's own conversation. When it is full, hide-tool-result goes on with older results "
            "blanked, discard-all with the question alone, summary with the question and the table that the agent writes at that point, which "
            "counts as no step. None of them was trained.", "",
            f"| who | {' | '.join(f'{tokens} tokens' for tokens in CONTEXTS)} |", f"|---|{'---|' * len(CONTEXTS)}", *lines, ""]  # fmt: skip


def _curves(folder, t, names):
    def band(name, key):
        curves = np.array([[row[key] for row in read_rows(folder, f"{name}-{s}")] for s in t.seeds_of(name)], float)  # (S,iterations)
        return intervals(range(curves.shape[1]), curves.T)

    panels = {"item-F1, training questions": "performance", "subtasks given away": "given", "r_finish": "finished",
              "critical steps": "critical", "total steps": "total"}  # fmt: skip
    plot_arms({title: {name: band(name, key) for name in names} for title, key in panels.items()}, folder / "training.png")


def _work(folder, t):
    _tokenizer(folder)
    cells = {"base": {"steps": t.base_steps, "traces": t.traces, "practice": t.practice, "delegating": t.delegating}}
    cells |= {size: {"steps": getattr(t, f"{size}_steps"), "look_ups": t.look_ups} for size in ("small", "large")}
    rows = {name: cell["steps"] * (4 if name == "base" else 1) for name, cell in cells.items()}
    models = run_cells(folder, cells, model_cell, rows, t.workers, "models")
    start = run_cells(folder, {"start": {"questions": t.questions}}, start_cell, {}, t.workers, "start")["start"]
    settings = {name: getattr(t, name) for name in ("questions", "iterations", "pool", "prompts", "responses", "lr", "adamw_lr")}
    cells = {f"{arm}-{s}": {"arm": arm, "seed": s} | settings for arm in t.names() for s in t.seeds_of(arm)}
    arms = run_cells(folder, cells, arm_cell, dict.fromkeys(cells, t.iterations), t.workers, "arms")
    return report(folder, t, models, start, arms)


def main(arguments=None):
    """Run what is missing, then write the report. Exit code 2 with one line on misuse."""
    run_study("parl", __doc__, PARLConfig, _work, (StudyError, RLError, SFTError, PARLError, OSError), arguments)


if __name__ == "__main__":
    main()
