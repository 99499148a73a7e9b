"""The private parts of what evaluates, reads and publishes, and the standard library."""

from __future__ import annotations

import inspect

from tests.private_parts import checks
from tests.private_parts.part import PrivatePart, resolve

TOOLS = [
    PrivatePart(
        "lm_eval",
        "lm_eval.models.huggingface.HFLM._loglikelihood_tokens",
        ("eval/measures/harness/adapter.py",),
        "overridden: every window of tokens gets the sinks in front",
        check=checks.takes(
            "lm_eval.models.huggingface.HFLM._loglikelihood_tokens", "requests", "disable_tqdm", "override_bs"
        ),
    ),
    PrivatePart(
        "lm_eval",
        "lm_eval.models.utils.normalize_gen_kwargs",
        ("eval/measures/harness/zeroshot.py",),
        "settings of generation, read as HFLM reads them",
    ),
    PrivatePart(
        "huggingface_hub",
        "huggingface_hub.utils.sha.git_hash",
        ("recipes/hub/plan.py",),
        "git's hash of a file, by which an unchanged file is not uploaded again",
        check=lambda: resolve("huggingface_hub.utils.sha.git_hash")(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391",
    ),
    PrivatePart(
        "datasets",
        "datasets.config.HF_DATASETS_CACHE",
        ("recipes/data/errors.py",),
        "the folders that an error message names",
    ),
    PrivatePart(
        "gguf",
        "gguf.GGUFReader",
        ("sinkmodel/model_files.py", "sinkmodel/gguf_reading.py"),
        "`fields` with `contents()`, and `tensors`; replaced while a file is read, so that it is parsed once",
        patched=True,
        check=lambda: (
            callable(resolve("gguf.ReaderField.contents")) and checks.sets("gguf.GGUFReader", "fields", "tensors")()
        ),
    ),
    PrivatePart(
        "gguf",
        "gguf.get_tensor_name_map",
        ("sinkmodel/gguf_reading.py",),
        "replaced while a file is read: the table of names is built once, and not for each module",
        patched=True,
        check=lambda: (
            "from gguf import MODEL_ARCH_NAMES, get_tensor_name_map"
            in inspect.getsource(resolve("transformers.modeling_gguf_pytorch_utils.get_gguf_hf_weights_map"))
        ),
    ),
    PrivatePart(
        "python",
        "argparse.ArgumentParser._actions",
        ("sinkmodel/parser.py",),
        "all options of a parser, to name a mistyped one first",
        check=checks.actions,
    ),
    PrivatePart(
        "python",
        "argparse.HelpFormatter._fill_text",
        ("recipes/config.py",),
        "overridden: line breaks in a description stay",
        check=checks.takes("argparse.HelpFormatter._fill_text", "text", "width", "indent"),
    ),
    PrivatePart(
        "python",
        "multiprocessing.resource_tracker.ensure_running",
        ("recipes/data/workers.py",),
        "starts the tracker before SIGINT is blocked: starting it would unblock the signal",
    ),
]
