"""Chain of Hindsight: Liu et al. 2023, arXiv:2302.02676.

A failure and a success at the same task are put into one text, each behind a word of feedback:

    <instruction> Bad: <output that failed> Good: <output that followed the instruction>

The model learns to predict both outputs. So it learns what "Good:" means, and it is asked with that
word afterwards. HIR (hir.py, which is the parent of this file) puts the instruction that was obeyed
above a failure instead, and so does not have to wait for a success.

    python -m variants.chain_of_hindsight                 # toy: the reviews of hir.py
    python -m variants.chain_of_hindsight --data mine.jsonl --model gpt2

Departures from the paper: data are the model's own samples, as in HIR; the two outputs come in
either order; past tokens are not masked at random, and there is no pretraining term.
"""

import math
import random

import torch
from tqdm import tqdm

import hir
from hir import (ask, evaluate, hir_loss, make_parser, output_statistics, read_tasks,
                 sample_and_relabel, schedule, split_batch, toy_warm_up)
from model import (Run, add_gradients, all_gather, fail, fill_defaults, launch, load_model,
                   save_model, share)

GOOD, BAD = " Good:", " Bad:"


def chains(online):
    """(task, an output that failed, an output that followed) for each success beside a failure."""
    outputs = {}
    for problem, wanted, obeyed, output in online:
        key = str((problem, wanted))  # two answers to one prompt are two problems
        task, bad, good = outputs.setdefault(key, ((problem, wanted), [], []))
        (good if obeyed == wanted else bad).append(output)
    return [(task, bad[k % len(bad)], success) for task, bad, good in outputs.values() if bad
            for k, success in enumerate(good)]


def chain_sequences(tokenizer, task, bad, good, rng):
    """[(prompt and word, first output), (that, first output and word, second output)], in ids.

    The order is random, because a good output must also be found without a bad one before it. The
    first output keeps its EOS.
    """
    pair = [(BAD, bad), (GOOD, good)]
    (word, first), (second_word, second) = rng.sample(pair, 2)
    start = tokenizer.encode_prompt(ask(*task)) + tokenizer.encode(word)
    return [(start, first), (start + first + tokenizer.encode(second_word), second)]


def train(args):
    """Run the algorithm; leave the model and what happened in args.out; return final metrics."""
    run = Run(args)

    # 1. The model and the tasks, as in hir.py. A prompt is followed by two outputs and two words.
    model, tokenizer = load_model(args.model, device=args.device, lora_rank=args.lora_rank)
    fill_defaults(args, hir.DEFAULTS, model.small)
    room = tokenizer.context - 2 * (args.max_new_tokens + len(tokenizer.encode(GOOD)))
    tasks, sets = read_tasks(tokenizer, args, room)
    if not args.data:
        toy_warm_up(model, tokenizer, args)
    before, _ = evaluate("before", model, tokenizer, sets, args, GOOD)

    # 2. An episode is `count` samples and K updates. All samples are kept.
    count = args.rounds * args.batch_size
    K = math.ceil(args.updates_per_round * args.rounds)
    steps = args.episodes * K
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
            drawn = sample_and_relabel(model, tokenizer, asked, rng.getrandbits(62),
                                       args.temperature, args, GOOD)
            online += all_gather(drawn)[0]  # those of rank 0
        examples = chains(online)
        if not examples:
            fail(f"{count} samples hold no success beside a failure at the same task; take more "
                 "--rounds, or hir.py, which also learns from failures alone; see --match")

        # 4. Offline: draw chains, and take the supervised part of HIR's loss on their outputs.
        rng = random.Random(f"{args.seed} {step}")
        batch = [chain_sequences(tokenizer, *chain, rng)
                 for chain in rng.choices(examples, k=args.batch_size)]
        if step == 0:
            tokenizer.show(*batch[0][1])
        seen = [torch.zeros(3, 0, device=model.device)]  # a process may have no part
        for part in share(split_batch(batch, args.max_tokens)):
            sequences = [sequence for g in part for sequence in batch[g]]
            logps, entropy, vocabulary_logps = output_statistics(model, sequences)  # (2b,) each
            loss = hir_loss(logps[:, None], entropy, 0.0, 0.0, args.label_smoothing,
                            vocabulary_logps)  # (2b,)
            (loss.sum() / (2 * len(batch))).backward()
            seen.append(torch.stack([loss, entropy, logps]).detach())  # (3, 2b)

        # 5. The update. A state is saved before it, and only if the gradient is finite.
        add_gradients(model)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if not math.isfinite(norm):
            fail(f"step {step + 1}: the gradient is not finite; use a lower --lr")
        if step % args.save_every == 0:
            run.save_state(step, model, optimizer, online=online)
        optimizer.param_groups[0]["lr"] = lr = args.lr * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()

        # 6. What to watch.
        seen = torch.cat(all_gather(torch.cat(seen, 1).cpu()), 1)  # (3, 2b) each -> (3, 2B)
        row = {"step": step + 1, "lr": lr, "grad_norm": norm}
        row |= zip(("loss", "entropy", "logps/outputs"), seen.mean(1).tolist())
        followed = [obeyed == wanted for _, wanted, obeyed, _ in online[-count:]]
        row["online/followed"] = sum(followed) / count
        row["online/used"] = len(examples) / len(online)
        run.log(row)
        progress.set_postfix(loss=f"{row['loss']:.3f}", followed=f"{row['online/followed']:.2f}")

    # 7. Save, then evaluate again.
    save_model(model, tokenizer, args.out)
    after, _ = evaluate("after", model, tokenizer, sets, args, GOOD)
    samples = [{"asked": ask(*task), "bad": tokenizer.decode(bad), "good": tokenizer.decode(good)}
               for task, bad, good in examples[:8]]
    run.report(before | after, samples, panels=[
        ["online/followed", "online/used"], ["loss"], ["entropy"]])
    return after["after"]


def parse_args(argv=None):
    """The flags that HIR and Chain of Hindsight share."""
    parser = make_parser(__file__, __doc__, hir.DEFAULTS)
    return parser.parse_args(argv)


def main(argv=None):
    return launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
