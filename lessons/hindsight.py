"""When does it pay to relabel failures in hindsight?

    python -m lessons.hindsight                    # about 37 minutes on one core; can be resumed

What to see in the figure: with one requirement, where chance succeeds half of the time, HIR and
filtered cloning (farl) rise alike. With three, where it succeeds once in thirty, only HIR gets far;
filtered cloning and Chain of Hindsight (coh) have too few successes to learn from. A curve is the
share of each episode's samples that did what they were asked, before the model learned from them;
it ends with the evaluation.

The toy of hir.py. All methods start from one warmed-up model, draw 256 samples in each of 8
episodes and make 40 updates of 32 examples after each. What differs is what they can learn from,
and how often chance does what it is asked: an instruction of one requirement (length) is followed
by half of the first samples, one of two (length, mood) by a fifth, one of three by one in thirty.

The table has means ± SD over five seeds, of samples that nobody trained on. Table and figure are
left in --out.
"""

import argparse
import contextlib
import io
import json
import statistics
from pathlib import Path

from tqdm import tqdm

import hir
from variants import chain_of_hindsight as coh

METHODS = {
    "hir": (hir, ""), "hir, no contrast": (hir, "--alpha 0"), "farl": (hir, "--algo farl"),
    "farl, no smoothing": (hir, "--algo farl --label_smoothing 0"),
    "farl, lr 1e-3": (hir, "--algo farl --lr 1e-3"), "coh": (coh, ""),
    "hir, 2 requirements": (hir, "--requirements 2"),
    "farl, 2 requirements": (hir, "--algo farl --requirements 2"),
    "hir, 1 requirement": (hir, "--requirements 1"),
    "farl, 1 requirement": (hir, "--algo farl --requirements 1"),
}
COLUMNS = ("before", "after", "held_out", "length", "mood", "topic", "reviews", "used")
PANELS = {"three requirements": ("hir", "hir, no contrast", "farl", "farl, lr 1e-3", "coh"),
          "two requirements": ("hir, 2 requirements", "farl, 2 requirements"),
          "one requirement": ("hir, 1 requirement", "farl, 1 requirement")}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", default="runs/hindsight", help="finished runs in it stay")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    table, curves = {}, {}
    runs = [(seed, name) for seed in args.seeds for name in METHODS]
    for seed, name in tqdm(runs, disable=None):
        run = Path(args.out) / str(seed) / name.replace(" ", "_").replace(",", "")
        if not (run / "curves.png").exists():  # it is made last
            script, flags = METHODS[name]
            with contextlib.redirect_stdout(io.StringIO()):
                script.train(script.parse_args([*flags.split(), "--out", str(run), "--seed",
                                                str(seed), "--device", "cpu"]))
        sides = json.loads((run / "results.json").read_text())
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        after = sides["after"]
        row = {"before": sides["before"]["followed/all"], "after": after["followed/all"],
               "reviews": after["samples/reviews"], "used": log[-1]["online/used"]}
        row |= {key: after.get(f"followed/{key}") for key in COLUMNS if key not in row}
        table.setdefault(name, []).append(row)
        episodes = [line["online/followed"] for line in log[::40]]
        curves.setdefault(name, []).append([*episodes, after["followed/all"]])

    lines = ["| method | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, rows in table.items():
        cells = []
        for key in COLUMNS:
            values = [row[key] for row in rows if row[key] is not None]
            sd = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} ± {sd:.2f}" if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    (Path(args.out) / "table.md").write_text("\n".join(lines) + "\n")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(7, 3.2), sharey=True)
    colors = {}  # a method has the same one in all panels
    for axis, (title, names) in zip(axes, PANELS.items()):
        for name in names:
            points = list(zip(*curves[name]))  # one tuple over seeds for each number of samples
            x = [256 * i for i in range(len(points))]
            mean = [statistics.mean(p) for p in points]
            label = name.split(", ")[0] if "req" in name else name
            label = label.replace("farl", "filtered cloning").replace("coh", "Chain of Hindsight")
            color = colors.setdefault(label, f"C{len(colors)}")
            axis.plot(x, mean, color=color, label=label)
            axis.fill_between(x, list(map(min, points)), list(map(max, points)), color=color,
                              alpha=0.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("samples drawn")
    axes[0].set_ylabel("share of instructions followed")
    figure.suptitle("Relabeling pays where success is rare (band: all seeds)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    out = Path(args.out)
    figure.savefig(out / "hindsight.png", dpi=100)
    print(f"the table is in {out / 'table.md'}, the figure in {out / 'hindsight.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
