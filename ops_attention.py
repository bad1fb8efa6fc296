"""The operations of attention: norm, rotary positions, YaRN, MLA, its cache — K2.5 report 4.2.

Public names: OPS.
Letters: B batch, T query tokens, S key tokens, H heads, C hidden, R latent rank, N/P/V nope/rope/value head dims,
W cache capacity.     Tests: pytest tests/test_ops_attention.py
"""

import torch
from hypothesis import strategies as st

from mla import Yarn, softmax_scale as _softmax_scale
from op import Op, Suspect, normal


def rms_norm(x, weight, eps):
    """Root-mean-square norm over the last dimension.

        y = x / √(mean(x²) + eps) · weight          the mean in at least float32

    x: (...,C) float; weight: (C,) float; eps: float. Returns y (...,C), dtype of x. Source: K2 report 2.3.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


@st.composite
def _norm_cases(draw):
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    scale = draw(st.sampled_from([1.0, 1e-3, 100.0]))  # tiny rows show a missing or misplaced eps
    return {"x": normal(draw, rows, width, scale=scale), "weight": 1 + normal(draw, width), "eps": 1e-5}


def _layer_norm(x, weight, eps):
    return rms_norm(x - x.mean(dim=-1, keepdim=True), weight, eps)


def _no_eps(x, weight, eps):
    return rms_norm(x, weight, 0.0)


def _eps_outside(x, weight, eps):
    return weight * x / (x.square().mean(dim=-1, keepdim=True).sqrt() + eps)


def _one_plus_weight(x, weight, eps):
    return rms_norm(x, 1 + weight, eps)


def softmax_scale(nope_dim, rope_dim, factor, mscale, mscale_all_dim):
    """The factor on MLA's logits before the softmax.

        (N + P)^−½ · (0.1 · mscale_all_dim · ln factor + 1)²        0.144680 at released size; mscale has no part in it

    nope_dim, rope_dim: int — N, P; factor, mscale, mscale_all_dim: float — of rope_scaling; factor 1 is plain RoPE.
    Returns float. Source: SPEC of the released config; DeepSeek-V3's YaRN.
    """
    return _softmax_scale(nope_dim, rope_dim, Yarn(factor=factor, mscale=mscale, mscale_all_dim=mscale_all_dim))


@st.composite
def _scale_cases(draw):
    return {
        "nope_dim": draw(st.sampled_from([128, 4, 1])), "rope_dim": draw(st.sampled_from([64, 2])),
        "factor": draw(st.sampled_from([64.0, 1.0, 4.0])), "mscale": draw(st.sampled_from([1.0, 0.5])),
        "mscale_all_dim": draw(st.sampled_from([1.0, 0.7])),
    }  # fmt: skip


OPS = (
    Op(
        name="rms_norm",
        formula="y = x / sqrt(mean(x^2) + eps) * weight",
        source="K2 report 2.3",
        reference=rms_norm,
        cases=_norm_cases(),
        outputs=("y",),
        differentiable=("x", "weight"),
        dtypes=(torch.float32, torch.bfloat16, torch.float64),
        suspects=(
            Suspect("subtracts_mean", "subtracts the mean: that is LayerNorm", _layer_norm),
            Suspect("no_eps", "eps is missing", _no_eps),
            Suspect("eps_outside", "eps is added to the root instead of under it", _eps_outside),
            Suspect("one_plus_weight", "multiplies by 1 + weight, as Gemma does", _one_plus_weight),
        ),
    ),
    Op(
        name="softmax_scale",
        formula="(N+P)^-1/2 (0.1 mscale_all_dim ln factor + 1)^2",
        source="DeepSeek-V3, modelling code",
        reference=softmax_scale,
        cases=_scale_cases(),
        outputs=("scale",),
        suspects=(
            Suspect(
                "mscale_for_all_dim",
                "the factor comes from mscale instead of mscale_all_dim",
                lambda n, p, factor, mscale, all_dim: softmax_scale(n, p, factor, 1.0, mscale),
                "NVIDIA/Megatron-LM#1429",
            ),
            Suspect(
                "no_yarn_factor",
                "YaRN's squared factor is missing",
                lambda n, p, factor, mscale, all_dim: (n + p) ** -0.5,
                "huggingface/transformers#47435",
            ),
        ),
    ),
)
