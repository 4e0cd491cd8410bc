"""Whole runs of all scripts: what they reach, what they leave, that they repeat, stop and go on."""

import contextlib
import datetime
import importlib
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import model

# Small runs of a few steps, with every kind of state that --resume has to bring back.
SMALL = {
    "sft": "--examples 48 --batch_size 8 --steps 6",
    "reward_model": "--rankings 40 --k 3 --batch_size 4 --steps 6 --lora_rank 2",
    "ppo_rlhf": "--batch_size 8 --n 2 --ppo_epochs 2 --steps 5 --samples 2 --kl_target 1 "
                "--lora_rank 2",
    "dpo": "--pairs 64 --batch_size 8 --steps 6 --samples 2 --lora_rank 2",
    "simpo": "--pairs 40 --batch_size 8 --steps 6",
    "hir": "--warm_up 2 --episodes 3 --rounds 2 --updates_per_round 1 --batch_size 8 --samples 8",
    "self_correct": "--problems 16 --warm_up 20 --pool 4 --rounds 3 --explore 1 --corrections 1 "
                    "--epochs 1 --batch_size 8",
    "variants.kto": "--pairs 64 --batch_size 8 --steps 6 --samples 2",
    "variants.rankings": "--pairs 40 --batch_size 8 --steps 6",
    "variants.raft": "--batch_size 8 --n 2 --epochs 2 --steps 5 --samples 2",
    "variants.grpo": "--toy instructions --requirements 1 --batch_size 8 --n 2 --ppo_epochs 2 "
                     "--steps 5 --samples 2 --lora_rank 2",
    "variants.chain_of_hindsight": "--requirements 1 --warm_up 20 --episodes 3 --rounds 2 "
                                   "--updates_per_round 1 --batch_size 8 --samples 8"}


def run(script, folder, flags, *more):
    """Run a script; returns its metrics."""
    module = importlib.import_module(script)
    with contextlib.redirect_stdout(io.StringIO()):
        return module.main([*flags.split(), *more, "--device", "cpu", "--out", str(folder)])


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def columns(folder):
    """The last two columns of the table: (before, after)."""
    return list(json.loads((folder / "results.json").read_text()).values())[-2:]


each_script = pytest.mark.parametrize("script", [
    pytest.param(name, marks=[pytest.mark.slow] * ("variants" in name)) for name in SMALL])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function: script -> (folder of a small run, its metrics, the logits of its last model)."""
    done, ids = {}, torch.tensor([[5, 6, 7, 8]])

    def get(script):
        if script not in done:
            module, folder = importlib.import_module(script), tmp_path_factory.mktemp("run")
            logits = []
            save = module.save_model

            def keep(model, tokenizer, out):
                logits.append(model(input_ids=ids).logits.detach())
                save(model, tokenizer, out)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "save_model", keep)
                after = run(script, folder, SMALL[script])
            done[script] = folder, after, logits[0]
        return done[script]

    get.ids = ids
    return get


@each_script
def test_leaves_what_the_readme_promises(script, whole):
    """A model that plain transformers loads, adapters merged; flags, log, table, figure."""
    folder, after, logits = whole(script)
    auto = AutoModelForCausalLM
    if script == "reward_model":
        auto = AutoModelForSequenceClassification
    plain, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(plain.eval()(input_ids=whole.ids).logits, logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder)("I saw").input_ids
    args = json.loads((folder / "args.json").read_text())
    assert args["seed"] == 0 and args["out"] == str(folder)
    rows = log(folder)
    steps = args.get("steps", 6) or 6
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(isinstance(x, (int, float)) and x == x for row in rows for x in row.values())
    assert columns(folder)[1] == after
    samples = (folder / "samples.txt").read_text()
    assert all(key.removesuffix("_se") in samples for key in after)
    assert len(samples.split("\n\n")) > 2
    assert (folder / "curves.png").stat().st_size > 5000
    assert not [p for p in folder.iterdir() if p.name.startswith("state") or p.is_dir()]


class Killed(Exception):
    pass


@pytest.mark.parametrize("save_every", ["2", pytest.param("3", marks=pytest.mark.slow)])
@each_script
def test_killed_and_resumed_is_the_same_run(script, save_every, whole, tmp_path, monkeypatch):
    """Killed in the update after the one that follows a saved state, and resumed with other random
    numbers around: the same bits as an uninterrupted run (pytorch/rl#4188, NVIDIA-NeMo/RL#3171).
    Steps 2 and 4 begin a round of hir.py and self_correct.py. An older run leaves no trace."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' * 9)
    (tmp_path / "state.pt").write_text("of an older run")
    flags = [SMALL[script], "--save_every", save_every]
    step, lines = torch.optim.AdamW.step, int(save_every) + 1

    def kill(*args, **rest):
        if len(log(tmp_path)) == lines and (tmp_path / "state.pt").exists():
            raise Killed
        return step(*args, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", kill)
        with pytest.raises(Killed):
            run(script, tmp_path, *flags)
    assert len(log(tmp_path)) == lines and not (tmp_path / "model.safetensors").exists()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == int(save_every)
    torch.manual_seed(99)
    random.seed(99)
    after = run(script, tmp_path, *flags, "--resume")
    folder, expected, _ = whole(script)
    one, other = (hash((x / "model.safetensors").read_bytes()) for x in (tmp_path, folder))
    assert one == other
    assert log(tmp_path) == log(folder) and after == expected


def test_ctrl_c_from_a_terminal(tmp_path):
    """The real signal to the real program: exit code 130, one line that says how to go on, and a
    state from which it goes on."""
    flags = "--examples 48 --batch_size 8 --steps 60 --save_every 1 --device cpu".split()
    process = subprocess.Popen([sys.executable, "sft.py", *flags, "--out", str(tmp_path)],
                               cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, preexec_fn=lambda: signal.signal(
                                   signal.SIGINT, signal.SIG_DFL))  # a background job ignores it
    path = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and len(log(tmp_path)) > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1].strip()
    assert process.returncode == 130, error
    assert error.startswith("stopped;") and "--resume" in error and len(error.splitlines()) == 1
    stopped = len(log(tmp_path))
    run("sft", tmp_path, " ".join(flags), "--resume")
    assert [row["step"] for row in log(tmp_path)] == list(range(1, len(log(tmp_path)) + 1))
    assert len(log(tmp_path)) > stopped and (tmp_path / "results.json").exists()


GOOD, BAD = " The plot was superb.", " The plot was dull."
PROMPTS = [f"I saw film number {i}." for i in range(160)]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Files of own data, and "model": tiny, taught to write GOOD and BAD equally often."""
    root, words = tmp_path_factory.mktemp("own"), list(zip(
        "superb moving funny gripping".split(), "dull weak awful boring".split()))
    files = {"answers": [{"prompt": p, "answer": GOOD} for p in PROMPTS],
             "pairs": [{"prompt": p, "chosen": f" The {aspect} was {bad}.",
                        "rejected": f" The {aspect} was {good}."}
                       for p in PROMPTS for aspect, (good, bad) in zip(("plot", "cast"), words)],
             "texts": [{"prompt": q, "completion": text} for p in PROMPTS for text in (GOOD, BAD)
                       for q in (p, f"Generate a correct answer to this problem.\n{p}")]}
    for name, rows in files.items():
        (root / name).write_text("\n".join(map(json.dumps, rows)))
    run("sft", root / "model", f"--data {root}/texts --steps 20 --batch_size 16 --lr 2e-3 "
        "--max_new_tokens 12")
    return root


def test_a_console_of_another_encoding():
    code = ("import io, sys; sys.stdout = io.TextIOWrapper(sys.stdout.buffer, 'ascii'); "
            "import model; print('na\\xefve')")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


IMPROVES = [  # each bound is at least 3 standard deviations below the worst of four seeds
    ("sft", "--examples 960 --lr 2e-3 --max_new_tokens 24", "samples/true_reward", 0.7),
    ("reward_model", "--data {own}/pairs --steps 16 --batch_size 8", "pairs/accuracy", 0.9),
    ("ppo_rlhf", "--samples 16 --steps 5 --batch_size 48 --ppo_epochs 3 --beta 0.2 --lr 1e-3 "
     "--max_new_tokens 24", "samples/true_reward", 0.8),
    ("dpo", "--pairs 960 --samples 16 --lr 1.5e-3 --batch_size 32 --max_new_tokens 24",
     "samples/true_reward", 0.6),
    ("simpo", "--data {own}/pairs --steps 10 --batch_size 8 --max_new_tokens 12",
     "rewards/accuracy", 0.9),
    ("hir", "--data {own}/answers --model {own}/model --episodes 2 --rounds 3 "
     "--updates_per_round 5 --batch_size 16 --label_smoothing 0 --lr 2e-3 --samples 64 "
     "--max_new_tokens 12", "followed/correct", 0.9),
    ("self_correct", "--data {own}/answers --model {own}/model --rounds 1 --pool 4 --corrections 1 "
     "--epochs 4 --batch_size 16 --max_new_tokens 12", "perfect", 0.9)]


@pytest.mark.parametrize("script, flags, metric, reached", IMPROVES, ids=[x[0] for x in IMPROVES])
def test_improves(script, flags, metric, reached, own, tmp_path):
    """A short run raises what the script is for, on prompts that it has not seen."""
    run(script, tmp_path, flags.format(own=own))
    before, after = columns(tmp_path)
    assert before[metric] < reached <= after[metric], (before, after)
    assert after.get("samples/grammatical", 1) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("script, metric, least", [
    ("sft", "samples/true_reward", 1.0), ("reward_model", "pairs/accuracy", 0.735),
    ("ppo_rlhf", "J/share_of_the_way", 0.92), ("dpo", "J/share_of_the_way", 0.85),
    ("simpo", "samples/quality", 0.75), ("hir", "followed/all", 0.9),
    ("self_correct", "stop_rule/perfect", 0.93)])
def test_default_run(script, metric, least, tmp_path):
    """The default runs over three seeds reach what the README says, on average."""
    found = [run(script, tmp_path, "", "--seed", str(seed))[metric] for seed in range(3)]
    assert mean(found) >= least, found


ROWS = [{"prompt": f"I saw film number {i}.", "completion": " It was dull."} for i in range(20)]
SFT = "--batch_size 4 --steps 6 --save_every 2 --max_new_tokens 4"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A function: flags -> the metrics of sft.py on ROWS, run in tmp_path with --out run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "data").write_text("\n".join(map(json.dumps, ROWS)))
    return lambda *flags: run("sft", "run", f"{SFT} --data data", *flags)


def breaks(patch, error, calls=4):
    """Let the optimizer's step number `calls` raise this error."""
    step, count = torch.optim.AdamW.step, []

    def broken(*args, **rest):
        count.append(1)
        if len(count) == calls:
            raise error
        return step(*args, **rest)

    patch.setattr(torch.optim.AdamW, "step", broken)


def one_line(capsys, call, *args):
    """The line with which a call ends."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate "
                 "memory: you tried to allocate 99 bytes.")], ids=["cuda", "cpu"])
def test_out_of_memory_has_a_way_back(error, mine, capsys, monkeypatch):
    """One line names --max_tokens and --resume. No gradient depends on it, so the run goes
    on with another value; and a run without a state says that there is none."""
    with monkeypatch.context() as patch:
        breaks(patch, error)
        line = one_line(capsys, mine)
        assert "--max_tokens" in line and "add --resume" in line
        args = open("run/args.json").read()
        mine("--resume", "--max_tokens", "64")
    assert [row["step"] for row in log(Path("run"))] == list(range(1, 7))
    assert not Path("run/state.pt").exists() and open("run/args.json").read() == args
    breaks(monkeypatch, error, calls=1)
    monkeypatch.setattr(torch, "save", lambda *_: None)
    monkeypatch.setattr("model.os.replace", lambda *_: None)
    assert "no state has been saved yet" in one_line(capsys, mine)
    breaks(monkeypatch, RuntimeError("another fault"), calls=1)
    with pytest.raises(RuntimeError, match="another fault"):
        mine()


def test_an_older_state_stays_until_the_new_run_can_work(mine, capsys, monkeypatch):
    """A forgotten --resume with a name mistyped destroys nothing; nor does a refused --resume,
    whose line gives the old value."""
    with monkeypatch.context() as patch:
        breaks(patch, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            mine("--seed", "5")
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert before.keys() == {"args.json", "metrics.jsonl", "state.pt"}
    for flags, fragment in (("--data typo", "typo: cannot be read"),
                            ("--model typo", "typo: cannot load"), ("--max_length 1", "left"),
                            ("--resume --seed 6", "was started with --seed 5"),
                            ("--resume --seed 5 --batch_size 2", "--batch_size 4"),
                            ("--resume --seed 5 --data typo", "typo")):
        assert fragment in one_line(capsys, mine, *flags.split())
        assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before
    Path("data").rename("moved")  # another path with the same rows
    mine("--seed", "5", "--resume", "--data", "moved")
    assert len(log(Path("run"))) == 6


def test_a_kill_while_the_log_is_cut_loses_no_line(mine, monkeypatch):
    """Lines behind the saved state are cut when a run is resumed: written beside, then moved."""
    with monkeypatch.context() as patch:
        breaks(patch, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            mine()
    lines = Path("run/metrics.jsonl").read_text()
    assert lines.count("\n") == 3
    write = Path.write_text

    def half(path, text, **rest):
        write(path, text[:len(text) // 2], **rest)
        raise Killed

    def kill(*_):
        raise Killed

    for what, killed in ((Path, "write_text"), (model.os, "replace")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(what, killed, half if what is Path else kill)
            mine("--resume")
        assert Path("run/metrics.jsonl").read_text() == lines
    mine("--resume")
    assert [row["step"] for row in log(Path("run"))] == list(range(1, 7))


def test_a_folder_that_goes_during_the_run(mine, capsys, monkeypatch):
    """The line says what the system said, and guesses nothing of a full disk."""
    with monkeypatch.context() as patch:
        patch.setattr("sft.Run.save_state", lambda *_: shutil.rmtree("run", ignore_errors=True))
        line = one_line(capsys, mine)
    assert "run: cannot be written ([Errno 2] No such file or directory" in line
    assert "full" not in line


def test_the_date_in_a_template_is_no_other_value(mine, monkeypatch):
    """Rows are compared as they stand in the file, and not as today's template renders them."""
    base, tokenizer = model.load_model("tiny")
    tokenizer.transformers.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}\n{% endif %}")
    Path("base").mkdir()
    model.save_model(base, tokenizer, "base")
    rows = [{"messages": [{"role": "user", "content": row["prompt"]},
                          {"role": "assistant", "content": "Dull."}]} for row in ROWS]
    Path("data").write_text("\n".join(map(json.dumps, rows)))
    first = tokenizer.encode_prompt(rows[0]["messages"][:1])
    with monkeypatch.context() as patch:
        breaks(patch, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            mine("--model", "base")

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, *_):
            return cls(2031, 5, 4)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert tokenizer.encode_prompt(rows[0]["messages"][:1]) != first
    mine("--model", "base", "--resume")
    assert len(log(Path("run"))) == 6
