"""A NAMM that was evolved on text, in a Decision Transformer: which past steps it forgets, and what that costs.

    python examples/decision_maze.py

The task is a T-maze. The first state alone shows a cue, left or right; a corridor follows, and at its end the agent
has to turn to the side of the cue, for a return of 1. It is trained offline, on episodes that follow the cue three
times of four, as transformers' `DecisionTransformerModel` reads them: the return to go, the state and the action of
each step are three tokens. Played with a wanted return of 1, it needs the cue at the end.

Attention in that model knows no positions, since the time of a step is part of its embedding. So what is left in the
cache is read exactly as if the rest was masked. The network of the NAMM stays as it was evolved; the example measures
what it does here, and nothing says that this is good.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transfer import kept_of, parser_of, train
from transformers import DecisionTransformerConfig, DecisionTransformerModel, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from sinkmodel.console import command, put, say
from sinkmodel.errors import UserError
from sinkmodel.memories import NAMM, TOVA, Dense, Memory
from sinkmodel.parser import positive

FORWARD, LEFT, RIGHT = range(3)  # actions
STATE = 3  # numbers of a state: whether the cue is left, whether it is right, whether the corridor ends here
TOKENS = ("return", "state", "action")  # of a step, in this order
SHORTEST = 4  # steps of an episode
INTERVALS = 2.5  # tokens of an episode, in intervals of the NAMM, unless --steps says otherwise


@command("decision_maze")
def main(argv: list[str]) -> int | None:
    options = parse(argv)
    from sinkmodel.memories.namm import read_artefact

    namm, parameters = read_artefact(options.artefact)
    steps = options.steps or max(SHORTEST, round(INTERVALS * namm.interval / len(TOKENS)))
    if steps < SHORTEST or len(TOKENS) * steps <= namm.interval:
        raise UserError(
            f"--steps {steps} are {len(TOKENS) * steps} tokens, and this NAMM decides after {namm.interval}; give at "
            f"least {max(SHORTEST, namm.interval // len(TOKENS) + 1)}"
        )
    torch.manual_seed(options.seed)
    policy = make_policy(steps, options.width)
    say(f"{steps} steps, {len(TOKENS) * steps} tokens; {sum(p.numel() for p in policy.parameters()):,} parameters")
    train(policy, options, (SHORTEST, steps), functools.partial(loss_of, policy, options.batch))
    cues = torch.tensor([LEFT, RIGHT]).repeat(-(-options.episodes // 2))[: options.episodes]
    memory = NAMM(policy, namm, parameters)
    dense, of_namm = play(policy, Dense(policy), cues, steps), play(policy, memory, cues, steps)
    budget = max(1, round(kept_of(memory).sum(dim=-1).mean().item()))
    of_tova = play(policy, TOVA(policy, budget), cues, steps)
    put(report(dense, of_namm, of_tova, kept_of(memory), budget))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("decision_maze.py", "A NAMM in a Decision Transformer.", updates=400, batch=32)
    parser.add_argument("--steps", type=positive, metavar="N", help="of an episode (default: by the NAMM's interval)")
    parser.add_argument("--episodes", type=positive, default=64, metavar="N", help="that are played (default: 64)")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------ the maze


@dataclass(frozen=True)
class Episodes:
    """B episodes of T steps."""

    states: Tensor  # [B, T, STATE]
    actions: Tensor  # [B, T]
    returns: Tensor  # [B], 1 for a turn to the side of the cue, else 0


def states_of(cues: Tensor, steps: int) -> Tensor:
    """What is seen on the way: the cue first, nothing in the corridor, and its end."""
    states = torch.zeros(len(cues), steps, STATE)
    states[:, 0, :2] = F.one_hot(cues - LEFT, 2).float()
    states[:, -1, 2] = 1.0
    return states


def offline_episodes(count: int, steps: int) -> Episodes:
    """Episodes that follow the cue three times of four, and so have a return."""
    cues = torch.randint(LEFT, RIGHT + 1, (count,))
    turns = torch.where(torch.rand(count) < 0.75, cues, LEFT + RIGHT - cues)
    actions = torch.full((count, steps), FORWARD)
    actions[:, -1] = turns
    return Episodes(states_of(cues, steps), actions, (cues == turns).float())


# ---------------------------------------------------------------------------------------------------------- the policy


class Policy(DecisionTransformerModel, GenerationMixin):
    """transformers' Decision Transformer as a model of tokens with a cache: its logits are those of the actions."""

    def get_input_embeddings(self) -> Any:
        return self.encoder.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.predict_action[0]

    def embed(self, states: Tensor, actions: Tensor, returns: Tensor, first: int = 0) -> Tensor:
        """The tokens of steps from `first` on, [B, 3 T, E], as `DecisionTransformerModel.forward` makes them.

        Args:
            actions: [B, T], as numbers.
            returns: [B], those to go, which are the same at every step.
        """
        B, T, _ = states.shape
        time = self.embed_timestep(torch.arange(first, first + T))
        to_go = self.embed_return(returns[:, None, None].expand(B, T, 1))
        taken = self.embed_action(F.one_hot(actions, self.config.act_dim).float())
        tokens = torch.stack([to_go + time, self.embed_state(states) + time, taken + time], dim=2)
        return self.embed_ln(tokens.flatten(1, 2))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Position 0 for every token, as in `DecisionTransformerModel`: `position_ids` change nothing."""
        tokens = inputs_embeds if input_ids is None else input_ids
        assert tokens is not None
        if attention_mask is None and past_key_values is None:  # else equal positions are taken for packed sequences
            attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        output = self.encoder(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device),
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        )
        return CausalLMOutputWithPast(logits=self.predict_action(output[0]), past_key_values=past_key_values)


def make_policy(steps: int, width: int) -> Policy:
    config = DecisionTransformerConfig(
        state_dim=STATE,
        act_dim=3,
        hidden_size=width,
        n_layer=2,
        n_head=4,
        max_ep_len=steps,
        n_positions=len(TOKENS) * steps,
        action_tanh=False,
        initializer_range=0.125,  # with 0.02 so narrow a model hardly attends to anything at first
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
    )
    return Policy(config).eval()  # without dropout the modes are alike


def loss_of(policy: Policy, batch: int, length: int) -> Tensor:
    """The loss of the actions; the turn at the end weighs as much as all the others."""
    found = offline_episodes(batch, length)
    logits = policy(inputs_embeds=policy.embed(found.states, found.actions, found.returns)).logits[:, 1::3]
    losses = F.cross_entropy(logits.flatten(0, 1), found.actions.flatten(), reduction="none").view(batch, -1)
    return losses[:, -1].mean() + losses[:, :-1].mean()


# --------------------------------------------------------------------------------------------------------- what it does


@torch.no_grad()
def play(policy: Policy, memory: Memory, cues: Tensor, steps: int) -> float:
    """The mean return of episodes that are played with a wanted return of 1, a step a forward."""
    states, wanted = states_of(cues, steps), torch.ones(len(cues))
    actions = torch.full((len(cues),), FORWARD)
    fed = torch.empty(len(cues), 0, policy.config.hidden_size)  # the action before, which is part of the past as well
    for step in range(steps):
        tokens = policy.embed(states[:, step : step + 1], actions[:, None], wanted, step)
        fed = torch.cat([fed, tokens[:, :2]], dim=1)
        actions = policy(inputs_embeds=fed, past_key_values=memory).logits[:, -1].argmax(dim=-1)
        fed = policy.embed(states[:, step : step + 1], actions[:, None], wanted, step)[:, 2:]
    return (actions == cues).float().mean().item()


def report(dense: float, namm: float, tova: float, kept: Tensor, budget: int) -> str:
    """Returns and what was kept; the last step has no action yet."""
    of_tokens = kept.mean(dim=(0, 1, 2))  # [tokens]
    place, quarter = torch.arange(len(of_tokens)), len(of_tokens) // 4
    groups = {f"{name} tokens": place % len(TOKENS) == i for i, name in enumerate(TOKENS)}
    groups |= {"the cue's state": place == 1, "the first step": place < len(TOKENS)}
    groups |= {
        f"{name} quarter": place // quarter == i for i, name in enumerate(("oldest", "second", "third", "latest"))
    }
    lines = [
        "return, where chance has 0.5:",
        f"  dense         {dense:.2f}",
        f"  namm          {namm:.2f}, {100 * of_tokens.mean():.0f} % of {len(of_tokens)} tokens kept at the end",
        f"  tova {budget:<8} {tova:.2f}, as many tokens at every step",
        "% kept by namm at the end, as a mean over layers, heads and episodes:",
    ]
    lines += [f"  {name:<16}{100 * of_tokens[group].mean():5.1f}" for name, group in groups.items()]
    if dense < 0.75:
        lines.append("the model has not learned the task, so its return says nothing; train longer with --updates")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
