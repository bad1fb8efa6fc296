"""Claims about fusion.py: the arms differ in nothing but when vision comes, dips are measured by their rule, and it runs from end to end.

Run: .venv/bin/python -m pytest tests/test_fusion.py
"""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

import fusion
import sft
from evaluate import ABILITIES
from fusion import AFTER, ARMS, MARGIN, SMALLEST, batches, phases, points, rise, roughness, tokens_of
from k25 import load
from lab import DIRECTION, NOT, REPLICATES, Scale
from optim import lr_at
from sft import SFTConfig
from step import StepResult
from study import read_rows

T = SFTConfig(steps=60, rows=2, length=192)


# Data


def test_arms_share_one_budget_on_paper():
    """By hand, of 600 steps: 600 · 10 %, 300 · 20 % and 120 · 50 % are all worth 60 steps of vision."""
    assert phases("early", 600) == ((0.0, 0), (0.1, 600))
    assert phases("mid", 600) == ((0.0, 300), (0.2, 300))
    assert phases("late", 600) == ((0.0, 480), (0.5, 120))


def test_arms_see_as_many_tokens_of_each_modality():
    counts = {name: np.array([tokens_of(batch) for batch in batches(name, T, 1)]) for name in ARMS}  # (steps,2)
    assert all(len(count) == T.steps for count in counts.values())
    text, vision = np.array([count.sum(0) for count in counts.values()]).T
    assert text.max() / text.min() < 1.03 and vision.max() / vision.min() < 1.08
    assert 0.09 < vision.sum() / (text.sum() + vision.sum()) < 0.11
    assert not counts["mid"][:30, 1].any() and not counts["late"][:48, 1].any()
    assert counts["early"][:30, 1].sum() > 0 and counts["late"][48:].sum(0)[1] == pytest.approx(counts["late"][48:].sum(0)[0], rel=0.1)


def test_tokens_are_counted_without_padding():
    batch = next(batches("early", T, 1))
    slow = Counter("vision" if batch.vision[place] else "text" for place in zip(*np.nonzero(batch.segment_ids.numpy() >= 0)))
    assert tokens_of(batch) == (slow["text"], slow["vision"]) and 0 < sum(slow.values()) < batch.ids.numel()


def test_data_depend_on_the_seed_alone_and_the_second_stretch_is_new():
    first, again, other = (list(islice(batches("early", T, seed), 3)) for seed in (1, 1, 2))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again)) and not torch.equal(first[0].ids, other[0].ids)
    mid = [batch for batch in batches("mid", SFTConfig(steps=4, rows=2, length=192), 1)]
    assert not torch.equal(mid[0].ids, mid[2].ids)


def test_points_stand_before_and_behind_each_injection():
    at = points(600)
    assert at == sorted(set(at)) and at[-1] == 600 and set(range(50, 601, 50)) < set(at)
    assert all({start, *(start + after for after in AFTER)} <= set(at) for start in (300, 480))
    assert max(points(10)) == 10 and min(points(10)) >= 1


# Training


class _Stop(Exception):
    pass


@pytest.fixture
def made_tower(tmp_path):
    """An experiment's folder that holds the tower of seed 1, trained for a step."""
    shape = {"seed": 1, "text_steps": 1, "steps": 1, "rows": 1, "length": 192, "shape": SMALLEST}
    fusion.tower(tmp_path / "stages", "caption-tower-1", lambda **_: None, **shape)
    return tmp_path / "fusion"


def test_captions_train_the_tower_through_a_frozen_teacher(tmp_path, monkeypatch):
    states, real = [], fusion.pretrain

    def watched(model, *rest, **fields):
        before = {name: value.clone() for name, value in model.named_parameters()}
        real(model, *rest, **fields)
        states.append((fields["stage"], {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}))

    monkeypatch.setattr(fusion, "pretrain", watched)
    fusion.tower(tmp_path, "caption-tower-1", lambda **_: None, 1, 1, 1, 1, 192, SMALLEST)
    (first, text), (second, captions) = states
    assert (first, second) == ("teacher", "captions")
    assert all(name.startswith("language_model.") for name in text) and "language_model.lm_head.weight" in text
    assert {name.partition(".")[0] for name in captions} == {"vision_tower", "mm_projector"}
    kept = load(tmp_path / "models" / "caption-tower-1").config
    assert kept.num_hidden_layers == kept.first_k_dense_replace == 2


def test_an_arm_starts_with_its_tower_and_projector_and_a_new_decoder(made_tower, monkeypatch):
    met = {}

    def never(model, source, t):
        met[len(met)] = {name: value.clone() for name, value in model.state_dict().items()}
        raise _Stop

    monkeypatch.setattr(fusion, "train_on", never)
    for name in ("early", "late"):
        with pytest.raises(_Stop):
            fusion.arm(made_tower, f"{name}-1", lambda **_: None, name, 1, 10, 1, 192, 1, 1, SMALLEST)
    trained = load(made_tower.parent / "stages" / "models" / "caption-tower-1", dtype=torch.float32).state_dict()
    same = {name for name, value in met[0].items() if name in trained and value.shape == trained[name].shape and torch.equal(value, trained[name])}
    eyes = ("vision_tower.", "mm_projector.")
    assert all(name in same for name in met[0] if name.startswith(eyes))
    matrices = {name for name, value in met[0].items() if not name.startswith(eyes) and value.ndim > 1}
    assert matrices and not matrices & same
    assert all(torch.equal(met[0][name], met[1][name]) for name in met[0])


def test_the_tower_stays_as_it_is_while_projector_and_decoder_learn(made_tower, monkeypatch):
    met, real = [], fusion.train_on

    def watched(model, *rest):
        met.append((model, {name: value.clone() for name, value in model.named_parameters()}))
        return real(model, *rest)

    monkeypatch.setattr(fusion, "train_on", watched)
    fusion.arm(made_tower, "early-1", lambda **_: None, "early", 1, 4, 1, 192, 1, 1, SMALLEST)
    ((model, before),) = met
    moved = {name.partition(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"mm_projector", "language_model"}


def test_all_arms_follow_one_schedule_that_does_not_begin_again(made_tower, monkeypatch):
    rates = []

    def counted(model, optimizer, taken, t):
        rates[-1].append([group["lr"] / group["peak_lr"] for group in optimizer.param_groups])
        return StepResult(*[0.0] * 8, (), (), 0)

    monkeypatch.setattr(sft, "train_step", counted)
    for name in ARMS:
        rates.append([])
        fusion.arm(made_tower, f"{name}-1", lambda **_: None, name, 1, 20, 1, 192, 1, 1, SMALLEST)
    expected = [lr_at(step, 5, 20, 1.0, SFTConfig().floor) for step in range(20)]
    assert all(np.allclose(found, np.array(expected)[:, None]) for found in rates)


# Figures


def test_rise_and_roughness_by_hand():
    at = [10, 20, 20 + AFTER[0], 20 + AFTER[-1], 20 + AFTER[-1] + 1]
    curves = np.array([[5.0, 2.0, 2.5, 1.0, 9.0], [1.0, 3.0, 2.0, 2.5, 1.5]])  # what stands behind the window counts not
    assert rise(curves, at, 20).tolist() == [0.5, -0.5]
    assert roughness(curves).tolist() == [8.0, 2.0] and roughness(np.array([3.0, 2.0, 1.0])) == 0


def cells(curves, right=None):
    """Cells of one arm: a curve per seed, right answers the same for every ability."""
    return [{"curve": list(curve), "text": 90, "vision": 10, "right": dict.fromkeys(ABILITIES, right or [1, 0]), "chance": dict.fromkeys(ABILITIES, 0.25)}
            for curve in curves]  # fmt: skip


def curve(steps, dip=0.0, end=0.0, ripple=0.0, start=0.8):
    """Loss that falls evenly, but rises by `dip` at an injection, ends `end` higher, and ripples all the way."""
    at = np.array(points(steps))
    loss = 3 - 2 * at / steps + ripple * (np.arange(len(at)) % 2)
    loss[(at > start * steps) & (at <= start * steps + AFTER[-1])] += dip
    loss[-1] += end
    return loss


@pytest.mark.parametrize(
    "early, late, verdicts",
    [
        ({}, {"dip": 0.5}, (REPLICATES, REPLICATES, REPLICATES)),
        ({}, {}, (NOT, REPLICATES, REPLICATES)),
        ({"dip": 0.5}, {"dip": 0.5}, (NOT, REPLICATES, REPLICATES)),  # a dip that early has too is none of the injection's
        ({}, {"dip": 0.5, "end": 2 * MARGIN}, (REPLICATES, NOT, REPLICATES)),
        ({}, {"dip": 0.5, "end": -2 * MARGIN}, (REPLICATES, REPLICATES, REPLICATES)),
        ({"ripple": 0.4}, {"dip": 0.5}, (REPLICATES, REPLICATES, NOT)),
    ],
)
def test_a_dip_a_recovery_and_smoothness_are_judged_by_their_rules(early, late, verdicts):
    steps = 600
    by_arm = {"early": cells([curve(steps, **early)] * 3), "mid": cells([curve(steps)] * 3), "late": cells([curve(steps, **late)] * 3)}
    assert tuple(claim.verdict for claim in fusion._curve_claims(by_arm, steps)) == verdicts


def test_a_dip_in_most_seeds_alone_is_a_direction():
    rising, flat = curve(600, dip=0.5), curve(600)
    by_arm = {"early": cells([flat] * 3), "mid": cells([flat] * 3), "late": cells([rising, rising, curve(600, dip=-0.5)])}
    assert next(fusion._curve_claims(by_arm, 600)).verdict == DIRECTION


def test_abilities_are_paired_question_by_question():
    """By hand: early is right on three of four questions, mid on two, late on none; on code all are as good."""
    flat = [curve(600)] * 2
    by_arm = {"early": cells(flat, [1, 1, 1, 0]), "mid": cells(flat, [1, 1, 0, 0]), "late": cells(flat, [0, 0, 0, 0])}
    for some in by_arm.values():
        for cell in some:
            cell["right"] = cell["right"] | {"code": [0, 1, 0, 1]}
    claims = list(fusion._ability_claims(by_arm, 600))
    assert [claim.title.removeprefix("early fusion is better at ") for claim in claims] == list(ABILITIES)
    assert claims[0].found.startswith("0.750 / 0.500 / 0.000, chance 0.250; early less late 0.750 [") and "early less mid 0.250 [" in claims[0].found
    assert [claim.verdict for claim in claims] == [REPLICATES] * 5 + [NOT] and "early less late 0.000 [0.000, 0.000]" in claims[-1].found


# All of it


def test_it_runs_to_claims_and_plots_and_reruns_no_cell(tmp_path, monkeypatch):
    scale = Scale(tmp_path, (1,), quick=True, workers=0)
    claims = fusion.fusion(scale)
    assert len(claims) == len(ABILITIES) + 3 and {claim.plot for claim in claims} == {"abilities.png", "text_skill.png", ""}
    assert all((tmp_path / "fusion" / claim.plot).read_bytes().startswith(b"\x89PNG") for claim in claims if claim.plot)
    assert len(read_rows(tmp_path / "fusion", "late-1")) == 10
    for cell in ("arm", "tower"):
        monkeypatch.setattr(fusion, cell, None)
    assert fusion.fusion(scale) == claims
