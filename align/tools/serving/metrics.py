"""What the server counts, as Prometheus reads it (text format 0.0.4)."""

from __future__ import annotations

import bisect
from collections import Counter

from align.tools.serving.engine import Asked, Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # edges of histograms


class Histogram:
    """How many values lie at or below each edge."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(SECONDS) + 1), 0.0

    def add(self, value: float) -> None:
        """One more."""
        self.counts[bisect.bisect_left(SECONDS, value)] += 1
        self.total += value

    def lines(self, name: str) -> list[str]:
        """In Prometheus' words."""
        told, below = [], 0
        for edge, count in zip((*SECONDS, "+Inf"), self.counts, strict=True):
            below += count
            told.append(f'{name}_bucket{{le="{edge}"}} {below}')
        return [*told, f"{name}_sum {self.total:.6f}", f"{name}_count {below}"]


class Metrics:
    """Counters of one server, from its start."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.replies: Counter[tuple[str, int]] = Counter()  # by path and status
        self.ends: Counter[tuple[str, str]] = Counter()  # answers, by model and why they ended
        self.read: Counter[str] = Counter()  # tokens of prompts, by model
        self.said: Counter[str] = Counter()  # tokens of answers, by model
        self.reused = 0  # tokens of prompts that were known
        self.first, self.whole, self.between = Histogram(), Histogram(), Histogram()

    def time(self, asked: Asked, tokens: int) -> None:
        """How long an answer of so many tokens took."""
        if asked.first is not None:
            self.first.add(asked.first - asked.came)
            self.whole.add(asked.last - asked.came)
            if tokens > 1:
                self.between.add((asked.last - asked.first) / (tokens - 1))

    def text(self) -> str:
        """All of it."""
        running, lines = self.engine.running, list[str]()

        def put(name: str, kind: str, about: str, values: list[str]) -> None:
            lines.extend([f"# HELP align_{name} {about}", f"# TYPE align_{name} {kind}", *values])

        def counted(name: str, about: str, values: dict[str, int]) -> None:
            put(name, "counter", about, [f"align_{name}{labels} {value}" for labels, value in sorted(values.items())])

        gauges = {
            "requests_waiting": ("Requests that have not begun.", self.engine.waiting),
            "requests_running": ("Requests in the running batch.", self.engine.busy),
            "kept_tokens": ("Tokens that keys and values have memory for.", running.pools.held),
            "kept_tokens_limit": ("The most of them.", running.pools.budget),
            "prefix_tokens": ("Tokens of beginnings that are kept for requests to come.", running.prefixes.held),
            "models": ("Models that are served.", len(self.engine.models)),
        }
        for name, (about, value) in gauges.items():
            put(name, "gauge", about, [f"align_{name} {value}"])
        counted("steps_total", "Steps of the running batch.", {"": self.engine.steps})
        counted("faults_total", "Steps that failed.", {"": self.engine.faults})
        counted("reused_tokens_total", "Tokens of prompts that had been computed before.", {"": self.reused})
        counted("prompt_tokens_total", "Tokens of prompts.", {_labels(model=m): n for m, n in self.read.items()})
        counted("generated_tokens_total", "Tokens of answers.", {_labels(model=m): n for m, n in self.said.items()})
        ends = {_labels(model=model, reason=why): n for (model, why), n in self.ends.items()}
        counted("answers_total", "Answers, by why they ended.", ends)
        replies = {_labels(path=path, status=status): n for (path, status), n in self.replies.items()}
        counted("replies_total", "Replies, by path and status.", replies)
        histograms = {
            "first_token_seconds": ("From a request to its first token.", self.first),
            "token_seconds": ("From a token to the next, the mean of an answer.", self.between),
            "answer_seconds": ("From a request to its end.", self.whole),
        }
        for name, (about, values) in histograms.items():
            put(name, "histogram", about, values.lines(f"align_{name}"))
        return "\n".join(lines) + "\n"


def _labels(**values: object) -> str:
    escaped = (
        (name, str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))
        for name, value in values.items()
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"
