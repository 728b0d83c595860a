"""A merged checkpoint for other programs: GGUF by llama.cpp's converter, and a Modelfile for Ollama.

Ollama writes prompts by a template in Go's language. It is made from what the chat template writes in a few probes, and
given only where it writes whole conversations alike.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from align.models.checkpoints.sources import first_line
from align.recipe.errors import UserError

CONVERTER = "convert_hf_to_gguf.py"
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "auto")  # what the converter writes; llama-quantize makes others
HOW = (
    "get llama.cpp (https://github.com/ggml-org/llama.cpp), install its requirements, and put "
    f"{CONVERTER} on PATH, or its folder into LLAMA_CPP"
)
MARKS = {"system": "\ufdd0s\ufdd1", "user": "\ufdd0u\ufdd1", "assistant": "\ufdd0a\ufdd1"}  # of noncharacters


def converter() -> Path:
    """llama.cpp's converter; UserError, which says how to get it, where there is none."""
    beside = Path(os.environ.get("LLAMA_CPP", "")) / CONVERTER
    found = str(beside) if beside.is_file() else shutil.which(CONVERTER)
    if found is None:
        raise UserError(f"--gguf: {CONVERTER} is not installed; {HOW}")
    return Path(found)


def to_gguf(script: Path, checkpoint: Path, kind: str) -> Path:
    """Have a checkpoint converted; the file. UserError with the converter's last line where that fails."""
    file = checkpoint / f"model-{kind}.gguf"
    command = [sys.executable, str(script), str(checkpoint), "--outtype", kind, "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode or not file.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        last = lines[-1][:200] if lines else "no word"
        needs = "ModuleNotFoundError" in last
        remedy = "; install the converter's requirements into the environment of align" if needs else ""
        raise UserError(f"--gguf: {script} ended with status {done.returncode} ({last}){remedy}")
    return file


def modelfile(tokenizer: Tokenizer, generation: GenerationConfig, weights: str) -> tuple[str, str | None]:
    """The text of a Modelfile, and why it has no template, or None."""
    lines, why = [f"FROM ./{weights}"], None
    try:
        lines.append(f'TEMPLATE """{go_template(tokenizer)}"""')
    except ValueError as error:
        why = str(error)
        lines.append(f"# No TEMPLATE: {why}. Ollama takes the one inside a GGUF file.")
    ends = generation.eos_token_id
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in ([ends] if isinstance(ends, int) else ends or [])]
    for stop in dict.fromkeys([*tokens, *(generation.stop_strings or [])]):
        lines.append(f"PARAMETER stop {_quoted(stop)}")
    return "\n".join(lines) + "\n", why


def go_template(tokenizer: Tokenizer) -> str:
    """The chat template in Go's template language. Raises ValueError, with the reason, where that cannot be had."""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    parts = _parts(tokenizer)
    known = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token if known and known[0] == tokenizer.bos_token_id else ""  # then Ollama writes it, too
    start, system = (parts[name].removeprefix(bos) for name in ("start", "before_system"))
    around = {"system": (system, parts["after_system"]), "user": parts["user"], "assistant": parts["assistant"]}
    texts = [start, parts["tail"], *(text for both in around.values() for text in both)]
    if any(sign in text for text in texts for sign in ('"""', "{{", "}}")):
        raise ValueError("the chat template writes what a Modelfile cannot hold")
    turns = "".join(
        f'{{{{ {"else " * bool(number)}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for number, (role, (before, after)) in enumerate(around.items())
    )
    own = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{start}{{{{ end }}}}'
    return f"{own}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{parts['tail']}"


def _parts(tokenizer: Tokenizer) -> dict[str, str | tuple[str, str]]:
    """What the chat template writes before the first turn, around the words of each role, and before an answer.

    Raises ValueError where it does more than write one turn after the other: it is tried on talks.
    """

    def written(*roles: str, ask: bool = False) -> str:
        talk = [{"role": role, "content": MARKS[role]} for role in roles]
        try:
            text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # a template may do anything
            raise ValueError(f"the chat template cannot write {' and '.join(roles)} ({first_line(error)})") from None
        if [MARKS[role] for role in roles] != re.findall("\ufdd0.\ufdd1", text):
            raise ValueError("the chat template leaves out or changes words")
        return text

    def gaps(*roles: str) -> list[str]:
        return re.split("\ufdd0.\ufdd1", written(*roles))

    first, last = gaps("user")
    to_answer, after_answer = gaps("user", "assistant")[1:]
    to_question = gaps("user", "assistant", "user")[2]
    if not (to_answer.startswith(last) and to_question.startswith(after_answer)):
        raise ValueError("the chat template writes a turn otherwise where another follows")
    user = to_question[len(after_answer) :], last
    before_system, to_user, _ = gaps("system", "user")
    if not (first.endswith(user[0]) and to_user.endswith(user[0])):
        raise ValueError("the chat template writes the first question otherwise than later ones")
    parts = {
        "start": first[: len(first) - len(user[0])],
        "before_system": before_system,
        "after_system": to_user[: len(to_user) - len(user[0])],
        "user": user,
        "assistant": (to_answer[len(last) :], after_answer),
        "tail": written("user", ask=True).rpartition(MARKS["user"])[2][len(last) :],
    }
    for roles, ask in (
        (("user",), True),
        (("system", "user"), True),
        (("user", "assistant", "user"), True),
        (("system", "user", "assistant", "user", "assistant"), False),
    ):
        if _made(parts, roles, ask) != written(*roles, ask=ask):
            raise ValueError("the chat template does more than write one turn after the other")
    return parts


def _made(parts: dict, roles: Sequence[str], ask: bool) -> str:
    """What the parts make of a talk, as Ollama will."""
    around = {"system": (parts["before_system"], parts["after_system"])} | parts
    turns = "".join(around[role][0] + MARKS[role] + around[role][1] for role in roles)
    return parts["start"] * (roles[0] != "system") + turns + parts["tail"] * ask


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
