"""What the installed transformers gets wrong about Kimi K2.5, each shown by running it.

    python oracle.py defects            all of them, on a tiny checkpoint with random weights
    python oracle.py defects clips      one

Every trial states what the released model does, runs transformers' kimi_k25 on the same checkpoint and says whether it
still does something else. Its tower, item by item, and its decoder agree with ours: see `oracle.py trace`.

Public names: Defect, DEFECTS, examine, add_arguments, main.
Tests: pytest tests/test_defects.py
"""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch

from checkpoint import load_tensors
from k25 import K25, K25Config, save
from mla import Yarn
from peer import Peer, PeerError, import_transformers
from vit3d import VisionConfig

IMAGE, CLIP = (1, 2, 4), (2, 2, 4)  # grids: frames, rows and columns of patches


@dataclass(frozen=True)
class Defect:
    """One trial: what should be, and a function (our model, the peer, its directory) → what it does instead, or ""."""

    name: str
    should: str
    trial: Callable


def _tiny_model():
    sizes = dict(hidden_size=48, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                 q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
                 n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=256)  # fmt: skip
    vision = VisionConfig(init_pos_emb_height=4, init_pos_emb_width=4, vt_hidden_size=32, vt_num_attention_heads=2,
                          vt_num_hidden_layers=2, vt_intermediate_size=48, text_hidden_size=48)  # fmt: skip
    torch.manual_seed(0)
    return K25(dataclasses.replace(K25Config.preset("toy"), **sizes, yarn=Yarn(), vision=vision)).eval()


def _media(config, *grids):
    """Ids with the places of these items between two words, random patches, and the grids."""
    places = sum(h * w // 4 for _, h, w in grids)
    ids = torch.tensor([[65, *[config.media_placeholder_token_id] * places, 66]])
    patches = torch.randn(sum(t * h * w for t, h, w in grids), 588, generator=torch.Generator().manual_seed(1))
    return ids, patches, torch.tensor(grids)


def _raised(function):
    """The first line of the exception that a call raises, "" when it raises none."""
    try:
        function()
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
    return ""


def _public_path(ours, peer, *grids):
    ids, patches, grid_thw = _media(ours.config, *grids)
    assert ours(ids, patches, grid_thw).isfinite().all()
    pixels = patches.unflatten(1, (3, 14, 14))  # (L,3,14,14)
    return _raised(lambda: peer.model(input_ids=ids, pixel_values=pixels, image_grid_thw=grid_thw))


def _clips(ours, peer, directory):
    return _public_path(ours, peer, CLIP)


def _mixed(ours, peer, directory):
    _, patches, grid_thw = _media(ours.config, IMAGE, CLIP)
    return _raised(lambda: peer.tower(patches.unflatten(1, (3, 14, 14)), grid_thw=grid_thw))  # (L,3,14,14)


def _field_names(ours, peer, directory):
    told = json.loads((directory / "config.json").read_text())["vision_config"]
    read = import_transformers().AutoConfig.from_pretrained(directory, local_files_only=True).vision_config
    wrong = [f"{name} {told['vt_' + name]} → {getattr(read, name)}" for name in
             ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
             if getattr(read, name) != told["vt_" + name]]  # fmt: skip
    return "builds its own defaults: " + ", ".join(wrong) if wrong else ""


def _saved_names(ours, peer, directory):
    with tempfile.TemporaryDirectory() as folder:
        peer.model.save_pretrained(folder)
        theirs = {name for path in pathlib.Path(folder).glob("*.safetensors") for name in load_tensors(path)}
    released = {name for path in directory.glob("*.safetensors") for name in load_tensors(path)}
    strange = sorted(theirs - released)
    return f"{len(strange)} of {len(theirs)} names are not the released ones, such as {strange[0]}" if strange else ""


DEFECTS = (
    Defect("clips", "a clip of 2 frames through the public path gives (h/2)(w/2) embeddings", _clips),
    Defect("mixed-t", "an image and a clip may share one packed call of the tower", _mixed),
    Defect("field-names", "the released vt_* names of vision_config set the tower's sizes", _field_names),
    Defect("saved-names", "save_pretrained writes the names that from_pretrained read", _saved_names),
)


def examine(names=None):
    """Run the trials named (all by default) on a tiny checkpoint. Yields (Defect, what transformers does, "" if right).

    Raises PeerError where transformers, or its Kimi K2.5, is missing.
    """
    ours = _tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder) / "checkpoint"
        save(ours, directory)
        peer = Peer(directory)
        for defect in DEFECTS:
            if not names or defect.name in names:
                with torch.no_grad():
                    yield defect, defect.trial(ours, peer, directory)


def add_arguments(parser):
    """The arguments of `oracle.py defects`."""
    parser.add_argument("names", nargs="*", help=f"among {', '.join(d.name for d in DEFECTS)}; default: all")


def main(options):
    """`oracle.py defects`: two lines per trial. Returns 1 when transformers differs in any, else 0."""
    known = [defect.name for defect in DEFECTS]
    for name in options.names:
        if name not in known:
            raise PeerError(f"no trial named {name!r}: choose among {', '.join(known)}")
    found = 0
    for defect, does in examine(options.names):
        found += bool(does)
        print(f"[{'DEFECT' if does else 'OK'}] {defect.name}: {defect.should}\n    transformers {does or 'does'}")
    return 1 if found else 0
