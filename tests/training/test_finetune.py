"""Fine-tuning under masks: MoE = pseudo-MoE before and after, gates untouched, the loss falls.

The mixture of experts is written out here: each token's expert computes with its own slices of the weights.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tomoe_training.artifacts.export import TOMOE_SHARD, export_checkpoint
from tomoe_training.artifacts.safetensors_io import fingerprint, stored_tensors
from tomoe_training.config import FinetuneConfig
from tomoe_training.data import InterleavedBlocks
from tomoe_training.evaluation.perplexity import load_model
from tomoe_training.finetune import block_linears, finetune, prepare, train_steps, updates_of, write_weights
from torch import nn

from tests.helpers.compare import assert_close, is_close
from tests.helpers.dense_models import FAMILIES, word_tokenizer
from tests.helpers.pretended_gpu import pretended_gpu, record_synchronizations
from tests.helpers.processes import environment, python
from tests.helpers.students import save_untrained_adapter
from tests.helpers.tiny_models import save_tiny_model

TINY = {"width_multiple": 8, "head_dim_multiple": 4}
IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(3))


class SlicedExperts(nn.Module):
    """An MLP as a real mixture of experts: slices of the weights, no mask anywhere."""

    def __init__(self, mlp, num_experts: int):
        super().__init__()
        self.mlp = [mlp]  # in a list: not a submodule
        rows = mlp.expert_gate.signature.tolist()
        self.kept = [[f for f, row in enumerate(rows) if row[e // 8] >> (e % 8) & 1] for e in range(num_experts)]

    def forward(self, x):
        (mlp,) = self.mlp
        tokens = x.flatten(0, -2)
        experts = (tokens.double() @ mlp.expert_gate.router.weight.double().T).argmax(-1)
        out = torch.full_like(tokens, torch.nan)
        for expert, kept in enumerate(self.kept):
            if hasattr(mlp, "fc1"):
                hidden = self._act(_slice(mlp.fc1, kept, tokens))
                result, down = hidden, mlp.fc2
            else:
                result = self._act(_slice(mlp.gate_proj, kept, tokens)) * _slice(mlp.up_proj, kept, tokens)
                down = mlp.down_proj
            result = result @ down.weight[:, kept].T + (0 if down.bias is None else down.bias)
            out[experts == expert] = result[experts == expert]
        return out.view_as(x)

    def _act(self, x):
        (mlp,) = self.mlp
        return (mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn)(x)


def _slice(linear, kept, x):
    return x @ linear.weight[kept].T + (0 if linear.bias is None else linear.bias[kept])


@torch.no_grad()
def _logits(model):
    return model(IDS, use_cache=False).logits


def assert_masked_equals_sliced(folder) -> torch.Tensor:
    model = load_model(folder)
    masked = _logits(model)
    for layer in model.model.layers:
        layer.mlp = SlicedExperts(layer.mlp, model.config.num_experts)
    assert_close(masked, _logits(model))
    return masked


@pytest.fixture
def checkpoint(dense_folder, adapter_folder, tmp_path):
    """``checkpoint(family)``: an exported checkpoint that the test may damage."""

    def make(family="llama"):
        out = tmp_path / f"checkpoint-{family}"
        export_checkpoint(dense_folder(family), adapter_folder(family), out, **TINY)
        word_tokenizer().save_pretrained(out)  # transformers makes a byte-level tokenizer of qwen2's base
        return out

    return make


@pytest.fixture
def settings(text_file):
    """``settings(**fields)``: six quick steps on the tiny models' text."""

    def make(**fields):
        defaults = {"steps": 6, "sequence_length": 32, "batch_size": 2, "learning_rate": 5e-3, "rank": 4, "alpha": 8}
        return FinetuneConfig(data=[str(text_file)], **(defaults | fields))

    return make


def _gates(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: t for name, t in load_file(file).items() if "head_gate" in name or "expert_gate" in name}
    return tensors


# ---------------------------------------------------------------------------------------- equivalence
@pytest.mark.parametrize(("family", "method"), [*((family, "lora") for family in FAMILIES), ("llama", "full")])
def test_experts_equal_the_masked_model_before_and_after(family, method, checkpoint, settings, tmp_path):
    source = checkpoint(family)
    before = assert_masked_equals_sliced(source)
    finetune(source, settings(method=method), tmp_path / "out")
    after = assert_masked_equals_sliced(tmp_path / "out")
    assert not is_close(after, before, limit=0.01)


def test_tolerance_catches_one_neuron_of_another_expert(checkpoint):
    model = load_model(checkpoint())
    masked = _logits(model)
    for layer in model.model.layers:
        layer.mlp = SlicedExperts(layer.mlp, model.config.num_experts)
        for kept in layer.mlp.kept:
            kept.pop()
    assert not is_close(masked, _logits(model))


def _with_random_lora(folder, config, *, leaves_gates_inside: bool = False):
    """The model as it is while training, with updates that matter on every linear."""
    model = load_model(folder)
    if leaves_gates_inside:
        model.attach_gates = lambda: None
    prepare(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_checkpoint_equals_the_model_while_training(family, checkpoint, settings, tmp_path):
    # Masks must act on what the low-rank parts read and add: hooks left on the inner linears would not.
    source = checkpoint(family)
    model = _with_random_lora(source, settings())
    shutil.copytree(source, tmp_path / "out", ignore=shutil.ignore_patterns("*.safetensors"))
    write_weights(stored_tensors(source), updates_of(model, "lora"), tmp_path / "out")
    assert_close(_logits(model), _logits(load_model(tmp_path / "out")))
    assert not is_close(_logits(model), _logits(load_model(source)), limit=0.05)


def test_tolerance_catches_gates_left_on_the_inner_linears(checkpoint, settings):
    source = checkpoint()
    wrong = _logits(_with_random_lora(source, settings(), leaves_gates_inside=True))
    assert not is_close(wrong, _logits(_with_random_lora(source, settings())), limit=0.01)


# ---------------------------------------------------------------------------------------------- output
@pytest.mark.parametrize("method", ["lora", "full"])
def test_loss_falls_and_gates_stay_byte_identical(method, checkpoint, settings, tmp_path):
    source, out = checkpoint(), tmp_path / "out"
    facts = finetune(source, settings(method=method, steps=100, learning_rate=2e-2), out)
    assert facts["final_loss"] < facts["first_loss"] - 0.3
    assert (out / TOMOE_SHARD).read_bytes() == (source / TOMOE_SHARD).read_bytes()
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    dense, trained = (load_file(folder / "model-dense.safetensors") for folder in (source, out))
    changed = {
        name.rpartition(".weight")[0].rpartition(".")[2] for name in dense if not dense[name].equal(trained[name])
    }
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert changed == (linears if method == "lora" else linears | norms | {"embed_tokens"})


def test_files_record_the_fine_tuning(checkpoint, settings, dense_folder, tmp_path):
    source, out = checkpoint(), tmp_path / "out"
    facts = finetune(source, settings(), out)
    (run,) = json.loads((out / "tomoe_provenance.json").read_text())["finetuning"]
    assert (run["steps"], run["method"], run["data"]) == (6, "lora", ["text.txt"])
    assert run["source_dense_hash"] == fingerprint(dense_folder())
    assert run["dense_hash"] == facts["dense_hash"] != run["source_dense_hash"]
    # The gates' origin stays what it was.
    assert json.loads((out / "config.json").read_text())["base_model_hash"] == fingerprint(dense_folder())
    card = (out / "README.md").read_text()
    assert "fine-tuned" in card
    assert run["dense_hash"] in card
    assert "unchanged" not in card
    assert "unchanged" in (source / "README.md").read_text()
    finetune(out, settings(steps=1), tmp_path / "again")
    runs = json.loads((tmp_path / "again" / "tomoe_provenance.json").read_text())["finetuning"]
    assert [r["steps"] for r in runs] == [6, 1]
    assert runs[1]["source_dense_hash"] == run["dense_hash"]


def test_same_seed_gives_the_same_bytes(checkpoint, settings, tmp_path):
    source = checkpoint()
    hashes = [
        finetune(source, settings(seed=seed), tmp_path / f"{i}")["dense_hash"] for i, seed in enumerate((1, 1, 2))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_stored_dtype_is_kept_and_source_unchanged(checkpoint, settings, tmp_path):
    source = checkpoint()
    half = {name: t.bfloat16() for name, t in load_file(source / "model-dense.safetensors").items()}
    save_file(half, source / "model-dense.safetensors", metadata={"format": "pt"})
    before = fingerprint(source)
    finetune(source, settings(), tmp_path / "out")
    assert fingerprint(source) == before
    assert {t.dtype for t in load_file(tmp_path / "out" / "model-dense.safetensors").values()} == {torch.bfloat16}


def test_gates_and_weights_in_one_file(settings, tmp_path):
    # As the reference model's own save_pretrained writes them.
    save_tiny_model(tmp_path / "one", "qwen2")
    word_tokenizer().save_pretrained(tmp_path / "one")
    finetune(tmp_path / "one", settings(), tmp_path / "out")
    before, after = _gates(tmp_path / "one"), _gates(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert_masked_equals_sliced(tmp_path / "out")


def test_linears_of_a_family_leave_out_the_gates(checkpoint):
    assert block_linears(load_model(checkpoint("phi"))) == ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]


@pytest.mark.engine
@pytest.mark.slow
def test_vllm_serves_the_fine_tuned_checkpoint(dense_folder, settings, text_file, tmp_path):
    base = dense_folder(hidden_size=128)  # head_dim 32: what vLLM's CPU attention takes
    save_untrained_adapter(tmp_path / "adapter", base)
    export_checkpoint(base, tmp_path / "adapter", tmp_path / "checkpoint", **TINY)
    finetune(tmp_path / "checkpoint", settings(steps=40, learning_rate=1e-2), tmp_path / "out")
    arguments = ("eval", "ppl", "--text", text_file, "--block-size", 64, "--max-blocks", 4, "--model")
    env = environment(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1")

    def perplexity(folder, *more):
        result = python("-m", "tomoe_vllm.cli", *arguments, folder, *more, env=env, timeout=900)
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.splitlines()[-1])["ppl"]

    tuned = perplexity(tmp_path / "out")
    assert perplexity(tmp_path / "out", "--backend", "vllm") == pytest.approx(tuned, rel=1e-4)
    # Far more than the two backends differ by: vLLM did not serve the weights from before.
    assert tuned < 0.9 * perplexity(tmp_path / "checkpoint")


def test_steps_wait_for_the_gpu_every_ten_steps_only(checkpoint, settings, text_file):
    run = settings(steps=12)
    with pretended_gpu() as device:
        model = load_model(checkpoint()).to(device)
        trained = prepare(model, run)
        blocks = InterleavedBlocks([torch.randint(3, 90, (40, 32))], seed=0)
        with record_synchronizations() as waits:
            assert len(train_steps(model, trained, blocks, run)) == 12
    assert len(waits) == 2, waits


# ---------------------------------------------------------------------------------------------- misuse
def test_command_ends_with_one_json_line(run_cli, checkpoint, text_file, tmp_path):
    code, out, err = run_cli(
        "finetune", "--model", checkpoint(), "--data", text_file, "--out", tmp_path / "out", "--steps", 2,
        "--sequence-length", 16, "--rank", 2, "--alpha", 4, "--learning-rate", 0.001, "--seed", 3,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["checkpoint"] == str(tmp_path / "out")
    assert "step 2/2: loss" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--method": "qlora"}, "'qlora' is not one of 'lora', 'full'"),
        ({"--rank": 0}, "rank is 0; it must be at least 1"),
        ({"--learning-rate": -1}, "learning_rate is -1.0; it must be greater than 0"),
        ({"--sequence-length": 100_000}, "is shorter than one block of 100000 tokens"),
        ({"--data": "/nowhere.txt"}, "no such data file: /nowhere.txt"),
    ],
)
def test_bad_option_is_one_line_without_output(options, message, run_cli, checkpoint, text_file, tmp_path):
    defaults = {"--model": checkpoint(), "--data": text_file, "--out": tmp_path / "out", "--steps": 1}
    code, out, err = run_cli("finetune", *(part for pair in (defaults | options).items() for part in pair))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.glob("out*"))


def test_dense_model_adapter_and_foreign_folder_are_refused(
    run_cli, checkpoint, dense_folder, adapter_folder, text_file, tmp_path
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for model, out, message in (
        (dense_folder(), "out", "is a dense llama model, not a ToMoE checkpoint"),
        (adapter_folder(), "out", "is an adapter; give the checkpoint that tomoe export wrote"),
        (tmp_path, "out", "is not a model folder: it has no config.json"),
        (checkpoint(), "full", "full already exists; choose another --out"),
    ):
        code, _, err = run_cli("finetune", "--model", model, "--data", text_file, "--out", tmp_path / out)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_non_finite_loss_stops_without_output(checkpoint, settings, tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step [2-6]; lower --learning-rate"):
        finetune(checkpoint(), settings(method="full", learning_rate=1e30), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
