"""The processes of one run: how many there are, which one this is, and how they agree before and between steps."""

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

# What gloo and NCCL say where a rank has gone, if not by the type of the error.
LOST = re.compile(r"closed by peer|Connection re(set|fused)|Broken pipe|[Tt]imed out|no longer|Socket closed|NCCL")


@dataclass(frozen=True)
class World:
    """
    Args:
        rank: this process, from 0, of `size` in all.
        local_rank: this process among the `local_size` of its node.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def nodes(self) -> int:
        return self.size // self.local_size


def find_world() -> World:
    """What `torchrun`, our own launcher, or `srun` say in the environment; a world of one where nobody does.

    `srun` speaks its own words; they are put into torch's as well, for what reads those (Lightning, DeepSpeed).
    """
    said = os.environ
    if int(said.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in said:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        said.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(said["SLURM_STEP_NODELIST"]))
        said.setdefault("MASTER_PORT", str(15000 + int(said["SLURM_JOB_ID"]) % 10000))
        said["RANK"], said["LOCAL_RANK"] = said["SLURM_PROCID"], said["SLURM_LOCALID"]
        said["WORLD_SIZE"], said["GROUP_RANK"] = said["SLURM_STEP_NUM_TASKS"], said["SLURM_NODEID"]
        said["LOCAL_WORLD_SIZE"] = str(_tasks_per_node(said["SLURM_STEP_TASKS_PER_NODE"]))
    if "RANK" not in said or "WORLD_SIZE" not in said:
        return World()
    size, local = int(said["WORLD_SIZE"]), int(said.get("LOCAL_WORLD_SIZE", said["WORLD_SIZE"]))
    return World(int(said["RANK"]), size, int(said.get("LOCAL_RANK", said["RANK"])), local)


def _tasks_per_node(said: str) -> int:
    """`4(x2)` -> 4. Raises UserError where nodes have unequal numbers."""
    counts = {int(part) for part in re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", said)}
    if len(counts) != 1:
        raise UserError(f"srun has put {said} tasks on the nodes; give --ntasks-per-node, so that all have as many")
    return counts.pop()


def longest_wait(timeout: float) -> timedelta:
    """Of one collective, where a step has `timeout` seconds: the watchdog comes first, as it can say more."""
    return timedelta(seconds=timeout + 60)


def join(world: World, timeout: float, device: str) -> None:
    """Meet the other processes. A collective that waits a minute longer than `timeout` seconds ends the process."""
    if dist.is_initialized():
        return
    on_gpu = device != "cpu" and world.local_rank < torch.cuda.device_count()  # one too many is told so by `run`
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
            f"rank {world.rank} of {world.size} on {socket.gethostname()} did not meet the others at {where} within "
            f"{timeout:.0f} s ({str(error).splitlines()[0]}); see whether all of them started, and MASTER_ADDR",
            exit_code=1,
            heard=True,
        ) from None


def leave(code: int) -> None:
    """End this rank's process with `code`: the interpreter's own end aborts or hangs where another rank has gone."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":  # a file that is being written
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def agree_on_start(failure: UserError | None, timeout: float, device: str) -> None:
    """Meet the others, and end with them where one has a config that cannot be read."""
    join(find_world(), timeout, device)

    def raise_it() -> None:
        if failure is not None:
            raise failure

    agree(raise_it)


def agree(action: Callable[[], T]) -> T:
    """Do `action` on every rank; where it fails on one, all stop, with one message, from rank 0."""
    if not is_one_of_several():
        return action()
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = (str(error), error.exit_code)
    except OSError as error:  # a folder that one may not write to …
        failure = (str(error), 2)
    failures = from_all(failure and (*failure, socket.gethostname()))
    failed = [(rank, *what) for rank, what in enumerate(failures) if what]
    if failed:
        rank, message, code, host = failed[0]
        raise UserError(message if rank == 0 else f"rank {rank} on {host}: {message}", exit_code=code)
    return result  # type: ignore[return-value]


def from_first(action: Callable[[], T]) -> T:
    """Do `action` on rank 0 alone; all get its result, or stop with its UserError."""
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
    """Raises UserError, on all ranks, naming the first key whose value is not the same on all of them."""
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
    """Mean over the ranks, where `values` lives; nothing waits for the device. A value that is not finite stays so."""
    if is_one_of_several():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


@contextlib.contextmanager
def others_may_be_lost() -> Iterator[None]:
    """Another rank's end reaches this one as an error of the network, in the middle of some collective: say so."""
    try:
        yield
    except RuntimeError as error:
        if "NCCL" in str(error):
            traceback.print_exc()  # it has more to say than that somebody is gone
        if not is_one_of_several() or not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        late = "; or they need longer than training.timeout, as for checksums of large data (data.verify)"
        raise UserError(
            f"rank {dist.get_rank()} on {socket.gethostname()} has lost the others ({first}); what ended them stands "
            f"above or in their own log{late if 'imed out' in first else ''}; go on with the same command",
            exit_code=1,
            heard=True,
        ) from None


def from_all(what: Any) -> list[Any]:
    """What every rank has given, in the order of the ranks."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    with others_may_be_lost():
        dist.all_gather_object(everywhere, what)
    return everywhere


def is_one_of_several() -> bool:
    """Whether this process has met others, with which it agrees."""
    return dist.is_initialized() and dist.get_world_size() > 1
