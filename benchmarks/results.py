"""Measure what the README says: run its commands, write its tables, numbers and figures into it.

    python benchmarks/results.py --list            # what there is to run, and how long it takes
    python benchmarks/results.py                   # all of it; can be resumed
    python benchmarks/results.py --only dpo ppo    # these runs alone, then the README

Commands run one after another, as a reader would run them, for three seeds where `seeds` below says
so, each in a process of its own whose time and peak memory are measured. A run is kept in --out and
run again only if its command, its script or model.py has changed (comments and docstrings aside).
The benchmarks of time measure against peers: pip install trl==1.16.0 liger-kernel.

Three kinds of things in README.md are written here, and so need no typing:
    blocks      between <!-- results: NAME --> and <!-- end -->: tables and terminal output
    sentences   SENTENCES below quotes them with {} for each number; one that is not in the README
                any more, or not any more in those words, is an error
    figures     benchmarks/*.png, copied from a run or drawn by a benchmark
What lacks a run is left as it stands, and named at the end.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
THREE = (0, 1, 2)
# name: (command, seeds, seconds that it takes). RUNS in a command is the folder of all runs.
RUNS = {
    "dpo": ("dpo.py", THREE, 25),
    "cdpo": ("dpo.py --label_smoothing 0.1", THREE, 25),
    "ipo": ("dpo.py --loss ipo", THREE, 25),
    "ipo_mean": ("dpo.py --loss ipo_mean", THREE, 25),
    "rdpo": ("dpo.py --loss rdpo", THREE, 25),
    "kto": ("dpo.py --loss kto", THREE, 30),
    "dpo_lora": ("dpo.py --lora_rank 8", THREE, 25),
    "dpo_bad": ("dpo.py --beta 0.05 --lr 2e-3", (0,), 35),
    "reward_model": ("reward_model.py", THREE, 30),
    "best_of_k": ("reward_model.py --loss best_of_k", THREE, 30),
    "reward_model_bad": ("reward_model.py --rankings 128 --epochs 30", (0,), 40),
    "ppo": ("ppo_rlhf.py", THREE, 28),
    "best_of_4": ("ppo_rlhf.py --algo best_of_n", THREE, 10),
    "best_of_16": ("ppo_rlhf.py --algo best_of_n --n 16", THREE, 15),
    "raft": ("ppo_rlhf.py --algo raft", THREE, 17),
    "ppo_learned": ("ppo_rlhf.py --reward_model RUNS/reward_model/0", (0,), 35),
    "ppo_relabel": ("ppo_rlhf.py --reward_model RUNS/reward_model/0 --relabel_every 10", (0,), 60),
    "pipeline_sft": ("sft.py --task sentiment", (0,), 9),
    "pipeline_rm": ("reward_model.py --model RUNS/pipeline_sft/0", (0,), 30),
    "pipeline_ppo": ("ppo_rlhf.py --model RUNS/pipeline_sft/0 --reward_model RUNS/pipeline_rm/0 "
                     "--base tiny", (0,), 35),
    "reward_hacking": ("benchmarks/reward_hacking.py", (0,), 200),
    "lesson": ("simpo.py --lesson", THREE, 60),
    "simpo": ("simpo.py", (0,), 17),
    "simpo_bad": ("simpo.py --epochs 8", (0,), 60),
    "objectives": ("benchmarks/objectives.py", (), 720),
    "hir": ("hir.py", THREE, 37),
    "farl": ("hir.py --algo farl", THREE, 25),
    "hir_bad": ("hir.py --temperature 1", (0,), 40),
    "hindsight": ("benchmarks/hindsight.py", (), 1300),
    "self_correct": ("self_correct.py", THREE, 52),
    "self_correct_none": ("self_correct.py --feedback none", THREE, 50),
    "self_correct_bad": ("self_correct.py --alpha 1", (0,), 52),
    "sft": ("sft.py", THREE, 10),
    "sft_sentiment": ("sft.py --task sentiment", THREE, 9),
    "sft_bad": ("sft.py --lr 0.1", (0,), 10),
    "tiny": ("sft.py --task pretrain", (0,), 185),
    "frontier": ("benchmarks/frontier.py", (), 2000),
    "gather": ("benchmarks/gather.py", (), 400),  # these three: on a machine that does nothing else
    "dpo_step": ("benchmarks/dpo_step.py", (), 1500),
    "rollout": ("benchmarks/rollout.py", (), 500),
}
PRINTED = {"gather": ("trl", "liger_kernel"), "dpo_step": ("trl", "liger_kernel"), "rollout": ()}
SENTENCES = [  # words of the README, and what stands at each {}: (run, key, digits), of seed 0
    ("The toy gains little from them: true reward {}, not {}",
     [("dpo_lora", "samples/true_reward", 2), ("dpo", "samples/true_reward", 2)]),
    ("hears only which response is the best, has an accuracy of {} and a rank correlation of {}",
     [("best_of_k", "pairs/accuracy", 3), ("best_of_k", "true_reward/rank_correlation", 3)]),
    ("reaches a true reward of {} at a KL of {}, and with relabeling {} at {}",
     [("ppo_learned", "samples/true_reward", 2), ("ppo_learned", "kl/policy_reference", 1),
      ("ppo_relabel", "samples/true_reward", 2), ("ppo_relabel", "kl/policy_reference", 1)]),
    ("`logps/chosen` went from {} to {} while the true reward of samples rose from {} to {}",
     [("dpo", "before logps/chosen", 1), ("dpo", "logps/chosen", 1),
      ("dpo", "before samples/true_reward", 2), ("dpo", "samples/true_reward", 2)]),
    ("in `python dpo.py` a share of {} of the tokens", [("dpo", "log padding", 3)]),
    ("`followed/all`, from {} to {}",
     [("hir", "before followed/all", 2), ("hir", "followed/all", 2)]),
    ("`summary/recall` from {} to {}, beside lead-1 and lead-3",
     [("sft", "before summary/recall", 2), ("sft", "summary/recall", 2)]),
    ("ends with a share of {} of its instructions followed, and {} of its samples are reviews",
     [("hir_bad", "followed/all", 2), ("hir_bad", "samples/reviews", 2)]),
    ("`python self_correct.py --alpha 1` has {}, {}, {} of the answers perfect after 1, 2, 3 "
     "corrections under the stop rule, but damages {}, {}, {} of the perfect ones",
     [("self_correct_bad", f"{i} {key}", 2) for key in ("stop_rule/perfect", "damaged")
      for i in (1, 2, 3)]),
]


def fingerprint(command):
    """Hash of a command and of what it runs on: code without comments and docstrings, tiny/."""
    script = ROOT / command.split()[0]
    files = [script, ROOT / "model.py"]
    if script.parent != ROOT:  # a benchmark may use any of the scripts
        files = [script, *sorted(ROOT.glob("*.py"))]
    code = [command, hashlib.sha256((ROOT / "tiny" / "model.safetensors").read_bytes()).hexdigest()]
    code += [fingerprint(RUNS[name][0]) for name in re.findall(r"RUNS/(\w+)", command)]
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) \
                    and ast.get_docstring(node) is not None:
                node.body.pop(0)
        code.append(ast.dump(tree))
    return hashlib.sha256("\n".join(code).encode()).hexdigest()


def is_done(folder, command):
    """Whether a run of this very command and code has ended there."""
    path = folder / "done.json"
    return path.is_file() and json.loads(path.read_text())["code"] == fingerprint(command)


def run(name, seed, runs):
    """Run one command in a process of its own; keep its output, time and peak memory."""
    command = RUNS[name][0]
    folder = runs / name / ("all" if seed is None else str(seed))
    begun, code = folder / "begun.txt", fingerprint(command)
    if begun.exists() and begun.read_text() != code:
        # A benchmark would take what older code has left for its own. It may be an hour's work.
        aside = folder.with_name(f"{folder.name} of {time.strftime('%Y-%m-%d %H.%M.%S')}")
        print(f"\n{folder} was made by other code; it is now {aside}")
        folder.rename(aside)
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(code)
    words = command.replace("RUNS", str(runs)).split()
    words += [] if name in PRINTED else ["--out", str(folder)]
    words += [] if seed is None else ["--seed", str(seed)]
    began = time.perf_counter()
    with open(folder / "stdout.txt", "w") as out, open(folder / "stderr.txt", "w") as err:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=out, stderr=err)
        try:
            _, status, usage = os.wait4(process.pid, 0)  # of this child and its own children
        except KeyboardInterrupt:
            process.terminate()
            raise
    if status:
        raise SystemExit(f"python {' '.join(words)} failed; see {folder / 'stderr.txt'}")
    seconds, mib = time.perf_counter() - began, usage.ru_maxrss / 1024
    (folder / "done.json").write_text(json.dumps(
        {"code": code, "seconds": seconds, "mib": mib}) + "\n")


# ------------------------------------------------------------------------- what the runs have left


class Missing(Exception):
    """A run that a block or a sentence needs has not been made."""


def read(name, seed=0):
    """(columns of results.json, done.json, folder) of a run."""
    folder = OUT / name / str(seed)
    command = RUNS[name][0]
    if not is_done(folder, command):
        raise Missing(f"{name} {seed}")
    path = folder / "results.json"
    return (json.loads(path.read_text()) if path.exists() else {},
            json.loads((folder / "done.json").read_text()), folder)


def number(name, key, seed=0):
    """A number of the last column of a run's results, or of another that key begins with."""
    columns, _, folder = read(name, seed)
    first, _, rest = key.partition(" ")
    if first == "log":  # the mean of a number that every step logs
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return statistics.mean(json.loads(line)[rest] for line in lines)
    if first in columns:
        return columns[first].get(rest)
    return list(columns.values())[-1].get(key)


def spread_of(values, digits=2):
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def spread(name, key, digits=2):
    """Mean ± SD over the seeds of a run."""
    values = [number(name, key, seed) for seed in RUNS[name][1]]
    if None in values:
        return ""
    return spread_of(values, digits)


def change(name, key, digits=2):
    """first -> mean ± SD over seeds."""
    before = statistics.mean(number(name, f"before {key}", seed) for seed in RUNS[name][1])
    return f"{before:.{digits}f} → {spread(name, key, digits)}"


def markdown(head, rows):
    return "\n".join([f"| {' | '.join(head)} |", "| --- " * len(head) + "|",
                      *(f"| {' | '.join(row)} |" for row in rows)])


def command(name):
    return f"`python {RUNS[name][0].replace('RUNS', 'runs')}`"


def terminal(name, first, last=None):
    """What a run printed, from the line that has first in it to the one before last."""
    _, _, folder = read(name)
    lines = (folder / "stdout.txt").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next((i for i, line in enumerate(lines) if i > start and last and last in line), None)
    return "```\n" + "\n".join(lines[start:end]).strip("\n") + "\n```"


def samples(name, count):
    """The first different texts of a run's last column, for the eye."""
    _, _, folder = read(name)
    lines = (folder / "samples.txt").read_text(encoding="utf-8").splitlines()
    texts = [line.split(":", 1)[1].strip() for line in lines if line.startswith("after ")]
    return "```\n" + "\n".join(text[:150] for text in list(dict.fromkeys(texts))[:count]) + "\n```"


# ------------------------------------------------------------------------------------- the blocks


def block_summary():
    what = [
        ("sft", "summary/quality"), ("sft_sentiment", "review/true_reward"),
        ("reward_model", "pairs/accuracy"), ("ppo", "samples/true_reward"),
        ("ppo", "J/share_of_the_way"), ("raft", "samples/true_reward"),
        ("best_of_4", "samples/true_reward"), ("dpo", "samples/true_reward"),
        ("dpo", "J/share_of_the_way"), ("kto", "samples/true_reward"),
        ("dpo_lora", "samples/true_reward"), ("hir", "followed/all"), ("farl", "followed/all"),
        ("self_correct", "perfect")]
    rows, seen = [], set()
    for name, key in what:
        first = key not in ("J/share_of_the_way", "pairs/accuracy", "perfect")
        value = change(name, key) if first else spread(name, key)
        if name == "self_correct":
            value = (f"{statistics.mean(read(name, s)[0]['draft']['perfect'] for s in THREE):.2f}"
                     f" → {spread_of([read(name, s)[0]['1']['perfect'] for s in THREE])}")
        done = [read(name, seed)[1] for seed in THREE]
        cost = ["", ""] if name in seen else [
            f"{statistics.mean(d['seconds'] for d in done):.0f} s",
            f"{max(d['mib'] for d in done):.0f} MiB"]
        label = f"`{key}`" + " after 1 correction" * (name == "self_correct")
        rows.append(["" if name in seen else command(name), label, value, *cost])
        seen.add(name)
    rows.append([command("simpo"), "`samples/quality`", lesson_change(), *cost_of("simpo")])
    rows.append([command("tiny") + " makes `tiny/`", "", "", cost_of("tiny")[0], ""])
    return markdown(["command", "number", "before → after", "time", "peak memory"], rows)


def cost_of(name):
    _, done, _ = read(name)
    return f"{done['seconds']:.0f} s", f"{done['mib']:.0f} MiB"


def lesson_of(variant, key):
    return [read("lesson", seed)[0][variant][f"samples/{key}" if key != "KL"
                                             else "kl/policy_reference"] for seed in THREE]


def lesson_change():
    return (f"{statistics.mean(lesson_of('before', 'quality')):.2f} → "
            f"{spread_of(lesson_of('simpo', 'quality'))}")


def block_lesson():
    names = {"before": "before", "simpo": "`python simpo.py`",
             "no margin": "`--gamma_beta_ratio 0`", "sums": "`--loss cpo --lam 0 --beta 2`",
             "sums b=.1": "`--loss cpo --lam 0`"}
    keys = ("quality", "recall", "made_up", "words", "grammatical", "KL")
    return markdown(["", *keys], [
        [label, *(", ".join(f"{x:.2f}" for x in lesson_of(name, key)) for key in keys)]
        for name, label in names.items()])


def block_first():
    return terminal("dpo", " preferences, ", "metrics.jsonl")


def block_pipeline():
    return terminal("pipeline_ppo", " base ", "prompt:")


def block_reward_model():
    keys = ("pairs/accuracy", "pairs/ceiling", "true_reward/rank_correlation", "calibration/error")
    return markdown(["`--seed`", "held-out accuracy", "Bayes ceiling",
                     "rank correlation with the true reward", "calibration error"],
                    [[str(seed), *(f"{number('reward_model', key, seed):.3f}" for key in keys)]
                     for seed in THREE])


def row_of_j(name, label):
    """True reward, KL, J, share of the way and grammar, over seeds."""
    share = spread(name, "J/share_of_the_way")
    if not share:
        few = min(number(name, "J/effective_samples", seed) for seed in RUNS[name][1])
        share = f"not quoted ({few:.0f} effective samples)"
    return [label, change(name, "samples/true_reward"), spread(name, "kl/policy_reference"),
            spread(name, "J/policy"), share, spread(name, "samples/grammatical", 3)]


J_HEAD = ["true reward", "KL", "J", "share of the way", "grammatical"]


def block_ppo():
    return markdown(["command", *J_HEAD], [row_of_j(name, command(name)) for name in (
        "ppo", "best_of_4", "best_of_16", "raft")])


def block_dpo():
    return markdown(["command", *J_HEAD, "accuracy", "tokens"], [
        [*row_of_j(name, command(name)), spread(name, "rewards/accuracy"),
         spread(name, "samples/tokens", 1)]
        for name in ("dpo", "cdpo", "ipo", "ipo_mean", "rdpo", "kto")])


def block_dpo_bad():
    return samples("dpo_bad", 3)


def block_wrong():
    what = [
        ("sft_bad", "sft", ("loss", "summary/quality", "summary/made_up")),
        ("reward_model_bad", "reward_model", ("pairs/loss", "pairs/accuracy", "calibration/error")),
        ("dpo_bad", "dpo", ("samples/true_reward", "samples/grammatical", "samples/tokens",
                            "kl/policy_reference", "J/effective_samples")),
        ("simpo_bad", "simpo", ("samples/quality", "samples/grammatical", "kl/policy_reference",
                                "rewards/accuracy")),
        ("hir_bad", "hir", ("followed/all", "samples/reviews"))]
    rows = [[command(bad), "<br>".join(
        f"`{key}` {number(bad, key):.2f}, not {number(good, key):.2f}" for key in keys),
        WHY[bad]] for bad, good, keys in what]
    old, new = (read(name)[0]["3"] for name in ("self_correct", "self_correct_bad"))
    rows.append([command("self_correct_bad"), "<br>".join(
        f"`{key}` {new[key]:.2f}, not {old[key]:.2f}" for key in ("damaged", "perfect")),
        WHY["self_correct_bad"]])
    return markdown(["command", "how it looks", "why"], rows)


WHY = {
    "sft_bad": "a learning rate a hundred times too high: it learns what all answers share, and "
               "nothing of the post",
    "reward_model_bad": "512 responses, thirty times over: it knows them by heart, and is sure of "
                        "itself where it errs",
    "dpo_bad": "beta too low and steps too long: it left what the pairs say anything about",
    "simpo_bad": "eight passes, and no reference to hold it: the margin grows on pairs that it "
                 "ranks rightly anyway",
    "hir_bad": "label smoothing asks for random tokens, and the next episode samples them",
    "self_correct_bad": "small improvements are drawn nearly as often as large ones, so it keeps "
                        "rewriting, also what was perfect",
}


def block_self_correct():
    rows = []
    for name, label in (("self_correct", "text"), ("self_correct_none", "none")):
        for seed in THREE:
            columns, _, _ = read(name, seed)
            get = lambda key, names=columns: ", ".join(
                f"{column[key]:.2f}" for column in names.values() if key in column)
            last = columns["3"]
            rows.append([f"{label}, {seed}", get("value"), get("stop_rule/perfect"),
                         get("resampled/perfect"), f"{last['similarity/own_draft']:.2f}, "
                         f"{last['similarity/other_draft']:.2f}", get("damaged")])
    return markdown(["feedback, seed", "value: draft, 1, 2, 3", "perfect, stop rule",
                     "perfect, resampled", "similarity: own, other draft", "damaged"], rows)


def block_sft():
    keys = {"loss": "`loss`, nats a token", "summary/recall": "`summary/recall`",
            "summary/made_up": "`summary/made_up`", "summary/quality": "`summary/quality`"}
    rows = [[label, f"{statistics.mean(number('sft', f'before {key}', s) for s in THREE):.3f}",
             spread("sft", key, 3)] for key, label in keys.items()]
    for key, label in (("of lead-1", "the same of the post's first sentence (lead-1)"),
                       ("of lead-3", "of its first three (lead-3)")):
        rows.append([label, spread("sft", f"summary/quality {key}", 3), ""])
    rows.append(["`review/true_reward` with `--task sentiment`", *change(
        "sft_sentiment", "review/true_reward").split(" → ")])
    return markdown(["", "before", "after"], rows)


def table_of(name):
    """The table that a benchmark left."""
    folder = OUT / name / "all"
    if not is_done(folder, RUNS[name][0]):
        raise Missing(name)
    return (folder / "table.md").read_text().strip()


def lines_of(name):
    """What a benchmark of time printed: its setting in the first line, and its table."""
    folder = OUT / name / "all"
    if not is_done(folder, RUNS[name][0]):
        raise Missing(name)
    text = (folder / "stdout.txt").read_text(encoding="utf-8")
    setting = next(line for line in text.splitlines() if line.startswith("torch "))
    table = text[text.index("\n\n"):].partition("\n\ntarget")[0].strip("\n")
    return f"```\n{setting}\n\n{table}\n```"


def block_gather():
    return lines_of("gather")


def block_dpo_step():
    return lines_of("dpo_step")


def block_rollout():
    return lines_of("rollout")


def block_frontier():
    return table_of("frontier")


def block_objectives():
    return table_of("objectives")


def block_hindsight():
    return table_of("hindsight")


FIGURES = {"dpo.png": ("dpo", "curves.png"), "reward_model.png": ("reward_model", "curves.png"),
           "ppo.png": ("ppo", "curves.png"), "sft.png": ("sft", "curves.png"),
           "self_correct.png": ("self_correct", "curves.png"), "hir.png": ("hir", "curves.png"),
           "simpo.png": ("simpo", "curves.png"), "simpo_lesson.png": ("lesson", "lesson.png")}


# ------------------------------------------------------------------------------------- the README


def fill_sentence(text, words, numbers):
    """text with the numbers in the place of the {} of words; spaces may be line breaks."""
    pattern = r"\s+".join(re.escape(word).replace(r"\{\}", r"(-?[\d.]*\d)")
                          for word in words.split())
    found = re.search(pattern, text)
    if not found:
        raise SystemExit(f"README.md does not say: {words}")
    for i in reversed(range(len(numbers))):
        start, end = found.span(i + 1)
        text = text[:start] + numbers[i] + text[end:]
    return text


def fill_block(text, name, content):
    """text with content between the marks of a block."""
    pattern = rf"(<!-- results: {name} -->\n).*?(<!-- end -->)"
    text, count = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.S)
    if count != 1:
        raise SystemExit(f"README.md has {count} blocks of the name {name}, and needs one")
    return text


def write_readme(path):
    """Fill in whatever there are runs for; returns the names of those that are missing."""
    text, missing = path.read_text(encoding="utf-8"), []
    for name, block in globals().items():
        if name.startswith("block_"):
            try:
                text = fill_block(text, name.removeprefix("block_"), block())
            except Missing as lacking:
                missing.append(str(lacking))
    for words, sources in SENTENCES:
        try:
            text = fill_sentence(text, words, [
                f"{number(name, key):.{digits}f}" for name, key, digits in sources])
        except Missing as lacking:
            missing.append(str(lacking))
    for figure, (name, source) in FIGURES.items():
        try:
            shutil.copy(read(name)[2] / source, ROOT / "benchmarks" / figure)
        except Missing as lacking:
            missing.append(str(lacking))
    path.write_text(text, encoding="utf-8")
    return sorted(set(missing))


def main():
    global OUT
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="RUN", default=None, choices=RUNS,
                        help="run these alone (default: all)")
    parser.add_argument("--list", action="store_true", help="show what there is to run, and stop")
    parser.add_argument("--out", default="runs/results", help="finished runs in it stay")
    args = parser.parse_args()
    OUT = Path(args.out).resolve()
    todo = [(name, seed) for name in args.only or RUNS for seed in RUNS[name][1] or (None,)
            if not is_done(OUT / name / ("all" if seed is None else str(seed)), RUNS[name][0])]
    for name in dict.fromkeys(name for name, _ in todo if name in PRINTED):
        if lacking := [p for p in PRINTED[name] if importlib.util.find_spec(p) is None]:
            print(f"{name} is left out: its peers {' and '.join(lacking)} are not installed")
            todo = [run for run in todo if run[0] != name]
    minutes = sum(RUNS[name][2] for name, _ in todo) / 60
    if args.list:
        for name in args.only or RUNS:
            seeds = [seed for other, seed in todo if other == name]
            print(f"{name:18} {RUNS[name][2]:5} s x {len(seeds)}   python {RUNS[name][0]}")
    print(f"{len(todo)} runs to do, about {minutes:.0f} minutes on two cores; each is kept in "
          f"{OUT.relative_to(ROOT) if OUT.is_relative_to(ROOT) else OUT}")
    if args.list:
        return
    with tqdm(total=round(60 * minutes), unit="s", disable=None) as progress:
        for name, seed in todo:
            progress.set_description(f"{name} {'' if seed is None else seed}")
            run(name, seed, OUT)
            progress.update(RUNS[name][2])
    missing = write_readme(ROOT / "README.md")
    print("README.md is written." + f" Left as it was, for want of: {', '.join(missing)}"
          * bool(missing))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the runs that ended are kept: run it again to go on") from None
