"""Risk: a peer that is measured in another way than we are, or that computes something else, is beaten easily."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest

from bench.peers import decoding, preparation, training
from bench.peers.turns import Spent, Worker, compared, run_and_read, take_turns, timed
from bench.ratios import interval, of_rounds

GATED = "from bench.peers.gate import Gate\ngate = Gate(3)\n"


@pytest.fixture(autouse=True)
def cores():
    """A bench pins its process to a core; the other tests get all of theirs back."""
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


def test_sides_take_turns_and_neither_is_always_first():
    order: list[str] = []

    def side(name):
        return lambda: order.append(name) or Spent(1.0, 2.0)

    spent = take_turns({"a": side("a"), "b": side("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert spent == {name: [Spent(1.0, 2.0)] * 3 for name in "ab"}


def test_a_ratio_is_of_blocks_of_the_same_round_by_both_clocks():
    """Risk: load that slows one round down is taken for a difference, or the ratio is upside down."""
    ours = [Spent(cpu, 3 * cpu) for cpu in (1.0, 2.0, 10.0, 1.0, 1.0)]
    theirs = [Spent(1.5 * block.cpu, block.wall) for block in ours]
    assert compared(ours, theirs) == (
        "1.50 × as fast by CPU time (95 %: 1.50 to 1.50), 1.00 × by wall time (95 %: 1.00 to 1.00)"
    )
    assert compared(ours[:2], theirs[:2]) == "1.50 × as fast by CPU time, 1.00 × by wall time"


def test_a_ratio_states_what_its_parentheses_are():
    """Risk: the extremes of a few rounds are taken for a confidence interval."""
    assert of_rounds([3.0, 1.0, 2.5], [1.0, 1.0, 1.0]) == "2.50 (rounds: 1.00 to 3.00)"
    assert of_rounds([30.0, 10.0], [1.0, 1.0], digits=0) == "20 (rounds: 10 to 30)"
    assert interval(0.98, 1.051) == "(95 %: 0.98 to 1.05)"


def test_a_worker_runs_one_block_for_each_turn_and_ends_with_the_bench(tmp_path):
    program = f"{GATED}for step in range(1, 1000):\n    print(step)\n    gate.step()"
    worker = Worker([sys.executable, "-c", program], tmp_path / "log", {})
    for _ in range(2):
        assert 0 <= worker().cpu < 1
    worker.close()
    assert worker.process.returncode == 0
    assert worker.process.stdout.read() == ""  # it does not train on


def test_a_worker_that_fails_shows_its_error(tmp_path):
    program = f"{GATED}for _ in range(4):\n    gate.step()\nraise ValueError('no such model')"
    worker = Worker([sys.executable, "-c", program], tmp_path / "log", {})
    with pytest.raises(RuntimeError, match="ended with code 1") as error:
        worker()
    assert "no such model" in str(error.value)


def test_a_process_can_report_a_part_of_its_time():
    """Risk: the imports count as loading."""
    program = "from bench.peers.gate import report\nprint('other')\nreport(1.5, 2.5)"
    assert run_and_read([sys.executable, "-c", program]) == Spent(1.5, 2.5)


def test_time_is_measured_by_both_clocks():
    spent = timed(lambda: sum(range(300_000)))
    assert spent.cpu > 0
    assert spent.wall > 0


# ------------------------------------------------------------------------------------------------------------ decoding


def test_the_ways_to_decode_compute_the_same():
    assert decoding.largest_difference() < 1e-4


def test_decoding_prints_ratios_and_the_limit(capsys):
    sizes = {"layers": 1, "hidden": 64, "vocabulary": 64, "budgets": 16, "tokens": 1, "rounds": 5}
    decoding.main([word for name, value in sizes.items() for word in (f"--{name}", str(value))])
    ours, turned, limit = capsys.readouterr().out.splitlines()
    assert " × as fast by CPU time (95 %: " in ours
    assert "as the paper's way (" in ours
    assert "as SinkCache's way (" in turned
    assert "share of the limit (" in limit


def test_a_timed_step_of_a_peer_has_a_full_cache():
    """Risk: a peer decodes over fewer or more keys than we do."""
    model = decoding.random_model(1, 64, 1, 64, 64)
    sides = decoding.full_sides(model, 16, 4)
    ids = decoding.torch.zeros(1, 1, dtype=decoding.torch.long)
    paper, turned = sides[decoding.PAPER].__self__, sides[decoding.SINK_CACHE].__self__
    with decoding.torch.no_grad():
        for _ in range(3):
            sides[decoding.PAPER](ids)
            sides[decoding.SINK_CACHE](ids)
    assert paper.loop.past[0][0].shape[2] == 15  # evicted after the forward, whose query saw 16
    assert turned.cache.get_seq_length() == 16


# --------------------------------------------------------------------------------------------------------- preparation


@pytest.mark.slow
def test_both_ways_to_prepare_write_the_same_tokens(tmp_path):
    from datasets import load_from_disk

    texts = ["In the beginning God created the heaven and the earth.", "And God said, Let there be light. " * 200]
    vocabulary = preparation.train_vocabulary(texts, 300)
    (tmp_path / "tokenizer.json").write_text(vocabulary.definition, encoding="utf-8")
    preparation.write_lines(tmp_path / "text.jsonl", texts)
    commands = preparation.commands(tmp_path / "tokenizer.json")
    for name in (preparation.OURS, preparation.MAP):
        assert preparation.run(commands[name](tmp_path / "text.jsonl", tmp_path / name)).cpu > 0
    folder = tmp_path / preparation.OURS
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    shards = [folder / shard["file"] for shard in manifest["splits"]["train"]["shards"]]
    ours = np.concatenate([np.fromfile(shard, dtype="<u2") for shard in shards])
    rows = load_from_disk(str(tmp_path / preparation.MAP))["input_ids"]
    assert len(ours) > 100
    assert ours.tolist() == [number for row in rows for number in row]


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.slow
def test_training_is_measured_beside_a_bare_loop_and_the_trainer(capsys):
    training.main(["--steps", "1", "--rounds", "2"])
    bare, trainer, limit = capsys.readouterr().out.splitlines()
    assert "as a bare PyTorch loop (" in bare
    assert "as the Hugging Face Trainer (" in trainer
    assert "share of the peak of large products (" in limit


def test_the_report_of_training_is_arithmetic():
    spent = {training.OURS: [Spent(1.0, 1.0)] * 5, training.TRAINER: [Spent(2.0, 2.0)] * 5}
    ratio, limit = training.report(spent, tokens=1000, flops=2e6, peak=(1e10, "onednn"), mode="eager")
    assert ratio == (
        "training, eager: sink-pretrain (1,000 tokens per second of CPU time) is 2.00 × as fast by CPU time (95 %: "
        "2.00 to 2.00), 2.00 × by wall time (95 %: 2.00 to 2.00) as the Hugging Face Trainer (500)"
    )
    assert limit == (
        "training, eager: share of the peak of large products (10 GFLOP/s by onednn, 5,000 tokens/s): "
        "sink-pretrain 20%, the Hugging Face Trainer 10%"
    )
