"""Guards: sink-pretrain is the training that it says: compared with a plain loop that shares no code with it.

The loop is written out below: full logits, F.cross_entropy, AdamW by hand with Pythia's two groups, clipping by hand,
the schedule by hand. Settings are chosen so that each of them matters: the clip bites, the decay is strong.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from recipes.data.order import row_at
from recipes.data.rows import Samples
from recipes.data.shards import open_split
from sinkmodel.checkpoint import checkpoint_steps, read_metrics
from sinkmodel.loading import load_checkpoint
from sinkmodel.models import build_model
from sinkmodel.shapes import ModelShape
from sinkmodel.sinks import padded_vocabulary
from tests import tiny
from tests.recipes.runs import train

STEPS, ROWS, T = 6, 8, 64
LR, MIN_LR, WARMUP, DECAY, CLIP, BETAS, EPS = 3e-3, 3e-4, 2, 0.5, 0.3, (0.9, 0.95), 1e-8


def batch(split, sinks: list[int], step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one step, read from the shard by hand."""
    rows = (split.tokens - 1) // T
    inputs, targets = [], []
    for sample in range(step * ROWS, (step + 1) * ROWS):
        start = row_at(sample, rows, seed=1234) * T
        text = split.read(start, T + 1).tolist()
        inputs.append((sinks + text)[:T])
        targets.append(text[1:] if not sinks else [-100] * (len(sinks) - 1) + text[: T - len(sinks) + 1])
    return torch.tensor(inputs), torch.tensor(targets)


def plain_training(split, sinks: list[int]) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    shape = ModelShape(layers=2, hidden=32, heads=4, kv_heads=4, ffn=64, positions=64)
    model = build_model(shape, padded_vocabulary(tiny.tokenizer().vocabulary), seed=1234)
    model.set_attn_implementation("eager")
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    log = []
    for step in range(STEPS):
        inputs, targets = batch(split, sinks, step)
        model.zero_grad()
        loss = F.cross_entropy(model(input_ids=inputs, use_cache=False).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        if step <= WARMUP:
            lr = LR * step / WARMUP
        else:
            lr = max(MIN_LR, LR / 2 * (1 + math.cos(math.pi * (min(step, STEPS - WARMUP) - WARMUP) / STEPS)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = gradients[name] * min(1.0, CLIP / (norm + 1e-6))
                is_vector = name.endswith("bias") or "norm" in name
                if not is_vector:
                    p -= lr * DECAY * p
                first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
                second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * g * g
                m, v = first[name] / (1 - BETAS[0] ** (step + 1)), second[name] / (1 - BETAS[1] ** (step + 1))
                p -= lr * m / (v.sqrt() + EPS)
        log.append({"loss": loss.item(), "grad_norm": norm, "lr": lr})
    return log, dict(model.named_parameters())


@pytest.mark.parametrize("sinks", [0, 1, 2])
@pytest.mark.parametrize("micro_rows", [8, 2], ids=["one micro-batch", "four micro-batches"])
def test_losses_norms_rates_and_weights_are_those_of_a_plain_loop(data, tmp_path, sinks, micro_rows):
    split = open_split(data, "train")
    vocabulary = tiny.tokenizer().vocabulary
    run = train(
        data,
        tmp_path / "run",
        sink__kind="token" if sinks else "none",
        sink__count=max(1, sinks),
        schedule__steps=STEPS,
        schedule__warmup=WARMUP / STEPS,
        optimizer__lr=LR,
        schedule__min_lr=MIN_LR,
        optimizer__weight_decay=DECAY,
        optimizer__clip=CLIP,
        training__micro_rows=micro_rows,
        logging__every=1,
    )
    log, weights = plain_training(split, list(range(vocabulary, vocabulary + sinks)))
    rows = [row for row in read_metrics(run) if row["loss"]]
    assert len(rows) == STEPS
    for row, expected in zip(rows, log):
        assert expected["grad_norm"] > 1.5 * CLIP, "the clip must bite"
        assert float(row["lr"]) == pytest.approx(expected["lr"], rel=1e-12)
        assert float(row["loss"]) == pytest.approx(expected["loss"], abs=2e-5)
        assert float(row["grad_norm"]) == pytest.approx(expected["grad_norm"], rel=1e-3)
    trained = dict(load_checkpoint(run)[0].named_parameters())
    for name, expected in weights.items():
        if name.endswith("query_key_value.bias"):
            continue  # keys' biases have no gradient but noise, which Adam blows up to its full step
        assert (trained[name] - expected).abs().max() < 2e-4, name


@pytest.mark.parametrize("rows", [8, 7, 3, 10_000], ids=["whole", "the last partial", "less than one", "all there are"])
def test_validation_is_over_the_twins_targets_of_the_first_rows_of_the_validation_split(data, tmp_path, rows):
    """Guards the mean over rows: a micro-batch of 4 that is not full counts with the rows that it has."""
    run = train(data, tmp_path / "run", schedule__steps=10, validation__rows=rows)
    model, _, sink_ids = load_checkpoint(run)
    split = open_split(data, "validation")
    total, count = 0.0, 0
    assert (split.tokens - 1) // T > 8
    for row in range(min(rows, (split.tokens - 1) // T)):
        text = split.read(row * T, T + 1).tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sink_ids + text[: T - 1]])).logits[0]
        # place p of the row predicts x_p; x0 has no twin
        losses = F.cross_entropy(logits[1:], torch.tensor(text[1:T]), reduction="none")
        total, count = total + losses.sum().item(), count + len(losses)
    (row,) = [row for row in read_metrics(run) if row["val_loss"]]
    assert float(row["val_loss"]) == pytest.approx(total / count, abs=1e-5)
    assert sorted(checkpoint_steps(run))[-1] == 10


def test_validation_is_every_so_many_steps_and_at_the_end(data, tmp_path):
    """Guards the last line of a run whose steps do not divide, and the number of tokens in a line."""
    run = train(data, tmp_path / "run", schedule__steps=5, validation__every=2)
    rows = [row for row in read_metrics(run) if row["val_loss"]]
    assert [(int(row["step"]), int(row["tokens"])) for row in rows] == [(step, step * ROWS * T) for step in (2, 4, 5)]
    assert all(float(row["val_ppl"]) == pytest.approx(math.exp(float(row["val_loss"])), rel=1e-4) for row in rows)


def test_rows_of_training_are_read_as_samples_say(data):
    """The loop above reads the shard by hand; this ties it to what the loader hands out."""
    from recipes.data.rows import RowLayout

    split = open_split(data, "train")
    samples = Samples(RowLayout(split, T), [400], seed=1234, shuffle=True)
    inputs, targets = batch(split, [400], step=1)
    for i in range(ROWS):
        assert samples[ROWS + i][0].tolist() == inputs[i].tolist()
        assert samples[ROWS + i][1].tolist() == targets[i].tolist()
