"""Hashes of sequences of fields, the same on every machine and in every run."""

import hashlib


def hash_fields(*fields: bytes, size: int) -> bytes:
    """Return ``size`` bytes of BLAKE2b; fields are length-prefixed, so ("a", "bc") differs from ("ab", "c")."""
    digest = hashlib.blake2b(digest_size=size)
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.digest()
