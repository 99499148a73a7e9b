"""Guards: a dry run finds what would stop the job, prints what it will need, and writes nothing."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from tokenizers import Tokenizer

from recipes.pretrain import main
from sinkmodel.checkpoint import checkpoint_steps, read_metrics
from sinkmodel.files import sha256_of
from sinkmodel.fingerprint import fingerprint_of
from tests import tiny
from tests.recipes.runs import arguments, assert_same_run, foreign_id, train


def test_it_prints_what_the_run_will_need_and_writes_nothing(data, tmp_path, capsys):
    assert main([*arguments(data, tmp_path / "run", training__device="cpu"), "--dry-run=2"]) == 0
    printed = capsys.readouterr().out
    assert "gpt_neox, 41,728 parameters" in printed
    assert "8 rows = 2 processes × 1 micro-batches × 4" in printed
    assert "40 steps × 512 = 20,480 tokens, 1.11 × the data" in printed
    assert re.search(r"[\d,]+ tokens/s on 2 of this CPU \(measured", printed)
    assert "0.5 MB each, 4 at a time at most: 2.0 MB" in printed
    assert "starts at step 0" in printed
    assert not (tmp_path / "run").exists()


def test_the_checkpoints_that_it_counts_are_as_large_as_it_says(data, tmp_path):
    run = train(data, tmp_path / "run", schedule__steps=7)
    (path,) = checkpoint_steps(run).values()
    assert path.stat().st_size == pytest.approx(41_728 * 12, rel=0.15), "12 bytes a parameter, and the recipe"


def test_without_a_gpu_it_assumes_one_and_says_so(data, tmp_path, capsys):
    assert main([*arguments(data, tmp_path / "run"), "--dry-run"]) == 0
    assert "on 1 of H100 at 40% MFU (assumed: no GPU here)" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_id_beyond_the_vocabulary_stops_the_job(tmp_path, capsys, split):
    """The validation rows that will be scored are read at the start, even if checksums are not."""
    data = foreign_id(tmp_path / "data", split)
    for words in (
        [],
        ["--dry-run"],
        *[["--data.verify=sizes"], ["--data.verify=sizes", "--dry-run"]] * (split != "train"),
    ):
        assert main([*arguments(data, tmp_path / "run"), *words]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"{split}-00000.bin holds the id 300 at token 100, but its tokenizer has the ids 0 to 299" in message
        assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_fewer_ids_than_the_manifest_says_stops_the_job(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    path.write_text(path.read_text().replace('"vocabulary": 300', '"vocabulary": 3000'))
    assert main([*arguments(tmp_path / "data", tmp_path / "run"), "--dry-run"]) == 2
    assert "has 300 ids, but the manifest beside it states 3000" in capsys.readouterr().err.splitlines()[-1]


def test_it_says_where_a_run_would_go_on(data, tmp_path, capsys):
    run = train(data, tmp_path / "run", schedule__steps=14)
    assert main([*arguments(data, run, schedule__steps=14), "--dry-run"]) == 0
    assert "resumes from step14.ckpt" in capsys.readouterr().out


def test_what_would_stop_the_job_stops_it(data, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    cases = [
        ({}, "--dry-run=3", "training.batch_tokens = 576 (9 rows) would do"),
        ({"training__micro_rows": 3}, "--dry-run=2", "training.micro_rows = 2 would do"),
        ({}, "--dry-run=many", "give the number of processes"),
        ({}, "--dry-run=0", "give the number of processes"),
        ({"data__sequence": 32, "model__positions": 16}, "--dry-run", "longer than model.positions"),
    ]
    for changes, word, message in cases:
        assert main([*arguments(data, run, **changes), word]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1_900_000}))
    assert main([*arguments(data, run), "--dry-run"]) == 2
    assert "needs up to 2.0 MB for 4 more checkpoints, 1.9 MB are free" in capsys.readouterr().err
    assert not run.exists()


def test_what_the_run_itself_would_refuse_is_refused(data, tmp_path, capsys):
    """Risk: a night in the queue, for a split without a row, a vocabulary without room or a strategy without bf16."""
    taken = shutil.copytree(data, tmp_path / "data")
    content = Tokenizer.from_file(str(taken / "tokenizer.json"))
    content.add_special_tokens(["<|sink|>"])
    content.save(str(taken / "tokenizer.json"))
    manifest = json.loads((taken / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = sha256_of(taken / "tokenizer.json")
    manifest["fingerprint"] = fingerprint_of(manifest["tokenizer"]["sha256"], manifest["splits"])
    (taken / "manifest.json").write_text(json.dumps(manifest))
    cases = [
        (data, {"data__sequence": 32768, "model__positions": 32768, "training__batch_tokens": 131072},
         "the train split has"),
        (data, {"model__vocabulary": 300}, "does not fit the model"),
        (data, {"training__strategy": "deepspeed_stage_0", "training__precision": "bf16"}, "is for fp32"),
        (taken, {}, "the tokenizer already has a token <|sink|>"),
    ]  # fmt: skip
    for folder, changes, message in cases:
        refused = []
        for more in (["--dry-run"], []):
            assert main([*arguments(folder, tmp_path / "run", **changes), *more]) == 2, message
            refused.append(capsys.readouterr().err.splitlines()[-1])
        assert message in refused[0]
        assert refused[0] == refused[1]


def test_a_validation_split_without_a_row_stops_neither(tmp_path, capsys):
    """Risk: a run is refused for a split that it could do without, by one of the two alone, or with no way out."""
    data = tiny.prepared(tmp_path / "data", validation_words=10)
    words = arguments(data, tmp_path / "run", schedule__steps=7)
    lines = []
    for more in (["--dry-run"], [], [], ["--schedule.steps=7"]):
        assert main([*words, *more]) == 0
        lines.append(next(line for line in capsys.readouterr().err.splitlines() if "validation" in line))
    assert re.match(
        rf"the validation split of {data} has \d+ tokens, less than one row of data.sequence = 64", lines[0]
    )
    assert "--validation-fraction" in lines[0]
    assert set(lines) == {lines[0]}
    assert not any(row["val_loss"] for row in read_metrics(tmp_path / "run"))


def test_a_run_without_a_validation_split_goes_on_as_one_that_was_not_stopped(tmp_path):
    data = tiny.prepared(tmp_path / "data", validation_words=10)
    whole = train(data, tmp_path / "whole", schedule__steps=14)
    run = train(data, tmp_path / "run", schedule__steps=14)
    (run / "checkpoints" / "step14.ckpt").unlink()
    assert_same_run(train(data, run, schedule__steps=14), whole, 14)


def test_a_job_for_gpus_is_checked_where_there_is_none(data, tmp_path, capsys):
    words = arguments(data, tmp_path / "run", training__device="cuda", training__micro_rows=1)
    assert main([*words, "--dry-run=8"]) == 0
    assert "on 8 of H100 at 40% MFU (assumed: no GPU here)" in capsys.readouterr().out


def test_a_run_that_goes_on_needs_room_for_what_is_not_there_yet(data, tmp_path, capsys, monkeypatch):
    every = {"checkpoints__every": 10, "checkpoints__keep_every": 10}
    run = train(data, tmp_path / "run", **every)
    (run / "checkpoints" / "step40.ckpt").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1_100_000}))
    assert main([*arguments(data, run, **every), "--dry-run"]) == 0
    assert "resumes from step30.ckpt" in capsys.readouterr().out
