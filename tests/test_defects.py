"""The trials of transformers' Kimi K2.5: each runs, and would be silent about a peer that does it right.

Run: .venv/bin/python -m pytest tests/test_defects.py
"""

import pytest
import torch

import defects
import oracle
from defects import DEFECTS, IMAGE, examine

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.models.kimi_k25", reason="this transformers has no Kimi K2.5")

of_this_version = pytest.mark.skipif(
    transformers.__version__ != "5.23.0",
    reason=f"documents transformers 5.23.0, this is {transformers.__version__}: see python oracle.py defects",
)


@of_this_version
def test_each_defect_of_5_23_is_shown(capsys):
    assert oracle.main(["defects"]) == 1
    out = capsys.readouterr().out
    assert out.count("[DEFECT]") == len(DEFECTS) == 4
    for words in ("split_with_sizes", "Sizes of tensors must match", "hidden_size 32 → 1152", "blocks.0"):
        assert words in out


def test_what_works_is_not_called_a_defect(monkeypatch):
    monkeypatch.setattr(defects, "CLIP", IMAGE)  # with images alone neither the public path nor the packed call fails
    assert [does for _, does in examine(["clips", "mixed-t"])] == ["", ""]


def test_a_peer_that_saves_and_reads_the_released_names_is_silent(monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", lambda self, folder: None)
    released = type("Vision", (), {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48})
    config = type("Config", (), {"vision_config": released})
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)
    assert [does for _, does in examine(["field-names", "saved-names"])] == ["", ""]


def test_an_unknown_trial_is_refused_in_one_line(capsys):
    assert oracle.main(["defects", "clip"]) == 2
    assert "choose among clips" in capsys.readouterr().err


def test_the_media_fit_their_places():
    ids, patches, grid_thw = defects._media(defects._tiny_model().config, IMAGE, (3, 4, 4))
    assert ids.shape == (1, 2 + 2 + 4) and patches.shape == (8 + 48, 588) and torch.equal(grid_thw[1], torch.tensor([3, 4, 4]))
