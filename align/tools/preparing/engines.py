"""Where a recipe's batches are worked on."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import islice
from typing import Any

from align.data.preparing.engine import Engine, local
from align.recipe.errors import UserError

WINDOW = 64  # batches that Ray is given at once, so that no more are in memory


def engine_of(name: str, workers: int | str) -> Engine:
    """The engine that a recipe names. Raises UserError where Ray is not installed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = cores if workers == "auto" else int(workers)
    return ray_data if name == "ray" else local(count)


def ray_data(make: Callable[..., Any], given: tuple, tasks: Iterable[Any]) -> Iterator[Any]:
    """The same by Ray Data, on the cluster that `RAY_ADDRESS` names, or on this machine. See `Engine`.

    Batches travel there and results back, so the machines need no common disk; each needs align and the sources of
    test sets that rows are compared with.
    """
    try:
        import ray
    except ImportError:
        raise UserError("engine: ray is not installed; pip install 'align[prepare-ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    work, tasks = partial(_done, pickle.dumps((make, given))), iter(tasks)
    while window := list(islice(tasks, WINDOW)):
        sent = [{"place": place, "task": pickle.dumps(task)} for place, task in enumerate(window)]
        found = ray.data.from_items(sent, override_num_blocks=len(sent)).map(work).take_all()
        for one in sorted(found, key=lambda one: one["place"]):
            if one["problems"]:
                raise UserError(*one["problems"])
            yield pickle.loads(one["done"])


def _done(made: bytes, sent: dict[str, Any]) -> dict[str, Any]:
    """A task on some machine of the cluster. What the user can mend comes back as data, for Ray would wrap it."""
    try:
        done = _worker(made)(pickle.loads(sent["task"]))
    except UserError as error:
        return {"place": sent["place"], "done": b"", "problems": list(error.problems)}
    return {"place": sent["place"], "done": pickle.dumps(done), "problems": []}


@lru_cache(maxsize=1)
def _worker(made: bytes) -> Callable[[Any], Any]:
    make, given = pickle.loads(made)
    return make(*given)
