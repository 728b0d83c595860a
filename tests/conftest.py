"""What tests of the commands share."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
from forks import begun_server, ending, use_server
from hypothesis import HealthCheck, settings

# Machines are shared and slow at times: how long an example takes says nothing. And a green run stays green.
settings.register_profile("align", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("align")

FIRST = (
    "tutorial", "hosts", "pipeline_kill", "shards", "shard_moments", "processes", "ppo_resume", "resume", "plain_path",
    "dpo", "classify", "ppo_truth", "pipeline",
)  # fmt: skip
APART = ("test_hosts.py", "test_pipeline_kill.py")

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["OMP_NUM_THREADS"] = "1"  # of what a test starts too: tests share the cores, and threads wait busily
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile all modules again
sys.dont_write_bytecode = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long, or wait for processes, come first: what is left at the end is short."""
    rank = {f"test_{name}.py": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """The processes that run tests share a server of forks: each of its own would import all once more."""
    node.workerinput["forks"] = begun_server()


def pytest_configure(config: pytest.Config) -> None:
    if found := getattr(config, "workerinput", {}).get("forks"):
        use_server(found)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """With --dist loadfile, tests of a file share what takes long to make; those of some that wait long run apart."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if Path(file).name in APART else file

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """What is imported now stays, and need not be looked through for garbage again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(autouse=True)
def _ending():
    """Processes that a test has forked end with it, so that none of a test that fails slows the next ones."""
    with ending():
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny base checkpoint and its rows; see world.py."""
    from world import make_world  # slow to import, and most tests do not need it

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A tiny base with adapters to be served; see serving.py."""
    from serving import make_shop

    return make_shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder that tests share, so that rows are tokenised once; and kernels, for all workers, compiled once."""
    folder = tmp_path_factory.mktemp("cache")
    if "PYTEST_XDIST_WORKER" in os.environ:
        kernels = tmp_path_factory.getbasetemp().parent / "kernels"
        kernels.mkdir(exist_ok=True)
        (folder / "kernels").symlink_to(kernels)
    return folder


@pytest.fixture
def here(tmp_path, cache, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.setenv("ALIGN_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path
