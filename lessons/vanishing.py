"""Why does SFT come first, and PPO after it?

    python -m lessons.vanishing                    # about 6 minutes on one core; can be resumed

What to see in the figure: from tiny the rewards of a prompt's samples are all equal, their SD stays
near 0, and so does the reward. After SFT there is some spread from the first step on, and soon three
samples in four earn the reward.

The gradient of a prompt's expected reward is small where the reward hardly varies between the
policy's own samples (Razin et al. 2024, arXiv:2310.20703v2): at most proportional to the SD to the
power 2/3, however far from the best the reward is. The lecture's claim: SFT lowers the number of
prompts with such an SD, and this is why it is done first.

The reward here is 1 for a review of two sentences with four words of praise, and 0 for all others.
PPO starts from tiny, and from tiny after `python sft.py`, whose demonstrations are friendly but not
made for this reward; 60 steps, --n 8 samples of each prompt, three seeds. Before it, 64 samples for
each of 64 prompts show for how many prompts all rewards are equal: their SD is 0. Table and figure
are left in --out.
"""

import argparse
import contextlib
import io
import json
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

import ppo_rlhf
import sft
from model import load_model

FLAGS = "--n 8 --steps 60 --beta 0.02 --missing_eos_score 0 --samples 16 --device cpu".split()


def rare_rewards(prompts, texts):
    """(B,): 1 for a text of two sentences with four words of praise, and else 0."""
    return torch.tensor([float(ppo_rlhf.toy_reward(text) == 4 and ppo_rlhf.toy_grammatical(text))
                         for text in texts])


def quietly(script, *flags, **own):
    with contextlib.redirect_stdout(io.StringIO()):
        script.train(script.parse_args(flags), **own)


def spread_of_rewards(folder, seed):
    """(mean reward, mean SD of a prompt's rewards, share of prompts with SD 0) of a model."""
    model, tokenizer = load_model(folder)
    prompts = ppo_rlhf.toy_prompts()[::4][:64]
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(64)]
    texts = [tokenizer.decode(ids) for ids in ppo_rlhf.sample(model, tokenizer, asked, 64, seed)]
    rewards = rare_rewards(prompts, texts).view(len(prompts), 64)
    sd = rewards.std(1, correction=0)
    return float(rewards.mean()), float(sd.mean()), float((sd == 0).float().mean())


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/vanishing", help="finished runs in it stay")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    logs, table = {"tiny": [], "tiny after SFT": []}, {"tiny": [], "tiny after SFT": []}
    for seed in tqdm(args.seeds, disable=None):
        folder = Path(args.out) / str(seed)
        if not (folder / "sft" / "results.json").exists():
            quietly(sft, "--out", str(folder / "sft"), "--seed", str(seed), "--device", "cpu")
        for name, start in (("tiny", "tiny"), ("tiny after SFT", str(folder / "sft"))):
            run = folder / name.replace(" ", "_")
            if not (run / "results.json").exists():
                quietly(ppo_rlhf, *FLAGS, "--model", start, "--out", str(run), "--seed", str(seed),
                        reward=rare_rewards)
            log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            logs[name].append(log)
            end = statistics.mean(row["scores/mean"] for row in log[-5:])
            table[name].append((*spread_of_rewards(start, seed), end))

    lines = ["| start | reward at the start | SD of a prompt's rewards | prompts with SD 0 | "
             "reward in the last five steps |", "| --- " * 5 + "|"]
    for name, rows in table.items():
        cells = [f"{statistics.mean(x):.3f} ± {statistics.stdev(x):.3f}" if len(x) > 1
                 else f"{x[0]:.3f}" for x in zip(*rows)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(lines))
    (Path(args.out) / "table.md").write_text("\n".join(lines) + "\n")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2))
    panels = {"scores/mean": "mean reward of a step's samples",
              "scores/std_per_prompt": "SD of rewards within a prompt"}
    for number, (key, title) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(1, 2, number)
        for (name, runs), color in zip(logs.items(), ("tab:blue", "tab:orange")):
            for k, log in enumerate(runs):
                axis.plot([row["step"] for row in log], [row[key] for row in log], color=color,
                          lw=1, label=f"from {name}" if k == 0 else None)
        axis.set(title=title, xlabel="step of PPO")
        axis.legend()
    figure.suptitle("PPO learns nothing where all rewards are equal")
    figure.tight_layout()
    figure.savefig(Path(args.out) / "vanishing.png", dpi=100)
    print(f"the figure is in {Path(args.out) / 'vanishing.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
