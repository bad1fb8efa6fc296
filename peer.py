"""transformers' Kimi K2.5 (or DeepSeek-V3) beside ours: its config spelled for it, its operations under our tap names.

transformers is no dependency; it is imported when a peer is opened. Its modules are watched by forward hooks, its
attention by a registered attention function that passes on to its default one. Where its layout differs from the
released one — rotary pairs in halves, the patch as a picture — the tap is brought back to the layout of taps.py.

transformers 5.23 ignores the released names of the vision config, so that its config is spelled out by `peer_config`;
and it raises for clips of more than one frame, so that clips go item by item through its tower and projector.

Public names: PeerError, Peer, peer_config, import_transformers.
Letters: B batch, T tokens, C hidden, H heads, N/P nope/rope head dims, R latent rank, L patches, A vision heads,
G vision head dim, M merged media tokens, K chosen experts, U vocabulary.     Tests: pytest tests/test_divergence.py
"""

import importlib
import json
import pathlib
import sys

import torch

from k25 import K25Config
from mla import interleaved_to_half_split

TRACED = "k25_traced"  # the name of the attention function that is registered with transformers


class PeerError(ValueError):
    """A directory that transformers cannot open."""


def peer_config(config):
    """A K25Config as transformers spells it. Raises PeerError where this transformers has no Kimi K2.5."""
    text, vision = config.to_json()["text_config"], config.vision
    transformers = import_transformers()
    if not hasattr(transformers, "Kimi_K25Config"):
        raise PeerError(f"transformers {transformers.__version__} has no Kimi K2.5: install 5.23 or later")
    return transformers.Kimi_K25Config(
        text_config=text,
        vision_config=dict(
            patch_size=vision.patch_size,
            pos_emb_height=vision.init_pos_emb_height,
            pos_emb_width=vision.init_pos_emb_width,
            pos_emb_time=vision.init_pos_emb_time,
            hidden_size=vision.vt_hidden_size,
            num_attention_heads=vision.vt_num_attention_heads,
            num_hidden_layers=vision.vt_num_hidden_layers,
            intermediate_size=vision.vt_intermediate_size,
            merge_kernel_size=vision.merge_kernel_size,
        ),
        projection_hidden_size=vision.mm_hidden_size,
        projection_layer_norm_eps=vision.projector_ln_eps,
        image_token_id=config.media_placeholder_token_id,
        video_token_id=config.vocab_size,  # no token: the released vocabulary has one media token for both
        tie_word_embeddings=False,
    )


def import_transformers():
    """The transformers library. Raises PeerError where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise PeerError(f"transformers cannot be imported ({error}): pip install transformers") from None


class Peer:
    """A model directory opened by transformers.

    directory: in the released layout, or as transformers saved it; dtype: of the weights; device: where it runs.
    `notes` says what had to be done for it. Raises PeerError, in one line, when it cannot be opened.
    """

    def __init__(self, directory, dtype=torch.float32, device="cpu"):
        transformers = import_transformers()
        transformers.utils.logging.disable_progress_bar()
        directory, self.notes = pathlib.Path(directory), []
        self.version = f"transformers {transformers.__version__}"
        try:
            told = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PeerError(f"{directory / 'config.json'} cannot be read: {error}") from None
        if "vt_hidden_size" in told.get("vision_config", {}):
            config = peer_config(K25Config.from_json(told))
            self.notes.append(f"{self.version} ignores the released vt_* names of the vision config: spelled out for it")
        else:
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        kind = "Kimi_K25ForConditionalGeneration" if told.get("vision_config") else "DeepseekV3ForCausalLM"
        try:
            model, report = getattr(transformers, kind).from_pretrained(
                directory, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise PeerError(f"transformers cannot open {directory}: {' '.join(str(error).split())[:300]}") from None
        self.model = model.to(device).eval()
        self.notes += [f"{kind} loads with {len(names)} {what}, such as {sorted(map(str, names))[0]}"
                       for what, names in report.items() if names]  # fmt: skip
        core = self.model.model
        self.text = getattr(core, "language_model", core)
        self.tower, self.projector = getattr(core, "vision_tower", None), getattr(core, "mm_projector", None)

    @torch.no_grad()
    def capture(self, prompt):
        """Run a prompt. Returns {tap: output}, {tap: {argument: weight}} and {tap or beginning of taps: why missing}.

        Where the public path cannot run media, items go one by one; what not every item reaches is missing.
        """
        if prompt.patches is not None and self.tower is None:
            return {}, {}, {"": f"{type(self.model).__name__} has no vision tower"}
        watch, missing = _Watch(self), {}
        try:
            self._run(prompt, watch, missing)
        except Exception as error:  # noqa: BLE001 - their code may fail in any way, and that is what is to be told
            missing[""] = self._cannot(error)
            watch.drop_partial(0 if prompt.grid_thw is None else len(prompt.grid_thw))
        finally:
            watch.end()
        taps = watch.taps()
        if prompt.patches is None or missing:  # then what enters the decoder was not spliced by transformers
            taps.pop("decoder.spliced", None)
        return taps, watch.weights, missing

    def _cannot(self, error):
        return f"{self.version} cannot run this prompt ({' '.join(str(error).split())[:120]})"

    def _run(self, prompt, watch, missing):
        device = self.model.lm_head.weight.device
        ids = prompt.ids.to(device)
        if prompt.patches is None:
            self.model(input_ids=ids, use_cache=False)
            return
        side, grids = self.tower.config.patch_size, prompt.grid_thw.to(device)
        pixels = prompt.patches.to(device, self.model.dtype).unflatten(1, (3, side, side))  # (L,3,p,p)
        try:
            self.model(input_ids=ids, pixel_values=pixels, image_grid_thw=grids, use_cache=False)
        except Exception as error:  # noqa: BLE001
            watch.forget()
            missing["decoder.spliced"] = f"{self._cannot(error)}: item by item instead"
            self._by_items(ids, pixels, grids)

    def _by_items(self, ids, pixels, grids):
        """Each item alone through tower and projector, spliced here, then the decoder."""
        items = zip(pixels.split(grids.prod(dim=1).tolist()), grids)
        media = [self.projector(self.tower(p, grid_thw=grid[None]).pooler_output).squeeze(1) for p, grid in items]
        embedded = self.model.get_input_embeddings()(ids)
        places = (ids == self.model.config.image_token_id)[..., None]
        self.model(inputs_embeds=embedded.masked_scatter(places, torch.cat(media)), use_cache=False)


class _Watch:
    """Hooks on a peer that collect its operations until `end`."""

    def __init__(self, peer):
        self.peer, self.found, self.weights, self.handles = peer, {}, {}, []
        self.plain_attention = peer.model.config._attn_implementation
        self.attention = {}  # attention module → tap
        self._register_attention(importlib.import_module("transformers"))
        self._decoder(peer.text)
        self._after(peer.model.lm_head, "decoder.logits")
        if peer.tower is not None:
            self._vision(peer.tower, peer.projector)

    def end(self):
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.peer.model.set_attn_implementation(self.plain_attention)

    def forget(self):
        """Drop what an interrupted run left."""
        self.found.clear()

    def drop_partial(self, items):
        """Drop what a run that was interrupted between so many media items gave for the first of them only."""
        for name in [n for n, parts in self.found.items() if n.startswith("vision.") and len(parts) < items]:
            del self.found[name]

    def taps(self):
        """{tap: output}; items that ran one after another are put together along their first dimension."""
        found = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in self.found.items()}
        for name in [name for name in found if name.endswith(".v_part")]:  # the last of the three
            block = name.removesuffix(".v_part")
            found[f"{block}.qkv"] = torch.cat([found[f"{block}.{part}_part"] for part in "qkv"], dim=1)  # (L,3D)
        return {name: value for name, value in found.items() if not name.endswith("_part")}

    def _keep(self, name, value):
        self.found.setdefault(name, []).append(value)

    def _after(self, module, name, change=lambda output: output):
        """Keep a module's output, and its weights as those of the operation."""
        self.handles.append(module.register_forward_hook(lambda m, i, output: self._keep(name, change(output))))
        self.weights[name] = _weights(module)

    def _before(self, module, name):
        """Keep a module's input."""
        self.handles.append(module.register_forward_pre_hook(lambda m, inputs: self._keep(name, inputs[0])))

    def _register_attention(self, transformers):
        modeling = sys.modules[type(self.peer.text).__module__]
        functions = modeling.ALL_ATTENTION_FUNCTIONS
        plain = self.plain_attention

        def traced(module, query, key, value, attention_mask, **settings):
            forward = functions[plain] if plain in functions else sys.modules[type(module).__module__].eager_attention_forward
            output = forward(module, query, key, value, attention_mask, **settings)
            self._attention(self.attention[module], query, key, output[0], attention_mask, settings["scaling"])
            return output

        masks = importlib.import_module("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
        transformers.AttentionInterface.register(TRACED, traced)
        transformers.AttentionMaskInterface.register(TRACED, masks[plain])
        self.peer.model.set_attn_implementation(TRACED)

    def _attention(self, name, query, key, output, mask, scaling):
        if name.startswith("vision"):
            half = interleaved_to_half_split(query.shape[-1]).argsort()
            self._keep(f"{name}.query", query[0].transpose(0, 1)[..., half])  # (1,A,L,G) → (L,A,G)
            self._keep(f"{name}.key", key[0].transpose(0, 1)[..., half])
            self._keep(f"{name}.attention", output[0])  # (1,L,A,G) → (L,A,G)
            return
        rope = self.peer.text.config.qk_rope_head_dim
        half = interleaved_to_half_split(rope).argsort()
        self._keep(f"{name}.q_rope", query[..., -rope:].transpose(1, 2)[..., half])  # (B,H,T,P) → (B,T,H,P)
        self._keep(f"{name}.k_rope", key[:, :1, :, -rope:].transpose(1, 2)[..., half])  # (B,T,1,P)
        self._keep(f"{name}.attention", output.flatten(2))  # (B,T,H,V) → (B,T,HV)
        self.found["decoder.softmax_scale"] = [torch.tensor(float(scaling), dtype=torch.float64)]
        if mask is not None:
            mask = mask if mask.dtype == torch.bool else mask == 0
            self.found["decoder.mask"] = [mask.expand(query.shape[0], -1, -1, -1)]  # (B,1,T,S)

    def _decoder(self, text):
        rope, heads = text.config.qk_rope_head_dim, text.config.num_attention_heads
        self._after(text.embed_tokens, "decoder.embedded")
        if self.peer.tower is not None:
            self.handles.append(text.register_forward_pre_hook(
                lambda m, i, named: self._keep("decoder.spliced", named["inputs_embeds"]), with_kwargs=True))  # fmt: skip
        for part, i in (("cos", 0), ("sin", 1)):
            self._after(text.rotary_emb, f"decoder.rope.{part}", lambda table, i=i: table[i][..., : rope // 2])
        for i, layer in enumerate(text.layers):
            name, attention, mlp = f"decoder.layers.{i}", layer.self_attn, layer.mlp
            self.attention[attention] = name
            self._after(layer.input_layernorm, f"{name}.input_norm")
            self._after(attention.q_a_proj, f"{name}.q_a")
            self._after(attention.q_a_layernorm, f"{name}.q_norm")
            self._after(attention.q_b_proj, f"{name}.q_b", lambda y: y.unflatten(-1, (heads, -1)))  # (B,T,H,N+P)
            self._after(attention.kv_a_proj_with_mqa, f"{name}.kv_a")
            self._after(attention.kv_a_layernorm, f"{name}.latent")
            self.weights[f"{name}.attention"] = {"kv_b": attention.kv_b_proj.weight}
            self._after(attention.o_proj, f"{name}.attention_out")
            self._before(layer.post_attention_layernorm, f"{name}.residual")
            self._after(layer.post_attention_layernorm, f"{name}.post_norm")
            if hasattr(mlp, "gate"):
                self._after(mlp.gate, f"{name}.router.index", lambda y: y[2])  # (BT,K)
                self._after(mlp.gate, f"{name}.router.weights", lambda y: y[1])
                self._after(mlp.experts, f"{name}.experts", lambda y: y.flatten(0, -2))  # (BT,C)
                self._after(mlp.shared_experts, f"{name}.shared_experts", lambda y: y.flatten(0, -2))
            self._after(mlp, f"{name}.mlp", lambda y: y.flatten(0, -2))
            self._after(layer, f"{name}.output", lambda y: y[0] if isinstance(y, tuple) else y)
        self._after(text.norm, "decoder.norm")

    def _vision(self, tower, projector):
        embed = tower.patch_embed
        half = interleaved_to_half_split(tower.config.hidden_size // tower.config.num_attention_heads).argsort()

        def interleaved(y):  # q_proj's rows were permuted when they were loaded
            return y.unflatten(-1, (tower.config.num_attention_heads, -1))[..., half].flatten(1)  # (L,A,G) → (L,D)

        def position(module, inputs, named, output):  # the module adds its embedding: give it zeros to add to
            self._keep("vision.position_embedding", module.forward(torch.zeros_like(inputs[0]), *inputs[1:], **named))

        self._after(embed.proj, "vision.patch_embed", lambda y: y.flatten(1))  # (L,D,1,1) → (L,D)
        self.handles.append(embed.pos_emb.register_forward_hook(position, with_kwargs=True))
        self._after(embed, "vision.embedded")
        for i, layer in enumerate(tower.layers):
            name = f"vision.blocks.{i}"
            self.attention[layer.attn] = name
            self._after(layer.norm1, f"{name}.norm0")
            self._after(layer.attn.q_proj, f"{name}.q_part", interleaved)
            self._after(layer.attn.k_proj, f"{name}.k_part", interleaved)
            self._after(layer.attn.v_proj, f"{name}.v_part")
            self._after(layer.attn.proj, f"{name}.attention_out")
            self._before(layer.norm2, f"{name}.residual")
            self._after(layer.norm2, f"{name}.norm1")
            self._after(layer.mlp.fc1, f"{name}.fc0")
            self._after(layer.mlp.act, f"{name}.gelu")
            self._after(layer.mlp.fc2, f"{name}.fc1")
            self._after(layer, f"{name}.output")
        self._after(tower.final_layernorm, "vision.norm")
        self._after(tower, "vision.merged", lambda y: y.pooler_output)  # (M,4,D)
        self._after(projector, "vision.projected", lambda y: y.squeeze(1))  # (M,1,C) → (M,C)


def _weights(module):
    """A module's weights under the argument names of the operation it is; {} for modules of several operations."""
    if hasattr(module, "gate_up_proj"):  # stacked experts
        gate, up = module.gate_up_proj.chunk(2, dim=1)  # (E,2F,C) → 2 × (E,F,C)
        return {"gate": gate, "up": up, "down": module.down_proj}
    if hasattr(module, "gate_proj"):
        return {"gate": module.gate_proj.weight, "up": module.up_proj.weight, "down": module.down_proj.weight}
    named = {"weight": "weight", "bias": "bias", "e_score_correction_bias": "bias"}
    return {argument: getattr(module, name) for name, argument in named.items()
            if isinstance(getattr(module, name, None), torch.Tensor)}  # fmt: skip
