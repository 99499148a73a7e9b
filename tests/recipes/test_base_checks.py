"""Guards: a base that cannot be trained, or does not fit into memory, is refused before its weights are read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5EncoderModel, T5ForConditionalGeneration

from recipes.pretrain import main
from recipes.training import base as training_base
from recipes.training import memory
from recipes.training.memory import bytes_per_parameter, parameters_of, refuse_too_little_memory
from recipes.training.processes.ranks import World
from recipes.training.settings import DataSettings, ModelSettings, PretrainConfig, TrainingSettings
from sinkmodel import loading
from sinkmodel.errors import UserError
from sinkmodel.export.row import export_row
from sinkmodel.sinks import SinkConfig
from tests import bases, tiny
from tests.hub import hub, upload
from tests.recipes.test_start_from import arguments

__all__ = ["hub"]
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
ENCODERS = {
    "Bert": (lambda: BertModel(BertConfig(vocab_size=300, **BERT)), "model type 'bert' is an encoder"),
    "Bert with a head": (lambda: BertForMaskedLM(BertConfig(vocab_size=300, **BERT)), "'bert' is an encoder"),
    "T5": (lambda: T5ForConditionalGeneration(T5Config(vocab_size=300, **T5)), "'t5' has an encoder; only decoders"),
    "half of T5": (lambda: T5EncoderModel(T5Config(vocab_size=300, **T5)), "'t5' is not a causal language model"),
}
COUNT = 1000


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return bases.save_base(tmp_path_factory.mktemp("base") / "llama")


def refused(words: list[str], run: Path, capsys, match: str) -> str:
    """The one line with which `sink-pretrain` refuses, as does its dry run."""
    for dry in ([], ["--dry-run"]):
        capsys.readouterr()
        assert main([*words, *dry]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert re.search(match, line), line
        assert not run.exists()
    return line


@pytest.fixture
def unread(monkeypatch):
    """Reading the weights of a model is an error."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(loading, "from_transformers", load)


# -------------------------------------------------------------------------------------------- what cannot be trained


@pytest.mark.parametrize("what", ENCODERS)
def test_an_encoder_is_refused_by_name(data, tmp_path, capsys, unread, what):
    """Risk: the message advises to copy a model again that is whole, and is not a decoder."""
    build, match = ENCODERS[what]
    folder = bases.save_base(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    build().save_pretrained(folder)
    line = refused(arguments(data, folder, tmp_path / "run"), tmp_path / "run", capsys, match)
    assert line.startswith(f"sink-pretrain: training cannot start from {folder}: ")
    assert line.endswith("; start from a dense decoder with RoPE, such as Llama, Mistral, Qwen3 or GPT-NeoX")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "compressed-tensors", None])
def test_quantised_weights_are_refused_by_the_config(data, base, tmp_path, capsys, unread, method):
    """Risk: the user is asked for a package, or to copy the model again, and it cannot be trained all the same."""
    folder = quantised(base, tmp_path / "base", method)
    line = refused(arguments(data, folder, tmp_path / "run"), tmp_path / "run", capsys, "its weights are quantised")
    assert line == (
        f"sink-pretrain: training cannot start from {folder}: its weights are quantised ({method or 'unknown method'}) "
        "and cannot be trained; start from the model that was quantised, in float32 or bfloat16"
    )


def test_a_quantised_model_on_the_hub_is_refused(data, base, tmp_path, capsys, unread, hub):
    upload(hub, "org/quantised", quantised(base, tmp_path / "base", "gptq"))
    refused(arguments(data, "org/quantised", tmp_path / "run"), tmp_path / "run", capsys, r"quantised \(gptq\)")
    assert not hub.asked("safetensors")


def test_what_is_not_installed_for_quantised_weights_is_no_reason_to_copy_them_again(base, tmp_path, monkeypatch):
    """Risk: other commands than training give a wrong remedy, or end in a traceback."""
    folder = quantised(base, tmp_path / "base", "bitsandbytes", load_in_4bit=True)
    with pytest.raises(UserError, match=r"bitsandbytes.*are quantised \(bitsandbytes\), so use the model") as caught:
        loading.load_model(str(folder))
    assert "copy" not in str(caught.value)
    model, tokenizer = loading.from_transformers(str(base))
    model.quantization_method = "bitsandbytes"  # as one whose package is installed
    monkeypatch.setattr(loading, "from_transformers", lambda *_, **__: (model, tokenizer))
    with pytest.raises(UserError, match="cannot be cast to float32: .*; use the model that was quantised"):
        loading.load_model(str(folder))


def quantised(base: Path, folder: Path, method: str | None, **more: object) -> Path:
    """A copy of a model folder whose config declares its weights as quantised."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"bits": 4, **more} | ({} if method is None else {"quant_method": method})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ------------------------------------------------------------------------------------------------------------ memory


def config(parts: str = "all", device: str = "cpu", strategy: str = "auto") -> PretrainConfig:
    training = TrainingSettings(parts=parts, device=device, strategy=strategy)
    return PretrainConfig(
        output="run", data=DataSettings("data"), model=ModelSettings(start_from="org/base"), training=training,
        sink=SinkConfig("token"),
    )  # fmt: skip


def check(free: int, on_gpu: int | None = None, world: World | None = None, **settings: str) -> None:
    """The check of a model of COUNT parameters, with `free` bytes of main memory and `on_gpu` bytes of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "available_memory", lambda: free)
        patch.setattr(torch.cuda, "is_available", lambda: on_gpu is not None)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (on_gpu, 10**12))
        refuse_too_little_memory(config(**settings), COUNT, world or World())


def test_a_model_for_a_cpu_needs_room_for_what_is_trained():
    check(16 * COUNT)
    with pytest.raises(UserError, match=r"to train them \(training.parts all\) takes .*or train less \(training.parts"):
        check(16 * COUNT - 1)
    check(4 * COUNT, parts="sink")
    with pytest.raises(UserError, match=r"to train them \(training.parts sink\).*larger machine$"):
        check(4 * COUNT - 1, parts="sink")


def test_a_model_for_a_gpu_needs_room_for_its_weights_here_and_for_the_rest_there():
    """Risk: a large GPU in a small machine is refused; or a job ends in an error of the GPU after it has begun."""
    for device in ("cuda", "auto"):
        check(4 * COUNT, 16 * COUNT, device=device)
        with pytest.raises(UserError, match="to load them takes"):
            check(4 * COUNT - 1, 16 * COUNT, device=device)
        with pytest.raises(UserError, match="to train them .* of memory on GPU 1 and activations on top"):
            check(4 * COUNT, 16 * COUNT - 1, World(1, 1, local_rank=1), device=device)
    check(4 * COUNT, 4 * COUNT, device="cuda", parts="sink")
    check(4 * COUNT, None, device="cuda")  # a dry run on a machine without a GPU


def test_every_process_of_a_machine_needs_room():
    """Risk: each of four processes finds enough memory for itself alone, and the kernel kills one of them."""
    two = World(0, 4, 0, 2)  # on each of two machines
    check(2 * 16 * COUNT, world=two)
    with pytest.raises(UserError, match=r"in 2 processes takes .*, or start fewer processes"):
        check(2 * 16 * COUNT - 1, world=two)
    check(0, world=World(1, 4, 1, 2))  # the first process of a machine checks for the others, before any loads
    check(2 * 4 * COUNT, 16 * COUNT, two, device="cuda")
    with pytest.raises(UserError, match="to load them in 2 processes"):
        check(2 * 4 * COUNT - 1, 16 * COUNT, two, device="cuda")


def test_what_a_strategy_shards_is_counted_once():
    """Risk: a model that fits because it is sharded is refused."""
    needed = {"ddp": 16, "deepspeed_stage_0": 16, "deepspeed_stage_1": 10, "deepspeed_stage_2": 7}
    for strategy, size in {"auto": 16, **needed, "deepspeed_stage_3": 4, "fsdp2": 4}.items():
        assert bytes_per_parameter(TrainingSettings(strategy=strategy), 4) == size
    check(16 * COUNT, 4 * COUNT, World(0, 4, 0, 4), device="cuda", strategy="fsdp2")
    with pytest.raises(UserError):  # at first each process has the whole weights
        check(4 * COUNT * 4 - 1, world=World(0, 8, 0, 4), strategy="fsdp2")


def test_a_model_on_the_hub_is_counted_before_it_is_downloaded(data, base, tmp_path, capsys, monkeypatch, hub):
    """Risk: a model that does not fit is downloaded for hours, and then the kernel kills the run."""
    count = parameters_of(str(base))
    upload(hub, "org/base", base)
    model = loading.load_model(str(base)).model
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    upload(hub, "org/shards", tmp_path / "shards")
    assert [parameters_of(name) for name in ("org/base", "org/shards", "org/nowhere")] == [count, count, None]
    monkeypatch.setattr(memory, "available_memory", lambda: 15 * count)
    words = arguments(data, "org/base", tmp_path / "run")
    refused(words, tmp_path / "run", capsys, rf"org/base has {count:,} parameters; to train .* larger machine")
    assert not list(Path(hub_cache()).rglob("*.safetensors"))


def hub_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def test_a_model_from_the_hub_is_counted_without_a_network(base, hub, monkeypatch):
    """Risk: on a node without a network a model in the cache is never checked."""
    upload(hub, "org/base", base)
    loading.load_model("org/base")
    hub.trouble(".", times=1000, status=503)
    assert parameters_of("org/base") == parameters_of(str(base))


def test_a_second_copy_of_the_weights_is_not_counted(base, tmp_path):
    """Risk: a folder as Mistral's, with the weights in two formats, is refused for twice its size."""
    folder = shutil.copytree(base, tmp_path / "base")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert parameters_of(str(folder)) == parameters_of(str(base))


def test_the_base_of_a_row_file_is_counted(base, tmp_path):
    tiny.partial_checkpoint(tmp_path / "run", base)
    row = export_row(tmp_path / "run", tmp_path / "row.safetensors")
    assert parameters_of(str(row)) == parameters_of(str(tmp_path / "run")) == parameters_of(str(base))


def test_the_dry_run_checks_for_the_processes_of_this_machine(data, base, tmp_path, capsys, monkeypatch):
    """Risk: a job of several processes a node passes its dry run, and is killed."""
    count, words = parameters_of(str(base)), arguments(data, base, tmp_path / "run", training__micro_rows=1)
    seen = []
    monkeypatch.setattr(training_base, "refuse_too_little_memory", lambda config, count, world: seen.append(world))
    for more in (["--dry-run=4"], ["--dry-run=4", "--training.devices=2"], ["--dry-run", "--training.devices=2"]):
        assert main([*words, *more]) == 0
    assert [(world.size, world.local_size) for world in seen] == [(4, 1), (4, 2), (2, 2)]
    monkeypatch.undo()
    monkeypatch.setattr(memory, "available_memory", lambda: 31 * count)
    assert main([*words, "--dry-run"]) == 0
    assert main([*words, "--dry-run", "--training.devices=2"]) == 2
    assert "in 2 processes" in capsys.readouterr().err
