"""What a computation cannot do without: its FLOPs and the bytes that must move, by formula — K2.5 report 4.1, 4.2.

A machine that multiplies matrices at G FLOPs per second and copies C bytes per second needs at least
max(flops / G, bytes / C) seconds: its roofline. Work is counted as the cheapest way known to do it, every number read and
written once; padding, recomputation and copies are not work. Norms, rotations and activations count as nothing. What a
backward pass adds is counted as twice the forward pass.

Public names: Work, linear_work, seen_pairs, mla_work, absorbed_work, max_logits_work, experts_work, layer_work,
decoder_work, decode_work, vision_attention_work, vision_work, newton_schulz_work.
Letters: B batch rows, T tokens, S keys, H heads, C hidden, R latent rank, N/P/V nope/rope/value head dims, E experts,
K chosen, F expert width, L patches, D vision width. `size` is the bytes of one number.     Tests: pytest tests/test_bench.py
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a computation cannot do without: flops — multiplications and additions; bytes — read and written once."""

    flops: float
    bytes: float

    def __add__(self, other):
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times):
        return Work(self.flops * times, self.bytes * times)


def linear_work(rows, outputs, inputs, size):
    """y = x Wᵀ: 2·rows·outputs·inputs FLOPs; x, W and y once. size: bytes of one number."""
    return Work(2 * rows * outputs * inputs, size * (rows * inputs + outputs * inputs + rows * outputs))


def seen_pairs(tokens, keys):
    """Query-key pairs of one causal row whose T queries are the last of S keys: Σ (S − T + 1 … S)."""
    return tokens * keys - tokens * (tokens - 1) // 2


def mla_work(batch, tokens, keys, config, size):
    """MLA that expands keys and values, kv_b included: 2·B·S·R·H(N+V) + 2·pairs·H·(N+P+V) FLOPs.

    Bytes: queries, latents and rope keys, kv_b and the output once.
    """
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    query, value = config.qk_nope_head_dim + rope, config.v_head_dim
    up = rank * heads * (config.qk_nope_head_dim + value)
    flops = 2 * batch * keys * up + 2 * batch * seen_pairs(tokens, keys) * heads * (query + value)
    return Work(flops, size * (batch * tokens * heads * (query + value) + batch * keys * (rank + rope) + up))


def absorbed_work(batch, tokens, keys, config, size):
    """MLA over the latents themselves: 2·B·T·H·R·(N+V) + 2·pairs·H·(2R+P) FLOPs; the same bytes as `mla_work`."""
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    up = rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    flops = 2 * batch * tokens * up + 2 * batch * seen_pairs(tokens, keys) * heads * (2 * rank + rope)
    return Work(flops, mla_work(batch, tokens, keys, config, size).bytes)


def max_logits_work(tokens, config, size):
    """Largest logits of one causal row: its keys 2·T·R·H·N and 2·pairs·H·(N+P) FLOPs; queries and latents read once."""
    heads, rank, nope, rope = (config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim,
                               config.qk_rope_head_dim)  # fmt: skip
    flops = 2 * tokens * rank * heads * nope + 2 * seen_pairs(tokens, tokens) * heads * (nope + rope)
    return Work(flops, size * (tokens * (heads * (nope + rope) + rank + rope) + rank * heads * nope))


def experts_work(tokens, config, size):
    """Routed experts: 6·T·K·C·F FLOPs; the weights of the E(1 − (1 − K/E)^T) experts that even routing would touch."""
    n, chosen, width = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    touched = n * (1 - (1 - chosen / n) ** tokens)
    numbers = 3 * touched * config.hidden_size * width + 2 * tokens * config.hidden_size
    return Work(6 * tokens * chosen * config.hidden_size * width, size * numbers)


def layer_work(rows, tokens, keys, config, size, dense, absorbed=False):
    """One decoder layer on B rows of T tokens over S keys: projections, attention and feed-forward; norms are nothing."""
    every, hidden, heads = rows * tokens, config.hidden_size, config.num_attention_heads
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    work = linear_work(every, config.q_lora_rank, hidden, size)
    work += linear_work(every, heads * query, config.q_lora_rank, size)
    work += linear_work(every, config.kv_lora_rank + config.qk_rope_head_dim, hidden, size)
    work += (absorbed_work if absorbed else mla_work)(rows, tokens, keys, config, size)
    work += linear_work(every, hidden, heads * config.v_head_dim, size)
    if dense:
        return work + linear_work(every, config.intermediate_size, hidden, size) * 3
    work += linear_work(every, config.n_routed_experts, hidden, size) + experts_work(every, config, size)
    return work + linear_work(every, config.moe_intermediate_size * config.n_shared_experts, hidden, size) * 3


def decoder_work(rows, tokens, keys, asked, config, size, absorbed=False):
    """All layers on B rows of T tokens over S keys, and logits of `asked` tokens of each row."""
    dense = config.first_k_dense_replace
    work = layer_work(rows, tokens, keys, config, size, True, absorbed) * dense
    work += layer_work(rows, tokens, keys, config, size, False, absorbed) * (config.num_hidden_layers - dense)
    return work + linear_work(rows * asked, config.vocab_size, config.hidden_size, size)


def decode_work(rows, context, steps, config, size):
    """`steps` tokens of each row, one after another, behind `context` tokens: each step reads all it needs anew."""
    total = Work(0, 0)
    for step in range(steps):
        total += decoder_work(rows, 1, context + step + 1, 1, config, size, absorbed=True)
    return total


def vision_attention_work(lengths, width, size):
    """Attention inside items of these lengths: Σ 4·l²·D FLOPs; q, k, v and the output once."""
    return Work(sum(4 * n * n * width for n in lengths), size * 4 * sum(lengths) * width)


def vision_work(grids, vision, size):
    """Tower and projector: patches, blocks of 4D² + 2D·F weights, attention, and (4D)² + 4D·C per merged token."""
    patches, lengths = sum(math.prod(g) for g in grids), [math.prod(g) for g in grids]
    merged, width = sum(h * w // 4 for _, h, w in grids), vision.vt_hidden_size
    block = linear_work(patches, 4 * width, width, size) + linear_work(patches, vision.vt_intermediate_size, width, size) * 2
    work = linear_work(patches, width, 3 * vision.patch_size**2, size)
    work += (block + vision_attention_work(lengths, width, size)) * vision.vt_num_hidden_layers
    work += linear_work(merged, 4 * width, 4 * width, size)
    return work + linear_work(merged, vision.text_hidden_size, 4 * width, size)


def newton_schulz_work(matrices, rows, columns, steps, size):
    """Of (m,n) with m ≤ n, each step: the Gram matrix 2m²n, its square 2m³, the polynomial times X 2m²n."""
    m, n = min(rows, columns), max(rows, columns)
    return Work(matrices * steps * (4 * m * m * n + 2 * m**3), 2 * size * matrices * rows * columns)
