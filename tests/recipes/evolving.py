"""Small evolutions for tests: a tiny random host, which is let pass as able, and how runs are compared.

    [KILLED_AT=N] python -m tests.recipes.evolving [sink-evolve] OPTIONS OF sink-evolve

With KILLED_AT the process kills itself when it is about to write its state for the Nth time.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from sinkmodel.checkpoint import read_metrics
from sinkmodel.memories.namm import read_artefact
from sinkmodel.sinks import SinkConfig
from tests import tiny

POSITIONS = 1024
SETTINGS = {
    "namm.window": 8,
    "namm.hop": 4,
    "namm.interval": 64,
    "tasks.names": "[niah_single_2]",
    "tasks.length": 460,
    "tasks.prompts": 1,
    "seed": 4,  # with which the best validation is not the last
    "population": 4,
    "generations": 3,
    "validation.every": 2,
    "validation.prompts": 1,
    "compute.candidates": 2,
    "compute.device": "cpu",
}


def make_inputs(folder: Path) -> dict[str, str]:
    """A host with a sink token and room for a prompt, and two texts, as options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SHAPES, "llama", dataclasses.replace(tiny.SHAPES["llama"], positions=POSITIONS))
        model = tiny.checkpoint(folder, "llama", SinkConfig("token", 1))
    options = {"model": str(model)}
    for seed, option in enumerate(("text", "validation_text")):
        path = folder / f"{option}.txt"
        path.write_text(text(150, seed), encoding="utf-8")
        options[option] = str(path)
    return options


def text(sentences: int, seed: int) -> str:
    """Sentences of made-up words, nearly all of them different."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 7))) for _ in range(8 * sentences)]
    return " ".join(" ".join(words[place : place + 8]).capitalize() + "." for place in range(0, len(words), 8))


def arguments(inputs: dict[str, str], output: Path, **changes: object) -> list[str]:
    """Options of `sink-evolve`; `tasks__length=300` changes `tasks.length`, and None leaves an option out."""
    settings = {**SETTINGS, **inputs, "output": output, **{key.replace("__", "."): x for key, x in changes.items()}}
    return [f"--{key}={value}" for key, value in settings.items() if value is not None]


def let_pass(patch: pytest.MonkeyPatch) -> None:
    """No host is too poor for a task."""
    patch.setattr("sinkmodel.tasks.cells.FLOOR_GAIN", float("-inf"))
    patch.setattr("sinkmodel.tasks.cells.FLOOR_SCORE", float("-inf"))


def files_of(run: Path) -> dict[str, object]:
    """All that a run has written, but for the time that it took."""
    metrics = [{key: value for key, value in row.items() if key != "seconds"} for row in read_metrics(run)]
    results = {name: read_artefact(run / name) for name in ("best", "last")}
    numbers = {name: (config, parameters.tolist()) for name, (config, parameters) in results.items()}
    return {"metrics": metrics, "state": (run / "state.json").read_bytes(), **numbers}


def main(argv: list[str]) -> int:
    from recipes.evolution import journal
    from recipes.evolve import main

    write, calls, killed_at = journal.write_state, 0, int(os.environ.get("KILLED_AT", "0"))

    def write_or_die(*arguments):
        nonlocal calls
        calls += 1
        if calls == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        let_pass(patch)
        patch.setattr(journal, "write_state", write_or_die)
        return main(argv)


if __name__ == "__main__":
    raise SystemExit(main([word for word in sys.argv[1:] if word != "sink-evolve"]))
