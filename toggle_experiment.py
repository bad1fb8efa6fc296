"""Does Toggle shorten without harm? Against plain RL, a rigid budget and a length penalty — K2.5 report 4.4.2.

Task: chains in words (tasks.py), `i5 j0 k3`: the last digit of a sum, one addition per label; needed length grows with the
level. A small decoder learns from traces to think in any of three styles, 2, 5 or 9 bytes an addition, most of them long, then RL
on levels 1–4 until it converges: the base. From there every arm goes on, with the same prompts, seeds and number of iterations:

    plain     the outcome alone
    toggle    the outcome, in every other phase only within the prompt's budget, where its accuracy is λ or more
    rigid     the outcome, always only within the budget
    penalty   the outcome and Kimi k1.5's length reward

Measured on held-out chains of levels 1–4, one sampled response each: accuracy, generated tokens. And, for the claim that a rigid
budget overfits to length: level 5, which RL never saw (traces did), under a cap of 1, 2 and 4 times the median budget.

Run: python train_small.py toggle --run runs/toggle

Public names: ToggleConfig, ARMS, MODEL, base, arm, report, main.     Tests: pytest tests/test_toggle_experiment.py
"""

import dataclasses
import json
import math
import pathlib
import time
from dataclasses import dataclass

import numpy as np
import torch

import traces
from checkpoint import write_file
from environment import Environment, Toolset
from interpreter import InterpreterPool
from k25 import load, save
from lab import decoder
from rl import Learner, RLConfig, RLError, sample_groups
from rl_job import draw_pool, measure
from rl_report import plot_arms
from rollout import Sampling, derive
from sft import SFTConfig, SFTError, finetune
from study import StudyError, bootstrap, intervals, read_rows, run_cells, run_study
from tokenizer import Tokenizer

ARMS = ("plain", "toggle", "rigid", "penalty")
CAPS = (1, 2, 4)  # times the median budget
TRAINED, HARDER = (1, 2, 3, 4), 5  # levels
ROOM = 192  # tokens of a conversation
LONGEST = 112  # of an answer
MODEL = {  # beside preset "toy": a small decoder
    "hidden_size": 96, "intermediate_size": 192, "moe_intermediate_size": 48, "num_hidden_layers": 2, "q_lora_rank": 48,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8,
}  # fmt: skip


@dataclass(frozen=True)
class ToggleConfig:
    """The experiment; each field is a flag."""

    run: str = "runs/toggle"
    seeds: int = 5
    first_seed: int = 1  # seed 0 was used to choose the settings
    traces: int = 3000
    long: float = 0.6  # share of traces in the longest style
    full: float = 0.3  # in the middle one; the rest are terse
    sft_steps: int = 400
    pool: int = 64  # training prompts, equally many of each level
    base_iterations: int = 24
    iterations: int = 32
    prompts: int = 16
    responses: int = 8
    lr: float = 1e-3
    adamw_lr: float = 3e-4
    period: int = 4  # m
    percentile: float = 30.0  # ρ
    lam: float = 0.75  # λ
    penalty: float = 0.5
    questions: int = 60  # held-out chains per level
    workers: int = 2  # processes

    def __post_init__(self):
        for name in ("seeds", "traces", "pool", "base_iterations", "iterations", "prompts", "responses", "questions"):
            if getattr(self, name) < 1:
                raise StudyError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not (0 <= self.long and 0 <= self.full and self.long + self.full <= 1):
            raise StudyError(f"long is {self.long} and full {self.full}: shares of the traces, at most 1 together")
        if self.pool % len(TRAINED):
            raise StudyError(f"pool is {self.pool}: the {len(TRAINED)} levels share it equally")

    def rl(self, control="none"):
        """RLConfig of an arm."""
        return RLConfig(prompts=self.prompts, responses=self.responses, slots=128, capacity=ROOM, max_new_tokens=LONGEST, lr=self.lr,
                        adamw_lr=self.adamw_lr, control=control, period=self.period, percentile=self.percentile, lam=self.lam,
                        penalty=self.penalty, minibatches=2, rows=64)  # fmt: skip


def _environment():
    return Environment(Toolset())


def _prompts(t, seed):
    return [task for level in TRAINED for task in draw_pool(t.pool // len(TRAINED), f"{seed} pool", ["chain"], "text", level=level)]


def _questions(t, level):
    """Held-out chains, the same for all seeds and arms."""
    return draw_pool(t.questions, "toggle", ["chain"], "text", "heldout", level)


# ----------------------------------------------------------------------------------------------- cells


def base(folder, name, log, seed, **settings):
    """SFT from scratch on traces, then plain RL: the policy from which all arms start."""
    t, tokenizer, model = ToggleConfig(**settings), Tokenizer(), decoder(seed, **MODEL)
    with InterpreterPool() as pool:
        collected = traces.collect("zero-vision", 4 * t.traces, tokenizer, pool, seed, ["chain"], text=1.0)
    documents = _mixed(collected.traces, t, tokenizer)
    began, tokens = time.perf_counter(), 0
    for step, result in enumerate(finetune(model, documents, SFTConfig(t.sft_steps, lr=6e-3, adamw_lr=4e-3), tokenizer, seed)):
        tokens += result.tokens
        log(stage="sft", step=step, loss=result.loss, tokens_per_s=tokens / (time.perf_counter() - began))
    after_sft = _measured(model, t, seed)
    with Learner(model, _environment(), _prompts(t, seed), tokenizer, t.rl(), derive(seed, "base")) as learner:
        for _ in range(t.base_iterations):
            log(stage="base", **learner.iterate()[1])
    save(model, folder / "models" / name)
    budgets = [b for b in _budgets(model, t, seed) if math.isfinite(b)]
    cap = round(float(np.median(budgets))) if budgets else LONGEST // 4
    return {"sft": after_sft, "base": _measured(model, t, seed), "capped": _capped(model, t, seed, cap), "cap": cap}


def _mixed(found, t, tokenizer):
    """Documents of traces in the wanted shares of styles."""
    by_style = {"long": [], "full": [], "terse": []}
    for trace in found:
        thought = tokenizer.decode(trace.rollout.ids).partition("<think>")[2]
        by_style["long" if "+" in thought else "full" if "=" in thought else "terse"].append(traces.encode(trace))
    shares = {"long": t.long, "full": t.full, "terse": 1 - t.long - t.full}
    return [document for style, share in shares.items() for document in by_style[style][: round(share * t.traces)]]


def _budgets(model, t, seed):
    """The budgets of the prompts of the highest trained level."""
    prompts = _prompts(t, seed)[-t.pool // len(TRAINED) :]
    groups = sample_groups(model, _environment(), prompts, Tokenizer(), t.responses, derive(seed, "cap"), slots=128, capacity=ROOM,
                           sampling=Sampling(LONGEST, 1.0))  # fmt: skip
    correct = [[sum(r.generated) for r in group if r.valid and r.reward >= 1.0] for group in groups]
    return [float(np.percentile(lengths, t.percentile)) if lengths else math.inf for lengths in correct]


def arm(folder, name, log, arm, seed, cap, **settings):
    """One arm from its seed's base."""
    t = ToggleConfig(**settings)
    model = load(folder / "models" / f"base-{seed}", dtype=torch.float32)
    control = "none" if arm == "plain" else arm
    with Learner(model, _environment(), _prompts(t, seed), Tokenizer(), t.rl(control), derive(seed, "arm")) as learner:
        for _ in range(t.iterations):
            log(stage=arm, **learner.iterate()[1])
    save(model, folder / "models" / name)
    return {"trained": _measured(model, t, seed), "capped": _capped(model, t, seed, cap)}


def _measured(model, t, seed):
    """Passed (0/1) and tokens of all held-out chains of the trained levels, and of the harder one."""
    found = {}
    for part, levels in (("trained", TRAINED), ("harder", (HARDER,))):
        asked = [task for level in levels for task in _questions(t, level)]
        result, _ = measure(model, _environment(), asked, Tokenizer(), derive(seed, "measure"), Sampling(LONGEST, 1.0), slots=128, capacity=ROOM)
        found[part] = {"passed": list(map(int, result.passed)), "tokens": list(result.tokens)}
    return found


def _capped(model, t, seed, cap):
    """Passed (0/1) of the harder chains under each cap on generated tokens."""
    found = {}
    for times in CAPS:
        result, _ = measure(model, _environment(), _questions(t, HARDER), Tokenizer(), derive(seed, "capped"),
                            Sampling(min(times * cap, LONGEST), 1.0), slots=128, capacity=ROOM)  # fmt: skip
        found[str(times)] = list(map(int, result.passed))
    return found


# ---------------------------------------------------------------------------------------------- report


def report(folder, t, bases, arms):
    """Write report.md, summary.json and plots from the cells. Returns the lines of the table."""
    folder, seeds = pathlib.Path(folder), range(t.first_seed, t.first_seed + t.seeds)
    get = lambda name, part, key: np.array([arms[f"{name}-{s}"]["trained"][part][key] for s in seeds], float)  # noqa: E731
    start = {key: np.array([bases[f"base-{s}"]["base"]["trained"][key] for s in seeds], float) for key in ("passed", "tokens")}
    plain = {key: get("plain", "trained", key) for key in ("passed", "tokens")}
    rows, summary = [], {}
    for name in ("base", *ARMS):
        passed, tokens = (start[key] if name == "base" else get(name, "trained", key) for key in ("passed", "tokens"))
        found = {"accuracy": bootstrap(passed), "tokens": bootstrap(tokens)}
        if name in ARMS[1:]:
            found["accuracy less plain's"] = bootstrap(passed - plain["passed"])
            found["tokens against plain's"] = _ratio(tokens, plain["tokens"])
            found["tokens against the base's"] = _ratio(tokens, start["tokens"])
        summary[name] = {key: dataclasses.asdict(value) for key, value in found.items()}
        cells = [str(found.get(key, "–")) for key in ("accuracy", "tokens", "accuracy less plain's", "tokens against plain's", "tokens against the base's")]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    capped = []
    for name in ("base", *ARMS):
        table = {times: np.array([(bases[f"base-{s}"] if name == "base" else arms[f"{name}-{s}"])["capped"][str(times)] for s in seeds], float) for times in CAPS}
        gain = bootstrap(table[CAPS[-1]] - table[1])
        summary[name]["capped"] = {times: dataclasses.asdict(bootstrap(table[times])) for times in CAPS}
        capped.append(f"| {name} | {' | '.join(str(bootstrap(table[times])) for times in CAPS)} | {gain} |")
    _plots(folder, seeds, arms, bases)
    by_seed = [f"| {s} | {bases[f'base-{s}']['cap']} | {np.mean(bases[f'base-{s}']['sft']['trained']['passed']):.3f} | {start['passed'][i].mean():.3f} / {start['tokens'][i].mean():.1f} | "
               + " | ".join(f"{get(name, 'trained', 'passed')[i].mean():.3f} / {get(name, 'trained', 'tokens')[i].mean():.1f}" for name in ARMS) + " |"
               for i, s in enumerate(seeds)]  # fmt: skip
    write_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    text = [
        "# Toggle beside plain RL, a rigid budget and a length penalty", "",
        f"{t.seeds} seeds, each with its own base (SFT from scratch, {t.base_iterations} iterations of plain RL), then {t.iterations} iterations per arm of "
        f"{t.prompts} prompts × {t.responses} responses; m = {t.period}, ρ = {t.percentile:g}, λ = {t.lam}. Held-out chains of levels 1–4, {4 * t.questions} "
        "of them, one sampled response each (temperature 1); the same for all. 95 % intervals: bootstrap over seeds and chains. Chance 0.1.", "",
        "The report claims 25–30 % fewer tokens at negligible loss.", "",
        "| arm | accuracy | tokens | accuracy less plain's | tokens against plain's | tokens against the base's |", "|---|---|---|---|---|---|", *rows, "",
        "![accuracy and tokens over training](arms.png)", "",
        f"## A harder level, under a cap\n\nLevel {HARDER} is in no RL arm. The cap is 1×, 2×, 4× the median budget of the highest trained level.", "",
        "| arm | 1× | 2× | 4× | 4× less 1× |", "|---|---|---|---|---|", *capped, "", "![accuracy against the cap](caps.png)", "",
        "## By seed: accuracy / tokens", "", f"| seed | cap | after SFT | base | {' | '.join(ARMS)} |", f"|---|---|---|---|{'---|' * len(ARMS)}", *by_seed, "",
        "Settings: config.json; every step: cells/*.jsonl. Settings were chosen on seed 0, which is not among these.", "",
    ]  # fmt: skip
    write_file(folder / "report.md", "\n".join(text))
    return rows


def _ratio(tokens, others):
    """Mean tokens against others', less one: the bootstrap of relative differences by their common mean."""
    return bootstrap((tokens - others) / others.mean())


def _plots(folder, seeds, arms, bases):
    def band(name, key):
        curves = np.array([[row[key] for row in read_rows(folder, f"{name}-{s}")] for s in seeds], float)  # (S,iterations)
        return intervals(range(curves.shape[1]), curves.T)

    panels = {title: {name: band(name, key) for name in ARMS} for title, key in
              (("share right, training prompts", "passed"), ("generated tokens per response", "length"), ("entropy, nats per token", "entropy"))}  # fmt: skip
    plot_arms(panels, folder / "arms.png", read_rows(folder, f"toggle-{seeds[0]}"))
    lines = {}
    for name in ("base", *ARMS):
        cell = lambda s: bases[f"base-{s}"] if name == "base" else arms[f"{name}-{s}"]  # noqa: B023, E731
        lines[name] = intervals(CAPS, [np.array([cell(s)["capped"][str(times)] for s in seeds], float) for times in CAPS])
    plot_arms({f"level {HARDER}: accuracy against the cap, times the budget": lines}, folder / "caps.png")


def _work(folder, t):
    shared = {k: v for k, v in dataclasses.asdict(t).items() if k not in ("run", "seeds", "first_seed", "workers")}
    seeds = range(t.first_seed, t.first_seed + t.seeds)
    cells = {f"base-{s}": {"seed": s} | shared for s in seeds}
    bases = run_cells(folder, cells, base, dict.fromkeys(cells, t.sft_steps + t.base_iterations), t.workers, "bases")
    cells = {f"{name}-{s}": {"arm": name, "seed": s, "cap": bases[f"base-{s}"]["cap"]} | shared for s in seeds for name in ARMS}
    arms = run_cells(folder, cells, arm, dict.fromkeys(cells, t.iterations), t.workers, "arms")
    return report(folder, t, bases, arms)


def main(arguments=None):
    """Run what is missing, then write the report. Exit code 2 with one line on misuse."""
    run_study("toggle", __doc__, ToggleConfig, _work, (StudyError, RLError, SFTError, OSError), arguments)


if __name__ == "__main__":
    main()
