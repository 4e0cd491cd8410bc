"""Whole runs, short: what they reach, what they leave, that they repeat, stop and go on exactly."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import dpo
import model as hub
import sft

SHORT = ["--pairs", "96", "--batch_size", "16", "--samples", "4", "--steps", "6", "--device", "cpu"]


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_dpo_improves_the_true_reward(tmp_path):
    """40 steps from tiny: the true reward rises by half a word, the text stays grammatical, and the
    run leaves what the README promises, loadable by plain transformers."""
    after = dpo.main(["--pairs", "1280", "--samples", "64", "--out", str(tmp_path),
                      "--device", "cpu"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert after["samples/true_reward"] > results["before"]["samples/true_reward"] + 0.5
    assert after["samples/grammatical"] > 0.9 and after["rewards/accuracy"] > 0.6
    assert after["J/policy"] > after["J/reference"] + 0.3 and after["kl/policy_reference"] > 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("I saw the film.", return_tensors="pt").input_ids
    mine, _ = hub.load_model(tmp_path)
    assert torch.allclose(plain.eval()(ids).logits, mine(ids).logits, atol=1e-4)
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert "before" in (tmp_path / "samples.txt").read_text()
    assert json.loads((tmp_path / "args.json").read_text())["lr"] == 5e-4
    assert len(log(tmp_path)) == 40 and not (tmp_path / "state.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ipo", "ipo_mean", "rdpo", "kto"])
def test_relatives_widen_the_margin(tmp_path, loss):
    """Each relative, 30 steps: on held-out pairs the margin grows and most are ranked right."""
    tau = ["--tau", "0.5"] if "ipo" in loss else []
    after = dpo.main(["--loss", loss, "--out", str(tmp_path), *tau,
                      *"--pairs 960 --samples 4 --lr 1e-3 --device cpu".split()])
    assert after["rewards/margin"] > 0.05 and after["rewards/accuracy"] > 0.55


def test_sft_learns_to_summarise(tmp_path):
    """30 steps from tiny: recall of facts from 0.7 to above 0.9."""
    after = sft.main(["--examples", "960", "--out", str(tmp_path), "--device", "cpu"])
    before = json.loads((tmp_path / "results.json").read_text())["before"]
    assert before["summary/recall"] < 0.8 and after["summary/recall"] > 0.9
    assert after["summary/quality"] > after["summary/quality of lead-3"] + 0.2
    assert after["loss"] < before["loss"]


def test_first_step_starts_at_log_two(tmp_path):
    """Policy and reference go through one function: loss exactly log 2, margin and accuracy exactly
    0 at step 1, also with accumulation (NVIDIA/NeMo-Aligner#227, huggingface/trl#744)."""
    for accumulate in ("1", "4"):
        dpo.main([*SHORT, "--steps", "1", "--accumulate", accumulate, "--out", str(tmp_path)])
        first = log(tmp_path)[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert first["rewards/margin"] == 0.0 and first["rewards/accuracy"] == 0.0


def test_dropout_in_the_config_does_not_show(tmp_path):
    """A config with dropout 0.1, as GPT-2's, still starts at log 2: 0.79 was seen with it on."""
    config = json.loads((hub.TINY / "config.json").read_text()) | {
        "resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}
    folder = tmp_path / "model"
    folder.mkdir()
    for path in hub.TINY.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    dpo.main([*SHORT, "--steps", "1", "--model", str(folder), "--out", str(tmp_path / "out")])
    assert log(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_reference_stays_and_policy_moves(tmp_path, monkeypatch):
    """After training the reference that evaluation sees is bit for bit the start, shares no storage
    with the policy, and the policy is another (huggingface/trl#1104, YiyangZhou/POVID#11)."""
    seen = {}

    def spy(policy, reference, *rest):
        seen.update(policy=policy, reference=reference)
        return {}, {"x": 0.0}, [], None

    monkeypatch.setattr(dpo, "evaluate", spy)
    dpo.main([*SHORT, "--out", str(tmp_path)])
    start, _ = hub.load_model("tiny")
    for old, reference, policy in zip(*(m.parameters() for m in (
            start, seen["reference"], seen["policy"])), strict=True):
        assert torch.equal(old, reference) and reference.data_ptr() != policy.data_ptr()
    assert not torch.equal(start.lm_head.weight, seen["policy"].lm_head.weight)


def test_cached_reference_is_the_live_reference(tmp_path):
    """The reference's log-probs, taken up front, equal live ones (huggingface/trl#2423)."""
    torch.manual_seed(0)
    states = []
    original = dpo.save_state
    dpo.save_state = lambda *args, **rest: states.append(rest) or original(*args, **rest)
    try:
        dpo.main([*SHORT, "--out", str(tmp_path)])
    finally:
        dpo.save_state = original
    reference = states[-1]["reference"]
    model, tokenizer = hub.load_model("tiny")
    rows = dpo.toy_pairs(model, tokenizer, 96, 0)
    examples, _ = dpo.encode_preferences(tokenizer, rows, 512)
    import random

    random.Random(0).shuffle(examples)
    batch = examples[:16]
    sequences = [e[0] for e in batch] + [e[1] for e in batch]
    live = dpo.response_logps(model, dpo.collate(sequences, "cpu"))[0]
    assert torch.allclose(reference[0][0][0], live, atol=1e-6)


def test_same_seed_same_weights(tmp_path):
    """Two runs with one seed leave the same file, another seed leaves another."""
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        dpo.main([*SHORT, "--seed", seed, "--out", str(tmp_path / out)])
        sft.main(["--examples", "128", "--seed", seed, "--out", str(tmp_path / f"sft-{out}"),
                  "--device", "cpu"])
    for kind in ("", "sft-"):
        a, b, c = (digest(tmp_path / f"{kind}{out}") for out in "abc")
        assert a == b != c


@pytest.mark.parametrize("script", [dpo, sft])
def test_accumulation_changes_nothing(tmp_path, script, monkeypatch):
    """A batch of 8 at once, or in four parts, with unequal lengths: the same gradient and the same
    logged loss (huggingface/transformers#34191: a mean of micro-batch means is off)."""
    flags = {dpo: SHORT, sft: "--examples 96 --batch_size 8 --steps 6 --device cpu".split()}
    losses, norms = [], []
    for accumulate in ("1", "3"):
        out = tmp_path / accumulate
        script.main([*flags[script], "--accumulate", accumulate, "--out", str(out)])
        losses.append([row["loss"] for row in log(out)])
        norms.append([row["grad_norm"] for row in log(out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_kto_accumulation_changes_nothing(tmp_path):
    """KTO's reference point is that of the whole batch, however it is split."""
    for accumulate in ("1", "4"):
        dpo.main([*SHORT, "--loss", "kto", "--accumulate", accumulate,
                  "--out", str(tmp_path / accumulate)])
    for one, four in zip(log(tmp_path / "1"), log(tmp_path / "4"), strict=True):
        assert one["kl/mismatched"] == pytest.approx(four["kl/mismatched"], abs=1e-4)
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-4)


def test_last_batch_is_a_step_of_its_own(tmp_path):
    """Five examples in batches of two: three steps, the last over one example, and the schedule
    counts them as steps (natolambert/rlhf-book PR #354)."""
    sft.main(["--examples", "5", "--batch_size", "2", "--accumulate", "2", "--out", str(tmp_path),
              "--device", "cpu"])
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * x for x in (1, 2 / 3, 1 / 3)])


@pytest.mark.parametrize("script, extra", [
    (dpo, SHORT), (dpo, [*SHORT, "--lora_rank", "2"]),
    pytest.param(dpo, [*SHORT, "--loss", "kto"], marks=pytest.mark.slow),
    (sft, ["--examples", "64", "--batch_size", "8", "--steps", "6", "--device", "cpu"])])
def test_resumed_equals_uninterrupted(tmp_path, script, extra, monkeypatch, capsys):
    """Ctrl-C after three steps and --resume: the same bits, weights and metrics, as without
    (pytorch/rl#4188, NVIDIA-NeMo/RL#3171)."""
    script.main([*extra, "--out", str(tmp_path / "whole")])
    calls = []
    original = script.checkpoint

    def press(args, step, health, pressed, *rest, **more):
        calls.append(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs, and fills the list
        return original(args, step, health, pressed, *rest, **more)

    monkeypatch.setattr(script, "checkpoint", press)
    with pytest.raises(SystemExit) as stop:
        script.main([*extra, "--out", str(tmp_path / "parts")])
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
    monkeypatch.setattr(script, "checkpoint", original)
    torch.manual_seed(99)
    script.main([*extra, "--out", str(tmp_path / "parts"), "--resume"])
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


def test_ctrl_c_from_a_terminal(tmp_path):
    """The real signal to the real program: exit code 130, no traceback, a line that says how to go
    on, and a state to go on from."""
    command = [sys.executable, "dpo.py", "--pairs", "2048", "--batch_size", "4", "--samples", "4",
               "--device", "cpu", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL)
    for _ in range(600):
        if (tmp_path / "metrics.jsonl").exists() and len(log_lines := (
                tmp_path / "metrics.jsonl").read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error
    assert "--resume" in error.strip().splitlines()[-1] and len(log_lines) > 3
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] >= 4


def test_fresh_run_replaces_an_old_one(tmp_path):
    """A second run into the same folder starts its own metrics."""
    for steps in ("4", "2"):
        sft.main(["--examples", "64", "--batch_size", "8", "--steps", steps, "--out", str(tmp_path),
                  "--device", "cpu"])
    assert len(log(tmp_path)) == 2


def test_logged_metrics_are_of_the_whole_batch(tmp_path):
    """Loss and accuracy are means over the batch, not of its last part (huggingface/trl#2371)."""
    dpo.main([*SHORT, "--accumulate", "16", "--out", str(tmp_path)])
    accuracies = [row["rewards/accuracy"] * 16 for row in log(tmp_path)]
    assert all(abs(a - round(a)) < 1e-6 for a in accuracies) and any(a % 16 for a in accuracies)


def test_bf16_arithmetic_keeps_fp32_weights(tmp_path):
    """--dtype bfloat16 computes in bf16 over fp32 master weights, so small updates are not lost."""
    dpo.main([*SHORT, "--dtype", "bfloat16", "--lr", "1e-6", "--out", str(tmp_path)])
    model, _ = hub.load_model(tmp_path)
    start, _ = hub.load_model("tiny")
    assert model.dtype == torch.float32
    assert 0 < (model.lm_head.weight - start.lm_head.weight).abs().max() < 1e-4
    assert log(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_own_data_and_random_gpt2_config(tmp_path):
    """A JSONL file and a folder with a config and GPT-2's kind of tokenizer but no weights."""
    from transformers import GPT2Config

    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((hub.TINY / name).read_bytes())
    GPT2Config.from_pretrained(hub.TINY, n_layer=1).save_pretrained(folder)
    rows = [{"prompt": f"Question {i}?", "chosen": f" Yes, {i}.", "rejected": " No way."}
            for i in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    after = dpo.main(["--data", str(data), "--model", str(folder), "--out", str(tmp_path / "out"),
                      *"--epochs 8 --batch_size 4 --max_new_tokens 8 --device cpu".split()])
    assert after["rewards/accuracy"] == 1.0 and "samples/true_reward" not in after
    assert len(log(tmp_path / "out")) == 24


def test_labelled_rows_for_kto(tmp_path):
    """{"prompt", "completion", "label"}: good answers gain on bad ones."""
    rows = [{"prompt": f"Question {i}?", "completion": " Yes." if i % 3 else " No.",
             "label": bool(i % 3)} for i in range(60)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    after = dpo.main(["--data", str(data), "--loss", "kto", "--out", str(tmp_path / "out"),
                      *"--epochs 4 --batch_size 8 --max_new_tokens 8 --device cpu".split()])
    assert after["rewards/margin"] > 0.05 and "rewards/accuracy" not in after


@pytest.mark.slow
def test_beta_holds_the_policy_back(tmp_path):
    """A higher beta ends nearer to the reference (one lecture says both that and the opposite)."""
    kl = []
    for beta in ("0.2", "5.0"):
        kl.append(dpo.main(["--pairs", "640", "--beta", beta, "--samples", "32", "--device", "cpu",
                            "--out", str(tmp_path)])["kl/policy_reference"])
    assert kl[0] > 1.5 * kl[1]


@pytest.mark.slow
def test_pretraining_is_deterministic(tmp_path):
    """The command that made tiny/, cut short: two runs, the same tokenizer and the same weights."""
    for out in "ab":
        sft.main(["--task", "pretrain", "--examples", "640", "--steps", "3", "--device", "cpu",
                  "--out", str(tmp_path / out)])
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    merges = [(tmp_path / out / "merges.txt").read_bytes() for out in "ab"]
    assert merges[0] == merges[1]
    assert (tmp_path / "a" / "vocab.json").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_readme_numbers_of_dpo(tmp_path, seed):
    """The default run, three seeds: what the README claims."""
    after = dpo.main(["--seed", seed, "--out", str(tmp_path), "--device", "cpu"])
    before = json.loads((tmp_path / "results.json").read_text())["before"]
    assert after["samples/true_reward"] - before["samples/true_reward"] >= 1.5
    assert after["samples/grammatical"] >= 0.9 and after["J/share_of_the_way"] >= 0.75
