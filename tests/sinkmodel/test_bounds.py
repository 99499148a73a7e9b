"""Guards: a file's own words do not lead us out of its folder, and no link publishes what lies elsewhere."""

from __future__ import annotations

import pytest

from sinkmodel.bounds import files_of, inside
from sinkmodel.errors import UserError

OUTSIDE = [
    *("../outside.bin", "/etc/passwd", "a/../../outside.bin", "a/..", "..", ".", "", "a\0b", "//host/share/x"),
    *("..\\outside.bin", "C:\\outside.bin", "C:outside.bin", "\\outside.bin", None, 7, ["a"]),
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="which is not inside") as caught:
        inside(tmp_path, name, tmp_path / "manifest.json")
    assert str(tmp_path / "manifest.json") in str(caught.value)


@pytest.mark.parametrize("name", ["train-00000.bin", "parts/train.bin", "..train.bin", "ünï code.bin"])
def test_a_name_inside_is_taken(tmp_path, name):
    assert inside(tmp_path, name, tmp_path) == tmp_path / name


@pytest.fixture
def folder(tmp_path):
    """A folder beside a private one."""
    for name in ("private/key.txt", "folder/config.json", "folder/.secret/key.txt", "folder/parts/one.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path / "folder"


LEAD_OUT = {
    "a file": ("notes.txt", "../private/key.txt"),
    "an absolute path": ("notes.txt", "{outside}/private/key.txt"),
    "a folder": ("notes", "../private"),
    "the folder above": ("notes", ".."),
    "from a sub-folder": ("parts/notes.txt", "../../private/key.txt"),
    "through a linked sub-folder": ("parts/notes.txt", "../way/key.txt"),
    "a hidden file": ("notes.txt", ".secret/key.txt"),
    "a hidden folder": ("notes", ".secret"),
    "nowhere": ("notes.txt", "gone.txt"),
    "itself": ("notes.txt", "notes.txt"),
    "a folder that it is in": ("parts/again", "../parts"),
    "the whole folder": ("again", "."),
}


@pytest.mark.parametrize(("link", "target"), LEAD_OUT.values(), ids=LEAD_OUT)
def test_a_link_that_leads_out_is_refused_by_name(folder, link, target):
    if "way" in target:
        (folder / ".way").symlink_to("../private")  # hidden, so that it is not named itself
        target = target.replace("way", ".way")
    (folder / link).symlink_to(target.format(outside=folder.parent))
    with pytest.raises(UserError, match=f"^{folder / link} (leads to|leads out of|is a link to) .*; ") as caught:
        files_of(folder)
    assert "remove" in str(caught.value)


def test_links_inside_are_followed_and_hidden_files_stay(folder):
    """Risk: a sub-folder that is a link is left out in silence; or links to links are refused."""
    (folder / "way").symlink_to("parts")
    (folder / "two.txt").symlink_to("way/one.txt")
    (folder / "three.txt").symlink_to(folder / "two.txt")
    (folder / ".hidden").symlink_to("../private/key.txt")
    one = (folder / "parts" / "one.txt").resolve()
    linked = dict.fromkeys(["parts/one.txt", "three.txt", "two.txt", "way/one.txt"], one)
    assert files_of(folder) == {"config.json": (folder / "config.json").resolve(), **linked}
    (folder.parent / "link").symlink_to("folder")  # the folder that was asked for may be one itself
    assert files_of(folder.parent / "link") == files_of(folder)


def test_links_into_the_cache_of_the_hub_are_followed(folder, monkeypatch):
    """Risk: a downloaded model, all links, cannot be pushed; or the token beside the cache can."""
    home = folder.parent / "home"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    snapshot, blob = home / "models--org--x/snapshots/rev", home / "models--org--x/blobs/abc"
    for path in (snapshot, blob.parent):
        path.mkdir(parents=True)
    blob.write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (folder / "copy.safetensors").symlink_to(snapshot / "model.safetensors")
    (folder / "snapshot").symlink_to(snapshot)
    assert files_of(snapshot) == {"model.safetensors": blob}
    assert files_of(folder).keys() >= {"copy.safetensors", "snapshot/model.safetensors"}
    (home / "token").write_text("hf_secret")
    for token in (folder / "notes.txt", snapshot / "notes.txt"):
        token.symlink_to(home / "token")
        with pytest.raises(UserError, match=r"notes\.txt leads out of"):
            files_of(token.parent)
