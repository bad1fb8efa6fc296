"""One batched inference loop for many coroutines: continuous batching, partial answers, new weights — K2.5 report D and 7.

    completion = await engine.generate(Request(ids, seed=7))       # from any number of coroutines at once
    engine.run(*coroutines)                                         # the same from a script

Requests join and leave between any two steps. A step feeds one token of every running request through absorbed MLA over
a latent cache with one slot per request; the prompts of those who join are prefilled together just before.

**The same bits in any company** (how: slots.py). What a request is answered, ids and log-probs, depends on its own
tokens, pictures, seed and weights only: not on who runs beside it, when it came, whether its prefix was cached, or
whether it was aborted and continued.

Weights may change between two steps (`update`). Running requests go on with the cache they have, of older weights;
each token says which version drew it. Caches of finished requests are dropped by an update.

Run: python engine.py bench        (tokens/s beside static batches of `generate`)

Public names: Request, Completion, Engine, EngineError, bench, main.     Tests: pytest tests/test_engine.py
"""

import argparse
import asyncio
import heapq
import math
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

from k25 import K25, K25Config, generate
from media import merged_tokens
from slots import EngineError, SlotModel, draw, uniform

__all__ = ["Completion", "Engine", "EngineError", "Request", "bench", "main"]

# ------------------------------------------------------------------------------------ requests, answers


@dataclass(frozen=True)
class Completion:
    """What a request was answered with, so far.

    ids: generated token ids, the stop token included; logprobs: of each of them, log softmax(logits / temperature)
    before top-p (temperature 1 when greedy); versions: of the weights that drew each; finish: "stop" | "length" |
    "aborted". Raises EngineError when the lengths differ.
    """

    ids: tuple
    logprobs: tuple
    versions: tuple
    finish: str

    def __post_init__(self):
        if not len(self.ids) == len(self.logprobs) == len(self.versions):
            raise EngineError(f"a completion of {len(self.ids)} tokens has {len(self.logprobs)} log-probs and "
                              f"{len(self.versions)} versions: one of each per token")  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it."""

    ids: tuple  # of the prompt, media places expanded; the last is no media place
    items: tuple = ()  # MediaItem, in the order of their places
    max_new_tokens: int = 64  # of the whole answer, `prefix` included
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # draw from the smallest set of tokens whose probability reaches it
    stop_ids: tuple = ()
    seed: int = 0  # with the place in the answer it decides every draw
    prefix: Completion | None = None  # an aborted answer to go on with: its tokens, log-probs and versions are kept
    session: object = None  # requests of one session reuse each other's cached prefix; None keeps nothing
    priority: int = 0  # the lowest is served first when slots are short


# ----------------------------------------------------------------------------------------------- engine


class _Row:
    """A request, in the queue (slot −1), in a slot, or done (None)."""

    __slots__ = ("request", "future", "on_token", "on_draw", "ids", "start", "logprobs", "versions", "version", "key", "slot")

    def __init__(self, request, future, on_token, on_draw):
        done = request.prefix or Completion((), (), (), "aborted")
        self.request, self.future, self.on_token, self.on_draw, self.slot = request, future, on_token, on_draw, -1
        self.key = tuple(request.ids), tuple(map(id, request.items))
        self.ids, self.start = [*request.ids, *done.ids], len(request.ids)  # prompt and answer; where the answer starts
        self.logprobs, self.versions = list(done.logprobs), list(done.versions)

    def completion(self, finish):
        """The answer so far."""
        return Completion(tuple(self.ids[self.start :]), tuple(self.logprobs), tuple(self.versions), finish)


class Engine:
    """Serves requests from any number of coroutines with one model.

    model: K25, of which a copy is made, or something that answers like a SlotModel; slots: int — requests at once, the
    cap on concurrent inference; capacity: int — most tokens of a prompt and its answer; parked: int — finished requests
    whose caches are kept for the next of their session, at most (default: twice the slots); version: int — of the
    weights; deterministic: as SlotModel.
    """

    def __init__(self, model, slots=64, capacity=512, *, parked=None, version=0, deterministic=True):
        self.model = SlotModel(model, slots, capacity, deterministic) if isinstance(model, K25) else model
        self.slots, self.capacity = self.model.slots, self.model.capacity
        self.version = version
        self._parked, self._parked_limit = OrderedDict(), 2 * self.slots if parked is None else parked
        self._rows = []  # the row of each slot
        self._queue, self._arrivals, self.waiting = [], 0, 0  # a heap of (priority, arrival, row), some of them cancelled
        self._prompts = {}  # of the running rows: (ids, ids of the items) to the first row with them
        self._driver = self._gate = None

    @property
    def running(self):
        """Requests that hold a slot."""
        return len(self._rows)

    # -- for coroutines

    async def generate(self, request, on_token=None, on_draw=None):
        """Answer a request. Returns Completion; raises EngineError for an impossible one. Cancelling frees the slot.

        on_token: called with every new id as it comes (streaming); on_draw: with the id, its log-prob and the logits (U,)
        that it was drawn from; neither may raise.
        """
        self._check(request)
        row = _Row(request, asyncio.get_running_loop().create_future(), on_token, on_draw)
        heapq.heappush(self._queue, (request.priority, self._arrivals, row))
        self._arrivals, self.waiting = self._arrivals + 1, self.waiting + 1
        if not self._driver or self._driver.done():
            self._driver = asyncio.ensure_future(self._drive())
        try:
            return await row.future
        except asyncio.CancelledError:
            self._release(row)
            if not self._rows and not self.waiting:
                self._stop()
            raise

    def run(self, *coroutines):
        """Run coroutines to their ends, from a script; returns their results in order."""

        async def together():
            return await asyncio.gather(*coroutines)

        return asyncio.run(together())

    # -- for the trainer

    def update(self, model_or_state, version):
        """Take over other weights, from a module or a state dict, before the next step."""
        self.model.load(model_or_state if isinstance(model_or_state, dict) else model_or_state.state_dict())
        self.version = version
        self._parked.clear()

    def pause(self):
        """Stop stepping: requests keep their slots and caches, and new ones wait, until `resume`."""
        self._gate = self._gate or asyncio.Event()

    def resume(self):
        """Go on after `pause`."""
        if self._gate:
            self._gate.set()
        self._gate = None

    def abort_all(self):
        """End all requests now: each `generate` returns what it has, with finish "aborted"; a Request with that as its
        `prefix` goes on. Returns the number of requests."""
        rows = [row for row in (*self._rows, *(row for _, _, row in self._queue)) if not row.future.done()]
        for row in rows:
            self._finish(row, "aborted")
        self._queue.clear()
        if not self._rows and not self.waiting:
            self._stop()
        return len(rows)

    def forget(self, session):
        """Drop the cache kept for a session."""
        self._parked.pop(session, None)

    # -- the loop

    def _check(self, request):
        """Refuse an impossible request where it is made."""
        done = request.prefix.ids if request.prefix else ()
        places = request.ids.count(self.model.media_pad)
        merged = sum(merged_tokens(item.grid) for item in request.items)
        if unknown := [token for token in (*request.ids, *done) if not 0 <= token < self.model.vocab_size]:
            raise EngineError(f"id {unknown[0]} lies outside the vocabulary of {self.model.vocab_size}")
        if not request.ids or request.ids[-1] == self.model.media_pad:
            raise EngineError("a prompt needs at least one token, and its last must not be a media place")
        if places != merged:
            raise EngineError(f"the prompt has {places} <|media_pad|> tokens but its {len(request.items)} items give {merged} "
                              "embeddings: each item needs (h/2)·(w/2) of them, whatever its number of frames")  # fmt: skip
        if not (0 <= request.temperature < math.inf and 0 < request.top_p <= 1 and request.max_new_tokens > len(done)):
            raise EngineError(f"temperature {request.temperature}, top_p {request.top_p}, max_new_tokens "
                              f"{request.max_new_tokens}: expected temperature ≥ 0, 0 < top_p ≤ 1 and more new tokens than "
                              f"the {len(done)} given")  # fmt: skip
        if len(request.ids) + request.max_new_tokens > self.capacity:
            raise EngineError(f"a prompt of {len(request.ids)} tokens and {request.max_new_tokens} new ones do not fit into a "
                              f"capacity of {self.capacity}")  # fmt: skip

    def _stop(self):
        """Leave no task behind when there is nothing to do, paused or not; the next request starts another."""
        if self._driver:
            self._driver.cancel()
        self._driver = None

    async def _drive(self):
        """Step until there is nothing to do; other coroutines run between two steps."""
        while self._rows or self._queue:
            await (self._gate.wait() if self._gate else asyncio.sleep(0))
            if self._gate:
                continue
            try:
                self._admit()
                if self._rows:
                    self._step()
            except Exception as error:  # the model itself failed: all who wait for it must hear of it
                for row in [*self._rows, *(row for _, _, row in self._queue)]:
                    self._release(row)
                    if not row.future.done():
                        row.future.set_exception(EngineError(f"the model failed: {type(error).__name__}: {error}"))

    def _admit(self):
        """Give free slots to the first of the queue, and prefill their prompts together."""
        prompts, copies = [], []
        while self._queue and len(self._rows) < self.slots:
            _, _, row = heapq.heappop(self._queue)
            if row.future.done():  # it was cancelled
                continue
            slot, twin = len(self._rows), self._prompts.get(row.key)
            row.version = self.version
            try:
                if twin and twin.version == row.version and len(row.ids) == row.start:
                    copies.append((twin.slot, slot))
                else:
                    prompts.append(self._prompt(row, slot))
                    self._prompts.setdefault(row.key, row)
            except Exception as error:  # its pictures cannot be used, say: nobody else's affair
                self._release(row)
                row.future.set_exception(error)
            else:
                self._rows.append(row)
                row.slot, self.waiting = slot, self.waiting - 1
        self.model.prefill(prompts)
        for source, target in copies:  # the answers to one prompt differ from here on
            self.model.cache.move(source, target)

    def _prompt(self, row, slot):
        """What a request lacks in the cache, up to its last token, which the next step feeds: an entry for `prefill`.

        Here, and only here, pictures are encoded.
        """
        start = self._restore(slot, row)
        media, known = list(row.request.items), row.ids[:start].count(self.model.media_pad)
        while media and known >= merged_tokens(media[0].grid):  # the cache has it already
            known -= merged_tokens(media.pop(0).grid)
        embedded = self.model.encode(media)
        return slot, start, self.model.embed(row.ids[start:-1], None if embedded is None else embedded[known:])

    def _restore(self, slot, row):
        """Bring back what the session's last request has in common with this one; returns how many tokens that is."""
        ids, items, cached = self._parked.pop(row.request.session, ((), (), None))
        limit = min(len(ids), len(row.ids) - 1)
        common = next((i for i in range(limit) if ids[i] != row.ids[i]), limit)
        if any(a is not b for a, b in zip(items, row.request.items)):  # other pictures in the same places
            common = 0
        self.model.cache.restore(slot, cached, common)
        return common

    def _step(self):
        """One more token for every running request."""
        rows = list(self._rows)
        logits = self.model.decode([row.ids[-1] for row in rows], [len(row.ids) - 1 for row in rows])
        settings = torch.tensor([(row.request.temperature, row.request.top_p, uniform(row.request.seed, len(row.logprobs)))
                                 for row in rows] + [(1.0, 1.0, 0.0)] * (len(logits) - len(rows)), dtype=torch.float64)  # fmt: skip
        chosen, logprobs = draw(logits, *settings.to(logits.device).unbind(dim=1), never=(self.model.media_pad,))
        for i, (row, token, logprob) in enumerate(zip(rows, chosen.tolist(), logprobs.tolist())):
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.versions.append(self.version)
            if row.on_token:
                row.on_token(token)
            if row.on_draw:
                row.on_draw(token, logprob, logits[i])
            if token in row.request.stop_ids:
                self._finish(row, "stop")
            elif len(row.logprobs) == row.request.max_new_tokens:
                self._finish(row, "length")

    def _finish(self, row, finish):
        """Answer a request; keep its cache if its session may go on, and all of it is of the present weights."""
        if row.slot >= 0 and row.request.session is not None and row.version == self.version:
            ids = tuple(row.ids[:-1])  # the last was not fed
            self._parked[row.request.session] = ids, row.request.items, self.model.cache.park(row.slot, len(ids))
            while len(self._parked) > self._parked_limit:
                self._parked.popitem(last=False)
        self._release(row)
        if not row.future.done():  # else it was cancelled just now
            row.future.set_result(row.completion(finish))

    def _release(self, row):
        """Take a row from its slot or the queue; the last of the slots moves into the free one, so that there is no gap."""
        if row.slot is None:
            return
        if row.slot < 0:
            self.waiting -= 1
        else:
            if self._prompts.get(row.key) is row:
                del self._prompts[row.key]
            last = self._rows.pop()
            if last is not row:
                self.model.cache.move(last.slot, row.slot)
                self._rows[row.slot], last.slot = last, row.slot
        row.slot = None


# ---------------------------------------------------------------------------------------- command line


def bench(preset="toy", counts=(64, 256), slots=64, repeats=3):
    """Tokens/s of concurrent requests of unequal lengths, in the engine and in static batches of `generate`.

    A static batch of `slots` prompts goes on until its longest answer is done; only tokens that were asked for count.
    Prompts have 16 … 128 tokens, answers 8 … 128, most of them short. The best of `repeats` alternating runs each.
    Prints one line per count; returns [(count, tokens, engine tokens/s, static tokens/s)].
    """
    torch.manual_seed(0)
    model = K25(K25Config.preset(preset)).eval()
    rows = []
    for count in counts:
        rng = np.random.default_rng(count)
        prompts = [rng.integers(0, 256, size=n).tolist() for n in rng.integers(16, 129, size=count)]
        lengths = [int(8 * 16 ** (u * u)) for u in rng.random(count)]
        engine = Engine(model, slots, 256)
        requests = [Request(tuple(p), max_new_tokens=n, seed=i) for i, (p, n) in enumerate(zip(prompts, lengths))]

        def continuous():
            engine.run(*map(engine.generate, requests))

        def static():
            for i in range(0, count, slots):
                generate(model, prompts[i : i + slots], max_new_tokens=max(lengths[i : i + slots]), temperature=1.0)

        best = {continuous: math.inf, static: math.inf}
        for _ in range(repeats):
            for run in best:
                begin = time.perf_counter()
                run()
                best[run] = min(best[run], time.perf_counter() - begin)
        tokens = sum(lengths)
        rows.append((count, tokens, tokens / best[continuous], tokens / best[static]))
        print("{:4d} requests, {:6,d} tokens: engine {:7,.0f} tokens/s   static batches {:7,.0f} tokens/s".format(*rows[-1])
              + f"   ×{best[static] / best[continuous]:.2f}")  # fmt: skip
    return rows


def main(arguments=None):
    """`bench`. Exit code 2 with one line on misuse."""
    cli = argparse.ArgumentParser(prog="engine.py", description=__doc__.split("\n")[0])
    part = cli.add_subparsers(dest="command", required=True).add_parser("bench", help="tokens/s beside static batches")
    part.add_argument("--preset", default="toy", help="toy or small")
    part.add_argument("--requests", type=int, nargs="+", default=[64, 256])
    part.add_argument("--slots", type=int, default=64)
    part.add_argument("--repeats", type=int, default=3)
    flags = cli.parse_args(arguments)
    try:
        if min(*flags.requests, flags.slots, flags.repeats) < 1:
            raise EngineError("--requests, --slots and --repeats must be at least 1")
        bench(flags.preset, flags.requests, flags.slots, flags.repeats)
    except ValueError as error:
        print(f"engine.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
