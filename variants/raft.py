"""RAFT and best-of-n: rewards without policy gradients (Dong et al. 2023, arXiv:2304.06767v4).

Best-of-n needs no training at all: draw n samples from the reference, keep the one with the highest
reward. Whatever the reward is, its KL divergence from the reference has a bound:

    KL(pi_n || pi_ref) <= log n - (n - 1)/n            Beirami et al. 2024, arXiv:2401.01879v3, 3.1

Stiennon et al. 2020 (App. G.3) state it as an equality. That nearly holds if no two responses have
the same reward, and each response is unlikely.

RAFT puts this into the policy. In each step it draws n samples of each prompt from the policy,
keeps the best, and imitates it, as in supervised fine-tuning:

    loss = - mean_t log pi(y_t | x, y_<t),   y = best of n samples of pi

    python -m variants.raft                          # toy: reviews, rewarded for friendly words
    python -m variants.raft --best_of_n --n 16       # no training: only show the best of 16
    python -m variants.raft --data mine.jsonl --model gpt2 --reward_model runs/reward_model

Departures from the paper: the learning rate falls to 0 over the run, and the optimizer's state is
kept from step to step. There is no penalty: --beta is only what J is measured with.
"""

import math
import random
from statistics import fmean

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import ppo_rlhf
from model import (Run, add_gradients, all_gather, fail, fill_defaults, launch, load_model,
                   save_model, share)
from ppo_rlhf import (evaluate, kl_estimates, load_prompts, load_reward, make_parser, mask_of,
                      per_token, rollout, schedule, split_batch, token_logps, toy_grammatical,
                      toy_reward, yardstick)
from sft import sft_loss

# ---------------------------------------------------------------------------------- best of n


def best_of_n_log_ratio(rewards, pool, n):
    """log pi_n(y)/pi_ref(y), where pi_n is best-of-n, from the reward of y: (P, m).

    rewards: (P, m) rewards of any m responses to each of P prompts. pool: (P, M) rewards of samples
    of the reference, which include `rewards`. The best of n has reward r with probability
    F(r)^n - F_(r)^n, where F is the share of rewards <= r, and F_ is the share of rewards < r.
    """
    F = (pool[:, None] <= rewards[..., None]).double().mean(2)  # (P, m, M) -> (P, m)
    F_ = (pool[:, None] < rewards[..., None]).double().mean(2)  # (P, m, M) -> (P, m)
    return torch.log((F**n - F_**n) / (F - F_))


def evaluate_best_of_n(reference, reward, tokenizer, prompts, args):
    """{"before": metrics of the reference, "after": of the best of n of its samples}, and samples.
    """
    count = args.samples
    _, single, old_texts, before = rollout(
        reference, reward, tokenizer, prompts, count, args.seed, args)  # single: (P, count)
    sequences, scores, texts, _ = rollout(
        reference, reward, tokenizer, prompts, count * args.n, args.seed + 1, args)
    best = scores.view(-1, args.n).argmax(1)  # (P, count * n) -> (P * count, n) -> (P * count,)
    best = [i * args.n + b for i, b in enumerate(best.tolist())]  # places among all samples
    texts = [texts[i] for i in best]
    responses = [sequences[i][1] for i in best]
    chosen = scores.flatten()[best].view(-1, count)  # (P * count * n,) -> (P, count)

    rewards = torch.cat([single, chosen], 1).double()  # (P, 2 * count)
    pool = torch.cat([single, scores], 1).double()  # (P, count + count * n)
    log_ratio = best_of_n_log_ratio(rewards, pool, args.n)  # (P, 2 * count)
    after = {
        "scores/mean": float(chosen.mean()),
        "samples/tokens": fmean(map(len, responses))}
    if not args.data:
        after["samples/true_reward"] = fmean(map(toy_reward, texts))
        if reference.small:
            after["samples/grammatical"] = fmean(map(toy_grammatical, texts))
    after["kl/policy_reference"] = float(log_ratio[:, count:].mean())
    after["kl/bound"] = math.log(args.n) - (args.n - 1) / args.n
    if args.beta:  # the yardstick reads only the difference of the two log-probs
        after |= yardstick(rewards, log_ratio, torch.zeros_like(log_ratio), args.beta)
    shown = zip(prompts, old_texts[::count], texts[::count])
    samples = [{"prompt": prompt, "before": old_text, "after": new_text}
               for prompt, old_text, new_text in shown]
    return {"before": before, "after": after}, samples


# ------------------------------------------------------------------------------------ the loop


def train(args, reward=None):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics.

    reward: as in ppo_rlhf.py.
    """
    run = Run(args)

    # 1. The policy, the reference, the prompts, and the reward model if there is one.
    policy, tokenizer = load_model(args.model, "lm", args.device, args.lora_rank)
    fill_defaults(args, ppo_rlhf.DEFAULTS, policy.small)
    reference, other = load_model(args.reference or args.model, "lm", args.device)
    if other.transformers.get_vocab() != tokenizer.transformers.get_vocab():
        fail(f"--reference {args.reference}: its tokenizer is not that of --model {args.model}")
    prompts, held_out = load_prompts(tokenizer, policy.small, args)
    reward = reward or load_reward(reference, tokenizer, prompts, args)
    if args.best_of_n:
        run.begin()
        columns, samples = evaluate_best_of_n(reference, reward, tokenizer, held_out, args)
        run.report(columns, samples, panels=[])
        return columns["after"]
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), eps=1e-5,
                                  weight_decay=0.0, fused=True)
    start = run.load_state(policy, optimizer)["step"]

    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=None)
    for step in progress:
        # 2. The rollout: sample n responses to each of P prompts, score them, and keep the best.
        rng = random.Random(f"{args.seed} {step}")
        P = math.ceil(args.batch_size / args.n)
        asked = rng.choices(prompts, k=P)
        sequences, scores, _, row = rollout(policy, reward, tokenizer, asked, args.n,
                                            rng.getrandbits(62), args)  # scores: (P, n)
        best = [sequences[p * args.n + b] for p, b in enumerate(scores.argmax(1).tolist())]
        if step % args.save_every == 0:
            run.save_state(step, policy, optimizer)

        # 3. How far the policy is from the reference, on all samples.
        logps = per_token(token_logps, policy, sequences, args.max_tokens)  # (B, R)
        reference_logps = per_token(token_logps, reference, sequences, args.max_tokens)
        mask = mask_of(sequences, policy.device)  # (B, R)
        k1, k3 = kl_estimates(logps, reference_logps, mask)

        # 4. A few passes over the best responses, in minibatches, with the loss of SFT.
        optimizer.param_groups[0]["lr"] = lr = args.lr * schedule(step, args.steps)
        losses, norms = [], []
        passes = [rng.sample(best, P) for _ in range(args.epochs)]
        for minibatch in [order[i::2] for order in passes for i in range(min(2, P))]:
            tokens = sum(len(response) for _, response in minibatch)
            for part in share(split_batch([[x] for x in minibatch], args.max_tokens)):
                part = [minibatch[b] for b in part]
                own = mask_of(part, policy.device)  # (b, r)
                loss = sft_loss(token_logps(policy, part, own.shape[1]), own, normalizer=tokens)
                loss.backward()
                losses.append(loss.detach())

            add_gradients(policy)
            norms.append(float(clip_grad_norm_(policy.parameters(), 1.0)))
            if not math.isfinite(norms[-1]):
                fail(f"step {step + 1}: the gradient is not finite; use a lower --lr")
            optimizer.step()
            optimizer.zero_grad()

        # 5. What to watch.
        row |= {"step": step + 1,
                "lr": lr,
                "kl/policy_reference": float(k1),
                "kl/k3": float(k3),
                "scores/std_per_prompt": float(scores.std(1, correction=0).mean()),
                "policy/loss": sum(all_gather(float(sum(losses)))) / len(norms),
                "policy/entropy": -float(logps.sum() / mask.sum()),
                "policy/grad_norm": fmean(norms)}
        run.log(row)
        progress.set_postfix(score=row["scores/mean"], kl=row["kl/policy_reference"])

    # 6. Save, then compare with the reference.
    save_model(policy, tokenizer, args.out)
    columns, samples = evaluate(policy, reference, reward, tokenizer, held_out, args)
    run.report(columns, samples, panels=[
        ["scores/mean", "samples/true_reward"],
        ["kl/policy_reference", "kl/k3"],
        ["policy/loss", "policy/entropy"]])
    return columns["after"]


def parse_args(argv=None):
    """The command line."""
    parser = make_parser(__file__, __doc__, ppo_rlhf.DEFAULTS)
    flag = parser.add_argument
    flag("--beta", type="amount", default=0.5,
         help="evaluation: price of a nat of KL in J; training has no penalty")
    flag("--epochs", type="positive", default=4,
         help="passes over a step's best samples, two updates each")
    flag("--best_of_n", action="store_true",
         help="no training: compare single samples with the best of --n samples")
    return parser.parse_args(argv)


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
