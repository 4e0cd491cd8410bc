"""What does a policy learn from a human who likes copying?

    python -m lessons.lazy_annotators              # about 3 minutes on one core; can be resumed

What to see in the figure: the more the human likes copying, the more samples are whole sentences of
the post, and the lower is their true quality. Yet the human with a weight of 8 is about as content
as the one with 0, and the accuracy on new pairs does not fall, since they have the same bias. Only
true quality, or another human, shows that something went wrong.

The summarisers of Ziegler et al. 2019 (arXiv:1909.08593v2) became copiers. The authors suspect that
their labelers relied on simple heuristics: a copied sentence is true, and that is easy to check.
Here the human likes 4 * quality + weight * copied, with noise. `quality` is the true quality of
simpo.py's toy, and `copied` is the longest run of words that the summary took from the post, over
all its words.

tiny/ cannot copy: each of its samples is one sentence of its own. So it is first fine-tuned on
8,192 demonstrations. Half of them are the first sentence of the post, and half are summaries by the
careless reader from whom tiny/ learned. This start then samples two summaries of each of 2,048
posts, a human compares them, and `python simpo.py` learns from these pairs. The posts, samples and
random numbers are the same for each weight. At weight 0 the human knows the truth, with noise.

All numbers are measured alike, on 512 new posts: one sample for each, and a pair of the start's
samples, which the human compares too. A win rate is the probability that a human prefers the
policy's sample to the start's. The careful human does not care for copying.
Means ± SD over three seeds; the start is one for all. Table and figure are left in --out.
"""

import argparse
import contextlib
import difflib
import io
import json
import math
import random
import re
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

import sft
import simpo
from model import load_model
from tiny.make import misread, toy_summary

WEIGHTS = (0, 4, 8)
COLUMNS = {"copies": "whole copies", "quality": "true quality", "own": "win rate, this human",
           "careful": "win rate, careful human", "accuracy": "accuracy on this human's pairs",
           "ceiling": "its ceiling", "truth": "accuracy on true quality"}


def copied(summary, post):
    """The longest run of a summary's words that stands in the post too, over all its words."""
    words, source = (re.findall(r"\w+", text.lower()) for text in (summary, post))
    run = difflib.SequenceMatcher(None, words, source, autojunk=False).find_longest_match()
    return run.size / max(1, len(words))


def liking(summary, row, weight):
    """How much a human likes a summary of the post of a row, without noise."""
    quality = simpo.toy_quality(summary, row["facts"])["quality"]
    return 4 * quality + weight * copied(summary, row["prompt"])


def prefers(first, second, row, weight):
    """The probability that a human prefers the first of two summaries: Bradley-Terry."""
    return 1 / (1 + math.exp(liking(second, row, weight) - liking(first, row, weight)))


def judge(rows, weight, seed):
    """Rows with two different summaries, with the human's choice as "chosen" and "rejected"."""
    rng = random.Random(seed)
    judged = []
    for row in rows:
        number = rng.random()  # drawn for each row, so that it does not depend on the weight
        if len(row["responses"]) == 2 and "" not in row["responses"]:
            first, second = sorted(row["responses"])
            if number > prefers(first, second, row, weight):
                first, second = second, first
            judged.append(row | {"chosen": first, "rejected": second})
    return judged


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def quietly(script, *flags):
    with contextlib.redirect_stdout(io.StringIO()):
        return script.main([*flags, "--device", "cpu"])


def make_start(folder, count):
    """tiny/ after SFT on first sentences of posts and on careless summaries."""
    if not (folder / "results.json").exists():
        rng = random.Random("demonstrations")
        rows = []
        for _ in range(count):
            prompt, facts = simpo.toy_post(rng)
            text = toy_summary(misread(rng, facts))
            if rng.random() < 0.5:
                text = f" {prompt.partition('.')[0]}."
            rows.append({"prompt": prompt, "completion": text})
        write_rows(folder / "demonstrations.jsonl", rows)
        quietly(sft, "--data", f"{folder}/demonstrations.jsonl", "--out", str(folder),
                "--lr", "3e-3")
    return load_model(folder)


def sample(model, tokenizer, rows):
    """One summary of the post of each row."""
    asked = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
    return [tokenizer.decode(ids) for ids in simpo.sample(model, tokenizer, asked, 64, seed=0)]


def measure(model, tokenizer, rows, before, weight):
    """The numbers of a policy for new posts. before: the start's summaries of these posts."""
    texts = sample(model, tokenizer, rows)
    pairs = judge(rows, weight, seed="new")
    encoded = [[tokenizer.encode_example(row["prompt"], row[side], 512)
                for side in ("chosen", "rejected")] for row in pairs]
    lengths = torch.tensor([[len(response) for _, response in pair] for pair in encoded])  # (N, 2)
    margins = simpo.group_logps(model, encoded, 4096) / lengths  # (N, 2), mean log-probs
    margins = (margins[:, 0] - margins[:, 1]).tolist()  # (N,)
    better = [liking(row["chosen"], row, 0) - liking(row["rejected"], row, 0) for row in pairs]
    odds = [prefers(row["chosen"], row["rejected"], row, weight) for row in pairs]
    lists = {
        "copies": [text.strip() in row["prompt"] and text != "" for text, row in zip(texts, rows)],
        "quality": [simpo.toy_quality(text, row["facts"])["quality"]
                    for text, row in zip(texts, rows)],
        "own": [prefers(*both, row, weight) for *both, row in zip(texts, before, rows)],
        "careful": [prefers(*both, row, 0) for *both, row in zip(texts, before, rows)],
        "accuracy": [margin > 0 for margin in margins],
        "ceiling": [max(p, 1 - p) for p in odds],
        "truth": [margin * gap > 0 for margin, gap in zip(margins, better) if gap]}
    return {name: statistics.mean(map(float, values)) for name, values in lists.items()}


def draw(table, path):
    """Bars over the weights: what the policy writes, who likes it, and what the accuracy says."""
    from matplotlib.figure import Figure

    panels = {"samples": {"copies": "whole copies", "quality": "true quality"},
              "win rate over the start": {"own": "this human", "careful": "careful human"},
              "accuracy on new pairs": {"accuracy": "of this human", "truth": "true quality"}}
    figure = Figure(figsize=(7, 3.2))
    for number, (title, keys) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(1, len(panels), number)
        for shift, (key, label) in zip((-0.2, 0.2), keys.items()):
            runs = [[run[key] for run in table[weight]] for weight in WEIGHTS]
            axis.bar([i + shift for i in range(len(runs))], list(map(statistics.mean, runs)), 0.4,
                     yerr=[statistics.stdev(x) if len(x) > 1 else 0 for x in runs], label=label)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="weight of copying", ylim=(0, 1.4), yticks=(0, 0.25, 0.5, 0.75, 1))
        axis.set_xticks(range(len(WEIGHTS)), WEIGHTS)
        axis.legend(fontsize=8, loc="upper center")
    figure.suptitle("A human who likes copying teaches copying (error bars: SD over seeds)",
                    fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--posts", type=int, default=2048, help="pairs to learn from")
    parser.add_argument("--demonstrations", type=int, default=8192, help="that make the start")
    parser.add_argument("--out", default="runs/lazy_annotators",
                        help="finished runs in it stay, whatever their flags")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out, table = Path(args.out), {weight: [] for weight in WEIGHTS}
    start, tokenizer = make_start(out / "start", args.demonstrations)
    new = simpo.toy_summaries(start, tokenizer, 512, 0.0, seed=1000)
    before = sample(start, tokenizer, new)
    starts = {weight: measure(start, tokenizer, new, before, weight) for weight in WEIGHTS}
    for seed in tqdm(args.seeds, disable=None):
        rows = None
        for weight in WEIGHTS:
            run = out / str(weight) / str(seed)
            if not (run / "results.json").exists():
                rows = rows or simpo.toy_summaries(start, tokenizer, args.posts, 0.0, seed)
                write_rows(run / "pairs.jsonl", judge(rows, weight, seed))
                quietly(simpo, "--data", f"{run}/pairs.jsonl", "--model", f"{out}/start",
                        "--out", str(run), "--seed", str(seed))
            policy, _ = load_model(run)
            table[weight].append(measure(policy, tokenizer, new, before, weight))

    lines = [f"| weight | {' | '.join(COLUMNS.values())} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for weight, runs in table.items():
        cells = []
        for key in COLUMNS:
            values = [run[key] for run in runs]
            cells.append(f"{starts[weight][key]:.2f} → {statistics.mean(values):.2f}")
            if len(values) > 1:
                cells[-1] += f" ± {statistics.stdev(values):.2f}"
        lines.append(f"| {weight} | {' | '.join(cells)} |")
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    draw(table, out / "lazy_annotators.png")
    print(f"the table is in {out / 'table.md'}, the figure in {out / 'lazy_annotators.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
