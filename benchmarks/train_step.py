"""What does a training step cost, relative to its lower bound? Run: python benchmarks/train_step.py --base DIR

The lower bound is two dense forward passes (teacher and student) and one backward pass through frozen weights, lm_head
included, on the same batch. The student is warm-started on that batch, as in a training run, because dims that a layer
keeps whole are not masked. The two kinds of step alternate; figures are medians. The last line is JSON.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from tomoe_training.config import RunConfig
from tomoe_training.dtypes import has_fast_bfloat16
from tomoe_training.method.losses import distillation_loss
from tomoe_training.method.relaxation import NoiseSource
from tomoe_training.method.student import Student
from tomoe_training.process_setup import release_memory, tune_malloc
from tomoe_training.trainer import make_optimizer
from tomoe_training.warm_start.initialization import warm_start
from transformers import AutoModelForCausalLM


def dense_step(student: Student, ids: torch.Tensor) -> None:
    """Two dense forward passes and a backward pass down to the embeddings, with the same distillation loss."""
    student.set_gates(False)
    with torch.no_grad():
        teacher = student.hidden_states(ids)
    embeddings = student.base.get_input_embeddings()(ids).requires_grad_()
    hidden = student.base.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    distillation_loss(hidden.flatten(0, 1), teacher.flatten(0, 1), student.base.get_output_embeddings()).backward()


def tomoe_step(student: Student, ids: torch.Tensor, noise: NoiseSource, optimizer, step: int) -> None:
    """One step as in the trainer."""
    out = student(ids, noise.draw(step, list(range(len(ids))), ids.shape[1]))
    optimizer.zero_grad(set_to_none=True)
    out["loss"].backward()
    student.update_quantiles()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="dense model folder")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    tune_malloc()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if has_fast_bfloat16(torch.device("cpu")) else torch.float32
    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype).eval()
    config = RunConfig(active_ratio=0.5)
    student = Student(base, config)
    noise = NoiseSource.of(student, seed=0)
    ids = torch.randint(3, base.config.vocab_size, (arguments.batch_size, arguments.sequence_length))
    warm_start(student, [ids])
    student.calibrate(ids)
    student.freeze_widths()
    release_memory()
    optimizer = make_optimizer(config, student)
    seconds: dict[str, list[float]] = {"dense": [], "tomoe": []}
    for round_ in range(arguments.rounds + 1):
        for name, step in (
            ("dense", lambda: dense_step(student, ids)),
            ("tomoe", lambda n=round_: tomoe_step(student, ids, noise, optimizer, n)),
        ):
            start = time.perf_counter()
            step()
            if round_:  # round 0 warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "batch": list(ids.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "dense_step_s": round(medians["dense"], 3),
        "tomoe_step_s": round(medians["tomoe"], 3),
        "ratio": round(medians["tomoe"] / medians["dense"], 3),
        "spread_s": {name: [round(min(v), 3), round(max(v), 3)] for name, v in seconds.items()},
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    Console(stderr=True).print(
        f"lower bound (two dense forwards, one backward) {result['dense_step_s']} s, "
        f"ToMoE step {result['tomoe_step_s']} s ({result['ratio']} x); peak memory {result['peak_memory_gb']} GB"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
