"""KTO, Kahneman-Tversky optimization: Ethayarajh et al. 2024, arXiv:2402.01306v4.

KTO learns from single responses, each labelled desirable or undesirable, where DPO needs pairs. Its
reward is DPO's without beta, r = log pi(y|x)/pi_ref(y|x). A desirable response is worth more the
further r lies above a reference point z, an undesirable one the further r lies below it. Each
further nat counts less, as in prospect theory:

    loss = lambda_D sigma(beta (z - r))    if y is desirable
           lambda_U sigma(beta (r - z))    if y is undesirable                              (7), (8)

z estimates KL(pi || pi_ref): the mean r of mismatched responses, and 0 if that mean is negative.

    python -m variants.kto                           # toy: reviews, preferring friendly words
    python -m variants.kto --data mine.jsonl         # lines of {"prompt", "completion", "label"}
                                                     # or {"prompt", "chosen", "rejected"}

Departures: a mismatched response is a response to another prompt, drawn once before training so
that the reference scores it only once; the paper shifts each batch by one. Others as in dpo.py.
"""

import math
import random

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import dpo
from dpo import (evaluate, group_logps, make_parser, response_logps, schedule, split_batch,
                 toy_pairs)
from model import (Run, add_gradients, all_gather, fail, fill_defaults, launch, load_model,
                   read_jsonl, read_row, save_model, share, split_by_prompt)

# ----------------------------------------------------------------------------------- the loss


def kto_loss(policy, reference, desirable, kl, beta, lambda_desirable=1.0, lambda_undesirable=1.0):
    """KTO, Eqs. (7), (8), for single responses; returns (B,).

    policy, reference: (B,) summed log-probs. desirable: bool (B,). kl: the reference point z, a
    number without gradient.
    """
    r = policy - reference  # (B,)
    return torch.where(desirable, lambda_desirable * torch.sigmoid(beta * (kl - r)),
                       lambda_undesirable * torch.sigmoid(beta * (r - kl)))


# ---------------------------------------------------------------------------------------- data


def labels_of(row):
    """{key of a response: whether it is desirable}, for a pair or a labelled response."""
    if "chosen" in row:
        return {"chosen": True, "rejected": False}
    if not isinstance(row.get("label"), bool):
        fail(f'{row["where"]}: "label" has to be true or false')
    return {"completion": row["label"]}


def encode_examples(tokenizer, rows, args):
    """Examples {"prompt", "response", "desirable", "sequence": (prompt ids, response ids)}.

    Each response of a pair becomes an example of its own: the chosen one is desirable.
    """
    examples = []
    no_room = 0
    for row in rows:
        labels = labels_of(row)
        prompt, texts = row["prompt"], [row[key] for key in labels]
        for text, desirable in zip(texts, labels.values()):
            sequence = tokenizer.encode_example(prompt, text, args.max_length, args.max_new_tokens)
            if sequence is None:
                no_room += 1
            elif texts.count(text) == 1:  # a pair of equal ones would teach nothing
                examples.append({"prompt": prompt, "response": text, "desirable": desirable,
                                 "sequence": sequence})
    found = f"{len(examples)} responses of {len(rows)} rows" + bool(no_room) * (
        f"; {no_room} left out without room for --max_new_tokens")
    print(found)
    return examples or fail(f"no response is left: {found}; those of equal pairs teach nothing")


def add_mismatched(tokenizer, examples, pool, args):
    """For each example [its sequence, its prompt with the response to another prompt]."""
    rng = random.Random(args.seed)
    groups = []
    for example in examples:
        other = example
        while other["prompt"] == example["prompt"]:
            other = rng.choice(pool)
        mismatched = tokenizer.encode_example(example["prompt"], other["response"], args.max_length)
        groups.append([example["sequence"], mismatched])
    return groups


# ------------------------------------------------------------------------------------ the loop


def train(args):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics."""
    run = Run(args)

    # 1. The policy. Before its first step it is also the reference.
    model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    fill_defaults(args, DEFAULTS, model.small)

    # 2. Labelled responses. All responses to some prompts are held out; they may still serve as
    # mismatched responses, from which nothing is learned.
    if args.data:
        rows = [read_row(row, tokenizer, *labels_of(row)) for row in read_jsonl(args.data)]
    else:
        rows = toy_pairs(model, tokenizer, args.pairs, args.seed, args.max_tokens)
        rows = all_gather(rows)[0]  # those of process 0
    pool = encode_examples(tokenizer, rows, args)
    examples, held_out, prompts = split_by_prompt(pool)
    groups = add_mismatched(tokenizer, examples, pool, args)
    desirable = torch.tensor([example["desirable"] for example in examples])
    tokenizer.show(*groups[0][0])

    # 3. Batches: each epoch visits all examples in a new order.
    steps = args.steps or args.epochs * math.ceil(len(groups) / args.batch_size)
    batches = []
    while len(batches) < steps:
        order = random.Random(f"{args.seed} {len(batches)}").sample(range(len(groups)), len(groups))
        batches += [order[i:i + args.batch_size] for i in range(0, len(order), args.batch_size)]

    # 4. The reference's log-probs, computed while the policy still is the reference, in the batches
    # of the first epoch, own and mismatched ones separately, as in steps 5 and 6.
    reference_logps = torch.zeros(len(groups), 2)
    for batch in batches[:min(steps, math.ceil(len(groups) / args.batch_size))]:
        for k in (0, 1):
            own = [[groups[i][k]] for i in batch]
            reference_logps[batch, k] = group_logps(model, own, args.max_tokens)[:, 0]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  eps=args.adam_eps, fused=True)
    start = run.load_state(model, optimizer)["step"]

    progress = tqdm(range(start, steps), initial=start, total=steps, disable=None)
    for step in progress:
        # 5. The reference point: how far the policy has moved on mismatched responses.
        batch, seen = batches[step], [torch.zeros(4, 0, device=model.device)]
        mismatched = group_logps(model, [[groups[i][1]] for i in batch], args.max_tokens)  # (B, 1)
        kl = (mismatched[:, 0] - reference_logps[batch, 1]).mean().clamp(min=0)  # (B,) -> ()

        # 6. The loss and its gradient, part by part.
        for part in share(split_batch([[groups[i][0]] for i in batch], args.max_tokens)):
            part = [batch[g] for g in part]
            logps, _ = response_logps(model, [groups[i][0] for i in part])  # (b,)
            reference = reference_logps[part, 0].to(model.device)  # (b,)
            good = desirable[part].to(model.device)  # (b,)
            loss = kto_loss(logps, reference, good, kl, args.beta, args.lambda_desirable,
                            args.lambda_undesirable)
            (loss.sum() / len(batch)).backward()
            rewards = args.beta * (logps - reference)
            seen.append(torch.stack([loss, logps, rewards, good]).detach())  # (4, b)

        # 7. The update. A state is saved before it, and only if the gradient is finite.
        add_gradients(model)
        norm = float(clip_grad_norm_(model.parameters(), 1.0))
        seen = torch.cat(all_gather(torch.cat(seen, 1).cpu()), 1)  # (4, b) each -> (4, B)
        loss, logps, rewards, good = seen  # (B,) each
        if not math.isfinite(norm):
            fail(f"step {step + 1}: the gradient is not finite; use a lower --lr")
        if step % args.save_every == 0:
            run.save_state(step, model, optimizer)
        optimizer.param_groups[0]["lr"] = lr = args.lr * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()

        # 8. What to watch. A batch may hold desirable or undesirable responses only.
        row = {
            "step": step + 1,
            "lr": lr,
            "grad_norm": norm,
            "loss": float(loss.mean()),
            "kl/mismatched": float(kl)}
        for side, mask in (("chosen", good == 1), ("rejected", good == 0)):
            if mask.any():
                row[f"logps/{side}"] = float(logps[mask].mean())
                row[f"rewards/{side}"] = float(rewards[mask].mean())
        run.log(row)
        progress.set_postfix(loss=row["loss"])

    # 9. Save, then compare with the reference. The test pairs are a desirable and an undesirable
    # response each, which need not have the same prompt.
    save_model(model, tokenizer, args.out)
    reference, _ = load_model(args.model, device=args.device)
    good, bad = ([example["sequence"] for example in held_out if example["desirable"] == label]
                 for label in (True, False))
    pairs = list(zip(good, bad)) or [(good + bad)[:1] * 2]  # evaluate needs at least one pair
    test = [{"pair": pair, "prompt": pair[0][0]} for pair in pairs]
    columns, samples = evaluate(model, reference, tokenizer, test, prompts[:8], args)
    if not good or not bad:  # that pair was one response twice
        for column in columns.values():
            for key in [key for key in column if key.startswith(("rewards/", "pairs/"))]:
                del column[key]
    run.report(columns, samples, panels=[
        ["loss"],
        ["rewards/chosen", "rewards/rejected"],
        ["logps/chosen", "logps/rejected"]])
    return columns["after"]


# Defaults: models below 10M parameters; larger ones in the toy; larger ones with --data.
DEFAULTS = dpo.DEFAULTS | {"lr": (5e-4, 1e-5, 1e-5), "batch_size": (32, 32, 32)}


def parse_args(argv=None):
    """The flags that DPO and KTO share, and those that only KTO has."""
    parser = make_parser(__file__, __doc__, DEFAULTS,
                         '{"prompt", "completion", "label"} or of pairs')
    flag = parser.add_argument
    flag("--beta", type="amount", help="price of a nat of KL from the reference")
    flag("--lambda_desirable", type="amount", default=1.0, help="weight of desirable responses")
    flag("--lambda_undesirable", type="amount", default=1.0, help="weight of undesirable responses")
    args = parser.parse_args(argv)
    if args.beta == 0:
        fail("--beta 0: the loss has no gradient then; give a higher one")
    return args


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
