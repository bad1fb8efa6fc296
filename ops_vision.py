"""The operations of the vision tower: patches, positions, packed attention, pooling, projector — K2.5 report 4.1, 4.2.

Public names: patch_embed, position_embedding, rope_2d, vit_attention, pool_merge, project, OPS.
Letters: L patches, D vision width, A vision heads, G vision head dim, M merged media tokens, C hidden; p patch size;
t, h, w frames, patch rows and patch columns of one item; H, W rows and columns of the position table.
Tests: pytest tests/test_ops_vision.py
"""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import vit3d
from op import Op, Suspect, normal
from ops_media import GRIDS

_ALL = (torch.float32, torch.bfloat16, torch.float64)


# Patches and positions


def patch_embed(patches, weight, bias):
    """The patch convolution, whose stride is its kernel, as a linear map.

        x[l, d] = Σ_n patches[l, n] · weight[d].flatten()[n] + bias[d]

    patches: (L,3·p·p) float — flattened channel, dy, dx; weight: (D,3,p,p) float; bias: (D,) float.
    Returns x (L,D), dtype of weight. Source: K2.5 report 4.2.
    """
    return vit3d.patch_embed(patches, weight, bias)


@st.composite
def _embed_cases(draw):
    p, patches, width = draw(st.integers(2, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return {"patches": normal(draw, patches, 3 * p * p), "weight": normal(draw, width, 3, p, p),
            "bias": normal(draw, width)}  # fmt: skip


def _convolved(patches, weight, bias):
    return F.conv2d(patches.unflatten(1, weight.shape[1:]), weight, bias).flatten(1)


def _weight_reshaped(patches, weight, bias):
    return patches @ weight.reshape(patches.shape[1], -1) + bias


def position_embedding(table, grids):
    """What is added to every patch: the learned table resized to its grid, plus the time of its frame.

        position = bicubic(table → h×w)[row, column] + [t > 1] · [sin(f·w_0), …, cos(f·w_0), …],  w_i = 10000^(−2i/D)

    with half-pixel centres (align_corners false, a = −3/4) and f the frame within the item, from 0: its row is not
    zero. An item of one frame gets no time.

    table: (H,W,D) float — learned; grids: list of (t,h,w). Returns position (L,D) in float32 (float64 stays), items
    in order, each frame by frame, row by row. Source: K2.5 report 4.2.
    """
    return vit3d.position_embedding(table, grids)


@st.composite
def _position_cases(draw):
    rows, columns, width = draw(st.integers(2, 5)), draw(st.integers(2, 5)), draw(st.sampled_from([4, 2, 6]))
    return {"table": normal(draw, rows, columns, width), "grids": draw(GRIDS)}


def _positions(resize, times, least=2):
    """A position_embedding of resize(table, h, w) → (h,w,D) and times(sinusoid) → (t,D), for items of ≥ least frames."""

    def embed(table, grids):
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        items = []
        for t, h, w in grids:
            picture = resize(table, h, w).reshape(1, h * w, -1)
            time = times(vit3d.frame_sinusoid(t, table.shape[2], table.dtype, table.device))[:, None]  # (t,1,D)
            items.append((picture + time if t >= least else picture.expand(t, -1, -1)).flatten(0, 1))
        return torch.cat(items)

    return embed


def _resize(mode="bicubic", **options):
    return lambda table, h, w: F.interpolate(table.permute(2, 0, 1)[None], (h, w), mode=mode, **options)[0].permute(1, 2, 0)


def _cubic(a):
    """Bicubic resizing as two matrix products, with the kernel's parameter a."""

    def kernel(x):
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))

    def matrix(old, new, like):
        centre = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5
        weights = torch.zeros(new, old, dtype=torch.float64)
        for step in range(-1, 3):
            place = centre.floor() + step  # a neighbour; beyond the edge, the edge counts again
            seat = place.clamp(0, old - 1).long()[:, None]
            weights.scatter_add_(1, seat, kernel((centre - place).abs())[:, None])
        return weights.to(like)

    return lambda table, h, w: torch.einsum(
        "hy,wx,yxd->hwd", matrix(table.shape[0], h, table), matrix(table.shape[1], w, table), table
    )


def _cosine_first(times):
    return times.roll(times.shape[1] // 2, dims=1)


def _sine_cosine_pairs(times):
    return times.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)


def _first_frame_skipped(times):
    return torch.cat((torch.zeros_like(times[:1]), times[1:]))


def rope_2d(x, grids, theta):
    """Turn adjacent channel pairs of every patch by its column and row, x and y interleaved.

        pair 2i turns by column · f_i, pair 2i+1 by row · f_i,  f_i = theta^(−4i/G) rad

    the same for each frame of an item, rows and columns counted from 0 in each item.

    x: (L,A,G) float — queries or keys, G a multiple of 4; grids: list of (t,h,w); theta: float, 10000 in the release.
    Returns y (L,A,G), dtype of x, computed in at least float32. Source: K2.5 report 4.2; the released tower.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return vit3d.apply_rope_2d(x, vit3d.rope_table_2d(grids, x.shape[-1], theta, dtype, x.device))


@st.composite
def _rope_cases(draw):
    grids, heads, width = draw(GRIDS), draw(st.integers(1, 2)), draw(st.sampled_from([8, 12, 4]))
    patches = sum(t * h * w for t, h, w in grids)
    return {"x": normal(draw, patches, heads, width), "grids": grids, "theta": draw(st.sampled_from([10000.0, 100.0]))}


def _turned(x, angle):
    """x with its adjacent pairs turned by angle (L,G/2)."""
    angle = angle.to(torch.promote_types(x.dtype, torch.float32))
    first, second = x.to(angle.dtype).unflatten(-1, (-1, 2)).unbind(-1)  # (L,A,G/2) each
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # (L,1,G/2)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).to(x.dtype)


def _rope_by(places, per_pair=4, interleaved=True):
    """A rope_2d whose pairs turn by places(grids) → two lists of L numbers; exponent −per_pair·i/G."""

    def turn(x, grids, theta):
        width = x.shape[-1]
        frequency = theta ** (-per_pair * torch.arange(width // 4, dtype=torch.float64) / width)  # (G/4,)
        angles = [torch.tensor(place, dtype=torch.float64)[:, None] * frequency for place in places(grids)]
        return _turned(x, torch.stack(angles, 2).flatten(1) if interleaved else torch.cat(angles, 1))  # (L,G/2)

    return turn


def _columns_rows(grids):
    """Column and row of every patch."""
    seats = [(j, i) for t, h, w in grids for _ in range(t) for i in range(h) for j in range(w)]
    return [column for column, _ in seats], [row for _, row in seats]


def _columns_rows_by_block(grids):
    seats = [(j + b, i + a) for t, h, w in grids for _ in range(t) for i in range(0, h, 2) for j in range(0, w, 2)
             for a in range(2) for b in range(2)]  # fmt: skip
    return [column for column, _ in seats], [row for _, row in seats]


def _rows_of_the_pack(grids):
    columns, rows, begin = [], [], 0
    for t, h, w in grids:
        item_columns, item_rows = _columns_rows([(t, h, w)])
        columns, rows, begin = columns + item_columns, rows + [begin + row for row in item_rows], begin + h
    return columns, rows


def _rows_of_the_clip(grids):
    return _columns_rows([(1, t * h, w) for t, h, w in grids])


def _half_split_pairs(x, grids, theta):
    adjacent = rope_2d(x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), grids, theta)
    return adjacent.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _one_running_index(x, grids, theta):
    index = torch.tensor([i for t, h, w in grids for _ in range(t) for i in range(h * w)], dtype=torch.float64)
    half = x.shape[-1] // 2
    return _turned(x, index[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half))


# The tower's attention and its pooling


def vit_attention(q, k, v, lengths):
    """Bidirectional attention inside each item of a packed sequence, never across items.

        out_i = Σ_j softmax_j(q_i·k_j / √G) v_j over the patches j of i's own item, all its frames

    q, k, v: (L,A,G) float — q and k rotated already; lengths: list of int — patches of each item, in order, summing
    to L. Returns out (L,A,G), dtype of v, softmax in at least float32. Source: K2.5 report 4.2 (NaViT packing).
    """
    return vit3d.vit_attention_reference(q, k, v, lengths)


@st.composite
def _attention_cases(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    shape = sum(lengths), draw(st.integers(1, 3)), draw(st.sampled_from([4, 1, 6]))
    return {name: normal(draw, *shape) for name in "qkv"} | {"lengths": lengths}


def _attend(weigh):
    """A vit_attention that weighs by weigh(q·k (A,L,L), same (L,L) bool: one item, G)."""

    def attend(q, k, v, lengths):
        item = torch.repeat_interleave(torch.tensor(lengths, device=q.device))
        weights = weigh(torch.einsum("qag,kag->aqk", q, k), item[:, None] == item, q.shape[-1])
        return torch.einsum("aqk,kag->qag", weights, v)

    return attend


def _weights(dots, seen, width, dim=-1, power=-0.5):
    return (dots * width**power).masked_fill(~seen, -torch.inf).softmax(dim)


def _item_by_item(q, k, v, lengths):
    whole = _attend(lambda dots, _, width: _weights(dots, torch.ones_like(dots[0], dtype=torch.bool), width))
    items = zip(*(x.split(lengths) for x in (q, k, v)))
    return torch.cat([whole(*item, [len(item[0])]) for item in items])


def _items_of_one_length(q, k, v, lengths):
    each = -(-sum(lengths) // len(lengths))
    return vit_attention(q, k, v, [len(piece) for piece in q.split(each)])


def _heads_not_moved_back(q, k, v, lengths):
    return vit_attention(q, k, v, lengths).transpose(0, 1).reshape(q.shape)


def pool_merge(x, grids):
    """Average the frames of each item, then put each 2×2 block of patches side by side.

        merged[(i·w/2 + j), 2a + b] = mean over frames of patch (2i + a, 2j + b), i < h/2, j < w/2, a, b < 2

    x: (L,D) float — items in order, frame by frame, row by row; grids: list of (t,h,w), h and w even.
    Returns merged (M,4,D), dtype of x, M = Σ (h/2)(w/2) whatever t is. Source: K2.5 report 4.2.
    """
    return vit3d.pool_merge_reference(x, grids)


@st.composite
def _pool_cases(draw):
    grids = draw(GRIDS)
    return {"x": normal(draw, sum(t * h * w for t, h, w in grids), draw(st.integers(1, 3))), "grids": grids}


def _merge(pool, cut=lambda picture: picture.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).transpose(1, 2)):
    """A pool_merge of pool(frames (t,h,w,D)) → (h,w,D) and cut(picture) → (h/2,w/2,2,2,D)."""

    def merge(x, grids):
        items = x.split([t * h * w for t, h, w in grids])
        pictures = [pool(item.reshape(*grid, -1)) for grid, item in zip(grids, items)]
        return torch.cat([cut(picture).reshape(-1, 4, x.shape[1]) for picture in pictures])

    return merge


def _mean(frames):
    return frames.mean(0)


def _frames_innermost(frames):
    t, h, w, width = frames.shape
    return frames.reshape(h, w, t, width).mean(2)


def project(merged, norm_weight, norm_bias, fc0_weight, fc0_bias, fc1_weight, fc1_bias, eps):
    """The MLP projector ("patch merger") into the language model.

        y = fc1 gelu(fc0 concat_4(LayerNorm(patch)))        GELU by erf; the norm per patch, before it is merged

    merged: (M,4,D) float; norm_weight, norm_bias: (D,); fc0_weight: (4D,4D); fc0_bias: (4D,); fc1_weight: (C,4D);
    fc1_bias: (C,); eps: float. Returns y (M,C). Source: K2.5 report 4.1.
    """
    return vit3d.project(merged, norm_weight, norm_bias, fc0_weight, fc0_bias, fc1_weight, fc1_bias, eps)


@st.composite
def _project_cases(draw):
    # A norm over fewer than 4 channels has gradients that are mostly rounding.
    tokens, width, hidden = draw(st.integers(1, 4)), draw(st.integers(4, 7)), draw(st.integers(1, 5))
    scale = draw(st.sampled_from([1.0, 1e-2]))  # flat patches show the eps
    return {
        "merged": normal(draw, tokens, 4, width, scale=scale) + scale,
        "norm_weight": 1 + normal(draw, width, scale=0.5), "norm_bias": normal(draw, width, scale=0.5),
        "fc0_weight": normal(draw, 4 * width, 4 * width, scale=0.4), "fc0_bias": normal(draw, 4 * width),
        "fc1_weight": normal(draw, hidden, 4 * width, scale=0.4), "fc1_bias": normal(draw, hidden), "eps": 1e-5,
    }  # fmt: skip


def _projector(norm=F.layer_norm, act=F.gelu):
    """A project with another norm(merged, shape, weight, bias, eps) or activation."""

    def apply(merged, norm_weight, norm_bias, fc0_weight, fc0_bias, fc1_weight, fc1_bias, eps):
        normed = norm(merged, merged.shape[-1:], norm_weight, norm_bias, eps).flatten(1)  # (M,4D)
        return F.linear(act(F.linear(normed, fc0_weight, fc0_bias)), fc1_weight, fc1_bias)

    return apply


def _norm_after_merging(merged, shape, weight, bias, eps):
    return F.layer_norm(merged.flatten(1), (4 * shape[0],), weight.repeat(4), bias.repeat(4), eps)


def _rms(merged, shape, weight, bias, eps):
    return merged * torch.rsqrt(merged.square().mean(-1, keepdim=True) + eps) * weight + bias


def _sample_variance(merged, shape, weight, bias, eps):
    centred = merged - merged.mean(-1, keepdim=True)
    return centred * torch.rsqrt(merged.var(-1, keepdim=True) + eps) * weight + bias


OPS = (
    Op(
        name="patch_embed",
        formula="x = patches W^T + b",
        source="K2.5 report 4.2",
        reference=patch_embed,
        cases=_embed_cases(),
        outputs=("x",),
        differentiable=("patches", "weight", "bias"),
        dtypes=_ALL,
        variants={"convolution": _convolved},
        suspects=(
            Suspect("no_bias", "the bias is missing", lambda patches, weight, bias: patches @ weight.flatten(1).T),
            Suspect("weight_channels_last", "the kernel is flattened dy, dx, channel, but patches are channel, dy, dx",
                    lambda patches, weight, bias: patch_embed(patches, weight.permute(0, 2, 3, 1).flatten(1), bias)),
            Suspect("kernel_transposed", "rows and columns of the kernel are swapped",
                    lambda patches, weight, bias: patch_embed(patches, weight.transpose(2, 3), bias)),
            Suspect("weight_reshaped", "the weight is reshaped to (3pp,D) where it should be transposed", _weight_reshaped),
        ),
    ),
    Op(
        name="position_embedding",
        formula="bicubic(table to h x w)[row, column] + [t > 1] sinusoid[frame]",
        source="K2.5 report 4.2",
        reference=position_embedding,
        cases=_position_cases(),
        outputs=("position",),
        differentiable=("table",),
        dtypes=_ALL,
        variants={"matrices": _positions(_cubic(-0.75), torch.clone)},
        suspects=(
            Suspect("time_on_one_frame", "an item of one frame gets the time embedding too",
                    _positions(_resize(), torch.clone, least=1), "lablup/mlxcel#762"),
            Suspect("no_time", "the time embedding is missing: the tower is the one of images",
                    _positions(_resize(), torch.clone, least=99), "Blaizzy/mlx-vlm#1436"),
            Suspect("first_frame_skipped", "frame 0 gets no time embedding, as if its row were zero",
                    _positions(_resize(), _first_frame_skipped)),
            Suspect("cosine_first", "the cosines come before the sines", _positions(_resize(), _cosine_first)),
            Suspect("sine_cosine_pairs", "sines and cosines alternate instead of filling one half each",
                    _positions(_resize(), _sine_cosine_pairs)),
            Suspect("align_corners", "the table is resized with align_corners",
                    _positions(_resize(align_corners=True), torch.clone)),
            Suspect("bilinear", "the table is resized bilinearly, not bicubically",
                    _positions(_resize("bilinear"), torch.clone)),
            Suspect("antialias", "the table is resized with antialiasing", _positions(_resize(antialias=True), torch.clone)),
            Suspect("kernel_of_pillow", "the bicubic kernel has a = -1/2, as in Pillow and JAX, instead of -3/4",
                    _positions(_cubic(-0.5), torch.clone)),
            Suspect("rows_for_columns", "rows and columns are swapped when the table is resized",
                    _positions(lambda table, h, w: _resize()(table, w, h), torch.clone)),
        ),
    ),
    Op(
        name="rope_2d",
        formula="pair 2i turns by column theta^(-4i/G), pair 2i+1 by row theta^(-4i/G)",
        source="K2.5 report 4.2; released tower",
        reference=rope_2d,
        cases=_rope_cases(),
        outputs=("y",),
        differentiable=("x",),
        dtypes=_ALL,
        variants={"real": _rope_by(_columns_rows)},
        suspects=(
            Suspect("x_half_y_half", "the first half of the pairs turns by column, the second by row; they must alternate",
                    _rope_by(_columns_rows, interleaved=False), "ggml-org/llama.cpp#19170"),
            Suspect("y_before_x", "rows come before columns", _rope_by(lambda grids: _columns_rows(grids)[::-1])),
            Suspect("half_split_pairs", "channel i is paired with i + G/2 instead of its neighbour", _half_split_pairs),
            Suspect("rows_of_the_pack", "rows go on counting from item to item", _rope_by(_rows_of_the_pack)),
            Suspect("rows_of_the_clip", "rows go on counting from frame to frame", _rope_by(_rows_of_the_clip)),
            Suspect("block_by_block", "positions follow 2x2 blocks, as for Qwen2-VL, but patches stand row by row",
                    _rope_by(_columns_rows_by_block)),
            Suspect("exponent_of_one_axis", "the frequencies fall as theta^(-2i/G): each axis has only G/4 of them",
                    _rope_by(_columns_rows, per_pair=2)),
            Suspect("turned_back", "pairs turn the other way: the sine has the wrong sign",
                    _rope_by(lambda grids: [[-n for n in place] for place in _columns_rows(grids)])),
            Suspect("one_running_index", "positions are one running index, as in text", _one_running_index),
        ),
    ),
    Op(
        name="vit_attention",
        formula="out_i = sum_j softmax_j(q_i k_j / sqrt(G)) v_j over i's own item",
        source="K2.5 report 4.2 (NaViT packing)",
        reference=vit_attention,
        cases=_attention_cases(),
        outputs=("out",),
        differentiable=("q", "k", "v"),
        dtypes=_ALL,
        twins={"fused": vit3d.vit_attention_fused},
        variants={"item_by_item": _item_by_item},
        suspects=(
            Suspect("leaks", "patches see the other items of the pack: the mask is missing",
                    lambda q, k, v, lengths: vit_attention(q, k, v, [sum(lengths)]), "Blaizzy/mlx-vlm#1436"),
            Suspect("causal", "patches see only those before them: the tower is bidirectional",
                    _attend(lambda dots, same, width: _weights(dots, same.tril(), width))),
            Suspect("no_scale", "the factor 1/sqrt(G) is missing",
                    _attend(lambda dots, same, width: _weights(dots, same, 1))),
            Suspect("scale_of_all_heads", "the scale uses the width of all heads together",
                    lambda q, k, v, lengths: vit_attention(q * q.shape[1] ** -0.5, k, v, lengths)),
            Suspect("divides_by_width", "the dot products are divided by G instead of its root",
                    _attend(lambda dots, same, width: _weights(dots, same, width, power=-1))),
            Suspect("items_of_one_length", "all items are taken to be of one length", _items_of_one_length),
            Suspect("masked_to_zero", "masked products become 0 instead of minus infinity, so they still get weight",
                    _attend(lambda dots, same, width: (dots * width**-0.5 * same).softmax(-1))),
            Suspect("masked_after_softmax", "the mask comes after the softmax, so the weights do not sum to 1",
                    _attend(lambda dots, same, width: (dots * width**-0.5).softmax(-1) * same)),
            Suspect("softmax_over_queries", "the softmax runs over the queries instead of the keys",
                    _attend(lambda dots, same, width: _weights(dots, same, width, dim=-2))),
            Suspect("heads_not_moved_back", "(A,L,G) is reshaped to (L,A,G) without moving the axis back",
                    _heads_not_moved_back),
        ),
    ),
    Op(
        name="pool_merge",
        formula="mean over frames, then 2 x 2 patches side by side",
        source="K2.5 report 4.2",
        reference=pool_merge,
        cases=_pool_cases(),
        outputs=("merged",),
        differentiable=("x",),
        dtypes=_ALL,
        twins={"fused": vit3d.pool_merge_fused},
        variants={"merge_then_mean": _merge(_mean)},
        suspects=(
            Suspect("first_frame", "only the first frame is kept", _merge(lambda frames: frames[0])),
            Suspect("sum_of_frames", "the frames are summed, not averaged", _merge(lambda frames: frames.sum(0))),
            Suspect("always_four_frames", "the sum is divided by 4 whatever the number of frames",
                    _merge(lambda frames: frames.sum(0) / 4)),
            Suspect("largest_of_frames", "the largest value over the frames instead of the mean",
                    _merge(lambda frames: frames.amax(0))),
            Suspect("not_pooled", "frames are not averaged: every frame gives its own tokens",
                    lambda x, grids: pool_merge(x, [(1, h, w) for t, h, w in grids for _ in range(t)]),
                    "Blaizzy/mlx-vlm#1436"),
            Suspect("frames_innermost", "the patches are read as (h,w,t): the mean runs over the wrong axis",
                    _merge(_frames_innermost)),
            Suspect("block_by_columns", "inside a 2x2 block the left column comes first, then the right one",
                    lambda x, grids: pool_merge(x, grids)[:, [0, 2, 1, 3]], "kornia/kornia#3968"),
            Suspect("blocks_down_columns", "the blocks are numbered down the columns instead of along the rows",
                    _merge(_mean, lambda p: p.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).permute(2, 0, 1, 3, 4))),
            Suspect("four_in_a_row", "four neighbours of one row are merged instead of a 2x2 block",
                    _merge(_mean, lambda picture: picture)),
            Suspect("half_a_picture_apart", "the four patches of a token come from the four quarters of the picture",
                    _merge(_mean, lambda p: p.unflatten(1, (2, -1)).unflatten(0, (2, -1)).permute(1, 3, 0, 2, 4))),
        ),
    ),
    Op(
        name="project",
        formula="y = fc1 gelu(fc0 concat_4(LayerNorm(patch)))",
        source="K2.5 report 4.1",
        reference=project,
        cases=_project_cases(),
        outputs=("y",),
        differentiable=("merged", "norm_weight", "norm_bias", "fc0_weight", "fc0_bias", "fc1_weight", "fc1_bias"),
        dtypes=_ALL,
        loose=2.0,
        variants={"by_formula": _projector(act=lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)))},
        suspects=(
            Suspect("gelu_tanh", "GELU by tanh, as in the tower's blocks; the projector's is by erf",
                    _projector(act=lambda x: F.gelu(x, approximate="tanh")), "kornia/kornia#3968"),
            Suspect("no_activation", "the activation is missing", _projector(act=lambda x: x)),
            Suspect("silu", "SiLU instead of GELU", _projector(act=F.silu)),
            Suspect("norm_after_merging", "the norm runs over the 4 merged patches instead of over each",
                    _projector(_norm_after_merging)),
            Suspect("no_norm", "the norm is missing", _projector(lambda merged, *_: merged)),
            Suspect("rms_norm", "the norm does not subtract the mean: that is RMSNorm", _projector(_rms)),
            Suspect("eps_fixed", "eps is 1e-6 instead of the one given",
                    _projector(lambda merged, shape, weight, bias, eps: F.layer_norm(merged, shape, weight, bias, 1e-6))),
            Suspect("sample_variance", "the variance is divided by D - 1 instead of D", _projector(_sample_variance)),
            Suspect("channels_interleaved", "the 4 patches are interleaved by channel instead of concatenated",
                    _projector(lambda *given: F.layer_norm(*given).transpose(1, 2))),
        ),
    ),
)  # fmt: skip
