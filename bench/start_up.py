"""The CPU time of a command's imports, as a ratio to the same imports with the garbage collector on.

    python -m bench.start_up [--rounds 7]

Each import is a process, and the sides take turns. What `sink-pretrain` imports before its first step is compared, and
what a command imports that loads a model. Lightning alone is measured beside them: torchmetrics imports scipy and
matplotlib where these are installed, and transformers imports scipy, accelerate and dynamo. No setting of theirs
prevents that.
"""

from __future__ import annotations

import argparse
import sys

from bench.peers.gate import pin
from bench.peers.turns import Block, compared, cpu_seconds, run, take_turns

WITHOUT = """
from sinkmodel.imports import slow_imports
with slow_imports():
    import {module}
"""
MODULES = {"recipes.training.run": "sink-pretrain", "sinkmodel.loading": "loading a model"}
LIGHTNING = "import lightning.pytorch"


def side(program: str) -> Block:
    return lambda: run([sys.executable, "-c", program])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="processes of each side; five or more have an interval")
    options = parser.parse_args(argv)
    pin()
    sides = {"Lightning": side(LIGHTNING)}
    for module in MODULES:
        sides |= {f"{module}, on": side(f"import {module}"), f"{module}, off": side(WITHOUT.format(module=module))}
    spent = take_turns(sides, options.rounds)
    for module, command in MODULES.items():
        on, off = spent[f"{module}, on"], spent[f"{module}, off"]
        print(
            f"start-up: the imports of {command} ({cpu_seconds(off):.2f} s of CPU time) are {compared(off, on)} as "
            f"with the garbage collector on ({cpu_seconds(on):.2f} s)"
        )
    print(f"start-up: importing Lightning alone, collector on: {cpu_seconds(spent['Lightning']):.2f} s of CPU time")


if __name__ == "__main__":
    main()
