"""RLHF with PPO: the third step of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155v1, 3.5).

The details are those of Ziegler et al. 2019 (arXiv:1909.08593v2), the objective is that of Schulman
et al. 2017 (arXiv:1707.06347v2). The policy pi is to earn a reward r(x, y) and to stay near a
reference pi_ref. Each token of a response is an action. It is charged beta times its log-ratio to
the reference, and the last token earns r:

    R_t = -beta log pi(y_t)/pi_ref(y_t)   (+ r(x, y) at the last token)      Ziegler et al., Eq. (2)

Each step of training draws responses from the policy, scores them, and estimates the advantage A_t
of each token: how much better it was than a value network had expected. Then it makes a few passes
over these responses, in minibatches, with the loss

    loss = -mean_t min(q_t A_t, clip(q_t, 1 - e, 1 + e) A_t),   q_t = pi(y_t) / pi_old(y_t)

This is Eq. (7) of Schulman et al., with e = 0.2. pi_old is the policy that drew the responses, so
q_t is 1 at first. The value network learns the returns that it should have expected.

    python ppo_rlhf.py                               # toy: reviews, rewarded for friendly words
    python ppo_rlhf.py --beta 0                      # without a penalty the policy hacks the reward
    python ppo_rlhf.py --data mine.jsonl --model gpt2 --reward_model runs/reward_model --beta 0.02

Departures from the papers (docs/departures.md has more): the score is given at a response's EOS; a
response that does not end in time gets a fixed score; advantages are whitened over the whole
rollout; the value network starts as a copy of the policy; the learning rate falls to 0.
"""

import math
import random
import re
import warnings
from itertools import zip_longest
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import (RANK, Run, add_gradients, all_gather, check_text, fail, fill_defaults, launch,
                   load_model, new_parser, read_jsonl, read_row, save_model, share, split_by_prompt)

# ------------------------------------------------------------------ rewards, advantages, losses
# Tensors are (B, R): a row for each of B responses, as long as the longest of them. The mask is
# true on real tokens. What stands after the end of a response has no effect. The rewards and
# advantages are called in `train`, the losses in `learn`.


def no_padding(x, mask):
    """x with 0 after the end of each response."""
    return x.masked_fill(~mask.bool(), 0)


def token_mean(x, mask, normalizer=None):
    """Sum over real tokens, divided by their number, or by normalizer if it is given."""
    return no_padding(x, mask).sum() / (mask.sum() if normalizer is None else normalizer)


def token_rewards(scores, logps, reference_logps, mask, beta):
    """The penalty on each token and the score (B,) on the last: Ziegler et al. 2019, Eq. (2).

    That equation is for a whole response; here each token pays its part. Log-probs are in nats.
    """
    rewards = no_padding(-beta * (logps - reference_logps), mask)  # (B, R)
    last = mask.sum(1, keepdim=True).long() - 1  # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: Schulman et al. 2015, arXiv:1506.02438v6, Eq. (16).

    values[:, t] belongs to the state before token t; the state after the last token is worth 0.
    Returns (advantages, returns), where returns = advantages + values.
    """
    rewards = no_padding(rewards, mask)
    values = no_padding(values, mask)
    advantages = torch.zeros_like(values)
    advantage = next_value = 0
    for t in reversed(range(values.shape[1])):  # delta is 0 after the end
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def whiten(x, mask):
    """x with mean 0 and variance 1 over real tokens."""
    mean = token_mean(x, mask)
    variance = token_mean((x - mean) ** 2, mask)
    return no_padding((x - mean) * torch.rsqrt(variance + 1e-8), mask)


def policy_loss(logps, old_logps, advantages, mask, clip=0.2, normalizer=None):
    """PPO's clipped objective, to be minimised: Schulman et al. 2017, Eq. (7). Returns a scalar.

    With the larger of two losses, moving the ratio beyond 1 +- clip gains nothing more, but a move
    in the wrong direction still costs its full price. normalizer: the number of tokens of the whole
    minibatch, if this is only a part of it.
    """
    ratio = no_padding(logps - old_logps, mask).exp()  # (B, R)
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return token_mean(losses, mask, normalizer)


def value_loss(values, old_values, returns, mask, clip=0.2, normalizer=None):
    """Half the squared error; moving a value by more than clip gains nothing. Returns a scalar.

    This clipping is in OpenAI's code, not in the papers. normalizer: as in policy_loss.
    """
    values = no_padding(values, mask)
    clipped = old_values + (values - old_values).clamp(-clip, clip)  # (B, R)
    losses = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return token_mean(losses, mask, normalizer)


def adapt_beta(beta, kl, target, k_beta=0.1):
    """Beta is raised if kl is above its target, else lowered: Ziegler et al. 2019, 2.2."""
    error = max(-0.2, min(0.2, kl / target - 1))
    return beta * (1 + k_beta * error)


def kl_estimates(logps, reference_logps, mask):
    """KL(pi || pi_ref) in nats a response, estimated from samples of pi: two scalars, k1 and k3.

    With u = log pi_ref - log pi these are -u and e^u - 1 - u, summed over tokens. Both are
    unbiased, and k3 is never negative (Schulman's note of 2020).
    """
    u = no_padding(reference_logps - logps, mask)  # (B, R)
    return -u.sum(1).mean(), (torch.expm1(u) - u).sum(1).mean()


# ------------------------------------------------------------------- what the networks compute


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


def to_rows(flat, sequences, R):
    """Numbers (N,) of all response tokens as a row for each response: (B, R), 0 after its end."""
    rows = flat.split([len(response) for _, response in sequences])
    rows = pad_sequence(rows, batch_first=True)  # (N,) -> (B, the longest of these responses)
    return F.pad(rows, (0, R - rows.shape[1]))


def token_logps(model, sequences, R):
    """Log-prob of each response token: (B, R)."""
    ids, where, targets, _ = collate(sequences, model.device)
    hidden = hidden_states(model, ids, where)  # (N, D)
    logps = gather_logps(hidden, model.get_output_embeddings().weight, targets)  # (N,)
    return to_rows(logps, sequences, R)


def token_values(model, sequences, R):
    """Value of the state before each response token: (B, R)."""
    ids, where, _, _ = collate(sequences, model.device)
    values = model.score(hidden_states(model, ids, where)).squeeze(1)  # (N, D) -> (N, 1) -> (N,)
    return to_rows(values, sequences, R)


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
def per_token(function, model, sequences, max_tokens, minibatches=None):
    """function(model, sequences, R) without gradient, part by part: (B, R).

    minibatches: lists of row numbers, together all B of them; None: one list.
    """
    R = max(len(response) for _, response in sequences)
    numbers = torch.zeros(len(sequences), R)
    for rows in minibatches or [range(len(sequences))]:
        parts = share(split_batch([[sequences[b]] for b in rows], max_tokens))
        for part in tqdm(parts, "scoring", leave=False, disable=None):
            part = [rows[i] for i in part]
            numbers[part] = function(model, [sequences[b] for b in part], R).cpu()
    return sum(all_gather(numbers)).to(model.device)  # a process leaves 0 where it had no part


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


# --------------------------------------------------------------------- data, scores, evaluation


def load_prompts(tokenizer, small, args):
    """(prompts to learn from, prompts held out) which leave room for --max_new_tokens."""
    prompts = toy_prompts(small)
    if args.data:
        prompts = [read_row(row, tokenizer)["prompt"] for row in read_jsonl(args.data)]
    room = tokenizer.context - args.max_new_tokens - 2  # a reward model adds an EOS and a token
    usable = [{"prompt": prompt} for prompt in prompts
              if len(tokenizer.encode_prompt(prompt)) <= room]
    no_room = len(prompts) - len(usable)
    print(f"{len(usable)} prompts" + bool(no_room) *
          f"; {no_room} left out, as they leave no room for --max_new_tokens")
    rows, _, held_out = split_by_prompt(usable)
    return [row["prompt"] for row in rows], held_out[:8]


def load_reward(reference, tokenizer, prompts, args):
    """A function (prompts, texts) -> scores (B,): the toy's true reward, or a reward model's.

    A reward model's scores become (score - mean) / SD, with the mean and SD of 256 samples of the
    reference, of those that end. So beta and --missing_eos_score mean the same for all of them.
    """
    if not args.reward_model:
        if args.data:
            fail("--data: the toy's reward does not fit your prompts; give a --reward_model")
        return lambda prompts, texts: torch.tensor([toy_reward(text) for text in texts])
    model, own = load_model(args.reward_model, "reward", args.device)
    if "SequenceClassification" not in str(model.config.architectures):
        fail(f"--reward_model {args.reward_model}: this is a language model; reward_model.py makes "
             "a reward model of it")

    def score(prompts, texts):
        """Scores (B,), read after the whole text, which goes through the model's own tokenizer."""
        examples = [own.encode_example(prompt, text, own.context - 1)
                    for prompt, text in zip(prompts, texts)]
        if None in examples or any(ids[-1] not in own.stop_ids for _, ids in examples):
            fail(f"--reward_model {args.reward_model}: its context of {own.context} tokens is too "
                 "short for a prompt and its response; leave out long prompts")
        # token_values reads the state before a response token: here a dummy after the whole text.
        examples = [(prompt + response, [0]) for prompt, response in examples]
        return per_token(token_values, model, examples, args.max_tokens)[:, 0].cpu()  # (B,)

    print("scoring 256 samples of the reference, for the mean and the SD of the scores")
    asked = random.Random(args.seed).choices(prompts, k=256)
    _, texts, ended = answer(reference, tokenizer, asked, args.seed, args)
    if ended.float().mean() < 0.5:
        warnings.warn("more than half of the samples do not end within --max_new_tokens, and get "
                      "--missing_eos_score whatever they say; allow more tokens, or start from a "
                      "model that has learned to end, see sft.py")
    sd, mean = torch.std_mean(score(asked, texts)[ended], correction=0)
    if not sd > 1e-6:  # NaN without a score
        fail(f"--reward_model {args.reward_model}: {int(ended.sum())} of 256 samples of the "
             "reference end within --max_new_tokens, and their scores do not differ")
    print(f"{int(ended.sum())} of them end; their scores have mean {mean:.3f} and SD {sd:.3f}, "
          "which become 0 and 1")
    return lambda prompts, texts: (score(prompts, texts) - mean) / sd


def answer(policy, tokenizer, prompts, seed, args):
    """A response to each of B prompts: sequences, texts, and whether each ended (B,)."""
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    mine = share(asked)  # with torchrun, prompts are dealt to the processes in turn
    drawn = []
    if mine:
        drawn = sample(policy, tokenizer, mine, args.max_new_tokens, seed + RANK,
                       max_tokens=4 * args.max_tokens)
    responses = [ids for turn in zip_longest(*all_gather(drawn)) for ids in turn if ids]
    ended = torch.tensor([response[-1] in tokenizer.stop_ids for response in responses])
    return list(zip(asked, responses)), [tokenizer.decode(ids) for ids in responses], ended


def rollout(policy, reward, tokenizer, prompts, n, seed, args):
    """Sample n responses to each of P prompts: B = P*n sequences, scores (P, n), texts, metrics.

    A response that did not end scores --missing_eos_score, since nobody knows how it would have
    gone on. (In the toy larger models hardly ever end in time: without --reward_model they are
    scored as they are.)
    """
    prompts = [prompt for prompt in prompts for _ in range(n)]  # B
    sequences, texts, ended = answer(policy, tokenizer, prompts, seed, args)
    scores = reward(prompts, texts)  # (B,)
    if args.reward_model or args.data or policy.small:
        scores = scores.where(ended, args.missing_eos_score)
    metrics = {"scores/mean": float(scores.mean()),
               "samples/tokens": fmean(len(response) for _, response in sequences),
               "samples/without_eos": 1 - float(ended.float().mean())}
    if not args.data:
        metrics["samples/true_reward"] = fmean(map(toy_reward, texts))
        if policy.small:
            metrics["samples/grammatical"] = fmean(map(toy_grammatical, texts))
    return sequences, scores.view(-1, n), texts, metrics


def mask_of(sequences, device):
    """Where the rows of a (B, R) tensor hold response tokens: (B, R), bool."""
    ones = [torch.ones(len(response), dtype=torch.bool) for _, response in sequences]
    return pad_sequence(ones, batch_first=True).to(device)  # (B, R)


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


def evaluate(policy, reference, reward, tokenizer, prompts, args):
    """{"before": metrics of the reference, "after": of the policy} on P prompts, and samples."""
    columns, scores, sequences, texts = {}, [], [], []
    print(f"evaluating: {args.samples} samples of reference and policy for each of {len(prompts)} "
          "prompts")
    for name, model in (("before", reference), ("after", policy)):
        own, own_scores, own_texts, columns[name] = rollout(
            model, reward, tokenizer, prompts, args.samples, args.seed, args)
        scores.append(own_scores)  # (P, n)
        sequences.append(own)
        texts.append(own_texts)

    # Log-probs of all these samples under both models: (P, 2n), those of the reference first.
    policy_logps, reference_logps = (
        torch.cat([per_token(token_logps, model, own, args.max_tokens).sum(1).view(len(prompts), -1)
                   for own in sequences], 1).double().cpu()
        for model in (policy, reference))
    after = columns["after"]
    log_ratios = policy_logps - reference_logps  # (P, 2n)
    after["kl/policy_reference"] = float(log_ratios[:, args.samples:].mean())
    if not args.data:  # how often the policy's sample is the better of two; a tie is half a win
        first, second = (torch.tensor([*map(toy_reward, own)]) for own in texts)  # (P*n,) each
        after["samples/win_rate"] = float(1 + (second - first).sign().mean()) / 2
    if args.beta:  # J at the beta that was asked for, also with --kl_target
        after |= yardstick(torch.cat(scores, 1), policy_logps, reference_logps, args.beta)
    samples = [{"prompt": prompt, "before": old, "after": new}
               for prompt, old, new in zip(prompts, *(own[::args.samples] for own in texts))]
    return columns, samples


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps, warmup=0.1):
    """The share of the peak learning rate: it rises for a part of the steps, then falls to 0."""
    peak = max(1, int(warmup * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))


class Batch(NamedTuple):
    """What a step learns from. B sequences, whose responses have at most R tokens."""

    sequences: list  # B times (prompt ids, response ids)
    mask: torch.Tensor  # (B, R), as all that follow
    logps: torch.Tensor  # under the policy that drew the responses: pi_old
    values: torch.Tensor  # of the value network before its updates
    advantages: torch.Tensor
    returns: torch.Tensor


def learn(networks, optimizer, batch, minibatches, ptx, rng, args):
    """A step's updates, one for each minibatch (row numbers of the batch). Returns metrics.

    A part's loss is divided by the tokens of the whole minibatch, so losses and gradients of the
    parts add up to those of the minibatch.
    """
    policy, value = networks
    R = batch.mask.shape[1]
    seen, norms = torch.zeros(4, device=policy.device), []
    for minibatch in minibatches:
        tokens = batch.mask[minibatch].sum()
        for part in share(split_batch([[batch.sequences[b]] for b in minibatch], args.max_tokens)):
            part = [minibatch[i] for i in part]  # b rows of the batch
            sequences, mask = [batch.sequences[b] for b in part], batch.mask[part]
            logps = token_logps(policy, sequences, R)  # (b, R)
            values = token_values(value, sequences, R)  # (b, R)
            policy_part = policy_loss(logps, batch.logps[part], batch.advantages[part], mask,
                                      normalizer=tokens)
            value_part = value_loss(values, batch.values[part], batch.returns[part], mask,
                                    normalizer=tokens)
            (policy_part + value_part).backward()
            ratios = no_padding(logps - batch.logps[part], mask).exp()  # (b, R)
            clipped = ((ratios - 1).abs() > 0.2).sum() / tokens
            seen[:3] += torch.stack([policy_part, value_part, clipped]).detach()

        # PPO-ptx (InstructGPT, Eq. 2): also the likelihood of texts like those of pretraining.
        texts = rng.choices(ptx, k=len(minibatch)) if ptx else []
        ptx_tokens = sum(len(text) for _, text in texts)
        for example in share(texts):
            ptx_part = -token_logps(policy, [example], len(example[1])).sum() / ptx_tokens
            (args.ptx_coef * ptx_part).backward()
            seen[3] += ptx_part.detach()

        add_gradients(networks)
        norms.append([float(clip_grad_norm_(network.parameters(), 1.0)) for network in networks])
        if not math.isfinite(sum(norms[-1])):
            fail("the gradient is not finite; use a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
    names = ["policy/loss", "value/loss", "policy/clip_fraction"] + ["ptx/loss"] * bool(ptx)
    metrics = dict(zip(names, (sum(all_gather(seen.cpu())) / len(minibatches)).tolist()))
    norms = torch.tensor(norms).mean(0).tolist()
    return metrics | {"policy/grad_norm": norms[0], "value/grad_norm": norms[1]}


def train(args, reward=None):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics.

    reward: as `load_reward` returns it, for a reward of your own; None: the one that args name.
    """
    run = Run(args)

    # 1. The policy pi, the reference, and the value network: a copy of the policy with a new head.
    # Its values start at 0, so the first advantages are those of the rewards alone.
    policy, tokenizer = load_model(args.model, "lm", args.device, args.lora_rank)
    fill_defaults(args, DEFAULTS, policy.small)
    reference, other = load_model(args.reference or args.model, "lm", args.device)
    if other.transformers.get_vocab() != tokenizer.transformers.get_vocab():
        fail(f"--reference {args.reference}: its tokenizer is not that of --model {args.model}")
    value, _ = load_model(args.model, "reward", args.device, args.lora_rank)
    nn.init.zeros_(value.score.weight)
    networks = nn.ModuleList([policy, value])

    # 2. The prompts, the reward, and texts for PPO-ptx, as responses to an empty prompt.
    prompts, held_out = load_prompts(tokenizer, policy.small, args)
    stop = warnings.warn if reward else fail  # where all scores are equal, see 4.
    reward = reward or load_reward(reference, tokenizer, prompts, args)
    ptx = []
    if args.ptx_data:
        ptx = [tokenizer.encode_example("", check_text(row, "text"), tokenizer.context)
               for row in read_jsonl(args.ptx_data)]

    # 3. The optimizer, and the state of an interrupted run.
    optimizer = torch.optim.AdamW(networks.parameters(), betas=(0.9, 0.95), eps=1e-5,
                                  weight_decay=0.0, fused=True)
    state = run.load_state(networks, optimizer, beta=args.beta)
    start, beta = state["step"], state["beta"]
    equal = 0  # steps in a row in which all scores are equal

    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=None)
    for step in progress:
        # 4. The rollout: sample n responses to each of P random prompts, and score them. All random
        # numbers of a step are a function of seed and step. A state is saved before any update.
        rng = random.Random(f"{args.seed} {step}")
        asked = rng.choices(prompts, k=math.ceil(args.batch_size / args.n))  # P
        sequences, scores, _, row = rollout(policy, reward, tokenizer, asked, args.n,
                                            rng.getrandbits(62), args)
        if step % args.save_every == 0:
            run.save_state(step, networks, optimizer, beta=beta)
        # Equal scores teach nothing; only the penalty does. A reward of your own, say 0 or 1, may
        # leave this state again, so there it is a warning; a reward model's scores will not.
        equal = equal + 1 if scores.numel() > 1 and scores.max() == scores.min() else 0
        if equal == 5:
            cause = "look at the reward" if row["samples/without_eos"] < 1 else (
                "no sample ends within --max_new_tokens; allow more tokens, or start from a model "
                "that has learned to end, see sft.py")
            stop(f"step {step + 1}: for 5 steps all scores have been equal, so there is nothing to "
                 f"learn: {cause}")

        # 5. Before any update: log-probs of all tokens, and values of the states before them. They
        # are computed in the two minibatches of the first pass. So the first update computes them
        # in the same way, and its ratios are exactly 1, also where bf16 rounds by shape.
        B, half = len(sequences), math.ceil(len(sequences) / 2)
        orders = [rng.sample(range(B), B) for _ in range(args.ppo_epochs)]
        minibatches = [order[i:i + half] for order in orders for i in range(0, B, half)]
        first, max_tokens = minibatches[:2], args.max_tokens
        mask = mask_of(sequences, policy.device)  # (B, R)
        logps = per_token(token_logps, policy, sequences, max_tokens, first)  # (B, R)
        reference_logps = per_token(token_logps, reference, sequences, max_tokens, first)  # (B, R)
        values = per_token(token_values, value, sequences, max_tokens, first)  # (B, R)

        # 6. Rewards, advantages and returns. They are constants in the updates that follow.
        rewards = token_rewards(scores.flatten().to(policy.device), logps, reference_logps, mask,
                                beta)
        advantages, returns = gae(rewards, values, mask, lam=args.lam)
        advantages = whiten(advantages, mask)

        # 7. The updates.
        optimizer.param_groups[0]["lr"] = lr = args.lr * schedule(step, args.steps)
        batch = Batch(sequences, mask, logps, values, advantages, returns)
        row |= learn(networks, optimizer, batch, minibatches, ptx, rng, args)

        # 8. What to watch. std_per_prompt: the spread of scores among a prompt's n samples.
        k1, k3 = map(float, kl_estimates(logps, reference_logps, mask))
        unexplained = (returns - values)[mask].var() / returns[mask].var().clamp(min=1e-8)
        row |= {"step": step + 1,
                "lr": lr,
                "kl/policy_reference": k1,
                "kl/k3": k3,
                "kl/beta": beta,
                "scores/std_per_prompt": float(scores.std(1, correction=0).mean()),
                "policy/entropy": -float(token_mean(logps, mask)),
                "value/explained_variance": 1 - float(unexplained)}
        run.log(row)
        progress.set_postfix(score=row["scores/mean"], kl=k1)
        if args.kl_target:
            beta = adapt_beta(beta, k1, args.kl_target)

    # 9. Save, then compare with the reference.
    save_model(policy, tokenizer, args.out)
    columns, samples = evaluate(policy, reference, reward, tokenizer, held_out, args)
    run.report(columns, samples, panels=[
        ["scores/mean", "samples/true_reward"],
        ["kl/policy_reference", "kl/k3"],
        ["samples/grammatical", "policy/clip_fraction", "value/explained_variance"]])
    return columns["after"]


# Defaults: models below 10M parameters; larger ones in the toy; larger ones with --data.
DEFAULTS = {"lr": (2e-4, 3e-5, 1e-5), "samples": (128, 8, 8)}


def make_parser(file, text, defaults, rows='{"prompt"}'):
    """The flags that PPO shares with variants/raft.py and grpo.py."""
    parser = new_parser(file, text, defaults)
    flag = parser.add_argument
    flag("--data", help=f"JSON Lines file of {rows}; None: the toy task")
    flag("--reward_model", help="folder or hub id of a reward model; None: the toy's true reward")
    flag("--reference", help="the model that KL is measured from; None: --model")
    flag("--missing_eos_score", type="real", default=-1.0,
         help="score of a response that does not end within --max_new_tokens")
    flag("--n", type="positive", default=4, help="samples of each prompt")
    flag("--lr", type="amount", help="peak learning rate")
    flag("--steps", type="positive", default=40, help="steps; each samples, scores and learns")
    flag("--batch_size", type="positive", default=64, help="samples in a step: whole groups of --n")
    flag("--max_new_tokens", type="positive", default=64, help="most tokens of a sample")
    flag("--samples", type="positive", help="evaluation: samples for each of 8 prompts")
    parser.set_defaults(save_every=10)
    return parser


def parse_args(argv=None):
    """The command line."""
    parser = make_parser(__file__, __doc__, DEFAULTS)
    flag = parser.add_argument
    flag("--beta", type="amount", default=0.5,
         help="penalty for a nat of KL from the reference; 0.02 is usual with --data")
    flag("--kl_target", type="amount",
         help="multiply beta after each step so that KL comes to so many nats; None, 0: fixed beta")
    flag("--ppo_epochs", type="positive", default=4,
         help="passes over a step's samples, two updates each")
    flag("--lam", type="fraction", default=1.0,
         help="GAE: 1 trusts the rewards (unbiased, noisy), 0 trusts the value network")
    flag("--ptx_data", help='JSON Lines file of {"text"}, also learnt from (PPO-ptx)')
    flag("--ptx_coef", type="amount", default=1.0, help="weight of the loss on --ptx_data")
    args = parser.parse_args(argv)
    if args.kl_target and not args.beta:
        fail("--kl_target multiplies --beta, and 0 stays 0; give a --beta above 0")
    return args


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
