"""Adapters that come and go while the server runs: vLLM's `load_lora_adapter` and `unload_lora_adapter`.

They are read from below one folder, which the command line names, and from nowhere else.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path

from align.recipe.errors import UserError
from align.tools.serving.desk import Desk
from align.tools.serving.engine import Engine
from align.tools.serving.limits import Refusal
from align.tools.serving.models import NAMED
from align.tools.serving.protocol import LoadAsking, UnloadAsking


class Loading:
    """One at a time, so that two requests for one name do not meet."""

    def __init__(self, engine: Engine, desk: Desk, folder: Path) -> None:
        self.engine, self.desk, self.folder, self.lock = engine, desk, folder.resolve(), asyncio.Lock()

    async def load(self, asked: LoadAsking) -> str:
        """Put a result on the trunk. Raises Refusal."""
        name = asked.lora_name
        if not NAMED.fullmatch(name):
            raise Refusal(400, "lora_name: letters, digits and . _ - / alone")
        path = self.found(asked.lora_path)
        async with self.lock:
            before = self.engine.models.get(name)
            if before is not None and before.kind == "base":
                raise Refusal(400, f"lora_name: {name} is the base")
            if before is not None and not asked.load_inplace:
                told = f"The lora adapter '{name}' has already been loaded; load_inplace puts another in its place."
                raise Refusal(400, told)
            try:
                loaded = await asyncio.to_thread(self.engine.shelf.read, name, str(path))
                await self.desk.do(partial(self.engine.shelf.learn, loaded))
                await asyncio.wrap_future(self.engine.put(loaded))
            except UserError as error:
                raise Refusal(400, str(error)) from None
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, asked: UnloadAsking) -> str:
        """Take one away; its requests go on to their end. Raises Refusal."""
        async with self.lock:
            served = self.engine.models.get(asked.lora_name)
            if served is None:
                raise Refusal(404, f"The lora adapter '{asked.lora_name}' cannot be found.", "not_found_error")
            if served.kind == "base":
                raise Refusal(400, f"lora_name: {asked.lora_name} is the base")
            await asyncio.wrap_future(self.engine.remove(asked.lora_name))
        return f"Success: LoRA adapter '{asked.lora_name}' removed successfully."

    def found(self, given: str) -> Path:
        """A folder below ours, whatever links lead there. Raises Refusal, which does not say what lies elsewhere."""
        outside = Refusal(404, "lora_path: no such folder below that of --adapters", "not_found_error")
        try:
            path = Path(os.path.realpath(self.folder / given, strict=True))
        except (OSError, ValueError):
            raise outside from None
        if not path.is_relative_to(self.folder) or not path.is_dir():
            raise outside
        return path
