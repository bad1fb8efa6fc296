"""The policy objective of K2.5's reinforcement learning, Toggle, and the choice of trajectories — report 2.3, 4.4.2.

K responses per prompt from π_old, N all generated tokens of the batch, r̄ the mean reward of the prompt's responses:

    J = (1/N) Σ_j Σ_i [ w_ji · Clip(ρ_ji, α, β) · (r_j − r̄) − τ (log ρ_ji)² ],    ρ = π_θ / π_old per token,  to be maximised

- Clip is a gradient mask by log-ratio, α < 0 < β: where log ρ has left [α, β] the value is that of the bound and the
  policy gradient is 0, *whatever the sign of the advantage*. PPO lets the gradient through that leads back.
- The squared term has no ½ and is kept where Clip masks: there it is the only gradient, and pulls back.
- The advantage r − r̄ is not divided by a standard deviation; the sum is divided by tokens, not by responses.
- N is given, not counted: of the whole batch, also when only a microbatch of it is at hand. Parts then add up exactly.
- Responses whose reward is invalid (the verifier failed, the rollout was rejected) are not there: they enter neither the
  baseline, nor N, nor either term.

Three log-probabilities of each token, and why they are three arguments:

    logprobs          log π_θ: of the weights being trained, with gradient
    old_logprobs      log π_old: of the weights that sampled, computed again by the trainer; or the engine's, if it was not
    engine_logprobs   of the inference engine, recorded when it drew the token; nobody can compute them again

Trainer and engine round differently, so w = min(π_old / π_engine, cap) corrects for what really was sampled; with old =
engine it is 1 and J is the report's formula. A trainer that has only one place for π_old fills it with what it computes
at the beginning of each step: then ρ = 1 for ever and nothing is clipped, silently. Here that cannot happen: a token's
policy gradient passes only if log π_θ − log π_old *and* log π_θ − log π_engine lie in [α, β]. The engine's record comes
with the token, so that a stale token is masked whatever was passed as old.

Log-probabilities are those of the distribution that was sampled: softmax(logits / temperature). A missing one is NaN, never
0.0, which would say that the token was certain; NaN at a generated token is refused.

Layouts: tensors of tokens have any shape — padded (B,T), or packed (T,) — and `owner` names each token's response among
the R of the batch. rewards, groups and valid are always those of the whole batch.

Run: python -c "import objective; objective.gradient_pass_diagram('gradient_pass.png')"

Public names: ObjectiveError, token_logprobs, place_logprobs, group_advantages, count_tokens, Mismatch, mismatch,
Objective, policy_objective_reference, policy_objective_fused, add_up, ppo_objective, gradient_pass_diagram,
toggle_phase, toggle_budgets, toggle_rewards, rft_select.
Letters: B rows, T tokens, C hidden, U vocabulary, R responses, G prompts.     Tests: pytest tests/test_objective.py
"""

import dataclasses
import math
import os
import pathlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class ObjectiveError(ValueError):
    """Tensors that do not fit together, missing log-probabilities or settings that make no sense; one line says which."""


# ------------------------------------------------------------------------------------------- log-probs


def token_logprobs(hidden, head, ids, temperature=1.0, chunk=1024):
    """Log-probability of each token given those before it.

        logprobs[t] = log softmax(head · hidden[t−1] / temperature)[ids[t]],    logprobs[0] = NaN: nothing stands before it

    Entry t belongs to token t, as in the mask and in what the engine recorded. The temperature divides the logits: dividing
    the log-probabilities would not leave a distribution. At most (chunk,U) logits exist at a time; each chunk is computed
    again in the backward pass.
    hidden: (...,T,C) float — of the decoder's final norm; head: (U,C); ids: (...,T) int64; temperature: float > 0, the one
    that was sampled at. Returns (...,T) in at least float32, nats. Raises ObjectiveError.
    """
    if hidden.shape[:-1] != ids.shape:
        raise ObjectiveError(f"hidden states {tuple(hidden.shape)} for ids {tuple(ids.shape)}: one per token is needed "
                             "(were placeholders of media expanded on one side only?)")  # fmt: skip
    if not temperature > 0:
        raise ObjectiveError(f"temperature {temperature}: must be above 0; greedy tokens have no log-probability to train on")

    def part(rows, targets):
        logits = F.linear(rows, head)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # (chunk,U)
        return -F.cross_entropy(logits, targets, reduction="none")

    rows, targets = hidden[..., :-1, :].flatten(0, -2), ids[..., 1:].flatten()
    if len(rows) > chunk and torch.is_grad_enabled():
        found = [checkpoint(part, r, t, use_reentrant=False) for r, t in zip(rows.split(chunk), targets.split(chunk))]
    else:
        found = [part(r, t) for r, t in zip(rows.split(chunk), targets.split(chunk))]
    shape = (*ids.shape[:-1], ids.shape[-1] - 1)
    return F.pad(torch.cat(found).view(shape), (1, 0), value=math.nan)


def place_logprobs(recorded, mask):
    """Recorded log-probabilities in the places of their tokens.

    recorded: R sequences of floats — one for each generated token, in order; mask: (R,T) bool, True at generated tokens.
    Returns (R,T) float32, NaN elsewhere. Raises ObjectiveError where the numbers of both differ or one is missing (None,
    NaN): nothing is padded, a guess would be trained on.
    """
    if len(recorded) != len(mask):
        raise ObjectiveError(f"{len(recorded)} recorded responses for a mask of {len(mask)} rows")
    placed = torch.full(mask.shape, math.nan)
    for row, (values, places) in enumerate(zip(recorded, mask.cpu())):
        if len(values) != int(places.sum()):
            raise ObjectiveError(f"response {row}: {len(values)} recorded log-probs for {int(places.sum())} generated tokens")
        missing = [place for place, value in enumerate(values) if value is None or not math.isfinite(value)]
        if missing:
            raise ObjectiveError(f"response {row}: the log-prob of generated token {missing[0]} is missing")
        placed[row, places] = torch.tensor(values, dtype=torch.float32)
    return placed.to(mask.device)


# ------------------------------------------------------------------------------------------ advantages


def group_advantages(rewards, groups, valid):
    """Each response's reward less the mean of its prompt's: r_j − r̄, not divided by anything; 0 where invalid.

    rewards: (R,) float, whatever where invalid, NaN too; groups: (R,) int64 — prompt of each response, in any order;
    valid: (R,) bool. Returns (R,), dtype of rewards; the sum over the valid responses of each prompt is 0.
    """
    return (rewards - _prompt_means(rewards, groups, valid)).masked_fill(~valid, 0.0)


def _prompt_means(rewards, groups, valid):
    """The mean over the valid responses of each response's prompt, 0 where there is none: (R,). Without atomic additions, so that
    a GPU gives the same bits in every run."""
    members = (groups[:, None] == groups) & valid  # (R,R)
    return torch.where(members, rewards, 0.0).sum(1) / members.sum(1).clamp(min=1)


def count_tokens(mask, owner, valid):
    """N: the generated tokens of the valid responses. mask, owner: of all tokens of the batch; valid: (R,). Returns int."""
    return int(_counted(mask, owner, valid).sum())


def _counted(mask, owner, valid):
    return mask & valid[owner.clamp(min=0)]


# --------------------------------------------------------------------- mismatch of trainer and engine


@dataclass(frozen=True)
class Mismatch:
    """How far the trainer's π_old is from what the engine recorded, over the generated tokens; Δ = log π_old − log π_engine."""

    weights: torch.Tensor  # min(exp Δ, cap), shape of the tokens; 1 where nothing was generated
    mean: torch.Tensor  # () mean |Δ|, nats
    largest: torch.Tensor  # () max |Δ|
    kl: torch.Tensor  # () mean of exp Δ − 1 − Δ: estimates KL(π_engine ‖ π_old), each term is ≥ 0
    truncated: torch.Tensor  # () share of tokens with exp Δ > cap


def mismatch(old_logprobs, engine_logprobs, mask, cap):
    """Truncated importance weights of the trainer's π_old against the engine's, and statistics of their gap.

    old_logprobs, engine_logprobs: (...) float; mask: (...) bool — generated tokens; cap: float > 0, 2 say.
    Returns Mismatch. Raises ObjectiveError for log-probs that are missing at generated tokens.
    """
    _check_logprobs(mask, old_logprobs=old_logprobs, engine_logprobs=engine_logprobs)
    gap = old_logprobs.masked_fill(~mask, 0.0) - engine_logprobs.masked_fill(~mask, 0.0)
    number = mask.sum().clamp(min=1)
    return Mismatch(
        weights=gap.exp().clamp(max=cap).masked_fill(~mask, 1.0),
        mean=gap.abs().sum() / number,
        largest=gap.abs().max() if gap.numel() else gap.new_zeros(()),
        kl=(gap.expm1() - gap).sum() / number,
        truncated=(mask & (gap > math.log(cap))).sum().to(gap.dtype) / number,
    )


# ------------------------------------------------------------------------------------------- objective


@dataclass(frozen=True)
class Objective:
    """J of a batch, or the part of it that a microbatch is; all are sums over its tokens divided by N, so parts add up."""

    value: torch.Tensor  # () surrogate − penalty, with gradient; to be maximised
    surrogate: torch.Tensor  # () the first term
    penalty: torch.Tensor  # () τ (log ρ)²
    masked: torch.Tensor  # () share of tokens whose policy gradient is masked
    moved: torch.Tensor  # () mean |log π_θ − log π_old|, nats
    drift: torch.Tensor  # () mean |log π_θ − log π_engine|, nats
    entropy: torch.Tensor  # () mean −log π_θ: estimates the entropy per token while π_θ is near what sampled, nats


def add_up(parts):
    """The Objective of a batch from those of its microbatches, without gradient."""
    names = [field.name for field in dataclasses.fields(Objective)]
    return Objective(**{name: sum(getattr(part, name).detach() for part in parts) for name in names})


def policy_objective_reference(
    logprobs, old_logprobs, engine_logprobs, mask, owner, rewards, groups, valid, tokens, low, high, tau, cap
):
    """J, response by response and token by token; see the module.

    logprobs, old_logprobs, engine_logprobs: (...) float — log π_θ with gradient, log π_old and log π_engine without;
    mask: (...) bool — generated tokens, all else (prompts, results of tools, padding) may hold anything, NaN too; owner:
    (...) int64 — each token's response, 0…R−1; rewards: (R,) float, groups: (R,) int64, valid: (R,) bool — of the whole
    batch, see `group_advantages`; tokens: int — N, by `count_tokens` of the whole batch; low, high: α < 0 < β, nats,
    both inclusive; tau: τ ≥ 0; cap: float > 0, of w.
    Returns Objective. Raises ObjectiveError.
    """
    _check(logprobs, old_logprobs, engine_logprobs, mask, owner, rewards, groups, valid, tokens, low, high, tau, cap)
    zero = logprobs.flatten()[:0].sum()  # with a gradient, also where nothing counts
    surrogate, penalty, masked, moved, drift, entropy = zero, zero, 0, 0.0, 0.0, 0.0
    for j in range(len(rewards)):
        if not valid[j]:
            continue
        peers = [rewards[k] for k in range(len(rewards)) if groups[k] == groups[j] and valid[k]]
        advantage = rewards[j] - sum(peers) / len(peers)
        mine = mask & (owner == j)
        for now, old, engine in zip(logprobs[mine], old_logprobs.detach()[mine], engine_logprobs.detach()[mine]):
            log_ratio = now - old
            passes = low <= log_ratio <= high and low <= now - engine <= high
            bounded = log_ratio.clamp(low, high)
            ratio = bounded.exp() if passes else bounded.exp().detach()
            surrogate = surrogate + (old - engine).exp().clamp(max=cap) * ratio * advantage
            penalty = penalty + tau * log_ratio**2
            masked = masked + (not passes)
            moved, drift, entropy = moved + log_ratio.detach().abs(), drift + (now.detach() - engine).abs(), entropy - now.detach()
    return _objective(tokens, surrogate, penalty, masked, moved, drift, entropy)


def policy_objective_fused(
    logprobs, old_logprobs, engine_logprobs, mask, owner, rewards, groups, valid, tokens, low, high, tau, cap
):
    """The same, all tokens at once."""
    _check(logprobs, old_logprobs, engine_logprobs, mask, owner, rewards, groups, valid, tokens, low, high, tau, cap)
    counted = _counted(mask, owner, valid)
    # What is not counted becomes 0 before any arithmetic: NaN times 0 is NaN, forwards and backwards.
    now, old, engine = (x.masked_fill(~counted, 0.0) for x in (logprobs, old_logprobs.detach(), engine_logprobs.detach()))
    advantage = group_advantages(rewards, groups, valid)[owner.clamp(min=0)]
    log_ratio, drift = now - old, now - engine
    passes = (log_ratio >= low) & (log_ratio <= high) & (drift >= low) & (drift <= high)
    ratio = log_ratio.clamp(low, high).exp()
    ratio = torch.where(passes, ratio, ratio.detach())
    weight = (old - engine).exp().clamp(max=cap)
    surrogate = torch.where(counted, weight * ratio * advantage, 0.0).sum()
    penalty = tau * log_ratio.square().sum()
    masked = (counted & ~passes).sum()
    return _objective(tokens, surrogate, penalty, masked, log_ratio.abs().sum(), drift.abs().sum(), -now.sum())


def _objective(tokens, surrogate, penalty, *statistics):
    statistics = [torch.as_tensor(s, dtype=surrogate.dtype, device=surrogate.device).detach() / tokens for s in statistics]
    return Objective((surrogate - penalty) / tokens, surrogate.detach() / tokens, penalty.detach() / tokens, *statistics)


def _check_logprobs(counted, **named):
    """Refuse other shapes, and at the tokens that count what no log-probability is."""
    for name, values in named.items():
        if values.shape != counted.shape:
            raise ObjectiveError(f"{name} is {tuple(values.shape)}, the mask {tuple(counted.shape)}: one entry per token is needed")
        found = values.detach()[counted]
        bad = ~(found.isfinite() & (found <= 1e-3))  # rounding may leave a certain token a little above 0
        if bad.any():
            first = tuple(counted.nonzero()[bad][0].tolist())
            kind = "missing (NaN)" if found[bad][0].isnan() else f"{found[bad][0].item():g}"
            raise ObjectiveError(f"{name} of the generated token at {first} is {kind}: a finite number of at most 0 is needed")


def _check(logprobs, old_logprobs, engine_logprobs, mask, owner, rewards, groups, valid, tokens, low, high, tau, cap):
    if not low < 0 < high:
        raise ObjectiveError(f"bounds {low} and {high}: they are log-ratios and need low < 0 < high")
    if not (tau >= 0 and cap > 0):
        raise ObjectiveError(f"tau {tau}, cap {cap}: expected tau ≥ 0 and cap > 0")
    if not rewards.shape == groups.shape == valid.shape == rewards.shape[:1]:
        raise ObjectiveError(f"rewards {tuple(rewards.shape)}, groups {tuple(groups.shape)}, valid {tuple(valid.shape)}: "
                             "each needs one entry per response")  # fmt: skip
    if owner.shape != mask.shape:
        raise ObjectiveError(f"owner is {tuple(owner.shape)}, the mask {tuple(mask.shape)}: one entry per token is needed")
    owners = owner[mask]
    if len(owners) and not 0 <= int(owners.min()) <= int(owners.max()) < len(rewards):
        raise ObjectiveError(f"a generated token belongs to response {int(owners.min())} or {int(owners.max())} of {len(rewards)}")
    counted = _counted(mask, owner, valid)
    if not tokens >= max(int(counted.sum()), 1):
        raise ObjectiveError(f"N is {tokens}, but {int(counted.sum())} tokens are here: give that of the whole batch, at least 1")
    if not rewards[valid].isfinite().all():
        raise ObjectiveError("a valid response has no finite reward: mark it invalid")
    _check_logprobs(counted, logprobs=logprobs, old_logprobs=old_logprobs, engine_logprobs=engine_logprobs)


# ------------------------------------------------------------------------------------------ PPO, a peer


def ppo_objective(logprobs, old_logprobs, advantages, low, high):
    """PPO's clipped surrogate of each token, for comparison only: min(ρ A, Clip(ρ, e^low, e^high) A).

    logprobs, old_logprobs, advantages: (...) float. Returns (...); its gradient stops only where going on would gain.
    """
    ratio = (logprobs - old_logprobs).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(math.exp(low), math.exp(high)) * advantages)


def gradient_pass_diagram(path, low=-0.5, high=0.25):
    """Draw where the policy gradient passes, for K2.5 and for PPO, over log-ratio and sign of the advantage.

    The curves are gradients that autograd gives for the functions of this module, at τ = 0. path: of a PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log_ratio = torch.linspace(-1.0, 1.0, 801, dtype=torch.float64)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    panels = {"K2.5: masked by log-ratio alone": _slope_k25, "PPO: masked by log-ratio and sign": _slope_ppo}
    for axis, (title, slope) in zip(axes, panels.items()):
        for advantage, colour, name in ((1.0, "tab:blue", "advantage +1"), (-1.0, "tab:red", "advantage −1")):
            slopes = slope(log_ratio, advantage, low, high)
            axis.plot(log_ratio, slopes, color=colour, label=name)
            axis.fill_between(log_ratio, 0, slopes, color=colour, alpha=0.15)
        for bound, word in ((low, "α"), (high, "β")):
            axis.axvline(bound, color="0.4", linestyle=":", linewidth=1)
            axis.annotate(word, (bound, 1), xycoords=("data", "axes fraction"), xytext=(3, -12), textcoords="offset points")
        axis.axhline(0, color="0.4", linewidth=0.5)
        axis.set(title=title, xlabel="log ρ = log π_θ − log π_old")
    axes[0].set_ylabel("gradient of J by log π_θ of the token")
    axes[0].legend(loc="lower left", frameon=False)
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    os.replace(temporary, path)
    plt.close(figure)


def _slope_k25(log_ratio, advantage, low, high):
    """Gradient by log π_θ: a second response with the opposite reward makes the advantage what is asked."""
    now = log_ratio.clone() - 2.0
    now.requires_grad_()
    old = torch.full_like(log_ratio, -2.0)
    mask, owner = torch.ones_like(log_ratio, dtype=torch.bool), torch.zeros_like(log_ratio, dtype=torch.long)
    rewards = torch.tensor([advantage, -advantage], dtype=torch.float64)
    pair = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool)
    found = policy_objective_fused(now, old, old, mask, owner, rewards, *pair, len(now), low, high, 0.0, 1.0)
    return torch.autograd.grad(found.value * len(now), now)[0]


def _slope_ppo(log_ratio, advantage, low, high):
    now = log_ratio.clone().requires_grad_()
    found = ppo_objective(now, torch.zeros_like(now), torch.full_like(now, advantage), low, high)
    return torch.autograd.grad(found.sum(), now)[0]


# ---------------------------------------------------------------------------------------------- Toggle


def toggle_phase(iteration, period):
    """0 while the budget binds, 1 while it does not: ⌊iteration / period⌋ modulo 2. Needs nothing but the iteration, so
    that a resumed run is in the same phase."""
    if iteration < 0 or period < 1:
        raise ObjectiveError(f"iteration {iteration}, period {period}: expected iteration ≥ 0 and period ≥ 1")
    return iteration // period % 2


def toggle_budgets(correct_lengths, percentile):
    """The token budget of each prompt: the percentile of the lengths of its correct responses, taken once and then frozen.

    Between two lengths it is interpolated linearly: of the sorted n lengths, entry (n − 1) · percentile / 100 from 0. A prompt
    without a correct response has no budget, ∞, and is never cut: nobody knows how long it needs.
    correct_lengths: G sequences of int — lengths, in tokens, of each prompt's correct and valid responses; percentile:
    float, 0…100. Returns (G,) float32. Raises ObjectiveError.
    """
    if not 0 <= percentile <= 100:
        raise ObjectiveError(f"percentile {percentile}: expected 0…100")
    budgets = [torch.tensor(lengths, dtype=torch.float64).quantile(percentile / 100).item() if len(lengths) else math.inf
               for lengths in correct_lengths]  # fmt: skip
    return torch.tensor(budgets)


def toggle_rewards(rewards, lengths, groups, budgets, iteration, period, lam, valid=None):
    """Rewards as Toggle gives them to iteration t.

        phase 0 (⌊t/m⌋ even): r̃_j = r_j · 1{ mean of the prompt's r < λ  or  |y_j| ≤ budget }        phase 1 (odd): r̃ = r

    So the budget binds only where the accuracy is λ or more already, and a response of just the budget is within it. (A
    widely copied reading, mean > λ, cuts the prompts that are still to be learned.)
    rewards: (R,) float; lengths: (R,) int64 — generated tokens; groups: (R,) int64 — prompt, 0…G−1; budgets: (G,) float,
    ∞ for none; iteration: t ≥ 0; period: m ≥ 1; lam: λ; valid: (R,) bool, default all — the mean is over the valid ones,
    and what is invalid stays what it is. Returns (R,), dtype of rewards. Raises ObjectiveError.
    """
    if toggle_phase(iteration, period) == 1:
        return rewards.clone()
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    weak = _prompt_means(rewards, groups, valid) < lam
    return torch.where(weak | (lengths <= budgets[groups]) | ~valid, rewards, 0.0)


# ------------------------------------------------------------------- rejection-sampling fine-tuning


def rft_select(responses, rewards, valid, groups, threshold, most):
    """Which responses to fine-tune on: of each prompt at most `most` different ones, valid and with reward ≥ threshold.

    Within a prompt the higher reward comes first, then the shorter response, then the earlier one; a response of the same
    tokens as one already taken is left out.
    responses: R sequences of token ids; rewards: R floats; valid: R bools; groups: R prompts, any hashable; threshold:
    float; most: int. Tensors may stand for the lists. Returns indices in ascending order, a list of int.
    """
    rewards, valid, groups = (x.tolist() if isinstance(x, torch.Tensor) else x for x in (rewards, valid, groups))
    good = [j for j in range(len(responses)) if valid[j] and rewards[j] >= threshold]
    taken = {}  # prompt → {tokens: index}
    for j in sorted(good, key=lambda j: (-rewards[j], len(responses[j]), j)):
        chosen = taken.setdefault(groups[j], {})
        if len(chosen) < most:
            chosen.setdefault(tuple(responses[j]), j)
    return sorted(j for chosen in taken.values() for j in chosen.values())
