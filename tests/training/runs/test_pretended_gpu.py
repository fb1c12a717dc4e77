"""Training commands under the rules of a GPU: nothing mixes devices, and a training step does not wait."""

import dataclasses
import json
import math

import pytest
import tomoe_training.trainer
import torch
from tomoe_training.artifacts.adapter import Adapter
from tomoe_training.artifacts.export import export_checkpoint
from tomoe_training.artifacts.inspection import inspect
from tomoe_training.budget import NUM_QUANTILES, LayerLogits, solve_widths
from tomoe_training.config import FinetuneConfig, load_run_config
from tomoe_training.evaluation.compare import METHODS
from tomoe_training.evaluation.perplexity import evaluate_perplexity
from tomoe_training.finetune import finetune
from tomoe_training.trainer import train

from tests.helpers.dense_models import random_text, save_dense_model
from tests.helpers.pretended_gpu import pretended_gpu, record_synchronizations
from tests.helpers.processes import environment, python
from tests.helpers.runs import SETTINGS, assert_identical, assignments, interrupt, largest_difference, metrics
from tests.helpers.servers import free_port
from tomoe_vllm.hf.tomoe_math import BlockShape

pytestmark = pytest.mark.process  # compiles the device on first use


@pytest.fixture(scope="module")
def text_of_2_blocks(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "few.txt"
    file.write_text(random_text(300))
    return file


VARIANTS = {
    "default": {},
    "clipping": {"max_grad_norm": 1.0},
    "noise": {"mask_noise": 1.0, "router_noise": 1.0},
    "recomputed activations, two passes": {"gradient_checkpointing": True, "micro_batch_size": 1},
    "static V/O, language model": {"vo_mode": "static", "objective": "lm"},
    "penalty": {"budget": "penalty"},
    "cold start": {"warm_start_tokens": 0},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_training_gives_the_adapter_of_the_cpu_and_waits_once_per_log(fields, config, tmp_path, monkeypatch):
    fields = fields | {"steps": 8, "log_every": 3, "checkpoint_every": 100, "widths_every": 0}
    counts, step = [], tomoe_training.trainer._Run._step

    def counted(*arguments):
        counts.append(len(found))
        step(*arguments)

    monkeypatch.setattr(tomoe_training.trainer._Run, "_step", counted)
    with pretended_gpu(), record_synchronizations() as found:
        train(config(**fields), tmp_path / "gpu")
    within = dataclasses.replace(found, items=found.items[counts[0] : counts[-1]])
    assert len(within) == 2, str(within)  # the logs of steps 3 and 6
    counts.clear()
    train(config(**fields), tmp_path / "cpu")
    assert len(metrics(tmp_path / "gpu")) == len(metrics(tmp_path / "cpu")) == 3
    if "mask_noise" in fields:
        return  # a GPU draws its noise itself
    assert largest_difference(tmp_path / "gpu", tmp_path / "cpu") < 1e-2
    for mine, theirs in zip(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_a_resumed_run_ends_with_the_same_bits(gpu, config, tmp_path):
    interrupt(config(mask_noise=1.0), tmp_path / "killed")
    state = torch.load(tmp_path / "killed" / "run" / "checkpoint.pt", map_location=gpu, weights_only=True)
    assert all(value.device == gpu for value in state["student"].values())
    assert train(config(mask_noise=1.0), tmp_path / "killed")["resumed_from"] == 2
    train(config(mask_noise=1.0), tmp_path / "whole")
    assert_identical(tmp_path / "killed", tmp_path / "whole")


def test_widths_are_solved_with_one_copy_of_each_tensor(gpu):
    shape = BlockShape(
        hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=16, intermediate_size=128,
        num_mlp_matrices=3,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    sizes = {"experts": (4, 128), "query_key": (8,), "value": (NUM_QUANTILES,)}
    layers = [{name: torch.randn(size, generator=generator) for name, size in sizes.items()} for _ in range(3)]
    on_gpu = [LayerLogits(**{name: tensor.to(gpu) for name, tensor in layer.items()}) for layer in layers]
    options = {"width_multiple": 8, "head_dim_multiple": 4}
    with record_synchronizations() as found:
        widths = solve_widths(on_gpu, shape, 0.5, **options)
    assert len(found) == 9, str(found)
    assert widths == solve_widths([LayerLogits(**layer) for layer in layers], shape, 0.5, **options)


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory):
    """What ``tests.helpers.two_gpus`` found in each process, its folder and its settings."""
    folder = tmp_path_factory.mktemp("two")
    save_dense_model(folder / "base", "llama", num_hidden_layers=6, intermediate_size=256)
    (folder / "text.txt").write_text(random_text(6_000))
    settings = SETTINGS | {"base": str(folder / "base"), "data": [str(folder / "text.txt")], "steps": 5}
    settings |= {"mask_noise": 1.0, "router_noise": 1.0}
    result = python(
        "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(),
        "-m", "tests.helpers.two_gpus", json.dumps(settings), folder, env=environment(GLOO_SOCKET_IFNAME="lo"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], folder, settings


@pytest.mark.parametrize("name", ["copies", "sharded"])
def test_two_gpus_train_the_adapter_of_one(name, two_gpus, gpu, tmp_path):
    """Also where the run of two was killed and resumed. NCCL has no backend for CPU tensors, nor has its stand-in."""
    found, folder, settings = two_gpus
    assert [rank["resumed_from"] for rank in found] == [2, 2]
    train(load_run_config(None, settings, []), tmp_path / "one")
    assert largest_difference(folder / name, tmp_path / "one") < 1e-5
    for two, one in zip(metrics(folder / name), metrics(tmp_path / "one"), strict=True):
        assert [two[k] for k in ("step", "task", "r_l", "r_u")] == pytest.approx(
            [one[k] for k in ("step", "task", "r_l", "r_u")], abs=2e-5
        )
    export_checkpoint(folder / "base", folder / name, tmp_path / "model", width_multiple=8, head_dim_multiple=4)
    assert inspect(tmp_path / "model")["kind"] == "checkpoint"


def test_a_gpu_holds_its_share_of_the_base_and_one_layer(two_gpus):
    for rank in two_gpus[0]:
        whole, shared = rank["copies_memory"], rank["sharded_memory"]
        assert whole["held_after"] >= whole["layers"] + whole["others"]
        share = shared["others"] + shared["layers"] // 2
        assert share <= shared["held_after"] <= share + 10_000
        assert shared["loading"] <= share + 10_000
        assert shared["computing"] <= share + shared["largest_layer"] + 50_000


def test_text_is_sampled_from_the_model_on_the_gpu(gpu, config, tmp_path):
    summary = train(config(data=["self"], self_tokens=600, steps=2), tmp_path / "out")
    assert summary["data"] == ["self"]


def test_an_adapter_is_trained_further(gpu, config, adapter_folder, tmp_path):
    train(config(init_adapter=str(adapter_folder()), warm_start_tokens=0, steps=2), tmp_path / "out")
    assert Adapter.load(tmp_path / "out").config.num_experts == 4


@pytest.fixture
def checkpoint(dense_folder, adapter_folder, tmp_path):
    export_checkpoint(dense_folder(), adapter_folder(), tmp_path / "model", width_multiple=8, head_dim_multiple=4)
    return tmp_path / "model"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_fine_tuning_runs_on_the_gpu(method, gpu, checkpoint, text_file, tmp_path):
    settings = FinetuneConfig(data=[str(text_file)], method=method, sequence_length=32, batch_size=2, steps=3)
    torch.gpu.reset_peak_memory_stats()
    facts = finetune(checkpoint, settings, tmp_path / "tuned")
    assert math.isfinite(facts["final_loss"])
    assert torch.gpu.max_memory_allocated() > 100_000


def test_perplexity_is_measured_on_the_gpu(gpu, checkpoint, dense_folder, text_of_2_blocks):
    for folder in (checkpoint, dense_folder()):
        torch.gpu.reset_peak_memory_stats()
        options = {"block_size": 64, "max_blocks": 2, "dtype": "float32"}
        facts = evaluate_perplexity(folder, text_of_2_blocks, **options)
        assert torch.gpu.max_memory_allocated() > 100_000
    torch.gpu.reset_peak_memory_stats()
    with record_synchronizations() as found:
        evaluate_perplexity(dense_folder(), text_of_2_blocks, **options)
    assert found.operators.count("aten::_local_scalar_dense") <= 2 + 2, str(found)
    assert math.isfinite(facts["ppl"])


def test_all_baselines_are_compared_on_the_gpu(gpu, config, run_cli, text_file):
    arguments = ["eval", "compare", *assignments(config(), steps=3), "--text", text_file, "--active-ratio", 0.6]
    code, out, err = run_cli(*arguments, "--block-size", 64, "--max-blocks", 2)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["method"] for row in rows] == ["dense", *METHODS]
    assert all(math.isfinite(row["ppl"]) for row in rows)
