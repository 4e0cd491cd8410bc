"""On the bandit of conftest.py each loss has the optimum of theory, and the yardstick finds J*."""

import itertools
from statistics import fmean

import pytest
import torch
from conftest import I, J, LENGTHS, MU, NOISY, R, REF, best_policy, minimise, tilted

from dpo import dpo_loss, ipo_loss, rdpo_loss, yardstick
from reward_model import best_of_k_loss, ranking_loss

BETA, BEST = 0.5, tilted(R, 0.5)
ONE, ZERO = torch.ones(25, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)


def tv(p, q):
    return 0.5 * (p - q).abs().sum().item()


@pytest.mark.parametrize("pairs", [MU[I] * MU[J], ONE / 25, (I - J).abs().eq(1)],
                         ids=["mu", "uniform", "chain"])
def test_dpo_reaches_the_optimum_for_any_connected_pairs(pairs):
    """DPO's minimiser is pi*, whatever pairs were compared, if they connect all responses."""
    policy = best_policy(lambda *y: dpo_loss(*y, BETA), pairs * NOISY[I, J])
    assert tv(policy, BEST) < 1e-6


def test_optima_of_the_relatives_of_dpo():
    """cDPO with clean labels aims at logit((1 - 2e) p + e). IPO's is ref exp(p(y > mu) / tau) / Z,
    which depends on what was compared with what. R-DPO's is pi* of r - alpha |y|: shorter."""
    cdpo = best_policy(lambda *y: dpo_loss(*y, BETA, 0.1))
    assert tv(cdpo, BEST) == pytest.approx(0.152, abs=2e-3)
    assert tv(best_policy(lambda *y: ipo_loss(*y, 0.5)), tilted(NOISY @ MU, 0.5)) < 1e-6
    rdpo = best_policy(lambda *y: rdpo_loss(*y, LENGTHS[I], LENGTHS[J], BETA, 0.05))
    assert tv(rdpo, tilted(R - 0.05 * LENGTHS, BETA)) < 1e-6
    assert [(p @ LENGTHS).item() for p in (BEST, rdpo)] == pytest.approx([7.89, 6.54], abs=0.01)


def test_reward_losses_recover_the_reward():
    """Pairs of the Bradley-Terry human, and picks of Luce's human among all sets of four: the
    minimiser is the true reward plus a constant."""
    pairs, ranks = torch.stack([I, J], 1), torch.tensor([[1, 2]]).expand(25, 2)
    x = minimise(lambda r: (NOISY[I, J] * ranking_loss(r[pairs], ranks)).sum(), ZERO)
    assert (x - R).std() < 1e-6
    sets = torch.tensor(list(itertools.combinations(range(5), 4)))  # (5, 4)
    x = minimise(lambda r: sum((R[sets].softmax(1)[:, k] * best_of_k_loss(
        r[sets], torch.full((5,), k))).sum() for k in range(4)), ZERO)
    assert (x - R).std() < 1e-6


@pytest.mark.parametrize("policy", [REF, BEST, (REF + BEST) / 2], ids=["start", "best", "between"])
def test_yardstick_finds_the_enumerated_optimum(policy):
    """J and J* from samples against sums over all responses, for two prompts with unlike rewards:
    the logarithm stands inside the mean over prompts."""
    n, rewards = 8000, torch.stack([R, 2 - 2 * R])  # (2 prompts, 5)
    second = torch.stack([policy, policy.flip(0)])  # two policies, (2, 5)
    y = torch.cat([torch.multinomial(REF.expand(2, 5), n, replacement=True),
                   torch.multinomial(second, n, replacement=True)], 1)  # (2, 2n)
    r, ref, pi = rewards.gather(1, y), REF.log()[y], second.log().gather(1, y)  # (2, 2n) each
    numbers = yardstick(r, pi, ref, BETA)
    exact = (second * (rewards - BETA * (second / REF).log())).sum(1).mean().item()
    best = BETA * (REF * (rewards / BETA).exp()).sum(1).log().mean().item()
    assert numbers["J/policy"] == pytest.approx(exact, abs=0.05)
    assert numbers["J/reference"] == pytest.approx((rewards @ REF).mean().item(), abs=0.05)
    assert numbers["J/optimum"] == pytest.approx(best, abs=0.05)
    start = numbers["J/reference"]
    assert numbers["J/share_of_the_way"] == pytest.approx((exact - start) / (best - start), abs=.03)


def test_yardstick_knows_its_standard_errors():
    """The SD of J* and of the share over 60 sets of samples is the standard error that each set
    gives by itself; the SD of 60 numbers is uncertain by a tenth."""
    P, n, found = 3, 200, []
    for _ in range(60):
        y = torch.cat([torch.multinomial(p.expand(P, 5), n, replacement=True)
                       for p in (REF, (REF + BEST) / 2)], 1)  # (P, 2n)
        found.append(yardstick(R[y], ((REF + BEST) / 2).log()[y], REF.log()[y], BETA))
    for key in ("J/optimum", "J/share_of_the_way"):
        spread = torch.tensor([numbers[key] for numbers in found]).std().item()
        assert fmean(numbers[f"{key}_se"] for numbers in found) == pytest.approx(spread, rel=0.3)


def test_yardstick_refuses_a_guess():
    """Fewer than 50 effective samples: no optimum is quoted, it would rest on the luckiest of them.
    Of 128 samples one with a reward of 40 has all the weight; equal samples all count."""
    rewards = torch.zeros(1, 128)
    rewards[0, 63] = 40
    for rewards, effective in ((rewards, 1), (torch.zeros(1, 48), 48), (torch.zeros(1, 52), 52)):
        logps = torch.full_like(rewards, -3.0)
        numbers = yardstick(rewards, logps, logps, 0.5)
        assert numbers["J/effective_samples"] == pytest.approx(effective, rel=1e-3)
        for key in ("J/optimum", "J/optimum_se", "J/share_of_the_way", "J/share_of_the_way_se"):
            assert (key in numbers) == (effective > 50)
