"""Train, export, serve, query and measure ToMoE on a real model of 135M parameters. Run: make demo

Everything is written to ./demo. The dense model is fetched once; a second run reuses it. Speed is measured with `tomoe
bench`, engine against engine; its baseline on CPUs is the dense model with the RMSNorm kernel that ToMoE runs, and the
dense model as vLLM ships it is shown beside it. On a GPU everything runs in bfloat16, and the servers are compiled and
use CUDA graphs (never run there so far). The last line on standard output is one JSON object with all figures.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from openai import OpenAI
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from tomoe_vllm.diagnostics.bench.setup import DTYPES, MAX_SHARE, choose_device

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SHIPPED_ADAPTER = ROOT / "adapters" / "smollm2-135m-p70"
ACTIVE_RATIO = 0.7
COLD_STEPS, RESUMED_STEPS = 150, 20
QUESTION = "What is the capital of France?"
PARITY_PROMPTS = [
    "The import statement searches for the named module",
    "Water boils at",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a king who",
]
START_LIMIT_S = 600
SERVE_OPTIONS = {
    "cpu": ["--dtype", DTYPES["cpu"], "--enforce-eager"],
    "cuda": ["--dtype", DTYPES["cuda"], "--gpu-memory-utilization", str(MAX_SHARE)],  # as tomoe bench later
}
"""By the device that vLLM runs on."""
# All cores for the model, and a small KV cache, so that the demo fits on small machines.
SERVE_ENVIRONMENT = {"cpu": {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}, "cuda": {}}

console = Console(stderr=True)


def run(*command: str) -> dict:
    """Run a ``tomoe`` command, with its progress on standard error; returns its JSON line."""
    console.print(f"$ tomoe {' '.join(command)}".replace(f"{ROOT}/", ""), style="bold", highlight=False)
    result = subprocess.run([BIN / "tomoe", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if result.returncode:
        sys.exit(result.returncode)
    return json.loads(result.stdout.splitlines()[-1])


@contextlib.contextmanager
def serve(folder: Path, log: Path, device: str):
    """Run ``vllm serve`` on a free loopback port; yields the process and its address, and stops it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        BIN / "vllm", "serve", folder, "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", folder.name, "--max-model-len", "1024", *SERVE_OPTIONS[device],
    ]  # fmt: skip
    environment = os.environ | SERVE_ENVIRONMENT[device]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """Stop the server and its engine processes, which share a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_ready(process: subprocess.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the server ended with code {process.returncode}; its log ends:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{address}/health", timeout=2)
            return
        time.sleep(1)
    sys.exit(f"the server was not ready after {START_LIMIT_S} s; see {log}")


@torch.inference_mode()
def parity(folder: Path, client: OpenAI, device: str) -> float:
    """Largest difference of prompt logprobs between the Hugging Face reference and the server, both in one dtype."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=DTYPES[device])
    model = model.eval().to(device)
    worst = 0.0
    for prompt in PARITY_PROMPTS:
        ids = tokenizer(prompt).input_ids
        expected = torch.log_softmax(model(torch.tensor([ids], device=device)).logits[0].float(), dim=-1).cpu()
        reply = client.completions.create(
            model=folder.name, prompt=ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        served = reply.choices[0].prompt_logprobs[1:]
        for position, entry in enumerate(served):
            token = ids[position + 1]
            worst = max(worst, abs(entry[str(token)]["logprob"] - expected[position, token].item()))
    return worst


def train_and_export(model: Path, text: Path, adapter: Path, checkpoint: Path, is_resumed: bool) -> dict:
    """Train an adapter for ``model`` and export the checkpoint; returns the facts of the training run."""
    settings = ["sequence_length=512", "batch_size=2", "self_tokens=4096", "schedule=linear", "beta=0.2"]
    if is_resumed:
        settings += [f"init_adapter={SHIPPED_ADAPTER}", "learning_rate=2e-4", "warmup_steps=5"]
    trained = run(
        "train", "--base", str(model), "--data", str(text), "self", "--active-ratio", str(ACTIVE_RATIO),
        "--steps", str(RESUMED_STEPS if is_resumed else COLD_STEPS), "--out", str(adapter),
        *(f"--set={setting}" for setting in settings),
    )  # fmt: skip
    shutil.rmtree(checkpoint, ignore_errors=True)
    run("export", "--base", str(model), "--adapter", str(adapter), "--out", str(checkpoint))
    return trained


def query(checkpoint: Path, log: Path, device: str) -> tuple[str, float]:
    """Serve the checkpoint with ``vllm serve``; returns its answer to QUESTION and its :func:`parity`."""
    options = " ".join(["--trust-remote-code", *SERVE_OPTIONS[device]])
    console.print(f"$ vllm serve {checkpoint.name} {options}", style="bold", highlight=False)
    with serve(checkpoint, log, device) as (process, address):
        wait_until_ready(process, address, log)
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        reply = client.chat.completions.create(
            model=checkpoint.name, messages=[{"role": "user", "content": QUESTION}], max_tokens=48, temperature=0
        )
        return reply.choices[0].message.content, parity(checkpoint, client, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "demo")
    parser.add_argument("--cold", action="store_true", help="train from a warm start, not from the shipped adapter")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as for Ctrl-C, so that the server is stopped
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model, adapter, checkpoint = folder / "smollm2", folder / "adapter", folder / "smollm2-tomoe"
    train_text, held_out = folder / "train.txt", folder / "held-out.txt"

    if not model.exists():
        run("demo-model", "--out", str(model))
    from tomoe_training.demo_model import write_demo_text

    write_demo_text(train_text, held_out)
    is_resumed = SHIPPED_ADAPTER.is_dir() and not arguments.cold
    trained = train_and_export(model, train_text, adapter, checkpoint, is_resumed)
    facts = run("inspect", str(checkpoint))
    dense_ppl, tomoe_ppl = (
        run("eval", "ppl", "--model", str(path), "--text", str(held_out), "--max-blocks", "12")["ppl"]
        for path in (model, checkpoint)
    )
    device = choose_device(None)
    answer, difference = query(checkpoint, folder / f"serve-{checkpoint.name}.log", device)
    speed = run("bench", "--only", "decode", "--model", str(model), "--tomoe", str(checkpoint))
    result = {
        "dense_ppl": round(dense_ppl, 3),
        "tomoe_ppl": round(tomoe_ppl, 3),
        "active_ratio": facts["active_ratio"],
        "train_steps": trained["steps"],
        "train_seconds": trained["seconds"],
        "resumed_from_shipped_adapter": is_resumed,
        "parity_max_logprob_diff": difference,
        "answer": answer,
        "device": device,
        "dtype": speed["dtype"],
        "baseline": speed["baseline"],
        "decode": speed["decode"],
    }
    print_table(result)
    print(json.dumps(result))


def print_table(result: dict) -> None:
    table = Table(title=f"SmolLM2-135M-Instruct, dense and ToMoE at {ACTIVE_RATIO:.0%} active")
    has_own_norm = result["device"] == "cpu"
    for column in ("", "dense", "ToMoE", "x", *(["dense, vLLM's own norm"] if has_own_norm else [])):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("active block parameters", "100 %", f"{result['active_ratio']:.1%}")
    table.add_row("perplexity, held-out text", f"{result['dense_ppl']:.2f}", f"{result['tomoe_ppl']:.2f}")
    for row in result["decode"]:
        names = ["dense", "tomoe", *(["dense_as_shipped"] if has_own_norm else [])]
        dense, tomoe, *shipped = (f"{row['tokens_per_s'][name]['median']:.1f}" for name in names)
        table.add_row(f"decode, tokens/s, batch {row['batch']}", dense, tomoe, f"{row['ratio']:.2f}", *shipped)
    console.print(table)
    console.print(f"x: ToMoE relative to {result['baseline']}, in {result['dtype']}", highlight=False)
    if has_own_norm:
        console.print("vLLM's own norm is plain torch on CPUs")
    paths = dict.fromkeys(row["path"] for row in result["decode"])
    console.print(f"execution path of ToMoE's MLP: {', '.join(paths)}", highlight=False)
    start = "the shipped adapter" if result["resumed_from_shipped_adapter"] else "a warm start"
    console.print(f"trained {result['train_steps']} steps in {result['train_seconds']:.0f} s, from {start}")
    console.print(f"largest difference of logprobs, server and reference: {result['parity_max_logprob_diff']:.1e}")
    console.print(f"question: {QUESTION}\nanswer:   {result['answer']}", highlight=False)


if __name__ == "__main__":
    main()
