"""How much reward can be had for a given KL, and how near to that does each method come?

    python -m lessons.frontier                     # about 70 minutes of CPU; can be resumed

What to see in the figure: on words PPO and RLOO lie on the frontier and keep to the language of the
reference; on reviews they fall short of it at a low beta. DPO and IPO come nearly as near, but
below, in "Who leaves the language?", some of their seeds have left it. SimPO and, on words, RAFT,
which have no price of KL, fall further below the longer they run.

No policy can have more reward at its KL from the reference than pi*(y) ~ pi_ref(y) exp(r(y)/beta)
has at the same KL, for the beta that leads there. All these pi* together are the frontier: Figure 2
(left) of the DPO paper with the truth drawn in. Two tasks:

words   "... The plot was" and three words out of 18, so 5,832 responses to each prompt. Every one
        of them is scored, for 8 held-out prompts: frontier, reward, KL and gaps are exact. The
        reference is tiny/ after SFT on 4,608 such answers, once.
reviews The sentiment task of dpo.py and ppo_rlhf.py as it stands. Its frontier is estimated from
        samples of the reference and of PPO's policies, each weighed by pi_ref over the pool's
        density; drawn where that rests on at least 50 effective samples for each prompt, and no
        further than PPO's smallest beta: no effective sample size tells of what was never sampled.

The reward of both is a sum over words, positive minus negative ones. The offline methods (dpo, ipo,
kto, simpo, sft on the chosen) learn from one and the same file of 4352 pairs, which samples of the
reference and a Bradley-Terry human make; ppo, rloo, grpo, raft and best-of-n draw samples and know
the reward.
All other settings are the scripts' defaults. A method's penalty is its --beta; simpo, raft and sft
have no price of KL, only the moment when you stop. No script trains on the 8 prompts.

For each method and penalty: reward, KL, and
    wasted    the KL beyond the least that any policy needs for the same reward: nats to the left
    gap       KL(pi || aim), in nats, where aim is the optimum of the method's own objective: pi*
              for ppo, rloo, dpo; pi_ref exp(p(y > mu)/tau)/Z for ipo, the winners' share for sft.
              What training left undone, apart from what the objective never asked for. J* - J(pi)
              is beta times it. grpo, kto, simpo and raft have no such optimum.
    mass      share of the policy on the 5,832 responses, of each seed. Reward, KL and gaps are of
              the policy on that set; one that has left it is not near any optimum, whatever they
              say. (Of reviews: the share that is grammatical.)
Means are over three seeds. Best-of-n is computed, not trained, so it has no seeds. Three checks
come first: all-at-once log-probs against one by one; J* from samples, as the scripts print it,
against J* by enumeration; and the sampled frontier against the exact one, each with its effective
sample size, of all prompts together. Tables and figure are left in --out.
"""

import argparse
import contextlib
import io
import json
import math
import random
import signal
import statistics
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

import dpo
import ppo_rlhf
import sft
import simpo
from model import load_model, split_by_prompt
from variants import grpo, kto, raft

METHODS = {  # name: (script, flags, the flag that varies, its values)
    "ppo": (ppo_rlhf, "", "--beta", (2, 1, 0.5, 0.25)),
    "rloo": (grpo, "--preset rloo --missing_eos_score -1", "--beta", (2, 1, 0.5, 0.25)),
    "grpo": (grpo, "--missing_eos_score -1", "--beta", (2, 1, 0.5, 0.25)),
    "dpo": (dpo, "", "--beta", (2, 1, 0.5, 0.25)),
    "ipo": (dpo, "--loss ipo", "--beta", (0.4, 0.2, 0.1, 0.05)),
    "kto": (kto, "", "--beta", (2, 1, 0.5, 0.25)),
    "simpo": (simpo, "", "--steps", (10, 20, 40, 80)),
    "raft": (raft, "", "--steps", (5, 10, 20, 40)),
    "sft on chosen": (sft, "", "--epochs", (1, 3)),
}
N = (2, 4, 8, 16)  # of best-of-n
TASKS = ("words", "reviews")
WORDS = dpo.POSITIVE[:6] + dpo.NEUTRAL[:6] + dpo.NEGATIVE[:6]
REWARDS = torch.tensor([[1.0], [0.0], [-1.0]]).expand(3, 6).flatten()  # (18,)
REWARDS = (REWARDS[:, None, None] + REWARDS[:, None] + REWARDS).flatten().double()  # (5832,)
BETAS = [20 * 0.98**i for i in range(300)]  # 20 to 0.05, along the frontier

# ------------------------------------------------------------------------------ the words task


def word_prompts():
    """A prompt of the toy and the beginning of an answer."""
    return [f"{prompt} The {dpo.ASPECTS[i % 8]} was" for i, prompt in enumerate(dpo.toy_prompts())]


def held_out(prompts):
    """8 of the prompts that every script holds out, of whichever rows with these prompts."""
    return split_by_prompt([{"prompt": prompt} for prompt in prompts])[2][:8]


def demonstrations(count):
    """What the reference learns: words of like mood together; some aspects are liked better."""
    rng = random.Random("words")
    prompts, rows = word_prompts(), []
    for _ in range(count):
        i = rng.randrange(300)
        odds = (1 + i % 8 % 4, 2, 4 - i % 8 % 4)  # of the moods, by aspect
        mood, words = rng.choices(range(3), odds)[0], []
        for _ in range(3):
            mood = rng.choices((mood, *range(3)), (2, *odds))[0]
            words.append(rng.choices(WORDS[6 * mood:6 * mood + 6], (6, 5, 4, 3, 2, 1))[0])
        rows.append({"prompt": prompts[i], "completion": f" {', '.join(words)}."})
    return rows


@torch.no_grad()
def enumerate_logps(model, tokenizer, prompt):
    """Log-probs of all responses " w1, w2, w3." with their EOS, down the tree of words: (5832,)."""
    words = torch.tensor([tokenizer.encode(f" {word}")[0] for word in WORDS])  # (18,)
    comma, stop = tokenizer.encode(",")[0], tokenizer.encode(".")[0]
    out = model(torch.tensor([tokenizer.encode_prompt(prompt)]), use_cache=True)
    cache, following = out.past_key_values, out.logits[:, -1].log_softmax(1)  # (1, V)
    total = torch.zeros(1)
    for mark in (comma, comma, stop):
        n = 18 * len(total)
        total = (total[:, None] + following[:, words]).flatten()  # (n/18, 18) -> (n,)
        cache.batch_repeat_interleave(18)
        ids = torch.stack([words.repeat(n // 18), torch.full((n,), mark)], 1)  # (n, 2)
        logps = model(ids, past_key_values=cache, use_cache=True).logits.log_softmax(2)
        total, following = total + logps[:, 0, mark], logps[:, 1]  # (n, 2, V) -> (n,), (n, V)
    return (total + following[:, tokenizer.eos_id]).double()


def enumerate_all(model, tokenizer):
    """(log-probs on the set (8, 5832), each prompt's summing to 1, and the mass of the set (8,))"""
    logps = torch.stack([enumerate_logps(model, tokenizer, p) for p in held_out(word_prompts())])
    mass = logps.logsumexp(1)  # (8,)
    return logps - mass[:, None], mass.exp()


# --------------------------------------------------------------------------------- the optimum


def tilt(logps, values):
    """The distribution ~ exp(logps + values) of each prompt, as log-probs: (P, M)."""
    return (logps + values).log_softmax(1)


def reward_and_kl(logps, reference, rewards):
    """Means over prompts of E[r] and of KL(pi || pi_ref), from log-probs (P, M) of a whole set."""
    p = logps.exp()
    return (float((p * rewards).sum(1).mean()),
            float((p * (logps - reference)).nan_to_num().sum(1).mean()))


def frontier(reference, rewards):
    """[(beta, reward, KL)] of pi* for falling beta, from log-probs or weights (P, M) of pi_ref."""
    return [(beta, *reward_and_kl(tilt(reference, rewards / beta), reference, rewards))
            for beta in BETAS]


def wasted(reward, kl, points):
    """KL beyond the least that a policy with this reward needs; None beyond the last point."""
    for (_, r0, kl0), (_, r1, kl1) in zip(points, points[1:]):
        if r0 <= reward <= r1:
            return kl - (kl0 + (kl1 - kl0) * (reward - r0) / (r1 - r0))
    return None if reward > points[-1][1] else kl


def win_rate(reference, rewards):
    """p(y > mu), mu being pi_ref itself: how often the human prefers y to a sample. (P, M)"""
    levels = rewards.unique()
    mass = torch.stack([(reference.exp() * (rewards == r)).sum(1) for r in levels], 1)  # (P, L)
    beats = torch.sigmoid(rewards[..., None] - levels)  # (P or 1, M, L)
    return (beats * mass[:, None]).sum(2)


def best_of_n(reference, rewards, n):
    """Log-probs (P, M) of the best of n samples; ties go to whichever came first."""
    below = torch.stack([(reference.exp() * (rewards < r)).sum(1) for r in rewards.unique()], 1)
    upto = torch.stack([(reference.exp() * (rewards <= r)).sum(1) for r in rewards.unique()], 1)
    ratio = ((upto**n - below**n) / (upto - below)).log()  # (P, L): pi_n/pi_ref at each reward
    level = torch.searchsorted(rewards.unique(), rewards.expand(reference.shape).contiguous())
    return reference + ratio.gather(1, level)


def aim_of(method, penalty, reference, rewards):
    """Log-probs of the optimum of the method's own objective, or None if there is none."""
    if method in ("ppo", "rloo", "dpo"):
        return tilt(reference, rewards / penalty)
    if method == "ipo":
        return tilt(reference, win_rate(reference, rewards) / penalty)
    if method == "sft on chosen":
        return tilt(reference, win_rate(reference, rewards).log())
    return None


# -------------------------------------------------------------------------------------- training


def quietly(script, flags, **own):
    """Run a script without its output; where it ends with a message, end with that message."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            script.train(script.parse_args(flags), **own)
    except SystemExit:
        raise RuntimeError(f"{' '.join(flags)}: {said.getvalue().splitlines()[-1]}") from None


def toy_rewards(prompts, texts):
    """The toy's true reward of each text, as ppo_rlhf.py, grpo.py and raft.py take it: (B,)."""
    return torch.tensor([dpo.toy_reward(text) for text in texts])


def judged_pairs(model, tokenizer, prompts, count, seed):
    """Pairs as `toy_pairs` of dpo.py makes them, but for prompts of our own."""
    rng = random.Random(seed)
    prompts = rng.choices(prompts, k=count)
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(2)]
    texts = [tokenizer.decode(ids, whole=True)
             for ids in dpo.sample(model, tokenizer, asked, 64, seed)]
    rows = []
    for prompt, a, b in zip(prompts, texts[::2], texts[1::2]):
        if rng.random() > 1 / (1 + math.exp(dpo.toy_reward(b) - dpo.toy_reward(a))):
            a, b = b, a
        rows.append({"prompt": prompt, "chosen": a, "rejected": b})
    return rows


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(out, seeds):
    """The reference of the words task, and each seed's preferences, as files for the scripts."""
    start = out / "words" / "start"
    write_rows(out / "words" / "prompts.jsonl", [{"prompt": prompt} for prompt in word_prompts()])
    if not (start / "curves.png").exists():
        write_rows(start / "demonstrations.jsonl", demonstrations(4608))
        quietly(sft, ["--data", f"{start}/demonstrations.jsonl", "--out", str(start),
                      "--device", "cpu"])
    for task in TASKS:
        for seed in seeds:
            chosen = out / task / f"chosen_{seed}.jsonl"
            if not chosen.exists():
                model = load_model(start if task == "words" else "tiny")
                prompts = word_prompts() if task == "words" else dpo.toy_prompts()
                rows = judged_pairs(*model, prompts, 4352, seed)
                write_rows(out / task / f"pairs_{seed}.jsonl", rows)
                write_rows(chosen, [{"prompt": row["prompt"], "completion": row["chosen"]}
                                    for row in rows])


def train(out, task, method, penalty, seed):
    """One run of a script, unless it has ended already; returns the folder."""
    script, flags, flag, _ = METHODS[method]
    run = out / task / f"{method} {penalty}".replace(" ", "_") / str(seed)
    if (run / "curves.png").exists():
        return run
    flags = [*flags.split(), flag, str(penalty), "--seed", str(seed), "--out", str(run),
             "--model", str(out / "words" / "start") if task == "words" else "tiny",
             "--device", "cpu"]
    if script in (dpo, kto, ppo_rlhf, grpo, raft):
        flags += ["--samples", "2"]  # their evaluation is not needed here
    own = {}
    if script not in (ppo_rlhf, grpo, raft):
        name = "chosen" if script is sft else "pairs"
        flags += ["--data", str(out / task / f"{name}_{seed}.jsonl")]
    elif task == "words":  # reviews are the toy of both scripts
        flags += ["--data", str(out / task / "prompts.jsonl")]
        own = {"reward": toy_rewards}
    quietly(script, flags, **own)
    return run


# ------------------------------------------------------------------------------------ evaluation


def draw_samples(model, tokenizer, prompts, n, seed):
    """n samples for each prompt: P * n pairs (prompt ids, response ids)."""
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(n)]
    return list(zip(asked, dpo.sample(model, tokenizer, asked, 64, seed)))


def logps_of(model, examples):
    return dpo.group_logps(model, [[example] for example in examples], 4096).flatten().double()


def pooled(models, tokenizer, prompts, counts, reward):
    """A weighted sample of pi_ref, the first of the models, from samples of all of them.

    Each sample weighs pi_ref over the density of the pool (Veach and Guibas's balance heuristic).
    Returns log-weights, which sum to 1 or nearly so, and rewards, both (P, M).
    """
    P, M = len(prompts), sum(counts)
    drawn = [draw_samples(model, tokenizer, prompts, n, 1000 + i)
             for i, (model, n) in enumerate(zip(models, counts, strict=True))]
    flat = [pair for p in range(P) for n, column in zip(counts, drawn)
            for pair in column[p * n:(p + 1) * n]]  # P * M
    logps = torch.stack([logps_of(model, flat) for model in models])  # (models, P * M)
    pool = (logps + torch.tensor(counts).double().log()[:, None]).logsumexp(0)  # sum of n_k pi_k
    rewards = torch.tensor([reward(tokenizer.decode(ids)) for _, ids in flat]).double()
    return (logps[0] - pool).view(P, M), rewards.view(P, M)


def effective_samples(weights, values):
    """(sum of w)^2 / sum of w^2 for w = exp(weights + values), of each prompt: (P,)."""
    x = weights + values
    return (2 * x.logsumexp(1) - (2 * x).logsumexp(1)).exp()


def explore(job):
    """Train, and look at the policy: all log-probs of the words task, or samples of reviews."""
    task = job[1]
    torch.set_num_threads(1)  # jobs are side by side; and the result is that of one thread
    run = train(*job)
    if (run / "seen.pt").exists():
        return
    policy, tokenizer = load_model(run)
    if task == "words":
        logps, mass = enumerate_all(policy, tokenizer)
        seen = {"logps": logps, "mass": float(mass.mean())}
    else:
        drawn = draw_samples(policy, tokenizer, held_out(dpo.toy_prompts()), 256, job[4])
        reference, _ = load_model("tiny")
        texts = [tokenizer.decode(ids) for _, ids in drawn]
        seen = {"kl": float((logps_of(policy, drawn) - logps_of(reference, drawn)).mean()),
                "reward": statistics.mean(map(dpo.toy_reward, texts)),
                "mass": statistics.mean(map(dpo.toy_grammatical, texts))}
    torch.save(seen, run / "seen.pt")


def word_reward(text):
    """The toy's reward of a response in the set; others are not counted, like in the sums."""
    words = text.removeprefix(" ").removesuffix(".").split(", ")
    inside = len(words) == 3 and set(words) <= set(WORDS) and text == f" {', '.join(words)}."
    return dpo.toy_reward(text) if inside else -math.inf


def check(out, seed):
    """The three checks, printed; all on the words task, where the truth is known."""
    reference, tokenizer = load_model(out / "words" / "start")
    prompts = held_out(word_prompts())
    exact = torch.stack([enumerate_logps(reference, tokenizer, p) for p in prompts])  # (8, 5832)
    texts = [f" {a}, {b}, {c}." for a in WORDS for b in WORDS for c in WORDS]
    few = random.Random(0).sample(range(5832), 200)
    again = logps_of(reference, [tokenizer.encode_example(prompts[0], texts[i], 64) for i in few])
    apart = float((exact[0, few] - again).abs().max())
    lines = [f"enumeration against scoring one by one: {apart:.0e} nats apart at most", "",
             "| beta | J\\* exact | from two policies, as the scripts do | effective samples | "
             "from all of PPO's | effective samples |", "| --- " * 6 + "|"]
    policies = [load_model(train(out, "words", "ppo", beta, seed))[0]
                for beta in METHODS["ppo"][3]]
    models = [reference, *policies]
    weights, rewards = pooled(models, tokenizer, prompts, [512] * len(models), word_reward)
    for i, beta in enumerate(METHODS["ppo"][3]):
        truth = beta * float((exact + REWARDS / beta).logsumexp(1).mean())
        two = [draw_samples(model, tokenizer, prompts, 128, 7)
               for model in (reference, policies[i])]
        flat = [pair for column in two for pair in column]
        r = torch.tensor([word_reward(tokenizer.decode(ids)) for _, ids in flat]).double()
        new, old, r = (x.view(2, 8, 128).transpose(0, 1).reshape(8, 256) for x in (
            logps_of(policies[i], flat), logps_of(reference, flat), r))
        numbers = dpo.yardstick(r, new, old, beta)
        sampled = f"{numbers['J/optimum']:.3f}" if "J/optimum" in numbers else "not quoted"
        wide = beta * (weights + rewards / beta).logsumexp(1).mean()
        size = effective_samples(weights, rewards / beta)  # (P,)
        size = len(size)**2 / (1 / size).sum()  # of all prompts together, as in `yardstick`
        lines.append(f"| {beta} | {truth:.3f} | {sampled} | {numbers['J/effective_samples']:.0f} | "
                     f"{wide:.3f} | {size:.0f} |")
    return lines


def measure_words(out, runs):
    """Exact rows of the table, and the frontier, of the words task."""
    model, tokenizer = load_model(out / "words" / "start")
    reference, mass = enumerate_all(model, tokenizer)
    points = frontier(reference, REWARDS)
    rows = [{"method": "reference", "penalty": "", "seed": 0, "kl": 0.0, "wasted": 0.0,
             "reward": reward_and_kl(reference, reference, REWARDS)[0], "mass": float(mass.mean())}]
    for n in N:
        reward, kl = reward_and_kl(best_of_n(reference, REWARDS, n), reference, REWARDS)
        rows.append({"method": "best-of-n", "penalty": n, "seed": 0, "reward": reward, "kl": kl,
                     "wasted": wasted(reward, kl, points), "mass": float(mass.mean())})
    for method, penalty, seed, run in runs:
        seen = torch.load(run / "seen.pt")
        reward, kl = reward_and_kl(seen["logps"], reference, REWARDS)
        aim = aim_of(method, penalty, reference, REWARDS)
        gap = {} if aim is None else {"gap": reward_and_kl(seen["logps"], aim, REWARDS)[1]}
        rows.append({"method": method, "penalty": penalty, "seed": seed, "reward": reward,
                     "kl": kl, "wasted": wasted(reward, kl, points), "mass": seen["mass"]} | gap)
    aims = {method: [reward_and_kl(aim_of(method, x, reference, REWARDS), reference, REWARDS)
                     for x in METHODS[method][3]] for method in ("ipo", "sft on chosen")}
    return rows, points, aims


def measure_reviews(out, runs):
    """Sampled rows of the table, and the frontier where it can be had, of the reviews task."""
    model, tokenizer = load_model("tiny")
    prompts = held_out(dpo.toy_prompts())
    policies = [load_model(run)[0] for method, _, seed, run in runs
                if method == "ppo" and seed == runs[0][2]]
    counts = [1024] + [512] * len(policies)
    weights, rewards = pooled([model, *policies], tokenizer, prompts, counts, dpo.toy_reward)
    size = {beta: float(effective_samples(weights, rewards / beta).min()) for beta in BETAS}
    points = [point for point in frontier(weights.log_softmax(1), rewards)
              if size[point[0]] >= 50 and point[0] >= min(METHODS["ppo"][3])]
    start = rewards[:, :1024]  # the reference's own samples, all of one weight
    flat = torch.full_like(start, -math.log(1024))
    own = draw_samples(model, tokenizer, prompts, 256, 0)
    rows = [{"method": "reference", "penalty": "", "seed": 0, "kl": 0.0, "wasted": 0.0,
             "reward": float(start.mean()), "mass": statistics.mean(
                 dpo.toy_grammatical(tokenizer.decode(ids)) for _, ids in own)}]
    for n in N:
        reward, kl = reward_and_kl(best_of_n(flat, start, n), flat, start)
        rows.append({"method": "best-of-n", "penalty": n, "seed": 0, "reward": reward, "kl": kl,
                     "wasted": wasted(reward, kl, points), "mass": None})
    for method, penalty, seed, run in runs:
        seen = torch.load(run / "seen.pt")
        rows.append({"method": method, "penalty": penalty, "seed": seed, **seen,
                     "wasted": wasted(seen["reward"], seen["kl"], points)})
    return rows, points, {"smallest beta": points[-1][0], "effective samples": size[points[-1][0]]}


# ------------------------------------------------------------------------------ table and figure


def table(rows, last):
    """Markdown: means ± SD over seeds of each method and penalty; of the last, each seed's."""
    keys = [key for key in ("reward", "kl", "wasted", "gap", "mass")
            if any(key in row for row in rows)]
    lines = [f"| method | penalty | {' | '.join(keys[:-1])} | {last} |",
             "| --- " * (len(keys) + 2) + "|"]
    for method, penalty in dict.fromkeys((row["method"], row["penalty"]) for row in rows):
        group = [row for row in rows if (row["method"], row["penalty"]) == (method, penalty)]
        cells = []
        for key in keys:
            values = [row[key] for row in group if row.get(key) is not None]
            sd = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append("" if not values or len(values) < len(group) else
                         ", ".join(f"{value:.2f}" for value in values) if key == "mass" else
                         f"{statistics.mean(values):.2f}{sd}")
        flag = METHODS[method][2].lstrip("-") + " " if method in METHODS else ""
        flag = "n " if method == "best-of-n" else flag
        lines.append(f"| {method} | {flag}{penalty} | {' | '.join(cells)} |")
    return lines


def draw(results, path):
    """Both frontiers with the methods under them, and what the policies keep of the language."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(7, 6))
    axes = axes.flatten()
    colors = dict(zip([*METHODS, "best-of-n"], plt.get_cmap("tab10").colors))
    titles = {"words": "Three words (exact)", "reviews": "Reviews (from samples)"}
    for axis, task in zip(axes, TASKS):
        rows, points, aims = results[task]
        axis.plot([kl for _, _, kl in points], [r for _, r, _ in points], "k", lw=1.5,
                  label="frontier: pi*")
        if "ipo" in aims:
            aim = sorted((kl, r) for r, kl in aims["ipo"])
            axis.plot(*zip(*aim), "D", ms=10, mfc="none", color=colors["ipo"], zorder=1,
                      label="what ipo aims at, for each tau")
        for method, color in colors.items():
            own = [row for row in rows if row["method"] == method]
            axis.plot([row["kl"] for row in own], [row["reward"] for row in own], "o", ms=4,
                      color=color, label=method)
            if method != "best-of-n":  # it is the reference's own language
                axes[2].plot([row["kl"] for row in own], [row["mass"] for row in own],
                             "o" if task == "words" else "x", ms=4, color=color)
        axis.set(title=titles[task], xlabel="KL from the reference, nats", ylabel="reward")
    axes[2].set(title="Who leaves the language?", xlabel="KL from the reference, nats",
                ylabel="share in it (o: words, x: reviews)", ylim=(-0.03, 1.03))
    axes[3].axis("off")
    axes[3].legend(*axes[0].get_legend_handles_labels(), loc="center")
    figure.suptitle("PPO and RLOO keep near the frontier; seeds of DPO may leave the language")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", default="runs/frontier", help="finished runs in it stay")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    torch.set_num_threads(1)
    prepare(out, args.seeds)
    todo = [(out, task, method, penalty, seed) for task in TASKS for seed in args.seeds
            for method, (_, _, _, penalties) in METHODS.items() for penalty in penalties]
    # Ctrl-C is for the parent alone, which ends the others.
    with get_context("spawn").Pool(args.jobs, signal.signal,
                                   (signal.SIGINT, signal.SIG_IGN)) as pool:
        for _ in tqdm(pool.imap_unordered(explore, todo), "training", len(todo), disable=None):
            pass
    runs = {task: [(*job[2:], train(*job)) for job in todo if job[1] == task] for task in TASKS}
    results = {"words": measure_words(out, runs["words"]),
               "reviews": measure_reviews(out, runs["reviews"])}
    lines = [*check(out, args.seeds[0]), "", *table(results["words"][0], "mass"), "",
             *table(results["reviews"][0], "grammatical"), "",
             "the frontier of the reviews ends at beta {smallest beta:.2f}, with {effective samples"
             ":.0f} effective samples for the worst prompt".format(**results["reviews"][2])]
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    draw(results, out / "frontier.png")
    print(f"the tables are in {out / 'table.md'}, the figure in {out / 'frontier.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
