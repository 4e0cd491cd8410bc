"""Every command in the README runs, and says what the README says of it."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCSTRINGS = "".join((ROOT / f"{name}.py").read_text() for name in ("sft", "dpo"))
COMMANDS = sorted({match.split("  #")[0].split("&&")[-1].strip() for match in re.findall(
    r"(?:^| |`)(python (?:sft|dpo)\.py[^`\n|]*)", README + DOCSTRINGS, re.M)
    if "--help" not in match})


def shortened(command, tmp_path):
    """A README command, cut to two steps, with a small file and the embedded model."""
    rows = [{"prompt": f"Question {i}?", "completion": " Yes.", "chosen": " Yes.",
             "rejected": " No."} for i in range(8)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = command.replace("mine.jsonl", str(tmp_path / "mine.jsonl")).split()[1:]
    models = ("gpt2", "Qwen/Qwen2.5-0.5B", "runs/sft")
    words = ["tiny" if word in models else word.replace("NAME", "ipo") for word in words]
    small = ["--steps", "2", "--batch_size", "4", "--max_new_tokens", "8", "--device", "cpu",
             "--out", str(tmp_path / "out")]
    small += ["--pairs", "16", "--samples", "2"] if words[0] == "dpo.py" else ["--examples", "32"]
    return [*words, *small]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, tmp_path):
    """Two steps of it end with exit code 0 and a model in --out."""
    words = shortened(command, tmp_path)
    if "--resume" in words:
        words.remove("--resume")
    run = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file() and "after" in run.stdout


def test_there_are_commands():
    """The pattern above finds what it is meant to find."""
    assert {"python dpo.py", "python sft.py --task sentiment"} <= set(COMMANDS)
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("script", [
    "dpo.py", "sft.py", "benchmarks/gather.py", "benchmarks/dpo_step.py"])
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
    import dpo
    import sft

    for script, flags in ((dpo, ["--pairs", "32", "--samples", "2"]), (dpo, [
            "--pairs", "32", "--samples", "2", "--loss", "kto"]), (sft, ["--examples", "32"]),
            (sft, ["--examples", "32", "--task", "sentiment"])):
        after = script.main([*flags, "--steps", "1", "--device", "cpu", "--out", str(tmp_path)])
        logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
        for name in (set(after) | set(logged)) - {"step"}:
            assert f"`{name.split(' of ')[0]}`" in README, name  # "summary/recall of lead-1"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_whole_command(command, tmp_path):
    """The commands as they stand, but for the output folder and the user's file and model."""
    words = [word for word in shortened(command, tmp_path) if word != "--resume"]
    whole = words[:words.index("--steps")] + ["--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, *whole], cwd=ROOT, check=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()
