"""Taps: every operation of one forward pass, with its inputs and its output, under names that any stack can write.

`capture` walks through a K25 step by step, calling the model's own modules and pure functions on explicit inputs, and
records each step. What it records is what the model computes: tests/test_taps.py compares with the outputs of the
model's modules, bit by bit. A tap may be pinned to a value from elsewhere, and everything after it then starts from
that value: pin `…router.index` to fix the routing, pin all of another stack's taps to see each of our operations
on that stack's own inputs. An operation may also be replaced by somebody's function throughout the model.

Public names: Prompt, standard_prompts, Tap, capture, Recording, write_taps, read_taps, TapsError.

A taps directory holds `PROMPT.safetensors` for each prompt. Its tensors are `TAP` for the output of each operation that
the writer cares to tell; optionally `TAP.in.ARGUMENT` for an input of it; and `prompt.ids` (B,T) int64,
`prompt.patches` (L,3pp), `prompt.grid_thw` (I,3) int64, by which a reader runs the very same prompt. `taps.json` tells
about each tap its op, shape, dtype, numeric arguments and weights; a reader does without it.

    tap                                  operation              shape
    vision.patch_embed                   patch_embed            (L,D)      without positions
    vision.position_embedding            position_embedding     (L,D)
    vision.embedded                      add                    (L,D)
    vision.blocks.I.norm0                layer_norm             (L,D)
    vision.blocks.I.qkv                  linear                 (L,3D)     all of q, then k, then v
    vision.blocks.I.query, .key          rope_2d                (L,A,G)    adjacent pairs
    vision.blocks.I.attention            vit_attention          (L,A,G)
    vision.blocks.I.attention_out        linear                 (L,D)
    vision.blocks.I.residual             add                    (L,D)
    vision.blocks.I.norm1                layer_norm             (L,D)
    vision.blocks.I.fc0, .gelu, .fc1     linear, gelu, linear   (L,F), (L,F), (L,D)
    vision.blocks.I.output               add                    (L,D)
    vision.norm                          layer_norm             (L,D)
    vision.merged                        pool_merge             (M,4,D)
    vision.projected                     project                (M,C)
    decoder.embedded                     embedding              (B,T,C)    of all ids, media places too
    decoder.spliced                      media_splice           (B,T,C)    only where there are media
    decoder.rope.cos, decoder.rope.sin   rope_table             (B,T,P/2)
    decoder.mask                         visibility             (B,1,T,T) bool, True is visible
    decoder.softmax_scale                softmax_scale          ()
    decoder.layers.I.input_norm          rms_norm               (B,T,C)
    decoder.layers.I.q_a                 linear                 (B,T,Q)
    decoder.layers.I.q_norm              rms_norm               (B,T,Q)
    decoder.layers.I.q_b                 linear                 (B,T,H,N+P)
    decoder.layers.I.q_rope              rope                   (B,T,H,P)  adjacent pairs
    decoder.layers.I.kv_a                linear                 (B,T,R+P)
    decoder.layers.I.latent              rms_norm               (B,T,R)
    decoder.layers.I.k_rope              rope                   (B,T,1,P)  one key for all heads
    decoder.layers.I.attention           mla_attention          (B,T,HV)
    decoder.layers.I.attention_out       linear                 (B,T,C)
    decoder.layers.I.residual            add                    (B,T,C)
    decoder.layers.I.post_norm           rms_norm               (B,T,C)
    decoder.layers.I.router.index        route                  (BT,K) int64, best first; the order is not compared
    decoder.layers.I.router.weights      route                  (BT,K)     of those experts
    decoder.layers.I.experts             experts                (BT,C)
    decoder.layers.I.shared_experts      swiglu                 (BT,C)
    decoder.layers.I.mlp                 add | swiglu           (BT,C)     experts + shared experts | a dense layer
    decoder.layers.I.output              add                    (B,T,C)
    decoder.norm                         rms_norm               (B,T,C)
    decoder.logits                       linear                 (B,T,U)

linear, add, layer_norm, gelu and embedding are elementary; every other operation is one of the oracle's ops, and
`Tap.inputs` are then its arguments by name.

Letters: B batch, T tokens, H heads, C hidden, Q query rank, R latent rank, N/P/V nope/rope/value head dims, E experts,
K chosen, F MLP width, U vocabulary, L patches, I items (and layers, in the table), D vision width, A vision heads,
G vision head dim, M merged media tokens.     Tests: pytest tests/test_taps.py
"""

import contextlib
import json
import pathlib
import shutil
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import mla
import vit3d
from checkpoint import load_tensors, replace_directory, save_tensors, write_file
from moe import MLP

VISION_THETA = 10000.0  # of the 2-D rotary embedding
VERSION = 1  # of the directory's layout


class TapsError(ValueError):
    """A prompt, a pinned value or a taps directory that cannot be used."""


# -------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompt:
    """One input of the whole model.

    ids: (B,T) int64, B rows of one length; patches: (L,3pp) float and grid_thw: (I,3) int64 — media of all rows in
    order, or None.
    """

    ids: Tensor
    patches: Tensor | None = None
    grid_thw: Tensor | None = None


IMAGES = ((1, 4, 6), (1, 2, 2))  # no square alone: rows and columns must not be confused
CLIPS = ((4, 2, 4), (2, 6, 2))
LONGEST_TEXT = 40


def standard_prompts(config, seed=0):
    """A text, two images, two clips, and everything mixed, of random tokens and patches for any config.

    config: K25Config; seed: int. Returns {"text" | "image" | "clip" | "mixed": Prompt}, each of one row.
    """
    generator = torch.Generator().manual_seed(seed)
    special = [config.media_placeholder_token_id, config.bos_token_id, config.eos_token_id, config.pad_token_id]
    ordinary = torch.ones(config.vocab_size, dtype=torch.bool)
    ordinary[[i for i in special if i < config.vocab_size]] = False
    ordinary = ordinary.nonzero()[:, 0]  # (≤U,) ids that mean nothing to the model
    length = min(LONGEST_TEXT, config.max_position_embeddings)

    def text(count):
        return ordinary[torch.randint(len(ordinary), (count,), generator=generator)]  # (count,)

    def multimodal(grids):
        parts = [text(3)]
        for number, (_, h, w) in enumerate(grids):
            parts += [torch.full((h * w // 4,), config.media_placeholder_token_id), text(2 + number)]
        patches = sum(t * h * w for t, h, w in grids)
        values = torch.rand(patches, 3 * config.vision.patch_size**2, generator=generator) * 2 - 1  # (L,3pp)
        return Prompt(torch.cat(parts)[None], values, torch.tensor(grids))

    clips = tuple((min(t, config.vision.init_pos_emb_time), h, w) for t, h, w in CLIPS)
    return {"text": Prompt(text(length)[None]), "image": multimodal(IMAGES), "clip": multimodal(clips),
            "mixed": multimodal((IMAGES[0], *clips, IMAGES[1]))}  # fmt: skip


def _check(prompt, config):
    """Refuse a prompt whose shapes or counts the model cannot honour."""
    if prompt.ids.ndim != 2 or prompt.ids.dtype != torch.int64 or not prompt.ids.numel():
        raise TapsError(f"prompt ids are {prompt.ids.dtype} {tuple(prompt.ids.shape)}, should be int64 (B,T)")
    if not 0 <= prompt.ids.min() <= prompt.ids.max() < config.vocab_size:
        raise TapsError(f"prompt has a token outside the vocabulary of {config.vocab_size}")
    if (prompt.patches is None) != (prompt.grid_thw is None):
        raise TapsError("prompt has patches without grid_thw, or grid_thw without patches")
    grids = [] if prompt.grid_thw is None else prompt.grid_thw.tolist()
    found = int((prompt.ids == config.media_placeholder_token_id).sum())
    given = sum(vit3d.merged_tokens(grid) for grid in grids)
    if found != given:
        raise TapsError(f"prompt has {found} media tokens but its media give {given} embeddings")


# -------------------------------------------------------------------------------------------- capture


@dataclass(frozen=True)
class Tap:
    """One operation of a forward pass.

    name: see the table above; op: name of the operation; inputs: {argument: tensor, number, list or None}, weights
    included; output: Tensor — computed here, also where the tap was pinned; weights: {argument: state-dict key} of
    those inputs that are weights; result: which of the op's results the output is, counted from 0.
    """

    name: str
    op: str
    inputs: dict
    output: Tensor
    weights: dict = field(default_factory=dict)
    result: int = 0


class _Reached(Exception):
    """The tap is there after which nothing was asked for."""


class _Recorder:
    """Collects taps in execution order and hands on either what was computed or what is pinned."""

    def __init__(self, model, pinned, replaced, until):
        self.keys = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
        self.pinned, self.replaced, self.until = pinned or {}, replaced or {}, until
        self.taps = {}

    def __call__(self, name, op, output, result=0, **inputs):
        if op in self.replaced:
            given = self.replaced[op](*inputs.values())
            output = torch.as_tensor(given[result] if isinstance(given, tuple) else given).to(output)
        weights = {argument: self.keys[id(value)] for argument, value in inputs.items() if id(value) in self.keys}
        self.taps[name] = Tap(name, op, inputs, output, weights, result)
        if name == self.until:
            raise _Reached
        if name not in self.pinned:
            return output
        value = self.pinned[name]
        if value.shape != output.shape:
            raise TapsError(f"{name} is pinned to shape {tuple(value.shape)}, should be {tuple(output.shape)}")
        return value.to(output)


@torch.no_grad()
def capture(model, prompt, pinned=None, replaced=None, until=None):
    """Run one prompt through a K25 and keep every operation.

    model: K25; prompt: Prompt; pinned: {tap name: tensor} — what later operations get in place of our own output;
    replaced: {op: function of the op's arguments} — computes that op, wherever it occurs, in place of ours; until: name
    of the last tap that is wanted, None for all.
    Returns {name: Tap} in execution order. Raises TapsError for a prompt that does not fit or a pinned value of another
    shape.
    """
    _check(prompt, model.config)
    head = model.language_model.lm_head.weight
    tap = _Recorder(model, pinned, replaced, until)
    with contextlib.suppress(_Reached):
        media = None
        if prompt.patches is not None:
            media = _vision(model, prompt.patches.to(head.device), prompt.grid_thw, tap)
        _decoder(model, prompt.ids.to(head.device), media, tap)
    return tap.taps


def _vision(model, patches, grid_thw, tap):
    """MoonViT3d.forward and the projector, written out. Returns (M,C)."""
    tower, embed = model.vision_tower, model.vision_tower.patch_embed
    grids = vit3d.check_grids(grid_thw, len(patches), tower.cfg.init_pos_emb_time)
    lengths = [t * h * w for t, h, w in grids]
    weight, bias, positions = embed["proj"].weight, embed["proj"].bias, embed["pos_emb"]["weight"]
    x = vit3d.patch_embed(patches, weight, bias)
    x = tap("vision.patch_embed", "patch_embed", x, patches=patches, weight=weight, bias=bias)
    position = vit3d.position_embedding(positions, grids)
    position = tap("vision.position_embedding", "position_embedding", position, table=positions, grids=grids)
    x = _add(tap, "vision.embedded", x, position.to(x.dtype))
    head_dim = tower.cfg.vt_hidden_size // tower.cfg.vt_num_attention_heads
    table_dtype = torch.promote_types(x.dtype, torch.float32)
    table = vit3d.rope_table_2d(grids, head_dim, VISION_THETA, dtype=table_dtype, device=x.device)  # (L,G/2)
    for i, block in enumerate(tower.encoder["blocks"]):
        x = _vision_block(block, x, table, grids, lengths, tower, f"vision.blocks.{i}", tap)
    x = _layer_norm(tap, "vision.norm", x, tower.encoder["final_layernorm"])
    merged = tap("vision.merged", "pool_merge", tower.pool_merge(x, grids), x=x, grids=grids)
    norm, fc0, fc1 = model.mm_projector.pre_norm, model.mm_projector.proj[0], model.mm_projector.proj[2]
    return tap("vision.projected", "project", model.mm_projector(merged), merged=merged,
               norm_weight=norm.weight, norm_bias=norm.bias, fc0_weight=fc0.weight, fc0_bias=fc0.bias,
               fc1_weight=fc1.weight, fc1_bias=fc1.bias, eps=norm.eps)  # fmt: skip


def _vision_block(block, x, table, grids, lengths, tower, name, tap):
    """vit_block, written out: (L,D) → (L,D)."""
    heads = tower.cfg.vt_num_attention_heads
    normed = _layer_norm(tap, f"{name}.norm0", x, block.norm0)
    qkv = _linear(tap, f"{name}.qkv", normed, block.wqkv)
    q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)  # (L,3D) → 3 × (L,A,G)
    q, k = (
        tap(f"{name}.{part}", "rope_2d", vit3d.apply_rope_2d(a, table), x=a, grids=grids, theta=VISION_THETA)
        for part, a in (("query", q), ("key", k))
    )
    attended = tower.attention(q, k, v, lengths)
    attended = tap(f"{name}.attention", "vit_attention", attended, q=q, k=k, v=v, lengths=lengths)
    attended = _linear(tap, f"{name}.attention_out", attended.flatten(1), block.wo)  # (L,A,G) → (L,D)
    x = _add(tap, f"{name}.residual", x, attended)
    normed = _layer_norm(tap, f"{name}.norm1", x, block.norm1)
    widened = _linear(tap, f"{name}.fc0", normed, block.mlp["fc0"])
    widened = tap(f"{name}.gelu", "gelu", F.gelu(widened, approximate="tanh"), x=widened)
    return _add(tap, f"{name}.output", x, _linear(tap, f"{name}.fc1", widened, block.mlp["fc1"]))


def _decoder(model, ids, media, tap):
    """K25.forward from token ids and media embeddings on, written out. Returns logits (B,T,U)."""
    config, decoder = model.config, model.language_model.model
    table, media_id = decoder.embed_tokens, config.media_placeholder_token_id
    x = tap("decoder.embedded", "embedding", table(ids), ids=ids, weight=table.weight)
    if media is not None:
        spliced = x.masked_scatter((ids == media_id)[..., None], media.to(x.dtype))
        x = tap("decoder.spliced", "media_splice", spliced, embedded=x, ids=ids, media=media, media_id=media_id)
    cos, sin, mask, scale = _attention_constants(config, x, tap)
    for i, block in enumerate(decoder.layers):
        x = _decoder_layer(block, config, x, cos, sin, mask, scale, f"decoder.layers.{i}", tap)
    x = _rms_norm(tap, "decoder.norm", x, decoder.norm)
    return _linear(tap, "decoder.logits", x, model.language_model.lm_head)


def _attention_constants(config, x, tap):
    """What all layers share: cos and sin (B,T,P/2), mask (B,1,T,T) and the softmax scale."""
    batch, tokens = x.shape[:2]
    yarn, rope_dim = config.yarn, config.qk_rope_head_dim
    positions = torch.arange(tokens, device=x.device).expand(batch, tokens)
    segments = torch.zeros_like(positions)
    table_dtype = torch.promote_types(x.dtype, torch.float32)
    table = mla.rope_table(positions, rope_dim, config.rope_theta, yarn, table_dtype)
    settings = dict(rope_dim=rope_dim, theta=config.rope_theta, factor=yarn.factor,
                    original_length=yarn.original_max_position_embeddings, beta_fast=yarn.beta_fast,
                    beta_slow=yarn.beta_slow, mscale=yarn.mscale, mscale_all_dim=yarn.mscale_all_dim)  # fmt: skip
    cos, sin = (
        tap(f"decoder.rope.{part}", "rope_table", table[i], i, positions=positions, **settings)
        for i, part in enumerate(("cos", "sin"))
    )
    mask = mla.visibility(segments, segments)
    mask = tap("decoder.mask", "visibility", mask, query_segments=segments, key_segments=segments)
    scale = torch.tensor(mla.softmax_scale(config.qk_nope_head_dim, rope_dim, yarn), dtype=torch.float64)
    scale = tap("decoder.softmax_scale", "softmax_scale", scale, nope_dim=config.qk_nope_head_dim, rope_dim=rope_dim,
                factor=yarn.factor, mscale=yarn.mscale, mscale_all_dim=yarn.mscale_all_dim)  # fmt: skip
    return cos, sin, mask, scale.item()


def _decoder_layer(block, config, x, cos, sin, mask, scale, name, tap):
    """Block.forward with MLA.forward inside, written out: (B,T,C) → (B,T,C)."""
    attention, heads = block.self_attn, config.num_attention_heads
    nope, rope, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    attend = mla.mla_attention_reference if config.impl == "reference" else mla.mla_attention_fused

    normed = _rms_norm(tap, f"{name}.input_norm", x, block.input_layernorm)
    query = _linear(tap, f"{name}.q_a", normed, attention.q_a_proj)
    query = _rms_norm(tap, f"{name}.q_norm", query, attention.q_a_layernorm)
    query = _linear(tap, f"{name}.q_b", query, attention.q_b_proj, heads)  # (B,T,H,N+P)
    q_nope, q_rope = query.split((nope, rope), dim=-1)
    q_rope = tap(f"{name}.q_rope", "rope", mla.apply_rope(q_rope, (cos, sin)), x=q_rope, cos=cos, sin=sin)
    latent, k_rope = _linear(tap, f"{name}.kv_a", normed, attention.kv_a_proj_with_mqa).split((rank, rope), dim=-1)
    latent = _rms_norm(tap, f"{name}.latent", latent, attention.kv_a_layernorm)
    k_rope = k_rope[:, :, None]  # (B,T,1,P)
    k_rope = tap(f"{name}.k_rope", "rope", mla.apply_rope(k_rope, (cos, sin)), x=k_rope, cos=cos, sin=sin)
    inputs = dict(q_nope=q_nope, q_rope=q_rope, latent=latent, rope_key=k_rope[:, :, 0],
                  kv_b=attention.kv_b_proj.weight, mask=mask, scale=scale)  # fmt: skip
    mixed = tap(f"{name}.attention", "mla_attention", attend(**inputs), **inputs)
    x = _add(tap, f"{name}.residual", x, _linear(tap, f"{name}.attention_out", mixed, attention.o_proj))

    normed = _rms_norm(tap, f"{name}.post_norm", x, block.post_attention_layernorm)
    tokens = normed.flatten(0, 1)  # (B,T,C) → (BT,C)
    if isinstance(block.mlp, MLP):
        y = _swiglu(tap, f"{name}.mlp", tokens, block.mlp)
    else:
        y = _moe(block.mlp, tokens, name, tap)
    return _add(tap, f"{name}.output", x, y.view_as(x))


def _moe(moe, x, name, tap):
    """MoE.forward, written out: (BT,C) → (BT,C)."""
    gate, experts = moe.gate, moe.experts
    top_k, n_group, topk_group, scale, _ = gate.settings
    inputs = dict(x=x, weight=gate.weight, bias=gate.e_score_correction_bias, top_k=top_k, n_group=n_group,
                  topk_group=topk_group, scale=scale)  # fmt: skip
    index = tap(f"{name}.router.index", "route", gate(x).index, 1, **inputs, pinned=None)
    pinned = index if f"{name}.router.index" in tap.pinned else None
    weights = tap(f"{name}.router.weights", "route", gate(x, pinned).weights, **inputs, pinned=pinned)
    y = tap(f"{name}.experts", "experts", experts(x, weights, index), x=x, weights=weights, index=index,
            gate=experts.gate_proj, up=experts.up_proj, down=experts.down_proj)  # fmt: skip
    if moe.shared_experts is None:
        return y
    return _add(tap, f"{name}.mlp", y, _swiglu(tap, f"{name}.shared_experts", x, moe.shared_experts))


def _add(tap, name, x, y):
    return tap(name, "add", x + y, x=x, y=y)


def _linear(tap, name, x, module, heads=None):
    y = module(x)
    y = y if heads is None else y.unflatten(-1, (heads, -1))  # (...,O) → (...,H,O/H)
    return tap(name, "linear", y, x=x, weight=module.weight, bias=module.bias)


def _layer_norm(tap, name, x, module):
    return tap(name, "layer_norm", module(x), x=x, weight=module.weight, bias=module.bias, eps=module.eps)


def _rms_norm(tap, name, x, module):
    return tap(name, "rms_norm", module(x), x=x, weight=module.weight, eps=module.eps)


def _swiglu(tap, name, x, module):
    gate, up, down = module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight
    return tap(name, "swiglu", module(x), x=x, gate=gate, up=up, down=down)


# ------------------------------------------------------------------------------------------ directory


@dataclass(frozen=True)
class Recording:
    """What a taps directory says about one prompt.

    prompt: Prompt or None; tensors: {tap name: output}; inputs: {tap name: {argument: tensor}} and arguments:
    {tap name: {argument: number}} of taps.json, as far as the writer tells them.
    """

    prompt: Prompt | None
    tensors: dict
    inputs: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)


def write_taps(directory, captured, with_inputs=False):
    """Write a taps directory, atomically; the same taps give the same bytes.

    directory: path, new or a taps directory; captured: {prompt name: (Prompt, {tap name: Tap})}; with_inputs: also
    `TAP.in.ARGUMENT` for every tensor that is no weight. Raises TapsError when `directory` holds something else.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and not (directory / "taps.json").is_file() and any(directory.glob("*")):
        raise TapsError(f"{directory} exists and is no taps directory: choose another one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    manifest = {"format": "k25-taps", "version": VERSION, "prompts": {}}
    for prompt_name, (prompt, taps) in captured.items():
        tensors = {f"prompt.{part}": value for part, value in vars(prompt).items() if value is not None}
        for tap in taps.values():
            tensors[tap.name] = tap.output
            if with_inputs:
                tensors |= {f"{tap.name}.in.{argument}": value for argument, value in tap.inputs.items()
                            if isinstance(value, Tensor) and argument not in tap.weights}  # fmt: skip
        save_tensors(tensors, unfinished / f"{prompt_name}.safetensors")
        manifest["prompts"][prompt_name] = {tap.name: _described(tap) for tap in taps.values()}
    write_file(unfinished / "taps.json", json.dumps(manifest, indent=1) + "\n")
    replace_directory(unfinished, directory)


def _described(tap):
    """What the manifest says about a tap."""
    numbers = {argument: value for argument, value in tap.inputs.items() if not isinstance(value, Tensor)}
    return {"op": tap.op, "shape": list(tap.output.shape), "dtype": str(tap.output.dtype).removeprefix("torch."),
            "arguments": numbers, "weights": tap.weights}  # fmt: skip


def read_taps(directory):
    """Read a taps directory that `write_taps` or another program wrote. Returns {prompt name: Recording}.

    Raises TapsError where there is no safetensors file, CheckpointError for a broken one.
    """
    directory = pathlib.Path(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise TapsError(f"{directory} holds no safetensors file: expected PROMPT.safetensors for each prompt")
    manifest, told = directory / "taps.json", {}
    if manifest.is_file():
        try:
            told = {prompt: {name: tap.get("arguments", {}) for name, tap in taps.items()}
                    for prompt, taps in json.loads(manifest.read_text(encoding="utf-8"))["prompts"].items()}  # fmt: skip
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise TapsError(f"{manifest} is no manifest of taps: {error!r}") from None
    return {path.stem: _recording(load_tensors(path), told.get(path.stem, {})) for path in files}


def _recording(tensors, arguments):
    prompt, outputs, inputs = {}, {}, {}
    for name, tensor in tensors.items():
        tap, is_input, argument = name.rpartition(".in.")
        if name.startswith("prompt."):
            prompt[name.removeprefix("prompt.")] = tensor
        elif is_input:
            inputs.setdefault(tap, {})[argument] = tensor
        else:
            outputs[name] = tensor
    unknown = prompt.keys() - {"ids", "patches", "grid_thw"}
    if unknown or (prompt and "ids" not in prompt):
        raise TapsError(f"a prompt is prompt.ids with prompt.patches and prompt.grid_thw, not {sorted(prompt)}")
    return Recording(Prompt(**prompt) if prompt else None, outputs, inputs, arguments)
