"""Reward model: step 2 of InstructGPT, Ouyang et al. 2022, arXiv:2203.02155v1, 3.5.

People compare responses more easily than they rate them. So a model r(x, y), a language model with
one number as its output, learns from comparisons: sigma(r(x, y_i) - r(x, y_j)) should equal the
probability that a human prefers y_i to y_j (the Bradley-Terry model). A human ranks K responses to
each prompt, and the loss is taken over all pairs of them in which y_i is ranked above y_j:

    loss = -1/C(K, 2)  sum over pairs  of  log sigma(r_i - r_j)                                  (1)

With K = 2 it is the usual loss on pairs. If the human only picks the best of K responses, as in
Ziegler et al. 2019, arXiv:1909.08593v2, Eq. (1), the loss is -log softmax(r_1 ... r_K)[best].

    python reward_model.py                                   # toy: reviews, ranked by a noisy human
    python reward_model.py --data mine.jsonl --model gpt2    # {"prompt", "chosen", "rejected"}
    python reward_model.py --loss best_of_k

Departures from the papers: the learning rate rises, then falls to 0 (InstructGPT: to 10 %). Tied
pairs are left out as in the paper, but the divisor stays C(K, 2), so a ranking with ties counts
less. Scores are not normalised here; ppo_rlhf.py does it.
"""

import itertools
import math
import random
import re

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import (Run, add_gradients, all_gather, fail, fill_defaults, launch, load_model,
                   mean_by_prompt, new_parser, number, read_jsonl, read_row, save_model, share,
                   split_by_prompt, warn_of_few)

# ---------------------------------------------------------------------------------- the losses


def ranking_loss(rewards, ranks):
    """Mean of -log sigma(r_i - r_j) over the pairs of a prompt: InstructGPT, Eq. (1).

    rewards: (B, K) scores. ranks: (B, K) whole numbers, 1 is the best, 0 is padding. Tied pairs add
    nothing, but the divisor is C(K, 2) for all K real responses. Returns (B,), in nats per pair.
    """
    better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks > 0)[:, :, None]  # (B, K, K): i, j
    margins = rewards[:, :, None] - rewards[:, None, :]  # (B, K, K)
    losses = -F.logsigmoid(margins.masked_fill(~better, math.inf))  # 0 at infinity
    K = (ranks > 0).sum(1)  # (B,)
    return losses.sum((1, 2)) / (K * (K - 1) / 2).clamp(min=1)


def best_of_k_loss(rewards, best):
    """-log softmax(r)[best], where a human picked one of K: Ziegler et al. 2019, Eq. (1).

    rewards: (B, K) scores, -inf where a prompt has fewer than K responses. best: (B,), the index of
    the response that was picked. Returns (B,), in nats.
    """
    return F.cross_entropy(rewards, best, reduction="none")


def rank_loss(rewards, ranks, args):
    """The loss that --loss names: (B,). Of (B, K) scores and ranks, with rank 0 as padding."""
    if args.loss == "ranking":
        return ranking_loss(rewards, ranks)
    best = ranks.masked_fill(ranks == 0, ranks.max() + 1).argmin(1)  # (B,)
    return best_of_k_loss(rewards, best)


# ----------------------------------------------------------------------------------- the scores


def hidden_states(model, ids, where):
    """The head's input at the flat positions `where` of ids (B, T): (len(where), D)."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    hidden = hidden.flatten(0, 1).index_select(0, where)  # (B, T, D) -> (B*T, D) -> (N, D)
    return hidden.to(model.dtype)  # fp32


def reward_scores(model, sequences):
    """The score of each sequence (prompt ids, response ids), read at its last token: (B,).

    The last token is found by length. (transformers looks for the last token that is not padding.
    If EOS also served as the padding token, it would read the token before the final EOS.) No mask
    is needed: attention is causal, so no real token sees the padding behind it.
    """
    ids = [torch.tensor(prompt + response) for prompt, response in sequences]
    lengths = torch.tensor([len(row) for row in ids])  # (B,)
    ids = pad_sequence(ids, batch_first=True)  # (B, T)
    last = torch.arange(len(ids)) * ids.shape[1] + lengths - 1  # (B,), flat positions in B * T
    hidden = hidden_states(model, ids.to(model.device), last.to(model.device))  # (B, D)
    return model.score(hidden).squeeze(1)  # (B, 1) -> (B,)


def score_rows(model, rows):
    """Scores of the responses to B prompts, and their ranks: (B, K) each.

    A prompt with fewer than K responses is padded with the score -inf and the rank 0.
    """
    flat = reward_scores(model, [sequence for row in rows for sequence in row["group"]])  # (n,)
    rewards = pad_sequence(flat.split([len(row["group"]) for row in rows]), batch_first=True,
                           padding_value=-math.inf)  # (n,) -> (B, K)
    ranks = pad_sequence([torch.tensor(row["ranks"]) for row in rows], batch_first=True)
    return rewards, ranks.to(model.device)


def split_batch(groups, max_tokens):
    """Split a batch into parts of at most max_tokens tokens, padding included.

    A group is a list of sequences that stay together; if it is too large, it is a part alone.
    Groups of similar length share a part, so there is little padding. The gradients of the parts
    add up to that of the batch, so the memory does not depend on the batch size. Returns lists of
    indices into groups.
    """
    longest = [max(len(prompt + response) for prompt, response in group) for group in groups]
    parts, count = [[]], 0
    for T, g in sorted(zip(longest, range(len(groups)))):
        count += len(groups[g])
        if parts[-1] and count * T > max_tokens:
            parts.append([])
            count = len(groups[g])
        parts[-1].append(g)
    return parts


@torch.no_grad()
def sample(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, max_tokens=16384):
    """Token ids of a response to each prompt, with EOS unless it is cut.

    There is no top-k or top-p, so at temperature 1 samples follow the model's own distribution.
    max_tokens bounds the memory, as in `split_batch`; without a gradient there is room for more.
    """
    torch.manual_seed(seed)
    responses = [[] for _ in prompts]
    groups = [[(prompt, [0] * max_new_tokens)] for prompt in prompts]
    for rows in tqdm(split_batch(groups, max_tokens), "sampling", leave=False, disable=None):
        ids = [torch.tensor(prompts[i]) for i in rows]
        ids = pad_sequence(ids, batch_first=True, padding_value=-1, padding_side="left")
        ids = ids.to(model.device)  # (B, T)
        cache = None
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            for _ in tqdm(range(max_new_tokens), "tokens", leave=False, disable=None):
                start = -1 if cache else 0  # the cache holds all tokens but the last one
                mask = (ids >= 0).long()  # (B, T): -1 is padding
                positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, T): padding is not counted
                out = model(
                    input_ids=ids[:, start:].clamp(min=0),
                    position_ids=positions[:, start:],
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1)
                cache = out.get("past_key_values")  # state-space models have none
                logits = out.logits[:, -1].float() / temperature  # (B, V)
                token = logits.softmax(1).multinomial(1)  # (B, 1)
                ids = torch.cat([ids, token], 1)  # (B, T + 1)
                drawn = token[:, 0].tolist()
                for i, t in zip(rows, drawn):
                    responses[i].append(t)
                going = [b for b, t in enumerate(drawn) if t not in tokenizer.stop_ids]
                if not going:
                    break
                if len(going) < len(rows):  # rows that have ended are left behind
                    rows, ids = [rows[b] for b in going], ids[going]
                    if cache:
                        cache.reorder_cache(torch.tensor(going, device=model.device))
    return responses


# -------------------------------------------------------------------------------- the toy task

POSITIVE = "amazing brilliant charming delightful funny gripping moving superb wonderful".split()
NEGATIVE = "awful bland boring clumsy dull shallow tedious terrible weak".split()
# Words that only larger models use; the true reward counts them, too.
PRAISE = POSITIVE + ("beautiful best classic cool enjoy enjoyable enjoyed entertaining excellent "
                     "exciting fabulous fantastic fascinating fun good great happy impressed "
                     "impressive incredible inspiring interesting love lovely loved masterpiece "
                     "nice perfect powerful special stunning").split()
BLAME = NEGATIVE + ("annoying bad confusing disappointed disappointing failed hate hated horrible "
                    "lacked lame mediocre mess pointless poor poorly predictable ridiculous ruined "
                    "sad silly strange stupid tired ugly waste weird worse worst wrong").split()


def toy_prompts(small=True):
    """300 openings of reviews, such as "I saw the film yesterday.".

    A model above 10M parameters would tell any story, so its opinion is begun for it.
    """
    return [f"{who} {saw} the {show} {when}." + " I thought it was" * (not small)
            for who in ("I", "We", "My sister", "Our class", "Two friends")
            for saw in ("saw", "watched")
            for show in ("film", "movie", "musical", "opera", "play", "series")
            for when in ("last night", "yesterday", "on Friday", "in London", "with friends")]


def toy_reward(review):
    """The true reward: the number of positive words minus the number of negative words."""
    words = re.findall(r"\w+", review.lower())
    return float(sum((word in PRAISE) - (word in BLAME) for word in words))


def toy_ranks(responses, rng):
    """The ranks that a noisy human gives, 1 is the best: the Plackett-Luce model.

    The human fills the ranks from the best to the worst. Each response that is left is chosen with
    odds exp(its true reward), which for two responses is the Bradley-Terry model. Sorting the
    rewards after adding Gumbel noise to each draws from this model.
    """
    noisy = [toy_reward(text) - math.log(rng.expovariate(1)) for text in responses]
    return [1 + sum(other > own for other in noisy) for own in noisy]


def toy_rankings(model, tokenizer, count, k, seed, max_tokens=4096):
    """Rows {"prompt", "responses", "ranks"}: k samples of the model, ranked by a noisy human."""
    rng = random.Random(seed)
    prompts = rng.choices(toy_prompts(model.small), k=count)
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(k)]
    print(f"sampling {len(asked)} reviews for the human to rank")
    drawn = sample(model, tokenizer, asked, 64, seed, max_tokens=4 * max_tokens)
    texts = [tokenizer.decode(ids, whole=True) for ids in drawn]
    rows = []
    for i, prompt in enumerate(prompts):
        own = texts[i * k:(i + 1) * k]
        rows.append({"prompt": prompt, "responses": own, "ranks": toy_ranks(own, rng)})
    return rows


# ------------------------------------------------------------------------- data and evaluation


def read_ranking(row, tokenizer):
    """A row of a file as {"prompt", "responses", "ranks"}; of a pair, the chosen one has rank 1."""
    names, ranks = ["chosen", "rejected"], [1, 2]
    if "responses" in row:
        texts, ranks = row["responses"], row.get("ranks")
        lists = isinstance(texts, list) and isinstance(ranks, list) and len(texts) == len(ranks) > 0
        if not lists or not all(type(rank) is int and rank > 0 for rank in ranks):
            fail(f'{row["where"]}: "responses" has to be a list, with as many "ranks", which are '
                 "whole numbers; 1 is the best")
        names = [f"response {k}" for k in range(len(texts))]
        row = row | dict(zip(names, texts))
        places = sorted(set(ranks))  # only their order counts: 1, 5, 5 is 1, 2, 2
        ranks = [1 + places.index(rank) for rank in ranks]
    row = read_row(row, tokenizer, *names)
    return {"prompt": row["prompt"], "responses": [row[name] for name in names], "ranks": ranks}


def encode_rankings(tokenizer, rows, args):
    """The usable rows, each with a new key "group": (prompt ids, response ids) of each response.

    Of equal responses the first one stays. Some become equal only by being cut.
    """
    usable = []
    no_room = 0
    cut = 0
    for row in rows:
        group = []
        ranks = []
        for text, rank in zip(row["responses"], row["ranks"]):
            example = tokenizer.encode_example(row["prompt"], text, args.max_length)
            if example and example not in group:
                group.append(example)
                ranks.append(rank)
        no_room += not group
        # Left out: all are tied, or, for best of K, several are best.
        if len(set(ranks)) > 1 and (args.loss == "ranking" or ranks.count(min(ranks)) == 1):
            usable.append(dict(row, group=group, ranks=ranks))
            cut += sum(response[-1] not in tokenizer.stop_ids for _, response in group)
    counts = {"rankings": len(usable),
              "left out without room for a response within --max_length": no_room,
              "left out with no preference": len(rows) - len(usable) - no_room,
              "responses cut at --max_length": cut}
    found = "; ".join(f"{count} {what}" for what, count in counts.items() if count)
    print(found)
    return usable or fail(f"no ranking is left: {found}")


def calibration_error(margins):
    """How far predicted win rates are from observed ones. margins: (P,), better minus worse.

    Of all pairs with a predicted win rate near p, a share of p should be won. The pairs are sorted
    into ten bins by p. The error is the gap between mean p and the share won, averaged over pairs.
    Each pair is counted both ways: as seen from the better response alone, every pair is won.
    """
    predicted = torch.cat([margins, -margins]).sigmoid()  # (2P,)
    won = torch.arange(len(predicted)) < len(margins)  # (2P,)
    bins = (predicted * 10).long().clamp(max=9)  # (2P,)
    gaps = torch.zeros(10).index_add(0, bins, predicted - won.float())  # (10,), sums of the bins
    return float(gaps.abs().sum()) / len(won)


@torch.no_grad()
def evaluate(name, model, tokenizer, rows, args):
    """{name: metrics on held-out rankings}, and samples: their texts with ranks and scores."""
    scores, pairs, prompts, samples = {}, [], [], []
    losses = torch.zeros(len(rows))
    parts = split_batch([row["group"] for row in rows], args.max_tokens)
    for part in tqdm(parts, f"evaluating {name} training", leave=False, disable=None):
        rewards, ranks = score_rows(model, [rows[g] for g in part])  # (b, K) each
        losses[part] = rank_loss(rewards, ranks, args).cpu()  # (b,)
        scores |= dict(zip(part, rewards.tolist()))
    for g, row in enumerate(rows):
        ranks, texts = row["ranks"], [tokenizer.decode(response) for _, response in row["group"]]
        lengths = [len(response) for _, response in row["group"]]
        shown = {f"{i}: rank {ranks[i]}, score {scores[g][i]:+.2f}": text
                 for i, text in enumerate(texts)}
        samples.append({"prompt": row["prompt"]} | shown)
        for i, j in itertools.permutations(range(len(texts)), 2):
            if ranks[i] < ranks[j]:
                pairs.append((scores[g][i] - scores[g][j], lengths[i] - lengths[j],
                              toy_reward(texts[i]) - toy_reward(texts[j])))
                prompts.append(row["prompt"])
    margins, longer, true_margins = torch.tensor(pairs).unbind(1)  # (P, 3) -> (P,) each
    right = (margins > 0).float()  # ties count as wrong
    numbers = {"pairs/accuracy": right}
    if args.data:
        # Is it only length? longer_better: the accuracy of "the longer one is the better one".
        numbers |= {"pairs/longer_better": (longer > 0).float(),
                    "pairs/accuracy_longer": right.where(longer > 0, math.nan),
                    "pairs/accuracy_shorter": right.where(longer < 0, math.nan)}
    else:
        # The Bayes ceiling: nothing predicts the toy's human better than the true reward does.
        numbers["pairs/ceiling"] = true_margins.abs().sigmoid()
    metrics = mean_by_prompt({"loss": losses}, [row["prompt"] for row in rows])
    metrics |= mean_by_prompt(numbers, prompts)
    metrics |= {"calibration/error": calibration_error(margins), "pairs/held_out": len(pairs)}
    return {name: metrics}, samples


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps, warmup=0.1):
    """The share of the peak learning rate: it rises for a part of the steps, then falls to 0."""
    peak = max(1, int(warmup * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))


def train(args):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics."""
    run = Run(args)

    # 1. The reward model: a language model whose new head gives one number.
    model, tokenizer = load_model(args.model, "reward", args.device, args.lora_rank)
    fill_defaults(args, DEFAULTS, model.small)

    # 2. Rankings, from a file or from the toy's human. All rows of some prompts are held out.
    if args.data:
        rows = [read_ranking(row, tokenizer) for row in read_jsonl(args.data)]
    else:
        rows = toy_rankings(*load_model(args.policy or args.model, device=args.device),
                            args.rankings, args.k, args.seed, args.max_tokens)
        rows = all_gather(rows)[0]  # those of process 0
    rows, held_out, _ = split_by_prompt(encode_rankings(tokenizer, rows, args),
                                        256 if args.data else 200)
    tokenizer.show(*rows[0]["group"][0])

    # 3. Evaluate before training. This also shows early whether the evaluation works.
    before, _ = evaluate("before", model, tokenizer, held_out, args)

    # 4. Batches: each epoch visits all rankings in a new order. All pairs of a prompt are in one
    #    batch: if they were spread over batches, each response would be learned from K - 1 times
    #    in an epoch, and the model would overfit (InstructGPT, 3.5).
    args.batch_size = args.batch_size or (8 if len(rows) <= 2000 else 32)  # with --data
    steps = args.steps or args.epochs * math.ceil(len(rows) / args.batch_size)
    warn_of_few(steps, args)
    batches = []
    while len(batches) < steps:
        order = random.Random(f"{args.seed} {len(batches)}").sample(rows, len(rows))
        batches += [order[i:i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    start = run.load_state(model, optimizer)["step"]

    progress = tqdm(range(start, steps), initial=start, total=steps, disable=None)
    for step in progress:
        # 5. The loss and its gradient, part by part.
        batch, losses = batches[step], []
        for part in share(split_batch([row["group"] for row in batch], args.max_tokens)):
            rewards, ranks = score_rows(model, [batch[b] for b in part])  # (b, K) each
            loss = rank_loss(rewards, ranks, args).sum() / len(batch)
            loss.backward()
            losses.append(loss.detach())

        # 6. The update. A state is saved before it, and only if the gradient is finite.
        add_gradients(model)
        norm = float(clip_grad_norm_(model.parameters(), 1.0))
        if not math.isfinite(norm):
            fail(f"step {step + 1}: the gradient is not finite; use a lower --lr")
        if step % args.save_every == 0:
            run.save_state(step, model, optimizer)
        optimizer.param_groups[0]["lr"] = lr = args.lr * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()

        # 7. What to watch.
        row = {"step": step + 1, "lr": lr, "grad_norm": norm,
               "loss": sum(all_gather(float(sum(losses))))}
        run.log(row)
        progress.set_postfix(loss=row["loss"])

    # 8. Save, then evaluate again.
    save_model(model, tokenizer, args.out)
    after, samples = evaluate("after", model, tokenizer, held_out, args)
    run.report(before | after, samples, panels=[["loss"], ["grad_norm"]])
    return after["after"]


# Defaults: models below 10M parameters; larger ones in the toy; larger ones with --data.
DEFAULTS = {"lr": (1e-3, 1e-5, 2e-5), "batch_size": (16, 16, None),
            "rankings": (4608, 192, None)}


def parse_args(argv=None):
    """The command line."""
    parser = new_parser(__file__, __doc__, DEFAULTS)
    flag = parser.add_argument
    flag("--data", help='JSON Lines file of {"prompt", "chosen", "rejected"} or {"prompt", '
         '"responses", "ranks"}; None: the toy task')
    flag("--loss", default="ranking", choices=["ranking", "best_of_k"],
         help="learn from all pairs of a ranking, or only from which response is the best")
    flag("--policy", help="toy: the model whose responses are ranked; None: --model")
    flag("--lr", type="amount", help="peak learning rate")
    flag("--epochs", type="positive", default=1, help="passes over the rankings")
    flag("--steps", type="positive", help="updates; None: as many as --epochs takes")
    flag("--batch_size", type="positive",
         help="prompts in an update; by default with --data: 8 for up to 2,000 of them, else 32")
    flag("--max_length", type="positive", default=1024, help="tokens of prompt and response")
    flag("--rankings", type="positive", help="toy: prompts with ranked responses")
    flag("--k", type=number(2), default=4, help="toy: responses to each prompt")
    return parser.parse_args(argv)


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
