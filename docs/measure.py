"""Measure what README.md and docs/ say: run the commands, and write their tables and figures.

    python docs/measure.py --list                  # what there is to run, and how long it takes
    python docs/measure.py --jobs 2                # all of it, two commands at a time
    python docs/measure.py --only dpo ppo          # these runs alone, then the pages
    python docs/measure.py --pages                 # no run at all: the pages alone

Each command runs as a reader would run it, in a process of its own, whose CPU time and peak memory
are kept: 40 seeds for dpo.py, eight for the other default runs (five for sft.py), and three for
most others. With --jobs above 1 every process has one thread. A finished run stays in --out. It is
made again only if its command or its code has changed, comments and docstrings aside. The
benchmarks of time run alone and measure against peers: pip install trl==1.16.0 liger-kernel. What
benchmarks/gpu.sh has measured on a GPU is taken from runs/gpu/gpu.json.

Five kinds of things are written here and need no typing:
    blocks      between <!-- results: NAME --> and <!-- end -->: tables and terminal output
    sentences   SENTENCES below quotes them, with {} for each number
    figures     docs/figures/*.png, drawn from the log of a run, or by a lesson
    code        between <!-- code: FILE NAME --> and <!-- end -->: see `code_of`
    seconds     of a command, as in `python sft.py` (15 s)
A block, or a row of a table, whose runs are missing stays as it is, and the runs are named.
"""

import argparse
import ast
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "figures"
ONE, TWO, THREE, FIVE, EIGHT, FORTY = (range(n) for n in (1, 2, 3, 5, 8, 40))
VERIFIED = "-m variants.grpo --toy instructions --beta 0 --lr 1e-3"
ALL = ("all",)  # a lesson or benchmark that knows its own seeds
# name: (command, seeds, CPU seconds of one run). RUNS in a command is the folder of all runs.
RUNS = {
    "sft": ("sft.py", FIVE, 11),
    "sft_bad": ("sft.py --lr 0.1", ONE, 10),
    "filtering": ("-m lessons.filtering", ALL, 180),
    "self_instruct": ("-m lessons.self_instruct", ALL, 300),
    "reward_model": ("reward_model.py", EIGHT, 42),
    "best_of_k": ("reward_model.py --loss best_of_k", THREE, 40),
    "reward_model_bad": ("reward_model.py --rankings 128 --epochs 30", ONE, 22),
    "ppo": ("ppo_rlhf.py", EIGHT, 49),
    "raft": ("-m variants.raft", THREE, 24),
    "best_of_4": ("-m variants.raft --best_of_n", THREE, 9),
    "best_of_16": ("-m variants.raft --best_of_n --n 16", THREE, 20),
    "pipeline_rm": ("reward_model.py --model RUNS/sft/0", ONE, 39),
    "pipeline_ppo": ("ppo_rlhf.py --model RUNS/sft/0 --reward_model RUNS/pipeline_rm/0",
                     ONE, 42),
    "reward_hacking": ("-m lessons.reward_hacking", ALL, 300),
    "overoptimisation": ("-m lessons.overoptimisation", ALL, 300),
    "online": ("-m lessons.rounds labels", ALL, 740),
    "vanishing": ("-m lessons.vanishing", ALL, 360),
    "alignment_tax": ("-m lessons.alignment_tax", ALL, 280),
    "clip": ("-m lessons.clip", ALL, 130),
    "ppo_lam": ("ppo_rlhf.py --lam 0.95", FIVE, 41),
    "rloo": ("-m variants.grpo --preset rloo", FIVE, 29),
    "rloo_long": ("-m variants.grpo --preset rloo --steps 57", FIVE, 37),
    "grpo": ("-m variants.grpo", FIVE, 29),
    "grpo_long": ("-m variants.grpo --steps 57", FIVE, 36),
    "grpo_k1": ("-m variants.grpo --kl reward", THREE, 27),
    "dr_grpo": ("-m variants.grpo --preset dr_grpo", FIVE, 29),
    "dr_grpo_k3": ("-m variants.grpo --preset dr_grpo --kl loss", THREE, 27),
    "dr_grpo_corrected": ("-m variants.grpo --preset dr_grpo --kl corrected", THREE, 27),
    "divisors": ("-m lessons.divisors", ALL, 600),
    "verified_rloo_1": (f"{VERIFIED} --preset rloo --divisor tokens --requirements 1 --n 8",
                        TWO, 60),
    "verified_grpo_1": (f"{VERIFIED} --requirements 1 --n 8", THREE, 60),
    "verified_rloo_2": (f"{VERIFIED} --preset rloo --divisor tokens --requirements 2 --n 8",
                        FIVE, 60),
    "verified_grpo_2": (f"{VERIFIED} --requirements 2 --n 8", THREE, 60),
    "verified_rloo_3": (f"{VERIFIED} --preset rloo --divisor tokens --n 16",
                        TWO, 60),
    "verified_grpo_3": (f"{VERIFIED} --n 16", THREE, 60),
    "dpo": ("dpo.py", FORTY, 41),
    "cdpo": ("dpo.py --label_smoothing 0.1", THREE, 42),
    "ipo": ("dpo.py --loss ipo", THREE, 40),
    "rdpo": ("dpo.py --loss rdpo", THREE, 41),
    "kto": ("-m variants.kto", THREE, 51),
    "dpo_lora": ("dpo.py --lora_rank 8 --lr 1e-3", THREE, 48),
    "iterated": ("-m lessons.rounds pairs", ALL, 360),
    "judge_habits": ("-m lessons.judge_habits", ALL, 25),
    "implicit_rewards": ("-m lessons.implicit_rewards", ALL, 290),
    "dpo_bad": ("dpo.py --beta 0.05 --lr 4e-3", ONE, 40),
    "simpo": ("simpo.py", EIGHT, 22),
    "rrhf": ("-m variants.rankings --loss rrhf", THREE, 35),
    "pro": ("-m variants.rankings --loss pro", THREE, 34),
    "simpo_bad": ("simpo.py --epochs 8", ONE, 85),
    "length_bias": ("-m lessons.length_bias", ALL, 190),
    "lazy_annotators": ("-m lessons.lazy_annotators", ALL, 165),
    "objectives": ("-m lessons.objectives", ALL, 660),
    "hir": ("hir.py", EIGHT, 62),
    "coh": ("-m variants.chain_of_hindsight", THREE, 72),
    "hir_bad": ("hir.py --temperature 1", ONE, 110),
    "hir_unsmoothed": ("hir.py --temperature 1 --label_smoothing 0", ONE, 64),
    "hindsight": ("-m lessons.hindsight", ALL, 2200),
    "self_correct": ("self_correct.py", EIGHT, 75),
    "self_correct_none": ("self_correct.py --feedback none", THREE, 62),
    "self_correct_bad": ("self_correct.py --alpha 1", ONE, 76),
    "swapped_generators": ("-m lessons.swapped_generators", ALL, 240),
    "tiny": ("-m tiny.make", ALL, 500),
    "frontier": ("-m lessons.frontier", ALL, 4000),
    "gather": ("benchmarks/gather.py", ALL, 700),
    "dpo_step": ("benchmarks/dpo_step.py", ALL, 1330),
    "rollout": ("benchmarks/rollout.py", ALL, 780),
    "cost": ("benchmarks/cost.py", ALL, 1110),
}
TIMED = {"gather": ("trl", "liger_kernel"), "dpo_step": ("trl", "liger_kernel"), "rollout": (),
         "cost": ()}
SENTENCES = [  # words of a page, and for each {} of them: (run, column, key, digits), of seed 0
    ("falls to {}, while the true reward of samples rises from {} to {}",
     [("dpo", "last", "rewards/chosen", 2), ("dpo", "before", "samples/true_reward", 2),
      ("dpo", "after", "samples/true_reward", 2)]),
]


# ---------------------------------------------------------------------------------------- running


def add_imports(path, files):
    """Add path to the list, and all files of the project that it imports, directly or not."""
    if path in files or not path.is_file():
        return
    files.append(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):  # of a module, or of a folder: a module in it
            names = [node.module, *(f"{node.module}.{name}" for name in names)]
        for name in names:
            add_imports(ROOT / (name.replace(".", "/") + ".py"), files)


def needs(command):
    """The runs (name, seed) whose folders a command reads."""
    return [(name, int(seed)) for name, seed in re.findall(r"RUNS/(\w+)/(\d+)", command)]


@functools.cache
def fingerprint(command):
    """Hash of a command and of all that it runs on: code without docstrings, tiny/, other runs."""
    words, files = command.split(), []
    path = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    add_imports(ROOT / path, files)
    code = [command, hashlib.sha256((ROOT / "tiny" / "model.safetensors").read_bytes()).hexdigest()]
    code += [fingerprint(RUNS[name][0]) for name, _ in needs(command)]
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) \
                    and ast.get_docstring(node) is not None:
                node.body.pop(0)
        code.append(ast.dump(tree))
    return hashlib.sha256("\n".join(code).encode()).hexdigest()


def is_done(name, seed):
    """Whether a run of this very command and code has ended."""
    path = OUT / name / str(seed) / "done.json"
    return path.is_file() and json.loads(path.read_text())["code"] == fingerprint(RUNS[name][0])


def start(name, seed, jobs):
    """Start one command in a process of its own. Returns what `end` needs to know."""
    fingerprint.cache_clear()  # the code may have changed since the last run was started
    command = RUNS[name][0]
    folder, code = OUT / name / str(seed), fingerprint(command)
    begun = folder / "begun.txt"
    if begun.exists() and begun.read_text() != code:
        # A lesson would take results of older code for its own. They may be an hour's work.
        aside = folder.with_name(f"{folder.name} of {time.strftime('%Y-%m-%d %H.%M.%S')}")
        folder.rename(aside)
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(code)
    words = command.replace("RUNS", str(OUT)).split()
    if name not in TIMED:
        words += ["--out", str(folder)]
    if seed != "all" and "--seed" not in words:
        words += ["--seed", str(seed)]
    environment = dict(os.environ)
    if jobs > 1 and name not in TIMED:
        environment["OMP_NUM_THREADS"] = "1"
    out, err = open(folder / "stdout.txt", "w"), open(folder / "stderr.txt", "w")
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=out, stderr=err,
                               env=environment)
    return process, {"name": name, "seed": seed, "folder": folder, "code": code,
                     "began": time.perf_counter(), "words": words}


def end(task, status, usage):
    """Keep what a run has taken. One that failed is named and left out; the others go on."""
    if status:
        tqdm.write(f"python {' '.join(task['words'])} failed; see {task['folder'] / 'stderr.txt'}")
        return
    (task["folder"] / "done.json").write_text(json.dumps({
        "code": task["code"],
        "seconds": time.perf_counter() - task["began"],
        "cpu": usage.ru_utime + usage.ru_stime,  # of the process and of its own children
        "mib": usage.ru_maxrss / 1024}) + "\n")


def run_all(waiting, jobs):
    """Run (name, seed) pairs, `jobs` at a time; the benchmarks of time run last, and alone."""
    waiting = sorted(waiting, key=lambda pair: pair[0] in TIMED)
    running = {}  # process id: (process, task)
    progress = tqdm(total=sum(RUNS[name][2] for name, _ in waiting), unit="s of CPU", disable=None)
    try:
        while waiting or running:
            for pair in list(waiting):
                name, seed = pair
                active = [(task["name"], task["seed"]) for _, task in running.values()]
                full = len(running) >= jobs or any(other in TIMED for other, _ in active)
                ready = not any(need in waiting or need in active for need in needs(RUNS[name][0]))
                if not full and ready and not (running and name in TIMED):
                    process, task = start(name, seed, jobs)
                    running[process.pid] = process, task
                    waiting.remove(pair)
            pid, status, usage = os.wait4(-1, 0)
            _, task = running.pop(pid)
            end(task, status, usage)
            progress.update(RUNS[task["name"]][2])
            progress.set_description(f"{task['name']} {task['seed']}")
    finally:
        for process, _ in running.values():
            process.terminate()
        progress.close()


# ------------------------------------------------------------------------- what the runs have left


MISSING = set()  # runs that a page needs, and that have not been made


class Missing(Exception):
    """One of them: the block or sentence stays as it is."""

    def __init__(self, name):
        MISSING.add(name)


def folder_of(name, seed=0):
    """The folder of a finished run."""
    if not is_done(name, seed):
        raise Missing(name)
    return OUT / name / str(seed)


def number(name, column, key, seed=0):
    """A number of results.json, or of the log: the first step, or the mean of the last ten."""
    folder = folder_of(name, seed)
    if column in ("first", "last") or key.startswith("online/"):  # of these there is only the log
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = rows[:1] if column == "first" else rows[-10:]
        return statistics.mean(row[key] for row in rows)
    return json.loads((folder / "results.json").read_text()).get(column, {}).get(key)


def spread(name, column, key, digits=2):
    """Mean ± SD over the seeds of a run; seeds without this number are left out, and counted."""
    seeds = RUNS[name][1]
    values = [number(name, column, key, seed) for seed in seeds]
    values = [value for value in values if value is not None]
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text + f" ({len(values)} of {len(seeds)} seeds)" * (len(values) < len(seeds))


def cell(name, column, key, digits=2):
    """The spread of a number; of a run's last column also the mean before, if there is one."""
    before = "draft" if column == "1" else "before"
    now = spread(name, column, key, digits)
    if column in ("after", "1") and not key.startswith(("online/", "pairs/ceiling")) \
            and spread(name, before, key):
        return f"{spread(name, before, key, digits).split(' ')[0]} → {now}"
    return now


def markdown(head, rows):
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def command_of(name):
    return f"`python {RUNS[name][0].replace('RUNS', 'runs')}`"


def fenced(lines):
    return "```\n" + "\n".join(lines).strip("\n") + "\n```"


def stdout_of(name, seed=0):
    return (folder_of(name, seed) / "stdout.txt").read_text(encoding="utf-8").splitlines()


# ------------------------------------------------------------------------------------- the blocks
# Tables of means over seeds. name: (keys, digits, rows); a row is a run, or (run, column, label).

OF_J = ("samples/true_reward", "samples/win_rate", "kl/policy_reference", "J/policy",
        "J/share_of_the_way", "J/effective_samples", "samples/grammatical", "samples/tokens")
OF_SUMMARIES = ("samples/quality", "samples/recall", "samples/made_up", "samples/tokens",
                "samples/grammatical", "kl/policy_reference")
TABLES = {
    "sft": (("loss", "samples/true_reward", "samples/grammatical"), 3,
            [("sft", "people", "the demonstrations"), "sft"]),
    "reward_model": (("pairs/accuracy", "pairs/ceiling", "calibration/error"), 3,
                     ["reward_model", "best_of_k"]),
    "ppo": (OF_J, 2, ["ppo", "best_of_4", "best_of_16", "raft"]),
    "dpo": ((*OF_J, "rewards/accuracy"), 2,
            ["dpo", "cdpo", "ipo", "rdpo", "kto", "dpo_lora"]),
    "simpo": (("samples/win_rate", *OF_SUMMARIES, "rewards/accuracy"), 2, ["simpo", "rrhf", "pro"]),
    "hir": (("followed/all", "followed/held_out", "samples/reviews", "online/used"), 2,
            ["hir"]),
    "hir_temperature": (("followed/all", "followed/at_temperature_1", "samples/reviews"), 2,
                        ["hir", "hir_bad", "hir_unsmoothed"]),
    "self_correct": (("value", "perfect", "stop_rule/perfect", "damaged"), 2,
                     [(name, column, f"{command_of(name)}, {label}")
                      for name in ("self_correct", "self_correct_none", "self_correct_bad")
                      for column, label in (("1", "draft → 1 correction"), ("2", "2 corrections"),
                                            ("3", "3 corrections"))]),
}
SUMMARY = [("sft", "samples/true_reward"),
           ("reward_model", "pairs/accuracy"), ("reward_model", "pairs/ceiling"),
           ("ppo", "samples/true_reward"), ("ppo", "J/share_of_the_way"),
           ("ppo", "samples/grammatical"), ("dpo", "samples/true_reward"),
           ("dpo", "J/share_of_the_way"), ("dpo", "samples/grammatical"),
           ("simpo", "samples/quality"), ("hir", "followed/all"), ("self_correct", "perfect"),
           ("kto", "samples/true_reward"), ("raft", "samples/true_reward"),
           ("best_of_4", "samples/true_reward"),
           ("rloo", "J/share_of_the_way"), ("grpo", "J/share_of_the_way"),
           ("rrhf", "samples/quality"), ("pro", "samples/quality"), ("coh", "followed/all"),
           ("tiny", "")]
OF_GRPO = ("ppo", "ppo_lam", "rloo", "rloo_long", "grpo", "grpo_long", "grpo_k1", "dr_grpo_k3",
           "dr_grpo_corrected", "dr_grpo")
HOLDS = [  # a default run, a column of its table, a number in it, and what it has to reach
    ("reward_model", "after", "pairs/accuracy - pairs/ceiling", -0.02),
    ("ppo", "after", "J/share_of_the_way", 0.9), ("dpo", "after", "J/share_of_the_way", 0.8),
    ("dpo", "after", "samples/grammatical", 0.85), ("simpo", "after", "samples/quality", 0.7),
    ("hir", "after", "followed/all", 0.85), ("self_correct", "1", "perfect", 0.88)]
BAD = [  # a run, the default run, the column to compare, numbers, and why it is so
    ("sft_bad", "sft", "after", ("loss", "samples/true_reward", "samples/grammatical"),
     "The learning rate is a hundred times too high. The run diverges into word salad."),
    ("reward_model_bad", "reward_model", "after", ("pairs/accuracy", "calibration/error"),
     "It sees 128 rankings thirty times. It knows them by heart, and is too sure where it errs."),
    ("dpo_bad", "dpo", "after", ("samples/true_reward", "samples/grammatical", "samples/tokens",
                                 "kl/policy_reference", "J/effective_samples"),
     "Beta is too low and the learning rate too high. The policy writes texts that no pair says "
     "anything about."),
    ("simpo_bad", "simpo", "after", ("samples/quality", "samples/grammatical",
                                     "kl/policy_reference", "rewards/accuracy"),
     "Eight passes, and no reference that holds it. The margin grows on pairs that it ranks "
     "correctly anyway."),
    ("hir_bad", "hir", "after", ("followed/all", "followed/at_temperature_1", "samples/reviews"),
     "Label smoothing asks for random tokens, and the next episode samples them. Most samples are "
     "then no reviews. All but the second number are evaluated at temperature 0.6."),
    ("self_correct_bad", "self_correct", "3", ("damaged", "perfect"),
     "Small improvements are drawn nearly as often as large ones. So it keeps rewriting, even what "
     "was perfect."),
]


def block_table(name):
    keys, digits, rows = TABLES[name]
    lines = []
    for row in rows:
        run, column, label = (row, "after", command_of(row)) if isinstance(row, str) else row
        lines.append([label])
        if is_whole(run):
            lines[-1] += [cell(run, column, key, digits) for key in keys]
    return markdown(["", *(f"`{key}`" for key in keys)], lines)


def is_whole(name):
    """Whether all seeds of a run have ended. If not, a table has a row of one cell for it, in whose
    place `keep_rows` puts the old row."""
    missing = [seed for seed in RUNS[name][1] if not is_done(name, seed)]
    if missing:
        MISSING.add(name)
    return not missing


def block_first():
    """What `python dpo.py` prints, as far as its first sample."""
    lines = stdout_of("dpo")
    first = next(i for i, line in enumerate(lines) if re.match(r"\d+ (of \d+ )?pairs", line))
    table = next(i for i, line in enumerate(lines) if re.fullmatch(r" +before +after", line))
    sample = next(i for i, line in enumerate(lines) if i > table and line.startswith("prompt"))
    shown = lines[first:sample + 3]
    return fenced([line for i, line in enumerate(shown) if line or shown[i - 1]])


def block_summary():
    rows, seen = [], set()
    for name, key in SUMMARY:
        if not is_whole(name):
            rows.append([command_of(name)])
            continue
        done = [json.loads((folder_of(name, seed) / "done.json").read_text())
                for seed in RUNS[name][1]]
        label, value = f"`{key}`", cell(name, "after", key) if key else ""
        if name == "self_correct":
            label, value = f"`{key}`, draft → 1 correction", cell(name, "1", key)
        if name == "tiny":
            label = "makes the model in `tiny/`"
        rows.append([command_of(name), label, value,
                     f"{statistics.mean(run['cpu'] for run in done):.0f} s",
                     f"{max(run['mib'] for run in done):.0f} MiB"])
        if name in seen:
            rows[-1] = ["", label, value, "", ""]
        seen.add(name)
    return markdown(["command", "number", "before → after", "CPU time", "peak memory"], rows)


def block_steady():
    """The default runs over all their seeds: the median and the worst."""
    rows = []
    for name, column, key, least in HOLDS:
        if is_whole(name):
            first, *second = key.split(" - ")
            values = [number(name, column, first, seed) - sum(
                number(name, column, other, seed) for other in second) for seed in RUNS[name][1]]
            label = f"`{key}`" + ", one correction" * (column == "1")
            rows.append([command_of(name), label, str(len(values)), f"{least:.2f}",
                         f"{statistics.median(values):.3f}", f"{min(values):.3f}"])
        else:
            rows.append([command_of(name)])
    return markdown(["command", "number", "seeds", "has to reach", "median", "worst"], rows)


def values_of(name, column, key):
    """A number for each seed of a run that has it."""
    found = [number(name, column, key, seed) for seed in RUNS[name][1]]
    return [value for value in found if value is not None]


def block_grpo():
    """Methods without a value network beside PPO, on the toy of reviews."""
    rows = []
    for name in OF_GRPO:
        if is_whole(name):
            share = values_of(name, "after", "J/share_of_the_way")
            grammar = values_of(name, "after", "samples/grammatical")
            done = [json.loads((folder_of(name, seed) / "done.json").read_text())
                    for seed in RUNS[name][1]]
            rows.append([command_of(name), str(len(done)),
                         spread(name, "after", "J/share_of_the_way", 3),
                         f"{min(share):.3f}" if share else "",
                         spread(name, "after", "samples/true_reward"),
                         spread(name, "after", "kl/policy_reference"), f"{min(grammar):.3f}",
                         f"{statistics.mean(run['cpu'] for run in done):.0f} s"])
        else:
            rows.append([command_of(name)])
    return markdown(["command", "seeds", "`J/share_of_the_way`", "worst", "`samples/true_reward`",
                     "`kl/policy_reference`", "grammar, worst", "CPU time"], rows)


def block_verified():
    """Rewards of 0 and 1 on the instructions of hir.py."""
    rows = []
    for name in (name for name in RUNS if name.startswith("verified_")):
        if is_whole(name):
            equal = [json.loads(line)["scores/equal"] for seed in RUNS[name][1] for line in
                     (folder_of(name, seed) / "metrics.jsonl").read_text().splitlines()[:10]]
            followed = values_of(name, "after", "followed/all")
            rows.append([command_of(name), str(len(followed)), cell(name, "after", "followed/all"),
                         f"{min(followed):.2f}", spread(name, "after", "followed/held_out"),
                         spread(name, "after", "samples/reviews"),
                         f"{statistics.mean(equal):.2f}"])
        else:
            rows.append([command_of(name)])
    return markdown(["command", "seeds", "`followed/all`", "worst", "`followed/held_out`",
                     "`samples/reviews`", "`scores/equal`, first ten steps"], rows)


def block_pipeline():
    lines = stdout_of("pipeline_ppo")
    first = next(i for i, line in enumerate(lines) if re.fullmatch(r" +before +after", line))
    return fenced(lines[first:lines.index("", first)])


def block_dpo_bad():
    """A few of the samples of a run that has gone wrong."""
    lines = (folder_of("dpo_bad") / "samples.txt").read_text(encoding="utf-8").splitlines()
    texts = [line.split(":", 1)[1].strip() for line in lines if line.startswith("after ")]
    return fenced([text[:95] for text in list(dict.fromkeys(texts))[:3]])


def block_wrong():
    rows = []
    for bad, good, column, keys, why in BAD:
        if not (is_whole(bad) and is_whole(good)):
            rows.append([command_of(bad)])
            continue
        numbers = [f"`{key}` {number(bad, column, key):.2f}, not {number(good, column, key):.2f}"
                   for key in keys]
        rows.append([command_of(bad), "<br>".join(numbers), why])
    return markdown(["command", "what it shows", "why"], rows)


def block_lessons():
    """The index of all lessons. It needs no run: its minutes are those planned in RUNS."""
    rows = []
    for path in sorted((ROOT / "lessons").glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        commands = re.findall(r"^    python (.*?)(?: +#.*)?$", text, re.M)
        planned = {command: seconds for command, _, seconds in RUNS.values()}
        minutes = [str(-(-planned[c] // 60)) if c in planned else "" for c in commands]
        rows.append([f"[{path.stem}](../lessons/{path.name})", text.splitlines()[0],
                     "<br>".join(f"`python {command}`" for command in commands),
                     "<br>".join(minutes) * any(minutes)])
    return markdown(["lesson", "question", "command", "CPU minutes"], rows)


def block_gpu():
    """The tables that benchmarks/gpu.sh has left; it runs on another machine."""
    path = OUT.parent / "gpu" / "gpu.json"
    if not path.exists():
        raise Missing("gpu")
    parts = []
    for table in json.loads(path.read_text(encoding="utf-8")):
        rows = []
        for row in table["rows"]:
            numbers = [(1000 * row["seconds"], 1), (row.get("time_ratio"), 2),
                       (row["tokens_per_second"], 0), (row["peak_mib"], 0),
                       (row.get("peak_ratio"), 2)]
            rows.append([row["case"], *("" if value is None else f"{value:.{digits}f}"
                                        for value, digits in numbers)])
        head = ["case", "median ms", table["ratio"], "tokens/s", "peak MiB", table["ratio"]]
        parts.append(f"`python benchmarks/{table['benchmark']}.py`, {table['setting']}:\n\n"
                     f"{markdown(head, rows)}")
    return "\n\n".join(parts)


FIGURES = {  # of seed 0. name: the title, and for each panel the label of its y axis and its lines
    "sft": ("SFT: the loss falls a little; the rest is free choice of words", [
        ("loss, nats a token", ["loss"]), ("gradient norm", ["grad_norm"])]),
    "reward_model": ("Reward model: the loss stays at log 2 for some 40 steps, then falls", [
        ("loss, nats a pair", ["loss"]), ("gradient norm", ["grad_norm"])]),
    "ppo": ("PPO: the reward rises while the KL stays small", [
        ("reward of samples", ["scores/mean"]),
        ("nats a response", ["kl/policy_reference", "kl/k3"])]),
    "dpo": ("DPO: the implicit rewards of both responses fall, their difference grows", [
        ("loss, nats", ["loss"]),
        ("beta log(pi / pi_ref)", ["rewards/chosen", "rewards/rejected"])]),
    "simpo": ("SimPO: rejected responses become less likely, chosen ones hardly change", [
        ("loss, nats", ["loss"]),
        ("mean log-prob a token", ["rewards/chosen", "rewards/rejected"])]),
    "hir": ("HIR: after some episodes the model does what it is asked", [
        ("share of samples", ["online/followed", "online/used"]),
        ("share of outputs", ["contrast/accuracy"])]),
    "self_correct": ("Self-correction: each round of exploring makes the pool better", [
        ("loss, nats a token", ["loss"]), ("mean value", ["pool/value"])])}


def draw(name):
    """The curves of a run, smoothed: the mean of eight steps, over the faint values of each."""
    from matplotlib.figure import Figure

    title, panels = FIGURES[name]
    log = (folder_of(name) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in log]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(7, 3.1))
    for number, (label, keys) in enumerate(panels, 1):
        axis = figure.add_subplot(1, len(panels), number)
        for key in keys:
            values = [row[key] for row in rows]
            line, = axis.plot(steps, values, alpha=0.25)
            means = [statistics.mean(values[max(0, i - 7):i + 1]) for i in range(len(values))]
            axis.plot(steps, means, color=line.get_color(), label=key)
        axis.set(xlabel="step", ylabel=label)
        # Above the panel, where it hides no curve.
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(keys), fontsize=8,
                    frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.text(0.5, 0.01, "faint: each step; bold: mean of the last eight steps", fontsize=8,
                ha="center")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(PICTURES / f"{name}.png", dpi=100)


# -------------------------------------------------------------------------------------- the pages


def block(name):
    """The contents of the block of this name."""
    if name in TABLES:
        return block_table(name)
    if name in TIMED:  # its setting in the first line, and its table
        text = "\n".join(stdout_of(name, "all"))
        setting = next(line for line in text.splitlines() if line.startswith("torch "))
        table = text[text.index("\n\n"):].partition("\n\ntarget")[0]
        return fenced([setting, "", table.strip("\n")])
    if RUNS.get(name, ("", ""))[1] == ALL:  # a lesson that leaves a table
        return (folder_of(name, "all") / "table.md").read_text(encoding="utf-8").strip()
    return globals()[f"block_{name}"]()


def fill_sentence(text, words, numbers):
    """text with the numbers in the place of the {} of words; None if it lacks the sentence."""
    pattern = r"\s+".join(re.escape(word).replace(r"\{\}", r"(-?[\d.]*\d)")
                          for word in words.split())
    found = re.search(pattern, text)
    if not found:
        return None
    for i in reversed(range(len(numbers))):
        first, last = found.span(i + 1)
        text = text[:first] + numbers[i] + text[last:]
    return text


def keep_rows(new, old):
    """The new table, with the old rows of a command in the place of its row of one cell.

    A row belongs to the command in its first cell; if that is empty, to the one above. If the
    columns are other ones now, old rows do not fit any more.
    """
    head, *lines = new.splitlines()
    old_head, *old_lines = old.strip().splitlines() or [""]
    kept, owner = {}, ""
    for line in old_lines[1:] if old_head == head else []:
        owner = line.split("|")[1].strip() or owner
        kept.setdefault(owner, []).append(line)
    rows = [head]
    for line in lines:
        missing = re.fullmatch(r"\| ([^|]+) \|", line)
        rows += kept.pop(missing[1], []) if missing else [line]
    return "\n".join(rows)


def code_of(path, name, step="", first="", last=""):
    """Lines of a function or class of a file, or of a method (CLASS.METHOD), without its docstring.

    step: only the step of this number, up to the comment of the next one. first, last: only from
    the first line that contains `first` to the next one that contains `last`. On a page:
    <!-- code: dpo.py train step 5 -->
    <!-- code: dpo.py yardstick from "log_weights =" to "way =" -->
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", "") == part)
    start = min(part.lineno for part in (node, *node.decorator_list))
    lines = text.splitlines()[start - 1:node.end_lineno]
    if ast.get_docstring(node) is not None:
        del lines[node.body[0].lineno - start:node.body[0].end_lineno - start + 1]
    if step:
        begin = next(i for i, line in enumerate(lines) if re.match(rf" *# {step}\. ", line))
        later = [i for i, line in enumerate(lines) if i > begin and re.match(r" *# \d+\. ", line)]
        lines = lines[begin:min(later, default=len(lines))]
    if first:
        begin = next(i for i, line in enumerate(lines) if first in line)
        end = next(i for i, line in enumerate(lines) if i >= begin and last in line)
        lines = lines[begin:end + 1]
    return textwrap.dedent("\n".join(lines)).strip("\n")


CODE = re.compile(r'(<!-- code: (\S+) (\S+)(?: step (\d+))?(?: from "(.+?)" to "(.+?)")? -->\n)'
                  r"(?:(?!<!-- code|<!-- results).)*?(<!-- end -->)", re.S)


def seconds_of(command):
    """CPU seconds of a command: measured, if README's summary has them, or as planned in RUNS."""
    summary = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| `python {re.escape(command)}` \|.*\| (\d+) s \|", summary, re.M)
    planned = {command: str(seconds) for command, _, seconds in RUNS.values()}
    return found[1] if found else planned.get(command)


def code_block(marks):
    """A match of CODE, with the code of today between its marks."""
    try:
        return f"{marks[1]}```python\n{code_of(*marks.groups('')[1:-1])}\n```\n{marks[7]}"
    except (StopIteration, OSError):
        raise SystemExit(f"{marks[1].strip()}: there is no such code") from None


def write_sources(text):
    """Fill in what needs no run: code, and the seconds of commands that are in RUNS."""
    text = CODE.sub(code_block, text)
    return re.sub(r"(`python ([^`\n]+)` \()(\d+|\?)( s\))", lambda marks: (
        f"{marks[1]}{seconds_of(marks[2]) or marks[3]}{marks[4]}"), text)


def write_page(path):
    """Fill in whatever there are runs for."""
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- results: (\w+) -->", text):
        try:
            content = block(name)
            marks = re.search(rf"<!-- results: {name} -->\n(.*?)<!-- end -->", text, re.S)
            if content.startswith("|"):
                content = keep_rows(content, marks[1])
            if content.count("\n") == 1 and content.startswith("|"):
                continue  # a table without rows
            text = f"{text[:marks.start(1)]}{content}\n{text[marks.end(1):]}"
        except Missing:
            continue
    for words, sources in SENTENCES:
        if fill_sentence(text, words, ["0"] * len(sources)) is not None:
            try:
                numbers = [f"{number(name, column, key):.{digits}f}"
                           for name, column, key, digits in sources]
                text = fill_sentence(text, words, numbers)
            except Missing:
                continue
    path.write_text(write_sources(text), encoding="utf-8")


def main():
    global OUT
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="RUN", choices=RUNS,
                        help="run these alone (None: all)")
    parser.add_argument("--pages", action="store_true", help="run nothing; write the pages from "
                        "the code and from finished runs")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time; above 1, each has "
                        "one thread")
    parser.add_argument("--list", action="store_true", help="show what there is to run, and stop")
    parser.add_argument("--out", default="runs/results", help="finished runs in it stay")
    args = parser.parse_args()
    OUT = Path(args.out).resolve()
    todo = [(name, seed) for name in args.only or RUNS for seed in RUNS[name][1]
            if not args.pages and not is_done(name, seed)]
    for name, _ in list(todo):
        lacking = [p for p in TIMED.get(name, ()) if importlib.util.find_spec(p) is None]
        if lacking:
            print(f"{name} is left out: its peers {' and '.join(lacking)} are not installed")
            todo = [pair for pair in todo if pair[0] != name]
        for need in needs(RUNS[name][0]):
            if need not in todo and not is_done(*need):
                todo.append(need)
    if args.list:
        for name in args.only or RUNS:
            seeds = sum(other == name for other, _ in todo)
            print(f"{name:18} {RUNS[name][2]:5} s x {seeds}   python {RUNS[name][0]}")
    minutes = sum(RUNS[name][2] for name, _ in todo) / 60
    print(f"{len(todo)} runs to do, about {minutes:.0f} minutes of CPU time; kept in {OUT}")
    if args.list:
        return
    run_all(todo, args.jobs)
    fingerprint.cache_clear()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        write_page(page)
    for name in FIGURES:
        try:
            draw(name)
        except Missing:
            continue
    for name, (_, seeds, _) in RUNS.items():  # most lessons draw a figure of their own
        figure = OUT / name / str(seeds[0]) / f"{name}.png"
        if is_done(name, seeds[0]) and figure.exists():
            shutil.copy(figure, PICTURES)
    print("README.md and docs/ are written." + bool(MISSING) *
          f" Left as it was, for want of these runs: {', '.join(sorted(MISSING))}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; finished runs are kept: run it again to go on") from None
