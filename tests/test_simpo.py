"""SimPO and its relatives: closed-form values, gradients, invariances, optima on a bandit."""

import argparse
import math

import pytest
import torch

from simpo import (LOSSES, best_first, cpo_loss, encode_rankings, log1mexp, orpo_loss, pairs_of,
                   pro_loss, rrhf_loss, simpo_loss, slic_loss, toy_grammatical, toy_rankings)

R = torch.tensor([1.0, 0.5, 0.0, -0.7, 2.0], dtype=torch.float64)
REF = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
LENGTHS = torch.tensor([4.0, 9.0, 6.0, 3.0, 12.0], dtype=torch.float64)
MU = torch.tensor([0.3, 0.2, 0.2, 0.2, 0.1], dtype=torch.float64)
I, J = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
WEIGHT = MU[I] * MU[J] * torch.sigmoid(R[I] - R[J])  # of i chosen and j rejected, (25,)


def v(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def ranked(*values):
    """A row of K = len(values), as (1, K)."""
    return torch.tensor([values], dtype=torch.float64)


ALL = torch.ones(1, 3, dtype=torch.bool)

# -------------------------------------------------------------------------------------- values


def test_simpo_value_and_gradient():
    """Sums (-6, -6), lengths (3, 6), beta 2, margin 1: the length divides value and gradient."""
    w, l = v(-6, grad=True), v(-6, grad=True)
    loss = simpo_loss(w, l, v(3), v(6), 2.0, 1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(3.048587, abs=1e-6)
    assert w.grad.item() == pytest.approx(-0.635049, abs=1e-6)
    assert l.grad.item() == pytest.approx(0.317525, abs=1e-6)


def test_gamma_is_the_ratio_times_beta():
    """--gamma_beta_ratio 0.5 --beta 2 is a margin of 1: two equal responses lose softplus(1) =
    1.313262; with a margin of 0.5, another meaning of gamma, it is 0.974077 (huggingface/trl#5071).
    """
    args = argparse.Namespace(beta=2.0, gamma_beta_ratio=0.5)
    y, n = torch.full((1, 2), -4.0), torch.full((1, 2), 4.0)
    assert LOSSES["simpo"](y, n, None, None, args).item() == pytest.approx(1.313262, abs=1e-6)
    assert simpo_loss(v(-4), v(-4), v(4), v(4), 2.0, 0.5).item() == pytest.approx(.974077, abs=1e-6)


def test_cpo_value():
    """Sums (-3, -4), beta .1: softplus(-.1) + 3; lam = 0 leaves the preference term."""
    assert cpo_loss(v(-3), v(-4), 0.1).item() == pytest.approx(3.644397, abs=1e-6)
    assert cpo_loss(v(-3), v(-4), 0.1, 0.0).item() == pytest.approx(0.644397, abs=1e-6)


def test_orpo_value():
    """p = (.5, .25): odds 1 and 1/3, so log(4/3) by lam, plus log 2."""
    w, l = v(math.log(0.5)), v(math.log(0.25))
    assert orpo_loss(w, l, v(1), v(1), 0.1).item() == pytest.approx(0.721915, abs=1e-6)
    odds = orpo_loss(w, l, v(1), v(1), 1.0) - orpo_loss(w, l, v(1), v(1), 0.0)
    assert odds.item() == pytest.approx(0.287682, abs=1e-6)


def test_slic_value():
    """Sums (-3, -2.5), margin 1: hinge 1.5; a pair that is apart by more has none."""
    assert slic_loss(v(-3), v(-2.5), 1.0, 0.0).item() == pytest.approx(1.5)
    assert slic_loss(v(-3), v(-2.5), 1.0, 1.0).item() == pytest.approx(4.5)
    assert slic_loss(v(-3), v(-4.5), 1.0, 0.0).item() == 0


def test_rrhf_value():
    """Means (-1, -.5), the first better: .5; the SFT term is the best one's whole sum."""
    y, n, mask = ranked(-4, -1), ranked(4, 2), torch.ones(1, 2, dtype=torch.bool)
    assert rrhf_loss(y, n, ranked(2, 1), mask, 0.0).item() == pytest.approx(0.5)
    assert rrhf_loss(y, n, ranked(2, 1), mask).item() == pytest.approx(4.5)
    assert rrhf_loss(y, n, ranked(1, 2), mask, 0.0).item() == 0
    assert rrhf_loss(y, n, ranked(1, 1), mask, 0.0).item() == 0  # a tie orders nothing


def test_pro_values():
    """Means all 0: log 6. Means all -1 with scores (2, 1, 0): 2.244592. The SFT weight of K = 3 is
    0.2 by default, of the best response's sum."""
    ones = ranked(1, 1, 1)
    assert pro_loss(ranked(0, 0, 0), ones, ranked(2, 1, 0), ALL, 0.0).item() == pytest.approx(
        1.791759, abs=1e-6)
    assert pro_loss(ranked(-1, -1, -1), ones, ranked(2, 1, 0), ALL, 0.0).item() == pytest.approx(
        2.244592, abs=1e-6)
    assert pro_loss(ranked(-1, -1, -1), ones, ranked(2, 1, 0), ALL).item() == pytest.approx(
        2.244592 + 0.2, abs=1e-6)


def test_pro_of_two_is_a_logistic_loss():
    """K = 2, scores (1, 0): softplus of the difference of means."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = pro_loss(ranked(-4, -3), ranked(2, 3), ranked(1, 0), mask, 0.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(1)), abs=1e-6)


@pytest.mark.parametrize("loss", [rrhf_loss, pro_loss])
def test_ranked_losses_ignore_order_and_padding(loss):
    """The order of a row's responses means nothing, and what stands behind its end neither changes
    the loss nor has a gradient."""
    y, n, s = ranked(-4, -9, -2), ranked(4, 5, 1), ranked(1, 3, 2)
    plain = loss(y, n, s, ALL)
    turn = [2, 0, 1]
    assert torch.allclose(loss(y[:, turn], n[:, turn], s[:, turn], ALL), plain)
    for garbage in (0.0, 1e9, math.nan):
        padded = torch.cat([y, torch.full((1, 2), garbage, dtype=torch.float64)], 1)
        padded.requires_grad_()
        more = lambda x, value: torch.cat([x, torch.full((1, 2), value, dtype=x.dtype)], 1)
        again = loss(padded, more(n, 0), more(s, 9.0), more(ALL, False))
        again.sum().backward()
        assert torch.allclose(again, plain) and (padded.grad[:, 3:] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    """Analytic against numeric, in fp64, away from kinks."""
    torch.manual_seed(1)
    args = argparse.Namespace(beta=0.7, gamma_beta_ratio=0.5, lam=0.3, delta=1.0, sft_weight=0.2)
    y = -2 - torch.rand(4, 3, dtype=torch.float64) * 5
    n, s = torch.randint(1, 5, (4, 3)).double(), torch.randn(4, 3).double()
    mask = torch.ones(4, 3, dtype=torch.bool)
    f = lambda y: LOSSES[name](y, n, s, mask, args)
    assert torch.autograd.gradcheck(f, y.requires_grad_())
    assert f(y).shape == (4,)


@pytest.mark.parametrize("x", [-1e-7, -1e-5, -1e-3, -0.5, -0.6931, -0.7, -3.0, -30.0, -200.0])
def test_log1mexp_is_stable(x):
    """log(1 - e^x) in fp32 near a float64 reference, down to x = -1e-7, with a finite gradient
    (huggingface/trl#1491, hpcaitech/ColossalAI#6407)."""
    y = torch.tensor([x], requires_grad=True)
    value = log1mexp(y)
    value.sum().backward()
    exact = float(y.detach())  # what fp32 makes of x
    truth = math.log(-math.expm1(exact)) if exact > -1 else math.log1p(-math.exp(exact))
    assert value.item() == pytest.approx(truth, rel=1e-5, abs=1e-30)
    slope = math.exp(exact) / math.expm1(exact)
    assert y.grad.item() == pytest.approx(slope, rel=1e-4, abs=1e-30)


def test_orpo_is_finite_for_a_certain_token():
    """A response that is certain to the last bit, sum 0, has a finite loss and gradient."""
    w, l = torch.zeros(1, requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    loss = orpo_loss(w, l, torch.ones(1), torch.ones(1))
    loss.sum().backward()
    assert all(torch.isfinite(x).all() for x in (loss, w.grad, l.grad))


def test_doubled_tokens():
    """Every token twice: SimPO and ORPO see the same response, CPO's margin doubles
    (natolambert/rlhf-book PR #243)."""
    w, l, nw, nl = v(-3), v(-7), v(2), v(4)
    for loss in (lambda *x: simpo_loss(*x, 2.0, 1.0), orpo_loss):
        assert torch.equal(loss(w, l, nw, nl), loss(2 * w, 2 * l, 2 * nw, 2 * nl))
    margin = lambda loss: torch.log(torch.expm1(loss))  # of softplus(-m): -m
    assert margin(cpo_loss(2 * w, 2 * l, 0.1, 0.0)).item() == pytest.approx(
        2 * margin(cpo_loss(w, l, 0.1, 0.0)).item())


# -------------------------------------------------------------------------------------- optima


def minimise(loss, start):
    """The vector that minimises loss, by L-BFGS."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=4000, tolerance_grad=1e-13,
                                  tolerance_change=1e-17, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    for _ in range(4):
        optimizer.step(closure)
    return x.detach()


def policy(loss):
    """The policy (5,) that minimises a pair loss of log-probs and lengths, from the reference."""
    def expected(logits):
        y = logits.log_softmax(0)
        return (WEIGHT * loss(y[I], y[J], LENGTHS[I], LENGTHS[J])).sum()

    return minimise(expected, REF.log()).softmax(0)


def tv(p, q):
    return 0.5 * (p - q).abs().sum().item()


def test_cpo_without_sft_ignores_the_reference():
    """softmax(r / beta), whatever the policy started from."""
    assert tv(policy(lambda w, l, *_: cpo_loss(w, l, 0.5, 0.0)), (R / 0.5).softmax(0)) < 1e-6


def test_simpo_without_margin():
    """exp(|y| (r + c) / beta) with the c that makes it sum to one: here a discount on length."""
    c = -2.026762
    best = (LENGTHS * (R + c) / 2).exp()
    assert best.sum().item() == pytest.approx(1, abs=1e-4)
    assert tv(policy(lambda *x: simpo_loss(*x, 2.0, 0.0)), best / best.sum()) < 1e-5


def test_simpo_margin_overstates_a_gap():
    """One pair, won with probability .7, margin 1: 1.430858 where the log odds are .847298."""
    for gamma, expected in ((1.0, 1.430858), (0.0, 0.847298)):
        loss = lambda m: (0.7 * simpo_loss(m, 0 * m, v(1), v(1), 1.0, gamma)
                          + 0.3 * simpo_loss(0 * m, m, v(1), v(1), 1.0, gamma)).sum()
        assert minimise(loss, v(0.0)).item() == pytest.approx(expected, abs=1e-6)


def test_orpo_odds_term():
    """Lengths of one token: sigma(r + c), summing to one."""
    one = torch.ones(25, dtype=torch.float64)
    found = policy(lambda w, l, *_: orpo_loss(w, l, one, one, 1.0) - orpo_loss(w, l, one, one, 0.0))
    best = torch.sigmoid(R - 2.182824)
    assert best.sum().item() == pytest.approx(1, abs=1e-5) and tv(found, best / best.sum()) < 1e-5


def test_orpo_is_near_sft():
    """With its default lam ORPO's optimum is within .0095 of the marginal of winners."""
    one = torch.ones(25, dtype=torch.float64)
    found = policy(lambda w, l, *_: orpo_loss(w, l, one, one, 0.1))
    winners = torch.zeros(5, dtype=torch.float64).index_add(0, I, WEIGHT)
    assert tv(found, winners / winners.sum()) < 0.0095 + 1e-4


def descend(loss, steps=4000):
    """The minimiser of a loss with kinks, by Adam with a falling rate."""
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    return x.detach()


def test_slic_loses_magnitudes():
    """The hinge quantises: gaps of log-probs are whole multiples of delta = 1, whatever the rewards
    are: 0, 1, 1, 2, 3 above the worst response."""
    y = descend(lambda y: (WEIGHT * slic_loss(y[I], y[J], 1.0, 0.0)).sum()).sort().values
    assert (y - y[0]).tolist() == pytest.approx([0, 1, 1, 2, 3], abs=0.02)


def test_rrhf_ties_all_under_noise():
    """Without a margin and with noisy labels the best ranking term is no ranking: all means tie."""
    scores = torch.tensor([[1.0, 0.0]]).expand(25, 2)
    two, mask = torch.ones(25, 2), torch.ones(25, 2, dtype=torch.bool)
    start = torch.tensor([0.0, 0.3, -0.2, 0.5, 0.1], dtype=torch.float64)
    y = descend(lambda x: (WEIGHT * rrhf_loss(torch.stack([(x + start)[I], (x + start)[J]], 1), two,
                                              scores, mask, 0.0)).sum()) + start
    assert y.max() - y.min() < 0.02


def test_pro_of_pairs_recovers_the_reward():
    """K = 2 and scores one apart: Bradley-Terry labels give means r + c."""
    scores = torch.tensor([[1.0, 0.0]]).expand(25, 2)
    two, mask = torch.ones(25, 2), torch.ones(25, 2, dtype=torch.bool)
    y = minimise(lambda x: (WEIGHT * pro_loss(torch.stack([x[I], x[J]], 1), two, scores, mask,
                                              0.0)).sum(), torch.zeros(5, dtype=torch.float64))
    assert (y - R).std() < 1e-6


# ---------------------------------------------------------------------------------------- data


def test_rankings_and_pairs(tiny):
    """A ranking gives each strictly ordered pair, chosen first; a pair is a ranking of two."""
    _, tokenizer = tiny
    rows = [{"prompt": "A", "responses": [" x", " y", " z"], "ranks": [2, 1, 2]}]
    examples, _ = encode_rankings(tokenizer, rows, 64, "simpo")
    x, y, z = examples[0][0]
    best = best_first(examples[0])
    assert best == ([y, x, z], [1, 2, 2])
    assert pairs_of([best]) == [([y, x], [1, 2]), ([y, z], [1, 2])]
    assert pairs_of([([x, y], [1, 2])]) == [([x, y], [1, 2])]


def test_toy_human_is_right_on_average_and_likes_length(tiny):
    """Of two summaries of different quality the human mostly takes the better; the longer the
    summaries it likes, the more words the chosen ones have."""
    from simpo import toy_quality

    words, right = [], []
    for bias in (0.0, 3.0):
        rows = toy_rankings(*tiny, 200, 2, bias, seed=0)
        pairs = [(dict(zip(row["ranks"], row["responses"])), row["facts"]) for row in rows]
        quality = [[toy_quality(p[rank], facts)["quality"] for rank in (1, 2)]
                   for p, facts in pairs]
        right.append(sum(a > b for a, b in quality) / sum(a != b for a, b in quality))
        words.append(sum(len(p[1].split()) for p, _ in pairs) / len(pairs))
    assert right[0] > 0.7 and right[1] > 0.6 and words[1] > words[0] + 0.2


def test_toy_grammatical():
    """What the toy's grammar can say, and nothing else."""
    assert toy_grammatical(" Anna lost a ring in Rome on Monday.")
    assert toy_grammatical(" Somebody lost something.")
    for text in (" Anna lost a ring in Rome on.", " Anna lost.", "", " Anna lost a ring. Oh."):
        assert not toy_grammatical(text)
