"""The oracle catches what it says it catches: also mistakes that somebody else wrote, in other words.

The modules below repeat known bugs of real stacks in plain NumPy or torch, without a line of the suspects that name
them: the cause must be found from the numbers alone.

Run: .venv/bin/python -m pytest tests/test_mutants.py
"""

import json

import pytest

import oracle
from conformance import OPS, check, load_implementation
from mutants import Trial, try_op

EVERY_SUSPECT = [(op, suspect) for op in OPS.values() for suspect in op.suspects]

# (op, words that the cause must hold, a module that makes the mistake)
FOREIGN = [
    ("rms_norm", "mean", """
ARRAYS = "numpy"
import numpy as np
def rms_norm(x, weight, eps):
    centred = x - x.mean(-1, keepdims=True)
    return (centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + np.float32(eps)) * weight).astype(x.dtype)
"""),
    ("rope", "pairs (i, i+P/2)", """
import torch
def rope(x, cos, sin):
    half = x.shape[-1] // 2
    c, s = cos[:, :, None], sin[:, :, None]
    rotated = torch.cat((-x[..., half:], x[..., :half]), -1)
    wide = x.to(cos.dtype)
    return (wide * torch.cat((c, c), -1) + rotated.to(cos.dtype) * torch.cat((s, s), -1)).to(x.dtype)
"""),
    ("softmax_scale", "YaRN", """
import math
def softmax_scale(nope_dim, rope_dim, factor, mscale, mscale_all_dim):
    return 1 / math.sqrt(nope_dim + rope_dim)
"""),
    ("route", "biased", """
ARRAYS = "numpy"
import numpy as np
def route(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
    s = 1 / (1 + np.exp(-(x.astype(np.float64) @ weight.T.astype(np.float64))))
    b = s + bias
    g = b.reshape(len(x), n_group, -1)
    best = np.sort(g, -1)[..., -2:].sum(-1)
    keep = np.argsort(-best, -1, kind="stable")[:, :topk_group]
    mask = np.full((len(x), n_group), -np.inf); np.put_along_axis(mask, keep, 0.0, 1)
    b = (g + mask[..., None]).reshape(b.shape)
    index = np.argsort(-b, -1, kind="stable")[:, :top_k] if pinned is None else pinned
    w = np.take_along_axis(s + bias, index, 1)
    return (w / w.sum(1, keepdims=True) * scale).astype(np.float32), index
"""),
    ("swiglu", "swapped", """
ARRAYS = "numpy"
import numpy as np
def swiglu(x, gate, up, down):
    g, u = x @ gate.T, x @ up.T
    return (g * u / (1 + np.exp(-u))) @ down.T
"""),
    ("int4_pack", "7.5", """
import torch
def int4_pack(weight):
    o, i = weight.shape
    groups = weight.reshape(o, i // 32, 32)
    scale = (groups.abs().max(-1).values / 7.5).bfloat16()
    d = torch.where(scale == 0, 1, scale.float())
    codes = (torch.clamp(torch.round(groups / d[..., None]), -8, 7) + 8).int().reshape(o, i // 8, 8)
    packed = torch.zeros(o, i // 8, dtype=torch.int64)
    for j in range(8):
        packed |= codes[..., j].long() << (4 * j)
    return torch.where(packed >= 2 ** 31, packed - 2 ** 32, packed).int(), scale
"""),
    ("pool_merge", "column", """
ARRAYS = "numpy"
import numpy as np
def pool_merge(x, grids):
    out, at = [np.zeros((0, 4, x.shape[1]), x.dtype)], 0
    for t, h, w in grids:
        item = x[at:at + t * h * w].reshape(t, h, w, -1).mean(0); at += t * h * w
        for i in range(0, h, 2):
            for j in range(0, w, 2):
                out.append(np.stack([item[i, j], item[i + 1, j], item[i, j + 1], item[i + 1, j + 1]])[None])
    return np.concatenate(out).astype(x.dtype)
"""),
    ("frame_indices", "every frame", """
import numpy as np
def frame_indices(count, source_fps, sample_fps, max_frames):
    return list(range(count))
"""),
    ("timestamp", "round", """
def timestamp(seconds):
    whole = round(seconds * 1000)
    return "%02d:%02d:%02d.%03d" % (whole // 3600000, whole // 60000 % 60, whole // 1000 % 60, whole % 1000)
"""),
    ("qk_clip", "root of gamma", """
import torch
def qk_clip(q_b, kv_b, max_logits, tau, nope_dim, rope_dim, value_dim):
    gamma = torch.where(max_logits > tau, tau / max_logits, torch.ones_like(max_logits)).to(q_b.dtype)
    h = len(gamma)
    q = q_b.reshape(h, nope_dim + rope_dim, -1) * gamma.sqrt()[:, None, None]
    kv = kv_b.reshape(h, nope_dim + value_dim, -1).clone()
    kv[:, :nope_dim] *= gamma.sqrt()[:, None, None]
    return q.reshape(q_b.shape), kv.reshape(kv_b.shape)
"""),
]  # fmt: skip


@pytest.mark.parametrize("name, words, text", FOREIGN, ids=[name for name, _, _ in FOREIGN])
def test_a_mistake_in_foreign_words_is_named(name, words, text, tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text(text)
    row = check(load_implementation(str(path)), [name])[0]
    assert row.status == "FAIL" and row.finding.suspect, row.finding.text()
    assert words in row.finding.cause, row.finding.text()


def test_there_are_at_least_sixty_mutants():
    assert len(EVERY_SUSPECT) >= 60


def test_the_table_and_its_exit_codes(capsys, tmp_path):
    assert oracle.main(["mutants", "--ops", "rms_norm,softmax_scale", "--json", str(tmp_path / "m.json")]) == 0
    out = capsys.readouterr().out
    assert "false alarms" in out and "all" in out
    assert {row["verdict"] for row in json.loads((tmp_path / "m.json").read_text())} <= {"named", "passed"}
    assert oracle.main(["mutants", "--ops", "rmsnorm"]) == 2
    assert oracle.main(["mutants", "--max-examples", "0"]) == 2


def test_a_survivor_and_a_false_alarm_are_told(monkeypatch, capsys):
    import dataclasses

    op = OPS["rms_norm"]
    harmless = dataclasses.replace(op.suspects[0], name="harmless", wrong=op.reference)
    spoiled = dataclasses.replace(op, suspects=(harmless,), twins={"spoiled": op.suspects[0].wrong}, variants={})
    monkeypatch.setitem(OPS, "rms_norm", spoiled)
    assert [trial.verdict for trial in try_op(spoiled)] == ["survived", "false alarm"]
    assert oracle.main(["mutants", "--ops", "rms_norm"]) == 1
    out = capsys.readouterr().out
    assert "rms_norm.harmless: survived" in out and "rms_norm.spoiled: false alarm" in out


def test_a_mutant_killed_for_another_reason_is_not_called_named():
    finding = type("Finding", (), {"cause": "something else"})()
    assert Trial("op", "m", True, "the mistake", finding).verdict == "killed"
    assert Trial("op", "m", True, "the mistake", None).verdict == "survived"
