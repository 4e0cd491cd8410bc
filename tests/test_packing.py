"""Packed batches, [prompt | y_1 | ... | y_K] several to a row: the same numbers, fewer tokens."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig,
                          MambaForCausalLM, MistralConfig, MistralForCausalLM)

import dpo
import reward_model
import simpo
from model import load_model, save_model

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0,
         "eos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
         "initializer_range": 0.2}
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def make(name):
    """A random model of a family, with weights large enough that attention matters."""
    torch.manual_seed(0)
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
            bos_token_id=0, eos_token_id=1)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=4)),
        "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, initializer_range=0.2)),
    }[name]()
    return model.eval()


def sequences_of(counts, seed=0):
    """For each count K a prompt with K responses, all of various lengths."""
    rng = random.Random(seed)
    draw = lambda most: [rng.randrange(2, 97) for _ in range(rng.randint(1, most))]
    return [(prompt, draw(9) + [1]) for K in counts for prompt in [draw(12)] for _ in range(K)]


# -------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("counts", [[2], [2, 2, 2, 2], [1, 4, 2, 6, 1, 3], [1] * 7])
def test_log_probs_and_gradients_are_those_of_separate_rows(family, counts):
    """Token by token, in the order of the sequences, and the gradient of every weight."""
    model, sequences = make(family), sequences_of(counts)
    answers = []
    for place in (dpo.collate, dpo.collate_packed):
        batch = place(sequences, "cpu")
        tokens = dpo.token_logps(model, batch)  # (N,)
        sums, lengths = dpo.response_logps(model, batch)  # (B,), (B,)
        model.zero_grad()
        (sums * torch.linspace(-1, 1, len(sums))).sum().backward()
        answers.append((tokens, sums, lengths, *(p.grad.clone() for p in model.parameters())))
    assert len(answers[0][1]) == len(sequences) and float(answers[0][0].detach().std()) > 0.1
    for alone, packed in zip(*answers, strict=True):
        assert torch.allclose(alone, packed, atol=1e-4, rtol=1e-4)


def test_scores_are_those_of_separate_rows():
    """A score is read at each response's last token, wherever its row has put it."""
    model, _ = load_model("tiny", head="reward")
    torch.nn.init.normal_(model.score.weight)
    sequences = sequences_of([1, 4, 2, 6])
    with torch.no_grad():
        alone, packed = (reward_model.reward_scores(model, place(sequences, "cpu"))
                         for place in (reward_model.collate, reward_model.collate_packed))
    assert torch.allclose(alone, packed, atol=1e-4) and float(alone.std()) > 0.1


def test_responses_do_not_see_each_other():
    """Other tokens in one response, or in another group of the row, move nothing but that one."""
    model, sequences = make("gpt2"), sequences_of([2, 3, 2])
    with torch.no_grad():
        sums = dpo.response_logps(model, dpo.collate_packed(sequences, "cpu"))[0]
        for k, (prompt, response) in enumerate(sequences):
            other = [*sequences]
            other[k] = prompt, [2 + (t + 5) % 90 for t in response]
            now = dpo.response_logps(model, dpo.collate_packed(other, "cpu"))[0]
            moved = (now - sums).abs() > 1e-4
            assert moved.nonzero().flatten().tolist() == [k]


class EndOfTraining(Exception):
    pass


def stop(*_, **__):
    raise EndOfTraining


@pytest.mark.parametrize("script, flags", [
    (dpo, "--pairs 64"), (dpo, "--pairs 64 --loss kto"), (dpo, "--pairs 64 --accumulate 3"),
    (simpo, "--rankings 64"), (simpo, "--rankings 64 --loss pro --accumulate 2"),
    (reward_model, "--rankings 64"), (reward_model, "--rankings 64 --k 5 --accumulate 3")])
def test_training_is_the_same_packed_or_not(script, flags, tmp_path, monkeypatch):
    """Two steps of each script, with packed rows and with a row a response: the same losses and
    gradients. Packed rows have fewer pads."""
    logs = {}
    monkeypatch.setattr(script, "save_state", stop)
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr(script, "can_pack", lambda *_: False)
        out = tmp_path / str(packed)
        with pytest.raises(EndOfTraining):
            script.main([*flags.split(), *"--steps 2 --batch_size 16 --device cpu --out".split(),
                         str(out)])
        logs[packed] = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert len(logs[True]) == 2
    for one, other in zip(logs[True], logs[False], strict=True):
        for key in one.keys() - {"padding"}:
            assert one[key] == pytest.approx(other[key], rel=2e-3, abs=2e-5), key
        assert one["padding"] < 0.12 < other["padding"]


# ------------------------------------------------------------------------------- the packing


def test_rows_are_full_and_hold_every_group_whole():
    """No group overlaps another or runs over the end of its row."""
    rng = random.Random(0)
    for n in (1, 2, 7, 32):
        sizes = [rng.randint(5, 200) for _ in range(n)]
        B, T, starts = dpo.fill_rows(sizes)
        taken = [i for start, size in zip(starts, sizes) for i in range(start, start + size)]
        assert len(taken) == len(set(taken)) and max(taken) < B * T
        assert all(start // T == (start + size - 1) // T for start, size in zip(starts, sizes))
        assert 1 - sum(sizes) / (B * T) < (0.05 if n > 2 else 0.5)


@pytest.mark.parametrize("sizes, expected", [
    ([7], (1, 7, [0])),
    ([6, 3, 3], (2, 6, [0, 6, 9])),  # as full as one row of 12, and shorter
    ([3, 3, 5], (1, 11, [5, 8, 0])),  # 11 places, where two rows take 12
    ([3000, 2900], (2, 3000, [0, 3000])),  # 6000 * 1.5 is less than 5900 * (1 + 5900/6000)
])
def test_rows_by_hand(sizes, expected):
    """(B, T, first places): the longest is placed first, the others where there is most room."""
    assert dpo.fill_rows(sizes) == expected


def test_padding_is_what_the_batch_holds(monkeypatch):
    """Groups of 3 + 2 + 1 and 2 + 1 tokens fill a row of 9: every list of the batch by hand."""
    sequences = [([5, 6, 7], [8, 1]), ([5, 6, 7], [1]), ([9, 9], [1])]
    batch = dpo.collate_packed(sequences, "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1, 1, 9, 9, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert batch["index"].tolist() == [2, 3, 2, 7] and batch["targets"].tolist() == [8, 1, 1, 1]
    assert batch["rows"].tolist() == [0, 0, 1, 2] and batch["last"].tolist() == [4, 5, 8]
    assert batch["padding"] == 0
    seen = batch["attention_mask"][0, 0].int().tolist()
    assert seen[4] == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert seen[5] == [1, 1, 1, 0, 0, 1, 0, 0, 0]
    assert seen[8] == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert dpo.collate(sequences, "cpu")["padding"] == pytest.approx(1 - 12 / 15)
    monkeypatch.setattr(dpo, "fill_rows", lambda sizes: (2, 6, [0, 6]))
    assert dpo.collate_packed(sequences, "cpu")["padding"] == pytest.approx(1 - 9 / 12)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real pairs are not here")
@pytest.mark.parametrize("script, name, size", [
    (dpo, "preference_pairs.jsonl", 32), (simpo, "preference_pairs.jsonl", 32),
    (reward_model, "ranked_responses.jsonl", 16)])
def test_real_pairs_have_few_pads(script, name, size, tiny):
    """Under a tenth of the tokens, at the scripts' own batch sizes; apart it is over half."""
    _, tokenizer = tiny
    groups = []
    for line in (DATA / name).open():
        row = json.loads(line)
        texts = row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]
        ids = [tokenizer.encode_example(row["prompt"], text, 512) for text in texts]
        groups += [ids] if None not in ids else []
    random.Random(0).shuffle(groups)
    batches = [sum(groups[i:i + size], []) for i in range(0, 10 * size, size)]
    packed, apart = (sum(place(b, "cpu")["padding"] for b in batches) / len(batches)
                     for place in (script.collate_packed, script.collate))
    assert packed < 0.1 and apart > 0.25


# ------------------------------------------------------------------ models that cannot be packed


@pytest.mark.parametrize("family, fits", [
    ("gpt2", True), ("llama", True), ("mistral", False), ("mamba", False)])
def test_who_can_be_packed(family, fits, capsys):
    """A window of four tokens and a state that runs along the row are noticed, and said."""
    model, sequences = make(family), sequences_of([3])
    assert dpo.can_pack(lambda *x: dpo.response_logps(*x)[0], model, sequences) == fits
    assert ("each gets its own" in capsys.readouterr().out) == (not fits)


@pytest.mark.parametrize("script, family", [  # transformers has no Mamba that classifies
    (dpo, "mistral"), (dpo, "mamba"), (simpo, "mistral"), (simpo, "mamba"),
    (reward_model, "mistral")])
def test_a_run_of_a_model_that_cannot_be_packed(script, family, tiny, tmp_path, capsys):
    """From a folder, as a user has it: a line says so, and the run ends well, one by one."""
    model = make(family)
    model.resize_token_embeddings(733)
    save_model(model, tiny[1], tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({
        "prompt": f"I saw the film number {i} with friends in London yesterday.",
        "chosen": f" The plot was funny, and so was everything else. {i}",
        "rejected": f" It was bland. {i}"}) + "\n" for i in range(24)))
    script.main([*"--steps 2 --batch_size 4 --max_new_tokens 4 --device cpu --data".split(),
                 str(data), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.count("each gets its own") == 1
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert len(steps) == 2 and all(math.isfinite(step["loss"]) for step in steps)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "mamba", "llama"])
def test_sampling_from_other_families(family):
    """Log-probs kept are those of scoring, with a window, and without a cache of keys and values;
    rows that have ended are left behind meanwhile."""
    model, tokenizer = make(family), SimpleNamespace(eos_id=1)
    with torch.no_grad():  # EOS likely enough to end most of the rows
        model.get_output_embeddings().weight[1] *= 3
    prompts = [prompt for prompt, _ in sequences_of([1] * 12, seed=3)]
    responses, logps = dpo.sample(model, tokenizer, prompts, 20, seed=0, temperature=1.5)
    assert len(set(map(len, responses))) > 3
    with torch.no_grad():
        for prompt, response, kept in zip(prompts, responses, logps, strict=True):
            out = model(input_ids=torch.tensor([prompt + response])).logits[0] / 1.5  # (T, V)
            want = out[len(prompt) - 1:-1].log_softmax(1)[range(len(response)), response]
            assert torch.allclose(torch.tensor(kept), want, atol=1e-4)


# -------------------------------------------------------------------------------------- a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_never_waits_for_the_gpu():
    """From the batch to the update nothing asks the device for a number."""
    model = make("gpt2").cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    sequences = sequences_of([2] * 8)
    reference = torch.zeros(16, device="cuda")

    def step():
        batch = dpo.collate_packed(sequences, torch.device("cuda"))
        with torch.autocast("cuda", torch.bfloat16):
            sums, _ = dpo.response_logps(model, batch)
        loss = dpo.dpo_loss(*sums.view(-1, 2).T, *reference.view(-1, 2).T, 0.1).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    step()  # the first one allocates and chooses kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        numbers = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(torch.stack(numbers)).all()
