"""The speed of `sink-prepare` beside `datasets.map`, and beside the tokenizer alone: same text, tokenizer and core.

    python -m bench.peers.preparation [--characters 4000000] [--rounds 5]

Every side is a process that is pinned to one core. It reads the King James Bible as JSON lines, encodes each document
and puts an end-of-text token after it. `datasets.map` does it as the examples of transformers do: one batched map that
encodes, one that joins the ids and cuts them into rows of 1,024, one worker. `tokenizers` alone encodes documents that
are in memory and writes nothing: the limit. The CPU time is that of the process and its workers. The start-up of a
side, measured with one document, is subtracted, since it does not grow with the text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.peers.gate import pin
from bench.peers.turns import Block, Spent, compared, cpu_seconds, run, take_turns
from bench.prepare import BATCH, HELD_OUT, take_texts, write_lines
from recipes.data.tokenization import train_vocabulary

OURS, MAP, ALONE = "sink-prepare", "datasets.map", "tokenizers"
ROW = 1024
MAP_PROGRAM = f"""
import sys
from itertools import chain
from datasets import load_dataset
from tokenizers import Tokenizer

source, tokenizer, output = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer)

def encoded(batch):
    found = tokenizer.encode_batch(batch["text"], add_special_tokens=False)
    return {{"input_ids": [[*encoding.ids, 0] for encoding in found]}}

def in_rows(batch):
    ids = list(chain.from_iterable(batch["input_ids"]))
    return {{"input_ids": [ids[i : i + {ROW}] for i in range(0, len(ids), {ROW})]}}

data = load_dataset("json", data_files=source, split="train", cache_dir=output + "/cache")
data = data.map(encoded, batched=True, batch_size={BATCH}, remove_columns=["text"])
data.map(in_rows, batched=True).save_to_disk(output)
"""
ALONE_PROGRAM = f"""
import json, sys
from tokenizers import Tokenizer

source, tokenizer, _ = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer)
with open(source, encoding="utf-8") as lines:
    texts = [json.loads(line)["text"] for line in lines]
for start in range(0, len(texts), {BATCH}):
    [encoding.ids for encoding in tokenizer.encode_batch(texts[start : start + {BATCH}], add_special_tokens=False)]
"""


def commands(tokenizer: Path) -> dict[str, Callable[[Path, Path], list[str]]]:
    """The command of each side, for a source and an output folder."""

    def ours(source: Path, output: Path) -> list[str]:
        argv = ["--input", source, "--tokenizer", tokenizer, "--output", output, "--workers", "1", *HELD_OUT]
        return [sys.executable, "-m", "recipes.prepare", *map(str, argv)]

    def program(text: str) -> Callable[[Path, Path], list[str]]:
        return lambda source, output: [sys.executable, "-c", text, str(source), str(tokenizer), str(output)]

    return {OURS: ours, MAP: program(MAP_PROGRAM), ALONE: program(ALONE_PROGRAM)}


def block_of(command: Callable[[Path, Path], list[str]], folder: Path) -> Block:
    """A block that prepares the text, without the start-up of the process."""

    def block() -> Spent:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            start = run(command(folder / "one.jsonl", Path(place) / "one"))
            whole = run(command(folder / "text.jsonl", Path(place) / "whole"))
        return Spent(max(1e-3, whole.cpu - start.cpu), max(1e-3, whole.wall - start.wall))

    return block


def report(spent: dict[str, Sequence[Spent]], characters: int) -> list[str]:
    speed = {name: characters / cpu_seconds(blocks) for name, blocks in spent.items()}
    head = f"preparation: {OURS} ({speed[OURS] / 1e6:.2f} million characters per second of CPU time)"
    ratio = f"{head} is {compared(spent[OURS], spent[MAP])} as {MAP} ({speed[MAP] / 1e6:.2f})"
    shares = ", ".join(f"{name} {speed[name] / speed[ALONE]:.0%}" for name in (OURS, MAP))
    return [ratio, f"preparation: share of the limit, the tokenizer alone ({speed[ALONE] / 1e6:.2f}): {shares}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side; five or more have an interval")
    options = parser.parse_args(argv)
    texts = take_texts(None, options.characters)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "tokenizer.json").write_text(train_vocabulary(texts[:66], 8192).definition, encoding="utf-8")
        write_lines(folder / "text.jsonl", texts)
        (folder / "one.jsonl").write_text(json.dumps({"text": "In the beginning"}) + "\n", encoding="utf-8")
        pin()  # the processes that are started from here inherit it
        sides = {name: block_of(command, folder) for name, command in commands(folder / "tokenizer.json").items()}
        spent = take_turns(sides, options.rounds)
    print(*report(spent, sum(map(len, texts))), sep="\n", flush=True)


if __name__ == "__main__":
    main()
