"""Guards: the export has the checkpoint's logits, generates no sink, is plain transformers or says that it is not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkmodel.checkpoint import read_checkpoint, weights_of, write_manifest
from sinkmodel.export import export, main
from sinkmodel.loading import load_checkpoint, load_model_of
from sinkmodel.sinks import IN_SOFTMAX, SinkConfig, sink_ids_of
from tests import tiny

PLAIN = {"vanilla": SinkConfig(), "sink": SinkConfig("token"), "two sinks": SinkConfig("token", 2)}
KINDS = {**PLAIN, **{kind: SinkConfig(kind) for kind in IN_SOFTMAX}}
LOADERS = """
import sys, transformers
for folder in sys.argv[1:]:
    for name in ("AutoModelForCausalLM", "AutoModel", "GPTNeoXForCausalLM", "LlamaForCausalLM"):
        try:
            getattr(transformers, name).from_pretrained(folder)
            print(folder, name, "LOADED")
        except Exception as error:
            print(folder, name, type(error).__name__, " ".join(str(error).split()))
"""  # it does not know our package


@pytest.fixture(params=[(a, k) for a in tiny.SHAPES for k in KINDS], ids=lambda p: f"{p[0]}, {p[1]}", scope="module")
def exported(request, tmp_path_factory):
    architecture, kind = request.param
    folder = tmp_path_factory.mktemp("export")
    checkpoint = tiny.checkpoint(folder / "run", architecture, KINDS[kind])
    assert main(["--checkpoint", str(folder / "run"), "--output", str(folder / "model")]) == 0
    return checkpoint, folder / "model", KINDS[kind]


def test_it_loads_with_equal_logits(exported):
    checkpoint, folder, sink = exported
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    trained, _, sink_ids = load_checkpoint(checkpoint)
    assert sink_ids_of(model.config) == sink_ids
    batch = tokenizer("a b c d e", return_tensors="pt")
    assert batch.input_ids[0, : sink.tokens].tolist() == sink_ids
    assert len(sink_ids) == sink.tokens
    with torch.no_grad():
        ours, theirs = trained(**batch).logits, model(**batch).logits
    assert torch.equal(ours, theirs)
    assert ours.std() > 0.1, "logits of nothing would be equal too"


@pytest.mark.parametrize("kind", ["token", "logit"])
def test_who_loads_it_as_the_last_line_says_has_the_model(kind, tmp_path, capsys):
    tiny.checkpoint(tmp_path / "run", sink=SinkConfig(kind))
    main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "model")])
    first, _, last = capsys.readouterr().err.strip().partition("; ")[2].rpartition("load it with ")
    imports = first.removesuffix(", then ") or "pass"
    program = f"from transformers import AutoModelForCausalLM; {imports}; print({last}.dtype)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "torch.float32\n", ran.stderr


def test_the_weights_are_those_of_the_file_neither_drawn_nor_copied(tmp_path):
    """Guards seconds and a second copy of the model in memory: bench.export has the numbers."""
    file = tiny.checkpoint(tmp_path / "run")
    content = read_checkpoint(file)
    before = torch.get_rng_state()
    model = load_model_of(content, file)
    assert torch.equal(torch.get_rng_state(), before)
    mapped = {weight.data_ptr() for weight in weights_of(content).values()}
    assert {weight.data_ptr() for weight in model.parameters()} <= mapped


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("kind", ["token", "logit"])
@pytest.mark.parametrize("architecture", tiny.SHAPES)
def test_the_files_are_those_of_save_pretrained(architecture, kind, tied, tmp_path, monkeypatch):
    """Risk: a new release of transformers writes other files, and ours, which are written faster, stay as they were."""
    shape = replace(tiny.SHAPES[architecture], tie_embeddings=tied)
    tiny.checkpoint(tmp_path / "run", shape, SinkConfig(kind))
    ours = export(tmp_path / "run", tmp_path / "ours", "bfloat16")
    monkeypatch.setattr("sinkmodel.export.folder.save_own", lambda model, folder: model.save_pretrained(folder))
    theirs = export(tmp_path / "run", tmp_path / "theirs", "bfloat16")
    names = {file.name for file in theirs.iterdir()}
    assert "model.safetensors" in names
    assert {file.name: file.read_bytes() for file in ours.iterdir()} == {
        name: (theirs / name).read_bytes() for name in names
    }


@pytest.mark.parametrize("output", ["model", "model.gguf"])
def test_a_checkpoint_with_another_checksum_is_not_exported(output, tmp_path, capsys):
    """Risk: the checksum is compared while the files are written, and comes too late or leaves files."""
    checkpoint = tiny.checkpoint(tmp_path / "run", "llama")
    write_manifest(checkpoint.parent, checkpoint.name, "0" * 64)
    form = "gguf" if output.endswith(".gguf") else "transformers"
    argv = ["--checkpoint", tmp_path / "run", "--output", tmp_path / "out" / output, "--format", form]
    assert main([str(word) for word in argv]) == 2
    assert "step7.ckpt is not what was written" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_generation_emits_neither_sink_nor_padding_nor_unused_ids(exported):
    _, folder, _ = exported
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    unused = list(range(tiny.tokenizer().vocabulary, model.config.vocab_size))
    assert model.generation_config.suppress_tokens == [1, *unused]
    head = model.get_output_embeddings()
    with torch.no_grad():  # make the forbidden ids the likeliest ones
        head.weight[[1, *unused]] = 0
        head.weight[[1, *unused], :] += 50 * head.weight.abs().mean()
    batch = tokenizer(["a", "a b c d"], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    new = model.generate(**batch, max_new_tokens=40, do_sample=True)[:, batch.input_ids.shape[1] :]
    assert new.shape[1] > 5
    row = new.flatten().tolist()
    assert not set(row) & set(unused)
    ended = (new == 0).int().cumsum(1).bool()  # after the end a batch is filled up with padding
    assert not ((new == 1) & ~ended).any()


@pytest.mark.parametrize("count", [1, 2])
def test_the_check_in_the_docs_sees_a_tokenizer_that_has_lost_a_sink(tmp_path, count):
    """transformers 5 drops sinks for two arguments, and nothing in the folder can prevent that: docs/runtimes.md."""
    tiny.checkpoint(tmp_path / "run", "llama", SinkConfig("token", count))
    assert main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 0
    page = (Path(__file__).parents[2] / "docs" / "runtimes.md").read_text(encoding="utf-8")
    (check,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "a sink is lost" in block)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    sinks = sink_ids_of(model.config)
    exec(check, {"model": model, "tokenizer": AutoTokenizer.from_pretrained(tmp_path / "model")})
    for bos, eos in ((None, True), (None, False), (False, None), (True, None), (True, True), (False, True)):
        options = {"add_bos_token": bos, "add_eos_token": eos}
        options = {name: value for name, value in options.items() if value is not None}
        lost = AutoTokenizer.from_pretrained(tmp_path / "model", **options)
        left = [token for token in lost("a").input_ids if token in sinks]
        assert left == (sinks[:1] if bos else []), "as the page says"
        if left == sinks:
            exec(check, {"model": model, "tokenizer": lost})
            continue
        with pytest.raises(AssertionError, match="load without add_bos_token, add_eos_token"):
            exec(check, {"model": model, "tokenizer": lost})


def test_left_padded_batch_generates_what_single_prompts_do(exported):
    _, folder, _ = exported
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = ["a", "a b c d e f"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch.input_ids.shape[1] :]
    for prompt, row in zip(prompts, together):
        one = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**one, max_new_tokens=8, do_sample=False)[0, one.input_ids.shape[1] :]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_transformers_4_finds_its_own_words_in_the_config(exported):
    _, folder, sink = exported
    config = json.loads((folder / "config.json").read_text())
    if sink.kind in IN_SOFTMAX:
        assert "rope_theta" not in config, "it shall not load there"
    else:
        assert config["rope_theta"] == 10000.0
    if config["model_type"] == "gpt_neox":
        assert (config["rotary_pct"], config["rotary_emb_base"]) == (0.25, 10000.0)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "backend" not in settings


def refusals(python: str, folders, place) -> dict[tuple[str, str], str]:
    """What an interpreter without our module says to each folder and loader; it is started once."""
    done = subprocess.run([python, "-I", "-c", LOADERS, *map(str, folders)], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert len(lines) == 4 * len(folders)
    return {(folder, loader): message for folder, loader, message in lines}


def softmax_exports(place) -> dict[str, tuple[str, str]]:
    """Folder → architecture and kind."""
    folders = {}
    for architecture in tiny.SHAPES:
        for kind in IN_SOFTMAX:
            run, folder = place / f"run-{architecture}-{kind}", place / f"{architecture}-{kind}"
            tiny.checkpoint(run, architecture, SinkConfig(kind))
            assert main(["--checkpoint", str(run), "--output", str(folder)]) == 0
            folders[str(folder)] = architecture, kind
    return folders


def test_without_our_module_nothing_loads_a_softmax_without_its_sink(tmp_path):
    """Guards the silent loss of a sink: a loader that does not know of it must fail, and say what is missing."""
    folders = softmax_exports(tmp_path)
    for (folder, loader), message in refusals(sys.executable, folders, tmp_path).items():
        assert "LOADED" not in message
        if loader.startswith("Auto"):
            assert f"`sink_{folders[folder][0]}`" in message
        else:
            assert "this model has a sink in its softmax: import sinkmodel.architectures" in message


def test_where_it_comes_from_is_written_beside_it(exported):
    checkpoint, folder, _ = exported
    record = json.loads((folder / "training.json").read_text())
    assert record["step"] == 7
    assert record["tokens"] == 7000
    assert record["checkpoint"] == checkpoint.name
    assert record["data"]["fingerprint"] == "f00d"


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys):
    checkpoint = tiny.checkpoint(tmp_path / "run")
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    whole = checkpoint.read_bytes()
    cuts = [tmp_path / f"cut{length}.ckpt" for length in (0, 100, 2000, 5000, 50_000, len(whole) - 1)]
    for path in cuts:
        path.write_bytes(whole[: int(path.stem[3:])])
    other = tmp_path / "other.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["recipe"]["model_config"]["hidden_size"] = 64
    torch.save(content, other)
    small = tmp_path / "small.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["recipe"]["model_config"]["vocab_size"] = 300
    torch.save(content, small)
    strange = tmp_path / "strange.ckpt"
    content["recipe"]["model_config"]["model_type"] = "perceptron"
    torch.save(content, strange)
    future = tmp_path / "future.ckpt"
    content["recipe"]["format"] = 99
    torch.save(content, future)
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (["--checkpoint", checkpoint, "--output", occupied], "already holds something else"),
        *((["--checkpoint", cut, "--output", tmp_path / "x"], "is not a complete checkpoint") for cut in cuts),
        (["--checkpoint", other, "--output", tmp_path / "x"], "checkpoint of another shape"),
        (["--checkpoint", small, "--output", tmp_path / "x"], "does not fit its model: 301 ids"),
        (["--checkpoint", strange, "--output", tmp_path / "x"], "a model config that transformers cannot build"),
        (["--checkpoint", future, "--output", tmp_path / "x"], "format 99, this program reads 1"),
        (["--checkpoint", checkpoint, "--step", 7, "--output", tmp_path / "x"], "is one checkpoint"),
        (["--checkpoint", checkpoint, "--output", checkpoint / "x"], "step7.ckpt is a file; choose another"),
        (["--checkpoint", empty, "--output", tmp_path / "x"], "holds no checkpoints"),
        (["--checkpoint", tmp_path / "no", "--output", tmp_path / "x"], "does not exist"),
        (["--checkpoint", tmp_path / "run", "--step", 3, "--output", tmp_path / "x"], "has no checkpoint of step 3"),
        (["--checkpiont", checkpoint, "--output", tmp_path / "x"], "did you mean --checkpoint?"),
    ]
    for argv, message in cases:
        assert main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [path.name for path in occupied.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".*")), "no half-written folder is left"


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, capsys):
    class Run:
        def __reduce__(self):
            return (print, ("code ran",))

    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "recipe": Run()}, path)
    assert main(["--checkpoint", str(path), "--output", str(tmp_path / "x")]) == 2
    assert "code ran" not in capsys.readouterr().out
