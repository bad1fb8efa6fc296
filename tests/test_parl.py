"""PARL's parts: frozen subagents, the swarm as an environment, what is trained on and what is not.

Run: .venv/bin/python -m pytest tests/test_parl.py
"""

import asyncio
import dataclasses
import random
import re
from types import SimpleNamespace

import pytest
import torch

import lookups
import parl
from critical import longest_path, table_items
from parl import PARLError, Bounded, Frozen, Shaping, SwarmEnvironment, answer_all, build
from parl import cold_start, lookup_documents, schedule_all, table_documents, virtual_time
from policies import ContextFullError
from rl import Learner, RLConfig
from rollout import Sampling
from sft import SFTConfig, finetune
from swarm_log import step_graph
from template import SECTION_BEGIN
from traces import Scribe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return lookups.vocabulary(tmp_path_factory.mktemp("words") / "vocabulary.tiktoken")


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """Models of no size: nothing here is about what they can."""
    sizes, parl.SIZES = parl.SIZES, {name: {"hidden_size": 32, "num_hidden_layers": 2, "qk_nope_head_dim": 16, "v_head_dim": 16} for name in parl.SIZES}
    yield
    parl.SIZES = sizes


@pytest.fixture
def frozen(tokenizer):
    return Frozen(build("small", tokenizer, 0), tokenizer)


def scripted(question, writer, environment, tokenizer, seed=0):
    """(Record, stages) of a script in an environment."""
    return asyncio.run(environment.play(question, lookups.scripted(tokenizer, writer), seed))


def test_only_answers_of_the_orchestrator_carry_loss(tokenizer, frozen):
    """Bugs 53 and 60: neither prompts nor what subagents say is trained on, and every generated token has its log-prob."""
    question = lookups.draw(random.Random(0), "wide", 3)
    policy = lookups.scripted(tokenizer, lookups.planned(question))
    asyncio.run(SwarmEnvironment(frozen).play(question, policy, 0))
    rollout = policy.rollout()
    said = tokenizer.decode([i for i, own in zip(rollout.ids, rollout.generated) if own])
    heard = tokenizer.decode([i for i, own in zip(rollout.ids, rollout.generated) if not own])
    given = len(question.truth)
    assert said.count("assign_task:") == given and "Return of" not in said and question.text not in said
    assert heard.count("## Return of functions.assign_task") == given and SECTION_BEGIN not in heard
    assert len(rollout.logprobs) == sum(rollout.generated)


def test_subagents_are_sampled_by_their_own_model_and_never_move(tokenizer, frozen):
    """Their parameter hash is unchanged by training, and no gradient is there; one that is touched is found."""
    model = build("orchestrator", tokenizer, 1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    settings = RLConfig(prompts=1, responses=4, slots=8, capacity=256, max_new_tokens=12, rows=4, lr=1e-2)


    class Paid(SwarmEnvironment):
        """Rewards that differ, whatever a model of no size does."""

        async def rollout(self, question, handle, seed):
            return dataclasses.replace(await super().rollout(question, handle, seed), reward=float(seed % 2))

    environment = Paid(frozen)
    with Learner(model, environment, lookups.pool(2, 0, ("single",)), tokenizer, settings) as learner:
        rollouts, _ = learner.iterate()
    assert frozen.check() == frozen.digest
    assert len(environment.take()) == len(rollouts) == 4
    assert all(parameter.grad is None for parameter in frozen.model.parameters())
    assert len({rollout.reward for rollout in rollouts}) == 2
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with torch.no_grad():
        next(iter(frozen.manager.engine.model.model.parameters())).view(-1)[0] += 1.0  # of the copy that answers
    with pytest.raises(PARLError, match="have changed"):
        frozen.check()
    next(iter(frozen.model.parameters())).requires_grad_(True)
    with pytest.raises(PARLError, match="gradient"):
        frozen.check()


def test_a_script_with_scripted_subagents_has_the_record_it_should(tokenizer, frozen, monkeypatch):
    question = lookups.draw(random.Random(4), "wide", 4)
    monkeypatch.setattr(Frozen, "policy", lambda self, seed: lookups.ScriptedSubagents(tokenizer))
    record, stages = scripted(question, lookups.planned(question), SwarmEnvironment(frozen), tokenizer)
    given = len(question.rows) * len(question.columns)
    assert (record.performance, record.given, record.width, record.finished, record.redundant) == (1.0, given, given, 1.0, 0.0)
    assert record.parallel == pytest.approx(min(1.0, given / Shaping().enough))
    assert record.critical == 2 + 3 and record.total == 2 + 3 * given and record.status == "done" and len(stages) == 2
    record, _ = scripted(question, lookups.serial(question), SwarmEnvironment(frozen, steps=20), tokenizer)
    assert (record.performance, record.given, record.critical) == (1.0, 0, record.total)


def test_subagents_are_taught_to_answer_when_one_step_is_left(tokenizer):
    """A swarm near its budget asks its subagents for their answers; that must be nothing new to them."""
    asked = 0
    for document in lookup_documents(80, tokenizer, 0):
        _, hurry, rest = tokenizer.decode(document.ids).partition(lookups.STEP_LEFT)
        asked += bool(hurry)
        assert SECTION_BEGIN not in rest
    assert 5 < asked < 40


def test_an_order_gives_away_what_the_user_dictates_and_says_what_came_back(tokenizer):
    """Practice in the use of the tools shows no decomposition."""
    for document in parl.order_documents(12, tokenizer, 0):
        told = tokenizer.decode(document.ids)
        said = tokenizer.decode([i for i, own in zip(document.ids, document.loss) if own])
        dictated = told.partition("<|im_user|>")[2].partition("<|im_end|>")[0]
        prompts = re.findall(rf"{lookups.WORKER} (.*)", dictated)
        assert 1 <= len(prompts) <= 4 and re.findall(r'"prompt":"(.*?)"', said) == prompts
        for place, prompt in enumerate(prompts, 1):
            result = told.partition(f"functions.assign_task:{place}\n")[2].partition("<|im_end|>")[0]
            assert result.startswith(prompt) and result in re.split(r"\n|<\|im_end\|>|</think>", said)


def test_practice_in_reading_has_no_loss_on_giving_away_and_says_what_came_back(tokenizer):
    several = 0
    for document in parl.reading_documents(24, tokenizer, 0):
        told = tokenizer.decode(document.ids)
        said = tokenizer.decode([i for i, own in zip(document.ids, document.loss) if own])
        several += told.count("assign_task:") > 4
        assert "assign_task" in told and "assign_task" not in said and "create_subagent" not in said and "| - |" in said
        _, head, rows = said.removesuffix("<|im_end|>").rpartition("| name")
        for item in table_items(head + rows):
            assert item[1] == "name" or f"{item[1]} {item[2]}" in told, item
    assert several > 3


def test_a_table_beside_a_call_is_no_answer(tokenizer):
    """Who still calls when the steps are spent has answered nothing, whatever it wrote."""
    question = lookups.draw(random.Random(4), "single")

    def busy():
        while True:
            yield "", lookups.table(question, question.values()), [("search", {"query": question.rows[0]})]

    record, _ = scripted(question, busy(), SwarmEnvironment(None), tokenizer)
    assert record.status != "done" and record.performance == 0.0 and record.critical == question.steps


def test_an_agent_makes_its_own_calls_one_by_one(tokenizer, frozen):
    question = lookups.draw(random.Random(4), "document", 3)

    def both():
        yield "", "", [("browse", {"page": f"{row}.md"}) for row in question.rows[:2]]
        yield "", "no idea", []

    policy = lookups.scripted(tokenizer, both())
    asyncio.run(SwarmEnvironment(frozen).play(question, policy, 0))
    log = tokenizer.decode(policy.talk().ids)
    assert log.count("Refused: 1 of these calls") == 1 and log.count("the end]") == 1


def test_a_single_agent_cannot_delegate(tokenizer):
    question = lookups.draw(random.Random(4), "wide", 3)
    record, _ = scripted(question, lookups.planned(question), SwarmEnvironment(None), tokenizer)
    assert record.given == 0 and record.performance == 0.0


def test_virtual_time_is_the_longest_path_in_seconds(tokenizer, frozen, monkeypatch):
    """By hand: 10 tokens and a call, then two subagents side by side of 5 + 5 and 20 tokens, then 3 tokens."""
    answer = lambda agent, step, tokens, calls: {"kind": "answer", "agent": agent, "step": step, "message": {"sampled": {"ids": [0] * tokens}, "tool_calls": calls}}  # noqa: E731, E501
    events = [answer("main", 0, 10, [1]), {"kind": "assign", "task": 1, "step": 0}, {"kind": "assign", "task": 2, "step": 0},
              answer(1, 0, 5, [1]), answer(2, 0, 20, []), answer(1, 1, 5, []), answer("main", 1, 3, [])]  # fmt: skip
    branch = max(5 * 0.02 + 0.5 + 5 * 0.02, 20 * 0.02)
    assert virtual_time(events) == pytest.approx(10 * 0.02 + 0.5 + branch + 3 * 0.02)
    monkeypatch.setattr(parl, "TOKEN", 0.0)
    monkeypatch.setattr(parl, "CALL", 1.0)
    for event in events:
        if event["kind"] == "answer":
            event["message"]["tool_calls"] = [1]
    assert virtual_time(events) == len(longest_path(step_graph(events))) == 4  # where every answer takes a second


def test_subagents_answer_greedily(frozen):
    """The same whatever the seed of the run: what differs between episodes is the orchestrator's doing."""
    asked = [{"role": "system", "content": lookups.ROLE}, {"role": "user", "content": "a27 colour"}]
    said = frozen.manager.engine.run(*(frozen.policy(seed).answer(asked, [], 1) for seed in range(3)))
    assert len({tuple(message.ids) for message in said}) == 1


def test_rewards_can_be_shaped_annealed_and_permuted(tokenizer, frozen, monkeypatch):
    knots = Shaping().knots()
    assert knots == ((0.0, 2.0, 1.0), (0.4, 2.0, 1.0), (0.8, 0.0, 0.0))
    assert Shaping(0.5, 0.0).knots()[1] == (0.4, 0.5, 0.0)
    question, rewards = lookups.draw(random.Random(4), "wide", 4), {}
    monkeypatch.setattr(Frozen, "policy", lambda self, seed: lookups.ScriptedSubagents(tokenizer))

    class Half(Scribe):
        manager, seed = None, 0

    for progress in (0.0, 0.5, 1.0):
        environment = SwarmEnvironment(frozen, Shaping(enough=4))
        environment.progress = progress
        rewards[progress] = asyncio.run(environment.rollout(question, Half(tokenizer, lookups.planned(question)), 0)).reward
    assert rewards == {0.0: 4.0, 0.5: 3.25, 1.0: 1.0}
    environment = SwarmEnvironment(frozen, Shaping(enough=4, permuted=True))
    environment._earlier = [0.125]
    assert asyncio.run(environment.rollout(question, Half(tokenizer, lookups.planned(question)), 0)).reward == 0.125
    environment.take()
    assert environment._earlier == [4.0]


def test_shuffled_subagents_look_something_else_up(tokenizer, frozen, monkeypatch):
    question = lookups.draw(random.Random(4), "wide", 4)
    monkeypatch.setattr(Frozen, "policy", lambda self, seed: lookups.ScriptedSubagents(tokenizer))
    record, _ = scripted(question, lookups.planned(question), SwarmEnvironment(frozen, Shaping(shuffled=True)), tokenizer)
    assert record.given >= 4 and record.performance < 1.0


@pytest.mark.parametrize("remedy", parl.REMEDIES)
def test_a_bounded_context_is_relieved(remedy, tokenizer):
    """What the policy is shown behind the limit, by a script that never stops looking."""
    question = lookups.draw(random.Random(5), "document", 6)

    def endless():
        seen = ""
        while True:
            late = lookups.STEP_LEFT in seen
            seen = (yield "", "| name |" if late else "", [] if late else [("browse", {"page": f"{question.rows[0]}.md"})]) or ""

    class Script(Scribe):
        manager = SimpleNamespace(sampling=Sampling())

        def conversation(self, *arguments, **options):
            self._calls = self._calls if remedy == "hide-tool-result" else 0  # who starts anew counts anew
            return super().conversation(*arguments, **options)

    policy = Bounded(Script(tokenizer, endless()), 330, remedy)
    record = asyncio.run(SwarmEnvironment(None, steps=14).play(question, policy, 0))[0]
    talks = {name: tokenizer.decode(talk.ids) for name, (talk, _) in policy._talks.items()}
    assert all(len(talk.ids) <= 330 + parl.NEXT for talk, _ in policy._talks.values())
    assert not any("the next index" in text for text in talks.values())  # nobody is shown calls of a conversation that was left
    last = talks[policy._name()]
    if remedy == "none":
        assert len(talks) == 1 and record.status == "done" and "answer now" in last
    elif remedy == "hide-tool-result":
        assert "hidden" in last
    elif remedy == "discard-all":
        assert len(talks) > 1 and "hidden" not in last
    else:
        assert f"{question.text}\n| name |" in last
    with pytest.raises(PARLError, match="remedy"):
        Bounded(None, 330, "forget")


def test_over_the_limit_nonetheless_the_context_is_full(tokenizer):
    question = lookups.draw(random.Random(5), "document", 6)

    def wordy():
        yield "", "red " * 80, [("browse", {"page": f"{question.rows[0]}.md"})]

    policy = Bounded(Scribe(tokenizer, wordy()), 100)
    with pytest.raises(ContextFullError, match="100 tokens"):
        asyncio.run(policy.answer([{"role": "user", "content": question.text}], [], "main"))


def test_the_cold_start_is_mostly_serial_and_the_same_each_time(tokenizer):
    first, second = cold_start(16, tokenizer, 3, 0.08), cold_start(16, tokenizer, 3, 0.08)
    assert first == second
    delegating = [document for document in cold_start(100, tokenizer, 3, 0.08) if "assign_task:" in tokenizer.decode(document.ids)]
    assert 2 <= len(delegating) <= 20
    assert not [d for d in cold_start(40, tokenizer, 3, delegating=0.0) if "assign_task:" in tokenizer.decode(d.ids)]


def test_lookups_are_learned_from_and_measured(tokenizer):
    documents = lookup_documents(16, tokenizer, 0)
    assert all("Return of functions.browse" in tokenizer.decode(d.ids) or "unknown" in tokenizer.decode(d.ids) for d in documents)
    losses = [result.loss for result in finetune(build("small", tokenizer, 0), documents, SFTConfig(5, 8, 384, 6e-3, 4e-3), tokenizer)]
    assert losses[-1] < losses[0] - 0.25


def test_tables_to_practise_on_can_be_read_off_what_stands_in_the_question(tokenizer):
    for document in table_documents(30, tokenizer, 0):
        text = tokenizer.decode(document.ids)
        asked, _, table = text.partition("</think>")
        rows = [line.strip("| ").split(" | ") for line in table.replace("<|im_end|>", "").split("\n")[2:]]
        assert rows and all(label in asked and value in asked for label, *values in rows for value in values)
        said = tokenizer.decode([i for i, own in zip(document.ids, document.loss) if own])
        assert said == table


def test_measuring_gives_one_record_per_question_in_any_company(tokenizer, frozen):
    model, questions = build("orchestrator", tokenizer, 1), lookups.pool(4, 0, ("single", "chain"))
    options = {"capacity": 256, "max_new_tokens": 10}
    records = answer_all(model, SwarmEnvironment(frozen), questions, tokenizer, 0, **options)
    assert [r.key for r in records] == [q.key for q in questions]
    assert records == answer_all(model, SwarmEnvironment(frozen), questions, tokenizer, 0, slots=2, **options)
    assert [r.kind for r in schedule_all(lookups.serial, None, questions, tokenizer, 0)] == ["single", "chain"] * 2
    assert all(r.performance == 1.0 for r in schedule_all(lookups.serial, None, questions, tokenizer, 0))
    assert dataclasses.asdict(records[0])["status"] in ("done", "garbage", "critical steps", "steps")
