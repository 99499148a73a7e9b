"""Risk: `--json=~/x.json` and `output: ~/run` make a folder that is named `~`. A shell expands neither of them."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
from pathlib import Path

import pytest

from eval.cli import COMMANDS as QUESTIONS
from recipes.config import flatten, load_config, path_keys
from recipes.data.settings import PrepareConfig
from recipes.training.settings import PretrainConfig
from sinkmodel.parser import OneLineParser

# Words of options and keys that are neither a path nor a name that may be one.
NO_PATH = {
    "sink-eval": {"measure", "tasks", "memories", "heads", "device", "margin", "level"},
    "sink-export": set(),
    "sink-log": set(),
    "sink-push": {"repo", "revision", "tag"},
    "sink-stream": {"system", "stop", "device"},
    "million_tokens.py": {"device"},
    "recall_text.py": set(),
    PrepareConfig: {"dataset_config", "dataset_split", "validation_split", "test_split", "text_key"} | {"separator"},
    PretrainConfig: {"model.architecture", "sink.kind", "data.verify", "schedule.kind", "training.device"}
    | {"training.precision", "training.strategy", "training.parts", "logging.project", "logging.name"}
    | {"model.sink_row"},
}
MODULES = {
    "sink-export": "sinkmodel.export.command",
    "sink-log": "recipes.log",
    "sink-push": "recipes.publish",
    "sink-stream": "sinkmodel.streaming.command",
    "million_tokens.py": "examples.million_tokens",
    "recall_text.py": "examples.recall_text",
    **{f"sink-eval {name}": "eval.cli" for name in QUESTIONS},
}


class Caught(BaseException):
    """The parser of a command, which goes no further."""


@pytest.mark.parametrize("name", MODULES)
def test_every_option_with_a_path_expands_the_home_folder(monkeypatch, name):
    def catch(parser, argv):
        if parser.prog == "sink-eval":
            return argparse.Namespace(measure=argv[0])
        raise Caught(parser)

    monkeypatch.setattr(OneLineParser, "parse_args", catch)
    monkeypatch.setenv("HOME", "/home/somebody")
    with pytest.raises(Caught) as caught:
        importlib.import_module(MODULES[name]).main(name.split()[1:])
    checked = 0
    for action in caught.value.args[0]._actions:
        takes_a_word = action.nargs != 0 and action.choices is None and action.dest not in NO_PATH[name.split()[0]]
        if not takes_a_word or not is_of_words(action.type):
            continue
        assert action.type is not None, f"{name}: {action.option_strings} is a path without `~`, or lacks in NO_PATH"
        assert "/home/somebody/x" in str(action.type("~/x")), (name, action.option_strings)
        checked += 1
    assert checked >= 1


def is_of_words(kind) -> bool:
    """Whether the type of an option takes any word, as a path is: numbers and the like refuse it."""
    try:
        return kind is None or bool(kind("~/x"))
    except (argparse.ArgumentTypeError, ValueError):
        return False


def keys_of_text(cls) -> set[str]:
    """The keys whose default is text or nothing."""
    needed = ["--output=x", "--data.path=x"] if cls is PretrainConfig else ["--output=x", "--vocabulary-size=300"]
    config = load_config(cls, [*needed, *(["--input=x"] if cls is PrepareConfig else [])], "", "x")
    return {key for key, value in flatten(config).items() if value is None or isinstance(value, str)}


@pytest.mark.parametrize("cls", [PrepareConfig, PretrainConfig])
def test_every_key_with_a_path_is_marked_as_one(cls):
    numbers = {"workers", "training.devices", "training.threads", "model.vocabulary", "test_fraction"}
    numbers |= {"validation_fraction", "vocabulary_size", "data.skip", "step"}
    assert keys_of_text(cls) - numbers == NO_PATH[cls] | set(path_keys(cls))


def test_keys_are_expanded_in_yaml_and_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("output: ~/out\ninput: [~/a.txt, b~.txt]\ntest_input: ~root/c.txt\n")
    for config in ("--config=~/x.yaml", "--config ~/x.yaml"):
        read = load_config(PrepareConfig, [*config.split(), "--tokenizer=~/tokenizer.json"], "", "sink-prepare")
        assert read.output == str(tmp_path / "out")
        assert read.input == [str(tmp_path / "a.txt"), "b~.txt"]
        assert read.test_input == os.path.expanduser("~root/c.txt") != "~root/c.txt"
        assert read.tokenizer == str(tmp_path / "tokenizer.json")
        assert read.dataset is None
    run = load_config(PretrainConfig, ["--output=~/run", "--data.path", "~/data"], "", "sink-pretrain")
    assert (run.output, run.data.path) == (f"{tmp_path}/run", f"{tmp_path}/data")


def test_runs_in_a_list_are_expanded_one_by_one(monkeypatch):
    from eval.commands.grid import _group

    monkeypatch.setenv("HOME", "/h")
    assert _group("sink=~/a,~/b") == ("sink", ["/h/a", "/h/b"])


def test_a_command_makes_no_folder_named_tilde(tmp_path, monkeypatch, capsys):
    from sinkmodel.export.command import main

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main(["--output=~/streaming", "--format=custom_generate"]) == 0
    assert (tmp_path / "home" / "streaming").is_dir()
    assert not Path("~").exists()


def test_what_a_message_gives_to_copy_is_quoted_for_a_shell(tmp_path, capsys):
    """Risk: a path with a blank, pasted, is two words, or with `$(…)` a command."""
    from recipes.pretrain import main as pretrain
    from sinkmodel.export.command import main as export
    from tests import tiny
    from tests.recipes.runs import arguments

    data, run = tiny.prepared(tmp_path / "my  data"), tmp_path / "a $(run)"
    assert pretrain([*map(str, arguments(data, run, schedule__steps=2))]) == 0
    assert words_behind("export with: ", capsys) == ["sink-export", "--checkpoint", str(run), "--output", "DIR"]
    assert pretrain([*map(str, arguments(data, run, schedule__steps=2)), "--optimizer.betas=[0.9, 0.99]"]) == 2
    assert words_behind("resume with ", capsys, ", or") == ["--optimizer.betas", "[0.9, 0.95]"]
    assert pretrain([f"--data.path={tmp_path}/no  data", f"--output={run}"]) == 2
    assert words_behind("make it with: ", capsys)[:3] == ["sink-prepare", "--output", f"{tmp_path}/no  data"]
    assert export(["--output", str(tmp_path / "x y"), "--format", "custom_generate"]) == 0
    assert words_behind("with: ", capsys) == ["hf", "upload", "ORG/NAME", str(tmp_path / "x y")]


def words_behind(mark: str, capsys, end: str = "\n") -> list[str]:
    """What a shell makes of the words of the last message, from `mark` on."""
    return shlex.split(capsys.readouterr().err.rpartition(mark)[2].partition(end)[0])
