"""benchmarks/: the formula of cost.py against counted FLOPs and saved tensors; the JSON file."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks import cost
from benchmarks.measuring import Memory, add_table
from docs import measure

aten = torch.ops.aten
COUNTS = {  # operations that torch's counter leaves out. Attention: with the masked half
    aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v))}
CASES = [cost.Case(2, 64, 500, 8, 24), cost.Case(3, 128, 5000, 4, 40)]


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_of_the_counter(case):
    """All matrix products of an update, forward and backward: trunk, attention and head."""
    update, expected = cost.make_update(case), cost.flops(case)
    with FlopCounterMode(display=False, custom_mapping=COUNTS) as counter:
        update()
    counted = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counted.items() if "attention" in str(op))
    assert attention == 2 * expected["attention"]
    assert counter.get_total_flops() - attention == expected["trunk"] + expected["head"]


def test_flops_in_closed_form():
    """GPT-2 small: 85M weights in its blocks, of which each token costs six times as many FLOPs."""
    flops = cost.flops(cost.Case(12, 768, 50257, 16, 128))
    assert flops == {"trunk": 6 * 84934656 * 2048, "attention": 7 * 12 * 768 * 16 * 128**2,
                     "head": 4 * 2 * 1024 * 768 * 50257}
    assert cost.parameters(cost.Case(12, 768)) == 124439808


@pytest.mark.parametrize("case", CASES)
def test_activations_are_the_tensors_that_autograd_saves(case, monkeypatch):
    """16 D floats a token in each block and 2 D around them, to a twentieth."""
    loss, saved = cost.our_loss, {}

    def counted(model, *rest):
        weights = {weight.data_ptr() for weight in model.parameters()}

        def keep(x):
            saved[x.untyped_storage().data_ptr()] = x  # not freed, so no two have one address
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            value = loss(model, *rest)
        for address in weights & saved.keys():
            del saved[address]
        return value

    monkeypatch.setattr(cost, "our_loss", counted)
    cost.make_update(case)()
    floats = sum(x.untyped_storage().nbytes() for x in saved.values()) / 4
    expected = case.sequences * case.length * case.width * (16 * case.layers + 2)
    assert floats == pytest.approx(expected, rel=0.05)


def test_memory_in_closed_form(monkeypatch):
    """One part, and two parts, in which the gradients of the first stand beside the second."""
    case = cost.Case(2, 64, 500, 8, 24)
    weights, head = 4 * cost.parameters(case), 4 * 500 * 64
    tensors = 4 * 192 * 64 * (16 * 2 + 2) + max(8 * 96 * 500, 4 * 192 * 9 * 64)
    assert cost.memory(case) == 3 * weights + head + tensors
    monkeypatch.setattr(cost, "MAX_TOKENS", 96)
    assert cost.memory(case) == 4 * weights + head + tensors // 2
    large = cost.Case(1, 64, 500000, 2, 16)  # two gradients of the embedding are the peak
    assert cost.memory(large) == 16 * cost.parameters(large) + 4 * 500000 * 64


def test_memory_measures_a_tensor():
    """On Linux and glibc; elsewhere it says that it does not know."""
    measured = Memory("cpu")
    x = torch.ones(2**23)  # 32 MiB
    above, whole = measured.peak()
    assert math.isnan(above) or (31 < above < 48 and above <= whole and x.sum() > 0)


@pytest.mark.parametrize("ratio, text", [(1.25, "1.25 "), (1.26, "1.26!"), (0.74, "0.74!")])
def test_parted_by_more_than_a_quarter(ratio, text):
    assert cost.parted(ratio) == text


def test_tables_of_a_gpu(tmp_path, monkeypatch):
    """docs/measure.py writes what the benchmarks have appended to one JSON file."""
    monkeypatch.setattr(measure, "OUT", tmp_path / "results", raising=False)
    monkeypatch.setattr(measure, "MISSING", set())
    with pytest.raises(measure.Missing):
        measure.block_gpu()
    for benchmark in ("gather", "rollout"):
        add_table(tmp_path / "gpu" / "gpu.json", benchmark, f"setting of {benchmark}", "it / naive",
                  [{"case": "naive", "seconds": 0.25, "tokens_per_second": 8192.0,
                    "peak_mib": math.nan, "time_ratio": 1.0, "peak_ratio": math.nan}])
    assert json.loads((tmp_path / "gpu" / "gpu.json").read_text())[0]["rows"][0]["peak_mib"] is None
    assert measure.block_gpu() == "\n\n".join(
        f"`python benchmarks/{name}.py`, setting of {name}:\n\n"
        "| case | median ms | it / naive | tokens/s | peak MiB | it / naive |\n"
        "| --- | --- | --- | --- | --- | --- |\n| naive | 250.0 | 1.00 | 8192 |  |  |"
        for name in ("gather", "rollout"))
