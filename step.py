"""One optimizer step of one process: losses, gradient, MuonClip, QK-Clip, router biases — K2.5 report 4.3, K2 report 2.1.

parallel.py takes the same step on many processes; this one says what it must come to.

Public names: StepResult, losses, contrastive_loss, train_step, clip_logits.
Letters: B rows, T tokens, C hidden, H heads, D vision width, M merged media tokens, I media items, E experts.
Tests: pytest tests/test_train_small.py
"""

import math
from dataclasses import dataclass

import torch

from activations import Memory, saving
from k25 import cross_entropy_fused, cross_entropy_reference
from moe import balance_bias_, load_cv
from optim import qk_clip_
from vit3d import siglip_loss_fused


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, all of it before the update but `clipped`."""

    loss: float  # nats per loss-carrying token, all modalities
    loss_text: float  # the same over text documents; nan without any
    loss_vision: float  # the same over documents with media
    balance: float  # sequence-wise balance loss, unweighted
    grad_norm: float
    max_logit: float  # largest attention logit of any head and layer
    clipped: int  # heads that QK-Clip scaled down
    load_cv: float  # coefficient of variation of the expert load, worst layer; nan without MoE layers
    load_layers: tuple  # the same, per MoE layer
    logit_layers: tuple  # largest attention logit per layer
    tokens: int


def losses(model, batch, want_max=True):
    """Per-token losses of one microbatch.

    Returns (loss (B,T) float32, 0 where none is wanted; Stats; merged (M,4,D) — the ViT's output, or None).
    """
    merged = None if batch.patches is None else model.vision_tower(batch.patches, batch.grid_thw)
    media = None if merged is None else model.mm_projector(merged)
    hidden, stats = model.hidden(model.embed(batch.ids, media), batch.positions, batch.segment_ids, want_max=want_max)
    cross_entropy = cross_entropy_fused if model.config.impl == "fused" else cross_entropy_reference
    targets = batch.targets.masked_fill(~batch.loss_mask, -100)
    per_token = cross_entropy(hidden.flatten(0, 1), model.language_model.lm_head.weight, targets.flatten())
    return per_token.view(batch.ids.shape), stats, merged


def contrastive_loss(model, batch, merged):
    """SigLIP's sigmoid loss between each document's first picture and the mean embedding of its answer — a flag beside
    the caption loss (Kimi-VL trained with both; the K2.5 report with captions only). merged: (M,4,D). Returns a scalar."""
    per_item = batch.grid_thw[:, 1] * batch.grid_thw[:, 2] // 4
    first_slot = batch.media_slots[per_item.cumsum(0) - per_item]  # (I,2) row and column
    segment = batch.segment_ids[first_slot[:, 0], first_slot[:, 1]]  # (I,)
    own = (batch.segment_ids[first_slot[:, 0]] == segment[:, None]) & batch.loss_mask[first_slot[:, 0]]  # (I,T)
    same = (first_slot[1:, 0] == first_slot[:-1, 0]) & (segment[1:] == segment[:-1])  # a clip's later chunk
    kept = own.any(dim=1) & ~torch.nn.functional.pad(same, (1, 0))
    words = model.language_model.model.embed_tokens(batch.targets.clamp(min=0))[first_slot[:, 0]]  # (I,T,C)
    text = (words * own[..., None]).sum(dim=1) / own.sum(dim=1, keepdim=True).clamp(min=1)  # (I,C)
    head = model.contrastive_head
    return siglip_loss_fused(head(merged.to(text.dtype), batch.grid_thw)[kept], text[kept],
                             head.log_scale, head.bias)  # fmt: skip


def train_step(model, optimizer, batches, t):
    """One optimizer step over microbatches that together are one global batch.

    loss = Σ token losses / N + aux_loss_alpha · balance loss, N all loss-carrying tokens of the global batch; then
    clip the gradient, MuonClip, QK-Clip once, and the router biases once, from the summed integer counts.
    batches: list of Batch; t: TrainConfig. Returns StepResult.
    """
    wanted, memory = max(sum(int(batch.loss_mask.sum()) for batch in batches), 1), Memory.of(t)
    sums = torch.zeros(2, 2, dtype=torch.float64)  # (text | vision, loss | tokens)
    counts, largest, balance = None, None, 0.0
    sequences = [int((batch.segment_ids >= 0).any(dim=1).sum()) for batch in batches]  # what the balance loss averages over
    for batch, rows in zip(batches, sequences):
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=t.dtype == "bfloat16"), saving(memory, model):
            per_token, stats, merged = losses(model, batch)
        share = rows / max(sum(sequences), 1)
        loss = per_token.sum() / wanted + model.config.aux_loss_alpha * share * stats.balance_loss
        if hasattr(model, "contrastive_head") and merged is not None:
            loss = loss + t.contrastive * share * contrastive_loss(model, batch, merged)
        if loss.requires_grad:  # not where only the tower moves and this microbatch has no picture
            loss.backward()
        counts = stats.counts if counts is None else tuple(a + b for a, b in zip(counts, stats.counts))
        largest = stats.max_logits if largest is None else torch.maximum(largest, stats.max_logits)
        balance += share * stats.balance_loss.item()
        for kind, mask in enumerate((batch.loss_mask & ~batch.vision, batch.loss_mask & batch.vision)):
            sums[kind] += torch.stack((per_token.detach().double()[mask].sum(), mask.sum().double())).cpu()
    moving = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(moving, t.clip_norm).item()
    text, vision = (float(total / number) if number else math.nan for total, number in sums)
    total = float(sums[:, 0].sum() / wanted)
    clipped = 0
    if math.isfinite(total) and math.isfinite(norm):
        optimizer.step()
        clipped = clip_logits(model, largest, t.qk_clip)
        if model.language_model.lm_head.weight.requires_grad:
            for router, count in zip(model.routers(), counts):
                balance_bias_(router.e_score_correction_bias, count, t.balance_gamma)
    optimizer.zero_grad(set_to_none=True)
    cvs = tuple(float(load_cv(count)) for count in counts)
    return StepResult(total, text, vision, balance, norm, float(largest.max()), clipped, max(cvs, default=math.nan), cvs,
                      tuple(largest.amax(dim=1).tolist()), sum(batch.ids.numel() for batch in batches))  # fmt: skip


def clip_logits(model, largest, tau):
    """QK-Clip on every attention layer that is being trained. largest: (layers,H). Returns the heads clipped."""
    config, clipped = model.config, 0
    for block, top in zip(model.language_model.model.layers, largest):
        attention = block.self_attn
        if attention.q_b_proj.weight.requires_grad:
            clipped += qk_clip_(attention.q_b_proj.weight, attention.kv_b_proj.weight, top, tau,
                                config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)  # fmt: skip
    return clipped
