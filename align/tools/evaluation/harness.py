"""Tasks of lm-evaluation-harness (Gao et al. 2024, zenodo.org/records/12608602), where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

from pydantic import Field

from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.paths import Location
from align.recipe.schema import PositiveInt, Section
from align.training.bootstrap import Estimate, Z


class LmEval(Section):
    """Which of its tasks."""

    tasks: list[str] = Field(min_length=1)
    """Their names there, such as `hellaswag`. Their data come from the hub, if the task says no other place."""
    folder: Location | None = None
    """Tasks of your own, as its YAML files. Default: those that it has."""
    shots: Annotated[int | None, Field(ge=0)] = None
    """Examples before each question. Default: the task's own number."""
    limit: PositiveInt | None = None
    """Questions of each task. Default: all."""
    chat: bool = False
    """Ask through the tokenizer's chat template."""


def check_installed() -> None:
    """Raise UserError where the package is not there."""
    if find_spec("lm_eval") is None:
        raise UserError("evaluate.lm_eval: lm-eval is not installed; run: pip install lm-eval")


def harness(trunk: Trunk, section: LmEval, seed: int) -> dict[str, Estimate]:
    """Every figure of every task, with the normal interval of its own standard error."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with trunk.generating() as model:
        result = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=trunk.tokenizer),
            tasks=section.tasks,
            task_manager=TaskManager(include_path=section.folder),
            num_fewshot=section.shots,
            limit=section.limit,
            apply_chat_template=section.chat,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return figures(result)


def figures(result: dict[str, Any]) -> dict[str, Estimate]:
    """What `simple_evaluate` returned, as `lm_eval/<task>/<metric>`; a filter other than `none` is named too."""
    found = {}
    for task, numbers in result["results"].items():
        count = int(result.get("n-samples", {}).get(task, {}).get("effective", 0))
        for name, value in numbers.items():
            metric, comma, kept = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{kept}")
            reach = Z * error if isinstance(error, int | float) else float("nan")
            title = f"lm_eval/{task}/{metric}" + (f"/{kept}" if kept != "none" else "")
            found[title] = Estimate(float(value), value - reach, value + reach, count)
    return found
