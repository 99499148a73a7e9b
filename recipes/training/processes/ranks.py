"""The ranks of a run: their number, the rank of this process, and how they agree before and between steps."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sinkmodel.console import be_silent
from sinkmodel.errors import UserError

T = TypeVar("T")

# Messages of gloo and NCCL that mean that another rank has ended; the type of the error may not show it.
LOST = re.compile(r"closed by peer|Connection re(set|fused)|Broken pipe|[Tt]imed out|no longer|Socket closed|NCCL")


@dataclass(frozen=True)
class World:
    """The place of this process in the run.

    Args:
        rank: number of this process, from 0.
        size: number of processes of the run.
        local_rank: number of this process on its node, from 0.
        local_size: number of processes on each node.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def nodes(self) -> int:
        return self.size // self.local_size


def find_world() -> World:
    """Read the world from the environment that `torchrun`, our launcher or `srun` has set; without it, a world of one.

    The variables of `srun` are copied to torch's names as well, which Lightning and DeepSpeed read.
    """
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in env:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        env.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(15000 + int(env["SLURM_JOB_ID"]) % 10000))
        env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_LOCALID"]
        env["WORLD_SIZE"], env["GROUP_RANK"] = env["SLURM_STEP_NUM_TASKS"], env["SLURM_NODEID"]
        env["LOCAL_WORLD_SIZE"] = str(_tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"]))
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return World()
    size, local = int(env["WORLD_SIZE"]), int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
    return World(int(env["RANK"]), size, int(env.get("LOCAL_RANK", env["RANK"])), local)


def _tasks_per_node(tasks: str) -> int:
    """`4(x2)` -> 4. Raises UserError if nodes have unequal numbers of tasks."""
    counts = {int(part) for part in re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", tasks)}
    if len(counts) != 1:
        raise UserError(f"srun has put {tasks} tasks on the nodes; give --ntasks-per-node, so that all have as many")
    return counts.pop()


def longest_wait(timeout: float) -> timedelta:
    """Time limit of a collective: longer than the `timeout` seconds of a step, because the watchdog reports more."""
    return timedelta(seconds=timeout + 60)


def join(world: World, timeout: float, device: str) -> None:
    """Join the process group. A collective fails if it takes a minute longer than `timeout` seconds."""
    if dist.is_initialized():
        return
    on_gpu = device != "cpu" and world.local_rank < torch.cuda.device_count()  # `run` refuses more ranks than GPUs
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    limit = longest_wait(timeout)
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        return
    if world.rank > 0:
        be_silent()
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rank {world.rank} of {world.size} on {socket.gethostname()} did not reach the others at {where} within "
            f"{timeout:.0f} s ({str(error).splitlines()[0]}); check that all of them started, and MASTER_ADDR",
            exit_code=1,
            any_rank=True,
        ) from None


def leave(code: int) -> None:
    """Exit this process with `code` at once: the interpreter's shutdown aborts or hangs if another rank has ended."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":  # it is writing a file
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def agree_on_start(failure: UserError | None, timeout: float, device: str) -> None:
    """Join the process group; raise UserError on all ranks if one of them could not read its config."""
    join(find_world(), timeout, device)

    def raise_it() -> None:
        if failure is not None:
            raise failure

    agree(raise_it)


def agree(action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result. If it fails on any rank, all raise UserError."""
    if not is_one_of_several():
        return action()
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = (str(error), error.exit_code)
    except OSError as error:  # for example, no permission to write to a folder
        failure = (str(error), 2)
    failures = from_all(failure and (*failure, socket.gethostname()))
    failed = [(rank, *what) for rank, what in enumerate(failures) if what]
    if failed:
        rank, message, code, host = failed[0]
        raise UserError(message if rank == 0 else f"rank {rank} on {host}: {message}", exit_code=code)
    return result  # type: ignore[return-value]


def from_first(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only. All ranks return its result, or raise its UserError."""
    if not is_one_of_several():
        return action()
    outcome: list[Any] = [None]

    def on_first() -> None:
        if dist.get_rank() == 0:
            outcome[0] = action()

    agree(on_first)
    with others_may_be_lost():
        dist.broadcast_object_list(outcome)
    return outcome[0]


def refuse_unequal(what: dict[str, Any], remedy: str) -> None:
    """Raises UserError on all ranks, naming the first key whose value differs between them."""
    if not is_one_of_several():
        return
    everywhere = from_all((what, socket.gethostname()))
    first = everywhere[0][0]
    for rank, (theirs, host) in enumerate(everywhere):
        for key in sorted(first.keys() | theirs.keys()):
            if first.get(key) != theirs.get(key):
                raise UserError(
                    f"the ranks disagree: {key} is {first.get(key)} on rank 0, {theirs.get(key)} on rank {rank} "
                    f"({host}); {remedy}"
                )


def mean(values: torch.Tensor) -> torch.Tensor:
    """Mean of `values` over the ranks, on their device, without waiting for it. Values not finite stay so."""
    if is_one_of_several():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


@contextlib.contextmanager
def others_may_be_lost() -> Iterator[None]:
    """In the block, turn a network error into a UserError: if a rank ends, the others' collectives fail with one."""
    try:
        yield
    except RuntimeError as error:
        if "NCCL" in str(error):
            traceback.print_exc()  # it holds details beyond the lost rank
        if not is_one_of_several() or not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        late = "; or they need longer than training.timeout, for example for checksums of large data (data.verify)"
        raise UserError(
            f"rank {dist.get_rank()} on {socket.gethostname()} has lost the others ({first}); see above or in their "
            f"own log why they ended{late if 'imed out' in first else ''}; resume with the same command",
            exit_code=1,
            any_rank=True,
        ) from None


def from_all(what: Any) -> list[Any]:
    """Gather `what` from every rank, in the order of the ranks."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    with others_may_be_lost():
        dist.all_gather_object(everywhere, what)
    return everywhere


def is_one_of_several() -> bool:
    """Whether this process has joined a process group of more than one."""
    return dist.is_initialized() and dist.get_world_size() > 1
