#!/usr/bin/env bash
# All benchmarks on a GPU: at most eight minutes on one card.
#
#     pip install trl==1.16.0 liger-kernel pytest    # what of these is missing is left out
#     bash benchmarks/gpu.sh                         # writes runs/gpu/gpu.json
#     python docs/measure.py --pages                 # writes its tables into docs/performance.md
#
#     bash benchmarks/gpu.sh cpu     # the same in small sizes, to try it without a GPU: cpu.json
#
# PYTHON is the interpreter, "python" if it is not set. A command that fails, or that the eight
# minutes do not suffice for, is named at the end, and the tables of the others are kept.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python}
device=${1:-cuda}
limit=480
failed=()

if [ "$device" = cuda ]; then
    if ! "$PYTHON" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null; then
        echo "error: torch sees no CUDA device; to try this script without one: bash $0 cpu" >&2
        exit 2
    fi
    json=runs/gpu/gpu.json
    gpt2='"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257'
    qwen='"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864,
          "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936'
    step="--pairs 16 --rounds 5" rollout="--prompts 64"
    gather_gpt2="--D 768 --V 50257" gather_qwen="--D 896 --V 151936"
elif [ "$device" = cpu ]; then
    json=runs/gpu/cpu.json limit=3600  # a slow CPU shall not end the trial early
    gpt2='"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50257'
    qwen='"hidden_size": 28, "num_hidden_layers": 2, "intermediate_size": 152,
          "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 50257'
    step="--pairs 1 --rounds 1" rollout="--prompts 2 --max_new_tokens 4 --rounds 1"
    gather_gpt2="--N 512 --D 32 --V 500 --rounds 1" gather_qwen="--N 512 --D 28 --V 900 --rounds 1"
else
    echo "usage: bash $0 [cpu]" >&2
    exit 2
fi

end=$((SECONDS + limit))

# The shapes of GPT-2 small and Qwen2.5-0.5B. Weights are random, so a config is all that is needed.
mkdir -p runs/gpu/gpt2 runs/gpu/qwen
rm -f "$json"
echo "{\"model_type\": \"gpt2\", $gpt2}" > runs/gpu/gpt2/config.json
echo "{\"model_type\": \"qwen2\", $qwen, \"tie_word_embeddings\": true}" > runs/gpu/qwen/config.json

attempt() {  # a command, for as long as there is time
    printf '\n== python %s   (%d s are left)\n' "$*" $((end - SECONDS))
    if [ $SECONDS -ge $end ] || ! timeout $((end - SECONDS)) "$PYTHON" "$@"; then
        failed+=("python $*")
    fi
}

if "$PYTHON" -c "import pytest" 2>/dev/null; then
    attempt -m pytest -k cuda tests/test_gather.py tests/test_model.py tests/test_wiring.py
fi
common="--device $device --json $json"  # flags without quotes below: each is several words
for shape in gpt2 qwen; do
    for case in "trl as shipped" "liger +ref" "trl"; do  # one at a time: if one fails, others stay
        attempt benchmarks/dpo_step.py --cases "$case" --model runs/gpu/$shape $step $common
    done
done
attempt benchmarks/gather.py $gather_gpt2 $common
attempt benchmarks/rollout.py $rollout $common
attempt benchmarks/gather.py $gather_qwen $common

echo
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed, or not reached in time: %s\n' "${failed[@]}"
fi
[ -f "$json" ] && echo "The tables are in $json."
[ ${#failed[@]} -eq 0 ]
