"""The trunk: one base model that every role of a run stands on.

A role is a LoRA adapter on the trunk (with a head where it scores); the reference is the trunk with adapters off. With
`lora: null` the trunk itself is trained.

Shapes: R rows, L tokens in a row, d hidden size, n labels of the batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from align.data.templates.ends import turn_ends
from align.data.templates.texts import said
from align.data.trees import GPU_MULTIPLE, Forest
from align.models import acceleration
from align.models.attention import NAME as FOREST
from align.models.attention import Attention, ForestMask, dense_attention
from align.models.base import Base, compute_dtype
from align.models.checkpoints.generation import ends_of
from align.models.checkpoints.results import META
from align.models.layout import faster_attention, layout_of
from align.models.lora import Switch, acts, adapted, beneath
from align.models.memory import budgets, elsewhere_bytes, free_bytes
from align.models.quantized import ask_for_gradients
from align.models.scoring import described, save_beside
from align.objectives.logprobs import linear_logprobs
from align.recipe.schema import Lora, Model

Whole = Callable[..., AbstractContextManager]  # within whole(part), a part, or whole() all weights are in one piece


class Trunk(nn.Module):
    """Base model and adapter behind one forward pass: log-probabilities of a forest's labels, or, with a head of
    `outputs`, scores of its paths."""

    def __init__(
        self,
        base: Base,
        model: Model,
        lora: Lora | None,
        seed: int = 0,
        outputs: int | None = None,
        shard: Callable[[Trunk], Whole] | None = None,  # leaves a part of each of the base's weights on this process
    ) -> None:
        super().__init__()
        self.fingerprint, self.base_name, self.tokenizer = base.fingerprint, base.name, base.tokenizer
        self.links, self.added, self.unused = base.links, base.added, base.unused
        causal = base.model
        config = causal.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        self.adapted, self.sharded, self.outputs = lora is not None, shard is not None, outputs
        ask_for_gradients(causal, not self.adapted)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.causal = adapted(causal, lora, bool(outputs), base.added) if self.adapted else causal
        self.whole: Whole = shard(self) if shard else lambda part=None: nullcontext()
        self.autocast_dtype = None if self.adapted else compute_dtype(model.dtype, self.device)
        self.acts_as: str | None = "default"  # the adapter in use; None: the bare trunk
        if self.adapted:
            self.causal.active_peft_config.base_model_name_or_path = base.source
            self.switch = Switch(self.causal)
            self._act("default")
        if model.gradient_checkpointing:
            # The backward pass computes again what some role has computed, whatever role acts by then.
            again = {"context_fn": lambda: (nullcontext(), self.acting(self.acts_as))} if self.adapted else {}
            causal.gradient_checkpointing_enable({"use_reentrant": False, **again})
        self.own_attention = causal.config._attn_implementation  # SDPA, or eager where the model cannot take it
        later = elsewhere_bytes(causal) + acceleration.sampling_bytes(self)
        self.budgets = budgets(config, self.dtype, self.device, free_bytes(self.device), later)
        self.forest_attention: Attention = dense_attention
        self.layout, self.layout_reason = layout_of(self, model.layout)
        self.attend(FOREST if self.packed else self.own_attention)
        # The plain trunk stands. What is faster comes in its place where it agrees.
        self.replayed = acceleration.replayed(self)  # one for all samplings: it knows what cannot be recorded
        acceleration.adopt(self)
        self.forest_attention, self.attention_reason = faster_attention(self, acceleration.attention(self.device))

    @property
    def packed(self) -> bool:
        """Whether batches are to be planted as trees (else padded)."""
        return self.layout == "tree"

    @property
    def row_multiple(self) -> int:
        """What the length of a planted row is rounded up to."""
        return 1 if self.device.type == "cpu" else GPU_MULTIPLE

    @property
    def plain(self) -> nn.Module:
        """The transformers model underneath, with the adapter's layers in it."""
        return self.causal.get_base_model() if self.adapted else self.causal

    @property
    def decoder(self) -> nn.Module:
        """What lies below the head."""
        return getattr(self.plain, self.plain.base_model_prefix)

    @property
    def head(self) -> nn.Module:
        """The output projection (no second name for it: what is saved goes by the names below `causal`)."""
        return self.plain.get_output_embeddings()

    @property
    def rows(self) -> int:
        """Tokens that it has an embedding for."""
        return len(beneath(self.plain.get_input_embeddings()).weight)

    @property
    def width(self) -> int:
        """Features of a final hidden state, which its output projection reads."""
        return beneath(self.head).weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return self.autocast_dtype or beneath(self.plain.get_input_embeddings()).weight.dtype

    @property
    def remarks(self) -> list[str]:
        """What a user should know of how it computes, and of what ends its answers."""
        remarks = [f"padded layout, for {self.layout_reason}"] if self.layout_reason else []
        if not self.outputs and (remark := turn_ends(self.tokenizer).remark):
            remarks.append(remark)
        if self.unused:
            remarks.append(
                f"warning: {len(self.unused):,} weights of {self.base_name} are not used, for its config.json "
                f"describes fewer layers: {self.unused[0]}, …"
            )
        if self.attention_reason:
            remarks.append(f"attention over dense scores, for {self.attention_reason}")
        return remarks + acceleration.remarks(self)

    @property
    def end_tokens(self) -> set[int]:
        """What ends a response: the end of a turn as the chat template trains it, the end of a text, and what the base
        names besides."""
        ends = {self.tokenizer.eos_token_id, *ends_of(self.plain.generation_config)}
        return {end for end in ends if end is not None}.union(turn_ends(self.tokenizer).ids)

    def said(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """What a response, token ids (k,), adds to the text of its prompt, (l,), without what ends its turn."""
        return said(self.tokenizer, prompt, response, self.end_tokens, turn_ends(self.tokenizer).texts)

    def generation_config(self) -> GenerationConfig:
        """The base's, with the ends of turns: for `generate` and for what is saved."""
        config = deepcopy(self.plain.generation_config)
        config.eos_token_id = sorted(self.end_tokens)
        if texts := turn_ends(self.tokenizer).texts:
            config.stop_strings = list(texts)
        return config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, forest: Forest) -> Tensor:
        """Log-probability of every label, (n,) float32; with a head, the scores of every path, (P, outputs) float32."""
        if self.outputs:
            return self._scores(forest)
        return linear_logprobs(Trunk.states(self, forest), labels=forest.labels, **self.projection())

    # Where it is sharded, an instance's `forward`, `states` and `hidden` gather weights, and must not do so nested.
    def states(self, forest: Forest) -> Tensor:
        """Final hidden state of the position that predicts each label, (n, d), in `dtype`."""
        with self.autocast():
            return Trunk.hidden(self, forest, forest.where).to(self.dtype)

    def projection(self, temperature: float = 1.0) -> dict[str, Any]:
        """What makes logits of `states`, divided by the temperature."""
        layer = beneath(self.head)
        bias = layer.bias
        tokens = getattr(self.head, "token_adapter", None)  # rows of added tokens
        weight = tokens.get_merged_weights(tokens.active_adapters) if tokens and acts(tokens) else layer.weight
        return {
            "weight": weight.to(self.dtype),
            "bias": None if bias is None else bias.to(self.dtype),
            "scale": self.scale / temperature,
            "softcap": None if self.softcap is None else self.softcap / temperature,
            "chunk_bytes": self.budgets.logits_bytes,
        }

    def _scores(self, forest: Forest) -> Tensor:
        if not hasattr(self.plain, "score"):  # an encoder: one path a row, under a head of its own
            inputs = {"input_ids": forest.tokens, "attention_mask": (forest.tree >= 0).long()}
            with self.autocast():
                return self.plain(**inputs).logits.float()
        with self.autocast():
            last = Trunk.hidden(self, forest, forest.ends)  # (P, d)
        return self.plain.score(last.to(torch.promote_types(last.dtype, torch.float32)))

    def hidden(self, forest: Forest, where: Tensor) -> Tensor:
        """Final hidden states of some positions, flat indices (m,) -> (m, d)."""
        inputs = {"forest": self.mask(forest)} if forest.packed else {"attention_mask": forest.tree >= 0}
        states = self.decoder(
            input_ids=forest.tokens, position_ids=forest.positions, use_cache=False, **inputs
        ).last_hidden_state
        return states.flatten(0, 1)[where]

    def mask(self, forest: Forest) -> ForestMask:
        """What the layers are told of a packed forest."""
        return ForestMask(forest, self.forest_attention)

    @contextmanager
    def acting(self, role: str | None):
        """Under another adapter for a while; None: the bare trunk, which is the reference."""
        assert self.adapted, "without a LoRA the trunk itself is trained, and the reference is a copy"
        before = self.acts_as
        self._act(role)
        try:
            yield self
        finally:
            self._act(before)

    def _act(self, role: str | None) -> None:
        self.acts_as = role
        self.switch.turn(role)

    def take_in(self) -> None:
        """Adapters that were added: under the same switch, and as fast as the first."""
        self.switch = Switch(self.causal)
        self._act("default")
        acceleration.adopt(self)

    @contextmanager
    def generating(self):
        """transformers' own attention and mode for `generate`, then back."""
        training, config = self.training, self.plain.generation_config
        self.attend(self.own_attention)
        self.eval()
        self.plain.generation_config = self.generation_config()
        try:
            with torch.no_grad(), self.autocast():
                yield self.plain
        finally:
            self.plain.generation_config = config
            self.train(training)
            self.attend(FOREST if self.packed else self.own_attention)

    @contextmanager
    def attending(self, name: str):
        """Another attention function for a while."""
        before = self.plain.config._attn_implementation
        self.attend(name)
        try:
            yield self
        finally:
            self.attend(before)

    def saved(self) -> dict[str, nn.Parameter]:
        """What a result holds, by name: what trains, or a whole model with what was frozen in it."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad or not self.adapted}

    def save(self, folder: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write a result that plain peft and transformers load into an empty or new folder.

        `weights`: those of `saved`, whole, under this module's names. `about`: what else align.json tells.
        """
        tokenizer = self.tokenizer
        if self.outputs:
            tokenizer = described(self.plain.config, about.get("labels"), tokenizer, self.adapted)
        named = {name.removeprefix("causal."): tensor.contiguous() for name, tensor in weights.items()}
        more = {"save_embedding_layers": False, "selected_adapters": ["default"]} if self.adapted else {}
        self.causal.save_pretrained(folder, state_dict=named, **more)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
        tokenizer.save_pretrained(folder)
        if self.outputs and self.adapted:
            save_beside(self.plain.config, folder)
        elif not self.outputs:  # over what save_pretrained of a whole model wrote
            self.generation_config().save_pretrained(folder)
        meta = {"role": "adapter" if self.adapted else "model", "base": self.base_name, "fingerprint": self.fingerprint}
        meta |= {"trunk": [link.model_dump(exclude_none=True) for link in self.links], **about}
        (folder / META).write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")

    def autocast(self):
        """The context in which the trunk computes."""
        if self.autocast_dtype in (None, torch.float32):
            return nullcontext()
        # Where it is sharded no rounded copies of whole weights may stay.
        return torch.autocast(self.device.type, self.autocast_dtype, cache_enabled=not self.sharded)

    def attend(self, name: str) -> None:
        """Compute attention by the function of this name from now on."""
        self.plain.set_attn_implementation(name)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's blocks, in order."""
        return max((m for m in self.decoder.modules() if isinstance(m, nn.ModuleList)), key=len)
