"""One DPO training step on the shape of TL;DR: ours against TRL's DPOTrainer. Time and peak memory.

    python benchmarks/dpo_step.py             # 10 to 20 minutes on two cores, 12 GB of memory
    pip install trl==1.16.0                   # the peer; without it only our side is measured

GPT-2 small with random weights, no dropout, fp32 on a CPU; 4 pairs, prompts of 256 tokens and
responses of 32 to 64 with their EOS; beta 0.1; gradients clipped to norm 1; AdamW. All cases have
the same weights, token ids and reference, a model with other random weights (were policy and
reference equal, the first loss would be log 2 whatever one computes). Before any timing, the losses
of the first two steps must agree to 1e-5; the second depends on the gradients of the first.

- ours: `response_logps` and `dpo_loss` of dpo.py, reference log-probs precomputed. As in model.py's
  `load_model`, GPT-2's activation is gelu_pytorch_tanh, the fused form of TRL's gelu_new: the same
  function. `--gelu_new` takes that away from us, to show what the rest is worth.
- trl: DPOTrainer on a CPU, like for like: `precompute_ref_log_probs=True` and no gradient
  checkpointing, neither of them its default. Every position, prompt and padding included, meets the
  whole vocabulary, in tiles of 4096 tokens x 32768 columns.
- trl +ref: the same, but the reference model runs in each step, as it does by default.
- trl defaults: its true defaults, reference in each step and gradient checkpointing; but for
  bfloat16, also a default, which no fp32 loss equals to 1e-5.
- trl compact: as `trl`, on the path that TRL takes on CUDA, which selects the response positions
  before the vocabulary. trl.trainer.utils asks `_use_triton(device)`; here that is made to say yes.
  The kernels ask another copy of the name, so the arithmetic stays TRL's own torch version.
- trl compact +ref: the same, with the reference in each step, as is TRL's default.

Each case is a process that trains a step when told to; TRL's are real `train()` runs, which a
callback halts before each step. One case of TRL at a time, its steps and ours are timed in turn; a
ratio is the median of the ratios within a round, so that a machine which others use disturbs both
sides alike. Memory: the peak of the second step above what stands between steps (weights, Adam's
moments, a reference model), so that gradients count. "whole" is all of the process.
"""

import argparse
import ctypes
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dpo import collate, dpo_loss, response_logps  # noqa: E402

BETA, LR, EOS, CHECKED = 0.1, 1e-6, 50256, 2
TRL = {"trl": {"precompute_ref_log_probs": True, "gradient_checkpointing": False},
       "trl +ref": {"gradient_checkpointing": False},
       "trl defaults": {},
       "trl compact": {"precompute_ref_log_probs": True, "gradient_checkpointing": False},
       "trl compact +ref": {"gradient_checkpointing": False}}
# Against the reference in each step, which is how TRL runs unless told otherwise.
TARGETS = [("time", "trl +ref", 0.40), ("peak", "trl +ref", 0.45),
           ("time", "trl compact +ref", 0.75)]


def make_model(seed, activation):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                      activation_function=activation)).eval()


def make_pairs():
    """4 x (prompt, chosen, rejected), as lists of token ids."""
    rng = random.Random(0)
    draw = lambda length: [rng.randrange(EOS) for _ in range(length)]
    return [(draw(256), *(draw(rng.randint(31, 63)) + [EOS] for _ in range(2))) for _ in range(4)]


class Meter:
    """Waits for the parent's word, then measures a step and tells the parent about it."""

    def __init__(self):
        self.steps = 0

    def begin(self):
        if not sys.stdin.readline():  # the parent is gone
            os._exit(0)
        self.linux = Path("/proc/self/clear_refs").exists()
        if self.linux and self.steps < CHECKED:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed shall not count as standing
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most resident, starts again
            self.before = self.kilobytes("VmRSS")
        self.start = time.perf_counter()

    def end(self, loss):
        row = {"seconds": time.perf_counter() - self.start, "loss": float(loss),
               "peak": math.nan, "whole": math.nan}
        if self.linux and self.steps < CHECKED:
            row["whole"] = self.kilobytes("VmHWM") / 1024
            row["peak"] = row["whole"] - self.before / 1024
        self.steps += 1
        print("STEP " + json.dumps(row), flush=True)

    def kilobytes(self, key):
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def run_ours(args, meter):
    pairs = make_pairs()
    sequences = [(prompt, w) for prompt, w, _ in pairs] + [(prompt, l) for prompt, _, l in pairs]
    activation = "gelu_new" if args.gelu_new else "gelu_pytorch_tanh"
    with torch.no_grad():
        reference, _ = response_logps(make_model(1, activation), collate(sequences, "cpu"))  # (2B,)
    model = make_model(0, activation)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    while True:
        meter.begin()
        sums, _ = response_logps(model, collate(sequences, "cpu"))
        loss = dpo_loss(*sums.chunk(2), *reference.chunk(2), BETA).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.end(loss)


def run_trl(args, meter):
    import trl.trainer.utils
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    if args.worker.startswith("trl compact"):
        trl.trainer.utils._use_triton = lambda device: True

    class Callback(TrainerCallback):
        def on_step_begin(self, *_, **__):
            meter.begin()

        def on_step_end(self, *_, **__):
            meter.end(trainer.loss)

    class Trainer(trl.DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            self.loss = super().compute_loss(*args, **kwargs)
            return self.loss

    # The trainer wants text. Here a text is its token ids, and this tokenizer reads them.
    words = Tokenizer(models.WordLevel({str(i): i for i in range(EOS + 1)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(EOS),
                                        pad_token=str(EOS))
    text = lambda ids: "".join(f" {i}" for i in ids)
    data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), map(text, pair)))
                              for pair in make_pairs()])
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            folder, per_device_train_batch_size=4, max_steps=10**6, learning_rate=LR, beta=BETA,
            lr_scheduler_type="constant", adam_beta2=0.95, bf16=False, use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            **TRL[args.worker])
        trainer = Trainer(make_model(0, "gelu_new"), make_model(1, "gelu_new"), args=config,
                          train_dataset=data, processing_class=tokenizer, callbacks=[Callback()])
        if config.precompute_ref_log_probs:
            trainer.ref_model = None  # it has done its work
        row = trainer.train_dataset[0]
        assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == make_pairs()[0]
        trainer.train()


class Worker:
    """A case in a process of its own that waits to be told to take a step."""

    def __init__(self, name):
        quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
                 "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--worker", name], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | quiet)

    def step(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("STEP "):
                return json.loads(line[5:])
        raise SystemExit("a case has failed: see above")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each case")
    parser.add_argument("--cases", nargs="+", default=[*TRL], choices=[*TRL],
                        help="which of TRL's to run")
    parser.add_argument("--gelu_new", action="store_true", help="TRL's activation on our side too")
    parser.add_argument("--worker", choices=["ours", *TRL], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return (run_ours if args.worker == "ours" else run_trl)(args, Meter())

    cases = args.cases
    if importlib.util.find_spec("trl") is None:
        print("skipped: TRL is not installed (pip install trl==1.16.0)")
        cases = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32 on the CPU")
    seconds, memory, ratios = {"ours": []}, {}, {}
    for case in cases or ["ours"]:  # ours alone where there is no TRL
        workers = {name: Worker(name) for name in ("ours", case)}
        for step in range(CHECKED):
            rows = {name: worker.step() for name, worker in workers.items()}
            print(f"losses of step {step + 1}:",
                  ", ".join(f"{name} {row['loss']:.7f}" for name, row in rows.items()), flush=True)
            if not abs(rows["ours"]["loss"] - rows[case]["loss"]) <= 1e-5:
                raise SystemExit("the losses differ by more than 1e-5")
        memory |= {name: (row["peak"], row["whole"]) for name, row in rows.items()}
        times = {name: [] for name in workers}
        for _ in range(args.rounds):
            for name, worker in workers.items():
                times[name].append(worker.step()["seconds"])
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
        seconds["ours"] += times["ours"]
        seconds[case] = times[case] if case in TRL else seconds["ours"]
        ratios[case] = {
            "time": statistics.median(x / y for x, y in zip(times["ours"], times[case])),
            "least": min(times["ours"]) / min(times[case]),
            "peak": memory["ours"][0] / memory[case][0]}
    if memory["ours"][0] != memory["ours"][0]:
        print("memory was not measured: that needs Linux")

    print(f"\n{'':13} {'median s':>9} {'min s':>7} {'ours / it':>10} {'peak MiB':>9} "
          f"{'ours / it':>10} {'whole MiB':>10}")
    for name, times in seconds.items():
        ratio = ratios.get(name, {"time": 1.0, "peak": 1.0})
        print(f"{name:13} {statistics.median(times):9.3f} {min(times):7.3f} {ratio['time']:10.2f} "
              f"{memory[name][0]:9.0f} {ratio['peak']:10.2f} {memory[name][1]:10.0f}")
    print("\ntargets")
    for what, other, most in TARGETS:
        if other in ratios:
            value = ratios[other][what]
            verdict = "not measured" if value != value else "met" if value <= most else "MISSED"
            least = f" (of the minima {ratios[other]['least']:.2f})" if what == "time" else ""
            print(f"  {what} of ours / {other}: {value:.2f}{least}, at most {most:.2f}: {verdict}")


if __name__ == "__main__":
    main()
