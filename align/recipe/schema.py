"""The sections that every recipe has. A stage adds its own on top; unknown keys are errors everywhere.

The docstring under each field is also its `--help` and its description in the JSON schema.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from align.recipe.paths import Location
from align.recipe.preparing.preparation import Preparation
from align.recipe.section import Fraction, PositiveInt, Section
from align.recipe.source import Source
from align.recipe.train import Train

OTHER_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica", "eva", "orthogonal")  # of peft


class Model(Section):
    """The base checkpoint that becomes the run's trunk."""

    base: Location
    """A local folder in Hugging Face format, a hub id, or `demo/smollm2-135m` (the embedded model)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: Location | list[Location] | None = None
    """`final/` folder of an earlier run: its LoRA is merged into the base, in float32, when the model is loaded, or
    kept beside a quantised one. A list is in the order of training: `[runs/sft/final, runs/dpo/final]`."""
    add_tokens: list[str] = Field(default_factory=list)
    """Tokens whose embedding rows train beside the LoRA. Those that the tokenizer does not have are added to it; those
    without a row get one."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the base's config and tokenizer and starts from new weights: training from scratch."""
    config: dict[str, Any] = Field(default_factory=dict)
    """With `init: random`: entries that replace those of the base's config, such as `hidden_size`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen trunk: `auto` is bfloat16 where the device computes it natively, else float32. What trains is
    float32. `float16` is for tools that train nothing."""
    quantize: Literal["8bit", "4bit"] | None = None
    """Store the frozen trunk's linear layers in 8 or 4 bits a weight: `4bit` is NF4 with double quantisation (QLoRA,
    Dettmers et al. 2023, arXiv 2305.14314). Needs bitsandbytes and a LoRA."""
    layout: Literal["auto", "tree", "padded"] = "auto"
    """How batches are laid out. `auto` tries the packed tree layout on the loaded model and keeps it if it is exact."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time, much less memory."""
    chat_template: Location | None = None
    """`chatml`, `plain` or a Jinja file. Default: the tokenizer's own; without one, `chatml` if its vocabulary has
    `<|im_start|>`, else `plain`."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking: false`. They become its defaults, in the result too."""
    template_day: str | None = None
    """The day, YYYY-MM-DD, that a chat template writes which otherwise writes today's, as Llama 3.2's does; in the
    result too. Default: that of the adapter, else 2024-07-26."""
    trust_remote_code: bool = False
    """Run Python code that the base's repository carries. Leave off unless you have read it."""

    @field_validator("add_tokens")
    @classmethod
    def _are_tokens(cls, tokens: list[str]) -> list[str]:
        if not all(token.strip() for token in tokens):
            raise ValueError("a token needs a letter that is no blank")
        if len(set(tokens)) < len(tokens):
            raise ValueError("a token stands there twice")
        return tokens

    @field_validator("template_day")
    @classmethod
    def _is_a_day(cls, day: str | None) -> str | None:
        try:
            return day and date.fromisoformat(day).isoformat()
        except ValueError:
            raise ValueError("expected a day as YYYY-MM-DD") from None

    @model_validator(mode="after")
    def _rows_are_whole(self) -> Model:
        if self.add_tokens and self.quantize:
            raise ValueError("`add_tokens` trains embedding rows, which `quantize` cannot have; leave one out")
        return self

    @property
    def adapters(self) -> list[str]:
        """The adapters that are merged, in order."""
        return [self.adapter] if isinstance(self.adapter, str) else list(self.adapter or [])


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685). `lora: null` trains every weight instead."""

    r: PositiveInt = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / r (alpha / sqrt(r) with `rslora`)."""
    dropout: Fraction = 0.0
    """Dropout on the adapters' input, in training only."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Every linear layer but the output head, or the names of the modules to adapt."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732)."""
    dora: bool = False
    """Learn the length of each weight's rows apart from their direction (Liu et al. 2024, arXiv 2402.09353). Slower."""
    init: Literal["default", "gaussian"] = "default"
    """How A starts: `default` is uniform (Kaiming He et al.), `gaussian` normal. B starts at 0, and so the update."""

    @field_validator("init", mode="before")
    @classmethod
    def _starts_at_the_base(cls, init: object) -> object:
        if init in OTHER_STARTS:
            raise ValueError(
                f"{init} does not start at the base as it is, on which references and merging stand; take default or "
                "gaussian"
            )
        return init


class Eval(Section):
    """Held-out rows: a seeded share of the training rows, or sources of their own."""

    fraction: Fraction = 0.0
    """Share of the training rows held out by prompt: no prompt stands on both sides."""
    sources: list[Source] = Field(default_factory=list)
    """Sources of their own, all of whose rows are evaluated."""
    max_rows: PositiveInt | None = None
    """Evaluate at most this many (seeded choice)."""
    overlap: Literal["drop", "keep"] = "drop"
    """With sources: what happens to training rows whose prompt is in them too. `keep` is for sets in which many rows
    share one prompt."""

    @model_validator(mode="after")
    def _one_of(self) -> Eval:
        if self.fraction and self.sources:
            raise ValueError("give either a fraction of the training rows or sources, not both")
        return self


class Data(Section):
    """What the run reads, and what happens to rows it cannot take."""

    train: list[Source] = Field(min_length=1)
    """The sources, mixed by their weights in a seeded order."""
    weigh_by: Literal["rows", "tokens"] = "rows"
    """What a source's `weight` counts. `rows`: passes over its rows in one epoch. `tokens`: parts of an epoch's tokens,
    so that weights 3 and 1 give three quarters and one; an epoch is as many tokens as all sources have."""
    eval: Eval = Field(default_factory=Eval)
    """The held-out rows."""
    max_length: PositiveInt = 1024
    """Most tokens in one example."""
    overlong: Literal["error", "drop", "truncate", "chunk"] = "error"
    """What happens to a longer one. `chunk` cuts texts into examples of at most `max_length` tokens, and drops
    conversations. Drops and cuts are written to ledger.jsonl."""
    invalid: Literal["error", "drop"] = "error"
    """What happens to a row that cannot be taken (no assistant turn, empty content, …). Drops go to ledger.jsonl."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Exact duplicates are always counted; `drop` keeps the first of each."""
    prepare: Preparation | None = None
    """Steps of `align.prepare` that rows to train on pass before they become tokens. Default: none."""


class Batch(Section):
    """How much is computed at once."""

    examples: PositiveInt = 16
    """Examples in one optimizer step, over all processes: a number of the experiment, not of the hardware."""
    row_tokens: PositiveInt | Literal["auto"] = "auto"
    """Most tokens in one packed row (one forward pass on one device). Changes speed and memory, never the update."""
    cache_tokens: PositiveInt | Literal["auto"] = "auto"
    """Most tokens of prompts and responses whose keys and values are kept at once, where a run samples. `auto` follows
    the free memory. Changes speed and memory, never what is drawn."""


class Optim(Section):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on float32 weights."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.05
    """Share of all steps when below 1, else a number of steps, over which it rises linearly from 0."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where the schedule ends, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled; not applied to biases, norms and other vectors."""
    beta1: Fraction = 0.9
    """Decay of the gradient's running mean."""
    beta2: Fraction = 0.999
    """Decay of the squared gradient's running mean."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the global gradient norm to this; 0 does not clip."""


class Log(Section):
    """What a run tells, and to whom."""

    every: PositiveInt = 1
    """Steps between lines in metrics.jsonl and on the screen."""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default_factory=lambda: ["tensorboard"]
    )
    """Where metrics go besides metrics.jsonl. All but tensorboard must be installed and may use the network."""
    project: str = "align"
    """Project name for the trackers."""
    samples: list[str] = Field(default_factory=list)
    """Prompts that are answered before and after training, shown in report.html."""
    samples_as: Literal["chat", "text"] = "chat"
    """`chat`: each is a user turn; `text`: each is the beginning of a text, to be continued."""
    sample_tokens: PositiveInt = 64
    """Most tokens of such an answer."""


class BaseRecipe(Section):
    """What every stage's recipe holds; a stage narrows `stage` and adds its own section."""

    stage: str
    """The stage that this recipe is for."""
    run: Location
    """The run's output folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes the order of examples, the splits, the initial weights and dropout."""
    model: Model
    lora: Lora | None = Field(default_factory=Lora)
    data: Data
    batch: Batch = Field(default_factory=Batch)
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    log: Log = Field(default_factory=Log)

    @model_validator(mode="after")
    def _fits_together(self) -> BaseRecipe:
        if self.model.quantize and self.lora is None:
            raise ValueError("a quantised trunk cannot be trained: give a `lora` section or drop `model.quantize`")
        if self.model.quantize and self.lora.dora:
            raise ValueError(
                "DoRA rescales rows of whole weights, which a quantised trunk has not: set `lora.dora: false` or drop "
                "`model.quantize`"
            )
        if self.model.init == "random" and (self.lora or self.model.quantize or self.model.adapters):
            raise ValueError(
                "new weights are trained whole: with `model.init: random` set `lora: null`, and no `model.quantize` "
                "or `model.adapter`"
            )
        if self.model.dtype == "float16":
            raise ValueError(
                "`model.dtype: float16` cannot train: small gradients become 0 in it; set bfloat16, or float32 where "
                "the device has no bfloat16"
            )
        if self.model.config and self.model.init != "random":
            raise ValueError("`model.config` needs `model.init: random`")
        train, held = self.train, self.data.eval
        if not (held.fraction or held.sources or getattr(train, "generate", None)):
            asked = [
                name for name in ("best", "patience") if getattr(train, name) != type(train).model_fields[name].default
            ]
            if asked:
                raise ValueError(f"`train.{asked[0]}` needs held-out rows to evaluate: give `data.eval`")
        return self

    @property
    def folder(self) -> Path:
        """The run folder as a path."""
        return Path(self.run)
