"""Guards: a wrong key, value or file is one line that names it and the remedy."""

from __future__ import annotations

import pytest

from recipes.config import dump_config, find_config, load_config, shipped_configs
from recipes.data.settings import PrepareConfig
from recipes.training.settings import PretrainConfig
from sinkmodel.errors import UserError

REQUIRED = ["--output", "run", "--data.path", "data"]


def load(*argv: str) -> PretrainConfig:
    return load_config(PretrainConfig, [*argv, *REQUIRED], "Train.", "sink-pretrain --config tiny")


def test_later_files_and_options_win(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("optimizer: {lr: 1e-3, clip: 2}\nseed: 1\n")
    second.write_text("optimizer: {lr: 2.0e-3}\n")
    config = load("--config", str(first), "--config", str(second), "--seed", "5")
    assert (config.optimizer.lr, config.optimizer.clip, config.seed) == (2e-3, 2.0, 5)
    assert config.optimizer.betas == [0.9, 0.95]


def test_what_is_typed_wins_wherever_it_stands_and_an_empty_file_says_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    config = load("--seed", "5", "--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "empty.yaml"))
    assert config.seed == 5


def test_plain_options_have_hyphens_and_are_still_read_with_underscores(capsys):
    """Risk: a script of an earlier version stops, or the old spelling is shown to a reader of --help."""
    for spelling in ("vocabulary_size", "vocabulary-size"):
        argv = ["--input", '["a.txt"]', f"--{spelling}=300", "--output", "x"]
        config = load_config(PrepareConfig, argv, "Prepare.", "sink-prepare")
        assert (config.vocabulary_size, config.input) == (300, ["a.txt"])
    added = [
        "--input",
        "a.txt",
        "--tokenizer",
        "t",
        "--output",
        "x",
        "--validation-input",
        "v",
        "--validation-input+",
        "w",
    ]
    assert load_config(PrepareConfig, added, "Prepare.", "sink-prepare").validation_input == ["v", "w"]
    with pytest.raises(UserError) as error:
        load_config(PrepareConfig, ["--vocabulary-sizes", "3"], "Prepare.", "sink-prepare")
    assert str(error.value) == "unknown option --vocabulary-sizes; did you mean '--vocabulary-size'?"
    with pytest.raises(SystemExit):
        load_config(PretrainConfig, ["--help"], "Train.", "sink-pretrain")
    text = capsys.readouterr().out
    assert "--print-config" in text
    assert "--training.batch_tokens" in text
    with pytest.raises(SystemExit):
        load("--config", "tiny", "--print-config")
    assert "batch_tokens:" in capsys.readouterr().out


def test_choices_are_checked_as_types_and_shown_by_help(capsys):
    with pytest.raises(UserError) as error:
        load("--training.device=tpu")
    assert str(error.value) == "training.device is 'tpu'; choose one of auto, cpu, cuda"
    with pytest.raises(UserError) as error:
        load("--model.sink_row=zero")
    assert str(error.value) == "model.sink_row is 'zero'; choose one of mean, bos, random, or null"
    with pytest.raises(SystemExit):
        load("--help")
    assert "--schedule.kind {cosine,wsd}" in capsys.readouterr().out


def test_the_place_of_a_wrong_value_is_where_it_stands(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError) as error:
        load("--config", str(tmp_path / "a.yaml"), "--seed=x")
    assert str(error.value) == "seed takes a whole number, not 'x'"


def test_what_is_written_reads_back_the_same(tmp_path):
    config = load("--config", "tiny", "--config", "sink-token")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(PretrainConfig, ["--config", str(path)], "Train.", "sink-pretrain") == config


@pytest.mark.parametrize("path", sorted((shipped_configs() / "models").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_model_config_loads_by_name(path):
    assert load("--config", path.stem).model.layers >= 4


def test_pythia_160m_is_the_paper_recipe():
    config = load("--config", "pythia-160m")
    assert config.training.batch_tokens == 1024 * 2048
    assert config.schedule.steps * config.training.batch_tokens == 299_892_736_000
    assert (config.optimizer.lr, config.schedule.min_lr, config.optimizer.weight_decay) == (6e-4, 6e-5, 0.1)
    assert config.checkpoints.early


CASES = {
    "optimizer: {lrr: 1}": "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?",
    "warmup: 0.1": "unknown key 'warmup'; did you mean 'schedule.warmup'?",
    "optimizer: {lr: fast}": "optimizer.lr takes a number or null, not 'fast'",
    "optimizer: 4": "unknown key 'optimizer' (it takes keys below it)",
    "model: {layers: 1.5}": "model.layers takes a whole number, not '1.5'",
    "training: {compile: perhaps}": "training.compile takes true or false, not 'perhaps'",
    "optimizer: [": "is not valid YAML",
    "- a": "must hold keys and values",
    "1: 2": "unknown key '1'",
}


@pytest.mark.parametrize(("content", "message"), CASES.items(), ids=CASES.values())
def test_a_wrong_file_is_named_with_key_and_remedy(tmp_path, content, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load("--config", str(path))
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_wrong_options_are_named():
    for argv, message in [
        (["--otput", "x"], "unknown option --otput; did you mean '--output'?"),
        (["--seed", "x"], "seed takes a whole number, not 'x'"),
        (["--model.vocabulary", "x"], "model.vocabulary takes a whole number or null, not 'x'"),
        (["--config", "tinny"], "no shipped config of that name; did you mean 'tiny'?"),
        (["--sink.kind", "tokne"], "sink.kind is 'tokne'; choose one of none, token"),
        (["--data.sequence", "4096"], "longer than model.positions = 2048"),
        (["--seed", "99999999999999999999999"], "below 2^63"),
        (["tiny"], "name a config as --config tiny"),
        (["--config"], "no such file"),
    ]:
        with pytest.raises(UserError) as error:
            load(*argv)
        assert message in str(error.value)


def test_shipped_configs_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("tiny") == find_config("models/tiny.yaml")
