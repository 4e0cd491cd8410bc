"""Learning to self-correct: Welleck et al. 2022, arXiv:2211.00053v1.

A generator p0 writes a draft y of an answer to x, and stays as it is. A corrector p learns to write
a better answer y' from x, the draft, and perhaps feedback f(y) in words. Its lessons are pairs from
a pool D_x of answers to the same x whose value v is known:

    D_x = {(x, y, v(y), f(y)) : y ~ p0(.|x)}                                                  (2)
    P_x = {(x, y, y') : v(y) < v(y')}                                                          (3)
    Pr(y'|y, x) = exp(alpha (v(y') - v(y)) + beta s(y, y')) / Z(y)                             (4)
    D_x <- D_x + {(x, y', v(y'), f(y')) : y' ~ p(.|y, x, f(y))}                                (5)

and its loss is -log p(y'|y, x, f(y)). s is the similarity of two answers, and Z(y) sums over the
pairs of y; first x, then y is drawn, each that has a better answer alike. Large improvements are
drawn more often (alpha), and so are small edits (beta). With values of 0 and 1 all pairs improve by
1: alpha then cancels in Z(y), and beta alone decides.

    python self_correct.py                                  # toy: rude reviews, made kind
    python self_correct.py --data mine.jsonl --model gpt2   # lines of {"prompt", "answer"}
    python self_correct.py --feedback none                  # without being told what is wrong

Where this departs from the paper, and why:
1. alpha is 10 and beta 1 unless told otherwise; the paper tunes them task by task.
2. s is 1 - the edit distance in words over the longer answer's number of words.
3. Exploration and learning alternate, --rounds times, under one learning-rate schedule; pairs are
   those of the whole pool, the first round's of the generator's answers alone. Equal answers stand
   in it once.
4. An answer that is perfect is never y in a pair, so nothing teaches the corrector to leave it
   alone. Where the value is known when correcting, --stop_at ends there; the table has both.
5. The toy's generator knows what its corrector does not: which topics the play has. So a corrector
   must read its draft; one that writes afresh is found out by similarity/own_draft.
6. The toy begins by teaching `tiny` two things that a pretrained model can do: to draft, and to
   copy a text. The generator is that model, and the corrector starts as it.
7. The loss is a mean over the tokens of a batch, so that a long answer weighs as in sft.py.
"""

import argparse
import copy
import itertools
import json
import math
import random
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from model import (check_finite, check_flags, checkpoint, common_flags, deferred_interrupt, fail,
                   get_text, load_model, load_state, open_log, plot, read_jsonl, report, restore,
                   save_model, save_state, settle, split_by_prompt, stopped)

# --------------------------------------------------------------------- which pairs to learn from


def pair_probabilities(improvement, proximity, hypothesis, alpha, beta):
    """exp(alpha improvement + beta proximity) / Z(y) of each pair (y, y'): Eq. (4).

    improvement, proximity: (P,) v(y') - v(y) and s(y, y') of P pairs; hypothesis: (P,) integers,
    equal for pairs of the same y. Returns (P,), which sums to 1 over the pairs of each y.
    """
    score = alpha * improvement + beta * proximity  # (P,)
    groups = int(hypothesis.max()) + 1
    top = score.new_full((groups,), -math.inf).scatter_reduce(0, hypothesis, score, "amax")  # (G,)
    weight = torch.exp(score - top[hypothesis])  # (P,): the largest of each y is 1
    Z = weight.new_zeros(groups).index_add(0, hypothesis, weight)  # (G,)
    return weight / Z[hypothesis]


def similarity(a, b):
    """1 - edit distance over the longer length, of two texts as sequences of words: 0 to 1."""
    a, b = a.split(), b.split()
    row = list(range(len(b) + 1))  # distances of a[:i] to every b[:j]
    for i, word in enumerate(a, 1):
        before, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (word != other)))
    return 1 - row[-1] / max(len(a), len(b), 1)


def find_pairs(values):
    """Eq. (3) for the answers to one x: [(j, k)] wherever answer k is strictly better than j."""
    return [(j, k) for j, v in enumerate(values) for k, better in enumerate(values) if v < better]


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


# -------------------------------------------------------------------------------- the toy task

POSITIVE = "amazing brilliant charming delightful funny gripping moving superb wonderful".split()
NEUTRAL = "calm familiar long modern ordinary plain quiet short simple".split()
NEGATIVE = "awful bland boring clumsy dull shallow tedious terrible weak".split()
TOPICS = ("acting cast dialogue ending music pace plot story "
          "bicycle camera guitar jacket kettle notebook phone ring scarf suitcase ticket").split()


def toy_rows(count, held_out):
    """Rows {"prompt", "topics"}: plays, and three things about each that a critic has noticed.

    The prompt, all that generator and corrector share, is empty: what the topics are, the corrector
    can learn from a draft and from nowhere else.
    """
    plays = list(itertools.permutations(TOPICS, 3))
    random.Random(0).shuffle(plays)
    return [{"prompt": "", "topics": list(play)}
            for play in (plays[-count:] if held_out else plays[:count])]


def toy_draft(rng, topics):
    """A critic's review in telegram style: a word of any mood for each topic."""
    words = [rng.choice(POSITIVE + NEUTRAL + NEGATIVE) for _ in topics]
    return " " + ", ".join(f"{word} {topic}" for word, topic in zip(words, topics)) + "."


def toy_verdicts(topics, text):
    """Of each phrase: is it kind, and about one of the topics, and for the first time?"""
    phrases = [phrase.split() for phrase in text.removesuffix(".").split(",")]
    verdicts, seen = [], []
    for phrase in phrases:
        verdicts.append(len(phrase) == 2 and phrase[0] in POSITIVE and phrase[1] in topics
                        and phrase[1] not in seen)
        seen += phrase[1:]
    return verdicts if len(phrases) == len(topics) else [False] * len(topics)


def toy_warm_up(model, tokenizer, rows, args, autocast):
    """A little SFT: half of each batch is drafting from the topics, half is copying a draft."""
    rng = random.Random(f"{args.seed} warm-up")
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(args.warm_up), desc="warm-up", disable=None):
        sequences = []
        for n, row in enumerate(rng.choices(rows, k=32)):
            draft = toy_draft(rng, row["topics"])
            feedback = appraise(row, draft, True)[1] if args.feedback == "text" else ""
            prompt = prompt_of(row, draft, feedback) if n % 2 else prompt_of(row)
            sequences.append((tokenizer.encode_prompt(prompt),
                              tokenizer.encode(draft) + [tokenizer.eos_id]))
        with autocast:
            loss = -token_logps(model, collate(sequences, model.device)).mean()  # (N,) -> ()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * schedule(step, args.warm_up)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------- data, value and feedback


def read_problems(path):
    """Rows {"prompt", "answer"} of a file."""
    example = '{"prompt": "...", "answer": "..."}'
    return [{key: get_text(place, row, key, example) for key in ("prompt", "answer")}
            for place, row in read_jsonl(path)]


def appraise(row, text, ended):
    """(v, f): the value of an answer, from 0 to 1, and feedback on it in words."""
    if "answer" in row:
        right = ended and text.strip() == row["answer"].strip()
        return float(right), f"That is {'right' if right else 'wrong'}."
    verdicts = toy_verdicts(row["topics"], text if ended else "")
    return (sum(verdicts) / len(verdicts),
            f"Spoken: {', '.join('well' if kind else 'not' for kind in verdicts)}.")


def prompt_of(row, draft=None, feedback=""):
    """What the generator reads: x; or, given a draft, what the corrector reads: x, y and f(y)."""
    if draft is None and "topics" in row:
        return f"Tonight: {', '.join(row['topics'])}."
    added = f"\nDraft:{draft}\n{feedback}\nBetter:" if draft is not None else ""
    if isinstance(row["prompt"], str):
        return (row["prompt"] + added).lstrip("\n")
    *before, last = row["prompt"]  # chat messages
    return [*before, last | {"content": last["content"] + added}]


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


def respond(model, tokenizer, rows, tasks, seed, args, autocast):
    """Answers [(ids, v, f)] to tasks: (i,) is to answer row i, (i, ids, v, f) to correct that."""
    prompts = []
    for i, *draft in tasks:
        words = ()
        if draft:
            ids, _, feedback = draft
            words = tokenizer.decode(ids), feedback if args.feedback == "text" else ""
        prompts.append(tokenizer.encode_prompt(prompt_of(rows[i], *words)))
    with autocast:
        outputs, _ = sample(model, tokenizer, prompts, args.max_new_tokens, seed)
    return [(ids, *appraise(rows[i], tokenizer.decode(ids), ids[-1] == tokenizer.eos_id))
            for (i, *_), ids in zip(tasks, outputs, strict=True)]


def add(pool, tasks, answers):
    """D_x <- D_x + what is new in the answers to tasks about x: Eqs. (2) and (5)."""
    for (i, *_), answer in zip(tasks, answers, strict=True):
        if answer[0] not in [ids for ids, _, _ in pool[i]]:
            pool[i].append(answer)


def weigh(answers, tokenizer, alpha, beta):
    """(pairs, probabilities by Eq. (4)) of the answers to one x, two lists; both may be empty."""
    pairs = find_pairs([v for _, v, _ in answers])
    if not pairs:
        return [], []
    texts = [tokenizer.decode(ids) for ids, _, _ in answers]
    improvement = torch.tensor([answers[k][1] - answers[j][1] for j, k in pairs])  # (P,)
    proximity = torch.tensor([similarity(texts[j], texts[k]) for j, k in pairs])  # (P,)
    hypothesis = torch.tensor([j for j, _ in pairs])  # (P,)
    return pairs, pair_probabilities(improvement, proximity, hypothesis, alpha, beta).tolist()


# ---------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def score(model, sequences, autocast, size=64):
    """Summed log-probs of any number of (prompt ids, response ids): (len(sequences),)."""
    with autocast:
        parts = [response_logps(model, collate(sequences[i:i + size], model.device))[0]
                 for i in range(0, len(sequences), size)]
    return torch.cat(parts).cpu()


def evaluate(model, tokenizer, rows, tries, args, autocast):
    """Corrects drafts again and again: {"draft": metrics, "1": metrics, ...}, and the texts.

    tries: for each row 1 + --corrections answers of the generator, the first of them the draft.
    Every chain of corrections goes on to its end; what the stop rule would have kept of it, and
    what the best of as many tries of the generator is worth, is told beside it.
    """
    chains = [[answers[0]] for answers in tries]
    mean = lambda values: sum(values) / len(values)
    columns = {}
    for t in range(1 + args.corrections):
        if t:
            tasks = [(i, *chain[-1]) for i, chain in enumerate(chains)]
            new = respond(model, tokenizer, rows, tasks, args.seed + t, args, autocast)
            chains = [[*chain, y] for chain, y in zip(chains, new, strict=True)]
        kept = [next((y for y in chain if y[1] >= args.stop_at), chain[-1]) for chain in chains]
        best = [max(answers[:t + 1], key=lambda answer: answer[1]) for answers in tries]
        columns["draft" if t == 0 else str(t)] = column = {}
        for name, answers in (("", [chain[-1] for chain in chains]), ("stop_rule/", kept),
                              ("resampled/", best)):
            column[f"{name}value"] = mean([v for _, v, _ in answers])
            column[f"{name}perfect"] = mean([v == 1 for _, v, _ in answers])
        texts = [[tokenizer.decode(ids) for ids, _, _ in chain] for chain in chains]
        own = [similarity(chain[-1], chain[0]) for chain in texts]
        other = [similarity(chain[-1], texts[i - 1][0]) for i, chain in enumerate(texts)]
        column |= {"similarity/own_draft": mean(own), "similarity/other_draft": mean(other)}
        if t:
            column["changed"] = mean([chain[-1] != chain[-2] for chain in texts])
            were_perfect = [chain for chain in chains if chain[-2][1] == 1]
            if were_perfect:
                column["damaged"] = mean([chain[-1][1] < 1 for chain in were_perfect])
    return columns, texts


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps):
    """Share of the learning rate: up over the first tenth of the steps, then down to 0."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def train(args):
    """Run the algorithm; returns final metrics; leaves model, log and samples in args.out."""
    # 1. The corrector, and the problems.
    model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    autocast = settle(args, model, lr_small=1e-3, lr=1e-5)
    state = load_state(args.out, args) if args.resume else {"step": 0, "explored": 0}
    if args.data:
        rows = read_problems(args.data)
        # A draft that is no valid text grows when it is decoded and encoded again, up to threefold.
        fits = [row for row in rows if 4 * args.max_new_tokens + len(tokenizer.encode_prompt(
            prompt_of(row, "", "That is wrong."))) <= args.max_length]
        print(f"{len(rows)} problems; {len(rows) - len(fits)} dropped: no room for four times "
              f"--max_new_tokens {args.max_new_tokens} behind them")
        if len(fits) < 2:
            fail(f"--data {args.data}: not two problems fit into --max_length {args.max_length} "
                 f"with --max_new_tokens {args.max_new_tokens}")
        rows, held_out = split_by_prompt(fits, args.held_out, args.seed)
    else:
        rows, held_out = toy_rows(args.problems, False), toy_rows(args.problems, True)

    # 2. The generator answers every problem; then it has done its work. Eq. (2).
    pool, tries = state.get("pool"), state.get("tries")
    if not args.resume:
        if not args.data:
            toy_warm_up(model, tokenizer, rows, args, autocast)
        generator, theirs = copy.deepcopy(model), tokenizer
        if args.generator:
            generator, theirs = load_model(args.generator, device=args.device)
            context = getattr(generator.config, "max_position_embeddings", 1024)
            if context < args.max_length:
                fail(f"--generator {args.generator}: it can read {context} tokens; give "
                     f"--max_length {context}")

        def draft(some, n, seed):
            tasks = [(i,) for i in range(len(some)) for _ in range(n)]
            answers = respond(generator, theirs, some, tasks, seed, args, autocast)
            if args.generator:  # in the corrector's tokens
                answers = [(tokenizer.encode(theirs.decode(ids)) + [tokenizer.eos_id], v, f)
                           for ids, v, f in answers]
            return tasks, answers

        pool, n = [[] for _ in rows], 1 + args.corrections
        add(pool, *draft(rows, args.pool, args.seed))
        _, drafts = draft(held_out, n, args.seed + 1)
        tries = [drafts[i:i + n] for i in range(0, len(drafts), n)]
        del generator
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    explored = state["explored"]
    if args.resume:
        restore(state, model, optimizer)
    K = math.ceil(args.epochs * len(rows) / args.batch_size)  # updates in a round
    steps = args.rounds * K if args.steps is None or not args.rounds else args.steps
    values = [v for answers in pool for _, v, _ in answers]
    count = sum(len(find_pairs([v for _, v, _ in answers])) for answers in pool)
    print(f"{len(rows)} problems, {len(held_out)} held out; {len(values)} different answers of "
          f"value {sum(values) / len(values):.3f}, {count} pairs to learn from; {steps} steps in "
          f"rounds of {K}; lr {args.lr:g}")
    if steps and not count:
        fail(f"no answer in the pool is better than another to the same problem (values: "
             f"{min(values):g} to {max(values):g}), so there is nothing to learn; take a "
             f"--generator that succeeds now and then, or a larger --pool than {args.pool}")

    progress = tqdm(range(state["step"], steps), initial=state["step"], total=steps, disable=None)
    with open_log(args.out, args, state["step"]) as log, deferred_interrupt() as pressed:
        for step in progress:
            # 3. From the second round on, exploration, Eq. (5): the corrector's own answers join
            #    the pool. (A run resumed here may have done it already.)
            if explored < step // K:
                rng = random.Random(f"{args.seed} exploration {step}")
                tasks = [(i, *rng.choice(answers)) for i, answers in enumerate(pool)
                         for _ in range(args.explore)]
                add(pool, tasks, respond(model, tokenizer, rows, tasks, rng.getrandbits(62),
                                         args, autocast))
                explored += 1

            # 4. Pairing, Eq. (3), and the probability of each pair, Eq. (4).
            if step % K == 0 or step == state["step"]:
                lessons = [(i, *weigh(answers, tokenizer, args.alpha, args.beta))
                           for i, answers in enumerate(pool)]
                lessons = [lesson for lesson in lessons if lesson[1]]
                values = [v for answers in pool for _, v, _ in answers]

            # 5. Learning: a problem, a pair of answers to it, and the better one's likelihood.
            rng, batch = random.Random(f"{args.seed} {step}"), []
            for i, pairs, probabilities in rng.choices(lessons, k=args.batch_size):
                (j, k), = rng.choices(pairs, probabilities)
                ids, _, feedback = pool[i][j]
                prompt = prompt_of(rows[i], tokenizer.decode(ids),
                                   feedback if args.feedback == "text" else "")
                batch.append((tokenizer.encode_prompt(prompt), pool[i][k][0]))
            if step == 0:
                tokenizer.show(*batch[0])
            tokens = sum(len(better) for _, better in batch)
            losses, size = [], math.ceil(len(batch) / args.accumulate)
            for i in range(0, len(batch), size):
                with autocast:
                    logps = token_logps(model, collate(batch[i:i + size], model.device))  # (N,)
                part = -logps.sum() / tokens
                part.backward()
                losses.append(part.detach())
            norm = float(nn.utils.clip_grad_norm_(weights, args.max_grad_norm))

            # 6. The update. A state is saved before it, of weights that gave a finite loss.
            loss = float(sum(losses))
            checkpoint(args, step, loss + norm, pressed, model, optimizer, pool=pool, tries=tries,
                       explored=explored)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": group["lr"],
                   "pool/answers": len(values), "pool/value": sum(values) / len(values),
                   "pool/problems": len(lessons)}
            log.write(json.dumps(row) + "\n")
            progress.set_postfix(loss=f"{loss:.3f}", value=f"{row['pool/value']:.2f}")
        if steps > state["step"]:  # the last update too must leave weights that give numbers
            check_finite(args, steps - 1, float(score(model, batch[:1], autocast).sum()))
        save_state(args.out, args, model, optimizer, step=steps, pool=pool, tries=tries,
                   explored=explored)

    # 7. Drafts for problems that nobody trained on, corrected again and again.
    columns, texts = evaluate(model, tokenizer, held_out, tries, args, autocast)
    order = sorted(range(len(texts)), key=lambda i: tries[i][0][1] == 1)  # imperfect drafts first
    samples = [{"prompt": str(prompt_of(held_out[i]))} | dict(zip(columns, texts[i]))
               for i in order[:12]]
    report(args.out, columns, samples)
    numbers = range(1 + args.corrections)
    plot(args.out, [["loss"], ["pool/value"]] if steps else [], "corrections, or tries", points={
        name: (list(numbers), [column[name] for column in columns.values()])
        for name in ("value", "stop_rule/value", "resampled/value")})
    save_model(model, tokenizer, args.out)
    (Path(args.out) / "state.pt").unlink()  # this run is complete
    return columns[str(args.corrections)]


def parse_args(argv=None):
    """The command line; --help shows every default."""
    parser = argparse.ArgumentParser(description="Learning to self-correct: see the docstring")
    common_flags(parser, out="runs/self_correct", batch_size=32,
                 lr_help="1e-3 below 10M parameters, else 1e-5; LoRA twice, or above 10M ten times "
                 "that")
    parser.set_defaults(epochs=4.0)
    flag = parser.add_argument_group("self-correction").add_argument
    flag("--generator", help="the model that drafts, which is never trained (derived: --model as "
         "it is before training)")
    flag("--feedback", default="text", choices=["text", "none"], help="whether the corrector is "
         "told in words what is wrong with a draft")
    flag("--alpha", type=float, default=10.0, help="higher learns from the largest improvements")
    flag("--beta", type=float, default=1.0, help="higher learns from the smallest edits")
    flag("--pool", type=int, default=8, help="answers of the generator to each problem")
    flag("--rounds", type=int, default=5, help="of exploration and learning, --epochs passes over "
         "the problems in each (--steps overrules their number); 0 only corrects")
    flag("--explore", type=int, default=4, help="corrections of each problem's answers that a "
         "round adds to the pool")
    flag("--corrections", type=int, default=3, help="how often a draft is corrected in the "
         "evaluation")
    flag("--stop_at", type=float, default=1.0, help="value that is good enough: the stop rule "
         "corrects no further")
    flag = parser.add_argument_group("toy").add_argument
    flag("--problems", type=int, default=512, help="plays to learn from, and as many held out")
    flag("--warm_up", type=int, default=300, help="steps in which tiny learns to draft and to copy")
    args = parser.parse_args(argv)
    check_flags(args, zero_allowed=("alpha", "beta", "rounds", "warm_up", "stop_at"))
    if args.problems > 2900:
        fail(f"--problems {args.problems}: there are 5814 plays, half of them to be held out")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        return train(args)
    except KeyboardInterrupt:
        stopped(args.out)


if __name__ == "__main__":
    main()
