"""The settings of `sink-prepare`, and checks of their combinations."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.config import PathText
from recipes.data.tokenization import SMALLEST_VOCABULARY
from sinkmodel.checks import check_bounds
from sinkmodel.errors import UserError

HELD_OUT = 0.01  # default share of documents of each held-out split


@dataclass
class PrepareConfig:
    """Turn text into token shards with a manifest. After a kill, the same command resumes where it stopped.

    Args:
        output: folder to make.
        input: files (.txt, .jsonl, .ndjson, .json, .parquet, also .gz, .zst, .xz), folders or patterns; or one
            Megatron .idx file.
        validation_input: files for the validation split, instead of a share of the documents.
        test_input: files for the test split, instead of a share of the documents.
        dataset: a data set of the Hub, or a local folder of the same form; `kjv` is the King James Bible, for the demo.
        dataset_config: the data set's configuration, such as `sample-10BT`.
        dataset_split: the data set's split to train on, from which held-out documents are taken too.
        validation_split: the data set's own validation split, instead of a share of the documents.
        test_split: the data set's own test split, instead of a share of the documents.
        text_key: key of the text in JSON lines, or its column in Parquet files and data sets.
        separator: text that ends a document inside a .txt file, such as `<|endoftext|>`. If empty, each file is one
            document.
        tokenizer: a tokenizer.json, a folder with one, or a model whose tokenizer is used: a Hub name, a model folder,
            a run, a checkpoint, a `.gguf` file or a package with one. Null trains a byte-level BPE on the text.
        vocabulary_size: number of ids of the BPE trained on the text, end of text and padding included.
        validation_fraction: share of documents held out for validation; null takes 0.01, or 0 if there is validation
            text.
        test_fraction: share of documents held out for tests; null takes 0.01, or 0 if there is test text.
        seed: random seed that decides which documents are held out.
        shard_tokens: number of tokens of a full shard.
        workers: number of processes that encode; null takes one per core.
    """

    output: PathText = ""
    input: list[PathText] | PathText | None = None
    validation_input: list[PathText] | PathText | None = None
    test_input: list[PathText] | PathText | None = None
    dataset: PathText | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    text_key: str = "text"
    separator: str = ""  # str without null: as `str | None`, YAML would read `---` or `#` as null
    tokenizer: PathText | None = None
    vocabulary_size: int | None = None
    validation_fraction: float | None = None
    test_fraction: float | None = None
    seed: int = 0
    shard_tokens: int = 1 << 27
    workers: int | None = None

    def __post_init__(self) -> None:
        if not self.output:
            raise UserError("output is missing; name the folder to make, as in --output data/books; --help shows more")
        if (self.input is None) == (self.dataset is None):
            raise UserError("give either --input FILE… or --dataset NAME; --help shows examples")
        if (self.tokenizer is None) == (self.vocabulary_size is None):
            raise UserError(
                "give either --tokenizer (a tokenizer.json or a model) or --vocabulary-size to train one here"
            )
        if self.vocabulary_size is not None and self.vocabulary_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"vocabulary_size is {self.vocabulary_size}; a byte-level BPE needs at least {SMALLEST_VOCABULARY}: "
                "every byte and the two special tokens"
            )
        if self.separator and self.input is None:
            raise UserError("separator is for .txt files given with --input; leave it out")
        if self.megatron_index and self.tokenizer is None:
            raise UserError("a Megatron index holds tokens, not text: give the --tokenizer that they were made with")
        for split in ("validation", "test"):
            fraction, files = getattr(self, f"{split}_fraction"), getattr(self, f"{split}_input")
            own = getattr(self, f"{split}_split")
            if sum(value is not None for value in (fraction or None, files, own)) > 1:
                raise UserError(f"give one of {split}_fraction, {split}_input and {split}_split, not several")
            if own and (self.dataset is None or self.dataset == "kjv"):
                raise UserError(f"{split}_split names a split of a Hub data set; for files take {split}_input")
            check_bounds(f"{split}_fraction", fraction, least=0, below=1)
        if sum(self.fractions) >= 1:
            raise UserError("validation_fraction and test_fraction leave nothing to train on; lower them")
        for name, least, most in (("seed", 0, 2**63), ("shard_tokens", 1024, 2**40), ("workers", 1, 1024)):
            check_bounds(name, getattr(self, name), least, most)

    @property
    def fractions(self) -> tuple[float, float]:
        """Shares of the documents that are held out for validation and for tests."""

        def share(given: float | None, own_text: Any) -> float:
            return given if given is not None else 0.0 if own_text else HELD_OUT

        return (
            share(self.validation_fraction, self.validation_input or self.validation_split),
            share(self.test_fraction, self.test_input or self.test_split),
        )

    @property
    def megatron_index(self) -> Path | None:
        """The .idx file if the training text is pre-shuffled Megatron data, else None."""
        names = [self.input] if isinstance(self.input, str) else self.input or []
        alone = len(names) == 1 and names[0].endswith(".idx") and not glob.has_magic(names[0])
        return Path(names[0]) if alone else None
