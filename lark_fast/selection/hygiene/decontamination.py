"""Records whose prompt shares a run of words with an item of a benchmark.

The rule is that of the GPT-3 paper (Brown et al. 2020, arXiv 2005.14165, appendix C), 13 words without case and
punctuation, which PaLM's and Llama 2's reports vary. It finds copies. A paraphrase or a translation passes, and a
phrase that many problems share ("m and n are relatively prime positive integers") may cost problems that are no copy:
``matched`` shows the words, for a reader to judge.
"""

from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lark_fast.errors import UserError
from lark_fast.pool.records import Record
from lark_fast.selection.hygiene.benchmark import OPTION, read_items
from lark_fast.selection.hygiene.removals import Removal
from lark_fast.selection.hygiene.texts import WordHashes, bare_words, compact, normalised, run_hashes

DEFAULT_NGRAM = 13  # as for GPT-3 (arXiv 2005.14165)
_WHOLE_TURN_WORDS = 5  # items with fewer are too short to be looked for inside a text
_REMEMBERED_TURNS = 1024
_SHOWN_WORDS = 40
_PROMPT_ROLES = ("system", "user")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCount:
    """What one file of a benchmark came to."""

    path: str
    items: int
    matched_items: int  # the first of each prompt that matched
    records: int  # whose prompt matched; a record may count for several files


class Decontamination:
    """Filter: records whose prompt shares ``ngram`` consecutive words with an item of a file.

    Compared are the user's and system's turns, each by itself, without case, punctuation and symbols. An item shorter
    than ``ngram`` matches as a whole: one of five words or more anywhere in a turn, a shorter one when it is the turn;
    and its operators must agree too, so that 2 + 3 is not taken for 2 - 3. Records go, not problems: candidates of a
    problem have one prompt, and where they have several, those without a match stay. Runs are known by 64 bits.
    Records of token ids have no text and are counted in ``unchecked``.

    Holds 12 bytes a run of the benchmark and 8 a removed record.

    Args:
        paths: see ``benchmark.read_items``.
        ngram: words.
        answers: look at the assistant's turns too.

    Raises:
        ValueError: ``ngram`` below 1.
        UserError: a file that cannot be read or holds nothing to compare with.
    """

    name = OPTION

    def __init__(self, paths: Sequence[str], ngram: int = DEFAULT_NGRAM, *, answers: bool = False) -> None:
        if ngram < 1:
            raise ValueError(f"ngram={ngram}: must be at least 1")
        self._roles = (*_PROMPT_ROLES, "assistant") if answers else _PROMPT_ROLES
        self._hashes = WordHashes()
        self._files = [_Index(path, ngram, self._hashes) for path in dict.fromkeys(paths)]
        self.unchecked = 0
        self._matches: dict[tuple[str, str], int] = {}  # (reason, matched)
        self._rows, self._match_of_row = array("I"), array("I")
        self._records = [0] * len(self._files)
        self._items: list[set[int]] = [set() for _ in self._files]
        # Candidates of a problem mostly follow each other with one prompt, and a system's turn is everywhere.
        self._hits = lru_cache(_REMEMBERED_TURNS)(self._find_hits)

    def see(self, row: int, problem: int, record: Record) -> None:
        """Take note of the record that made this row of the scores."""
        if record.messages is None:
            self.unchecked += 1
            return
        turns = [message["content"] for message in record.messages if message["role"] in self._roles]
        hits: dict[int, tuple[int, str]] = {}
        for file, text, shared in (hit for turn in turns for hit in self._hits(turn)):
            hits.setdefault(file, (text, shared))
        if not hits:
            return
        for file, (text, _) in hits.items():
            self._records[file] += 1
            self._items[file].add(self._files[file].items[text])
        file = min(hits)
        text, shared = hits[file]
        index = self._files[file]
        match = (f"{OPTION} {index.path}", f"{index.path}:{index.lines[text]}: {shared}")
        self._rows.append(row)
        self._match_of_row.append(self._matches.setdefault(match, len(self._matches)))

    def removals(self, gone: NDArray[np.bool_] | None = None) -> Iterator[Removal]:
        """What is to go, in the order of the pool; not those that are ``gone`` (``[R]``) already."""
        matches = list(self._matches)
        for row, match in zip(self._rows, self._match_of_row, strict=True):
            if gone is None or not gone[row]:
                reason, matched = matches[match]
                yield Removal(row=row, reason=reason, matched=matched)

    def counts(self) -> tuple[FileCount, ...]:
        """What each file came to, in their order."""
        return tuple(
            FileCount(path=index.path, items=index.n_items, matched_items=len(items), records=records)
            for index, items, records in zip(self._files, self._items, self._records, strict=True)
        )

    def notes(self) -> list[str]:
        """The counts for a reader, a line a fact."""
        said = [
            f"{OPTION} {count.path}: the prompts of {count.records:,} trajectories match "
            f"{count.matched_items:,} of {count.items:,} items"
            for count in self.counts()
        ]
        if self.unchecked:
            said.append(f"{OPTION}: {self.unchecked:,} trajectories are token ids without text and were not compared")
        return said

    def close(self) -> None:
        """Nothing is open."""

    def _find_hits(self, text: str) -> list[tuple[int, int, str]]:
        """(file, text, shared words) of a turn's first match with each file."""
        turn = _Turn(text, self._hashes)
        found = [(number, index.find(turn)) for number, index in enumerate(self._files)]
        return [(number, *hit) for number, hit in found if hit is not None]


class _Turn:
    """A turn of a record, as it is looked for in several files."""

    def __init__(self, text: str, hashes: WordHashes) -> None:
        self.text = normalised(text)
        self.words = bare_words(self.text)
        self._hashes = hashes(self.words)
        self._runs: dict[int, NDArray[np.uint64]] = {}

    def runs(self, length: int) -> NDArray[np.uint64]:
        """See ``run_hashes``."""
        if length not in self._runs:
            self._runs[length] = run_hashes(self._hashes, length)
        return self._runs[length]


class _Index:
    """The runs of words of one file; an item has as many texts as turns of the user."""

    def __init__(self, path: str, ngram: int, hashes: WordHashes) -> None:
        self.path, self.n_items, self._ngram = path, 0, ngram
        self.lines, self.items = array("Q"), array("I")  # of each text
        self._short: dict[int, str] = {}  # text to its letters and operators, when it is shorter than a run
        runs: dict[int, list[NDArray[np.uint64]]] = defaultdict(list)
        of: dict[int, list[NDArray[np.uint32]]] = defaultdict(list)
        for line, texts in read_items(path):
            for text in map(normalised, texts):
                words = hashes(bare_words(text))
                if not len(words):
                    continue
                length = min(ngram, len(words))
                if length < ngram:
                    self._short[len(self.lines)] = compact(text)
                found = run_hashes(words, length)
                runs[length].append(found)
                of[length].append(np.full(len(found), len(self.lines), dtype=np.uint32))
                self.lines.append(line)
                self.items.append(self.n_items)
            self.n_items += 1
        if not self.lines:
            raise UserError(f"{OPTION} {path}: holds no text to compare with")
        self._of_length = {}
        for length in sorted(runs, reverse=True):
            all_runs, all_texts = np.concatenate(runs[length]), np.concatenate(of[length])
            order = np.argsort(all_runs, kind="stable")
            self._of_length[length] = all_runs[order], all_texts[order]

    def find(self, turn: _Turn) -> tuple[int, str] | None:
        """(text, shared words) of the first match: long runs before short ones, then from the turn's beginning on."""
        n_words = len(turn.words)
        for length, (runs, texts) in self._of_length.items():
            if n_words < length or (length < min(_WHOLE_TURN_WORDS, self._ngram) and n_words != length):
                continue
            wanted = turn.runs(length)
            first = runs.searchsorted(wanted)
            for start in np.flatnonzero(runs[np.minimum(first, len(runs) - 1)] == wanted):
                end = runs.searchsorted(wanted[start], side="right")
                for text in texts[first[start] : end].tolist():
                    if text not in self._short or self._short[text] in compact(turn.text):
                        return text, " ".join(turn.words[start : start + min(length, _SHOWN_WORDS)])
        return None
