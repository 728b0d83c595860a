"""The house stands: every file imports from the floors below it, or from its own folder."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "align"
FILES = sorted(ROOT.rglob("*.py"))
STAGES = ("sft", "reward", "dpo", "ppo", "grpo", "distill", "classify")
FLOORS = {"objectives": 0, "recipe": 1, "data": 2, "models": 3, "training": 4} | dict.fromkeys(STAGES, 5)
TOOLS = 6
FAST, DOOR = ("align.models.cpu", "align.models.gpu"), "align.models.acceleration"
MOST_LINES = 300


def part(module: str) -> str:
    """`objectives` of align.objectives.losses, `sft` of align.sft, `` of align itself."""
    return (*module.split("."), "")[1]


def floor(name: str) -> int:
    return FLOORS.get(name, TOOLS)


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def within(module: str, packages: tuple[str, ...]) -> bool:
    return f"{module}.".startswith(tuple(f"{package}." for package in packages))


def imports(source: str, module: str, *, package: bool = False) -> set[str]:
    """Absolute names of all modules that a file imports, inside functions too; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def faults(source: str, module: str, *, package: bool = False) -> list[str]:
    """Sentences on every import that breaks the house."""
    own, told = part(module), []
    for name in sorted(imports(source, module, package=package)):
        top, other = name.split(".")[0], part(name)
        if top != "align":
            if own == "objectives" and top != "torch" and top not in sys.stdlib_module_names:
                told.append(f"{module} imports {top}; objectives import torch alone")
        elif within(name, FAST) and not (within(module, FAST) or module == DOOR):
            told.append(f"{module} imports {name}; only {DOOR} does")
        elif not own or other == own or not other or floor(own) == floor(other) == TOOLS:
            continue
        elif floor(other) >= floor(own):
            told.append(f"{module} (floor {floor(own)}) imports {name} (floor {floor(other)})")
    return told


@pytest.mark.parametrize("file", FILES, ids=[module_of(file) for file in FILES])
def test_a_file_imports_from_below_and_is_short(file):
    source = file.read_text("utf-8")
    assert faults(source, module_of(file), package=file.name == "__init__.py") == []
    assert source.count("\n") <= MOST_LINES


def test_the_house_is_not_empty():
    parts = {part(module_of(file)) for file in FILES}
    assert {"objectives", "recipe", "data", "models", "training", "sft"} <= parts


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("align.objectives.losses", "import math\nimport torch\nfrom torch.nn import functional", 0),
        ("align.objectives.losses", "import numpy", 1),
        ("align.objectives.losses", "from align.recipe.errors import UserError", 1),
        ("align.objectives.losses", "from align.objectives.logprobs import linear_logprobs", 0),
        ("align.data.trees", "def f():\n    from align.models import trunk", 1),
        ("align.data.trees", "from ..models import trunk", 1),
        ("align.data.trees", "from . import store", 0),
        ("align.data.trees", "from align import sft", 1),
        ("align.dpo", "from align.sft import loss", 1),
        ("align.dpo", "from align.training.supervised import fit", 0),
        ("align.training.loop", "import align.sft", 1),
        ("align.pipeline", "from align.sft import main\nfrom align.plan import cost", 0),
        ("align.sft", "from align.pipeline import main", 1),
        ("align.models.base", "from align import __version__", 1),
        ("align.models.trunk", "from align.models.cpu.fused import fuse", 1),
        ("align.models.trunk", "def f():\n    from align.models import gpu", 1),
        ("align.models.trunk", "from align.models import acceleration", 0),
        ("align.training.loop", "from align.models.cpu import joined", 1),
        ("align.models.acceleration", "from align.models.cpu import OFFER", 0),
        ("align.models.gpu.flex", "from align.models.cpu.fixed import fixed_products", 0),
    ],
)
def test_this_test_sees(module, source, count):
    assert len(faults(source, module)) == count
