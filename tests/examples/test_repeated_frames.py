"""Guards: videos are what the example states, the prompt is the model's own, and shares belong to their frames."""

from __future__ import annotations

import re

import pytest
import torch

from examples.repeated_frames import (
    ASK,
    COLOURS,
    IMAGE,
    PER_FRAME,
    Answers,
    Videos,
    answered,
    embedded,
    main,
    make_model,
    make_videos,
    report,
)
from sinkmodel.errors import UserError
from sinkmodel.memories import NAMM, Dense, SnapKV
from tests.eval.namm import CONFIG, write_artefact


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_model(5, 16)


def test_videos_repeat_frames_and_mark_one_that_is_not_repeated():
    torch.manual_seed(0)
    videos = make_videos(40, 6)
    rows = torch.arange(40)
    same = (videos.pixels[:, 1:] == videos.pixels[:, :-1]).flatten(2).all(dim=-1)
    assert torch.equal(same, videos.copies[:, 1:])
    assert not videos.copies[:, 0].any()
    assert not videos.copies[rows, videos.marked].any()
    assert not videos.copies[rows, videos.marked + 1].any()
    assert (videos.marked < 3).all()
    inside = videos.pixels[rows, videos.marked][..., 1:-1, 1:-1].mean(dim=(-1, -2))
    assert torch.equal(inside.sign(), COLOURS[videos.answers])
    assert 0.2 < videos.copies.float().mean() < 0.5


@torch.no_grad()
def test_the_prompt_is_what_the_model_makes_of_its_images(model):
    """Risk: features in another order than transformers has them, or memories that disturb the vision tower."""
    videos = make_videos(1, 5)
    ids = torch.tensor([[IMAGE] * (5 * PER_FRAME) + [ASK]])
    given = {"input_ids": ids, "pixel_values": videos.pixels[0]}
    own = model(**given).logits
    prompt = embedded(model, videos)
    for memory in (None, Dense(model), NAMM(model, CONFIG)):
        assert torch.allclose(model(inputs_embeds=prompt, past_key_values=memory).logits, own, atol=1e-5)
    whole = SnapKV(model, 12, window=4)
    whole.expect(ids.shape[1])
    assert torch.allclose(model(**given, past_key_values=whole).logits, own, atol=1e-5)
    assert model.config.vision_config._attn_implementation == model.config.text_config._attn_implementation == "sdpa"


def test_images_that_come_with_a_part_of_their_tokens_are_refused(model):
    """Risk: an error of transformers about counts of image tokens, or a memory that is torn by it."""
    videos = make_videos(1, 5)
    ids = torch.tensor([[IMAGE] * (5 * PER_FRAME) + [ASK]])
    memory = NAMM(model, CONFIG)
    match = "pixel_values belongs to all 81 tokens, and this cache reads 6 of them first; put the features"
    with pytest.raises(UserError, match=match):
        model(input_ids=ids, pixel_values=videos.pixels[0], past_key_values=memory)
    assert memory.columns == 0
    model(inputs_embeds=embedded(model, videos), past_key_values=memory)


def test_an_answer_is_that_of_the_model_after_the_video(model):
    videos = make_videos(3, 4)
    with torch.no_grad():
        nats = -model(inputs_embeds=embedded(model, videos)).logits[:, -1].log_softmax(-1)
    found = answered(model, Dense(model), videos)
    assert found.nats == pytest.approx(nats[torch.arange(3), videos.answers].mean().item(), abs=1e-4)
    assert found.right == pytest.approx((nats.argmin(-1) == videos.answers).float().mean().item())


def test_shares_belong_to_their_frames():
    """Risk: the kept share of a frame shown under another kind, or frames that no decision was about yet."""
    copies = torch.tensor([[False, False, True, False, False]])
    videos = Videos(torch.empty(0), copies, torch.tensor([3]), torch.tensor([0]))
    kept = torch.tensor([0.25, 0.5, 0.75, 1.0, 0.0]).repeat_interleave(PER_FRAME)
    kept = torch.cat([kept, torch.ones(1)])[None, None, None]
    text = report(Answers(1.0, 0.1), Answers(0.5, 0.7), Answers(0.25, 1.5), kept, 4 * PER_FRAME, 9, videos)
    assert re.findall(r"(?m)^  ([a-z ]+?) +(\S+)  of (\d)$", text) == [
        ("all", "62.5", "4"),
        ("shown once", "25.0", "1"),
        ("copied after it", "50.0", "1"),
        ("copies", "75.0", "1"),
        ("with the border", "100.0", "1"),
    ]
    assert "snapkv 9      0.25  1.50" in text
    assert "has not learned" not in text


def test_the_example_runs_with_any_artefact(tmp_path, capsys):
    artefact = write_artefact(tmp_path / "namm")
    words = ["--artefact", artefact, "--frames", 4, "--updates", 2, "--batch", 2, "--videos", 4, "--width", 8]
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"dense +\d\.\d\d  \d\.\d\d\n  namm +\d\.\d\d  \d\.\d\d\n  snapkv \d+", out)
    write_artefact(tmp_path / "long", interval=66)
    assert main(["--artefact", str(tmp_path / "long"), "--frames", "4"]) == 2
    assert "--frames 4 are 64 tokens, and this NAMM first decides after 66; give at least 5" in capsys.readouterr().err
