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

where pi_old is the policy that drew the responses, so q_t is 1 at first.  Schulman et al., Eq. (7)

    python ppo_rlhf.py                               # toy: reviews, rewarded for friendly words
    python ppo_rlhf.py --beta 0                      # without a penalty the policy hacks the reward
    python ppo_rlhf.py --data mine.jsonl --model gpt2 --reward_model runs/reward_model

Departures from the papers: a response ends at its EOS, and the score is given there; a response
that does not end in time gets a fixed score; advantages are whitened over the whole rollout; policy
and value network are two networks with one learning rate, which rises, then falls to 0.
"""

import argparse
import json
import math
import random
import re
from itertools import zip_longest
from statistics import fmean

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import (RANK, add_gradients, all_gather, fail, fingerprint, get_text, launch, load_model,
                   load_state, open_folder, open_log, read_jsonl, read_row, report, save_model,
                   save_state, say, share, split_by_prompt)

# ------------------------------------------------------------------ rewards, advantages, losses
# Tensors are (B, R): a row for each of B responses, as long as the longest of them. The mask is
# true on real tokens. What stands after the end of a response has no effect.


def no_padding(x, mask):
    """x with 0 after the end of each response."""
    return x.masked_fill(~mask.bool(), 0)


def token_mean(x, mask, normalizer=None):
    """Sum over real tokens, divided by their number, or by normalizer if it is given."""
    return no_padding(x, mask).sum() / (mask.sum() if normalizer is None else normalizer)


def token_rewards(scores, logps, reference_logps, mask, beta):
    """The penalty on each token and the score (B,) on the last: Ziegler et al. 2019, Eq. (2).

    Log-probs of the sampled tokens, in nats. The result is a constant: no gradient flows into it.
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


def whiten(x, mask, shift_mean=True):
    """x with variance 1 over real tokens, and with mean 0 unless shift_mean is False."""
    mean = token_mean(x, mask)
    variance = token_mean((x - mean) ** 2, mask)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return no_padding(white if shift_mean else white + mean, mask)


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
        grad_weight = torch.zeros_like(weight).index_add_(0, targets, grad * hidden)  # (V, D)
        for w, grad_w in zip(weight.split(4096), grad_weight.split(4096)):  # (C, D) each
            grad_logits = (hidden @ w.T - logsumexp[:, None]).exp_().mul_(-grad)  # (N, C)
            grad_hidden.addmm_(grad_logits, w)
            if ctx.needs_input_grad[1]:  # with LoRA the head is frozen
                grad_w.addmm_(grad_logits.T, hidden)
        return grad_hidden, grad_weight, None


def gather_logps(hidden, weight, targets):
    """Log-prob of each target, in nats: hidden (N, D), weight (V, D), targets (N,) -> (N,)."""
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
    """The last layer's output at the flat positions `where` of ids (B, T): (len(where), D)."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    hidden = hidden.flatten(0, 1).index_select(0, where)  # (B, T, D) -> (B*T, D) -> (N, D)
    return hidden.to(model.dtype)  # fp32


def to_rows(flat, sequences):
    """Numbers (N,) of all response tokens as a row for each response: (B, R), 0 after its end."""
    lengths = [len(response) for _, response in sequences]
    return pad_sequence(flat.split(lengths), batch_first=True)  # (N,) -> (B, R)


def token_logps(model, sequences):
    """Log-prob of each response token: (B, R)."""
    ids, where, targets, _ = collate(sequences, model.device)
    hidden = hidden_states(model, ids, where)  # (N, D)
    logps = gather_logps(hidden, model.get_output_embeddings().weight, targets)  # (N,)
    return to_rows(logps, sequences)


def token_values(model, sequences):
    """Value of the state before each response token: (B, R)."""
    ids, where, _, _ = collate(sequences, model.device)
    values = model.score(hidden_states(model, ids, where)).squeeze(1)  # (N, D) -> (N, 1) -> (N,)
    return to_rows(values, sequences)


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
def per_token(function, model, sequences, max_tokens):
    """function(model, sequences) without gradient, part by part: (B, R)."""
    numbers = torch.zeros(len(sequences), max(len(response) for _, response in sequences))
    parts = share(split_batch([[sequence] for sequence in sequences], max_tokens))
    for part in tqdm(parts, "scoring", leave=False, disable=None):
        rows = function(model, [sequences[b] for b in part])  # (b, r)
        numbers[part, :rows.shape[1]] = rows.cpu()
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

    A model that is not small would tell any story, so it is asked for its opinion.
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


def toy_grammatical(review):
    """Whether a review is one or two sentences like " The plot was dull and long."."""
    word, aspect = "|".join(POSITIVE + NEUTRAL + NEGATIVE), "|".join(ASPECTS)
    sentence = rf" (The ({aspect}) was|I found the ({aspect})) ({word})( and ({word}))?\."
    return bool(re.fullmatch(f"({sentence}){{1,2}}", review))


# --------------------------------------------------------------------- data, scores, evaluation


def load_prompts(tokenizer, small, args):
    """(prompts to learn from, prompts held out) which leave room for --max_new_tokens."""
    prompts = toy_prompts(small)
    if args.data:
        if not args.reward_model:
            fail("--data: the toy's reward does not fit your prompts; give a --reward_model")
        prompts = [read_row(row, tokenizer)["prompt"] for row in read_jsonl(args.data)]
    room = tokenizer.context - args.max_new_tokens
    usable = [{"prompt": prompt} for prompt in prompts
              if len(tokenizer.encode_prompt(prompt)) <= room]
    say(f"{len(usable)} prompts; {len(prompts) - len(usable)} left out, as they leave no room for "
        "--max_new_tokens")
    rows, _, held_out = split_by_prompt(usable)
    return [row["prompt"] for row in rows], held_out[:8]


def load_reward(reference, tokenizer, prompts, args):
    """(reward model, its tokenizer, mean and SD of its scores on 256 samples of the reference).

    Only samples that end count. Rewards become (score - mean) / SD, so that beta and
    --missing_eos_score mean the same for all reward models. Without --reward_model the result is
    None: the toy's true reward.
    """
    if not args.reward_model:
        return None
    model, own = load_model(args.reward_model, "reward", args.device)
    if "SequenceClassification" not in str(model.config.architectures):
        fail(f"--reward_model {args.reward_model}: this is a language model; reward_model.py makes "
             "a reward model of it")
    asked = random.Random(args.seed).choices(prompts, k=256)
    drawn, scores, _, _ = rollout(reference, (model, own, 0, 1), tokenizer, asked, 1, args.seed,
                                  args)
    whole = [response[-1] in tokenizer.stop_ids for _, response in drawn]
    sd, mean = torch.std_mean(scores[whole], correction=0)
    if not sd > 1e-6:  # NaN without a score
        fail(f"--reward_model {args.reward_model}: {sum(whole)} of 256 samples of the reference "
             "end within --max_new_tokens, and their scores do not differ")
    return model, own, mean, sd


def rollout(policy, reward, tokenizer, prompts, n, seed, args):
    """Sample n responses to each of P prompts: P*n sequences, scores (P, n), texts, mean metrics.

    The reward model reads the text through its own tokenizer. A response that did not end scores
    --missing_eos_score, since nobody knows how it would have gone on. (In the toy a larger model
    hardly ever ends in time, so there cut samples are scored as they stand.)
    """
    prompts = [prompt for prompt in prompts for _ in range(n)]  # P * n
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    mine = share(ids)  # with torchrun, each process answers its share of the prompts
    drawn = []
    if mine:
        drawn = sample(policy, tokenizer, mine, args.max_new_tokens, seed + RANK,
                       max_tokens=4 * args.max_tokens)
    responses = [own for turn in zip_longest(*all_gather(drawn)) for own in turn if own]
    texts = [tokenizer.decode(response) for response in responses]
    if reward:
        model, own, mean, sd = reward
        examples = [own.encode_example(prompt, text, own.context - 1)
                    for prompt, text in zip(prompts, texts)]
        if None in examples:
            fail(f"--reward_model {args.reward_model}: a prompt fills its context")
        # token_values reads the state before each response token. Before one dummy token, this is
        # the state after the whole text.
        examples = [(prompt + response, [0]) for prompt, response in examples]
        scores = per_token(token_values, model, examples, args.max_tokens)  # (B, 1)
        scores = (scores[:, 0].cpu() - mean) / sd
    else:
        scores = torch.tensor([toy_reward(text) for text in texts])
    ended = [response[-1] in tokenizer.stop_ids for response in responses]
    cut = 1 - fmean(ended)
    if reward or policy.small:  # in the toy, a larger model hardly ever ends
        scores = scores.where(torch.tensor(ended), args.missing_eos_score)
        if cut > 0.5:
            tokenizer.note("more than half of the samples do not end within --max_new_tokens, and "
                           "get --missing_eos_score whatever they say; allow more tokens, or start "
                           "from a model that has learned to end, see sft.py")
    means = {"scores/mean": float(scores.mean()),
             "samples/tokens": fmean(map(len, responses)),
             "samples/without_eos": cut}
    if not args.data:
        means["samples/true_reward"] = fmean(map(toy_reward, texts))
        if policy.small:
            means["samples/grammatical"] = fmean(map(toy_grammatical, texts))
    return list(zip(ids, responses)), scores.view(-1, n), texts, means


def yardstick(rewards, policy, reference, beta):
    """How near J = E[r] - beta KL(pi || pi_ref) comes to its maximum over all policies, J*.

    rewards, policy, reference: (P, 2n). For each of P prompts: n samples of the reference, then n
    of the policy, with their rewards and their log-probs under policy and reference.
    J* = beta log E_ref[exp(r / beta)] is estimated from all 2n samples. They come from the mixture
    q = (pi_ref + pi) / 2, so each is weighted by pi_ref / q. A standard error (se) is the SD over
    200 bootstrap draws: all is computed again from n of the n samples, drawn with replacement.
    """
    P, n = len(rewards), rewards.shape[1] // 2
    seed = torch.Generator().manual_seed(0)
    draws = torch.randint(n, (201, P, 2, n), generator=seed) + torch.tensor([[0], [n]])
    draws[0] = torch.arange(2 * n).view(2, n)  # the first "draw" is the samples themselves
    draws = draws.flatten(2)  # (201, P, 2n)
    rewards, policy, reference = (
        x.expand(201, P, 2 * n).gather(2, draws) for x in (rewards, policy, reference))
    log_weights = reference - torch.logaddexp(reference, policy)  # log of pi_ref / (2 q)
    x = log_weights + rewards / beta  # (201, P, 2n)
    optimum = beta * (x.logsumexp(2) - math.log(n)).mean(1)  # (201,)
    start = rewards[:, :, :n].mean((1, 2))  # (201,)
    now = (rewards - beta * (policy - reference))[:, :, n:].mean((1, 2))  # (201,)
    share = (now - start) / (optimum - start)  # (201,)
    effective_samples = 1 / x[0].softmax(1).square().sum(1).max()  # of the worst prompt
    numbers = {
        "J/reference": start[0], "J/policy": now[0], "J/effective_samples": effective_samples}
    if effective_samples >= 50:  # with fewer the estimate would be a guess
        numbers |= {
            "J/optimum": optimum[0],
            "J/optimum_se": optimum[1:].std(),
            "J/share_of_the_way": share[0],
            "J/share_se": share[1:].std()}
    return {key: float(value) for key, value in numbers.items()}


def evaluate(policy, reference, reward, tokenizer, prompts, args):
    """Metrics of the reference and of the policy, and samples of both for held-out prompts."""
    n = args.samples or (256 if policy.small else 8)
    rollouts = [rollout(model, reward, tokenizer, prompts, n, args.seed, args)
                for model in (reference, policy)]
    sequences, scores, texts, (before, after) = zip(*rollouts)  # of the reference, of the policy
    logps = []
    for model in (reference, policy):
        sums = [per_token(token_logps, model, own, args.max_tokens).sum(1).view(-1, n)
                for own in sequences]  # (P*n,) -> (P, n) each
        logps.append(torch.cat(sums, 1).double().cpu())  # (P, 2n)
    reference_logps, policy_logps = logps
    after["kl/policy_reference"] = float((policy_logps - reference_logps)[:, n:].mean())
    if not args.data:  # how often the policy's sample is the better of two; a tie is half a win
        rewards = zip(*[map(toy_reward, own) for own in texts])
        after["samples/win_rate"] = fmean((new > old) + (new == old) / 2 for old, new in rewards)
    if args.beta:
        after |= yardstick(torch.cat(scores, 1), policy_logps, reference_logps, args.beta)
    firsts = [own[::n] for own in texts]  # the first sample of each prompt
    samples = [{"prompt": prompt, "before": old, "after": new}
               for prompt, old, new in zip(prompts, *firsts)]
    return before, after, samples


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps, warmup=0.1):
    """The share of the peak learning rate: it rises for a part of the steps, then falls to 0."""
    peak = max(1, int(warmup * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))


def train(args):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics."""
    open_folder(args)

    # 1. The policy pi, the reference, and the value network: a copy of the policy with a new head.
    # Its values start at 0, so the first advantages are those of the rewards alone.
    policy, tokenizer = load_model(args.model, "lm", args.device, args.lora_rank)
    reference, other = load_model(args.reference or args.model, "lm", args.device)
    if other.transformers.get_vocab() != tokenizer.transformers.get_vocab():
        fail(f"--reference {args.reference}: its tokenizer is not that of --model {args.model}")
    value, _ = load_model(args.model, "reward", args.device, args.lora_rank)
    nn.init.zeros_(value.score.weight)
    networks = nn.ModuleList([policy, value])

    # 2. The prompts, the reward, and texts for PPO-ptx, as responses to EOS.
    prompts, held_out = load_prompts(tokenizer, policy.small, args)
    reward = load_reward(reference, tokenizer, prompts, args)
    ptx = []
    if args.ptx_data:
        for row in read_jsonl(args.ptx_data):
            text = tokenizer.encode(get_text(row, "text")) + [tokenizer.eos_id]
            ptx.append(([tokenizer.eos_id], text[:tokenizer.context - 1]))

    # 3. The optimizer, and the state of an interrupted run. A larger model writes long responses.
    # With lambda 0.95 their first tokens would earn next to nothing at first: 0.95^60 = 0.05.
    lam = args.lam
    if lam is None:
        lam = 0.95 if policy.small else 1.0
    peak_lr = args.lr
    if peak_lr is None:
        peak_lr = 2e-4 if policy.small else 1e-5 if args.data else 3e-5
    optimizer = torch.optim.AdamW(networks.parameters(), betas=(0.9, 0.95), eps=1e-5,
                                  weight_decay=0.0, fused=True)
    run = fingerprint(args, [prompts, ptx])
    state = load_state(args, networks, optimizer, run, beta=args.beta)
    start = state["step"]
    beta = state["beta"]
    log = open_log(args.out, start)

    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=None)
    for step in progress:
        # 4. The rollout: sample n responses to each prompt, and score them. All random numbers of a
        # step are a function of seed and step.
        rng = random.Random(f"{args.seed} {step}")
        asked = rng.choices(prompts, k=math.ceil(args.batch_size / args.n))  # P
        sequences, scores, _, row = rollout(policy, reward, tokenizer, asked, args.n,
                                            rng.getrandbits(62), args)

        # 5. Before any update: log-probs of all tokens, and values of the states before them.
        old_logps = per_token(token_logps, policy, sequences, args.max_tokens)  # (B, R)
        reference_logps = per_token(token_logps, reference, sequences, args.max_tokens)
        old_values = per_token(token_values, value, sequences, args.max_tokens)
        mask = [torch.ones(len(response), dtype=torch.bool) for _, response in sequences]
        mask = pad_sequence(mask, batch_first=True).to(policy.device)  # (B, R)

        # 6. Rewards, advantages and returns. They are constants in the updates that follow.
        scores = scores.to(policy.device)  # (P, n)
        rewards = token_rewards(scores.flatten(), old_logps, reference_logps, mask, beta)
        advantages, returns = gae(rewards, old_values, mask, lam=lam)
        advantages = whiten(advantages, mask)

        # 7. A few passes over the rollout, each in two minibatches. Losses are means over a
        # minibatch's tokens: the gradients of its parts add up to that of the mean.
        optimizer.param_groups[0]["lr"] = row["lr"] = peak_lr * schedule(step, args.steps)
        seen, norms = torch.zeros(4, device=policy.device), []
        B = len(sequences)
        size = math.ceil(B / 2)
        orders = [rng.sample(range(B), B) for _ in range(args.ppo_epochs)]
        for minibatch in [order[i:i + size] for order in orders for i in range(0, B, size)]:
            tokens = mask[minibatch].sum()
            parts = split_batch([[sequences[b]] for b in minibatch], args.max_tokens)
            for groups in share(parts):
                part = [minibatch[g] for g in groups]
                batch = [sequences[b] for b in part]
                logps = token_logps(policy, batch)  # (b, r)
                values = token_values(value, batch)  # (b, r)
                index = part, slice(logps.shape[1])  # x[index] is a part of x: (B, R) -> (b, r)
                loss = policy_loss(logps, old_logps[index], advantages[index], mask[index],
                                   normalizer=tokens)
                error = value_loss(values, old_values[index], returns[index], mask[index],
                                   normalizer=tokens)
                (loss + error).backward()
                clipped = ((logps - old_logps[index]).exp() - 1).abs() > 0.2  # (b, r)
                seen[:3] += torch.stack([loss, error, clipped.sum() / tokens]).detach()

            # PPO-ptx (InstructGPT, Eq. 2): also the likelihood of texts like those of pretraining.
            texts = rng.choices(ptx, k=len(minibatch)) if ptx else []
            tokens = sum(len(text) for _, text in texts)
            for example in share(texts):
                loss = -token_logps(policy, [example]).sum() / tokens
                (args.ptx_coef * loss).backward()
                seen[3] += loss.detach()

            add_gradients(networks)
            norms.append([float(clip_grad_norm_(network.parameters(), 1.0))
                          for network in networks])
            if not math.isfinite(sum(norms[-1])):
                fail(f"step {step + 1}: the gradient is not finite; use a lower --lr")
            # A state is saved before the first update of a step, if the gradient is finite.
            if len(norms) == 1 and step % args.save_every == 0:
                save_state(args.out, networks, optimizer, run=run, step=step, beta=beta)
            optimizer.step()
            optimizer.zero_grad()

        # 8. What to watch. If std_per_prompt is 0, the scores of a prompt's samples are all equal.
        k1, k3 = map(float, kl_estimates(old_logps, reference_logps, mask))
        unexplained = (returns - old_values)[mask].var() / returns[mask].var().clamp(min=1e-8)
        row |= {"step": step + 1,
                "kl/policy_reference": k1,
                "kl/k3": k3,
                "kl/beta": beta,
                "scores/std_per_prompt": float(scores.std(1, correction=0).mean()),
                "policy/entropy": -float(token_mean(old_logps, mask)),
                "value/explained_variance": 1 - float(unexplained)}
        names = ["policy/loss", "value/loss", "policy/clip_fraction"]
        if ptx:
            names.append("ptx/loss")
        row |= zip(names, (sum(all_gather(seen.cpu())) / len(norms)).tolist())
        row |= zip(["policy/grad_norm", "value/grad_norm"], torch.tensor(norms).mean(0).tolist())
        log.write(json.dumps(row) + "\n")
        progress.set_postfix(score=row["scores/mean"], kl=k1)
        if args.kl_target:
            beta = adapt_beta(beta, k1, args.kl_target)

    # 9. Save, then compare with the reference.
    save_model(policy, tokenizer, args.out)
    before, after, samples = evaluate(policy, reference, reward, tokenizer, held_out, args)
    report(args.out, {"before": before, "after": after}, samples, panels=[
        ["scores/mean", "samples/true_reward"],
        ["kl/policy_reference", "kl/k3"],
        ["samples/grammatical", "policy/clip_fraction", "value/explained_variance"]])
    return after


def make_parser():
    """The flags that PPO shares with variants/raft.py."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--model", default="tiny", help="tiny, a folder, or a hub id such as gpt2")
    flag("--data", help='JSON Lines file of {"prompt"}; None: the toy task')
    flag("--out", default="runs/ppo_rlhf", help="folder for the model and what happened")
    flag("--resume", action="store_true", help="go on with the interrupted run in --out")
    flag("--reward_model", help="folder or hub id of a reward model; None: the toy's true reward")
    flag("--reference", help="the model that KL is measured from; None: --model")
    flag("--beta", type=float, default=0.5,
         help="penalty for a nat of KL from the reference; 0.02 is usual with --data")
    flag("--missing_eos_score", type=float, default=-1.0,
         help="score of a response that does not end within --max_new_tokens")
    flag("--n", type=int, default=4, help="samples of each prompt")
    flag("--ppo_epochs", type=int, default=4, help="passes over a step's samples, two updates each")
    flag("--lr", type=float,
         help="peak learning rate; None: 2e-4 below 10M parameters, else 1e-5, in the toy 3e-5")
    flag("--steps", type=int, default=40, help="steps; each samples, scores and learns")
    flag("--batch_size", type=int, default=64, help="samples in a step: whole groups of --n")
    flag("--max_tokens", type=int, default=4096, help="tokens in a training pass: bounds memory")
    flag("--lora_rank", type=int, default=0,
         help="train adapters of this rank, which need a higher --lr; 0: all weights")
    flag("--max_new_tokens", type=int, default=64, help="tokens of the longest sample")
    flag("--samples", type=int,
         help="evaluation: samples for each of 8 prompts; None: 256 below 10M parameters, else 8")
    flag("--save_every", type=int, default=10, help="steps between saved states, for --resume")
    flag("--seed", type=int, default=0, help="the same seed gives the same result")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def parse_args(argv=None):
    """The command line."""
    parser = make_parser()
    flag = parser.add_argument
    flag("--kl_target", type=float,
         help="multiply beta after each step so that KL comes to this many nats; None: fixed beta")
    flag("--lam", type=float,
         help="GAE: 1 trusts the rewards (unbiased, noisy), 0 trusts the value network; None: 0.95 "
         "below 10M parameters, else 1")
    flag("--ptx_data", help='JSON Lines file of {"text"}, also learnt from (PPO-ptx)')
    flag("--ptx_coef", type=float, default=1.0, help="weight of the loss on --ptx_data")
    return parser.parse_args(argv)


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
