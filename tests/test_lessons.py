"""What the lessons define themselves: formulas against enumeration, and rewards of their own."""

import itertools
import json
import math
import random

import pytest
import torch
from conftest import I, J, NOISY, R, REF, tilted, v

import dpo
import model as hub
import ppo_rlhf
import reward_model
import self_correct
import sft
from lessons import (alignment_tax, clip, divisors, filtering, frontier, implicit_rewards,
                     judge_habits, lazy_annotators, length_bias, overoptimisation, real_reviews,
                     reward_hacking, rounds, self_instruct, swapped_generators, vanishing)
from variants import raft
from variants.win_rate import rate_without

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
             if dpo.toy_grammatical(row["chosen"], True)
             and dpo.toy_grammatical(row["rejected"], True)]
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


@pytest.mark.parametrize("habits, ways", [row[1:] for row in judge_habits.ROWS],
                         ids=[row[0] for row in judge_habits.ROWS])
def test_formulas_of_a_judge_with_habits(habits, ways):
    """At `draw_at` a judge calls the models equal. A study's own standard error is the one that
    `seen_from` uses, and a regression on probabilities, which have no noise, finds the formula."""
    for way in ways:
        d = judge_habits.draw_at(habits, way)
        assert judge_habits.rate(d, habits, way) == pytest.approx(0.5)
        slope = (judge_habits.rate(d + 0.01, habits, way) - 0.5) / 0.01
        error = (judge_habits.seen_from(habits, way) - d) / judge_habits.ERRORS * slope
        mean, errors = zip(*[judge_habits.study(d, habits, way, seed) for seed in range(8)])
        assert sum(errors) / 8 == pytest.approx(error, rel=0.07)
        assert sum(mean) / 8 == pytest.approx(0.5, abs=4 * error / 8**0.5)
        places, names = judge_habits.WAYS[way]
        if names:
            x = judge_habits.features(judge_habits.LONGER, places, names)
            p = judge_habits.chances(0.7, habits, judge_habits.LONGER, places).flatten()
            rate, _ = rate_without(x, p, range(len(p)))
            assert rate == pytest.approx(judge_habits.rate(0.7, habits, way))


@pytest.mark.parametrize("p", [0.0, 1.0, 3.0])
def test_position_is_gone_from_verdicts_that_agree(p):
    """Of agreeing verdicts B wins sigma(2d), whatever the habit. Asked once a judge needs the whole
    habit p more; both orders need cosh(p / 2) times what they need without one."""
    sigma, habits, n = (lambda x: 1 / (1 + math.exp(-x))), {"position": p}, judge_habits.PROMPTS
    for d in (-0.4, 0.0, 2.0):
        won, lost = sigma(d + p) * sigma(d - p), sigma(-d - p) * sigma(p - d)
        assert won / (won + lost) == pytest.approx(sigma(2 * d))
        assert judge_habits.rate(d, habits, "agreeing") == pytest.approx(sigma(d))
    needed = {"once": p + 1.96 * 2 / n**0.5, "both": 1.96 * (2 / n) ** 0.5 * math.cosh(p / 2)}
    needed["agreeing"] = needed["both"]
    for way, d in needed.items():
        assert judge_habits.seen_from(habits, way) == pytest.approx(d)


def test_the_optimum_of_a_pool_of_samples():
    """J* and the weights, for samples that are as frequent as two distributions say: exact."""
    reference, policy = v(0.5, 0.25, 0.25), v(0.25, 0.25, 0.5)
    drawn = torch.tensor([[0, 0, 1, 2, 0, 1, 2, 2]])  # four of the reference, four of the policy
    rewards = v(-1.0, 0.3, 2.0)
    best, weights = implicit_rewards.optimum(rewards[drawn], policy.log()[drawn],
                                             reference.log()[drawn], 0.7)
    best_policy = reference * (rewards / 0.7).exp()
    assert float(best) == pytest.approx(0.7 * math.log(best_policy.sum()))
    shares = torch.zeros(3).double().index_add(0, drawn[0], weights[0])
    assert torch.allclose(shares, best_policy / best_policy.sum())


def test_the_weight_of_a_pair_is_that_of_its_gradient():
    """-d loss / dh = beta times the weight. At the optimum it is how often the label is the other
    one, so the two labels of a pair pull equally hard."""
    h, beta = v(-3.0, 0.0, 1.0, 8.0, grad=True), 0.5
    loss = dpo.dpo_loss(h, torch.zeros(4), torch.zeros(4), torch.zeros(4), beta)
    weight = implicit_rewards.gradient_weight(h.detach(), beta)
    assert torch.allclose(torch.autograd.grad(loss.sum(), h)[0], -beta * weight)
    log_ratio = (tilted(R, beta) / REF).log()
    at_optimum = implicit_rewards.gradient_weight(log_ratio[I] - log_ratio[J], beta)
    assert torch.allclose(at_optimum, NOISY[J, I])


def test_the_spread_and_the_repetition_of_implicit_rewards():
    x = v(1, 3, 50, 1, 1, 1).view(2, 3)  # SDs of the kept ones: sqrt(2), 0
    kept = torch.tensor([[True, True, False], [True] * 3])
    assert float(implicit_rewards.spread(x, kept)) == pytest.approx(math.sqrt(2) / 2)
    texts = [" The plot was dull and dull.", " The plot was dull and long. The cast was long."]
    assert [implicit_rewards.repeats(text) for text in texts] == [True, False]


def test_perfect_answers_are_kept_and_the_best_drafts_picked(monkeypatch):
    """swapped_generators.py: the pairs of Eq. (3) are unchanged, and a perfect answer has itself
    as its one correction, with probability 1. Of each n drafts the first of the best is kept."""
    answers = [self_correct.Answer(f" {i}.", value, "") for i, value in enumerate((0.5, 1, 0, 1))]
    before = self_correct.weigh(answers, 3.0, 1.0)
    monkeypatch.setattr(self_correct, "find_pairs", swapped_generators.pairs_that_keep)
    after = dict(zip(*self_correct.weigh(answers, 3.0, 1.0)))
    assert {pair: after.pop(pair) for pair in [(answers[1],) * 2, (answers[3],) * 2]} == {
        (answers[1],) * 2: 1, (answers[3],) * 2: 1}
    assert after == pytest.approx(dict(zip(*before)))
    assert swapped_generators.best_of(answers, 2) == [answers[1], answers[3]]
    assert swapped_generators.best_of(answers, 4) == [answers[1]]
    texts = (" dull cast, funny ring.", " dull ring, funny cast.", " dull cast.", "", " cast,.")
    assert [swapped_generators.keeps_topics(("cast", "ring"), text) for text in texts] == [
        True, False, False, False, False]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_best_of_n_from_a_pool_is_that_of_all_its_subsets(n):
    """The means of scores and of another value over all subsets of n of five samples; two tie."""
    scores, values = v(0.3, -1, 2, 2, 0)[None], v(5, 1, 2, 2, 4)[None]  # (1, 5)
    best = [max(subset, key=lambda i: scores[0, i]) for subset in
            itertools.combinations(range(5), n)]
    for numbers in (scores, values):
        assert overoptimisation.best_of_n_mean(scores, numbers, n) == pytest.approx(
            float(numbers[0, best].mean()))
    texts = [" The plot was superb.", " The plot was dull.", " superb superb."] * 200
    rows = overoptimisation.best_of_n_rows(torch.arange(600.0)[None], texts)
    first = dict(zip(overoptimisation.KEYS, (0, 299.5, 2 / 3, 0, 2 / 3)))
    assert rows[0] == pytest.approx(first) and len(rows) == 10
    assert rows[1][overoptimisation.KEYS[0]] == pytest.approx(math.log(2) - 1 / 2)


def test_the_log_of_ppo_with_the_reward_in_grammatical_reviews(tmp_path, monkeypatch, capsys):
    """A text that repeats a word or leaves the grammar counts 0. Each number stands in the row of
    its own step: were all texts grammatical, it would be the true reward of that row."""
    texts = [" The plot was superb and funny.", " The plot was funny and funny.", " superb", " No."]
    assert reward_hacking.reward_in_grammar(texts) == 2 / 4
    monkeypatch.setattr(ppo_rlhf, "toy_grammatical", lambda text: True)
    monkeypatch.setattr(reward_hacking, "load_judge", lambda *flags: lambda prompts, texts:
                        torch.tensor([*map(float, map(len, texts))]))
    rows = reward_hacking.train_ppo(tmp_path / "ppo", *"--reward_model judge --steps 2 --samples 1 "
                                    "--batch_size 8 --ppo_epochs 1 --max_new_tokens 32 "
                                    "--device cpu".split())
    true = [row["samples/true_reward"] for row in rows]
    assert len(rows) == 3 and len(set(true)) > 1
    assert [row["true_reward/grammatical"] for row in rows] == pytest.approx(true)
    assert rows == reward_hacking.train_ppo(tmp_path / "ppo")


def test_loss_on_summaries_is_logged_beside_what_ppo_logs(tiny, tmp_path, monkeypatch):
    """It is the mean over the summaries' tokens, EOS included, of -log pi, and no token of a post
    counts; learn is itself again after the run, also if the run fails."""
    posts, rows = alignment_tax.make_posts(3, 0), []
    total = tokens = 0
    for post, _, summary in posts:
        prompt, response = tiny[1].encode_example(post, summary, 512)
        logits = tiny[0](input_ids=torch.tensor([prompt + response])).logits
        logps = logits[0].detach().log_softmax(1)  # (T, V)
        total -= sum(float(logps[len(prompt) + t - 1, token]) for t, token in enumerate(response))
        tokens += len(response)

    def learn(networks, *rest):
        return {"policy/loss": rest[0]}

    def train(args):
        rows.append(ppo_rlhf.learn([tiny[0], None], 7.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo_rlhf, "learn", learn)
    monkeypatch.setattr(ppo_rlhf, "train", train)
    with pytest.raises(KeyboardInterrupt):
        alignment_tax.train([], tmp_path, tiny[1], posts)
    assert rows == [{"policy/loss": 7.0, "summaries/loss": pytest.approx(total / tokens, abs=1e-4)}]
    assert ppo_rlhf.learn is learn
    log = [{"scores/mean": reward, "loss": loss} for reward, loss in
           ((0, 9), (1.9, 1), (2.2, 2), (2, 6), (3, 9))]
    assert alignment_tax.at_reward(log, 2, "loss") == 3


@pytest.mark.parametrize("limit, loss, slope", [(0.2, -1.2, 0), (1e9, -1.5, -1.5)])
def test_runs_with_and_without_a_clip(limit, loss, slope, tmp_path, monkeypatch):
    """A token with advantage 1 and ratio 1.5 gains no more than 1.2 with the clip of 0.2, and has
    no gradient. Without it the token has both."""
    seen, own = [], ppo_rlhf.policy_loss

    def train(args):
        ratio = v(math.log(1.5), grad=True)
        value = ppo_rlhf.policy_loss(ratio[None], v(0.0)[None], v(1.0)[None], v(1.0)[None])
        value.backward()
        seen.append((value.item(), ratio.grad.item()))
        (tmp_path / "metrics.jsonl").write_text("{}")

    monkeypatch.setattr(ppo_rlhf, "train", train)
    assert clip.train("2e-4", limit, 0, tmp_path) == [{}] and ppo_rlhf.policy_loss is own
    assert seen == [pytest.approx((loss, slope))]


def test_what_the_lazy_human_likes():
    """The longest run of words from the post, in any case; at weight 0 only true quality counts."""
    row = {"prompt": "It rained a lot. A ring got lost. We were in Rome.\nTL;DR:",
           "facts": {"what": "ring", "where": "Rome"},
           "responses": [" It rained a lot.", " Somebody lost a ring in Rome."]}
    copy, summary = row["responses"]
    # Of "Somebody lost a ring in Rome" the post has "a ring" and "in Rome", but in two places.
    assert [lazy_annotators.copied(text, row["prompt"]) for text in (copy, summary, "")] == [
        1, pytest.approx(2 / 6), 0]
    assert lazy_annotators.liking(copy, row, 5) == pytest.approx(4 * -0.04 + 5)
    assert lazy_annotators.liking(summary, row, 3) == pytest.approx(4 * (1 - 0.06) + 1)
    odds = math.exp(4 * (0.94 + 0.04) - 6 * (1 - 2 / 6))
    assert lazy_annotators.prefers(summary, copy, row, 6) == pytest.approx(odds / (1 + odds))
    counts = [sum(pair["chosen"] == copy for pair in lazy_annotators.judge([row] * 2000, weight, 0))
              / 2000 for weight in (0, 6)]
    expected = [lazy_annotators.prefers(copy, summary, row, weight) for weight in (0, 6)]
    assert counts == pytest.approx(expected, abs=0.04)  # 3.6 SDs of 2,000 draws
    assert lazy_annotators.judge([row | {"responses": [copy]}], 0, 0) == []


def test_means_over_seeds_of_length_bias():
    """Means and SDs, of which one seed has none; the start has no KL."""
    seeds = [{"before": dict.fromkeys(length_bias.METRICS[:5], x),
              "simpo": dict.fromkeys(length_bias.METRICS, 2 * x)} for x in (1.0, 3.0)]
    table = length_bias.means(seeds)
    assert set(table["before"]) == set(length_bias.METRICS[:5])
    assert table["before"]["samples/tokens"] == pytest.approx((2, math.sqrt(2)))
    assert table["simpo"]["kl/policy_reference"] == pytest.approx((4, math.sqrt(8)))
    assert length_bias.means(seeds[:1])["simpo"]["samples/quality"] == (2, 0)


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
