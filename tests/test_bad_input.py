"""Bad input of all scripts: one line on stderr that names the cause, exit code 2, no traceback."""

import argparse
import importlib
import json
import math
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch

import model as hub

PAIR = {"chosen": " The cast was superb.", "rejected": " It was dull."}
ROW = {"sft": {"completion": " The cast was superb."}, "reward_model": PAIR, "dpo": PAIR,
       "simpo": PAIR, "ppo_rlhf": {}, "hir": {"answer": "42"}, "self_correct": {"answer": "42"},
       "variants.kto": PAIR, "variants.rankings": PAIR, "variants.raft": {},
       "variants.grpo": {"answer": "42"}, "variants.chain_of_hindsight": {"answer": "42"}}
QUICK = dict.fromkeys(ROW, "--max_new_tokens 6") | {
    "reward_model": "", "self_correct": "--pool 4 --rounds 1 --corrections 1 --max_new_tokens 6"}
for name in ("ppo_rlhf", "variants.raft"):
    QUICK[name] += " --reward_model {reward} --n 2 --samples 2 --steps 2"
QUICK["variants.grpo"] += " --n 2 --samples 2 --steps 2"
for name in ("hir", "variants.chain_of_hindsight"):
    QUICK[name] += " --episodes 1 --rounds 4 --samples 2"
each_script = pytest.mark.parametrize("script", [
    pytest.param(name, marks=[pytest.mark.slow] * ("variants" in name)) for name in ROW])


def rows(script, **changes):
    """Rows with different prompts that the script can learn from, and these changes."""
    return [{"prompt": f"I saw film number {i}."} | ROW[script] | changes for i in range(8)]


def write(path, content):
    path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))
    return path


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """The folder of a reward model with a random head."""
    folder = tmp_path_factory.mktemp("reward")
    hub.save_model(*hub.load_model("tiny", head="reward"), folder)
    return folder


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Let tiny write the right answer every second time or so, where a script looks for it. And
    no hub is asked for a model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def sample(model, tokenizer, prompts, *_, **__):
        rng = random.Random(len(prompts))
        return [tokenizer.encode(rng.choice(("42", "7"))) + [tokenizer.eos_id] for _ in prompts]

    for script in ("hir", "self_correct", "ppo_rlhf"):
        monkeypatch.setattr(importlib.import_module(script), "sample", sample)


def run(script, out, data, flags, reward):
    flags = f"--batch_size 2 --device cpu {QUICK[script]} {flags}".format(reward=reward).split()
    importlib.import_module(script).main(["--out", str(out), "--data", str(data), *flags])


def fails(capsys, fragment, *args):
    """The run ends with exit code 2 and one line that has this fragment."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    error = "".join(line for line in lines if not line.startswith("warning: "))
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: "), error
    assert fragment in error, error


RESPONSE = [script for script in ROW if ROW[script]]
PAIRS = [script for script in ROW if ROW[script] is PAIR]
CHAT = [{"role": "user", "content": "A"}]
RANKS = {"prompt": "A", "responses": ["a", "b"], "ranks": [1]}
# What is wrong: (scripts, content of the file, given good rows of the script; flags; fragment).
TABLE = {
    "empty": (ROW, lambda good: "\n \n", "", "no rows"),
    "not JSON": (ROW, lambda good: '{"a": 1}\n{"prompt": "I saw', "", "data:2: not a JSON object"),
    "no object": (ROW, lambda good: '{}\n\n[["prompt", "b"]]', "", "data:3: not a JSON object"),
    "an array": (ROW, lambda good: json.dumps(good, indent=1), "", "data: this is one JSON array"),
    "no prompt": (ROW, lambda good: [dict(list(row.items())[1:]) for row in good], "",
                  'data:1: "prompt" is missing'),
    "prompt no text": (ROW, lambda good: [row | {"prompt": 3} for row in good], "",
                       'data:1: "prompt" is 3; it has to be a text'),
    "one prompt": (ROW, lambda good: [row | {"prompt": "A"} for row in good], "", "two different"),
    "no template": (ROW, lambda good: [row | {"prompt": CHAT} for row in good], "", "template"),
    "prompt too long": (ROW, lambda good: [row | {"prompt": "The plot. " * 600} for row in good],
                        "", "left"),
    "no response": (RESPONSE, lambda good: [dict(list(row.items())[:-1]) for row in good], "",
                    "data:1: "),
    "response no text": (RESPONSE, lambda good: [dict.fromkeys(row, 3) | {"prompt": "A"}
                                                 for row in good], "", "is 3; it has to be a text"),
    "same responses": (PAIRS, lambda good: [row | {"rejected": row["chosen"]} for row in good], "",
                       "left"),
    "no room": (["sft", *PAIRS], None, "--max_length 2", "left"),
    "no file": (ROW, None, "--data nowhere", "nowhere: cannot be read"),
    "no model": (ROW, None, "--model nowhere", "nowhere: cannot load this model"),
    "reward model": ([script for script in ROW if script != "reward_model"], None,
                     "--model {reward}", "this is a reward model"),
    "language model": (["ppo_rlhf", "variants.raft", "variants.grpo"], None, "--reward_model tiny",
                       "a language model"),
    "one sample": (["variants.grpo"], None, "--n 1", "at least 2"),
    "ranks": (["reward_model", "variants.rankings"], lambda good: [RANKS], "", '"ranks"'),
    "label": (["variants.kto"], lambda good: [{"prompt": "A", "completion": "a", "label": 1}], "",
              "true or false"),
    "reply": (["sft"], lambda good: [{"messages": CHAT}], "", "reply of the assistant")}


@pytest.mark.parametrize("script, name", [
    (script, name) for name, case in TABLE.items() for script in case[0]])
def test_bad_input(script, name, reward, tmp_path, capsys):
    _, change, flags, fragment = TABLE[name]
    data = write(tmp_path / "data", change(rows(script)) if change else rows(script))
    fails(capsys, fragment, script, tmp_path / "run", data, flags, reward)


@each_script
@pytest.mark.parametrize("kind", ["tiny", "file", "below", "metrics.jsonl", "link", "model"])
def test_out_that_cannot_be_used(script, kind, reward, tmp_path, capsys):
    """The embedded model, a file, a folder with odd contents, a dangling link: nothing is lost."""
    out, data = tmp_path / "run", write(tmp_path / "data", rows(script))
    if kind in ("file", "below"):
        write(out, "mine")
    elif kind == "link":
        os.symlink(tmp_path / "gone" / "below", out)
    else:
        (out / kind).mkdir(parents=True)
    place = {"tiny": hub.TINY, "below": out / "below"}.get(kind, out)
    before = [path.stat().st_mtime for path in hub.TINY.iterdir()]
    same = f"--model {out}" * (kind == "model")
    fails(capsys, f"--out {place}", script, place, data, same, reward)
    assert [path.stat().st_mtime for path in hub.TINY.iterdir()] == before
    mine = {"file": out, "below": out}.get(kind)
    assert mine is None or mine.read_text() == "mine"


@pytest.fixture(scope="module")
def stopped(reward, tmp_path_factory):
    """A function: script -> (folder of a run that ended behind a saved state, its data)."""
    done = {}

    def get(script):
        if script not in done:
            root = tmp_path_factory.mktemp("stopped")
            done[script] = root / "run", write(root / "data", rows(script))
            with pytest.MonkeyPatch.context() as patch:  # without a save_model, so it breaks there
                patch.setattr(importlib.import_module(script), "save_model", None)
                with pytest.raises(TypeError):
                    run(script, *done[script], "--save_every 1", reward)
        return done[script]

    return get


@each_script
@pytest.mark.parametrize("kind, fragment", [
    ("no state", "no interrupted run"), ("other flags", "was started with --seed 0"),
    ("other data", "are not those that the run"), ("other weights", "are not those that the run"),
    ("other shape", "no state of this script"), ("half", "no state of this script"),
    ("negative step", "no state of this script"), ("another script", "--resume")])
def test_resume_refuses_what_is_no_state_of_this_run(script, kind, fragment, stopped, reward,
                                                     tmp_path, capsys):
    (folder, data), out = stopped(script), tmp_path / "run"
    shutil.copytree(folder, out)
    state, good, flags = out / "state.pt", data.read_text(), "--resume"
    if kind == "no state":
        state.unlink()
    elif kind == "other data":
        write(data, good.replace("number", "no."))
    elif kind == "other shape":
        content = torch.load(state, weights_only=True)
        content["model"] = {name: w[..., :1] for name, w in content["model"].items()}
        torch.save(content, state)
    elif kind == "other weights":  # of --model: its folder was written anew
        model, tokenizer = hub.load_model()
        model.lm_head.weight.data += 0.01
        hub.save_model(model, tokenizer, tmp_path)
        flags += f" --model {tmp_path}"
    elif kind == "negative step":
        torch.save(torch.load(state, weights_only=True) | {"step": -3}, state)
    elif kind == "half":
        state.write_bytes(state.read_bytes()[:5000])
    elif kind == "another script":
        shutil.copy(stopped("dpo" if script == "sft" else "sft")[0] / "state.pt", state)
    if kind == "other flags":
        flags += " --seed 1"
    before = (out / "args.json").read_text()
    fails(capsys, fragment, script, out, data, flags, reward)
    assert (out / "args.json").read_text() == before  # it still says how to go on
    write(data, good)


@each_script
@pytest.mark.parametrize("ruinous", [0, 1])
def test_nan_leaves_a_good_state_and_no_model(script, ruinous, reward, tmp_path, capsys,
                                              monkeypatch):
    """Of the first update, and of a later one, which may be the last."""
    out, data = tmp_path / "run", write(tmp_path / "data", rows(script))
    monkeypatch.setattr(importlib.import_module(script), "schedule",
                        lambda step, steps, **_: float(step == ruinous))
    fails(capsys, "lower --lr", script, out, data, "--lr 1e30 --save_every 1", reward)
    assert not (out / "model.safetensors").exists()
    if (out / "state.pt").exists() or ruinous:
        state = torch.load(out / "state.pt", weights_only=True)
        assert all(torch.isfinite(weight).all() for weight in state["model"].values())
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in log[:ruinous + 1] for value in row.values())


class Parser(Exception):
    pass


def numeric_flags(script, patch):
    """The numeric flags of a script, as argparse actions."""
    def stop(parser, *_):
        raise Parser(parser)

    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parser) as found:
        importlib.import_module(script).parse_args([])
    return [action for action in found.value.args[0]._actions if action.type]


# Flags that may be 0, beside those that take any number that is not negative; flags that may be
# negative.
ZERO = {"lora_rank", "seed", "warm_up", "alternatives", "corrections"}
SIGNED = {"missing_eos_score", "length_bias"}


@pytest.mark.parametrize("script", [*ROW, "variants.on_policy_pairs", "variants.win_rate"])
def test_numbers_without_meaning(script, capsys, monkeypatch):
    """Each numeric flag at 0, negative, huge and NaN: what has no meaning ends with exit code 2 and
    the flag's name, before anything is loaded, and no flag makes a run of zero steps."""
    with monkeypatch.context() as patch:
        actions = numeric_flags(script, patch)
    assert len(actions) > 5 or script == "variants.win_rate"
    needed = ["--judge", "x", "A", "B"] * (script == "variants.win_rate")
    for action in actions:
        amount, real = action.type == "amount", action.type == "real"
        zero = amount or real or action.type == "fraction" or action.dest in ZERO or (
            (script, action.dest) == ("self_correct", "rounds"))
        zero = zero and (script, action.dest) not in (
            ("dpo", "beta"), ("variants.kto", "beta"), ("simpo", "beta"))
        for text, fine in {"0": zero, "-1": real, "nan": False, "inf": False,
                           "1e30": amount or real, "1" + "0" * 30: amount or real, "": False,
                           "-0.5": real,
                           "1.5": amount or real or isinstance(action.default, float) and (
                               action.type != "fraction")}.items():
            taken = True
            try:
                importlib.import_module(script).parse_args([f"--{action.dest}={text}", *needed])
            except SystemExit as stop:
                taken, error = False, capsys.readouterr().err
                assert stop.code == 2 and f"--{action.dest}" in error, error
            assert taken == fine, (action.dest, text)
            assert not real or action.dest in SIGNED


@pytest.mark.parametrize("script, flags, name", [
    ("dpo", "--loss ipo --label_smoothing 0.3", "label_smoothing"), ("dpo", "--alpha 1", "alpha"),
    ("simpo", "--loss cpo --gamma_beta_ratio 1", "gamma_beta_ratio"),
    ("simpo", "--lam 2", "lam"), ("simpo", "--loss orpo --beta 1", "beta"),
    ("simpo", "--delta 2", "delta"), ("hir", "--algo farl --alternatives 2", "alternatives"),
    ("hir", "--algo farl --beta 0.1", "beta")])
def test_a_flag_of_another_loss_is_named(script, flags, name):
    """One warning; none where the flag has an effect."""
    with pytest.warns(UserWarning, match=f"^--{name} has no effect with --") as found:
        importlib.import_module(script).parse_args(flags.split())
    assert len(found) == 1


def test_flags_that_have_an_effect_are_not_named(capsys, recwarn):
    for script, flags in (("dpo", "--label_smoothing 0.3"), ("dpo", "--loss rdpo --alpha 1"),
                          ("simpo", "--loss cpo --lam 2 --beta 1"),
                          ("simpo", "--loss slic --delta 2"),
                          ("hir", "--alpha 2 --beta 0.1 --alternatives 2")):
        importlib.import_module(script).parse_args(flags.split())
    assert not recwarn.list
    nothing = "the loss has no gradient then"
    for script, flags, why in (("dpo", "--loss ipo", nothing), ("dpo", "", nothing),
                               ("variants.kto", "", nothing), ("simpo", "", nothing),
                               ("ppo_rlhf", "--kl_target 1", "0 stays 0")):
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args([*flags.split(), "--beta", "0"])
        assert why in capsys.readouterr().err


@pytest.mark.parametrize("script, name", [
    ("dpo", "metrics"), ("variants.on_policy_pairs", "pairs"),
    ("variants.on_policy_pairs", "samples")])
def test_a_run_does_not_overwrite_its_own_data(script, name, tmp_path, capsys):
    path = tmp_path / f"{name}.jsonl"
    path.write_text('{"prompt": "A", "chosen": "B", "rejected": "C"}\n')
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["--data", str(path), "--out", str(tmp_path)])
    assert f"{name}.jsonl: this run would overwrite it" in capsys.readouterr().err
    assert path.stat().st_size > 0


@pytest.mark.parametrize("script, flag", [
    (script, flag) for script in ("dpo", "ppo_rlhf") for flag in hub.PATHS + ("out",)])
def test_an_empty_name_is_no_name(script, flag, tmp_path, capsys, monkeypatch):
    """As of a variable of the shell that is not set: not the toy, and no file beside the script."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    try:
        args = module.parse_args(["--out", "run", f"--{flag}="])
    except SystemExit:  # this script has no such flag
        return
    with pytest.raises(SystemExit) as stop:
        module.train(args)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith(f"error: --{flag} is empty"), line
    assert not list(tmp_path.iterdir())


def test_a_state_whose_step_is_no_step(stopped, reward, tmp_path, capsys):
    folder, data = stopped("sft")
    for step in (0.5, True, "1", None, -1):
        shutil.copytree(folder, tmp_path / "run", dirs_exist_ok=True)
        state = torch.load(folder / "state.pt", weights_only=True)
        torch.save(state | {"step": step}, tmp_path / "run" / "state.pt")
        fails(capsys, "no state of this script", "sft", tmp_path / "run", data, "--resume", reward)


def test_resume_looks_at_every_model_of_ppo(stopped, reward, tmp_path, capsys):
    """The reward model's folder was written anew between the runs (NVIDIA-NeMo/RL#3722)."""
    folder, data = stopped("ppo_rlhf")
    shutil.copytree(folder, tmp_path / "run")
    model, tokenizer = hub.load_model(reward, "reward")
    model.score.weight.data += 1
    (tmp_path / "reward").mkdir()
    hub.save_model(model, tokenizer, tmp_path / "reward")
    fails(capsys, f"the weights of {tmp_path / 'reward'} are not those", "ppo_rlhf",
          tmp_path / "run", data, "--resume", tmp_path / "reward")


@pytest.mark.parametrize("script", ["dpo", "ppo_rlhf", "simpo", "sft", "hir", "self_correct"])
def test_the_toy_has_no_room(script, tmp_path, capsys):
    """Samples that are longer than the context of the model end the toy, too, with one line."""
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(
            ["--max_new_tokens", "600", "--out", str(tmp_path), "--device", "cpu"] +
            ["--pairs", "4"] * (script in ("dpo", "simpo")))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and "left" in line and line.count("\n") == 1, line


class Code:
    """Unpickling this runs code: it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_state_runs_no_code(stopped, reward, tmp_path, capsys):
    """A state.pt is a pickle, and a folder of a run may come from elsewhere."""
    folder, data = stopped("sft")
    shutil.copytree(folder, tmp_path / "run")
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save(state | {"more": Code(tmp_path / "made")}, tmp_path / "run" / "state.pt")
    fails(capsys, "no state of this script", "sft", tmp_path / "run", data, "--resume", reward)
    assert not (tmp_path / "made").exists()


# Flags that may change between the parts of a run. Of these only --lr and --samples change what
# comes out, and both are there to be changed: after a divergence, or once the run is over.
FREE = {"device", "save_every", "lr", "max_tokens", "samples", "model", "reference", "policy",
        "generator", "reward_model", "data", "ptx_data"}


@pytest.mark.parametrize("script", ROW)
def test_each_flag_counts_when_a_run_is_resumed(script, tmp_path, capsys):
    """One changed flag at a time: a flag that changes the result is named, and the free ones are
    taken. (Models and data are compared by their content.)"""
    module, network = importlib.import_module(script), torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(network.parameters())
    flags = vars(module.parse_args([]))

    def state(**changes):
        args = argparse.Namespace(**flags | {"out": str(tmp_path)} | changes)
        this = hub.Run(args)
        return this, this.load_state(network, optimizer)

    state()[0].save_state(3, network, optimizer)
    assert len(flags) > 12
    for flag, value in flags.items():
        if flag in ("out", "resume"):
            continue
        other = not value if isinstance(value, bool) else (
            f"{value}x" if value is None or isinstance(value, str) else value + 1)
        if flag in FREE:
            assert state(resume=True, **{flag: other})[1]["step"] == 3
            continue
        with pytest.raises(SystemExit):
            state(resume=True, **{flag: other})
        assert f"was started with --{flag} {value};" in capsys.readouterr().err
