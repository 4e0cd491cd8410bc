"""What `evaluate` prints and what the toys' humans say: the README's tables are made of these.

Models are tables here: the next token depends on the last one only. So each log-prob is a sum of a
few table entries, and each number that `evaluate` returns is a sum in plain Python.
"""

import math
import random
import re
from collections import Counter
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

import dpo
import hir
import ppo_rlhf
import reward_model
import self_correct
import sft
import simpo
from variants import chain_of_hindsight, kto, raft, rankings

EOS = 0
PROMPTS = {"A": [6], "B": [7], "C": [6, 7, 6]}  # tokens 1 to 5 are words
REVIEWS = {(1, EOS): " The plot was plain.", (2, EOS): " The plot was superb.",
           (2, 3, EOS): " The plot was superb and funny.", (4, EOS): " The plot was dull.",
           (4, 5, 1, EOS): " The plot was dull and weak and plain."}  # this one is no review
TRUE = dict(zip(REVIEWS.values(), (0, 1, 2, -1, -2)))
A = SimpleNamespace(seed=3, data=None, max_new_tokens=12, max_tokens=20, missing_eos_score=-1.0,
                    reward_model=None, beta=0.7, samples=40, n=3, loss="dpo", label_smoothing=0.0,
                    match="all", small=True)


def network(name, table=None):
    """A model from a table (8, 8) of log-probs, which is random, and another one for each name."""
    if table is None:
        generator = torch.Generator().manual_seed(ord(name[0]))
        table = torch.randn(8, 8, generator=generator, dtype=torch.float64).log_softmax(1)
    return SimpleNamespace(
        name=name, table=table, small=True, device=torch.device("cpu"), dtype=table.dtype,
        base_model=lambda input_ids, **_: SimpleNamespace(last_hidden_state=table[input_ids]),
        get_output_embeddings=lambda: SimpleNamespace(weight=torch.eye(8, dtype=table.dtype)))


POLICY, REFERENCE = network("policy"), network("reference")


def tokenizer_of(texts):
    return SimpleNamespace(encode_prompt=PROMPTS.__getitem__, stop_ids={EOS},
                           decode=lambda ids: texts[tuple(ids)])


def logp(model, prompt, response):
    ids = [PROMPTS[prompt][-1], *response]
    return sum(float(model.table[x, y]) for x, y in zip(ids, ids[1:]))


def written(model, prompt, seed, count, texts=REVIEWS):
    """The first `count` responses of a model to a prompt. Those to other prompts are others."""
    return random.Random(f"{model.name} {prompt} {seed}").choices(list(texts), k=count)


@pytest.fixture
def writes(monkeypatch):
    """A function: script, texts -> in this script `sample` returns what `written` returns."""
    def patch(script, texts=REVIEWS):
        def sample(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, **_):
            assert (max_new_tokens, temperature) == (A.max_new_tokens, 1.0)
            lists = {prompt: iter(written(model, prompt, seed, len(prompts), texts))
                     for prompt in PROMPTS}
            names = {tuple(ids): prompt for prompt, ids in PROMPTS.items()}
            return [list(next(lists[names[tuple(ids)]])) for ids in prompts]

        monkeypatch.setattr(script, "sample", sample)
        return tokenizer_of(texts)

    return patch


# ---------------------------------------------------------------------------- metrics of policies


def agree(column, expected):
    """A column of the table may have more numbers than are expected here."""
    assert {key: column[key] for key in expected} == pytest.approx(expected)


def table_of(texts):
    return {"samples/true_reward": fmean(TRUE[text] for text in texts),
            "samples/grammatical": fmean(text.count(" and ") < 2 for text in texts)}


def yardstick(rewards, ratios, beta):
    """J of the reference, J of the policy and J*, one prompt and one sample at a time.

    rewards, ratios: for each prompt (those of the reference's samples, those of the policy's). A
    ratio is log pi/pi_ref. J* weighs a sample by pi_ref / q, where q = (pi_ref + pi) / 2.
    """
    start = fmean(r for old, _ in rewards for r in old)
    now = fmean(r - beta * ratio for (_, new), (_, its) in zip(rewards, ratios)
                for r, ratio in zip(new, its))
    best = fmean(beta * math.log(fmean(
        math.exp(r / beta) / ((1 + math.exp(ratio)) / 2) for r, ratio in zip(sum(two, []), sum(
            its, [])))) for two, its in zip(rewards, ratios))
    return {"J/reference": start, "J/policy": now, "J/optimum": best,
            "J/share_of_the_way": (now - start) / (best - start)}


@pytest.mark.parametrize("script", [dpo, ppo_rlhf])
def test_each_sample_is_of_its_prompt(script, writes, float64):
    """Three prompts with 40 unlike samples each: rewards, log-probs and texts of one sample stay
    together, whatever is reshaped on the way (a P x n table read as n x P has the same mean)."""
    tokenizer, prompts = writes(script), list(PROMPTS)
    scale = dict(zip(PROMPTS, (1, 1, 1) if script is dpo else (1, -1, 0.5)))

    def reward(prompts, texts):
        return torch.tensor([scale[prompt] * TRUE[text] for prompt, text in zip(prompts, texts)])

    if script is dpo:
        pairs = [{"prompt": prompt, "pair": [(ids, [2, EOS]), (ids, [y, EOS])]}
                 for prompt, ids in PROMPTS.items() for y in (2, 4)]
        columns, samples = dpo.evaluate(POLICY, REFERENCE, tokenizer, pairs, prompts, A)
        wins = [logp(POLICY, x, (2, EOS)) - logp(POLICY, x, (4, EOS))
                > logp(REFERENCE, x, (2, EOS)) - logp(REFERENCE, x, (4, EOS)) for x in PROMPTS]
        assert 0 < sum(wins) < 3  # half of the pairs are ties, which count as wrong
        agree(columns["after"], {"rewards/accuracy": sum(wins) / 6})
    else:
        columns, samples = ppo_rlhf.evaluate(POLICY, REFERENCE, reward, tokenizer, prompts, A)
    drawn = {prompt: [written(model, prompt, A.seed, A.samples) for model in (REFERENCE, POLICY)]
             for prompt in PROMPTS}
    rewards = [[[scale[prompt] * TRUE[REVIEWS[y]] for y in own] for own in drawn[prompt]]
               for prompt in PROMPTS]
    ratios = [[[logp(POLICY, prompt, y) - logp(REFERENCE, prompt, y) for y in own]
               for own in drawn[prompt]] for prompt in PROMPTS]
    for k, column in enumerate(columns.values()):
        texts = [REVIEWS[y] for prompt in PROMPTS for y in drawn[prompt][k]]
        agree(column, table_of(texts) | {
            "samples/tokens": fmean(len(y) for own in drawn.values() for y in own[k])})
    gains = [TRUE[REVIEWS[y]] - TRUE[REVIEWS[x]] for two in drawn.values() for x, y in zip(*two)]
    wins = [0.5 if gain == 0 else gain > 0 for gain in gains]
    agree(columns["after"], yardstick(rewards, ratios, A.beta) | {
        "kl/policy_reference": fmean(ratio for _, new in ratios for ratio in new),
        "samples/win_rate": fmean(wins)})
    assert samples == [{"prompt": prompt, "before": REVIEWS[old[0]], "after": REVIEWS[new[0]]}
                       for prompt, (old, new) in drawn.items()]


@pytest.mark.parametrize("script", [dpo, ppo_rlhf, raft])
@pytest.mark.parametrize("change, left_out", [
    ({"small": False}, {"samples/grammatical"}), ({"beta": 0.0}, {"J/policy", "J/optimum"}),
    ({"data": "mine"}, {"samples/true_reward", "samples/grammatical", "samples/win_rate"})])
def test_what_a_table_leaves_out(script, change, left_out, writes, monkeypatch, float64):
    """A larger model's reviews are not the toy's, own prompts have no true reward, and J has no
    meaning without a price. DPO has always one, and J only in the toy; best-of-n, no wins."""
    if script is dpo and "beta" in change:
        return
    args = SimpleNamespace(**vars(A) | change)
    for model in (POLICY, REFERENCE):
        monkeypatch.setattr(model, "small", args.small)
    tokenizer, prompts = writes(ppo_rlhf if script is raft else script), list(PROMPTS)

    def reward(prompts, texts):
        return torch.tensor([float(TRUE[text]) for text in texts])

    if script is dpo:
        pairs = [{"prompt": "A", "pair": [(PROMPTS["A"], [2, EOS]), (PROMPTS["A"], [4, EOS])]}] * 2
        columns, _ = dpo.evaluate(POLICY, REFERENCE, tokenizer, pairs, prompts, args)
    elif script is raft:
        columns, _ = raft.evaluate_best_of_n(REFERENCE, reward, tokenizer, prompts, args)
    else:
        columns, _ = ppo_rlhf.evaluate(POLICY, REFERENCE, reward, tokenizer, prompts, args)
    if script is dpo and "data" in change:
        left_out = left_out | {"J/policy", "J/optimum"}
    every = {"samples/true_reward", "samples/grammatical", "samples/tokens", "J/policy",
             "J/optimum", "kl/policy_reference", "samples/win_rate"}
    if script is raft:
        every.remove("samples/win_rate")
    assert every & columns["after"].keys() == every - left_out
    assert not left_out & columns["before"].keys()


def test_best_of_n_takes_the_best_of_each_group(writes):
    """The best of three neighbours, which answer one prompt, has a log-ratio that the rewards alone
    give: log (F^n - F_^n) / (F - F_), where the shares F and F_ are of this prompt's samples."""
    tokenizer, n = writes(ppo_rlhf), A.n
    scale = dict(zip(PROMPTS, (1, -1, 0.5)))

    def score(prompt, y):
        return scale[prompt] * TRUE[REVIEWS[y]]

    columns, samples = raft.evaluate_best_of_n(
        REFERENCE, lambda prompts, texts: torch.tensor([
            scale[prompt] * TRUE[text] for prompt, text in zip(prompts, texts)]),
        tokenizer, list(PROMPTS), A)
    rewards, ratios, bests, expected = [], [], [], []
    for prompt in PROMPTS:
        single = written(REFERENCE, prompt, A.seed, A.samples)
        many = written(REFERENCE, prompt, A.seed + 1, n * A.samples)
        best = [max(many[i:i + n], key=lambda y: score(prompt, y)) for i in range(0, len(many), n)]
        pool = [score(prompt, y) for y in single + many]
        F = {r: fmean(other <= r for other in pool) for r in pool}
        F_ = {r: fmean(other < r for other in pool) for r in pool}
        rewards.append([[score(prompt, y) for y in own] for own in (single, best)])
        ratios.append([[math.log((F[r] ** n - F_[r] ** n) / (F[r] - F_[r])) for r in own]
                       for own in rewards[-1]])
        bests += best
        expected.append({"prompt": prompt, "before": REVIEWS[single[0]], "after": REVIEWS[best[0]]})
    after = yardstick(rewards, ratios, A.beta) | table_of([REVIEWS[y] for y in bests])
    after |= {"scores/mean": fmean(r for _, own in rewards for r in own),
              "samples/tokens": fmean(map(len, bests)),
              "kl/policy_reference": fmean(x for _, own in ratios for x in own),
              "kl/bound": math.log(3) - 2 / 3}
    agree(columns["after"], after)
    agree(columns["before"], {"scores/mean": after["J/reference"]})
    assert samples == expected


SUMMARIES = {(1, EOS): " Anna lost a ring.", (2, 3, EOS): " Boris lost a ring.",
             (4, 5, EOS): " We laughed.", (5, EOS): " Anna lost something in Rome."}
FACTS = dict(zip(PROMPTS, ({"who": "Anna", "what": "ring"}, {"who": "Boris"}, {"where": "Rome"})))


@pytest.mark.parametrize("small", [True, False])
def test_summaries_are_of_their_posts(small, writes, monkeypatch, float64):
    """Each summary is judged by the facts of its own post; the posts repeat up to 256 samples, or
    32 of a larger model. KL is of the policy's samples, policy over reference."""
    tokenizer, count = writes(simpo, SUMMARIES), 256 if small else 32
    rows = [{"prompt": prompt, "facts": FACTS[prompt], "pair": [(ids, [2, EOS]), (ids, [4, EOS])]}
            for prompt, ids in PROMPTS.items()]
    for model in (POLICY, REFERENCE):
        monkeypatch.setattr(model, "small", small)
    columns, samples = simpo.evaluate(POLICY, REFERENCE, tokenizer, rows,
                                      SimpleNamespace(**vars(A) | {"loss": "simpo"}))
    asked, drawn, qualities = (list(PROMPTS) * count)[:count], [], []
    for model, column in zip((REFERENCE, POLICY), columns.values()):
        lists = {prompt: iter(written(model, prompt, A.seed, count, SUMMARIES))
                 for prompt in PROMPTS}
        drawn.append([(prompt, next(lists[prompt])) for prompt in asked])
        judged = [simpo.toy_quality(SUMMARIES[y], FACTS[prompt]) for prompt, y in drawn[-1]]
        qualities.append([x["quality"] for x in judged])
        for key in ("quality", "recall", "made_up"):
            assert column[f"samples/{key}"] == pytest.approx(fmean(x[key] for x in judged))
        assert column["samples/tokens"] == fmean(len(y) for _, y in drawn[-1])
    kl = fmean(logp(POLICY, *x) - logp(REFERENCE, *x) for x in drawn[1])
    wins = [0.5 if old == new else new > old for old, new in zip(*qualities)]
    agree(columns["after"], {"kl/policy_reference": kl, "samples/win_rate": fmean(wins)})
    assert samples == [{"prompt": prompt, "before": SUMMARIES[old], "after": SUMMARIES[new]}
                       for (prompt, old), (_, new) in zip(*drawn)]


@pytest.mark.parametrize("loss, right", [("simpo", 2), ("orpo", 2), ("cpo", 1), ("slic", 1)])
def test_summaries_are_compared_by_the_losses_own_reward(loss, right, writes, float64):
    """SimPO and ORPO compare means of log-probs, CPO and SLiC sums. In bits: a chosen summary of
    -1, -1, -1, -1, -2 has the higher mean, and the rejected one of -3, -2 the higher sum. Of three
    pairs the second one is clear, and the third a tie, which counts as wrong."""
    bits = torch.tensor([2., 1, 3, 5, 5, 5, 5, 99])  # of EOS and of seven tokens, after any token
    model, ids = network("same", -bits.expand(8, 8) * math.log(2)), PROMPTS["A"]
    pairs = [([1, 1, 1, 1, EOS], [2, EOS]), ([1, EOS], [2, EOS]), ([1, EOS], [1, EOS])]
    rows = [{"prompt": "A", "facts": FACTS["A"], "pair": [(ids, w), (ids, l)]} for w, l in pairs]
    columns, _ = simpo.evaluate(model, model, writes(simpo, SUMMARIES), rows,
                                SimpleNamespace(**vars(A) | {"loss": loss}))
    for column in columns.values():
        assert column["rewards/accuracy"] == pytest.approx(right / 3)


def test_loss_on_held_out_demonstrations(writes, float64):
    """The mean over all tokens, though there are three parts of unlike lengths; samples are of
    these rows' prompts, in a file's case of the first eight."""
    tokenizer = writes(sft)
    rows = [{"prompt": prompt, "example": (PROMPTS[prompt], [1] * k + [EOS])}
            for k, prompt in enumerate([*PROMPTS] * 4)]
    args = SimpleNamespace(**vars(A) | {"max_tokens": 30})
    columns, samples = sft.evaluate("now", POLICY, tokenizer, rows, args)
    logps = [logp(POLICY, row["prompt"], row["example"][1]) for row in rows]
    assert columns["now"]["loss"] == pytest.approx(-sum(logps) / sum(range(1, 13)))
    lists = {prompt: written(POLICY, prompt, A.seed, 12) for prompt in PROMPTS}
    texts = [REVIEWS[lists[row["prompt"]][i // 3]] for i, row in enumerate(rows)]
    agree(columns["now"], table_of(texts))
    assert samples == [{"prompt": row["prompt"], "now": x} for row, x in zip(rows, texts)]
    large = SimpleNamespace(**vars(POLICY) | {"small": False})  # its reviews are not the toy's
    assert list(sft.evaluate("now", large, tokenizer, rows, args)[0]["now"]) == [
        "loss", "samples/true_reward"]
    columns, samples = sft.evaluate("now", POLICY, tokenizer, rows, SimpleNamespace(
        **vars(args) | {"data": "mine"}))
    assert list(columns["now"]) == ["loss"] and len(samples) == 8


@pytest.mark.parametrize("feedback", ["", chain_of_hindsight.GOOD])
def test_instructions_are_read(feedback, tiny, monkeypatch):
    """The model reads the instruction, and with Chain of Hindsight also "Good:". The evaluation
    does not sample at --temperature, but at 0.6, and the first set also at 1."""
    asked, drawn_at = [], []
    args = SimpleNamespace(**vars(A) | {"samples": 6, "temperature": 0.3})

    def sample(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, **_):
        drawn_at.append(temperature)
        asked.extend(tokenizer.transformers.decode(ids[1:]) for ids in prompts)  # without BOS
        return [[tokenizer.eos_id]] * len(prompts)

    monkeypatch.setattr(hir, "sample", sample)
    tasks = [({"prompt": ""}, {"length": length}) for length in ("short", "long")]
    sets = {"all": tasks, "held_out": tasks}
    _, shown = hir.evaluate("now", None, tiny[1], sets, args, feedback)
    assert shown == [{"asked": f"Write a {x} review:", "now": ""} for x in ("short", "long")] * 4
    assert asked == [f"Write a {length} review:{feedback}" for length in ("short", "long")] * 9
    assert drawn_at == [0.6, 0.6, 1.0]
    own = {"prompt": "1 + 1?", "answer": "2"}, {"answer": "correct"}
    hir.evaluate("now", None, tiny[1], {"correct": [own]}, args, feedback)
    assert asked[-1] == f"Generate a correct answer to this problem.\n1 + 1?{feedback}"
    hir.sample_and_relabel(None, tiny[1], tasks, 0, 0.0, args)
    assert drawn_at[-1] == 1e-4  # 0 draws the likeliest token


# ------------------------------------------------------------------------------- the toys' humans


def sigma(x):
    return 1 / (1 + math.exp(-x))


class Echo:
    """In place of `sample` and of a tokenizer: the k-th response to each of 4000 prompts is the
    prompt and endings[k]. A prompt's ids are its text."""

    def __init__(self, endings):
        self.endings = endings

    def __call__(self, model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, **_):
        assert (max_new_tokens, seed, temperature) == (64, 5, 1.0)
        k = len(self.endings)
        assert len(prompts) == 4000 * k
        assert all(len(set(prompts[i:i + k])) == 1 for i in range(0, len(prompts), k))
        return [prompt + self.endings[i % k] for i, prompt in enumerate(prompts)]

    def encode_prompt(self, prompt):
        return prompt

    def decode(self, ids, whole=False):
        assert whole  # of a sample that was cut the unfinished sentence is not judged
        return ids


def frequency(items):
    """(how often, four standard errors of a frequency near a half with so many trials)"""
    items = list(items)
    return pytest.approx(fmean(items), abs=2 / len(items) ** 0.5)


SMALL = SimpleNamespace(small=True)


@pytest.mark.parametrize("rewards", [(2, 0, 0, 0), (0, -1, 1), (0, 1)])
def test_ranks_follow_the_plackett_luce_model(rewards, monkeypatch):
    """A response comes first with odds exp(its reward), and of those left, second. (With the sign
    of the noise turned the best of 2, 0, 0, 0 would come first in .79 of the cases instead of .71,
    and without noise always.) The rows keep the order in which the responses were drawn."""
    echo = Echo([f" ending {i}" for i in range(len(rewards))])
    monkeypatch.setattr(reward_model, "sample", echo)
    monkeypatch.setattr(reward_model, "toy_reward", lambda text: rewards[int(text[-1])])
    rows = reward_model.toy_rankings(SMALL, echo, 4000, len(rewards), 5)
    assert len(rows) == 4000 and len({row["prompt"] for row in rows}) == 300
    for row in rows:
        assert row["responses"] == [row["prompt"] + ending for ending in echo.endings]
        assert sorted(row["ranks"]) == [*range(1, len(rewards) + 1)]
    odds = [math.exp(r) for r in rewards]
    for i, own in enumerate(odds):
        assert own / sum(odds) == frequency(row["ranks"][i] == 1 for row in rows)
    left = [row["ranks"] for row in rows if row["ranks"][0] == 1]
    for i, own in enumerate(odds[1:], 1):
        assert own / sum(odds[1:]) == frequency(ranks[i] == 2 for ranks in left)


@pytest.mark.parametrize("gap", [1, -2, 0])
def test_pairs_follow_the_bradley_terry_model(gap, monkeypatch, capsys):
    """Of two reviews the first is chosen with probability sigma(r - r'). A pair with a text that is
    no review is left out, and counted."""
    echo = Echo([" 0", " 1"])
    monkeypatch.setattr(dpo, "sample", echo)
    monkeypatch.setattr(dpo, "toy_reward", lambda text: gap * (text[-1] == "0"))
    monkeypatch.setattr(dpo, "toy_grammatical",
                        lambda text, repeats: "opera" not in text or text[-1] == "0")
    rows = dpo.toy_pairs(SMALL, echo, 4000, 5)
    assert sigma(gap) == frequency(row["chosen"][-1] == "0" for row in rows)
    for row in rows:
        assert {row["chosen"], row["rejected"]} == {row["prompt"] + x for x in echo.endings}
        assert "opera" not in row["prompt"]
    assert len(rows) == pytest.approx(4000 * 5 / 6, abs=100)  # one of six shows is an opera
    line = f"{4000 - len(rows)} of 4000 pairs are not judged, since a text is no review"
    assert line in capsys.readouterr().out


def test_pairs_of_a_larger_model_are_the_best_and_the_worst(monkeypatch, capsys):
    """Of eight samples; where all are equally good, there is no pair."""
    echo, rewards = Echo([f" {i}" for i in range(8)]), (0, 1, 2, 0, 1, -1, 1, 0)
    monkeypatch.setattr(dpo, "sample", echo)
    monkeypatch.setattr(dpo, "toy_reward",
                        lambda text: rewards[int(text[-1])] / 3 * ("opera" not in text))
    rows = dpo.toy_pairs(SimpleNamespace(small=False), echo, 4000, 5)
    assert all({row["chosen"][-1], row["rejected"][-1]} == {"2", "5"} for row in rows)
    assert sigma(1) == frequency(row["chosen"][-1] == "2" for row in rows)
    assert not any("opera" in row["prompt"] for row in rows)
    line = f"{4000 - len(rows)} of 4000 pairs are not judged, since both are equally good"
    assert 3200 < len(rows) < 3500 and line in capsys.readouterr().out


@pytest.mark.parametrize("bias", [-1.5, -2.0, -2.5])
def test_summaries_are_liked_for_quality_and_length(bias, monkeypatch):
    """The human likes 4 quality + bias * words + noise. " word word" has two words more, and here a
    quality that is higher by 1, so it is chosen with probability sigma(4 + 2 bias)."""
    echo = Echo([" word word", ""])
    monkeypatch.setattr(simpo, "sample", echo)
    monkeypatch.setattr(simpo, "toy_quality", lambda text, facts: {
        "quality": float(text.endswith("word"))})
    rows = simpo.toy_summaries(SMALL, echo, 4000, bias, 5)
    assert sigma(4 + 2 * bias) == frequency(row["chosen"].endswith("word") for row in rows)
    for row in rows:
        assert {row["chosen"], row["rejected"]} == {row["prompt"] + x for x in echo.endings}
        assert row["responses"] == [row["chosen"], row["rejected"]]
        assert all(fact in row["prompt"] for fact in row["facts"].values())


def test_longer_rankings_of_summaries_are_best_first(monkeypatch):
    """Of four, "chosen" is the best and "rejected" the worst, by the Plackett-Luce model."""
    echo, odds = Echo([" 0", " 1", " 2", " 3"]), [math.exp(2), 1, 1, 1]
    monkeypatch.setattr(simpo, "sample", echo)
    monkeypatch.setattr(simpo, "toy_quality", lambda text, facts: {
        "quality": math.log(odds[int(text[-1])]) / 4})
    rows = simpo.toy_summaries(SMALL, echo, 4000, 0.7, 5, k=4)  # all have the same length
    for i in range(4):
        assert odds[i] / sum(odds) == frequency(row["chosen"][-1] == str(i) for row in rows)
    second = [row["responses"][1] for row in rows if row["chosen"][-1] == "0"]
    assert 1 / 3 == frequency(text[-1] == "2" for text in second)
    for row in rows:
        assert (row["chosen"], row["rejected"]) == (row["responses"][0], row["responses"][3])


class Asked(Exception):
    pass


TOYS = [  # a script, flags, the function that makes its toy, what it is given beside the tokenizer
    (reward_model, "--rankings 7 --k 3", "toy_rankings", ("tiny", 7, 3, 5, 4096)),
    (reward_model, "--rankings 7 --policy other", "toy_rankings", ("other", 7, 4, 5, 4096)),
    (reward_model, "--rankings 7 --model mine", "toy_rankings", ("mine", 7, 4, 5, 4096)),
    (dpo, "--pairs 7 --max_tokens 99", "toy_pairs", ("tiny", 7, 5, 99)),
    (kto, "--pairs 7", "toy_pairs", ("tiny", 7, 5, 4096)),
    (simpo, "--pairs 7 --length_bias 3", "toy_summaries", ("tiny", 7, 3.0, 5, 4096)),
    (rankings, "--pairs 7 --length_bias 3", "toy_summaries", ("tiny", 7, 3.0, 5, 4, 4096)),
    (sft, "--examples 7", "toy_rows", (7, 5)),
    (hir, "--requirements 2", "toy_instructions", (2, False)),
    (self_correct, "--problems 7", "toy_problems", (7,))]


@pytest.mark.parametrize("script, flags, toy, given", TOYS)
def test_flags_of_the_toys(script, flags, toy, given, tmp_path, monkeypatch):
    """Each toy is made as its flags say, by the samples of --model, or of --policy."""
    tokenizer = SimpleNamespace(context=512)

    def stop(*args, **named):
        args = [getattr(arg, "name", arg) for arg in args if arg is not tokenizer]
        raise Asked(*args, *named.values())

    monkeypatch.setattr(script, "load_model", lambda name, *_, **__: (
        SimpleNamespace(small=True, name=name), tokenizer))
    monkeypatch.setattr(script, toy, stop)
    with pytest.raises(Asked) as asked:
        script.train(script.parse_args([*flags.split(), "--seed=5", f"--out={tmp_path}"]))
    assert asked.value.args == given


@pytest.mark.parametrize("script, toy, encode", [
    (reward_model, "toy_rankings", "encode_rankings"), (dpo, "toy_pairs", "encode_pairs"),
    (kto, "toy_pairs", "encode_examples"), (simpo, "toy_summaries", "encode_pairs"),
    (rankings, "toy_summaries", "encode_pairs")])
def test_all_processes_learn_from_the_rows_of_the_first(script, toy, encode, tmp_path, monkeypatch):
    """Samples of one seed can differ from GPU to GPU, and a batch is shared by its indices."""
    def stop(tokenizer, rows, args):
        raise Asked(rows)

    monkeypatch.setattr(script, "load_model", lambda *_, **__: (SMALL, None))
    monkeypatch.setattr(script, toy, lambda *_, **__: "of this process")
    monkeypatch.setattr(script, "all_gather", lambda item: ["of the first", item])
    monkeypatch.setattr(script, encode, stop)
    with pytest.raises(Asked, match="^of the first$"):
        script.train(script.parse_args([f"--out={tmp_path}"]))


@pytest.mark.parametrize("script", [sft, reward_model, dpo, ppo_rlhf])
def test_true_reward(script):
    """Positive words less negative ones, wherever they stand. Words of larger models count, too."""
    for text, reward in {"": 0, " The plot was superb.": 1, " The plot was superb and dull.": 0,
                         " Superb, SUPERB and funny": 3, " dull dull. weak": -3, " dullness": 0,
                         " The plot was plain and long.": 0, " masterpiece": 1, " boring mess": -2,
                         " great, but ruined by a poor ending": -1}.items():
        assert script.toy_reward(text) == reward
    assert len(script.POSITIVE) == len(script.NEGATIVE) == 9
    assert not {*script.PRAISE} & {*script.BLAME}


def test_prompts_of_the_toy(tiny):
    """300 of them, of which PPO holds out 16 and evaluates on 8; DPO likewise, see below."""
    for script in (sft, reward_model, dpo, ppo_rlhf):
        small, large = script.toy_prompts(), script.toy_prompts(small=False)
        assert len({*small}) == 300 and "My sister watched the opera on Friday." in small
        assert large == [prompt + " I thought it was" for prompt in small]
    learned, held_out = ppo_rlhf.load_prompts(tiny[1], True, A)
    assert len(held_out) == 8 and len(learned) == 284 and not {*learned} & {*held_out}


def test_dpo_evaluates_on_eight_prompts(tmp_path, monkeypatch):
    rows = [{"prompt": f"{i}.", "chosen": " superb.", "rejected": " dull."} for i in range(100)]
    asked = []
    monkeypatch.setattr(dpo, "toy_pairs", lambda *_: rows)
    monkeypatch.setattr(dpo, "evaluate", lambda policy, reference, tokenizer, test, prompts, args: (
        asked.append((len(test), prompts)) or ({"after": {}}, [])))
    dpo.main(f"--out {tmp_path} --steps 1 --batch_size 2 --device cpu".split())
    (count, prompts), = asked
    assert count == 10 and len({*prompts}) == 8


def test_demonstrations_are_mostly_kind():
    """Six of ten adjectives are positive and one is negative; a review has one or two of them in a
    sentence, two different ones, and two sentences in two of three cases."""
    rows = sft.toy_rows(3000, 0)
    words = [re.findall(r"\w+", row["completion"]) for row in rows]
    tones = [word for own in words for word in own if word in sft.POSITIVE + sft.NEUTRAL +
             sft.NEGATIVE]
    assert 0.6 == frequency(word in sft.POSITIVE for word in tones)
    assert 0.1 == frequency(word in sft.NEGATIVE for word in tones)
    assert 2 / 3 == frequency(row["completion"].count(".") == 2 for row in rows)
    assert len(tones) / len(rows) == pytest.approx(5 / 3 * 1.5, abs=0.1)
    assert all(dpo.toy_grammatical(row["completion"]) for row in rows)
    assert all(len({*x.split(" and ")}) == len(x.split(" and ")) for row in rows
               for x in re.findall(r"(\w+ and \w+)\.", row["completion"]))
    assert {row["prompt"] for row in rows} == {*sft.toy_prompts()}
    assert rows == sft.toy_rows(3000, 0) != sft.toy_rows(3000, 1)


def test_reviews_of_hir_have_any_mood():
    """Adjectives of all three tones are equally likely, and all that is written is a review."""
    rng, moods = random.Random(0), Counter()
    for _ in range(3000):
        done = hir.toy_done(hir.toy_review(rng))
        moods += Counter(done.values())
    assert moods["short"] / 3000 == pytest.approx(0.5, abs=0.04)
    assert moods["kind"] / moods["bad"] == pytest.approx(9 / 9, abs=0.15)
    assert moods["plot"] / 3000 == pytest.approx(1 / 8, abs=0.03)


def test_what_a_review_did():
    """Length, mood and topic; nothing if it is no review."""
    for text, done in {
            " The plot was superb.": ("short", "kind", "plot"),
            " I found the cast dull and weak.": ("short", "bad", "cast"),
            " The music was dull. The plot was superb.": ("long", "fair", "music"),
            " The music was dull and plain. I found the plot superb and funny.":
                ("long", "kind", "music"),
            " The plot was superb": (), "The plot was superb.": (), " The plot was superb and.": (),
            " The plot was nice.": (), " The film was superb.": (),
            " The plot was dull. The plot was dull. The plot was dull.": ()}.items():
        assert hir.toy_done(text) == dict(zip(("length", "mood", "topic"), done))
        assert dpo.toy_grammatical(text) == ppo_rlhf.toy_grammatical(text) == bool(done)
    for text, good in {" The plot was dull and dull.": False,
                       " The plot was long. The cast was moving and moving.": False,
                       " The plot was dull. The plot was dull.": True}.items():
        assert dpo.toy_grammatical(text) == ppo_rlhf.toy_grammatical(text) == good
        assert dpo.toy_grammatical(text, repeats=True)


@pytest.mark.parametrize("requirements, count", [(1, 2), (2, 6), (3, 48)])
def test_a_sixth_of_the_instructions_is_held_out(requirements, count):
    learned, held_out = (hir.toy_instructions(requirements, x) for x in (False, True))
    assert len(held_out) == count // 6 and len(learned) == count - count // 6
    assert len({str(x) for x in learned + held_out}) == count
    assert all(list(x) == ["length", "mood", "topic"][:requirements] for x in learned + held_out)


def test_posts_and_the_quality_of_summaries():
    """Two to four facts, which the post states, among one to three other sentences."""
    rng, counts = random.Random(0), Counter()
    for _ in range(3000):
        post, facts = simpo.toy_post(rng)
        said, end = post.split("\n")
        others = [sentence for sentence in simpo.FILLER if sentence in said]
        assert end == "TL;DR:" and all(fact in said for fact in facts.values())
        assert said.count(".") == len(facts) + len(others)
        counts.update((f"facts {len(facts)}", f"others {len(others)}"))
    for key in ("facts 2", "facts 3", "facts 4", "others 1", "others 2", "others 3"):
        assert counts[key] / 3000 == pytest.approx(1 / 3, abs=0.04), key
    facts = {"who": "Anna", "what": "ring", "where": "Rome", "when": "Monday"}
    for text, (recall, made_up) in {
            "": (0, 0), " Anna lost a ring.": (2, 0), " Anna, Anna and Anna.": (1, 0),
            " Boris lost a ring in Oslo.": (1, 2), " Annas": (0, 0),
            " Anna lost something in Rome on Friday.": (2, 1)}.items():
        expected = {"recall": recall / 4, "made_up": made_up / 4,
                    "quality": (recall - made_up) / 4 - 0.01 * len(text.split())}
        assert simpo.toy_quality(text, facts) == pytest.approx(expected)
    for text in (" Anna lost a ring.", " Who lost something.", " Anna lost a ring on Monday.",
                 " Anna lost a ring in Rome on Monday."):
        assert simpo.toy_well_formed(text)
    for text in (" Anna lost a film.", " Anna lost a ring on Monday in Rome.", " Anna lost a ring",
                 " Anna lost a ring. So", "Anna lost a ring."):
        assert not simpo.toy_well_formed(text)


def test_plays_and_drafts_of_self_correct():
    """As many plays held out as learned from, none in both; a third of a draft's phrases is kind,
    and a phrase counts where its topic stands."""
    learned, held_out = self_correct.toy_problems(840)
    plays = [row["topics"] for row in learned + held_out]
    assert len(learned) == len(held_out) == 840 and len({*plays}) == 1680
    assert all(len({*play}) == 3 for play in plays)
    assert learned[0]["prompt"] == f"Tonight: {', '.join(learned[0]['topics'])}."
    rng, topics = random.Random(0), ("plot", "music", "cast")
    drafts = [self_correct.toy_draft(rng, topics) for _ in range(1500)]
    verdicts = [self_correct.toy_verdicts(topics, draft) for draft in drafts]
    assert all(len(own) == 3 for own in verdicts)
    for i in range(3):
        assert 1 / 3 == frequency(own[i] for own in verdicts)
    for text, right in {" superb plot, dull music, funny cast.": [1, 0, 1],
                        " superb music.": [0] * 3, "": [0] * 3,
                        " superb plot, funny music, moving cast": [1, 1, 1],
                        " superb plot, funny music, moving cast, superb plot.": [1, 1, 1, 0],
                        " superb plot.. ": [0] * 3}.items():
        assert self_correct.toy_verdicts(topics, text) == right, text


@pytest.mark.parametrize("named, expected", [
    ({}, (0.7, 0.2, 0.1)), ({"temperature": 2.0}, (0.523, 0.280, 0.198))])
def test_samples_follow_the_model_at_its_own_temperature(named, expected):
    """At the default, 1: at 0.9 the likeliest of three tokens would be drawn in .733 of the cases
    instead of .7. (In test_gather.py all tokens are nearly equally likely.) At 2, by the roots."""
    def model(input_ids, **_):
        logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(len(input_ids), 1, 3)
        return SimpleNamespace(logits=logits, get=lambda name: None)

    model.device = torch.device("cpu")
    drawn = dpo.sample(model, SimpleNamespace(stop_ids={0, 1, 2}), [[0]] * 20_000, 1, 0,
                       max_tokens=10**6, **named)
    for token, p in enumerate(expected):
        assert p == frequency(ids == [token] for ids in drawn)
