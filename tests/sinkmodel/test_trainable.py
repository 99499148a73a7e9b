"""Guards: a model that training would compute wrongly is refused by name; every model is left as it was."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.utils.quantization_config import QuantizationMethod

from sinkmodel.attention import CAUSAL
from sinkmodel.errors import UserError
from sinkmodel.trainable import check_trainable, silence_dropout
from tests.models import POSITIONS, VOCABULARY, build, cast, tokens
from tests.sinkmodel.cache.test_refusals import LINEAR, RECURRENT

SHARED = {"num_key_value_heads": 2, "head_dim": 8}
WIDE = {**SHARED, "sliding_window": POSITIONS}
NO_CAP = {"attn_logit_softcapping": None}
REFUSED = {
    "learned positions": ("GPT2", {"n_inner": 48}, "gpt2.*absolute positions"),
    "an encoder": ("Bert", {}, "bert.*encoder"),
    "an encoder as a decoder": ("Bert", {"is_decoder": True}, "bert.*RoPE"),
    "ALiBi": ("Bloom", {}, "bloom.*ALiBi"),
    "Falcon with ALiBi": ("falcon", {"alibi": True}, "falcon.*ALiBi"),
    "attention of its own": ("falcon", {}, "falcon.*AttentionInterface"),
    "ALiBi in an attention of its own": ("mpt", {}, "mpt.*AttentionInterface"),
    "a state": ("Mamba", {"state_size": 4, "expand": 1}, "mamba.*layers"),
    "a state in some layers": ("RecurrentGemma", RECURRENT, "recurrent_gemma.*layers"),
    "linear attention": ("Qwen3Next", LINEAR, "qwen3_next.*layers"),
    "scores capped": ("Gemma2", WIDE, "gemma2.*softcap"),
    "logits capped": ("Gemma2", {**WIDE, **NO_CAP}, "gemma2.*logits.*soft-capping"),
    "logits scaled": ("cohere", {"logit_scale": 0.0625}, "cohere.*logits.*scaling"),
    "logits divided": ("Granite", {**SHARED, "logits_scaling": 8.0}, "granite.*logits.*scaling"),
    "experts": ("Mixtral", {"num_key_value_heads": 2}, "mixtral.*experts"),
    "many experts": ("Qwen3Moe", {**SHARED, "num_experts": 4, "num_experts_per_tok": 2}, "qwen3_moe.*experts"),
    "a narrow window": ("mistral", {"sliding_window": 23}, "mistral.*window of 23.*rows of 24.*at most 23"),
    "several rotary frequencies": ("Olmo3", WIDE, "olmo3.*frequencies"),
}

DROPPING = {
    "gpt_neox": {"attention_dropout": 0.1, "hidden_dropout": 0.1},
    "phi": {"attention_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "stablelm": {"attention_dropout": 0.1, "hidden_dropout": 0.1},
}


def refusal(model, match: str) -> str:
    with pytest.raises(UserError, match=match) as caught:
        check_trainable(model, "org/base", sequence=24)
    message = str(caught.value)
    assert message.startswith("training cannot start from org/base: ")
    assert ";" in message, "a remedy"
    assert "\n" not in message
    return message


@pytest.mark.parametrize("case", REFUSED)
def test_what_training_would_compute_wrongly_is_refused_by_name(case):
    family, changes, message = REFUSED[case]
    model = build(family, **changes)
    ids = torch.tensor([tokens(9)])
    with torch.no_grad():
        before = model(ids).logits
        refusal(model, message)
        assert torch.equal(model(ids).logits, before), "and the model is as it was"


def test_a_window_as_wide_as_the_rows_is_not_refused():
    check_trainable(build("mistral", sliding_window=24), "org/base", sequence=24)
    check_trainable(build("mistral", sliding_window=8), "org/base", sequence=8)


def test_an_encoder_with_a_decoder_is_refused():
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2)
    refusal(transformers.T5ForConditionalGeneration(config), "t5.*encoder")


def test_a_model_without_a_linear_head_is_refused():
    model = build("llama")
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    refusal(model, "llama.*output projection")


@pytest.mark.parametrize("form", ["dict", "object"])
def test_quantised_weights_are_refused_but_not_a_gguf_that_was_read_into_whole_ones(form):
    """Risk: transformers leaves `quantization_config` on a model whose GGUF weights it has made whole."""
    for method, whole in (("bitsandbytes", False), ("gptq", False), ("gguf", True)):
        model = build("llama")
        model.config.quantization_config = (
            {"quant_method": method}
            if form == "dict"
            else SimpleNamespace(quant_method=QuantizationMethod(method), to_dict=dict)
        )
        if whole:
            check_trainable(model, "org/base")
        else:
            refusal(model, rf"quantised \({method}\)")
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), False)
    refusal(model, "quantised")


def test_damaged_weights_are_not_taken_for_another_architecture():
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(UserError, match="not finite; its weights are damaged"):
        check_trainable(model, "org/base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_body_that_depends_on_its_mask_is_refused(dtype):
    """Risk: an architecture that does more with a mask than hide keys passes, as its logits come from its own body."""
    model = cast(build("llama"), dtype)

    def hook(layer, inputs, output):
        return 1.2 * output if model.config._attn_implementation == "eager" else output

    model.model.layers[0].register_forward_hook(hook)
    refusal(model, "llama.*attention that training does not have")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("cohere", {"logit_scale": 1.01}), ("Gemma2", {**WIDE, **NO_CAP, "final_logit_softcapping": 60.0})],
)
def test_a_small_change_of_the_logits_is_seen_in_every_precision(family, changes, dtype):
    """Risk: the trial's tolerance is so wide that it sees nothing."""
    refusal(cast(build(family, **changes), dtype), "logits")


@pytest.mark.parametrize("family", ["phi", "gpt_neox", "llama-zero", "smollm3", "llama-dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa", CAUSAL])
def test_the_model_is_as_it_was(family, dtype, attention):
    """Risk: a check leaves eval mode, gradients or another attention, and training is not what its config says."""
    model = cast(build(family, **DROPPING.get(family, {})), dtype)
    model.set_attn_implementation(attention)
    model.train()
    model.base_model.layers[0].eval()
    frozen = model.get_output_embeddings().weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    implementation, config = model.config._attn_implementation, model.config.to_dict()
    state = copy.deepcopy(model.state_dict())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random, with_gradients = torch.get_rng_state(), []
    hook = model.base_model.register_forward_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    check_trainable(model, family)
    hook.remove()
    assert with_gradients
    assert not any(with_gradients), "a forward keeps its activations"
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config._attn_implementation == implementation
    assert model.config.to_dict() == config
    assert all(torch.equal(x, state[name]) and x.dtype == state[name].dtype for name, x in model.state_dict().items())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None and p.requires_grad == (p is not frozen) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


# ------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("family", DROPPING)
def test_without_dropout_training_draws_no_random_number(family):
    """Risk: a base that was trained with dropout makes a resumed run another run: no random state is saved."""
    ids = torch.tensor([tokens(20)])

    def losses(model) -> list[float]:
        return [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for _ in range(4)]

    model = build(family, **DROPPING[family]).train()
    model.set_attn_implementation(CAUSAL)
    assert len(set(losses(model))) > 1, "there is dropout"
    silence_dropout(model)
    random = torch.get_rng_state()
    trained = losses(model)
    assert len(set(trained)) == 1
    assert torch.equal(torch.get_rng_state(), random)
    assert losses(model.eval()) == trained


def test_the_dropout_of_a_config_is_silenced_and_nothing_else_is_changed():
    """Risk: a model that is built again from the saved config has its dropout back, or another shape."""
    model = build("gpt_neox", **DROPPING["gpt_neox"], classifier_dropout=0.2)
    before = model.config.to_dict()
    silence_dropout(model)
    after = model.config.to_dict()
    assert {key for key in before if before[key] != after[key]} == {"attention_dropout", "hidden_dropout"}
    assert after["attention_dropout"] == after["hidden_dropout"] == 0.0
