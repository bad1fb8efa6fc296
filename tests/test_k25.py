"""Claims about k25.py: config, whole model, loss and command line.

Numbers after `bug` are those of the public bug list.
Run: .venv/bin/python -m pytest tests/test_k25.py
"""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_mla import numpy_mla
from torch.utils.flop_counter import FlopCounterMode

import k25
from generate import Generation
from k25 import K25, ConfigError, K25Config, cross_entropy_fused, cross_entropy_reference, generate, save, sizes
from mla import Yarn, rope_table
from moe import balance_bias_
from tokenizer import Tokenizer
from vit3d import VisionConfig

IMPLS = pytest.mark.parametrize("impl", ["reference", "fused"])
MEDIA = 277  # <|media_pad|> of a vocabulary of 512
GRIDS = ((1, 2, 4), (3, 2, 2), (1, 4, 4), (2, 4, 2))  # two images and two clips: 2 + 1 + 4 + 2 tokens


def tiny(**changes):
    """A config with every size different, a YaRN that tiny positions feel, group-limited routing and a ViT."""
    vision = VisionConfig(init_pos_emb_height=4, init_pos_emb_width=4, vt_hidden_size=16, vt_num_attention_heads=2,
                          vt_num_hidden_layers=2, vt_intermediate_size=12, text_hidden_size=24)  # fmt: skip
    values = dict(vocab_size=512, hidden_size=24, intermediate_size=20, moe_intermediate_size=9, num_hidden_layers=3,
                  num_attention_heads=3, q_lora_rank=10, kv_lora_rank=7, qk_nope_head_dim=5, qk_rope_head_dim=4,
                  v_head_dim=6, n_routed_experts=6, num_experts_per_tok=2, n_group=3, topk_group=2,
                  initializer_range=0.3, yarn=Yarn(8.0, 64), media_placeholder_token_id=MEDIA, bos_token_id=256,
                  eos_token_id=257, pad_token_id=511, vision=vision)  # fmt: skip
    return K25Config(**values | changes)


def built(seed=0, dtype=torch.float64, **changes):
    """A tiny model whose norms, vision biases and router biases matter."""
    torch.manual_seed(seed)
    model = K25(tiny(**changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.empty_like(weight).uniform_(-0.3, 0.3))
        for router in model.routers():
            router.e_score_correction_bias.normal_(std=0.1)
    return model.to(dtype)


def media(seed=0, grids=GRIDS, dtype=torch.float64):
    """Random packed patches (L,588) and their grids (I,3)."""
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, 588, generator=torch.Generator().manual_seed(seed), dtype=dtype), torch.tensor(grids)


def prompt(seed=0, batch=2, tokens=12, places=9):
    """Random text ids (B,T) with `places` media places scattered over the rows."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, size=(batch, tokens))
    ids.reshape(-1)[rng.choice(batch * tokens, places, replace=False)] = MEDIA
    return torch.from_numpy(ids)


# Config

RELEASED = {
    "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "torch_dtype": "bfloat16",
    "media_placeholder_token_id": 163605, "bos_token_id": 163584, "eos_token_id": 163585, "pad_token_id": 163839,
    "ignore_index": -100, "tie_word_embeddings": False, "use_unified_vision_chunk": True,
    "video_placeholder": "<|kimi_k25_video_placeholder|>",
    "text_config": {
        "model_type": "kimi_k2", "vocab_size": 163840, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.827,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True,
        "num_nextn_predict_layers": 0, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "max_position_embeddings": 262144,
        "hidden_act": "silu", "initializer_range": 0.02, "attention_bias": False, "tie_word_embeddings": False,
        "attention_dropout": 0.0, "use_cache": True,
        "rope_scaling": {"type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
                         "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "vision_config": {
        "patch_size": 14, "init_pos_emb_height": 64, "init_pos_emb_width": 64, "init_pos_emb_time": 4,
        "pos_emb_type": "divided_fixed", "vt_hidden_size": 1152, "vt_num_attention_heads": 16,
        "vt_num_hidden_layers": 27, "vt_intermediate_size": 4304, "merge_kernel_size": [2, 2],
        "merge_type": "sd2_tpool", "video_attn_type": "spatial_temporal", "mm_projector_type": "patchmerger",
        "mm_hidden_size": 1152, "text_hidden_size": 7168, "projector_hidden_act": "gelu", "projector_ln_eps": 1e-5,
    },
}  # fmt: skip


def changed(where, **values):
    """RELEASED with some keys of one of its parts ("" is the top) replaced; None removes."""
    config = copy.deepcopy(RELEASED)
    part = config[where] if where else config
    part |= values
    for key in [key for key, value in values.items() if value is None]:
        del part[key]
    return config


def test_preset_k25_is_the_released_config(tmp_path):
    assert K25Config.from_json(RELEASED) == K25Config.preset("k2.5") == K25Config()
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    assert K25Config.from_json(tmp_path / "config.json") == K25Config()
    assert K25Config.from_json(changed("text_config", model_type="deepseek_v3")) == K25Config()


def test_to_json_writes_the_released_spelling():
    written = json.loads(json.dumps(K25Config().to_json()))
    for part, expected in ((written["text_config"], RELEASED["text_config"]),
                           (written["vision_config"], RELEASED["vision_config"]), (written, RELEASED)):  # fmt: skip
        extras = {"text_config", "vision_config", "torch_dtype", "attention_dropout", "use_cache"}
        assert {k: v for k, v in part.items() if k not in extras} == {
            k: v for k, v in expected.items() if k not in extras
        }


@pytest.mark.parametrize("name", ["toy", "small", "k2.5"])
def test_from_json_undoes_to_json(name):
    config = K25Config.preset(name)
    assert K25Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_from_json_undoes_to_json_of_any_sizes_but_runtime_settings():
    config = tiny(impl="reference", qat=True)
    written = config.to_json()
    assert K25Config.from_json(json.loads(json.dumps(written))) == dataclasses.replace(config, impl="fused", qat=False)
    assert not {"impl", "qat"} & (written.keys() | written["text_config"].keys())


def test_preset_small_is_the_published_table():
    small = K25Config.preset("small")
    expected = dict(hidden_size=512, num_hidden_layers=8, first_k_dense_replace=1, num_attention_heads=8, q_lora_rank=256,
                    kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=1536,
                    n_routed_experts=64, moe_intermediate_size=192, num_experts_per_tok=8, n_shared_experts=1,
                    vocab_size=8192)  # fmt: skip
    assert {key: getattr(small, key) for key in expected} == expected
    vision = small.vision
    assert (vision.vt_hidden_size, vision.vt_num_hidden_layers, vision.vt_num_attention_heads) == (256, 6, 4)
    assert vision.vt_intermediate_size == 1024


@pytest.mark.parametrize("name", ["toy", "small", "k2.5"])
def test_presets_agree_with_the_tokenizer_of_their_vocabulary(name):
    config = K25Config.preset(name)
    tokenizer = Tokenizer(config.vocab_size)
    ids = (config.media_placeholder_token_id, config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert ids == (tokenizer.media_pad, tokenizer.bos, tokenizer.eos, tokenizer.pad)


def test_bug7_rope_scaling_and_rope_parameters_build_the_same_config():
    text = RELEASED["text_config"]
    scaling = {key: value for key, value in text["rope_scaling"].items() if key != "type"}
    for spelling in ({"rope_type": "yarn"}, {"type": "yarn"}, {"rope_type": "yarn", "type": "yarn"}):
        parameters = scaling | spelling | {"rope_theta": 50000.0}
        new = changed("text_config", rope_scaling=None, rope_theta=None, rope_parameters=parameters)
        assert K25Config.from_json(new) == K25Config()
    plain = changed("text_config", rope_scaling=None, rope_theta=None,
                    rope_parameters={"rope_type": "default", "rope_theta": 777.0})  # fmt: skip
    assert K25Config.from_json(plain) == dataclasses.replace(K25Config(), rope_theta=777.0, yarn=Yarn())
    assert K25Config.from_json(changed("text_config", rope_scaling=None)).yarn == Yarn()
    assert K25Config.preset("toy").to_json()["text_config"]["rope_scaling"] is None


def test_special_ids_may_stand_in_the_text_config():
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    moved = changed("", **dict.fromkeys(ids))
    moved["text_config"] |= ids
    assert K25Config.from_json(moved) == dataclasses.replace(K25Config(), **ids)


@pytest.mark.parametrize("where, key, value", [
    ("", "architectures", ["LlamaForCausalLM"]), ("", "model_type", "kimi_vl"), ("", "tie_word_embeddings", True),
    ("", "ignore_index", 0), ("text_config", "hidden_act", "gelu"), ("text_config", "topk_method", "greedy"),
    ("text_config", "scoring_func", "softmax"), ("text_config", "norm_topk_prob", False),
    ("text_config", "moe_layer_freq", 2), ("text_config", "num_nextn_predict_layers", 1),
    ("text_config", "attention_bias", True), ("text_config", "tie_word_embeddings", True),
    ("text_config", "q_lora_rank", None), ("text_config", "hidden_size", "7168"), ("text_config", "n_group", True),
    ("text_config", "rope_scaling", {"type": "linear", "factor": 2.0}), ("vision_config", "merge_type", "max"),
    ("vision_config", "text_hidden_size", 4096), ("vision_config", "pos_emb_type", "learned"),
    ("text_config", "num_experts_per_tok", 385), ("text_config", "num_experts_per_tok", 0),
    ("", "media_placeholder_token_id", 163840),
])  # fmt: skip
def test_a_config_of_another_model_is_refused_by_the_name_of_the_key(where, key, value):
    config = copy.deepcopy(RELEASED)
    (config[where] if where else config)[key] = value
    with pytest.raises(ValueError, match=key) as error:
        K25Config.from_json(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("{", "cannot read"), ("[]", "expected a JSON object"), ("{}", "no text_config"), (None, "cannot read"),
    ('{"text_config": 3, "vision_config": {}}', "no text_config"),
])  # fmt: skip
def test_a_file_that_is_no_config_is_one_line(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        K25Config.from_json(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_chatting_with_a_run_that_has_not_ended_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0}')
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has not ended: train_small.py --resume goes on; or name the model of a stage"):
        k25.chat(tmp_path, "hi")


def test_an_unknown_preset_or_impl_lists_the_known_ones():
    with pytest.raises(ConfigError, match="no preset named 'k3': choose one of toy, small, k2.5"):
        K25Config.preset("k3")
    with pytest.raises(ConfigError, match="impl is 'fast': choose 'fused' or 'reference'"):
        tiny(impl="fast")


# The decoder in NumPy, float64, written from the formulas; attention from test_mla


def numpy_decoder(weights, config, x, segments, positions):
    """Spliced embeddings (B,T,C) to logits (B,T,U); weights: {state-dict name: array}."""

    def norm(a, name):
        return a / np.sqrt((a * a).mean(-1, keepdims=True) + config.rms_norm_eps) * weights[name]

    def silu(a):
        return a / (1 + np.exp(-a))

    def mlp(a, gate, up, down):
        return (silu(a @ gate.T) * (a @ up.T)) @ down.T

    def moe(token, at):
        """One token: the K best biased scores within the best groups, weighted by the unbiased ones."""
        scores = 1 / (1 + np.exp(-weights[at + "gate.weight"] @ token))
        groups = (scores + weights[at + "gate.e_score_correction_bias"]).reshape(config.n_group, -1)
        best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1))[: config.topk_group]
        allowed = np.full(groups.shape, -np.inf)
        allowed[best] = groups[best]
        chosen = np.argsort(-allowed.ravel())[: config.num_experts_per_tok]
        out = mlp(token, *(weights[f"{at}shared_experts.{m}_proj.weight"] for m in ("gate", "up", "down")))
        for e in chosen:
            share = config.routed_scaling_factor * scores[e] / scores[chosen].sum()
            out = out + share * mlp(token, *(weights[f"{at}experts.{m}_proj"][e] for m in ("gate", "up", "down")))
        return out

    for layer in range(config.num_hidden_layers):
        at = f"language_model.model.layers.{layer}."
        own = {name.removeprefix(at + "self_attn."): w for name, w in weights.items() if name.startswith(at + "self_attn.")}
        x = x + numpy_mla(own, config, norm(x, at + "input_layernorm.weight"), segments, positions)
        normed = norm(x, at + "post_attention_layernorm.weight")
        if layer < config.first_k_dense_replace:
            x = x + mlp(normed, *(weights[f"{at}mlp.{m}_proj.weight"] for m in ("gate", "up", "down")))
        else:
            x = x + np.stack([moe(token, at + "mlp.") for row in normed for token in row]).reshape(x.shape)
    return norm(x, "language_model.model.norm.weight") @ weights["language_model.lm_head.weight"].T


@IMPLS
@settings(max_examples=8)
@given(st.integers(0, 2**31), st.sampled_from([1, 4, 9]), st.sampled_from([(3, 2), (1, 1)]))
def test_the_decoder_follows_the_formulas_in_numpy(impl, seed, tokens, groups):
    model = built(seed, impl=impl, n_group=groups[0], topk_group=groups[1], num_experts_per_tok=3)
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, 256, size=(2, tokens)))
    segments = np.sort(rng.integers(0, 3, size=(2, tokens)), axis=1)
    positions = rng.integers(0, 300, size=(2, tokens))
    actual = model(ids, positions=torch.from_numpy(positions), segment_ids=torch.from_numpy(segments))
    weights = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    embedded = weights["language_model.model.embed_tokens.weight"][ids.numpy()]
    assert_close(actual, numpy_decoder(weights, model.config, embedded, segments, positions), 1e-10)


# Twins of the whole model


def outcome(model, ids, segments, patches, grids, direction):
    """Logits, counts and the gradients of every parameter and of the pixels."""
    patches = patches.clone().requires_grad_()
    x = model.embed(ids, model.encode_media(patches, grids))
    hidden, stats = model.hidden(x, segment_ids=segments, want_max=True)
    logits = model.language_model.lm_head(hidden)
    (logits * direction).sum().add(stats.balance_loss).backward()
    return logits, stats, {"pixels": patches.grad} | {name: p.grad for name, p in model.named_parameters()}


@settings(max_examples=6)
@given(st.integers(0, 2**31), st.sampled_from([(1, 9), (2, 12)]), st.booleans())
def test_twins_agree_in_logits_counts_and_all_gradients(seed, shape, packed):
    ids, (patches, grids) = prompt(seed, *shape), media(seed)
    segments = torch.tensor([0] * 4 + [1] * 3 + [-1] * (shape[1] - 7)).expand(shape) if packed else None
    direction = torch.randn(*shape, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = outcome(built(seed, impl="reference"), ids, segments, patches, grids, direction)
    logits, stats, grads = outcome(built(seed, impl="fused"), ids, segments, patches, grids, direction)
    assert_close(logits, expected[0], 1e-11, "logits")
    assert [c.tolist() for c in stats.counts] == [c.tolist() for c in expected[1].counts]
    assert sum(stats.counts[0].tolist()) == 2 * (7 * shape[0] if packed else ids.numel())
    assert_close(stats.balance_loss, expected[1].balance_loss, 1e-12)
    assert_close(stats.max_logits, expected[1].max_logits, 1e-11)
    for name, grad in grads.items():
        assert_close(grad, expected[2][name], 1e-9, f"gradient of {name}")


@IMPLS
def test_impl_chooses_the_twin_of_every_part(impl):
    model = built(impl=impl)
    moe = model.language_model.model.layers[1].mlp
    twins = (model.vision_tower.attention, model.vision_tower.pool_merge, moe.gate.route, moe.experts.run, moe.balance_loss)
    assert all(twin.__name__.endswith(f"_{impl}") for twin in twins)
    assert all(block.self_attn.config.impl == impl for block in model.language_model.model.layers)


def test_bug37_every_weight_and_every_pixel_gets_a_gradient_from_the_text_loss():
    model, ids, (patches, grids) = built(), prompt(), media()
    grads = outcome(model, ids, None, patches, grids, torch.randn(2, 12, 512, dtype=torch.float64))[2]
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []
    assert grads["pixels"].any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twins_agree_in_lower_precision(dtype):
    """Compared on one expert choice for all: rounding may otherwise choose another expert."""
    logits = [built(dtype=dtype, impl=impl, num_experts_per_tok=6, n_group=1, topk_group=1)(prompt(), *media())
              for impl in ("reference", "fused")]  # fmt: skip
    assert logits[0].dtype == dtype
    assert_close(logits[1], logits[0], {torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype])


# State


@IMPLS
def test_bug15_no_forward_pass_changes_any_buffer(impl):
    model = built(impl=impl)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        model(prompt(), *media())
        model.hidden(model.embed(prompt(places=0)), want_max=True)[0].sum().backward()
        generate(model, [[1, 2]], max_new_tokens=2)
    after = model.state_dict()
    assert before.keys() == after.keys() and dict(model.named_buffers()).keys() <= before.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_bug17_counts_come_from_moe_layers_only_in_order():
    model = built(first_k_dense_replace=2, num_hidden_layers=4)
    stats = model.hidden(model.embed(prompt(places=0)))[1]
    assert len(stats.counts) == len(model.routers()) == 2 and stats.max_logits is None
    for router, counts in zip(model.routers(), stats.counts):
        balance_bias_(router.e_score_correction_bias, counts, 1e-3)
    dense = built(first_k_dense_replace=3)
    stats = dense.hidden(dense.embed(prompt(places=0)), want_max=True)[1]
    assert stats.counts == () and stats.balance_loss == 0 and stats.max_logits.shape == (3, 3)


def test_the_balance_loss_is_the_mean_over_the_moe_layers():
    model, losses = built(), []
    for block in model.language_model.model.layers[1:]:
        block.mlp.register_forward_hook(lambda _, inputs, output: losses.append(output[1].balance_loss))
    stats = model.hidden(model.embed(prompt(places=0)))[1]
    assert len(losses) == 2 and losses[0] != losses[1]
    assert_close(stats.balance_loss, (losses[0] + losses[1]) / 2, 1e-12)


def test_bug6_a_bfloat16_model_rotates_by_float32_tables():
    model, seen = built(dtype=torch.bfloat16), []
    for block in model.language_model.model.layers:
        block.self_attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model(prompt(places=0))
    positions = torch.arange(12).expand(2, -1)
    for table in seen:
        for actual, expected in zip(table, rope_table(positions, 4, 50000.0, model.config.yarn)):
            assert actual.dtype == torch.float32 and torch.equal(actual, expected)
    assert len(seen) == 3 and not any("rope" in name or "inv_freq" in name for name in model.state_dict())


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_bug23_every_matrix_starts_at_initializer_range(std):
    """Within five standard errors; the same in bfloat16 as in float32, because samples are drawn in float32."""
    config = dataclasses.replace(K25Config.preset("toy"), initializer_range=std)
    default = torch.get_default_dtype()
    models = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            models.append(K25(config))
        finally:
            torch.set_default_dtype(default)
    for (name, weight), rounded in zip(*(model.language_model.named_parameters() for model in models)):
        if weight.ndim == 1:
            assert (weight == 1).all(), name
            continue
        assert abs(weight.std() / std - 1) < 5 / math.sqrt(2 * weight.numel()), name
        assert abs(weight.mean()) < 5 * std / math.sqrt(weight.numel()), name
        assert rounded[1].dtype == torch.bfloat16
        assert abs(rounded[1].float().std() / weight.std() - 1) < 0.01, name
        assert torch.equal(rounded[1], weight.bfloat16()), name
    assert all((router.e_score_correction_bias == 0).all() for router in models[0].routers())


def test_one_seed_builds_one_model():
    assert all(torch.equal(a, b) for a, b in zip(built(3).parameters(), built(3).parameters()))
    assert not torch.equal(built(3).mm_projector.proj[0].weight, built(4).mm_projector.proj[0].weight)


# Media in the prompt


def test_media_take_the_places_in_order():
    """Row-major over the batch; the other tokens keep their own embeddings."""
    model, ids = built(), prompt()
    embeddings = torch.randn(9, 24, dtype=torch.float64)
    spliced = model.embed(ids, embeddings)
    places = (ids == MEDIA).flatten().nonzero()[:, 0].tolist()
    own = model.language_model.model.embed_tokens(ids).flatten(0, 1)
    for at, vector in enumerate(spliced.flatten(0, 1)):
        assert torch.equal(vector, embeddings[places.index(at)] if at in places else own[at])


@IMPLS
@given(order=st.permutations(range(4)))
@settings(max_examples=6)
def test_bug35_items_permute_with_their_places(impl, order):
    """Mixed images and clips in one packed call: any order of items gives the same embeddings, item by item."""
    model, (patches, grids) = built(impl=impl), media()
    pieces = patches.split([t * h * w for t, h, w in GRIDS])
    alone = [model.encode_media(piece, grids[i : i + 1]) for i, piece in enumerate(pieces)]
    packed = model.encode_media(torch.cat([pieces[i] for i in order]), grids[list(order)])
    assert_close(packed, torch.cat([alone[i] for i in order]), 1e-12)
    assert [len(a) for a in alone] == [2, 1, 4, 2]


@IMPLS
def test_bug35_one_packed_call_equals_one_call_per_item_in_the_logits(impl):
    model, (patches, grids) = built(impl=impl), media()
    ids = torch.tensor([[65, *[MEDIA] * 2, 66, *[MEDIA] * 1, 67], [*[MEDIA] * 4, *[MEDIA] * 2]])
    together = model(ids, patches, grids)
    for row, (first, last) in enumerate(((0, 2), (2, 4))):
        lengths = [t * h * w for t, h, w in GRIDS]
        part = slice(sum(lengths[:first]), sum(lengths[:last]))
        assert_close(model(ids[row : row + 1], patches[part], grids[first:last]), together[row : row + 1], 1e-11)


@pytest.mark.parametrize("places, given_media, numbers", [(8, True, (8, 9)), (10, True, (10, 9)), (3, False, (3, 0))])
def test_bug34_a_count_mismatch_says_both_counts(places, given_media, numbers):
    model, pictures = built(), media() if given_media else (None, None)
    with pytest.raises(ValueError, match=f"has {numbers[0]} .*media_pad.* give {numbers[1]} embeddings") as error:
        model(prompt(places=places), *pictures)
    assert "\n" not in str(error.value)


def test_bug34_a_clip_takes_as_many_places_as_one_of_its_frames():
    model = built()
    for t in (1, 2, 3, 4):
        assert model.encode_media(*media(grids=((t, 4, 6),))).shape == (6, 24)


def test_no_media_in_a_packed_call_changes_nothing():
    model, ids = built(), prompt(places=0)
    nothing = torch.zeros(0, 588), torch.zeros(0, 3, dtype=torch.long)
    assert torch.equal(model(ids, *nothing), model(ids))


@IMPLS
def test_bug38_pixels_reach_later_tokens_of_their_row_and_no_earlier_ones(impl):
    model, (patches, grids) = built(impl=impl), media(grids=GRIDS[:2])
    ids = torch.tensor([[65, MEDIA, MEDIA, 66, 67, 68], [69, 70, 71, MEDIA, 72, 73]])
    before = model(ids, patches, grids)
    second = patches.clone()
    second[8:] += 1.0  # the clip in row 1
    after = model(ids, second, grids)
    assert_close(after[0], before[0], 1e-12)
    assert_close(after[1, :3], before[1, :3], 1e-12)
    assert ((after - before)[1, 3:].abs().amax(dim=1) > 1e-4).all()


@IMPLS
def test_bug38_prefix_logits_do_not_depend_on_what_follows(impl):
    model, (patches, grids) = built(impl=impl), media(grids=GRIDS[:2])
    ids = torch.tensor([[65, MEDIA, MEDIA, 66, MEDIA, 68, 69, 70]])
    full = model(ids, patches, grids)
    for length in (5, 6, 7):
        assert_close(model(ids[:, :length], patches, grids), full[:, :length], 1e-12)
    other = ids.clone()
    other[0, 6:] = torch.tensor([1, 2])
    assert_close(model(other, patches, grids)[:, :6], full[:, :6], 1e-12)
    assert (model(other, patches, grids)[:, 6:] - full[:, 6:]).abs().max() > 1e-3


# Positions, segments and the cache


@IMPLS
def test_packed_segments_equal_the_same_texts_alone(impl):
    """Positions restart with each segment by default, and padding changes nothing."""
    model = built(impl=impl)
    ids, segments = prompt(3, 1, 11, 0), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 5, -1, -1, -1]])
    packed = model(ids, segment_ids=segments)
    for segment in (0, 1, 5):
        mine = segments[0] == segment
        assert_close(packed[:, mine], model(ids[:, mine]), 1e-11, f"segment {segment}")
    assert packed.isfinite().all()


def positions_of(model, *arguments, **keywords):
    """The positions that the first attention block rotates by, told from its table."""
    tables = []
    block = model.language_model.model.layers[0].self_attn
    hook = block.register_forward_pre_hook(lambda _, inputs: tables.append(inputs[1]))
    model(*arguments, **keywords)
    hook.remove()
    return torch.atan2(tables[0][1], tables[0][0])[..., 0].round().long()  # pair 0 turns by 1 rad per token


def test_positions_count_within_each_segment_and_go_on_from_the_cache():
    model, ids = built(), prompt(places=0)[:, :3]
    assert positions_of(model, ids).tolist() == [[0, 1, 2]] * 2
    segments = torch.tensor([[0, 0, 1], [-1, 4, 4]])
    assert positions_of(model, ids, segment_ids=segments).tolist() == [[0, 1, 0], [0, 0, 1]]
    cache = model.new_cache(2, 9)
    model(ids, segment_ids=segments, cache=cache)
    assert positions_of(model, ids[:, :2], cache=cache).tolist() == [[1, 2], [2, 3]]
    assert positions_of(model, ids[:, :1], positions=torch.tensor([[3], [1]])).tolist() == [[3], [1]]


@IMPLS
def test_decoding_goes_on_in_the_last_segment_of_each_row(impl):
    """A cached row of packed texts: the next token belongs to the last one, whatever its number."""
    model, ids = built(impl=impl), prompt(3, 1, 8, 0)
    segments, cache = torch.tensor([[0, 0, 0, 3, 3]]), model.new_cache(1, 9)
    model(ids[:, :5], segment_ids=segments, cache=cache)
    steps = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in (5, 6, 7)], dim=1)
    assert_close(steps, model(ids[:, 3:])[:, 2:], 1e-11)


@IMPLS
@settings(max_examples=8)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=12, max_size=12))
def test_bug9_any_chunks_with_images_equal_the_full_pass(impl, seed, lengths):
    """Prefill, decode token by token and everything between; images and clips may be cut anywhere."""
    model, ids, (patches, grids) = built(seed, impl=impl), prompt(seed), media(seed)
    with torch.no_grad():
        embedded = model.embed(ids, model.encode_media(patches, grids))
        expected, cache, pieces = model(ids, patches, grids), model.new_cache(2, 12), []
        for piece in cut(embedded, lengths):
            hidden = model.hidden(piece, cache=cache)[0]
            pieces.append(model.language_model.lm_head(hidden))
    assert_close(torch.cat(pieces, dim=1), expected, 1e-11)


def cut(x, lengths):
    """Consecutive pieces of x along its tokens, of these lengths as far as they reach."""
    ends = [min(end, x.shape[1]) for end in np.cumsum(lengths)]
    return [x[:, a:b] for a, b in zip([0, *ends], ends) if a < b]


@IMPLS
def test_bug9_prefill_with_pictures_then_decode_through_forward(impl):
    model, (patches, grids) = built(impl=impl), media(grids=GRIDS[:2])
    ids = torch.tensor([[65, MEDIA, MEDIA, 66, MEDIA, 68, 69, 70]])
    full, cache = model(ids, patches, grids), model.new_cache(1, 100)
    steps = [model(ids[:, :5], patches, grids, cache=cache)]
    steps += [model(ids[:, t : t + 1], cache=cache) for t in (5, 6, 7)]
    assert_close(torch.cat(steps, dim=1), full, 1e-11)


@IMPLS
def test_bug9_left_padded_rows_decode_like_the_same_rows_alone(impl):
    model = built(impl=impl)
    long, short = prompt(5, 1, 8, 0), prompt(6, 1, 5, 0)
    ids = torch.cat((long, F.pad(short, (3, 0), value=511)))
    segments = torch.tensor([[0] * 8, [-1] * 3 + [0] * 5])
    cache = model.new_cache(2, 10)
    model(ids[:, :6], segment_ids=segments[:, :6], cache=cache)
    last = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in (6, 7)], dim=1)
    assert_close(last[0], model(long)[0, 6:], 1e-11)
    assert_close(last[1], model(short)[0, 3:], 1e-11)


@IMPLS
def test_bug4_logits_do_not_depend_on_the_capacity_of_the_cache(impl):
    """Bitwise, also where a stack would take capacity 4096 for "no YaRN needed"."""
    model, ids, outputs = built(impl=impl, yarn=Yarn(64.0)), prompt(places=0), []
    for capacity in (12, 4095, 4096, 4097):
        cache = model.new_cache(2, capacity)
        outputs.append(torch.cat([model(part, cache=cache) for part in ids.split([7, 1, 4], dim=1)], dim=1))
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])
    assert_close(outputs[0], model(ids), 1e-11)


# Loss

ENTROPIES = pytest.mark.parametrize("cross_entropy", [cross_entropy_reference, cross_entropy_fused])


@ENTROPIES
@pytest.mark.parametrize("chunk", [1, 2, 1024])
def test_cross_entropy_of_a_hand_worked_row(cross_entropy, chunk):
    """Logits (0, ln 3): probabilities 1/4 and 3/4."""
    hidden = torch.tensor([[1.0], [1.0], [1.0], [0.0]], dtype=torch.float64)
    head = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    losses = cross_entropy(hidden, head, torch.tensor([0, 1, -100, 1]), chunk)
    assert_close(losses, np.array([math.log(4), math.log(4 / 3), 0.0, math.log(2)]), 1e-12)


@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 5), st.integers(2, 7), st.integers(1, 4),
       st.sampled_from([0.0, 0.4, 1.0]))  # fmt: skip
def test_cross_entropy_twins_agree_forward_and_backward(seed, T, C, U, chunk, ignored):
    """Every chunk boundary, no tokens at all, some and all targets −100."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head = (torch.randn(n, C, generator=generator, dtype=torch.float64) for n in (T, U))
    targets = torch.randint(0, U, (T,), generator=generator)
    targets[torch.rand(T, generator=generator) < ignored] = -100
    direction, results = torch.randn(T, generator=generator, dtype=torch.float64), []
    for cross_entropy in (cross_entropy_reference, cross_entropy_fused):
        leaves = [x.clone().requires_grad_() for x in (hidden, head)]
        losses = cross_entropy(*leaves, targets, chunk)
        results.append((losses, *torch.autograd.grad((losses * direction).sum(), leaves)))
    for what, actual, expected in zip(("loss", "hidden", "head"), results[1], results[0]):
        assert_close(actual, expected, 1e-12, what)
    logits = hidden.numpy() @ head.numpy().T
    wanted = [0.0 if t == -100 else np.log(np.exp(row).sum()) - row[t] for row, t in zip(logits, targets.tolist())]
    assert_close(results[0][0], np.array(wanted), 1e-12)


@ENTROPIES
def test_cross_entropy_of_bfloat16_is_summed_in_float32(cross_entropy):
    hidden, head, targets = torch.randn(5, 8).bfloat16(), torch.randn(300, 8).bfloat16(), torch.arange(5)
    losses = cross_entropy(hidden, head, targets, 2)
    assert losses.dtype == torch.float32
    assert_close(losses, F.cross_entropy(F.linear(hidden, head).double(), targets, reduction="none"), 1e-5)


def test_cross_entropy_fused_never_holds_more_than_a_chunk_of_logits(monkeypatch):
    held, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: held.append(len(x)) or linear(x, weight))
    hidden = torch.randn(10, 3, requires_grad=True)
    cross_entropy_fused(hidden, torch.randn(7, 3), torch.zeros(10).long(), 4).sum().backward()
    assert held == [4, 4, 2] + [2, 4, 4]  # forward, then each again in the backward pass


# Counting


def test_sizes_are_counts_of_the_real_thing():
    """Total and active parameters by hand for a tiny config: experts 3·9·24, of six two run; norms included."""
    config = tiny()
    s, model = sizes(config), K25(config)
    parts = [sum(p.numel() for p in part.parameters()) for part in (model.language_model, model.vision_tower,
                                                                    model.mm_projector)]  # fmt: skip
    routers = sum(r.e_score_correction_bias.numel() for r in model.routers())
    assert [s.text, s.vision, s.projector] == [parts[0] + routers, *parts[1:]]
    assert s.active == s.text - 2 * 4 * (3 * 9 * 24) - 512 * 24
    assert s.cache_bytes == 2 * 3 * (7 + 4)
    assert s.tensors_int4 == 0  # widths 24 and 9 are no multiples of 32
    assert s.tensors == len(model.state_dict()) + 2 * (6 * 3 - 3)


def test_flops_of_info_are_those_of_a_forward_pass():
    """Counted by torch over one token; the norms' few numbers are parameters without a matrix product."""
    config = dataclasses.replace(K25Config.preset("toy"), impl="reference")
    model, s = K25(config), sizes(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.tensor([[65]]))
    assert abs(counter.get_total_flops() / (s.flops + s.flops_context) - 1) < 0.01


# Command line


def test_info_prints_the_released_numbers(capsys):
    k25.main(["info", "--preset", "k2.5"])
    printed = capsys.readouterr().out
    for number in ("1,026,408,232,448", "208,550", "70,272 bytes", "(576 numbers per layer)", "0.144680"):
        assert number in printed, number
    rows = {line[:32].strip(): line[32:].split()[0].replace(",", "") for line in printed.splitlines()}
    assert round(int(rows["vision tower"]) / 1e6, 1) == 416.9
    assert round(int(rows["projector"]) / 1e6, 1) == 54.3
    assert round(int(rows["text tower, active per token"]) / 1e9, 1) == 31.7
    total = sum(int(rows[name]) for name in ("text tower", "vision tower", "projector"))
    assert int(rows["parameters, total"]) == total


def test_info_of_a_config_file(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_json()))
    k25.main(["info", "--config", str(tmp_path / "config.json")])
    printed = capsys.readouterr().out
    assert f"{sizes(tiny()).text:,}" in printed and "widths are no multiples of 32" in printed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A random tiny model saved as a run, with a picture and an animation beside it."""
    folder = tmp_path_factory.mktemp("run")
    save(built(dtype=torch.float32), folder / "model")
    picture = Image.effect_noise((60, 30), 80).convert("RGB")
    picture.save(folder / "a.png")
    frames = [picture.rotate(20 * i) for i in range(5)]
    frames[0].save(folder / "b.gif", save_all=True, append_images=frames[1:], duration=500)
    return folder


@pytest.fixture
def spied(monkeypatch):
    """The arguments of every `generate` that chat makes."""
    calls = []

    def spy(*arguments, **settings):
        calls.append((arguments, settings))
        return generate(*arguments, **settings)

    monkeypatch.setattr(k25, "generate", spy)
    return calls


def chat(run, *flags):
    k25.main(["chat", "--run", str(run), "--max-new-tokens", "3", *map(str, flags)])


def test_chat_with_a_picture_and_an_animation(run, spied, capsys):
    """60×30 pixels are 6×4 patches, 6 tokens; five frames at 2 fps are chunks of 4 and 1 frames."""
    chat(run, "--image", run / "a.png", "--video", run / "b.gif", "what is it?")
    first = capsys.readouterr().out
    (model, prompts, patches, grids), settings = spied[0]
    assert grids.tolist() == [[1, 4, 6], [4, 4, 6], [1, 4, 6]] and patches.shape == (6 * 24, 588)
    text = Tokenizer().decode(prompts[0])
    pads = "<|media_pad|>" * 6
    assert text == (
        f"<|im_user|>user<|im_middle|><|media_begin|>image<|media_content|>{pads}<|media_end|>\n"
        f"00:00:00.000<|media_begin|>video<|media_content|>{pads}<|media_end|>"
        f"00:00:02.000<|media_begin|>video<|media_content|>{pads}<|media_end|>"
        "what is it?<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>"
    )
    assert settings["temperature"] == 0.6 and settings["top_p"] == 0.95 and settings["stop_ids"] == (258, 257)
    chat(run, "--image", run / "a.png", "--video", run / "b.gif", "what is it?")
    assert capsys.readouterr().out == first  # one seed, one answer


def test_chat_modes_and_flags(run, spied, capsys):
    chat(run / "model", "--thinking", "--system", "be brief", "--seed", 3, "hello <|im_end|>")
    chat(run, "--temperature", 0, "hello")
    (thinking, settings), (_, greedy) = spied
    assert settings["temperature"] == 1.0 and settings["seed"] == 3 and greedy["temperature"] == 0
    assert thinking[2:] == (None, None)
    ids = thinking[1][0]
    assert Tokenizer().decode(ids).startswith("<|im_system|>system<|im_middle|>be brief<|im_end|><|im_user|>user")
    assert Tokenizer().decode(ids).endswith("assistant<|im_middle|><think>")
    assert ids.count(Tokenizer().im_end) == 2  # what the user wrote ends no turn


def answered(monkeypatch, text):
    """Let generate answer with this text, token by token."""

    def fake(model, prompts, *_, on_token, **__):
        ids = Tokenizer().encode(text)
        for token in ids:
            on_token(0, token)
        return [Generation(tuple(ids), (0.0,) * len(ids), "stop")]

    monkeypatch.setattr(k25, "generate", fake)


@pytest.mark.parametrize("text, shown", [
    ("hello<|im_end|>", "hello"), ("cut off <|im", "cut off <|im"), ("<", "<"), ("", ""), ("grün", "grün"),
])  # fmt: skip
def test_chat_shows_the_whole_answer_even_if_it_is_cut(run, monkeypatch, capsys, text, shown):
    answered(monkeypatch, text)
    chat(run, "hi")
    assert capsys.readouterr().out == shown + "\n"


def test_chat_lists_tool_calls_and_says_which_are_malformed(run, monkeypatch, capsys):
    call = "<|tool_call_begin|>functions.f:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
    calls = call.format(0, '{"x": 1}') + call.format(1, "{oops")
    answered(monkeypatch, f"ok<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|><|im_end|>")
    chat(run, "hi")
    printed = capsys.readouterr()
    assert printed.out == 'ok\n[calls f {"x": 1}]\n'
    assert printed.err.count("malformed tool call") == 1 and "{oops" in printed.err


def test_misuse_exits_2_with_one_line(run, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes((run / "a.png").read_bytes()[:60])
    (tmp_path / "list.json").write_text("[]")
    cut_off = tmp_path / "cut"
    cut_off.mkdir()
    for file in (run / "model").iterdir():
        (cut_off / file.name).write_bytes(file.read_bytes())
    shard = next(cut_off.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    here = ["chat", "--run", str(run)]
    cases = [
        (["info", "--preset", "k3"], "no preset named 'k3'"),
        (["info", "--config", str(tmp_path / "list.json")], "list.json holds a list"),
        ([*here, "--image", str(tmp_path / "bad.png"), "hi"], "bad.png"),
        ([*here, "--image", str(tmp_path / "none.png"), "hi"], "none.png: no such file"),
        ([*here, "--video", str(tmp_path / "none.gif"), "hi"], "none.gif: no such file"),
        ([*here, "--temperature", "-1", "hi"], "temperature -1"),
        ([*here, "--max-new-tokens", "0", "hi"], "max_new_tokens 0"),
        ([*here, "--device", "abacus", "hi"], "device 'abacus' cannot be used"),
        ([*here, "--tokenizer", str(tmp_path / "none.model"), "hi"], "none.model: cannot be read"),
        (["chat", "--run", str(tmp_path / "nowhere"), "hi"], "nowhere/config.json"),
        (["chat", "--run", str(cut_off), "hi"], f"{shard.name} is truncated: tensor "),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stopped:
            k25.main(arguments)
        printed = capsys.readouterr()
        assert stopped.value.code == 2 and printed.out == "", arguments
        assert message in printed.err and printed.err.count("\n") == 1, (arguments, printed.err)


# Accelerator


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_model_on_cuda_equals_the_float64_reference(dtype):
    expected = built(impl="reference")(prompt(), *media())
    patches, grids = media()
    actual = built(dtype=dtype).cuda()(prompt().cuda(), patches.cuda(), grids.cuda())
    assert_close(actual.cpu(), expected, {torch.float64: 1e-10, torch.float32: 1e-3}[dtype])
