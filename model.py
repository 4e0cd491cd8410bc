"""Load and save: models, tokenizers, LoRA adapters, data files, and what a run leaves behind.

This is the only file that the scripts share. Nothing in it is an alignment algorithm.

    model, tokenizer = load_model("tiny")       # or a folder, or a hub id such as "gpt2"
    save_model(model, tokenizer, "runs/mine")   # AutoModelForCausalLM.from_pretrained loads that

Only safetensors weights are loaded, and no code from a hub is ever run.
"""

import hashlib
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

import tiktoken
import torch
import transformers
from tiktoken_ext.openai_public import r50k_pat_str
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.pytorch_utils import Conv1D

TINY = Path(__file__).resolve().parent / "tiny"
LORA_ALPHA = 16
# Contractions, digits, runs of spaces, newlines, accents, other scripts, emoji.
PROBE = ("I'd say it's  a test:\n\n\tin 2024, 1234567 naïve cafés — 漢字 🙂   "
         "they'll see...\n")

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
if hasattr(sys.stdout, "reconfigure"):  # a console without a character shows "?" for it
    sys.stdout.reconfigure(errors="replace")


def fail(message):
    """End the program because of bad input: one line on stderr, exit code 2, no traceback."""
    print("error:", printable(" ".join(str(message).split())), file=sys.stderr)
    raise SystemExit(2)


def printable(text):
    """The text without control characters, some of which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


# ---------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """A transformers tokenizer; where the vocabulary is GPT-2's kind, tiktoken does the encoding.

    Text is text: a user's "<|endoftext|>" never becomes the control token. (A chat template writes
    control tokens, so in chat messages it may.)
    """

    def __init__(self, folder):
        self.transformers = transformers.AutoTokenizer.from_pretrained(folder)
        self.bos_id = self.transformers.bos_token_id
        self.eos_id = self.transformers.eos_token_id
        self.stop_ids = {self.eos_id}  # each of them ends a response; load_model adds the model's
        self.context = 1024  # positions of the model; load_model sets it
        self.tiktoken = gpt2_encoding(self.transformers)

    def encode(self, text):
        """Token ids of a text, without any control token."""
        if self.tiktoken:
            return self.tiktoken.encode_ordinary(text)
        return self.transformers.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_prompt(self, prompt):
        """Token ids of a prompt: a text after one BOS (if there is one), or chat messages."""
        if isinstance(prompt, str):
            return [self.bos_id] * (self.bos_id is not None) + self.encode(prompt)
        try:  # the template itself writes BOS where the model wants one
            return self.transformers.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # there is no template, or it refuses a role, for example
            fail(f"the model's chat template cannot render the prompt {prompt} ({error})")

    def encode_example(self, prompt, response, max_length, room=1):
        """(prompt ids, response ids with EOS), or None if the prompt leaves less room than `room`.

        The two are encoded apart, so that no token straddles the border. A response that is too
        long is cut, and then has no EOS, since it did not end there.
        """
        prompt, response = self.encode_prompt(prompt), self.encode(response) + [self.eos_id]
        left = min(max_length, self.context) - len(prompt)
        return (prompt, response[:left]) if prompt and left >= room else None

    def decode(self, ids):
        """The text of token ids; control tokens such as EOS are left out."""
        return self.transformers.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def show(self, prompt, response):
        """Print an example: its prompt, and the tokens of its response, which are trained on."""
        print("prompt    :", repr(self.transformers.decode(prompt)))
        print("trained on:", [self.transformers.decode([i]) for i in response])


def gpt2_encoding(tokenizer):
    """A tiktoken encoding that equals a tokenizer of GPT-2's kind; None for all other kinds."""
    byte = {character: b for b, character in bytes_to_unicode().items()}  # how GPT-2 spells bytes
    try:
        ranks = {bytes(byte[c] for c in token): i for token, i in tokenizer.get_vocab().items()
                 if i not in tokenizer.all_special_ids}
        encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                     special_tokens={})
        same = encoding.encode_ordinary(PROBE) == tokenizer.encode(PROBE, add_special_tokens=False)
    except (KeyError, ValueError):  # a token that is not made of GPT-2's bytes
        return None
    return encoding if same else None


# -------------------------------------------------------------------------------------- models


def load_model(name="tiny", head="lm", device="cpu", lora_rank=0):
    """Load a decoder-only model and its tokenizer, with fp32 weights.

    name: "tiny" (the embedded model), a folder, or a hub id. A folder with config and tokenizer but
        no weights gives random weights and a warning.
    head: "lm", or "reward" for a sequence-classification model with one label.
    lora_rank: if above 0, only LoRA adapters (and a reward head) are trained.
    Returns (model, Tokenizer). Ends with one line and exit code 2 if the model cannot be used.
    """
    folder = TINY if name == "tiny" else Path(name) if Path(name).is_dir() else name
    auto = AutoModelForSequenceClassification if head == "reward" else AutoModelForCausalLM
    torch.manual_seed(0)  # new weights (a reward head, adapters) are the same in each run
    try:
        tokenizer = Tokenizer(folder)
        config = AutoConfig.from_pretrained(folder)
        if head == "reward":
            config.num_labels, config.pad_token_id = 1, tokenizer.eos_id
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # the same function, as one kernel
        if isinstance(folder, Path) and not any(folder.glob("*.safetensors")):
            if any(folder.glob("*.bin")):
                fail(f"{name}: only pickled weights, which can run code; convert to safetensors")
            print(f"warning: {name} holds no weights, so they are random", file=sys.stderr)
            model, missing = auto.from_config(config, dtype=torch.float32), []
        else:
            model, info = auto.from_pretrained(folder, config=config, dtype=torch.float32,
                                               use_safetensors=True, output_loading_info=True)
            missing = sorted(info["missing_keys"])
        # eval: dropout would make two passes of one model differ, and so the ratios of its outputs.
        model = model.eval().to(device)
    except Exception as error:  # transformers raises whatever it stumbles over
        fail(f"{name}: cannot load this model; give a folder, or a hub id that can be reached "
             f"({type(error).__name__}: {str(error)[:300]})")
    check_model(model, tokenizer, name, missing)
    if missing:  # a new reward head, as in Stiennon et al. 2020
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    if lora_rank:
        add_lora(model, lora_rank)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    tokenizer.context = positions or tokenizer.context
    model.bf16 = model.device.type == "cuda"  # arithmetic in bf16, weights in fp32
    generation = getattr(model, "generation_config", None)  # reward models have none
    stops = getattr(generation, "eos_token_id", None)  # None, one id, or a list
    tokenizer.stop_ids |= set(stops if isinstance(stops, list) else [stops]) - {None}
    return model, tokenizer


@torch.no_grad()
def check_model(model, tokenizer, name, missing):
    """End with one line if the scripts cannot use this model. missing: weights not in its files."""
    saved_as_reward = "SequenceClassification" in str(model.config.architectures)
    if saved_as_reward and not hasattr(model, "score"):
        fail(f"{name}: this is a reward model, and a language model is needed")
    if missing and (missing != ["score.weight"] or saved_as_reward):
        fail(f"{name}: its weights lack {missing[0]} and {len(missing) - 1} more")
    if not tokenizer.encode("a"):
        fail(f"{name}: its tokenizer files are missing; put them into the folder")
    if tokenizer.eos_id is None:
        fail(f"{name}: its tokenizer has no EOS token, so no response could end; set eos_token in "
             "tokenizer_config.json")
    check_finite(model, f"{name}: its weights hold NaN or infinity; it was saved broken")
    if not hasattr(model, "score"):
        head, ids = model.get_output_embeddings(), torch.arange(8, device=model.device)[None]
        head.weight.mul_(1024)  # large logits, so that soft-capping shows
        hidden = model.base_model(input_ids=ids).last_hidden_state  # (1, 8, D)
        logits, product = model(input_ids=ids).logits, hidden @ head.weight.T  # (1, 8, V)
        head.weight.div_(1024)  # exact, as 1024 is a power of two
        if not torch.allclose(logits, product, atol=1e-3 * float(product.std())):
            fail(f"{name}: {type(model).__name__} does more between its hidden states and its "
                 "logits than one matrix product (a bias, scaling, soft-capping): not supported")


def check_finite(model, message):
    """End with this message if a weight is NaN or infinite."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        fail(message)


def save_model(model, tokenizer, folder):
    """Write the model (adapters merged) and the tokenizer as plain transformers loads them.

    The files are written into a folder beside and moved into place one by one, the weights last.
    """
    check_finite(model, "training diverged: weights are NaN or infinite; use a lower --lr")
    replace_layers(model, LoRA, merged)
    new = Path(folder) / "model.new"
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.transformers.save_pretrained(new)
    for path in sorted(new.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(path, Path(folder) / path.name)
    new.rmdir()


# ---------------------------------------------------------------------------------------- LoRA


class LoRA(nn.Module):
    """h = W0 x + (alpha / r) B A x (Hu et al. 2021, Eq. 3); W0 is frozen, B starts at zero."""

    def __init__(self, base, rank):
        super().__init__()
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight  # (d_out, d_in)
        self.base, self.scale = base, LORA_ALPHA / rank
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1]).to(weight) * weight.shape[1]**-0.5)
        self.B = nn.Parameter(torch.zeros(len(weight), rank).to(weight))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


def add_lora(model, rank):
    """Freeze the model and put an adapter beside every linear layer of its blocks, in place."""
    model.requires_grad_(False)
    replace_layers(model.base_model, (nn.Linear, Conv1D), lambda layer: LoRA(layer, rank))
    if hasattr(model, "score"):
        model.score.requires_grad_(True)


@torch.no_grad()
def merged(adapter):
    """The layer of an adapter, with the adapter added to its weight."""
    update = adapter.scale * adapter.B @ adapter.A  # (d_out, d_in)
    adapter.base.weight += update.T if isinstance(adapter.base, Conv1D) else update
    return adapter.base


def replace_layers(model, kinds, new_layer):
    """Put new_layer(layer) in the place of every layer of these kinds."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, kinds):
                setattr(parent, name, new_layer(child))


# --------------------------------------------------------------------------------- data files


def read_jsonl(path):
    """The objects of a JSON Lines file. Each gets a key "where": file and line, for messages."""
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: cannot be read ({error}); give a UTF-8 file of JSON lines")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line), where=f"{path}:{number}"))
            except (ValueError, TypeError) as error:
                fail(f"{path}:{number}: not a JSON object ({error}); write one object on each line")
    return rows or fail(f"{path}: no rows in this file")


def get_text(row, key):
    """row[key]: a text, or for a prompt a list of chat messages. Ends with one line otherwise."""
    value = row.get(key)
    if key == "prompt" and isinstance(value, list):
        return value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")  # the response is given as a chat message
    if not isinstance(value, str):
        fail(f'{row["where"]}: "{key}" is missing or not a text; this row has {list(row)[:-1]}')
    return value


def split_by_prompt(rows, count=16):
    """(rows to learn from, rows held out, held-out prompts).

    All rows of `count` prompts are held out, of a tenth of the prompts at most. They are the same
    prompts for every seed.
    """
    if not rows:
        fail("no row is left to use; see --max_length and --max_new_tokens")
    prompts = sorted({json.dumps(row["prompt"]) for row in rows})
    random.Random(0).shuffle(prompts)
    held_out = prompts[:max(1, min(count, len(prompts) // 10))]
    test = [row for row in rows if json.dumps(row["prompt"]) in held_out]
    rows = [row for row in rows if json.dumps(row["prompt"]) not in held_out]
    if not rows:
        fail("at least two different prompts are needed, since one of them is held out")
    return rows, test, [json.loads(prompt) for prompt in held_out]


# ---------------------------------------------------------------------------- a run's folder


def open_folder(args):
    """Make --out and write args.json there. With --resume a state has to be there already."""
    folder = Path(args.out)
    if folder.resolve() == TINY:
        fail(f"--out {args.out}: the embedded model lies there; give another folder")
    if args.resume and not (folder / "state.pt").is_file():
        fail(f"--resume: no interrupted run in {folder}; start one without --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
        (folder / "metrics.jsonl").open("a").close()  # tries to write it
        if not args.resume:
            (folder / "state.pt").unlink(missing_ok=True)
    except OSError as error:
        fail(f"--out {args.out}: cannot be written ({error}); give another folder")


def open_log(folder, step):
    """metrics.jsonl, opened for appending after the lines of the first `step` steps."""
    path = Path(folder) / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:step]) if step else "")
    return path.open("a", buffering=1)  # line by line, so that a kill loses nothing


def fingerprint(args, examples):
    """What a resumed run must share with the run that it continues: its flags and its data."""
    free = ("out", "resume", "device", "save_every", "lr")  # these may differ
    run = {f"--{name}": value for name, value in vars(args).items() if name not in free}
    return run | {"the data": hashlib.sha256(repr(examples).encode()).hexdigest()}


def save_state(folder, model, optimizer, **rest):
    """Write all that --resume needs. A kill while writing leaves the state before it intact."""
    state = dict(rest, model=model.state_dict(), optimizer=optimizer.state_dict())
    torch.save(state, f"{folder}/state.new")
    os.replace(f"{folder}/state.new", f"{folder}/state.pt")


def load_state(folder, model, optimizer, run):
    """Put a saved state into model and optimizer; returns the rest. run: the fingerprint of now."""
    try:
        state = torch.load(f"{folder}/state.pt", map_location="cpu", weights_only=True)
        changed = [key for key in run if run[key] != state["run"][key]]
        if changed:
            fail(f"--resume: the run in {folder} was started with another value of {changed[0]}; "
                 "give the same, or another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # torch raises many kinds for a file that is not its own
        fail(f"--resume: {folder}/state.pt is no state of this script ({type(error).__name__}); "
             "start again without --resume")
    return state


def stopped(folder):
    """End the program after Ctrl-C, with exit code 130 and one line that says how to go on."""
    saved = os.path.exists(f"{folder}/state.pt")
    print("\nstopped;", "add --resume to go on from the last saved state" if saved
          else "no state has been saved yet (see --save_every)", file=sys.stderr)
    raise SystemExit(130)


def report(folder, columns, samples, panels):
    """Print a table and samples; write results.json, samples.txt and curves.png.

    columns: {"before": metrics, "after": metrics}; the table has a row for each metric of the last.
    samples: [{"prompt": text, "before": text, ...}]. panels: for each panel of the figure a list of
    names in metrics.jsonl.
    """
    table = " " * 25 + "".join(f"{name:>11}" for name in columns)
    for key in list(columns.values())[-1]:
        cells = [f"{column[key]:11.3f}" if key in column else " " * 11
                 for column in columns.values()]
        table += f"\n{key:25}" + "".join(cells)
    texts = [printable("\n".join(f"{name:9}: {text}" for name, text in sample.items()))
             for sample in samples]
    Path(folder, "samples.txt").write_text("\n\n".join([table, *texts]), encoding="utf-8")
    Path(folder, "results.json").write_text(json.dumps(columns, indent=2))
    Path(folder, "state.pt").unlink(missing_ok=True)  # this run is complete
    print("", table, *texts[:4], f"All that this run has made is in {folder}", sep="\n\n")
    if not panels:
        return

    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3), squeeze=False)
    for axis, names in zip(axes[0], panels):
        for name in names:
            axis.plot([row.get(name, math.nan) for row in rows], label=name)
        axis.set_xlabel("step")
        axis.legend()
    figure.savefig(f"{folder}/curves.png", bbox_inches="tight")
    pyplot.close(figure)
