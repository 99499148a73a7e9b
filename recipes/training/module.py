"""The LightningModule: forward, loss, optimiser; no step of it waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from transformers import PreTrainedModel

from recipes.data.rows import twin_targets
from recipes.training.loss import chunked_cross_entropy
from recipes.training.optimizer import build_optimizer
from recipes.training.schedule import ScheduleSettings
from recipes.training.settings import OptimizerSettings
from sinkmodel.checkpoint import Recipe
from sinkmodel.models import head_of

NEVER = torch.iinfo(torch.int64).max


class SinkLanguageModel(LightningModule):
    """A transformers decoder trained on rows of `recipes.data.rows`.

    Args:
        model: the decoder, in fp32.
        sinks: tokens in front of every row.
        recipe: what a checkpoint of step n says about itself; called at every save.
        head_chunk: places whose logits exist at a time.
        compile_model: compile the decoder's body in place, so that names in checkpoints stay as they are.
    """

    first_bad_step: torch.Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        sinks: int,
        optimizer: OptimizerSettings,
        schedule: ScheduleSettings,
        recipe: Callable[[int], Recipe],
        head_chunk: int = 1024,
        compile_model: bool = False,
    ):
        super().__init__()
        self.model = model
        self.sinks, self.recipe, self.head_chunk = sinks, recipe, head_chunk
        self.optimizer_settings, self.schedule = optimizer, schedule
        if compile_model:
            self.model.base_model.compile()
        # Of the latest micro-batch and step, on the device, read only when a line is logged.
        self.loss: torch.Tensor | None = None
        self.twin_loss: torch.Tensor | None = None
        self.grad_norm: torch.Tensor | None = None
        self.register_buffer("first_bad_step", torch.tensor(NEVER), persistent=False)

    def losses(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean nll over all targets of [B, T] rows, with gradients, and over those a twin shares, without."""
        inputs_BT, targets_BT = batch
        hidden_BTD = self.model.base_model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        loss, nll_N = chunked_cross_entropy(
            hidden_BTD.flatten(0, 1), head_of(self.model).weight, targets_BT.flatten(), self.head_chunk
        )
        shared = twin_targets(targets_BT.shape[1], self.sinks)
        return loss, nll_N.view_as(targets_BT)[:, shared].mean()

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss, twin_loss = self.losses(batch)
        self.loss, self.twin_loss = loss.detach(), twin_loss.detach()
        return loss

    def configure_optimizers(self):
        optimizer = build_optimizer(self.model, self.optimizer_settings)
        peak = self.optimizer_settings.lr
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.lr(step, peak) / peak)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip to the settings' norm, keep the norm for the log, note the first step that is not finite."""
        limit = self.optimizer_settings.clip or float("inf")
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).detach()
        assert self.loss is not None
        finite = torch.isfinite(self.grad_norm) & torch.isfinite(self.loss)
        step = torch.full_like(self.first_bad_step, self.trainer.global_step + 1)
        never = torch.full_like(self.first_bad_step, NEVER)
        self.first_bad_step = torch.minimum(self.first_bad_step, torch.where(finite, never, step))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.recipe(self.trainer.global_step).to_dict()


@torch.no_grad()
def sink_share(model: PreTrainedModel, inputs_T: torch.Tensor, sinks: int, places: int = 64) -> torch.Tensor:
    """Share of attention that goes to the sinks, or to the first token where there is none; a scalar on the device.

    Mean over layers, heads and the queries behind the sinks, of one row cut to `places` tokens (T = 64 as in Gu et al.,
    arXiv 2410.10781). Eager attention, on the side: the training step keeps its fast kernel and its compiled graph.
    """
    first = max(1, sinks)
    fast = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        # .forward, not (): a body compiled in place would be compiled once more
        maps = model.base_model.forward(input_ids=inputs_T[None, :places], use_cache=False, output_attentions=True)
    finally:
        model.set_attn_implementation(fast)
    shares = [attention[0, :, first:, :first].sum(-1).mean() for attention in maps.attentions]
    return torch.stack(shares).mean()
