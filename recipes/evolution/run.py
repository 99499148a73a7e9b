"""One evolution from config to exit code: checks, the run folder, evolving or resuming."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.config import flatten
from recipes.evolution.folder import (
    BEST,
    LAST,
    State,
    check_folder,
    check_same_inputs,
    mend_result,
    read_state,
    write_folder,
)
from recipes.evolution.host import Host
from recipes.evolution.journal import Journal, build_loggers, described
from recipes.evolution.loop import evolve as run_generations
from recipes.evolution.optimizer import Evolution
from recipes.evolution.prompts import Prompts, check_length, read_prompts
from recipes.evolution.settings import EvolveConfig, Score
from recipes.evolution.trial import Trial, Validation, begin
from recipes.training.callbacks.preemption import requeue
from recipes.training.logs.build import refuse_what_is_not_installed
from recipes.training.processes import signals
from recipes.training.processes.ranks import (
    World,
    agree,
    find_world,
    from_first,
    join,
    others_may_be_lost,
    refuse_unequal,
)
from recipes.training.run_folder import git_commit
from sinkmodel.bases import weights_fingerprint
from sinkmodel.console import say
from sinkmodel.errors import UserError, shell
from sinkmodel.loading import LoadedModel, load_model
from sinkmodel.locks import locked
from sinkmodel.memories.namm import NAMMConfig
from sinkmodel.models import count_parameters
from sinkmodel.names import find_model
from sinkmodel.products import TORCH, fast_products
from sinkmodel.scoring import check_decoder
from sinkmodel.secrets import all_redacted

LARGE = 1_000_000_000  # parameters; for models of this size and larger the default score is `match`


@fast_products(TORCH)  # a resumed run, and every process, computes the same bits
def evolve(config: EvolveConfig) -> int:
    """Evolve a memory, or resume. Every process of the run calls this.

    Returns the exit code: 0 when complete, 128 + signal number when a signal stopped it. Raises UserError, on all ranks
    and before anything is written, if config, model, texts and run folder do not fit each other.
    """
    world = find_world()
    namm = agree(lambda: _check(config, world))
    if world.size > 1:
        join(world, config.compute.timeout, config.compute.device)
    run = Path(config.output)
    if config.compute.threads:
        torch.set_num_threads(config.compute.threads)
    prompts = agree(lambda: read_prompts(config))
    loaded = agree(lambda: _load(config, world))
    config = _settle(config, loaded)
    prompts = replace(prompts, config=config)
    agree(lambda: check_length(config, loaded))
    fingerprint = weights_fingerprint(loaded.model)
    _refuse_unequal_ranks(config, prompts, fingerprint)
    from_first(lambda: check_folder(run, config))
    state = from_first(lambda: read_state(run, config) or begin(config, loaded, prompts, namm, fingerprint))
    with contextlib.ExitStack() as held:
        from_first(lambda: held.enter_context(locked(run)))
        state = from_first(lambda: read_state(run, config) or state)
        from_first(lambda: check_same_inputs(run, state, fingerprint, prompts.files, config))
        from_first(lambda: write_folder(run, config, state))
        namm = namm.replace(
            mean=state.mean,
            variance=state.variance,
            evolved_on=provenance_of(config, loaded, fingerprint, prompts),
            seeds=(config.seed,),
            commit=git_commit(),
        )
        done, signal = _evolve(run, config, world, loaded, prompts, namm, state)
    if signal and done < config.generations:
        say(f"stopped after generation {done} of {config.generations}, saved; resume with the same command, or with:")
        say(f"  {shell('sink-evolve', '--config', run / 'config.yaml')}")
        if signal in signals.REQUEUES:
            from_first(requeue)  # the others wait: if one exits, srun kills the rest, and their scontrol
        return 128 + signal
    best = state.best
    if best is not None:  # on the first process
        say(
            f"evolved {done} generations; validation {best.fitness:.4f} and {best.kept:.0%} kept at generation "
            f"{best.generation}: {run / BEST}; the last mean: {run / LAST}"
        )
    return 0


def _evolve(
    run: Path,
    config: EvolveConfig,
    world: World,
    loaded: LoadedModel,
    prompts: Prompts,
    namm: NAMMConfig,
    state: State,
) -> tuple[int, int]:
    """Run the remaining generations. Returns the number of complete ones, and the signal that stopped the run or 0."""
    host = Host(loaded, namm, config.fitness.score == "match")
    trial = Trial(config, host, prompts, world)
    evolution = Evolution(namm.parameters, config.population, config.cma, config.seed)

    def opened() -> Journal | None:
        if world.rank > 0:
            return None
        _replay(run, evolution, namm, state)
        validation = Validation(config, host, prompts, state)
        loggers = build_loggers(run, config, namm.evolved_on, len(state.fitness))
        return Journal(run, config, state, evolution, loggers, validation, namm)

    journal = agree(opened)
    _introduce(run, config, world, loaded, state)
    status = "failed"
    signals.training = True

    def after(done: int, values: np.ndarray) -> None:
        assert journal is not None
        journal.note(done, values, trial.tasks, trial.tokens)

    try:
        with others_may_be_lost():
            found = run_generations(evolution, trial, len(state.fitness), config.generations, after)
        status = "success"
        return found
    finally:
        if journal is not None:
            journal.close(status)


# ----------------------------------------------------------------------------------------------- before a generation


def _check(config: EvolveConfig, world: World) -> NAMMConfig:
    """The memory's config without statistics. Raises UserErrors that can be found before the model is loaded."""
    if config.compute.device == "cuda" and not torch.cuda.is_available():
        raise UserError("compute.device is cuda, but torch sees no GPU; choose auto or cpu")
    if config.compute.processes not in (None, world.local_size):
        raise UserError(
            f"compute.processes is {config.compute.processes}, but {world.local_size} processes were started on each "
            "node; leave it out, or start as many"
        )
    refuse_what_is_not_installed(config.logging)
    try:
        return NAMMConfig(**asdict(config.namm))
    except UserError as error:
        raise UserError(f"namm: {error}") from None


def _load(config: EvolveConfig, world: World) -> LoadedModel:
    device: str = config.compute.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{world.local_rank % torch.cuda.device_count()}"
    loaded = load_model(config.model, config.compute.dtype, device)
    check_decoder(loaded.model, cached=True)
    return loaded


def _settle(config: EvolveConfig, loaded: LoadedModel) -> EvolveConfig:
    """The config with the score decided, as the run folder records it: a resume then computes the same."""
    if config.fitness.score is not None:
        return config
    kind: Score = "likelihood" if count_parameters(loaded.model)[0] < LARGE else "match"
    return replace(config, fitness=replace(config.fitness, score=kind))


def _refuse_unequal_ranks(config: EvolveConfig, prompts: Prompts, fingerprint: str) -> None:
    of_a_node = ("model", "text", "validation_text", "compute.threads")
    refuse_unequal(
        {
            **{key: value for key, value in flatten(config).items() if key not in of_a_node},
            "the fingerprint of the model": fingerprint,
            "the checksums of the texts": prompts.files,
            "the version of torch": torch.__version__,
        },
        "start all of them with the same command, the same files and the same environment",
    )


def _replay(run: Path, evolution: Evolution, namm: NAMMConfig, state: State) -> None:
    """Bring the optimiser to the state where the run stopped, and repair the artefacts."""
    best = state.best
    for generation, fitness in enumerate(state.fitness, 1):
        evolution.replay([fitness])
        for name, validated in ((BEST, best), (LAST, state.validated[-1] if state.validated else None)):
            if validated is not None and validated.generation == generation:
                mend_result(run, name, described(namm, validated), evolution.mean)
    if state.fitness and evolution.digest != state.digest:
        say(f"{run}: this machine's results differ from the previous machine's in the last bits; the run continues")


# ------------------------------------------------------------------------------------------- provenance and log lines


def provenance_of(config: EvolveConfig, loaded: LoadedModel, fingerprint: str, prompts: Prompts) -> dict[str, Any]:
    """The record of the evolution that the artefact holds."""
    names = {option: [path.name for path in getattr(config, f"{option}s")] for option in prompts.files}
    return all_redacted(
        {
            "host": {
                "name": loaded.name if find_model(loaded.name)[0] == "hub" else Path(loaded.name).name,
                "type": loaded.model.config.model_type,
                "parameters": count_parameters(loaded.model)[0],
                "fingerprint": fingerprint,
            },
            "tasks": asdict(config.tasks),
            "texts": {option: dict(zip(names[option], digests)) for option, digests in prompts.files.items()},
            "fitness": asdict(config.fitness),
            "cma": {**asdict(config.cma), "population": config.population},
            "versions": {name: version(name) for name in ("sinkmodel", "torch", "transformers", "cmaes")},
        }
    )


def _introduce(run: Path, config: EvolveConfig, world: World, loaded: LoadedModel, state: State) -> None:
    tasks = config.tasks
    say(f"{run}: {loaded.name}, {count_parameters(loaded.model)[0]:,} parameters; fitness by {config.fitness.score}")
    for name in tasks.names:
        full = state.full[name]
        say(f"{name}: the full cache scores {sum(full) / len(full):.3f} on {len(full)} validation prompts")
    groups = -(-config.population // config.compute.candidates)
    say(
        f"{config.generations} generations of {config.population} candidates × {tasks.prompts} prompts per task × "
        f"{tasks.length} tokens, in {groups} groups on {world.size} process(es)"
    )
    if world.size > groups:
        say(f"{world.size - groups} processes have nothing to do; lower compute.candidates")
    if state.fitness:
        say(f"resuming after generation {len(state.fitness)}")
