"""What is served, by name: the base, adapters on it, reward models and classifiers.

All stand on one base. An adapter that was trained on base + earlier adapters brings those as a chain, so results of
several stages of one pipeline are served side by side, and none is merged.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.data.templates.ends import turn_ends
from align.models.base import load_base, load_tokenizer
from align.models.checkpoints.adapters import stands_on, stranger, trunk_of
from align.models.checkpoints.generation import ends_of
from align.models.checkpoints.results import CONFIG, SCORING, About, Result, read_about, read_result
from align.models.checkpoints.sources import is_file, is_folder, speaking_of
from align.models.sampling.adapters import BARE, Chain, chain_of
from align.models.sampling.requests import Voice
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.paths import location
from align.recipe.schema import Lora, Model
from align.tools.chat.talker import result_folder
from align.tools.serving.readers import reads_alone
from align.training.labelling.classifier import Classifier

Kind = Literal["base", "adapter", "reward", "classify"]
KEY = "align.serve"
NAMED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")  # what a model may be called
NO_UPDATE = Lora(r=1, alpha=1)  # the trunk's layers as an adapted trunk has them; it never acts
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


class Served(NamedTuple):
    """A model as a request names it."""

    name: str
    kind: Kind
    voice: Voice
    source: str  # the folder, or what the base is called
    created: int  # seconds since 1970
    head: Tensor | None = None  # (K, d) float32, where it scores
    about: About | None = None
    reader: Classifier | None = None  # where it scores on a trunk of its own

    @property
    def answers(self) -> bool:
        """Whether it writes text."""
        return self.kind not in SCORING


class Loaded(NamedTuple):
    """A result that was read and found to belong on the trunk; it is not there yet."""

    name: str
    kind: Kind
    source: str
    chain: Chain
    head: Tensor | None
    about: About


class Shelf:
    """The trunk, and how results on it are read."""

    def __init__(self, model: Model, trunk: Trunk) -> None:
        self.model, self.trunk = model, trunk
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}

    def base(self, name: str) -> Served:
        """The bare trunk."""
        return Served(name, "base", self._voice(BARE, self.trunk.tokenizer), self.trunk.base_name, int(time.time()))

    def read(self, name: str, folder: str) -> Loaded:
        """A result, checked against the trunk; UserError for one that does not belong there. Runs in any thread."""
        key = f"{KEY}: {name}"
        result = read_result(folder, key, "a finished run that trained a LoRA")
        stage = result.about.stage
        section = trunk_of(result, key, "put it back, or merge the adapters (align.merge)", self.model.base)
        fingerprint, chain = self.trunk.fingerprint, [*(read_result(each, key) for each in section.adapters), result]
        if more := next((each for each in chain if each.config.tokens), None):  # they are in the next fingerprint
            told = f"{more.folder} brings rows of added tokens"
            raise UserError(f"{key}: {told}; merge {folder} with align.merge")
        for each in chain:
            if each.about.fingerprint != fingerprint or (each is chain[0] and not stands_on(each, self.trunk)):
                raise UserError(f"{key}: {stranger(each, self.trunk, 'the base that is served')}")
            if each.about.stage in SCORING and each is not result:
                raise UserError(
                    f"{key}: {each.folder} is a result of stage {each.about.stage}, which only scores texts"
                )
            fingerprint = each.merged_fingerprint(fingerprint)
        head, weights = _head(result, self.trunk, key) if stage in SCORING else (None, result.weights)
        chain[-1] = result._replace(weights=weights)
        kind = stage if stage in SCORING else "adapter"
        return Loaded(name, kind, str(result.folder), chain_of(self.trunk, chain, key), head, result.about)

    def learn(self, loaded: Loaded) -> None:
        """Its tokenizer and chat template: in the main thread, where a template's time has a limit."""
        self._voice(BARE, self._tokenizer(Path(loaded.source)))

    def served(self, loaded: Loaded, number: int) -> Served:
        """A result that is on the trunk under this number."""
        tokenizer = self._tokenizer(Path(loaded.source))
        voice = self._voice(number, tokenizer)
        return Served(loaded.name, loaded.kind, voice, loaded.source, int(time.time()), loaded.head, loaded.about)

    def _tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        """Read once, however many results have the same."""
        digest = sha256()
        for file in TOKENIZER:
            digest.update(file.encode() + ((folder / file).read_bytes() if is_file(folder / file) else b""))
        key = digest.hexdigest()
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(self.model.model_copy(update={"adapter": str(folder)}))
        return self._tokenizers[key]

    def _voice(self, number: int, tokenizer: PreTrainedTokenizerBase) -> Voice:
        ends = turn_ends(tokenizer)
        stops = {tokenizer.eos_token_id, *ends_of(self.trunk.plain.generation_config), *ends.ids}
        return Voice(number, tokenizer, frozenset(stop for stop in stops if stop is not None), ends.texts)


def _head(result: Result, trunk: Trunk, key: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The head of a scoring result, (K, d) float32, and its other weights."""
    names = [name for name in result.weights if name.endswith("score.weight")]
    if len(names) != 1 or result.weights[names[0]].ndim != 2 or result.weights[names[0]].shape[1] != trunk.width:
        raise UserError(f"{key}: {result.folder} has no head on {trunk.width} features")
    others = {name: weight for name, weight in result.weights.items() if name not in names}
    return result.weights[names[0]].float().to(trunk.device), others


def named(given: str) -> tuple[str, str]:
    """What the command line names, NAME=MODEL or MODEL alone, as name and model. A run goes by its folder's name."""
    name, equals, model = given.partition("=")
    model = location(model if equals else given)
    if not equals:
        folder = Path(model)
        final = folder.name in ("final", "best") and folder.resolve().parent.name
        name = (folder.resolve().parent.name if final else folder.resolve().name) if is_folder(folder) else model
    if not is_folder(Path(model)) and model.startswith(("/", ".")):
        raise UserError(f"{KEY}: there is no folder {model}; give a run's folder, its final/, or a base")
    if not NAMED.fullmatch(name):
        raise UserError(f"{KEY}: {name!r} cannot be the name of a model; give NAME={model}")
    return name, model


class Opened(NamedTuple):
    """What the command line names, read so far as it stands on one trunk."""

    shelf: Shelf | None  # None: no model answers
    base: str  # its name
    results: list[tuple[str, str]]  # on it, by name and folder
    readers: list[Served]  # classifiers on trunks of their own


def load_models(given: Sequence[str], base: str | None, dtype: str, trust: bool = False) -> Opened:
    """The trunk that the command line's models stand on, and those that have one of their own.

    Raises UserError for what is not there, or cannot be served.
    """
    pairs = [named(each) for each in given]
    pairs = [(name, str(result_folder(model))) for name, model in pairs]
    alone = [pair for pair in pairs if reads_alone(pair[1], f"{KEY}: {pair[0]}", base and named(base)[1], trust)]
    pairs = [pair for pair in pairs if pair not in alone]
    results = [(name, folder) for name, folder in pairs if is_file(Path(folder) / CONFIG)]
    bases = [pair for pair in pairs if pair not in results] + ([named(base)] if base and (pairs or not alone) else [])
    if len(bases) > 1:
        raise UserError(f"{KEY}: {', '.join(name for name, _ in bases)} are several bases; start a server for each")
    names = [name for name, _ in (*bases, *results, *alone)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{KEY}: two models are called {twice!r}; give NAME=FOLDER")
    readers = [reader(name, folder, None if pairs else base, trust) for name, folder in alone]
    if not (bases or results):
        return Opened(None, "", [], readers)
    quantize = None
    if results:
        first = read_result(results[0][1], KEY, "a finished run that trained a LoRA")
        section = trunk_of(first, KEY, "give --base", bases[0][1] if bases else None, trust)
        quantize = section.quantize
    model = Model(
        base=section.base if results else bases[0][1], dtype=dtype, quantize=quantize, trust_remote_code=trust
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with speaking_of(KEY):
        trunk = Trunk(load_base(model, device, frozen=True), model, NO_UPDATE)
    if not trunk.packed:
        raise UserError(f"{KEY}: {model.base}: its rows cannot be computed side by side: {trunk.layout_reason}")
    name = bases[0][0] if bases else named(model.base)[0]
    if name in {other for other, _ in (*results, *alone)}:
        raise UserError(f"{KEY}: the base is called {name!r} too; give --base NAME={model.base}")
    return Opened(Shelf(model, trunk), name, results, readers)


def reader(name: str, folder: str, base: str | None, trust: bool) -> Served:
    """A classifier on a trunk of its own. Raises UserError."""
    key = f"{KEY}: {name}"
    made = Classifier(Path(folder), base and named(base)[1], trust, key)
    voice = Voice(BARE, made.tokenizer)
    return Served(name, "classify", voice, folder, int(time.time()), None, read_about(Path(folder), key), made)
