"""What do SimPO's mean and margin do against a human who likes length?

    python -m lessons.length_bias                  # about 3 minutes on two cores

What to see in the figure: sums at SimPO's beta make the summaries worse than they were before, with
more made-up facts. Sums at a lower beta do as well as SimPO here, where lengths vary little.

The same run four times: SimPO, SimPO without its margin, and summed log-probs instead of means
(which is CPO without its SFT term, or DPO without its reference) at SimPO's beta of 2 and at 0.1.
A sum is the mean times the number of tokens, so at the same beta its gradient soon vanishes on the
pairs that the policy ranks as the human did. The pairs that remain are those where the human erred,
because of length or by chance, and the policy learns these errors. The figure is left in --out.
"""

import argparse
import json
from pathlib import Path

import simpo

RUNS = {
    "simpo": [],
    "no margin": ["--gamma_beta_ratio", "0"],
    "sums": ["--loss", "cpo", "--lam", "0", "--beta", "2"],
    "sums b=.1": ["--loss", "cpo", "--lam", "0", "--beta", "0.1"]}
METRICS = ("quality", "recall", "made_up", "tokens")


def run(folder, flags):
    """Train the four; returns {"before": metrics, "simpo": metrics, ...}."""
    columns = {}
    for name, own in RUNS.items():
        out = Path(folder, name.replace(" ", "_"))
        simpo.main([*own, *flags, "--out", str(out)])
        results = json.loads((out / "results.json").read_text())
        columns |= {"before": results["before"], name: results["after"]}
    return columns


def draw(columns, path):
    """One panel of bars for each metric."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(7, 4.6))
    for axis, key in zip(axes.flatten(), METRICS):
        axis.bar(list(columns), [column[f"samples/{key}"] for column in columns.values()])
        axis.set_title(key, fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle("Sums at SimPO's beta make summaries worse")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse_args(argv=None):
    """The lesson's own flag, and a list of all others, which go to simpo.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     epilog="Other flags are passed on to simpo.py.")
    parser.add_argument("--out", default="runs/length_bias", help="folder for the four runs")
    return parser.parse_known_args(argv)


def main(argv=None):
    args, flags = parse_args(argv)
    columns = run(args.out, flags)
    Path(args.out, "results.json").write_text(json.dumps(columns, indent=2))
    figure = Path(args.out, "length_bias.png")
    draw(columns, figure)
    print("\n" + " " * 25 + "".join(f"{name:>11}" for name in columns))
    for key in columns["simpo"]:
        cells = (f"{column[key]:.3f}" if key in column else "" for column in columns.values())
        print(f"{key:25}" + "".join(f"{cell:>11}" for cell in cells))
    print(f"\nthe figure is in {figure}")


if __name__ == "__main__":
    main()
