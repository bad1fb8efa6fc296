"""Long context by YaRN, and experts in int4, from one small decoder per seed — K2.5 report 2.1, 4.2, 4.3; K2 report 2.4.

                                        ┌─▶ plain RoPE or YaRN, as it is or after a few steps at 8 times the length          yarn
    prose and needles, 128 tokens long ──┤
                                        └─▶ routed experts rounded to int4: as they are, after float steps, after QAT steps   int4

Prose is docstrings, one after the other. A needle is a capital letter among words, one of each of six groups of four: its group is the
key, which of the four it is the value. Asked `?2` at the end, the answer is the letter of group 2 that stood anywhere before; chance is 1/4.

Public names: MODEL, TIMES, propose_prose, propose_needles, lessons, base, extended, quantised, yarn, int4.
Tests: pytest tests/test_context_claims.py
"""

import random
import re
import string
from itertools import islice

import matplotlib.pyplot as plt
import numpy as np
import torch

import evaluate
from data import encode_example, pack_rows
from example import Draft, Source, split_of
from k25 import load, save
from lab import Claim, blend, decoder, judge, judge_alike, loss_on, pretrain
from mla import Yarn
from rl_report import save_figure
from sft import SFTConfig
from sources import propose_docstring
from step import losses
from study import bootstrap
from tokenizer import Tokenizer

MODEL = {
    "hidden_size": 64, "intermediate_size": 192, "moe_intermediate_size": 32, "num_hidden_layers": 2, "n_routed_experts": 8, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16, "rope_theta": 1000.0,
}  # fmt: skip
GROUPS = tuple(string.ascii_uppercase[start : start + 4] for start in range(0, 24, 4))  # a needle is a letter, its key the group that it is of
SHORTEST = 4 * len(GROUPS) + 2  # tokens: every group asked for, no words
RATE, ADAMW_RATE = 1e-2, 6e-3  # peak learning rates
FACTOR = 8  # of the extension
TIMES = (1, 2, 4, 8, 16)  # the trained length, at which needles are sought and prose is read


# ------------------------------------------------------------------------------------------------- data


def propose_prose(rng, length):
    """Docstrings of files of one split, one after the other, as many tokens as asked for."""
    first = propose_docstring(rng)
    parts = [first.turns[0][1]]
    while len("\n".join(parts)) < length:
        following = propose_docstring(rng)
        if split_of(following.key) == split_of(first.key):
            parts.append(following.turns[0][1])
    return Draft((("", "\n".join(parts)[: length - 2]),), key=first.key)  # and a newline, and eos


def _words(rng, length):
    text = ""
    while len(text) < length:
        text += re.sub("[^a-z ]", "", propose_docstring(rng).turns[0][1].lower()) + " "
    start = rng.randint(0, len(text) - length)
    return text[start : start + length]


def propose_needles(rng, length, asked, depth=None):
    """A letter of each group among words, then questions: `?` and, for each, the group's digit, the letter, a newline.

    length: tokens of the document, at least 3·asked + 8; asked: groups that are asked for; depth: where the letter stands that is
    asked for first, 0 … 1; None: anywhere, as all others.
    """
    letters = dict(enumerate(map(rng.choice, GROUPS)))
    groups = rng.sample(range(len(GROUPS)), asked)
    words = _words(rng, length - len(GROUPS) - 3 * asked - 2)
    places = {group: rng.randint(0, len(words)) for group in letters}
    if depth is not None:
        places[groups[0]] = round(depth * len(words))
    for group in sorted(places, key=places.get, reverse=True):  # from the back, so that earlier places stay valid
        words = words[: places[group]] + letters[group] + words[places[group] :]
    turns = [(str(group), letters[group]) for group in groups]
    turns[0] = (f"{words}?{turns[0][0]}", turns[0][1])
    return Draft(tuple(turns), "".join(letters.values()), tuple(GROUPS[groups[-1]]))


def lessons(length):
    """What is learned at a length, as (Source, weight)."""
    return ((Source("needles", "text", "", lambda rng: propose_needles(rng, rng.randint(SHORTEST, length), len(GROUPS))), 4.0),
            (Source("prose", "text", "", lambda rng: propose_prose(rng, length)), 1.0))  # fmt: skip


def _drawn(propose, number, name):
    """The same held-out examples for all seeds and arms. propose: (rng, number of the example) → Draft."""
    return [Source(name, "text", "", lambda rng: propose(rng, i)).draw(random.Random(f"{name} {i}"), "heldout") for i in range(number)]  # noqa: B023


def _found(model, length, asked):
    """1 for each question about a needle in `length` tokens that is answered rightly, else 0; depths spread evenly."""
    examples = _drawn(lambda rng, i: propose_needles(rng, length, 1, (i + 0.5) / asked), asked, f"needles {length}")
    chosen = evaluate.answer(model, examples, Tokenizer(), rows=max(16384 // length, 4))
    return [int(example.choices[choice] == example.answer) for example, choice in zip(examples, chosen)]


@torch.no_grad()
def _read(model, length, documents):
    """Loss at every token of held-out prose, (documents,length), as lists."""
    tokenizer, found = Tokenizer(), []
    for example in _drawn(lambda rng, _: propose_prose(rng, length), documents, f"prose {length}"):
        batch = pack_rows([encode_example(example, tokenizer, model.config.media)], 1, length, tokenizer)
        found.append(losses(model, batch, want_max=False)[0][0].tolist())
    return found


# ------------------------------------------------------------------------------------------------ cells


def base(folder, name, log, seed, steps, rows, length):
    """The decoder that all start from, trained at the short length."""
    model, t = decoder(seed, **MODEL), SFTConfig(steps, rows, length, lr=RATE, adamw_lr=ADAMW_RATE, dtype="float32")
    results = pretrain(model, blend(lessons(length), 0.0, t, seed), t, log)
    save(model, folder / "models" / name)
    return {"loss": results[-1].loss}


def _base(folder, seed, **runtime):
    return load(folder.parent / "stages" / "models" / f"context-{seed}", dtype=torch.float32, **runtime)


def extended(folder, name, log, arm, seed, factor, times, steps, rows, length, asked, documents):
    """One arm of `yarn`: the base with `factor` times its length, its needles by length and its loss by position."""
    model = decoder(seed, **MODEL, yarn=Yarn(float(factor) if "yarn" in arm else 1.0, length))
    model.load_state_dict(_base(folder, seed).state_dict())
    if "tuned" in arm:
        t = SFTConfig(steps, rows, factor * length, lr=RATE / 4, adamw_lr=ADAMW_RATE / 4, warmup=5, dtype="float32")
        pretrain(model, blend(lessons(t.length), 0.0, t, seed, stage="long"), t, log)
    read = np.reshape(_read(model, max(times) * length, documents), (documents, -1, length // 2)).mean(axis=2)
    return {"needles": {str(n): _found(model, n * length, asked) for n in times}, "loss": read.round(5).tolist()}


def quantised(folder, name, log, arm, seed, steps, rows, length, asked, batches):
    """One arm of `int4`: the base as it is, after more steps, or after as many with experts that are rounded in each forward pass
    (QAT); each as it is and with its routed experts written as int4 and read again."""
    model, t = _base(folder, seed, qat=arm == "qat"), SFTConfig(steps, rows, length, lr=RATE / 4, adamw_lr=ADAMW_RATE / 4, warmup=5, dtype="float32")
    if arm != "base":
        pretrain(model, blend(lessons(length), 0.0, t, seed, stage="more"), t, log)
    held_out = list(islice(blend(lessons(length), 0.0, t, 0, "heldout"), batches))
    where = folder / "models" / name
    save(model, where)
    save(model, folder / "models" / f"{name}-int4", int4=True)
    found = {}
    for kind, place in (("float", where), ("int4", f"{where}-int4")):
        model = load(place, dtype=torch.float32)
        found[kind] = {"loss": [loss_on(model, [batch]) for batch in held_out], "right": _found(model, length, asked)}
    return found
