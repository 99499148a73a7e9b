"""Guards: the maze's policy is transformers' Decision Transformer, played with a cache that forgets exactly."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from transfer import kept_of
from transformers import DecisionTransformerModel

from examples.decision_maze import (
    LEFT,
    RIGHT,
    main,
    make_policy,
    offline_episodes,
    play,
    states_of,
)
from sinkmodel.errors import UserError
from sinkmodel.memories import NAMM, Dense
from tests.eval.namm import CONFIG, PARAMETERS, write_artefact

STEPS = 9


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return make_policy(STEPS, 16)


@torch.no_grad()
def test_the_policy_is_transformers_own_model_with_a_cache(policy):
    """Risk: another order of the tokens or times, or positions that are taken for packed sequences."""
    found = offline_episodes(4, STEPS)
    tokens = policy.embed(found.states, found.actions, found.returns)
    own = DecisionTransformerModel.forward(
        policy,
        states=found.states,
        actions=F.one_hot(found.actions, 3).float(),
        returns_to_go=found.returns[:, None, None].expand(-1, STEPS, 1),
        timesteps=torch.arange(STEPS).expand(4, -1),
    ).action_preds
    assert torch.allclose(policy(inputs_embeds=tokens).logits[:, 1::3], own, atol=1e-5)
    for memory in (Dense(policy), NAMM(policy, CONFIG)):
        parts = [policy(inputs_embeds=part, past_key_values=memory).logits for part in tokens.split([2, 7, 1, 17], 1)]
        assert torch.allclose(torch.cat(parts, dim=1)[:, 1::3], own, atol=1e-5)


@torch.no_grad()
def test_what_is_forgotten_is_as_if_it_was_hidden(policy):
    """Risk: a forgotten token moves the others. The reference hides it by the mask, in one layer and head alike."""
    policy = make_policy(STEPS, 16)
    tokens = policy.embed(*(lambda e: (e.states, e.actions, e.returns))(offline_episodes(1, STEPS)))
    memory = NAMM(policy, CONFIG)
    memory._scores = lambda layer, rows, seen: -(layer.held_positions() % 4 == 1).float()
    policy(inputs_embeds=tokens[:, :6], past_key_values=memory)
    assert memory.kept_positions(0) == [[0, 2, 3, 4, 5]] * 4, "the newest of the decision stays"
    logits = policy(inputs_embeds=tokens[:, 6:8], past_key_values=memory).logits
    mask = torch.ones(8, 8).tril()
    mask[6:, 1] = 0
    additive = torch.zeros(1, 1, 8, 8).masked_fill(mask == 0, torch.finfo(torch.float32).min)
    hidden = policy.encoder(inputs_embeds=tokens[:, :8], attention_mask=additive, position_ids=torch.zeros(1, 8).long())
    assert torch.allclose(logits, policy.predict_action(hidden[0])[:, 6:], atol=1e-5)


def test_a_model_that_adds_positions_is_refused(policy, monkeypatch):
    """Risk: keys that moved are taken for keys without a position."""
    policy = make_policy(STEPS, 16)
    encoder = policy.encoder.forward

    def forward(inputs_embeds=None, position_ids=None, past_key_values=None, **given):
        given["position_ids"] = given_positions.pop() if given_positions else position_ids
        return encoder(inputs_embeds=inputs_embeds, past_key_values=past_key_values, **given)

    given_positions = [torch.full((8, 1), 1), torch.full((8, 1), 0)]
    monkeypatch.setattr(policy.encoder, "forward", forward)
    with pytest.raises(
        UserError, match="'decision_transformer' adds a position to its tokens here; give it position 0"
    ):
        policy(inputs_embeds=torch.zeros(1, 3, 16), past_key_values=Dense(policy))


def test_episodes_show_the_cue_once_and_the_return_is_for_its_side():
    torch.manual_seed(0)
    found = offline_episodes(400, STEPS)
    cues = torch.where(found.states[:, 0, 0] == 1, LEFT, RIGHT)
    assert torch.equal(found.states, states_of(cues, STEPS))
    assert found.states[:, 1:, :2].abs().sum() == 0
    assert torch.equal(found.states[..., 2].nonzero()[:, 1].unique(), torch.tensor([STEPS - 1]))
    assert torch.equal(found.returns, (found.actions[:, -1] == cues).float())
    assert 0.65 < found.returns.mean() < 0.85
    assert (found.actions[:, :-1] == 0).all()


@torch.no_grad()
def test_a_played_episode_reads_its_own_actions(policy):
    """Risk: a token fed twice, or the action of another step. The reference reads the whole episode at once."""
    cues, memory = torch.tensor([LEFT, RIGHT, RIGHT]), Dense(policy)
    returned = play(policy, memory, cues, STEPS)
    assert memory.columns == 3 * STEPS - 1
    assert kept_of(memory).shape == (2, 3, 4, 3 * STEPS - 1)
    actions = torch.zeros(3, 0, dtype=torch.long)
    for step in range(STEPS):
        taken = F.pad(actions, (0, 1))
        tokens = policy.embed(states_of(cues, STEPS)[:, : step + 1], taken, torch.ones(3))[:, :-1]
        actions = torch.cat([actions, policy(inputs_embeds=tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert returned == pytest.approx((actions[:, -1] == cues).float().mean().item())


def test_the_example_runs_with_any_artefact(tmp_path, capsys):
    artefact = write_artefact(tmp_path / "namm")
    words = ["--artefact", artefact, "--steps", 8, "--updates", 2, "--batch", 2, "--episodes", 4, "--width", 8]
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"dense +\d\.\d\d\n  namm +\d\.\d\d, \d+ % of 23 tokens kept", out)
    assert "the cue's state" in out
    assert main(["--artefact", str(artefact), "--steps", "2"]) == 2
    assert "--steps 2 are 6 tokens, and this NAMM decides after 6; give at least 4" in capsys.readouterr().err


def test_kept_counts_each_head_of_each_row(policy):
    memory = NAMM(policy, CONFIG, PARAMETERS)
    play(policy, memory, torch.tensor([LEFT, RIGHT]), STEPS)
    kept = kept_of(memory)
    assert 0 < kept.mean() < 1
    for layer in (0, 1):
        for row in (0, 1):
            heads = [head.nonzero()[:, 0].tolist() for head in kept[layer, row]]
            assert heads == memory.kept_positions(layer, row)
