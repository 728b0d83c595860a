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
from align.recipe.help import arms, is_section, sections
from align.sft import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


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
        for recipe in re.findall(r"align\.sft (recipes/[\w./-]+\.yaml)", page.read_text("utf-8")):
            assert (ROOT / recipe).is_file(), f"{named(page)}: {recipe}"


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


def test_the_page_of_sft_lists_every_key_with_its_default():
    text = (ROOT / "docs" / "sft.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| `([\w.]+)` \| `?([^|`]+)`? \|", text.partition("## Recipe")[2], re.MULTILINE))
    wanted = {}
    for section, kind in sections(Recipe):
        if section == "data.eval.sources.0":
            continue
        for key, field in kind.model_fields.items():
            nested = (get_args(arm)[0] if get_origin(arm) is list else arm for arm in arms(field.annotation))
            if not any(map(is_section, nested)):
                default = "required" if field.is_required() else field.get_default(call_default_factory=True)
                written = default if isinstance(default, str) else json.dumps(default)
                wanted[f"{section}.{key}".lstrip(".")] = written
    assert listed == wanted


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == align.__version__
    assert re.search(rf"^## {re.escape(align.__version__)}\b", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)


def test_every_dependency_has_one_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(package for extra in extras for package in extra)]
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
