"""GemFilter (arXiv 2409.17422, section 3): the first layers of a model choose the tokens that the whole model reads.

Pass 1 runs the layers 0 … r − 1, and the queries and keys of layer r. In layer r the last query of the prompt scores
every key: q·k summed over the query heads, without scale or softmax. The scores are smoothed, and the best C tokens
are chosen, one set for all heads and layers. Pass 2 reads only those tokens, as a text at positions 0 … C − 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sinkmodel.cache.inputs import Request
from sinkmodel.checks import one_of
from sinkmodel.errors import UserError
from sinkmodel.memories.admission import check_can_end
from sinkmodel.memories.arguments import odd, whole
from sinkmodel.memories.hooks import alone
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.memory import Memory
from sinkmodel.memories.observation import Observation
from sinkmodel.memories.pieces import Piece
from sinkmodel.memories.selection import EMPTY, Pooling, best, force, pool


class _Chosen(Exception):
    """Raised when layer r has its queries and keys, since nothing after them is needed."""


class GemFilter(Memory):
    """A memory that reads only the prompt's best tokens, chosen by an early layer, as if they were the prompt.

    Args:
        layer: r, from 0. None is 13/32 of the depth, rounded: the share of Llama-3.1-8B in the paper (section 4). It is
            a guess for any other model. The paper takes layer 19 of 40 for Mistral-Nemo-12B and layer 19 of 32 for
            Phi-3.5-mini. Choose r on your own task if you can.
        kernel: κ, an odd number of neighbours; 5 in the published code (gem_filter_utils.py). The paper has no default.
        pooling: "avg" (the published code) or "max".

    The other arguments are those of `Memory`. By default no token is always kept, as published. The logits of a prompt
    are those of the chosen tokens. If the end of the prompt is not known in advance (from `generate` or `expect`), all
    layers read the prompt first, which costs time and changes nothing else. Formula: SalesforceAIResearch/GemFilter,
    my_utils/my_generation.py and my_baseline/GemFilter.
    """

    SETTINGS = (*Memory.SETTINGS, "layer", "kernel", "pooling")

    def __init__(
        self,
        config: Any,
        budget: int | None = None,
        *,
        layer: int | None = None,
        kernel: int = 5,
        pooling: Pooling = "avg",
        **settings: Any,
    ):
        if settings.pop("positions", "text") != "text":
            raise UserError("GemFilter reads its kept tokens again at positions 0, 1, …; leave out positions")
        super().__init__(config, budget, **settings)
        depth = len(self.layers)
        self.layer = round(depth * 13 / 32) if layer is None else whole(layer, "layer", 0)
        if self.layer >= depth:
            raise UserError(f"GemFilter chooses in layer {self.layer} and the model has layers 0 to {depth - 1}")
        self.kernel, self.pooling = odd(kernel), one_of("pooling", pooling, Pooling)

    def _begin(self) -> None:
        super()._begin()
        self.first_pass = False  # only layers 0 to r run
        self.text_BC: Tensor | None = None  # in the second pass: the text positions of the tokens that are read
        self.forward_of_model: Callable[..., Any] | None = None

    # ------------------------------------------------------------------------------------------------------ the choice

    @property
    def observes(self) -> bool:
        return not self.ended and self.text_BC is None

    def observe(self, layer: MemoryLayer, seen: Observation) -> None:
        if layer is self.layers[self.layer]:
            layer.state["query"] = seen.query_BHND[:, :, -1].clone()

    def scores(self, layer: MemoryLayer) -> Tensor:
        """[B, 1, K], one set for all heads. Within a group, the sum of q·k over its heads is (the sum of q)·k."""
        keys_BGKD, _ = layer.held()
        query_BGD = layer.state["query"].unflatten(1, (keys_BGKD.shape[1], -1)).float().sum(dim=2)
        scores_BGK = (keys_BGKD.float() @ query_BGD[..., None])[..., 0]
        beyond = 0.0 if self.pooling == "avg" else torch.finfo(torch.float32).min  # pads: as beyond a text
        scores_B1K = scores_BGK.sum(dim=1, keepdim=True).masked_fill(layer.held_positions()[:, :1] == EMPTY, beyond)
        return pool(scores_B1K, self.kernel, self.pooling)

    # ------------------------------------------------------------------------------------------------------ two passes

    def read(self, forward: Callable[..., Any], model: Any, request: Request) -> list[Any]:
        if self.ended:
            return super().read(forward, model, request)
        end = self.columns + request.tokens.shape[1]
        if self.expected is not None and end > self.expected:
            raise UserError(
                f"{self.name} expects {self.expected} columns of prompt but got {end}; feed what follows the "
                "prompt in a forward of its own"
            )
        self.first_pass = self.columns == 0 and end == self.expected
        state = self.layers[self.layer].state
        more = request.tokens.to(self.traits.device) if self.traits is not None else request.tokens
        state["prompt"] = torch.cat([state["prompt"], more], dim=1) if "prompt" in state else more
        outputs = super().read(forward, model, request)
        return self._second_pass(model, request) if end == self.expected else outputs

    def plan(self, request: Request, done: int) -> Piece:
        piece = replace(super().plan(request, done), ends_prompt=False)  # chosen tokens are read again
        if self.text_BC is not None:
            piece.token_BN = self.text_BC[:, piece.start : piece.end]
        return piece

    def run(self, forward: Callable[..., Any], model: Any, request: Request, piece: Piece) -> Any:
        try:
            return super().run(forward, model, request, piece)
        except _Chosen:
            self.commit(piece)
            self.torn = False
            return None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        assert self.piece is not None
        alone = self.first_pass and self.piece.start == 0 and self.piece.end == self.expected
        if alone and layer_idx < self.layer:
            return key_states, value_states  # no later piece needs them
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def attend(
        self, attention: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: Any
    ) -> tuple[Tensor, Any]:
        if self.first_pass and module.layer_idx == self.layer:
            assert self.piece is not None
            self.observe(self.layers[self.layer], Observation(module, query, key, value, None, None, None, 1.0))
            raise _Chosen
        return super().attend(attention, module, query, key, value, kwargs)

    def _admit(self, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]) -> Request:
        request = super()._admit(forward, model, args, kwargs)
        self.forward_of_model = forward
        return request

    def end_prompt(self) -> None:
        check_can_end(self)
        assert self.model is not None
        tokens = self._prompt()
        name = "input_ids" if tokens.dim() == 2 else "inputs_embeds"
        model = self.model()
        self.in_forward = True
        try:
            with alone(model):
                self._second_pass(model, Request(name, tokens, None, 1, False, {"return_dict": True}))
        finally:
            self.in_forward, self.piece = False, None

    def _prompt(self) -> Tensor:
        """The prompt read so far, as ids [B, N] or embeddings [B, N, hidden]."""
        prompt = self.layers[self.layer].state.get("prompt")
        if prompt is None or prompt.shape[1] != self.columns:
            raise UserError(f"this {self.name} was restored without its whole prompt; reset() it and read that again")
        return prompt

    def _second_pass(self, model: Any, request: Request) -> list[Any]:
        """Choose tokens, drop everything, and read the chosen tokens. Returns their outputs."""
        columns, seen, prompt = self.columns, self.seen, self._prompt()
        self.budgets = self._budgets(seen)
        chooser = self.layers[self.layer]
        scores, positions = self.scores(chooser), chooser.held_positions()[:, :1]
        self.check_finite(scores)
        forced = force(scores, positions, self.sinks, self.windows(), seen)
        slots, full = (x[:, 0] for x in best(forced, self.budgets))
        index = slots if prompt.dim() == 2 else slots[..., None].expand(-1, -1, prompt.shape[2])
        chosen = Request(
            request.name,
            prompt.gather(1, index.to(prompt.device)),
            None if bool(full.all()) else full.cpu(),
            request.keep,
            request.as_tuple,
            {name: x for name, x in request.others.items() if not isinstance(x, Tensor)},
        )
        self.text_BC = positions[:, 0].gather(1, slots).masked_fill(~full, EMPTY)
        for layer in self.layers:
            layer.clear()
        self.first_pass, self.expected, self.columns = False, None, 0
        self.seen, self.kept = [0] * len(seen), [0] * len(seen)
        assert self.forward_of_model is not None
        self.torn = True
        outputs = super().read(self.forward_of_model, model, chosen)
        self.text_BC, self.forward_of_model = None, None
        self.columns, self.seen = columns, seen
        self._note_end()
        self.shift = [n - kept for n, kept in zip(self.seen, self.kept)]
        return outputs
