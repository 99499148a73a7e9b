"""lm-eval with the model's sink tokens in front of everything that the model reads, exactly once, and never scored.

Stock lm-eval (0.4.13) leaves the sinks to the tokenizer, which goes wrong in four cases. A question longer than the
model's positions loses them with its beginning. Rolling perplexity has one too many in its first window and scores it
as text, and has none in later windows. An empty context has only the first sink. A text that spells a sink gets one
more. Here the sinks are not part of the text: it is encoded without them and cut into windows that leave room for them,
and every window gets them in front.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from sinkmodel.loading import LoadedModel, encode


def windows(context: list[int], target: list[int], room: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a text into windows (tokens only read, tokens scored), each for one forward over at most `room` text tokens.

    Each token of `target` is scored once, in order. The last token of a window is scored but not fed. The remaining
    room is filled with context, at least one token, as in lm-eval's own windows. If the text has no context, its first
    token is predicted from the sinks alone.
    """
    assert room > 0
    tokens = context + target
    first = len(context)  # index of the first token not yet scored
    while first < len(tokens):
        end = min(first + room + (first == 0), len(tokens))
        yield tokens[max(0, end - 1 - room) : first], tokens[first:end]
        first = end


class SinkLM(HFLM):
    """lm-eval's HFLM for a model with sink tokens: a drop-in for every kind of request.

    Text that spells a special token is encoded as text, as in training.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int):
        assert loaded.sink_ids, "a model without sink tokens needs no adapter"
        self.loaded, self.sink_ids = loaded, loaded.sink_ids
        super().__init__(loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=batch_size)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text without sinks: these are put in front of each window, not of a text."""
        ids = encode(self.loaded, string)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """For each (key, context, target) the target's log-likelihood in nats, and whether greedy decoding gives it."""
        room = self.max_length - len(self.sink_ids)
        # lm-eval replaces an empty context by its prefix, bos or eos. No text encoded here contains that id.
        parts = [
            list(windows([] if context == [self.prefix_token_id] else context, target, room))
            for _, context, target in requests
        ]
        rows = [(None, self.sink_ids + context, target) for windows_of in parts for context, target in windows_of]
        answers = iter(super()._loglikelihood_tokens(rows, disable_tqdm, override_bs))
        totals = []
        for windows_of in parts:
            scored = [next(answers) for _ in windows_of]
            totals.append((sum(nats for nats, _ in scored), all(greedy for _, greedy in scored)))
        return totals

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood in nats of each whole text, including its first token."""
        texts: list[tuple[Any, list[int], list[int]]] = [
            (None, [], self.tok_encode(request.args[0])) for request in requests
        ]
        return [nats for nats, _ in self._loglikelihood_tokens(texts, disable_tqdm)]

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts to generate from: ids and mask, both [B, T]; T, with the sinks, is at most `left_truncate_len`."""
        room = (left_truncate_len or self.max_length) - len(self.sink_ids)
        assert room > 0
        rows = [self.sink_ids + self.tok_encode(string, left_truncate_len=room) for string in strings]
        longest = max(map(len, rows))
        ids_BT = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), None) if padding_side == "left" else slice(len(row))
            ids_BT[i, place] = torch.tensor(row)
            mask_BT[i, place] = 1
        return ids_BT, mask_BT
