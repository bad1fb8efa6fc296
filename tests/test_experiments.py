"""The report page: what is run is kept, what other commands left is read, and the page is one file for any reader.

The tests with a browser need Debian's chromium and chromium-driver; without them they are skipped.
Run: .venv/bin/python -m pytest tests/test_experiments.py
"""

import html.parser
import json
import re

import matplotlib.pyplot as plt
import pytest

import experiments
from experiments import BEYOND, EXPERIMENTS, PULLED, ExperimentsConfig, Result, kept, main, markdown, page, pull, run_experiment
from lab import DIRECTION, NOT, REPLICATES, UNTESTABLE, Claim, Scale
from rl_report import save_figure
from study import StudyError

HOSTILE = "</title><script>window.bad = 1</script><img src=x onerror='window.bad = 2'> a | b & \"c\" 10 < 9"
SUMMARIES = {  # what the commands leave, in round numbers
    "zero-vision": {
        "zero-vision": {"success with tools": {"mean": 0.2, "low": 0.1, "high": 0.3}, "success, shuffled pictures": {"mean": 0.05}},
        "none": {"success with tools": {"mean": 0.0, "low": 0.0, "high": 0.01}},
        "zero-vision less text+vision": {"mean": -0.1, "low": -0.2, "high": -0.01},
    },
    "transfer": {
        "vision": {"text, change": {"mean": 0.02, "low": -0.01, "high": 0.05}, "vision, change": {"mean": 0.1, "low": 0.0, "high": 0.2}},
        "joint less experts": {"vision": {"mean": 0.0, "low": -0.04, "high": 0.04}, "text": {"mean": -0.1, "low": -0.2, "high": 0.0}},
    },
    "toggle": {"toggle": {"tokens against plain's": {"mean": -0.2, "low": -0.3, "high": -0.1}, "accuracy less plain's": {"mean": 0.0, "low": -0.1, "high": 0.1}}},
    "parl": {
        "parl less single": {part: {"performance": {"mean": 0.2, "low": 0.1, "high": 0.3}} for part in ("heldout", "wider")},
        "parl less base": {"heldout": {"performance": {"mean": 0.1, "low": -0.1, "high": 0.3}, "given": {"mean": 2.0, "low": 1.0, "high": 3.0}}},
        "parl less no-parallel": {"heldout": {"given": {"mean": 2.0, "low": 1.5, "high": 2.5}}},
        "parl less no-finish": {"heldout": {"given": {"mean": -1.0, "low": -2.5, "high": 0.5}}},
        **{arm: {"heldout": {"given": {"mean": mean}}} for arm, mean in (("parl", 3.0), ("no-parallel", 1.0), ("no-finish", 4.0))},
        "context, swarm less none": {"256": {"mean": 0.2, "low": 0.1, "high": 0.3}, "512": {"mean": -0.2, "low": -0.3, "high": -0.1}},
        "context, swarm less hide-tool-result": {"256": {"mean": 0.2, "low": 0.1, "high": 0.3}, "512": {"mean": 0.1, "low": 0.05, "high": 0.2}},
        "context, swarm less summary": {"256": {"mean": 0.2, "low": 0.1, "high": 0.3}, "512": {"mean": 0.1, "low": -0.1, "high": 0.3}},
        "context, swarm less discard-all": {"256": {"mean": -0.1, "low": -0.2, "high": 0.0}, "512": {"mean": 0.2, "low": 0.1, "high": 0.3}},
        "times": {"goals": [0.3, 0.4, 0.5], "ratio": {"steps": [2.0, 4.0, None]}, "single": {"steps": [6.0, 8.0, None]}, "parl": {"steps": [3.0, 2.0, 9.0]}},
    },
    "dep": {"settings": {"ranks": 4, "device": "cpu"}, "layouts": [
        {"pp": 2, "dp": 2, "figures": {"dep": {"core": {"discounted": [0.97, 0.95, 1.0]}, "wall": {"discounted": [0.8, 0.7, 0.9]}}}},
        {"pp": 4, "dp": 1, "figures": {"dep": {"core": {"discounted": [0.93, 0.89, 0.97]}, "wall": {"discounted": [0.95, 0.9, 0.97]}}}}]},
}  # fmt: skip
EXPECTED = {
    "zero-vision": [REPLICATES, NOT], "transfer": [DIRECTION, REPLICATES, NOT], "toggle": [REPLICATES, DIRECTION],
    "parl": [REPLICATES, DIRECTION, REPLICATES, REPLICATES, DIRECTION, NOT, REPLICATES, NOT, DIRECTION], "dep": [DIRECTION],
}  # fmt: skip


def tiny(scale):
    """An experiment of one cell with a plot."""
    found = scale.run("tiny", {"a-1": {"seed": 1}}, cell)
    figure, axis = plt.subplots(figsize=(12, 2))
    axis.plot([0, 1])
    save_figure(figure, scale.folder / "tiny" / "tiny.png")
    return [Claim("it counts", "nowhere", "1", "a cell", str(found["a-1"]), REPLICATES, "tiny.png"), Claim(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, NOT)]


def cell(folder, name, log, seed):
    """Counts how often it was run."""
    ran = folder / "ran.txt"
    ran.write_text(ran.read_text() + "x" if ran.exists() else "x")
    return len(ran.read_text())


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results of a tiny experiment in tmp_path."""
    monkeypatch.setitem(EXPERIMENTS, "tiny", ("test_experiments", "tiny"))
    scale = Scale(tmp_path, (1,), workers=0)
    return [run_experiment("tiny", scale)]


def test_an_experiment_is_kept_and_its_cells_are_not_run_again(results, tmp_path):
    assert kept(tmp_path) == results
    again = run_experiment("tiny", Scale(tmp_path, (1,), workers=0))
    assert again.claims[0].found == "1" and again.seeds == 1 and again.minutes == results[0].minutes >= 0


def test_each_experiment_has_a_function_in_its_module():
    for module, function in EXPERIMENTS.values():
        assert callable(getattr(__import__(module), function))


@pytest.mark.parametrize("name", PULLED)
def test_what_another_command_measured_is_read_and_judged(name, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    assert pull(name, tmp_path, source) is None
    (source / PULLED[name][1]).write_text(json.dumps(SUMMARIES[name]))
    result = pull(name, tmp_path, source)
    assert [claim.verdict for claim in result.claims] == EXPECTED[name]
    assert name == "dep" or result.command.endswith(name)
    assert kept(tmp_path) == [result]


@pytest.mark.parametrize("name", PULLED)
@pytest.mark.parametrize("text", ['{"toggle": ', "{}", "[]"])
def test_a_summary_that_is_cut_or_of_another_kind_is_told_in_one_line(name, text, tmp_path):
    (path := tmp_path / PULLED[name][1]).write_text(text)
    with pytest.raises(StudyError, match=rf"{PULLED[name][1]} lacks what the page needs \(.*\): make it again with `python") as told:
        pull(name, tmp_path / "out", tmp_path)
    assert str(path) in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_dep_is_told_and_judged_as_it_was_run(tmp_path):
    (tmp_path / "dep_bench.json").write_text(json.dumps(SUMMARIES["dep"]))
    setup = pull("dep", tmp_path, tmp_path).claims[0].setup
    assert setup == "four processes, pp 2 · dp 2 and pp 4, the encoder's own time discounted, one core per rank; the worse layout"
    (tmp_path / "dep_bench.json").write_text(json.dumps(SUMMARIES["dep"] | {"settings": {"ranks": 16, "device": "cuda"}}))
    claim = pull("dep", tmp_path, tmp_path).claims[0]
    assert claim.setup.startswith("16 processes") and "wall clock" in claim.setup and claim.found.startswith("80.0 %") and claim.verdict == NOT


def test_minutes_are_those_of_what_is_trained_before_too(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "tiny", ("test_experiments", "tiny"))
    monkeypatch.setitem(experiments.STAGES, "tiny", "before")
    monkeypatch.setattr(experiments, "spent", {tmp_path / "tiny": 2.0, tmp_path / "before": 5.0}.get)
    assert run_experiment("tiny", Scale(tmp_path, (1,), workers=0)).minutes == 7.0
    monkeypatch.setattr(experiments, "spent", {tmp_path / "tiny": 2.0}.get)
    assert run_experiment("tiny", Scale(tmp_path, (1,), workers=0)).minutes is None


def test_a_plot_of_another_command_comes_along(tmp_path, results):
    source = tmp_path / "source"
    source.mkdir()
    (source / "summary.json").write_text(json.dumps(SUMMARIES["toggle"]))
    (source / "arms.png").write_bytes((tmp_path / "tiny" / "tiny.png").read_bytes())
    pull("toggle", tmp_path, source)
    assert (tmp_path / "toggle" / "arms.png").read_bytes() == (source / "arms.png").read_bytes()
    assert "data:image/png" in page(kept(tmp_path)[-1:], tmp_path)


def test_a_sign_of_fewer_tokens_is_a_gain(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARIES["toggle"]))
    assert pull("toggle", tmp_path, tmp_path).claims[0].found == "tokens -20.0 % [-30.0, -10.0]"


def test_the_pages_say_every_claim(results, tmp_path):
    for text in (markdown(results), html_text(page(results, tmp_path))):
        for claim in results[0].claims:
            assert all(part in text for part in (claim.title, claim.says, claim.setup, claim.found, claim.verdict))
        assert "2 claims: 1 replicates, 1 does not replicate." in text and "--only tiny" in text


def test_what_no_toy_can_decide_is_counted_and_needs_no_command(results, tmp_path):
    for text in (markdown([*results, BEYOND]), html_text(page([*results, BEYOND], tmp_path))):
        assert f"1 does not replicate, {len(BEYOND.claims)} {UNTESTABLE}." in text and all(claim.setup in text for claim in BEYOND.claims)
    assert "inutes" not in markdown([BEYOND]) + page([BEYOND], tmp_path)


def html_text(source):
    """The text of a page, as a reader sees it."""
    found, reader = [], html.parser.HTMLParser()
    reader.handle_data = found.append
    reader.feed(source)
    return "".join(found)


def test_the_page_is_one_file_and_hostile_words_stay_words(results, tmp_path):
    source = page(results, tmp_path)
    assert not re.search(r"(src|href)=.(?!data:image/png|#)", source.replace(experiments.html.escape(HOSTILE), ""))
    assert "<script" not in source and source.count("<img") == 1


def test_the_command_writes_the_page_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(EXPERIMENTS, "tiny", ("test_experiments", "tiny"))
    monkeypatch.setitem(PULLED, "toggle", (str(tmp_path / "nowhere"), "summary.json"))
    for _ in range(2):
        main(["--run", str(tmp_path / "out"), "--only", "tiny,toggle", "--seeds", "1", "--workers", "0"])
    said = capsys.readouterr().out
    assert "toggle: " in said and "holds no result yet" in said and said.count("replicates") == 2
    assert all((tmp_path / "out" / name).exists() for name in ("report.md", "report.html", "config.json"))
    assert all(BEYOND.claims[0].title in (tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))
    assert (tmp_path / "out" / "tiny" / "ran.txt").read_text() == "x"


@pytest.mark.parametrize("flags,word", [(["--only", "fusio"], "fusion"), (["--seeds", "0"], "seeds"), (["--quik"], "--quick")])
def test_misuse_is_one_line(flags, word, capsys):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert ended.value.code == 2 and word in error


def test_quick_has_a_folder_of_its_own():
    assert ExperimentsConfig(quick=True).run != ExperimentsConfig().run and ExperimentsConfig(run="x", quick=True).run == "x"


@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_a_desk_in_light_and_dark(browser, results, tmp_path, width, scheme):
    (tmp_path / "report.html").write_text(page(results, tmp_path), encoding="utf-8")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return window.bad") is None
    shown = browser.find_element("css selector", ".claim img")
    assert browser.execute_script("return arguments[0].naturalWidth", shown) > 1000 and shown.size["width"] <= width
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 100) == (scheme == "dark")


def test_results_without_minutes_say_so():
    assert "Minutes were not kept." in markdown([Result("dep", (), "python parallel.py dep-bench", None)])


@pytest.mark.parametrize(("ratios", "single", "swarm", "verdict", "said"), [
    ([2.0, None], [6.0, None], [3.0, 9.0], DIRECTION, "30% 2.00 ×, 40% the swarm alone"),
    ([4.0, None], [8.0, None], [2.0, None], DIRECTION, "30% 4.00 ×"),  # one goal does not grow
    ([0.9, 0.8], [6.0, 6.0], [7.0, 8.0], NOT, "30% 0.90 ×, 40% 0.80 ×"),
    ([None, None], [None, 9.0], [None, None], NOT, "no goal is reached with every seed"),
])  # fmt: skip
def test_how_much_faster_a_swarm_is_said_goal_by_goal(ratios, single, swarm, verdict, said):
    times = {"goals": [0.3, 0.4], "ratio": {"steps": ratios}, "single": {"steps": single}, "parl": {"steps": swarm}}
    claim = list(experiments._READERS["parl"](SUMMARIES["parl"] | {"times": times}))[2]
    assert claim.verdict == verdict and claim.found.endswith(f"single / swarm: {said}")


def test_without_a_reward_both_levels_are_said_and_their_difference():
    found = [claim.found for claim in experiments._READERS["parl"](SUMMARIES["parl"]) if claim.title.startswith("without")]
    assert found == ["subtasks with it 3.00, without 1.00: a difference of +2.00 [+1.50, +2.50]",
                     "subtasks with it 3.00, without 4.00: a difference of +1.00 [-0.50, +2.50]"]  # fmt: skip
