"""The base of the loggers for wandb and TensorBoard: copies of `metrics.csv` on which training does not depend."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.loggers import Logger

from recipes.training.logs.measured import Measured
from sinkmodel.console import say
from sinkmodel.errors import first_line


class Mirror(Logger):
    """Holds every line of `metrics.csv` once, however often the run was stopped, killed and resumed.

    A kill loses lines that were logged but not yet written. A resume logs the steps after its checkpoint again. So at
    each start a mirror gets the lines up to that checkpoint and takes those that it lacks; during training it leaves
    out those that it has. A mirror that is switched on later gets all earlier lines in the same way.

    Attributes:
        title: its name in messages.
        has: the last step whose line it had before this start.
        failed: whether it was disabled after an error.
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
        """Log the lines of metrics.csv, as `sinkmodel.checkpoint.read_metrics` returns them."""
        for line in lines:
            numbers = {name: float(text) for name, text in line.items() if text}
            self.log_metrics(numbers, int(numbers.pop("step")))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        if step > self.has:
            self.try_to(lambda: self.write(metrics, step), f"at step {step}")

    def finalize(self, status: str) -> None:
        """`status` is "success" if training was completed, or was stopped and saved."""
        self.try_to(lambda: self.close(status), "at the end")

    def try_to(self, act: Callable[[], None], when: str) -> None:
        """Call `act`. After its first failure a logger is disabled for the rest of the run; training continues."""
        if self.failed:
            return
        try:
            act()
        except Exception as error:  # a library may raise anything if the network, a disk or its process fails
            self.failed = True
            say(
                f"{self.title} failed {when} ({first_line(error)}) and is now disabled; metrics.csv has every line, "
                "and sink-log, or a resumed run, adds the missing ones"
            )

    @abstractmethod
    def write(self, metrics: dict[str, float], step: int) -> None:
        """Log one line."""

    @abstractmethod
    def show(self, measured: Measured) -> None:
        """Log what was measured of the run; errors are raised."""

    @abstractmethod
    def close(self, status: str) -> None:
        """Write what is left; nothing is logged after it."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to log: the logger got the config when it was made."""
