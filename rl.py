"""Reinforcement learning of K2.5: one iteration samples, judges, and moves the policy — report 2.3, 4.4.2, appendix D.

    prompts → Environment, RolloutManager, Engine → rollouts (ids, what was generated, log-probs, rewards)
            → Toggle → group advantages → policy objective → gradient → MuonClip, QK-Clip, router biases

    with Learner(model, environment, pool, tokenizer, RLConfig(), seed=0) as learner:
        for _ in range(50):
            rollouts, row = learner.iterate()

A rollout is trained on as the token ids that were sampled: nothing is decoded and encoded again. Its recorded log-probs
stay beside those that the trainer computes again before it moves, and the objective keeps the two apart.

Public names: RLError, RLConfig, CONTROLS, PolicyBatch, policy_batches, policy_logprobs, PolicyResult, policy_step,
control_lengths, length_penalty, sample_groups, Learner.
Letters: B rows, T tokens, R responses, G prompts, H heads, E experts.     Tests: pytest tests/test_rl.py
"""

import asyncio
import dataclasses
import math
import time
from dataclasses import dataclass

import torch

from engine import Engine
from media import pack
from moe import balance_bias_
from objective import add_up, count_tokens, mismatch, place_logprobs, policy_objective_fused, toggle_budgets, toggle_phase
from objective import toggle_rewards, token_logprobs
from optim import MuonClip
from rollout import RolloutManager, Sampling, derive
from step import clip_logits

CONTROLS = ("none", "toggle", "rigid", "penalty")


class RLError(ValueError):
    """Settings or rollouts that cannot be trained on; one line says which."""


@dataclass(frozen=True)
class RLConfig:
    """How the policy is sampled and moved; each field is a flag."""

    prompts: int = 16  # G of an iteration
    responses: int = 8  # to each prompt
    ahead: int = 0  # prompts in flight beyond those: their rollouts go on in the next iteration, under its weights
    slots: int = 64  # of the engine: requests that run at once
    capacity: int = 640  # most tokens of a conversation
    max_new_tokens: int = 240  # of one answer
    lr: float = 1e-3  # of Muon's matrices
    adamw_lr: float = 3e-4  # of everything else
    weight_decay: float = 0.0
    control: str = "none"  # of lengths: none | toggle | rigid | penalty
    period: int = 4  # m of Toggle: iterations per phase
    percentile: float = 30.0  # ρ of the budgets, among the lengths of correct responses
    lam: float = 0.75  # λ: accuracy from which on Toggle's budget binds
    penalty: float = 0.5  # weight of the length penalty
    low: float = -0.5  # α: log-ratio below which a token gets no policy gradient
    high: float = 0.5  # β: log-ratio above which it gets none
    tau: float = 0.01  # τ: weight of the squared log-ratio
    cap: float = 2.0  # of the weight that corrects the engine's rounding
    temperature: float = 1.0  # that was sampled at
    minibatches: int = 1  # optimizer steps per iteration, each on its own share of the prompts
    rows: int = 32  # B: rollouts per forward pass
    clip_norm: float = 1.0  # largest gradient norm
    qk_clip: float = 100.0  # τ of QK-Clip
    balance_gamma: float = 0.0  # γ of the router bias

    def __post_init__(self):
        if not self.low < 0 < self.high:
            raise RLError(f"low is {self.low} and high {self.high}: log-ratio bounds need low < 0 < high")
        for name in ("cap", "temperature", "clip_norm", "qk_clip"):
            if not getattr(self, name) > 0:
                raise RLError(f"{name} is {getattr(self, name)}: it must be positive")
        for name in ("minibatches", "rows", "prompts", "responses", "slots", "capacity", "max_new_tokens", "period"):
            if getattr(self, name) < 1:
                raise RLError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.ahead < 0 or not 0 <= self.percentile <= 100:
            raise RLError(f"ahead is {self.ahead}, percentile {self.percentile}: expected ahead ≥ 0 and a percentile in 0 … 100")
        if self.control not in CONTROLS:
            raise RLError(f"control {self.control!r}: use one of {', '.join(CONTROLS)}")


# --------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class PolicyBatch:
    """Some rollouts side by side, padded on the right."""

    ids: torch.Tensor  # (B,T) int64
    segment_ids: torch.Tensor  # (B,T) int64, −1 is padding
    mask: torch.Tensor  # (B,T) bool: generated tokens
    owner: torch.Tensor  # (B,T) int64: place of the rollout among those of the step
    engine_logprobs: torch.Tensor  # (B,T) float32, NaN where nothing was generated
    patches: torch.Tensor | None  # (L,588) of all pictures, rows in order
    grid_thw: torch.Tensor | None


def policy_batches(rollouts, rows, pad, device="cpu", dtype=torch.float32):
    """Batches of up to `rows` rollouts of similar length, so that little is padding. pad: int — token id; dtype: of patches."""
    order = sorted(range(len(rollouts)), key=lambda j: (len(rollouts[j].ids), j))
    return [_batch([(j, rollouts[j]) for j in order[start : start + rows]], pad, device, dtype) for start in range(0, len(order), rows)]


def _batch(numbered, pad, device, dtype):
    longest = max(len(rollout.ids) for _, rollout in numbered)
    shape = len(numbered), longest
    ids, segments = torch.full(shape, pad), torch.full(shape, -1)
    mask, owner = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.long)
    for row, (number, rollout) in enumerate(numbered):
        length = len(rollout.ids)
        ids[row, :length] = torch.tensor(rollout.ids)
        segments[row, :length], owner[row] = 0, number
        mask[row, :length] = torch.tensor(rollout.generated)
    engine = place_logprobs([rollout.logprobs for _, rollout in numbered], mask)
    items = [item for _, rollout in numbered for item in rollout.items]
    patches, grids = pack(items) if items else (None, None)
    return PolicyBatch(*(x.to(device) for x in (ids, segments, mask, owner, engine)),
                       *(None if x is None else x.to(device) for x in (None if patches is None else patches.to(dtype), grids)))  # fmt: skip


def policy_logprobs(model, batch, temperature, want_max=False):
    """log π of every token under the model. Returns ((B,T) float, NaN at the first tokens; Stats of the pass)."""
    media = None if batch.patches is None else model.encode_media(batch.patches, batch.grid_thw)
    hidden, stats = model.hidden(model.embed(batch.ids, media), segment_ids=batch.segment_ids, want_max=want_max)
    return token_logprobs(hidden, model.language_model.lm_head.weight, batch.ids, temperature), stats


# ------------------------------------------------------------------------------------------- the step


@dataclass(frozen=True)
class PolicyResult:
    """What one iteration's optimizer steps measured, averaged over them; Δ is trainer less engine, in nats per token."""

    objective: float  # J
    masked: float  # share of tokens whose policy gradient is masked
    moved: float  # mean |log π_θ − log π_old|
    entropy: float  # nats per token, estimated
    mismatch: float  # mean |Δ| before the first step
    mismatch_kl: float  # KL(engine ‖ trainer), estimated
    truncated: float  # share of tokens whose correction was capped
    grad_norm: float
    max_logit: float
    tokens: int  # generated tokens trained on


def policy_step(model, optimizer, rollouts, rewards, t):
    """Move the policy on one iteration's rollouts: `minibatches` optimizer steps, each on the prompts of its own share.

    J's baseline and N are those of each share (objective.py); a share keeps all responses of its prompts. log π_old is
    computed once, before the first step. The rewards are given apart from the rollouts: Toggle may have changed them.
    model: K25; optimizer: MuonClip; rollouts: list of R Rollout, `group` names the prompt; rewards: (R,) float; t: RLConfig.
    Returns PolicyResult. Raises RLError when nothing can be learned from, ObjectiveError for missing log-probs.
    """
    weight = model.language_model.lm_head.weight
    names = sorted({rollout.group for rollout in rollouts})
    shares = [[j for j, rollout in enumerate(rollouts) if names.index(rollout.group) % t.minibatches == share] for share in range(t.minibatches)]
    prepared = []
    for share in [share for share in shares if any(rollouts[j].valid for j in share)]:
        own = [rollouts[j] for j in share]
        batches = policy_batches(own, t.rows, model.config.pad_token_id, weight.device, weight.dtype)
        with torch.no_grad():
            prepared.append((share, own, batches, [policy_logprobs(model, batch, t.temperature)[0] for batch in batches]))
    if not prepared:
        raise RLError(f"none of {len(rollouts)} rollouts is valid: nothing to learn from; the first says: {rollouts[0].info if rollouts else 'none'}")
    gaps, parts, norms, logits, tokens = [], [], [], [], 0
    for share, own, batches, old in prepared:
        groups = torch.tensor([names.index(rollout.group) for rollout in own], device=weight.device)
        valid = torch.tensor([rollout.valid for rollout in own], device=weight.device)
        wanted = rewards[share].to(weight.device, torch.float32)
        number = sum(count_tokens(batch.mask, batch.owner, valid) for batch in batches)
        gaps += [(mismatch(now, batch.engine_logprobs, batch.mask, t.cap), int(batch.mask.sum())) for now, batch in zip(old, batches)]
        objective, norm, largest = _optimizer_step(model, optimizer, batches, old, (wanted, groups, valid), number, t)
        parts, norms, logits, tokens = [*parts, objective], [*norms, norm], [*logits, largest], tokens + number
    mean = lambda name: sum(float(getattr(part, name)) for part in parts) / len(parts)  # noqa: E731
    gap = lambda name: sum(float(getattr(g, name)) * n for g, n in gaps) / max(sum(n for _, n in gaps), 1)  # noqa: E731
    return PolicyResult(mean("value"), mean("masked"), mean("moved"), mean("entropy"), gap("mean"), gap("kl"), gap("truncated"),
                        sum(norms) / len(norms), max(logits), tokens)  # fmt: skip


def _optimizer_step(model, optimizer, batches, old, judged, number, t):
    """One step of MuonClip up J, then QK-Clip and the router biases. Returns (Objective, gradient norm, largest logit)."""
    parts, counts, largest = [], None, None
    for batch, before in zip(batches, old):
        logprobs, stats = policy_logprobs(model, batch, t.temperature, want_max=True)
        part = policy_objective_fused(logprobs, before, batch.engine_logprobs, batch.mask, batch.owner, *judged, number,
                                      t.low, t.high, t.tau, t.cap)  # fmt: skip
        (model.config.aux_loss_alpha * stats.balance_loss * len(batch.ids) / sum(len(b.ids) for b in batches) - part.value).backward()
        parts.append(part)
        counts = stats.counts if counts is None else tuple(a + b for a, b in zip(counts, stats.counts))
        largest = stats.max_logits if largest is None else torch.maximum(largest, stats.max_logits)
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], t.clip_norm).item()
    if math.isfinite(norm):
        optimizer.step()
        clip_logits(model, largest, t.qk_clip)
        for router, count in zip(model.routers(), counts):
            balance_bias_(router.e_score_correction_bias, count, t.balance_gamma)
    optimizer.zero_grad(set_to_none=True)
    return add_up(parts), norm, float(largest.max())


# ---------------------------------------------------------------------------------- lengths of answers


def length_penalty(correct, lengths, groups, valid):
    """Kimi k1.5's length reward: λ_j = ½ − (|y_j| − least) / (most − least) among the responses to one prompt; correct
    ones get λ_j, others min(0, λ_j); 0 where all are equally long.

    correct, valid: (R,) bool; lengths: (R,) int64; groups: (R,) int64. Returns (R,) float32; 0 where invalid.
    """
    same = (groups[:, None] == groups) & valid  # (R,R)
    least = torch.where(same, lengths, torch.iinfo(lengths.dtype).max).amin(1)
    most = torch.where(same, lengths, 0).amax(1)
    spread = (most - least).clamp(min=1)
    found = torch.where(most > least, 0.5 - (lengths - least) / spread, 0.0)
    return torch.where(correct, found, found.clamp(max=0.0)).masked_fill(~valid, 0.0)


def control_lengths(rewards, correct, lengths, groups, prompts, budgets, iteration, valid, t):
    """The rewards that are trained on: as Toggle, a rigid budget or a length penalty leave them.

    rewards: (R,) float; correct, valid: (R,) bool; lengths, groups: (R,) int64; prompts: (R,) int64 — place of the prompt in
    the pool; budgets: (P,) float, of the whole pool, ∞ for none; t: RLConfig. Returns (R,).
    """
    if t.control == "toggle":
        return toggle_rewards(rewards, lengths, *_renumbered(groups, prompts, budgets), iteration, t.period, t.lam, valid)
    if t.control == "rigid":  # the budget always binds
        return torch.where((lengths <= budgets[prompts]) | ~valid, rewards, 0.0)
    if t.control == "penalty":
        return rewards + t.penalty * length_penalty(correct, lengths, groups, valid)
    return rewards.clone()


def _renumbered(groups, prompts, budgets):
    """Groups as 0, 1, …, and the budget of each: one prompt may stand in two groups."""
    _, number = groups.unique(return_inverse=True)
    own = torch.full((int(number.max()) + 1,), math.inf)
    own[number] = budgets[prompts]
    return number, own


# ------------------------------------------------------------------------------------------- sampling


def sample_groups(model, environment, tasks, tokenizer, samples, seed, *, slots=64, capacity=512, sampling=None):
    """Some responses to each of some tasks, by a copy of the model, without training: for measuring.

    samples: int — responses to each; seed: int — of the draws. Returns a list of tuples of Rollout, as the tasks.
    """
    engine = Engine(model, slots, capacity)

    async def script():
        manager = RolloutManager(engine, environment, tokenizer, sampling or Sampling())
        for number, task in enumerate(tasks):
            manager.submit(task, [derive(seed, number, response) for response in range(samples)])
        return await manager.collect(len(tasks), oldest=True)

    return asyncio.run(script())


class Learner:
    """The iterations of one policy over a pool of prompts; a context manager.

    model: K25; environment: Environment, or whatever a RolloutManager takes; pool: sequence of tasks with a `passing` score;
    tokenizer: Tokenizer; t: RLConfig; seed: int. The pool is gone through in seeded epochs. With `ahead` groups in flight
    an iteration takes the first whole ones, and what is unfinished goes on under the next weights.
    """

    def __init__(self, model, environment, pool, tokenizer, t, seed=0):
        if not pool:
            raise RLError("the pool of prompts is empty")
        self.model, self.environment, self.pool, self.tokenizer, self.t, self.seed = model, environment, list(pool), tokenizer, t, seed
        self.optimizer = MuonClip.from_named(model.named_parameters(), t.lr, t.adamw_lr, weight_decay=t.weight_decay)
        self.iteration, self.budgets = 0, None  # budgets: (P,), ∞ for none; None until they are estimated
        self._submitted, self._numbers, self._again = 0, {}, []  # prompts so far; those in flight, by group; those to submit again
        self._engine = Engine(model, t.slots, t.capacity)
        self._manager = RolloutManager(self._engine, environment, tokenizer, Sampling(t.max_new_tokens, t.temperature))
        self._runner = asyncio.Runner()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._runner.run(self._manager.cancel())
        self._runner.close()

    def iterate(self):
        """One iteration: sample, judge, control lengths, move. Returns (list of Rollout, dict of what was measured)."""
        t, began = self.t, time.perf_counter()
        if t.control in ("toggle", "rigid") and self.budgets is None:
            self.budgets = self.estimate_budgets()
        numbers, rollouts = self._sample()
        sampled = time.perf_counter()
        measured = self._measured(numbers, rollouts)
        rewards, correct, lengths, groups, prompts, valid = measured
        shaped = control_lengths(*measured[:5], self.budgets, self.iteration, valid, t)
        result = policy_step(self.model, self.optimizer, rollouts, shaped, t)
        self._engine.update(self.model, self.iteration + 1)
        known, tokens = max(int(valid.sum()), 1), int(lengths.sum())
        mean = lambda x: float((x * valid).sum() / known)  # noqa: E731
        row = {
            "iteration": self.iteration, "reward": mean(rewards), "passed": mean(correct.float()), "length": mean(lengths.float()),
            "trained_reward": mean(shaped), "cut": mean((shaped < rewards).float()), "cut_off": mean(_cut_off(rollouts)),
            "phase": toggle_phase(self.iteration, t.period) if t.control == "toggle" else None,
            "invalid": len(rollouts) - int(valid.sum()),
            "stale": sum(version < self.iteration for r in rollouts for version in r.versions) / max(tokens, 1),
            **dataclasses.asdict(result),
            "seconds": time.perf_counter() - began, "tokens_per_s": tokens / max(sampled - began, 1e-9),
        }  # fmt: skip
        self.iteration += 1
        return rollouts, row

    def estimate_budgets(self):
        """Toggle's budget of each prompt of the pool, from the correct ones among `responses` responses of the present policy."""
        t = self.t
        groups = sample_groups(self.model, self.environment, self.pool, self.tokenizer, t.responses, derive(self.seed, "budgets"),
                               slots=t.slots, capacity=t.capacity, sampling=Sampling(t.max_new_tokens, t.temperature))  # fmt: skip
        return toggle_budgets([[sum(r.generated) for r in group if r.valid and r.reward >= task.passing]
                               for task, group in zip(self.pool, groups)], t.percentile)  # fmt: skip

    def _sample(self):
        """Rollouts of `prompts` whole groups, whose group is the prompt's number, and the place of each one's prompt in the pool."""

        async def script():
            while len(self._numbers) < self.t.prompts + self.t.ahead:
                number = self._again.pop(0) if self._again else self._submitted
                self._submitted = max(self._submitted, number + 1)
                seeds = [derive(self.seed, number, response) for response in range(self.t.responses)]
                self._numbers[self._manager.submit(self.pool[self._place(number)], seeds)] = number
            return await self._manager.collect(self.t.prompts)

        rollouts = []
        for group in self._runner.run(script()):
            number = self._numbers.pop(group[0].group)
            rollouts += [dataclasses.replace(rollout, group=number) for rollout in group]
        return [self._place(rollout.group) for rollout in rollouts], rollouts

    def _place(self, number):
        """Place in the pool of the prompt of that number: seeded epochs."""
        epoch, place = divmod(number, len(self.pool))
        generator = torch.Generator().manual_seed(derive(self.seed, "epoch", epoch))
        return int(torch.randperm(len(self.pool), generator=generator)[place])

    def _measured(self, places, rollouts):
        """(rewards, correct, lengths, groups, prompts, valid) of the rollouts, tensors (R,)."""
        rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float32)
        passing = torch.tensor([self.pool[place].passing for place in places])
        valid = torch.tensor([r.valid for r in rollouts])
        return (rewards, (rewards >= passing - 1e-6) & valid, torch.tensor([sum(r.generated) for r in rollouts]),
                torch.tensor([r.group for r in rollouts]), torch.tensor(places), valid)  # fmt: skip

    # -- going on later

    def state(self):
        """What `load_state` needs beside the weights and the optimizer's state: JSON."""
        budgets = None if self.budgets is None else [None if math.isinf(b) else b for b in self.budgets.tolist()]
        waiting = sorted([*self._numbers.values(), *self._again])
        return {"iteration": self.iteration, "submitted": self._submitted, "waiting": waiting, "budgets": budgets}

    def load_state(self, state):
        """Go on behind a saved iteration, once model and optimizer are what they were. Prompts that were in flight are
        begun again; without `ahead` there are none, and the run is what it would have been, to the last bit."""
        self.iteration, self._submitted, self._again = state["iteration"], state["submitted"], list(state["waiting"])
        budgets = state["budgets"]
        self.budgets = None if budgets is None else torch.tensor([math.inf if b is None else b for b in budgets])
        self._engine.update(self.model, self.iteration)


def _cut_off(rollouts):
    """Which of them ended because there was no room: (R,) float."""
    return torch.tensor([float(r.info.finish == "length") for r in rollouts])
