"""The rules of the house: copies are identical, files keep their budget, commands parse."""

import ast
import difflib
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

from docs import measure

SCRIPTS = "sft reward_model ppo_rlhf dpo simpo hir self_correct".split()
VARIANTS = [f"variants.{path.stem}" for path in sorted(ROOT.glob("variants/[a-z]*.py"))]
LESSONS = [f"lessons.{path.stem}" for path in sorted(ROOT.glob("lessons/[a-z]*.py"))]
OTHERS = ["docs.measure", "tiny.make", *(f"benchmarks.{path.stem}"
                                         for path in sorted(ROOT.glob("benchmarks/*.py")))]
PAGES = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md"))]
# Functions of one name that do different things in different scripts.
OWN = {"train", "evaluate", "pair_loss", "parse_args", "make_parser", "toy_review", "toy_warm_up",
       "DEFAULTS"}
# Tokens of code that a file may have. More than planned: standard errors of J* (170 in dpo.py and
# in ppo_rlhf.py each); held-out loss, margin and accuracy of real data with standard errors, and
# what length alone would get (dpo 340, simpo 220, reward_model 140, model 80); what of a reply has
# to equal its answer, and runs that cannot learn (hir 130, self_correct 190, ppo_rlhf 90); an
# evaluation at one temperature whatever that of training is, and at 1 beside it (hir 40). model.py
# holds the flags that all scripts share (which took 150 from each of them), and the checks for
# users' own data and models: what a template, a tokenizer or a folder would otherwise do wrong in
# silence, what --resume compares, and that no run overwrites its own data. Flags with which nothing
# would be learned are refused (simpo, ppo_rlhf). sft.py tells grammatical samples (75), since the
# true reward of word salad can be as high as that of reviews.
BUDGET = {"sft": 3100, "reward_model": 3330, "dpo": 4670, "simpo": 4270, "ppo_rlhf": 5510,
          "hir": 4040, "self_correct": 4120, "model": 5800} | dict.fromkeys(VARIANTS, 1600)
# --match, so that verified rewards have the rule of hir.py, and flags that exclude each other
# (grpo); samples (grpo), or the reference (kto), scored in the parts of the first updates, which
# bf16 then rounds alike; --help that names the rows of --data.
BUDGET |= {"variants.grpo": 1690, "variants.kto": 1650}
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENDMARKER}


def source(module):
    return (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")


def docstring(module):
    return ast.get_docstring(ast.parse(source(module)))


def definitions(module):
    """{name: text} of functions and classes, decorators included, and constants of a module."""
    lines, found = source(module).splitlines(keepends=True), {}
    for node in ast.parse("".join(lines)).body:
        name = getattr(node, "name", "") or "".join(map(ast.unparse, getattr(node, "targets", [])))
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        if name.isidentifier():
            found[name] = "".join(lines[start:node.end_lineno])
    return found


def test_functions_of_one_name_are_identical():
    """A copy that drifts shows here as a diff: TRL's CPO was once fixed, and its ORPO copy not."""
    first, diffs = {}, []
    for script in SCRIPTS:
        for name, text in definitions(script).items():
            original, other = first.setdefault(name, (script, text))
            if text != other and name not in OWN:
                diffs += difflib.unified_diff(other.splitlines(), text.splitlines(), original,
                                              script, lineterm="")
    assert len(first) > 50 and not diffs, "these copies differ:\n" + "\n".join(diffs)
    for variant in VARIANTS:  # a variant imports what its parent has
        copies = [name for name, text in definitions(variant).items() if (text in map(
            lambda known: known[1], first.values())) and name != "main"]
        assert not copies, (variant, copies)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_nothing_of_ours_but_model(script):
    """Each script is read, and copied, alone: it may lean on model.py and on no other script."""
    ours = {"variants", "lessons", "tests", "benchmarks", "tiny", *SCRIPTS}
    for node in ast.walk(ast.parse(source(script))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        assert not ours & {name.split(".")[0] for name in names}, names


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the parts of f-strings are tokens there")
@pytest.mark.parametrize("module", BUDGET)
def test_budget(module):
    """Tokens of code, that is without comments, docstrings and line ends: few in all, and at most
    12.5 in a line, so that nothing is squeezed. No line has more than 100 columns."""
    tokens, before = [], None
    for token in tokenize.generate_tokens(io.StringIO(source(module)).readline):
        docstring = token.type == tokenize.STRING and (before is None or before in NOT_CODE)
        if token.type not in NOT_CODE and not docstring:
            tokens.append(token)
        if token.type != tokenize.COMMENT:
            before = token.type
    lines = {token.start[0] for token in tokens}
    assert len(tokens) <= BUDGET[module], f"{len(tokens)} tokens of code"
    assert len(tokens) / len(lines) <= 12.5, f"{len(tokens) / len(lines):.2f} tokens a line"
    assert [line for line in source(module).splitlines() if len(line) > 100] == []


def test_readme_is_short():
    """At most 250 lines. Lines of tests have at most 100 columns."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250
    for path in ROOT.glob("tests/*.py"):
        assert max(map(len, path.read_text().splitlines())) <= 100, path


def commands(text):
    """Each `python ...` command of a page or docstring, as a list of words without "python"."""
    text = text.replace("\\\n", " ").replace("$((i+1))", "1").replace("$i", "0")
    lines = re.findall(r"(?:^ *|`|&& |; |do )(python [^`\n;]*)", text, re.M)
    return [shlex.split(part, comments=True)[1:] for line in lines for part in line.split("&&")]


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS, *VARIANTS, *LESSONS, *OTHERS],
                         ids=lambda page: getattr(page, "name", page))
def test_commands_parse(page):
    """The flags of every command exist, and so do all files that are named."""
    text = docstring(page) if isinstance(page, str) else page.read_text(encoding="utf-8")
    found = commands(text)
    assert found or page not in SCRIPTS
    for words in found:
        module, *flags = words[words[0] == "-m":]
        module = module.removesuffix(".py")
        if module in (*SCRIPTS, *VARIANTS, *LESSONS):
            importlib.import_module(module).parse_args([f for f in flags if f != "--help"])
        elif module == "pytest":
            assert all((ROOT / flag).exists() for flag in flags if "/" in flag), words
        else:
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), words


@pytest.mark.slow
def test_commands_run(tmp_path):
    """All commands of README and docs in their order, from a fresh clone. The other models that
    they name are copies of tiny, the files small. Left out: lessons, which take hours, benchmarks,
    docs/measure.py, tiny.make, pytest."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    for name in ("gpt2", "Qwen/Qwen2.5-0.5B", "HuggingFaceTB/SmolLM2-135M-Instruct", "M"):
        shutil.copytree(ROOT / "tiny", clone / name)
    good, bad = " The plot was superb.", " The plot was dull."
    rows = [{"prompt": f"I saw film {i}.", "completion": good, "chosen": good, "rejected": bad,
             "answer": good, "response": good, "text": good} for i in range(64)]
    for name in "mine instructions rankings pairs texts A B".split():
        (clone / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [tuple(line) for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]
    failed = []
    for line in dict.fromkeys(lines):
        if not re.match("benchmarks|docs|-m (lessons|pytest|tiny)", " ".join(line)):
            run = subprocess.run([sys.executable, *line], cwd=clone, capture_output=True, text=True)
            failed += [(line, run.stderr[-300:])] * (run.returncode != 0)
    assert [line for line in failed if "no answer is better" not in line[1]] == []  # tiny has none


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To files and headings that exist; errata.md names each function of test_errata.py."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists() and (not anchor or anchor in anchors(path)), target
    if page.name == "errata.md":
        found = {*re.findall(r"`(test_\w+)`", text), "CERTAIN"}
        assert found == {*definitions("tests.test_errata")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_on_pages_is_that_of_the_source(page):
    """In at most 15 lines, for a slide. `python docs/measure.py --pages` writes it anew, with the
    seconds of commands and the index of lessons."""
    text = page.read_text(encoding="utf-8")
    assert measure.write_sources(text) == text
    for code in re.findall(r"<!-- code: [^\n]*\n```python\n(.*?)\n```", text, re.S):
        assert len(code.splitlines()) <= 15, code
    if "<!-- results: lessons -->" in text:
        assert f"<!-- results: lessons -->\n{measure.block_lessons()}\n<!-- end -->" in text


def test_lectures_take_90_minutes():
    """Each of the four, row after row. All rows have seven cells, and all times are known."""
    text = (ROOT / "docs" / "lectures.md").read_text(encoding="utf-8")
    for lecture in re.split(r"^## Lecture ", text, flags=re.M)[1:]:
        rows = re.findall(r"^\| (\d+)–(\d+) (\|.*)", lecture.partition("\n### ")[0], re.M)
        assert [int(end) for _, end, _ in rows] == [*(int(start) for start, _, _ in rows[1:]), 90]
        assert rows[0][0] == "0" and all(row.count("|") == 7 for _, _, row in rows)
    assert text.count("\n## Lecture ") == 4 and "(? s)" not in text


def test_lessons_begin_with_their_question():
    """Then comes the command that answers it, and what to see. A page of docs shows each lesson."""
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for lesson in LESSONS:
        question, _, command, *rest = docstring(lesson).splitlines()
        assert question.endswith("?") and f"python -m {lesson}" in command, lesson
        assert "What to see in the" in "".join(rest) and f"python -m {lesson}" in pages, lesson
