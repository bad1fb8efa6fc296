"""When each pipeline rank does what: torch's own schedules as tables, run on paper — K2.5 report 4.5, interleaved 1F1B.

The mesh and the schedule are the real ones, built in one process over a fake process group; nothing is sent.

Public names: pretended, Work, schedule_tables, Span, simulate, bubble, waiting, predict_bubble, most_in_flight, draw_spans.
Tests: pytest tests/test_planner.py
"""

import contextlib
import functools
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from parallel import ParallelError, Place


@contextlib.contextmanager
def pretended(world, rank=0):
    """A process group of `world` ranks of which only this one exists; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    if dist.is_initialized():
        raise ParallelError("planning needs a process without a process group: run it outside torchrun")
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Set timeout")  # Place sets one, and where nothing is sent nothing can be late
            yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Work:
    """One forward (F) or backward (B) pass of a microbatch through a stage."""

    kind: str
    stage: int
    microbatch: int


@functools.cache
def schedule_tables(layout):
    """What every pipeline rank does, in order, by the schedule that the Trainer would run.

    Returns {rank: list of Work}, read off torch's schedule on the real mesh.
    """
    with pretended(layout.pp * layout.dp):
        place = Place(layout)
        x = torch.empty(1, 1, device="meta", requires_grad=True)
        stages = [PipelineStage(nn.Identity(), stage, layout.stages, torch.device("cpu"), input_args=(x,), output_args=(x,), group=place.pp)
                  for stage in range(0, layout.stages, layout.pp)]  # fmt: skip
        settings = dict(n_microbatches=layout.microbatches, loss_fn=lambda out, _: out.sum(), scale_grads=False)
        if layout.virtual_stages == 1:
            orders = Schedule1F1B(stages[0], **settings)._get_pipeline_order()
        else:
            orders = ScheduleInterleaved1F1B(stages, **settings).pipeline_order
    kinds, tables = {"FORWARD": "F", "FULL_BACKWARD": "B"}, {}
    for rank, order in orders.items():
        seen, tables[rank] = {}, []  # numbered here: the table that torch prints for 1F1B begins at 1 on the last rank
        for kind, stage in [(kinds[a.computation_type.name], a.stage_index) for a in order if a and a.computation_type.name in kinds]:
            tables[rank].append(Work(kind, stage, seen.setdefault((kind, stage), 0)))
            seen[kind, stage] += 1
    return tables


@dataclass(frozen=True)
class Span:
    """When a rank does a piece of work, in seconds."""

    rank: int
    work: Work
    start: float
    end: float


def simulate(tables, forward, backward, transfer=0.0):
    """Run the tables: each rank in its order, each piece as soon as what it needs has arrived.

    F of a stage needs F of the stage before; B needs its own F and B of the stage after. tables: as schedule_tables;
    forward, backward: seconds per stage, or of each stage a list over its microbatches; transfer: seconds from rank to
    rank. Returns a list of Span.
    """
    owner = {work.stage: rank for rank, order in tables.items() for work in order}
    last, done, spans = max(owner), {}, []
    clock, at = dict.fromkeys(tables, 0.0), dict.fromkeys(tables, 0)

    def ready(rank, work):
        step = -1 if work.kind == "F" else 1
        needs = [Work("F", work.stage, work.microbatch)] if work.kind == "B" else []
        if 0 <= work.stage + step <= last:
            needs.append(Work(work.kind, work.stage + step, work.microbatch))
        if any(need not in done for need in needs):
            return None
        return max([clock[rank]] + [done[need] + transfer * (owner[need.stage] != rank) for need in needs])

    while len(done) < sum(map(len, tables.values())):
        before = len(done)
        for rank, order in tables.items():
            while at[rank] < len(order) and (start := ready(rank, order[at[rank]])) is not None:
                work = order[at[rank]]
                seconds = (forward if work.kind == "F" else backward)[work.stage]
                clock[rank] = done[work] = start + (seconds[work.microbatch] if isinstance(seconds, list) else seconds)
                spans.append(Span(rank, work, start, clock[rank]))
                at[rank] += 1
        if len(done) == before:
            raise ParallelError("the schedule waits for itself: its tables cannot be run")
    return spans


def bubble(spans):
    """Share of all ranks' time, from 0 to the last end, in which they wait."""
    shares = waiting(spans).values()
    return sum(shares) / len(shares)


def waiting(spans):
    """{rank: share of the time, from 0 to the last end, in which it waits}."""
    whole, busy = max(span.end for span in spans), {}
    for span in spans:
        busy[span.rank] = busy.get(span.rank, 0.0) + span.end - span.start
    return {rank: 1 - busy[rank] / whole for rank in sorted(busy)}


def predict_bubble(layout, forward, backward, transfer=0.0):
    """The bubble of a layout's schedule. forward, backward: seconds per stage; transfer: seconds from rank to rank."""
    return bubble(simulate(schedule_tables(layout), forward, backward, transfer))


def most_in_flight(order, kept, working=None):
    """The most that a rank ever holds: kept bytes of each (stage, microbatch) from its F to its B, and what B works in.

    order: list of Work; kept, working: per stage. With kept of ones it counts microbatches.
    """
    held, most = 0, 0
    for work in order:
        held += kept[work.stage] if work.kind == "F" else 0
        most = max(most, held + (working[work.stage] if working and work.kind == "B" else 0))
        held -= kept[work.stage] if work.kind == "B" else 0
    return most


SHADES = {"F": ("#9ecae1", "#3182bd", "#6baed6", "#08519c"), "B": ("#fdd0a2", "#e6550d", "#fdae6b", "#a63603")}


def draw_spans(axes, spans, layout, first=0.0, last=None):
    """Draw a timeline into matplotlib axes: a row per rank, forward blue, backward orange, a shade per stage of the rank.

    first, last: seconds, what part of it. Microbatches are numbered where there is room, and beside each rank stands
    the share of the whole time that it waits.
    """
    from matplotlib.patches import Patch

    last = max(span.end for span in spans) if last is None else last
    short = (last - first) / 110
    for rank in range(layout.pp):
        own = [span for span in spans if span.rank == rank and span.end > first and span.start < last]
        shades = [SHADES[span.work.kind][span.work.stage // layout.pp % 4] for span in own]
        thin = sum(span.end - span.start for span in own) / max(len(own), 1) < short / 4
        axes.broken_barh([(span.start, span.end - span.start) for span in own], (rank - 0.43, 0.86), facecolors=shades,
                         edgecolors="white", linewidth=0 if thin else 0.4)  # fmt: skip
        for span in own:
            if span.end - span.start > short and first <= (span.start + span.end) / 2 <= last:
                light = span.work.stage // layout.pp % 2 == 0
                axes.text((span.start + span.end) / 2, rank, span.work.microbatch, ha="center", va="center", fontsize=7,
                          color="black" if light else "white")  # fmt: skip
        axes.text(1.005, rank, f"waits {waiting(spans)[rank]:.0%}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    handles = [Patch(color=SHADES[kind][v % 4], label=f"{word}, stages {v * layout.pp} … {(v + 1) * layout.pp - 1}")
               for kind, word in (("F", "forward"), ("B", "backward")) for v in range(layout.virtual_stages)]  # fmt: skip
    axes.legend(handles=handles, ncol=len(handles), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=9)
    axes.set_yticks(range(layout.pp), [f"rank {rank}" for rank in range(layout.pp)])
    axes.set(xlim=(first, last), ylim=(layout.pp - 0.5, -0.5), xlabel="seconds")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
