"""Supervised fine-tuning (SFT): step 1 of InstructGPT, Ouyang et al. 2022, arXiv:2203.02155v1, 3.5.

A person demonstrates good responses y to prompts x. The model learns to imitate them: training
raises the probability of each token of a response, given the prompt and the tokens before it:

    loss = -(1/N)  sum over responses  sum over t  of  log pi(y_t | x, y_<t)

The sums are over response tokens only, EOS included. N is the number of response tokens in an
update, so each token counts the same (a "token mean").

    python sft.py                                    # toy: reviews in a friendlier tone
    python sft.py --data mine.jsonl --model gpt2     # lines of {"prompt", "completion"}

Departures from the paper: one epoch, no dropout, and a learning rate that rises, then falls to 0
(the paper: 16 epochs, dropout 0.2, no warm-up, cosine to 10 %). The paper does not say whether the
loss includes prompts; here it does not, and of a chat only the last reply is learned. The paper
selects a checkpoint by its reward model's score; here the last one is saved.
"""

import math
import random
import re
from statistics import fmean

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import (Run, add_gradients, all_gather, fail, fill_defaults, launch, load_model,
                   new_parser, read_jsonl, read_row, save_model, share, split_by_prompt,
                   warn_of_few)

# ------------------------------------------------------------------------------------ the loss
# It is called in step 5 of `train`.


def sft_loss(logps, mask, normalizer=None):
    """Mean negative log-likelihood of response tokens (InstructGPT 3.5), in nats per token.

    logps, mask: (B, T), log-probs in nats, and 1 on response tokens. normalizer: the number of
    response tokens in the whole update; the default is their number in this call. A scalar.
    """
    return -(logps * mask).sum() / (mask.sum() if normalizer is None else normalizer)


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


def mask_of(sequences, device):
    """Where the rows of a (B, R) tensor hold response tokens: (B, R), bool."""
    ones = [torch.ones(len(response), dtype=torch.bool) for _, response in sequences]
    return pad_sequence(ones, batch_first=True).to(device)  # (B, R)


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


def toy_rows(count, seed):
    """Demonstrations: reviews in which six of ten adjectives are positive, and one is negative."""
    rng = random.Random(seed)
    return [{"prompt": prompt, "completion": toy_review(rng, weights=(6, 3, 1))}
            for prompt in rng.choices(toy_prompts(), k=count)]


# ------------------------------------------------------------------------- data and evaluation


def read_demonstrations(path, tokenizer):
    """The rows of a file. Of "messages" the last one is the completion, the others the prompt."""
    rows = []
    for row in read_jsonl(path):
        key = "messages" if "messages" in row else "completion"
        row = read_row(row, tokenizer, key)
        rows.append(row | {"completion": row[key]})
    return rows


def encode_demonstrations(tokenizer, rows, args):
    """The usable rows, each with a new key "example": (prompt ids, response ids)."""
    usable = []
    for row in rows:
        example = tokenizer.encode_example(row["prompt"], row["completion"], args.max_length,
                                           room=args.max_new_tokens)
        if example:
            usable.append(dict(row, example=example))
    cut = sum(row["example"][1][-1] not in tokenizer.stop_ids for row in usable)
    counts = {"demonstrations": len(usable),
              "left out without room for --max_new_tokens": len(rows) - len(usable),
              "responses cut at --max_length": cut}
    found = "; ".join(f"{count} {what}" for what, count in counts.items() if count)
    print(found)
    return usable or fail(f"no demonstration is left: {found}")


@torch.no_grad()
def evaluate(name, model, tokenizer, rows, args):
    """{name: the loss on held-out rows, and in the toy the true quality of samples}, and samples.
    """
    examples = [row["example"] for row in rows]
    tokens = sum(len(response) for _, response in examples)
    loss = 0.0
    parts = share(split_batch([[example] for example in examples], args.max_tokens))
    for part in tqdm(parts, f"evaluating {name} training", leave=False, disable=None):
        sequences = [examples[b] for b in part]
        mask = mask_of(sequences, model.device)  # (b, r)
        loss += float(sft_loss(token_logps(model, sequences, mask.shape[1]), mask, tokens))
    metrics = {"loss": sum(all_gather(loss))}
    shown = rows[:8 if args.data else None]
    responses = sample(model, tokenizer, [row["example"][0] for row in shown], args.max_new_tokens,
                       args.seed, max_tokens=4 * args.max_tokens)
    samples = [{"prompt": row["prompt"], name: tokenizer.decode(response)}
               for row, response in zip(shown, responses)]
    if not args.data:
        metrics["samples/true_reward"] = fmean(toy_reward(row[name]) for row in samples)
        if model.small:
            metrics["samples/grammatical"] = fmean(toy_grammatical(row[name]) for row in samples)
    return {name: metrics}, samples


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps, warmup=0.1):
    """The share of the peak learning rate: it rises for a part of the steps, then falls to 0."""
    peak = max(1, int(warmup * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))


def train(args):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics."""
    run = Run(args)

    # 1. The model.
    model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    fill_defaults(args, DEFAULTS, model.small)

    # 2. Demonstrations, from a file or of the toy. All rows of some prompts are held out.
    if args.data:
        rows = read_demonstrations(args.data, tokenizer)
    else:
        rows = toy_rows(args.examples, args.seed)
    rows, held_out, _ = split_by_prompt(encode_demonstrations(tokenizer, rows, args), 200)
    examples = [row["example"] for row in rows]
    tokenizer.show(*examples[0])

    # 3. Evaluate before training. This also shows early whether the evaluation works.
    columns, samples = evaluate("before", model, tokenizer, held_out, args)

    # 4. Batches: each epoch visits all demonstrations in a new order.
    args.batch_size = args.batch_size or (8 if len(examples) <= 2000 else 32)  # with --data
    steps = args.steps or args.epochs * math.ceil(len(examples) / args.batch_size)
    warn_of_few(steps, args)
    batches = []
    while len(batches) < steps:
        order = random.Random(f"{args.seed} {len(batches)}").sample(examples, len(examples))
        batches += [order[i:i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    start = run.load_state(model, optimizer)["step"]

    progress = tqdm(range(start, steps), initial=start, total=steps, disable=None)
    for step in progress:
        # 5. The loss and its gradient, part by part. Each part is divided by the number of response
        # tokens in the whole batch, so the parts add up to the batch's mean over tokens.
        batch, loss = batches[step], 0.0
        tokens = sum(len(response) for _, response in batch)
        for part in share(split_batch([[example] for example in batch], args.max_tokens)):
            sequences = [batch[b] for b in part]
            mask = mask_of(sequences, model.device)  # (b, r)
            logps = token_logps(model, sequences, mask.shape[1])  # (b, r)
            part_loss = sft_loss(logps, mask, normalizer=tokens)
            part_loss.backward()
            loss += part_loss.detach()

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

        # 7. What to watch.
        row = {"step": step + 1, "lr": lr, "grad_norm": norm, "loss": sum(all_gather(float(loss)))}
        run.log(row)
        progress.set_postfix(loss=row["loss"])

    # 8. Save, then compare with the model before training, and with the demonstrations.
    save_model(model, tokenizer, args.out)
    after, new_samples = evaluate("after", model, tokenizer, held_out, args)
    if not args.data:
        demonstrated = fmean(toy_reward(row["completion"]) for row in held_out)
        columns = {"people": {"samples/true_reward": demonstrated}} | columns
    samples = [old | new for old, new in zip(samples, new_samples)]
    run.report(columns | after, samples, panels=[["loss"], ["grad_norm"], ["lr"]])
    return after["after"]


# Defaults: models below 10M parameters; larger ones in the toy; larger ones with --data.
DEFAULTS = {"lr": (1e-3, 1e-5, 5e-5), "batch_size": (32, 32, None), "examples": (3400, 640, None)}


def parse_args(argv=None):
    """The command line."""
    parser = new_parser(__file__, __doc__, DEFAULTS)
    flag = parser.add_argument
    flag("--data", help='JSON Lines file of {"prompt", "completion"} or {"messages"}; None: toy')
    flag("--lr", type="amount", help="peak learning rate")
    flag("--epochs", type="positive", default=1, help="passes over the demonstrations")
    flag("--steps", type="positive", help="updates; None: as many as --epochs takes")
    flag("--batch_size", type="positive",
         help="rows in an update; by default with --data: 8 for up to 2,000 of them, else 32")
    flag("--max_length", type="positive", default=1024, help="tokens of prompt and response")
    flag("--max_new_tokens", type="positive", default=64, help="most tokens of a sample")
    flag("--examples", type="positive", help="toy: demonstrations to make")
    return parser.parse_args(argv)


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
