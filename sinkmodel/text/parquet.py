"""The texts of a Parquet file, row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sinkmodel.errors import UserError, first_line

BATCH = 256  # rows that are in memory as Python strings


def read_parquet(path: Path, column: str, remedy: str, skip: int = 0) -> Iterator[tuple[int, str | None, float]]:
    """(row, its text or None for null, share of the file that has been read) of each row from `skip` on.

    Raises UserError for a file that is not sound, a column that is missing or not text (with `remedy`), and a row that
    is not UTF-8.
    """
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, column, remedy)
            total = file.metadata.num_rows
            for group in range(file.metadata.num_row_groups):
                if row + file.metadata.row_group(group).num_rows <= skip:
                    row += file.metadata.row_group(group).num_rows
                    continue
                for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], columns=[column]):
                    for text in _strings(path, batch.column(0), row):
                        if row >= skip:
                            yield row, text, row / total
                        row += 1
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow has none for a file that is cut short
            raise
        raise UserError(
            f"{path} is not a sound Parquet file ({first_line(error)}); copy or download it again"
        ) from None


def _check_column(path: Path, schema: Any, column: str, remedy: str) -> None:
    import pyarrow

    if column not in schema.names:
        there = ", ".join(list(dict.fromkeys(schema.names))[:8])
        raise UserError(f"{path}: no column '{column}' (there is {there or 'none'}); {remedy}")
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_null(kind) or "string" in str(kind)):
        raise UserError(f"{path}: the column '{column}' holds {kind}, not text; {remedy}")


def _strings(path: Path, values: Any, first_row: int) -> list[str | None]:
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        for row, value in enumerate(values, first_row + 1):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: row {row} is not UTF-8 at byte {error.start} ({error.reason}); mend that row, or write "
                    "the file again from text in UTF-8"
                ) from None
        raise
