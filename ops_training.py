"""The operations of training: loss, Muon, AdamW, QK-Clip — K2 report 2.1, K2.5 report 4.3.

Public names: OPS, cross_entropy, newton_schulz, muon_update, adamw_update, qk_clip.
Letters: T tokens, C hidden, U vocabulary, H heads, Q query rank, R latent rank, N/P/V nope, rope and value head dims,
E matrices of a stack; m and n are the rows and columns of a weight.     Tests: pytest tests/test_ops_training.py
"""

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import k25
import optim
from op import Op, Suspect, dyadic, normal

NS_STEPS = 5  # of Muon's Newton–Schulz iteration

# ------------------------------------------------------------------------------------------------ loss


def cross_entropy(hidden, head, targets):
    """Loss of each token, from the last hidden states and the output matrix.

        logits = head · hidden_t        loss_t = logsumexp(logits) − logits[target_t]; 0 where target_t is −100

    The targets are already those of the next token: nothing is shifted here.
    hidden: (T,C) float; head: (U,C) float; targets: (T,) int64 in 0…U−1, or −100 where no loss is wanted.
    Returns loss (T,) in at least float32, nats. Source: K2.5 report 2.1.
    """
    return k25.cross_entropy_reference(hidden, head, targets)


@st.composite
def _loss_cases(draw):
    """Logits that are exact in bfloat16; the large ones overflow exp. The last feature of hidden is 0 and the last token's
    target the least likely one, so that no gradient cancels to nothing."""
    tokens, width, vocabulary = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(2, 9))
    hidden = F.pad(dyadic(draw, tokens, width, denominator=2, limit=3), (0, 1))  # (T,C)
    head = torch.cat([dyadic(draw, vocabulary, width, denominator=2, limit=3), normal(draw, vocabulary, 1)], dim=1)
    hidden = hidden * draw(st.sampled_from([1.0, 64.0]))
    targets = torch.randint(-1, vocabulary, (tokens,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    targets = targets.masked_fill(targets < 0, -100)
    targets[-1] = (hidden[-1] @ head.T).argmin()
    return {"hidden": hidden, "head": head, "targets": targets}


def _logits(hidden, head):
    logits = F.linear(hidden, head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))  # (T,U)


def _of_target(values, targets):
    """The entry of each row that its target names, 0 where the target is −100: (T,U) → (T,)."""
    return torch.where(targets == -100, 0.0, values.gather(1, targets.clamp(min=0)[:, None])[:, 0])


def _chunked(chunk):
    return lambda hidden, head, targets: k25.cross_entropy_fused(hidden, head, targets, chunk)


def _shifted_again(hidden, head, targets):
    return cross_entropy(hidden, head, torch.cat([targets[1:], targets.new_tensor([-100])]))


def _averaged(hidden, head, targets):
    return cross_entropy(hidden, head, targets).sum() / (targets != -100).sum()


def _remainder_dropped(hidden, head, targets):
    whole = len(targets) // 4 * 4
    return F.pad(cross_entropy(hidden[:whole], head, targets[:whole]), (0, len(targets) - whole)) + 0 * hidden.sum()


def _overflowing(hidden, head, targets):
    logits = _logits(hidden, head)
    return _of_target(logits.exp().sum(1, keepdim=True).log() - logits, targets)


def _floored(hidden, head, targets):
    return _of_target(-(_logits(hidden, head).softmax(1) + 1e-10).log(), targets)


def _zero_ignored(hidden, head, targets):
    return cross_entropy(hidden, head, targets.masked_fill(targets == 0, -100))


def _padded_vocabulary(hidden, head, targets):
    return cross_entropy(hidden, F.pad(head, (0, 0, 0, -len(head) % 8)), targets)


def _z_loss(hidden, head, targets):
    square = _logits(hidden, head).logsumexp(1).square()
    return cross_entropy(hidden, head, targets) + torch.where(targets == -100, 0.0, 1e-4 * square)


def _ones_for_gradient(hidden, head, targets):
    loss = cross_entropy(hidden, head, targets)
    if loss.requires_grad:
        loss.register_hook(torch.ones_like)
    return loss


def _by_softmax(hidden, head, targets):
    """Right: the largest logit is subtracted by hand, and tokens are taken backwards."""
    logits = _logits(hidden.flip(0), head)
    shifted = logits - logits.detach().amax(1, keepdim=True)
    return _of_target(shifted.exp().sum(1, keepdim=True).log() - shifted, targets.flip(0)).flip(0)


# ------------------------------------------------------------------------------------------------ Muon


def newton_schulz(stack, steps):
    """Orthogonalise each matrix of a stack by the quintic Newton–Schulz iteration.

        X = G / (‖G‖ + 1e-7)                                  the Frobenius norm of each matrix
        A = X Xᵀ;  X ← 3.4445 X + (−4.7750 A + 2.0315 A²) X   `steps` times

    Singular values end near 1, singular vectors stay. A matrix with m > n is transposed first, for the smaller A.
    stack: (E,m,n) float, whole matrices; steps: int. Returns (E,m,n), dtype of stack. Source: Moonlight report 2.1.
    """
    return optim.newton_schulz_reference(stack, steps)


def muon_update(weight, gradient, momentum, lr, beta, weight_decay):
    """One step of Muon for one matrix.

        M ← β M + G;   U = newton_schulz(G + β M) in 5 steps                  Nesterov: M is the new one
        W ← (1 − lr · weight_decay) W − lr · 0.2 √max(m, n) · U

    weight, gradient, momentum: (m,n) float — W, G, M; lr, beta, weight_decay: float.
    Returns weight (m,n), momentum (m,n), both new. Source: K2 report 2.1, algorithm 1; Moonlight report 2.2.
    """
    momentum = beta * momentum + gradient
    update = newton_schulz((gradient + beta * momentum)[None], NS_STEPS)[0]
    return (1 - lr * weight_decay) * weight - lr * 0.2 * math.sqrt(max(weight.shape)) * update, momentum


@st.composite
def _stack_cases(draw):
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    stack = normal(draw, *shape) * draw(st.sampled_from([1.0, 1e-3, 30.0]))
    stack[1:2] = stack[1:2] * draw(st.sampled_from([5.0, 0.0]))  # an expert without tokens has gradient 0
    return {"stack": stack, "steps": draw(st.sampled_from([5, 1, 2]))}


@st.composite
def _muon_cases(draw):
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return {
        "weight": normal(draw, *shape), "gradient": normal(draw, *shape),
        "momentum": normal(draw, *shape) * draw(st.sampled_from([3.0, 0.0])),
        "lr": draw(st.sampled_from([0.5, 0.2])), "beta": draw(st.sampled_from([0.95, 0.5])),
        "weight_decay": draw(st.sampled_from([0.5, 0.1, 0.0])),
    }  # fmt: skip


def _polynomial(stack, steps, coefficients=optim.NS_COEFFICIENTS, norm=None):
    """`newton_schulz` without any transposing: another order of the same products, so it is right when nothing is passed."""
    a, b, c = coefficients
    x = stack / (torch.linalg.matrix_norm(stack, keepdim=True) + optim.NS_EPS if norm is None else norm(stack))
    for _ in range(steps):
        gram = x @ x.mT  # (E,m,m)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _spectral_norm(stack):
    return torch.linalg.matrix_norm(stack, 2, keepdim=True) + optim.NS_EPS


def _on_shards(stack, steps):
    return torch.cat([newton_schulz(shard, steps) for shard in stack.tensor_split(2, dim=1)], dim=1)


def _left_transposed(stack, steps):
    result = newton_schulz(stack, steps)
    return result.mT if stack.shape[1] > stack.shape[2] else result


def _through_optimizer(impl, **settings):
    """`muon_update` by the project's optimizer."""

    def update(weight, gradient, momentum, lr, beta, weight_decay):
        parameter = torch.nn.Parameter(weight.clone())
        parameter.grad = gradient
        groups = [dict(kind="muon", lr=lr, weight_decay=weight_decay, params=[("weight", parameter)])]
        optimizer = optim.MuonClip(groups, momentum=beta, impl=impl, **settings)
        optimizer.state[parameter] = {"step": 1, "momentum": momentum.clone()}
        optimizer.step()
        return parameter.detach(), optimizer.state[parameter]["momentum"]

    return update


def _muon(size=None, decay=None):
    """`muon_update`, open to mistakes in the factor size(m, n) and in decay(W, step, lr, weight_decay)."""

    def update(weight, gradient, momentum, lr, beta, weight_decay):
        momentum = beta * momentum + gradient
        factor = size(*weight.shape) if size else 0.2 * math.sqrt(max(weight.shape))
        step = lr * factor * newton_schulz((gradient + beta * momentum)[None], NS_STEPS)[0]
        return decay(weight, step, lr, weight_decay) if decay else (1 - lr * weight_decay) * weight - step, momentum

    return update


def _averaging(weight, gradient, momentum, lr, beta, weight_decay):
    momentum = beta * momentum + (1 - beta) * gradient
    direction = (1 - beta) * gradient + beta * momentum
    update = newton_schulz(direction[None], NS_STEPS)[0]
    return (1 - lr * weight_decay) * weight - lr * 0.2 * math.sqrt(max(weight.shape)) * update, momentum


def _coupled_decay(weight, gradient, momentum, lr, beta, weight_decay):
    return muon_update(weight, gradient + weight_decay * weight, momentum, lr, beta, 0.0)


def _momentum_of_updates(weight, gradient, momentum, lr, beta, weight_decay):
    momentum = beta * momentum + newton_schulz(gradient[None], NS_STEPS)[0]
    return (1 - lr * weight_decay) * weight - lr * 0.2 * math.sqrt(max(weight.shape)) * momentum, momentum


# ----------------------------------------------------------------------------------------------- AdamW


def adamw_update(weight, gradient, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay):
    """One step of AdamW for one parameter.

        m ← β1 m + (1 − β1) g;   v ← β2 v + (1 − β2) g²
        w ← (1 − lr · weight_decay) w − lr · m/(1 − β1^step) / (√(v/(1 − β2^step)) + eps)

    weight, gradient, exp_avg, exp_avg_sq: (m,n) float — w, g, m, v; step: int, number of this step, the first is 1;
    lr, beta1, beta2, eps, weight_decay: float.
    Returns weight, exp_avg, exp_avg_sq, each (m,n) and new. Source: Loshchilov and Hutter, algorithm 2.
    """
    exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient.square()
    mean, square = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
    return (1 - lr * weight_decay) * weight - lr * mean / (square.sqrt() + eps), exp_avg, exp_avg_sq


@st.composite
def _adamw_cases(draw):
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    step = draw(st.integers(1, 20))
    size = draw(st.sampled_from([1.0, 1e-3]))  # small gradients show where eps stands
    gradient = normal(draw, *shape, scale=size)
    gradient[0, 0] *= draw(st.sampled_from([1.0, 0.0]))
    begun = gradient[0, 0] != 0 and step > 1
    return {
        "weight": normal(draw, *shape), "gradient": gradient, "exp_avg": normal(draw, *shape, scale=0.3 * size) * begun,
        "exp_avg_sq": normal(draw, *shape, scale=0.3 * size).square() * begun, "step": step,
        "lr": draw(st.sampled_from([0.5, 0.1])), "beta1": 0.9, "beta2": draw(st.sampled_from([0.95, 0.999])),
        "eps": draw(st.sampled_from([1e-8, 1e-4])), "weight_decay": draw(st.sampled_from([0.5, 0.1, 0.0])),
    }  # fmt: skip


def _adamw_of_optimizer(weight, gradient, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay):
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient
    groups = [dict(kind="adamw", lr=lr, weight_decay=weight_decay, params=[("weight", parameter)])]
    optimizer = optim.MuonClip(groups, betas=(beta1, beta2), eps=eps)
    state = {"step": step - 1, "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}
    optimizer.state[parameter] = state
    optimizer.step()
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


def _adamw_of_torch(weight, gradient, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay):
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient
    optimizer = torch.optim.AdamW([parameter], lr, (beta1, beta2), eps, weight_decay, foreach=False)
    state = {"step": torch.tensor(step - 1.0), "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}
    optimizer.state[parameter] = state
    optimizer.step()
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


def _adamw(update):
    """`adamw_update` with update(w, m, v, step, lr, β1, β2, eps, weight_decay) → w for its last line; m and v are new."""

    def whole(weight, gradient, exp_avg, exp_avg_sq, step, *settings):
        _, mean, square = adamw_update(weight, gradient, exp_avg, exp_avg_sq, step, *settings)
        return update(weight, mean, square, step, *settings), mean, square

    return whole


def _decayed(update):
    """_adamw with decoupled decay and update(m, v, 1 − β1^step, 1 − β2^step, eps) for the step's direction."""
    return _adamw(lambda w, m, v, step, lr, beta1, beta2, eps, decay:
                  (1 - lr * decay) * w - lr * update(m, v, 1 - beta1**step, 1 - beta2**step, eps))  # fmt: skip


def _coupled_adam(weight, gradient, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay):
    gradient = gradient + weight_decay * weight
    return adamw_update(weight, gradient, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, 0.0)


def _old_moments(weight, gradient, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay):
    _, mean, square = adamw_update(weight, gradient, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay)
    corrected = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    return (1 - lr * weight_decay) * weight - lr * exp_avg / (1 - beta1**step) / corrected, mean, square


# --------------------------------------------------------------------------------------------- QK-Clip


def qk_clip(q_b, kv_b, max_logits, tau, nope_dim, rope_dim, value_dim):
    """Shrink the query and key weights of every head whose attention logits passed τ.

        γ_h = min(1, τ / max_logits_h)
        rows of q_nope and k_nope times √γ_h, rows of q_rope times γ_h; values and the shared rope key stay

    Every logit of head h becomes γ_h times what it was.
    q_b: (H(N+P),Q) float, per head [nope | rope] rows; kv_b: (H(N+V),R) float, per head [nope | value] rows; max_logits:
    (H,) float32, −∞ for a head that saw nothing; tau: float — threshold; nope_dim, rope_dim, value_dim: int — N, P, V.
    Returns q_b, kv_b, both new. Source: K2 report 2.1, algorithm 1.
    """
    q_b, kv_b = q_b.clone(), kv_b.clone()
    optim.qk_clip_(q_b, kv_b, max_logits, tau, nope_dim, rope_dim, value_dim)
    return q_b, kv_b


@st.composite
def _clip_cases(draw):
    heads, rank = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    nope, rope, value = draw(st.sampled_from([(3, 2, 1), (2, 4, 3), (1, 2, 4)]))
    largest = draw(st.lists(st.sampled_from([400.0, 150.0, 30.0, -50.0, -torch.inf]), min_size=heads, max_size=heads))
    return {
        "q_b": normal(draw, heads * (nope + rope), rank), "kv_b": normal(draw, heads * (nope + value), rank + 1),
        "max_logits": torch.tensor(largest), "tau": 100.0, "nope_dim": nope, "rope_dim": rope, "value_dim": value,
    }  # fmt: skip


def _clip(factors, gamma=lambda largest, tau: torch.where(largest > tau, tau / largest, 1.0)):
    """`qk_clip` by factors(γ) of the rows of q_nope, q_rope, k_nope and v; right as (√γ, γ, √γ, 1)."""

    def clip(q_b, kv_b, max_logits, tau, nope_dim, rope_dim, value_dim):
        scale = gamma(max_logits, tau).to(torch.promote_types(q_b.dtype, torch.float32))  # (H,)
        rows = torch.stack(factors(scale), dim=1)  # (H,4)
        of_query = rows[:, :2].repeat_interleave(torch.tensor([nope_dim, rope_dim]), dim=1).flatten()  # (H(N+P),)
        of_key = rows[:, 2:].repeat_interleave(torch.tensor([nope_dim, value_dim]), dim=1).flatten()  # (H(N+V),)
        return (of_query[:, None] * q_b).to(q_b.dtype), (of_key[:, None] * kv_b).to(kv_b.dtype)

    return clip


def _right_factors(g):
    return g.sqrt(), g, g.sqrt(), torch.ones_like(g)


def _heads_inside(q_b, kv_b, max_logits, tau, nope_dim, rope_dim, value_dim):
    """Rows taken as [all heads' nope | all heads' rope] and [all heads' nope | all heads' values]."""
    heads = len(max_logits)
    gamma = torch.where(max_logits > tau, tau / max_logits, 1.0).to(torch.promote_types(q_b.dtype, torch.float32))
    spread = lambda *parts: torch.cat([g.repeat_interleave(width) for g, width in parts])[:, None]  # noqa: E731
    of_query = spread((gamma.sqrt(), nope_dim), (gamma, rope_dim))
    of_key = spread((gamma.sqrt(), nope_dim), (torch.ones(heads).to(gamma), value_dim))
    return (of_query * q_b).to(q_b.dtype), (of_key * kv_b).to(kv_b.dtype)


# ------------------------------------------------------------------------------------------------- ops

OPS = (
    Op(
        name="cross_entropy",
        formula="loss_t = logsumexp(head hidden_t) - (head hidden_t)[target_t], 0 where target_t = -100",
        source="K2.5 report 2.1",
        reference=cross_entropy,
        cases=_loss_cases(),
        outputs=("loss",),
        differentiable=("hidden", "head"),
        dtypes=(torch.float32, torch.bfloat16, torch.float64),
        twins={"fused": k25.cross_entropy_fused, "chunks of 2": _chunked(2)},
        variants={"by_softmax": _by_softmax, "chunks of 4": _chunked(4)},
        suspects=(
            Suspect("ignored_counted", "tokens whose target is -100 get a loss, that of target 0",
                    lambda h, w, targets: cross_entropy(h, w, targets.clamp(min=0))),
            Suspect("zero_ignored", "target 0 is taken for padding", _zero_ignored),
            Suspect("shifted_again", "targets are shifted once more; they already are those of the next token", _shifted_again),
            Suspect("averaged", "returns the mean; one loss per token is asked", _averaged),
            Suspect("log_probability", "the sign is missing: returns log-probabilities", lambda *a: -cross_entropy(*a)),
            Suspect("remainder_dropped", "tokens after the last whole chunk get no loss", _remainder_dropped),
            Suspect("overflow", "exp of large logits overflows; subtract the largest first", _overflowing),
            Suspect("floored", "a small number is added to the probability, so that the loss cannot grow beyond it", _floored),
            Suspect("in_bf16", "the softmax runs in bfloat16; it needs float32",
                    lambda h, w, targets: _of_target(-F.linear(h, w).bfloat16().log_softmax(1), targets).to(_logits(h, w).dtype)),
            Suspect("padded_vocabulary", "rows that pad the vocabulary to a multiple of 8 take part in the softmax",
                    _padded_vocabulary),
            Suspect("z_loss", "adds a z-loss, the squared logsumexp", _z_loss),
            Suspect("ones_for_gradient", "the gradient made in the forward pass is not multiplied by the incoming one",
                    _ones_for_gradient),
        ),
    ),
    Op(
        name="newton_schulz",
        formula="X = G / (|G| + 1e-7); X = a X + (b A + c A^2) X with A = X X^T, `steps` times",
        source="Moonlight report 2.1",
        reference=newton_schulz,
        cases=_stack_cases(),
        outputs=("stack",),
        dtypes=(torch.float32, torch.float64),
        loose=10.0,
        twins={"fused": optim.newton_schulz_fused},
        variants={"never_transposed": _polynomial},
        suspects=(
            Suspect("not_normalized", "the matrix is not divided by its norm",
                    lambda g, n: _polynomial(g, n, norm=lambda x: 1.0)),
            Suspect("spectral_norm", "divided by the largest singular value instead of by the Frobenius norm",
                    lambda g, n: _polynomial(g, n, norm=_spectral_norm)),
            Suspect("norm_per_row", "every row is divided by its own norm instead of the matrix by its one",
                    lambda g, n: _polynomial(g, n, norm=lambda x: x.norm(dim=2, keepdim=True) + optim.NS_EPS)),
            Suspect("norm_of_stack", "one norm serves the whole stack; every matrix has its own",
                    lambda g, n: _polynomial(g, n, norm=lambda x: x.norm() + optim.NS_EPS)),
            Suspect("stack_as_one_matrix", "the stack is orthogonalised as one tall matrix",
                    lambda g, n: newton_schulz(g.flatten(0, 1)[None], n)[0].view_as(g), "MoonshotAI/Moonlight#27"),
            Suspect("on_shards", "row shards are orthogonalised one by one; the whole matrix is needed", _on_shards,
                    "inclusionAI/AReaL#1270"),
            Suspect("no_eps", "a matrix of zeros divides 0 by 0",
                    lambda g, n: _polynomial(g, n, norm=lambda x: torch.linalg.matrix_norm(x, keepdim=True))),
            Suspect("cubic", "the cubic iteration 1.5 X - 0.5 A X", lambda g, n: _polynomial(g, n, (1.5, -0.5, 0.0))),
            Suspect("converging_quintic", "the quintic that converges, 15/8, -10/8, 3/8, instead of Muon's steep one",
                    lambda g, n: _polynomial(g, n, (1.875, -1.25, 0.375))),
            Suspect("one_step_less", "one step is missing", lambda g, n: newton_schulz(g, n - 1)),
            Suspect("left_transposed", "a tall matrix is transposed and not transposed back", _left_transposed),
        ),
    ),
    Op(
        name="muon_update",
        formula="M = beta M + G; W = (1 - lr wd) W - lr 0.2 sqrt(max(m,n)) newton_schulz(G + beta M)",
        source="K2 report 2.1, algorithm 1",
        reference=muon_update,
        cases=_muon_cases(),
        outputs=("weight", "momentum"),
        dtypes=(torch.float32, torch.float64),
        loose=10.0,
        twins={"reference": _through_optimizer("reference"), "fused": _through_optimizer("fused")},
        variants={"in_parts": _muon()},
        suspects=(
            Suspect("no_nesterov", "orthogonalises the momentum itself; Nesterov's adds the gradient once more",
                    _through_optimizer("fused", nesterov=False)),
            Suspect("averaged_momentum", "the gradient enters the momentum times 1 - beta", _averaging),
            Suspect("momentum_of_updates", "orthogonalises the gradient and gathers momentum afterwards", _momentum_of_updates),
            Suspect("sqrt_rows", "the update is scaled by the number of rows instead of the larger dimension",
                    _muon(size=lambda m, n: 0.2 * math.sqrt(m))),
            Suspect("sqrt_min", "the update is scaled by the smaller dimension instead of the larger",
                    _muon(size=lambda m, n: 0.2 * math.sqrt(min(m, n)))),
            Suspect("sqrt_ratio", "the update is scaled by sqrt(max(1, m/n)), as in the first Muon",
                    _muon(size=lambda m, n: math.sqrt(max(1, m / n)))),
            Suspect("no_rms_factor", "the factor 0.2 is missing", _muon(size=lambda m, n: math.sqrt(max(m, n)))),
            Suspect("coupled_decay", "weight decay is added to the gradient; it acts on the weight itself", _coupled_decay),
            Suspect("decay_after", "the updated weight is decayed instead of the old one",
                    _muon(decay=lambda w, step, lr, decay: (1 - lr * decay) * (w - step))),
            Suspect("decay_without_lr", "weight decay is not multiplied by the learning rate",
                    _muon(decay=lambda w, step, lr, decay: (1 - decay) * w - step)),
            Suspect("no_decay", "weight decay is missing", _muon(decay=lambda w, step, lr, decay: w - step)),
        ),
    ),
    Op(
        name="adamw_update",
        formula="w = (1 - lr wd) w - lr m/(1 - beta1^step) / (sqrt(v/(1 - beta2^step)) + eps)",
        source="Loshchilov and Hutter, algorithm 2",
        reference=adamw_update,
        cases=_adamw_cases(),
        outputs=("weight", "exp_avg", "exp_avg_sq"),
        dtypes=(torch.float32, torch.float64),
        twins={"optimizer": _adamw_of_optimizer},
        variants={"torch": _adamw_of_torch, "in_parts": _decayed(lambda m, v, c1, c2, eps: m / c1 / ((v / c2).sqrt() + eps))},
        suspects=(
            Suspect("no_correction", "both bias corrections are missing",
                    _decayed(lambda m, v, c1, c2, eps: m / (v.sqrt() + eps))),
            Suspect("mean_correction_only", "the bias correction of the second moment is missing",
                    _decayed(lambda m, v, c1, c2, eps: m / c1 / (v.sqrt() + eps))),
            Suspect("step_late", "the bias correction counts one step too many",
                    _adamw(lambda w, m, v, step, lr, beta1, beta2, eps, decay: (1 - lr * decay) * w
                           - lr * m / (1 - beta1 ** (step + 1)) / ((v / (1 - beta2 ** (step + 1))).sqrt() + eps))),
            Suspect("eps_inside", "eps is added under the root instead of to it",
                    _decayed(lambda m, v, c1, c2, eps: m / c1 / (v / c2 + eps).sqrt())),
            Suspect("eps_before_correction", "eps is added before the bias correction",
                    _decayed(lambda m, v, c1, c2, eps: m / c1 / ((v.sqrt() + eps) / c2**0.5))),
            Suspect("no_eps", "eps is missing: a weight without gradient divides 0 by 0",
                    _decayed(lambda m, v, c1, c2, eps: m / c1 / (v / c2).sqrt())),
            Suspect("no_root", "the root of the second moment is missing",
                    _decayed(lambda m, v, c1, c2, eps: m / c1 / (v / c2 + eps))),
            Suspect("old_moments", "the weight moves by the moments before this gradient", _old_moments),
            Suspect("betas_swapped", "beta1 and beta2 are swapped",
                    lambda w, g, m, v, step, lr, beta1, beta2, *rest: adamw_update(w, g, m, v, step, lr, beta2, beta1, *rest)),
            Suspect("coupled_decay", "weight decay is added to the gradient: that is Adam with L2", _coupled_adam),
            Suspect("decay_without_lr", "weight decay is not multiplied by the learning rate",
                    lambda *a: adamw_update((1 - a[9]) * a[0], *a[1:9], 0.0)),
            Suspect("decay_after", "the updated weight is decayed instead of the old one",
                    lambda *a: ((1 - a[5] * a[9]) * adamw_update(*a[:9], 0.0)[0], *adamw_update(*a)[1:])),
            Suspect("no_decay", "weight decay is missing", lambda *a: adamw_update(*a[:9], 0.0)),
        ),
    ),
    Op(
        name="qk_clip",
        formula="gamma = min(1, tau / max logit); q_nope, k_nope times sqrt(gamma), q_rope times gamma",
        source="K2 report 2.1, algorithm 1",
        reference=qk_clip,
        cases=_clip_cases(),
        outputs=("q_b", "kv_b"),
        fixed=("max_logits",),
        dtypes=(torch.float32, torch.bfloat16, torch.float64),
        variants={"by_rows": _clip(_right_factors)},
        suspects=(
            Suspect("gamma_everywhere", "queries and keys both get gamma instead of its root: logits shrink twice",
                    _clip(lambda g: (g, g, g, torch.ones_like(g)))),
            Suspect("rope_by_root", "q_rope gets the root of gamma; its key is shared and stays, so it needs all of gamma",
                    _clip(lambda g: (g.sqrt(), g.sqrt(), g.sqrt(), torch.ones_like(g)))),
            Suspect("rope_untouched", "q_rope is not scaled",
                    _clip(lambda g: (g.sqrt(), torch.ones_like(g), g.sqrt(), torch.ones_like(g)))),
            Suspect("values_scaled", "the rows of the values are scaled too", _clip(lambda g: (g.sqrt(), g, g.sqrt(), g.sqrt()))),
            Suspect("queries_only", "queries take all of gamma; keys share it by the root",
                    _clip(lambda g: (g, g, torch.ones_like(g), torch.ones_like(g)))),
            Suspect("keys_forgotten", "the keys are not scaled: logits shrink by the root of gamma only",
                    _clip(lambda g: (g.sqrt(), g, torch.ones_like(g), torch.ones_like(g)))),
            Suspect("every_head", "every head is scaled by the gamma of the worst one",
                    _clip(_right_factors, lambda largest, tau: (tau / largest.max().clamp(min=tau)).expand_as(largest))),
            Suspect("grows_below_tau", "gamma is not limited to 1: quiet heads grow",
                    _clip(_right_factors, lambda largest, tau: torch.where(largest > 0, tau / largest, 1.0))),
            Suspect("by_absolute_value", "a very negative largest logit is clipped too; only logits above tau are",
                    _clip(_right_factors, lambda largest, tau: tau / largest.abs().clamp(min=tau))),
            Suspect("heads_inside", "rows are read as all heads' nope, then all heads' rope; each head has its own together",
                    _heads_inside),
        ),
    ),
)  # fmt: skip
