"""MuonClip, balance of the experts, sparsity: what is said of K2's training, on small decoders of text — K2 report 2.1, 2.3; DeepSeek-V3 2.1.2.

    muonclip   seed 0   AdamW and Muon at each of RATES → each one's rate; Muon's largest logits there and HOTTER → τ; MuonClip at each of RATES
               seeds    all three at their rates; MuonClip for half the tokens; all three HOTTER
    balance    seed 0   the bias at each of GAMMAS → γ; the auxiliary loss at each of ALPHAS → the α of the same balance
               seeds    no balancing, the bias, the auxiliary loss
    sparsity   seeds    2 active experts of 2, 4, 8, 16 and 32

Every cell is a decoder from scratch, its loss measured on the same held-out batches as in all others, on the way and at the end.

Rules, fixed beforehand. Rate, γ and α are chosen on seed 0 after as many steps as the seeds get: the rate of the lowest loss on the same
held-out batches, the γ of the most even load, the α whose load comes nearest to that. τ is half the largest attention logit that Muon
without QK-Clip reaches on seed 0 at the same rate, and at most the report's 100; QK-Clip bounds the logits where they are larger without it and
stay below BOUND τ with it, with every seed. Losses count as alike within MARGIN, balance within SAME_CV.

Public names: SHAPE, SMALLEST, RATES, HOTTER, LARGEST, BOUND, GAMMAS, ALPHAS, EXPERTS, MARGIN, SAME_CV, trained, adamw, best, threshold, nearest,
reached, doublings, slopes, unigram, muonclip, balance, sparsity.
Tests: pytest tests/test_training_claims.py
"""

import dataclasses
import math
from itertools import islice

import matplotlib.pyplot as plt
import numpy as np

from k25 import K25Config
from lab import NOT, REPLICATES, Claim, blend, decoder, judge, judge_alike, loss_on, worst
from optim import MuonClip
from rl_report import plot_arms, save_figure
from sft import SFTConfig, train_on
from sources import TEXT_WEIGHTS, weighted
from study import bootstrap, intervals, read_rows

SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 2, "first_k_dense_replace": 0, "moe_intermediate_size": 48, "n_routed_experts": 8, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
SMALLEST = SHAPE | {"hidden_size": 16, "moe_intermediate_size": 16, "n_routed_experts": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
RATES = (0.001, 0.002, 0.004, 0.008, 0.016)  # one for all of a model's parameters: Muon's updates are as large as AdamW's
HOTTER = 16  # times the chosen rate
LARGEST = 100.0  # τ of the report
BOUND = 2  # times τ: a logit is capped in the step after the one in which it is too large
DECAY = 0.1  # weight decay
RATE = 0.008  # of balance and sparsity
GAMMAS = (0.002, 0.005, 0.01, 0.02)  # speed of the bias
ALPHAS = (0.01, 0.03, 0.1, 0.3)  # weight of the auxiliary loss
EXPERTS = (2, 4, 8, 16, 32)  # of which 2 are active
NARROW = 16  # width of an expert of sparsity
LATE = 0.25  # share of training, the last, over which loads are averaged
MARGIN = 0.05  # nats per token
SAME_CV = 0.05  # of coefficients of variation


# ----------------------------------------------------------------------------------------------- cells


def trained(folder, name, log, seed, kind, rate, tau, gamma, alpha, steps, rows, length, points, held_out, shape):
    """Train a decoder on text. kind: "adamw" or "muon"; tau: of QK-Clip, None: no clip; gamma: of the router bias; alpha: of the auxiliary
    loss; points: at which the loss is measured, evenly over training; held_out: batches.

    Returns the losses (points, held_out), the largest attention logit of training, and the late coefficient of variation of the load."""
    t = SFTConfig(steps, rows, length, rate, rate, DECAY, dtype="float32", qk_clip=tau or math.inf, balance_gamma=gamma)
    model = decoder(seed, aux_loss_alpha=alpha, **shape)
    optimizer = adamw(model, rate, DECAY) if kind == "adamw" else None
    texts, wanted = _held_out(t, held_out), {round(steps * n / points) for n in range(1, points + 1)}
    curve, logits, loads = [], [], []
    for step, result in enumerate(train_on(model, blend(weighted(TEXT_WEIGHTS), 0.0, t, seed), t, optimizer), 1):
        log(step=step, **dataclasses.asdict(result))
        logits.append(result.max_logit)
        loads.append(np.mean(result.load_layers))
        if step in wanted:
            curve.append([loss_on(model, [batch]) for batch in texts])
    return {"curve": curve, "max_logit": max(logits), "load_cv": float(np.mean(loads[-round(LATE * steps) :]))}


def _held_out(t, number):
    """Batches of held-out text, the same for all cells."""
    return list(islice(blend(weighted(TEXT_WEIGHTS), 0.0, t, 0, "heldout"), number))


def adamw(model, rate, decay):
    """AdamW for every parameter, with weight decay for matrices."""
    named = list(model.named_parameters())
    parts = ([pair for pair in named if pair[1].ndim > 1], decay), ([pair for pair in named if pair[1].ndim < 2], 0.0)
    return MuonClip([{"kind": "adamw", "lr": rate, "weight_decay": share, "params": params} for params, share in parts])


class _Cells:
    """The cells of one experiment: runs them on top of what they share, and finds their rows."""

    def __init__(self, scale, name, steps, **fields):
        self.scale, self.name, self.steps, self.seeds, self.folder = scale, name, steps, scale.seeds, scale.folder / name
        self.shared = {"kind": "muon", "rate": RATE, "tau": LARGEST, "gamma": SFTConfig.balance_gamma, "alpha": K25Config.aux_loss_alpha,
                       "steps": steps, "rows": scale.pick(4, 1), "length": scale.pick(192, 96), "points": scale.pick(10, 2),
                       "held_out": scale.pick(12, 2), "shape": scale.pick(SHAPE, SMALLEST)} | fields  # fmt: skip

    def run(self, changes):
        """changes: {name: fields}. Returns {name: result}."""
        cells = {name: self.shared | fields for name, fields in changes.items()}
        return self.scale.run(self.name, cells, trained, {name: cell["steps"] for name, cell in cells.items()})

    def of_seeds(self, arms):
        """Every arm with every seed. arms: {arm: fields}. Returns {arm: [result, …]}."""
        found = self.run({f"{arm}-{s}": {"seed": s} | fields for s in self.seeds for arm, fields in arms.items()})
        return {arm: [found[f"{arm}-{s}"] for s in self.seeds] for arm in arms}

    def logged(self, arm, key):
        """A metric of all steps, (S,steps) or (S,steps,layers)."""
        return np.array([[row[key] for row in read_rows(self.folder, f"{arm}-{s}")] for s in self.seeds], float)

    def tokens(self, steps):
        """Of so many steps, padding included."""
        return steps * self.shared["rows"] * self.shared["length"]

    def setup(self):
        """What all arms have in common, in words."""
        t = SFTConfig(1, self.shared["rows"], self.shared["length"])
        letters = unigram(_held_out(t, self.shared["held_out"]))
        guess = math.log(K25Config.preset("toy").vocab_size)
        return (f"decoders of width {self.shared['shape']['hidden_size']} from scratch, {self.steps} steps, {self.tokens(self.steps):,} tokens of "
                f"text with padding; {self.shared['held_out']} held-out batches, nats per token (a uniform guess {guess:.2f}, their own letter "
                f"frequencies {letters:.2f})")  # fmt: skip


# --------------------------------------------------------------------------------------------- figures


def best(values):
    """The key of the lowest value; what is not a number is the worst. values: {key: float}."""
    return min(values, key=lambda key: values[key] if math.isfinite(values[key]) else math.inf)


def threshold(largest):
    """τ of QK-Clip from the largest logit without it."""
    return min(LARGEST, largest / 2)


def nearest(values, goal):
    """The key whose value comes nearest to a goal, as a ratio. values: {key: positive float}."""
    return min(values, key=lambda key: abs(math.log(values[key] / goal)))


def reached(goal, curve):
    """The share of training after which a curve of P even points first is as low as a goal, straight between the points; 1 where it never is."""
    lowest = np.minimum.accumulate(curve)
    return float(np.interp(goal, lowest[::-1], np.arange(len(curve), 0, -1) / len(curve)))


def doublings(goal, half, whole):
    """How often the tokens of a run can be halved until its loss rises to a goal: straight through the losses of a run with half
    the tokens and with all of them, over log₂ of the tokens. Arrays of floats."""
    return (goal - whole) / (half - whole)


def _reached(others, runs):
    """Share of training after which each run is as low as the other's end, (S,1)."""
    return np.array([[reached(np.mean(other["curve"][-1]), np.mean(run["curve"], axis=1))] for other, run in zip(others, runs)])


def slopes(losses, xs):
    """Least-squares slope of the loss on x. losses: (S,X,B); xs: (X,). Returns (S,B)."""
    centred = np.asarray(xs, float) - np.mean(xs)
    return np.einsum("x,sxb->sb", centred / (centred @ centred), np.asarray(losses))


def unigram(batches):
    """Nats per token of a model that knows nothing but how often each token occurs in these very Batches."""
    counts = np.unique(np.concatenate([batch.targets[batch.loss_mask].numpy() for batch in batches]), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _final(cells):
    """Held-out losses at the end of training, (S,B)."""
    return np.array([cell["curve"][-1] for cell in cells])


def _column(cells, key):
    return np.array([[cell[key]] for cell in cells])  # (S,1)


def _times(more, less):
    """How many times larger, from logarithms so that no seed outweighs another: (Estimate of the logarithm, words)."""
    found = bootstrap(np.log(more / less))
    return found, _power(found, math.e)


def _power(logarithm, base):
    """An Estimate of a logarithm as a factor, in words."""
    return f"{base**logarithm.mean:.2f} × [{base**logarithm.low:.2f}, {base**logarithm.high:.2f}]"


def _grid(values):
    return ", ".join(f"{key:g}: {value:.3f}" for key, value in values.items())


# ------------------------------------------------------------------------------------------- muonclip


def muonclip(scale):
    """MuonClip against AdamW and against Muon without QK-Clip. Returns list of Claim."""
    cells = _Cells(scale, "muonclip", scale.pick(300, 4))
    grids, rates, taus = _choose(cells, scale.pick(RATES, RATES[1:3]))
    hot = {kind: HOTTER * rates[kind] for kind in ("adamw", "muon")}
    clip = {"rate": rates["muonclip"], "tau": taus["calm"]}
    arms = {
        "adamw": {"kind": "adamw", "rate": rates["adamw"], "tau": None}, "muon": {"rate": rates["muon"], "tau": None}, "muonclip": clip,
        "half": clip | {"steps": cells.steps // 2}, "hot-adamw": {"kind": "adamw", "rate": hot["adamw"], "tau": None},
        "hot-muon": {"rate": hot["muon"], "tau": None}, "hot-muonclip": {"rate": hot["muon"], "tau": taus["hot"]},
    }  # fmt: skip
    found = cells.of_seeds(arms)
    _plot_muonclip(cells, found, taus)
    return [*_loss_claims(cells, found, grids, rates, taus), *_logit_claims(found, rates, hot, taus)]


def _choose(cells, grid):
    """On seed 0: ({optimizer: {rate: loss}}, {optimizer: rate}, {"calm" | "hot": τ}). grid: rates."""
    grids, rates = {}, {}

    def search(optimizer, **fields):
        found = cells.run({f"rate-{optimizer}-{rate:g}": {"seed": 0, "rate": rate} | fields for rate in grid})
        grids[optimizer] = {rate: float(np.mean(cell["curve"][-1])) for rate, cell in zip(grid, found.values())}
        rates[optimizer] = best(grids[optimizer])
        return found[f"rate-{optimizer}-{rates[optimizer]:g}"]["max_logit"]

    search("adamw", kind="adamw", tau=None)
    calm = search("muon", tau=None)
    hot = cells.run({"hot-muon-0": {"seed": 0, "rate": HOTTER * rates["muon"], "tau": None}})["hot-muon-0"]["max_logit"]
    taus = {"calm": threshold(calm), "hot": threshold(hot)}
    search("muonclip", tau=taus["calm"])
    return grids, rates, taus


def _loss_claims(cells, found, grids, rates, taus):
    losses = {arm: _final(found[arm]) for arm in found}
    means = "; ".join(f"{arm} {bootstrap(losses[arm])}" for arm in ("adamw", "muon", "muonclip"))
    chosen = "; ".join(f"{name} {rates[name]:g} ({_grid(grid)})" for name, grid in grids.items())
    gain = bootstrap(losses["adamw"] - losses["muonclip"])
    yield Claim("MuonClip learns more from as many tokens than AdamW", "K2 report 2.1", "Muon substantially outperforms AdamW at equal training",
                f"{cells.setup()}; one rate for all parameters, the best of {len(grids['adamw'])} by held-out loss on seed 0: {chosen}; "
                f"τ = {taus['calm']:.3g}",
                f"{means}; AdamW less MuonClip {gain}", judge(gain), "muonclip.png")  # fmt: skip
    fewer = bootstrap(doublings(*(losses[arm].mean(1, keepdims=True) for arm in ("adamw", "half", "muonclip"))))
    shares = _reached(found["adamw"], found["muonclip"])
    yield Claim("… and needs half the tokens", "Moonlight, abstract", "about 2 × the computational efficiency of AdamW",
                f"MuonClip for {cells.tokens(cells.steps // 2):,} tokens, its rate falling to the end of these, and for "
                f"{cells.tokens(cells.steps):,}; where its loss, straight between the two over the logarithm of the tokens, is that of AdamW",
                f"half {bootstrap(losses['half'])}, AdamW less that {bootstrap(losses['adamw'] - losses['half'])}; AdamW needs {_power(fewer, 2)} as "
                f"many tokens; within its long run MuonClip comes to AdamW's loss after {bootstrap(shares)} of the tokens, before its rate has "
                "fallen to the end", judge(fewer, 1.0))  # fmt: skip
    gap, hotter = bootstrap(losses["muonclip"] - losses["muon"]), bootstrap(losses["hot-muonclip"] - losses["hot-muon"])
    share = np.mean(cells.logged("muonclip", "clipped") > 0)
    yield Claim("QK-Clip does not harm the loss", "K2 report 2.1", "QK-Clip leaves the loss as it is, even with a small τ",
                f"both at their rates; τ = {taus['calm']:.3g}, half the largest logit of seed 0 without QK-Clip, so that it acts at all; alike "
                f"within {MARGIN} nats",
                f"MuonClip less Muon {gap}; at {HOTTER} × the rate {hotter}; heads are clipped in {100 * share:.0f} % of the steps",
                judge_alike(gap, MARGIN))  # fmt: skip


def _logit_claims(found, rates, hot, taus):
    peaks = {arm: _column(found[arm], "max_logit") for arm in found}
    ratio, words = _times(peaks["hot-muon"], peaks["hot-muonclip"])
    span = lambda arm: f"{peaks[arm].min():.3g} … {peaks[arm].max():.3g}"  # noqa: E731
    bounded = REPLICATES if peaks["hot-muonclip"].max() < BOUND * taus["hot"] else NOT
    acts = "τ = 100 acts" if peaks["muon"].max() > LARGEST else "τ = 100 would never act"
    yield Claim("QK-Clip bounds the attention logits", "K2 report 2.1", "without it logits exceed 1000; with it they are capped at τ = 100",
                f"Muon without and with QK-Clip at {hot['muon']:g}, {HOTTER} × its chosen rate; τ = {taus['hot']:.3g}, half the largest logit of "
                "seed 0 without it and at most 100; the largest logit of training, all layers and heads",
                f"without {span('hot-muon')}, {words} as large as with; with it never beyond {peaks['hot-muonclip'].max() / taus['hot']:.2f} τ, in "
                f"the step before the clip; at the chosen rate without {span('muon')}: {acts}", worst(judge(ratio), bounded))  # fmt: skip
    ratio, words = _times(peaks["hot-muon"], peaks["hot-adamw"])
    calm = _times(peaks["muon"], peaks["adamw"])[1]
    yield Claim("logits explode with Muon more than with AdamW", "K2 report 2.1", "exploding logits occur more often with Muon than with AdamW",
                f"no QK-Clip; each at {HOTTER} × its own chosen rate (Muon {hot['muon']:g}, AdamW {hot['adamw']:g}); the largest logit of training",
                f"Muon's are {words} AdamW's, which are {span('hot-adamw')}; at the chosen rates ({rates['muon']:g}, {rates['adamw']:g}) {calm}",
                judge(ratio))  # fmt: skip


# -------------------------------------------------------------------------------------------- balance


def balance(scale):
    """The bias against the auxiliary loss and against nothing. Returns list of Claim."""
    shape = scale.pick(SHAPE | {"n_routed_experts": 16}, SMALLEST)
    cells, off = _Cells(scale, "balance", scale.pick(300, 4), shape=shape), {"gamma": 0.0, "alpha": 0.0}

    def loads(key, values):
        found = cells.run({f"{key}-{value:g}": off | {"seed": 0, key: value} for value in values})
        return {value: cell["load_cv"] for value, cell in zip(values, found.values())}

    gammas, alphas = loads("gamma", GAMMAS[: scale.pick(None, 2)]), loads("alpha", ALPHAS[: scale.pick(None, 2)])
    arms = {"none": off, "bias": off | {"gamma": best(gammas)}, "auxiliary": off | {"alpha": nearest(alphas, min(gammas.values()))}}
    found = cells.of_seeds(arms)
    _plot_balance(cells, found)
    settings = (f"{cells.setup()}; 2 of {shape['n_routed_experts']} experts active. γ = {arms['bias']['gamma']:g}, of the most even load on seed 0 "
                f"(CV {_grid(gammas)}); α = {arms['auxiliary']['alpha']:g} of the sequence-wise loss, whose load on seed 0 comes nearest to that "
                f"(CV {_grid(alphas)})")  # fmt: skip
    return list(_balance_claims(found, settings))


def _balance_claims(found, settings):
    loads = {arm: _column(cells, "load_cv") for arm, cells in found.items()}
    losses = {arm: _final(cells) for arm, cells in found.items()}
    said = "; ".join(f"{arm} {bootstrap(loads[arm])}" for arm in found)
    gain = bootstrap(loads["none"] - loads["bias"])
    yield Claim("the bias balances the experts", "DeepSeek-V3 report 2.1.2", "moving a bias by the load keeps it even without an auxiliary loss",
                f"{settings}. Coefficient of variation of the load of a step, layers and the last {LATE:.0%} of the steps averaged",
                f"CV {said}; none less bias {gain}", judge(gain), "balance.png")  # fmt: skip
    saved, even = bootstrap(losses["auxiliary"] - losses["bias"]), bootstrap(loads["auxiliary"] - loads["bias"])
    as_even = bootstrap(loads["auxiliary"] - loads["bias"] + SAME_CV)
    said = "; ".join(f"{arm} {bootstrap(losses[arm])}" for arm in found)
    yield Claim("… and costs less loss than an auxiliary loss", "DeepSeek-V3 report 2.1.2, 4.5.2",
                "better than an auxiliary loss at equal or better balance",
                f"held-out loss of the same decoders; the bias counts as no less even where its CV is not {SAME_CV} larger; both must hold",
                f"loss {said}; auxiliary less bias {saved}, none less bias {bootstrap(losses['none'] - losses['bias'])}; "
                f"CV, auxiliary less bias {even}",
                worst(judge(saved), judge(as_even)))  # fmt: skip


# ------------------------------------------------------------------------------------------- sparsity


def sparsity(scale):
    """The loss against the number of experts at as many active ones. Returns list of Claim."""
    experts = EXPERTS[: scale.pick(None, 2)]
    cells = _Cells(scale, "sparsity", scale.pick(500, 4))
    shape = cells.shared["shape"] | {"moe_intermediate_size": NARROW}
    found = cells.of_seeds({f"experts-{number}": {"shape": shape | {"n_routed_experts": number}} for number in experts})
    fewest, most = found[f"experts-{experts[0]}"], found[f"experts-{experts[-1]}"]
    losses = np.stack([_final(runs) for runs in found.values()], axis=1)  # (S,X,B)
    fall = bootstrap(-slopes(losses, np.log2(experts)))
    means = [bootstrap(losses[:, place]) for place in range(len(experts))]
    beyond = [bootstrap(losses[:, place] - losses[:, 0]) for place in range(len(experts))]
    steps = [bootstrap(losses[:, place] - losses[:, place + 1]) for place in range(len(experts) - 1)]
    shares = _reached(fewest, most)
    _plot_sparsity(cells, found, experts, beyond)
    return [Claim("more experts lower the loss at as many active parameters", "K2 report 2.3",
                  "at fixed FLOPs a higher sparsity lowers the loss: sparsity 48 needs 1.69, 1.39 and 1.15 × fewer FLOPs than 8, 16 and 32",
                  f"{cells.setup()}; 2 active experts of width {NARROW} and one shared, of {', '.join(map(str, experts))} in all, so sparsity "
                  f"{experts[0] / 2:g} … {experts[-1] / 2:g}; slope of the held-out loss on log2 of the experts",
                  f"loss {'; '.join(f'{number}: {mean}' for number, mean in zip(experts, means))}; each doubling saves {fall}; it falls at "
                  f"{sum(step.mean > 0 for step in steps)} of {len(steps)} doublings ({', '.join(map(str, steps))}); {experts[-1]} experts come "
                  f"to the final loss of {experts[0]} after {bootstrap(shares)} of the tokens", judge(fall), "sparsity.png")]  # fmt: skip


# ----------------------------------------------------------------------------------------------- plots


def _loss_curves(cells, found):
    """{arm: (tokens, means, lows, highs)} of the held-out loss, for plot_arms."""
    points = {arm: np.array([np.mean(run["curve"], axis=1) for run in runs]) for arm, runs in found.items()}  # (S,P)
    steps = {arm: len(read_rows(cells.folder, f"{arm}-{cells.seeds[0]}")) for arm in found}
    at = {arm: cells.tokens(steps[arm]) * np.arange(1, table.shape[1] + 1) / table.shape[1] for arm, table in points.items()}
    return {arm: intervals(at[arm], points[arm].T) for arm in found}


def _plot_muonclip(cells, found, taus):
    """The loss at the chosen rates; the largest logit of each layer there, and at the higher rate."""
    figure, (left, *others) = plt.subplots(1, 3, figsize=(16, 4.2))
    parts = {"at the chosen rates": ("adamw", "muon", "muonclip"), f"at {HOTTER} × the rates": ("hot-adamw", "hot-muon", "hot-muonclip")}
    curves = _loss_curves(cells, {arm: found[arm] for arm in ("adamw", "muon", "muonclip", "half")})
    for number, (arm, (xs, means, lows, highs)) in enumerate(curves.items()):
        left.plot(xs, means, color=f"C{number}", label=f"muonclip, {arm}" if arm == "half" else arm, marker=".")
        left.fill_between(xs, lows, highs, color=f"C{number}", alpha=0.15, linewidth=0)
    left.set(title="held-out loss, nats per token", xlabel="tokens")
    for axis, (where, arms), tau in zip(others, parts.items(), taus.values()):
        for number, arm in enumerate(arms):
            layers = cells.logged(arm, "logit_layers")  # (S,steps,layers)
            for layer, style in zip(range(layers.shape[2]), ("-", ":", "--", "-.")):
                logits = layers[:, :, layer]
                axis.semilogy(np.exp(np.log(logits).mean(0)), style, color=f"C{number}", label=f"{arm}, layer {layer}", linewidth=1.2)
                axis.fill_between(range(logits.shape[1]), logits.min(0), logits.max(0), color=f"C{number}", alpha=0.1, linewidth=0)
        axis.axhline(tau, color="black", linewidth=0.8, label=f"τ = {tau:.3g}")
        axis.set(title=f"largest attention logit {where}", xlabel="steps")
    for axis in (left, *others):
        axis.legend(frameon=False, fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, cells.folder / "muonclip.png")


def _plot_balance(cells, found):
    """The load's coefficient of variation, steps averaged ten by ten, and the loss."""
    loads = {}
    for arm in found:
        table = cells.logged(arm, "load_layers").mean(2)  # (S,steps)
        width = min(10, table.shape[1])
        whole = table[:, : table.shape[1] // width * width].reshape(len(table), -1, width).mean(2)
        loads[arm] = intervals(width * np.arange(1, whole.shape[1] + 1), whole.T)
    plot_arms({"CV of the expert load, over steps": loads, "held-out loss, nats per token, over tokens": _loss_curves(cells, found)},
              cells.folder / "balance.png")  # fmt: skip


def _plot_sparsity(cells, found, experts, beyond):
    """The loss against the number of experts, beside that of the fewest on the same batches and seeds; and over training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.9))
    middle = np.array([one.mean for one in beyond])
    left.errorbar(experts, middle, [middle - [one.low for one in beyond], [one.high for one in beyond] - middle], marker="o", capsize=4)
    left.set_xscale("log", base=2)
    left.set_xticks(experts, map(str, experts))
    left.set(title=f"held-out loss less that of {experts[0]} experts, nats per token", xlabel="experts, of which 2 are active")
    for arm, (xs, curve, lows, highs) in _loss_curves(cells, found).items():
        right.plot(xs, curve, label=arm.replace("-", " "), marker=".")
        right.fill_between(xs, lows, highs, alpha=0.15, linewidth=0)
    right.set(title="held-out loss over training", xlabel="tokens")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, cells.folder / "sparsity.png")
