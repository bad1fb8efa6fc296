"""Checkpoints in the released layout: official names, safetensors shards with an index, optional int4 experts.

The model stacks the experts of a layer, `…mlp.experts.gate_proj` (E,F,C); the release writes one matrix per
expert, `…mlp.experts.{e}.gate_proj.weight`, or its int4 form `weight_packed` / `weight_scale` / `weight_shape`.
Everything else has the same name on both sides.

Public names: CheckpointError, released_entries, canonical_name, write_checkpoint, read_checkpoint,
write_file, replace_directory, save_tensors, load_tensors.

Letters: E experts, F expert width, C hidden, O/I rows and columns of a matrix.     Tests: pytest tests/test_checkpoint.py
"""

import functools
import json
import os
import pathlib
import re
import shutil
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moe import int4_pack, int4_unpack

_STACKED = re.compile(r"^(?P<layer>.*\.mlp\.experts)\.(?P<matrix>gate_proj|up_proj|down_proj)$")
_GROUP = 32  # int4 group along the input


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the tensor and the file."""


# ---------------------------------------------------------------------------------------------- names


@dataclass(frozen=True)
class Entry:
    """One tensor of the released layout and where it comes from.

    name: released name; key: state-dict key; expert: row of the stacked tensor, or None; part: "" for the plain
    tensor, else "packed" | "scale" | "shape"; shape, dtype: as stored.
    """

    name: str
    key: str
    expert: int | None
    part: str
    shape: tuple
    dtype: torch.dtype

    @property
    def nbytes(self):
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def released_entries(state, int4=False):
    """All tensors of the released layout for a state dict (meta tensors will do), in the model's order.

    state: {key: tensor}. Returns a list of Entry; 208,550 of them for the released config in int4.
    Raises CheckpointError when an expert's input width is no multiple of 32 and int4 is asked for.
    """
    entries = []
    for key, tensor in state.items():
        stacked = _STACKED.match(key)
        if not stacked:
            entries.append(Entry(key, key, None, "", tuple(tensor.shape), tensor.dtype))
            continue
        experts, rows, columns = tensor.shape
        if int4 and columns % _GROUP:
            raise CheckpointError(f"{key}: {columns} input columns are no multiple of the int4 group {_GROUP}: "
                                  "save without int4 or choose another width")  # fmt: skip
        for expert in range(experts):
            name = f"{stacked['layer']}.{expert}.{stacked['matrix']}.weight"
            if int4:
                entries += [
                    Entry(f"{name}_packed", key, expert, "packed", (rows, columns // 8), torch.int32),
                    Entry(f"{name}_scale", key, expert, "scale", (rows, columns // _GROUP), torch.bfloat16),
                    Entry(f"{name}_shape", key, expert, "shape", (2,), torch.int32),
                ]
            else:
                entries.append(Entry(name, key, expert, "", (rows, columns), tensor.dtype))
    return entries


def canonical_name(name):
    """The released spelling of a name that Kimi-VL or a re-export spells differently; others unchanged."""
    name = name.replace("multi_modal_projector.", "mm_projector.")
    name = name.replace("mm_projector.linear_1.", "mm_projector.proj.0.").replace("mm_projector.linear_2.", "mm_projector.proj.2.")
    return re.sub(r"^language_model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.model.", name)


# --------------------------------------------------------------------------------------------- writing


def write_file(path, text):
    """Write a text file so that it holds either the old text or the whole new one, whatever happens meanwhile."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def replace_directory(finished, target):
    """Move a finished directory to `target`, replacing what is there; between the two renames the old one stands as `.NAME.old`."""
    finished, target = pathlib.Path(finished), pathlib.Path(target)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(finished, target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def save_tensors(tensors, path):
    """Write {name: tensor} as one safetensors file, flushed to disk."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path,
              metadata={"format": "pt"})  # fmt: skip
    _sync(path)


def load_tensors(path):
    """Read a whole safetensors file as {name: tensor}. Raises CheckpointError naming the first broken tensor."""
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_checkpoint(directory, state, config, preprocessor, int4, shard_bytes):
    """Write a state dict as a released checkpoint directory, atomically.

    state: {key: tensor}; config, preprocessor: dicts for config.json and preprocessor_config.json; int4: pack
    the routed experts; shard_bytes: largest shard. Raises CheckpointError when `directory` exists and is
    something else than a checkpoint.
    """
    directory = pathlib.Path(directory)
    foreign = directory.is_dir() and any(directory.iterdir()) and not (directory / "config.json").exists()
    if foreign or (directory.exists() and not directory.is_dir()):
        raise CheckpointError(f"{directory} exists and is not a checkpoint: choose another directory")
    shards, filled = [[]], 0
    for entry in released_entries(state, int4):
        if shards[-1] and filled + entry.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    weight_map = {}
    # An expert's codes and scales are neighbours in the list: pack it once for both.
    packed_expert = functools.lru_cache(maxsize=1)(lambda key, expert: int4_pack(state[key][expert]))
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        save_tensors({entry.name: _stored(entry, state, packed_expert) for entry in shard}, unfinished / file)
        weight_map |= {entry.name: file for entry in shard}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    if int4:
        config = config | {"text_config": config["text_config"] | {"quantization_config": _INT4_CONFIG}}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor),
                          ("model.safetensors.index.json", index)):  # fmt: skip
        write_file(unfinished / name, json.dumps(content, indent=2) + "\n")
    replace_directory(unfinished, directory)


_INT4_CONFIG = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": _GROUP, "symmetric": True, "dynamic": False}}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
               r"re:.*mlp\.gate$"],
}  # fmt: skip


def _stored(entry, state, packed_expert):
    tensor = state[entry.key]
    if entry.expert is None:
        return tensor
    matrix = tensor[entry.expert]  # (O,I)
    if not entry.part:
        return matrix
    if entry.part == "shape":
        return torch.tensor(matrix.shape, dtype=torch.int32)
    packed, scale = packed_expert(entry.key, entry.expert)
    return packed if entry.part == "packed" else scale


# --------------------------------------------------------------------------------------------- reading


def _open(path):
    """Open a safetensors file after checking its header, so that a truncated one names its first broken tensor."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head, brace = file.read(8), file.read(1)
            length = int.from_bytes(head, "little")
            # pickle's and zip's first bytes; a header may have a length that looks so, but then its JSON follows
            if length > size - 8 and brace != b"{" and (head[:1] == b"\x80" or head[:2] == b"PK"):
                raise CheckpointError(f"{path} is a pickle file: pickles can run code and are never loaded; "
                                      "convert it to safetensors")  # fmt: skip
            if len(head) < 8 or length > size - 8:
                raise CheckpointError(f"{path} is truncated or no safetensors file: its header is incomplete")
            file.seek(8)
            header = json.loads(file.read(length))
        for name, value in header.items():
            if name != "__metadata__" and 8 + length + value["data_offsets"][1] > size:
                raise CheckpointError(f"{path} is truncated: tensor {name} ends at byte "
                                      f"{8 + length + value['data_offsets'][1]} of {size}; fetch the file again")  # fmt: skip
        return safe_open(path, framework="pt")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path} is no valid safetensors file: {error}") from None


def _shard_files(directory):
    """{stored tensor name: file} of a checkpoint directory."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            return {name: directory / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is no valid index: {error!r}") from None
    single = directory / "model.safetensors"
    if single.exists():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    pickles = [p.name for p in sorted(directory.glob("*")) if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    if pickles:
        raise CheckpointError(f"{directory / pickles[0]} is a pickle file: pickles can run code and are never loaded; "
                              "convert it to safetensors")  # fmt: skip
    raise CheckpointError(f"{directory} holds no model.safetensors.index.json and no model.safetensors")


def _few(names):
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@torch.no_grad()
def read_checkpoint(directory, model, dtype, device):
    """Fill a model built on the meta device from a checkpoint directory, one shard after the other.

    dtype: of the weights, or None for the stored one. Returns the model on `device`, in evaluation mode.
    Raises CheckpointError on a missing, extra, truncated or wrongly shaped tensor, and on pickle files.
    """
    directory = pathlib.Path(directory)
    files = _shard_files(directory)
    stored = {canonical_name(name): name for name in files}
    if twice := files.keys() - stored.values():
        raise CheckpointError(f"{directory}: {_few(twice)} is there a second time under another spelling: remove one")
    int4 = any(name.endswith(".weight_packed") for name in stored)
    expected = {entry.name: entry for entry in released_entries(model.state_dict(), int4)}
    if missing := expected.keys() - stored.keys():
        raise CheckpointError(f"{directory}: missing {_few(missing)} ({len(missing)} tensors that the config asks for)")
    if extra := stored.keys() - expected.keys():
        raise CheckpointError(f"{directory}: unexpected {_few(extra)} ({len(extra)} tensors that the config has no place for)")
    shards = {}
    for name, entry in expected.items():
        shards.setdefault(files[stored[name]], []).append(entry)
    if dtype is None:
        with _open(files[stored["language_model.lm_head.weight"]]) as file:
            dtype = file.get_tensor(stored["language_model.lm_head.weight"]).dtype
    model.to(dtype).to_empty(device=device)
    state = model.state_dict(keep_vars=True)
    waiting = {}  # int4 parts whose siblings lie in a later shard
    for path, entries in shards.items():
        with _open(path) as file:
            present = set(file.keys())
            named = {stored[entry.name] for entry in entries}
            if named != present:
                raise CheckpointError(f"{path}: the index names {_few(named - present) or 'nothing more'} which the file "
                                      f"lacks; the file holds {_few(present - named) or 'nothing more'} beside it")  # fmt: skip
            for entry in entries:
                tensor = file.get_tensor(stored[entry.name])
                if tuple(tensor.shape) != entry.shape:
                    raise CheckpointError(f"{path}: tensor {entry.name} has shape {tuple(tensor.shape)}, "
                                          f"the config asks for {entry.shape}")  # fmt: skip
                exact = entry.part or entry.key.endswith(".e_score_correction_bias")  # a rounded bias reroutes tokens
                if exact and tensor.dtype != entry.dtype:
                    raise CheckpointError(f"{path}: tensor {entry.name} has dtype {tensor.dtype}, expected {entry.dtype}")
                place = state[entry.key] if entry.expert is None else state[entry.key][entry.expert]
                if not entry.part:
                    place.copy_(tensor)
                    continue
                parts = waiting.setdefault((entry.key, entry.expert), {})
                parts[entry.part] = tensor
                if len(parts) == 3:
                    if parts["shape"].tolist() != list(place.shape):
                        raise CheckpointError(f"{path}: {entry.name.rsplit('_', 1)[0]}_shape says "
                                              f"{parts['shape'].tolist()}, the config asks for {list(place.shape)}")  # fmt: skip
                    place.copy_(int4_unpack(parts["packed"], parts["scale"], dtype=torch.float32))
                    del waiting[entry.key, entry.expert]
    return model.eval()
