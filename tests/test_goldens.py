"""Claims about goldens.py, golden_cases.py and golden_models.py: what is written is right, and is compared rightly.

The program in another language is played by `numpy_program`: it parses the files by hand and knows no torch.
Run: .venv/bin/python -m pytest tests/test_goldens.py
"""

import argparse
import copy
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import golden_cases
import golden_models
import goldens
from adapter import run
from conformance import OPS
from golden_cases import GoldenError, choose, draw
from k25 import K25, K25Config, generate, load, sizes
from op import Op, Suspect
from taps import capture, read_taps

pytestmark = pytest.mark.xdist_group("goldens")  # the goldens are written once

ROOT = pathlib.Path(goldens.__file__).parent
NAMES = ("rms_norm", "swiglu", "softmax_scale", "timestamp", "load_counts")
MODEL_FORMATS = ("fp32", "bf16", "int4")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A golden directory of a few ops and the tiny model. Tests do not change it."""
    directory = tmp_path_factory.mktemp("goldens") / "golden"
    flags = ("--out", directory, "--ops", ",".join(NAMES), "--model", "tiny")
    assert command(goldens.golden, goldens.add_golden_arguments, *flags) == 0
    return directory


@pytest.fixture
def theirs(written, tmp_path):
    """A directory of another program that got every op right; tests spoil it."""
    return shutil.copytree(written, tmp_path / "theirs", ignore=shutil.ignore_patterns("model"))


def command(run, add_arguments, *arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def compare(directory, theirs, *flags):
    return command(goldens.compare, goldens.add_compare_arguments, directory, theirs, *flags)


def manifest_of(directory):
    return json.loads((directory / "manifest.json").read_text())


def verdicts(directory, theirs):
    """{case: Verdict} of everything."""
    return {verdict.case: verdict for group in goldens.compare_goldens(directory, theirs) for verdict in group}


def change(path, **tensors):
    """Replace tensors of a safetensors file, `output_y` for output.y; None removes one."""
    changes = {name.replace("_", ".", 1): tensor for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in (load_file(path) | changes).items() if tensor is not None}, path)


# A program in another language


def read_safetensors(path):
    """{name: float64, int64 or bool array} by hand."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header.pop("__metadata__", None)
    arrays = {}
    for name, told in header.items():
        raw = data[slice(*told["data_offsets"])]
        if told["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(raw, {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "BOOL": "?"}[told["dtype"]])
        arrays[name] = values.reshape(told["shape"])
    return arrays


def write_safetensors(path, arrays, dtypes):
    """Write {name: array} as float32, bfloat16 (rounded to even) or int64, by hand."""
    header, data = {}, b""
    for name, array in arrays.items():
        if dtypes[name] == "bfloat16":
            bits = array.astype("<f4").view("<u4").astype(np.uint64)
            kind, raw = "BF16", ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
        else:
            kind, code = {"float32": ("F32", "<f4"), "int64": ("I64", "<i8")}[dtypes[name]]
            raw = array.astype(code).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def numpy_rms_norm(x, weight, eps, y):
    """Output and gradients; y: the cotangent."""
    inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    scaled = y * weight
    x_gradient = inverse * scaled - x * inverse**3 * (scaled * x).mean(-1, keepdims=True)
    return {"output.y": x * inverse * weight, "gradient.x": x_gradient,
            "gradient.weight": (y * x * inverse).reshape(-1, x.shape[-1]).sum(0)}  # fmt: skip


def numpy_layer_norm(x, weight, eps, y):
    return {"output.y": numpy_rms_norm(x - x.mean(-1, keepdims=True), weight, eps, y)["output.y"]}


def numpy_swiglu(x, gate, up, down, y):
    opened = x @ gate.T
    return {"output.y": (opened / (1 + np.exp(-opened)) * (x @ up.T)) @ down.T}


def numpy_load_counts(index, n_experts, valid):
    chosen = index if valid is None else index[valid]
    return {"output.counts": np.bincount(chosen.reshape(-1), minlength=n_experts)}


def numpy_softmax_scale(nope_dim, rope_dim, factor, mscale, mscale_all_dim):
    grown = 0.1 * mscale_all_dim * math.log(factor) + 1 if factor > 1 else 1.0
    return {"output.scale": grown**2 / math.sqrt(nope_dim + rope_dim)}


RIGHT = {"rms_norm": numpy_rms_norm, "swiglu": numpy_swiglu, "load_counts": numpy_load_counts,
         "softmax_scale": numpy_softmax_scale}  # fmt: skip


def numpy_program(directory, theirs, functions):
    """Answer all cases of some ops. It knows the golden directory from its README alone."""
    (theirs / "ops").mkdir(parents=True)
    for op, function in functions.items():
        for case in manifest_of(directory)["ops"][op]["cases"].values():
            tensors = read_safetensors(directory / case["tensors"]) if "tensors" in case else {}
            given = [tensors[f"input.{name}"] if f"input.{name}" in tensors else told["value"]
                     for name, told in case["arguments"].items()]  # fmt: skip
            cotangents = [array.astype("f8") for name, array in tensors.items() if name.startswith("cotangent.")]
            given = [a.astype("f8") if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in given]
            answer = function(*given, *cotangents)
            if "plain" in case:
                (theirs / case["plain"]).write_text(json.dumps(answer))
            else:
                dtypes = {name: told["dtype"] for name, told in case["results"].items()}
                write_safetensors(theirs / case["tensors"], answer, dtypes)


def test_a_program_without_torch_reads_computes_writes_and_is_right(written, tmp_path, capsys):
    numpy_program(written, tmp_path / "theirs", RIGHT)
    assert compare(written, tmp_path / "theirs") == 0
    printed = capsys.readouterr().out
    cases = sum(len(manifest_of(written)["ops"][op]["cases"]) for op in RIGHT)
    assert printed.count("[OK]") == cases and "[MISSING] timestamp: none of its" in printed
    assert "[DIFF]" not in printed


def test_a_wrong_program_is_told_what_is_probably_wrong(written, tmp_path, capsys):
    numpy_program(written, tmp_path / "theirs", RIGHT | {"rms_norm": numpy_layer_norm})
    assert compare(written, tmp_path / "theirs", "--json", tmp_path / "report.json") == 1
    printed = capsys.readouterr().out
    assert "[DIFF]    rms_norm.0.float32: output y: max-abs" in printed and "worst at (" in printed
    assert "probable cause: subtracts the mean: that is LayerNorm" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    failed = [case for case in report["cases"] if case["status"] == "DIFF"]
    assert failed and all(case["case"].startswith("rms_norm") for case in failed)
    assert failed[0]["what"] == "output y" and failed[0]["max_abs"] > 0 and failed[0]["index"]


def test_wrong_gradients_alone_are_seen(written, theirs):
    case = "rms_norm.0.float32"
    path = theirs / f"ops/{case}.safetensors"
    change(path, gradient_x=2 * load_file(path)["gradient.x"])
    found = verdicts(written, theirs)[case]
    assert found.status == "DIFF" and found.difference.what == "gradient of x" and "2 times" in found.cause


def test_the_rule_is_what_the_manifest_says_to_the_digit(written, theirs):
    """A float32 result may miss by the allowance, spelled out here, and by no more."""
    case = "rms_norm.0.float32"
    path = theirs / f"ops/{case}.safetensors"
    rule = manifest_of(written)["ops"]["rms_norm"]["cases"][case]["results"]["output.y"]
    y = load_file(path)["output.y"]
    values = np.abs(y.double().numpy())
    row = values.max(-1, keepdims=True)
    allowed = rule["tolerance"] * np.maximum(np.maximum(row, values.max() / 10), rule["floor"])
    for factor, status in ((0.9, "OK"), (1.1, "DIFF")):
        missed = y.clone()
        missed.view(-1)[-1] += factor * allowed.flat[-1].item()
        change(path, output_y=missed)
        assert verdicts(written, theirs)[case].status == status


# What is written


def test_a_directory_compared_with_itself_is_right(written, capsys):
    assert compare(written, written) == 0
    printed = capsys.readouterr().out
    assert printed.count("[OK]") > 50 and not any(word in printed for word in ("[DIFF]", "[SHAPE]", "[MISSING]"))
    assert "88 of 88 taps compared" in printed


def test_another_process_writes_the_same_bytes(written, tmp_path):
    """Other hash seed, other modules loaded, other number of threads, an older golden directory in the place."""
    shutil.copytree(written, tmp_path / "again")
    (tmp_path / "again" / "ops" / "stale").write_text("")
    code = f"import goldens; goldens.write_goldens({str(tmp_path / 'again')!r}, {NAMES}, model='tiny')"
    environment = os.environ | {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    first, second = ({path.relative_to(top): path for path in top.rglob("*") if path.is_file()}
                     for top in (written, tmp_path / "again"))  # fmt: skip
    assert first.keys() == second.keys()
    assert all(first[name].read_bytes() == second[name].read_bytes() for name in first)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_another_seed_gives_other_inputs(tmp_path):
    for seed in (0, 1):
        goldens.write_goldens(tmp_path / str(seed), ["rms_norm"], seed)
    first, second = (load_file(tmp_path / f"{seed}/ops/rms_norm.0.float32.safetensors") for seed in (0, 1))
    assert first["input.x"].shape != second["input.x"].shape or not torch.equal(first["input.x"], second["input.x"])


def test_the_manifest_tells_arguments_results_and_versions(written):
    told = manifest_of(written)
    case = told["ops"]["rms_norm"]["cases"]["rms_norm.1.bfloat16"]
    tensors = load_file(written / case["tensors"])
    assert list(case["arguments"]) == list(OPS["rms_norm"].arguments) == told["ops"]["rms_norm"]["arguments"]
    assert [case["arguments"][name]["kind"] for name in ("x", "weight", "eps")] == ["input", "weight", "setting"]
    assert case["arguments"]["x"]["shape"] == list(tensors["input.x"].shape)
    assert set(tensors) == {"input.x", "input.weight", "output.y", "cotangent.y", "gradient.x", "gradient.weight"}
    assert case["results"]["output.y"]["dtype"] == "bfloat16" and case["results"].keys() <= set(tensors)
    assert told["ops"]["rms_norm"]["formula"] == OPS["rms_norm"].formula
    assert told["versions"]["torch"] == torch.__version__ and told["versions"]["k25"] and told["seed"] == 0
    rules = {result["rule"] for op in told["ops"].values() for c in op["cases"].values() for result in c["results"].values()}
    rules |= {tap["rule"] for tap in told["models"]["fp32"]["prompts"]["text"]["taps"].values()}
    assert rules == set(told["rules"]) and (written / "README.txt").read_text().startswith("Golden files of K25")


def test_results_that_are_no_tensors_go_to_json(written):
    case = manifest_of(written)["ops"]["timestamp"]["cases"]["timestamp.0"]
    answer = json.loads((written / case["plain"]).read_text())
    seconds = case["arguments"]["seconds"]
    assert seconds["kind"] == "setting" and "tensors" not in case
    assert answer == {"output.text": OPS["timestamp"].reference(seconds["value"])}


def test_cases_show_corners_and_not_the_smallest_input_alone():
    examples = [{"n": n, "x": torch.full((n,), float(n))} for n in (2, 2, 4, 4, 1, 0, 3)]
    op = Op("op", "", "", lambda n, x: x, st.nothing(), ("y",))
    assert [example["n"] for example in choose(op, examples, 4)] == [2, 1, 0, 4]
    assert len(choose(op, examples, 100)) == 7


def test_cases_expose_every_suspect():
    """One that only one of a hundred inputs exposes, which shows nothing else, becomes a case."""
    suspect = Suspect("seven", "", lambda n: n + (n == 7))
    op = Op("op", "", "", lambda n: n, st.integers(0, 20).map(lambda n: {"n": n}), ("y",), suspects=(suspect,))
    examples = [{"n": n} for n in (*range(7), 8, 7, 7)]
    assert choose(op, examples, 1) == [{"n": 0}, {"n": 7}]
    assert choose(op, [{"n": 1}], 1) == [{"n": 1}]


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path, monkeypatch):
    strategy = st.lists(st.integers(-(10**6), 10**6) | st.text(max_size=4), max_size=5)
    first = draw(strategy, 3, 30)
    (tmp_path / "constants.py").write_text(f"N = {list(range(123456, 123956))}")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("constants")  # Hypothesis would draw from it
    assert first == draw(strategy, 3, 30) != draw(strategy, 4, 30) and len(first) == 30


def test_a_strategy_that_gives_nothing_is_told(tmp_path):
    with pytest.raises(GoldenError, match="op: its strategy gave no input for seed 5"):
        golden_cases.write_op(Op("op", "", "", lambda n: n, st.integers().filter(lambda n: False), ("y",)), tmp_path, 5, 1)


# What is wrong with a file


def test_a_file_that_is_not_there_is_missing_and_not_wrong(written, theirs):
    (theirs / "ops/rms_norm.0.float32.safetensors").unlink()
    found = verdicts(written, theirs)["rms_norm.0.float32"]
    assert found.status == "MISSING" and not found.wrong and compare(written, theirs) == 0


def test_a_tensor_that_is_not_in_its_file_is_wrong(written, theirs):
    change(theirs / "ops/rms_norm.0.float32.safetensors", output_y=None)
    change(theirs / "ops/rms_norm.1.float32.safetensors", gradient_x=None)
    found = verdicts(written, theirs)
    assert found["rms_norm.0.float32"].status == found["rms_norm.1.float32"].status == "BROKEN"
    assert found["rms_norm.0.float32"].words == "output.y is not in the file"
    assert found["rms_norm.1.float32"].words == "gradient.x is not in the file" and compare(written, theirs) == 1
    save_file({"output.z": torch.ones(1)}, theirs / "ops/rms_norm.0.float32.safetensors")
    assert verdicts(written, theirs)["rms_norm.0.float32"].words == "output.y is not in the file, but output.z"


def test_a_program_without_gradients_gives_none(written, theirs):
    change(theirs / "ops/rms_norm.0.float32.safetensors", gradient_x=None, gradient_weight=None)
    assert verdicts(written, theirs)["rms_norm.0.float32"].status == "OK"


def test_a_truncated_file_is_told_with_its_tensor(written, theirs):
    path = theirs / "ops/rms_norm.0.float32.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    (theirs / "ops/timestamp.0.json").write_text('{"output.text": ')
    (theirs / "ops/softmax_scale.0.json").write_text("[0.5]")
    found = verdicts(written, theirs)
    assert "is truncated: tensor" in found["rms_norm.0.float32"].words and found["rms_norm.0.float32"].wrong
    assert "cannot be read" in found["timestamp.0"].words and "holds a list" in found["softmax_scale.0"].words
    assert compare(written, theirs) == 1


def test_a_wrong_shape_cannot_pass_by_broadcasting(written, theirs):
    path = theirs / "ops/rms_norm.0.float32.safetensors"
    change(path, output_y=load_file(path)["output.y"][None])
    found = verdicts(written, theirs)["rms_norm.0.float32"]
    assert found.status == "SHAPE" and "shape (1," in found.words


def test_a_wrong_dtype_and_a_nan_are_differences(written, theirs):
    first, second = (theirs / f"ops/rms_norm.{i}.float32.safetensors" for i in (0, 1))
    change(first, output_y=load_file(first)["output.y"].double())
    change(second, output_y=load_file(second)["output.y"] * torch.nan)
    found = verdicts(written, theirs)
    assert found["rms_norm.0.float32"].status == "DIFF" and "dtype float64, expected float32" in found["rms_norm.0.float32"].words
    assert found["rms_norm.1.float32"].status == "DIFF" and found["rms_norm.1.float32"].difference.kind == "nan"


def test_wrong_text_is_shown_where_it_differs(written, theirs):
    (theirs / "ops/timestamp.0.json").write_text(json.dumps({"output.text": "99:99"}))
    found = verdicts(written, theirs)["timestamp.0"]
    assert found.status == "DIFF" and "differs from character" in found.words


def test_integers_of_another_width_are_right(written, theirs):
    path = theirs / manifest_of(written)["ops"]["load_counts"]["cases"]["load_counts.0"]["tensors"]
    change(path, output_counts=load_file(path)["output.counts"].int())
    assert verdicts(written, theirs)["load_counts.0"].status == "OK"
    change(path, output_counts=load_file(path)["output.counts"] + 1)
    assert verdicts(written, theirs)["load_counts.0"].status == "DIFF"


@pytest.mark.parametrize("arguments, message", [
    (("letters", "letters"), "letters is no golden directory"),
    (("golden", "nowhere"), "nowhere is no directory"),
    (("golden", "letters"), "holds no file of the goldens' names"),
])  # fmt: skip
def test_directories_that_cannot_be_compared_are_refused(written, tmp_path, arguments, message):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "manifest.json").write_text("{}")
    with pytest.raises(GoldenError, match=message):
        compare(*(written if name == "golden" else tmp_path / name for name in arguments))


def test_another_layout_is_refused(theirs):
    told = manifest_of(theirs) | {"layout": 99}
    (theirs / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(GoldenError, match="has layout 99, this version reads 1"):
        list(goldens.compare_goldens(theirs, theirs))


@pytest.mark.parametrize("flags, message", [
    (("--out", "OUT", "--cases", "0"), "--cases is 0"),
    (("--out", "OUT", "--ops", "rmsnorm"), "did you mean rms_norm"),
    (("--out", "OUT", "--ops", "rms_norm", "--model", "huge"), "no model 'huge': give tiny, toy"),
    (("--out", "LETTERS", "--ops", "rms_norm"), "is no golden directory: choose another one"),
])  # fmt: skip
def test_impossible_options_leave_everything_as_it_was(tmp_path, flags, message):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a").write_text("dear")
    places = {"OUT": tmp_path / "out", "LETTERS": tmp_path / "letters"}
    with pytest.raises(ValueError, match=message):
        command(goldens.golden, goldens.add_golden_arguments, *(places.get(flag, flag) for flag in flags))
    assert [path.name for path in tmp_path.iterdir()] == ["letters"] and (tmp_path / "letters" / "a").read_text() == "dear"


# Every operation


@pytest.fixture(scope="module")
def all_ops(tmp_path_factory):
    directory = tmp_path_factory.mktemp("all") / "golden"
    goldens.write_goldens(directory, list(OPS), count=1)
    return directory


def tupled(value):
    return [tuple(item) if isinstance(item, list) else item for item in value] if isinstance(value, list) else value


def verdicts_on(function, name, golden, theirs):
    """What is found about one op, answered by a function of torch tensors."""
    entry = manifest_of(golden)["ops"][name]
    (theirs / "ops").mkdir(parents=True)
    for case in entry["cases"].values():
        tensors = load_file(golden / case["tensors"]) if "tensors" in case else {}
        arguments = {n: tensors.get(f"input.{n}", tupled(told.get("value"))) for n, told in case["arguments"].items()}
        cotangents = {n.removeprefix("cotangent."): t for n, t in tensors.items() if n.startswith("cotangent.")}
        outcome = run(function, arguments, entry["outputs"], entry["differentiable"] if cotangents else (), cotangents)
        answer = {f"output.{n}": value for n, value in outcome.outputs.items()}
        answer |= {f"gradient.{n}": value for n, value in outcome.gradients.items()}
        if "plain" in case:
            (theirs / case["plain"]).write_text(json.dumps(answer))
        else:
            save_file({n: t.contiguous().clone() for n, t in answer.items() if t is not None}, theirs / case["tensors"])
    return golden_cases.compare_op(name, entry, golden, theirs)


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_written_so_that_right_passes_and_wrong_is_named(all_ops, tmp_path, name):
    """The other functions that compute it pass; its first suspect is caught and named from the files."""
    others = list((OPS[name].twins | OPS[name].variants).items())[:2]
    for label, function in others or [("reference", OPS[name].reference)]:
        found = verdicts_on(function, name, all_ops, tmp_path / label)
        assert all(verdict.status == "OK" for verdict in found), [v.text() for v in found if v.status != "OK"]
    suspect = OPS[name].suspects[0]
    wrong = [verdict for verdict in verdicts_on(suspect.wrong, name, all_ops, tmp_path / "wrong") if verdict.wrong]
    assert wrong and all(suspect.cause in verdict.cause for verdict in wrong)


# Whole models


def loaded(written, name, dtype=torch.float32, **runtime):
    entry = manifest_of(written)["models"][name]
    return load(written / entry["checkpoint"], dtype=dtype, **runtime), read_taps(written / entry["taps"])


@pytest.mark.parametrize("name", MODEL_FORMATS)
def test_taps_and_answers_come_again_from_the_written_checkpoint(written, name):
    """Bit by bit, in float32 whatever the weights are stored in."""
    model, recorded = loaded(written, name)
    answers = json.loads((written / f"model/{name}/greedy.json").read_text())
    assert recorded.keys() == answers.keys() == {"text", "image", "clip", "mixed"}
    for prompt_name, recording in recorded.items():
        prompt = recording.prompt
        taps = capture(model, prompt)
        assert taps.keys() == recording.tensors.keys()
        assert all(torch.equal(taps[tap].output, recording.tensors[tap]) for tap in taps)
        again = generate(model, prompt.ids.tolist(), prompt.patches, prompt.grid_thw, max_new_tokens=12)[0]
        assert list(again.ids) == answers[prompt_name]["tokens"]
        assert again.logprobs == pytest.approx(answers[prompt_name]["logprobs"], abs=1e-6)


def test_checkpoints_are_in_the_released_layout_and_small(written):
    keys = {name: load_file(written / f"model/{name}/checkpoint/model-00001-of-000001.safetensors") for name in MODEL_FORMATS}
    expert = "language_model.model.layers.1.mlp.experts.0.gate_proj.weight"
    assert keys["fp32"][expert].dtype == torch.float32 and keys["bf16"][expert].dtype == torch.bfloat16
    assert {f"{expert}_packed", f"{expert}_scale", f"{expert}_shape"} <= keys["int4"].keys() and expert not in keys["int4"]
    config = K25Config.from_json(written / "model/fp32/checkpoint/config.json")
    assert 4 * (sizes(config).text + sizes(config).vision + sizes(config).projector) < 3e6


def test_the_three_formats_hold_one_model(written):
    """bf16 and int4 stay near fp32, as far as their rounding goes."""
    logits = {name: loaded(written, name)[1]["text"].tensors["decoder.logits"].double() for name in MODEL_FORMATS}
    spread = logits["fp32"].std()
    assert (logits["bf16"] - logits["fp32"]).square().mean().sqrt() < 0.1 * spread
    assert (logits["int4"] - logits["fp32"]).square().mean().sqrt() < 0.3 * spread
    assert not torch.equal(logits["int4"], logits["bf16"])


def answer_as(model, written, name, theirs, pin=False, **options):
    """Write a program's taps and answers from a model of ours; pin: with the routing that was written."""
    recorded, coarse = read_taps(written / f"model/{name}/taps"), model.language_model.lm_head.weight.dtype == torch.bfloat16
    told = {"computed_in": "bfloat16"} if coarse else {}
    (theirs / f"model/{name}/taps").mkdir(parents=True)
    for prompt_name, recording in recorded.items():
        prompt = recording.prompt
        pins = {n: value for n, value in recording.tensors.items() if pin and n.endswith("router.index")}
        taps = {n: tap.output for n, tap in capture(model, prompt, pins, **options).items()} | pins
        save_file({n: tap.contiguous() for n, tap in taps.items()}, theirs / f"model/{name}/taps/{prompt_name}.safetensors")
        answer = generate(model, prompt.ids.tolist(), prompt.patches, prompt.grid_thw, max_new_tokens=12)[0]
        told[prompt_name] = {"tokens": list(answer.ids), "logprobs": list(answer.logprobs)}
    (theirs / f"model/{name}/greedy.json").write_text(json.dumps(told))
    return [verdict for verdict in verdicts(written, theirs).values() if verdict.case.startswith(f"model.{name}.")]


@pytest.mark.parametrize("name", MODEL_FORMATS)
def test_another_order_of_summation_passes(written, tmp_path, name):
    found = answer_as(loaded(written, name, impl="reference")[0], written, name, tmp_path)
    assert len(found) == 8 and all(v.status == "OK" for v in found), [v.text() for v in found if v.status != "OK"]
    assert [v.words for v in found[4:]] == ["12 of 12 tokens"] * 4 and "88 of 88 taps compared" in found[1].words


@pytest.mark.parametrize("pin", [False, True])
def test_a_program_that_computes_in_bfloat16_passes(written, tmp_path, pin):
    found = answer_as(loaded(written, "int4", torch.bfloat16)[0], written, "int4", tmp_path, pin)
    assert len(found) == 8 and all(v.status == "OK" for v in found), [v.text() for v in found if v.status != "OK"]
    compared = [verdict.words for verdict in found[:4]]
    assert all("taps compared as bfloat16" in words for words in compared)
    assert any("near-ties chose other experts" in words for words in compared) != pin


def test_bfloat16_is_no_excuse_for_a_program_that_does_not_say_so(written, tmp_path):
    model, recorded = loaded(written, "fp32", torch.bfloat16)
    (tmp_path / "model/fp32/taps").mkdir(parents=True)
    taps = {name: tap.output.float() for name, tap in capture(model, recorded["text"].prompt).items()}
    save_file(taps, tmp_path / "model/fp32/taps/text.safetensors")
    assert verdicts(written, tmp_path)["model.fp32.text"].status == "DIFF"


def test_swapped_nibbles_of_int4_show_in_the_answers_alone(written, tmp_path):
    """Of a program that gives no taps."""
    model, _ = loaded(written, "int4")
    with torch.no_grad():
        for block in model.language_model.model.layers[1:]:
            for weight in block.mlp.experts.parameters():
                weight.copy_(weight.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))
    answer_as(model, written, "int4", tmp_path)
    shutil.rmtree(tmp_path / "model/int4/taps")
    found = [v for v in verdicts(written, tmp_path).values() if v.case.startswith("model.int4.greedy.")]
    assert [v.status for v in found] == ["DIFF"] * 4


@pytest.mark.parametrize("op, suspect, tap", [
    ("rms_norm", "subtracts_mean", "decoder.layers.0.input_norm"),
    ("rope", None, "decoder.layers.0.q_rope"),
    ("route", None, "decoder.layers.1.router."),
])  # fmt: skip
def test_a_wrong_operation_in_a_model_is_found_and_named(written, tmp_path, op, suspect, tap):
    chosen = next(s for s in OPS[op].suspects if suspect in (None, s.name))
    found = answer_as(loaded(written, "fp32")[0], written, "fp32", tmp_path, replaced={op: chosen.wrong})[0]
    assert found.status == "DIFF" and found.words.startswith(tap) and chosen.cause in found.cause


def spoil(written, theirs, name, change_tensors):
    """The verdict on the taps of the text prompt after a change."""
    file = f"model/{name}/taps/text.safetensors"
    tensors = load_file(written / file)
    change_tensors(tensors)
    (theirs / file).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, theirs / file)
    return verdicts(written, theirs)[f"model.{name}.text"]


def test_the_order_of_chosen_experts_does_not_matter(written, theirs):
    def turn(tensors, parts):
        for part in parts:
            tensors[f"decoder.layers.1.router.{part}"] = tensors[f"decoder.layers.1.router.{part}"].flip(1)

    found = spoil(written, theirs, "fp32", lambda tensors: turn(tensors, ("index", "weights")))
    assert found.words == "57 of 57 taps compared"
    found = spoil(written, theirs, "fp32", lambda tensors: turn(tensors, ("weights",)))
    assert found.words.startswith("decoder.layers.1.router.weights: max-abs")


def test_near_ties_may_choose_other_experts_and_no_other_token(written, theirs):
    name = "decoder.layers.1.router.index"
    rule = manifest_of(written)["models"]["bf16"]["prompts"]["text"]["taps"][name]
    near = rule["bfloat16"]["near_ties"]
    assert 0 < len(near) < 20 and not rule["near_ties"]
    clear = next(row for row in range(40) if row not in near)

    def rerouted(rows, dtype):
        def change_tensors(tensors):
            tensors["decoder.embedded"] = tensors["decoder.embedded"].to(dtype)
            tensors[name][rows] = (tensors[name][rows] + 1) % 8

        return spoil(written, theirs, "bf16", change_tensors)

    found = rerouted(near, torch.bfloat16)
    assert found.status == "OK" and f"none after {name}: near-ties chose other experts" in found.words
    found = rerouted([clear], torch.bfloat16)
    assert found.status == "DIFF" and f"other experts for 1 of 40 tokens; first for {clear}" in found.words
    assert rerouted(near, torch.float32).status == "DIFF"


def test_taps_of_other_names_are_told(written, theirs):
    def rename(tensors, names):
        kept = {new: tensors[old] for new, old in names.items()}
        tensors.clear()
        tensors.update(kept)

    found = spoil(written, theirs, "fp32", lambda tensors: rename(tensors, {"model.norm": "decoder.norm"}))
    assert found.status == "BROKEN" and found.wrong
    assert found.words == "none of our taps is in the file, but model.norm"
    names = {"decoder.norm": "decoder.norm", "extra": "decoder.mask"}
    found = spoil(written, theirs, "fp32", lambda tensors: rename(tensors, names))
    assert found.status == "OK" and found.words == "1 of 57 taps compared; unknown: extra"
    path = theirs / "model/fp32/taps/text.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "is truncated" in verdicts(written, theirs)["model.fp32.text"].words


def test_greedy_tokens_may_differ_at_a_near_tie_alone(written, tmp_path):
    file = "model/fp32/greedy.json"
    told = json.loads((written / file).read_text())
    for name in ("golden", "theirs"):
        (tmp_path / name / file).parent.mkdir(parents=True)
    shutil.copy(written / "manifest.json", tmp_path / "golden")

    def verdict(step, token, lead=None, **changes):
        ours, yours = copy.deepcopy(told), copy.deepcopy(told)
        yours["text"]["tokens"][step] = token
        yours["text"] |= changes
        if lead is not None:
            ours["text"]["rivals"][step][1][1] = lead
        (tmp_path / "golden" / file).write_text(json.dumps(ours))
        (tmp_path / "theirs" / file).write_text(json.dumps(yours))
        return verdicts(tmp_path / "golden", tmp_path / "theirs")["model.fp32.greedy.text"]

    tokens, rivals = told["text"]["tokens"], [token for token, _ in told["text"]["rivals"][5]]
    found = verdict(5, rivals[0])
    expected = f"token 5 is {rivals[0]}, expected {tokens[5]}, which leads {rivals[0]} by"
    assert found.status == "DIFF" and found.words.startswith(expected)
    found = verdict(5, rivals[1], lead=1e-6)
    assert found.status == "OK" and found.words == "5 of 12 tokens, then a near-tie"
    assert verdict(5, rivals[2], lead=1e-6).status == "DIFF"
    logprobs = told["text"]["logprobs"]
    found = verdict(0, tokens[0], logprobs=[p + 1e-2 for p in logprobs])
    assert found.status == "DIFF" and found.words.startswith("logprobs: max-abs 1.0")
    for changes in ({"logprobs": logprobs[:3]}, {"logprobs": "none"}, {"tokens": tokens[:3]}, {"tokens": None}):
        assert verdict(0, tokens[0], **changes).status == "SHAPE"


def test_a_runs_checkpoint_is_a_model_too(written, tmp_path):
    """Also one whose widths do not fit int4: that format is then left out."""
    shutil.copytree(written / "model/bf16/checkpoint", tmp_path / "run/model")
    model = golden_models.build(tmp_path / "run", 0)
    again, _ = loaded(written, "bf16", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    odd = K25(replace(model.config, moe_intermediate_size=40))
    assert golden_models.write_models(odd, tmp_path, 0).keys() == {"fp32", "bf16"}
