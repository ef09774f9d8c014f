"""Texts in the form in which they are compared, as words, and runs of words as numbers."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lark_fast.pool.records import NOT_SCORED, Record

# Han, Hiragana and Katakana: scripts without spaces, of which every character is taken for a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
# What tells one short formula from another. Asterisks are left out, which also make text bold, and factorials.
_OPERATORS = "+-/^=<>%±×÷"
_MINUS = "\u2212"
_REMEMBERED_WORDS = 1 << 20
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def normalised(text: str) -> str:
    """The text under Unicode compatibility (NFKC) and without case, its runs of white space as single spaces."""
    if text.isascii():
        return " ".join(text.lower().split())
    # Folding can undo the composition and the other way round: Unicode 3.13, D146 does both twice.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return " ".join(unicodedata.normalize("NFKC", text.casefold()).split())


def words(text: str) -> list[str]:
    """The words of a normalised text: what stands between spaces, and every Chinese or Japanese character."""
    return text.split() if text.isascii() else _WORD.findall(text)


class _Characters(dict[int, str]):
    """A table for ``str.translate`` that fills itself."""

    def __init__(self, kept: str, otherwise: str) -> None:
        super().__init__({ord(character): character for character in kept})
        self[ord(_MINUS)] = "-" if "-" in kept else otherwise
        self._otherwise = otherwise

    def __missing__(self, code: int) -> str:
        character = chr(code)
        is_mark = unicodedata.category(character)[0] in "PSZC"
        self[code] = self._otherwise if is_mark else character
        return self[code]


_WITHOUT_PUNCTUATION = _Characters("", " ")
_LETTERS_AND_OPERATORS = _Characters(_OPERATORS, "")


def bare_words(text: str) -> list[str]:
    """The words of a normalised text without punctuation and symbols, which part words like spaces."""
    return words(text.translate(_WITHOUT_PUNCTUATION))


def compact(text: str) -> str:
    """A normalised text's letters, digits and operators of arithmetic, nothing between them."""
    return text.translate(_LETTERS_AND_OPERATORS)


def answer_turns(record: Record) -> list[tuple[str, str]]:
    """(role, normalised text) of the turns from the first answer on: what candidates of one problem differ in.

    Token ids have a turn "tokens" from the first scored one on, a word a token.
    """
    if record.messages is None:
        first = next(position for position, label in enumerate(record.labels) if label != NOT_SCORED)
        return [("tokens", " ".join(map(str, record.input_ids[first:])))]
    roles = [message["role"] for message in record.messages]
    return [
        (message["role"], normalised(message["content"])) for message in record.messages[roles.index("assistant") :]
    ]


class WordHashes:
    """64-bit hashes of words, the same in every run; those of about a million words are remembered."""

    def __init__(self) -> None:
        self._known = _Known()

    def __call__(self, words: Iterable[str]) -> NDArray[np.uint64]:
        """``[W]`` a hash a word."""
        if len(self._known) > _REMEMBERED_WORDS:
            self._known.clear()
        return np.fromiter(map(self._known.__getitem__, words), dtype=np.uint64)


class _Known(dict[str, int]):
    def __missing__(self, word: str) -> int:
        self[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return self[word]


def run_hashes(hashes: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """``[W - length + 1]`` a hash for every run of ``length`` words, from those of the words, ``[W]``."""
    n_runs = len(hashes) - length + 1
    if n_runs < 1:
        return np.empty(0, dtype=np.uint64)
    # A polynomial modulo 2^64; the hashes of the words are mixed well enough for it.
    runs = np.zeros(n_runs, dtype=np.uint64)
    for offset in range(length):
        runs *= _MULTIPLIER
        runs += hashes[offset : offset + n_runs]
    return runs
