"""Which (problem, candidate) pairs are known, and with what content, in bounded memory."""

import mmap
import os
import tempfile
from typing import NamedTuple

from lark_fast.hashing import hash_fields

CONTENT_BITS = 39
_CONTENT_MASK = (1 << CONTENT_BITS) - 1
_MET = 1
_LOW_KEY_SHIFT = CONTENT_BITS + 1  # the low word: 24 bits of key hash, 39 of content hash, 1 bit "met"
_BYTES_AN_ENTRY = 16


class Entry(NamedTuple):
    """What the table knows about one key."""

    content: int  # 39 bits of the content's hash, see KeyTable.short_content
    met: bool  # whether this pass has come across the key


class KeyTable:
    """A set of keys with a content hash and a mark each, in 16 bytes an entry.

    Open addressing in one array of 64-bit words, two an entry. The table doubles when 0.8 full, so old and new
    together take at most (1 + 2) * 16 / 0.8 = 60 bytes a record, and 40 once the old one is gone.

    Keys are told apart by 88 bits of hash: among 10^9 keys two are mistaken for one with a chance of 10^-9.
    """

    def __init__(self, capacity: int = 1024) -> None:
        """Start with room for ``capacity`` slots, a power of two."""
        if capacity < 1 or capacity & (capacity - 1):
            raise ValueError(f"capacity must be a power of two, not {capacity}")
        self._words = _empty_words(capacity)
        self._mask = capacity - 1
        self._count = self._met_count = 0

    def __len__(self) -> int:
        return self._count

    @staticmethod
    def short_content(content: bytes) -> int:
        """Return the 39 bits of a content hash (at least 5 bytes) that the table keeps."""
        return int.from_bytes(content[:5], "little") & _CONTENT_MASK

    def unmet(self) -> int:
        """Return how many keys have not been met in this pass."""
        return self._count - self._met_count

    def add(self, key: tuple[str, str], content: bytes, met: bool) -> None:
        """Store ``key``; one that is there already gets the new content and mark."""
        high, low_key = _hash_key(key)
        slot = self._slot(high, low_key)
        if self._words[slot]:
            self._met_count -= self._words[slot + 1] & _MET
        else:
            if (self._count + 1) * 5 > (self._mask + 1) * 4:
                self._grow()
                slot = self._slot(high, low_key)
            self._count += 1
        self._words[slot] = high
        self._words[slot + 1] = low_key << _LOW_KEY_SHIFT | self.short_content(content) << 1 | bool(met)
        self._met_count += bool(met)

    def find(self, key: tuple[str, str]) -> Entry | None:
        """Return what is known about ``key``, None when it is unknown."""
        slot = self._slot(*_hash_key(key))
        if not self._words[slot]:
            return None
        low = self._words[slot + 1]
        return Entry(content=low >> 1 & _CONTENT_MASK, met=bool(low & _MET))

    def holds(self, key: tuple[str, str], content: bytes) -> bool:
        """Return whether ``key`` is there, with that content hash."""
        return _holds(self._words, self._mask, key, content)

    def mark(self, key: tuple[str, str]) -> None:
        """Note that this pass has met ``key``; KeyError when it is unknown."""
        slot = self._slot(*_hash_key(key))
        if not self._words[slot]:
            raise KeyError(key)
        self._met_count += not self._words[slot + 1] & _MET
        self._words[slot + 1] |= _MET

    def snapshot(self) -> "KeySnapshot":
        """Return the keys there are now, for other processes to look up; OSError when the disk is full."""
        return KeySnapshot(self._words)

    def _slot(self, high: int, low_key: int) -> int:
        return _find_slot(self._words, self._mask, high, low_key)

    def _grow(self) -> None:
        old = self._words
        capacity = 2 * (self._mask + 1)
        self._words, self._mask = _empty_words(capacity), capacity - 1
        for first in range(0, len(old), 2):
            if high := old[first]:
                low = old[first + 1]
                slot = self._slot(high, low >> _LOW_KEY_SHIFT)
                self._words[slot], self._words[slot + 1] = high, low


class KeySnapshot:
    """A set of keys that does not change, in a temporary file without a name that processes map and so share.

    Pickled, it is the number of its file descriptor, which a process has to inherit to unpickle it. Memory that the
    file takes, 20 to 40 bytes a key, is the operating system's to write out and take back; it goes with the last
    descriptor.
    """

    def __init__(self, words: memoryview) -> None:
        """Copy a table's words; OSError when the temporary directory cannot hold them."""
        with tempfile.TemporaryFile() as file:
            file.write(words)
            file.flush()
            self._attach(os.dup(file.fileno()))

    def holds(self, key: tuple[str, str], content: bytes) -> bool:
        """Return whether ``key`` is there, with that content hash."""
        return _holds(self._words, self._mask, key, content)

    def __getstate__(self) -> int:
        return self.descriptor

    def __setstate__(self, descriptor: int) -> None:
        self._attach(descriptor)

    def close(self) -> None:
        """Let go of the file."""
        self._words.release()
        self._map.close()
        os.close(self.descriptor)

    def _attach(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self._words = memoryview(self._map).cast("Q")
        self._mask = len(self._words) // 2 - 1


def _holds(words: memoryview, mask: int, key: tuple[str, str], content: bytes) -> bool:
    slot = _find_slot(words, mask, *_hash_key(key))
    return words[slot] != 0 and words[slot + 1] >> 1 & _CONTENT_MASK == KeyTable.short_content(content)


def _find_slot(words: memoryview, mask: int, high: int, low_key: int) -> int:
    """Return the index of the first word of the key's entry, or of the empty slot where it belongs."""
    index, step = high & mask, 0
    while True:
        found = words[2 * index]
        if not found or (found == high and words[2 * index + 1] >> _LOW_KEY_SHIFT == low_key):
            return 2 * index
        # Triangular steps visit every slot of a power-of-two table and break up the runs of linear probing.
        step += 1
        index = (index + step) & mask


def _empty_words(capacity: int) -> memoryview:
    return memoryview(bytearray(capacity * _BYTES_AN_ENTRY)).cast("Q")


def _hash_key(key: tuple[str, str]) -> tuple[int, int]:
    """Return 64 and 24 bits of the key's hash; the first is never 0, which marks an empty slot."""
    digest = hash_fields(key[0].encode(), key[1].encode(), size=11)
    return int.from_bytes(digest[:8], "little") or 1, int.from_bytes(digest[8:], "little")
