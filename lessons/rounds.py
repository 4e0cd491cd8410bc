"""Do fresh data of the new policy help more than as many data of the start?

    python -m lessons.rounds labels                # PPO; online labels. 12 minutes on one core
    python -m lessons.rounds pairs                 # DPO; pairs on policy. 6 minutes on one core

It draws no figure. What to see in the table: the second round ends with more reward, but further
from tiny; compared at one KL (labels), or with one round of as many pairs (pairs), the fresh data
gain nothing that exceeds the spread over seeds.

labels  Ziegler et al. 2019 let the human rank samples of the current policy now and then. Online: a
        reward model from 1,024 rankings of tiny's samples; 30 steps of PPO; 1,024 rankings of that
        policy's samples, from which the reward model goes on learning; 30 steps more. Offline: a
        reward model from 2,048 rankings of tiny's samples, and 60 steps. KL is from tiny.
pairs   Iterated DPO. Two rounds: 1,024 pairs of tiny's samples, judged by a reward model, and DPO;
        1,024 pairs of that policy's samples, the same judge, and DPO from that policy. One round:
        2,048 pairs of tiny's samples, and DPO. The judge is the offline one from above.

Rewards and KL are measured alike for all, on 64 samples for each of 8 prompts that no script
trains on. Means ± SD are over five seeds. A policy that went further from tiny should have more
reward, so labels also gives the online run's reward at the KL where the offline run ended: the mean
of the five steps of its log that are nearest to that KL.
"""

import argparse
import contextlib
import io
import json
import statistics
from pathlib import Path

from tqdm import tqdm

import dpo
import ppo_rlhf
import reward_model
from model import load_model, split_by_prompt
from variants import on_policy_pairs

PPO = "--beta 0.25 --steps 30 --samples 2 --reference tiny"


def run(script, out, flags, seed):
    """Run a script, unless it has ended already. Returns its folder as a text."""
    if not any((out / name).exists() for name in ("results.json", "pairs.jsonl")):
        with contextlib.redirect_stdout(io.StringIO()):
            script.main([*flags.split(), "--out", str(out), "--seed", str(seed), "--device", "cpu"])
    return str(out)


def measure(folder):
    """True reward, KL from tiny, and the share of grammatical samples of a policy."""
    (policy, tokenizer), (start, _) = load_model(folder), load_model("tiny")
    held_out = split_by_prompt([{"prompt": prompt} for prompt in dpo.toy_prompts()])[2][:8]
    asked = [tokenizer.encode_prompt(prompt) for prompt in held_out for _ in range(64)]
    responses = dpo.sample(policy, tokenizer, asked, 64, seed=0)
    texts = [tokenizer.decode(ids) for ids in responses]
    groups = [[example] for example in zip(asked, responses)]
    kl = (dpo.group_logps(policy, groups, 4096) - dpo.group_logps(start, groups, 4096)).mean()
    return (statistics.mean(map(dpo.toy_reward, texts)), float(kl),
            statistics.mean(map(dpo.toy_grammatical, texts)))


def reward_at(kl, folders):
    """Mean true reward, KL and grammar of the five logged steps whose KL is nearest."""
    rows = [json.loads(line) for folder in folders
            for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: abs(row["kl/policy_reference"] - kl))
    return [statistics.mean(row[key] for row in rows[:5]) for key in (
        "samples/true_reward", "kl/policy_reference", "samples/grammatical")]


def labels(out, seed):
    """{row of the table: (reward, KL, grammatical)}."""
    judge = run(reward_model, out / "judge0", "--rankings 1024", seed)
    first = run(ppo_rlhf, out / "online0", f"--reward_model {judge} {PPO}", seed)
    judge = run(reward_model, out / "judge1",
                f"--model {judge} --policy {first} --rankings 1024", seed + 100)
    second = run(ppo_rlhf, out / "online1", f"--model {first} --reward_model {judge} {PPO}", seed)
    judge = run(reward_model, out / "offline_judge", "--rankings 2048", seed)
    start = run(ppo_rlhf, out / "offline0", f"--reward_model {judge} {PPO}", seed)
    end = run(ppo_rlhf, out / "offline1", f"--model {start} --reward_model {judge} {PPO}", seed)
    offline = measure(end)
    return {"online, 1,024 labels, 30 steps": measure(first),
            "online, 1,024 labels more, 30 steps more": measure(second),
            "offline, 2,048 labels, 30 steps": measure(start),
            "offline, 60 steps": offline,
            "online, at the KL where offline ended": reward_at(offline[1], (first, second))}


def pairs(out, seed):
    """{row of the table: (reward, KL, grammatical)}."""
    judge = run(reward_model, out / "offline_judge", "--rankings 2048", seed)
    ask = f"--reward_model {judge} --prompts"
    train = "--samples 2 --data"
    data = run(on_policy_pairs, out / "pairs0", f"{ask} 1024", seed)
    first = run(dpo, out / "dpo0", f"{train} {data}/pairs.jsonl", seed)
    data = run(on_policy_pairs, out / "pairs1", f"{ask} 1024 --model {first}", seed + 100)
    second = run(dpo, out / "dpo1", f"{train} {data}/pairs.jsonl --model {first}", seed)
    data = run(on_policy_pairs, out / "pairs", f"{ask} 2048", seed)
    whole = run(dpo, out / "dpo", f"{train} {data}/pairs.jsonl", seed)
    twice = run(dpo, out / "dpo_twice", f"{train} {data}/pairs.jsonl --epochs 2", seed)
    return {"first round, 1,024 pairs": measure(first),
            "second round, 1,024 pairs of the new policy": measure(second),
            "one round, 2,048 pairs": measure(whole),
            "one round, 2,048 pairs, two epochs": measure(twice)}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("story", choices=["labels", "pairs"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", help="finished runs in it stay; None: runs/rounds_STORY")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.out = args.out or f"runs/rounds_{args.story}"
    table = {"tiny": [measure("tiny")]}
    for seed in tqdm(args.seeds, disable=None):
        story = labels if args.story == "labels" else pairs
        for name, numbers in story(Path(args.out) / str(seed), seed).items():
            table.setdefault(name, []).append(numbers)
    lines = ["| | true reward | KL from tiny | grammatical |", "| --- | --- | --- | --- |"]
    for name, runs in table.items():
        cells = []
        for values in zip(*runs):
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(lines))
    (Path(args.out) / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
