"""Typed configuration: dataclasses filled from YAML files and `--a.b value`, checked before anything runs."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import typing
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from sinkmodel.checks import not_one_of
from sinkmodel.errors import UserError, shell
from sinkmodel.parser import VERSION, name_of, path_of

T = TypeVar("T")
WITHOUT_KEY = ("--help", "--version", "--print_config")  # options that are not keys of a config
PLAIN = re.compile(r"(?<![\w-])--[a-z]+(?:_[a-z]+)+(?![\w.])")  # an option of several words, without a dot
PathText = typing.Annotated[str, "path"]
"""The type of a key that is a path, or a name that may be one: `~` in it is the home folder."""
TYPE_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}


def load_config(cls: type[T], argv: list[str], description: str, example: str) -> T:
    """Fill the dataclass `cls` from `--config` files (in order; shipped ones by name) and `--key value` (last wins).

    `option_of` spells the options. Until 0.2 a plain one may also have underscores.

    Raises UserError for an unknown key (naming the most similar valid one), a wrong type, or a missing file.
    `--help` prints every key with its default and exits; `--version` prints the version and exits.
    """
    argv = _resolve_config_files(_with_keys(cls, argv))
    _refuse_unknown_options(cls, argv)
    parser = jsonargparse.ArgumentParser(
        prog=example.partition(" ")[0],
        description=f"{description}\n\nExample:\n  {example}",
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--version", action="version", version=VERSION, help="print the version and exit")
    parser.add_argument(
        "--config", action="config", help="a YAML file, or the name of a shipped one; may be given several times"
    )
    parser.add_class_arguments(cls, as_group=False, fail_untyped=True)
    try:
        namespace = parser.parse_args(argv)
        for key in path_keys(cls):
            _refuse_empty(key, namespace[key], parser.get_default(key))
            namespace[key] = _expanded(namespace[key])
        values = parser.instantiate_classes(namespace)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(_explain(error, argv)) from None
    return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def option_of(key: str) -> str:
    """The option that sets a key (DESIGN.md, "Flags have hyphens"): a dotted key as in YAML, any other with hyphens."""
    return "--" + (key if "." in key else key.replace("_", "-"))


def _with_keys(cls: type, argv: list[str]) -> list[str]:
    """The words, with each plain option spelled as its key, which is the option that jsonargparse knows."""
    known = [*_keys(cls), "print_config"]
    keys = {f"{option_of(key)}{end}": f"--{key}{end}" for key in known for end in ("", "+")}  # with + it adds to a list
    words = [word.partition("=") for word in argv]
    return [f"{keys.get(name, name)}{equals}{value}" for name, equals, value in words]


def path_keys(cls: Any, prefix: str = "") -> list[str]:
    """The keys of type PathText, also as list items and in nested dataclasses."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            keys += path_keys(hint, f"{prefix}{name}.")
        elif _holds_path(hint):
            keys.append(prefix + name)
    return keys


def _holds_path(hint: Any) -> bool:
    return hint == PathText or any(_holds_path(part) for part in typing.get_args(hint))


def _refuse_empty(key: str, value: Any, default: Any) -> None:
    """Raises UserError for an empty path: it would mean the current folder, and comes from an unset shell variable."""
    if value != default and (value == [] or "" in (value if isinstance(value, list) else [value])):
        raise UserError(
            f"{key} is empty; give a name, or leave {option_of(key)} out (is a variable of the shell not set?)"
        )


def _expanded(value: Any) -> Any:
    """A path, or a list of them, with `~` as the home folder; null stays null."""
    if isinstance(value, list):
        return [name_of(one) for one in value]
    return name_of(value) if value else value


def dump_config(config: Any) -> str:
    """The resolved config as YAML that `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"optimizer": {"lr": 1}}` -> `{"optimizer.lr": 1}`, for comparing configs and for loggers."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shipped_configs() -> Path:
    """The folder of the configs that come with the project: beside this file in a wheel, above it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def find_config(name: str) -> Path:
    """The file `name` if it exists, else the shipped config of that name (`pythia-160m`, `models/pythia-160m.yaml`)."""
    given = path_of(name)
    if given.is_file():
        return given
    shipped = shipped_configs()
    by_name = {path.stem: path for path in sorted(shipped.rglob("*.yaml"))}
    inside = shipped / given.with_suffix(".yaml")
    if inside.is_file():
        return inside
    if given.name == name and given.stem in by_name:
        return by_name[given.stem]
    raise UserError(f"--config {name}: no such file, and no shipped config of that name{_nearest(given.stem, by_name)}")


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    def format_help(self) -> str:
        return PLAIN.sub(lambda option: option[0].replace("_", "-"), super().format_help())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def _resolve_config_files(argv: list[str]) -> list[str]:
    """Move the config files to the front, so that options always override them; replace shipped names by paths."""
    files: list[Path] = []
    options: list[str] = []
    words = iter(argv)
    for word in words:
        if word.startswith("--config="):
            files.append(find_config(word.removeprefix("--config=")))
        elif word == "--config":
            name = next(words, None)
            if name is None:
                raise UserError("--config needs a file, or the name of a shipped config")
            files.append(find_config(name))
        else:
            options.append(word)
    return [f"--config={path}" for path in files if _read_yaml(path)] + options


def _refuse_unknown_options(cls: type, argv: list[str]) -> None:
    known = _keys(cls)
    for path in reversed(_config_files(argv)):
        _refuse_unknown_keys(path, known)
    for word in argv:
        if word.startswith("--") and not word.startswith("--config=") and word not in WITHOUT_KEY:
            option = word[2:].partition("=")[0].rstrip("+").removesuffix(".help")
            if option not in known and option not in {key.rpartition(".")[0] for key in known}:
                remedy = _nearest(option, [option_of(key)[2:] for key in known], "--") or "; --help lists the keys"
                raise UserError(f"unknown option --{option}{remedy}")


def _refuse_unknown_keys(path: Path, known: list[str]) -> None:
    groups = {key.rpartition(".")[0] for key in known}
    for key in flatten(_read_yaml(path)):
        if key not in known:
            where = " (it takes keys below it)" if key in groups else ""
            raise UserError(f"{path}: unknown key '{key}'{where}{_nearest(key, known)}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, (dict, type(None))):
        raise UserError(f"{path} must hold keys and values, as in 'optimizer: {{lr: 6e-4}}'")
    return {str(key): value for key, value in (content or {}).items()}


def _keys(cls: Any, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(cls)
    keys: list[str] = []
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        keys += _keys(kind, f"{prefix}{field.name}.") if dataclasses.is_dataclass(kind) else [prefix + field.name]
    return keys


def _nearest(word: str, candidates: typing.Iterable[str], prefix: str = "") -> str:
    """`; did you mean 'x'?`, or an empty text. It also compares a key's last part: `lr` finds `optimizer.lr`."""
    candidates = list(candidates)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if not close:
        last = word.rpartition(".")[2]
        by_last = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
        close = [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    return f"; did you mean '{prefix}{close[0]}'?" if close else ""


def _explain(error: Exception, argv: list[str]) -> str:
    """Shorten jsonargparse's many lines to the key, the type that it takes, the value given, and the file."""
    text = " ".join(str(error).split())
    if stray := re.match(r"unrecognized arguments: (\S+)", text):
        return f"{stray[1]} follows no option; name a config as {shell('--config', stray[1])}; --help lists the keys"
    match = re.search(r'key "([^"]+)":.*?Expected an? .+?(?:Got|Given) value: (.*)$', text)
    if not match:
        return text
    key, value = match.groups()
    literal = re.search(r"typing\.Literal\[(.*?)\]", text)
    kinds = dict.fromkeys(TYPE_NAMES.get(name, name) for name in re.findall(r"Expected an? <class '([^']+)'>", text))
    kind = " or ".join(kinds) or "another kind of value"
    typed = any(word.partition("=")[0] == f"--{key}" for word in argv)
    where = next((f"{path}: " for path in _config_files(argv) if not typed and key in flatten(_read_yaml(path))), "")
    if literal:
        choices = ast.literal_eval(f"({literal[1]},)")
        return where + not_one_of(key, value.strip(), choices, null="NoneType" in text)
    return f"{where}{key} takes {kind}, not {value.strip()!r}"


def _config_files(argv: list[str]) -> list[Path]:
    """The files given with `--config`, the last first, because it overrides the others."""
    return [Path(word.removeprefix("--config=")) for word in argv if word.startswith("--config=")][::-1]
