"""On a bandit with five responses, minimising each loss reaches the optimum that theory states.

Rewards, reference, lengths, and labels from Bradley and Terry's model with exact expectations: no
sampling, so the only error is the optimizer's.
"""

import pytest
import torch

from dpo import dpo_loss, ipo_loss, kto_loss, rdpo_loss, yardstick

R = torch.tensor([1.0, 0.5, 0.0, -0.7, 2.0], dtype=torch.float64)
REF = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
LENGTHS = torch.tensor([4.0, 9.0, 6.0, 3.0, 12.0], dtype=torch.float64)
MU = torch.tensor([0.3, 0.2, 0.2, 0.2, 0.1], dtype=torch.float64)
BETA = 0.5
P = torch.sigmoid(R[:, None] - R[None, :])  # P[i, j]: how often i is preferred to j
I, J = (
    index.flatten() for index in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
)


def minimise(loss):
    """The policy (5,) that minimises loss(log pi), from the reference, by L-BFGS."""
    logits = REF.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=5000,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    return logits.detach().softmax(0)


def expected(pair_loss, weight=None):
    """E of pair_loss(i chosen, j rejected) over pairs (i, j) from mu x mu and noisy labels."""
    weight = MU[:, None] * MU[None, :] if weight is None else weight  # (5, 5)
    return lambda logp: (
        weight.flatten() * P.flatten() * pair_loss(logp[I], logp[J], REF.log()[I], REF.log()[J])
    ).sum()


def tv(p, q):
    return 0.5 * (p - q).abs().sum().item()


def tilted(reward, beta):
    """ref exp(r / beta) / Z."""
    return (REF.log() + reward / beta).softmax(0)


def test_optimal_policy_of_the_kl_objective():
    """The numbers for pi* and beta log Z that everything below leans on."""
    best = tilted(R, BETA)
    assert best.tolist() == pytest.approx(
        [0.448517, 0.103125, 0.030350, 0.003742, 0.414265], abs=1e-6
    )
    assert (BETA * (REF * (R / BETA).exp()).sum().log()).item() == pytest.approx(0.942758, abs=1e-6)


@pytest.mark.parametrize("pairs", ["mu", "uniform", "chain"])
def test_dpo_reaches_the_optimum_for_any_connected_pairs(pairs):
    """DPO's minimiser is pi*, whatever pairs were compared, if they connect all responses."""
    weight = {
        "mu": None,
        "uniform": torch.full((5, 5), 0.04, dtype=torch.float64),
        "chain": (I - J).abs().eq(1).double().view(5, 5),
    }[pairs]
    policy = minimise(expected(lambda *x: dpo_loss(*x, BETA), weight))
    assert tv(policy, tilted(R, BETA)) < 1e-6


def test_cdpo_has_its_own_targets():
    """With clean labels, label smoothing aims at logit((1 - 2e) p + e): not at pi* (TV 0.152)."""
    policy = minimise(expected(lambda *x: dpo_loss(*x, BETA, 0.1)))
    assert tv(policy, tilted(R, BETA)) == pytest.approx(0.152, abs=2e-3)


def test_ipo_optimum_depends_on_the_pairs():
    """IPO's is ref exp(p(y > mu) / tau) / Z: it depends on what was compared with what."""
    policy = minimise(expected(lambda *x: ipo_loss(*x, 0.5)))
    assert policy.tolist() == pytest.approx(
        [0.468884, 0.236594, 0.152520, 0.058046, 0.083956], abs=1e-5
    )
    assert tv(policy, tilted(P @ MU, 0.5)) < 1e-6


def test_rdpo_optimum_is_shorter():
    """R-DPO's is pi* of r - alpha |y|: mean length 7.89 falls to 6.54 (the misprint: 9.25)."""
    policy = minimise(
        expected(lambda w, l, rw, rl: rdpo_loss(w, l, rw, rl, LENGTHS[I], LENGTHS[J], BETA, 0.05))
    )
    assert tv(policy, tilted(R - 0.05 * LENGTHS, BETA)) < 1e-6
    assert (tilted(R, BETA) @ LENGTHS).item() == pytest.approx(7.89, abs=0.01)
    assert (policy @ LENGTHS).item() == pytest.approx(6.54, abs=0.01)


def test_kto_moves_mass_where_desirable_outweighs():
    """KTO pushes y up iff lambda_D q > lambda_U (1 - q), q its share of good labels: with q below
    one half on responses 3 and 4 their mass goes to zero."""
    q = torch.tensor([0.9, 0.6, 0.55, 0.2, 0.45], dtype=torch.float64)
    logits = REF.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(3000):
        logp = logits.log_softmax(0)
        good, bad = (
            kto_loss(logp, REF.log(), torch.full((5,), flag), torch.tensor(0.0), BETA)
            for flag in (True, False)
        )
        optimizer.zero_grad()
        (MU * (q * good + (1 - q) * bad)).sum().backward()
        optimizer.step()
    policy = logits.detach().softmax(0)
    assert policy[3] + policy[4] < 1e-3


@pytest.mark.parametrize("policy", [REF, tilted(R, BETA), (REF + tilted(R, BETA)) / 2])
def test_yardstick_finds_the_enumerated_optimum(policy):
    """J of the policy, and J* from the pool of samples, against sums over all five responses."""
    generator = torch.Generator().manual_seed(0)
    n = 20000
    y = torch.cat(
        [torch.multinomial(p, n, replacement=True, generator=generator) for p in (REF, policy)]
    )
    numbers, ell = yardstick(R[y][None], policy.log()[y][None], REF.log()[y][None], BETA)
    exact = (policy * (R - BETA * (policy / REF).log())).sum().item()
    assert numbers["J/policy"] == pytest.approx(exact, abs=4 * numbers["J/policy_error"] + 1e-9)
    assert numbers["J/optimum"] == pytest.approx(
        0.942758, abs=4 * numbers["J/optimum_error"] + 1e-9
    )
    assert numbers["J/optimum_error"] < 0.01
    if tv(policy, tilted(R, BETA)) < 1e-9:  # at the optimum ell does not depend on the response
        assert ell.std().item() < 1e-9
        assert numbers["J/share_of_the_way"] == pytest.approx(1.0, abs=0.02)


def test_yardstick_standard_errors_are_honest():
    """Over 200 repetitions the estimates scatter as much as they say they do."""
    policy = (REF + tilted(R, BETA)) / 2
    generator = torch.Generator().manual_seed(1)
    runs = []
    for _ in range(200):
        y = torch.cat(
            [
                torch.multinomial(p, 3 * 200, replacement=True, generator=generator).view(3, 200)
                for p in (REF, policy)
            ],
            dim=1,
        )  # (3 prompts, 2n)
        runs.append(yardstick(R[y], policy.log()[y], REF.log()[y], BETA)[0])
    for value, error in (("J/policy", "J/policy_error"), ("J/optimum", "J/optimum_error")):
        spread = torch.tensor([run[value] for run in runs]).std().item()
        stated = torch.tensor([run[error] for run in runs]).mean().item()
        assert stated == pytest.approx(spread, rel=0.25)


def test_yardstick_refuses_a_guess():
    """Few effective samples: no optimum is quoted, it would rest on the luckiest of them."""
    rewards = torch.tensor([[0.0] * 63 + [40.0] + [0.0] * 64], dtype=torch.float64)
    logps = torch.full((1, 128), -3.0, dtype=torch.float64)
    numbers, _ = yardstick(rewards, logps, logps, 0.5)
    assert numbers["J/effective_samples"] < 50 and "J/optimum" not in numbers
