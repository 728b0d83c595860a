"""Attention modules that turn queries and keys by their positions in one autograd step each (rotary embeddings: Su et
al. 2021, arXiv 2104.09864).

transformers' own function makes five tensors of each on the way, and the holes that they leave between what the forward
pass keeps are lost to the rest of a step. A module that looks right is run both ways on random input; it is left alone
unless attention is asked the same, with the same settings and gradients.

Shapes: R rows, T tokens, H heads, D head size.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMS = {"q_norm", "k_norm"}  # of each head, where there are any
LISTENING = "align_listening"


def is_attention(module: nn.Module) -> bool:
    """Whether it may be one; then `agrees` tells. Those of 8 bits have no dtype to be tried in, and are left alone."""
    parts = {name for name, _ in module.named_children()}
    return (
        PARTS <= parts <= PARTS | NORMS
        and all(parameter.is_floating_point() for parameter in module.parameters())
        and isinstance(getattr(module, "head_dim", None), int)
        and all(hasattr(module, name) for name in ("config", "layer_idx", "scaling", "attention_dropout"))
    )


def kind_of(module: nn.Module) -> tuple[Any, ...]:
    """What modules that are alike have in common: some layers of a model turn nothing, or see a window."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | None)}
    return (type(module), *sorted((name, repr(value)) for name, value in plain.items() if name != "layer_idx"))


def attention_forward(
    self: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """(R, T, d) -> (R, T, d)."""
    cos, sin = position_embeddings
    attention = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
    if attention is None or cos.dim() != 3 or cos.shape[-1] != self.head_dim or cos.dtype != hidden_states.dtype:
        return type(self).forward(
            self,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **more,
        )
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (part(hidden_states).view(shape) for part in (self.q_proj, self.k_proj, self.v_proj))
    if hasattr(self, "q_norm"):
        query, key = self.q_norm(query), self.k_norm(key)
    query, key = (_Turned.apply(part.transpose(1, 2), cos[:, None], sin[:, None]) for part in (query, key))
    value = value.transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
    settings = {"sliding_window": window, "softcap": getattr(self, "attn_logit_softcapping", None)}
    more |= {name: setting for name, setting in settings.items() if setting is not None}
    dropout = self.attention_dropout if self.training else 0.0
    found, weights = attention(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **more)
    return self.o_proj(found.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class _Turned(torch.autograd.Function):
    """(y1, y2) = (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2): halves of D; (R, H, T, D), cos and sin (R, 1, T, D)."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        out, (x1, x2), (sin1, sin2) = x * cos, x.chunk(2, -1), sin.chunk(2, -1)
        y1, y2 = out.chunk(2, -1)
        y1.addcmul_(x2, sin1, value=-1)
        y2.addcmul_(x1, sin2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        cos, sin = ctx.saved_tensors
        out, (above1, above2), (sin1, sin2) = upstream * cos, upstream.chunk(2, -1), sin.chunk(2, -1)
        x1, x2 = out.chunk(2, -1)
        x1.addcmul_(above2, sin2)
        x2.addcmul_(above1, sin1, value=-1)
        return out, None, None


class _Listener:
    """In the place of a cache and of attention: what they are asked."""

    def __init__(self) -> None:
        self.heard: list[Tensor] = []
        self.settings: list[object] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *_more: object) -> tuple[Tensor, Tensor]:
        self.settings.append(layer)
        self.heard += [key, value]
        return 2 * key, 3 * value


def _listening(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, to: _Listener, **settings: object
) -> tuple[Tensor, None]:
    told = {name: setting for name, setting in settings.items() if setting is not None}
    to.settings += [module, mask, told]
    to.heard += [query, key, value]
    return query.transpose(1, 2), None


AttentionInterface.register(LISTENING, _listening)


@torch.enable_grad()
def agrees(module: nn.Module) -> bool:
    """Whether `attention_forward` asks attention and the cache what the module's own forward does, and gives the same
    output and gradient."""
    weight, own, results = next(module.parameters()), module.config, []
    draw = torch.Generator().manual_seed(0)
    try:
        x, *turns = (
            torch.randn(1, 5, size, generator=draw).to(weight.device, weight.dtype)
            for size in (module.q_proj.in_features, module.head_dim, module.head_dim)
        )
        x.requires_grad_()
        module.config = copy(own)
        module.config._attn_implementation = LISTENING
        for forward in (type(module).forward, attention_forward):
            to = _Listener()
            with torch.random.fork_rng([]):  # for the dropout of adapters
                torch.manual_seed(0)
                out, _ = forward(
                    module, x, position_embeddings=tuple(turns), attention_mask=None, past_key_values=to, to=to
                )
            tensors = [*to.heard, out]
            total = sum(tensor.float().square().sum() for tensor in tensors)
            results.append((to.settings, [*(tensor.detach() for tensor in tensors), torch.autograd.grad(total, x)[0]]))
    except Exception:  # it takes or gives something else, and may be anybody's code
        return False
    finally:
        module.config = own
    (asked, stock), (ours_asked, ours) = results
    if asked != ours_asked or [tensor.shape for tensor in stock] != [tensor.shape for tensor in ours]:
        return False
    tolerance = 1e-5 if weight.dtype == torch.float32 else 0.03
    return weight.is_meta or all(  # without numbers, for a plan, nothing more can be compared
        (a.float() - b.float()).norm() <= tolerance * a.float().norm() for a, b in zip(stock, ours, strict=True)
    )
