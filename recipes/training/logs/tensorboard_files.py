"""TensorBoard: writes the curves of `metrics.csv` to `RUN/tensorboard/`, for `tensorboard --logdir runs`."""

from __future__ import annotations

from pathlib import Path

from recipes.training.logs.measured import Measured
from recipes.training.logs.mirror import Mirror

FOLDER = "tensorboard"


class TensorBoardFiles(Mirror):
    """Written again from `metrics.csv` at every start, so that the folder holds each step once.

    `purge_step` makes a running TensorBoard forget the old curves. Steps are the optimiser's. TensorBoard has no other
    axis, so `tokens` is a curve of its own.

    Args:
        config: the run's config.yaml, shown as a text.
    """

    title = "TensorBoard"
    has = -1

    def __init__(self, run: Path, config: str):
        from torch.utils.tensorboard import SummaryWriter

        super().__init__()
        self._folder, self._step = run / FOLDER, 0
        old = list(self._folder.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(self._folder, purge_step=0)
        self._writer.add_text("config", f"```yaml\n{config}\n```")
        for path in old:
            path.unlink()

    def write(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            if name != "tokens" or step != self._step:  # training and validation lines both have it
                self._writer.add_scalar(name, value, step)
        self._step = step
        self._writer.flush()

    def show(self, measured: Measured) -> None:
        """Written to a folder of its own, which later starts of the run do not remove."""
        import numpy as np
        from PIL import Image
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(self._folder / "measured") as writer:
            for result in measured.results:
                writer.add_text(result.title, result.markdown(), self._step)
            for folder in measured.maps:
                picture = np.asarray(Image.open(folder / "maps.png").convert("RGB"))
                writer.add_image(f"maps/{folder.name}", picture, self._step, dataformats="HWC")

    def close(self, status: str) -> None:
        self._writer.close()
