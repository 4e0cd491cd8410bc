"""Which objectives of preference learning can be told apart on one set of data?

    python -m lessons.objectives                   # about 11 minutes on one core; can be resumed

What to see in the figure: three groups. Those with a reference (dpo, cdpo, ipo, rdpo, kto) gain the
most quality, at about half a nat of KL. simpo, rrhf, pro and plain sft on the best come next, and
cpo, orpo and slic gain least. With its own Adam epsilon and batches dpo is in the second group. The
bars are SDs over three seeds: what differs by less says nothing.

The toy of simpo.py: 512 posts, four summaries of each by tiny/, ranked by a human who knows
quality, likes length, and errs. All objectives learn from the same rankings: the pairwise ones from
every pair of different responses, once; rrhf and pro from every ranking, three times, so that each
sees a response as often; kto from both sides of each pair; sft, as a baseline, from the best
response of each post, three times. One learning rate, Adam epsilon and batch size for all, and of
each objective the other defaults of its script; "dpo, own epsilon" has dpo.py's own 1e-4 and
batches of 48. (dpo.py and kto.py hold out 16 of the posts, the others 51.)

"slic, KL term" is SLiC's hinge with the other regulariser of its authors (Zhao et al. 2022,
arXiv:2210.00045v1, 2.2): instead of the chosen response's likelihood, KL(start || policy) at each
of its tokens, summed, also with a weight of 1.

What counts is measured here, alike for all: true quality (recall of facts - made-up facts - 0.01 a
word), length and grammar of a sample for each of 256 new posts, and the KL from the start in nats.
The log-prob changes are those of the best and the worst of four summaries of 64 other new posts.
Means over seeds, and SD over seeds behind +-: a difference of two rows within it says nothing.
Table and figure are left in --out.
"""

import argparse
import contextlib
import io
import itertools
import json
import random
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

import dpo
import sft
import simpo
from model import load_model, read_jsonl, read_row, save_model, split_by_prompt
from variants import kto, rankings

OTHERS = "--adam_eps 1e-8 --batch_size"  # those of the other scripts, in place of dpo.py's own
METHODS = {
    "sft on the best": (sft, "--epochs 3"),
    "dpo": (dpo, f"{OTHERS} 32"), "cdpo": (dpo, f"{OTHERS} 32 --label_smoothing 0.1"),
    "ipo": (dpo, f"{OTHERS} 32 --loss ipo --beta 0.1"), "rdpo": (dpo, f"{OTHERS} 32 --loss rdpo"),
    "kto": (kto, f"{OTHERS} 64"),  # of responses, so 32 pairs
    "dpo, own epsilon": (dpo, ""),
    "simpo": (simpo, ""), "simpo, no margin": (simpo, "--gamma_beta_ratio 0"),
    "cpo": (simpo, "--loss cpo"), "orpo": (simpo, "--loss orpo"), "slic": (simpo, "--loss slic"),
    "slic, KL term": (None, ""), "slic, no term": (simpo, "--loss slic --lam 0"),
    "rrhf": (rankings, "--loss rrhf --epochs 3"), "pro": (rankings, "--loss pro --epochs 3"),
}
DATA = {sft: "best", rankings: "rankings"}  # the others learn from pairs
COLUMNS = ("quality", "recall", "made_up", "words", "grammatical", "kl", "chosen", "rejected")


def write_data(folder, model, tokenizer, seed):
    """rankings.jsonl, pairs.jsonl and best.jsonl of a seed."""
    rows = simpo.toy_summaries(model, tokenizer, 512, 1.0, seed, k=4)  # responses, best first
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "rankings": [{"prompt": row["prompt"], "responses": row["responses"],
                      "ranks": list(range(1, 1 + len(row["responses"])))}
                     for row in rows if len(row["responses"]) > 1],
        "pairs": [{"prompt": row["prompt"], "chosen": better, "rejected": worse} for row in rows
                  for better, worse in itertools.combinations(row["responses"], 2)],
        "best": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def new_posts(model, tokenizer):
    """256 posts that no data set holds; for 64 others the best and the worst of four summaries."""
    rng = random.Random("objectives")
    posts = [simpo.toy_post(rng) for _ in range(256)]
    rows = simpo.toy_summaries(model, tokenizer, 64, 1.0, seed=1000, k=4)
    pairs = [[tokenizer.encode_example(row["prompt"], row[side], 1024)
              for side in ("chosen", "rejected")] for row in rows]
    return posts, pairs


def measure(model, tokenizer, reference, posts, pairs):
    """Truth about samples for the posts, and changes of log-probs."""
    asked = [tokenizer.encode_prompt(prompt) for prompt, _ in posts]
    answers = simpo.sample(model, tokenizer, asked, 64, 0)
    texts = [tokenizer.decode(ids) for ids in answers]
    parts = [simpo.toy_quality(text, facts) for text, (_, facts) in zip(texts, posts)]
    numbers = {key: statistics.mean(part[key] for part in parts) for key in parts[0]}
    own = [[sequence] for sequence in zip(asked, answers)]
    kl, change = (simpo.group_logps(model, groups, 4096)
                  - simpo.group_logps(reference, groups, 4096)
                  for groups in (own, pairs))  # (256, 1), (64, 2)
    chosen, rejected = change.mean(0).tolist()
    return numbers | {"words": statistics.mean(len(text.split()) for text in texts),
                      "grammatical": statistics.mean(map(simpo.toy_well_formed, texts)),
                      "kl": float(kl.mean()), "chosen": chosen, "rejected": rejected}


def train_with_kl(data, run, lr, seed):
    """simpo.py --loss slic, with a KL term instead of its SFT term. The model is left in `run`."""
    flags = ["--loss", "slic", "--data", data, "--out", str(run)]
    args = simpo.parse_args(flags)
    (model, tokenizer), (start, _) = load_model("tiny"), load_model("tiny")
    rows = [read_row(row, tokenizer, "chosen", "rejected") for row in read_jsonl(data)]
    rows, _, _ = split_by_prompt(simpo.encode_pairs(tokenizer, rows, args), 256)
    pairs = random.Random(f"{seed} 0").sample([row["pair"] for row in rows], len(rows))
    batches = [pairs[i:i + 32] for i in range(0, len(pairs), 32)]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step, batch in enumerate(batches):
        logps, _ = simpo.response_logps(model, [sequence for pair in batch for sequence in pair])
        chosen, rejected = logps.view(-1, 2).unbind(1)  # (2B,) -> (B, 2) -> (B,) each
        hinge = simpo.slic_loss(chosen, rejected, lam=0.0).mean()
        ids, where, _, _ = simpo.collate([pair[0] for pair in batch], "cpu")
        new, old = (network.lm_head(simpo.hidden_states(network, ids, where)).log_softmax(1)
                    for network in (model, start))  # (N, V) each
        kl = (old.exp() * (old - new)).sum() / len(batch)
        (hinge + kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * simpo.schedule(step, len(batches))
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, run)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=3e-4, help="of all objectives")
    parser.add_argument("--out", default="runs/objectives",
                        help="finished runs in it stay, whatever their flags")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    reference, tokenizer = load_model("tiny")
    test = new_posts(reference, tokenizer)
    results = {"start": [measure(reference, tokenizer, reference, *test)]}
    for seed, name in tqdm([(s, name) for s in args.seeds for name in METHODS],
                           disable=None):
        folder = out / str(seed)
        if not (folder / "best.jsonl").exists():
            write_data(folder, reference, tokenizer, seed)
        script, flags = METHODS[name]
        run = folder / name.replace(" ", "_").replace(",", "")
        if not (run / "truth.json").exists():
            flags = [*flags.split(), "--data", f"{folder}/{DATA.get(script, 'pairs')}.jsonl",
                     "--out", str(run), "--lr", str(args.lr), "--seed", str(seed), "--device",
                     "cpu", *(["--samples", "2"] if script in (dpo, kto) else [])]
            with contextlib.redirect_stdout(io.StringIO()):
                if script:
                    script.train(script.parse_args(flags))
                else:
                    train_with_kl(f"{folder}/pairs.jsonl", run, args.lr, seed)
            numbers = measure(load_model(run)[0], tokenizer, reference, *test)
            (run / "truth.json").write_text(json.dumps(numbers))
        results.setdefault(name, []).append(json.loads((run / "truth.json").read_text()))

    lines = ["| objective | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    table = {}
    for name, runs in results.items():
        table[name] = {}
        for key in COLUMNS:
            values = [run[key] for run in runs]
            table[name][key] = (statistics.mean(values),
                                statistics.stdev(values) if len(values) > 1 else 0.0)
        lines.append(f"| {name} | " + " | ".join(
            f"{mean:.2f}" + f" ± {sd:.2f}" * (len(runs) > 1)
            for mean, sd in table[name].values()) + " |")
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(7, 6.4), sharey=True)
    axes = axes.flatten()
    for axis, key in zip(axes, ("kl", "words", "made_up")):
        for i, (name, row) in enumerate(table.items()):
            axis.errorbar(row[key][0], row["quality"][0], row["quality"][1], row[key][1], fmt="o",
                          color=plt.get_cmap("tab20")(i), label=name, ms=5, lw=1)
        axis.set_xlabel({"kl": "KL from the start, nats", "words": "words of a summary", "made_up":
                         "made-up facts per fact"}[key])
    axes[0].set_ylabel("true quality")
    axes[2].set_ylabel("true quality")
    axes[3].axis("off")
    axes[3].legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="center", ncols=2)
    figure.suptitle("All objectives on the same 512 posts (error bars: SD over seeds)", fontsize=11)
    figure.tight_layout()
    figure.savefig(out / "objectives.png", dpi=100)
    print(f"the table is in {out / 'table.md'}, the figure in {out / 'objectives.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
