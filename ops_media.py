"""The operations around the vision tower: pictures and clips to patches, media tokens into the text — K2.5 report 4.2.

Public names: patchify, resize_plan, frame_indices, timestamp, media_tokens, media_splice, GRIDS, OPS.
Letters: L patches, M merged media tokens, C hidden, B batch, T tokens; p patch size; t, h, w frames, patch rows and
patch columns of one item.     Tests: pytest tests/test_ops_media.py
"""

import math

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from media import MediaConfig, merged_tokens
from media import frame_indices as _frame_indices
from media import patchify as _patchify
from media import resize_plan as _resize_plan
from media import timestamp as _timestamp
from op import Op, Suspect, normal

_ALL = (torch.float32, torch.bfloat16, torch.float64)
_SIDES = st.sampled_from([2, 4, 6])
GRIDS = st.lists(st.tuples(st.integers(1, 4), _SIDES, _SIDES), min_size=1, max_size=3)  # packs, images and clips mixed


# Pictures to patches


def patchify(pixels, patch_size):
    """Cut frames into square patches.

        patches[(f·h + i)·w + j, (c·p + dy)·p + dx] = pixels[f, i·p + dy, j·p + dx, c]

    pixels: (t,h·p,w·p,3) float — h and w even; patch_size: int — p, in pixels. Returns patches (t·h·w,3·p·p), frame by
    frame, row by row, each flattened as a convolution reads: channel, dy, dx. Source: the released image processor.
    """
    return _patchify(pixels, patch_size)


@st.composite
def _patchify_cases(draw):
    t, h, w, p = draw(st.integers(1, 3)), draw(_SIDES), draw(_SIDES), draw(st.integers(1, 3))
    return {"pixels": normal(draw, t, h * p, w * p, 3), "patch_size": p}


def _cut(pixels, p, *order):
    """The patches with the axes (t,h,dy,w,dx,channel) in another order."""
    t, height, width, _ = pixels.shape
    return pixels.reshape(t, height // p, p, width // p, p, 3).permute(order).reshape(-1, 3 * p * p)


def _patches_by_block(pixels, p):
    t, height, width, _ = pixels.shape
    blocks = pixels.reshape(t, height // p // 2, 2, p, width // p // 2, 2, p, 3)  # (t,h/2,2,dy,w/2,2,dx,3)
    return blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3 * p * p)


def resize_plan(width, height, limit, patch_size, side_limit):
    """The size to which a picture is resized, and the size to which it is then padded with black.

        scale = min(1, √(limit / (max(1,⌊width/p⌋) · max(1,⌊height/p⌋))), side_limit·p/width, side_limit·p/height)
        new = min(max(1, ⌊side · scale⌋), side_limit·p) of either side;  padded = new, up to a multiple of 2p

    width, height: int — pixels; limit: int — most patches, before padding; patch_size: int — p, in pixels;
    side_limit: int — most patches along one side, even. Returns width, height, padded_width, padded_height, int each.
    Raises ValueError if a size or the limit is not positive. Source: the released image processor.
    """
    cfg = MediaConfig(patch_size=patch_size, patch_limit_on_one_side=side_limit)
    plan = _resize_plan(width, height, limit, cfg)
    return plan.width, plan.height, plan.padded_width, plan.padded_height


@st.composite
def _resize_cases(draw):
    p = draw(st.sampled_from([14, 4, 5]))
    limit, side = draw(st.sampled_from([(16, 8), (64, 16), (9, 8), (4096, 512)]))
    kind, across = draw(st.sampled_from(["budget", "small", "strip"])), draw(st.booleans())
    if kind == "small":
        long, short = draw(st.integers(1, math.isqrt(limit) * p)), draw(st.integers(1, math.isqrt(limit) * p))
    elif kind == "budget":
        least = (math.isqrt(limit) + 1) * p
        long, short = draw(st.integers(least, 4 * least)), draw(st.integers(least, 2 * least))
    else:  # a strip, whose long side passes the limit of one side
        long, short = side * p * draw(st.sampled_from([2, 4])), draw(st.integers(1, 3 * p))
    # Sizes that come out whole up to rounding are left out: there the order of operations would decide.
    scale = min(1.0, _scale(long, short, limit, p, side))
    assume(scale in (1.0, 0.5, 0.25) or all(abs(s * scale - round(s * scale)) > 1e-6 for s in (long, short)))
    width, height = (long, short) if across else (short, long)
    return {"width": width, "height": height, "limit": limit, "patch_size": p, "side_limit": side}


def _scale(width, height, limit, p, side):
    patches = max(1, width // p) * max(1, height // p)
    return min(math.sqrt(limit / patches), side * p / width, side * p / height)


def _scaled(width, height, scale, p, whole=int):
    """The plan of a given scale, where no side can pass its limit."""
    new = max(1, whole(width * scale)), max(1, whole(height * scale))
    return *new, *(-(-side // (2 * p)) * 2 * p for side in new)


def _enlarges(width, height, limit, p, side):
    return _scaled(width, height, _scale(width, height, limit, p, side), p)


def _budget_after_padding(width, height, limit, p, side):
    blocks = -(-width // (2 * p)) * -(-height // (2 * p))
    return _scaled(width, height, min(1.0, math.sqrt(limit / (4 * blocks)), side * p / width, side * p / height), p)


def _no_square_root(width, height, limit, p, side):
    patches = max(1, width // p) * max(1, height // p)
    return _scaled(width, height, min(1.0, limit / patches, side * p / width, side * p / height), p)


def _sides_cut_apart(width, height, limit, p, side):
    scale = min(1.0, _scale(width, height, limit, p, 1 << 40))
    width, height = (min(s * scale, side * p) for s in (width, height))
    return _scaled(width, height, 1.0, p)


# Clips to frames


def frame_indices(count, source_fps, sample_fps, max_frames):
    """Which frames of a clip are looked at: evenly spaced, the first and the last among them.

        n = max(1, round(count · min(sample_fps, source_fps) / source_fps)), at most max_frames
        indices[k] = round(k · (count − 1) / (n − 1))

    count: int — frames of the clip; source_fps: float — its rate; sample_fps: float — the rate looked at, 2 in the
    release; max_frames: int or None — no limit. Returns indices: list of n int. Source: the released processor.
    """
    cfg = MediaConfig(sample_fps=sample_fps, max_num_frames_each_video=max_frames)
    return _frame_indices(count, source_fps, cfg)


@st.composite
def _frame_cases(draw):
    # An even number of frames divides the clip into an odd number of steps: no position lies halfway between two frames,
    # where one rounding goes up and another to even.
    kind, max_frames = draw(st.sampled_from(["long", "slow", "long", "short"])), draw(st.sampled_from([None, 4, None, 2]))
    if kind == "slow":  # slower than it is looked at
        count, source_fps, sample_fps = draw(st.integers(1, 12)), draw(st.sampled_from([1.0, 0.5])), 2.0
    elif kind == "short":  # shorter than half a step
        count, source_fps, sample_fps = draw(st.integers(1, 5)), draw(st.sampled_from([30.0, 24.0])), 2.0
    else:
        source_fps, sample_fps = draw(st.sampled_from([30.0, 24.0, 29.97])), draw(st.sampled_from([2.0, 1.0, 4.0]))
        step = round(source_fps / sample_fps)
        change = draw(st.integers(1, step // 3)) * draw(st.sampled_from([-1, 1]))  # rounded up, rounded down
        count = step * draw(st.sampled_from([4, 8, 6])) + change
    return {"count": count, "source_fps": source_fps, "sample_fps": sample_fps, "max_frames": max_frames}


def _number(count, source_fps, sample_fps, max_frames, whole=round):
    n = max(1, whole(count * min(sample_fps, source_fps) / source_fps))
    return n if max_frames is None else min(n, max_frames)


def _spread(count, n, whole=np.round, **options):
    return whole(np.linspace(0, count - 1, n, **options)).astype(int).tolist()


def _faster_than_source(count, source_fps, sample_fps, max_frames):
    n = max(1, round(count * sample_fps / source_fps))
    return _spread(count, n if max_frames is None else min(n, max_frames))


def _stride(count, source_fps, sample_fps, max_frames):
    return list(range(0, count, max(1, round(source_fps / sample_fps))))[:max_frames]


def _middles(count, source_fps, sample_fps, max_frames):
    n = _number(count, source_fps, sample_fps, max_frames)
    return [int((k + 0.5) * count / n) for k in range(n)]


def timestamp(seconds):
    """A time as it is written before the chunk of a clip: hh:mm:ss.fff. Milliseconds are cut, not rounded.

    seconds: float — since the clip began, at least 0. Returns text: str, 125.8126 → "00:02:05.812".
    Source: K2.5 report 4.2; the released processor.
    """
    return _timestamp(seconds)


@st.composite
def _timestamp_cases(draw):
    # 64ths of a second: a binary fraction, so that no rounding decides, with milliseconds that are no whole number
    parts = st.integers(0, 23), st.integers(0, 59), st.integers(0, 59), st.integers(0, 63)
    hours, minutes, seconds, ticks = (draw(part) for part in parts)
    return {"seconds": 3600.0 * hours + 60 * minutes + seconds + ticks / 64}


def _clock(seconds):
    return int(seconds // 3600), int(seconds // 60 % 60), int(seconds % 60), int(seconds % 1 * 1000)


# Media in the text


def media_tokens(grids):
    """How many `<|media_pad|>` each item takes in the text.

        count = (h/2)·(w/2), whatever t is

    grids: list of (t,h,w), h and w even. Returns counts: list of int, one per item. Source: K2.5 report 4.2.
    """
    return [merged_tokens(grid) for grid in grids]


def media_splice(embedded, ids, media, media_id):
    """Put the media embeddings in the places of `<|media_pad|>`, in the order of the text, row after row.

        x[b,t] = media[n] if ids[b,t] = media_id, n the number of such places before (b,t); else embedded[b,t]

    embedded: (B,T,C) float — of all tokens; ids: (B,T) int; media: (M,C) float; media_id: int. Returns x (B,T,C), dtype
    of embedded. Raises ValueError, with both counts, if there are not exactly M places. Source: K2.5 report 4.1.
    """
    places = ids == media_id  # (B,T)
    if int(places.sum()) != len(media):
        raise ValueError(f"the text has {int(places.sum())} places for media, but {len(media)} embeddings were given")
    return embedded.masked_scatter(places[..., None], media.to(embedded.dtype))


@st.composite
def _splice_cases(draw):
    batch, length, width = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    ids = torch.tensor(draw(st.lists(st.sampled_from([7, 1, 7, 2]), min_size=batch * length, max_size=batch * length)))
    return {"embedded": normal(draw, batch, length, width), "ids": ids.reshape(batch, length),
            "media": normal(draw, int((ids == 7).sum()), width), "media_id": 7}  # fmt: skip


def _placed(index):
    """A media_splice that puts embedding index(places (B,T), number of the place (B,T)) in each place."""

    def splice(embedded, ids, media, media_id):
        places = ids == media_id
        number = places.flatten().cumsum(0).reshape(places.shape) - 1
        chosen = index(places, number)[places].long() % max(len(media), 1)
        return embedded.index_put(places.nonzero(as_tuple=True), media[chosen])

    return splice


def _one_to_the_right(embedded, ids, media, media_id):
    moved = media_splice(embedded, ids, media, media_id).roll(1, dims=1)
    return torch.where((ids == media_id).roll(1, dims=1)[..., None], moved, embedded)


def _all_in_one_run(embedded, ids, media, media_id):
    flat, begin = embedded.flatten(0, 1), (ids == media_id).flatten().long().argmax()
    return torch.cat((flat[:begin], media, flat[begin + len(media) :]))[: len(flat)].reshape(embedded.shape)


OPS = (
    Op(
        name="patchify",
        formula="patches[(f h + i) w + j, (c p + dy) p + dx] = pixels[f, i p + dy, j p + dx, c]",
        source="released image processor",
        reference=patchify,
        cases=_patchify_cases(),
        outputs=("patches",),
        differentiable=("pixels",),
        exact=("patches",),
        dtypes=_ALL,
        variants={"permute": lambda pixels, p: _cut(pixels, p, 0, 1, 3, 5, 2, 4)},
        suspects=(
            Suspect("channels_last", "a patch is flattened dy, dx, channel instead of channel, dy, dx",
                    lambda pixels, p: _cut(pixels, p, 0, 1, 3, 2, 4, 5)),
            Suspect("dy_dx_swapped", "a patch is flattened channel, dx, dy: its rows and columns are swapped",
                    lambda pixels, p: _cut(pixels, p, 0, 1, 3, 5, 4, 2)),
            Suspect("column_by_column", "patches are numbered down the columns instead of along the rows",
                    lambda pixels, p: _cut(pixels, p, 0, 3, 1, 5, 2, 4)),
            Suspect("frames_innermost", "the frames of one place stand together instead of frame after frame",
                    lambda pixels, p: _cut(pixels, p, 1, 3, 0, 5, 2, 4)),
            Suspect("block_by_block", "patches are numbered by 2x2 blocks, as for Qwen2-VL: merging comes later here",
                    _patches_by_block),
            Suspect("reshape_only", "the pixels are reshaped without moving an axis, so a patch holds one stretch of a row",
                    lambda pixels, p: pixels.reshape(-1, 3 * p * p)),
        ),
    ),
    Op(
        name="resize_plan",
        formula="scale = min(1, sqrt(limit / patches), side p / width, side p / height), cut, padded to 2p",
        source="released image processor",
        reference=resize_plan,
        cases=_resize_cases(),
        outputs=("width", "height", "padded_width", "padded_height"),
        suspects=(
            Suspect("enlarges", "small pictures are enlarged to the budget: the scale is not limited to 1", _enlarges),
            Suspect("budget_after_padding", "the budget counts patches after padding, not the whole ones before",
                    _budget_after_padding),
            Suspect("no_square_root", "the square root is missing: the ratio of areas is taken for that of sides",
                    _no_square_root),
            Suspect("rounds", "sizes are rounded where they should be cut",
                    lambda w, h, limit, p, side: _scaled(w, h, min(1.0, _scale(w, h, limit, p, side)), p, round)),
            Suspect("no_side_limit", "the limit of patches along one side is missing",
                    lambda w, h, limit, p, side: resize_plan(w, h, limit, p, 1 << 30)),
            Suspect("sides_cut_apart", "a side past its limit is cut alone: the picture is distorted", _sides_cut_apart),
            Suspect("no_padding", "the padding is missing", lambda *given: 2 * resize_plan(*given)[:2]),
            Suspect("pads_to_patch", "padding goes to multiples of p; merging 2x2 needs multiples of 2p",
                    lambda w, h, limit, p, side: (*(new := resize_plan(w, h, limit, p, side)[:2]),
                                                  *(-(-n // p) * p for n in new))),
            Suspect("stretches", "the picture is stretched to whole blocks instead of padded",
                    lambda *given: 2 * resize_plan(*given)[2:]),
            Suspect("swapped", "width and height are swapped in the result",
                    lambda *given: [resize_plan(*given)[i] for i in (1, 0, 3, 2)]),
        ),
    ),
    Op(
        name="frame_indices",
        formula="linspace(0, count - 1, max(1, round(count min(sample_fps, source_fps) / source_fps))), rounded",
        source="released processor",
        reference=frame_indices,
        cases=_frame_cases(),
        outputs=("indices",),
        suspects=(
            Suspect("every_frame", "every frame is used: the sampling rate is ignored",
                    lambda count, *_: list(range(count)), "vllm-project/vllm#45545"),
            Suspect("faster_than_source", "a clip slower than the sampling rate has its frames repeated",
                    _faster_than_source),
            Suspect("stride", "every k-th frame is taken, so the last one is missed", _stride),
            Suspect("last_excluded", "the last frame is not among them: the end is excluded",
                    lambda *given: _spread(given[0], _number(*given), endpoint=False)),
            Suspect("middles", "frames come from the middle of each segment instead of from the first to the last",
                    _middles),
            Suspect("positions_cut", "positions are cut where they should be rounded",
                    lambda *given: _spread(given[0], _number(*given), np.floor)),
            Suspect("number_cut", "the number of frames is cut where it should be rounded",
                    lambda *given: _spread(given[0], _number(*given, int))),
            Suspect("none_of_short_clips", "a short clip gives no frame at all",
                    lambda *given: frame_indices(*given) if given[0] * given[2] / given[1] >= 0.5 else []),
            Suspect("no_maximum", "max_frames is ignored", lambda *given: frame_indices(*given[:3], None)),
            Suspect("maximum_cuts", "max_frames cuts the list instead of spreading the frames over the clip",
                    lambda *given: frame_indices(*given[:3], None)[: given[3]]),
        ),
    ),
    Op(
        name="timestamp",
        formula="hh:mm:ss.fff",
        source="K2.5 report 4.2; released processor",
        reference=timestamp,
        cases=_timestamp_cases(),
        outputs=("text",),
        suspects=(
            Suspect("rounded", "milliseconds are rounded where they should be cut",
                    lambda seconds: timestamp(round(seconds * 1000) / 1000 + 1e-6)),
            Suspect("no_hours", "the hours are missing", lambda seconds: timestamp(seconds)[3:]),
            Suspect("comma", "a comma, as in subtitles, instead of a point", lambda s: timestamp(s).replace(".", ",")),
            Suspect("milliseconds_not_padded", "milliseconds are not padded to three digits: 15 ms reads as .15",
                    lambda seconds: timestamp(seconds)[:9] + str(_clock(seconds)[3])),
            Suspect("minutes_run_on", "minutes go on past 59 beside the hours",
                    lambda s: "{:02d}:{:02d}".format(_clock(s)[0], int(s // 60)) + timestamp(s)[5:]),
            Suspect("no_milliseconds", "the milliseconds are missing", lambda seconds: timestamp(seconds)[:8]),
            Suspect("plain_seconds", "plain seconds instead of hh:mm:ss.fff, as for Qwen-VL", lambda s: f"{s:.1f} seconds"),
        ),
    ),
    Op(
        name="media_tokens",
        formula="(h/2)(w/2), whatever t is",
        source="K2.5 report 4.2",
        reference=media_tokens,
        cases=st.fixed_dictionaries({"grids": GRIDS}),
        outputs=("counts",),
        suspects=(
            Suspect("times_frames", "every frame is counted, but the frames of an item are averaged",
                    lambda grids: [t * h * w // 4 for t, h, w in grids], "sgl-project/sglang#37632"),
            Suspect("before_merging", "patches are counted before they are merged 2x2",
                    lambda grids: [h * w for _, h, w in grids]),
            Suspect("all_patches", "all patches are counted, neither pooled nor merged",
                    lambda grids: [t * h * w for t, h, w in grids]),
            Suspect("with_markers", "begin and end markers are counted as places",
                    lambda grids: [h * w // 4 + 2 for _, h, w in grids]),
        ),
    ),
    Op(
        name="media_splice",
        formula="x[b,t] = media[n] in the n-th place of media_id, row-major; else embedded[b,t]",
        source="K2.5 report 4.1",
        reference=media_splice,
        cases=_splice_cases(),
        outputs=("x",),
        differentiable=("embedded", "media"),
        exact=("x",),
        dtypes=_ALL,
        variants={"index_put": _placed(lambda places, number: number)},
        suspects=(
            Suspect("column_major", "places are filled down the batch instead of row after row",
                    _placed(lambda places, _: places.T.flatten().cumsum(0).reshape(places.T.shape).T - 1)),
            Suspect("begins_anew", "every row of the batch begins again with the first embedding",
                    _placed(lambda places, _: places.cumsum(1) - 1)),
            Suspect("repeats_first", "the first embedding is repeated in all places",
                    _placed(lambda places, number: torch.zeros_like(number))),
            Suspect("off_by_one", "every place takes the embedding after its own", _placed(lambda _, number: number + 1)),
            Suspect("one_to_the_right", "embeddings stand one token too late", _one_to_the_right),
            Suspect("all_in_one_run", "places are taken to be one run from the first on; text between them is lost",
                    _all_in_one_run),
            Suspect("added", "media are added to the placeholder's embedding instead of replacing it",
                    lambda embedded, ids, media, media_id:
                        embedded + media_splice(torch.zeros_like(embedded), ids, media, media_id)),
            Suspect("vision_detached", "the media are detached: no gradient reaches the vision tower",
                    lambda embedded, ids, media, media_id: media_splice(embedded, ids, media.detach(), media_id),
                    "NVIDIA-NeMo/Automodel#2192"),
        ),
    ),
)  # fmt: skip
