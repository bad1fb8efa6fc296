"""Objects far away, read as if they were files: S3 and everything else fsspec knows — K2.5 report C.1, 4.3.

    s3://bucket/mine.jsonl      memory://mine.jsonl      file:///data/mine.jsonl

Manifests and media stay in their native formats; nothing is repacked. A read falls through three tiers:

    memory (bounded, this process) → disk (bounded, shared by the processes of a machine) → the object store

The least recently used leaves a full tier. A cached file carries the SHA-256 of its content: a damaged or cut
one is dropped and fetched again. Requests of all processes that share a cache folder draw on one token bucket;
transient failures are tried again after w·2^k·(½ + ½u) seconds, u from a hash, so that a run can be repeated.
An object keeps the version it had when it was first met: if it changes during a run, the run stops with one line
instead of training on something else. No tier, thread or process therefore changes *what* is read, only when.

Public names: Store, StoreSettings, RemotePath, StorageError, MissingError, TokenBucket, MemoryTier, DiskTier,
is_url, public_url, in_threads, transient, bench, appetite, main.

Needs the optional packages of the extra `storage` (fsspec, s3fs), imported when the first URL is read.
Run: python storage.py bench --data s3://bucket/mine.jsonl          Tests: pytest tests/test_storage.py
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import pathlib
import queue
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections import Counter, OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

DIGEST = 32  # bytes of SHA-256 before the content of a cached file
ROOMY = 0.9  # a full disk tier is emptied to this share, so that not every write has to look at all files
BLOCK = 1024  # items handed to the threads of `in_threads` at a time
ROOTLESS = ("file", "local", "memory")  # schemes whose paths begin at "/", without a bucket or host
NO_USE_TRYING = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.EMSGSIZE, errno.ENOENT, errno.EACCES}
PASSING = {"HTTPClientError", "ConnectionError", "ClientConnectionError", "ClientPayloadError", "IncompleteReadError",
           "FlexibleChecksumError"}  # fmt: skip


class StorageError(ValueError):
    """An object that cannot be read; one line with its URL, without credentials."""


class MissingError(StorageError):
    """There is no such object."""


class CutShortError(OSError):
    """Fewer or more bytes arrived than the object has; worth another try."""


@dataclass(frozen=True)
class StoreSettings:
    """Sizes, rates and patience of a Store."""

    cache: str = "~/.cache/k25"  # folder of the disk tier; processes that share it share its request rate
    memory_bytes: int = 256 << 20  # of object content, per process
    disk_bytes: int = 8 << 30  # of cached files
    requests_per_second: float = 500.0  # of all processes that share the folder; S3 allows 5,500 GETs per prefix
    burst: int = 50  # requests that may go at once after a pause
    retries: int = 6  # further tries after a transient failure
    first_wait: float = 0.2  # seconds before the first of them; doubles each time
    longest_wait: float = 20.0  # seconds
    workers: int = 8  # threads that fetch ahead; they change when an object arrives, never which
    seed: int = 0  # of the jitter; give each rank its own
    options: dict = field(default_factory=dict, repr=False)  # of the file system (endpoint_url, key, …); may be secret

    def __post_init__(self):
        for name in ("requests_per_second", "burst", "workers", "longest_wait"):
            if not getattr(self, name) > 0:
                raise StorageError(f"{name} is {getattr(self, name)}: it must be positive")
        for name in ("memory_bytes", "disk_bytes", "retries", "first_wait"):
            if not getattr(self, name) >= 0:
                raise StorageError(f"{name} is {getattr(self, name)}: it must not be negative")


def is_url(path):
    """Whether a str or path names an object rather than a local file: it has a scheme, `s3://…`."""
    return isinstance(path, str) and re.match(r"[A-Za-z][\w+.:-]*://", path) is not None


def public_url(url):
    """The URL without user, password and signed query: what may stand in a message."""
    return re.sub(r"\?\S*=\S*", "", re.sub(r"://[^/@\s]*@", "://", url))


def in_threads(function, items, workers=8):
    """[function(item) …] in the order of the items, computed by threads; the first exception ends it."""
    items, results = list(items), []
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(items), BLOCK):
            results += pool.map(function, items[start : start + BLOCK])  # which cancels the others when one fails
    return results


def transient(error):
    """Whether a failure may pass: SlowDown and other 5xx, timeouts, broken connections, cut bodies.

    s3fs turns S3's codes into OSError with an errno (503 is EBUSY, 403 PermissionError, 404 FileNotFoundError);
    botocore and aiohttp have classes of their own, told by name so that neither need be installed.
    """
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status in (408, 429) or status >= 500
    named = any(kind.__name__ in PASSING for kind in type(error).__mro__)
    return named or isinstance(error, OSError) and error.errno not in NO_USE_TRYING


# ---------------------------------------------------------------------------------------------- tiers


@contextlib.contextmanager
def _locked(path):
    """The file at `path`, created when missing, held by one thread of one process at a time."""
    import fcntl  # POSIX only; local data needs none of this

    with open(path, "a+b") as file:  # closing it, or dying, releases the lock
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


def _rewrite(file, content):
    file.seek(0)
    file.truncate()
    file.write(content)


class TokenBucket:
    """At most `rate` requests per second in the long run, `burst` at once; shared through a small file.

    The file holds the tokens left and when that was. Who takes one when there is none gets into debt and waits
    it off, so waiting processes are served in the order of their asking.
    """

    def __init__(self, path, rate, burst, clock=time.time):
        """path: the file; rate: tokens per second; burst: most tokens; clock: seconds, the same in all processes."""
        self.path, self.rate, self.burst, self.clock = path, rate, burst, clock

    def take(self):
        """Take one token. Returns the seconds to wait before the request may be sent."""
        with _locked(self.path) as file:
            now, content = self.clock(), file.read()
            left, since = struct.unpack("<2d", content) if len(content) == 16 else (self.burst, now)
            left = min(self.burst, left + max(0.0, now - since) * self.rate) - 1
            _rewrite(file, struct.pack("<2d", left, now))
        return max(0.0, -left / self.rate)


class MemoryTier:
    """Contents by key, at most `limit` bytes in all; the least recently used go first. Guard it with a lock."""

    def __init__(self, limit):
        """limit: bytes."""
        self.limit, self.size, self._held = limit, 0, OrderedDict()

    def get(self, key):
        """The content, or None."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key, content):
        """Keep a content, unless it is larger than the whole tier."""
        if len(content) > self.limit or key in self._held:
            return
        while self.size + len(content) > self.limit:
            self.size -= len(self._held.popitem(last=False)[1])
        self._held[key] = content
        self.size += len(content)


class DiskTier:
    """Contents by key in files `ab/abcd…`, at most `limit` bytes in all, shared by threads and processes.

    A file is the content's SHA-256 and the content. It appears at once under its name (rename), is not flushed
    to the disk (the digest tells what a crash tore), and its modification time is when it was last used. The
    file `total` holds the bytes of all files and is the lock of every writer; it may be too large, never too small.
    """

    def __init__(self, folder, limit):
        """folder: pathlib.Path, made when missing; limit: bytes."""
        self.folder, self.limit, self.damaged = folder, limit, 0
        self._complained = False
        for name in ("files", "locks"):
            (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, key):
        """The file of a key (hexadecimal)."""
        return self.folder / "files" / key[:2] / key

    def locked(self, key):
        """A context in which no other thread or process fetches this key (nor those that share its lock)."""
        return _locked(self.folder / "locks" / key[:2])

    def get(self, key):
        """(digest, content), or None when there is no such file or it is damaged, which removes it."""
        path = self.path(key)
        try:
            with open(path, "rb") as file:
                digest, content = file.read(DIGEST), file.read()
        except OSError:
            return None
        if hashlib.sha256(content).digest() != digest:
            self.damaged += 1
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # another process may just have evicted it
            os.utime(path)
        return digest, content

    def put(self, key, digest, content):
        """Keep a content; a disk that cannot take it is said once and does not stop the run."""
        size = DIGEST + len(content)
        if size > self.limit:
            return
        path = self.path(key)
        temporary = path.with_name(f".{key}.tmp")
        try:
            with _locked(self.folder / "total") as file:
                recorded = file.read()
                total = struct.unpack("<q", recorded)[0] if len(recorded) == 8 else None
                if total is None or total + size > self.limit:
                    total = self._evict(min(self.limit - size, int(self.limit * ROOMY)))
                _rewrite(file, struct.pack("<q", total + size))
                path.parent.mkdir(exist_ok=True)
                with open(temporary, "wb") as written:
                    written.write(digest)
                    written.write(content)
                os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not self._complained:
                print(f"{self.folder}: {error.strerror}; going on without writing to the cache", file=sys.stderr)
            self._complained = True

    def _evict(self, allowed):
        """Remove the least recently used files until `allowed` bytes are left. Returns the bytes left."""
        files = []
        for path in (self.folder / "files").glob("*/*"):
            if path.name.startswith("."):  # of a writer that died: the living hold the lock
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= allowed:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


# ---------------------------------------------------------------------------------------------- the store


@dataclass(frozen=True)
class Info:
    """What an object was when it was first met."""

    folder: bool
    size: int  # bytes; −1 where the store does not say
    version: str  # changes with the content, as far as the store can tell


class Store:
    """Reads objects by URL through a memory and a disk tier; for any number of threads.

    counts: Counter — "memory" and "disk" hits, "requests" sent, "retries" among them, "bytes" fetched.
    Make it after forking, not before: the connections of a file system belong to one process.
    """

    def __init__(self, settings=StoreSettings(), sleep=time.sleep, clock=time.time):
        """settings: StoreSettings; sleep, clock: time, for tests. Raises StorageError for an unusable cache folder."""
        self.settings, self.counts = settings, Counter()
        folder = pathlib.Path(settings.cache).expanduser()
        try:
            self.disk = DiskTier(folder, settings.disk_bytes)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be the cache of objects: {error.strerror}") from error
        self.memory = MemoryTier(settings.memory_bytes)
        self.bucket = TokenBucket(folder / "requests", settings.requests_per_second, settings.burst, clock)
        self._sleep, self._lock = sleep, threading.Lock()
        self._systems, self._infos, self._listings, self._digests, self._coming = {}, {}, {}, {}, {}
        self._queue = None  # of `ahead`, made with its threads when first needed

    def path(self, url):
        """The RemotePath of a URL."""
        scheme, _, rest = url.partition("://")
        if scheme in ROOTLESS and not rest.startswith("/"):
            rest = f"/{rest}" if scheme == "memory" else os.path.abspath(rest)
        root, _, inside = ("", "", rest) if scheme in ROOTLESS else rest.partition("/")
        return RemotePath(self, f"{scheme}://{root}") / inside

    def read(self, url):
        """The content of an object. url: str. Returns bytes. Raises StorageError, MissingError."""
        with self._lock:
            content, coming = self.memory.get(url), self._coming.get(url)
            if content is not None:
                self.counts["memory"] += 1
                return content
            if coming is None:
                mine = self._coming[url] = Future()
        if coming is None:
            self._fill(url, mine)
            coming = mine
        return coming.result()

    def ahead(self, urls):
        """Begin to fetch objects that will soon be read; at most twice as many as there are threads wait at a time.

        A failure is kept for the reader that comes meanwhile, and otherwise forgotten: a later read tries again.
        """
        for url in urls:
            with self._lock:
                if url in self._coming or self.memory.get(url) is not None:
                    continue
                if len(self._coming) >= 2 * self.settings.workers:
                    return
                future = self._coming[url] = Future()
                if self._queue is None:
                    self._queue = queue.SimpleQueue()
                    for _ in range(self.settings.workers):  # daemons: a program that ends waits for no retry
                        threading.Thread(target=self._work, daemon=True).start()
            self._queue.put((url, future))

    def info(self, url):
        """The Info of an object or folder, asked once. Raises MissingError, StorageError."""
        if url not in self._infos:
            found = self._ask(url, lambda: self._system(url).info(url))
            self._infos.setdefault(url, _info(found))
        return self._infos[url]

    def find(self, url):
        """URLs of all objects below a folder, sorted, asked once; their Infos are known afterwards.

        A listing counts as one request, though a store may give it in pages of a thousand.
        """
        if url not in self._listings:
            system = self._system(url)
            root = system._strip_protocol(url).rstrip("/")
            listed = self._ask(url, lambda: system.find(url, detail=True))
            found = {url.rstrip("/") + name[len(root) :]: _info(details) for name, details in listed.items()}
            for name, info in found.items():
                self._infos.setdefault(name, info)
            self._listings.setdefault(url, sorted(found))
        return self._listings[url]

    def pause(self, url, attempt):
        """Seconds before try attempt + 1: first_wait · 2^attempt · (½ + ½u), u fixed by seed, URL and attempt."""
        digest = hashlib.sha256(f"{self.settings.seed}/{url}/{attempt}".encode()).digest()
        share = 0.5 + int.from_bytes(digest[:8], "big") / 2**65
        return min(self.settings.longest_wait, self.settings.first_wait * 2**attempt) * share

    def _work(self):
        while True:
            self._fill(*self._queue.get())

    def _fill(self, url, future):
        """Load an object and hand it to everybody who waits for it."""
        try:
            content = self._load(url)
        except BaseException as error:
            with self._lock:
                del self._coming[url]
            future.set_exception(error)
        else:
            with self._lock:
                self.memory.put(url, content)
                del self._coming[url]
            future.set_result(content)

    def _load(self, url):
        """From the disk tier, else from the object store, once for all processes that share the disk tier."""
        info = self.info(url)
        key = hashlib.sha256(f"{url}\0{info.version}\0{info.size}".encode()).hexdigest()
        cached = self.disk.get(key)
        if cached is None:
            with self.disk.locked(key):
                cached = self.disk.get(key)  # another process may have been first
                if cached is None:
                    content = self._ask(url, lambda: self._whole(url, info))
                    digest = self._unchanged(url, hashlib.sha256(content).digest())
                    self.disk.put(key, digest, content)
                    return content
        self.counts["disk"] += 1
        self._unchanged(url, cached[0])
        return cached[1]

    def _whole(self, url, info):
        content = self._system(url).cat_file(url)
        if info.size >= 0 and len(content) != info.size:
            raise CutShortError(f"{len(content)} of {info.size} bytes arrived")
        self.counts["bytes"] += len(content)
        return content

    def _unchanged(self, url, digest):
        if self._digests.setdefault(url, digest) != digest:
            raise StorageError(f"{public_url(url)}: the object changed since it was first read; start again")
        return digest

    def _ask(self, url, request):
        """Send a request within the rate, again after transient failures. Raises StorageError, MissingError.

        The cause is not chained: what a library says may hold a signed URL.
        """
        tries = self.settings.retries + 1
        for attempt in range(tries):
            if wait := self.bucket.take():
                self._sleep(wait)
            self.counts["requests"] += 1
            try:
                return request()
            except StorageError:
                raise
            except FileNotFoundError:
                raise MissingError(f"{public_url(url)}: no such object") from None
            except Exception as error:  # each store raises classes of its own
                reason = public_url(f"{type(error).__name__}: {error}".replace(url, public_url(url))).split("\n")[0]
                if not transient(error):
                    raise StorageError(f"{public_url(url)}: {reason}") from None
                if attempt + 1 == tries:
                    raise StorageError(f"{public_url(url)}: {reason} ({tries} times)") from None
            self.counts["retries"] += 1
            self._sleep(self.pause(url, attempt))

    def _system(self, url):
        """The fsspec file system of a URL's scheme, which leaves retrying and listing caches to us."""
        scheme = url.partition("://")[0]
        with self._lock:
            if scheme not in self._systems:
                self._systems[scheme] = _open_system(url, scheme, self.settings.options)
            return self._systems[scheme]


def _open_system(url, scheme, options):
    if scheme in ("s3", "s3a"):
        # One request per read, at our rate: no retries of botocore's, no question for the size before each GET.
        options = {"config_kwargs": {"retries": {"total_max_attempts": 1}}, "max_concurrency": 1} | options
    try:
        import fsspec

        system = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError:
        needs = f"reading {scheme}:// needs the extra `storage`: pip install '.[storage]'"
        raise StorageError(f"{public_url(url)}: {needs}") from None
    except (ValueError, TypeError) as error:
        raise MissingError(f"{public_url(url)}: {error}") from None
    system.retries = 1  # tries of s3fs, which would not count against the rate; other file systems have none
    return system


def _info(details):
    """fsspec's dict to an Info: the entity tag where there is one, else the time of the last change."""
    marks = (details.get(name) for name in ("ETag", "etag", "generation", "mtime", "created", "LastModified"))
    size = details.get("size")
    return Info(details.get("type") == "directory", -1 if size is None else size, str(next(filter(None, marks), "")))


@dataclass(frozen=True)
class RemotePath:
    """An object or folder of a Store, with as much of pathlib.Path as reading data needs. Shown without credentials."""

    store: Store = field(repr=False)
    url: str = field(repr=False)

    def __str__(self):
        return public_url(self.url)

    def __lt__(self, other):
        return self.url.split("/") < other.url.split("/")

    def __truediv__(self, name):
        """`name` below this folder; `..` steps up, `/name` begins at the bucket. Raises StorageError above it."""
        scheme, _, rest = self.url.partition("://")
        root, _, inside = ("", "", rest) if scheme in ROOTLESS else rest.partition("/")
        parts = [] if name.startswith("/") else [part for part in inside.split("/") if part]
        for part in name.split("/"):
            if part == ".." and not parts:
                raise MissingError(f"{self}: {name} leaves the bucket")
            if part == "..":
                parts.pop()
            elif part not in ("", "."):
                parts.append(part)
        return RemotePath(self.store, f"{scheme}://{root}/{'/'.join(parts)}")

    @property
    def name(self):
        """The last part of the URL."""
        return pathlib.PurePosixPath(self.url.partition("://")[2]).name

    @property
    def suffix(self):
        """The name's ending with its dot."""
        return pathlib.PurePosixPath(self.name).suffix

    @property
    def stem(self):
        """The name without its suffix."""
        return pathlib.PurePosixPath(self.name).stem

    @property
    def parent(self):
        """The folder that holds it."""
        return self / ".."

    def with_suffix(self, suffix):
        """The same name with another ending."""
        return self.parent / pathlib.PurePosixPath(self.name).with_suffix(suffix).name

    def relative_to(self, folder):
        """The path below `folder`, a PurePosixPath."""
        return pathlib.PurePosixPath(self.url[len(folder.url) :].lstrip("/"))

    def exists(self):
        """Whether there is such an object or folder. Raises StorageError when the store does not answer."""
        try:
            self.store.info(self.url)
        except MissingError:
            return False
        return True

    def is_dir(self):
        """Whether it is a folder."""
        return self.exists() and self.store.info(self.url).folder

    def is_file(self):
        """Whether it is an object."""
        return self.exists() and not self.store.info(self.url).folder

    def stat(self):
        """What is known of it: st_size, bytes."""
        return types.SimpleNamespace(st_size=self.store.info(self.url).size)

    def rglob(self, pattern):
        """All objects below, at any depth; the only pattern is "*"."""
        return [RemotePath(self.store, url) for url in self.store.find(self.url)]

    def iterdir(self):
        """The objects directly below."""
        return [path for path in self.rglob("*") if path.parent == self]

    def read_bytes(self):
        """Its content."""
        return self.store.read(self.url)

    def read_text(self, encoding="utf-8"):
        """Its content as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode="rb"):
        """A file in memory with its content."""
        return io.BytesIO(self.read_bytes())


# ---------------------------------------------------------------------------------------------- bench


def bench(data, tokens_per_second, settings, ahead=8):
    """Print what reaches a trainer from each tier, against what it eats.

    One thread reads every row of a manifest in order, fetching `ahead` rows ahead, decodes and tokenises it: as the
    trainer's own thread does. Three passes: an empty cache, the disk tier alone (a new Store), the memory tier.

    data: URL of a `.jsonl` manifest; tokens_per_second: float — the trainer's appetite; settings: StoreSettings, its
    `cache` is replaced by an empty folder. Returns {tier: (examples/s, MB/s, tokens/s)}. Raises StorageError.
    """
    if not is_url(data) or not data.endswith(".jsonl"):
        raise StorageError(f"{data}: give the URL of a .jsonl manifest")
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, cache=folder)
        print("tier     examples/s     MB/s   tokens/s x appetite  waiting requests")
        store = Store(settings)
        for tier in ("cold", "disk", "memory"):
            store = Store(settings) if tier == "disk" else store
            before = store.counts["requests"]
            examples, size, tokens, seconds, waited = _one_pass(store, data, ahead)
            rates[tier] = examples / seconds, size / 1e6 / seconds, tokens / seconds
            print("{:8s} {:10.1f} {:8.3f} {:10.0f} {:10.1f} {:8.0%} {:8d}".format(
                tier, *rates[tier], rates[tier][2] / tokens_per_second, waited / seconds, store.counts["requests"] - before))
    print("examples/s, MB/s: rows and bytes of their files; tokens/s: of text and media, ready for packing; all by one thread.\n"
          "waiting: share of the time in which that thread stood still for bytes.")  # fmt: skip
    return rates


def _one_pass(store, data, ahead):
    """Read, decode and tokenise every row. Returns (examples, bytes, tokens, seconds, seconds waited for bytes)."""
    from media import MediaConfig, image_item, load_image, load_video, merged_tokens, video_items  # with torch, which
    from tokenizer import Tokenizer  # the store itself does without

    tokenizer, media_config = Tokenizer(), MediaConfig()
    began = time.perf_counter()
    manifest = store.path(data)
    content = manifest.read_bytes()
    waited, size, tokens = time.perf_counter() - began, len(content), 0
    rows = [_files(json.loads(line), manifest.parent) for line in content.splitlines() if line.strip()]
    for number, (text, files) in enumerate(rows):
        store.ahead(path.url for _, following in rows[number : number + ahead + 1] for path in following)
        asked = time.perf_counter()
        size += sum(len(path.read_bytes()) for path in files)
        waited += time.perf_counter() - asked
        tokens += len(tokenizer.encode(text, specials=False)) + 1
        for path in files:
            animated = path.suffix in (".gif", ".webp", ".apng")
            items = video_items(load_video(path), media_config) if animated else [image_item(load_image(path), media_config)]
            tokens += sum(merged_tokens(item.grid) for item in items)
    return len(rows), size, tokens, time.perf_counter() - began, waited


def _files(row, folder):
    """The text of a manifest's row and the RemotePaths of its media."""
    names = [row.get("images", []), row.get("video", [])]
    flat = [name for given in names for name in ([given] if isinstance(given, str) else given)]
    return row["text"], [folder.store.path(name) if is_url(name) else folder / name for name in flat]


def appetite(run=None, steps=12, skipped=4):
    """Tokens/s that joint training of the toy preset eats: the median over its logged steps.

    run: a directory that train_small.py wrote; None: train_small.py is started for `steps` joint steps in a
    directory of its own and stopped. The first `skipped` steps, which warm up, do not count.
    Raises StorageError when the trainer does not start.
    """
    if run is not None:
        rates = _logged(pathlib.Path(run) / "metrics.jsonl")
    else:
        with tempfile.TemporaryDirectory() as folder:
            stages = [flag for name in ("small-lm", "vit", "text", "align", "long") for flag in (f"--{name}-steps", "0")]
            trainer = subprocess.Popen(
                [sys.executable, pathlib.Path(__file__).with_name("train_small.py"), *stages, "--joint-steps", str(10 * steps),
                 "--run", f"{folder}/run"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            try:
                while trainer.poll() is None and len(rates := _logged(pathlib.Path(folder) / "run/metrics.jsonl")) < steps:
                    time.sleep(0.2)
            finally:
                trainer.kill()
                trainer.wait()
    if len(rates) <= skipped:
        raise StorageError(f"{run or 'train_small.py'}: {len(rates)} logged steps; more than {skipped} are needed")
    return statistics.median(rates[skipped:])


def _logged(path):
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["tokens_per_s"] for line in lines if line.endswith("\n")]


def main(arguments=None):
    """`python storage.py bench --data URL`. Exit code 2 on misuse or when an object cannot be read."""
    cli = argparse.ArgumentParser(description="What each tier of the store gives, against what a training step takes.")
    command = cli.add_subparsers(dest="command", required=True).add_parser("bench", help="examples/s and MB/s of each tier")
    command.add_argument("--data", required=True, help="URL of a .jsonl manifest")
    command.add_argument("--run", help="take the appetite from this run's metrics.jsonl instead of training a few steps")
    command.add_argument("--tokens-per-second", type=float, help="the appetite itself")
    for name in ("memory_bytes", "disk_bytes", "requests_per_second", "burst", "workers"):
        default = getattr(StoreSettings, name)
        command.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=f"default {default}")
    given = cli.parse_args(arguments)
    try:
        settings = StoreSettings(memory_bytes=given.memory_bytes, disk_bytes=given.disk_bytes, workers=given.workers,
                                 requests_per_second=given.requests_per_second, burst=given.burst)  # fmt: skip
        wanted = given.tokens_per_second or appetite(given.run)
        taken = f"median of the logged steps of {given.run or 'a toy joint training, started for this'}"
        source = "as given" if given.tokens_per_second else taken
        print(f"appetite {wanted:,.0f} tokens/s ({source}; as if every token came from this data)")
        bench(given.data, wanted, settings)
    except ValueError as error:  # StorageError, or a picture's MediaError
        print(f"storage.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
