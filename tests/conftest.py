"""Shared test settings: one thread, derandomised Hypothesis, and one comparison that explains itself.

Run everything: make test        Run one file: .venv/bin/python -m pytest tests/test_moe.py
"""

import functools
import json
import os
import pathlib
import shutil
import sys

import hypothesis
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("PARALLEL", "0")  # tinygrad compiles here, and not in processes of its own

import conformance  # noqa: E402
from manifest import open_manifest  # noqa: E402 - needs the path above
from op import TOLERANCE  # noqa: E402

torch.set_num_threads(1)
settings.register_profile(
    "k25", deadline=None, derandomize=True, max_examples=25, suppress_health_check=list(HealthCheck)
)
settings.load_profile("k25")


def assert_close(actual, expected, tolerance=None, what=""):
    """Compare two tensors and, on failure, name the worst index with both values.

    Allowed is tolerance · max(1, largest expected).

    Args: actual, expected: tensors of one shape (arrays are converted); tolerance: float, a dtype of
    TOLERANCE, or None (taken from the coarser dtype of the two); what: the name shown on failure.
    """
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if tolerance is None:
        tolerance = max(TOLERANCE.get(x.dtype, 0.0) for x in (actual, expected))
    bound = TOLERANCE.get(tolerance, tolerance)
    if actual.numel() == 0:
        return
    a, b = actual.double(), expected.double()
    gap = (a - b).abs().nan_to_num(nan=float("inf"))
    gap[(a == b)] = 0.0  # equal infinities agree
    scale = max(1.0, b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0)
    worst = int(gap.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), gap.shape)) if gap.ndim else ()
    assert gap.max() <= bound * scale, (
        f"{what}: max-abs {gap.max():.3e}, relative {gap.max() / scale:.3e} > {bound:.1e}; "
        f"worst at {index}: got {a[index].item()!r}, expected {b[index].item()!r}"
    )


def gather(trainer, tensors):
    """Tensors of all processes, experts put together again, on rank 0; elsewhere an empty dict.

    trainer: parallel.Trainer; tensors: {name: tensor} — this process's, such as its state_dict() or gradients.
    """
    place, ep = trainer.place, trainer.layout.ep
    everyone = None if place.rank else [None] * dist.get_world_size()
    dist.gather_object({name: tensor.detach() for name, tensor in tensors.items()}, everyone)
    if place.rank:
        return {}
    parts = {}  # name → {ep rank or 0: tensor}
    for rank, theirs in enumerate(everyone):
        for name, tensor in theirs.items():
            parts.setdefault(name, {}).setdefault(rank % ep if ".mlp.experts." in name and tensor.ndim else 0, tensor)
    return {name: torch.cat([each[part] for part in sorted(each)]) if len(each) > 1 else each[0] for name, each in parts.items()}


@functools.cache
def questions(name, dtype, examples):
    """The first inputs that conformance.check_op draws for an op, with their answers: drawn once for all who are asked."""
    op, asked = conformance.OPS[name], []

    @hypothesis.seed(0)
    @settings(max_examples=examples, phases=[Phase.generate], database=None, derandomize=False)
    @given(op.cases)
    def draw(arguments):
        asked.append(conformance.question(op, arguments, dtype))

    draw()
    return asked


def wrong_answers(op, function, dtype, examples, most=1):
    """The first Records of an implementation of an op; an empty list when all its answers are right."""
    records = []
    for asked in questions(op.name, dtype, examples):
        outcome = conformance.twin(function)(op, asked.arguments, asked.cotangents, op.differentiable)
        difference = conformance._first_difference(op, outcome, asked.expected, asked.truth, asked.floors)
        if difference:
            records.append(conformance.Record(asked.arguments, outcome, difference, asked.truth))
        if len(records) == most:
            break
    return records


def assert_right_ones_pass(op, examples=10):
    """The reference, every twin and every variant of an op conform in each of its dtypes."""
    for name, function in {"reference": op.reference, **op.twins, **op.variants}.items():
        for dtype in op.dtypes:
            wrong = wrong_answers(op, function, dtype, examples)
            assert not wrong, f"{name}, {dtype}: {wrong[0].difference.words}"


def assert_named(op, suspect):
    """A known mistake gives wrong answers, and they are told from those of all others. Without the shrinking, which the
    tests of conformance.py are about; `oracle.py mutants` takes the whole way with every one."""
    dtype = torch.float32 if torch.float32 in op.dtypes else op.dtypes[0]
    records = wrong_answers(op, suspect.wrong, dtype, conformance.MOST_EXAMPLES, most=6)
    assert records, "not caught"
    named, cause = conformance.diagnose(op, records)
    assert named == suspect.name, cause


def right_and_wrong(ops):
    """The two tests that every module of operations has: that right implementations pass in every dtype, and that each known mistake is
    caught and named. To be given names that begin with test_."""

    @pytest.mark.parametrize("op", ops, ids=lambda op: op.name)
    def right(op):
        assert_right_ones_pass(op)

    @pytest.mark.parametrize("op, suspect", [pytest.param(op, s, id=f"{op.name}-{s.name}") for op in ops for s in op.suspects])
    def wrong(op, suspect):
        assert_named(op, suspect)

    return right, wrong


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """A ManifestSource of thirty text rows and thirty captioned pictures."""
    folder = tmp_path_factory.mktemp("manifest")
    lines = []
    for number in range(30):
        Image.new("RGB", (28, 28), (number * 8, 0, 0)).save(folder / f"{number}.png")
        lines.append({"text": f"row {number}"})
        lines.append({"text": f"<image>picture {number}", "images": [f"{number}.png"]})
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return open_manifest(folder / "mine.jsonl")


def pytest_addoption(parser):
    group = parser.getgroup("conformance", "tests/test_conformance.py: test your own operations")
    group.addoption("--impl", help="module, or path of one, whose functions are named as ops (python oracle.py list)")
    group.addoption("--xfails-file", help="op names that are expected to fail, one a line")
    group.addoption("--max-examples", type=int, default=25, help="inputs per op and dtype")
    group.addoption("--seed", type=int, default=0, help="of the inputs")


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device; runs wherever there is one")


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def torch_as_it_comes():
    """No test sees what another has switched on: training sets torch to deterministic kernels, for its whole process."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def browser():
    """A headless chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("there is no chromium with its chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1400,900"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()
