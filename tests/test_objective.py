"""Claims about objective.py: the twins agree, the gradient is the formula's, parts add up, invalid and foreign tokens are out.

Numbers after `bug` are those of the public bug list.
Run: .venv/bin/python -m pytest tests/test_objective.py
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import assert_close
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_k25 import built

import objective
from generate import generate
from objective import (
    ObjectiveError,
    add_up,
    count_tokens,
    group_advantages,
    mismatch,
    place_logprobs,
    policy_objective_fused,
    policy_objective_reference,
    ppo_objective,
    rft_select,
    toggle_budgets,
    toggle_phase,
    toggle_rewards,
    token_logprobs,
)

TWINS = pytest.mark.parametrize("twin", [policy_objective_reference, policy_objective_fused], ids=["reference", "fused"])
LN2 = math.log(2)


def exact(values):
    """A float64 tensor of the very numbers."""
    return torch.tensor(values, dtype=torch.float64)


@dataclasses.dataclass
class Batch:
    """Arguments of the objective; tests change some of them."""

    logprobs: torch.Tensor
    old: torch.Tensor
    engine: torch.Tensor
    mask: torch.Tensor
    owner: torch.Tensor
    rewards: torch.Tensor
    groups: torch.Tensor
    valid: torch.Tensor
    tokens: int = 0
    low: float = -0.3
    high: float = 0.2
    tau: float = 0.1
    cap: float = 1.1

    def by(self, twin, **changes):
        """(Objective, gradient by logprobs) of a twin."""
        values = vars(dataclasses.replace(self, **changes))
        if not values["tokens"]:
            values["tokens"] = count_tokens(values["mask"], values["owner"], values["valid"])
        leaf = values["logprobs"].clone().requires_grad_()
        found = twin(leaf, *list(values.values())[1:])
        return found, torch.autograd.grad(found.value, leaf)[0]


def rows(mask):
    """The owner of each token of a padded batch."""
    return torch.arange(len(mask))[:, None].expand(mask.shape)


def random_batch(seed, dtype=torch.float64, prompts=2, members=3, tokens=6, spread=0.3, gap=0.1):
    """Responses of unequal length in any order, one of them invalid, NaN wherever nothing was generated."""
    generator = torch.Generator().manual_seed(seed)
    number = prompts * members
    shape = number, tokens
    old = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3 - 1.2
    now = (old + spread * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    engine = (old + gap * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[:, 0], mask[:, -1] = False, True
    rewards = torch.rand(number, generator=generator, dtype=torch.float64)
    groups = torch.randperm(number, generator=generator) % prompts * 7
    valid = torch.ones(number, dtype=torch.bool)
    valid[seed % number], rewards[seed % number] = False, math.nan
    now, old, engine = (x.masked_fill(~mask, math.nan).to(dtype) for x in (now, old, engine))
    return Batch(now, old, engine, mask, rows(mask), rewards.to(dtype), groups, valid)


def worked():
    """Two responses to one prompt, of 1 and 3 tokens and rewards 1 and 0; bounds −ln 4 and ln 1.5, τ = 1."""
    ratios = exact([[1.0, math.nan, math.nan], [1.0, 2.0, 0.5]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    old = torch.full((2, 3), -2.0).double().masked_fill(~mask, math.nan)
    return Batch(old + ratios.log(), old, old, mask, rows(mask), exact([1.0, 0.0]), torch.zeros(2).long(),
                 torch.ones(2).bool(), 0, -math.log(4), math.log(1.5), 1.0, 2.0)  # fmt: skip


# The twins, and the formula


@given(st.integers(0, 9999), st.sampled_from([torch.float64, torch.float32]))
def test_the_twins_agree_in_values_statistics_and_gradients(seed, dtype):
    batch = random_batch(seed, dtype)
    (one, slope), (other, fused_slope) = batch.by(policy_objective_reference), batch.by(policy_objective_fused)
    for field in dataclasses.fields(one):
        assert_close(getattr(other, field.name), getattr(one, field.name), dtype, field.name)
        assert getattr(other, field.name).dtype == dtype
    assert_close(fused_slope, slope, dtype, "gradient")


@given(st.integers(0, 9999), st.randoms())
def test_a_packed_batch_in_any_order_is_a_padded_one(seed, rng):
    batch = random_batch(seed)
    order = torch.tensor(rng.sample(range(batch.mask.numel()), batch.mask.numel()))
    flat = {name: getattr(batch, name).flatten()[order] for name in ("logprobs", "old", "engine", "mask", "owner")}
    flat["owner"] = torch.where(flat["mask"], flat["owner"], -100)  # padding belongs to nobody
    (padded, slope), (packed, packed_slope) = batch.by(policy_objective_fused), batch.by(policy_objective_fused, **flat)
    assert_close(packed.value, padded.value)
    assert_close(packed_slope, slope.flatten()[order])


@TWINS
def test_bug51_a_hand_worked_batch_of_unequal_lengths(twin):
    """N = 4 and r̄ = ½. Ratios 1 | 1, 2, ½ of which 2 is clipped to 1.5:
    surrogate = ½ · 1 − ½ · (1 + 1.5 + ½) = −1, penalty = 2 ln² 2."""
    found, slope = worked().by(twin)
    assert_close(found.value, exact((-1 - 2 * LN2**2) / 4), 1e-12)
    expected = exact([[0.5, 0, 0], [-0.5, -2 * LN2, -0.25 + 2 * LN2]]) / 4
    assert_close(slope, expected, 1e-12)
    assert found.masked.item() == 0.25 and found.surrogate.item() == pytest.approx(-0.25)
    assert found.moved.item() == pytest.approx(2 * LN2 / 4) == found.drift.item()
    assert found.entropy.item() == pytest.approx((2 + 2 + 2 - LN2 + 2 + LN2) / 4)


@TWINS
def test_bug44_a_long_response_weighs_by_its_tokens(twin):
    """Twice the tokens, twice the share: not the mean of means."""
    found, slope = worked().by(twin)
    per_response = (0.5 + (-0.5 * (1 + 1.5 + 0.5) - 2 * LN2**2) / 3) / 2
    assert abs(found.value.item() - per_response) > 0.05
    assert slope[0, 0] == -slope[1, 0]


@TWINS
def test_bug57_finite_differences_of_the_whole_objective(twin):
    """Far from the bounds J is smooth: the gradient of every token, masked ones included, is the slope of J itself."""
    batch = random_batch(3, gap=0.0)
    log_ratio = torch.where(batch.mask, batch.logprobs - batch.old, 0.0)
    near = ((log_ratio - batch.low).abs() < 0.01) | ((log_ratio - batch.high).abs() < 0.01)
    assert not near.any() and 0 < batch.by(twin)[0].masked < 1
    places = batch.mask.nonzero().tolist()

    def whole(values):
        now = batch.logprobs.clone()
        now[batch.mask] = values
        rest = list(vars(batch).values())[5:]
        return twin(now, batch.old, batch.engine, batch.mask, batch.owner, *rest[:3], len(places), *rest[4:]).value

    assert torch.autograd.gradcheck(whole, batch.logprobs[batch.mask].clone().requires_grad_())


@TWINS
def test_bug57_the_squared_term_has_no_half_and_pulls_masked_tokens_back(twin):
    batch = worked()
    _, slope = batch.by(twin)
    _, without = batch.by(twin, tau=0.0)
    log_ratio = torch.where(batch.mask, batch.logprobs - batch.old, 0.0)
    assert_close(slope - without, -2 * log_ratio / 4, 1e-12)
    assert without[1, 1] == 0 and slope[1, 1] < 0  # a token that became twice as likely is made less likely


@TWINS
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bug56_bounds_are_of_the_log_ratio_and_not_symmetric(twin, sign):
    """Steps of −0.2 … 0.4 between bounds of −0.1 and 0.3, whatever the sign of the advantage."""
    steps = exact([-0.2, -0.15, -0.05, 0.05, 0.15, 0.25, 0.35, 0.4])
    passing = [False, False, True, True, True, True, False, False]
    mask = torch.ones(2, 8).bool()
    old = torch.full((2, 8), -1.0).double()
    batch = Batch(old + steps, old, old, mask, rows(mask), exact([sign, 0.0]), torch.zeros(2).long(),
                  torch.ones(2).bool(), low=-0.1, high=0.3, tau=0.0)  # fmt: skip
    found, slope = batch.by(twin)
    assert (slope != 0).tolist() == [passing, passing] and found.masked.item() == 0.5
    assert_close(slope[0], torch.where(torch.tensor(passing), steps.exp(), 0.0) * sign / 2 / 16, 1e-12)


def test_ppo_lets_through_what_leads_back_and_k25_does_not():
    steps = exact([-0.5, 0.0, 0.5])
    for sign in (1.0, -1.0):
        ours, theirs = (slope(steps, sign, -0.2, 0.2) for slope in (objective._slope_k25, objective._slope_ppo))
        assert (ours != 0).tolist() == [False, True, False]
        assert (theirs != 0).tolist() == ([True, True, False] if sign > 0 else [False, True, True])
        assert_close(ours[1], theirs[1])


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_ppo_is_the_minimum_of_both(log_ratio, advantage):
    found = ppo_objective(*(exact([x]) for x in (log_ratio, 0.0, advantage)), -0.2, 0.2).item()
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, math.exp(-0.2)), math.exp(0.2))
    assert found == pytest.approx(min(ratio * advantage, clipped * advantage))


def test_the_diagram_is_a_picture(tmp_path):
    objective.gradient_pass_diagram(tmp_path / "pass.png")
    with Image.open(tmp_path / "pass.png") as image:
        assert image.width > 800 and len(np.unique(np.asarray(image.convert("L")))) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["pass.png"]


# Parts of a batch


@TWINS
@given(st.integers(0, 9999), st.integers(1, 35))
def test_bug50_microbatches_that_cut_through_prompts_and_responses_add_up(twin, seed, cut):
    batch = random_batch(seed)
    tokens = count_tokens(batch.mask, batch.owner, batch.valid)
    whole, slope = batch.by(twin)
    flat = {name: getattr(batch, name).flatten() for name in ("logprobs", "old", "engine", "mask", "owner")}
    parts = [{name: x[piece] for name, x in flat.items()} for piece in (slice(None, cut), slice(cut, None))]
    found = [batch.by(twin, tokens=tokens, **part) for part in parts]
    total = add_up([part for part, _ in found])
    for field in dataclasses.fields(total):
        assert_close(getattr(total, field.name), getattr(whole, field.name), 1e-12, field.name)
    assert_close(torch.cat([s for _, s in found]), slope.flatten(), 1e-12)


@TWINS
def test_bug58_a_microbatch_of_invalid_responses_alone_has_a_gradient_of_zeros(twin):
    batch = random_batch(0)
    row = slice(0, 1)
    found, slope = batch.by(twin, tokens=9, **{n: getattr(batch, n)[row] for n in ("logprobs", "old", "engine", "mask", "owner")})
    assert found.value == 0 and not slope.any()


# What does not count


@TWINS
@given(st.integers(0, 9999))
def test_bug58_bug62_invalid_responses_leave_baseline_tokens_and_both_terms(twin, seed):
    batch = random_batch(seed)
    found, slope = batch.by(twin)
    kept = batch.valid
    alone = {name: getattr(batch, name)[kept] for name in ("logprobs", "old", "engine", "mask", "rewards", "groups", "valid")}
    without, rest = batch.by(twin, owner=rows(alone["mask"]), **alone)
    assert_close(found.value, without.value, 1e-12)
    assert_close(slope[kept], rest, 1e-12)
    assert not slope[~kept].any()
    other = batch.rewards.clone()
    other[~kept] = 0.7
    assert_close(batch.by(twin, rewards=other)[0].value, found.value, 1e-12)
    counted_as_zero = batch.by(twin, rewards=other.masked_fill(~kept, 0.0), valid=torch.ones_like(kept))[0]
    assert counted_as_zero.value != found.value


@TWINS
def test_bug53_prompts_and_results_of_tools_get_no_gradient_in_any_turn(twin):
    """Two turns: P prompt, G generated, T result of a tool. What stands at P and T may be anything."""
    marks = ["PPGGTTTGG", "PGGGTGPPP"]
    mask = torch.tensor([[mark == "G" for mark in row] for row in marks])
    generator = torch.Generator().manual_seed(0)
    now, old = (-torch.rand(2, 9, generator=generator).double() - 0.5 for _ in range(2))
    batch = Batch(now, old, old, mask, rows(mask), exact([1.0, 0.0]), torch.zeros(2).long(), torch.ones(2).bool(),
                  low=-9.0, high=9.0)  # fmt: skip
    found, slope = batch.by(twin)
    assert torch.equal(slope != 0, mask) and count_tokens(mask, batch.owner, batch.valid) == 8
    for rubbish in (math.nan, 0.0, -math.inf, 5.0):
        spoiled = {name: getattr(batch, name).masked_fill(~mask, rubbish) for name in ("logprobs", "old", "engine")}
        again, same = batch.by(twin, **spoiled)
        assert torch.equal(again.value, found.value) and torch.equal(same, slope)


@given(st.integers(1, 4), st.integers(1, 5), st.randoms())
def test_bug52_advantages_of_a_prompt_sum_to_0_in_any_order_of_responses(prompts, members, rng):
    values = exact([rng.random() for _ in range(prompts * members)])
    number = torch.arange(prompts * members)
    mixed = torch.tensor(rng.sample(range(len(number)), len(number)))
    for groups in (number % prompts, number // members, mixed % prompts):
        advantages = group_advantages(values, groups * 11, torch.ones_like(values, dtype=torch.bool))
        for prompt in range(prompts):
            assert abs(advantages[groups == prompt].sum().item()) < 1e-12
        mine = values[groups == groups[0]]
        assert advantages[0].item() == pytest.approx((values[0] - mine.mean()).item(), abs=1e-12)


def test_the_advantage_is_not_divided_by_a_deviation():
    everybody = torch.ones(4, dtype=torch.bool)
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.25, 0.25]), torch.tensor([0, 0, 1, 1]), everybody)
    assert advantages.tolist() == [0.5, -0.5, 0.0, 0.0]
    scaled = group_advantages(0.1 * torch.tensor([1.0, 0.0, 0.25, 0.25]), torch.tensor([0, 0, 1, 1]), everybody)
    assert_close(scaled, 0.1 * advantages)


# Trainer and engine


def test_mismatch_of_a_hand_worked_batch():
    """Gaps ln 4, 0 and −ln 2 with a cap of 2: weights 2, 1, ½."""
    engine = exact([[-3.0, -1.0, math.nan, -2.0]])
    old = engine + exact([[2 * LN2, 0.0, 0.0, -LN2]])
    found = mismatch(old, engine, torch.tensor([[True, True, False, True]]), 2.0)
    assert_close(found.weights, exact([[2.0, 1.0, 1.0, 0.5]]), 1e-12)
    assert found.mean.item() == pytest.approx(LN2) and found.largest.item() == pytest.approx(2 * LN2)
    assert found.kl.item() == pytest.approx(((4 - 1 - 2 * LN2) + (0.5 - 1 + LN2)) / 3)
    assert found.truncated.item() == pytest.approx(1 / 3)


@given(st.integers(0, 9999))
def test_the_kl_estimate_is_never_negative_and_0_only_where_both_agree(seed):
    batch = random_batch(seed)
    assert mismatch(batch.old, batch.engine, batch.mask, 2.0).kl > 0
    same = mismatch(batch.old, batch.old, batch.mask, 2.0)
    assert same.kl == same.mean == same.largest == same.truncated == 0 and (same.weights == 1).all()


def test_truncated_weights_make_the_engines_tokens_an_unbiased_sample_of_the_trainers():
    """Σ_engine p · min(p'/p, cap) · f = Σ p' · f, but for what the cap takes: by enumeration of four tokens."""
    engine, trainer = exact([0.4, 0.3, 0.2, 0.1]), exact([0.3, 0.35, 0.2, 0.15])
    f = exact([1.0, -2.0, 3.0, 5.0])
    everywhere = torch.ones(4, dtype=torch.bool)
    weights = mismatch(trainer.log(), engine.log(), everywhere, 2.0).weights
    assert_close((engine * weights * f).sum(), (trainer * f).sum(), 1e-12)
    capped = mismatch(trainer.log(), engine.log(), everywhere, 1.2)
    assert capped.truncated == 0.25 and (engine * capped.weights).sum() < 1
    assert_close((engine * capped.weights * f).sum(), (trainer * f).sum() - 5 * (0.15 - 0.12), 1e-12)


@TWINS
def test_with_the_engines_log_probs_as_old_the_objective_is_the_reports(twin):
    batch = random_batch(5)
    found, _ = batch.by(twin, old=batch.engine)
    total, tokens = 0.0, count_tokens(batch.mask, batch.owner, batch.valid)
    for j in batch.valid.nonzero().flatten().tolist():
        advantage = batch.rewards[j] - batch.rewards[(batch.groups == batch.groups[j]) & batch.valid].mean()
        log_ratio = (batch.logprobs - batch.engine)[j][batch.mask[j]]
        total += (log_ratio.clamp(batch.low, batch.high).exp() * advantage - batch.tau * log_ratio**2).sum()
    assert_close(found.value, total / tokens, 1e-12)


@TWINS
def test_bug61_recomputed_old_log_probs_do_not_disable_the_mask(twin):
    """Stale tokens: π_old computed anew from today's weights makes every ratio 1; the engine's record still masks them."""
    batch = random_batch(2, spread=0.6, gap=0.0)
    right, slope = batch.by(twin, tau=0.0)
    recomputed, other = batch.by(twin, tau=0.0, old=batch.logprobs)
    assert 0.3 < right.masked < 0.9 and recomputed.masked == right.masked
    assert torch.equal(slope == 0, other == 0)
    assert recomputed.moved == 0 and recomputed.drift == right.drift


@TWINS
def test_the_gap_of_trainer_and_engine_counts_against_the_bounds(twin):
    batch = worked()
    engine = batch.old.clone()
    engine[0, 0] -= 0.6  # the engine found this token much less likely than the trainer does: beyond ln 1.5
    found, slope = batch.by(twin, engine=engine, tau=0.0)
    assert slope[0, 0] == 0 and found.masked == 0.5
    engine[0, 0] += 0.4
    assert_close(batch.by(twin, engine=engine, tau=0.0)[1][0, 0], exact(0.5 * math.exp(0.2) / 4), 1e-12)


# Log-probs


@given(st.integers(0, 999), st.sampled_from([0.6, 1.0, 1.7]), st.integers(1, 9))
def test_token_logprobs_are_those_of_the_softmax_whatever_the_chunk(seed, temperature, chunk):
    generator = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(2, 5, 4, generator=generator).requires_grad_(), torch.randn(7, 4, generator=generator).requires_grad_()
    ids = torch.randint(7, (2, 5), generator=generator)
    found = token_logprobs(hidden, head, ids, temperature, chunk)
    expected = ((hidden @ head.T).double() / temperature).log_softmax(-1)
    for row in range(2):
        assert found[row, 0].isnan()
        for t in range(1, 5):
            assert found[row, t].item() == pytest.approx(expected[row, t - 1, ids[row, t]].item(), abs=1e-5)
    slopes = torch.autograd.grad(found[:, 1:].sum(), (hidden, head))
    plain = sum(expected[row, t - 1, ids[row, t]] for row in range(2) for t in range(1, 5))
    for slope, right in zip(slopes, torch.autograd.grad(plain, (hidden, head))):
        assert_close(slope, right, 1e-5)


def test_the_logits_of_a_long_batch_are_not_kept_for_the_backward_pass():
    kept = []
    hidden, head = torch.randn(40, 3).requires_grad_(), torch.randn(11, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        token_logprobs(hidden, head, torch.zeros(40).long(), chunk=8)
    assert kept and not [shape for shape in kept if shape[-1:] == (11,)]


def test_bug54_an_entry_belongs_to_its_token():
    """One token is exchanged: of a real model its own entry moves, later ones may, earlier ones do not."""
    model = built()
    head = model.language_model.lm_head.weight
    ids = torch.randint(0, 200, (1, 7), generator=torch.Generator().manual_seed(0))

    def logprobs(ids):
        with torch.no_grad():
            return token_logprobs(model.hidden(model.embed(ids))[0], head, ids)[0]

    before = logprobs(ids)
    for place in range(1, 7):
        other = ids.clone()
        other[0, place] += 1
        after = logprobs(other)
        assert (after[place] - before[place]).abs() > 1e-6
        assert_close(after[1:place], before[1:place], 1e-12)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_bug55_on_policy_ratio_is_1_at_any_temperature(temperature):
    """What the sampler recorded and what the trainer computes from all tokens at once agree; computed twice they are equal."""
    model, prompt = built(), [5, 9, 14]
    answer = generate(model, [prompt], max_new_tokens=6, temperature=temperature, seed=3)[0]
    ids = torch.tensor([[*prompt, *answer.ids]])
    head = model.language_model.lm_head.weight
    with torch.no_grad():
        now, again = (token_logprobs(model.hidden(model.embed(ids))[0], head, ids, temperature) for _ in range(2))
    mask = torch.arange(ids.shape[1])[None] >= 3
    engine = place_logprobs([answer.logprobs], mask)
    assert_close(now[mask], engine[mask], 1e-5)
    assert torch.equal((now - again)[mask].exp(), torch.ones(6))
    plain = token_logprobs(model.hidden(model.embed(ids))[0], head, ids)  # at temperature 1, divided afterwards
    assert temperature == 1 or (plain / temperature - engine)[mask].abs().max() > 1e-3


def test_bug63_ids_and_hidden_states_of_different_length_are_refused():
    with pytest.raises(ObjectiveError, match="placeholders of media"):
        token_logprobs(torch.zeros(1, 5, 2), torch.zeros(3, 2), torch.zeros(1, 4).long())
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ObjectiveError, match="temperature"):
            token_logprobs(torch.zeros(1, 4, 2), torch.zeros(3, 2), torch.zeros(1, 4).long(), temperature)


def test_bug59_recorded_log_probs_go_to_their_tokens_or_are_refused():
    mask = torch.tensor([[False, True, True, False, True], [False, False, True, False, False]])
    placed = place_logprobs([[-1.0, -2.0, -3.0], [0.0]], mask)
    assert placed[mask].tolist() == [-1, -2, -3, 0] and placed[~mask].isnan().all()
    for recorded, words in [
        ([[-1.0, -2.0], [0.0]], "response 0: 2 recorded log-probs for 3"),
        ([[-1.0, -2.0, -3.0, -4.0], [0.0]], "response 0: 4 recorded"),
        ([[-1.0, -2.0, -3.0], []], "response 1: 0 recorded"),
        ([[-1.0, None, -3.0], [0.0]], "generated token 1 is missing"),
        ([[-1.0, -2.0, -3.0], [math.nan]], "response 1: the log-prob of generated token 0"),
        ([[-1.0, -2.0, -3.0]], "1 recorded responses for a mask of 2"),
    ]:
        with pytest.raises(ObjectiveError, match=words):
            place_logprobs(recorded, mask)


@TWINS
@pytest.mark.parametrize("name", ["logprobs", "old", "engine"])
def test_bug59_a_missing_log_prob_of_a_generated_token_is_refused(twin, name):
    batch = random_batch(1)
    row = int(batch.valid.nonzero()[-1])
    for value, words in ((math.nan, "missing"), (-math.inf, "-inf"), (0.5, "0.5")):
        spoiled = getattr(batch, name).clone()
        spoiled[row, -1] = value
        with pytest.raises(ObjectiveError, match=rf"\({row}, 5\) is {words}"):
            batch.by(twin, **{name: spoiled})
    with pytest.raises(ObjectiveError, match="one entry per token"):
        batch.by(twin, **{name: getattr(batch, name)[:, :-1]})
    invalid = getattr(batch, name).clone()
    invalid[~batch.valid] = math.nan
    assert torch.equal(batch.by(twin, **{name: invalid})[0].value, batch.by(twin)[0].value)


@pytest.mark.parametrize(
    "changes, words",
    [({"low": 0.1}, "low < 0 < high"), ({"high": -0.1}, "low < 0 < high"), ({"tau": -1.0}, "tau"), ({"cap": 0.0}, "cap"),
     ({"tokens": 3}, "N is 3"), ({"rewards": torch.ones(5).double()}, "one entry per response"),
     ({"rewards": torch.full((6,), math.nan).double()}, "mark it invalid"),
     ({"owner": torch.full((6, 6), 6)}, "belongs to response 6"), ({"owner": torch.full((6, 6), -1)}, "belongs to response -1"),
     ({"owner": torch.zeros(6).long()}, "owner")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(changes, words):
    with pytest.raises(ObjectiveError, match=words):
        batch = random_batch(1)
        values = vars(dataclasses.replace(batch, tokens=36)) | changes
        policy_objective_fused(*values.values())


# Toggle


def test_phases_alternate_and_depend_on_the_iteration_alone():
    assert [toggle_phase(t, 3) for t in range(13)] == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0]
    for wrong in ((-1, 3), (3, 0)):
        with pytest.raises(ObjectiveError):
            toggle_phase(*wrong)


def shaped(rewards, lengths, budget, lam=0.5, iteration=0, **settings):
    """Toggle on one prompt."""
    return toggle_rewards(torch.tensor(rewards), torch.tensor(lengths), torch.zeros(len(rewards)).long(), torch.tensor([budget]),
                          iteration, 1, lam, **settings).tolist()  # fmt: skip


def test_toggle_binds_only_where_accuracy_is_high_enough_and_in_even_phases():
    good, bad, lengths = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [9, 5, 9, 4]
    assert shaped(good, lengths, 5.0) == [0, 1, 0, 1]
    assert shaped(bad, lengths, 5.0) == bad  # still to be learned: any length
    assert shaped(good, lengths, 5.0, iteration=1) == good
    assert shaped(good, lengths, math.inf) == good  # no correct rollout when budgets were taken


def test_toggle_is_strict_below_lambda_and_includes_the_budget():
    half = [1.0, 0.0]
    assert shaped(half, [6, 1], 5.0, lam=0.5) == [0, 0] and shaped(half, [6, 1], 5.0, lam=0.51) == half
    assert shaped(half, [5, 1], 5.0, lam=0.5) == half


def test_toggle_is_not_the_misreading():
    """A widely copied text keeps rewards where accuracy is *above* λ: it cuts exactly where nothing is learned yet."""
    assert shaped([1.0, 0.0, 0.0, 0.0], [9, 1, 1, 1], 5.0)[0] == 1
    assert shaped([1.0, 1.0, 1.0, 1.0], [9, 1, 1, 1], 5.0)[0] == 0


def test_bug62_an_invalid_response_is_no_wrong_one_to_toggle():
    """1, 1, failed: the accuracy is 1, not ⅔; and what is invalid comes back as it was."""
    failed = shaped([1.0, 1.0, math.nan], [9, 1, 9], 5.0, lam=0.8, valid=torch.tensor([True, True, False]))
    assert failed[:2] == [0, 1] and math.isnan(failed[2])


@given(st.lists(st.lists(st.integers(1, 500), max_size=9), max_size=4), st.floats(0, 100))
def test_budgets_are_percentiles_of_correct_lengths(lengths, percentile):
    budgets = toggle_budgets(lengths, percentile)
    expected = [np.percentile(mine, percentile) if mine else np.inf for mine in lengths]
    assert budgets.shape == (len(lengths),)
    assert np.allclose(budgets.numpy(), expected, rtol=1e-6)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=9), st.integers(0, 100), st.integers(0, 100))
def test_a_higher_percentile_never_gives_a_smaller_budget(lengths, a, b):
    low, high = sorted((a, b))
    assert toggle_budgets([lengths], low) <= toggle_budgets([lengths], high) <= max(lengths)
    with pytest.raises(ObjectiveError):
        toggle_budgets([lengths], 101)


# Rejection-sampling fine-tuning


RESPONSES = [[1, 2, 3], [4], [1, 2, 3], [5, 6], [7], [8], [9]]


def test_good_responses_are_chosen_per_prompt_best_and_shortest_first():
    rewards, groups = [1.0, 1.0, 1.0, 0.9, 0.4, 1.0, 0.9], ["a", "a", "a", "a", "a", "b", "b"]
    valid = [True, True, True, True, True, False, True]
    choose = lambda most, threshold=0.5: rft_select(RESPONSES, rewards, valid, groups, threshold, most)  # noqa: E731
    assert choose(1) == [1, 6] and choose(2) == [0, 1, 6] and choose(3) == [0, 1, 3, 6]
    assert choose(9) == [0, 1, 3, 6] and choose(9, 0.9) == [0, 1, 3, 6] and choose(9, 0.95) == [0, 1] and choose(0) == []
    tensors = torch.tensor(rewards), torch.tensor(valid), torch.tensor([0, 0, 0, 0, 0, 1, 1])
    assert rft_select(RESPONSES, *tensors, 0.5, 2) == [0, 1, 6]


@given(st.lists(st.tuples(st.sampled_from(RESPONSES), st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.integers(0, 2)), max_size=9),
       st.integers(1, 3))  # fmt: skip
def test_a_choice_is_valid_good_different_and_no_more_than_asked(rows_, most):
    responses, rewards, valid, groups = ([row[i] for row in rows_] for i in range(4))
    chosen = rft_select(responses, rewards, valid, groups, 0.5, most)
    assert chosen == sorted(set(chosen)) and all(valid[j] and rewards[j] >= 0.5 for j in chosen)
    for group in set(groups):
        mine = [tuple(responses[j]) for j in chosen if groups[j] == group]
        good = {tuple(r) for r, reward, v, g in rows_ if v and reward >= 0.5 and g == group}
        assert len(mine) == len(set(mine)) == min(most, len(good))


@pytest.mark.cuda
def test_cuda_gives_the_same_objective():
    batch = random_batch(4, torch.float32)
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in vars(batch).items()}
    here, there = batch.by(policy_objective_fused), Batch(**moved).by(policy_objective_fused)
    assert_close(there[0].value.cpu(), here[0].value)
    assert_close(there[1].cpu(), here[1])
