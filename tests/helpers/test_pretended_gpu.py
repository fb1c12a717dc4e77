"""The pretended GPU: it computes what the CPU computes, and refuses and counts what CUDA does."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from tests.helpers.pretended_gpu import pretended_gpu, record_synchronizations

pytestmark = pytest.mark.process  # compiles the device on first use


@pytest.fixture
def group(gpu, tmp_path, monkeypatch):
    """A process group of this process alone, with the backend that accelerate chooses on the device."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("pretended_nccl", store=store, rank=0, world_size=1)
    yield gpu
    dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------------------- values
def test_a_training_step_gives_the_values_of_the_cpu(gpu):
    def model():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation=F.silu, bias=False)
        return nn.Sequential(nn.Embedding(11, 16), layer, nn.GRU(16, 16, batch_first=True))

    ids = torch.arange(12).view(2, 6) % 11
    results = []
    for device in (torch.device("cpu"), gpu):
        net = model().to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
        for _ in range(3):
            loss = net(ids.to(device))[0].square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert {p.device for p in net.parameters()} == {device}
        results.append([loss.item(), *(p.detach().cpu() for p in net.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_factories_views_and_in_place_operators_stay_on_the_device(gpu):
    x = torch.arange(12, device="gpu").view(3, 4)
    for made in (
        torch.tensor([1.0], device=gpu), torch.zeros(2, device="gpu:0"), torch.full((2,), 3, device=gpu), x.new_ones(2),
        torch.eye(3, device=gpu), torch.randperm(5, device=gpu), torch.empty(0, device=gpu), torch.zeros_like(x),
    ):  # fmt: skip
        assert made.device == gpu
    x.t()[1:].mul_(10)
    x[0, 0] = 5
    x[x == 4] = -1
    assert x.tolist() == [[5, 10, 20, 30], [-1, 50, 60, 70], [8, 90, 100, 110]]
    values, order = x.flatten().sort()
    assert values.device == order.device == gpu
    assert values.untyped_storage().nbytes() == 12 * 8
    y = torch.empty(0, dtype=torch.long, device=gpu)
    torch.add(x, 1, out=y)
    assert y.shape == x.shape
    assert y.tolist() == (x + 1).tolist()


def test_moving_a_module_keeps_its_parameters_and_ties(gpu):
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    net[1].weight = net[0].weight
    weight = net[0].weight
    net.to(gpu)
    assert net[0].weight is net[1].weight is weight
    assert weight.device == gpu
    assert copy.deepcopy(net)[0].weight.device == gpu


def test_states_are_saved_and_loaded_with_map_location(gpu, tmp_path):
    torch.save({"x": torch.arange(3.0, device=gpu)}, tmp_path / "state.pt")
    for device in (gpu, torch.device("cpu")):
        x = torch.load(tmp_path / "state.pt", map_location=device, weights_only=True)["x"]
        assert x.device == device
        assert x.tolist() == [0, 1, 2]


def test_random_numbers_come_from_the_generators_of_the_device(gpu):
    def draw(generator=None):
        return torch.rand(3, device=gpu, generator=generator).tolist()

    assert draw(torch.Generator(gpu).manual_seed(5)) == draw(torch.Generator("gpu").manual_seed(5))
    torch.manual_seed(0)
    first = draw()
    torch.rand(3)  # the CPU's generator is another one
    torch.manual_seed(0)
    assert draw() == first != draw()


def test_fresh_memory_is_not_zero(gpu):
    assert torch.empty(100, device=gpu).isnan().all()


def test_recomputed_activations_draw_the_same_dropout(gpu):
    x = torch.ones(64, device=gpu, requires_grad=True)
    y = checkpoint(lambda x: F.dropout(x * 2), x, use_reentrant=False)
    y.sum().backward()
    assert x.grad.tolist() == y.tolist()


def test_inference_mode_gives_views_of_tensors_made_before(gpu):
    weight, bias = torch.ones(3, 4, device=gpu), torch.ones(3, device=gpu)
    with torch.inference_mode():
        y = F.linear(torch.ones(2, 5, 4, device=gpu), weight, bias)
        assert y.is_inference()
        assert y.tolist() == torch.full((2, 5, 3), 5.0).tolist()


def test_a_state_dict_is_loaded_beside_an_optimizer(gpu):
    net = nn.Linear(3, 2).to(gpu)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    net(torch.ones(1, 3, device=gpu)).sum().backward()
    optimizer.step()
    weight = net.weight
    net.load_state_dict({name: torch.zeros_like(value) for name, value in net.state_dict().items()})
    assert net.weight is weight
    assert weight.count_nonzero().item() == 0
    optimizer.load_state_dict(optimizer.state_dict())


# --------------------------------------------------------------------------------------------------------------- rules
MIXED = {
    "matmul": lambda gpu, cpu: gpu @ cpu,
    "linear of a CPU record (warm start, B2)": lambda gpu, cpu: nn.Linear(4, 4).to(gpu.device)(cpu),
    "add": lambda gpu, cpu: gpu + cpu,
    "add to the CPU": lambda gpu, cpu: cpu.add_(gpu[0, 0]),
    "write to a scalar of the CPU": lambda gpu, cpu: cpu.sum().add_(gpu.sum()),
    "where": lambda gpu, cpu: torch.where(gpu > 0, gpu, cpu),
    "stack with a scalar of the CPU": lambda gpu, cpu: torch.stack([gpu.sum(), cpu.sum()]),
    "embedding": lambda gpu, cpu: F.embedding(cpu.long(), gpu),
    "index_select": lambda gpu, cpu: gpu.index_select(0, cpu[0].long()),
    "index_add": lambda gpu, cpu: gpu.index_add_(0, torch.arange(4, device=gpu.device), cpu),
    "values of an assignment": lambda gpu, cpu: gpu.__setitem__(torch.arange(4, device=gpu.device), cpu),
    "GPU indices of a CPU tensor": lambda gpu, cpu: cpu[gpu[0].long()],
    "layer_norm": lambda gpu, cpu: F.layer_norm(gpu, (4,), cpu[0]),
    "generator": lambda gpu, cpu: gpu.normal_(generator=torch.Generator()),
    "CPU tensor, generator of the device": lambda gpu, cpu: cpu.normal_(generator=torch.Generator(gpu.device)),
    "another device": lambda gpu, cpu: gpu + gpu.to("gpu:1"),
    "numpy": lambda gpu, cpu: gpu.numpy(),
}


@pytest.mark.parametrize("operation", MIXED.values(), ids=MIXED)
def test_what_cuda_refuses_is_refused(operation, gpu):
    with pytest.raises((RuntimeError, TypeError), match=r"device|numpy"):
        operation(torch.ones(4, 4, device=gpu), torch.ones(4, 4))


def test_what_cuda_takes_of_the_cpu_is_taken(gpu):
    x = torch.arange(4.0, device=gpu)
    assert (x * torch.tensor(2.0)).device == gpu
    assert x[torch.tensor([2, 0])].tolist() == [2, 0]
    x[torch.tensor([True, False, False, True])] = torch.zeros(2, device=gpu)
    x.copy_(x.cpu() + 1)
    assert x.tolist() == [1, 2, 3, 1]
    host = torch.zeros(4)
    host.copy_(x)
    assert host.tolist() == [1, 2, 3, 1]


def test_a_mean_over_processes_of_a_cpu_tensor_is_refused(group):
    """The fault B3 of the first GPU audit: accelerate reduces without moving, and NCCL has no CPU backend."""
    from accelerate import Accelerator
    from accelerate.utils import operations

    total = torch.ones(3, dtype=torch.float64, device=group)
    dist.all_reduce(total)
    dist.broadcast(total, 0)
    assert total.tolist() == [1, 1, 1]
    assert operations.gather(total).device == Accelerator().device == group
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(total.cpu())
    objects = [{"widths": 3}]
    dist.broadcast_object_list(objects, 0, device=group)
    assert objects == [{"widths": 3}]


# ---------------------------------------------------------------------------------------------------- synchronisations
WAITS = {
    "item": (lambda x: x.sum().item(), "aten::_local_scalar_dense"),
    "bool": (lambda x: bool((x > 0).all()), "aten::_local_scalar_dense"),
    "int": (lambda x: range(x[1].int()), "aten::_local_scalar_dense"),
    "cpu": (lambda x: x.cpu(), "copy to the CPU"),
    "copy to memory not pinned": (lambda x: torch.ones(4).copy_(x, non_blocking=True), "copy to the CPU"),
    "tolist": (lambda x: x.tolist(), "copy to the CPU"),
    "tensor": (lambda x: torch.tensor([1.0], device=x.device), "copy to the device"),
    "blocking copy": (lambda x: torch.ones(3).pin_memory().to(x.device), "copy to the device"),
    "memory not pinned": (lambda x: torch.ones(3).to(x.device, non_blocking=True), "copy to the device"),
    "nonzero": (lambda x: x.nonzero(), "aten::nonzero"),
    "mask": (lambda x: x[x > 1], "aten::nonzero"),
    "assignment to a mask": (lambda x: x.__setitem__(x > 1, x[:2] + 1), "aten::_index_put_impl_"),
    "CPU indices": (lambda x: x[torch.tensor([0])], "copy to the device"),
    "bincount": (lambda x: x.long().bincount(minlength=9), "aten::bincount"),
    "unique": (lambda x: x.unique(), "aten::_unique2"),
    "repeat_interleave": (lambda x: x.repeat_interleave(x.long()), "aten::repeat_interleave"),
    "multinomial": (lambda x: torch.multinomial(x, 1), "aten::multinomial"),
    "equal": (lambda x: torch.equal(x, x + 0), "aten::equal"),
    "synchronize": (lambda x: torch.gpu.synchronize(), "synchronize"),
}


@pytest.mark.parametrize(("operation", "operator"), WAITS.values(), ids=WAITS)
def test_a_wait_for_the_device_is_recorded_with_its_place(operation, operator, gpu):
    x = torch.arange(4.0, device=gpu)
    with record_synchronizations() as found:
        operation(x)
    assert found.operators == [operator]
    assert __file__ in [frame.filename for frame in found.items[0].stack]
    assert operator in str(found)
    x.tolist()
    assert len(found) == 1


def test_what_does_not_wait_is_not_recorded(gpu):
    x, host = torch.arange(4.0, device=gpu), torch.ones(4).pin_memory()
    with record_synchronizations() as found:
        y = host.to(gpu, non_blocking=True) + x.softmax(0)
        y[x > 1] = 0.0
        y.masked_fill_(x > 1, 1.0).scatter_(0, x.long(), 2.0)
        y = torch.cat([y, x.new_zeros(3), torch.full((2,), 7.0, device=gpu)]).sort().values
        y.repeat_interleave(torch.ones(9, dtype=torch.long, device=gpu), output_size=9).topk(2)
        torch.zeros(5, device=gpu).index_add_(0, x.long(), x)
        host[1:].copy_(x[1:], non_blocking=True)
        x.to("cpu", non_blocking=True)  # torch pins the target
        weight = torch.rand(4, 4, device=gpu, requires_grad=True)
        (weight @ x).relu().sum().backward()
        torch.optim.AdamW([weight], fused=True).step()
    assert str(found) == "none"


def test_a_wait_in_a_backward_pass_has_the_stack_of_its_caller(gpu):
    x = torch.ones(3, device=gpu, requires_grad=True)
    x.register_hook(lambda gradient: print(gradient.sum().item()))
    with record_synchronizations() as found:
        x.sum().backward()
    assert len(found) == 1
    assert "test_a_wait_in_a_backward_pass" in found.items[0].place or __file__ in str(found.items[0].stack)


# -------------------------------------------------------------------------------------------------------------- memory
def test_allocated_bytes_are_those_of_live_storages(gpu):
    before = torch.gpu.memory_allocated()
    x = torch.zeros(1000, device=gpu)
    view = x[10:]
    assert torch.gpu.memory_allocated() == before + 4000
    torch.gpu.reset_peak_memory_stats()
    y = x + view.sum()
    del y
    assert torch.gpu.memory_allocated() == before + 4000
    assert torch.gpu.max_memory_allocated() == before + 8004
    del x
    assert torch.gpu.memory_allocated() == before + 4000
    view.untyped_storage().resize_(0)
    assert torch.gpu.memory_allocated() == before
    view.untyped_storage().resize_(4000)
    assert torch.gpu.memory_allocated() == before + 4000
    other = torch.zeros(5, device="gpu:1")
    assert torch.gpu.memory_allocated(1) >= 20
    assert torch.gpu.memory_allocated() == before + 4000
    del view, other
    assert torch.gpu.memory_allocated() == before


# --------------------------------------------------------------------------------------------------------- distributed
def test_fsdp_shards_and_trains_on_the_device(group):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(group)
    expected = copy.deepcopy(net)
    for layer in net:
        fully_shard(layer, mesh=init_device_mesh("gpu", (1,)))
    x = torch.rand(3, 8, device=group)
    net(x).square().sum().backward()
    expected(x).square().sum().backward()
    gradient = net[0].weight.grad.full_tensor()
    assert gradient.device == group
    torch.testing.assert_close(gradient.cpu(), expected[0].weight.grad.cpu())


def test_the_device_is_there_within_the_mode_only():
    with pretended_gpu() as device:
        assert torch.accelerator.current_accelerator(check_available=True).type == "gpu"
        from accelerate import Accelerator

        assert Accelerator().device == device
    assert not torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator(check_available=True) is None
    assert Accelerator().device == torch.device("cpu")
