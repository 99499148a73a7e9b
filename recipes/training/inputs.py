"""The inputs of a run, checked against its config: token shards, tokenizer, rows of the vocabulary, batches."""

from __future__ import annotations

from pathlib import Path

from recipes.data.datamodule import BatchPlan, TextDataModule
from recipes.data.rows import RowLayout
from recipes.data.shards import TokenSplit, open_split, read_manifest
from recipes.training.settings import PretrainConfig
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.sinks import padded_vocabulary
from sinkmodel.tokenizer import TextTokenizer, sink_tokenizer


def open_data(config: PretrainConfig, verify: str) -> tuple[TokenSplit, TokenSplit | None]:
    """The splits for training and validation. The latter is None, with a log line, if it has less than one row."""
    folder, sequence = Path(config.data.path), config.data.sequence
    train = open_split(folder, "train", verify)
    if not read_manifest(folder)["splits"].get("validation", {}).get("tokens"):
        say(f"{folder} has no validation split: no validation loss is measured")
        return train, None
    validation = open_split(folder, "validation", verify)
    if RowLayout(validation, sequence).rows == 0:
        say(
            f"the validation split of {folder} has {validation.tokens:,} tokens, less than one row of data.sequence = "
            f"{sequence:,}: no validation loss is measured; for one, hold out more text with sink-prepare "
            "(--validation-fraction, --validation-input), or take a shorter data.sequence"
        )
        return train, None
    return train, validation


def open_tokenizer(config: PretrainConfig, train: TokenSplit) -> TextTokenizer:
    """The tokenizer of the data. UserError if the sinks cannot be added to it: no model could be exported then."""
    text = TextTokenizer.from_file(train.tokenizer_file, train.eos_id, train.pad_id)
    if text.vocabulary < train.vocabulary:  # then the data may hold ids that the tokenizer does not have
        raise UserError(
            f"{train.tokenizer_file} has {text.vocabulary} ids, but the manifest beside it states {train.vocabulary}: "
            "it has been altered; prepare the folder again with sink-prepare"
        )
    sink_tokenizer(text, config.sink)
    return text


def vocabulary_rows(config: PretrainConfig, vocabulary: int) -> int:
    """Number of rows of the embedding. UserError if the text vocabulary and the sinks do not fit in."""
    rows = padded_vocabulary(vocabulary) if config.model.vocabulary is None else config.model.vocabulary
    if vocabulary + config.sink.tokens > rows:
        raise UserError(
            f"the tokenizer of {config.data.path} does not fit the model: it has {vocabulary} ids and "
            f"{config.sink.tokens} sinks come on top, but model.vocabulary is {rows}; set it to "
            f"{padded_vocabulary(vocabulary)}, or to null to have it chosen"
        )
    return rows


def build_datamodule(
    config: PretrainConfig,
    train: TokenSplit,
    validation: TokenSplit | None,
    sink_ids: list[int],
    plan: BatchPlan,
) -> TextDataModule:
    return TextDataModule(
        train,
        validation,
        sink_ids,
        sequence=config.data.sequence,
        plan=plan,
        steps=config.schedule.steps,
        seed=config.seed,
        shuffle=config.data.shuffle,
        validation_rows=config.validation.rows,
        workers=config.data.workers,
        skip=config.data.skip or 0,
    )
