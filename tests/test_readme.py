"""What the pages say is so: commands, links, defaults, versions; and nothing of the machine they were written on."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import get_args, get_origin

import pytest

import align
from align import classify, distill, dpo, grpo, ppo, reward, sft
from align.recipe.engine import Server
from align.recipe.help import arms, is_section, sections
from align.recipe.schema import Section, Source

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_two_commands_stand_in_the_makefile_and_run_what_the_readme_spells_out():
    readme, makefile = (ROOT / "README.md").read_text("utf-8"), (ROOT / "Makefile").read_text("utf-8")
    commands, by_hand = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)[:2]
    targets = re.findall(r"^(\w[\w-]*):", makefile, re.MULTILINE)
    assert [line.split() for line in commands.splitlines()] == [["make", "chat"], ["make", "test"]]
    assert {"chat", "test"} <= set(targets)
    for line in by_hand.splitlines()[2:]:
        assert f"\t{line}\n" in makefile, line


def test_recipes_that_are_named_exist():
    for page in PAGES:
        for stage, recipe in re.findall(r"align\.(\w+) (recipes/[\w./-]+\.yaml)", page.read_text("utf-8")):
            assert (ROOT / recipe).is_file(), f"{named(page)}: {recipe}"
            if stage == "plan":  # it takes the recipe of any stage
                continue
            assert f"stage: {stage}\n" in (ROOT / recipe).read_text("utf-8"), f"{named(page)}: {recipe}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> list[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings]


def test_the_design_names_every_file_of_the_package():
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    files = [p.name for p in (ROOT / "align").rglob("*") if p.suffix in (".py", ".jinja") and p.name != "__init__.py"]
    assert [name for name in files if f"`{name}`" not in text and f"/{name}`" not in text] == []


def defaults(recipe: type[Section]) -> dict[str, str]:
    """Every key of a recipe with its default, as the pages write it. What sources hold is told once, under `data`, and
    what a server's section holds on a page of its own."""
    written = {}
    for section, kind in sections(recipe):
        within = section.startswith("data.")
        skipped = section.endswith(".engine") or section.startswith("data.prepare")  # pages of their own
        if section == "data.eval.sources.0" or (kind is Source and not within) or skipped:
            continue
        for key, field in kind.model_fields.items():
            nested = [get_args(arm)[0] if get_origin(arm) is list else arm for arm in arms(field.annotation)]
            if not all(map(is_section, nested)) or (nested == [Source] and section not in ("data", "data.eval")):
                default = "required" if field.is_required() else field.get_default(call_default_factory=True)
                name = f"{section}.{key}".lstrip(".")
                written[name] = default if isinstance(default, str) else json.dumps(default)
    return written


def listed(page: str) -> dict[str, str]:
    """Key -> default of the table under the heading Recipe."""
    text = (ROOT / "docs" / page).read_text("utf-8").partition("## Recipe")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([\w.]+)` \| `?([^|`]+)`? \|", text, re.MULTILINE))


def test_the_page_of_sft_lists_every_key_with_its_default():
    assert listed("sft.md") == defaults(sft.Recipe)


@pytest.mark.parametrize("stage", [reward, dpo, classify, ppo, grpo, distill], ids=lambda stage: stage.__name__)
def test_the_page_of_another_stage_lists_its_own_keys_and_sft_has_the_others(stage):
    name = stage.__name__.rpartition(".")[2]
    wanted = defaults(stage.Recipe)
    own = {key for key in wanted if key == "stage" or key.startswith(f"{name}.")}
    assert listed(f"{name}.md") == {key: wanted[key] for key in own}
    common = defaults(sft.Recipe)
    assert {key: wanted[key] for key in wanted.keys() - own} == {key: common[key] for key in wanted.keys() - own}


def test_the_page_of_servers_lists_every_key_of_their_section():
    assert listed("rollouts.md") == defaults(Server)


@pytest.mark.parametrize("stage", [reward, dpo], ids=lambda stage: stage.__name__)
def test_the_page_of_a_stage_tells_every_number_that_it_logs(stage):
    """Names as they stand in the stage's file: `"name": (sum, count)` and `metrics["name"]`."""
    source = Path(stage.__file__).read_text("utf-8")
    names = re.findall(r'^ +"([\w/]+)": \(', source, re.MULTILINE) + re.findall(r'metrics\["(\w+)"\]', source)
    names += re.findall(r'"(\w+)": (?:low|high|MARGINS)', source) + ["kl_per_token"] * (stage is dpo)
    page = (ROOT / "docs" / f"{stage.__name__.rpartition('.')[2]}.md").read_text("utf-8")
    told = page.partition("## Numbers")[2].partition("\n## ")[0]
    told = told.replace(", …", ", `rewards/undesirable`, `nll_per_token/undesirable`")
    assert len(names) > 8
    assert [name for name in names if f"`{name}`" not in told] == []


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == align.__version__
    assert re.search(rf"^## {re.escape(align.__version__)}\b", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)


def test_every_dependency_has_one_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(package for extra in extras for package in extra)]
    wanted = [package for package in wanted if not package.startswith(f"{project['name']}[")]
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    pinned = {name.lower().replace("_", "-") for name in pins}
    assert [d for d in wanted if re.match(r"[\w-]+", d).group().lower() not in pinned] == []
    assert pins["torch"] == "2.13.0"


def test_ci_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_no_page_or_setting_knows_the_machine_it_was_written_on():
    files = [*PAGES, ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "constraints.txt", ROOT / "pyproject.toml"]
    for file in [*files, *(ROOT / "recipes").glob("*.yaml")]:
        found = re.search(r"/(work|root|home|opt|tmp)/|\bfile://|@ git\+", file.read_text("utf-8"))
        assert not found, f"{named(file)}: {found}"
