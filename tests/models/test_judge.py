"""Judges score as plain transformers do, one text at a time, whatever shares a batch."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from models.tiny import SIZES, tiny_tokenizer
from peft import AutoPeftModelForCausalLM, PeftModel
from plain import Scorer
from policies import make_policy
from ppo_start import make_start
from transformers import AutoConfig, AutoModelForSequenceClassification

from align.models.base import load_base
from align.models.judge import read_judge
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.schema import Lora, Model

CPU, KEY = torch.device("cpu"), "ppo.rewards.1"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


class Asked(NamedTuple):
    messages: list[dict[str, Any]] | None
    text: str | None = None


class Answer(NamedTuple):
    asked: Asked
    prompt: str
    response: str


def answers(*responses: str, question="Why?") -> list[Answer]:
    return [Answer(Asked([{"role": "user", "content": question}]), "", response) for response in responses]


SAID = answers("Because.", "No", "It is so, and it will be so for as long as anyone cares to look.", "", "é 🌸")


def classifier(folder, family="llama", outputs=1, template: str | None = CHATML, **more):
    """A tiny classifier of random weights; the padding token ends its turns."""
    own = {"llama": {}, "bert": {"num_key_value_heads": None, "head_dim": None, "pad_token_id": 2}}[family]
    config = AutoConfig.for_model(family, **{k: v for k, v in (SIZES | own | more).items() if v is not None})
    config.num_labels = outputs
    if outputs > 1:
        config.id2label = dict(enumerate(["sad", "fine", "happy"]))
        config.label2id = {name: i for i, name in config.id2label.items()}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        AutoModelForSequenceClassification.from_config(config).float().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder, text: str) -> list[float]:
    """Of one text, without padding; its last token is the last one read."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return model(torch.tensor([ids])).logits[0].tolist()


def chat(answer: Answer) -> str:
    (turn,) = answer.asked.messages
    return f"<|im_start|>user\n{turn['content']}<|im_end|>\n<|im_start|>assistant\n{answer.response}<|im_end|>"


def close(found, expected):
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert np.std(expected) > 0.01


def judge(folder, label=None):
    return read_judge(str(folder), label, KEY, CPU, torch.float32)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_single_score_is_read_at_the_end_of_turn(tmp_path, family):
    """A decoder whose padding is the end of turn, and an encoder; rows alone as rows together."""
    read = judge(classifier(tmp_path / family, family))
    expected = [logits(tmp_path / family, chat(answer))[0] for answer in SAID]
    close(read(SAID), expected)
    close([read([answer])[0] for answer in SAID], expected)
    close(read(SAID[::-1]), expected[::-1])
    assert read([]) == []


def test_rows_that_fill_several_batches(tmp_path, monkeypatch):
    read = judge(classifier(tmp_path / "llama"))
    together = read(SAID)
    monkeypatch.setattr("align.models.judge.BATCH_TOKENS", 60)
    close(read(SAID), together)


@pytest.mark.parametrize("label", ["happy", 2])
def test_the_log_odds_of_a_class(tmp_path, label):
    folder = classifier(tmp_path / "bert", "bert", outputs=3)
    expected = []
    for answer in SAID:
        sad, fine, happy = logits(folder, chat(answer))
        share = math.exp(happy) / (math.exp(sad) + math.exp(fine) + math.exp(happy))
        expected.append(math.log(share / (1 - share)))
    close(judge(folder, label)(SAID), expected)


def test_without_a_template_it_reads_the_last_turn_and_the_answer(tmp_path):
    folder = classifier(tmp_path / "bert", "bert", template=None)
    close(judge(folder)(SAID), [logits(folder, f"Why?\n{answer.response}")[0] for answer in SAID])


def test_the_beginning_of_a_text_is_continued(tmp_path):
    folder = classifier(tmp_path / "bert", "bert")
    said = [Answer(Asked(None, "Once upon"), "", response) for response in (" a time", "", " 7")]
    close(judge(folder)(said), [logits(folder, f"Once upon{answer.response}")[0] for answer in said])


def test_of_what_is_too_long_it_reads_the_end(tmp_path):
    folder = classifier(tmp_path / "bert", "bert", max_position_embeddings=32)
    (score,) = judge(folder)(answers("so " * 50 + "it ends"))
    ids = tiny_tokenizer()(chat(answers("so " * 50 + "it ends")[0]))["input_ids"]
    assert score == pytest.approx(logits(folder, tiny_tokenizer().decode(ids[-32:]))[0], rel=1e-4)


def test_a_prompt_that_its_template_cannot_write(tmp_path):
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"its chat template cannot write what it is to judge .*roles must alternate"):
        judge(classifier(tmp_path / "bert", "bert", template=refusing))(SAID)


@pytest.fixture(scope="module")
def start(world, cache, tmp_path_factory):
    return make_start(world, cache, tmp_path_factory)


def test_a_reward_on_another_trunk_scores_as_plain_peft(start):
    scorer = Scorer.load(start.reward, start.base)
    close(judge(start.reward)(SAID[:3]), [scorer.score("Why?", answer.response) for answer in SAID[:3]])


def test_a_reward_on_merged_adapters_scores_as_plain_peft(start, tmp_path):
    """Base and SFT result are found by what its align.json tells."""
    policy = make_policy(start.base, tmp_path / "sft", stage="sft")
    section = Model(base=str(start.base), adapter=str(policy), dtype="float32")
    trunk = Trunk(load_base(section, CPU, frozen=True, outputs=1), section, Lora(r=2, alpha=4), outputs=1)
    trained = {name: p.detach().clone() for name, p in trunk.named_parameters() if p.requires_grad}
    draw = torch.Generator().manual_seed(0)
    for weight in trained.values():
        weight += 0.1 * torch.randn(weight.shape, generator=draw)
    trunk.save(tmp_path / "final", trained, {"stage": "reward"})
    merged = AutoPeftModelForCausalLM.from_pretrained(policy).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=1)
    plain = PeftModel.from_pretrained(base, tmp_path / "final").eval()
    plain.config.pad_token_id = None
    read = judge(tmp_path / "final")
    expected = [plain(torch.tensor([read._ids(answer)])).logits.item() for answer in SAID]
    close(read(SAID), expected)


def test_a_reward_whose_trunk_is_more_than_its_base_is_refused(start, tmp_path):
    """Such as one on top of an SFT result: its base alone would give other scores, without a word."""
    folder = shutil.copytree(start.reward, tmp_path / "final")
    about = json.loads((folder / "align.json").read_text()) | {"fingerprint": "0123456789abcdef"}
    (folder / "align.json").write_text(json.dumps(about))
    with pytest.raises(UserError) as error:
        judge(folder)
    (problem,) = error.value.problems
    assert problem.startswith(f"{KEY}.model: {folder} was trained on a trunk with fingerprint 0123456789abcdef ")


@pytest.mark.parametrize(
    ("outputs", "label", "said"),
    [
        (1, "happy", "has a single score, so leave it out"),
        (3, None, "has 3 classes, sad, fine, happy; name the one to be scored"),
        (3, "glad", "has 3 classes, sad, fine, happy; name the one to be scored"),
        (3, 3, "has 3 classes, sad, fine, happy; name the one to be scored"),
        (3, -1, "has 3 classes, sad, fine, happy; name the one to be scored"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, outputs, label, said):
    folder = classifier(tmp_path / "bert", "bert", outputs=outputs)
    with pytest.raises(UserError) as error:
        judge(folder, label)
    assert error.value.problems == (f"{KEY}.label: {folder} {said}",)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no model"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"oops"),
            "its weights are damaged",
        ),
        (lambda folder: (folder / "align.json").write_text("{"), "is damaged"),
    ],
    ids=["no folder", "no config", "broken weights", "broken align.json"],
)
def test_a_model_that_cannot_be_read(tmp_path, harm, said):
    folder = classifier(tmp_path / "bert", "bert")
    harm(folder)
    with pytest.raises(UserError) as error:
        judge(folder)
    (problem,) = error.value.problems
    assert problem.startswith(f"{KEY}.model: ")
    assert said in problem
