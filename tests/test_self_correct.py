"""Self-correction: pair probabilities, pairs, similarity, the pool, the toy, the loss's optimum."""

import math
import random

import pytest
import torch

from self_correct import (add, appraise, find_pairs, pair_probabilities, prompt_of, similarity,
                          toy_draft, toy_rows, toy_verdicts, weigh)


def v(*values):
    return torch.tensor(values, dtype=torch.float64)


ONE = torch.tensor([0, 0])

# ------------------------------------------------------------------------------ Eqs. (3) and (4)


@pytest.mark.parametrize("alpha, beta, expected", [
    (1, 0, (0.622459, 0.377541)), (1, 1, (0.5, 0.5)), (0, 0, (0.5, 0.5)),
    (0, 2, (0.268941, 0.731059))])
def test_pair_probabilities(alpha, beta, expected):
    """Improvements (1, .5) and proximities (.5, 1) of two corrections of one answer."""
    p = pair_probabilities(v(1, 0.5), v(0.5, 1), ONE, alpha, beta)
    assert p.tolist() == pytest.approx(expected, abs=1e-6)


def test_each_hypothesis_sums_to_one():
    """Z(y) is a sum over the corrections of that y, wherever in the list they stand."""
    groups = torch.tensor([0, 3, 0, 1, 3, 3])  # 2 has no correction
    dv, s = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    p = pair_probabilities(dv, s, groups, 3.0, 2.0)
    assert p.dtype == torch.float64
    for group in (0, 1, 3):
        mine = groups == group
        assert torch.allclose(p[mine], (3 * dv + 2 * s)[mine].softmax(0))


def test_alpha_cancels_where_values_are_binary():
    """All improvements are 1: alpha changes nothing, beta does."""
    dv, s, groups = torch.ones(4), torch.rand(4), torch.tensor([0, 0, 1, 1])
    p = pair_probabilities(dv, s, groups, 1.0, 1.0)
    assert torch.allclose(p, pair_probabilities(dv, s, groups, 50.0, 1.0), atol=1e-6)
    assert not torch.allclose(p, pair_probabilities(dv, s, groups, 1.0, 5.0), atol=1e-2)


def test_large_weights_do_not_overflow():
    """alpha 1000: the better correction, with no infinity on the way."""
    p = pair_probabilities(torch.tensor([1.0, 0.5]), torch.zeros(2), ONE, 1000.0, 0.0)
    assert p.tolist() == [1.0, 0.0]


def test_pairs_are_strictly_better():
    """v = (0, 0, 1) has 2 pairs, v = (0, .5, 1) has 3; from the worse to the better, not back (a
    widely used lecture writes the example the other way round)."""
    assert find_pairs([0, 0, 1]) == [(0, 2), (1, 2)]
    assert find_pairs([0, 0.5, 1]) == [(0, 1), (0, 2), (1, 2)]
    assert find_pairs([1, 0]) == [(1, 0)]
    assert find_pairs([0.5, 0.5]) == find_pairs([1]) == find_pairs([]) == []


@pytest.mark.parametrize("a, b, expected", [
    ("a b c d", "a b c d", 1), ("a b c d", "a x c d", 3 / 4), ("a b c d", "b c d", 3 / 4),
    ("a b", "c d e f", 0), ("", "", 1), ("", "a", 0), ("kitten sitting", "sitting kitten", 0),
    ("a b c", "a b c d e f", 1 / 2), (" a  b\n", "a b", 1)])
def test_similarity_is_one_minus_the_edit_distance_in_words(a, b, expected):
    """Over the longer one's number of words; symmetric."""
    assert similarity(a, b) == similarity(b, a) == pytest.approx(expected)


def test_similarity_against_the_textbook_recursion():
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1,
                   distance(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(0)
    for _ in range(60):
        a, b = (rng.choices("xyz", k=rng.randrange(6)) for _ in range(2))
        expected = 1 - distance(a, b) / max(len(a), len(b), 1)
        assert similarity(" ".join(a), " ".join(b)) == pytest.approx(expected)


def test_the_loss_is_least_at_the_conditional_of_equation_4():
    """A tabular corrector p(y'|y), trained on pairs drawn by Eq. (4): Pr(y'|y) itself."""
    values, s = v(0, 0.5, 1, 0.5), torch.rand(4, 4, dtype=torch.float64)
    pairs = torch.tensor(find_pairs(values.tolist()))
    j, k = pairs.T
    p = pair_probabilities(values[k] - values[j], s[j, k], j, 2.0, 3.0)
    logits = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=1000, tolerance_grad=1e-13,
                                  tolerance_change=1e-18, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -(p * logits.log_softmax(1)[j, k]).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = logits.detach().softmax(1)
    assert torch.allclose(found[j, k], p, atol=1e-5)
    assert torch.allclose(found[2], v(0.25, 0.25, 0.25, 0.25))  # the best: never corrected


def test_weigh(tiny):
    """Pairs of a pool and their probabilities, by value and by similarity of the decoded texts."""
    tokenizer = tiny[1]
    texts = (" dull plot, weak cast.", " dull plot, superb cast.", " funny pace, superb cast.",
             " superb plot, superb cast.")
    answers = [(tokenizer.encode(text) + [tokenizer.eos_id], value, "")
               for text, value in zip(texts, (0.0, 0.5, 0.5, 1.0))]
    pairs, p = weigh(answers, tokenizer, 2.0, 3.0)
    assert pairs == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    score = v(2 * 0.5 + 3 * 0.75, 2 * 0.5 + 3 * 0.25, 2 * 1 + 3 * 0.5)
    assert p == pytest.approx([*score.softmax(0).tolist(), 1, 1], abs=1e-6)
    assert weigh(answers[1:3], tokenizer, 1.0, 1.0) == ([], [])


def test_add_keeps_each_answer_once():
    pool = [[([1], 0.0, "a")], []]
    add(pool, [(0,), (0, [1], 0.0, "a"), (1,), (1,)],
        [([1], 0.0, "a"), ([2], 1.0, "b"), ([1], 0.0, "c"), ([1], 0.0, "c")])
    assert pool == [[([1], 0.0, "a"), ([2], 1.0, "b")], [([1], 0.0, "c")]]


# ------------------------------------------------------------------------------ prompts and values


def test_what_the_corrector_reads():
    """x, then the draft verbatim, then the feedback; a chat's last message gets them."""
    row = {"prompt": "1 + 1?", "answer": "2"}
    assert prompt_of(row) == "1 + 1?"
    assert prompt_of(row, " 3", "Wrong.") == "1 + 1?\nDraft: 3\nWrong.\nBetter:"
    assert prompt_of(row, "") == "1 + 1?\nDraft:\n\nBetter:"
    chat = {"prompt": [{"role": "system", "content": "Hm"}, {"role": "user", "content": "1 + 1?"}]}
    assert prompt_of(chat) == chat["prompt"]
    told = prompt_of(chat, " 3", "Wrong.")
    assert told[0] == chat["prompt"][0]
    assert told[1] == {"role": "user", "content": "1 + 1?\nDraft: 3\nWrong.\nBetter:"}
    assert chat["prompt"][1]["content"] == "1 + 1?"


def test_the_toys_corrector_cannot_see_the_topics():
    """What the draft carries cannot be had otherwise: only the generator's prompt names them."""
    row = {"prompt": "", "topics": ["plot", "cast", "ring"]}
    assert prompt_of(row) == "Tonight: plot, cast, ring."
    seen = prompt_of(row, " dull plot, funny cast, weak ring.", appraise(row, "", True)[1])
    assert seen.startswith("Draft:") and "Tonight" not in seen
    assert not any(topic in appraise(row, text, True)[1] for topic in row["topics"]
                   for text in ("", " dull plot, funny cast, weak ring."))


def test_exact_match_of_finished_answers_only():
    row = {"prompt": "1 + 1?", "answer": "2"}
    assert appraise(row, " 2\n", True) == (1.0, "That is right.")
    assert appraise(row, " 2", False) == appraise(row, "22", True) == (0.0, "That is wrong.")


@pytest.mark.parametrize("text, expected", [
    (" superb plot, funny cast, moving ring.", (1, 1, 1)),
    (" superb ring, funny cast, moving plot.", (1, 1, 1)),  # in any order
    (" superb plot, dull cast, calm ring.", (1, 0, 0)),
    (" superb plot, superb plot, superb ring.", (1, 0, 1)),  # a topic counts once
    (" superb story, superb cast, superb ring.", (0, 1, 1)),
    (" superb plot, superb cast.", (0, 0, 0)), ("", (0, 0, 0)),
    (" superb plot, superb cast, superb ring, funny ring.", (0, 0, 0)),
    (" so superb plot, superb cast, superb ring.", (0, 1, 1))])
def test_toy_verdicts(text, expected):
    """A value of 1 takes a kind word about each topic, and no phrase more."""
    topics = ["plot", "cast", "ring"]
    assert tuple(map(int, toy_verdicts(topics, text))) == expected
    value, feedback = appraise({"topics": topics}, text, True)
    assert value == pytest.approx(sum(expected) / 3)
    assert feedback == "Spoken: " + ", ".join("well" if e else "not" for e in expected) + "."
    assert appraise({"topics": topics}, text, False)[0] == 0


def test_plays_are_held_out_and_drafts_are_about_them():
    """No play of the training part is held out; a third of a draft's words is kind by chance."""
    rows, held_out = toy_rows(512, False), toy_rows(512, True)
    plays = {tuple(row["topics"]) for row in rows}
    assert len(plays) == 512 and not plays & {tuple(row["topics"]) for row in held_out}
    rng = random.Random(0)
    values = [appraise(row, toy_draft(rng, row["topics"]), True)[0] for row in rows]
    assert sum(values) / 512 == pytest.approx(1 / 3, abs=0.05)
    assert math.isclose(sum(value == 1 for value in values) / 512, 1 / 27, abs_tol=0.03)
