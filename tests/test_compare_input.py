"""What a comparison refuses: by file and line, all at once, with nothing written or lost."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from evaluations import evaluated, recipe, rows_of, trained, write_rows

from align.compare import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs."""
    root = tmp_path_factory.mktemp("runs")
    return {name: evaluated(root / name, kl=4, training=trained(name[:3])) for name in ("dpo4", "ppo4")}


def refused(capsys, argv: list[str]) -> list[str]:
    """The problems that are told, with status 2 and nothing written."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told.splitlines()


def broken(folder: Path, number: int, change) -> None:
    lines = (folder / "responses.jsonl").read_text().splitlines()
    lines[number - 1] = change(lines[number - 1])
    (folder / "responses.jsonl").write_text("\n".join(lines) + "\n")


def told_otherwise(folder: Path, **about) -> None:
    page = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps(page | about))


def without(key: str):
    return lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != key})


WRONG = {
    "torn line": (lambda f: broken(f, 7, lambda line: line[:40]), "responses.jsonl:7: this is not a line of JSON"),
    "no key": (lambda f: broken(f, 3, without("tokens")), "responses.jsonl:3: tokens: field required"),
    "nan": (
        lambda f: broken(f, 2, lambda s: re.sub(r'"gold": [^,]+', '"gold": NaN', s)),
        "2: scores.gold: input should",
    ),
    "infinite": (
        lambda f: broken(f, 2, lambda s: re.sub(r'"logprob": [^,]+', '"logprob": -Infinity', s)),
        "2: logprob:",
    ),
    "twice": (lambda f: broken(f, 2, lambda s: s.replace('"sample": 1', '"sample": 0')), "already stands on line 1"),
    "other trunk": (lambda f: told_otherwise(f, fingerprint="other"), "its trunk (fingerprint other) is not that of"),
    "other tokenizer": (lambda f: told_otherwise(f, tokenizer="other"), "its tokenizer (hash other) is not that"),
    "other prompts": (lambda f: told_otherwise(f, prompts="other"), "the hash of its prompts differs"),
    "other key": (lambda f: broken(f, 1, lambda s: s.replace("key0", "keyX")), "prompt 0 differs from that of"),
    "fewer": (lambda f: write_rows(f, rows_of(f)[:-4]), "59 prompts, but"),
    "no sample": (lambda f: write_rows(f, rows_of(f)[:1] + rows_of(f)[2:]), "sample 1 of prompt 0 is missing"),
    "a gap": (lambda f: write_rows(f, rows_of(f)[:4] + rows_of(f)[8:]), "prompt 1 has no answer"),
    "nothing": (lambda f: write_rows(f, []), "there are no answers in it"),
    "no answers": (lambda f: (f / "responses.jsonl").unlink(), "no responses.jsonl in this folder"),
    "no page": (lambda f: (f / "evaluation.json").write_text("{"), "evaluation.json: this is not whole JSON"),
    "a stage's": (lambda f: told_otherwise(f, stage="dpo"), "evaluation.json: stage: input should be 'evaluate'"),
    "no such folder": (shutil.rmtree, "no such folder"),
    "other scores": (
        lambda f: write_rows(f, [row | {"scores": {"quality": 1.0}} for row in rows_of(f)]),
        "no score 'gold'; its scores are: quality",
    ),
    "another score of that name": (
        lambda f: told_otherwise(f, scores={"gold": "the function my:rule (1)"}),
        "its score 'gold' is the function my:rule (1), but that of",
    ),
    "half written": (
        lambda f: (f / "evaluation.json").unlink(),
        "no evaluation.json in this folder; name the run folder",
    ),
    "judge down": (
        lambda f: write_rows(f, [row | {"scores": {"gold": None}} for row in rows_of(f)]),
        "every 'gold' score is null",
    ),
}


class TestWrongInput:
    @pytest.mark.parametrize(("spoil", "told"), WRONG.values(), ids=WRONG)
    def test_a_folder(self, spoil, told, runs, tmp_path, capsys):
        folder = shutil.copytree(runs["dpo4"], tmp_path / "spoilt")
        spoil(folder)
        problems = refused(capsys, recipe(tmp_path / "c.yaml", runs["ppo4"], folder))
        assert len(problems) == 1
        assert str(folder) in problems[0]
        assert told in problems[0]
        assert not (tmp_path / "c").exists()

    def test_all_problems_of_all_folders_are_told_at_once(self, runs, tmp_path, capsys):
        folders = [shutil.copytree(runs["dpo4"], tmp_path / name) for name in ("a", "b")]
        write_rows(folders[0], [row | {"tokens": -1} for row in rows_of(folders[0])])
        broken(folders[1], 5, without("key"))
        problems = refused(capsys, recipe(tmp_path / "c.yaml", *folders))
        assert [problem.split(": ")[0] for problem in problems] == [
            *(f"{folders[0]}/responses.jsonl:{line}" for line in (1, 2, 3)),
            f"{folders[0]}/responses.jsonl",
            f"{folders[1]}/responses.jsonl:5",
        ]
        assert "237 more like these" in problems[3]

    def test_a_score_that_no_run_has(self, runs, tmp_path, capsys):
        argv = recipe(tmp_path / "c.yaml", runs["dpo4"], runs["ppo4"], score="golden", proxy="proxy")
        assert refused(capsys, argv) == ["compare: no run has a score 'golden'; their scores are: gold, proxy"]

    def test_a_proxy_that_is_the_score(self, runs, tmp_path, capsys):
        (told,) = refused(capsys, recipe(tmp_path / "c.yaml", runs["dpo4"], runs["ppo4"], proxy="gold"))
        assert "c.yaml:" in told
        assert "`proxy` is the same as `score`" in told

    def test_two_runs_of_one_name(self, runs, tmp_path, capsys):
        (told,) = refused(
            capsys, recipe(tmp_path / "c.yaml", runs["dpo4"], {"path": str(runs["dpo4"]), "name": "dpo4"})
        )
        assert "both are called 'dpo4'" in told

    def test_the_same_run_twice(self, runs, tmp_path, capsys):
        """Once more by another way of writing it, in another group; with names of its own it may be."""
        again = {"path": [f"{runs['dpo4']}/../dpo4"], "group": "other"}
        (told,) = refused(capsys, recipe(tmp_path / "c.yaml", runs["dpo4"], runs["ppo4"], again))
        assert told == f"compare.runs: {runs['dpo4']} is there twice; leave one out, or give each a name"

    def test_a_kill_before_its_first_file_leaves_a_folder_to_go_on_in(self, runs, tmp_path):
        argv = recipe(tmp_path / "c.yaml", runs["dpo4"], runs["ppo4"])
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / ".writing-recipe.yaml").write_text("stage: com")
        main(argv)
        assert (tmp_path / "c" / "compare.json").is_file()

    def test_a_reader_that_has_left(self, runs, tmp_path, monkeypatch):
        """What is to be written is written; nobody is told of it."""

        class Gone(io.StringIO):
            def write(self, text):
                raise BrokenPipeError

        monkeypatch.setattr(sys, "stdout", Gone())
        main(recipe(tmp_path / "c.yaml", *runs.values()))
        assert (tmp_path / "c" / "compare.json").is_file()

    def test_one_run_alone(self, runs, tmp_path, capsys):
        assert "name two or more" in refused(capsys, recipe(tmp_path / "c.yaml", runs["dpo4"]))[0]

    def test_a_recipe_is_checked_with_its_lines(self, runs, tmp_path, capsys):
        argv = recipe(tmp_path / "c.yaml", {"path": [str(runs["dpo4"])], "name": "a"}, "", scores="gold")
        told = refused(capsys, argv)
        assert len(told) == 3
        assert all(re.match(re.escape(argv[0]) + r":\d+: ", line) for line in told)
        assert any("did you mean 'score'?" in line for line in told)

    def test_a_folder_of_something_else_is_left_alone(self, runs, tmp_path, capsys):
        argv = recipe(tmp_path / "c.yaml", runs["dpo4"], runs["ppo4"])
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "report.html").write_text("mine")
        for extra in ([], ["--fresh"]):
            assert "holds files but no comparison" in refused(capsys, [*argv, *extra])[0]
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["report.html"]
        assert (tmp_path / "c" / "report.html").read_text() == "mine"

    def test_another_comparison_is_replaced_only_when_asked(self, runs, tmp_path, capsys):
        argv = recipe(tmp_path / "c.yaml", runs["dpo4"], runs["ppo4"])
        main(argv)
        before = (tmp_path / "c" / "compare.json").read_bytes()
        other = [*argv, "seed=5"]
        assert "holds another comparison" in refused(capsys, other)[0]
        assert (tmp_path / "c" / "compare.json").read_bytes() == before
        main([*other, "--fresh"])
        assert (tmp_path / "c" / "compare.json").read_bytes() != before
