"""What the decoder's norm costs on this CPU. Run: python benchmarks/norms.py

RMSNorm with a residual: in plain torch, as vLLM runs it on CPUs, and by vLLM's compiled kernel, as ``layers/norm.py``
runs it. Calls are interleaved. Prints medians in microseconds; the last line is JSON.
"""

import json
import sys

import torch
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm

from tomoe_vllm.diagnostics.bench.measure import interleave, summary
from tomoe_vllm.layers.norm import ToMoERMSNorm

HIDDEN_SIZES = (576, 2048)
NUM_TOKENS = (1, 16, 64, 1024)


def main() -> None:
    rows = []
    for hidden_size in HIDDEN_SIZES:
        norms = {"plain": RMSNorm(hidden_size), "compiled": ToMoERMSNorm(hidden_size)}
        for num_tokens in NUM_TOKENS:
            x, residual = torch.randn(num_tokens, hidden_size), torch.randn(num_tokens, hidden_size)
            calls = {name: lambda norm=norm, x=x, residual=residual: norm(x, residual) for name, norm in norms.items()}
            samples = interleave(calls, rounds=200, warm_up=20)
            row = {name: summary(values, 1e6) for name, values in samples.items()}
            rows.append({"hidden_size": hidden_size, "num_tokens": num_tokens, "us": row})
            ratio = row["plain"]["median"] / row["compiled"]["median"]
            parts = ", ".join(f"{name} {value['median']:.0f} us" for name, value in row.items())
            print(f"{hidden_size} wide, {num_tokens} tokens: {parts} ({ratio:.1f} x)", file=sys.stderr)
    print(json.dumps({"num_threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"]))):
        main()
