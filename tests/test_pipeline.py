"""Pipelines: laid together, checked as one, run in forks of one process, skipped by content, taken up after any end."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from world import align, lines, metrics, talk, tree, weights, write_rows

from align import pipeline
from align.recipe.document import Document
from align.recipe.errors import UserError
from align.recipe.load import load_recipe
from align.tools.pipeline.board import Board
from align.tools.pipeline.inputs import digests
from align.tools.pipeline.jobs import Job, Launcher, holders
from align.tools.pipeline.records import Records
from align.tools.pipeline.stages import stages_of
from align.training.runs.removal import HEADER

ROOT = Path(__file__).parents[1]
SHARED = {
    "model": {"base": "base", "dtype": "float32"},
    "lora": {"r": 4, "alpha": 8},
    "batch": {"examples": 4, "row_tokens": 384},
    "train": {"steps": 6, "save_every": 2},
    "log": {"trackers": []},
}
SFT = {"stage": "sft", "data": {"train": [{"path": "talks.jsonl"}]}}
DPO = {"stage": "dpo", "model": {"adapter": "${sft}"}, "data": {"train": [{"path": "pairs.jsonl"}]}}
HELD = SFT["data"] | {"eval": {"fraction": 0.2}}
BOTH = {"dpo": DPO, "sft": SFT}  # each later in the file than what needs it


def written(stages, shared=SHARED, name="both.yaml", **top):
    """A pipeline's recipe in this folder."""
    top = {"run": "runs/both", "accelerate": None} | top
    path = Path(name)
    path.write_text(yaml.safe_dump({"stage": "pipeline", **top, "shared": shared, "stages": stages}, sort_keys=False))
    return path


def stages(path):
    """What the file stands for, by name."""
    return {stage.name: stage for stage in stages_of(Document(path), Path("runs/x"))}


def faults(path):
    with pytest.raises(UserError) as caught:
        stages_of(Document(path), Path("runs/x"))
    return caught.value.problems


def line_of(path, text):
    """`file:line` of the first line that holds a text."""
    return next(f"{path}:{i}" for i, line in enumerate(path.read_text().splitlines(), 1) if text in line)


@pytest.fixture
def folder(world, here):
    """A working folder with the world's files, by relative names, so that folders may be compared."""
    for path in (world.talks, world.pairs):
        shutil.copy(path, path.name)
    Path("base").symlink_to(world.base)
    return here


# -- from the file to stages -------------------------------------------------------------------------------------------


def test_references_order_the_stages_and_become_paths(folder):
    found = stages(written(BOTH))
    assert list(found) == ["sft", "dpo"]
    assert found["dpo"].after == ("sft",)
    assert found["dpo"].recipe.model.adapter == "runs/x/sft/final"
    assert found["dpo"].recipe.run == "runs/x/dpo"
    assert found["dpo"].recipe.lora.r == 4, "what is shared goes into a section beside the stage's own"


def test_a_stage_is_its_file_under_what_is_shared_under_its_own_keys(folder):
    sft = {"stage": "sft", "run": "elsewhere", "seed": 1, "model": {"base": "x"}, "data": {"train": [{"path": "no"}]}}
    Path("sft.yaml").write_text(yaml.safe_dump(sft | {"optim": {"learning_rate": 1, "eps": 1e-6}, "lora": None}))
    own = {
        "recipe": "sft.yaml",
        "each": None,
        "data": {"train": [{"path": "talks.jsonl"}]},
        "optim": {"learning_rate": 3},
    }
    recipe = stages(written({"mine": own}, SHARED | {"seed": 2}))["mine"].recipe
    assert (recipe.stage, recipe.seed, recipe.run, recipe.lora.r) == ("sft", 2, "runs/x/mine", 4)
    assert (recipe.optim.learning_rate, recipe.optim.eps) == (3, 1e-6)
    assert recipe.data.train[0].path == "talks.jsonl"


def test_a_shared_section_is_for_the_stages_that_know_it(folder):
    path = written(BOTH, SHARED | {"dpo": {"beta": 0.7}})
    assert stages(path)["dpo"].recipe.dpo.beta == 0.7
    path = written(BOTH, SHARED | {"opitm": {}, "run": "x"})
    assert faults(path) == (
        f"{line_of(path, 'opitm')}: unknown key 'opitm' in shared; did you mean 'optim'?",
        f"{line_of(path, '  run: x')}: 'run' is each stage's own and cannot be shared",
    )


def test_a_sweep_is_one_stage_for_each_combination(folder):
    path = written({"sft": SFT, "dpo": DPO | {"sweep": {"dpo.beta": [0.1, 5], "seed": [1, 2]}}})
    found = stages(path)
    names = [f"dpo[beta={beta},seed={seed}]" for beta in (0.1, 5) for seed in (1, 2)]
    assert list(found) == ["sft", *names]
    last = found[names[-1]]
    assert (last.recipe.dpo.beta, last.recipe.seed, last.recipe.run) == (5, 2, "runs/x/dpo-beta=5,seed=2")


def test_a_list_takes_every_point_of_a_sweep_and_each_takes_one(folder):
    """Here results are read as data, which any stage takes a list of."""
    after = {"stage": "sft", "data": {"train": [{"path": "talks.jsonl"}, {"path": "${dpo}/a.jsonl", "weight": 2.0}]}}
    one = {"stage": "sft", "data": {"train": [{"path": "${dpo}/a.jsonl"}, {"path": "${dpo[seed=2]}/a.jsonl"}]}}
    sweep = DPO | {"sweep": {"seed": [1, 2]}}
    found = stages(written({"sft": SFT, "all": after, "one": one | {"each": "dpo"}, "dpo": sweep}))
    points = ["runs/x/dpo-seed=1/final/a.jsonl", "runs/x/dpo-seed=2/final/a.jsonl"]
    sources = found["all"].recipe.data.train
    assert [(s.path, s.weight) for s in sources] == [("talks.jsonl", 1), (points[0], 2), (points[1], 2)]
    assert found["all"].after == ("dpo[seed=1]", "dpo[seed=2]")
    assert [s.path for s in found["one[seed=1]"].recipe.data.train] == [points[0], points[1]]
    assert [s.path for s in found["one[seed=2]"].recipe.data.train] == [points[1], points[1]]
    assert found["one[seed=2]"].after == ("dpo[seed=2]",)


def test_a_text_may_hold_what_looks_like_a_reference(folder):
    path = written({"sft": SFT | {"log": {"samples": ["Say $${sft} for 5 $"]}}})
    assert stages(path)["sft"].recipe.log.samples == ["Say ${sft} for 5 $"]


def test_every_problem_of_every_stage_is_told_at_once_with_its_line(folder):
    path = written(
        {
            "sft": SFT | {"optim": {"learing_rate": 1e-4}},
            "dpo": DPO | {"dpo": {"beta": -1}, "model": {"adapter": "${stf}"}},
            "late": DPO | {"sweep": {"dpo.gamma": ["much"]}},
            "list": DPO | {"sweep": {"data.train.1.path": ["pairs.jsonl"]}},
            "unread": DPO | {"data": {"train": [{"path": "pair.jsonl"}]}},
            "far": SFT | {"stage": "stf"},
            "best": DPO | {"model": {"adapter": "${good.best}"}},
            "good": SFT,
            "kept": SFT | {"data": HELD, "train": {"best": {"metric": "loss", "goal": "least"}}},
            "taken": DPO | {"model": {"adapter": "${kept.best}"}},
            "odd": DPO | {"model": {"adapter": "${kept.final}"}},
            "old": DPO | {"model": {"adapter": "runs/gone/final"}},
            "alone": SFT | {"each": "sft"},
            "logs": SFT,
        }
    )
    assert set(faults(path)) == {
        f"{line_of(path, 'learing_rate')}: unknown key 'learing_rate' in optim; did you mean 'learning_rate'?",
        f"{line_of(path, 'beta: -1')}: dpo.beta: expected a number above 0, found the number -1",
        f"{line_of(path, '${stf}')}: no stage is named 'stf'; did you mean 'sft'?",
        f"{line_of(path, '- much')}: dpo.gamma: expected a number at least 0, found the text 'much'",
        f"{line_of(path, '- pairs.jsonl')}: there is no item '1' in a list of 1",
        f"{line_of(path, 'pair.jsonl')}: pair.jsonl: no such file or folder; did you mean 'pairs.jsonl'?",
        f"{line_of(path, 'stage: stf')}: there is no stage 'stf'; did you mean 'sft'?",
        f"{line_of(path, '${good.best}')}: ${{good.best}}: good keeps no `best/`; give it `train.best`",
        f"{line_of(path, '${kept.final}')}: ${{kept.final}}: `.best` is all that may follow a name",
        f"{line_of(path, 'runs/gone')}: runs/gone/final: no such folder; give the `final/` of a finished run",
        f"{line_of(path, 'each: sft')}: each: 'sft' has no sweep; leave `each` out",
        f"{line_of(path, '  logs:')}: 'logs' cannot be the name of a stage; take letters, digits, - and _",
    }


def test_stages_that_wait_for_each_other_are_an_error(folder):
    path = written({"a": SFT | {"model": {"adapter": "${b}"}}, "b": DPO | {"model": {"adapter": "${a}"}}})
    (fault,) = faults(path)
    assert re.fullmatch(rf"{path}:\d+: stages that wait for each other never start: '[ab]' needs .*", fault)
    assert "'a' needs 'b'" in fault
    assert "'b' needs 'a'" in fault


def test_two_stages_never_share_a_folder(folder):
    path = written({"sft": SFT | {"sweep": {"seed": [1, 1.0]}}, "dpo": SFT | {"run": "runs/x"}})
    told = "\n".join(faults(path))
    assert "dpo and the pipeline itself would both write to runs/x; name another `run`" in told
    path = written({"sft": SFT, "two": SFT | {"run": "runs/x/sft"}})
    assert "two and sft would both write to runs/x/sft" in faults(path)[0]


def test_a_reference_in_braces_wants_quotes_and_the_error_says_so(folder):
    path = written(BOTH)
    path.write_text(path.read_text() + "  more: {stage: sft, model: {adapter: ${sft}}}\n")
    told = align(path, stage=pipeline)
    assert told.status == 2
    assert 'a reference stands in quotes: "${name}"' in told.err


# -- how stages are started --------------------------------------------------------------------------------------------


def test_stages_are_launched_with_the_config_and_processes_that_are_given(folder):
    stage = stages(written(BOTH))["sft"]
    section = {"config": "two.yaml", "processes": 2}
    launcher = Launcher(section, "auto", ["3", "5", "6", "7"])
    assert launcher.room == 2
    assert launcher.environment(1) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    words = "accelerate launch -q --config_file two.yaml --num_processes 2 --main_process_port 29501 -m align.sft x"
    assert launcher.command(stage, Path("x"), fresh=False, slot=1) == words.split()
    assert Launcher(None, "auto", []).command(stage, Path("x"), fresh=True)[2:] == ["align.sft", "x", "--fresh"]
    assert Launcher(section, "auto", []).room == Launcher({**section, "processes": None}, "auto", ["0", "1"]).room == 1
    assert set(Launcher(None, 2, []).environment(0)) == {"OMP_NUM_THREADS"}


def test_a_function_is_known_by_its_file(folder):
    recipe = stages(written({"sft": SFT | {"model": {"chat_template": "mine.rules:good"}}}))["sft"].recipe
    before = digests(recipe)
    Path("mine").mkdir()
    Path("mine/rules.py").write_text("good = len")
    assert digests(recipe).keys() - before.keys() == {"mine/rules.py"}


def test_the_files_of_a_pattern_and_of_linked_folders_are_inputs(folder):
    for name in ("rows/a.jsonl", "more/b.jsonl"):
        Path(name).parent.mkdir()
        write_rows(Path(name), [talk("Hi", "Hello")])
    Path("rows/in").symlink_to("../more")
    for path, names in (("rows", {"rows/a.jsonl", "rows/in/b.jsonl"}), ("rows/*.jsonl", {"rows/a.jsonl"})):
        recipe = stages(written({"sft": SFT | {"data": {"train": [{"path": path}]}}}))["sft"].recipe
        assert digests(recipe).keys() >= names, path


def test_the_table_shows_a_sweep_in_one_line_and_what_runs_of_it(folder):
    found = list(stages(written({"sft": SFT, "dpo": DPO | {"sweep": {"seed": [1, 2, 3]}}})).values())
    console = Console(file=io.StringIO(), width=100)
    states = dict(zip([stage.name for stage in found], ["finished", "skipped", "failed", "waiting"], strict=True))
    console.print(Board(console, found, states).table())
    told = console.file.getvalue()
    assert re.search(r"dpo +1 of 3 finished .* 1/3", told)
    assert re.search(r"dpo\[seed=2\] +failed", told)
    assert "seed=1" not in told
    assert "seed=3" not in told


# -- running -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(world, cache, tmp_path_factory):
    """A pipeline that was run: two stages finished, one failed and held another back; its folder, and what was told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        patch.chdir(tmp_path_factory.mktemp("ran"))
        for path in (world.talks, world.pairs):
            shutil.copy(path, path.name)
        Path("base").symlink_to(world.base)
        write_rows(Path("bad.jsonl"), [{"prompt": "Hi", "chosen": "a", "rejected": ""}])
        bad = {"stage": "reward", "data": {"train": [{"path": "bad.jsonl"}]}}
        late = {"stage": "sft", "data": {"train": [{"path": "${bad}/rows.jsonl"}]}}
        told = align(written({"bad": bad, "late": late} | BOTH), stage=pipeline)
        yield Path.cwd(), told


@pytest.fixture
def again(ran, here):
    """A copy of that folder to work in, and the recipe of the two that finished."""
    shutil.copytree(ran[0], here, dirs_exist_ok=True, symlinks=True)
    return written(BOTH)


def plan(*argv):
    """Stage -> what --dry-run says of it."""
    told = align(*argv, "--dry-run", stage=pipeline)
    assert (told.status, told.err) == (0, "")
    return dict(re.findall(r"^  (\S+): (.*)$", told.out.partition("\n#")[0], re.MULTILINE))


def test_a_stage_that_fails_holds_back_only_what_needs_it(ran):
    folder, told = ran
    assert told.status == 2
    assert "bad.jsonl:1: " in told.out, "the stage's last lines are shown"
    assert "bad failed with status 2; all that it said is in runs/both/logs/bad.log" in told.out
    assert "failed: bad; held back: late" in told.out
    for name in ("sft", "dpo"):
        assert f"{name}: finished in" in told.out
        assert (folder / "runs/both" / name / "final/align.json").is_file()
    assert not (folder / "runs/both/late").exists()
    assert "train step 6/6" in (folder / "runs/both/logs/sft.log").read_text()


def test_a_second_call_does_nothing_and_says_so(again):
    before = tree(Path("runs/both/sft")) | tree(Path("runs/both/dpo"))
    told = align(again, stage=pipeline)
    assert told.status == 0
    assert "all 2 stages are finished and unchanged: nothing to do" in told.out
    assert tree(Path("runs/both/sft")) | tree(Path("runs/both/dpo")) == before


def test_a_dry_run_writes_nothing_and_shows_every_recipe(folder):
    path = written(BOTH)
    before = tree(folder)
    told = align(path, "--dry-run", "stages.dpo.dpo.beta=0.3", stage=pipeline)
    assert tree(folder) == before
    recipes = [yaml.safe_load(part) for part in re.split(r"^# .*$", told.out, flags=re.MULTILINE)[1:]]
    assert [recipe["run"] for recipe in recipes] == ["runs/both/sft", "runs/both/dpo"]
    assert recipes[1]["dpo"]["beta"] == 0.3
    assert plan(path) == {"sft": "start (not there yet)", "dpo": "start (after sft)"}


def test_content_tells_what_has_changed_and_dates_do_not(again):
    unchanged = dict.fromkeys(("sft", "dpo"), "skip (finished and unchanged)")
    for path in ("talks.jsonl", "runs/both/sft/final/align.json"):
        os.utime(path, (1, 1))
    assert plan(again) == unchanged
    pairs = Path("pairs.jsonl")
    about, text = pairs.stat(), pairs.read_text()
    pairs.write_text(text.replace("Paris", "Prais"))
    os.utime(pairs, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert plan(again) == unchanged | {"dpo": "start over (pairs.jsonl has changed)"}
    pairs.write_text(text)
    assert plan(again, "stages.dpo.dpo.beta=0.3")["dpo"] == "start over (dpo.beta: 0.1 there, 0.3 here)"
    assert plan(again, "stages.dpo.log.every=3") == unchanged, "how it is shown is no part of it"
    after = "start over only if the result of sft is another"
    assert plan(again, "stages.sft.seed=3") == {
        "sft": "start over (seed: 0 there, 3 here)",
        "dpo": f"start or skip ({after})",
    }
    final = Path("runs/both/dpo/final/align.json")
    final.write_text(final.read_text() + " ")
    assert plan(again)["dpo"] == "start over (runs/both/dpo/final has been changed)"
    assert plan(again, "--fresh")["sft"] == "start over (--fresh)"


@pytest.mark.slow
def test_a_result_that_comes_out_equal_leaves_later_stages_alone(again):
    """And one that is changed is made again, in its own folder."""
    shutil.rmtree("runs/both/sft/final")
    told = align(again, "stages.dpo.train.steps=4", stage=pipeline)
    assert told.status == 0
    assert "sft: resume (runs/both/sft/final is gone)" in told.out
    assert "dpo: start over (train.steps: 6 there, 4 here)" in told.out
    assert [record["step"] for record in metrics(Path("runs/both/dpo"), "train")] == [1, 2, 3, 4]


def test_a_folder_that_the_pipeline_did_not_fill_is_left_alone(folder):
    path = written(BOTH)
    Path("runs/both/dpo").mkdir(parents=True)
    Path("runs/both/dpo/notes.txt").write_text("mine")
    ours = "(no pipeline.yaml that a pipeline wrote)"
    told = align(path, stage=pipeline)
    assert told == (2, "", f"run: runs/both holds files but no pipeline {ours}; name another folder\n")
    Path("runs/both/pipeline.yaml").write_text(HEADER)
    where = line_of(path, "  dpo:")
    told = align(path, stage=pipeline)
    what = "runs/both/dpo holds what this pipeline did not make; name another `run`, or move it away"
    assert told == (2, "", f"{where}: {what}\n")


def test_one_pipeline_at_a_time_works_in_a_folder(again):
    handle = os.open("runs/both", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    told = align(again, stage=pipeline)
    os.close(handle)
    assert told == (2, "", "run: another pipeline is at work in runs/both; wait for it, or stop it\n")


def test_a_start_over_that_was_killed_before_it_began_is_not_taken_for_an_end(again):
    """The old result still stands in the folder, whose record is already of the new one."""
    changed = load_recipe(again, ["stages.dpo.seed=9"], pipeline.Recipe)
    document = Document(again)
    document.override(0, "stages.dpo.seed=9")
    stage = stages_of(document, Path(changed.run))[1]
    records = Records(Path(changed.run))
    records.started(stage, over=True)
    assert records.verdict(stage) == ("start over", "was about to")
    shutil.rmtree(stage.result)
    (stage.folder / "recipe.yaml").unlink()
    assert records.verdict(stage) == ("resume", "was not finished")


def test_a_set_is_prepared_and_then_trained_on(folder):
    """Its sides are what `${data}/train` and `${data}/eval` name; one process more makes no other set."""
    rows = [talk(f"Say {i} twice", f"{i} {i}") for i in range(20)]
    write_rows(Path("raw.jsonl"), rows + rows[:3])
    data = {
        "stage": "prepare", "sources": [{"path": "raw.jsonl"}], "workers": 1, "card": False,
        "prepare": {"deduplicate": {"exact": "same"}}, "output": {"split": {"eval": 0.2}},
    }  # fmt: skip
    sides = {"train": [{"path": "${data}/train"}], "eval": {"sources": [{"path": "${data}/eval"}]}}
    path = written({"sft": {"stage": "sft", "data": sides, "train": {"steps": 2, "save_every": None}}, "data": data})
    found = stages(path)
    assert (found["sft"].after, found["data"].after) == (("data",), ())
    assert found["sft"].recipe.data.eval.sources[0].path == "runs/x/data/eval"
    told = align(path, stage=pipeline)
    assert told.status == 0, told.out
    manifest = json.loads(Path("runs/both/data/manifest.json").read_text())
    assert [sum(file["rows"] for file in files) for files in manifest["sides"].values()] == [16, 4]
    assert json.loads(Path("runs/both/sft/data.json").read_text())
    skipped = "skip (finished and unchanged)"
    assert plan(path, "stages.data.workers=2") == {"data": skipped, "sft": skipped}
    changed = plan(path, "stages.data.seed=5")
    assert changed["data"] == "start over (seed: 0 there, 5 here)"
    assert changed["sft"] == "start or skip (start over only if the result of data is another)"
    missing = written({"sft": SFT, "data": data | {"prepare": {"filter": {"scores": [
        {"classifier": "runs/gone/final", "label": "x", "min": 0.5}]}}}}, name="missing.yaml")  # fmt: skip
    assert "runs/gone/final: no such folder; give the `final/` of a finished run" in faults(missing)[0]


def test_a_result_that_was_to_be_replaced_is_not_taken_for_the_new_one(again):
    """A stage that is stopped while it starts over may leave the old one, and end with status 0."""
    stage, records = stages_of(Document(again), Path("runs/both"))[0], Records(Path("runs/both"))
    records.started(stage, over=True)
    assert not records.has_ended(stage)
    stage.mark.rename("aside")
    Path("aside").rename(stage.mark)
    assert records.has_ended(stage)


def when(ready, then):
    """Do something in a thread as soon as something else holds."""

    def wait():
        until = time.monotonic() + 60
        while not ready():
            assert time.monotonic() < until
            time.sleep(0.001)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.slow
def test_stopped_by_a_signal_then_killed_it_ends_as_if_nothing_had_happened(ran, folder):
    """The kill leaves a stage that runs on by itself: started here as the pipeline starts it, without a pipeline."""
    path, log = written({"sft": SFT}), Path("runs/both/sft/metrics.jsonl")
    for _ in range(5):  # a machine with much to do may give it the signal after its last step
        begun = when(
            lambda: log.is_file() and log.read_text().count("\n") >= 2, lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
        told = align(path, stage=pipeline)
        begun.join()
        assert told.status == 0
        step = int(re.search(r"sft: stopped at step (\d) of 6", told.out)[1])
        assert told.out.endswith("stopped by a signal; run the same command again to go on from there\n")
        assert lines(log)[-1]["step"] == step
        if step < 6:
            break
        shutil.rmtree("runs")
    assert step < 6
    stage = stages_of(Document(path), Path("runs/both"))[0]
    command = ["python", "-m", "align.sft", "runs/both/stages/sft.yaml"]
    own = Path("runs/both/logs/sft.log")
    Job(stage, command, own, {}, 0)
    until = time.monotonic() + 60
    while not holders(own):  # who looks before is not told of it, and never looks while its pipeline lives
        assert time.monotonic() < until
        time.sleep(0.01)
    told = align(path, stage=pipeline)
    assert told.status == 0
    assert "sft: still runs, without its pipeline; it is asked to save and to stop" in told.out
    assert metrics(Path("runs/both/sft")) == metrics(ran[0] / "runs/both/sft")
    there, here = weights(ran[0] / "runs/both/sft"), weights(Path("runs/both/sft"))
    assert all((there[name] == here[name]).all() for name in there)


# -- what is shipped ---------------------------------------------------------------------------------------------------


def test_the_page_tells_every_key_with_its_default():
    page = (ROOT / "docs" / "pipeline.md").read_text("utf-8")
    for kind, before in ((pipeline.Recipe, ""), (pipeline.Accelerate, "accelerate."), (pipeline.Keys, "stages.*.")):
        for key, field in kind.model_fields.items():
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            if default != pipeline.Accelerate():
                told = default if isinstance(default, str) else json.dumps(default)
                assert re.search(rf"^\| `{re.escape(before + key)}` \| `?{re.escape(told)}`? \|", page, re.MULTILINE), (
                    key
                )
