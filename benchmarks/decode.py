"""The sampling engine beside transformers' `generate` and its continuous batching: one run, same prompts and model.

    python benchmarks/decode.py [--data FILE] [--threads 2] [--new 96]

16 prompts of 16 to 192 tokens, 1 and 4 samples each, drawn at temperature 1 from SmolLM2-135M until they end or have so
many tokens: lengths are ragged, and only tokens of responses count. Each side runs in processes of its own, in turn,
transformers in the fastest of its ways, which are tried first. Before that, greedy responses are compared in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HH = ROOT.parent / "shared" / "data" / "hh_harmless" / "rows_0_1499.jsonl"
TEMPLATE = ROOT / "data_templates" / "pairs.jsonl"
PROMPTS, SHORTEST, LONGEST = 16, 16, 192
WAYS = ("padded", "padded by 8", "continuous")  # of transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="default: published rows if they are there, else a template's")
    parser.add_argument("--base", default="demo/smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=96, help="most tokens of a response")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs, in turn")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(json.loads(args.arm))))
        return
    data = args.data or (HH if HH.is_file() else TEMPLATE)
    common = {"data": str(data), "base": args.base, "threads": args.threads, "new": args.new}

    def measure(arm: str, samples: int, dtype: str = args.dtype, greedy: bool = False) -> dict:
        found = measured({**common, "arm": arm, "samples": samples, "dtype": dtype, "greedy": greedy}, args.threads)
        told = found.get("error") or f"{found['tokens_per_second']:8.1f} tokens/s {found['peak_bytes'] / 1e9:6.2f} GB"
        print(f"{arm:12} x{samples} {'greedy ' if greedy else ''}{told}", flush=True)
        return found

    print(f"{args.base}, {args.dtype}, {args.threads} threads, {PROMPTS} prompts of {data.name}, {args.new} new tokens")
    greedy = [measure(arm, 1, "float32", greedy=True).get("said") for arm in ("align", "padded")]
    same = greedy[0] is not None and greedy[0] == greedy[1]
    print(f"greedy responses in float32 are {'the same' if same else 'NOT the same'}\n")
    found = {}
    for samples in (4, 1):
        tried = {way: measure(way, samples).get("tokens_per_second", 0.0) for way in WAYS}
        way = max(tried, key=tried.get)
        rounds = [(measure("align", samples), measure(way, samples)) for _ in range(args.rounds)]
        if any("error" in side for pair in rounds for side in pair):
            sys.exit("a side did not run, so there is nothing to compare")
        ratios = [ours["tokens_per_second"] / peer["tokens_per_second"] for ours, peer in rounds]
        found[samples] = {
            "ratio": round(sum(ratios) / len(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "memory_ratio": round(rounds[0][0]["peak_bytes"] / rounds[0][1]["peak_bytes"], 3),
            "ours": round(sum(pair[0]["tokens_per_second"] for pair in rounds) / len(rounds), 1),
            "peer": round(sum(pair[1]["tokens_per_second"] for pair in rounds) / len(rounds), 1),
            "way": way,
        }
    print(f"\n{'tokens/s':12}{'align':>10}{'transformers':>14}{'ratio':>8}  way of transformers")
    for samples, row in found.items():
        print(f"{samples} a prompt{row['ours']:>12.1f}{row['peer']:>14.1f}{row['ratio']:>8.2f}  {row['way']}")
    line = {
        "benchmark": "decode", **found[4], "one_sample": found[1], "greedy_equal": same,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps(line))


def measured(spec: dict, threads: int) -> dict:
    """Run one arm in its own process; its last line is its result."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--arm", json.dumps(spec)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_arm(spec: dict) -> dict:
    """Responses, twice; the second time counts."""
    import torch

    torch.set_num_threads(spec["threads"])
    tokenizer, ids = prompts_of(spec)
    respond = (align_side if spec["arm"] == "align" else transformers_side)(spec, tokenizer, ids)
    if not spec["greedy"]:
        respond(8)
    started = time.perf_counter()
    said = respond(spec["new"])
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": sum(map(len, said)) / seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "said": said if spec["greedy"] else None,
    }


def prompts_of(spec: dict) -> tuple[object, list[list[int]]]:
    from align.data.formats.prompts import prompts
    from align.data.mixture import prepare
    from align.models.base import load_tokenizer
    from align.models.demo import cache_folder
    from align.recipe.schema import Data, Model

    section = Data.model_validate(
        {"train": [{"path": spec["data"]}], "max_length": LONGEST, "overlong": "drop", "invalid": "drop"}
    )
    tokenizer = load_tokenizer(Model(base=spec["base"]))
    data = prepare(section, tokenizer, prompts(), 0, cache_folder()).train
    fit = [i for i in data.order(0, 0) if data.lengths[i] >= SHORTEST]
    return tokenizer, [data.tree(int(i)).segments[0].tolist() for i in fit[:PROMPTS]]


def align_side(spec: dict, tokenizer: object, ids: list[list[int]]):
    import numpy as np
    import torch

    from align.models.base import load_base
    from align.models.sampling.choice import Sampling
    from align.models.sampling.decode import sample
    from align.models.trunk import Trunk
    from align.recipe.schema import Lora, Model

    model = Model(base=spec["base"], dtype=spec["dtype"])
    trunk = Trunk(load_base(model, torch.device("cpu"), frozen=True), model, Lora(r=8), 0)
    prompts = [np.array(prompt, np.int32) for prompt in ids]

    def respond(new: int) -> list[list[int]]:
        how = Sampling(new, temperature=0.0 if spec["greedy"] else 1.0)
        keys = [(0, i) for i in range(len(prompts))]
        with trunk.acting(None):  # the bare model, as the other side has it
            found = sample(trunk, prompts, how, keys, spec["samples"])
        return [response.tokens.tolist() for own in found for response in own]

    return respond


def transformers_side(spec: dict, tokenizer: object, ids: list[list[int]]):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from align.models.base import base_folder
    from align.recipe.schema import Model

    folder = base_folder(Model(base=spec["base"]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, spec["dtype"])).eval()
    end = tokenizer.eos_token_id
    rows = [prompt for prompt in ids for _ in range(spec["samples"])]

    def config(new: int) -> GenerationConfig:
        drawn = {"do_sample": False} if spec["greedy"] else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        return GenerationConfig(max_new_tokens=new, eos_token_id=end, pad_token_id=end, **drawn)

    def padded(new: int, at_once: int) -> list[list[int]]:
        ordered = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: dict[int, list[int]] = {}
        for first in range(0, len(ordered), at_once):
            group = ordered[first : first + at_once]
            longest = max(len(rows[i]) for i in group)
            tokens = torch.tensor([[end] * (longest - len(rows[i])) + rows[i] for i in group])
            mask = torch.tensor([[0] * (longest - len(rows[i])) + [1] * len(rows[i]) for i in group])
            out = model.generate(tokens, attention_mask=mask, generation_config=config(new))[:, longest:].tolist()
            for i, row in zip(group, out, strict=True):
                found[i] = row[: row.index(end) + 1] if end in row else row
        return [found[i] for i in range(len(rows))]

    def continuous(new: int) -> list[list[int]]:
        out = model.generate_batch(inputs=rows, generation_config=config(new), progress_bar=False)
        return [result.generated_tokens for result in out.values()]

    ways = {
        "padded": lambda new: padded(new, len(rows)),
        "padded by 8": lambda new: padded(new, 8 * spec["samples"]),
        "continuous": continuous,
    }
    respond = ways[spec["arm"]]

    def without_gradient(new: int) -> list[list[int]]:
        torch.manual_seed(0)
        with torch.no_grad():
            return respond(new)

    return without_gradient


if __name__ == "__main__":
    main()
