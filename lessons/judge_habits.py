"""How much better must a response be before a judge's habits no longer decide?

    python -m lessons.judge_habits                 # half a minute on one core

What to see in the figure: asked in both orders, a judge who likes the first response calls two
equal models equal, though differences look smaller than they are (above, left). Both orders do
nothing about a liking for length; a regression on the length does (above, right). Asked once, such
a judge sees only true differences above the whole habit (below).

A judge, a person or a model, sees responses of the models A and B to one prompt, and prefers B with
the probability sigma(d + habits). This is the model of Bradley and Terry: d is how much better B
truly is, so a fair judge prefers B with sigma(d). The habits (Zheng et al. 2023,
arXiv:2306.05685v4, 3.3; Dubois et al. 2024, arXiv:2404.04475) are all against B here. B is shown
second, which costs it 1. Its response is 30 tokens shorter for half of the prompts and 10 longer
for the others, and each token more is worth 0.05. Or the judge is a relative of A, worth 0.5.

once        the win rate of B, each pair being judged once
both        the mean of both orders: a verdict that changes with the order is half a win
agreeing    Of the pairs with the same verdict in both orders B wins the share sigma(2d), whatever
            the habit of position is; so half of this share's logit is d. This needs a judge who
            draws the second verdict independently of the first
regression  the win rate where the habits are 0, by `rate_without` of variants/win_rate.py

A study asks about 300 prompts. It sees that B is better if its win rate is above a half by 1.96 of
its standard errors. The formulas say what rate very many prompts would give, at which true
difference this is a half, and from which one on every second study sees it (to first order).
Beside them are means ± SD of 400 sampled studies. Table and figure are left in --out.
"""

import argparse
import math
from pathlib import Path

import torch
from tqdm import tqdm

from model import mean_by_prompt
from variants.win_rate import rate_without

LONGER = torch.tensor([-30.0, 10.0]).double()  # B's tokens more than A's, equally often
SECOND, BOTH = torch.tensor([-1.0]).double(), torch.tensor([-1.0, 1.0]).double()  # B stands
PROMPTS, STUDIES, ERRORS, TRUE = 300, 400, 1.96, 0.5
FIRST, LENGTH = {"position": 1.0}, {"length": 0.05}
WAYS = {  # what is computed: (places of B, habits that the regression removes; None: there is none)
    "once": (SECOND, None),
    "both": (BOTH, None),
    "agreeing": (BOTH, None),
    "once, regression on length": (SECOND, ["length"]),
    "both, regression on length and position": (BOTH, ["length", "position"])}
ROWS = [("fair", {}, ("once", "both")),
        ("likes the first", FIRST, ("once", "both", "agreeing")),
        ("likes the longer", LENGTH, ("once", "both", "once, regression on length")),
        ("likes both", FIRST | LENGTH, ("once", "both", "both, regression on length and position")),
        ("likes its own", {"own": 0.5}, ("once", "both, regression on length and position"))]


def chances(d, habits, longer, places):
    """(N, len(places)): how likely the judge is to prefer B. longer: (N,) tokens."""
    logits = d - habits.get("own", 0) + habits.get("length", 0) * longer
    return torch.sigmoid(logits[:, None] + habits.get("position", 0) * places)


def features(longer, places, names):
    """(N * len(places), len(names)): the habits that a regression gets, for every verdict."""
    columns = {"length": longer[:, None].expand(-1, len(places)),
               "position": places.expand(len(longer), -1)}
    return torch.stack([columns[name].flatten() for name in names], 1)


def rate(d, habits, way):
    """The win rate of B from very many prompts."""
    places, names = WAYS[way]
    p = chances(d, habits, LONGER, places)  # (2, 1) or (2, 2)
    if way == "agreeing":
        return float(torch.sigmoid(torch.log(p.prod(1).mean() / (1 - p).prod(1).mean()) / 2))
    if names:
        return 1 / (1 + math.exp(habits.get("own", 0) - d))
    return float(p.mean())


def draw_at(habits, way):
    """The true difference at which the win rate is a half: the habits that are left, in logits."""
    places, names = WAYS[way]
    at = habits.get("own", 0)
    if len(places) == 1 and "position" not in (names or []):
        at += habits.get("position", 0)
    if "length" not in (names or []):
        at -= habits.get("length", 0) * float(LONGER.mean())
    return at


def seen_from(habits, way):
    """The true difference that half of the studies see: 1.96 standard errors above a draw.

    The standard error of d is that of the win rate over its slope, or that of the intercept.
    """
    places, names = WAYS[way]
    d = draw_at(habits, way)
    p = chances(d, habits, LONGER, places)  # (2, 1) or (2, 2)
    if way == "agreeing":
        variance = (1 / p.prod(1).mean() + 1 / (1 - p).prod(1).mean()) / 4  # of half a logit
    elif names is None:  # of the mean of a prompt's verdicts, over the squared slope
        within = (p * (1 - p)).mean(1) / len(places)  # (2,)
        variance = (within + (p.mean(1) - 0.5) ** 2).mean() / (p * (1 - p)).mean() ** 2
    else:
        x = features(LONGER, places, names)
        x = torch.cat([torch.ones(len(x), 1), x], 1)  # (2 * places, 1 + names)
        information = x.T @ (x * (p * (1 - p)).view(-1, 1)) / 2  # of a prompt
        variance = torch.linalg.inv(information)[0, 0]
    return d + ERRORS * math.sqrt(float(variance) / PROMPTS)


def study(d, habits, way, seed):
    """(win rate, its standard error) of one sample of prompts and verdicts."""
    dice = torch.Generator().manual_seed(seed)
    places, names = WAYS[way]
    longer = LONGER[torch.randint(2, (PROMPTS,), generator=dice)]
    p = chances(d, habits, longer, places)
    wins = torch.bernoulli(p, generator=dice)  # (PROMPTS, 1 or 2)
    if way == "agreeing":
        # The half that is added to both counts is usual: it keeps the logit finite.
        won, lost = 0.5 + float(wins.prod(1).sum()), 0.5 + float((1 - wins).prod(1).sum())
        share = 1 / (1 + math.sqrt(lost / won))
        return share, share * (1 - share) * math.sqrt(1 / won + 1 / lost) / 2
    prompts = [i for i in range(PROMPTS) for _ in places]
    if names:
        return rate_without(features(longer, places, names), wins.flatten(), prompts)
    metrics = mean_by_prompt({"rate": wins.flatten()}, prompts)
    return metrics["rate"], metrics["rate_se"]


def studies(d, habits, way, count=STUDIES):
    """(mean, SD) of the win rates of some studies, and the share of them that see that B is better.
    """
    rates, errors = torch.tensor([study(d, habits, way, seed) for seed in range(count)]).T
    seen = rates - 0.5 > ERRORS * errors  # (count,)
    return float(rates.mean()), float(rates.std()), float(seen.float().mean())


def draw(path):
    """The figure: win rates over the true difference, and which differences are seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6))
    grid = torch.linspace(-1.5, 2, 71).tolist()
    for number, (title, habits, ways) in enumerate([
            ("likes the first; B is second", FIRST, {"once": "once", "both": "both orders",
                                                     "agreeing": "agreeing, half the logit"}),
            ("likes the longer; B is shorter", LENGTH, {
                "once": "once", "both": "both orders", "once, regression on length": "regression"})
            ], 1):
        axis = figure.add_subplot(2, 2, number)
        axis.plot(grid, [rate(d, {}, "once") for d in grid], "k:", label="a fair judge")
        axis.axhline(0.5, color="0.8", lw=1)
        for i, (way, label) in enumerate(ways.items()):
            axis.plot(grid, [rate(d, habits, way) for d in grid], color=f"C{i}", lw=1)
            points = [-1 + i / 8 + k / 2 for k in range(6)]
            means, spreads, _ = zip(*[studies(d, habits, way, 100) for d in points])
            axis.errorbar(points, means, spreads, color=f"C{i}", fmt="o", ms=3, label=label)
        axis.set(title=title, xlabel="true difference d, logits", ylabel="win rate of B")
        axis.legend(fontsize=7)
    axis = figure.add_subplot(2, 1, 2)
    habit = [i / 20 for i in range(81)]
    for way, label in (("once", "asked once"), ("both", "asked in both orders")):
        axis.plot(habit, [seen_from({"position": h}, way) for h in habit], label=label)
    axis.plot(habit, habit, "k:", label="the habit")
    axis.set(xlabel="habit of preferring the first, logits", ylabel="true difference, logits",
             title=f"Smallest difference that half of all studies ({PROMPTS} prompts) detect")
    axis.legend()
    figure.suptitle("A judge with a habit (lines: formulas; points: mean ± SD of sampled studies)",
                    fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="runs/judge_habits", help="folder for table and figure")
    return parser.parse_args(argv)


def main(argv=None):
    out = Path(parse_args(argv).out)
    out.mkdir(parents=True, exist_ok=True)
    fair = rate(TRUE, {}, "once")
    lines = ["| the judge | computed | equal models (0.500): formula | sampled | "
             f"B better by {TRUE} ({fair:.3f}): formula | sampled | draw at d | detected from d | "
             "share of sampled studies that detect it |", "| --- " * 9 + "|"]
    rows = [(name, habits, way) for name, habits, ways in ROWS for way in ways]
    for name, habits, way in tqdm(rows, disable=None):
        cells = [name, way]
        for d in (0.0, TRUE):
            mean, sd, _ = studies(d, habits, way)
            cells += [f"{rate(d, habits, way):.3f}", f"{mean:.3f} ± {sd:.3f}"]
        least = seen_from(habits, way)
        cells += [f"{draw_at(habits, way):.2f}", f"{least:.2f}",
                  f"{studies(least, habits, way)[2]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    draw(out / "judge_habits.png")
    print(f"the table is in {out / 'table.md'}, the figure in {out / 'judge_habits.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; run it again to start anew") from None
