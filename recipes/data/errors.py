"""Errors of the `datasets` library as one line each: what failed, in which file, and what to do."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import textwrap
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path

from sinkmodel.errors import UserError
from sinkmodel.text.content import COMPRESSIONS, not_text, open_uncompressed, remedy

NETWORK = ("aiohttp", "fsspec", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)
PLAIN = (".json", ".jsonl", ".ndjson", ".txt", ".csv", ".tsv")
STAY = (
    "the files of a data set must not change while it is prepared; if they are given as --input, one can be repaired "
    "without losing the work"
)


def dataset_error(what: str, error: Exception, check: str, reading: str | None = None) -> UserError:
    """The UserError for an error of `datasets`.

    Args:
        what: what failed; the message begins with it.
        error: the error that `datasets` raised.
        check: the remedy if neither the network nor a file is the cause.
        reading: the file that was being read, for an error that does not come from its reader.
    """
    if unwritable := _unwritable_cache(error):
        folder, variable = unwritable
        reason = os.strerror(error.errno or 0).lower()  # type: ignore[attr-defined]
        return UserError(
            f"{what}: its cache {folder} cannot be written ({reason}); set {variable} to a folder that can be written"
        )
    if may_pass(error):
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return UserError(f"{what}: {_short(error)}; HF_HUB_OFFLINE is set: unset it, or give a local folder")
        return UserError(
            f"{what}: {_short(error)}; check the network, and run the same command again to resume where it stopped"
        )
    file, column = _place(error)
    where = f"{file}: " if file else ""
    names = getattr(error, "table_column_names", None), getattr(error, "requested_column_names", None)
    if names[0] is not None and names[1] is not None:  # datasets.table.CastError
        return UserError(
            f"{what}: {where}it has the columns {', '.join(names[0])}, and the files before it {', '.join(names[1])}; "
            "give all files the same columns, or give the files as --input, which reads only the text's column"
        )
    if column is not None:
        return UserError(
            f"{what}: {where}the column '{column}' has another type than in the files before it ({_short(error)}); "
            "give it one type in all files, or give the files as --input, which reads only the text's column"
        )
    if file is not None and (why := _not_text(file)):
        return UserError(f"{what}: {file} {why}")
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{what}: {_not_utf8(error, file or reading)}")
    if file is not None:
        return UserError(
            f"{what}: {where}damaged or not of its format ({_short(error)}); repair it or download it again, and "
            f"choose another output folder, since {STAY}"
        )
    if isinstance(error, StopIteration):  # datasets raises it for files without a row
        return UserError(f"{what}: its files hold no rows; give others")
    return UserError(f"{what}: {_short(error)}; {check}")


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: after network errors, time-outs, server errors and rate limits."""
    for each in _chain(error):
        status = getattr(getattr(each, "response", None), "status_code", getattr(each, "status", None))
        if isinstance(status, int):
            return status == 429 or status >= 500
        if isinstance(each, ConnectionError | TimeoutError | asyncio.TimeoutError):
            return True
        if type(each).__module__.partition(".")[0] in NETWORK and not isinstance(each, ValueError):
            return True
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _place(error: BaseException) -> tuple[str | None, str | None]:
    """The file that `datasets` was reading, and the column if it was casting one, from its stack frames."""
    file = column = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if "/datasets/packaged_modules/" in frame.f_code.co_filename and isinstance(frame.f_locals.get("file"), str):
            file = frame.f_locals["file"]
        if frame.f_code.co_filename.endswith("/datasets/table.py") and isinstance(frame.f_locals.get("name"), str):
            column = frame.f_locals["name"]
    return _plain_name(file), column


def _plain_name(file: str | None) -> str | None:
    if file is not None and "::" in file:  # gzip://train.jsonl::/data/train.jsonl.gz, zip://a.jsonl::/data/train.zip
        inner, _, outer = file.partition("::")
        file = f"{outer} ({inner.partition('://')[2]})" if inner.startswith("zip") else outer
    return file


def _not_text(file: str) -> str | None:
    """Why a local file is not UTF-8 text, judged by its first bytes, with the remedy; None if nothing is wrong."""
    path = Path(file)
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    name = path.with_suffix("") if compression else path
    if name.suffix.lower() not in PLAIN or not path.is_file():
        return None
    with path.open("rb") as raw, contextlib.suppress(EOFError, OSError, zlib.error):  # damaged: reported elsewhere
        return not_text(open_uncompressed(raw, compression).read(1 << 12), 0, path)
    return None


def _not_utf8(error: UnicodeDecodeError, file: str | None) -> str:
    if file and file.lower().endswith(".parquet"):
        advice = "repair that row, or write the file again from text in UTF-8"
    else:
        advice = remedy(bytes(error.object), 1, Path(file) if file and Path(file).is_file() else None)
    return f"{file or 'the next row'} is not UTF-8 ({_short(error)}): {advice}"


def _unwritable_cache(error: BaseException) -> tuple[Path, str] | None:
    """The cache folder of Hugging Face's libraries that cannot be written, and the variable that sets its path."""
    import datasets
    from huggingface_hub import constants

    if not isinstance(error, OSError) or error.errno not in UNWRITABLE or not error.filename:
        return None
    place = Path(os.fsdecode(error.filename)).absolute()
    for variable, folder in (
        ("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE),
        ("HF_MODULES_CACHE", datasets.config.HF_MODULES_CACHE),
        ("HF_HUB_CACHE", constants.HF_HUB_CACHE),
    ):
        cache = Path(folder).absolute()
        if place == cache or place in cache.parents or cache in place.parents:
            return cache, variable if variable in os.environ else "HF_HOME"
    return None


def _short(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten(words, 300, placeholder=" …").rstrip(".;: ")
