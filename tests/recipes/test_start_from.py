"""Training that starts from a model that exists: what of it changes, what a checkpoint holds, and how it resumes."""

from __future__ import annotations

import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from recipes.data.datamodule import BatchPlan, TextDataModule
from recipes.data.shards import open_split
from recipes.pretrain import main
from recipes.training import memory
from recipes.training.memory import parameters_of
from sinkmodel.checkpoint import Recipe, checkpoint_steps, read_checkpoint, read_metrics
from sinkmodel.export.folder import export
from sinkmodel.export.row import export_row
from sinkmodel.loading import load_model
from sinkmodel.provenance import read_provenance
from sinkmodel.sinks import SinkConfig
from tests import bases, tiny
from tests.processes import Program
from tests.recipes import runs

SETTINGS = {
    "data.sequence": 64,
    "data.workers": 0,
    "schedule.kind": "wsd",
    "schedule.steps": 4,
    "schedule.warmup": 0.0,
    "schedule.decay": 0.0,
    "training.batch_tokens": 256,
    "training.micro_rows": 2,
    "validation.every": 4,
    "validation.rows": 4,
    "checkpoints.every": 2,
    "logging.every": 1,
    "sink.kind": "token",
}
SINK = 300  # the first id after those of tests.tiny's tokenizer
FAMILIES = ("llama", "gpt_neox", "mistral", "qwen2", "qwen3", "gemma", "phi", "olmo", "smollm3", "stablelm")


def arguments(data: Path, base: object, output: Path, **changes: object) -> list[str]:
    settings = {**SETTINGS, **{key.replace("__", "."): value for key, value in changes.items()}}
    words = [f"--{key}={value}" for key, value in settings.items() if value is not None]
    return [f"--data.path={data}", f"--model.start_from={base}", f"--output={output}", *words]


def train(data: Path, base: object, output: Path, **changes: object) -> Path:
    assert main(arguments(data, base, output, **changes)) == 0
    return output


def train_on_two(data: Path, base: object, output: Path, strategy: str, **changes: object) -> Path:
    """The same on two processes that share each micro-batch of two rows."""
    more = {"training__strategy": strategy, "training__devices": 2, "training__micro_rows": 1, "training__timeout": 120}
    process = Program("recipes.pretrain", arguments(data, base, output, **more, **changes))
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return output


def losses(run: Path) -> list[float]:
    return [float(row["loss"]) for row in read_metrics(run) if row["loss"]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return bases.save_base(tmp_path_factory.mktemp("base") / "llama", "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def row_run(data, base, tmp_path_factory):
    """A tied Llama whose sink row alone was trained."""
    return train(data, base, tmp_path_factory.mktemp("runs") / "row", training__parts="sink")


def weights(name: object) -> dict[str, torch.Tensor]:
    return load_model(str(name)).model.state_dict()


# ------------------------------------------------------------------------------------------------------- what changes


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_sinks_row_changes_in_every_architecture(data, tmp_path, family):
    """Risk: a weight that was to stay is changed, or the checkpoint on its base is another model than was trained."""
    folder = bases.save_base(tmp_path / "base", family)
    run = train(data, folder, tmp_path / "run", training__parts="sink", schedule__steps=2)
    before, after = weights(folder), weights(run)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name][: len(before[name])])}
    assert not changed
    table = load_model(str(run)).model.get_input_embeddings().weight
    assert table.shape[0] == 320, "300 ids and a sink, padded to 64"
    assert not torch.allclose(table[SINK], table[:SINK].mean(0))
    final = load_model(str(run))
    assert final.sink_ids == [SINK]
    assert final.tokenizer("a b").input_ids[0] == SINK
    assert_validated_as_saved(data, run)


def test_the_loss_is_that_of_the_whole_model_sink_column_included(data, row_run):
    """Risk: with a tied head the sink's logit is computed from a row that is no longer the sink's."""
    assert_validated_as_saved(data, row_run)


def assert_validated_as_saved(data: Path, run: Path) -> None:
    """The last validation loss is that of the model that plain transformers computes from the checkpoint."""
    loaded = load_model(str(run))
    splits = [open_split(data, name, "full") for name in ("train", "validation")]
    rows = TextDataModule(*splits, loaded.sink_ids, 64, BatchPlan(4, 2, 1), 4, 1234, True, 4, 0).validation
    total = 0.0
    for row in range(4):
        inputs, targets = rows[row]
        with torch.no_grad():
            logits = loaded.model(input_ids=inputs[None]).logits[0]
        total += F.cross_entropy(logits[1:], targets[1:]).item()
    measured = [float(row["val_loss"]) for row in read_metrics(run) if row["val_loss"]]
    assert math.isclose(total / 4, measured[-1], rel_tol=1e-5)


def test_a_checkpoint_of_a_frozen_run_holds_the_row_and_names_the_base(base, row_run):
    content = read_checkpoint(checkpoint_steps(row_run)[4])
    assert {name.rpartition(".")[2]: tuple(value.shape) for name, value in content["state_dict"].items()} == {
        "sink_rows": (1, 32)
    }
    assert list(content["optimizer_states"][0]["state"]) == [0]
    recipe = Recipe.from_dict(content["recipe"])
    assert (recipe.base.name, recipe.parts) == (str(base), "sink")
    assert checkpoint_steps(row_run)[4].stat().st_size < 60_000


def test_the_recorded_command_makes_the_run_anew(data, base, row_run, tmp_path):
    """Risk: a row cannot be made again, as nobody knows how."""
    command = read_provenance(str(row_run))["command"]
    assert command.startswith("sink-pretrain --model.start_from ")
    assert "--model.layers" not in command
    run = tmp_path / "again"
    assert main([*shlex.split(command)[1:], f"--output={run}", "--data.workers=0"]) == 0
    assert losses(run) == losses(row_run)


def test_norms_are_trained_with_the_row_if_asked_for(data, base, tmp_path):
    """Risk: other weights change too; or the norms get the rate of the row, which ruins a model in a few steps."""
    run = train(data, base, tmp_path / "run", training__parts="sink+norms")
    assert float(read_metrics(run)[0]["lr"]) == 1e-3
    before, after = weights(base), weights(run)
    changed = {name for name in before if not torch.equal(before[name], after[name][: len(before[name])])}
    assert changed == {name for name in before if "norm" in name}


def test_all_trains_all(data, base, tmp_path):
    run = train(data, base, tmp_path / "run", optimizer__lr=1e-3)
    before, after = weights(base), weights(run)
    assert all(not torch.equal(before[name], after[name][: len(before[name])]) for name in before)
    assert "model.model.layers.0.mlp.up_proj.weight" in read_checkpoint(checkpoint_steps(run)[4])["state_dict"]


def test_frozen_weights_get_no_gradients_and_no_moments(data, base, tmp_path, monkeypatch):
    """Risk: memory and time of what is frozen are spent all the same."""
    from recipes.training import module as training

    seen = []
    step = training.SinkLanguageModel.configure_gradient_clipping

    def look(self, *args, **kwargs):
        seen.append({name for name, parameter in self.named_parameters() if parameter.grad is not None})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(training.SinkLanguageModel, "configure_gradient_clipping", look)
    train(data, base, tmp_path / "run", training__parts="sink")
    assert seen
    assert set.union(*seen) == {"model.model.embed_tokens.sink_rows"}


# ----------------------------------------------------------------------------------------------------- twins, and rows


def test_twins_start_equal_and_read_the_same_rows(data, base, tmp_path, monkeypatch):
    """Risk: the twins differ in more than the sink, so that their comparison says nothing of sinks."""
    read = batches_read(monkeypatch)
    every = {"optimizer__lr": 1e-9, "schedule__min_lr": 1e-9, "optimizer__weight_decay": 0.0}
    sink = train(data, base, tmp_path / "sink", **every)
    vanilla = train(data, base, tmp_path / "vanilla", sink__kind="none", **every)
    one, other = weights(sink), weights(vanilla)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    assert load_model(str(vanilla)).sink_ids == []
    assert len(read) == 2 * 8, "two micro-batches in each of four steps"
    for (inputs, targets), (plain_inputs, plain_targets) in zip(read[:8], read[8:]):
        assert (inputs[:, 0] == SINK).all()
        assert torch.equal(inputs[:, 1:], plain_inputs[:, :-1])
        assert torch.equal(targets[:, 1:], plain_targets[:, :-1])
    texts = [tuple(row) for inputs, _ in read[:8] for row in inputs.tolist()]
    assert len(set(texts)) == 16, "other rows in each micro-batch"


def batches_read(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A list that gets the inputs and targets of every micro-batch that is trained on."""
    from recipes.training.module import SinkLanguageModel

    read, step = [], SinkLanguageModel.training_step

    def look(self, batch, batch_idx):
        read.append(tuple(part.clone() for part in batch))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SinkLanguageModel, "training_step", look)
    return read


def test_the_sink_stands_in_the_place_of_a_token_that_the_tokenizer_puts_in_front(data, tmp_path):
    """Risk: `<s>` and the sink both stand in front, so that a stream would have to keep two tokens."""
    folder = bases.save_base(tmp_path / "base", "llama", bos=True)
    text = tiny.prepared(tmp_path / "data", text=bases.text_tokenizer(bos=True))
    assert load_model(str(folder)).sink_ids == [300]
    sink = train(text, folder, tmp_path / "sink", optimizer__lr=1e-9, schedule__min_lr=0)
    vanilla = train(text, folder, tmp_path / "vanilla", optimizer__lr=1e-9, schedule__min_lr=0, sink__kind="none")
    loaded, twin = load_model(str(sink)), load_model(str(vanilla))
    assert loaded.tokenizer("a b").input_ids == [301, *twin.tokenizer("a b").input_ids[1:]]
    assert twin.tokenizer("a b").input_ids[0] == 300
    assert (loaded.sink_ids, twin.sink_ids, twin.borrowed) == ([301], [300], ["<s>"])
    table = loaded.model.get_input_embeddings().weight
    assert torch.allclose(table[301], table[300], atol=1e-6), "it starts as the row of <s>"
    assert losses(sink)[0] == pytest.approx(losses(vanilla)[0], abs=2e-2)


@pytest.mark.parametrize("start", ["mean", "random"])
def test_the_row_starts_as_asked(data, base, tmp_path, start):
    run = train(
        data, base, tmp_path / "run", training__parts="sink", optimizer__lr=1e-9, schedule__min_lr=0,
        model__sink_row=start,
    )  # fmt: skip
    table = load_model(str(run)).model.get_input_embeddings().weight.detach()
    mean = table[:SINK].mean(0)
    assert torch.allclose(table[SINK], mean, atol=1e-6) == (start == "mean")
    assert 0.5 < table[SINK].std() / table[:SINK].std() < 2 or start == "mean"


@pytest.mark.parametrize("in_front", [True, False])
def test_the_row_starts_as_the_token_at_the_beginning_of_a_text(data, tmp_path, in_front):
    """Risk: the row of another token is copied: the config names one even if the tokenizer puts none in front."""
    folder = bases.save_base(tmp_path / "base", "llama", bos=in_front, bos_token_id=5)
    if in_front:
        data = tiny.prepared(tmp_path / "data", text=bases.text_tokenizer(bos=True))
    run = train(
        data, folder, tmp_path / "run", training__parts="sink", optimizer__lr=1e-9, schedule__min_lr=0,
        schedule__steps=1, model__sink_row="bos",
    )  # fmt: skip
    loaded = load_model(str(run))
    (sink,), table = loaded.sink_ids, loaded.model.get_input_embeddings().weight.detach()
    assert sink == (301 if in_front else 300)
    assert torch.allclose(table[sink], table[300 if in_front else 5], atol=1e-6)


def test_a_free_row_is_taken_before_the_embedding_grows(data, tmp_path):
    folder = bases.save_base(tmp_path / "base", "gpt_neox", rows=310)
    run = train(data, folder, tmp_path / "run", training__parts="sink")
    assert load_model(str(run)).model.get_input_embeddings().weight.shape[0] == 310


# ------------------------------------------------------------------------------------------------- resume, and branches


def test_a_frozen_run_that_was_stopped_ends_with_the_same_bits(data, base, row_run, tmp_path):
    run = train(data, base, tmp_path / "run", training__parts="sink")
    checkpoint_steps(run)[4].unlink()
    train(data, base, run, training__parts="sink")
    assert runs.numbers(run) == runs.numbers(row_run)
    ends = [torch.load(checkpoint_steps(one)[4], weights_only=True) for one in (run, row_run)]
    (name,) = ends[0]["state_dict"]
    assert torch.equal(ends[0]["state_dict"][name], ends[1]["state_dict"][name])
    moments = [end["optimizer_states"][0]["state"][0] for end in ends]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in moments[0])


@pytest.fixture(scope="module")
def norms_run(data, base, tmp_path_factory):
    return train(data, base, tmp_path_factory.mktemp("runs") / "norms", training__parts="sink+norms")


@pytest.mark.parametrize("strategy", ["one", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_run_of_the_norms_that_was_stopped_ends_with_the_same_bits(data, base, norms_run, tmp_path, strategy):
    """Risk: the moments of the row and of the norms are loaded in another order, or the norms are those of the base."""

    def go_on() -> None:
        if strategy == "one":
            train(data, base, tmp_path / "run", training__parts="sink+norms")
        else:
            train_on_two(data, base, tmp_path / "run", strategy, training__parts="sink+norms")

    go_on()
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    checkpoint_steps(tmp_path / "run")[4].unlink()
    go_on()
    assert runs.numbers(tmp_path / "run") == runs.numbers(whole)
    states = [runs.final_state(run, 4) for run in (tmp_path / "run", whole, norms_run)]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    assert len(states[0]) == 6 * 4, "the row and five norms: numbers, two moments, steps"
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert all(torch.allclose(states[0][name], states[2][name], atol=1e-5) for name in states[2])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of ours from random weights, at a constant rate: 8 steps, with checkpoints of 4 and 8."""
    run = tmp_path_factory.mktemp("whole") / "run"
    shape = ("layers=2", "hidden=32", "heads=4", "kv_heads=4", "ffn=64", "positions=64")
    words = [word for word in arguments(data, "x", run) if "start_from" not in word]
    words += [f"--model.{one}" for one in shape]
    words += ["--optimizer.lr=3e-3", "--schedule.min_lr=3e-3", "--schedule.steps=8", "--checkpoints.every=4"]
    assert main(words) == 0
    return run


def test_a_branch_with_the_moments_is_the_uninterrupted_run(data, whole, tmp_path):
    """Risk: a branch reads the first rows again, or its optimiser starts cold: then its losses are others."""
    ends = losses(whole)[4:]
    branch = train(data, whole, tmp_path / "branch", step=4, optimizer__start_from=whole)
    assert losses(branch) == pytest.approx(ends, abs=1e-6)
    folder = export(whole, tmp_path / "export", step=4)
    exported = train(
        data, folder, tmp_path / "exported", optimizer__start_from=whole / "checkpoints" / "step4.ckpt"
    )  # fmt: skip
    assert losses(exported) == pytest.approx(ends, abs=1e-6)
    cold = train(data, whole, tmp_path / "cold", step=4)
    assert losses(cold)[0] == pytest.approx(ends[0], abs=1e-6)
    assert abs(losses(cold)[-1] - ends[-1]) > 1e-4


def test_a_row_file_is_started_from_as_the_run_that_it_came_from(data, row_run, tmp_path):
    """Risk: what `load_model` takes is refused as a start, or its sink is trained anew."""
    row = export_row(row_run, tmp_path / "row.safetensors")
    both = [
        train(data, name, tmp_path / f"of {i}", training__parts="sink", data__skip=0)
        for i, name in enumerate((row, row_run))
    ]
    assert losses(both[0]) == losses(both[1])


def test_a_branch_takes_the_rate_at_which_its_base_ended(data, whole, tmp_path):
    run = train(data, whole, tmp_path / "run", step=4)
    assert {float(row["lr"]) for row in read_metrics(run) if row["lr"]} == {3e-3}


def test_a_run_that_started_from_another_step_is_not_resumed(data, whole, tmp_path, capsys):
    run = train(data, whole, tmp_path / "run", step=4)
    assert main(arguments(data, whole, run)) == 2
    assert "step = 4, this one has 8; resume with --step 4" in capsys.readouterr().err


def test_a_branch_of_a_frozen_run_takes_its_rate_for_the_same_parts_alone(data, base, tmp_path):
    """Risk: a row that has been trained to a low rate starts at 2e-2 again; or the norms get the rate of the row."""
    run = train(data, base, tmp_path / "run", training__parts="sink", optimizer__lr=8e-3, schedule__min_lr=4e-3,
                schedule__decay=0.5)  # fmt: skip
    last = [float(row["lr"]) for row in read_metrics(run) if row["lr"]][-1]
    assert last < 8e-3
    for parts, rate in (("sink", last), ("sink+norms", 1e-3), ("all", 5e-5)):
        branch = train(data, run, tmp_path / parts, training__parts=parts, schedule__steps=1)
        assert float(read_metrics(branch)[0]["lr"]) == pytest.approx(rate)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_every_strategy_trains_the_row_alone(data, base, row_run, tmp_path, strategy):
    """Risk: a strategy shards, gathers or saves the frozen weights as if they were trained."""
    run = train_on_two(data, base, tmp_path / "run", strategy, training__parts="sink")
    assert losses(run) == pytest.approx(losses(row_run), abs=1e-5)
    checkpoint_steps(run)[4].unlink()
    train_on_two(data, base, run, strategy, training__parts="sink")
    assert losses(run) == pytest.approx(losses(row_run), abs=1e-5)
    one, other = weights(run), weights(row_run)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_3"])
def test_every_strategy_takes_over_the_moments(data, whole, tmp_path, strategy):
    run = train_on_two(data, whole, tmp_path / "run", strategy, step=4, optimizer__start_from=whole)
    assert losses(run) == pytest.approx(losses(whole)[4:], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_stage_3"])
def test_a_grown_embedding_that_is_tied_is_sharded_and_put_together(data, base, tmp_path, strategy):
    """Risk: embedding and head come apart when they are sharded, or the checkpoint has the rows of before they grew."""
    alone = train(data, base, tmp_path / "alone", optimizer__lr=1e-3)
    run = train_on_two(data, base, tmp_path / "run", strategy, optimizer__lr=1e-3)
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)
    one, other = weights(run), weights(alone)
    assert one["model.embed_tokens.weight"].shape == (320, 32)
    assert torch.equal(one["model.embed_tokens.weight"], one["lm_head.weight"])
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    ends = runs.numbers(run)
    checkpoint_steps(run)[4].unlink()
    train_on_two(data, base, run, strategy, optimizer__lr=1e-3)
    assert runs.numbers(run) == ends


def test_a_frozen_run_gives_no_rate_for_all_weights(data, row_run, tmp_path):
    """Risk: the rate of the sink's row, 2e-2, is taken for all weights and ruins them."""
    run = train(data, row_run, tmp_path / "run", schedule__steps=1)
    assert float(read_metrics(run)[0]["lr"]) == 5e-5


def test_a_branch_from_before_the_first_step(data, tmp_path):
    """Risk: step 0 has no last rate, and the branch ends in a traceback."""
    shape = ("layers=2", "hidden=32", "heads=4", "kv_heads=4", "ffn=64", "positions=64")
    words = [
        word for word in arguments(data, "x", tmp_path / "run", checkpoints__early="true") if "start_from" not in word
    ]
    for decay in (0.0, 0.5):
        run = tmp_path / f"run{decay}"
        more = [f"--model.{one}" for one in shape] + [
            f"--output={run}",
            "--schedule.steps=1",
            f"--schedule.decay={decay}",
        ]
        assert main([*words, *more]) == 0
        branch = train(data, run, tmp_path / f"branch{decay}", step=0, schedule__steps=1)
        assert float(read_metrics(branch)[0]["lr"]) == 5e-5


def test_the_moments_of_a_run_are_of_the_step_that_was_exported(data, whole, tmp_path):
    """Risk: weights of step 4 get the moments of step 8."""
    folder = export(whole, tmp_path / "export", step=4)
    run = train(data, folder, tmp_path / "run", optimizer__start_from=whole)
    assert losses(run) == pytest.approx(losses(whole)[4:], abs=1e-6)


def test_moments_that_are_gone_do_not_stop_a_run_that_has_its_own(data, whole, tmp_path):
    other = shutil.copytree(whole, tmp_path / "other")
    run = train(data, whole, tmp_path / "run", step=4, optimizer__start_from=other)
    ends = losses(run)
    shutil.rmtree(other)
    checkpoint_steps(run)[4].unlink()
    train(data, whole, run, step=4, optimizer__start_from=other)
    assert losses(run) == ends


def test_the_recorded_command_has_the_rate_of_new_models(data, base, tmp_path):
    """Risk: a rate that is the default of new models is left out of the command, and a base has another default."""
    run = train(data, base, tmp_path / "run", optimizer__lr=6e-4, schedule__min_lr=6e-5, schedule__steps=2)
    words = shlex.split(read_provenance(str(run))["command"])[1:]
    assert main([*words, f"--output={tmp_path / 'again'}", "--data.workers=0"]) == 0
    assert losses(tmp_path / "again") == losses(run)


@pytest.mark.parametrize("parts", ["all", "sink"])
def test_a_base_may_move_and_not_be_replaced(data, base, tmp_path, capsys, parts):
    """Risk: a run cannot resume after its base was moved, or it resumes with another base."""
    folder, place = shutil.copytree(base, tmp_path / "base"), tmp_path / "place"
    run = train(data, folder, tmp_path / "run", training__parts=parts)
    ends = losses(run)
    folder.rename(place)
    checkpoint_steps(run)[4].unlink()
    other = bases.save_base(tmp_path / "other", "llama", tie_word_embeddings=True, initializer_range=0.2)
    wide = bases.save_base(tmp_path / "wide", "llama", intermediate_size=64)
    for wrong, message in ((other, "is another model; name the former one"), (wide, "resume with --model.start_from")):
        assert main(arguments(data, wrong, run, training__parts=parts)) == 2
        assert message in capsys.readouterr().err
    train(data, place, run, training__parts=parts)
    assert losses(run) == ends
    assert load_model(str(run)).sink_ids == [SINK]


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_base_that_changed_is_refused(data, base, tmp_path, capsys):
    folder = shutil.copytree(base, tmp_path / "base")
    run = train(data, folder, tmp_path / "run", training__parts="sink")
    checkpoint_steps(run)[4].unlink()
    shutil.rmtree(folder)
    bases.save_base(folder, "llama", tie_word_embeddings=True, initializer_range=0.2)
    assert main(arguments(data, folder, run, training__parts="sink")) == 2
    assert "it has changed; restore the former one" in capsys.readouterr().err
    with pytest.raises(Exception, match="it has changed"):
        load_model(str(run))
    shutil.rmtree(folder)
    with pytest.raises(Exception, match="holds only what was trained on top of .*base"):
        load_model(str(run))


WRONG = {
    "no sink to train": ({"training__parts": "sink", "sink__kind": "none"}, "there is no row to train"),
    "an unknown part": ({"training__parts": "head"}, "training.parts is 'head'; choose one of all, sink, sink\\+norms"),
    "another sink": ({"sink__kind": "zero"}, "can only get sinks of kind token"),
    "a shape of its own": ({"model__layers": 7}, "model.layers is 7, but .* has 2"),
    "too long rows": ({"data__sequence": 256}, "longer than model.positions = 128"),
    "a step of a folder": ({"step": 3}, "is not a run folder, so it has no checkpoint of step 3"),
    "no such start": ({"model__sink_row": "zero"}, "choose one of mean, bos, random, or null"),
    "a row without a sink": (
        {"model__sink_row": "mean", "sink__kind": "none"},
        "model.sink_row is for sink.kind token",
    ),
    "no bos": ({"model__sink_row": "bos"}, "has no token at the beginning of a text"),
    "no such model": ({"model__start_from": "nowhere"}, "nowhere is not a folder, a file"),
    "no such moments": ({"optimizer__start_from": "nowhere"}, "nowhere does not exist"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_one_line_before_anything_is_written(data, tmp_path, capsys, what):
    changes, message = WRONG[what]
    folder = bases.save_base(tmp_path / "base", "llama", bos_token_id=None)
    run = tmp_path / "run"
    words = arguments(data, folder, run, **changes)
    for dry in ([], ["--dry-run"]):
        assert main([*words, *dry]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert re.search(message, lines[-1]), lines
        assert not run.exists()


def test_bases_that_cannot_be_trained_are_refused_by_name(data, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    learned = bases.save_base(tmp_path / "gpt2", "GPT2", n_positions=128, n_embd=32, n_head=4, n_layer=2)
    assert main(arguments(data, learned, run)) == 2
    assert "gpt2" in capsys.readouterr().err
    other = bases.save_base(tmp_path / "other", "llama", bos=True)
    assert main(arguments(data, other, run)) == 2
    assert "was prepared with another tokenizer than that of" in capsys.readouterr().err
    bare = bases.save_base(tmp_path / "bare", "llama")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert main(arguments(data, bare, run)) == 2
    assert "has no tokenizer that can be read" in capsys.readouterr().err
    whole = bases.save_base(tmp_path / "whole", "llama")
    monkeypatch.setattr(memory, "available_memory", lambda: 100_000)
    assert main(arguments(data, whole, run)) == 2
    assert "take a smaller model or a larger machine" in capsys.readouterr().err
    assert not run.exists()


def test_a_run_is_no_base_of_itself(data, row_run, capsys):
    """Risk: the message advises --step null, which leads back to the same message."""
    assert main(arguments(data, row_run, row_run, training__parts="sink")) == 2
    assert "is both output and model.start_from" in capsys.readouterr().err


def test_a_sink_in_the_softmax_has_no_row_to_train(data, tmp_path, capsys):
    """Risk: the message advises sink.kind zero, with which training.parts sink is refused."""
    run = tmp_path / "zero"
    words = [
        word for word in arguments(data, "x", run, sink__kind="zero", schedule__steps=1) if "start_from" not in word
    ]
    shape = ("layers=1", "hidden=32", "heads=4", "kv_heads=4", "ffn=64", "positions=64")
    assert main([*words, *(f"--model.{one}" for one in shape)]) == 0
    assert main(arguments(data, run, tmp_path / "run", training__parts="sink")) == 2
    assert "which is not a row of the embedding" in capsys.readouterr().err


def test_without_a_base_its_keys_are_refused(data, tmp_path, capsys):
    for words in (["--step=3"], ["--training.parts=sink", "--sink.kind=token"], ["--data.skip=4"]):
        assert main([f"--data.path={data}", f"--output={tmp_path / 'run'}", *words]) == 2
        assert "name the model with --model.start_from" in capsys.readouterr().err


def test_several_sinks_get_several_rows(data, base, tmp_path):
    run = train(data, base, tmp_path / "run", training__parts="sink", sink__count=2)
    assert load_model(str(run)).sink_ids == SinkConfig("token", 2).ids(SINK)


def test_the_dry_run_counts_what_is_trained_and_writes_nothing(data, base, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*arguments(data, base, run, training__parts="sink"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "checkpoint  0.0 MB each" in out
    assert "llama, 36,032 parameters" in out or "llama, 25,792 parameters" in out, out
    assert not run.exists()


def test_parameters_are_counted_without_loading_the_model(base, row_run, whole):
    """Risk: a model that does not fit into memory is loaded before that is noticed."""
    count = sum(value.numel() for value in load_model(str(base)).model.parameters())
    assert parameters_of(str(base)) == count
    assert parameters_of(str(row_run)) == count, "those of its base"
    assert parameters_of(str(whole), 4) == 41_728
