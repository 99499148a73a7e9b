"""Evidence from a GPU: twins of 162M parameters and the verdict on them, in parts of at most eight minutes.

    make evidence-gpu [DATA=evidence.tar.xz] [OUTPUT=runs/gpu] [REHEARSE=1]

A call is one part. It does what is left until its time is up, and the next call resumes there. When the time is up,
training saves and stops, and an evaluation is interrupted; the next part begins it again. An evaluation that has its
JSON file is not repeated. The exit code is 0 if nothing is left, and otherwise 75 (EX_TEMPFAIL), which make treats as
success; the last line of the output names what is left.

After every part OUTPUT/results.tar.xz holds all that is known so far: configs, metrics, results as JSON, the log of the
parts. Checkpoints stay in OUTPUT/runs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.machine import DEVICE, device_name, need_device, sized
from bench.gpu.pack import HELD_OUT, pack, unpack
from eval.cli import main as sink_eval
from recipes.pretrain import main as sink_pretrain
from sinkmodel.console import command, say
from sinkmodel.parser import OneLineParser, path_of, real

EXAMPLE = "example: python -m bench.gpu.evidence --data evidence.tar.xz --output runs/gpu"
KINDS = ("none", "token")
UNFINISHED = 75
STOPPED = 128 + signal.SIGUSR1
LEAST = 20.0  # seconds: if less of a part is left, no new stage is begun
SAVING = sized(45.0, 5.0)  # seconds of a part that training leaves for its checkpoint

# RESULTS.md, "Pythia-160M's shape": 4,300 steps of 32,768 tokens, six minutes on an H100.
RECIPE = sized(
    "--config pythia-160m --config one-gpu --optimizer.lr 1e-3 --schedule.min_lr 1e-4 --schedule.warmup 0.05 "
    "--schedule.steps 4300 --training.batch_tokens 32768 --checkpoints.every 860 --checkpoints.keep_every 860 "
    "--checkpoints.early false",
    "--config tiny --model.layers 1 --model.hidden 32 --model.ffn 64 --schedule.steps 4 --data.sequence 64 "
    "--training.batch_tokens 256 --training.micro_rows 4 --checkpoints.every 2 --checkpoints.keep_every 2 "
    "--validation.rows 2",
).split()
BUDGETS = sized({64: 40_000, 256: 40_000, 1024: 70_000}, {16: 160})  # C: tokens of a text
PIECES = sized(100, 2)  # of text, for sink-eval sinks


@dataclass(frozen=True)
class Stage:
    """A step of the evidence: `run` returns a command's exit code; `done` returns whether its result exists."""

    name: str
    run: Callable[[], int]
    done: Callable[[], bool]
    saves: bool = False  # it saves at SIGUSR1 and resumes; otherwise it is interrupted and begun again


class TimeIsUp(BaseException):
    """Raised in an evaluation. Not an Exception, so that no `except Exception` catches it."""


def stages(data: Path, output: Path) -> list[Stage]:
    runs, results, text = output / "runs", output / "results", str(data / HELD_OUT)

    def train(kind: str) -> Stage:
        run = runs / kind
        argv = [*RECIPE, f"--config=sink-{kind}", f"--training.device={DEVICE}", f"--data.path={data}"]

        def to_the_end() -> int:
            code = sink_pretrain([*argv, f"--output={run}"])
            if code == 0:
                (run / "done").touch()
            return code

        return Stage(f"train {kind}", to_the_end, (run / "done").exists, saves=True)

    def evaluate(name: str, *argv: str) -> Stage:
        file = results / f"{name}.json"
        words = [*argv, "--text", text, "--device", DEVICE, "--json", str(file)]
        return Stage(name, lambda: sink_eval(words), file.exists)

    twins = ["--sink", str(runs / "token"), "--vanilla", str(runs / "none")]
    of_tokens = {budget: str(tokens) for budget, tokens in BUDGETS.items()}
    return [
        *map(train, KINDS),
        *(
            evaluate(f"verify-{budget}", "verify", *twins, "--budget", str(budget), "--tokens", n, "--beside", n)
            for budget, n in of_tokens.items()
        ),
        *(
            evaluate(f"sinks-{kind}", "sinks", "--model", str(runs / kind), "--checkpoints", "--sequences", str(PIECES))
            for kind in KINDS
        ),
    ]


# ------------------------------------------------------------------------------------------------------------- a part


def part(remaining: list[Stage], seconds: float, log: Callable[[str], None]) -> int:
    """Run the remaining stages until the time is up. Returns 0, UNFINISHED, or the exit code of a stage that failed."""
    end, fresh = time.monotonic() + seconds, True
    for stage in remaining:
        if stage.done():
            continue
        left = end - time.monotonic() - (SAVING if stage.saves else 0)
        if left < min(LEAST, seconds / 2):
            return UNFINISHED
        begun = time.monotonic()
        try:
            with alarm(left, stage.saves):
                code = stage.run()
        except TimeIsUp:
            if fresh:
                log(f"{stage.name} takes longer than a part of {seconds / 60:.1f} minutes; give more with --minutes")
                return 1
            code = STOPPED
        fresh = False
        took = f"{stage.name}: {time.monotonic() - begun:.0f} s"
        if code == STOPPED:
            log(f"{took}, not done yet")
            return UNFINISHED
        if not stage.done():  # verify ends with 1 for "worse" and "undecided", which are results
            log(f"{took}, failed with exit code {code}")
            return code or 1
        log(f"{took}, done")
    return 0


@contextlib.contextmanager
def alarm(seconds: float, saves: bool) -> Iterator[None]:
    """After this many seconds, make a training save and stop, or raise TimeIsUp in anything else."""

    def ring(number: int, frame: object) -> None:
        if not saves:
            raise TimeIsUp
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------------------ results


def collect(output: Path) -> Path:
    """All results of a folder as one small archive, without checkpoints."""
    archive = output / "results.tar.xz"
    with tempfile.TemporaryDirectory() as aside:
        kept = Path(aside) / "results"
        shutil.copytree(output / "results", kept)
        for run in sorted((output / "runs").glob("*")):
            (kept / run.name).mkdir()
            for file in (run / "metrics.csv", run / "config.yaml", run / "spikes.csv"):
                if file.exists():
                    shutil.copy(file, kept / run.name)
        pack(kept, archive, "results")
    return archive


@command("bench.gpu.evidence")
def main(argv: list[str]) -> int:
    parser = OneLineParser("bench.gpu.evidence", __doc__ or "", EXAMPLE)
    parser.add_argument("--data", type=path_of, required=True, help="what bench.gpu.pack wrote")
    parser.add_argument("--output", type=path_of, required=True, help="folder of the runs and results")
    parser.add_argument("--minutes", type=real, default=8.0, help="of a part (default: 8)")
    options = parser.parse_args(argv)
    end = time.monotonic() + 60 * options.minutes
    need_device()
    output = options.output
    data = unpack(options.data, output)
    (output / "results").mkdir(exist_ok=True)
    journal = output / "results" / "parts.log"

    def log(line: str) -> None:
        say(line)
        with journal.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%FT%TZ', time.gmtime())} {line} on {device_name()}\n")

    remaining = stages(data, output)
    code = part(remaining, end - time.monotonic(), log)
    archive = collect(output)
    left = [stage.name for stage in remaining if not stage.done()]
    say(f"wrote {archive}, {archive.stat().st_size / 1e3:,.0f} kB; left: {', '.join(left) or 'nothing'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
