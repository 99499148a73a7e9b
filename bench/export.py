"""The time and the memory that the export of a 160M model takes, as ratios to its weights.

    python -m bench.export [--folder DIR]

Pythia-160M's shape with random weights, in the form of sink-pretrain: weights and two moments in fp32, 1.9 GB, with a
checksum, which the export verifies. Each export is its own process. Its seconds, imports included, are compared with
writing the same weights by safetensors alone. Memory is the peak of resident memory (Linux) above that of the imports,
divided by the weights as they were trained (fp32). It includes pages of the checkpoint, which is mapped.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from sinkmodel.checkpoint import PREFIX, Recipe, write_manifest
from sinkmodel.files import sha256_of, sync
from sinkmodel.models import build_model
from sinkmodel.parser import path_of
from sinkmodel.shapes import ModelShape
from sinkmodel.sinks import SinkConfig
from sinkmodel.tokenizer import TextTokenizer

ROWS = 50_304
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from transformers import PreTrainedModel
import sinkmodel.export.folder, sinkmodel.export.gguf_file
from eval.measures.meters import PeakMemory, memory_now
from sinkmodel.export import main

device = torch.device("cpu")
torch.set_num_threads(1)
before, watch = memory_now(device), PeakMemory(device)
assert main(sys.argv[1:]) == 0
print(json.dumps(watch.peak() - before))
"""


def write_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    """Write `run/checkpoints/step1.ckpt` with its checksum. Returns the weights, for the baseline."""
    names = {f"t{i}": i for i in range(ROWS - 27)}  # as many ids as Pythia has
    backend = Tokenizer(models.BPE(vocab=names, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = build_model(ModelShape(), ROWS, seed=0)
    weights = model.state_dict()
    text = TextTokenizer(backend.to_str(), eos_id=0)
    recipe = Recipe(model.config.to_dict(), SinkConfig("token"), text, 1, 1, {})
    moments = {number: {"exp_avg": w.clone(), "exp_avg_sq": w.clone()} for number, w in enumerate(weights.values())}
    path = run / "checkpoints" / "step1.ckpt"
    path.parent.mkdir(parents=True)
    state = {PREFIX + name: weight for name, weight in weights.items()}
    torch.save({"state_dict": state, "recipe": recipe.to_dict(), "optimizer_states": [{"state": moments}]}, path)
    write_manifest(path.parent, path.name, sha256_of(path))
    return weights


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=path_of, help="folder to write to (default: the system's temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        weights = write_checkpoint(folder / "run")
        size = sum(weight.nbytes for weight in weights.values())
        start = time.perf_counter()
        save_file(weights, folder / "plain.safetensors")
        sync(folder / "plain.safetensors")
        alone = time.perf_counter() - start
        for form, dtype in (("transformers", "float32"), ("transformers", "bfloat16"), ("gguf", "float32")):
            output = folder / f"{form}-{dtype}{'.gguf' if form == 'gguf' else ''}"
            argv = ["--checkpoint", folder / "run", "--output", output, "--format", form, "--dtype", dtype]
            start, used = time.perf_counter(), children_seconds()
            command = [sys.executable, "-c", PROGRAM, *argv]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
            seconds, used = time.perf_counter() - start, children_seconds() - used
            grown = json.loads(done.stdout.splitlines()[-1])
            print(
                f"export: {form} in {dtype} takes {seconds:.1f} s ({used:.1f} s of a CPU), ratio {seconds / alone:.1f} "
                f"to writing the weights alone ({alone:.1f} s); memory {grown / size:.2f} x the weights "
                f"({size / 1e6:.0f} MB)",
                flush=True,
            )


if __name__ == "__main__":
    main()
