"""Bad input: one line that names file, line and remedy; exit code 2; nothing in --out is lost."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dpo  # noqa: E402
import model  # noqa: E402
import sft  # noqa: E402

SCRIPTS = {"dpo": dpo, "sft": sft}
QUICK = ["--batch_size", "2", "--max_new_tokens", "4", "--held_out", "1", "--device", "cpu"]
PAIR = {"prompt": "I saw the film.", "chosen": " The cast was superb.", "rejected": " It was dull."}
DEMO = {"prompt": "I saw the film.", "completion": " The cast was superb."}
KTO = {"prompt": "I saw the film.", "completion": " The cast was superb.", "label": True}
RANKED = {"prompt": "I saw the film.", "responses": [" Good.", " Bad."], "ranks": [1, 2]}
SHAPE = {"dpo": ('"chosen": "..."',), "sft": ('"completion": "..."',)}
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def good(script, count=4):
    """Rows with different prompts that the script learns from without complaint."""
    row = PAIR if script == "dpo" else DEMO
    return [row | {"prompt": f"I saw film number {i}."} for i in range(count)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def out(tmp_path):
    """The folder of an earlier run, which no failing command may touch."""
    folder = tmp_path / "earlier"
    shutil.copytree(model.TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (folder / "args.json").write_text("{}\n")
    (folder / "notes.txt").write_text("mine\n")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in Path(folder).rglob("*")}


def fails(script, argv, capsys, fragments, out):
    """Run a script's main: exit 2, one error line with these fragments, --out byte-identical."""
    before = contents(out)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main([*argv, "--out", str(out)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    lines = [line for line in lines if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for fragment in fragments:
        assert fragment in lines[0]
    assert contents(out) == before
    return lines[0]


# What each script must say of a file: by name, its content (text or a list of rows) and fragments
# beside the file's own name. {good} stands for the rows of the script itself.
FILES_OF_BOTH = {
    "not UTF-8": (b'{"prompt": "caf\xe9"}\n', ("utf-8", "UTF-8 file of JSON lines")),
    "empty": ("", ("no rows",)),
    "blank lines only": ("\n  \n", ("no rows",)),
    "malformed JSON on line 2": ('{good}\n{"prompt": "I saw\n{good}',
                                 (":2:", "not a JSON object", "one object on each line")),
    "array": ("{good}\n[1, 2]", (":2:", "not a JSON object", "one object on each line")),
    "number": ("{good}\n\n3", (":3:", "not a JSON object")),
    "nested too deeply": ('{"prompt": ' + "[" * 100_000, (":1:", "not a JSON object")),
    "half a character": ('{good}\n{"prompt": "\\ud83d", "chosen": "a", "rejected": "b", '
                         '"completion": "c"}\n{good}', (":2:", "surrogates")),
    "missing prompt": ('{good}\n{"chosen": "a", "rejected": "b", "completion": "c"}',
                       (":2:", '"prompt" is missing', "a row looks like")),
    "empty prompt": ('{"prompt": "", "chosen": "a", "rejected": "b", "completion": "c"}',
                     (":1:", '"prompt" is missing, empty')),
    "prompt of no messages": ('{"prompt": [], "chosen": "a", "rejected": "b", "completion": "c"}',
                              (":1:", '"prompt" is missing, empty or not a text')),
    "only one prompt": ("{good0}\n{good0}\n{good0}", ("two different prompts", "held out")),
    "chat without a template": ('{"prompt": [{"role": "user", "content": "Hi"}], "chosen": "a", '
                                '"rejected": "b", "completion": "c"}\n{good}',
                                ("no chat template", "give prompts as strings")),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", FILES_OF_BOTH)
def test_bad_file(name, script, tmp_path, capsys, out):
    """A broken data file is told by file, line and remedy, before anything in --out changes."""
    content, fragments = FILES_OF_BOTH[name]
    path = tmp_path / "data.jsonl"
    if isinstance(content, str):
        rows = [json.dumps(row) for row in good(script)]
        content = content.replace("{good0}", rows[0]).replace("{good}", rows[1]).encode()
    path.write_bytes(content)
    line = fails(script, ["--data", str(path), *QUICK], capsys, fragments, out)
    assert "data.jsonl" in line or "prompts" in line


RESPONSES = {"missing": None, "empty": "", "whitespace": " \n\t", "a number": 3, "null": [None],
             "a list": ["a"], "two messages": CHAT, "a message without content": [{"role": "user"}]}


@pytest.mark.parametrize("key", ["chosen", "rejected", "completion"])
@pytest.mark.parametrize("name", RESPONSES)
def test_bad_response(name, key, tmp_path, capsys, out):
    """A response that is missing, empty or no text is named with its key, file and line."""
    script = "sft" if key == "completion" else "dpo"
    rows, value = good(script), RESPONSES[name]
    rows[1] = {k: v for k, v in rows[1].items() if k != key}
    if value is not None:
        rows[1][key] = None if value == [None] else value
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    fails(script, ["--data", str(path), *QUICK], capsys,
          ("data.jsonl:2:", f'"{key}" is missing, empty or not a text', *SHAPE[script]), out)


RANKS = ("data.jsonl:2:", "whole numbers from 1")
DPO_ROWS = {
    "ranks too short": ([RANKED, RANKED | {"ranks": [1]}], [], RANKS),
    "ranks missing": ([RANKED, {"prompt": "a", "responses": ["x", "y"]}], [], RANKS),
    "ranks of text": ([RANKED, RANKED | {"ranks": ["1", "2"]}], [], RANKS),
    "ranks of bools": ([RANKED, RANKED | {"ranks": [True, 2]}], [], RANKS),
    "ranks of floats": ([RANKED, RANKED | {"ranks": [1.0, 2.5]}], [], RANKS),
    "rank zero": ([RANKED, RANKED | {"ranks": [0, 1]}], [], RANKS),
    "responses a text": ([RANKED, RANKED | {"responses": "ab"}], [], RANKS),
    "a response empty": ([RANKED, RANKED | {"responses": [" Good.", " "]}], [],
                         ("data.jsonl:2:", '"responses" is missing, empty or not a text')),
    "all ranks tied": ([RANKED | {"ranks": [1, 1]}, RANKED | {"ranks": [2, 2]}], [],
                       ("data.jsonl", "no row prefers one response")),
    "label without kto": ([PAIR, KTO], [], ("data.jsonl:2:", '"label"', "--loss kto")),
    "label not a bool": ([KTO, KTO | {"label": 1}], ["--loss", "kto"],
                         ("data.jsonl:2:", '"label" must be true or false')),
    "kto, one prompt to learn from": (
        [KTO, KTO | {"label": False}, KTO | {"prompt": "We saw the play."}],
        ["--loss", "kto", "--seed", "KTO"], ("--loss kto", "two different prompts")),
}


@pytest.mark.parametrize("name", DPO_ROWS)
def test_bad_row_for_dpo(name, tmp_path, capsys, out):
    """Rankings and labels that say nothing, or not what was meant, are refused by file and line."""
    rows, flags, fragments = DPO_ROWS[name]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    if "KTO" in flags:  # a seed that keeps the first prompt to learn from
        kept = lambda seed: model.split_by_prompt(rows, 1, seed)[0][0] is rows[0]
        flags = flags[:-1] + [str(next(filter(kept, range(99))))]
    fails("dpo", ["--data", str(path), *QUICK, *flags], capsys, fragments, out)


MESSAGES = {"no reply": CHAT[:1], "reply first": CHAT[::-1], "only a reply": CHAT[1:],
            "a text": "Hi", "texts": ["Hello", "Hi"], "empty": []}


@pytest.mark.parametrize("name", MESSAGES)
def test_bad_messages_for_sft(name, tmp_path, capsys, out):
    """A chat must end with a reply of the assistant: there is nothing else to learn from."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(DEMO) + "\n" + json.dumps({"messages": MESSAGES[name]}))
    fails("sft", ["--data", str(path), *QUICK], capsys,
          ("data.jsonl:2:", "ends with a reply of the assistant"), out)


def test_empty_reply_for_sft(tmp_path, capsys, out):
    """The last message of a chat is the response, and must not be empty either."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}))
    fails("sft", ["--data", str(path), *QUICK], capsys, ("data.jsonl:1:", '"completion"'), out)


# (scripts, flags, fragments): flags that cannot be meant.
BOTH = ("dpo", "sft")
FLAGS = {
    "missing file": (BOTH, "--data nowhere.jsonl", ("--data nowhere.jsonl", "No such file")),
    "folder as file": (BOTH, "--data {empty}", ("empty: cannot be read", "give a UTF-8 file")),
    "no row fits": (BOTH, "--data {good} --max_length 2",
                    ("--max_length 2", "data.jsonl", "give a larger one")),
    "above the context": (BOTH, "--data {good} --max_length 513",
                          ("--max_length 513", "512 positions")),
    "unknown loss": (("dpo",), "--loss simpo", ("--loss", "'simpo'", "'ipo'", "--help")),
    "unknown task": (("sft",), "--task poetry", ("--task", "'poetry'", "'sentiment'", "--help")),
    "unknown flag": (BOTH, "--betta 0.1", ("--betta", "--help")),
    "flag of the other": (("sft",), "--beta 0.1", ("--beta", "--help")),
    "no value": (BOTH, "--steps", ("--steps", "--help")),
    "half a step": (BOTH, "--steps 1.5", ("--steps", "'1.5'", "--help")),
    "unknown dtype": (BOTH, "--dtype float16", ("--dtype", "'float16'", "'bfloat16'")),
    "unknown device": (BOTH, "--data {good} --device abacus", ("--device abacus",)),
    "unknown model": (BOTH, "--data {good} --model no-such-model",
                      ("--model no-such-model", "check the spelling", "online once")),
    "folder without a model": (BOTH, "--data {good} --model {empty}", ("empty", "no config.json")),
    "no steps": (BOTH, "--steps 0", ("--steps 0", "above 0")),
    "negative steps": (BOTH, "--steps -3", ("--steps -3", "above 0")),
    "no epochs": (BOTH, "--epochs 0", ("--epochs 0", "above 0")),
    "negative batch": (BOTH, "--batch_size -1", ("--batch_size -1", "above 0")),
    "no parts": (BOTH, "--accumulate 0", ("--accumulate 0", "above 0")),
    "no saving": (BOTH, "--save_every 0", ("--save_every 0", "above 0")),
    "lr nan": (BOTH, "--lr nan", ("--lr nan", "above 0")),
    "lr inf": (BOTH, "--lr inf", ("--lr inf", "must be a number")),
    "lr 0": (BOTH, "--lr 0", ("--lr 0", "above 0")),
    "lr beyond float32": (BOTH, "--data {good} --steps 2 --lr 1e39", ("--lr 1e+39", "too large")),
    "grad norm 0": (BOTH, "--max_grad_norm 0", ("--max_grad_norm 0", "above 0")),
    "negative rank": (BOTH, "--lora_rank -2", ("--lora_rank -2", "not below 0")),
    "seed beyond 64 bits": (BOTH, f"--data {{good}} --seed {10**20}", (f"--seed {10**20}",)),
    "beta 0": (("dpo",), "--beta 0", ("--beta 0", "above 0")),
    "beta nan": (("dpo",), "--beta nan", ("--beta nan", "above 0")),
    "tau 0": (("dpo",), "--loss ipo --tau 0", ("--tau 0", "above 0")),
    "negative alpha": (("dpo",), "--alpha -1", ("--alpha -1", "not below 0")),
    "smoothing of more than half": (("dpo",), "--label_smoothing 0.6",
                                    ("--label_smoothing 0.6", "half")),
    "no samples": (("dpo",), "--samples 0", ("--samples 0", "above 0")),
    "pretrain with data": (("sft",), "--task pretrain --data {good}",
                           ("--task pretrain", "leave out --data")),
    "resume nothing": (BOTH, "--data {good} --resume", ("--resume", "no interrupted run in",
                                                        "start one without --resume")),
}


@pytest.mark.parametrize("script, name", [(s, n) for n, case in FLAGS.items() for s in case[0]])
def test_bad_flag(name, script, tmp_path, capsys, out):
    """A flag that cannot be meant ends with its name, its value and what would be right."""
    _, flags, fragments = FLAGS[name]
    (tmp_path / "empty").mkdir()
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good(script))))
    names = {"good": path, "empty": tmp_path / "empty"}
    argv = [word.format(**names) for word in flags.split()]
    fails(script, [*QUICK, *argv], capsys, fragments, out)


@pytest.mark.parametrize("where", ["taken", "taken/below"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_out_is_a_file(script, where, tmp_path, capsys):
    """--out that is a file, or lies below one, is told so and the file stays."""
    (tmp_path / "taken").write_text("mine")
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good(script))))
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(["--data", str(path), *QUICK, "--out", str(tmp_path / where)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "error: --out" in lines[0]
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(tmp_path, capsys, out):
    """--device cuda without CUDA names the flag, and trains nothing on the CPU instead."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good("dpo"))))
    fails("dpo", ["--data", str(path), "--device", "cuda"], capsys, ("--device cuda", "CUDA"), out)


# ---------------------------------------------------------------------------------- --resume


def interrupted(script, folder, flags):
    """Leave in the folder the state.pt of a run with these flags that was stopped at step 1."""
    args = SCRIPTS[script].parse_args([*flags, "--out", str(folder)])
    policy, _ = model.load_model(args.model)
    model.settle(args, policy, lr_small=1e-3, lr=1e-3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr)
    folder.mkdir(exist_ok=True)
    model.save_state(folder, args, policy, optimizer, step=1, reference={})
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')


class Bomb:
    """Unpickling this writes a file: what a pickle from elsewhere could do."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("script, other, fragments", [
    ("dpo", ["--beta", "0.3"], ("--beta 0.1, not 0.3", "give the same flags, or another --out")),
    ("dpo", ["--loss", "ipo"], ("--loss dpo, not ipo",)),
    ("sft", ["--seed", "7"], ("--seed 0, not 7", "give the same flags, or another --out")),
    ("sft", ["--lora_rank", "2"], ("--lora_rank 0, not 2",))])
def test_resume_with_other_flags(script, other, fragments, tmp_path, capsys):
    """Going on with other flags would be another run: the flag and both values are told."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good(script))))
    flags = ["--data", str(path), *QUICK]
    interrupted(script, tmp_path / "run", flags)
    fails(script, [*flags, "--resume", *other], capsys, fragments, tmp_path / "run")


@pytest.mark.parametrize("script, first", [("dpo", "sft"), ("sft", "dpo")])
def test_resume_the_other_script(script, first, tmp_path, capsys):
    """A state of another script is not taken for one's own, whichever flags both have."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good(script))))
    interrupted(first, tmp_path / "run", ["--data", str(path), *QUICK])
    fails(script, ["--data", str(path), *QUICK, "--resume"], capsys,
          ("--resume", "was started with"), tmp_path / "run")


@pytest.mark.parametrize("kind", ["noise", "empty", "truncated", "no state", "a list", "code"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_a_corrupt_state(script, kind, tmp_path, capsys):
    """A state.pt that is none ends with one line, and code pickled into it is never run."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good(script))))
    flags = ["--data", str(path), *QUICK]
    interrupted(script, tmp_path / "run", flags)
    state = tmp_path / "run" / "state.pt"
    whole = state.read_bytes()
    if kind in ("noise", "empty", "truncated"):
        state.write_bytes({"noise": b"noise" * 9, "empty": b""}.get(kind, whole[:len(whole) // 2]))
    else:
        torch.save({"no state": {}, "a list": [1], "code": Bomb(tmp_path / "hit")}[kind], state)
    fails(script, [*flags, "--resume"], capsys,
          ("--resume", "state.pt", "cannot be read", "start without --resume"), tmp_path / "run")
    assert not (tmp_path / "hit").exists()


# ------------------------------------------------------------------------------- a loss of NaN


@pytest.mark.parametrize("script", SCRIPTS)
def test_nan_leaves_a_good_state(script, tmp_path, capsys, monkeypatch):
    """A loss of NaN stops with the step and --lr; the last state is finite and can be resumed."""
    path, run = tmp_path / "data.jsonl", tmp_path / "run"
    path.write_text("\n".join(map(json.dumps, good(script, 8))))
    flags = ["--data", str(path), *QUICK, "--steps", "5", "--save_every", "1", "--out", str(run)]
    with monkeypatch.context() as patch:  # the third update, and only that one, is ruinous
        patch.setattr(SCRIPTS[script], "schedule", lambda step, steps: float(step == 2))
        with pytest.raises(SystemExit) as stop:
            SCRIPTS[script].main([*flags, "--lr", "1e30"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: step 4:")
    assert "nan" in lines[0] and "--lr 1e+30 is too high" in lines[0]
    assert "--resume --lr 1e+29" in lines[0] and str(run) in lines[0]

    state = torch.load(run / "state.pt", weights_only=True)
    start, _ = model.load_model("tiny")
    assert state["step"] == 2 and state["model"].keys() == dict(start.named_parameters()).keys()
    for name, weight in start.named_parameters():  # the first two updates had a rate of 0
        assert torch.equal(state["model"][name], weight)
    moments = [m for s in state["optimizer"]["state"].values() for m in s.values()]
    assert moments and all(torch.isfinite(m).all() for m in moments)

    SCRIPTS[script].main([*flags, "--lr", "1e-4", "--resume"])
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in log)


@pytest.mark.parametrize("script", SCRIPTS)
def test_nan_without_a_state_promises_none(script, tmp_path, capsys):
    """Where no state was saved yet, the error must not send its reader to --resume."""
    path, run = tmp_path / "data.jsonl", tmp_path / "run"
    path.write_text("\n".join(map(json.dumps, good(script, 8))))
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(["--data", str(path), *QUICK, "--steps", "5", "--save_every", "1",
                              "--lr", "1e30", "--out", str(run)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: step 2:")
    assert "--lr 1e+30 is too high" in lines[0] and "--lr 1e+29" in lines[0]
    assert not (run / "state.pt").exists() and "--resume" not in lines[0]
