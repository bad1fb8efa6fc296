"""Traces for supervised fine-tuning: zero-vision, with its control arms — K2.5 report 2.2.

    python traces.py show --task count --seed 1 [--arm text+vision]      one trace as text
    python traces.py lengths                                             bytes and tokens by task

    collected = collect("zero-vision", 2000, tokenizer, pool, seed=0)
    documents = [encode(trace) for trace in collected.traces]            data.Encoded, for pack_rows

A trace is an episode of environment.py, answered by a script instead of a model: what the model will meet in reinforcement
learning, token for token, and only answers carry loss. Tools really run, on the really rendered picture. The judge decides:
what it does not pass is dropped and counted.

zero-vision    text only. The user asks about image.png, of which the context has the marks of a picture and nothing between
               them; a short Python program looks at it. (Without the marks, a model that meets them later is lost.)
text+vision    the picture stands in the context; half of the answers come from a program, half from looking
none           no traces: the policy of pre-training

In both arms `text` of the traces are text twins, answered from their words: chains with their reasoning, screens in words
by clicks. A program is written from the question alone, and the answer from what the program printed; only text twins,
clicks and looking use the truth.

Public names: Trace, Collected, ARMS, collect, make, encode, Script, scripts, Scribe, STYLES, reasoning, TraceError, main.
Tests: pytest tests/test_traces.py
"""

import argparse
import asyncio
import functools
import json
import random
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import tasks
from data import Encoded
from engine import Completion
from environment import Click, Environment, Python, Toolset
from interpreter import InterpreterPool
from pictures import COLOURS
from rollout import Conversation, Rollout
from template import ARGUMENT_BEGIN, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, TURN_END
from texts import EMBLEMS, FACTS, NAMES
from tokenizer import Tokenizer

ARMS = ("zero-vision", "text+vision", "none")


class TraceError(ValueError):
    """Traces that cannot be made; one line says why."""


# -------------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Script:
    """Programs to run one after the other, and the answer from what the last one printed."""

    calls: tuple
    answer: Callable = str.strip


OPEN = "a=np.asarray(Image.open('image.png'))\n"
INK = "m=a.min(2)<128\n"  # neither paper nor the rules of a chart
CROP = "b=m[m.any(1)][:,m.any(0)]\n"  # the one thing of a mask
IS = {"square": "b.all()", "circle": ".7<b.mean()<1", "triangle": "b[-1,0]>b[0,0]", "plus": "b.mean()+b[-1,0]<.7"}
SHAPE = "'plus triangle circle square'.split()[2*(b.mean()>.7)+b[-1,0]]"  # of the thing b: how full, and its lower left corner
CELLS = "[:54,:54].reshape(3,18,3,18).any((1,3)).sum()"  # of a mask: cells of the grid with something in them
REDS = {rgb[0]: name for name, rgb in COLOURS.items()}  # the red component tells the colours apart
NAMED = f"'{' '.join(REDS.values())}'.split()[[{','.join(map(str, REDS))}].index(%s)]"  # the name of a red component
QUARTERS = "for i in range(4):\n q=a[i//2*28:,i%2*28:][:28,:28];m=q.min(2)<128;" + CROP
GLYPHS = "g=o('image1.png')\n"
READ = (  # each leaves the writing in s; glyphs of a font are equal to the last bit
    "o=lambda f:[c.tobytes()for c in np.asarray(Image.open(f))[...,0].reshape(28,-1,14).swapaxes(0,1)]\n"
    + GLYPHS + "s=''.join(chr(32+g.index(c))for c in o('image.png'))\n",
    "o=lambda f:np.asarray(Image.open(f))[...,0].reshape(28,-1,14).swapaxes(0,1)\n"
    + GLYPHS + "s=''.join(chr(32+(g!=c).any((1,2)).argmin())for c in o('image.png'))\n",
)  # fmt: skip
READ_ROWS = (
    "def o(f):\n x=np.asarray(Image.open(f))[...,0]\n"
    " return[x[j:j+28,i:i+14].tobytes()for j in range(0,len(x),28)for i in range(0,x.shape[1],14)]\n"
    + GLYPHS + "s=''.join(chr(32+g.index(c))for c in o('image.png'))\n"
)  # fmt: skip
BOX, POINT = "print([int(99*v/55+.5)for v in(*p.min(0),*p.max(0))])", "print('(%d %d)'%(*(.9*(p.min(0)+p.max(0))+.5),))"
BOXES = {"box": BOX, "point": POINT}  # of the points p, each x y


def _rgb(colour):
    return str(list(COLOURS[colour])).replace(" ", "")


def _mask(asked):
    """The line that finds all ink, or that of the asked colour."""
    return f"m=(a=={_rgb(*asked)}).all(2)\n" if asked else INK


def _name(text):
    """The colour of a printed red component."""
    found = re.search(r"\d+", text)
    return REDS.get(int(found[0]), "") if found else ""


def _colour(task):
    most = "print(sorted(Image.open('image.png').getcolors())[-2][1][0])"  # after paper
    if task.asked in ((), ("largest",)):
        counts = "v,n=np.unique(a[a.min(2)<128][:,0],return_counts=True)\nprint(%s)"
        return [Script((most,), _name), Script((OPEN + counts % "v[n.argmax()]",), _name), Script((OPEN + counts % NAMED % "v[n.argmax()]",))]
    found, red = OPEN + QUARTERS + f" if b.size and {IS[task.asked[0]]}:print(", "q[m][0,0]"
    return [Script((f"{found}{red})",), _name), Script((f"{found}{NAMED % red})",))]


def _reading(after, answer=str.strip):
    return lambda task: [Script((read + after,), answer) for read in READ]


def _known(task, text):
    """What is known of the owner of an emblem, or of somebody by name."""
    name = text.strip() if task.name == "lookup" else next((n for n in NAMES if " ".join(EMBLEMS[n]) == " ".join(text.split())), "")
    return FACTS.get((name, task.asked[0]), "") if task.asked else name


def _emblem(task):
    know, thing = functools.partial(_known, task), OPEN + INK + CROP
    return [Script((thing + f"print({NAMED % 'a[m][0,0]'},{SHAPE})",), know),
            Script((thing + f"c={NAMED % 'a[m][0,0]'}\ns={SHAPE}\nprint(c,s)",), know)]  # fmt: skip


def _count(task):
    if len(task.asked) == 2:
        colour, test = _rgb(task.asked[0]), IS[task.asked[1]]
        cells = "for i in range(9):\n m=(a[i//3*18:,i%3*18:][:18,:18]=="
        grid = "for y in 0,18,36:\n for x in 0,18,36:\n  m=(a[y:y+18,x:x+18]=="
        return [Script((OPEN + "n=0\n" + cells + f"{colour}).all(2)\n {CROP} if b.size:n+={test}\nprint(n)",)),
                Script((OPEN + "n=0\n" + grid + f"{colour}).all(2)\n  {CROP}  if b.size:n+={test}\nprint(n)",))]  # fmt: skip
    look = OPEN + _mask(task.asked)
    pieces = "h=m[1:]&m[:-1]\nprint(m.sum()-h.sum()-(m[:,1:]&m[:,:-1]).sum()+(h[:,1:]&h[:,:-1]).sum())"  # Euler's number: no holes
    return [Script((look + f"print(m{CELLS})",)), Script((look + pieces,)),
            Script((OPEN + "print(np.unique(a.reshape(-1,3),axis=0))", look + f"print(m{CELLS})"))]  # fmt: skip


def _measure(task):
    if task.asked == ("area",):
        return [Script((OPEN + "print((a.min(2)<128).sum())",)), Script(("print(sorted(Image.open('image.png').getcolors())[0][0])",))]
    axis = ("width", "height").index(task.asked[0])
    return [Script((OPEN + INK + f"print(m.any({axis}).sum())",)),
            Script((OPEN + f"y,x=np.nonzero(a.min(2)<128)\nprint(np.ptp({'xy'[axis]})+1)",))]  # fmt: skip


def _place(task):
    look, write = OPEN + _mask(task.asked), BOXES[task.name]
    if task.difficulty < 3:
        return [Script((look + "p=np.argwhere(m)[:,::-1]\n" + write,)), Script((look + "p=np.stack(m.nonzero()[::-1],1)\n" + write,))]
    each = f"\n if len(p):{write}"  # quarter of the picture
    return [Script((look + "z=np.argwhere(m)[:,::-1]\nfor i in range(4):\n p=z[z//28@[1,2]==i]" + each,)),
            Script((look + "for i in 0,28:\n for j in 0,28:\n  p=np.argwhere(m[i:i+28,j:j+28])[:,::-1]+[j,i]" + each.replace("\n ", "\n  "),))]  # fmt: skip


def _chart(task):
    if task.asked[0] in ("highest", "lowest"):
        found = "v[n.argmax()]" if task.asked[0] == "highest" else "v[n.argmin()]"
        counts = OPEN + "v,n=np.unique(a[a.min(2)<128][:,0],return_counts=True)\n"
        return [Script((counts + f"print({found})",), _name), Script((counts + f"print({NAMED % found})",))]
    bars = [f"(a[...,0]=={COLOURS[colour][0]})" for colour in task.asked]
    return [Script((OPEN + f"print(({'|'.join(bars)}).sum()//100)",)),
            Script((OPEN + f"print({'+'.join(f'{bar}.any(1).sum()//10' for bar in bars)})",))]  # fmt: skip


def _table(task):
    place = lambda cell: 4 * "xy".index(cell[0]) + 5 + "abc".index(cell[1])  # noqa: E731 - in rows of four letters
    if len(task.asked) == 1:
        start = place(task.asked[0] + "a")
        ends = (f"print(sum(map(int,s[{start}:{start + 3}])))", f"print(eval('+'.join(s[{start}:{start + 3}])))")
    elif len(task.asked[0]) == 1:
        ends = (f"print(s[{place(''.join(task.asked))}])", f"i='xy'.index('{task.asked[0]}')\nprint(s[4*i+5:][{'abc'.index(task.asked[1])}])")
    else:
        first, second = map(place, task.asked)
        ends = (f"print(int(s[{first}])+int(s[{second}]))", f"print(sum(int(s[i])for i in({first},{second})))")
    return [Script((READ_ROWS + end,)) for end in ends]


def _sum(task):
    added = lambda text: str(sum(int(term) for term in re.findall(r"\d+", text)))  # noqa: E731
    return _reading("print(eval(s))")(task) + _reading("print(s)", added)(task)


def _price(task):
    listed = ",".join(f"({_rgb(colour)},{price})" for colour, price in task.asked)
    terms = "+".join(f"{price}*f({_rgb(colour)})" for colour, price in task.asked)
    return [Script((OPEN + f"t=0\nfor c,p in[{listed}]:t+=p*(a==c).all(2){CELLS}\nprint(t)",)),
            Script((OPEN + f"f=lambda c:(a==c).all(2){CELLS}\nprint({terms})",))]  # fmt: skip


def _sketch(task):
    lines = lambda text: text.strip().replace("\n", ";")  # noqa: E731
    one = "m=q.min(2)<128;" + CROP
    return [Script((OPEN + f"for i in range(16):\n q=a[i//4*14:,i%4*14:][:14,:14];{one} if b.size:print({SHAPE},{NAMED % 'q[6,6,0]'},i%4,i//4)",), lines),
            Script((OPEN + f"for y in range(4):\n for x in range(4):\n  q=a[14*y:14*y+14,14*x:14*x+14];{one}  if b.size:print({SHAPE},{NAMED % 'q[6,6,0]'},x,y)",), lines)]  # fmt: skip


_SCRIPTS = {
    "colour": _colour, "read": _reading("print(s)"), "emblem": _emblem, "count": _count, "measure": _measure, "box": _place,
    "lookup": lambda task: [Script((read + "print(s)",), functools.partial(_known, task)) for read in READ],
    "point": _place, "chart": _chart, "table": _table, "sum": _sum, "price": _price, "sketch": _sketch,
    "chain": lambda task: _reading("print(sum(map(int,s[1::2]))%10)")(task) + _reading("print(sum(int(c)for c in s if c.isdigit())%10)")(task),
    "program": _reading("exec(s)"), "sort": _reading("print(''.join(sorted(s)))"),
}  # fmt: skip


def scripts(task):
    """The Scripts that answer a vision task, all from its question (name, level, asked) alone. Returns a list, empty for
    tasks that no program answers."""
    return _SCRIPTS[task.name](task) if task.name in _SCRIPTS else []


# ------------------------------------------------------------------------------------------- reasoning


def _steps(task):
    """[(label, digit, sum so far)] of a chain."""
    found, total = [], 0
    for label, digit in task.words.split():  # a letter and a digit each
        total = (total + int(digit)) % 10
        found.append((label, int(digit), total))
    return found


def _terse(task):
    """`k3l1m6`: the sum so far behind each label, two bytes a number."""
    return "".join(f"{label}{total}" for label, _, total in _steps(task))


def _full(task):
    """`k3=3 l8=1 m5=6`: the number as well, five bytes each."""
    return " ".join(f"{label}{digit}={total}" for label, digit, total in _steps(task))


def _long(task):
    """`k3:0+3=3 l8:3+8=1 m5:1+5=6`: the whole addition, nine bytes each."""
    return " ".join(f"{label}{digit}:{(total - digit) % 10}+{digit}={total}" for label, digit, total in _steps(task))


STYLES = {"terse": _terse, "full": _full, "long": _long}


def reasoning(task, style):
    """What is thought before the answer to the text twin of a chain. style: a key of STYLES. Raises TraceError."""
    if style not in STYLES or task.name != "chain" or not task.words:
        raise TraceError(f"style {style!r} of task {task.name} over {task.modality}: only chains in words, in {', '.join(STYLES)}")
    return STYLES[style](task)


# -------------------------------------------------------------------------------------------- writing

# A writer yields (thought, content, [(tool, arguments), …]) for each answer and is sent what the tools returned, as text.


def _by_program(task, rng):
    script, seen = rng.choice(scripts(task)), ""
    for code in script.calls:
        seen = yield "", "", [("python", {"code": code})]
    yield "", script.answer(seen), []


def _by_clicks(task, rng):
    app, state, clicked = task.app, task.app.start, 0
    while (screen := app.screen(state)) is not None:
        if task.name == "menu":
            label = task.asked[clicked]
        else:
            shown, goal = (int(text) for text in (next(filter(str.isdigit, screen.labels)), task.asked[0]))
            label = "OK" if shown == goal else "+1" if shown < goal else "-1"
        x, y = map(int, re.findall(r"\d+", screen.point(screen.labels.index(label))))
        yield "", "", [("click", {"x": x, "y": y})]
        state, clicked = app.click(state, x, y), clicked + 1


def _by_heart(task, rng):
    thought = reasoning(task, rng.choice(list(STYLES))) if task.name == "chain" and task.words else ""
    yield thought, task.truth, []


class Scribe:
    """Stands in the place of a rollout's Handle, and lets a writer answer."""

    seed = "none: a script"

    def __init__(self, tokenizer, writer):
        self._tokenizer, self._writer, self._calls = tokenizer, writer, 0

    def conversation(self, tools=None, thinking=False, **options):
        """As Handle.conversation."""
        return Conversation(self._tokenizer, tools, thinking, **options)

    async def answer(self, talk, sampling=None):
        """The writer's next answer, in the template's form; its log-probs are not known."""
        talk.prompt()
        last = max((place for place, sampled in enumerate(talk.generated) if sampled), default=None)
        told = "" if last is None else self._tokenizer.decode(talk.ids[last + 1 :])
        seen = "\n".join(re.findall(r"## Return of \S+\n(.*?)<\|im_end\|>", told, re.DOTALL))
        thought, content, calls = next(self._writer) if last is None else self._writer.send(seen)
        text = f"{thought}</think>" if talk.thinking else ""
        text += content
        for number, (name, arguments) in enumerate(calls):
            written = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
            text += f"{'' if number else SECTION_BEGIN}{CALL_BEGIN}functions.{name}:{self._calls}{ARGUMENT_BEGIN}{written}{CALL_END}"
            self._calls += 1
        ids = self._tokenizer.encode(text + (SECTION_END if calls else "") + TURN_END, strict=True)
        return talk.answer(Completion(tuple(ids), (float("nan"),) * len(ids), (0,) * len(ids), "stop"))

    def rollout(self, talk, reward=0.0, valid=True, reason=""):
        """As Handle.rollout."""
        return talk.rollout(reward, valid)


@dataclass(frozen=True)
class Trace:
    """One verified conversation. Its log-probs are NaN: nobody sampled it."""

    task: tasks.Task
    rollout: Rollout


@dataclass(frozen=True)
class Collected:
    """Traces, and how many were not right and are not among them, by name of their task."""

    traces: tuple
    dropped: Counter


def encode(trace):
    """A Trace as data.Encoded: loss on the tokens of the answers, `<|im_end|>` and `</think>` included, and on no other."""
    rollout = trace.rollout
    return Encoded(rollout.ids, rollout.generated, rollout.items, f"{trace.task.name} trace", "vision" if rollout.items else "text")


def _writers(arm, task):
    """The ways in which an arm answers a task."""
    if task.app:
        return [_by_clicks]
    if task.modality == "text":
        return [_by_heart]
    return [_by_program] if arm == "zero-vision" else [_by_program, _by_heart]


def _environment(arm, pool, **options):
    """Where the traces of an arm are made: see is what the arms differ in."""
    if arm not in ARMS:
        raise TraceError(f"no arm {arm!r}: use one of {', '.join(ARMS)}")
    return Environment(Toolset(Python(pool), Click()), see=arm == "text+vision", **options)


async def make(arm, task, environment, tokenizer, rng):
    """Write one trace of a task. Returns Trace, or None when it is not right. Raises TraceError for what the arm has not."""
    if arm == "zero-vision" and task.app and task.modality == "vision":
        raise TraceError(f"task {task.name} over pictures has no trace without them: use its text twin")
    writer = rng.choice(_writers(arm, task))(task, rng)
    rollout = await environment.rollout(task, Scribe(tokenizer, writer), 0)
    return Trace(task, rollout) if rollout.valid and rollout.reward >= task.passing else None


def collect(arm, number, tokenizer, pool, seed=0, names=None, text=0.25, split="train", **options):
    """Write that many traces; those that are not right are left out and counted.

    arm: of ARMS; tokenizer: Tokenizer; pool: InterpreterPool; seed: int — trace i depends on (seed, i) alone, so arms have
    the same questions; names: of tasks, default all; text: share of text twins; split: of their contents; options: of
    Environment, diversity, seed and media say. Returns Collected. Raises TraceError.
    """
    environment = _environment(arm, pool, **options)
    unknown = [name for name in names or () if name not in tasks.TASKS]
    if unknown or not 0 <= text <= 1 or number < 0:
        raise TraceError(f"{number} traces of {', '.join(unknown) or 'all tasks'}, {text} of them text: check number, names and share")
    if arm == "none":
        return Collected((), Counter())

    async def one(index):
        rng = random.Random(f"{seed} {index}")
        modality = "text" if rng.random() < text else "vision"
        name = rng.choice(list(names or tasks.TASKS))
        if arm == "zero-vision" and tasks.TASKS[name].ability == "agentic":
            modality = "text"
        task = tasks.draw(rng, name, modality=modality, split=split)
        return task.name, await make(arm, task, environment, tokenizer, rng)

    async def every():
        return [result for start in range(0, number, 64) for result in await asyncio.gather(*map(one, range(start, min(start + 64, number))))]

    made = asyncio.run(every())
    return Collected(tuple(trace for _, trace in made if trace), Counter(name for name, trace in made if trace is None))


# ---------------------------------------------------------------------------------------- command line


def show(options):
    """Print a trace; what carries loss stands between ⟦ and ⟧."""
    tokenizer = Tokenizer()
    with InterpreterPool() as pool:
        environment, rng = _environment(options.arm, pool), random.Random(options.seed)
        task = tasks.draw(rng, options.task, modality=options.modality, difficulty=options.level)
        trace = asyncio.run(make(options.arm, task, environment, tokenizer, rng))
    if trace is None:
        print("dropped: the answer was not right")
        return
    flags, ids, text = trace.rollout.generated, trace.rollout.ids, ""
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or flags[end] != flags[start]:
            part = tokenizer.decode(ids[start:end])
            text += f"⟦{part}⟧" if flags[start] else part
            start = end
    print(re.sub(r"(<\|im_end\|>⟧?)", r"\1\n", re.sub(r"(<\|media_pad\|>)+", "<|media_pad|>…", text)).strip())
    print(f"\n{len(ids)} tokens, {sum(flags)} with loss, {len(tokenizer.decode(ids).encode())} bytes; truth {task.truth}")


def lengths(options):
    """Print how long traces are, and how many are dropped."""
    tokenizer = Tokenizer()
    with InterpreterPool() as pool:
        names = [options.task] if options.task else list(tasks.TASKS)
        print(f"{'task':9} {'traces':>6} {'dropped':>7}   tokens: median, most    with loss: median, most")
        for name in names:
            found = collect(options.arm, options.number, tokenizer, pool, options.seed, [name], text=0.0)
            total = [len(trace.rollout.ids) for trace in found.traces] or [0]
            loss = [sum(trace.rollout.generated) for trace in found.traces] or [0]
            print(f"{name:9} {len(found.traces):6} {found.dropped.total():7}   {statistics.median(total):14.0f} {max(total):5}"
                  f"   {statistics.median(loss):17.0f} {max(loss):5}")  # fmt: skip


def main(arguments=None):
    """`show` and `lengths`. Exit code 2 with one line on misuse."""
    parser = argparse.ArgumentParser(prog="traces.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, do, about in (("show", show, "print one trace"), ("lengths", lengths, "how long traces are")):
        command = commands.add_parser(name, help=about)
        command.add_argument("--arm", default="zero-vision", help=f"{', '.join(ARMS[:2])}")
        command.add_argument("--task", help="see python tasks.py list")
        command.add_argument("--seed", type=int, default=0)
        command.set_defaults(do=do)
        if name == "show":
            command.add_argument("--modality", choices=tasks.MODALITIES, default="vision")
            command.add_argument("--level", type=int)
        else:
            command.add_argument("--number", type=int, default=16, help="traces of each task")
    options = parser.parse_args(arguments)
    try:
        options.do(options)
    except (ValueError, OSError) as error:
        print(f"traces.py {options.command}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
