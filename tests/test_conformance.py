"""Your implementation under K25's properties; and, without --impl, the harness under its own.

Run: .venv/bin/python -m pytest tests/test_conformance.py --impl my_kernels [--xfails-file F] [--max-examples N] [--seed N]
     .venv/bin/python -m pytest tests/test_conformance.py            the harness itself
"""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import conformance
import oracle
from conformance import OPS, ConformanceError, check, check_op, load_implementation, read_xfails, twin
from conftest import assert_named, assert_right_ones_pass, wrong_answers
from op import Op, Suspect, normal


def pytest_generate_tests(metafunc):
    """One test per op of --impl. Our own twins conform in the tests of their ops."""
    if metafunc.definition.name == "test_implementation_conforms":
        metafunc.parametrize("op_name", list(OPS) if metafunc.config.getoption("--impl") else [])


@pytest.fixture(autouse=True)
def not_the_harness(request):
    if request.config.getoption("--impl") and request.node.originalname != "test_implementation_conforms":
        pytest.skip("the harness is tested when no --impl is given")


@pytest.fixture(scope="session")
def implementation(pytestconfig):
    try:
        return load_implementation(pytestconfig.getoption("--impl"))
    except ConformanceError as error:
        pytest.exit(str(error), returncode=2)


@pytest.fixture(scope="session")
def xfails(pytestconfig):
    path = pytestconfig.getoption("--xfails-file")
    try:
        return read_xfails(path) if path else set()
    except ConformanceError as error:
        pytest.exit(str(error), returncode=2)


def test_implementation_conforms(op_name, implementation, xfails, pytestconfig):
    if op_name not in implementation.functions:
        pytest.skip(f"missing: {implementation.name} defines no {op_name}")
    options = pytestconfig.getoption("--max-examples"), pytestconfig.getoption("--seed")
    finding = check_op(OPS[op_name], implementation, implementation.dtypes, *options)
    if op_name in xfails:
        assert finding, f"{op_name} passes: take it out of the xfails file"
        pytest.xfail(finding.cause)
    assert finding is None, "\n" + finding.text()


# The harness


def module(folder, text, name="theirs.py"):
    """Write somebody's module; returns its path."""
    path = folder / name
    path.write_text(text)
    return str(path)


def run(capsys, *arguments):
    """Exit code and output of the command line."""
    code = oracle.main(list(arguments))
    out = capsys.readouterr()
    return code, out.out + out.err


RIGHT = '''
import torch
def rms_norm(x, weight, eps):
    wide = x.double()
    y = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (y.to(x.dtype) * weight)
'''
WRONG = RIGHT.replace("wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()",
                      "torch.nn.functional.layer_norm(wide, x.shape[-1:], eps=eps)")  # fmt: skip


def test_a_right_module_passes_and_the_rest_is_missing(tmp_path, capsys):
    code, out = run(capsys, "check", module(tmp_path, RIGHT))
    assert code == 0 and f"1 pass, {len(OPS) - 1} missing" in out, out


def test_a_module_may_define_dataclasses_and_hides_no_module_of_ours(tmp_path, capsys):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n" + RIGHT
    path = tmp_path / "op.py"
    path.write_text(text)
    code, out = run(capsys, "check", str(path))
    assert code == 0 and "1 pass" in out, out
    assert hasattr(sys.modules["op"], "Suspect")


def test_an_empty_module_is_missing_everywhere_and_fails_nowhere(tmp_path, capsys):
    code, out = run(capsys, "check", module(tmp_path, ""))
    assert f"{len(OPS)} missing" in out and "FAIL" not in out
    assert code == 2 and "nothing was tested" in out  # a misspelled module must not look right


def test_a_wrong_module_is_told_op_input_numbers_and_cause(tmp_path, capsys):
    code, out = run(capsys, "check", module(tmp_path, WRONG))
    assert code == 1
    for words in ("rms_norm: wrong in float32", "max-abs", "relative", "worst at (", "got", "expected",
                  "smallest input found", "probable cause: subtracts the mean"):  # fmt: skip
        assert words in out


def test_the_same_seed_gives_the_same_report(tmp_path, capsys):
    path = module(tmp_path, WRONG)
    reports = [run(capsys, "check", path, "--seed", "5")[1] for _ in range(2)]
    assert reports[0] == reports[1]


def test_the_report_as_json(tmp_path, capsys):
    run(capsys, "check", module(tmp_path, WRONG), "--json", str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["counts"]["FAIL"] == 1
    assert next(row for row in report["ops"] if row["op"] == "rms_norm")["suspect"] == "subtracts_mean"


def test_the_report_as_json_holds_no_nan(tmp_path, capsys):
    text = "import torch\ndef rms_norm(x, weight, eps):\n    return torch.full_like(x, torch.nan)\ndef swiglu(*a):\n    1 / 0\n"
    run(capsys, "check", module(tmp_path, text), "--json", str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    rows = {row["op"]: row for row in report["ops"]}
    assert rows["rms_norm"]["max_abs"] is None and rows["swiglu"]["kind"] == "contract"


@pytest.mark.parametrize(
    "text, words",
    [
        ("import torch\n\n1/0\n", "ZeroDivisionError"),
        ("def rms_norm(:\n", "SyntaxError"),
        ("import sys; sys.exit(0)\n", "SystemExit"),
        ("import no_such_library\n", "no_such_library"),
        ("ARRAYS = 'cupy'\n", "ARRAYS is 'cupy'"),
        ("DTYPES = ('float8',)\n", "float8"),
    ],
)
def test_a_module_that_cannot_be_used_gets_one_line(tmp_path, capsys, text, words):
    code, out = run(capsys, "check", module(tmp_path, text))
    assert code == 2 and words in out and len(out.strip().splitlines()) == 1


def test_misuse_exits_with_2_and_one_line(tmp_path, capsys):
    path = module(tmp_path, RIGHT)
    for arguments in (["no_such_module"], [path, "--ops", "rmsnorm"], [path, "--xfails-file", "none.txt"],
                      [path, "--max-examples", "0"], [path, "--dtypes", "int8"]):  # fmt: skip
        code, out = run(capsys, "check", *arguments)
        assert code == 2 and len(out.strip().splitlines()) == 1, arguments
    assert "did you mean rms_norm" in run(capsys, "check", path, "--ops", "rmsnorm")[1]


def test_expected_failures_do_not_fail_and_unexpected_passes_do(tmp_path, capsys):
    xfails = tmp_path / "xfails.txt"
    xfails.write_text("# known\nrms_norm  # until the next release\n")
    assert run(capsys, "check", module(tmp_path, WRONG), "--xfails-file", str(xfails))[0] == 0
    code, out = run(capsys, "check", module(tmp_path, RIGHT), "--xfails-file", str(xfails))
    assert code == 1 and "XPASS" in out and "rms_norm: passes; take it out" in out
    xfails.write_text("rms_morm\n")
    with pytest.raises(ConformanceError, match="line 1: no op named 'rms_morm'"):
        read_xfails(xfails)


# One small op of the harness's own, so that each clause of the contract is tested alone


def double(x, weight):
    """y = 2 x + Σ weight. x: (T,C) float; weight: (C,) float. Returns y (T,C)."""
    return 2 * x + weight.sum()


@st.composite
def double_cases(draw):
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return {"x": normal(draw, rows, width), "weight": normal(draw, width)}


DOUBLE = Op("double", "y = 2x + sum w", "none", double, double_cases(), ("y",), ("x", "weight"),
            dtypes=(torch.float32, torch.bfloat16, torch.float64),
            suspects=(Suspect("triples", "multiplies by three", lambda x, weight: 3 * x + weight.sum(), "a/b#1"),))  # fmt: skip


def wrong(function, **options):
    """The finding about a function that claims to be `double`."""
    finding = check_op(DOUBLE, twin(function), (torch.float32,), **options)
    assert finding, "was not caught"
    return finding


def test_the_reference_conforms_to_itself_in_every_dtype():
    assert check_op(DOUBLE, twin(double), DOUBLE.dtypes) is None


def test_a_wrong_rank_cannot_pass_by_broadcasting():
    assert "shape (1," in wrong(lambda x, w: double(x, w)[None]).record.difference.words
    assert wrong(lambda x, w: double(x, w).mean()).record.difference.kind == "shape"
    assert wrong(lambda x, w: double(x, w)[..., :1]).record.difference.kind == "shape"


def test_another_dtype_is_told():
    assert "float64, expected float32" in wrong(lambda x, w: double(x, w).double()).record.difference.words


def test_reading_unwritten_memory_is_always_wrong():
    def lazy(x, w):
        y = torch.empty_like(x)
        y[1:] = double(x, w)[1:]
        return y

    finding = wrong(lazy)
    assert finding.record.difference.kind == "nan" and "memory" in finding.cause

    def lazy_numpy(x, w):
        y = np.empty(x.shape, np.float32)
        y[:, 1:] = double(x, w).detach().numpy()[:, 1:]
        return torch.from_numpy(y)

    assert wrong(lazy_numpy).record.difference.kind == "nan"


def test_changing_an_input_is_told_and_does_not_reach_the_reference():
    def in_place(x, w):
        x.detach().mul_(2)
        return x + w.sum()

    assert "changes its argument x" in wrong(in_place).record.difference.words


def test_an_answer_that_changes_between_two_calls_is_told():
    calls = iter(range(10**6))
    assert "not deterministic" in wrong(lambda x, w: double(x, w) + 1e-9 * 2 ** next(calls)).record.difference.words


def test_an_exception_is_told_with_its_line():
    words = wrong(lambda x, w: x.no_such_method()).record.difference.words
    assert "raises AttributeError" in words and "test_conformance.py, line" in words
    assert "calls sys.exit(3)" in wrong(lambda x, w: sys.exit(3)).record.difference.words


def test_a_cut_graph_and_a_wrong_gradient_are_told():
    finding = wrong(lambda x, w: 2 * x + w.detach().sum())
    assert finding.record.difference.what == "gradient of weight" and "graph is cut" in finding.record.difference.words
    finding = wrong(lambda x, w: double(x, w) + (x - x.detach()))
    assert finding.record.difference.what == "gradient of x"


def test_a_forward_only_implementation_passes():
    assert check_op(DOUBLE, twin(lambda x, w: double(x, w).detach()), (torch.float32,)) is None


def test_a_pass_without_gradients_is_said_to_be_forward_only(tmp_path, capsys):
    cut = RIGHT.replace("* weight)", "* weight).detach()")
    assert "pass (forward only" in run(capsys, "check", module(tmp_path, cut), "--ops", "rms_norm")[1]
    assert "forward only" not in run(capsys, "check", module(tmp_path, RIGHT), "--ops", "rms_norm")[1]


def test_one_wrong_token_among_many_is_found():
    def last_token_off(x, w):
        y = double(x, w).clone()
        y[-1] += 1e-3 * y[-1].detach().abs().max()
        return y

    assert wrong(last_token_off).record.difference.kind == "value"


def test_the_input_is_shrunk():
    finding = wrong(lambda x, w: double(x, w) + (len(x) >= 3))
    assert tuple(finding.record.arguments["x"].shape) == (3, 1)


def test_the_suspect_with_the_same_numbers_is_named_and_no_other():
    finding = wrong(lambda x, w: x * 3.0 + w.sum())
    assert finding.suspect == "triples" and finding.cause == "multiplies by three (a/b#1)"
    assert wrong(lambda x, w: x * 5 + w.sum()).suspect == ""


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda x, w: 0.5 * double(x, w), "0.5 times"),
        (lambda x, w: double(x, w).flip(0), "another order"),
        (lambda x, w: double(x, w) + x**2, "of the values are wrong"),
    ],
)
def test_without_a_suspect_the_pattern_is_described(function, words):
    assert words in wrong(function).cause


def test_two_mistakes_at_once_are_named_by_the_one_that_the_smallest_input_shows():
    finding = wrong(lambda x, w: (3 * x + w.sum()) * (1 + (len(x) > 1)))
    assert finding.suspect == "triples" and finding.cause.startswith("at least this")


def test_an_unstable_function_is_reported_not_crashed_on():
    state = {"calls": 0}

    def moody(x, w):
        state["calls"] += 1
        return double(x, w) + (state["calls"] == 5)

    assert wrong(moody, max_examples=50).record.difference.kind == "contract"


def _each(change):
    """Changes every result of an op: reference → function."""

    def apply(reference):
        def changed(*arguments):
            results = reference(*arguments)
            return tuple(map(change, results)) if isinstance(results, tuple) else change(results)

        return changed

    return apply


RUBBISH = {
    "nothing": _each(lambda value: None), "text": _each(lambda value: "x"), "a number": _each(lambda value: 1.5),
    "no numbers": _each(lambda value: []), "ragged lists": _each(lambda value: [[1], [2, 3]]),
    "lists of text": _each(lambda value: [["a"]]), "an object": lambda reference: lambda *_: object(),
    "six numbers": lambda reference: lambda *_: (1, 2, 3, 4, 5, 6),
    "flattened": _each(lambda value: value.flatten() if isinstance(value, torch.Tensor) else value),
    "complex": _each(lambda value: value.to(torch.complex64) if isinstance(value, torch.Tensor) else value),
    "moved": _each(lambda value: value + 1 if isinstance(value, torch.Tensor) else value),
    "zeros": _each(lambda value: 0 * value if isinstance(value, torch.Tensor) else value),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_rubbish_is_described_and_crashes_nothing(name):
    op = OPS[name]
    for what, spoil in RUBBISH.items():
        records = wrong_answers(op, spoil(op.reference), op.dtypes[0], 2, most=2)
        tensors = what in ("flattened", "complex", "moved", "zeros")  # the same where nothing is a tensor, or all was flat
        assert records or tensors, what
        if records:
            suspect, cause = conformance.diagnose(op, records)
            assert cause and conformance.Finding(name, "float32", 1, records[-1], suspect, cause).text(), what


def test_the_tests_of_every_op_can_fail():
    """A mistake that is none, one under another's name, and a right implementation that is wrong are noticed."""
    op = OPS["rms_norm"]
    first, second, *_ = op.suspects
    for suspect in (dataclasses.replace(first, wrong=op.reference), dataclasses.replace(first, wrong=second.wrong)):
        with pytest.raises(AssertionError):
            assert_named(op, suspect)
    with pytest.raises(AssertionError):
        assert_right_ones_pass(dataclasses.replace(op, variants={"wrong": first.wrong}))
    assert_named(op, first)


# Arrays of other libraries


NUMPY = '''
ARRAYS = "numpy"
import numpy as np
def rms_norm(x, weight, eps):
    assert type(x) is np.ndarray and x.dtype == np.float32
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * weight
def rms_norm_backward(x, weight, eps, dy):
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps))
    g = dy * weight
    dx = r * (g - x * r * r * (g * x).mean(-1, keepdims=True))
    return dx, (dy * x * r).sum(tuple(range(x.ndim - 1)))
'''


def test_numpy_with_its_own_backward(tmp_path):
    right = load_implementation(module(tmp_path, NUMPY))
    assert check(right, ["rms_norm"])[0].status == "pass"
    wrong = load_implementation(module(tmp_path, NUMPY.replace("r * (g - x * r * r", "r * (g + x * r * r"), "other.py"))
    row = check(wrong, ["rms_norm"])[0]
    assert row.status == "FAIL" and row.finding.record.difference.what == "gradient of x"


JAX_STYLE = '''
import numpy as np
class Array:                      # immutable, not an ndarray, speaks __array__: what jax.numpy gives
    def __init__(self, values): self.values = np.array(values)
    def __array__(self, dtype=None, copy=None): return self.values
ARRAYS = Array
def rms_norm(x, weight, eps):
    assert isinstance(x, Array)
    x, weight = x.values, weight.values
    return Array(x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * weight)
'''


def test_jax_style_arrays(tmp_path):
    assert check(load_implementation(module(tmp_path, JAX_STYLE)), ["rms_norm"])[0].status == "pass"


def test_named_results_in_any_container():
    from adapter import run

    Pair = type("Pair", (), {"a": torch.ones(1), "b": torch.zeros(1)})
    for result in ((torch.ones(1), torch.zeros(1)), {"b": np.zeros(1, np.float32), "a": torch.ones(1)}, Pair()):
        outcome = run(lambda x, r=result: r, {"x": torch.ones(1)}, ("a", "b"))
        assert outcome.outputs["a"].item() == 1 and outcome.outputs["b"].item() == 0, outcome
    assert "expected 2 values: a, b" in run(lambda x: x, {"x": torch.ones(1)}, ("a", "b")).complaint


# Every op


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_every_op_explains_itself(op):
    assert op.formula and op.source and (op.reference.__doc__ or "").count("Returns")
    assert op.name == op.reference.__name__ and set(op.differentiable) | set(op.fixed) <= set(op.arguments)
    assert len({suspect.name for suspect in op.suspects}) == len(op.suspects)
    assert all(suspect.cause and suspect.cause[-1] != "." for suspect in op.suspects)


def test_the_registry_is_complete():
    assert len(OPS) >= 30 and sum(len(op.suspects) for op in OPS.values()) >= 60
    assert len(OPS) == sum(len(module.OPS) for module in conformance._MODULES), "two ops share a name"
