"""What a person with real data is told: noise, too few updates, and runs that cannot learn."""

import json
import random
import re

import pytest
import torch

import dpo
import hir
import model as helper
import ppo_rlhf
import self_correct
from model import read_jsonl, split_by_prompt
from variants import grpo, kto

FLAGS = "--device cpu --max_new_tokens 8 --samples 2"


def pairs(tmp_path, count=24):
    rng = random.Random(0)
    words = [" The cast was superb.", " It was dull and long.", " No.", " I found the plot weak."]
    rows = [{"prompt": f"I saw film {i}." * rng.randrange(1, 5),
             "chosen": rng.choice(words[:2]) * rng.randrange(1, 5),
             "rejected": rng.choice(words[2:])}
            for i in range(count)]
    (tmp_path / "data").write_text("\n".join(map(json.dumps, rows)))
    return f"--data {tmp_path}/data --out {tmp_path}/out {FLAGS}"


def test_step_1_is_exactly_log_2_in_bf16(tmp_path, monkeypatch):
    """On CUDA the trunk runs in bf16, and how it rounds may depend on the shapes. So the reference
    is scored in the batches and parts of the first epoch: at step 1 all rewards are exactly 0."""
    parts, response_logps = {True: [], False: []}, dpo.response_logps

    def watched(model, sequences):
        parts[torch.is_grad_enabled()].append(sequences)
        return response_logps(model, sequences)

    monkeypatch.setattr(dpo, "response_logps", watched)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled, real=torch.autocast:
                        real(device, dtype, enabled=True))
    monkeypatch.setattr(dpo, "evaluate", lambda *_: ({"before": {}, "after": {}}, []))
    dpo.main(f"{pairs(tmp_path)} --epochs 2 --batch_size 8 --max_tokens 400".split())
    assert 3 < len(parts[False]) and parts[False] == parts[True][:len(parts[False])]
    first, *later = map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracy"):
        assert first[key] == 0 and any(row[key] for row in later)
    assert first["loss"] == float(-torch.nn.functional.logsigmoid(torch.zeros(())))


@pytest.mark.parametrize("script", [ppo_rlhf, grpo], ids=["ppo_rlhf", "grpo"])
def test_ratios_of_the_first_update_are_exactly_1_in_bf16(script, tmp_path, monkeypatch):
    """Samples are scored in the parts of the minibatches of the first pass."""
    scored, learned, off, off_values = [], [], [], []
    token_logps, name = ppo_rlhf.token_logps, "policy_loss" if script is ppo_rlhf else "grpo_loss"
    loss = getattr(script, name)

    def watched(model, sequences, R):
        (learned if torch.is_grad_enabled() else scored).append(sequences)
        return token_logps(model, sequences, R)

    monkeypatch.setattr(script, "token_logps", watched)
    monkeypatch.setattr(script, name, lambda logps, old, *args, **flags: (
        off.append(float((logps - old).abs().max())), loss(logps, old, *args, **flags))[1])
    value_loss = ppo_rlhf.value_loss  # of PPO alone
    monkeypatch.setattr(ppo_rlhf, "value_loss", lambda values, old, *args, **flags: (
        off_values.append(float((values - old).abs().max())),
        value_loss(values, old, *args, **flags))[1])
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled, real=torch.autocast:
                        real(device, dtype, enabled=True))
    monkeypatch.setattr(script, "evaluate", lambda *_: ({"before": {}, "after": {}}, []))
    script.main(f"--out {tmp_path} --steps 1 --batch_size 32 --max_tokens 120 --max_new_tokens 16 "
                "--ppo_epochs 2 --device cpu".split())
    parts = len(scored) // 2  # of the policy, then of the reference
    assert parts > 4 and scored[:parts] == scored[parts:] == learned[:parts] != learned[parts:]
    sizes = torch.tensor([len(part) for part in learned]).cumsum(0)
    first = int((sizes <= 16).sum())  # parts of the first minibatch
    assert sizes[first - 1] == 16 and not any(off[:first]) and all(off[first:])
    assert not any(off_values[:first]) and all(off_values[first:])


def test_kto_starts_at_0_in_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled, real=torch.autocast:
                        real(device, dtype, enabled=True))
    monkeypatch.setattr(kto, "evaluate", lambda *_: ({"before": {}, "after": {}}, []))
    kto.main(f"{pairs(tmp_path)} --epochs 1 --batch_size 8 --max_tokens 400".split())
    first, *later = map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    for key in ("rewards/chosen", "rewards/rejected"):
        assert first[key] == 0 and any(row[key] for row in later)
    assert first["kl/mismatched"] == 0


def test_held_out_rows_are_counted(capsys):
    rows = [{"prompt": str(i // 2)} for i in range(60)]
    assert [len(part) for part in split_by_prompt(rows, 256)] == [54, 6, 3]
    assert capsys.readouterr().out == "held out: 6 of 60 rows, all those of 3 of 30 prompts\n"


@pytest.mark.parametrize("flags, warned", [("", True), ("--batch_size 1", True), (
    "--batch_size 1 --epochs 2", False), ("--steps 2", False)])
def test_few_updates_are_told(flags, warned, tmp_path, recwarn, monkeypatch):
    """3 or 22 updates are few, 44 are not; a person who gives --steps knows how many."""
    monkeypatch.setattr(dpo, "evaluate", lambda *_: ({"before": {}, "after": {}}, []))
    dpo.main(f"{pairs(tmp_path)} {flags}".split())
    assert any("updates, from which little" in str(x.message) for x in recwarn) == warned


@pytest.mark.parametrize("pairs, size", [(2000, 8), (2001, 32)])
def test_batch_size_follows_the_data(pairs, size, monkeypatch):
    """A model of more than ten million parameters, with data: many updates from few pairs."""
    seen, rows = [], [{"prompt": str(i), "pair": [([0], [0])] * 2} for i in range(pairs)]
    model, tokenizer = helper.load_model()
    model.small = False
    monkeypatch.setattr(dpo, "load_model", lambda *_, **__: (model, tokenizer))
    monkeypatch.setattr(dpo, "read_jsonl", lambda path: [])
    monkeypatch.setattr(dpo, "encode_pairs", lambda *_: [])
    monkeypatch.setattr(dpo, "split_by_prompt", lambda *_: (rows, [], []))

    def warn_of_few(steps, args):
        seen.append((args.batch_size, args.beta, steps))
        raise KeyboardInterrupt

    monkeypatch.setattr(dpo, "warn_of_few", warn_of_few)
    with pytest.raises(SystemExit):
        dpo.main(["--data", "x", "--device", "cpu"])
    assert seen == [(size, 0.1, -(-pairs // size))]


def stops(capsys, main, flags, *fragments):
    """The run ends with exit code 2 and one line with these fragments."""
    with pytest.raises(SystemExit) as stop:
        main(flags.split())
    error = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning")]
    assert stop.value.code == 2 and len(error) == 1, error
    assert all(fragment in error[0] for fragment in fragments), error


@pytest.mark.parametrize("ends, cause", [(False, "no sample ends"), (True, "look at the reward")])
def test_ppo_stops_where_all_scores_are_equal(ends, cause, tmp_path, capsys, monkeypatch):
    """Five steps in a row, and not before; the state of the run stays."""
    ids = [269, 302] + [helper.load_model()[1].eos_id] * ends
    monkeypatch.setattr(ppo_rlhf, "sample", lambda model, tokenizer, asked, *_, **__: [
        list(ids) for _ in asked])
    monkeypatch.setattr(ppo_rlhf, "evaluate", lambda *_: ({"before": {}, "after": {}}, []))
    flags = f"--out {tmp_path} {FLAGS} --batch_size 4 --ppo_epochs 1 --save_every 1"
    stops(capsys, ppo_rlhf.main, f"{flags} --steps 9", "step 5:", cause)
    assert (tmp_path / "state.pt").exists()
    ppo_rlhf.main(f"{flags} --steps 4".split())
    with pytest.warns(UserWarning, match=cause):  # a reward of one's own may be 1 or 0
        ppo_rlhf.train(ppo_rlhf.parse_args(f"{flags} --steps 5".split()),
                       lambda prompts, texts: torch.ones(len(texts)))


@pytest.mark.parametrize("script, flags", [
    (hir, "--rounds 2 --episodes 1"), (self_correct, "--pool 2 --rounds 1 --corrections 1")])
def test_no_sample_is_right(script, flags, tmp_path, capsys, monkeypatch):
    """An example of a sample and of the answer shows why; with --match the same samples do."""
    rows = [{"prompt": f"3 * {i} = ?", "answer": "12"} for i in range(8)]
    (tmp_path / "data").write_text("\n".join(map(json.dumps, rows)))

    def sample(model, tokenizer, asked, *_, **__):
        texts = ["It is 12", "It is 7"] * len(asked)
        return [tokenizer.encode(text) + [tokenizer.eos_id] for text in texts[:len(asked)]]

    monkeypatch.setattr(script, "sample", sample)
    flags = (f"--data {tmp_path}/data --out {tmp_path}/out --device cpu --max_new_tokens 8 "
             f"--batch_size 2 {flags}")
    stops(capsys, script.main, flags, "'It is ", "'12'", "see --match")
    script.main(f"{flags} --match number".split())
    (tmp_path / "data").write_text("\n".join(json.dumps(row | {"answer": "no"}) for row in rows))
    stops(capsys, script.main, f"{flags} --match number", "data:1: the answer holds no number")


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv"])
def test_other_kinds_of_files(suffix, tmp_path, capsys):
    """One line with the command that turns them into lines."""
    with pytest.raises(SystemExit):
        read_jsonl(tmp_path / f"theirs.{suffix}")
    assert f"load_dataset('{suffix}', data_files=" in capsys.readouterr().err


def test_stages_have_names(tmp_path, capsys):
    """A person who waits is told for what."""
    (tmp_path / "out").mkdir()
    dpo.main(f"--out {tmp_path} {FLAGS} --pairs 16 --steps 1".split())
    helper.save_model(*helper.load_model("tiny", "reward"), tmp_path / "out")
    ppo_rlhf.main(f"--out {tmp_path} --device cpu --max_new_tokens 24 --samples 1 --batch_size 4 "
                  f"--steps 1 --reward_model {tmp_path}/out".split())
    shown = capsys.readouterr().out
    for stage in ("sampling 32 reviews for the human to judge", "held out: ", "evaluating: ",
                  "scoring 256 samples of the reference, for the mean and the SD"):
        assert stage in shown
    assert re.search(r"\d+ of them end; their scores have mean -?\d\.\d+ and SD \d\.\d+", shown)
