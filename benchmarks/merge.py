"""How far a merged model lies from the unmerged one, and how much of that is the noise of float32 itself.

    python benchmarks/merge.py RESULT

RESULT is the `final/` of a run of `align.sft` on a base, with a LoRA. Prints, for each way of computing the logits of
align.merge's probes, the largest and the root mean square distance from the unmerged model in float64, and from the
unmerged model in float32. Models are those of plain transformers and peft; their norms compute in float32 always.
"""

from __future__ import annotations

import sys
import warnings

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging

from align.tools.merging.compared import probes


@torch.no_grad()
def logits_of(model: nn.Module, given: list[Tensor]) -> Tensor:
    """(n, V) float64 of all probes."""
    return torch.cat([model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double() for ids in given])


@torch.no_grad()
def in_one_batch(model: nn.Module, given: list[Tensor]) -> Tensor:
    """The same, from padded rows."""
    ids = nn.utils.rnn.pad_sequence([row[0] for row in given], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row[0]) for row in given], batch_first=True)
    return model(input_ids=ids, attention_mask=mask).logits[mask.bool()].double()


def merged_exactly(model: PeftModel) -> nn.Module:
    """Merged in float64, and rounded once."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.double()
            layer.merge()
            layer.float()
    return model.merge_and_unload()


def main(result: str) -> None:
    """The table."""
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # of layers that are merged already

    def load(**how: str) -> PeftModel:
        return AutoPeftModelForCausalLM.from_pretrained(result, dtype=torch.float32, **how).eval()

    torch.set_num_threads(1)
    model = load()
    given = probes(AutoTokenizer.from_pretrained(result), len(model.get_input_embeddings().weight))
    found = {"unmerged": logits_of(model, given), "unmerged, in one padded batch": in_one_batch(model, given)}
    torch.set_num_threads(2)
    found["unmerged, 2 threads"] = logits_of(model, given)
    torch.set_num_threads(1)
    found["unmerged, eager attention"] = logits_of(load(attn_implementation="eager"), given)
    exact = logits_of(model.double(), given)
    for name, whole in (("merged", load().merge_and_unload()), ("merged in float64", merged_exactly(load()))):
        found[name] = logits_of(whole, given)
        found[f"{name}, computed in float64"] = logits_of(whole.double(), given)
    print(f"largest logit {float(exact.abs().max()):.3g}")
    for name, logits in found.items():
        far = [(logits - other).abs() for other in (exact, found["unmerged"])]
        told = "   ".join(f"{float(d.max()):.2g} (rms {float(d.square().mean().sqrt()):.2g})" for d in far)
        print(f"{name:40} {told}")


if __name__ == "__main__":
    main(sys.argv[1])
