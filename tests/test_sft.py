"""Claims about sft.py: every document once an epoch, and it learns what carries loss and nothing else.

Run: .venv/bin/python -m pytest tests/test_sft.py
"""

import dataclasses
from collections import Counter
from itertools import islice

import pytest
import torch

from data import Encoded
from k25 import K25
from rollout import Rollout
from sft import SFTConfig, SFTError, batches, documents_of, finetune
from test_rl import CONFIG, TOKENIZER

T = SFTConfig(steps=30, rows=2, length=32, lr=0.02, adamw_lr=0.02, dtype="float32", warmup=3)


def documents(number=6):
    """`a` to `f`, each with an answer of its own; prompts without loss."""
    return [Encoded((65 + i, 58, 97 + i, 97 + i, TOKENIZER.eos), (False, False, True, True, True), (), "made", "text") for i in range(number)]


def test_an_epoch_has_every_document_once_and_the_order_is_the_seeds():
    made = documents(30)
    found = list(islice(batches(made, T, TOKENIZER, 3), 10))
    first = [int(row[i]) for batch in found for row in batch.ids for i in range(32) if 65 <= row[i] < 95]
    assert Counter(first[:30]) == Counter(range(65, 95)) and first[:30] != sorted(first[:30])
    again = list(islice(batches(made, T, TOKENIZER, 3), 10))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(found, again))
    other = next(batches(made, T, TOKENIZER, 4))
    assert not torch.equal(found[0].ids, other.ids)


def test_it_learns_the_answers_and_not_the_prompts():
    torch.manual_seed(0)
    model = K25(CONFIG)
    results = list(finetune(model, documents(), T, TOKENIZER))
    assert results[0].loss > 5 and results[-1].loss < 0.5
    ids = torch.tensor([[65, 58, 97]])
    hidden, _ = model.hidden(model.embed(ids))
    logits = hidden @ model.language_model.lm_head.weight.T
    assert logits[0, 1].argmax() == 97  # behind the colon
    assert logits[0, 0].softmax(-1)[58] < 0.2  # the colon was never to be predicted


def test_zero_steps_change_nothing():
    model = K25(CONFIG)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert not list(finetune(model, documents(), dataclasses.replace(T, steps=0), TOKENIZER))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_rollouts_become_documents_with_loss_where_they_were_sampled():
    rollout = Rollout((1, 2, 3), (False, True, True), (-0.1, -0.2), (0, 0))
    (document,) = documents_of([rollout])
    assert document.ids == rollout.ids and document.loss == rollout.generated and document.modality == "text"


@pytest.mark.parametrize("change, words", [({"rows": 0}, "rows is 0"), ({"steps": -1}, "steps is -1"), ({"dtype": "int8"}, "dtype int8")])
def test_settings_that_make_no_sense_are_refused(change, words):
    with pytest.raises(SFTError, match=words):
        dataclasses.replace(T, **change)


def test_documents_that_cannot_be_trained_on_are_refused():
    with pytest.raises(SFTError, match="no documents"):
        next(batches([], T, TOKENIZER, 0))
    with pytest.raises(SFTError, match="has 5 tokens, a row 4"):
        next(batches(documents(), dataclasses.replace(T, length=4), TOKENIZER, 0))
