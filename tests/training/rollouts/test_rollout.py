"""A rollout's numbers are those of plain transformers, path by path; and what a minibatch learns from is its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from models.tiny import SPECIAL, VOCABULARY, stir, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from rich.console import Console

from align.models.base import Base
from align.models.roles import Roles, Scorer
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import Response
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model
from align.training.batches import Batches
from align.training.rollouts.epochs import Targets
from align.training.rollouts.rollout import Episodes, Rollout, explained, figures, read, sampled, score_figures, scored
from align.training.screen import Screen

LORA, END = Lora(r=4, alpha=8), 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = [np.random.default_rng(n).integers(len(SPECIAL), VOCABULARY, n).astype(np.int32) for n in (7, 3, 12, 5)]


def plain_config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")


def adapted(family: str):
    """The family's model under a LoRA of plain peft that says something."""
    model = get_peft_model(tiny_model(family), plain_config())
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.normal_(0, 0.2, generator=draw)
    return model.eval()


def roles_of(family: str, temperature: float) -> Roles:
    """An actor that has moved, with a reward and the critic that starts from it."""
    base = Base(tiny_model(family), tiny_tokenizer(), "fingerprint", family, family)
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))
    weights = get_peft_model_state_dict(adapted(family))
    scorer = Scorer(None, 0.4, 2.0, Lora(r=4, alpha=8, targets=TARGETS), weights, head)
    trunk = Trunk(base, Model(base=family, dtype="float32"), LORA)
    return Roles(stir(trunk), LORA, {"reward": scorer}, "reward", temperature)


def batches(trunk: Trunk, row_tokens: int) -> Batches:
    return Batches(trunk, Accelerator(), row_tokens)


def rolled(roles: Roles, episodes: Episodes, groups, row_tokens=64) -> Rollout:
    screen = Screen(Console(quiet=True))
    return read(roles, batches(roles.trunk, row_tokens), episodes, groups, screen, "known")


def response(*tokens: int, ended: bool = False) -> Response:
    return Response(np.array(tokens, np.int32), ended)


def written() -> Episodes:
    """Two responses to each prompt, of one to seven tokens; some end."""
    draw = np.random.default_rng(1)
    lengths = [(4, 1), (7, 2), (1, 3), (5, 5)]
    responses = [
        [response(*draw.integers(3, VOCABULARY, k - 1), END if k % 2 else 9, ended=bool(k % 2)) for k in own]
        for own in lengths
    ]
    return Episodes(PROMPTS, responses)


@torch.no_grad()
def slowly(family: str, roles: Roles, episodes: Episodes, temperature: float) -> list[dict[str, torch.Tensor]]:
    """Of each response what plain models say, one at a time: log-probabilities, entropy, values and score."""
    reference, reward = tiny_model(family).eval(), adapted(family)
    actor = get_peft_model(tiny_model(family), plain_config())
    own = {name: p for name, p in roles.trunk.causal.state_dict().items() if "default" in name}
    assert not actor.load_state_dict(own, strict=False).unexpected_keys
    actor.eval()
    (head, scale) = (torch.randn(1, 32, generator=torch.Generator().manual_seed(5))[0], 2.0)
    found = []
    for prompt, said in ((p, r.tokens) for p, own in zip(PROMPTS, episodes.responses, strict=True) for r in own):
        ids, start = torch.from_numpy(np.concatenate([prompt, said]).astype(np.int64))[None], len(prompt)
        logprobs, bare = (
            (model(ids).logits[0, start - 1 : -1] / temperature).log_softmax(-1) for model in (actor, reference)
        )
        scores = reward.base_model.model.model(ids).last_hidden_state[0, start - 1 :] @ head
        labels = ids[0, start:, None]
        found.append(
            {
                "logprobs": logprobs.gather(1, labels)[:, 0],
                "ref_logprobs": bare.gather(1, labels)[:, 0],
                "entropies": torch.distributions.Categorical(logits=logprobs).entropy(),
                "values": (scores - 0.4) / scale,
                "scores": scores[-1:],
            }
        )
    return found


@pytest.mark.parametrize(("family", "temperature"), [("llama", 1.0), ("llama", 0.7), ("gemma2", 1.6)])
def test_every_number_is_that_of_plain_models(family, temperature):
    """Whatever shares a row; grids hold an episode a line, in order, and 0 behind its end."""
    roles, episodes = roles_of(family, temperature), written()
    expected = slowly(family, roles, episodes, temperature)
    assert (expected[0]["logprobs"] - expected[0]["ref_logprobs"]).abs().max() > 0.01
    for groups, room in (([[2, 0], [3, 1]], 64), ([[0, 1, 2, 3]], 1), ([[3, 2, 1, 0]], 512)):
        found = rolled(roles, episodes, [np.array(group) for group in groups], room)
        assert found.lengths.tolist() == [4, 1, 7, 2, 1, 3, 5, 5]
        assert episodes.ended.tolist() == [k % 2 == 1 for k in found.lengths.tolist()]
        assert found.tokens.shape == (8, 7)
        assert found.tokens.sum(1).tolist() == found.lengths.tolist()
        assert found.steps.shape == found.values.shape == (8, 8)
        assert found.steps.sum(1).tolist() == [k + 1 for k in found.lengths.tolist()]
        masks = {"values": found.steps} | dict.fromkeys(("logprobs", "ref_logprobs", "entropies"), found.tokens)
        for name, mask in masks.items():
            grid = getattr(found, name)
            assert not grid[~mask].any(), name
            for number, own in enumerate(expected):
                torch.testing.assert_close(grid[number][mask[number]], own[name], rtol=1e-4, atol=1e-4, msg=name)
        screen, rows = Screen(Console(quiet=True)), batches(roles.trunk, room)
        scores = scored(roles, rows, episodes, [np.array(group) for group in groups], ["reward"], screen)
        torch.testing.assert_close(
            scores["reward"], torch.cat([own["scores"] for own in expected]), rtol=1e-4, atol=1e-4
        )
        bare = read(roles, rows, episodes, [np.array(group) for group in groups], screen, reference=False)
        assert bare.ref_logprobs is None
        assert torch.equal(bare.logprobs, found.logprobs)


def test_learning_says_what_scoring_said():
    """The same rows give the same bits; a response's log-probability in other rows is near."""
    roles, episodes = roles_of("llama", 0.7), written()
    groups = [np.array([2, 0]), np.array([3, 1])]
    found = rolled(roles, episodes, groups)
    targets = Targets(found, torch.device("cpu"), [found.logprobs])
    roles.train()
    rows = batches(roles.trunk, 64)
    for group in groups:
        for row in rows.rows(episodes, group):
            batch = rows.plant(episodes, row)
            assert torch.equal(roles(batch).logprobs, targets.of(batch)[0])
    batch = rows.plant(episodes, [0, 1, 2, 3])
    torch.testing.assert_close(roles(batch).logprobs, targets.of(batch)[0], rtol=1e-4, atol=1e-4)


def test_what_was_said_of_the_only_row_is_kept_to_learn_from():
    """It has the value and the gradients that saying it again would have; with more rows nothing is kept."""
    roles, episodes = roles_of("llama", 0.7), written()
    said = rolled(roles, episodes, [np.arange(4)], 512).said
    again = roles(batches(roles.trunk, 512).plant(episodes, [0, 1, 2, 3]))
    trained = [p for p in roles.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(each.logprobs.sum() + each.values.square().sum(), trained, allow_unused=True)
        for each in (said, again)
    )
    assert torch.equal(said.logprobs, again.logprobs)
    assert sum(one is not None and bool(one.any()) for one in found) > 20
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert rolled(roles, episodes, [np.arange(4)], 16).said is None
    assert rolled(roles, episodes, [np.arange(2), np.arange(2, 4)], 512).said is None


def test_a_minibatch_finds_the_numbers_of_its_episodes():
    """Each number tells its episode and place; rows in any order, prompts that begin alike grafted into one tree."""
    alike = np.arange(20, 40, dtype=np.int32)
    prompts = [np.append(alike, i).astype(np.int32) for i in (5, 6, 7)]
    lengths = [[2, 4], [1, 3], [3, 2]]
    episodes = Episodes(prompts, [[response(*range(50, 50 + k)) for k in own] for own in lengths])
    roles = roles_of("llama", 1.0)
    found = rolled(roles, episodes, [np.arange(3)], 512)
    places = 100.0 * torch.arange(6)[:, None] + torch.arange(5)[None]
    tokens, steps = places[:, :4] * found.tokens, places * found.steps
    targets = Targets(found, torch.device("cpu"), (tokens, 2 * tokens), (-steps, 3 * steps))
    rows = batches(roles.trunk, 512)
    for row in ([0, 1, 2], [2, 0], [1], [1, 2, 0]):
        batch = rows.plant(episodes, row)
        assert len(row) == 1 or len(batch.parents) > 2 * len(row) + 1, "grafted"
        order = batch.targets.long().tolist()
        assert sorted(order) == sorted(episodes.numbers(np.array(row)).tolist())
        old, advantages, values, returns = targets.of(batch)
        counts = [found.lengths[n] for n in order]
        assert old.tolist() == [100.0 * n + t for n, k in zip(order, counts, strict=True) for t in range(k)]
        stepped = [100.0 * n + t for n, k in zip(order, counts, strict=True) for t in range(k + 1)]
        assert torch.equal(advantages, 2 * old)
        assert values.tolist() == [-step for step in stepped]
        assert returns.tolist() == [3 * step for step in stepped]
        assert len(batch.labels) == len(old)


def test_parts_of_episodes_and_others_in_their_place():
    episodes = written()
    kept = episodes.kept(torch.tensor([False, True, False, False, True, True, True, False]))
    assert [len(prompt) for prompt in kept.prompts] == [7, 12, 5], "a prompt without responses is left out"
    assert kept.said.tolist() == [1, 1, 3, 5]
    assert kept.numbers(np.array([2, 1])).tolist() == [3, 1, 2]
    assert [kept.tree(i).targets for i in range(3)] == [(0.0,), (1.0, 2.0), (3.0,)]
    assert kept.lengths.tolist() == [7 + 1, 12 + 1 + 3, 5 + 5]
    whole = episodes.kept(torch.ones(8, dtype=torch.bool))
    assert (whole.said.tolist(), len(whole)) == (episodes.said.tolist(), 4)
    other = episodes.replaced(np.array([1]), episodes.kept(torch.arange(8) > 5))
    assert other.said.tolist() == [4, 1, 5, 5, 1, 3, 5, 5]
    assert other.prompts[1] is episodes.prompts[1]
    assert episodes.said.tolist() == [4, 1, 7, 2, 1, 3, 5, 5], "the first are as they were"


def test_a_response_depends_on_its_key_alone():
    """Not on the prompts beside it, their order, or the rows."""
    trunk = roles_of("llama", 1.0).trunk
    how, keys = Sampling(9, temperature=0.7), [(3, 5, 1, place) for place in range(4)]

    def said(chosen, samples=2, room=512):
        own = sampled(
            trunk, batches(trunk, room), [PROMPTS[i] for i in chosen], [keys[i] for i in chosen], how, samples
        )
        return {i: [r.tokens.tolist() for r in own.responses[n]] for n, i in enumerate(chosen)}

    together = said([0, 1, 2, 3])
    assert said([3, 1, 0, 2], room=16) == together
    assert said([2]) == {2: together[2]}
    assert {i: own[:2] for i, own in said([0, 1, 2, 3], samples=3).items()} == together
    assert len({tuple(tokens) for own in together.values() for tokens in own}) == 8
    keys[1] = (3, 5, 2, 1)
    other = said([0, 1, 2, 3])
    assert {i for i in other if other[i] != together[i]} == {1}


def test_figures_by_hand():
    """Two episodes, of one token and of three."""
    tokens = torch.tensor([[True, False, False], [True, True, True]])
    steps = torch.tensor([[True, True, False, False], [True] * 4])
    values = torch.tensor([[1.0, 2.0, 0, 0], [0.0, 1.0, 2.0, 3.0]])
    rollout = Rollout(
        torch.tensor([[-1.0, 0, 0], [-1.0, -2.0, -3.0]]), torch.tensor([[-2.0, 0, 0], [-1.5, -2.0, -2.0]]),
        torch.tensor([[0.5, 0, 0], [1.0, 2.0, 0.5]]), values, tokens, steps,
        torch.tensor([1, 3]),
    )  # fmt: skip
    episodes = Episodes([PROMPTS[0]], [[response(5, ended=True), response(5, 6, 7)]])
    found = score_figures({"rule": torch.tensor([1.0, 4.0])}, torch.tensor([2.0, -1.0]), episodes)
    assert found == pytest.approx({"score": 0.5, "score/rule": 2.5, "response_tokens": 2.0, "ended": 0.5})
    assert figures(rollout, 0.1, 0.5) == pytest.approx(
        {"kl": 0.25, "kl_per_token": 0.125, "kl_coef": 0.1, "reward": 0.475, "entropy": 1.0}
    )
    assert figures(rollout._replace(ref_logprobs=None), 0.1, 0.5) == {"entropy": 1.0}
    returns = torch.tensor([[2.0, 2.0, 0, 0], [1.0, 1.0, 3.0, 3.0]])
    # Residuals 1, 0, 1, 0, 1, 0: variance 0.3; returns 2, 2, 1, 1, 3, 3: variance 0.8.
    assert explained(rollout, returns) == pytest.approx(
        {"explained_variance": 1 - 0.3 / 0.8, "value/return": 2.0, "value/critic": 1.5}
    )
    # Where returns differ by rounding alone, nothing is to be explained.
    for constant in (0.0, 3.0):
        level = torch.full_like(returns, constant) * (1 + 1e-7 * values)
        assert explained(rollout, level)["explained_variance"] is None
    assert explained(rollout._replace(values=values * 1e-3), returns * 1e-3)["explained_variance"] is not None
