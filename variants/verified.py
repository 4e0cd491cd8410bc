"""Rewards that are checked: 1 for what is right, 0 for all else. No reward model is needed.

Each reward here is a function of prompts and texts that returns scores (B,). grpo.py uses them.
PPO and RAFT can take them, too, or a reward of your own (docs/grpo.md):

    python -m variants.grpo --data mine.jsonl --model gpt2 --beta 0.02   # {"prompt", "answer"}
    python -m variants.grpo --toy instructions --requirements 2          # the toy of hir.py

`verify` is the rule for --data. Replace it by your own, such as one that runs a program.
"""

import copy
import json

import torch

from hir import ask, evaluate, final, read_tasks, relabel, toy_done, toy_warm_up
from model import fail, read_jsonl, read_row


def verify(text, answer, match="all"):
    """1 if the text gives the answer, else 0: the rule of hir.py.

    match: what is compared; see `final`. For a response that did not end the verdict is not used:
    its score is --missing_eos_score.
    """
    return float(final(text, match) == final(answer, match))


def load_verifier(tokenizer, path, rule=verify, match="all"):
    """The reward for a file of {"prompt", "answer"}: a function (prompts, texts) -> scores (B,).

    A prompt may have several answers, in rows of their own. Each of them is right.
    """
    answers = {}
    for row in read_jsonl(path):
        asked = json.dumps(read_row(row, tokenizer)["prompt"], sort_keys=True)
        row = read_row(row, tokenizer, "answer")
        example = tokenizer.encode_example(row["prompt"], row["answer"], 10**9)
        if example:  # as it would be learned: a chat template may write more than the answer
            answers.setdefault(asked, []).append(tokenizer.decode(example[1]))
            if final(answers[asked][-1], match) is None:
                fail(f'{row["where"]}: the answer holds no number, which --match number needs')

    def reward(prompts, texts):
        known = [answers[json.dumps(prompt, sort_keys=True)] for prompt in prompts]
        return torch.tensor([max(rule(text, answer, match) for answer in right)
                             for text, right in zip(texts, known)])

    return reward


def load_instructions(policy, tokenizer, args):
    """The toy of hir.py: the reference, prompts, their reward, and the tasks for the evaluation.

    First comes the warm-up of hir.py, which teaches the policy to answer an instruction with any
    review; the reference is the policy after it. The reward is 1 for a review that does all that it
    is asked, else 0.
    """
    args.warm_up = 60  # as in hir.py
    tasks, sets = read_tasks(tokenizer, args, tokenizer.context - args.max_new_tokens)
    wanted = {ask(*task): task[1] for task in tasks}  # {prompt: instruction}
    toy_warm_up(policy, tokenizer, args)

    def reward(prompts, texts):
        return torch.tensor([float(relabel(wanted[prompt], toy_done(text)) == wanted[prompt])
                             for prompt, text in zip(prompts, texts)])

    return copy.deepcopy(policy), list(wanted), reward, sets


def evaluate_instructions(policy, reference, tokenizer, sets, args):
    """The numbers of hir.py, before and after, of --samples for each set; and samples."""
    before, _ = evaluate("before", reference, tokenizer, sets, args)
    after, samples = evaluate("after", policy, tokenizer, sets, args)
    return before | after, samples
