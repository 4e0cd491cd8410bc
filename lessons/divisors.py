"""Why do wrong answers grow longer when a loss is divided by the length of each response?

    python -m lessons.divisors                     # about ten minutes on one core; can be resumed

What to see in the figure: with --divisor length the wrong answers end longer than the right ones,
with --divisor constant shorter. The right ones grow alike in both, since friendly words take room.

The toy of reviews, with a reward that does not look at the length: 1 for a review with more
positive than negative words, else 0. Both runs are variants/grpo.py with --advantage centered and
without a penalty, from the same model and with the same seeds. Only the divisor differs: each token
of a wrong response gets the blame A_i/D_i. If D_i is the response's own length, a long failure is
blamed less for each of its tokens than a short one; so among failures the policy drifts to the long
ones. Among successes it drifts to the short ones.

A line is the mean over seeds of the mean length in a step, over eight steps; the band goes from the
lowest to the highest seed. Table and figure are left in --out.
"""

import argparse
import contextlib
import io
import json
import math
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from model import load_model
from ppo_rlhf import toy_reward
from variants import grpo

FLAGS = "--advantage centered --kl none --device cpu"
DIVISORS = ("length", "constant")
STEPS = {"steps 1 to 8": (0, 8), "9 to 16": (8, 16), "17 to 40": (16, 40)}


def train(divisor, seed, run):
    """One run, unless it has ended; returns [[(tokens, right) of each response] of each step]."""
    path = run / "lengths.json"
    if not path.exists():
        tokenizer, steps = load_model()[1], []

        def reward(prompts, texts):
            right = [float(toy_reward(text) > 0) for text in texts]
            steps.append([(len(tokenizer.encode(text)) + 1, x) for text, x in zip(texts, right)])
            return torch.tensor(right)

        flags = [*FLAGS.split(), "--divisor", divisor, "--seed", str(seed), "--out", str(run)]
        args = grpo.parse_args([*flags, "--samples", "2"])  # its evaluation is not needed here
        with contextlib.redirect_stdout(io.StringIO()):
            grpo.train(args, reward)
        path.write_text(json.dumps(steps[:args.steps]))
    return json.loads(path.read_text())


def mean_tokens(steps, right):
    """Mean length of the right or of the wrong responses of some steps; NaN if there is none."""
    lengths = [tokens for step in steps for tokens, x in step if x == right]
    return statistics.mean(lengths) if lengths else math.nan


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/divisors", help="finished runs in it stay")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out, runs = Path(args.out), {divisor: [] for divisor in DIVISORS}
    for seed, divisor in tqdm([(s, d) for s in args.seeds for d in DIVISORS], disable=None):
        runs[divisor].append(train(divisor, seed, out / divisor / str(seed)))

    lines = [f"| divisor | responses | {' | '.join(STEPS)} |", "| --- " * (len(STEPS) + 2) + "|"]
    for divisor, of_seeds in runs.items():
        for name, right in (("wrong", 0), ("right", 1)):
            cells = []
            for first, last in STEPS.values():
                means = [mean_tokens(steps[first:last], right) for steps in of_seeds]
                cell = f"{statistics.mean(means):.1f}"
                if len(means) > 1:
                    cell += f" ± {statistics.stdev(means):.1f}"
                cells.append(cell)
            lines.append(f"| {divisor} | {name} | {' | '.join(cells)} |")
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
    for axis, (name, right) in zip(axes, (("wrong", 0), ("right", 1))):
        for divisor, of_seeds in runs.items():
            curves = [[mean_tokens(steps[max(0, i - 7):i + 1], right) for i in range(len(steps))]
                      for steps in of_seeds]
            points = list(zip(*curves))  # one tuple over seeds for each step
            axis.plot([statistics.mean(p) for p in points], label=f"--divisor {divisor}")
            axis.fill_between(range(len(points)), list(map(min, points)), list(map(max, points)),
                              alpha=0.2)
        axis.set(title=f"{name} answers", xlabel="step")
    axes[0].set_ylabel("tokens of a response")
    axes[0].legend()
    figure.suptitle("Divided by its own length, a long failure is cheap (band: all seeds)")
    figure.tight_layout()
    figure.savefig(out / "divisors.png", dpi=100)
    print(f"the table is in {out / 'table.md'}, the figure in {out / 'divisors.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
