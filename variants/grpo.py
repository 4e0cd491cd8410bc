"""GRPO, RLOO and Dr. GRPO: policy gradients without a value network, and rewards that are checked.

PPO trains a second network that guesses how good a response will be. Here the other samples of the
same prompt tell it: n responses are drawn and scored, and all tokens of response i get the same
advantage A_i, which compares its score r_i with the scores of its group. The loss is

    mean_i 1/D_i sum_t [ -min(q_t A_i, clip(q_t, 1 - e, 1 + e) A_i) + beta k3_t ]

q_t = pi(y_t) / pi_old(y_t), as in PPO. k3 = e^u - 1 - u with u = log pi_ref(y_t)/pi(y_t) estimates
KL(pi || pi_ref). D_i divides the sum over the tokens of response i. The papers differ in three
choices. Each is a flag, and --preset sets all three:

    --preset    --advantage                            --divisor: D_i             --kl
    grpo        group: (r_i - mean) / SD               length: |y_i|              loss: as above
    dr_grpo     centered: r_i - mean                   constant: max_new_tokens   none
    rloo        leave_one_out: r_i - mean of the rest  constant                   reward: see below
    dapo        group                                  tokens: the mean length    none

With --kl reward the scores pay for the KL before they are compared: r_i is then the score minus
beta sum_t log pi_old(y_t)/pi_ref(y_t). With --kl corrected the k3 in the loss is multiplied by q_t.

    python -m variants.grpo                                       # toy: reviews, as in ppo_rlhf.py
    python -m variants.grpo --preset rloo
    python -m variants.grpo --data mine.jsonl --model gpt2 --beta 0.02   # {"prompt", "answer"}

The last command needs no reward model: the reward is 1 for the right answer and 0 for any other
(variants/verified.py). docs/grpo.md shows what each choice does.

Departures from the papers: each step makes four passes over its samples, as ppo_rlhf.py does (GRPO
and RLOO make one update, where q_t is 1). The reference never changes. Of DAPO only the divisor is
here, and not its wider upper clip, its choice of prompts and its penalty for long responses.
"""

import math
import random
import warnings
from statistics import fmean

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import ppo_rlhf
from model import (Run, add_gradients, all_gather, fail, fill_defaults, launch, load_model,
                   save_model, share)
from ppo_rlhf import (evaluate, kl_estimates, load_prompts, load_reward, make_parser, mask_of,
                      no_padding, per_token, rollout, schedule, split_batch, token_logps)
from variants.verified import evaluate_instructions, load_instructions, load_verifier, verify

# ------------------------------------------------------------------------- advantages, the loss


def group_advantages(scores, kind="group"):
    """The advantage of each of n responses to each of P prompts, from their scores: (P, n).

    group: (r - mean) / SD over the n scores. GRPO: Shao et al. 2024, arXiv:2402.03300v3, 4.1.2.
    centered: r - mean. Dr. GRPO: Liu et al. 2025, arXiv:2503.20783v1, 3.2.
    leave_one_out: r - mean of the other n - 1 scores, which is n/(n - 1) times centered. RLOO:
    Ahmadian et al. 2024, arXiv:2402.14740. This baseline does not depend on the response that it
    is subtracted from, so the gradient is unbiased.
    If all scores of a prompt are equal its advantages are 0, and nothing is learned from it.
    """
    n = scores.shape[1]
    centered = scores - scores.mean(1, keepdim=True)  # (P, n)
    if kind == "centered":
        return centered
    if kind == "leave_one_out":
        return centered * n / (n - 1)
    sd = scores.std(1, correction=0, keepdim=True)  # (P, 1)
    return centered / (sd + 1e-4)  # rounding gives equal scores an SD of up to 1e-7


def grpo_loss(logps, old_logps, reference_logps, advantages, mask, divisor, clip=0.2, beta=0.0,
              corrected=False):
    """Minus the clipped objective, plus beta times k3, of each response: (B,).

    GRPO: Shao et al. 2024, arXiv:2402.03300v3, Eq. (3) and (4). logps, old_logps, reference_logps,
    mask: (B, R); log-probs are those of the sampled tokens, in nats. advantages: (B,), one for all
    tokens of a response. divisor: (B,) or a number, which divides the sum over a response's tokens.
    If it is the response's own length, a token of a long response counts less than one of a short
    response; if it is the same number for all responses, all tokens count alike.
    corrected: k3 times the ratio (DeepSeek-V3.2, arXiv:2512.02556, Eq. (7)). Its gradient at each
    token is that of KL(pi || pi_ref); the gradient of k3 alone is that of KL(pi_ref || pi).
    """
    ratio = no_padding(logps - old_logps, mask).exp()  # (B, R)
    A = advantages[:, None]  # (B, 1)
    losses = torch.max(-A * ratio, -A * ratio.clamp(1 - clip, 1 + clip))  # (B, R)
    if beta:
        u = no_padding(reference_logps - logps, mask)  # (B, R)
        k3 = torch.expm1(u) - u
        losses = losses + beta * (k3 * ratio if corrected else k3)
    return no_padding(losses, mask).sum(1) / divisor


# ------------------------------------------------------------------------------------ the loop


def train(args, reward=None):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics.

    reward: a function as in ppo_rlhf.py; None: what the flags say.
    """
    run = Run(args)
    if args.n < 2:
        fail("--n 1: a sample is compared with others of its prompt; give at least 2")

    # 1. The policy, the reference, the prompts and the reward.
    policy, tokenizer = load_model(args.model, "lm", args.device, args.lora_rank)
    fill_defaults(args, ppo_rlhf.DEFAULTS, policy.small)
    if args.toy:
        reference, prompts, reward, sets = load_instructions(policy, tokenizer, args)
    else:
        reference, other = load_model(args.reference or args.model, "lm", args.device)
        if other.transformers.get_vocab() != tokenizer.transformers.get_vocab():
            fail(f"--reference {args.reference}: its tokenizer is not that of --model {args.model}")
        if not reward and args.data and not args.reward_model:
            reward = load_verifier(tokenizer, args.data, verify, args.match)
        prompts, held_out = load_prompts(tokenizer, policy.small, args)
        reward = reward or load_reward(reference, tokenizer, prompts, args)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), eps=1e-5,
                                  weight_decay=0.0, fused=True)
    start = run.load_state(policy, optimizer)["step"]
    beta = args.beta * (args.kl in ("loss", "corrected"))  # in the loss
    price = args.beta * (args.kl == "reward")  # in the reward
    silent = 0  # steps in a row without a prompt to learn from

    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=None)
    for step in progress:
        # 2. The rollout: sample n responses to each of P random prompts, and score them.
        rng = random.Random(f"{args.seed} {step}")
        asked = rng.choices(prompts, k=math.ceil(args.batch_size / args.n))  # P
        sequences, scores, _, row = rollout(policy, reward, tokenizer, asked, args.n,
                                            rng.getrandbits(62), args)
        scores = scores.to(policy.device)  # (P, n)
        if args.toy:  # its reward is another one
            del row["samples/true_reward"]
        if step % args.save_every == 0:
            run.save_state(step, policy, optimizer)

        # 3. Before any update: log-probs of all tokens under policy and reference, computed in the
        # two minibatches of the first pass (see step 5 of ppo_rlhf.py).
        B = len(sequences)
        orders = [rng.sample(range(B), B) for _ in range(args.ppo_epochs)]
        minibatches = [order[i::2] for order in orders for i in (0, 1)]
        mask = mask_of(sequences, policy.device)  # (B, R)
        logps, reference_logps = (  # (B, R) each
            per_token(token_logps, model, sequences, args.max_tokens, minibatches[:2])
            for model in (policy, reference))

        # 4. One advantage for each response. It is a constant in the updates that follow.
        log_ratios = (logps - reference_logps).sum(1).view_as(scores)  # (B, R) -> (B,) -> (P, n)
        # (P, n) -> (B,)
        advantages = group_advantages(scores - price * log_ratios, args.advantage).flatten()

        # 5. What the sum over a response's tokens is divided by.
        lengths = mask.sum(1).to(scores.dtype)  # (B,)
        divisor = torch.ones_like(lengths) * {"length": lengths,
                                              "tokens": lengths.mean(),
                                              "constant": args.max_new_tokens}[args.divisor]

        # 6. A few passes over the rollout, in two minibatches each.
        optimizer.param_groups[0]["lr"] = row["lr"] = args.lr * schedule(step, args.steps)
        losses, norms = [], []
        for minibatch in minibatches:
            for part in share(split_batch([[sequences[b]] for b in minibatch], args.max_tokens)):
                part = [minibatch[i] for i in part]  # b of the B rows
                own = token_logps(policy, [sequences[b] for b in part], mask.shape[1])  # (b, R)
                loss = grpo_loss(own, logps[part], reference_logps[part], advantages[part],
                                 mask[part], divisor[part], beta=beta,
                                 corrected=args.kl == "corrected").sum() / len(minibatch)
                loss.backward()
                losses.append(loss.detach())

            add_gradients(policy)
            norms.append(float(clip_grad_norm_(policy.parameters(), 1.0)))
            if not math.isfinite(norms[-1]):
                fail(f"step {step + 1}: the gradient is not finite; use a lower --lr")
            optimizer.step()
            optimizer.zero_grad()

        # 7. What to watch. scores/equal: the share of prompts whose n scores are all equal. From
        # these only a penalty for KL can be learned.
        k1, k3 = map(float, kl_estimates(logps, reference_logps, mask))
        sd = scores.std(1, correction=0)  # (P,)
        row |= {"step": step + 1,
                "kl/policy_reference": k1,
                "kl/k3": k3,
                "scores/std_per_prompt": float(sd.mean()),
                "scores/equal": float((sd < 1e-6).double().mean()),
                "policy/loss": sum(all_gather(float(sum(losses)))) / len(norms),
                "policy/entropy": -float(logps.sum() / mask.sum()),
                "policy/grad_norm": fmean(norms)}
        silent = silent + 1 if row["scores/equal"] == 1 else 0
        if silent == 5:
            warnings.warn("for 5 steps all samples of each prompt have scored the same, so there "
                          "is nothing to compare; see docs/grpo.md, 'My loss is 0'")
        run.log(row)
        progress.set_postfix(score=row["scores/mean"], kl=k1)

    # 8. Save, then compare with the reference.
    save_model(policy, tokenizer, args.out)
    if args.toy:
        columns, samples = evaluate_instructions(policy, reference, tokenizer, sets, args)
    else:
        columns, samples = evaluate(policy, reference, reward, tokenizer, held_out, args)
    run.report(columns, samples, panels=[
        ["scores/mean", "samples/true_reward"],
        ["kl/policy_reference", "kl/k3"],
        ["scores/equal"]])
    return columns["after"]


PRESETS = {
    "grpo": {"advantage": "group", "divisor": "length", "kl": "loss"},
    "dr_grpo": {"advantage": "centered", "divisor": "constant", "kl": "none"},
    "rloo": {"advantage": "leave_one_out", "divisor": "constant", "kl": "reward"},
    "dapo": {"advantage": "group", "divisor": "tokens", "kl": "none"}}


def parse_args(argv=None):
    """The command line."""
    parser = make_parser(__file__, __doc__, ppo_rlhf.DEFAULTS,
                         '{"prompt", "answer"}; with --reward_model {"prompt"}')
    flag = parser.add_argument
    flag("--preset", default="grpo", choices=PRESETS, help="sets the next three flags")
    flag("--advantage", choices=["group", "centered", "leave_one_out"],
         help="score minus the group's mean, in SDs; minus the mean; minus the others' mean")
    flag("--divisor", choices=["length", "tokens", "constant"],
         help="what divides a response's sum: its length; the mean length; --max_new_tokens")
    flag("--kl", choices=["loss", "corrected", "reward", "none"],
         help="beta k3 in the loss; beta q k3; score less beta log(pi_old / pi_ref); no penalty")
    flag("--beta", type="amount", default=0.5,
         help="price of a nat of KL, in the training and in J; 0.02 is usual with --data")
    flag("--ppo_epochs", type="positive", default=4,
         help="passes over a step's samples, two updates each")
    flag("--match", default="all", choices=["all", "line", "number"],
         help="--data without --reward_model: what of a reply has to equal that of the answer")
    flag("--toy", choices=["instructions"],
         help="the toy of hir.py, rewarded if all is done as asked; None: that of ppo_rlhf.py")
    flag("--requirements", type=int, default=3, choices=[1, 2, 3],
         help="toy instructions ask for 1: a length; 2: and a mood; 3: and a topic")
    args = parser.parse_args(argv)
    if args.toy and (args.data or args.reward_model or args.reference):
        fail("--toy has its own reward: leave out --data, --reward_model and --reference")
    parser.set_defaults(**PRESETS[args.preset])
    if args.toy or args.data and not args.reward_model:
        parser.set_defaults(missing_eos_score=0.0)
    return parser.parse_args(argv)


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
