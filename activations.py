"""Less memory for what waits for the backward pass: recompute it, store it in FP8, move it out — K2.5 report 4.5.

    recompute   selective: norms, SwiGLU and MLA's up-projections are computed again in the backward pass, from what the
                other matrix products and the attention put out; block: everything, from each block's input
    fp8         inputs of the linear layers and of the SwiGLU in experts and MLPs are stored as E4M3, one scale per row
    offload     what is stored waits in the CPU's memory

Rounded are only rows that enter their gradients linearly, as a factor beside many others, so that the errors average
out. Never rounded: what a norm divides by, what a softmax or a router's choice is made of (queries, keys, scores, router
inputs), and the residual stream, from which everything else is computed again.

    with saving(Memory(recompute="selective", fp8=True), model):
        loss = ...            # forward only; values stay bitwise what they are
    loss.backward()           # gradients stay bitwise what they are, but with fp8

Run: python activations.py --preset toy        (measures each: bytes, time, gradient error; runs/activations)

Public names: Memory, ActivationError, saving, Saved, fp8_pack, fp8_unpack, Measured, SETTINGS, measure, main.
Letters: B rows, T tokens, C hidden, H heads, J query and key width, V value width, Q query rank, R latent rank, P rope
width, E experts, K chosen, F expert width, U vocabulary.     Tests: pytest tests/test_activations.py
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from checkpoint import write_file
from k25 import K25, Block, K25Config, cross_entropy_fused
from moe import MLP, Experts, MoE


class ActivationError(ValueError):
    """Settings that contradict each other; the message says which."""


@dataclass(frozen=True)
class Memory:
    """What to do with activations between the forward and the backward pass; each field is a flag."""

    recompute: str = "none"  # none | selective | block
    fp8: bool = False  # store what is insensitive as FP8-E4M3
    offload: bool = False  # keep what is stored in the CPU's memory

    def __post_init__(self):
        if self.recompute not in ("none", "selective", "block"):
            raise ActivationError(f"recompute is {self.recompute!r}: choose none, selective or block")
        if self.recompute == "block" and self.fp8:
            raise ActivationError("fp8 with recompute block: only the inputs of blocks are stored then, and those are sensitive")

    @staticmethod
    def of(settings):
        """The Memory that a run's settings ask for. settings: anything with recompute, fp8 and offload."""
        return Memory(settings.recompute, settings.fp8, settings.offload)


# ------------------------------------------------------------------------------------------------ FP8

E4M3_MAX = 448.0


def fp8_pack(x):
    """Round to E4M3 with one power of two per row, the least with which the row's largest number fits.

        scale = 2^⌈log2(amax / 448)⌉,   code = E4M3(x / scale)

    Such a scale costs no precision: a number of four significant bits comes back exactly down to 2⁻¹³ · amax, a power
    of two down to 2⁻¹⁶ · amax. Infinities, and what exceeds 448 · 2¹¹⁹, become the largest code; NaN stays NaN.
    x: (...,W) float. Returns codes (...,W) float8_e4m3fn; exponents (...,1) int8 — log2 of the scale.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    amax = wide.abs().masked_fill(~wide.isfinite(), 0.0).amax(dim=-1, keepdim=True)
    mantissa, exponent = torch.frexp(amax / E4M3_MAX)  # in ½ … 1; where it is ½, the quotient is a power of two itself
    exponent = (exponent - (mantissa == 0.5).int()).clamp(-126, 119)  # 448 · 2¹²⁰ is infinite
    codes = torch.ldexp(wide, -exponent).clamp(-E4M3_MAX, E4M3_MAX)  # beyond the largest, some casts give NaN
    return codes.to(torch.float8_e4m3fn), exponent.to(torch.int8)


def fp8_unpack(codes, exponents, dtype):
    """code · scale of `fp8_pack`, (...,W) in `dtype`; exact in every dtype of at least bfloat16."""
    wide = codes.to(torch.promote_types(dtype, torch.float32))
    return torch.ldexp(wide, exponents.int()).to(dtype)


# ------------------------------------------------------------------------------------- what is stored

AHEAD = 8  # storages that are on their way back before they are asked for


class _Offloaded:
    """One storage in the CPU's memory: on CUDA pinned, copied out and back on a stream of its own.

    The backward pass asks in the reverse order, so whoever is asked also calls back those `before`. A CPU has no other
    memory to move to: there it is one more copy.
    """

    def __init__(self, storage, before, stream):
        self.before, self.stream, self.device, self.back = before, stream, storage.device, None
        flat = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage, 0, (storage.nbytes(),), (1,))
        self.host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(flat)
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(flat, non_blocking=True)
        flat.record_stream(stream)  # its memory is not given away before the copy is done

    def call_back(self):
        """Start the copy to the device, once."""
        if self.back is None and self.stream is not None:
            with torch.cuda.stream(self.stream):
                self.back = self.host.to(self.device, non_blocking=True)
                self.arrived = self.stream.record_event()

    def storage(self):
        """The storage, on its device."""
        if self.stream is None:
            return self.host.untyped_storage()
        entry = self
        for _ in range(AHEAD):
            if entry is not None:
                entry.call_back()
                entry = entry.before
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.arrived)
        self.back.record_stream(current)
        return self.back.untyped_storage()


@dataclass(frozen=True)
class _View:
    """How a tensor lies in an offloaded storage."""

    whole: _Offloaded
    dtype: torch.dtype
    offset: int
    shape: tuple
    stride: tuple

    def tensor(self):
        return torch.empty(0, dtype=self.dtype, device=self.whole.device).set_(
            self.whole.storage(), self.offset, self.shape, self.stride)  # fmt: skip


@dataclass(frozen=True)
class _Fp8:
    """A tensor as FP8; codes and exponents are tensors, or views of offloaded ones."""

    codes: object
    exponents: object
    dtype: torch.dtype
    shape: tuple


class _Known:
    """Values by storage. While an entry refers to its storage, even weakly, no other one gets that address."""

    def __init__(self):
        self.entries = {}

    def __getitem__(self, storage):
        return self.entries.get(storage._cdata, (None, None))[1]

    def __setitem__(self, storage, value):
        self.entries[storage._cdata] = (StorageWeakRef(storage), value)


class Saved:
    """What one forward pass stores for its backward pass; `pack` and `unpack` are hooks of its tensors.

    memory: Memory; weights: the model's tensors, which exist anyway and are neither moved nor counted.
    `bytes` counts, per (layer | "outside" | "shared", "device" | "host"), each storage once.
    """

    def __init__(self, memory, weights):
        self.memory = memory
        self.weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self.bytes = Counter()
        self.layer = "outside"
        self.widths = ()  # inside of MLPs and experts: of the rows that may be FP8
        self.common = _Known()  # what all layers get: storage → True
        self.exact, self.rounded = _Known(), _Known()  # storage → _Offloaded or True; storage → {place in it: _Fp8}
        self.last = None  # the storage that was offloaded last
        self.streams = {}

    def pack(self, tensor):
        """The form in which a tensor waits."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.weights:
            return tensor
        if self.memory.fp8 and self._is_insensitive(tensor) and self.exact[storage] is None:
            return self._round(tensor, storage)
        return self._keep(tensor, storage)

    def unpack(self, packed):
        """The tensor again."""
        if isinstance(packed, _Fp8):
            return fp8_unpack(self.unpack(packed.codes), self.unpack(packed.exponents), packed.dtype).view(packed.shape)
        return packed.tensor() if isinstance(packed, _View) else packed

    def close(self):
        """Forget the storages: only the graph still holds what it needs, and lets go of it on the way back."""
        self.common, self.exact, self.rounded, self.last = _Known(), _Known(), _Known(), None

    def _is_insensitive(self, tensor):
        """Whether it is a row per token of a width that the linear layers here take or give. Weights in another dtype
        have such widths too, but products keep them transposed; routing weights are one number per row."""
        return tensor.is_floating_point() and tensor.ndim > 1 and tensor.shape[-1] in self.widths and tensor.is_contiguous()

    def _round(self, tensor, storage):
        places = self.rounded[storage]
        if places is None:
            self.rounded[storage] = places = {}
        place = tensor.storage_offset(), tensor.shape[-1], tensor.numel()
        if place not in places:
            codes, exponents = (self._keep(part, part.untyped_storage()) for part in fp8_pack(tensor.flatten(0, -2)))
            places[place] = _Fp8(codes, exponents, tensor.dtype, tensor.shape)
        return dataclasses.replace(places[place], shape=tensor.shape)

    def _keep(self, tensor, storage):
        known = self.exact[storage]
        if known is None:
            known = self._offload(storage) if self.memory.offload else True
            self.exact[storage] = known
            layer = "shared" if self.common[storage] else self.layer
            self.bytes[layer, "host" if self.memory.offload else "device"] += storage.nbytes()
        if not self.memory.offload:
            return tensor.detach()  # the tensor itself might hold the graph that holds it
        return _View(known, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())

    def _offload(self, storage):
        device = storage.device
        if device.type == "cuda" and device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        self.last = _Offloaded(storage, self.last, self.streams.get(device))
        return self.last


# ------------------------------------------------------------------------------------------ recompute

_aten = torch.ops.aten
PRODUCTS = (_aten.mm.default, _aten._grouped_mm.default)
ATTENTION = (_aten._scaled_dot_product_flash_attention_for_cpu.default, _aten._scaled_dot_product_flash_attention.default,
             _aten._scaled_dot_product_efficient_attention.default, _aten._scaled_dot_product_cudnn_attention.default)  # fmt: skip
# Not kept: up-projections are wide, and nobody reads what the others put out but the sum that follows.
REDONE = ("q_b_proj", "kv_b_proj", "o_proj", "down_proj")


def _is_kept(function, arguments, redone):
    """Whether an operator's result is kept: of attention, and of products with other weights than the redone ones."""
    return function in ATTENTION or (function in PRODUCTS and tuple(arguments[1].shape) not in redone)


def _each(change, result):
    """An operator's result with `change` done to its tensors, packed or not."""
    if isinstance(result, tuple):
        return tuple(change(part) if isinstance(part, torch.Tensor | _View | _Fp8) else part for part in result)
    return change(result)


class _Keeping(TorchDispatchMode):
    """While it is on, results of matrix products and attention go into `kept`, in order."""

    def __init__(self, kept, redone, saved):
        super().__init__()
        self.kept, self.redone, self.saved = kept, redone, saved

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if _is_kept(function, arguments, self.redone):
            self.kept.append(_each(self.saved.pack, result))
        return result


class _Giving(TorchDispatchMode):
    """While it is on, those operators are not run: their results come out of `kept`, in order.

    unread: whether no gradient needs what the experts put out. NaN then stands in for it, a third of their work.
    """

    def __init__(self, kept, redone, saved, unread):
        super().__init__()
        self.kept, self.redone, self.saved, self.unread = kept, redone, saved, unread

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if _is_kept(function, arguments, self.redone):
            return _each(self.saved.unpack, self.kept.popleft())
        if self.unread and function is _aten._grouped_mm.default:
            return arguments[0].new_full((), torch.nan).expand(len(arguments[0]), arguments[1].shape[-1])
        return function(*arguments, **(named or {}))


def _selective(block, saved):
    """Block.forward in two parts, each of which is run again in the backward pass until nothing more is missing.

    A part ends before its last product: the attention's max logits, which come after it, are not computed again.
    """
    # The products are told apart by the shape of their weight: (in,out), of experts (E,in,out).
    redone = {(*weight.shape[:-2], weight.shape[-1], weight.shape[-2]) for name, weight in block.named_parameters()
              if any(part in name for part in REDONE)}  # fmt: skip

    # Where grouped products run, rows are weighed before the down projection; only expert parallel weighs them after it.
    # Where experts are as wide as the stream, no shape tells their products apart, and all are run again.
    unread = (isinstance(block.mlp, MoE) and type(block.mlp.experts) is Experts
              and block.mlp.experts.gate_proj.shape != block.mlp.experts.down_proj.shape)  # fmt: skip

    def contexts():
        kept = deque()
        return _Keeping(kept, redone, saved), _Giving(kept, redone, saved, unread)

    def attend(x, table, mask, asked):
        return block.self_attn(block.input_layernorm(x), table, mask, None, block.index, asked)

    def feed(x, valid):
        normed = block.post_attention_layernorm(x)
        return (block.mlp(normed), None) if isinstance(block.mlp, MLP) else block.mlp(normed, valid)

    def forward(x, table, mask, valid, cache=None, want_max=False):
        if cache is not None or not torch.is_grad_enabled():
            return Block.forward(block, x, table, mask, valid, cache, want_max)
        settings = dict(use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        mixed, largest = checkpoint(attend, x, table, mask, valid if want_max else None, **settings)
        x = x + mixed
        fed, stats = checkpoint(feed, x, valid, **settings)
        return x + fed, largest, stats

    return forward


def _whole(block):
    """Block.forward, run again in the backward pass from its input."""

    def forward(*arguments):
        if not torch.is_grad_enabled():
            return Block.forward(block, *arguments)
        return checkpoint(Block.forward, block, *arguments, use_reentrant=False, preserve_rng_state=False)

    return forward


# --------------------------------------------------------------------------------------------- saving


@contextlib.contextmanager
def saving(memory, model, count=False):
    """While it is on, a forward pass of the model stores as `memory` says. The backward pass comes after it, once.

    memory: Memory; model: any module that holds decoder blocks — K25, or a pipeline stage; count: also count the bytes
    where nothing is to be changed. Yields Saved, whose `bytes` are filled by fp8, offload or count.
    Raises ActivationError where the model's compilation is in the way.
    """
    if memory == Memory() and not count:
        yield Saved(memory, ())
        return
    saved = Saved(memory, [*model.parameters(), *model.buffers()])
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        if block._compiled_call_impl is not None:
            raise ActivationError("a compiled block decides itself what it stores: choose compile, or recompute, fp8 and offload")
    with contextlib.ExitStack() as stack:
        if memory.fp8 or memory.offload or count:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack))
        stack.callback(saved.close)
        for block in blocks:
            inner = {"none": block.forward, "selective": _selective(block, saved), "block": _whole(block)}[memory.recompute]
            _replace(stack, block, _in_layer(block, inner, saved))
            routed = not isinstance(block.mlp, MLP)
            parts = [block.mlp.experts, block.mlp.shared_experts] if routed else [block.mlp]
            for part in parts if memory.fp8 else ():
                if part is not None:
                    _replace(stack, part, _with_widths(part, saved))
        yield saved


def _replace(stack, module, forward):
    """Another forward for one module, until the stack is closed."""
    module.forward = forward  # on the instance, where nn.Module finds it first
    stack.callback(delattr, module, "forward")


def _in_layer(block, inner, saved):
    """Bytes are this layer's while its forward runs; what all layers get is "shared"."""

    def forward(x, table, mask, valid, cache=None, want_max=False):
        for tensor in (*table, mask, valid):
            if tensor is not None:
                saved.common[tensor.untyped_storage()] = True
        saved.layer = block.index
        try:
            return inner(x, table, mask, valid, cache, want_max)
        finally:
            saved.layer = "outside"

    return forward


def _with_widths(module, saved):
    """Rows of the widths of its matrices may be FP8 while its forward runs."""
    inner = module.forward
    widths = {width for matrix in module.parameters() for width in matrix.shape[-2:]}

    def forward(*arguments):
        saved.widths = widths
        try:
            return inner(*arguments)
        finally:
            saved.widths = ()

    return forward


# -------------------------------------------------------------------------------------------- measure

SETTINGS = {
    "plain": Memory(),
    "fp8": Memory(fp8=True),
    "offload": Memory(offload=True),
    "selective": Memory("selective"),
    "selective, fp8": Memory("selective", fp8=True),
    "selective, offload": Memory("selective", offload=True),
    "selective, fp8, offload": Memory("selective", fp8=True, offload=True),
    "block": Memory("block"),
    "block, offload": Memory("block", offload=True),
}
# Which parameters' gradients are measured together, by a part of the name; the first that fits.
GROUPS = {"attention": ("q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj"), "router": ("mlp.gate.",),
          "experts": ("mlp.experts.",), "MLPs": ("mlp.",), "norms": ("norm",), "embedding": ("embed_tokens",), "head": ("lm_head",)}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One setting. Bytes are those that autograd keeps of one forward pass, per token and decoder layer."""

    name: str
    device: float  # in the device's memory
    host: float  # in the CPU's memory
    fixed: float  # in either, per layer, whatever the number of tokens: above all copies of weights in another dtype
    seconds: float  # of one forward and backward pass
    time: float  # relative to plain
    same_loss: bool  # bitwise
    errors: dict  # group of parameters → |gradient − plain gradient| / |plain gradient|

    @property
    def error(self):
        """The worst group's."""
        return max(self.errors.values())


def _group(name):
    return next(group for group, parts in GROUPS.items() if any(part in name for part in parts))


def _tokens(model, rows, length, seed):
    """Random ids (rows,T) and their segments, two in each row."""
    device = model.language_model.lm_head.weight.device
    ids = torch.randint(model.config.bos_token_id, (rows, length), generator=torch.Generator().manual_seed(seed))
    return ids.to(device), (torch.arange(length, device=device) >= length // 3).long().expand(rows, length)


def _step(model, ids, segments, memory, autocast, count=False):
    """One forward and backward pass. Returns (loss, gradients by name, Saved, seconds)."""
    clock = time.perf_counter if ids.device.type == "cuda" else time.process_time  # others may use this CPU too
    model.zero_grad(set_to_none=True)
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast), saving(memory, model, count) as saved:
        hidden, stats = model.hidden(model.embed(ids), segment_ids=segments, want_max=True)
        targets = ids.roll(-1, dims=1).flatten()
        loss = cross_entropy_fused(hidden.flatten(0, 1), model.language_model.lm_head.weight, targets).mean()
        loss = loss + model.config.aux_loss_alpha * stats.balance_loss
    loss.backward()
    loss = loss.item()
    seconds = clock() - started
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, saved, seconds


def _errors(gradients, plain):
    """Relative error of each group's gradient."""
    gaps, sizes = Counter(), Counter()
    for name, gradient in plain.items():
        gaps[_group(name)] += (gradients[name].double() - gradient.double()).square().sum().item()
        sizes[_group(name)] += gradient.double().square().sum().item()
    return {group: (gaps[group] / sizes[group]) ** 0.5 for group in GROUPS if sizes[group]}


def measure(model, rows=2, length=256, dtype="float32", repeats=3, seed=0, settings=SETTINGS):
    """Bytes, time and gradient error of each setting, on random tokens, two packed segments per row.

    model: K25 in the dtype of its weights; rows, length: B, T; dtype: "bfloat16" is autocast; repeats: turns of all
    settings, of which the median time counts; settings: name → Memory, "plain" among them. Returns a list of Measured.
    """
    autocast, layers = dtype == "bfloat16", model.config.num_hidden_layers
    ids, segments = _tokens(model, 2 * rows, length, seed)
    _, plain, _, _ = _step(model, ids[:rows], segments[:rows], Memory(), autocast)
    plain_loss, found, seconds = None, {}, {name: [] for name in settings}
    for turn in range(max(repeats, 1)):
        for name, memory in settings.items():
            loss, gradients, _, took = _step(model, ids[:rows], segments[:rows], memory, autocast)
            seconds[name].append(took)
            if turn == 0:
                plain_loss = loss if plain_loss is None else plain_loss
                found[name] = loss == plain_loss, _errors(gradients, plain)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    results = []
    for name, memory in settings.items():
        # Twice as many tokens: what grows is stored per token.
        small, large = (_layer_bytes(_step(model, ids[:n], segments[:n], memory, autocast, count=True)[2])
                        for n in (rows, 2 * rows))  # fmt: skip
        device_bytes, host_bytes = ((large[place] - small[place]) / (rows * length * layers) for place in ("device", "host"))
        fixed = sum(2 * small[place] - large[place] for place in ("device", "host")) / layers
        same, errors = found[name]
        results.append(Measured(name, device_bytes, host_bytes, fixed, median[name], median[name] / median["plain"], same, errors))
    return results


def _layer_bytes(saved):
    """Bytes of all decoder layers, by place."""
    total = Counter()
    for (layer, place), size in saved.bytes.items():
        total[place] += size if isinstance(layer, int) else 0
    return total


def _yardstick(model, rows, length, seed):
    """Errors of the plain gradient in bfloat16 autocast against float32: what a run accepts anyway."""
    ids, segments = _tokens(model, rows, length, seed)
    plain = _step(model, ids, segments, Memory(), False)[1]
    return _errors(_step(model, ids, segments, Memory(), True)[1], plain)


def show(results, yardstick, device):
    """The table as text; yardstick: errors by group, or None."""
    groups = list(results[0].errors)
    lines = [f"{'':24s} {'bytes / token, layer':>21s} {'of':>5s} {'time':>6s} {'same':>5s}  relative error of the gradient",
             f"{'':24s} {'device':>10s} {'host':>10s} {'plain':>5s} {'':6s} {'loss':>5s}  " + " ".join(f"{g:>9s}" for g in groups)]  # fmt: skip
    whole = results[0].device + results[0].host
    for r in results:
        lines.append(f"{r.name:24s} {r.device:10,.0f} {r.host:10,.0f} {r.device / whole:5.0%} {r.time:5.2f}x {'yes' if r.same_loss else 'NO':>5s}  "
                     + " ".join("        0" if not r.errors[g] else f"{r.errors[g]:9.1e}" for g in groups))  # fmt: skip
    if yardstick:
        lines.append(f"{'bfloat16 for float32':24s} {'':42s}        " + " ".join(f"{yardstick[g]:9.1e}" for g in groups))
    most, least = (f(r.fixed for r in results) for f in (max, min))
    lines.append(f"besides, per layer and whatever the tokens, {least:,.0f} to {most:,.0f} bytes: offsets, and in bfloat16 copies of weights")
    if device.type == "cpu":
        lines.append("offload on a CPU moves nothing: host and device are one memory, and bytes of the column host are spent there too")
    return "\n".join(lines)


def plot(results, path, title):
    """Bars of bytes per token and layer, with time and worst gradient error beside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(9, 1.6 + 0.42 * len(results)), layout="constrained")
    shown = results[::-1]
    names, device, host = [r.name for r in shown], [r.device for r in shown], [r.host for r in shown]
    panel.barh(names, device, color="#4477aa", height=0.62, label="in the device's memory")
    panel.barh(names, host, left=device, color="#cccccc", height=0.62, label="in the CPU's memory")
    for row, r in enumerate(shown):
        error = f"gradient error {r.error:.1e}" if r.error else "gradient bitwise equal"
        panel.text(r.device + r.host, row, f"  {r.device + r.host:,.0f} B, time × {r.time:.2f}, {error}", va="center", fontsize=8)
    panel.set(xlabel="bytes kept for the backward pass, per token and decoder layer", xlim=(0, 1.65 * max(map(sum, zip(device, host)))))
    panel.set_title(title, fontsize=10)
    panel.legend(loc="lower right", fontsize=8)
    panel.grid(axis="x", alpha=0.3)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    os.replace(temporary, path)
    pyplot.close(figure)


def main(arguments=None):
    """Measure every setting; print the table; write activations.json and activations.png. Exit code 2 on misuse."""
    cli = argparse.ArgumentParser(prog="activations.py", description=__doc__.split("\n")[0])
    cli.add_argument("--preset", default="toy", help="the model: toy, small")
    cli.add_argument("--rows", type=int, default=2, metavar="B")
    cli.add_argument("--length", type=int, default=256, metavar="T")
    cli.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32", help="bfloat16: autocast, weights in float32")
    cli.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    cli.add_argument("--repeats", type=int, default=3, help="the median time counts")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--out", default="runs/activations", metavar="DIR")
    flags = cli.parse_args(arguments)
    try:
        if min(flags.rows, flags.repeats) < 1 or flags.length < 2:
            raise ActivationError(f"--rows {flags.rows}, --length {flags.length}, --repeats {flags.repeats}: at least 1, 2 and 1")
        config = K25Config.preset(flags.preset)
        try:
            device = torch.empty(0, device=flags.device).device
        except (RuntimeError, AssertionError) as error:
            raise ActivationError(f"device {flags.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        print(f"activations.py: {error}", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(flags.seed)
    model = K25(config).to(device, torch.float64 if flags.dtype == "float64" else torch.float32)
    results = measure(model, flags.rows, flags.length, flags.dtype, flags.repeats, flags.seed)
    yardstick = None if flags.dtype == "float64" else _yardstick(model, flags.rows, flags.length, flags.seed)
    title = f"{flags.preset}, {flags.rows} rows of {flags.length} tokens, {flags.dtype}, {device.type}, torch {torch.__version__}"
    print(title, show(results, yardstick, device), sep="\n")
    out = pathlib.Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    told = {"about": vars(flags), "torch": torch.__version__, "bfloat16 for float32": yardstick,
            "settings": [dataclasses.asdict(r) for r in results]}  # fmt: skip
    write_file(out / "activations.json", json.dumps(told, indent=1) + "\n")
    plot(results, out / "activations.png", title)
    print(out / "activations.json", out / "activations.png", sep=", ")


if __name__ == "__main__":
    main()
