"""Supervised fine-tuning (SFT): step 1 of InstructGPT, Ouyang et al. 2022, arXiv:2203.02155v1, 3.5.

Maximise the likelihood of demonstrated responses y, token by token, given their prompts x:

    loss = - sum_t m_t log pi(y_t | x, y_<t) / N            N = sum_t m_t

m_t is 1 on the tokens of the response, its EOS included, and 0 on the prompt and on padding; N
counts the response tokens of the whole optimizer step, however it is split (a "token mean").

    python sft.py                                      # toy: summaries, from the model in tiny/
    python sft.py --task sentiment                     # toy: reviews in a friendlier tone
    python sft.py --data mine.jsonl --model gpt2       # lines of {"prompt": ..., "completion": ...}
    python sft.py --task pretrain --out runs/tiny      # made the model in tiny/, from scratch

Where this departs from the paper, and why:
1. One epoch, no dropout, learning rate warmed up over a tenth of the steps and decayed to 0. The
   paper: 16 epochs, dropout 0.2, cosine to 10 %, no warm-up. The toy has fresh data for every step
   and needs neither repetition nor the dropout that makes repetition bearable.
2. The paper does not say whether prompts were masked. Here the loss is on responses only, and of a
   chat on the last reply only.
3. The paper chose its checkpoint by reward-model score; here the last one is kept.
"""

import argparse
import json
import math
import random
import re
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from model import (check_finite, check_flags, checkpoint, common_flags, deferred_interrupt, fail,
                   get_text, load_model, load_state, open_log, plot, read_jsonl, report, restore,
                   save_model, save_state, settle, split_by_prompt, stopped)

# ------------------------------------------------------------------------------------ the loss


def sft_loss(logps, mask, normalizer=None):
    """Mean negative log-likelihood of response tokens (InstructGPT 3.5).

    logps, mask: (B, T), log-probs in nats and 1 on response tokens. normalizer: response tokens of
    the whole optimizer step; the default is those of this call. Returns a scalar, nats per token.
    """
    return -(logps * mask).sum() / (mask.sum() if normalizer is None else normalizer)


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


# ------------------------------------------------------------------------------- the toy tasks

POSITIVE = "amazing brilliant charming delightful funny gripping moving superb wonderful".split()
NEUTRAL = "calm familiar long modern ordinary plain quiet short simple".split()
NEGATIVE = "awful bland boring clumsy dull shallow tedious terrible weak".split()
ASPECTS = "acting cast dialogue ending music pace plot story".split()
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


def toy_prompts(held_out):
    """Prompts of the sentiment task, in a fixed random order: the last 40 are held out."""
    prompts = [f"{who} {saw} the {show} {when}."
               for who in ("I", "We", "My sister", "Our class", "Two friends")
               for saw in ("saw", "watched")
               for show in ("film", "movie", "musical", "opera", "play", "series")
               for when in ("last night", "yesterday", "on Friday", "in London", "with friends")]
    random.Random(0).shuffle(prompts)
    return prompts[-40:] if held_out else prompts[:-40]


def toy_review(rng, weights):
    """One or two sentences whose adjectives are positive, neutral or negative by these weights."""
    text = ""
    for aspect in rng.sample(ASPECTS, rng.choice((1, 2, 2))):
        tones = rng.choices((POSITIVE, NEUTRAL, NEGATIVE), weights, k=rng.choice((1, 2)))
        words = [rng.choice(tone) for tone in tones]
        while len(set(words)) < len(words):
            words[-1] = rng.choice(tones[-1])
        text += rng.choice((" The {} was {}.", " I found the {} {}.")).format(
            aspect, " and ".join(words))
    return text


def toy_post(rng):
    """A post of three to seven sentences that states two to four facts: (prompt, facts)."""
    kinds = rng.sample(list(FACTS), rng.choice((2, 3, 4)))
    facts = {kind: rng.choice(FACTS[kind]) for kind in kinds}
    said = [rng.choice(SAID[kind]).format(fact) for kind, fact in facts.items()]
    sentences = said + rng.sample(FILLER, rng.choice((1, 2, 3)))
    rng.shuffle(sentences)
    return " ".join(sentences) + "\nTL;DR:", facts


def toy_summary(facts):
    """The summary that states exactly these facts."""
    what = f"a {facts['what']}" if "what" in facts else "something"
    where = f" in {facts['where']}" if "where" in facts else ""
    when = f" on {facts['when']}" if "when" in facts else ""
    return f" {facts.get('who', 'Somebody')} lost {what}{where}{when}."


def toy_corrupt(rng, facts):
    """Facts as a careless reader reports them: half of the time some are lost or made up."""
    careless = rng.random() < 0.5
    heard = {}
    for kind, fact in facts.items():
        fate = rng.random() if careless else 0.0
        if fate < 0.7:
            heard[kind] = fact if fate < 0.4 else rng.choice(FACTS[kind])
    return heard


def toy_quality(summary, facts):
    """True quality of a summary: recall of facts - made-up facts - 0.01 a word; also the parts."""
    words = re.findall(r"\w+", summary)
    stated = set(words) & {fact for values in FACTS.values() for fact in values}
    recall = len(stated & set(facts.values())) / len(facts)
    made_up = len(stated - set(facts.values())) / len(facts)
    return {"quality": recall - made_up - 0.01 * len(words), "recall": recall, "made_up": made_up}


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


def toy_rows(task, count, seed, held_out=False):
    """Rows {"prompt", "completion", "facts"} of a toy task; pretraining mixes both, unpolished."""
    rng = random.Random(f"{seed} {held_out}")
    prompts = toy_prompts(held_out)
    rows = []
    for _ in range(count):
        if task == "sentiment" or (task == "pretrain" and rng.random() < 0.5):
            weights = (1, 1, 1) if task == "pretrain" else (6, 3, 1)
            rows.append({"prompt": rng.choice(prompts), "completion": toy_review(rng, weights)})
        else:
            prompt, facts = toy_post(rng)
            told = toy_corrupt(rng, facts) if task == "pretrain" else facts
            rows.append({"prompt": prompt, "completion": toy_summary(told), "facts": facts})
    return rows


def toy_new_model(rows, device):
    """An untrained GPT-2 of half a million parameters, and a byte-level BPE learned on the rows."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config

    end = "<|endoftext|>"
    bpe = ByteLevelBPETokenizer()
    texts = (row["prompt"] + row["completion"] for row in rows[:4000])
    bpe.train_from_iterator(texts, vocab_size=767, min_frequency=2, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save_model(folder)  # vocab.json, merges.txt
        path = Path(folder) / "vocab.json"
        vocab = json.loads(path.read_text(encoding="utf-8"))
        vocab[end] = len(vocab)
        path.write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        path.with_name("tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "GPT2Tokenizer", "bos_token": end, "eos_token": end,
             "unk_token": end, "model_max_length": 512}))
        GPT2Config(vocab_size=len(vocab), n_positions=512, n_embd=128, n_layer=2, n_head=4,
                   bos_token_id=vocab[end], eos_token_id=vocab[end]).save_pretrained(folder)
        return load_model(folder, device=device)  # a folder without weights: they are random


# ---------------------------------------------------------------------------------------- data


def read_demonstrations(path):
    """Rows {"prompt", "completion"} of a file in that format, or in {"messages": [...]}."""
    example = '{"prompt": "...", "completion": "..."}'
    rows = []
    for place, row in read_jsonl(path):
        if "messages" in row:  # the last message is the response, those before it are the prompt
            messages = row["messages"]
            if not (isinstance(messages, list) and len(messages) > 1
                    and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"):
                fail(f'{place}: "messages" must be a list that ends with a reply of the assistant')
            row = {"prompt": messages[:-1], "completion": messages[-1:]}
        rows.append({key: get_text(place, row, key, example) for key in ("prompt", "completion")})
    return rows


def encode_demonstrations(tokenizer, rows, max_length):
    """Examples (prompt ids, response ids), and counts of the rows that are dropped or cut."""
    ids = [tokenizer.encode_example(row["prompt"], row["completion"], max_length) for row in rows]
    examples = [example for example in ids if example]
    cut = sum(response[-1] != tokenizer.eos_id for _, response in examples)
    return examples, {"dropped": len(rows) - len(examples), "cut": cut}


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


def evaluate(model, tokenizer, test, rows, args, autocast):
    """Metrics on held-out examples and rows (a dict), and samples for the rows (texts)."""
    lengths = sum(len(response) for _, response in test)
    metrics = {"loss": -float(score(model, test, autocast).sum()) / lengths}
    asked = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
    texts = [tokenizer.decode(ids) for ids in
             sample(model, tokenizer, asked, args.max_new_tokens, args.seed)[0]]
    mean = lambda values: sum(values) / len(values)
    summaries = [toy_quality(t, row["facts"]) for t, row in zip(texts, rows) if "facts" in row]
    reviews = [t for t, row in zip(texts, rows) if not args.data and "facts" not in row]
    if summaries:
        metrics |= {f"summary/{key}": mean([s[key] for s in summaries]) for key in summaries[0]}
    if reviews:
        metrics["review/true_reward"] = mean([toy_reward(review) for review in reviews])
        metrics["review/grammatical"] = mean([toy_grammatical(review) for review in reviews])
        for name, tone in (("positive", POSITIVE), ("neutral", NEUTRAL), ("negative", NEGATIVE)):
            words = [w in tone for review in reviews for w in re.findall(r"\w+", review)]
            metrics[f"review/{name}_words"] = sum(words) / len(reviews)
    return metrics, texts


def toy_baselines(rows):
    """Quality of the first sentence and of the first three as summaries: lead-1 and lead-3."""
    posts = [row for row in rows if "facts" in row]
    return {f"summary/{key} of lead-{k}": sum(toy_quality(
        ".".join(row["prompt"].split(".")[:k]), row["facts"])[key] for row in posts) / len(posts)
        for k in (1, 3) for key in ("quality", "recall") if posts}


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps):
    """Share of the learning rate: up over the first tenth of the steps, then down to 0."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def train(args):
    """Run the algorithm; returns final metrics; leaves model, log and samples in args.out."""
    # 1. Demonstrations, and the model to start from.
    if args.data:
        rows, held_out = split_by_prompt(read_demonstrations(args.data), args.held_out, args.seed)
    else:
        rows = toy_rows(args.task, args.examples, args.seed)
        held_out = toy_rows(args.task, 200, args.seed, held_out=True)
    if args.task == "pretrain":
        model, tokenizer = toy_new_model(rows, args.device)
    else:
        model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    autocast = settle(args, model, lr_small=3e-3 if args.task == "pretrain" else 1e-3, lr=1e-5)
    state = load_state(args.out, args) if args.resume else {"step": 0}

    # 2. Text to token ids. What does not fit is counted, and never changed silently.
    examples, lost = encode_demonstrations(tokenizer, rows, args.max_length)
    test, _ = encode_demonstrations(tokenizer, held_out, args.max_length)
    if not examples or not test:
        fail(f"--max_length {args.max_length}: no row of {args.data or 'the toy'} fits; "
             "give a larger one")
    print(f"{len(examples)} demonstrations, {len(test)} held out. {lost['dropped']} dropped (no "
          f"room behind the prompt), {lost['cut']} responses cut")
    tokenizer.show(*examples[0])

    # 3. Batches, made once: an epoch shuffles their order, not what is in them.
    random.Random(args.seed).shuffle(examples)
    batches = [examples[i:i + args.batch_size] for i in range(0, len(examples), args.batch_size)]
    steps = args.steps or math.ceil(len(batches) * args.epochs)
    order = []
    while len(order) < steps:
        order += random.Random(args.seed + len(order)).sample(range(len(batches)), len(batches))

    # 4. Before.
    fits = [row for row in held_out
            if len(tokenizer.encode_prompt(row["prompt"])) < args.max_length]
    shown = fits[:8] if args.data else fits
    before = state.get("before") or evaluate(model, tokenizer, test, shown, args, autocast)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    if args.resume:
        restore(state, model, optimizer)

    progress = tqdm(range(state["step"], steps), initial=state["step"], total=steps, disable=None)
    with open_log(args.out, args, state["step"]) as log, deferred_interrupt() as pressed:
        for step in progress:
            batch = batches[order[step]]
            tokens = sum(len(response) for _, response in batch)

            # 5. The loss and its gradient, part by part, divided by the tokens of the whole batch.
            losses, size = [], math.ceil(len(batch) / args.accumulate)
            for i in range(0, len(batch), size):
                with autocast:
                    logps = token_logps(model, collate(batch[i:i + size], model.device))  # (N,)
                # A token mean does not care for rows: all response tokens can stand in one, (1, N).
                loss = sft_loss(logps[None], torch.ones_like(logps)[None], normalizer=tokens)
                loss.backward()
                losses.append(loss.detach())
            norm = float(torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm))

            # 6. The update. A state is saved before it, of weights that gave a finite loss.
            loss = float(sum(losses))
            checkpoint(args, step, loss + norm, pressed, model, optimizer, before=before)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": group["lr"],
                   "tokens": tokens}
            log.write(json.dumps(row) + "\n")
            progress.set_postfix(loss=f"{loss:.3f}", norm=f"{norm:.2f}")
        if steps > state["step"]:  # the last update too must leave weights that give numbers
            check_finite(args, steps - 1, float(score(model, batch[:1], autocast).sum()))
        save_state(args.out, args, model, optimizer, step=steps, before=before)

    # 7. After.
    after, texts = evaluate(model, tokenizer, test, shown, args, autocast)
    before, old_texts = before
    if not args.data:
        before, after = before | toy_baselines(held_out), after | toy_baselines(held_out)
    samples = [{"prompt": row["prompt"], "before": old, "after": new}
               for row, old, new in zip(shown, old_texts, texts)]
    report(args.out, {"before": before, "after": after}, samples)
    plot(args.out, [["loss"], ["grad_norm"], ["lr"]])
    save_model(model, tokenizer, args.out)
    (Path(args.out) / "state.pt").unlink()  # this run is complete
    return after


def parse_args(argv=None):
    """The command line; --help shows every default."""
    parser = argparse.ArgumentParser(description="Supervised fine-tuning: see the docstring")
    common_flags(parser, out="runs/sft", batch_size=32,
                 lr_help="1e-3 below 10M parameters, 3e-3 for pretrain, else 1e-5; LoRA twice, "
                 "or above 10M ten times that")
    flag = parser.add_argument_group("demonstrations").add_argument
    flag("--task", default="summarization", choices=["summarization", "sentiment", "pretrain"],
         help="the toy task; pretrain makes a new model that knows both, badly on purpose")
    flag("--examples", type=int, help="toy: demonstrations to learn from (derived: 3200; pretrain "
         "128000, in batches of 64)")
    args = parser.parse_args(argv)
    if args.task == "pretrain" and args.data:
        fail("--task pretrain makes its own data; leave out --data")
    if args.task == "pretrain" and args.examples is None:
        args.batch_size = 64
    args.examples = args.examples or (128000 if args.task == "pretrain" else 3200)
    check_flags(args)
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        return train(args)
    except KeyboardInterrupt:
        stopped(args.out)


if __name__ == "__main__":
    main()
