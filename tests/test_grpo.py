"""GRPO, RLOO and Dr. GRPO: values by hand, exact expectations over all groups, verified rewards.

A single run cannot show which way a gradient points on average. So the groups of the bandit in
conftest.py are enumerated, each with its probability.
"""

import itertools
import json
import math

import pytest
import torch
from conftest import R, REF, tilted, v

import hir
import ppo_rlhf
from variants import grpo, raft, verified
from variants.grpo import group_advantages, grpo_loss

LOG2 = math.log(2)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def expected_gradient(policy, kind, n, beta=0.0, reference=REF, rewards=R, corrected=False):
    """Minus the gradient of grpo_loss in the logits of a policy over one-token responses, averaged
    over all groups of n."""
    logits = policy.log().requires_grad_()
    groups = torch.tensor(list(itertools.product(range(len(policy)), repeat=n)))  # (P, n)
    weight = policy.detach()[groups].prod(1)  # (P,)
    advantages = group_advantages(rewards[groups], kind).flatten()
    logps = logits.log_softmax(0)[groups.flatten(), None]  # (P*n, 1)
    loss = grpo_loss(logps, logps.detach(), reference.log()[groups.flatten(), None], advantages,
                     torch.ones_like(logps, dtype=torch.bool), 1, beta=beta, corrected=corrected)
    (loss.view(-1, n).mean(1) * weight).sum().backward()
    return -logits.grad


# ----------------------------------------------------------------------------- values by hand


def test_advantages_by_hand():
    """Scores 1, 2, 3, 6: mean 3, SD sqrt(14/4) = 1.870829. The others of 6 have mean 2, those of 1
    have 11/3. Two unequal scores are always 1 SD apart from their mean."""
    scores = rows([1, 2, 3, 6])
    assert group_advantages(scores, "centered").tolist() == [[-2, -1, 0, 3]]
    assert group_advantages(scores, "leave_one_out")[0].tolist() == pytest.approx(
        [-8 / 3, -4 / 3, 0, 4])
    assert group_advantages(scores)[0].tolist() == pytest.approx(
        [-1.069045, -0.534522, 0, 1.603567], abs=1e-4)
    assert group_advantages(rows([3, 8]))[0].tolist() == pytest.approx([-1, 1], abs=1e-4)
    both = group_advantages(rows([1, 2, 3, 6], [0, 0, 4, 4]), "centered")
    assert both.tolist() == [[-2, -1, 0, 3], [-2, -2, 2, 2]]  # each prompt has its own mean


@pytest.mark.parametrize("kind", ["group", "centered", "leave_one_out"])
def test_equal_scores_teach_nothing(kind):
    """In fp32 the mean of seven scores of 0.7 is off by 6e-8, and their SD is 6e-8 or 0. With only
    1e-8 beside it all seven advantages would be 0.86 or 6; with 1e-4 they are 0.0006."""
    assert group_advantages(torch.full((2, 7), 0.7), kind).abs().max() < 1e-3


@pytest.mark.parametrize("divisor, losses, slopes", [
    (v(1, 3), [-1, 1], [-1, 1 / 3]), (2.0, [-1 / 2, 3 / 2], [-1 / 2, 1 / 2]),
    (4.0, [-1 / 4, 3 / 4], [-1 / 4, 1 / 4])], ids=["length", "tokens", "constant"])
def test_divisors(divisor, losses, slopes):
    """A good response of 1 token and a bad one of 3, before the first update. Divided by its own
    length, the bad one's tokens are blamed a third as much as the good one's token is praised. With
    one number for both, each token counts the same. What stands behind the end has no effect."""
    logps = rows([-1, 7, -9], [-2, -2, -2]).requires_grad_()
    mask = torch.tensor([[True, False, False], [True, True, True]])
    loss = grpo_loss(logps, logps.detach() + rows([0, 1, -1], [0, 0, 0]), logps.detach() - 1,
                     v(1, -1), mask, divisor)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx(losses)
    assert logps.grad[0].tolist() == pytest.approx([slopes[0], 0, 0])
    assert logps.grad[1].tolist() == pytest.approx([slopes[1]] * 3)


@pytest.mark.parametrize("corrected, loss, slopes", [
    (False, -0.975, [-1 / 4, -3 / 8]), (True, -0.936643, [-0.1300, -0.3267])])
def test_clip_and_kl_by_hand(corrected, loss, slopes):
    """Ratios 3/2 and 1 with A = 1: -1.2 (clipped: slope 0) and -1 (slope -1). u = log 2: k3 is
    2 - 1 - log 2 = 0.306853 with slope -(2 - 1); u = -log 2: 1/2 - 1 + log 2 = 0.193147 with
    slope 1/2. beta 1/2, divided by 2: (-2.2 + 0.25) / 2 = -0.975, slopes (0 - .5) / 2 and
    (-1 + .25) / 2. Times the ratio, k3 has the slope -u q: -3/2 log 2 and log 2."""
    logps = rows([-1, -2]).requires_grad_()
    old, reference = rows([-1 - math.log(1.5), -2]), rows([-1 + LOG2, -2 - LOG2])
    value = grpo_loss(logps, old, reference, v(1), torch.ones(1, 2, dtype=torch.bool), 2, beta=0.5,
                      corrected=corrected)
    value.sum().backward()
    if corrected:
        loss = (-2.2 + 0.5 * (1.5 * 0.306853 + 0.193147)) / 2
        slopes = [-0.5 * 1.5 * LOG2 / 2, (-1 + 0.5 * LOG2) / 2]
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert logps.grad[0].tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("A, ratio, loss, slope", [
    (1, 1.5, -1.2, 0), (1, 0.5, -0.5, -0.5), (-1, 1.5, 1.5, 1.5), (-1, 0.5, 0.8, 0)])
def test_clipping_looks_at_the_sign_of_the_advantage(A, ratio, loss, slope):
    """As in PPO: beyond 1 +- 0.2 nothing is gained, but a wrong move costs its full price."""
    logps = rows([math.log(ratio)]).requires_grad_()
    value = grpo_loss(logps, rows([0]), rows([0]), v(A), torch.ones(1, 1, dtype=torch.bool), 1)
    value.sum().backward()
    assert (value.item(), logps.grad.item()) == pytest.approx((loss, slope))


def test_no_penalty_is_no_number():
    """With beta 0 a token that the reference likes e^800 times better adds 0, not 0 times inf."""
    loss = grpo_loss(rows([-900]), rows([-900]), rows([-100]), v(1), torch.ones(1, 1).bool(), 1)
    assert loss.tolist() == [-1]


# ------------------------------------------------------------------------- exact expectations


@pytest.mark.parametrize("n", [2, 3, 4])
def test_rloo_is_unbiased_and_dr_grpo_is_shorter(n):
    """The gradient of E[r] in the logits is pi (r - E[r]). RLOO's is that in expectation, for any
    n; Dr. GRPO's is (n - 1)/n of it, as its baseline contains the response itself; GRPO's has
    another direction."""
    true = REF * (R - REF @ R)
    assert true.tolist() == pytest.approx([0.178, -0.01375, -0.111, -0.1255, 0.07225])
    assert torch.allclose(expected_gradient(REF, "leave_one_out", n), true, atol=1e-12)
    assert torch.allclose(expected_gradient(REF, "centered", n), true * (n - 1) / n, atol=1e-12)
    ratio = expected_gradient(REF, "group", n) / true
    assert ratio.max() > 2 * ratio.min()


@pytest.mark.parametrize("n, p, expected", [
    (2, 0.5, 1.0), (2, 0.01, 1.0), (4, 0.5, 1.616025), (4, 0.1, 1.690282), (4, 0.01, 1.727456),
    (8, 0.5, 1.855656), (8, 0.01, 2.608862)])
def test_dividing_by_the_sd_weighs_prompts(n, p, expected):
    """Rewards 1 with probability p, else 0. Of n samples k succeed, so SD = sqrt(k(n - k))/n, and
    GRPO's gradient is E[SD] / (p(1 - p)) times that of p: 1 for pairs, at n = 4 it rises from 1.62
    for p = 1/2 to sqrt(n - 1) = 1.73 for p near 0. In large groups it is 1/sqrt(p(1 - p)): hard and
    easy prompts weigh more, and what is maximised is the mean of 2 arcsin(sqrt(p))."""
    policy, rewards = v(p, 1 - p), v(1, 0)
    weight = sum(math.comb(n, k) * p**k * (1 - p)**(n - k) * math.sqrt(k * (n - k)) / n
                 for k in range(n + 1)) / (p * (1 - p))
    assert weight == pytest.approx(expected, abs=1e-6)
    gradient = expected_gradient(policy, "group", n, reference=policy, rewards=rewards)
    assert gradient[0].item() == pytest.approx(weight * p * (1 - p), rel=5e-4)


PI = v(0.3, 0.2, 0.2, 0.1, 0.2)
GRADIENTS = {  # of KL(pi || ref), of KL(ref || pi), of half the chi2 of pi and ref, in the logits
    "pi || ref": (-.1302, -.0739, -.0293, -.0146, .2480), "ref || pi": (-.1, -.05, 0, 0, .15),
    "chi2": (-.2205, -.1370, -.0970, -.0485, .5030)}


@pytest.mark.parametrize("estimator, expected", [
    ("k1 in the loss", (0,) * 5), ("k2 in the loss", GRADIENTS["pi || ref"]),
    ("k3 in the loss", GRADIENTS["ref || pi"]), ("corrected", GRADIENTS["pi || ref"]),
    ("k1 in the reward", GRADIENTS["pi || ref"]), ("reversed k3", GRADIENTS["chi2"]),
    ("k3 in the reward", (-.0302, -.0239, -.0293, -.0146, .0980))])
def test_what_an_estimator_of_the_kl_differentiates(estimator, expected):
    """The averages of k1, k2, k3 are alike, their gradients are not: the table of docs/grpo.md."""
    logits = PI.log().requires_grad_()
    logps, reference = logits.log_softmax(0)[:, None], REF.log()[:, None]  # (5, 1)
    u, ones = reference - logps, torch.ones(5, 1, dtype=torch.bool)

    def ours(A=0.0, beta=1.0, **more):  # (5,)
        return grpo_loss(logps, logps.detach(), reference, A + torch.zeros(5), ones, 1, beta=beta,
                         **more)

    k3 = (torch.expm1(u) - u)[:, 0].detach()
    loss = {"k1 in the loss": -u[:, 0], "k2 in the loss": u[:, 0]**2 / 2,
            "k3 in the loss": ours(), "corrected": ours(corrected=True),
            "reversed k3": (torch.expm1(-u) + u)[:, 0],
            "k1 in the reward": ours(A=u[:, 0].detach(), beta=0.0),
            "k3 in the reward": ours(A=-k3, beta=0.0)}[estimator]
    (PI * loss).sum().backward()  # samples of pi, whose weights are no function of the logits
    assert logits.grad.tolist() == pytest.approx(expected, abs=6e-5)


def test_k3_in_the_loss_has_another_optimum():
    """KL in the reward leads to pi* = ref exp(r/beta)/Z, and so does k3 times the ratio. k3 alone
    has the gradient of KL(ref || pi), and training ends where pi (r - E[r]) = beta (pi - ref):
    pi = ref beta/(c - r) with c = beta + E[r], here 2.037953. Its J is 0.854828, not 0.942758."""
    beta, n = 0.5, 2
    best, other = tilted(R, beta), REF * beta / (2.037953 - R)
    assert other.tolist() == pytest.approx([.192687, .081277, .049069, .018262, .658706], abs=1e-5)
    J = [(pi @ (R - beta * (pi / REF).log())).item() for pi in (best, other)]
    assert J == pytest.approx([0.942758, 0.854828], abs=1e-5)
    at_best = expected_gradient(best, "leave_one_out", n, beta)
    at_other = expected_gradient(other / other.sum(), "leave_one_out", n, beta)
    assert at_other.abs().max() < 1e-5 and at_best.abs().max() > 0.05
    corrected = expected_gradient(best, "leave_one_out", n, beta, corrected=True)
    assert corrected.abs().max() < 1e-12
    rewards = R - beta * (best / REF).log()  # what RLOO compares
    assert expected_gradient(best, "leave_one_out", n, rewards=rewards).abs().max() < 1e-12


def test_a_penalty_in_the_loss_does_not_look_ahead():
    """Responses of two tokens, 0 or 1 each. The KL of the whole response depends on the first token
    also through the second. k1 in the reward charges the first token for both, so its gradient is
    the whole KL's; k3, also times the ratio, charges each token for itself alone."""
    first, second = v(0.3), v(0.2, -1.0)  # logits of a 1: at first, and after a 0 or a 1
    reference = [v(-0.2), v(0.5, 0.9)]

    def logps(parameters, y):  # log-probs of the tokens of response y: (2,)
        x = torch.stack([parameters[0][0], parameters[1][y[0]]])
        return torch.nn.functional.logsigmoid(x * (2 * torch.tensor(y) - 1))

    def gradient(loss_of):  # of the mean of a loss over all responses
        parameters = [first.clone().requires_grad_(), second.clone().requires_grad_()]
        total = 0
        for y in itertools.product((0, 1), repeat=2):
            own, ref = logps(parameters, y), logps(reference, y)
            total = total + loss_of(own[None], ref[None])
        total.backward()
        return torch.cat([x.grad for x in parameters])

    def ours(own, ref, advantages, **more):
        loss = grpo_loss(own, own.detach(), ref, advantages, torch.ones(1, 2).bool(), 1, **more)
        return own.detach().sum().exp() * loss.sum()

    whole = gradient(lambda own, ref: own.sum().exp() * (own - ref).sum())
    in_reward = gradient(lambda own, ref: ours(own, ref, (ref - own).sum(1).detach()))
    in_loss = gradient(lambda own, ref: ours(own, ref, v(0), beta=1.0, corrected=True))
    assert torch.allclose(in_reward, whole, atol=1e-12)
    assert torch.allclose(in_loss[1:], whole[1:], atol=1e-12)  # of the second token
    assert (in_loss[0] - whole[0]).abs() > 0.01  # of the first


def test_length_bias():
    """Right and wrong answers, short (2 tokens) and long (8), a quarter each; A = +-1/2. Divided by
    length, the log-odds of long against short rise among the wrong by (-1/2)(1/8 - 1/2)/4 = 3/64
    and fall as much among the right. With a constant they stay."""
    lengths, A = v(2, 8, 2, 8), v(0.5, 0.5, -0.5, -0.5)
    mask = torch.arange(8) < lengths[:, None]
    for divisor, change in ((lengths, [-3 / 64, 3 / 64]), (8.0, [0, 0])):
        logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        # each response spreads its log-prob evenly over its tokens
        logps = (logits.log_softmax(0) / lengths)[:, None] * mask
        loss = grpo_loss(logps, logps.detach(), logps.detach(), A, mask, divisor)
        loss.mean().backward()
        short, long = -logits.grad[0::2], -logits.grad[1::2]
        assert (long - short).tolist() == pytest.approx(change, abs=1e-12)


# ----------------------------------------------------------------------------- verified rewards


LONGER = ["so 42", "42 is it", "6 * 7 = 42.0."]


@pytest.mark.parametrize("text", ["42", " 42\n", "142", "", *LONGER])
def test_verify_is_the_rule_of_hir(text):
    problem = {"prompt": "6 * 7 =", "answer": " 42"}
    for match in ("all", "line", "number"):
        right = hir.observe(problem, text, True, match) == {"answer": "correct"}
        assert grpo.verify(text, problem["answer"], match) == right
        assert right == (text.strip() == "42" or match == "number" and text in LONGER)


def test_answers_are_those_that_would_be_learned(tiny, tmp_path, monkeypatch):
    """Each prompt has its own answers, in a chat what the template makes of them; the same prompts
    are asked as in training and evaluation, whatever the order of a message's keys."""
    _, tokenizer = tiny
    messages = [{"role": "user", "content": "6 * 7 ="}]
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} ok" \
               "{% endif %}\n{% endfor %}"
    monkeypatch.setattr(tokenizer.transformers, "chat_template", template)
    data = [{"prompt": "2 + 2 =", "answer": " 4"}, {"prompt": "2 + 2 =", "answer": "four"},
            {"prompt": "3 + 3 =", "answer": "6"},
            {"prompt": messages, "answer": [{"role": "assistant", "content": "42"}]}]
    (tmp_path / "data").write_text("\n".join(map(json.dumps, data)))
    reward = verified.load_verifier(tokenizer, tmp_path / "data")
    sorted_keys = [dict(sorted(messages[0].items()))]
    assert list(sorted_keys[0]) != list(messages[0])
    asked = ["2 + 2 ="] * 4 + ["3 + 3 ="] * 2 + [sorted_keys] * 2 + [messages]
    texts = ["4", " four", "6", "44", "6", "4", "42", "42 ok", "42 ok"]
    assert reward(asked, texts).tolist() == [1, 1, 0, 0, 1, 0, 0, 1, 1]
    with pytest.raises(SystemExit):  # "four" holds no number
        verified.load_verifier(tokenizer, tmp_path / "data", match="number")
    (tmp_path / "data").write_text(json.dumps(data[0]))
    reward = verified.load_verifier(tokenizer, tmp_path / "data", match="number")
    assert reward(asked[:2], ["2 + 2 = 4", "5"]).tolist() == [1, 0]


def test_instructions_are_rewarded_as_hir_follows_them(tiny, monkeypatch, capsys):
    """Of the instructions that are asked, and no others."""
    monkeypatch.setattr(verified, "toy_warm_up", lambda *_: None)
    args = grpo.parse_args(["--toy", "instructions"])
    reference, prompts, reward, sets = verified.load_instructions(*tiny, args)
    assert len(prompts) == 40 and reference is not tiny[0]
    assert [len(tasks) for tasks in sets.values()] == [40, 8]
    assert set(prompts) == {hir.ask(*task) for task in sets["all"]}
    asked = "Write a short, kind review of the cast:"
    assert asked in prompts
    texts = [" The cast was superb.", " The cast was superb. The story was plain.",
             " The story was superb.", " The cast was dull.", " The cast is superb."]
    assert reward([asked] * 5, texts).tolist() == [1, 0, 0, 0, 0]


def test_a_run_on_instructions(tmp_path, monkeypatch):
    """It reports what hir.py does, before and after, and no reward of another task. The reference
    is the policy after its warm-up, also with adapters."""
    warm_up = verified.toy_warm_up

    def brief(policy, tokenizer, args):
        args.warm_up = 2
        warm_up(policy, tokenizer, args)

    monkeypatch.setattr(verified, "toy_warm_up", brief)
    grpo.main(["--toy", "instructions", "--requirements", "1", "--n", "2", "--batch_size", "4",
               "--steps", "2", "--samples", "4", "--device", "cpu", "--max_new_tokens", "24",
               "--lora_rank", "2", "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["before"].keys() == results["after"].keys() == {
        "followed/all", "followed/length", "samples/reviews", "followed/at_temperature_1"}
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, log)
    assert first["kl/policy_reference"] == 0 and "samples/true_reward" not in first
    assert 0 <= first["scores/mean"] <= 1


@pytest.mark.parametrize("script", [ppo_rlhf, raft, grpo])
def test_a_verified_reward_for_all_three(script, tmp_path):
    """One line gives it to PPO and RAFT. What did not end is wrong, also of larger models."""
    data = [{"prompt": f"Film {i}.", "answer": "The plot was dull."} for i in range(20)]
    (tmp_path / "data").write_text("\n".join(map(json.dumps, data)))
    args = script.parse_args(f"--data {tmp_path / 'data'} --out {tmp_path / 'run'} --steps 1 --n 2 "
                             "--batch_size 4 --samples 1 --missing_eos_score 0.25 "
                             "--device cpu".split())

    def sample(model, tokenizer, asked, *_, **__):
        texts = [" The plot was dull.", "The plot was superb.", "The plot was dull."]
        ids = [tokenizer.encode(text) + [tokenizer.eos_id] for text in texts]
        return ([ids[0], ids[1], ids[2][:-1], ids[0]] * len(asked))[:len(asked)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, "sample", sample)
        patch.setattr(script, "load_model", larger(script.load_model))
        tokenizer = ppo_rlhf.load_model()[1]
        script.train(args, verified.load_verifier(tokenizer, args.data))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["scores/mean"] == pytest.approx((1 + 0 + 0.25 + 1) / 4)


def larger(load_model):
    """load_model, for models that count as larger than tiny."""
    def load(*args):
        model, tokenizer = load_model(*args)
        model.small = False
        return model, tokenizer

    return load


# ----------------------------------------------------------------------------- flags, the loop


def test_a_preset_sets_three_flags_and_gives_way_to_them():
    table = {"grpo": ("group", "length", "loss"), "dr_grpo": ("centered", "constant", "none"),
             "rloo": ("leave_one_out", "constant", "reward"), "dapo": ("group", "tokens", "none")}
    for preset, values in table.items():
        args = grpo.parse_args(["--preset", preset])
        assert (args.advantage, args.divisor, args.kl) == values
    args = grpo.parse_args("--preset rloo --kl none --divisor tokens".split())
    assert (args.advantage, args.divisor, args.kl) == ("leave_one_out", "tokens", "none")
    scores = [grpo.parse_args(flags.split()).missing_eos_score for flags in (
        "", "--data x", "--data x --reward_model y", "--toy instructions",
        "--data x --missing_eos_score -2")]
    assert scores == [-1, 0, -1, 0, -2]


def test_a_group_of_one_ends_with_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.main(["--n", "1", "--out", str(tmp_path / "run")])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: --n 1:") and line.count("\n") == 1


@pytest.fixture
def one_step(tmp_path, monkeypatch):
    """A function: seven scores of each prompt -> the line of one step of RLOO without a penalty."""
    monkeypatch.setattr(grpo, "evaluate", lambda *_: ({"after": {}}, []))
    args = grpo.parse_args(["--preset", "rloo", "--beta", "0", "--n", "7", "--steps", "1",
                            "--device", "cpu", "--out", str(tmp_path / "run")])

    def step(scores):
        args.batch_size = len(scores)
        grpo.train(args, lambda prompts, texts: torch.tensor(scores))
        return json.loads((tmp_path / "run" / "metrics.jsonl").read_text())

    return step


def test_equal_scores_are_counted(one_step):
    """Of two prompts one has equal scores, then both: the loss and the gradient are 0, and
    scores/equal says why. Seven scores of 0.7 are equal, whatever their SD is in fp32."""
    for scores, equal in (([1] * 7 + [0, 1.0, 0, 0, 1, 0, 0], 0.5), ([1.0] * 14, 1.0)):
        row = one_step(scores)
        assert row["scores/equal"] == equal
        assert (row["policy/loss"] == row["policy/grad_norm"] == 0) == (equal == 1)
    assert one_step([0.7] * 7)["scores/equal"] == 1


def test_equal_scores_for_five_steps_are_told(tmp_path):
    args = grpo.parse_args(["--steps", "5", "--batch_size", "4", "--n", "2", "--samples", "1",
                            "--max_new_tokens", "4", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.warns(UserWarning, match="for 5 steps .* nothing to compare"):
        grpo.train(args, lambda prompts, texts: torch.zeros(len(texts)))


def test_updates_are_shared_out(one_step, monkeypatch):
    """A process that gets no part of an update adds nothing to it."""
    monkeypatch.setattr(grpo, "share", lambda parts: [])
    assert one_step([0.0, 1.0] * 7)["policy/grad_norm"] == 0
