"""Guards a NAMM as a folder: the same decisions after a round trip; what is damaged, altered or unfit is one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sinkmodel.errors import UserError
from sinkmodel.memories import NAMM, SnapKV, make_memory
from sinkmodel.memories.namm import NAMMConfig, measure_statistics
from tests.models import model_of, tokens

CONFIG = NAMMConfig(
    window=4,
    hop=2,
    interval=6,
    hidden=3,
    age_size=2,
    mean=(0.02, 0.015, 0.01),
    variance=(3e-4, 2e-4, 1e-4),
    evolved_on={"host": "tiny", "tasks": ["recall"]},
    seeds=(1, 2),
    fitness=0.97,
    commit="abc",
)


@pytest.fixture
def llama():
    return model_of("llama")


@pytest.fixture
def memory(llama):
    parameters = torch.randn(CONFIG.parameters, generator=torch.Generator().manual_seed(1))
    return NAMM(llama, CONFIG, parameters)


@pytest.fixture
def folder(memory, tmp_path):
    memory.save_pretrained(tmp_path / "namm")
    return tmp_path / "namm"


def refused(call, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_was_saved_decides_as_before(llama, memory, folder, monkeypatch):
    """Also for another model, and from the Hub."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision: str(folder / file))
    for name, model in ((folder, llama), (str(folder), model_of("gpt_neox")), ("org/namm", llama)):
        again = make_memory("namm", model, artefact=name, ragged="fill", sinks=1)
        assert (again.namm, again.fingerprint, again.ragged, again.sinks) == (CONFIG, memory.fingerprint, "fill", 1)
        ids, before = torch.tensor([tokens(40)]), NAMM(model, CONFIG, memory.parameters, ragged="fill", sinks=1)
        for each in (again, before):
            model(ids, past_key_values=each)
        assert again.kept_positions(1) == before.kept_positions(1)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "namm.safetensors"]
    assert json.loads((folder / "config.json").read_text())["evolved_on"] == CONFIG.evolved_on


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("version", 2, "has version 2 of the format, this program reads 1"),
        ("format", "other", "is not the config of a NAMM"),
        ("mean", [0.02, 0.015, 0.011], "has statistics or settings other than those"),
        ("gamma", 0.9, "has statistics or settings other than those"),
        ("interval", 8, "has statistics or settings other than those"),
        ("statistics_sha256", "0" * 64, "has statistics or settings other than those"),
        ("mean", [0.02], "1 means and 3 variances"),
        ("variance", [1.0, 2.0, -1.0], "variances below 0"),
        ("interval", 7, "hop 2 does not divide interval 7"),
        ("window", 5, "hop 2 does not divide window 5|must both be even"),
        ("gamma", "much", "is damaged"),
        ("hidden", 4, "does not hold the network of its config.json"),
    ],
)
def test_an_artefact_that_was_altered(llama, folder, key, value, match):
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, key: value}))
    refused(lambda: NAMM.from_pretrained(folder, llama), match)


def test_statistics_of_another_network(llama, memory, folder, tmp_path):
    """Guards a config.json that is sound, and belongs to other parameters."""
    other = NAMM(llama, CONFIG.replace(mean=(0.5, 0.5, 0.5)), memory.parameters)
    other.save_pretrained(tmp_path / "other")
    (folder / "config.json").write_bytes((tmp_path / "other" / "config.json").read_bytes())
    refused(lambda: NAMM.from_pretrained(folder, llama), "has statistics or settings other than those")


def test_files_that_are_damaged_or_missing(llama, folder, tmp_path):
    path = folder / "namm.safetensors"
    tensors, whole = load_file(path), path.read_bytes()
    tensors["score.bias"] = torch.tensor([float("nan")])
    about = {"statistics_sha256": CONFIG.statistics_sha256}
    save_file(tensors, path, about)
    refused(lambda: NAMM.from_pretrained(folder, llama), "parameters contain NaN")
    del tensors["score.bias"]
    save_file(tensors, path, about)
    refused(lambda: NAMM.from_pretrained(folder, llama), "does not hold the network")
    path.write_bytes(whole[:100])
    refused(lambda: NAMM.from_pretrained(folder, llama), "cannot be read as safetensors")
    (folder / "config.json").write_text("{")
    refused(lambda: NAMM.from_pretrained(folder, llama), "cannot be read as JSON")
    refused(lambda: NAMM.from_pretrained(tmp_path / "none", llama), "is not a folder with a NAMM")
    refused(lambda: NAMM.from_pretrained(folder, llama, revision="v1"), "is a folder, which has no revision v1")
    refused(lambda: NAMM.from_pretrained(tmp_path, llama), "config.json cannot be read")


def test_what_cannot_be_made_or_saved(llama, memory, tmp_path):
    zeros, P = torch.zeros, CONFIG.parameters
    refused(lambda: make_memory("namm", llama), "needs an evolved network; give artefact")
    refused(lambda: make_memory("namm", llama, 64, artefact="x"), "leave out the budget")
    refused(lambda: NAMM(llama, CONFIG, zeros(P + 1)), rf"parameters are \[{P + 1}\]; this NAMM takes \[{P}\]")
    refused(lambda: NAMM(llama, CONFIG, ragged="no"), "ragged is 'no'; choose one of true, fill")
    refused(lambda: NAMM(llama, CONFIG, positions="cache"), "positions can only be 'text'")
    refused(lambda: NAMMConfig(gamma=1.0), "gamma is 1.0")
    refused(lambda: NAMMConfig(interval=500), "hop 16 does not divide interval 500; make interval a multiple of hop")
    refused(lambda: NAMMConfig(hop=0), "hop is 0")
    refused(lambda: measure_statistics(llama, [torch.tensor([tokens(5)])], CONFIG), "no prompt has 6 tokens")
    refused(lambda: NAMM(llama, CONFIG, zeros(2, P)).save_pretrained(tmp_path / "a"), "save a single candidate")
    refused(lambda: NAMM(llama, NAMMConfig()).save_pretrained(tmp_path / "a"), "has no statistics")
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").write_text("")
    refused(lambda: memory.save_pretrained(tmp_path), ".")


def test_what_does_not_fit_a_memory_in_use(llama, memory, tmp_path):
    ids, P = torch.tensor([tokens(20)]), CONFIG.parameters
    pair = NAMM(llama, CONFIG, torch.zeros(2, P))
    refused(lambda: llama(ids, past_key_values=pair), "for 2 rows, the input has 1")
    llama(ids.repeat(2, 1), past_key_values=pair)
    llama(ids, past_key_values=memory)
    refused(lambda: memory.with_parameters(torch.zeros(2, P)), "are for 2 rows, and this NAMM holds 1")
    refused(lambda: memory.for_candidates(torch.zeros(P)), "candidates are")
    refused(lambda: memory.crop(-1), "can remove 0 tokens")
    memory.save(tmp_path / "memory.pt")
    other = NAMM(llama, CONFIG, memory.parameters + 1)
    refused(lambda: other.load(tmp_path / "memory.pt"), "fingerprint")
    gptj = model_of("gptj", attn_implementation="eager")
    for make in (lambda: NAMM(gptj, CONFIG), lambda: SnapKV(gptj, 12, window=4)):
        refused(lambda: gptj(ids, past_key_values=make()), "'gptj' does not send its attention")  # noqa: B023
