"""Claims about exercises.py and classroom.py: stubs and solutions from the live source, and what a file is worth.

Run: .venv/bin/python -m pytest tests/test_classroom.py
"""

import argparse
import ast
import contextlib
import inspect
import json
import pathlib
import re
import textwrap

import pytest

import classroom
import exercises
from classroom import ClassroomError, grade_source, open_sandbox
from conformance import OPS
from exercises import EXERCISES, ExerciseError, find_exercise, solution, stub

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEAD = "import torch\nimport torch.nn.functional as F\n"
NORM = HEAD + textwrap.dedent('''
    def rms_norm(x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
''')
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)


@pytest.fixture(scope="module")
def sandbox():
    """One child for all grades."""
    with open_sandbox(seconds=30, memory_mb=1500) as box:
        yield box


@pytest.fixture
def grade(sandbox):
    """Grade a text: grade(exercise name, text, examples) → Grade."""
    return lambda name, text, examples=10: grade_source(text, "mine.py", find_exercise(name), sandbox, examples)


def texts(result, level):
    """The hints up to a level, one text."""
    return "\n".join(text for at, text in result.hints if at <= level)


def lost(result):
    """Titles of what did not get full points."""
    return [p.title for p in result.properties if p.earned < 1]


# Exercises


def test_every_op_is_taught_in_exactly_one_exercise():
    taught = [name for exercise in EXERCISES for name in exercise.ops]
    assert sorted(taught) == sorted(OPS)


def test_exercises_have_hints_minutes_and_different_names():
    assert len({e.name for e in EXERCISES}) == len(EXERCISES)
    assert all(len(e.hints) == 3 and e.minutes > 0 and e.learn and e.why for e in EXERCISES)


def test_an_unknown_exercise_names_the_nearest():
    with pytest.raises(ExerciseError, match="did you mean rms_norm"):
        find_exercise("rms-norm")
    with pytest.raises(ExerciseError, match="exercise --list"):
        find_exercise("zzz")


@each_exercise
def test_a_stub_has_the_live_signatures_and_docstrings_and_no_bodies(exercise):
    tree = ast.parse(stub(exercise))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions] == list(exercise.ops)
    for function in functions:
        op = OPS[function.name]
        assert tuple(a.arg for a in function.args.args) == op.arguments
        assert ast.get_docstring(function) == inspect.getdoc(op.reference)
        assert len(function.body) == 2 and isinstance(function.body[1], ast.Raise)


@each_exercise
def test_stubs_and_solutions_import_nothing_of_the_project(exercise):
    ours = {path.stem for path in ROOT.glob("*.py")}
    for text in (stub(exercise), solution(exercise)):
        imported = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
        names = [n.module for n in imported if isinstance(n, ast.ImportFrom)]
        names += [alias.name for n in imported if isinstance(n, ast.Import) for alias in n.names]
        assert not ours & {name.partition(".")[0] for name in names}


@each_exercise
def test_an_untouched_stub_is_worth_nothing(exercise, grade):
    result = grade(exercise.name, stub(exercise), 1)
    assert result.points() == 0 and result.notes == ()
    assert texts(result, 3) == "\n".join(f"{name} is not written yet" for name in exercise.ops)


@each_exercise
def test_the_reference_in_a_file_of_its_own_is_worth_100(exercise, grade):
    result = grade(exercise.name, solution(exercise), 4)
    assert result.points() == 100 and result.hints == () == result.notes, texts(result, 3)


def test_a_name_that_two_modules_use_is_kept_apart(tmp_path, monkeypatch):
    (tmp_path / "lower.py").write_text("import math as m\nK = 2\ndef f(x):\n    return K * m.sqrt(x)\n")
    (tmp_path / "middle.py").write_text("import lower\nK = 3\ndef g(x, é='é'): return K + len(é) * lower.f(x)\n")
    (tmp_path / "upper.py").write_text("from middle import g as f\ndef K(x):\n    return f(x)\n")
    monkeypatch.setattr(exercises, "ROOT", tmp_path)
    exercises._source.cache_clear()
    collector = exercises._Collector({("upper", "K"): "op"})
    collector.collect("upper", "K")
    exercises._source.cache_clear()
    space = {}
    exec("\n".join([*collector.imports, *collector.chunks]), space)
    assert space["op"](4) == 3 + 2 * 2


# Right and wrong files


BY_HAND = {
    "rms_norm": NORM,
    "rope": '''
        def rope(x, cos, sin):
            z = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)).contiguous())
            z = z * torch.complex(cos, sin)[:, :, None]
            return torch.view_as_real(z).flatten(-2).to(x.dtype)
        def rope_half_split(x, cos, sin):
            order = rope_permutation(x.shape[-1])
            return rope(x[..., order.argsort()], cos, sin)[..., order]
        def rope_permutation(rope_dim):
            return torch.arange(rope_dim).reshape(-1, 2).T.flatten()
    ''',
    "moe": '''
        def swiglu(x, gate, up, down):
            return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
        def experts(x, weights, index, gate, up, down):
            y = torch.zeros_like(x)
            for e in range(len(gate)):
                token, slot = (index == e).nonzero(as_tuple=True)
                weight = weights[token, slot, None].to(x.dtype)
                y = y.index_add(0, token, weight * swiglu(x[token], gate[e], up[e], down[e]))
            return y
    ''',
    "cross_entropy": '''
        def cross_entropy(hidden, head, targets):
            wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
            return F.cross_entropy((hidden @ head.T).to(wide), targets, reduction="none", ignore_index=-100)
    ''',
    "video": '''
        def frame_indices(count, source_fps, sample_fps, max_frames):
            n = max(round(count * min(sample_fps, source_fps) / source_fps), 1)
            n = n if max_frames is None else min(n, max_frames)
            return [0] if n == 1 else [round(i * (count - 1) / (n - 1)) for i in range(n)]
        def timestamp(seconds):
            whole = int(seconds)
            cut = int(seconds % 1 * 1000)
            return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}.{cut:03d}"
    ''',
    "critical_steps": '''
        def critical_steps(main, steps, given, finished):
            return (main + F.pad(steps * given, (0, 1)).amax(1)).sum()
    ''',
    "parl": '''
        def item_f1(given, truth):
            if truth is None:
                return float("nan")
            a, b = given.unique().tolist(), truth.unique().tolist()
            return 2 * len([x for x in a if x in b]) / (len(a) + len(b)) if a + b else 1.0
        def parl_reward(prompts, given, finished, performance, progress, enough, knots):
            won, widest, earned = [], 0, 0
            for stage in range(len(prompts)):
                tried = {}
                for prompt, over in zip(prompts[stage][given[stage]].tolist(), finished[stage][given[stage]].tolist()):
                    if prompt not in won:
                        tried[prompt] = tried.get(prompt, False) or over
                won += [prompt for prompt in tried if tried[prompt]]
                widest, earned = max(widest, len(tried)), earned + sum(tried.values())
            parallel, finish = min(widest / enough, 1), earned / max(int(given.sum()), 1)
            at = knots[:, 0]
            k = int((at <= progress).sum().clamp(1, len(at) - 1))
            share = ((progress - at[k - 1]) / (at[k] - at[k - 1])).clamp(0, 1)
            first, second = (knots[k - 1, 1:] + share * (knots[k] - knots[k - 1])[1:]).tolist()
            return first * parallel + second * finish + performance.item(), float(parallel), finish, first, second
    ''',
    "swarm": '''
        def swarm_advantages(rewards, groups, valid, context, writer):
            mine = (context == 0) & (writer == 0) & valid[:, None]
            known = torch.where(valid, rewards, 0)
            sums = torch.zeros(9).to(rewards).index_add(0, groups, known)
            counts = torch.zeros(9).to(rewards).index_add(0, groups, valid.to(rewards)).clamp(min=1)
            return torch.where(mine, (known - (sums / counts)[groups])[:, None], 0), mine.sum()
    ''',
}

# A lesson, the words of BY_HAND that somebody writes differently, and the mistake that is.
WRONG = [
    ("critical_steps", ".amax(1)", ".sum(1)", "subtasks side by side are added up"),
    ("critical_steps", "steps * given", "steps * given * finished", "subtasks that failed are left out"),
    ("critical_steps", "(main + F.pad(steps * given, (0, 1)).amax(1)).sum()",
     "main.sum() + (steps * given).max() if steps.numel() else main.sum()", "one maximum over all stages"),
    ("parl", "else 1.0", "else 0.0", "two empty sets score 0"),
    ("parl", 'float("nan")', "0.0", "an unknown truth scores 0"),
    ("parl", "earned / max(int(given.sum()), 1)", "earned / int(given.sum()) if given.any() else 1.0", "r_finish is 1 when nothing"),
    ("parl", "performance.item()", "performance.nan_to_num().item()", "an unknown performance counts as 0"),
    ("parl", "won += [prompt for prompt in tried if tried[prompt]]", "won += tried", "what failed and is given again counts"),
    ("swarm", "(writer == 0)", "(writer >= 0)", "what subagents return to the orchestrator is trained"),
    ("swarm", "(context == 0) & ", "", "is trained again where it is a subagent's prompt"),
    ("swarm", "(sums / counts)[groups]", "known.sum() / valid.sum()", "the baseline is the mean of the batch"),
]  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_a_solution_written_by_hand_is_worth_100(grade, name):
    result = grade(name, HEAD + textwrap.dedent(BY_HAND[name]))
    assert result.points() == 100, texts(result, 3)


@pytest.mark.parametrize("name, right, wrong, mistake", WRONG, ids=[f"{name}-{mistake}" for name, *_, mistake in WRONG])
def test_a_common_mistake_of_the_swarm_costs_its_points_and_no_others(grade, name, right, wrong, mistake):
    text = HEAD + textwrap.dedent(BY_HAND[name])
    assert text.count(right) == 1
    result = grade(name, text.replace(right, wrong), 15)
    avoided = [title for title in lost(result) if title.startswith("avoids")]
    assert len(avoided) == 1 and mistake in avoided[0], avoided
    assert {title.split()[0] for title in lost(result)} == {"avoids:", "values"} and 30 < result.points() < 99
    assert len({p.op for p in result.properties if p.earned < 1}) == 1
    assert mistake in texts(result, 2) and mistake not in texts(result, 1)


def test_a_known_mistake_costs_its_property_and_the_inputs_on_which_it_shows(grade):
    result = grade("rms_norm", NORM.replace(" + eps", ""), 25)
    assert 40 < result.points() < 90
    assert [title for title in lost(result) if title.startswith("avoids")] == ["avoids: eps is missing"]
    assert "eps is missing" not in texts(result, 1)
    assert "probable cause: eps is missing" in texts(result, 2)
    assert "worst at" not in texts(result, 2) and re.search(r"worst at .*got .*expected", texts(result, 3))


def test_two_mistakes_at_once_do_not_hide_each_other(grade):
    text = HEAD + textwrap.dedent('''
        def route(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
            scores = (x.float() @ weight.float().T).sigmoid() + bias
            index = scores.topk(top_k).indices if pinned is None else pinned
            chosen = scores.gather(1, index)
            return scale * chosen / chosen.sum(1, keepdim=True), index
    ''')
    missed = " ".join(lost(grade("router", text, 25)))
    assert "biased scores" in missed and "limit to the best groups" in missed
    assert "softmax" not in missed and "routed_scaling_factor" not in missed


def test_zeros_of_the_right_shape_are_worth_little(grade):
    result = grade("rms_norm", HEAD + "def rms_norm(x, weight, eps): return torch.zeros_like(x)\n")
    assert 0 < result.points() < 20


def test_a_cut_graph_costs_the_gradients_alone(grade):
    result = grade("rms_norm", NORM.replace("wide = x", "wide = x.detach()"))
    assert lost(result) == ["gradients of x, weight"] and "gradient of x is not" in texts(result, 1)
    result = grade("rms_norm", NORM.replace("    wide", "    x, weight = x.detach(), weight.detach()\n    wide"))
    assert lost(result) == ["gradients of x, weight"]


def test_a_changed_argument_and_a_dice_roll_cost_the_contract(grade):
    result = grade("rms_norm", NORM.replace("    wide", "    weight.data += 0\n    weight.data *= 2\n    wide", 1))
    assert "contract" in " ".join(lost(result)) and "changes its argument weight" in texts(result, 1)
    result = grade("rms_norm", NORM.replace(" + eps", " + eps * torch.rand(())"))
    assert "contract" in " ".join(lost(result))


def test_wrong_in_bfloat16_only_is_said(grade):
    text = NORM.replace("return ", "return (1 + (x.dtype == torch.bfloat16)) * ")
    assert "never in float32" in texts(grade("rms_norm", text), 1)


def test_a_wrong_shape_is_said(grade):
    result = grade("rms_norm", NORM.replace("return ", "return torch.ones(1, 1, 1) * "))
    assert "shape and dtype" in lost(result) and "expected" in texts(result, 1)


def test_an_op_that_is_missing_costs_its_share(grade):
    text = HEAD + "def swiglu(x, gate, up, down): return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T\n"
    result = grade("moe", text)
    assert result.points() == 50 and "experts is not defined" in texts(result, 1)


def test_the_same_seed_gives_the_same_grade(grade):
    text = NORM.replace(" + eps", "")
    assert grade("rms_norm", text).properties == grade("rms_norm", text).properties


# Misbehaviour


def test_importing_the_reference_is_refused_and_said(grade):
    result = grade("rms_norm", "import torch\nfrom mla import RMSNorm\ndef rms_norm(x, weight, eps): pass\n")
    assert result.points() == 0
    assert result.notes == ("mine.py, line 2: cannot be imported: reaches for the reference (import mla), which is refused",)


@pytest.mark.parametrize(
    "line, attempt",
    [
        ("import ops_attention", "import ops_attention"),
        ("from transformers import AutoModel", "import transformers"),
        (f"open({str(ROOT / 'mla.py')!r}).read()", f"reading {ROOT / 'mla.py'}"),
        (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import k25", "import k25"),
        (f"import runpy; runpy.run_path({str(ROOT / 'mla.py')!r})", f"reading {ROOT / 'mla.py'}"),
    ],
)
def test_reaching_for_the_reference_inside_a_function_is_refused_and_said(grade, line, attempt):
    result = grade("rms_norm", f"def rms_norm(x, weight, eps):\n    {line}\n", 2)
    assert result.points() == 0
    assert f"reaches for the reference ({attempt}), which is refused" in texts(result, 1)
    assert len(result.notes) == 1 and attempt in result.notes[0]


def test_a_caught_attempt_is_said_and_the_file_graded_on_its_own(grade):
    result = grade("rms_norm", "try:\n    import moe\nexcept Exception:\n    pass\n" + NORM, 2)
    assert result.points() == 100
    assert result.notes == ("mine.py tries to reach the reference (import moe): refused; it is graded without",)


def test_the_reference_is_not_in_the_students_process(sandbox):
    sandbox.load("student", "import sys\ndef modules(): return sorted(sys.modules)\n", "mine.py")
    ours = {path.stem for path in ROOT.glob("*.py")}
    assert ours & set(sandbox.call("student", "modules").value) == {"adapter"}


def test_a_forged_answer_is_worth_nothing(grade, sandbox):
    text = "import adapter\nadapter.run = lambda *a: {'outputs': {}, 'gradients': {}, 'complaint': ''}\n"
    result = grade("rms_norm", text + "def rms_norm(x, weight, eps): pass\n", 2)
    sandbox.close()  # its adapter is spoilt
    assert result.points() == 0 and "not the form" in texts(result, 1)


def test_an_endless_loop_is_one_line_and_costs_only_its_op(sandbox):
    text = HEAD + textwrap.dedent('''
        def experts(x, weights, index, gate, up, down):
            while True: pass
        def swiglu(x, gate, up, down): return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    ''')
    with open_sandbox(seconds=2) as impatient:
        result = grade_source(text, "mine.py", find_exercise("moe"), impatient, 2)
    assert result.points() == 50
    assert "experts is not finished after 2 s" in texts(result, 1).splitlines()


def test_a_slow_op_is_ended_after_its_budget(sandbox, monkeypatch):
    monkeypatch.setattr(classroom, "BUDGET", 0)
    assert "rms_norm is too slow" in texts(grade_source(NORM, "mine.py", find_exercise("rms_norm"), sandbox, 2), 1)


@pytest.mark.parametrize(
    "body, words",
    [
        ("torch.zeros(10**11)", "needs more memory than the 1500 MB allowed"),
        ("__import__('os')._exit(3)", "ended the process with exit code 3"),
        ("__import__('sys').exit(3)", "calls sys.exit(3)"),
        ("__import__('os').fork()", "os.fork is refused"),
        ("[][1]", "raises IndexError: list index out of range (mine.py, line 1)"),
    ],
)
def test_a_misbehaving_function_is_told_in_one_line(grade, body, words):
    result = grade("rms_norm", f"import torch; rms_norm = lambda x, weight, eps: {body}\n", 2)
    assert result.points() == 0 and words in texts(result, 1)


@pytest.mark.parametrize(
    "text, note",
    [
        ("x = 1\n1 / 0\n", "mine.py, line 2: cannot be imported: ZeroDivisionError: division by zero"),
        ("def f(:\n", "mine.py, line 1: cannot be imported: SyntaxError: invalid syntax"),
        ("import sys\nsys.exit()\n", "mine.py, line 2: cannot be imported: calls sys.exit()"),
        ("import os\nos._exit(0)\n", "mine.py: cannot be imported: ended the process with exit code 0"),
        ("\nimport my_helper\n", "mine.py, line 2: cannot be imported: ModuleNotFoundError: No module named 'my_helper'"),
    ],
)
def test_a_crash_at_import_is_one_line(grade, text, note):
    result = grade("rms_norm", text)
    assert result.points() == 0 and result.notes == (note,) and result.hints == ()


def test_prints_and_files_do_no_harm(grade, tmp_path):
    noise = "    print('x' * 10**6)\n    open('note.txt', 'w').write('x')\n    return"
    assert grade("rms_norm", NORM.replace("    return", noise), 2).points() == 100
    text = NORM.replace("    return", f"    open({str(tmp_path / 'out')!r}, 'w')\n    return")
    assert "writing" in texts(grade("rms_norm", text, 2), 1) and not list(tmp_path.iterdir())


# The command line


def run(kind, *arguments):
    """`oracle.py exercise …` or `oracle.py grade …` without the rest of oracle.py; returns the exit code."""
    parser = argparse.ArgumentParser()
    getattr(classroom, f"add_{kind}_arguments")(parser)
    return getattr(classroom, kind)(parser.parse_args([str(a) for a in arguments]))


def test_the_list_shows_all_exercises_in_order(capsys):
    assert run("exercise", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [e.name for e in EXERCISES]


def test_a_stub_is_written_and_never_overwritten_by_mistake(tmp_path, capsys):
    path = tmp_path / "my_moe.py"
    assert run("exercise", "moe", "--out", path) == 0
    assert path.read_text() == stub(find_exercise("moe"), "my_moe.py") and "grade my_moe.py" in path.read_text()
    path.write_text("mine")
    with pytest.raises(ClassroomError, match="exists already"):
        run("exercise", "moe", "--out", path)
    assert path.read_text() == "mine"
    assert run("exercise", "moe", "--out", path, "--force", "--solution") == 0
    assert path.read_text() == solution(find_exercise("moe"))
    with pytest.raises(ClassroomError, match="cannot write"):
        run("exercise", "moe", "--out", tmp_path / "nowhere" / "my_moe.py")
    assert [p.name for p in tmp_path.iterdir()] == ["my_moe.py"]


def test_a_solution_is_printed(capsys):
    assert run("exercise", "rms_norm", "--solution") == 0
    assert capsys.readouterr().out == solution(find_exercise("rms_norm"))


def test_a_grade_is_printed_and_written(tmp_path, capsys):
    path, report = tmp_path / "mine.py", tmp_path / "grade.json"
    path.write_text(NORM.replace(" + eps", ""))
    assert run("grade", path, "--json", report, "--hints", 2) == 1
    out, written = capsys.readouterr().out, json.loads(report.read_text())
    assert f"{written['points']:g} of 100 points" in out and "probable cause: eps is missing" in out
    assert "More hints: --hints 3" in out
    assert sum(p["of"] for p in written["properties"]) == pytest.approx(100, abs=0.01)
    assert sum(p["points"] for p in written["properties"]) == pytest.approx(written["points"], abs=0.11)
    assert {hint["level"] for hint in written["hints"]} == {1, 2}


def test_full_points_are_exit_code_0_and_a_stub_gets_a_friendly_word(tmp_path, capsys, monkeypatch, sandbox):
    monkeypatch.setattr(classroom, "open_sandbox", lambda *_: contextlib.nullcontext(sandbox))
    path = tmp_path / "mine.py"
    path.write_text(NORM)
    assert run("grade", path, "--examples", 3) == 0
    assert "100 of 100 points" in capsys.readouterr().out
    path.write_text(stub(find_exercise("rms_norm")))
    assert run("grade", path, "--examples", 3) == 1
    assert "Nothing is written yet. Begin with rms_norm" in capsys.readouterr().out


def test_who_has_written_one_op_of_two_is_told_of_the_other(tmp_path, capsys, monkeypatch, sandbox):
    monkeypatch.setattr(classroom, "open_sandbox", lambda *_: contextlib.nullcontext(sandbox))
    path = tmp_path / "mine.py"
    write = 'raise NotImplementedError("write media_tokens")'
    assert write in (text := stub(find_exercise("projector")))
    path.write_text(text.replace(write, "return [h * w // 4 for _, h, w in grids]"))
    assert run("grade", path, "--examples", 3) == 1
    out = capsys.readouterr().out
    assert "media_tokens   all right" in out and "hint 1  project is not written yet" in out
    assert "Nothing is written" not in out and "More hints" not in out


def test_the_name_of_a_mistake_is_a_hint_of_its_own(grade):
    result = grade("rms_norm", NORM.replace(" + eps", ""))
    reports = {level: "\n".join(classroom._report(result, "mine.py", level)) for level in (1, 2)}
    assert "eps is missing" not in reports[1] and "known mistakes not avoided: 1 (names: --hints 2)" in reports[1]
    assert "avoids: eps is missing   made" in reports[2]


def test_the_exercise_is_what_the_file_says_or_what_it_defines():
    path = pathlib.Path("mine.py")
    assert classroom._exercise_of('EXERCISE = "moe"\ndef rms_norm(): 0', path).name == "moe"
    assert classroom._exercise_of("def swiglu(x):\n    return x", path).name == "moe"
    assert classroom._exercise_of("rms_norm = 1", path).name == "rms_norm"
    with pytest.raises(ClassroomError, match="defines no function of any exercise"):
        classroom._exercise_of("def other(): 0", path)


@pytest.mark.parametrize(
    "content, options, words",
    [
        (None, [], "cannot read"),
        (b"\xff\xfe\x00", [], "not a text file"),
        (b"x = 1", [], "no function of any exercise"),
        (b"x = 1", ["--exercise", "rmsnorm"], "did you mean rms_norm"),
        (b"rms_norm = 1", ["--seconds", "0"], "--seconds is 0.0"),
        (b"rms_norm = 1", ["--examples", "-1"], "--examples is -1"),
        (b"rms_norm = 1", ["--memory-mb", "0"], "--memory-mb is 0"),
    ],
)
def test_misuse_is_one_line(tmp_path, content, options, words):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        run("grade", path, *options)
