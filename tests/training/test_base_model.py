"""Loading of the frozen base: the tensors that transformers loads, whole or as each process's share of the rows."""

import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from tomoe_training.artifacts.export import load_base_config
from tomoe_training.base_model import load_base, use_causal_attention
from transformers import AutoModelForCausalLM

from tests.helpers.dense_models import FAMILIES, save_dense_model
from tests.helpers.processes import environment, python

CPU = torch.device("cpu")


def _load(folder, dtype=torch.float32):
    return load_base(folder, load_base_config(folder), dtype, CPU, is_sharded=False)


def _tensors(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_the_one_that_transformers_loads(family, dtype, dense_folder):
    folder = dense_folder(family)
    mine, expected = _load(folder, dtype), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    assert _tensors(mine).keys() == _tensors(expected).keys()
    for name, tensor in _tensors(expected).items():  # rotary frequencies, which are in no file, are among them
        assert torch.equal(_tensors(mine)[name], tensor), name
        assert _tensors(mine)[name].dtype == tensor.dtype, name
    assert not mine.training
    assert not any(p.requires_grad for p in mine.parameters())
    assert mine.generation_config.to_dict() == expected.generation_config.to_dict()
    ids = torch.randint(3, 90, (2, 20))
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, expected(ids).logits)


def test_shards_of_a_checkpoint_are_read(tmp_path):
    save_dense_model(tmp_path, "mistral", max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_load(tmp_path).model.layers[1].mlp.up_proj.weight, expected.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_damaged_checkpoint_is_one_clear_error(fault, dense_folder, tmp_path):
    folder, name = shutil.copytree(dense_folder(), tmp_path / "base"), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name][1:].clone()
    if fault == "missing":
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expected = "lacks the tensor" if fault == "missing" else r"is \[95, 64\] and its config.json says \[96, 64\]"
    with pytest.raises(ValueError, match=expected):
        _load(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_without_a_mask_is_causal_attention(family, dense_folder):
    model, ids = _load(dense_folder(family)), torch.randint(3, 90, (2, 20))
    with torch.no_grad():
        expected = model(ids).logits
        use_causal_attention(model, 20)
        assert torch.equal(model(ids).logits, expected)


def test_forward_pass_reads_no_value_from_the_device(dense_folder):
    """A value cannot be read from "meta", which stands for "cuda"."""
    model, ids = _load(dense_folder()).to("meta"), torch.zeros(2, 20, dtype=torch.long, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        model(ids, use_cache=False)
    use_causal_attention(model, 20)
    model(ids, use_cache=False)


def test_sliding_window_shorter_than_the_sequence_keeps_its_mask(dense_folder, tmp_path):
    folder = shutil.copytree(dense_folder("mistral"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 8}))
    model, ids = _load(folder), torch.randint(3, 90, (2, 20))
    with torch.no_grad():
        expected = model(ids).logits
        use_causal_attention(model, 20)
        assert torch.equal(model(ids).logits, expected)
        use_causal_attention(model, 8)
        assert torch.equal(model(ids[:, :8]).logits, _load(folder)(ids[:, :8]).logits)


_SCRIPT = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
from tests.helpers.students import settings
from tomoe_training.artifacts.export import load_base_config
from tomoe_training import base_model
from tomoe_training.base_model import load_base, use_causal_attention
from tomoe_training.method.student import Student

dist.init_process_group("gloo")
torch.set_num_threads(1)
folder, device = Path(sys.argv[1]), torch.device("cpu")
read = []

class Counted:
    def __init__(self, *args, **options):
        self.file = safe_open(*args, **options)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def get_tensor(self, name):
        return self.count(self.file.get_tensor(name))
    def get_slice(self, name):
        self.rows = self.file.get_slice(name)
        return self
    def __getitem__(self, rows):
        return self.count(self.rows[rows])
    def count(self, tensor):
        read.append(tensor.nbytes)
        return tensor

safe_open, base_model.safe_open = base_model.safe_open, Counted
base = load_base(folder, load_base_config(folder), torch.float32, device, is_sharded=True)
base_model.safe_open = safe_open
whole = load_base(folder, load_base_config(folder), torch.float32, device, is_sharded=False)
layers = base.model.layers
local = [p.to_local() for layer in layers for p in layer.parameters()]
equal = all(
    torch.equal(p.full_tensor(), q)
    for mine, theirs in zip(layers, whole.model.layers) for p, q in zip(mine.parameters(), theirs.parameters())
)
use_causal_attention(base, 16)
torch.manual_seed(0)
student = Student(base, settings())
peak = [0]

def count(*_):
    gathered = [layer for layer in layers if not all(isinstance(p, DTensor) for p in layer.parameters())]
    peak[0] = max(peak[0], len(gathered))

def watch(module, args, output):
    count()
    output = output[0] if isinstance(output, tuple) else output
    if output.requires_grad:
        output.register_hook(count)

for layer in layers:
    layer.mlp.register_forward_hook(watch)
    layer.self_attn.register_forward_hook(watch)
student(torch.zeros(1, 16, dtype=torch.long))["loss"].backward()
count()
facts = {
    "share": sum(t.untyped_storage().nbytes() for t in local),
    "layers": sum(p.nbytes for p in whole.model.layers.parameters()),
    "read": sum(read),
    "rest": sum(p.nbytes for n, p in whole.named_parameters() if ".layers." not in n),
    "equal": equal, "peak": peak[0], "after": sum(not isinstance(p, DTensor) for p in layers.parameters()),
}
Path(sys.argv[2], f"{dist.get_rank()}.json").write_text(json.dumps(facts))
"""


@pytest.mark.process
def test_process_holds_its_share_of_a_sharded_base_and_one_layer(tmp_path):
    save_dense_model(tmp_path / "base", "llama", num_hidden_layers=5, intermediate_size=95)  # rows that do not divide
    (tmp_path / "script.py").write_text(_SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port]
    result = python(
        *launch, tmp_path / "script.py", tmp_path / "base", tmp_path, env=environment(GLOO_SOCKET_IFNAME="lo")
    )
    assert result.returncode == 0, result.stderr[-3000:]
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for each in facts:
        assert each["equal"]  # rank by rank, the rows of the file
        assert each["share"] <= 0.51 * each["layers"]
        assert each["read"] <= 0.51 * each["layers"] + each["rest"]
        assert each["peak"] == 1
        assert each["after"] == 0
    assert facts[0]["read"] + facts[1]["read"] == facts[0]["layers"] + 2 * facts[0]["rest"]  # nothing twice
