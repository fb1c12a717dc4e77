"""The whole path on a real 135M model: dense, trained, exported, served, asked, measured. Run: make demo

Everything is written below ./demo. What is already there is not made again, so a second run is short.
The last line on standard output is one JSON object with the figures.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
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
DECODE_TOKENS, DECODE_ROUNDS = 64, 5
START_LIMIT_S = 600

console = Console(stderr=True)


def run(*command: str) -> dict:
    """Run a command of the project, its progress on standard error; returns its JSON line."""
    console.print(f"$ tomoe {' '.join(command)}".replace(f"{ROOT}/", ""), style="bold", highlight=False)
    result = subprocess.run([BIN / "tomoe", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if result.returncode:
        sys.exit(result.returncode)
    return json.loads(result.stdout.splitlines()[-1])


@contextlib.contextmanager
def serve(folder: Path, log: Path):
    """``vllm serve`` on a free loopback port; yields its address. Stopped whatever happens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        BIN / "vllm", "serve", folder, "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", folder.name, "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
    ]  # fmt: skip
    # Both cores for the model, and a small KV cache: two servers run side by side here.
    environment = os.environ | {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """End the server and its engine processes: they share the process group made for them."""
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


def decode_rates(clients: dict[str, OpenAI]) -> dict[str, list[float]]:
    """Tokens per second of one stream, the models in turn, so that noise hits them alike."""
    rates: dict[str, list[float]] = {name: [] for name in clients}
    for round_ in range(DECODE_ROUNDS + 1):
        for name, client in clients.items():
            stamps = [
                time.perf_counter()
                for chunk in client.completions.create(
                    model=name, prompt="The history of", max_tokens=DECODE_TOKENS, temperature=0, stream=True,
                    extra_body={"ignore_eos": True},
                )
                if chunk.choices
            ]  # fmt: skip
            if round_:  # the first warms up
                rates[name].append((len(stamps) - 1) / (stamps[-1] - stamps[0]))
    return rates


@torch.inference_mode()
def parity(folder: Path, client: OpenAI) -> float:
    """Largest difference of prompt logprobs between the Hugging Face reference and the server."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    worst = 0.0
    for prompt in PARITY_PROMPTS:
        ids = tokenizer(prompt).input_ids
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
        reply = client.completions.create(
            model=folder.name, prompt=ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        served = reply.choices[0].prompt_logprobs[1:]
        for position, entry in enumerate(served):
            token = ids[position + 1]
            worst = max(worst, abs(entry[str(token)]["logprob"] - expected[position, token].item()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "demo")
    parser.add_argument("--cold", action="store_true", help="train from nothing, not from the shipped adapter")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: leave by the exits that stop the servers
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model, adapter, checkpoint = folder / "smollm2", folder / "adapter", folder / "smollm2-tomoe"
    train_text, held_out = folder / "train.txt", folder / "held-out.txt"

    if not model.exists():
        run("demo-model", "--out", str(model))
    from tomoe_training.demo_model import write_demo_text

    write_demo_text(train_text, held_out)
    is_resumed = SHIPPED_ADAPTER.is_dir() and not arguments.cold
    settings = ["sequence_length=512", "batch_size=2", "self_tokens=4096", "schedule=linear", "beta=0.2"]
    if is_resumed:
        settings += [f"init_adapter={SHIPPED_ADAPTER}", "learning_rate=2e-4", "warmup_steps=5"]
    trained = run(
        "train", "--base", str(model), "--data", str(train_text), "self", "--active-ratio", str(ACTIVE_RATIO),
        "--steps", str(RESUMED_STEPS if is_resumed else COLD_STEPS), "--out", str(adapter),
        *(f"--set={setting}" for setting in settings),
    )  # fmt: skip
    shutil.rmtree(checkpoint, ignore_errors=True)
    run("export", "--base", str(model), "--adapter", str(adapter), "--out", str(checkpoint))
    facts = run("inspect", str(checkpoint))
    quality = {
        path: run("eval", "ppl", "--model", str(path), "--text", str(held_out), "--max-blocks", "12")["ppl"]
        for path in (model, checkpoint)
    }

    console.print(f"$ vllm serve {checkpoint.name} --trust-remote-code   (and the dense model beside it)", style="bold")
    with contextlib.ExitStack() as stack:
        logs = {path: folder / f"serve-{path.name}.log" for path in (model, checkpoint)}
        servers = {path: stack.enter_context(serve(path, log)) for path, log in logs.items()}
        for path, (process, address) in servers.items():
            wait_until_ready(process, address, logs[path])
        clients = {path.name: OpenAI(base_url=f"{a}/v1", api_key="none") for path, (_, a) in servers.items()}
        client = clients[checkpoint.name]
        reply = client.chat.completions.create(
            model=checkpoint.name, messages=[{"role": "user", "content": QUESTION}], max_tokens=48, temperature=0
        )
        answer = reply.choices[0].message.content
        rates = decode_rates(clients)
        difference = parity(checkpoint, client)

    speed = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "dense_ppl": round(quality[model], 3),
        "tomoe_ppl": round(quality[checkpoint], 3),
        "active_ratio": facts["active_ratio"],
        "train_steps": trained["steps"],
        "train_seconds": trained["seconds"],
        "resumed_from_shipped_adapter": is_resumed,
        "parity_max_logprob_diff": difference,
        "answer": answer,
        "decode_tokens_per_s_dense": round(speed[model.name], 2),
        "decode_tokens_per_s_tomoe": round(speed[checkpoint.name], 2),
    }
    print_table(result)
    print(json.dumps(result))


def print_table(result: dict) -> None:
    table = Table(title=f"SmolLM2-135M-Instruct, dense and ToMoE at {ACTIVE_RATIO:.0%} active")
    for column in ("", "dense", "ToMoE"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("active block parameters", "100 %", f"{result['active_ratio']:.1%}")
    table.add_row("perplexity, held-out text", f"{result['dense_ppl']:.2f}", f"{result['tomoe_ppl']:.2f}")
    table.add_row(
        "decode, tokens/s, one stream",
        f"{result['decode_tokens_per_s_dense']:.1f}",
        f"{result['decode_tokens_per_s_tomoe']:.1f}",
    )
    console.print(table)
    start = "the shipped adapter" if result["resumed_from_shipped_adapter"] else "a warm start"
    console.print(f"trained {result['train_steps']} steps in {result['train_seconds']:.0f} s, from {start}")
    console.print(f"server and reference differ by {result['parity_max_logprob_diff']:.1e} at most (logprobs)")
    console.print(f"asked:    {QUESTION}\nanswered: {result['answer']}", highlight=False)


if __name__ == "__main__":
    main()
