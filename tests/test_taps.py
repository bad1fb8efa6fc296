"""Claims about taps.py: taps are what the model computed, pins steer what follows, directories come back unchanged.

Run: .venv/bin/python -m pytest tests/test_taps.py
"""

import inspect
import json

import pytest
import torch
from safetensors.torch import save_file

import taps
from checkpoint import CheckpointError
from conformance import OPS
from k25 import K25Config
from taps import Prompt, TapsError, capture, read_taps, standard_prompts, write_taps
from test_k25 import MEDIA, built, tiny

PROMPTS = ("text", "image", "clip", "mixed")
each_prompt = pytest.mark.parametrize("name", PROMPTS)
VISION = {"patch_embed": "embedded", "encoder.final_layernorm": "norm"}  # MoonViT3d's own taps → ours, less the blocks


def module_outputs(model, prompt):
    """{tap name: what the model's own module gave} in an ordinary forward pass, wherever a module gives one tap."""
    decoder, found, handles = model.language_model.model, {}, []

    def watch(module, name, change=lambda output: output):
        handles.append(module.register_forward_hook(lambda m, i, output: found.__setitem__(name, change(output))))

    watch(decoder.embed_tokens, "decoder.embedded")
    watch(model.vision_tower, "vision.merged")
    watch(model.mm_projector, "vision.projected")
    for i, block in enumerate(decoder.layers):
        name, attention = f"decoder.layers.{i}", block.self_attn
        watch(block.input_layernorm, f"{name}.input_norm")
        watch(attention.q_a_proj, f"{name}.q_a")
        watch(attention.q_a_layernorm, f"{name}.q_norm")
        watch(attention.q_b_proj, f"{name}.q_b", lambda y: y.unflatten(-1, (model.config.num_attention_heads, -1)))
        watch(attention.kv_a_proj_with_mqa, f"{name}.kv_a")
        watch(attention.kv_a_layernorm, f"{name}.latent")
        watch(attention.o_proj, f"{name}.attention_out")
        handles.append(attention.o_proj.register_forward_pre_hook(
            lambda m, inputs, name=name: found.__setitem__(f"{name}.attention", inputs[0])))  # fmt: skip
        watch(block.post_attention_layernorm, f"{name}.post_norm")
        watch(block, f"{name}.output", lambda y: y[0])
        if hasattr(block.mlp, "gate"):
            watch(block.mlp.gate, f"{name}.router.index", lambda y: y.index)
            handles.append(block.mlp.gate.register_forward_hook(
                lambda m, i, y, name=name: found.__setitem__(f"{name}.router.weights", y.weights)))  # fmt: skip
            watch(block.mlp.experts, f"{name}.experts")
            watch(block.mlp.shared_experts, f"{name}.shared_experts", lambda y: y.flatten(0, 1))
            watch(block.mlp, f"{name}.mlp", lambda y: y[0].flatten(0, 1))
        else:
            watch(block.mlp, f"{name}.mlp", lambda y: y.flatten(0, 1))
    watch(decoder.norm, "decoder.norm")
    watch(model.language_model.lm_head, "decoder.logits")
    tower, seen = model.vision_tower, {}
    plain, tower.forward = tower.forward, lambda patches, grids: plain(patches, grids, seen)
    try:
        with torch.no_grad():
            model(prompt.ids, prompt.patches, prompt.grid_thw)
    finally:
        del tower.forward
        for handle in handles:
            handle.remove()
    blocks = {f"encoder.blocks.{i}": f"blocks.{i}.output" for i in range(model.config.vision.vt_num_hidden_layers)}
    return found | {f"vision.{(VISION | blocks)[name]}": value for name, value in seen.items()}


# What is captured


@each_prompt
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_taps_are_bitwise_what_the_models_modules_gave(name, dtype, impl):
    model = built(dtype=dtype, impl=impl)
    prompt = standard_prompts(model.config)[name]
    captured, real = capture(model, prompt), module_outputs(model, prompt)
    assert len(real) > 40
    for tap, expected in real.items():
        assert torch.equal(captured[tap].output, expected), tap


def test_a_batch_of_rows_is_captured_too():
    model = built()
    prompt = Prompt(torch.randint(0, 200, (3, 5)))
    assert torch.equal(capture(model, prompt)["decoder.logits"].output, module_outputs(model, prompt)["decoder.logits"])


def test_a_model_without_shared_experts_has_its_experts_as_mlp():
    model = built(n_shared_experts=0)
    prompt = standard_prompts(model.config)["text"]
    captured = capture(model, prompt)
    assert "decoder.layers.1.mlp" not in captured
    with torch.no_grad():
        assert torch.equal(captured["decoder.logits"].output, model(prompt.ids))


@each_prompt
def test_the_reference_of_each_op_gives_the_tap_from_its_inputs(name):
    """So a suspect of that op can be run on a tap's inputs."""
    model = built(dtype=torch.float32)
    tried = set()
    for tap in capture(model, standard_prompts(model.config)[name]).values():
        if tap.op in OPS:
            assert tuple(tap.inputs) == tuple(inspect.signature(OPS[tap.op].reference).parameters), tap.name
            with torch.no_grad():
                results = OPS[tap.op].reference(**tap.inputs)
            assert close(results[tap.result] if isinstance(results, tuple) else results, tap.output), tap.name
            tried.add(tap.op)
    assert {"rms_norm", "rope", "rope_table", "softmax_scale", "visibility", "mla_attention", "route", "experts", "swiglu"} <= tried
    assert name == "text" or {"patch_embed", "position_embedding", "rope_2d", "vit_attention", "pool_merge", "project",
                              "media_splice"} <= tried  # fmt: skip


def close(result, expected):
    result = torch.as_tensor(result)
    return result.shape == expected.shape and torch.allclose(result.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_every_weight_of_the_model_is_an_input_of_some_tap():
    model = built()
    captured = capture(model, standard_prompts(model.config)["mixed"])
    assert {key for tap in captured.values() for key in tap.weights.values()} == model.state_dict().keys()


def test_the_docstring_lists_every_tap_and_no_other():
    table = taps.__doc__.partition("    tap  ")[2].partition("\n\n")[0]
    listed = set()
    for line in table.splitlines()[1:]:
        names, op = [part.strip() for part in line.split("  ") if part.strip()][:2]
        first, *others = names.split(", ")
        full = [first] + [other if other.startswith("decoder") else first.rpartition(".")[0] + other for other in others]
        listed |= {(name, op) for name, op in zip(full, op.split(", ") * (1 if "," in op else len(full)))}
    listed |= {("decoder.layers.I.mlp", op) for op in ("add", "swiglu")}
    listed -= {("decoder.layers.I.mlp", "add | swiglu")}
    model = built()
    captured = capture(model, standard_prompts(model.config)["mixed"])
    made = {(".".join("I" if part.isdigit() else part for part in tap.name.split(".")), tap.op) for tap in captured.values()}
    assert made == listed


# Pins


def test_pinning_every_tap_to_itself_changes_nothing():
    model = built()
    prompt = standard_prompts(model.config)["mixed"]
    captured = capture(model, prompt)
    again = capture(model, prompt, {name: tap.output for name, tap in captured.items()})
    assert all(torch.equal(tap.output, again[name].output) for name, tap in captured.items())


def test_a_pinned_tap_steers_what_follows_and_still_shows_what_we_computed():
    model = built()
    prompt = standard_prompts(model.config)["text"]
    free = capture(model, prompt)
    name = "decoder.layers.0.q_norm"
    pinned = capture(model, prompt, {name: free[name].output + 1})
    assert torch.equal(pinned[name].output, free[name].output)
    changed = [other for other in free if not torch.equal(free[other].output, pinned[other].output)]
    assert changed[0] == "decoder.layers.0.q_b" and "decoder.logits" in changed
    assert "decoder.layers.0.kv_a" not in changed


def test_pinned_routing_is_what_the_experts_use_and_its_weights_are_ours():
    model = built()
    prompt = standard_prompts(model.config)["text"]
    name = "decoder.layers.1.router.index"
    free = capture(model, prompt)
    other = (free[name].output + 1) % model.config.n_routed_experts
    pinned = capture(model, prompt, {name: other})
    assert torch.equal(pinned[name].output, free[name].output)
    assert torch.equal(pinned["decoder.layers.1.experts"].inputs["index"], other)
    tokens = pinned["decoder.layers.1.router.weights"].inputs["x"]
    with torch.no_grad():
        expected = model.language_model.model.layers[1].mlp.gate(tokens, other).weights
    assert torch.equal(pinned["decoder.layers.1.router.weights"].output, expected)


def test_a_pinned_value_of_another_shape_is_refused():
    model = built()
    with pytest.raises(TapsError, match=r"decoder.norm is pinned to shape \(1, 2\), should be \(1, 40, 24\)"):
        capture(model, standard_prompts(model.config)["text"], {"decoder.norm": torch.zeros(1, 2)})


def test_a_replaced_operation_runs_somebodys_function_wherever_it_occurs():
    model = built()
    prompt = standard_prompts(model.config)["mixed"]
    free = capture(model, prompt)
    halved = capture(model, prompt, replaced={"rms_norm": lambda x, weight, eps: x / 2})
    for name in ("decoder.layers.0.input_norm", "decoder.layers.2.latent", "decoder.norm"):
        assert torch.equal(halved[name].output, halved[name].inputs["x"] / 2)
    shape = free["decoder.rope.cos"].output.shape
    still = capture(model, prompt, replaced={"rope_table": lambda *settings: (torch.ones(shape), torch.zeros(shape))})
    assert (still["decoder.rope.cos"].output == 1).all() and (still["decoder.rope.sin"].output == 0).all()
    assert torch.equal(still["decoder.layers.0.q_rope"].output, still["decoder.layers.0.q_rope"].inputs["x"])
    assert torch.equal(free["vision.projected"].output, halved["vision.projected"].output)


def test_nothing_is_computed_after_the_last_tap_that_is_wanted():
    model = built()
    prompt = standard_prompts(model.config)["image"]
    assert list(capture(model, prompt, until="vision.norm"))[-1] == "vision.norm"
    assert list(capture(model, prompt, until="decoder.layers.1.k_rope"))[-1] == "decoder.layers.1.k_rope"


# Prompts


@pytest.mark.parametrize("config", [tiny(), K25Config.preset("toy"), K25Config.preset("small"), K25Config()])
def test_standard_prompts_suit_any_config(config):
    prompts = standard_prompts(config)
    assert tuple(prompts) == PROMPTS
    for prompt in prompts.values():
        taps._check(prompt, config)
        assert not {config.bos_token_id, config.eos_token_id, config.pad_token_id} & set(prompt.ids[0].tolist())
    assert prompts["text"].patches is None
    assert (prompts["image"].grid_thw[:, 0] == 1).all() and (prompts["clip"].grid_thw[:, 0] > 1).all()


def test_prompts_are_a_function_of_the_seed():
    first, again, other = (standard_prompts(tiny(), seed) for seed in (3, 3, 4))
    for name in PROMPTS:
        assert torch.equal(first[name].ids, again[name].ids) and not torch.equal(first[name].ids, other[name].ids)
    assert torch.equal(first["clip"].patches, again["clip"].patches)


@pytest.mark.parametrize("prompt, message", [
    (Prompt(torch.zeros(4, dtype=torch.int64)), r"prompt ids are torch.int64 \(4,\)"),
    (Prompt(torch.zeros(1, 4)), "prompt ids are torch.float32"),
    (Prompt(torch.tensor([[0, 512]])), "outside the vocabulary of 512"),
    (Prompt(torch.tensor([[0, MEDIA]])), "has 1 media tokens but its media give 0"),
    (Prompt(torch.tensor([[0, MEDIA]]), torch.zeros(8, 588)), "patches without grid_thw"),
])  # fmt: skip
def test_a_prompt_that_does_not_fit_is_refused_in_one_line(prompt, message):
    with pytest.raises(TapsError, match=message):
        capture(built(), prompt)


# Directories


def captured_prompts(names=PROMPTS):
    model = built(dtype=torch.bfloat16)
    prompts = standard_prompts(model.config)
    return {name: (prompts[name], capture(model, prompts[name])) for name in names}


def test_a_directory_gives_back_prompts_outputs_and_inputs(tmp_path):
    written = captured_prompts()
    write_taps(tmp_path / "taps", written, with_inputs=True)
    read = read_taps(tmp_path / "taps")
    assert read.keys() == written.keys()
    for name, (prompt, taps_) in written.items():
        assert torch.equal(read[name].prompt.ids, prompt.ids)
        assert (prompt.patches is None) == (read[name].prompt.patches is None)
        assert read[name].tensors.keys() == taps_.keys()
        assert all(torch.equal(read[name].tensors[n], tap.output) for n, tap in taps_.items())
        x = read[name].inputs["decoder.norm"]
        assert x.keys() == {"x"} and torch.equal(x["x"], taps_["decoder.norm"].inputs["x"])


def test_the_same_taps_give_the_same_bytes_and_replace_a_directory(tmp_path):
    for name in ("a", "b", "b"):
        write_taps(tmp_path / name, captured_prompts(("text", "clip")))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["clip.safetensors", "taps.json", "text.safetensors"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_the_manifest_tells_op_shape_arguments_and_weights(tmp_path):
    write_taps(tmp_path / "taps", captured_prompts(("text",)))
    told = json.loads((tmp_path / "taps" / "taps.json").read_text())["prompts"]["text"]
    assert told["decoder.layers.0.latent"] == {
        "op": "rms_norm", "shape": [1, 40, 7], "dtype": "bfloat16", "arguments": {"eps": 1e-6},
        "weights": {"weight": "language_model.model.layers.0.self_attn.kv_a_layernorm.weight"},
    }  # fmt: skip


def test_a_directory_of_another_program_needs_neither_manifest_nor_prompt(tmp_path):
    save_file({"decoder.norm": torch.ones(2), "decoder.norm.in.x": torch.zeros(2)}, tmp_path / "text.safetensors")
    read = read_taps(tmp_path)["text"]
    assert read.prompt is None and read.tensors.keys() == {"decoder.norm"} and read.inputs["decoder.norm"].keys() == {"x"}


def test_a_foreign_directory_is_neither_read_nor_overwritten(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(TapsError, match="holds no safetensors file"):
        read_taps(tmp_path)
    with pytest.raises(TapsError, match="is no taps directory"):
        write_taps(tmp_path, {})
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(CheckpointError):
        read_taps(tmp_path)
    save_file({"prompt.ids": torch.zeros(1), "prompt.pixels": torch.ones(2)}, tmp_path / "text.safetensors")
    with pytest.raises(TapsError, match="prompt.ids with prompt.patches"):
        read_taps(tmp_path)
