"""What does PPO do to a learned reward when nothing keeps it near the reference?

    python -m lessons.reward_hacking               # about 5 minutes on one core; can be resumed

What to see in the figure: without the penalty the policy leaves the language. The score, which is
all that PPO sees, goes on rising, and so does the true reward, since it counts friendly words
wherever they stand. Counted in grammatical reviews alone (dashed) it rises at first, then falls to
0; the KL and the share of grammatical reviews show that something is wrong.

Trains a reward model (`python reward_model.py`), then the same PPO twice: with --beta 0, and with
the toy's usual 0.5. The reward model has seen samples of the reference only. A review that leaves
the grammar or repeats a word, as in "moving and moving", has the reward 0 in the dashed lines. The
figure and table.md are left in --out.
"""

import argparse
import contextlib
import io
import json
import statistics
import textwrap
from pathlib import Path

import torch

import ppo_rlhf
import reward_model
from model import load_model

PANELS = {  # the title of a panel, and its lines: keys of the log
    "learned reward, SDs": ["scores/mean"],
    "true reward": ["samples/true_reward", "true_reward/grammatical"],
    "KL from the reference, nats": ["kl/policy_reference"],
    "share grammatical": ["samples/grammatical"]}
KEYS = sum(PANELS.values(), [])
BETAS = ("0", "0.5")


def reward_in_grammar(texts):
    """The mean true reward of texts, in which one that is not grammatical counts as 0."""
    return statistics.mean(ppo_rlhf.toy_reward(text) * ppo_rlhf.toy_grammatical(text)
                           for text in texts)


def quietly(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def load_judge(*flags):
    """The reward of ppo_rlhf.py with these flags: a function (prompts, texts) -> scores (B,)."""
    args = ppo_rlhf.parse_args(flags)
    reference, tokenizer = load_model(device=args.device)
    prompts, _ = ppo_rlhf.load_prompts(tokenizer, reference.small, args)
    return ppo_rlhf.load_reward(reference, tokenizer, prompts, args)


def train_ppo(folder, *flags):
    """Run ppo_rlhf.py, unless it has ended; returns its log, one row a step, with one number more.

    The evaluation of the policy at the end is the last row.
    """
    path = folder / "rows.json"
    if not path.exists():
        args = ppo_rlhf.parse_args([*flags, "--out", str(folder)])
        reward, in_grammar = load_judge(*flags), []

        def watched(prompts, texts):
            in_grammar.append(reward_in_grammar(texts))
            return reward(prompts, texts)

        after = ppo_rlhf.train(args, watched)
        log = (folder / "metrics.jsonl").read_text().splitlines()
        rows = [*map(json.loads, log), after]
        del in_grammar[args.steps]  # evaluated: first the reference, then the policy
        path.write_text(json.dumps([row | {"true_reward/grammatical": number}
                                    for row, number in zip(rows, in_grammar, strict=True)]))
    return json.loads(path.read_text())


def draw(folder, logs):
    """The figure of the rows of both runs, with samples of both policies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(7, 7.6))
    lines = []
    for (beta, rows), color in zip(logs.items(), ("tab:blue", "tab:orange")):
        for axis, (title, keys) in zip(axes.flatten(), PANELS.items()):
            for key, style in zip(keys, ("-", "--")):
                label = f"beta {beta}" + ", in grammatical reviews" * (style == "--")
                axis.plot(range(1, len(rows)), [row[key] for row in rows[:-1]], style, lw=1,
                          color=color, label=label)
            axis.set(title=title, xlabel="step")
        samples = (folder / f"beta_{beta}" / "samples.txt").read_text(encoding="utf-8")
        texts = [line.split(":", 1)[1] for line in samples.splitlines()
                 if line.startswith("after    :")]
        lines += [f"samples with beta {beta}:"]
        lines += [" " + textwrap.shorten(text, 112, placeholder=" ...") for text in texts[:5]]
        lines += [""]
    figure.suptitle("Without its KL penalty PPO leaves the language; the score does not show it",
                    fontsize=11)
    figure.tight_layout(rect=(0, 0.31, 1, 1))
    figure.legend(*axes[0, 1].get_legend_handles_labels(), ncols=2, loc="lower center",
                  bbox_to_anchor=(0.5, 0.245), frameon=False)
    figure.text(0.02, 0.235, "\n".join(lines), family="monospace", fontsize=7, va="top")
    figure.savefig(folder / "reward_hacking.png", dpi=100)
    plt.close(figure)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="PPO steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="of all three runs")
    parser.add_argument("--out", default="runs/reward_hacking",
                        help="finished runs in it stay, whatever their flags")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    folder, flags = Path(args.out), ["--seed", str(args.seed), "--device", "cpu"]
    judge = folder / "reward_model"
    if not (judge / "results.json").exists():
        reward_model.train(reward_model.parse_args(["--out", str(judge), *flags]))
    flags += ["--reward_model", str(judge), "--steps", str(args.steps)]
    logs = {beta: train_ppo(folder / f"beta_{beta}", "--beta", beta, *flags) for beta in BETAS}
    lines = [f"| | {' | '.join(f'`{key}`' for key in KEYS)} |", "| --- " * (len(KEYS) + 1) + "|"]
    for beta, rows in logs.items():
        lines += [f"| `--beta {beta}` | {' | '.join(f'{rows[-1][key]:.2f}' for key in KEYS)} |"]
    print("\n".join(lines))
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    draw(folder, logs)
    print(f"the figure is in {folder / 'reward_hacking.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
