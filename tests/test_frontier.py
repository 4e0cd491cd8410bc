"""benchmarks/frontier.py: enumeration, the exact frontier, and what methods aim at."""

import copy
import math
import random

import pytest
import torch

import dpo
from benchmarks import frontier as f

# The bandit of test_optima.py, as one prompt with five responses.
R = torch.tensor([1.0, 0.5, 0.0, -0.7, 2.0], dtype=torch.float64)
REF = torch.tensor([[0.40, 0.25, 0.20, 0.10, 0.05]], dtype=torch.float64).log()  # (1, 5)


def test_enumeration_is_scoring_one_by_one(tiny):
    """The tree of words gives each response the log-prob that `score` gives it, in the set's order.

    A wrong order would show: rewards and log-probs of different responses would be paired.
    """
    model, tokenizer = tiny
    prompt = f.word_prompts(True)[0]
    every = f.enumerate_logps(model, tokenizer, prompt)
    assert every.shape == f.REWARDS.shape == (18**3,)
    texts = [f" {a}, {b}, {c}." for a in f.WORDS for b in f.WORDS for c in f.WORDS]
    few = random.Random(0).sample(range(18**3), 40)
    one_by_one = f.logps_of(model, [tokenizer.encode_example(prompt, texts[i], 64) for i in few])
    torch.testing.assert_close(every[few], one_by_one, rtol=0, atol=1e-4)
    assert [f.REWARDS[i].item() for i in few] == [f.word_reward(texts[i]) for i in few]
    assert every.exp().sum() < 1


def test_only_responses_of_the_set_count():
    assert f.word_reward(" amazing, dull, amazing.") == 1
    for other in (" amazing, dull.", " amazing, dull, amazing", " amazing, dull, tedious, amazing.",
                  " amazing,dull, amazing.", " amazing, dull, opera."):
        assert f.word_reward(other) == -math.inf


def test_frontier_is_the_optimum_at_each_beta():
    """At beta 0.5 and 1: J* = .942758 and .750758 (closed form), reward and KL as of pi*."""
    for beta, best in ((0.5, 0.942758), (1.0, 0.750758)):
        reward, kl = f.reward_and_kl(f.tilt(REF, R / beta), REF, R)
        assert reward - beta * kl == pytest.approx(best, abs=1e-6)
    points = f.frontier(REF, R)
    kls, rewards = [kl for _, _, kl in points], [reward for _, reward, _ in points]
    assert kls == sorted(kls) and rewards == sorted(rewards)
    # No policy is above: not even the best of many random ones.
    for logits in 3 * torch.randn(300, 1, 5, dtype=torch.float64):
        reward, kl = f.reward_and_kl(logits.log_softmax(1), REF, R)
        waste = f.wasted(reward, kl, points)
        assert waste is None or waste > -1e-4


def test_wasted_is_nats_to_the_left():
    """pi* wastes nothing; a policy of the same reward and more KL wastes the difference."""
    points = f.frontier(REF, R)
    reward, kl = f.reward_and_kl(f.tilt(REF, R / 0.7), REF, R)
    assert f.wasted(reward, kl, points) == pytest.approx(0, abs=1e-3)
    assert f.wasted(reward, kl + 0.5, points) == pytest.approx(0.5, abs=1e-3)
    assert f.wasted(2.5, 9.0, points) is None  # no policy reaches this


def test_aims_are_the_optima_of_the_objectives():
    """IPO: its loss has no gradient there; SFT on chosen: the winners' share, 2 ref p."""
    p = torch.sigmoid(R[:, None] - R)  # (5, 5)
    beats = (p * REF.exp()).sum(1)  # (5,): p(y > mu), mu = ref
    torch.testing.assert_close(f.win_rate(REF, R)[0], beats)
    winners = f.aim_of("sft on chosen", 1, REF, R).exp()[0]
    torch.testing.assert_close(winners, 2 * REF.exp()[0] * beats)
    ipo = f.aim_of("ipo", 0.5, REF, R)
    h = (ipo - REF)[0]  # (5,): up to a constant
    h.requires_grad_()
    pairs = (REF.exp()[0][:, None] * REF.exp()[0])[..., None] * torch.stack([p, p.T], 2)
    losses = torch.stack([dpo.ipo_loss(x[:, None], x, 0, 0, 0.5) for x in (h, -h)], 2)  # (5, 5, 2)
    (pairs * losses).sum().backward()
    torch.testing.assert_close(h.grad, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert f.aim_of("kto", 0.5, REF, R) is None


def test_best_of_n_with_ties():
    """n = 4 on the bandit: KL .553158. With two equal rewards: both gain alike; sums stay 1."""
    best = f.best_of_n(REF, R, 4)
    assert f.reward_and_kl(best, REF, R)[1] == pytest.approx(0.553158, abs=1e-6)
    tied = torch.tensor([1.0, 1.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    best = f.best_of_n(REF, tied, 3)
    assert best.exp().sum() == pytest.approx(1)
    torch.testing.assert_close((best - REF)[0, 0], (best - REF)[0, 1])
    assert best.exp()[0, 4] == pytest.approx(1 - 0.95**3)


def test_a_pool_of_two_models_weighs_like_the_first(tiny):
    """Samples of two different models: the weights pi_ref/q sum to about 1 for each prompt.

    And those of one and the same model weigh alike, whichever of the two drew them.
    """
    model, tokenizer = tiny
    prompts = f.word_prompts(True)[:2]
    weights, rewards = f.pooled([model, model], tokenizer, prompts, [64, 32], dpo.toy_reward)
    assert weights.shape == rewards.shape == (2, 96)
    torch.testing.assert_close(weights.exp(), torch.full((2, 96), 1 / 96, dtype=torch.float64))
    assert f.effective_samples(weights, 0 * rewards) == pytest.approx(96)

    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.ln_f.weight.mul_(0.4)  # flatter
    weights, _ = f.pooled([model, other], tokenizer, prompts, [256, 128], dpo.toy_reward)
    assert weights.exp().sum(1).tolist() == pytest.approx([1, 1], abs=0.1)
    assert f.effective_samples(weights, torch.zeros(1)) < 350
    heavy = torch.tensor([[0.0, 0.0, 0.0, 50.0]])
    assert f.effective_samples(torch.zeros(1, 4), heavy) == pytest.approx(1)
