"""Can a corrector mend the drafts of a generator that it has never seen?

    python -m lessons.swapped_generators           # about 4 minutes on one core; can be resumed

What to see in the figure: on the left, how many drafts are perfect before and after one correction.
Each corrector mends the drafts that it has never seen as well as its own, and the one that learned
from better drafts is the better one for both. On the right, more corrections make it worse in two
of three seeds, as topics are lost; with the stop rule, or with pairs that leave perfect answers
alone, they do not.

The toy of self_correct.py, smaller: 256 plays, 3 rounds. Welleck et al. 2022
(arXiv:2211.00053v1) train a corrector on the drafts of a small generator, and let it correct those
of a larger one.
Here the two generators are "plain", which is tiny after the warm-up of self_correct.py, and
"filtered": plain writes four drafts for each play, the best one is kept, and plain learns these by
SFT, as in RAFT. Its drafts have more kind words. Both correctors start as plain.

The third corrector tests an explanation. A perfect answer is never the y of a pair (y, y'), since
no y' is better, so no pair shows an answer that is left alone. "filtered, kept" learns from drafts
of filtered with one pair more for each perfect answer in a pool: the answer and itself.

Means ± SD over three seeds, on 256 plays that were not learned from. Table and figure are left in
--out.
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

import self_correct
from model import load_model, save_model
from self_correct import find_pairs

FLAGS = ("--problems 256 --pool 4 --explore 2 --rounds 3 --corrections 0 --max_new_tokens 32 "
         "--device cpu").split()
GENERATORS = ("plain", "filtered")
KEYS = ("perfect", "topics", "stop_rule/perfect", "damaged")


def pairs_that_keep(values):
    """Eq. (3) of self_correct.py and, for each perfect answer j, the pair (j, j)."""
    return find_pairs(values) + [(j, j) for j, v in enumerate(values) if v == 1]


CORRECTORS = {  # the generator whose drafts they learn from, and the pairs
    "plain": ("plain", find_pairs), "filtered": ("filtered", find_pairs),
    "filtered, kept": ("filtered", pairs_that_keep)}


def keeps_topics(topics, text):
    """Whether an answer has one phrase for each topic, in their order, be it kind or not."""
    return [phrase.split()[-1:] for phrase in text.removesuffix(".").split(",")] == [
        [topic] for topic in topics]


def best_of(answers, n):
    """Of each n answers in a row the first one with the highest value."""
    groups = [answers[i:i + n] for i in range(0, len(answers), n)]
    return [max(group, key=lambda answer: answer.value) for group in groups]


def run(out, pairs, *flags):
    """self_correct.py with `pairs` as its Eq. (3), unless this run has ended already."""
    if not (out / "results.json").exists():
        self_correct.find_pairs = pairs
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self_correct.main([*FLAGS, *flags, "--out", str(out)])
        finally:
            self_correct.find_pairs = find_pairs


def filter_drafts(plain, out, args, steps=60):
    """Save the generator that has learned the best of four drafts of `plain` for each play."""
    if (out / "model.safetensors").exists():
        return
    model, tokenizer = load_model(plain)
    problems, _ = self_correct.toy_problems(args.problems)
    tasks = [(problem, None) for problem in problems for _ in range(4)]
    drafts = self_correct.respond(model, tokenizer, tasks, args.seed + 100, args)
    rows = [tokenizer.encode_example(self_correct.prompt_of(problem), best.text, 512)
            for problem, best in zip(problems, best_of(drafts, 4))]
    rng, optimizer = random.Random(args.seed), torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(steps):
        batch = rng.sample(rows, 32)
        mask = self_correct.mask_of(batch, model.device)  # (32, R)
        logps = self_correct.token_logps(model, batch, mask.shape[1])  # (32, R)
        self_correct.sft_loss(logps, mask).backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * self_correct.schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, out)


def correct(corrector, generator, args):
    """The columns of self_correct.py, "draft" and three corrections, for plays that are new.

    A row more is "topics": the share of answers that still have the topics of the play.
    """
    model, tokenizer = load_model(generator)
    _, problems = self_correct.toy_problems(args.problems)
    drafts = self_correct.respond(model, tokenizer, [(x, None) for x in problems], args.seed, args)
    for problem, draft in zip(problems, drafts):
        problem["pool"] = [draft]
    with contextlib.redirect_stdout(io.StringIO()):
        columns, samples = self_correct.evaluate(*load_model(corrector), problems, args)
    for name, column in columns.items():
        column["topics"] = statistics.mean(
            keeps_topics(problem["topics"], row[name]) for problem, row in zip(problems, samples))
    return columns


def measure(folder, seed):
    """{corrector: {generator: columns}} of one seed."""
    path = folder / "columns.json"
    if not path.exists():
        args = self_correct.parse_args([*FLAGS, "--corrections", "3", "--seed", str(seed)])
        plain = folder / "plain"
        run(plain, find_pairs, "--rounds", "0", "--seed", str(seed))
        filter_drafts(plain, folder / "filtered", args)
        columns = {}
        for name, (generator, pairs) in CORRECTORS.items():
            out = folder / f"corrector of {name}"
            run(out, pairs, "--model", str(plain), "--generator", str(folder / generator),
                "--warm_up", "0", "--seed", str(seed))
            columns[name] = {x: correct(out, folder / x, args) for x in GENERATORS}
        path.write_text(json.dumps(columns))
    return json.loads(path.read_text())


def spread(values):
    sd = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{sd}"


def tables(seeds):
    """Two tables in Markdown: the swapped generators, and more corrections of plain's drafts."""
    def numbers(corrector, generator, column, key):
        return [columns[corrector][generator][column][key] for columns in seeds]

    lines = ["| corrector trained on drafts of | plain: value | plain: perfect | filtered: value | "
             "filtered: perfect |", "| --- " * 5 + "|"]
    for name, column in (("none: the drafts", "draft"), ("plain", "1"), ("filtered", "1")):
        cells = [spread(numbers(name if column == "1" else "plain", generator, column, key))
                 for generator in GENERATORS for key in ("value", "perfect")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| corrector trained on | number, on plain's drafts | 1 correction | 2 | 3 |",
              "| --- " * 5 + "|"]
    for name in CORRECTORS:
        for key in KEYS:
            cells = [spread(numbers(name, "plain", t, key)) for t in "123"]
            lines.append(f"| {name} | `{key}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(seeds, path):
    from matplotlib.figure import Figure

    def points(corrector, generator, key, columns):
        return [[seed[corrector][generator][column][key] for seed in seeds] for column in columns]

    def mean_and_sd(lists):
        return ([statistics.mean(x) for x in lists],
                [statistics.stdev(x) if len(x) > 1 else 0.0 for x in lists])

    figure = Figure(figsize=(7, 3.4))
    left, right = figure.subplots(1, 2)
    bars = {"before": ("plain", "draft"), "trained on plain": ("plain", "1"),
            "trained on filtered": ("filtered", "1")}
    for k, (label, (corrector, column)) in enumerate(bars.items()):
        mean, sd = mean_and_sd([points(corrector, generator, "perfect", [column])[0]
                                for generator in GENERATORS])
        left.bar([x + (k - 1) * 0.27 for x in range(2)], mean, 0.27, yerr=sd, capsize=3,
                 color=("tab:gray", "tab:blue", "tab:orange")[k], label=label)
    left.set(title="one correction", ylabel="share of perfect answers", ylim=(0, 1.35))
    left.set_xticks(range(2), [f"drafts of {generator}" for generator in GENERATORS])
    for k, (label, corrector, key, color) in enumerate((
            ("perfect, with the stop rule", "filtered", "stop_rule/perfect", "tab:green"),
            ("perfect, trained on kept answers too", "filtered, kept", "perfect", "tab:red"),
            ("all topics still there", "filtered", "topics", "tab:gray"),
            ("perfect", "filtered", "perfect", "tab:orange"))):
        mean, sd = mean_and_sd(points(corrector, "plain", key, "123"))
        x = [t + 0.04 * (k - 1.5) for t in (1, 2, 3)]  # side by side, so that all bars are seen
        right.errorbar(x, mean, sd, capsize=3, color=color, label=label)
    right.set(title="more corrections, trained on filtered", xlabel="corrections",
              xticks=[1, 2, 3], ylim=(0.68, 1.02), ylabel="share of answers (drafts of plain)")
    right.title.set_fontsize(11)
    left.title.set_fontsize(11)
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="lower left")
    figure.suptitle("Correctors and generators swapped (error bars: SD over seeds)", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/swapped_generators", help="finished runs in it stay")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    seeds = [measure(out / str(seed), seed) for seed in tqdm(args.seeds, disable=None)]
    table = tables(seeds)
    print(table)
    (out / "table.md").write_text(table + "\n")
    draw(seeds, out / "swapped_generators.png")
    print(f"the figure is in {out / 'swapped_generators.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
