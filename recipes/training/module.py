"""The LightningModule: forward, loss, optimiser; no step of it waits for the device."""

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
from sinkmodel.maps import Seen, watch
from sinkmodel.models import head_of
from sinkmodel.products import TORCH, fast_products


class SinkLanguageModel(LightningModule):
    """A transformers decoder trained on rows of `recipes.data.rows`.

    Args:
        model: the decoder, in fp32.
        sinks: tokens in front of every row.
        embedding: of a frozen model, with the rows that are trained; see `bases.freeze`.
        moments: the optimiser's state to begin with, by the number of the parameter.
        recipe: what a checkpoint of step n says about itself; called at every save.
        head_chunk: places whose logits exist at a time.
        compile_model: compile the decoder's body in place, so that names in checkpoints stay as they are, and the loss.
        products: the library of large fp32 products on a CPU, `torch` or `onednn`; see `sinkmodel.products`. What is
            compiled keeps its own.
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
        # A head that is tied has the trained rows as well.
        self.tied = [embedding] if embedding is not None and head_of(model).weight is embedding.weight else []
        self.optimizer_settings, self.schedule = optimizer, schedule
        model.set_output_embeddings(LossHead(head_of(model), head_chunk, compile_model))
        if compile_model:
            self.model.base_model.compile()
        self.products, self.body_products = products, TORCH if compile_model else products
        # Of the latest micro-batch: its two losses, [2]; of the latest step: the norm before clipping. On the device.
        self.losses: torch.Tensor | None = None
        self.grad_norm: torch.Tensor | None = None

    def configure_model(self) -> None:
        """FSDP2: a layer at a time, the rest with this module. The other strategies have no device mesh."""
        mesh = self.device_mesh
        if mesh is None or hasattr(self, "unshard"):
            return
        half = self.trainer.precision == "bf16-mixed"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
        for layer in self.model.base_model.layers:
            fully_shard(layer, mesh=mesh["data_parallel"], mp_policy=policy)
        fully_shard(self, mesh=mesh["data_parallel"], mp_policy=policy)

    def forward(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean nll over all targets of [B, T] rows, with gradients, and over those a twin shares, without."""
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
        """Take over the moments of another run, and one forward and backward pass of DDP for nothing.

        Behind the first one DDP sorts its buckets anew, and with them the order in which three or more ranks are
        summed: the first step of a run that goes on would not be the step that it was.
        """
        if self.moments is not None and self.trainer.global_step == 0:
            own = self.trainer.strategy.optimizer_state(self.trainer.optimizers[0])
            saved = {"state": self.moments, "param_groups": own.get("param_groups", [])}
            self.trainer.strategy.load_optimizer_state_dict({"optimizer_states": [saved]})
        self.moments = None  # they are the optimiser's now, and need no second place
        model = self.trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            return
        inputs_T, targets_T = self.trainer.datamodule.samples[0]
        rows = self.trainer.datamodule.plan.micro_rows  # the shape that a compiled body knows
        batch = [row.to(self.device).expand(rows, -1) for row in (inputs_T, targets_T)]
        with self.trainer.precision_plugin.forward_context():
            model(*batch)[0].backward()
        model.zero_grad()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The rate is a function of the step alone: nothing of it needs to be saved."""
        self.step_ends = at_step_boundary(self.trainer, batch_idx)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.schedule.lr(self.trainer.global_step, self.optimizer_settings.peak)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.model, self.optimizer_settings)
        # DeepSpeed puts flat pieces in their place.
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip to the settings' norm, and keep the norm for the log. ZeRO does both by itself.

        Lightning comes here with every micro-batch where DeepSpeed does the accumulation.
        """
        if self.step_ends and not zero_stage(self.trainer):
            limit = self.optimizer_settings.clip or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).detach()
            self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning counts micro-batches; on other processes a step has another number of them."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            behind = counts["processed"] - done
            counts.update({name: count - behind for name, count in counts.items()})
        progress["is_last_batch"] = False  # it was the last one of a run that is now made longer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.recipe(self.trainer.global_step).to_dict()
        if self.frozen:
            trained = self.trained()
            checkpoint["state_dict"] = {k: value for k, value in checkpoint["state_dict"].items() if k in trained}

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by their names in a checkpoint."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def sink_share(self, inputs_T: torch.Tensor) -> torch.Tensor:
        """`sink_share` of this model. All ranks take part: where weights are sharded, each layer's are gathered."""
        if not hasattr(self, "unshard"):
            return sink_share(self.model, inputs_T, self.sinks)
        self.unshard()  # FSDP2: what belongs to no layer is gathered by this module's own forward, else
        try:
            return sink_share(self.model, inputs_T, self.sinks)
        finally:
            self.reshard()


PLACES = 64  # T of Gu et al.
BORN = 0.3  # ε of Gu et al.: a head with more than this has a sink


def sink_share(model: PreTrainedModel, inputs_T: torch.Tensor, sinks: int) -> torch.Tensor:
    """Share of attention that goes to the sinks, and share of heads where it is above BORN: [2], on the device.

    The sinks are the tokens in front, or the one in the softmax, or the first token of a model that has none. A head's
    share is the mean over the queries behind them of one row cut to PLACES (the sink metric of Gu et al., arXiv
    2410.10781, on one sequence). Written out on the side: the training step keeps its fast kernel and compiled graph.
    """
    first = max(1, sinks)
    shares: list[torch.Tensor] = []

    def see(seen: Seen) -> None:
        to_sink_BHT = seen.weights_BHTT[..., :first].sum(-1) if seen.sink_BHT is None else seen.sink_BHT
        shares.append(to_sink_BHT[0, :, first:].mean(-1))

    watch(model, inputs_T[None, :PLACES], see)
    share_LH = torch.stack(shares)
    return torch.stack([share_LH.mean(), (share_LH > BORN).float().mean()])
