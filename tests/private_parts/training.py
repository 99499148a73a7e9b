"""The private parts of what trains: Lightning, DeepSpeed, wandb, cmaes."""

from __future__ import annotations

import inspect

from tests.private_parts import checks
from tests.private_parts.part import PrivatePart, resolve

STRATEGIES = "recipes/training/processes/strategies.py"
TRAINER = "recipes/training/trainer.py"
ZERO_OPTIMIZERS = (
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer",
)


TRAINING = [
    PrivatePart(
        "lightning",
        "lightning.pytorch.Trainer._signal_connector",
        (TRAINER,),
        "Lightning installs no signal handlers; `recipes.training.processes.signals` does",
        patched=True,
        check=lambda: callable(checks.idle_trainer()._signal_connector.register_signal_handlers),
    ),
    PrivatePart(
        "lightning",
        "lightning.pytorch.loops._TrainingEpochLoop._broadcast_sigterm_tensor",
        (TRAINER,),
        "Lightning waits in it for the device before every micro-batch (Lightning #21487); replaced by nothing",
        patched=True,
        check=lambda: callable(checks.idle_trainer().fit_loop.epoch_loop._broadcast_sigterm_tensor),
    ),
    PrivatePart(
        "lightning",
        "lightning.pytorch.Trainer.fit_loop.epoch_loop.batch_progress",
        ("recipes/training/module.py",),
        "the counts of micro-batches in a checkpoint, changed when a run resumes on another number of processes",
        check=checks.batch_progress,
    ),
    PrivatePart(
        "lightning",
        "lightning.pytorch.plugins.io.TorchCheckpointIO.load_checkpoint",
        ("recipes/training/callbacks/checkpoints.py",),
        "overridden, with `weights_only`, which older versions do not pass",
        check=checks.takes(
            "lightning.pytorch.plugins.io.TorchCheckpointIO.load_checkpoint", "map_location", "weights_only"
        ),
    ),
    PrivatePart(
        "lightning",
        "lightning.pytorch.strategies.DeepSpeedStrategy._initialize_deepspeed_train",
        (STRATEGIES,),
        "overridden: the engine is given fp32 weights, and its process group our time-out",
        check=checks.takes("lightning.pytorch.strategies.DeepSpeedStrategy._initialize_deepspeed_train", "model"),
    ),
    PrivatePart(
        "lightning",
        "lightning.pytorch.strategies.DeepSpeedStrategy._init_deepspeed_distributed",
        (STRATEGIES,),
        "called in place of `setup_distributed`, which refuses a CPU",
    ),
    PrivatePart(
        "lightning",
        "lightning.pytorch.strategies.DeepSpeedStrategy._timeout",
        (STRATEGIES,),
        "the time-out of the strategy, for DeepSpeed's own process group",
        check=checks.sets("lightning.pytorch.strategies.DeepSpeedStrategy", "_timeout"),
    ),
    PrivatePart(
        "lightning",
        "lightning.pytorch.strategies.Strategy.lightning_restore_optimizer",
        (STRATEGIES,),
        "True lets Lightning restore the optimiser from the checkpoint, through our strategy's own method",
    ),
    PrivatePart(
        "deepspeed",
        "deepspeed.utils.groups._clone_world_group",
        (STRATEGIES,),
        "the process group that gradients travel in",
    ),
    PrivatePart(
        "deepspeed",
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
        (STRATEGIES,),
        "links each parameter to its moments at stages 1 and 2, before they are saved or loaded",
        check=lambda: all(
            callable(resolve(f"{kind}._lazy_init_hp_params_optimizer_state")) for kind in ZERO_OPTIMIZERS
        ),
    ),
    PrivatePart(
        "deepspeed",
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer._hp_optimizer_states_linked",
        (STRATEGIES,),
        "set to False, so that the links are made again: DeepSpeed makes them too early",
        check=lambda: all(checks.sets(kind, "_hp_optimizer_states_linked")() for kind in ZERO_OPTIMIZERS),
    ),
    PrivatePart(
        "deepspeed",
        "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat",
        (STRATEGIES,),
        "this rank's pieces of the parameters at stage 3, to which the moments of a checkpoint belong",
        check=checks.sets(
            "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3", "fp32_partitioned_groups_flat"
        ),
    ),
    PrivatePart(
        "deepspeed",
        "deepspeed.runtime.engine.DeepSpeedEngine.basic_optimizer",
        (STRATEGIES,),
        "our own AdamW, inside the engine",
        check=checks.sets("deepspeed.runtime.engine.DeepSpeedEngine", "basic_optimizer"),
    ),
    PrivatePart(
        "deepspeed",
        "deepspeed.runtime.zero.partition_parameters.ds_tensor",
        ("recipes/training/callbacks/health.py",),
        "a rank's piece of a parameter at stage 3",
        check=lambda: "ds_tensor" in inspect.getsource(resolve("deepspeed.runtime.zero.partition_parameters")),
    ),
    PrivatePart(
        "deepspeed",
        "deepspeed.runtime.bf16_optimizer.see_memory_usage",
        (STRATEGIES,),
        "prints memory whatever the settings; replaced by nothing",
        patched=True,
    ),
    PrivatePart(
        "deepspeed",
        "deepspeed.ops.__compatible_ops__",
        (STRATEGIES,),
        "on a CPU, `deepspeed_shm_comm` is marked as missing: compiling it takes a minute",
        patched=True,
        check=lambda: "deepspeed_shm_comm" in resolve("deepspeed.ops.__compatible_ops__"),
    ),
    PrivatePart(
        "wandb",
        "wandb.proto.wandb_internal_pb2.Record",
        ("recipes/training/logs/wandb_files.py",),
        "the steps in a `.wandb` file, so that no step is logged twice; the file's frame is LevelDB's",
        check=checks.wandb_record,
    ),
    PrivatePart(
        "cmaes",
        "cmaes.CMA._sigma",
        ("recipes/evolution/optimizer.py",),
        "the step size, for the log",
        check=checks.sigma,
    ),
]
