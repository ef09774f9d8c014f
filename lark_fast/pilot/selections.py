"""What each contender trains on, as a training file; and what a policy would take of the held-out problems."""

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lark_fast.files import atomic_open
from lark_fast.pilot.config import BUCKET, FULL, PilotConfig
from lark_fast.pilot.split import HELD_OUT, POOL
from lark_fast.pool.reading import Pool
from lark_fast.scoring.run import ScoreConfig, score_pool
from lark_fast.selection.matching import Matching, RowIndex
from lark_fast.selection.policies import RANDOM, find_policy
from lark_fast.selection.run import SelectConfig, select
from lark_fast.selection.scored_rows import ScoredRows

SCORES, SCORES_HELD_OUT, FOLDER = "scores", "scores-held-out", "selections"
TRAIN = "train.jsonl"

Key = tuple[str, str]  # problem and candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What one contender trains on with one seed.

    Attributes:
        path: weighted rows.
        teachers: each one's share of the weight.
        held_out: weight by trajectory that the policy gives to the held-out problems' candidates; None for a bucket.
        takes_all: every candidate is trained on, and every problem's alike.
    """

    path: Path
    teachers: Mapping[str, float]
    held_out: Mapping[Key, float] | None
    takes_all: bool


def score_split(config: PilotConfig) -> None:
    """Score what is trained on and what is held out, or what is missing of it.

    Raises:
        UserError: nothing can be scored, or the student differs.
    """
    for name, scores in ((POOL, SCORES), (HELD_OUT, SCORES_HELD_OUT)):
        score_pool(
            ScoreConfig(
                pool=(str(Path(config.out, name)),),
                student=config.student,
                base=config.base,
                out=str(Path(config.out, scores)),
                top_k=config.top_k,
                dtype=config.dtype,
                device=config.device,
                options=config.options,
                chat_template=config.chat_template,
                overwrite=config.overwrite,
                trust_remote_code=config.trust_remote_code,
            )
        )


class Selections:
    """Makes them, once each, from the scores in ``out``."""

    def __init__(self, config: PilotConfig) -> None:
        self.config, self._made = config, dict[str, Selection]()

    def of(self, contender: str, seed: int) -> Selection:
        """The contender's selection; other seeds give another where chance takes part.

        Raises:
            UserError: the policy needs what a pilot cannot give it.
        """
        drawn = contender != FULL and not contender.startswith(BUCKET) and RANDOM in find_policy(contender).columns
        name = f"{contender}-{seed}" if drawn else contender
        if name not in self._made:
            folder = Path(self.config.out, FOLDER, name.replace("/", "_").replace(":", "."))
            if contender == FULL:
                self._made[name] = self._write(folder, None)
            elif contender.startswith(BUCKET):
                self._made[name] = self._write(folder, int(contender.split("-")[1]) - 1)
            else:
                self._made[name] = self._select(contender, seed, folder)
        return self._made[name]

    def _select(self, policy: str, seed: int, folder: Path) -> Selection:
        found = {}
        for pool, scores in ((POOL, SCORES), (HELD_OUT, SCORES_HELD_OUT)):
            # Made anew each time: it takes seconds, and training notices when it is not what it was.
            found[pool] = select(
                SelectConfig(
                    scores=str(Path(self.config.out, scores)),
                    pool=(str(Path(self.config.out, pool)),),
                    out=str(folder / pool.removesuffix(".jsonl")),
                    policy=policy,
                    budget=self.config.budget,
                    seed=seed,
                    overwrite=True,
                )
            )
        weights = pq.read_table(folder / HELD_OUT.removesuffix(".jsonl") / "weights.parquet")
        columns = (weights.column(name).to_pylist() for name in ("problem_id", "candidate_id", "weight"))
        return Selection(
            path=folder / POOL.removesuffix(".jsonl") / TRAIN,
            teachers={name: shares["weight"] for name, shares in found[POOL].teachers.items()},
            held_out={(problem, candidate): weight for problem, candidate, weight in zip(*columns, strict=True)},
            takes_all=found[POOL].problems_kept_whole == found[POOL].problems,
        )

    def _write(self, folder: Path, bucket: int | None) -> Selection:
        """Every trajectory that was scored, or those of one bucket, alike."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        teachers: dict[str, int] = defaultdict(int)
        candidates: dict[str, int] = defaultdict(int)
        with atomic_open(folder / TRAIN) as file:
            for row, record in Matching(RowIndex(self._rows)).pairs(self._pool, f"writing {folder.name}"):
                if bucket is not None and self._bucket[row] != bucket:
                    continue
                teachers[record.teacher] += 1
                candidates[record.key[0]] += 1
                text = {"messages": record.messages, "input_ids": record.input_ids, "labels": record.labels}
                line: dict[str, Any] = {"problem_id": record.problem_id, "candidate_id": record.candidate_id}
                line |= {name: value for name, value in text.items() if value is not None} | {"weight": 1.0}
                file.write(json.dumps(line) + "\n")
        total = max(1, sum(teachers.values()))
        return Selection(
            path=folder / TRAIN,
            teachers={name: count / total for name, count in sorted(teachers.items())},
            held_out=self._all_alike() if bucket is None else None,
            takes_all=bucket is None and len(set(candidates.values())) == 1,
        )

    @property
    def _pool(self) -> Pool:
        return Pool([str(Path(self.config.out, POOL))])

    @cached_property
    def _rows(self) -> ScoredRows:
        return ScoredRows(Path(self.config.out, SCORES), ("g_hat",))

    @cached_property
    def _bucket(self) -> NDArray[np.int64]:
        return buckets_of(self._rows, self.config.buckets)

    def _all_alike(self) -> dict[Key, float]:
        counts: dict[str, int] = defaultdict(int)
        keys = [record.key for record in Pool([str(Path(self.config.out, HELD_OUT))]).read()]
        for problem, _ in keys:
            counts[problem] += 1
        return {key: 1 / counts[key[0]] for key in keys}


def fitting_buckets(out: str, buckets: int) -> int:
    """So many buckets, or as many as half of the problems have candidates to fill; 0 where that is less than two."""
    rows = ScoredRows(Path(out, SCORES), ("g_hat",))
    counts = np.bincount(rows.problem, weights=np.isfinite(rows.numbers["g_hat"]))
    fitting = min(buckets, int(np.median(counts)))
    return fitting if fitting > 1 else 0


def buckets_of(rows: ScoredRows, buckets: int) -> NDArray[np.int64]:
    """``[R]`` each trajectory's bucket, from 0 for the lowest g_hat of its problem; -1 for none.

    Of K candidates, the one of rank r (0 the lowest; the first of ties) is in bucket floor(n (r + 1/2) / K). Problems
    of fewer candidates than buckets are in none, so that each bucket has a candidate of every problem it is made of.
    """
    found = np.full(len(rows), -1, dtype=np.int64)
    g_hat = rows.numbers["g_hat"]
    for block in rows.padded_blocks():
        present = (block >= 0) & np.isfinite(g_hat[block])
        count = present.sum(axis=1, keepdims=True)
        energies = np.where(present, g_hat[block], np.inf)
        rank = np.argsort(np.argsort(energies, axis=1, kind="stable"), axis=1, kind="stable")
        bucket = np.floor(buckets * (rank + 0.5) / np.maximum(count, 1)).astype(np.int64)
        taken = present & (count >= buckets)
        found[block[taken]] = bucket[taken]
    return found
