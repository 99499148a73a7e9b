"""The speed of `sink-prepare` compared with a plain `tokenizers` loop over the same text, tokenizer and cores.

    python bench/prepare.py                                       King James text, a BPE trained on the spot
    python bench/prepare.py --input books.jsonl.xz --tokenizer tokenizer.json --characters 30000000

The plain loop is `encode_batch` over batches of whole documents on all cores, with its ids extracted. Its text and
tokenizer are already in memory, and nothing is written. `sink-prepare` runs as for users, from reading the file to the
manifest. Its start-up (a second or less) is measured with a hundredth of the text and subtracted, since it does not
grow with the text. The rounds alternate, and the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer

from recipes.data.local_files import LocalFiles
from recipes.data.tokenization import load_vocabulary, train_vocabulary
from recipes.demo.king_james import KingJames

BATCH = 64  # documents in a batch of the plain loop
HELD_OUT = ["--validation-fraction", "0", "--test-fraction", "0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help="a text file (default: the King James Bible, repeated)")
    parser.add_argument("--tokenizer", help="a tokenizer.json (default: a byte-level BPE of 8,192 ids)")
    parser.add_argument("--characters", type=int, default=16_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    texts = take_texts(options.input, options.characters)
    vocabulary = load_vocabulary(options.tokenizer) if options.tokenizer else train_vocabulary(texts[:66], 8192)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "tokenizer.json").write_text(vocabulary.definition, encoding="utf-8")
        write_lines(here / "text.jsonl", texts)
        write_lines(here / "little.jsonl", [text[: len(text) // 100 + 1] for text in texts])
        plain, ours = [], []
        for number in range(options.rounds):
            plain.append(plain_loop(vocabulary.definition, texts))
            start_up, _ = prepare(here, "little.jsonl", f"little{number}")
            seconds, tokens = prepare(here, "text.jsonl", f"out{number}")
            ours.append((tokens - len(texts)) / (seconds - start_up))  # without the end-of-text tokens
            print(f"round {number + 1}: plain {plain[-1]:,.0f}, sink-prepare {ours[-1]:,.0f} tokens/s", file=sys.stderr)
    ratio = statistics.median(ours) / statistics.median(plain)
    print(f"text           {sum(map(len, texts)):,} characters, {len(texts)} documents, {vocabulary.size:,} ids")
    print(f"encode_batch   {statistics.median(plain):,.0f} tokens/s")
    print(f"sink-prepare   {statistics.median(ours):,.0f} tokens/s, after {start_up:.1f} s of start-up")
    print(f"ratio          {ratio:.2f}")


def take_texts(name: str | None, characters: int) -> list[str]:
    corpus = LocalFiles([name], "text") if name else KingJames()
    texts: list[str] = []
    length = 0
    while length < characters:
        for _, chunks in corpus.documents():
            texts.append("".join(chunks))
            length += len(texts[-1])
            if length >= characters:
                break
    return texts


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def plain_loop(definition: str, texts: list[str]) -> float:
    """Tokens per second of the tokenizers library alone."""
    tokenizer = Tokenizer.from_str(definition)
    began, tokens = time.perf_counter(), 0
    for start in range(0, len(texts), BATCH):
        encodings = tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)
        tokens += sum(len(encoding.ids) for encoding in encodings)
    return tokens / (time.perf_counter() - began)


def prepare(folder: Path, source: str, output: str) -> tuple[float, int]:
    """Run the command. Returns its seconds and tokens."""
    argv = ["--input", str(folder / source), "--tokenizer", str(folder / "tokenizer.json")]
    began = time.perf_counter()
    command = [sys.executable, "-m", "recipes.prepare", *argv, *HELD_OUT, "--output", str(folder / output)]
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    manifest = json.loads((folder / output / "manifest.json").read_text(encoding="utf-8"))
    return seconds, manifest["splits"]["train"]["tokens"]


if __name__ == "__main__":
    main()
