"""Reward model: step 2 of InstructGPT, Ouyang et al. 2022, arXiv:2203.02155v1, 3.5.

Learn a score r(x, y) from comparisons, so that sigma(r(x, y_i) - r(x, y_j)) is the probability that
a human prefers response y_i to y_j (Bradley and Terry's model). From K ranked responses a prompt:

    loss = - 1/C(K, 2)  sum over pairs, i better than j,  of  log sigma(r_i - r_j)               (1)

K = 2 is the ordinary pairwise loss. Where a human only picks the best of K, as in Ziegler et al.
2019, arXiv:1909.08593v2, Eq. (1), it is --loss best_of_k:  loss = - log softmax(r_1 ... r_K)_best

    python reward_model.py                             # toy: reviews, ranked by a noisy human
    python reward_model.py --data mine.jsonl --model gpt2    # lines of {"prompt", "chosen",
    python reward_model.py --loss best_of_k            # "rejected"} or "responses" and "ranks"

Where this departs from the papers, and why:
1. Scores are normalised after training only, to mean 0 and SD 1 on samples of the reference policy,
   by changing the weights themselves; a difference of saved scores is the gain times log-odds.
   Ziegler et al. normalise before training too, and train gain and bias along; InstructGPT shifts
   the mean only, to 0 on demonstrations.
2. The learning rate falls to 0 after a warm-up (InstructGPT: cosine to 10 %), and Adam is the
   scripts' common one. One epoch, as in both papers; InstructGPT reports that more overfit.
3. Tied pairs are dropped, as in the paper, but the divisor stays C(K, 2): a ranking with ties says
   less and counts less.
(Eq. (1) of Ziegler et al. is printed without its minus.)
"""

import argparse
import itertools
import json
import math
import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from model import (check_finite, check_flags, checkpoint, common_flags, deferred_interrupt, fail,
                   get_text, load_model, load_state, open_log, plot, read_jsonl, report, restore,
                   save_model, save_state, settle, split_by_prompt, stopped)

# ---------------------------------------------------------------------------------- the losses


def ranking_loss(rewards, ranks):
    """Mean of -log sigma(r_i - r_j) over a prompt's pairs, i better than j: InstructGPT, Eq. (1).

    rewards: (B, K) scores; ranks: (B, K) whole numbers, 1 is best, 0 is padding. Tied pairs add
    nothing, but the divisor is C(K, 2) of all K real responses. Returns (B,), in nats a pair.
    """
    better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks > 0)[:, :, None]  # (B, K, K): i, j
    margins = (rewards[:, :, None] - rewards[:, None, :]).masked_fill(~better, 0)  # (B, K, K)
    K = (ranks > 0).sum(1)  # (B,)
    return (F.softplus(-margins) * better).sum((1, 2)) / (K * (K - 1) / 2).clamp(min=1)


def best_of_k_loss(rewards, best):
    """-log softmax(r)[best], the human having picked one of K: Ziegler et al. 2019, Eq. (1).

    rewards: (B, K) scores, -inf where a prompt has fewer than K responses; best: (B,) index of the
    one that was picked. Returns (B,), in nats.
    """
    return F.cross_entropy(rewards, best, reduction="none")


# ----------------------------------------------------------------------------------- the scores


def reward_scores(model, batch):
    """The score of each sequence of a batch made by `collate`: (B,).

    Read at the last real token, found by its length. (transformers looks for the last token that is
    not padding: where the pad token is EOS, as here, it reads the token before a final EOS.)
    """
    hidden = model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"], use_cache=False).last_hidden_state  # (B, T, D)
    hidden = hidden.flatten(0, 1).index_select(0, batch["last"])  # (B*T, D) -> (B, D)
    with torch.autocast(hidden.device.type, enabled=False):  # the score itself is in fp32
        return model.score(hidden.to(model.score.weight.dtype)).squeeze(1)  # (B, 1) -> (B,)


def collate(sequences, device):
    """A batch of B (prompt ids, response ids), padded on the right to T tokens.

    The lists that say where the N response tokens stand, and which of a response is the last, are
    made here, on the host, so that the device never has to be asked. Masks come from lengths: a pad
    may share its id with EOS. "padding" is the share of pads.
    """
    B, T = len(sequences), max(len(p) + len(r) for p, r in sequences)
    input_ids, attention_mask = torch.zeros(2, B, T, dtype=torch.long)
    index, targets, rows, last = [], [], [], []
    for b, (prompt, response) in enumerate(sequences):
        length = len(prompt) + len(response)
        input_ids[b, :length] = torch.tensor(prompt + response)
        attention_mask[b, :length] = 1
        index += range(b * T + len(prompt) - 1, b * T + length - 1)  # t - 1 predicts token t
        targets += response
        rows += [b] * len(response)
        last.append(b * T + length - 1)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask,
             "position_ids": torch.arange(T).expand(B, T), "index": torch.tensor(index),
             "targets": torch.tensor(targets), "rows": torch.tensor(rows),
             "last": torch.tensor(last)}
    batch = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
    return batch | {"padding": 1 - float(attention_mask.float().mean())}


def fill_rows(sizes):
    """Where groups of these sizes, in tokens, stand in rows of T: (B, T, flat places in B*T).

    Longest first, each goes to the row with most room. Of all numbers of rows B the cheapest: pads
    cost what tokens cost, and attention costs a token T / 6D of the rest, here for D = 1000.
    """
    plans = []
    for B in range(1, len(sizes) + 1):
        used, spots = [0] * B, [None] * len(sizes)
        for g in sorted(range(len(sizes)), key=lambda g: -sizes[g]):
            b = used.index(min(used))
            spots[g] = b, used[b]
            used[b] += sizes[g]
        T = max(used)
        plans.append((B * T * (1 + T / 6000), B, T, spots))
    _, B, T, spots = min(plans)
    return B, T, [b * T + t for b, t in spots]


def collate_packed(sequences, device):
    """As `collate`, but consecutive sequences of one prompt share it, and few pads are left.

    A group is [prompt | y_1 | ... | y_K]; a row holds one or several. Positions restart with each
    group, and behind its prompt with each response; a token sees its own block and its prompt, and
    no other. So every hidden state is what it would be in a row of its own.
    """
    groups = [list(group) for _, group in itertools.groupby(sequences, lambda pair: pair[0])]
    sizes = [len(group[0][0]) + sum(len(response) for _, response in group) for group in groups]
    B, T, starts = fill_rows(sizes)
    input_ids, position_ids, block, root = torch.zeros(4, B * T, dtype=torch.long)
    index, targets, rows, last = [], [], [], []
    for start, size, group in zip(starts, sizes, groups, strict=True):
        prompt = group[0][0]
        root[start:start + size] = start + 1  # a block is known by its first place, a pad by 0
        first = start + len(prompt) - 1  # the prompt's end predicts the start of each response
        for k, ids in enumerate([prompt, *(response for _, response in group)]):
            end, position = start + len(ids), len(prompt) if k else 0
            input_ids[start:end] = torch.tensor(ids)
            position_ids[start:end] = torch.arange(position, position + len(ids))
            block[start:end] = start + 1
            if k:
                index += [first, *range(start, end - 1)]
                targets += ids
                rows += [len(last)] * len(ids)
                last.append(end - 1)
            start = end
    batch = {"input_ids": input_ids, "position_ids": position_ids, "block": block, "root": root}
    batch = {key: tensor.view(B, T) for key, tensor in batch.items()}  # (B*T,) -> (B, T)
    batch |= {"index": torch.tensor(index), "targets": torch.tensor(targets),
              "rows": torch.tensor(rows), "last": torch.tensor(last)}
    batch = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
    block, root = batch.pop("block"), batch.pop("root")
    seen = (block[:, None] == block[:, :, None]) | (block[:, None] == root[:, :, None])  # (B, T, T)
    seen &= torch.ones(T, T, dtype=torch.bool, device=device).tril()  # by whom, what
    return batch | {"attention_mask": seen[:, None], "padding": 1 - sum(sizes) / (B * T)}


@torch.no_grad()
def can_pack(function, model, sequences):
    """Whether function(model, batch) is the same for responses to one prompt in one packed row.

    Not where attention reaches back a fixed number of tokens or a state runs along the row, nor
    with kernels that take no mask of one's own. Then each response gets a row with its prompt.
    """
    try:
        packed, alone = (function(model, place(sequences, model.device)).float()
                         for place in (collate_packed, collate))
        same = bool(((packed - alone).abs() <= 3e-5 * (1 + alone.abs())).all())
    except (RuntimeError, TypeError, ValueError):
        same = False
    if not same:
        print("this model cannot read responses to one prompt in one row; each gets its own")
    return same


@torch.no_grad()
def rate(model, sequences, autocast, size=64):
    """Scores of any number of (prompt ids, response ids): (len(sequences),)."""
    with autocast:
        parts = [reward_scores(model, collate(sequences[i:i + size], model.device))
                 for i in range(0, len(sequences), size)]
    return torch.cat(parts).float().cpu()


def gain_and_bias(scores):
    """(gain, bias) with which gain * scores + bias has mean 0 and SD 1; scores: (n,)."""
    gain = 1 / scores.std(correction=0)
    return gain, -gain * scores.mean()


@torch.no_grad()
def normalize(model, sequences, autocast):
    """Give the scores of these sequences mean 0 and SD 1, inside the model's weights.

    sequences: (prompt ids, response ids), samples of the reference policy (Ziegler et al. 2019).
    Returns (gain, bias): what score r was is now gain * r + bias, wherever the model is loaded.
    """
    scores = rate(model, sequences, autocast)
    gain, bias = (float(x) for x in gain_and_bias(scores))
    if not math.isfinite(gain):
        print(f"warning: {len(scores)} samples have one and the same score; it stays as it is")
        return 1.0, 0.0
    head = model.score
    # Most heads have no bias. The final norm's does the same: w (h + b) = w h + bias for
    # b = bias w / |w|^2. It is the norm outside of the blocks, which have numbers for names.
    norms = [m for name, m in model.base_model.named_modules()
             if isinstance(m, nn.LayerNorm) and m.bias is not None and not re.search(r"\d", name)]
    if head.bias is not None:
        head.bias.mul_(gain).add_(bias)
    elif norms:
        norms[-1].bias.add_(bias / gain * head.weight[0] / head.weight.square().sum())
    head.weight.mul_(gain)
    now = float(rate(model, sequences, autocast).mean())
    if abs(now) > 0.02:
        print(f"warning: neither head nor final norm has a bias; scores keep a mean of {now:.2f}")
        bias += now
    return gain, bias


# -------------------------------------------------------------------------------- the toy task

POSITIVE = "amazing brilliant charming delightful funny gripping moving superb wonderful".split()
NEGATIVE = "awful bland boring clumsy dull shallow tedious terrible weak".split()


def toy_prompts(held_out):
    """Prompts of the sentiment task, in a fixed random order: the last 40 are held out."""
    prompts = [f"{who} {saw} the {show} {when}."
               for who in ("I", "We", "My sister", "Our class", "Two friends")
               for saw in ("saw", "watched")
               for show in ("film", "movie", "musical", "opera", "play", "series")
               for when in ("last night", "yesterday", "on Friday", "in London", "with friends")]
    random.Random(0).shuffle(prompts)
    return prompts[-40:] if held_out else prompts[:-40]


def toy_reward(review):
    """The true reward: positive words minus negative words, wherever they stand."""
    words = re.findall(r"\w+", review)
    return float(sum((word in POSITIVE) - (word in NEGATIVE) for word in words))


def toy_ranks(responses, rng):
    """A noisy human's ranks, 1 is best: each place goes to one of those left with odds e^reward.

    That is Plackett and Luce's model; of two responses alone it is Bradley and Terry's. Drawn by
    adding Gumbel noise to the true rewards and sorting.
    """
    noisy = [toy_reward(text) - math.log(rng.expovariate(1)) for text in responses]
    return [1 + sum(other > own for other in noisy) for own in noisy]


def toy_rankings(model, tokenizer, count, k, seed, held_out=False):
    """Rows {"prompt", "responses", "ranks"}: k samples of the model, ranked by a noisy human."""
    rng = random.Random(seed)
    prompts = [rng.choice(toy_prompts(held_out)) for _ in range(count)]
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(k)]
    texts = [tokenizer.decode(ids) for ids in sample(model, tokenizer, asked, 64, seed)[0]]
    groups = [texts[i:i + k] for i in range(0, len(texts), k)]
    return [{"prompt": prompt, "responses": group, "ranks": toy_ranks(group, rng)}
            for prompt, group in zip(prompts, groups, strict=True)]


# ---------------------------------------------------------------------------------------- data


def read_rankings(path):
    """Rows {"prompt", "responses", "ranks"}; of a pair the chosen response has rank 1."""
    example = '{"prompt": "...", "chosen": "...", "rejected": "..."}'
    rows = []
    for place, row in read_jsonl(path):
        prompt = get_text(place, row, "prompt", example)
        if "responses" in row:
            texts, ranks = row["responses"], row.get("ranks")
            if not (isinstance(texts, list) and isinstance(ranks, list) and len(texts) == len(ranks)
                    and all(type(rank) is int and 0 < rank < 2**31 for rank in ranks)):
                fail(f'{place}: "responses" needs as many "ranks", whole numbers from 1 (the best)')
            texts = [get_text(place, {"responses": text}, "responses", example) for text in texts]
        else:
            texts = [get_text(place, row, key, example) for key in ("chosen", "rejected")]
            ranks = [1, 2]
        rows.append({"prompt": prompt, "responses": texts, "ranks": ranks})
    return rows


def encode_rankings(tokenizer, rows, max_length, loss):
    """Examples ([(prompt ids, response ids)], ranks), and counts of what is lost.

    Of responses that are identical once they are cut, the first stays. A row is left out where the
    rest are all tied, or where for best_of_k more than one is best.
    """
    examples, lost = [], {"dropped": 0, "identical": 0, "tied": 0, "cut": 0}
    for row in rows:
        ids = [tokenizer.encode_example(row["prompt"], text, max_length)
               for text in row["responses"]]
        if None in ids:
            lost["dropped"] += 1
            continue
        kept = [i for i in range(len(ids)) if ids[i] not in ids[:i]]
        ids, ranks = [ids[i] for i in kept], [row["ranks"][i] for i in kept]
        lost["identical"] += len(row["ranks"]) - len(ranks)
        if len(set(ranks)) < 2 or (loss == "best_of_k" and ranks.count(min(ranks)) > 1):
            lost["tied"] += 1
            continue
        lost["cut"] += sum(response[-1] != tokenizer.eos_id for _, response in ids)
        examples.append((ids, ranks))
    return examples, lost


def pad_ranks(examples):
    """Ranks of B examples with up to K responses: (B, K), 0 where a prompt has fewer."""
    return nn.utils.rnn.pad_sequence([torch.tensor(ranks) for _, ranks in examples],
                                     batch_first=True)


# ---------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def sample(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, size=256):
    """A response of the model's own distribution to each list of prompt ids, with its EOS.

    Returns (responses, logps): token ids, and their log-probs at that temperature, a list for each
    prompt. From the whole vocabulary: no top-k, no top-p. Prompts of like length stand together,
    padded on the left; once half of a batch has ended, the others go on alone.
    """
    torch.manual_seed(seed)
    eos, context = tokenizer.eos_id, getattr(model.config, "max_position_embeddings", 1024)
    responses, logps = [[] for _ in prompts], [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for rows in (order[i:i + size] for i in range(0, len(order), size)):  # B prompts
        T, cache = len(prompts[rows[-1]]), None
        pads = [T - len(prompts[i]) for i in rows]
        ids = torch.tensor([[eos] * n + prompts[i] for n, i in zip(pads, rows)]).to(model.device)
        mask = torch.tensor([[0] * n + [1] * (T - n) for n in pads]).to(model.device)  # (B, T)
        for _ in range(min(max_new_tokens, context - T)):
            new = 1 if cache else ids.shape[1]  # tokens that the cache does not hold
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, T), T growing: pads shift nobody
            out = model(input_ids=ids[:, -new:], attention_mask=mask, past_key_values=cache,
                        position_ids=positions[:, -new:], use_cache=True, logits_to_keep=1)
            cache = out.get("past_key_values")  # state-space models have none, and read all again
            every = (out.logits[:, -1].float() / temperature).log_softmax(1)  # (B, V)
            # With E drawn from Exp(1) for each token, argmax p/E is a draw from p.
            token = (every.exp() / torch.empty_like(every).exponential_()).argmax(1, True)  # (B, 1)
            logp = every.gather(1, token)  # (B, V) -> (B, 1)
            for i, t, p in zip(rows, token[:, 0].tolist(), logp[:, 0].tolist(), strict=True):
                if eos not in responses[i][-1:]:
                    responses[i].append(t)
                    logps[i].append(p)
            ids = torch.cat([ids, token], 1)  # (B, T + 1)
            mask = torch.cat([mask, torch.ones_like(token)], 1)  # (B, T + 1)
            going = [b for b, i in enumerate(rows) if responses[i][-1] != eos]
            if not going:
                break
            if 2 * len(going) <= len(rows):
                keep = torch.tensor(going).to(model.device)
                ids, mask, rows = ids[keep], mask[keep], [rows[b] for b in going]
                if cache:
                    cache.batch_select_indices(keep)
    return responses, logps


def average_ranks(x):
    """Rank of each of (n,) numbers among all, ties sharing the middle of their ranks: (n,)."""
    return (x[:, None] > x).double().sum(1) + 0.5 * (x[:, None] == x).double().sum(1)


def evaluate(model, test, truths, autocast):
    """(metrics, (predicted, observed) win rates, scores) on held-out rankings.

    test: examples of `encode_rankings`; truths: true rewards of all their responses (n,), or None.
    """
    scores = rate(model, [ids for responses, _ in test for ids in responses], autocast)  # (n,)
    ranks = pad_ranks(test)  # (B, K)
    real = ranks > 0  # (B, K)
    rewards = torch.zeros(real.shape).masked_scatter(real, scores)  # (n,) -> (B, K)
    i, j = torch.triu_indices(real.shape[1], real.shape[1], 1)  # (C(K, 2),) each
    pair = real[:, i] & real[:, j] & (ranks[:, i] != ranks[:, j])  # (B, C(K, 2)): no ties
    margin = (rewards[:, i] - rewards[:, j])[pair]  # (P,)
    won = (ranks[:, i] < ranks[:, j])[pair]  # (P,)
    metrics = {"pairs/loss": float(F.softplus(torch.where(won, -margin, margin)).mean()),
               "pairs/accuracy": float(torch.where(won, margin > 0, margin < 0).float().mean())}
    if truths is not None:
        true = torch.zeros(real.shape).masked_scatter(real, truths)  # (n,) -> (B, K)
        # Nobody guesses a Bradley-Terry human better than by the true reward: the Bayes ceiling.
        metrics["pairs/ceiling"] = float(
            torch.sigmoid((true[:, i] - true[:, j]).abs())[pair].mean())
        both = torch.stack([average_ranks(scores), average_ranks(truths)])  # (2, n)
        metrics["true_reward/rank_correlation"] = float(torch.corrcoef(both)[0, 1])

    # Calibration: of the pairs given a win rate of about p, is a share of about p won?
    p = torch.sigmoid(margin)  # (P,)
    tenth = (p * 10).long().clamp(max=9)  # (P,)
    counts = torch.bincount(tenth, minlength=10)  # (10,)
    predicted, observed = (torch.bincount(tenth, x.double(), minlength=10)[counts > 0]
                           / counts[counts > 0] for x in (p, won))  # (up to 10,) each
    weights = counts[counts > 0] / len(p)
    metrics["calibration/error"] = float((weights * (predicted - observed).abs()).sum())
    return metrics, (predicted, observed), rewards


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps):
    """Share of the learning rate: up over the first tenth of the steps, then down to 0."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def train(args):
    """Run the algorithm; returns final metrics; leaves model, log and samples in args.out."""
    # 1. Rankings: of a file, or of samples of the reference policy by the toy's human.
    policy, tokenizer = load_model(args.model, device=args.device)
    if args.data:
        rows, held_out = split_by_prompt(read_rankings(args.data), args.held_out, args.seed)
    else:
        rows = toy_rankings(policy, tokenizer, args.rankings, args.k, args.seed)
        held_out = toy_rankings(policy, tokenizer, max(32, args.rankings // 8), args.k,
                                args.seed + 1, held_out=True)

    # 2. The reward model: the language model's trunk under a new head with one output.
    model, _ = load_model(args.model, head="reward", device=args.device, lora_rank=args.lora_rank)
    autocast = settle(args, model, lr_small=1e-3, lr=1e-5)
    state = load_state(args.out, args) if args.resume else {"step": 0}
    examples, lost = encode_rankings(tokenizer, rows, args.max_length, args.loss)
    test, _ = encode_rankings(tokenizer, held_out, args.max_length, args.loss)
    if not examples or not test:
        fail(f"{args.data or 'toy'}: no row is left {'held out' if examples else 'to learn from'}; "
             f"a row needs responses that differ in rank and fit into --max_length "
             f"{args.max_length}")
    print(f"{len(examples)} rankings, {len(test)} held out. {lost['dropped']} dropped (no room "
          f"behind the prompt), {lost['tied']} all tied; {lost['identical']} responses identical "
          f"to another, {lost['cut']} cut")
    tokenizer.show(*examples[0][0][0])

    # 3. Samples of the reference policy, by which the scores are normalised at the end.
    rng = random.Random(args.seed)
    fits = [row["prompt"] for row in rows
            if len(tokenizer.encode_prompt(row["prompt"])) < args.max_length]
    asked = [tokenizer.encode_prompt(rng.choice(fits)) for _ in range(args.samples)]
    drawn, _ = sample(policy, tokenizer, asked, args.max_new_tokens, args.seed + 2)
    drawn = list(zip(asked, drawn, strict=True))
    del policy

    # 4. Batches, made once. All pairs of a prompt stay together: were they spread over batches, a
    #    response would be learnt from K - 1 times an epoch, and overfitted (InstructGPT, 3.5).
    random.Random(args.seed).shuffle(examples)
    batches = [examples[i:i + args.batch_size] for i in range(0, len(examples), args.batch_size)]
    steps = args.steps or math.ceil(len(batches) * args.epochs)
    order = []
    while len(order) < steps:
        order += random.Random(args.seed + len(order)).sample(range(len(batches)), len(batches))

    # A prompt is computed once for all its responses, if the model can take such rows.
    longest = max((responses for responses, _ in examples),
                  key=lambda responses: sum(len(p) + len(y) for p, y in responses))
    place = collate_packed if can_pack(reward_scores, model, longest) else collate

    # 5. Before.
    texts = [[tokenizer.decode(response) for _, response in responses] for responses, _ in test]
    truths = None if args.data else torch.tensor([toy_reward(t) for row in texts for t in row])
    before, old_curve, _ = evaluate(model, test, truths, autocast)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    if args.resume:
        restore(state, model, optimizer)

    progress = tqdm(range(state["step"], steps), initial=state["step"], total=steps, disable=None)
    with open_log(args.out, args, state["step"]) as log, deferred_interrupt() as pressed:
        for step in progress:
            batch = batches[order[step]]

            # 6. All responses of a prompt, the loss on all its pairs, and the gradient.
            seen, paddings, size = [], [], math.ceil(len(batch) / args.accumulate)
            for i in range(0, len(batch), size):
                part = batch[i:i + size]
                placed = place([ids for responses, _ in part for ids in responses], model.device)
                with autocast:
                    flat = reward_scores(model, placed)  # (n,)
                ranks = pad_ranks(part).to(flat.device)  # (B, K)
                real = ranks > 0  # (B, K)
                rewards = flat.new_zeros(real.shape).masked_scatter(real, flat)  # (n,) -> (B, K)
                if args.loss == "ranking":
                    losses = ranking_loss(rewards, ranks)  # (B,)
                else:
                    best = ranks.masked_fill(~real, 2**62).argmin(1)  # (B,)
                    losses = best_of_k_loss(rewards.masked_fill(~real, -math.inf), best)  # (B,)
                (losses.sum() / len(batch)).backward()
                strict = (ranks[:, :, None] < ranks[:, None, :]) & real[:, :, None]  # (B, K, K)
                right = (rewards[:, :, None] > rewards[:, None, :])[strict]  # (P,)
                seen.append([x.detach() for x in (losses, right.float(), flat)])
                paddings.append(placed["padding"])
            losses, right, flat = (torch.cat(x).cpu() for x in zip(*seen))  # fetched once
            norm = float(torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm))

            # 7. The update. A state is saved before it, of weights that gave a finite loss.
            loss = float(losses.mean())
            checkpoint(args, step, loss + norm, pressed, model, optimizer)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row = {"step": step + 1, "loss": loss, "pairs/accuracy": float(right.mean()),
                   "scores/std": float(flat.std()), "grad_norm": norm, "lr": group["lr"],
                   "padding": sum(paddings) / len(paddings)}
            log.write(json.dumps(row) + "\n")
            progress.set_postfix(loss=f"{loss:.3f}", accuracy=f"{row['pairs/accuracy']:.2f}")
        if steps > state["step"]:  # the last update too must leave weights that give numbers
            check_finite(args, steps - 1, float(rate(model, batch[0][0], autocast).sum()))
        save_state(args.out, args, model, optimizer, step=steps)

    # 8. After, while differences of scores still are log-odds. Then the scores get their scale.
    after, curve, rewards = evaluate(model, test, truths, autocast)
    if drawn:
        after["normalization/gain"], after["normalization/bias"] = normalize(
            model, drawn, autocast)
    gain, bias = after.get("normalization/gain", 1.0), after.get("normalization/bias", 0.0)
    samples = [{"prompt": tokenizer.decode(ids[0][0])} | {
        f"rank {rank}, score {gain * r + bias:+.2f}": text
        for rank, r, text in sorted(zip(ranks, own.tolist(), row))}
        for row, own, (ids, ranks) in zip(texts[:8], rewards, test)]
    report(args.out, {"before": before, "after": after}, samples)
    plot(args.out, [["loss"], ["pairs/accuracy"], ["scores/std"]], "predicted win rate, y observed",
         points={"before": old_curve, "after": curve, "ideal": ([0, 1], [0, 1])})
    save_model(model, tokenizer, args.out)
    (Path(args.out) / "state.pt").unlink()  # this run is complete
    return after


def parse_args(argv=None):
    """The command line; --help shows every default."""
    parser = argparse.ArgumentParser(description="A reward model from rankings: see the docstring")
    common_flags(parser, out="runs/reward_model", batch_size=16,
                 lr_help="1e-3 below 10M parameters, else 1e-5; LoRA twice, or above 10M ten times "
                 "that")
    flag = parser.add_argument_group("rankings").add_argument
    flag("--loss", default="ranking", choices=["ranking", "best_of_k"],
         help="learn from all pairs of a ranking, or only from which response is best")
    flag("--samples", type=int, default=256, help="samples of --model whose scores get mean 0 and "
         "SD 1 at the end; 0 leaves the scores as they are, in log-odds")
    flag("--rankings", type=int, default=4096, help="toy: prompts with responses to learn from")
    flag("--k", type=int, default=4, help="toy: responses a prompt")
    args = parser.parse_args(argv)
    check_flags(args, zero_allowed=("samples",))
    if args.k < 2:
        fail(f"--k {args.k}: a comparison needs at least two responses")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        return train(args)
    except KeyboardInterrupt:
        stopped(args.out)


if __name__ == "__main__":
    main()
