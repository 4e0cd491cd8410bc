"""What do SimPO's mean and margin do against a human who likes length?

    python -m lessons.length_bias                  # about 3 minutes on one core; can be resumed

What to see in the figure: sums at SimPO's beta make the summaries worse than they were before, with
more made-up facts. Sums at a lower beta do as well as SimPO here, where lengths vary little.

The same run four times: SimPO, SimPO without its margin, and summed log-probs instead of means
(which is CPO without its SFT term, or DPO without its reference) at SimPO's beta of 2 and at 0.1.
A sum is the mean times the number of tokens, so at the same beta its gradient soon vanishes on the
pairs that the policy ranks as the human did. The pairs that remain are those where the human erred,
and the policy learns these errors. Means ± SD over three seeds.
Table and figure are left in --out.
"""

import argparse
import contextlib
import io
import json
import statistics
from pathlib import Path

from tqdm import tqdm

import simpo

RUNS = {  # name in the figure: (name in the table, flags)
    "simpo": ("`python simpo.py`", ""),
    "no margin": ("`--gamma_beta_ratio 0`", "--gamma_beta_ratio 0"),
    "sums": ("`--loss cpo --lam 0 --beta 2`", "--loss cpo --lam 0 --beta 2"),
    "sums b=.1": ("`--loss cpo --lam 0`", "--loss cpo --lam 0 --beta 0.1")}
METRICS = ("samples/quality", "samples/recall", "samples/made_up", "samples/tokens",
           "samples/grammatical", "kl/policy_reference")


def run(folder, seed, flags):
    """Train the four, unless they have ended; returns {"before": metrics, "simpo": ..., ...}."""
    columns = {}
    for name, (_, own) in RUNS.items():
        out = Path(folder, str(seed), name.replace(" ", "_"))
        if not (out / "results.json").exists():
            with contextlib.redirect_stdout(io.StringIO()):
                simpo.main([*own.split(), *flags, "--out", str(out), "--seed", str(seed)])
        results = json.loads((out / "results.json").read_text())
        columns |= {"before": results["before"], name: results["after"]}
    return columns


def means(seeds):
    """{name: {metric: (mean, SD)}} of what `run` returned for each seed; 0 is the SD of one."""
    table = {}
    for name, column in seeds[0].items():
        lists = {key: [columns[name][key] for columns in seeds] for key in METRICS if key in column}
        table[name] = {key: (statistics.mean(x), statistics.stdev(x) if len(x) > 1 else 0.0)
                       for key, x in lists.items()}
    return table


def draw(table, path):
    """One panel for each of the first four metrics: means as bars, and SDs as error bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6))
    for number, key in enumerate(METRICS[:4], 1):
        axis = figure.add_subplot(2, 2, number)
        heights, errors = zip(*[column[key] for column in table.values()])
        axis.bar(list(table), heights, yerr=errors, capsize=3)
        axis.set_title(key.removeprefix("samples/"), fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle("Sums at SimPO's beta make summaries worse (error bars: SD over seeds)",
                    fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse_args(argv=None):
    """The lesson's own flags, and a list of all others, which go to simpo.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     epilog="Other flags are passed on to simpo.py.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/length_bias",
                        help="finished runs in it stay, whatever their flags")
    return parser.parse_known_args(argv)


def main(argv=None):
    args, flags = parse_args(argv)
    table = means([run(args.out, seed, flags) for seed in tqdm(args.seeds, disable=None)])
    lines = [f"|  | {' | '.join(f'`{key}`' for key in METRICS)} |",
             "| --- " * (len(METRICS) + 1) + "|"]
    for name, column in table.items():
        cells = [f"{column[key][0]:.2f}" + f" ± {column[key][1]:.2f}" * (len(args.seeds) > 1)
                 if key in column else "" for key in METRICS]
        label = RUNS[name][0] if name in RUNS else name
        lines.append(f"| {label} | {' | '.join(cells)} |")
    print("\n".join(lines))
    out = Path(args.out)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    draw(table, out / "length_bias.png")
    print(f"the table is in {out / 'table.md'}, the figure in {out / 'length_bias.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
