"""How cost grows: time and memory of an update of DPO beside a formula that predicts both.

    python benchmarks/cost.py                              # 15 minutes on two cores, 5 GB of memory
    python benchmarks/cost.py --series tokens --rounds 1   # one table alone

An update is that of dpo.py (`our_loss` of dpo_step.py over the parts of `split_batch`; gradients
clipped to norm 1; AdamW), on a model of GPT-2's kind with random weights and without dropout, in
fp32 on the CPU. Half of each sequence is its response. The base case: 6 layers of width 384, which
with GPT-2's vocabulary are 30M parameters; 16 sequences of 128 tokens, so 2048 tokens in all. Each
series changes one thing:

- tokens: more sequences. Above 4096 tokens (--max_tokens) an update is computed in several parts.
- vocabulary.
- responses: more and shorter sequences, at 2048 tokens in all.
- model: the shape of tiny, the base case, and GPT-2 small.

The formula is in `flops` and `memory` below; docs/performance.md derives it. It knows nothing of
the machine, so its times are ratios to the first case of a series, while its memory is in MiB.

Time: the cases of a series take turns, round after round, and a ratio is the median of the ratios
within a round. "Adam s" is what clipping and AdamW take of it. Memory: a process for each case and
column, above what stood before the model was made. "MiB" is the peak as a user has it. It depends
on how the C library reuses what tensors have freed. "tensors" is the peak where every tensor of
more than 64 KiB is given back at once (MALLOC_MMAP_THRESHOLD_, on Linux with glibc); this is what
the formula predicts. "/ formula" is the measured number over the predicted one, marked with ! where
they part by more than a quarter.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.dpo_step import LR, our_loss  # noqa: E402
from benchmarks.measuring import Memory  # noqa: E402
from dpo import split_batch  # noqa: E402

MAX_TOKENS, CHUNK, POSITIONS = 4096, 4096, 1024


class Case(NamedTuple):
    """A model and a batch. Half of each sequence's tokens are its response."""

    layers: int = 6
    width: int = 384
    vocabulary: int = 50257
    sequences: int = 16
    length: int = 128


SERIES = {  # name: {label: case}, the cheapest first
    "tokens": {str(128 * n): Case(sequences=n) for n in (8, 16, 32, 64, 128)},
    "vocabulary": {str(V): Case(vocabulary=V) for V in (5000, 15000, 50257, 150000)},
    "responses": {f"{n} of {2048 // n}": Case(sequences=n, length=2048 // n)
                  for n in (64, 32, 16, 8, 4)},
    "model": {"tiny": Case(2, 128, 733), "30M": Case(), "GPT-2 small": Case(12, 768)},
}


# ------------------------------------------------------------------------------------- the formula


def parameters(case):
    """Weights of a model of GPT-2's kind. The head is the embedding."""
    L, D = case.layers, case.width
    return 12 * L * D**2 + 13 * L * D + 2 * D + (case.vocabulary + POSITIONS) * D


def flops(case):
    """FLOPs of the matrix products of an update. A product (a, b) x (b, c) has 2abc.

    trunk: each token meets the 12 L D^2 weights of the blocks once forward and twice backward.
    attention: of T^2 scores a causal kernel computes half. Two products forward; backward five,
        since it computes the scores again.
    head: `GatherLogps` multiplies N x D by D x V four times: logits forward, logits again backward,
        and the gradients of both factors.
    """
    L, D, V, B, T = case
    return {"trunk": 6 * 12 * L * D**2 * B * T,
            "attention": 7 * L * D * B * T**2,
            "head": 8 * (B * T // 2) * D * V}


def memory(case):
    """Bytes of the tensors at the peak of an update, in fp32.

    Weights and Adam's two moments are always there. The peak is at the start or at the end of the
    backward pass of a part. At its start: all activations, the head's gradient, and either a chunk
    of logits with its gradient or what the backward pass of an MLP needs. At its end: all
    gradients, and a second one of the embedding. From the second part on, the gradients of the
    earlier parts are there, too.
    """
    L, D, V, B, T = case
    weights, head = 4 * parameters(case), 4 * V * D
    part = min(B, max(1, MAX_TOKENS // (2 * T)) * 2) * T  # tokens; pairs stay together
    activations = 4 * part * D * (16 * L + 2)
    chunk, mlp = 2 * 4 * (part // 2) * min(V, CHUNK), 4 * part * 9 * D
    start, end = head + activations + max(chunk, mlp), weights + head
    if part < B * T:
        start, end = start + weights, end + head
    return 3 * weights + max(start, end)


# ------------------------------------------------------------------------------------- measurement


def make_update(case):
    """A function that makes an update and returns the seconds that clipping and AdamW took."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        n_layer=case.layers, n_embd=case.width, n_head=case.width // 64, n_positions=POSITIONS,
        vocab_size=case.vocabulary, activation_function="gelu_pytorch_tanh",  # as in model.py
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    rng = random.Random(0)
    prompts, *responses = ([[rng.randrange(case.vocabulary) for _ in range(case.length // 2)]
                            for _ in range(case.sequences // 2)] for _ in range(3))
    pairs = [[(prompt, chosen), (prompt, rejected)]
             for prompt, chosen, rejected in zip(prompts, *responses)]
    reference_logps = torch.zeros(len(pairs), 2)  # their values cost nothing
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=True)

    def update():
        for part in split_batch(pairs, MAX_TOKENS):
            (our_loss(model, pairs, reference_logps, part) / len(pairs)).backward()
        start = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return update


def peak(case):
    """Peak MiB of two updates above what stood before the model; for a process of its own."""
    make_update(Case(1, 64, 500, 2, 16))()  # loads code, starts threads
    measured = Memory("cpu")
    update = make_update(case)
    for _ in range(2):  # Adam's moments are there from the second one on
        update()
    return measured.peak()[0]


def peaks(case):
    """(as a user has it, of the tensors alone), each from a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--memory", *map(str, case)]
    return [float(subprocess.check_output(command, text=True, env=os.environ | settings,
                                          start_new_session=True).split()[-1])
            for settings in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"})]


def seconds(cases, rounds):
    """{label: [(seconds, those of clipping and AdamW) of each round]}"""
    updates = {label: make_update(case) for label, case in cases.items()}
    for update in updates.values():
        update()  # warms up, and makes Adam's moments
    times = {label: [] for label in updates}
    for _ in tqdm(range(rounds), "rounds", leave=False, disable=None):
        for label, update in updates.items():
            start = time.perf_counter()
            adam = update()
            times[label].append((time.perf_counter() - start, adam))
    return times


def parted(ratio):
    """A measured number over a predicted one, as the table shows it."""
    return f"{ratio:.2f}" + ("!" if abs(ratio - 1) > 0.25 else " ")


def show(name, cases, times, mib):
    """Print the table of a series; return its rows."""
    print(f"\n{name:12} {'s':>7} {'Adam s':>7} {'ratio':>7} {'formula':>8} {'/ formula':>10} "
          f"{'MiB':>7} {'tensors':>8} {'formula':>8} {'/ formula':>10}")
    first, rows = next(iter(cases)), []
    for label, case in cases.items():
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(times[label], times[first]))
        whole, adam = (statistics.median(column) for column in zip(*times[label]))
        predicted = sum(flops(case).values()) / sum(flops(cases[first]).values())
        as_is, tensors = mib[case]
        expected = memory(case) / 2**20
        rows.append({"series": name, "case": label, **case._asdict(), "seconds": whole,
                     "adam_seconds": adam, "time_ratio": ratio, "flops": flops(case),
                     "flops_ratio": predicted, "mib": as_is, "tensors_mib": tensors,
                     "formula_mib": expected})
        print(f"{label:12} {whole:7.2f} {adam:7.3f} {ratio:7.2f} {predicted:8.2f} "
              f"{parted(ratio / predicted):>10} {as_is:7.0f} {tensors:8.0f} {expected:8.0f} "
              f"{parted(tensors / expected):>10}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--series", nargs="+", default=list(SERIES), choices=SERIES,
                        help="what to vary")
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of each case")
    parser.add_argument("--json", help="file for the rows of all tables")
    parser.add_argument("--memory", type=int, nargs=5, help="only print the peak of this case")
    args = parser.parse_args()
    if args.rounds < 1:
        raise SystemExit("--rounds: at least 1")
    if args.memory:
        return print(peak(Case(*args.memory)))

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32 on the CPU; base "
          f"case: {sum(flops(Case()).values()) / 1e9:.0f} GFLOP", flush=True)
    mib, rows = {}, []  # a case that is in several series is measured once
    for case in tqdm({case for name in args.series for case in SERIES[name].values()},
                     "memory", leave=False, disable=None):
        mib[case] = peaks(case)
    for name in args.series:
        rows += show(name, SERIES[name], seconds(SERIES[name], args.rounds), mib)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; nothing is kept") from None
