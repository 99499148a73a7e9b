"""Guards: the jobs around training, as they are shipped: text to shards, twins, their evaluation, the upload."""

from __future__ import annotations

import csv
import json

import pytest

from sinkmodel.checkpoint import checkpoint_steps
from tests import tiny
from tests.hub import TOKEN, serving_hub
from tests.recipes.runs import arguments, assert_same_run, train

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def twins(cluster, data, tmp_path_factory):
    """Three kinds of sink and the first of a second seed, as an array; checkpoints at steps 14, 28 and 40."""
    folder = tmp_path_factory.mktemp("runs") / "twins"
    common = [word for word in arguments(data, folder) if not word.startswith(("--output", "--sink", "--seed"))]
    words = [str(folder), *common, "--checkpoints.every=14"]
    cluster.finish(cluster.submit("twins.sbatch", words, "--array=0-3", "--export=ALL,SINK_KINDS=none token zero"))
    return folder


def test_an_array_of_twins_differs_in_sink_and_seed_alone(data, twins, tmp_path):
    """Risk: two tasks train the same twin, or share a folder, or a twin is not what its folder says."""
    assert sorted(path.name for path in twins.iterdir()) == [
        *("none-seed1234", "none-seed1235", "token-seed1234", "zero-seed1234")
    ]
    for kind, seed in (("none", 1235), ("zero", 1234)):
        alone = train(data, tmp_path / kind, sink__kind=kind, seed=seed, checkpoints__every=14)
        assert_same_run(alone, twins / f"{kind}-seed{seed}")


def test_an_array_evaluates_every_checkpoint_and_collects_one_table(cluster, twins, tmp_path):
    """Risk: a checkpoint is left out, evaluated twice, or overwritten in a table that two tasks write at a time."""
    run, folder, text = twins / "token-seed1234", tmp_path / "ppl", tmp_path / "text.txt"
    text.write_text(tiny.words(300))
    steps = list(checkpoint_steps(run))
    assert steps == [14, 28, 40]
    options = ["--text", str(text), "--budget", "16", "--sinks", "0", "1", "--tokens", "60"]
    words = [str(run), str(folder), *options, "--policies", "window", "sink"]
    # Fewer tasks than checkpoints: one of them has two to do.
    cluster.finish(cluster.submit("eval.sbatch", words, "--array=0-1"))
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [int(row["step"]) for row in rows] == [step for step in steps for _ in range(len(rows) // 3)]
    for step in steps:
        evaluated = json.loads((folder / f"step{step}.json").read_text())["rows"]
        assert len(evaluated) >= 2
        assert [float(row["nll"]) for row in rows if row["step"] == str(step)] == [row["nll"] for row in evaluated]
    assert (folder / "table.md").read_text().count("\n") == len(rows) + 2
    assert not list((folder / "models").iterdir())

    # Again, with one result lost: only that one is made again.
    (folder / "step28.json").unlink()
    before = (folder / "step14.json").stat().st_mtime_ns
    cluster.finish(cluster.submit("eval.sbatch", words, "--array=0"))
    assert (folder / "step14.json").stat().st_mtime_ns == before
    assert list(csv.DictReader((folder / "table.csv").open())) == rows


def test_prepare_makes_shards_that_pretrain_reads(cluster, tmp_path):
    """Risk: the script loses an argument on its way, such as a list of files."""
    texts = [tmp_path / f"{name}.txt" for name in ("first", "second", "held out")]
    for seed, path in enumerate(texts):
        path.write_text(tiny.words(2000, seed))
    words = ["--input", *map(str, texts[:2]), "--validation-input", str(texts[2]), "--vocabulary-size", "300"]
    cluster.finish(cluster.submit("prepare.sbatch", [*words, "--output", str(tmp_path / "shards")]))
    splits = json.loads((tmp_path / "shards" / "manifest.json").read_text())["splits"]
    assert splits["train"]["documents"] == 2
    assert splits["validation"]["documents"] == 1


def test_push_brings_the_run_to_the_hub(cluster, twins, tmp_path):
    """Risk: another run goes there, or under another name; or the job does not find its way, or its token."""
    with serving_hub() as hub:
        exports = "".join(f"export {name}={value}\n" for name, value in {**hub.environment, "HF_TOKEN": TOKEN}.items())
        site = tmp_path / "site.sh"
        site.write_text(cluster.site.read_text() + exports)
        words = [str(twins / "token-seed1234"), "me/sink", "--dtype", "bfloat16"]
        job = cluster.submit("push.sbatch", words, f"--export=ALL,SINK_SITE={site}")
        cluster.finish(job)
        repository = hub.repositories["me/sink"]
        assert repository.branches.keys() == {"main", "step14", "step28", "step40"}
        for branch, step in (("main", 40), ("step14", 14)):
            files = repository.files(branch)
            assert json.loads(files["training.json"].content)["step"] == step
            assert json.loads(files["config.json"].content)["dtype"] == "bfloat16"
        assert f"{hub.endpoint}/me/sink" in cluster.log(job)
        assert TOKEN not in cluster.log(job)
