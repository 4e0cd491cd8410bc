"""Can a model that knows a few instructions write new ones, answer them, and learn from that?

    python -m lessons.self_instruct                # about five minutes on one core
    python -m lessons.self_instruct --model FOLDER --lr 2e-4 --steps 40 --batch 16 --seeds 0

What to see in the figure: above, the writer finds new instructions, but few of the 1,024 that it
writes; most are copies, or nonsense. Below, learning from its own answers to them does not help,
since they obey too rarely. If people answer the same new instructions, the held-out ones are
followed more often, and about as often as after twice the updates without any new instruction.

Self-Instruct (Wang et al. 2022, arXiv:2212.10560v2) lets a language model write new instructions,
leaves out near-duplicates and what cannot be used, lets the same model answer the rest, and trains
it on this pool. Here the instructions are those of hir.py's toy, such as "Write a short, kind
review of the plot:". People give 16 of the 40 that hir.py does not hold out, with 64 obedient
reviews each. The writer is tiny after SFT on both: to answer them, and to write one. What it writes
enters the pool if its ROUGE-L with all that is in there is at most 0.9, if it is an instruction of
the toy, and if it is none of the eight that are held out for the test. Then the writer answers each
one 64 times, and what is no review is left out. Whether an answer obeys is not looked at: without a
verifier nobody knows. (The paper's model also sees examples from the pool; this one does not.)

Each row of the table is the model after SFT with as many updates, but for the first two, which have
twice as many. Of the writer's updates half go to writing. The columns are shares of 256 answers to
held-out instructions: all requirements are met, the length is, the mood, the topic, and it is a
review. Means ± SD are over three seeds. Table and figure are left in --out.
"""

import argparse
import random
import re
import statistics
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import hir
import sft
from model import fail, load_model

ASKED, HELD_OUT = (hir.toy_instructions(3, held_out) for held_out in (False, True))
IN_WORDS = {hir.in_words(instruction): instruction for instruction in ASKED + HELD_OUT}
MOST_ALIKE = 0.9  # the paper's 0.7 would leave out any two that share the words of the template
ANSWERS = 64  # to each instruction
NEXT = "One more instruction:"
KEPT, REASONS = "new instructions", ("near-duplicates", "invalid", "held out")


def rouge_l(a, b):
    """ROUGE-L of two texts (Lin 2004): F1 of the longest common subsequence of their words."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (a, b))
    longest = [0] * (len(b) + 1)  # of the words of a so far and the first j words of b
    for word in a:
        before = longest
        longest = [0]
        for j, other in enumerate(b):
            longest.append(before[j] + 1 if word == other else max(before[j + 1], longest[j]))
    return 2 * longest[-1] / max(len(a) + len(b), 1)


def why_left_out(text, pool):
    """Why an instruction does not enter the pool of texts; None if it does."""
    if any(rouge_l(text, other) > MOST_ALIKE for other in pool):
        return REASONS[0]
    if text not in IN_WORDS:
        return REASONS[1]
    return REASONS[2] if IN_WORDS[text] in HELD_OUT else None


def seed_instructions(count, rng):
    """So many of the 40 instructions that are not held out, among which each value appears."""
    while True:
        chosen = rng.sample(ASKED, count)
        if all(len({x[key] for x in chosen}) == len(hir.CHOICES[key]) for key in chosen[0]):
            return [hir.in_words(x) for x in chosen]


def by_people(text, count, rng):
    """So many reviews that obey an instruction, as rows (prompt, response)."""
    rows = []
    while len(rows) < count:
        review = hir.toy_review(rng)
        if hir.toy_done(review) == IN_WORDS[text]:
            rows.append((text, review))
    return rows


def learn(args, rows, steps, seed):
    """The model after so many updates on rows (prompt, response) with the loss of sft.py."""
    model, tokenizer = load_model(args.model)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    examples = [tokenizer.encode_example(*row, 512) for row in rows]
    for step in tqdm(range(steps), "SFT", leave=False, disable=None):
        batch = rng.sample(examples, min(args.batch, len(examples)))
        mask = sft.mask_of(batch, "cpu")  # (B, R)
        sft.sft_loss(sft.token_logps(model, batch, mask.shape[1]), mask).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * sft.schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def write(model, tokenizer, prompts, seed, temperature=0.6):
    """A text for each prompt; "" for one that does not end. hir.py samples at 0.6, too."""
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    responses = sft.sample(model, tokenizer, asked, 64, seed, temperature)
    return [tokenizer.decode(ids) if ids[-1] in tokenizer.stop_ids else "" for ids in responses]


def new_instructions(writer, seeds, count, temperature, seed):
    """What of `count` instructions enters the pool, and {kept or why not: how many}."""
    pool, counts = list(seeds), dict.fromkeys((KEPT, *REASONS), 0)
    for text in write(*writer, [NEXT] * count, seed, temperature):
        reason = why_left_out(text, pool)
        counts[reason or KEPT] += 1
        if reason is None:
            pool.append(text)
    return pool[len(seeds):], counts


def followed(model, instructions, seed):
    """{requirement: the share of 32 answers to each instruction that meets it}."""
    prompts = [text for text in instructions for _ in range(32)]
    done = [hir.toy_done(answer) for answer in write(*model, prompts, seed)]
    wanted = [IN_WORDS[text] for text in prompts]
    shares = {"all": statistics.mean(x == y for x, y in zip(done, wanted))}
    for key in wanted[0]:
        shares[key] = statistics.mean(x.get(key) == y[key] for x, y in zip(done, wanted))
    return shares | {"reviews": statistics.mean(map(bool, done))}


def one_seed(args, seed):
    """({row of the table: shares}, the story of the pool in numbers)."""
    rng = random.Random(f"{seed} people")
    seeds = seed_instructions(args.instructions, rng)
    given = [row for text in seeds for row in by_people(text, ANSWERS, rng)]
    # The writer learns to answer and, as often, to write an instruction.
    lists = [(NEXT, text) for text in seeds for _ in range(ANSWERS)]
    writer = learn(args, given + lists, 2 * args.steps, seed)
    new, counts = new_instructions(writer, seeds, args.written, args.temperature, seed)
    if not new:
        fail("the writer wrote no new instruction; take more --steps or a higher --temperature")
    prompts = [text for text in new for _ in range(ANSWERS)]
    pool = [row for row in zip(prompts, write(*writer, prompts, seed)) if hir.toy_done(row[1])]
    right = [row for row in pool if hir.toy_done(row[1]) == IN_WORDS[row[0]]]
    story = counts | {"answers": len(prompts), "of them reviews": len(pool),
                      "of them obedient": len(right)}
    sets = {f"the {args.instructions} alone": [], "+ new ones and own answers": pool,
            "+ of these the obedient ones": right,
            "+ new ones, answered by people":
                [row for text in new for row in by_people(text, ANSWERS, rng)]}
    longer = f"the {args.instructions} alone, twice the updates"
    models = {"the writer": writer, longer: learn(args, given, 2 * args.steps, seed)}
    models |= {name: learn(args, given + rows, args.steps, seed) for name, rows in sets.items()}
    held_out = [hir.in_words(x) for x in HELD_OUT]
    found = {name: followed(model, held_out, seed) for name, model in models.items()}
    return found, story


def spread(values):
    """Mean and SD over seeds."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table_of(found):
    """found: a list, over seeds, of what one_seed returns first."""
    keys = list(next(iter(found[0].values())))
    lines = [f"| SFT on | followed: {' | '.join(keys)} |", "| --- " * (len(keys) + 1) + "|"]
    for name in found[0]:
        cells = ["{:.2f} ± {:.2f}".format(*spread([seed[name][key] for seed in found]))
                 for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found, stories, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = (KEPT, *REASONS)
    bars = {"of the instructions that were written": {
                kind: [story[kind] / sum(story[other] for other in kinds) for story in stories]
                for kind in kinds},
            "of the held-out instructions that are followed": {
                name: [seed[name]["all"] for seed in found] for name in found[0]}}
    figure, axes = plt.subplots(2, 1, figsize=(7, 4.2))
    for axis, (title, values) in zip(axes, bars.items()):
        mean, sd = zip(*map(spread, values.values()))
        axis.barh(list(values), mean, xerr=sd, capsize=3, height=0.6)
        axis.invert_yaxis()
        axis.set(xlim=(0, 1), xlabel=f"share {title}")
    figure.suptitle("Self-Instruct (mean ± SD over seeds)")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--instructions", type=int, default=16, help="that people give, of 40")
    parser.add_argument("--written", type=int, default=1024, help="instructions that are written")
    parser.add_argument("--temperature", type=float, default=1.5, help="at which they are written")
    parser.add_argument("--model", default="tiny", help="hub id or folder")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak; as in tiny/make.py")
    parser.add_argument("--batch", type=int, default=32, help="rows of an update")
    parser.add_argument("--steps", type=int, default=150, help="updates; twice as many: the writer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/self_instruct", help="folder for table and figure")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found, stories = zip(*(one_seed(args, seed) for seed in tqdm(args.seeds, disable=None)))
    table = table_of(found) + "\n"
    for seed, story in zip(args.seeds, stories):
        numbers = ", ".join(f"{count} {name}" for name, count in story.items())
        table += f"\n- seed {seed}: {numbers}"
    print(table)
    (out / "table.md").write_text(table + "\n")
    draw(found, stories, out / "self_instruct.png")
    print(f"the table is in {out / 'table.md'}, the figure in {out / 'self_instruct.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; run it again to start anew") from None
