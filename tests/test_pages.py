"""What the pages teach is so: code that they link to stands there, commands parse, the Chinese pages keep step."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from align.recipe.load import load_recipe
from align.tools.pipeline.stage import recipe_type

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAIRS = {"README.md": "README.zh.md", "docs/glossary.md": "docs/glossary.zh.md"}


def test_the_glossary_links_each_word_to_lines_that_stand():
    text = (DOCS / "glossary.md").read_text("utf-8")
    entries = re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(entries) > 35
    for word, entry in entries:
        links = re.findall(r"\[`(\w+)`\]\(([\w./]+\.py)\)", entry.partition("Code: ")[2])
        assert links, word
        for symbol, path in links:
            source = (DOCS / path).read_text("utf-8")
            assert re.search(rf"^ *(def|class) {symbol}\b|^{symbol}\b.* = ", source, re.MULTILINE), (word, symbol)


def test_the_design_names_every_file_and_the_picture_every_folder():
    design, picture = ((DOCS / name).read_text("utf-8") for name in ("design.md", "house.svg"))
    files = [file for kind in ("*.py", "*.jinja") for file in (ROOT / "align").rglob(kind) if file.stem != "__init__"]
    assert len(files) > 200
    assert [str(file) for file in files if f"{file.name}`" not in design] == []
    known = {"/".join(file.parts[-n:]) for file in ROOT.rglob("*.*") for n in (1, 2, 3)}
    assert [name for name in re.findall(r"`([\w/]+\.(?:py|jinja|html|yaml))`", design) if name not in known] == []

    floors = [ROOT / "align" / name for name in ("data", "models", "training")]
    folders = [part for floor in floors for part in floor.iterdir() if (part / "__init__.py").exists()]
    commands = [file for file in (ROOT / "align").glob("*.py") if file.stem != "__init__"]
    words = re.findall(r"\w+", picture)
    assert [part.stem for part in (*floors, *folders, *commands) if part.stem not in words] == []


@pytest.mark.parametrize("page", PAIRS)
def test_the_chinese_page_keeps_step(page):
    """The same headings by level, tables by shape, code, links and pictures, in the same order; and no word is left."""
    english, chinese = ((ROOT / name).read_text("utf-8") for name in (page, PAIRS[page]))
    assert skeleton(chinese) == skeleton(english)
    words = [line for line in chinese.splitlines() if len(line) > 30 and not re.search(r"[\u4e00-\u9fff]", line)]
    assert [line for line in words if not re.match(r"[`|.]|    |!?\[|代码|accelerate|python|\S*venv", line)] == []


def skeleton(text: str) -> dict[str, list[str]]:
    """What a page and its translation share."""
    prose = FENCE.sub("", text)
    links = re.findall(r"\]\((?:docs/)?([^)]+)\)", prose)
    return {
        "headings": re.findall(r"^#+(?= )", prose, re.MULTILINE),
        "tables": [str(line.count("|")) for line in prose.splitlines() if line.startswith("|")],
        "items": re.findall(r"^ *(?:-|\d+\.)(?= )", prose, re.MULTILINE),
        "code": [body for _, body in FENCE.findall(text)],
        "words of code": sorted(re.findall(r"`([^`\n]+)`", prose)),
        "figures": sorted(re.findall(r"\d[\d,.]*\d", re.sub(r"\]\([^)]+\)|`[^`]*`", "", prose))),
        "links": sorted(link.replace(".zh.md", ".md") for link in links),
    }


def commands(page: Path) -> list[list[str]]:
    """The words of every stage command of a page that names a recipe of ours, in code blocks and in the text."""
    text = page.read_text("utf-8")
    blocks = "\n".join(body for language, body in FENCE.findall(text) if language == "sh")
    lines = blocks.replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    found = [shlex.split(line.partition("#")[0]) for line in lines if re.search(r"-m align\.\w+ recipes/", line)]
    return [words[words.index("-m") + 1 :] for words in found]


@pytest.mark.parametrize("page", ["README.md", "docs/questions.md", "docs/tutorial.md"])
def test_commands_with_recipes_parse_with_their_overrides(page):
    found = commands(ROOT / page)
    assert len(found) > 4
    for module, recipe, *words in found:
        overrides = [word for word in words if re.match(r"[\w.]+=", word)]
        stage = re.search(r"^stage: (\w+)", (ROOT / recipe).read_text("utf-8"), re.MULTILINE).group(1)
        own = importlib.import_module(module).Recipe if stage == "pipeline" else recipe_type(stage)
        load_recipe(ROOT / recipe, overrides, own)


@pytest.mark.parametrize("page", ["questions.md", "tutorial.md"])
def test_modules_that_pages_run_exist(page):
    for module in set(re.findall(r"-m (align\.\w+)", (DOCS / page).read_text("utf-8"))):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
