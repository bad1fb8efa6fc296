"""Goldens: inputs and right answers in files, for stacks that are not Python, and the comparison of what they answered.

    python oracle.py golden --out DIR [--ops rope,route] [--model tiny] [--seed N] [--cases N]
    python oracle.py compare DIR THEIRS [--json FILE]

DIR holds `manifest.json`, `README.txt` (which tells a reader in another language everything), for every op a few cases
`ops/CASE.safetensors` or `ops/CASE.json`, and with --model a checkpoint in the released layout in fp32, bf16 and int4
with its taps and greedy answers to the standard prompts. Another program writes files of the same names with its own
results. The same version writes the same bytes.

Public names: write_goldens, compare_goldens, add_golden_arguments, golden, add_compare_arguments, compare.
Tests: pytest tests/test_goldens.py
"""

import contextlib
import pathlib
import platform
import shutil
import tomllib

import hypothesis
import torch

from checkpoint import replace_directory, write_file
from conformance import OPS, select
from golden_cases import GoldenError, compare_op, read_json, to_json, write_op
from golden_models import build, compare_model, write_models

FORMAT = "k25-goldens"
LAYOUT = 1  # of the directory

RULES = {
    "close": "|got - expected| <= tolerance * max(row, largest / 10, floor) for every number, in double precision. row: the "
             "largest finite |expected| with the same indices but the last; largest: of the whole tensor. NaN exactly where "
             "NaN is expected, infinities equal. Same shape, same dtype",
    "exact": "same shape, every number equal; an integer may have another width",
    "number": "|got - expected| <= tolerance * |expected|",
    "equal": "the same JSON value",
    "same set": "same shape; each row holds the same numbers in any order, but for the rows named in near_ties",
}  # fmt: skip

README = """\
Golden files of K25, a reference implementation of Kimi K2.5.

READ    manifest.json: ops -> OP -> cases -> CASE names the arguments in order (kind input, weight or setting; settings
        with their value), the files, and under "results" what to compute: shape, dtype and rule of comparison.
        ops/CASE.safetensors holds input.ARG for every tensor argument (weights too) and output.NAME; for ops with
        gradients also cotangent.NAME (gradient of the loss by that output) and gradient.ARG (by that argument).
        ops/CASE.json holds, under the same names, results that are no tensors: numbers, text, lists.

WRITE   a directory THEIRS with files of the same names that hold your output.NAME and, if you have gradients, all
        gradient.ARG. Anything else in them is ignored. A file that you leave out is reported as missing, not as wrong.

CHECK   python oracle.py compare DIR THEIRS        exit code 0: whatever is there is right; 1: something is wrong.
        To compare yourself, manifest.json: rules spells out each rule. Most results are floats, with a tolerance and a
        floor of their own:
            |got - expected| <= tolerance * max(row, largest / 10, floor)        in double precision
        row = largest finite |expected| along the last dimension; largest = of the whole tensor.

SAFETENSORS
        8 bytes: n, unsigned, little-endian.
        n bytes: JSON, {"output.y": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}, padded with spaces.
        The rest: the data; offsets are [begin, end) in it; little-endian, row-major, no gaps.
        dtypes: F64 F32 BF16 (the upper half of an F32) I64 I32 U8 BOOL (one byte). "__metadata__" is no tensor.
        So begin, end and shape of each name are all that a reader needs, and a writer writes the same.

MODELS  (with --model) manifest.json: models -> fp32, bf16, int4. model/FORMAT/checkpoint is in the released layout; int4
        has experts as weight_packed, weight_scale, weight_shape. model/FORMAT/taps/PROMPT.safetensors holds prompt.ids,
        prompt.patches, prompt.grid_thw and the result of every operation, named as in taps.json, which tells the op;
        model/FORMAT/greedy.json the greedy answers (no token stops them) with log-probabilities. Whatever the weights
        are stored in, all was computed in float32.
        Write model/FORMAT/taps/PROMPT.safetensors with those taps that you have, and
        model/FORMAT/greedy.json as {"PROMPT": {"tokens": [...], "logprobs": [...]}}.
        "rivals" are other tokens with the lead of ours over each. A token may be a rival whose lead is at most "tie" of the
        manifest; nothing after it is compared.

        If you compute in bfloat16: the wider numbers under "bfloat16" hold when one of your taps is BF16, and for answers
        when greedy.json also says "computed_in": "bfloat16". Rounding may then choose the other of two nearly tied experts
        (near_ties); nothing after that is compared. To compare all, use, and write, the experts of our ...router.index,
        with weights from your own scores.
"""


# Writing


def write_goldens(directory, names, seed=0, count=4, model=None):
    """Write a golden directory, atomically; the same version writes the same bytes.

    directory: path, new or a golden directory; names: of the ops; seed: int; count: inputs per op; model: "tiny", "toy",
    directory of a run or checkpoint, or None. Returns the manifest. Raises GoldenError when `directory` holds something
    else or an argument makes no sense.
    """
    directory = pathlib.Path(directory).resolve()
    empty = not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))
    if not empty and not _is_golden(directory):
        raise GoldenError(f"{directory} exists and is no golden directory: choose another one")
    if count < 1:
        raise GoldenError(f"--cases is {count}: give at least 1")
    with _one_thread():
        built = build(model, seed) if model else None
        directory.parent.mkdir(parents=True, exist_ok=True)
        unfinished = directory.with_name(f".{directory.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "ops").mkdir(parents=True)
        ops = {name: write_op(OPS[name], unfinished, seed, count) for name in names}
        models = write_models(built, unfinished, seed) if built else {}
    manifest = {"format": FORMAT, "layout": LAYOUT, "seed": seed, "versions": _versions(), "rules": RULES,
                "ops": ops, "models": models}  # fmt: skip
    write_file(unfinished / "manifest.json", to_json(manifest))
    write_file(unfinished / "README.txt", README)
    replace_directory(unfinished, directory)
    return manifest


@contextlib.contextmanager
def _one_thread():
    """Sums in one order, however many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _versions():
    """Of what the bytes depend on; K25's own stands in pyproject.toml."""
    project = tomllib.loads(pathlib.Path(__file__).with_name("pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"k25": project["version"], "torch": torch.__version__, "hypothesis": hypothesis.__version__,
            "python": platform.python_version()}  # fmt: skip


def _is_golden(directory):
    try:
        return read_json(directory / "manifest.json").get("format") == FORMAT
    except GoldenError:
        return False


# Comparing


def compare_goldens(directory, theirs):
    """Compare what another program wrote with a golden directory.

    directory: path of the goldens; theirs: path of the other program's files. Yields lists of Verdict, one op or model
    format after the other. Raises GoldenError when one of them is no such directory.
    """
    directory, theirs = pathlib.Path(directory), pathlib.Path(theirs)
    if not _is_golden(directory):
        raise GoldenError(f"{directory} is no golden directory: python oracle.py golden --out DIR writes one")
    if not theirs.is_dir():
        raise GoldenError(f"{theirs} is no directory")
    manifest = read_json(directory / "manifest.json")
    if manifest["layout"] != LAYOUT:
        raise GoldenError(f"{directory} has layout {manifest['layout']}, this version reads {LAYOUT}: write it again")
    for name, entry in manifest["ops"].items():
        yield compare_op(name, entry, directory, theirs)
    for name, entry in manifest["models"].items():
        yield compare_model(name, entry, directory, theirs)


# Command line


def add_golden_arguments(parser):
    """The arguments of `oracle.py golden`."""
    parser.add_argument("--out", required=True, help="directory to write, new or a golden directory")
    parser.add_argument("--ops", help="comma-separated names; default: all")
    parser.add_argument("--model", help="also a whole model: tiny, toy, or the directory of a run or a checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=4, help="inputs per op")


def golden(options):
    """`oracle.py golden`: write the directory. Returns 0."""
    manifest = write_goldens(options.out, select(options.ops), options.seed, options.cases, options.model)
    cases = sum(len(entry["cases"]) for entry in manifest["ops"].values())
    models = f", a model in {', '.join(manifest['models'])}" if manifest["models"] else ""
    size = sum(path.stat().st_size for path in pathlib.Path(options.out).rglob("*") if path.is_file())
    print(f"{options.out}: {len(manifest['ops'])} ops, {cases} cases{models}, {size / 1e6:.1f} MB; begin with README.txt")
    return 0


def add_compare_arguments(parser):
    """The arguments of `oracle.py compare`."""
    parser.add_argument("dir", help="golden directory")
    parser.add_argument("theirs", help="directory that another program wrote")
    parser.add_argument("--json", help="also write the result to this file")


def compare(options):
    """`oracle.py compare`: a line per case. Returns 0, or 1 when something is wrong; raises GoldenError on misuse."""
    verdicts = []
    for group in compare_goldens(options.dir, options.theirs):
        print("\n".join(verdict.text() for verdict in group), flush=True)
        verdicts += group
    if all(verdict.status == "MISSING" and not verdict.wrong for verdict in verdicts):
        raise GoldenError(f"{options.theirs} holds no file of the goldens' names; see {options.dir}/README.txt")
    counts = {status: sum(v.status == status for v in verdicts) for status in ("OK", "DIFF", "SHAPE", "BROKEN", "MISSING")}
    print("\n" + ", ".join(f"{number} {status}" for status, number in counts.items() if number))
    if options.json:
        report = {"counts": counts, "cases": [_as_json(verdict) for verdict in verdicts]}
        write_file(options.json, to_json(report))
    return 1 if any(verdict.wrong for verdict in verdicts) else 0


def _as_json(verdict):
    told = {"case": verdict.case, "status": verdict.status, "words": verdict.words, "cause": verdict.cause}
    return told | (verdict.difference.as_json() if verdict.difference else {})
