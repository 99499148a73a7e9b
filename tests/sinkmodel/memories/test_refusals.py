"""Guards: what a memory cannot do, or cannot do right, is one clear line before anything is written."""

from __future__ import annotations

import functools

import pytest
import torch

from sinkmodel.errors import UserError
from sinkmodel.memories import H2O, NAMM, TOVA, Dense, ExpectedAttention, GemFilter, Scored, SnapKV, make_memory
from tests.models import POSITIONS, build, model_of, tokens

PROMPT, BUDGET = 40, 12
JAMBA = {  # one layer that keeps a state, and one with attention
    "mamba_d_state": 4,
    "mamba_d_conv": 2,
    "mamba_expand": 1,
    "mamba_dt_rank": 2,
    "num_key_value_heads": 2,
    "num_experts": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}


def refused(call, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) > 30


@pytest.fixture
def llama():
    return model_of("llama")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda c: SnapKV(c), "a budget or a compression_ratio"),
        (lambda c: SnapKV(c, 64, compression_ratio=0.5), "a budget or a compression_ratio"),
        (lambda c: SnapKV(c, compression_ratio=1.0), "compression_ratio is 1.0"),
        (lambda c: SnapKV(c, 32, sinks=4), "budget of 32 does not hold 4 sinks and a window of 32"),
        (lambda c: SnapKV(c, 64, window=0), "its window is 0"),
        (lambda c: SnapKV(c, 64, kernel=4), "kernel is 4"),
        (lambda c: SnapKV(c, 64, pooling="min"), "pooling is 'min'; choose one of max, avg"),
        (lambda c: SnapKV(c, 64, group="median"), "group is 'median'"),
        (lambda c: H2O(c, 0), "budget is 0"),
        (lambda c: H2O(c, 16, interval=0), "interval is 0"),
        (lambda c: H2O(c, 16, group="median"), "group is 'median'"),
        (lambda c: TOVA(c, 16.5), "budget is 16.5"),
        (lambda c: TOVA(c, 16, positions="fresh"), "positions is 'fresh'"),
        (lambda c: ExpectedAttention(c, 3), "does not hold 4 sinks"),
        (lambda c: GemFilter(c, 16, layer=2), "layer 2 and the model has layers 0 to 1"),
        (lambda c: GemFilter(c, 16, layer=-1), "layer is -1"),
        (lambda c: GemFilter(c, 16, positions="cache"), "leave out positions"),
        (lambda c: Scored(c, 5, 16), "scorer"),
        (lambda c: make_memory("snap", c, 16), "no memory 'snap'; choose one of dense, snapkv"),
    ],
)
def test_settings(llama, make, match):
    refused(lambda: make(llama.config), match)


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("GPT2", {}, "'gpt2' adds absolute positions"),
        ("Gemma2", {"sliding_window": 16}, "'gemma2' has its own window of 16"),
        ("Bert", {"is_decoder": True}, "'bert' has no rotary positions"),
        ("mpt", {}, "'mpt' .*ALiBi"),
        ("Mamba", {"state_size": 4, "expand": 1}, "'mamba' has .* layers, which keep no keys"),
        ("Jamba", JAMBA, "'jamba' has .* layers, which keep no keys"),
    ],
)
@pytest.mark.parametrize("make", [functools.partial(SnapKV, window=4), H2O, TOVA, GemFilter])
def test_models_that_cannot_be_read(family, changes, match, make):
    model = build(family, **changes)
    refused(lambda: forward(model, make(model.config, 12), ids=(tuple(tokens(20)),)), match)


def test_a_model_whose_attention_cannot_be_seen_is_named_and_nothing_is_kept():
    model = model_of("gptj", attn_implementation="eager")
    memory = SnapKV(model.config, 12, window=4)
    refused(lambda: model(torch.tensor([tokens(20)]), past_key_values=memory), "'gptj' does not send its attention")
    assert memory.columns == 0


def test_what_flash_attention_has_no_mask_for():
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    pads = {"ids": ((0, 1, 2), (3, 4, 5)), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    for memory, inputs, match in (
        (SnapKV(model.config, 64), pads, "rows have pads"),
        (NAMM(model.config), {}, "heads"),
    ):
        refused(lambda memory=memory, inputs=inputs: forward(model, memory, **inputs), match)
        assert memory.columns == 0


@pytest.fixture
def read(llama):
    """A memory that has compressed a prompt, and a check that a refusal left it as it was."""
    memory, ids = SnapKV(llama.config, BUDGET, window=4), torch.tensor([tokens(PROMPT + 10)])
    memory.expect(PROMPT)
    llama(ids[:, :PROMPT], past_key_values=memory)
    expected = llama(ids[:, PROMPT:], past_key_values=memory.fork()).logits
    yield memory
    torch.testing.assert_close(llama(ids[:, PROMPT:], past_key_values=memory).logits, expected, atol=0, rtol=0)


def forward(model, memory, ids=((1, 2),), **more):
    return model(torch.tensor(ids), past_key_values=memory, **more)


def test_a_second_prompt(read):
    refused(lambda: read.expect(90), "has compressed a prompt and cannot read a second one")
    refused(read.end_prompt, "has compressed a prompt and cannot read a second one")


def test_generate_with_a_prompt_that_has_been_read(llama, read):
    refused(lambda: llama.generate(torch.tensor([tokens(10)]), past_key_values=read), "with new tokens at its end")


@pytest.mark.parametrize("mode", ["prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit"])
def test_generation_modes_that_take_tokens_back(llama, read, mode):
    asked = {mode: build("llama", num_hidden_layers=1) if mode == "assistant_model" else 1}
    match = f"assisted generation removes tokens, which SnapKV cannot do; leave out .*{mode}"
    refused(lambda: llama.generate(torch.tensor([tokens(50)]), past_key_values=read, **asked), match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ids": ((1, 2), (3, 4))}, "has 1 rows and was fed 2"),
        ({"ids": ((1, 600),)}, "has the id 600"),
        ({"labels": torch.tensor([[1, 2]])}, "labels is not available"),
        ({"output_attentions": True}, "output_attentions is not available"),
        ({"use_cache": False}, "use_cache=False"),
        ({"attention_mask": torch.tensor([[1] * 40 + [1, 0]])}, "left-padded rows"),
        ({"attention_mask": torch.zeros(1, 1, 2, 42)}, "makes the attention mask itself"),
        ({"ids": (tuple(range(30)),)}, f"reach position 69, but the positions of this llama end at {POSITIONS - 1}"),
    ],
)
def test_inputs_that_do_not_continue(llama, read, changes, match):
    refused(lambda: forward(llama, read, **changes), match)


def test_a_model_in_training_mode(read):
    model = build("llama")
    refused(lambda: forward(model.train(), SnapKV(model.config, 64)), "training mode")


def test_another_model(read):
    refused(lambda: forward(build("llama"), read), "holds what another model read")
    other = build("qwen2")
    Dense(other)  # its class has the hook
    refused(lambda: forward(other, SnapKV(model_of("llama"), 64)), "was made for another model")


def test_a_pad_after_a_token(llama):
    memory = SnapKV(llama.config, BUDGET, window=4)
    mask = torch.tensor([[1, 1, 0, 1]])
    refused(lambda: forward(llama, memory, ids=((1, 2, 3, 4),), attention_mask=mask), "left-padded rows")
    assert memory.columns == 0


def test_no_prompt(llama):
    memory = SnapKV(llama.config, BUDGET, window=4)
    refused(memory.end_prompt, "has read no prompt")
    refused(lambda: llama.generate(past_key_values=memory), "generate got no prompt")
    forward(llama, memory)
    refused(lambda: memory.expect(2), "has read 2 columns")


@pytest.mark.parametrize(
    ("scorer", "match"),
    [
        (lambda *args: torch.zeros(1, 2, 3), r"returned \(1, 2, 3\) for keys \(1, 2, 40, 8\)"),
        (lambda *args: 3.0, "returned float"),
        (lambda module, hidden, keys, *args: keys[..., 0] / 0.0 * 0.0, "not finite"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_scorer_that_returns_something_else(llama, scorer, match, known):
    """Risk: layers that were compressed before the scorer failed, beside layers that were not."""
    module_of_layer_1 = llama.model.layers[1].self_attn
    memory = Scored(
        llama.config,
        lambda module, *args: scorer(module, *args) if module is module_of_layer_1 else args[1].norm(dim=-1),
        BUDGET,
    )
    if known:
        memory.expect(PROMPT)
        refused(lambda: forward(llama, memory, ids=(tuple(tokens(PROMPT)),)), f"{match}.*is empty again")
    else:
        forward(llama, memory, ids=(tuple(tokens(PROMPT)),))
        refused(memory.end_prompt, f"{match}.*is empty again")
    assert (memory.columns, memory.bytes_held, memory.expected, memory.torn) == (0, 0, None, False)
    forward(llama, memory)
    assert memory.kept_positions(1) == [[0, 1]] * 2


def test_a_prompt_of_fewer_tokens_than_the_window_is_kept_whole(llama):
    memory = SnapKV(llama.config, 64)
    memory.expect(10)
    forward(llama, memory, ids=(tuple(tokens(10)),))
    assert memory.kept_positions(1) == [list(range(10))] * 2


def test_a_ratio_that_leaves_less_than_what_must_stay(llama):
    memory = SnapKV(llama.config, compression_ratio=0.9, window=8)
    refused(lambda: (memory.expect(PROMPT), forward(llama, memory, ids=(tuple(tokens(PROMPT)),))), "choose a lower one")
    assert memory.columns == 0


def test_an_update_that_no_forward_announced(llama):
    refused(lambda: Dense(llama.config).update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0), "did not see")
