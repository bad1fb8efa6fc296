"""The repository keeps its own rules: what it names exists, imports go only downward, everything public is described.

Run: .venv/bin/python -m pytest tests/test_repository.py
"""

import ast
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
DOCS = {name: ast.get_docstring(tree) or "" for name, tree in TREES.items()}

# Each module may import only what stands before it.
ORDER = ("flags moe media pictures optim tokenizer template vit3d example texts scenes sources storage manifest mla checkpoint "
         "generate k25 data evaluate report adapter sandbox zygote interpreter rewards objective critical op ops_rope ops_attention ops_int4 ops_experts "
         "ops_training ops_media ops_vision ops_text ops_rl ops_toggle ops_rewards ops_swarm tinygrad_twins patterns conformance taps golden_cases golden_models goldens peer "
         "divergence mutants defects exercises classroom roofline bench_cases bench oracle activations step dep expert_parallel parallel "
         "schedule footprint trials planner shards dep_report dep_bench scale_bench slots engine rollout tasks environment grm wire records gateway traces sft study lab rl "
         "rl_report rl_job toggle_experiment vision_experiments corpus swarm_log swarm_trace policies swarm swarm_bench lookups parl parl_experiment fusion "
         "training_claims vision_claims context_claims beside experiments train_small course atlas").split()  # fmt: skip
LONGEST = 700  # lines; beyond that, one concept of the module becomes a module of its own

each_module = pytest.mark.parametrize("name", MODULES)


# Modules


def imported(tree):
    """The first name of everything imported anywhere in a module, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import in a flat repository"
            yield node.module.partition(".")[0], node.lineno


def test_every_module_has_its_place_in_the_order():
    assert set(MODULES) <= set(ORDER)


@each_module
def test_imports_go_only_downward(name):
    for other, line in imported(TREES[name]):
        if other in MODULES:
            assert ORDER.index(other) < ORDER.index(name), f"{name}.py:{line} imports {other}, which stands above it"


@each_module
def test_only_declared_dependencies_are_imported(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]["storage"] + project["optional-dependencies"]["serve"]  # imported where needed
    declared = {re.match(r"[\w-]+", dependency).group().lower() for dependency in [*project["dependencies"], *optional]}
    allowed = declared - {"pillow"} | {"PIL"} | set(sys.stdlib_module_names) | set(MODULES)
    strangers = [f"{name}.py:{line}: {other}" for other, line in imported(TREES[name]) if other not in allowed]
    assert not strangers, "not in pyproject.toml"


@each_module
def test_no_module_is_too_long(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= LONGEST


# Docstrings


def bound_names(tree):
    """Every name that a module's top level defines, assigns or imports."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        else:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names


def names_of_list(text):
    """The names of `a, b (a remark), c_reference/_fused; the functions d, and e`: the last word of each item."""
    for item in re.split(r"[,;]", re.sub(r"\(.*?\)", "", text)):
        *_, word = item.split() or [""]
        first, *others = word.split("/")
        yield from [first] + [re.sub("_reference$", other, first) for other in others]


def public_claims(doc):
    """The alternatives that a docstring's Public part claims: [{name, …} of which all must exist, or {…}, …].

    A list `Public: a, b, c.` claims one set. Of a table below `Public names` each row claims one of its columns:
    the other one explains.
    """
    match = re.search(r"^Public( names)?(?P<colon>:?)(?P<rest>.*?)(\n\n|\Z)", doc, re.DOTALL | re.MULTILINE)
    assert match, "the module's docstring has no line that begins with Public"
    if match["colon"]:
        listed = re.split(r"\.(?:\s|\Z)|\n(?:Tests|Letters|Run):", match["rest"])[0]
        return [[{name for name in names_of_list(listed) if name and "`" not in name}]]
    rows = [line for line in match["rest"].splitlines() if line.startswith("    ")]
    return [[set(names_of_list(column)) - {""} for column in re.split(r"\s{2,}", row.strip())] for row in rows]


def exists(claim, names):
    """Whether a claimed name is bound; `propose_*` wants at least one that begins so."""
    return any(n.startswith(claim[:-1]) for n in names) if claim.endswith("*") else claim in names


@each_module
def test_the_public_names_of_a_module_docstring_exist(name):
    names, claims = bound_names(TREES[name]), public_claims(DOCS[name])
    assert claims and all(row[0] for row in claims), "it claims nothing"
    for row in claims:
        missing = [{claim for claim in column if not exists(claim, names)} for column in row]
        assert not all(missing), f"{name}.py lacks names of its docstring: {' or '.join(map(str, missing))}"


def test_public_claims_are_read_from_lists_and_tables():
    listed = "Title.\n\nPublic: A, b_reference/_fused (twins); the functions c,\nand d_*. No more, e.\n\nLetters: B"
    assert public_claims(listed) == [[{"A", "b_reference", "b_fused", "c", "d_*"}]]
    table = "Title.\n\nPublic names\n    part     A, b\n    c, D     some words, more\nProse.\n\nTests"
    assert public_claims(table) == [[{"part"}, {"A", "b"}], [{"c", "D"}, {"words", "more"}]]
    assert exists("d_*", {"d_x"}) and not exists("d_*", {"e"})


@each_module
def test_every_public_function_class_and_method_has_a_docstring(name):
    def undescribed(node, prefix):
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name[0] != "_":
                if not ast.get_docstring(child):
                    yield prefix + child.name
                if isinstance(child, ast.ClassDef):
                    yield from undescribed(child, f"{prefix}{child.name}.")

    assert not list(undescribed(TREES[name], ""))


@each_module
def test_a_module_docstring_says_how_it_is_tested(name):
    named = re.findall(r"tests/\w+\.py", DOCS[name])
    assert named, f"{name}.py names no test file"
    missing = [file for file in named if not (ROOT / file).is_file()]
    assert not missing, f"{name}.py names {', '.join(missing)}, which does not exist"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda path: path.name)
def test_a_test_file_says_how_it_is_run(path):
    assert f"pytest tests/{path.name}" in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


# Files

MADE = {".git", ".venv", "runs", "build", "__pycache__", ".pytest_cache", ".hypothesis", "k25.egg-info"}


def files(folder=ROOT):
    """Every file of the repository that is written, not made."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in MADE:
            yield from files(path)
        elif path.is_file():
            yield path


def test_no_file_names_a_path_of_one_machine():
    private = ["/".join(["", "work", ""]), "." + "library"]  # put together, so that this file does not name them
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in files()
        for word in private
        if word in path.read_text(encoding="utf-8", errors="ignore")
    ]
    assert not found


@pytest.mark.xdist_group("alone")
def test_tests_of_a_group_share_a_worker(request):
    """pytest-xdist says so by the test's name; with a pytest that it does not know, long fixtures run once per worker, and nothing fails."""
    grouped = getattr(request.config.option, "loadgroup", False)
    assert not grouped or request.node.nodeid.endswith("@alone")
