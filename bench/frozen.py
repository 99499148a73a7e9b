"""The speed of training only the sink's row, as a ratio to training all weights of the same model, and its memory.

    python -m bench.frozen [--model NAME] [--steps 8] [--rounds 3] [--sequence 256] [--rows 2]

`sink-pretrain` with `training.parts` sink and all, alternating, each in its own process with one thread. Tokens/s are
those of metrics.csv. Memory is the peak of a forward and backward pass on top of weights and optimiser state, in units
of the activations, which are what autograd saves for the backward pass of one micro-batch.
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

from bench.made_up import prepared, tokenizer
from bench.ratios import of_rounds
from sinkmodel.checkpoint import read_metrics

# Prints the bytes that autograd saves in the first step, and the peak of allocated bytes in the second step beyond
# those at its beginning: by the count of PyTorch's allocator, without memory that the C library keeps.
PROBE = """
import json, sys, torch
from torch.profiler import ProfilerActivity, profile
from recipes.training import module
from recipes.pretrain import main

found, profilers = {}, []
step, clip = module.SinkLanguageModel.training_step, module.SinkLanguageModel.configure_gradient_clipping

def watched_step(self, batch, batch_idx):
    if "activations" not in found:
        own, saved = {p.untyped_storage().data_ptr() for p in self.parameters()}, {}
        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = step(self, batch, batch_idx)
        found["activations"] = sum(saved.values())
        return loss
    if not profilers:
        profilers.append(profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__())
    return step(self, batch, batch_idx)

def watched_clip(self, *args, **kwargs):
    if profilers and "peak" not in found:
        profilers[0].__exit__(None, None, None)
        events = [e for e in profilers[0].profiler.kineto_results.events() if e.name() == "[memory]"]
        alive = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            peak = max(peak, alive)
        found["peak"] = peak
    return clip(self, *args, **kwargs)

module.SinkLanguageModel.training_step = watched_step
module.SinkLanguageModel.configure_gradient_clipping = watched_clip
code = main(sys.argv[1:])
print(json.dumps(found))
sys.exit(code)
"""


def measure(words: list[str], output: Path) -> tuple[float, dict[str, int]]:
    """Median tokens/s of the logged lines except the first two, and the output of PROBE."""
    command = [sys.executable, "-c", PROBE, *words, f"--output={output}"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    speeds = [float(row["tokens_per_second"]) for row in read_metrics(output) if row["loss"]]
    return statistics.median(speeds[2:]), json.loads(done.stdout.splitlines()[-1])


def base(folder: Path) -> tuple[Path, Path]:
    """A Llama of 29M parameters with the tokenizer of `bench.made_up`, and text in its tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "vocab_size": 8192}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=1024)).save_pretrained(folder / "base")
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend(), **special).save_pretrained(folder / "base")
    return folder / "base", prepared(folder / "data", train_words=20_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model to start from (default: a random Llama of 29M parameters)")
    parser.add_argument("--data", help="folder of sink-prepare in the model's tokens; required with --model")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name, data = (options.model, options.data) if options.model else base(Path(folder))
        words = [f"--model.start_from={name}", f"--data.path={data}", f"--data.sequence={options.sequence}"]
        words += [
            "--data.workers=0",
            "--sink.kind=token",
            "--training.head_chunk=128",
            "--training.threads=1",
            "--logging.every=1",
        ]
        words += [f"--training.batch_tokens={options.sequence * options.rows}", f"--training.micro_rows={options.rows}"]
        words += [f"--schedule.steps={options.steps}", "--validation.every=1000000", "--checkpoints.every=1000000"]
        speeds: dict[str, list[float]] = {"all": [], "sink": []}
        memory: dict[str, dict[str, int]] = {}
        for i in range(options.rounds):
            for parts, found in speeds.items():
                speed, memory[parts] = measure([*words, f"--training.parts={parts}"], Path(folder) / f"{parts}{i}")
                found.append(speed)
    print(
        f"frozen: only the sink's row {statistics.median(speeds['sink']):,.0f} tokens/s, all weights "
        f"{statistics.median(speeds['all']):,.0f}; ratio {of_rounds(speeds['sink'], speeds['all'])}"
    )
    for parts, size in memory.items():
        print(
            f"frozen: parts {parts} needs {size['peak'] / 1e6:,.0f} MB on top of the weights, "
            f"{size['peak'] / size['activations']:.2f} × the activations of {size['activations'] / 1e6:,.0f} MB"
        )


if __name__ == "__main__":
    main()
