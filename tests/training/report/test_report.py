"""The report shows what the run folder holds, runs nothing, and needs no network."""

from __future__ import annotations

import json
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from align.recipe.records import to_json
from align.training.report import plots
from align.training.report.classification_plots import _unit_panel
from align.training.report.page import write_report
from align.training.report.panels import Metrics
from align.training.report.plots import amount, change, duration, running_mean, size, thinned, value
from align.training.telling import Page as Page_

EVIL = "<script>alert('row')</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.pieces))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags nest"

    def handle_data(self, data):
        if "style" not in self.open:
            self.pieces.append(data)


def report(run: Path) -> Page:
    html = write_report(run).read_text("utf-8")
    page = Page(html)
    assert not page.open, "every tag is closed"
    return page


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def train(step: int, split: str = "train", **metrics: float) -> dict:
    return {"step": step, "split": split, **metrics}


evaluation = partial(train, split="eval")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run of two steps."""
    run = tmp_path / "chat"
    run.mkdir()
    (run / "recipe.yaml").write_text("stage: sft\nmodel: {base: demo/tiny}\noptim: {learning_rate: 3.0e-4}\n")
    (run / "environment.json").write_text('{"python": "3.11.0", "versions": {"torch": "2.6", "trl": null}}')
    metrics = [
        evaluation(0, loss=3.0, perplexity=20.0),
        train(1, loss=2.75, learning_rate=1e-4, grad_norm=0.5, tokens_per_second=100.0, tokens_seen=1000),
        train(2, loss=2.5, learning_rate=2e-4, grad_norm=0.75, tokens_per_second=300.0),
        evaluation(2, loss=2.0, perplexity=8.125, accuracy=0.625),
        evaluation(2, **{"margins/chosen": 1.5, "margins/rejected": -1.25}),
    ]
    lines(run / "metrics.jsonl", metrics)
    cost = {"tokens_seen": 1_234_567, "train_seconds": 200, "peak_memory_bytes": 3 * 2**29, "mfu": None}
    (run / "summary.json").write_text(json.dumps(cost))
    ledger = [
        {"file": "a.jsonl", "line": 7, "action": "drop", "reason": "1,043 tokens, most 1,024"},
        {"file": "a.jsonl", "line": 9, "action": "drop", "reason": "2000 tokens, most 1,024"},
        {"file": "a.jsonl", "line": 11, "action": "truncate", "reason": EVIL},
    ]
    lines(run / "ledger.jsonl", ledger)
    lengths = {"edges": [0, 64, 128], "counts": [30, 12]}
    split = {"examples": 42, "tokens": 54_321, "trained_tokens": 9_876, "lengths": lengths}
    (run / "data.json").write_text(json.dumps({"train": split, "summary": ["3 exact duplicates kept."]}))
    said = [f"before {EVIL}", "midway", "after: 你好"]
    answers = [{"step": i, "prompt": f"Hello {EVIL}", "response": text} for i, text in enumerate(said)]
    lines(run / "samples.jsonl", answers)
    return run


def test_numbers_shown_are_those_of_the_metrics(run):
    text = report(run).text
    assert "Eval perplexity 20 → 8.125 −59.4 %, step 0 → 2" in text
    assert "Train loss 2.5 at step 2; 2.75 at step 1" in text
    assert "Tokens per second 200 per device, median; 300 at step 2" in text
    assert "Tokens seen 1.23 M" in text
    assert "Time in training steps 3 min 20 s" in text
    assert "utilisation" not in text  # unknown, so not told
    assert "Peak memory 1.5 GiB" in text
    assert "Perplexity on the held-out rows fell from 20 to 8.125." in text
    assert "standard deviation of 0.125 over the first 100 steps" in text
    assert "Spikes are looked for after 128 logged losses; this run has 2." in text


def test_every_other_metric_is_drawn_and_told(run):
    page = report(run)
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    starts = ["Loss by", "Perplexity by", "Accuracy by", "Learning rate by", "Gradient norm by"]
    starts += ["Tokens per second per device by", "Margins by", "Tokens in one train example"]
    assert [label[: len(start)] for label, start in zip(labels, starts, strict=True)] == starts
    assert "train: 2.75 at step 1 → 2.5 at step 2" in labels[0]
    assert "eval: 3 at step 0 → 2 at step 2" in labels[0]
    assert "chosen, eval: 1.5 at step 2. rejected, eval: -1.25 at step 2" in labels[6]
    assert "42 examples of 0 to 128 tokens; most, 30, have 0 to 64" in labels[7]


def test_how_far_a_run_is_stands_on_its_page(run):
    """A page of a run that goes on is written anew only after a while; later ones say how it ended."""
    assert "goes on" not in report(run).text
    loop = SimpleNamespace(
        session=SimpleNamespace(first=True), run=SimpleNamespace(folder=run), step=3, plan=SimpleNamespace(steps=9)
    )
    page = Page_()
    page.refresh(loop)
    assert "goes on" not in (run / "report.html").read_text("utf-8"), "a moment has not passed"
    page.written -= 100
    page.refresh(loop)
    assert "This run goes on: this page is of step 3 of 9, 20" in (run / "report.html").read_text("utf-8")
    loop.step = 4
    page.refresh(loop)
    assert "of step 3 of 9" in (run / "report.html").read_text("utf-8")
    page.write(loop, "The run is finished: 9 steps.")
    text = (run / "report.html").read_text("utf-8")
    assert "The run is finished: 9 steps." in text
    assert "goes on" not in text
    assert {path.name for path in run.iterdir()} >= {"report.html"}
    assert not list(run.glob(".writing-*"))


def test_answers_to_held_out_prompts_are_shown_before_and_after(run):
    """The first answer to each prompt, with the row's own and its scores; each figure of answers has a plot."""
    rows = [
        {"step": step, "prompt": f"Q{i} {EVIL}", "sample": sample, "response": f"A{i}-{step}-{sample}"}
        | {"reference": f"R{i}" if i else None, "scores": {"exact_match": 0.125 * step, "gold": None}}
        for step in (0, 2, 4)
        for i in range(25)
        for sample in (0, 1)
    ]
    lines(run / "answers.jsonl", [*rows, {"step": 4}, {"prompt": 3, "step": 4}])
    figures = {"generate/exact_match": 0.25, "generate/exact_match_low": 0.125, "generate/exact_match_high": 0.5}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(4, **figures, **{"generate/response_tokens": 7.0})) + "\n")
    page = report(run)
    assert "The first 20 of 25 prompts" in page.text
    for shown in ("A0-0-0", "A19-4-0", "R19", "Before training", "After step 4", "exact_match 0.5", "gold –"):
        assert shown in page.text, shown
    for hidden in ("A0-2-0", "A0-0-1", "A20-0-0"):
        assert hidden not in page.text, hidden
    assert "script" not in [tag for tag, _ in page.tags]
    assert "Answers: exact match 0.25 95 % interval 0.125 to 0.5; step 4" in page.text
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert [label for label in labels if label.startswith("Answers: ")] == [
        "Answers: exact match by step. eval: 0.25 at step 4; 95 % interval at the end 0.125 to 0.5",
        "Answers: response tokens by step. eval: 7 at step 4",
    ]


def preferred(step: int, **metrics) -> dict:
    """An evaluation of pairs with its lists, as the reward stage writes it."""
    return evaluation(step, margin=0.1 * step, margin_edges=[-1.0, 0.0, 2.5], **metrics)


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    """Pairs, evaluated three times."""
    at_start = {"calibration_confidence": [0.55, None], "calibration_accuracy": [0.25, None]}
    at_end = {"calibration_confidence": [0.6, 0.9375], "calibration_accuracy": [0.5, 1.0]}
    rows = [
        preferred(0, accuracy=0.5, accuracy_low=0.25, accuracy_high=0.75, margin_share=[0.5, 0, 0.5, 0], **at_start),
        preferred(4, accuracy=0.625, accuracy_low=0.4, accuracy_high=0.8, margin_share=[1, 0, 0, 0], **at_start),
        preferred(8, accuracy=0.875, accuracy_low=0.75, accuracy_high=0.9, margin_share=[0, 0.25, 0, 0.75], **at_end),
    ]
    lines(tmp_path / "metrics.jsonl", rows)
    return tmp_path


def test_pairs_are_told_with_their_interval_margins_and_calibration(preferences):
    page = report(preferences)
    assert "Eval accuracy 50.0 % → 87.5 % 95 % interval 75.0 % to 90.0 %; step 8" in page.text
    assert "Of the held-out pairs 87.5 % are ranked rightly (95 % interval 75.0 % to 90.0 %)." in page.text
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert [label.partition(".")[0] for label in labels] == [
        "Accuracy by step",
        "Margin by step",
        "Margin: shares of the eval rows",
        "Calibration: how often right, by how sure",
    ]
    assert "highest 0.875 at 8; 95 % interval at the end 0.75 to 0.9" in labels[0]
    assert "step 0: 50.0 % below 0; most, 50.0 %, below -1." in labels[2]
    assert "step 8: 25.0 % below 0; most, 75.0 %, from 2.5 on" in labels[2]
    assert "step 4" not in labels[2]
    assert "step 0: 25.0 % right where 55.0 % sure." in labels[3]
    assert "step 8: 50.0 % right where 60.0 % sure, 100.0 % right where 93.8 % sure" in labels[3]


def test_an_interval_that_holds_chance_is_told(tmp_path):
    lines(tmp_path / "metrics.jsonl", [preferred(0, accuracy=0.5, accuracy_low=0.25, accuracy_high=0.75)])
    assert "(95 % interval 25.0 % to 75.0 %), which does not rule out chance." in report(tmp_path).text


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (1.75, "became less likely: -1.25 to -1.75 nats a token (rejected: -2 to -2.5)"),
        (1.0, "became more likely: -1.25 to -1 nats a token (rejected: -2 to -2.5)"),
        (1.25, None),
    ],
)
def test_a_likelihood_of_chosen_answers_that_falls_is_told_in_words(tmp_path, end, said):
    rows = [
        evaluation(step, **{"nll_per_token/chosen": chosen, "nll_per_token/rejected": rejected})
        for step, chosen, rejected in ((0, 1.25, 2.0), (5, 0.5, 9.0), (9, end, 2.5))
    ]
    lines(tmp_path / "metrics.jsonl", rows)
    text = report(tmp_path).text
    assert (f"The chosen answers of the held-out rows {said}" in text) if said else ("became" not in text)
    assert ("leaves both kinds of answers behind" in text) == (end > 1.25)


BROKEN = [
    {"margin_share": []},
    {"margin_share": [0.5, 0.5]},
    {"margin_share": "half", "margin_edges": {"a": 1}},
    {"margin_share": [None] * 4, "calibration_confidence": [0.5]},
    {"margin_share": [0.25, 0.25, 0.25, 0.25], "margin_edges": [1.0]},
    {"calibration_confidence": [0.5, 0.75], "calibration_accuracy": [1.0]},
    {"calibration_confidence": [None], "calibration_accuracy": [float("nan")]},
    {"class_f1": [0.5, None], "margin_share": [[1.0], [2.0]]},
]


@pytest.mark.parametrize("entries", BROKEN, ids=str)
def test_lists_that_do_not_fit_together_stop_no_report(preferences, entries):
    with (preferences / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(preferred(9, loss=0.25) | entries) + "\n")
    page = report(preferences)
    assert "eval: 0.25 at step 9" in page.text
    assert not re.search(r"\b(nan|inf)\b", write_report(preferences).read_text("utf-8"))


def test_data_ledger_samples_recipe_and_environment_are_told(run):
    text = report(run).text
    assert "train 42 54,321 9,876" in text
    assert "3 exact duplicates kept." in text
    assert "drop N tokens, most N 2 " in text
    assert "a.jsonl 7 drop 1,043 tokens, most 1,024" in text
    assert "After step 2 after: 你好" in text
    assert "midway" not in text
    assert "learning_rate: 3.0e-4" in text
    assert "Stage sft, base model demo/tiny" in text
    assert "torch 2.6, trl –" in text


def test_what_a_row_holds_is_shown_and_never_run(run):
    (run / "recipe.yaml").write_text(f"stage: '{EVIL.replace(chr(39), '')}'\n")
    (run / "environment.json").write_text(json.dumps({EVIL: [EVIL]}))
    (run / "data.json").write_text(json.dumps({"summary": [EVIL]}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(train(3, **{EVIL: 1.0, "$x^{": 2.0, '"><b>/y': 3.0})) + "\n")
    page = report(run)
    assert not {"script", "img", "b"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert f"Hello {EVIL}" in page.text
    assert page.text.count("<script>alert(") >= 7


def test_the_page_needs_no_network(run):
    html = write_report(run).read_text("utf-8")
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)", html)
    page = Page(html)
    refers = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "xlink:href") if name in attrs]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert {target[0] for target in refers} <= {"#"}
    assert {target[1:] for target in refers} | set(re.findall(r"url\(#(\w+)\)", html)) == set(ids)
    assert len(ids) == len(set(ids)), "plots do not share ids"


def test_the_same_folder_gives_the_same_page_and_nothing_else(run):
    first, before = write_report(run).read_bytes(), set(run.iterdir())
    assert write_report(run).read_bytes() == first
    assert set(run.iterdir()) == before
    (run / "metrics.jsonl").write_text(json.dumps(train(1, loss=9.0)) + "\n")
    assert write_report(run).read_bytes() != first


@pytest.mark.parametrize(
    "missing",
    ["recipe.yaml", "environment.json", "metrics.jsonl", "ledger.jsonl", "data.json", "samples.jsonl"],
)
def test_each_file_may_be_missing_or_torn(run, missing):
    (run / missing).write_bytes((run / missing).read_bytes()[:-9])
    report(run)
    (run / missing).unlink()
    told = report(run).text
    marks = {"recipe.yaml": "3.0e-4", "metrics.jsonl": "8.125", "samples.jsonl": "你好"}
    assert {file for file, mark in marks.items() if mark not in told} == marks.keys() & {missing}


def test_files_of_another_shape_stop_no_report(run):
    (run / "summary.json").write_text("[1]")
    (run / "classification.json").write_text('{"labels": []}')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "split": "train", "loss": 1' + "0" * 400 + "}\n")
    assert "classification.json is not as align writes it, and is left out." in report(run).text


def test_an_empty_run_still_gives_a_page(tmp_path):
    assert "No metrics yet." in report(tmp_path).text
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text("stage: [unclosed")
    assert "stage: [unclosed" in report(tmp_path).text


def test_a_torn_last_line_is_passed_over_and_a_torn_one_amid_is_told(run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 3, "split": "train", "loss": 777, "note": "你'.encode()[:-1])
    text = report(run).text
    assert "777" not in text
    assert "could not be read" not in text
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps(train(4, loss=2.25)) + "\n")
    text = report(run).text
    assert "Train loss 2.25 at step 4" in text
    assert "Lines of metrics.jsonl that could not be read, and are left out: 1." in text


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path):
    lines(
        tmp_path / "metrics.jsonl",
        [train(s, loss=float(s)) for s in (1, 2, 3, 2, 3, 4)] + [train(3, loss=0.5)],
    )
    curve = Metrics.read(tmp_path / "metrics.jsonl").curve("train", "loss")
    assert curve.steps.tolist() == [1, 2, 3, 4]
    assert curve.values.tolist() == [1, 2, 0.5, 4]


def test_numbers_that_are_not_finite_are_told_and_not_drawn(tmp_path):
    rows = [train(s, loss=loss) for s, loss in enumerate([2.0, float("nan"), 1.0, float("inf")])]
    rows += [evaluation(0, perplexity=9.0), evaluation(3, perplexity=float("inf")), train(3, kl=float("nan"))]
    (tmp_path / "metrics.jsonl").write_text("".join(to_json(row) + "\n" for row in rows))  # as null
    page = report(tmp_path)
    assert "Eval perplexity 9 → not a number step 0 → 3" in page.text
    assert "Train loss not a number at step 3; 2 at step 0" in page.text
    assert "Train losses that are not finite: 2, the first at step 1." in page.text
    assert "train: 2 at step 0 → 1 at step 2; lowest 1 at 2, highest 2 at 0; 2 not finite, not drawn" in page.text
    assert "train: 1 not finite, not drawn" in page.text
    assert [tag for tag, _ in page.tags].count("svg") == 2  # loss and perplexity; kl has nothing to draw
    assert not re.search(r"\b(nan|inf)\b", write_report(tmp_path).read_text("utf-8"))


def test_a_ledger_of_many_reasons_counts_those_it_does_not_list(tmp_path):
    lines(
        tmp_path / "ledger.jsonl",
        [{"action": "drop", "reason": "x" * n} for n in range(60) for _ in range(3)],
    )
    text = report(tmp_path).text
    assert "dropped, cut or repaired: 180 entries" in text
    assert "10 rarer reasons 30" in text


def test_half_a_surrogate_pair_in_a_row_does_not_stop_the_report(tmp_path):
    (tmp_path / "ledger.jsonl").write_text('{"file": "a", "line": 1, "action": "drop", "reason": "bad \\ud83d end"}\n')
    assert "bad ? end" in report(tmp_path).text


def test_a_spike_is_named(tmp_path):
    losses = [2.0 + 0.01 * (-1) ** step for step in range(1, 201)]
    losses[149] = 5.0
    lines(tmp_path / "metrics.jsonl", [train(step, loss=loss) for step, loss in enumerate(losses, 1)])
    assert "Loss spikes (above mean + 6 sigma of the 128 logged before) at steps 150." in report(tmp_path).text


def test_long_curves_are_thinned_and_keep_their_ends_and_spikes():
    steps = np.arange(100_000)
    values = np.sin(steps / 5000)
    values[[31_234, 77_777]] = 50.0, -50.0
    few, kept = thinned(steps, values)
    assert len(few) <= 2000
    assert (values[few] == kept).all()
    assert (np.diff(few) > 0).all()
    assert {31_234, 77_777} <= set(few.tolist())
    assert thinned(steps[:2000], values[:2000])[0].tolist() == steps[:2000].tolist()


def test_a_long_run_gives_a_page_of_bounded_size(tmp_path):
    rng = np.random.default_rng(0)
    lines(tmp_path / "metrics.jsonl", [train(s, loss=float(x)) for s, x in enumerate(rng.normal(size=20_000))])
    assert len(write_report(tmp_path).read_bytes()) < 300_000


def test_running_mean_by_hand():
    assert running_mean(np.array([1.0, 2.0, 6.0, 4.0]), 1).tolist() == [1.5, 3.0, 4.0, 5.0]


WRITTEN = [
    (amount, "0 | 9,999 | 10 k | 1 M | 1.23 M | 2.5 G", [0, 9_999, 10_000, 999_999, 1_234_567, 2.5e9]),
    (value, "0.1235 | 12,346 | 5e-05 | minus infinite", [0.123456, 12345.6, 5e-5, float("-inf")]),
    (duration, "0.25 s | 59 s | 3 min 20 s | 1 h 0 min | 2 d 2 h", [0.25, 59, 200, 3599.9, 180_000]),
    (size, "0 B | 512 B | 1 MiB | 2.25 GiB", [0, 512, 2**20, 2.25 * 2**30]),
    (lambda pair: change(*pair), "−75.0 % | +25.0 % | +50.0 % | ", [(20, 5), (4, 5), (-2, -1), (0, 1)]),
]


@pytest.mark.parametrize(("write", "expected", "numbers"), WRITTEN)
def test_numbers_are_written_for_people(write, expected, numbers):
    assert " | ".join(map(write, numbers)) == expected


def test_a_drawing_does_not_depend_on_those_before_it():
    """Though all are drawn in the same axes."""
    draws = np.random.default_rng(1)
    long, short = np.arange(300), np.arange(3) * 50
    band = plots.Curve("band", short, draws.normal(size=3), True, draws.normal(size=(3, 2)))
    sure = {1: np.array([[0.5, 0.6], [0.9, 0.8]]), 5: np.array([[0.55, 0.6], [0.95, 0.8]])}
    shares = {0: np.array([0.1, 0.2, 0.3, 0.1, 0.2, 0.1]), 4: np.array([0.1, 0.1, 0.3, 0.2, 0.2, 0.1])}
    made = [
        lambda: plots.curves_panel("small", [plots.Curve("small", short, 1e-9 * draws_of(3))]),
        lambda: plots.shares_panel("shares", np.array([-3.0, -1, 0, 1, 3]), shares),
        lambda: plots.curves_panel("two", [plots.Curve("large", long, 1e6 + draws_of(300).cumsum()), band]),
        lambda: plots.histogram_panel("histogram", [0, 10, 20, 30.5], [3, 400, 5]),
        lambda: plots.calibration_panel("calibration", sure),
        lambda: plots.curves_panel("one", [plots.Curve("one", np.array([4]), np.array([2.0]))]),
        lambda: _unit_panel("unit", "x", "y", {"one": (short / 100, short / 100)}, diagonal=True, dots=True),
    ]

    def draws_of(count):
        return np.random.default_rng(0).normal(size=count)

    alone = []
    for panel in made:
        plots._axes.cache_clear()
        alone.append(panel())
    for order in (range(7), reversed(range(7)), [2, 4, 0, 6, 1, 3, 5]):
        assert all(made[i]() == alone[i] for i in order)
