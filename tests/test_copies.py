"""Copies drift unless a test holds them: functions of one name are the same in all scripts."""

import ast
import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = "sft reward_model ppo_rlhf dpo simpo hir self_correct".split()
SCRIPTS = [path for name in NAMES if (path := ROOT / f"{name}.py").exists()]
OWN = re.compile(r"train|evaluate|parse_args|main|toy_\w+")


def differences(sources):
    """Unified diffs of functions and classes of one name that differ; sources: {file: text}."""
    first, diffs = {}, []
    for file, source in sources.items():
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or OWN.fullmatch(node.name):
                continue
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            text = lines[start:node.end_lineno]
            other, copy = first.setdefault(node.name, (file, text))
            diffs += ["".join(difflib.unified_diff(copy, text, other, file))] * (copy != text)
    return diffs


def foreign_imports(source):
    """Modules of this repository, other than model, that a source imports, wherever it does so."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"tests", "benchmarks"}
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module if not node.level else f".{node.module}"]
    return [n for n in names if n.startswith(".") or n.split(".")[0] in ours - {"model"}]


def test_functions_of_one_name_are_identical():
    """TRL's CPO was fixed and its ORPO copy was not: a copy that drifts shows here as a diff."""
    assert len(SCRIPTS) > 1
    diffs = differences({path.name: path.read_text(encoding="utf-8") for path in SCRIPTS})
    assert not diffs, "these copies differ:\n" + "\n".join(diffs)


def test_scripts_import_nothing_of_ours_but_model():
    """Each script is read, and copied, alone: it may lean on model.py and on no other script."""
    for path in SCRIPTS:
        assert foreign_imports(path.read_text(encoding="utf-8")) == [], path.name


def test_this_test_can_fail():
    """A drift in code, comment, decorator or class is a diff; toy and train may differ."""
    a = ("@no_grad\ndef f(x):\n    return x  # why\n\n\nclass C:\n    N = 1\n\n\n"
         "def toy_f():\n    pass\n")
    assert differences({"a.py": a, "b.py": "\n\n" + a}) == []
    for old, new in (("return x", "return -x"), ("# why", "# not"), ("@no_grad", "@grad"),
                     ("N = 1", "N = 2")):
        diff, = differences({"a.py": a, "b.py": a.replace(old, new)})
        assert "--- a.py" in diff and "+++ b.py" in diff and new in diff
    assert differences({"a.py": a, "b.py": a.replace("pass", "return 1")}) == []
    assert differences({"a.py": "def train():\n    pass\n", "b.py": "def train():\n    a\n"}) == []
    assert foreign_imports("import model, os\nfrom model import x\nimport torch") == []
    inside = "def f():\n    from dpo import g\n    import sft as s\n"
    assert foreign_imports(inside) == ["dpo", "sft"]


def test_the_real_scripts_would_be_caught():
    """One changed line in a copy of a real script gives exactly one diff, naming the function."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in SCRIPTS}
    changed = sources["dpo.py"].replace("index += range(b * T + len(prompt) - 1",
                                        "index += range(b * T + len(prompt)", 1)
    assert changed != sources["dpo.py"]
    diff = differences({"sft.py": sources["sft.py"], "dpo.py": changed})
    assert len(diff) == 1 and "+        index += range(b * T + len(prompt), b" in diff[0]
