"""The classifier from its command: what it trains, tells and leaves, on models of some 40,000 weights."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
)
from world import Child, Told, in_two, lines, metrics, tree, weights, write_rows
from world import align as world_align

from align import classify
from align.classify import class_weights, loss
from align.training.labelling.classifier import Classifier
from align.training.labelling.measures import threshold_of_best_f1
from align.training.loop import Loop
from align.training.report.classification_plots import classification_section

ROWS = [
    {"label": "spam" if said == "Name" else "ham", "text": f"{said} the {thing} {n}"}
    for n in range(12)
    for said in ("Name", "Say")
    for thing in ("capital", "city")
]
SHARES = {"labels": ["ham", "spam"], "test": {"fraction": 0.25}}


def align(*argv: object, stdin: str = "") -> Told:
    """Run `align.classify` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        return world_align(*argv, stage=classify)


def recipe(world, path: Path, rows: list[Any] = ROWS, **sections: Any) -> Path:
    """A recipe of 12 short steps beside its run folder, on `rows`, to be run in that folder."""
    write_rows(path.parent / "rows.jsonl", rows)
    data = {"train": [{"path": "rows.jsonl"}], "eval": {"fraction": 0.25}} | sections.pop("data", {})
    section = SHARES | sections.pop("classify", {})
    return world.recipe(path, stage="classify", run="run", data=data, classify=section, **sections)


def predicted(final: Path, *argv: object, stdin: str = "") -> list[dict[str, str]]:
    told = align("--predict", final, *argv, stdin=stdin)
    assert told.status == 0, told.err
    return list(csv.DictReader(io.StringIO(told.out)))


def flat(run: Path) -> list[float]:
    """All numbers of metrics.jsonl that two equal runs agree on, in order."""
    values = [value for record in metrics(run) for _, value in sorted(record.items())]
    return [x for value in values for x in (value if isinstance(value, list) else [value]) if not isinstance(x, str)]


@pytest.fixture(scope="module")
def run(world, cache, tmp_path_factory):
    """A finished run with a threshold."""
    folder = tmp_path_factory.mktemp("classify")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        patch.chdir(folder)
        told = align(recipe(world, folder / "r.yaml", classify={"precision": 0.9}))
    assert told.status == 0, told.err
    return folder / "run"


# -- training --------------------------------------------------------------------------------------------------


def test_it_learns_and_ends_with_a_record_of_the_test_rows(run):
    records = lines(run / "metrics.jsonl")
    before, after = (r for r in records if r["split"] == "eval" and r["step"] in (0, 12))
    assert before["accuracy"] < 0.9 < after["accuracy"]
    last = records[-1]
    assert (last["split"], last["step"], last["examples"]) == ("test", 12, 12)
    assert last["accuracy"] > 0.9
    assert last["f1"] > 0.9
    assert {"precision", "recall", "auroc", "auprc", "macro_f1", "calibration_error", "threshold_f1"} <= set(last)


def test_eval_figures_agree_with_those_of_the_gathered_scores(run):
    last = metrics(run, "eval")[-1]
    side = json.loads((run / "classification.json").read_text())["splits"]["eval"]
    assert last["accuracy"] == side["figures"]["accuracy"]
    assert last["macro_f1"] == pytest.approx(side["figures"]["macro_f1"], rel=1e-12)
    assert np.array(side["confusion"]).sum() == side["examples"] == 12


def test_the_folder_has_all_there_is(run):
    assert set(os.listdir(run)) == {
        "recipe.yaml", "environment.json", "metrics.jsonl", "ledger.jsonl", "data.json", "samples.jsonl",
        "summary.json", "report.html", "checkpoints", "final", "classification.json",
    }  # fmt: skip
    about = json.loads((run / "final" / "align.json").read_text())
    assert (about["stage"], about["labels"], about["max_length"]) == ("classify", ["ham", "spam"], 1024)
    assert 0 < about["threshold"] < 1


def test_figures_do_not_depend_on_the_rows_of_a_batch(world, here, run):
    batch = {"examples": 4, "row_tokens": 16}
    told = align(recipe(world, here / "r.yaml", batch=batch, classify={"precision": 0.9}))
    assert told.status == 0, told.err
    assert flat(here / "run") == pytest.approx(flat(run), rel=2e-3, abs=1e-5)  # sums in another order
    before, after = metrics(here / "run", "eval")[0], metrics(run, "eval")[0]
    assert (before["accuracy"], before["class_f1"]) == (after["accuracy"], after["class_f1"])


def test_a_run_cut_short_goes_on_as_if_nothing_had_happened(world, here, run):
    shutil.copytree(run, here / "run")
    shutil.rmtree(here / "run" / "final")
    for step in (9, 12):
        shutil.rmtree(here / "run" / "checkpoints" / f"step-{step:06}", ignore_errors=True)
    told = align(recipe(world, here / "r.yaml", classify={"precision": 0.9}))
    assert told.status == 0, told.err
    assert metrics(here / "run") == metrics(run)
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(here / "run").items())


def test_every_step_is_taken_in_training_mode(world, here, monkeypatch):
    """Without eval rows, after which the mode is set again, and with a layout that nothing has to be tried for."""
    modes, gradients = [], Loop.gradients

    def watched(loop: Loop, work: list) -> Any:
        modes.append(all(module.training for module in loop.learner.model.modules()))
        return gradients(loop, work)

    monkeypatch.setattr(Loop, "gradients", watched)
    path = recipe(world, here / "r.yaml", data={"eval": {"fraction": 0.0}})
    told = align(path, "model.layout=tree", "train.steps=2", "train.eval_every=null")
    assert told.status == 0, told.err
    assert modes == [True, True]


def test_killed_before_final_is_written_the_test_record_comes_once(world, here, run):
    shutil.copytree(run, here / "run")
    shutil.rmtree(here / "run" / "final")
    told = align(recipe(world, here / "r.yaml", classify={"precision": 0.9}))
    assert told.status == 0, told.err
    assert metrics(here / "run") == metrics(run)


@pytest.mark.slow
def test_two_processes_are_one(world, here, run):
    path = recipe(world, here / "r.yaml", classify={"precision": 0.9})
    first, second = (child.wait() for child in Child.pair(here, 29533, path, stage=classify))
    assert (first.status, second.status, second.out) == (0, 0, ""), first.err + second.err
    assert flat(here / "run") == pytest.approx(flat(run), rel=1e-5, abs=1e-5)
    first, last = metrics(here / "run", "eval")[0], metrics(here / "run", "test")[-1]
    assert first["accuracy"] == metrics(run, "eval")[0]["accuracy"]
    assert last["accuracy"] == metrics(run, "test")[-1]["accuracy"]


# -- what trains -----------------------------------------------------------------------------------------------

TRAINED = {
    "head": r"score\.weight",
    "last_blocks": r"score\.weight|model\.layers\.1\..*|model\.norm\.weight",
    "all": r".*",
}


@pytest.fixture(scope="module", params=TRAINED)
def bare(request, world, cache, tmp_path_factory):
    """What trains without a LoRA, and the run."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        patch.chdir(folder)
        told = align(recipe(world, folder / "r.yaml", lora=None, classify={"train": kind}, train={"steps": 3}))
    assert told.status == 0, told.err
    return kind, folder / "run"


def test_only_what_the_recipe_names_trains(world, bare):
    kind, run = bare
    final, base = weights(run), load_file(world.base / "model.safetensors")
    moved = {name for name, tensor in final.items() if name not in base or not torch.equal(tensor, base[name])}
    assert moved == {name for name in final if re.fullmatch(TRAINED[kind], name)}
    assert set(base) - {"lm_head.weight"} <= set(final)  # a whole model, frozen weights included


def agrees_with_transformers(final: Path) -> None:
    texts = [row["text"] for row in ROWS]
    ours = shares(predicted(final, stdin="\n".join(texts)))
    assert np.abs(ours - stock(final, texts)).max() < 1e-5


def test_without_a_lora_final_gives_the_same_probabilities_with_transformers_alone(bare):
    agrees_with_transformers(bare[1] / "final")


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"lora": None}, "without a LoRA, set `classify.train` to last_blocks, head or all"),
        ({"classify": {"train": "head"}}, "`classify.train: head` trains the base's own weights: set `lora: null`"),
        ({"classify": {"blocks": 1}}, "`blocks` needs `train: last_blocks`"),
        ({"classify": {"labels": ["ham", "ham"]}}, "`labels` needs two or more, each once"),
        ({"classify": {"labels": ["ham "]}}, "`labels` needs two or more, each once"),
        ({"classify": {"test": {"fraction": 0.8}}}, "leave nothing to train on"),
        ({"classify": {"precision": 0.9}, "data": {"eval": {}}}, "needs eval rows to choose the threshold on"),
        ({"classify": {"threshold": "best_f1"}, "data": {"eval": {}}}, "`classify.threshold` needs eval rows"),
        ({"classify": {"threshold": "best_f1", "precision": 0.9}}, "each choose the threshold: give one"),
        ({"log": {"samples": ["Hi"]}}, "a classifier writes no answers"),
    ],
)
def test_settings_that_do_not_fit_together(world, here, sections, complaint):
    told = align(recipe(world, here / "r.yaml", **sections))
    assert told.status == 2
    assert complaint in told.err
    assert not (here / "run").exists()


# -- balance ---------------------------------------------------------------------------------------------------


def test_weights_make_rare_classes_count_as_much():
    weights = class_weights(np.array([30, 10]))
    assert weights.tolist() == pytest.approx([40 / 60, 40 / 20])
    scores = torch.zeros(4, 2)
    batch = type("Batch", (), {"targets": torch.tensor([0.0, 0.0, 0.0, 1.0])})
    trunk = torch.nn.Identity()
    trunk.forward = lambda _: scores
    total, found = loss(trunk, batch, weights, smoothing=0.0)
    assert float(total) == pytest.approx(4 * np.log(2))  # three of 2/3 and one of 2: the weights' mean is 1
    assert found["loss"] == (total, 4)


def test_smoothing_is_the_cross_entropy_with_the_smoothed_target():
    scores, numbers = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1, 0])
    batch = type("Batch", (), {"targets": numbers.float()})
    trunk = torch.nn.Identity()
    trunk.forward = lambda _: scores
    total, _ = loss(trunk, batch, torch.ones(3), smoothing=0.3)
    stock = torch.nn.functional.cross_entropy(scores, numbers, label_smoothing=0.3, reduction="sum")
    assert torch.allclose(total, stock, rtol=1e-6)


def test_an_evaluation_counts_what_f1_is_made_of():
    scores = torch.eye(3)[[0, 0, 1, 1]]  # predicted 0, 0, 1, 1 where 0, 1, 1, 2 is true
    batch = type("Batch", (), {"targets": torch.tensor([0.0, 1.0, 1.0, 2.0])})
    trunk = torch.nn.Identity()
    trunk.forward = lambda _: scores
    assert "class_f1" not in loss(trunk, batch, torch.ones(3), smoothing=0.0)[1]
    with torch.no_grad():
        found = loss(trunk, batch, torch.ones(3), smoothing=0.0)[1]
    assert [part.tolist() for part in found["class_f1"]] == [[2, 2, 0], [3, 4, 1]]
    assert found["accuracy"] == (2, 4)


def test_undersampling_is_told_and_in_the_ledger(world, here):
    rows = ROWS + [{"label": "ham", "text": f"Tell me {n}"} for n in range(30)]
    sections = {"classify": {"balance": "undersample"}, "train": {"steps": 1}}
    told = align(recipe(world, here / "r.yaml", rows, **sections))
    assert "undersampled: 30 rows of the frequent classes are left out" in told.out
    assert len(lines(here / "run" / "ledger.jsonl")) == 30


# -- wrong input -----------------------------------------------------------------------------------------------


FAULTS = [
    ({"text": "hi"}, "rows.jsonl:49: label: expected a label, found nothing"),
    ({"text": "hi", "label": "egg"}, "rows.jsonl:49: label: expected one of ham, spam, found 'egg'"),
    ({"text": "", "label": "ham"}, "rows.jsonl:49: text: expected text, found an empty text"),
    ('{"text": "hi"', "rows.jsonl:49: broken JSON"),
]


@pytest.mark.parametrize(("row", "complaint"), FAULTS)
def test_a_faulty_row_is_one_line(world, here, row, complaint):
    told = align(recipe(world, here / "r.yaml", [*ROWS, row]))
    assert told.status == 2
    assert complaint in told.err
    assert "Traceback" not in told.err


def test_faulty_rows_can_be_dropped(world, here):
    path = recipe(world, here / "r.yaml", [*ROWS, *(row for row, _ in FAULTS)])
    told = align(path, "data.invalid=drop", "train.steps=1")
    assert told.status == 0, told.err
    dropped = lines(here / "run" / "ledger.jsonl")[-len(FAULTS) :]
    for number, ((_, complaint), entry) in enumerate(zip(FAULTS, dropped, strict=True), 49):
        assert entry["line"] == number
        assert complaint.split(": ", 1)[1] in entry["reason"]


def test_wrong_columns_classes_and_bytes_are_told(world, here):
    path = recipe(world, here / "r.yaml")
    for argv, complaint in [
        (["data.train.0.columns={label: verdict}"], "no column 'verdict' to map; it has `label`, `text`"),
        (["data.train.0.columns={lable: label}"], "`columns` maps the unknown 'lable'; did you mean 'label'?"),
        (["classify.labels=[ham, spam, eggs]"], "no row to train on has the label 'eggs'"),
        (["data.train.0.format=alpaca"], "this stage takes no rows of format alpaca; it reads classes"),
    ]:
        told = align(path, *argv)
        assert told.status == 2, told.out
        assert complaint in told.err
    (here / "rows.jsonl").write_bytes(b'{"text": "hi", "label": "ham"}\n{"text": "\xff", "label": "spam"}\n')
    told = align(path)
    assert told.status == 2
    assert "rows.jsonl:2: " in told.err
    assert "UTF-8" in told.err


def test_labels_are_found_in_the_data_and_saved(world, here):
    rows = [{"label": n, "text": f"Say {'Name ' * n}{i}"} for n in (2, 0, 1) for i in range(8)]
    told = align(recipe(world, here / "r.yaml", rows, classify={"labels": None}, train={"steps": 2}))
    assert told.status == 0, told.err
    assert json.loads((here / "run" / "final" / "align.json").read_text())["labels"] == ["0", "1", "2"]
    assert {"f1/0", "f1/1", "f1/2", "macro_f1"} <= set(metrics(here / "run", "test")[-1])


def test_the_best_has_a_threshold_of_its_own_and_every_source_its_figures(world, here):
    """The loss falls, and the greatest is asked for: that after the first step. The run ends an evaluation later."""
    held = [{"label": row["label"], "text": f"{row['text']}, please"} for row in ROWS[:14]]
    sections = {
        "classify": {"threshold": "best_f1"},
        "data": {"eval": {"sources": in_two(here, held, 5)}},
        "train": {"eval_every": 1, "patience": 1, "best": {"metric": "loss/few", "goal": "greatest"}},
    }
    told = align(recipe(world, here / "r.yaml", **sections))
    assert told.status == 0, told.err
    run, abouts = here / "run", {}
    for step, result in enumerate(("best", "final"), 1):
        likely = Classifier(run / result).probabilities([row["text"] for row in held])
        numbers = np.array([row["label"] == "spam" for row in held])
        abouts[result] = about = json.loads((run / result / "align.json").read_text())
        (record,) = (record for record in metrics(run, "eval") if record["step"] == step)
        assert (about["step"], about["labels"]) == (step, ["ham", "spam"])
        assert about["threshold"] == pytest.approx(threshold_of_best_f1(likely[:, 1], numbers).threshold, rel=1e-3)
        of_true = likely[np.arange(len(held)), numbers.astype(int)]
        for title, own in (("", slice(None)), ("/few", slice(5)), ("/more", slice(5, None))):
            assert record[f"loss{title}"] == pytest.approx(-np.log(of_true[own]).mean(), rel=1e-4)
            assert record[f"accuracy{title}"] == pytest.approx((of_true[own] > 0.5).mean())
    assert abouts["best"]["threshold"] != pytest.approx(abouts["final"]["threshold"], rel=1e-2)
    assert abouts["final"]["ended_by"] == {"patience": 1, "of_steps": 12}


def test_show_prints_texts_under_their_labels_and_writes_nothing(world, here):
    told = align(recipe(world, here / "r.yaml"), "--show")
    assert told.status == 0, told.err
    assert "tokens): spam\nName the" in told.out or "tokens): ham\nSay the" in told.out
    assert not (here / "run").exists()


# -- what is left ----------------------------------------------------------------------------------------------


def stock(final: Path, texts: list[str]) -> np.ndarray:
    """(n, C) probabilities by transformers and peft alone, all texts in one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(final)
    adapted = (final / "adapter_config.json").exists()
    config = AutoConfig.from_pretrained(final / "base_config.json" if adapted else final)
    model = AutoModelForSequenceClassification.from_pretrained(final, config=config).eval()
    assert model.config.id2label == {0: "ham", 1: "spam"}
    with torch.no_grad():
        return model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.softmax(-1).numpy()


def shares(rows: list[dict[str, str]]) -> np.ndarray:
    return np.array([[float(row["p_ham"]), float(row["p_spam"])] for row in rows])


def test_final_gives_the_same_probabilities_with_transformers_alone(run):
    agrees_with_transformers(run / "final")


def encoder(here, kind: str) -> None:
    """A masked language model, which brings no pooler and no head."""
    pieces = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *(f"##{piece}" for piece in pieces), "name", "say"]
    sizes = {"bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}}
    sizes["distilbert"] = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    config = AutoConfig.for_model(kind, vocab_size=len(words), **sizes[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForMaskedLM.from_config(config).save_pretrained(here / kind)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(here / kind)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_what_an_encoder_lacks_is_learnt_and_saved(kind, world, here):
    encoder(here, kind)
    sections = {"model": {"base": kind}, "seed": 5}
    told = align(recipe(world, here / "r.yaml", **sections), "train.steps=2")
    assert told.status == 0, told.err
    final, texts = here / "run" / "final", ["say name", "a"]
    found = []
    for seed in (1, 2):  # what is not saved would be drawn
        torch.manual_seed(seed)
        model = AutoPeftModelForSequenceClassification.from_pretrained(final, num_labels=2)
        ids = [AutoTokenizer.from_pretrained(final)(text, return_tensors="pt") for text in texts]
        with torch.no_grad():
            found.append(torch.cat([model.eval()(**each).logits for each in ids]).softmax(-1).numpy())
    assert np.abs(found[0] - found[1]).max() == 0
    assert np.abs(shares(predicted(final, stdin="\n".join(texts))) - found[0]).max() < 1e-5


def test_an_encoder_reads_through_the_same_recipe(world, here):
    encoder(here, "bert")
    sections = {"model": {"base": "bert"}, "lora": None, "classify": {"train": "all"}}
    told = align(recipe(world, here / "r.yaml", **sections), "optim.learning_rate=0.005", "train.steps=60")
    assert told.status == 0, told.err
    assert "padded layout" in told.out
    assert metrics(here / "run", "test")[-1]["accuracy"] > 0.9
    texts = [row["text"] for row in ROWS]
    final = here / "run" / "final"
    assert np.abs(shares(predicted(final, stdin="\n".join(texts))) - stock(final, texts)).max() < 1e-5


# -- predicting ------------------------------------------------------------------------------------------------


def test_predictions_come_a_line_a_row_in_order(run, here):
    texts = [row["text"] for row in ROWS]
    rows = predicted(run / "final", stdin="\n".join(texts) + "\n")
    assert [row["line"] for row in rows] == [str(n) for n in range(1, len(texts) + 1)]
    assert np.mean([row["label"] == truth["label"] for row, truth in zip(rows, ROWS, strict=True)]) > 0.9
    assert shares(rows).sum(1) == pytest.approx(1, abs=2e-6)
    write_rows(here / "rows.jsonl", ROWS)
    (here / "rows.txt").write_text("\n".join(texts))
    (here / "rows.tsv").write_text("".join(f"{row['label']}\t{row['text']}\n" for row in ROWS))
    assert predicted(run / "final", here / "rows.jsonl") == rows
    assert predicted(run / "final", here / "rows.txt") == rows
    assert predicted(run / "final", here / "rows.tsv", "--text", "column2") == rows


def test_a_probability_does_not_depend_on_what_is_asked_with_it(run):
    together = shares(predicted(run / "final", stdin="Name it\nSay the city, and all that is in it\n"))
    alone = [
        shares(predicted(run / "final", stdin=text))[0] for text in ("Name it", "Say the city, and all that is in it")
    ]
    assert np.abs(together - alone).max() < 2e-6


def test_texts_are_cut_where_they_were_in_training(run, here):
    shutil.copytree(run / "final", here / "final")
    about = json.loads((here / "final" / "align.json").read_text())
    (here / "final" / "align.json").write_text(json.dumps(about | {"max_length": 3}))
    ids = AutoTokenizer.from_pretrained(run / "final")("Name the city and all of it")["input_ids"]
    cut = AutoTokenizer.from_pretrained(run / "final").decode(ids[:3])
    rows = predicted(here / "final", stdin=f"Name the city and all of it\n{cut}\nName the city of Say\n")
    assert len(ids) > 3
    assert shares(rows)[0] == pytest.approx(shares(rows)[1], rel=1e-3)
    whole = predicted(run / "final", stdin="Name the city and all of it\n")
    assert shares(whole)[0, 0] != pytest.approx(shares(rows)[0, 0], rel=1e-3)


def test_the_saved_threshold_decides(run, here):
    shutil.copytree(run / "final", here / "final")
    about = json.loads((here / "final" / "align.json").read_text())
    for threshold, label in ((1e-9, "spam"), (1.0, "ham")):
        (here / "final" / "align.json").write_text(json.dumps(about | {"threshold": threshold}))
        rows = predicted(here / "final", stdin="Name the capital 3\nSay the city 4\n")
        assert [row["label"] for row in rows] == [label] * 2


def test_rows_without_text_come_out_without_label(run, here):
    told = align("--predict", run / "final", "--format", "jsonl", stdin="Name it\n\nSay it\n")
    rows = [json.loads(line) for line in told.out.splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3]
    assert (rows[1]["label"], rows[1]["probabilities"]) == (None, None)
    assert rows[0]["probabilities"].keys() == {"ham", "spam"}
    assert told.err == "<stdin>:2: text: expected text, found an empty text\n<stdin>: 1 row without a label\n"


def test_prediction_streams(run, monkeypatch):
    """The first labels are out before the last text is read."""
    from align.training.labelling import predict

    monkeypatch.setattr(predict, "WINDOW", 4)
    seen = []

    class Slow(io.RawIOBase):
        def readable(self):
            return True

    out = io.StringIO()

    def texts():
        for n in range(12):
            seen.append(out.getvalue().count("\n"))
            yield predict.Text(n + 1, f"Name {n}")

    with redirect_stdout(out):
        predict._write(predict.Classifier(run / "final"), texts(), "f", "csv")
    assert seen == [1] * 4 + [5] * 4 + [9] * 4
    assert out.getvalue().count("\n") == 13


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["missing"], "missing has no align.json; give the final/ folder of a finished run"),
        (["final", "nothing.csv"], "nothing.csv: no such file or folder"),
        (["final", "rows.csv"], "rows.csv: no column 'text'; did you mean 'texts'?; it has label, texts"),
        (["other"], "other is the result of align.sft, not of align.classify"),
        (["changed"], "was trained on a trunk with fingerprint 0123"),
    ],
)
def test_what_cannot_be_predicted_with(run, here, argv, complaint):
    shutil.copytree(run / "final", here / "final")
    (here / "rows.csv").write_text("label,texts\nham,hi\n")
    about = json.loads((run / "final" / "align.json").read_text())
    for name, change in (("other", {"stage": "sft"}), ("changed", {"fingerprint": "0123"})):
        shutil.copytree(run / "final", here / name)
        (here / name / "align.json").write_text(json.dumps(about | change))
    told = align("--predict", *argv, stdin="hi\n")
    assert (told.status, told.out) == (2, "")
    assert complaint in told.err
    assert "Traceback" not in told.err


# -- the report ------------------------------------------------------------------------------------------------


def test_the_section_of_the_report_shows_mistakes_as_text(run):
    results = json.loads((run / "classification.json").read_text())
    results["mistakes"] = [
        {"split": "test", "where": "f:3", "text": "<script>win</script>", "label": "ham", "predicted": "spam",
         "probability": 0.987}
    ]  # fmt: skip
    page = classification_section(results)
    assert "&lt;script&gt;win" in page
    assert "<script" not in page
    assert "0.987" in page
    assert page.count("<svg") == 6  # ROC, precision and recall, calibration, of two sides
    assert classification_section({}) == ""


def test_a_finished_run_is_left_alone(world, run, here):
    shutil.copytree(run, here / "run")
    before = tree(here / "run")
    told = align(recipe(world, here / "r.yaml", classify={"precision": 0.9}))
    assert (told.status, tree(here / "run")) == (0, before)
    assert "nothing to do" in told.out
