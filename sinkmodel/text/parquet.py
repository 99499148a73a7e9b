"""Read the texts of a Parquet file, one row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sinkmodel.errors import UserError, first_line

BATCH = 256  # rows in memory as Python strings


def read_parquet(path: Path, column: str, remedy: str, skip: int = 0) -> Iterator[tuple[int, str | None, float]]:
    """Yield (row, its text or None for null, fraction of the file read so far) for each row from `skip` on.

    Raises UserError for a damaged file, for a column that is missing (with `remedy`) or not text, and for a row that is
    not UTF-8.
    """
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            total = file.metadata.num_rows
            if total:  # a file without rows may have any columns
                _check_column(path, file.schema_arrow.names, column, remedy)
            for group in range(file.metadata.num_row_groups):
                if row + file.metadata.row_group(group).num_rows <= skip:
                    row += file.metadata.row_group(group).num_rows
                    continue
                for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], columns=[column]):
                    for text in _texts(path, batch.column(0), column, row):
                        if row >= skip:
                            yield row, text, row / total
                        row += 1
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow sets no errno for a truncated file
            raise
        raise UserError(
            f"{path} is not a valid Parquet file ({first_line(error)}); copy or download it again"
        ) from None


def _check_column(path: Path, names: list[str], column: str, remedy: str) -> None:
    if column not in names:
        there = ", ".join(list(dict.fromkeys(names))[:8])
        raise UserError(f"{path}: no column '{column}' (there is {there or 'none'}); {remedy}")


def _texts(path: Path, values: Any, column: str, first_row: int) -> list[str | None]:
    """The texts of a batch. Untyped bytes, which some programs write, are decoded.

    Checks the values, not the type of the column, since a file without texts may have any type.
    """
    try:
        return [_text(value) for value in values.to_pylist()]
    except (UnicodeDecodeError, TypeError):
        for row, value in enumerate(values, first_row + 1):
            try:
                _text(value.as_py())
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: row {row} is not UTF-8 at byte {error.start} ({error.reason}); fix that row, or write "
                    "the file again from text in UTF-8"
                ) from None
            except TypeError:
                raise UserError(
                    f"{path}: row {row} of the column '{column}' holds {values.type}, not text; write it as text, or "
                    "give sink-prepare the column of the text as --text-key"
                ) from None
        raise


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    raise TypeError
