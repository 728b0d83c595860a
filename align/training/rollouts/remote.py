"""An inference server that loads adapters while it runs, as vLLM has it: its models, its adapters, its responses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np

from align.models.sampling.choice import Sampling
from align.models.sampling.rows import Response
from align.recipe.errors import UserError
from align.training.rollouts.client import Answer, Client
from align.training.rollouts.completions import Ends, asked_for, response_of

T = TypeVar("T")
LOOK = 0.2  # seconds after which signals are heeded
ANEW = 3  # times that one response may find its adapter gone
LEAVING = 5.0  # seconds for the server to take an adapter out
SWITCH = (
    "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, align.serve with "
    "--adapters"
)


class Adapter(NamedTuple):
    """What the server has under the run's name."""

    step: int  # after which the actor is as it is there
    path: str  # of its folder, as the server sees it
    salt: str  # what the server keeps of prompts goes by it


class Gone(Exception):
    """The server has no model of this name."""


class Remote:
    """The server, asked by one process for responses of one adapter."""

    def __init__(self, client: Client, name: str, ends: Ends, heed: Callable[[], object]) -> None:
        """`name`: of the adapter there; `heed` is called while answers are awaited, and what it raises ends that."""
        self.client, self.name, self.ends, self.heed, self.told = client, name, ends, heed, client.told
        self.reloads = 0  # times that this process has found the adapter gone, and had it loaded

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What becomes of some requests."""

        async def connected() -> T:
            async with self.client.open():
                self._loading, task = asyncio.Lock(), asyncio.create_task(work)
                try:
                    while not task.done():
                        await asyncio.wait({task}, timeout=LOOK)
                        self.heed()
                    return task.result()
                finally:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

        return asyncio.run(connected())

    async def base(self) -> tuple[str, int | None]:
        """What the server calls its base, and the most tokens that it takes, if it says so."""

        def read(answer: Answer) -> tuple[str, int | None]:
            told = answer.json.get("data")
            models = [model for model in told if isinstance(model, dict)] if isinstance(told, list) else []
            bases = [m for m in models if isinstance(m.get("id"), str) and not m.get("parent")]
            if answer.status != 200 or not bases:
                raise UserError(
                    f"{self.told} names no model under /v1/models (status {answer.status}: {answer.message}); give the "
                    "address of an OpenAI-compatible server"
                )
            most = bases[0].get("max_model_len")
            return bases[0]["id"], most if isinstance(most, int) else None

        return await self.client.ask("/v1/models", None, read)

    async def load(self, adapter: Adapter) -> None:
        """Have it load an adapter, in the place of the one before. Raises UserError where it will not."""
        body = {"lora_name": self.name, "lora_path": adapter.path, "load_inplace": True}

        def read(answer: Answer) -> None:
            if answer.status == 200:
                return
            if answer.status == 405 or (answer.status == 404 and answer.message == "Not Found"):
                raise UserError(f"{self.told} cannot load adapters while it runs; {SWITCH}")
            raise UserError(
                f"{self.told} does not load the adapter {adapter.path} (status {answer.status}: {answer.message}); it "
                "has to see this folder (`adapters`, `adapters_there`), and to take adapters of the recipe's `lora` "
                "(vLLM: --max-lora-rank)"
            )

        await self.client.ask("/v1/load_lora_adapter", body, read, tries=2)

    def unload(self) -> None:
        """Take the adapter out, if the server is there."""

        async def once() -> None:
            async with asyncio.timeout(LEAVING), self.client.open():
                await self.client.once("/v1/unload_lora_adapter", {"lora_name": self.name})

        with suppress(Exception):
            asyncio.run(once())

    async def drawn(
        self,
        adapter: Adapter,
        how: Sampling,
        asked: Sequence[tuple[np.ndarray, int | None]],
        one_more: Callable[[], None],
    ) -> list[Response]:
        """A response of the adapter to each prompt, (l,) int32, by its seed if it has one; `one_more` is called at
        each that is there."""
        tasks = [asyncio.create_task(self._kept_loaded(adapter, how, prompt, seed)) for prompt, seed in asked]
        try:
            for finished in asyncio.as_completed(tasks):
                await finished
                one_more()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() for task in tasks]

    async def _kept_loaded(self, adapter: Adapter, how: Sampling, prompt: np.ndarray, seed: int | None) -> Response:
        """One response, whatever becomes of the server meanwhile."""
        for _ in range(ANEW + 1):
            before = self.reloads
            with suppress(Gone):
                return await self.response(self.name, how, prompt, seed, adapter.salt)
            async with self._loading:
                if self.reloads == before:  # nobody has had it loaded since
                    await self.load(adapter)
                    self.reloads += 1
        raise UserError(f"{self.told} has lost the adapter {self.name} {ANEW + 1} times over one response")

    async def response(
        self, model: str, how: Sampling, prompt: np.ndarray, seed: int | None = None, salt: str | None = None
    ) -> Response:
        """A model's response to a prompt, (l,) int32. Raises Gone where there is no such model."""
        body = asked_for(model, prompt, how, self.ends, seed, salt)

        def read(answer: Answer) -> Response:
            if answer.status == 404:
                raise Gone
            if answer.status != 200:
                raise UserError(f"{self.told} refuses a request (status {answer.status}: {answer.message})")
            return response_of(answer, prompt, how, self.ends, self.told)

        return await self.client.ask("/v1/completions", body, read)
