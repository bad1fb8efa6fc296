"""Images and clips to patches: the preprocessing of Kimi K2.5, with Pillow and NumPy only.

K2.5 report 4.2. A picture is never enlarged; it is shrunk to a patch budget, padded with black on the right and
bottom to whole 28-pixel blocks, scaled to [-1, 1] and cut into 14x14 patches. A clip is sampled at 2 frames per
second and cut into chunks of at most 4 frames; each chunk is one item of t*h*w patches with its own timestamp.

Public: MediaConfig, MediaError, MediaItem, Clip, ResizePlan, load_image, load_video, resize_plan, frame_indices,
timestamp, patchify, image_item, video_items, pack, merged_tokens. `vit3d` re-exports all of them.

Dimensions: L patches, I media items; t, h, w frames, patch rows and patch columns of one item.

Tests: python -m pytest tests/test_media.py
"""

import math
import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

# A patch grid is merged 2x2 after the tower, so that h and w are always even.
MERGE = 2
# The most pixels of one picture (Pillow's own guard against decompression bombs) and of one decoded clip (about 1 GB).
MAX_PIXELS = 89_478_485
MAX_CLIP_PIXELS = 4 * MAX_PIXELS
# Browsers show a frame without a duration for 100 ms; a folder of frames has none and is read as sampled already.
UNTIMED_FRAME_MS = 100.0
FOLDER_FPS = 2.0


class MediaError(ValueError):
    """A picture, a clip or a packed batch that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class MediaConfig:
    """The `media_proc_cfg` of preprocessor_config.json; every field has its key and its released default."""

    patch_size: int = 14
    merge_kernel_size: int = MERGE
    in_patch_limit: int = 16384  # patches of one image
    in_patch_limit_each_frame: int | None = 4096  # patches of one video frame; None: in_patch_limit
    in_patch_limit_video: int | None = None  # patches of all sampled frames of a clip; None: no limit
    patch_limit_on_one_side: int = 512
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    sample_fps: float = 2.0
    max_num_frames_each_video: int | None = None
    temporal_merge_kernel_size: int = 4  # most frames of one chunk
    fixed_output_tokens: int | None = None  # released as null; nothing else is defined
    timestamp_mode: str = "hh:mm:ss.fff"

    def __post_init__(self):
        object.__setattr__(self, "image_mean", tuple(self.image_mean))
        object.__setattr__(self, "image_std", tuple(self.image_std))
        if self.merge_kernel_size != MERGE:
            raise MediaError(f"merge_kernel_size is {self.merge_kernel_size}; only {MERGE} is defined")
        if self.fixed_output_tokens is not None:
            raise MediaError(f"fixed_output_tokens is {self.fixed_output_tokens}; only null is defined")
        if self.timestamp_mode != "hh:mm:ss.fff":
            raise MediaError(f"timestamp_mode is {self.timestamp_mode!r}; only 'hh:mm:ss.fff' is defined")
        if self.patch_limit_on_one_side < MERGE or self.patch_limit_on_one_side % MERGE:
            raise MediaError(f"patch_limit_on_one_side is {self.patch_limit_on_one_side}; it must be even and positive")


@dataclass(frozen=True)
class MediaItem:
    """One image (t = 1) or one chunk of a clip.

    patches: (t*h*w, 3*14*14) float32 — rows frame by frame, then row by row; each flattened channel, dy, dx.
    grid: (t, h, w) — frames, patch rows, patch columns.
    timestamp: the chunk's first frame as hh:mm:ss.fff; None for an image.
    """

    patches: Tensor
    grid: tuple[int, int, int]
    timestamp: str | None = None


@dataclass(frozen=True)
class Clip:
    """Frames of one size, in order, and how many of them make a second."""

    frames: tuple[Image.Image, ...]
    fps: float

    def __post_init__(self):
        if not self.frames:
            raise MediaError("clip: no frames; give at least one")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise MediaError(f"clip: {self.fps} frames per second; give a positive number")


@dataclass(frozen=True)
class ResizePlan:
    """The size in pixels that a picture is resized to, and the size it is then padded to."""

    width: int
    height: int
    padded_width: int
    padded_height: int


def load_image(source) -> Image.Image:
    """Read one picture as 8-bit RGB.

    Colours follow the released processor's plain `convert("RGB")`: alpha is dropped (not composited) and an EXIF
    orientation is ignored. What Pillow would clip is scaled instead: I;16 and I are 16-bit levels (0..65535 ->
    0..255), F is 0..1 when no value passes 1, else 0..255.

    Args: source: a file (str, path, or what reads like a pathlib.Path, as storage.RemotePath does), or a Pillow image
    of any mode. An animation gives its current (for a file: first) frame.
    Returns: a new image of mode RGB.
    Raises: MediaError naming the file: missing, empty, not an image, truncated, zero-sized, too large, odd mode.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "image in memory")
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read_bytes"):
        raise MediaError(f"an image must be a path or a Pillow image, not {type(source).__name__}")
    with _open(_path(source)) as image:
        return _to_rgb(image, str(source))


def load_video(path, fps: float | None = None) -> Clip:
    """Read an animated GIF, WebP or APNG, or a folder of frames (in the natural order of their names).

    fps = frames / total duration, the average rate, as the released processor takes it from a container.

    Args: path: file or folder, as for load_image; fps: overrides the rate. A folder without one counts 2 frames per second.
    Returns: a Clip of RGB frames. Raises: MediaError naming the file.
    """
    path = _path(path)
    if path.is_dir():
        frames = _folder_frames(path)
        return Clip(frames, FOLDER_FPS if fps is None else fps)
    frames, durations_ms = _animation_frames(path)
    return Clip(frames, 1000.0 * len(frames) / sum(durations_ms) if fps is None else fps)


def _path(source):
    """A pathlib.Path, or the object itself when it only reads like one."""
    return pathlib.Path(source) if isinstance(source, (str, os.PathLike)) else source


def _open(path) -> Image.Image:
    """Open a picture file without decoding it."""
    if path.is_dir():
        raise MediaError(f"{path}: a folder, not an image; read a folder of frames with load_video")
    if not path.is_file():
        raise MediaError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty (0 bytes)")
    readable = path if isinstance(path, pathlib.Path) else path.open("rb")  # outside the try: storage has its own errors
    try:
        return Image.open(readable)
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: not an image that Pillow can read (clips: GIF, WebP, APNG or a folder)") from error
    except Exception as error:  # format plugins raise whatever their parser meets, and the bomb guard its own class
        raise MediaError(f"{path}: cannot be opened: {error}") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise MediaError(f"{name}: zero-sized, {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise MediaError(f"{name}: {width}x{height} = {width * height} pixels, limit {MAX_PIXELS}; shrink it first")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode the current frame and convert it; see load_image for the rules."""
    _check_size(*image.size, name)
    try:
        image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, zlib.error, struct.error, ...
        raise MediaError(f"{name}: cannot be decoded, the file is damaged or cut short: {error}") from error
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _levels_to_rgb(np.asarray(image).astype(np.float64), 65535.0, name)
    if image.mode == "F":
        levels = np.asarray(image).astype(np.float64)
        return _levels_to_rgb(levels, 1.0 if levels.max() <= 1.0 else 255.0, name)
    if image.mode in ("La", "RGBa"):  # premultiplied alpha has no direct way to RGB
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if "transparency" in image.info:  # the same colours; Pillow warns on the direct way from a palette with alpha
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise MediaError(f"{name}: mode {image.mode} has no conversion to RGB; save it as RGB first") from error


def _levels_to_rgb(levels: np.ndarray, white: float, name: str) -> Image.Image:
    """Grey levels 0..white to RGB; a level outside is an error, because its scale can only be guessed."""
    if not (np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= white):
        raise MediaError(
            f"{name}: levels from {levels.min():g} to {levels.max():g}, but 0 to {white:g} was expected; rescale first"
        )
    return Image.fromarray(np.rint(levels * (255.0 / white)).astype(np.uint8)).convert("RGB")


def _animation_frames(path: pathlib.Path) -> tuple[tuple[Image.Image, ...], list[float]]:
    """Every frame of an animated file and its duration in milliseconds."""
    frames, durations_ms = [], []
    with _open(path) as image:
        try:
            # The still that an APNG shows where animation is unknown is not one of its frames.
            first = int(getattr(image, "default_image", False))
            stop = getattr(image, "n_frames", 1)
        except Exception as error:  # counting frames parses the whole file
            raise MediaError(f"{path}: its frames cannot be counted, the file is damaged: {error}") from error
        _check_clip_size(stop - first, image.size, path)
        for index in range(first, stop):
            name = f"{path}: frame {index}"
            try:
                image.seek(index)
            except Exception as error:
                raise MediaError(f"{name}: cannot be read, the file is damaged or cut short: {error}") from error
            frames.append(_to_rgb(image, name))
            durations_ms.append(float(image.info.get("duration") or UNTIMED_FRAME_MS))
    return tuple(frames), durations_ms


def _folder_frames(path: pathlib.Path) -> tuple[Image.Image, ...]:
    """The pictures of a folder; frame2 comes before frame10."""
    known = Image.registered_extensions()
    files = [p for p in path.iterdir() if p.suffix.lower() in known and not p.name.startswith(".")]
    files.sort(key=lambda p: [(0, int(s), "") if s.isdigit() else (1, 0, s) for s in re.split(r"([0-9]+)", p.name)])
    if not files:
        raise MediaError(f"{path}: no image files in this folder")
    frames = []
    for file in files:
        frames.append(load_image(file))
        if frames[-1].size != frames[0].size:
            raise MediaError(f"{file}: {frames[-1].size} pixels, but {files[0].name} has {frames[0].size}")
        if len(frames) == 1:
            _check_clip_size(len(files), frames[0].size, path)
    return tuple(frames)


def _check_clip_size(count: int, size: tuple[int, int], path: pathlib.Path) -> None:
    if count * size[0] * size[1] > MAX_CLIP_PIXELS:
        raise MediaError(
            f"{path}: {count} frames of {size[0]}x{size[1]} pixels pass the limit of {MAX_CLIP_PIXELS} pixels; "
            "shorten or shrink the clip"
        )


def resize_plan(width: int, height: int, limit: int, cfg: MediaConfig) -> ResizePlan:
    """How a picture is fitted into the patch budget, p = patch_size:

        scale = min(1, sqrt(limit / (floor(width/p) floor(height/p))), side*p/width, side*p/height)

    then sizes are cut to whole pixels (at least 1) and padded up to multiples of 2p. Padding comes after the budget,
    so a picture at the limit may end with one row or column of blocks more.

    Args: width, height: pixels; limit: most patches; cfg: patch_size and patch_limit_on_one_side (side).
    Returns: ResizePlan. Raises: MediaError if a side is below 1 pixel or the limit below 1 patch.
    """
    if width < 1 or height < 1 or limit < 1:
        raise MediaError(f"cannot fit {width}x{height} pixels into {limit} patches; all must be positive")
    patch, side = cfg.patch_size, cfg.patch_limit_on_one_side * cfg.patch_size
    patches = max(1, width // patch) * max(1, height // patch)
    scale = min(1.0, math.sqrt(limit / patches), side / width, side / height)
    new_width = min(max(1, int(width * scale)), side)
    new_height = min(max(1, int(height * scale)), side)
    block = MERGE * patch
    return ResizePlan(new_width, new_height, -(-new_width // block) * block, -(-new_height // block) * block)


def frame_indices(count: int, source_fps: float, cfg: MediaConfig) -> list[int]:
    """Which frames of a clip are looked at: n of them, evenly spaced from the first to the last.

        fps = min(sample_fps, source_fps);  n = max(round(count * fps / source_fps), 1)

    Args: count: frames of the clip; source_fps: its rate; cfg: sample_fps, max_num_frames_each_video.
    Returns: n increasing indices in 0..count-1.
    """
    fps = min(cfg.sample_fps, source_fps)
    n = max(round(count * fps / source_fps), 1)
    if cfg.max_num_frames_each_video is not None:
        n = min(n, cfg.max_num_frames_each_video)
    return np.linspace(0, count - 1, n).round().astype(int).tolist()


def timestamp(seconds: float) -> str:
    """Seconds as hh:mm:ss.fff. Milliseconds are cut, not rounded, as in the released processor."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:02d}:{minute:02d}:{second:02d}.{int(seconds % 1 * 1000):03d}"


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """Cut frames into patches.

    Args: pixels: (t, h*p, w*p, 3) float; patch_size: p.
    Returns: (t*h*w, 3*p*p) — frame by frame, row by row; each patch flattened channel, dy, dx, as a convolution reads.
    """
    t, height, width, _ = pixels.shape
    p = patch_size
    blocks = pixels.reshape(t, height // p, p, width // p, p, 3)  # (t,h,dy,w,dx,3)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(-1, 3 * p * p)  # -> (L,3*p*p)


def image_item(image: str | os.PathLike | Image.Image, cfg: MediaConfig) -> MediaItem:
    """Preprocess one image (a path or a Pillow image of any mode) to a MediaItem with t = 1."""
    rgb = load_image(image)
    return _item([rgb], resize_plan(*rgb.size, cfg.in_patch_limit, cfg), cfg, None)


def video_items(clip: Clip, cfg: MediaConfig) -> list[MediaItem]:
    """Sample a clip and preprocess it, chunk by chunk.

    Args: clip: frames of one size. Returns: one MediaItem of at most 4 frames per chunk, with its timestamp.
    Raises: MediaError if the frames differ in size.
    """
    size = clip.frames[0].size
    for index, frame in enumerate(clip.frames):
        if frame.size != size:
            raise MediaError(f"clip: frame {index} has {frame.size} pixels, but frame 0 has {size}")
    indices = frame_indices(len(clip.frames), clip.fps, cfg)
    limit = cfg.in_patch_limit if cfg.in_patch_limit_each_frame is None else cfg.in_patch_limit_each_frame
    if cfg.in_patch_limit_video is not None:
        limit = min(limit, max(1, round(cfg.in_patch_limit_video / len(indices))))
    plan = resize_plan(*size, limit, cfg)
    items = []
    for start in range(0, len(indices), cfg.temporal_merge_kernel_size):
        chunk = indices[start : start + cfg.temporal_merge_kernel_size]
        frames = [load_image(clip.frames[i]) for i in chunk]
        items.append(_item(frames, plan, cfg, timestamp(chunk[0] / clip.fps)))
    return items


def _item(frames: Sequence[Image.Image], plan: ResizePlan, cfg: MediaConfig, time: str | None) -> MediaItem:
    """Resize, pad with black, normalise and cut RGB frames of one size."""
    canvas = np.zeros((len(frames), plan.padded_height, plan.padded_width, 3), dtype=np.uint8)
    for frame, target in zip(frames, canvas):
        target[: plan.height, : plan.width] = frame.resize((plan.width, plan.height), Image.Resampling.BICUBIC)
    mean, std = torch.tensor(cfg.image_mean), torch.tensor(cfg.image_std)
    pixels = (torch.from_numpy(canvas).float() / 255.0 - mean) / std  # (t,height,width,3)
    grid = (len(frames), plan.padded_height // cfg.patch_size, plan.padded_width // cfg.patch_size)
    return MediaItem(patchify(pixels, cfg.patch_size), grid, time)


def pack(items: Sequence[MediaItem]) -> tuple[Tensor, Tensor]:
    """Concatenate items of any sizes (NaViT packing), in order.

    Returns: patches (L,588) float32 and grid_thw (I,3) int64; (0,588) and (0,3) for no items.
    Raises: MediaError if an item's patches do not fill its grid or patch sizes differ.
    """
    if not items:
        return torch.zeros(0, 3 * 14 * 14), torch.zeros(0, 3, dtype=torch.int64)
    for i, item in enumerate(items):
        expected = (math.prod(item.grid), items[0].patches.shape[1])
        if tuple(item.patches.shape) != expected:
            raise MediaError(f"item {i}: patches {tuple(item.patches.shape)}, but grid {item.grid} needs {expected}")
    return torch.cat([item.patches for item in items]), torch.tensor([item.grid for item in items], dtype=torch.int64)


def merged_tokens(grid: Sequence[int]) -> int:
    """How many tokens an item of grid (t, h, w) becomes in the text: (h/2)(w/2), whatever t is."""
    _, h, w = (int(n) for n in grid)
    return (h // MERGE) * (w // MERGE)
