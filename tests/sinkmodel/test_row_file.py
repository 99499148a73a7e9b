"""Guards: a row file is the model that was trained, on the same base, with one sink in front; or one clear line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sinkmodel.bases import Base
from sinkmodel.errors import UserError
from sinkmodel.export import main
from sinkmodel.export.row import export_row
from sinkmodel.loading import load_base, load_model
from sinkmodel.row_file import read_row
from sinkmodel.sinks import SinkConfig
from tests import tiny


@pytest.fixture(scope="module", params=[("sink", 1), ("sink", 2), ("sink+norms", 1)], ids=str)
def run(request, tmp_path_factory):
    """(base, run, row file) of a frozen run."""
    parts, count = request.param
    place = tmp_path_factory.mktemp("row")
    base = tiny.base_folder(place / "base", "qwen3", license="mit")
    provenance = {"command": "sink-pretrain --model.start_from base"}
    tiny.partial_checkpoint(place / "run", base, parts, SinkConfig("token", count), provenance=provenance)
    argv = ["--checkpoint", str(place / "run"), "--output", str(place / "x.safetensors"), "--format", "row"]
    assert main(argv) == 0
    return base, place / "run", place / "x.safetensors"


def about(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def changed(path, to, weights=None, **metadata) -> str:
    """The row file with other metadata (None: without it) or weights."""
    record = {**about(path), **metadata}
    save_file(weights or load_file(path), to, {name: value for name, value in record.items() if value is not None})
    return str(to)


def test_it_is_the_model_that_was_trained(run):
    """Risk: the row in another place, on another base, or without its norms."""
    _, checkpoint, file = run
    trained, loaded = load_model(str(checkpoint)), load_model(str(file))
    assert loaded.sink_ids == trained.sink_ids
    assert loaded.borrowed == []
    ids = trained.tokenizer("a b c d e", return_tensors="pt").input_ids
    assert torch.equal(loaded.tokenizer("a b c d e", return_tensors="pt").input_ids, ids)
    assert ids[0, : len(trained.sink_ids)].tolist() == trained.sink_ids
    with torch.no_grad():
        assert torch.equal(trained.model(ids).logits, loaded.model(ids).logits)
    assert loaded.model.generation_config.suppress_tokens == trained.model.generation_config.suppress_tokens


def test_it_is_small_and_says_where_it_comes_from(run):
    base, checkpoint, file = run
    record, row = about(file), read_row(file)
    assert (record["format"], record["version"]) == ("sinkmodel-row", "1")
    assert (record["base"], record["base_license"]) == (str(base), "mit")
    assert record["base_fingerprint"] == load_base(str(base))[1].fingerprint
    assert json.loads(record["sink_ids"]) == row.sink_ids == load_model(str(checkpoint)).sink_ids
    assert (record["step"], record["tokens"], record["git_commit"]) == ("7", "7000", "0a1b2c3d")
    assert record["command"] == "sink-pretrain --model.start_from base"
    assert len(record["tokenizer_sha256"]) == 64
    assert all("norm" in name or name.endswith("sink_rows") for name in row.weights)
    assert len(row.weights) == 1 or record["parts"] == "sink+norms"
    assert file.stat().st_size < 5000
    again = export_row(checkpoint, file.with_name("again.safetensors"))
    assert again.read_bytes() == file.read_bytes(), "the same input, the same bytes"
    again.unlink()


def test_other_types_of_numbers(run, tmp_path):
    _, checkpoint, _ = run
    row = read_row(export_row(checkpoint, tmp_path / "x.safetensors", "bfloat16"))
    assert {weight.dtype for weight in row.weights.values()} == {torch.bfloat16}
    assert load_model(str(tmp_path / "x.safetensors")).model.dtype == torch.float32


def test_a_base_that_is_not_there_or_not_the_same_is_one_line(run, tmp_path):
    """Risk: a row on weights that it was not trained for; a traceback of a path of another machine."""
    _, _, file = run
    cases = {
        changed(
            file, tmp_path / "a.safetensors", base="/nowhere/base"
        ): "trained on top of /nowhere/base: /nowhere/base",
        changed(file, tmp_path / "b.safetensors", base_fingerprint="0" * 64): "with the fingerprint 000000000000",
        changed(file, tmp_path / "c.safetensors", vocabulary_sha256="0" * 64): "does not fit the tokenizer of its base",
        changed(
            file, tmp_path / "d.safetensors", sink_ids=json.dumps([7 + i for i in range(len(read_row(file).sink_ids))])
        ): ("does not fit the tokenizer of its base"),
        changed(
            file, tmp_path / "e.safetensors", base_step="3"
        ): "is not a run folder, so it has no checkpoint of step 3",
    }
    for path, message in cases.items():
        with pytest.raises(UserError) as error:
            load_model(path)
        assert message in str(error.value)
        assert path in str(error.value)
    other = tiny.base_folder(tmp_path / "other", "llama")
    with pytest.raises(UserError, match="it has changed"):
        load_model(changed(file, tmp_path / "f.safetensors", base=str(other)))


def test_a_file_that_is_not_a_row_is_one_line(run, tmp_path):
    base, _, file = run
    whole = file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    (tmp_path / "not.safetensors").write_bytes(b"no")
    rows = load_file(file)
    name = next(name for name in rows if name.endswith("sink_rows"))
    width = {"weights": {**rows, name: rows[name][:, :3].clone()}}
    cases = {
        tmp_path / "cut.safetensors": "cannot be read as safetensors",
        tmp_path / "not.safetensors": "cannot be read as safetensors",
        base / "model.safetensors": "is not a row that sink-export --format row wrote",
        changed(file, tmp_path / "1.safetensors", version="2"): "has version 2 of the format",
        changed(file, tmp_path / "2.safetensors", parts="all"): "is a damaged row (its parts are 'all')",
        changed(file, tmp_path / "3.safetensors", sink_ids="[]"): "is a damaged row (its sinks are [])",
        changed(file, tmp_path / "4.safetensors", sink_ids="[300, 302, 303]"): "is a damaged row (its sinks are",
        changed(file, tmp_path / "5.safetensors", step="many"): "is a damaged row",
        changed(file, tmp_path / "6.safetensors", base=None): "is a damaged row",
        changed(file, tmp_path / "7.safetensors", base="7.safetensors"): "its base is a row as well",
        changed(file, tmp_path / "8.safetensors", {name: rows[name][0].clone()}): "it has no sink_rows for the sinks",
        changed(file, tmp_path / "9.safetensors", {"model.norm.weight": rows[name]}): "it has no sink_rows",
        changed(file, tmp_path / "10.safetensors", **width): "does not fit its base",
        changed(file, tmp_path / "11.safetensors", {**rows, "model.x": rows[name].clone()}): "does not fit its base",
    }
    for path, message in cases.items():
        with pytest.raises(UserError) as error:
            load_model(str(path))
        assert message in str(error.value), path


def test_a_row_is_a_base_as_any_other_but_has_no_row_of_its_own(run, tmp_path):
    """Risk: a row on a row, which each reader would have to unfold; or one on itself, without end."""
    _, checkpoint, file = run
    row = shutil.copy(file, tmp_path / "row.safetensors")
    loaded, base = load_base(str(row))
    assert (base.name, base.step) == (str(row), None)
    assert loaded.sink_ids == read_row(file).sink_ids
    content = torch.load(checkpoint / "checkpoints" / "step7.ckpt", weights_only=True)
    content["recipe"]["base"]["name"] = str(row)
    torch.save(content, tmp_path / "on-row.ckpt")
    with pytest.raises(UserError, match=r"started from the row .*export the whole model"):
        export_row(tmp_path / "on-row.ckpt", tmp_path / "x.safetensors")


def test_what_has_no_row_is_refused_before_anything_is_written(tmp_path, capsys):
    tiny.checkpoint(tmp_path / "whole", base=Base("org/base", "ab" * 32))
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    for checkpoint, output, message in (
        ("whole", "x.safetensors", "holds a whole model; only runs with training.parts sink or sink+norms have a row"),
        ("whole", "taken.safetensors", "already exists"),
        ("whole", "x", "it must end in .safetensors with --format row"),
        ("none", "x.safetensors", "does not exist"),
    ):
        argv = ["--checkpoint", str(tmp_path / checkpoint), "--output", str(tmp_path / output), "--format", "row"]
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["--checkpoint", str(tmp_path / "whole"), "--output", str(tmp_path / "x.safetensors")]) == 2
    assert "it must end in .safetensors with --format row, and only then" in capsys.readouterr().err
    assert taken.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken.safetensors", "whole"]
