"""Where attention goes, head by head (`sink-eval sinks`); and at which of a run's checkpoints the sink appears.

The sink metric is that of Gu et al. (arXiv 2410.10781); `sinkmodel.sink_metric` defines it. It is reported for the
first text token and for the model's own sink. `shares` computes the numbers, and `sinkmodel.attention_maps` extracts
the attention maps.

The numbers are means over sequences of one length T, which are cut from texts without sampling. The first T text tokens
of a document are its first piece, the next T its second, and so on; a remainder is not used. Documents are taken from
the files in turns. Pieces are taken from the documents in turns: first the first piece of each, then the second of
each, until there are enough. A model with S sink tokens reads these sinks and then the first T − S tokens of the same
pieces, so that twins read the same text and every sequence has T positions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from eval.measures.attention.shares import Tally, results
from eval.measures.loading import load
from sinkmodel.attention_maps import watch
from sinkmodel.checkpoint import Recipe, checkpoint_steps, find_checkpoint, read_checkpoint
from sinkmodel.console import say
from sinkmodel.errors import UserError, not_finite
from sinkmodel.files import sha256_of
from sinkmodel.loading import LoadedModel, encode
from sinkmodel.progress import CountedProgress
from sinkmodel.results.attention import (
    Birth,
    BirthResult,
    CheckpointRow,
    SinksResult,
)
from sinkmodel.results.parts import Text
from sinkmodel.sink_metric import born
from sinkmodel.sinks import kind_of
from sinkmodel.softmax_sinks.architectures import attentions_of
from sinkmodel.text import read_documents

TOKENS_AT_ONCE = 2048  # tokens of one forward; their hidden states are held for all layers
Item = TypeVar("Item")


def run(options: argparse.Namespace, shortest: int) -> tuple[SinksResult, list[dict[str, Tensor]]]:
    """The result for one model, and for each layer the means that maps are drawn from.

    Args:
        options: those of `eval.commands.sinks`.
        shortest: fewest text tokens of a sequence.
    """
    loaded = load(options)
    _check_model(loaded, options, shortest)
    texts, sequences = read_sequences(loaded, options.text, options.sequences, options.length)
    means = measure(loaded, sequences, options.epsilon, "sinks")
    rows, overall, heads_by_place = results(means, len(loaded.sink_ids), own_key_norms(loaded.model))
    result = SinksResult(
        **_setting(loaded, options, texts, sequences), rows=rows, overall=overall, heads_by_place=heads_by_place
    )
    return result, means


def over_checkpoints(options: argparse.Namespace, shortest: int, threshold: float) -> BirthResult:
    """The result for every checkpoint of a run, and when its sink is born.

    Args:
        options: those of `eval.commands.sinks`.
        shortest: fewest text tokens of a sequence.
        threshold: the share of heads with a sink above which the sink counts as born.
    """
    checkpoints = _checkpoints(Path(options.model))
    loaded = load(options, str(next(iter(checkpoints))))
    _check_model(loaded, options, shortest)
    texts, sequences = read_sequences(loaded, options.text, options.sequences, options.length)
    setting = _setting(loaded, options, texts, sequences)
    rows = _rows(options, loaded, checkpoints, sequences)
    return BirthResult(**setting, rows=rows, born=_birth(rows, threshold))


def _setting(
    loaded: LoadedModel, options: argparse.Namespace, texts: list[Text], sequences: list[list[int]]
) -> dict[str, Any]:
    """The fields of a result that describe the measurement."""
    return {
        "model": options.model,
        "sink_ids": loaded.sink_ids,
        "length": options.length,
        "sequences": len(sequences),
        "epsilon": options.epsilon,
        "dtype": options.dtype,
        "device": str(loaded.model.device),
        "texts": texts,
    }


def _checkpoints(run: Path) -> dict[Path, tuple[int, int]]:
    """The checkpoints of a run in order of steps, each with (step, tokens seen). Raises UserError if one is damaged."""
    if not run.is_dir():
        raise UserError(f"--checkpoints needs a run folder as --model; {run} is not a folder")
    find_checkpoint(run)
    recipes = {path: Recipe.from_dict(read_checkpoint(path)["recipe"]) for path in checkpoint_steps(run).values()}
    return {path: (recipe.step, recipe.tokens) for path, recipe in recipes.items()}


def _check_model(loaded: LoadedModel, options: argparse.Namespace, shortest: int) -> None:
    """Raise UserError for heads or positions that the model lacks, or if its sinks leave no room for text."""
    sinks = len(loaded.sink_ids)
    if options.length < sinks + shortest:
        raise UserError(
            f"--length {options.length} leaves too little text after the model's {sinks} sink tokens; "
            f"use at least {sinks + shortest}"
        )
    if loaded.positions is not None and options.length > loaded.positions:
        raise UserError(
            f"--length {options.length} is longer than the {loaded.positions} positions that {loaded.name} was made "
            f"for; use {loaded.positions} or less"
        )
    config = loaded.model.config.get_text_config()
    for layer, head in options.heads or ():
        if layer >= config.num_hidden_layers or head >= config.num_attention_heads:
            raise UserError(
                f"--heads {layer}.{head}: {loaded.name} has layers 0 to {config.num_hidden_layers - 1} with heads 0 to "
                f"{config.num_attention_heads - 1}"
            )


# --------------------------------------------------------------------------------------------------- what is measured


def measure(loaded: LoadedModel, sequences: list[list[int]], epsilon: float, label: str) -> list[dict[str, Tensor]]:
    """For each layer the means of `layer_sums` over sequences. Raises UserError if the model cannot be watched."""
    model = loaded.model
    tally = Tally(len(loaded.sink_ids), epsilon)
    rows = max(1, TOKENS_AT_ONCE // len(sequences[0]))
    with CountedProgress(label, "tokens", sum(map(len, sequences))) as progress:
        for ids_BT in torch.tensor(sequences).split(rows):
            output = watch(model, ids_BT.to(model.device), tally.see, output_hidden_states=True)
            tally.end_batch(len(ids_BT), output.hidden_states[:-1])
            progress.add(ids_BT.numel())
    means = tally.means()
    if not all(
        bool(torch.isfinite(mean[name]).all()) for mean in means for name in ("peak", "first_alpha", "key_norm")
    ):
        raise UserError(f"{loaded.name}: {not_finite(model, 'attention maps')}")
    return means


def own_key_norms(model: Any) -> list[float | None]:
    """For each layer the norm of the key of a sink in the softmax, averaged over the KV heads; None without a key."""
    if kind_of(model.config) == "kv_bias":
        keys_GD: list[Any] = [module.sink for module in attentions_of(model)]
        return [key_GD.float().norm(dim=-1).mean().item() for key_GD in keys_GD]
    return [0.0 if kind_of(model.config) == "zero" else None] * model.config.get_text_config().num_hidden_layers


def _rows(
    options: argparse.Namespace,
    loaded: LoadedModel,
    checkpoints: dict[Path, tuple[int, int]],
    sequences: list[list[int]],
) -> list[CheckpointRow]:
    """One row per checkpoint, with its layers and heads. `loaded`: the first checkpoint."""
    rows = []
    for i, (path, (step, tokens)) in enumerate(checkpoints.items(), 1):
        if i > 1:
            loaded = load(options, str(path))
        means = measure(loaded, sequences, options.epsilon, f"{i}/{len(checkpoints)} step {step}")
        layers, overall, places = results(means, len(loaded.sink_ids), own_key_norms(loaded.model))
        rows.append(CheckpointRow(step=step, tokens=tokens, **vars(overall), heads_by_place=places, layers=layers))
    return rows


def _birth(rows: list[CheckpointRow], threshold: float) -> Birth:
    target = "first" if rows[0].sink_heads is None else "sink"
    shares = [(row.step, row.shares[f"{target}_heads"]) for row in rows]
    step = born([(step, share) for step, share in shares if share is not None], threshold)
    tokens = next((row.tokens for row in rows if row.step == step), None)
    return Birth(target=target, threshold=threshold, step=step, tokens=tokens)


# -------------------------------------------------------------------------------------------------------- the sequences


def read_sequences(
    loaded: LoadedModel, files: Sequence[Path], count: int, length: int
) -> tuple[list[Text], list[list[int]]]:
    """Returns, for each file, a summary of what was used of it; and at most `count` sequences of `length` ids.

    Each sequence begins with the model's sinks. Raises UserError if no document has `length` tokens. If there are fewer
    than `count` sequences, this is reported.
    """

    def long_enough(file: Path) -> Iterator[tuple[Path, str]]:
        return ((file, text) for text in read_documents(file) if len(encode(loaded, text, length)) == length)

    each = -(-count // len(files))
    while True:  # only one file is open at a time: there may be more files than a process may open
        of_files = [list(islice(long_enough(file), each)) for file in files]
        if sum(map(len, of_files)) >= count or all(len(found) < each for found in of_files):
            break
        each *= 2
    documents = list(islice(in_turns(of_files), count))
    if not documents:
        names = ", ".join(map(str, files))
        raise UserError(f"no document of {names} has {length} tokens; lower --length or give longer texts")
    taken: list[tuple[Path, list[int]]] = []
    for each in dict.fromkeys((-(-count // len(documents)), count)):  # if some are short, take more of the long ones
        of_all = [
            [(file, piece) for piece in pieces(encode(loaded, text, each * length), length)] for file, text in documents
        ]
        taken = list(islice(in_turns(of_all), count))
        if len(taken) == count:
            break
    if len(taken) < count:
        say(f"the texts have {len(taken)} sequences of {length} tokens, fewer than --sequences {count}")
    texts = [
        Text(file=str(file), sha256=sha256_of(file), sequences=sum(of == file for of, _ in taken))
        for file in dict.fromkeys(files)
    ]
    return texts, [(loaded.sink_ids + piece)[:length] for _, piece in taken]


def pieces(ids: Sequence[int], length: int) -> list[list[int]]:
    """Consecutive pieces of `length` ids; a remainder is not used."""
    return [list(ids[first : first + length]) for first in range(0, len(ids) - length + 1, length)]


def in_turns(sources: Iterable[Iterable[Item]]) -> Iterator[Item]:
    """The first item of each source, then the second of each, and so on; exhausted sources are skipped."""
    left = [iter(source) for source in sources]
    while left:
        going = []
        for source in left:
            for item in source:
                yield item
                going.append(source)
                break
        left = going
