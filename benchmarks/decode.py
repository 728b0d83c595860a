"""The sampling engine beside transformers' `generate`, its continuous batching, and vLLM: same prompts and model.

    python benchmarks/decode.py [--data FILE] [--threads 2] [--new 96] [--vllm VENV|URL] [--before FOLDER]

16 prompts of 16 to 192 tokens, 1 and 4 samples each, drawn at temperature 1 from SmolLM2-135M until they end or have so
many tokens: lengths are ragged, and only tokens of responses count. Each side runs in processes of its own, in turn,
transformers in the fastest of its ways, which are tried first. Before that, greedy responses are compared in float32.

--vllm: a venv with vLLM (benchmarks/vllm_cpu.sh), which then runs compiled in a process of its own, without a server;
or the address of a server of the same model, whose HTTP then counts too. Its prefix cache is emptied before the run
that counts.

--before: another checkout of this project, whose engine runs in turn, by its own copy of this script.
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
    parser.add_argument("--vllm", help="a venv with vLLM, or a server's address")
    parser.add_argument("--before", type=Path, help="another checkout of this project")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(json.loads(args.arm))))
        return
    data = args.data or (HH if HH.is_file() else TEMPLATE)
    common = {"data": str(data), "base": args.base, "threads": args.threads, "new": args.new}

    def measure(arm: str, samples: int, dtype: str = args.dtype, greedy: bool = False) -> dict:
        spec = {**common, "samples": samples, "dtype": dtype, "greedy": greedy}
        spec |= {"arm": "align" if arm == "before" else arm} | (asked if arm == "vllm" else {})
        found = measured(spec, args.threads, args.before if arm == "before" else ROOT)
        told = found.get("error") or f"{found['tokens_per_second']:8.1f} tokens/s {found['peak_bytes'] / 1e9:6.2f} GB"
        print(f"{arm:12} x{samples} {'greedy ' if greedy else ''}{told}", flush=True)
        return found

    asked = {}
    if args.vllm:
        asked = {"vllm": args.vllm, **measured({**common, "arm": "prompts"}, args.threads, ROOT)}
        if "error" in asked:
            sys.exit(asked["error"])
    print(f"{args.base}, {args.dtype}, {args.threads} threads, {PROMPTS} prompts of {data.name}, {args.new} new tokens")
    greedy = [measure(arm, 1, "float32", greedy=True).get("said") for arm in ("align", "padded")]
    same = greedy[0] is not None and greedy[0] == greedy[1]
    print(f"greedy responses in float32 are {'the same' if same else 'NOT the same'}\n")
    found = {}
    for samples in (4, 1):
        tried = {way: measure(way, samples).get("tokens_per_second", 0.0) for way in WAYS}
        way = max(tried, key=tried.get)
        others = [name for name in ("vllm", "before") if getattr(args, name)]
        peers = [way, *others]
        rounds = [{arm: measure(arm, samples) for arm in ("align", *peers)} for _ in range(args.rounds)]
        if any("error" in side for sides in rounds for side in sides.values()):
            sys.exit("a side did not run, so there is nothing to compare")
        beside = {"transformers": {**compared(rounds, way), "way": way}}
        found[samples] = beside | {name: compared(rounds, name) for name in others}
    print(f"\n{'tokens/s':12}{'align':>10}{'peer':>10}{'ratio':>8}")
    for samples, sides in found.items():
        for peer, row in sides.items():
            name = f"{peer}, {row['way']}" if "way" in row else peer
            print(f"{samples} a prompt{row['ours']:>12.1f}{row['peer']:>10.1f}{row['ratio']:>8.2f}  {name}")
    line = {
        "benchmark": "decode", **found[4]["transformers"], "one_sample": found[1]["transformers"],
        "greedy_equal": same, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    for name in others:
        line[name] = {"four_samples": found[4][name], "one_sample": found[1][name]}
    print(json.dumps(line))


def compared(rounds: list[dict[str, dict]], peer: str) -> dict:
    """Ours beside a peer, round by round and on average."""
    pairs = [(sides["align"], sides[peer]) for sides in rounds]
    ratios = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]
    memory = [ours["peak_bytes"] / theirs["peak_bytes"] for ours, theirs in pairs if theirs["peak_bytes"]]
    return {
        "ratio": round(sum(ratios) / len(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "memory_ratio": round(memory[0], 3) if memory else None,
        "ours": round(sum(ours["tokens_per_second"] for ours, _ in pairs) / len(pairs), 1),
        "peer": round(sum(theirs["tokens_per_second"] for _, theirs in pairs) / len(pairs), 1),
    }


def measured(spec: dict, threads: int, checkout: Path) -> dict:
    """Run one arm of a checkout in its own process; its last line is its result."""
    checkout = checkout.resolve()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    python = sys.executable
    if spec["arm"] == "vllm" and "://" not in spec["vllm"]:
        python = str(Path(spec["vllm"]) / "bin" / "python")
        bound = "auto" if threads == os.cpu_count() else f"0-{threads - 1}"
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": bound, "VLLM_CPU_KVCACHE_SPACE": "2"}
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }  # one process, whose memory counts
    else:
        environment["PYTHONPATH"] = str(checkout)
    command = [python, str(checkout / "benchmarks" / "decode.py"), "--arm", json.dumps(spec)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_arm(spec: dict) -> dict:
    """Responses, twice; the second time counts."""
    import torch

    torch.set_num_threads(spec["threads"])
    if spec["arm"] == "prompts":
        from align.models.base import base_folder
        from align.recipe.schema import Model

        tokenizer, ids = prompts_of(spec)
        return {"ids": ids, "end": tokenizer.eos_token_id, "folder": str(base_folder(Model(base=spec["base"])))}
    if spec["arm"] == "vllm":
        respond = (vllm_served if "://" in spec["vllm"] else vllm_side)(spec)
    else:
        tokenizer, ids = prompts_of(spec)
        respond = (align_side if spec["arm"] == "align" else transformers_side)(spec, tokenizer, ids)
    if not spec["greedy"]:
        respond(8)
    started = time.perf_counter()
    said = respond(spec["new"])
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": sum(map(len, said)) / seconds,
        "peak_bytes": 0 if "://" in spec.get("vllm", "") else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
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


def vllm_side(spec: dict):
    """vLLM's engine in this process, compiled; its venv has nothing of align."""
    from vllm import LLM, SamplingParams

    rows = max(map(len, spec["ids"])) + spec["new"]
    llm = LLM(spec["folder"], dtype=spec["dtype"], max_model_len=rows, max_num_seqs=PROMPTS * spec["samples"], seed=0)

    def respond(new: int) -> list[list[int]]:
        llm.reset_prefix_cache()
        how = SamplingParams(
            n=spec["samples"], temperature=1.0, max_tokens=new, stop_token_ids=[spec["end"]], detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in spec["ids"]]
        return [list(said.token_ids) for found in llm.generate(prompts, how, use_tqdm=False) for said in found.outputs]

    return respond


def vllm_served(spec: dict):
    """A server of this model, all prompts at once. The warm-up asks for other prompts, which it then has not kept."""
    import asyncio

    import httpx

    async def ask(http: httpx.AsyncClient, model: str, ids: list[int], new: int) -> list[list[int]]:
        body = {
            "model": model, "prompt": ids, "max_tokens": new, "n": spec["samples"], "temperature": 1.0, "top_p": 1.0,
            "top_k": -1, "stop_token_ids": [spec["end"]], "return_token_ids": True,
        }  # fmt: skip
        said = (await http.post("/v1/completions", json=body)).raise_for_status().json()
        return [choice["token_ids"] for choice in said["choices"]]

    async def all_of_them(new: int) -> list[list[int]]:
        async with httpx.AsyncClient(base_url=spec["vllm"], timeout=None) as http:
            model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
            asked = spec["ids"] if new == spec["new"] else [ids[::-1] for ids in spec["ids"]]
            found = await asyncio.gather(*(ask(http, model, ids, new) for ids in asked))
        return [said for own in found for said in own]

    return lambda new: asyncio.run(all_of_them(new))


if __name__ == "__main__":
    main()
