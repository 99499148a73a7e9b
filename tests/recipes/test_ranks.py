"""Guards: a process knows its place among those that were started with it, and their exit codes come through."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from recipes.training.processes.launch import launch
from recipes.training.processes.ranks import World, agree, find_world, from_first, mean, refuse_unequal
from recipes.training.run import _see_folder
from sinkmodel.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


@pytest.fixture
def launcher(monkeypatch):
    """Sets the variables of a launcher: none at first. What `find_world` writes into the environment is undone."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that monkeypatch remembers, whatever is set later
        monkeypatch.delenv(name)
    return monkeypatch


def set_variables(monkeypatch, **variables) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_alone_if_no_launcher_sets_a_variable(launcher):
    assert find_world() == World(0, 1, 0, 1)
    set_variables(launcher, SLURM_JOB_ID=7, SLURM_NTASKS=8, SLURM_PROCID=0)  # a batch script that does not use srun
    assert find_world() == World(0, 1, 0, 1)


def test_torchrun(launcher):
    set_variables(launcher, RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4)
    assert find_world() == World(5, 8, 1, 4)
    assert find_world().nodes == 2


SRUN = {
    "SLURM_JOB_ID": 4321,
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_TASKS": 8,
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": 6,
    "SLURM_LOCALID": 2,
    "SLURM_NODEID": 1,
    "SLURM_NTASKS": 8,
}


def test_the_variables_of_srun_are_set_under_torchs_names_too(launcher):
    set_variables(launcher, **SRUN)
    assert find_world() == World(6, 8, 2, 4)
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert int(os.environ["MASTER_PORT"]) > 1024
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")] == ["6", "8", "2", "1"]
    assert find_world() == World(6, 8, 2, 4), "asked once more"


def test_an_address_that_the_site_gives_is_kept(launcher):
    set_variables(launcher, **SRUN, MASTER_ADDR="10.0.0.7", MASTER_PORT="5000")
    find_world()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "5000")


def test_nodes_with_unequal_numbers_are_refused(launcher):
    set_variables(launcher, **(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}))
    with pytest.raises(UserError, match="srun has put 5,3 tasks on the nodes; give --ntasks-per-node"):
        find_world()


def test_alone_nothing_is_asked_of_others():
    assert agree(lambda: 3) == 3
    assert from_first(lambda: 4) == 4
    assert mean(torch.tensor([5.0])).item() == 5
    refuse_unequal({"a": 1}, "")
    with pytest.raises(UserError, match="as it is"):
        agree(lambda: (_ for _ in ()).throw(UserError("as it is")))


def test_a_run_folder_that_a_rank_does_not_see_is_said(tmp_path):
    """It was made on a disk of rank 0's node."""
    with pytest.raises(UserError, match="rank 0 has made .*, but this rank does not see it; put --output on a file"):
        _see_folder(tmp_path / "run", patience=0.1)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A module to launch, `say_rank`, with this body."""

    def write(body: str) -> str:
        (tmp_path / "say_rank.py").write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{body}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "say_rank"

    return write


def test_each_rank_is_told_its_place_and_the_words(program, tmp_path):
    module = program(
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')\n"
        f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join([*(os.environ[n] for n in names), *sys.argv[1:]]))"
    )
    assert launch(module, ["--a=1", "b"], 3) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [
        f"{rank} {rank} 3 3 127.0.0.1 --a=1 b" for rank in range(3)
    ]


@pytest.mark.parametrize("code", [1, 2, 143])
def test_the_exit_code_of_the_rank_that_failed_comes_through(program, code):
    assert launch(program(f"sys.exit({code} if rank == 1 else 0)"), [], 2) == code


def test_a_rank_that_was_killed_is_named_and_the_others_are_not_left_alone(program, capsys, monkeypatch):
    monkeypatch.setattr("recipes.training.processes.launch.GRACE", 0.2)
    start = time.monotonic()
    assert launch(program("time.sleep(60) if rank == 0 else os.kill(os.getpid(), 9)"), [], 2) == 137
    assert time.monotonic() - start < 20
    stderr = capsys.readouterr().err
    assert "rank 1 has failed; stopping the ranks that are still running" in stderr
    assert "rank 1 was ended by SIGKILL; resume with the same command" in stderr


def test_when_the_launcher_dies_its_ranks_do(program, tmp_path):
    module = program(f"open(f'{tmp_path}/pid{{rank}}', 'w').write(str(os.getpid())); time.sleep(60)")
    start = f"from recipes.training.processes.launch import launch; launch({module!r}, [], 2)"
    launcher = subprocess.Popen([sys.executable, "-c", start])
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.01)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    until = time.monotonic() + 10
    while any(alive(int(file.read_text())) for file in files) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(alive(int(file.read_text())) for file in files)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_signal_before_a_rank_can_note_it_waits_until_then(program, tmp_path):
    """Risk: by default the signal ends the rank, which should save and go back to the queue."""
    module = program(
        f"open(f'{tmp_path}/started{{rank}}', 'w').close(); time.sleep(0.5)\n"
        "from recipes.training.processes import signals\n"
        f"with signals.noted(): open(f'{tmp_path}/received{{rank}}', 'w').write(str(signals.received))"
    )

    def interrupt() -> None:
        while not all((tmp_path / f"started{rank}").exists() for rank in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=interrupt).start()
    assert launch(module, [], 2) == 0
    assert [(tmp_path / f"received{rank}").read_text() for rank in range(2)] == [str(int(signal.SIGUSR1))] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what_rank_1_does", "remedy"),
    [("os._exit(7)", "own log why they ended; resume"), ("time.sleep(5)", "or they need longer than training.timeout")],
)
def test_a_rank_that_is_lost_while_the_run_starts_is_reported(program, tmp_path, what_rank_1_does, remedy):
    """Risk: the others end in a traceback of gloo's, which does not state what to do."""
    module = program(
        "from recipes.training.processes import ranks\n"
        "from sinkmodel.errors import UserError\n"
        "ranks.join(ranks.find_world(), -58.0, 'cpu')\n"  # two seconds
        f"if rank == 1: {what_rank_1_does}\n"
        "try: ranks.from_first(lambda: 1)\n"
        f"except UserError as error: open('{tmp_path}/message', 'a').write(f'{{error.exit_code}} {{error}}')\n"
        "ranks.leave(0)"
    )
    launch(module, [], 2)
    message = (tmp_path / "message").read_text()
    assert message.startswith("1 rank 0 on ")
    assert "has lost the others (" in message
    assert remedy in message


@pytest.mark.slow
def test_two_ranks_agree(program, tmp_path, capfd):
    """What fails on one stops both, with one message; a loss that is not finite on one is so on both."""
    module = program(
        "import torch\n"
        "from recipes.training.processes.ranks import agree, find_world, from_first, join, leave\n"
        "from recipes.training.processes.ranks import mean, refuse_unequal\n"
        "from sinkmodel.errors import UserError\n"
        "join(find_world(), 60, 'cpu')\n"
        "def fail():\n"
        "    if rank == 1: raise UserError('no such disk')\n"
        "lines = [from_first(lambda: f'by {rank}')]\n"
        "lines.append(str(mean(torch.tensor([float(rank), 2.0])).tolist()))\n"
        "lines.append(str(mean(torch.tensor([float('nan') if rank else 1.0])).tolist()))\n"
        "for action in (fail, lambda: refuse_unequal({'lr': rank}, 'mend it'), lambda: None):\n"
        "    try: agree(action); lines.append('well')\n"
        "    except UserError as error: lines.append(str(error))\n"
        f"open(f'{tmp_path}/lines{{rank}}', 'w').write('\\n'.join(lines))\n"
        "leave(0)"
    )
    assert launch(module, [], 2) == 0
    lines = [(tmp_path / f"lines{rank}").read_text().splitlines() for rank in range(2)]
    assert lines[0] == lines[1]
    assert lines[0][:3] == ["by 0", "[0.5, 2.0]", "[nan]"]
    assert lines[0][3].startswith("rank 1 on ")
    assert lines[0][3].endswith(": no such disk")
    assert lines[0][4].startswith("the ranks disagree: lr is 0 on rank 0, 1 on rank 1 (")
    assert lines[0][5] == "well"
