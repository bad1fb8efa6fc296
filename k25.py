"""Kimi K2.5: config, decoder, multimodal model, loss, checkpoints and the command line — K2.5 report 4.1, 4.2.

    patches → vision_tower → mm_projector ─┐
    ids → embed_tokens ────────────────────┴→ spliced (B,T,C) → layers → norm → lm_head → logits (B,T,U)

Public names: K25Config, K25, Stats, cross_entropy_reference, cross_entropy_fused, save, load, generate.
Run: python k25.py info --preset k2.5        (parameter table, on the meta device)
     python k25.py chat --run runs/toy [--image F] [--video F] "prompt"

Letters: B batch, T tokens, S cached tokens, H heads, C hidden, U vocabulary, E experts, K chosen,
F expert width, L patches, I media items, M merged media tokens.     Tests: pytest tests/test_k25.py
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from checkpoint import CheckpointError, read_checkpoint, released_entries, write_checkpoint
from generate import Generation, generate
from mla import MLA, LatentCache, RMSNorm, Yarn, rope_table, softmax_scale, visibility
from moe import MLP, MoE, normal_init_
from template import StreamParser, render_ids
from tokenizer import StreamDecoder, Tokenizer
from vit3d import (MediaConfig, MoonViT3d, Projector, VisionConfig, image_item, load_image, load_video, merged_tokens,
                   pack, video_items)  # fmt: skip

__all__ = ["K25", "K25Config", "Stats", "Generation", "CheckpointError", "cross_entropy_fused",
           "cross_entropy_reference", "generate", "load", "save"]  # fmt: skip


# --------------------------------------------------------------------------------------------- config

# What K2.5 never varies; a config that says otherwise describes another model and is refused.
_FIXED_TOP = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "ignore_index": -100,
              "tie_word_embeddings": False, "use_unified_vision_chunk": True,
              "video_placeholder": "<|kimi_k25_video_placeholder|>"}  # fmt: skip
_FIXED_TEXT = {"hidden_act": "silu", "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
               "moe_layer_freq": 1, "seq_aux": True, "num_nextn_predict_layers": 0, "attention_bias": False,
               "tie_word_embeddings": False}  # fmt: skip
_TOP_KEYS = ("media_placeholder_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
_RUNTIME = ("impl", "qat")  # how it runs, not what it is: never in config.json


class ConfigError(ValueError):
    """A config that cannot be built; the message names the key."""


@dataclass(frozen=True)
class K25Config:
    """Every size of the model. Field names are the `config.json` keys of `text_config`; the defaults are K2.5."""

    vocab_size: int = 163840
    hidden_size: int = 7168  # C
    intermediate_size: int = 18432  # width of the dense FFN of the first layers
    moe_intermediate_size: int = 2048  # F
    num_hidden_layers: int = 61
    num_attention_heads: int = 64  # H (num_key_value_heads says the same)
    q_lora_rank: int = 1536  # Q
    kv_lora_rank: int = 512  # R
    qk_nope_head_dim: int = 128  # N
    qk_rope_head_dim: int = 64  # P
    v_head_dim: int = 128  # V
    n_routed_experts: int = 384  # E
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8  # K
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 2.827
    first_k_dense_replace: int = 1  # dense layers before the first MoE layer
    aux_loss_alpha: float = 0.001  # weight of the sequence-wise balance loss
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    max_position_embeddings: int = 262144
    initializer_range: float = 0.02
    yarn: Yarn = Yarn(factor=64.0)  # rope_scaling | rope_parameters; Yarn() is written as null
    media_placeholder_token_id: int = 163605  # top level, like the next three
    bos_token_id: int = 163584
    eos_token_id: int = 163585
    pad_token_id: int = 163839
    vision: VisionConfig = field(default_factory=VisionConfig)  # vision_config
    media: MediaConfig = field(default_factory=MediaConfig)  # preprocessor_config.json: media_proc_cfg
    impl: str = "fused"  # "fused" | "reference": which twins run
    qat: bool = False  # fake-quantise the routed experts to int4 in training

    def __post_init__(self):
        if self.impl not in ("fused", "reference"):
            raise ConfigError(f"impl is {self.impl!r}: choose 'fused' or 'reference'")
        if self.vision.text_hidden_size != self.hidden_size:
            raise ConfigError(f"vision_config.text_hidden_size is {self.vision.text_hidden_size} but hidden_size is "
                              f"{self.hidden_size}: the projector must end at the decoder's width")  # fmt: skip
        if not 0 < self.num_experts_per_tok <= self.n_routed_experts:
            raise ConfigError(f"num_experts_per_tok is {self.num_experts_per_tok} of {self.n_routed_experts} experts: "
                              "choose between 1 and n_routed_experts")  # fmt: skip
        if not 0 <= self.media_placeholder_token_id < self.vocab_size:
            raise ConfigError(f"media_placeholder_token_id {self.media_placeholder_token_id} lies outside the "
                              f"vocabulary of {self.vocab_size}")  # fmt: skip

    @staticmethod
    def preset(name):
        """"toy" (trains in minutes on a laptop), "small" (benches), or "k2.5" (the released config exactly)."""
        if name not in _PRESETS:
            raise ConfigError(f"no preset named {name!r}: choose one of {', '.join(_PRESETS)}")
        return _PRESETS[name]

    @staticmethod
    def from_json(source):
        """Read a released `config.json` (path or dict), with `rope_scaling` or `rope_parameters`.

        Keys that a K2.5 cannot vary must have K2.5's values; keys that describe no arithmetic are ignored.
        Raises ConfigError naming the key.
        """
        data = source if isinstance(source, dict) else _read_json(source)
        text, vision = data.get("text_config"), data.get("vision_config")
        if not isinstance(text, dict) or not isinstance(vision, dict):
            where = "config" if isinstance(source, dict) else source
            raise ConfigError(f"{where} has no text_config or no vision_config: expected the config.json of a Kimi K2.5")
        for where, have, fixed in (("", data, _FIXED_TOP), ("text_config.", text, _FIXED_TEXT)):
            for key, value in fixed.items():
                if have.get(key, value) != value:
                    raise ConfigError(f"{where}{key} is {have[key]!r}: Kimi K2.5 has {value!r} and K25 builds nothing else")
        names = {f.name for f in dataclasses.fields(K25Config)} - {"yarn", "vision", "media", *_TOP_KEYS, *_RUNTIME}
        values = {key: text[key] for key in names if key in text}
        values |= {key: data.get(key, text.get(key)) for key in _TOP_KEYS if key in data or key in text}
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{key} is {value!r}: expected a number")
        if text.get("num_key_value_heads", values.get("num_attention_heads")) != values.get("num_attention_heads"):
            raise ConfigError(f"text_config.num_key_value_heads is {text['num_key_value_heads']}: MLA has as many as "
                              "num_attention_heads")  # fmt: skip
        rope = dict(text.get("rope_scaling") or {}) | dict(text.get("rope_parameters") or {})
        values["rope_theta"] = float(rope.pop("rope_theta", text.get("rope_theta", K25Config.rope_theta)))
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        if kind not in ("yarn", "default"):
            raise ConfigError(f"rope_scaling type is {kind!r}: expected 'yarn' or none")
        known = {f.name for f in dataclasses.fields(Yarn)}
        values["yarn"] = Yarn(**{key: rope[key] for key in known if key in rope}) if kind == "yarn" else Yarn()
        known = {f.name for f in dataclasses.fields(VisionConfig)}
        values["vision"] = VisionConfig(**{key: vision[key] for key in known if key in vision})
        return K25Config(**values)

    def to_json(self):
        """The released spelling, as a dict for `json.dump`; `from_json` of it gives this config (less runtime fields)."""
        top = dict(_FIXED_TOP) | {key: getattr(self, key) for key in _TOP_KEYS}
        skip = {"yarn", "vision", "media", *_TOP_KEYS, *_RUNTIME}
        text = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}
        text |= {"model_type": "kimi_k2", "num_key_value_heads": self.num_attention_heads} | _FIXED_TEXT
        yarn = {"type": "yarn"} | dataclasses.asdict(self.yarn)
        text["rope_scaling"] = yarn if self.yarn.factor > 1 else None
        return top | {"text_config": text, "vision_config": dataclasses.asdict(self.vision)}


def _read_json(path):
    try:
        data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}: expected a JSON object")
    return data


def _byte_vocabulary(vocab_size):
    """The special ids of a vocabulary whose last 256 ids are the released special tokens."""
    base = vocab_size - 256
    return {"vocab_size": vocab_size, "media_placeholder_token_id": base + 21, "bos_token_id": base,
            "eos_token_id": base + 1, "pad_token_id": base + 255}  # fmt: skip


_PRESETS = {
    "toy": K25Config(
        **_byte_vocabulary(512), hidden_size=128, intermediate_size=384, moe_intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=4, q_lora_rank=64, kv_lora_rank=48, qk_nope_head_dim=32,
        qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, num_experts_per_tok=2,
        max_position_embeddings=256, yarn=Yarn(),
        vision=VisionConfig(init_pos_emb_height=16, init_pos_emb_width=16, vt_hidden_size=96, vt_num_attention_heads=4,
                            vt_num_hidden_layers=3, vt_intermediate_size=288, text_hidden_size=128),
    ),
    "small": K25Config(
        **_byte_vocabulary(8192), hidden_size=512, intermediate_size=1536, moe_intermediate_size=192,
        num_hidden_layers=8, num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=64, num_experts_per_tok=8,
        max_position_embeddings=4096, yarn=Yarn(),
        vision=VisionConfig(vt_hidden_size=256, vt_num_attention_heads=4, vt_num_hidden_layers=6,
                            vt_intermediate_size=1024, text_hidden_size=512),
    ),
    "k2.5": K25Config(),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Stats:
    """What one forward pass counted; returned, never kept in buffers, so evaluation and recompute change nothing.

    counts: per MoE layer (E,) int64 tokens sent to each expert; balance_loss: scalar, mean over the MoE layers
    of the sequence-wise loss; max_logits: (layers,H) largest attention logits, or None when not asked for.
    """

    counts: tuple
    balance_loss: torch.Tensor
    max_logits: torch.Tensor | None


class Block(nn.Module):
    """x + MLA(norm x), then + FFN(norm x): one decoder layer under its released names."""

    def __init__(self, config, index):
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if index < config.first_k_dense_replace:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config.hidden_size, config.moe_intermediate_size, config.n_routed_experts,
                           config.num_experts_per_tok, config.n_group, config.topk_group,
                           config.routed_scaling_factor, True, config.n_shared_experts,
                           impl=config.impl, qat=config.qat)  # fmt: skip

    def forward(self, x, table, mask, valid, cache=None, want_max=False):
        """x: (B,T,C) → (x (B,T,C), max logits (H,) | None, RouterStats | None)."""
        asked = valid if want_max else None
        mixed, largest = self.self_attn(self.input_layernorm(x), table, mask, cache, self.index, asked)
        x = x + mixed
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(normed), largest, None
        routed, stats = self.mlp(normed, valid)
        return x + routed, largest, stats


class Decoder(nn.Module):
    """Embedding, layers and final norm: `language_model.model` of the release."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """Decoder and untied head: `language_model` of the release."""

    def __init__(self, config):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class K25(nn.Module):
    """The whole model. State-dict names are the released ones (experts stacked; `save` splits them)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.language_model = LanguageModel(config)
        self.vision_tower = MoonViT3d(config.vision, config.impl)
        self.mm_projector = Projector(config.vision)
        for weight in self.language_model.parameters():
            if weight.ndim > 1:  # matrices, stacked experts and routers; norms stay at 1
                normal_init_(weight, config.initializer_range)

    def encode_media(self, patches, grid_thw):
        """Pictures and clips, packed in one call, to embeddings.

        patches: (L,588) float — flattened patches of all items; grid_thw: (I,3) int64 — frames, rows and columns
        of patches per item. Returns (M,C), M = Σ (h/2)(w/2) whatever t is, items in order.
        """
        return self.mm_projector(self.vision_tower(patches, grid_thw))

    def embed(self, ids, media=None):
        """Token embeddings (B,T,C) with the media embeddings (M,C) in the places of `<|media_pad|>`, in row-major order.

        Raises ValueError, saying both counts, when there are not exactly as many places as embeddings.
        """
        embedded = self.language_model.model.embed_tokens(ids)  # (B,T,C)
        places = ids == self.config.media_placeholder_token_id  # (B,T)
        found, given = int(places.sum()), 0 if media is None else media.shape[0]
        if found != given:
            raise ValueError(f"the prompt has {found} <|media_pad|> tokens but the media give {given} embeddings: "
                             "each item needs (h/2)·(w/2) of them, whatever its number of frames")  # fmt: skip
        if media is None or given == 0:
            return embedded
        return embedded.masked_scatter(places[..., None], media.to(embedded.dtype))

    def hidden(self, x, positions=None, segment_ids=None, cache=None, want_max=False):
        """The decoder from spliced embeddings to its final norm; the head is left to the caller.

        x: (B,T,C) — as from `embed`; want_max: also collect the max logits for QK-Clip; the rest as `forward`.
        Returns (hidden (B,T,C), Stats).
        """
        config, decoder = self.config, self.language_model.model
        fresh = segment_ids is None and (cache is None or cache.length == 0)  # each row is one segment, from its start
        segment_ids, positions = _default_layout(x, segment_ids, positions, cache)
        keys = segment_ids if cache is None else cache.extend(segment_ids, positions)  # (B,S)
        mask, valid = None if fresh else visibility(segment_ids, keys), segment_ids >= 0
        table = rope_table(positions, config.qk_rope_head_dim, config.rope_theta, config.yarn,
                           torch.promote_types(x.dtype, torch.float32))  # fmt: skip
        largest, routers = [], []
        for block in decoder.layers:
            x, top, router = block(x, table, mask, valid, cache, want_max)
            largest.append(top)
            routers += [router] if router else []
        balance = torch.stack([r.balance_loss for r in routers]).mean() if routers else x.new_zeros(())
        stats = Stats(tuple(r.counts for r in routers), balance, torch.stack(largest) if want_max else None)
        return decoder.norm(x), stats

    def forward(self, ids, patches=None, grid_thw=None, positions=None, segment_ids=None, cache=None):
        """Logits of every token.

        ids: (B,T) int64; patches: (L,588) float and grid_thw: (I,3) int64 — media of all rows, or None;
        positions: (B,T) int64 — default: counted within each segment, or continued from the cache;
        segment_ids: (B,T) int64 — tokens see only their own segment, −1 is padding; default: one segment per row;
        cache: LatentCache — T new tokens follow the cached ones. Returns (B,T,U).
        """
        media = None if patches is None else self.encode_media(patches, grid_thw)
        return self.language_model.lm_head(self.hidden(self.embed(ids, media), positions, segment_ids, cache)[0])

    def new_cache(self, batch, capacity):
        """An empty LatentCache for `batch` rows of up to `capacity` tokens, in the model's dtype and place."""
        config, weight = self.config, self.language_model.lm_head.weight
        return LatentCache(config.num_hidden_layers, batch, capacity, config.kv_lora_rank, config.qk_rope_head_dim,
                           weight.dtype, weight.device)  # fmt: skip

    def routers(self):
        """The routers of the MoE layers, in order: where the balancing biases live."""
        return [block.mlp.gate for block in self.language_model.model.layers if isinstance(block.mlp, MoE)]


def _default_layout(x, segment_ids, positions, cache):
    """Segments default to one per row (or to the cached row's last); positions count within each run of a segment."""
    batch, tokens = x.shape[:2]
    started = cache is not None and cache.length > 0
    if segment_ids is None:
        zeros = torch.zeros(batch, 1, dtype=torch.long, device=x.device)
        last = cache.segment_ids[:, cache.length - 1 : cache.length] if started else zeros
        segment_ids = last.expand(batch, tokens)
    if positions is None and started:
        positions = cache.next_position[:, None] + torch.arange(tokens, device=x.device)
    elif positions is None:
        index = torch.arange(tokens, device=x.device).expand(batch, tokens)
        begins = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)  # (B,T)
        positions = index - torch.where(begins, index, 0).cummax(dim=1).values
    return segment_ids, positions


# ----------------------------------------------------------------------------------------------- loss


def cross_entropy_reference(hidden, head, targets, chunk=1024):
    """Per-token −log p(target), 0 where the target is −100, from the full matrix of logits.

    hidden: (T,C); head: (U,C); targets: (T,) int64. Returns (T,) in at least float32. `chunk` is the twin's.
    """
    logits = F.linear(hidden, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (T,U)
    chosen = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]  # (T,)
    return torch.where(targets == -100, 0.0, logits.logsumexp(dim=1) - chosen)


def cross_entropy_fused(hidden, head, targets, chunk=1024):
    """The same, holding only (chunk,U) logits at a time; each chunk is computed again in the backward pass."""

    def part(hidden, targets):
        logits = F.linear(hidden, head)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)

    if hidden.shape[0] <= chunk:
        return part(hidden, targets)
    pieces = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(part, h, t, use_reentrant=False) for h, t in pieces])


# ---------------------------------------------------------------------------------------- checkpoints


def save(model, directory, int4=False, shard_bytes=4 * 2**30):
    """Write the released layout: official names, shards with index, `config.json`, `preprocessor_config.json`.

    int4: write the routed experts as weight_packed / weight_scale / weight_shape. shard_bytes: largest shard.
    Atomic: the directory appears complete or not at all.
    """
    preprocessor = {"media_proc_cfg": dataclasses.asdict(model.config.media)}
    write_checkpoint(directory, model.state_dict(), model.config.to_json(), preprocessor, int4, shard_bytes)


def load(directory, dtype=None, device="cpu", **runtime):
    """Read what `save` wrote, or the release itself, shard by shard: memory stays near one copy of the weights.

    dtype: of the weights (default: as stored; int4 experts then become the attention's dtype); the router bias
    stays float32. runtime: impl, qat. Raises CheckpointError naming the tensor and the file.
    """
    directory = pathlib.Path(directory)
    config = K25Config.from_json(directory / "config.json")
    preprocessor = _read_json(directory / "preprocessor_config.json").get("media_proc_cfg", {})
    known = {f.name for f in dataclasses.fields(MediaConfig)}
    media = MediaConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in preprocessor.items() if k in known})
    with torch.device("meta"):
        model = K25(dataclasses.replace(config, media=media, **runtime))
    return read_checkpoint(directory, model, dtype, device)


# --------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Sizes:
    """The parameter table of a config, counted on the meta device; see `info`."""

    text: int  # language_model
    active: int  # of text, used by one token, without the embedding
    vision: int
    projector: int
    tensors: int  # in the released layout
    tensors_int4: int  # the same with int4 experts; 0 when the widths do not allow it
    cache_bytes: int  # per token, bf16, all layers
    flops: int  # forward, per token, without attention over the context
    flops_context: int  # forward, per token and token of context, naive attention


def sizes(config):
    """Count what a config makes. Returns Sizes."""
    with torch.device("meta"):
        model = K25(config)
    state = model.state_dict()

    def total(prefix):
        return sum(p.numel() for name, p in state.items() if name.startswith(prefix))

    experts = sum(p.numel() for name, p in state.items() if ".mlp.experts." in name)
    idle = experts * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    text = total("language_model.")
    active = text - idle - config.vocab_size * config.hidden_size
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    logit_dims = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    try:
        tensors_int4 = len(released_entries(state, int4=True))
    except CheckpointError:
        tensors_int4 = 0
    return Sizes(text, active, total("vision_tower."), total("mm_projector."), len(released_entries(state)), tensors_int4,
                 2 * layers * (config.kv_lora_rank + config.qk_rope_head_dim), 2 * active, 2 * layers * heads * logit_dims)  # fmt: skip


def info(config):
    """Print the parameter table of a config."""
    s = sizes(config)
    rows = [
        ("parameters, total", f"{s.text + s.vision + s.projector:,}"),
        ("  text tower", f"{s.text:,}"),
        ("  text tower, active per token", f"{s.active:,}  (without the embedding)"),
        ("  vision tower", f"{s.vision:,}"),
        ("  projector", f"{s.projector:,}"),
        ("tensors, released layout", f"{s.tensors:,}"),
        ("tensors, int4 experts", f"{s.tensors_int4:,}" if s.tensors_int4 else "widths are no multiples of 32"),
        ("cache per token, bf16", f"{s.cache_bytes:,} bytes  ({config.kv_lora_rank + config.qk_rope_head_dim} numbers per layer)"),
        ("forward FLOPs per token", f"{s.flops:,}  + {s.flops_context:,} per token of context"),
        ("softmax scale", f"{softmax_scale(config.qk_nope_head_dim, config.qk_rope_head_dim, config.yarn):.6f}"),
    ]
    for name, value in rows:
        print(f"{name:32s} {value}")


def chat(run, prompt, images=(), videos=(), thinking=False, system=None, max_new_tokens=256, temperature=None, seed=0,
         device="cpu", ranks=None):  # fmt: skip
    """Answer one prompt from a run's or checkpoint's model, streaming to the terminal. Returns the parsed Message.

    run: directory — of a run (its `model/`) or of a checkpoint; images, videos: paths, put before the prompt;
    thinking: leave `<think>` open; temperature: default 1.0 thinking, 0.6 instant, 0 is greedy; ranks: tiktoken.model.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    directory = pathlib.Path(run)
    directory = directory / "model" if (directory / "model").is_dir() else directory
    if (directory / "metrics.jsonl").exists():
        raise ConfigError(f"{run} is a run that has not ended: train_small.py --resume goes on; or name the model of a stage in {run}/models")
    model = load(directory, device=device)
    tokenizer = Tokenizer(model.config.vocab_size, ranks)
    parts, media, items = [], [], []
    for path in images:
        item = image_item(load_image(path), model.config.media)
        parts.append({"type": "image"})
        media.append(("image", [(None, merged_tokens(item.grid))]))
        items.append(item)
    for path in videos:
        chunks = video_items(load_video(path), model.config.media)
        parts.append({"type": "video"})
        media.append(("video", [(chunk.timestamp, merged_tokens(chunk.grid)) for chunk in chunks]))
        items += chunks
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": [*parts, {"type": "text", "text": prompt}]})
    ids = render_ids(messages, tokenizer, media, thinking=thinking)
    patches, grid = pack(items) if items else (None, None)
    decoder = StreamDecoder(tokenizer)
    parser = StreamParser(thinking)

    def show(events):
        for event in events:
            if event.kind in ("reasoning", "content"):
                print(event.text, end="", flush=True)

    temperature = (1.0 if thinking else 0.6) if temperature is None else temperature
    generate(model, [ids], patches, grid, max_new_tokens=max_new_tokens, temperature=temperature, top_p=0.95,
             stop_ids=tokenizer.stop_ids, seed=seed,
             on_token=lambda row, token: show(parser.feed(decoder.feed(token))))  # fmt: skip
    show(parser.feed(decoder.close(), final=True))  # what was held back, because a marker or character might have followed
    message = parser.close()
    print()
    for call in message.tool_calls:
        print(f"[calls {call.name} {json.dumps(call.arguments)}]")
    for error in message.errors:
        print(f"[malformed tool call: {error}]", file=sys.stderr)
    return message


def main(arguments=None):
    """`info` and `chat`. Exit code 2 with one line on misuse."""
    cli = argparse.ArgumentParser(prog="k25.py", description=__doc__.split("\n")[0])
    commands = cli.add_subparsers(dest="command", required=True)
    part = commands.add_parser("info", help="parameter table of a config, built on the meta device")
    part.add_argument("--preset", default="k2.5", help="toy, small or k2.5")
    part.add_argument("--config", help="a released config.json instead of a preset")
    part = commands.add_parser("chat", help="answer a prompt, with pictures and videos")
    part.add_argument("prompt")
    part.add_argument("--run", default="runs/toy", help="directory of a run or of a checkpoint")
    part.add_argument("--image", action="append", default=[], metavar="F", help="picture before the prompt; repeatable")
    part.add_argument("--video", action="append", default=[], metavar="F",
                      help="animated GIF/WebP/APNG or folder of frames; repeatable")  # fmt: skip
    part.add_argument("--thinking", action="store_true", help="thinking mode (the toy is trained for instant mode)")
    part.add_argument("--system", help="system prompt")
    part.add_argument("--temperature", type=float, help="default 1.0 thinking, 0.6 instant; 0 is greedy")
    part.add_argument("--max-new-tokens", type=int, default=256)
    part.add_argument("--seed", type=int, default=0)
    part.add_argument("--device", default="cpu")
    part.add_argument("--tokenizer", help="a released tiktoken.model; default: bytes")
    flags = cli.parse_args(arguments)
    try:
        if flags.command == "info":
            info(K25Config.from_json(flags.config) if flags.config else K25Config.preset(flags.preset))
        else:
            chat(flags.run, flags.prompt, flags.image, flags.video, flags.thinking, flags.system, flags.max_new_tokens,
                 flags.temperature, flags.seed, flags.device, flags.tokenizer)  # fmt: skip
    except ValueError as error:  # all of K25's own errors are ValueErrors with one clear line
        print(f"k25.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
