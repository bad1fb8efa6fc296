"""A folder of text and Markdown files as a searchable corpus: what agents search and browse — K2.5 report 3.

    corpus = Corpus("notes")                            # or Corpus.of({name: text})
    corpus.search("height of the tower", top=3)         # Hits: page, score, the line that fits best
    corpus.browse("towers/north.md", start=0)           # a piece of the page, and where to go on

Pages are all *.txt and *.md below the folder, in UTF-8, named by their path from it; hidden ones and links that lead out of the folder
are no pages. Search is BM25 over lower-case words; equal scores stand in the order of names, so that results depend on
the files alone. `browse` looks names up among the pages and opens no path: nothing else can be read.

`Tools` offers both to agents, and Python.

Public names: Corpus, CorpusError, Hit, Tools, declared, misfit.     Tests: pytest tests/test_corpus.py
"""

import difflib
import hashlib
import math
import pathlib
import re
from collections import Counter
from dataclasses import dataclass

K1, B = 1.2, 0.75  # of BM25: how soon a word's repetitions stop to count; how much long pages are held back
_WORD = re.compile(r"\w+")


class CorpusError(ValueError):
    """A corpus that cannot be read, or a page that is not there; one line says which."""


@dataclass(frozen=True)
class Hit:
    """A page that was found."""

    page: str
    score: float
    line: str  # of the page, the one with most of the words asked for


def _words(text):
    return _WORD.findall(text.casefold())


class Corpus:
    """The pages below a folder, read once.

    folder: path; piece: characters that `browse` returns at most; largest: bytes of a page at most. names: of the pages, sorted;
    digest: a hash of names and texts. Raises CorpusError.
    """

    def __init__(self, folder, piece=2000, largest=16 << 20):
        root = pathlib.Path(folder)
        if not root.is_dir():
            raise CorpusError(f"{folder} is no folder: give one with .txt or .md files")
        pages = {}
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.suffix.lower() not in (".txt", ".md") or any(part.startswith(".") for part in path.relative_to(root).parts):
                continue
            if not path.is_file() or not path.resolve().is_relative_to(root.resolve()):
                continue
            try:
                raw = path.read_bytes() if path.stat().st_size <= largest else None
                pages[name] = raw.decode("utf-8-sig") if raw is not None else ""
            except OSError as error:
                raise CorpusError(f"{path}: cannot be read ({error.strerror})") from None
            except UnicodeDecodeError as error:
                raise CorpusError(f"{path}: byte {error.start} is no UTF-8; convert the file") from None
            if raw is None:
                raise CorpusError(f"{path}: larger than {largest} bytes; cut the file")
        if not pages:
            raise CorpusError(f"{folder}: no .txt or .md file below it")
        self._take(pages, piece)

    @classmethod
    def of(cls, pages, piece=2000):
        """A corpus of pages that are no files. pages: {name: text}, at least one. Raises CorpusError."""
        if not pages:
            raise CorpusError("a corpus without pages: give at least one")
        corpus = cls.__new__(cls)
        corpus._take(pages, piece)
        return corpus

    def _take(self, pages, piece):
        """Index the pages."""
        if piece < 1:
            raise CorpusError(f"pieces of {piece} characters: at least 1")
        self.piece, self._pages = piece, pages
        self.names = tuple(sorted(self._pages))
        self.digest = hashlib.sha256(repr([(name, self._pages[name]) for name in self.names]).encode("utf-8", "surrogatepass")).hexdigest()
        self._places, self._lengths = {}, {}  # word → {page: how often}; words of each page
        for name in self.names:
            counts = Counter(_words(f"{name} {self._pages[name]}"))
            self._lengths[name] = sum(counts.values())
            for word, count in counts.items():
                self._places.setdefault(word, {})[name] = count
        self._mean = sum(self._lengths.values()) / len(self.names)

    def search(self, query, top=5):
        """The best pages for a query by BM25, at most `top`; only such as have one of its words. Returns list of Hit.

            score = Σ_w idf(w) · n (K1 + 1) / (n + K1 (1 − B + B·length / mean length)),   idf = ln(1 + (N − N_w + ½) / (N_w + ½))

        over the distinct words w, n being how often the page has w, N_w how many of the N pages have it.
        """
        words, scores = sorted(set(_words(query))), Counter()
        for word in words:
            found = self._places.get(word, {})
            weight = math.log(1 + (len(self.names) - len(found) + 0.5) / (len(found) + 0.5))
            for name, n in found.items():
                scores[name] += weight * n * (K1 + 1) / (n + K1 * (1 - B + B * self._lengths[name] / self._mean))
        best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:top]
        return [Hit(name, score, self._line(name, words)) for name, score in best]

    def _line(self, name, words):
        """The first line with most of the words, from where the first of them stands, at most 200 characters."""
        lines = [line.strip() for line in self._pages[name].splitlines() if line.strip()] or [""]
        line = max(lines, key=lambda line: len(set(words) & set(_words(line))))
        if len(line) <= 200:
            return line
        first = next((match.start() for match in _WORD.finditer(line) if match.group().casefold() in words), 0)
        return line[max(0, first - 50) : max(0, first - 50) + 200]

    def browse(self, page, start=0):
        """At most `piece` characters of a page from `start` on, and a last line that says how it goes on. Raises CorpusError."""
        text = self._pages.get(page)
        if text is None:
            near = difflib.get_close_matches(page[:200], self.names, 1, 0.5)
            raise CorpusError(f"no page {page[:80]!r}" + (f": did you mean {near[0]!r}?" if near else ": search for one first"))
        if not 0 <= start <= len(text):
            raise CorpusError(f"{page} has {len(text)} characters: start lies between 0 and that")
        end = min(start + self.piece, len(text))
        more = "the end" if end == len(text) else f"go on with start={end}"
        return f"{text[start:end]}\n[{page}: characters {start} to {end} of {len(text)}, {more}]"


# ------------------------------------------------------------------------------------------------ tools


def declared(name, about, required, /, **arguments):
    """A tool in OpenAI's wire format. required: names; arguments: (JSON type, what it is) of each."""
    properties = {key: {"type": kind, "description": what} for key, (kind, what) in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


_TYPES = {"string": str, "integer": int}


def misfit(call, tools):
    """What is wrong with a ToolCall, in one line: an unknown tool, missing, unknown or mistyped arguments; "" when nothing is."""
    known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if call.name not in known:
        return f"no tool {call.name[:40]!r}, only {', '.join(known)}"
    kinds, given = known[call.name]["properties"], call.arguments
    if set(known[call.name]["required"]) <= given.keys() <= kinds.keys() and all(
        type(value) is _TYPES[kinds[key]["type"]] for key, value in given.items()
    ):
        return ""
    takes = [f"{key}: {kind['type']}" for key, kind in kinds.items()]
    return f"{call.name} takes {', '.join(takes)}"


class Tools:
    """Search, browse and, with an InterpreterPool, python, for agents: each returns a text, whatever it is asked.

    declarations: in OpenAI's wire format.
    """

    def __init__(self, corpus, pool=None):
        self.corpus, self.pool = corpus, pool
        self.declarations = [
            declared("search", "Finds pages by words.", ["query"], query=("string", "Words to look for")),
            declared("browse", "Reads a page, a piece at a time.", ["page"], page=("string", "Name of the page, as search gives it"),
                     start=("integer", "Character to begin with, 0 by default")),
        ]  # fmt: skip
        if pool:
            about = "Runs Python and returns what it prints. numpy is bound as np."
            self.declarations.append(declared("python", about, ["code"], code=("string", "The program")))

    async def search(self, query):
        """Pages with their best lines, the best first."""
        hits = self.corpus.search(query)
        return "\n".join(f"{hit.page} ({hit.score:.2f}): {hit.line}" for hit in hits) or "no page has one of these words"

    async def browse(self, page, start=0):
        """A piece of a page."""
        try:
            return self.corpus.browse(page, start)
        except CorpusError as error:
            return f"Error: {error}"

    async def python(self, code):
        """What a program prints, in a process of its own that is killed with the call (bug 62)."""
        found = await self.pool.run(code)
        return found.text.strip() if found.valid else f"Error: the interpreter failed ({found.status}), which says nothing about the program"
