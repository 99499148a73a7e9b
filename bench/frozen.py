"""Training the sink's row alone, as a ratio to training all weights of the same model, and the memory that it takes.

    python -m bench.frozen [--model NAME] [--steps 8] [--rounds 3] [--sequence 256] [--rows 1]

`sink-pretrain` with `training.parts` sink and all, in turns, each in a process of its own with one thread. Tokens/s are
those of metrics.csv. Memory is the largest resident size of the process, above that of the same run before its first
step, in units of the activations: what autograd saves for the backward pass of one micro-batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from sinkmodel.checkpoint import read_metrics
from tests import tiny

# Prints the resident size before the first step, its largest value after the run, and the bytes that autograd saved.
PROBE = """
import json, sys, torch
from recipes.training import module
from recipes.pretrain import main

def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status", encoding="ascii") if line.startswith(key)) * 1024

found = {}
step = module.SinkLanguageModel.training_step
def watched(self, batch, batch_idx):
    if "before" not in found:
        found["before"] = resident("VmRSS")
        open("/proc/self/clear_refs", "w", encoding="ascii").write("5")
        own = {p.untyped_storage().data_ptr() for p in self.parameters()}
        saved = {}
        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = step(self, batch, batch_idx)
        found["activations"] = sum(saved.values())
        return loss
    return step(self, batch, batch_idx)
module.SinkLanguageModel.training_step = watched
code = main(sys.argv[1:])
found["peak"] = resident("VmHWM")
print(json.dumps(found))
sys.exit(code)
"""


def measure(words: list[str], output: Path) -> tuple[float, dict[str, int]]:
    """Median tokens/s of the logged lines but the first, and what PROBE prints."""
    command = [sys.executable, "-c", PROBE, *words, f"--output={output}"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    speeds = [float(row["tokens_per_second"]) for row in read_metrics(output) if row["loss"]]
    return statistics.median(speeds[1:]), json.loads(done.stdout.splitlines()[-1])


def base(folder: Path) -> tuple[Path, Path]:
    """A Llama of 29M parameters, with tests.tiny's tokenizer, and text in its tokens."""
    from tests.bases import save_base

    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
    sizes |= {"intermediate_size": 1536, "max_position_embeddings": 1024, "rows": 8192}
    return save_base(folder / "base", **sizes), tiny.prepared(folder / "data", train_words=20_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model to start from (default: a random Llama of 29M parameters)")
    parser.add_argument("--data", help="a folder of sink-prepare in its tokens; goes with --model")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name, data = (options.model, options.data) if options.model else base(Path(folder))
        words = [f"--model.start_from={name}", f"--data.path={data}", f"--data.sequence={options.sequence}"]
        words += ["--data.workers=0", "--sink.kind=token", "--training.threads=1", "--logging.every=1"]
        words += [f"--training.batch_tokens={options.sequence * options.rows}", f"--training.micro_rows={options.rows}"]
        words += [f"--schedule.steps={options.steps}", "--validation.every=1000000", "--checkpoints.every=1000000"]
        speeds: dict[str, list[float]] = {"all": [], "sink": []}
        memory: dict[str, dict[str, int]] = {}
        for i in range(options.rounds):
            for parts, found in speeds.items():
                speed, memory[parts] = measure([*words, f"--training.parts={parts}"], Path(folder) / f"{parts}{i}")
                found.append(speed)
    ratios = sorted(a / b for a, b in zip(speeds["sink"], speeds["all"]))
    print(
        f"frozen: the sink's row alone {statistics.median(speeds['sink']):,.0f} tokens/s, all weights "
        f"{statistics.median(speeds['all']):,.0f}; ratio {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    for parts, found in memory.items():
        more = found["peak"] - found["before"]
        print(
            f"frozen: memory of a step with parts {parts}: {more / 1e6:,.0f} MB on top of the weights, "
            f"{more / found['activations']:.2f} × the activations of {found['activations'] / 1e6:,.0f} MB"
        )


if __name__ == "__main__":
    main()
