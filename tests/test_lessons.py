"""What the lessons define themselves: formulas against enumeration, and rewards of their own."""

import json
import math

import pytest
import torch
from conftest import R, REF, v

import dpo
import ppo_rlhf
from lessons import divisors, frontier, rounds, vanishing
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
    assert frontier.judged_pairs(*tiny, dpo.toy_prompts(), 8, 3) == dpo.toy_pairs(*tiny, 8, 3)


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


def test_lengths_of_right_and_wrong_answers():
    steps = [[(10, 1.0), (20, 0.0), (40, 0.0)], [(30, 1.0)]]
    assert [divisors.mean_tokens(steps, right) for right in (0, 1)] == [30, 20]
    assert math.isnan(divisors.mean_tokens(steps[1:], 0))
