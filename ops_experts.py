"""The operations of the experts: router, SwiGLU experts, load balancing — K2.5 report 4.2. Int4 is in ops_int4.py.

Public names: OPS, route, experts, swiglu, load_counts, balance_bias, balance_loss.
Letters: B batch, T tokens, C hidden, E experts, K chosen experts per token, F expert width.
Tests: pytest tests/test_ops_experts.py
"""

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st

import moe
from op import Op, Suspect, dyadic, normal

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _wide(x):
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _choices(draw, tokens, n_experts, top_k):
    """(T,K) int64: distinct experts for each token, in any order."""
    return normal(draw, tokens, n_experts).argsort(dim=1)[:, :top_k].contiguous()


# ---------------------------------------------------------------------------------------------- router


def route(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
    """Choose K experts per token by biased scores, and weigh them by unbiased ones.

        s = sigmoid(W x)                        in at least float32
        group score = sum of the two largest s + b of a group of E/n_group consecutive experts; the best topk_group stay
        index = the K largest s + b of the groups that stay (all others are −∞), best first; the lower index wins a tie
        weights = scale · s[index] / Σ s[index]

    x: (T,C) float — tokens; weight: (E,C) float — router matrix; bias: (E,) float32 whatever the dtype of x — correction
    that moves the choice, never the weights; top_k: int — K; n_group, topk_group: int — groups, and how many of them a
    token may use; scale: float — routed_scaling_factor; pinned: (T,K) int64 or None — experts to take instead of
    choosing (replay); their weights still come from the scores and carry gradient.
    Returns weights (T,K) in at least float32, index (T,K) int64. Source: DeepSeek-V3 report, equations 12–16.
    """
    routing = moe.route_reference(x, weight, bias, top_k, n_group, topk_group, scale, True, pinned)
    return routing.weights, routing.index


def _route(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
    routing = moe.route_fused(x, weight, bias, top_k, n_group, topk_group, scale, True, pinned)
    return routing.weights, routing.index


def _decided(values):
    """No two candidates, ranked by the sums of their parts (T,n,parts), so close that rounding would rank them."""
    total = values.sum(2)
    close = (total[:, :, None] - total[:, None]).abs() < 2e-5  # (T,n,n)
    same = (values[:, :, None] == values[:, None]).all(3)
    return not (close & ~same).any()


@st.composite
def _route_cases(draw):
    """K ≥ 2, since one normalised weight is the constant `scale`. Logits are exact in bfloat16 and few, so that experts tie.

    The last feature of x is 0: rows of the router may then differ where logits tie, and no gradient cancels to nothing.
    """
    n_group, size = draw(st.sampled_from([1, 2, 3, 4, 3])), draw(st.integers(2, 6))
    topk_group = draw(st.integers(1, max(n_group - 1, 1)))
    tokens, n_experts, width = draw(st.integers(1, 8)), n_group * size, draw(st.integers(1, 3))
    top_k = draw(st.integers(2, min(topk_group * size, 4)))
    x = F.pad(dyadic(draw, tokens, width, denominator=2, limit=draw(st.sampled_from([2, 1]))), (0, 1))  # (T,C)
    weight = torch.cat([dyadic(draw, n_experts, width, denominator=2, limit=2), normal(draw, n_experts, 1)], dim=1)
    # a large negative offset: a mask of 0 would win, and bfloat16 keeps only multiples of 1/16 of it
    bias = dyadic(draw, n_experts, denominator=64, limit=draw(st.sampled_from([64, 8, 0]))) - 15
    biased = torch.sigmoid(x.double() @ weight.double().T) + bias  # (T,E)
    assume(_decided(biased[:, :, None]) and _decided(biased.unflatten(1, (n_group, -1)).sort(2).values[:, :, -2:]))
    replay = draw(st.sampled_from([False, False, False, True]))
    return {
        "x": x, "weight": weight, "bias": bias, "top_k": top_k, "n_group": n_group, "topk_group": topk_group,
        "scale": draw(st.sampled_from([2.827, 1.0])),
        "pinned": _choices(draw, tokens, n_experts, top_k) if replay else None,
    }  # fmt: skip


def _scores(x, weight):
    return torch.sigmoid(_wide(x) @ _wide(weight).T)  # (T,E)


def _weigh(scores, index, scale):
    chosen = scores.gather(1, index)  # (T,K)
    return chosen / (chosen.sum(1, keepdim=True) + 1e-20) * scale


def _select(biased, top_k, n_group, topk_group, fill=-torch.inf, best=2, ranking=None):
    """The choice of `route`, open to mistakes: in the mask's value, and in how and by what groups are ranked."""
    ranking = (biased if ranking is None else ranking).unflatten(1, (n_group, -1))  # (T,n_group,E/n_group)
    group_scores = ranking.topk(min(best, ranking.shape[2]), dim=2).values.sum(2)  # (T,n_group)
    order = group_scores.sort(dim=1, descending=True, stable=True).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, order[:, :topk_group], False)
    masked = biased.unflatten(1, (n_group, -1)).masked_fill(dropped[:, :, None], fill).flatten(1)  # (T,E)
    return masked.sort(dim=1, descending=True, stable=True).indices[:, :top_k]


def _scored(scoring, **mistake):
    """`route` with scoring(x, weight) for scores and with a mistake in `_select`."""

    def wrong(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
        scores = scoring(x, weight)
        if pinned is None:
            pinned = _select((scores + bias).detach(), top_k, n_group, topk_group, **mistake)
        return _weigh(scores, pinned, scale), pinned

    return wrong


def _biased_weights(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
    _, index = _route(x, weight, bias, top_k, n_group, topk_group, scale, pinned)
    return _weigh(_scores(x, weight) + bias, index, scale), index


def _groups_by_unbiased(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
    scores = _scores(x, weight)
    if pinned is None:
        pinned = _select((scores + bias).detach(), top_k, n_group, topk_group, ranking=scores.detach())
    return _weigh(scores, pinned, scale), pinned


def _not_normalized(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
    routing = moe.route_fused(x, weight, bias, top_k, n_group, topk_group, scale, False, pinned)
    return routing.weights, routing.index


def _normalized_over_all(x, weight, *settings):
    _, index = _route(x, weight, *settings)
    scores = _scores(x, weight)
    return scores.gather(1, index) / scores.sum(1, keepdim=True) * settings[4], index


def _constant_sum(x, weight, *settings):
    _, index = _route(x, weight, *settings)
    chosen = _scores(x, weight).gather(1, index)
    return chosen / chosen.sum(1, keepdim=True).detach() * settings[4], index


def _ties_to_the_higher(x, weight, bias, *settings):
    *choice, pinned = settings
    mirrored = None if pinned is None else len(bias) - 1 - pinned
    weights, index = _route(x, weight.flip(0), bias.flip(0), *choice, mirrored)
    return weights, len(bias) - 1 - index


def _sorted_by_index(x, weight, bias, *settings):
    weights, index = _route(x, weight, bias, *settings)
    order = index.argsort(dim=1) if settings[4] is None else torch.arange(index.shape[1]).expand_as(index)
    return weights.gather(1, order), index.gather(1, order)


def _replay_of_zeros(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
    weights, own = _route(x, weight, bias, top_k, n_group, topk_group, scale, None)
    if pinned is None:
        return weights, own
    kept = torch.zeros(len(x), len(bias), dtype=weights.dtype).scatter(1, own, 1.0)  # (T,E), 0 where not chosen
    return _weigh(_scores(x, weight) * kept, pinned, scale), pinned


def _replay_detached(x, weight, *settings):
    weights, index = _route(x, weight, *settings)
    return (weights if settings[5] is None else weights.detach() + 0 * weights), index


def _ranked_by_counting(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
    """Right: the place of an expert is the number of those before it; features are summed backwards; exp, not sigmoid."""

    def place(values):
        seat = torch.arange(values.shape[1])
        mine, other = values[:, :, None], values[:, None]  # (T,n,1), (T,1,n)
        return ((other > mine) | ((other == mine) & (seat < seat[:, None]))).sum(2)  # (T,n)

    scores = 1 / (1 + torch.exp(-(_wide(x).flip(1)[:, None] * _wide(weight).flip(1)).sum(2)))  # (T,E)
    if pinned is None:
        groups = (scores + bias).detach().unflatten(1, (n_group, -1))  # (T,n_group,E/n_group)
        kept = place(groups.sort(dim=2).values[:, :, -2:].sum(2)) < topk_group
        places = place(groups.masked_fill(~kept[:, :, None], -torch.inf).flatten(1))  # (T,E)
        pinned = places.argsort(dim=1)[:, :top_k]
    return _weigh(scores, pinned, scale), pinned


# --------------------------------------------------------------------------------------------- experts


def experts(x, weights, index, gate, up, down):
    """Sum of the chosen experts' outputs.

        y_t = Σ_k weights[t,k] · down_e (silu(gate_e x_t) ⊙ up_e x_t)        e = index[t,k]

    x: (T,C) float — tokens; weights: (T,K) float — of the router; index: (T,K) int64 — distinct experts of each token;
    gate, up: (E,F,C) float, down: (E,C,F) float — matrices of all experts, some of which no token chose.
    Returns y (T,C), dtype of x; the sum is taken in at least float32. Source: DeepSeek-V3 report, equation 12.
    """
    return moe.experts_reference(x, _wide(weights), index, gate, up, down)


def swiglu(x, gate, up, down):
    """Gated feed-forward: one expert, or the dense layer.

        y = down (silu(gate x) ⊙ up x)        silu(z) = z · sigmoid(z)

    x: (T,C) float; gate, up: (F,C) float; down: (C,F) float. Returns y (T,C), dtype of x. Source: K2.5 report 4.2.
    """
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@st.composite
def _expert_cases(draw):
    tokens, n_experts = draw(st.integers(1, 6)), draw(st.integers(2, 6))  # often some experts get no token
    top_k, hidden, width = draw(st.integers(1, min(n_experts, 3))), draw(st.integers(3, 8)), draw(st.integers(1, 8))
    return {
        "x": normal(draw, tokens, hidden), "weights": normal(draw, tokens, top_k).sigmoid(),
        "index": _choices(draw, tokens, n_experts, top_k),
        "gate": normal(draw, n_experts, width, hidden, scale=hidden**-0.5),
        "up": normal(draw, n_experts, width, hidden, scale=hidden**-0.5),
        "down": normal(draw, n_experts, hidden, width, scale=width**-0.5),
    }  # fmt: skip


@st.composite
def _swiglu_cases(draw):
    tokens, hidden, width = draw(st.integers(1, 4)), draw(st.integers(3, 8)), draw(st.integers(1, 8))
    return {
        "x": normal(draw, tokens, hidden), "gate": normal(draw, width, hidden, scale=draw(st.sampled_from([0.5, 2.0]))),
        "up": normal(draw, width, hidden), "down": normal(draw, hidden, width, scale=width**-0.5),
    }  # fmt: skip


def _gated(activation):
    """`swiglu` with activation(gate x, up x) for silu(gate x) ⊙ up x."""
    return lambda x, gate, up, down: F.linear(activation(F.linear(x, gate), F.linear(x, up)), down)


def _by_choice(one_expert):
    """`experts` as a sum over the choices of one_expert(token, weight, gate, up, down)."""

    def all_experts(x, weights, index, gate, up, down):
        outputs = [sum(one_expert(x[t], weights[t, k], gate[e], up[e], down[e]) for k, e in enumerate(chosen))
                   for t, chosen in enumerate(index.tolist())]  # fmt: skip
        return torch.stack(outputs).to(x.dtype)  # (T,C)

    return all_experts


def _weighted(activation):
    return _by_choice(lambda x, w, *matrices: _wide(w) * _gated(activation)(x, *matrices))


def _interleaved(x, weights, index, gate, up, down):
    fused = torch.cat([gate, up], dim=1)  # (E,2F,C)
    return experts(x, weights, index, fused[:, ::2], fused[:, 1::2], down)


def _unsorted_weights(x, weights, index, gate, up, down):
    order = index.flatten().argsort(stable=True)  # (T*K,) choice of each row, rows sorted by expert
    moved = torch.zeros_like(weights).flatten().index_copy(0, order, weights.flatten())
    return experts(x, moved.view_as(weights), index, gate, up, down)


def _overwrites(x, weights, index, gate, up, down):
    return experts(x, weights * (index == index.amax(1, keepdim=True)), index, gate, up, down)


def _drops_beyond_capacity(x, weights, index, gate, up, down):
    capacity = -(-index.numel() // len(gate))
    chosen = F.one_hot(index.flatten(), len(gate))  # (T*K,E)
    rank = (chosen.cumsum(0) * chosen).sum(1).view_as(index)  # from 1, among the choices of the same expert
    return experts(x, weights * (rank <= capacity), index, gate, up, down)


def _dense(x, weights, index, gate, up, down):
    """Right: every expert computes every token, and most weights are 0."""
    factor = torch.zeros(len(x), len(gate), dtype=_wide(weights).dtype).scatter(1, index, _wide(weights))  # (T,E)
    hidden = F.silu(torch.einsum("tc,efc->tef", x, gate)) * torch.einsum("tc,efc->tef", x, up)
    return torch.einsum("te,tec->tc", factor, _wide(torch.einsum("tef,ecf->tec", hidden, down))).to(x.dtype)


def _experts_backwards(x, weights, index, gate, up, down):
    """Right: experts in falling order."""
    return experts(x, weights, len(gate) - 1 - index, gate.flip(0), up.flip(0), down.flip(0))


# ------------------------------------------------------------------------------------------- balancing


def load_counts(index, n_experts, valid):
    """How many (token, choice) pairs each expert received.

        counts_e = #{(t,k): index[t,k] = e and token t is valid}

    index: (T,K) int64; n_experts: int — E; valid: (T,) bool, False where a token is padding, or None if none is.
    Returns counts (E,) int64. Source: DeepSeek-V3 report 2.1.2.
    """
    return moe.load_counts(index, n_experts, valid)


def balance_bias(bias, counts, gamma):
    """The router's bias after one optimizer step.

        b_e + γ · sign(mean load − load_e)

    bias: (E,) float32 — kept so whatever the dtype of the model; counts: (E,) int64 — loads summed over the whole
    global batch; gamma: float — γ. Returns a new bias (E,). Source: DeepSeek-V3 report 2.1.2.
    """
    return moe.balance_bias_(bias.clone(), counts, gamma)


def balance_loss(scores, index, valid):
    """Sequence-wise balance loss, without its coefficient.

        f_e = E / (K n) · number of valid tokens that chose e          of one sequence with n valid tokens; no gradient
        P_e = 1/n · Σ_t s_te / Σ_e' s_te'
        loss = mean over the sequences of Σ_e f_e P_e; those without a valid token do not count (0 if none has one)

    scores: (B,T,E) float — unbiased sigmoid scores; index: (B,T,K) int64; valid: (B,T) bool, False at padding, or None.
    Returns loss (), dtype of scores. Source: DeepSeek-V3 report, equations 17–20.
    """
    return moe.sequence_balance_loss_reference(scores, index, valid)


@st.composite
def _count_cases(draw):
    tokens, n_experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(n_experts, 3)))
    valid = normal(draw, tokens) > 0 if draw(st.booleans()) else None
    return {"index": _choices(draw, tokens, n_experts, top_k), "n_experts": n_experts, "valid": valid}


@st.composite
def _bias_cases(draw):
    counts = draw(st.lists(st.sampled_from([0, 2, 3, 4]), min_size=1, max_size=6))
    offset, gamma = draw(st.sampled_from([0.0, 7.5])), draw(st.sampled_from([0.001, 0.01]))
    return {"bias": offset + normal(draw, len(counts), scale=0.1), "counts": torch.tensor(counts), "gamma": gamma}


@st.composite
def _loss_cases(draw):
    batch, tokens, n_experts = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 5))
    top_k = draw(st.integers(1, min(n_experts, 3)))
    padding = draw(st.sampled_from([None, "some", "a sequence"]))
    valid = normal(draw, batch, tokens) > 0 if padding else None
    if padding == "a sequence":
        valid[-1] = False
    index = _choices(draw, batch * tokens, n_experts, top_k).view(batch, tokens, top_k)
    return {"scores": normal(draw, batch, tokens, n_experts).sigmoid(), "index": index, "valid": valid}


def _padding_as_expert_0(index, n_experts, valid):
    return load_counts(index if valid is None else index * valid[:, None], n_experts, None)


def _duplicates_lost(index, n_experts, valid):
    return load_counts(index, n_experts, valid).clamp(max=1)


def _unequal_only(bias, counts, gamma):
    return bias + gamma * torch.where(counts * len(counts) < counts.sum(), 1.0, -1.0)


def _centred(bias, counts, gamma):
    step = balance_bias(torch.zeros_like(bias), counts, gamma)
    return bias + step - step.mean()


def _mean_of_the_busy(bias, counts, gamma):
    return bias + gamma * torch.sign(counts.sum() / (counts > 0).sum().clamp(min=1) - counts)


def _balance(scores, index, valid, share=None, count=None, scale=None, mean=None):
    """`balance_loss`, open to mistakes: share (B,T,E), who counts (B,T,E), factor (n → f's), and the mean over sequences."""
    n_experts, top_k = scores.shape[2], index.shape[2]
    valid = torch.ones(scores.shape[:2], dtype=torch.bool) if valid is None else valid
    n = valid.sum(1).to(scores.dtype)  # (B,)
    count = F.one_hot(index, n_experts).sum(2) if count is None else count  # (B,T,E)
    share = scores / scores.sum(2, keepdim=True) if share is None else share
    chosen = (count * valid[:, :, None]).sum(1)  # (B,E)
    mass = torch.where(valid[:, :, None], share, 0.0).sum(1)
    factor = n_experts / top_k / n.clamp(min=1) if scale is None else scale(n)
    losses = factor * (chosen * mass).sum(1) / n.clamp(min=1)  # (B,)
    return (losses.sum() / (n > 0).sum().clamp(min=1) if mean is None else mean(losses)).to(scores.dtype)


def _whole_batch(scores, index, valid):
    flat = None if valid is None else valid.flatten()[None]
    return balance_loss(scores.flatten(0, 1)[None], index.flatten(0, 1)[None], flat)


def _padded_length(scores, index, valid):
    factor = scores.shape[2] / index.shape[2] / scores.shape[1]
    return _balance(scores, index, valid, scale=lambda n: factor * n.clamp(min=1) / scores.shape[1])


def _chosen_only(scores, index, valid):
    kept = torch.zeros_like(scores).scatter(2, index, 1.0) * scores  # (B,T,E)
    return _balance(scores, index, valid, share=kept / kept.sum(2, keepdim=True))


def _first_choice_loss(scores, index, valid):
    return _balance(scores, index, valid, count=F.one_hot(index[:, :, 0], scores.shape[2]) * index.shape[2])


def _empty_sequence_nan(scores, index, valid):
    loss = balance_loss(scores, index, valid)
    return loss if valid is None or valid.any(1).all() else loss * torch.nan


# ------------------------------------------------------------------------------------------------- ops

OPS = (
    Op(
        name="swiglu",
        formula="y = down (silu(gate x) * up x)",
        source="K2.5 report 4.2",
        reference=swiglu,
        cases=_swiglu_cases(),
        outputs=("y",),
        differentiable=("x", "gate", "up", "down"),
        dtypes=ALL_DTYPES,
        loose=4.0,
        variants={"by_exp": _gated(lambda gate, up: gate / (1 + torch.exp(-gate)) * up)},
        suspects=(
            Suspect("gate_up_swapped", "gate and up are swapped: silu acts on up", _gated(lambda gate, up: gate * F.silu(up))),
            Suspect("gelu", "GELU instead of SiLU", _gated(lambda gate, up: F.gelu(gate) * up)),
            Suspect("relu", "ReLU instead of SiLU", _gated(lambda gate, up: F.relu(gate) * up)),
            Suspect("sigmoid", "sigmoid instead of SiLU: that is GLU", _gated(lambda gate, up: gate.sigmoid() * up)),
            Suspect("no_activation", "the activation is missing", _gated(lambda gate, up: gate * up)),
            Suspect("silu_of_product", "silu acts on the product of gate and up", _gated(lambda gate, up: F.silu(gate * up))),
            Suspect("up_plus_one", "multiplies by up + 1, as gpt-oss does", _gated(lambda gate, up: F.silu(gate) * (up + 1))),
        ),
    ),
    Op(
        name="route",
        formula="s = sigmoid(W x); index = top-K of s + b; weights = scale s[index] / sum s[index]",
        source="DeepSeek-V3 report, equations 12-16",
        reference=route,
        cases=_route_cases(),
        outputs=("weights", "index"),
        differentiable=("x", "weight"),
        fixed=("bias",),
        dtypes=ALL_DTYPES,
        loose=4.0,
        twins={"fused": _route},
        variants={"ranked_by_counting": _ranked_by_counting},
        suspects=(
            Suspect("biased_weights", "the weights come from the biased scores; the bias moves only the choice",
                    _biased_weights, "vllm-project/vllm#12002"),
            Suspect("bias_ignored", "the correction bias is ignored",
                    lambda x, w, b, *settings: _route(x, w, 0 * b, *settings), "NVIDIA-NeMo/Megatron-Bridge#4657"),
            Suspect("bias_in_bf16", "the correction bias was cast to bfloat16, where its values collapse into a few",
                    lambda x, w, b, *settings: _route(x, w, b.bfloat16().to(b.dtype), *settings), "sgl-project/sglang#37133"),
            Suspect("masked_groups_zero", "dropped groups are filled with 0 instead of -inf and win against negative scores",
                    _scored(_scores, fill=0.0), "huggingface/transformers#45440"),
            Suspect("group_score_is_the_max", "a group is scored by its best expert instead of by the sum of its two best",
                    _scored(_scores, best=1)),
            Suspect("group_score_is_the_sum", "a group is scored by all its experts instead of by its two best",
                    _scored(_scores, best=10**6)),
            Suspect("groups_by_unbiased", "groups are chosen by the unbiased scores", _groups_by_unbiased),
            Suspect("groups_ignored", "the limit to the best groups is ignored",
                    lambda x, w, b, k, n, kept, scale, pinned: _route(x, w, b, k, 1, 1, scale, pinned)),
            Suspect("softmax", "the scores are a softmax over the experts instead of sigmoids",
                    _scored(lambda x, w: (_wide(x) @ _wide(w).T).softmax(1))),
            Suspect("scores_in_bf16", "the scores are computed in bfloat16, where experts tie; they need float32",
                    _scored(lambda x, w: torch.sigmoid(x.bfloat16() @ w.bfloat16().T).to(_wide(x).dtype))),
            Suspect("not_normalized", "the weights are not divided by their sum", _not_normalized),
            Suspect("normalized_over_all", "the weights are divided by the sum over all experts, not over the chosen",
                    _normalized_over_all),
            Suspect("no_scale", "the factor routed_scaling_factor is missing",
                    lambda x, w, b, k, n, kept, scale, pinned: _route(x, w, b, k, n, kept, 1.0, pinned)),
            Suspect("sum_without_gradient", "no gradient flows through the sum that the weights are divided by",
                    _constant_sum),
            Suspect("ties_to_the_higher", "ties go to the higher index", _ties_to_the_higher, "vllm-project/vllm#52679"),
            Suspect("sorted_by_index", "the right experts in the order of their index; the best comes first", _sorted_by_index),
            Suspect("replay_ignored", "pinned experts are ignored: the router chooses for itself",
                    lambda *arguments: _route(*arguments[:-1], None)),
            Suspect("replay_of_zeros", "pinned experts that the router would not choose get weight 0 and no gradient",
                    _replay_of_zeros, "ISEEKYAN/Megatron-LM#79"),
            Suspect("replay_detached", "the weights of pinned experts are detached: no gradient reaches the router",
                    _replay_detached),
        ),
    ),
    Op(
        name="experts",
        formula="y_t = sum_k weights[t,k] swiglu_index[t,k](x_t)",
        source="DeepSeek-V3 report, equation 12",
        reference=experts,
        cases=_expert_cases(),
        outputs=("y",),
        differentiable=("x", "weights", "gate", "up", "down"),
        dtypes=ALL_DTYPES,
        loose=4.0,
        twins={"fused": moe.experts_fused},
        variants={"dense": _dense, "backwards": _experts_backwards},
        suspects=(
            Suspect("gate_up_swapped", "gate and up are swapped: silu acts on up",
                    lambda x, w, i, gate, up, down: experts(x, w, i, up, gate, down)),
            Suspect("gate_up_interleaved", "the rows of gate and up are read as if they alternated in one matrix", _interleaved),
            Suspect("gelu", "GELU instead of SiLU", _weighted(lambda gate, up: F.gelu(gate) * up)),
            Suspect("no_activation", "the activation is missing", _weighted(lambda gate, up: gate * up)),
            Suspect("weights_ignored", "the chosen experts are summed without their weights",
                    lambda x, w, *rest: experts(x, w.detach() * 0 + 1 + 0 * w, *rest)),
            Suspect("weights_twice", "the weights are applied twice", lambda x, w, *rest: experts(x, w * w, *rest)),
            Suspect("weights_on_input", "the weights multiply the tokens before the expert instead of its output",
                    _by_choice(lambda x, w, *matrices: swiglu(w * x, *matrices))),
            Suspect("weights_detached", "the weights are detached: no gradient reaches the router",
                    lambda x, w, *rest: experts(x, w.detach(), *rest)),
            Suspect("weights_unsorted", "tokens were sorted by expert, their weights were not", _unsorted_weights),
            Suspect("first_choice_only", "only the first choice of each token is computed",
                    lambda x, w, i, *rest: experts(x, w[:, :1], i[:, :1], *rest)),
            Suspect("overwritten", "an expert's output replaces those of earlier experts instead of adding to them", _overwrites),
            Suspect("mean_over_choices", "the outputs are averaged over the choices instead of summed",
                    lambda x, w, *rest: experts(x, w / w.shape[1], *rest)),
            Suspect("capacity", "tokens beyond an expert's share of the batch are dropped; K2 drops none",
                    _drops_beyond_capacity),
        ),
    ),
    Op(
        name="load_counts",
        formula="counts_e = number of valid (token, choice) pairs with index = e",
        source="DeepSeek-V3 report 2.1.2",
        reference=load_counts,
        cases=_count_cases(),
        outputs=("counts",),
        variants={"bincount": lambda index, n, valid: (index if valid is None else index[valid]).flatten().bincount(minlength=n)},
        suspects=(
            Suspect("padding_counted", "padding tokens are counted", lambda index, n, valid: load_counts(index, n, None)),
            Suspect("padding_as_expert_0", "padding tokens are counted as tokens of expert 0", _padding_as_expert_0),
            Suspect("counted_twice", "every token is counted twice, as when activation recompute runs the forward pass again",
                    lambda *arguments: 2 * load_counts(*arguments), "NVIDIA/Megatron-LM#1330"),
            Suspect("first_choice_only", "only the first choice of each token is counted",
                    lambda index, n, valid: load_counts(index[:, :1], n, valid)),
            Suspect("duplicates_lost", "counts[index] += 1 adds once per expert, however often the expert occurs",
                    _duplicates_lost),
            Suspect("too_short", "the counts end at the last expert that was chosen (bincount without minlength)",
                    lambda index, n, valid: load_counts(index, n, valid)[: index.max() + 1]),
        ),
    ),
    Op(
        name="balance_bias",
        formula="b_e + gamma sign(mean load - load_e)",
        source="DeepSeek-V3 report 2.1.2",
        reference=balance_bias,
        cases=_bias_cases(),
        outputs=("bias",),
        dtypes=(torch.float32, torch.float64),
        variants={"by_division": lambda b, counts, gamma: b + gamma * torch.sign(counts.double().mean() - counts).to(b.dtype)},
        suspects=(
            Suspect("sign_reversed", "the sign is reversed: busy experts get busier",
                    lambda b, counts, gamma: balance_bias(b, counts, -gamma)),
            Suspect("proportional", "the step is proportional to the distance from the mean load; only its sign counts",
                    lambda b, counts, gamma: b + gamma * (1 - counts / counts.to(b.dtype).mean().clamp(min=1e-9))),
            Suspect("in_bf16", "the bias is kept in bfloat16, where small steps vanish",
                    lambda b, *rest: balance_bias(b, *rest).bfloat16().to(b.dtype), "NVIDIA/Megatron-LM#1482"),
            Suspect("no_gamma", "gamma is missing: the bias moves by 1", lambda b, counts, gamma: balance_bias(b, counts, 1.0)),
            Suspect("never_rests", "an expert at the mean load moves too; sign(0) is 0", _unequal_only),
            Suspect("integer_mean", "the mean load is rounded down to an integer",
                    lambda b, counts, gamma: b + gamma * torch.sign(counts.sum() // len(counts) - counts)),
            Suspect("mean_of_the_busy", "experts without load are left out of the mean", _mean_of_the_busy),
            Suspect("centred", "the mean of the step is subtracted from it", _centred),
            Suspect("step_only", "only the step is returned; the old bias is forgotten",
                    lambda b, *rest: balance_bias(0 * b, *rest)),
            Suspect("in_place", "changes the caller's bias; the op returns a new one", moe.balance_bias_),
        ),
    ),
    Op(
        name="balance_loss",
        formula="mean over sequences of sum_e f_e P_e",
        source="DeepSeek-V3 report, equations 17-20",
        reference=balance_loss,
        cases=_loss_cases(),
        outputs=("loss",),
        differentiable=("scores",),
        dtypes=(torch.float32, torch.float64),
        loose=4.0,
        twins={"fused": moe.sequence_balance_loss_fused},
        variants={"one_hot": _balance},
        suspects=(
            Suspect("f_not_scaled", "the factor E/K of f is missing",
                    lambda *a: _balance(*a, scale=lambda n: 1 / n.clamp(min=1))),
            Suspect("k_missing", "f is not divided by K", lambda s, i, v: balance_loss(s, i, v) * i.shape[2]),
            Suspect("p_not_normalized", "P averages the raw sigmoids; each token's scores are to be divided by their sum",
                    lambda s, i, v: _balance(s, i, v, share=s)),
            Suspect("p_by_softmax", "P normalises the scores by a softmax instead of by their sum",
                    lambda s, i, v: _balance(s, i, v, share=s.softmax(2))),
            Suspect("p_of_the_chosen", "P counts only the scores of chosen experts", _chosen_only),
            Suspect("whole_batch", "f and P run over the whole batch instead of one sequence each", _whole_batch),
            Suspect("sum_over_sequences", "the losses of the sequences are added instead of averaged",
                    lambda *a: _balance(*a, mean=torch.sum)),
            Suspect("padding_counted", "padding tokens are counted", lambda s, i, v: balance_loss(s, i, None)),
            Suspect("padded_length", "f and P are divided by the padded length instead of by the number of valid tokens",
                    _padded_length),
            Suspect("empty_sequence_counted", "the mean counts sequences that are all padding",
                    lambda *a: _balance(*a, mean=torch.mean)),
            Suspect("empty_sequence_nan", "a sequence that is all padding divides 0 by 0", _empty_sequence_nan),
            Suspect("first_choice_only", "f counts only the first choice of each token", _first_choice_loss),
        ),
    ),
)  # fmt: skip
