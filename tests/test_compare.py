"""`align.compare`: figures that are known, verdicts that the intervals allow, and symmetry."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
from evaluations import compare_sweeps, evaluated, make_sweeps, recipe, result, rows_of, trained, write_rows

from align.compare import main
from align.tools.comparison.figures import Pair
from align.training.bootstrap import Estimate
from align.training.report.plots import duration


def turned(e: dict, whole: float) -> dict:
    """A figure seen from the other side: its negative, or the rest of the whole."""
    return {"value": whole - e["value"], "low": whole - e["high"], "high": whole - e["low"], "n": e["n"]}


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    return make_sweeps(tmp_path_factory.mktemp("sweeps"))


@pytest.fixture(scope="module")
def swept(sweeps, tmp_path_factory):
    return compare_sweeps(sweeps, tmp_path_factory.mktemp("swept"))


class TestSweeps:
    def test_the_winner_is_told_by_kl(self, swept):
        figures, page = swept
        assert figures["headlines"] == ["dpo or ppo: it depends on the KL"]
        text = " ".join(figures["summary"])
        assert "ppo1 beats dpo1: it wins" in text
        assert "dpo9 beats ppo9: it wins" in text
        assert "Of 3 runs of dpo, 3 beat the baseline" in text
        most = "(3 runs, up to 3 GiB of memory)"
        assert f"Device time of training: dpo 3 min 0 s {most}; ppo 30 min 0 s {most}." in page

    def test_matched_runs_are_those_at_like_kl(self, swept):
        figures, _ = swept
        names = [run["name"] for run in figures["runs"]]
        alike = {(names[pair["a"]], names[pair["b"]]) for pair in figures["pairs"] if pair["alike"]}
        assert alike == {("dpo1", "ppo1"), ("dpo4", "ppo4"), ("dpo9", "ppo9")}

    def test_overoptimisation_is_told_where_it_is(self, swept):
        figures, _ = swept
        told = [line for line in figures["summary"] if line.startswith("Over-optimisation")]
        assert len(told) == 1
        assert "in ppo: from ppo1" in told[0]
        law = {fit["group"]: fit["fit"] for fit in figures["fits"]}
        assert set(law) == {"dpo", "ppo", "best of n by proxy", "best of n by gold"}
        assert law["ppo"]["b"]["low"] > 0

    def test_the_law_is_fitted_to_gains_over_the_baseline(self, swept):
        figures, _ = swept
        law = next(fit["fit"] for fit in figures["fits"] if fit["group"] == "dpo")
        score = {run["name"]: run["scores"]["gold"]["value"] for run in figures["runs"]}
        d = np.sqrt([1.0, 4.0, 9.0])
        gains = [score[f"dpo{kl}"] - score["sft"] for kl in (1, 4, 9)]
        (a, b), *_ = np.linalg.lstsq(np.stack([d, -d * np.log(d)], 1), gains, rcond=None)
        assert (law["a"]["value"], law["b"]["value"]) == pytest.approx((a, b))

    def test_overoptimisation_is_claimed_only_where_the_interval_allows(self, tmp_path):
        """The proxy's favourite is no worse, or lies at a lower KL."""
        best, same = evaluated(tmp_path / "best", 0.6, 4), evaluated(tmp_path / "same", 0.6, 9, 3, seed=1)
        near = evaluated(tmp_path / "near", -1.0, 1, 9, seed=2)
        for favourite in (same, near):
            runs = {"path": [str(best), str(favourite)], "group": "ppo"}
            figures, _ = result(recipe(tmp_path / f"with_{favourite.name}.yaml", runs, proxy="proxy"))
            assert not any("Over-optimisation" in line for line in figures["summary"])

    def test_three_groups_are_a_table_and_one_verdict(self, sweeps, tmp_path):
        """dpo9 beats ppo9 at like KL; nothing of another group lies at the KL of the third."""
        third = evaluated(tmp_path / "third", 0.5, 4, training=trained("sft"))
        figures, page = result(recipe(tmp_path / "c.yaml", sweeps["dpo9"], sweeps["ppo9"], third))
        assert figures["headlines"] == ["dpo, ppo and sft: none beats all others"]
        head, *rows = figures["standings"]
        assert head == ["Group", "Highest mean gold", "KL there", "Against dpo", "Against ppo", "Against sft"]
        cells = {row[0]: dict(zip(head[3:], row[3:], strict=True)) for row in rows}
        assert [cells[name][f"Against {name}"] for name in ("dpo", "ppo", "sft")] == ["–"] * 3
        assert cells["dpo"]["Against ppo"].startswith("wins ")
        assert cells["ppo"]["Against dpo"].startswith("loses ")
        assert "at another KL" in cells["dpo"]["Against sft"]
        assert "at another KL" not in cells["dpo"]["Against ppo"]
        assert cells["dpo"]["Against ppo"] in page
        lines = (tmp_path / "c" / "compare.md").read_text("utf-8").splitlines()
        assert sum(line.startswith("| Group |") for line in lines) == 1
        assert len([line for line in figures["summary"] if line.startswith(("dpo: ", "ppo: ", "sft: "))]) == 3

    def test_a_group_that_beats_all_others_is_named(self, sweeps, tmp_path):
        """Three sweeps with a baseline: counts of pairs at like KL, from both sides."""
        best = [
            evaluated(tmp_path / f"best{kl}", 2.0 + kl / 10, kl, seed=kl, training=trained("grpo")) for kl in (1, 4, 9)
        ]
        runs = [{"path": [str(sweeps[f"{name}{kl}"]) for kl in (1, 4, 9)], "group": name} for name in ("dpo", "ppo")]
        runs.append({"path": [str(path) for path in best], "group": "grpo"})
        figures, page = result(recipe(tmp_path / "c.yaml", *runs, baseline=str(sweeps["sft"])))
        assert figures["headlines"] == ["grpo beats all others at like KL"]
        head, *rows = figures["standings"]
        cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
        assert cells["grpo"]["Against dpo"] == cells["grpo"]["Against ppo"] == "3 won of 3"
        assert cells["dpo"]["Against grpo"] == "3 lost of 3"
        assert cells["dpo"]["Against the baseline"] == "3 won of 3"
        assert not any("beat the baseline" in line for line in figures["summary"])
        assert page.count("grpo beats all others") >= 1

    def test_a_run_is_matched_once_with_its_nearest(self, sweeps, tmp_path):
        close = evaluated(tmp_path / "close", 0.8, 4.5, training=trained("dpo"))
        figures, _ = result(recipe(tmp_path / "c.yaml", sweeps["dpo4"], close, sweeps["ppo4"]))  # KL 4, 4.5 and 4.4
        assert [(pair["a"], pair["b"]) for pair in figures["pairs"] if pair["alike"]] == [(1, 2)]

    def test_a_win_is_sure_only_after_correction(self):
        away, even = Estimate(0.6, 0.51, 0.69, 60), Estimate(0.6, 0.49, 0.71, 60)
        pair = Pair(0, 1, away, away, away, p=0.03, p_holm=None, alike=False)
        assert pair.sure
        assert pair._replace(p_holm=0.04).sure
        assert not pair._replace(p_holm=0.06).sure
        assert not pair._replace(win_rate=even).sure
        assert not pair._replace(win_rate=Estimate(1.0, math.nan, math.nan, 1)).sure

    def test_figures_hold_what_is_known(self, swept, sweeps):
        figures, _ = swept
        for run in figures["runs"]:
            kl = {"dpo": 1.0, "ppo": 1.1, "sft": 0.0}[run["name"][:3]] * int(run["name"][3:] or 1)
            assert run["kl_full"]["value"] == pytest.approx(kl)
            assert run["kl_sequence"]["low"] <= kl <= run["kl_sequence"]["high"]
            scores = [[row["scores"]["gold"] for row in rows_of(sweeps[run["name"]])]]
            assert run["scores"]["gold"]["value"] == pytest.approx(np.mean(scores))

    def test_best_of_n_rises_by_its_own_score_and_starts_at_the_baseline(self, swept):
        figures, _ = swept
        gold = [point for point in figures["best_of"] if point["by"] == "gold"]
        assert [point["n"] for point in gold] == [1, 2, 4, 8]
        assert gold[0]["score"] == figures["runs"][0]["scores"]["gold"]
        means = [point["score"]["value"] for point in gold]
        assert means == sorted(means)

    def test_only_questions_are_corrected_for(self, swept):
        figures, _ = swept
        # seven runs: six against the baseline, three at like KL, and the best of each, dpo9 and ppo1
        assert sum(pair["p_holm"] is not None for pair in figures["pairs"]) == 10
        told = dict(re.findall(r'"([0-9]+,[0-9]+)":"([^"]*)"', re.sub(r'": "', '":"', swept[1])))
        names = [run["name"] for run in figures["runs"]]
        assert "not corrected" in told[f"{names.index('dpo1')},{names.index('dpo9')}"]
        assert "not corrected" not in told[f"{names.index('dpo1')},{names.index('ppo1')}"]


class TestTwo:
    def test_swapping_the_order_flips_every_figure_and_nothing_else(self, sweeps, tmp_path):
        a, b = sweeps["dpo4"], sweeps["ppo9"]
        one, _ = result(recipe(tmp_path / "one.yaml", a, b))
        two, _ = result(recipe(tmp_path / "two.yaml", b, a))
        (there,), (back,) = one.pop("pairs"), two.pop("pairs")
        for name, whole in (("win_rate", 1), ("win_rate_equal_length", 1), ("score_difference", 0)):
            flipped = turned(back.pop(name), whole)
            assert {k: round(v, 8) for k, v in there.pop(name).items()} == {k: round(v, 8) for k, v in flipped.items()}
        assert there == back
        assert one.pop("runs") == two.pop("runs")[::-1]
        assert one == two

    def test_a_run_against_itself_holds_one_half(self, sweeps, tmp_path):
        folder = str(sweeps["ppo4"])
        twice = {"path": folder, "name": "a"}, {"path": folder, "name": "b"}
        figures, _ = result(recipe(tmp_path / "c.yaml", *twice))
        (pair,) = figures["pairs"]
        assert pair["win_rate"]["low"] <= 0.5 <= pair["win_rate"]["high"]
        assert pair["score_difference"]["value"] == 0
        assert "Neither is shown to win" in figures["summary"][0]

    def test_equal_policies_are_not_told_apart(self, tmp_path):
        runs = [evaluated(tmp_path / name, 0.5, 2, seed=i) for i, name in enumerate("ab")]
        figures, _ = result(recipe(tmp_path / "c.yaml", *runs))
        assert figures["headlines"] == ["a or b: not decided"]
        assert "50 % lies within the interval" in figures["summary"][2]

    def test_two_runs_that_never_moved_are_at_like_kl(self, tmp_path):
        """A KL of 0, or an estimate below it; and a run whose memory was not recorded has its time alone."""
        cost = trained("dpo") | {"peak_memory_bytes": None}
        one, other = evaluated(tmp_path / "one", training=cost), evaluated(tmp_path / "other", 2.0, seed=1)
        found, _ = result(recipe(tmp_path / "c.yaml", {"path": str(one)}, {"path": str(other), "group": "ppo"}))
        assert [pair["alike"] for pair in found["pairs"]] == [True]
        assert found["headlines"] == ["other beats one at like KL"]
        assert "alike, so the match is fair" in " ".join(found["summary"])
        (told,) = [
            line for line in (tmp_path / "c" / "compare.md").read_text().splitlines() if "Device time of" in line
        ]
        assert "dpo 1 min 0 s;" in told
        assert "memory" not in told
        for folder, below in ((one, 0.1), (other, 0.2)):
            rows = [row | {"kl": None, "logprob": row["ref_logprob"] - below} for row in rows_of(folder)]
            write_rows(folder, rows)
        found, _ = result(recipe(tmp_path / "d.yaml", {"path": str(one)}, {"path": str(other), "group": "ppo"}))
        assert found["kl"] == "sequence"
        assert [pair["alike"] for pair in found["pairs"]] == [True]

    def test_a_winner_at_another_kl_is_called_so(self, sweeps, tmp_path):
        """Farther from the reference, or less far; which of the two is said only where the intervals of KL part."""
        wide = evaluated(tmp_path / "wide", 1.2, 6.5, seed=3)
        write_rows(wide, [row | {"kl": 2.8 if row["prompt"] % 10 else 40.0} for row in rows_of(wide)])
        for n, (runs, headline, says) in enumerate(
            (
                (("dpo9", "ppo9", "ppo1"), "dpo beats ppo at like KL", "dpo wins at KL 9.45 nats."),
                (("dpo9", "ppo9"), "dpo9 beats ppo9 at like KL", "alike, so the match is fair."),
                (("dpo1", "dpo9"), "dpo9 beats dpo1, but has moved farther", "dpo9 has moved farther, so this does"),
                (("ppo1", "ppo9"), "ppo1 beats ppo9, and has moved less", "ppo9 has moved farther, so this does"),
                (("ppo9", wide), "wide beats ppo9, at another KL", "not alike, so this does not tell which is better"),
            )
        ):
            figures, _ = result(recipe(tmp_path / f"{n}.yaml", *(sweeps.get(run, run) for run in runs)))
            assert figures["headlines"] == [headline]
            assert says in figures["summary"][1]

    def test_a_run_alone_is_told_against_its_baseline(self, sweeps, tmp_path):
        figures, page = result(recipe(tmp_path / "c.yaml", sweeps["dpo9"], baseline=str(sweeps["sft"])))
        assert figures["headlines"] == ["dpo9 beats sft"]
        assert figures["summary"][0].startswith("dpo9. It wins ")
        assert page.count("beats sft") == 3, "title, headline and the script's pair, not once more below them"

    def test_missing_scores_are_left_out_counted_and_told(self, sweeps, tmp_path):
        folder = shutil.copytree(sweeps["dpo4"], tmp_path / "dpo4")
        rows = rows_of(folder)
        for row in rows[:5]:  # all four samples of prompt 0, one of prompt 1
            row["scores"]["gold"] = None
        del rows[6]["scores"]["gold"]
        write_rows(folder, rows)
        figures, page = result(recipe(tmp_path / "c.yaml", folder, sweeps["ppo9"]))
        assert figures["runs"][0]["excluded"]["gold"] == 6
        assert figures["runs"][0]["scores"]["gold"]["n"] == figures["pairs"][0]["win_rate"]["n"] == 59
        assert "6 of 240 (gold)" in page

    def test_figures_hold_nothing_that_equal_runs_differ_in(self, tmp_path):
        """Time and memory stand in a file of their own, and on the page."""
        pages = []
        for seconds in (60.0, 75.0):
            both = [
                evaluated(tmp_path / name, i, 4, seed=i, training=trained(name, seconds=seconds * (i + 1)))
                for i, name in enumerate(("dpo", "ppo"))
            ]
            _, page = result(recipe(tmp_path / "c.yaml", *both))
            pages.append({path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()})
            costs = json.loads(pages[-1]["costs.json"])
            assert {name: cost["device_seconds"] for name, cost in costs.items()} == {
                "dpo": seconds,
                "ppo": 2 * seconds,
            }
            assert f"dpo {duration(seconds)} (" in page
            for folder in both:
                shutil.rmtree(folder)
        assert pages[0]["compare.json"] == pages[1]["compare.json"]
        assert pages[0]["costs.json"] != pages[1]["costs.json"]

    def test_the_same_inputs_give_the_same_bytes(self, sweeps, tmp_path):
        argv = recipe(tmp_path / "c.yaml", sweeps["dpo1"], sweeps["ppo1"], baseline=str(sweeps["sft"]))
        main(argv)
        first = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
        assert set(first) == {"recipe.yaml", "report.html", "compare.json", "compare.md", "costs.json"}
        main(argv)
        assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == first

    def test_answers_that_were_drawn_otherwise_are_told(self, sweeps, tmp_path):
        greedy = evaluated(tmp_path / "greedy", kl=4, sampling={"temperature": 0.5, "seed": 5, "samples": 4})
        figures, _ = result(recipe(tmp_path / "c.yaml", sweeps["ppo4"], greedy))
        told = "greedy with temperature 0.5 and ppo4 with temperature 1.0"
        assert any(note.startswith(f"The answers were not drawn alike: {told}.") for note in figures["notes"])
        figures, _ = result(recipe(tmp_path / "d.yaml", sweeps["ppo4"], sweeps["dpo4"]))
        assert not any("drawn alike" in note for note in figures["notes"])

    def test_a_baseline_that_is_not_the_reference_is_told(self, sweeps, tmp_path):
        figures, _ = result(recipe(tmp_path / "c.yaml", sweeps["ppo4"], baseline=str(sweeps["dpo1"])))
        assert any("dpo1 is not the reference" in note for note in figures["notes"])
