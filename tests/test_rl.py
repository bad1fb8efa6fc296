"""Claims about rl.py: the policy moves up J exactly, however its rollouts are cut into batches, and it learns.

Run: .venv/bin/python -m pytest tests/test_rl.py
"""

import asyncio
import dataclasses
import json
import math
import random

import pytest
import torch
from PIL import Image

from conftest import assert_close
from engine import Engine
from k25 import K25, K25Config
from media import image_item, merged_tokens
from objective import policy_objective_reference
from optim import MuonClip
from rl import Learner, RLConfig, RLError, control_lengths, length_penalty, policy_batches, policy_logprobs, policy_step
from rollout import Rollout, RolloutManager, Sampling, digest
from tokenizer import Tokenizer
from train_small import model_config

MODEL = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
         "n_routed_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.1}  # fmt: skip
VISION = {"vt_hidden_size": 16, "vt_num_attention_heads": 2, "vt_num_hidden_layers": 1, "vt_intermediate_size": 16}
CONFIG = model_config(K25Config.preset("toy"), MODEL, VISION)
TOKENIZER = Tokenizer()
T = RLConfig(low=-0.3, high=0.2, tau=0.05, clip_norm=1e9)


def built(seed=0, dtype=torch.float64, config=CONFIG):
    torch.manual_seed(seed)
    return K25(config).to(dtype)


def rollouts_of(seed=0, prompts=3, responses=3, pictures=True):
    """Of several turns and unequal lengths; recorded log-probs near those of the model, so that some tokens are masked."""
    rng = random.Random(seed)
    found = []
    for group in range(prompts):
        for _ in range(responses):
            ids, generated, items = [TOKENIZER.im_user], [False], ()
            if pictures and rng.random() < 0.5:
                image = Image.frombytes("RGB", (28 * rng.randint(1, 2), 28), rng.randbytes(28 * 28 * 2 * 3))
                items = (image_item(image, CONFIG.media),)
                ids += [TOKENIZER.media_pad] * merged_tokens(items[0].grid)
                generated = [False] * len(ids)
            for _ in range(rng.randint(1, 2)):  # prompt or tool result, then an answer
                for sampled, most in ((False, 4), (True, 5)):
                    new = [rng.randrange(256) for _ in range(rng.randint(1, most))]
                    ids, generated = [*ids, *new], [*generated, *[sampled] * len(new)]
            count = sum(generated)
            logprobs = tuple(rng.uniform(-6.4, -6.0) for _ in range(count))
            found.append(Rollout(tuple(ids), tuple(generated), logprobs, (0,) * count, items, rng.random(), rng.random() < 0.9, group))
    return found


class Recorder:
    """Stands in for an optimizer and keeps the gradients as they come to it."""

    def __init__(self, model):
        self.model, self.gradients = model, []

    def step(self):
        self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none=set_to_none)


def gradients(rollouts, t=T, old=None):
    """Gradients of −J as the optimizer gets them. Router balance is left out, so that only J is compared."""
    model = built(config=dataclasses.replace(CONFIG, aux_loss_alpha=0.0))
    recorder = Recorder(model)
    result = policy_step(model, recorder, rollouts, torch.tensor([r.reward for r in rollouts]), t)
    return recorder.gradients, result


def by_hand(rollouts, t=T):
    """The same from one rollout at a time, without padding, by the reference objective."""
    model = built(config=dataclasses.replace(CONFIG, aux_loss_alpha=0.0))
    kept = [r for r in rollouts if r.valid]
    tokens, total = sum(sum(r.generated) for r in kept), 0.0
    for own in kept:
        (batch,) = policy_batches([own], 1, CONFIG.pad_token_id, dtype=torch.float64)
        logprobs, _ = policy_logprobs(model, batch, t.temperature)
        peers = [r.reward for r in kept if r.group == own.group]
        # One response of reward r − r̄ beside one of its negative that says nothing: their mean is 0.
        advantage = own.reward - sum(peers) / len(peers)
        rewards, groups = torch.tensor([advantage, -advantage]), torch.zeros(2, dtype=torch.long)
        part = policy_objective_reference(logprobs, logprobs.detach(), batch.engine_logprobs.double(), batch.mask, batch.owner, rewards, groups,
                                          torch.ones(2, dtype=torch.bool), tokens, t.low, t.high, t.tau, t.cap)  # fmt: skip
        (-part.value).backward()
        total += part.value.item()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, total


def test_bug44_bug51_bug53_the_gradient_is_that_of_one_rollout_at_a_time():
    """Unequal lengths, several turns, pictures, invalid ones: batched and padded it is the same sum over all tokens."""
    rollouts = rollouts_of()
    assert not all(r.valid for r in rollouts) and any(r.items for r in rollouts)
    (found,), result = gradients(rollouts)
    expected, value = by_hand(rollouts)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-6, name)  # rewards are float32
    assert result.objective == pytest.approx(value, rel=1e-5) and 0 < result.masked < 1
    assert result.tokens == sum(sum(r.generated) for r in rollouts if r.valid)


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_bug50_microbatches_change_nothing(rows):
    rollouts = rollouts_of(1)
    (found,), result = gradients(rollouts, dataclasses.replace(T, rows=rows))
    (expected,), whole = gradients(rollouts, dataclasses.replace(T, rows=4))
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-9, name)
    assert result.objective == pytest.approx(whole.objective, rel=1e-9) and result.mismatch == pytest.approx(whole.mismatch, rel=1e-6)


def test_bug58_an_invalid_rollout_is_as_good_as_none():
    rollouts = rollouts_of(2)
    spoiled = [*rollouts, dataclasses.replace(rollouts[0], valid=False, reward=math.nan)]
    (found,), _ = gradients(spoiled)
    (expected,), _ = gradients(rollouts)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-9, name)


def test_minibatches_keep_the_responses_of_a_prompt_together():
    """Each prompt's share moves on its own: with a Recorder that never moves, the steps are those of the prompts alone."""
    rollouts = rollouts_of(3, prompts=2)
    both, _ = gradients(rollouts, dataclasses.replace(T, minibatches=2))
    assert len(both) == 2
    for group, found in enumerate(both):
        (expected,), _ = gradients([r for r in rollouts if r.group == group])
        for name, gradient in expected.items():
            assert_close(found[name], gradient, 1e-9, name)


def test_nothing_valid_is_one_line():
    rollouts = [dataclasses.replace(r, valid=False) for r in rollouts_of()]
    with pytest.raises(RLError, match="none of 9 rollouts is valid"):
        gradients(rollouts)


@pytest.mark.parametrize("change, words", [({"low": 0.1}, "low < 0 < high"), ({"cap": 0.0}, "cap is 0.0"), ({"rows": 0}, "at least 1")])
def test_settings_that_make_no_sense_are_refused(change, words):
    with pytest.raises(RLError, match=words):
        RLConfig(**change)


# With the real engine


def answers(model, version, prompts, samples, temperature):
    """Real rollouts: the model writes four bytes; the reward is the share of them in the upper half of ASCII."""
    engine = Engine(model, slots=16, capacity=64, version=version)

    async def rollout(task, handle, seed):
        talk = handle.conversation()
        talk.user(task)
        await handle.answer(talk)
        written = [i for i, sampled in zip(talk.ids, talk.generated) if sampled]
        return handle.rollout(talk, sum(i < 128 for i in written) / len(written))

    async def script():
        manager = RolloutManager(engine, rollout, TOKENIZER, Sampling(max_new_tokens=4, temperature=temperature))
        for number, prompt in enumerate(prompts):
            manager.submit(prompt, [1000 * version + 10 * number + s for s in range(samples)])
        return await manager.collect(len(prompts))

    groups = asyncio.run(script())
    return [rollout for group in groups for rollout in group]


def test_bug55_bug61_on_policy_the_ratio_is_one_at_any_temperature_and_the_engine_agrees():
    model = built(dtype=torch.float32)
    rollouts = answers(model, 0, ["a", "bc"], 4, 0.7)
    result = policy_step(model, Recorder(model), rollouts, torch.tensor([r.reward for r in rollouts]), dataclasses.replace(T, temperature=0.7))
    assert result.moved == 0 and result.masked == 0 and result.mismatch < 1e-4
    wrong = policy_step(model, Recorder(model), rollouts, torch.tensor([r.reward for r in rollouts]), dataclasses.replace(T, temperature=1.0))
    assert wrong.mismatch > 1e-3


def test_the_policy_learns_what_is_rewarded():
    model = built(dtype=torch.float32)
    optimizer = MuonClip.from_named(model.named_parameters(), 0.03, 0.05, weight_decay=0.0)
    means = []
    for version in range(12):
        rollouts = answers(model, version, ["a", "b"], 12, 1.0)
        means.append(sum(r.reward for r in rollouts) / len(rollouts))
        policy_step(model, optimizer, rollouts, torch.tensor([r.reward for r in rollouts]), RLConfig())
    assert sum(means[:2]) / 2 < 0.5 and sum(means[-2:]) / 2 > 0.85, means


# Lengths


def lengths_case():
    """Two prompts with three responses each, in mixed order; the last of prompt 1 is invalid."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    return {"rewards": rewards, "correct": rewards > 0.5, "lengths": torch.tensor([10, 30, 20, 5, 15, 99]), "groups": torch.tensor([7, 7, 7, 4, 4, 4]),
            "prompts": torch.tensor([0, 0, 0, 1, 1, 1]), "budgets": torch.tensor([20.0, math.inf]),
            "valid": torch.tensor([True] * 5 + [False])}  # fmt: skip


def controlled(control, iteration=0, **change):
    case = lengths_case() | change
    return control_lengths(*(case[key] for key in ("rewards", "correct", "lengths", "groups", "prompts", "budgets")), iteration, case["valid"],
                           RLConfig(control=control, lam=0.6, period=2)).tolist()  # fmt: skip


def test_bug56_toggle_binds_by_phase_and_only_where_the_prompt_is_learned():
    assert controlled("none") == lengths_case()["rewards"].tolist()
    assert controlled("toggle", 0) == [1, 0, 0, 1, 0, 1]  # 30 tokens are over prompt 0's budget; prompt 1 has none
    assert controlled("toggle", 2) == lengths_case()["rewards"].tolist()  # phase 1
    assert controlled("toggle", 4) == [1, 0, 0, 1, 0, 1]
    weak = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])  # prompt 0 is at a third, below λ
    assert controlled("toggle", 0, rewards=weak) == weak.tolist()
    assert controlled("rigid", 2, rewards=weak) == [0, 0, 0, 1, 0, 1]  # binds there too, in every phase


def test_the_length_penalty_is_kimi_k1_5s_by_hand():
    """Prompt 7: lengths 10, 30, 20 → ½, −½, 0; the wrong one gets at most 0. Prompt 4: 5 and 15, the invalid one is not there."""
    assert controlled("penalty") == [1.25, 0.75, 0.0, 1.25, -0.25, 1.0]
    case = lengths_case()
    alike = length_penalty(case["correct"], torch.full((6,), 8), case["groups"], case["valid"])
    assert alike.tolist() == [0.0] * 6


# The loop


@dataclasses.dataclass(frozen=True)
class Letters:
    """A prompt whose answer is rewarded for letters, in the place of a Task."""

    name: str
    passing: float = 0.75


async def letters(task, handle, seed):
    """Four bytes; the reward is the share of them in the lower half."""
    talk = handle.conversation()
    talk.user(task.name)
    await handle.answer(talk)
    written = [i for i, sampled in zip(talk.ids, talk.generated) if sampled]
    return handle.rollout(talk, sum(i < 128 for i in written) / len(written))


POOL = [Letters(name) for name in ("a", "bc", "def")]
LOOP = RLConfig(prompts=2, responses=4, slots=8, capacity=64, max_new_tokens=4, lr=0.03, adamw_lr=0.05)


def learned(t, iterations, saved=None):
    """Rows, digests of rollouts and the weights of some iterations; saved: (state, model, optimizer tensors) to go on from."""
    model = built(dtype=torch.float32)
    with Learner(model, letters, POOL, TOKENIZER, t, seed=3) as learner:
        if saved:
            model.load_state_dict(saved[1])
            learner.optimizer.load_state_tensors(saved[2])
            learner.load_state(saved[0])
        found = [learner.iterate() for _ in range(iterations)]
        state = (learner.state(), {k: v.clone() for k, v in model.state_dict().items()},
                 {k: v.clone() for k, v in learner.optimizer.state_tensors().items()})  # fmt: skip
    return [row for _, row in found], [digest(r) for rollouts, _ in found for r in rollouts], state


@pytest.mark.parametrize("control", ["none", "toggle"])
def test_a_resumed_loop_is_what_it_would_have_been(control):
    t = dataclasses.replace(LOOP, control=control, period=1)
    rows, digests, (_, weights, _) = learned(t, 4)
    first, begun, state = learned(t, 2)
    state = (json.loads(json.dumps(state[0])), *state[1:])
    later, went_on, (_, again, _) = learned(t, 2, state)
    assert begun + went_on == digests and [row["iteration"] for row in later] == [2, 3]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert [row["phase"] for row in first + later] == [row["phase"] for row in rows] == ([0, 1, 0, 1] if control == "toggle" else [None] * 4)


def test_every_prompt_comes_once_an_epoch():
    with Learner(built(dtype=torch.float32), letters, POOL, TOKENIZER, LOOP) as learner:
        places = [learner._place(number) for number in range(9)]
    assert all(sorted(places[i : i + 3]) == [0, 1, 2] for i in (0, 3, 6)) and len(set(map(tuple, (places[:3], places[3:6], places[6:])))) > 1


def test_rollouts_in_flight_go_on_under_the_next_weights():
    """One slot for three groups: an iteration trains on the first whole one, and tokens say which weights drew them."""
    t = dataclasses.replace(LOOP, prompts=1, ahead=2, slots=3)
    rows, _, (state, _, _) = learned(t, 4)
    assert sum(row["stale"] for row in rows) > 0 and all(row["mismatch"] < 1 for row in rows)
    assert len(state["waiting"]) == 2 and state["submitted"] == 6


def test_a_pool_and_controls_that_cannot_be_are_refused():
    with pytest.raises(RLError, match="pool of prompts is empty"):
        Learner(built(), letters, [], TOKENIZER, LOOP)
    with pytest.raises(RLError, match="control 'short'"):
        RLConfig(control="short")
