"""What does PPO do to a learned reward when nothing keeps it near the reference?

    python -m lessons.reward_hacking               # about 4 minutes on two cores

What to see in the figure: the score, which is all that PPO sees, looks better without the penalty;
KL and grammar, which it does not see, tell why. The true reward counts friendly words wherever they
stand, so it can be hacked as well, and rises too. Below are samples of both policies.

Trains a reward model (`python reward_model.py`), then the same PPO twice: with --beta 0, and with
the toy's usual 0.5. The reward model has seen samples of the reference only. Without a penalty the
policy leaves them, and finds texts that score ever higher and that nobody would call a review.
The figure is left in --out.
"""

import argparse
import json
import textwrap
from pathlib import Path

import ppo_rlhf
import reward_model

PANELS = {"scores/mean": "learned reward, SDs", "samples/true_reward":
          "true reward", "kl/policy_reference": "KL from the reference, nats",
          "samples/grammatical": "share grammatical"}
RUNS = ("beta 0", "beta 0.5")


def run(script, *words):
    print(f"$ python {script.__name__}.py {' '.join(words)}", flush=True)
    script.train(script.parse_args(words))


def draw(folder):
    """The figure from the logs, results and samples of both runs; returns its text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(7, 7))
    lines = []
    for name in RUNS:
        out = folder / name.replace(" ", "_")
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for axis, (key, title) in zip(axes.flatten(), PANELS.items()):
            axis.plot([row["step"] for row in log], [row[key] for row in log], lw=1, label=name)
            axis.set(title=title, xlabel="step")
        after = json.loads((out / "results.json").read_text())["after"]
        samples = (out / "samples.txt").read_text(encoding="utf-8").splitlines()
        texts = [line.split(":", 1)[1] for line in samples if line.startswith("after    :")]
        numbers = ", ".join(f"{key.split('/')[1]} {after[key]:.2f}" for key in PANELS)
        lines += [f"{name}: {numbers}"]
        lines += [" " + textwrap.shorten(text, 100, placeholder=" ...") for text in texts[:5]]
        lines += [""]
    axes[0, 0].legend()
    figure.suptitle("Without its KL penalty PPO hacks the reward")
    figure.tight_layout(rect=(0, 0.34, 1, 1))
    figure.text(0.02, 0.33, "\n".join(lines), family="monospace", fontsize=7, va="top")
    figure.savefig(folder / "reward_hacking.png", dpi=100)
    plt.close(figure)
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="PPO steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="of all three runs")
    parser.add_argument("--out", default="runs/reward_hacking", help="folder for the three runs")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    folder, seed = Path(args.out), ["--seed", str(args.seed)]
    reward = str(folder / "reward_model")
    run(reward_model, "--out", reward, *seed)
    for name in RUNS:
        run(ppo_rlhf, "--reward_model", reward, "--beta", name.split()[1], "--steps",
            str(args.steps), "--out", str(folder / name.replace(" ", "_")), *seed)
    print(draw(folder) + f"\nthe figure is in {folder / 'reward_hacking.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; run it again to start anew") from None
