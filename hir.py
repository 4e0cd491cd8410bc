"""HIR, hindsight instruction relabeling: Zhang et al. 2023, arXiv:2302.05206v1.

An output o that did not do what it was asked is a faithful answer to another instruction. So write
that one above it, and learn from every sample. In each episode of Algorithm 1: sample outputs of
random instructions p; replace each p by p*, the instruction that o obeys; minimise

    loss = L_sup + alpha L_con + beta L_ent                                                    (6)
    L_sup = -1/|o| log M(o|p*),  L_con = -log(P_1 / sum_k P_k),  L_ent = sum_v M(v) log M(v)

P_k is exp of o's mean log-prob per token under the instruction p_k, p_1 = p* being the one that o
obeys. The contrast is there to keep the model from ignoring its instructions.

    python hir.py                                  # toy: reviews of a given length, mood and topic
    python hir.py --data mine.jsonl --model gpt2   # lines of {"prompt": ..., "answer": ...}
    python hir.py --algo farl                      # only the successes; or coh, Chain of Hindsight

Where this departs from the paper, or its code from the paper, and why:
 1. The model is decoder-only (paper: FLAN-T5). It reads [p; q], the instruction before the problem
    q, and the loss is on the output and its EOS.
 2. The paper's L_con runs over the instructions and problems of a batch, its code over the two
    instructions of one problem. Here as in the code: --alternatives of the instruction, each wrong
    in one requirement; with --data there is but one, "wrong" for "correct". As in the code, P_k is
    a mean per token and label smoothing applies to L_con too (so it is least where P_1's share is
    1 - e, not 1), but without the 1e-8 inside its logarithms.
 3. Samples are drawn at --temperature 0.6 (paper: 1). At 1 the defaults undo themselves: L_sup with
    e = 0.2 asks for a random token one time in five, and the next episode samples that.
 4. The paper's code trains on "Solve question with correct answer." and asks with "Solve the
    question ...". Here one function words an instruction, for training and asking.
 5. What was sampled stays what it is: the ids are kept, nothing is tokenised again, an output that
    was cut off has no EOS and is not a right answer. No relabeling of parts of an output (4.3 in
    the paper): its code calls any substring of the answer correct.
 6. All samples of a run are kept and drawn alike, as in the code (it drops duplicates).
 7. Of the toy's 48 instructions 8 are never asked in training. Hindsight may still meet them.
 8. FARL and Chain of Hindsight have L_sup only, the latter without its masking of past tokens and
    its pretraining term.
 9. After an episode come as many updates as 5 passes over its samples take, in batches of 32
    (paper: 10 passes, 64), drawn from all samples so far. The learning rate above 10M parameters is
    1e-5 (paper: 5e-4, for T5).
"""

import argparse
import itertools
import json
import math
import random
import re
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from model import (check_finite, check_flags, checkpoint, common_flags, deferred_interrupt, fail,
                   get_text, load_model, load_state, open_log, plot, read_jsonl, report, restore,
                   save_model, save_state, settle, split_by_prompt, stopped)

# ------------------------------------------------------------------------------------ the loss


def hir_loss(logps, token_entropy, alpha=1.0, beta=0.001, label_smoothing=0.2,
             vocabulary_logps=None):
    """L_sup + alpha L_con + beta L_ent of each output: Eq. (6). Returns (B,).

    logps: (B, C) mean log-prob per token, in nats, of an output under the instruction it obeys
    (first) and under C - 1 that it does not; token_entropy: (B,) entropy of the next token, the
    mean over the output; vocabulary_logps: (B,) log-prob, the mean over tokens and vocabulary,
    which label smoothing needs (ValueError without it). Smoothing e leaves 1 - e on the token that
    was written, and on the instruction that was obeyed, and spreads e over the vocabulary, and the
    alternatives.
    """
    e, C = label_smoothing, logps.shape[1]
    if e and vocabulary_logps is None:
        raise ValueError("label smoothing needs vocabulary_logps")
    own = logps[:, 0]  # (B,)
    supervised = -((1 - e) * own + e * vocabulary_logps) if e else -own
    share = logps.log_softmax(1)  # (B, C): log of exp P_ii / sum_k exp P_ik
    smooth = e if C > 1 else 0.0  # with no alternative there is nothing to tell apart
    others = share[:, 1:].sum(1) / max(C - 1, 1)  # (B,)
    contrast = -((1 - smooth) * share[:, 0] + smooth * others)
    return supervised + alpha * contrast - beta * token_entropy


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


class GatherEntropy(torch.autograd.Function):
    """Entropy of softmax(hidden @ weight.T), in chunks like `GatherLogps`: (N,), in nats.

    With logits z and p their softmax, H = logsumexp(z) - E_p[z], and dH/dz = -p (log p + H).
    """

    @staticmethod
    def forward(ctx, hidden, weight):
        h = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # (N, D)
        logsumexp = h.new_full((len(h),), -math.inf)  # (N,)
        mean = torch.zeros_like(logsumexp)  # (N,): E_p[z] over the chunks so far
        with torch.autocast(h.device.type, enabled=False):
            for w in weight.split(GatherLogps.COLUMNS):  # (C, D)
                logits = h @ w.to(h.dtype).T  # (N, C)
                chunk = logits.logsumexp(1)  # (N,)
                total = torch.logaddexp(logsumexp, chunk)
                part = ((logits - total[:, None]).exp() * logits).sum(1)  # (N,)
                mean = mean * (logsumexp - total).exp() + part
                logsumexp = total
        entropy = logsumexp - mean
        ctx.save_for_backward(hidden, weight, logsumexp, entropy)
        return entropy

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, logsumexp, entropy = ctx.saved_tensors
        h = hidden.to(logsumexp.dtype)  # (N, D)
        grad_h = torch.zeros_like(h)
        grad_w = torch.empty_like(weight, dtype=h.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, len(weight), GatherLogps.COLUMNS):
            columns = slice(start, start + GatherLogps.COLUMNS)
            w = weight[columns].to(h.dtype)  # (C, D)
            logp = h @ w.T - logsumexp[:, None]  # (N, C)
            grad_z = -grad[:, None] * logp.exp() * (logp + entropy[:, None])  # (N, C)
            grad_h.addmm_(grad_z, w)
            if grad_w is not None:
                torch.mm(grad_z.T, h, out=grad_w[columns])
        return grad_h.to(hidden.dtype), None if grad_w is None else grad_w.to(weight.dtype)


def gather_entropy(hidden, weight):
    """Entropy of the next token: hidden (N, D), weight (V, D) -> (N,), in nats."""
    return GatherEntropy.apply(hidden, weight)


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


def output_statistics(model, sequences, count):
    """Per-token means of all (prompt ids, output ids), and more of the first `count` of them.

    Returns logps (len(sequences),), and of the first ones entropy and the log-prob averaged over
    the vocabulary, (count,) each: what `hir_loss` takes.
    """
    batch = collate(sequences, model.device)
    hidden = model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"], use_cache=False).last_hidden_state  # (B, T, D)
    hidden = hidden.flatten(0, 1).index_select(0, batch["index"])  # (B*T, D) -> (N, D)
    weight = model.get_output_embeddings().weight  # (V, D)
    logps = gather_logps(hidden, weight, batch["targets"])  # (N,)
    lengths = torch.tensor([len(output) for _, output in sequences]).to(logps)  # (B,)
    mean = lambda x, rows: torch.zeros_like(lengths).index_add(0, rows, x.to(lengths)) / lengths
    own = slice(sum(len(output) for _, output in sequences[:count]))  # their tokens come first
    h, rows = hidden[own], batch["rows"][own]
    entropy = gather_entropy(h, weight)
    # The mean of all logits is one product: log p averaged over v = h . mean(w) - logsumexp, and
    # the logsumexp is in the log-prob of the target already.
    with torch.autocast(h.device.type, enabled=False):
        # Not weight[...]: on several threads its gradient adds up in another order each time.
        targets = weight.index_select(0, batch["targets"][own])  # (n, D)
        toward = weight.float().mean(0) - targets.float()  # (n, D)
        vocabulary = logps[own] + (h.float() * toward).sum(1)  # (n,)
    return mean(logps, batch["rows"]), mean(entropy, rows)[:count], mean(vocabulary, rows)[:count]


# -------------------------------------------------------------------------------- the toy task

POSITIVE = "amazing brilliant charming delightful funny gripping moving superb wonderful".split()
NEUTRAL = "calm familiar long modern ordinary plain quiet short simple".split()
NEGATIVE = "awful bland boring clumsy dull shallow tedious terrible weak".split()
ASPECTS = "acting cast dialogue ending music pace plot story".split()
# An instruction is a choice of each; and what a review does is one, too.
CHOICES = {"length": ["short", "long"], "mood": ["kind", "fair", "bad"], "topic": ASPECTS}
GOOD, BAD = " Good:", " Bad:"  # Chain of Hindsight's feedback in words


def toy_instructions(requirements, held_out):
    """All instructions of so many requirements, in a fixed random order: a sixth is held out."""
    keys = list(CHOICES)[:requirements]
    all_of_them = [dict(zip(keys, values))
                   for values in itertools.product(*(CHOICES[key] for key in keys))]
    random.Random(0).shuffle(all_of_them)
    asked = len(all_of_them) - len(all_of_them) // 6
    return all_of_them[asked:] if held_out else all_of_them[:asked]


def toy_review(rng):
    """One or two sentences with one or two adjectives each, in any mood."""
    text = ""
    for aspect in rng.sample(ASPECTS, rng.choice((1, 2))):
        words = rng.sample(POSITIVE + NEUTRAL + NEGATIVE, rng.choice((1, 2)))
        text += rng.choice((" The {} was {}.", " I found the {} {}.")).format(
            aspect, " and ".join(words))
    return text


def toy_done(review):
    """What a review does: length, mood and topic, that of its first sentence; {} if it is none."""
    word, aspect = "|".join(POSITIVE + NEUTRAL + NEGATIVE), "|".join(ASPECTS)
    sentence = rf" (?:The ({aspect}) was|I found the ({aspect})) (?:{word})(?: and (?:{word}))?\."
    if not re.fullmatch(f"(?:{sentence}){{1,2}}", review):
        return {}
    words = re.findall(r"\w+", review)
    tone = sum((word in POSITIVE) - (word in NEGATIVE) for word in words)
    return {"length": "long" if review.count(".") == 2 else "short",
            "mood": "kind" if tone > 0 else "bad" if tone < 0 else "fair",
            "topic": next(word for word in words if word in ASPECTS)}


def toy_warm_up(model, tokenizer, args, autocast):
    """A little SFT, so that `tiny` answers any instruction with a review, whatever it asks for."""
    rng = random.Random(f"{args.seed} warm-up")
    asked = toy_instructions(args.requirements, held_out=False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(args.warm_up), desc="warm-up", disable=None):
        sequences = [(tokenizer.encode_prompt(in_words(rng.choice(asked))),
                      tokenizer.encode(toy_review(rng)) + [tokenizer.eos_id]) for _ in range(32)]
        with autocast:
            loss = -token_logps(model, collate(sequences, model.device)).mean()  # (N,) -> ()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * schedule(step, args.warm_up)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------ hindsight, and the data


def relabel(wanted, done):
    """The instruction that an output obeys: phi in the paper's Algorithm 1.

    wanted: the instruction, {requirement: value}; done: what the output did, in the same terms ({}
    if it is nothing that can be asked for). An instruction that was followed stays as it is.
    """
    return {key: done[key] for key in wanted} if done else {}


def alternatives(obeyed, wanted, choices, count, rng):
    """`count` instructions that an output does not obey: each breaks one requirement it meets."""
    others = []
    for _ in range(count):
        other = dict(obeyed) or wanted  # what is no review does not do what was wanted
        if obeyed:
            key = rng.choice(list(obeyed))
            other[key] = rng.choice([value for value in choices[key] if value != obeyed[key]])
        others.append(other)
    return others


def in_words(instruction):
    """An instruction as a model reads it."""
    if "answer" in instruction:
        return f"Generate a {instruction['answer']} answer to this problem."
    if not instruction:
        return "Write no review:"
    mood = f", {instruction['mood']}" if "mood" in instruction else ""
    topic = f" of the {instruction['topic']}" if "topic" in instruction else ""
    return f"Write a {instruction['length']}{mood} review{topic}:"


def ask(row, instruction, feedback=""):
    """The prompt: the instruction, the problem if there is one, and coh's word for the answer."""
    words, prompt = in_words(instruction), row["prompt"]
    if not prompt:
        return words + feedback
    if isinstance(prompt, str):
        return f"{words}\n{prompt}{feedback}"
    *before, last = prompt  # chat messages
    return [*before, last | {"content": f"{words}\n{last['content']}{feedback}"}]


def observe(row, text, ended):
    """What an output did: {"answer": "correct" or "wrong"} by exact match, or of the toy."""
    if "answer" in row:
        right = ended and text.strip() == row["answer"].strip()
        return {"answer": "correct" if right else "wrong"}
    return toy_done(text) if ended else {}


def read_problems(path):
    """Rows {"prompt", "answer"} of a file."""
    example = '{"prompt": "...", "answer": "..."}'
    return [{key: get_text(place, row, key, example) for key in ("prompt", "answer")}
            for place, row in read_jsonl(path)]


def chains(online):
    """Chain of Hindsight's examples: (row, wanted, an output that failed, one that did not).

    Liu et al. 2023, arXiv:2302.02676. Each success, beside a failure at the very same task.
    """
    groups = {}
    for i, wanted, done, output in online:
        group = groups.setdefault((i, in_words(wanted)), (wanted, [], []))
        group[1 + (relabel(wanted, done) == wanted)].append(output)
    return [(i, wanted, bad[k % len(bad)], output)
            for (i, _), (wanted, bad, good) in groups.items() if bad
            for k, output in enumerate(good)]


def usable(online, algo):
    """The samples that an algorithm can learn from."""
    if algo == "coh":
        return chains(online)
    return [sample for sample in online
            if algo == "hir" or relabel(sample[1], sample[2]) == sample[1]]


def sequences_of(batch, rows, choices, tokenizer, args, rng):
    """(own, others): what a batch trains on, [(prompt ids, output ids)], and the same outputs under
    alternative instructions, --alternatives lists of them.
    """
    encode = lambda i, *words: tokenizer.encode_prompt(ask(rows[i], *words))
    own, others = [], [[] for _ in range(args.alternatives * (args.algo == "hir"))]
    for i, wanted, done, output in batch:
        if args.algo == "coh":  # both orders: the good one must be found without a bad one, too
            (say, first), (then, second) = rng.sample([(BAD, done), (GOOD, output)], 2)
            start = encode(i, wanted, say)
            own += [(start, first), (start + first + tokenizer.encode(then), second)]
            continue
        obeyed = relabel(wanted, done)
        own.append((encode(i, obeyed), output))
        for other, k in zip(alternatives(obeyed, wanted, choices, len(others), rng), others):
            k.append((encode(i, other), output))
    return own, others


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


def try_out(model, tokenizer, rows, tasks, seed, args, autocast):
    """Sample an output for each task (i, wanted): [(i, wanted, what it did, its ids)]."""
    feedback = GOOD if args.algo == "coh" else ""
    prompts = [tokenizer.encode_prompt(ask(rows[i], wanted, feedback)) for i, wanted in tasks]
    with autocast:
        outputs, _ = sample(
            model, tokenizer, prompts, args.max_new_tokens, seed, args.temperature)
    return [(i, wanted, observe(rows[i], tokenizer.decode(ids), ids[-1] == tokenizer.eos_id), ids)
            for (i, wanted), ids in zip(tasks, outputs, strict=True)]


def evaluate(model, tokenizer, rows, groups, args, autocast):
    """Shares of instructions followed, by group and by requirement, and texts of the first group.

    groups: {name: [(i, wanted)]}. A requirement is met if the output does that part of what was
    wanted, whatever else it does.
    """
    metrics, texts = {}, []
    for name, tasks in groups.items():
        tried = try_out(model, tokenizer, rows, tasks, args.seed, args, autocast)
        mean = lambda values: sum(values) / len(tried)
        metrics[f"followed/{name}"] = mean([relabel(w, d) == w for _, w, d, _ in tried])
        if not args.data and name == "all":
            for key in tasks[0][1]:
                metrics[f"followed/{key}"] = mean([d.get(key) == w[key] for _, w, d, _ in tried])
            metrics["samples/reviews"] = mean([bool(d) for _, _, d, _ in tried])
        texts = texts or [tokenizer.decode(ids) for *_, ids in tried]
    return metrics, texts


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps):
    """Share of the learning rate: up over the first tenth of the steps, then down to 0."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def train(args):
    """Run the algorithm; returns final metrics; leaves model, log and samples in args.out."""
    # 1. The model, and what can be asked of it.
    model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    autocast = settle(args, model, lr_small=4e-3, lr=1e-5)
    state = load_state(args.out, args) if args.resume else {"step": 0, "online": []}
    room = args.max_new_tokens  # behind a prompt; coh's chains hold two outputs and a word
    room = 2 * room + len(tokenizer.encode(GOOD)) if args.algo == "coh" else room
    length = lambda row, wanted: room + len(tokenizer.encode_prompt(ask(row, wanted, GOOD)))
    if args.data:
        rows = read_problems(args.data)
        fits = [row for row in rows if length(row, {"answer": "correct"}) <= args.max_length]
        print(f"{len(rows)} problems; {len(rows) - len(fits)} dropped: no room for "
              f"--max_new_tokens {args.max_new_tokens} behind them")
        if len(fits) < 2:
            fail(f"--data {args.data}: not two problems fit into --max_length {args.max_length} "
                 f"with --max_new_tokens {args.max_new_tokens}")
        known, held_out = split_by_prompt(fits, args.held_out, args.seed)
        rows, choices = known + held_out, {"answer": ["correct", "wrong"]}
        tasks = [(i, {"answer": "correct"}) for i in range(len(known))]
        asked = range(len(known), len(rows))
        groups = {kind: [(i, {"answer": kind}) for i in asked] for kind in choices["answer"]}
    else:
        rows, choices = [{"prompt": ""}], CHOICES  # the instruction is the whole problem
        tasks = [(0, wanted) for wanted in toy_instructions(args.requirements, held_out=False)]
        new = [(0, wanted) for wanted in toy_instructions(args.requirements, held_out=True)]
        longest = max(length(rows[0], wanted) for _, wanted in tasks + new)
        if longest > args.max_length:
            fail(f"--max_length {args.max_length}: the toy takes {longest} with --max_new_tokens "
                 f"{args.max_new_tokens}")
        many = lambda some, count: (some * math.ceil(count / len(some)))[:count] if some else []
        groups = {"all": many(tasks, 400), "held_out": many(new, 96)}
        groups = {name: some for name, some in groups.items() if some}
        if not args.resume:
            toy_warm_up(model, tokenizer, args, autocast)

    # 2. Before. The first update is far away, so there is time to see that all is well.
    before = state.get("before") or evaluate(model, tokenizer, rows, groups, args, autocast)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    online = state["online"]  # D_online
    examples = usable(online, args.algo)
    if args.resume:
        restore(state, model, optimizer)
    count = args.rounds * args.batch_size  # samples in an episode: T rounds of a batch
    K = math.ceil(args.epochs * args.rounds)  # updates in an episode
    steps = args.steps or args.episodes * K
    print(f"{steps} steps: in every {K} one episode of {count} samples; lr {args.lr:g}")

    progress = tqdm(range(state["step"], steps), initial=state["step"], total=steps, disable=None)
    with open_log(args.out, args, state["step"]) as log, deferred_interrupt() as pressed:
        for step in progress:
            rng = random.Random(f"{args.seed} {step}")
            if step % K == 0:
                # 3. Online: an episode of samples. (A run resumed here may have drawn it already.)
                asked, seed = rng.choices(tasks, k=count), rng.getrandbits(62)
                if len(online) < (step // K + 1) * count:
                    online += try_out(model, tokenizer, rows, asked, seed, args, autocast)
                examples = usable(online, args.algo)
            followed = sum(relabel(w, done) == w for _, w, done, _ in online[-count:]) / count

            # 4. Offline: draw a batch, relabel it, and write the alternatives beside it.
            batch = rng.choices(examples, k=args.batch_size) if examples else []
            own, others = sequences_of(batch, rows, choices, tokenizer, args, rng)
            if step == 0 and own:
                tokenizer.show(*own[0])

            # 5. The loss, Eq. (6), and its gradient, part by part.
            seen, size = [], math.ceil(len(own) / args.accumulate) or 1
            for i in range(0, len(own), size):
                part = [k[i:i + size] for k in (own, *others)]  # C lists of b
                with autocast:
                    logps, entropy, vocabulary = output_statistics(
                        model, sum(part, []), len(part[0]))  # (C*b,), (b,), (b,)
                logps = logps.view(len(part), -1).T  # (C*b,) -> (b, C)
                losses = hir_loss(logps, entropy, args.alpha, args.beta, args.label_smoothing,
                                  vocabulary)  # (b,)
                (losses.sum() / len(own)).backward()
                seen.append([x.detach() for x in (losses, logps, entropy)])
            norm = float(nn.utils.clip_grad_norm_(weights, args.max_grad_norm))

            # 6. The update. A state is saved before it, of weights that gave a finite loss.
            row = {"step": step + 1, "online/followed": followed,
                   "online/used": len(examples) / len(online), "grad_norm": norm}
            if seen:
                losses, logps, entropy = (torch.cat(x).cpu() for x in zip(*seen))  # B, (B, C), B
                row |= {"loss": float(losses.mean()), "logps/obeyed": float(logps[:, 0].mean()),
                        "entropy": float(entropy.mean())}
            if seen and others:
                row["logps/others"] = float(logps[:, 1:].mean())
                right = (logps[:, :1] > logps[:, 1:]).all(1)  # (B,)
                row["contrast/accuracy"] = float(right.float().mean())
            checkpoint(args, step, row.get("loss", 0.0) + norm, pressed, model, optimizer,
                       online=online, before=before)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row["lr"] = group["lr"]
            log.write(json.dumps(row) + "\n")
            loss = row.get("loss", math.nan)
            progress.set_postfix(loss=f"{loss:.3f}", followed=f"{followed:.2f}")
        if steps > state["step"] and own:  # the last update too must leave good weights
            check_finite(args, steps - 1, float(score(model, own[:1], autocast).sum()))
        save_state(args.out, args, model, optimizer, step=steps, online=online, before=before)

    # 7. After, and what hindsight made of the first samples.
    if not examples:
        print(f"none of {len(online)} samples was of use to --algo {args.algo}, so the model is "
              "what it was; hir learns from failures, too")
    after, texts = evaluate(model, tokenizer, rows, groups, args, autocast)
    before, old_texts = before
    after["online/used"] = len(examples) / len(online)
    first = next(iter(groups.values()))
    spread = range(0, len(first), math.ceil(len(first) / 8))
    samples = [{"prompt": str(ask(rows[first[k][0]], first[k][1])), "before": old_texts[k],
                "after": texts[k]} for k in spread]
    told = [{"asked": in_words(wanted), "wrote": tokenizer.decode(ids),
             "hindsight": in_words(relabel(wanted, done))} for _, wanted, done, ids in online[:8]]
    report(args.out, {"before": before, "after": after}, samples[:2] + told + samples[2:])
    plot(args.out, [["online/followed", "online/used"], ["loss"], ["contrast/accuracy"]])
    save_model(model, tokenizer, args.out)
    (Path(args.out) / "state.pt").unlink()  # this run is complete
    return after


def parse_args(argv=None):
    """The command line; --help shows every default."""
    parser = argparse.ArgumentParser(description="HIR, filtered behaviour cloning and Chain of "
                                     "Hindsight: see the docstring")
    common_flags(parser, out="runs/hir", batch_size=32,
                 lr_help="4e-3 below 10M parameters, else 1e-5; LoRA twice, or above 10M ten times "
                 "that")
    parser.set_defaults(epochs=5.0)
    flag = parser.add_argument_group("hindsight").add_argument
    flag("--algo", default="hir", choices=["hir", "farl", "coh"], help="farl: imitate the samples "
         "that did what was asked; coh: good and bad samples in one text, told apart in words")
    flag("--episodes", type=int, default=8, help="times that samples are drawn and learnt from "
         "(--steps overrules it); --epochs are passes over one episode's")
    flag("--rounds", type=int, default=8, help="batches of samples in an episode")
    flag("--temperature", type=float, default=0.6, help="of the samples, also in the evaluation; "
         "near 1 label smoothing turns them to noise")
    flag("--alpha", type=float, help="hir: weight of the contrast between instructions; higher "
         "heeds them more (derived: 1)")
    flag("--beta", type=float, help="hir: weight of the entropy; higher keeps samples diverse "
         "(derived: 0.001)")
    flag("--label_smoothing", type=float, default=0.2, help="probability that the loss takes from "
         "what was written, and from the instruction that was obeyed")
    flag("--alternatives", type=int, help="hir: wrong instructions beside the right one (derived: "
         "1)")
    flag = parser.add_argument_group("toy").add_argument
    flag("--requirements", type=int, default=3, choices=[1, 2, 3], help="length; and mood; and "
         "topic. Fewer are met by chance more often")
    flag("--warm_up", type=int, default=60, help="steps of SFT on reviews under instructions that "
         "have nothing to do with them")
    args = parser.parse_args(argv)
    for name, default in (("alpha", 1.0), ("beta", 0.001), ("alternatives", 1)):
        if args.algo != "hir" and getattr(args, name) is not None:
            fail(f"--{name} has no part in --algo {args.algo}; leave it out")
        if getattr(args, name) is None:
            setattr(args, name, default if args.algo == "hir" or name == "alternatives" else 0.0)
    check_flags(args, zero_allowed=("alpha", "beta", "label_smoothing", "warm_up"))
    if args.label_smoothing >= 1:
        fail(f"--label_smoothing {args.label_smoothing}: must be below 1")
    if args.data and args.alternatives > 1:
        fail("--alternatives: with --data there is only one, the wrong answer for the correct one")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        return train(args)
    except KeyboardInterrupt:
        stopped(args.out)


if __name__ == "__main__":
    main()
