"""Win rate: how often a judge prefers the responses of one model to those of another.

The judge is a reward model, and the question is the one of a human study: of two responses to one
prompt, which is better? A tie counts as half a win for each side. The standard error counts
prompts, as everywhere in this project: with one pair for each of 100 prompts, and a rate near a
half, it is 0.05.

    python -m variants.win_rate --judge runs/reward_model A.jsonl B.jsonl

The files have lines of {"prompt", "response"}, as variants.on_policy_pairs leaves them in
samples.jsonl. The first response to a prompt in A meets the first one to this prompt in B, and so
on.

`win_rate_equal_length` is the win rate that a logistic regression predicts for two responses of the
same length, after length-controlled AlpacaEval (Dubois et al. 2024, arXiv:2404.04475). What it
controls is the number of tokens, EOS included, with one slope for all prompts. (AlpacaEval bounds
the difference by a tanh, and has a second term for the difficulty of each instruction.) It does not
control what else a judge may like, and it cannot tell a judge's habit from a real merit of longer
responses: it takes both away. If every response of one side is longer, the number is extrapolated,
and its standard error is large. Three warnings:
- A judge that was also the reward of the training is not fair: the policy has learned its errors.
- A judge that is the policy itself, or a relative of it, may prefer its own responses (Zheng et al.
  2023, arXiv:2306.05685v4, 3.3). Nothing that is computed here can show this.
- A reward model reads one response at a time, so it has no position bias. A judge that reads both
  at once, as GPT-4 does in the DPO paper, often prefers the first one (Zheng et al., 3.3). It has
  to be asked in both orders. `python -m lessons.judge_habits` shows what each habit does.
"""

import json
import math

import torch
from tqdm import tqdm

from model import (Run, fail, launch, load_model, mean_by_prompt, new_parser, read_jsonl,
                   read_row)
from reward_model import reward_scores, split_batch


def rate_without(habits, wins, prompts):
    """(win rate, its standard error) where all habits are 0; None if the pairs do not determine it.

    A logistic regression: the logit of a win is an intercept + habits @ slopes, and the rate is
    sigma(intercept). habits: (P, C), such as the difference in length. wins: (P,), from 0 to 1.
    prompts: P of them; the standard error counts different ones, as mean_by_prompt does, and is NaN
    for one. Pairs that the habits separate, where slopes would grow for ever, give None, too.
    """
    habits, wins = habits.double(), wins.double()
    scale = habits.square().mean(0).sqrt().clamp(min=1e-9)  # (C,): not centred, so 0 stays 0
    x = torch.cat([torch.ones(len(wins), 1), habits / scale], 1)  # (P, 1 + C)
    w = torch.zeros(x.shape[1]).double()  # (1 + C,): the intercept and the slopes
    for _ in range(50):  # steps of Newton's method
        p = torch.sigmoid(x @ w)  # (P,)
        information = x.T @ (x * (p * (1 - p))[:, None])  # (1 + C, 1 + C)
        if torch.linalg.eigvalsh(information)[0] < 1e-6 * len(wins):
            return None
        inverse = torch.linalg.inv(information)
        step = inverse @ (x.T @ (wins - p))
        w = w + step
        if step.abs().max() < 1e-9:
            break
    # The sandwich estimate, from how far each pair alone moves the intercept. Pairs of one prompt
    # move it together. mean_by_prompt takes a mean, not a sum, hence the factor.
    rate, moves = float(torch.sigmoid(w[0])), (wins - torch.sigmoid(x @ w)) * (x @ inverse[0])
    error = mean_by_prompt({"move": moves * len(wins)}, prompts).get("move_se", math.nan)
    return rate, rate * (1 - rate) * error


def win_rate(a, b, prompts, longer):
    """{name: number}: how often b is the better one; the same at equal length; standard errors.

    Scores a, b: (P,). longer: (P,), by how many tokens b's response is the longer one.
    """
    wins = 0.5 + (b - a).sign() / 2  # (P,): 1, 0, or 0.5 for a tie
    metrics, name = mean_by_prompt({"win_rate": wins}, prompts), "win_rate_equal_length"
    found = rate_without(longer[:, None], wins, prompts)
    if found:
        metrics |= {name: found[0], f"{name}_se": found[1]}
    return {key: x for key, x in metrics.items() if not math.isnan(x)}


def load_judge(name, device):
    """A reward model and its tokenizer."""
    judge, tokenizer = load_model(name, "reward", device)
    if "SequenceClassification" not in str(judge.config.architectures):
        fail(f"{name}: this is a language model; reward_model.py makes a reward model of it")
    return judge, tokenizer


def encode_responses(tokenizer, rows):
    """(prompt ids, response ids) of each row, or None for one without room."""
    return [tokenizer.encode_example(row["prompt"], row["response"], tokenizer.context)
            for row in rows]


@torch.no_grad()
def score_responses(judge, tokenizer, rows, max_tokens):
    """The judge's score of the "response" to the "prompt" of each row: (len(rows),)."""
    examples = encode_responses(tokenizer, rows)
    if None in examples or any(ids[-1] not in tokenizer.stop_ids for _, ids in examples):
        fail(f"the judge's context of {tokenizer.context} tokens is too short for a prompt and its "
             "response; leave out long ones, or take another judge")
    scores = torch.zeros(len(rows))
    parts = split_batch([[example] for example in examples], max_tokens)
    for part in tqdm(parts, "scores", leave=False, disable=None):
        scores[part] = reward_scores(judge, [examples[i] for i in part]).cpu()
    return scores


def match(first, second):
    """Pairs of rows that have the same prompt: of each prompt the first with the first, and so on.
    """
    waiting = {}
    for row in second:
        waiting.setdefault(json.dumps(row["prompt"], sort_keys=True), []).append(row)
    pairs = []
    for row in first:
        others = waiting.get(json.dumps(row["prompt"], sort_keys=True))
        if others:
            pairs.append((row, others.pop(0)))
    left_out = len(first) + len(second) - 2 * len(pairs)
    print(f"{len(pairs)} pairs; {left_out} rows have no partner in the other file")
    return pairs or fail("no prompt is in both files")


def compare(args):
    """Score all pairs; print and keep the win rate of each side. Returns the metrics of B."""
    run = Run(args)
    judge, tokenizer = load_judge(args.judge, args.device)
    files = [[read_row(row, tokenizer, "response") for row in read_jsonl(path)]
             for path in (args.A, args.B)]
    pairs = match(*files)
    prompts, sides = [row["prompt"] for row, _ in pairs], list(zip(*pairs))
    a, b = (score_responses(judge, tokenizer, side, args.max_tokens) for side in sides)
    tokens = torch.tensor([[len(y) for _, y in encode_responses(tokenizer, side)]
                           for side in sides]).float()  # (2, P)
    columns = {"A": win_rate(b, a, prompts, tokens[0] - tokens[1]),
               "B": win_rate(a, b, prompts, tokens[1] - tokens[0])}
    if "win_rate_equal_length" not in columns["B"]:
        print("no win rate at equal length: one side wins all pairs, or length decides them, or it "
              "never varies")
    for column, scores, lengths in zip(columns.values(), (a, b), tokens):
        column |= {"scores/mean": float(scores.mean()), "samples/tokens": float(lengths.mean())}
    samples = [{"prompt": one["prompt"], f"A {x:+.2f}": one["response"],
                f"B {y:+.2f}": other["response"]} for (one, other), x, y in zip(pairs, a, b)]
    run.begin()
    run.report(columns, samples, panels=[])
    return columns["B"]


def parse_args(argv=None):
    """The command line."""
    parser = new_parser(__file__, __doc__, trains=False)
    flag = parser.add_argument
    flag("A", help='JSON Lines file of {"prompt", "response"}')
    flag("B", help="another one, with the same prompts")
    flag("--judge", required=True, help="folder or hub id of a reward model")
    return parser.parse_args(argv)


def main(argv=None):
    return launch(compare, parse_args(argv))


if __name__ == "__main__":
    main()
