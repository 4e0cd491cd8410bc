"""Every command in the README runs, and says what the README says of it."""

import importlib
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import self_correct
from model import load_model, save_model

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = "sft reward_model ppo_rlhf dpo simpo hir self_correct".split()
DOCSTRINGS = "".join((ROOT / f"{name}.py").read_text() for name in SCRIPTS)
COMMANDS = sorted({part.split("  #")[0].strip() for match in re.findall(
    rf"(?:^| |`)(python (?:{'|'.join(SCRIPTS)})\.py[^`\n|]*)", README + DOCSTRINGS, re.M)
    for part in match.split("&&") if "--help" not in part})
SMALL = {"dpo": ["--pairs", "16", "--samples", "2"], "sft": ["--examples", "32"],
         "reward_model": ["--rankings", "16", "--samples", "4"], "ppo_rlhf": ["--samples", "2"],
         "simpo": ["--rankings", "16"], "hir": ["--rounds", "1", "--warm_up", "2"],
         "self_correct": ["--problems", "16", "--warm_up", "60", "--max_new_tokens", "16"]}


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """The folder of an untrained reward model."""
    folder = tmp_path_factory.mktemp("reward_model")
    save_model(*load_model("tiny", head="reward"), folder)
    return str(folder)


def shortened(command, tmp_path, reward):
    """A README command, cut to two steps, with a small file and the embedded model."""
    rows = [{"prompt": f"Question {i}?", "completion": " Yes.", "chosen": " Yes.",
             "rejected": " No.", "answer": "Yes."} for i in range(8)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = command.replace("mine.jsonl", str(tmp_path / "mine.jsonl")).split()[1:]
    other = {"gpt2": "tiny", "Qwen/Qwen2.5-0.5B": "tiny", "runs/sft": "tiny", "NAME": "ipo",
             "runs/reward_model": reward}
    words = [other.get(word, word) for word in words if word != "--resume"]
    small = ["--steps", "2", "--batch_size", "4", "--max_new_tokens", "8", "--device", "cpu",
             "--out", str(tmp_path / "out")]
    return [*words, *small, *SMALL[words[0].removesuffix(".py")]]


def sometimes_right(model, tokenizer, prompts, *_):
    """Every other answer is the right one."""
    return [tokenizer.encode(" No." if i % 2 else " Yes.") + [tokenizer.eos_id]
            for i in range(len(prompts))]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, tmp_path, reward, capsys, monkeypatch):
    """Two steps of it end well, with a table and a model in --out."""
    script, *flags = shortened(command, tmp_path, reward)
    if script == "self_correct.py" and "--data" in flags:  # tiny never answers these rightly
        monkeypatch.setattr(self_correct, "sample", sometimes_right)
    importlib.import_module(script.removesuffix(".py")).main(flags)
    folder = tmp_path / "out" / ("simpo" if "--lesson" in command else "")
    assert (folder / "model.safetensors").is_file() == ("best_of_n" not in command)
    assert re.search("before +after|draft +1 +2 +3", capsys.readouterr().out)


def test_there_are_commands():
    """The pattern above finds what it is meant to find."""
    chain = "python ppo_rlhf.py --model runs/sft --reward_model runs/reward_model --base tiny"
    assert {"python dpo.py", "python sft.py --task sentiment", chain} <= set(COMMANDS)
    assert len(COMMANDS) > 16


@pytest.mark.parametrize("script", [
    *(f"{name}.py" for name in SCRIPTS),
    *(pytest.param(f"benchmarks/{name}.py", marks=pytest.mark.slow) for name in (
        "gather", "dpo_step", "reward_hacking", "objectives", "hindsight"))])
def test_help(script):
    """--help exits 0 and shows defaults, without importing transformers or matplotlib."""
    code = ("import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as stop:\n    assert not stop.code\n"
            "heavy = {'transformers', 'matplotlib', 'tiktoken'} & set(sys.modules)\n"
            "print('heavy:', sorted(heavy))")
    run = subprocess.run([sys.executable, "-c", code, script], cwd=ROOT, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    assert "usage" in run.stdout and ("heavy: []" in run.stdout or script.startswith("benchmarks"))
    assert "default" in run.stdout or script.startswith("benchmarks")


def test_every_logged_number_is_explained(tmp_path):
    """The README names every number that a run logs or prints."""
    (tmp_path / "ptx.jsonl").write_text('{"text": "Nobody said a word."}')
    ptx = ["--ptx_coef", "1", "--ptx_data", str(tmp_path / "ptx.jsonl")]
    for script, *flags in (["dpo"], ["dpo", "--loss", "kto"], ["sft"],
                           ["sft", "--task", "sentiment"], ["reward_model"], ["ppo_rlhf", *ptx],
                           ["ppo_rlhf", "--algo", "best_of_n"], ["simpo"], ["hir"],
                           ["self_correct"]):
        after = importlib.import_module(script).main([
            *flags, "--steps", "1", "--batch_size", "8", "--device", "cpu", *SMALL[script],
            "--out", str(tmp_path)])
        logged = (tmp_path / "metrics.jsonl").read_text().splitlines()[:1]
        for name in {*after, *(key for line in logged for key in json.loads(line))} - {"step"}:
            assert f"`{name.split(' of ')[0]}`" in README, name  # "summary/recall of lead-1"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_whole_command(command, tmp_path, reward):
    """The commands as they stand, but for the output folder and the user's file and models."""
    words = shortened(command, tmp_path, reward)
    whole = words[:words.index("--steps")] + ["--out", str(tmp_path / "out")]
    run = subprocess.run([sys.executable, *whole], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if "self_correct.py --data" in command:  # tiny has no right answer to learn from, and says so
        assert run.returncode == 2 and "nothing to learn" in run.stderr
        return
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "results.json").is_file()
