"""Scores from the machines of a Ray cluster, and the same ones from this process.

    python examples/ray_scoring.py      # pip install "lark-fast[ray]"

On a student and answers made here, and a cluster of four CPUs that ends with the program. On a cluster of one's own it
is one command, on any of its nodes; all of them read the student under one path, and one actor takes each GPU:

    ray start --head                                  # the others: ray start --address HEAD:6379
    lark-fast score --pool pool.jsonl --student DIR_OR_ID --out scores/ --engine ray
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from lark_fast.scoring.run import ScoreConfig, score_pool


def rows(scores: str) -> pa.Table:
    """What a run has written: a row a trajectory."""
    return pa.concat_tables([pq.read_table(part) for part in sorted(Path(scores).glob("part-*.parquet"))])


def score(pool: str, student: str, folder: str, actors: int = 2) -> tuple[pa.Table, pa.Table]:
    """The rows of so many actors, and those of this process."""
    how = {"pool": (pool,), "student": student, "dtype": "float32", "device": "cpu", "overwrite": True}
    ours, theirs = str(Path(folder, "scores")), str(Path(folder, "scores-ray"))
    # A run takes the cluster that its caller has; else it looks for one itself, or starts its own.
    own = not ray.is_initialized()
    if own:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        print(*score_pool(ScoreConfig(out=theirs, engine="ray", devices=str(actors), **how)).lines(), sep="\n")
    finally:
        if own:
            ray.shutdown()
    score_pool(ScoreConfig(out=ours, **how))
    return rows(theirs), rows(ours)


if __name__ == "__main__":
    import tiny

    theirs, ours = score(tiny.pool(), tiny.student(), tiny.FOLDER)
    print("teacher, nll, brier, g_hat of the first problem:")
    for row in theirs.slice(0, 4).to_pylist():
        print(f"{row['teacher']:8} {row['nll']:.6f} {row['brier']:.6f} {row['g_hat']:+.6f}")
    moved = [abs(a - b) for a, b in zip(theirs["nll"].to_pylist(), ours["nll"].to_pylist(), strict=True)]
    print(f"{len(moved)} trajectories; no nll is further than {max(moved):.0e} from that of a run without Ray")
