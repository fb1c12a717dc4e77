"""Jobs of the part "training": a few steps of a small model on the device, beside the same on the CPU.

``training steps`` needs torch, transformers and pydantic only: warm start, steps with the objective of ``tomoe train``,
export, and the perplexity of the exported model. The ``tomoe train`` jobs run the whole command where accelerate is
installed.
"""

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tomoe_vllm.diagnostics.full.plan import Job, Options
from tomoe_vllm.diagnostics.full.report import DONE, FAILED, PASSED, NotRunError, Result

LOSS_LIMIT = 0.02
"""Limit of the relative difference of losses and perplexities. Sums in another order move a loss by 1e-5; a warm start
that clusters a few tokens differently moves it by up to 1 %."""
SETTINGS: dict[str, Any] = {"num_experts": 4, "value_router_dim": 32, "width_multiple": 16, "head_dim_multiple": 8}
VOCABULARY, LENGTH, BATCH, STEPS, WARM_START_BLOCKS = 512, 64, 4, 6, 8


def run(job: Job, options: Options) -> Iterator[Result]:
    """The result of one job."""
    scratch = Path(options.scratch)
    for package in ("pydantic", *(() if job.kind == "training steps" else ("accelerate", "datasets"))):
        if find_spec(package) is None:
            raise NotRunError(f"{package} is not installed")
    if job.kind != "train on cpu" and not options.interpret and not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU in this process")
    base = scratch / "training-base"
    if not base.exists():
        write_base(base)
    torch.set_num_threads(1)  # for tensors of this size more threads only wait for each other
    if job.kind == "training steps":
        on_cpu = smoke_run(base, scratch / "steps-cpu", "cpu")
        yield compare(job, on_cpu, smoke_run(base, scratch / "steps-device", _device()))
        return
    losses = train(base, scratch / job.kind.replace(" ", "-"))
    file = scratch / "cpu-losses.json"
    if job.kind == "train on cpu":
        file.write_text(json.dumps(losses))
        yield Result(part=job.part, name=job.name, status=DONE, values={"cpu": {"losses": losses}})
    elif not file.exists():
        raise NotRunError("there are no losses of the CPU to compare with")
    else:
        yield compare(job, {"losses": json.loads(file.read_text())}, {"losses": losses})


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def compare(job: Job, on_cpu: dict[str, Any], on_device: dict[str, Any]) -> Result:
    """Whether losses (and perplexity) agree."""
    expected = [*on_cpu["losses"], *([on_cpu["perplexity"]] if "perplexity" in on_cpu else [])]
    actual = [*on_device["losses"], *([on_device["perplexity"]] if "perplexity" in on_device else [])]
    differences = [abs(a - e) / abs(e) for a, e in zip(actual, expected, strict=True)]
    difference = max(differences) if all(map(math.isfinite, differences)) else math.inf
    agrees = difference <= LOSS_LIMIT
    return Result(
        part=job.part,
        name=job.name,
        status=PASSED if agrees else FAILED,
        reason=None if agrees else f"losses differ by {difference:.1%} of the CPU's (limit {LOSS_LIMIT:.0%})",
        values={"cpu": on_cpu, "device": on_device, "device_type": _device(), "relative_difference": difference},
    )


def tokens(num_blocks: int, seed: int) -> Tensor:
    """Blocks of a text in which each token depends on the one before it: [num_blocks, LENGTH] int64."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 8, (num_blocks, LENGTH), generator=generator)
    return 2 + steps.cumsum(dim=1) % (VOCABULARY - 2)


def write_base(folder: Path) -> None:
    """Write a random LLaMA of 2 M parameters with a tokenizer of one token per word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,  # large enough for masks to matter
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="</s>"
    ).save_pretrained(folder)
    text = tokens(STEPS * BATCH + WARM_START_BLOCKS, seed=0)
    (folder / "text.txt").write_text("\n".join(" ".join(f"w{i}" for i in block) for block in text.tolist()))


def smoke_run(base_folder: Path, out: Path, device: str) -> dict[str, Any]:
    """Warm start and :data:`STEPS` steps on ``device``; losses, and perplexity of the exported model."""
    from tomoe_training.artifacts.adapter import Adapter, AdapterConfig
    from tomoe_training.artifacts.export import export_checkpoint
    from tomoe_training.artifacts.safetensors_io import fingerprint
    from tomoe_training.config import MethodSettings
    from tomoe_training.evaluation.perplexity import load_model, negative_log_likelihoods, perplexity_from
    from tomoe_training.method.student import Student
    from tomoe_training.warm_start.initialization import warm_start

    settings = MethodSettings(**SETTINGS)
    torch.manual_seed(0)
    student = Student(load_model(base_folder).to(device), settings).to(device)
    first = tokens(WARM_START_BLOCKS, seed=1).to(device)
    warm_start(student, list(first.split(1)))
    student.calibrate(first[:4])
    student.update_widths()
    student.freeze_widths()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    losses = []
    for step in range(STEPS):
        loss = student(tokens(BATCH, seed=2 + step).to(device))["loss"]
        loss.backward()
        student.update_quantiles()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    adapter = AdapterConfig(
        base_model_name=base_folder.name,
        base_model_hash=fingerprint(base_folder),
        base_model_type="llama",
        num_layers=student.base.config.num_hidden_layers,
        num_experts=settings.num_experts,
        value_router_dim=settings.value_router_dim,
        vo_mode=settings.vo_mode,
        active_ratio=settings.active_ratio,
        training={"steps": STEPS, "tokens": STEPS * BATCH * LENGTH, "data": ["random"]},
    )
    Adapter(config=adapter, layers=student.layer_adapters()).save(out / "adapter")
    multiples = {"width_multiple": settings.width_multiple, "head_dim_multiple": settings.head_dim_multiple}
    export_checkpoint(base_folder, out / "adapter", out / "model", **multiples)
    blocks = tokens(4, seed=100)
    nlls = list(negative_log_likelihoods(load_model(out / "model").to(device), blocks))
    return {"losses": losses, "perplexity": perplexity_from(nlls, blocks)}


def train(base: Path, out: Path) -> list[float]:
    """``tomoe train`` on the device that accelerate chooses; the losses of its steps."""
    from tomoe_training.config import RunConfig
    from tomoe_training.trainer import train as run_training

    config = RunConfig(
        **SETTINGS,
        base=str(base),
        data=[str(base / "text.txt")],
        steps=STEPS,
        sequence_length=LENGTH,
        batch_size=BATCH,
        warm_start_tokens=WARM_START_BLOCKS * LENGTH,
        dtype="float32",
        log_every=1,
        tensorboard=False,
    )
    run_training(config, out)
    rows = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]
