"""A share of a pool: the records that one of several runs side by side takes."""

import re
from dataclasses import dataclass

from lark_fast.errors import UserError

_SHARD = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


@dataclass(frozen=True, slots=True)
class Share:
    """Share ``part`` of ``of``, counted from 0.

    Records are dealt like cards, one to each share in turn, so shares have the same number of records, and of a pool
    that is sorted in any way each gets as much of every length. Each round begins at another share: else a pool with
    as many teachers as there are shares would give each share a teacher of its own. Multiples of the golden ratio fall
    into step with no period that a pool may have.
    """

    part: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """From "3/8".

        Raises:
            UserError: it is no such thing.
        """
        found = _SHARD.fullmatch(text)
        part, of = map(int, found.groups()) if found else (0, 0)
        if part >= of:
            last = f"from 0 to {of - 1}" if of else "from 0 to n-1"
            raise UserError(
                f"--shard {text}: give i/n, i {last}: --shard $SLURM_ARRAY_TASK_ID/8 under sbatch --array=0-7"
            )
        return cls(part, of)

    def __str__(self) -> str:
        return f"{self.part}/{self.of}"

    def has(self, ordinal: int) -> bool:
        """Whether the record at this place of the pool, counted from 0, is of the share."""
        turn, place = divmod(ordinal, self.of)
        start = (turn * _GOLDEN % 2**64) * self.of >> 64
        return (start + place) % self.of == self.part
