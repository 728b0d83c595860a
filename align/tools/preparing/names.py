"""Names of persons, by a model that classifies tokens; and what presidio-analyzer finds without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForTokenClassification

from align.data.preparing.privacy import Names
from align.data.preparing.private.found import Found
from align.models.checkpoints.adapters import plain_tokenizer
from align.models.checkpoints.sources import base_folder, check_weights, foreign, read_config, speaking_of
from align.models.limits import positions_of
from align.recipe.errors import UserError
from align.recipe.preparing.privacy import Privacy
from align.recipe.schema import Model

KEY = "prepare.privacy.names"
WINDOW, OVERLAP = 256, 64  # tokens that the model reads at once, and those that two windows share
AT_ONCE = 8  # windows


def names_of(section: Privacy) -> Names:
    """What the recipe's `names` and `presidio` find. Raises UserError for a model that cannot be used."""
    finders: list[Names] = [NameModel(section.names)] if section.names else []
    finders += [Presidio(section.presidio)] if section.presidio else []
    return Together(finders)


class Together:
    """All that several finders find."""

    def __init__(self, finders: Sequence[Names]) -> None:
        self.finders = finders

    def __call__(self, texts: Sequence[str]) -> list[list[Found]]:
        """For each text."""
        found = [finder(texts) for finder in self.finders]
        return [[each for of_one in parts for each in of_one] for parts in zip(*found, strict=True)]


class NameModel:
    """A token classifier with a label for persons."""

    def __init__(self, base: str) -> None:
        told = f"{KEY}: {base} cannot be loaded as a classifier of tokens"
        with speaking_of(KEY):
            folder = base_folder(Model(base=base))
            config = read_config(folder, told)
            check_weights(folder, config, base)
        with foreign(told):
            self.model, loaded = AutoModelForTokenClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        if lacking := sorted(loaded["missing_keys"]):
            raise UserError(f"{told} (it lacks {lacking[0]}, so it is no finished one)")
        self.tokenizer = plain_tokenizer(folder, KEY)
        self.persons = [i for i, label in self.model.config.id2label.items() if is_person(label)]
        if not self.persons:
            labels = ", ".join(list(self.model.config.id2label.values())[:10])
            raise UserError(f"{KEY}: {base} has no label for persons, such as PER or PERSON; it has {labels}")
        self.model.eval()
        self.window = min(WINDOW, positions_of(self.model.config) or WINDOW)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[list[Found]]:
        """The names in each text: tokens of persons, joined where nothing but a blank or a hyphen parts them."""
        return [list(self._names(text)) if text.strip() else [] for text in texts]

    def _names(self, text: str) -> Iterator[Found]:
        coded = self.tokenizer(
            text,
            truncation=True,
            max_length=self.window,
            stride=min(OVERLAP, self.window // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )
        found = set()
        for at in range(0, len(coded["input_ids"]), AT_ONCE):
            ids, mask = (coded[name][at : at + AT_ONCE] for name in ("input_ids", "attention_mask"))
            labels = self.model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
            person = torch.isin(labels, torch.tensor(self.persons)) & mask.bool()
            places = coded["offset_mapping"][at : at + AT_ONCE][person].tolist()
            found |= {(start, end) for start, end in places if end > start}
        for start, end in _joined(text, sorted(found)):
            yield Found(start, end, "NAME", " ".join(text[start:end].casefold().split()))


class Presidio:
    """presidio-analyzer's recognisers of `entities`, on an engine that needs no model."""

    def __init__(self, entities: Sequence[str]) -> None:
        try:
            from presidio_analyzer import AnalyzerEngine
            from presidio_analyzer.nlp_engine import NoOpNlpEngine
        except ImportError:
            raise UserError(
                "prepare.privacy.presidio: presidio-analyzer is not installed; run: "
                "pip install 'align[prepare-presidio]'"
            ) from None
        engine = NoOpNlpEngine([{"lang_code": "en", "model_name": ""}])
        engine.load()
        self.analyzer, self.entities = AnalyzerEngine(nlp_engine=engine, supported_languages=["en"]), list(entities)
        known = sorted(self.analyzer.get_supported_entities("en"))
        if wrong := [name for name in entities if name not in known]:
            raise UserError(f"prepare.privacy.presidio: no recogniser finds {wrong[0]}; there are {', '.join(known)}")

    def __call__(self, texts: Sequence[str]) -> list[list[Found]]:
        """What they find in each text."""
        return [sorted(map(_of(text), self.analyzer.analyze(text, "en", self.entities))) for text in texts]


def is_person(label: str) -> bool:
    """Whether a classifier means persons by it: PER, B-PER, I-PERSON, …"""
    return label.upper().rpartition("-")[2] in ("PER", "PERSON", "PS", "NAME", "GIVENNAME", "SURNAME")


def _of(text: str) -> Any:
    def found(result: Any) -> Found:
        value = " ".join(text[result.start : result.end].casefold().split())
        return Found(result.start, result.end, "NAME" if result.entity_type == "PERSON" else result.entity_type, value)

    return found


def _joined(text: str, places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ascending places of tokens as places of names."""
    start = end = None
    for first, last in places:
        if start is not None and text[end:first].strip(" -'’.") == "" and first - end < 3:
            end = max(end, last)
            continue
        if start is not None:
            yield start, end
        start, end = first, last
    if start is not None:
        yield start, end
