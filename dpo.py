"""Direct preference optimization (DPO): Rafailov et al. 2023, arXiv:2305.18290v3.

The policy that best trades a reward r for nearness to a reference policy pi_ref has a closed form:

    max_pi  E[r(x, y)] - beta KL(pi || pi_ref)   at   pi*(y|x) = pi_ref(y|x) exp(r(x, y)/beta)/Z(x)

Solved for r, a policy is its own reward model: r = beta log(pi*/pi_ref) + beta log Z(x). Put into
Bradley and Terry's model of preferences, P(y_w > y_l) = sigma(r_w - r_l), where Z cancels, it gives

    loss = -log sigma(beta h),   h = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)   (7)

    python dpo.py                                    # toy: reviews, preferring friendly words
    python dpo.py --data mine.jsonl --model gpt2     # lines of {"prompt", "chosen", "rejected"}
    python dpo.py --loss ipo                         # or rdpo, kto; cDPO is --label_smoothing 0.1

Where this departs from the paper, and why:
1. Adam instead of RMSprop, and a learning rate that decays to 0 after warming up for a tenth of the
   steps, where the paper's stays constant after 150: both are what the field does since.
2. One model in memory. The policy is the reference until its first step, so the reference's
   log-probs are computed once, before training, and kept. Batches are made once for that reason.
3. The toy's pairs are samples of the reference itself, as in the paper's sentiment task, but judged
   by a Bradley-Terry coin on a true reward that is known, instead of by a classifier.
4. KTO's mismatched responses, from which z comes, are drawn once, before training, not by rolling
   each batch. Whatever the loss, rewards/* are beta times summed log-ratios.
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
from tqdm import tqdm

from model import (check_finite, check_flags, checkpoint, common_flags, deferred_interrupt, fail,
                   get_text, load_model, load_state, open_log, plot, read_jsonl, report, restore,
                   save_model, save_state, settle, split_by_prompt, stopped)

# ---------------------------------------------------------------------------------- the losses


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta,
             label_smoothing=0.0):
    """DPO, Eq. (7); with label_smoothing e, cDPO for labels that are wrong with probability e.

    All inputs (B,): log-probs summed over a response with its EOS, in nats. Returns (B,).
    cDPO: Mitchell's note of 2023, Eq. (3); one pair's optimum is beta h = log((1 - e) / e).
    """
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)  # (B,)
    e = label_smoothing
    return -(1 - e) * F.logsigmoid(beta * h) - e * F.logsigmoid(-beta * h)


def ipo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, tau):
    """IPO, Azar et al. 2023 (2310.12036v2), Eq. (17): bounded h even where labels are certain.

    Inputs and result as in `dpo_loss`: sums, as in the paper; --loss ipo_mean gives it means per
    token, as TRL does.
    """
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)  # (B,)
    return (h - 1 / (2 * tau)) ** 2


def rdpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected,
              chosen_lengths, rejected_lengths, beta, alpha):
    """R-DPO, Park et al. 2024 (2403.19159): DPO for the reward r - alpha |y|, against length bias.

    Inputs and result as in `dpo_loss`; lengths (B,) in tokens. The sign is a plus: the longer of
    two responses needs less of a margin when it is the chosen one, more when it is the rejected.
    (The table in the SimPO paper prints a minus, which would reward length.)
    """
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)  # (B,)
    return F.softplus(-(beta * h + alpha * (chosen_lengths - rejected_lengths)))


def kto_loss(policy, reference, desirable, kl, beta, lambda_desirable=1.0, lambda_undesirable=1.0):
    """KTO, Ethayarajh et al. 2024 (2402.01306), Eqs. (7), (8): for single responses, good or bad.

    policy, reference: (B,) summed log-probs; desirable: (B,) bool; kl: the reference point z, a
    scalar without gradient: max(0, mean log-ratio of mismatched responses). Returns (B,).
    """
    a = policy - reference  # (B,)
    return torch.where(desirable, lambda_desirable * torch.sigmoid(-beta * (a - kl)),
                       lambda_undesirable * torch.sigmoid(beta * (a - kl)))


def kto_reference_point(log_ratios):
    """KTO's z: log pi/pi_ref of mismatched responses (B,), averaged first, then clamped at 0."""
    return log_ratios.mean().clamp(min=0)


# By --loss: from summed log-probs of chosen (w) and rejected (l) responses, the same of the
# reference (rw, rl), lengths (nw, nl) and the flags (a). KTO stands apart: it has no pairs.
PAIR_LOSSES = {
    "dpo": lambda w, l, rw, rl, nw, nl, a: dpo_loss(w, l, rw, rl, a.beta, a.label_smoothing),
    "ipo": lambda w, l, rw, rl, nw, nl, a: ipo_loss(w, l, rw, rl, a.tau),
    "ipo_mean": lambda w, l, rw, rl, nw, nl, a: ipo_loss(w / nw, l / nl, rw / nw, rl / nl, a.tau),
    "rdpo": lambda w, l, rw, rl, nw, nl, a: rdpo_loss(w, l, rw, rl, nw, nl, a.beta, a.alpha),
}

# The flags of each loss with their defaults; --beta has a part in all, as the price in J.
DEFAULTS = {"dpo": {"label_smoothing": 0.0}, "ipo": {"tau": 0.1}, "ipo_mean": {"tau": 0.1},
            "rdpo": {"alpha": 0.05}, "kto": {"lambda_desirable": 1.0, "lambda_undesirable": 1.0}}

# ------------------------------------------------------------------------- the log-prob gather


class GatherLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[n, targets[n]], without ever holding the (N, V) logits.

    Walks the vocabulary in chunks of columns: the forward pass keeps a running logsumexp, the
    backward pass computes each chunk's softmax again. In fp32 (or float64) whatever comes in.
    """

    COLUMNS = 4096

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        h = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # (N, D)
        target_logit = (h * weight[targets]).sum(1)  # (N,)
        logsumexp = torch.full_like(target_logit, -math.inf)  # (N,)
        buffer = h.new_empty(len(h) * GatherLogps.COLUMNS)  # one for all chunks
        with torch.autocast(h.device.type, enabled=False):
            for w in weight.split(GatherLogps.COLUMNS):  # (C, D)
                logits = buffer[:len(h) * len(w)].view(len(h), len(w))  # (N, C)
                torch.mm(h, w.to(h.dtype).T, out=logits)
                top = logits.amax(1)  # (N,)
                chunk = logits.sub_(top[:, None]).exp_().sum(1).log_() + top  # (N,), in place
                logsumexp = torch.logaddexp(logsumexp, chunk)
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        return target_logit - logsumexp

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        h, g = hidden.to(logsumexp.dtype), grad[:, None]  # (N, D), (N, 1)
        # d logp / d logits = onehot(target) - softmax; the one-hot part needs no logits.
        grad_h = g * weight[targets]  # (N, D)
        grad_w = torch.empty_like(weight, dtype=h.dtype) if ctx.needs_input_grad[1] else None
        buffer = h.new_empty(len(h) * GatherLogps.COLUMNS)
        for start in range(0, len(weight), GatherLogps.COLUMNS):
            columns = slice(start, start + GatherLogps.COLUMNS)
            w = weight[columns].to(h.dtype)  # (C, D)
            softmax = buffer[:len(h) * len(w)].view(len(h), len(w))  # (N, C)
            torch.mm(h, w.T, out=softmax).sub_(logsumexp[:, None]).exp_().mul_(-g)  # times -grad
            grad_h.addmm_(softmax, w)
            if grad_w is not None:
                torch.mm(softmax.T, h, out=grad_w[columns])  # each slice is written once
        if grad_w is not None:
            grad_w = grad_w.index_add_(0, targets, g * h).to(weight.dtype)
        return grad_h.to(hidden.dtype), grad_w, None


def gather_logps(hidden, weight, targets):
    """Log-prob of each target: hidden (N, D), weight (V, D), targets (N,) -> (N,), in nats."""
    return GatherLogps.apply(hidden, weight, targets)


def token_logps(model, batch):
    """Log-prob of every response token of a batch made by `collate`: (N,)."""
    hidden = model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"], use_cache=False).last_hidden_state  # (B, T, D)
    hidden = hidden.flatten(0, 1).index_select(0, batch["index"])  # (B*T, D) -> (N, D)
    return gather_logps(hidden, model.get_output_embeddings().weight, batch["targets"])


def response_logps(model, batch):
    """Summed log-prob of each response, its EOS included, and its length: (B,), (B,)."""
    logps = token_logps(model, batch)  # (N,)
    zeros = logps.new_zeros(len(batch["last"]))  # (B,), of responses
    return (zeros.index_add(0, batch["rows"], logps),
            zeros.index_add(0, batch["rows"], torch.ones_like(logps)))


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


# -------------------------------------------------------------------------------- the toy task

POSITIVE = "amazing brilliant charming delightful funny gripping moving superb wonderful".split()
NEUTRAL = "calm familiar long modern ordinary plain quiet short simple".split()
NEGATIVE = "awful bland boring clumsy dull shallow tedious terrible weak".split()
ASPECTS = "acting cast dialogue ending music pace plot story".split()


def toy_prompts(held_out):
    """Prompts of the sentiment task, in a fixed random order: the last 40 are held out."""
    prompts = [f"{who} {saw} the {show} {when}."
               for who in ("I", "We", "My sister", "Our class", "Two friends")
               for saw in ("saw", "watched")
               for show in ("film", "movie", "musical", "opera", "play", "series")
               for when in ("last night", "yesterday", "on Friday", "in London", "with friends")]
    random.Random(0).shuffle(prompts)
    return prompts[-40:] if held_out else prompts[:-40]


def toy_grammatical(review):
    """One or two sentences of the toy's grammar, whatever their aspects and adjectives."""
    word, aspect = "|".join(POSITIVE + NEUTRAL + NEGATIVE), "|".join(ASPECTS)
    subject = rf"(?:The (?:{aspect}) was|I found the (?:{aspect}))"
    sentence = rf" {subject} (?:{word})(?: and (?:{word}))?\."
    return bool(re.fullmatch(f"(?:{sentence}){{1,2}}", review))


def toy_reward(review):
    """The true reward: positive words minus negative words, wherever they stand."""
    words = re.findall(r"\w+", review)
    return float(sum((word in POSITIVE) - (word in NEGATIVE) for word in words))


def toy_pairs(model, tokenizer, count, seed, held_out=False):
    """Rows {"prompt", "chosen", "rejected"}: two samples of the model, judged by a noisy human.

    The human prefers y to y' with probability sigma(r(y) - r(y')): Bradley and Terry's model.
    """
    rng = random.Random(seed)
    prompts = [rng.choice(toy_prompts(held_out)) for _ in range(count)]
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(2)]
    texts = [tokenizer.decode(ids) for ids in sample(model, tokenizer, asked, 64, seed)[0]]
    rows = []
    for prompt, a, b in zip(prompts, texts[::2], texts[1::2], strict=True):
        a_wins = rng.random() < 1 / (1 + math.exp(toy_reward(b) - toy_reward(a)))
        chosen, rejected = (a, b) if a_wins else (b, a)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


# ---------------------------------------------------------------------------------------- data


def read_preferences(path, loss):
    """Rows {"prompt", "chosen", "rejected"}, or for KTO {"prompt", "completion", "label"}.

    A ranking {"prompt", "responses", "ranks"} (1 is best) gives each pair that is strictly ordered.
    """
    example = '{"prompt": "...", "chosen": "...", "rejected": "..."}'
    rows = []
    for place, row in read_jsonl(path):
        new = {"prompt": get_text(place, row, "prompt", example)}
        if "label" in row:
            if loss != "kto" or not isinstance(row["label"], bool):
                fail(f'{place}: "label" must be true or false, and is for --loss kto')
            rows.append(new | {"completion": get_text(place, row, "completion", example),
                               "label": row["label"]})
        elif "responses" in row:
            texts, ranks = row["responses"], row.get("ranks")
            if not (isinstance(texts, list) and isinstance(ranks, list) and len(texts) == len(ranks)
                    and all(type(rank) is int and rank > 0 for rank in ranks)):
                fail(f'{place}: "responses" needs as many "ranks", whole numbers from 1 (the best)')
            texts = [get_text(place, {"responses": text}, "responses", example) for text in texts]
            rows += [new | {"chosen": w, "rejected": l} for w, i in zip(texts, ranks)
                     for l, j in zip(texts, ranks) if i < j]
        else:
            rows.append(new | {key: get_text(place, row, key, example)
                               for key in ("chosen", "rejected")})
    return rows or fail(f"--data {path}: no row prefers one response to another")


def encode_preferences(tokenizer, rows, max_length):
    """Examples (chosen, rejected, True), or (completion, None, label), and counts of what is lost.

    A response is (prompt ids, response ids). Pairs that are identical once they are cut are left
    out: they would cost a step and teach nothing.
    """
    examples, lost = [], {"dropped": 0, "identical": 0, "cut": 0}
    for row in rows:
        texts = [row[key] for key in ("completion", "chosen", "rejected") if key in row]
        ids = [tokenizer.encode_example(row["prompt"], text, max_length) for text in texts]
        if None in ids:
            lost["dropped"] += 1
        elif len(ids) == 2 and ids[0] == ids[1]:
            lost["identical"] += 1
        else:
            examples.append((ids[0], ids[1] if len(ids) == 2 else None, row.get("label", True)))
            lost["cut"] += sum(response[-1] != tokenizer.eos_id for _, response in ids)
    return examples, lost


def kto_examples(examples):
    """Examples (response, partner, desirable) from shuffled ones of `encode_preferences`.

    The partner is a response to another prompt, put behind this prompt: such mismatched pairs tell
    how far the policy has moved at large. Fixed here, so that the reference scores them only once.
    """
    single = [(ids, good) for first, second, label in examples
              for ids, good in ((first, label), (second, False)) if ids]
    result = []
    for i, ((prompt, response), good) in enumerate(single):
        others = (single[(i + k) % len(single)][0] for k in range(1, len(single)))
        partner = next((ids[1] for ids in others if ids[0] != prompt), None)
        if partner is None:
            fail("--loss kto needs at least two different prompts")
        result.append(((prompt, response), (prompt, partner), good))
    return result


# ---------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def score(model, sequences, autocast, size=64):
    """Summed log-probs of any number of (prompt ids, response ids): (len(sequences),)."""
    with autocast:
        parts = [response_logps(model, collate(sequences[i:i + size], model.device))[0]
                 for i in range(0, len(sequences), size)]
    return torch.cat(parts).cpu()


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


def standard_error(x):
    """Standard error of the mean of (P, n): n samples for each of P fixed prompts."""
    return float((x.var(1) / x.shape[1]).sum().sqrt()) / len(x)


def yardstick(rewards, policy, reference, beta):
    """How near J = E[r] - beta KL comes to the most that any policy can reach, its optimum J*.

    rewards, policy, reference: (P, 2n): for each of P prompts n samples of the reference, then n of
    the policy, and their summed log-probs under both. Returns numbers and ell (P, 2n), where
    ell(y) = r(y) - beta log pi(y)/pi_ref(y) is the same for all y at the optimum and only there.
    """
    n = rewards.shape[1] // 2
    ell = rewards - beta * (policy - reference)  # (P, 2n)
    # J* = beta log E_q[pi_ref/q exp(r/beta)], over the pool q = (pi_ref + pi) / 2 of all samples.
    x = reference - torch.logaddexp(reference, policy) + math.log(2) + rewards / beta  # (P, 2n)
    best = beta * (x.logsumexp(1) - math.log(2 * n))  # (P,)
    ess = (2 * x.logsumexp(1) - (2 * x).logsumexp(1)).exp()  # (P,), effective sample size
    start, now, end = float(rewards[:, :n].mean()), float(ell[:, n:].mean()), float(best.mean())
    numbers = {"J/reference": start, "J/policy": now, "J/policy_error": standard_error(ell[:, n:]),
               "J/effective_samples": float(ess.min())}
    if numbers["J/effective_samples"] >= 50:  # with fewer the optimum would be a guess
        error = beta * float((1 / ess - 1 / (2 * n)).sum().sqrt()) / len(ess)
        numbers |= {"J/optimum": end, "J/optimum_error": error,
                    "J/share_of_the_way": (now - start) / (end - start)}
    return numbers, ell


def evaluate(policy, reference, tokenizer, test, prompts, args, autocast):
    """(before, after, samples, ell) on held-out preferences and on samples for held-out prompts."""
    before, after = {}, {}
    # Preferences: does the implicit reward beta log pi/pi_ref rank pairs that it never saw?
    sides = {"chosen": [a for a, _, good in test if good],
             "rejected": [b or a for a, b, good in test if b or not good]}
    rewards = {}
    for side, responses in sides.items():
        if responses:  # labelled rows held out may all be good, or all bad
            old, new = (score(model, responses, autocast) for model in (reference, policy))
            rewards[side] = args.beta * (new - old)
            before[f"logps/{side}"], after[f"logps/{side}"] = float(old.mean()), float(new.mean())
            before[f"rewards/{side}"], after[f"rewards/{side}"] = 0.0, float(rewards[side].mean())
    if len(rewards) == 2:
        before["rewards/margin"] = 0.0
        after["rewards/margin"] = after["rewards/chosen"] - after["rewards/rejected"]
    if all(b for _, b, _ in test):  # strictly above: no difference is no success
        before["rewards/accuracy"] = 0.0
        after["rewards/accuracy"] = float((rewards["chosen"] > rewards["rejected"]).float().mean())

    # Samples: n for each of P prompts from both models, with their log-probs under both.
    P, n = len(prompts), args.samples
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(n)]  # P*n
    answers = [sample(model, tokenizer, asked, args.max_new_tokens, args.seed)[0]
               for model in (reference, policy)]
    pool = [pair for column in answers for pair in zip(asked, column, strict=True)]  # 2*P*n
    by_prompt = lambda x: x.double().view(2, P, n).transpose(0, 1).reshape(P, 2 * n)
    old, new = (by_prompt(score(model, pool, autocast)) for model in (reference, policy))  # (P, 2n)
    kl = (new - old)[:, n:]  # (P, n): the policy's own samples
    before["kl/policy_reference"], after["kl/policy_reference"] = 0.0, float(kl.mean())
    after["kl/error"] = standard_error(kl)
    texts = [[tokenizer.decode(ids) for ids in column] for column in answers]
    for column, ids in zip((before, after), answers):
        column["samples/tokens"] = sum(map(len, ids)) / len(ids)
    ell = None
    if not args.data:
        for column, reviews in zip((before, after), texts):
            column["samples/true_reward"] = sum(map(toy_reward, reviews)) / len(reviews)
            column["samples/grammatical"] = sum(map(toy_grammatical, reviews)) / len(reviews)
        rewards = by_prompt(torch.tensor([toy_reward(t) for column in texts for t in column]))
        numbers, ell = yardstick(rewards, new, old, args.beta)  # ell (P, 2n)
        # Before training log pi/pi_ref is 0, so ell was the reward itself.
        ell = {"before": rewards[:, :n], "after": ell[:, n:]}
        after |= numbers
    samples = [{"prompt": prompts[i // n], "before": texts[0][i], "after": texts[1][i]}
               for i in range(0, P * n, math.ceil(n / 2))]  # two of each prompt
    return before, after, samples, ell


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps):
    """Share of the learning rate: up over the first tenth of the steps, then down to 0."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def train(args):
    """Run the algorithm; returns final metrics; leaves model, log and samples in args.out."""
    # 1. The policy. Until its first step it is the reference too: no second model is loaded.
    model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    autocast = settle(args, model, lr_small=5e-4, lr=5e-7)
    state = load_state(args.out, args) if args.resume else {"step": 0, "reference": {}}
    kto = args.loss == "kto"

    # 2. Preferences: of a file, or between samples of the reference, judged by the toy's human.
    if args.data:
        rows, held_out = split_by_prompt(
            read_preferences(args.data, args.loss), args.held_out, args.seed)
        fits = {json.dumps(row["prompt"]): row["prompt"] for row in held_out
                if len(tokenizer.encode_prompt(row["prompt"])) < args.max_length}
        prompts = list(fits.values())[:8]
    else:
        rows = toy_pairs(model, tokenizer, args.pairs, args.seed)
        held_out = toy_pairs(model, tokenizer, max(32, args.pairs // 16), args.seed,
                             held_out=True)
        prompts = toy_prompts(held_out=True)[:8]
    examples, lost = encode_preferences(tokenizer, rows, args.max_length)
    test, _ = encode_preferences(tokenizer, held_out, args.max_length)
    if not examples or not test:
        fail(f"--max_length {args.max_length}: no row of {args.data or 'the toy'} fits; "
             "give a larger one")
    print(f"{len(examples)} preferences, {len(test)} held out. {lost['dropped']} dropped (no room "
          f"behind the prompt), {lost['identical']} identical, {lost['cut']} responses cut")
    tokenizer.show(*examples[0][0])

    # 3. Batches, made once: an epoch shuffles their order, not what is in them.
    random.Random(args.seed).shuffle(examples)
    examples = kto_examples(examples) if kto else examples
    batches = [examples[i:i + args.batch_size] for i in range(0, len(examples), args.batch_size)]
    steps = args.steps or math.ceil(len(batches) * args.epochs)
    order = []
    while len(order) < steps:
        order += random.Random(args.seed + len(order)).sample(range(len(batches)), len(batches))

    def parts(batch):  # a step's batch in --accumulate pieces
        size = math.ceil(len(batch) / args.accumulate)
        return [batch[i:i + size] for i in range(0, len(batch), size)]

    # A prompt is computed once for all its responses, if the model can take such rows.
    longest = max(examples, key=lambda example: sum(map(len, example[0] + example[1])))
    place = (collate_packed if can_pack(lambda *x: response_logps(*x)[0], model, longest[:2])
             else collate)

    def logps(part, *columns):  # of policy and reference: sums, lengths, column by column; padding
        with autocast:
            sequences = [example[column] for example in part for column in columns]
            placed = place(sequences, model.device)
            both = response_logps(model, placed)  # (B * columns,) each: pair after pair
            return *(x.view(len(part), -1).T.flatten() for x in both), placed["padding"]

    # 4. The reference's log-probs of all that will be used, while the policy still is it.
    scored = (0,) if kto else (0, 1)  # what the loss takes: B responses, or B chosen and B rejected
    reference = state["reference"]
    with torch.no_grad():
        missing = sorted(set(order[:steps]) - reference.keys())
        for b in tqdm(missing, desc="reference", disable=None):
            reference[b] = [(logps(part, *scored)[0], logps(part, 1)[0] if kto else None)
                            for part in parts(batches[b])]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    if args.resume:
        restore(state, model, optimizer)

    progress = tqdm(range(state["step"], steps), initial=state["step"], total=steps, disable=None)
    with open_log(args.out, args, state["step"]) as log, deferred_interrupt() as pressed:
        for step in progress:
            batch, old_parts = parts(batches[order[step]]), reference[order[step]]
            size = sum(map(len, batch))

            # 5. KTO's reference point z, of the whole batch: how far mismatched responses moved.
            if kto:
                with torch.no_grad():
                    drift = [logps(part, 1)[0] - old.to(model.device)
                             for part, (_, old) in zip(batch, old_parts, strict=True)]
                    z = kto_reference_point(torch.cat(drift))

            # 6. The loss and its gradient, part by part, divided by the size of the whole batch.
            seen, paddings = [], []
            for part, (old, _) in zip(batch, old_parts, strict=True):
                old = old.to(model.device)
                new, lengths, padding = logps(part, *scored)  # (B,) with KTO, else (2B,)
                if kto:
                    good = torch.tensor([desirable for _, _, desirable in part])  # (B,)
                    losses = kto_loss(new, old, good.to(model.device), z, args.beta,
                                      args.lambda_desirable, args.lambda_undesirable)
                else:
                    good = torch.arange(2 * len(part)) < len(part)  # (2B,): the first half
                    losses = PAIR_LOSSES[args.loss](
                        *new.chunk(2), *old.chunk(2), *lengths.chunk(2), args)  # (B,)
                (losses.sum() / size).backward()
                seen.append([x.detach() for x in (losses, new, old, good)])
                paddings.append(padding)
            losses, new, old, good = (torch.cat(x).cpu() for x in zip(*seen))  # fetched once
            norm = float(torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm))

            # 7. The update. A state is saved before it, of weights that gave a finite loss.
            loss = float(losses.mean())
            checkpoint(args, step, loss + norm, pressed, model, optimizer, reference=reference)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # 8. What to watch.
            row = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": group["lr"],
                   "padding": sum(paddings) / len(paddings)}
            rewards = args.beta * (new - old)
            for side, mask in (("chosen", good), ("rejected", ~good)):
                if mask.any():  # a batch of KTO may hold only good responses, or only bad ones
                    row[f"rewards/{side}"] = float(rewards[mask].mean())
                    row[f"logps/{side}"] = float(new[mask].mean())
            margin = row.get("rewards/chosen", 0.0) - row.get("rewards/rejected", 0.0)
            row["rewards/margin"] = margin
            if kto:
                row["kl/mismatched"] = float(z)
            else:  # strictly above: the equal rewards of the first step are no success
                row["rewards/accuracy"] = float((rewards[good] > rewards[~good]).float().mean())
            log.write(json.dumps(row) + "\n")
            progress.set_postfix(loss=f"{loss:.3f}", margin=f"{margin:.2f}")
        if steps > state["step"]:  # the last update too must leave weights that give numbers
            check_finite(args, steps - 1, float(score(model, [batch[0][0][0]], autocast).sum()))
        save_state(args.out, args, model, optimizer, step=steps, reference=reference)

    # 9. Compare with the reference, loaded again now that the optimizer's memory is free.
    del optimizer
    first, _ = load_model(args.model, device=args.device)
    before, after, samples, ell = evaluate(model, first, tokenizer, test, prompts, args, autocast)
    report(args.out, {"before": before, "after": after}, samples)
    plot(args.out, [["loss"], ["rewards/chosen", "rewards/rejected", "rewards/margin"],
                    ["logps/chosen", "logps/rejected"]], "r - beta log pi/pi_ref", ell)
    save_model(model, tokenizer, args.out)
    (Path(args.out) / "state.pt").unlink()  # this run is complete
    return after


def parse_args(argv=None):
    """The command line; --help shows every default."""
    parser = argparse.ArgumentParser(description="DPO, cDPO, IPO, R-DPO and KTO: see the docstring")
    common_flags(parser, out="runs/dpo", batch_size=32,
                 lr_help="5e-4 below 10M parameters, else 5e-7; LoRA twice, "
                 "or above 10M ten times that")
    flag = parser.add_argument_group("preferences").add_argument
    flag("--loss", default="dpo", choices=[*PAIR_LOSSES, "kto"],
         help="the objective; ipo_mean is ipo on means per token")
    flag("--beta", type=float, help="price of a nat of KL from the reference: higher stays nearer "
         "(derived: 0.5 for the toy, 0.1 with --data)")
    flag("--label_smoothing", type=float, help="dpo: share of labels held to be wrong (derived: 0)")
    flag("--tau", type=float, help="ipo: its beta, higher stays nearer (derived: 0.1)")
    flag("--alpha", type=float, help="rdpo: price of a token of response length (derived: 0.05)")
    flag("--lambda_desirable", type=float, help="kto: weight of good responses (derived: 1)")
    flag("--lambda_undesirable", type=float, help="kto: weight of bad responses (derived: 1)")
    flag("--pairs", type=int, default=4096, help="toy: pairs to sample and learn from")
    flag("--samples", type=int, help="evaluation: samples a prompt (derived: toy 128, else 4)")
    args = parser.parse_args(argv)
    for name in ("label_smoothing", "tau", "alpha", "lambda_desirable", "lambda_undesirable"):
        if name not in DEFAULTS[args.loss] and getattr(args, name) is not None:
            fail(f"--{name} has no part in --loss {args.loss}; leave it out")
        if getattr(args, name) is None:
            setattr(args, name, DEFAULTS[args.loss].get(name))
    args.beta = (0.1 if args.data else 0.5) if args.beta is None else args.beta
    args.samples = (4 if args.data else 128) if args.samples is None else args.samples
    check_flags(args, zero_allowed=("label_smoothing", "alpha"))
    if args.samples < 2:
        fail(f"--samples {args.samples}: at least 2 are needed for a standard error")
    if args.loss == "dpo" and args.label_smoothing >= 0.5:
        fail(f"--label_smoothing {args.label_smoothing}: half of the labels wrong teaches nothing")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        return train(args)
    except KeyboardInterrupt:
        stopped(args.out)


if __name__ == "__main__":
    main()
