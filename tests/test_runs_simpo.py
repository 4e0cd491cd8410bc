"""Whole runs of simpo.py, short: what they reach, that each objective is trained and each flag is
used, that they repeat, stop and go on exactly, and that what they log is what they say."""

import hashlib
import json
import math
import os
import signal
import time

import pytest
import torch

import model as hub
import simpo

SHORT = "--rankings 64 --batch_size 8 --steps 3 --samples 2 --device cpu".split()
WORDS = (" The cast was superb.", " It was dull.", " I liked the plot and the music.", " Well.")


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory):
    """A file of rankings of 2, 3 and 4 responses, of unequal lengths, not in the order of rank."""
    rows = []
    for i in range(24):
        texts = [WORDS[(i + j) % 4] + f" Film {i}." * (j % 3) for j in range(2 + i % 3)]
        ranks = [[2, 1], [3, 1, 2], [2, 4, 1, 3]][i % 3]
        rows.append({"prompt": "I saw it. " * (1 + i % 2) + f"Film {i}:", "responses": texts,
                     "ranks": ranks})
    return write(tmp_path_factory.mktemp("data") / "mixed.jsonl", rows)


@pytest.fixture
def bare(monkeypatch):
    """Runs without their evaluation and curves, for tests of the training alone."""
    monkeypatch.setattr(simpo, "evaluate", lambda *_: (
        {"before": {"x": 0.0}, "after": {"x": 0.0}}, []))
    monkeypatch.setattr(simpo, "plot", lambda *_: None)


# ------------------------------------------------------------------------------ what they reach


def test_simpo_raises_the_true_quality(tmp_path):
    """30 steps from tiny: quality rises by more than 0.12, though the human likes length; the text
    stays grammatical, the run leaves what the README promises, loadable by plain transformers."""
    flags = "--rankings 512 --lr 5e-4 --batch_size 16 --samples 2 --max_new_tokens 24 --device cpu"
    after = simpo.main([*flags.split(), "--out", str(tmp_path)])
    before = results(tmp_path)["before"]
    assert after["samples/quality"] > before["samples/quality"] + 0.12
    assert after["samples/grammatical"] > 0.9
    margin = lambda c: c["mean_logps/chosen"] - c["mean_logps/rejected"]
    assert margin(after) > margin(before) + 0.1 and after["rewards/accuracy"] > 0.8
    assert after["kl/policy_reference"] > 2 * after["kl/error"] > 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("I saw it.", return_tensors="pt").input_ids
    mine, _ = hub.load_model(tmp_path)
    start, _ = hub.load_model("tiny")
    with torch.no_grad():
        assert torch.allclose(plain.eval()(ids).logits, mine(ids).logits, atol=1e-4)
        assert not torch.allclose(start(ids).logits, mine(ids).logits, atol=1e-2)
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert "before" in (tmp_path / "samples.txt").read_text()
    assert not (tmp_path / "state.pt").exists()
    assert all(math.isfinite(x) for row in log(tmp_path) for x in row.values())


@pytest.mark.slow
def test_lesson_compares_four_runs(tmp_path):
    """--lesson leaves one table of all columns, the bars, and a run with its own flags for each."""
    simpo.main([*SHORT, "--lesson", "--max_new_tokens", "16", "--out", str(tmp_path)])
    columns = results(tmp_path)
    assert [*columns] == ["before", "simpo", "no margin", "sums", "sums b=.1"]
    assert (tmp_path / "lesson.png").stat().st_size > 5000
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert len(folders) == 4 and {"simpo", "no_margin", "sums"} < {*folders}
    used = {}
    for folder in folders:
        args = json.loads((tmp_path / folder / "args.json").read_text())
        used[folder] = [args[key] for key in ("loss", "beta", "gamma_beta_ratio", "lam")]
        assert (tmp_path / folder / "model.safetensors").exists()
        assert results(tmp_path / folder)["after"] in columns.values()
        assert results(tmp_path / folder)["before"] == columns["before"]
    assert used.pop("simpo") == ["simpo", 2.0, 0.5, None]
    assert used.pop("no_margin") == ["simpo", 2.0, 0.0, None]
    assert used.pop("sums") == ["cpo", 2.0, None, 0.0]
    assert [*used.values()] == [["cpo", 0.1, None, 0.0]]
    assert len({log(tmp_path / folder)[0]["loss"] for folder in folders}) == 4


def test_interrupted_lesson_says_where_it_is(tmp_path, bare, monkeypatch, capsys):
    """Ctrl-C in the second run of --lesson: it is not told that nothing was done, and the folder of
    that run does not claim flags that no command line could give again."""
    original = simpo.checkpoint

    def press(args, step, health, pressed, *rest, **more):
        if step == 2 and args.out.endswith("no_margin"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return original(args, step, health, pressed, *rest, **more)

    monkeypatch.setattr(simpo, "checkpoint", press)
    flags = [*SHORT, "--rankings", "24", "--out"]
    with pytest.raises(SystemExit) as stop:
        simpo.main([*flags, str(tmp_path), "--lesson"])
    assert stop.value.code == 130 and "before the first step" not in capsys.readouterr().err
    monkeypatch.setattr(simpo, "checkpoint", original)
    if (tmp_path / "no_margin" / "state.pt").exists():
        simpo.main([*flags, str(tmp_path / "no_margin"), "--gamma_beta_ratio", "0", "--resume"])
        assert [row["step"] for row in log(tmp_path / "no_margin")] == [1, 2, 3]


def test_one_sample_has_no_standard_error(tmp_path, mixed, capsys):
    """One sample of one held-out prompt: refused, or at least no NaN in results.json, which is no
    JSON for most readers."""
    try:
        simpo.main([*SHORT, *"--steps 1 --samples 1 --held_out 1 --data".split(), mixed,
                    "--out", str(tmp_path)])
    except SystemExit as stop:
        assert stop.code == 2 and "--samples 1" in capsys.readouterr().err
    else:
        assert "NaN" not in (tmp_path / "results.json").read_text()


# ------------------------------------------------------------------ every flag changes a number


def test_each_loss_is_another(tmp_path, mixed, bare):
    """No choice of --loss silently trains another (modelscope/ms-swift#10167)."""
    second = {}
    for loss in simpo.LOSSES:
        simpo.main([*SHORT, "--steps", "2", "--data", mixed, "--loss", loss,
                    "--out", str(tmp_path / loss)])
        second[loss] = log(tmp_path / loss)[1]["loss"]
    values = sorted(second.values())
    assert len(values) == 6 and all(math.isfinite(x) for x in values)
    assert all(b > a + 1e-3 * abs(a) for a, b in zip(values, values[1:])), second
    assert len({digest(tmp_path / loss) for loss in simpo.LOSSES}) == 6


@pytest.mark.parametrize("loss, flags", [
    ("simpo", ["--gamma_beta_ratio 1.5", "--beta 1"]), ("cpo", ["--beta 0.3", "--lam 0.5"]),
    ("orpo", ["--lam 0.5"]), ("slic", ["--delta 200", "--lam 0.5"]), ("rrhf", ["--sft_weight 0.5"]),
    ("pro", ["--sft_weight 0.5"])])
def test_each_flag_of_a_loss_is_used(tmp_path, loss, flags, mixed, bare):
    """A flag that the loss has changes its first number, and its gradient."""
    seen = []
    for i, flag in enumerate(["", *flags]):
        simpo.main([*SHORT, "--steps", "1", "--data", mixed, "--loss", loss, *flag.split(),
                    "--out", str(tmp_path / str(i))])
        seen.append(log(tmp_path / str(i))[0])
    for row in seen[1:]:
        assert abs(row["loss"] / seen[0]["loss"] - 1) > 0.01
        assert abs(row["grad_norm"] / seen[0]["grad_norm"] - 1) > 0.01
        assert row["logps/chosen"] == seen[0]["logps/chosen"]  # before any update


def test_flags_of_the_toy_are_used(tmp_path, tiny, bare, capsys):
    """--k makes more pairs of as many posts; --length_bias makes the longer summary preferred."""
    pairs, losses = {}, set()
    for name, flags in (("as given", ""), ("k", "--k 3"), ("no bias", "--length_bias 0")):
        capsys.readouterr()
        simpo.main([*SHORT, *"--rankings 24 --batch_size 99 --steps 1".split(), *flags.split(),
                    "--out", str(tmp_path)])
        pairs[name] = int(capsys.readouterr().out.split()[0])
        losses.add(log(tmp_path)[0]["loss"])
    assert pairs["k"] > 1.8 * pairs["as given"] > 24 and len(losses) == 3
    share = []
    for bias in (0.0, 1.0, 9.0):
        rows = [simpo.best_first((row["responses"], row["ranks"]))[0]
                for row in simpo.toy_rankings(*tiny, 64, 2, bias, 0)]
        words = [[len(text.split()) for text in texts] for texts in rows]
        unequal = [w > l for w, l in words if w != l]
        share.append(sum(unequal) / len(unequal))
    assert share[0] < share[1] - 0.05 < share[2] - 0.1 and share[2] > 0.97, share


# ------------------------------------------------------------------------ pairs and rankings


@pytest.mark.parametrize("loss", ["simpo", "pro"])
def test_a_pair_is_a_ranking_of_two(tmp_path, loss, bare):
    """A pair file, rankings of two, and these the other way round give the same run."""
    rows = [{"prompt": f"Film {i}:", "chosen": WORDS[i % 4], "rejected": WORDS[(i + 1) % 4]}
            for i in range(12)]
    ranked = [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]], "ranks": [1, 2]}
              for r in rows]
    turned = [r | {"responses": r["responses"][::-1], "ranks": [2, 1]} for r in ranked]
    wrong = [r | {"ranks": [2, 1]} for r in ranked]
    logs = []
    for name, data in (("pairs", rows), ("ranked", ranked), ("turned", turned), ("wrong", wrong)):
        path = write(tmp_path / f"{name}.jsonl", data)
        simpo.main([*SHORT, "--loss", loss, "--data", path, "--out", str(tmp_path / name)])
        logs.append(log(tmp_path / name))
    assert logs[0] == logs[1] == logs[2]
    assert abs(logs[0][0]["loss"] - logs[3][0]["loss"]) > 0.01


def test_a_ranking_of_four_is_six_pairs_or_one_row(tmp_path, bare, capsys, monkeypatch):
    """SimPO takes each strictly ordered pair of a ranking, RRHF and PRO the whole of it; the worst
    of each ranking, which has fewer responses than others too, is what is logged as rejected."""
    rows = [{"prompt": f"Film {i}:", "responses": [*WORDS], "ranks": [2, 4, 1, 3]}
            for i in range(5)]
    rows[1:] = [r | {"ranks": [2, 2, 1, 3]} for r in rows[1:]]  # five pairs, for two are tied
    held = lambda seed: hub.split_by_prompt(rows, 1, seed)[1][0] is rows[0]
    seed = str(next(seed for seed in range(99) if not held(seed)))
    path, seen = write(tmp_path / "data.jsonl", rows), {}
    for loss, first in (("simpo", "21 pairs, 5 pairs held out"),
                        ("rrhf", "4 rankings, 5 pairs held out"),
                        ("pro", "4 rankings, 5 pairs held out")):
        original = simpo.LOSSES[loss]
        monkeypatch.setitem(simpo.LOSSES, loss, lambda y, n, s, m, a: (
            seen.update({a.loss: (n, s, m)}), original(y, n, s, m, a))[1])
        capsys.readouterr()
        simpo.main([*SHORT, "--batch_size", "99", "--steps", "1", "--loss", loss, "--seed", seed,
                    "--data", path, "--out", str(tmp_path / loss)])
        assert capsys.readouterr().out.startswith(first)
    lengths, scores, mask = seen["simpo"]
    assert lengths.shape == (21, 2) and mask.all() and scores.tolist() == [[1, 0]] * 21
    _, tokenizer = hub.load_model("tiny")
    n = [len(tokenizer.encode(text)) + 1 for text in WORDS]
    for loss in ("rrhf", "pro"):
        lengths, scores, mask = seen[loss]
        assert mask.all() and sorted(scores.tolist()) == [[2, 1, 1, 0]] * 3 + [[3, 2, 1, 0]]
        for row, s in zip(lengths.tolist(), scores.tolist()):  # best response first
            assert row == [n[i] for i in ((2, 0, 3, 1) if s[0] == 3 else (2, 0, 1, 3))]


# ----------------------------------------------------------------- the same, stopped, in parts


def test_same_seed_same_weights(tmp_path, bare):
    """Two runs with one seed leave the same file, another seed leaves another."""
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(ord(out))
        simpo.main([*SHORT, "--rankings", "8", "--seed", seed, "--out", str(tmp_path / out)])
    a, b, c = (digest(tmp_path / out) for out in "abc")
    assert a == b != c


@pytest.mark.parametrize("extra", [
    ["--loss", "simpo"], ["--lora_rank", "2"],
    pytest.param(["--loss", "pro"], marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted(tmp_path, extra, monkeypatch, capsys):
    """Ctrl-C after three steps and --resume: the same bits, weights and metrics, as without
    (pytorch/rl#4188, NVIDIA-NeMo/RL#3171)."""
    monkeypatch.setattr(simpo, "plot", lambda *_: None)
    # 24 posts in batches of 8: the last steps are of the second epoch
    extra = [*SHORT, *"--steps 6 --rankings 24 --max_new_tokens 12".split(), *extra]
    simpo.main([*extra, "--out", str(tmp_path / "whole")])
    original = simpo.checkpoint

    def press(args, step, health, pressed, *rest, **more):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs, and fills the list
        return original(args, step, health, pressed, *rest, **more)

    monkeypatch.setattr(simpo, "checkpoint", press)
    with pytest.raises(SystemExit) as stop:
        simpo.main([*extra, "--out", str(tmp_path / "parts")])
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
    assert len(log(tmp_path / "parts")) == 3
    monkeypatch.setattr(simpo, "checkpoint", original)
    torch.manual_seed(99)
    simpo.main([*extra, "--out", str(tmp_path / "parts"), "--resume"])
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    assert results(tmp_path / "whole") == results(tmp_path / "parts")


@pytest.mark.parametrize("loss", ["simpo", "orpo", "rrhf", "pro"])
def test_accumulation_changes_nothing(tmp_path, loss, mixed, bare):
    """A batch at once, in unequal parts, or each example by itself, of sequences of unequal lengths
    and rankings of unequal K: the same gradient, and all that is logged is of the whole batch
    (huggingface/transformers#34191 and huggingface/trl#2371: means of parts, or the last part)."""
    logs = []
    for accumulate in ("1", "3", "7"):
        simpo.main([*SHORT, "--batch_size", "7", "--data", mixed, "--loss", loss,
                    "--accumulate", accumulate, "--out", str(tmp_path / accumulate)])
        logs.append(log(tmp_path / accumulate))
    for parts in logs[1:]:
        for one, other in zip(logs[0], parts, strict=True):
            for key in one.keys() - {"padding"}:
                rel = 2e-3 if key == "grad_norm" else 2e-4
                assert one[key] == pytest.approx(other[key], rel=rel, abs=2e-5), key
    assert logs[0][0]["loss"] != 0 and logs[0][0]["grad_norm"] > 0.01


# ------------------------------------------------------------------------- the parts of a step


@pytest.mark.parametrize("loss", ["simpo", "pro"])
def test_first_step_is_that_of_plain_logits(tmp_path, loss, mixed, bare, monkeypatch):
    """What the first step logs, and the gradient that it takes, equal plain autograd on logits of
    single unpadded sequences: means over tokens, EOS included; gamma is ratio times beta, as
    gamma means four things (huggingface/trl#5071); PRO as its equation, in two loops."""
    taken = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(simpo.nn.utils, "clip_grad_norm_", lambda weights, most: (
        taken.extend(w.grad.clone() for w in weights), clip(weights, most))[1])
    own = {"simpo": "--beta 3 --gamma_beta_ratio 0.4", "pro": "--sft_weight 0.3"}[loss]
    simpo.main([*SHORT, *"--batch_size 99 --steps 1 --held_out 1 --loss".split(), loss,
                *own.split(), "--data", mixed, "--out", str(tmp_path)])
    row, = log(tmp_path)
    rows = [json.loads(line) for line in open(mixed, encoding="utf-8")]
    model, tokenizer = hub.load_model("tiny")
    losses, sides = [], []
    for example in hub.split_by_prompt(rows, 1, 0)[0]:
        texts = [t for _, t in sorted(zip(example["ranks"], example["responses"]))]  # best first
        y, p = [], []
        for text in texts:
            prompt = tokenizer.encode_prompt(example["prompt"])
            response = tokenizer.encode(text) + [tokenizer.eos_id]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
            logps = logits.log_softmax(1)[range(len(response)), response]
            y.append(logps.sum())
            p.append(logps.mean())
        K = len(texts)
        if loss == "simpo":
            pairs = [(w, l) for w in range(K) for l in range(w + 1, K)]
            losses += [-torch.sigmoid(3 * (p[w] - p[l]) - 1.2).log() for w, l in pairs]
        else:
            pairs, total = [(0, K - 1)], -0.3 * y[0]
            for k in range(K - 1):  # 1/T is the difference of the ranks
                own = torch.exp(p[k] * (K - 1 - k))
                total = total - torch.log(own / (own + sum(
                    torch.exp(p[i] * (i - k)) for i in range(k + 1, K))))
            losses.append(total)
        sides += [(y[w].item(), y[l].item(), p[w].item(), p[l].item()) for w, l in pairs]
    mean = torch.stack(losses).mean()
    mean.backward()
    assert row["loss"] == pytest.approx(mean.item(), rel=1e-4)
    for key, values in zip(("logps/chosen", "logps/rejected", "mean_logps/chosen",
                            "mean_logps/rejected"), zip(*sides)):
        assert row[key] == pytest.approx(sum(values) / len(values), rel=1e-4)
    right = sum(a > b for _, _, a, b in sides) / len(sides)
    assert row["rewards/accuracy"] == pytest.approx(right) and 0.05 < right < 0.95
    for weight, grad in zip(model.parameters(), taken, strict=True):
        assert torch.allclose(weight.grad, grad, atol=2e-5, rtol=1e-3)
    assert row["grad_norm"] > 0.01


def test_no_reference_model_before_training_ends(tmp_path, mixed, monkeypatch):
    """One model is loaded before the loop; the second, bit for bit the start and sharing nothing
    with the policy, only after the last update (huggingface/trl#1104, YiyangZhou/POVID#11)."""
    events, seen = [], {}

    def spy(name):
        original = getattr(simpo, name)
        monkeypatch.setattr(simpo, name, lambda *args, **rest: (
            events.append(name), original(*args, **rest))[1])

    for name in ("load_model", "checkpoint", "save_state"):
        spy(name)
    monkeypatch.setattr(simpo, "plot", lambda *_: None)
    monkeypatch.setattr(simpo, "evaluate", lambda policy, reference, *_: (
        seen.update(policy=policy, reference=reference),
        ({"before": {"x": 0.0}, "after": {"x": 0.0}}, []))[1])
    simpo.main([*SHORT, "--data", mixed, "--out", str(tmp_path)])
    assert events == ["load_model", *["checkpoint"] * 3, "save_state", "load_model"]
    start, _ = hub.load_model("tiny")
    for old, reference, policy in zip(*(m.parameters() for m in (
            start, seen["reference"], seen["policy"])), strict=True):
        assert torch.equal(old, reference) and reference.data_ptr() != policy.data_ptr()
    assert not torch.equal(start.lm_head.weight, seen["policy"].lm_head.weight)


def test_kl_is_zero_before_training(tmp_path):
    """With a learning rate of next to nothing the policy is its start: the KL is 0, and all columns
    agree; with a large one they do not, and the KL is above its error."""
    for lr in ("1e-30", "3e-3"):
        after = simpo.main([*SHORT, "--rankings", "24", "--lr", lr, "--out", str(tmp_path)])
        before = results(tmp_path)["before"]
        assert before["kl/policy_reference"] == 0 and {*before} == {*after} - {"kl/error"}
        if lr == "1e-30":
            assert after == before | {"kl/error": 0.0}
    assert after["kl/policy_reference"] > 2 * after["kl/error"] > 0
    assert after["logps/chosen"] != before["logps/chosen"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_the_readmes_numbers(tmp_path, seed):
    """The default run, three seeds: quality up by 0.25, grammar kept."""
    after = simpo.main(["--seed", seed, "--device", "cpu", "--out", str(tmp_path)])
    before = json.loads((tmp_path / "results.json").read_text())["before"]
    assert after["samples/quality"] > before["samples/quality"] + 0.25
    assert after["samples/grammatical"] > 0.95
