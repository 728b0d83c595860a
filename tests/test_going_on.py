"""What a run is, besides its recipe; and the ways on: the same data, a later end, its weights in another run."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from world import Child, align, lines, metrics, tree, weights, write_rows

from align import classify, dpo, reward

STEADY = {"learning_rate": 0.02, "schedule": "constant", "warmup": 1}
TALKS = [{"prompt": f"Say {i}", "completion": f"Number {i}."} for i in range(6)]


@pytest.fixture
def recipe(world, here):
    """A recipe on six rows in a file of its own, a copy of the base's template beside it, one step of four rows and one
    of two."""
    write_rows(here / "d.jsonl", TALKS)
    (here / "turns.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return world.recipe(
        here / "recipe.yaml",
        model={"base": str(world.base), "dtype": "float32", "chat_template": "turns.jinja"},
        data={"train": [{"path": "d.jsonl"}], "eval": {"sources": [{"path": str(world.held), "limit": 3}]}},
        optim=STEADY,
        train={"epochs": 1.0, "steps": None, "eval_every": None, "save_every": 1},
    )


def done(*argv, stage=None):
    """What a command that ended well said."""
    told = align(*argv, **({"stage": stage} if stage else {}))
    assert (told.status, told.err) == (0, ""), told.err
    return told.out


def refused(*argv, stage=None):
    """The one line of a command that was refused."""
    told = align(*argv, **({"stage": stage} if stage else {}))
    assert told.status == 2, told.out + told.err
    assert told.err.count("\n") == 1, told.err
    return told.err.strip()


def test_other_data_are_refused_with_what_changed_and_the_ways_on(recipe, here):
    """In a finished run and in one that stopped; and nothing in its folder changes."""
    run = here / "run"
    done(recipe)
    kept = shutil.copytree(run, here / "kept")
    for finished in (True, False):
        if not finished:
            shutil.rmtree(run / "final")
        before = tree(run)
        write_rows(here / "d.jsonl", TALKS[:2])
        assert refused(recipe) == (
            f"run: {run} was trained on something else: train: 6 examples there, 2 here, d.jsonl has changed "
            f"(282 bytes there, 94 here). Restore what changed to go on with this run; or train its weights on in "
            f"another folder (run=… train.start_from={run}); or start over with --fresh, which deletes it"
        )
        write_rows(here / "d.jsonl", [*TALKS[:5], TALKS[5] | {"completion": "Number 7."}])
        said = refused(recipe)
        assert (
            "train: 6 examples there and here, but others or in another order, d.jsonl has changed (of the same size)"
            in said
        )
        write_rows(here / "d.jsonl", TALKS)
        template = (here / "turns.jinja").read_text()
        (here / "turns.jinja").write_text(template.replace("assistant: ", "assistant says: "))
        assert "was trained on something else: the chat template has changed. Restore" in refused(recipe)
        (here / "turns.jinja").write_text(template)
        assert tree(run) == before
    (run / "data.json").unlink()  # then the checkpoint knows
    write_rows(here / "d.jsonl", TALKS[:2])
    assert "train: 6 examples there, 2 here" in refused(recipe)
    write_rows(here / "d.jsonl", TALKS)
    assert "going on from" in done(recipe)
    assert metrics(run) == metrics(kept)
    assert "nothing to do" in done(recipe)
    write_rows(here / "d.jsonl", TALKS[:2])
    assert "2 steps" not in done(recipe, "--fresh")
    assert json.loads((run / "data.json").read_text())["train"]["examples"] == 2


def test_another_base_adapter_or_eval_set_is_refused(world, recipe, here):
    base, first = shutil.copytree(world.base, here / "base"), here / "first"
    held = shutil.copy(world.held, here / "held.jsonl")
    more = [recipe, "model.base=base", f"data.eval.sources=[{{path: {held}, limit: 3}}]"]
    done(*more, f"run={first}")
    shutil.copytree(first / "final", here / "sft")
    second = [*more, "run=second", "model.adapter=sft"]
    done(*second)
    config = here / "sft" / "adapter_config.json"
    kept = config.read_text()
    config.write_text(json.dumps(json.loads(kept) | {"lora_alpha": 80}))
    said = refused(*second)
    assert "model.adapter sft: its weights or its configuration have changed" in said
    config.write_text(kept)
    assert "nothing to do" in done(*second)
    rows = lines(held)
    write_rows(held, rows[1:])
    assert "eval: 3 examples there and here, but others or in another order" in refused(*second)
    write_rows(held, rows)
    tensors = load_file(base / "model.safetensors")
    save_file({name: t + 1e-3 for name, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    assert "the weights of model.base have changed (fingerprint " in refused(*more, f"run={first}")


def test_an_extended_run_equals_one_that_was_planned_longer(recipe, here):
    """Finished, extended, stopped by a signal on the way, and gone on with by the plain command: to the bit."""
    longer = [recipe, "train.steps=8", "train.eval_every=4", "log.samples=[Say 1]", "log.sample_tokens=4"]
    shorter = [*longer, "train.steps=4", "run=short"]
    done(*longer, "run=long")
    done(*shorter)
    short, before = here / "short", tree(here / "short")
    assert "train.steps: 4 there, 8 here" in refused(*longer, "run=short")
    assert "--extend goes on with it to the new end" in refused(*longer, "run=short")
    assert "--extend: 4 steps are done; train.steps or train.epochs asks for fewer" in refused(
        *shorter, "train.steps=2", "--extend"
    )
    assert "holds no run yet" in refused(*longer, "run=none", "--extend")
    assert not (here / "none").exists()
    assert "seed: 17 there, 3 here" in refused(*longer, "run=short", "--extend", "seed=3")
    assert tree(short) == before
    child = Child(here, *longer, "run=short", "--extend")
    child.send_when(signal.SIGTERM, lambda: b'"step": 5' in (short / "metrics.jsonl").read_bytes())
    told = child.wait()
    assert "extended: 8 steps in place of 4\n" in told.out, told.err
    assert json.loads((short / "final" / "align.json").read_text())["step"] == 4  # until the new one takes its place
    assert "(step " in done(*longer, "run=short")
    assert metrics(short) == metrics(here / "long")
    assert [line for line in lines(short / "samples.jsonl") if line["step"] != 4] == lines(here / "long/samples.jsonl")
    assert all(torch.equal(t, weights(short)[name]) for name, t in weights(here / "long").items())
    assert json.loads((short / "final" / "align.json").read_text())["step"] == 8
    assert "nothing to do" in done(*longer, "run=short", "--extend")
    shutil.rmtree(short / "checkpoints")
    assert "has no whole checkpoint to go on from" in refused(*longer, "run=short", "--extend", "train.steps=9")


def test_an_extension_takes_every_example_as_often_though_a_step_was_short(recipe, here):
    """Of 1 epoch of 4 + 2 examples, extended to 3: no example is passed over; another schedule is told of."""
    done(recipe)
    said = done(recipe, "--extend", "train.epochs=3", "optim.schedule=constant")
    assert "extended: 5 steps in place of 2; a step that had fewer examples was the last one before" in said
    assert [record["epoch"] for record in metrics(here / "run", "train")] == [4 / 6, 1, 10 / 6, 14 / 6, 3]
    assert [record["step"] for record in metrics(here / "run", "eval")] == [0, 2, 5]
    falling = [recipe, "run=falling", "optim.schedule=linear"]
    done(*falling)
    assert "the learning rate follows the new plan from step 3 on" in done(*falling, "--extend", "train.epochs=2")


def only_one(recipe, *more):
    """One row a step: every step sees the same, in any run."""
    return [recipe, "data.train.0.limit=1", "batch.examples=1", "train.save_every=2", "train.keep=9", *more]


def test_weights_and_moments_are_trained_on_to_the_bit(recipe, here):
    """Eight steps on one row are four, and four from there in another run: from its folder and from its checkpoint. A
    result has no moments."""
    steady = ["optim.warmup=0", "train.steps=8"]
    done(*only_one(recipe, "run=whole", *steady))
    shutil.copytree(here / "whole", here / "half")
    for step in (6, 8):
        shutil.rmtree(here / "half" / "checkpoints" / f"step-00000{step}")
    for number, start in enumerate(("whole/checkpoints/step-000004", "half")):
        more = [f"run=on{number}", f"train.start_from={start}", "optim.warmup=0", "train.steps=4"]
        said = done(*only_one(recipe, *more))
        assert "weights and AdamW's moments of step 4" in said
        assert all(torch.equal(t, weights(here / f"on{number}")[name]) for name, t in weights(here / "whole").items())
        found = [record["loss"] for record in metrics(here / f"on{number}", "train")]
        assert found == [record["loss"] for record in metrics(here / "whole", "train")][4:]
        assert "nothing to do" in done(*only_one(recipe, *more))
    said = done(*only_one(recipe, "run=bare", "train.start_from=on0/final", "optim.warmup=0", "train.steps=2"))
    assert "on0/final: its weights; AdamW's moments begin at zero" in said
    assert metrics(here / "bare", "eval")[0]["loss"] == metrics(here / "on0", "eval")[-1]["loss"]


def test_a_start_of_something_else_is_refused_with_the_difference(world, recipe, here):
    one = [recipe, "train.steps=1"]
    done(*one, "run=first")
    again = [*one, "run=second"]
    others = {
        "lora.r=8": "has another LoRA: r: 4 there, 8 here; give the same",
        "lora=null": "trained a LoRA, but this recipe trains every weight",
        "lora.alpha=9": "has another LoRA: lora_alpha: 8",
        "lora.targets=[q_proj]": "has another LoRA: target_modules: [",
        "model.adapter=first/final": "was trained on a trunk with fingerprint",
    }
    for start, tried in (("first", 5), ("first/final", 2), ("first/checkpoints/step-000001", 2)):
        for other, said in [*others.items()][:tried]:
            assert said in refused(*again, f"train.start_from={start}", other)
    for nothing in ("nowhere", "first/best", "d.jsonl"):
        assert refused(*again, f"train.start_from={nothing}").startswith(f"train.start_from: {nothing} has no weights")
    assert not (here / "second").exists()
    scores = world.preferences(here / "reward.yaml", reward, train={"steps": 1})
    said = refused(scores, "run=scores", "model.chat_template=turns.jinja", "train.start_from=first", stage=reward)
    assert said.startswith(
        "train.start_from: first/checkpoints/step-000001 has no head that scores, but this stage trains one"
    )


@pytest.mark.slow
def test_every_stage_starts_from_another_run_of_it(world, recipe, here):
    """SFT's LoRA under DPO, with the trunk as its reference; whole weights; a head with its labels."""
    short = {"steps": 2, "save_every": 1, "eval_every": None}
    done(recipe, "run=sft", "train.steps=1")
    pairs = world.preferences(here / "dpo.yaml", dpo, train=short, model={"chat_template": "turns.jinja"})
    done(pairs, "run=dpo", "train.start_from=sft", stage=dpo)
    eval_there = metrics(here / "dpo", "eval")[0]
    assert eval_there["loss"] != pytest.approx(0.6931, abs=1e-4)  # the policy is ahead of its reference, the bare trunk
    done(recipe, "run=all", "lora=null", "train.steps=1")
    done(recipe, "run=all2", "lora=null", "train.steps=1", "train.start_from=all/final")
    assert metrics(here / "all2", "eval")[0]["loss"] == pytest.approx(metrics(here / "all", "eval")[-1]["loss"], 1e-5)
    rows = [
        {"text": f"a {word} {i}", "label": label} for i in range(4) for word, label in (("x", "ham"), ("y", "spam"))
    ]
    write_rows(here / "c.jsonl", rows)
    data = {"train": [{"path": "c.jsonl"}], "eval": {"sources": []}}
    labels = world.recipe(here / "c.yaml", stage="classify", data=data, train=short)
    done(labels, "run=c", stage=classify)
    done(labels, "run=c2", "train.start_from=c/final", stage=classify)
    said = refused(labels, "run=c4", "train.start_from=c", "classify.labels=[spam, ham]", stage=classify)
    assert "has the labels ['ham', 'spam'], but this run has ['spam', 'ham']" in said
