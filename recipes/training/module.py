"""The LightningModule: forward, loss, optimiser. None of its steps waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from recipes.data.rows import twin_targets
from recipes.training.callbacks.steps import at_step_boundary
from recipes.training.loss import LossHead
from recipes.training.optimizer import build_optimizer
from recipes.training.processes.strategies import zero_stage
from recipes.training.schedule import ScheduleSettings
from recipes.training.settings import OptimizerSettings
from sinkmodel.bases import SinkEmbedding
from sinkmodel.checkpoint import Recipe
from sinkmodel.models import head_of
from sinkmodel.products import TORCH, fast_products
from sinkmodel.sink_metric import measure_sink


class SinkLanguageModel(LightningModule):
    """A transformers decoder trained on rows of `recipes.data.rows`.

    Args:
        model: the decoder, in fp32.
        sinks: number of tokens in front of every row.
        recipe: returns what a checkpoint of step n records about itself; called at every save.
        head_chunk: number of positions whose logits exist at a time.
        compile_model: compile the loss, and the decoder's body in place, which keeps the names in checkpoints.
        embedding: the embedding of a frozen model, which holds the trained rows; see `bases.freeze`. None trains all.
        moments: AdamW's initial state by parameter number; None starts without one.
        products: the library for large fp32 matrix products on a CPU, `torch` or `onednn`; see `sinkmodel.products`.
            Compiled parts do not use it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sinks: int,
        optimizer: OptimizerSettings,
        schedule: ScheduleSettings,
        recipe: Callable[[int], Recipe],
        head_chunk: int = 1024,
        compile_model: bool = False,
        products: str = TORCH,
        embedding: SinkEmbedding | None = None,
        moments: dict[int, dict[str, torch.Tensor]] | None = None,
    ):
        super().__init__()
        self.model = model
        self.sinks, self.recipe, self.moments = sinks, recipe, moments
        self.frozen = embedding is not None
        self.strict_loading = not self.frozen  # a checkpoint of a frozen model lacks what is frozen
        # A tied head uses the trained rows too.
        self.tied = [embedding] if embedding is not None and head_of(model).weight is embedding.weight else []
        self.optimizer_settings, self.schedule = optimizer, schedule
        model.set_output_embeddings(LossHead(head_of(model), head_chunk, compile_model))
        if compile_model:
            self.model.base_model.compile()
        self.products, self.body_products = products, TORCH if compile_model else products
        # On the device: the two losses of the latest micro-batch, [2], and the latest gradient norm before clipping.
        self.losses: torch.Tensor | None = None
        self.grad_norm: torch.Tensor | None = None

    def configure_model(self) -> None:
        """For FSDP2, shard each layer and then the rest of this module. Other strategies have no device mesh."""
        mesh = self.device_mesh
        if mesh is None or hasattr(self, "unshard"):
            return
        half = self.trainer.precision == "bf16-mixed"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
        for layer in self.model.base_model.layers:
            fully_shard(layer, mesh=mesh["data_parallel"], mp_policy=policy)
        fully_shard(self, mesh=mesh["data_parallel"], mp_policy=policy)

    def forward(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean nll of [B, T] rows: over all targets, with gradients; over the targets that a twin shares, without."""
        with fast_products(self.body_products):
            hidden_BTD = self.model.base_model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        rows: dict[str, Any] = {}
        if self.tied:
            rows = {"rows_SD": self.tied[0].sink_rows, "first_row": self.tied[0].first}
        with fast_products(self.products):
            loss, nll_N = head_of(self.model)(hidden_BTD.flatten(0, 1), targets_BT.flatten(), **rows)
        shared = twin_targets(targets_BT.shape[1], self.sinks)
        return loss, nll_N.view_as(targets_BT)[:, shared].mean()

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss, twin_loss = self(*batch)
        self.losses = torch.stack([loss.detach(), twin_loss])
        return loss

    def on_train_start(self) -> None:
        """Load the moments of another run; with DDP, do a warm-up pass whose gradients are discarded.

        After its first backward pass DDP rebuilds its buckets. That changes the order in which the gradients of three
        or more ranks are summed. Without the warm-up, the first step of a resumed run would differ from the original.
        """
        if self.moments is not None and self.trainer.global_step == 0:
            own = self.trainer.strategy.optimizer_state(self.trainer.optimizers[0])
            saved = {"state": self.moments, "param_groups": own.get("param_groups", [])}
            self.trainer.strategy.load_optimizer_state_dict({"optimizer_states": [saved]})
        self.moments = None  # the optimiser has them now; free this copy
        model = self.trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            return
        inputs_T, targets_T = self.trainer.datamodule.samples[0]
        rows = self.trainer.datamodule.plan.micro_rows  # the shape that a compiled body is compiled for
        batch = [row.to(self.device).expand(rows, -1) for row in (inputs_T, targets_T)]
        with self.trainer.precision_plugin.forward_context():
            model(*batch)[0].backward()
        model.zero_grad()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate. It depends on the step alone, so that no state of it needs to be saved."""
        self.step_ends = at_step_boundary(self.trainer, batch_idx)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.schedule.lr(self.trainer.global_step, self.optimizer_settings.peak)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.model, self.optimizer_settings)
        # DeepSpeed replaces the parameters in these groups by flat pieces.
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the gradient to the settings' norm, and keep the norm for the log. ZeRO does both by itself.

        If DeepSpeed does the accumulation, Lightning calls this for every micro-batch.
        """
        if self.step_ends and not zero_stage(self.trainer):
            limit = self.optimizer_settings.clip or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).detach()
            self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Recount Lightning's micro-batches: how many a step has depends on the number of processes."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            surplus = counts["processed"] - done
            counts.update({name: count - surplus for name, count in counts.items()})
        progress["is_last_batch"] = False  # if a finished run is made longer, more batches follow

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.recipe(self.trainer.global_step).to_dict()
        if self.frozen:
            trained = self.trained()
            checkpoint["state_dict"] = {k: value for k, value in checkpoint["state_dict"].items() if k in trained}

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by their names in a checkpoint."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def measure_sink(self, inputs_T: torch.Tensor) -> torch.Tensor:
        """`sinkmodel.sink_metric.measure_sink` of this model on one row.

        It is a forward pass of its own, so that the training step keeps its fast kernel and compiled graph. All ranks
        must call it: if weights are sharded, each layer is gathered.
        """
        if not hasattr(self, "unshard"):
            return measure_sink(self.model, inputs_T[None], self.sinks)
        self.unshard()  # FSDP2: the weights outside the layers are gathered in this module's forward, not called here
        try:
            return measure_sink(self.model, inputs_T[None], self.sinks)
        finally:
            self.reshard()
