"""Claims about training_claims.py: AdamW is AdamW, every choice and figure follows its rule, and all three experiments run from end to end.

Run: .venv/bin/python -m pytest tests/test_training_claims.py
"""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

import training_claims
from k25 import K25Config
from lab import DIRECTION, NOT, REPLICATES, Scale, blend, decoder, judge, judge_alike, loss_on, worst
from sft import SFTConfig
from sources import TEXT_WEIGHTS, weighted
from study import Estimate, bootstrap, read_rows
from training_claims import (EXPERTS, HOTTER, LARGEST, MARGIN, SMALLEST, adamw, balance, best, doublings, muonclip, nearest, reached, slopes,
                             sparsity, threshold, trained, unigram)  # fmt: skip

CELL = {
    "seed": 1, "kind": "muon", "rate": 0.01, "tau": None, "gamma": 0.0, "alpha": 0.0, "steps": 8, "rows": 1, "length": 96, "points": 2, "held_out": 2,
    "shape": SMALLEST,
}  # fmt: skip


def run(folder, **changes):
    """One cell, with its rows."""
    rows = []
    return trained(folder, "x", lambda **row: rows.append(row), **(CELL | changes)), rows


# Choices and figures


def test_adamw_is_the_formula():
    """By hand: w ← w (1 − lr·decay) − lr · m̂ / (√v̂ + eps), and no decay for vectors."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    optimizer, lr, decay, (first, second) = adamw(model, 0.02, 0.3), 0.02, 0.3, (0.9, 0.95)
    weights = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    means, squares = ({name: np.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    for step in range(1, 5):
        optimizer.zero_grad()
        model(torch.randn(6, 4, dtype=torch.float64)).square().sum().backward()
        for name, value in model.named_parameters():
            gradient = value.grad.numpy()
            means[name] = first * means[name] + (1 - first) * gradient
            squares[name] = second * squares[name] + (1 - second) * gradient**2
            update = means[name] / (1 - first**step) / (np.sqrt(squares[name] / (1 - second**step)) + 1e-8)
            weights[name] = weights[name] * (1 - lr * decay * (name == "weight")) - lr * update
        optimizer.step()
    assert all(np.allclose(value.detach().numpy(), weights[name], rtol=1e-9) for name, value in model.named_parameters())
    assert all(group["peak_lr"] == lr for group in optimizer.param_groups)


def test_adamw_holds_every_parameter_once():
    model = decoder(0, **SMALLEST)
    held = [id(parameter) for group in adamw(model, 0.01, 0.1).param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_the_best_is_the_lowest_and_never_what_is_no_number():
    assert best({0.1: 2.0, 0.2: 1.5, 0.4: 1.6}) == 0.2
    assert best({0.1: math.nan, 0.2: 3.0, 0.4: math.inf}) == 0.2


def test_tau_is_half_the_largest_logit_and_at_most_the_reports():
    assert (threshold(9.0), threshold(180.0), threshold(1000.0)) == (4.5, 90.0, LARGEST)


def test_the_nearest_is_so_as_a_ratio():
    assert nearest({"a": 0.2, "b": 0.9}, 0.45) == "b"  # 2 times against 2.25 times, though 0.2 is nearer as a difference
    assert nearest({"a": 0.3, "b": 0.9}, 0.45) == "a"


def test_reached_by_hand():
    assert reached(2.0, [4.0, 3.0, 1.0, 1.0]) == pytest.approx(0.5 + 0.25 / 2)
    assert reached(2.5, [4.0, 2.0, 3.0, 1.0]) == pytest.approx(0.25 + 0.25 * 0.75)  # the first time, not the last
    assert reached(0.5, [4.0, 3.0, 1.0, 1.0]) == 1.0
    assert reached(5.0, [4.0, 3.0]) == 0.5


def test_doublings_by_hand():
    """A loss of 3 − log₂ of the tokens: 2 with two of them, 1 with four; a goal of 1.5 needs 2^1.5, half a doubling less than four."""
    assert doublings(2.0, 2.0, 1.0) == 1.0 and doublings(1.0, 2.0, 1.0) == 0.0
    assert doublings(1.5, 2.0, 1.0) == 0.5 and doublings(3.0, 2.0, 1.0) == 2.0 and doublings(0.5, 2.0, 1.0) == -0.5


def test_slopes_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    losses, xs = rng.normal(size=(3, 5, 4)), np.log2(EXPERTS)
    expected = [[np.polyfit(xs, losses[s, :, b], 1)[0] for b in range(4)] for s in range(3)]
    assert np.allclose(slopes(losses, xs), expected)


def test_unigram_counts_the_wanted_targets():
    batches = [next(blend(weighted(TEXT_WEIGHTS), 0.0, SFTConfig(1, 2, 96), seed, "heldout")) for seed in (1, 2)]
    counts = Counter(int(batch.targets[place]) for batch in batches for place in zip(*np.nonzero(batch.loss_mask.numpy())))
    total = sum(counts.values())
    assert unigram(batches) == pytest.approx(-sum(n * math.log(n / total) for n in counts.values()) / total)
    assert 0 < unigram(batches) < math.log(len(counts))


@pytest.mark.parametrize("largest, verdict", [(199.0, REPLICATES), (200.0, NOT)])
def test_logits_are_bounded_only_where_no_seed_comes_to_twice_the_threshold(largest, verdict):
    peaks = {"muon": [4, 5], "adamw": [5, 6], "hot-muon": [900, 800], "hot-adamw": [500, 400], "hot-muonclip": [150, largest]}
    found = {arm: [{"max_logit": float(peak)} for peak in each] for arm, each in peaks.items()}
    claims = training_claims._logit_claims(found, {"muon": 0.004, "adamw": 0.002}, {"muon": 0.064, "adamw": 0.032}, {"hot": 100.0})
    assert next(claims).verdict == verdict


def test_the_worst_of_several_verdicts():
    assert worst(REPLICATES, REPLICATES) == REPLICATES and worst(REPLICATES, DIRECTION) == DIRECTION and worst(NOT, DIRECTION) == NOT


# A cell


def test_a_cell_measures_on_the_way_and_logs_every_step(tmp_path, monkeypatch):
    models, real = [], training_claims.decoder
    monkeypatch.setattr(training_claims, "decoder", lambda *rest, **fields: models.append(real(*rest, **fields)) or models[-1])
    result, rows = run(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9)) and np.array(result["curve"]).shape == (2, 2)
    source = blend(weighted(TEXT_WEIGHTS), 0.0, SFTConfig(1, 1, 96), 0, "heldout")
    assert result["curve"][-1] == [pytest.approx(loss_on(models[0], [next(source)])) for _ in range(2)]
    assert np.mean(result["curve"][-1]) < np.mean(result["curve"][0]) < math.log(512)
    assert result["max_logit"] == max(max(row["logit_layers"]) for row in rows)
    assert result["load_cv"] == pytest.approx(np.mean([row["load_layers"] for row in rows[-2:]]))
    assert run(tmp_path)[0] == result and run(tmp_path, seed=2)[0] != result


def test_the_arms_of_a_cell_differ_in_what_they_say(tmp_path):
    plain, _ = run(tmp_path)
    clipped, rows = run(tmp_path, tau=plain["max_logit"] / 2)
    assert sum(row["clipped"] for row in rows) > 0 and clipped["max_logit"] < plain["max_logit"]
    assert run(tmp_path, tau=2 * plain["max_logit"])[0] == plain
    assert run(tmp_path, kind="adamw")[0]["curve"] != plain["curve"]


def test_gamma_moves_the_bias_and_alpha_the_loss(tmp_path, monkeypatch):
    models, real = [], training_claims.decoder
    monkeypatch.setattr(training_claims, "decoder", lambda *rest, **fields: models.append(real(*rest, **fields)) or models[-1])
    for changes in ({}, {"gamma": 0.05}, {"alpha": 0.3}):
        run(tmp_path, steps=1, points=1, **changes)
    biases = [router.e_score_correction_bias for model in models for router in model.routers()[:1]]
    assert not biases[0].any() and biases[1].abs().max() == pytest.approx(0.05) and not biases[2].any()
    assert [model.config.aux_loss_alpha for model in models] == [0.0, 0.0, 0.3]


# From end to end


@pytest.fixture
def scale(tmp_path, monkeypatch):
    """A quick scale, which tells the cells that it ran."""
    ran, real = [], training_claims.trained
    monkeypatch.setattr(training_claims, "trained", lambda folder, name, *rest, **fields: ran.append(name) or real(folder, name, *rest, **fields))
    return Scale(tmp_path, (1,), quick=True, workers=0), ran


def cells(scale, name):
    """{cell: (arguments, result)} of an experiment."""
    found = {path.stem: json.loads(path.read_text()) for path in (scale.folder / name / "cells").glob("*.json")}
    return {cell: (kept["arguments"], kept["result"]) for cell, kept in found.items()}


def losses(kept, cell):
    """Held-out losses at the end, a table of one seed."""
    return np.array([kept[cell][1]["curve"][-1]])


def test_muonclip_chooses_on_seed_0_and_judges_by_the_rules(scale):
    scale, ran = scale
    claims = muonclip(scale)
    once, kept = len(ran), cells(scale, "muonclip")
    assert once == len(set(ran)) == len(kept) and muonclip(scale) == claims and len(ran) == once
    chosen = {}
    for kind in ("adamw", "muon", "muonclip"):
        grid = {arguments["rate"]: np.mean(result["curve"][-1]) for name, (arguments, result) in kept.items() if name.startswith(f"rate-{kind}-")}
        chosen[kind] = min(grid, key=grid.get)
        assert len(grid) > 1 and kept[f"{kind}-1"][0]["rate"] == kept[f"rate-{kind}-{chosen[kind]:g}"][0]["rate"]
    assert all((arguments["seed"] == 0) == name.startswith(("rate-", "hot-muon-0")) for name, (arguments, _) in kept.items())
    calm, hot = kept[f"rate-muon-{chosen['muon']:g}"][1]["max_logit"] / 2, kept["hot-muon-0"][1]["max_logit"] / 2
    assert (kept["muonclip-1"][0]["tau"], kept["hot-muonclip-1"][0]["tau"]) == (calm, hot) and kept["hot-muon-1"][0]["tau"] is None
    assert kept["hot-muon-1"][0]["rate"] == kept["hot-muonclip-1"][0]["rate"] == HOTTER * chosen["muon"]
    assert kept["hot-adamw-1"][0]["rate"] == HOTTER * chosen["adamw"]
    assert kept["half-1"][0] == kept["muonclip-1"][0] | {"steps": kept["muonclip-1"][0]["steps"] // 2}
    assert kept["adamw-1"][0] | {"kind": "muon", "rate": chosen["muon"]} == kept["muon-1"][0]

    gain = bootstrap(losses(kept, "adamw-1") - losses(kept, "muonclip-1"))
    goal, half, whole = (losses(kept, cell).mean() for cell in ("adamw-1", "half-1", "muonclip-1"))
    fewer = (goal - whole) / (half - whole)
    gap = bootstrap(losses(kept, "muonclip-1") - losses(kept, "muon-1"))
    peak = lambda cell: kept[cell][1]["max_logit"]  # noqa: E731
    bound, more = (REPLICATES if peak("hot-muon-1") > peak(cell) else NOT for cell in ("hot-muonclip-1", "hot-adamw-1"))
    assert [claim.verdict for claim in claims] == [judge(gain), judge(Estimate(fewer, fewer, fewer), 1.0), judge_alike(gap, MARGIN), bound, more]
    assert str(gain) in claims[0].found and f"AdamW needs {2**fewer:.2f} ×" in claims[1].found and str(gap) in claims[2].found
    assert f"{peak('hot-muon-1') / peak('hot-muonclip-1'):.2f} ×" in claims[3].found
    assert all(f"{kind} {rate:g} (" in claims[0].setup for kind, rate in chosen.items())
    assert claims[0].plot == "muonclip.png" and (scale.folder / "muonclip" / "muonclip.png").stat().st_size > 5000


def test_balance_chooses_on_seed_0_and_wants_loss_and_balance_both(scale):
    scale, ran = scale
    claims = balance(scale)
    once, kept = len(ran), cells(scale, "balance")
    assert once == len(set(ran)) == len(kept) and balance(scale) == claims and len(ran) == once
    grids = {key: {cell[key]: result["load_cv"] for name, (cell, result) in kept.items() if name.startswith(f"{key}-")} for key in ("gamma", "alpha")}
    gamma = min(grids["gamma"], key=grids["gamma"].get)
    alpha = min(grids["alpha"], key=lambda a: abs(math.log(grids["alpha"][a] / grids["gamma"][gamma])))
    settings = {arm: (kept[f"{arm}-1"][0]["gamma"], kept[f"{arm}-1"][0]["alpha"]) for arm in ("none", "bias", "auxiliary")}
    assert settings == {"none": (0, 0), "bias": (gamma, 0), "auxiliary": (0, alpha)}
    load = {arm: kept[f"{arm}-1"][1]["load_cv"] for arm in settings}
    saved = losses(kept, "auxiliary-1") - losses(kept, "bias-1")
    assert claims[0].verdict == (REPLICATES if load["none"] > load["bias"] else NOT)
    assert claims[1].verdict == (judge(bootstrap(saved)) if load["auxiliary"] + 0.05 > load["bias"] else NOT)
    assert str(bootstrap(saved)) in claims[1].found and (scale.folder / "balance" / "balance.png").stat().st_size > 5000


def test_sparsity_judges_the_slope(scale):
    scale, ran = scale
    (claim,) = sparsity(scale)
    once, kept = len(ran), cells(scale, "sparsity")
    assert sparsity(scale) == [claim] and len(ran) == once == len(kept) == 2
    few, many = (kept[f"experts-{number}-1"][0] for number in EXPERTS[:2])
    assert few | {"shape": many["shape"]} == many and few["shape"] | {"n_routed_experts": EXPERTS[1]} == many["shape"]
    fall = bootstrap(losses(kept, f"experts-{EXPERTS[0]}-1") - losses(kept, f"experts-{EXPERTS[1]}-1"))  # two points: the slope is their difference
    assert claim.verdict == judge(fall) and f"each doubling saves {fall}" in claim.found
    assert len(read_rows(scale.folder / "sparsity", f"experts-{EXPERTS[0]}-1")) == few["steps"]
    assert (scale.folder / "sparsity" / claim.plot).stat().st_size > 5000


def test_active_parameters_do_not_grow_with_the_experts():
    """At full size: what a token passes, all but the routers, is as large whatever the number of experts."""
    shape = training_claims.SHAPE | {"moe_intermediate_size": training_claims.NARROW}
    active = set()
    for number in (EXPERTS[0], EXPERTS[-1]):
        model = decoder(0, **(shape | {"n_routed_experts": number}))
        sizes = {name: parameter.numel() for name, parameter in model.language_model.named_parameters()}
        routed = sum(size for name, size in sizes.items() if ".experts." in name)
        routers = sum(size for name, size in sizes.items() if name.endswith("gate.weight"))
        assert routed and routers == 2 * number * shape["hidden_size"]
        active.add(sum(sizes.values()) - routers - routed + routed * model.config.num_experts_per_tok // number)
    assert len(active) == 1 and model.config.num_experts_per_tok == K25Config.preset("toy").num_experts_per_tok == 2
