"""What the experiments share: verdicts by their rule, a decoder, training and loss on batches.

Run: .venv/bin/python -m pytest tests/test_lab.py
"""

import itertools
import json

import numpy as np
import pytest
import torch

from lab import DIRECTION, NOT, REPLICATES, Scale, blend, decoder, judge, judge_alike, loss_on, pretrain
from sft import SFTConfig
from sources import TEXT_WEIGHTS, VISION_WEIGHTS, weighted
from study import Estimate, Log

SMALL = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2, "n_routed_experts": 4}
FEW = SFTConfig(steps=3, rows=2, length=96)
TEXT = weighted({"sum": 1.0, "copy": 1.0})


@pytest.mark.parametrize(
    "low,mean,high,least,verdict",
    [
        (0.1, 0.2, 0.3, 0.0, REPLICATES), (-0.1, 0.2, 0.5, 0.0, DIRECTION), (-0.3, -0.1, 0.2, 0.0, NOT), (-0.3, 0.0, 0.3, 0.0, NOT),
        (0.1, 0.2, 0.3, 0.25, REPLICATES), (0.1, 0.15, 0.2, 0.25, DIRECTION), (-0.3, -0.2, -0.1, 0.25, NOT),
    ],
)  # fmt: skip
def test_a_better_b_is_judged_by_its_interval(low, mean, high, least, verdict):
    assert judge(Estimate(mean, low, high), least) == verdict


@pytest.mark.parametrize(
    "low,mean,high,verdict", [(-0.04, 0.0, 0.05, REPLICATES), (-0.04, 0.03, 0.1, DIRECTION), (0.01, 0.06, 0.1, NOT), (-0.2, -0.1, 0.0, NOT)]
)
def test_as_good_as_is_judged_by_a_margin(low, mean, high, verdict):
    assert judge_alike(Estimate(mean, low, high), 0.05) == verdict


def test_a_scale_picks_and_keeps_finished_cells(tmp_path):
    assert Scale(tmp_path, quick=True).pick(5, 2) == 2 and Scale(tmp_path).pick(5, 2) == 5
    scale, calls = Scale(tmp_path, (1,), workers=0), []

    def cell(folder, name, log, seed):
        calls.append(name)
        log(loss=1.0)
        return {"seed": seed, "folder": folder.name}

    for _ in range(2):
        assert scale.run("one", {"a-1": {"seed": 1}}, cell) == {"a-1": {"seed": 1, "folder": "one"}}
    assert calls == ["a-1"] and (tmp_path / "one" / "cells" / "a-1.json").exists()


def test_a_decoder_depends_on_its_seed_alone():
    one, same, other = (decoder(seed, **SMALL).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["language_model.lm_head.weight"], other["language_model.lm_head.weight"])
    assert decoder(0, **SMALL).config.vision.text_hidden_size == 32


def test_pretraining_moves_the_loss_and_logs_every_step(tmp_path):
    model, log = decoder(1, **SMALL), Log(tmp_path / "x.jsonl")
    held_out = list(itertools.islice(blend(TEXT, 0.0, FEW, 7, "heldout"), 2))
    before = loss_on(model, held_out)
    results = pretrain(model, blend(TEXT, 0.0, FEW, 1), FEW, log, arm="x")
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and all(row["arm"] == "x" for row in rows)
    assert [row["loss"] for row in rows] == [result.loss for result in results]
    assert loss_on(model, held_out) < before - 0.1


def test_the_loss_on_batches_is_that_of_the_softmax():
    model, batch = decoder(1, **SMALL).double(), next(blend(TEXT, 0.0, FEW, 3))
    hidden, _ = model.hidden(model.embed(batch.ids), batch.positions, batch.segment_ids)
    logits = (hidden @ model.language_model.lm_head.weight.T).detach().numpy()
    wanted, total = batch.loss_mask.numpy(), 0.0
    for place in zip(*np.nonzero(wanted)):
        row = logits[place] - logits[place].max()
        total += np.log(np.exp(row).sum()) - row[batch.targets.numpy()[place]]
    assert loss_on(model, [batch]) == pytest.approx(total / wanted.sum(), rel=1e-6)


def test_weights_name_sources_of_one_modality():
    assert all(source.modality == "text" for source, _ in weighted(TEXT_WEIGHTS))
    assert all(source.modality == "vision" for source, _ in weighted(VISION_WEIGHTS))
