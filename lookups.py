"""A small world of pages to look things up in: questions, scripted agents, and a vocabulary of its words — for PARL, K2.5 report 3.

    question = draw(random.Random(0), "wide", rows=4)
    question.text            "table of colour for a27, b31, c90, d12"
    question.pages           {"p17.md": "a27\\ncity rome\\ncolour red\\nfriend s31", "p52.md": "old a27\\n…", …}
    question.truth           {("a27", "colour", "red"), …}: items as critical.table_items reads them off an answer

Every question has pages of its own, so that nothing can be known without looking. To look up an attribute of somebody takes a
search, which also finds outdated pages and pages of friends, and reading the right page. Kinds of questions (the report's:
wide search, deep search, long documents, batch download):

    wide       one or two attributes of several persons
    deep       an attribute of the friend of each: two look-ups, one after the other, for every row
    document   a mark from every part of a long document: each part is read under its name
    download   a code from several files, of which some have moved
    single     one attribute of one person        } with so few steps that
    chain      that of the friend of one person   } only serial work ends in time

No question says how to work. Rows are named a…, b…, c… with a number, so that a small model can find its place; p is for
pages. One name in three is held out: its letter and its number are both known from training, but never together.

`serial`, `careless`, `planned` and `aimless` answer as a swarm's orchestrator would, `look_up` as its subagents, each by a script: a
generator of what traces.Scribe writes, and `scripted` makes it a policy. The first two make the orchestrator's cold start, `handful` and
`obedient` are practice, and the others are bounds.

Public names: Question, QuestionError, KINDS, ALONE, STEPS, LOOSE, SYSTEM, WORKER, ROLE, STEP_LEFT, held_out, draw, pool, table, serial, careless,
handful, obedient, planned, aimless, look_up, completed, scripted, ScriptedSubagents, dictated, single_lookup, findings, vocabulary, merges.
Tests: pytest tests/test_lookups.py
"""

import base64
import functools
import itertools
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field

from checkpoint import write_file
from critical import item_f1, table_items
from policies import Local
from tokenizer import Tokenizer
from traces import Scribe

KINDS = ("wide", "deep", "document", "download", "single", "chain")
ALONE = ("single", "chain")  # of one row, for serial work
HOPS = ("deep", "chain")  # that ask for a friend first
FILES = ("document", "download")
VALUES = {
    "colour": ("red", "blue", "green", "pink", "gold", "grey"), "city": ("rome", "oslo", "lima", "cairo", "paris", "delhi"),
    "food": ("rice", "bread", "soup", "corn", "eggs", "fish"), "pet": ("cat", "dog", "owl", "fox", "hen", "bee"),
    "mark": ("oak", "elm", "fir", "ash", "bay", "yew"), "code": ("iron", "zinc", "lead", "tin", "coal", "salt"),
}  # fmt: skip
ATTRIBUTES = ("colour", "city", "food", "pet")  # of persons
NUMBERS, ROWS, OTHERS = range(10, 100), "abcdefghijkl", "mnoqrstuvwxyz"  # letters of rows, and of everybody else
SYSTEM = "answer with a table"  # what the orchestrator is told first
WORKER, ROLE = "worker", "look things up"  # the kind of subagent that scripts create
STEPS = {"wide": 5, "deep": 9, "document": 4, "download": 5, "single": 4, "chain": 6}  # what the better way to work needs
LOOSE = STEPS | {"wide": 6, "deep": 10, "document": 5}  # and a little more
STEP_LEFT = "[One step is left"  # how the runtime asks for the answer


class QuestionError(ValueError):
    """A question that cannot be; one line says why."""


# -------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """A question with its pages, its true items, and the critical steps that it allows."""

    kind: str
    text: str
    pages: dict = field(repr=False)  # name → text
    truth: frozenset  # of (row, column, value)
    rows: tuple  # names
    columns: tuple
    steps: int  # budget of critical steps
    key: str  # what was drawn, for telling contents apart
    passing: float = 1.0  # item-F1 from which on it counts as right

    def score(self, answer):
        """r_perf: item-F1 of an answer's table. The names of the rows, which the question says, count for nothing."""
        return item_f1({item for item in table_items(answer) if item[1] != "name"}, self.truth)

    def values(self):
        """The truth as {(row, column): value}."""
        return {(row, column): value for row, column, value in self.truth}

    @property
    def name(self):
        """Its kind: as tasks.Task."""
        return self.kind


def held_out(name):
    """Whether a name, its letter and number together, is kept for held-out questions: one in three is."""
    return (ord(name[0]) + int(name[1:])) % 3 == 0


def _names(rng, rows, others, split):
    """(names of the rows, names of others) of a split, all with different numbers."""
    names, free = [], list(NUMBERS)
    for letters in [*ROWS[:rows], *[OTHERS] * others]:
        names.append(rng.choice([f"{a}{n}" for a in letters for n in free if held_out(f"{a}{n}") == (split == "heldout")]))
        free.remove(int(names[-1][1:]))
    return names[:rows], names[rows:]


def _person(rng, name, friend, known):
    """A page about somebody: the title, then what is known, in any order."""
    lines = [f"{what} {value}" for what, value in known.items()] + [f"friend {friend}"]
    return "\n".join([name, *rng.sample(lines, len(lines))])


def draw(rng, kind, rows=None, split="train", steps=None):
    """A Question. rng: random.Random; rows: int, default 5 to 7, 1 for single and chain; split: "train" | "heldout"; steps: the budget of
    critical steps, default STEPS. Raises QuestionError."""
    if kind not in KINDS or split not in ("train", "heldout"):
        raise QuestionError(f"kind {kind!r}, split {split!r}: one of {', '.join(KINDS)}; train or heldout")
    alone = kind in ALONE
    rows = rows or (1 if alone else rng.randint(5, 7))
    if alone and rows != 1 or not 1 <= rows <= 12:
        raise QuestionError(f"{rows} rows of kind {kind}: 1 to 12, and 1 for single and chain")
    if kind in FILES:
        names, columns, pages, values = _files(rng, kind, rows, split)
    else:
        names, columns, pages, values = _people(rng, kind, rows, split)
    about = f"{columns[0]} of friend" if kind in HOPS else ", ".join(columns)
    text = f"table of {about} for {', '.join(names)}"
    pages = {f"{name}.md": page for name, page in sorted(pages.items(), key=lambda _: rng.random())}
    truth = frozenset((name, column, values[name, column]) for name in names for column in columns)
    return Question(kind, text, pages, truth, tuple(names), tuple(columns), steps or STEPS[kind], f"{kind} {text}")


def _people(rng, kind, rows, split):
    """Persons, their friends, outdated pages, and a stranger."""
    hops = kind in HOPS
    asked, more = _names(rng, rows, rows * hops + 2, split)
    others, bystander, stranger = more[: rows * hops], more[-2], more[-1]
    columns = rng.sample(ATTRIBUTES, 2 if kind == "wide" and rows <= 3 and rng.random() < 0.5 else 1)
    taken = {name[1:] for name in (*asked, *more)}
    free = [n for n in NUMBERS if str(n) not in taken]
    numbers, pages, values = iter(rng.sample(free, len(free))), {}, {}
    known = lambda: {what: rng.choice(VALUES[what]) for what in dict.fromkeys([*columns, *rng.sample(ATTRIBUTES, 2)])}  # noqa: E731
    for place, name in enumerate([*asked, *others, bystander]):
        facts = known()
        friend = others[place] if hops and place < rows else rng.choice([*asked, *others, bystander])
        pages[f"p{next(numbers)}"] = _person(rng, name, friend if friend != name else stranger, facts)
        if rng.random() < 0.5:
            pages[f"p{next(numbers)}"] = _person(rng, f"old {name}", stranger, known())
        for column in columns:
            if name in asked and not hops:
                values[name, column] = facts[column]
            elif hops and name in others:
                values[asked[others.index(name)], column] = facts[column]
    return asked, columns, pages, values


def _files(rng, kind, rows, split):
    """Parts of a document; or files, some of which say where they have gone."""
    column = "mark" if kind == "document" else "code"
    names, elsewhere = _names(rng, rows, rows, split)
    pages, values = {}, {}
    for name, other in zip(names, elsewhere):
        value = values[name, column] = rng.choice(VALUES[column])
        lines = rng.sample([f"{column} {value}", f"note {rng.choice(VALUES['city'])}"], 2)
        where = other if kind == "download" and rng.random() < 0.4 else name
        if where != name:
            pages[name] = f"{name}\nmoved {where}"
        pages[where] = "\n".join([where, *lines])
    return names, [column], pages, values


def pool(number, seed, kinds=KINDS, split="train", rows=None):
    """So many questions, the kinds in turn, each drawn with a seed of its own. rows: of those that may have several."""
    each = ((n, kinds[n % len(kinds)]) for n in range(number))
    return [draw(random.Random(f"{seed} {split} {n}"), kind, None if kind in ALONE else rows, split) for n, kind in each]


# ------------------------------------------------------------------------------------- scripted agents

# Each yields ("", content, [(tool, arguments), …]) and is sent what the tools returned, as text: see traces.Scribe.


def _page_of(name, found):
    """The page that a search found for a name: the one whose best line is the name itself."""
    hit = re.search(rf"^(p\d+\.md) \([\d.]+\): {re.escape(name)}$", found, re.MULTILINE)
    return hit[1] if hit else None


def _value(what, page):
    hit = re.search(rf"^{what} (\S+)$", page, re.MULTILINE)
    return hit[1] if hit else None


def _read(name, what, pages, lines):
    """A look-up by the agent itself: a generator of its calls. Returns (the value or None, whether time is up).

    pages: {name: text}, of what was read before; lines: what is to be said with the next call, emptied then."""
    where = f"{name}.md"
    if name in pages:
        return _value(what, pages[name]), False
    if what not in ("mark", "code"):  # files stand under their names
        seen = yield "", _said(lines), [("search", {"query": name})]
        where = _page_of(name, seen)
        if STEP_LEFT in seen or where is None:
            return None, STEP_LEFT in seen
    seen = yield "", _said(lines), [("browse", {"page": where})]
    if (moved := _value("moved", seen)) and STEP_LEFT not in seen:
        seen = yield "", "", [("browse", {"page": f"{moved}.md"})]
    pages[name] = seen
    return _value(what, seen), STEP_LEFT in seen


def _said(lines):
    """The lines as one text; none are left."""
    text = "\n".join(lines)
    lines.clear()
    return text


def table(question, values):
    """The final answer: what is known of {(row, column): value}, a Markdown table. Rows of which nothing is known are left out."""
    lines = [f"| name | {' | '.join(question.columns)} |", "|" + " - |" * (1 + len(question.columns))]
    for row in question.rows:
        cells = [values.get((row, column)) or "" for column in question.columns]
        if any(cells):
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _steps_of(question):
    """The look-ups that a question needs: for each (row, column) the attributes to follow, such as ("friend", "colour")."""
    before = ("friend",) if question.kind in HOPS else ()
    return {(row, column): (*before, column) for row in question.rows for column in question.columns}


def serial(question, rng=None, values=None):
    """One agent that looks everything up by itself, in order. It says which row comes next and notes what it found. values: what is
    known already."""
    values, pages, lines, late = dict(values or {}), {}, [], False
    for (row, column), path in _steps_of(question).items():
        if late or (row, column) in values:
            continue
        name = row
        for what in path:
            lines += [row] if name == row and row not in pages else []
            found, late = yield from _read(name, what, pages, lines)
            lines += [f"{name} {what} {found}"] if found else []
            name = None if late and what != path[-1] else found
            if name is None:
                break
        values[row, column] = name
    yield "", "\n".join([*lines, table(question, values)]), []


def _given(subtasks, create=True):
    """The calls that give subtasks away."""
    made = [("create_subagent", {"name": WORKER, "system_prompt": ROLE})] if create else []
    return made + [("assign_task", {"agent": WORKER, "prompt": prompt}) for prompt in subtasks]


def _told(seen):
    """What subagents said: {(name, attribute): value}."""
    return {(name, what): value for name, what, value in re.findall(r"^(\w+) (\w+) (\w+)$", seen, re.MULTILINE) if value != "unknown"}


def careless(question, rng):
    """Bad delegation, as a cold start shows it: a piece of the work, the same thing twice, the whole question, half of the rows at most
    and some of them for what is not asked, or nobody there to do it. Then an answer from what is known, or the work itself."""
    wanted = "friend" if question.kind in HOPS else rng.choice(question.columns)
    asked, some = f"{rng.choice(question.rows)} {wanted}", rng.sample(question.rows, max(1, len(question.rows) // 2))
    scattered = [f"{row} {rng.choice((wanted, wanted, wanted, rng.choice(ATTRIBUTES)))}" for row in some]
    given = rng.choice(([asked], [asked] * rng.randint(2, 4), [question.text], *[scattered] * 3))
    seen = yield "", "", _given(given, create=rng.random() < 0.9)
    known = {key: value for key, value in _told(seen).items() if key[1] in question.columns and question.kind not in HOPS}
    if STEP_LEFT in seen or rng.random() < 0.5:
        yield "", table(question, known), []
    else:
        yield from serial(question, rng, known)


def handful(question, rng):
    """Some look-ups of a question and some that are not asked for, given away in any order, of friends in a second stage; then an
    answer from what is known, or the rest of the work."""
    hops, column = question.kind in HOPS, rng.choice(question.columns)
    names = rng.sample(question.rows, rng.randint(1, len(question.rows)))
    beside = [f"{rng.choice(question.rows)} {rng.choice(ATTRIBUTES)}" for _ in range(rng.randint(0, 2))]
    given = [f"{name} {'friend' if hops else column}" for name in names] + beside
    seen = yield "", "", _given(rng.sample(given, len(given)))
    told = _told(seen)
    if hops and STEP_LEFT not in seen and (friends := {name: told[name, "friend"] for name in names if (name, "friend") in told}):
        seen = yield "", "", _given([f"{friend} {column}" for friend in friends.values()], create=False)
        told = {(name, column): value for name, friend in friends.items() if (value := _told(seen).get((friend, column)))}
    known = {key: value for key, value in told.items() if key[0] in question.rows and key[1] in question.columns}
    if STEP_LEFT in seen or rng.random() < 0.5:
        yield "", table(question, known), []
    else:
        yield from serial(question, rng, known)


def obedient(prompts):
    """Subtasks given away as told, and their results as a list: how the tools are used, not when."""
    seen = yield "", "", _given(prompts)
    told = _told(seen)
    yield "", "\n".join(f"{prompt} {told.get(tuple(prompt.split()), 'unknown')}" for prompt in prompts), []


def planned(question, rng=None):
    """The best schedule: all look-ups side by side, one stage for every hop; alone where that takes fewer steps."""
    if question.kind in ALONE:
        yield from serial(question)
        return
    paths, names = _steps_of(question), {key: key[0] for key in _steps_of(question)}
    for hop in range(len(next(iter(paths.values())))):
        wanted = {key: f"{names[key]} {path[hop]}" for key, path in paths.items() if names[key]}
        seen = yield "", "", _given(list(dict.fromkeys(wanted.values())), create=hop == 0)
        told = _told(seen)
        names = {key: told.get((names[key], path[hop])) if key in wanted else None for key, path in paths.items()}
        if STEP_LEFT in seen:
            break
    yield "", table(question, {key: value for key, value in names.items() if hop == len(paths[key]) - 1}), []


def aimless(question, rng):
    """A random schedule: at each step either one look-up alone or a random handful of them side by side, until all are known."""
    paths, names, made, late = _steps_of(question), {key: (key[0], 0) for key in _steps_of(question)}, False, False
    open_ = lambda: [key for key, (name, hop) in names.items() if name and hop < len(paths[key])]  # noqa: E731
    pages = {}
    while open_() and not late:
        some = rng.sample(open_(), rng.randint(1, len(open_())))
        if rng.random() < 0.5:
            name, hop = names[some[0]]
            value, late = yield from _read(name, paths[some[0]][hop], pages, [])
            names[some[0]] = value, hop + 1
        else:
            wanted = {key: f"{names[key][0]} {paths[key][names[key][1]]}" for key in some}
            seen = yield "", "", _given(list(dict.fromkeys(wanted.values())), create=not made)
            told, made, late = _told(seen), True, STEP_LEFT in seen
            for key in some:
                name, hop = names[key]
                names[key] = told.get((name, paths[key][hop])), hop + 1
    yield "", table(question, {key: name for key, (name, hop) in names.items() if hop == len(paths[key])}), []


def look_up(prompt):
    """A subagent: `a27 colour` → `a27 colour red`. What it does not understand or find is unknown."""
    asked = re.fullmatch(r"(\w+) (\w+)", prompt)
    if not asked:
        yield "", "unknown", []
        return
    name, what = asked.groups()
    value, _ = yield from _read(name, what, {}, [])
    yield "", f"{name} {what} {value or 'unknown'}", []


def completed(prompt, answer):
    """Whether a subagent found what it was asked: `a27 colour` → `a27 colour red`."""
    asked, _, value = answer.rpartition(" ")
    return asked == prompt and value != "unknown"


def scripted(tokenizer, writer):
    """A script as a policy, which answers in tokens like a model."""
    return Local(Scribe(tokenizer, writer), declare=False)


class ScriptedSubagents:
    """A policy of subagents that look things up by script, and never err."""

    def __init__(self, tokenizer):
        self.tokenizer, self._each = tokenizer, {}

    def __str__(self):
        return "look-ups by script"

    async def answer(self, messages, tools, agent):
        """As of any policy."""
        if agent not in self._each:
            self._each[agent] = scripted(self.tokenizer, look_up(messages[1]["content"]))
        return await self._each[agent].answer(messages, tools, agent)


def dictated(rng, number, split="train"):
    """So many different look-ups on the pages of one question: (prompts, pages). Some ask for what is not there."""
    question = draw(rng, rng.choice(("wide", "deep", "document", "download")), rng.randint(1, 8), split)
    people, prompts = [page.split("\n")[0] for page in question.pages.values() if not page.startswith("old")], {}
    while len(prompts) < number:
        name, what = rng.choice(question.rows), rng.choice(question.columns)
        if question.kind in ("wide", "deep"):
            what = rng.choice((*question.columns, "friend", rng.choice(ATTRIBUTES)))
            name = rng.choice(people) if rng.random() < 0.9 else name
            name = _names(rng, 0, 1, split)[1][0] if rng.random() < 0.05 else name
        elif len(prompts) >= len(question.rows):
            what = rng.choice(ATTRIBUTES)
        prompts[f"{name} {what}"] = None
    return list(prompts), question.pages


def single_lookup(rng, split="train"):
    """One look-up to train a subagent on: (prompt, pages)."""
    (prompt,), pages = dictated(rng, 1, split)
    return prompt, pages


def findings(question):
    """What a perfect reader would note of a question, lines such as `a27 colour red`; of a deep one the friends as well."""
    people, lines = {page.split("\n")[0]: page for page in question.pages.values()}, []
    values = question.values()
    for row, column in _steps_of(question):
        friend = _value("friend", people[row]) if question.kind in HOPS else None
        lines += [f"{row} friend {friend}"] if friend else []
        lines.append(f"{friend or row} {column} {values[row, column]}")
    return list(dict.fromkeys(lines))


# ------------------------------------------------------------------------------------------- vocabulary


def merges(counts, most):
    """Byte-pair encoding of words: the `most` merges of the commonest neighbours, in order (ties: by their bytes).

    counts: {word as bytes: how often}. Returns a list of bytes, the 256 bytes first: token of each rank.
    """
    words = {tuple(word[i : i + 1] for i in range(len(word))): count for word, count in counts.items()}
    tokens = [bytes([i]) for i in range(256)]
    for _ in range(most):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(best[0] + best[1])
        words = {_merged(word, best): count for word, count in words.items()}
    return tokens


def _merged(word, pair):
    found, place = [], 0
    while place < len(word):
        joined = word[place : place + 2] == pair
        found.append(pair[0] + pair[1] if joined else word[place])
        place += 1 + joined
    return tuple(found)


def _texts():
    """What is said in this world, names apart: every form of every word."""
    words = ["friend", "moved", "note", "old", "unknown", "name", "table", "of", "for", WORKER, *VALUES, *itertools.chain(*VALUES.values())]
    forms = [form for word in words for form in (f"x {word}", f'{{"{word}', f"\n{word}")]
    numbers = [f"k{n}, {n}" for n in range(100)] + [f'"{letter}1 {letter}2 | {letter}3' for letter in f"{ROWS}{OTHERS}p"]
    calls = [json.dumps({key: "a27"}, separators=(",", ":")) for key in ("query", "page", "name", "prompt")]
    calls.append(json.dumps({"agent": WORKER, "prompt": "a27 colour"}, separators=(",", ":")))
    calls.append(json.dumps({"name": WORKER, "system_prompt": ROLE}, separators=(",", ":")))
    tools = [f"functions.{tool}:0" for tool in ("search", "browse", "create_subagent", "assign_task")]
    said = [
        SYSTEM,
        "## Return of functions.search:1\n", "[p17.md: characters 0 to 42 of 42, the end]", "\n[One step is left: answer now.]", "worker was created",
        "p17.md (1.23): a27", "no page has one of these words", "Refused: worker was given this very task, number 2, and is at work",
        "Error: no agent 'worker': create it first", "and has finished; its result stands above", "Refused: 1 of these calls in one answer, at most",
        "Error: not finished after 4 steps: its 4 steps are spent; the task may be assigned again\nIt had: ", "| a27 | red |\n| - | - |",
        "system\nuser\nassistant\ntool",
    ]  # fmt: skip
    return [*forms, *numbers, *calls * 3, *tools * 3, *said * 2]


# How tokenizer.PATTERN cuts such texts: a word with what stands before it, a number, other signs, white space.
_PIECES = re.compile(r"[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s+")


@functools.cache
def _tokens():
    return merges(Counter(piece.encode() for text in _texts() for piece in _PIECES.findall(text)), 1 << 20)


def vocabulary(path):
    """The Tokenizer of this world: its words are single tokens. path: of the ranks file, which is written if it is not there."""
    tokens = _tokens()
    text = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    if not path.exists() or path.read_text() != text:
        write_file(path, text)
    return Tokenizer(len(tokens) + 256, path)
