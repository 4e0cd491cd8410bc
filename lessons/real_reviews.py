"""Do pairs of real reviews teach a pretrained model to write kinder ones, and at what price?

    python -m lessons.real_reviews reviews.jsonl --out runs/reviews     # {"text", "label": 0 or 1}
    python -m lessons.real_reviews --out runs/reviews --models runs/sft runs/dpo --best_of runs/rm

What to see in the figure: how often a judge calls the reviews of each model positive, and how far
each model is from its start.

The DPO paper's IMDb task in small. The first command writes files: two reviews of opposite label
that begin with the same two words become a pair, whose prompt is these words. train.jsonl holds the
pairs of most prompts, test.jsonl those of 60 others, sft.jsonl reviews of neither. The judge is
fitted on reviews that are in none of these files, so it shares no example with any reward model.

The second command lets models continue the prompts of test.jsonl. The first model is the start, to
which KL is measured. --best_of takes the best of n samples of the start by a reward model.
docs/real_models.md shows the commands in between, and how long they take.
"""

import argparse
import collections
import json
import math
import random
import re
from pathlib import Path

import torch

from dpo import group_logps, sample
from model import fail, load_model, mean_by_prompt, read_jsonl
from reward_model import reward_scores, split_batch


def start_of(text):
    """The first two words of a review."""
    return " ".join(text.split()[:2])


def make_pairs(rows, per_prompt=12):
    """{prompt: pairs} of reviews of opposite label that begin with the same two words."""
    groups = collections.defaultdict(lambda: ([], []))
    for row in rows:
        groups[start_of(row["text"])][row["label"]].append(row["text"])
    return {start: [{"prompt": f"Movie review: {start}", "chosen": good[len(start):],
                     "rejected": bad[len(start):]} for bad, good in zip(*both)][:per_prompt]
            for start, both in groups.items() if all(both)}


def words(text):
    """The words of a text and its pairs of neighbours, each once."""
    found = re.findall(r"[a-z']+", text.lower())
    return {*found, *(f"{a}_{b}" for a, b in zip(found, found[1:]))}


def fit_judge(rows):
    """Naive Bayes: for each word the log-odds of a positive review, given that the word is in it.

    rows: {"text", "label"}, as many positive as negative. Counts start at 1. Returns {"weights":
    {word: log-odds}, "bias": 0}.
    """
    counts = [collections.Counter(word for row in rows if row["label"] == label
                                  for word in words(row["text"])) for label in (0, 1)]
    bad, good = counts
    known = sorted(word for word in bad.keys() | good if good[word] + bad[word] > 2)
    return {"weights": {word: math.log((good[word] + 1) / (bad[word] + 1)) for word in known},
            "bias": 0.0}


def positive(text, judge):
    """The judge's probability that a review is positive.

    The sum of the weights is divided by the root of their number, which makes it less sure.
    """
    known = [judge["weights"][word] for word in words(text) if word in judge["weights"]]
    return 1 / (1 + math.exp(-sum(known) / max(1, len(known)) ** 0.5 - judge["bias"]))


def make_files(path, folder):
    """Write train.jsonl, test.jsonl, sft.jsonl and judge.json; see the top of this file."""
    rows = read_jsonl(path)
    for row in rows:
        label = row.get("label")
        if not isinstance(row.get("text"), str) or type(label) is not int or label not in (0, 1):
            fail(f'{row["where"]}: give {{"text", "label"}}, where label is 1 or 0')
        row["text"] = re.sub(r"\s+([,.;:!?)]|n't)", r"\1", " ".join(row["text"].split()))
    rows = [row for row in rows if 7 <= len(row["text"].split()) <= 35]
    random.Random(0).shuffle(rows)
    pairs = make_pairs(rows)
    used = {pair["prompt"][14:] + pair[side] for own in pairs.values() for pair in own
            for side in ("chosen", "rejected")}
    rest = [row for row in rows if row["text"] not in used]
    if len(pairs) < 120 or len(rest) < 2000:
        fail(f"{path}: of its {len(rows)} reviews of 7 to 35 words {len(pairs)} beginnings have "
             f"both labels, and {len(rest)} are in no pair; at least 120 and 2,000 are needed")
    share = sum(row["label"] for row in rest) / len(rest)
    if abs(share - 0.5) > 0.1:
        fail(f"{path}: of the reviews that are in no pair {share:.0%} are positive; the judge "
             "needs about as many of both")
    judge, unseen = fit_judge(rest[1000:]), rest[600:1000]
    right = [(positive(row["text"], judge) > 0.5) == row["label"] for row in unseen]
    print(f"the judge is right on {sum(right) / len(right):.3f} of {len(right)} unseen reviews")
    groups = list(pairs.values())
    files = {"train": sum(groups[60:], []), "test": sum(groups[:60], []), "sft": [
        {"prompt": f"Movie review: {start_of(row['text'])}",
         "completion": row["text"][len(start_of(row["text"])):]} for row in rest[:600]]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        print(f"{len(lines)} rows in {folder / name}.jsonl")
    (folder / "judge.json").write_text(json.dumps(judge))


@torch.no_grad()
def best_of(reward, prompts, texts, n, max_tokens=4096):
    """Of each n texts of a prompt the one with the highest score, as places in the list."""
    model, tokenizer = reward
    examples = [tokenizer.encode_example(*pair, 10**9) for pair in zip(prompts, texts)]
    scores = torch.zeros(len(texts))
    for part in split_batch([[example] for example in examples], max_tokens):
        scores[part] = reward_scores(model, [examples[i] for i in part])
    best = scores.view(-1, n).argmax(1)  # (P, n) -> (P,)
    return (torch.arange(0, len(texts), n) + best).tolist()


def judge_models(args):
    """{model: its metrics with standard errors}, and a sample of each for some prompts."""
    rows = read_jsonl(args.out / "test.jsonl")
    judge = json.loads((args.out / "judge.json").read_text())
    prompts = [x for x in dict.fromkeys(row["prompt"] for row in rows) for _ in range(args.n)]
    reference, columns, samples = None, {}, collections.defaultdict(dict)
    labels = [Path(name).name for name in args.models]
    if len(set(labels)) < len(labels):
        labels = args.models
    for label, name in zip(labels, args.models):
        model, tokenizer = load_model(name)
        reference = reference or model
        asked = [tokenizer.encode_prompt(prompt) for prompt in prompts]
        outputs = sample(model, tokenizer, asked, args.max_new_tokens, args.seed)
        texts = [tokenizer.decode(ids) for ids in outputs]
        groups = [[example] for example in zip(asked, outputs)]
        log_ratios = (group_logps(model, groups, 4096)
                      - group_logps(reference, groups, 4096))[:, 0]  # (P*n, 1) -> (P*n,)
        shown = {label: (range(len(texts)), log_ratios)}
        if not columns and args.best_of:
            chosen = best_of(load_model(args.best_of, "reward"), prompts, texts, args.n)
            # The KL of best-of-n is at most log n - (n - 1)/n: Beirami et al., arXiv:2401.01879.
            bound = math.log(args.n) - (args.n - 1) / args.n
            shown[f"best of {args.n}"] = chosen, torch.full((len(chosen),), bound)
        for key, (places, kl) in shown.items():
            own = [float(positive(prompts[i][14:] + texts[i], judge) > 0.5) for i in places]
            ended = [float(outputs[i][-1] in tokenizer.stop_ids) for i in places]
            columns[key] = mean_by_prompt(
                {"judged_positive": torch.tensor(own), "kl": kl, "ended": torch.tensor(ended),
                 "tokens": torch.tensor([float(len(outputs[i])) for i in places])},
                [prompts[i] for i in places])
            for i in places:
                samples[prompts[i]].setdefault(key, texts[i])
            print(key, {x: round(value, 3) for x, value in columns[key].items()}, flush=True)
    return columns, samples


def draw(columns, path):
    """Judged positive over KL, with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for name, column in columns.items():
        axis.errorbar(column["kl"], column["judged_positive"], column.get("judged_positive_se"),
                      column.get("kl_se"), fmt="o", capsize=3)
        axis.annotate(name, (column["kl"], column["judged_positive"]), (6, 6),
                      textcoords="offset points")
    axis.set(xlabel="KL from the start, nats per review", ylabel="share judged positive",
             title="Real reviews: more positive, at a price in KL")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("reviews", nargs="?", help='JSON Lines file of {"text", "label"}, to make the files of')
    flag("--out", type=Path, default=Path("runs/reviews"), help="folder of the files")
    flag("--models", nargs="+", help="folders of models to judge; the first is the start")
    flag("--best_of", help="reward model, for the best of --n samples of the start")
    flag("--n", type=int, default=4, help="samples for each of 60 prompts")
    flag("--max_new_tokens", type=int, default=64, help="tokens of the longest sample")
    flag("--seed", type=int, default=0, help="of the samples")
    args = parser.parse_args(argv)
    if bool(args.reviews) == bool(args.models):
        parser.error("give a file of reviews, or --models")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.reviews:
        return make_files(args.reviews, args.out)
    columns, samples = judge_models(args)
    (args.out / "judged.json").write_text(json.dumps(columns, indent=2))
    for prompt in list(samples)[:4]:
        print(f"\n{prompt}", *(f"{name:>14}: {' '.join(text.split())}"
                               for name, text in samples[prompt].items()), sep="\n")
    draw(columns, args.out / "real_reviews.png")
    print(f"\nthe figure is in {args.out / 'real_reviews.png'}")


if __name__ == "__main__":
    main()
