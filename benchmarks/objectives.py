"""Every offline objective of dpo.py and simpo.py from one start, on one set of data, three seeds.

    python benchmarks/objectives.py                # about 12 minutes on two cores; can be resumed

The toy of simpo.py: 512 posts, four summaries of each by tiny/, ranked by a human who knows
quality, likes length, and errs. All objectives get the same file: the pairwise ones every strictly
ordered pair, once; rrhf and pro every ranking, three times, so that each sees a response as often;
kto both sides of each pair; sft, as a baseline, the best response of each post, three times. One
learning rate for all, and of each objective the defaults of its script.

What counts is measured here, alike for all: true quality (recall of facts - made-up facts - 0.01 a
word), length and grammar of a sample for each of 256 new posts, and the KL from the start in nats.
The log-prob changes are those of held-out pairs. Means over seeds, and SD over seeds behind +-: a
difference of two rows within it says nothing. The figure is benchmarks/objectives.png.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dpo  # noqa: E402
import sft  # noqa: E402
import simpo  # noqa: E402
from model import load_model  # noqa: E402

METHODS = {
    "sft on the best": (sft, "--epochs 3"),
    "dpo": (dpo, ""), "cdpo": (dpo, "--label_smoothing 0.1"), "ipo": (dpo, "--loss ipo"),
    "ipo_mean": (dpo, "--loss ipo_mean"), "rdpo": (dpo, "--loss rdpo"),
    "kto": (dpo, "--loss kto --batch_size 64"),
    "simpo": (simpo, ""), "simpo, no margin": (simpo, "--gamma_beta_ratio 0"),
    "cpo": (simpo, "--loss cpo"), "orpo": (simpo, "--loss orpo"), "slic": (simpo, "--loss slic"),
    "rrhf": (simpo, "--loss rrhf --epochs 3"), "pro": (simpo, "--loss pro --epochs 3"),
}
COLUMNS = ("quality", "recall", "made_up", "words", "grammatical", "kl", "chosen", "rejected")


def write_data(folder, model, tokenizer, seed):
    """rankings.jsonl and best.jsonl of a seed."""
    rows = simpo.toy_rankings(model, tokenizer, 512, 4, 1.0, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        row.pop("facts")
    best = [{"prompt": row["prompt"], "completion": row["responses"][row["ranks"].index(1)]}
            for row in rows]
    for name, lines in (("rankings", rows), ("best", best)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def measure(model, tokenizer, reference):
    """Truth about samples for 256 posts that no data set holds."""
    rng = random.Random("objectives")
    posts = [simpo.toy_post(rng) for _ in range(256)]
    asked = [tokenizer.encode_prompt(prompt) for prompt, _ in posts]
    answers, _ = simpo.sample(model, tokenizer, asked, 64, 0)
    texts = [tokenizer.decode(ids) for ids in answers]
    parts = [simpo.toy_quality(text, facts) for text, (_, facts) in zip(texts, posts)]
    mean = lambda values: sum(values) / len(posts)
    numbers = {key: mean(part[key] for part in parts) for key in parts[0]}
    own = list(zip(asked, answers))
    plain = torch.autocast("cpu", enabled=False)
    kl = simpo.score(model, own, plain) - simpo.score(reference, own, plain)
    return numbers | {"words": mean(len(text.split()) for text in texts),
                      "grammatical": mean(map(simpo.toy_grammatical, texts)),
                      "kl": float(kl.mean())}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--lr", type=float, default=3e-4, help="of all objectives")
    parser.add_argument("--out", default="runs/objectives", help="finished runs in it stay")
    args = parser.parse_args()
    out = Path(args.out)
    reference, tokenizer = load_model("tiny")
    start = measure(reference, tokenizer, reference) | {"chosen": 0.0, "rejected": 0.0}
    results = {"start": [start]}
    for seed, name in tqdm([(s, name) for s in range(args.seeds) for name in METHODS]):
        folder = out / str(seed)
        if not (folder / "best.jsonl").exists():
            write_data(folder, reference, tokenizer, seed)
        script, flags = METHODS[name]
        run = folder / name.replace(" ", "_").replace(",", "")
        if not (run / "truth.json").exists():
            data = folder / ("best.jsonl" if script is sft else "rankings.jsonl")
            with contextlib.redirect_stdout(io.StringIO()):
                began = time.perf_counter()
                script.main([*flags.split(), "--data", str(data), "--out", str(run), "--held_out",
                             "51", "--lr", str(args.lr), "--seed", str(seed), "--device", "cpu"])
            numbers = measure(load_model(run)[0], tokenizer, reference)
            numbers["seconds"] = time.perf_counter() - began
            sides = json.loads((run / "results.json").read_text())
            for side in ("chosen", "rejected"):
                key = f"logps/{side}"
                numbers[side] = (sides["after"][key] - sides["before"][key]
                                 if key in sides["after"] else None)  # SFT has no pairs
            (run / "truth.json").write_text(json.dumps(numbers))
        results.setdefault(name, []).append(json.loads((run / "truth.json").read_text()))

    lines = ["| objective | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    table = {}
    for name, runs in results.items():
        table[name] = {}
        for key in COLUMNS:
            values = [run[key] for run in runs if run[key] is not None]
            table[name][key] = (statistics.mean(values) if values else None,
                                statistics.stdev(values) if len(values) > 1 else 0.0)
        lines.append(f"| {name} | " + " | ".join(
            "" if mean is None else f"{mean:.2f}" + f" ± {sd:.2f}" * (len(runs) > 1)
            for mean, sd in table[name].values()) + " |")
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    for axis, key in zip(axes, ("kl", "words", "made_up")):
        for i, (name, row) in enumerate(table.items()):
            axis.errorbar(row[key][0], row["quality"][0], row["quality"][1], row[key][1], fmt="o",
                          color=plt.get_cmap("tab20")(i), label=name, ms=5, lw=1)
        axis.set_xlabel({"kl": "KL from the start, nats", "words": "words", "made_up":
                         "made-up facts per fact"}[key])
    axes[0].set_ylabel("true quality")
    axes[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(ROOT / "benchmarks" / "objectives.png", dpi=90)
    print(f"the table is in {out / 'table.md'}, the figure in benchmarks/objectives.png")


if __name__ == "__main__":
    main()
