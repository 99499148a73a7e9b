"""Guards: a model with a sink in its softmax is the plain model with one key more, trained or decoding, and says so."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from recipes.training.optimizer import build_optimizer, parameter_groups
from recipes.training.settings import OptimizerSettings
from sinkmodel.attention import CAUSAL
from sinkmodel.errors import UserError
from sinkmodel.models import build_model
from sinkmodel.shapes import ModelShape
from sinkmodel.sinks import SINK_ATTENTION, SinkConfig, kind_of
from sinkmodel.softmax_sinks import architectures
from sinkmodel.softmax_sinks.architectures import SinkGPTNeoXConfig, SinkLlamaConfig, attentions_of
from tests.models import IN_SOFTMAX, build, cast, model_of, tokens

SHAPES = {
    "gpt_neox": ModelShape(layers=2, hidden=32, heads=4, kv_heads=4, ffn=64, positions=64),
    "llama": ModelShape("llama", layers=2, hidden=32, heads=4, kv_heads=2, ffn=64, positions=64, rotary_pct=1.0),
}
PLAIN = {"gpt_neox": GPTNeoXForCausalLM, "llama": LlamaForCausalLM}
WRITTEN = "written_out"
LENGTHS = (20, 7, 13)  # of the rows of a batch


def one_key_more(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eager attention with a key in front, word by word; additive mask, or causal without one."""
    kind, (B, H, T, D) = kind_of(module.config), query.shape
    key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    front = torch.zeros(H, 1, D, dtype=query.dtype)
    if kind == "kv_bias":
        front = module.sink.repeat_interleave(H // len(module.sink), dim=0)[:, None].to(query.dtype)
    if kind != "none":
        key = torch.cat([front.expand(B, H, 1, D), key], dim=2)
        value = torch.cat([torch.zeros_like(value[:, :, :1]), value], dim=2)
    scores = query @ key.transpose(-1, -2) * scaling
    if kind == "logit":
        scores = torch.cat([module.sink[None, :, None, None].expand(B, H, T, 1).to(query.dtype), scores[..., 1:]], -1)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1) if attention_mask is None else attention_mask < -1
    hidden = torch.cat([torch.zeros_like(hidden[..., :1]), hidden], dim=-1) if kind != "none" else hidden
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register(WRITTEN, one_key_more)
AttentionMaskInterface.register(WRITTEN, eager_mask)


@pytest.fixture(autouse=True)
def written_is_known(monkeypatch):
    monkeypatch.setattr(architectures, "ATTENTIONS", (*architectures.ATTENTIONS, WRITTEN))


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """On the left, numbered as `generate` does."""
    longest = max(map(len, rows))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {
        "input_ids": torch.tensor([[9] * (longest - len(row)) + row for row in rows]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def fields(config) -> dict:
    """All keys of a config, except the path that it was read from and the name of its class."""
    return {key: x for key, x in config.to_dict().items() if key not in ("_name_or_path", "architectures")}


# ------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("path", ["training", "default", "padded"])
@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_logits_and_all_gradients_are_those_of_attention_written_out(family, path):
    model = build(family).double()  # weights; scores of the sink stay in fp32
    rows = [tokens(length if path == "padded" else 20, seed=length) for length in LENGTHS]
    inputs = padded(rows) if path == "padded" else {"input_ids": torch.tensor(rows)}
    real = inputs.get("attention_mask", torch.ones(3, 20)).bool()
    logits, gradients = {}, {}
    for name in (WRITTEN, CAUSAL if path == "training" else "sdpa"):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits[name] = model(**inputs, use_cache=False).logits[real]
        logits[name].logsumexp(-1).square().mean().backward()
        gradients[name] = {key: p.grad.clone() for key, p in model.named_parameters()}
    (theirs, ours), (wanted, got) = logits.values(), gradients.values()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert ours.std() > 0.1
    for key, gradient in wanted.items():
        assert (got[key] - gradient).abs().max() < 1e-5 * max(1, gradient.abs().max().item()), key
    learned = [key for key in wanted if key.endswith(".sink")]
    assert len(learned) == (0 if family.endswith("zero") else model.config.num_hidden_layers)
    assert all(wanted[key].abs().max() > 1e-3 for key in learned), "the comparison compares something"


@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_pads_are_no_sinks(family):
    """A row of a padded batch has the logits that it has alone; the sink comes on top, once."""
    model, rows = model_of(family), [tokens(length, seed=length) for length in LENGTHS]
    with torch.no_grad():
        batch = model(**padded(rows)).logits
        for row, logits in zip(rows, batch):
            torch.testing.assert_close(logits[-len(row) :], model(torch.tensor([row])).logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_generate_with_a_cache_is_decoding_without(family):
    model, rows = model_of(family), [tokens(length, seed=length) for length in LENGTHS]
    batch = padded(rows)
    del batch["position_ids"]  # which generate makes
    made = model.generate(**batch, past_key_values=DynamicCache(), do_sample=False, max_new_tokens=12)[:, 20:]
    for row, new in zip(rows, made.tolist()):
        ids = list(row)
        for token in new:
            with torch.no_grad():
                assert int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_a_cache_fed_in_pieces_gives_the_same_logits(family):
    """Guards T < K: a piece after a cache sees all of it, and its own past."""
    model, ids, cache = model_of(family), tokens(30), DynamicCache()
    with torch.no_grad():
        whole = model(torch.tensor([ids])).logits[0]
        pieces = [
            model(torch.tensor([ids[a:b]]), past_key_values=cache).logits[0] for a, b in ((0, 9), (9, 10), (10, 30))
        ]
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", [CAUSAL, "sdpa"])
@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_mixed_precision_is_the_same_model_rounded(family, implementation):
    """Guards bf16 training: under autocast queries come in fp32 and values in bf16."""
    model, ids = build(family, initializer_range=0.1), torch.tensor([tokens(20)])
    model.set_attn_implementation(implementation)
    exact = model(ids, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids, use_cache=False).logits
    half.float().logsumexp(-1).sum().backward()
    assert (half - exact).abs().max() < 0.03 * exact.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_in_bf16_it_is_the_same_model_rounded(family):
    exact, half = build(family, initializer_range=0.1), cast(build(family, initializer_range=0.1), torch.bfloat16)
    ids = torch.tensor([tokens(20)])
    with torch.no_grad():
        assert (half(ids).logits - exact(ids).logits).abs().max() < 0.05 * exact(ids).logits.abs().max()


# ----------------------------------------------------------------------------------------------------- twins


def twin(architecture: str, kind: str, seed: int = 5):
    return build_model(SHAPES[architecture], 384, seed, SinkConfig(kind))


@pytest.mark.parametrize("architecture", SHAPES)
def test_twins_of_all_kinds_start_with_equal_weights_and_the_kinds_as_one_function(architecture):
    models = {kind: twin(architecture, kind) for kind in ("none", "token", "zero", "logit", "kv_bias")}
    plain, ids = models["none"].state_dict(), torch.tensor([tokens(20)])
    heads, groups, size = 4, SHAPES[architecture].kv_heads, 8
    shapes = {"none": [], "token": [], "zero": [], "logit": [(heads,)] * 2, "kv_bias": [(groups, size)] * 2}
    for kind, model in models.items():
        weights = model.state_dict()
        own = {name: weights.pop(name) for name in list(weights) if name.endswith(".sink")}
        assert weights.keys() == plain.keys()
        assert all(torch.equal(weights[name], plain[name]) for name in plain), kind
        assert [tuple(sink.shape) for sink in own.values()] == shapes[kind]
        assert not any(sink.any() for sink in own.values())
        assert model.config.model_type == {0: architecture}.get(
            kind in ("zero", "logit", "kv_bias"), f"sink_{architecture}"
        )
    with torch.no_grad():
        logits = {kind: model(ids).logits for kind, model in models.items()}
    torch.testing.assert_close(logits["logit"], logits["zero"], atol=1e-6, rtol=0)
    torch.testing.assert_close(logits["kv_bias"], logits["zero"], atol=1e-6, rtol=0)
    assert torch.equal(logits["none"], logits["token"])
    assert (logits["zero"] - logits["none"]).abs().max() > 1e-3, "the sink takes its share"


@pytest.mark.parametrize("architecture", SHAPES)
def test_a_sink_is_not_decayed_and_everything_else_is_as_in_its_twin(architecture):
    for kind in ("none", "zero", "logit", "kv_bias"):
        model = twin(architecture, kind)
        decayed, free = ({id(p) for p in group["params"]} for group in parameter_groups(model, 0.1))
        assert len(decayed) + len(free) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            is_vector = "norm" in name or name.endswith(("bias", ".sink"))
            assert (id(parameter) in free) == is_vector, name


@pytest.mark.parametrize("family", [family for family in IN_SOFTMAX if not family.endswith("zero")])
def test_a_sink_learns(family):
    """From zeros: its gradient is not nothing, in any layer or head, and the optimizer has it."""
    architecture, kind = family.split("-")
    model = twin(architecture, kind)
    model.set_attn_implementation(CAUSAL)
    optimizer = build_optimizer(model, OptimizerSettings(lr=1e-2))
    ids = torch.tensor([tokens(20, seed=seed) for seed in range(3)])
    model(ids, labels=ids, use_cache=False).loss.backward()
    sinks = [module.sink for module in attentions_of(model)]
    assert all((sink.grad.reshape(len(sink), -1).abs().amax(-1) > 0).all() for sink in sinks)
    optimizer.step()
    assert all((sink.reshape(len(sink), -1).abs().amax(-1) > 1e-3).all() for sink in sinks)


# ------------------------------------------------------------------------------ never without the sink, unnoticed


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa", {"": "sdpa"}]
)
def test_attention_that_knows_of_no_sink_is_refused(name, tmp_path):
    model = build("llama-zero")
    with pytest.raises(UserError, match="would drop the sink"):
        model.set_attn_implementation(name)
    with pytest.raises(UserError, match="would drop the sink"):
        model.config._attn_implementation = name
    assert model.config._attn_implementation == SINK_ATTENTION
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="would drop the sink"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_what_transformers_chooses_by_itself_has_the_sink(family, name):
    model, ids = build(family), torch.tensor([tokens(20)])
    with torch.no_grad():
        expected = model(ids).logits
        for part in (model, model.base_model):  # the body alone is transformers' own class
            part.set_attn_implementation(name)
            assert model.config._attn_implementation == SINK_ATTENTION
            assert torch.equal(model(ids).logits, expected)
        model.set_attn_implementation(CAUSAL)
        model.base_model.config._attn_implementation = name
        assert model.config._attn_implementation == SINK_ATTENTION


@pytest.mark.parametrize("kind", ["none", "token"])
def test_a_config_without_such_a_sink_makes_no_such_model(kind):
    with pytest.raises(UserError, match="has a sink of kind zero, logit, kv_bias, not"):
        build("llama-zero", sink={"kind": kind, "count": 1, "token_ids": [3]})
    with pytest.raises(UserError, match="not 'none'"):
        AutoModelForCausalLM.from_config(SinkLlamaConfig())


@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_saved_it_is_refused_by_the_plain_class_of_its_architecture(family, tmp_path):
    model = build(family)
    for place in ("first", "second"):  # a folder that was loaded and saved again too
        model.save_pretrained(tmp_path / place)
        for plain in (GPTNeoXForCausalLM, LlamaForCausalLM, AutoModel):
            with pytest.raises(Exception, match=r"has a sink in its softmax|Unrecognized configuration class"):
                plain.from_pretrained(tmp_path / place)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / place)
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    assert written["model_type"] == model.config.model_type
    assert isinstance(written["hidden_size"], str)
    assert written == json.loads((tmp_path / "first" / "config.json").read_text())


@pytest.mark.parametrize("family", IN_SOFTMAX)
@pytest.mark.parametrize("way", ["saved", "saved in bf16", "pickled", "copied"])
def test_a_copy_is_the_same_model(family, way, tmp_path):
    model, ids = build(family), torch.tensor([tokens(20)])
    if way == "saved in bf16":
        cast(model, torch.bfloat16)
    if way.startswith("saved"):
        model.save_pretrained(tmp_path)
        other, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
        assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    else:
        other = pickle.loads(pickle.dumps(model)) if way == "pickled" else copy.deepcopy(model)
    assert type(other) is type(model)
    assert {p.dtype for p in other.parameters()} == {p.dtype for p in model.parameters()}
    assert (kind_of(other.config), other.config._attn_implementation) == (kind_of(model.config), SINK_ATTENTION)
    assert fields(other.config) == fields(model.config)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("config_class", [SinkGPTNeoXConfig, SinkLlamaConfig])
def test_a_config_comes_back_from_its_file_with_defaults_or_without(config_class, tmp_path):
    """Guards sizes that are the architecture's own defaults, which a diff might leave out."""
    for changes in ({}, {"hidden_size": 48, "num_attention_heads": 3}):
        config = config_class(**changes, sink={"kind": "logit", "count": 0, "token_ids": []})
        config.save_pretrained(tmp_path)
        for read in (AutoConfig.from_pretrained(tmp_path), config_class.from_pretrained(tmp_path)):
            assert fields(read) == fields(config)
        changed = AutoConfig.from_pretrained(tmp_path, hidden_size=96)
        assert changed.hidden_size == 96
        assert "has a sink in its softmax" in repr(config)
