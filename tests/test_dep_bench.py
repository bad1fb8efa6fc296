"""Claims about dep_bench.py: pairs of batches differ only in their pictures, times are put together as the schedule runs,
efficiencies are what their formulas say, and the report says what was measured.

Run: .venv/bin/python -m pytest tests/test_dep_bench.py
"""

import dataclasses
import functools
import json
import random
import re
import statistics

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dep_report
from dep_bench import (Bench, MeasuredTrainer, Phases, Spread, backbone_flops, by_flops, by_items, contiguous, discounted,
                       draw_row, draw_size, encoder_share, figures, global_batch, imbalances, main, middle, model_config,
                       one_core_each, raw)  # fmt: skip
from k25 import K25, K25Config
from launcher import forkserver
from optim import MuonClip
from parallel import Layout, Place, Trainer, keep_units
from schedule import schedule_tables
from tokenizer import Tokenizer

pytestmark = pytest.mark.xdist_group("dep_bench")  # the bench is run once

TINY = Bench(ranks=1, pp=(1,), layers=2, rows=2, length=64, global_microbatches=2, spread=Spread(text_only=0.3, median=4, largest=12))


# Batches


def tensors(batches):
    return [getattr(batch, field.name) for batch in batches for field in dataclasses.fields(batch)]


def same(one, other):
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(a is b is None or a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


@given(st.integers(0, 99), st.integers(-1, 50), st.sampled_from(dep_report.KINDS))
@settings(deadline=None, max_examples=15)
def test_a_batch_is_a_function_of_seed_number_and_kind(seed, number, kind):
    bench = dataclasses.replace(TINY, seed=seed)
    batches = global_batch(bench, number, kind)
    assert same(batches, global_batch(bench, number, kind))
    assert not same(batches, global_batch(bench, number + 1, kind))
    assert not same(batches, global_batch(dataclasses.replace(bench, seed=seed + 1), number, kind))


@given(st.integers(0, 999), st.integers(1, 3), st.integers(40, 200))
@settings(deadline=None, max_examples=25)
def test_text_only_batches_have_the_backbone_tokens_of_their_multimodal_ones(seed, rows, length):
    """The same documents in the same places, and not one token of padding in either."""
    bench = dataclasses.replace(TINY, seed=seed, rows=rows, length=length, spread=Spread(text_only=0.3, largest=60))
    text, multimodal = (global_batch(bench, 0, kind) for kind in dep_report.KINDS)
    assert len(text) == len(multimodal) == bench.global_microbatches
    for plain, pictured in zip(text, multimodal):
        assert plain.ids.shape == pictured.ids.shape == (rows, length)
        assert torch.equal(plain.segment_ids, pictured.segment_ids) and torch.equal(plain.positions, pictured.positions)
        assert (plain.segment_ids >= 0).all()
        assert plain.patches is None and not plain.vision.any()
        pads = (pictured.ids == Tokenizer().media_pad).sum()
        assert pads == (0 if pictured.patches is None else len(pictured.media_slots))


@given(st.integers(0, 2**32), st.integers(1, 200))
@settings(deadline=None)
def test_no_picture_is_larger_than_the_largest_nor_than_its_row(seed, largest):
    rng, spread = random.Random(seed), Spread(text_only=0.0, largest=largest)
    rows, columns = draw_size(rng, spread)
    assert 1 <= rows and 1 <= columns and rows * columns <= largest
    length = rng.randint(30, 300)
    assert sum(16 + r * c for r, c in draw_row(rng, spread, length)) <= length - 3


def test_the_default_spread_has_long_tails_and_a_tenth_of_its_tokens_are_pictures():
    rng, bench = random.Random(0), Bench()
    rows = [draw_row(rng, bench.spread, bench.length) for _ in range(6000)]
    sizes, tokens = [r * c for row in rows for r, c in row], [sum(r * c for r, c in row) for row in rows]
    assert sum(not row for row in rows) / len(rows) == pytest.approx(bench.spread.text_only, abs=0.02)
    assert statistics.mean(tokens) / bench.length == pytest.approx(0.10, abs=0.01)
    assert statistics.median(sizes) in range(6, 10) and max(sizes) > 10 * statistics.median(sizes)
    assert max(tokens) > 0.6 * bench.length and max(map(len, rows)) >= 10


def test_the_encoders_share_of_a_rank_is_near_k25s():
    """K2.5 by hand: a picture's token costs four patches of 2 · 417 M operations, attention to 1,024 patches and a
    projector of 2 · 54 M; a token of the backbone 2 · 31.7 B, and attention."""
    released, ours, bench = K25Config.preset("k2.5"), model_config(Bench()), Bench()
    picture = 4 * (2 * 416.9e6 + 4 * 1152 * 1024 * 27) + 2 * 54.3e6
    k25 = encoder_share(released, [1024] * 4, 10 * 1024, 4096)
    assert k25 == pytest.approx(0.1 * picture / backbone_flops(released, 4096), rel=0.01)
    assert 2 * 31.7e9 < backbone_flops(released, 4096) < 1.3 * 2 * 31.7e9
    rng = random.Random(0)
    sizes = [4 * r * c for _ in range(600) for r, c in draw_row(rng, bench.spread, bench.length)]
    share = encoder_share(ours, sizes, 600 * bench.length, bench.length)
    assert 0.5 < share * 4 / (k25 * 16) < 2  # pp 4 here, pp 16 there


# Formulas


def test_efficiencies_by_hand():
    assert raw(9.0, 10.0) == 0.9
    assert discounted(9.0, 10.0, encoder=2.0, workers=4) == 9.0 / 9.5
    assert by_flops(8.0, 10.0, share=0.1) == pytest.approx(0.88)
    assert middle([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 2.0, 4.0) and middle([7.0]) == (7.0, 7.0, 7.0)


@given(st.floats(0.1, 10), st.floats(0, 5), st.integers(1, 64))
def test_a_perfectly_even_encoder_that_costs_nothing_else_has_full_discounted_efficiency(text, encoder, workers):
    assert discounted(text, text + encoder / workers, encoder, workers) == pytest.approx(1)


# Reconstruction


def phases(stage, forward, backward, own=0.0, **around):
    work = [["F", stage, number, seconds] for number, seconds in enumerate(forward)]
    work += [["B", stage, number, seconds] for number, seconds in enumerate(backward)]
    return Phases(pipeline=sum(forward) + sum(backward) + own, work=work, **around)


def test_a_step_is_put_together_as_by_hand():
    """Two stages, two microbatches, the second with a picture on the first stage:

        rank 0   F0 0–1   F1 1–4            B0 4–6          B1 7–9
        rank 1            F0 1–2   B0 2–4   F1 4–5   B1 5–7
    """
    layout = Layout(pp=2, microbatches=2)
    tables = schedule_tables(layout)
    first = phases(0, [1, 3], [2, 2], before=0.5, after=1.0, reduce=0.1, update=0.3)
    last = phases(1, [1, 1], [2, 2], before=0.25, after=2.0, reduce=0.2, update=0.1)
    assert one_core_each(layout, tables, [first, last]) == pytest.approx(0.5 + 9 + 2.0 + 0.2 + 0.3)
    # What the schedule itself costs rank 0, 0.4, makes each of its four passes 0.1 longer: it ends at 7.2 + 2.1.
    assert one_core_each(layout, tables, [phases(0, [1, 3], [2, 2], own=0.4), phases(1, [1, 1], [2, 2])]) == pytest.approx(9.3)


def test_the_slowest_replica_decides():
    """Ranks count the pipeline first: 0 and 1 are the first stages of two replicas."""
    layout = Layout(pp=2, dp=2, microbatches=2)
    quick, slow, last = phases(0, [1, 1], [2, 2]), phases(0, [1, 3], [2, 2]), phases(1, [1, 1], [2, 2])
    tables = schedule_tables(layout)
    even = one_core_each(layout, tables, [quick, quick, last, last])
    assert even == pytest.approx(9) and one_core_each(layout, tables, [slow, quick, last, last]) == pytest.approx(9)
    assert one_core_each(layout, tables, [quick, phases(0, [1, 8], [2, 2]), last, last]) == pytest.approx(14)


# Imbalance


def batch_of(*grids):
    return dataclasses.replace(global_batch(TINY, 0, "text")[0], grid_thw=torch.tensor(grids) if grids else None)


def test_imbalance_by_hand():
    """Five items of 8, 4, 4, 4, 12 patches in three microbatches, on two replicas of two ranks."""
    batches = [batch_of((1, 2, 4), (1, 2, 2)), batch_of(), batch_of((1, 2, 2), (1, 2, 2), (1, 2, 6))]
    found = imbalances(batches, 4, dp=2)
    assert found["items"] == 5 and found["patches"] == [8, 4, 4, 4, 12]
    assert found["dep"] == 12 / 8  # 12 | 8 | 4 4 | 4
    assert contiguous(5, 4) == [0, 0, 1, 2, 3] and found["contiguous"] == 12 / 8
    assert found["stage0"] == 32 / 8  # microbatches 0 and 2 are both of the first replica
    assert imbalances(batches[1:2], 4, 2)["dep"] == 1.0


def test_from_sixteen_items_per_rank_on_dep_is_within_five_per_cent_of_even():
    found = by_items(dataclasses.replace(Bench(), draws=40))
    assert max(found[number]["dep"][draw] for number in (16, 32, 64) for draw in range(40)) <= 1.05
    for ways in found.values():
        assert all(ours <= theirs for ours, theirs in zip(ways["dep"], ways["contiguous"])) and len(ways["dep"]) == 40
    assert max(found[1]["dep"]) > 1.05, "else the claim would be empty"


# Measurement


@pytest.fixture
def alone(tmp_path):
    """This process as a process group of one."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trainer_of(kind, encoder):
    torch.manual_seed(0)
    place = Place(Layout(microbatches=2, encoder=encoder))
    return kind(keep_units(K25(model_config(TINY)), place), functools.partial(MuonClip.from_named, lr=2e-3), TINY, place)


def with_pictures():
    """A global batch of TINY with pictures in both of its microbatches."""
    drawn = (global_batch(TINY, number, "multimodal") for number in range(9))
    return next(batches for batches in drawn if all(batch.patches is not None for batch in batches))


@pytest.mark.parametrize("encoder", dep_report.ENCODERS)
def test_measuring_changes_nothing(alone, encoder):
    batches, (plain, measured) = with_pictures(), (trainer_of(kind, encoder) for kind in (Trainer, MeasuredTrainer))
    assert [plain.step(batches) for _ in range(2)] == [measured.step(batches) for _ in range(2)]
    for (name, one), (_, other) in zip(plain.model.named_parameters(), measured.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("encoder", dep_report.ENCODERS)
def test_every_second_is_counted_in_its_phase_and_the_encoders_are_only_the_encoders(alone, encoder):
    """By a clock that stands still but for 1 in the tower's forward pass, 10 in its backward pass, 100 in that of the token
    embedding, which runs before it in the same call, and 1000 in an optimizer's step."""
    trainer, clock = trainer_of(MeasuredTrainer, encoder), [0]

    def advance(seconds):
        clock[0] += seconds

    model = trainer.model
    trainer.now = lambda: clock[0]
    model.vision_tower.register_forward_hook(lambda *_: advance(1))
    model.vision_tower.patch_embed["proj"].bias.register_hook(lambda _: advance(10))
    model.language_model.model.embed_tokens.weight.register_hook(lambda _: advance(100))
    trainer.optimizers[0].register_step_pre_hook(lambda *_: advance(1000))
    trainer.step(with_pictures())
    spent = trainer.phases
    # DEP encodes the global batch in one call, and again; the first stage each of two microbatches once.
    assert (spent.before, spent.after, spent.encoder) == ((1, 11, 12) if encoder == "dep" else (0, 0, 22))
    own = 1 if encoder == "stage0" else 0
    assert [seconds for kind, *_, seconds in spent.work if kind == "F"] == [own] * 2
    assert [seconds for kind, *_, seconds in spent.work if kind == "B"] == [100 + 10 * own] * 2
    assert (spent.pipeline, spent.reduce, spent.update) == (200 + 22 * own, 0, 1000)
    trainer.step(global_batch(TINY, 0, "text"))
    assert (trainer.phases.encoder, trainer.phases.pipeline, trainer.phases.update) == (0, 200, 1000)


# The whole


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder that a quick run of two processes has left."""
    folder = tmp_path_factory.mktemp("dep-bench")
    forkserver()
    flags = ["--quick", "--ranks", "2", "--pp", "2", "--layers", "2", "--repeats", "1", "--memory-steps", "1", "--device", "cpu"]
    assert main([*flags, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def result(done):
    return json.loads((done / "dep_bench.json").read_text())


def test_every_pass_of_the_schedule_is_measured_once_on_the_rank_that_does_it(result):
    layout, tables = result["layouts"][0], schedule_tables(Layout(pp=2, microbatches=4))
    sides = {(s["batch"], s["encoder"], s["kind"]) for s in layout["samples"]}
    assert sides == {(b, e, k) for b in (-1, 0) for e in dep_report.ENCODERS for k in dep_report.KINDS} and len(layout["samples"]) == 8
    for sample in layout["samples"]:
        for rank, spent in enumerate(sample["ranks"]):
            assert [tuple(piece[:3]) for piece in spent["work"]] == [dataclasses.astuple(work) for work in tables[rank]]
            assert spent["pipeline"] >= sum(seconds for *_, seconds in spent["work"]) > 0


def test_dep_spreads_the_encoder_and_stage0_does_not(result):
    assert all(step["items"] >= 2 for step in result["layouts"][0]["imbalance"].values()), "too few for the claim"
    for sample in result["layouts"][0]["samples"]:
        encoding = [spent["encoder"] > 0 for spent in sample["ranks"]]
        assert encoding == ([False] * 2 if sample["kind"] == "text" else [True] * 2 if sample["encoder"] == "dep" else [True, False])
        for spent in sample["ranks"]:
            around = spent["before"] + spent["after"]
            assert spent["encoder"] <= (around if sample["encoder"] == "dep" else spent["pipeline"])
    assert dep_report.disagreement(result["layouts"]) < 1e-4


def test_the_first_stage_holds_no_more_with_dep_than_for_text(result):
    layout = result["layouts"][0]
    ((_, text),), ((_, ours),), ((_, first),) = (dep_report.peaks(layout, *curve) for curve in dep_report.CURVES)
    assert ours < 1.05 * text < first


def test_the_figures_follow_from_the_samples(result):
    layout, shares = result["layouts"][0], {int(number): share for number, share in result["model"]["shares"].items()}
    both = {encoder: Layout(pp=2, microbatches=4, zero1=True, encoder=encoder) for encoder in dep_report.ENCODERS}
    found = figures(both, layout["samples"], schedule_tables(both["dep"]), result["workers"], shares)
    assert json.loads(json.dumps(found)) == layout["figures"]
    for encoder, passes in (("dep", 4), ("stage0", 3)):  # by hand from the wall clock
        mine = [s for s in layout["samples"] if s["encoder"] == encoder]
        wall = {(s["batch"], s["kind"]): max(r["wall"] for r in s["ranks"]) for s in mine}
        spent = {s["batch"]: sum(r["encoder"] for r in s["ranks"]) for s in mine if s["kind"] == "multimodal"}
        got, workers = layout["figures"][encoder]["wall"], result["workers"]["wall"]
        text, multimodal = wall[0, "text"], wall[0, "multimodal"]
        expected = {"text": text, "multimodal": multimodal, "raw": text / multimodal,
                    "discounted": text / (multimodal - spent[0] / workers),
                    "by_flops": text / multimodal * (1 + shares[0] * passes / 3)}  # fmt: skip
        assert {name: figure[0] for name, figure in got.items()} == pytest.approx(expected)


def test_the_report_says_what_the_json_says(result, done):
    text = (done / "report.md").read_text()
    assert text == dep_report.markdown(result)
    rows = re.findall(r"\| pp 2 · dp 1 \| (one core per rank|wall clock) \| (\w+) \| (.*) \|", text)
    assert len(rows) == 4
    for clock, encoder, cells in rows:
        got = result["layouts"][0]["figures"][encoder]
        numbers = [float(cell.split()[0].rstrip("%")) for cell in cells.split(" | ")]
        f = got["core" if clock == "one core per rank" else "wall"]
        assert numbers[:3] == pytest.approx([f["text"][0], f["multimodal"][0], got["encoder"][0]], abs=6e-4)
        assert numbers[3:] == pytest.approx([100 * f[way][0] for way in dep_report.WAYS], abs=0.06)
    assert f"at most {Spread().largest}" in text and "python parallel.py dep-bench --quick --ranks 2" in text
    peaks = [max(s["ranks"][:1]) / 1e6 for s in result["layouts"][0]["memory"]]
    assert all(f"{peak:.1f}" in text for peak in peaks) and len(peaks) == 3


def test_the_plots_are_pictures(done):
    for name in ("efficiency", "memory", "imbalance"):
        with Image.open(done / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 20
    assert {path.name for path in done.iterdir()} == {"report.md", "dep_bench.json", "efficiency.png", "memory.png", "imbalance.png"}


@pytest.mark.parametrize("flags, words", [
    (["--ranks", "1"], "1 ranks: expected at least 2"),
    (["--pp", "3"], "--pp 3 does not divide --ranks 4"),
    (["--pp", "0"], "--pp 0 does not divide"),
    (["--text-only", "1"], "--text-only 1.0: expected at least 0, and less than 1"),
    (["--repeats", "0"], "--layers, --repeats and --memory-steps must be at least 1"),
    (["--ranks", "20", "--pp", "20"], "20 stages, but embedding, 14 layers and head are 16"),
    (["--out", f"{__file__}/x"], "Not a directory"),
])  # fmt: skip
def test_misuse_is_one_line_and_exit_code_2(flags, words, capsys):
    assert main(["--device", "cpu", *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("dep-bench: ") and words in lines[0]


def test_more_ranks_than_devices_are_refused(capsys):
    wanted = torch.cuda.device_count() + 2
    assert main(["--device", "cuda", "--ranks", str(wanted)]) == 2
    assert f"no more than the {wanted - 2} CUDA devices" in capsys.readouterr().err
