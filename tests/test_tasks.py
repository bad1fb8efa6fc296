"""Claims about tasks.py: twins ask the same, what is held out stays held out, nobody wins without looking, programs of clicks work.

Run: .venv/bin/python -m pytest tests/test_tasks.py
"""

import collections
import dataclasses
import itertools
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import rewards
import tasks
from example import SPLITS, split_of
from pictures import SCREEN, Screen, box_text, draw_program, program_scene
from sources import SOURCES
from tasks import ABILITIES, JUDGES, MODALITIES, TASKS, TaskError, draw, glyphs, score, twins

EVERY = [(family.name, level) for family in TASKS.values() for level in family.levels]
each = pytest.mark.parametrize(("name", "level"), EVERY, ids=[f"{name}-{level}" for name, level in EVERY])
seeds = st.integers(0, 2**32)
names = st.sampled_from(list(TASKS))


def contents(name, level, split, number):
    """That many contents without rendering anything."""
    return [TASKS[name].content(random.Random(f"{name} {i}"), split, level) for i in range(number)]


# Twins


@each
def test_twins_share_question_truth_key_and_split_and_differ_in_what_is_shown(name, level):
    seen, read = twins(random.Random(level), name, None, "heldout", level)
    shown = {"modality", "words", "images", "files", "tools", "max_steps"}
    for field in dataclasses.fields(seen):
        same = getattr(seen, field.name) == getattr(read, field.name)
        assert same or field.name in shown, field.name
    assert seen.images and not seen.words and read.words and not read.images
    assert all(image.mode == "RGB" for image in seen.files)


@given(seed=seeds, name=names, split=st.sampled_from(SPLITS))
def test_asking_for_one_modality_or_the_other_gives_twins(seed, name, split):
    seen, read = (draw(random.Random(seed), name, modality=modality, split=split) for modality in ("vision", "text"))
    assert (seen, read) == twins_of(seed, name, split)


def twins_of(seed, name, split):
    rng = random.Random(seed)
    family, level = tasks._choose(rng, name, None, split, None)
    rng.choice(MODALITIES)
    content = family.content(rng, split, level)
    return family.make(content, split, level, "vision"), family.make(content, split, level, "text")


@given(seed=seeds)
def test_the_same_seed_gives_the_same_task_and_pixels(seed):
    assert draw(random.Random(seed)) == draw(random.Random(seed))


@each
def test_the_truth_scores_one_and_a_wrong_answer_less(name, level):
    for seed in range(5):
        task = draw(random.Random(seed), name, difficulty=level, split="heldout")
        assert score(task, task.truth) == rewards.Score(1.0, True, score(task, task.truth).why)
        assert score(task, "nonsense").value < task.passing <= 1
        assert score(task, "nonsense").valid


@each
def test_a_picture_never_says_its_words_in_the_prompt(name, level):
    seen, read = twins(random.Random(3), name, None, "heldout", level)
    text = "".join(part.get("text", "") for part in seen.parts(named=True))
    assert read.words not in text and [part["type"] for part in seen.parts()] == ["image", "text"]
    assert [part["type"] for part in read.parts()] == ["text"]
    assert read.words in read.parts()[0]["text"]


def test_bug42_prompts_carry_no_markers():
    for name, level in EVERY:
        for task in twins(random.Random(1), name, None, "heldout", level):
            assert not re.search(r"<\||<image>|</?think>", "".join(str(task.parts(i, named=True)) for i in range(3)))


# The words are enough: readers that see the words and the question, and nothing else


def things_in(words):
    """[(colour, shape, numbers)] of a list of things in words."""
    found = re.findall(r"(red|green|blue|yellow|black) (\w+) [(\[x]([^,)\]]+)", words)
    return [(colour, shape, tuple(map(int, re.findall(r"\d+", numbers)))) for colour, shape, numbers in found]


def read_colour(words, asked):
    things = things_in(words)
    if asked == ("largest",):
        return max(things, key=lambda t: (t[2][1] - t[2][0]) * (t[2][3] - t[2][2]))[0]
    return next(colour for colour, shape, _ in things if not asked or shape == asked[0])


def read_count(words, asked):
    return str(sum(set(asked) <= {colour, shape} for colour, shape, _ in things_in(words)))


def read_measure(words, asked):
    ((_, _, (x1, x2, y1, y2)),) = things_in(words)
    width, height = x2 - x1 + 1, y2 - y1 + 1
    return str({"width": width, "height": height, "area": width * height}[asked[0]])


def read_box(words, asked):
    return " ".join("[{} {} {} {}]".format(*box) for colour, _, box in things_in(words) if not asked or colour == asked[0])


def read_point(words, asked):
    middles = [((x1 + x2) / 2, (y1 + y2) / 2) for colour, _, (x1, y1, x2, y2) in things_in(words) if not asked or colour == asked[0]]
    return " ".join(f"({x:.0f} {y:.0f})" for x, y in middles)


def read_chart(words, asked):
    values = {colour: int(value) for colour, value in (bar.split() for bar in words.split(","))}
    if asked[0] in ("highest", "lowest"):
        return (max if asked[0] == "highest" else min)(values, key=values.get)
    return str(sum(values[colour] for colour in asked))


def read_table(words, asked):
    cells = {row[0] + cell[0]: int(cell[1]) for row in words.split("; ") for cell in row[3:].split()}
    if len(asked) == 1:
        return str(sum(value for cell, value in cells.items() if cell[0] == asked[0]))
    return str(cells["".join(asked)] if len(asked[0]) == 1 else sum(cells[cell] for cell in asked))


def read_sketch(words, asked):
    found = re.findall(r"a (\w+) (\w+) in column (\d) row (\d)", words)
    return ";".join(f"{shape} {colour} {column} {row}" for colour, shape, column, row in found)


def read_emblem(words, asked):
    ((colour, shape, _),) = things_in(words)
    name = next(name for name in tasks.NAMES if tasks.EMBLEMS[name] == (colour, shape))
    return tasks.FACTS[name, asked[0]] if asked else name


def read_program(words, asked):
    return subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout.strip()


READERS = {
    "colour": read_colour, "read": lambda words, _: words.removeprefix("letters ")[::2], "emblem": read_emblem,
    "lookup": lambda words, asked: tasks.FACTS[words, asked[0]], "count": read_count, "measure": read_measure, "box": read_box,
    "point": read_point, "chart": read_chart, "table": read_table, "sum": lambda words, _: str(sum(map(int, words.split("+")))),
    "price": lambda words, asked: str(sum(dict(asked).get(thing[0], 0) for thing in things_in(words))),
    "chain": lambda words, _: str(sum(int(pair[1]) for pair in words.split()) % 10), "sketch": read_sketch,
    "program": read_program, "sort": lambda words, _: "".join(sorted(words.split())),
}  # fmt: skip


@each
def test_the_words_alone_are_enough_for_the_text_twin(name, level):
    if TASKS[name].ability == "agentic":
        pytest.skip("answered by clicks: see below")
    for content in contents(name, level, "heldout", 3 if name == "program" else 20):
        answer = READERS[name](content.words, content.asked)
        assert JUDGES[content.judge](answer, content.truth).value > 0.95, (content.words, content.asked, answer, content.truth)


def test_equal_words_are_equal_contents_so_that_text_is_held_out_too():
    for name, level in EVERY:
        keys = collections.defaultdict(set)
        for content in contents(name, level, "train", 60) + contents(name, level, "heldout", 20):
            keys[content.words + str(content.asked if name in ("lookup", "emblem") else "")].add(content.key)
        assert all(len(found) == 1 for found in keys.values()) or TASKS[name].ability == "agentic", name


# Splits


@each
def test_heldout_keys_are_never_in_training(name, level):
    family = TASKS[name]
    held = {content.key for content in contents(name, level, "heldout", 40)}
    assert all(split_of(key, family.one_in) == "heldout" for key in held)
    assert not held & {content.key for content in contents(name, level, "train", 100)}


def test_a_task_says_its_split_and_drawing_keeps_to_it():
    for split in SPLITS:
        for seed in range(40):
            task = draw(random.Random(seed), split=split)
            assert task.split == split == split_of(task.key, TASKS[task.name].one_in)


def test_what_pretraining_holds_out_is_held_out_here():
    for name, source in (("read", "read_word"), ("sort", "sort"), ("program", "program"), ("sum", "sum")):
        theirs = {SOURCES[source].propose(random.Random(seed)).key for seed in range(300)}
        ours = {content.key for split in SPLITS for content in contents(name, 1, split, 150)}
        assert len(ours & theirs) > 10 and TASKS[name].one_in == SOURCES[source].one_in, name


def test_the_hardest_chains_are_never_trained_on():
    family = TASKS["chain"]
    assert family.training_levels() == (1, 2, 3, 4, 5) and family.levels[-1] == 6
    assert {draw(random.Random(seed), "chain").difficulty for seed in range(60)} == set(family.training_levels())
    assert draw(random.Random(0), "chain", split="heldout", difficulty=6).difficulty == 6
    with pytest.raises(TaskError, match="no train level 6"):
        draw(random.Random(0), "chain", difficulty=6)


def test_every_ability_has_tasks_of_both_modalities():
    for ability, modality in itertools.product(ABILITIES, MODALITIES):
        task = draw(random.Random(5), ability=ability, modality=modality)
        assert (task.ability, task.modality) == (ability, modality)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"name": "cont"}, "no task 'cont'"), ({"ability": "maths"}, "no ability"), ({"modality": "sound"}, "no modality"),
        ({"split": "test"}, "split 'test'"), ({"name": "count", "difficulty": 9}, "level 9"),
        ({"name": "count", "ability": "coding"}, "is of ability 'reasoning'"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_refused_in_one_line(wanted, message):
    with pytest.raises(TaskError, match=message) as error:
        draw(random.Random(0), **wanted)
    assert "\n" not in str(error.value)


# Chances of who does not look


def constants(name, truths):
    """Answers that could do well without looking: frequent truths, their middle, a box or point in every quarter."""
    found = [truth for truth, _ in collections.Counter(truths).most_common(12)]
    if name in ("box", "point"):
        for low, high in ((7, 44), (11, 42)):
            quarters = [(low + dx, low + dy, high + dx, high + dy) for dx in (0, 51) for dy in (0, 51)]
            boxes = " ".join("[{} {} {} {}]".format(*quarter) for quarter in quarters)
            found += [boxes, " ".join(f"({(a + c) // 2} {(b + d) // 2})" for a, b, c, d in quarters)]
    elif name in ("count", "measure"):
        found.append(str(int(np.median([int(truth) for truth in truths]))))
    return found


@each
@pytest.mark.parametrize("split", SPLITS)
def test_no_constant_answer_beats_the_stated_blind_score(name, level, split):
    family = TASKS[name]
    if family.ability == "agentic":
        pytest.skip("a plan of clicks instead: see below")
    number = 60 if name == "sketch" else 200
    drawn = contents(name, level, split, number)
    judge, groups = JUDGES[drawn[0].judge], collections.defaultdict(list)
    for content in drawn:
        groups[content.questions[0]].append(content.truth)
    if len(groups) > 6:  # too few of each: the question as a whole
        groups = {"": [content.truth for content in drawn]}
    scores = []
    for truths in groups.values():
        half = len(truths) // 2
        best = max(constants(name, truths[:half]), key=lambda a: sum(judge(a, t).value for t in truths[:half]))
        scores += [judge(best, truth).value for truth in truths[half:]]
    error = max(np.std(scores), (family.blind[level - 1] / len(scores)) ** 0.5) / len(scores) ** 0.5
    assert np.mean(scores) <= family.blind[level - 1] + 3 * error + 0.01, (best, np.mean(scores))


@pytest.mark.parametrize("name", ["menu", "dial"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_no_fixed_plan_of_clicks_beats_the_stated_blind_score(name, level):
    apps = [content.app for content in contents(name, level, "train", 400)]
    middles = [(25, 33), (75, 33), (25, 76), (75, 76)]  # of the four places of a button, whatever its shift

    def rate(plan, some):
        states = [app.start for app in some]
        for button in plan:
            states = [s if app.outcome(s) != "open" else app.click(s, *middles[button]) for app, s in zip(some, states)]
        return np.mean([app.outcome(state) == "done" for app, state in zip(some, states)])

    plans = list(itertools.product(range(4), repeat=apps[0].clicks))
    best = max(plans if len(plans) < 300 else plans[::3], key=lambda plan: rate(plan, apps[:60]))
    blind = TASKS[name].blind[level - 1]
    assert rate(best, apps[60:]) <= blind + 3 * (blind / 340) ** 0.5


def test_the_split_does_not_skew_the_answers():
    for name, level in (("count", 1), ("colour", 2), ("chart", 1), ("chain", 3)):
        for split in SPLITS:
            counts = collections.Counter(content.truth for content in contents(name, level, split, 400))
            expected = 400 / len(counts)
            assert sum((n - expected) ** 2 / expected for n in counts.values()) < 30, (name, split, counts)


# Pictures


def test_program_and_picture_of_a_sketch_are_one():
    task = draw(random.Random(2), "sketch", modality="vision", difficulty=3)
    assert draw_program(task.truth) == task.images[0]
    part = ";".join(task.truth.split(";")[:2])
    assert 0 < score(task, part).value < 1


def test_glyphs_are_those_of_the_written_pictures():
    cells = np.asarray(glyphs()).reshape(28, -1, 14, 3).swapaxes(0, 1)
    assert len({cell.tobytes() for cell in cells[:95]}) == 95  # none looks like another
    for name in ("read", "sum", "sort", "program", "lookup", "chain"):
        for seed in range(10):
            seen, read = twins(random.Random(seed), name)
            image = np.asarray(seen.images[0]).reshape(28, -1, 14, 3).swapaxes(0, 1)
            letters = "".join(chr(32 + next(i for i in range(95) if (cells[i] == cell).all())) for cell in image)
            assert letters.strip().replace(" ", "") in read.words.replace(" ", "") and seen.files[1] == glyphs()


def test_the_words_of_a_box_are_the_pixels_of_the_picture():
    for seed in range(10):
        seen, read = twins(random.Random(seed), "measure", difficulty=3)
        ys, xs = np.nonzero((np.asarray(seen.images[0]) != 255).any(-1))
        assert f"x {xs.min()}-{xs.max()} y {ys.min()}-{ys.max()}" in read.words and len(xs) == int(seen.truth)


# Programs operated by clicks


def middle(screen, index):
    return tuple(map(int, re.findall(r"\d+", screen.point(index))))


@given(seed=seeds, level=st.integers(1, 3))
def test_a_menu_is_done_after_the_right_clicks_and_a_wrong_one_leads_back(seed, level):
    task = draw(random.Random(seed), "menu", difficulty=level)
    app, state = task.app, task.app.start
    for label in task.asked:
        screen = app.screen(state)
        wrong = next(i for i in range(4) if screen.labels[i] != label)
        assert app.click(state, *middle(screen, wrong)) == 0
        assert app.click(state, 0, 0) == app.click(state, 50, 99) == state  # beside all buttons
        state = app.click(state, *middle(screen, screen.labels.index(label)))
    assert app.outcome(state) == "done" and app.screen(state) is None and task.max_steps == level + 1


@given(seed=seeds, level=st.integers(1, 3))
def test_a_dial_is_done_at_its_goal_and_failed_elsewhere(seed, level):
    task = draw(random.Random(seed), "dial", difficulty=level)
    app, state, clicks = task.app, task.app.start, 0
    while state != app.goal:
        screen = app.screen(state)
        shown = int(next(label for label in screen.labels if label.isdigit()))
        assert shown == state and app.click(state, *middle(screen, screen.labels.index("OK"))) == "failed"
        state = app.click(state, *middle(screen, screen.labels.index("+1" if shown < app.goal else "-1")))
        clicks += 1
    assert app.click(state, *middle(app.screen(state), app.screen(state).labels.index("OK"))) == "done" and clicks == level


@given(seed=seeds)
def test_clicks_hit_a_button_where_its_picture_shows_it(seed):
    rng = random.Random(seed)
    screen = Screen(("a", "b", "c", "d"), tuple((rng.randint(0, 4), rng.randint(0, 4)) for _ in range(4)), 0)
    pixels = np.asarray(screen.render()).astype(int)
    for x, y in itertools.product(range(0, 100, 9), repeat=2):
        column, row = (round(place * (SCREEN - 1) / 99) for place in (x, y))
        inside = tasks._pressed(screen, x, y) is not None
        paper = (pixels[row, column] == 255).all() or row < 10
        assert inside != paper


# Command line


def test_the_sheet_is_a_picture_of_the_asked_families(tmp_path, capsys):
    tasks.main(["sheet", "--out", str(tmp_path / "sheet.png"), "--task", "count", "--task", "menu"])
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.height == 2 * 190 and len(set(image.convert("RGB").tobytes())) > 20
    tasks.main(["list"])
    assert all(name in capsys.readouterr().out for name in ["count"])


@pytest.mark.parametrize("arguments", [["sheet", "--out", "x.png", "--task", "cuont"], ["sheet", "--out", "/no/such/folder/x.png"]])
def test_misuse_is_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        tasks.main(arguments)
    assert ended.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_box_text_of_a_program_lies_in_its_cell():
    assert box_text(program_scene("square red 3 0").things[0]) == "[76 0 97 22]"
