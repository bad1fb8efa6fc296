"""The environment of a task: tools, judge and prompt, around one conversation — K2.5 report 2.3, appendix D.

    environment = Environment(Toolset(Python(pool), Click()))
    manager = RolloutManager(engine, environment, tokenizer)         # calls environment.rollout(task, handle, seed)
    manager.submit(task, seeds)

    observation = environment.reset(task)                            # the same by hand, Gym's way
    observation, reward, done, info = environment.step(calls=[("click", {"x": 25, "y": 33})])
    python environment.py play --task menu --seed 3                  # or from the keyboard

An episode: prompt, answer, its tool calls side by side, their results in the order of the calls, answer, … until an answer
calls no tool, a program that is operated by clicks is over, or the steps or tokens are spent. Then the judge gets the answer,
or what became of the program. Malformed calls, unknown tools and wrong arguments come back as observations. A reward
is 0 only where the judge found so: when a tool's machinery or the judge failed, the rollout is not valid.

All responses to one task have the same prompt: its wording is drawn from the environment's seed and the task's key, not
from the response's seed, so that the mean reward of a group is that of one prompt.

Public names: Environment, Episode, Step, Observation, Toolset, Python, Click, Reply, Judge, Diversity, PLAIN, MANY, Variant,
ANSWERS, EpisodeError, main.     Tests: pytest tests/test_environment.py
"""

import argparse
import asyncio
import pathlib
import random
import re
import sys
from collections import OrderedDict
from dataclasses import dataclass, field, replace

from PIL import Image

import tasks
from interpreter import InterpreterPool
from media import MediaConfig, image_item
from rewards import Score, invalid
from rollout import UNSEEN, Sampling
from template import Message, ToolCall


class EpisodeError(ValueError):
    """An environment that does not fit its task, or a step of an episode that is over; one line says which."""


# ----------------------------------------------------------------------------------------------- tools


@dataclass(frozen=True)
class Reply:
    """What a tool returned: texts and RGB pictures; failed: why its machinery failed, which says nothing about the call."""

    parts: tuple
    failed: str = ""


def _declared(name, about, **types):
    """A tool in OpenAI's wire format. types: JSON type of each argument, all of them required."""
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in types.items()}, "required": list(types)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


class Python:
    """Runs a program over the task's files. pool: InterpreterPool; longest: characters of output that are returned."""

    name = "python"
    declaration = _declared("python", "Runs Python. np and Image are there, and the pictures as files.", code="string")

    def __init__(self, pool, longest=200):
        self.pool, self.longest = pool, longest

    async def run(self, episode, code):
        """The output of the program, or what went wrong."""
        found = await self.pool.run(code, episode.task.files)
        if not found.valid:
            return Reply((found.text,), f"the interpreter failed: {found.status}")
        text = found.text.strip()
        return Reply((text if len(text) <= self.longest else text[: self.longest] + "…",))


class Click:
    """Clicks into the task's app; returns its screen as picture or words, as the task shows it."""

    name = "click"
    declaration = _declared("click", "Clicks a point of the screen, 0 to 99 from left and top.", x="integer", y="integer")

    async def run(self, episode, x, y):
        """The screen after the click."""
        if not (0 <= x <= 99 and 0 <= y <= 99):
            return Reply((f"Error: ({x} {y}) is not on the screen, x and y go from 0 to 99",))
        screen = episode.click(x, y)
        if screen is None:
            return Reply(("the program is over",))
        return Reply((screen.render() if episode.task.modality == "vision" else tasks.screen_words(screen),))


_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


class Toolset:
    """Tools by name. A tool has a `name`, a `declaration` and `async run(episode, **arguments)` that returns a Reply."""

    def __init__(self, *tools):
        self.tools = {tool.name: tool for tool in tools}

    def offered(self, task):
        """Names of the tools that the task allows and that are here."""
        return tuple(name for name in task.tools if name in self.tools)

    def declarations(self, names, described=False):
        """Their declarations, with a sentence about each or bare."""
        found = []
        for declaration in (self.tools[name].declaration for name in names):
            function = dict(declaration["function"])
            if not described:
                del function["description"]
            found.append(declaration | {"function": function})
        return found

    async def run(self, episode, call):
        """The Reply to a ToolCall; an unknown tool and wrong arguments are observations, an exception is a failure."""
        tool = self.tools.get(call.name) if call.name in episode.offered else None
        if tool is None:
            return Reply((f"Error: no tool {call.name[:40]!r}, only {', '.join(episode.offered) or 'none at all'}",))
        wanted = tool.declaration["function"]["parameters"]["properties"]
        fits = call.arguments.keys() == wanted.keys() and all(
            isinstance(call.arguments[key], _TYPES[kind["type"]]) and (kind["type"] == "boolean" or not isinstance(call.arguments[key], bool))
            for key, kind in wanted.items()
        )
        if not fits:
            types = ", ".join(f"{key}: {kind['type']}" for key, kind in wanted.items())
            return Reply((f"Error: {call.name} takes {types}",))
        try:
            return await tool.run(episode, **call.arguments)
        except Exception as error:  # of the tool, not of what the model asked
            return Reply((), f"{call.name} failed: {type(error).__name__}: {error}")


# ---------------------------------------------------------------------------------------------- prompt


def _after_answer(text):
    return text.rpartition("answer:")[2].strip() if "answer:" in text else ""


def _boxed(text):
    """What stands in the last `\\boxed{…}`, whose braces match."""
    inside, depth = text.rpartition("\\boxed{")[2] if "\\boxed{" in text else "", 1
    for place, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return inside[:place].strip()
    return ""


ANSWERS = {  # by name: (what the prompt says, how the answer is read; "" where it is not found)
    "plain": ("", str.strip),
    "line": ("End with answer: and the answer.", _after_answer),
    "boxed": ("Put the answer into \\boxed{}.", _boxed),
}


@dataclass(frozen=True)
class Variant:
    """One way of putting a task."""

    wording: int  # which of the task's questions, modulo their number
    system: str  # system prompt, "" for none
    tools_format: str  # "typescript" | "json"
    described: bool  # whether tools are explained
    answer: str  # a key of ANSWERS


@dataclass(frozen=True)
class Diversity:
    """The ways of putting a task, of which each task gets one of each kind."""

    wordings: int = 1  # of the first so many of its questions
    systems: tuple = ("",)
    tools_formats: tuple = ("typescript",)
    described: tuple = (False,)
    answers: tuple = ("plain",)

    def draw(self, rng):
        """A Variant."""
        return Variant(rng.randrange(self.wordings), rng.choice(self.systems), rng.choice(self.tools_formats),
                       rng.choice(self.described), rng.choice(self.answers))  # fmt: skip


PLAIN = Diversity()
MANY = Diversity(3, ("", "You answer briefly.", "You look closely and answer."), ("typescript", "json"), (False, True), tuple(ANSWERS))


# ----------------------------------------------------------------------------------------------- judge


class Judge:
    """By rules: `tasks.score`. Others are objects with the same `score`, such as a model that judges."""

    async def score(self, episode, answer, handle=None):
        """What an answer (str; of a task with an app, its outcome) is worth. handle: of the rollout, for judges that
        sample. Returns rewards.Score; an exception counts as a failure of the judge."""
        return tasks.score(episode.task, answer)


# --------------------------------------------------------------------------------------------- episode


@dataclass(frozen=True)
class Step:
    """What follows an answer."""

    replies: tuple  # (ToolCall, or None where no call could be read; parts), in the order of the calls
    score: Score | None = None  # when the episode is over

    @property
    def done(self):
        """Whether the episode is over."""
        return self.score is not None


class Episode:
    """One attempt at a task: its prompt, and what follows each answer. Made by `Environment.begin`."""

    def __init__(self, environment, task, variant):
        self.environment, self.task, self.variant = environment, task, variant
        self.offered = environment.toolset.offered(task)
        if task.app and "click" not in self.offered:
            raise EpisodeError(f"task {task.name} is operated by clicks: the toolset needs Click")
        self.declarations = environment.toolset.declarations(self.offered, variant.described)
        self.steps = self.clicks = 0
        self.state = task.app and task.app.start
        self.over = False

    def opening(self):
        """The prompt's turns: [(role, parts)], parts being texts and RGB pictures, or UNSEEN in their places."""
        images = iter(self.task.images if self.environment.see else [UNSEEN] * len(self.task.images))
        parts = self.task.parts(self.variant.wording, named="python" in self.offered)
        parts = [next(images) if part["type"] == "image" else part["text"] for part in parts]
        if instruction := ANSWERS[self.variant.answer][0] if not self.task.app else "":
            parts[-1] += f"\n{instruction}"
        system = [("system", (self.variant.system,))] if self.variant.system else []
        return [*system, ("user", tuple(parts))]

    def click(self, x, y):
        """Click into the app. Returns its Screen, or None once it is over or its clicks are spent."""
        app = self.task.app
        if app.outcome(self.state) != "open" or self.clicks == app.clicks:
            return None
        self.clicks += 1
        self.state = app.click(self.state, x, y)
        return app.screen(self.state)

    async def act(self, message, cut=False, handle=None):
        """What follows an answer. message: template.Message; cut: bool — it ran out of tokens, which ends the episode;
        handle: of the rollout. Returns Step; raises EpisodeError once it is over."""
        if self.over:
            raise EpisodeError("the episode is over: begin another one")
        self.steps += 1
        found = await asyncio.gather(*(self.environment.toolset.run(self, call) for call in message.tool_calls))
        replies = [(call, reply.parts) for call, reply in zip(message.tool_calls, found)]
        if message.errors:
            replies.append((None, ("\n".join(f"Error: {error}" for error in message.errors)[:200],)))
        failed = next((reply.failed for reply in found if reply.failed), "")
        app = self.task.app
        if failed:
            score = invalid(failed)
        elif app and (app.outcome(self.state) != "open" or self.clicks == app.clicks):
            score = await self._judge(app.outcome(self.state), handle)
        elif replies and not cut and self.steps < self.task.max_steps:
            return Step(tuple(replies))
        elif app:
            score = await self._judge(app.outcome(self.state), handle)
        else:
            score = await self._judge("" if replies else ANSWERS[self.variant.answer][1](message.content), handle)
        self.over = True
        return Step(tuple(replies), score)

    async def _judge(self, answer, handle):
        try:
            score = await self.environment.judge.score(self, answer, handle)
        except Exception as error:  # says nothing about the answer
            return invalid(f"the judge failed: {type(error).__name__}: {error}")
        return score if isinstance(score, Score) else invalid(f"the judge returned a {type(score).__name__}")


# ----------------------------------------------------------------------------------------- environment


@dataclass(frozen=True)
class Observation:
    """What somebody who plays sees: texts and RGB pictures."""

    text: str
    images: tuple = ()


@dataclass
class _Game:
    """The episode that `reset` began."""

    episode: Episode
    calls: int = 0
    said: list = field(default_factory=list)


class Environment:
    """Tasks with tools, a judge and a way of prompting.

    toolset: Toolset; judge: like Judge; see: bool — pictures are in the prompt, else their marks alone, and they are only in
    the files of programs;
    diversity: Diversity, and seed: int, of which each task's Variant is drawn; thinking: bool, or None for what
    each task says; sampling: Sampling of each answer, None for the manager's; budget: generated tokens of an episode, None
    for no limit; media: MediaConfig of the model.
    """

    def __init__(self, toolset, judge=None, see=True, diversity=PLAIN, seed=0, thinking=None, sampling=None, budget=None, media=None):
        self.toolset, self.judge, self.see, self.diversity, self.seed = toolset, judge or Judge(), see, diversity, seed
        self.thinking, self.sampling, self.budget, self.media = thinking, sampling, budget, media or MediaConfig()
        self._items, self._game = OrderedDict(), None

    def begin(self, task):
        """A new Episode of a task; the same task always has the same prompt."""
        return Episode(self, task, self.diversity.draw(random.Random(f"{self.seed} {task.name} {task.key}")))

    async def rollout(self, task, handle, seed):
        """One response to a task, for a RolloutManager. handle: rollout.Handle, which samples; seed: of its draws, which the
        handle has already. Returns Rollout."""
        episode = self.begin(task)
        thinking = task.thinking if self.thinking is None else self.thinking
        talk = handle.conversation(episode.declarations, thinking, tools_format=episode.variant.tools_format)
        for role, parts in episode.opening():
            getattr(talk, role)(*(part if isinstance(part, str) or part is UNSEEN else self._item(part) for part in parts))
        while True:
            message = await handle.answer(talk, self._sampling(handle, talk))
            spent = self.budget is not None and sum(talk.generated) >= self.budget
            step = await episode.act(message, talk.finish == "length" or spent, handle)
            if step.done:
                score = step.score
                return handle.rollout(talk, score.value if score.valid else 0.0, score.valid, score.why if not score.valid else "")
            for call, parts in step.replies:
                parts = [part if isinstance(part, str) else image_item(part, self.media) for part in parts]
                talk.tool(call, *parts) if call else talk.system(*parts)

    def _sampling(self, handle, talk):
        """Of the next answer: no more tokens than the budget leaves."""
        if self.budget is None:
            return self.sampling
        sampling = self.sampling or handle.manager.sampling
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, self.budget - sum(talk.generated)))

    def _item(self, image):
        """The MediaItem of a task's picture: one object for all responses, by which the engine knows that prompts are equal."""
        if id(image) not in self._items:
            self._items[id(image)] = image, image_item(image, self.media)  # with the picture, so that its id stays its own
            while len(self._items) > 512:
                self._items.popitem(last=False)
        return self._items[id(image)][1]

    # -- for people

    def reset(self, task):
        """Begin an episode by hand. Returns its prompt as an Observation."""
        self._game = _Game(self.begin(task))
        opening = self._game.episode.opening()
        return _observation([part for _, parts in opening for part in parts])

    def step(self, content="", calls=()):
        """Answer by hand: a text, or tool calls [(name, arguments)]. Returns (Observation, reward, done, info).

        reward: float once done, NaN when not valid, else 0; info: dict with why. Not inside an event loop. Raises EpisodeError.
        """
        if self._game is None:
            raise EpisodeError("no episode: call reset(task) first")
        game = self._game
        made = tuple(ToolCall(f"functions.{name}:{number}", name, number, dict(arguments), "") for number, (name, arguments)
                     in enumerate(calls, game.calls))  # fmt: skip
        game.calls += len(made)
        step = asyncio.run(game.episode.act(Message("", content, made, ())))
        observation = _observation([part for _, parts in step.replies for part in parts])
        if not step.done:
            return observation, 0.0, False, {"valid": True, "why": ""}
        return observation, step.score.value, True, {"valid": step.score.valid, "why": step.score.why}


def _observation(parts):
    return Observation("\n".join(part for part in parts if isinstance(part, str)), tuple(part for part in parts if isinstance(part, Image.Image)))


# ---------------------------------------------------------------------------------------- command line


def _told(line):
    """A line of the player as arguments of `step`."""
    if found := re.fullmatch(r"click (\d+) (\d+)", line.strip()):
        return {"calls": [("click", {"x": int(found[1]), "y": int(found[2])})]}
    if line.startswith("python "):
        return {"calls": [("python", {"code": line.removeprefix("python ").replace("\\n", "\n")})]}
    return {"content": line.strip()}


def play(options):
    """Let a person solve a task. Pictures are written into a folder."""
    task = tasks.draw(random.Random(options.seed), options.task, modality=options.modality, difficulty=options.level)
    folder = pathlib.Path(options.images)
    folder.mkdir(parents=True, exist_ok=True)
    shown = 0

    def show(observation):
        nonlocal shown
        for image in observation.images:
            image.resize((4 * image.width, 4 * image.height), 0).save(folder / f"{shown}.png")
            print(f"[{folder / f'{shown}.png'}]")
            shown += 1
        print(observation.text)

    with InterpreterPool() as pool:
        environment = Environment(Toolset(Python(pool), Click()), diversity=MANY if options.many else PLAIN)
        show(environment.reset(task))
        print(f"({', '.join({'python': 'python CODE', 'click': 'click X Y'}[name] for name in task.tools)}{' or ' if task.tools else ''}the answer)")
        for line in sys.stdin:
            observation, reward, done, info = environment.step(**_told(line))
            if done:
                print(f"reward {reward:g} {info['why']}; it was {task.truth}")
                return
            show(observation)


def main(arguments=None):
    """`play`. Exit code 2 with one line on misuse."""
    parser = argparse.ArgumentParser(prog="environment.py", description=__doc__.splitlines()[0])
    command = parser.add_subparsers(dest="command", required=True).add_parser("play", help="solve a task yourself")
    command.add_argument("--task", help="see python tasks.py list; default: any")
    command.add_argument("--modality", choices=tasks.MODALITIES)
    command.add_argument("--level", type=int)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--many", action="store_true", help="many wordings, system prompts and forms of the answer")
    command.add_argument("--images", default="runs/play", metavar="FOLDER", help="where pictures are written")
    options = parser.parse_args(arguments)
    try:
        play(options)
    except (ValueError, OSError) as error:
        print(f"environment.py play: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
