"""Exercises with the oracle's operations, and a grader for what students write.

    python oracle.py exercise --list                       the exercises in teaching order
    python oracle.py exercise moe --out my_moe.py          a stub from the live source: signature, formula, no body
    python oracle.py exercise moe --solution               the reference, as one file of its own
    python oracle.py grade my_moe.py [--hints 2]           points per property, 100 in all

Points of an op, in these parts, scaled so that an exercise has 100:

    1  shape and dtype                right form on every input
    1  contract                       raises nothing, leaves its arguments alone, answers the same twice
    6  values                         the share of inputs answered right, in each dtype
    3  gradients                      the same, where the op has gradients
    4  avoids known mistakes          for each Suspect: right on an input on which that mistake shows, or wrong there
                                      by exactly another one

The student's file runs in a sandbox without the reference; an attempt to import or read it is refused and said.

Public names: ClassroomError, Property, Grade, open_sandbox, grade_source, add_exercise_arguments, exercise,
add_grade_arguments, grade.
Tests: pytest tests/test_classroom.py
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import time
from dataclasses import dataclass
from fractions import Fraction

import hypothesis
import torch
from hypothesis import HealthCheck, Phase

from adapter import Outcome
from checkpoint import write_file
from conformance import OPS, Record, Unresponsive, diagnose, dtype_name, judge, twin
from exercises import EXERCISES, ROOT, find_exercise, solution, stub
from op import describe
from sandbox import Function, Limits, Sandbox

EXAMPLES = 25  # inputs per op and dtype
DTYPES = (torch.float32, torch.bfloat16)  # nobody is asked for float64: "in float32" is a fair reading of a report
BUDGET = 10  # calls of full length that one op may take, all its inputs together


class ClassroomError(ValueError):
    """A file that cannot be written or graded, or an option out of range; one line says which and why."""


# Grading


@dataclass(frozen=True)
class Property:
    """One line of a grade. weight: of all properties of the file; earned: share of it, 0 to 1; detail: in words."""

    op: str
    title: str
    weight: Fraction
    earned: Fraction
    detail: str = ""


@dataclass(frozen=True)
class Grade:
    """What a file is worth: properties, hints (level, text), notes that concern the whole file."""

    exercise: str
    properties: tuple[Property, ...]
    hints: tuple[tuple[int, str], ...]
    notes: tuple[str, ...]

    def points(self, parts=None):
        """Points of some properties, or of all: out of 100, and 100 only if everything is earned."""
        parts = self.properties if parts is None else parts
        return float(100 * sum(p.weight * p.earned for p in parts) / sum(p.weight for p in self.properties))

    def full(self, parts):
        """The points that these properties could give."""
        return float(100 * sum(p.weight for p in parts) / sum(p.weight for p in self.properties))


@dataclass(frozen=True)
class _Answer:
    """One input put to the student: what was wrong with the answer (None: nothing), and whether it was answered."""

    dtype: torch.dtype
    arguments: dict
    record: Record | None
    complaint: str = ""

    @property
    def level(self):
        """2 all right, 1 values right and gradients wrong, 0 wrong."""
        if self.complaint:
            return 0
        return 2 if self.record is None else int(self.record.difference.what.startswith("gradient"))


def open_sandbox(seconds=10.0, memory_mb=2048):
    """A Sandbox in which the adapter is defined and the project cannot be reached."""
    trusted = {
        "adapter": (ROOT / "adapter.py").read_text(encoding="utf-8"),
        "rehearsal": "import adapter\nwith adapter.poisoned():\n    pass\n",  # what it imports late takes seconds
    }
    banned = [path.stem for path in ROOT.glob("*.py")] + ["transformers"]
    limits = Limits(seconds=seconds, memory_mb=memory_mb)
    return Sandbox(limits, preload=("torch", "numpy"), trusted=trusted, hidden=(ROOT,), banned=banned)


class _Student:
    """The caller of one op of the student's file, in the sandbox; ends the op when time is up."""

    def __init__(self, sandbox):
        self.sandbox = sandbox
        self.attempts = {}  # what the file tried to reach of the reference
        self.deadline = time.monotonic() + BUDGET * sandbox.limits.seconds

    def __call__(self, op, arguments, cotangents=None, wanted=()):
        if time.monotonic() > self.deadline:
            seconds = BUDGET * self.sandbox.limits.seconds
            raise Unresponsive(Outcome({}, {}, f"is too slow: its inputs took over {seconds:g} s together"))
        function = Function("student", op.name)
        reply = self.sandbox.call("adapter", "run", function, arguments, op.outputs, wanted, cotangents)
        self.attempts |= dict.fromkeys(reply.reference)
        if reply.status in ("timeout", "memory", "died", "protocol"):
            raise Unresponsive(Outcome({}, {}, self._limits(reply.message)))
        if reply.status == "error":
            return Outcome({}, {}, f"its answer is refused: {reply.message}")
        outcome = self._outcome(op, reply.value, wanted, cotangents)
        if reply.reference and outcome.complaint:
            return Outcome({}, {}, f"reaches for the reference ({reply.reference[0]}), which is refused")
        return outcome

    def _outcome(self, op, value, wanted, cotangents):
        """The reply as an Outcome; the child is not trusted, so that its form is checked."""
        try:
            outcome = Outcome(dict(value["outputs"]), dict(value["gradients"]), str(value["complaint"]))
            if outcome.complaint:
                return Outcome({}, {}, self._limits(outcome.complaint))
            if wanted and cotangents and not outcome.gradients:
                outcome = Outcome(outcome.outputs, dict.fromkeys(wanted))  # no graph at all: no gradient arrives
            assert set(outcome.outputs) == set(op.outputs) and set(outcome.gradients) in (set(), set(wanted))
        except Exception:
            return Outcome({}, {}, "its answer has not the form that the grader expects")
        return outcome

    def _limits(self, complaint):
        if "allocate" in complaint or "MemoryError" in complaint or "needs more memory" in complaint:
            return f"needs more memory than the {self.sandbox.limits.memory_mb} MB allowed"
        return complaint


def _dtypes(op):
    return [dtype for dtype in op.dtypes if dtype in DTYPES] or list(op.dtypes[:1])


def _draw(op, count, seed):
    """`count` inputs of an op, the same for the same seed, the simplest first."""
    drawn = []

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, phases=(Phase.generate,), database=None, deadline=None, derandomize=False,
                         suppress_health_check=list(HealthCheck))  # fmt: skip
    @hypothesis.given(op.cases)
    def collect(arguments):
        drawn.append(arguments)

    collect()
    return drawn


def _answers(op, student, examples, seed):
    """Put inputs in every dtype to the student; after one that hangs or an op that is not written, ask no more."""
    inputs = [(dtype, arguments) for dtype in _dtypes(op) for arguments in _draw(op, examples, seed)]
    answers, stopped = [], ""
    for dtype, arguments in inputs:
        record = None
        if not stopped:
            try:
                record = judge(op, student, arguments, dtype)
            except Unresponsive as ended:
                stopped = ended.outcome.complaint
            if record and "NotImplementedError" in record.outcome.complaint:
                stopped = "is not written yet"
        answers.append(_Answer(dtype, arguments, record, stopped))
    return answers


def _properties(op, answers, suspect):
    """The Properties of one op. suspect: name of the diagnosed mistake, or ""."""

    def add(title, weight, earned, detail=""):
        found.append(Property(op.name, title, Fraction(weight), Fraction(earned), detail))

    found, differences = [], [a.record.difference for a in answers if a.record]
    silent = any(a.complaint for a in answers)
    broken = [d for d in differences if d.kind == "contract"]
    forms = ("shape", "dtype", "type", "missing")
    misshapen = [d for d in differences if d.kind in forms and not d.what.startswith("gradient")]
    add("shape and dtype", 1, not (silent or broken or misshapen), misshapen[0].words if misshapen else "")
    add("contract: raises nothing, leaves its arguments alone, answers the same twice", 1, not (silent or broken))
    for dtype in _dtypes(op):
        mine = [a for a in answers if a.dtype == dtype]
        right = sum(a.level > 0 for a in mine)
        title = f"values in {dtype_name(dtype)}" if len(_dtypes(op)) > 1 else "values"
        add(title, Fraction(6, len(_dtypes(op))), Fraction(right, len(mine)), _share(right, mine))
    if op.differentiable:
        right = sum(a.level == 2 for a in answers)
        add("gradients of " + ", ".join(op.differentiable), 3, Fraction(right, len(answers)), _share(right, answers))
    ruled_out = _ruled_out(op, answers, suspect)
    for known in op.suspects:
        detail = "made" if suspect == known.name else "not ruled out"
        title = f"avoids: {known.cause}"
        add(title, Fraction(4, len(op.suspects)), known.name in ruled_out, detail)
    return found


def _share(right, answers):
    asked = any(answer.arguments for answer in answers)
    return f"right on {right} of {len(answers)} inputs" if asked else ""


def _ruled_out(op, answers, diagnosed):
    """Names of the known mistakes that the student does not make. diagnosed: name of the one that is made, or "".

    An input shows it on which the mistake gives something wrong and the student either is right or is wrong by
    exactly the diagnosed mistake and not by this one.
    """
    if all(answer.level == 2 for answer in answers):
        return {suspect.name for suspect in op.suspects}
    open_ones = {suspect.name: suspect for suspect in op.suspects}
    made = open_ones.get(diagnosed)
    for answer in answers:
        explained = not answer.complaint and answer.level < 2 and made and _is_same(op, made, answer)
        if answer.level == 0 and not explained:
            continue
        for name, suspect in list(open_ones.items()):
            level = _level(op, suspect, answer)
            if level < answer.level or (explained and level < 2 and not _is_same(op, suspect, answer)):
                del open_ones[name]
    return {suspect.name for suspect in op.suspects} - set(open_ones)


def _level(op, suspect, answer):
    """The level that a known mistake reaches on an input."""
    return _Answer(answer.dtype, answer.arguments, judge(op, twin(suspect.wrong), answer.arguments, answer.dtype)).level


def _is_same(op, suspect, answer):
    """Whether a wrong answer is the one that this mistake gives, right if the mistake were the reference."""
    replay = lambda *_: answer.record.outcome  # noqa: E731
    wrong = functools.wraps(op.reference)(lambda *arguments: suspect.wrong(*arguments))  # keeps the arguments' names
    try:
        return judge(dataclasses.replace(op, reference=wrong), replay, answer.arguments, answer.dtype) is None
    except Exception:  # the mistake is one that raises
        return False


def _size(answer):
    """How large an input is, numbers in all."""
    return sum(v.numel() if isinstance(v, torch.Tensor) else len(str(v)) for v in answer.arguments.values())


def _hints(op, answers):
    """Hints on one op as (level, text), from the smallest input that went wrong; and the name of the mistake."""
    stopped = next((a.complaint for a in answers if a.complaint), "")
    if stopped:
        return [(1, f"{op.name} {stopped}")], ""
    wrong = sorted((a for a in answers if a.record), key=lambda a: (a.level, _dtypes(op).index(a.dtype), _size(a)))
    if not wrong:
        return [], ""
    record = wrong[0].record
    suspect, cause = diagnose(op, [a.record for a in wrong[7::-1]])  # the smallest comes last
    shapes = [f"{n} ({','.join(map(str, v.shape))})" for n, v in record.arguments.items() if isinstance(v, torch.Tensor)]
    hints = [
        (1, f"{op.name}: {_symptom(op, wrong, answers)}" + (f"; smallest input: {', '.join(shapes)}" if shapes else "")),
        (2, f"{op.name}: probable cause: {cause}"),
        (3, f"{op.name}: {record.difference.words}"),
        *[(3, f"    {line}") for line in describe(record.arguments)],
    ]
    return hints, suspect


def _symptom(op, wrong, answers):
    """What is wrong, as coarse as can be. wrong: the answers that are, the smallest first."""
    difference = wrong[0].record.difference
    if difference.kind in ("contract", "shape", "dtype", "type", "missing"):
        return difference.words
    if difference.what.startswith("gradient"):
        return f"the values are right and the {difference.what} is not"
    values = [a for a in wrong if a.level == 0]
    words = f"the values differ on {len(values)} of {len(answers)} inputs"
    right = [dtype_name(dtype) for dtype in _dtypes(op) if dtype not in {a.dtype for a in values}]
    return words + (f", though never in {' or '.join(right)}" if right else "")


def grade_source(text, filename, exercise, sandbox, examples=EXAMPLES, seed=0):
    """Grade the text of a student's file.

    text, filename: str; exercise: Exercise; sandbox: of open_sandbox; examples: inputs per op and dtype; seed: int.
    Returns Grade. The file is loaded into the sandbox; nothing of it runs here.
    """
    reply = sandbox.load("student", text, filename)
    attempts, hints, properties = dict.fromkeys(reply.reference), [], []
    notes = []
    if reply.status != "ok":
        where = filename + (f", line {reply.line}" if reply.line else "")
        reason = f"reaches for the reference ({reply.reference[0]}), which is refused" if reply.reference else reply.message
        notes.append(f"{where}: cannot be imported: {reason}")
    for name in exercise.ops:
        op, student = OPS[name], _Student(sandbox)
        if reply.status != "ok" or name not in reply.value:
            missing = "" if reply.status != "ok" else "is not defined"
            answers = [_Answer(dtype, {}, None, missing or "cannot be imported") for dtype in _dtypes(op)]
            found, suspect = ([(1, f"{name} {missing}")] if missing else []), ""
        else:
            answers = _answers(op, student, examples, seed)
            found, suspect = _hints(op, answers)
        properties += _properties(op, answers, suspect)
        hints += found
        attempts |= student.attempts
    if attempts and reply.status == "ok":
        notes.append(f"{filename} tries to reach the reference ({', '.join(attempts)}): refused; it is graded without")
    if any(not text.endswith("is not written yet") for _, text in hints):
        hints += [(level, f"about {exercise.name}: {hint}") for level, hint in enumerate(exercise.hints, 1)]
    return Grade(exercise.name, tuple(properties), tuple(hints), tuple(notes))


# The command line


def add_exercise_arguments(parser):
    """The arguments of `oracle.py exercise`."""
    parser.add_argument("name", nargs="?", help="an exercise; without one, all are listed")
    parser.add_argument("--list", action="store_true", help="list the exercises in teaching order")
    parser.add_argument("--out", help="write the stub to this file instead of printing it")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    parser.add_argument("--solution", action="store_true", help="the reference instead of the stub")


def exercise(options):
    """`oracle.py exercise`: list the exercises, or write a stub. Returns 0. Raises ClassroomError."""
    if options.list or options.name is None:
        if options.out:
            raise ClassroomError("--out needs the name of an exercise; see python oracle.py exercise --list")
        print("\n".join(_listing()))
        return 0
    chosen = find_exercise(options.name)
    out = pathlib.Path(options.out) if options.out else None
    text = solution(chosen) if options.solution else stub(chosen, out.name if out else f"my_{chosen.name}.py")
    if out is None:
        print(text, end="")
        return 0
    if out.exists() and not options.force:
        raise ClassroomError(f"{out} exists already: choose another name, or --force to lose what is in it")
    try:
        write_file(out, text)
    except OSError as error:
        raise ClassroomError(f"cannot write {out}: {error.strerror}") from None
    print(f"{out}: {chosen.title}, about {chosen.minutes} minutes. Then: python oracle.py grade {out}")
    return 0


def _listing():
    for number, e in enumerate(EXERCISES, 1):
        yield f"{number:>2}  {e.name:<14} {e.minutes:>3} min  {e.title} ({', '.join(e.ops)})"
    hours = sum(e.minutes for e in EXERCISES) / 60
    yield f"{len(EXERCISES)} exercises, about {hours:.0f} hours, each on its own: oracle.py exercise NAME --out my_NAME.py"


def add_grade_arguments(parser):
    """The arguments of `oracle.py grade`."""
    parser.add_argument("file", help="a filled-in stub")
    parser.add_argument("--exercise", help="which exercise it is; default: what its EXERCISE says")
    parser.add_argument("--hints", type=int, choices=(1, 2, 3), default=1, help="1 coarse, 2 the cause, 3 the numbers")
    parser.add_argument("--json", help="also write the grade to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="inputs per op and dtype")
    parser.add_argument("--seconds", type=float, default=10.0, help="wall time of one call")
    parser.add_argument("--memory-mb", type=int, default=2048, help="memory beyond Python and torch")


def grade(options):
    """`oracle.py grade`: print and write the grade. Returns 0 for full points, else 1. Raises ClassroomError."""
    for name in ("examples", "seconds", "memory_mb"):
        value = getattr(options, name)
        if not (math.isfinite(value) and value > 0):
            raise ClassroomError(f"--{name.replace('_', '-')} is {value}: give a positive number")
    path = pathlib.Path(options.file)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ClassroomError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ClassroomError(f"{path} is not a text file in UTF-8") from None
    chosen = find_exercise(options.exercise) if options.exercise else _exercise_of(text, path)
    with open_sandbox(options.seconds, options.memory_mb) as sandbox:
        result = grade_source(text, path.name, chosen, sandbox, options.examples, options.seed)
        limits = list(sandbox.notes)
    print("\n".join(_report(result, path, options.hints)))
    for limit in limits:
        print(f"note: {limit}")
    if options.json:
        try:
            write_file(options.json, json.dumps(_as_json(result, path, options, limits), indent=1) + "\n")
        except OSError as error:
            raise ClassroomError(f"cannot write {options.json}: {error.strerror}") from None
    return 0 if result.points() == 100 else 1


def _exercise_of(text, path):
    """The exercise that a file says it is, else the one of whose ops it defines most."""
    said = re.search(r"^EXERCISE *= *[\"'](.*)[\"']", text, re.MULTILINE)
    if said:
        return find_exercise(said[1])
    defined = set(re.findall(r"^(?:def +)?(\w+) *[(=]", text, re.MULTILINE))
    best = max(EXERCISES, key=lambda e: len(defined & set(e.ops)) / len(e.ops))
    if not defined & set(best.ops):
        raise ClassroomError(f"{path} defines no function of any exercise; see python oracle.py exercise --list")
    return best


def _is_hidden(part, level):
    """Of a mistake that was made the name is itself a hint: shown from level 2 on."""
    return part.title.startswith("avoids: ") and not part.earned and level < 2


def _report(result, path, level):
    """The grade as lines of text. Of an op with no points, or with all, there is one line."""
    yield f"{path}: {find_exercise(result.exercise).title}"
    yield from result.notes
    for name in find_exercise(result.exercise).ops:
        parts = [part for part in result.properties if part.op == name]
        avoided = sum(part.title.startswith("avoids: ") for part in parts)
        perfect = all(part.earned == 1 for part in parts)
        yield _line("", result, parts, f"{name}   all right, {avoided} known mistakes avoided" if perfect else name)
        if any(part.earned for part in parts) and not perfect:
            hidden = [part for part in parts if _is_hidden(part, level)]
            for part in parts:
                if part not in hidden:
                    detail = f"   {part.detail}" if part.detail and part.earned < 1 else ""
                    yield _line("    ", result, [part], part.title + detail)
            if hidden:
                yield _line("    ", result, hidden, f"known mistakes not avoided: {len(hidden)} (names: --hints 2)")
    yield f"{_round(result.points()):g} of 100 points"
    if result.hints and all(text.endswith("is not written yet") for _, text in result.hints) and not result.points():
        yield f"Nothing is written yet. Begin with {result.properties[0].op}: its docstring holds the formula."
        return
    for hint_level, text in result.hints:
        if hint_level <= level:
            yield f"hint {hint_level}  {text}"
    if any(hint_level > level for hint_level, _ in result.hints):
        yield f"More hints: --hints {level + 1}"


def _line(indent, result, parts, words):
    earned, full = result.points(parts), result.full(parts)
    mark = "ok" if earned == full else ("--" if earned == 0 else "~ ")
    return f"{indent}{mark} {earned:5.1f} / {full:5.1f}   {words}"


def _round(points):
    """To a tenth, downward, so that 100 means 100."""
    return math.floor(points * 10) / 10


def _as_json(result, path, options, limits):
    hidden = "avoids a known mistake (its name: --hints 2)"
    return {
        "file": path.name, "exercise": result.exercise, "points": _round(result.points()), "of": 100,
        "seed": options.seed, "examples": options.examples, "notes": list(result.notes), "limits_not_binding": limits,
        "properties": [
            {"op": p.op, "property": hidden if _is_hidden(p, options.hints) else p.title, "detail": p.detail,
             "points": round(result.points([p]), 3), "of": round(result.full([p]), 3)}
            for p in result.properties
        ],
        "hints": [{"level": level, "text": text} for level, text in result.hints if level <= options.hints],
    }  # fmt: skip
