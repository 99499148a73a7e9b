"""Guards what all memories share: forks, files, beams, rows, bytes; and nothing of size prompt × prompt is made."""

from __future__ import annotations

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, DynamicCache

from sinkmodel.errors import UserError
from sinkmodel.memories import BUDGETED, MEMORIES, NAMM, Memory, Scored, make_memory, observation, pieces
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.namm import NAMMConfig
from tests.models import POSITIONS, build, cast, model_of, tokens

PROMPT, BUDGET = 40, 12
EVICTING = [name for name in MEMORIES if name != "dense"]
EVOLVED = NAMMConfig(window=4, hop=2, interval=6, hidden=3, age_size=2, mean=(0.02,) * 3, variance=(0.0003,) * 3)


def new(name: str, model, budget: int = BUDGET, **settings):
    if name == "namm":  # with a large budget, one that keeps everything
        generator = torch.Generator().manual_seed(1)
        parameters = torch.randn(EVOLVED.parameters, generator=generator) if budget < PROMPT else None
        return NAMM(model.config, EVOLVED, parameters, **settings)
    if name == "snapkv":
        settings["window"] = 4
    return make_memory(name, model.config, None if name == "dense" else budget, **settings)


def read(model, memory, ids, known: bool = True):
    """The prompt and its end."""
    if known:
        memory.expect(ids.shape[1])
    model(ids, past_key_values=memory)
    if not known:
        memory.end_prompt()
    return memory


def feed(model, memory, ids, size: int = 1):
    return torch.cat([model(x, past_key_values=memory).logits for x in ids.split(size, dim=1)], dim=1)


@pytest.fixture
def llama():
    return model_of("llama")


@pytest.fixture
def text():
    return torch.tensor([tokens(PROMPT + 20), tokens(PROMPT + 20, seed=1)])


@pytest.mark.parametrize("name", MEMORIES)
def test_a_fork_is_an_independent_copy(llama, text, name):
    memory = read(llama, new(name, llama), text[:, :PROMPT])
    fork, twin = memory.fork(), copy.deepcopy(memory.state_dict())
    other = feed(llama, fork, text[:, PROMPT + 5 : PROMPT + 12])
    assert memory.state_dict()["numbers"] == twin["numbers"]
    for now, before in zip(memory.state_dict()["layers"], twin["layers"]):
        assert all(torch.equal(now["slots"][key], before["slots"][key]) for key in before["slots"])
    first = feed(llama, memory, text[:, PROMPT + 5 : PROMPT + 12])
    torch.testing.assert_close(first, other, atol=0, rtol=0)


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("fed", [25, PROMPT, PROMPT + 3], ids=["in-the-prompt", "at-its-end", "after-it"])
def test_a_memory_in_flight_is_saved_and_continues_bit_for_bit(llama, text, tmp_path, name, fed):
    memory = new(name, llama)
    memory.expect(PROMPT)
    for start, end in ((0, min(fed, PROMPT)), (PROMPT, fed)):
        if start < end:
            llama(text[:, start:end], past_key_values=memory)
    memory.save(tmp_path / "memory.pt")
    again = new(name, llama)
    again.load(tmp_path / "memory.pt")
    for cache in (memory, again):
        if fed < PROMPT:
            llama(text[:, fed:PROMPT], past_key_values=cache)
    torch.testing.assert_close(
        feed(llama, again, text[:, PROMPT + 3 :]), feed(llama, memory, text[:, PROMPT + 3 :]), atol=0, rtol=0
    )
    assert again.kept_positions(0) == memory.kept_positions(0)


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("restored", ["file", "pickle"])
def test_a_prompt_that_was_saved_before_its_end_ends_with_the_next_token(llama, text, tmp_path, name, restored):
    memory = new(name, llama)
    llama(text[:, :PROMPT], past_key_values=memory)
    if restored == "pickle":
        again = pickle.loads(pickle.dumps(memory))
    else:
        memory.save(tmp_path / "memory.pt")
        again = new(name, llama)
        again.load(tmp_path / "memory.pt")
    with pytest.raises(UserError, match="its model has not run yet"):
        again.end_prompt()
    after = text[:, PROMPT:]
    torch.testing.assert_close(feed(llama, again, after), feed(llama, memory, after), atol=0, rtol=0)


def test_a_saved_memory_knows_the_weights_that_filled_it(llama, text, tmp_path):
    """Guards twins, which have the same shape and other keys."""
    memory = read(llama, new("snapkv", llama), text[:, :PROMPT])
    memory.save(tmp_path / "memory.pt")
    twin = build("llama")
    with torch.no_grad():
        twin.get_input_embeddings().weight += 0.1
    again = new("snapkv", twin)
    again.load(tmp_path / "memory.pt")
    with pytest.raises(UserError, match="was filled by other weights"):
        twin(text[:, PROMPT : PROMPT + 1], past_key_values=again)
    llama(text[:, PROMPT : PROMPT + 1], past_key_values=again)


def test_a_memory_within_another_gives_the_model_back_to_it(llama, text):
    outer, inner = new("snapkv", llama), new("tova", llama)
    arguments = {"max_new_tokens": 2, "do_sample": False}
    with outer.on(llama):
        with inner.on(llama):
            llama.generate(text[:, :PROMPT], **arguments)
        assert (inner.columns, outer.columns) == (PROMPT + 1, 0)
        llama.generate(text[:, :PROMPT], **arguments)
        assert outer.columns == PROMPT + 1
    assert "generate" not in vars(llama)


@pytest.mark.parametrize("name", MEMORIES)
def test_forks_and_copies_in_the_middle_of_a_prompt_go_their_own_ways(llama, text, name):
    """Guards a list that two copies share, and a deepcopy that takes the model's weights along."""
    memory = new(name, llama)
    llama(text[:, :20], past_key_values=memory)
    forks = [memory.fork(), copy.deepcopy(memory)]
    swapped = memory.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert all(fork.modules[0] is memory.modules[0] for fork in forks)
    for fork in (*forks, memory):
        fork.expect(PROMPT)
        llama(text[:, 20:PROMPT], past_key_values=fork)
    swapped.expect(PROMPT)
    llama(text.flip(0)[:, 20:PROMPT], past_key_values=swapped)
    expected = feed(llama, memory, text[:, PROMPT:])
    for fork in forks:
        torch.testing.assert_close(feed(llama, fork, text[:, PROMPT:]), expected, atol=0, rtol=0)
    turned = feed(llama, swapped, text.flip(0)[:, PROMPT:])
    torch.testing.assert_close(turned, expected.flip(0), atol=1e-5, rtol=0)


def test_a_file_of_another_memory_or_a_damaged_one_is_refused(llama, text, tmp_path):
    memory = read(llama, new("snapkv", llama), text[:, :PROMPT])
    memory.save(tmp_path / "memory.pt")
    for other, match in (
        (new("h2o", llama), "memory SnapKV"),
        (make_memory("snapkv", llama.config, 20, window=4), "budget 12"),
    ):
        with pytest.raises(UserError, match=match):
            other.load(tmp_path / "memory.pt")
    (tmp_path / "memory.pt").write_bytes((tmp_path / "memory.pt").read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        memory.load(tmp_path / "memory.pt")
    state = memory.state_dict()
    state["layers"][0]["slots"]["keys"] = state["layers"][0]["slots"]["keys"][:, :, 1:]
    with pytest.raises(UserError, match="damaged"):
        memory.load_state_dict(state)
    feed(llama, memory, text[:, PROMPT : PROMPT + 2])  # as it was


@pytest.mark.parametrize("name", EVICTING)
def test_beams_and_repeated_rows_carry_everything(text, name):
    """In fp64: a processor may round the rows of another batch differently."""
    llama = build("llama").double()
    memory = read(llama, new(name, llama), text[:, :PROMPT])
    swapped = memory.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    doubled = memory.fork()
    doubled.batch_repeat_interleave(2)
    after = text[:, PROMPT:]
    expected = feed(llama, memory, after)
    torch.testing.assert_close(feed(llama, swapped, after.flip(0)), expected.flip(0), atol=1e-5, rtol=0)
    twice = feed(llama, doubled, after.repeat_interleave(2, dim=0))
    torch.testing.assert_close(twice, expected.repeat_interleave(2, dim=0), atol=1e-5, rtol=0)
    assert doubled.kept_positions(1, 3) == memory.kept_positions(1, 1)


@pytest.mark.parametrize("name", MEMORIES)
def test_generate_with_beams_is_that_of_a_growing_cache_while_all_fits(llama, text, name):
    arguments = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    memory = new(name, llama, **({} if name == "dense" else {"budget": 60}))
    made = llama.generate(text[:, :PROMPT], past_key_values=memory, **arguments)
    assert torch.equal(made, llama.generate(text[:, :PROMPT], past_key_values=DynamicCache(), **arguments))


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("chunk", [None, 7], ids=["whole", "chunked"])
def test_generate_ends_the_prompt_with_the_prompt(llama, text, name, chunk):
    memory, by_hand = new(name, llama), read(llama, new(name, llama), text[:, :PROMPT])
    made = llama.generate(
        text[:, :PROMPT], past_key_values=memory, max_new_tokens=6, do_sample=False, prefill_chunk_size=chunk
    )
    assert memory.columns == PROMPT + 5
    feed(llama, by_hand, made[:, PROMPT : PROMPT + 5])
    assert memory.kept_positions(1, 1) == by_hand.kept_positions(1, 1)
    turn = torch.cat([made, text[:, :4]], dim=1)  # another turn continues the text
    llama.generate(turn, past_key_values=memory, max_new_tokens=2, do_sample=False)
    assert memory.columns == turn.shape[1] + 1


def test_on_a_model_every_generate_starts_with_an_empty_memory(llama, text):
    memory = new("snapkv", llama)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    expected = llama.generate(text[:, :PROMPT], past_key_values=new("snapkv", llama), **arguments)
    with memory.on(llama):
        for _ in range(2):
            assert torch.equal(llama.generate(text[:, :PROMPT], **arguments), expected)
            assert memory.columns == PROMPT + 4
    assert "generate" not in vars(llama)
    with pytest.raises(RuntimeError), memory.on(llama):
        raise RuntimeError
    assert "generate" not in vars(llama)


@pytest.mark.parametrize("name", BUDGETED)
def test_bytes_are_those_of_the_budget(llama, text, name):
    memory = read(llama, new(name, llama), text[:, :PROMPT])
    layers, groups, size = 2, 2, 8
    slots = 2 * layers * groups * BUDGET  # of both rows
    assert memory.bytes_kept == slots * 2 * size * 4
    state = 4 if name == "h2o" else 0
    positions = 2 * BUDGET if name == "gemfilter" else slots  # its heads and layers have the same
    assert memory.bytes_held == slots * (2 * size * 4 + state) + 4 * positions


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize(("dtype", "position"), [(torch.float32, 0.0078125), (torch.bfloat16, 0.015625)])
def test_beside_keys_and_values_a_slot_holds_its_position_and_the_sum_of_h2o(name, dtype, position):
    """Guards a state of the prompt that outlives it, and the shares that the README states for heads of size 64."""
    model = cast(build("llama", head_dim=64, num_hidden_layers=1), dtype)
    memory = make_memory(name, model, 32)
    ids = torch.tensor([tokens(POSITIONS)])
    read(model, memory, ids[:, :-1])
    most = 1 + position * {"h2o": 2, "gemfilter": 0.5}.get(name, 1)
    assert memory.bytes_kept == 32 * 2 * 2 * 64 * dtype.itemsize, "slots, heads, K and V, size"
    assert memory.bytes_held / memory.bytes_kept == most
    if memory.interval:
        model(ids[:, -1:], past_key_values=memory)
        assert memory.bytes_held / memory.bytes_kept == most * 33 / 32, "a slot for the next token"


def test_empty_slots_are_held_but_not_kept(llama, text):
    memory = new("snapkv", llama)
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, : PROMPT - 5] = 0
    memory.expect(PROMPT)
    llama(text[:, :PROMPT], attention_mask=mask, past_key_values=memory)
    assert memory.bytes_kept == 2 * 2 * (5 + BUDGET) * 2 * 8 * 4
    assert memory.bytes_held > 2 * 2 * 2 * BUDGET * 2 * 8 * 4
    assert [len(head) for head in memory.kept_positions(0, 0)] == [5, 5]


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova", "expected-attention"])
def test_a_layer_is_compressed_before_the_next_one_reads(llama, text, name, monkeypatch):
    memory, lengths = new(name, llama), []
    attend = type(memory).attend
    monkeypatch.setattr(
        type(memory),
        "attend",
        lambda self, *args: lengths.append([layer.length for layer in self.layers]) or attend(self, *args),
    )
    read(llama, memory, text[:, :PROMPT])
    assert lengths == [[PROMPT, 0], [BUDGET, PROMPT]]


def test_gemfilter_stores_nothing_in_its_first_pass_but_the_keys_of_its_layer(llama, text, monkeypatch):
    memory, appended = new("gemfilter", llama), []
    append = MemoryLayer.append

    def noted(layer, keys, *more, **named):
        appended.append(keys.shape[2])
        append(layer, keys, *more, **named)

    monkeypatch.setattr(MemoryLayer, "append", noted)
    read(llama, memory, text[:, :PROMPT])
    assert memory.layer == 1
    assert appended == [PROMPT, BUDGET, BUDGET]


def test_no_matrix_of_prompt_times_prompt_is_made(llama, monkeypatch):
    text = torch.tensor([tokens(60)])
    monkeypatch.setitem(observation.BLOCK_NUMBERS, "cpu", 4 * 60 * 8)  # 8 queries of four heads
    monkeypatch.setattr(pieces, "LONGEST_MASKED", 16)
    made, masks = [], []
    weights, visible = observation.Observation._weights, pieces.visible
    monkeypatch.setattr(
        observation.Observation, "_weights", lambda self, *args: made.append(x := weights(self, *args)) or x
    )
    monkeypatch.setattr(pieces, "visible", lambda *args: masks.append(x := visible(*args)) or x)
    mask = torch.ones(1, 60, dtype=torch.long)
    mask[0, 0] = 0
    for name in EVICTING:
        for given in (None, mask):
            memory = new(name, llama)
            memory.expect(60)
            with Shapes() as shapes:
                llama(text, attention_mask=given, past_key_values=memory, logits_to_keep=1)
            assert not shapes.squares(60), name
    assert max(x.numel() for x in made) <= 4 * 60 * 8
    assert max(x.shape[2] for x in masks if x is not None) <= 16
    with Shapes() as shapes:
        model_of("llama", attn_implementation="eager")(text, logits_to_keep=1)
    assert (1, 4, 60, 60) in shapes.squares(60), "a plain eager model makes one"


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that operators make."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out

    def squares(self, tokens: int) -> set[tuple[int, ...]]:
        """The shapes with at least two dimensions as long as the prompt."""
        return {shape for shape in self.seen if sum(n >= tokens for n in shape) > 1}


@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_a_step_at_the_budget_copies_no_cache(llama, text, name, monkeypatch):
    memory = read(llama, new(name, llama), text[:, :PROMPT])
    feed(llama, memory, text[:, PROMPT : PROMPT + 2])
    addresses = [layer.keys.data_ptr() for layer in memory.layers]
    monkeypatch.setattr(MemoryLayer, "keep", lambda *args: pytest.fail("gathered"))
    monkeypatch.setattr(MemoryLayer, "_grow", lambda *args: pytest.fail("grown"))
    feed(llama, memory, text[:, PROMPT + 2 : PROMPT + 12])
    assert [layer.keys.data_ptr() for layer in memory.layers] == addresses
    assert {layer.keys.shape[2] for layer in memory.layers} == {BUDGET + 1}


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_stays_near(text, name, dtype):
    """Near a model in fp32, with the same weights, of which each query sees just the keys that the memory held."""
    half = cast(build("llama"), dtype)
    memory, ids = new(name, half), text[:1]
    memory.expect(PROMPT)
    held, logits = [], []
    for piece in (ids[:, :PROMPT].split(PROMPT if name == "gemfilter" else 1, dim=1), ids[:, PROMPT:].split(1, dim=1)):
        for token in piece:
            held.append([memory.kept_positions(layer) if memory.columns else [[], []] for layer in (0, 1)])
            logits.append(half(token, past_key_values=memory, logits_to_keep=1).logits[0])
    assert {layer.keys.dtype for layer in memory.layers} == {dtype}
    found = torch.cat(logits[-20:]).float()
    if name == "gemfilter":  # what it read again, at positions from 0 on
        ids = torch.cat([ids[:, held[1][0][0]], ids[:, PROMPT:]], dim=1)
        held = [[[list(range(t))] * 2] * 2 for t in range(ids.shape[1])]
    exact = seeing(cast(build("llama"), dtype).float(), held)(ids).logits[0, -20:]
    assert (found - exact).norm() < NEAR[dtype] * exact.norm()


NEAR = {torch.bfloat16: 0.05, torch.float16: 0.01}


def seeing(model, held):
    """The model with each query t of layer l and KV head g seeing only the keys held[t][l][g] and its own."""
    mask = torch.eye(len(held), dtype=torch.bool).repeat(2, 2, 1, 1)
    for t, layers in enumerate(held):
        for layer, heads in enumerate(layers):
            for head, positions in enumerate(heads):
                mask[layer, head, t, positions] = True

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        seen = mask[module.layer_idx].repeat_interleave(query.shape[1] // key.shape[1], dim=0)
        out = F.scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("sees-what-was-held", attention)
    model.set_attn_implementation("sees-what-was-held")
    return model


@pytest.mark.parametrize("name", ["snapkv", "expected-attention", "gemfilter"])
def test_tokens_after_the_prompt_can_be_taken_back(llama, text, name):
    memory = read(llama, new(name, llama), text[:, :PROMPT])
    expected = feed(llama, memory.fork(), text[:, PROMPT:])
    feed(llama, memory, text[:, PROMPT + 7 : PROMPT + 12])
    memory.crop(-5)
    torch.testing.assert_close(feed(llama, memory, text[:, PROMPT:]), expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="remove 20 tokens"):
        memory.crop(-21)


def test_a_compression_ratio_is_a_budget_for_each_row(llama, text):
    memory = make_memory("snapkv", llama.config, compression_ratio=0.5, window=4)
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, : PROMPT - 20] = 0
    memory.expect(PROMPT)
    llama(text[:, :PROMPT], attention_mask=mask, past_key_values=memory)
    assert [[len(head) for head in memory.kept_positions(0, row)] for row in (0, 1)] == [[10, 10], [20, 20]]
    alone = make_memory("snapkv", llama.config, compression_ratio=0.5, window=4)
    read(llama, alone, text[:1, PROMPT - 20 : PROMPT])
    assert alone.kept_positions(1) == memory.kept_positions(1, 0)


class Press:
    """A scorer as kvpress has them."""

    def __init__(self):
        self.seen = []

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        cos, sin = kwargs["position_embeddings"]
        assert attentions is None
        assert hidden_states.shape[:2] == cos.shape[:2] == sin.shape[:2] == (keys.shape[0], keys.shape[2])
        assert module.rotary_emb is not None
        self.seen.append((module.layer_idx, hidden_states))
        return -keys.norm(dim=-1)


@pytest.mark.parametrize("size", [PROMPT, 7])
@pytest.mark.parametrize("known", [True, False])
def test_a_press_is_given_the_whole_prompt_of_each_layer(llama, text, size, known):
    press = Press()
    memory = Scored(llama.config, press, BUDGET)
    if known:
        memory.expect(PROMPT)
    for piece in text[:, :PROMPT].split(size, dim=1):
        llama(piece, past_key_values=memory)
    if not known:
        memory.end_prompt()
    assert [layer for layer, _ in press.seen] == [0, 1]
    hidden = llama(text[:, :PROMPT], output_hidden_states=True).hidden_states
    expected = llama.model.layers[1].input_layernorm(hidden[1])
    torch.testing.assert_close(press.seen[1][1], expected, atol=1e-5, rtol=0)
    assert not any(hasattr(module, "rotary_emb") for module in llama.model.layers.modules())
    keys = DynamicCache()
    llama(text[:, :PROMPT], past_key_values=keys)
    shortest = (-keys.layers[0].keys.norm(dim=-1)).topk(BUDGET).indices.sort().values
    assert memory.kept_positions(0) == shortest[0].tolist()


@pytest.mark.parametrize("name", ["snapkv", "gemfilter"])
def test_threads_with_memories_on_one_model_take_turns(llama, text, name, monkeypatch):
    """Guards the attention function of the model, which is ours while a memory reads."""
    attend, own = Memory.attend, llama.config._attn_implementation

    def slow(*args):
        time.sleep(0.005)  # the other thread gets its chance in every layer
        return attend(*args)

    def work(row):
        memory = read(llama, new(name, llama), text[row : row + 1, :PROMPT], known=False)
        return feed(llama, memory, text[row : row + 1, PROMPT:])

    expected = [work(row) for row in (0, 1)]
    monkeypatch.setattr(Memory, "attend", slow)
    with ThreadPoolExecutor(2) as threads:
        for ours, theirs in zip(threads.map(work, (0, 1)), expected):
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert llama.config._attn_implementation == own


def test_a_forward_without_a_memory_beside_one_with_it_is_one_clear_line(llama, text, monkeypatch):
    attend = Memory.attend

    def beside(*args):
        with ThreadPoolExecutor(1) as thread, pytest.raises(UserError, match="a memory is reading with this model"):
            thread.submit(llama, text[:, :4]).result()
        return attend(*args)

    monkeypatch.setattr(Memory, "attend", beside)
    read(llama, new("snapkv", llama), text[:, :PROMPT])
