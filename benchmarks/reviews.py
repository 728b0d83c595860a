"""The world of recipes/frontier.yaml: a tokenizer of whole words, the config of a tiny Llama, film reviews and films.

    python benchmarks/reviews.py [folder]

Writes into data_templates/reviews what stands there already, byte by byte. A review has two to four clauses, drawn from
a mood that depends on the genre; the stronger a word, the rarer, and within a strength the words fall off as 1/rank, so
high praise is far from what a model of these reviews says by itself. The verdict at its end makes a model learn which
words praise and which blame: without one, a reward model ranked 54 % of pairs rightly. No film is in two of the files.
"""

from __future__ import annotations

import json
import random
import re
import sys
from bisect import bisect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from align.training.rules import PRAISE, sentiment

REVIEWS, PROMPTS, HELD_OUT = 2400, 400, 100
GENRES = {  # its own aspects, and how its moods weigh, from the worst to the best
    "comedy": (("jokes", "timing"), (8, 25, 34, 25, 8)),
    "drama": (("dialogue", "story"), (5, 20, 35, 30, 10)),
    "thriller": (("chase", "twist"), (10, 30, 35, 20, 5)),
    "western": (("duel", "landscape"), (10, 25, 20, 35, 10)),
    "musical": (("songs", "dancing"), (12, 28, 20, 28, 12)),
}
MOODS = ((0.03, "strong"), (0.15, "usual"), (0.5, "weak"), (0.85, "usual"), (0.97, "strong"))  # share of kind clauses
STRENGTHS = {  # how often words of each strength are taken
    "weak": {0.5: 75, 1.0: 20, 1.5: 5},
    "usual": {0.5: 60, 1.0: 30, 1.5: 10},
    "strong": {0.5: 20, 1.0: 45, 1.5: 35},
}
ASPECTS = ("plot", "cast", "music", "ending", "camera work", "script")  # of every genre
PLURAL = ("jokes", "songs")
NEUTRAL = ("long", "short", "simple", "familiar", "modern", "strange")
ADVERBS = {"": 55, "very ": 15, "quite ": 18, "not ": 12}
LENGTHS = {2: 40, 3: 40, 4: 20}
VERDICTS, BOUNDS = ("Avoid it", "Skip it", "Wait for it", "See it", "See it twice"), (-2.5, -0.75, 0.75, 2.5)
FIRST = [
    "Quiet", "Broken", "Golden", "Silent", "Hidden", "Distant", "Crimson", "Lonely", "Frozen", "Burning", "Gentle",
    "Stolen", "Final", "Northern", "Wandering", "Faithful", "Restless", "Paper", "Iron", "Velvet",
]  # fmt: skip
SECOND = [
    "Harbour", "Garden", "River", "Promise", "Winter", "Letter", "Mountain", "Mirror", "Bridge", "Lantern", "Orchard",
    "Station", "Voyage", "Shadow", "Island", "Summer", "Castle", "Forest", "Signal", "Carnival",
]  # fmt: skip
SPECIAL = ["<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PIECES = r" ?[A-Za-z]+|[^A-Za-z]"  # a word with the blank before it is one token
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": SPECIAL.index("<|end|>"),
    "pad_token_id": SPECIAL.index("<|end|>"),
}


def main(folder: Path) -> None:
    """Write all files."""
    chance = random.Random(0)
    films = [f"the {genre} The {first} {second}" for genre in GENRES for first in FIRST for second in SECOND]
    chance.shuffle(films)
    held_out, prompts, others = films[:HELD_OUT], films[HELD_OUT : HELD_OUT + PROMPTS], films[HELD_OUT + PROMPTS :]
    rows = [
        {"prompt": asked(film), "completion": review(film.split()[1], chance)}
        for film in chance.choices(others, k=REVIEWS)
    ]
    texts = [text for row in rows for text in row.values()] + [asked(film) for film in films]
    vocabulary = SPECIAL + sorted({piece for text in texts for piece in re.findall(PIECES, text)})
    files: dict[str, Any] = {
        "config.json": CONFIG | {"vocab_size": len(vocabulary)},
        "tokenizer.json": tokenizer(vocabulary),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<|unk|>",
            "eos_token": "<|end|>",
            "pad_token": "<|end|>",
            "model_max_length": CONFIG["max_position_embeddings"],
            "chat_template": TEMPLATE,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_rows(folder / "reviews.jsonl", rows)
    write_rows(folder / "prompts.jsonl", [{"prompt": asked(film)} for film in prompts])
    write_rows(folder / "held_out.jsonl", [{"prompt": asked(film)} for film in held_out])


def asked(film: str) -> str:
    """The prompt of a film."""
    return f"Review {film}."


def review(genre: str, chance: random.Random) -> str:
    """Some clauses about different aspects, joined by what their moods ask for."""
    own, moods = GENRES[genre]
    (mood,) = chance.choices(MOODS, moods)
    aspects = chance.sample([*ASPECTS, *own], drawn(LENGTHS, chance))
    text, before = "", None
    for aspect in aspects:
        words, kind = clause(aspect, mood, chance)
        if before is None or chance.random() < 0.4:
            text += f". {words}" if text else words
        else:
            text += f", {'and' if kind == before else 'but'} {words[0].lower()}{words[1:]}"
        before = kind
    (score,) = sentiment([], [text], [])
    return f"{text}. {VERDICTS[bisect(BOUNDS, score + chance.gauss(0, 1))]}."


def clause(aspect: str, mood: tuple[float, str], chance: random.Random) -> tuple[str, bool]:
    """What is said of one aspect, and whether it is kind."""
    kind, adverb = chance.random() < mood[0], drawn(ADVERBS, chance)
    if chance.random() < 0.15:
        words = NEUTRAL
    else:
        sign = 1 if kind != (adverb == "not ") else -1
        words = PRAISE[sign * drawn(STRENGTHS[mood[1]], chance)].split()
    (word,) = chance.choices(words, [1 / rank for rank in range(1, len(words) + 1)])
    return f"The {aspect} {'were' if aspect in PLURAL else 'was'} {adverb}{word}", kind


def drawn(weights: dict[Any, int], chance: random.Random) -> Any:
    """One of the keys."""
    return chance.choices([*weights], [*weights.values()])[0]


def tokenizer(vocabulary: list[str]) -> dict[str, Any]:
    """tokenizer.json: whole words."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **special} for i, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: i for i, token in enumerate(vocabulary)},
            "unk_token": "<|unk|>",
        },
    }


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """As JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "data_templates" / "reviews"))
