"""Supervised fine-tuning on conversations: packed rows, MuonClip, loss on what an assistant said — K2.5 report 2.2, 2.3.

    documents = [encode(trace) for trace in collected.traces]            data.Encoded, of traces.py or of good rollouts
    for result in finetune(model, documents, SFTConfig(steps=200), tokenizer, seed=0): print(result.loss)

Documents are drawn in seeded epochs, each packed into the first row with room; who finds none opens the next batch. The step
is that of pre-training (step.py).

Public names: SFTConfig, SFTError, batches, train_on, finetune, documents_of.     Tests: pytest tests/test_sft.py
"""

import random
from dataclasses import dataclass

import torch

from data import Encoded, pack_rows
from optim import MuonClip, lr_at
from step import train_step


class SFTError(ValueError):
    """Settings or documents that cannot be trained on; one line says which."""


@dataclass(frozen=True)
class SFTConfig:
    """How a model is fine-tuned; each field is a flag with `sft-` before it."""

    steps: int = 450
    rows: int = 6  # B: packed rows per step
    length: int = 640  # T: tokens per row
    lr: float = 2e-3  # peak learning rate of Muon's matrices
    adamw_lr: float = 1e-3  # of everything else
    weight_decay: float = 0.02
    warmup: int = 20  # steps
    floor: float = 0.05  # share of the peak rates that is left at the end
    dtype: str = "bfloat16"  # float32 | bfloat16 (autocast over float32 weights)
    clip_norm: float = 1.0  # largest gradient norm
    qk_clip: float = 100.0  # τ of QK-Clip
    balance_gamma: float = 0.002  # γ of the router bias
    recompute: str = "none"  # as in train_small.py, as the next two
    fp8: bool = False
    offload: bool = False

    def __post_init__(self):
        for name in ("rows", "length"):
            if getattr(self, name) < 1:
                raise SFTError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.steps < 0:
            raise SFTError(f"steps is {self.steps}: it must be at least 0")
        if self.dtype not in ("float32", "bfloat16"):
            raise SFTError(f"dtype {self.dtype}: choose float32 or bfloat16")


def batches(documents, t, tokenizer, seed):
    """Endless Batches of whole documents, each once per epoch, in an order that depends on the seed alone.

    documents: list of data.Encoded; t: SFTConfig. Raises SFTError when there is none, or one is longer than a row.
    """
    longest = max(documents, key=lambda d: len(d.ids), default=None)
    if longest is None:
        raise SFTError("no documents: nothing to learn from")
    if len(longest.ids) > t.length:
        raise SFTError(f"a document of {longest.source} has {len(longest.ids)} tokens, a row {t.length}: raise the length")
    rng, taken, free = random.Random(seed), [], [t.length] * t.rows
    while True:
        for document in rng.sample(documents, len(documents)):
            row = next((row for row, room in enumerate(free) if room >= len(document.ids)), None)
            if row is None:
                yield pack_rows(taken, t.rows, t.length, tokenizer)
                row, taken, free = 0, [], [t.length] * t.rows
            taken.append(document)
            free[row] -= len(document.ids)


def train_on(model, source, t, optimizer=None):
    """Take t.steps optimizer steps on Batches; yields each one's StepResult. The rates rise and fall.

    model: K25; source: iterator of Batch; optimizer: default a new MuonClip of all that requires a gradient; another must
    carry `peak_lr` in each of its groups.
    """
    weight = model.language_model.lm_head.weight
    optimizer = optimizer or MuonClip.from_named(
        model.named_parameters(), t.lr, t.adamw_lr, weight_decay=t.weight_decay, ns_dtype=torch.bfloat16 if t.dtype == "bfloat16" else None)  # fmt: skip
    for step in range(t.steps):
        factor = lr_at(step, min(t.warmup, t.steps // 4), t.steps, 1.0, t.floor)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        yield train_step(model, optimizer, [next(source).to(weight.device, weight.dtype)], t)


def finetune(model, documents, t, tokenizer, seed=0):
    """`train_on` whole documents, in an order that depends on the seed."""
    return train_on(model, batches(documents, t, tokenizer, seed) if t.steps else iter(()), t)


def documents_of(rollouts, source="rollout"):
    """Rollouts as documents, their generated tokens with loss: for rejection-sampling fine-tuning (`objective.rft_select`)."""
    return [Encoded(r.ids, r.generated, r.items, source, "vision" if r.items else "text") for r in rollouts]
