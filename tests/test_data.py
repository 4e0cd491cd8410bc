"""Data, tokens, masks, positions, rewards: bugs that other projects shipped, a test for each."""

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_model import bpe, new_folder
from tokenizers import processors

import dpo
import hir
import ppo_rlhf
import reward_model
import self_correct
import sft
from model import Tokenizer, load_model, mean_by_prompt, read_jsonl, save_model, split_by_prompt
from variants import on_policy_pairs, win_rate
from variants.chain_of_hindsight import chains

ARGS = {"max_length": 512, "max_new_tokens": 1, "max_tokens": 4096, "loss": "ranking",
        "feedback": "text", "data": None, "missing_eos_score": -1.0, "seed": 0}
PAIR = {"prompt": "A", "chosen": " The plot was dull.", "rejected": " No.", "where": "here"}
KINDS = ("sft", "dpo", "reward_model")
a = functools.partial(SimpleNamespace, **ARGS)


def encode(tokenizer, kind, *rows, **changes):
    """Rows as a script encodes them: sequences (prompt ids, response ids), two from each row."""
    args = a(**changes)
    if kind == "sft":
        rows = [row | {"completion": row[side]} for row in rows for side in ("chosen", "rejected")]
        return [row["example"] for row in sft.encode_demonstrations(tokenizer, rows, args)]
    if kind == "dpo":
        return [s for row in dpo.encode_pairs(tokenizer, rows, args) for s in row["pair"]]
    rows = [reward_model.read_ranking(row, tokenizer) for row in rows]
    return [s for row in reward_model.encode_rankings(tokenizer, rows, args) for s in row["group"]]


@pytest.mark.parametrize("kind", KINDS)
def test_response_ends_with_eos_that_counts(kind, tiny):
    """EOS is the last target of chosen and rejected (huggingface/trl#734), though it is BOS too:
    a mask made by ids != pad would lose it (huggingface/trl#6357)."""
    sequences = encode(tiny[1], kind, PAIR)
    _, _, targets, _ = dpo.collate(sequences, "cpu")
    assert targets.tolist() == sequences[0][1] + sequences[1][1]
    assert targets.tolist().count(tiny[1].eos_id) == len(sequences) == 2
    assert dpo.response_logps(tiny[0], sequences)[1].tolist() == [len(r) for _, r in sequences]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_response_has_no_eos_and_is_counted(kind, tiny, capsys):
    """A cut answer did not end there: no EOS after it (direct-preference-optimization,
    preference_datasets.py:233), none over its last token (OpenRLHF/OpenRLHF#1311). A short response
    beside it keeps all its tokens (huggingface/trl#6548)."""
    long = PAIR["chosen"] * 100
    (prompt, chosen), (_, rejected) = encode(tiny[1], kind, dict(PAIR, chosen=long), max_length=40)
    assert chosen == tiny[1].encode(long)[:40 - len(prompt)]
    assert rejected == tiny[1].encode(" No.") + [tiny[1].eos_id]
    assert " 1 responses" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [512, 10**6])
def test_prompt_without_room_is_dropped_and_counted(kind, limit, tiny, capsys):
    """A row whose targets would all be cut is 0/0 = NaN later (huggingface/trl#5826, #6588); beyond
    the model's context there is no position (huggingface/transformers#530), whatever the flag."""
    sequences = encode(tiny[1], kind, dict(PAIR, prompt="plot " * 600), PAIR, max_length=limit)
    assert len(sequences) == 2 and torch.isfinite(dpo.response_logps(tiny[0], sequences)[0]).all()
    assert f"; {2 if kind == 'sft' else 1} left out without room" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS[1:])
def test_pair_identical_after_the_cut_is_dropped_and_counted(kind, tiny, capsys):
    """It would sit at log 2 for ever (natolambert/rlhf-book#503, OpenRLHF/OpenRLHF#1311)."""
    row = dict(PAIR, chosen=" plot" * 40 + " a", rejected=" plot" * 40 + " b")
    assert len(encode(tiny[1], kind, row, PAIR)) == 4
    assert len(encode(tiny[1], kind, row, PAIR, max_length=20)) == 2
    assert "; 1 left out with " in capsys.readouterr().out


@pytest.mark.parametrize("prompt, response", [("The sl", "ow train"), ("Question: ", " hi"),
                                              ("a\n", "\nb"), ("<|endoftext|>", "<|endoftext|>")])
def test_no_token_straddles_prompt_and_response(prompt, response, tiny):
    """What is trained on is the response, character for character, and EOS: merges across the
    border (huggingface/trl#2054) and prompts that end in a space (huggingface/trl#1920)."""
    p, r = tiny[1].encode_example(prompt, response, 512)
    assert tiny[1].decode(r[:-1]) == response and r[-1] == tiny[1].eos_id not in r[:-1]
    assert tiny[1].decode(p[1:]) == prompt and p[0] == tiny[1].bos_id not in p[1:]


def test_rows_of_files(tmp_path):
    """A byte-order mark and blank lines do not matter; U+2028 within a text ends no line."""
    rows = [{"prompt": "A", "chosen": "a\u2028b\x85c"}, {"prompt": "B"}]
    (tmp_path / "a").write_text("\ufeff" + "\n\n".join(
        json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    first, second = read_jsonl(tmp_path / "a")
    assert first["chosen"] == rows[0]["chosen"] and second["where"].endswith("a:3")


def test_rankings_are_read(tiny):
    """Of equal responses the first stays; only a ranking that prefers something is kept, and for
    best of K one with a single best response. A pair is a ranking of two."""
    rankings = [("abca", [1, 2, 2, 3]), ("ab", [1, 1]), ("abc", [1, 1, 2])]
    rows = [dict(PAIR, responses=list(texts), ranks=ranks) for texts, ranks in rankings] + [PAIR]
    rows = [reward_model.read_ranking(row, tiny[1]) for row in rows]
    for loss, expected in (("ranking", [[1, 2, 2], [1, 1, 2], [1, 2]]),
                           ("best_of_k", [[1, 2, 2], [1, 2]])):
        kept = reward_model.encode_rankings(tiny[1], rows, a(loss=loss))
        assert [row["ranks"] for row in kept] == expected
    assert kept[1]["group"][0][1] == tiny[1].encode(PAIR["chosen"]) + [tiny[1].eos_id]


def test_held_out_prompts_are_disjoint():
    """Rows of one prompt never stand on both sides (natolambert/rlhf-book PR #523); at most a tenth
    of the prompts is held out, and a chat is a prompt like any other, in any order of its keys."""
    keys = [("role", "content"), ("content", "role")]
    rows = [{"prompt": [dict.fromkeys(keys[i // 60], f"p{i % 30}")], "n": i} for i in range(120)]
    learn, test, prompts = split_by_prompt(rows)
    assert len(test) == 12 and len(learn) == 108 and len(prompts) == 3
    assert all((row["prompt"] in prompts) == (row in test) for row in rows)
    assert split_by_prompt(rows[::-1])[2] == prompts  # whatever the order of the rows


@pytest.mark.parametrize("prompts, count, held_out", [
    (300, None, 16), (300, 5, 5), (300, 200, 30), (100, None, 10), (9, 200, 1), (2, None, 1)])
def test_so_many_prompts_are_held_out(prompts, count, held_out):
    """`count`, or a tenth where that is less, but at least one. A prompt may have several rows."""
    rows = [{"prompt": f"p{i % prompts}"} for i in range(2 * prompts)]
    learn, test, names = split_by_prompt(rows, *[count] * bool(count))
    assert len(set(names)) == len(names) == held_out
    assert (len(learn), len(test)) == (2 * prompts - 2 * held_out, 2 * held_out)


@pytest.fixture(scope="module")
def judge():
    """A reward model: tiny with a random head."""
    return load_model("tiny", head="reward")


def test_ppo_scores_what_the_reward_model_was_trained_on(judge, tiny, tmp_path, monkeypatch):
    """The same tokens, EOS included (OpenRLHF/OpenRLHF#300, CarperAI/trlx#420), brought to mean 0
    and SD 1 on samples that end; a response that has not ended gets --missing_eos_score (arXiv
    2403.17031)."""
    texts = [" The plot was dull.", " I found the cast superb and funny.", " The"]
    responses = [tiny[1].encode(text) + [tiny[1].eos_id] for text in texts]
    responses[2].pop()
    monkeypatch.setattr(ppo_rlhf, "sample", lambda model, tokenizer, asked, *_, **__: [
        responses[i % 3] for i in range(len(asked))])
    save_model(*judge, tmp_path)
    prompts, args = ["A", "Bb", "C"], a(reward_model=str(tmp_path), device="cpu")
    trained = reward_model.reward_scores(judge[0], [
        judge[1].encode_example(prompt, text, 512) for prompt in prompts for text in texts[:2]])
    reward = ppo_rlhf.load_reward(tiny[0], tiny[1], ["Bb"], args)
    sd, mean = torch.std_mean(trained[2:4].repeat(85), correction=0)  # 256 samples, 170 ended
    sequences, scores, _, means = ppo_rlhf.rollout(tiny[0], reward, tiny[1], prompts, 1, 0, args)
    assert sequences[:2] == [judge[1].encode_example(*x, 512) for x in zip(prompts, texts[:2])]
    expected = [*((trained[[0, 3]] - mean) / sd).tolist(), -1]
    assert scores[:, 0].tolist() == pytest.approx(expected, abs=0.02)  # 171 and 85 of 256
    assert means["samples/without_eos"] == pytest.approx(1 / 3)
    responses[1] = responses[1][:-1]  # now most of them have not ended
    with pytest.warns(UserWarning, match="do not end within --max_new_tokens"), (
            pytest.raises(SystemExit)):  # and all that end are equal
        ppo_rlhf.load_reward(tiny[0], tiny[1], ["Bb"], args)
    large, toy = SimpleNamespace(small=False), a(reward_model=None)
    true = ppo_rlhf.load_reward(None, None, None, toy)
    _, scores, _, _ = ppo_rlhf.rollout(large, true, tiny[1], prompts, 1, 0, toy)
    assert scores[:, 0].tolist() == [-1, 2, 0]
    mine = a(reward_model="mine", missing_eos_score=-3.0)
    _, scores, _, _ = ppo_rlhf.rollout(large, true, tiny[1], prompts, 1, 0, mine)
    assert scores[:, 0].tolist() == [-1, -3, -3]


def test_half_a_text_is_never_scored(judge, tiny, tmp_path, capsys):
    """A reward model whose context is too short for a response would score it mid-way."""
    save_model(*judge, tmp_path)
    judge_of_64 = (judge[0], SimpleNamespace(
        context=64, stop_ids=judge[1].stop_ids, encode_example=lambda prompt, text, longest:
        judge[1].encode_example(prompt, text, min(longest, 64))))
    rows = [{"prompt": "A", "response": " plot" * 70}]
    with pytest.raises(SystemExit):
        win_rate.score_responses(*judge_of_64, rows, 999)
    assert "too short for a prompt and its response" in capsys.readouterr().err


def test_on_policy_pairs_and_their_win_rate(judge, tmp_path, capsys, monkeypatch):
    """The judge's best and worst of n; equal scores are left out and counted, as is an unfinished
    sentence; all is written or nothing. The chosen responses win against the rejected ones."""
    texts = [" The cast was superb.", " It was dull. The", " I found it long.", *[" No."] * 3]
    responses = [judge[1].encode(text) + [judge[1].eos_id] * text.endswith(".") for text in texts]
    monkeypatch.setattr(on_policy_pairs, "sample", lambda *_, **__: responses)
    # Each text is scored alone: in one pass equal texts could differ by rounding.
    monkeypatch.setattr(win_rate, "split_batch", lambda x, _: [[i] for i in range(len(x))])
    save_model(*judge, tmp_path)
    prompts = "A", "B", " plot" * 480  # of 512 tokens
    (tmp_path / "data").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    flags = f"--reward_model {tmp_path} --data {tmp_path}/data --out {tmp_path}/on --n 3".split()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(on_policy_pairs.os, "replace", lambda *_: open(tmp_path))
        on_policy_pairs.main(flags)
    assert not list(tmp_path.glob("on/[ps]a*"))
    on_policy_pairs.main(flags)
    assert ("1 pairs; 1 prompts left out without room for --max_new_tokens; 1 prompts left out "
            "without two different scores") in capsys.readouterr().out
    pair, samples = (read_jsonl(tmp_path / f"on/{name}.jsonl") for name in ("pairs", "samples"))
    group = [judge[1].encode_example("A", text.removesuffix(" The"), 512) for text in texts[:3]]
    scores = reward_model.score_rows(judge[0], [{"group": group, "ranks": [1, 2, 3]}])[0][0]
    assert [row["score"] for row in samples[:3]] == pytest.approx(scores.tolist(), abs=1e-4)
    order = sorted(samples[:3], key=lambda row: row["score"])
    assert pair == [pair[0] | {
        "prompt": "A", "chosen": order[2]["response"], "rejected": order[0]["response"],
        "chosen_score": order[2]["score"], "rejected_score": order[0]["score"]}]
    for name, rows in (("a", [order[0], order[2], *samples[3:5]]),
                       ("b", [order[2], order[2], samples[3]])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    asked, compare = [], win_rate.win_rate
    monkeypatch.setattr(win_rate, "win_rate", lambda *args: asked.append(args) or compare(*args))
    out = win_rate.main(f"{tmp_path}/a {tmp_path}/b --judge {tmp_path} --out {tmp_path}/o".split())
    counts = [[len(judge[1].encode_example(row["prompt"], row["response"], 512)[1])
               for row in read_jsonl(tmp_path / name)[:3]] for name in "ab"]
    longer = [b - a for a, b in zip(*counts)]
    assert [args[3].tolist() for args in asked] == [[-x for x in longer], longer] and any(longer)
    assert out["samples/tokens"] == pytest.approx(sum(counts[1]) / 3)
    # 1 and 0.5 for prompt A, 0.5 for B. Length differs in one pair only, and that one is won.
    assert out["win_rate"] == pytest.approx(2 / 3) and "win_rate_equal_length" not in out
    assert out["win_rate_se"] == pytest.approx(1 / 9)
    said = capsys.readouterr().out
    assert "3 pairs; 1 rows have no partner" in said and "no win rate at equal length" in said


def test_win_rate_at_equal_length():
    """A line through two points, the logits of 6 wins of 8 at +2 tokens and of 1 in 4 at -1, is
    known everywhere; so is its standard error. Twice the pairs of the same prompts know no more.
    Nothing is said where length decides each pair, or is everywhere the same."""
    longer = torch.tensor([2.0] * 8 + [-1.0] * 4)
    wins = torch.tensor([1.0] * 6 + [0, 0, 1, 0, 0, 0])
    scores = torch.zeros(12), wins * 2 - 1
    logit = (math.log(3) - 2 * math.log(3)) / 3  # at 0: a third of the first, two of the second
    rate = 1 / (1 + math.exp(-logit))
    variance = (1 / 8 / (3 / 16) + 4 / 4 / (3 / 16)) / 9 * 12 / 11
    expected = {"win_rate": 7 / 12, "win_rate_equal_length": rate,
                "win_rate_equal_length_se": rate * (1 - rate) * variance**0.5}
    found = win_rate.win_rate(*scores, list(range(12)), longer)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    twice = win_rate.win_rate(*[x.repeat(2) for x in scores], [*range(12)] * 2, longer.repeat(2))
    assert twice == pytest.approx(found) and "win_rate_se" in twice
    other = win_rate.win_rate(*scores[::-1], list(range(12)), -longer)
    assert other["win_rate_equal_length"] == pytest.approx(1 - rate)
    plain = win_rate.rate_without(torch.zeros(12, 0), wins, [0, *range(11)])
    metrics = mean_by_prompt({"x": wins}, [0, *range(11)])
    assert plain == pytest.approx((metrics["x"], metrics["x_se"]))
    assert not any("_se" in name for name in win_rate.win_rate(*scores, [0] * 12, longer))
    for habit in (wins - 0.5, torch.ones(12), torch.zeros(12)):
        assert win_rate.rate_without(habit[:, None], wins, range(12)) is None


def test_ratio_is_one_at_the_first_update(tmp_path, monkeypatch):
    """Rollout and training score with the same function, so before anything moves every ratio is 1,
    padding or not (CarperAI/trlx#508, huggingface/trl#454); and values are what they were."""
    largest, padded = [], []
    for name in ("policy_loss", "value_loss"):
        def watched(new, old, x, mask, loss=getattr(ppo_rlhf, name), **named):
            largest.append(float((new - old).detach().abs()[mask].max()))
            padded.append(not mask.all())
            return loss(new, old, x, mask, **named)
        monkeypatch.setattr(ppo_rlhf, name, watched)
    ppo_rlhf.main(f"--out {tmp_path} --steps 1 --batch_size 12 --lr 1e-30 --samples 1 "
                  "--max_tokens 99 --device cpu".split())
    assert len(largest) > 30 and max(largest) < 1e-4 and any(padded)


@pytest.mark.parametrize("text, ended, right", [
    (" (B) 12\n", True, True), ("(B)", True, False), ("(B) 123", True, False), ("", True, False),
    ("(B) 12", False, False)])
def test_only_finished_answers_that_match_exactly_are_right(text, ended, right):
    """A substring of the answer is not the answer: HIR's code counts it as one."""
    row = {"prompt": "Sort:", "answer": "(B) 12"}
    assert hir.observe(row, text, ended) == {"answer": "correct" if right else "wrong"}
    assert self_correct.appraise(row, text, ended, a(match="all")).value == right


@pytest.mark.parametrize("match, text, right", [
    ("line", "Two and ten.\n\n 1,200 \n", True), ("line", "so 1,200", False), ("line", "", False),
    ("number", "It is 3 * 400 = 1200.0, I think.", True), ("number", "1200 or 7", False),
    ("number", "-1200", False), ("number", "many", False), ("number", "2400 - 1,200", True),
    ("number", "2400-1200", True), ("number", "(3,1200)", True), ("number", "x = -1200", False),
    ("number", "31,200", False)])
def test_a_reply_may_end_with_its_answer(match, text, right):
    """GSM8K's answers end with a number after the reasoning; so may a reply."""
    row = {"prompt": "?", "answer": "3 * 400 = 1200\n1,200"}
    observed = hir.observe(row, text, True, match)
    assert observed == {"answer": "correct" if right else "wrong"}
    assert self_correct.appraise(row, text, True, a(match=match)).value == right


def test_ppo_scores_no_half_of_a_text(judge, tiny, tmp_path, capsys, monkeypatch):
    """A reward model whose context is too short for a sample ends the run with one line; all that
    a sample holds is judged, control tokens too (huggingface/trl#2897, volcengine/verl#1724)."""
    word, end = tiny[1].encode(" The plot was dull."), tiny[1].eos_id
    outputs = [[*word, end], [*word[:2], *[end] * 9, *word[2:], end]]
    monkeypatch.setattr(ppo_rlhf, "sample", lambda model, tokenizer, asked, *_, **__: [
        outputs[i % 2] for i in range(len(asked))])
    save_model(*judge, tmp_path)
    args = a(reward_model=str(tmp_path), device="cpu")
    reward = ppo_rlhf.load_reward(tiny[0], tiny[1], ["A"], args)
    _, scores, texts, _ = ppo_rlhf.rollout(tiny[0], reward, tiny[1], ["A"], 2, 0, args)
    assert texts[1].count("<|endoftext|>") == 9 and scores[0, 0] != scores[0, 1]
    model, tokenizer = load_model(tmp_path, "reward")
    tokenizer.context = 16
    monkeypatch.setattr(ppo_rlhf, "load_model", lambda *_: (model, tokenizer))
    with pytest.raises(SystemExit):
        ppo_rlhf.load_reward(tiny[0], tiny[1], ["A"], args)
    line = capsys.readouterr().err
    assert "its context of 16 tokens is too short" in line and line.count("\n") == 1


def test_texts_of_ptx_begin_as_the_tokenizer_begins_a_text(tmp_path, monkeypatch):
    """With a BOS where the tokenizer has one, and not with EOS (EleutherAI/lm-evaluation-harness
    #1465, huggingface/trl#1392); a long text is cut and then has no EOS."""
    theirs = bpe(tmp_path)
    theirs._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", theirs.bos_token_id)])
    theirs.save_pretrained(tmp_path)
    (tmp_path / "texts").write_text("\n".join(
        json.dumps({"text": text}) for text in ("I saw the film.", "film " * 99)))
    model, _ = load_model(new_folder(tmp_path / "new", "llama"))
    tokenizer, seen = Tokenizer(tmp_path), []
    tokenizer.context = 64
    monkeypatch.setattr(ppo_rlhf, "load_model", lambda name, head, *_: (
        model if head == "lm" else load_model(tmp_path / "new", head)[0], tokenizer))
    monkeypatch.setattr(ppo_rlhf, "learn", lambda *args: seen.append(args[4]) or open(tmp_path))
    with pytest.raises(SystemExit):
        ppo_rlhf.main(f"--ptx_data {tmp_path}/texts --out {tmp_path}/run --batch_size 4 "
                      "--max_new_tokens 8 --device cpu".split())
    bos, eos = theirs.bos_token_id, theirs.eos_token_id
    assert seen[0][0] == ([bos], theirs.encode("I saw the film.")[1:] + [eos]) and bos != eos
    assert seen[0][1] == ([bos], theirs.encode("film " * 99)[1:64])


def test_a_cut_sample_is_never_an_empty_text(judge, tiny, tmp_path, capsys, monkeypatch):
    """Sentences end in other scripts, too; a sample without a whole sentence is left out and
    counted, and is not the best of its prompt."""
    texts = ["昨日見た。とても", "मैंने देखा। बहुत", "هل رأيت؟ نعم", "I saw", "It was", " "]
    responses = [judge[1].encode(text) for text in texts]
    whole = [judge[1].decode(ids, whole=True) for ids in responses]
    assert whole == ["昨日見た。", "मैंने देखा।", "هل رأيت؟", "", "", ""]
    monkeypatch.setattr(on_policy_pairs, "sample", lambda *_, **__: responses)
    monkeypatch.setattr(on_policy_pairs, "toy_reward", lambda text: -len(text))
    on_policy_pairs.main(f"--out {tmp_path} --n 3 --prompts 2 --device cpu".split())
    assert "; 3 responses left out without a whole sentence" in capsys.readouterr().out
    pair, = read_jsonl(tmp_path / "pairs.jsonl")
    assert (pair["chosen"], pair["rejected"]) == (whole[0], whole[1])
    assert [row["response"] for row in read_jsonl(tmp_path / "samples.jsonl")] == whole[:3]


def test_two_answers_to_one_prompt_are_two_problems(tiny, tmp_path):
    """Each sample is judged by the row that it was drawn for, so the order of the rows does not
    matter, and what is right for one answer is no success for the other."""
    answers = ["1", "2"]
    rows = [{"prompt": p, "answer": answer} for p in "AB" for answer in answers]
    (tmp_path / "data").write_text("\n".join(map(json.dumps, rows)))
    flags = f"--data {tmp_path}/data --samples 4".split()
    tasks, _ = hir.read_tasks(tiny[1], hir.parse_args(flags), 99)
    assert [problem["answer"] for problem, _ in tasks] == answers
    online = []
    for problem, wanted in tasks:
        for text in answers:
            done = hir.observe(problem, text, True)
            assert done == {"answer": "correct" if text == problem["answer"] else "wrong"}
            online.append((problem, wanted, done, text))
    assert [(task[0]["answer"], bad, good) for task, bad, good in chains(online)] == [
        ("1", "2", "1"), ("2", "1", "2")]
    problems, _ = self_correct.read_problems(tiny[1], self_correct.parse_args(flags[:2]), 99)
    assert [self_correct.appraise(problem, "2", True, a(match="all")).value
            for problem in problems] == [0, 1]
