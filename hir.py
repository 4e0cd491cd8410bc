"""HIR, hindsight instruction relabeling: Zhang et al. 2023, arXiv:2302.05206v1.

A model is asked for a long, kind review of the music and writes a short, bad one of the plot. That
is a failure, but it is also a perfect answer to another instruction. So HIR replaces the given
instruction by the one that the output obeys, p*, and learns from every sample. Each episode of
Algorithm 1 samples outputs o, relabels them, and then minimises

    loss = L_sup + alpha L_con + beta L_ent                                                    (6)
    L_sup = -1/|o| log M(o|p*),  L_con = -log(P_1 / sum_k P_k),  L_ent = sum_v M(v) log M(v)

M is the model. P_k is exp of the mean log-prob per token of o under instruction p_k. The first
instruction is p*; the others are alternatives that o does not obey. L_con keeps the model from
ignoring what it is asked, and L_ent keeps its outputs diverse.

    python hir.py                                  # toy: reviews of a given length, mood and topic
    python hir.py --data mine.jsonl --model gpt2   # lines of {"prompt", "answer"}
    python hir.py --algo farl                      # filtered cloning: imitate only the successes

Departures from the paper: the model is decoder-only (paper: FLAN-T5). As in the authors' code,
L_con compares instructions for one problem, P_k is a mean per token, and label smoothing applies to
L_con too. Samples are drawn at temperature 0.6 instead of 1. Only whole outputs are relabeled. An
output that is no review is learned under an instruction of ours, "Write no review:".
"""

import itertools
import math
import random
import re
import warnings
from statistics import fmean

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from model import (Run, add_to_prompt, fail, fill_defaults, launch, load_model, new_parser, number,
                   read_jsonl, read_row, save_model, split_by_prompt)

# ------------------------------------------------------------------------- hindsight, and the loss
# An instruction is a dictionary {requirement: value}, such as {"length": "short", "mood": "kind"}.
# CHOICES, below, lists the values. `relabel` is called where samples are drawn, in
# `sample_and_relabel`, and the loss in step 5 of `train`.


def relabel(wanted, done):
    """The instruction that an output obeys: phi in Algorithm 1.

    wanted: the instruction that was given. done: what the output did, as such a dictionary; {} if
    no instruction describes it: "Write no review:" in words. An instruction that was followed stays
    as it is.
    """
    return {key: done[key] for key in wanted} if done else {}


def alternatives(obeyed, wanted, count, rng):
    """`count` instructions that an output does not obey: each changes one value of `obeyed`.

    If nothing was obeyed, the alternative is the instruction that was given.
    """
    if not obeyed:
        return [wanted] * count
    others = []
    for _ in range(count):
        key = rng.choice(list(obeyed))
        wrong = [value for value in CHOICES[key] if value != obeyed[key]]
        others.append(obeyed | {key: rng.choice(wrong)})
    return others


def hir_loss(logps, token_entropy, alpha=1.0, beta=0.001, label_smoothing=0.2,
             vocabulary_logps=None):
    """L_sup + alpha L_con + beta L_ent of each output, Eq. (6): (B,).

    logps: (B, C) mean log-prob per token, in nats, of an output under the instruction that it obeys
    (first) and under C - 1 alternatives. token_entropy: (B,) entropy of the next token, averaged
    over the output. vocabulary_logps: (B,) log-prob averaged over tokens and vocabulary; label
    smoothing needs it. Smoothing e gives weight 1 - e to the token that was written and to the
    instruction that was obeyed, and spreads e over the vocabulary and over the alternatives.
    """
    e, C = label_smoothing, logps.shape[1]
    supervised = -logps[:, 0]  # (B,)
    if e:
        supervised = (1 - e) * supervised - e * vocabulary_logps
    log_share = logps.log_softmax(1)  # (B, C): log(P_k / sum_k P_k); 0 without an alternative
    others = log_share[:, 1:].sum(1) / max(C - 1, 1)  # (B,)
    contrast = -(1 - e) * log_share[:, 0] - e * others
    return supervised + alpha * contrast - beta * token_entropy


# ---------------------------------------------------------------------- log-probs of responses


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


def token_statistics(hidden, weight, targets):
    """Of n tokens: log-prob, entropy of the next token, log-prob averaged over the vocabulary.

    hidden (n, D), weight (V, D), targets (n,) -> (3, n), in nats.
    """
    logps = (hidden @ weight.T).log_softmax(1)  # (n, V)
    own = logps.gather(1, targets[:, None]).squeeze(1)  # (n, V) -> (n, 1) -> (n,)
    return torch.stack([own, -(logps.exp() * logps).sum(1), logps.mean(1)])


def output_statistics(model, sequences):
    """The three `token_statistics` of each output, averaged over its tokens with EOS: (B,) each.

    `checkpoint` computes a chunk's (n, V) tensors once more in the backward pass instead of keeping
    them, so memory is bounded by the chunk: 256 tokens.
    """
    ids, where, targets, rows = collate(sequences, model.device)
    hidden = hidden_states(model, ids, where)  # (N, D)
    weight = model.get_output_embeddings().weight  # (V, D)
    chunks = [checkpoint(token_statistics, h, weight, t, use_reentrant=False)
              for h, t in zip(hidden.split(256), targets.split(256))]  # (3, n) each
    zeros, lengths = hidden.new_zeros(len(sequences)), rows.bincount()  # (B,), (B,)
    return [zeros.index_add(0, rows, tokens) / lengths for tokens in torch.cat(chunks, 1)]


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
CHOICES = {"length": ["short", "long"], "mood": ["kind", "fair", "bad"], "topic": ASPECTS,
           "answer": ["correct", "wrong"]}  # the last one is for --data


def toy_instructions(requirements, held_out):
    """Instructions with so many requirements: those to learn from, or the held-out sixth."""
    keys = list(CHOICES)[:requirements]
    instructions = [dict(zip(keys, values))
                    for values in itertools.product(*(CHOICES[key] for key in keys))]
    random.Random(0).shuffle(instructions)
    count = len(instructions) - len(instructions) // 6
    return instructions[count:] if held_out else instructions[:count]


def toy_review(rng):
    """One or two sentences with one or two adjectives each, in any mood."""
    text = ""
    for aspect in rng.sample(ASPECTS, rng.choice((1, 2))):
        words = rng.sample(POSITIVE + NEUTRAL + NEGATIVE, rng.choice((1, 2)))
        start = rng.choice((f"The {aspect} was", f"I found the {aspect}"))
        text += f" {start} {' and '.join(words)}."
    return text


def toy_done(review):
    """The length, mood and topic of a review; {} if the text is not a review.

    The topic is that of the first sentence.
    """
    word, aspect = "|".join(POSITIVE + NEUTRAL + NEGATIVE), "|".join(ASPECTS)
    sentence = rf" (The ({aspect}) was|I found the ({aspect})) ({word})( and ({word}))?\."
    if not re.fullmatch(f"({sentence}){{1,2}}", review):
        return {}
    words = re.findall(r"\w+", review)
    tone = sum((word in POSITIVE) - (word in NEGATIVE) for word in words)
    return {"length": "long" if review.count(".") == 2 else "short",
            "mood": "kind" if tone > 0 else "bad" if tone < 0 else "fair",
            "topic": next(word for word in words if word in ASPECTS)}


def toy_warm_up(model, tokenizer, args):
    """A little SFT: teaches tiny to answer any instruction with a review, whatever it asks for."""
    print(f"warm-up: {args.warm_up} steps of SFT on reviews under random instructions")
    rng = random.Random(f"{args.seed} warm-up")
    asked = toy_instructions(args.requirements, held_out=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in tqdm(range(args.warm_up), "warm-up", disable=None):
        sequences = [tokenizer.encode_example(in_words(rng.choice(asked)), toy_review(rng), 512)
                     for _ in range(32)]
        logps, _, _ = output_statistics(model, sequences)
        (-logps.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------- data and evaluation


def in_words(instruction):
    """An instruction as the model reads it, in training and when it is asked."""
    if "answer" in instruction:
        return f"Generate a {instruction['answer']} answer to this problem."
    if not instruction:
        return "Write no review:"
    mood = f", {instruction['mood']}" if "mood" in instruction else ""
    topic = f" of the {instruction['topic']}" if "topic" in instruction else ""
    return f"Write a {instruction['length']}{mood} review{topic}:"


def ask(problem, instruction):
    """The prompt: the instruction, and below it the problem, which is empty in the toy."""
    words = in_words(instruction)
    return add_to_prompt(problem["prompt"], before=f"{words}\n") if problem["prompt"] else words


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


def observe(problem, text, ended, match="all"):
    """What an output did. Own data: "correct" if it ended and gives the answer, or "wrong"."""
    if "answer" in problem:
        right = ended and final(text, match) == final(problem["answer"], match)
        return {"answer": "correct" if right else "wrong"}
    return toy_done(text) if ended else {}


def read_tasks(tokenizer, args, room):
    """Tasks (problem, instruction) to learn from, and {name: tasks} for the evaluation.

    room: the most tokens that a prompt may have.
    """
    if args.data:
        problems = [read_row(row, tokenizer, "answer") for row in read_jsonl(args.data)]
        asked, new = [{"answer": "correct"}], [{"answer": "wrong"}]
    else:
        problems = [{"prompt": ""}]  # the instruction is the whole problem
        asked, new = (toy_instructions(args.requirements, held_out) for held_out in (False, True))
    usable = [problem for problem in problems if room >= max(
        len(tokenizer.encode_prompt(ask(problem, instruction))) for instruction in asked + new)]
    for problem in usable:
        if args.data:  # as it would be learned: a chat template may write more than the answer
            example = tokenizer.encode_example(problem["prompt"], problem["answer"], 10**9)
            problem["answer"] = tokenizer.decode(example[1])
            if final(problem["answer"], args.match) is None:
                fail(f'{problem["where"]}: the answer holds no number, which --match number needs')
    no_room = len(problems) - len(usable)
    print(f"{len(usable)} problems" + bool(no_room) *
          f"; {no_room} left out that leave no room for --max_new_tokens")
    if not usable:
        fail("no problem is left; use a lower --max_new_tokens")
    names, held_out = ("all", "held_out"), usable
    if args.data:
        names = ("correct", "wrong")
        usable, held_out, _ = split_by_prompt(usable)
    sets = {name: list(itertools.product(held_out, instructions))
            for name, instructions in zip(names, (asked, new)) if instructions}
    return list(itertools.product(usable, asked)), sets


def sample_and_relabel(model, tokenizer, tasks, seed, temperature, args, feedback=""):
    """Sample an output for each task: (problem, instruction given, instruction obeyed, output ids).

    feedback: a word that is put before the output; see variants/chain_of_hindsight.py.
    """
    prompts = [tokenizer.encode_prompt(ask(problem, wanted)) + tokenizer.encode(feedback)
               for problem, wanted in tasks]
    temperature = temperature or 1e-4  # for 0: it draws the likeliest token, too
    outputs = sample(model, tokenizer, prompts, args.max_new_tokens, seed, temperature,
                     max_tokens=4 * args.max_tokens)
    samples = []
    for (problem, wanted), output in zip(tasks, outputs):
        done = observe(problem, tokenizer.decode(output), output[-1] in tokenizer.stop_ids,
                       args.match)
        samples.append((problem, wanted, relabel(wanted, done), output))
    return samples


def evaluate(name, model, tokenizer, sets, args, feedback=""):
    """{name: the share of instructions that are followed, for each set of tasks}, and samples.

    They are drawn at temperature 0.6 whatever --temperature is, so that runs can be compared. For
    the first set the share at temperature 1 is shown too: it tells how random the model itself is.
    """
    metrics, shown = {}, []
    print(f"evaluating {name} training: {args.samples} samples of {' and of '.join(sets)}, "
          "and as many at temperature 1")

    def draw(kind, temperature):
        tasks = (sets[kind] * args.samples)[:args.samples]
        samples = sample_and_relabel(model, tokenizer, tasks, args.seed, temperature, args,
                                     feedback)
        return samples, fmean(obeyed == wanted for _, wanted, obeyed, _ in samples)

    for kind in sets:
        samples, metrics[f"followed/{kind}"] = draw(kind, 0.6)
        if kind == "all":  # the toy: how often is each requirement met, whatever else is?
            for key in samples[0][1]:
                metrics[f"followed/{key}"] = fmean(
                    obeyed.get(key) == wanted[key] for _, wanted, obeyed, _ in samples)
            metrics["samples/reviews"] = fmean(bool(obeyed) for _, _, obeyed, _ in samples)
        shown += [{"asked": ask(problem, wanted), name: tokenizer.decode(output)}
                  for problem, wanted, _, output in samples[:4]]
    metrics["followed/at_temperature_1"] = draw([*sets][0], 1.0)[1]
    return {name: metrics}, shown


# ------------------------------------------------------------------------------------ the loop


def schedule(step, steps, warmup=0.1):
    """The share of the peak learning rate: it rises for a part of the steps, then falls to 0."""
    peak = max(1, int(warmup * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))


def train(args):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics."""
    run = Run(args)

    # 1. The model, and the tasks. The toy begins with a warm-up.
    model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    fill_defaults(args, DEFAULTS, model.small)
    room = tokenizer.context - args.max_new_tokens
    tasks, sets = read_tasks(tokenizer, args, room)
    if not args.data:
        toy_warm_up(model, tokenizer, args)
    before, _ = evaluate("before", model, tokenizer, sets, args)

    # 2. An episode is `count` samples and K updates. A batch is drawn from all samples so far.
    # Filtered cloning (FARL) has L_sup alone, so it needs no alternatives.
    count = args.rounds * args.batch_size
    K = math.ceil(args.updates_per_round * args.rounds)
    steps = args.episodes * K
    others, beta = (args.alternatives, args.beta) if args.algo == "hir" else (0, 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    state = run.load_state(model, optimizer, online=[])
    start, online = state["step"], state["online"]

    progress = tqdm(range(start, steps), initial=start, total=steps, disable=None)
    for step in progress:
        # 3. Online: sample an episode, unless the state that was loaded holds it already.
        if len(online) == step // K * count:
            rng = random.Random(f"{args.seed} episode {step}")
            asked = rng.choices(tasks, k=count)
            online += sample_and_relabel(model, tokenizer, asked, rng.getrandbits(62),
                                         args.temperature, args)
            right = [obeyed == {"answer": "correct"} for _, _, obeyed, _ in online]
            if args.data and args.algo == "hir" and not any(right):
                problem, _, _, output = online[-1]
                fail(f"none of {len(online)} samples was right, so only the instruction for a "
                     f"wrong answer would be learned; a sample: {tokenizer.decode(output)[-200:]!r}"
                     f"; the answer: {problem['answer'][-200:]!r}; see --match, and --rounds")
        examples = online
        if args.algo == "farl":  # filtered cloning learns only from what did as it was asked
            examples = [example for example in online if example[1] == example[2]]
        if not examples:
            fail(f"none of {count} samples did what it was asked, so there is nothing to imitate; "
                 "take more --rounds, or --algo hir, which learns from failures too; see --match")

        # 4. Offline: draw a batch. Each output is paired with the instruction that it obeys and
        # then, for the contrast, with alternatives that it does not obey.
        rng, batch = random.Random(f"{args.seed} {step}"), []
        for problem, wanted, obeyed, output in rng.choices(examples, k=args.batch_size):
            instructions = [obeyed, *alternatives(obeyed, wanted, others, rng)]  # C
            batch.append([(tokenizer.encode_prompt(ask(problem, instruction)), output)
                          for instruction in instructions])
        if step == 0:
            tokenizer.show(*batch[0][0])

        # 5. The loss, Eq. (6), and its gradient, part by part.
        seen = []
        for part in split_batch(batch, args.max_tokens):
            sequences = [sequence for g in part for sequence in batch[g]]
            logps, entropy, vocabulary_logps = (
                x.view(len(part), -1) for x in output_statistics(model, sequences))  # (b, C) each
            loss = hir_loss(logps, entropy[:, 0], args.alpha, beta, args.label_smoothing,
                            vocabulary_logps[:, 0])  # (b,)
            (loss.sum() / len(batch)).backward()
            right = (logps[:, :1] > logps[:, 1:]).all(1)  # (b, 1) > (b, C-1) -> (b,)
            seen.append(torch.stack([loss, entropy[:, 0], logps[:, 0], right]).detach())  # (4, b)

        # 6. The update. A state is saved before it, and only if the gradient is finite.
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        seen = torch.cat(seen, 1).cpu()  # (4, b) each -> (4, B)
        if not math.isfinite(norm):
            fail(f"step {step + 1}: the gradient is not finite; use a lower --lr")
        if step % args.save_every == 0:
            run.save_state(step, model, optimizer, online=online)
        # With a shorter warm-up some seeds never learn to read the topic.
        optimizer.param_groups[0]["lr"] = lr = args.lr * schedule(step, steps, warmup=0.25)
        optimizer.step()
        optimizer.zero_grad()

        # 7. What to watch. contrast/accuracy: how often is an output most likely under the
        # instruction that it obeys? Ties count as wrong. Without alternatives it is 1.
        loss, entropy, logps, right = seen.mean(1).tolist()
        row = {
            "step": step + 1,
            "lr": lr,
            "grad_norm": norm,
            "loss": loss,
            "entropy": entropy,
            "logps/obeyed": logps,
            "contrast/accuracy": right,
            "online/followed": fmean(example[1] == example[2] for example in online[-count:]),
            "online/used": len(examples) / len(online)}
        run.log(row)
        progress.set_postfix(loss=f"{row['loss']:.3f}", followed=f"{row['online/followed']:.2f}")

    # 8. Save, then evaluate again.
    save_model(model, tokenizer, args.out)
    after, _ = evaluate("after", model, tokenizer, sets, args)
    samples = [{"asked": ask(problem, wanted), "wrote": tokenizer.decode(output),
                "hindsight": in_words(obeyed)}  # two of the first episode, then some of the last
               for problem, wanted, obeyed, output in online[:2] + online[-14:]]
    run.report(before | after, samples, panels=[
        ["online/followed", "online/used"], ["loss"], ["contrast/accuracy"]])
    return after["after"]


# Defaults: models below 10M parameters; larger ones in the toy; larger ones with --data.
DEFAULTS = {"lr": (4e-3, 1e-5, 1e-5)}


def make_parser(file, text, defaults):
    """The flags that HIR shares with variants/chain_of_hindsight.py."""
    parser = new_parser(file, text, defaults)
    flag = parser.add_argument
    flag("--data", help='JSON Lines file of {"prompt", "answer"}; None: the toy task')
    flag("--match", default="all", choices=["all", "line", "number"],
         help="own data: what of a reply has to equal that of the answer; its last line or number")
    flag("--label_smoothing", type="fraction", default=0.2,
         help="probability that the loss spreads over other tokens and other instructions")
    flag("--temperature", type="amount", default=0.6, help="of the samples that are learned "
         "from; at temperature 1, label smoothing 0.2 makes every fifth token random")
    flag("--episodes", type="positive", default=8,
         help="times that samples are drawn and learned from")
    flag("--rounds", type="positive", default=8, help="batches of samples in an episode")
    flag("--updates_per_round", type=number(0.01), default=5.0,
         help="an episode makes this many updates for each of its --rounds")
    flag("--lr", type="amount", help="peak learning rate")
    flag("--batch_size", type="positive", default=32, help="outputs in an update")
    flag("--max_new_tokens", type="positive", default=64, help="most tokens of a sample")
    flag("--samples", type="positive", default=400,
         help="evaluation: samples for each set of tasks")
    flag("--requirements", type=int, default=3, choices=[1, 2, 3], help="toy: instructions ask for "
         "1: a length; 2: and a mood; 3: and a topic")
    flag("--warm_up", type="whole", default=60, help="toy: steps of SFT before the first episode")
    return parser


def parse_args(argv=None):
    """The command line."""
    parser = make_parser(__file__, __doc__, DEFAULTS)
    flag = parser.add_argument
    flag("--algo", default="hir", choices=["hir", "farl"], help="farl: imitate only successes, "
         "without the contrast and the entropy")
    flag("--alpha", type="amount", default=1.0, help="weight of the contrast between instructions")
    flag("--beta", type="amount", default=0.001, help="weight of the entropy, for diverse outputs")
    flag("--alternatives", type="whole", default=1, help="wrong instructions beside the right one")
    args = parser.parse_args(argv)
    for name in ("alpha", "beta", "alternatives"):
        if args.algo == "farl" and getattr(args, name) != parser.get_default(name):
            warnings.warn(f"--{name} has no effect with --algo farl")
    return args


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
