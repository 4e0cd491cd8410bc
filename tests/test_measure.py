"""docs/measure.py: what it leaves as it is, what it replaces, what it copies from the source."""

import json

import pytest
from conftest import ROOT

from docs import measure

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results."""
    monkeypatch.setattr(measure, "OUT", tmp_path / "results", raising=False)
    monkeypatch.setattr(measure, "MISSING", set())
    measure.fingerprint.cache_clear()
    return tmp_path / "results"


def write(page, folder):
    """The text of a copy of a page after measure.py has written it."""
    copy = folder / page.name
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    measure.write_page(copy)
    return copy.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_stay_as_they_are_without_runs(page, results, tmp_path):
    assert write(page, tmp_path) == page.read_text(encoding="utf-8")


def test_one_run_replaces_its_own_row(results, tmp_path):
    """`--only kto` in a new folder: all other rows of the summary stay, in their order."""
    for seed in measure.RUNS["kto"][1]:
        folder = results / "kto" / str(seed)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(
            {"before": {"samples/true_reward": -1.0}, "after": {"samples/true_reward": 7.0}}))
        (folder / "done.json").write_text(json.dumps(
            {"code": measure.fingerprint(measure.RUNS["kto"][0]), "cpu": 12.0, "mib": 34.0}))
    old, new = ((ROOT / "README.md").read_text(encoding="utf-8").splitlines(),
                write(ROOT / "README.md", tmp_path).splitlines())
    changed = [pair for pair in zip(old, new) if pair[0] != pair[1]]
    assert len(old) == len(new)
    assert [row for _, row in changed] == ["| `python -m variants.kto` | `samples/true_reward` "
                                           "| -1.00 → 7.00 ± 0.00 | 12 s | 34 MiB |"]
    assert changed[0][0].startswith("| `python -m variants.kto` |")
    assert "kto" not in measure.MISSING and "dpo" in measure.MISSING


def test_keep_rows():
    """A row of one cell stands for a run that is missing. The order is that of the new table.

    Rows with an empty first cell go with the row above. c has no old row, gone no new one.
    """
    head = "| command | number |\n| --- | --- |\n"
    old = head + "| gone | 1 |\n| b | 2 |\n|  | 3 |\n| a | 4 |\n"
    new = head + "| a | 5 |\n|  | 6 |\n| b |\n| b |\n| c |"
    assert measure.keep_rows(new, old) == head + "| a | 5 |\n|  | 6 |\n| b | 2 |\n|  | 3 |"
    other = "| command | other |\n| --- | --- |\n| b | 2 |\n"
    assert measure.keep_rows(new, other) == head + "| a | 5 |\n|  | 6 |"
    assert measure.keep_rows(new, "") == head + "| a | 5 |\n|  | 6 |"


def test_code_of():
    """Without docstring or indentation: a function, a method, a step, a span of lines."""
    assert measure.code_of("hir.py", "relabel") == (
        "def relabel(wanted, done):\n    return {key: done[key] for key in wanted} if done else {}")
    method = measure.code_of("dpo.py", "GatherLogps.forward").splitlines()
    assert method[0] == "@staticmethod" and method[1].startswith("def forward(ctx, hidden")
    step = measure.code_of("dpo.py", "train", "5").splitlines()
    assert step[0].startswith("# 5. ") and step[-1].startswith("    seen.append(")
    span = measure.code_of("dpo.py", "dpo_loss", "", "right =", "wrong =").splitlines()
    assert span == ["right = -F.logsigmoid(beta * h)", "wrong = -F.logsigmoid(-beta * h)"]
    text = "<!-- code: hir.py relabel -->\nold\n<!-- end -->\nbetween\n<!-- end -->\n"
    assert measure.write_sources(text) == text.replace(
        "old", f"```python\n{measure.code_of('hir.py', 'relabel')}\n```")
    with pytest.raises(SystemExit, match="no such code"):
        measure.write_sources("<!-- code: hir.py relabel step 9 -->\n<!-- end -->")


def test_seconds_of():
    """As measured in the README, or else as planned; a command that is in neither keeps its own."""
    planned = dict((command, seconds) for command, _, seconds in measure.RUNS.values())
    text = "`python dpo.py` (? s), `python -m lessons.divisors` (7 s), `python -m pytest` (3 s)"
    measured = measure.seconds_of("dpo.py")
    row = next(line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
               if line.startswith("| `python dpo.py` | `"))
    assert row.split(" | ")[3] == f"{measured} s"
    assert measure.write_sources(text) == (
        f"`python dpo.py` ({measured} s), `python -m lessons.divisors` "
        f"({planned['-m lessons.divisors']} s), `python -m pytest` (3 s)")
