"""When does PPO's clip matter?

    python -m lessons.clip                         # about 2 minutes on one core; can be resumed

What to see in the figure: at the toy's learning rate of 2e-4 the ratio hardly ever leaves 1 ± 0.2,
and the curves with and without the clip nearly lie on each other. At 1e-3 a tenth of the tokens and
more leave it in the first steps. There each run without the clip has steps in which J collapses.

PPO makes eight updates with the samples of a step. The first of them moves the policy, so the other
seven learn from samples of a policy that is no longer the current one. The ratio q_t corrects for
this, and the clip stops a token from being pushed further once q_t has left 1 ± 0.2 (Schulman et
al. 2017, arXiv:1707.06347v2, Eq. 7). How far eight updates move the policy depends on the learning
rate. So the clip is compared with none (a clip of 1e9) at two learning rates. All else, also the
clip of the values and the clip of the gradient's norm, is as in ppo_rlhf.py.

`policy/clip_fraction` is the share of tokens whose ratio is outside 1 ± 0.2, with or without the
clip. J = reward - beta KL is what PPO maximises, here the mean of a run's last three steps. Table
and figure are left in --out.
"""

import argparse
import contextlib
import functools
import io
import json
import statistics
from pathlib import Path

from tqdm import tqdm

import ppo_rlhf

FLAGS = "--steps 10 --samples 1 --device cpu"
BETA = 0.5  # ppo_rlhf.py's default
RUNS = {f"{lr}, {name}": (lr, clip) for lr in ("2e-4", "1e-3")
        for name, clip in (("clip 0.2", 0.2), ("no clip", 1e9))}


def train(lr, clip, seed, run):
    """A run of PPO with this clip, unless it has ended. Returns its log."""
    if not (run / "results.json").exists():
        policy_loss = ppo_rlhf.policy_loss
        ppo_rlhf.policy_loss = functools.partial(policy_loss, clip=clip)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                ppo_rlhf.train(ppo_rlhf.parse_args(
                    f"{FLAGS} --beta {BETA} --lr {lr} --seed {seed} --out {run}".split()))
        finally:
            ppo_rlhf.policy_loss = policy_loss
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def objective(row):
    """J of a step's samples."""
    return row["scores/mean"] - BETA * row["kl/policy_reference"]


def summary(log):
    """(mean and largest clip fraction; J, reward, KL and grammar of the last three steps; lowest J
    and largest KL of any step)."""
    fractions = [row["policy/clip_fraction"] for row in log]
    reward, kl, grammatical = (statistics.mean(row[key] for row in log[-3:]) for key in (
        "scores/mean", "kl/policy_reference", "samples/grammatical"))
    return (statistics.mean(fractions), max(fractions), reward - BETA * kl, reward, kl, grammatical,
            min(map(objective, log)), max(row["kl/policy_reference"] for row in log))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/clip", help="finished runs in it stay")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out, logs = Path(args.out), {name: [] for name in RUNS}
    for seed, name in tqdm([(s, n) for s in args.seeds for n in RUNS], disable=None):
        lr, clip = RUNS[name]
        logs[name].append(train(lr, clip, seed, out / f"{lr}_{clip:g}_{seed}"))

    lines = ["| learning rate | clip fraction, mean | largest | J | J, worst seed | reward | KL | "
             "grammatical | lowest J of a step | largest KL |", "| --- " * 10 + "|"]
    for name, of_seeds in logs.items():
        columns = list(zip(*map(summary, of_seeds)))
        cells = []
        for values, digits in zip(columns, (3, 2, 2, 2, 2, 2, 1, 1)):
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        cells.insert(3, f"{min(columns[2]):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.4))
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, lr in enumerate(("2e-4", "1e-3")):
        for name, color in ((f"{lr}, clip 0.2", "tab:blue"), (f"{lr}, no clip", "tab:orange")):
            for k, log in enumerate(logs[name]):
                steps = [row["step"] for row in log]
                fractions = [row["policy/clip_fraction"] for row in log]
                axes[0, column].plot(steps, fractions, color=color, lw=1)
                axes[1, column].plot(steps, [*map(objective, log)], color=color, lw=1,
                                     label=name.split(", ")[1] if k == 0 else None)
        axes[0, column].set_title(f"learning rate {lr}")
        axes[1, column].set_xlabel("step of PPO")
    axes[0, 0].set_ylabel("policy/clip_fraction")
    axes[1, 0].set_ylabel("J = reward - 0.5 KL")
    axes[1, 1].legend()
    figure.suptitle("The clip matters where updates are large (a line is a seed)")
    figure.tight_layout()
    figure.savefig(out / "clip.png", dpi=100)
    print(f"the figure is in {out / 'clip.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
