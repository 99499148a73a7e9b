"""Guards: the double of the Hub is one that huggingface_hub and transformers take for the real one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkmodel.export import export
from tests import tiny
from tests.hub import READ_ONLY, TOKEN, upload
from tests.recipes.corpus import tree


def test_what_was_uploaded_is_loaded_by_name_and_revision(hub, tmp_path):
    for step in (1, 2):
        checkpoint = tiny.checkpoint(tmp_path / "run", "llama", step=step)
        folder = export(checkpoint, tmp_path / f"model{step}")
        weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        upload(hub, "org/model", folder, "main" if step == 2 else "step1")
        loaded = AutoModelForCausalLM.from_pretrained("org/model", revision="main" if step == 2 else "step1")
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, weights[name])
    assert AutoTokenizer.from_pretrained("org/model")("a")["input_ids"][0] == loaded.config.bos_token_id
    copy = snapshot_download("org/model", local_dir=tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / ".cache")
    assert tree(Path(copy)) == tree(tmp_path / "model2")


def test_a_folder_is_listed_as_the_hub_lists_it(hub):
    api = HfApi()
    api.create_repo("org/model")
    for path in ("a/b/c.txt", "a/d.txt", "e.txt"):
        hub.repositories["org/model"].add(path, b"text")
    assert [entry.path for entry in api.list_repo_tree("org/model")] == ["a", ".gitattributes", "e.txt"]
    assert [entry.path for entry in api.list_repo_tree("org/model", "a")] == ["a/b", "a/d.txt"]
    assert [entry.path for entry in api.list_repo_tree("org/model", "a", recursive=True)] == ["a/b/c.txt", "a/d.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/model", "f"))


def test_a_private_repository_is_seen_by_those_who_may(hub):
    HfApi().create_repo("org/model", private=True)
    assert HfApi().repo_info("org/model").private
    hub.tokens["hf_other"] = ("other", {"other"})
    for token in ("hf_other", False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).repo_info("org/model")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_unknown").repo_info("org/model")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=READ_ONLY).create_repo("org/another")
    assert TOKEN not in str(hub.log)


def test_a_commit_on_a_head_that_has_moved_is_refused(hub):
    api = HfApi()
    api.create_repo("org/model")
    old = api.repo_info("org/model").sha
    hub.repositories["org/model"].add("a", b"1")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id="org/model", parent_commit=old)
    assert hub.repositories["org/model"].files()["a"].content == b"1"


@pytest.mark.parametrize("trouble", [{"status": 503}, {"lost": "half"}, {"lost": "answer"}])
def test_an_upload_survives_a_moment_of_trouble_and_a_download_is_resumed(hub, trouble):
    """huggingface_hub does that by itself; the double gives it the occasion."""
    api, content = HfApi(), bytes(range(256)) * 1000
    api.create_repo("org/model")
    hub.trouble("PUT /lfs/", **trouble)
    hub.trouble("GET /org/model/resolve/", lost="half")
    api.upload_file(path_or_fileobj=content, path_in_repo="a.bin", repo_id="org/model")
    assert hub.uploads == 2, "the first one was lost"
    with open(hf_hub_download("org/model", "a.bin"), "rb") as file:
        assert file.read() == content
    assert len(hub.asked("^GET /org/model/resolve/")) == 2
    assert hub.repositories["org/model"].files()["a.bin"].large
