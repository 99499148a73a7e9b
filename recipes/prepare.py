"""`sink-prepare`: turns text into token shards. recipes/data/shards.py describes a prepared folder."""

from __future__ import annotations

import json

from sinkmodel.console import command

EXAMPLE = """sink-prepare --input books/*.txt more.jsonl.zst --tokenizer EleutherAI/pythia-160m --output data/books
  sink-prepare --config data/kjv.yaml --output data/kjv"""


@command("sink-prepare")
def main(argv: list[str]) -> int:
    from recipes.config import load_config
    from recipes.data.settings import PrepareConfig

    config = load_config(PrepareConfig, join_lists(argv), "Turn text into token shards.", EXAMPLE)
    from recipes.data.preparation import prepare

    prepare(config)
    return 0


def join_lists(
    argv: list[str], options: tuple[str, ...] = ("--input", "--validation-input", "--test-input")
) -> list[str]:
    """`--input a b --input c` -> `--input=["a", "b", "c"]`, the form in which jsonargparse takes a list.

    Underscores in these options are read too, until 0.2. The word after --separator is joined to it with `=`, since it
    may look like an option, as `---` does.
    """
    rest: list[str] = []
    lists: dict[str, list[str]] = {}
    current = None
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        if name == "--separator":
            current = None
            separator = value if equals else next(words, None)
            rest.append(word if separator is None else f"{name}={separator}")
        elif name in options:
            current = lists.setdefault(name, [])
            if equals:
                current.append(value)
                current = None
        elif word.startswith("--") or current is None:
            current = None
            rest.append(word)
        else:
            current.append(word)
    return rest + [f"{name}={json.dumps(values)}" for name, values in lists.items()]


if __name__ == "__main__":
    raise SystemExit(main())
