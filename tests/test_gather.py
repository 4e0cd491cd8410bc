"""Log-probs and samples: the gather, the layout of a batch, and the sampler (dpo.py's copies)."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from conftest import ROOT, v
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import model as hub
from dpo import collate, gather_logps, hidden_states, response_logps, sample, split_batch

SMALL = {"vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 2, "initializer_range": 0.8}
LLAMA = SMALL | {"num_attention_heads": 2, "intermediate_size": 16, "num_key_value_heads": 1}
CONFIGS = {
    "gpt2": hf.GPT2Config(vocab_size=5, n_embd=8, n_layer=2, n_head=2, initializer_range=0.8),
    "llama": hf.LlamaConfig(**LLAMA), "mistral": hf.MistralConfig(**LLAMA, sliding_window=3),
    "mamba": hf.MambaConfig(**SMALL, state_size=4),
    "hybrid": hf.Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"])}
RNG = random.Random(0)
SEQUENCES = [[RNG.choices(range(5), k=RNG.randint(1, longest)) for longest in (6, 4)]
             for _ in range(24)]  # [prompt ids, response ids]


@pytest.fixture(params=CONFIGS)
def model(request):
    """A random model of each family with a vocabulary of five tokens."""
    return hf.AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


def naive(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("N, V, scale", [(13, 50, 1), (3, 4096, 1), (5, 5000, 1), (4, 8193, 2000)])
def test_values_and_both_gradients_in_float64(N, V, scale):
    """Equal to the naive version to 1e-10, whether or not the chunks divide the vocabulary; logits
    of some thousands, whose exponentials would overflow, stay finite."""
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (N, V))
    targets = torch.randint(V, (N,))
    targets[:2], targets[-1] = 4, V - 1  # a repeated target: its rows of the gradient add up
    upstream, results = torch.randn(N, dtype=torch.float64), []
    for gather in (gather_logps, naive):
        logps = gather(hidden * scale, weight, targets)
        results.append((logps, *torch.autograd.grad(logps, (hidden, weight), upstream)))
    for ours, theirs in zip(*results):
        assert ours.shape == theirs.shape and torch.isfinite(theirs).all()
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10 * scale)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.size = max(self.size, out.numel() if torch.is_tensor(out) else 0)
        return out


def test_no_tensor_is_nearly_as_large_as_the_logits():
    """The naive version holds three (N, V) matrices (huggingface/trl#2799)."""
    hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (128, 50257))
    for gather, low, high in ((gather_logps, 0, 0.1), (naive, 1, 1)):
        with Largest() as largest:
            gather(hidden, weight, torch.arange(128)).sum().backward()
        assert low <= largest.size / (128 * 50257) <= high


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_head_gets_no_gradient(frozen):
    """With LoRA nobody reads it, so nothing of its size is made in the backward pass
    (linkedin/Liger-Kernel#1441, PrimeIntellect-ai/prime-rl#3011). The hidden states get theirs."""
    hidden, weight = (torch.randn(n, 32, requires_grad=True) for n in (8, 50257))
    weight.requires_grad_(not frozen)
    logps = gather_logps(hidden, weight, torch.arange(8))
    with Largest() as largest:
        logps.sum().backward()
    assert (largest.size >= weight.numel()) == (not frozen) == (weight.grad is not None)
    assert largest.size >= weight.numel() or largest.size <= 4096 * 32
    expected, = torch.autograd.grad(naive(hidden, weight, torch.arange(8)).sum(), hidden)
    assert torch.allclose(hidden.grad, expected, atol=1e-4)


def test_bf16_arithmetic_gives_fp32_log_probs(tiny, monkeypatch):
    """Only the trunk runs in bf16: log_softmax in bf16 is off by up to 0.18 nats a token
    (huggingface/blog#2110)."""
    model, tokenizer = tiny
    sequences = [(tokenizer.encode("I saw the film."), tokenizer.encode(" The plot was dull."))]
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *args, **_: autocast(*args))  # as on CUDA
    ids, where, targets, _ = collate(sequences, "cpu")
    sums, hidden = response_logps(model, sequences)[0], hidden_states(model, ids, where)
    expected = naive(hidden.double(), model.get_output_embeddings().weight.double(), targets).sum()
    assert sums.dtype == hidden.dtype == torch.float32
    assert sums.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("bits, most", [(10, 0.001), (7, 0.005)], ids=["tf32", "bf16"])
def test_rounding_of_the_head_moves_log_probs_little(bits, most, tiny):
    """On CUDA the head's product has inputs of 10 bits (TF32). They are rounded here by hand."""
    model, tokenizer = tiny
    ids, where, targets, _ = collate([(tokenizer.encode_prompt("I saw the film."), tokenizer.encode(
        " The plot was dull. I found the cast superb and funny."))], "cpu")
    weight = model.get_output_embeddings().weight.detach()
    factors = hidden_states(model, ids, where).detach(), weight
    rounded = []
    for x in factors:
        mantissa, exponent = torch.frexp(x)
        rounded.append(torch.ldexp(torch.round(mantissa * 2.0**(bits + 1)), exponent - bits - 1))
    apart = (gather_logps(*rounded, targets) - gather_logps(*factors, targets)).abs().max()
    assert 0 < apart < most


def test_tf32_is_used_on_cuda_alone(monkeypatch):
    used = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", used.append)
    hub.load_model()
    assert used == []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
    hub.load_model(device="cuda:0")
    assert used == ["high"]


@pytest.mark.parametrize("script, first", [("dpo", "class GatherLogps"), ("hir", "def collate")])
def test_log_probs_can_be_copied(script, first, model):
    """The log-prob block works where it is pasted: beside a model of plain transformers, and with
    nothing of ours but what stands in the block."""
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    block = text[text.index(first):text.index("def split_batch")]
    names = {"torch": torch, "pad_sequence": pad_sequence, "checkpoint": checkpoint}
    exec(block, names)
    expected = [naive(model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1],
                      torch.eye(5), torch.tensor(response)) for prompt, response in SEQUENCES]
    if script == "dpo":
        sums, lengths = names["response_logps"](model, SEQUENCES)
        assert lengths.tolist() == [len(response) for _, response in SEQUENCES]
    else:  # means instead of sums
        sums, lengths = names["output_statistics"](model, SEQUENCES)[0], 1
        expected = [logps.mean() for logps in expected]
    assert torch.allclose(sums, torch.stack([logps.sum() for logps in expected]), atol=1e-4)


@pytest.mark.parametrize("max_tokens", [1, 20, 64, 10**6])
def test_split_batch(max_tokens):
    """Each group is in one part; no part is too large, padding included, unless it is one group;
    no part has room for the next group."""
    def size(part):
        rows = [len(p) + len(r) for g in part for p, r in groups[g]]
        return len(rows) * max(rows)

    groups = [SEQUENCES[i:i + 1 + i % 4] for i in range(20)]
    parts = split_batch(groups, max_tokens)
    assert sorted(itertools.chain(*parts)) == list(range(20))
    assert all(size(part) <= max_tokens or len(part) == 1 for part in parts)
    assert all(size(a + b[:1]) > max_tokens for a, b in zip(parts, parts[1:]))


def test_sample_is_the_distribution_of_the_model(model):
    """Frequencies of all responses of up to three tokens are their probabilities, for prompts of
    different lengths. A generation_config with other ideas is ignored (huggingface/trl#3029)."""
    n, tokenizer = 600, SimpleNamespace(stop_ids={0, 1})
    prompts = [[2], [3, 4, 2, 2, 3, 4], [4, 4, 3]]
    model.generation_config = hf.GenerationConfig(do_sample=True, top_k=1, temperature=0.1)
    space = [list(y) for k in (1, 2, 3) for y in itertools.product(range(5), repeat=k)
             if min(y[:-1], default=2) > 1 and (k == 3 or y[-1] < 2)]
    responses = sample(model, tokenizer, prompts * n, 3, seed=0, max_tokens=4000)
    assert all(response in space for response in responses)
    for k, prompt in enumerate(prompts):
        with torch.no_grad():
            p = response_logps(model, [(prompt, y) for y in space])[0].exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-4)
        counts, likely = v(*(responses[k::3].count(y) for y in space)), n * p > 1
        chi_squared = ((counts - n * p) ** 2 / (n * p))[likely].sum()
        degrees = likely.sum()
        assert chi_squared < degrees + 5 * (2 * degrees) ** 0.5
    again, other = (sample(model, tokenizer, prompts * 9, 3, seed=seed) for seed in (0, 1))
    assert again == sample(model, tokenizer, prompts * 9, 3, seed=0) != other
    cold = sample(model, tokenizer, prompts[:1] * 20, 3, seed=0, temperature=1e-4)
    assert cold == cold[:1] * 20
