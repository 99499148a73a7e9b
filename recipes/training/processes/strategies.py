"""The strategies by which several processes share a run. All of them read and write the same kind of checkpoint.

With every strategy, a checkpoint is one file with the whole weights in fp32 under their own names, and the whole
optimiser state, numbered as in `parameter_groups`. It is gathered from the ranks to be saved, and split again when it
is loaded. So a run can resume under another strategy or with another number of ranks, and `sink-export` reads every
checkpoint. If neither changes, a resume is exact to the bit. Rank 0 needs 12 bytes of memory per parameter for it: 2 GB
at 160M.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.distributed_c10d import _set_pg_timeout

from recipes.training.processes.ranks import World, longest_wait
from recipes.training.settings import TrainingSettings
from sinkmodel.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


def resolve_strategy(settings: TrainingSettings, world: World) -> str:
    """The strategy's name; `auto` becomes `one` (a single process) or `ddp`. UserError for one that cannot work."""
    if settings.strategy == "deepspeed_stage_0" and settings.precision == "bf16":
        raise UserError(
            "training.strategy deepspeed_stage_0 is for fp32: in bf16 DeepSpeed cannot accumulate gradients in fp32 "
            "at that stage; take ddp, which shares the work in the same way"
        )
    if settings.strategy != "auto":
        return settings.strategy
    return "one" if world.size == 1 else "ddp"


def build_strategy(name: str, world: World, settings: TrainingSettings, clip: float) -> Strategy | str:
    """The Lightning strategy of that name; for `one`, Lightning's own choice."""
    timeout = longest_wait(settings.timeout)
    if name == "one":
        return "auto"
    if name == "ddp":
        # The buffers never change, so they need not be broadcast at every forward.
        return DDPStrategy(forward_sync_buffers=False, gradient_as_bucket_view=True, timeout=timeout)
    if name == "fsdp2":
        return FullySharded(world, timeout)
    return build_deepspeed(int(name[-1]), settings, clip, timeout)


def zero_stage(trainer: Trainer) -> int:
    """DeepSpeed's ZeRO stage; 0 at its stage 0 and for all other strategies."""
    return getattr(trainer.strategy, "zero_stage", 0)


class FullySharded(ModelParallelStrategy):
    """FSDP2: weights, gradients and moments are sharded. The module shards itself in `configure_model`."""

    def __init__(self, world: World, timeout: timedelta):
        super().__init__(world.size, 1, save_distributed_checkpoint=False, timeout=timeout)

    lightning_restore_optimizer = True

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if not optimizer.state:  # torch's helper would run a dummy step to create the state
            numbers = itertools.count()
            groups = [{**own, "params": [next(numbers) for _ in own["params"]]} for own in optimizer.param_groups]
            return {"state": {}, "param_groups": groups}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        by_name: Any = get_optimizer_state_dict(self.model, optimizer, options=options)
        if self.global_rank > 0:
            return {}
        names = list(chain.from_iterable(group["params"] for group in by_name["param_groups"]))
        order = {name: number for number, name in enumerate(names)}
        groups = [{**group, "params": [order[name] for name in group["params"]]} for group in by_name["param_groups"]]
        return {"state": {order[name]: state for name, state in by_name["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        saved = checkpoint["optimizer_states"][0]
        if not saved["state"]:
            return
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = [[names[p] for p in group["params"]] for group in self.optimizers[0].param_groups]
        flat = list(chain.from_iterable(groups))
        by_name: Any = {
            "state": {flat[number]: dict(state) for number, state in saved["state"].items()},
            "param_groups": [{**group, "params": own} for group, own in zip(saved["param_groups"], groups)],
        }
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self.optimizers[0], by_name, options=options)


def build_deepspeed(stage: int, settings: TrainingSettings, clip: float, timeout: timedelta) -> WholeDeepSpeed:
    """DeepSpeed's ZeRO at `stage`, with gradients accumulated in fp32."""
    if settings.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.runtime.bf16_optimizer

    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None  # it always prints
    if settings.device == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce for a minute; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_rows,
        "gradient_clipping": clip if stage > 0 else 0.0,  # at stage 0 the module clips
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # the default is the weights' type
    }
    if stage > 0:
        # Without overlap the order of summation does not depend on timing.
        config["zero_optimization"] = {"stage": stage, "overlap_comm": settings.device != "cpu"}
    strategy = CPUDeepSpeed if settings.device == "cpu" else WholeDeepSpeed
    return strategy(config=config, timeout=timeout)


class WholeDeepSpeed(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy with whole checkpoints, instead of a folder of shards for one number of ranks."""

    lightning_restore_optimizer = True

    def _initialize_deepspeed_train(self, model: torch.nn.Module) -> None:
        """Restore the fp32 weights: the engine copies the module's only after rounding them to bf16."""
        from deepspeed.utils import groups

        initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        super()._initialize_deepspeed_train(model)
        # DeepSpeed reduces gradients in a process group of its own, which has torch's default timeout.
        _set_pg_timeout(self._timeout, groups._clone_world_group())
        if self.precision_plugin.precision == "bf16-mixed":
            self._set_weights(initial)

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Lightning has already divided the loss by the accumulation; do not let the engine divide it again."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def save_checkpoint(self, checkpoint: dict, filepath: Any, storage_options: Any = None) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights in fp32 on rank 0, empty on the others; all ranks must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        return self._whole(
            (name, functools.partial(torch.Tensor.detach if self.zero_stage == 0 else safe_get_full_fp32_param, p))
            for name, p in self.lightning_module.named_parameters(remove_duplicate=False)
            if p.requires_grad
        )

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The state in the form of a single process's `AdamW.state_dict`; the moments are on rank 0 only."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.zero_stage == 0:
            return self._adamw.state_dict()
        groups = self.lightning_module.groups
        step = next((state["step"] for state in self._adamw.state.values() if "step" in state), None)
        states: dict[int, Any] = {}
        if step is not None:  # AdamW has no state before its first step
            self._link_moments()
            for number, parameter in enumerate(chain.from_iterable(groups)):
                states[number] = {"step": step} | self._whole(
                    (key, functools.partial(safe_get_full_optimizer_state, parameter, key)) for key in MOMENTS
                )
        numbers = iter(range(sum(map(len, groups))))
        own = self._adamw.param_groups
        whole = [{**fields, "params": [next(numbers) for _ in group]} for fields, group in zip(own, groups)]
        return {"state": states, "param_groups": whole}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._set_weights(checkpoint["state_dict"])

    def _set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set both copies that a rank has of each parameter: the model's and the optimiser's in fp32."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self.lightning_module.named_parameters():
            if not parameter.requires_grad:  # frozen: the base's weights stay
                continue
            value = weights[name].to(self.root_device, torch.float32)
            if self.zero_stage == 3:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(value)
            else:
                parameter.data.copy_(value)
            if self.zero_stage > 0:
                safe_set_full_fp32_param(parameter, value)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        saved = checkpoint["optimizer_states"][0]
        if self.zero_stage == 0:
            self._adamw.load_state_dict(saved)
            return
        if not saved["state"]:
            return
        if self.zero_stage == 3:  # it fills the groups during a step only
            pieces = self.deepspeed_engine.optimizer.fp32_partitioned_groups_flat
        else:
            pieces = [piece for group in self._adamw.param_groups for piece in group["params"]]
        for piece in pieces:
            step = saved["state"][0]["step"].to(piece.device, copy=True)
            self._adamw.state[piece] = {"step": step, **{key: torch.zeros_like(piece) for key in MOMENTS}}
        self._link_moments()
        for number, parameter in enumerate(chain.from_iterable(self.lightning_module.groups)):
            for key in MOMENTS:
                value = saved["state"][number][key].to(self.root_device)
                safe_set_full_optimizer_state(parameter, value, key)

    def _link_moments(self) -> None:
        """Link each parameter to its moments in the flat tensors of stages 1 and 2, for `safe_*_optimizer_state`.

        DeepSpeed does it only once, after the step of the first parameter group, when the second has no moments yet.
        """
        if self.zero_stage < 3:
            self.deepspeed_engine.optimizer._hp_optimizer_states_linked = False
            self.deepspeed_engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def zero_stage(self) -> int:
        return self.config.get("zero_optimization", {}).get("stage", 0)

    @property
    def _adamw(self) -> torch.optim.AdamW:
        """Our optimiser; DeepSpeed has replaced its parameters by flat pieces of them."""
        return self.deepspeed_engine.basic_optimizer

    def _whole(self, items: Iterable[tuple[str, Callable[[], torch.Tensor]]]) -> dict[str, torch.Tensor]:
        """All ranks gather the tensors, one after the other; rank 0 keeps them on the CPU."""
        kept = {}
        for name, gather in items:
            value = gather()
            if self.is_global_zero:
                kept[name] = value.to("cpu", torch.float32, copy=True)
        return kept


class CPUDeepSpeed(WholeDeepSpeed):
    """The same engine on CPU processes, for rehearsals. Lightning's strategy accepts only CUDA, in three places."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed asks for an index

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()
