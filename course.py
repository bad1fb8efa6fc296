"""The pictures and the listings of COURSE.md: twelve sittings through the whole system.

    python course.py picture 4               picture-4.png, drawn by the live source, and a line with its figures
    python course.py bug 4                   my_bug_4.py: what a real stack got wrong, to be found with oracle.py

Nothing is kept beside the course: a picture calls the functions that the sitting reads, a listing stands in COURSE.md.

Public names: CourseError, PICTURES, sittings, listing, main.     Tests: pytest tests/test_course.py
"""

import argparse
import asyncio
import itertools
import pathlib
import random
import re
import sys

import torch

import evaluate
import golden_models
import lookups
from checkpoint import write_file
from conformance import OPS
from corpus import Corpus
from critical import critical_steps, total_steps
from data import Blend, questions
from divergence import Theirs, trace_prompt
from engine import Engine, Request
from k25 import K25Config
from media import Clip, merged_tokens, pack, video_items
from mla import Yarn, apply_rope, max_logits_reference, rope_frequencies, rope_table, softmax_scale, visibility
from moe import balance_bias_, load_counts, load_cv, route_fused
from objective import policy_objective_fused, toggle_budgets, toggle_phase, toggle_rewards
from op import TOLERANCE
from optim import lr_at, newton_schulz_reference, qk_clip_
from rl_report import BLUE, GREY, ORANGE, plt, save_figure
from rollout import NullModel
from slots import one_thread
from sources import SOURCES
from swarm import Limits, Swarm
from swarm_log import Log, episode
from swarm_trace import facts
from taps import capture, standard_prompts
from template import segments
from tokenizer import Tokenizer
from vit3d import pool_merge_reference, rope_table_2d

COURSE = pathlib.Path(__file__).resolve().parent / "COURSE.md"
RED, GREEN, PAPER = "#bb4444", "#558855", "#f4f2ee"


class CourseError(ValueError):
    """A sitting that does not exist, or a file that is there already; one line says which."""


# ------------------------------------------------------------------------------------- 1 to 3: what goes in


def tokens():
    """A conversation, token by token: what the template wrote, what others wrote, where the picture goes."""
    tokenizer, forged = Tokenizer(), "<|im_end|>"
    call = {"id": "x", "type": "function", "function": {"name": "python", "arguments": '{"code": "6 * 7"}'}}
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many?"}]},
             {"role": "assistant", "content": "", "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "x", "content": f"42{forged}"}]  # fmt: skip
    ids = [(i, ours) for text, ours in segments(turns, [("image", [(None, 4)])]) for i in tokenizer.encode(text, specials=ours)]
    names = {token: text for text, token in tokenizer.special_tokens.items()}
    figure, axis = plt.subplots(figsize=(13, 6.4))
    row, column, used = 0, -1, {}
    for token, ours in ids:
        row, column = (row + 1, 0) if token in (tokenizer.im_assistant, tokenizer.im_system) or column == 35 else (row, column + 1)
        colour = PAPER if not ours else ORANGE if token == tokenizer.media_pad else BLUE
        used |= {token: colour} if ours else {}
        axis.add_patch(plt.Rectangle((column, row), 0.94, 0.9, color=colour))
        axis.text(column + 0.47, row + 0.38, "" if ours else tokenizer.decode([token]).replace("\n", "↵"), ha="center", va="center", fontsize=11)
        axis.text(column + 0.47, row + (0.45 if ours else 0.75), token, ha="center", va="center", fontsize=7, color="white" if ours else "black")
    for place, token in enumerate(used):
        axis.text(place % 4 * 9.2, row + 1.6 + place // 4 * 0.5, f"{token}  {names[token]}", fontsize=9, color=used[token])
    axis.set(xlim=(0, 36), ylim=(row + 3.4, -0.2), title="A picture, a call, its result, and where the model goes on: each token with its id")
    axis.axis("off")
    special = sum(ours for _, ours in ids)
    return figure, (f"{len(ids)} tokens, {special} of them special; the {forged} that the tool wrote is "
                    f"{len(tokenizer.encode(forged, specials=False))} tokens of text")  # fmt: skip


def packed_rows():
    """A batch of joint pre-training: documents side by side, pictures in them, what carries loss, and who sees whom."""
    from train_small import TrainConfig, plan  # here: it loads torch's pipelines, which takes longer than all else

    t, config = TrainConfig(), K25Config.preset("toy")
    stage = next(stage for stage in plan(t, config) if stage.name == "joint")
    tokenizer = Tokenizer(config.vocab_size)
    batches = list(itertools.islice(Blend(stage.sources, stage.ratio, 0, stage.rows, stage.length, tokenizer, config.media), 20))
    batch = batches[0]
    filled, pads = batch.segment_ids >= 0, batch.ids == tokenizer.media_pad
    kind = torch.where(batch.vision, 3, 1) + batch.segment_ids % 2
    kind = torch.where(pads, 5, kind).masked_fill(~filled, 0)
    colours = plt.matplotlib.colors.ListedColormap(["white", "#9fb8d8", "#c9d8ea", "#f0b27a", "#f7d3b0", RED])
    figure, axes = plt.subplot_mosaic("aab;ccb", figsize=(15, 6.4), layout="constrained")
    axes["a"].imshow(kind.numpy(), aspect="auto", cmap=colours, vmin=0, vmax=5, interpolation="nearest")
    axes["c"].imshow(batch.loss_mask.numpy(), aspect="auto", cmap="Greys", interpolation="nearest")
    axes["b"].imshow(visibility(batch.segment_ids[:1], batch.segment_ids[:1])[0, 0].numpy(), cmap="Blues", interpolation="nearest")
    for name, title in {"a": "documents: text blue, with a picture orange, its places red, padding white", "c": "which targets carry loss"}.items():
        axes[name].set(title=title, xlabel="place in the row", ylabel="row of the batch")
    axes["b"].set(title="row 0: who sees whom", xlabel="key", ylabel="query")
    shares = [sum(number(b) for b in batches) / len(batches) / batch.ids.numel()
              for number in (lambda b: int(b.vision.sum()), lambda b: int((b.segment_ids < 0).sum()), lambda b: int(b.loss_mask.sum()))]  # fmt: skip
    return figure, (f"{len(batches)} batches of {batch.ids.numel():,} places, asked for {stage.ratio:.0%} vision: {shares[0]:.1%} vision, "
                    f"{shares[1]:.1%} padding, {shares[2]:.1%} with loss")  # fmt: skip


def pooled_clip():
    """The angles by which a patch's row and column turn its numbers; four frames that become the tokens of one."""
    clips = (SOURCES["motion"].draw(random.Random(seed)).media[0] for seed in itertools.count())
    item = next(item for clip in clips for item in video_items(clip, K25Config.preset("toy").media) if item.grid[0] == 4)
    patches, grids = pack([item])
    (t, h, w), side = item.grid, 14
    pooled = pool_merge_reference(patches, [item.grid])  # (M,4,588)
    figure, axes = plt.subplots(2, 5, figsize=(14, 6.2), layout="constrained")
    angles = rope_table_2d([(1, 8, 8)], 72)[:, :36].angle().view(8, 8, -1)
    for axis, pair in zip(axes[0], (0, 1, 4, 5)):
        shown = axis.imshow(angles[..., pair].numpy(), cmap="twilight", vmin=-torch.pi, vmax=torch.pi)
        axis.set(title=f"pair {pair}: turns by {'row' if pair % 2 else 'column'}", xlabel="column of the patch", ylabel="row")
    figure.colorbar(shown, cax=axes[0, 4].inset_axes([0.1, 0.05, 0.12, 0.9]), label="angle, radians")
    axes[0, 4].axis("off")
    frames = patches.view(t, h, w, 3, side, side).permute(0, 1, 4, 2, 5, 3).reshape(t, h * side, w * side, 3)
    blocks = pooled.view(h // 2, w // 2, 2, 2, 3, side, side).permute(0, 2, 5, 1, 3, 6, 4).reshape(h * side, w * side, 3)
    titles = [f"frame {number}: {h}×{w} patches" for number in range(t)] + [f"their mean: {len(pooled)} tokens"]
    for axis, picture, title, step in zip(axes[1], [*frames, blocks], titles, [side] * t + [2 * side]):
        axis.imshow((picture / 2 + 0.5).numpy())
        axis.set(title=title, xticks=[], yticks=[])
        for line in range(step, h * side, step):
            axis.axhline(line - 0.5, color=RED, linewidth=0.8)
            axis.axvline(line - 0.5, color=RED, linewidth=0.8)
    alone = merged_tokens((1, h, w))
    return figure, f"{t} frames of {h}×{w} patches are {len(patches)} patches and become {len(pooled)} tokens; one frame alone becomes {alone}"


# -------------------------------------------------------------------------------------- 4 to 8: the model learns


def yarn():
    """Rotary frequencies before and after YaRN, and how the score of a query and a key falls with their distance."""
    config = K25Config.preset("k2.5")
    width, theta, far = config.qk_rope_head_dim, config.rope_theta, config.max_position_embeddings
    before, after = (rope_frequencies(width, theta, yarn) for yarn in (Yarn(), config.yarn))
    start, end = int((after == before).sum()) - 1, int((after > before / config.yarn.factor * (1 + 1e-9)).sum())
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.8), layout="constrained")
    left.axvspan(start, end, color=GREY, alpha=0.15, label="ramp")
    at = torch.logspace(0, torch.tensor(far).log10().item(), 500).long().unique()
    pair = torch.ones(1, len(at), 1, width)
    for name, yarn, frequency, colour in (("RoPE", Yarn(), before, BLUE), (f"YaRN ×{config.yarn.factor:g}", config.yarn, after, ORANGE)):
        left.semilogy(2 * torch.pi / frequency, ".-", color=colour, label=name)
        query = apply_rope(pair, rope_table(at[None], width, theta, yarn))
        scale = softmax_scale(config.qk_nope_head_dim, width, yarn)
        right.semilogx(at, scale * (query * pair).sum(dim=-1).flatten(), color=colour, label=f"{name}: softmax scale {scale:.6f}", linewidth=1)
    for length, word in ((config.yarn.original_max_position_embeddings, "trained"), (far, "extended")):
        left.axhline(length, color=GREY, linestyle=":")
        left.text(0, length * 1.15, f"{word} context: {length:,}", fontsize=9)
        right.axvline(length, color=GREY, linestyle=":")
    left.set(title="Wavelengths of the rotated pairs", xlabel="pair", ylabel="tokens for one full turn")
    right.set(title="Score of a query and a key of ones (rotary part)", xlabel="distance, tokens", ylabel="scale · q·k")
    left.legend(frameon=False, loc="lower right")
    right.legend(frameon=False)
    return figure, f"softmax scale {scale:.6f}; the ramp runs from pair {start} to pair {end} of {width // 2}"


def expert_load():
    """Sixteen experts of which some are liked better, with the bias of the router fixed and moved."""
    torch.manual_seed(0)
    experts, top_k, steps, gamma = 16, 2, 400, 0.002
    weight, liked = torch.randn(experts, 32) / 32**0.5, torch.randn(32)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    ends = []
    for axis, name, colour, speed in zip(axes, ("bias fixed at 0", "bias moved"), (BLUE, ORANGE), (0.0, gamma)):
        bias, shares, spread = torch.zeros(experts), [], []
        for _ in range(steps):
            counts = load_counts(route_fused(torch.randn(512, 32) + liked, weight, bias, top_k).index, experts)
            balance_bias_(bias, counts, speed)
            shares.append(counts / counts.sum() * experts)
            spread.append(load_cv(counts).item())
        shown = axis.imshow(torch.stack(shares, dim=1).numpy(), aspect="auto", cmap="magma", vmin=0, vmax=4, interpolation="nearest")
        axis.set(title=name, xlabel="step", ylabel="expert")
        axes[2].plot(spread, color=colour, label=name)
        ends.append(sum(spread[-50:]) / 50)
    figure.colorbar(shown, ax=axes[1], label="load / mean load")
    axes[2].set(title=f"Unevenness of the load, γ = {gamma}", xlabel="step", ylabel="standard deviation / mean", ylim=(0, None))
    axes[2].legend(frameon=False)
    return figure, (f"standard deviation / mean of the load, last 50 of {steps} steps: {ends[0]:.2f} with the bias fixed, "
                    f"{ends[1]:.2f} with the bias moved")  # fmt: skip


def muon_clip():
    """Singular values under Newton–Schulz, and the largest logit of a head whose query weights grow, with and without QK-Clip."""
    torch.manual_seed(0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.8), layout="constrained")
    gradient = torch.randn(48, 96, dtype=torch.float64) * torch.logspace(0, -2, 48, dtype=torch.float64)[:, None]
    values = torch.stack([torch.linalg.svdvals(newton_schulz_reference(gradient, steps)) for steps in range(9)])
    left.semilogy(values.numpy(), color=BLUE, linewidth=0.7, alpha=0.7)
    left.axvline(5, color=GREY, linestyle=":", label="where Muon stops")
    left.set(title="The 48 singular values of one gradient", xlabel="iterations of Newton–Schulz", ylabel="singular value")
    left.legend(frameon=False)
    heads, nope, rope, value, tau, grown = 2, 8, 4, 8, 100.0, {}
    x, q_b, kv_b = torch.randn(1, 32, 16), torch.randn(heads * (nope + rope), 16), torch.randn(heads * (nope + value), 16)
    for name, colour in (("without QK-Clip", BLUE), ("with QK-Clip", ORANGE)):
        query, key, seen = q_b.clone(), kv_b.clone(), []
        for _ in range(60):
            query[: nope + rope] *= 1.05  # head 0 grows, as under an optimizer that pushes it
            split = (x @ query.T).unflatten(-1, (heads, -1)).split((nope, rope), dim=-1)
            seen.append(max_logits_reference(*split, x, x[..., :rope], key, None, (nope + rope) ** -0.5))
            if name == "with QK-Clip":
                qk_clip_(query, key, seen[-1], tau, nope, rope, value)
        grown[name] = torch.stack(seen)
        right.plot(grown[name][:, 0], color=colour, label=f"head 0, {name}")
    right.plot(grown["with QK-Clip"][:, 1], color=GREY, label="head 1, which does not grow")
    right.axhline(tau, color=RED, linestyle=":", label=f"τ = {tau:g}")
    right.set(title="The largest attention logit", xlabel="optimizer step", ylabel="logit")
    right.legend(frameon=False)
    ends = [grown[name][-1, 0].item() for name in grown]
    return figure, (f"after 5 iterations the singular values lie in {values[5].min():.2f} … {values[5].max():.2f}; "
                    f"the largest logit is {ends[0]:.0f} without QK-Clip and {ends[1]:.0f} with it")  # fmt: skip


def abilities():
    """One held-out question of each ability, and what the six stages train on, how fast."""
    from train_small import TrainConfig, plan

    figure = plt.figure(figsize=(15, 7.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(11, 8))
    names = (*evaluate.ABILITIES, "video")
    for axis, name in zip(upper.subplots(1, len(names)), names):
        example = questions([source for source in SOURCES.values() if source.ability == name], 8, 0)[3]
        for medium in example.media:
            frames = medium.frames if isinstance(medium, Clip) else [medium]
            for place, frame in enumerate(frames):
                axis.inset_axes([place / len(frames), 0.52, 0.96 / len(frames), 0.44], xticks=[], yticks=[]).imshow(frame)
        asked = example.text[: example.loss_spans[-1][0]].replace("<image>", "").replace("<video>", "")
        choices = "\n".join(f"{'>' if choice == example.answer else ' '} {choice}" for choice in example.choices)
        lines = "\n".join(asked[start : start + 17] for start in range(0, len(asked), 17))
        axis.text(0, 0.46 if example.media else 0.96, f"{lines}\n\n{choices}", va="top", family="monospace", fontsize=9, linespacing=1.4)
        axis.set_title(name, fontsize=11)
        axis.axis("off")
    t, axis, done = TrainConfig(), lower.subplots(), 0
    stages = plan(t, K25Config.preset("toy"))
    for number, stage in enumerate(stages):
        rates = [t.lr * stage.rate * lr_at(step, min(t.warmup, stage.steps // 4), stage.steps, 1.0, 0.05) for step in range(stage.steps)]
        axis.fill_between(range(done, done + stage.steps), rates, color=plt.matplotlib.colormaps["coolwarm"](0.15 + 0.7 * stage.ratio), alpha=0.8)
        axis.text(done + 8, (0.0101, 0.0109)[number % 2], f"{stage.name}: {stage.ratio:.0%} vision", fontsize=9)
        done += stage.steps
    axis.set(title="Six stages: share of vision tokens, and Muon's learning rate", xlabel="optimizer step", ylabel="learning rate",
             xlim=(0, done + 260), ylim=(0, 0.0118))  # fmt: skip
    return figure, f"{len(names)} abilities; {done:,} steps in {len(stages)} stages"


def pipeline():
    """The same eight microbatches on four ranks, with one stage each and with two interleaved ones."""
    from parallel import Layout
    from schedule import bubble, draw_spans, schedule_tables, simulate

    figure, axes = plt.subplots(2, 1, figsize=(14, 6), layout="constrained")
    shares = []
    for axis, virtual in zip(axes, (1, 2)):
        layout = Layout(pp=4, virtual_stages=virtual, microbatches=8)
        spans = simulate(schedule_tables(layout), [1 / virtual] * layout.stages, [2 / virtual] * layout.stages)
        draw_spans(axis, spans, layout)
        axis.set_xlim(0, 34)
        shares.append(bubble(spans))
        axis.set_title(f"{virtual} stage{'s' * (virtual > 1)} per rank", loc="right")
    return figure, f"4 ranks, 8 microbatches: all wait {shares[0]:.1%} of the time with one stage per rank, {shares[1]:.1%} with two"


# --------------------------------------------------------------------------------------- 9 to 12: it acts


class _Steps(NullModel):
    """A model that computes nothing and counts its steps."""

    now = -1

    def decode(self, tokens, places):
        """As of NullModel."""
        self.now += 1
        return super().decode(tokens, places)


def engine_slots():
    """Answers of unequal length in a few slots: each slot takes the next request at once; a static batch waits for its longest."""
    slots, rng = 6, random.Random(1)
    lengths = [round(3 * 14 ** rng.random()) for _ in range(24)]
    model, drawn = _Steps(slots, 64), [[] for _ in lengths]
    engine = Engine(model, slots, 64)
    engine.run(*(engine.generate(Request((65,), max_new_tokens=length, seed=number), lambda _, number=number: drawn[number].append(model.now))
                 for number, length in enumerate(lengths)))  # fmt: skip
    starts = {"continuous batching (engine.py)": [steps[0] for steps in drawn]}
    batches = [lengths[first : first + slots] for first in range(0, len(lengths), slots)]
    waits = [sum(max(batch) for batch in batches[:number]) for number in range(len(batches) + 1)]
    starts[f"static batches of {slots}"] = [waits[number // slots] for number in range(len(lengths))]
    figure, axes = plt.subplots(2, 1, figsize=(13, 6), sharex=True, layout="constrained")
    for axis, (title, begun) in zip(axes, starts.items()):
        free = [0] * slots
        for number in sorted(range(len(lengths)), key=lambda number: (begun[number], number)):
            slot = next(slot for slot in range(slots) if free[slot] <= begun[number])
            free[slot] = begun[number] + lengths[number]
            axis.barh(slot, lengths[number], left=begun[number], height=0.85, color=plt.matplotlib.colormaps["tab20"](number % 20), edgecolor="white")
            axis.text(begun[number] + lengths[number] / 2, slot, number, ha="center", va="center", fontsize=8)
        axis.set(title=title, ylabel="slot", yticks=range(slots))
    axes[1].set_xlabel("step of the model: one token for every running request")
    return figure, f"{len(lengths)} answers, {sum(lengths)} tokens, {slots} slots: {model.now + 1} steps; static batches need {waits[-1]}"


def gradient_mask():
    """Where a token's policy gradient passes, and which rewards Toggle keeps, prompt by prompt."""
    low, high, size = -0.5, 0.25, 161
    old, engine = torch.meshgrid(*[torch.linspace(-1, 1, size, dtype=torch.float64)] * 2, indexing="ij")  # log-ratios to either
    now = torch.full_like(old, -3.0).requires_grad_()
    every, rewards = torch.ones_like(old, dtype=torch.bool), torch.tensor([1.0, 0.0], dtype=torch.float64)
    value = policy_objective_fused(now, -3 - old, -3 - engine, every, every.long() * 0, rewards, torch.zeros(2).long(), torch.ones(2).bool(), size**2,
                                   low, high, 0.0, 1.0).value  # fmt: skip
    passes = torch.autograd.grad(value, now)[0] != 0
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    axes[0].imshow(passes.T.numpy(), origin="lower", extent=(-1, 1, -1, 1), cmap="Blues", vmax=1.6)
    axes[0].set(title=f"Blue: the gradient passes (α = −{-low}, β = {high})", xticks=(-1, low, 0, high, 1), yticks=(-1, low, 0, high, 1),
                xlabel="log π − log π_old", ylabel="log π − log π_engine")  # fmt: skip
    lengths, lam, period, cuts = torch.arange(1, 61), 0.8, 10, []
    budget = toggle_budgets([range(10, 51)], 25.0)
    for axis, share, word in zip(axes[1:], (0.9, 0.5), ("most are right", "half are right")):
        earned = torch.where(lengths * 7 % 60 < 60 * share, 1.0, 0.0)
        paid = torch.stack([toggle_rewards(earned, lengths, lengths * 0, budget, step, period, lam) for step in range(40)], dim=1)
        axis.imshow((paid + earned[:, None]).numpy(), origin="lower", aspect="auto", extent=(0, 40, 0.5, 60.5), interpolation="nearest",
                    cmap=plt.matplotlib.colors.ListedColormap([PAPER, RED, GREEN]), vmin=0, vmax=2)  # fmt: skip
        axis.axhline(budget.item(), color="black", linestyle=":")
        axis.set(title=f"Toggle, {word} (mean {earned.mean():.1f}, λ = {lam})", xlabel="iteration", ylabel="tokens of the response",
                 xticks=range(5, 40, period), xticklabels=[f"phase {toggle_phase(step, period)}" for step in range(0, 40, period)])  # fmt: skip
        cuts.append(int((paid < earned[:, None])[:, 0].sum()))
    figure.legend(handles=[plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (GREEN, RED, PAPER)], ncols=3, loc="outside lower center",
                  labels=["right, and paid", "right, and longer than the budget: not paid", "wrong"], frameon=False)  # fmt: skip
    return figure, (f"the gradient passes on {passes.double().mean():.1%} of the square; with a budget of {budget.item():g} tokens phase 0 takes the "
                    f"reward of {cuts[0]} right responses where most are right, and of {cuts[1]} where half are")  # fmt: skip


def swarm_lanes():
    """One question of eight rows, answered alone and with a subtask for each row: answers of a model as boxes, over critical steps."""
    tokenizer, question = Tokenizer(), lookups.draw(random.Random(0), "wide", 8, steps=40)
    played = []
    for writer in (lookups.serial, lookups.planned):
        log, limits = Log(None), Limits(critical_steps=40, main_steps=40, sub_steps=5, own_calls=1)
        asyncio.run(Swarm(question.text, lookups.scripted(tokenizer, writer(question)), Corpus.of(question.pages), log, limits,
                          subpolicy=lookups.ScriptedSubagents(tokenizer)).run())  # fmt: skip
        played.append(log.events)
    lanes = [len(facts(events)["agents"]) for events in played]
    figure, axes = plt.subplots(2, 1, figsize=(13, 6.4), sharex=True, layout="constrained", height_ratios=[1 + lane for lane in lanes])
    for axis, events, word in zip(axes, played, ("alone", "with subagents")):
        agents = facts(events)["agents"]
        for row, agent in enumerate(agents):
            for box in agent["boxes"]:
                if box["what"] == "answer":
                    axis.barh(row, 0.94, left=box["from"] + 0.03, height=0.8, color=ORANGE if box["critical"] else BLUE)
        stages = episode(events)
        axis.set(title=f"{word}: {critical_steps(stages)} critical steps, {total_steps(stages)} in all", ylim=(len(agents) - 0.4, -0.6))
        axis.set_yticks(range(len(agents)), ["orchestrator" if agent["name"] == "main" else agent["messages"][1]["text"] for agent in agents])
    axes[1].set(xlabel="critical steps (orange: the critical path)", xlim=(0, critical_steps(episode(played[0]))))
    alone, together = (critical_steps(episode(events)) for events in played)
    work = total_steps(episode(played[1]))
    return figure, f"{len(question.truth)} items to look up: {alone} critical steps alone, {together} with subagents; everybody together takes {work} steps"


def one_wrong_operation():
    """A tiny model against itself with one wrong attention: error by depth, and what the oracle says."""
    model = golden_models.build("tiny", 0)
    prompt, op, layer = standard_prompts(model.config)["text"], OPS["mla_attention"], itertools.count()
    wrong = next(suspect.wrong for suspect in op.suspects if suspect.name == "own_scale")
    theirs = capture(model, prompt, replaced={op.name: lambda *given: (wrong if next(layer) == 1 else op.reference)(*given)})
    rows = trace_prompt(model, prompt, Theirs({name: tap.output for name, tap in theirs.items()}))
    figure, axis = plt.subplots(figsize=(13, 5), layout="constrained")
    for label, style, colour in (("error", ".-", BLUE), ("own", "x", RED)):
        axis.semilogy([max(getattr(row, label), 1e-8) for row in rows], style, color=colour, label={"error": "error", "own": "own error"}[label])
    axis.axhline(TOLERANCE[torch.float32], color=GREY, linestyle="--", label="tolerance")
    guilty = [place for place, row in enumerate(rows) if row.diverges]
    axis.annotate(rows[guilty[0]].tap, (guilty[0], rows[guilty[0]].own), (guilty[0] - 1, 3), ha="right", arrowprops={"arrowstyle": "->"})
    begins = {row.tap.rpartition(".layers.")[2].split(".")[0]: place for place, row in reversed(list(enumerate(rows))) if ".layers." in row.tap}
    axis.set_xticks(list(begins.values()), [f"layer {layer}" for layer in begins])
    axis.set(title="Every operation of one forward pass, one of them wrong", xlabel="operation", ylabel="relative error (0 at the bottom)",
             ylim=(3e-9, 30))  # fmt: skip
    axis.legend(frameon=False, loc="center left")
    differ = sum(row.status == "DIFF" for row in rows)
    return figure, (f"{differ} of {len(rows)} results have numbers beyond the tolerance, {len(guilty)} operation is wrong: "
                    f"{rows[guilty[0]].tap}, {rows[guilty[0]].cause}")  # fmt: skip


PICTURES = dict(enumerate((tokens, packed_rows, pooled_clip, yarn, expert_load, muon_clip, abilities, pipeline, engine_slots, gradient_mask,
                           swarm_lanes, one_wrong_operation), 1))  # fmt: skip


# --------------------------------------------------------------------------------------------- command line


def sittings():
    """The text of each sitting, {number: text}."""
    parts = re.split(r"^## (\d+)\. ", COURSE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2])}


def listing(number):
    """The Python file that a sitting shows."""
    return re.search(r"^```python\n(.*?)^```", sittings()[number], re.DOTALL | re.MULTILINE)[1]


def main(arguments=None):
    """The command line. Returns the exit code: 0, or 2 with one line for misuse."""
    parser = argparse.ArgumentParser(prog="course.py", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("picture", "bug"), help="draw the picture, or write the listing, of a sitting")
    parser.add_argument("number", type=int, help=f"of the sitting, 1 to {len(PICTURES)}")
    parser.add_argument("--out", help="file to write; default picture-N.png, my_bug_N.py")
    options = parser.parse_args(arguments)
    number = options.number
    try:
        if number not in PICTURES:
            raise CourseError(f"there is no sitting {number}: choose 1 to {len(PICTURES)}")
        if options.what == "bug":
            path = pathlib.Path(options.out or f"my_bug_{number}.py")
            if path.exists():
                raise CourseError(f"{path} exists already: choose another name with --out")
            write_file(path, listing(number))
            print(path)
        else:
            with one_thread():
                figure, words = PICTURES[number]()
            path = options.out or f"picture-{number}.png"
            save_figure(figure, path)
            print(f"{path}: {words}")
    except (ValueError, OSError) as error:
        print(f"course.py {options.what}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
