"""`sink-export`: convert a training checkpoint for other programs."""

from __future__ import annotations

from sinkmodel.console import command, say
from sinkmodel.errors import UserError, shell
from sinkmodel.imports import slow_imports
from sinkmodel.parser import OneLineParser, path_of

FORMATS = ("transformers", "gguf", "row", "custom_generate")
SUFFIXES = {"gguf": ".gguf", "row": ".safetensors"}  # of the formats that are one file
DTYPES = ("float32", "bfloat16", "float16")
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
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: float32)")
    options = parser.parse_args(argv)
    for form, suffix in SUFFIXES.items():
        if (options.output.suffix == suffix) != (options.format == form):
            raise UserError(
                f"--output is {options.output}: it must end in {suffix} with --format {form}, and only then"
            )
    if (options.checkpoint is None) != (options.format == "custom_generate"):
        parser.error("give the --checkpoint to export; only --format custom_generate takes none, since it has no model")
    if options.format == "custom_generate":
        from sinkmodel.export.streaming_code import export_streaming_code

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
