"""Claims about checkpoint.py and about save and load of k25.py.

Numbers after `bug` are those of the public bug list.
Run: .venv/bin/python -m pytest tests/test_checkpoint.py
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import (
    CheckpointError, canonical_name, load_tensors, released_entries, replace_directory, save_tensors, write_file,
)  # fmt: skip
from k25 import K25, K25Config, load, save
from moe import fake_quant
from vit3d import MediaConfig, VisionConfig

INDEX = "model.safetensors.index.json"
ONLY = "model-00001-of-000001.safetensors"  # the shard of a small model


def tiny(**changes):
    """Two layers, the second with three experts; widths are multiples of 32, so that int4 is possible."""
    vision = VisionConfig(init_pos_emb_height=4, init_pos_emb_width=4, vt_hidden_size=16, vt_num_attention_heads=2,
                          vt_num_hidden_layers=1, vt_intermediate_size=12, text_hidden_size=64)  # fmt: skip
    values = dict(vocab_size=512, hidden_size=64, intermediate_size=20, moe_intermediate_size=32, num_hidden_layers=2,
                  num_attention_heads=2, q_lora_rank=10, kv_lora_rank=7, qk_nope_head_dim=5, qk_rope_head_dim=4,
                  v_head_dim=6, n_routed_experts=3, num_experts_per_tok=2, media_placeholder_token_id=277,
                  bos_token_id=256, eos_token_id=257, pad_token_id=511, vision=vision)  # fmt: skip
    return K25Config(**values | changes)


def built(dtype=torch.float32, seed=0, **changes):
    """A tiny model whose router biases need all their bits."""
    torch.manual_seed(seed)
    model = K25(tiny(**changes)).to(dtype)
    for router in model.routers():
        router.e_score_correction_bias.copy_(1000 + torch.rand(3) / 64)
    return model


@pytest.fixture(scope="module")
def released():
    """Every Entry of the released config, {int4: list}, from a model on the meta device in its released dtype."""
    with torch.device("meta"):
        state = K25(K25Config.preset("k2.5")).to(torch.bfloat16).state_dict()
    return {int4: released_entries(state, int4) for int4 in (True, False)}


@pytest.fixture
def saved(tmp_path):
    """A directory with a tiny float32 checkpoint in one shard."""
    save(built(), tmp_path / "model")
    return tmp_path / "model"


def digests(directory):
    """{file name: hash of its bytes}."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


def same(a, b):
    """Whether two models hold bitwise the same tensors of the same dtypes."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def fails(directory, *parts):
    """Loading raises one line of CheckpointError that holds all these parts."""
    with pytest.raises(CheckpointError) as error:
        load(directory)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, (part, message)


# Names, shapes and dtypes of the release


def released_manifest(int4):
    """{name: (shape, dtype)} of the released checkpoint, spelled out from its description."""
    bf16, names = torch.bfloat16, {}

    def linear(name, rows, columns, bias=False):
        names[f"{name}.weight"] = ((rows, columns), bf16)
        if bias:
            names[f"{name}.bias"] = ((rows,), bf16)

    def norm(name, width, bias=False):
        names[f"{name}.weight"] = ((width,), bf16)
        if bias:
            names[f"{name}.bias"] = ((width,), bf16)

    def feed_forward(name, width):
        linear(f"{name}.gate_proj", width, 7168)
        linear(f"{name}.up_proj", width, 7168)
        linear(f"{name}.down_proj", 7168, width)

    linear("language_model.model.embed_tokens", 163840, 7168)
    linear("language_model.lm_head", 163840, 7168)
    norm("language_model.model.norm", 7168)
    for i in range(61):
        layer = f"language_model.model.layers.{i}"
        norm(f"{layer}.input_layernorm", 7168)
        norm(f"{layer}.post_attention_layernorm", 7168)
        linear(f"{layer}.self_attn.q_a_proj", 1536, 7168)
        norm(f"{layer}.self_attn.q_a_layernorm", 1536)
        linear(f"{layer}.self_attn.q_b_proj", 12288, 1536)
        linear(f"{layer}.self_attn.kv_a_proj_with_mqa", 576, 7168)
        norm(f"{layer}.self_attn.kv_a_layernorm", 512)
        linear(f"{layer}.self_attn.kv_b_proj", 16384, 512)
        linear(f"{layer}.self_attn.o_proj", 7168, 8192)
        if i == 0:
            feed_forward(f"{layer}.mlp", 18432)
            continue
        names[f"{layer}.mlp.gate.weight"] = ((384, 7168), bf16)
        names[f"{layer}.mlp.gate.e_score_correction_bias"] = ((384,), torch.float32)
        feed_forward(f"{layer}.mlp.shared_experts", 2048)
        for e in range(384):
            if not int4:
                feed_forward(f"{layer}.mlp.experts.{e}", 2048)
                continue
            for matrix, rows, columns in (("gate", 2048, 7168), ("up", 2048, 7168), ("down", 7168, 2048)):
                name = f"{layer}.mlp.experts.{e}.{matrix}_proj.weight"
                names[f"{name}_packed"] = ((rows, columns // 8), torch.int32)
                names[f"{name}_scale"] = ((rows, columns // 32), bf16)
                names[f"{name}_shape"] = ((2,), torch.int32)
    names["vision_tower.patch_embed.proj.weight"] = ((1152, 3, 14, 14), bf16)
    names["vision_tower.patch_embed.proj.bias"] = ((1152,), bf16)
    names["vision_tower.patch_embed.pos_emb.weight"] = ((64, 64, 1152), bf16)
    for i in range(27):
        block = f"vision_tower.encoder.blocks.{i}"
        norm(f"{block}.norm0", 1152, bias=True)
        norm(f"{block}.norm1", 1152, bias=True)
        linear(f"{block}.wqkv", 3456, 1152, bias=True)
        linear(f"{block}.wo", 1152, 1152, bias=True)
        linear(f"{block}.mlp.fc0", 4304, 1152, bias=True)
        linear(f"{block}.mlp.fc1", 1152, 4304, bias=True)
    norm("vision_tower.encoder.final_layernorm", 1152, bias=True)
    norm("mm_projector.pre_norm", 1152, bias=True)
    linear("mm_projector.proj.0", 4608, 4608, bias=True)
    linear("mm_projector.proj.2", 7168, 4608, bias=True)
    return names


@pytest.mark.parametrize("int4", [True, False])
def test_bug20_the_released_names_shapes_and_dtypes_are_exactly_ours(released, int4):
    """bug 25 too: bias float32, packed and shape int32, scale bfloat16."""
    entries = released[int4]
    ours, theirs = {e.name: (e.shape, e.dtype) for e in entries}, released_manifest(int4)
    assert len(ours) == len(entries)
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:5]
    assert ours == theirs
    assert len(entries) == (208_550 if int4 else 208_550 - 2 * 60 * 384 * 3)


def test_bug26_only_routed_experts_are_packed(released):
    """Names that hold `.weight` or `experts` elsewhere, like shared_experts and q_a_proj.weight, stay plain."""
    packed = {e.name.rsplit("_", 1)[0] for e in released[True] if e.part}
    expected = {f"language_model.model.layers.{i}.mlp.experts.{e}.{m}_proj.weight"
                for i in range(1, 61) for e in range(384) for m in ("gate", "up", "down")}  # fmt: skip
    assert packed == expected


def test_the_released_size_is_the_published_one(released):
    """554.3 GB, counted in 2^30 bytes."""
    assert round(sum(entry.nbytes for entry in released[True]) / 2**30, 1) == 554.3


@pytest.mark.parametrize("theirs, ours", [
    ("multi_modal_projector.pre_norm.weight", "mm_projector.pre_norm.weight"),
    ("multi_modal_projector.linear_1.bias", "mm_projector.proj.0.bias"),
    ("multi_modal_projector.linear_2.weight", "mm_projector.proj.2.weight"),
    ("language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
    ("language_model.norm.weight", "language_model.model.norm.weight"),
    ("language_model.layers.3.mlp.gate.weight", "language_model.model.layers.3.mlp.gate.weight"),
    ("language_model.lm_head.weight", "language_model.lm_head.weight"),
])  # fmt: skip
def test_other_spellings_have_a_released_name(theirs, ours):
    assert canonical_name(theirs) == ours == canonical_name(ours)


def test_released_names_are_canonical_already(released):
    assert all(canonical_name(entry.name) == entry.name for entry in released[True])


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_returns_every_bit(tmp_path, dtype):
    """Weights, dtypes and the router bias that bfloat16 would flatten (bug 12); the model comes back in evaluation mode."""
    model = built(dtype)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert same(again, model) and not again.training
    bias = again.routers()[0].e_score_correction_bias
    assert bias.dtype == torch.float32 and len(bias.unique()) == 3


def test_load_converts_to_the_dtype_asked_for_but_keeps_the_bias(saved):
    model = load(saved, dtype=torch.bfloat16)
    assert same(model, built().to(torch.bfloat16))
    assert same(load(saved, dtype=torch.float64), built().to(torch.float64))


def test_the_config_and_the_preprocessing_come_back(tmp_path):
    config = dict(media=MediaConfig(in_patch_limit=77, sample_fps=1.5, image_mean=(0.1, 0.2, 0.3)), rope_theta=777.0)
    model = built(**config)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model", impl="reference")
    assert again.config == dataclasses.replace(model.config, impl="reference")
    preprocessor = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert preprocessor["media_proc_cfg"]["in_patch_limit"] == 77
    ids = torch.arange(5)[None]
    assert_close(again(ids), model(ids), 1e-5)


def test_a_model_of_the_toy_preset_answers_as_before_bitwise(tmp_path):
    torch.manual_seed(0)
    model, ids = K25(K25Config.preset("toy")).eval(), torch.arange(40).view(2, 20)
    save(model, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bug28_int4_experts_come_back_as_fake_quantisation_made_them(tmp_path, dtype):
    model = built(dtype)
    save(model, tmp_path / "model", int4=True)
    experts, plain = {}, {}
    for name, tensor in load(tmp_path / "model").state_dict().items():
        (experts if ".mlp.experts." in name else plain)[name] = tensor
    before = model.state_dict()
    assert len(experts) == 3 and all(torch.equal(tensor, before[name]) for name, tensor in plain.items())
    for name, tensor in experts.items():
        assert tensor.dtype == dtype and torch.equal(tensor, fake_quant(before[name])), name
        assert not torch.equal(tensor, before[name])


def test_bug24_an_int4_checkpoint_saved_again_has_the_same_bytes(tmp_path):
    save(built(), tmp_path / "first", int4=True)
    save(load(tmp_path / "first"), tmp_path / "second", int4=True)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_bug25_an_int4_file_holds_the_released_dtypes_and_says_so_in_the_config(tmp_path):
    save(built(torch.bfloat16), tmp_path / "model", int4=True)
    stored = load_file(tmp_path / "model" / ONLY)
    name = "language_model.model.layers.1.mlp.experts.2.down_proj.weight"
    assert f"{name}" not in stored
    parts = {part: stored[f"{name}_{part}"] for part in ("packed", "scale", "shape")}
    assert {part: (tuple(t.shape), t.dtype) for part, t in parts.items()} == {
        "packed": ((64, 4), torch.int32), "scale": ((64, 1), torch.bfloat16), "shape": ((2,), torch.int32),
    }  # fmt: skip
    assert parts["shape"].tolist() == [64, 32]
    assert stored["language_model.model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    quantization = json.loads((tmp_path / "model" / "config.json").read_text())["text_config"]["quantization_config"]
    assert quantization["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert quantization["format"] == "pack-quantized"
    assert K25Config.from_json(tmp_path / "model" / "config.json") == tiny()


def test_int4_of_widths_that_do_not_fit_is_refused_before_anything_is_written(tmp_path):
    model = built(moe_intermediate_size=20)
    with pytest.raises(CheckpointError, match="down_proj: 20 input columns are no multiple of the int4 group 32"):
        save(model, tmp_path / "model", int4=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("int4", [False, True])
def test_one_model_has_one_sequence_of_bytes(tmp_path, int4):
    save(built(seed=1), tmp_path / "a", int4, shard_bytes=20_000)
    save(built(seed=1), tmp_path / "b", int4, shard_bytes=20_000)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") and len(digests(tmp_path / "a")) > 5


# Shards


@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("shard_bytes", [1, 10_000, 60_000])
def test_shards_of_any_size_hold_the_same_model(tmp_path, monkeypatch, int4, shard_bytes):
    """With one tensor per file the parts of an int4 matrix lie in different files."""
    monkeypatch.setattr(checkpoint, "_sync", lambda path: None)  # hundreds of files: not worth the disk's time
    model = built()
    save(model, tmp_path / "one", int4)
    save(model, tmp_path / "many", int4, shard_bytes)
    assert same(load(tmp_path / "many"), load(tmp_path / "one"))
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):06d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 1
    sizes = []
    for file in files:
        tensors = load_file(tmp_path / "many" / file)
        names = [name for name, where in index["weight_map"].items() if where == file]
        assert tensors.keys() == set(names)
        if sizes:  # a new shard only where the tensor would have overfilled the last one
            assert sizes[-1] + tensors[names[0]].nbytes > shard_bytes
        sizes.append(sum(t.nbytes for t in tensors.values()))
        assert sizes[-1] <= shard_bytes or len(tensors) == 1
    assert sum(sizes) == index["metadata"]["total_size"]


def test_a_single_file_without_an_index_loads_too(saved):
    (saved / ONLY).rename(saved / "model.safetensors")
    (saved / INDEX).unlink()
    assert same(load(saved), built())


@pytest.mark.parametrize("edit", [
    lambda n: n.replace("language_model.model.", "language_model."),
    lambda n: n.replace("mm_projector.proj.0", "multi_modal_projector.linear_1")
    .replace("mm_projector.proj.2", "multi_modal_projector.linear_2")
    .replace("mm_projector.pre_norm", "multi_modal_projector.pre_norm"),
], ids=["without model.", "Kimi-VL"])  # fmt: skip
def test_other_spellings_load(saved, edit):
    tensors = {edit(name): tensor for name, tensor in load_file(saved / ONLY).items()}
    assert tensors.keys() != load_file(saved / ONLY).keys()
    rewrite(saved, tensors)
    assert same(load(saved), built())


def rewrite(directory, tensors):
    """Replace the single shard and its index."""
    save_file(tensors, directory / ONLY)
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, ONLY)}))


# Refusals

NORM = "language_model.model.norm.weight"


def test_bug20_a_missing_tensor_is_named(saved):
    tensors = load_file(saved / ONLY)
    del tensors[NORM]
    rewrite(saved, tensors)
    fails(saved, saved, "missing", NORM, "(1 tensors")


def test_bug20_an_extra_tensor_is_named(saved):
    rewrite(saved, load_file(saved / ONLY) | {f"extra.{i}": torch.ones(1) for i in range(5)})
    fails(saved, saved, "unexpected extra.0, extra.1, extra.2 and 2 more", "(5 tensors")


def test_a_tensor_under_two_spellings_is_refused(saved):
    tensors = load_file(saved / ONLY)
    rewrite(saved, tensors | {"language_model.norm.weight": torch.zeros(64)})
    fails(saved, "norm.weight is there a second time")


def test_a_wrong_shape_names_tensor_file_and_both_shapes(saved):
    rewrite(saved, load_file(saved / ONLY) | {NORM: torch.ones(63)})
    fails(saved, saved / ONLY, NORM, "(63,)", "(64,)")


def test_bug12_a_router_bias_rounded_to_bf16_is_refused(saved):
    tensors = load_file(saved / ONLY)
    name = next(name for name in tensors if name.endswith("e_score_correction_bias"))
    rewrite(saved, tensors | {name: tensors[name].bfloat16()})
    fails(saved, name, ONLY, "bfloat16", "float32")


@pytest.mark.parametrize("part, wrong, message", [
    ("scale", torch.ones(32, 2), "has dtype torch.float32, expected torch.bfloat16"),
    ("packed", torch.ones(32, 8, dtype=torch.int64), "has dtype torch.int64, expected torch.int32"),
    ("packed", torch.ones(32, 4, dtype=torch.int32), "has shape (32, 4), the config asks for (32, 8)"),
    ("shape", torch.tensor([64, 32], dtype=torch.int32), "says [64, 32], the config asks for [32, 64]"),
])  # fmt: skip
def test_bug25_a_damaged_int4_part_is_named(tmp_path, part, wrong, message):
    save(built(), tmp_path / "model", int4=True)
    name = f"language_model.model.layers.1.mlp.experts.1.up_proj.weight_{part}"
    rewrite(tmp_path / "model", load_file(tmp_path / "model" / ONLY) | {name: wrong})
    fails(tmp_path / "model", ONLY, name, message)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1, 0.5])
def test_a_truncated_file_is_named_with_its_tensor(saved, keep):
    data = (saved / ONLY).read_bytes()
    cut = data[: int(len(data) * keep)] if isinstance(keep, float) else data[:keep]
    (saved / ONLY).write_bytes(cut)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    if len(cut) < header:
        fails(saved, saved / ONLY, "truncated", "header is incomplete")
        return
    offsets = {name: header + value["data_offsets"][1] for name, value in json.loads(data[8:header]).items()
               if name != "__metadata__"}  # fmt: skip
    broken = [name for name in offsets if offsets[name] > len(cut)]
    with pytest.raises(CheckpointError, match="is truncated: tensor ") as error:
        load(saved)
    assert any(f"tensor {name} ends at byte {offsets[name]} of {len(cut)}" in str(error.value) for name in broken)


def framed(header):
    """A safetensors file with this text as its header."""
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize("content", [
    framed(b"[]"), framed(b"{oops"), framed(b'{"a": 3}'), framed(b'{"a": {"dtype": "F32", "shape": [1]}}'),
    framed(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}'),
    framed(b'{"a": {"dtype": "X", "shape": [0], "data_offsets": [0, 0]}}'), framed(b"\xff\xfe"),
])  # fmt: skip
def test_a_damaged_header_is_one_line_with_the_file(saved, content):
    (saved / ONLY).write_bytes(content)
    fails(saved, saved / ONLY, "no valid safetensors file")


@pytest.mark.parametrize("name", [ONLY, "pytorch_model.bin"])
@pytest.mark.parametrize("write", [
    lambda tensors, path: torch.save(tensors, path),
    lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    lambda tensors, path: path.write_bytes(pickle.dumps({k: t.tolist() for k, t in tensors.items()})),
])  # fmt: skip
def test_a_pickle_file_is_refused_and_never_opened(saved, monkeypatch, name, write):
    """Whether it is named like a shard or lies where shards are missing."""
    tensors = {NORM: torch.ones(64)}
    (saved / ONLY).unlink()
    if name != ONLY:
        (saved / INDEX).unlink()
    write(tensors, saved / name)
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(torch, "load", None)
    fails(saved, saved / name, "pickle file", "convert it to safetensors")


def test_a_truncated_header_whose_length_begins_like_a_pickle_is_called_truncated(saved):
    (saved / ONLY).write_bytes((0x5880).to_bytes(8, "little") + b'{"__metadata__":')
    fails(saved, "truncated or no safetensors file")


def test_a_directory_without_weights_says_what_it_lacks(saved):
    (saved / ONLY).unlink()
    (saved / INDEX).unlink()
    fails(saved, saved, "holds no model.safetensors.index.json and no model.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '"x"'])
def test_a_damaged_index_is_one_line(saved, text):
    (saved / INDEX).write_text(text)
    fails(saved, INDEX, "no valid index")


def test_an_index_that_lies_is_found_out(tmp_path):
    directory = tmp_path / "model"
    save(built(), directory, shard_bytes=60_000)
    index = json.loads((directory / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = next(name for name, file in index["weight_map"].items() if file == files[0])
    for target, message in ((files[1], f"the index names {moved} which the file lacks"),
                            ("gone.safetensors", "cannot be read: No such file")):  # fmt: skip
        (directory / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {moved: target}}))
        fails(directory, directory / target, message)
    rest = {name: file for name, file in index["weight_map"].items() if name != moved}
    (directory / INDEX).write_text(json.dumps({"weight_map": rest}))
    fails(directory, "missing", moved)
    (directory / INDEX).write_text(json.dumps(index))
    save_file(load_file(directory / files[1]) | {"secret": torch.ones(1)}, directory / files[1])
    fails(directory, directory / files[1], "the file holds secret beside it")
    (directory / files[1]).unlink()
    fails(directory, directory / files[1], "cannot be read: No such file or directory")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_missing_config_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=name):
        load(saved)


def test_a_config_of_another_size_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (saved / "config.json").write_text(json.dumps(config))
    fails(saved, "unexpected", "layers.1.")
    config["text_config"]["num_hidden_layers"] = 3
    (saved / "config.json").write_text(json.dumps(config))
    fails(saved, "missing", "layers.2.")


# Atomicity


@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_failing_write_leaves_the_old_checkpoint_alone(saved, monkeypatch, when):
    """Whichever shard the disk fails at; and the next save succeeds despite the remains."""
    before, calls = digests(saved), []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) > when:
            raise OSError(28, "No space left on device")
        return save_file(*arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", failing)
        with pytest.raises(OSError, match="No space left"):
            save(built(seed=1), saved, shard_bytes=60_000)
    assert digests(saved) == before and same(load(saved), built())
    assert [p.name for p in saved.parent.iterdir() if not p.name.startswith(".")] == ["model"]
    save(built(seed=1), saved)
    assert same(load(saved), built(seed=1))
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_first_save_that_fails_leaves_no_directory_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_file", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        save(built(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_replaced_checkpoint_keeps_no_old_shard(saved):
    save(built(), saved, shard_bytes=20_000)
    assert len(list(saved.glob("*.safetensors"))) > 1
    save(built(seed=1), saved)
    assert sorted(p.name for p in saved.iterdir()) == sorted([ONLY, INDEX, "config.json", "preprocessor_config.json"])


def test_a_foreign_directory_or_file_is_not_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"mine")
    (tmp_path / "note").write_text("mine")
    for name in ("photos", "note"):
        with pytest.raises(CheckpointError, match=f"{name} exists and is not a checkpoint"):
            save(built(), tmp_path / name)
    assert (tmp_path / "photos" / "a.png").read_bytes() == b"mine" and (tmp_path / "note").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save(built(), tmp_path / "empty")
    save(built(), tmp_path / "new" / "deep" / "model")
    assert same(load(tmp_path / "empty"), load(tmp_path / "new" / "deep" / "model"))


def test_replace_directory_between_its_two_renames_still_has_the_old_one(tmp_path, monkeypatch):
    for name, text in (("old", "old"), ("new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    rename = os.rename

    def once(source, target):
        monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        rename(source, target)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(KeyboardInterrupt):
        replace_directory(tmp_path / "new", tmp_path / "old")
    monkeypatch.setattr(os, "rename", rename)
    assert (tmp_path / ".old.old" / "file").read_text() == "old" and (tmp_path / "new" / "file").read_text() == "new"
    replace_directory(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "new" and not (tmp_path / ".old.old").exists()


def test_write_file_keeps_the_old_text_when_writing_fails(tmp_path, monkeypatch):
    write_file(tmp_path / "a.json", "old ü")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        write_file(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "old ü"


# Plain tensors


@settings(max_examples=10)
@given(st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]), max_size=4), st.integers(0, 9))
def test_tensors_come_back_with_every_bit(tmp_path_factory, dtypes, size):
    """Views, transposes and tensors that share memory are written as they look."""
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    tensors = {str(i): (torch.randn(3, size) * 4).to(dtype).T for i, dtype in enumerate(dtypes)}
    base = torch.randn(4, 4, requires_grad=True)
    tensors |= {"row": base[0], "all": base, "scalar": torch.tensor(3.5)}
    save_tensors(tensors, path)
    again = load_tensors(path)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor)


def test_load_tensors_of_a_broken_file_is_one_line(tmp_path):
    save_tensors({"a": torch.ones(9)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="a.safetensors is truncated: tensor a ends at byte"):
        load_tensors(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="b.safetensors cannot be read: No such file"):
        load_tensors(tmp_path / "b.safetensors")


# Memory

MEASURE = """
import sys
import torch
torch.set_num_threads(1)
from k25 import load

def kilobytes(field):  # of this process alone; getrusage would inherit the peak of the process that started it
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

load(sys.argv[2])  # whatever a first load imports or allocates once
before = kilobytes("VmRSS")
model = load(sys.argv[1])
print((kilobytes("VmHWM") - before) * 1024, sum(t.nbytes for t in model.state_dict().values()))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("int4", [False, True])
def test_loading_holds_about_one_copy_of_the_weights(tmp_path, int4):
    """A model of 60 MB in shards of at most 5 MB: the peak grows by less than 1.6 times its size."""
    torch.manual_seed(0)
    config = tiny(hidden_size=256, moe_intermediate_size=256, num_hidden_layers=4, n_routed_experts=24, vocab_size=2048,
                  vision=dataclasses.replace(tiny().vision, text_hidden_size=256))  # fmt: skip
    save(K25(config), tmp_path / "big", int4, shard_bytes=5 * 2**20)
    save(built(), tmp_path / "small", int4)
    root = pathlib.Path(checkpoint.__file__).parent
    result = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "big", tmp_path / "small"], cwd=root,
                            capture_output=True, text=True, check=True)  # fmt: skip
    growth, size = map(int, result.stdout.split())
    assert 50e6 < size < 80e6
    assert 0.9 * size < growth < 1.6 * size, f"{growth / size:.2f} copies"
    shutil.rmtree(tmp_path / "big")
