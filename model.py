"""Load and save: models, tokenizers, LoRA adapters, data files, and what a run leaves behind.

This is the only file that the scripts share. Nothing in it is an alignment algorithm.

    model, tokenizer = load_model("tiny")       # or a folder, or a hub id such as "gpt2"
    save_model(model, tokenizer, "runs/mine")   # AutoModelForCausalLM.from_pretrained loads that

No code from a hub is ever run.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tiktoken_ext.openai_public import r50k_pat_str
from torch import nn
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

TINY = Path(__file__).resolve().with_name("tiny")
LORA_ALPHA = 16
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if TORCHRUN else 0  # number of this process; 0 prints and saves
LOCKS = []  # open files; closing one would end its lock
# Two tokenizers are compared on this text: contractions, digits, spaces, accents, scripts, emoji.
PROBE = ("I'd say it's  a test:\n\n\tin 2024, 1234567 naïve cafés — 漢字 🙂   "
         "they'll see...\n")

logging.set_verbosity_error()
logging.disable_progress_bar()
if hasattr(sys.stdout, "reconfigure"):  # what the console cannot show is "?"
    sys.stdout.reconfigure(errors="replace")


def fail(*messages):
    """End the program because of bad input: one line on stderr, exit code 2, no traceback."""
    if RANK:
        time.sleep(3)  # if rank 0 fails as well, torchrun ends this process before it prints
    print("error:", printable(" ".join("; ".join(messages).split())), file=sys.stderr)
    raise SystemExit(2)


def say(*texts):
    """Print. If the reader has closed the pipe ("| head -1"), go on in silence."""
    try:
        print(*texts, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text):
    """The text without control characters, which could move the cursor or clear the screen."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)  # all but tab and newline


# ---------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """A transformers tokenizer; where the vocabulary is GPT-2's kind, tiktoken does the encoding.

    A prompt is a text, or a list of chat messages that the model's chat template renders. In a text
    "<|endoftext|>" is encoded letter by letter; in a message it may become the control token.
    """

    def __init__(self, folder):
        self.transformers = AutoTokenizer.from_pretrained(folder)
        self.tiktoken = gpt2_encoding(self.transformers)
        self.eos_id = self.transformers.eos_token_id
        bos = self.transformers.bos_token_id  # not every tokenizer puts it before a text
        self.bos_id = bos if bos in self.transformers.encode("a")[:1] else None
        self.stop_ids = {self.eos_id} | self.end_of_turn()  # load_model adds the model's own
        self.context = 1024  # positions of the model; load_model sets it
        self.size = 10**9  # rows of the model's embedding; load_model sets it
        self.notes = set()  # warnings that have been printed

    def end_of_turn(self):
        """The control token that the chat template writes after a reply: {id}, or an empty set."""
        try:
            text = self.render([{"role": "user", "content": "Hello"}], "Reply")
        except Exception:  # there is no template, or it wants other messages
            return set()
        ids = self.encode(text.rpartition("Reply")[2], control=True)
        return set([i for i in ids if i in self.transformers.added_tokens_decoder][:1])

    def encode(self, text, control=False):
        """Token ids of a text. control: whether "<|endoftext|>" in it becomes the control token."""
        if self.tiktoken and not control:
            return self.tiktoken.encode_ordinary(text)
        return self.transformers.encode(text, add_special_tokens=False,
                                        split_special_tokens=not control)

    def render(self, prompt, response=None):
        """The text of a prompt, ready for its response, or with the response."""
        if isinstance(prompt, str):
            return prompt + (response or "")
        begun = prompt[-1]["role"] == "assistant"  # the prompt ends with the start of the reply
        template = self.transformers.apply_chat_template
        if response is None:
            return template(prompt, tokenize=False, add_generation_prompt=not begun,
                            continue_final_message=begun)
        if begun:
            *prompt, start = prompt
            response = start["content"] + response
        return template([*prompt, {"role": "assistant", "content": response}], tokenize=False)

    def encode_prompt(self, prompt, response=None):
        """Token ids of a prompt, ready for its response, or with it. An empty text becomes EOS."""
        chat = not isinstance(prompt, str)
        bos = [] if chat or self.bos_id is None else [self.bos_id]  # a template writes its own
        try:
            text = self.render(prompt, response)
        except Exception as error:  # there is no template, or it refuses a role, for example
            fail(f"the model's chat template cannot render {json.dumps(prompt)[:200]} ({error}); "
                 "give texts, or take an instruct model")
        ids = bos + self.encode(text, control=chat) or [self.eos_id]
        if max(ids, default=0) >= self.size:
            fail(f"the model has no embedding for {self.transformers.decode([max(ids)])!r}, which "
                 "its tokenizer knows; take the tokenizer that belongs to the model")
        return ids

    def encode_example(self, prompt, response, max_length, room=1):
        """(prompt ids, response ids), or None if the prompt leaves less room than `room`.

        A response ends with EOS, or with the token that the chat template writes after a reply. One
        that is too long is cut, and has no such end. Prompt and response are encoded as one text,
        unless one token would cover the end of the prompt and the start of the response.
        """
        ids, both = self.encode_prompt(prompt), self.encode_prompt(prompt, response)
        start, whole = self.render(prompt), self.render(prompt, response)
        if not whole.startswith(start):
            fail("the chat template writes a prompt differently when a reply follows, so it is "
                 f"unknown where the reply begins; give texts. Without a reply: {start[-200:]!r}")
        rest = both[len(ids):]
        if both[:len(ids)] != ids:
            rest = self.encode(whole[len(start):], control=not isinstance(prompt, str))
        rest.append(self.eos_id)
        length = 1 + next(i for i, token in enumerate(rest) if token in self.stop_ids)
        left = min(max_length, self.context) - len(ids)
        return (ids, rest[:min(length, left)]) if left >= room else None

    def decode(self, ids, whole=False):
        """The text of a response; control tokens, such as the EOS at its end, are left out.

        whole: if the response was cut, drop its last, unfinished sentence.
        """
        kept = [token for token in ids if token not in self.stop_ids]
        # SentencePiece drops a leading space. So an "a" is decoded in front, and then removed.
        text = self.transformers.decode([*self.encode("a"), *kept], skip_special_tokens=True,
                                        clean_up_tokenization_spaces=False)[1:]
        if whole and kept == ids:  # it has no stop token, so it was cut
            text = text[:text.rfind(".") + 1]
        return text

    def show(self, prompt, response):
        """Print an example: its prompt, and the tokens of its response."""
        say("prompt    :", repr(self.transformers.decode(prompt)))
        say("response  :", [self.transformers.decode([i]) for i in response])

    def note(self, text, where=""):
        """Print a warning, once."""
        if text not in self.notes and not RANK:
            print("warning:", printable(where + text), file=sys.stderr)
            self.notes.add(text)


def gpt2_encoding(tokenizer):
    """A tiktoken encoding that equals a tokenizer of GPT-2's kind; None for all other kinds."""
    byte = {character: b for b, character in bytes_to_unicode().items()}  # how GPT-2 spells bytes
    try:
        ranks = {bytes(byte[c] for c in token): i for token, i in tokenizer.get_vocab().items()
                 if i not in tokenizer.all_special_ids}
        encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                     special_tokens={})
        if encoding.encode_ordinary(PROBE) == tokenizer.encode(PROBE, add_special_tokens=False):
            return encoding
    except (KeyError, ValueError):  # a token that is not made of GPT-2's bytes
        pass
    return None


# -------------------------------------------------------------------------------------- models


def load_model(name="tiny", head="lm", device="cpu", lora_rank=0):
    """Load a decoder-only model and its tokenizer, with fp32 weights.

    name: "tiny" (the embedded model), a folder, or a hub id. A folder with config and tokenizer but
        no weights gives random weights and a warning.
    head: "lm", or "reward" for a sequence-classification model with one label.
    lora_rank: if above 0, only LoRA adapters (and a reward head) are trained.
    Returns (model, Tokenizer). Ends with one line and exit code 2 if the model cannot be used.
    """
    folder = TINY if name == "tiny" else name
    auto = AutoModelForSequenceClassification if head == "reward" else AutoModelForCausalLM
    torch.manual_seed(0)  # new weights (a reward head, adapters) are the same in each run
    try:
        tokenizer = Tokenizer(folder)
        config = AutoConfig.from_pretrained(folder)
        if type(config) not in auto._model_mapping:
            fail(f"{name}: transformers has no {auto.__name__[4:]} for a {config.model_type}, so "
                 "this script cannot use it; take a decoder-only language model of another kind")
        if head == "reward":  # without a padding token: transformers then scores the last token
            config.num_labels, config.pad_token_id = 1, None
        activation = getattr(config, "activation_function", None)
        if activation == "gelu_new":  # the same function as one kernel: 40 % less memory
            config.activation_function = "gelu_pytorch_tanh"
        endings = {path.suffix for path in Path(folder).glob("*")}  # empty for a hub id
        if endings and ".safetensors" not in endings:
            if ".bin" in endings:
                fail(f"{name}: only pickled weights, which can run code; convert to safetensors")
            tokenizer.note(f"{name} holds no weights, so they are random")
            model, missing = auto.from_config(config, dtype=torch.float32), []
        else:
            model, info = auto.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True,
                output_loading_info=True, ignore_mismatched_sizes=True)
            missing = sorted(info["missing_keys"])
            for weight, saved, expected in sorted(info["mismatched_keys"]):
                reason = "a reward is one number" if weight == "score.weight" else "see config.json"
                fail(f"{name}: {weight} is {tuple(saved)} in its weights, and has to be "
                     f"{tuple(expected)}: {reason}")
        if activation:
            model.config.activation_function = activation  # what is saved names what was loaded
        # Without eval() dropout would give two passes of one model different log-probs.
        model = model.eval().to(device)
    except Exception as error:  # transformers raises many kinds
        fail(f"{name}: cannot load this model; give a folder with all its files, or a hub id that "
             f"can be reached ({type(error).__name__}: {str(error)[:300]})")
    check_model(model, tokenizer, name, missing)
    if missing:  # a new reward head, as in Stiennon et al. 2020
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    if lora_rank:
        add_lora(model, lora_rank)
    tokenizer.size = model.get_input_embeddings().num_embeddings
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    tokenizer.context = positions or tokenizer.context
    model.small = model.num_parameters() < 1e7  # tiny, or trained from it: it has seen only toys
    if head == "lm":
        stops = model.generation_config.eos_token_id  # None, one id, or a list
        tokenizer.stop_ids |= set(stops if isinstance(stops, list) else [stops])
    return model, tokenizer


@torch.no_grad()
def check_model(model, tokenizer, name, missing):
    """End with one line if the scripts cannot use this model. missing: weights its files lack."""
    saved_as_reward = "SequenceClassification" in str(model.config.architectures)
    if "SequenceClassification" in type(model).__name__ and not hasattr(model, "score"):
        fail(f"{name}: {type(model).__name__} is no decoder-only model with a score layer")
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
        hidden = model.base_model(input_ids=ids).get("last_hidden_state")  # (1, 8, D)
        if hidden is None:
            fail(f"{name}: the scripts do not find the hidden states of {type(model).__name__}")
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
    if dist.is_initialized():  # from here on rank 0 works alone
        dist.destroy_process_group()
        if RANK:
            raise SystemExit(0)
    merge_lora(model)
    new = Path(folder) / "model.new"
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.transformers.save_pretrained(new)
    Path(folder, "chat_template.jinja").unlink(missing_ok=True)  # that of an older model
    for path in sorted(new.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        path.replace(Path(folder, path.name))
    new.rmdir()


# ---------------------------------------------------------------------------------------- LoRA


class LoRA(nn.Module):
    """An adapter: adds (alpha / r) B A x to the output W0 x of a layer (Hu et al. 2021, Eq. 3).

    B starts at zero, so the model computes at first what it computed before.
    """

    def __init__(self, weight, rank):
        super().__init__()
        d_out, d_in = weight.shape
        self.scale = LORA_ALPHA / rank
        self.A = nn.Parameter(torch.randn(rank, d_in).to(weight) * d_in**-0.5)
        self.B = nn.Parameter(weight.new_zeros(d_out, rank))

    def forward(self, layer, inputs, output):
        return output + self.scale * (inputs[0] @ self.A.T) @ self.B.T


def add_lora(model, rank):
    """Freeze the model and give each linear layer of its blocks an adapter."""
    model.requires_grad_(False)
    total = model.base_model.num_parameters(exclude_embeddings=True)
    adapted = 0
    for layer in list(model.base_model.modules()):
        if isinstance(layer, (nn.Linear, Conv1D)):
            layer.lora = LoRA(weight_of(layer), rank)
            layer.hook = layer.register_forward_hook(layer.lora)  # called after the layer
            adapted += layer.weight.numel()
    say(f"LoRA: {adapted / total:.0%} of the parameters outside the embedding have an adapter")
    if hasattr(model, "score"):
        model.score.requires_grad_(True)


@torch.no_grad()
def merge_lora(model):
    """Add the adapters to the weights of their layers, and remove them."""
    for layer in list(model.modules()):
        if hasattr(layer, "lora"):
            weight_of(layer).add_(layer.lora.scale * layer.lora.B @ layer.lora.A)  # (d_out, d_in)
            layer.hook.remove()
            del layer.lora, layer.hook


def weight_of(layer):
    """The weight of a linear layer, (d_out, d_in). GPT-2's Conv1D stores it transposed."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


# --------------------------------------------------------------------------------- data files


def read_jsonl(path):
    """The objects of a JSON Lines file. Each gets a key "where": file and line, for messages."""
    rows = []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: cannot be read ({error}); give a UTF-8 file of JSON lines")
    if text.lstrip().startswith("["):
        fail(f"{path}: this is one JSON array; write each row as an object on a line of its own, "
             "for example with jq -c '.[]'")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line) | {"where": f"{path}:{number}"})
            except (ValueError, TypeError) as error:
                fail(f"{path}:{number}: not a JSON object ({error}); write one object on each line")
    return rows or fail(f"{path}: no rows in this file")


OTHER_FORMATS = {  # what rows of other tools have, and what to do with it
    "instruction": 'rename "instruction" to "prompt" and "output" to "completion"',
    "conversations": 'rename "conversations" to "messages", "from" to "role" (user or assistant) '
                     'and "value" to "content"',
    "messages": 'only sft.py reads "messages"; elsewhere those before the reply are the "prompt"',
    "text": 'split each "text" into a prompt and a response'}


def get_text(row, key):
    """row[key], which has to be a text."""
    if isinstance(row.get(key), str):
        return row[key]
    if key in row:
        fail(f'{row["where"]}: "{key}" is not a text, but {json.dumps(row[key])[:80]}')
    remedies = [OTHER_FORMATS[name] for name in OTHER_FORMATS if name in row]
    if "\n\nHuman:" in str(row.get("chosen")):
        remedies = ['"chosen" is a transcript of Human and Assistant; split it behind its last '
                    '"Assistant:", and what is before is the "prompt"']
    names = [name for name in row if name != "where"]
    fail(f'{row["where"]}: "{key}" is missing; this row has {names}', *remedies)


def get_messages(row, key):
    """row[key], which has to be a list of chat messages."""
    for message in row[key]:
        if not (isinstance(message, dict) and "role" in message
                and isinstance(message.get("content"), str)):
            fail(f'{row["where"]}: each message in "{key}" needs a "role" and a "content" that is '
                 f"a text; this one is {json.dumps(message)[:80]}")
    return row[key] or fail(f'{row["where"]}: "{key}" is an empty list')


def read_row(row, tokenizer, *keys):
    """The row with its "prompt" as a text or chat messages, and with a text for each of `keys`.

    A response may also be a message of the assistant, or a conversation that ends with one: then
    the messages before it are the prompt.
    """
    row, prompt, prompts = dict(row), row.get("prompt"), []
    for key in keys:
        if isinstance(row.get(key), list):
            *before, reply = get_messages(row, key)
            if reply["role"] != "assistant":
                fail(f'{row["where"]}: "{key}" ends with a message of the {reply["role"]}, and not '
                     "with a reply of the assistant")
            row[key] = reply["content"]
            if before:
                prompts.append(before)
            elif isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
        get_text(row, key)
    if prompts:
        if isinstance(prompt, list):
            prompts.append(prompt)
        if prompts != [prompts[0]] * max(len(keys), len(prompts)):
            fail(f'{row["where"]}: the responses of this row are not all conversations with the '
                 "same prompt")
        prompt = prompts[0]
    if isinstance(prompt, list):
        row["prompt"] = prompt
        get_messages(row, "prompt")
        return row
    text = "\n".join(get_text(row, key) for key in ("prompt", *keys))
    where = f'{row["where"]}: '
    for token in tokenizer.transformers.all_special_tokens:
        if token in text:
            tokenizer.note(f"this text spells the control token {token}, which is read as plain "
                           "letters; give messages, and the chat template writes it", where)
    if tokenizer.transformers.chat_template:
        tokenizer.note("the prompt is a plain text, so the chat template of this model is not "
                       "used; give messages to use it", where)
    return row


def split_by_prompt(rows, count=16):
    """(rows to learn from, rows held out, held-out prompts).

    All rows of `count` prompts are held out. Where that is more than a tenth of the prompts, it is
    a tenth of them, but at least one. They are the same prompts for every seed.
    """
    if not rows:
        fail("no row is left; use a lower --max_new_tokens or, where there is one, a higher "
             "--max_length")
    prompts = sorted({json.dumps(row["prompt"], sort_keys=True) for row in rows})
    random.Random(0).shuffle(prompts)
    held_out = [json.loads(prompt) for prompt in prompts[:max(1, min(count, len(prompts) // 10))]]
    test = [row for row in rows if row["prompt"] in held_out]
    rows = [row for row in rows if row["prompt"] not in held_out]
    if not rows:
        fail("at least two different prompts are needed, since one of them is held out")
    return rows, test, held_out


# --------------------------------------------------------------------------- several processes


def start_ranks(args):
    """Join the processes that torchrun has started, if it has. Only rank 0 shows anything."""
    if TORCHRUN and not dist.is_initialized():
        if args.device == "cuda":
            torch.cuda.set_device(f"cuda:{os.environ['LOCAL_RANK']}")
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl",
                                timeout=timedelta(minutes=5))
        if RANK:
            sys.stdout = open(os.devnull, "w")
            sys.stderr.isatty = lambda: False  # then tqdm draws no bar


def share(items):
    """The items that this process works on: every world-size-th, beginning with its rank."""
    return items[RANK::dist.get_world_size()] if dist.is_initialized() else items


def all_gather(item):
    """The items of all processes, in a list: [item] without torchrun. Tensors must be on a CPU."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def add_gradients(model):
    """Make the gradient the sum over all processes. A process without a part adds 0."""
    for weight in model.parameters():
        if dist.is_initialized() and weight.requires_grad:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)


# ---------------------------------------------------------------------------- a run's folder


def open_folder(args):
    """Make --out and write args.json there. With --resume a state has to be there already."""
    start_ranks(args)
    if RANK:
        return
    folder = Path(args.out)
    state = folder / "state.pt"
    for flag in ("model", "reference", "policy", "generator", "reward_model", "judge"):
        name = getattr(args, flag, None) or TINY  # tiny/ must not be overwritten, either
        if folder.resolve() == Path(name).resolve():
            fail(f"--out {args.out}: a model has this folder or this name; give another folder")
    if args.resume and not state.is_file():
        fail(f"--resume: no interrupted run in {folder}; start one without --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_symlink():  # writing would change a file elsewhere
                fail(f"--out {args.out}: {path.name} in it is a link; give another folder")
        LOCKS.append((folder / "lock").open("w"))
        try:
            import fcntl
            fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            fail(f"--out {args.out}: another run is writing there; wait for its end, or give "
                 "another folder")
        except (ImportError, OSError):  # Windows and some network drives have no such locks
            pass
        (folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
        (folder / "metrics.jsonl").open("a").close()  # tries to write it
        if not args.resume:
            state.unlink(missing_ok=True)
    except OSError as error:
        fail(f"--out {args.out}: cannot be written ({error}); give another folder")


def open_log(folder, step):
    """metrics.jsonl, opened for appending after the lines of the first `step` steps."""
    if RANK:
        return open(os.devnull, "w")
    path = Path(folder) / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:step]))
    return path.open("a", buffering=1)  # line by line, so that a kill loses nothing


def fingerprint(args, examples):
    """What a resumed run must share with the run that it continues: its flags and its data."""
    free = ("out", "resume", "device", "save_every", "lr")  # these may differ
    run = {f"--{name}": value for name, value in vars(args).items() if name not in free}
    return run | {"the data": hashlib.sha256(repr(examples).encode()).hexdigest()}


def save_state(folder, model, optimizer, **rest):
    """Write all that --resume needs. A kill while writing leaves the previous state intact."""
    if RANK:
        return
    try:
        torch.save(dict(rest, model=model.state_dict(), optimizer=optimizer.state_dict()),
                   f"{folder}/state.new")
    except RuntimeError as error:  # the disk is full
        raise OSError(error)
    os.replace(f"{folder}/state.new", f"{folder}/state.pt")


def load_state(args, model, optimizer, run, **new):
    """With --resume, put the saved state into model and optimizer. run: this run's fingerprint.

    Returns the rest of what was saved. A new run gets step 0 and the values in `new`.
    """
    if not args.resume:
        return {"step": 0} | new
    try:
        state = torch.load(f"{args.out}/state.pt", map_location="cpu", weights_only=True)
        changed = [key for key in run if run[key] != state["run"][key]]
        if changed:
            fail(f"--resume: the run in {args.out} was started with another value of {changed[0]}; "
                 "give the same, or another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # torch raises many kinds for a file that is not its own
        fail(f"--resume: {args.out}/state.pt is no state of this script ({type(error).__name__}); "
             "start again without --resume")
    return state


def launch(train, args):
    """train(args). Ctrl-C (exit code 130) and a full disk (2) end it with one line."""
    try:
        return train(args)
    except (KeyboardInterrupt, OSError, SafetensorError) as error:
        if RANK:  # rank 0 says it
            raise SystemExit(2)
        Path(args.out, "state.new").unlink(missing_ok=True)  # it and model.new may be half written
        shutil.rmtree(f"{args.out}/model.new", ignore_errors=True)
        remedy = "no state has been saved yet"
        if Path(args.out, "state.pt").exists():
            remedy = "add --resume to go on from the last saved state"
        if isinstance(error, KeyboardInterrupt):
            print("\nstopped;", remedy, file=sys.stderr)
            raise SystemExit(130)
        fail(f"{args.out}: cannot be written; is the disk full? ({error})", remedy)


def report(folder, columns, samples, panels):
    """Print a table and samples; write results.json, samples.txt and curves.png.

    columns: {"before": metrics, "after": metrics}; a table row for each metric of the last.
    samples: [{"prompt": text, "before": text, ...}]. panels: for each panel of the figure a list of
    names in metrics.jsonl.
    """
    if RANK:
        return
    table = " " * 25 + "".join(f"{name:>11}" for name in columns)
    for key in list(columns.values())[-1]:
        table += f"\n{key:25}"
        for column in columns.values():
            table += f"{column[key]:11.3f}" if key in column else " " * 11
    texts = [printable("\n".join(f"{name:9}: {text}" for name, text in sample.items()))
             for sample in samples]
    Path(folder, "samples.txt").write_text("\n\n".join([table, *texts]), encoding="utf-8")
    Path(folder, "results.json").write_text(json.dumps(columns, indent=2))
    Path(folder, "state.pt").unlink(missing_ok=True)  # this run is complete
    if panels:
        from matplotlib.figure import Figure
        rows = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
        figure = Figure(figsize=(4 * len(panels), 3))
        for number, names in enumerate(panels, 1):
            axis = figure.add_subplot(1, len(panels), number)
            for name in names:  # a row without it leaves a gap
                axis.plot([row.get(name) for row in rows], label=name)
            axis.set_xlabel("step")
            axis.legend()
        figure.savefig(f"{folder}/curves.png", bbox_inches="tight")
    say("\n\n".join(["", table, *texts[:4], f"All that this run has made is in {folder}"]))
