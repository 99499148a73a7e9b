"""A NAMM that was evolved on text, in a model that sees: what it forgets of frames that are shown again and again.

    python examples/repeated_frames.py

A tiny Llava of transformers (CLIP's vision tower, a projector, a Llama with grouped heads) is trained for a minute on
videos that are made here. Each frame is a colour with noise, as 16 image tokens; half of the frames are exact copies of
the frame before. One early frame has a bright border, and the question at the end asks for its colour. So the frame
with the border is needed, and a copy has nothing that the frame before it had not.

The prompt is given as `inputs_embeds`, with the features of the images in their places: a NAMM reads a prompt piece by
piece, and `pixel_values` belong to all of it. The network of the NAMM stays as it was evolved; the example measures
what it does here, and nothing says that this is good.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transfer import kept_of, parser_of, train
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sinkmodel.console import command, put, say
from sinkmodel.errors import UserError
from sinkmodel.memories import NAMM, Dense, Memory, SnapKV
from sinkmodel.parser import positive

COLOURS = torch.tensor([[r, g, b] for r in (-1.0, 1.0) for g in (-1.0, 1.0) for b in (-1.0, 1.0)])
ASK, IMAGE = len(COLOURS), len(COLOURS) + 1  # tokens after those of the colours
SIDE, PATCH = 16, 4  # pixels
PER_FRAME = (SIDE // PATCH) ** 2  # tokens
INTERVALS = 3.5  # tokens of a video, in intervals of the NAMM, unless --frames says otherwise
FEWEST = 4  # frames


@command("repeated_frames")
def main(argv: list[str]) -> int | None:
    options = parse(argv)
    from sinkmodel.memories.namm import read_artefact

    namm, parameters = read_artefact(options.artefact)
    frames = options.frames or max(FEWEST, round(INTERVALS * namm.interval / PER_FRAME))
    if frames < FEWEST or frames * PER_FRAME < namm.interval:
        raise UserError(
            f"--frames {frames} are {frames * PER_FRAME} tokens, and this NAMM first decides after {namm.interval}; "
            f"give at least {max(FEWEST, -(-namm.interval // PER_FRAME))}"
        )
    torch.manual_seed(options.seed)
    model = make_model(frames, options.width)
    say(f"{frames} frames of {PER_FRAME} tokens; {sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, options, (FEWEST, frames), functools.partial(loss_of, model, options.batch))
    videos = make_videos(options.videos, frames)
    memory = NAMM(model, namm, parameters)
    dense, of_namm = answered(model, Dense(model), videos), answered(model, memory, videos)
    kept = kept_of(memory)
    budget = max(2, round(kept.sum(dim=-1).mean().item()))
    of_snapkv = answered(model, SnapKV(model, budget, window=1), videos)
    put(report(dense, of_namm, of_snapkv, kept, namm.interval, budget, videos))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("repeated_frames.py", "A NAMM in a vision-language model.", updates=300, batch=16)
    parser.add_argument("--frames", type=positive, metavar="N", help="of a video (default: by the NAMM's interval)")
    parser.add_argument("--videos", type=positive, default=64, metavar="N", help="that are asked about (default: 64)")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------- the videos


@dataclass(frozen=True)
class Videos:
    """B videos of T frames."""

    pixels: Tensor  # [B, T, 3, SIDE, SIDE]
    copies: Tensor  # [B, T], True for a frame that is the one before again
    marked: Tensor  # [B], the frame with a border; never a copy, and not copied
    answers: Tensor  # [B], its colour


def make_videos(count: int, frames: int) -> Videos:
    rows = torch.arange(count)
    copies = torch.rand(count, frames) < 0.5
    marked = torch.randint(0, max(1, frames // 2), (count,))
    copies[:, 0] = copies[rows, marked] = copies[rows, marked + 1] = False
    colours = torch.randint(0, len(COLOURS), (count, frames))
    pixels = COLOURS[colours][..., None, None] + 0.3 * torch.randn(count, frames, 3, SIDE, SIDE)
    border = torch.ones(SIDE, SIDE, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    shown = pixels[rows, marked]
    pixels[rows, marked] = torch.where(border, 3.0, shown)
    for frame in range(1, frames):
        again = copies[:, frame]
        pixels[again, frame] = pixels[again, frame - 1]
    return Videos(pixels, copies, marked, colours[rows, marked])


# ----------------------------------------------------------------------------------------------------------- the model


def make_model(frames: int, width: int) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=IMAGE + 1,
        max_position_embeddings=frames * PER_FRAME + 1,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()  # without dropout the modes are alike


def embedded(model: LlavaForConditionalGeneration, videos: Videos) -> Tensor:
    """The prompts, [B, T · PER_FRAME + 1, E]: the frames, then the question."""
    B, T = videos.copies.shape
    found: Any = model.get_image_features(
        pixel_values=videos.pixels.flatten(0, 1), vision_feature_layer=-1, vision_feature_select_strategy="default"
    )
    features = torch.stack(list(getattr(found, "pooler_output", found)))  # a list of one image each in transformers 4
    question = model.get_input_embeddings()(torch.full((B, 1), ASK))
    return torch.cat([features.view(B, T * PER_FRAME, -1), question], dim=1)


def loss_of(model: LlavaForConditionalGeneration, batch: int, frames: int) -> Tensor:
    """The loss of the answers to the question."""
    videos = make_videos(batch, frames)
    logits = model(inputs_embeds=embedded(model, videos), use_cache=False, logits_to_keep=1).logits[:, -1]
    return F.cross_entropy(logits, videos.answers)


# --------------------------------------------------------------------------------------------------------- what it does


@dataclass(frozen=True)
class Answers:
    """To the question at the end of the videos."""

    right: float  # share
    nats: float  # of the right answer, mean


@torch.no_grad()
def answered(model: LlavaForConditionalGeneration, memory: Memory, videos: Videos) -> Answers:
    """Read the videos, forget, then ask."""
    prompt = embedded(model, videos)
    memory.expect(prompt.shape[1] - 1)
    model(inputs_embeds=prompt[:, :-1], past_key_values=memory, logits_to_keep=1)
    logits = model(inputs_embeds=prompt[:, -1:], past_key_values=memory).logits[:, -1]
    right = (logits.argmax(dim=-1) == videos.answers).float().mean().item()
    return Answers(right, F.cross_entropy(logits, videos.answers).item())


def report(
    dense: Answers, namm: Answers, snapkv: Answers, kept: Tensor, interval: int, budget: int, videos: Videos
) -> str:
    """Answers, and which frames were kept, of those that the last decision was about.

    Which frame is a copy was drawn, so copies and fresh frames have the same ages in the mean.
    """
    decided = (kept.shape[-1] - 1) // interval * interval // PER_FRAME  # frames
    of_frames = kept[..., : decided * PER_FRAME].mean(dim=(0, 2)).unflatten(1, (decided, PER_FRAME)).mean(dim=-1)
    copies = videos.copies[:, :decided]
    copied = torch.cat([videos.copies, torch.zeros_like(videos.copies[:, :1])], dim=1)[:, 1 : decided + 1]
    marked = F.one_hot(videos.marked, videos.copies.shape[1])[:, :decided].bool()
    lines = [f"right answers, where chance has {1 / len(COLOURS):.2f}, and nats of the right one:"]
    for name, found in (("dense", dense), ("namm", namm), (f"snapkv {budget}", snapkv)):
        lines.append(f"  {name:<14}{found.right:.2f}  {found.nats:.2f}")
    lines.append(f"% kept by namm of {decided} frames, as a mean over layers, heads and videos:")
    for name, frames in (
        ("all", torch.ones_like(copies)),
        ("shown once", ~copies & ~copied & ~marked),
        ("copied after it", ~copies & copied),
        ("copies", copies),
        ("with the border", marked),
    ):
        share = f"{100 * of_frames[frames].mean():.1f}" if frames.any() else "–"
        lines.append(f"  {name:<16}{share:>5}  of {int(frames.sum())}")
    if dense.right < 0.5:
        lines.append("the model has not learned the task, so its answers say nothing; train longer with --updates")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
