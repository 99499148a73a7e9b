"""One file with everything that `make evidence-gpu` reads: prepared tokens, their tokenizer, and held-out text.

    make evidence-data INPUT="books/*.txt" TOKENIZER=EleutherAI/pythia-160m [DATA=evidence.tar.xz]

It is made where the tokenizer and the text are, and copied to the GPU: there nothing is fetched or tokenised. What is
inside is the folder that sink-prepare writes, with the shards' checksums, which sink-pretrain compares.
"""

from __future__ import annotations

import lzma
import sys
import tarfile
import tempfile
from pathlib import Path

from recipes.prepare import main as sink_prepare
from sinkmodel.console import command, say
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file, sha256_of
from sinkmodel.parser import path_of

FOLDER = "data"  # inside of the archive
HELD_OUT = "test.jsonl"


def pack(folder: Path, archive: Path, name: str) -> None:
    """Write `folder` as `name` into a .tar.xz; an interrupted call leaves no archive."""
    with atomic_file(archive) as aside, tarfile.open(aside, "w:xz") as tar:
        tar.add(folder, name)


def unpack(archive: Path, folder: Path) -> Path:
    """The prepared folder of an archive, unpacked into `folder` once.

    Raises UserError if the archive is not what `main` packs, or if `folder` holds the data of another one.
    """
    data, marker = folder / FOLDER, folder / "data.sha256"
    if not archive.is_file():
        raise UserError(f"{archive} does not exist; make it with: make evidence-data INPUT=… TOKENIZER=…")
    digest = sha256_of(archive)
    if marker.exists():
        if marker.read_text(encoding="utf-8") != digest:
            raise UserError(f"{folder} holds runs on other data than {archive}; choose another OUTPUT, or remove it")
        return data
    try:
        with tarfile.open(archive, "r:xz") as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}); make it again with make evidence-data") from None
    for name in ("manifest.json", HELD_OUT):
        if not (data / name).is_file():
            raise UserError(f"{archive} has no {FOLDER}/{name}; make it again with make evidence-data")
    marker.write_text(digest, encoding="utf-8")
    return data


@command("bench.gpu.pack")
def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        raise UserError("give the file to write, then sink-prepare's options: bench.gpu.pack FILE --input TEXT …")
    archive = path_of(argv[0])
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / FOLDER
        if code := sink_prepare([*argv[1:], "--output", str(data)]):
            return code
        pack(data, archive, FOLDER)
    say(f"wrote {archive}, {archive.stat().st_size / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
