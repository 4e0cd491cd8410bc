"""What the lessons define themselves: formulas against enumeration, and rewards of their own."""

import json
import math
import random

import pytest
import torch
from conftest import R, REF, v

import dpo
import model as hub
import ppo_rlhf
import reward_model
import sft
from lessons import (divisors, filtering, frontier, real_reviews, rounds, self_instruct,
                     vanishing)
from variants import raft

LOGPS = REF.log()[None]  # (1, 5): the bandit is one prompt


@pytest.mark.parametrize("n", [1, 3])
def test_best_of_n_is_that_of_all_draws(n):
    """Of all n-tuples of the bandit's responses the first of the best; two of its rewards tie."""
    rewards = v(1.0, 0.5, 0.5, -0.7, 2.0)
    draws = torch.cartesian_prod(*[torch.arange(5)] * n).view(-1, n)  # (5^n, n)
    best = draws.gather(1, rewards[draws].argmax(1, keepdim=True))[:, 0]
    expected = torch.zeros(5).double().index_add(0, best, REF[draws].prod(1))
    got = frontier.best_of_n(LOGPS, rewards, n).exp()[0]
    assert torch.allclose(got, expected)


def test_no_policy_wastes_less_than_nothing():
    """Points of the frontier waste nothing. Tilted by another reward, the same reward costs more
    KL, which `wasted` measures; nobody knows the price of more reward than the last point has."""
    points = frontier.frontier(LOGPS, R)
    for _, reward, kl in points[::50]:
        assert frontier.wasted(reward, kl, points) == pytest.approx(0)
    other = frontier.tilt(LOGPS, R**3)
    reward, kl = frontier.reward_and_kl(other, LOGPS, R)
    least = min(cost for _, gain, cost in points if gain >= reward)
    assert 0 < frontier.wasted(reward, kl, points) == pytest.approx(kl - least, abs=0.01)
    assert frontier.wasted(2.5, 9.0, points) is None


def test_words_are_enumerated_and_judged_like_the_toy(tiny):
    """Down the tree of words as one by one; and the pairs are those of dpo.py's toy."""
    prompt = frontier.word_prompts()[0]
    logps = frontier.enumerate_logps(*tiny, prompt)
    texts = [f" {a}, {b}, {c}." for a in frontier.WORDS for b in frontier.WORDS
             for c in frontier.WORDS]
    assert [dpo.toy_reward(text) for text in texts] == frontier.REWARDS.tolist()
    few = [0, 1, 18, 324, 5831]
    again = frontier.logps_of(tiny[0], [
        tiny[1].encode_example(prompt, texts[i], 64) for i in few])
    assert torch.allclose(logps[few], again, atol=1e-4)
    pairs = [row for row in frontier.judged_pairs(*tiny, dpo.toy_prompts(), 8, 3)
             if dpo.toy_grammatical(row["chosen"]) and dpo.toy_grammatical(row["rejected"])]
    assert pairs == dpo.toy_pairs(*tiny, 8, 3)


@pytest.mark.parametrize("script", [ppo_rlhf, raft], ids=["ppo_rlhf", "raft"])
def test_a_reward_of_ones_own(script, tmp_path, capsys):
    """PPO and RAFT learn from the reward that they are given, also for prompts without a reward
    model, which are refused if they are given none."""
    (tmp_path / "data").write_text("".join(f'{{"prompt": "Film {i}."}}\n' for i in range(20)))
    args = script.parse_args(f"--data {tmp_path / 'data'} --out {tmp_path / 'run'} --steps 1 --n 2 "
                             "--batch_size 4 --samples 1 --device cpu".split())
    with pytest.raises(SystemExit):
        script.train(args)
    assert "give a --reward_model" in capsys.readouterr().err
    script.train(args, lambda prompts, texts: torch.tensor([float(prompts[0][:5] == "Film ")
                                                            + len(text) for text in texts]))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["scores/mean"] > 5 and "samples/true_reward" not in row


def test_what_two_lessons_count(tmp_path):
    """The rare reward of vanishing.py, and the steps that are nearest to a KL in rounds.py."""
    kind = " The plot was superb and funny. The cast was gripping and moving."
    texts = [kind, kind[:-1], kind.replace("and moving", "and dull"), kind.partition(". ")[0] + "."]
    assert vanishing.rare_rewards([], texts).tolist() == [1, 0, 0, 0]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({
        "kl/policy_reference": i, "samples/true_reward": 10 * i, "samples/grammatical": 1}) + "\n"
        for i in range(20)))
    assert rounds.reward_at(7.1, [tmp_path]) == [70, 7, 1]


def test_real_reviews_are_paired_by_their_first_two_words():
    """Opposite labels and the same beginning; a prompt has as many pairs as the rarer label."""
    texts = [("a film that works", 1), ("a film that fails", 0), ("a film too long", 0),
             ("no film at all", 0)]
    rows = [{"text": text, "label": label} for text, label in texts]
    assert real_reviews.make_pairs(rows) == {"a film": [
        {"prompt": "Movie review: a film", "chosen": " that works", "rejected": " that fails"}]}


def test_the_judge_of_real_reviews_is_naive_bayes():
    """Log-odds of the counts plus 1; rare words do not count, and twice is not more than once."""
    rows = [{"text": text, "label": label} for text, label in (
        [("good", 1)] * 3 + [("good", 0)] + [("bad", 0)] * 3 + [("rare", 1)] * 2)]
    judge = real_reviews.fit_judge(rows)
    assert judge["weights"] == pytest.approx({"good": math.log(4 / 2), "bad": math.log(1 / 4)})
    assert real_reviews.positive("Good, good!", judge) == pytest.approx(2 / 3)
    both = 1 / (1 + math.exp(-(math.log(2) - math.log(4)) / math.sqrt(2)))
    assert real_reviews.positive("bad good", judge) == pytest.approx(both)
    assert real_reviews.positive("", judge) == 0.5


def test_best_of_real_reviews(tmp_path):
    """Of each two texts the one with the higher score, in places of the whole list."""
    model, tokenizer = hub.load_model("tiny", "reward")
    prompts, texts = ["A", "A", "B", "B"], [" x", " y z.", " It was dull.", " No."]
    scores = [float(reward_model.reward_scores(model, [tokenizer.encode_example(*x, 99)]))
              for x in zip(prompts, texts)]
    expected = [0 if scores[0] > scores[1] else 1, 2 if scores[2] > scores[3] else 3]
    assert real_reviews.best_of((model, tokenizer), prompts, texts, 2) == expected
    model.score.weight.data.neg_()
    assert real_reviews.best_of((model, tokenizer), prompts, texts, 2) == [
        1 - expected[0], 5 - expected[1]]


def test_real_reviews_end_to_end(tmp_path, capsys):
    """The files, and the table of a model and of its best samples, with the start at a KL of 0."""
    rows = [{"text": f"the {i} film was {word} to me and to you", "label": label}
            for i in range(2500) for word, label in (("great", 1), ("poor", 0))
            if i < 130 or label == i % 2]
    (tmp_path / "reviews").write_text("\n".join(map(json.dumps, rows)))
    real_reviews.main(f"{tmp_path}/reviews --out {tmp_path}".split())
    train, test, sft = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
                        for name in ("train", "test", "sft"))
    assert len({row["prompt"] for row in test}) == 60 and test[0].keys() == train[0].keys()
    assert not {row["prompt"] for row in test} & {row["prompt"] for row in train}
    assert len(sft) == 600 and "completion" in sft[0]
    hub.save_model(*hub.load_model("tiny", "reward"), tmp_path)
    real_reviews.main(f"--out {tmp_path} --models tiny --best_of {tmp_path} --n 2 "
                      "--max_new_tokens 2".split())
    table = json.loads((tmp_path / "judged.json").read_text())
    assert table["tiny"]["kl"] == 0 and table["best of 2"]["kl"] == pytest.approx(math.log(2) - 0.5)
    assert (tmp_path / "real_reviews.png").stat().st_size > 5000
    (tmp_path / "few").write_text(json.dumps(rows[0]))
    for bad in ("few", "reviews --models tiny"):
        with pytest.raises(SystemExit) as stop:
            real_reviews.main(f"{tmp_path}/{bad} --out {tmp_path}".split())
        assert stop.value.code == 2
    assert "at least 120 and 2,000" in capsys.readouterr().err


def test_lengths_of_right_and_wrong_answers():
    steps = [[(10, 1.0), (20, 0.0), (40, 0.0)], [(30, 1.0)]]
    assert [divisors.mean_tokens(steps, right) for right in (0, 1)] == [30, 20]
    assert math.isnan(divisors.mean_tokens(steps[1:], 0))


# ------------------------------------------------------- data first: filtering.py, self_instruct.py


def test_demonstrations_of_mixed_quality():
    """A third by each of three people, so on average neither kind nor unkind. A fifth is scrambled,
    which leaves the true reward as it is."""
    rows = filtering.demonstrations(["A"], 4000, 0)
    reward, grammatical = filtering.quality([row["completion"] for row in rows])
    assert reward == pytest.approx(0, abs=0.1) and grammatical == pytest.approx(0.8, abs=0.03)
    review = " The plot was superb and funny. I found the cast dull."
    other = filtering.scrambled(review, random.Random(0))
    assert sorted(other.split()) == sorted(review.split()) and other[0] == " "
    assert sft.toy_reward(other) == sft.toy_reward(review) == 1 and not sft.toy_grammatical(other)


def test_the_best_tenth_has_the_highest_scores():
    scores = torch.tensor([0.5, 3, -1, 2, 2] + [0.0] * 25)
    assert filtering.best_tenth(list(range(30)), scores) == [1, 3, 4]


def test_the_judge_scores_each_row(tmp_path, monkeypatch):
    """In the order of the rows, of which there may be more than one part holds."""
    model, tokenizer = hub.load_model("tiny", "reward")
    monkeypatch.setattr(filtering, "load_model", lambda *_: (model, tokenizer))
    rows = filtering.demonstrations(sft.toy_prompts()[:3], 257, 0)
    scores = filtering.judge(tmp_path, rows)
    last = tokenizer.encode_example(rows[-1]["prompt"], rows[-1]["completion"], 512)
    assert len(scores) == 257
    assert torch.allclose(reward_model.reward_scores(model, [last])[0], scores[-1], atol=1e-5)


@pytest.mark.parametrize("a, b, expected", [
    ("the police killed the gunman", "the police kill the gunman", 4 / 5),
    ("a b c d", "d c b a", 1 / 4),  # the order counts
    ("a b", "a x x x b x", 2 * 2 / (2 + 6)),  # precision 1, recall 1/3; gaps are allowed
    ("a a", "a", 2 / 3), ("A, b!", "a b", 1), ("a", "", 0), ("", "", 0)])
def test_rouge_l(a, b, expected):
    """F1 of the longest common subsequence of words: 2 LCS / (words of a + words of b)."""
    assert self_instruct.rouge_l(a, b) == self_instruct.rouge_l(b, a) == pytest.approx(expected)


def test_what_enters_the_pool():
    """Another topic makes another instruction, with a ROUGE-L of 7/8; a repeated word does not."""
    text, other = "Write a long, fair review of the plot:", "Write a long, fair review of the cast:"
    held_out = self_instruct.hir.in_words(self_instruct.HELD_OUT[0])
    assert {text, other} <= {*self_instruct.IN_WORDS} and len(self_instruct.IN_WORDS) == 48
    assert self_instruct.rouge_l(text, other) == 7 / 8
    for new, reason in {text: "near-duplicates", text.replace("plot", "plot plot"):
                        "near-duplicates", "Write a long review of the cast:": "invalid", "":
                        "invalid", held_out: "held out", other: None}.items():
        assert self_instruct.why_left_out(new, [text]) == reason, new


def test_people_give_instructions_and_obey_them():
    """Each length, mood and topic appears; nothing is held out; the reviews do what is asked."""
    rng = random.Random(0)
    for text in self_instruct.seed_instructions(12, rng):
        wanted = self_instruct.IN_WORDS[text]
        assert wanted not in self_instruct.HELD_OUT
        for prompt, review in self_instruct.by_people(text, 2, rng):
            assert prompt == text and self_instruct.hir.toy_done(review) == wanted
