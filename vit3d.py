"""MoonViT-3D: one vision encoder for images and video, packed, and the projector into the language model.

K2.5 report 4.1 and 4.2 (MoonViT-3D, NaViT packing, temporal pooling), 4.3 (its training objectives). Items of any
size are concatenated into one sequence of patches; attention is bidirectional inside an item and never crosses
items. Up to 4 frames are one item: space-time attention with the same weights as for images. After the tower the
frames of an item are averaged and 2x2 patches merged, so a clip costs as many tokens as an image.

Public: VisionConfig, MoonViT3d, Projector, ContrastiveHead; the pure functions patch_embed, frame_sinusoid,
position_embedding, rope_table_2d, apply_rope_2d, vit_attention_reference/_fused, vit_block (with BlockWeights),
pool_merge_reference/_fused, project, siglip_loss_reference/_fused, check_grids; and everything of `media`
(preprocessing and packing).

Dimensions: L patches, I media items, D vision width, A vision heads, G vision head dim, F MLP width, M merged
tokens, C hidden width of the language model, Z embedding width of the contrastive head. A grid is (t, h, w):
frames, patch rows, patch columns.

Tests: python -m pytest tests/test_vit3d.py
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from media import (
    MERGE,
    Clip,
    MediaConfig,
    MediaError,
    MediaItem,
    ResizePlan,
    frame_indices,
    image_item,
    load_image,
    load_video,
    merged_tokens,
    pack,
    patchify,
    resize_plan,
    timestamp,
    video_items,
)

__all__ = [
    "BlockWeights", "Clip", "ContrastiveHead", "MediaConfig", "MediaError", "MediaItem", "MoonViT3d", "Projector",
    "ResizePlan", "VisionConfig", "apply_rope_2d", "check_grids", "frame_indices", "frame_sinusoid", "image_item",
    "load_image", "load_video", "merged_tokens", "pack", "patch_embed", "patchify", "pool_merge_fused",
    "pool_merge_reference", "position_embedding", "project", "resize_plan", "rope_table_2d", "siglip_loss_fused",
    "siglip_loss_reference", "timestamp", "video_items", "vit_attention_fused", "vit_attention_reference", "vit_block",
]  # fmt: skip

LN_EPS = 1e-5  # of every LayerNorm of the tower
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class VisionConfig:
    """The `vision_config` of config.json; every field has its key and its released default."""

    patch_size: int = 14
    init_pos_emb_height: int = 64  # rows and columns of the learned position table
    init_pos_emb_width: int = 64
    init_pos_emb_time: int = 4  # most frames of one item
    pos_emb_type: str = "divided_fixed"
    vt_hidden_size: int = 1152
    vt_num_attention_heads: int = 16
    vt_num_hidden_layers: int = 27
    vt_intermediate_size: int = 4304
    merge_kernel_size: tuple[int, int] = (MERGE, MERGE)
    merge_type: str = "sd2_tpool"
    video_attn_type: str = "spatial_temporal"
    mm_projector_type: str = "patchmerger"
    mm_hidden_size: int | None = None  # always vt_hidden_size; None fills it in
    text_hidden_size: int = 7168
    projector_hidden_act: str = "gelu"
    projector_ln_eps: float = 1e-5

    def __post_init__(self):
        object.__setattr__(self, "merge_kernel_size", tuple(self.merge_kernel_size))
        if self.mm_hidden_size is None:
            object.__setattr__(self, "mm_hidden_size", self.vt_hidden_size)
        defined = {
            "pos_emb_type": "divided_fixed",
            "merge_kernel_size": (MERGE, MERGE),
            "merge_type": "sd2_tpool",
            "video_attn_type": "spatial_temporal",
            "mm_projector_type": "patchmerger",
            "mm_hidden_size": self.vt_hidden_size,
            "projector_hidden_act": "gelu",
        }
        for key, value in defined.items():
            if getattr(self, key) != value:
                raise ValueError(f"vision_config: {key} is {getattr(self, key)!r}; only {value!r} is defined")
        if self.vt_hidden_size % (4 * self.vt_num_attention_heads):
            raise ValueError(
                f"vision_config: vt_hidden_size {self.vt_hidden_size} over {self.vt_num_attention_heads} heads must "
                "give a head dim that is a multiple of 4 (x and y pairs of the rotary embedding)"
            )


def check_grids(grid_thw: Tensor | Sequence[Grid], n_patches: int, max_frames: int) -> list[Grid]:
    """Check a packed batch and return its grids as plain integers (one device synchronisation).

    Args: grid_thw: (I,3) int; n_patches: L; max_frames: init_pos_emb_time.
    Raises: MediaError naming the item: bad shape, h or w odd or below 2, t outside 1..max_frames, sum(t*h*w) != L.
    """
    grid_thw = torch.as_tensor(grid_thw)
    if grid_thw.numel() and (grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point()):
        raise MediaError(f"grid_thw must be (I,3) integers, not {tuple(grid_thw.shape)} {grid_thw.dtype}")
    grids = [(t, h, w) for t, h, w in grid_thw.reshape(-1, 3).tolist()]
    for i, (t, h, w) in enumerate(grids):
        if not 1 <= t <= max_frames:
            raise MediaError(f"item {i}: {t} frames in one grid, but init_pos_emb_time allows 1 to {max_frames}")
        if min(h, w) < MERGE or h % MERGE or w % MERGE:
            raise MediaError(f"item {i}: {h} rows and {w} columns of patches; both must be multiples of {MERGE}")
    total = sum(t * h * w for t, h, w in grids)
    if total != n_patches:
        raise MediaError(f"grid_thw counts {total} patches in {len(grids)} items, but {n_patches} patches were given")
    return grids


@dataclass(frozen=True)
class PatchCoordinates:
    """Where each patch of a packed batch sits: its item, and frame, row and column inside it. Each (L,) int64."""

    item: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor


def patch_coordinates(grids: Sequence[Grid], device: torch.device) -> PatchCoordinates:
    """Coordinates of every patch, items one after another, each frame by frame and row by row."""
    total = sum(t * h * w for t, h, w in grids)
    t, h, w = torch.tensor(grids, dtype=torch.int64, device=device).reshape(-1, 3).unbind(1)  # (I,) each
    lengths = t * h * w
    item = torch.repeat_interleave(lengths, output_size=total)  # (L,)
    inside = torch.arange(total, device=device) - (lengths.cumsum(0) - lengths)[item]
    cell = inside % (h * w)[item]
    return PatchCoordinates(item, inside // (h * w)[item], cell // w[item], cell % w[item])


def patch_embed(patches: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The patch convolution (stride = kernel) as a linear map of flattened patches: x W^T + b.

    Args: patches: (L,3*p*p) float, flattened channel, dy, dx; weight: (D,3,p,p); bias: (D,). Returns: (L,D).
    """
    return F.linear(patches.to(weight.dtype), weight.flatten(1), bias)


def frame_sinusoid(count: int, width: int, dtype: torch.dtype = torch.float32, device=None) -> Tensor:
    """The fixed time embedding: row f is [sin(f w_0..), cos(f w_0..)] with w_i = 10000^(-2i/D). Row 0 is not zero.

    Args: count: frames; width: D, even. Returns: (count,D).
    """
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=dtype, device=device) / width)  # (D/2,)
    angle = torch.arange(count, dtype=dtype, device=device)[:, None] * frequency  # (count,D/2)
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def position_embedding(table: Tensor, grids: Sequence[Grid]) -> Tensor:
    """What is added to every patch: the learned table resized to its grid, plus the time embedding of its frame.

    pos = bicubic(table -> h x w)[row, column] + [t > 1] * sinusoid[frame]. The table is untouched at its own size.
    A one-frame clip is an image, so it gets no time embedding.

    Args: table: (H,W,D) float — learned; grids: one (t,h,w) per item.
    Returns: (L,D) float32, also for a bfloat16 table (float64 stays float64). Source: K2.5 report 4.2.
    """
    at = patch_coordinates(grids, table.device)
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    width = table.shape[2]
    # Each distinct size is resized once; `first` is where its rows begin in the concatenation. The empty first piece
    # keeps the table in the graph when there are no items.
    first, pieces, rows = {}, [table.reshape(-1, width)[:0]], 0
    channels_first = table.permute(2, 0, 1).contiguous()[None]  # (1,D,H,W)
    for _, h, w in grids:
        if (h, w) not in first:
            first[h, w] = rows
            pieces.append(table.reshape(-1, width) if (h, w) == tuple(table.shape[:2]) else _resized(channels_first, h, w))
            rows += h * w
    start = torch.tensor([first[h, w] for _, h, w in grids], dtype=torch.int64, device=table.device)  # (I,)
    columns = torch.tensor([w for _, _, w in grids], dtype=torch.int64, device=table.device)  # (I,)
    position = F.embedding(start[at.item] + at.row * columns[at.item] + at.column, torch.cat(pieces))  # (L,D)
    if all(t == 1 for t, _, _ in grids):
        return position
    # Row 0 of the time table is zero, for the patches of images; frame f of a clip is row f + 1.
    times = frame_sinusoid(max(t for t, _, _ in grids), width, table.dtype, table.device)
    is_clip = torch.tensor([t > 1 for t, _, _ in grids], device=table.device)  # (I,)
    return position + F.pad(times, (0, 0, 1, 0))[(at.frame + 1) * is_clip[at.item]]


def _resized(channels_first: Tensor, h: int, w: int) -> Tensor:
    """(1,D,H,W) -> (h*w,D), bicubic with half-pixel centres."""
    resized = F.interpolate(channels_first, size=(h, w), mode="bicubic", align_corners=False)[0]  # (D,h,w)
    return resized.flatten(1).T  # (h*w,D)


def rope_table_2d(
    grids: Sequence[Grid], head_dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32, device=None
) -> Tensor:
    """Unit complex numbers that turn each channel pair of each patch, x and y interleaved:

        pair 2i: exp(j * column * f_i), pair 2i+1: exp(j * row * f_i), f_i = theta^(-4i/G)

    The same for every frame of an item. A pure function of the grids: nothing is cached, nothing is rounded by the
    model's dtype.

    Args: grids: one (t,h,w) per item; head_dim: G, a multiple of 4; dtype: float32 or float64.
    Returns: (L,G/2) complex. Source: K2.5 report 4.2; the released tower's 2-D rotary embedding.
    """
    at = patch_coordinates(grids, device)
    frequency = theta ** (-torch.arange(0, head_dim, 4, dtype=dtype, device=device) / head_dim)  # (G/4,)
    position = torch.stack((at.column, at.row), dim=1).to(dtype)  # (L,2)
    angle = (position[:, None, :] * frequency[:, None]).flatten(1)  # (L,G/4,2) -> (L,G/2): x0, y0, x1, y1, ...
    return torch.polar(torch.ones_like(angle), angle)


def apply_rope_2d(x: Tensor, table: Tensor) -> Tensor:
    """Turn the adjacent channel pairs (x0,x1), (x2,x3), ... of every head by the patch's table row.

    Args: x: (L,...,G) float; table: (L,G/2) complex. Returns: like x, computed in the table's precision.
    """
    pairs = torch.view_as_complex(x.to(table.real.dtype).unflatten(-1, (-1, 2)))  # (L,...,G/2)
    turned = pairs * table.reshape(len(table), *[1] * (x.ndim - 2), table.shape[1])
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)  # (L,...,G/2,2) -> (L,...,G)


def vit_attention_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Bidirectional attention inside each item of a packed sequence, as one masked (L,L) matrix.

        out_i = sum_j softmax_j(q_i . k_j / sqrt(G)) v_j over the patches j of i's own item

    Args: q, k, v: (L,A,G) float — rotated already; lengths: patches of each item, in order, summing to L.
    Returns: (L,A,G). Source: K2.5 report 4.2 (NaViT packing).
    """
    item = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=q.device))  # (L,)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qag,kag->aqk", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5  # (A,L,L)
    scores = scores.masked_fill(item[:, None] != item[None, :], -torch.inf)
    return torch.einsum("aqk,kag->qag", scores.softmax(dim=-1), v.to(wide)).to(v.dtype)


def vit_attention_fused(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """vit_attention_reference by one scaled_dot_product_attention per distinct length: equal items share a call."""
    if not lengths:
        return q + k + v  # (0,A,G): nothing to attend to, and every input stays in the graph
    segments = [x.split(list(lengths)) for x in (q, k, v)]
    out: list[Tensor] = [v] * len(lengths)
    for members in _positions_by_value(lengths).values():
        batch = [torch.stack([s[i] for i in members]).transpose(1, 2) for s in segments]  # (n,A,l,G) each
        attended = F.scaled_dot_product_attention(*batch).transpose(1, 2)  # (n,l,A,G)
        for i, segment in zip(members, attended.unbind()):
            out[i] = segment
    return torch.cat(out)


def _positions_by_value(values: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """value -> the positions that hold it, in order of first appearance."""
    positions: dict[Hashable, list[int]] = {}
    for i, value in enumerate(values):
        positions.setdefault(value, []).append(i)
    return positions


@dataclass(frozen=True)
class BlockWeights:
    """The weights of one encoder block. wqkv stacks q, k and v."""

    norm0_weight: Tensor  # (D,)
    norm0_bias: Tensor  # (D,)
    wqkv_weight: Tensor  # (3D,D)
    wqkv_bias: Tensor  # (3D,)
    wo_weight: Tensor  # (D,D)
    wo_bias: Tensor  # (D,)
    norm1_weight: Tensor  # (D,)
    norm1_bias: Tensor  # (D,)
    fc0_weight: Tensor  # (F,D)
    fc0_bias: Tensor  # (F,)
    fc1_weight: Tensor  # (D,F)
    fc1_bias: Tensor  # (D,)


def vit_block(
    x: Tensor,
    weights: BlockWeights,
    table: Tensor,
    lengths: Sequence[int],
    heads: int,
    attention: Callable[..., Tensor] = vit_attention_fused,
) -> Tensor:
    """One pre-norm encoder block: x += wo(attention(rope(wqkv(norm0 x)))); x += fc1(gelu_tanh(fc0(norm1 x))).

    Args: x: (L,D) float; weights: BlockWeights; table: (L,G/2) complex of rope_table_2d; lengths: patches of each
    item; heads: A; attention: one of the attention twins. Returns: (L,D).
    """
    w, width = weights, x.shape[1]
    normed = F.layer_norm(x, (width,), w.norm0_weight, w.norm0_bias, LN_EPS)
    qkv = F.linear(normed, w.wqkv_weight, w.wqkv_bias).unflatten(1, (3, heads, -1))  # (L,3,A,G)
    q, k = apply_rope_2d(qkv[:, :2], table).unbind(1)  # (L,A,G) each
    attended = attention(q, k, qkv[:, 2], lengths).flatten(1)  # (L,A,G) -> (L,D)
    x = x + F.linear(attended, w.wo_weight, w.wo_bias)
    normed = F.layer_norm(x, (width,), w.norm1_weight, w.norm1_bias, LN_EPS)
    widened = F.gelu(F.linear(normed, w.fc0_weight, w.fc0_bias), approximate="tanh")  # (L,F)
    return x + F.linear(widened, w.fc1_weight, w.fc1_bias)


def pool_merge_reference(x: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Average the frames of each item, then put each 2x2 block of patches side by side.

    Token (i,j) of an item is the mean over frames of patches (2i,2j), (2i,2j+1), (2i+1,2j), (2i+1,2j+1).

    Args: x: (L,D) float; grids: one (t,h,w) per item, h and w even.
    Returns: (M,4,D), M = sum (h/2)(w/2). Source: K2.5 report 4.2 (temporal pooling, patch merger).
    """
    tokens = [x[:0].reshape(0, MERGE * MERGE, x.shape[1])]  # so that no items give no tokens
    for (t, h, w), segment in zip(grids, x.split([t * h * w for t, h, w in grids])):
        picture = segment.reshape(t, h, w, -1).mean(dim=0)  # (h,w,D)
        for i in range(0, h, MERGE):
            for j in range(0, w, MERGE):
                tokens.append(picture[i : i + MERGE, j : j + MERGE].reshape(1, MERGE * MERGE, -1))  # (1,4,D)
    return torch.cat(tokens)


def pool_merge_fused(x: Tensor, grids: Sequence[Grid]) -> Tensor:
    """pool_merge_reference, with all items of one grid in one step."""
    if not grids:
        return x.reshape(0, MERGE * MERGE, x.shape[1])
    segments = x.split([t * h * w for t, h, w in grids])
    out: list[Tensor] = [x] * len(grids)
    for (t, h, w), members in _positions_by_value(grids).items():
        n, rows, columns = len(members), h // MERGE, w // MERGE
        pictures = torch.stack([segments[i] for i in members]).unflatten(1, (t, h * w)).mean(dim=1)  # (n,h*w,D)
        blocks = pictures.reshape(n, rows, MERGE, columns, MERGE, -1).transpose(2, 3)  # (n,h/2,w/2,2,2,D)
        tokens = blocks.reshape(n, rows * columns, MERGE * MERGE, -1)  # (n,(h/2)(w/2),4,D)
        for i, item_tokens in zip(members, tokens.unbind()):
            out[i] = item_tokens
    return torch.cat(out)


def project(
    merged: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc0_weight: Tensor,
    fc0_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """The MLP projector ("patch merger"): LayerNorm of each patch, concatenate 4, Linear, GELU (erf), Linear.

    Args: merged: (M,4,D) float; norm_weight, norm_bias: (D,); fc0_weight: (4D,4D); fc0_bias: (4D,);
    fc1_weight: (C,4D); fc1_bias: (C,); eps: projector_ln_eps. Returns: (M,C). Source: K2.5 report 4.1.
    """
    normed = F.layer_norm(merged, merged.shape[-1:], norm_weight, norm_bias, eps).flatten(1)  # (M,4,D) -> (M,4D)
    return F.linear(F.gelu(F.linear(normed, fc0_weight, fc0_bias)), fc1_weight, fc1_bias)


class ViTBlock(nn.Module):
    """Owns the weights of one block under the released names norm0, wqkv, wo, norm1, mlp.fc0, mlp.fc1."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        width, inner = cfg.vt_hidden_size, cfg.vt_intermediate_size
        self.norm0 = nn.LayerNorm(width, eps=LN_EPS)
        self.norm1 = nn.LayerNorm(width, eps=LN_EPS)
        self.wqkv = nn.Linear(width, 3 * width)
        self.wo = nn.Linear(width, width)
        self.mlp = nn.ModuleDict({"fc0": nn.Linear(width, inner), "fc1": nn.Linear(inner, width)})

    def weights(self) -> BlockWeights:
        """The block's parameters as the explicit weights of vit_block."""
        parts = (self.norm0, self.wqkv, self.wo, self.norm1, self.mlp["fc0"], self.mlp["fc1"])
        return BlockWeights(*(tensor for part in parts for tensor in (part.weight, part.bias)))


class MoonViT3d(nn.Module):
    """The vision tower; as attribute `vision_tower` its parameters carry the released names.

    Args: cfg: VisionConfig; impl: "fused" or "reference", the twin that is called.
    """

    def __init__(self, cfg: VisionConfig, impl: str = "fused"):
        super().__init__()
        if impl not in ("fused", "reference"):
            raise ValueError(f"impl is {impl!r}; choose 'fused' or 'reference'")
        self.cfg = cfg
        self.attention = vit_attention_fused if impl == "fused" else vit_attention_reference
        self.pool_merge = pool_merge_fused if impl == "fused" else pool_merge_reference
        width, patch = cfg.vt_hidden_size, cfg.patch_size
        table = nn.Parameter(torch.empty(cfg.init_pos_emb_height, cfg.init_pos_emb_width, width))
        nn.init.normal_(table)
        convolution = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.patch_embed = nn.ModuleDict({"proj": convolution, "pos_emb": nn.ParameterDict({"weight": table})})
        blocks = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.vt_num_hidden_layers))
        self.encoder = nn.ModuleDict({"blocks": blocks, "final_layernorm": nn.LayerNorm(width, eps=LN_EPS)})

    def forward(self, patches: Tensor, grid_thw: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """Encode packed images and clips, of any mixture of t.

        Args: patches: (L,3*p*p) float — see media.pack; grid_thw: (I,3) int; taps: if given, receives the output of
        every part under its module's name (patch_embed, encoder.blocks.i, encoder.final_layernorm), each (L,D).
        Returns: (M,4,D) merged tokens, items in order; (0,4,D) for no items.
        Raises: MediaError, see check_grids; also if a patch has another size than the config's.
        """
        cfg, embed, norm = self.cfg, self.patch_embed, self.encoder["final_layernorm"]
        numbers = 3 * cfg.patch_size**2
        if patches.ndim != 2 or patches.shape[1] != numbers:
            raise MediaError(
                f"patches are {tuple(patches.shape)}, but patch_size {cfg.patch_size} needs (L,{numbers}) numbers"
            )
        grids = check_grids(grid_thw, len(patches), cfg.init_pos_emb_time)
        lengths = [t * h * w for t, h, w in grids]
        heads = cfg.vt_num_attention_heads

        def tap(name: str, output: Tensor) -> Tensor:
            if taps is not None:
                taps[name] = output
            return output

        x = patch_embed(patches, embed["proj"].weight, embed["proj"].bias)  # (L,D)
        x = tap("patch_embed", x + position_embedding(embed["pos_emb"]["weight"], grids).to(x.dtype))
        # A bfloat16 model keeps float32 angles; a float64 model gets float64 ones.
        table_dtype = torch.promote_types(x.dtype, torch.float32)
        table = rope_table_2d(grids, cfg.vt_hidden_size // heads, dtype=table_dtype, device=x.device)  # (L,G/2)
        for i, block in enumerate(self.encoder["blocks"]):
            x = tap(f"encoder.blocks.{i}", vit_block(x, block.weights(), table, lengths, heads, self.attention))
        x = tap("encoder.final_layernorm", F.layer_norm(x, x.shape[1:], norm.weight, norm.bias, LN_EPS))
        return self.pool_merge(x, grids)


class Projector(nn.Module):
    """Merged patches to text embeddings; as attribute `mm_projector` its parameters carry the released names."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        wide = MERGE * MERGE * cfg.mm_hidden_size
        self.pre_norm = nn.LayerNorm(cfg.mm_hidden_size, eps=cfg.projector_ln_eps)
        self.proj = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, cfg.text_hidden_size))

    def forward(self, merged: Tensor) -> Tensor:
        """(M,4,D) -> (M,C)."""
        norm, fc0, fc1 = self.pre_norm, self.proj[0], self.proj[2]
        return project(merged, norm.weight, norm.bias, fc0.weight, fc0.bias, fc1.weight, fc1.bias, norm.eps)


def siglip_loss_reference(image_emb: Tensor, text_emb: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's contrastive loss: every image-text pair is its own yes/no question.

        loss = -1/I sum_i sum_j log sigmoid( y_ij (exp(log_scale) <u_i, v_j> + bias) ),  y = 1 if i = j else -1

    with u, v the embeddings scaled to length 1.

    Args: image_emb, text_emb: (I,Z) float — row i of one belongs to row i of the other; log_scale, bias: scalars.
    Returns: scalar; 0 for no images. Source: arXiv 2303.15343, algorithm 1; Kimi-VL 2.3.
    """
    u, v = F.normalize(image_emb, dim=1), F.normalize(text_emb, dim=1)
    logits = log_scale.exp() * u @ v.T + bias  # (I,I)
    sign = 2 * torch.eye(len(u), dtype=u.dtype, device=u.device) - 1
    return -F.logsigmoid(sign * logits).sum() / max(len(u), 1)


def siglip_loss_fused(
    image_emb: Tensor, text_emb: Tensor, log_scale: Tensor, bias: Tensor, chunk: int = 1024
) -> Tensor:
    """siglip_loss_reference over `chunk` images at a time, recomputed in backward: never the whole (I,I) matrix.

    Uses -log sigmoid(-z) = softplus(z) for every pair and softplus(z) - z for the true ones.
    """
    u, v = F.normalize(image_emb, dim=1), F.normalize(text_emb, dim=1)
    scale = log_scale.exp()

    def all_negative(rows: Tensor) -> Tensor:
        return F.softplus(scale * rows @ v.T + bias).sum()

    total = -(scale * (u * v).sum(dim=1) + bias).sum()
    for rows in u.split(chunk):
        total = total + checkpoint(all_negative, rows, use_reentrant=False)
    return total / max(len(u), 1)


class ContrastiveHead(nn.Module):
    """One embedding per item for siglip_loss: mean over its merged tokens, then a linear map; owns scale and bias.

    Args: width: D; out: Z. log_scale starts at log 10 and bias at -10, as SigLIP's.
    """

    def __init__(self, width: int, out: int):
        super().__init__()
        self.proj = nn.Linear(width, out)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, merged: Tensor, grid_thw: Tensor) -> Tensor:
        """Args: merged: (M,4,D) of the tower; grid_thw: (I,3). Returns: (I,Z)."""
        counts = [merged_tokens(grid) for grid in grid_thw.tolist()]
        means = [tokens.mean(dim=(0, 1)) for tokens in merged.split(counts)]  # (D,) each
        return self.proj(torch.stack(means) if means else merged.mean(dim=1))  # (I,Z)
