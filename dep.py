"""DEP: the vision encoder decoupled from the pipeline — K2.5 report, appendix C.

Pictures differ in size and arrive unevenly, and only the first pipeline stage needs them; encoded there, they make it
the slowest stage and the one that runs out of memory. So each step has three phases:

    1  balanced_forward     every process encodes its even share of the global batch's items, keeping no activations;
                            the embeddings travel to the first stage of the replica that reads them
    2  (parallel.py)        the pipeline trains the backbone on them as on any leaf: `leaves`; it never sees a picture
    3  recompute_backward   the gradients of the embeddings travel back (`leaf_gradients`); each owner encodes its share
                            again, now with the graph, and goes backward

The weights of the tower and projector stand on every process; their gradients are summed over all of them.

Public names: PREFIXES, Item, partition, imbalance, share_out, encode, balanced_forward, leaves, leaf_gradients,
recompute_backward, deliver.
Letters: C hidden, L patches, I media items, M merged media tokens.     Tests: pytest tests/test_dep.py
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from media import merged_tokens

PREFIXES = ("vision_tower.", "mm_projector.")  # names of the parameters that DEP moves out of the pipeline


@dataclass(frozen=True)
class Item:
    """One picture, or one chunk of a clip, of the global batch."""

    batch: int  # the microbatch that holds it
    first: int  # its first patch there
    grid: tuple  # frames, rows and columns of patches
    owner: int  # rank that encodes it
    reader: int  # rank of the first pipeline stage that needs its embeddings

    @property
    def patches(self):
        """What it costs to encode."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def tokens(self):
        """Embeddings that it becomes."""
        return merged_tokens(self.grid)


def partition(costs, ranks):
    """Deal items to ranks, the dearest first, each to the rank with the least so far.

    Ties go to the earlier item and the lower rank, so that every process finds the same partition by itself.
    costs: list of int — patches per item; ranks: int. Returns the rank of each item.
    Source: Graham's longest-processing-time rule, at most 4/3 of the best possible maximum.
    """
    load, owners = [0] * ranks, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        owners[item] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owners[item]] += costs[item]
    return owners


def imbalance(costs, owners, ranks):
    """Largest load / mean load of the ranks, 1 when even or when there is nothing to do."""
    load = [0] * ranks
    for cost, owner in zip(costs, owners):
        load[owner] += cost
    return max(load) * ranks / sum(load) if sum(load) else 1.0


def share_out(batches, ranks, readers):
    """Who encodes and who reads each item of a global batch.

    batches: list of Batch; ranks: int — processes that encode; readers: list of int — the rank that reads each batch's
    embeddings. Returns a list of Item, by batch and then by place in it.
    """
    found = []  # (batch, first patch, grid)
    for number, batch in enumerate(batches):
        first = 0
        for t, h, w in batch.grid_thw.tolist() if batch.grid_thw is not None else ():
            found.append((number, first, (t, h, w)))
            first += t * h * w
    owners = partition([t * h * w for _, _, (t, h, w) in found], ranks)
    return [Item(number, first, grid, owner, readers[number]) for (number, first, grid), owner in zip(found, owners)]


def encode(model, batches, items):
    """Embeddings of some items in one packed call, in the weights' dtype whatever autocast computed in.

    model: K25, or what keep_units left of it; batches: list of Batch; items: list of Item. Returns (Σ tokens,C).
    """
    weight = model.mm_projector.proj[0].weight
    patches = torch.cat([batches[item.batch].patches[item.first : item.first + item.patches] for item in items])
    grids = torch.tensor([item.grid for item in items], device=weight.device)  # (I,3)
    return model.mm_projector(model.vision_tower(patches.to(weight), grids)).to(weight.dtype)


@torch.no_grad()
def balanced_forward(model, batches, items, rank):
    """Phase 1: the embeddings of the items that this rank owns, without a graph. Returns {Item: (tokens,C)}."""
    own = [item for item in items if item.owner == rank]
    if not own:
        return {}
    return dict(zip(own, encode(model, batches, own).split([item.tokens for item in own])))


def leaves(items, embedded):
    """Phase 2 begins: one leaf per microbatch, its items in order, for the backbone to leave gradients in.

    embedded: {Item: (tokens,C)} of the items that this rank reads. Returns {microbatch: (M,C) requiring grad}.
    """
    mine = [item for item in items if item in embedded]
    return {number: torch.cat([embedded[item] for item in mine if item.batch == number]).requires_grad_()
            for number in sorted({item.batch for item in mine})}  # fmt: skip


def leaf_gradients(items, media):
    """Phase 2 ends: the gradient of each item's embeddings. media: {microbatch: leaf}. Returns {Item: (tokens,C)}."""
    gradients = {}
    for number, leaf in media.items():
        mine = [item for item in items if item.batch == number]
        gradients |= zip(mine, leaf.grad.split([item.tokens for item in mine]))
    return gradients


def recompute_backward(model, batches, items, rank, gradients):
    """Phase 3: encode this rank's items again, with the graph, and go backward into the tower's and projector's weights.

    gradients: {Item: (tokens,C)} of the items that it owns. Summed over all ranks, the weights' gradients are those of
    one backward pass through everything, whoever owned what.
    """
    own = [item for item in items if item.owner == rank]
    if own:
        encode(model, batches, own).backward(torch.cat([gradients[item] for item in own]))


def deliver(pieces, items, source, target, empty, group):
    """Send every item's embeddings, or their gradients, from one side to the other in one exchange.

    pieces: {Item: (tokens,C)} on this side; source, target: "owner" and "reader", or the other way round; empty: (0,C),
    for dtype and device; group: process group of all ranks. Everybody knows all sizes, so none are sent, and a rank
    with nothing to send or to get takes part with zeros. Returns {Item: (tokens,C)}.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    leaving = sorted((i for i in items if getattr(i, source) == rank), key=lambda i: getattr(i, target))
    arriving = sorted((i for i in items if getattr(i, target) == rank), key=lambda i: getattr(i, source))
    send = [sum(i.tokens for i in leaving if getattr(i, target) == other) for other in range(ranks)]
    receive = [sum(i.tokens for i in arriving if getattr(i, source) == other) for other in range(ranks)]
    rows = torch.cat([empty, *(pieces[i] for i in leaving)])  # (Σ send,C)
    out = empty.new_empty(sum(receive), empty.shape[1])
    dist.all_to_all_single(out, rows, receive, send, group=group)
    return dict(zip(arriving, out.split([i.tokens for i in arriving])))
