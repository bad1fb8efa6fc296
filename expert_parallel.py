"""Routed experts on several ranks: tokens travel to their experts and back — K2.5 report 4.5; GShard, arXiv 2006.16668.

The exchange is one all_to_all_single with ragged splits each way, differentiable, and cut in two so that work between
departure and arrival overlaps with it, in the forward and in the backward pass.

Public names: Flight, ExpertParallel.
Letters: T tokens, C hidden, E experts, K chosen, F expert width.     Tests: pytest tests/test_parallel.py
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from moe import experts_fused, experts_reference, fake_quant, load_counts


class _Depart(torch.autograd.Function):
    """Start sending rows to other ranks. Returns rows as a token for _Arrive; whatever runs between the two overlaps.

    In the backward pass their parts change: _Arrive starts sending the gradients back, and this waits for them.
    """

    @staticmethod
    def forward(ctx, rows, flight):
        ctx.flight = flight
        flight.start(rows, flight.receive, flight.send)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, _):
        return ctx.flight.land(), None


class _Arrive(torch.autograd.Function):
    """Wait for the rows that other ranks have sent to this one."""

    @staticmethod
    def forward(ctx, token, flight):
        ctx.flight = flight
        return flight.land()

    @staticmethod
    def backward(ctx, grad):
        return ctx.flight.start(grad, ctx.flight.send, ctx.flight.receive), None


@dataclass
class Flight:
    """One exchange of rows: send[r] of them to rank r, receive[r] from it; zeros are allowed."""

    send: list
    receive: list
    group: object  # process group
    work: object = None
    cargo: tuple = ()  # (rows that leave, rows that arrive): both must live until the landing

    def start(self, rows, arriving, leaving):
        """Begin; returns the buffer that `land` will have filled."""
        self.cargo = (rows.contiguous(), rows.new_empty(sum(arriving), *rows.shape[1:]))
        self.work = dist.all_to_all_single(self.cargo[1], self.cargo[0], arriving, leaving, group=self.group, async_op=True)
        return self.cargo[1]

    def land(self):
        """Wait; returns the rows that have arrived."""
        self.work.wait()
        (_, arrived), self.cargo, self.work = self.cargo, (), None
        return arrived


class ExpertParallel(nn.Module):
    """This rank's E/ep of a layer's routed experts; tokens travel to the rank that holds their expert, and back.

    Stands in for moe.Experts, with the names of its parameters and its forward.
    experts: moe.Experts — all of the layer's; group: process group of the ep ranks; impl: "reference" | "fused";
    overlap: bool — the tokens go in two halves, of which one travels while the experts work on the other.
    """

    def __init__(self, experts, group, impl, overlap=False):
        super().__init__()
        self.group, self.ranks, self.qat, self.parts = group, dist.get_world_size(group), experts.qat, 1 + overlap
        self.run = experts_fused if impl == "fused" else experts_reference
        for name, weight in experts.named_parameters():
            own = weight.detach().chunk(self.ranks)[dist.get_rank(group)]  # (E/ep,…)
            setattr(self, name, nn.Parameter(own.clone()))

    def forward(self, x, weights, index):
        """x: (T,C) float; weights: (T,K) float; index: (T,K) int64 -> (T,C)."""
        matrices = (self.gate_proj, self.up_proj, self.down_proj)
        if self.qat:
            matrices = tuple(fake_quant(matrix) for matrix in matrices)
        matrices = tuple(matrix.to(x.dtype) for matrix in matrices)
        parts = list(zip(x.tensor_split(self.parts), weights.tensor_split(self.parts), index.tensor_split(self.parts)))
        leaving, arriving = self._announce([index for _, _, index in parts])
        tokens = []  # of each part: what _Arrive will exchange for its rows
        for (x, _, index), send, receive in zip(parts, leaving, arriving):
            order = index.flatten().argsort(stable=True)  # (t·K,) choices by expert, and so by rank
            flight = Flight(send.sum(1).tolist(), receive.sum(1).tolist(), self.group)
            tokens.append((order, flight, _Depart.apply(x[order // index.shape[1]], flight)))
        returns = []
        for (order, flight, token), receive in zip(tokens, arriving):
            rows = _Arrive.apply(token, flight)  # (n,C) by rank, then by expert
            expert = torch.arange(receive.shape[1], device=rows.device).repeat(self.ranks).repeat_interleave(receive.flatten())  # (n,)
            unweighted = torch.ones(len(rows), 1, dtype=weights.dtype, device=rows.device)
            done = self.run(rows, unweighted, expert[:, None], *matrices)  # (n,C)
            back = Flight(flight.receive, flight.send, self.group)
            returns.append((order, back, _Depart.apply(done, back)))
        outputs = []
        for (x, weights, _), (order, flight, token) in zip(parts, returns):
            y = _Arrive.apply(token, flight)[order.argsort()].unflatten(0, weights.shape)  # (t·K,C) -> (t,K,C)
            outputs.append((y * weights[:, :, None]).sum(1).to(x.dtype))  # (t,C)
        return torch.cat(outputs)

    def _announce(self, indices):
        """How many rows of each part travel between which ranks for which expert. indices: list of (t,K) int64.
        Returns leaving, arriving: lists of (ep,E/ep) int64."""
        leaving = torch.stack([load_counts(index, self.ranks * len(self.gate_proj)) for index in indices])  # (parts,E)
        leaving = leaving.unflatten(1, (self.ranks, -1)).transpose(0, 1).contiguous()  # (ep,parts,E/ep)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=self.group)
        return leaving.unbind(1), arriving.unbind(1)
