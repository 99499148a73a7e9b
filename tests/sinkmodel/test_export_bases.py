"""Guards: a model that started from somebody else's loads in transformers 5 and 4.57 as what it is, with one sink."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sinkmodel.bases import MULTIPLE, Base, generation_of, grow
from sinkmodel.checkpoint import read_checkpoint
from sinkmodel.export import export, main
from sinkmodel.export.folder import words_of_transformers_4
from sinkmodel.loading import load_base, load_model, load_model_of
from sinkmodel.sinks import SinkConfig, is_ours
from sinkmodel.text_tokenizer import text_tokenizer_of
from sinkmodel.tokenizer import NO_BOS, chat_template_of, load_tokenizer, template_without_sinks
from tests import tiny
from tests.hub import hub, upload
from tests.models import build
from tests.plain import json_printed_by, transformers_4
from tests.sinkmodel.test_transformers_4 import PROGRAM

__all__ = ["hub"]

BASE = Base("org/base", "ab" * 32, license="mit")
PLAIN = {  # family of tests.models, and what is changed of it
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, heads wider than the model": ("llama", {"head_dim": 16}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, free rows": ("llama", {"free": 20}),
    "llama, llama3": ("llama-llama3", {}),
    "llama, yarn": ("llama-yarn", {}),
    "llama, linear": ("llama-linear", {}),
    "llama, dynamic": ("llama-dynamic", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma3": ("Gemma3Text", {"num_key_value_heads": 1, "head_dim": 12, "num_hidden_layers": 6, "sliding_window": 16}),
    "phi": ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
    "phi3": ("Phi3", {"num_key_value_heads": 2}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "olmo": ("olmo", {}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "olmo3": ("Olmo3", {"num_key_value_heads": 2, "sliding_window": 16, "num_hidden_layers": 4}),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "cohere": ("cohere", {}),
    "falcon": ("falcon", {}),
}
LLAMA_2 = tiny.llama_2_tokenizer()
CHAT = "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"


def made(place, name: str):
    """The export of a checkpoint, and the checkpoint."""
    family, changes = PLAIN[name]
    model = tiny.based(family, **changes)
    assert len(model.get_input_embeddings().weight) % MULTIPLE == 0 or "free" in changes
    file = tiny.checkpoint(place / "run", model=model, base=BASE)
    return export(file, place / "model"), file


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return {name: made(tmp_path_factory.mktemp("base"), name) for name in PLAIN}


@pytest.fixture(scope="module")
def in_4_57(exports, tmp_path_factory):
    place = tmp_path_factory.mktemp("4.57")
    version, ours, seen = json_printed_by(
        transformers_4(), PROGRAM, *(folder for folder, _ in exports.values()), place=place
    )
    assert version.startswith("4.57.")
    assert not ours
    return {name: seen[str(folder)] for name, (folder, _) in exports.items()}


@pytest.mark.parametrize("name", PLAIN)
def test_it_loads_with_equal_logits_and_generates_neither_sink_nor_unused_rows(exports, name):
    """Risk: an architecture whose config, head or rows the export does not carry over."""
    folder, file = exports[name]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not info["missing_keys"] | info["unexpected_keys"]
    trained = load_model_of(read_checkpoint(file), file)
    first, rows = tiny.tokenizer().vocabulary, trained.get_input_embeddings().num_embeddings
    batch = tokenizer("a b c d e f g h", return_tensors="pt")
    bare = tokenizer("a b c d e f g h", add_special_tokens=False).input_ids
    assert batch.input_ids[0].tolist() == [first, *bare]
    with torch.no_grad():
        ours, theirs = trained(**batch).logits, model(**batch).logits
    assert torch.equal(ours, theirs)
    assert ours.std() > 0.02
    assert model.generation_config.suppress_tokens == [1, *range(first, rows)]
    torch.manual_seed(0)
    prompt = tokenizer(["a", "a b c d"], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 30, "do_sample": True, "temperature": 9.0, "eos_token_id": None}
    new = model.generate(**prompt, **settings)[:, prompt.input_ids.shape[1] :]
    assert not set(new.flatten().tolist()) & {1, *range(first, rows)}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_4_57_computes_the_same(exports, in_4_57, name):
    """Risk: transformers 4 rotates by its own defaults, or ties what is not tied."""
    folder, _ = exports[name]
    there = in_4_57[name]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert there["missing"] == there["unexpected"] == []
    assert there["single"] == tokenizer("a b c").input_ids
    sink = tiny.tokenizer().vocabulary
    for way in ("single", "pair", "cut", "chat"):
        assert [i for i in there[way] if i == sink] == there[way][:1] == [sink], way
    assert there["suppressed"] == model.generation_config.suppress_tokens
    with torch.no_grad():
        logits = model(**tokenizer("a b c d e f g", return_tensors="pt")).logits
    assert (torch.load(f"{folder}.logits.pt", weights_only=True) - logits).abs().max() < 1e-5


def test_what_transformers_4_reads_of_rope():
    """Risk: a key of 5 that 4 does not know is left out, and it rotates by its defaults."""
    default = {"rope_type": "default", "rope_theta": 7.0}
    cases = {
        "llama": (default, {"rope_theta": 7.0}),
        "phi": ({**default, "partial_rotary_factor": 0.5}, {"rope_theta": 7.0, "partial_rotary_factor": 0.5}),
        "mistral": (
            {"rope_type": "linear", "rope_theta": 7.0, "factor": 4.0},
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        "gemma3_text": (
            {"sliding_attention": default, "full_attention": {**default, "rope_theta": 9.0}},
            {"rope_theta": 9.0, "rope_local_base_freq": 7.0},
        ),
    }
    for name, (rope, words) in cases.items():
        assert words_of_transformers_4({"model_type": name, "rope_parameters": rope}) == words
    neox = words_of_transformers_4(
        {"model_type": "gpt_neox", "rope_parameters": {**default, "partial_rotary_factor": 1}}
    )
    assert (neox["rotary_pct"], neox["rotary_emb_base"]) == (1, 7.0)


# ------------------------------------------------------------------------------------------------ tokens of the base


def of_llama_2(place, sink: SinkConfig, text=LLAMA_2, **more):
    """The export of a model whose tokenizer puts `<s>` in front."""
    model = tiny.based("llama", sink, text)
    return export(tiny.checkpoint(place / "run", sink=sink, text=text, model=model, base=BASE, **more), place / "model")


@pytest.mark.parametrize("count", [1, 2])
def test_sinks_stand_in_place_of_the_first_token_of_the_base(tmp_path, count):
    """Risk: both stand there, so that the sink is not the first, or `<s>` alone."""
    folder = of_llama_2(tmp_path, SinkConfig("token", count))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sinks = SinkConfig("token", count).ids(LLAMA_2.vocabulary)
    plain = LLAMA_2.backend().encode("the bin, é").ids
    assert plain[0] == 1, "the base's own tokenizer puts `<s>` there"
    assert tokenizer("the bin, é").input_ids == [*sinks, *plain[1:]]
    assert 1 not in tokenizer("a", "b").input_ids
    assert load_model(str(folder)).sink_ids == sinks
    assert tokenizer.decode(tokenizer("the bin, é").input_ids, skip_special_tokens=True) == "the bin, é"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert rendered.startswith("".join(SinkConfig("token", count).names) + "User")


def test_a_vanilla_continuation_keeps_the_first_token_of_the_base(tmp_path):
    """Risk: a twin that lost what its base has always seen; one that says it is ours, and is streamed without it."""
    folder = of_llama_2(tmp_path, SinkConfig(), dataclasses.replace(LLAMA_2, front=(1,)))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer("the bin").input_ids == LLAMA_2.backend().encode("the bin").ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (model.config.bos_token_id, model.generation_config.bos_token_id) == (1, 1)
    assert "sink" not in json.loads((folder / "config.json").read_text())
    assert not is_ours(model.config)
    assert load_model(str(folder)).sink_ids == [1]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<s>User: a\n"


TEMPLATES = {
    "bos in front": CHAT,
    "bos in each turn": CHAT.replace("{{ bos_token }}", "").replace("[{{", "{{ bos_token }}[{{"),
    "bos in a block": CHAT.replace("{{ bos_token }}", "{%- if messages -%}\n  {{- bos_token -}}\n{%- endif -%}"),
    "no bos": CHAT.replace("{{ bos_token }}", ""),
    "a line end in front": "\n" + CHAT,
}
TURNS = [{"role": role, "content": "a b"} for role in ("system", "user", "assistant", "user")]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_template_of_the_base_has_the_sinks_in_front_once(name, count):
    """Risk: the sink again in each turn, as Llama 2 has `<s>`; none, if the template has no bos_token."""
    template, sink = TEMPLATES[name], SinkConfig("token", count) if count else SinkConfig()
    text = dataclasses.replace(tiny.tokenizer(), chat_template=template)
    tokenizer = load_tokenizer(text, sink, 64)
    there = tokenizer.apply_chat_template(TURNS, tokenize=False)
    without = load_tokenizer(text, SinkConfig(), 64).apply_chat_template(TURNS, tokenize=False)
    assert there == "".join(sink.names) + without
    assert "[user] a b\n" in without
    assert template_without_sinks(chat_template_of(text, sink)) == template
    assert NO_BOS not in chat_template_of(text, SinkConfig())


@pytest.mark.parametrize("name", [*TEMPLATES, None])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_export_is_a_base_again_with_the_template_that_it_came_with(tmp_path, name, count):
    """Risk: a run that starts from an export of ours, and puts a second sink in front of each chat."""
    template, sink = TEMPLATES.get(name), SinkConfig("token", count) if count else SinkConfig()
    front = () if count else (1,)
    folder = of_llama_2(tmp_path, sink, dataclasses.replace(LLAMA_2, front=front, chat_template=template))
    assert text_tokenizer_of(AutoTokenizer.from_pretrained(folder)).chat_template == template


# ------------------------------------------------------------------------------------------------ generation, partial


def test_sampling_and_ends_of_the_base_stay(tmp_path):
    """Risk: an instruct model that does not stop at the end of a turn, or is drawn from in another way."""
    text = LLAMA_2.backend()
    text.add_special_tokens(["<|im_end|>"])
    text = dataclasses.replace(LLAMA_2, definition=text.to_str(), pad_id=0)
    end = text.vocabulary - 1
    generation = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "eos_token_id": [2, end, 5],
        "suppress_tokens": [9],
    }
    folder = of_llama_2(tmp_path, SinkConfig("token"), text, generation=generation)
    made = GenerationConfig.from_pretrained(folder)
    assert (made.do_sample, made.temperature, made.top_p) == (True, 0.6, 0.9)
    assert made.eos_token_id == [2, end], "5 is a byte, no special token"
    assert made.bos_token_id == text.vocabulary
    assert made.suppress_tokens == [9, 0, *range(text.vocabulary, 320)]
    (tmp_path / "again").mkdir()
    pad_ends = dataclasses.replace(text, pad_id=end)
    folder = of_llama_2(tmp_path / "again", SinkConfig("token"), pad_ends, generation=generation)
    assert end not in GenerationConfig.from_pretrained(folder).suppress_tokens, (
        "a token that ends texts may be generated"
    )
    assert end not in load_model(str(folder)).model.generation_config.suppress_tokens


def test_what_is_kept_of_a_generation_config():
    model = build("llama")
    model.generation_config = GenerationConfig(do_sample=True, top_k=3, eos_token_id=[2, 5], max_length=7)
    assert generation_of(model) == {"do_sample": True, "top_k": 3, "eos_token_id": [2, 5]}
    model.generation_config = GenerationConfig(temperature=0.6, repetition_penalty=1.1, eos_token_id=5)
    kept = {"repetition_penalty": 1.1, "eos_token_id": [5]}
    assert generation_of(model) == kept, "Llama 2 has a temperature without do_sample, which transformers does not save"
    model.generation_config = GenerationConfig.from_model_config(model.config)
    assert generation_of(model) == {"eos_token_id": [0]}
    model.config.sink = {"kind": "none", "count": 0, "token_ids": []}
    assert generation_of(model) == {}, "of a run of ours: defaults of the class"


@pytest.mark.parametrize("parts", ["sink", "sink+norms"])
def test_a_checkpoint_of_what_was_trained_becomes_a_whole_model(tmp_path, parts):
    """Risk: the base without its sink, or the sink without its base."""
    base = tiny.base_folder(tmp_path / "base", "qwen2", license="mit")
    file = tiny.partial_checkpoint(tmp_path / "run", base, parts)
    assert main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 0
    model, tokenizer = (auto.from_pretrained(tmp_path / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    before = AutoModelForCausalLM.from_pretrained(base)
    content = read_checkpoint(file)
    batch = tokenizer("a b c d e", return_tensors="pt")
    with torch.no_grad():
        ours, theirs = load_model_of(content, file)(**batch).logits, model(**batch).logits
    assert torch.equal(ours, theirs)
    sink = tiny.tokenizer().vocabulary
    row = model.get_input_embeddings().weight[sink]
    assert torch.equal(row, next(v for k, v in content["state_dict"].items() if k.endswith("sink_rows"))[0])
    same = torch.equal(before.model.norm.weight, model.model.norm.weight)
    assert same == (parts == "sink")
    assert torch.equal(before.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["parts"] == parts
    assert record["base"]["name"] == "base"
    assert str(tmp_path) not in json.dumps(record), "published with the export: no folder of the base"
    assert record["base"]["license"] == "mit"
    assert len(record["base"]["fingerprint"]) == 64


@pytest.mark.parametrize("form", ["transformers", "gguf"])
def test_a_gguf_file_as_base(tmp_path, form):
    """Risk: a config that says that its weights are quantised, in words that no checkpoint can hold."""
    model = tiny.based("llama")
    tiny.checkpoint(tmp_path / "first", sink=SinkConfig(), model=model, base=BASE)
    argv = ["--checkpoint", str(tmp_path / "first"), "--output", str(tmp_path / "base.gguf"), "--format", "gguf"]
    assert main(argv) == 0
    base = tmp_path / "base.gguf"
    config = load_model(str(base)).model.config.to_dict()
    assert "quantization_config" not in config
    tiny.partial_checkpoint(tmp_path / "run", base)
    made = tmp_path / ("model.gguf" if form == "gguf" else "model")
    assert main(["--checkpoint", str(tmp_path / "run"), "--output", str(made), "--format", form]) == 0
    trained, loaded = load_model(str(tmp_path / "run")), load_model(str(made))
    ids = trained.tokenizer("a b c d", return_tensors="pt").input_ids
    assert loaded.tokenizer("a b c d", return_tensors="pt").input_ids.tolist() == ids.tolist()
    with torch.no_grad():
        assert (trained.model(ids).logits - loaded.model(ids).logits).abs().max() < 1e-4


def test_a_run_that_started_from_nothing_says_nothing_of_a_base(tmp_path):
    folder = export(tiny.checkpoint(tmp_path / "run"), tmp_path / "model")
    assert not {"base", "parts"} & json.loads((folder / "training.json").read_text()).keys()


def test_the_row_of_the_sink_is_not_that_of_the_head(tmp_path):
    """Risk: an untied head that grew keeps random rows, so that the sink becomes likely."""
    model = build("llama", vocab_size=tiny.tokenizer().vocabulary)
    grow(model, tiny.tokenizer().vocabulary, 1)
    folder = export(tiny.checkpoint(tmp_path / "run", model=model, base=BASE), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert len(loaded.lm_head.weight) == loaded.config.vocab_size == 320
    assert torch.equal(loaded.lm_head.weight[300], loaded.lm_head.weight[319])


@pytest.mark.parametrize("stated", [None, "mit"])
def test_a_licence_is_passed_on_through_runs_of_ours(tmp_path, stated):
    """Risk: somebody else's weights are under our licence as soon as they went through two runs."""
    base = tiny.base_folder(tmp_path / "base", "qwen2", license=stated)
    tiny.partial_checkpoint(tmp_path / "run", base)
    assert load_base(str(base))[1].license == stated
    branch = load_base(str(tmp_path / "run"))[1]
    assert (branch.step, branch.license) == (7, stated or "unknown")


def test_a_licence_is_read_from_the_card_on_the_hub(tmp_path, hub):
    """Risk: the usual base has no known licence."""
    upload(hub, "org/base", tiny.base_folder(tmp_path / "base", "qwen2", license="mit"))
    upload(hub, "org/bare", tiny.base_folder(tmp_path / "bare", "qwen2"))
    assert load_base("org/base")[1].license == "mit"
    assert load_base("org/bare")[1].license is None
