"""The last step of a scores directory: rho and g_hat for every row, without holding the rows in memory; of estimates
(``head_sampling``) the standard errors of g_hat too.

A problem's candidates may lie in any parts. Problems are hashed into groups that fit in memory, one pass over the parts
a group, and g_hat waits in a file on disk until the parts are rewritten: only those whose rows changed.
"""

import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lark_fast.scoring.learnability import g_hat, g_hat_se, measured_rate, rho
from lark_fast.scoring.parts import STATISTICS, is_sampled, number_of_rows, part_files, reading, schema_of, write_part

GROUP_ROWS = 1_000_000  # rows whose problems are grouped in memory at a time


def add_learnability(directory: Path, identity: dict[str, Any], steps: int | None = None) -> dict[str, int]:
    """Give all rows of a directory their rho and g_hat, and of a pair their rho_measured.

    Args:
        directory: of the parts.
        identity: of the store.
        steps: between the two states of the student, of a pair.

    Returns:
        The numbers of ``rows``, of ``problems``, and of rows without a g_hat, ``not_finite``.

    Raises:
        UserError: a part cannot be read.
        OSError: the disk is full or cannot be written to.
    """
    parts = part_files(directory)
    sizes = [number_of_rows(part) for part in parts]
    total = sum(sizes)
    if not total:
        return {"rows": 0, "problems": 0, "not_finite": 0}
    groups = 1 + total // GROUP_ROWS
    score = "brier" if identity["top_k"] is None else "brier_topk"
    made = ["g_hat", "g_hat_se"] if is_sampled(identity) else ["g_hat"]
    numbers = ["nll", score, *(["nll_se", f"{score}_se", "nll_brier_cov"] if is_sampled(identity) else [])]
    problems = 0
    origin: dict[int, int] = {}  # row -> the first row of its problem with the same tokens
    with tempfile.TemporaryFile(dir=directory) as scratch:
        # A full disk is an error here; behind a mapping of a file with holes it would be the end of the process.
        size = 8 * len(made) * total
        scratch.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(scratch.fileno(), 0, size)
        values = np.memmap(scratch, dtype=np.float64, mode="r+", shape=(len(made), total))
        for group in range(groups):
            rows, problem, tokens, *columns = _read_group(parts, sizes, numbers, group, groups)
            problems += len(np.unique(problem))
            first = first_with_same_tokens(problem, tokens)
            nll, brier, *errors = (column[first] for column in columns)
            values[0, rows] = g_hat(nll, brier, problem)
            if errors:
                values[1, rows] = g_hat_se(nll, brier, problem, *errors, origin=first)
            moved = np.flatnonzero(first != np.arange(len(first)))
            origin.update(zip(rows[moved].tolist(), rows[first[moved]].tolist(), strict=True))
        final = schema_of(identity, final=True)
        _rewrite(parts, sizes, score, final, dict(zip(made, values, strict=True)), origin, steps)
        not_finite = int(np.count_nonzero(np.isnan(values[0])))
    return {"rows": total, "problems": problems, "not_finite": not_finite}


def _read(part: Path, columns: list[str] | None = None) -> pa.Table:
    with reading(part):
        return pq.read_table(part, columns=columns)


def _read_group(
    parts: list[Path], sizes: list[int], columns: list[str], group: int, groups: int
) -> tuple[np.ndarray, ...]:
    """Row numbers, problem codes, token-hash codes and these columns of one group's rows."""
    names = ["problem_id", "token_hash", *columns]
    rows, tables, start = [], [], 0
    for part, size in zip(parts, sizes, strict=True):
        table = _read(part, names)
        keep = np.arange(size)
        if groups > 1:
            ids = table["problem_id"].combine_chunks().dictionary_encode()
            of_word = np.array([zlib.crc32(word.encode()) % groups for word in ids.dictionary.to_pylist()])
            keep = np.flatnonzero(of_word[ids.indices.to_numpy()] == group)
            table = table.take(keep)
        rows.append(start + keep)
        tables.append(table)
        start += size
    table = pa.concat_tables(tables).combine_chunks()
    codes = [table[name].combine_chunks().dictionary_encode().indices.to_numpy() for name in names[:2]]
    numbers = [table[name].to_numpy() for name in names[2:]]
    return np.concatenate(rows), *codes, *numbers


def _rewrite(
    parts: list[Path],
    sizes: list[int],
    score: str,
    final: pa.Schema,
    values: dict[str, np.ndarray],
    origin: dict[int, int],
    steps: int | None,
) -> None:
    """Give every part its final columns. Rows with the tokens of an earlier candidate take that one's numbers."""
    shared = [name for name in (*STATISTICS, "n_raced", "n_head") if name in final.names]
    wanted = set(origin.values())
    numbers: dict[int, tuple[float, ...]] = {}
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        table = _read(part)
        columns = {name: table[name].to_numpy().copy() for name in shared}
        here = range(start, start + size)
        for row in sorted((wanted | origin.keys()) & set(here)) if origin else ():
            if row in origin:
                for name, number in zip(shared, numbers[origin[row]], strict=True):
                    columns[name][row - start] = number
            else:
                numbers[row] = tuple(columns[name][row - start] for name in shared)
        columns["rho"] = rho(columns["nll"], columns[score])
        columns |= {name: column[start : start + size] for name, column in values.items()}
        if "rho_measured" in final.names:
            columns["rho_measured"] = measured_rate(columns["nll"], columns["nll_after"], steps)
        if not _holds(table, columns, final):
            made = [pa.array(columns[n], final.field(n).type) if n in columns else table[n] for n in final.names]
            write_part(part, pa.table(made, schema=final))
        start += size


def _holds(table: pa.Table, columns: dict[str, np.ndarray], final: pa.Schema) -> bool:
    """Whether the table is final and has these columns; NaN, a row without a g_hat, is equal to NaN."""
    return table.schema.equals(final) and all(
        np.array_equal(table[name].to_numpy(), column, equal_nan=True) for name, column in columns.items()
    )


def first_with_same_tokens(problem: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """For each row, the first row of the same problem and token hash."""
    order = np.lexsort((np.arange(len(problem)), tokens, problem))
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (np.diff(problem[order]) != 0) | (np.diff(tokens[order]) != 0)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return first
