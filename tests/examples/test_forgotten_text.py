"""Guards: the example shows what the memory holds, in the right places, and decodes the text that was read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples import forgotten_text
from sinkmodel.export import export
from sinkmodel.loading import load_model
from sinkmodel.memories import NAMM
from tests.eval.namm import write_artefact
from tests.tiny import checkpoint, words

INTERVAL = 12


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("forgotten")
    model = export(checkpoint(folder), folder / "model")
    (folder / "a.txt").write_text(words(200))
    artefact = write_artefact(folder / "namm", interval=INTERVAL)
    return ["--model", str(model), "--text", str(folder / "a.txt"), "--artefact", str(artefact)]


def test_forgotten_tokens_are_in_brackets_and_all_others_are_there(given, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert forgotten_text.main([*given, "--tokens", "40", "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    loaded = load_model(given[1])
    ids = [*loaded.sink_ids, *loaded.tokenizer(Path(given[3]).read_text(), add_special_tokens=False).input_ids][:40]
    text, last = printed.split("\n\n")[0], printed.split("\n\n")[-1]
    assert text.replace("[", "").replace("]", "").split() == "".join(map(loaded.tokenizer.decode, ids)).split()
    memory = NAMM.from_pretrained(given[5], loaded.model)
    with torch.inference_mode():
        loaded.model(torch.tensor([ids]), past_key_values=memory)
    held = [set() for _ in ids]  # by hand: layer by layer, head by head
    for number, layer in enumerate(memory.layers):
        for head, places in enumerate(layer.held_positions()[0].tolist()):
            for place in places:
                if place >= 0:
                    held[place].add((number, head))
    heads = len(memory.layers) * memory.layers[0].keys.shape[1]
    assert [len(each) for each in held] == (forgotten_text.held_share(memory) * heads).round().tolist()
    none = [not each for each in held]
    assert 0 < sum(none) < 36
    assert f"no head holds {sum(none[:36]) / 36:.0%}" in last
    assert "line-through" in page.read_text()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--tokens", "11"], "--tokens 11: the text gives 11 tokens, and this NAMM first decides after 12; give more"),
        (["--html", "none/page.html"], "--html none/page.html: its folder does not exist"),
    ],
)
def test_a_mistake_is_one_line(given, options, line, capsys):
    assert forgotten_text.main([*given, *options]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
