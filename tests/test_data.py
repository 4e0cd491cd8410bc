"""Tokens, masks, padding, truncation: the bugs that other projects shipped, one test for each."""

import json

import pytest
import torch

from dpo import (
    collate,
    encode_preferences,
    kto_examples,
    read_preferences,
    response_logps,
    sample,
    score,
    toy_pairs,
    toy_prompts,
)
from model import split_by_prompt
from sft import encode_demonstrations, read_demonstrations
from sft import toy_baselines, toy_grammatical, toy_quality, toy_reward, toy_rows, toy_summary

NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_response_ends_with_eos_that_counts(tiny):
    """EOS is the last target of chosen and rejected (huggingface/trl#734), also with pad == EOS,
    where a mask made by ids != pad would lose it (huggingface/trl#6357)."""
    _, tokenizer = tiny
    rows = [{"prompt": "A", "chosen": " The plot was dull.", "rejected": " No."}]
    examples, _ = encode_preferences(tokenizer, rows, 512)
    chosen, rejected, _ = examples[0]
    assert chosen[1][-1] == rejected[1][-1] == tokenizer.eos_id
    batch = collate([chosen, rejected], "cpu")
    assert (batch["targets"] == tokenizer.eos_id).sum() == 2
    assert batch["targets"].tolist() == chosen[1] + rejected[1]


def test_overfitted_model_stops(tmp_path, tiny):
    """The consequence: after overfitting one example, greedy decoding ends with EOS by itself."""
    import sft

    rows = [
        {"prompt": f"Say {word}:", "completion": " The plot was dull."} for word in ("a", "b", "c")
    ]
    sft.main(
        [
            "--data",
            str(write(tmp_path / "d.jsonl", *rows)),
            "--out",
            str(tmp_path / "o"),
            "--steps",
            "30",
            "--batch_size",
            "2",
            "--device",
            "cpu",
        ]
    )
    from model import load_model

    model, tokenizer = load_model(tmp_path / "o")
    prompt = torch.tensor([tokenizer.encode_prompt("Say a:")])
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=30,
        pad_token_id=tokenizer.eos_id,
    )[0, prompt.shape[1] :].tolist()
    assert ids == tokenizer.encode(" The plot was dull.") + [tokenizer.eos_id]


def test_cut_response_has_no_eos_and_is_counted(tiny):
    """A cut answer did not end there: no EOS after it (direct-preference-optimization,
    preference_datasets.py:233), none over its last token (OpenRLHF/OpenRLHF#1311); it is counted.
    """
    _, tokenizer = tiny
    text = " The plot was dull." * 5
    (prompt, response), lost = (
        x[0] if isinstance(x, list) else x
        for x in encode_demonstrations(tokenizer, [{"prompt": "A", "completion": text}], 12)
    )
    assert response == tokenizer.encode(text)[: 12 - len(prompt)] and lost["cut"] == 1


def test_pair_with_one_long_response_keeps_both(tiny):
    """Lengths 600 and 50 in 512: the short one is untouched (huggingface/trl#6548)."""
    _, tokenizer = tiny
    long, short = " plot" * 600, " cast" * 50
    examples, lost = encode_preferences(
        tokenizer, [{"prompt": "A", "chosen": long, "rejected": short}], 512
    )
    (p, chosen), (_, rejected), _ = examples[0]
    assert len(p) + len(chosen) == 512 and len(rejected) == 51 and lost["cut"] == 1


def test_prompt_without_room_is_dropped_and_counted(tiny):
    """A row whose mask would be empty is 0/0 = NaN later (huggingface/trl#5826)."""
    _, tokenizer = tiny
    rows = [
        {"prompt": "plot " * 600, "chosen": " a", "rejected": " b"},
        {"prompt": "A", "chosen": " a", "rejected": " b"},
    ]
    examples, lost = encode_preferences(tokenizer, rows, 512)
    assert len(examples) == 1 and lost["dropped"] == 1
    assert torch.isfinite(score(tiny[0], [examples[0][0]], NO_AUTOCAST)).all()


def test_pair_identical_after_the_cut_is_dropped_and_counted(tiny):
    """They would sit at log 2 for ever (natolambert/rlhf-book#503)."""
    _, tokenizer = tiny
    rows = [{"prompt": "A", "chosen": " plot" * 40 + " a", "rejected": " plot" * 40 + " b"}]
    assert encode_preferences(tokenizer, rows, 20)[1]["identical"] == 1
    assert encode_preferences(tokenizer, rows, 512)[1]["identical"] == 0


@pytest.mark.parametrize(
    "prompt, response", [("The sl", "ow train"), ("Question: ", " hi"), ("a\n", "\nb")]
)
def test_no_token_straddles_prompt_and_response(tiny, prompt, response):
    """What is trained on is the response, character for character, and EOS: merges across the
    border (huggingface/trl#2054) and prompts that end in a space (huggingface/trl#1920)."""
    _, tokenizer = tiny
    p, r = tokenizer.encode_example(prompt, response, 512)
    targets = collate([(p, r)], "cpu")["targets"].tolist()
    assert tokenizer.decode(targets[:-1]) == response and targets[-1] == tokenizer.eos_id
    assert tokenizer.decode(p) == prompt


def test_targets_are_the_tokens_at_the_next_position():
    """index points at the token before each target, in the padded and flattened batch: no prompt
    token is trained on and no response token left out (jingyaogong/minimind#621)."""
    sequences = [([3, 4], [6, 7]), ([8], [9, 10, 11, 12])]
    batch = collate(sequences, "cpu")
    after = batch["input_ids"].flatten()[batch["index"] + 1]
    assert after.tolist() == batch["targets"].tolist() == [6, 7, 9, 10, 11, 12]
    assert batch["rows"].tolist() == [0, 0, 1, 1, 1, 1]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]


def test_prompt_logits_do_not_matter(tiny):
    """Neither half of the batch trains on its prompt (OpenRLHF/OpenRLHF#294, #235): of all outputs,
    only those at the listed positions carry gradient."""
    model, _ = tiny
    batch = collate([([3, 4, 5], [6, 7]), ([8, 9], [9, 10, 11])], "cpu")
    seen = {}

    def keep(module, inputs, output):
        output.retain_grad()
        seen["hidden"] = output

    handle = model.base_model.ln_f.register_forward_hook(keep)
    response_logps(model, batch)[0].sum().backward()
    handle.remove()
    model.zero_grad(set_to_none=True)
    touched = seen["hidden"].grad.flatten(0, 1).abs().sum(1).nonzero()[:, 0]
    assert touched.tolist() == sorted(batch["index"].tolist())


def test_mask_has_an_effect():
    """Flipping a masked token leaves the SFT loss, flipping a response token changes it
    (jingyaogong/minimind#51)."""
    from sft import sft_loss

    logps, mask = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    base = sft_loss(logps, mask)
    assert sft_loss(torch.tensor([[-9.0, -2.0, -3.0]]), mask) == base
    assert sft_loss(torch.tensor([[-1.0, -2.0, -9.0]]), mask) != base


def test_padding_changes_no_logp(tiny):
    """Alone or beside a longer row, the same log-probs: positions and mask are right, on GPT-2,
    where they show (huggingface/trl#469, #6800)."""
    model, tokenizer = tiny
    short = tokenizer.encode_example("I saw the film.", " The plot was dull.", 512)
    long = tokenizer.encode_example(
        "We watched the play with friends.", " The plot was dull." * 9, 512
    )
    alone = response_logps(model, collate([short], "cpu"))[0]
    beside = response_logps(model, collate([long, short], "cpu"))[0][1:]
    assert torch.allclose(alone, beside, atol=1e-5)


def test_content_of_pads_does_not_matter(tiny):
    """The attention mask is passed and obeyed (jingyaogong/minimind-v#76)."""
    model, _ = tiny
    batch = collate([([3, 4], [5, 6, 7, 8]), ([3], [5])], "cpu")
    clean = response_logps(model, batch)[0]
    batch["input_ids"][1, 2:] = 77
    assert torch.equal(clean, response_logps(model, batch)[0])


def test_left_padding_changes_no_sample(tiny):
    """In generation a short prompt beside a long one gets the logits it gets alone: GPT-2 is off by
    nats without position_ids (CarperAI/trlx#508)."""
    model, tokenizer = tiny
    short = tokenizer.encode_prompt("I saw the film.")
    long = tokenizer.encode_prompt("We watched the play with friends. " * 4)
    T = len(long)
    ids = torch.tensor([[tokenizer.eos_id] * (T - len(short)) + short, long])
    mask = torch.tensor([[0] * (T - len(short)) + [1] * len(short), [1] * T])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=3,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.eos_id,
    )
    alone = model.generate(
        ids[:1, -len(short) :],
        attention_mask=mask[:1, -len(short) :],
        do_sample=False,
        max_new_tokens=3,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.eos_id,
    )
    for beside, single in zip(out.logits, alone.logits, strict=True):
        assert torch.allclose(beside[:1], single, atol=1e-4)


def test_sampling_is_from_the_whole_distribution(tiny, monkeypatch):
    """generate keeps the top 50 tokens and a model's own settings unless told otherwise
    (huggingface/trl#3029, #6789). Here no setting counts: the log-probs kept are the model's, and
    the samples' mean negative log-prob is the entropy that the model states."""
    from transformers import GenerationConfig

    model, tokenizer = tiny
    own = GenerationConfig(do_sample=True, temperature=0.3, top_k=5, top_p=0.5,
                           repetition_penalty=3.0)
    monkeypatch.setattr(model, "generation_config", own)
    prompt = tokenizer.encode_prompt(toy_prompts(True)[0])
    responses, kept = sample(model, tokenizer, [prompt] * 4000, 1, seed=0, size=4000)
    first = [ids[0] for ids in responses]
    logits = model(torch.tensor([prompt])).logits[0, -1]  # (V,)
    assert torch.allclose(torch.tensor(kept)[:, 0], logits.log_softmax(-1)[first], atol=1e-4)
    logp = logits.log_softmax(-1)  # (V,)
    entropy, spread = (
        -(logp.exp() * logp).sum(),
        (logp.exp() * logp**2).sum() - (logp.exp() * logp).sum() ** 2,
    )
    nll = -logp[torch.tensor(first)].mean()
    assert abs(nll - entropy) < 4 * (spread / 4000).sqrt()


def test_sample_ends_at_the_first_eos(tiny):
    """Responses keep their EOS and nothing behind it; one that is cut short has none."""
    model, tokenizer = tiny
    prompts = [tokenizer.encode_prompt(p) for p in toy_prompts(True)[:20]]
    for response in sample(model, tokenizer, prompts, 64, seed=0)[0]:
        assert response.index(tokenizer.eos_id) == len(response) - 1
    for response in sample(model, tokenizer, prompts, 3, seed=0)[0]:
        assert len(response) == 3 and tokenizer.eos_id not in response


def test_training_mode_survives_sampling(tiny):
    """Sampling leaves the mode of the model alone (huggingface/trl#3683)."""
    model, tokenizer = tiny
    sample(model, tokenizer, [tokenizer.encode_prompt("I saw the film.")], 3, seed=0)
    assert not model.training


def test_ranking_becomes_all_strict_pairs(tmp_path):
    """Ranks 2, 1, 2, 3: five strictly ordered pairs; the tie gives none."""
    path = write(
        tmp_path / "r.jsonl", {"prompt": "p", "responses": list("abcd"), "ranks": [2, 1, 2, 3]}
    )
    pairs = {(row["chosen"], row["rejected"]) for row in read_preferences(path, "dpo")}
    assert pairs == {("b", "a"), ("b", "c"), ("b", "d"), ("a", "d"), ("c", "d")}


def test_chat_rows_are_read(tmp_path):
    """A prompt may be messages and a response one message, as TRL writes them; of `messages` the
    last reply is the response."""
    chat = [{"role": "user", "content": "hi"}]
    reply = lambda text: [{"role": "assistant", "content": text}]
    path = write(
        tmp_path / "c.jsonl", {"prompt": chat, "chosen": reply("yes"), "rejected": reply("no")}
    )
    assert read_preferences(path, "dpo") == [{"prompt": chat, "chosen": "yes", "rejected": "no"}]
    path = write(tmp_path / "m.jsonl", {"messages": chat + reply("yes")})
    assert read_demonstrations(path) == [{"prompt": chat, "completion": "yes"}]


def test_held_out_prompts_are_disjoint():
    """Rows of one prompt never stand on both sides (natolambert/rlhf-book PR #523)."""
    rows = [{"prompt": f"p{i % 30}", "n": i} for i in range(120)]
    learn, test = split_by_prompt(rows, 16, seed=0)
    assert {r["prompt"] for r in learn}.isdisjoint({r["prompt"] for r in test})
    assert len(learn) + len(test) == 120 and len({r["prompt"] for r in test}) == 3


@pytest.mark.parametrize("count", [2, 3, 7])
def test_kto_partners_are_mismatched(count):
    """No response is its own partner, and a partner stands behind the example's own prompt; in a
    reversed batch of odd size the middle one met itself (huggingface/trl#1911)."""
    pairs = [(([i], [10 + i]), ([i], [20 + i]), True) for i in range(count)]
    examples = kto_examples(pairs)
    assert len(examples) == 2 * count
    for (prompt, response), (partner_prompt, partner), desirable in examples:
        assert partner_prompt == prompt and partner[0] % 10 != prompt[0]
        assert desirable == (response[0] < 20)


def test_kto_needs_two_prompts(capsys):
    """A batch of one prompt has no mismatched partner (hiyouga/LlamaFactory#7509: NaN KL)."""
    with pytest.raises(SystemExit) as stop:
        kto_examples([(([1], [2]), ([1], [3]), True)])
    assert stop.value.code == 2 and "two different prompts" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_scores_do_not_depend_on_the_batch_size(tiny, size):
    """The last, smaller batch counts like any other (OpenRLHF/OpenRLHF#1336)."""
    model, tokenizer = tiny
    sequences = [
        tokenizer.encode_example(p, " The plot was dull.", 512) for p in toy_prompts(True)[:5]
    ]
    together = score(model, sequences, NO_AUTOCAST, size=5)
    assert torch.allclose(score(model, sequences, NO_AUTOCAST, size=size), together, atol=1e-5)


def test_toy_rewards_and_qualities():
    """The true rewards, by hand."""
    assert toy_reward(" The plot was amazing and dull. The cast was superb.") == 1.0
    assert toy_reward("amazing amazing amazing") == 3.0  # hackable on purpose
    assert toy_grammatical(" The plot was amazing and dull. I found the cast superb.")
    assert not toy_grammatical("amazing amazing amazing") and not toy_grammatical("")
    facts = {"who": "Anna", "where": "Paris"}
    assert toy_quality(toy_summary(facts), facts)["recall"] == 1.0
    half = toy_quality(" Anna lost something in Rome.", facts)
    assert half == {"quality": pytest.approx(0.5 - 0.5 - 0.05), "recall": 0.5, "made_up": 0.5}


def test_toy_prompts_are_split():
    """Held-out prompts and posts never occur in training."""
    assert set(toy_prompts(True)).isdisjoint(toy_prompts(False)) and len(toy_prompts(True)) == 40
    learn = {row["prompt"] for row in toy_rows("sentiment", 500, 0)}
    assert learn.isdisjoint(row["prompt"] for row in toy_rows("sentiment", 200, 0, held_out=True))


def test_lead_baselines():
    """Lead-1 and lead-3 take the first sentence and the first three."""
    row = {
        "prompt": "My friend is called Anna. It rained a lot. We were in Rome. A ring got lost.",
        "facts": {"who": "Anna", "where": "Rome", "what": "ring"},
    }
    scores = toy_baselines([row])
    assert scores["summary/recall of lead-1"] == pytest.approx(1 / 3)
    assert scores["summary/recall of lead-3"] == pytest.approx(2 / 3)


def test_tiny_is_good_but_not_perfect(tiny):
    """What all toys build on: clean English, balanced moods, summaries right half of the time."""
    model, tokenizer = tiny
    prompts = [tokenizer.encode_prompt(p) for p in toy_prompts(True) for _ in range(8)]
    reviews = [tokenizer.decode(ids) for ids in sample(model, tokenizer, prompts, 64, seed=1)[0]]
    assert sum(map(toy_grammatical, reviews)) / len(reviews) >= 0.95
    assert abs(sum(map(toy_reward, reviews)) / len(reviews)) < 0.25
    rows = [row for row in toy_rows("summarization", 300, 5, held_out=True)]
    asked = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
    texts = [tokenizer.decode(ids) for ids in sample(model, tokenizer, asked, 64, seed=2)[0]]
    right = sum(text == toy_summary(row["facts"]) for text, row in zip(texts, rows)) / len(rows)
    assert 0.35 < right < 0.7


def test_toy_human_is_noisy_but_right_on_average(tiny):
    """Bradley and Terry's coin: the better review wins more often, and by chance not always."""
    model, tokenizer = tiny
    rows = toy_pairs(model, tokenizer, 300, seed=3)
    gaps = [toy_reward(row["chosen"]) - toy_reward(row["rejected"]) for row in rows]
    decided = [gap > 0 for gap in gaps if gap]
    assert 0.65 < sum(decided) / len(decided) < 0.95
