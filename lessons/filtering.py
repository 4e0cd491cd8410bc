"""Do all demonstrations teach more than the best tenth of them?

    python -m lessons.filtering                    # three minutes on one core; can be resumed

What to see in the figure: the best tenth gives far more true reward than all demonstrations at each
size, and from 1,280 on even with a tenth of the updates. A random tenth gives about as much as all
of them at equal updates, so here it is the choice that helps, and the amount adds nothing. But the
best tenth is not more grammatical: the judge has never seen a scrambled review, and likes them.

AlpaGasus (Chen et al. 2023, arXiv:2307.08701) lets a judge score 52,000 instructions with their
answers, keeps the 9,000 best, and gets a better model than from all of them. Here the toy of
reviews has demonstrations by three people: one is kind, one balanced and one unkind, and of each
fifth review the words are scrambled. The judge is reward_model.py after 1,536 rankings of tiny's
own samples, among which nothing is scrambled.

sft.py learns from all, from the tenth with the highest scores, or from a random tenth; at equal
updates, so that a tenth is seen ten times, or at equal passes, that is once.
Measured are 256 samples for 16 prompts that are in no file. Means ± SD are over three seeds, and
all seeds share the judge. Table and figure are left in --out.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

import reward_model
import sft
from model import load_model, split_by_prompt

SIZES = (320, 1280, 5120)
PEOPLE = ((6, 3, 1), (1, 1, 1), (1, 3, 6))  # weights of positive, neutral and negative adjectives
RUNS = {"all": ("all", "updates"),  # name: (the file, what is as in the run on all of them)
        "best tenth, equal updates": ("best", "updates"),
        "random tenth, equal updates": ("random", "updates"),
        "best tenth, equal passes": ("best", "passes"),
        "random tenth, equal passes": ("random", "passes")}


def quietly(function, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


def scrambled(review, rng):
    """The review with its words in another order. Its true reward is the same."""
    words = review.split()
    return " " + " ".join(rng.sample(words, len(words)))


def demonstrations(prompts, count, seed):
    """Rows {"prompt", "completion"} of mixed quality."""
    rng = random.Random(f"{seed} demonstrations")
    rows = []
    for _ in range(count):
        review = sft.toy_review(rng, rng.choice(PEOPLE))
        review = scrambled(review, rng) if rng.random() < 0.2 else review
        rows.append({"prompt": rng.choice(prompts), "completion": review})
    return rows


def best_tenth(rows, scores):
    """The tenth with the highest scores. scores: (N,), one for each row."""
    order = scores.argsort(descending=True, stable=True)[:len(rows) // 10]
    return [rows[i] for i in order.tolist()]


@torch.no_grad()
def judge(folder, rows):
    """The reward model's score of each row: (N,)."""
    model, tokenizer = load_model(str(folder), "reward")
    examples = [tokenizer.encode_example(row["prompt"], row["completion"], 512) for row in rows]
    return torch.cat([reward_model.reward_scores(model, examples[i:i + 256])
                      for i in range(0, len(examples), 256)])


def liking_of_scrambled(folder, prompts):
    """How much higher 500 reviews score when they are scrambled: mean and standard error."""
    rng = random.Random(0)
    rows = [{"prompt": rng.choice(prompts), "completion": sft.toy_review(rng, rng.choice(PEOPLE))}
            for _ in range(500)]
    others = [row | {"completion": scrambled(row["completion"], rng)} for row in rows]
    gain = judge(folder, others) - judge(folder, rows)  # (500,)
    return float(gain.mean()), float(gain.std() / len(rows)**0.5)


def quality(texts):
    """(mean true reward, share of grammatical ones) of reviews."""
    return [statistics.mean(map(sft.toy_reward, texts)),
            statistics.mean(map(sft.toy_grammatical, texts))]


def measure(folder, prompts, seed):
    """The quality of 16 samples for each prompt."""
    model, tokenizer = load_model(str(folder))
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(16)]
    return quality([tokenizer.decode(ids) for ids in sft.sample(model, tokenizer, asked, 64, seed)])


def learn(name, folder, files, updates, held_out, seed):
    """One run of sft.py, unless it has ended; its updates, and the quality of its samples."""
    path = folder / "quality.json"
    if not path.exists():
        file, equal = RUNS[name]
        flags = ["--data", str(files / f"{file}.jsonl"), "--out", str(folder), "--batch_size", "16",
                 "--lr", "1e-3", "--seed", str(seed), "--device", "cpu", "--max_new_tokens", "64"]
        steps = ["--steps", str(updates)] if updates and equal == "updates" else []
        quietly(sft.train, sft.parse_args(flags + steps))
        count = len((folder / "metrics.jsonl").read_text().splitlines())
        path.write_text(json.dumps([count, *measure(folder, held_out, seed)]))
    return json.loads(path.read_text())


def one_seed(out, sizes, seed):
    """{(size, name): [updates, true reward, grammatical, and the last two of the data]}."""
    prompts, _, held_out = quietly(split_by_prompt, [{"prompt": p} for p in sft.toy_prompts()])
    pool = demonstrations([row["prompt"] for row in prompts], max(sizes), seed)
    scores, found = judge(out / "judge", pool), {}
    for size in sizes:
        folder, rows = out / str(seed) / str(size), pool[:size]
        folder.mkdir(parents=True, exist_ok=True)
        files = {"all": rows, "best": best_tenth(rows, scores[:size]),
                 "random": random.Random(seed).sample(rows, size // 10)}
        for file, own in files.items():
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        updates = 0  # as many as one pass over all of them takes
        for name, (file, _) in RUNS.items():
            run = learn(name, folder / name.replace(" ", "_").replace(",", ""), folder, updates,
                        held_out, seed)
            updates = updates or run[0]
            found[size, name] = run + quality([row["completion"] for row in files[file]])
    return found


def spread(values):
    """Mean and SD over seeds."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table_of(found):
    """found: a list, over seeds, of what one_seed returns."""
    lines = ["| demonstrations | learned from | updates | true reward | grammatical | "
             "true reward of these data | grammatical of these |", "| --- " * 7 + "|"]
    for size, name in found[0]:
        updates, *numbers = zip(*(seed[size, name] for seed in found))
        low, high = min(updates), max(updates)  # held-out prompts have more rows in some seeds
        cells = [f"{mean:.2f} ± {sd:.2f}" for mean, sd in map(spread, numbers)]
        lines.append(f"| {size:,} | {name} | {low}{f' to {high}' * (low < high)} | "
                     f"{' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found, start, path):
    """start: the quality of tiny's own samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 3.8))
    sizes = sorted({size for size, _ in found[0]})
    for i, (axis, label) in enumerate(zip(axes, ("true reward", "share grammatical"))):
        for name, (file, equal) in RUNS.items():
            points = [spread([seed[size, name][1 + i] for seed in found]) for size in sizes]
            mean, sd = zip(*points)
            color = {"all": "C7", "best": "C0", "random": "C1"}[file]
            axis.errorbar(sizes, mean, sd, color=color, capsize=3, label=name, marker="o", ms=4,
                          ls="-" if equal == "updates" else "--")
        axis.axhline(start[i], color="k", ls=":", lw=1, label="tiny, before")
        axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.set(xlabel="demonstrations before the choice", title=label)
    axes[1].set_ylim(0, 1.05)
    figure.suptitle("The best tenth gives the most reward (mean ± SD over seeds)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=2, fontsize=8,
                  handlelength=3)
    figure.tight_layout(rect=(0, 0.19, 1, 1))
    figure.savefig(path, dpi=100)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="demonstrations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rankings", type=int, default=1536, help="that the judge learns from")
    parser.add_argument("--out", default="runs/filtering",
                        help="finished runs in it stay, whatever their flags")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    if not (out / "judge" / "results.json").exists():
        quietly(reward_model.train, reward_model.parse_args(
            ["--rankings", str(args.rankings), "--out", str(out / "judge"), "--device", "cpu"]))
    found = [one_seed(out, args.sizes, seed) for seed in tqdm(args.seeds, disable=None)]
    held_out = quietly(split_by_prompt, [{"prompt": p} for p in sft.toy_prompts()])[2]
    gain, error = liking_of_scrambled(out / "judge", held_out)
    table = table_of(found) + (
        f"\n\nThe judge's score of a review rises by {gain:.2f} ± {error:.2f} when its words are "
        "scrambled (mean and standard error of 500 reviews).")
    print(table)
    (out / "table.md").write_text(table + "\n")
    draw(found, measure("tiny", held_out, 0), out / "filtering.png")
    print(f"the table is in {out / 'table.md'}, the figure in {out / 'filtering.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
