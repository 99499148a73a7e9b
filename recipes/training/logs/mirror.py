"""What wandb and TensorBoard have in common: each is a copy of `metrics.csv`, and training does not depend on it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.loggers import Logger

from recipes.training.logs.measured import Measured
from sinkmodel.console import say
from sinkmodel.errors import first_line


class Mirror(Logger):
    """Has every line of `metrics.csv` once, however often the run was stopped, killed and resumed.

    A kill takes what was logged and not yet written, and a resume logs again what came behind its checkpoint. So at
    the start a mirror is given the lines up to that checkpoint, takes those that it lacks, and then leaves out those
    that it has. One that is asked for in the middle of a run gets the whole of it in the same way.

    Attributes:
        title: its name in messages.
        has: the last step whose line it has from before this start.
        failed: whether it is left alone, after an error that was said.
    """

    title: str
    has: int
    failed = False

    @property
    def name(self) -> str:
        return self.title

    @property
    def version(self) -> str:
        return ""

    def catch_up(self, lines: Iterable[dict[str, str]]) -> None:
        """Take over the lines of metrics.csv, as `sinkmodel.checkpoint.read_metrics` gives them."""
        for line in lines:
            numbers = {name: float(text) for name, text in line.items() if text}
            self.log_metrics(numbers, int(numbers.pop("step")))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        if step > self.has:
            self.try_to(lambda: self.write(metrics, step), f"at step {step}")

    def finalize(self, status: str) -> None:
        """`status` is "success" where training ended by itself or was stopped, saved."""
        self.try_to(lambda: self.close(status), "at the end")

    def try_to(self, act: Callable[[], None], when: str) -> None:
        """A logger that fails once is left alone from there on: no training is lost for a picture of it."""
        if self.failed:
            return
        try:
            act()
        except Exception as error:  # of the network, a disk, another process, in the words of somebody's library
            self.failed = True
            say(
                f"{self.title} failed {when} ({first_line(error)}) and is left alone; metrics.csv has every line, and "
                "sink-log, or a resumed run, brings it level again"
            )

    @abstractmethod
    def write(self, metrics: dict[str, float], step: int) -> None:
        """Log one line."""

    @abstractmethod
    def show(self, measured: Measured) -> None:
        """Log what was measured of the run; raises what goes wrong."""

    @abstractmethod
    def close(self, status: str) -> None:
        """Write what is left; nothing is logged behind it."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The config was given at the start."""
