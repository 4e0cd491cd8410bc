"""Win rate: how often a judge prefers the responses of one model to those of another.

The judge is a reward model, and the question is the one of a human study: of two responses to one
prompt, which is better? A tie counts as half a win for each side. The standard error shows how far
the rate can be trusted: with 100 pairs, and a rate near a half, it is 0.05. (It takes the pairs for
independent, so it is too small if one prompt has many of them.)

    python -m variants.win_rate --judge runs/reward_model A.jsonl B.jsonl

The files have lines of {"prompt", "response"}, as variants.on_policy_pairs leaves them in
samples.jsonl. The first response to a prompt in A meets the first one to this prompt in B, and so
on. Two warnings:
- A judge that was also the reward of the training is not fair: the policy has learned its errors.
- A reward model reads one response at a time, so it has no position bias. A judge that reads both
  at once, as GPT-4 does in the DPO paper, often prefers the first one (Zheng et al. 2023,
  arXiv:2306.05685v4, 3.3). It has to be asked in both orders.
"""

import json

import torch
from tqdm import tqdm

from model import Run, fail, launch, load_model, new_parser, read_jsonl, read_row
from reward_model import reward_scores, split_batch


def win_rate(a, b):
    """(share of pairs in which b is the better one, its standard error). Scores a, b: (P,)."""
    wins = 0.5 + (b - a).sign() / 2  # (P,): 1, 0, or 0.5 for a tie
    return float(wins.mean()), float(wins.std(correction=0) / len(wins) ** 0.5)


def load_judge(name, device):
    """A reward model and its tokenizer."""
    judge, tokenizer = load_model(name, "reward", device)
    if "SequenceClassification" not in str(judge.config.architectures):
        fail(f"{name}: this is a language model; reward_model.py makes a reward model of it")
    return judge, tokenizer


@torch.no_grad()
def score_responses(judge, tokenizer, rows, max_tokens):
    """The judge's score of the "response" to the "prompt" of each row: (len(rows),)."""
    examples = [tokenizer.encode_example(row["prompt"], row["response"], tokenizer.context)
                for row in rows]
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
    a, b = (score_responses(judge, tokenizer, side, args.max_tokens) for side in zip(*pairs))
    rate, error = win_rate(a, b)
    columns = {
        "A": {"win_rate": 1 - rate, "scores/mean": float(a.mean())},
        "B": {"win_rate": rate, "scores/mean": float(b.mean()), "standard_error": error}}
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
