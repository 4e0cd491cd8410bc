"""Whole runs of reward_model.py and ppo_rlhf.py, short: what they reach, what they leave, that they
repeat, stop and go on exactly, and that what they compute is what they say."""

import hashlib
import json
import math
import os
import signal
import time

import pytest
import torch

import model as hub
import ppo_rlhf
import reward_model

PPO = "--batch_size 8 --n 2 --samples 2 --steps 4 --device cpu".split()
REWARD = "--batch_size 8 --samples 8 --steps 6 --max_new_tokens 9 --held_out 4 --device cpu".split()


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    """(folder, final metrics) of 40 steps of reward_model.py from tiny, on the toy."""
    folder = tmp_path_factory.mktemp("reward")
    flags = "--steps 40 --rankings 640 --lr 2e-3 --seed 1 --device cpu".split()
    return folder, reward_model.main([*flags, "--out", str(folder)])


@pytest.fixture(scope="module")
def trained(reward_run):
    """The reward model of `reward_run`, loaded as ppo_rlhf.py loads it, and its tokenizer."""
    return hub.load_model(reward_run[0], head="reward")


@pytest.fixture(scope="module")
def flags_of(tiny, tmp_path_factory):
    """The flags of a short run, by script: reward_model.py reads rankings of the toy from a file,
    which saves it the drawing of them."""
    data = tmp_path_factory.mktemp("data") / "rankings.jsonl"
    data.write_text("\n".join(map(json.dumps, reward_model.toy_rankings(*tiny, 64, 4, 1))))
    return {reward_model: ["--data", str(data), *REWARD], ppo_rlhf: PPO}


def sequences_of(tokenizer, count=6):
    """Prompts and responses of different lengths, as ids, each response with its EOS."""
    return [tokenizer.encode_example(
        "I saw the film last night." * (1 + i % 2), " The cast was superb." * (i % 3) + " Well.",
        512) for i in range(count)]


# ------------------------------------------------------------------------------ what they reach


def test_reward_model_finds_the_true_reward(reward_run):
    """40 steps: held-out pairs are ranked well, by what is nearly the true reward's order, and the
    run leaves what the docstrings promise."""
    folder, after = reward_run
    before = results(folder)["before"]
    assert after["pairs/accuracy"] > 0.65 and after["true_reward/rank_correlation"] > 0.7
    assert after["pairs/accuracy"] < after["pairs/ceiling"] + 0.05 < 0.9
    assert abs(before["true_reward/rank_correlation"]) < 0.3 and before["pairs/accuracy"] < 0.6
    assert after["pairs/loss"] < before["pairs/loss"] - 0.05
    assert len(log(folder)) == 40 and not (folder / "state.pt").exists()
    assert (folder / "curves.png").stat().st_size > 5000
    assert "rank 1, score" in (folder / "samples.txt").read_text()


def test_scores_of_fresh_samples_are_normalised(tiny, trained, reward_run):
    """On samples of the reference that it was not normalised by, mean 0 and SD 1: the gain and bias
    are in the saved weights, not beside them. Another gain and bias are found as well."""
    policy, tokenizer = tiny
    prompts = [tokenizer.encode_prompt(p) for p in ppo_rlhf.toy_prompts(held_out=True)] * 10
    drawn, _ = reward_model.sample(policy, tokenizer, prompts, 64, seed=77)
    drawn, plain = list(zip(prompts, drawn)), torch.autocast("cpu", enabled=False)
    scores = reward_model.rate(trained[0], drawn, plain)
    assert abs(reward_run[1]["normalization/bias"]) > 0.5  # so there was something to do
    assert abs(float(scores.mean())) < 0.2 and abs(float(scores.std()) - 1) < 0.2
    spoilt, _ = hub.load_model(reward_run[0], head="reward")
    with torch.no_grad():
        spoilt.score.weight.mul_(3)
        spoilt.transformer.ln_f.bias.add_(0.2 * spoilt.score.weight[0].sign())
    assert abs(float(reward_model.rate(spoilt, drawn, plain).mean())) > 1
    reward_model.normalize(spoilt, drawn, plain)
    again = reward_model.rate(spoilt, drawn, plain)
    assert torch.allclose(again, (scores - scores.mean()) / scores.std(correction=0), atol=1e-3)


def test_ppo_raises_the_true_reward(tmp_path):
    """A dozen steps from tiny: the true reward rises by far more than 0.3 and so does J, which pays
    for KL; the text stays grammatical; the model loads."""
    flags = "--steps 12 --batch_size 32 --lr 5e-4 --samples 16 --device cpu --out".split()
    after = ppo_rlhf.main([*flags, str(tmp_path)])
    before = results(tmp_path)["before"]
    assert after["samples/true_reward"] > before["samples/true_reward"] + 0.3
    assert after["samples/grammatical"] > 0.85 and after["samples/without_eos"] < 0.1
    assert after["J/policy"] > after["J/reference"] + 0.3
    assert after["kl/policy_reference"] > 3 * after["kl/error"]
    rows = log(tmp_path)
    assert len(rows) == 12 and not (tmp_path / "state.pt").exists()
    assert rows[0]["kl/policy_reference"] == pytest.approx(0, abs=1e-4) and rows[0]["kl/k3"] < 1e-6
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert (tmp_path / "curves.png").stat().st_size > 5000
    mine, _ = hub.load_model(tmp_path)
    start, _ = hub.load_model("tiny")
    assert not torch.equal(mine.lm_head.weight, start.lm_head.weight)


@pytest.mark.slow
def test_ppo_climbs_the_reward_model(tmp_path, reward_run):
    """With a reward model that ranks well, its scores rise and the true reward follows."""
    flags = "--steps 8 --batch_size 32 --lr 5e-4 --samples 16 --device cpu --out".split()
    after = ppo_rlhf.main([*flags, str(tmp_path), "--reward_model", str(reward_run[0])])
    before = results(tmp_path)["before"]
    assert abs(before["scores/mean"]) < 0.4 and after["scores/mean"] > before["scores/mean"] + 0.3
    assert after["samples/true_reward"] > before["samples/true_reward"] + 0.3


def test_raft_raises_the_true_reward(tmp_path):
    """RAFT imitates the best of each four samples: a dozen steps, and no value network."""
    after = ppo_rlhf.main([*"--algo raft --steps 12 --samples 16 --device cpu".split(),
                           "--out", str(tmp_path)])
    before = results(tmp_path)["before"]
    assert after["samples/true_reward"] > before["samples/true_reward"] + 0.3
    assert not any(key.startswith("value/") for key in log(tmp_path)[0])


def test_best_of_n_needs_no_training(tmp_path):
    """The best of four is better, its measured KL keeps to log n - (n - 1)/n, no model is left."""
    after = ppo_rlhf.main([*"--algo best_of_n --samples 16 --device cpu --out".split(),
                           str(tmp_path)])
    before = results(tmp_path)["before"]
    assert after["samples/true_reward"] > before["samples/true_reward"] + 0.5
    assert after["kl/bound"] == pytest.approx(math.log(4) - 3 / 4)
    assert 0.2 < after["kl/policy_reference"] < after["kl/bound"] + 3 * after["kl/error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "args.json", "curves.png", "metrics.jsonl", "results.json", "samples.txt"]
    assert log(tmp_path) == []


# ----------------------------------------------------------------- the same, stopped, in parts


@pytest.mark.parametrize("script", [reward_model, ppo_rlhf])
def test_same_seed_same_weights(tmp_path, script, flags_of):
    """Two runs with one seed leave the same file, another seed leaves another."""
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(ord(out))
        script.main([*flags_of[script], "--steps", "2", "--seed", seed,
                     "--out", str(tmp_path / out)])
    a, b, c = (digest(tmp_path / out) for out in "abc")
    assert a == b != c


@pytest.mark.parametrize("script, extra", [
    (reward_model, []), (ppo_rlhf, ["--kl_target", "1"]), (ppo_rlhf, ["--algo", "raft"]),
    pytest.param(reward_model, ["--lora_rank", "2"], marks=pytest.mark.slow),
    pytest.param(ppo_rlhf, ["--lora_rank", "2"], marks=pytest.mark.slow),
    pytest.param(ppo_rlhf, ["--relabel_every", "2", "--relabel_rankings", "8"],
                 marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted(tmp_path, script, extra, flags_of, reward_run, monkeypatch,
                                      capsys):
    """Ctrl-C after three steps and --resume: the same bits, weights and metrics, as without
    (pytorch/rl#4188, NVIDIA-NeMo/RL#3171), the adapted beta and a moving reward model included."""
    extra = [*flags_of[script], *extra]
    if "--relabel_every" in extra:
        extra += ["--reward_model", str(reward_run[0])]
    script.main([*extra, "--out", str(tmp_path / "whole")])
    original = script.checkpoint

    def press(args, step, health, pressed, *rest, **more):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs, and fills the list
        return original(args, step, health, pressed, *rest, **more)

    monkeypatch.setattr(script, "checkpoint", press)
    with pytest.raises(SystemExit) as stop:
        script.main([*extra, "--out", str(tmp_path / "parts")])
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
    assert len(log(tmp_path / "parts")) == 3
    monkeypatch.setattr(script, "checkpoint", original)
    torch.manual_seed(99)
    script.main([*extra, "--out", str(tmp_path / "parts"), "--resume"])
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    assert results(tmp_path / "whole") == results(tmp_path / "parts")
    if "--relabel_every" in extra:
        assert digest(tmp_path / "whole/reward_model") == digest(tmp_path / "parts/reward_model")


@pytest.mark.parametrize("script, extra, keys", [
    (reward_model, [], ("loss", "grad_norm", "scores/std")),
    (ppo_rlhf, ["--ptx_coef", "1"], ("policy/loss", "value/loss", "ptx/loss", "policy/grad_norm",
                                     "value/grad_norm", "policy/clip_fraction")),
    (ppo_rlhf, ["--algo", "raft"], ("policy/loss", "policy/grad_norm"))])
def test_accumulation_changes_nothing(tmp_path, script, extra, keys, flags_of):
    """A batch at once, or in unequal parts of sequences of unequal lengths: the same gradient and
    the same logged loss (huggingface/transformers#34191: a mean of part means is off)."""
    if "--ptx_coef" in extra:
        texts = ["The cast was superb.", "It was dull. " * 9, "A film of some length, I think."]
        (tmp_path / "ptx.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
        extra = [*extra, "--ptx_data", str(tmp_path / "ptx.jsonl")]
    logs = []
    for accumulate in ("1", "5"):
        out = tmp_path / accumulate
        script.main([*flags_of[script], *extra, "--steps", "2", "--accumulate", accumulate,
                     "--out", str(out)])
        logs.append(log(out))
    for one, parts in zip(*logs, strict=True):
        for key in keys:
            assert one[key] == pytest.approx(parts[key], rel=2e-3, abs=2e-5), key
    assert logs[0][0][keys[0]] != 0


def test_loss_best_of_k_is_another_loss(tmp_path, flags_of):
    """--loss best_of_k is not ignored: with a first score near equal, log K instead of log 2
    (modelscope/ms-swift#10167 trained one loss whatever was asked for)."""
    first = {}
    for loss in ("ranking", "best_of_k"):
        reward_model.main([*flags_of[reward_model], "--steps", "1", "--loss", loss,
                           "--out", str(tmp_path)])
        first[loss] = log(tmp_path)[0]["loss"]
    assert first["ranking"] == pytest.approx(math.log(2), abs=0.3)
    assert first["best_of_k"] == pytest.approx(math.log(4), abs=0.5)
    assert first["best_of_k"] > first["ranking"] + 0.3


# -------------------------------------------------------------------- the parts of a step of PPO


def test_reference_stays_and_policy_moves(tmp_path, monkeypatch):
    """After training the reference is bit for bit the start, shares no storage with the policy, and
    the policy is another (huggingface/trl#1104, YiyangZhou/POVID#11)."""
    seen = {}

    def spy(policy, reference, *rest):
        seen.update(policy=policy, reference=reference)
        return {"before": {"x": 0.0}, "after": {"x": 0.0}}, [], None

    monkeypatch.setattr(ppo_rlhf, "evaluate", spy)
    ppo_rlhf.main([*PPO, "--steps", "2", "--out", str(tmp_path)])
    start, _ = hub.load_model("tiny")
    for old, reference, policy in zip(*(m.parameters() for m in (
            start, seen["reference"], seen["policy"])), strict=True):
        assert torch.equal(old, reference) and reference.data_ptr() != policy.data_ptr()
    assert not torch.equal(start.lm_head.weight, seen["policy"].lm_head.weight)


def test_gradients_of_policy_and_value(tmp_path, reward_run, monkeypatch):
    """Before any update the policy's gradient is that of -mean A log pi, the value network's that
    of half the squared error of its own values, nothing else, both by plain autograd on logits
    of unpadded sequences."""
    calls, grads = {}, []

    def spy(name):
        original = getattr(ppo_rlhf, name)

        def call(*args, **rest):
            calls.setdefault(name, []).append(args)
            return original(*args, **rest)

        monkeypatch.setattr(ppo_rlhf, name, call)

    for name in ("policy_loss", "value_loss", "per_token"):
        spy(name)
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(ppo_rlhf.nn.utils, "clip_grad_norm_", lambda weights, most: (
        grads.append([w.grad.clone() for w in weights]), clip(weights, most))[1])
    flags = "--ppo_epochs 1 --minibatches 1 --batch_size 8 --steps 1 --samples 2 --device cpu"
    ppo_rlhf.main([*flags.split(), "--reward_model", str(reward_run[0]), "--out", str(tmp_path)])

    sequences = calls["per_token"][0][2]
    (new, _, advantages, mask, _, tokens), = calls["policy_loss"]
    (_, _, returns, _, _, _), = calls["value_loss"]
    assert int(tokens) == int(mask.sum()) == sum(len(r) for _, r in sequences)
    policy, _ = hub.load_model("tiny")
    value, _ = hub.load_model(reward_run[0], head="reward")
    assert len(sequences) == 8 and len({len(r) for _, r in sequences}) > 1
    for prompt, response in sequences:
        ids, n = torch.tensor([prompt + response]), len(response)
        logps = policy(ids).logits[0, -n - 1:-1].log_softmax(1)[range(n), response]  # (n,)
        # Minibatches are shuffled: find the row by its log-probs.
        row = next(i for i in range(8) if int(mask[i].sum()) == n and torch.allclose(
            new[i, :n].detach(), logps.detach(), atol=1e-4))
        (-(advantages[row, :n] * logps).sum() / tokens).backward()
        values = value.score(value.base_model(ids).last_hidden_state[0, -n - 1:-1])[:, 0]  # (n,)
        (0.5 * ((values - returns[row, :n]) ** 2).sum() / tokens).backward()
    for network, seen in zip((policy, value), grads, strict=True):
        for weight, grad in zip(network.parameters(), seen, strict=True):
            assert torch.allclose(weight.grad, grad, atol=2e-5, rtol=1e-3)
        assert sum(float(grad.square().sum()) for grad in seen) > 1e-6


@pytest.mark.parametrize("extra", [[], ["--dtype", "bfloat16"]])
def test_ratio_is_one_without_learning(tmp_path, extra, reward_run):
    """With a learning rate of next to nothing pi/pi_old stays 1 over all epochs and minibatches,
    prompts of different lengths padded together; in bf16 nearly (CarperAI/trlx#107, #508,
    NVIDIA/NeMo-Aligner#68)."""
    prompts = [{"prompt": "I saw the film. " * (1 + i % 4)} | {"n": i} for i in range(12)]
    prompts = [row | {"prompt": row["prompt"] + f"Number {row['n']}."} for row in prompts]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    ppo_rlhf.main([*PPO, "--steps", "2", "--lr", "1e-12", "--data", str(tmp_path / "data.jsonl"),
                   "--reward_model", str(reward_run[0]), *extra, "--out", str(tmp_path / "out")])
    for row in log(tmp_path / "out"):
        assert row["policy/kl_old"] < (1e-9 if not extra else 1e-3)
        assert row["policy/clip_fraction"] == 0 or extra
        assert abs(row["kl/policy_reference"]) < (1e-4 if not extra else 0.1)


def test_scored_otherwise_than_drawn(tmp_path, monkeypatch, capsys):
    """Were pi scored otherwise in the update than before it, the first ratio would not be 1: the
    run stops and says so, instead of learning from it (huggingface/trl#454)."""
    original = ppo_rlhf.token_logps
    shifted = lambda model, batch: original(model, batch) + 0.01 * torch.is_grad_enabled()
    monkeypatch.setattr(ppo_rlhf, "token_logps", shifted)
    with pytest.raises(SystemExit) as stop:
        ppo_rlhf.main([*PPO, "--out", str(tmp_path)])
    assert stop.value.code == 2 and "pi/pi_old is off 1 by 1.0e-02" in capsys.readouterr().err


def test_kl_target_moves_beta(tmp_path):
    """Beta falls by at most 2 % a step while the KL is below the target: Ziegler et al. 2019, 2.2;
    without a target it stays."""
    for extra, ratio in ((["--kl_target", "5"], 0.98), ([], 1.0)):
        ppo_rlhf.main([*PPO, *extra, "--steps", "3", "--out", str(tmp_path)])
        betas = [row["kl/beta"] for row in log(tmp_path)]
        assert betas == pytest.approx([0.5 * ratio**i for i in range(3)])


def test_response_without_end_scores_what_the_flag_says(tmp_path):
    """Cut by --max_new_tokens, no response has an EOS: each scores --missing_eos_score."""
    ppo_rlhf.main([*PPO, *"--max_new_tokens 3 --missing_eos_score -2.5 --steps 1 --out".split(),
                   str(tmp_path)])
    row, = log(tmp_path)
    assert row["scores/mean"] == -2.5 and row["samples/without_eos"] == 1
    assert row["samples/tokens"] == 3 and results(tmp_path)["before"]["scores/mean"] == -2.5


@pytest.mark.slow
def test_relabelling_trains_the_reward_model(tmp_path, reward_run):
    """--relabel_every leaves another reward model, that loads, is normalised, and did not change
    the one that it was made from."""
    before = digest(reward_run[0])
    ppo_rlhf.main([*PPO, *"--steps 2 --relabel_every 2 --relabel_rankings 32".split(),
                   "--reward_model", str(reward_run[0]), "--out", str(tmp_path)])
    assert digest(reward_run[0]) == before != digest(tmp_path / "reward_model")
    moved, tokenizer = hub.load_model(tmp_path / "reward_model", head="reward")
    policy, _ = hub.load_model("tiny")
    prompts = [tokenizer.encode_prompt(p) for p in ppo_rlhf.toy_prompts(held_out=True)] * 4
    drawn, _ = reward_model.sample(policy, tokenizer, prompts, 64, seed=7)
    scores = reward_model.rate(moved, list(zip(prompts, drawn)), torch.autocast(
        "cpu", enabled=False))
    assert abs(float(scores.mean())) < 0.3 and abs(float(scores.std()) - 1) < 0.3


# ------------------------------------------------------------------------------------ the scores


def test_score_does_not_depend_on_the_batch(trained):
    """Alone, in a padded batch, or padded further: the same score, whatever ids the pads have
    (allenai/reward-bench#137, huggingface/transformers#35352)."""
    model, tokenizer = trained
    sequences = sequences_of(tokenizer)
    with torch.no_grad():
        batch = reward_model.reward_scores(model, reward_model.collate(sequences, "cpu"))
        alone = torch.cat([reward_model.reward_scores(model, reward_model.collate([s], "cpu"))
                           for s in sequences])
        assert torch.allclose(batch, alone, atol=1e-5) and float(batch.std()) > 0.05
        padded = reward_model.collate(sequences, "cpu")
        more = torch.nn.functional.pad
        for pads, pad in ((0, 5), (5, tokenizer.eos_id), (5, 7)):
            ids = more(padded["input_ids"], (0, pads), value=pad)
            mask = more(padded["attention_mask"], (0, pads))
            ids = ids.where(mask.bool(), torch.tensor(pad))
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            last = torch.arange(len(ids)) * ids.shape[1] + mask.sum(1) - 1  # (B,) of B*T
            scores = reward_model.reward_scores(model, {
                "input_ids": ids, "attention_mask": mask, "position_ids": positions, "last": last})
            assert torch.allclose(scores, alone, atol=1e-5)


def test_score_reads_the_last_real_token(trained):
    """It moves if the last token, EOS, is another; an EOS inside the prompt, as of several turns,
    hides nothing behind it (RLHFlow/RLHF-Reward-Modeling#49)."""
    model, tokenizer = trained
    score = lambda pairs: reward_model.rate(model, pairs, torch.autocast("cpu", enabled=False))
    sequences = sequences_of(tokenizer)
    other = [(p, r[:-1] + [tokenizer.encode(" dull")[0]]) for p, r in sequences]
    assert ((score(sequences) - score(other)).abs() > 1e-3).all()
    prompt, response = sequences[0]
    turns = prompt + [tokenizer.eos_id] + prompt
    good, bad = (tokenizer.encode(f" The cast was {x}.") + [tokenizer.eos_id]
                 for x in ("superb", "awful"))
    scores = score([(turns, good), (turns, bad), (turns, response)])
    assert scores[0] > scores[1] + 0.1


def test_plain_transformers_loads_a_reward_model(reward_run, trained):
    """One label. As pad is EOS, transformers reads the token before the final EOS; told that there
    is no pad, the last one, as this repository does (huggingface/transformers#35352)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    plain = AutoModelForSequenceClassification.from_pretrained(reward_run[0]).eval()
    model, tokenizer = trained
    assert plain.config.num_labels == 1 and plain.config.pad_token_id == tokenizer.eos_id
    text = AutoTokenizer.from_pretrained(reward_run[0])
    score = lambda p, r: float(reward_model.rate(model, [(p, r)], torch.autocast(
        "cpu", enabled=False)))
    with torch.no_grad():
        for prompt, response in sequences_of(tokenizer):
            ids = torch.tensor([prompt + response])
            assert text.decode(ids[0, 1:-1]) == tokenizer.decode(prompt + response)
            plain.config.pad_token_id = tokenizer.eos_id
            before_eos = float(plain(ids).logits)
            plain.config.pad_token_id = None
            at_eos = float(plain(ids).logits)
            assert before_eos == pytest.approx(score(prompt, response[:-1]), abs=1e-4)
            assert at_eos == pytest.approx(score(prompt, response), abs=1e-4)
            assert abs(at_eos - before_eos) > 1e-3


def test_both_scripts_score_alike(trained):
    """What the reward model is trained on and what PPO gives it are the same ids: prompt, response
    and EOS (OpenRLHF/OpenRLHF#300, CarperAI/trlx#420 had EOS in one of them only)."""
    model, tokenizer = trained
    args = ppo_rlhf.parse_args([])
    prompt, texts = "I saw the film.", [" The cast was superb.", " The plot was dull. It was long."]
    (examples, _), = reward_model.encode_rankings(
        tokenizer, [{"prompt": prompt, "responses": texts, "ranks": [1, 2]}], 512, "ranking")[0]
    plain = torch.autocast("cpu", enabled=False)
    sampled = [tokenizer.encode(text) + [tokenizer.eos_id] for text in texts]
    scores, read = ppo_rlhf.judge(trained, tokenizer, [prompt] * 2, sampled, args, plain)
    assert read == texts
    assert torch.allclose(scores, reward_model.rate(model, examples, plain), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_the_readmes_numbers(tmp_path, seed):
    """Whole runs: the reward model within 0.03 of its ceiling, PPO most of the way to J*."""
    after = reward_model.main(["--seed", seed, "--out", str(tmp_path / "reward_model")])
    assert after["pairs/accuracy"] > after["pairs/ceiling"] - 0.03
    after = ppo_rlhf.main(["--seed", seed, "--out", str(tmp_path / "ppo")])
    assert after["J/share_of_the_way"] > 0.9 and after["samples/true_reward"] > 2.2
    assert after["samples/grammatical"] > 0.97
