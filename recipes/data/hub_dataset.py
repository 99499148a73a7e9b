"""A data set of the Hub, or a local folder of the same form, as a corpus. Local files are in `local_files`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from recipes.data.corpus import Document, stamp
from recipes.data.errors import dataset_error
from sinkmodel.console import quiet
from sinkmodel.errors import UserError
from sinkmodel.hub_token import hub_token
from sinkmodel.text.content import open_uncompressed


class HubDataset:
    """One split of a data set, streamed: only the rows that are read are downloaded.

    All rows come from one commit: the newest when the preparation began. If the preparation is resumed,
    `use_revision_of` keeps that commit. A cursor holds a state of `datasets`, taken every REMEMBER rows, and the number
    of rows since then, so that a resume skips whole files.
    """

    REMEMBER = 1000
    BATCH = 1000  # rows of a Parquet file read at a time; the default, the size of its first row group, may be 0

    def __init__(self, name: str, config: str | None, split: str, text_key: str):
        self.name, self.config, self.split, self.text_key = name, config, split, text_key
        self._revision: str | None = None
        self._builder: Any = None
        self.skipped = 0
        self._rows = 0
        self._total: int | None = None

    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = {"dataset": self.name, "config": self.config, "split": self.split}
        folder = Path(self.name)
        if folder.is_dir():
            files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
            identity |= {"files": [stamp(path, name) for name, path in files.items() if "/." not in f"/{name}"]}
        else:
            identity |= {"revision": self._revision or self._open().hash}
        return identity | {"text_key": self.text_key}

    def use_revision_of(self, recorded: dict[str, Any]) -> None:
        """Read the same commit as an earlier run of this preparation, whose identity is `recorded`."""
        if recorded.get("dataset") == self.name:
            self._revision = recorded.get("revision")

    def documents(self, cursor: Any = None) -> Generator[Document]:
        with quiet("datasets", "huggingface_hub"):
            yield from self._documents(cursor or {"row": 0, "state": None, "state_row": 0})

    def _documents(self, cursor: dict[str, Any]) -> Generator[Document]:
        dataset = self._stream()
        state, state_row = cursor["state"], cursor["state_row"]
        if state is not None:
            dataset.load_state_dict(state)
        self.skipped, row, has_text = 0, state_row, cursor["row"] > 0
        for text in self._texts(dataset, row):
            if row >= cursor["row"]:
                if text is not None and text.strip():
                    self._rows, has_text = row, True
                    yield {"row": row, "state": state, "state_row": state_row}, (text,)
                else:
                    self.skipped += 1
            row += 1
            if row % self.REMEMBER == 0:
                state, state_row = dataset.state_dict(), row
        if row == 0:
            raise UserError(f"the data set {self.name} has no rows in its split {self.split}")
        if not has_text:
            raise UserError(f"the {row:,} rows of the data set {self.name} have no text under '{self.text_key}'")

    def strands(self) -> list[Generator[Document]]:
        return [self.documents()]

    def fraction(self) -> float | None:
        return min(1.0, self._rows / self._total) if self._total else None

    def _open(self) -> Any:
        """The data set's builder, which reads one commit; for a data set on the Hub, the commit is its `hash`."""
        import datasets

        if self._builder is None:
            read_compressed_files_whole()
            hub_token()  # raises UserError for a token that cannot be sent
            with self._explained(), quiet("datasets", "huggingface_hub"):
                self._builder = datasets.load_dataset_builder(self.name, self.config, revision=self._revision)
            if getattr(self._builder.config, "batch_size", self.BATCH) is None:
                self._builder.config.batch_size = self.BATCH
        return self._builder

    def _stream(self) -> Any:
        builder = self._open()
        with self._explained():
            dataset = builder.as_streaming_dataset(split=self.split)
        known = (dataset.info.splits or {}).get(self.split)
        self._total = known.num_examples if known else None
        return dataset

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # missing, gated, offline, unknown split or config: all have classes of their own
            what = f"the data set {self.name} (config {self.config}, split {self.split}) cannot be opened"
            raise dataset_error(what, error, "check dataset, dataset_config and dataset_split") from None

    def _texts(self, dataset: Any, row: int) -> Iterator[str | None]:
        """The text of each row, starting at row number `row`; None for a null."""
        rows = iter(dataset)
        while True:
            try:
                content = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the network, a damaged file, files with different columns
                what = f"the data set {self.name} cannot be read beyond its first {row:,} rows"
                raise dataset_error(what, error, "repair that row", self._file(dataset)) from error
            if self.text_key not in content:
                raise UserError(
                    f"the data set {self.name} has a row without text under '{self.text_key}' "
                    f"(there is {', '.join(content)}); set text_key"
                )
            text = content[self.text_key]
            if text is not None and not isinstance(text, str):
                raise UserError(
                    f"the data set {self.name}: row {row + 1:,} has no text under '{self.text_key}' but "
                    f"{type(text).__name__} (there is {', '.join(content)}); set text_key, or make it text"
                )
            yield text
            row += 1

    def _file(self, dataset: Any) -> str | None:
        """The file that is being read, from its number in the state of `datasets`; None if that is not known."""
        state, files = dataset.state_dict(), (self._open().config.data_files or {}).get(self.split, [])
        while isinstance(state, dict) and "shard_idx" not in state:
            state = state.get("examples_iterable")
        number = state["shard_idx"] if state else len(files)
        return str(files[number]) if number < len(files) else None


def read_compressed_files_whole() -> None:
    """Make `datasets` read .xz and .zst with our reader: its own readers end silently at padding or damage."""
    from fsspec.compression import register_compression

    for name, suffix in (("xz", ".xz"), ("zstd", ".zst")):
        reader = functools.partial(_opened, suffix)
        register_compression(name, reader, suffix.removeprefix("."), force=True)


def _opened(suffix: str, file: Any, **_: Any) -> Any:
    return open_uncompressed(file, suffix)
