"""The rows of a Parquet file as raw records, a few at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lark_fast.errors import RejectError
from lark_fast.pool.decoding import too_much_content
from lark_fast.pool.files import cannot_read
from lark_fast.pool.splitting import too_long

_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 256
_READ_BUFFER_BYTES = 1 << 20


def read_parquet_rows(
    path: Path,
    on_read: Callable[[int], None],
    max_record_bytes: int,
    *,
    free_bytes: int = 1 << 30,
    max_ratio: int = 500,
) -> Iterator[tuple[int, dict[str, Any] | RejectError]]:
    """Yield (row, columns) for every row, counted from 1; in place of columns the RejectError that says why not.

    Damage, and content beyond both ``free_bytes`` and ``max_ratio`` times the file's size, end the file with one
    reject. ``on_read`` hears of the share of the file's bytes that the rows so far stand for. UserError when the
    file cannot be opened.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            parquet = pq.ParquetFile(file, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
            n_rows, limit, reported = parquet.metadata.num_rows, max(free_bytes, max_ratio * size), 0
            for batch in _batches(parquet, limit):
                limit -= batch.nbytes
                if limit < 0:
                    raise _TooMuchContentError
                for columns in _rows(batch, max_record_bytes):
                    row += 1
                    yield row, columns
                done = size * row // max(n_rows, row)
                on_read(done - reported)
                reported = done
    except _TooMuchContentError:
        yield row + 1, RejectError(too_much_content(free_bytes, max_ratio))
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise cannot_read(path, error) from None
        yield row + 1, RejectError(f"corrupt Parquet: {_first_line(error)}")


class _TooMuchContentError(Exception):
    """The file unpacks to more than any honest one."""


def _batches(parquet: Any, limit: int) -> Iterator[Any]:
    """Yield record batches, small in rows and bytes; none spans row groups, so that damage costs no earlier one."""
    for index in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(index)
        # What a dictionary repeats is not in this figure, but a page is unpacked whole before any row of it is there.
        if group.total_byte_size > limit:
            raise _TooMuchContentError
        row_bytes = group.total_byte_size // max(group.num_rows, 1)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(row_bytes, 1)))
        yield from parquet.iter_batches(rows, row_groups=[index], use_threads=False)


def _rows(batch: Any, max_record_bytes: int) -> list[dict[str, Any] | RejectError]:
    """Return the rows of a batch; those that are too long or that Python cannot hold are rejected alone."""
    try:
        if batch.nbytes <= max_record_bytes:
            return batch.to_pylist()
        reject = too_long(max_record_bytes)
    except (ValueError, OverflowError, NotImplementedError) as error:
        reject = RejectError(f"the row cannot be decoded: {_first_line(error)}")
    if batch.num_rows == 1:
        return [reject]
    return [row for offset in range(batch.num_rows) for row in _rows(batch.slice(offset, 1), max_record_bytes)]


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    # Arrow quotes bytes of the file as they are.
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
