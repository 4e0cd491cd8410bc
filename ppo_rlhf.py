"""RLHF with PPO: step 3 of InstructGPT, Ouyang et al. 2022, arXiv:2203.02155v1, 3.5, after Ziegler
et al. 2019, arXiv:1909.08593v2, and Schulman et al. 2017, arXiv:1707.06347v2.

Maximise a reward r while staying near a reference policy rho, the model before its first step:

    R(x, y) = r(x, y) - beta log pi(y|x)/rho(y|x)                            (Ziegler et al., Eq. 2)

Each token is an action: it pays its share of the penalty, and the last one earns r. Sample,
estimate advantages A_t with a value network, and climb PPO's clipped objective, by minimising, with
q_t = pi(y_t)/pi_old(y_t),

    loss = - mean_t min(q_t A_t, clip(q_t, 1 - e, 1 + e) A_t)           (Schulman et al., Eq. 7)

    python ppo_rlhf.py                                 # toy: reviews, the true reward
    python ppo_rlhf.py --data mine.jsonl --model gpt2 --reward_model runs/reward_model
    python ppo_rlhf.py --algo best_of_n                # no training; or raft: train on the best

Where this departs from the papers and OpenAI's code, and why:
 1. The value network has weights of its own, as in InstructGPT; the weight 0.1 of the value loss,
    which balances what is shared, is gone. Its new head starts at 0 unless it is a reward model's.
 2. Responses end where EOS is sampled, instead of being sampled on to a fixed length and cut there.
    The score stands on EOS itself (TRL puts it on the slot behind, which adds a step to GAE). One
    that does not end scores --missing_eos_score, as in OpenAI's code (TRL subtracts a penalty).
 3. Advantages are whitened over the rollout (OpenAI: over each minibatch), in population variance.
 4. Rewards are not whitened (--whiten_rewards does): it would rescale the penalty, so beta would no
    longer be a price in units of reward.
 5. The penalty's beta is fixed, as in InstructGPT; --kl_target adapts it, as in Ziegler et al.
 6. Sampling temperature is 1, so no logits are divided by it. EOS is also the padding token: masks
    come from lengths, so nothing looks for pads.
 7. The learning rate warms up over a tenth of the run and falls to 0 (Ziegler: falls from the
    start; InstructGPT: warms up from 10 % over 10 iterations, then stays). No average of weights
    (InstructGPT: 0.992). Adam's epsilon acts where PyTorch adds it, not where TensorFlow does.
 8. --ptx_coef weighs a mean per token over as many texts as samples (InstructGPT: 8 times as
    many), so its 27.8 does not carry over. The policy starts from plain SFT, without a tenth of
    pretraining data mixed in.
 9. Log-probs are kept from sampling, not computed again, where both agree to 1e-5 (not in bf16).
10. One device: no seeds by rank. 4 epochs of 2 minibatches (Ziegler: 4 of 1, InstructGPT: 1 of 8).
11. Policy and value network share one learning rate (InstructGPT: each its own), and Adam's betas
    are (0.9, 0.95). A step has --n samples of each prompt (papers: one), so that scores of one
    prompt can be compared.
12. RAFT takes as many epochs and minibatches as PPO, and has no penalty: --beta is only what its J
    is measured with.
"""

import argparse
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

# ------------------------------------------------------------------ rewards, advantages, losses


def token_rewards(scores, logps, reference_logps, mask, beta):
    """-beta log pi/rho on every token, plus the score on the last: Ziegler et al. 2019, Eq. (2).

    scores: (B,); log-probs of the sampled tokens, in nats, and mask: (B, R). Returns (B, R), 0
    behind the end. Constants: no gradient flows through the penalty.
    """
    penalty = (beta * (logps - reference_logps)).masked_fill(~mask.bool(), 0)  # (B, R)
    last = mask.sum(1).long() - 1  # (B,)
    return (-penalty).scatter_add(1, last[:, None], scores[:, None].to(penalty.dtype))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: Schulman et al. 2015, arXiv:1506.02438v6, Eq. (16).

    rewards, values, mask: (B, R); values[:, t] is that of the state before token t, and the state
    behind the last token is worth 0. Returns (advantages, returns = advantages + values), (B, R).
    """
    mask = mask.bool()
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(values)
    advantage = next_value = values.new_zeros(len(values))  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,), 0 behind the end
        advantages[:, t] = advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(x, mask, shift_mean=True):
    """x (B, R) with variance 1 over the mask, and mean 0 unless shift_mean is False; else 0."""
    mask = mask.bool()
    x = x.masked_fill(~mask, 0)
    mean = x.sum() / mask.sum()
    var = ((x - mean) ** 2 * mask).sum() / mask.sum()
    white = (x - mean) * torch.rsqrt(var + 1e-8)
    return (white if shift_mean else white + mean).masked_fill(~mask, 0)


def policy_loss(logps, old_logps, advantages, mask, clip=0.2, normalizer=None):
    """PPO's clipped objective, to be minimised: Schulman et al. 2017, Eq. (7). (B, R) to a scalar.

    The larger of two losses is the pessimist's choice: leaving [1 - clip, 1 + clip] where it would
    help gains nothing more, but what hurts is felt in full. normalizer: response tokens of the
    whole minibatch, if this is a part of it.
    """
    pad = ~mask.bool()  # (B, R)
    ratio = (logps - old_logps).masked_fill(pad, 0).exp()
    against = -advantages.masked_fill(pad, 0)
    losses = torch.max(against * ratio, against * ratio.clamp(1 - clip, 1 + clip))
    return losses.sum() / (mask.sum() if normalizer is None else normalizer)


def value_loss(values, old_values, returns, mask, clip=0.2, normalizer=None):
    """Half the squared error, or that of the values kept within clip of the old ones, if larger.

    All (B, R), to a scalar; normalizer as in `policy_loss`. From OpenAI's code, not in the papers.
    """
    values, old_values, returns = (
        x.masked_fill(~mask.bool(), 0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)  # (B, R)
    losses = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return losses.sum() / (mask.sum() if normalizer is None else normalizer)


def adapt_beta(beta, kl, target, k_beta=0.1):
    """The next beta of a proportional controller: Ziegler et al. 2019, 2.2. kl: nats a response."""
    error = max(-0.2, min(0.2, kl / target - 1))
    return beta * (1 + k_beta * error)


def kl_estimates(logps, reference_logps, mask):
    """KL(pi || rho) in nats a response from pi's own samples, (B, R) log-probs: scalars (k1, k3).

    With u = log rho - log pi: k1 = -u and k3 = e^u - 1 - u, summed over tokens. Both are unbiased;
    k3 is never negative (Schulman's note of 2020). With u the other way round "k1" is -KL.
    """
    u = (reference_logps - logps).masked_fill(~mask.bool(), 0)  # (B, R)
    return -u.sum(1).mean(), (torch.expm1(u) - u).sum(1).mean()


def best_of_n_log_ratio(rewards, pool, n):
    """log pi_n/rho of the best of n samples of rho, from its reward: (P, m), with P prompts.

    pool: (P, M) rewards of samples of rho, those of `rewards` among them. The best has reward r
    with probability F(r)^n - F_(r)^n, where F counts rewards <= r and F_ those < r. So its
    KL(pi_n || rho) can be measured. It is at most log n - (n - 1)/n.
    """
    F = (pool[:, None] <= rewards[..., None]).double().mean(2)  # (P, m, M) -> (P, m)
    F_ = (pool[:, None] < rewards[..., None]).double().mean(2)  # (P, m)
    return torch.log((F**n - F_**n) / (F - F_))


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


def token_values(model, batch):
    """Value of the state before each response token of a batch: (N,), where `token_logps` looks."""
    hidden = model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"], use_cache=False).last_hidden_state  # (B, T, D)
    hidden = hidden.flatten(0, 1).index_select(0, batch["index"])  # (B*T, D) -> (N, D)
    with torch.autocast(hidden.device.type, enabled=False):  # the value itself is in fp32
        return model.score(hidden.to(model.score.weight.dtype)).squeeze(1)  # (N, 1) -> (N,)


def to_rows(flat, mask):
    """Numbers (N,) of the response tokens of a batch, one row a response: (B, R), else 0."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat.float())


@torch.no_grad()
def per_token(function, model, sequences, mask, autocast, size):
    """`token_logps` or `token_values` of all (prompt ids, response ids), as rows: (B, R)."""
    with autocast:
        parts = [function(model, collate(sequences[i:i + size], mask.device))
                 for i in range(0, len(sequences), size)]
    return to_rows(torch.cat(parts), mask)


# ---------------------------------------------------------------------------- the reward model


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


@torch.no_grad()
def rate(model, sequences, autocast, size=64):
    """Scores of any number of (prompt ids, response ids): (len(sequences),)."""
    with autocast:
        parts = [reward_scores(model, collate(sequences[i:i + size], model.device))
                 for i in range(0, len(sequences), size)]
    return torch.cat(parts).float().cpu()


def ranking_loss(rewards, ranks):
    """Mean of -log sigma(r_i - r_j) over a prompt's pairs, i better than j: InstructGPT, Eq. (1).

    rewards: (B, K) scores; ranks: (B, K) whole numbers, 1 is best, 0 is padding. Tied pairs add
    nothing, but the divisor is C(K, 2) of all K real responses. Returns (B,), in nats a pair.
    """
    better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks > 0)[:, :, None]  # (B, K, K): i, j
    margins = (rewards[:, :, None] - rewards[:, None, :]).masked_fill(~better, 0)  # (B, K, K)
    K = (ranks > 0).sum(1)  # (B,)
    return (F.softplus(-margins) * better).sum((1, 2)) / (K * (K - 1) / 2).clamp(min=1)


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


def pad_ranks(examples):
    """Ranks of B examples with up to K responses: (B, K), 0 where a prompt has fewer."""
    return nn.utils.rnn.pad_sequence([torch.tensor(ranks) for _, ranks in examples],
                                     batch_first=True)


def refit(reward, rankings, samples, args, autocast):
    """One more epoch of the reward model, on all rankings of the policy's own samples so far.

    The scores that PPO climbs were learnt on samples of the reference. The further the policy moves
    from it the less they mean, which fresh rankings mend (Ziegler et al. 2019, 2.3). At the end the
    scores of samples, (prompt, text), have mean 0 and SD 1 again.
    """
    model, tokenizer = reward
    rows = random.Random(len(rankings)).sample(rankings, len(rankings))
    context = getattr(model.config, "max_position_embeddings", 1024)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.relabel_lr, weight_decay=0.0)
    for part in (rows[i:i + 16] for i in range(0, len(rows), 16)):
        ranks = pad_ranks([(None, row["ranks"]) for row in part]).to(model.device)  # (B, K)
        sequences = [tokenizer.encode_example(row["prompt"], text, context)
                     for row in part for text in row["responses"]]
        with autocast:
            flat = reward_scores(model, collate(sequences, model.device))  # (n,)
        if not flat.isfinite().all():
            fail(f"--relabel_lr {args.relabel_lr:g} ruined the reward model; give a lower one")
        rewards = flat.new_zeros(ranks.shape).masked_scatter(ranks > 0, flat)  # (n,) -> (B, K)
        ranking_loss(rewards, ranks).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    normalize(model, [tokenizer.encode_example(*row, context) for row in samples], autocast)


@torch.no_grad()
def judge(reward, tokenizer, prompts, responses, args, autocast):
    """Scores (n,) of responses (token ids) to prompts (texts), and the responses as texts.

    By the reward model, reading the text through its own tokenizer; else by the toy's true reward.
    A response that does not end scores --missing_eos_score: nobody knows how it would have ended.
    """
    texts = [tokenizer.decode(ids) for ids in responses]
    if reward:
        model, own = reward
        context = getattr(model.config, "max_position_embeddings", 1024)
        rows = [own.encode_example(*row, context) for row in zip(prompts, texts, strict=True)]
        scores = rate(model, rows, autocast)
    else:
        scores = torch.tensor([toy_reward(text) for text in texts])
    ended = torch.tensor([ids[-1] == tokenizer.eos_id for ids in responses])
    return torch.where(ended, scores, args.missing_eos_score), texts


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


def toy_ranks(responses, rng):
    """A noisy human's ranks, 1 is best: each place goes to one of those left with odds e^reward.

    That is Plackett and Luce's model; of two responses alone it is Bradley and Terry's. Drawn by
    adding Gumbel noise to the true rewards and sorting.
    """
    noisy = [toy_reward(text) - math.log(rng.expovariate(1)) for text in responses]
    return [1 + sum(other > own for other in noisy) for own in noisy]


def toy_rankings(model, tokenizer, count, seed, k=4):
    """Rows {"prompt", "responses", "ranks"}: k samples of the model, ranked by a noisy human."""
    rng = random.Random(seed)
    prompts = [rng.choice(toy_prompts(held_out=False)) for _ in range(count)]
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(k)]
    texts = [tokenizer.decode(ids) for ids in sample(model, tokenizer, asked, 64, seed)[0]]
    groups = [texts[i:i + k] for i in range(0, len(texts), k)]
    return [{"prompt": prompt, "responses": group, "ranks": toy_ranks(group, rng)}
            for prompt, group in zip(prompts, groups, strict=True)]


# ---------------------------------------------------------------------------------------- data


def load_prompts(tokenizer, args):
    """(prompts to learn from, prompts held out) of --data, {"prompt"} a line, or of the toy."""
    rows = [{"prompt": prompt} for part in (False, True) for prompt in toy_prompts(part)]
    if args.data:
        rows = [{"prompt": get_text(place, row, "prompt", '{"prompt": "..."}')}
                for place, row in read_jsonl(args.data)]
    fits = [row for row in rows if len(tokenizer.encode_prompt(row["prompt"]))
            + args.max_new_tokens <= args.max_length]
    if len(fits) < 2:
        fail(f"--max_length {args.max_length}: not two prompts of {args.data or 'the toy'} leave "
             f"room for --max_new_tokens {args.max_new_tokens}; give a larger one")
    if not args.data:
        return toy_prompts(held_out=False), toy_prompts(held_out=True)
    print(f"{len(rows) - len(fits)} of {len(rows)} prompts dropped: no room for --max_new_tokens "
          f"{args.max_new_tokens} behind them")
    split = split_by_prompt(fits, args.held_out, args.seed)
    return tuple([row["prompt"] for row in part] for part in split)


def check_reward_model(model, own, tokenizer, prompts, args):
    """End with one line if --reward_model is none, or cannot read what the policy writes."""
    context = getattr(model.config, "max_position_embeddings", 1024)
    encoded = [own.encode_prompt(prompt) for prompt in prompts]
    if "SequenceClassification" not in str(model.config.architectures):
        fail(f"--reward_model {args.reward_model}: a language model; make a reward model of it "
             "with reward_model.py")
    if max(map(len, encoded)) >= context:
        fail(f"--reward_model {args.reward_model}: a prompt fills its context of {context} tokens; "
             "give a smaller --max_length")
    if args.algo == "ppo" and args.value_init == "reward_model":
        if encoded != [tokenizer.encode_prompt(prompt) for prompt in prompts]:
            fail(f"--reward_model {args.reward_model}: its tokenizer is not the policy's, so it "
                 "cannot start the value network; give --value_init policy")
        if context < args.max_length:
            fail(f"--reward_model {args.reward_model}: as a value network it can read {context} "
                 f"tokens; give --max_length {context}, or --value_init policy")


def read_texts(path, tokenizer, max_length):
    """Examples (first token, the rest with EOS) of {"text"} rows: all but the first is learnt."""
    texts = [get_text(place, row, "text", '{"text": "..."}')
             for place, row in read_jsonl(path, "--ptx_data")]
    ids = [tokenizer.encode_prompt("") + tokenizer.encode(text) + [tokenizer.eos_id]
           for text in texts]
    return [(row[:1], row[1:max_length]) for row in ids]


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


# ---------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def score(model, sequences, autocast, size=64):
    """Summed log-probs of any number of (prompt ids, response ids): (len(sequences),)."""
    with autocast:
        parts = [response_logps(model, collate(sequences[i:i + size], model.device))[0]
                 for i in range(0, len(sequences), size)]
    return torch.cat(parts).cpu()


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


def evaluate(policy, reference, base, reward, tokenizer, prompts, beta, args, autocast):
    """(columns of the table, samples, ell) from samples of all models for held-out prompts."""
    P, n = len(prompts), args.samples
    draws = n * args.n if args.algo == "best_of_n" else n  # of which the best of each args.n stay
    by_prompt = lambda x: x.double().view(2, P, n).transpose(0, 1).reshape(P, 2 * n)

    def look(model, count, seed):  # responses (P * count), their texts, and scores (P, count)
        asked = [prompt for prompt in prompts for _ in range(count)]
        ids = [tokenizer.encode_prompt(prompt) for prompt in asked]
        with autocast:
            responses, _ = sample(model, tokenizer, ids, args.max_new_tokens, seed)
        scores, texts = judge(reward, tokenizer, asked, responses, args, autocast)
        return list(zip(ids, responses, strict=True)), texts, scores.view(P, count)

    def column(examples, texts, scores):
        numbers = {"scores/mean": float(scores.mean()),
                   "samples/tokens": sum(len(r) for _, r in examples) / len(examples),
                   "samples/without_eos": sum(
                       r[-1] != tokenizer.eos_id for _, r in examples) / len(examples)}
        if not args.data:
            numbers["samples/true_reward"] = sum(map(toy_reward, texts)) / len(texts)
            numbers["samples/grammatical"] = sum(map(toy_grammatical, texts)) / len(texts)
        return numbers

    sides = {"before": look(reference, n, args.seed), "after": look(policy, draws, args.seed + 1)}
    if args.algo == "best_of_n":
        examples, texts, scores = sides["after"]
        pool = torch.cat([sides["before"][2], scores], 1)  # (P, n + draws)
        best = scores.view(P, n, args.n).argmax(2)  # (P, n)
        best = (torch.arange(P * n).view(P, n) * args.n + best).flatten().tolist()  # among draws
        sides["after"] = ([examples[i] for i in best], [texts[i] for i in best],
                          scores.flatten()[best].view(P, n))
    columns = {name: column(*side) for name, side in sides.items()}
    rewards = torch.cat([scores for _, _, scores in sides.values()], 1).double()  # (P, 2n)
    examples = sides["before"][0] + sides["after"][0]  # 2*P*n
    old = by_prompt(score(reference, examples, autocast))  # (P, 2n)
    if args.algo == "best_of_n":
        new = old + best_of_n_log_ratio(rewards, pool, args.n)
        columns["after"]["kl/bound"] = math.log(args.n) - (args.n - 1) / args.n
    else:
        new = by_prompt(score(policy, examples, autocast))
    kl = (new - old)[:, n:]  # (P, n): the policy's own samples
    columns["before"]["kl/policy_reference"] = 0.0
    columns["after"] |= {"kl/policy_reference": float(kl.mean()), "kl/error": standard_error(kl)}
    ell = None
    if beta > 0:
        numbers, ell = yardstick(rewards, new, old, beta)  # ell (P, 2n)
        ell = {"before": rewards[:, :n], "after": ell[:, n:]}  # before, log pi/rho was 0
        columns["after"] |= numbers
    if base:
        sides = {"base": look(base, n, args.seed), **sides}
        columns = {"base": column(*sides["base"]), **columns}
    samples = [{"prompt": prompts[i // n]}
               | {name: texts[i] for name, (_, texts, _) in sides.items()}
               for i in range(0, P * n, math.ceil(n / 2))]  # two of each prompt
    return columns, samples, ell


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps):
    """Share of the learning rate: up over the first tenth of the steps, then down to 0."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def train(args):
    """Run the algorithm; returns final metrics; leaves model, log and samples in args.out."""
    # 1. The policy pi and its reference rho, equal at first; the reward r; the value network V.
    policy, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    reference, _ = load_model(args.model, device=args.device)
    autocast = settle(args, policy, lr_small=2e-4, lr=1e-5)
    with autocast:
        half = torch.is_autocast_enabled(policy.device.type)
    reward = (load_model(args.reward_model, head="reward", device=args.device)
              if args.reward_model else None)
    prompts, shown = load_prompts(tokenizer, args)
    if reward:
        check_reward_model(*reward, tokenizer, prompts + shown, args)
    ptx = read_texts(args.ptx_data, tokenizer, args.max_length) if args.ptx_data else []
    networks = nn.ModuleDict({"policy": policy})
    if args.algo == "ppo":
        source = args.reward_model if args.value_init == "reward_model" else args.model
        networks["value"], _ = load_model(source, head="reward", device=args.device,
                                          lora_rank=args.lora_rank)
        if args.value_init == "policy":
            nn.init.zeros_(networks["value"].score.weight)  # so that the first advantages are r's
    weights = {name: [p for p in network.parameters() if p.requires_grad]
               for name, network in networks.items()}
    optimizer = torch.optim.AdamW(sum(weights.values(), []), lr=args.lr, betas=(0.9, 0.95),
                                  eps=args.adam_eps, weight_decay=0.0, fused=True)
    state = load_state(args.out, args) if args.resume else {
        "step": 0, "beta": args.beta, "rescore": True, "rankings": [], "reward": None}
    beta, rescore, rankings = state["beta"], state["rescore"], state["rankings"]
    if args.resume:
        restore(state, networks, optimizer)
    if args.relabel_every:  # samples of rho, by which a refitted reward model is normalised again
        asked = random.Random(args.seed).choices(prompts, k=256)
        drawn, _ = sample(reference, tokenizer, list(map(tokenizer.encode_prompt, asked)),
                           args.max_new_tokens, args.seed)
        drawn = list(zip(asked, map(tokenizer.decode, drawn), strict=True))
        if state["reward"]:
            reward[0].load_state_dict(state["reward"])
    if args.base:  # the table comes last, but what is wrong with it had better be known now
        _, own = load_model(args.base)
        if any(own.encode_prompt(p) != tokenizer.encode_prompt(p) for p in prompts[:8]):
            fail(f"--base {args.base}: its tokenizer is not that of --model {args.model}")

    # 2. A step takes --batch_size samples, --n of each prompt.
    G = args.batch_size // args.n  # prompts a step
    steps = args.steps or math.ceil(len(prompts) * args.epochs / G)
    steps = 0 if args.algo == "best_of_n" else steps
    order = []
    while len(order) < steps * G:
        order += random.Random(args.seed + len(order)).sample(prompts, len(prompts))
    seed_of = lambda *what: random.Random(f"{args.seed} {what}").getrandbits(62)
    print(f"{len(prompts)} prompts, {len(shown)} held out; {steps} steps of {args.batch_size} "
          f"samples, {args.n} of each prompt; lr {args.lr:g}, beta {beta:g}")

    progress = tqdm(range(state["step"], steps), initial=state["step"], total=steps, disable=None)
    with open_log(args.out, args, state["step"]) as log, deferred_interrupt() as pressed:
        for step in progress:
            # 3. Rollout: sample responses of the policy, and score them.
            asked = [p for p in order[step * G:(step + 1) * G] for _ in range(args.n)]  # B
            ids = [tokenizer.encode_prompt(prompt) for prompt in asked]
            with autocast:
                responses, kept = sample(
                    policy, tokenizer, ids, args.max_new_tokens, seed_of(step))
            scores, texts = judge(reward, tokenizer, asked, responses, args, autocast)  # (B,)
            sequences = list(zip(ids, responses, strict=True))
            B, R = len(sequences), max(map(len, responses))
            lengths = torch.tensor(list(map(len, responses)))  # (B,)
            mask = (torch.arange(R) < lengths[:, None]).to(policy.device)  # (B, R)
            scores = scores.to(policy.device)

            # 4. Before any update, of every token: log-probs under pi and rho, and values.
            part_size = math.ceil(B / args.minibatches / args.accumulate)
            rest = sequences, mask, autocast, part_size
            old = to_rows(torch.tensor(sum(kept, []), device=mask.device), mask)  # (B, R)
            if rescore:  # until sampling's own log-probs turn out to be the same
                again = per_token(token_logps, policy, *rest)
                rescore = float((again - old).abs().max()) > 1e-5
                old = again if rescore else old
            rho = per_token(token_logps, reference, *rest)
            values = torch.zeros_like(old)  # RAFT has none
            if args.algo == "ppo":
                values = per_token(token_values, networks["value"], *rest)
            checkpoint(args, step, float(old.sum() + values.sum() + scores.sum()), pressed,
                       networks, optimizer, beta=beta, rescore=rescore, rankings=rankings,
                       reward=reward[0].state_dict() if args.relabel_every else None)

            # 5. Rewards with the KL penalty, advantages, returns: constants from here on.
            k1, k3 = kl_estimates(old, rho, mask)
            rewards = token_rewards(scores, old, rho, mask, beta)  # (B, R)
            if args.whiten_rewards:
                rewards = whiten(rewards, mask, shift_mean=False)
            advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
            advantages = whiten(advantages, mask)
            # RAFT (Dong et al. 2023, arXiv:2304.06767): keep the best of each prompt, imitate it.
            best = scores.view(G, args.n).argmax(1).tolist()  # (G,)
            used = [g * args.n + b for g, b in enumerate(best)] if args.algo == "raft" else range(B)
            size = math.ceil(len(used) / args.minibatches)

            # 6. Epochs of minibatches over this one rollout. Each part of a minibatch is divided
            #    by the tokens of the whole, so sums over parts are means over the minibatch.
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, steps)
            seen, norms, ptx_losses = [], [], []
            for epoch in range(args.ppo_epochs):
                rng = random.Random(seed_of(step, epoch))
                shuffled = rng.sample(used, len(used))
                for minibatch in (shuffled[i:i + size] for i in range(0, len(used), size)):
                    tokens = mask[minibatch].sum()
                    first = not norms  # until the first update pi is pi_old
                    for part in (minibatch[i:i + part_size]
                                 for i in range(0, len(minibatch), part_size)):
                        batch, m = collate([sequences[b] for b in part], policy.device), mask[part]
                        with autocast:
                            new = to_rows(token_logps(policy, batch), m)  # (b, R)
                        log_ratio = (new - old[part]).detach()  # (b, R), 0 behind the end
                        ratio = log_ratio.exp()
                        if first and not half and (off := float((ratio - 1).abs().max())) > 1e-4:
                            fail(f"step {step + 1}: pi/pi_old is off 1 by {off:.1e} before any "
                                 "update: the model scores its samples otherwise than it drew them")
                        if args.algo == "raft":
                            loss = -(new * m).sum() / tokens
                            error = torch.zeros_like(loss)
                        else:
                            loss = policy_loss(
                                new, old[part], advantages[part], m, args.clip, tokens)
                            with autocast:
                                now = to_rows(token_values(networks["value"], batch), m)  # (b, R)
                            error = value_loss(
                                now, values[part], returns[part], m, args.clip_value, tokens)
                            error.backward()
                        loss.backward()
                        seen.append(torch.stack([
                            loss.detach(), error.detach(),
                            (torch.expm1(log_ratio) - log_ratio).sum() / tokens,  # k3
                            ((ratio - 1).abs() > args.clip).sum() / tokens]))

                    # PPO-ptx: the gradient of log-likelihood on pretraining text, on top.
                    texts_now = rng.choices(ptx, k=len(minibatch)) if ptx else []
                    count = sum(len(rest) for _, rest in texts_now)
                    for i in range(0, len(texts_now), part_size):
                        with autocast:
                            logps = token_logps(
                                policy, collate(texts_now[i:i + part_size], policy.device))  # (N,)
                        nll = -logps.sum() / count
                        (args.ptx_coef * nll).backward()
                        ptx_losses.append(nll.detach())

                    norms.append([float(nn.utils.clip_grad_norm_(group, args.max_grad_norm))
                                  for group in weights.values()])
                    check_finite(args, step, float(seen[-1].sum()) + sum(norms[-1]))
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

            # 7. What to watch.
            loss, error, kl_old, clipped = (torch.stack(seen).sum(0) / len(norms)).tolist()
            variance = lambda x: x[mask].var(correction=0)
            row = {"step": step + 1, "scores/mean": float(scores.mean()),
                   "scores/std_per_prompt": float(
                       scores.view(G, args.n).std(1, correction=0).mean()),  # (B,) -> (G, n)
                   "kl/policy_reference": float(k1), "kl/k3": float(k3), "kl/beta": beta,
                   "policy/loss": loss, "policy/kl_old": kl_old,
                   "policy/entropy": -float(old.sum() / mask.sum()),
                   "policy/grad_norm": sum(n[0] for n in norms) / len(norms),
                   "samples/tokens": float(mask.sum()) / B, "samples/without_eos": sum(
                       r[-1] != tokenizer.eos_id for r in responses) / B,
                   "lr": group["lr"]}
            if args.algo == "ppo":
                row |= {"policy/clip_fraction": clipped, "value/loss": error,
                        "value/explained_variance": 1 - float(
                            variance(returns - values) / variance(returns).clamp(min=1e-8)),
                        "value/grad_norm": sum(n[1] for n in norms) / len(norms)}
            if ptx:
                row["ptx/loss"] = float(sum(ptx_losses)) / len(norms)
            if not args.data:
                row |= {"samples/true_reward": sum(map(toy_reward, texts)) / B,
                        "samples/grammatical": sum(map(toy_grammatical, texts)) / B}
            log.write(json.dumps(row) + "\n")
            progress.set_postfix(score=f"{row['scores/mean']:.2f}", kl=f"{float(k1):.2f}")

            # 8. The next step's price of KL, and its reward model if it is to keep up.
            if args.kl_target:
                beta = adapt_beta(beta, float(k1), args.kl_target)
            if args.relabel_every and (step + 1) % args.relabel_every == 0:
                rankings += toy_rankings(
                    policy, tokenizer, args.relabel_rankings, seed_of(step, "rankings"))
                refit(reward, rankings, drawn, args, autocast)
        if steps > state["step"]:  # the last update too must leave weights that give numbers
            check_finite(args, steps - 1, float(per_token(token_logps, policy, *rest).sum()))
        if steps:
            save_state(args.out, args, networks, optimizer, step=steps, beta=beta, rescore=rescore,
                       rankings=rankings,
                       reward=reward[0].state_dict() if args.relabel_every else None)

    # 9. Compare policy and reference, and perhaps the model that the reference was made from.
    del optimizer
    del networks, weights  # the value network has done its work
    base = load_model(args.base, device=args.device)[0] if args.base else None
    columns, samples, ell = evaluate(policy, reference, base, reward, tokenizer, shown[:8], beta,
                                     args, autocast)
    report(args.out, columns, samples)
    panels = [["scores/mean", "samples/true_reward"], ["kl/policy_reference", "kl/k3"],
              ["samples/grammatical", "policy/clip_fraction", "value/explained_variance"]]
    if steps or ell:
        plot(args.out, panels if steps else [], "r - beta log pi/rho", ell)
    if steps:
        save_model(policy, tokenizer, args.out)
        if args.relabel_every:
            save_model(*reward, Path(args.out) / "reward_model")
        (Path(args.out) / "state.pt").unlink()  # this run is complete
    return columns["after"]


def parse_args(argv=None):
    """The command line; --help shows every default."""
    parser = argparse.ArgumentParser(description="PPO, best-of-n and RAFT: see the docstring. "
                                     "A step is a rollout and its updates; the toy takes 40")
    common_flags(parser, out="runs/ppo_rlhf", batch_size=64,
                 lr_help="2e-4 below 10M parameters, else 1e-5; LoRA twice, or above 10M ten times "
                 "that")
    parser.set_defaults(save_every=10, epochs=None)  # an epoch of prompts; the toy takes 40 steps
    flag = parser.add_argument_group("reward").add_argument
    flag("--reward_model", help="folder or hub id of a sequence-classification model with one "
         "label; without it the toy's true reward is used")
    flag("--beta", type=float, help="price of a nat of KL from the reference: higher stays nearer, "
         "0 lets the policy do anything for reward (derived: 0.5 for the toy, 0.02 with --data)")
    flag("--kl_target", type=float, help="adapt beta so that the KL settles at this many nats a "
         "response (derived: beta is fixed)")
    flag("--missing_eos_score", type=float, default=-1.0, help="score of a response that does not "
         "end within --max_new_tokens")
    flag("--whiten_rewards", action="store_true", help="rewards with variance 1 in each step; beta "
         "then is no price any more")
    flag("--relabel_every", type=int, help="toy: every so many steps a human ranks samples of the "
         "policy, and the reward model learns from that (derived: never)")
    flag("--relabel_rankings", type=int, default=256, help="toy: rankings of 4 samples each time")
    flag("--relabel_lr", type=float, default=3e-4, help="toy: learning rate of the reward model")
    flag = parser.add_argument_group("algorithm").add_argument
    flag("--algo", default="ppo", choices=["ppo", "raft", "best_of_n"], help="raft: imitate the "
         "best of each --n samples; best_of_n: no training, only show the best of --n samples")
    flag("--n", type=int, default=4, help="samples of each prompt in a step's batch")
    flag("--ppo_epochs", type=int, default=4, help="passes over each rollout")
    flag("--minibatches", type=int, default=2, help="updates in a pass")
    flag("--clip", type=float, default=0.2, help="pi/pi_old earns nothing beyond 1 +- this")
    flag("--clip_value", type=float, default=0.2, help="a value learns no further from its old one")
    flag("--gamma", type=float, default=1.0, help="discount of later tokens' rewards")
    flag("--lam", type=float, default=0.95, help="GAE: 1 trusts rewards (unbiased, noisy), 0 the "
         "value network")
    flag("--value_init", choices=["reward_model", "policy"], help="weights that the value network "
         "starts from (derived: the reward model's if there is one)")
    flag("--adam_eps", type=float, default=1e-5, help="larger: gentler steps where gradients are "
         "small")
    flag("--ptx_coef", type=float, default=0.0, help="weight of the log-likelihood of --ptx_data: "
         "keeps what pretraining taught (PPO-ptx)")
    flag("--ptx_data", help='JSON Lines file of {"text": ...}')
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--samples", type=int, help="samples a prompt (derived: toy 128, else 4)")
    flag("--base", help="a third model for the last table, such as the one before SFT")
    args = parser.parse_args(argv)
    args.beta = (0.02 if args.data else 0.5) if args.beta is None else args.beta
    args.samples = (4 if args.data else 128) if args.samples is None else args.samples
    if args.epochs is None and not args.data:
        args.steps = 40 if args.steps is None else args.steps
    args.epochs = 1.0 if args.epochs is None else args.epochs
    args.value_init = args.value_init or ("reward_model" if args.reward_model else "policy")
    check_flags(args, zero_allowed=("beta", "ptx_coef", "lam"), any_allowed=("missing_eos_score",))
    for name in ("gamma", "lam"):
        if getattr(args, name) > 1:
            fail(f"--{name} {getattr(args, name)}: must not be above 1")
    if args.batch_size % args.n:
        fail(f"--batch_size {args.batch_size}: must be a multiple of --n {args.n}, the samples of "
             "each prompt")
    if args.samples < 2:
        fail(f"--samples {args.samples}: at least 2 are needed for a standard error")
    if args.n < 2 and args.algo != "ppo":
        fail(f"--n {args.n}: --algo {args.algo} needs several samples to choose from")
    if args.data and not args.reward_model:
        fail("--data: the toy's reward does not fit your prompts; give a --reward_model")
    if args.value_init == "reward_model" and not args.reward_model:
        fail("--value_init reward_model: give a --reward_model")
    if args.relabel_every and (args.data or not args.reward_model):
        fail("--relabel_every needs the toy's human and a --reward_model; leave out --data")
    if args.kl_target and not args.beta:
        fail("--kl_target multiplies beta, and --beta is 0; start from another")
    if (args.ptx_coef > 0) != bool(args.ptx_data):
        fail("--ptx_coef and --ptx_data: give both or neither")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        return train(args)
    except KeyboardInterrupt:
        stopped(args.out)


if __name__ == "__main__":
    main()
