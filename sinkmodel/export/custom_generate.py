"""`model.generate(..., custom_generate="ORG/NAME", trust_remote_code=True)`: endless text at constant cost.

Works with decoders of transformers that have rotary positions (RoPE), whether from this recipe or not. Needs only torch
and transformers (4.57 or 5).

    model.generate(**inputs, max_new_tokens=10_000, custom_generate="ORG/NAME", trust_remote_code=True, budget=1024)

    budget  C, the number of keys that each token sees in each layer, its own included (default: 1024)
    sinks   S, how many of these are the first tokens of the text (default: the number of the model's sink tokens, or 1
            if it has none); the other C - S are the latest

This is the cache of StreamingLLM (Xiao et al., 2309.17453, section 3.2). The sinks are right before the window, turned
there from their original keys; keys of the window keep the rotation that the model gave them. The result equals that of
a text fed token by token. Sampling, stopping, scores, streamers and left padding are those of `generate`. Positions
grow with the text, so beyond 100,000 tokens the fp32 angles of RoPE lose some precision. `sinkmodel.StreamingCache`
renumbers positions from time to time, is faster, supports more models, and streams further than `generate` can return.

Shapes: B rows, N tokens of a piece, C budget, S sinks, K keys, G KV heads, D size of a head.
"""

import inspect

import torch
from transformers import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput, StopStringCriteria

PIECE = 64  # tokens of a long prompt that are fed at a time, each with the sinks at its own turn
SHIFT = 37  # distance in positions between the two trials
NOT_HERE = (
    *("output_attentions", "output_hidden_states", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"),
    *("penalty_alpha", "dola_layers"),
)  # settings that need more than the next token from the latest logits


def generate(
    model, inputs=None, generation_config=None, *, budget=1024, sinks=None, streamer=None, tokenizer=None, **kwargs
):
    """`model.generate` with a streaming cache. Raises ValueError if the result would not be exact."""
    config = model.config.get_text_config()
    record = getattr(config, "sink", None) or {}
    if record.get("kind") in ("zero", "logit", "kv_bias"):
        raise ValueError("the sink of this model is in its softmax: use past_key_values=sinkmodel.StreamingCache(...)")
    sinks = (record.get("count") or 1) if sinks is None else sinks
    if not 0 <= sinks < budget:
        raise ValueError(f"a budget of {budget} does not hold {sinks} sinks and the current token")
    native = getattr(config, "sliding_window", None)
    if native is not None and native < budget:
        raise ValueError(f"this model has its own sliding window of {native}: choose a budget of at most that")
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(f"attention {model.config._attn_implementation!r} takes no mask: load the model with 'sdpa'")
    for name in ("past_key_values", "inputs_embeds", "assistant_model"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not supported by this custom_generate")
    turns = turns_of(model)

    # transformers takes the tokenizer of a call with a callable and drops it, so stop strings become a criterion here.
    configs = (generation_config, model.generation_config)
    strings = kwargs.get("stop_strings") or next((x.stop_strings for x in configs if x and x.stop_strings), None)
    if strings and tokenizer is not None:
        criteria = [*(kwargs.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, strings)]
        kwargs = {**kwargs, "stop_strings": None, "stopping_criteria": criteria}

    # The streamer is passed from here, since transformers gives it the prompt but does not pass it on.
    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
        if (generation_config.num_beams or 1) > 1:
            raise ValueError("beam search is not supported by this custom_generate: use num_beams=1")
        for name in NOT_HERE:
            if getattr(generation_config, name, None):
                raise ValueError(f"{name} is not supported by this custom_generate")
        stream = Stream(model, budget, sinks, turns, input_ids, inputs.get("attention_mask"))
        return continued(stream, input_ids, logits_processor, stopping_criteria, generation_config, streamer)

    settings = {**kwargs, "streamer": streamer, "custom_generate": decode, "use_cache": True}
    # The model's own generate may be this very function.
    return type(model).generate(model, inputs, generation_config, **settings)


def continued(stream, ids, logits_processor, stopping_criteria, generation_config, streamer):
    """Generate tokens until all rows have ended. Returns [B, prompt + new], as transformers' `generate` does."""
    as_dict, pad = generation_config.return_dict_in_generate, generation_config._pad_token_tensor
    all_scores: tuple | None = () if as_dict and generation_config.output_scores else None  # [B, V] per step
    all_logits: tuple | None = () if as_dict and generation_config.output_logits else None
    going = torch.ones(len(ids), dtype=torch.long, device=ids.device)
    new = ids
    while going.any():
        logits = stream.feed(new).to(torch.float32, copy=True)
        scores = logits_processor(ids, logits)
        if all_scores is not None:
            all_scores += (scores,)
        if all_logits is not None:
            all_logits += (logits,)
        if generation_config.do_sample:
            new = torch.multinomial(scores.softmax(-1), num_samples=1)
        else:
            new = scores.argmax(-1, keepdim=True)
        if pad is not None:
            new = new * going[:, None] + pad * (1 - going[:, None])
        ids = torch.cat([ids, new], dim=1)
        if streamer is not None:
            streamer.put(new[:, 0].cpu())
        going = going & ~stopping_criteria(ids, all_scores)
    if streamer is not None:
        streamer.end()
    return GenerateDecoderOnlyOutput(sequences=ids, scores=all_scores, logits=all_logits) if as_dict else ids


class Stream:
    """The keys of B texts: the originals of their sinks, and the window. All rows share the columns."""

    def __init__(self, model, budget, sinks, turns, prompt, mask):
        self.model, self.sinks, self.window, self.turns = model, sinks, budget - sinks, turns
        self.columns = 0  # columns that were fed so far
        mask = torch.ones_like(prompt) if mask is None else mask
        self.pads = (mask == 0).sum(1, keepdim=True)  # [B, 1]
        if not torch.equal(mask != 0, torch.arange(mask.shape[1], device=mask.device) >= self.pads):
            raise ValueError("pads must be on the left: tokenizer.padding_side = 'left'")
        self.layers = None  # (sink keys, sink values, window keys, window values) of each layer
        accepted = inspect.signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def feed(self, ids):
        """Feed tokens [B, N]. Returns the logits [B, V] after the last one."""
        logits = None
        while ids.shape[1]:
            # At most the window, so that no sink leaves the window in the same piece in which it is fed.
            count = self.window - self.columns if self.columns < self.window else min(PIECE, self.window)
            logits = self._piece(ids[:, :count])
            ids = ids[:, count:]
        return logits

    def _piece(self, ids):
        """Feed a few tokens at once. Each sees the keys that it would see alone."""
        column = self.columns + torch.arange(ids.shape[1], device=ids.device)
        token_BN = column - self.pads  # index from the first token of the row; below 0 for pads
        delta_BN = (token_BN - (self.sinks + self.window - 1)).clamp(min=0)
        if bool((delta_BN == delta_BN[:, :1]).all()):
            delta_BN = delta_BN[:, :1]  # one set of sinks for all tokens of the piece
        cache = DynamicCache()
        for index, (sink_keys, sink_values, keys, values) in enumerate(self.layers or ()):
            turned = self.turns[index](sink_keys[:, :, None], delta_BN[:, None, :, None]).flatten(2, 3)
            repeated = sink_values.repeat(1, 1, delta_BN.shape[1], 1)
            cache.update(torch.cat([turned, keys], dim=2), torch.cat([repeated, values], dim=2), index)
        mask_BNK = self._mask(token_BN, delta_BN.shape[1])
        scores = torch.zeros(mask_BNK.shape, dtype=self.model.dtype, device=ids.device)
        output = self.model(
            input_ids=ids,
            position_ids=token_BN.clamp(min=0),
            attention_mask=scores.masked_fill(~mask_BNK, torch.finfo(scores.dtype).min)[:, None],
            past_key_values=cache,
            use_cache=True,
            **self.last_only,
        )
        self._keep(cache, token_BN)
        return output.logits[:, -1]

    def _mask(self, token_BN, sets):
        """Visibility [B, N, K]: `sets` sets of sinks, the former window, the piece itself."""
        count = token_BN.shape[1]
        query = token_BN[:, :, None]
        held = min(self.columns, self.window - 1)
        key = torch.arange(-held, count, device=token_BN.device) + token_BN[:, :1]  # [B, held + N], as tokens
        key = key[:, None]
        latest = (key >= 0) & (key <= query) & (key > query - self.window)
        latest |= (key == query) & (query < 0)  # a pad sees itself: no row of the mask is empty
        # A sink is visible in the window while it is there, and afterwards in these columns.
        sink = torch.arange(self.sinks if self.layers else 0, device=token_BN.device)
        behind = sink <= query - self.window
        own = torch.eye(count, dtype=torch.bool, device=token_BN.device) if sets > 1 else behind.new_ones(count, 1)
        return torch.cat([(own[:, :, None] & behind[:, :, None]).flatten(2), latest], dim=2)

    def _keep(self, cache, token_BN):
        """Store the originals of new sinks, and the latest keys as the window of the next piece."""
        count = token_BN.shape[1]
        row, column = ((token_BN >= 0) & (token_BN < self.sinks)).nonzero(as_tuple=True)
        before, self.layers = self.layers, []
        for index, layer in enumerate(cache.layers):
            both = []
            for old, x in enumerate((layer.keys, layer.values)):
                new = x[:, :, -count:]
                first = before[index][old] if before else new.new_zeros(*new.shape[:2], self.sinks, new.shape[3])
                if len(row):
                    first[row, :, token_BN[row, column]] = new[row, :, column]
                both.append((first, x[:, :, x.shape[2] - min(self.columns + count, self.window - 1) :]))
            (sink_keys, keys), (sink_values, values) = both
            self.layers.append((sink_keys, sink_values, keys, values))
        self.columns += count


# ------------------------------------------------------------------------------------------ how a model turns its keys


@torch.no_grad()
def turns_of(model):
    """For each layer a function (keys [..., D], positions [...]) -> keys, found by trial. ValueError if none fits.

    The model runs on the same tokens at two positions. Turned by the difference, the keys at the first position must
    equal those at the second. The pairs are halves (Llama, GPT-NeoX) or neighbours (Cohere), or there is no RoPE.
    """
    kind = model.config.model_type
    rotary = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor)]
    if not rotary or any(not torch.equal(module.inv_freq, rotary[0].inv_freq) for module in rotary):
        raise ValueError(f"a {kind!r} model does not have the same rotary positions in all layers")
    if any(getattr(module, "rope_type", "default") in ("dynamic", "longrope") for module in rotary):
        raise ValueError(f"this {kind!r} model changes its rotary frequencies in long texts: its keys cannot be turned")
    inv_freq = rotary[0].inv_freq.double().cpu()
    tokens = torch.arange(1, 9, device=model.device)[:, None]  # one token per row, which sees only itself
    trials = []
    for position in (0, SHIFT):
        cache = DynamicCache()
        model(input_ids=tokens, position_ids=torch.full_like(tokens, position), past_key_values=cache, use_cache=True)
        trials.append([layer.keys for layer in cache.layers])
    if len(trials[0]) != model.config.get_text_config().num_hidden_layers:
        raise ValueError(f"a {kind!r} model has layers without their own keys")
    tolerance = 1e-3 if trials[0][0].dtype == torch.float32 else 0.05
    turns = []
    for near, far in zip(*trials):
        for pairs in ("halves", "neighbours", None):
            turn = turn_by(inv_freq, pairs)
            moved = turn(near, torch.full((1, 1, 1), SHIFT)).float()
            if (moved - far.float()).norm() < tolerance * far.float().norm():
                turns.append(turn)
                break
        else:
            raise ValueError(f"a {kind!r} model rotates its keys in an unsupported way")
    return turns


def turn_by(inv_freq, pairs):
    """A function that moves keys [..., D] by positions [...], broadcast. Angles in fp64, products in fp32."""

    def turn(keys, positions):
        if pairs is None:
            return keys.expand(torch.broadcast_shapes(keys.shape, (*positions.shape, 1)))
        angle = positions.cpu().double()[..., None] * inv_freq
        cos, sin = angle.cos().float().to(keys.device), angle.sin().float().to(keys.device)
        half, x = len(inv_freq), keys.float()
        if pairs == "halves":
            a, b = x[..., :half], x[..., half : 2 * half]
        else:
            a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        a, b = a * cos - b * sin, b * cos + a * sin
        turned = torch.cat([a, b], dim=-1) if pairs == "halves" else torch.stack([a, b], dim=-1).flatten(-2)
        rest = x[..., 2 * half :]
        return torch.cat([turned, rest.expand(*turned.shape[:-1], rest.shape[-1])], dim=-1).to(keys.dtype)

    return turn
