"""What the experiments of the report page share: a claim and its verdict, their scale, a small decoder, a way to train it.

    def sparsity(scale):                                  an experiment is a function: Scale → list of Claim
        cells = {f"{experts}-{seed}": {…} for experts in (4, 8) for seed in scale.seeds}
        found = scale.run("sparsity", cells, cell)        # study.run_cells in a folder of its own: finished cells are kept
        …
        return [Claim("sparsity", "K2 report 2.3", "…", "…", str(gain), judge(gain), "loss.png")]

The rule for a verdict stands before the figures: `judge` or `judge_alike`, and `worst` of several. DEP, by quartiles over the batches of one
seed, zero-vision SFT against none, by the upper end of the other's interval, and how much faster a swarm is, by means, have rules of their own
in experiments.py.

Public names: VERDICTS, REPLICATES, DIRECTION, NOT, UNTESTABLE, Claim, judge, judge_alike, worst, Scale, decoder, blend, pretrain, loss_on.
Tests: pytest tests/test_lab.py
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data import Blend
from k25 import K25, K25Config
from sft import train_on
from step import losses
from study import run_cells
from tokenizer import Tokenizer

VERDICTS = REPLICATES, DIRECTION, NOT, UNTESTABLE = (
    "replicates", "direction only", "does not replicate",  # from good to bad
    "not testable at this scale",  # what no toy can decide, so that nothing is run for it
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """One thing that is said of Kimi K2.5, and what came of it here."""

    title: str  # in a few words
    source: str  # where it is said
    says: str  # the claim, with the report's figure
    setup: str  # what was done here
    found: str  # our figure, with its interval
    verdict: str  # one of VERDICTS
    plot: str = ""  # a PNG, relative to the experiment's folder


def judge(gain, least=0.0):
    """The verdict on "A is better than B by at least `least`". gain: study.Estimate of A less B, in the claimed direction.

    It replicates when the interval excludes 0 on the claimed side and reaches `least`; with a mean on the claimed side it is
    direction only; otherwise it does not replicate."""
    if gain.low > 0 and gain.high >= least:
        return REPLICATES
    return DIRECTION if gain.mean > 0 else NOT


def judge_alike(gap, margin):
    """The verdict on "A is as good as B". gap: Estimate of A less B; margin: what still counts as alike.

    It replicates when the whole interval lies within ± margin; with the mean alone within it is direction only."""
    if -margin <= gap.low and gap.high <= margin:
        return REPLICATES
    return DIRECTION if abs(gap.mean) <= margin else NOT


def worst(*verdicts):
    """The verdict on all of several claims together."""
    return max(verdicts, key=VERDICTS.index)


@dataclass(frozen=True)
class Scale:
    """How large the experiments are, and where they are kept."""

    folder: Path  # of all experiments; each has a folder below it
    seeds: tuple = (1, 2, 3, 4, 5)  # seed 0 is for choosing settings
    quick: bool = False  # tiny: shows that everything runs, and nothing else
    workers: int = 2  # processes

    def pick(self, full, quick):
        """One of two sizes."""
        return quick if self.quick else full

    def run(self, name, cells, work, rows=None):
        """study.run_cells for one experiment or shared stage. Returns {name: result}."""
        return run_cells(self.folder / name, cells, work, rows, self.workers, name)


def decoder(seed, **changes):
    """A K25 of preset toy with new weights, some of its fields changed. The tower is as small as it gets unless `vision` is given."""
    toy = K25Config.preset("toy")
    width = changes.get("hidden_size", toy.hidden_size)
    tiny = dataclasses.replace(toy.vision, vt_hidden_size=16, vt_num_attention_heads=2, vt_num_hidden_layers=1, vt_intermediate_size=16,
                               mm_hidden_size=None, text_hidden_size=width)  # fmt: skip
    torch.manual_seed(seed)
    return K25(dataclasses.replace(toy, **({"vision": tiny} | changes)))


def pretrain(model, source, t, log=None, **fields):
    """Train a model on Batches, a row of metrics per step. t: SFTConfig; log: study.Log; fields: added to each row.
    Returns the list of StepResult."""
    began, tokens, results = time.perf_counter(), 0, []
    for step, result in enumerate(train_on(model, source, t)):
        tokens += result.tokens
        results.append(result)
        if log:
            log(step=step, **dataclasses.asdict(result), tokens_per_s=tokens / (time.perf_counter() - began), **fields)
    return results


def blend(sources, ratio, t, seed, split="train", stage="", media=None, tokenizer=None):
    """data.Blend with the rows and length of an SFTConfig. sources: of sources.weighted; ratio: share of vision tokens, 0 … 1."""
    return Blend(sources, ratio, seed, t.rows, t.length, tokenizer or Tokenizer(), media or K25Config.preset("toy").media, split,
                 augment=split == "train", stage=stage)  # fmt: skip


@torch.no_grad()
def loss_on(model, batches):
    """Mean loss over Batches, nats per loss-carrying token."""
    total = number = 0.0
    for batch in batches:
        per_token, _, _ = losses(model, batch, want_max=False)
        total, number = total + per_token.double().sum().item(), number + int(batch.loss_mask.sum())
    return total / number
