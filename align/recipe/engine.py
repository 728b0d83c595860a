"""The section of an inference server that samples for a run."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from align.recipe.paths import Location
from align.recipe.schema import PositiveInt, Section

# Where the server is and how it is asked: what may change between one start of a run and the next.
PLACES = {"url", "api_key_env", "adapters", "adapters_there", "parallel", "timeout", "patience", "tolerance"}


class Server(Section):
    """An OpenAI-compatible server of the same trunk that loads adapters while it runs, such as vLLM."""

    url: str
    """Its address, such as `http://127.0.0.1:8000`."""
    api_key_env: str | None = None
    """The environment variable that holds its API key; the key itself is never written anywhere. Default: no key."""
    adapters: Location | None = None
    """Folder that the actor's adapter is written to for the server to read. Default: `engine/` in the run's folder."""
    adapters_there: str | None = None
    """The same folder as the server sees it, where it is another machine or a container. Default: the same path."""
    seeds: bool = True
    """Send a seed with each request, so that a server that is asked for the same draws the same, up to rounding."""
    importance_cap: Annotated[float | None, Field(gt=0)] = 2.0
    """The policy loss of each token is multiplied by min(p / p_engine, this): p is the actor's probability on the own
    trunk, p_engine that of the engine that drew the token. `null`: by 1."""
    tolerance: Annotated[float, Field(gt=0)] = 0.1
    """At the start, and when the server comes back, its log-probabilities may differ from the own trunk's by this much
    on average, in nats a token."""
    parallel: PositiveInt = 128
    """Most requests of one process at a time."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds to wait for one answer before it is asked for again."""
    patience: Annotated[float, Field(ge=0)] = 300.0
    """Seconds for which a server that is full, gone or failing is asked again; then the run saves its state and
    ends."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018  raises ValueError where it is none
        except ValueError as error:
            raise ValueError(f"{url[:80]!r} is no address ({error})") from None
        plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise ValueError(f"{url[:80]!r} is no address of a server; write it as http://HOST:PORT")
        if "@" in parts.netloc:
            raise ValueError("a password in the address would be written to the run's files; use `api_key_env`")
        if parts.query or parts.fragment:
            raise ValueError(f"{url[:80]!r} has more than host, port and path")
        return url.rstrip("/").removesuffix("/v1")
