"""What wrong numbers look like: a factor, a transposed axis, a shift by one, a few wrong rows. Knows nothing of K25.

Public names: pattern, shape_pattern, shape_text.
Tests: pytest tests/test_divergence.py
"""

import math

import torch


def shape_text(tensor):
    """(1,40,24)."""
    return "(" + ",".join(map(str, tensor.shape)) + ")"


def shape_pattern(theirs, ours):
    """What a tensor of another shape than ours may be, in words."""
    if theirs.numel() != ours.numel():
        return "another number of values"
    if _alike(theirs.flatten(), ours.flatten()):
        return "the right values in another shape"
    if theirs.ndim == ours.ndim and theirs.ndim > 1:
        for i in range(theirs.ndim):
            for j in range(i):
                swapped = theirs.transpose(i, j)
                if swapped.shape == ours.shape and _alike(swapped, ours):
                    return f"axes {j} and {i} are transposed"
    return "as many values, in another shape and order"


def _alike(theirs, ours):
    scale = ours.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if ours.numel() else 0.0
    return torch.allclose(theirs.double().to(ours.device), ours.double(), rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


def pattern(theirs, ours):
    """What wrong numbers look like when no suspect gives them. theirs, ours: of one shape. Returns words."""
    if not theirs.is_floating_point():
        return f"{(theirs != ours).double().mean():.0%} of the values differ"
    theirs, ours = theirs.double().cpu(), ours.double().cpu()
    if not theirs.isfinite().all():
        return f"{(~theirs.isfinite()).double().mean():.0%} of the values are infinite or no number"
    if not ours.isfinite().all():
        return f"{(~ours.isfinite()).double().mean():.0%} of the values should be infinite or no number, and are not"
    if not theirs.any() and ours.any():
        return "all zeros"
    ratio = theirs[ours != 0] / ours[ours != 0]
    if len(ratio) > 1 and ratio.std() < 1e-3 * ratio.mean().abs():
        if abs(ratio.mean() - 1) > 1e-3:
            return f"every value is {ratio.mean():.6g} times what it should be: a factor is missing or applied twice"
    gap = (theirs - ours).abs()
    if gap.numel() > 4 and gap.max() <= 2**-8 * ours.abs().max() and (gap <= 2**-7 * ours.abs()).double().mean() > 0.9:
        return "right to about 8 bits: something is rounded to bfloat16 on the way"
    for i in range(ours.ndim):
        for j in range(i):
            if ours.shape[i] == ours.shape[j] > 1 and _alike(theirs.transpose(i, j), ours):
                return f"axes {j} and {i} are transposed"
    for axis in range(ours.ndim):
        if found := _moved(theirs.movedim(axis, 0), ours.movedim(axis, 0)):
            return f"{found} along axis {axis}"
    if gap.max() <= 2**-8 * ours.abs().max():
        return f"within {gap.max() / ours.abs().max():.1e} of the largest value: rounding on the way, or a small term such as eps"
    if _alike(theirs.flatten().sort().values, ours.flatten().sort().values):
        return "the right values in the wrong places"
    for axis in range(ours.ndim):
        bad = gap.movedim(axis, 0).reshape(gap.shape[axis], -1).amax(dim=1) > 1e-3 * ours.abs().max()
        if 0 < bad.sum() < len(bad):
            where = bad.nonzero()[:, 0].tolist()
            if not bad[0] and bad[1:].all():
                return f"the first of axis {axis} is right and all others are wrong: it depends on the position"
            return f"wrong only at {_few(where)} of axis {axis}"
    return f"unknown; {(gap > 1e-3 * ours.abs().max()).double().mean():.0%} of the values are wrong"


def _moved(theirs, ours):
    """How the slices of the first axis were moved, in words, or None."""
    count = len(ours)
    if not 1 < count <= 4096:
        return None
    for step in (1, -1):
        kept = slice(1, None) if step > 0 else slice(None, -1)
        source = slice(None, -1) if step > 0 else slice(1, None)
        if count > 2 and _alike(theirs[kept], ours[source]):
            return f"off by one position ({'late' if step > 0 else 'early'})"
    distance = torch.cdist(theirs.reshape(count, -1), ours.reshape(count, -1))  # (count,count)
    near, place = distance.min(dim=1)
    if near.max() > 1e-3 * ours.abs().max() * math.sqrt(ours[0].numel()) or len(place.unique()) < count:
        return None
    if torch.equal(place, torch.arange(count)):  # each where it belongs, and slightly off
        return None
    if count % 2 == 0 and count > 4 and torch.equal(place, _even_then_odd(count)):
        return "even slices first, then odd ones (halves where adjacent pairs were expected)"
    if count % 2 == 0 and count > 4 and torch.equal(place.argsort(), _even_then_odd(count)):
        return "first and second half interleaved (adjacent pairs where halves were expected)"
    return f"slices in another order, {_few(place.tolist())},"


def _even_then_odd(count):
    return torch.cat((torch.arange(0, count, 2), torch.arange(1, count, 2)))


def _few(numbers):
    return str(numbers if len(numbers) <= 12 else numbers[:12] + ["…"]).replace("'", "")
