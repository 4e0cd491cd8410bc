"""SimPO, simple preference optimization: Meng, Xia and Chen 2024, arXiv:2405.14734v3.

The reward of a response is the mean log-prob of its tokens, times beta. The chosen response y_w
should beat the rejected one, y_l, by a margin gamma. There is no reference model:

    loss = -log sigma(beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x) - gamma)               (6)

The mean gives beta the same meaning for short and for long responses. With sums a long response
would earn less, since the log-prob of each token is negative. lessons/length_bias.py compares.

    python simpo.py                                  # toy: summaries; the human likes them long
    python simpo.py --data mine.jsonl --model gpt2   # lines of {"prompt", "chosen", "rejected"}
    python simpo.py --loss orpo                      # or cpo, slic

gamma is the margin itself, as in Eq. (6). --gamma_beta_ratio sets it: gamma = ratio * beta. The
learning rate falls to 0 along a line, where the paper uses a cosine. Nothing in the loss keeps the
policy near its start, so the KL divergence from the start is measured after training.
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
# The inputs of each loss, all (B,): log-probs of whole responses, summed over their tokens with
# EOS, in nats, and the numbers of these tokens. Each loss returns (B,). `pair_loss` calls them.

SUMS = ("cpo", "slic")  # these compare sums of log-probs; all other losses compare means


def simpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, beta, gamma):
    """SimPO, Eq. (6). gamma is the margin itself, not its ratio to beta."""
    return -F.logsigmoid(beta * (chosen / chosen_lengths - rejected / rejected_lengths) - gamma)


def cpo_loss(chosen, rejected, beta, lam=1.0):
    """CPO, Xu et al. 2024 (arXiv:2401.08417), Eq. (3): DPO without a reference, plus SFT on y_w."""
    return -F.logsigmoid(beta * (chosen - rejected)) - lam * chosen


def orpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, lam=0.1):
    """ORPO, Hong et al. 2024 (arXiv:2403.07691), Eqs. (4), (7): SFT and the log odds ratio.

    The odds are p / (1 - p), where log p is the mean log-prob. (The original code takes the SFT
    term over the prompt too.)
    """
    w, l = chosen / chosen_lengths, rejected / rejected_lengths  # (B,) each, log p
    log_odds_ratio = (w - log1mexp(w)) - (l - log1mexp(l))  # (B,)
    return -w - lam * F.logsigmoid(log_odds_ratio)


def log1mexp(x):
    """log(1 - e^x) for x < 0. Each of the two branches is exact where the other one is not."""
    x = x.clamp(max=-1e-7)  # at p = 1 the odds would be infinite
    near = x > -0.69  # near 0; log 2 is 0.69
    # torch.where differentiates both branches, so the unused one gets an input that is harmless.
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, torch.log(-torch.expm1(x)), far)


def slic_loss(chosen, rejected, delta=1.0, lam=1.0):
    """SLiC-HF, Zhao et al. 2023 (arXiv:2305.10425): a hinge on the sums, plus SFT on y_w.

    The paper's SFT target is a reference text. Pairs have none, so y_w takes its place, as in the
    SimPO paper.
    """
    return F.relu(delta - chosen + rejected) - lam * chosen


def pair_loss(logps, lengths, args):
    """The loss that --loss names: (B,). The inputs are (B, 2): chosen, then rejected."""
    chosen, rejected = logps.unbind(1)  # (B,) each, as all that follow
    chosen_lengths, rejected_lengths = lengths.unbind(1)
    if args.loss == "simpo":
        return simpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, args.beta,
                          gamma=args.gamma_beta_ratio * args.beta)
    if args.loss == "cpo":
        return cpo_loss(chosen, rejected, args.beta, args.lam)
    if args.loss == "orpo":
        return orpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, args.lam)
    return slic_loss(chosen, rejected, args.delta, args.lam)


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


def toy_well_formed(summary):
    """Whether a summary is one sentence like " Anna lost a ring in Rome.", whatever it states."""
    what, where, when = ("|".join(FACTS[kind]) for kind in ("what", "where", "when"))
    form = rf" \w+ lost (a ({what})|something)( in ({where}))?( on ({when}))?\."
    return bool(re.fullmatch(form, summary))


def toy_summaries(model, tokenizer, count, length_bias, seed, k=2, max_tokens=4096):
    """Rows of a post, its facts, and k of the model's own summaries, as a human ranks them.

    The human likes 4 * quality + length_bias * words + Gumbel noise. With this noise a pair follows
    the Bradley-Terry model, and a longer ranking the Plackett-Luce model.
    """
    rng = random.Random(seed)
    posts = [toy_post(rng) for _ in range(count)]
    asked = [tokenizer.encode_prompt(prompt) for prompt, _ in posts for _ in range(k)]
    print(f"sampling {len(asked)} summaries for the human to judge")
    drawn = sample(model, tokenizer, asked, 64, seed, max_tokens=4 * max_tokens)
    texts = [tokenizer.decode(ids, whole=True) for ids in drawn]
    rows = []
    for i, (prompt, facts) in enumerate(posts):
        likings = {
            text: 4 * toy_quality(text, facts)["quality"] + length_bias * len(text.split())
            - math.log(rng.expovariate(1))
            for text in texts[i * k:(i + 1) * k]}
        responses = sorted(likings, key=likings.get, reverse=True)
        rows.append({"prompt": prompt, "facts": facts, "responses": responses,
                     "chosen": responses[0], "rejected": responses[-1]})
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


def evaluate(policy, reference, tokenizer, test, args):
    """Metrics of both models on held-out rows, {"before": ..., "after": ...}, and their samples."""
    # The held-out prompts, repeated or cut to this number.
    shown = (test * 256)[:256 if policy.small else 32]
    print(f"evaluating: {len(test)} pairs, then {len(shown)} samples of both models")
    pairs = [row["pair"] for row in test]
    lengths = torch.tensor([[len(response) for _, response in pair] for pair in pairs])  # (N, 2)
    asked = [row["pair"][0][0] for row in shown]
    columns, samples = {}, [{"prompt": row["prompt"]} for row in shown]
    qualities = []
    for name, model in (("before", reference), ("after", policy)):
        logps = group_logps(model, pairs, args.max_tokens)  # (N, 2)
        losses = None  # variants/rankings.py has other losses
        if hasattr(args, "delta"):
            losses = pair_loss(logps, lengths, args)  # (N,)
        rewards = logps if args.loss in SUMS else logps / lengths  # (N, 2)
        metrics = pair_metrics(losses, rewards, lengths, [row["prompt"] for row in test], args)
        responses = sample(model, tokenizer, asked, args.max_new_tokens, args.seed,
                           max_tokens=4 * args.max_tokens)
        metrics["samples/tokens"] = fmean(map(len, responses))
        for row, response in zip(samples, responses):
            row[name] = tokenizer.decode(response)
        if not args.data:
            parts = [toy_quality(row[name], post["facts"]) for row, post in zip(samples, shown)]
            for key in parts[0]:
                metrics[f"samples/{key}"] = fmean(part[key] for part in parts)
            qualities.append([part["quality"] for part in parts])
            if model.small:
                metrics["samples/grammatical"] = fmean(
                    toy_well_formed(row[name]) for row in samples)
        columns[name] = metrics

    after = columns["after"]
    if not args.data:  # how often the policy's sample is the better of two; a tie is half a win
        old, new = torch.tensor(qualities)  # (len(asked),) each
        after["samples/win_rate"] = float(1 + (new - old).sign().mean()) / 2

    # The KL divergence is estimated with the policy's samples, which are those drawn last.
    groups = [[(prompt, response)] for prompt, response in zip(asked, responses)]
    log_ratios = (group_logps(policy, groups, args.max_tokens)
                  - group_logps(reference, groups, args.max_tokens))  # (len(asked), 1)
    after["kl/policy_reference"] = float(log_ratios.mean())
    return columns, samples


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps, warmup=0.1):
    """The share of the peak learning rate: it rises for a part of the steps, then falls to 0."""
    peak = max(1, int(warmup * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))


def train(args):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics."""
    run = Run(args)

    # 1. The policy. No other model is needed until training is over.
    model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    fill_defaults(args, DEFAULTS, model.small)

    # 2. Pairs, from a file or from the toy's human. All pairs of some prompts are held out.
    if args.data:
        rows = [read_row(row, tokenizer, "chosen", "rejected") for row in read_jsonl(args.data)]
    else:
        rows = toy_summaries(model, tokenizer, args.pairs, args.length_bias, args.seed,
                             max_tokens=args.max_tokens)
        rows = all_gather(rows)[0]  # those of process 0
    rows, test, _ = split_by_prompt(encode_pairs(tokenizer, rows, args), 256)
    pairs = [row["pair"] for row in rows]
    tokenizer.show(*pairs[0][0])

    # 3. Batches: each epoch visits all pairs in a new order.
    args.batch_size = args.batch_size or (8 if len(pairs) <= 2000 else 32)  # with --data
    steps = args.steps or args.epochs * math.ceil(len(pairs) / args.batch_size)
    warn_of_few(steps, args)
    batches = []
    while len(batches) < steps:
        order = random.Random(f"{args.seed} {len(batches)}").sample(pairs, len(pairs))
        batches += [order[i:i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    start = run.load_state(model, optimizer)["step"]

    progress = tqdm(range(start, steps), initial=start, total=steps, disable=None)
    for step in progress:
        # 4. The loss and its gradient, part by part.
        batch = batches[step]
        seen = [torch.zeros(0, 3, device=model.device)]  # a process may have no part
        for part in share(split_batch(batch, args.max_tokens)):
            sequences = [sequence for g in part for sequence in batch[g]]
            # Sums of log-probs, and lengths: (2b,) -> (b, 2) each
            logps, lengths = (x.view(-1, 2) for x in response_logps(model, sequences))
            loss = pair_loss(logps, lengths, args)  # (b,)
            (loss.sum() / len(batch)).backward()
            rewards = logps if args.loss in SUMS else logps / lengths  # (b, 2)
            seen.append(torch.cat([loss[:, None], rewards], 1).detach())  # (b, 3)

        # 5. The update. A state is saved before it, and only if the gradient is finite.
        add_gradients(model)
        norm = float(clip_grad_norm_(model.parameters(), 1.0))
        seen = torch.cat(all_gather(torch.cat(seen).cpu()))  # (b, 3) each -> (B, 3)
        loss, chosen, rejected = seen.unbind(1)  # (B,) each
        if not math.isfinite(norm):
            fail(f"step {step + 1}: the gradient is not finite; use a lower --lr")
        if step % args.save_every == 0:
            run.save_state(step, model, optimizer)
        optimizer.param_groups[0]["lr"] = lr = args.lr * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()

        # 6. What to watch. Rewards are the loss's own: means or sums of log-probs, without beta.
        row = {
            "step": step + 1,
            "lr": lr,
            "grad_norm": norm,
            "loss": fmean(loss),
            "rewards/chosen": fmean(chosen),
            "rewards/rejected": fmean(rejected),
            "rewards/accuracy": fmean(chosen > rejected)}  # ties count as wrong
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
DEFAULTS = {"lr": (3e-4, 3e-5, 2e-5), "batch_size": (32, 8, None), "pairs": (2304, 256, None)}


def make_parser(file, text, defaults, rows='{"prompt", "chosen", "rejected"}'):
    """The flags that SimPO shares with variants/rankings.py."""
    parser = new_parser(file, text, defaults)
    flag = parser.add_argument
    flag("--data", help=f"JSON Lines file of {rows}; None: the toy task")
    flag("--lr", type="amount", help="peak learning rate")
    flag("--epochs", type="positive", default=1, help="passes over the data")
    flag("--steps", type="positive", help="updates; None: as many as --epochs takes")
    flag("--batch_size", type="positive",
         help="rows in an update; by default with --data: 8 for up to 2,000 of them, else 32")
    flag("--max_length", type="positive", default=1024, help="tokens of prompt and response")
    flag("--max_new_tokens", type="positive", default=64, help="most tokens of a sample")
    flag("--pairs", type="positive", help="toy: posts to summarise")
    flag("--length_bias", type="real", default=1.0,
         help="toy: how much the human likes each word; true quality, at most 1, counts 4 times")
    return parser


def parse_args(argv=None):
    """The command line, with the defaults that differ between the losses."""
    parser = make_parser(__file__, __doc__, DEFAULTS)
    flag = parser.add_argument
    flag("--loss", default="simpo", choices=["simpo", "cpo", "orpo", "slic"],
         help="what is minimised")
    flag("--beta", type="amount", help="scale of rewards; None: 2 for simpo, 0.1 for cpo")
    flag("--gamma_beta_ratio", type="amount", default=0.5,
         help="simpo: the margin gamma, over beta")
    flag("--lam", type="amount",
         help="weight of the SFT term, and for orpo of the odds-ratio term; None: 1, orpo 0.1")
    flag("--delta", type="amount", default=1.0, help="slic: margin of the hinge, in nats")
    args = parser.parse_args(argv)
    for name, losses in (("beta", ("simpo", "cpo")), ("gamma_beta_ratio", ("simpo",)),
                         ("lam", ("cpo", "orpo", "slic")), ("delta", ("slic",))):
        if args.loss not in losses and getattr(args, name) != parser.get_default(name):
            warnings.warn(f"--{name} has no effect with --loss {args.loss}")
    if args.beta is None:
        args.beta = 2.0 if args.loss == "simpo" else 0.1
    if args.loss == "simpo" and args.beta == 0:
        fail("--beta 0: the loss has no gradient then; give a higher one")
    if args.lam is None:
        args.lam = 0.1 if args.loss == "orpo" else 1.0
    return args


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
