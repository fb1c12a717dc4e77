"""Values across processes, with two gloo processes."""

import json
import socket

import pytest
import torch
from tomoe_training.budget import Widths
from tomoe_training.ranks import broadcast_widths, mean_over_ranks, mean_with_local_gradient, num_ranks

from tests.helpers.processes import environment, python

WIDTHS = Widths(experts=[8, 16], qk_dims=[4, 2], vo_dims=[3, 7], shift=0.1)

_SCRIPT = """
import dataclasses, json, sys
from pathlib import Path
import torch, torch.distributed as dist
from tests.helpers.students import random_student
from tomoe_training.budget import Widths
from tomoe_training.ranks import mean_over_ranks, mean_with_local_gradient

dist.init_process_group("gloo")
rank = dist.get_rank()
student = random_student(Path(sys.argv[1]), seed=rank)
own = dataclasses.asdict(student.update_widths())  # of other logits in each process
if rank:
    student.widths = None
student.broadcast()
x = torch.tensor([float(rank), float("nan")], requires_grad=True)
mean_with_local_gradient(x)[0].backward()
facts = {
    "own": own,
    "widths": dataclasses.asdict(student.widths),
    "state": [t.double().sum().item() for t in student.state_dict().values()],
    "mean": str(mean_over_ranks(x).tolist()),
    "gradient": x.grad[0].item(),
}
Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(facts))
"""


@pytest.mark.process
def test_all_processes_get_the_weights_and_the_widths_of_the_first(dense_folder, tmp_path):
    (tmp_path / "script.py").write_text(_SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port]
    result = python(*launch, tmp_path / "script.py", dense_folder(), tmp_path, env=environment(GLOO_SOCKET_IFNAME="lo"))
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["widths"] == first["own"]
    assert first["mean"] == "[0.5, nan]"
    assert first["gradient"] == 1.0  # DDP averages it


def test_one_process_keeps_its_values():
    assert num_ranks() == 1
    assert broadcast_widths(WIDTHS, 2, torch.device("cpu")) is WIDTHS
    x = torch.tensor([1.0], requires_grad=True)
    assert not mean_over_ranks(x).requires_grad
    mean_with_local_gradient(x).sum().backward()
    assert x.grad.item() == 1.0


def test_messages_are_on_the_device_of_the_process(monkeypatch):
    """Plain NCCL has no backend for CPU tensors."""
    sent = []
    monkeypatch.setattr("tomoe_training.ranks.num_ranks", lambda: 2)
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, src: sent.append(tensor.device.type))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: sent.append(tensor.device.type))
    mean_over_ranks(torch.zeros(3, device="meta"))
    with pytest.raises(RuntimeError, match="meta"):  # to read the message
        broadcast_widths(WIDTHS, 2, torch.device("meta"))
    assert sent == ["meta", "meta"]
