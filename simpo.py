"""SimPO, simple preference optimization: Meng, Xia and Chen 2024, arXiv:2405.14734v3.

Let the reward of a response be its mean log-prob per token, which generation follows, and ask that
the chosen one beat the rejected one by a margin gamma. No reference model appears:

    loss = -log sigma(beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x) - gamma)               (6)

The mean makes beta the same for short and long responses. With sums (DPO without its reference)
it would have to suit every length; --lesson shows what goes wrong where it does not.

    python simpo.py                                  # toy: summaries, judged by who likes them long
    python simpo.py --data mine.jsonl --model gpt2   # lines of {"prompt", "chosen", "rejected"}
    python simpo.py --loss orpo                      # or cpo, slic; rrhf and pro take rankings
    python simpo.py --lesson                         # with and without the mean and the margin

"gamma" has two meanings out there. Here, as in Eq. (6) and in TRL's simpo_gamma, it is the margin
itself, set by --gamma_beta_ratio as in the paper's code: gamma = ratio * beta. (In rlhf-book's code
`gamma` is the ratio.)

Where this departs from the paper, and why:
1. The learning rate warms up over a tenth of the steps and falls linearly to 0 (paper: cosine).
2. The KL from the start is measured after training, on a frozen copy loaded then: nothing in the
   loss holds it down, so it is worth a look.
3. The toy's pairs are samples of the model itself, as in the paper's Instruct setting, but judged
   by an annotator whose bias towards length is known, instead of by a reward model.
4. Files hold ranks, not scores, so RRHF's and PRO's r are ranks: neighbours differ by 1.
"""

import argparse
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from model import (check_finite, check_flags, checkpoint, common_flags, deferred_interrupt, fail,
                   get_text, load_model, load_state, open_log, plot, read_jsonl, report, restore,
                   save_model, save_state, settle, split_by_prompt, stopped)

# ---------------------------------------------------------------------------------- the losses


def simpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, beta, gamma):
    """SimPO, Eq. (6); gamma is the margin itself, in units of beta times nats a token.

    chosen, rejected: (B,) log-probs summed over a response with its EOS, in nats; lengths (B,) in
    the same tokens. Returns (B,).
    """
    margin = beta * (chosen / chosen_lengths - rejected / rejected_lengths) - gamma  # (B,)
    return F.softplus(-margin)


def cpo_loss(chosen, rejected, beta, lam=1.0):
    """CPO, Xu et al. 2024 (2401.08417), Eq. (3): DPO with a uniform reference, plus SFT on y_w.

    chosen, rejected: (B,) sums. Returns (B,). lam = 0 is DPO without its reference.
    """
    return F.softplus(-beta * (chosen - rejected)) - lam * chosen


def orpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, lam=0.1):
    """ORPO, Hong et al. 2024 (2403.07691), Eqs. (4), (7): SFT on y_w, plus the log odds ratio.

    Inputs and result as in `simpo_loss`. The odds are of p = exp(mean log-prob), below 1:
    log p/(1 - p). (The original code takes the SFT term over the prompt too.)
    """
    w, l = chosen / chosen_lengths, rejected / rejected_lengths  # (B,) each
    log_odds = (w - log1mexp(w)) - (l - log1mexp(l))  # (B,)
    return -w + lam * F.softplus(-log_odds)


def log1mexp(x):
    """log(1 - e^x) for x < 0, exact near 0, where 1 - e^x is all rounding, and far below it."""
    x = x.clamp(max=-1e-7)  # p = 1 to the last bit would have infinite odds
    near = x > -math.log(2)
    # The branch not taken is differentiated too, so it gets an input that no device rounds to 1.
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, torch.log(-torch.expm1(x)), far)


def slic_loss(chosen, rejected, delta=1.0, lam=1.0):
    """SLiC-HF, Zhao et al. 2023 (2305.10425): a hinge on sums, plus SFT on the chosen response.

    chosen, rejected: (B,) sums. Returns (B,). The paper's SFT target is a reference text; where
    preferences are all there is, it is y_w, as in the table of the SimPO paper.
    """
    return F.relu(delta - chosen + rejected) - lam * chosen


def rrhf_loss(logps, lengths, scores, mask, sft_weight=1.0):
    """RRHF, Yuan et al. 2023 (2304.05302): order mean log-probs by score, plus SFT on the best.

    logps, lengths: (B, K) sums and tokens of K responses; scores (B, K), higher is better; mask
    (B, K), False where a prompt has fewer. Returns (B,): the sum over pairs with r_i < r_j of
    max(0, p_i - p_j), p being means, minus sft_weight times the best one's sum.
    """
    p = torch.where(mask, logps / lengths.clamp(min=1), 0.0)  # (B, K)
    worse = (scores[:, :, None] < scores[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    rank = (F.relu(p[:, :, None] - p[:, None, :]) * worse).sum((1, 2))  # (B, K, K) -> (B,)
    best = scores.masked_fill(~mask, -math.inf).argmax(1, keepdim=True)  # (B, 1)
    return rank - sft_weight * logps.gather(1, best).squeeze(1)  # (B, K) -> (B,)


def pro_loss(logps, lengths, scores, mask, sft_weight=None):
    """PRO, Song et al. 2023 (2306.17492): in turn each response against all that are worse.

    Inputs as in `rrhf_loss`, in any order; sft_weight defaults to 0.05 (K - 1)^2, as in the
    original code. Returns (B,). With p the mean log-prob, response k adds -log of
    e^(p_k/T_kk) / sum over i of e^(p_i/T_ki), i being k or worse, 1/T_ki = r_k - r_i for the worse
    ones and 1/T_kk the largest of them.
    """
    p = torch.where(mask, logps / lengths.clamp(min=1), 0.0)  # (B, K)
    gap = scores[:, :, None] - scores[:, None, :]  # (B, K, K): 1/T_ki
    worse = (gap > 0) & mask[:, :, None] & mask[:, None, :]  # (B, K, K): i is worse than k
    own = gap.masked_fill(~worse, 0).amax(2)  # (B, K): 1/T_kk, 0 if none is worse
    others = (p[:, None, :] * gap).masked_fill(~worse, -math.inf)  # (B, K, K)
    terms = torch.cat([(p * own)[:, :, None], others], 2).logsumexp(2) - p * own  # (B, K)
    best = scores.masked_fill(~mask, -math.inf).argmax(1, keepdim=True)  # (B, 1)
    weight = 0.05 * (mask.sum(1) - 1) ** 2 if sft_weight is None else sft_weight
    return terms.sum(1) - weight * logps.gather(1, best).squeeze(1)  # (B,)


# By --loss: from sums y and lengths n (B, K), best response first, scores s, mask m, the flags a.
LOSSES = {
    "simpo": lambda y, n, s, m, a: simpo_loss(
        y[:, 0], y[:, 1], n[:, 0], n[:, 1], a.beta, a.gamma_beta_ratio * a.beta),
    "cpo": lambda y, n, s, m, a: cpo_loss(y[:, 0], y[:, 1], a.beta, a.lam),
    "orpo": lambda y, n, s, m, a: orpo_loss(y[:, 0], y[:, 1], n[:, 0], n[:, 1], a.lam),
    "slic": lambda y, n, s, m, a: slic_loss(y[:, 0], y[:, 1], a.delta, a.lam),
    "rrhf": lambda y, n, s, m, a: rrhf_loss(y, n, s, m, a.sft_weight),
    "pro": lambda y, n, s, m, a: pro_loss(y, n, s, m, a.sft_weight),
}
RANKED = ("rrhf", "pro")  # what takes whole rankings; the others take each pair of them
# The flags of each loss with their defaults, from its paper or that paper's code.
DEFAULTS = {"simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5}, "cpo": {"beta": 0.1, "lam": 1.0},
            "orpo": {"lam": 0.1}, "slic": {"delta": 1.0, "lam": 1.0}, "rrhf": {"sft_weight": 1.0},
            "pro": {"sft_weight": None}}

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

FACTS = {kind: words.split() for kind, words in {
    "who": "Anna Boris Clara David Emma Felix Grace Henry Irene Jacob Karin Louis Nora Oscar",
    "what": "bicycle camera guitar jacket kettle notebook phone ring scarf suitcase ticket",
    "where": "Athens Berlin Cairo Dublin Lisbon Madrid Oslo Paris Prague Rome Tokyo Vienna",
    "when": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"}.items()}
SAID = {"who": ("My friend is called {}.", "This story is about {}."),
        "what": ("A {} got lost.", "Somebody forgot a {}."),
        "where": ("It happened in {}.", "We were in {}."),
        "when": ("The day was {}.", "It was a {}.")}
FILLER = ("It rained a lot.", "I had not slept well.", "Nobody said a word.", "The food was cold.",
          "I still think about it.", "We laughed in the end.", "The train was late.",
          "Everyone kept looking around.", "That street is always crowded.",
          "Please help if you can.")


def toy_post(rng):
    """A post of three to seven sentences that states two to four facts: (prompt, facts)."""
    kinds = rng.sample(list(FACTS), rng.choice((2, 3, 4)))
    facts = {kind: rng.choice(FACTS[kind]) for kind in kinds}
    said = [rng.choice(SAID[kind]).format(fact) for kind, fact in facts.items()]
    sentences = said + rng.sample(FILLER, rng.choice((1, 2, 3)))
    rng.shuffle(sentences)
    return " ".join(sentences) + "\nTL;DR:", facts


def toy_quality(summary, facts):
    """True quality of a summary: recall of facts - made-up facts - 0.01 a word; also the parts."""
    words = re.findall(r"\w+", summary)
    stated = set(words) & {fact for values in FACTS.values() for fact in values}
    recall = len(stated & set(facts.values())) / len(facts)
    made_up = len(stated - set(facts.values())) / len(facts)
    return {"quality": recall - made_up - 0.01 * len(words), "recall": recall, "made_up": made_up}


def toy_grammatical(summary):
    """One sentence of the toy's grammar, whatever it states."""
    what, where, when = ("|".join(FACTS[kind]) for kind in ("what", "where", "when"))
    return bool(re.fullmatch(rf" \w+ lost (a (?:{what})|something)(?: in (?:{where}))?"
                             rf"(?: on (?:{when}))?\.", summary))


def toy_rankings(model, tokenizer, count, k, length_bias, seed, held_out=False):
    """Rows {"prompt", "responses", "ranks", "facts"}: k samples of the model, ranked by a human.

    The human sees true quality, likes every word more than it deserves, and errs (Gumbel noise:
    Plackett and Luce's model, of pairs Bradley and Terry's).
    """
    rng = random.Random(f"{seed} {held_out}")
    posts = [toy_post(rng) for _ in range(count)]
    asked = [tokenizer.encode_prompt(prompt) for prompt, _ in posts for _ in range(k)]
    texts = [tokenizer.decode(ids) for ids in sample(model, tokenizer, asked, 64, seed)[0]]
    rows = []
    for i, (prompt, facts) in enumerate(posts):
        group = texts[i * k:(i + 1) * k]
        noisy = [4 * toy_quality(text, facts)["quality"] + length_bias * len(text.split())
                 - math.log(rng.expovariate(1)) for text in group]
        ranks = [1 + sum(other > own for other in noisy) for own in noisy]
        rows.append({"prompt": prompt, "responses": group, "ranks": ranks, "facts": facts})
    return rows


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


def best_first(example):
    """An example of `encode_rankings` with its responses in the order of their ranks."""
    responses, ranks = example
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    places = sorted(set(ranks))  # only the order counts: ranks 1, 3, 4 are 1, 2, 3
    return [responses[i] for i in order], [1 + places.index(ranks[i]) for i in order]


def pairs_of(examples):
    """Each strictly ordered pair of each ranking, as a ranking of two, the chosen one first."""
    return [([w, l], [1, 2]) for responses, ranks in examples
            for w, i in zip(responses, ranks) for l, j in zip(responses, ranks) if i < j]


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


def evaluate(policy, reference, tokenizer, test, rows, args, autocast):
    """(columns of the table, samples) on held-out pairs, and on samples for held-out rows."""
    asked = [tokenizer.encode_prompt(row["prompt"]) for row in rows for _ in range(args.samples)]
    columns, answers = {}, {}
    for name, model in (("before", reference), ("after", policy)):
        sides = [[pair[i] for pair, _ in test] for i in (0, 1)]
        sums = [score(model, side, autocast) for side in sides]  # (n,) each
        means = [s / torch.tensor([len(y) for _, y in side]) for s, side in zip(sums, sides)]
        answers[name], _ = sample(model, tokenizer, asked, args.max_new_tokens, args.seed)
        texts = [tokenizer.decode(ids) for ids in answers[name]]
        average = lambda values: sum(values) / len(texts)
        columns[name] = {
            "logps/chosen": float(sums[0].mean()), "logps/rejected": float(sums[1].mean()),
            "mean_logps/chosen": float(means[0].mean()),
            "mean_logps/rejected": float(means[1].mean()),
            "rewards/accuracy": float((means[0] > means[1]).float().mean()),
            "samples/tokens": average(map(len, answers[name]))}
        if not args.data:
            facts = [row["facts"] for row in rows for _ in range(args.samples)]
            parts = [toy_quality(*pair) for pair in zip(texts, facts, strict=True)]
            columns[name] |= {f"samples/{key}": average(q[key] for q in parts) for key in parts[0]}
            columns[name]["samples/words"] = average(len(text.split()) for text in texts)
            columns[name]["samples/grammatical"] = average(map(toy_grammatical, texts))
    own = list(zip(asked, answers["after"], strict=True))
    kl = (score(policy, own, autocast) - score(reference, own, autocast)).double()[None]  # (1, n)
    columns["before"]["kl/policy_reference"] = 0.0
    columns["after"] |= {"kl/policy_reference": float(kl.mean()), "kl/error": standard_error(kl)}
    samples = [{"prompt": rows[i // args.samples]["prompt"]}
               | {name: tokenizer.decode(ids[i]) for name, ids in answers.items()}
               for i in range(0, min(16, len(own)), 2)]
    return columns, samples


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps):
    """Share of the learning rate: up over the first tenth of the steps, then down to 0."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def train(args):
    """Run the algorithm; returns final metrics; leaves model, log and samples in args.out."""
    # 1. The policy: the only model until training is over.
    model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    autocast = settle(args, model, lr_small=3e-4, lr=5e-7)
    state = load_state(args.out, args) if args.resume else {"step": 0}

    # 2. Rankings: of a file, or of the model's own samples by the toy's human; or all their pairs.
    if args.data:
        rows, held_out = split_by_prompt(read_rankings(args.data), args.held_out, args.seed)
    else:
        toy = lambda count, part: toy_rankings(
            model, tokenizer, count, args.k, args.length_bias, args.seed, held_out=part)
        rows, held_out = toy(args.rankings, False), toy(max(32, args.rankings // 8), True)
    examples, lost = encode_rankings(tokenizer, rows, args.max_length, args.loss)
    test, _ = encode_rankings(tokenizer, held_out, args.max_length, args.loss)
    shown = [row for row in held_out
             if len(tokenizer.encode_prompt(row["prompt"])) < args.max_length]
    if not examples or not test:
        fail(f"{args.data or 'toy'}: no row is left {'held out' if examples else 'to learn from'}; "
             f"a row needs responses that differ in rank and fit into --max_length "
             f"{args.max_length}")
    kind = "rankings" if args.loss in RANKED else "pairs"
    examples = [best_first(example) for example in examples]
    examples, test = examples if args.loss in RANKED else pairs_of(examples), pairs_of(test)
    print(f"{len(examples)} {kind}, {len(test)} pairs held out. {lost['dropped']} rows dropped (no "
          f"room behind the prompt), {lost['tied']} all tied; {lost['identical']} responses "
          f"identical to another, {lost['cut']} cut")
    tokenizer.show(*examples[0][0][0])

    # 3. Batches, made once: an epoch shuffles their order, not what is in them.
    random.Random(args.seed).shuffle(examples)
    batches = [examples[i:i + args.batch_size] for i in range(0, len(examples), args.batch_size)]
    steps = args.steps or math.ceil(len(batches) * args.epochs)
    order = []
    while len(order) < steps:
        order += random.Random(args.seed + len(order)).sample(range(len(batches)), len(batches))
    # A prompt is computed once for all its responses, if the model can take such rows.
    longest = max((responses for responses, _ in examples),
                  key=lambda responses: sum(len(p) + len(y) for p, y in responses))
    place = (collate_packed if can_pack(lambda *x: response_logps(*x)[0], model, longest)
             else collate)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    if args.resume:
        restore(state, model, optimizer)

    progress = tqdm(range(state["step"], steps), initial=state["step"], total=steps, disable=None)
    with open_log(args.out, args, state["step"]) as log, deferred_interrupt() as pressed:
        for step in progress:
            batch = batches[order[step]]

            # 4. Log-probs of all responses, best first, and the loss, part by part.
            seen, paddings, size = [], [], math.ceil(len(batch) / args.accumulate)
            for i in range(0, len(batch), size):
                part = batch[i:i + size]
                ranks = pad_ranks(part).to(model.device)  # (B, K)
                mask = ranks > 0
                placed = place([ids for responses, _ in part for ids in responses], model.device)
                with autocast:
                    sums, lengths = response_logps(model, placed)  # (n,)
                y, n = (torch.zeros(mask.shape, device=model.device).masked_scatter(mask, x)
                        for x in (sums, lengths))  # (n,) -> (B, K)
                scores = (ranks.amax(1, keepdim=True) - ranks).float()  # (B, K), by rank
                losses = LOSSES[args.loss](y, n, scores, mask, args)  # (B,)
                (losses.sum() / len(batch)).backward()
                last = mask.sum(1, keepdim=True) - 1  # (B, 1): the worst response
                sides = [y[:, 0], y.gather(1, last)[:, 0], n[:, 0], n.gather(1, last)[:, 0]]  # (B,)
                seen.append([x.detach() for x in (losses, *sides)])
                paddings.append(placed["padding"])
            losses, w, l, nw, nl = (torch.cat(x).cpu() for x in zip(*seen))  # fetched once
            norm = float(torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm))

            # 5. The update. A state is saved before it, of weights that gave a finite loss.
            loss = float(losses.mean())
            checkpoint(args, step, loss + norm, pressed, model, optimizer)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # 6. What to watch.
            row = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": group["lr"],
                   "padding": sum(paddings) / len(paddings), "logps/chosen": float(w.mean()),
                   "logps/rejected": float(l.mean()),
                   "mean_logps/chosen": float((w / nw).mean()),
                   "mean_logps/rejected": float((l / nl).mean()),
                   "rewards/accuracy": float((w / nw > l / nl).float().mean())}
            log.write(json.dumps(row) + "\n")
            progress.set_postfix(loss=f"{loss:.3f}", accuracy=f"{row['rewards/accuracy']:.2f}")
        if steps > state["step"]:  # the last update too must leave weights that give numbers
            check_finite(args, steps - 1, float(score(model, batch[0][0], autocast).sum()))
        save_state(args.out, args, model, optimizer, step=steps)

    # 7. Compare with the start, loaded again now that the optimizer's memory is free.
    del optimizer
    first, _ = load_model(args.model, device=args.device)
    shown = shown[:8 if args.data else 256]
    columns, samples = evaluate(model, first, tokenizer, test, shown, args, autocast)
    report(args.out, columns, samples)
    plot(args.out, [["loss"], ["mean_logps/chosen", "mean_logps/rejected"],
                    ["logps/chosen", "logps/rejected"]])
    save_model(model, tokenizer, args.out)
    (Path(args.out) / "state.pt").unlink()  # this run is complete
    return columns["after"]


def toy_lesson(args):
    """What the mean and the margin do: the toy run, and the same with one of them taken away.

    Sums are DPO without its reference (CPO without its SFT term). A sum is the mean times the
    number of tokens, so at the same beta the pairs that the policy ranks as the human did soon have
    no gradient left. What remains are those where the human erred, for length or by chance: the
    policy learns the errors. A lower beta on sums does as well here, where lengths vary little.
    """
    sums = {"loss": "cpo", "lam": 0.0, "gamma_beta_ratio": None}
    variants = {"simpo": {}, "no margin": {"gamma_beta_ratio": 0.0}, "sums": sums,
                "sums b=.1": sums | {"beta": 0.1}}
    columns = {}
    for name, flags in variants.items():
        print(f"\n--- {name}: {flags or 'as given'}")
        out = str(Path(args.out) / re.sub(r"\W+", "_", name))
        train(argparse.Namespace(**vars(args) | flags | {"out": out, "lesson": False}))
        results = json.loads((Path(out) / "results.json").read_text())
        columns |= {"before": results["before"], name: results["after"]}

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3))
    for axis, key in zip(axes, ("quality", "recall", "made_up", "words")):
        axis.bar(columns.keys(), [c[f"samples/{key}"] for c in columns.values()])
        axis.set_title(key)
        axis.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    figure.savefig(Path(args.out) / "lesson.png", dpi=90)
    plt.close(figure)
    report(args.out, columns, [])
    print(f"the bars are in {Path(args.out) / 'lesson.png'}")
    return columns["simpo"]


def parse_args(argv=None):
    """The command line; --help shows every default."""
    parser = argparse.ArgumentParser(description="SimPO, CPO, ORPO, RRHF, SLiC-HF and PRO: see the "
                                     "docstring")
    common_flags(parser, out="runs/simpo", batch_size=32,
                 lr_help="3e-4 below 10M parameters, else 5e-7; LoRA twice, or above 10M ten times "
                 "that")
    flag = parser.add_argument_group("preferences").add_argument
    flag("--loss", default="simpo", choices=[*LOSSES], help="the objective")
    flag("--beta", type=float, help="simpo, cpo: scale of the log-probs; higher learns from ever "
         "closer pairs only (derived: 2, 0.1)")
    flag("--gamma_beta_ratio", type=float, help="simpo: the margin gamma over beta: by how many "
         "nats a token the chosen response shall be likelier (derived: 0.5)")
    flag("--lam", type=float, help="weight of cpo's and slic's SFT term, or of orpo's odds ratio "
         "(derived: 1, 1, 0.1)")
    flag("--delta", type=float, help="slic: margin of the hinge, in nats (derived: 1)")
    flag("--sft_weight", type=float, help="weight of rrhf's and pro's SFT term (derived: rrhf 1, "
         "pro 0.05 (K - 1)^2)")
    flag = parser.add_argument_group("toy and evaluation").add_argument
    flag("--rankings", type=int, default=2048, help="toy: posts with summaries to learn from")
    flag("--k", type=int, help="toy: summaries of each (derived: 2, for rrhf and pro 4)")
    flag("--length_bias", type=float, default=1.0, help="toy: how many nats the human likes a "
         "summary better for each word; its true quality, which is below 1, counts 4")
    flag("--lesson", action="store_true", help="toy: train also without the margin, and "
         "on sums, and compare; ends with one table")
    flag("--samples", type=int, help="samples a prompt (derived: toy 1 of 256 posts, else 4 of 8)")
    args = parser.parse_args(argv)
    for name in ("beta", "gamma_beta_ratio", "lam", "delta", "sft_weight"):
        if name not in DEFAULTS[args.loss] and getattr(args, name) is not None:
            fail(f"--{name} has no part in --loss {args.loss}; leave it out")
        if getattr(args, name) is None:
            setattr(args, name, DEFAULTS[args.loss].get(name))
    args.k = (4 if args.loss in RANKED else 2) if args.k is None else args.k
    args.samples = (4 if args.data else 1) if args.samples is None else args.samples
    check_flags(args, zero_allowed=("gamma_beta_ratio", "lam", "delta", "sft_weight",
                                    "length_bias"))
    if args.k < 2:
        fail(f"--k {args.k}: a comparison needs at least two responses")
    if args.data and args.samples < 2:
        fail(f"--samples {args.samples}: at least 2 are needed for a standard error")
    if args.lesson and (args.data or args.loss != "simpo" or args.resume):
        fail("--lesson compares variants of the toy's run; leave out --data, --loss and --resume")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        return toy_lesson(args) if args.lesson else train(args)
    except KeyboardInterrupt:
        if args.lesson:
            print(f"\nstopped; the runs that were finished are in {args.out}", file=sys.stderr)
            raise SystemExit(130) from None
        stopped(args.out)


if __name__ == "__main__":
    main()
