"""Numbers worked by hand, and identities between the meters."""

from __future__ import annotations

import json
import math
import os
import random
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from forks import forked
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from align.training import costs, meters
from align.training.costs import flops_per_token, mfu, peak_flops
from align.training.meters import Sums, Throughput, loss_stability, perplexity

STATUS = Path("/proc/self/status")


@pytest.mark.parametrize("words", [1, 2, 49_152])
def test_perplexity_of_a_uniform_distribution_is_the_size_of_its_vocabulary(words):
    assert perplexity(37 * math.log(words), 37) == pytest.approx(words)


def test_perplexity_at_its_edges():
    assert math.isnan(perplexity(0.0, 0))
    assert perplexity(1e6, 1) == math.inf


batches = st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 1000)), min_size=1, max_size=20)


@given(batches, st.randoms())
def test_sums_do_not_depend_on_the_order_of_batches(terms: list, shuffled: random.Random):
    def total(terms):
        sums = Sums()
        for value, count in terms:
            sums.add("loss", value, count)
        return sums.sums()

    other = list(terms)
    shuffled.shuffle(other)
    assert total(terms) == total(other)


def test_the_mean_is_over_items_not_over_batches():
    sums = Sums()
    sums.add("loss", 9.0, 1)  # a short batch must not weigh as much as a long one
    sums.add("loss", torch.tensor(3.0, requires_grad=True), torch.tensor(3))
    sums.add("accuracy", 0.0, 0)
    assert sums.means()["loss"] == 3.0
    assert math.isnan(sums.means()["accuracy"])


def test_merging_alone_changes_nothing():
    sums = Sums()
    sums.add("loss", 0.1, 3)
    sums.add("a/b", 1 / 3, 1)
    assert sums.merged(Accelerator(cpu=True)).sums() == sums.sums()


def merge(told: Path, env: dict[str, str]) -> None:
    """What one of two processes has after a merge, into a file."""
    os.environ |= env
    accelerator, sums = Accelerator(cpu=True), Sums()
    if accelerator.process_index == 0:
        sums.add("loss", 0.1, 3)
        sums.add("seen by one", 5.0, 2)
    else:
        sums.add("loss", 16777217.0, 4)
    told.write_text(json.dumps(sums.merged(accelerator).sums()))


def test_shards_merge_to_the_whole_over_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        forked(merge, tmp_path / str(rank), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    ]
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    whole = {"loss": [0.1 + 16777217.0, 7.0], "seen by one": [5.0, 2.0]}  # 2**24 + 1: float32 would round it
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)] == [whole, whole]


def test_throughput_is_per_device_over_all_steps():
    meter = Throughput(devices=2)
    assert math.isnan(meter.tokens_per_second)
    meter.add(tokens=1000, examples=8, seconds=1.0)
    meter.add(tokens=200, examples=4, seconds=3.0)  # the mean of the steps' rates would be 266.7
    assert meter.tokens_per_second == 1200 / 4 / 2
    assert meter.examples_per_second == 12 / 4 / 2


CONFIG = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=32)


def test_flops_by_hand():
    # N = 1000, a token attends to 10 positions: attention 2 layers x 4 heads x 8 wide x 10 = 640, times 12
    assert flops_per_token(CONFIG, 1000, 10, lora=False) == 6 * 1000 + 12 * 640
    assert flops_per_token(CONFIG, 1000, 10, lora=True) == 4 * 1000 + 12 * 640
    assert flops_per_token(CONFIG, 1000, 10, lora=True, gradient_checkpointing=True) == 6 * 1000 + 16 * 640
    wide = SimpleNamespace(**vars(CONFIG), head_dim=16)  # not hidden_size / heads, as in Gemma and Qwen3
    assert flops_per_token(wide, 0, 10, lora=True) == 2 * 12 * 640


def test_attended_positions_by_hand():
    assert costs.causal_attended([1]) == 1
    assert costs.causal_attended([3, 1]) == (1 + 2 + 3 + 1) / 4


def test_one_forward_and_backward_does_the_flops_that_the_formula_says():
    """torch's own counter on a model without a causal saving: attended = length."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    length = 16
    model = LlamaForCausalLM(tiny_llama(attn_implementation="eager"))
    tokens = torch.randint(0, 50, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    ours = flops_per_token(model.config, costs.matmul_params(model), attended=length, lora=False) * length
    # the first layer's input is an embedding, whose gradient torch computes as the formula assumes; rotary
    # angles are a product of positions and frequencies, once forward
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-3)


def tiny_llama(**more) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **more,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_matmul_params_leave_out_what_is_only_looked_up(tied):
    # per layer: q and o 32x32, k and v 32x16, three MLP matrices 32x48; then the head 32x50, tied or not
    by_hand = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 50
    model = LlamaForCausalLM(tiny_llama(tie_word_embeddings=tied))
    assert costs.matmul_params(model) == by_hand
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert costs.matmul_params(adapted) == by_hand


def test_matmul_params_of_gpt2_count_its_conv1d_and_not_its_positions():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    assert costs.matmul_params(model) == 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + 32 * 50


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100 80GB PCIe", torch.bfloat16, 312e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.float16, 756e12),
        ("NVIDIA L40S", torch.float32, 91.6e12),
        ("Tesla T4", torch.float16, 65e12),
        ("Tesla T4", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, None),
        ("NVIDIA L4", torch.int8, None),
        ("Quantum Abacus 3000", torch.bfloat16, None),
    ],
)
def test_peaks_are_known_or_unknown_never_guessed(device, dtype, peak):
    assert peak_flops(device, dtype) == peak


def test_float32_peak_is_unknown_once_tf32_may_be_used():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) is None
    finally:
        torch.set_float32_matmul_precision(before)


def test_mfu():
    assert mfu(1000, 156e9, 312e12) == 0.5
    assert mfu(1000, 156e9, None) is None


@pytest.mark.skipif(not STATUS.exists(), reason="the kernel's own figure is in /proc on Linux only")
def test_peak_memory_is_the_kernels_high_water_mark_in_bytes():
    torch.ones(64 * 2**20)  # 256 MiB, touched and freed: a peak stays
    kernel = int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]) * 1024
    assert costs.peak_memory(torch.device("cpu")) == pytest.approx(kernel, rel=0.02)


def test_stability_by_hand():
    assert loss_stability([1, 2], [3.0, 5.0]) == (1.0, None)
    assert loss_stability([], []) == (None, None)
    assert loss_stability([1], [3.0]) == (None, None)


def test_a_spike_is_six_sigma_above_the_last_128_steps():
    steps = list(range(1, 301))
    losses = [2.0 + 0.1 * (-1) ** step for step in steps]  # mean 2, sigma 0.1 in every even window
    assert loss_stability(steps, losses) == (pytest.approx(0.1), [])
    losses[199] = 2.59
    assert loss_stability(steps, losses).spikes == []
    losses[199] = 2.61
    assert loss_stability(steps, losses).spikes == [200]
    assert loss_stability(steps[:128], losses[:128]).spikes is None


def test_spread_is_of_the_first_hundred_steps_not_of_a_hundred_lines():
    steps = list(range(10, 301, 10))
    losses = [1.0, 3.0] * 5 + [100.0] * 20
    assert loss_stability(steps, losses).spread == 1.0


def test_environment_is_json_and_tells_no_name_or_place():
    told = json.dumps(meters.environment())
    assert torch.__version__ in told
    for secret in (socket.gethostname(), os.path.expanduser("~"), os.getcwd(), sys.prefix):
        assert secret not in told
