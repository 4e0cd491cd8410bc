"""On-policy preference pairs: a model's own samples, judged by a reward model.

Of n responses to each prompt the best one becomes "chosen" and the worst one "rejected", so the
pairs are about what the policy really writes, and no human is asked. SimPO's "Instruct setting"
makes its data so (Meng et al. 2024, arXiv:2405.14734v3, 3), with n = 5. If the reward model has
learned from an AI's verdicts, this is RLAIF. Repeating it with the new policy is iterated DPO:

    python reward_model.py
    python -m variants.on_policy_pairs --reward_model runs/reward_model
    python dpo.py --data runs/on_policy_pairs/pairs.jsonl
    python -m variants.on_policy_pairs --reward_model runs/reward_model --model runs/dpo --seed 1

Two results are left in --out: pairs.jsonl, for dpo.py --data and simpo.py --data, and samples.jsonl
with every response and its score, for variants.win_rate. A response that does not end within
--max_new_tokens is cut behind its last full stop; without one, nothing is left of it.
"""

import json
import os
import random
from pathlib import Path

import torch

from model import RANK, Run, fail, launch, load_model, new_parser, number, read_jsonl, read_row
from reward_model import sample, toy_prompts, toy_reward
from variants.win_rate import load_judge, score_responses


def best_and_worst(samples):
    """A pair of the best and the worst response to a prompt, or None if they do not differ.

    samples: rows of one prompt, {"prompt", "response", "score"}.
    """
    if not samples:
        return None
    best = max(samples, key=lambda row: row["score"])
    worst = min(samples, key=lambda row: row["score"])
    if best["score"] == worst["score"] or best["response"] == worst["response"]:
        return None
    return {"prompt": best["prompt"], "chosen": best["response"], "rejected": worst["response"],
            "chosen_score": best["score"], "rejected_score": worst["score"]}


def write_lines(folder, name, rows):
    """Write a JSON Lines file: all of it, or nothing."""
    if RANK:
        return
    new = Path(folder, f"{name}.new")
    try:
        new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(new, Path(folder, name))
    finally:
        new.unlink(missing_ok=True)


def collect(args):
    """Sample, score, and write the pairs. Returns them."""
    run = Run(args)
    for name in ("samples.jsonl", "pairs.jsonl"):
        if args.data and Path(args.data).resolve() == Path(args.out, name).resolve():
            fail(f"--data {args.data}: this run would overwrite it; give another --out")
    model, tokenizer = load_model(args.model, device=args.device)
    judge = load_judge(args.reward_model, args.device) if args.reward_model else None
    if args.data:
        if not args.reward_model:
            fail("--data: the toy's reward does not fit your prompts; give a --reward_model")
        rows = [read_row(row, tokenizer) for row in read_jsonl(args.data)]
    else:
        prompts = random.Random(args.seed).choices(toy_prompts(model.small), k=args.prompts)
        rows = [{"prompt": prompt} for prompt in prompts]
    room = tokenizer.context - args.max_new_tokens
    prompts = [row["prompt"] for row in rows
               if len(tokenizer.encode_prompt(row["prompt"])) <= room]
    if not prompts:
        fail(f"no prompt leaves room for --max_new_tokens {args.max_new_tokens} in the model's "
             f"context of {tokenizer.context} tokens")

    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(args.n)]
    temperature = args.temperature or 1e-4  # for 0: it draws the likeliest token, too
    responses = sample(model, tokenizer, asked, args.max_new_tokens, args.seed, temperature,
                       max_tokens=4 * args.max_tokens)
    texts = [tokenizer.decode(ids, whole=True) for ids in responses]
    groups = [[{"prompt": prompt, "response": text} for text in texts[i * args.n:][:args.n] if text]
              for i, prompt in enumerate(prompts)]
    samples = [row for group in groups for row in group]
    if not samples:
        fail("no sample holds a whole sentence; use a higher --max_new_tokens")
    scores = [toy_reward(row["response"]) for row in samples]
    if judge:
        scores = score_responses(*judge, samples, args.max_tokens).tolist()
    for row, score in zip(samples, scores):
        row["score"] = score

    pairs = [pair for pair in map(best_and_worst, groups) if pair]
    counts = {"pairs": len(pairs),
              "prompts left out without room for --max_new_tokens": len(rows) - len(prompts),
              "prompts left out without two different scores": len(groups) - len(pairs),
              "responses left out without a whole sentence": len(texts) - len(samples)}
    found = "; ".join(f"{count} {what}" for what, count in counts.items() if count)
    print(found)
    if not pairs:
        fail(f"no pair is left: {found}")
    run.begin()
    write_lines(args.out, "samples.jsonl", samples)
    write_lines(args.out, "pairs.jsonl", pairs)
    print(f"they are in {args.out}/pairs.jsonl")
    return pairs


def parse_args(argv=None):
    """The command line."""
    parser = new_parser(__file__, __doc__, trains=False)
    flag = parser.add_argument
    flag("--model", default="tiny", help="the policy: tiny, a folder, or a hub id such as gpt2")
    flag("--reward_model", help="folder or hub id of a reward model; None: the toy's true reward")
    flag("--data", help='JSON Lines file of {"prompt"}; None: the toy task')
    flag("--n", type=number(2), default=5, help="responses to each prompt")
    flag("--temperature", type="amount", default=1.0, help="of sampling; SimPO took 0.8")
    flag("--max_new_tokens", type="positive", default=64, help="tokens of the longest response")
    flag("--prompts", type="positive", default=2048, help="toy: prompts to sample for")
    flag("--seed", type="whole", default=0, help="the same seed gives the same pairs")
    return parser.parse_args(argv)


def main(argv=None):
    launch(collect, parse_args(argv))


if __name__ == "__main__":
    main()
