"""Claims about storage.py: what is read never depends on tiers, threads, processes or failures; only when it arrives does.

Against a real HTTP server with moto's S3 behind it, which fails on request.
Run: .venv/bin/python -m pytest tests/test_storage.py
"""

import errno
import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import manifest
import storage
import train_small
from data import Blend
from manifest import DataError, open_manifest
from media import MediaConfig
from storage import (
    DiskTier,
    MemoryTier,
    MissingError,
    RemotePath,
    StorageError,
    Store,
    StoreSettings,
    TokenBucket,
    in_threads,
    is_url,
    public_url,
    transient,
)
from tokenizer import Tokenizer

aiobotocore = pytest.importorskip("aiobotocore.session")
boto3 = pytest.importorskip("boto3")
fsspec = pytest.importorskip("fsspec")
werkzeug_app = pytest.importorskip("moto.moto_server.werkzeug_app")
serving = pytest.importorskip("werkzeug.serving")

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEYS = {"key": "AKIATEST", "secret": "hidden-secret"}
TOKENIZER = Tokenizer()


# ------------------------------------------------------------------------------------------ the server


class FaultyS3:
    """moto's S3 in front of which requests fail as told: faults["GET /bucket/key"] lists "slow", "denied", "cut", …"""

    def __init__(self):
        self.app = werkzeug_app.DomainDispatcherApplication(werkzeug_app.create_backend_app)
        self.faults, self.log = {}, []

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.log.append((method, path))
        waiting = self.faults.get(f"{method} {path}") or self.faults.get(method)
        fault = waiting.pop(0) if waiting else None
        if fault in ("slow", "denied"):
            status, code = {"slow": ("503 Slow Down", "SlowDown"), "denied": ("403 Forbidden", "AccessDenied")}[fault]
            body = f"<Error><Code>{code}</Code><Message>{code} for AKIATEST</Message></Error>".encode()
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body] if method == "GET" else []
        if fault is None:
            return self.app(environ, start_response)
        seen = []
        body = b"".join(self.app(environ, lambda status, headers, *_: seen.append((status, headers))))
        status, headers = seen[0]
        if fault == "garbled":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault in ("cut", "short"):  # "cut" breaks the connection before the promised end
            body = body[: len(body) // 2]
        if fault == "short":  # an honest length of half the object, and no checksum
            headers = [(k, str(len(body)) if k.lower() == "content-length" else v) for k, v in headers]
            headers = [(k, v) for k, v in headers if not k.lower().startswith("x-amz-checksum")]
        start_response(status, headers)
        return [body]

    def gets(self):
        """Paths of all objects asked for, in order."""
        return [path for method, path in self.log if method == "GET"]


@pytest.fixture(scope="module")
def endpoint():
    app = FaultyS3()
    server = serving.make_server("127.0.0.1", 0, app, threaded=True, request_handler=werkzeug_app.MotoRequestHandler)
    server.log = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    app.url = f"http://127.0.0.1:{server.server_port}"
    app.client = boto3.client(
        "s3", endpoint_url=app.url, aws_access_key_id=KEYS["key"], aws_secret_access_key=KEYS["secret"],
        region_name="us-east-1",
    )  # fmt: skip
    app.client.create_bucket(Bucket="k25")
    app.session = aiobotocore.get_session()  # which has read what S3 is, for all stores
    yield app
    server.shutdown()


@pytest.fixture
def s3(endpoint):
    endpoint.faults.clear()
    endpoint.log.clear()
    return endpoint


@pytest.fixture
def store_of(s3, tmp_path):
    """A function that makes a Store on the server; `waits` collects what it would have slept."""

    def make(cache="cache", **settings):
        options = KEYS | {"endpoint_url": s3.url, "session": s3.session}
        settings = {"requests_per_second": 1e6, "first_wait": 0.5, "options": options} | settings
        store = Store(StoreSettings(cache=str(tmp_path / cache), **settings), sleep=lambda seconds: waits.append(seconds))
        store.waits = waits
        return store

    waits = []
    return make


def put(s3, key, content):
    s3.client.put_object(Bucket="k25", Key=key, Body=content)
    return f"s3://k25/{key}"


def png(colour, size=(28, 28)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def gif(colours):
    frames, file = [Image.new("RGB", (28, 28), colour) for colour in colours], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=500)
    return file.getvalue()


def tree(pictures=7):
    """{name: content} of a manifest with texts, pictures, a clip, a list of frames and a folder of frames."""
    files, rows = {"clip.gif": gif([(0, 0, 0), (90, 0, 0), (0, 200, 0)])}, []
    for number in range(pictures):
        files[f"pictures/{number}.png"] = png((20 * number, 0, 0))
        rows.append({"text": f"<image>shade {number}", "images": [f"pictures/{number}.png"]})
        rows.append({"text": f"the note {number} of mine"})
    for number in (10, 9):
        files[f"frames/frame{number}.png"] = png((0, 9 * number, 0))
    rows.append({"text": "<video>it blinks", "video": "clip.gif"})
    rows.append({"text": "<video>listed", "video": ["pictures/0.png", "./pictures/../pictures/1.png"], "fps": 1})
    rows.append({"text": "<video>a folder", "video": "frames"})
    return files | {"mine.jsonl": "\n".join(map(json.dumps, rows)).encode()}


@pytest.fixture(scope="module")
def uploaded(endpoint):
    """The tree on the server. Returns the URL of its manifest."""
    for name, content in tree().items():
        put(endpoint, f"data/{name}", content)
    return "s3://k25/data/mine.jsonl"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same tree on the disk. Returns the path of its manifest."""
    folder = tmp_path_factory.mktemp("local")
    for name, content in tree().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / "mine.jsonl"


def blend(source, **settings):
    return Blend([(source, 1.0)], None, 3, 2, 60, TOKENIZER, MediaConfig(), **settings)


def digest(batch):
    """A hash of everything in a batch."""
    parts = [getattr(batch, name) for name in ("ids", "targets", "positions", "segment_ids", "patches", "media_slots")]
    return hashlib.sha256(b"".join(b"-" if part is None else part.numpy().tobytes() for part in parts)).hexdigest()


def digests(source, n=10, **settings):
    mix = blend(source, **settings)
    return [digest(next(mix)) for _ in range(n)]


# ----------------------------------------------------------------------------------------------- tiers


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40)), max_size=40))
def test_the_memory_tier_is_bounded_and_forgets_the_least_recently_used(operations):
    tier, used = MemoryTier(100), []
    for key, size in operations:
        content = tier.get(key)
        if content is None:
            content = bytes(size)
            tier.put(key, content)
        used = [pair for pair in used if pair[0] != key] + [(key, len(content))]
        while sum(size for _, size in used) > 100:
            used.pop(0)
        assert [(key, len(content)) for key, content in tier._held.items()] == used
        assert tier.size == sum(size for _, size in used) <= 100


def key_of(number):
    return hashlib.sha256(bytes([number])).hexdigest()


def fill(tier, number, size):
    content = bytes([number]) * size
    tier.put(key_of(number), hashlib.sha256(content).digest(), content)


def held(tier, numbers=range(20)):
    return [number for number in numbers if tier.path(key_of(number)).exists()]


def test_the_disk_tier_is_bounded_and_forgets_the_least_recently_used(tmp_path):
    """Two tiers on one folder, as two processes have: neither knows of the other's files but by the folder."""
    one, two = DiskTier(tmp_path, 10 * 132), DiskTier(tmp_path, 10 * 132)
    for number in range(8):
        fill(one, number, 100)
        os.utime(one.path(key_of(number)), (number, number))
    assert two.get(key_of(0))[1] == bytes(100)  # used just now, by another process
    for number in range(8, 20):
        fill(two if number % 2 else one, number, 100)
        assert sum(path.stat().st_size for path in (tmp_path / "files").glob("*/*")) <= 10 * 132
        os.utime(one.path(key_of(number)), (number, number))
        assert number in held(one) and 0 in held(one)
    assert 1 not in held(one)
    fill(one, 1, 10 * 132)
    assert 1 not in held(one)  # larger than the tier, and nothing was thrown out for it
    assert 19 in held(one)


def test_a_file_that_a_dead_writer_left_is_removed_and_not_read(tmp_path):
    tier = DiskTier(tmp_path, 1000)
    fill(tier, 0, 10)
    orphan = tier.path(key_of(0)).with_name(f".{key_of(0)}.tmp")
    orphan.write_bytes(b"half")
    fill(tier, 1, 960)
    assert not orphan.exists() and held(tier) == [1]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:10], lambda b: b"", lambda b: b[:40] + b"?" + b[41:],
                                    lambda b: b + b"x"])  # fmt: skip
def test_a_damaged_file_of_the_cache_is_noticed_and_fetched_again(s3, store_of, damage):
    url = put(s3, "object", b"the content of an object")
    store_of().read(url)
    (file,) = [path for path in (store_of().disk.folder / "files").glob("*/*")]
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    s3.log.clear()
    store = store_of()
    assert store.read(url) == b"the content of an object" and s3.gets() == ["/k25/object"]
    assert store.disk.damaged == 1 and file.read_bytes() == whole
    again = store_of()
    assert again.read(url) == b"the content of an object" and again.counts["disk"] == 1


def test_each_tier_is_asked_before_the_next(s3, store_of):
    url = put(s3, "object", b"x" * 1000)
    store = store_of()
    assert [store.read(url) for _ in range(3)] == [b"x" * 1000] * 3
    assert store.counts == {"requests": 2, "bytes": 1000, "memory": 2}  # what it is, and its content
    other = store_of(memory_bytes=999)
    assert [other.read(url) for _ in range(2)] == [b"x" * 1000] * 2
    assert other.counts == {"requests": 1, "disk": 2}
    bare = store_of("none", memory_bytes=0, disk_bytes=0)
    assert [bare.read(url) for _ in range(2)] == [b"x" * 1000] * 2
    assert bare.counts == {"requests": 3, "bytes": 2000}


def test_a_new_version_of_an_object_is_not_served_from_an_old_cache(s3, store_of):
    assert store_of().read(put(s3, "versions", b"first")) == b"first"
    assert store_of().read(put(s3, "versions", b"other")) == b"other"


def test_an_object_that_changes_during_a_run_is_an_error_and_leaves_no_trace_in_the_cache(s3, store_of):
    url = put(s3, "changing", b"first")
    store = store_of(memory_bytes=0, disk_bytes=0)
    assert store.read(url) == b"first"
    put(s3, "changing", b"other")
    with pytest.raises(StorageError, match="s3://k25/changing: the object changed since it was first read"):
        store.read(url)


def test_a_full_disk_is_said_once_and_stops_nothing(s3, store_of, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = store_of(memory_bytes=0)
    monkeypatch.setattr(storage.os, "replace", full)
    for name in ("a", "b"):
        assert store.read(put(s3, name, name.encode())) == name.encode()
    assert capsys.readouterr().err.count("No space left on device; going on without writing to the cache") == 1
    assert not list((store.disk.folder / "files").glob("*/*"))


PROCESS = """
import random, sys
from storage import Store, StoreSettings
cache, endpoint, disk = sys.argv[1:]
store = Store(StoreSettings(cache=cache, disk_bytes=int(disk), memory_bytes=0, requests_per_second=1e6,
                            options={"key": "k", "secret": "s", "endpoint_url": endpoint}))
order = list(range(12)) * 2
random.Random(0).shuffle(order)
print("ready", flush=True)
sys.stdin.readline()
for number in order:
    content = store.read(f"s3://k25/shared/{number}")
    assert content == bytes([number]) * 50_000, (number, len(content), content[:3])
"""


@pytest.mark.parametrize("disk", [10_000_000, 120_000])
def test_processes_share_a_cache_without_a_torn_file_and_fetch_once_what_fits(s3, tmp_path, disk):
    for number in range(12):
        put(s3, f"shared/{number}", bytes([number]) * 50_000)
    s3.log.clear()
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "cache"), s3.url, str(disk)]  # all want the same next
    processes = [subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    stored = sum(path.stat().st_size for path in (tmp_path / "cache" / "files").glob("*/*"))
    assert 0 < stored <= disk
    assert (len(s3.gets()) == 12) == (disk == 10_000_000)


# -------------------------------------------------------------------------------------- rate, failures


@given(st.lists(st.tuples(st.floats(0, 2), st.booleans()), min_size=1, max_size=60), st.floats(0.5, 50), st.integers(1, 9))
def test_no_window_of_time_sees_more_requests_than_the_rate_and_a_burst(tmp_path_factory, asked, rate, burst):
    """Two buckets on one file, as two processes have; a request is sent when its wait is over."""
    now, path = [1000.0], tmp_path_factory.mktemp("bucket") / "requests"
    buckets = [TokenBucket(path, rate, burst, clock=lambda: now[0]) for _ in range(2)]
    sent = []
    for pause, which in asked:
        now[0] += pause
        sent.append(now[0] + buckets[which].take())
    sent.sort()
    for first in range(len(sent)):
        for last in range(first, len(sent)):
            assert last - first + 1 <= burst + rate * (sent[last] - sent[first]) + 1e-6


def test_a_damaged_or_future_bucket_does_not_stop_requests(tmp_path):
    bucket = TokenBucket(tmp_path / "requests", 10, 5, clock=lambda: 100.0)
    (tmp_path / "requests").write_bytes(b"torn")
    assert bucket.take() == 0
    TokenBucket(tmp_path / "requests", 10, 5, clock=lambda: 1e9).take()  # a clock that was set back since
    assert [bucket.take() for _ in range(5)] == [0, 0, 0, 0, pytest.approx(0.1)]


def test_a_store_waits_for_the_bucket(s3, store_of):
    store = store_of(requests_per_second=0.001, burst=2)
    store.read(put(s3, "a", b"a"))
    assert store.waits == []
    store.read(put(s3, "b", b"b"))
    assert store.waits == [pytest.approx(1000, rel=0.1), pytest.approx(2000, rel=0.1)]


@pytest.mark.parametrize("fault", ["slow", "cut", "short", "garbled"])
def test_a_transient_failure_is_tried_again_after_the_pauses_that_are_fixed(s3, store_of, fault):
    """503 SlowDown; a connection that breaks in the middle of a body; half a body; a body that is not what was stored."""
    url = put(s3, "flaky", b"0123456789" * 1000)
    store = store_of()
    store.info(url)
    s3.faults["GET /k25/flaky"] = [fault] * 3
    s3.log.clear()
    assert store.read(url) == b"0123456789" * 1000
    assert s3.gets() == ["/k25/flaky"] * 4 and store.counts["retries"] == 3  # nothing below tries on its own
    assert store.waits == [store.pause(url, attempt) for attempt in range(3)]
    s3.faults["HEAD /k25/flaky"] = ["slow"] * 2
    assert store_of("other").read(url) == b"0123456789" * 1000 and len(store.waits) == 5


def test_pauses_double_are_spread_and_can_be_repeated(store_of):
    store, again, other = store_of(), store_of(), store_of(seed=1)
    for attempt in range(4):
        assert 0.25 * 2**attempt <= store.pause("s3://k25/a", attempt) < 0.5 * 2**attempt
        assert store.pause("s3://k25/a", attempt) == again.pause("s3://k25/a", attempt)
        pauses = {s.pause(url, attempt) for s in (store, other) for url in ("s3://k25/a", "s3://k25/b")}
        assert len(pauses) == 4
    assert store.pause("s3://k25/a", 50) <= store.settings.longest_wait


def test_patience_ends_with_one_line_that_names_the_object_but_no_credentials(s3, store_of):
    url = put(s3, "never", b"x")
    s3.faults["GET /k25/never"] = ["slow"] * 99
    store = store_of(retries=2)
    with pytest.raises(StorageError) as caught:
        store.read(url)
    assert str(caught.value).startswith("s3://k25/never: OSError") and str(caught.value).endswith("(3 times)")
    assert "\n" not in str(caught.value) and "hidden" not in str(caught.value) and caught.value.__cause__ is None
    s3.faults.clear()
    assert store.read(url) == b"x"  # a failure is not remembered


def test_what_will_not_pass_is_not_tried_again(s3, store_of):
    store, url = store_of(), put(s3, "private", b"x")
    with pytest.raises(MissingError, match="^s3://k25/nowhere: no such object$"):
        store.read("s3://k25/nowhere")
    with pytest.raises(MissingError, match="no such object"):
        store.read("s3://no-such-bucket/x")
    s3.faults["GET /k25/private"] = ["denied"] * 9
    with pytest.raises(StorageError, match="^s3://k25/private: PermissionError"):
        store.read(url)
    assert store.waits == [] and store.counts["retries"] == 0


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    nobody = {"endpoint_url": "http://127.0.0.1:9"}
    settings = StoreSettings(cache=str(tmp_path), retries=1, options=KEYS | nobody)
    with pytest.raises(StorageError, match=r"^s3://k25/x: .*127.0.0.1:9.*\(2 times\)$"):
        Store(settings, sleep=lambda _: None).read("s3://k25/x")


class ClientPayloadError(Exception):  # as aiohttp names it
    pass


class ClientResponseError(Exception):
    def __init__(self, status):
        self.status = status


@pytest.mark.parametrize("error, passes", [
    (OSError(errno.EBUSY, "SlowDown"), True), (OSError(errno.EREMOTEIO, "InternalError"), True), (TimeoutError(), True),
    (ConnectionResetError(), True), (ClientPayloadError("cut"), True), (ClientResponseError(503), True),
    (ClientResponseError(429), True), (ClientResponseError(404), False), (FileNotFoundError(), False),
    (PermissionError("denied"), False), (OSError(errno.EINVAL, "InvalidBucketName"), False), (ValueError("no"), False),
    (IsADirectoryError(), False), (RuntimeError("no idea"), False),
])  # fmt: skip
def test_which_failures_pass(error, passes):
    assert transient(error) is passes


@pytest.mark.parametrize("url, shown", [
    ("https://me:word@host/a.png?X-Signature=abc&b=c", "https://host/a.png"),
    ("s3://key:secret@bucket/a.png", "s3://bucket/a.png"),
    ("s3://bucket/what?.png", "s3://bucket/what?.png"),
    ("https://host/a@b.png", "https://host/a@b.png"),
])  # fmt: skip
def test_messages_show_no_password_and_no_signature(url, shown, tmp_path):
    assert public_url(url) == shown == str(Store(StoreSettings(cache=str(tmp_path))).path(url))


def test_a_failing_library_cannot_leak_the_url_either(tmp_path, monkeypatch):
    url = "memory://me:word@host/a.png?sign=abc"
    store = Store(StoreSettings(cache=str(tmp_path), retries=0))

    def broken(*_):
        raise OSError(f"cannot open {url}\nTraceback")

    monkeypatch.setattr(type(store._system(url)), "info", broken)
    with pytest.raises(StorageError) as caught:
        store.read(url)
    assert str(caught.value) == "memory://host/a.png: OSError: cannot open memory://host/a.png (1 times)"


@pytest.mark.parametrize("name, value", [("requests_per_second", 0), ("workers", 0), ("disk_bytes", -1), ("burst", float("nan"))])
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(StorageError, match=f"{name} is {value}: it must"):
        StoreSettings(**{name: value})


def test_a_cache_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file: cannot be the cache of objects"):
        Store(StoreSettings(cache=str(tmp_path / "file")))


# ----------------------------------------------------------------------------------------- fetch ahead


def test_what_was_fetched_ahead_is_not_fetched_again(s3, store_of):
    urls = [put(s3, f"ahead/{number}", bytes([number]) * 100) for number in range(5)]
    s3.log.clear()
    store = store_of()
    store.ahead(urls)
    assert [store.read(url)[0] for url in urls] == list(range(5))
    assert sorted(s3.gets()) == [f"/k25/ahead/{number}" for number in range(5)]


def test_fetching_ahead_is_bounded_and_a_failure_there_is_the_readers(s3, store_of, monkeypatch):
    store, gate = store_of(workers=2), threading.Event()
    loaded = []
    monkeypatch.setattr(store, "_load", lambda url: gate.wait(10) and loaded.append(url) or b"")
    store.ahead([f"s3://k25/{number}" for number in range(50)])
    assert len(store._coming) == 4
    gate.set()
    for number in range(4):
        store.read(f"s3://k25/{number}")
    assert sorted(loaded) == [f"s3://k25/{number}" for number in range(4)]
    missing = store_of()
    missing.ahead(["s3://k25/nowhere"])
    with pytest.raises(MissingError):
        missing.read("s3://k25/nowhere")
    with pytest.raises(MissingError):
        missing.read("s3://k25/nowhere")


def test_drawing_a_row_fetches_the_next_ones_of_its_epoch_ahead(store_of, uploaded, monkeypatch):
    store, asked = store_of(), []
    (part,) = [part for part in open_manifest(uploaded, store=store).parts("train") if part.modality == "vision"]
    monkeypatch.setattr(store, "ahead", asked.extend)
    part.draw_nth(2, 0)
    rows = [part._row(number, 0) for number in range(2, 3 + manifest.AHEAD)]
    assert {image.url for row in rows for image in row.images} <= set(asked) and asked


def test_threads_keep_the_order_and_the_first_failure_ends_them():
    assert in_threads(lambda n: (time.sleep(0.001 * (5 - n % 5)), n)[1], range(30)) == list(range(30))
    done = []

    def fail(number):
        done.append(number)
        raise StorageError("no answer")

    with pytest.raises(StorageError):
        in_threads(fail, range(10_000), workers=2)
    assert len(done) < storage.BLOCK


# ----------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("base, name, joined", [
    ("s3://b/x", "a.png", "s3://b/x/a.png"), ("s3://b/x/", "../a.png", "s3://b/a.png"), ("s3://b/x", "/a.png", "s3://b/a.png"),
    ("s3://b", "./y/a.png", "s3://b/y/a.png"), ("memory://x/y", "a.png", "memory:///x/y/a.png"),
    ("memory://x", "/a.png", "memory:///a.png"), ("file:///x/y", "../a.png", "file:///x/a.png"), ("s3://b/x", "..", "s3://b/"),
])  # fmt: skip
def test_names_are_joined_as_in_a_file_system(base, name, joined, tmp_path):
    path = Store(StoreSettings(cache=str(tmp_path))).path(base) / name
    assert isinstance(path, RemotePath) and path.url == joined


def test_no_name_leaves_its_bucket(tmp_path):
    with pytest.raises(MissingError, match="s3://b/x: ../../a.png leaves the bucket"):
        Store(StoreSettings(cache=str(tmp_path))).path("s3://b/x") / "../../a.png"


def test_what_is_a_url():
    assert is_url("s3://b/x") and is_url("memory://x") and not is_url("mine.jsonl") and not is_url(pathlib.Path("s3://b"))
    assert not is_url("/a://b") and not is_url("C:\\mine.jsonl")


def test_a_path_answers_like_pathlib(s3, store_of, uploaded):
    store = store_of()
    path = store.path(uploaded)
    assert (path.name, path.stem, path.suffix, path.parent.name) == ("mine.jsonl", "mine", ".jsonl", "data")
    assert path.is_file() and not path.is_dir() and path.parent.is_dir() and not path.parent.is_file()
    assert not (path.parent / "nowhere").exists() and not (path.parent / "nowhere").is_dir()
    assert path.stat().st_size == len(path.read_bytes()) == len(tree()["mine.jsonl"])
    assert path.read_text() == path.open().read().decode() == tree()["mine.jsonl"].decode()
    assert {str(p.relative_to(path.parent)) for p in path.parent.rglob("*")} == set(tree())
    assert {p.name for p in path.parent.iterdir()} == {"mine.jsonl", "clip.gif"}
    assert path.with_suffix(".txt").url == "s3://k25/data/mine.txt"


# -------------------------------------------------------------------------------------- manifests, order


@pytest.mark.parametrize("scheme", ["s3", "memory", "file"])
def test_a_manifest_far_away_gives_the_batches_of_a_local_one(scheme, store_of, uploaded, local):
    url = {"s3": uploaded, "file": f"file://{local}", "memory": "memory://data/mine.jsonl"}[scheme]
    store = store_of()
    if scheme == "memory":
        for name, content in tree().items():
            store._system(url).pipe(f"/data/{name}", content)
        store = store_of(options={})
    if scheme == "file":
        store = store_of(options={})
    assert digests(open_manifest(url, store=store)) == digests(open_manifest(local))


def test_a_local_manifest_may_name_media_far_away(tmp_path, store_of, uploaded, local):
    rows = [json.loads(line) for line in local.read_text().splitlines()]
    for row in rows:
        for key in ("images", "video"):
            if key in row:
                names = [row[key]] if isinstance(row[key], str) else row[key]
                row[key] = [f"s3://k25/data/{name}" for name in names]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert digests(open_manifest(tmp_path / "mine.jsonl", store=store_of())) == digests(open_manifest(local))


def test_a_folder_far_away_gives_the_rows_of_a_local_one(s3, store_of, tmp_path):
    files = {"a.txt": b"words", "deep/b.png": png((9, 9, 9)), "deep/b.txt": b"grey", "c.gif": gif([(0, 0, 0), (9, 0, 0)]),
             "c.md": b"blinks", ".hidden.txt": b"secret", "table.csv": b"1,2", "deep.txt": b"beside"}  # fmt: skip
    for name, content in files.items():
        put(s3, f"folder/{name}", content)
        (tmp_path / "folder" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "folder" / name).write_bytes(content)
    s3.log.clear()
    far, near = open_manifest("s3://k25/folder/", store=store_of()), open_manifest(tmp_path / "folder")
    assert [(row.where, row.text, row.modality) for row in far.train] == [(row.where, row.text, row.modality) for row in near.train]
    assert far.name == "folder" and digests(far) == digests(near)
    assert len(s3.log) <= 4 + 6  # what the folder is, its listing, and each object that is used, once


def test_bad_rows_far_away_are_named_and_an_outage_is_none(s3, store_of):
    put(s3, "bad/good.png", png((1, 1, 1)))
    rows = [{"text": "fine"}, {"text": "<image>", "images": ["nowhere.png"]}, {"text": "<image>x", "images": ["good.png"]},
            {"text": "<image>", "images": ["../../../up.png"]}, {"text": "<image>", "images": ["odd://up.png"]}]  # fmt: skip
    url = put(s3, "bad/mine.jsonl", "\n".join(map(json.dumps, rows)).encode())
    with pytest.raises(DataError, match="3 bad rows") as caught:
        open_manifest(url, store=store_of())
    assert "line 2: missing file nowhere.png" in str(caught.value)
    assert [row.where for row in open_manifest(url, skip_bad=True, store=store_of()).train] == ["line 1", "line 3"]
    s3.faults["GET /k25/bad/good.png"] = ["slow"] * 99
    with pytest.raises(DataError, match="^s3://k25/bad/good.png: .*times"):
        open_manifest(url, skip_bad=True, store=store_of("cold", retries=1))


@pytest.mark.parametrize("url, message", [
    ("s3://k25/nowhere.jsonl", "no such file or folder"), ("s3://k25/data/clip.gif", "neither a .jsonl manifest nor a folder"),
    ("nonsense://x.jsonl", "Protocol not known: nonsense|no such file"),
])  # fmt: skip
def test_a_url_that_is_no_data_is_refused_in_one_line(store_of, uploaded, url, message):
    with pytest.raises(DataError, match=message) as caught:
        open_manifest(url, store=store_of())
    assert "\n" not in str(caught.value)


def test_an_object_that_changes_or_vanishes_after_opening_is_named_with_its_row(s3, store_of):
    url = put(s3, "gone/a.png", png((1, 1, 1)))
    row = put(s3, "gone/mine.jsonl", json.dumps({"text": "<image>", "images": ["a.png"]}).encode())
    source = open_manifest(row, store=store_of("one", memory_bytes=0, disk_bytes=0))
    put(s3, "gone/a.png", png((2, 1, 1)))
    with pytest.raises(DataError, match="line 1: s3://k25/gone/a.png: .*(changed|arrived)"):
        digests(source, 1)
    source = open_manifest(row, store=store_of("two", memory_bytes=0, disk_bytes=0))
    s3.client.delete_object(Bucket="k25", Key="gone/a.png")
    with pytest.raises(DataError, match="line 1: s3://k25/gone/a.png: no such object"):
        digests(source, 1)
    assert url == "s3://k25/gone/a.png"


@pytest.mark.parametrize("settings, prefetch", [
    ({"workers": 1}, 0), ({"workers": 8}, 2), ({"memory_bytes": 0}, 2), ({"memory_bytes": 0, "disk_bytes": 0, "workers": 3}, 0),
    ({"memory_bytes": 300, "disk_bytes": 600}, 1),
])  # fmt: skip
def test_the_order_depends_on_no_thread_and_no_tier(store_of, uploaded, local, settings, prefetch):
    expected = digests(open_manifest(local))
    source = open_manifest(uploaded, store=store_of(**settings))
    assert digests(source, prefetch=prefetch) == expected
    assert digests(source, prefetch=prefetch) == expected  # with whatever the tiers hold by now


def test_what_an_object_is_and_what_a_folder_holds_is_asked_once(s3, store_of, uploaded):
    source = open_manifest(uploaded, store=store_of(memory_bytes=0))
    s3.log.clear()
    digests(source, 20)
    assert s3.log == []  # all rows, the clip and the folder of frames from the disk tier alone


def test_failures_on_the_way_change_no_batch(s3, store_of, uploaded, local):
    store = store_of("flaky", memory_bytes=0, disk_bytes=0, retries=20)
    source = open_manifest(uploaded, store=store)
    s3.faults["GET"] = ["slow", "cut", "short"] * 6
    assert digests(source, prefetch=2) == digests(open_manifest(local)) and store.counts["retries"] == 18


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_order_depends_on_no_layout_of_ranks(store_of, uploaded, local, ranks):
    """Every rank draws the global batches and keeps its microbatches: with a store of its own and one shared disk tier."""
    kept = {}

    def rank(number):
        source = open_manifest(uploaded, store=store_of(memory_bytes=500, seed=number))
        mine = digests(source, 8, prefetch=number % 2)
        kept.update({index: mine[index] for index in range(number, 8, ranks)})

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [kept[index] for index in range(8)] == digests(open_manifest(local), 8)


RUN = """
import hashlib, json, sys
from data import Blend
from manifest import open_manifest
from media import MediaConfig
from storage import Store, StoreSettings
from tokenizer import Tokenizer
cache, endpoint, url = sys.argv[1:]
store = Store(StoreSettings(cache=cache, options={"key": "k", "secret": "s", "endpoint_url": endpoint}))
mix = Blend([(open_manifest(url, store=store), 1.0)], None, 3, 2, 60, Tokenizer(), MediaConfig(), prefetch=2)
while True:
    print(json.dumps([hashlib.sha256(next(mix).ids.numpy().tobytes()).hexdigest(), mix.state()]), flush=True)
"""


def test_a_killed_run_with_a_cold_cache_resumes_with_a_warm_one_on_the_same_batches(s3, store_of, uploaded, tmp_path, local):
    whole = blend(open_manifest(local))
    batches = [next(whole) for _ in range(12)]
    expected = [digest(batch) for batch in batches]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path / "cache"), s3.url, uploaded], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    taken = [json.loads(process.stdout.readline()) for _ in range(5)]
    process.kill()
    process.wait()
    process.stdout.close()
    assert [ids for ids, _ in taken] == [hashlib.sha256(batch.ids.numpy().tobytes()).hexdigest() for batch in batches[:5]]
    warm = store_of("cache")
    mix = blend(open_manifest(uploaded, store=warm), prefetch=2)
    mix.load_state(taken[-1][1])
    assert [digest(next(mix)) for _ in range(7)] == expected[5:]
    assert warm.counts["disk"] > 5 and warm.counts["bytes"] == 0  # nothing came from the server again
    cold = blend(open_manifest(uploaded, store=store_of("elsewhere")))
    cold.load_state(taken[2][1])
    assert [digest(next(cold)) for _ in range(9)] == expected[3:]


# ------------------------------------------------------------------------------------- the command lines


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """Default settings, with a home of its own and the server found as s3fs finds any: by the environment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("missing", ["fsspec", "s3fs"])
def test_without_the_extra_a_url_is_one_line_and_local_data_works(missing, at_home, local, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # where a class once imported stays
    with pytest.raises(SystemExit) as ended:
        train_small.main(["--data", "s3://bucket/mine.jsonl", "--run", str(at_home / "run")])
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and len(error.splitlines()) == 1
    assert "s3://bucket/mine.jsonl" in error and "needs the extra `storage`: pip install '.[storage]'" in error
    assert len(open_manifest(local).train) > 10


def test_the_store_imports_without_the_optional_packages_and_without_torch():
    program = "import sys\nsys.modules.update(fsspec=None, s3fs=None, fcntl=None, torch=None)\nimport storage"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_training_reads_a_url(s3, at_home, uploaded, monkeypatch):
    for name, value in {"AWS_ENDPOINT_URL": s3.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(name, value)
    t, config, _ = train_small.read_flags([
        "--data", uploaded, "--data-weight", "1000", "--run", str(at_home / "run"), "--joint-steps", "1", "--vision-ratio", "0.5",
        "--rows", "1", "--length", "128", *[word for name in ("small-lm", "vit", "text", "align", "long") for word in (f"--{name}-steps", "0")],
    ])  # fmt: skip
    run, _ = train_small.train(t, config)
    assert run.state["data"]["documents"]["mine.text"] > 0 and run.state["data"]["documents"]["mine.vision"] > 0
    assert list((at_home / ".cache" / "k25" / "files").glob("*/*"))


def test_the_bench_compares_three_tiers_with_the_appetite(s3, uploaded, tmp_path, monkeypatch, capsys):
    for name, value in {"AWS_ENDPOINT_URL": s3.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(name, value)
    rows = [{"tokens_per_s": rate} for rate in (1, 2, 3, 4, 100, 300, 200)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"tokens')
    simple = [line for line in tree()["mine.jsonl"].splitlines() if b"folder" not in line]
    url = put(s3, "data/simple.jsonl", b"\n".join(simple))
    storage.main(["bench", "--data", url, "--run", str(tmp_path)])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("appetite 200 tokens/s (median of the logged steps of")
    table = {line.split()[0]: line.split() for line in out[2:5]}
    requests = {tier: int(words[-1]) for tier, words in table.items()}
    assert requests == {"cold": 18, "disk": 9, "memory": 0}  # 9 objects: what each is, and its content
    assert all(float(words[1]) > 0 and float(words[2]) > 0 for words in table.values())


@pytest.mark.parametrize("arguments, message", [
    (["--data", "mine.jsonl"], "mine.jsonl: give the URL of a .jsonl manifest"),
    (["--data", "memory://nowhere.jsonl"], "memory:///nowhere.jsonl: no such object"),
    (["--data", "memory://nowhere.jsonl", "--workers", "0"], "workers is 0: it must be positive"),
    (["--data", "memory://nowhere.jsonl", "--run", "nowhere"], "nowhere: 0 logged steps; more than 4 are needed"),
])  # fmt: skip
def test_misuse_of_the_bench_is_one_line_and_exit_code_2(arguments, message, capsys):
    given = arguments if "--run" in arguments else [*arguments, "--tokens-per-second", "9"]
    with pytest.raises(SystemExit) as ended:
        storage.main(["bench", *given])
    assert ended.value.code == 2 and capsys.readouterr().err == f"storage.py: {message}\n"
