"""The user's own data: a JSON-lines manifest, or a folder of text and captioned images — K2.5 report 4.3.

    {"text": "plain text"}
    {"text": "Before <image> after.", "images": ["a.png"]}
    {"text": "<video>A ball rolls left.", "video": "clip.gif"}          or a folder of frames
    {"text": "<video>…", "video": ["f0.png", "f1.png"], "fps": 2}       or a list of frames

Markers take their media in order; paths are relative to the manifest (absolute and `..` paths are allowed, and so
are URLs). The manifest or folder itself may be a URL, `s3://bucket/mine.jsonl`: see storage.py.
A list under "video" with one `<video>` marker is the frames of one clip, otherwise one clip per marker.
A folder is read recursively: `.txt`, `.md` and `.py` files are text; an image or animation with a caption
file of the same name (`a.png` + `a.txt`) is a picture followed by its caption. A marker written in a plain
text file is only text. Every row is opened once, so that all bad rows are known before training starts; an object
store that does not answer is no bad row, and stops the opening.

Public names: open_manifest, ManifestSource, Row, MARKER, DataError.     Tests: pytest tests/test_manifest.py
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from example import Example
from media import Clip, load_image, load_video
from storage import MissingError, RemotePath, StorageError, Store, in_threads, is_url, public_url

MARKER = re.compile(r"<image>|<video>")
TEXT_SUFFIXES = (".txt", ".md", ".py")
CAPTION_SUFFIXES = (".txt", ".md")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".apng")
FRAME_LIST_FPS = 2.0  # frames per second of a list of frames without "fps": the released sampling rate
HELD_OUT_SHARE = 10  # one row in ten, by the hash of its content
LISTED = 10  # bad rows shown in an error
QUOTED_URL = re.compile(rb'"[A-Za-z][\w+.-]*://')  # in a manifest: a value that may be the URL of a medium
AHEAD = 8  # rows whose remote files are fetched before they are drawn


class DataError(ValueError):
    """Data that cannot be used; one line says what, where and what to do."""


@dataclass(frozen=True)
class Row:
    """One usable row. Media stay where they are and are loaded when the row is drawn."""

    where: str  # "line 3" of a manifest, or a file of a folder
    text: str
    images: tuple[Path | RemotePath, ...] = ()
    clips: tuple[tuple[Path | RemotePath, ...], ...] = ()  # each one file or folder, or the frames of one clip
    fps: float | None = None  # of every clip; None: what the file says, FRAME_LIST_FPS for a list of frames

    @property
    def modality(self):
        """"vision" if the row has pictures or a clip, else "text"."""
        return "vision" if self.images or self.clips else "text"

    def example(self, source):
        """Load the media and return the Example. Raises DataError or MediaError (both ValueError), OSError."""
        if self.modality == "text":
            return _example(self.text, (), source, "text")
        markers = MARKER.findall(self.text)
        for marker, paths in (("<image>", self.images), ("<video>", self.clips)):
            if markers.count(marker) != len(paths):
                raise DataError(f"the text has {markers.count(marker)} {marker} but {len(paths)} are given")
        images, clips = iter(self.images), iter(self.clips)
        media = tuple(
            load_image(next(images)) if marker == "<image>" else _clip(next(clips), self.fps) for marker in markers
        )
        return _example(self.text, media, source, "vision")


@dataclass(frozen=True)
class ManifestSource:
    """The rows of one manifest or folder, split into train and held-out by the hash of their content."""

    name: str
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    bad: tuple[str, ...] = ()  # the dropped rows, "where: reason"

    def rows(self, split):
        """The rows of a split, "train" or "heldout"."""
        return {"train": self.train, "heldout": self.held_out}[split]

    def parts(self, split):
        """The rows of a split as one ManifestPart per modality, without empty parts."""
        parts = []
        for modality in ("text", "vision"):
            rows = tuple(row for row in self.rows(split) if row.modality == modality)
            if rows:
                parts.append(ManifestPart(f"{self.name}.{modality}", modality, rows))
        return parts


@dataclass(frozen=True)
class ManifestPart:
    """Rows of one modality, read in epochs: each epoch visits every row once, in its own order."""

    name: str
    modality: str
    rows: tuple[Row, ...]

    def draw_nth(self, number, seed):
        """The Example of draw `number` (0, 1, …): row `number mod n` of that epoch's order.

        number: int — how many rows of this part were drawn before; seed: int or str — fixes every order.
        Raises DataError naming the row when its files changed since the manifest was opened.
        """
        row = self._row(number, seed)
        _fetch_ahead(self._row(number + step, seed) for step in range(AHEAD + 1))
        try:
            return row.example(self.name)
        except (ValueError, OSError) as error:
            raise DataError(f"{self.name}, {row.where}: {error}") from error

    def _row(self, number, seed):
        epoch, place = divmod(number, len(self.rows))
        return self.rows[_epoch_order(len(self.rows), f"{seed}/{self.name}/{epoch}")[place]]


@functools.lru_cache(maxsize=16)
def _epoch_order(n, key):
    """A permutation of range(n) fixed by `key` alone (a str seed is hashed with SHA-512, stable everywhere)."""
    order = list(range(n))
    random.Random(key).shuffle(order)
    return tuple(order)


def _fetch_ahead(rows):
    """Begin to fetch the remote files of rows, in the background; a folder of frames is left to its reader."""
    for row in rows:
        for path in (*row.images, *(path for clip in row.clips for path in clip)):
            if isinstance(path, RemotePath) and not path.is_dir():
                path.store.ahead([path.url])


def open_manifest(path, skip_bad=False, check: Callable[[Example], object] | None = None, store=Store):
    """Open the user's data, trying every row once.

    path: str or Path — a `.jsonl` manifest or a folder, local or a URL; skip_bad: bool — drop bad rows (they stay
    listed in `bad`) instead of raising; check: called with each Example, raises ValueError to refuse it (as
    data.check_length does for a picture longer than a training row), from several threads when data are far away;
    store: storage.Store that reads the URLs, or what makes one when there is a URL.
    Returns ManifestSource: a row is held out when the hash of its text and pixels says so (one in ten, equal
    rows together); with fewer than ten good rows all are training rows.
    Raises DataError listing the bad rows by line or file (the first ten and the count), or when none is left; and,
    whatever skip_bad says, when an object store does not answer: which rows there are must not depend on that.
    """
    store = functools.cache(store if callable(store) else lambda given=store: given)
    try:
        path = store().path(path) if is_url(path) else Path(path)
        name = path.stem if isinstance(path, RemotePath) else path.resolve().stem
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; give a .jsonl manifest or a folder")
        if not path.is_dir() and path.suffix != ".jsonl":
            raise DataError(f"{path}: neither a .jsonl manifest nor a folder")
        tries = _tries(path, name, check, store)
    except StorageError as error:
        raise DataError(str(error)) from None
    rows = [row for row, _ in tries if isinstance(row, Row)]
    keys = [key for row, key in tries if isinstance(row, Row)]
    bad = [row for row, _ in tries if isinstance(row, str)]
    if bad and not skip_bad:
        more = f"\n  … and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        listing = "\n  ".join(bad[:LISTED])
        raise DataError(f"{path}: {len(bad)} bad rows (--skip-bad drops them):\n  {listing}{more}")
    if not rows:
        raise DataError(f"{path}: no usable row among {len(bad)}")
    if len(rows) < HELD_OUT_SHARE:
        return ManifestSource(name, tuple(rows), (), tuple(bad))
    held = [key % HELD_OUT_SHARE == 0 for key in keys]
    return ManifestSource(
        name,
        tuple(row for row, out in zip(rows, held) if not out),
        tuple(row for row, out in zip(rows, held) if out),
        tuple(bad),
    )


def _tries(path, name, check, store):
    """For every entry (Row, hash of its content), or ("where: reason", None) for a bad one, in order."""
    content = b"" if path.is_dir() else path.read_bytes()
    entries = _folder_entries(path) if path.is_dir() else _json_entries(content, path.parent, store)
    tried = functools.partial(_try_row, name=name, check=check)
    if isinstance(path, RemotePath) or QUOTED_URL.search(content):  # far away: waiting for one row, ask for the next
        store()  # here, so that the threads do not make one each
        return in_threads(tried, entries)
    return [tried(entry) for entry in entries]


def _try_row(entry, name, check):
    """Read one entry: (Row, hash) or ("where: reason", None). Raises StorageError when a store does not answer."""
    where, read = entry
    try:
        row = read()
        example = row.example(name)
        if check is not None:
            check(example)
    except (ValueError, OSError, RecursionError) as error:
        if isinstance(error, StorageError) and not isinstance(error, MissingError):
            raise
        return f"{where}: {error}", None
    return row, _content_hash(example)


def _example(text, media, source, modality):
    return Example(text=text, media=media, source=source, modality=modality)


def _clip(paths, fps):
    if len(paths) == 1:
        return load_video(paths[0], fps)
    return Clip(tuple(load_image(path) for path in paths), FRAME_LIST_FPS if fps is None else fps)


def _content_hash(example):
    """An integer hash of a row's text and pixels, the same in every process and for every file name."""
    digest = hashlib.sha256(example.text.encode("utf-8"))
    for medium in example.media:
        for frame in medium.frames if isinstance(medium, Clip) else (medium,):
            digest.update(repr(frame.size).encode())
            digest.update(frame.tobytes())
    return int.from_bytes(digest.digest()[:8], "big")


def _json_entries(content, base, store):
    """Yield ("line n", reader) for every non-blank line of a manifest's bytes."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield f"line {number}", functools.partial(_json_row, f"line {number}", line, base, store)


def _located(base, name, store):
    """Where a name of a row is: a URL of its own, or relative to the manifest's folder."""
    return store().path(name) if is_url(name) else base / name


def _json_row(where, line, base, store):
    """Parse one line into a Row. Raises DataError with the reason."""
    try:
        record = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error.msg} at column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start})") from error
    if not isinstance(record, dict):
        raise DataError(f"a row must be an object, this is a {type(record).__name__}")
    text = _checked_text(record.get("text"))
    images, videos = _names(record, "images"), _names(record, "video")
    fps = record.get("fps")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf")):
        raise DataError(f'"fps" must be a positive number, not {fps!r}')
    for name in (*images, *videos):
        if not _located(base, name, store).exists():
            raise DataError(f"missing file {public_url(name)}")
    for marker, names in (("<image>", images), ("<video>", videos)):
        if marker in text and not names:
            raise DataError(f"the text has {text.count(marker)} {marker} but 0 are given")
    images, videos = (tuple(_located(base, name, store) for name in names) for names in (images, videos))
    one_clip = len(videos) > 1 and text.count("<video>") == 1
    clips = (videos,) if one_clip else tuple((video,) for video in videos)
    return Row(where, text, images, clips, fps)


def _names(record, key):
    """The file names under `key`: one string or a list of strings."""
    names = record.get(key, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f'"{key}" must be a file name or a list of file names')
    return names


def _checked_text(text):
    if not isinstance(text, str):
        raise DataError('missing "text"' if text is None else f'"text" must be a string, not {type(text).__name__}')
    if not text.strip():
        raise DataError("empty text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError("the text has a lone surrogate, which is not a character")
    return text


def _folder_entries(folder):
    """Yield (file, reader) for every text file and image, sorted; caption files go with their image."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    pictures = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    present = set(files)
    captions = {path: _caption_file(path, present) for path in pictures}
    for path in files:
        where = path.relative_to(folder).as_posix()
        if path in captions:
            yield where, functools.partial(_captioned_row, where, path, captions[path])
        elif path.suffix.lower() in TEXT_SUFFIXES and path not in captions.values():
            yield where, functools.partial(_text_row, where, path)


def _hidden(path):
    return any(part.startswith(".") for part in path.parts)


def _caption_file(picture, files):
    candidates = (picture.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
    return next((path for path in candidates if path in files), None)


def _text_row(where, path):
    return Row(where, _checked_text(_read_text(path)))


def _captioned_row(where, path, caption):
    if caption is None:
        raise DataError(f"no caption file {path.stem}.txt beside it")
    text = _checked_text(_read_text(caption).strip())
    with path.open("rb") as file, Image.open(file) as picture:
        animated = getattr(picture, "n_frames", 1) > 1 and path.suffix.lower() not in (".tif", ".tiff")
    marker = "<video>" if animated else "<image>"
    text = text if marker in text else marker + text
    return Row(where, text, clips=((path,),)) if animated else Row(where, text, images=(path,))


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 (byte {error.start})") from error
