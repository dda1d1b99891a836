"""The crowd of `make bench-gpu` (256 requests, 133,966 tokens out) through transformers' continuous batching.

`python -m tests.peers.transformers_crowd` where torch, transformers and a GPU are; `--toy` anywhere. Random weights of
the same shape, the same prompts and lengths, sampled at the same temperature. Its attention is PyTorch's own, or the
flash kernels where their package is installed.
"""

import argparse
import sys
import time

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

from service.bench.gpu import REAL, TOY, crowd_requests
from service.bench.on_device import DECODERS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.peers.transformers_crowd", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="sizes for a look at whether it runs")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds, after which what there is counts")
    options = parser.parse_args()
    sizes = TOY if options.toy else REAL
    config = Qwen3Config(**DECODERS[sizes.crowd_decoder], dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).eval()
    requests = crowd_requests(sizes, config.vocab_size)
    generation = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=-1, pad_token_id=0, max_new_tokens=8)
    with model.continuous_batching_context_manager(generation_config=generation, block=True, timeout=5) as manager:
        for request in requests[:2]:  # what is compiled and captured is not counted
            manager.add_request(request.prompt_ids[::-1], max_new_tokens=8)
        for _ in requests[:2]:
            manager.get_result(timeout=60)
        started = time.perf_counter()
        for request in requests:
            manager.add_request(request.prompt_ids, max_new_tokens=request.sampling.max_tokens, streaming=True)
        done, counts = 0, dict[str, int]()
        while done < len(requests) and time.perf_counter() - started < options.limit:
            result = manager.get_result(timeout=1)
            if result is not None:
                counts[result.request_id] = len(result.generated_tokens)
                done += result.is_finished()
        seconds = time.perf_counter() - started
    tokens, wanted = sum(counts.values()), sum(request.sampling.max_tokens for request in requests)
    sys.stdout.write(
        f"transformers, continuous batching, {model.config._attn_implementation}: {done} of {len(requests)} requests, "
        f"{tokens:,} of {wanted:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tok/s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
