"""Rollouts at the size of GPT-2 small: ours against transformers' `generate`.

    python benchmarks/rollout.py                 # 5 to 10 minutes on two cores, 4 GB of memory
    python benchmarks/rollout.py --device cuda   # the same on a GPU

PPO needs samples of the policy and their log-probs. `sample` of ppo_rlhf.py leaves behind the rows
that have ended; `generate` goes on with them until the last one has.

GPT-2 small with random weights, dropout off, in fp32 (on a GPU both sides compute in bf16, as the
scripts do); prompts of 64 to 384 random tokens, at most 48 new ones. So that responses end, as
they do in a trained model, EOS is made likely: a bias along its embedding gives it about one chance
in twenty a token.

- generate + scoring: `generate` of transformers with the whole vocabulary at temperature 1, all
  prompts in one batch, padded on the left; then `token_logps` of ppo_rlhf.py in one batch.
- ours: `sample`, then `per_token`, which scores in parts of --max_tokens tokens.
- generate alone, sample alone: what of it is sampling.

The mean length of both sides' samples must be near (the draws differ). The sides run in turn; a
ratio is the median of the ratios within a round. Peak memory (one run in a process of its own,
above what stood before) is taken on Linux, or of the CUDA allocator.
"""

import argparse
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.measuring import Memory, add_table  # noqa: E402
from ppo_rlhf import per_token, sample, token_logps  # noqa: E402

EOS = 50256
BASE = "generate + scoring"


def make_model(device):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    with torch.no_grad():  # the final norm's bias moves the logit of EOS, others hardly
        eos = model.transformer.wte.weight[EOS]
        model.transformer.ln_f.bias += 7.2 * eos / eos.square().sum()
    return model.to(device)


def make_prompts(count):
    rng = random.Random(0)
    return [[rng.randrange(EOS) for _ in range(rng.randint(64, 384))] for _ in range(count)]


@torch.no_grad()
def generate(model, prompts, seed, args):
    """The responses of transformers' own sampling, cut behind their EOS."""
    torch.manual_seed(seed)
    T = max(map(len, prompts))
    ids = torch.tensor([[EOS] * (T - len(p)) + p for p in prompts]).to(model.device)  # (B, T)
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts]).to(model.device)
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                              eos_token_id=EOS, pad_token_id=EOS,
                              max_new_tokens=args.max_new_tokens)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        new = model.generate(ids, attention_mask=mask, generation_config=config)
    new = new[:, T:].tolist()
    return [r[:r.index(EOS) + 1] if EOS in r else r for r in new]


def draw(model, prompts, seed, args):
    return sample(model, SimpleNamespace(stop_ids={EOS}), prompts, args.max_new_tokens, seed)


@torch.no_grad()
def run(name, model, prompts, seed, args):
    """One run of a case; returns its responses."""
    responses = (generate if "generate" in name else draw)(model, prompts, seed, args)
    sequences = list(zip(prompts, responses))
    if name == BASE:
        token_logps(model, sequences, max(map(len, responses)))
    elif name == "ours":
        per_token(token_logps, model, sequences, args.max_tokens)
    if args.device == "cuda":
        torch.cuda.synchronize()
    return responses


def peak(name, args):
    """MiB above what stood before one run of a case; on a CPU for a process of its own."""
    model, prompts = make_model(args.device), make_prompts(args.prompts)
    run(name, model, prompts[:1], 0, args)  # loads code, starts threads
    memory = Memory(args.device)
    run(name, model, prompts, 0, args)
    return memory.peak()[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default, text in [("prompts", 16, "prompts of a rollout"),
                                ("max_new_tokens", 48, "longest response"),
                                ("max_tokens", 4096, "tokens that ours scores at a time"),
                                ("rounds", 3, "timings of each case")]:
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to run")
    parser.add_argument("--json", help="file to which the table is appended")
    parser.add_argument("--memory", help="only print the peak of this case, in MiB")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU; leave the flag out for the CPU")
    if min(args.prompts, args.max_new_tokens, args.max_tokens, args.rounds) < 1:
        raise SystemExit("--prompts, --max_new_tokens, --max_tokens and --rounds: at least 1")
    if args.memory:
        return print(peak(args.memory, args))

    where = f"cpu, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        where = f"bf16 autocast on {torch.cuda.get_device_name()}"
        torch.set_float32_matmul_precision("high")  # as in model.py
    model, prompts = make_model(args.device), make_prompts(args.prompts)
    setting = (f"torch {torch.__version__}, {where}: {args.prompts} prompts, up to "
               f"{args.max_new_tokens} new tokens")
    print(setting)
    seconds = {BASE: [], "ours": [], "generate alone": [], "sample alone": []}
    lengths = {name: statistics.mean(map(len, run(name, model, prompts, 0, args)))
               for name in (BASE, "ours")}  # also warms up
    print("mean tokens of a response:", ", ".join(f"{n} {x:.1f}" for n, x in lengths.items()))
    if not 0.6 < lengths["ours"] / lengths[BASE] < 1.7:
        raise SystemExit("the two sides do not sample alike")
    speeds = {name: [] for name in seconds}  # sampled tokens a second
    for seed in range(1, args.rounds + 1):
        for name, times in seconds.items():
            start = time.perf_counter()
            responses = run(name, model, prompts, seed, args)
            times.append(time.perf_counter() - start)
            speeds[name].append(sum(map(len, responses)) / times[-1])
    flags = [f"--{key}={value}" for key, value in vars(args).items()
             if key not in ("json", "memory")]
    if args.device == "cuda":
        peaks = {name: peak(name, args) for name in seconds}
    else:
        peaks = {name: float(subprocess.check_output(
            [sys.executable, __file__, *flags, "--memory", name], text=True,
            start_new_session=True).split()[-1]) for name in seconds}

    rows = [{"case": name, "seconds": statistics.median(times), "least": min(times),
             "tokens_per_second": statistics.median(speeds[name]), "peak_mib": peaks[name],
             "time_ratio": statistics.median(x / y for x, y in zip(times, seconds[BASE])),
             "peak_ratio": peaks[name] / peaks[BASE]} for name, times in seconds.items()]
    if args.json:
        add_table(args.json, "rollout", setting, f"it / {BASE}", rows)
    print(f"\n{'':22} {'median s':>9} {'min s':>7} {'ratio':>6} {'tokens/s':>9} {'peak MiB':>9} "
          f"{'ratio':>6}")
    for row in rows:
        print(f"{row['case']:22} {row['seconds']:9.2f} {row['least']:7.2f} "
              f"{row['time_ratio']:6.2f} {row['tokens_per_second']:9.1f} {row['peak_mib']:9.0f} "
              f"{row['peak_ratio']:6.2f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; nothing is kept") from None
