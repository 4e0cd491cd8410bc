"""How far can a learned reward be optimised before the true reward stops following it?

    python -m lessons.overoptimisation             # about 5 minutes on one core; can be resumed

What to see in the figure: the scores, above, look alike for all reward models, and go on rising.
The true reward, below, follows only as far as the reward model has learned it: from 32 rankings it
stands still after n = 16. PPO's true reward lies in part in reviews that leave the grammar or
repeat a word (dashed: without these), over a third of it from 128 and from 512 rankings.

Gao et al. 2022, arXiv:2210.10760, optimise a proxy, a learned reward, and measure the gold reward
from which it was learned. Here gold is the toy's true reward, and proxies are reward models from
32, 128 and 512 rankings of tiny's samples by a noisy human. They are trained in two ways: for one
epoch, which is 2, 8 or 30 updates; and for 96 updates each, so that only the number of rankings
differs. Each is optimised by best-of-n, without training, n = 1 to 512, and those of 96 updates
also by 20 steps of PPO with a small penalty. The KL of best-of-n is log n - (n - 1)/n, an upper
bound (Beirami et al. 2024, arXiv:2401.01879).

Points are means over three seeds of the reward model (and of PPO, of five steps each), bars their
SD; PPO's KL is a median. Table and figure are left in --out.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

import ppo_rlhf
import reward_model
from lessons.reward_hacking import load_judge, quietly, reward_in_grammar, train_ppo
from model import load_model, split_by_prompt

SIZES = (32, 128, 512)  # rankings that a reward model learns from
FITS = {"one epoch": "", "96 updates": "--steps 96"}
N = [2**i for i in range(10)]  # of best-of-n: 1 to 512
POOL = 1024  # samples of each prompt, from which the n are drawn
PPO = "--beta 0.02 --lr 4e-4 --steps 20 --batch_size 32 --samples 8"
KEYS = ("kl/policy_reference", "scores/mean", "samples/true_reward", "true_reward/grammatical",
        "samples/grammatical")


def best_of_n_odds(M, n):
    """Probability of each of M samples, the lowest score first, to be the best of n of them: (M,).

    The sample with i lower ones is the best in C(i, n - 1) of the C(M, n) subsets of n samples. So
    the weighted mean is that over all subsets: an unbiased estimate of the expectation under
    best-of-n. (Nakano et al. 2021, arXiv:2112.09332, appendix I.)
    """
    return torch.tensor([math.comb(i, n - 1) / math.comb(M, n) for i in range(M)]).double()


def best_of_n_mean(scores, values, n):
    """The mean of values (P, M) of the best of n by scores (P, M), over P prompts."""
    ranked = values.gather(1, scores.argsort(1))  # (P, M), the lowest score first
    return float((ranked @ best_of_n_odds(scores.shape[1], n)).mean())


def best_of_n_rows(scores, texts):
    """A row of numbers for each n of N. scores: (P, M); texts: (P * M) of them, prompt by prompt.

    Its KL is an upper bound, which holds with equality where no two samples are equal.
    """
    columns = [scores] + [torch.tensor([*map(value, texts)]).view(scores.shape) for value in (
        ppo_rlhf.toy_reward, lambda text: reward_in_grammar([text]), ppo_rlhf.toy_grammatical)]
    return [dict(zip(KEYS, [math.log(n) - (n - 1) / n] + [
        best_of_n_mean(scores, column.double(), n) for column in columns])) for n in N]


def draw_pool():
    """(prompts, texts): POOL samples of tiny for each of the 8 prompts that PPO holds out."""
    model, tokenizer = load_model()
    held_out = split_by_prompt([{"prompt": prompt} for prompt in ppo_rlhf.toy_prompts()])[2][:8]
    prompts = [prompt for prompt in held_out for _ in range(POOL)]  # P * M
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    return prompts, [*map(tokenizer.decode, ppo_rlhf.sample(model, tokenizer, asked, 64, seed=0))]


def optimise(out, fit, size, seed, pool):
    """Train a reward model and optimise it; returns the rows of best-of-n and, of some, of PPO."""
    path, judge = out / "rows.json", out / "reward_model"
    if not path.exists():
        flags = ["--seed", str(seed), "--device", "cpu"]
        if not (judge / "results.json").exists():
            reward_model.train(reward_model.parse_args(
                [*FITS[fit].split(), "--rankings", str(size), "--out", str(judge), *flags]))
        flags += ["--reward_model", str(judge)]
        scores = load_judge(*flags)(*pool).view(-1, POOL)  # (P * M,) -> (P, M)
        rows = {"best-of-n": best_of_n_rows(scores, pool[1])}
        if fit != "one epoch":
            rows["PPO"] = train_ppo(out / "ppo", *PPO.split(), *flags)
        path.write_text(json.dumps(rows))
    return json.loads(path.read_text())


def spread(values):
    """(mean, SD) of a few numbers."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def mean_rows(rows):
    """The mean of a few steps as one row. The KL's median: one long sample may have 500 nats."""
    means = {key: statistics.mean(row[key] for row in rows) for key in KEYS}
    return means | {KEYS[0]: statistics.median(row[KEYS[0]] for row in rows)}


def over_seeds(runs, how):
    """[{key: its numbers, one for each seed}] for each n, or for each five steps of PPO."""
    curves = [run[how] for run in runs]
    if how == "PPO":  # the last row is the evaluation after training
        curves = [[mean_rows(rows[i:i + 5]) for i in range(0, len(rows) - 1, 5)] for rows in curves]
    return [{key: [row[key] for row in rows] for key in KEYS} for rows in zip(*curves)]


def table(runs, losses, gold):
    """Markdown: means ± SD over seeds, for n = 16 and 512 and for the last five steps of PPO."""
    lines = ["| rankings | reward model trained for | its held-out loss | | KL | score, SDs | "
             "true reward | in grammatical reviews | grammatical |", "| --- " * 9 + "|"]
    for (fit, size), of_seeds in runs.items():
        points = over_seeds(of_seeds, "best-of-n")
        rows = {f"best of {n}": points[N.index(n)] for n in (16, 512)}
        if "PPO" in of_seeds[0]:
            rows["PPO, last five steps"] = over_seeds(of_seeds, "PPO")[-1]
        for name, row in rows.items():
            cells = [f"{mean:.2f}" + f" ± {sd:.2f}" * (sd > 0) for mean, sd in
                     map(spread, [losses[fit, size], *row.values()])]
            lines.append(f"| {size} | {fit} | {cells[0]} | {name} | {' | '.join(cells[1:])} |")
    for name, reward in (("best of 1: tiny", gold[0]), ("best of 512", gold[-1])):
        lines.append(f"| | the true reward itself | | {name} | | | {reward:.2f} | | |")
    return lines


def draw(runs, gold, path):
    """Score and true reward over KL, for best-of-n from both kinds of reward models and for PPO."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(7, 5.6), sharey="row")
    panels = [("one epoch", "best-of-n"), ("96 updates", "best-of-n"), ("96 updates", "PPO")]
    for column, (fit, how) in enumerate(panels):
        for size, color in zip(SIZES, ("tab:red", "tab:orange", "tab:blue")):
            points = over_seeds(runs[fit, size], how)
            kl = [statistics.median(point[KEYS[0]]) for point in points]
            upper, lower = axes[:, column]
            for axis, key, style in ((upper, KEYS[1], "-"), (lower, KEYS[2], "-"),
                                     (lower, KEYS[3], "--")):
                means, sds = zip(*[spread(point[key]) for point in points])
                label = f"{size} rankings" + ", in grammatical reviews" * (style == "--")
                axis.errorbar(kl, means, sds, fmt=f"o{style}", ms=2, lw=1, elinewidth=0.5,
                              color=color, label=label)
        if how == "best-of-n":
            axes[1, column].plot(kl, gold, "k:", lw=1, label="best of n by the true reward")
        axes[0, column].set_title(f"{how}\n(reward model: {fit})", fontsize=9)
        axes[1, column].set_xlabel("KL from tiny, nats")
    axes[0, 0].set_ylabel("score, SDs of tiny's samples")
    axes[1, 0].set_ylabel("true reward")
    figure.suptitle("The scores rise alike; from few rankings the true reward does not follow",
                    fontsize=11)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.legend(*axes[1, 0].get_legend_handles_labels(), ncols=2, loc="lower center", fontsize=8,
                  frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/overoptimisation", help="finished runs in it stay")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out, pool = Path(args.out), quietly(draw_pool)
    rewards = torch.tensor([*map(ppo_rlhf.toy_reward, pool[1])]).view(-1, POOL)  # -> (P, M)
    gold = [best_of_n_mean(rewards, rewards.double(), n) for n in N]
    jobs = [(fit, size, seed) for seed in args.seeds for fit in FITS for size in SIZES]
    runs, losses = {}, {}  # (fit, size): the rows, and the held-out loss, of each seed
    for fit, size, seed in tqdm(jobs, disable=None):
        folder = out / fit.replace(" ", "_") / str(size) / str(seed)
        runs.setdefault((fit, size), []).append(quietly(optimise, folder, fit, size, seed, pool))
        after = json.loads((folder / "reward_model" / "results.json").read_text())["after"]
        losses.setdefault((fit, size), []).append(after["loss"])

    lines = table(runs, losses, gold)
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    draw(runs, gold, out / "overoptimisation.png")
    print(f"the table is in {out / 'table.md'}, the figure in {out / 'overoptimisation.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
