"""Serve results over HTTP, as OpenAI's API: the base and any number of adapters on it, in one running batch.

    python -m align.serve MODEL… [--base BASE] [--host HOST] [--port PORT] [--adapters FOLDER] [--api-key-file FILE]
                                  [--votes FILE]

Each MODEL is `final/` of a run (or the run), or a base: a checkpoint folder, a hub id, demo/smollm2-135m. NAME=MODEL
gives it another name. Needs `pip install 'align[serve]'`.
"""

from __future__ import annotations

import ipaddress
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from align.models.sampling.running import Running
from align.recipe.errors import UserError, printable
from align.recipe.paths import expanded
from align.tools.serving.desk import Desk
from align.tools.serving.engine import Engine
from align.tools.serving.models import KEY, Opened, load_models
from align.tools.serving.readers import NoRows
from align.training.borders.border import Parser, border

KEY_NAME = "ALIGN_API_KEY"
LEAST = {
    "max_tokens": 1, "max_body": 1024, "max_waiting": 1, "max_rows": 1, "cache_tokens": 64, "timeout": 1, "grace": 0
}  # fmt: skip
HELP = {
    "models": "final/ of a run, or a base; NAME=MODEL gives it a name",
    "base": "the base, where the one that the results name is not here",
    "host": "address to listen at (default: %(default)s, which only this machine reaches)",
    "port": "port to listen at; 0: any that is free (default: %(default)s)",
    "dtype": "what the trunk computes in: auto, float32 or bfloat16 (default: %(default)s)",
    "adapters": "results below this folder may be loaded and unloaded by requests (/v1/load_lora_adapter)",
    "api_key_file": f"a file with the key that requests must bring; or the environment variable {KEY_NAME}",
    "votes": "append votes on two answers to this JSONL file, as pairs that align.reward and align.dpo read",
    "max_tokens": "most tokens of an answer (default: %(default)s)",
    "max_body": "most bytes of a request (default: %(default)s)",
    "max_waiting": "requests that may wait; more are refused with status 429 (default: %(default)s)",
    "max_rows": "answers that are computed at once (default: 256 on a CPU, 1024 on a GPU)",
    "cache_tokens": "tokens whose keys and values are kept (default: by the free memory)",
    "timeout": "seconds that a request may take in all (default: %(default)s)",
    "grace": "seconds that running requests get to end after SIGTERM (default: %(default)s)",
}


def parser() -> Parser:
    """The command line."""
    made = Parser(prog="python -m align.serve", description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("models", nargs="*", metavar="MODEL", help=HELP["models"])
    made.add_argument("--base", metavar="BASE", help=HELP["base"])
    made.add_argument("--host", default="127.0.0.1", help=HELP["host"])
    made.add_argument("--port", type=int, default=8000, help=HELP["port"])
    made.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help=HELP["dtype"])
    made.add_argument("--adapters", metavar="FOLDER", help=HELP["adapters"])
    made.add_argument("--api-key-file", metavar="FILE", help=HELP["api_key_file"])
    made.add_argument("--votes", metavar="FILE", help=HELP["votes"])
    made.add_argument("--max-tokens", type=int, default=4096, help=HELP["max_tokens"])
    made.add_argument("--max-body", type=int, default=2**20, help=HELP["max_body"])
    made.add_argument("--max-waiting", type=int, default=1024, help=HELP["max_waiting"])
    made.add_argument("--max-rows", type=int, help=HELP["max_rows"])
    made.add_argument("--cache-tokens", type=int, help=HELP["cache_tokens"])
    made.add_argument("--timeout", type=float, default=600.0, help=HELP["timeout"])
    made.add_argument("--grace", type=float, default=10.0, help=HELP["grace"])
    made.add_argument("--trust-remote-code", action="store_true", help="run Python code that stands beside the base")
    return made


def api_key(file: str | None) -> str | None:
    """The key of a file or of the environment; None without one. Raises UserError."""
    if file is None:
        key = os.environ.get(KEY_NAME)
        told = f"the environment variable {KEY_NAME}"
    else:
        told = f"--api-key-file: {file}"
        try:
            key = Path(expanded(file)).read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"{told}: {getattr(error, 'strerror', None) or 'no UTF-8 text'}") from None
    if key is not None and not (key.strip() and key.isascii() and key.isprintable()):
        raise UserError(f"{told}: the key is to be printable ASCII text")
    return key


def is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_engine(loaded: Opened, rows: int | None = None, tokens: int | None = None, waiting: int = 1024) -> Engine:
    """All models on their trunk, not started yet; `loaded` is of `load_models`. Raises UserError."""
    shelf, name, results, readers = loaded
    engine = Engine(shelf, NoRows() if shelf is None else Running(shelf.trunk, rows, tokens), waiting)
    if shelf is not None:
        engine.models[name] = shelf.base(name)
    for each, folder in results:
        result = shelf.read(each, folder)
        engine.models[each] = shelf.served(result, engine.running.adapters.add(result.chain))
    engine.models |= {reader.name: reader for reader in readers}
    return engine


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with border("serve a smaller model, or give a smaller --cache-tokens"):
        given = parser().parse_args(sys.argv[1:] if argv is None else argv)
        faults = [
            f"--{name.replace('_', '-')}: {least} or more"
            for name, least in LEAST.items()
            if (value := getattr(given, name)) is not None and not least <= value <= 2**40
        ]
        if not 0 <= given.port < 2**16:
            faults.append("--port: from 0 to 65535")
        if not given.models and not given.base:
            faults.append("name what is to be served: MODEL, or --base BASE")
        if faults:
            raise UserError(*faults)
        try:
            from align.tools.serving.app import build_app
            from align.tools.serving.limits import Limits
            from align.tools.serving.listening import bound, listen, listening
            from align.tools.serving.votes import Votes, routes
        except ModuleNotFoundError as error:
            raise UserError(f"{KEY} needs {error.name}: pip install 'align[serve]'") from None
        key, local = api_key(given.api_key_file), is_local(given.host)
        adapters = None if given.adapters is None else Path(expanded(given.adapters))
        if adapters is not None and not adapters.is_dir():
            raise UserError(f"--adapters: {given.adapters} is no folder")
        votes = None if given.votes is None else Votes(Path(expanded(given.votes)))
        listener = bound(given.host, given.port)
        loaded = load_models(given.models, given.base, given.dtype, given.trust_remote_code)
        if adapters is not None and loaded.shelf is None:
            raise UserError("--adapters: no model is served that adapters could stand on; give a base")
        engine, desk = make_engine(loaded, given.max_rows, given.cache_tokens, given.max_waiting), Desk()
        limits = Limits(given.max_body, given.max_tokens, given.timeout, waiting=given.max_waiting)
        app = build_app(engine, desk, limits, key, local, adapters, routes(votes, limits))
        for remark in engine.shelf.trunk.remarks if engine.shelf else ():
            print(printable(remark), file=sys.stderr)
        if not local:
            who = "whoever has the key can use it" if key else "anybody can use it: give it a key (--api-key-file)"
            print(f"other machines reach {given.host}, and {who}; there is no TLS here", file=sys.stderr)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(printable(f"serving {', '.join(engine.models)} at http://{shown}:{port}"), flush=True)
        try:
            engine.start()
            listen(listening(app, given.grace), listener, desk)
        finally:
            engine.stop()


if __name__ == "__main__":
    main()
