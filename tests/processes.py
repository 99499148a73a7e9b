"""Our commands in processes of their own that need not import the packages of others: that costs 10 s of CPU each.

A server imports them once, and every process is forked from it. Each process imports our own modules itself, and
it has an environment, signals and an exit code like a program that is started as users do; so have the ranks that it
starts. What such a process shares with others is what a package of others reads from the environment when it is
imported, and Python's seed of hashes.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence

ROOMS = ("sinkmodel", "recipes", "eval", "tests")
# What a training run imports. What is missing here is only slower.
PACKAGES = [
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"),
    *("torch.nn.attention.flex_attention", "torch.utils.data", "torch.utils.tensorboard"),
    *("lightning.pytorch", "torchmetrics", "deepspeed.runtime.engine", "wandb", "datasets"),
    *("rich.progress", "jsonargparse", "docstring_parser", "torch._inductor.compile_fx", "torch.profiler"),
    *("transformers.generation.utils", "transformers.models.auto.modeling_auto", "transformers.modeling_utils"),
    *("transformers.models.gpt_neox.modeling_gpt_neox", "transformers.models.llama.modeling_llama"),
    *("safetensors.torch", "tokenizers", "huggingface_hub.hf_api"),
]
FORKS = multiprocessing.get_context("forkserver")


class Program:
    """What tests use of subprocess.Popen, for `python -m module *words` with its stderr kept, in a session of its own.

    Args:
        environment: changes to this process's.
    """

    def __init__(self, module: str, words: Sequence[str], environment: dict[str, str] | None = None):
        FORKS.set_forkserver_preload(PACKAGES)  # without effect after the first start
        self.stderr = tempfile.NamedTemporaryFile("r")  # noqa: SIM115 - the test reads it. A pipe might be full
        what = (module, list(words), {**os.environ, **(environment or {})}, os.getcwd(), self.stderr.name)
        self.process = FORKS.Process(target=_first_steps, args=what, daemon=False)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("the forked process", timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        self.wait(timeout)
        return None, self.stderr.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Rank(subprocess.Popen):
    """A `subprocess.Popen` that forks this process, if its command is a module of ours."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        if not (isinstance(args, list) and args[:2] == [sys.executable, "-m"] and args[2].partition(".")[0] in ROOMS):
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            os.setsid()
            if preexec_fn is not None:
                preexec_fn()
            _run(args[2], args[3:], env)


def _first_steps(module: str, words: list[str], environment: dict[str, str], folder: str, stderr: str) -> None:
    """In the process that was forked from the server."""
    os.setsid()
    os.chdir(folder)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    subprocess.Popen = _Rank  # type: ignore[misc]
    _run(module, words, environment)


def _run(module: str, words: Sequence[str], environment: dict[str, str]) -> None:
    """`python -m module *words`, to the end of this process."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):  # a handler of this process's earlier life
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # not if it is ignored, as in a shell's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    for name in [name for name in sys.modules if name.partition(".")[0] in ROOMS]:
        del sys.modules[name]
    sys.argv = [module, *words]
    multiprocessing.current_process().name = "MainProcess"
    multiprocessing.set_start_method(None, force=True)  # of its own processes: Python's default again
    code = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
