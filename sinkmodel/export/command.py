"""`sink-export`: convert a training checkpoint for other programs."""

from __future__ import annotations

import shutil
from pathlib import Path

from sinkmodel.checks import choices_of
from sinkmodel.choices import Dtype
from sinkmodel.console import command, say
from sinkmodel.errors import UserError, shell
from sinkmodel.files import atomic_folder
from sinkmodel.imports import slow_imports
from sinkmodel.parser import OneLineParser, path_of

FORMATS = ("transformers", "gguf", "row", "custom_generate")
SUFFIXES = {"gguf": ".gguf", "row": ".safetensors"}  # of the formats that are one file
EXAMPLE = """Examples:
  sink-export --checkpoint runs/sink --output models/sink
  sink-export --checkpoint runs/sink --output models/sink.gguf --format gguf
  sink-export --checkpoint runs/row --output models/row.safetensors --format row
  sink-export --output models/streaming --format custom_generate"""
DESCRIPTION = """Convert a training checkpoint for other programs:
  transformers     a model folder for AutoModelForCausalLM and AutoTokenizer
  gguf             one file for llama.cpp
  row              for a run that trained the row of its sink (and norms): only these, a few kB, and its base's name
or, without a checkpoint, write
  custom_generate  a folder for the Hub with which model.generate(custom_generate=…) streams any model"""


@command("sink-export")
def main(argv: list[str]) -> None:
    parser = OneLineParser(prog="sink-export", description=DESCRIPTION, epilog=EXAMPLE)
    parser.add_argument("--checkpoint", type=path_of, help="a run folder or a checkpoint file")
    parser.add_argument("--output", type=path_of, required=True, help="the folder or file to write; must not exist yet")
    parser.add_argument("--format", choices=FORMATS, default="transformers", help="(default: transformers)")
    parser.add_argument("--step", type=int, help="for a run folder: the checkpoint of this step (default: the newest)")
    parser.add_argument(
        "--dtype", choices=choices_of(Dtype), default="float32", help="dtype of the weights (default: float32)"
    )
    options = parser.parse_args(argv)
    for form, suffix in SUFFIXES.items():
        if (options.output.suffix == suffix) != (options.format == form):
            raise UserError(
                f"--output is {options.output}: it must end in {suffix} with --format {form}, and only then"
            )
    if (options.checkpoint is None) != (options.format == "custom_generate"):
        parser.error("give the --checkpoint to export; only --format custom_generate takes none, since it has no model")
    if options.format == "custom_generate":
        folder = export_streaming_code(options.output)
        say(f"wrote {folder}; put it on the Hub with: {shell('hf', 'upload', 'ORG/NAME', folder)}")
    elif options.format == "gguf":
        with slow_imports():
            from sinkmodel.export.gguf_file import export_gguf

        file = export_gguf(options.checkpoint, options.output, options.dtype, options.step)
        say(f"wrote {file}; load it with llama.cpp, or with any program based on it")
    elif options.format == "row":
        with slow_imports():
            from sinkmodel.export.row import export_row

        file = export_row(options.checkpoint, options.output, options.dtype, options.step)
        say(f"wrote {file}; give it to sink-eval and sink-stream as --model; they find its base by name")
    else:
        with slow_imports():
            from transformers import AutoConfig

            from sinkmodel.export.folder import export
        from sinkmodel.sinks import IN_SOFTMAX, kind_of

        folder = export(options.checkpoint, options.output, options.dtype, options.step)
        ours = kind_of(AutoConfig.from_pretrained(folder)) in IN_SOFTMAX
        first = "import sinkmodel.architectures, then " * ours
        say(f"wrote {folder}; {first}load it with AutoModelForCausalLM.from_pretrained({str(folder)!r})")


# ------------------------------------------------------------------------------------------------------ custom_generate

CODE = Path(__file__).with_name("custom_generate.py")
CARD = """---
library_name: transformers
license: apache-2.0
tags:
- custom_generate
---

# Endless text, for any model with rotary positions

Attention sinks and a window of recent keys ([StreamingLLM](https://arxiv.org/abs/2309.17453)), constant cost per token:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
prompt = tokenizer("In the beginning", return_tensors="pt")
ids = model.generate(
    **prompt, custom_generate=THIS_REPOSITORY, trust_remote_code=True, budget=1024, sinks=1, max_new_tokens=5000
)
```

`budget` is the number of keys that each token sees, its own included; `sinks` of them are the first tokens of the text.
A model that was pre-trained with sink tokens needs just these, and its config states their number. Other models need up
to 4. The result equals that of feeding the text token by token, also for long prompts and left-padded batches. Greedy
search and sampling are supported, beams are not. Models whose keys cannot be turned exactly are refused.

The only file is `custom_generate/generate.py`. It needs only torch and transformers (4.57 or 5).
"""


def export_streaming_code(output: Path) -> Path:
    """Write a Hub repository with which `generate` streams any model: `custom_generate/generate.py` and a card.

    It must be a repository of its own. Inside a model's repository, transformers 4.57 takes the file for that model's
    way to generate. From a local folder it runs the code unasked. From the Hub it refuses the model to everyone who
    does not trust its code.

    The folder `output` is written atomically. Raises UserError if it is occupied.
    """
    with atomic_folder(output) as folder:
        (folder / "custom_generate").mkdir()
        shutil.copyfile(CODE, folder / "custom_generate" / "generate.py")
        (folder / "README.md").write_text(CARD, encoding="utf-8")
    return output
