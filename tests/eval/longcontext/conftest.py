"""A tiny random model with room for RULER's prompts in byte-level tokens, and a text."""

from __future__ import annotations

import dataclasses
import random

import pytest

from eval.measures.longcontext import longcontext
from eval.measures.memories import choice
from sinkmodel.loading import load_model
from sinkmodel.sinks import SinkConfig
from tests import tiny
from tests.eval.longcontext import standins

POSITIONS = 4096


def sentences(count: int, seed: int = 0) -> str:
    """Sentences of made-up words, nearly all words different."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(12 * count)]
    return " ".join(" ".join(words[place : place + 12]).capitalize() + "." for place in range(0, len(words), 12))


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The run folder of a model with two sink tokens."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SHAPES, "llama", dataclasses.replace(tiny.SHAPES["llama"], positions=POSITIONS))
        tiny.checkpoint(folder, "llama", SinkConfig("token", 2))
    return folder


@pytest.fixture(scope="session")
def loaded(run):
    return load_model(str(run))


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(sentences(300))
    return path


@pytest.fixture
def memories(monkeypatch):
    """Stand-ins in the place of `sinkmodel.memories`."""
    for name, stand_in in vars(standins.module()).items():
        for user in (longcontext, choice):
            if hasattr(user, name) and not name.startswith("__"):
                monkeypatch.setattr(user, name, stand_in)
