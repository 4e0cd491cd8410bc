"""Every command in the README runs, and says what the README says of it."""

import importlib
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import self_correct
from benchmarks import results
from model import load_model, save_model

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = "sft reward_model ppo_rlhf dpo simpo hir self_correct".split()
DOCSTRINGS = "".join((ROOT / f"{name}.py").read_text() for name in SCRIPTS)


def commands_in(text):
    return {part.split("  #")[0].strip() for match in re.findall(
        rf"(?:^| |`)(python (?:{'|'.join(SCRIPTS)})\.py[^`\n|]*)", text, re.M)
        for part in match.split("&&") if "--help" not in part}


COMMANDS = sorted(commands_in(README + DOCSTRINGS))
# Those that stand in tables only are many: by default their flags are read, and not run.
TOLD = commands_in(re.sub(r"^\|.*$", "", README, flags=re.M) + DOCSTRINGS)
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
    size = "16" if "--n" in words else "4"  # a step of PPO holds all --n samples of a prompt
    small = ["--steps", "2", "--batch_size", size, "--max_new_tokens", "8", "--device", "cpu",
             "--out", str(tmp_path / "out")]
    return [*words, *small, *SMALL[words[0].removesuffix(".py")]]


def sometimes_right(model, tokenizer, prompts, *_):
    """Every other answer is the right one."""
    return [tokenizer.encode(" No." if i % 2 else " Yes.") + [tokenizer.eos_id]
            for i in range(len(prompts))], None


@pytest.mark.parametrize("command", [
    pytest.param(command, marks=[] if command in TOLD else pytest.mark.slow)
    for command in COMMANDS])
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
    """The pattern above finds what it is meant to find, and every flag exists."""
    chain = "python ppo_rlhf.py --model runs/sft --reward_model runs/reward_model --base tiny"
    assert {"python dpo.py", "python sft.py --task sentiment", chain} <= TOLD
    assert len(COMMANDS) > 30
    for command in COMMANDS:
        script, *flags = command.replace("NAME", "ipo").split()[1:]
        importlib.import_module(script.removesuffix(".py")).parse_args(flags)


def test_what_the_readme_names_is_there():
    """Functions, tests, files and headings that the README leads to."""
    functions = re.findall(r"`(\w+)` in `(\w+)\.py`", README)
    assert len(functions) > 25
    for name, module in functions:
        assert callable(getattr(importlib.import_module(module), name)), (name, module)
    errata = set(re.findall(r"^def (test_\w+)", (ROOT / "tests/test_errata.py").read_text(), re.M))
    assert errata == set(re.findall(r"`(test_\w+)`", README))
    headings = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target[1:] in anchors if target[0] == "#" else (ROOT / target).exists(), target


def test_what_is_measured_is_written_by_the_benchmark():
    """benchmarks/results.py finds its blocks, sentences and figures in the README."""
    blocks = [name for name in vars(results) if name.startswith("block_")]
    marked = re.findall(r"<!-- results: (\w+) -->\n.*?<!-- end -->", README, re.S)
    assert sorted(marked) == sorted(name.removeprefix("block_") for name in blocks)
    for words, sources in results.SENTENCES:
        assert words.count("{}") == len(sources)
        assert "9.87" in results.fill_sentence(README, words, ["9.87"] * len(sources))
    for figure in results.FIGURES:
        assert f"(benchmarks/{figure})" in README


def test_a_block_and_a_sentence_are_filled():
    """Only what stands between the marks changes, and only the numbers of a sentence."""
    text = "a\n<!-- results: x -->\nold\n<!-- end -->\nrises from\n-0.5 to 12 in b"
    assert results.fill_block(text, "x", "new\\1") == text.replace("old", "new\\1")
    filled = results.fill_sentence(text, "rises from {} to {} in", ["1.50", "-2"])
    assert filled == text.replace("-0.5 to 12", "1.50 to -2")
    for broken in (lambda: results.fill_block(text, "y", ""),
                   lambda: results.fill_sentence(text, "falls from {}", ["1"])):
        with pytest.raises(SystemExit, match="README.md"):
            broken()


def test_a_run_is_kept_until_its_code_changes(tmp_path, monkeypatch):
    """A comment or docstring leaves a finished run as it is; a changed line, or flag, does not."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "tiny").mkdir()
    for name in ("tiny/model.safetensors", "model.py"):
        (tmp_path / name).write_text("")
    script = tmp_path / "dpo.py"
    script.write_text('"""Doc."""\ndef f():\n    """Doc."""\n    return 1\n')
    code = results.fingerprint("dpo.py --seed 1")
    (tmp_path / "done.json").write_text(json.dumps({"code": code}))
    assert results.is_done(tmp_path, "dpo.py --seed 1")
    assert not results.is_done(tmp_path, "dpo.py --seed 2")
    assert not results.is_done(tmp_path / "other", "dpo.py --seed 1")
    script.write_text('"""Other."""\ndef f():\n    """Other."""\n    return 1  # why\n')
    assert results.is_done(tmp_path, "dpo.py --seed 1")
    script.write_text('"""Other."""\ndef f():\n    """Other."""\n    return 2\n')
    assert not results.is_done(tmp_path, "dpo.py --seed 1")


@pytest.mark.parametrize("script", [
    *(f"{name}.py" for name in SCRIPTS),
    *(pytest.param(f"benchmarks/{name}.py", marks=pytest.mark.slow) for name in (
        "gather", "dpo_step", "reward_hacking", "objectives", "hindsight", "frontier", "results"))])
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
