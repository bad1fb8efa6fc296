"""Joint multimodal reinforcement learning of the pre-trained toy, end to end — K2.5 report 2.2, 2.3, 4.4.2, appendix D.

    base   the model that `make train` made
    sft    zero-vision SFT: text-only traces in which looking is a Python program
    rl     joint RL: tasks by ability, each over pictures and over words, one pool; MuonClip on the policy objective
    rft    sft, fine-tuned on right trajectories of rl (rejection sampling)

All four are asked the same held-out questions. Everything is written below --run: config, metrics, models, curves, sampled
trajectories, report.md.

Run: python train_small.py rl --model runs/toy/model --run runs/rl        (make rl: after make train; minutes: README)

Public names: JobConfig, JobError, MEASURED_AT, draw_pool, last_answer, measure, Measured, main.     Tests: pytest tests/test_rl_job.py
"""

import argparse
import dataclasses
import json
import pathlib
import random
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import tasks
import traces
from checkpoint import CheckpointError, write_file
from environment import Click, Environment, Python, Toolset
from evaluate import wilson
from flags import add_flags, one_line, parse_flags, take_flags
from interpreter import InterpreterPool
from k25 import load, save
from objective import ObjectiveError, rft_select
from rl import Learner, RLConfig, RLError, sample_groups
from rl_report import plot_curves, plot_trajectories
from rollout import Sampling, derive
from sft import SFTConfig, SFTError, documents_of, finetune
from shards import Checkpoints
from tokenizer import Tokenizer


MEASURED_AT = 0.6  # temperature: the release's without thinking; RL samples at 1


class JobError(ValueError):
    """A job that cannot run; one line says why."""


@dataclass(frozen=True)
class JobConfig:
    """The job around SFTConfig and RLConfig; each field is a flag."""

    model: str = "runs/toy/model"  # the pre-trained model, in the released layout
    run: str = "runs/rl"  # directory of everything that is written
    seed: int = 0
    tasks: str = "colour,count,measure,chart,sort,menu"  # names, parted by commas, "" for all: see python tasks.py list
    modality: str = "both"  # of the training prompts: text | vision | both
    traces: int = 2400  # of SFT
    iterations: int = 16  # of RL
    pool: int = 192  # training prompts
    rft_steps: int = 40  # 0: no RFT
    questions: int = 96  # held-out tasks per modality
    workers: int = 1  # interpreters
    checkpoint_every: int = 10  # iterations

    def __post_init__(self):
        for name in ("iterations", "pool", "questions", "workers", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise JobError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.modality not in ("text", "vision", "both"):
            raise JobError(f"modality {self.modality!r}: choose text, vision or both")
        unknown = [name for name in self.names() or () if name not in tasks.TASKS]
        if unknown:
            raise JobError(f"no task {unknown[0]!r}: use some of {', '.join(tasks.TASKS)}")

    def names(self):
        """The names of the tasks, None for all."""
        return [name.strip() for name in self.tasks.split(",")] if self.tasks else None


# -------------------------------------------------------------------------------------------- measuring


def draw_pool(number, seed, names=None, modality=None, split="train", level=None):
    """Tasks with different contents, the names in turn. modality: "text", "vision", or None for both in turn."""
    names, found, keys, index = list(names or tasks.TASKS), [], set(), 0
    while len(found) < number:
        name, rng = names[index % len(names)], random.Random(f"{seed} {index}")
        kind = modality or tasks.MODALITIES[index // len(names) % 2]
        task = tasks.draw(rng, name, modality=kind, split=split, difficulty=level)
        if (task.key, kind) not in keys or index > 50 * number:
            keys.add((task.key, kind))
            found.append(task)
        index += 1
    return found


@dataclass(frozen=True)
class Measured:
    """What a model made of some tasks, one response each."""

    passed: tuple  # of each task: whether the answer was right
    reward: tuple  # of each
    tools: tuple  # of each: well-formed tool calls
    tokens: tuple  # of each: generated
    confidence: tuple  # of each: probability of the tokens of the last answer

    def share(self, which=None):
        """(right, asked) among the tasks at the places `which`, default all."""
        chosen = [self.passed[i] for i in which] if which is not None else self.passed
        return sum(chosen), len(chosen)


def last_answer(rollout):
    """Sum of the log-probs of the last run of generated tokens."""
    places = [i for i, sampled in enumerate(rollout.generated) if sampled]
    length = 0
    while places and length < len(places) and places[-1 - length] == places[-1] - length:
        length += 1
    return sum(rollout.logprobs[len(rollout.logprobs) - length :])


def measure(model, environment, questions, tokenizer, seed, sampling, slots=64, capacity=512):
    """One sampled response to each task. Returns (Measured, list of Rollout). A rollout that is not valid counts as wrong."""
    groups = sample_groups(model, environment, questions, tokenizer, 1, seed, slots=slots, capacity=capacity, sampling=sampling)
    rollouts = [group[0] for group in groups]
    passed = tuple(bool(r.valid and r.reward >= task.passing - 1e-6) for task, r in zip(questions, rollouts))
    confidence = tuple(float(torch.tensor(last_answer(r)).exp()) for r in rollouts)
    return Measured(passed, tuple(r.reward if r.valid else 0.0 for r in rollouts), tuple(len(r.info.calls) for r in rollouts),
                    tuple(sum(r.generated) for r in rollouts), confidence), rollouts  # fmt: skip


# ------------------------------------------------------------------------------------------------ the job


class _Job:
    """One run: its directory, and the stages, each of which is skipped when its model is there."""

    def __init__(self, t, sft, rl, resume):
        self.t, self.sft, self.rl, self.path = t, sft, rl, pathlib.Path(t.run)
        if not (pathlib.Path(t.model) / "config.json").exists():
            raise JobError(f"{t.model} holds no model: make one with `make train`, or give --model DIR")
        settings = {"job": dataclasses.asdict(t), "sft": dataclasses.asdict(sft), "rl": dataclasses.asdict(rl)}
        settings["versions"] = {"torch": torch.__version__}
        kept = self.path / "config.json"
        if kept.exists() and not resume:
            raise JobError(f"{self.path} already holds a run: continue it with --resume, or choose another --run")
        if resume and (not kept.exists() or {**json.loads(kept.read_text()), "versions": 0} != {**settings, "versions": 0}):
            raise JobError(f"{self.path} holds no run with these flags: leave --resume out, or give the flags it was begun with")
        self.path.mkdir(parents=True, exist_ok=True)
        write_file(kept, json.dumps(settings, indent=2) + "\n")
        self.tokenizer = Tokenizer()
        self.base = load(t.model, dtype=torch.float32)
        self.media = self.base.config.media

    def log(self, stage, row):
        """Append a row of metrics."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage} | {k: None if v != v else v for k, v in row.items()}) + "\n")

    def rows(self, stage):
        """The metrics of a stage, the last of each step."""
        path, found = self.path / "metrics.jsonl", {}
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            if row["stage"] == stage:
                found[row.get("iteration", row.get("step"))] = row
        return list(found.values())

    def stage(self, name, make):
        """The model of a stage: loaded when it is there, else made and saved."""
        where = self.path / "models" / name
        if not (where / "config.json").exists():
            model = make()
            if model is None:
                return None
            save(model, where)
        return load(where, dtype=torch.float32)

    def fine_tuned(self, stage, model, documents, sft):
        """Fine-tune, with a bar and metrics."""
        with tqdm(total=sft.steps, unit="step", desc=stage, dynamic_ncols=True) as bar:
            began = time.perf_counter()
            for step, result in enumerate(finetune(model, documents, sft, self.tokenizer, self.t.seed)):
                rate, began = result.tokens / (time.perf_counter() - began), time.perf_counter()
                self.log(stage, {"step": step, "loss": result.loss, "grad_norm": result.grad_norm, "tokens_per_s": rate})
                bar.set_postfix_str(f"loss {result.loss:.3f} {rate:,.0f} tok/s")
                bar.update()
        return model

    def supervised(self, pool):
        """Zero-vision SFT."""
        collected = traces.collect("zero-vision", self.t.traces, self.tokenizer, pool, self.t.seed, self.t.names(), media=self.media)
        documents = [traces.encode(trace) for trace in collected.traces]
        kept = [document for document in documents if len(document.ids) <= self.sft.length]
        print(f"sft: {len(kept)} traces, {collected.dropped.total()} were not right, {len(documents) - len(kept)} longer than {self.sft.length} tokens")
        return self.fine_tuned("sft", load(self.t.model, dtype=torch.float32), kept, self.sft)

    def reinforced(self, model, environment):
        """Joint RL, with checkpoints."""
        t = self.t
        prompts = draw_pool(t.pool, t.seed, t.names(), None if t.modality == "both" else t.modality)
        checkpoints = Checkpoints(self.path)
        with Learner(model, environment, prompts, self.tokenizer, self.rl, derive(t.seed, "rl")) as learner:
            if latest := checkpoints.latest():
                checkpoints.load(latest["checkpoint"], model, learner.optimizer)
                learner.load_state(latest["learner"])
            with tqdm(total=t.iterations, initial=learner.iteration, unit="iteration", desc="rl", dynamic_ncols=True) as bar:
                while learner.iteration < t.iterations:
                    _, row = learner.iterate()
                    self.log("rl", row)
                    tqdm.write(f"rl {row['iteration']:4d}  reward {row['reward']:.3f}  passed {row['passed']:.3f}  length {row['length']:6.1f}  "
                               f"entropy {row['entropy']:.3f}  masked {row['masked']:.4f}  mismatch {row['mismatch']:.1e}  "
                               f"|g| {row['grad_norm']:.2f}  {row['tokens_per_s']:,.0f} tok/s")  # fmt: skip
                    bar.set_postfix_str(f"reward {row['reward']:.3f} {row['tokens_per_s']:,.0f} tok/s")
                    bar.update()
                    if learner.iteration % t.checkpoint_every == 0 or learner.iteration == t.iterations:
                        checkpoints.save(model, learner.optimizer, {"global_step": learner.iteration, "learner": learner.state()})
        return model

    def rejected(self, model, policy, environment):
        """RFT: `model` fine-tuned on right trajectories of the policy."""
        t = self.t
        if not t.rft_steps:
            return None
        prompts = draw_pool(t.pool, t.seed, t.names())
        groups = sample_groups(policy, environment, prompts, self.tokenizer, 4, derive(t.seed, "rft"), slots=self.rl.slots,
                               capacity=self.rl.capacity, sampling=Sampling(self.rl.max_new_tokens, self.rl.temperature))  # fmt: skip
        rollouts = [r for group in groups for r in group]
        right = [r.reward >= task.passing - 1e-6 for task, group in zip(prompts, groups) for r in group]
        chosen = rft_select([r.ids for r in rollouts], [float(x) for x in right], [r.valid for r in rollouts],
                            [number for number, group in enumerate(groups) for _ in group], 1.0, 2)  # fmt: skip
        documents = [d for d in documents_of([rollouts[i] for i in chosen]) if len(d.ids) <= self.sft.length]
        print(f"rft: {len(documents)} right trajectories of {len(rollouts)} sampled")
        return self.fine_tuned("rft", model, documents, dataclasses.replace(self.sft, steps=t.rft_steps)) if documents else None

    def measured(self, name, model, environment, questions):
        """Scores of a model on held-out tasks: kept in scores.json."""
        path = self.path / "scores.json"
        scores = json.loads(path.read_text()) if path.exists() else {}
        sampling = Sampling(self.rl.max_new_tokens, MEASURED_AT)
        found, rollouts = measure(model, environment, questions, self.tokenizer, derive(self.t.seed, "measure"), sampling, capacity=self.rl.capacity)
        scores[name] = dataclasses.asdict(found)
        write_file(path, json.dumps(scores) + "\n")
        return found, rollouts

    def work(self):
        """All stages, then the report. Returns its last line."""
        began, t = time.perf_counter(), self.t
        questions = [task for kind in tasks.MODALITIES for task in draw_pool(t.questions, derive(t.seed, "held out"), t.names(), kind, "heldout")]
        with InterpreterPool(t.workers) as pool:
            environment = Environment(Toolset(Python(pool), Click()), media=self.media)
            sft = self.stage("sft", lambda: self.supervised(pool))
            rl = self.stage("rl", lambda: self.reinforced(self.stage("sft", None), environment))
            rft = self.stage("rft", lambda: self.rejected(self.stage("sft", None), rl, environment))
            models = {"base": self.base, "sft": sft, "rl": rl} | ({"rft": rft} if rft else {})
            found = {name: self.measured(name, model, environment, questions) for name, model in models.items()}
        plot_curves(self.rows("rl"), self.path / "curves.png")
        rollouts = found["rl"][1]
        # The first of each vision task, and the first chains in words.
        seen, samples = set(), []
        for task, rollout in zip(questions, rollouts):
            if task.modality == "vision" and task.name not in seen:
                seen.add(task.name)
                samples.append((task, rollout))
        plot_trajectories(samples[:12], self.tokenizer, self.path / "trajectories.png")
        minutes = (time.perf_counter() - began) / 60
        lines = self._table(questions, {name: measured for name, (measured, _) in found.items()})
        write_file(self.path / "report.md", "\n".join([
            f"# Joint RL of a toy Kimi K2.5, seed {t.seed}", "",
            f"Share of right answers to held-out tasks, one sampled response each (temperature {MEASURED_AT}), 95 % Wilson intervals. "
            "Blind: the best score without looking, at most.", "", *lines, "",
            "![curves](curves.png)", "", "![trajectories of the policy after RL; blue is what it wrote](trajectories.png)", "",
            f"Minutes: {minutes:.1f} (those of this call). Settings: config.json; every step: metrics.jsonl.", ""]))  # fmt: skip
        return "\n".join([*lines, f"{self.path / 'report.md'}   {minutes:.1f} minutes"])

    def _table(self, questions, found):
        """Markdown rows: abilities by modality against models."""
        lines = [f"| ability | modality | tasks | blind | {' | '.join(found)} |", f"|---|---|---|---|{'---|' * len(found)}"]
        for ability in (*tasks.ABILITIES, "all"):
            for kind in reversed(tasks.MODALITIES):
                which = [i for i, task in enumerate(questions) if ability in (task.ability, "all") and task.modality == kind]
                if not which:
                    continue
                cells = []
                for measured in found.values():
                    right, asked = measured.share(which)
                    low, high = wilson(right, asked)
                    cells.append(f"{right / asked:.3f} [{low:.3f}, {high:.3f}]")
                blind = sum(questions[i].blind for i in which) / len(which)
                lines.append(f"| {ability} | {kind} | {len(which)} | {blind:.3f} | {' | '.join(cells)} |")
        for what, read in (("tokens per response, vision", "tokens"), ("tool calls per response, vision", "tools")):
            which = [i for i, task in enumerate(questions) if task.modality == "vision"]
            means = [f"{sum(getattr(m, read)[i] for i in which) / len(which):.2f}" for m in found.values()]
            lines.append(f"| {what} | | | | {' | '.join(means)} |")
        return lines


# ---------------------------------------------------------------------------------------- command line


def main(arguments=None):
    """Run the job. Exit code 2 with one line on misuse."""
    parser = argparse.ArgumentParser(prog="train_small.py rl", usage="train_small.py rl [--FLAG VALUE …]", allow_abbrev=False,
                                     description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run")
    add_flags(parser.add_argument_group("job"), JobConfig)
    add_flags(parser.add_argument_group("reinforcement learning"), RLConfig)
    add_flags(parser.add_argument_group("supervised fine-tuning"), SFTConfig, "sft-")
    options = parse_flags(parser, arguments)
    errors = (JobError, SFTError, RLError, CheckpointError, ObjectiveError, tasks.TaskError, traces.TraceError, OSError)
    with one_line(parser.prog, errors, "the same command with --resume goes on"):
        torch.set_num_threads(1)
        job = _Job(take_flags(options, JobConfig), take_flags(options, SFTConfig, "sft-"), take_flags(options, RLConfig), options.resume)
        print(job.work())


if __name__ == "__main__":
    main()
