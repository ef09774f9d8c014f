"""Hashes of sequences of fields, the same on every machine and in every run."""

import hashlib


def hash_fields(*fields: bytes, size: int) -> bytes:
    """Return ``size`` bytes of BLAKE2b; fields are length-prefixed, so ("a", "bc") differs from ("ab", "c")."""
    digest = hashlib.blake2b(digest_size=size)
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.digest()


def draw(seed: int, *names: str) -> bytes:
    """A number that chance gives to a name, whatever else there is, for this seed: the lowest ones are drawn."""
    return hash_fields(str(seed).encode(), *(name.encode("utf-8", "surrogatepass") for name in names), size=8)
