"""Losses on rankings of several responses: RRHF and PRO.

RRHF: Yuan et al. 2023, arXiv:2304.05302v3. PRO: Song et al. 2023, arXiv:2306.17492.

Both give better responses to a prompt higher mean log-probs p, and add SFT on the best
response. RRHF has a hinge for each pair of scores r_i < r_k. PRO lets each response k compete
with all worse ones i, at temperatures T: 1/T_ki = r_k - r_i, and 1/T_kk is the largest of them:

    RRHF = sum max(0, p_i - p_k) - log pi(best)
    PRO  = sum -log(e^(p_k/T_kk) / (e^(p_k/T_kk) + sum e^(p_i/T_ki))) - weight log pi(best)

    python -m variants.rankings --loss rrhf          # toy: four summaries of each post, ranked
    python -m variants.rankings --loss pro
    python -m variants.rankings --data mine.jsonl    # lines of {"prompt", "responses", "ranks"}

Departure from both papers: files hold ranks (1 is best, ties are allowed) instead of scores, so the
score r of a response is the number of different worse ranks.
"""

import math
import random
from statistics import fmean

import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import simpo
from model import (Run, add_gradients, all_gather, fail, fill_defaults, launch, load_model,
                   read_jsonl, save_model, share, split_by_prompt)
from reward_model import read_ranking
from simpo import (encode_pairs, evaluate, make_parser, response_logps, schedule, split_batch,
                   toy_summaries)

# ---------------------------------------------------------------------------------- the losses
# logps, lengths: (B, K), summed log-probs of K responses, and their numbers of tokens. scores:
# (B, K), higher is better. mask: (B, K), False where a prompt has fewer than K responses. Each
# returns (B,).


def compare(logps, lengths, scores, mask):
    """Mean log-probs p (B, K), gaps (B, K, K), and the summed log-prob of the best response (B,).

    gaps[b, k, i] is r_k - r_i where response i is worse than response k, and 0 elsewhere.
    """
    p = torch.where(mask, logps / lengths.clamp(min=1), 0.0)  # (B, K)
    gaps = (scores[:, :, None] - scores[:, None, :]).clamp(min=0)  # (B, K, K)
    gaps *= mask[:, :, None] * mask[:, None, :]
    best = scores.masked_fill(~mask, -math.inf).argmax(1, keepdim=True)  # (B, 1)
    return p, gaps, logps.gather(1, best).squeeze(1)  # the last one: (B, K) -> (B,)


def rrhf_loss(logps, lengths, scores, mask, sft_weight=1.0):
    """RRHF, Eqs. (2) to (4)."""
    p, gaps, best = compare(logps, lengths, scores, mask)
    hinges = (p[:, None, :] - p[:, :, None]).relu() * (gaps > 0)  # (B, K, K)
    return hinges.sum((1, 2)) - sft_weight * best


def pro_loss(logps, lengths, scores, mask, sft_weight=None):
    """PRO, Eqs. (4) to (7): 1/T_ki = r_k - r_i, and 1/T_kk is the largest 1/T_ki.

    sft_weight None: 0.05 (K - 1)^2, as in the original code.
    """
    p, gaps, best = compare(logps, lengths, scores, mask)
    own = p * gaps.amax(2)  # (B, K): p_k/T_kk, and 0 for the worst
    others = (p[:, None, :] * gaps).masked_fill(gaps == 0, -math.inf)  # (B, K, K): p_i/T_ki
    terms = torch.cat([own[:, :, None], others], 2).logsumexp(2) - own  # (B, K)
    if sft_weight is None:
        sft_weight = 0.05 * (mask.sum(1) - 1) ** 2  # (B,)
    return terms.sum(1) - sft_weight * best


# ---------------------------------------------------------------------------------------- data


def read_rankings(path, tokenizer):
    """Rows with "responses" and "ranks", best first. A pair is a ranking of two.

    The best response is also its "chosen", and the worst its "rejected".
    """
    rows = []
    for row in read_jsonl(path):
        row = read_ranking(row, tokenizer)
        ranks, texts = zip(*sorted(zip(row["ranks"], row["responses"]), key=lambda pair: pair[0]))
        if ranks[0] < ranks[-1]:  # a ranking in which all are tied would teach nothing
            rows.append(dict(row, responses=texts, ranks=ranks, chosen=texts[0],
                             rejected=texts[-1]))
    return rows or fail(f"{path}: in each row all responses are tied")


def encode_rankings(tokenizer, rows, args):
    """For each row {"sequences": K times (prompt ids, response ids), "scores": K numbers}.

    Only the order of the ranks counts: 1, 3, 3, 4 gives the scores 2, 1, 1, 0.
    """
    rankings = []
    for row in rows:
        sequences = [tokenizer.encode_example(row["prompt"], text, args.max_length)
                     for text in row["responses"]]
        ranks = row.get("ranks", range(len(sequences)))  # the toy's responses are in order
        places = sorted(set(ranks), reverse=True)
        rankings.append({"sequences": sequences,
                         "scores": [float(places.index(rank)) for rank in ranks]})
    return rankings


# ------------------------------------------------------------------------------------ the loop


def train(args):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics."""
    run = Run(args)

    # 1. The policy.
    model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    fill_defaults(args, DEFAULTS, model.small)

    # 2. Rankings, from a file or from the toy's human. All rankings of some prompts are held out.
    if args.data:
        rows = read_rankings(args.data, tokenizer)
    else:
        rows = toy_summaries(model, tokenizer, args.pairs, args.length_bias, args.seed, 4,
                             args.max_tokens)
        rows = all_gather(rows)[0]  # those of process 0
    rows, test, _ = split_by_prompt(encode_pairs(tokenizer, rows, args), 256)
    rankings = encode_rankings(tokenizer, rows, args)
    tokenizer.show(*rows[0]["pair"][0])

    # 3. Batches: each epoch visits all rankings in a new order.
    steps = args.steps or args.epochs * math.ceil(len(rankings) / args.batch_size)
    batches = []
    while len(batches) < steps:
        order = random.Random(f"{args.seed} {len(batches)}").sample(rankings, len(rankings))
        batches += [order[i:i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    start = run.load_state(model, optimizer)["step"]

    progress = tqdm(range(start, steps), initial=start, total=steps, disable=None)
    for step in progress:
        # 4. The loss and its gradient, part by part.
        batch, seen = batches[step], [torch.zeros(0, 3, device=model.device)]
        for part in share(split_batch([row["sequences"] for row in batch], args.max_tokens)):
            flat = [sequence for g in part for sequence in batch[g]["sequences"]]
            scores = [torch.tensor(batch[g]["scores"], device=model.device) for g in part]
            scores = pad_sequence(scores, batch_first=True, padding_value=-1)  # (b, K)
            mask = scores >= 0  # (b, K)
            logps, lengths = (torch.zeros(mask.shape, device=model.device).masked_scatter(mask, x)
                              for x in response_logps(model, flat))  # (responses,) -> (b, K)
            if args.loss == "rrhf":
                loss = rrhf_loss(logps, lengths, scores, mask,
                                 1.0 if args.lam is None else args.lam)
            else:
                loss = pro_loss(logps, lengths, scores, mask, args.lam)
            (loss.sum() / len(batch)).backward()
            means = logps / lengths  # (b, K), NaN behind the end of a ranking
            worst = means.gather(1, mask.sum(1, keepdim=True) - 1)  # (b, K) -> (b, 1)
            seen.append(torch.cat([loss[:, None], means[:, :1], worst], 1).detach())  # (b, 3)

        # 5. The update. A state is saved before it, and only if the gradient is finite.
        add_gradients(model)
        norm = float(clip_grad_norm_(model.parameters(), 1.0))
        seen = torch.cat(all_gather(torch.cat(seen).cpu()))  # (b, 3) each -> (B, 3)
        loss, best, worst = seen.unbind(1)  # (B,) each
        if not math.isfinite(norm):
            fail(f"step {step + 1}: the gradient is not finite; use a lower --lr")
        if step % args.save_every == 0:
            run.save_state(step, model, optimizer)
        optimizer.param_groups[0]["lr"] = lr = args.lr * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()

        # 6. What to watch: mean log-probs of the best and the worst response of each ranking.
        row = {
            "step": step + 1,
            "lr": lr,
            "grad_norm": norm,
            "loss": fmean(loss),
            "rewards/chosen": fmean(best),
            "rewards/rejected": fmean(worst),
            "rewards/accuracy": fmean(best > worst)}  # ties count as wrong
        run.log(row)
        progress.set_postfix(loss=row["loss"])

    # 7. Save, then compare with the model at the start, which is loaded again.
    save_model(model, tokenizer, args.out)
    reference, _ = load_model(args.model, device=args.device)
    columns, samples = evaluate(model, reference, tokenizer, test, args)
    run.report(columns, samples, panels=[
        ["loss"],
        ["rewards/chosen", "rewards/rejected"]])
    return columns["after"]


# Defaults: models below 10M parameters; larger ones in the toy; larger ones with --data.
DEFAULTS = simpo.DEFAULTS | {"lr": (3e-4, 1e-5, 1e-5), "batch_size": (32, 32, 32)}


def parse_args(argv=None):
    """The flags that SimPO and rankings share, and those that only rankings have."""
    parser = make_parser(__file__, __doc__, DEFAULTS,
                         '{"prompt", "responses", "ranks"} or of pairs')
    flag = parser.add_argument
    flag("--loss", default="rrhf", choices=["rrhf", "pro"], help="what is minimised")
    flag("--lam", type="amount",
         help="weight of the SFT term; None: 1 for rrhf, 0.05 (K - 1)^2 for pro")
    return parser.parse_args(argv)


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
