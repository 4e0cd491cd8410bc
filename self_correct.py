"""Learning to self-correct: Welleck et al. 2022, arXiv:2211.00053v1.

A generator p0 writes a draft y of an answer to x, and is never trained. A corrector p learns to
write a better answer y' from x, the draft y, and perhaps feedback f(y) in words. It learns from
pairs of answers to the same x. They come from a pool D_x whose values v are known:

    D_x = {(x, y, v(y), f(y)) : y ~ p0(.|x)}                                                  (2)
    P_x = {(x, y, y') : v(y) < v(y')}                                                          (3)
    Pr(y'|y, x) = exp(alpha (v(y') - v(y)) + beta s(y, y')) / Z(y)                             (4)
    D_x <- D_x + {(x, y', v(y'), f(y')) : y' ~ p(.|y, x, f(y))}                                (5)

The loss is -log p(y'|y, x, f(y)). s is the similarity of two answers, and Z(y) sums over the pairs
of y. So a higher alpha draws large improvements more often, and a higher beta draws small edits.
If all values are 0 or 1, every pair improves by 1: alpha cancels in Z(y), and only beta matters.

    python self_correct.py                                  # toy: unkind reviews, made kind
    python self_correct.py --data mine.jsonl --model gpt2   # lines of {"prompt", "answer"}
    python self_correct.py --feedback none                  # without being told what is wrong

Departures from the paper: alpha is 10 and beta 1 (paper: tuned for each task); s is 1 - edit
distance in words / number of words; all rounds share one learning-rate schedule; equal answers are
in the pool once; the loss is a mean over the tokens of a batch.
"""

import itertools
import math
import random
import re
import warnings
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import (Run, add_to_prompt, fail, fill_defaults, launch, load_model, new_parser, number,
                   read_jsonl, read_row, save_model, split_by_prompt)

# ------------------------------------------------------------ pairs to learn from, and the loss
# The answers to a problem are its pool: D_x is problem["pool"]. `weigh` is called in step 5 of
# `train`, the loss in step 7.


class Answer(NamedTuple):
    """An answer to a problem, its value from 0 to 1, and what the corrector is told about it."""

    text: str
    value: float
    feedback: str


def pair_probabilities(improvement, proximity, hypothesis, alpha, beta):
    """exp(alpha improvement + beta proximity) / Z(y) of each pair (y, y'), Eq. (4): (P,).

    improvement, proximity: (P,) v(y') - v(y) and s(y, y') of P pairs. hypothesis: (P,) integers,
    equal for pairs of the same y; the result sums to 1 over these.
    """
    score = alpha * improvement + beta * proximity  # (P,)
    same = hypothesis[:, None] == hypothesis  # (P, P): do two pairs have the same y?
    log_Z = torch.where(same, score, -math.inf).logsumexp(1)  # (P, P) -> (P,)
    return (score - log_Z).exp()


def find_pairs(values):
    """Eq. (3) for the answers to one x: all (j, k) where answer k is strictly better than j."""
    return [(j, k) for j, v in enumerate(values) for k, better in enumerate(values) if v < better]


def similarity(a, b):
    """1 - edit distance / length of the longer, for two texts as sequences of words: 0 to 1."""
    a, b = a.split(), b.split()
    row = list(range(len(b) + 1))  # edit distances of an empty text to the first j words of b
    for word in a:
        above, row = row, [row[0] + 1]
        for j, other in enumerate(b):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (word != other)))
    return 1 - row[-1] / max(len(a), len(b), 1)


def weigh(answers, alpha, beta):
    """Pairs (y, y') of the answers to one x, and their probabilities by Eq. (4): two lists."""
    indices = find_pairs([answer.value for answer in answers])
    pairs = [(answers[j], answers[k]) for j, k in indices]
    improvement = torch.tensor([better.value - draft.value for draft, better in pairs])  # (P,)
    proximity = torch.tensor([similarity(draft.text, better.text) for draft, better in pairs])
    hypothesis = torch.tensor([j for j, _ in indices])
    return pairs, pair_probabilities(improvement, proximity, hypothesis, alpha, beta).tolist()


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
OTHERS = ("calm familiar long modern ordinary plain quiet short simple "
          "awful bland boring clumsy dull shallow tedious terrible weak").split()
TOPICS = ("acting cast dialogue ending music pace plot story "
          "bicycle camera guitar jacket kettle notebook phone ring scarf suitcase ticket").split()


def toy_problems(count):
    """`count` plays to learn from and as many held out, each with three topics of its review.

    Only the generator is told the topics, so the corrector has to read them in the draft.
    """
    plays = random.Random(0).sample(list(itertools.permutations(TOPICS, 3)), 2 * count)
    problems = [{"prompt": f"Tonight: {', '.join(play)}.", "topics": play} for play in plays]
    return problems[:count], problems[count:]


def toy_draft(rng, topics):
    """A critic's draft: an adjective for each topic, which is kind in one of three cases."""
    phrases = [f"{rng.choice(POSITIVE + OTHERS)} {topic}" for topic in topics]
    return f" {', '.join(phrases)}."


def toy_verdicts(topics, text):
    """For each topic in its turn: is there a kind word for it? Phrases beyond these are wrong."""
    phrases = text.removesuffix(".").split(",")
    return [phrase in [f" {word} {topic}" for word in POSITIVE]
            for topic, phrase in itertools.zip_longest(topics, phrases, fillvalue="")]


def toy_warm_up(model, tokenizer, problems, args):
    """A little SFT: half of each batch is drafting from the topics, half is copying a draft."""
    print(f"warm-up: {args.warm_up} steps of SFT on drafting and on copying")
    rng = random.Random(f"{args.seed} warm-up")
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
    for step in tqdm(range(args.warm_up), "warm-up", disable=None):
        sequences = []
        for n, problem in enumerate(rng.choices(problems, k=32)):
            draft = appraise(problem, toy_draft(rng, problem["topics"]), True, args)
            prompt = prompt_of(problem, draft if n % 2 else None)
            sequences.append(tokenizer.encode_example(prompt, draft.text, 512))
        mask = mask_of(sequences, model.device)  # (b, r)
        sft_loss(token_logps(model, sequences, mask.shape[1]), mask).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 4e-3 * schedule(step, args.warm_up)
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------- data and evaluation


def final(text, match):
    """What of a reply is compared: all of it, its last line, or its last number (None without one).

    match: "all", "line" or "number". Numbers are equal if they are as numbers: 1,000.0 is 1000.
    """
    if match == "number":
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 1,000 is 1000, and (3,4) is 3 and 4
        numbers = re.findall(r"(?:(?<![\w)])-)?\d+(?:\.\d+)?", text)  # 5-3 is 5 and 3
        return float(numbers[-1]) if numbers else None
    text = text.strip()
    return text.split("\n")[-1].strip() if match == "line" else text


def appraise(problem, text, ended, args):
    """The Answer made of a text: its value is the share that is right, or 0 if it was cut."""
    if "topics" in problem:
        verdicts = [ended and kind for kind in toy_verdicts(problem["topics"], text)]
        feedback = f"Spoken: {', '.join('well' if kind else 'not' for kind in verdicts)}."
    else:
        verdicts = [ended and final(text, args.match) == final(problem["answer"], args.match)]
        feedback = f"That is {'right' if verdicts[0] else 'wrong'}."
    return Answer(text, sum(verdicts) / len(verdicts), feedback if args.feedback == "text" else "")


def prompt_of(problem, draft=None):
    """What the generator reads: x. With a draft, what the corrector reads: x, y and f(y)."""
    if draft is None:
        return problem["prompt"]
    added = f"\nDraft:{draft.text}\n{draft.feedback}\nBetter:"
    if "topics" in problem:  # the toy's corrector is not told the topics
        return added.lstrip()
    return add_to_prompt(problem["prompt"], after=added)


def read_problems(tokenizer, args, room):
    """Problems to learn from, and problems held out. room: the most tokens of a prompt."""
    if not args.data:
        if room < 64:
            fail("no problem is left; use a lower --max_new_tokens")
        return toy_problems(args.problems)
    rows = [read_row(row, tokenizer, "answer") for row in read_jsonl(args.data)]
    usable = []
    for row in rows:  # `add_to_prompt` refuses a chat in which a reply has begun
        if len(tokenizer.encode_prompt(add_to_prompt(row["prompt"]))) <= room:
            # The answer as it would be learned: a chat template may write more than it.
            example = tokenizer.encode_example(row["prompt"], row["answer"], 10**9)
            usable.append({"prompt": row["prompt"], "answer": tokenizer.decode(example[1])})
            if final(usable[-1]["answer"], args.match) is None:
                fail(f'{row["where"]}: the answer holds no number, which --match number needs')
    no_room = len(rows) - len(usable)
    print(f"{len(usable)} problems" + bool(no_room) *
          f"; {no_room} left out that leave no room for --max_new_tokens")
    return split_by_prompt(usable, 256)[:2]


def respond(model, tokenizer, tasks, seed, args):
    """Answers to tasks (problem, draft): corrections of the draft, or new answers if it is None."""
    prompts = [tokenizer.encode_prompt(prompt_of(problem, draft)) for problem, draft in tasks]
    outputs = sample(model, tokenizer, prompts, args.max_new_tokens, seed,
                     max_tokens=4 * args.max_tokens)
    return [appraise(problem, tokenizer.decode(ids), ids[-1] in tokenizer.stop_ids, args)
            for (problem, _), ids in zip(tasks, outputs)]


def explore(model, tokenizer, tasks, seed, args):
    """D_x <- D_x + answers to tasks about x, Eqs. (2) and (5). Equal answers are kept once."""
    for (problem, _), answer in zip(tasks, respond(model, tokenizer, tasks, seed, args)):
        pool = problem.setdefault("pool", [])
        if answer not in pool:
            pool.append(answer)


def evaluate(model, tokenizer, problems, args):
    """Correct drafts again and again: {"draft": metrics, "1": metrics, ...}, and samples.

    stop_rule/ is for answers that are left alone once they are perfect. Without this rule some
    perfect answers are damaged: they are never y in a pair, so nothing teaches to keep them.
    """
    columns, samples = {}, [{"prompt": problem["prompt"]} for problem in problems]
    print(f"evaluating: {args.corrections} corrections of {len(problems)} drafts")
    answers = kept = [problem["pool"][0] for problem in problems]  # drafts
    for t in range(1 + args.corrections):
        name, before = str(t or "draft"), answers
        if t:
            answers = respond(model, tokenizer, list(zip(problems, before)), args.seed + t, args)
            kept = [old if old.value == 1 else new for old, new in zip(kept, answers)]
        damaged = [new.value < 1 for old, new in zip(before, answers) if old.value == 1]
        columns[name] = {
            "value": fmean(answer.value for answer in answers),
            "perfect": fmean(answer.value == 1 for answer in answers),
            "stop_rule/perfect": fmean(answer.value == 1 for answer in kept),
            "damaged": fmean(damaged or [0])}
        for row, answer in zip(samples, answers):
            row[name] = answer.text
    return columns, samples


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps, warmup=0.1):
    """The share of the peak learning rate: it rises for a part of the steps, then falls to 0."""
    peak = max(1, int(warmup * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))


def train(args):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics."""
    run = Run(args)

    # 1. The corrector, the generator and the problems. The toy begins with a warm-up. Without
    # --generator, the generator is the corrector as it is before training.
    model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    fill_defaults(args, DEFAULTS, model.small)
    generator, its_tokenizer = model, tokenizer
    if args.generator:
        generator, its_tokenizer = load_model(args.generator, device=args.device)
    context = min(tokenizer.context, its_tokenizer.context)
    # A draft that is no valid UTF-8 can have three times as many tokens when it is encoded again.
    # Its correction takes one time more, and the words around it at most 32.
    problems, held_out = read_problems(tokenizer, args, context - 4 * args.max_new_tokens - 32)
    if not args.data:
        toy_warm_up(model, tokenizer, problems, args)

    # 2. The generator answers every problem, Eq. (2), and drafts for those that are held out.
    tasks = [(problem, None) for problem in problems * args.pool + held_out]
    print(f"sampling {len(tasks)} drafts of the generator")
    explore(generator, its_tokenizer, tasks, args.seed, args)
    del generator

    # 3. A round is K updates.
    K = math.ceil(args.epochs * len(problems) / args.batch_size)
    steps = args.rounds * K
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    state = run.load_state(model, optimizer, pool=[])
    start = state["step"]
    for problem, answers in zip(problems, state["pool"]):
        problem["pool"] = [Answer(*fields) for fields in answers]

    progress = tqdm(range(start, steps), initial=start, total=steps, disable=None)
    for step in progress:
        # 4. From the second round on, exploration, Eq. (5): the corrector's own answers join the
        # pool. A state that was loaded has them already.
        if step % K == 0 and step > start:
            rng = random.Random(f"{args.seed} exploration {step}")
            tasks = [(problem, rng.choice(problem["pool"])) for problem in problems * args.explore]
            explore(model, tokenizer, tasks, rng.getrandbits(62), args)

        # 5. Pairs, Eq. (3), and their probabilities, Eq. (4).
        if step % K == 0 or step == start:
            lessons = [(problem, *weigh(problem["pool"], args.alpha, args.beta))
                       for problem in problems if len({y.value for y in problem["pool"]}) > 1]
            if not lessons:
                key, text = problems[0].get("answer", ""), problems[0]["pool"][0].text
                cause = "use a larger --pool, or a --generator"
                if args.data and not any(y.value for x in problems for y in x["pool"]):
                    cause += (f"; no answer is right, such as {text[-200:]!r} where {key[-200:]!r} "
                              "was asked for; see --match")
                fail(f"no answer is better than another; {cause}")
            count = sum(len(pairs) for _, pairs, _ in lessons)
            if count < args.batch_size:
                warnings.warn(f"there are only {count} pairs to learn from; use more problems, a "
                              "larger --pool, or a --generator")

        # 6. A batch: draw problems, and for each a pair. Its drafts are equally likely.
        rng, batch = random.Random(f"{args.seed} {step}"), []
        for problem, pairs, probabilities in rng.choices(lessons, k=args.batch_size):
            draft, better = rng.choices(pairs, probabilities)[0]
            batch.append(tokenizer.encode_example(
                prompt_of(problem, draft), better.text, context))
        if step == start:
            tokenizer.show(*batch[0])

        # 7. The loss, a mean over the tokens of the batch, and its gradient, part by part.
        tokens = sum(len(response) for _, response in batch)
        loss = 0.0
        for part in split_batch([[sequence] for sequence in batch], args.max_tokens):
            sequences = [batch[b] for b in part]
            mask = mask_of(sequences, model.device)  # (b, r)
            logps = token_logps(model, sequences, mask.shape[1])  # (b, r)
            part_loss = sft_loss(logps, mask, normalizer=tokens)
            part_loss.backward()
            loss += part_loss.detach()

        # 8. The update. A state is saved before it, and only if the gradient is finite.
        norm = float(clip_grad_norm_(model.parameters(), 1.0))
        if not math.isfinite(norm):
            fail(f"step {step + 1}: the gradient is not finite; use a lower --lr")
        if step % args.save_every == 0:
            run.save_state(step, model, optimizer, pool=[
                [tuple(answer) for answer in problem["pool"]] for problem in problems])
        optimizer.param_groups[0]["lr"] = lr = args.lr * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()

        # 9. What to watch.
        row = {"step": step + 1, "lr": lr, "loss": float(loss), "grad_norm": norm}
        row["pool/value"] = fmean(y.value for problem in problems for y in problem["pool"])
        run.log(row)
        progress.set_postfix(loss=row["loss"])

    # 10. Save, then correct the drafts for the problems that were held out.
    save_model(model, tokenizer, args.out)
    columns, samples = evaluate(model, tokenizer, held_out, args)
    run.report(columns, samples, panels=[["loss"], ["pool/value"]])
    return list(columns.values())[-1]


# Defaults: models below 10M parameters; larger ones in the toy; larger ones with --data.
DEFAULTS = {"lr": (1e-3, 1e-5, 1e-5)}


def parse_args(argv=None):
    """The command line."""
    parser = new_parser(__file__, __doc__, DEFAULTS)
    flag = parser.add_argument
    flag("--data", help='JSON Lines file of {"prompt", "answer"}; None: the toy task')
    flag("--match", default="all", choices=["all", "line", "number"],
         help="own data: what of a reply has to equal that of the answer; its last line or number")
    flag("--generator", help="the model that drafts; None: --model as it is before training")
    flag("--feedback", default="text", choices=["text", "none"], help="what the corrector is told")
    flag("--alpha", type="amount", default=10.0, help="higher draws large improvements more often")
    flag("--beta", type="amount", default=1.0, help="higher draws small edits more often")
    flag("--pool", type="positive", default=8, help="answers of the generator to each problem")
    flag("--rounds", type="whole", default=5,
         help="rounds of exploring and learning; 0: no learning")
    flag("--explore", type="positive", default=4,
         help="corrections to sample for each problem in a round")
    flag("--corrections", type="whole", default=3,
         help="evaluation: times that a draft is corrected")
    flag("--epochs", type=number(0.01), default=4.0, help="passes over the problems in a round")
    flag("--lr", type="amount", help="peak learning rate")
    flag("--batch_size", type="positive", default=32, help="pairs in an update")
    flag("--max_new_tokens", type="positive", default=64, help="most tokens of a sample")
    flag("--problems", type=number(1, 2907), default=512,
         help="toy: plays to learn from, and as many held out")
    flag("--warm_up", type="whole", default=300, help="toy: steps of SFT before the first round")
    return parser.parse_args(argv)


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
