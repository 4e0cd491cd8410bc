"""How far does DPO's optimum let the log-probs of chosen responses fall?

    python -m lessons.implicit_rewards             # about 5 minutes on one core; can be resumed

What to see in the figure: on the left, responses are spread as widely as the reward before
training; after it they lie close together, and after two epochs near 0, where all of them would be
at DPO's optimum. On the right, the weight of a pair in DPO's gradient falls as h grows. The dots
show where the optimum leaves pairs whose rewards differ by 1, 2 and 3.

The policy with the most E[r] - beta KL is pi*(y|x) = pi_ref(y|x) exp((r(x, y) - J*(x)) / beta),
where J*(x) = beta log E_ref[exp(r / beta)]. So at the optimum beta log(pi / pi_ref) is r - J*, and
the mean of `rewards/chosen` is E[r(y_w)] - J*. Chosen responses are the better ones of two samples.
J* is higher than their mean reward, so `rewards/chosen` is below 0.

`python dpo.py` with two seeds, for one epoch (the default) and for two. J*(x) is estimated for the
16 held-out prompts, as `yardstick` of dpo.py does it, from 256 samples of the reference and 256 of
the policy. The same weights tell which share of reviews repeats a word under pi*, as in "moving and
moving". Table and figure are left in --out.
"""

import argparse
import contextlib
import io
import math
import re
from pathlib import Path

import torch
from tqdm import tqdm

import dpo
from model import fill_defaults, load_model, split_by_prompt

SAMPLES, EPOCHS = 256, (1, 2)


def optimum(rewards, policy, reference, beta):
    """J*(x) of each prompt (P,), and the weights (P, 2n) with which its samples stand for pi*.

    As in dpo.yardstick: the samples are n of the reference, then n of the policy, and the inputs,
    (P, 2n) each, are their rewards and log-probs. The weights of a prompt add up to 1.
    """
    n = rewards.shape[1] // 2
    x = reference - torch.logaddexp(reference, policy) + rewards / beta  # (P, 2n)
    return beta * (x.logsumexp(1) - math.log(n)), x.softmax(1)


def gradient_weight(h, beta):
    """sigma(-beta h): the gradient of DPO's loss is -beta times this times the gradient of h."""
    return torch.sigmoid(-beta * h)


def repeats(text):
    """Whether a text has a word on both sides of an "and"."""
    return bool(re.search(r"\b(\w+) and \1\b", text))


def spread(x, kept):
    """The SD of each row's kept values, averaged over rows: x and kept (P, n)."""
    return torch.stack([row[keep].std() for row, keep in zip(x, kept)]).mean()


def train(run, seed, epochs):
    """`python dpo.py`, unless it has ended. Returns its flags."""
    args = dpo.parse_args(["--out", str(run), "--seed", str(seed), "--epochs", str(epochs),
                           "--device", "cpu"])
    if (run / "results.json").exists():
        fill_defaults(args, dpo.DEFAULTS, True)
    else:
        dpo.train(args)
    return args


def measure(run, args):
    """{row of the table: number} of a run, its furthest sample, and what the figure shows."""
    (policy, tokenizer), (reference, _) = load_model(str(run)), load_model("tiny")
    rows = dpo.toy_pairs(reference, tokenizer, args.pairs, args.seed)  # the pairs of the run
    _, test, prompts = split_by_prompt(dpo.encode_pairs(tokenizer, rows, args))
    P, n = len(prompts), SAMPLES
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(n)]
    responses = [response for model in (reference, policy) for response in
                 dpo.sample(model, tokenizer, asked, args.max_new_tokens, args.seed)]
    texts = [tokenizer.decode(response) for response in responses]

    def per_prompt(x):  # (2*P*n,), all samples of the reference first -> (2, P, n) -> (P, 2n)
        return torch.as_tensor(x).view(2, P, n).transpose(0, 1).flatten(1)

    groups = [[example] for example in zip(asked * 2, responses)]
    logps, reference_logps = (per_prompt(dpo.group_logps(model, groups, args.max_tokens)).double()
                              for model in (policy, reference))  # (P, 2n) each
    rewards = per_prompt([dpo.toy_reward(text) for text in texts]).double()
    repeated = per_prompt([repeats(text) for text in texts])
    reviews = per_prompt([dpo.toy_grammatical(text) for text in texts])
    best, weights = optimum(rewards, logps, reference_logps, args.beta)  # (P,), (P, 2n)
    left = rewards - args.beta * (logps - reference_logps)  # (P, 2n): J*(x) at the optimum

    # Held-out pairs: their rewards in truth and by the policy, (N, 2) each, and their prompt's J*.
    truth = torch.tensor([[dpo.toy_reward(row[side]) for side in ("chosen", "rejected")]
                          for row in test]).double()
    pairs = [row["pair"] for row in test]
    implicit = args.beta * (dpo.group_logps(policy, pairs, args.max_tokens)
                            - dpo.group_logps(reference, pairs, args.max_tokens))
    places = torch.tensor([prompts.index(row["prompt"]) for row in test])  # (N,), in best
    chosen, rejected = (truth - best[places, None]).mean(0)
    margin = float((implicit[:, 0] - implicit[:, 1]).mean())
    scale = margin / float(chosen - rejected)
    part = optimum(scale * rewards, logps, reference_logps, args.beta)[0]  # (P,)
    table = {
        "`J*`, mean over held-out pairs": best[places].mean(),
        "`E[r(y_w)]`, held-out pairs": truth[:, 0].mean(),
        "`rewards/chosen` at the optimum: `E[r(y_w)] - J*`": chosen,
        "`rewards/chosen` measured": implicit[:, 0].mean(),
        "`rewards/rejected` at the optimum: `E[r(y_l)] - J*`": rejected,
        "`rewards/rejected` measured": implicit[:, 1].mean(),
        "`rewards/margin` at the optimum: `E[r(y_w)] - E[r(y_l)]`": chosen - rejected,
        "`rewards/margin` measured": margin,
        "`rewards/chosen` at the optimum of `s r`, where `s` is measured / optimal margin":
        (scale * truth[:, 0] - part[places]).mean(),
        "SD of `r` within a prompt, reviews of the reference": spread(
            rewards[:, :n], reviews[:, :n]),
        "SD of `r - beta log(pi/pi_ref)`, the same reviews": spread(left[:, :n], reviews[:, :n]),
        "the same SD, reviews of the policy": spread(left[:, n:], reviews[:, n:]),
        "effective samples": P**2 / weights.square().sum()}
    for name, kind in (("repeat a word", repeated), ("are no review", ~reviews & ~repeated)):
        percent = 100 * kind.double()  # (P, 2n)
        table |= {f"% that {name}: the reference's samples": percent[:, :n].mean(),
                  f"% that {name}: the policy's samples": percent[:, n:].mean(),
                  f"% that {name}: the optimum": (weights * percent).sum(1).mean()}
    away = left - best[:, None]  # (P, 2n): 0 at the optimum
    i = int(away[:, n:].argmin())  # a place in (P, n)
    ratio = (logps - reference_logps)[:, n:].flatten()[i]
    furthest = f"log(pi/pi_ref) = {ratio:.1f}: `{texts[P * n + i].strip()}`"
    return ({key: float(x) for key, x in table.items()}, furthest,
            ((rewards - best[:, None])[:, :n].flatten(), away[:, :n].flatten()))


def draw(values, path):
    """values: {number of epochs: (before, after)}, the distances of samples of the reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6))
    left, right = figure.subplots(1, 2)
    bins = [-6 + 0.25 * i for i in range(37)]  # up to 3; the few values outside are left out
    left.hist(values[1][0], bins, color="lightgray", label="before training")
    for epochs, (_, after) in values.items():
        left.hist(after, bins, histtype="step", lw=1.5, label=f"after {epochs} epoch" +
                  "s" * (epochs > 1))
    left.axvline(0, color="black", ls=":", label="the optimum")
    left.set(title=f"{len(values[1][0]):,} samples of the reference", ylabel="samples",
             xlabel=r"$r-\beta\,\log(\pi/\pi_{\mathrm{ref}})-J^*$")
    h = torch.linspace(-10, 32, 200)
    for beta in (0.5, 0.1):
        line, = right.plot(h, gradient_weight(h, beta), label=rf"$\beta$ = {beta}")
        at = torch.tensor([1.0, 2.0, 3.0]) / beta  # h of pairs whose rewards differ by this
        right.plot(at, gradient_weight(at, beta), "o", color=line.get_color())
    right.set(title="weight of a pair in the gradient", ylim=(0, 1), ylabel=r"$\sigma(-\beta h)$",
              xlabel="h, nats (dots: optimum for r apart by 1, 2, 3)")
    for axis in (left, right):
        axis.legend(fontsize=8)
    figure.suptitle("At DPO's optimum the left side is one bar at 0", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", default="runs/implicit_rewards", help="finished runs in it stay")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out, tables, furthest, values = Path(args.out), {}, [], {}
    for seed, epochs in tqdm([(s, e) for s in args.seeds for e in EPOCHS], disable=None):
        run = out / f"{seed}_{epochs}"
        with contextlib.redirect_stdout(io.StringIO()):
            table, sample, histograms = measure(run, train(run, seed, epochs))
        tables.setdefault(epochs, []).append(table)
        furthest.append(f"- seed {seed}, {epochs} epoch{'s' * (epochs > 1)}: {sample}")
        values.setdefault(epochs, histograms)  # of the first seed

    lines = ["| | one epoch | two epochs |", "| --- | --- | --- |"]
    for key in tables[1][0]:
        digits = 0 if "effective" in key else 1 if "%" in key else 2
        cells = [", ".join(f"{table[key]:.{digits}f}" for table in tables[e]) for e in EPOCHS]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    lines += ["", "The sample of each policy that is furthest below the optimum's value, J*:", "",
              *furthest]
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    draw(values, out / "implicit_rewards.png")
    print(f"the table is in {out / 'table.md'}, the figure in {out / 'implicit_rewards.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
