"""scale_bench: exponents are those of the data, points differ only in what is swept, figures are those of the raw samples.

Run: .venv/bin/python -m pytest tests/test_scale_bench.py
"""

import dataclasses
import json
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scale_bench
from k25 import K25, K25Config
from launcher import forkserver
from parallel import Layout
from scale_bench import MEASURES, SCALES, Case, Scale, fit, report, run, samples_of, sweeps

pytestmark = pytest.mark.xdist_group("scale_bench")  # the bench is run once

TINY = Scale(layers=2, ranks=(1, 2), experts=(4, 8), lengths=(16, 32), pictures=(0, 1, 2), microbatches=2, length=32, batch=64, repeats=2,
             steps=1)  # fmt: skip


# Fits


@given(st.floats(-2, 2), st.floats(1e-3, 1e6), st.lists(st.integers(1, 10_000), min_size=2, max_size=8, unique=True))
def test_an_exact_power_law_gives_its_exponent_and_factor(exponent, factor, xs):
    found = fit(xs, [factor * x**exponent for x in xs])
    assert found.exponent == pytest.approx(exponent, abs=1e-6) and found.factor == pytest.approx(factor, rel=1e-4)
    assert found.points == len(xs)
    if len(xs) == 2:
        assert found.low is None and found.high is None
    else:
        assert found.low - 1e-6 <= exponent <= found.high + 1e-6 and found.high - found.low < 1e-4


def test_the_interval_is_students_by_hand():
    """Logarithms (0,0), (1,1), (2,3): slope 3/2; squared residuals 1/36 + 4/36 + 1/36 = 1/6 over one degree of freedom,
    over Σ(x − 1)² = 2: standard error √(1/12); t(0.975, 1) = 12.7062."""
    found = fit(np.exp([0, 1, 2]), np.exp([0, 1, 3]))
    reach = 12.7062 * (1 / 12) ** 0.5
    assert (found.exponent, found.low, found.high) == pytest.approx((1.5, 1.5 - reach, 1.5 + reach), rel=1e-4)


def test_nineteen_of_twenty_intervals_hold_the_true_exponent():
    random, xs = np.random.default_rng(0), np.array([4, 8, 16, 32, 64])
    fits = [fit(xs, 3 * xs**-0.4 * np.exp(0.2 * random.standard_normal(5))) for _ in range(400)]
    assert 0.92 < np.mean([f.low <= -0.4 <= f.high for f in fits]) < 0.98


# Points


SWEPT = {"ranks": ("ranks", ("layout",)), "experts": ("experts", ("experts",)), "tokens per sequence": ("length", ("rows", "length")),
         "pictures per batch": ("pictures", ("pictures",))}  # fmt: skip


@pytest.mark.parametrize("scale", [*SCALES.values(), TINY])
def test_along_a_sweep_nothing_changes_but_what_is_swept(scale):
    for name, points in sweeps(scale).items():
        swept, free = SWEPT[name.split(",")[0]]
        assert {x: getattr(case, swept) for x, case in points.items()} == {x: x for x in points}
        assert len({dataclasses.replace(case, **dict.fromkeys(free)) for case in points.values()}) == 1
        assert len({case.tokens for case in points.values()}) == 1, "another number of tokens per step"
        for case in points.values():
            config = scale.config(case)
            case.layout.check(config.num_hidden_layers, config.n_routed_experts, case.ranks)
            assert config.num_experts_per_tok == 2


def test_splitting_the_ranks_otherwise_keeps_the_global_batch():
    kinds = {name: points[4].layout for name, points in sweeps(SCALES["full"]).items() if name.startswith("ranks")}
    assert [kinds[f"ranks, {kind}"].numbers()[:4] for kind in ("data parallel", "expert parallel", "pipeline")] == [
        (1, 1, 1, 4), (1, 1, 4, 4), (4, 1, 1, 1)]  # fmt: skip
    assert {layout.dp * layout.microbatches for layout in kinds.values()} == {SCALES["full"].microbatches}


def test_one_rank_alone_is_no_sweep():
    assert not any(name.startswith("ranks") for name in sweeps(dataclasses.replace(TINY, ranks=(1,))))


def test_the_slowest_rank_sets_the_clock_and_all_share_the_processor():
    case = Case(Layout(dp=2, microbatches=3), rows=2, length=50)  # 600 tokens
    raw = {"seconds": [[2.0, 3.0], [1.0, 1.5]], "processor": [[1.0, 0.5], [0.75, 0.75]], "peak": [5e6, 7e6]}
    assert samples_of(case, raw, "cpu") == {"clock": [200, 400], "processor": [400, 400], "peak": [7]}
    assert samples_of(case, raw, "cuda")["processor"] == [100, 200]


# The whole


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale-bench")
    forkserver()
    run(TINY, "cpu", folder)
    return json.loads((folder / "scale_bench.json").read_text()), folder


def test_every_figure_is_that_of_the_raw_samples(told):
    told, _ = told
    assert [sweep["sweep"] for sweep in told["sweeps"]] == list(sweeps(TINY)) and told["scale"]["seed"] == 0 and told["about"]["torch"]
    for sweep, cases in zip(told["sweeps"], sweeps(TINY).values(), strict=True):
        for point, (x, case) in zip(sweep["points"], cases.items(), strict=True):
            assert point["x"] == x and len(point["raw"]["seconds"]) == TINY.repeats and len(point["raw"]["peak"]) == case.ranks
            assert point["samples"] == samples_of(case, point["raw"], "cpu")
            assert point["median"] == {key: statistics.median(point["samples"][key]) for key in MEASURES}
        fitted = [p for p in sweep["points"] if p["x"]]
        for key, found in sweep["fits"].items():
            assert found == dataclasses.asdict(fit([p["x"] for p in fitted], [p["median"][key] for p in fitted]))


def test_the_report_and_the_plot_show_the_json(told):
    told, folder = told
    text = (folder / "report.md").read_text()
    assert text == report(told) and (folder / "scale_bench.png").read_bytes().startswith(b"\x89PNG")
    for sweep in told["sweeps"]:
        assert sweep["sentence"] in text
        for point in sweep["points"]:
            assert f"| {point['x']} | {point['median']['clock']:,.0f} (" in text and f"| {point['median']['peak']:.1f} |" in text
        assert f"{sweep['fits']['peak']['exponent']:+.2f} (" in text


def test_memory_grows_by_what_more_experts_weigh(told):
    """Weights and momentum; their gradients are there as well when a step is at its fullest."""
    told, _ = told
    (points,) = [sweep["points"] for sweep in told["sweeps"] if sweep["sweep"] == "experts"]

    def weights(experts):
        with torch.device("meta"):
            model = K25(dataclasses.replace(K25Config.preset("toy"), num_hidden_layers=2, n_routed_experts=experts))
        return sum(p.numel() * 4 for name, p in model.named_parameters() if ".mlp.experts." in name) / 1e6

    assert points[1]["median"]["peak"] - points[0]["median"]["peak"] >= 3 * (weights(8) - weights(4))


def test_expert_parallel_ranks_hold_less_than_one_alone(told):
    told, _ = told
    for sweep in told["sweeps"]:
        if sweep["sweep"] in ("ranks, expert parallel", "ranks, pipeline"):
            alone, split = [point["median"]["peak"] for point in sweep["points"]]
            assert split < alone


@pytest.mark.parametrize("wrong, words", [(("--ranks", "-1"), "--ranks -1: choose 1 …"), (("--repeats", "0"), "--repeats 0: at least 1")])
def test_misuse_is_one_line_and_exit_code_2(wrong, words, capsys, tmp_path):
    assert scale_bench.main([*wrong, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out and not (tmp_path / "out").exists()


@pytest.mark.cuda
def test_on_cuda_memory_is_the_devices(tmp_path):
    run(dataclasses.replace(TINY, ranks=(1,), repeats=1), "cuda", tmp_path)
    told = json.loads((tmp_path / "scale_bench.json").read_text())
    assert all(point["median"]["peak"] > 0 and point["median"]["clock"] > 0 for sweep in told["sweeps"] for point in sweep["points"])
