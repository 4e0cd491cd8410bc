"""Direct preference optimization (DPO): Rafailov et al. 2023, arXiv:2305.18290v3.

RLHF looks for the policy pi that earns the most reward while it stays near a reference pi_ref:

    max_pi  E[r(x, y)] - beta KL(pi || pi_ref)

The solution is known: pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x). Solve this for r, and
every policy defines a reward: r = beta log(pi / pi_ref) + beta log Z(x). Put this reward into the
Bradley-Terry model, where a human prefers y_w to y_l with probability sigma(r_w - r_l). Z cancels,
and what is left is a loss on the policy itself, without a reward model and without sampling:

    loss = -log sigma(beta h),   h = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)   (7)

    python dpo.py                                    # toy: reviews, preferring friendly words
    python dpo.py --data mine.jsonl --model gpt2     # lines of {"prompt", "chosen", "rejected"}
    python dpo.py --loss ipo                         # or rdpo; cDPO is --label_smoothing 0.1

Departures from the paper: AdamW instead of RMSprop; the learning rate falls to 0; the reference's
log-probs are computed once, before training, which then needs only one model in memory.
"""

import math
import random
import re
import warnings
from statistics import fmean

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import (Run, add_gradients, all_gather, fail, fill_defaults, launch, load_model,
                   mean_by_prompt, new_parser, read_jsonl, read_row, save_model, share,
                   split_by_prompt, warn_of_few)

# ---------------------------------------------------------------------------------- the losses
# The first four inputs of each loss, all (B,): log-probs of whole responses, summed over their
# tokens with EOS, in nats, under the policy and under the reference. Each loss returns (B,).
# `pair_loss` calls them.


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta,
             label_smoothing=0.0):
    """DPO, Eq. (7). With label_smoothing above 0 it is cDPO, for labels that are sometimes wrong.

    cDPO: Mitchell's note of 2023, Eq. (3). label_smoothing is the share of wrong labels.
    """
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)  # (B,)
    right = -F.logsigmoid(beta * h)
    wrong = -F.logsigmoid(-beta * h)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def ipo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, tau):
    """IPO, Azar et al. 2023 (arXiv:2310.12036v2), Eq. (17): h should be 1 / (2 tau)."""
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)  # (B,)
    return (h - 1 / (2 * tau)) ** 2


def rdpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected,
              chosen_lengths, rejected_lengths, beta, alpha):
    """R-DPO, Park et al. 2024 (arXiv:2403.19159): the policy maximises r - alpha * length.

    So r is beta log(pi / pi_ref) + alpha * length, up to a constant. Lengths: (B,), in tokens. (The
    SimPO paper prints a minus in place of the plus, which would reward length.)
    """
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)  # (B,)
    return -F.logsigmoid(beta * h + alpha * (chosen_lengths - rejected_lengths))


def pair_loss(logps, reference_logps, lengths, args):
    """The loss that --loss names: (B,). The inputs are (B, 2): chosen, then rejected."""
    chosen, rejected = logps.unbind(1)  # (B,) each, as all that follow
    reference_chosen, reference_rejected = reference_logps.unbind(1)
    chosen_lengths, rejected_lengths = lengths.unbind(1)
    if args.loss == "dpo":
        return dpo_loss(chosen, rejected, reference_chosen, reference_rejected,
                        args.beta, args.label_smoothing)
    if args.loss == "ipo":
        return ipo_loss(chosen, rejected, reference_chosen, reference_rejected, args.beta)
    return rdpo_loss(chosen, rejected, reference_chosen, reference_rejected,
                     chosen_lengths, rejected_lengths, args.beta, args.alpha)


# --------------------------------------------------------------------- log-probs of responses


class GatherLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target] without the (N, V) logits in memory.

    The logits would be the largest tensor of a step. So they are computed for 4096 vocabulary
    entries at a time, and once more in the backward pass instead of being kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        chunks = [(hidden @ w.T).logsumexp(1) for w in weight.split(4096)]
        logsumexp = torch.stack(chunks).logsumexp(0)  # (N,)
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        return (hidden * weight[targets]).sum(1) - logsumexp

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        grad = grad[:, None]  # (N, 1)
        # d logp / d logits = onehot(target) - softmax. The one-hot part needs no logits.
        grad_hidden = grad * weight[targets]  # (N, D)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # not with LoRA, where the head is frozen
            grad_weight = torch.zeros_like(weight).index_add_(0, targets, grad * hidden)  # (V, D)
        for i in range(0, len(weight), 4096):
            w = weight[i:i + 4096]  # (C, D)
            grad_logits = (hidden @ w.T - logsumexp[:, None]).exp_().mul_(-grad)  # (N, C)
            grad_hidden.addmm_(grad_logits, w)
            if grad_weight is not None:
                grad_weight[i:i + 4096].addmm_(grad_logits.T, hidden)
        return grad_hidden, grad_weight, None


def gather_logps(hidden, weight, targets):
    """Log-prob of each target, in nats: hidden (N, D), weight (V, D), targets (N,) -> (N,).

    It equals (hidden @ weight.T).log_softmax(1).gather(1, targets[:, None]).squeeze(1).
    """
    return GatherLogps.apply(hidden, weight, targets)


def collate(sequences, device):
    """Token ids (B, T) of B sequences (prompt ids, response ids), padded on the right.

    Also, for the N response tokens of the batch: the flat positions (in B * T) where they are
    predicted, their ids, and the rows that they belong to; (N,) each. No mask is needed: attention
    is causal, so no real token sees the padding behind it. All of this is computed on the CPU,
    which avoids GPU synchronisation.
    """
    ids = [torch.tensor(prompt + response) for prompt, response in sequences]
    learned = [torch.arange(len(prompt + response)) >= len(prompt)
               for prompt, response in sequences]
    ids, learned = [pad_sequence(x, batch_first=True) for x in (ids, learned)]  # (B, T) each
    rows, columns = learned.nonzero(as_tuple=True)  # (N,) each
    where = rows * ids.shape[1] + columns - 1  # a token is predicted one position before it
    return [x.to(device) for x in (ids, where, ids[learned], rows)]


def hidden_states(model, ids, where):
    """The head's input at the flat positions `where` of ids (B, T): (len(where), D)."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    hidden = hidden.flatten(0, 1).index_select(0, where)  # (B, T, D) -> (B*T, D) -> (N, D)
    return hidden.to(model.dtype)  # fp32


def response_logps(model, sequences):
    """Summed log-prob of each response, its EOS included, and its length in tokens: (B,), (B,)."""
    ids, where, targets, rows = collate(sequences, model.device)
    hidden = hidden_states(model, ids, where)  # (N, D)
    logps = gather_logps(hidden, model.get_output_embeddings().weight, targets)  # (N,)
    zeros = logps.new_zeros(len(sequences))  # (B,)
    sums = zeros.index_add(0, rows, logps)
    lengths = zeros.index_add(0, rows, torch.ones_like(logps))
    return sums, lengths


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
def group_logps(model, groups, max_tokens):
    """Summed log-probs of groups of K sequences, without gradient: (len(groups), K)."""
    logps = torch.zeros(len(groups), len(groups[0]))
    parts = share(split_batch(groups, max_tokens))
    for part in tqdm(parts, "log-probs", leave=False, disable=None):
        flat, _ = response_logps(model, [sequence for g in part for sequence in groups[g]])
        logps[part] = flat.view(len(part), -1).cpu()  # (b*K,) -> (b, K)
    return sum(all_gather(logps))  # a process leaves 0 where it had no part


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
NEUTRAL = "calm familiar long modern ordinary plain quiet short simple".split()
NEGATIVE = "awful bland boring clumsy dull shallow tedious terrible weak".split()
ASPECTS = "acting cast dialogue ending music pace plot story".split()
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


def toy_grammatical(review, repeats=False):
    """Whether a review is one or two sentences like " The plot was dull and long.".

    "dull and dull" counts only with repeats: no review that tiny/ learned from has such words.
    """
    word, aspect = "|".join(POSITIVE + NEUTRAL + NEGATIVE), "|".join(ASPECTS)
    sentence = rf" (The ({aspect}) was|I found the ({aspect})) ({word})( and ({word}))?\."
    repeated = re.search(r"\b(\w+) and \1\b", review)
    return bool(re.fullmatch(f"({sentence}){{1,2}}", review)) and (repeats or not repeated)


def toy_pairs(model, tokenizer, count, seed, max_tokens=4096):
    """Pairs of the model's own samples, judged by a noisy human.

    The human prefers a to b with probability sigma(r(a) - r(b)): the Bradley-Terry model. A small
    model's pairs with a text that is no review are left out: see "What keeps it steady" in
    docs/dpo.md. Samples of a larger model often tie, so the best and the worst of eight are
    compared, and ties are left out.
    """
    rng = random.Random(seed)
    prompts = rng.choices(toy_prompts(model.small), k=count)
    k = 2 if model.small else 8
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(k)]
    print(f"sampling {len(asked)} reviews for the human to judge")
    drawn = sample(model, tokenizer, asked, 64, seed, max_tokens=4 * max_tokens)
    texts = [tokenizer.decode(ids, whole=True) for ids in drawn]
    rows = []
    for i, prompt in enumerate(prompts):
        own = texts[i * k:(i + 1) * k]
        if not model.small:
            own.sort(key=toy_reward)
        a, b = own[0], own[-1]
        gap = toy_reward(a) - toy_reward(b)
        judged = all(toy_grammatical(text, True) for text in own) if model.small else gap < 0
        if rng.random() > 1 / (1 + math.exp(-gap)):
            a, b = b, a
        if judged:
            rows.append({"prompt": prompt, "chosen": a, "rejected": b})
    reason = "a text is no review" if model.small else "both are equally good"
    print(f"{len(prompts) - len(rows)} of {len(prompts)} pairs are not judged, since {reason}")
    return rows


# ------------------------------------------------------------------------- data and evaluation


def encode_pairs(tokenizer, rows, args):
    """The usable rows, each with a new key "pair": [(prompt ids, chosen ids), (..., rejected)]."""
    usable = []
    no_room = cut = 0
    for row in rows:
        pair = [tokenizer.encode_example(row["prompt"], row[side], args.max_length,
                                         room=args.max_new_tokens)
                for side in ("chosen", "rejected")]
        if None in pair:
            no_room += 1
        elif pair[0] != pair[1]:  # equal responses would teach nothing
            usable.append(dict(row, pair=pair))
            cut += sum(ids[-1] not in tokenizer.stop_ids for _, ids in pair)
    counts = {"pairs": len(usable),
              "left out without room for --max_new_tokens": no_room,
              "left out with equal responses": len(rows) - len(usable) - no_room,
              "responses cut for their length": cut}
    found = "; ".join(f"{count} {what}" for what, count in counts.items() if count)
    print(found)
    return usable or fail(f"no pair is left: {found or 'none was judged'}")


def yardstick(rewards, pi, ref, beta):
    """How near J = E[r] - beta KL(pi || pi_ref) comes to its maximum over all policies, J*.

    rewards, pi, ref: (P, 2n). For each of P prompts: n samples of the reference, then n of the
    policy, with their rewards and their log-probs under policy and reference.
    J* = beta log E_ref[exp(r / beta)] is estimated from all 2n samples. They come from the mixture
    q = (pi_ref + pi) / 2, so each is weighted by pi_ref / q. A standard error (se) is the SD over
    200 bootstraps. Each draws n of each n samples again, with replacement; the prompts stay.
    """
    P, n = len(rewards), rewards.shape[1] // 2
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(n, (201, P, 2, n), generator=generator) + torch.tensor([[0], [n]])
    draws[0] = torch.arange(2 * n).view(2, n)  # the first "draw" is the samples themselves
    draws = draws.flatten(2)  # (201, P, 2n)
    rewards, pi, ref = (x.expand(201, P, 2 * n).gather(2, draws) for x in (rewards, pi, ref))
    log_weights = ref - torch.logaddexp(ref, pi)  # log of pi_ref / (2 q)
    x = log_weights + rewards / beta  # (201, P, 2n)
    # The mean of 2n weights pi_ref / q is the sum of 2n weights pi_ref / (2 q), divided by n.
    optimum = beta * (x.logsumexp(2) - math.log(n)).mean(1)  # (201,)
    start = rewards[:, :, :n].mean((1, 2))  # (201,)
    now = (rewards - beta * (pi - ref))[:, :, n:].mean((1, 2))  # (201,)
    way = (now - start) / (optimum - start)  # (201,)
    # Over all prompts: the error of J* is about beta / sqrt(effective_samples).
    effective_samples = P**2 / x[0].softmax(1).square().sum()
    numbers = {
        "J/reference": start[0], "J/policy": now[0], "J/effective_samples": effective_samples}
    if effective_samples >= 50:  # with fewer the estimate would be a guess
        numbers |= {
            "J/optimum": optimum[0],
            "J/optimum_se": optimum[1:].std(),
            "J/share_of_the_way": way[0],
            "J/share_of_the_way_se": way[1:].std()}
    return {key: float(value) for key, value in numbers.items()}


def pair_metrics(losses, rewards, lengths, prompts, args):
    """What a loss and its reward make of N pairs: means with standard errors (se).

    losses: (N,), or None. rewards, lengths: (N, 2), of the chosen and the rejected response.
    prompts: N.
    """
    margins, longer = (x[:, 0] - x[:, 1] for x in (rewards, lengths))  # (N,) each
    right = (margins > 0).float()  # ties count as wrong
    numbers = {} if losses is None else {"loss": losses}
    numbers["rewards/margin"] = margins
    if margins.any():  # before the training of DPO all rewards are 0, so they rank nothing
        numbers["rewards/accuracy"] = right
        if args.data:
            # Is it only length? longer_chosen: the accuracy of "the longer one is the better one".
            numbers |= {"pairs/longer_chosen": (longer > 0).float(),
                        "rewards/accuracy_longer": right.where(longer > 0, math.nan),
                        "rewards/accuracy_shorter": right.where(longer < 0, math.nan)}
    return mean_by_prompt(numbers, prompts) | {"pairs/held_out": len(prompts)}


def evaluate(policy, reference, tokenizer, test, prompts, args):
    """{"before": metrics of the reference, "after": of the policy}, and samples of both.

    test: rows of held-out pairs. prompts: P held-out ones, for samples.
    """
    P, n = len(prompts), args.samples
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(n)]
    columns, scores, samples = {}, [], [{"prompt": prompt} for prompt in prompts]
    print(f"evaluating: {len(test)} pairs, then {n} samples of both models for {P} prompts")
    pairs = [row["pair"] for row in test]
    lengths = torch.tensor([[len(response) for _, response in pair] for pair in pairs])  # (N, 2)
    policy_logps, reference_logps = (
        group_logps(model, pairs, args.max_tokens) for model in (policy, reference))  # (N, 2) each
    for name, logps in (("before", reference_logps), ("after", policy_logps)):
        losses = None  # variants/kto.py has another kind of loss
        if hasattr(args, "loss"):
            losses = pair_loss(logps, reference_logps, lengths, args)  # (N,)
        columns[name] = pair_metrics(losses, args.beta * (logps - reference_logps), lengths,
                                     [row["prompt"] for row in test], args)
    groups = []  # each sample is a group alone: first those of the reference, then the policy's
    for name, model in (("before", reference), ("after", policy)):
        responses = sample(model, tokenizer, asked, args.max_new_tokens, args.seed,
                           max_tokens=4 * args.max_tokens)
        texts = [tokenizer.decode(response) for response in responses]
        groups += [[example] for example in zip(asked, responses)]
        columns[name]["samples/tokens"] = fmean(map(len, responses))
        if not args.data:
            scores.append(torch.tensor([toy_reward(text) for text in texts]).view(P, n))
            columns[name]["samples/true_reward"] = float(scores[-1].mean())
            if policy.small:
                columns[name]["samples/grammatical"] = fmean(map(toy_grammatical, texts))
        for row, text in zip(samples, texts[::n]):
            row[name] = text

    # Log-probs of the samples under both models: (2*P*n, 1) -> (2, P, n) -> (P, 2, n)
    policy_logps, reference_logps = (
        group_logps(model, groups, args.max_tokens).view(2, P, n).transpose(0, 1).double()
        for model in (policy, reference))
    after = columns["after"]
    after["kl/policy_reference"] = float((policy_logps - reference_logps)[:, 1].mean())
    if not args.data:  # how often the policy's sample is the better of two; a tie is half a win
        old, new = scores  # (P, n) each
        after["samples/win_rate"] = float(1 + (new - old).sign().mean()) / 2
        after |= yardstick(torch.cat(scores, 1), policy_logps.flatten(1),  # (P, 2n) each
                           reference_logps.flatten(1), args.beta)
    return columns, samples


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps, warmup=0.1):
    """The share of the peak learning rate: it rises for a part of the steps, then falls to 0."""
    peak = max(1, int(warmup * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))


def train(args):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics."""
    run = Run(args)

    # 1. The policy. Before its first step it is also the reference.
    model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    fill_defaults(args, DEFAULTS, model.small)

    # 2. Pairs, from a file or from the toy's human. All pairs of some prompts are held out.
    if args.data:
        rows = [read_row(row, tokenizer, "chosen", "rejected") for row in read_jsonl(args.data)]
    else:
        rows = toy_pairs(model, tokenizer, args.pairs, args.seed, args.max_tokens)
        rows = all_gather(rows)[0]  # those of process 0
    rows = encode_pairs(tokenizer, rows, args)
    rows, test, held_out = split_by_prompt(rows, 256 if args.data else 16)
    pairs = [row["pair"] for row in rows]
    tokenizer.show(*pairs[0][0])

    # 3. Batches: each epoch visits all pairs in a new order.
    args.batch_size = args.batch_size or (8 if len(pairs) <= 2000 else 32)  # with --data
    steps = args.steps or args.epochs * math.ceil(len(pairs) / args.batch_size)
    warn_of_few(steps, args)
    batches = []
    while len(batches) < steps:
        order = random.Random(f"{args.seed} {len(batches)}").sample(range(len(pairs)), len(pairs))
        batches += [order[i:i + args.batch_size] for i in range(0, len(order), args.batch_size)]

    # 4. The reference's log-probs, computed while the policy still is the reference, in the batches
    # of the first epoch. So at step 1 policy and reference are equal to the last bit. Then the
    # optimizer, and perhaps a saved state.
    reference_logps = torch.zeros(len(pairs), 2)
    first_epoch = batches[:min(steps, math.ceil(len(pairs) / args.batch_size))]
    for batch in tqdm(first_epoch, "scoring the reference", leave=False, disable=None):
        reference_logps[batch] = group_logps(model, [pairs[i] for i in batch], args.max_tokens)
    # Adam divides by the typical size of a weight's gradient, so weights with tiny gradients move
    # as fast as others. A larger eps slows them: see "What keeps it steady" in docs/dpo.md.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=args.adam_eps,
                                  weight_decay=0.0, fused=True)
    start = run.load_state(model, optimizer)["step"]

    progress = tqdm(range(start, steps), initial=start, total=steps, disable=None)
    for step in progress:
        # 5. The loss and its gradient, part by part.
        batch = batches[step]
        seen = [torch.zeros(0, 5, device=model.device)]  # a process may have no part
        for part in share(split_batch([pairs[i] for i in batch], args.max_tokens)):
            part = [batch[i] for i in part]  # b indices into all pairs
            sequences = [sequence for i in part for sequence in pairs[i]]
            # Log-probs and lengths of both responses: (2b,) -> (b, 2) each
            logps, lengths = (x.view(-1, 2) for x in response_logps(model, sequences))
            reference = reference_logps[part].to(model.device)  # (b, 2)
            loss = pair_loss(logps, reference, lengths, args)  # (b,)
            (loss.sum() / len(batch)).backward()
            rewards = args.beta * (logps - reference)  # (b, 2), whatever the loss is
            seen.append(torch.cat([loss[:, None], logps, rewards], 1).detach())  # (b, 5)

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

        # 7. What to watch. At the first step all rewards are 0, and all pairs tie. A tie counts as
        # wrong, and so does a gap below 1e-4, which may be rounding (in bf16 more: docs/dpo.md).
        seen = torch.cat(all_gather(torch.cat(seen).cpu()))  # (b, 5) each -> (B, 5)
        loss, chosen, rejected, chosen_rewards, rejected_rewards = seen.unbind(1)  # (B,) each
        row = {
            "step": step + 1,
            "lr": lr,
            "grad_norm": norm,
            "loss": float(loss.mean()),
            "logps/chosen": float(chosen.mean()),
            "logps/rejected": float(rejected.mean()),
            "rewards/chosen": float(chosen_rewards.mean()),
            "rewards/rejected": float(rejected_rewards.mean()),
            "rewards/accuracy": float((chosen_rewards - rejected_rewards > 1e-4).float().mean())}
        run.log(row)
        progress.set_postfix(loss=row["loss"])

    # 8. Save, then compare with the reference, which is loaded again.
    save_model(model, tokenizer, args.out)
    reference, _ = load_model(args.model, device=args.device)
    columns, samples = evaluate(model, reference, tokenizer, test, held_out[:8], args)
    run.report(columns, samples, panels=[
        ["loss"],
        ["rewards/chosen", "rewards/rejected"],
        ["logps/chosen", "logps/rejected"]])
    return columns["after"]


# Defaults: models below 10M parameters; larger ones in the toy; larger ones with --data.
DEFAULTS = {"beta": (0.5, 0.5, 0.1), "lr": (6e-4, 3e-5, 1.5e-5), "batch_size": (48, 8, None),
            "pairs": (6144, 160, None), "adam_eps": (1e-4, 1e-8, 1e-8), "samples": (128, 8, 8)}


def make_parser(file, text, defaults, rows='{"prompt", "chosen", "rejected"}'):
    """The flags that DPO shares with variants/kto.py."""
    parser = new_parser(file, text, defaults)
    flag = parser.add_argument
    flag("--data", help=f"JSON Lines file of {rows}; None: the toy task")
    flag("--lr", type="amount", help="peak learning rate")
    flag("--adam_eps", type="amount",
         help="Adam's epsilon; a higher one slows weights with small gradients")
    flag("--epochs", type="positive", default=1, help="passes over the data")
    flag("--steps", type="positive", help="updates; None: as many as --epochs takes")
    flag("--batch_size", type="positive",
         help="examples in an update; by default with --data: 8 for up to 2,000 of them, else 32")
    flag("--max_length", type="positive", default=1024, help="tokens of prompt and response")
    flag("--max_new_tokens", type="positive", default=64, help="most tokens of a sample")
    flag("--pairs", type="positive", help="toy: pairs to sample")
    flag("--samples", type="positive", help="evaluation: samples for each of 8 prompts")
    return parser


def parse_args(argv=None):
    """The command line."""
    parser = make_parser(__file__, __doc__, DEFAULTS)
    flag = parser.add_argument
    flag("--loss", default="dpo", choices=["dpo", "ipo", "rdpo"], help="what is minimised")
    flag("--beta", type="amount",
         help="price of a nat of KL from the reference; with --loss ipo tau, by default 0.1")
    flag("--label_smoothing", type="fraction", default=0.0,
         help="dpo: share of labels held to be wrong")
    flag("--alpha", type="amount", default=0.05, help="rdpo: price of a token of response length")
    args = parser.parse_args(argv)
    if args.loss == "ipo" and args.beta is None:
        args.beta = 0.1
    if args.beta == 0:
        fail("--beta 0: the loss has no gradient then (ipo divides by it); give a higher one")
    for loss, name in (("dpo", "label_smoothing"), ("rdpo", "alpha")):
        if args.loss != loss and getattr(args, name) != parser.get_default(name):
            warnings.warn(f"--{name} has no effect with --loss {args.loss}")
    return args


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
