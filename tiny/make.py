"""Make the model in tiny/: a new GPT-2 of half a million parameters, and its tokenizer.

    python -m tiny.make                 # writes runs/tiny, in about 8 minutes of CPU time

Why has it a gather of log-probs of its own? The model in tiny/ is frozen, and has to come out again
from this file. The code of the scripts may change, for instance to be faster, and then sums are
rounded in another order, which after 2000 steps is another model. So `Gather` and `token_logps`
stay as they were when tiny/ was made: batches with an attention mask, and the whole vocabulary at
once. From sft.py and simpo.py come the texts, `collate`, `schedule` and `sft_loss`; whoever changes
what they compute also changes the model.

It learns two toy tasks from scratch: the reviews of sft.py and the summaries of simpo.py. The
moods of the reviews are balanced, and half of the summaries come from a careless reader, who leaves
facts out or makes them up. So the other scripts have something to improve.

On one machine, with as many threads, the same file comes out each time, bit for bit; another one
rounds differently and ends with other weights.
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import GPT2Config

from model import TINY, fail, load_model, save_model
from sft import collate, schedule, sft_loss, toy_prompts, toy_review
from simpo import FACTS, toy_post

END = "<|endoftext|>"
PEAK_LR = 3e-3
BATCH_SIZE = 64


class Gather(torch.autograd.Function):
    """`gather_logps` for a small vocabulary, with the order of sums that made tiny/."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        logsumexp = (hidden @ weight.T).logsumexp(1)  # (N, V) -> (N,)
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        return (hidden * weight[targets]).sum(1) - logsumexp

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        grad = grad[:, None]  # (N, 1)
        softmax = (hidden @ weight.T - logsumexp[:, None]).exp_().mul_(-grad)  # (N, V), times -grad
        grad_hidden = (grad * weight[targets]).addmm_(softmax, weight)  # (N, D)
        grad_weight = (softmax.T @ hidden).index_add_(0, targets, grad * hidden)  # (V, D)
        return grad_hidden, grad_weight, None


def token_logps(model, sequences):
    """Log-prob of each response token of the batch: (N,)."""
    ids, where, targets, _ = collate(sequences, model.device)
    B, T = ids.shape
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in sequences])
    hidden = model.base_model(
        input_ids=ids,
        attention_mask=(torch.arange(T) < lengths[:, None]).long(),  # (B, T)
        position_ids=torch.arange(T).expand(B, T),
        use_cache=False).last_hidden_state  # (B, T, D)
    hidden = hidden.flatten(0, 1).index_select(0, where)  # (B, T, D) -> (B*T, D) -> (N, D)
    return Gather.apply(hidden, model.get_output_embeddings().weight, targets)


def toy_summary(facts):
    """The summary that states exactly these facts."""
    what = f"a {facts['what']}" if "what" in facts else "something"
    where = f" in {facts['where']}" if "where" in facts else ""
    when = f" on {facts['when']}" if "when" in facts else ""
    return f" {facts.get('who', 'Somebody')} lost {what}{where}{when}."


def misread(rng, facts):
    """The facts as a careless reader reports them: half of the time some are lost or made up."""
    careless = rng.random() < 0.5
    heard = {}
    for kind, fact in facts.items():
        fate = rng.random() if careless else 0.0
        if fate < 0.4:
            heard[kind] = fact
        elif fate < 0.7:
            heard[kind] = rng.choice(FACTS[kind])
    return heard


def make_rows(count):
    """(prompt, response) texts of both tasks, half and half."""
    rng = random.Random("0 False")  # the seed that made tiny/
    prompts = toy_prompts()
    random.Random(0).shuffle(prompts)  # 40 of them were held out when tiny/ was made
    rows = []
    for _ in range(count):
        if rng.random() < 0.5:
            rows.append((rng.choice(prompts[:-40]), toy_review(rng, weights=(1, 1, 1))))
        else:
            post, facts = toy_post(rng)
            rows.append((post, toy_summary(misread(rng, facts))))
    return rows


def make_tokenizer(rows, folder):
    """Learn a byte-level BPE and write it in GPT-2's layout. Returns the size of its vocabulary."""
    bpe = ByteLevelBPETokenizer()
    texts = [prompt + response for prompt, response in rows[:4000]]
    bpe.train_from_iterator(texts, vocab_size=767, min_frequency=2, show_progress=False)
    bpe.save_model(str(folder))  # vocab.json, merges.txt
    path = folder / "vocab.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))
    vocab[END] = len(vocab)
    path.write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END, "eos_token": END,
                "unk_token": END, "model_max_length": 512, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocab)


def make_model(rows, folder):
    """A model with random weights, and its tokenizer. Their files are written to the folder."""
    size = make_tokenizer(rows, folder)
    config = GPT2Config(
        vocab_size=size,
        n_positions=512,
        n_embd=128,
        n_layer=2,
        n_head=4,
        activation_function="gelu_pytorch_tanh",  # GPT-2's function, as one fused kernel
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        summary_first_dropout=0.0,
        bos_token_id=size - 1,
        eos_token_id=size - 1)
    config.save_pretrained(folder)
    return load_model(str(folder))


def train(args):
    """Make the model and the tokenizer, and leave both in args.out."""
    torch.set_num_threads(2)  # another number would round differently
    out = Path(args.out)
    if out.resolve() == TINY:
        fail(f"--out {args.out}: the embedded model lies there; give another folder")
    rows = make_rows(128000)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = make_model(rows, Path(folder))
        examples = [tokenizer.encode_example(prompt, text, max_length=512) for prompt, text in rows]
        random.Random(0).shuffle(examples)
        batches = [examples[i:i + BATCH_SIZE] for i in range(0, len(examples), BATCH_SIZE)]
        batches = random.Random(0).sample(batches, len(batches))
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                      fused=True)
        progress = tqdm(range(args.steps), disable=None)
        for step in progress:
            logps = token_logps(model, batches[step])  # (N,)
            loss = sft_loss(logps, torch.ones_like(logps), normalizer=len(logps))
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = PEAK_LR * schedule(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=loss.item())
        save_model(model, tokenizer, out)
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copy(Path(folder) / name, out / name)
    print(f"the model and its tokenizer are in {out}")


def parse_args(argv=None):
    """The command line; --help shows all defaults."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="runs/tiny", help="folder for the model")
    parser.add_argument("--steps", type=int, default=2000, help="updates, 2000 at most")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        return train(args)
    except KeyboardInterrupt:
        print("\nstopped; nothing has been written")
        raise SystemExit(130)


if __name__ == "__main__":
    main()
