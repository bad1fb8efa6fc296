"""Reinforcement learning of K2.5: one iteration samples, judges, and moves the policy — report 2.3, 4.4.2, appendix D.

    prompts → Environment, RolloutManager, Engine → rollouts (ids, what was generated, log-probs, rewards)
            → Toggle → group advantages → policy objective → gradient → MuonClip, QK-Clip, router biases

A rollout is trained on as the token ids that were sampled: nothing is decoded and encoded again. Its recorded log-probs
stay beside those that the trainer computes again before it moves, and the objective keeps the two apart.

Public names: RLError, RLConfig, PolicyBatch, policy_batches, policy_logprobs, PolicyResult, policy_step.
Letters: B rows, T tokens, R responses, G prompts, H heads, E experts.     Tests: pytest tests/test_rl.py
"""

import math
from dataclasses import dataclass

import torch

from media import pack
from moe import balance_bias_
from objective import add_up, count_tokens, mismatch, place_logprobs, policy_objective_fused, token_logprobs
from step import clip_logits


class RLError(ValueError):
    """Settings or rollouts that cannot be trained on; one line says which."""


@dataclass(frozen=True)
class RLConfig:
    """How the policy is moved; each field is a flag."""

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
        for name in ("minibatches", "rows"):
            if getattr(self, name) < 1:
                raise RLError(f"{name} is {getattr(self, name)}: it must be at least 1")


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
