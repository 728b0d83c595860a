"""The running batch: whatever comes and goes beside it, a request's answer is its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from models.tiny import SPECIAL, VOCABULARY, save_base, tiny_trunk
from plain import Scorer
from policies import make_policy
from results import KINDS, save_result
from serving import generated, plain_model

from align.models.base import load_base
from align.models.checkpoints.results import read_result
from align.models.sampling import adapters
from align.models.sampling.adapters import BARE, chain_of
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.models.sampling.pools import Pools
from align.models.sampling.prefixes import Prefixes
from align.models.sampling.requests import Request, Voice
from align.models.sampling.running import MOST_ROWS, Running
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.schema import Lora, Model
from align.tools.evaluation.policy import load_policy
from align.tools.serving.models import load_models

GREEDY = Sampling(20, temperature=0)
PROMPTS = [np.random.default_rng(n).integers(len(SPECIAL), VOCABULARY, n).astype(np.int32) for n in (7, 3, 12, 1, 30)]


def voice(running: Running, adapter: int = BARE) -> Voice:
    return Voice(adapter, running.trunk.tokenizer, frozenset({2}))


def answers(running: Running, requests: list[Request], every: int = 2) -> list[list[int]]:
    """What all say, when a new one comes `every` so many steps."""
    waiting, steps = list(requests), 0
    while waiting or not running.idle:
        if waiting and steps % every == 0:
            running.join(waiting.pop(0))
        running.step()
        assert running.pools.held <= running.pools.budget
        steps += 1
        assert steps < 2000, "it does not end"
    assert not any(pool.rows for pool in running.pools.pools)
    return [request.said for request in requests]


def asked(running: Running, how: Sampling = GREEDY, speakers=(BARE,), **more) -> list[Request]:
    return [
        Request(voice(running, speakers[i % len(speakers)]), prompt, how, (5, i, 0), **more)
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def served(shop):
    """Two policies and a reward model on one trunk, their running batch and their numbers."""
    shelf, _, pairs, _ = load_models([str(shop[name]) for name in ("red", "green", "reward")], None, "float32")
    running = Running(shelf.trunk)
    loaded = [shelf.read(*pair) for pair in pairs]
    return shelf, running, loaded, [running.adapters.add(each.chain) for each in loaded]


@pytest.mark.parametrize("few", [0, 64])
def test_greedy_answers_are_those_of_generate(few, served, shop, monkeypatch):
    """Rows of two adapters beside rows of none, which are computed one by one or as one; in float32."""
    monkeypatch.setattr(adapters, "FEW", few)
    _, running, _, (red, green, _) = served
    requests = asked(running, speakers=[BARE, red, green])
    found = answers(running, requests, every=1)
    plain = {BARE: None, red: shop["red"], green: shop["green"]}
    for request, said in zip(requests, found, strict=True):
        assert said == generated(plain_model(shop["base"], plain[request.voice.adapter]), request.prompt, 20)
    assert found != answers(running, asked(running)), "the adapters change something"


@pytest.mark.parametrize("few", [0, 64])
def test_an_adapter_without_numbers_harms_nobody(few, served, monkeypatch):
    """Finite weights that overflow: neither rows beside its own, nor those that come into their places."""
    monkeypatch.setattr(adapters, "FEW", few)
    _, running, (red, *_), (number, *_) = served
    alone = [row.said for row in _heard(running, asked(running, speakers=[number, BARE]))]
    vast = running.adapters.add(
        {name: part._replace(a=part.a * 1e37, b=part.b * 1e37) for name, part in red.chain.items()}
    )
    rows = [*asked(running, speakers=[vast]), *asked(running, speakers=[number, BARE])]
    rows += asked(running, speakers=[number, BARE])
    running.most = len(rows) - len(alone)  # the last ones come when others have left
    found = _heard(running, rows)
    running.most = MOST_ROWS["cpu"]
    running.retire(vast)
    assert all(row.over and not row.said for row in found[: len(PROMPTS)]), "a fault at its first token"
    assert [row.said for row in found[len(PROMPTS) :]] == alone * 2


def _heard(running: Running, requests: list[Request]) -> list[Request]:
    for request in requests:
        running.join(request)
    while not running.idle:
        running.step()
    return requests


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3"])
def test_other_families_too(family, tmp_path):
    """Windows, soft caps, learned positions, layers that are stored the other way round."""
    base = save_base(tmp_path / "base", family)
    final = make_policy(base, tmp_path / "run")
    shelf, _, (pair,), _ = load_models([str(final)], None, "float32")
    running = Running(shelf.trunk)
    number = running.adapters.add(shelf.read(*pair).chain)
    requests = asked(running, speakers=[number, BARE])
    for request, said in zip(requests, answers(running, requests), strict=True):
        model = plain_model(base, final if request.voice.adapter == number else None)
        assert said == generated(model, request.prompt, 20)


@pytest.fixture(scope="module")
def trunk():
    return tiny_trunk("llama", None)


@pytest.fixture
def running(trunk):
    return Running(trunk)


WARM = Sampling(24, temperature=1.3, top_k=40, top_p=0.9, repetition_penalty=1.2, min_new=3)


def test_draws_are_those_of_the_engine_that_knows_all_rows_from_the_start(running):
    """By key alone: token by token those of `sample`, though rows here come one after the other."""
    found = answers(running, asked(running, WARM))
    trunk = running.trunk
    expected = sample(tiny_trunk("llama", None), PROMPTS, WARM, [(5, i) for i in range(len(PROMPTS))])
    assert found == [row[0].tokens.tolist() for row in expected]
    assert trunk.plain.config._attn_implementation == "align_running"


def test_settings_of_one_row_do_not_reach_another(running):
    hows = [GREEDY, WARM, Sampling(9, temperature=0.4), Sampling(5, temperature=0, repetition_penalty=2.0)]
    alone = [
        answers(running, [Request(voice(running), prompt, how, (i,))])[0]
        for i, (prompt, how) in enumerate(zip(PROMPTS, hows, strict=False))
    ]
    mixed = [
        Request(voice(running), prompt, how, (i,)) for i, (prompt, how) in enumerate(zip(PROMPTS, hows, strict=False))
    ]
    assert answers(running, mixed, every=1) == alone


def test_where_memory_is_short_rows_wait_and_say_the_same(trunk):
    roomy = answers(Running(trunk), asked(Running(trunk), WARM._replace(max_new=70)))
    tight = Running(trunk, budget=256)  # 192 of them for rows, of which the longest needs 100
    gave_back, give = [], tight._give_back
    tight._give_back = lambda row: (gave_back.append(row), give(row))
    assert answers(tight, asked(tight, WARM._replace(max_new=70)), every=1) == roomy
    assert gave_back, "nothing was short"


def test_long_prompts_are_filled_in_parts_between_the_tokens_of_others(running):
    expected = answers(running, asked(running))
    running.prefixes.shrink(10**9)
    running.filled = 8
    assert answers(running, asked(running), every=1) == expected


def test_what_is_known_of_a_conversation_is_not_computed_again(running):
    first = Request(voice(running), PROMPTS[4], GREEDY, (0,))
    answers(running, [first])
    more = np.concatenate([first.tokens, PROMPTS[0]])
    (alone,) = answers(Running(tiny_trunk("llama", None)), [Request(voice(running), more, GREEDY, (1,))])
    again = Request(voice(running), more, GREEDY, (1,))
    assert answers(running, [again]) == [alone]
    assert again.reused == len(first.tokens) - 1, "all but the token whose keys nobody computed"
    other = Request(voice(running, 77), more, GREEDY, (1,))
    running.adapters.known.add(77)
    answers(running, [other])
    assert other.reused == 0, "another model's keys are others"


def test_samples_of_one_prompt_compute_it_once(running):
    computed, pass_ = [], running._pass
    running._pass = lambda parts: (computed.append(sum(count for _, count in parts)), pass_(parts))[1]
    first = Request(voice(running), PROMPTS[4], WARM, (3, 0))
    rest = [Request(voice(running), PROMPTS[4], WARM, (3, i), after=first) for i in range(1, 5)]
    together = answers(running, [first, *rest], every=1)
    assert sum(computed) == len(PROMPTS[4])
    running.prefixes.shrink(10**9)
    assert together == [answers(running, [Request(voice(running), PROMPTS[4], WARM, (3, i))])[0] for i in range(5)]
    assert len({tuple(said) for said in together}) > 1


def test_a_request_that_nobody_waits_for_leaves(running):
    requests = asked(running)
    for request in requests:
        running.join(request)
    running.step()
    said = [len(request.said) for request in requests]
    for request in requests[::2]:
        request.cancelled = True
    while not running.idle:
        running.step()
    assert [len(r.said) for r in requests[::2]] == said[::2]
    assert all(len(r.said) == 20 or r.said[-1] == 2 for r in requests[1::2])


def test_logprobs_are_those_of_the_model_before_temperature_and_filters(running):
    request = Request(voice(running), PROMPTS[0], WARM, (4,), top=3)
    running.join(request)
    events = []
    while not running.idle:
        events += running.step()
    tokens = torch.tensor(request.tokens[None].astype(np.int64))
    with tiny_trunk("llama", None).generating() as model:
        logits = model(tokens, attention_mask=torch.ones_like(tokens)).logits[0].float()
    expected = logits.log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
    for (_, said), row in zip(events, expected, strict=True):
        assert said.logprob == pytest.approx(float(row[said.token]), abs=1e-4)
        values, best = row.topk(3)
        assert [token for token, _ in said.top] == best.tolist()
        assert [value for _, value in said.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_an_answer_ends_with_its_end_token_a_stop_text_or_its_length(running):
    (whole,) = answers(running, [Request(voice(running), PROMPTS[0], GREEDY, (0,))])
    ends = Request(voice(running)._replace(ends=frozenset({whole[5]})), PROMPTS[0], GREEDY, (0,))
    text = running.trunk.tokenizer.decode(whole[3:5])
    stops = Request(voice(running), PROMPTS[0], GREEDY._replace(stop=(text,)), (0,))
    running.join(ends)
    running.join(stops)
    reasons = {}
    while not running.idle:
        reasons |= {id(request): said.end for request, said in running.step()}
    assert (ends.said, reasons[id(ends)]) == (whole[: whole.index(whole[5]) + 1], "stop")
    assert (stops.said, reasons[id(stops)]) == (whole[:5], "stop")


@pytest.mark.parametrize("dora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_chain_is_what_merging_gives(dora, tmp_path):
    """SFT, then DPO on base + SFT, both served beside the bare base: no adapter is merged."""
    base = save_base(tmp_path / "base", "qwen2")
    lora = Lora(r=2, alpha=4, dora=dora)
    sft = save_result(base, tmp_path / "sft", "sft", *KINDS["sft"], lora)
    dpo = _on(base, sft, tmp_path / "dpo", lora)
    shelf, _, pairs, _ = load_models([str(sft), str(dpo)], None, "float32")
    running = Running(shelf.trunk)
    numbers = [running.adapters.add(shelf.read(*pair).chain) for pair in pairs]
    found = answers(running, asked(running, speakers=[numbers[1]]))
    merged = load_policy(
        Model(base=str(base), adapter=str(sft), dtype="float32"), read_result(str(dpo), "t"), _cpu(), 0
    )
    expected = sample(merged, PROMPTS, GREEDY, [(i,) for i in range(len(PROMPTS))])
    assert found == [row[0].tokens.tolist() for row in expected]
    assert found != answers(running, asked(running, speakers=[numbers[0]]))


def _on(base, adapter, final, lora):
    """A result on base + adapter."""
    section = Model(base=str(base), adapter=str(adapter), dtype="float32")
    trunk = Trunk(load_base(section, torch.device("cpu"), frozen=True), section, lora)
    draw = torch.Generator().manual_seed(9)
    trained = {name: p.detach() for name, p in trunk.named_parameters() if p.requires_grad}
    for weight in trained.values():
        weight += 0.1 * torch.randn(weight.shape, generator=draw)
    trunk.save(final, trained, {"stage": "dpo"})
    return final


def _cpu():
    return Accelerator(cpu=True, mixed_precision="no")


def test_scores_are_those_of_transformers(served, shop):
    """Of a reward model, as rows beside answers."""
    _, running, (*_, loaded), (*_, number) = served
    scored = [Request(voice(running, number), ids, Sampling(1), (0,), head=loaded.head) for ids in PROMPTS]
    for request in [*scored, *asked(running)]:
        running.join(request)
    scores = {}
    while not running.idle:
        scores |= {id(request): said.scores for request, said in running.step() if said.end == "scored"}
    plain = Scorer.load(shop["reward"], shop["base"]).model
    with torch.no_grad():
        expected = [plain(torch.tensor(ids[None].astype(np.int64))).logits.item() for ids in PROMPTS]
    assert [scores[id(request)][0] for request in scored] == pytest.approx(expected, abs=1e-4)


def test_a_retired_adapter_goes_with_its_last_row(served, shop):
    _, running, (red, *_), known = served
    number = running.adapters.add(red.chain)
    request = Request(voice(running, number), PROMPTS[0], GREEDY, (0,))
    running.join(request)
    running.step()
    running.retire(number)
    while not running.idle:
        assert number in running.adapters.known
        running.step()
    assert running.adapters.known == {*known}
    assert not any(number in updates for updates in running.adapters.updates.values())
    assert request.said == generated(plain_model(shop["base"], shop["red"]), PROMPTS[0], 20)


def test_weights_that_do_not_fit_are_refused(served, shop):
    shelf, result = served[0], read_result(str(shop["red"]), "it")
    (a, *_), others = sorted(result.weights), dict(result.weights)
    for change, told in (
        ({a: others[a][:, :-1]}, "matrices"),
        ({a.replace("layers.0", "layers.9"): others[a]}, "lora_A"),
        ({"base_model.model.lm_head.weight": others[a]}, "no LoRA"),
    ):
        with pytest.raises(UserError, match=told):
            chain_of(shelf.trunk, [result._replace(weights=others | change)], "it")


def test_pools_have_no_holes_and_keep_to_their_budget():
    pools = Pools(1024, 512)
    rows = [pools.place(60) for _ in range(6)]
    assert [row.slot for row in rows] == [0, 1, 2, 3, 4, 5]
    layer = torch.arange(6.0)[:, None, None, None].expand(6, 1, 64, 2)
    rows[0].pool.hold(0, (layer[:1], layer[:1]))[0][: len(rows)] = layer
    rows[5].length = 60
    rows[1].pool.remove(rows[1])
    assert rows[5].slot == 1, "the last takes the place of the one that left"
    assert float(rows[5].layer(0, 60)[0][0, 0, 0]) == 5
    wide = pools.wider(rows[5], 65)
    assert (wide.pool.room, wide.length) == (128, 60)
    assert float(wide.layer(0, 60)[0][0, 59, 1]) == 5
    held = []
    while (row := pools.place(300)) is not None:
        held.append(row)
    assert pools.held <= 1024
    assert len(held) == 1
    pools.clear()
    assert pools.held == 0


def test_beginnings_are_found_and_the_oldest_forgotten():
    pools, prefixes = Pools(1024, 512), Prefixes(100)

    def kept(seed: int, length: int):
        row = pools.place(length)
        row.length = length
        row.pool.hold(0, (torch.zeros(1, 1, 1, 2),) * 2)
        return np.random.default_rng(seed).integers(0, 99, length).astype(np.int32), row

    first, row = kept(0, 40)
    prefixes.keep(1, first, row)
    assert prefixes.longest(1, first)[0] == 39, "the last token is always computed: its logits are asked for"
    assert prefixes.longest(2, first) is None
    assert prefixes.longest(1, first[:20])[0] == 19
    assert prefixes.longest(1, np.concatenate([first[:30], first[:3]]))[0] == 30
    longer, row = kept(0, 50)
    prefixes.keep(1, longer, row)
    assert (prefixes.held, len(prefixes.known)) == (50, 1), "what goes on from another takes its place"
    for seed in (1, 2):
        prefixes.keep(1, *kept(seed, 40))
    assert prefixes.held <= 100
    assert prefixes.longest(1, longer) is None
    prefixes.forget(1)
    assert (prefixes.held, prefixes.buckets) == (0, {})
