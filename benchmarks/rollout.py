"""Rollouts at the size of GPT-2 small: ours against transformers' `generate` and re-scoring.

    python benchmarks/rollout.py                 # 5 to 10 minutes on two cores, 4 GB of memory
    python benchmarks/rollout.py --device cuda   # the same on a GPU

PPO needs samples of the policy and their log-probs. The common way draws them with `generate` and
then runs the policy again over prompts and responses. `sample` of ppo_rlhf.py keeps the log-probs
that it drew from, and leaves behind the rows that have ended.

GPT-2 small with random weights, in fp32, dropout off; prompts of 64 to 384 random tokens, at most
48 new ones. So that responses end, as they do in a trained model, EOS is made likely: a bias along
its embedding gives it about one chance in twenty a token.

- generate + re-scoring: `generate` of transformers with the whole vocabulary at temperature 1, all
  prompts in one batch, padded on the left; then `token_logps` of ppo_rlhf.py in one batch.
- generate alone: what of it is sampling.
- ours: `sample`, log-probs included. With --size, so many prompts of like length at a time.

Before any timing, the log-probs of our samples are held against those of re-scoring, and the mean
length of both sides' samples must be near (the draws differ). The sides run in turn; a ratio is
the median of the ratios within a round. Peak memory (one run in a process of its own, above what
stood before) is taken on Linux, or of the CUDA allocator.
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
from ppo_rlhf import collate, sample, token_logps  # noqa: E402

EOS, TARGET = 50256, 0.70
TOKENIZER = SimpleNamespace(eos_id=EOS)


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
def generate(model, prompts, args, seed):
    """The responses of transformers' own sampling, cut behind their EOS."""
    torch.manual_seed(seed)
    T = max(map(len, prompts))
    ids = torch.tensor([[EOS] * (T - len(p)) + p for p in prompts]).to(model.device)  # (B, T)
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts]).to(model.device)
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                              eos_token_id=EOS, pad_token_id=EOS,
                              max_new_tokens=args.max_new_tokens)
    new = model.generate(ids, attention_mask=mask, generation_config=config)[:, T:].tolist()
    return [r[:r.index(EOS) + 1] if EOS in r else r for r in new]


@torch.no_grad()
def rescore(model, prompts, responses):
    return token_logps(model, collate(list(zip(prompts, responses)), model.device))  # (N,)


def cases(args):
    """{name: function of model, prompts, seed}, which returns responses and log-probs, or None."""

    def both(model, prompts, seed):
        responses = generate(model, prompts, args, seed)
        return responses, rescore(model, prompts, responses)

    return {"generate + re-scoring": both,
            "generate alone": lambda m, p, seed: (generate(m, p, args, seed), None),
            "ours": lambda m, p, seed: sample(
                m, TOKENIZER, p, args.max_new_tokens, seed, size=args.size)}


def peak(case, args):
    """MiB above what stood before one run of a case; for a process of its own."""
    model, prompts = make_model(args.device), make_prompts(args.prompts)
    case(model, prompts[:1], 0)  # loads code, starts threads
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case(model, prompts, 0)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")

    def kilobytes(key):
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most ever resident, starts again
    before = kilobytes("VmRSS")
    case(model, prompts, 0)
    return (kilobytes("VmHWM") - before) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default, text in [("prompts", 16, "prompts of a rollout"),
                                ("max_new_tokens", 48, "longest response"),
                                ("size", 16, "prompts that ours takes at a time"),
                                ("rounds", 3, "timings of each case")]:
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to run")
    parser.add_argument("--memory", help="only print the peak of this case, in MiB")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU; leave the flag out for the CPU")
    if min(args.prompts, args.max_new_tokens, args.size, args.rounds) < 1:
        raise SystemExit("--prompts, --max_new_tokens, --size and --rounds must be at least 1")
    found = cases(args)
    if args.memory:
        return print(peak(found[args.memory], args))

    model, prompts = make_model(args.device), make_prompts(args.prompts)
    print(f"torch {torch.__version__}, fp32, {args.device}, {torch.get_num_threads()} threads: "
          f"{args.prompts} prompts, up to {args.max_new_tokens} new tokens")
    lengths = {}
    for name, case in found.items():  # also warms up
        responses, logps = case(model, prompts, 0)
        lengths[name] = sum(map(len, responses)) / len(responses)
        if name == "ours":
            again = rescore(model, prompts, responses).cpu()
            apart = float((torch.tensor(sum(logps, [])) - again).abs().max())
            print(f"largest difference of a token's log-prob from re-scoring: {apart:.1e}")
            if not apart < 1e-4:
                raise SystemExit("the log-probs differ")
    print("mean tokens of a response:", ", ".join(f"{n} {x:.1f}" for n, x in lengths.items()))
    if not 0.6 < lengths["ours"] / lengths["generate alone"] < 1.7:
        raise SystemExit("the two sides do not sample alike")

    seconds = {name: [] for name in found}
    for seed in range(1, args.rounds + 1):
        for name, case in found.items():
            start = time.perf_counter()
            case(model, prompts, seed)
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    flags = [f"--{key}={value}" for key, value in vars(args).items() if key != "memory"]
    peaks = {name: float(subprocess.check_output(
        [sys.executable, __file__, *flags, "--memory", name], text=True).split()[-1])
        for name in found}

    base = "generate + re-scoring"
    ratio = lambda name: statistics.median(
        x / y for x, y in zip(seconds[name], seconds[base], strict=True))
    print(f"\n{'':22} {'median s':>9} {'min s':>7} {'ratio':>6} {'peak MiB':>9} {'ratio':>6}")
    for name, times in seconds.items():
        print(f"{name:22} {statistics.median(times):9.2f} {min(times):7.2f} {ratio(name):6.2f} "
              f"{peaks[name]:9.0f} {peaks[name] / peaks[base]:6.2f}")
    verdict = "met" if ratio("ours") <= TARGET else "MISSED"
    print(f"\ntarget: time of ours / {base} at most {TARGET:.2f}: {verdict}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; nothing is kept") from None
