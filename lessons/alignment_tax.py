"""What does a policy forget while PPO teaches it something else, and does --ptx_data prevent it?

    python -m lessons.alignment_tax                # about 5 minutes on one core; can be resumed

What to see in the figure: as PPO earns more for its reviews, the loss on summaries rises, although
no summary is ever rewarded or punished. With --ptx_data the loss stays near its start at the same
reward. At the toy's usual learning rate it hardly rises either.

InstructGPT (Ouyang et al. 2022, arXiv:2203.02155v1) calls this the alignment tax: RLHF makes a
model worse at tasks that are not rewarded. PPO-ptx adds the likelihood of texts like those of
pretraining to the objective (their Eq. 2). tiny knows two tasks, reviews and summaries of posts.
PPO's reward is for friendly reviews alone, so summaries are what it may forget.

tiny has learned the summaries, but not the posts in front of them, and --ptx_data learns whole
texts. So the lesson begins with some pretraining: tiny learns whole reviews, and whole posts with
their summaries. All runs start from that model. They have a beta of 0.2, and the toy's usual
learning rate of 2e-4 or five times as much, at which the tax is large. The texts of --ptx_data are
new posts; their summaries are written by the careless reader of tiny/make.py, so they do not teach
better ones.

Before each step's updates the loss on 128 held-out summaries is measured, in nats a token; at the
end also the quality of 256 sampled ones (toy_quality of simpo.py). Table and figure are left in
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

import ppo_rlhf
from model import load_model, save_model
from sft import mask_of, schedule, sft_loss, token_logps
from simpo import sample, toy_post, toy_quality, toy_well_formed
from tiny.make import make_rows, misread, toy_summary

FLAGS = "--beta 0.2 --steps 12 --samples 1 --device cpu"
RUNS = {"PPO at --lr 2e-4": "--lr 2e-4", "PPO at --lr 1e-3": "--lr 1e-3",
        "PPO at --lr 1e-3, --ptx_data": "--lr 1e-3 --ptx_data"}


def make_posts(count, seed):
    """Posts, their facts, and summaries like those that tiny learned: (post, facts, summary)."""
    rng = random.Random(seed)
    posts = [toy_post(rng) for _ in range(count)]
    return [(post, facts, toy_summary(misread(rng, facts))) for post, facts in posts]


def pretrain(out, steps=600):
    """tiny, trained on whole texts of both tasks: reviews with their openings, posts with both."""
    model, tokenizer = load_model("tiny")
    texts = [tokenizer.encode_example("", prompt + response, 512)
             for prompt, response in make_rows(32 * steps)]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(steps), "pretraining", disable=None):
        batch = texts[32 * step:32 * (step + 1)]
        mask = mask_of(batch, model.device)  # (32, R)
        sft_loss(token_logps(model, batch, mask.shape[1]), mask).backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, out)


def summary_loss(model, tokenizer, posts):
    """Nats a token of the posts' summaries."""
    examples = [tokenizer.encode_example(post, summary, 512) for post, _, summary in posts]
    logps = ppo_rlhf.per_token(token_logps, model, examples, 4096)  # (N, R), 0 after the end
    return -float(logps.sum()) / sum(len(summary) for _, summary in examples)


def summary_quality(model, tokenizer, posts):
    """(quality, share of well-formed ones) of a sampled summary of each post."""
    asked = [tokenizer.encode_prompt(post) for post, _, _ in posts]
    texts = [tokenizer.decode(ids) for ids in sample(model, tokenizer, asked, 32, seed=0)]
    return (statistics.mean(toy_quality(text, facts)["quality"]
                            for text, (_, facts, _) in zip(texts, posts)),
            statistics.mean(map(toy_well_formed, texts)))


def train(flags, run, tokenizer, posts):
    """A run of PPO, unless it has ended. Its log also gets the loss on summaries of each step."""
    if (run / "results.json").exists():
        return
    learn = ppo_rlhf.learn

    def look_and_learn(networks, *rest):
        return {"summaries/loss": summary_loss(networks[0], tokenizer, posts),
                **learn(networks, *rest)}

    ppo_rlhf.learn = look_and_learn
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            ppo_rlhf.train(ppo_rlhf.parse_args([*flags, "--out", str(run)]))
    finally:
        ppo_rlhf.learn = learn


def at_reward(log, reward, key):
    """The mean of log[key] in the three steps whose mean reward is nearest."""
    rows = sorted(log, key=lambda row: abs(row["scores/mean"] - reward))[:3]
    return statistics.mean(row[key] for row in rows)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/alignment_tax", help="finished runs in it stay")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    start, texts = out / "pretrained", out / "texts.jsonl"
    if not (start / "model.safetensors").exists():
        pretrain(start)
    texts.write_text("".join(json.dumps({"text": post + summary}) + "\n"
                             for post, _, summary in make_posts(2000, 0)))
    held_out = make_posts(256, "held out")
    few = held_out[:128]  # for the loss, which is measured in each step
    model, tokenizer = load_model(str(start))
    logs, table = {name: [] for name in RUNS}, {name: [] for name in RUNS}
    loss, (quality, well_formed) = (summary_loss(model, tokenizer, few),
                                    summary_quality(model, tokenizer, held_out))
    for seed in tqdm(args.seeds, disable=None):
        ends = []
        for number, (name, own) in enumerate(RUNS.items()):
            run = out / f"{number}_{seed}"
            own += f" {texts}" * own.endswith("--ptx_data")
            train(f"{FLAGS} {own} --model {start} --seed {seed}".split(), run, tokenizer, few)
            policy = load_model(str(run))[0]
            log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            logs[name].append(log)
            ends.append([statistics.mean(row[key] for row in log[-3:])
                         for key in ("scores/mean", "kl/policy_reference", "samples/grammatical")]
                        + [summary_loss(policy, tokenizer, few),
                           *summary_quality(policy, tokenizer, held_out)])
        reward = min(end[0] for end in ends)  # all runs of this seed have come this far
        for name, end in zip(RUNS, ends):
            table[name].append([*end, at_reward(logs[name][-1], reward, "summaries/loss")])

    lines = ["| | reward | KL | reviews grammatical | loss on summaries | their quality | "
             "well-formed | loss at equal reward |", "| --- " * 8 + "|",
             f"| the start | | | | {loss:.3f} | {quality:.2f} | {well_formed:.2f} | {loss:.3f} |"]
    for name, rows in table.items():
        cells = []
        for values, digits in zip(zip(*rows), (2, 2, 2, 3, 2, 2, 3)):
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.4))
    left, right = figure.subplots(1, 2)
    for (name, of_seeds), color in zip(logs.items(), ("tab:green", "tab:orange", "tab:blue")):
        for k, log in enumerate(of_seeds):
            losses = [row["summaries/loss"] for row in log]
            label = name if k == 0 else None
            left.plot([row["scores/mean"] for row in log], losses, ".", color=color, ms=4,
                      label=label)
            right.plot([row["step"] for row in log], losses, color=color, lw=1, label=label)
    left.set(title="each dot is a step", xlabel="reward of reviews",
             ylabel="loss on summaries, nats a token")
    right.set(title="each line is a seed", xlabel="step of PPO")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize=7)
    figure.suptitle("PPO on reviews makes summaries worse; --ptx_data prevents most of it")
    figure.tight_layout()
    figure.savefig(out / "alignment_tax.png", dpi=100)
    print(f"the figure is in {out / 'alignment_tax.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
