"""Two processes, started by torchrun, on the CPU: the same result as one."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

TEXTS = [" It was superb.", " It was dull and weak. It was long.", " I found it funny and moving.",
         " No."]


def respond(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, **_):
    """In place of `sample`: the response tells to which prompt it belongs."""
    return [tokenizer.encode(TEXTS[sum(ids) % 4]) + [tokenizer.eos_id] for ids in prompts]


# Each line of a file is a run. Both processes keep the weights that it ends with, what `evaluate`
# has returned by then, and the seeds of PPO's rollouts, in which `respond` takes the place of
# `sample`. The last run is stopped in its fourth update, resumed, and the only one that evaluates
# at its end and saves its model.
CODE = """
import importlib, sys, torch, model
sys.path.append("tests")
import ppo_rlhf, test_ranks
seeds = []
ppo_rlhf.sample = lambda *args, **named: seeds.append(args[4]) or test_ranks.respond(*args, **named)
torch.set_default_dtype(torch.float64)
model.check_model = lambda network, *_: network.double()
lines, step = open(sys.argv[1]).read().splitlines(), torch.optim.AdamW.step
for line in lines:
    script, *flags = line.split()
    module, updates, columns = importlib.import_module(script), [], []
    evaluate = module.evaluate
    def watch(*args):
        table, samples = evaluate(*args)
        columns.append(table)
        return table, samples
    def keep(network, tokenizer, folder):
        torch.save((network.state_dict(), columns, seeds), f"{folder}/rank{model.RANK}")
        model.save_model(network, tokenizer, folder) if line == lines[-1] else sys.exit()
    def stop(*args):
        updates.append(0)
        return step(*args) if len(updates) < 4 or line != lines[-1] else sys.exit()
    module.save_model, module.evaluate, torch.optim.AdamW.step = keep, watch, stop
    try:
        module.main(flags)
    except SystemExit:
        module.evaluate, torch.optim.AdamW.step = evaluate, step
module.main([*flags, "--resume"])
"""


def torchrun(code, *flags):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "--no_python", sys.executable, "-c", code, *map(str, flags)],
        cwd=ROOT, capture_output=True, text=True, timeout=200)


@pytest.fixture
def flags(tmp_path):
    """For a few steps, in batches of three parts or fewer, which two processes share unequally."""
    rows = [{"prompt": f"I saw film number {i}.", "chosen": " It was superb." + " So funny." * i,
             "rejected": " It was dull.", "completion": " The cast was moving." * (1 + i % 3)}
            for i in range(12)]
    (tmp_path / "d").write_text("\n".join(map(json.dumps, rows)))
    return f"--steps=6 --batch_size=5 --device=cpu --max_new_tokens=9 --data={tmp_path}/d".split()


def test_two_processes_end_as_one(flags, tmp_path, float64, monkeypatch):
    """Both hold equal weights, bit for bit, also if they were stopped and resumed; one process
    ends with the same, up to the order in which gradients are added, and evaluates to the same.
    PPO's processes draw with seeds of their own, and each response stays with its prompt. All is
    in float64."""
    runs = {"sft": [*flags, "--max_tokens=90"], "simpo": [*flags, "--max_tokens=99"],
            "ppo_rlhf": "--steps=2 --batch_size=9 --n=3 --lr=2e-3 --max_tokens=99 --samples=2 "
                        "--device=cpu".split(),
            "variants.grpo": "--steps=2 --batch_size=9 --n=3 --max_tokens=99 --samples=2 "
                             "--device=cpu".split(), "dpo": [*flags, "--max_tokens=150"]}
    lines = [f"{name} {' '.join(own)} --out={tmp_path}/{name}" for name, own in runs.items()]
    lines += [lines[-1] + "_resumed --save_every=2"]
    (tmp_path / "lines").write_text("\n".join(lines))
    done = torchrun(CODE, tmp_path / "lines")
    assert done.stdout.count("All that this run has made") == 1, done.stderr
    ends = {path.parent.name: [torch.load(path.with_name(f"rank{i}")) for i in (0, 1)]
            for path in tmp_path.glob("*/rank0")}
    assert len(ends) == 6
    weights = {name: (first[0], second[0]) for name, (first, second) in ends.items()}
    for first, second in [*weights.values(), (weights["dpo"][0], weights["dpo_resumed"][0])]:
        assert all(map(torch.equal, first.values(), second.values()))
    first, second = (seeds for _, _, seeds in ends["ppo_rlhf"])
    assert len({*first, *second}) == 4 == 2 * len(first)
    monkeypatch.setattr("ppo_rlhf.sample", respond)
    for script, own in runs.items():
        module, out = importlib.import_module(script), tmp_path / f"{script}_alone"
        module.main([*own, f"--out={out}"])
        alone = module.load_model(str(out))[0].state_dict()  # rounded to fp32
        for name, weight in weights[script][0].items():  # lr is 3e-4 or more
            assert torch.allclose(weight, alone[name], rtol=1e-6, atol=1e-6), (script, name)
        logs = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                for folder in (out, tmp_path / script)]
        assert all(one == pytest.approx(two, rel=1e-6, abs=1e-6) for one, two in zip(*logs))
    sft, dpo, resumed = (json.loads((tmp_path / name / "results.json").read_text())
                         for name in ("sft_alone", "dpo_alone", "dpo_resumed"))
    for _, (table,), _ in ends["sft"]:
        assert table["before"] == pytest.approx(sft["before"], rel=1e-6)
    for name in ("before", "after"):
        assert resumed[name] == pytest.approx(dpo[name], rel=1e-6, abs=1e-6)


def test_a_process_that_fails_ends_all_with_its_line(flags, tmp_path):
    code = ("import sys, dpo, model\nif model.RANK: dpo.schedule = lambda *_: model.fail('bad')\n"
            "dpo.main(sys.argv[1:])")
    done = torchrun(code, *flags, f"--out={tmp_path}/out")
    assert done.returncode and done.stderr.count("error: bad") == 1, done.stderr
