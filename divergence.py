"""The first operation that goes wrong in another stack: the same prompts through K25 and through theirs, tap by tap.

    python oracle.py trace --checkpoint DIR --against OTHER_CHECKPOINT | transformers:DIR | TAPS_DIRECTORY

K25 runs each prompt twice. The free run uses K25's own values throughout; its distance from theirs is the `error`
column, which grows with depth. In the forced run every operation starts from *their* values, wherever they give them
(taps.capture with all taps pinned); its distance is the operation's `own` error. So

    [OK]       their output agrees with the free run
    [DIFF]     it does not: `inherited` where the operation is right on its inputs, else a divergence
    [SHAPE]    another shape: a divergence, and the values that follow are not passed on
    [MISSING]  they do not give this tap; K25's operation, from their latest values upstream, stands in for it

Rounding that grows, or a near-tie of the router that falls the other way, is inherited everywhere and nobody's fault.
The cause of a divergence is sought in the weights and numbers that entered it, then among the op's suspects: the one
that gives their output from their inputs. Where taps are missing, the suspects of the missing operations are tried too.

Public names: DivergenceError, Theirs, Row, open_theirs, trace_prompt, plot, add_arguments, main.
Letters: B batch, T tokens, L patches, A vision heads, H heads, K chosen experts.     Tests: pytest tests/test_divergence.py
"""

import dataclasses
import json
import math
import pathlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from adapter import once
from checkpoint import write_file
from conformance import OPS
from k25 import load
from op import TOLERANCE, compare
from patterns import pattern, shape_pattern, shape_text
from peer import Peer
from taps import capture, read_taps, standard_prompts

PROMPTS = "text,image,clip"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# The operations of a forward pass that are no ops of the oracle.
ELEMENTARY = {
    "linear": F.linear,
    "add": torch.add,
    "layer_norm": lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "embedding": F.embedding,
}


class DivergenceError(ValueError):
    """Options or another side with which nothing can be traced."""


@dataclass(frozen=True)
class Theirs:
    """What another stack gave for one prompt.

    tensors: {tap: output}; inputs: {tap: {argument: tensor}} and arguments: {tap: {argument: number}}, weights:
    {tap: {argument: tensor}}, where it tells them; missing: {tap, or beginning of taps: why it has none}.
    """

    tensors: dict
    inputs: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    weights: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One tap compared.

    status: OK, DIFF, SHAPE or MISSING; error, max_abs: of the free run, error relative to our largest value (of indices:
    the share of tokens); own: error of the forced run; diverges: whether the operation itself is wrong; words: the
    difference in one line; cause: in words, of what diverges; note: one line more.
    """

    tap: str
    op: str
    status: str
    error: float = math.nan
    max_abs: float = math.nan
    own: float = math.nan
    diverges: bool = False
    words: str = ""
    cause: str = ""
    note: str = ""

    def text(self):
        """The row as a line."""
        line = f"[{self.status}]".ljust(10) + self.tap.ljust(42) + self.op.ljust(19)
        if self.status in ("OK", "DIFF"):
            line += f"error {self.error:.1e}  max-abs {self.max_abs:.1e}  own {self.own:.1e}"
        return (line + f"  {self.note}" * bool(self.note)).rstrip()


# ------------------------------------------------------------------------------------------ one prompt


def trace_prompt(model, prompt, theirs, pin_routing=False):
    """Compare every operation of one prompt.

    model: K25; prompt: Prompt; theirs: Theirs; pin_routing: the free run uses their experts. Returns a list of Row, in
    execution order.
    """
    free, usable = capture(model, prompt), {}
    for name, tap in free.items():
        value, ours = theirs.tensors.get(name), tap.output
        if value is not None and value.shape == ours.shape and _usable(name, value, model.config):
            both_float = value.is_floating_point() and ours.is_floating_point()
            usable[name] = value.to(ours.device) if both_float else value.to(ours)  # a float's dtype says how exact it is
    routing = {name: value for name, value in usable.items() if name.endswith(".router.index")}
    free = capture(model, prompt, routing) if pin_routing else free
    forced = capture(model, prompt, usable)
    side = _Side(model, prompt, theirs, usable, routing, free, forced, pin_routing)
    rows, absent, since = [], [], 0  # absent: missing taps so far; since: how many of them directly before this one
    for name, tap in forced.items():
        rows += side.inputs_of(tap)
        row = side.row(tap, absent, since)
        rows.append(row)
        if row.status in ("MISSING", "SHAPE"):
            absent.append(name)
        since = since + 1 if row.status in ("MISSING", "SHAPE") else 0
    return rows


def _usable(name, value, config):
    """Whether a tensor may stand in for ours: an index must be one."""
    if not name.endswith(".router.index"):
        return True
    integers = not value.is_floating_point() and value.dtype != torch.bool
    return integers and bool(((value >= 0) & (value < config.n_routed_experts)).all())


@dataclass(frozen=True)
class _Side:
    """Everything that is known about one prompt on both sides."""

    model: torch.nn.Module
    prompt: object
    theirs: Theirs
    usable: dict  # {tap: their value}, of our shape and device
    routing: dict  # those of them that are the router's indices
    free: dict
    forced: dict
    pin_routing: bool
    known: dict = field(default_factory=dict)  # {op: what explained its first divergence}

    def row(self, tap, absent, since):
        """Compare one tap. absent: missing taps before it; since: how many of them directly before it."""
        name = tap.name
        if name not in self.theirs.tensors:
            why = [text for begin, text in self.theirs.missing.items() if name.startswith(begin)]
            return Row(name, tap.op, "MISSING", note=why[0] if why else "")
        value = self.theirs.tensors[name]
        if value.shape != tap.output.shape:
            words = f"shape {shape_text(value)}, expected {shape_text(tap.output)}"
            return Row(name, tap.op, "SHAPE", diverges=True, words=words, cause=shape_pattern(value, tap.output), note=words)
        if name not in self.usable:
            words = f"{value.dtype} from {value.min()} to {value.max()}: an expert's number was expected"
            return Row(name, tap.op, "DIFF", diverges=True, words=words, cause="no indices of experts", note=words)
        if name.endswith(".router.index"):
            return self._routing_row(tap, absent, since)
        expected = self._expected(tap)
        free = self._aligned(name, self.free[name].output, self.routing if self.pin_routing else self._indices(self.free))
        own = self._aligned(name, expected, self.routing)
        loose = (OPS[tap.op].loose if tap.op in OPS else 1.0) * math.sqrt(1 + since)
        difference = _difference(*own, loose)
        if difference and tap.output.is_floating_point():  # forgive the rounding that our own operation suffers
            exact = self._aligned(name, _evaluate(tap, self._inputs(tap), torch.float64), self.routing)
            difference = _difference(*own, loose, exact[1])
        differs = _difference(*free, loose)
        max_abs, error = _gap(*free)
        row = Row(name, tap.op, "DIFF" if differs or difference else "OK", error, max_abs, _gap(*own)[1])
        if difference is None:
            return dataclasses.replace(row, note="inherited" if differs else "")
        tied = self._tied(absent[len(absent) - since :], own[1])  # tokens
        if tied is not None and not tied.all() and _difference(*(a.flatten(0, -2) * ~tied for a in own), loose) is None:
            note = f"near-tie: {int(tied.sum())} tokens may have gone to other experts; their router.index is not told"
            return dataclasses.replace(row, note=note)
        cause = self._cause(tap, absent, own, loose)
        return dataclasses.replace(row, diverges=True, words=difference.words, cause=cause)

    def inputs_of(self, tap):
        """Rows for the inputs of an operation that they tell and that are not what their taps before it give."""
        rows = []
        for argument, value in self.theirs.inputs.get(tap.name, {}).items():
            ours, name = tap.inputs.get(argument), f"{tap.name}.in.{argument}"
            if not isinstance(ours, torch.Tensor):
                continue
            if value.shape != ours.shape:
                words = f"shape {shape_text(value)}, expected {shape_text(ours)}"
                rows.append(Row(name, "input", "SHAPE", diverges=True, words=words, cause=shape_pattern(value, ours), note=words))
            elif difference := _difference(value.to(ours.device), ours, 2.0):
                max_abs, error = _gap(value.to(ours), ours)
                cause = "this input is not what the taps before it give: a step between them, or a wrong connection"
                rows.append(Row(name, "input", "DIFF", error, max_abs, error, True, difference.words, cause))
        return rows

    def _inputs(self, tap):
        """The inputs of our operation in the forced run, or theirs where they tell them."""
        told = self.theirs.inputs.get(tap.name, {})
        fitting = {a for a, ours in tap.inputs.items()
                   if a in told and isinstance(ours, torch.Tensor) and told[a].shape == ours.shape}  # fmt: skip
        return {a: told[a].to(ours) if a in fitting else ours for a, ours in tap.inputs.items()}

    def _expected(self, tap):
        return _evaluate(tap, self._inputs(tap)) if self.theirs.inputs.get(tap.name) else tap.output

    @staticmethod
    def _indices(taps):
        return {name: tap.output for name, tap in taps.items() if name.endswith(".router.index")}

    def _aligned(self, name, ours, our_routing):
        """Their value and ours as they may be compared: what an order or a don't-care leaves open is taken out."""
        value = self.usable[name]
        if name == "decoder.embedded":  # at media places the embedding is thrown away
            kept = (self.prompt.ids != self.model.config.media_placeholder_token_id)[..., None].to(ours.device)
            return value * kept, ours * kept
        if name.endswith(".router.weights"):
            index = name.replace("weights", "index")
            if index not in self.routing:
                return value.sort(dim=-1).values, ours.sort(dim=-1).values
            theirs_index, their_order = self.routing[index].sort(dim=-1)  # (T,K)
            our_index, our_order = our_routing[index].sort(dim=-1)
            same = (theirs_index == our_index).all(dim=-1, keepdim=True)  # other experts' weights say nothing
            return value.gather(-1, their_order) * same, ours.gather(-1, our_order) * same
        return value, ours

    def _routing_row(self, tap, absent, since):
        """The chosen experts, compared as sets: how many tokens flipped, and by which margin of the biased scores."""
        theirs = self.usable[tap.name].sort(dim=-1).values  # (T,K)
        flips = (theirs != self.free[tap.name].output.sort(dim=-1).values).any(dim=-1)  # (T,)
        own = (theirs != tap.output.sort(dim=-1).values).any(dim=-1)
        tokens, share = len(flips), flips.double().mean().item()
        if not flips.any() and not own.any():
            return Row(tap.name, tap.op, "OK", 0.0, 0.0, 0.0)
        margins = _margins(tap, self.usable[tap.name])  # (T,)
        wrong = own & (margins > (self._coarseness() if since else TOLERANCE[torch.float32]))
        row = Row(tap.name, tap.op, "DIFF", share, float(flips.sum()), own.double().mean().item())
        if wrong.any():
            words = (f"{int(wrong.sum())} of {tokens} tokens go to other experts, "
                     f"by margins of the score up to {margins[own].max():.1e}")  # fmt: skip
            cause = self._cause(tap, absent, (theirs, tap.output.sort(dim=-1).values), 1.0)
            return dataclasses.replace(row, diverges=True, words=words, cause=cause)
        if own.any():
            note = f"near-tie: {int(own.sum())} of {tokens} tokens flipped by a margin of {margins[own].max():.1e}"
        else:
            margins = _margins(self.free[tap.name], self.usable[tap.name])
            note = f"inherited: {int(flips.sum())} of {tokens} tokens flipped, margins up to {margins[flips].max():.1e}"
        return dataclasses.replace(row, note=note)

    def _tied(self, absent, value):
        """Tokens that a rounding may send to other experts in a router whose index is missing: (T,1) bool, or None.

        absent: the missing taps directly before; value: (...,C), compared token by token.
        """
        routers = [self.forced[name] for name in absent if name.endswith(".router.index")]
        if len(routers) != 1 or value.ndim < 2 or len(routers[0].output) != value.shape[:-1].numel():
            return None
        return (_margins(routers[0]) <= self._coarseness())[:, None]

    def _coarseness(self):
        """The tolerance of the coarsest floats that they gave."""
        floats = [value.dtype for value in self.usable.values() if value.is_floating_point()]
        return max(TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) for dtype in floats)

    def _cause(self, tap, absent, pair, loose):
        """Why their output of an operation is wrong; pair: their value and ours, aligned."""
        inputs = self._inputs(tap)
        told = _numbers_that_differ(inputs, self.theirs.arguments.get(tap.name, {}))
        weights = self.theirs.weights.get(tap.name, {})
        lines, swapped = _weights_that_differ(tap, weights)
        if lines:
            mended = self._aligned(tap.name, _evaluate(tap, inputs | swapped), self.routing)
            enough = _difference(*mended, 4 * loose) is None
            told += [*lines, "with their weights our operation gives their output" if enough
                     else "and their weights alone do not explain it"]  # fmt: skip
        if told:
            return "; ".join(told)
        found = self._suspects(tap, absent, loose)
        return " — or: ".join(found) if found else pattern(*pair)

    def _suspects(self, tap, absent, loose):
        """The causes whose wrong code gives their output: of this op, else of an operation whose tap is missing.

        A later divergence of the same op is only asked whether it is what explained the first one.
        """
        own = [(tap.op, suspect) for suspect in OPS[tap.op].suspects] if tap.op in OPS else []
        ops = dict.fromkeys(self.forced[name].op for name in reversed(absent))
        others = [(op, suspect) for op in ops if op in OPS for suspect in OPS[op].suspects]
        found = []
        for candidates in [self.known[tap.op]] if tap.op in self.known else [own, others]:
            found = found or [(op, suspect) for op, suspect in candidates if self._gives(op, suspect, tap, loose)]
        self.known.setdefault(tap.op, found)
        return [_told(suspect) if op == tap.op else f"{op}: {_told(suspect)}" for op, suspect in found]

    def _gives(self, op, suspect, tap, loose):
        """Whether a suspect gives their output: from its own inputs, or as an operation whose tap is missing."""
        try:
            if op == tap.op:
                result = _call(op, suspect.wrong, self._inputs(tap).values(), tap)
            else:
                replaced = {op: lambda *values: _results(op, suspect.wrong, values)}
                result = capture(self.model, self.prompt, self.usable, replaced, tap.name)[tap.name].output
        except Exception:  # noqa: BLE001 - a wrong function may fail in any way
            return False
        return self._explained(tap, result, loose)

    def _explained(self, tap, result, loose):
        if result.shape != tap.output.shape:
            return False
        if tap.name.endswith(".router.index"):
            return torch.equal(result.sort(dim=-1).values, self.usable[tap.name].sort(dim=-1).values)
        return _difference(*self._aligned(tap.name, result.to(tap.output), self.routing), 4 * loose) is None


# ------------------------------------------------------------------------------------------ comparing


def _difference(theirs, ours, loose, truth=None):
    """op.compare in the coarser dtype of the two, so that what they stored in bfloat16 is judged as bfloat16."""
    if not ours.is_floating_point():
        return compare("output", theirs.to(ours.dtype), ours, ours)
    coarse = max((theirs.dtype, ours.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    coarse = coarse if coarse in TOLERANCE else torch.bfloat16
    return compare("output", theirs.to(coarse), ours.to(coarse), (ours if truth is None else truth).double(), loose)


def _gap(theirs, ours):
    """Largest absolute difference, and the same relative to our largest value."""
    if not ours.numel():
        return 0.0, 0.0
    a, b = theirs.double(), ours.double()
    gap = torch.where(a == b, 0.0, (a - b).abs().nan_to_num(nan=math.inf)).max().item()
    return gap, gap / max(b.nan_to_num().abs().max().item(), 1e-30)


def _results(op, function, values):
    """The results of an op's function as a tuple, called on copies."""
    op = OPS[op]
    outputs = once(function, dict(zip(op.arguments, values)), op.outputs).outputs
    return tuple(outputs[name] for name in op.outputs)


def _call(op, function, values, tap):
    result = _results(op, function, values)[tap.result]
    return result if isinstance(result, torch.Tensor) else torch.tensor(result, dtype=tap.output.dtype)


def _evaluate(tap, inputs, dtype=None):
    """The reference of a tap's operation on inputs, in `dtype` or their own, in the shape of the tap."""
    if dtype is not None:
        inputs = {a: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for a, v in inputs.items()}
    if tap.op in OPS:
        result = _call(tap.op, OPS[tap.op].reference, inputs.values(), tap)
    else:
        result = ELEMENTARY[tap.op](*inputs.values())
    result = result.reshape(tap.output.shape)
    return result if dtype is not None else result.to(tap.output.dtype)


def _margins(tap, index=None):
    """By how much each token's experts were chosen: the least gap that a rounding must bridge, (T,) float64.

    tap: of a router's index; index: (T,K) — the choice that the rounding would make; None: any other choice.
    """
    x, weight, bias = (tap.inputs[name].double() for name in ("x", "weight", "bias"))
    top_k, n_group, topk_group = (tap.inputs[name] for name in ("top_k", "n_group", "topk_group"))
    scores = torch.sigmoid(x @ weight.T) + bias  # (T,E)
    groups = scores.unflatten(1, (n_group, -1))  # (T,n_group,E/n_group)
    group_scores = groups.topk(min(2, groups.shape[2]), dim=2).values.sum(dim=2)  # (T,n_group)
    ranked, order = group_scores.sort(dim=1, descending=True)
    ours = torch.zeros_like(scores, dtype=torch.bool).scatter(1, tap.output, True)
    if index is None:  # every expert of the kept groups might have been taken
        dropped = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, order[:, topk_group:], True)
        theirs = ~ours & ~dropped.repeat_interleave(groups.shape[2], dim=1)
        lost = scores.masked_fill(~ours, math.inf).amin(dim=1)
    else:
        theirs = torch.zeros_like(ours).scatter(1, index, True)
        lost = scores.masked_fill(~(ours & ~theirs), math.inf).amin(dim=1)  # (T,) the weakest that they left out
    won = scores.masked_fill(~(theirs & ~ours), -math.inf).amax(dim=1)  # (T,) the strongest that they took instead
    margins = (lost - won).abs()
    return margins if topk_group == n_group else torch.minimum(margins, ranked[:, topk_group - 1] - ranked[:, topk_group])


def _numbers_that_differ(ours, theirs):
    plain = {argument: json.loads(json.dumps(value)) for argument, value in ours.items() if not isinstance(value, torch.Tensor)}
    return [f"{argument} is {theirs[argument]} there and {value} here" for argument, value in plain.items()
            if argument in theirs and json.loads(json.dumps(theirs[argument])) != value]  # fmt: skip


def _weights_that_differ(tap, weights):
    """What differs, in words, and {argument: their weight}."""
    lines, swapped = [], {}
    for argument, key in tap.weights.items():
        ours, theirs = tap.inputs[argument], weights.get(argument)
        if theirs is None or (theirs.shape == ours.shape and torch.equal(theirs.to(ours), ours)):
            continue
        if theirs.shape != ours.shape:
            lines.append(f"weight {key} has shape {shape_text(theirs)} there and {shape_text(ours)} here")
            continue
        swapped[argument] = theirs.to(ours)
        lines.append(f"weight {key} differs, max-abs {_gap(swapped[argument], ours)[0]:.3e}")
    return lines, swapped


def _told(suspect):
    return suspect.cause + (f" ({suspect.seen})" if suspect.seen else "")


# ------------------------------------------------------------------------------------------ the other side


class _Checkpoint:
    """Another directory in the released layout, run by K25."""

    def __init__(self, directory, model, dtype, device):
        self.model = load(directory, dtype, device)
        ours, theirs = (dataclasses.asdict(m.config) for m in (model, self.model))
        self.notes = [f"config: {key} is {theirs[key]} there and {ours[key]} here" for key in ours if ours[key] != theirs[key]]
        weights = model.state_dict()
        gaps = {key: _gap(value, weights[key])[0] for key, value in self.model.state_dict().items()
                if key in weights and value.shape == weights[key].shape and not torch.equal(value, weights[key])}  # fmt: skip
        shown = [f"{key} (max-abs {gap:.1e})" for key, gap in list(gaps.items())[:3]]
        self.notes += [f"weights: {len(gaps)} of {len(weights)} tensors differ: {', '.join(shown)}"] if gaps else []

    def run(self, name, prompt):
        """Theirs for a prompt."""
        taps = capture(self.model, prompt)
        tensors = {tap.name: tap.output for tap in taps.values()}
        weights = {tap.name: {a: tap.inputs[a] for a in tap.weights} for tap in taps.values()}
        numbers = {tap.name: {a: v for a, v in tap.inputs.items() if not isinstance(v, torch.Tensor)} for tap in taps.values()}
        return Theirs(tensors, arguments=numbers, weights=weights)


class _Transformers:
    """A directory opened by transformers."""

    def __init__(self, directory, dtype, device):
        self.peer = Peer(directory, dtype, device)
        self.notes = self.peer.notes

    def run(self, name, prompt):
        """Theirs for a prompt."""
        tensors, weights, missing = self.peer.capture(prompt)
        return Theirs(tensors, weights=weights, missing=missing)


class _Directory:
    """A taps directory that another program wrote."""

    def __init__(self, directory):
        self.recordings, self.notes = read_taps(directory), []

    def run(self, name, prompt):
        """Theirs for a prompt."""
        told = self.recordings[name]
        return Theirs(told.tensors, told.inputs, told.arguments)


def open_theirs(against, model, dtype, device="cpu"):
    """The other side: an object with `notes` and `run(prompt name, Prompt)` → Theirs.

    against: "transformers:DIR", a checkpoint directory or a taps directory; model: K25, ours; dtype, device: of weights.
    Raises DivergenceError when it is none of these, and the ValueError of what cannot be opened.
    """
    kind, colon, rest = str(against).partition(":")
    if colon and kind == "transformers":
        return _Transformers(rest, dtype, device)
    directory = pathlib.Path(against)
    if (directory / "config.json").is_file():
        return _Checkpoint(directory, model, dtype, device)
    if any(directory.glob("*.safetensors")):
        return _Directory(directory)
    raise DivergenceError(f"{against} is no checkpoint (config.json), no taps directory (*.safetensors) and no transformers:DIR")


def _prompts(asked, config, seed, other):
    """{name: Prompt} of the names asked for: theirs if they recorded them, else the standard ones."""
    prompts, recorded = standard_prompts(config, seed), {}
    if isinstance(other, _Directory):
        recorded = {name: told.prompt or prompts.get(name) for name, told in other.recordings.items()}
        asked = asked or ",".join([name for name in prompts if name in recorded] + sorted(recorded.keys() - prompts.keys()))
    known = recorded or prompts
    names = [name.strip() for name in (asked or PROMPTS).split(",")]
    for name in names:
        if name not in known:
            raise DivergenceError(f"no prompt named {name!r}: choose among {', '.join(known)}")
        if known[name] is None:
            raise DivergenceError(f"their {name}.safetensors holds no prompt.ids, and no standard prompt has this name")
    return {name: known[name] for name in names}


# --------------------------------------------------------------------------------------------- report


def plot(path, traced, dtype):
    """Draw error by depth, one panel for each prompt. traced: {prompt: list of Row}; dtype: whose tolerance is shown."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(traced), 1, figsize=(11, 1 + 2.6 * len(traced)), squeeze=False, layout="constrained")
    floor = 1e-6 * TOLERANCE[dtype]  # stands for 0 too
    for panel, (name, rows) in zip(panels[:, 0], traced.items()):
        for label, style in (("error", ".-"), ("own", "x")):
            points = [(i, max(getattr(row, label), floor)) for i, row in enumerate(rows) if math.isfinite(getattr(row, label))]
            shown = [point for point in points if label == "error" or point[1] > floor]
            panel.plot([i for i, _ in shown], [value for _, value in shown], style, markersize=4, linewidth=1, label=label)
        panel.axhline(TOLERANCE[dtype], color="grey", linewidth=0.8, linestyle="--", label="tolerance")
        wrong = [i for i, row in enumerate(rows) if row.diverges]
        for i in wrong:
            panel.axvline(i, color="tab:red", linewidth=0.8, alpha=0.6, label="diverges" if i == wrong[0] else None)
        begins = _beginnings(rows)
        panel.set_xticks(list(begins), list(begins.values()), rotation=30, ha="right", fontsize=7)
        panel.set(yscale="log", ylim=(floor / 2, 1e2), ylabel="relative error")
        title = f"{name}: first divergence at {rows[wrong[0]].tap}" if wrong else f"{name}: no operation diverges"
        panel.set_title(title, fontsize=9)
        panel.grid(axis="y", alpha=0.3)
        panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _beginnings(rows, most=30):
    """{row number: label} where a block or layer begins, and of the parts outside of them; at most `most` of them."""
    begins, last = {}, None
    for i, row in enumerate(rows):
        part = ".".join(row.tap.split(".")[:3]) if ".blocks." in row.tap or ".layers." in row.tap else row.tap.split(".")[0]
        if part != last:
            begins[i] = part.removeprefix("vision.").removeprefix("decoder.") if "." in part else part
        last = part
    step = math.ceil(len(begins) / most)
    return {i: label for n, (i, label) in enumerate(begins.items()) if n % step == 0}


def _show(name, prompt, rows, all_rows):
    """Print the rows of a prompt, to its first divergence unless all are asked for."""
    media = "" if prompt.grid_thw is None else f", {len(prompt.grid_thw)} media items"
    print(f"\nprompt {name}: {prompt.ids.shape[1]} tokens{media}")
    for row in rows:
        print(row.text())
        if row.diverges:
            print(f"          its inputs agree and its output does not: {row.words}\n          probable cause: {row.cause}")
            if not all_rows:
                return
    if all(row.status == "MISSING" for row in rows):
        print("nothing to compare")
    elif not any(row.diverges for row in rows):
        print("no operation diverges" + (": what differs is inherited rounding" if any(r.status == "DIFF" for r in rows) else ""))


def add_arguments(parser):
    """The arguments of `oracle.py trace`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="what K25 runs, in the released layout")
    parser.add_argument("--against", required=True, metavar="THEIRS",
                        help="another checkpoint directory, transformers:DIR, or a taps directory (see taps.py)")  # fmt: skip
    parser.add_argument("--prompts", help=f"comma-separated; default {PROMPTS}, or all of a taps directory; also: mixed")
    parser.add_argument("--pin-routing", action="store_true", help="the error column uses their experts throughout")
    parser.add_argument("--all", action="store_true", help="go on after the first divergence of a prompt")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of both sides' weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the standard prompts")
    parser.add_argument("--out", default="runs/trace", metavar="DIR", help="where trace.json and trace.png go")


def main(options):
    """`oracle.py trace`: print the taps and write the report. Returns 0, or 1 when an operation diverges."""
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise DivergenceError(f"device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    dtype = DTYPES[options.dtype]
    model = load(options.checkpoint, dtype, options.device)
    other = open_theirs(options.against, model, dtype, options.device)
    prompts = _prompts(options.prompts, model.config, options.seed, other)
    for note in other.notes:
        print(note)
    traced = {}
    for name, prompt in prompts.items():
        theirs = other.run(name, prompt)
        rows = trace_prompt(model, prompt, theirs, options.pin_routing)
        strangers = sorted(theirs.tensors.keys() - {row.tap for row in rows})
        if len(strangers) == len(theirs.tensors) > 0:
            raise DivergenceError(f"none of their tensors is a tap: {', '.join(strangers[:3])} …; taps.py lists the names")
        if strangers:
            print(f"not compared, no taps: {', '.join(strangers[:5])}{' …' if len(strangers) > 5 else ''}")
        _show(name, prompt, rows, options.all)
        traced[name] = rows
    if all(row.status == "MISSING" for rows in traced.values() for row in rows):
        raise DivergenceError("nothing could be compared: every tap is missing")
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    report = {"checkpoint": str(options.checkpoint), "against": str(options.against), "dtype": options.dtype,
              "seed": options.seed, "pin_routing": options.pin_routing, "torch": torch.__version__, "notes": other.notes,
              "prompts": {name: [_as_json(row) for row in rows] for name, rows in traced.items()}}  # fmt: skip
    write_file(out / "trace.json", json.dumps(report, indent=1) + "\n")
    plot(out / "trace.png", traced, dtype)
    wrong = {name: next((row for row in rows if row.diverges), None) for name, rows in traced.items()}
    print()
    for name, row in wrong.items():
        silent = "nothing to compare" if all(r.status == "MISSING" for r in traced[name]) else "no divergence"
        print(f"{name}: " + (f"first divergence at {row.tap} ({row.op}): {row.cause}" if row else silent))
    print(f"report: {out / 'trace.json'}, {out / 'trace.png'}")
    return 1 if any(wrong.values()) else 0


def _as_json(row):
    values = dataclasses.asdict(row)
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
