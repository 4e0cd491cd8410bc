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
import hir  # noqa: E402
import model  # noqa: E402
import ppo_rlhf  # noqa: E402
import reward_model  # noqa: E402
import self_correct  # noqa: E402
import sft  # noqa: E402
import simpo  # noqa: E402

SCRIPTS = {"dpo": dpo, "sft": sft, "reward_model": reward_model, "ppo_rlhf": ppo_rlhf,
           "simpo": simpo, "hir": hir, "self_correct": self_correct}
QUICK = ["--batch_size", "2", "--max_new_tokens", "4", "--held_out", "1", "--device", "cpu"]
PAIR = {"prompt": "I saw the film.", "chosen": " The cast was superb.", "rejected": " It was dull."}
DEMO = {"prompt": "I saw the film.", "completion": " The cast was superb."}
PROBLEM = {"prompt": "I saw the film.", "answer": "42"}
KTO = {"prompt": "I saw the film.", "completion": " The cast was superb.", "label": True}
RANKED = {"prompt": "I saw the film.", "responses": [" Good.", " Bad."], "ranks": [1, 2]}
SHAPE = {"dpo": ('"chosen": "..."',), "sft": ('"completion": "..."',),
         "reward_model": ('"chosen": "..."', '"rejected": "..."'),
         "simpo": ('"chosen": "..."', '"rejected": "..."'), "hir": ('"answer": "..."',),
         "self_correct": ('"answer": "..."',)}
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def good(script, count=4):
    """Rows with different prompts that the script learns from without complaint."""
    row = {"hir": PROBLEM, "self_correct": PROBLEM, "sft": DEMO, "ppo_rlhf": DEMO}.get(script, PAIR)
    return [row | {"prompt": f"I saw film number {i}."} for i in range(count)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Of tiny: a reward model; and both kinds with another tokenizer, which knows fewer merges."""
    root = tmp_path_factory.mktemp("models")
    names = {"reward": root / "reward", "other": root / "other", "other_reward": root / "other_rm"}
    model.save_model(*model.load_model("tiny", head="reward"), names["reward"])
    for name, source in (("other", model.TINY), ("other_reward", names["reward"])):
        shutil.copytree(source, names[name])
        merges = (source / "merges.txt").read_text().splitlines(keepends=True)
        (names[name] / "merges.txt").write_text("".join(merges[:40]))
    return names


@pytest.fixture
def quick(folders):
    """Flags that make each script's run a quick one; to these any --data can be added."""
    flags = dict.fromkeys(SCRIPTS, QUICK)
    flags["reward_model"] = [*QUICK, "--samples", "2"]
    flags["ppo_rlhf"] = [*QUICK, "--n", "2", "--samples", "2",
                         "--reward_model", str(folders["reward"])]
    flags["hir"] = [*QUICK, "--rounds", "1"]
    flags["self_correct"] = [*QUICK, "--pool", "2", "--rounds", "1", "--corrections", "1"]
    return flags


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
                         '"completion": "c", "answer": "d"}\n{good}', (":2:", "surrogates")),
    "missing prompt": ('{good}\n{"chosen": "a", "rejected": "b", "completion": "c", "answer": "d"}',
                       (":2:", '"prompt" is missing', "a row looks like")),
    "empty prompt": ('{"prompt": "", "chosen": "a", "rejected": "b", "completion": "c", '
                     '"answer": "d"}',
                     (":1:", '"prompt" is missing, empty')),
    "prompt of no messages": ('{"prompt": [], "chosen": "a", "rejected": "b", "completion": "c", '
                              '"answer": "d"}',
                              (":1:", '"prompt" is missing, empty or not a text')),
    "only one prompt": ("{good0}\n{good0}\n{good0}", ("two different prompts", "held out")),
    "chat without a template": ('{"prompt": [{"role": "user", "content": "Hi"}], "chosen": "a", '
                                '"rejected": "b", "completion": "c", "answer": "d"}\n{good}',
                                ("no chat template", "give prompts as strings")),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", FILES_OF_BOTH)
def test_bad_file(name, script, tmp_path, capsys, out, quick):
    """A broken data file is told by file, line and remedy, before anything in --out changes."""
    content, fragments = FILES_OF_BOTH[name]
    path = tmp_path / "data.jsonl"
    if isinstance(content, str):
        rows = [json.dumps(row) for row in good(script)]
        content = content.replace("{good0}", rows[0]).replace("{good}", rows[1]).encode()
    path.write_bytes(content)
    line = fails(script, ["--data", str(path), *quick[script]], capsys, fragments, out)
    assert "data.jsonl" in line or "prompts" in line


RESPONSES = {"missing": None, "empty": "", "whitespace": " \n\t", "a number": 3, "null": [None],
             "a list": ["a"], "two messages": CHAT, "a message without content": [{"role": "user"}]}


@pytest.mark.parametrize("script, key", [
    ("dpo", "chosen"), ("dpo", "rejected"), ("sft", "completion"), ("reward_model", "chosen"),
    ("reward_model", "rejected"), ("simpo", "chosen"), ("simpo", "rejected"), ("hir", "answer"),
    ("self_correct", "answer")])
@pytest.mark.parametrize("name", RESPONSES)
def test_bad_response(name, script, key, tmp_path, capsys, out):
    """A response that is missing, empty or no text is named with its key, file and line."""
    rows, value = good(script), RESPONSES[name]
    rows[1] = {k: v for k, v in rows[1].items() if k != key}
    if value is not None:
        rows[1][key] = None if value == [None] else value
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    fails(script, ["--data", str(path), *QUICK], capsys,
          ("data.jsonl:2:", f'"{key}" is missing, empty or not a text', *SHAPE[script]), out)


RANKS = ("data.jsonl:2:", "whole numbers from 1")
RANK_ROWS = {
    "ranks too short": ([RANKED, RANKED | {"ranks": [1]}], [], RANKS),
    "ranks missing": ([RANKED, {"prompt": "a", "responses": ["x", "y"]}], [], RANKS),
    "ranks of text": ([RANKED, RANKED | {"ranks": ["1", "2"]}], [], RANKS),
    "ranks of bools": ([RANKED, RANKED | {"ranks": [True, 2]}], [], RANKS),
    "ranks of floats": ([RANKED, RANKED | {"ranks": [1.0, 2.5]}], [], RANKS),
    "rank zero": ([RANKED, RANKED | {"ranks": [0, 1]}], [], RANKS),
    "responses a text": ([RANKED, RANKED | {"responses": "ab"}], [], RANKS),
    "a response empty": ([RANKED, RANKED | {"responses": [" Good.", " "]}], [],
                         ("data.jsonl:2:", '"responses" is missing, empty or not a text')),
}
DPO_ROWS = RANK_ROWS | {
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


def ranked(*ranks):
    """Rows with different prompts and these ranks, of so many responses."""
    texts = [f" It was film {i}." for i in range(len(ranks))]
    return [{"prompt": f"I saw film {i}.", "responses": texts, "ranks": [*ranks]} for i in range(4)]


NO_ROW = ("data.jsonl", "no row is left", "responses that differ in rank")
REWARD_ROWS = RANK_ROWS | {
    "all ranks tied": (ranked(1, 1), [], NO_ROW),
    "no responses": (ranked(), [], NO_ROW),
    "one response": (ranked(1), [], NO_ROW),
    "one and the same response": ([PAIR | {"prompt": p, "rejected": PAIR["chosen"]} for p in "ab"],
                                  [], NO_ROW),
    "two are best": (ranked(1, 1, 2), ["--loss", "best_of_k"], NO_ROW),
    "no room for a response": (ranked(1, 2), ["--max_length", "2"],
                               (*NO_ROW, "--max_length 2")),
}


@pytest.mark.parametrize("name", REWARD_ROWS)
def test_bad_row_for_reward_model(name, tmp_path, capsys, out, quick):
    """Rankings that say nothing, or not what was meant, are refused by file, and line if it is
    one of them."""
    rows, flags, fragments = REWARD_ROWS[name]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    fails("reward_model", ["--data", str(path), *quick["reward_model"], *flags], capsys, fragments,
          out)


@pytest.mark.parametrize("rank", [2**62 + 1, 10**30])
def test_rank_beyond_64_bits(rank, tmp_path, capsys, out, quick):
    """A rank that no tensor holds, or that the loss takes for padding, is told by file and line."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [RANKED, *ranked(rank, rank + 1)])))
    fails("reward_model", ["--data", str(path), *quick["reward_model"], "--loss", "best_of_k"],
          capsys, ("data.jsonl:2:",), out)


SIMPO_ROWS = RANK_ROWS | {
    "all ranks tied": (ranked(1, 1), [], NO_ROW),
    "all ranks tied, whole rankings": (ranked(2, 2, 2), ["--loss", "pro"], NO_ROW),
    "no responses": (ranked(), [], NO_ROW),
    "one response": (ranked(1), ["--loss", "rrhf"], NO_ROW),
    "one and the same response": ([PAIR | {"prompt": p, "rejected": PAIR["chosen"]} for p in "ab"],
                                  [], NO_ROW),
    "the same but for what is cut": (
        [PAIR | {"prompt": p, "rejected": PAIR["chosen"] + " Well."} for p in "ab"],
        ["--max_length", "5"], (*NO_ROW, "--max_length 5")),
    "no room for a response": (ranked(1, 2), ["--max_length", "2"],
                               (*NO_ROW, "--max_length 2")),
    "rank beyond 64 bits": ([RANKED, *ranked(10**30, 10**30 + 1)], [], RANKS),
    "label of kto": ([PAIR, KTO], [], ("data.jsonl:2:", '"chosen" is missing', *SHAPE["simpo"])),
}


@pytest.mark.parametrize("name", SIMPO_ROWS)
def test_bad_row_for_simpo(name, tmp_path, capsys, out, quick):
    """Rankings that say nothing, or not what was meant, are refused; so are responses that differ
    only behind the cut (natolambert/rlhf-book#503, OpenRLHF/OpenRLHF#1311)."""
    rows, flags, fragments = SIMPO_ROWS[name]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    fails("simpo", ["--data", str(path), *quick["simpo"], *flags], capsys, fragments, out)


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
BOTH = tuple(SCRIPTS)  # all of them
FLAGS = {
    "missing file": (BOTH, "--data nowhere.jsonl", ("--data nowhere.jsonl", "No such file")),
    "folder as file": (BOTH, "--data {empty}", ("empty: cannot be read", "give a UTF-8 file")),
    "no row fits": (("dpo", "sft", "ppo_rlhf"), "--data {good} --max_length 2",
                    ("--max_length 2", "data.jsonl", "give a larger one")),
    "above the context": (BOTH, "--data {good} --max_length 513",
                          ("--max_length 513", "512 positions")),
    "unknown loss": (("dpo",), "--loss simpo", ("--loss", "'simpo'", "ipo", "--help")),
    "unknown task": (("sft",), "--task poetry", ("--task", "'poetry'", "sentiment", "--help")),
    "unknown flag": (BOTH, "--betta 0.1", ("--betta", "--help")),
    "flag of the other": (("sft",), "--beta 0.1", ("--beta", "--help")),
    "no value": (BOTH, "--steps", ("--steps", "--help")),
    "half a step": (BOTH, "--steps 1.5", ("--steps", "'1.5'", "--help")),
    "unknown dtype": (BOTH, "--dtype float16", ("--dtype", "'float16'", "bfloat16")),
    "unknown device": (BOTH, "--data {good} --device abacus", ("--device abacus",)),
    "unknown model": (BOTH, "--data {good} --model no-such-model",
                      ("error: no-such-model", "check the spelling", "online once")),
    "folder without a model": (BOTH, "--data {good} --model {empty}", ("empty", "no config.json")),
    "no steps": (BOTH, "--steps 0", ("--steps 0", "above 0")),
    "negative steps": (BOTH, "--steps -3", ("--steps -3", "above 0")),
    "no epochs": (BOTH, "--epochs 0", ("--epochs 0", "above 0")),
    "negative batch": (BOTH, "--batch_size -1", ("--batch_size -1", "above 0")),
    "no parts": (BOTH, "--accumulate 0", ("--accumulate 0", "above 0")),
    "no saving": (BOTH, "--save_every 0", ("--save_every 0", "above 0")),
    "lr nan": (BOTH, "--lr nan", ("--lr nan", "must be a number")),
    "lr inf": (BOTH, "--lr inf", ("--lr inf", "must be a number")),
    "lr 0": (BOTH, "--lr 0", ("--lr 0", "above 0")),
    "lr beyond float32": (BOTH, "--data {good} --steps 2 --lr 1e39", ("--lr 1e+39", "too large")),
    "grad norm 0": (BOTH, "--max_grad_norm 0", ("--max_grad_norm 0", "above 0")),
    "negative rank": (BOTH, "--lora_rank -2", ("--lora_rank -2", "not below 0")),
    "seed beyond 64 bits": (BOTH, f"--data {{good}} --seed {10**20}", (f"--seed {10**20}",)),
    "beta 0": (("dpo", "simpo"), "--beta 0", ("--beta 0", "above 0")),
    "beta nan": (("dpo", "simpo"), "--beta nan", ("--beta nan", "must be a number")),
    "tau 0": (("dpo",), "--loss ipo --tau 0", ("--tau 0", "above 0")),
    "negative alpha": (("hir", "self_correct"), "--alpha -1", ("--alpha -1", "not below 0")),
    "negative alpha of R-DPO": (("dpo",), "--loss rdpo --alpha -1", ("--alpha -1", "not below 0")),
    "flag of another loss": (("dpo",), "--loss kto --tau 0.2",
                             ("--tau has no part in --loss kto", "leave it out")),
    "weight without KTO": (("dpo",), "--lambda_desirable 2",
                           ("--lambda_desirable has no part in --loss dpo", "leave it out")),
    "smoothing of more than half": (("dpo",), "--label_smoothing 0.6",
                                    ("--label_smoothing 0.6", "half")),
    "no samples": (("dpo", "simpo"), "--samples 0", ("--samples 0", "above 0")),
    "pretrain with data": (("sft",), "--task pretrain --data {good}",
                           ("--task pretrain", "leave out --data")),
    "one to compare": (("reward_model", "simpo"), "--k 1", ("--k 1", "at least two responses")),
    "none to compare": (("reward_model", "simpo"), "--k 0", ("--k 0", "above 0")),
    "no rankings": (("reward_model", "simpo"), "--rankings 0", ("--rankings 0", "above 0")),
    "negative samples": (("reward_model",), "--samples -1", ("--samples -1", "not below 0")),
    "unknown ranking loss": (("reward_model",), "--loss kto", ("--loss", "best_of_k", "--help")),
    "no such preference loss": (("simpo",), "--loss dpo",
                                ("--loss", "'dpo'", "simpo", "rrhf", "--help")),
    "negative ratio": (("simpo",), "--gamma_beta_ratio -0.5",
                       ("--gamma_beta_ratio -0.5", "not below 0")),
    "margin nan": (("simpo",), "--gamma_beta_ratio nan", ("--gamma_beta_ratio nan", "a number")),
    "negative lam": (("simpo",), "--loss cpo --lam -1", ("--lam -1", "not below 0")),
    "negative delta": (("simpo",), "--loss slic --delta -1", ("--delta -1", "not below 0")),
    "negative weight": (("simpo",), "--loss pro --sft_weight -1",
                        ("--sft_weight -1", "not below 0")),
    "lesson on own data": (("simpo",), "--lesson --data {good}", ("--lesson", "leave out --data")),
    "lesson of another loss": (("simpo",), "--lesson --loss cpo", ("--lesson", "--loss")),
    "lesson gone on with": (("simpo",), "--lesson --resume", ("--lesson", "--resume")),
    "a flag of another loss": (("simpo",), "--loss simpo --lam 2",
                               ("--lam has no part in --loss simpo", "leave it out")),
    "no row fits beside the prompt": (("simpo",), "--data {good} --max_length 2",
                                      ("--max_length 2", "no row is left", "data.jsonl")),
    "no problem fits": (("hir", "self_correct"), "--data {good} --max_length 6",
                        ("data.jsonl", "not two problems", "--max_length 6", "--max_new_tokens 4")),
    "smoothing of everything": (("hir",), "--label_smoothing 1",
                                ("--label_smoothing 1", "below 1")),
    "negative smoothing": (("hir",), "--label_smoothing -0.1",
                           ("--label_smoothing -0.1", "not below 0")),
    "more wrong answers than one": (("hir",), "--alternatives 2 --data {good}",
                                    ("--alternatives", "--data", "only one")),
    "no alternatives": (("hir",), "--alternatives 0", ("--alternatives 0", "above 0")),
    "contrast without hindsight": (("hir",), "--algo farl --alpha 1",
                                   ("--alpha has no part in --algo farl", "leave it out")),
    "entropy in a chain": (("hir",), "--algo coh --beta 0.001",
                           ("--beta has no part in --algo coh", "leave it out")),
    "alternatives in a chain": (("hir",), "--algo coh --alternatives 1",
                                ("--alternatives has no part in --algo coh",)),
    "a fourth requirement": (("hir",), "--requirements 4", ("--requirements", "4", "--help")),
    "unknown algorithm": (("hir",), "--algo rlhf", ("--algo", "'rlhf'", "farl", "--help")),
    "temperature 0": (("hir",), "--temperature 0", ("--temperature 0", "above 0")),
    "no episodes": (("hir",), "--episodes 0", ("--episodes 0", "above 0")),
    "no rounds": (("hir",), "--rounds 0", ("--rounds 0", "above 0")),
    "negative rounds": (("hir", "self_correct"), "--rounds -1", ("--rounds -1",)),
    "negative warm-up": (("hir", "self_correct"), "--warm_up -1", ("--warm_up -1", "not below 0")),
    "more plays than there are": (("self_correct",), "--problems 3000",
                                  ("--problems 3000", "5814 plays")),
    "no problems": (("self_correct",), "--problems 0", ("--problems 0", "above 0")),
    "unknown feedback": (("self_correct",), "--feedback score",
                         ("--feedback", "'score'", "none", "--help")),
    "generator in an empty folder": (("self_correct",), "--data {good} --generator {empty}",
                                     ("empty", "no config.json")),
    "no such generator": (("self_correct",), "--data {good} --generator no-such-model",
                          ("no-such-model", "check the spelling")),
    "reward model as the generator": (("self_correct",), "--data {good} --generator {reward}",
                                      ("reward: a reward model", "language model is needed")),
    "no pool": (("self_correct",), "--pool 0", ("--pool 0", "above 0")),
    "no exploration": (("self_correct",), "--explore 0", ("--explore 0", "above 0")),
    "no corrections": (("self_correct",), "--corrections 0", ("--corrections 0", "above 0")),
    "negative value": (("self_correct",), "--stop_at -1", ("--stop_at -1", "not below 0")),
    "beta inf": (("hir", "self_correct"), "--beta inf", ("--beta inf", "must be a number")),
    "resume nothing": (BOTH, "--data {good} --resume", ("--resume", "no interrupted run in",
                                                        "start one without --resume")),
}


@pytest.mark.parametrize("script, name", [(s, n) for n, case in FLAGS.items() for s in case[0]])
def test_bad_flag(name, script, tmp_path, capsys, out, quick, folders):
    """A flag that cannot be meant ends with its name, its value and what would be right."""
    _, flags, fragments = FLAGS[name]
    (tmp_path / "empty").mkdir()
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good(script))))
    names = folders | {"good": path, "empty": tmp_path / "empty"}
    argv = [word.format(**names) for word in flags.split()]
    fails(script, [*quick[script], *argv], capsys, fragments, out)


@pytest.fixture
def answers(monkeypatch):
    """answers(*texts): from now on self_correct.py samples these, over and over in turn."""

    def install(*texts):
        def sample(model, tokenizer, prompts, *_):
            return [tokenizer.encode(texts[i % len(texts)]) + [tokenizer.eos_id]
                    for i in range(len(prompts))], None

        monkeypatch.setattr(self_correct, "sample", sample)

    return install


@pytest.mark.parametrize("texts, best", [((" 41", " 43"), "0"), ((" 42", "42"), "1")])
def test_a_pool_without_pairs(texts, best, tmp_path, capsys, out, quick, answers):
    """All answers are equally bad, or equally good: told with their value and what to do."""
    answers(*texts)
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good("self_correct"))))
    fails("self_correct", [*quick["self_correct"], "--data", str(path)], capsys,
          ("no answer in the pool is better", f"(values: {best} to {best})", "--generator",
           "a larger --pool than 2"), out)


def test_a_toy_pool_without_pairs(capsys, out, quick, answers):
    """The toy has values between 0 and 1, and the range of them is told."""
    answers(" Nothing.")
    fails("self_correct", [*quick["self_correct"], "--problems", "2", "--warm_up", "0"], capsys,
          ("(values: 0 to 0)",), out)


# Of ppo_rlhf.py alone, beside --batch_size 2 --n 2: flags, fragments.
PPO_FLAGS = {
    "data without a reward model": ("--data {good}", ("--data", "give a --reward_model")),
    "n does not divide": ("--n 3", ("--batch_size 2", "a multiple of --n 3")),
    "n above the batch": ("--n 4", ("--batch_size 2", "a multiple of --n 4")),
    "n 0": ("--n 0", ("--n 0", "above 0")),
    "raft of one": ("--algo raft --n 1", ("--n 1", "--algo raft needs several")),
    "best of one": ("--algo best_of_n --n 1", ("--n 1", "--algo best_of_n needs several")),
    "unknown algo": ("--algo grpo", ("--algo", "'grpo'", "raft", "--help")),
    "unknown start of the values": ("--value_init zero", ("--value_init", "policy", "--help")),
    "reward model as the policy": ("--model {reward}", ("reward: a reward model, where a language",
                                                        "model is needed")),
    "no such reward model": ("--reward_model no-such-model", ("no-such-model", "the spelling")),
    "reward model in an empty folder": ("--reward_model {empty}", ("empty", "no config.json")),
    "values from no reward model": ("--value_init reward_model", ("--value_init reward_model",
                                                                  "give a --reward_model")),
    "values with another tokenizer": ("--reward_model {other_reward}",
                                      ("--reward_model", "other_rm", "is not the policy's",
                                       "give --value_init policy")),
    "no such base": ("--base no-such-model", ("no-such-model", "check the spelling")),
    "base with another tokenizer": ("--base {other}", ("--base", "tokenizer is not that of")),
    "reward model as the base": ("--base {reward}", ("reward: a reward model",)),
    "target without a price": ("--kl_target 1 --beta 0", ("--kl_target", "--beta is 0")),
    "target 0": ("--kl_target 0", ("--kl_target 0", "above 0")),
    "negative beta": ("--beta -1", ("--beta -1", "not below 0")),
    "beta inf": ("--beta inf", ("--beta inf", "must be a number")),
    "lam above 1": ("--lam 1.5", ("--lam 1.5", "not be above 1")),
    "negative lam": ("--lam -0.1", ("--lam -0.1", "not below 0")),
    "gamma above 1": ("--gamma 1.01", ("--gamma 1.01", "not be above 1")),
    "clip 0": ("--clip 0", ("--clip 0", "above 0")),
    "score nan": ("--missing_eos_score nan", ("--missing_eos_score nan", "must be a number")),
    "no minibatches": ("--minibatches 0", ("--minibatches 0", "above 0")),
    "no passes": ("--ppo_epochs 0", ("--ppo_epochs 0", "above 0")),
    "no samples": ("--samples 0", ("--samples 0", "above 0")),
    "ptx weight without texts": ("--ptx_coef 1", ("--ptx_coef and --ptx_data", "both or neither")),
    "ptx texts without weight": ("--ptx_data {ptx}", ("--ptx_coef and --ptx_data", "both or")),
    "ptx file missing": ("--ptx_coef 1 --ptx_data nowhere.jsonl",
                         ("--ptx_data nowhere.jsonl", "No such file")),
    "ptx without text": ("--ptx_coef 1 --ptx_data {ptx}",
                         ("ptx.jsonl:2:", '"text" is missing', '{"text": "..."}')),
    "relabel without a reward model": ("--relabel_every 2", ("--relabel_every", "--reward_model")),
    "relabel own data": ("--relabel_every 2 --reward_model {reward} --data {good}",
                         ("--relabel_every", "leave out --data")),
    "relabel never": ("--relabel_every 0 --reward_model {reward}", ("--relabel_every 0", "above")),
    "no room for a response": ("--max_length 3",
                               ("--max_length 3", "not two prompts", "a larger one")),
}


@pytest.mark.parametrize("name", PPO_FLAGS)
def test_bad_flag_for_ppo_rlhf(name, tmp_path, capsys, out, folders):
    """Flags that contradict each other, or name a model or file that cannot be meant."""
    flags, fragments = PPO_FLAGS[name]
    names = folders | {"empty": tmp_path / "empty", "good": tmp_path / "data.jsonl",
                       "ptx": tmp_path / "ptx.jsonl"}
    names["empty"].mkdir()
    names["good"].write_text("\n".join(map(json.dumps, good("ppo_rlhf"))))
    names["ptx"].write_text('{"text": "The cast was superb."}\n{"txt": "It was dull."}\n')
    argv = [word.format(**names) for word in flags.split()]
    fails("ppo_rlhf", [*QUICK, "--n", "2", *argv], capsys, fragments, out)


@pytest.mark.parametrize("algo", ["ppo", "raft", "best_of_n"])
def test_language_model_as_the_reward_model(algo, capsys, out):
    """A language model has no head to score with: a random one must not pass for a reward."""
    fails("ppo_rlhf", [*QUICK, *"--n 2 --samples 2 --steps 1 --reward_model tiny --algo".split(),
                       algo], capsys,
          ("--reward_model tiny", "a language model", "reward_model.py"), out)


def test_classifier_of_two_labels_as_the_reward_model(tmp_path, capsys, out, folders):
    """One label is needed, and the message says so, not what to set inside transformers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["reward"], tmp_path / "two")
    path = tmp_path / "two" / "model.safetensors"
    weights = load_file(path)
    weights["score.weight"] = weights["score.weight"].repeat(2, 1)
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    fails("ppo_rlhf", [*QUICK, "--n", "2", "--reward_model", str(tmp_path / "two")], capsys,
          ("two", "2 labels"), out)


@pytest.mark.parametrize("start", ["policy", "reward_model"])
def test_reward_model_with_a_short_context(start, tmp_path, capsys, out, folders):
    """A prompt that fills the reward model's context, or a value network that cannot read as far as
    the policy writes, is told before the first step and before anything in --out changes."""
    from transformers import GPT2Config

    folder = tmp_path / "short"
    shutil.copytree(folders["reward"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = GPT2Config.from_pretrained(folders["reward"], n_positions=12, num_labels=1)
    config.architectures = ["GPT2ForSequenceClassification"]
    config.save_pretrained(folder)
    model.save_model(*model.load_model(folder, head="reward"), folder)  # with weights
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"I saw the film number {i}. " * 3})
                              for i in range(4)))
    fails("ppo_rlhf", [*QUICK, "--n", "2", "--reward_model", str(folder), "--data", str(path),
                       "--value_init", start], capsys, ("--reward_model", "12"), out)


def test_chat_for_a_reward_model_without_a_template(tmp_path, capsys, out, folders):
    """The policy reads chat messages and the reward model does not: told before the first step."""
    chat, path = tmp_path / "chat", tmp_path / "data.jsonl"
    shutil.copytree(model.TINY, chat)
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    rows = [{"prompt": [{"role": "user", "content": f"Film {i}?"}]} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    fails("ppo_rlhf", [*QUICK, "--n", "2", "--model", str(chat), "--data", str(path),
                       "--reward_model", str(folders["reward"]), "--value_init", "policy"],
          capsys, ("no chat template",), out)


@pytest.mark.parametrize("where", ["taken", "taken/below"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_out_is_a_file(script, where, tmp_path, capsys, quick):
    """--out that is a file, or lies below one, is told so and the file stays."""
    (tmp_path / "taken").write_text("mine")
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good(script))))
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(["--data", str(path), *quick[script], "--out", str(tmp_path / where)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "error: --out" in lines[0]
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(tmp_path, capsys, out):
    """--device cuda without CUDA names the flag, and trains nothing on the CPU instead."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good("dpo"))))
    fails("dpo", ["--data", str(path), "--device", "cuda"], capsys,
          ("--device cuda", "--device cpu"), out)


# ---------------------------------------------------------------------------------- --resume


def interrupted(script, folder, flags):
    """Leave in the folder the state.pt of a run with these flags that was stopped at step 1."""
    args = SCRIPTS[script].parse_args([*flags, "--out", str(folder)])
    head = "reward" if script == "reward_model" else "lm"
    policy, _ = model.load_model(args.model, head=head)
    model.settle(args, policy, lr_small=1e-3, lr=1e-3)
    if script == "ppo_rlhf":
        policy = torch.nn.ModuleDict({
            "policy": policy, "value": model.load_model(args.reward_model, head="reward")[0]})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr)
    folder.mkdir(exist_ok=True)
    model.save_state(folder, args, policy, optimizer, step=1, reference={}, beta=0.02, rescore=True,
                     rankings=[], reward=None, online=[], before=[{}, []], pool=[], tries=[],
                     explored=0)
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
    ("sft", ["--lora_rank", "2"], ("--lora_rank 0, not 2",)),
    ("reward_model", ["--loss", "best_of_k"], ("--loss ranking, not best_of_k",)),
    ("ppo_rlhf", ["--kl_target", "2"], ("--kl_target None, not 2.0", "give the same flags")),
    ("ppo_rlhf", ["--algo", "raft"], ("--algo ppo, not raft",)),
    ("simpo", ["--loss", "cpo"], ("--loss simpo, not cpo",)),
    ("simpo", ["--gamma_beta_ratio", "0.3"], ("--gamma_beta_ratio 0.5, not 0.3", "same flags")),
    ("hir", ["--algo", "farl"], ("--algo hir, not farl",)),
    ("hir", ["--label_smoothing", "0"], ("--label_smoothing 0.2, not 0.0", "same flags")),
    ("self_correct", ["--feedback", "none"], ("--feedback text, not none",)),
    ("self_correct", ["--generator", "tiny"], ("--generator None, not tiny", "same flags"))])
def test_resume_with_other_flags(script, other, fragments, tmp_path, capsys, quick):
    """Going on with other flags would be another run: the flag and both values are told."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good(script))))
    flags = ["--data", str(path), *quick[script]]
    interrupted(script, tmp_path / "run", flags)
    fails(script, [*flags, "--resume", *other], capsys, fragments, tmp_path / "run")


@pytest.mark.parametrize("script, first", [
    ("dpo", "sft"), ("sft", "dpo"), ("reward_model", "ppo_rlhf"), ("ppo_rlhf", "reward_model"),
    ("reward_model", "dpo"), ("simpo", "dpo"), ("reward_model", "simpo"), ("hir", "self_correct"),
    ("self_correct", "hir"), ("hir", "dpo"), ("sft", "self_correct")])
def test_resume_the_other_script(script, first, tmp_path, capsys, quick):
    """A state of another script is not taken for one's own, whichever flags both have."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good(script))))
    interrupted(first, tmp_path / "run", ["--data", str(path), *quick[first]])
    fails(script, ["--data", str(path), *quick[script], "--resume"], capsys,
          ("--resume", "was started with"), tmp_path / "run")


@pytest.mark.parametrize("kind", ["noise", "empty", "truncated", "no state", "a list", "code"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_a_corrupt_state(script, kind, tmp_path, capsys, quick):
    """A state.pt that is none ends with one line, and code pickled into it is never run."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good(script))))
    flags = ["--data", str(path), *quick[script]]
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


LEARNS_FROM_ROWS = ["dpo", "sft", "reward_model", "simpo", "hir", "self_correct"]


@pytest.mark.parametrize("script", LEARNS_FROM_ROWS)
def test_nan_leaves_a_good_state(script, tmp_path, capsys, monkeypatch, quick, answers):
    """A loss of NaN stops with the step and --lr; the last state is finite and can be resumed."""
    answers(" 41", " 42")  # so that self_correct.py has pairs
    path, run = tmp_path / "data.jsonl", tmp_path / "run"
    path.write_text("\n".join(map(json.dumps, good(script, 8))))
    flags = ["--data", str(path), *quick[script], "--steps", "5", "--save_every", "1",
             "--out", str(run)]
    with monkeypatch.context() as patch:  # the third update, and only that one, is ruinous
        patch.setattr(SCRIPTS[script], "schedule", lambda step, steps: float(step == 2))
        with pytest.raises(SystemExit) as stop:
            SCRIPTS[script].main([*flags, "--lr", "1e30"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: step 4:")
    assert "nan" in lines[0] and "--lr 1e+30 is too high" in lines[0]
    assert "--resume --lr 1e+29" in lines[0] and str(run) in lines[0]

    state = torch.load(run / "state.pt", weights_only=True)
    start, _ = model.load_model("tiny", head="reward" if script == "reward_model" else "lm")
    assert state["step"] == 2 and state["model"].keys() == dict(start.named_parameters()).keys()
    for name, weight in start.named_parameters():  # the first two updates had a rate of 0
        assert torch.equal(state["model"][name], weight)
    moments = [m for s in state["optimizer"]["state"].values() for m in s.values()]
    assert moments and all(torch.isfinite(m).all() for m in moments)

    SCRIPTS[script].main([*flags, "--lr", "1e-4", "--resume"])
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in log)


def test_nan_inside_a_rollout_of_ppo(tmp_path, capsys, monkeypatch, quick):
    """PPO updates many times a step: NaN between two of them stops too, the step is done again from
    the state before it, and the value network's weights are in that state."""
    path, run = tmp_path / "data.jsonl", tmp_path / "run"
    path.write_text("\n".join(map(json.dumps, good("ppo_rlhf", 8))))
    flags = ["--data", str(path), *quick["ppo_rlhf"], "--steps", "4", "--save_every", "1",
             "--out", str(run)]
    with monkeypatch.context() as patch:
        patch.setattr(ppo_rlhf, "schedule", lambda step, steps: float(step == 2))
        with pytest.raises(SystemExit) as stop:
            ppo_rlhf.main([*flags, "--lr", "1e30"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: step 3:")
    assert "--resume --lr 1e+29" in lines[0] and str(run) in lines[0]
    state = torch.load(run / "state.pt", weights_only=True)
    assert state["step"] == 2 and {k.split(".")[0] for k in state["model"]} == {"policy", "value"}
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())
    ppo_rlhf.main([*flags, "--lr", "1e-4", "--resume"])
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]


@pytest.mark.parametrize("script", SCRIPTS)
def test_nan_from_the_very_last_update(script, tmp_path, capsys, quick, answers):
    """The last update can be the ruinous one, and of PPO the last of each step: also then one line
    that says so, instead of a traceback out of the sampling or the table that follow."""
    answers(" 41", " 42")  # so that self_correct.py has pairs
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, good(script, 8))))
    once = ["--ppo_epochs", "1", "--minibatches", "1"] * (script == "ppo_rlhf")
    for steps in ("1", "2"):
        with pytest.raises(SystemExit) as stop:
            SCRIPTS[script].main(["--data", str(path), *quick[script], *once, "--steps", steps,
                                  "--lr", "1e30", "--out", str(tmp_path / "run")])
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and "--lr 1e+30" in lines[0]
        assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("script", LEARNS_FROM_ROWS)
def test_nan_without_a_state_promises_none(script, tmp_path, capsys, quick, answers):
    """Where no state was saved yet, the error must not send its reader to --resume."""
    answers(" 41", " 42")  # so that self_correct.py has pairs
    path, run = tmp_path / "data.jsonl", tmp_path / "run"
    path.write_text("\n".join(map(json.dumps, good(script, 8))))
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(["--data", str(path), *quick[script], "--steps", "5", "--save_every",
                              "1", "--lr", "1e30", "--out", str(run)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: step 2:")
    assert "--lr 1e+30 is too high" in lines[0] and "--lr 1e+29" in lines[0]
    assert not (run / "state.pt").exists() and "--resume" not in lines[0]
