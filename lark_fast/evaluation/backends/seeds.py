"""Where an answer's random numbers begin."""

import hashlib


def stream(seed: int, key: str, sample: int) -> int:
    """The seed, 0 to 2^63 - 1, of an answer's own random numbers.

    Args:
        seed: of the evaluation.
        key: of the problem.
        sample: which of its answers.
    """
    text = f"{seed}\0{sample}\0{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
