"""The operations of reinforcement learning: log-probs, advantages, mismatch, the policy objective — K2.5 report 2.3.

Public names: OPS, token_logprobs, group_advantages, mismatch_weights, policy_objective.
Letters: T tokens, C hidden, U vocabulary, R responses, G prompts.     Tests: pytest tests/test_ops_rl.py
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import objective
from op import Op, Suspect, dyadic, normal

# ------------------------------------------------------------------------------------------- log-probs


def token_logprobs(hidden, head, ids, temperature):
    """Log-probability of each token given those before it, from the last hidden states and the output matrix.

        logprobs[t] = log softmax(head · hidden[t−1] / temperature)[ids[t]],    logprobs[0] = NaN

    Entry t belongs to token t. The temperature divides the logits, in at least float32, before the softmax.
    hidden: (T,C) float; head: (U,C) float; ids: (T,) int64; temperature: float > 0, the one that was sampled at.
    Returns logprobs (T,) in at least float32, nats. Source: K2.5 report 2.3; the temperatures of section 7.
    """
    logits = F.linear(hidden, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # (T,U)
    found = logits.log_softmax(1)[:-1].gather(1, ids[1:, None])[:, 0]
    return F.pad(found, (1, 0), value=math.nan)


@st.composite
def _logprob_cases(draw):
    """Logits that are exact in bfloat16; as in the cases of cross_entropy no gradient cancels to nothing."""
    tokens, width, vocabulary = draw(st.integers(2, 7)), draw(st.integers(1, 4)), draw(st.integers(3, 8))
    hidden = F.pad(dyadic(draw, tokens, width, denominator=2, limit=3), (0, 1))  # (T,C)
    head = torch.cat([dyadic(draw, vocabulary, width, denominator=2, limit=3), normal(draw, vocabulary, 1)], dim=1)
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    ids[-1] = (hidden[-2] @ head.T).argmin()
    return {"hidden": hidden, "head": head, "ids": ids, "temperature": draw(st.sampled_from([0.6, 1.0, 2.0]))}


def _logprobs(hidden, head, ids, temperature, change=lambda logits: logits):
    """`token_logprobs` without the temperature's division: change(logits) (T−1,U) instead, of which each token's is taken."""
    logits = F.linear(hidden[:-1], head)
    logits = change(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    return F.pad(logits.gather(1, ids[1:, None])[:, 0], (1, 0), value=math.nan)


def _of_logits(change):
    """`token_logprobs` by change(logits, temperature) → log-probabilities."""
    return lambda hidden, head, ids, temperature: _logprobs(hidden, head, ids, temperature, lambda x: change(x, temperature))


def _early(hidden, head, ids, temperature):
    return token_logprobs(hidden, head, ids, temperature).roll(-1)


def _unshifted(hidden, head, ids, temperature):
    logits = F.linear(hidden, head)
    logprobs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(1)
    return F.pad(logprobs.gather(1, ids[:, None])[1:, 0], (1, 0), value=math.nan)


# ------------------------------------------------------------------------------------------ advantages


def group_advantages(rewards, groups, valid):
    """Each response's reward less the mean reward of its prompt's responses.

        advantage_j = r_j − mean of r_k over the valid k of the same prompt; 0 where j is invalid

    Not divided by a standard deviation.
    rewards: (R,) float, whatever where invalid, NaN too; groups: (R,) int64 — prompt of each response: any numbers, in any
    order; valid: (R,) bool — False: the verifier failed or the rollout was rejected.
    Returns advantages (R,), dtype of rewards. Source: K2.5 report 2.3, equation 1.
    """
    advantages = torch.zeros_like(rewards)
    for j in range(len(rewards)):
        peers = [rewards[k] for k in range(len(rewards)) if groups[k] == groups[j] and valid[k]]
        if valid[j]:
            advantages[j] = rewards[j] - sum(peers) / len(peers)
    return advantages


def _seeded(draw):
    return torch.Generator().manual_seed(draw(st.integers(0, 9999)))


@st.composite
def _batch(draw):
    """rewards, groups and valid of a batch: prompts in any order, two valid responses of different reward in one of them."""
    prompts, members = draw(st.sampled_from([(2, 3), (2, 2), (1, 2), (1, 3), (3, 2)]))
    number, order = prompts * members, draw(st.sampled_from(["tiled", "repeated", "mixed"]))
    generator = _seeded(draw)
    index = torch.randperm(number, generator=generator) if order == "mixed" else torch.arange(number)
    groups = torch.tensor([5, 3, 8])[index // members if order == "repeated" else index % prompts]
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25])[torch.randint(4, (number,), generator=generator)]
    valid = torch.ones(number, dtype=torch.bool)
    first, second = (groups == 5).nonzero().flatten().tolist()[:2]
    failed = [j for j in torch.randperm(number, generator=generator).tolist() if j not in (first, second)]
    for j in failed[: draw(st.sampled_from([1, 0, 2]))]:
        valid[j], rewards[j] = False, draw(st.sampled_from([0.75, 1.0, math.nan]))
    rewards[first], rewards[second] = draw(st.sampled_from([(1.0, 0.0), (0.25, 1.0), (0.0, 0.5)]))
    return {"rewards": rewards, "groups": groups, "valid": valid}


def _same(groups):
    """Which responses share a prompt: (R,) → (R,R)."""
    return groups[:, None] == groups


def _arranged(place):
    """As `_same`, if prompts stood in some fixed order: place(row, number of prompts, responses of each) → prompt."""

    def same(groups):
        prompts = len(groups.unique())
        return _same(place(torch.arange(len(groups)), prompts, len(groups) // prompts))

    return same


def _advantages(same=_same, kept=None, mean=None, after=None):
    """`group_advantages`, open to mistakes in: same(groups) (R,R); kept(rewards, valid) → both anew; mean(rewards (1,R),
    members (R,R)) → (R,); after(advantages, rewards, members) → advantages."""

    def advantages(rewards, groups, valid):
        known, counted = kept(rewards, valid) if kept else (rewards, valid)
        known = known.masked_fill(~counted, 0.0)
        members = same(groups) & counted
        mean_of = mean or (lambda r, m: (r * m).sum(1) / m.sum(1).clamp(min=1))
        result = known - mean_of(known[None], members)
        result = after(result, known, members) if after else result
        return result.masked_fill(~counted, 0.0)

    return advantages


def _by_std(advantages, rewards, members):
    number = members.sum(1).clamp(min=1)
    square = ((rewards - ((rewards * members).sum(1) / number)[:, None]) ** 2 * members).sum(1) / number
    return advantages / (square.sqrt() + 1e-6)


def _of_others(rewards, members):
    others = members & ~torch.eye(len(members), dtype=torch.bool)
    return (rewards * others).sum(1) / others.sum(1).clamp(min=1)


def _medians(rewards, members):
    return torch.stack([rewards[0, m].median() if m.any() else rewards.new_zeros(()) for m in members])


def _leaking(rewards, groups, valid):
    return _advantages(kept=lambda r, v: (r, torch.ones_like(v)))(rewards, groups, valid).masked_fill(~valid, 0.0)


def _leaking_zeros(rewards, groups, valid):
    return _leaking(rewards.masked_fill(~valid, 0.0), groups, valid)


_failing = _advantages(kept=lambda r, v: (r.masked_fill(~v, 0.0), torch.ones_like(v)))

# Mistakes in the baseline are mistakes of the objective too: name, cause, the wrong advantages, where it happened.
_BASELINES = (
    ("tiled", "responses are taken to be tiled, row j of prompt j mod G; the prompts' numbers say whose they are",
     _advantages(same=_arranged(lambda row, prompts, each: row % prompts)), "PrimeIntellect-ai/prime-rl#600"),
    ("repeated", "responses are taken to be repeated, each prompt's in a run; the prompts' numbers say whose they are",
     _advantages(same=_arranged(lambda row, prompts, each: row // each)), "PrimeIntellect-ai/prime-rl#600"),
    ("singletons", "every response is a group of its own: all advantages are 0",
     _advantages(same=lambda groups: _same(torch.arange(len(groups)))), "rllm-org/rllm#605"),
    ("whole_batch", "the baseline is the mean of the batch instead of the prompt's",
     _advantages(same=lambda groups: _same(torch.zeros_like(groups))), ""),
    ("standardised", "the advantage is divided by the standard deviation, as in GRPO", _advantages(after=_by_std), ""),
    ("leave_one_out", "the baseline is the mean of the others, without the response itself", _advantages(mean=_of_others), ""),
    ("no_baseline", "no baseline is taken off", _advantages(mean=lambda r, m: 0.0 * r[0]), ""),
    ("rejected_in_baseline", "rewards of invalid responses leak into the baseline", _leaking, "volcengine/verl#6362"),
)  # fmt: skip


# ------------------------------------------------------------------------------------------- mismatch


def mismatch_weights(old_logprobs, engine_logprobs, mask, cap):
    """Truncated importance weights of the trainer's π_old against the engine that drew the tokens, and their gap.

        Δ = log π_old − log π_engine per generated token;   weight = min(exp Δ, cap), 1 where nothing was generated
        mean = mean |Δ|;   largest = max |Δ|;   kl = mean of exp Δ − 1 − Δ;   truncated = share of tokens with exp Δ > cap

    kl estimates KL(π_engine ‖ π_old): the tokens are the engine's. Means are over the generated tokens, of which there is
    one at least; what stands elsewhere may be anything, NaN too.
    old_logprobs, engine_logprobs: (R,T) float, nats; mask: (R,T) bool — generated tokens; cap: float > 1.
    Returns weights (R,T), mean (), largest (), kl (), truncated (), of the dtype of the log-probs. Source: K2.5 report,
    appendix D; the cap as in truncated importance sampling.
    """
    weights, gaps = torch.ones_like(old_logprobs), []
    for place in mask.nonzero().tolist():
        gap = old_logprobs[tuple(place)] - engine_logprobs[tuple(place)]
        weights[tuple(place)] = gap.exp().clamp(max=cap)
        gaps.append(gap)
    gaps = torch.stack(gaps)
    kl, truncated = (gaps.expm1() - gaps).mean(), (gaps.exp() > cap).to(gaps.dtype).mean()
    return weights, gaps.abs().mean(), gaps.abs().max(), kl, truncated


def _masks(generator, rows, tokens):
    """(R,T) bool: prompts, then generated tokens with results of tools between; not every row generates anything."""
    mask = torch.rand(rows, tokens, generator=generator) < 0.6
    mask[:, 0], mask[0, -1] = False, True
    return mask


def _picked(generator, choices, *shape):
    """A float32 tensor of values among `choices`."""
    return torch.tensor(choices)[torch.randint(len(choices), shape, generator=generator)]


@st.composite
def _mismatch_cases(draw):
    """Gaps of eighths: exact in float32, and never at the logarithm of the cap."""
    shape, generator = (draw(st.integers(1, 4)), draw(st.integers(2, 5))), _seeded(draw)
    mask, gap = _masks(generator, *shape), _picked(generator, [0.125, -0.25, 0.0, 0.5, -0.75, 1.0], *shape)
    gap[0, -1] = draw(st.sampled_from([0.75, -0.5, 1.25]))
    engine = -_picked(generator, [1.5, 2.25, 3.0, 5.5], *shape)
    old = engine + gap
    if draw(st.booleans()):
        old, engine = (x.masked_fill(~mask, math.nan) for x in (old, engine))
    return {"old_logprobs": old, "engine_logprobs": engine, "mask": mask, "cap": draw(st.sampled_from([2.0, 1.5]))}


def _mismatch_of_objective(old_logprobs, engine_logprobs, mask, cap):
    return objective.mismatch(old_logprobs, engine_logprobs, mask, cap)


def _mismatch(weight=lambda gap, cap: gap.exp().clamp(max=cap), count=lambda mask: mask.sum(), mean=torch.abs,
              kl=lambda gap: gap.exp() - 1 - gap, elsewhere=1.0, beyond=lambda gap, cap: gap > math.log(cap)):  # fmt: skip
    """`mismatch_weights` in parts."""

    def weigh(old_logprobs, engine_logprobs, mask, cap):
        gap = torch.where(mask, old_logprobs - engine_logprobs, 0.0)
        share = lambda values: torch.where(mask, values, 0.0).sum() / count(mask)  # noqa: E731
        weights = torch.where(mask, weight(gap, cap), elsewhere)
        return weights, share(mean(gap)), gap.abs().max(), share(kl(gap)), share(beyond(gap, cap).to(gap.dtype))

    return weigh


def _of_response(gap, cap):
    return gap.sum(1, keepdim=True).exp().clamp(max=cap).expand_as(gap)


# ------------------------------------------------------------------------------------------- objective


def policy_objective(
    logprobs, old_logprobs, engine_logprobs, mask, rewards, groups, valid, tokens, low, high, tau, cap
):
    """The objective of K2.5's reinforcement learning, to be maximised.

        J = (1/N) Σ_j Σ_i [ w · Clip(ρ) · (r_j − r̄_j) − τ (log ρ)² ]      over the generated tokens i of valid responses j
        ρ = π_θ / π_old;   w = min(π_old / π_engine, cap), a constant;   r̄_j = mean of r over the valid responses of j's prompt

    Clip(ρ) is e^low, ρ or e^high for log ρ below, in or above [low, high]. A gradient flows through it only where log ρ *and*
    log π_θ − log π_engine lie in [low, high], bounds included, whatever the sign of the advantage. The squared term is kept
    for every token, its gradient too. N is `tokens`: of the whole batch, of which the arguments may be a part.
    logprobs, old_logprobs, engine_logprobs: (R,T) float — of the weights in training; of those that sampled, as the trainer
    computes them; of the engine, as recorded; mask: (R,T) bool — generated tokens; elsewhere (prompts, results of tools,
    padding) log-probs may be anything, NaN too; rewards: (R,) float, whatever where invalid; groups: (R,) int64 — prompt of
    each response; valid: (R,) bool; tokens: int — N; low, high: float, low < 0 < high, nats; tau, cap: float.
    Returns objective (), with gradients of logprobs. Source: K2.5 report 2.3, equation 1; appendix D for w.
    """
    owner = torch.arange(len(rewards))[:, None].expand(mask.shape)
    return objective.policy_objective_reference(
        logprobs, old_logprobs, engine_logprobs, mask, owner, rewards, groups, valid, tokens, low, high, tau, cap
    ).value


@st.composite
def _objective_cases(draw):
    """Log-ratios of sixteenths, never at a bound, and of two values of τ the one that keeps J from cancelling to nothing."""
    batch, generator = draw(_batch()), _seeded(draw)
    shape = len(batch["rewards"]), draw(st.integers(3, 5))
    mask, old = _masks(generator, *shape), -_picked(generator, [1.25, 2.0, 2.5, 3.75], *shape)
    now = old + _picked(generator, [0.0625, -0.0625, 0.125, -0.1875, -0.375, 0.3125, 0.75, -1.0], *shape)
    engine = old + draw(st.sampled_from([0.0, 1.0])) * _picked(generator, [0.0, 0.0, 0.125, -0.125, 0.5, -1.0], *shape)
    mask[0, -2:], now[0, -2:] = True, old[0, -2:] + torch.tensor([0.75, -0.125])
    counted = mask & batch["valid"][:, None]
    if draw(st.sampled_from([False, True, False])):
        now, old, engine = (x.masked_fill(~mask, math.nan) for x in (now, old, engine))
    low, high = draw(st.sampled_from([(-0.3, 0.15), (-0.15, 0.4)]))
    case = {"logprobs": now, "old_logprobs": old, "engine_logprobs": engine, "mask": mask} | batch
    case |= {"tokens": int(counted.sum()) + draw(st.sampled_from([0, 3])), "low": low, "high": high}
    taus = {tau: abs(_objective()(*case.values(), tau, 2.0).item()) for tau in (0.25, 1.0)}
    return case | {"tau": max(taus, key=taus.get), "cap": 2.0}


# The objective step by step: each of these may be replaced to make a mistake.
_STEPS = {
    "counted": lambda s: s.mask & s.valid[:, None],
    "advantage": lambda s: _advantages()(s.rewards, s.groups, s.valid),
    "now": lambda s: s.logprobs.masked_fill(~s.counted, 0.0),
    "old": lambda s: s.old_logprobs.masked_fill(~s.counted, 0.0),
    "engine": lambda s: s.engine_logprobs.masked_fill(~s.counted, 0.0),
    "log_ratio": lambda s: s.now - s.old,
    "passes": lambda s: _inside(s.log_ratio, s) & _inside(s.now - s.engine, s),
    "bounded": lambda s: s.log_ratio.clamp(s.low, s.high).exp(),
    "ratio": lambda s: torch.where(s.passes, s.bounded, s.bounded.detach()),
    "weight": lambda s: (s.old - s.engine).exp().clamp(max=s.cap),
    "gain": lambda s: s.weight * s.ratio * s.advantage[:, None],
    "square": lambda s: s.log_ratio.square(),
    "terms": lambda s: torch.where(s.counted, s.gain - s.tau * s.square, 0.0),
    "total": lambda s: s.terms.sum() / s.tokens,
}


def _inside(log_ratio, s):
    return (log_ratio >= s.low) & (log_ratio <= s.high)


def _objective(**changes):
    """`policy_objective` by _STEPS, some of them replaced."""

    def whole(*arguments):
        s = SimpleNamespace(**dict(zip(_OBJECTIVE_ARGUMENTS, arguments)))
        for name, step in (_STEPS | changes).items():
            setattr(s, name, step(s))
        return s.total

    return whole


_OBJECTIVE_ARGUMENTS = ("logprobs", "old_logprobs", "engine_logprobs", "mask", "rewards", "groups", "valid", "tokens", "low",
                        "high", "tau", "cap")  # fmt: skip


def _packed(logprobs, old_logprobs, engine_logprobs, mask, rewards, groups, valid, *settings):
    """Right: all tokens in one row, backwards, through the fused twin."""
    owner = torch.arange(len(rewards))[:, None].expand(mask.shape)
    flat = [x.flatten().flip(0) for x in (logprobs, old_logprobs, engine_logprobs, mask, owner)]
    return objective.policy_objective_fused(*flat, rewards, groups, valid, *settings).value


def _fused(logprobs, old_logprobs, engine_logprobs, mask, rewards, *rest):
    owner = torch.arange(len(rewards))[:, None].expand(mask.shape)
    arguments = logprobs, old_logprobs, engine_logprobs, mask, owner, rewards, *rest
    return objective.policy_objective_fused(*arguments).value


def _per_response(s):
    """The mean over responses of the mean over each one's tokens."""
    lengths = s.counted.sum(1)
    return (s.terms.sum(1) / lengths.clamp(min=1)).sum() / (lengths > 0).sum()


def _last_turn(s):
    """Only the last run of generated tokens of each row."""
    breaks = (~s.mask).flip(1).cumsum(1).flip(1)  # (R,T) places that are not generated, from here on
    last = (breaks * s.mask).masked_fill(~s.mask, s.mask.shape[1] + 1).amin(1, keepdim=True)
    return s.mask & (breaks == last) & s.valid[:, None]


def _between_too(s):
    """All from the first to the last generated token of each row."""
    between = (s.mask.cumsum(1) > 0) & (s.mask.flip(1).cumsum(1).flip(1) > 0)
    return between & s.valid[:, None]


def _ppo(s):
    """PPO's minimum: the mask looks at the sign of the advantage."""
    ratio = s.log_ratio.exp()
    gain = lambda r: s.weight * r * s.advantage[:, None]  # noqa: E731
    return torch.minimum(gain(ratio), gain(ratio.clamp(math.exp(s.low), math.exp(s.high))))


def _one_coefficient(s):
    """The value is right; the gradient is that of coefficient · log π_θ with the squared term inside the coefficient."""
    coefficient = (torch.where(s.passes, s.gain, 0.0) - s.tau * s.square).detach()
    right = (s.gain - s.tau * s.square).detach()
    return torch.where(s.counted, right + coefficient * (s.now - s.now.detach()), 0.0)


def _every_response(s):
    """Tokens of invalid responses count too; where their log-probs are missing nothing can be said of them."""
    return s.mask


# ------------------------------------------------------------------------------------------------- ops

OPS = (
    Op(
        name="token_logprobs",
        formula="logprobs_t = log softmax(head hidden_{t-1} / temperature)[ids_t], NaN for t = 0",
        source="K2.5 report 2.3",
        reference=token_logprobs,
        cases=_logprob_cases(),
        outputs=("logprobs",),
        differentiable=("hidden", "head"),
        dtypes=(torch.float32, torch.bfloat16, torch.float64),
        twins={"objective": objective.token_logprobs, "chunks of 2": lambda *a: objective.token_logprobs(*a, chunk=2)},
        variants={"by_logsumexp": _of_logits(lambda x, t: x / t - (x / t).logsumexp(1, keepdim=True))},
        suspects=(
            Suspect("early", "entry t holds the log-probability of token t + 1: off by one position", _early,
                    "PrimeIntellect-ai/prime-rl#1525"),
            Suspect("unshifted", "the logits of position t are asked about token t itself; they are about the next one", _unshifted,
                    "PrimeIntellect-ai/prime-rl#1525"),
            Suspect("logprobs_scaled", "the temperature divides the log-probabilities instead of the logits",
                    _of_logits(lambda x, t: x.log_softmax(1) / t), "PrimeIntellect-ai/prime-rl#697"),
            Suspect("no_temperature", "the temperature is ignored", _of_logits(lambda x, t: x.log_softmax(1)),
                    "huggingface/trl#4159"),
            Suspect("multiplied", "the logits are multiplied by the temperature", _of_logits(lambda x, t: (x * t).log_softmax(1))),
            Suspect("raw_logits", "returns logits: the softmax is missing", _of_logits(lambda x, t: x / t)),
            Suspect("zero_first", "the first entry is 0, which says that the token was certain; it is missing, NaN",
                    lambda *a: token_logprobs(*a).nan_to_num(nan=0.0), "PrimeIntellect-ai/verifiers#2078"),
            Suspect("one_short", "the entry of the first token is left out: everything after is shifted",
                    lambda *a: token_logprobs(*a)[1:]),
            Suspect("loss", "the sign is wrong: returns losses", lambda *a: -token_logprobs(*a)),
            Suspect("in_bf16", "the softmax runs in bfloat16; it needs float32",
                    _of_logits(lambda x, t: (x / t).bfloat16().log_softmax(1).to(x.dtype))),
            Suspect("added_floor", "a small number is added to the probability before the logarithm",
                    _of_logits(lambda x, t: ((x / t).softmax(1) + 1e-3).log())),
            Suspect("detached_head", "no gradient reaches the output matrix",
                    lambda hidden, head, *rest: token_logprobs(hidden, head.detach(), *rest)),
        ),
    ),
    Op(
        name="group_advantages",
        formula="advantage_j = r_j - mean of r over the valid responses of j's prompt, 0 where j is invalid",
        source="K2.5 report 2.3",
        reference=group_advantages,
        cases=_batch(),
        outputs=("advantages",),
        dtypes=(torch.float32, torch.float64),
        twins={"objective": objective.group_advantages},
        variants={"by_matrix": _advantages()},
        suspects=(
            *(Suspect(name, cause, wrong, seen) for name, cause, wrong, seen in _BASELINES),
            Suspect("rejected_as_zero", "invalid responses enter the baseline as reward 0", _leaking_zeros, "THUDM/slime#657"),
            Suspect("failure_is_zero", "a failed verifier counts as reward 0: the response is trained on", _failing,
                    "NVIDIA-NeMo/RL#2207"),
            Suspect("median", "the baseline is the median instead of the mean", _advantages(mean=_medians)),
            Suspect("best", "the baseline is the prompt's best reward",
                    _advantages(mean=lambda r, m: (r - 9 * ~m).amax(1).clamp(min=0))),
            Suspect("sign", "the sign is turned: baseline less reward", lambda *a: -group_advantages(*a)),
        ),
    ),
    Op(
        name="mismatch_weights",
        formula="weight = min(pi_old / pi_engine, cap); mean |D|, max |D|, mean(exp D - 1 - D), share exp D > cap",
        source="K2.5 report, appendix D",
        reference=mismatch_weights,
        cases=_mismatch_cases(),
        outputs=("weights", "mean", "largest", "kl", "truncated"),
        dtypes=(torch.float32, torch.float64),
        twins={"objective": _mismatch_of_objective},
        variants={"in_parts": _mismatch()},
        suspects=(
            Suspect("inverted", "the ratio is upside down: engine over trainer",
                    lambda old, engine, mask, cap: mismatch_weights(engine, old, mask, cap)),
            Suspect("untruncated", "weights are not truncated: one token may outweigh the batch",
                    _mismatch(weight=lambda gap, cap: gap.exp())),
            Suspect("masked", "weights above the cap become 0 instead of the cap: that masks the token",
                    _mismatch(weight=lambda gap, cap: torch.where(gap.exp() > cap, 0.0, gap.exp()))),
            Suspect("truncated_below", "weights are truncated below 1 / cap too",
                    _mismatch(weight=lambda gap, cap: gap.exp().clamp(1 / cap, cap))),
            Suspect("cap_of_gap", "the cap is compared with the log-ratio instead of with the ratio",
                    _mismatch(weight=lambda gap, cap: gap.clamp(max=cap).exp(), beyond=lambda gap, cap: gap > cap)),
            Suspect("capped_at_1", "weights are truncated at 1: tokens the engine found unlikely get too little",
                    _mismatch(weight=lambda gap, cap: gap.exp().clamp(max=1.0))),
            Suspect("per_response", "one weight for the whole response, the product over its tokens", _mismatch(weight=_of_response)),
            Suspect("zero_elsewhere", "the weight of what was not generated is 0 instead of 1", _mismatch(elsewhere=0.0)),
            Suspect("padding_counted", "means are over all positions instead of the generated ones",
                    _mismatch(count=lambda mask: mask.numel())),
            Suspect("signed_mean", "the mean gap is signed: gaps of both signs hide each other", _mismatch(mean=lambda gap: gap)),
            Suspect("naive_kl", "the KL is estimated by the mean log-ratio, which may be negative", _mismatch(kl=lambda gap: -gap)),
            Suspect("other_kl", "the KL is that of engine and trainer exchanged; the tokens were drawn by the engine",
                    _mismatch(kl=lambda gap: (-gap).exp() - 1 + gap)),
            Suspect("squared_kl", "the KL is estimated by half the squared log-ratio", _mismatch(kl=lambda gap: gap.square() / 2)),
        ),
    ),
    Op(
        name="policy_objective",
        formula="J = 1/N sum_ji [w Clip(rho, low, high) (r_j - mean r) - tau (log rho)^2]; no gradient outside of the bounds",
        source="K2.5 report 2.3, equation 1",
        reference=policy_objective,
        cases=_objective_cases(),
        outputs=("objective",),
        differentiable=("logprobs",),
        dtypes=(torch.float32, torch.float64),
        twins={"fused": _fused},
        variants={"step_by_step": _objective(), "packed": _packed},
        suspects=(
            Suspect("per_response", "every response is normalised by its own length: N is all tokens of the batch",
                    _objective(total=_per_response), "huggingface/trl#2995"),
            Suspect("by_responses", "the sum is divided by the number of responses instead of tokens",
                    _objective(total=lambda s: s.terms.sum() / s.valid.sum()), "allenai/open-instruct#1137"),
            Suspect("own_tokens", "each microbatch is divided by its own tokens instead of by those of the whole batch",
                    _objective(total=lambda s: s.terms.sum() / s.counted.sum()), "huggingface/trl#3021"),
            Suspect("all_positions", "the sum is divided by all positions, prompts and padding included",
                    _objective(total=lambda s: s.terms.sum() / s.mask.numel())),
            Suspect("rejected_in_tokens", "tokens of invalid responses are counted in N",
                    _objective(total=lambda s: s.terms.sum() / (s.tokens + (s.mask & ~s.counted).sum())), "THUDM/slime#657"),
            *(Suspect(name, cause, _objective(advantage=lambda s, wrong=wrong: wrong(s.rewards, s.groups, s.valid)), seen)
              for name, cause, wrong, seen in _BASELINES),
            Suspect("failure_is_zero", "a failed verifier counts as reward 0: the response is trained on",
                    _objective(counted=_every_response, advantage=lambda s: _failing(s.rewards, s.groups, s.valid),
                               total=lambda s: s.terms.sum() / (s.tokens + (s.mask & ~s.valid[:, None]).sum())),
                    "NVIDIA-NeMo/RL#2207"),
            Suspect("rejected_penalised", "invalid responses keep the squared term", _objective(counted=_every_response)),
            Suspect("last_turn", "only the last turn of a response is trained: the mask of the last step stands for all",
                    _objective(counted=_last_turn), "NovaSky-AI/SkyRL#1492"),
            Suspect("tool_results_trained", "what stands between generated tokens, results of tools say, is trained too",
                    _objective(counted=_between_too)),
            Suspect("shifted", "log-probabilities of π_old are off by one position",
                    _objective(old=lambda s: s.old_logprobs.roll(1, 1).masked_fill(~s.counted, 0.0)),
                    "PrimeIntellect-ai/prime-rl#1525"),
            Suspect("multiplied_by_mask", "what is not generated is multiplied by 0 instead of left out: NaN stays NaN",
                    _objective(now=lambda s: s.logprobs * s.counted)),
            Suspect("negated_log_ratio", "the bounds are tested on minus the log-ratio",
                    _objective(passes=lambda s: _inside(-s.log_ratio, s) & _inside(s.engine - s.now, s),
                               bounded=lambda s: (-(-s.log_ratio).clamp(s.low, s.high)).exp()), "volcengine/verl#6377"),
            Suspect("bounds_of_ratio", "the bounds are taken for those of the ratio, 1 + low and 1 + high",
                    _objective(passes=lambda s: (_inside(s.log_ratio.expm1(), s) & _inside((s.now - s.engine).expm1(), s)),
                               bounded=lambda s: s.log_ratio.exp().clamp(1 + s.low, 1 + s.high))),
            Suspect("symmetric", "the upper bound is used on both sides",
                    lambda *a: _objective()(*a[:8], -a[9], *a[9:])),
            Suspect("ppo", "the mask looks at the sign of the advantage, as PPO's does", _objective(gain=_ppo)),
            Suspect("straight_through", "the value is clipped and the gradient is not",
                    _objective(ratio=lambda s: s.bounded.detach() * (s.now - s.now.detach()).exp())),
            Suspect("unclipped", "nothing is clipped", _objective(ratio=lambda s: s.log_ratio.exp())),
            Suspect("masked_to_zero", "tokens outside of the bounds lose their value too, not only their gradient",
                    _objective(ratio=lambda s: torch.where(s.passes, s.bounded, 0.0))),
            Suspect("recomputed_disables_mask", "only the recomputed π_old is tested against the bounds; the engine's record is "
                    "not, so that nothing is masked once π_old is computed anew at every step",
                    _objective(passes=lambda s: _inside(s.log_ratio, s)), "radixark/miles#1829"),
            Suspect("no_correction", "trainer and engine are taken to agree: the weight is missing",
                    _objective(weight=lambda s: torch.ones_like(s.old))),
            Suspect("untruncated", "the weight is not truncated", _objective(weight=lambda s: (s.old - s.engine).exp())),
            Suspect("half", "a stray factor of one half on the squared term", _objective(square=lambda s: s.log_ratio.square() / 2),
                    "PrimeIntellect-ai/prime-rl#1697"),
            Suspect("detached_square", "the squared term stands inside a detached coefficient: its value counts, its gradient "
                    "is not that of a square", _objective(terms=_one_coefficient), "PrimeIntellect-ai/prime-rl#1697"),
            Suspect("square_of_kept_only", "the squared term is dropped where the gradient is masked; nothing pulls back then",
                    _objective(square=lambda s: s.log_ratio.square() * s.passes)),
            Suspect("square_of_ratio", "the square of ratio − 1 instead of the log-ratio",
                    _objective(square=lambda s: s.log_ratio.expm1().square())),
            Suspect("kl_for_square", "a KL estimate stands in for the square",
                    _objective(square=lambda s: s.log_ratio.expm1() - s.log_ratio)),
            Suspect("no_square", "the squared term is missing", _objective(square=lambda s: 0.0 * s.log_ratio)),
            Suspect("loss", "the sign is turned: a loss to minimise; the objective is to be maximised", lambda *a: -_objective()(*a)),
        ),
    ),
)  # fmt: skip
