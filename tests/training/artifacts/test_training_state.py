"""Training states: atomic, safe to load, and of one version."""

import dataclasses

import pytest
import torch
from tomoe_training.artifacts.training_state import VERSION, check_state, load_state, save_state
from tomoe_training.budget import Widths

CPU = torch.device("cpu")


def test_saved_state_is_loaded(tmp_path):
    file = tmp_path / "state.pt"
    assert load_state(file, CPU) is None
    save_state({"step": 3, "weights": {"a": torch.arange(3)}, "name": "x", "widths": None}, file)
    state = load_state(file, CPU)
    assert state["weights"]["a"].tolist() == [0, 1, 2]
    assert (state["step"], state["name"], state["widths"], state["version"]) == (3, "x", None, VERSION)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


class _Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_code_in_a_state_is_not_executed(tmp_path, capsys):
    torch.save({"version": VERSION, "step": _Payload()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="is whole and was written by another version"):
        load_state(tmp_path / "state.pt", CPU)
    assert "executed" not in capsys.readouterr().out


def test_state_of_version_1_is_refused_and_kept(tmp_path):
    """Its batches and noise follow seeds mixed by primes: continuing would mix two orders of the data."""
    file = tmp_path / "state.pt"
    widths = Widths(experts=[8], qk_dims=[8], vo_dims=[8], shift=0.0)
    torch.save({"step": 2, "widths": widths}, file)  # with the exact budget
    with pytest.raises(ValueError, match=r"was written by another version of tomoe; finish the run with that version"):
        load_state(file, CPU)
    torch.save({"step": 2, "widths": None}, file)  # with the penalty
    with pytest.raises(ValueError, match=r"has training state version 1, this tomoe resumes version 2"):
        load_state(file, CPU)
    save_state({"step": 2, "widths": dataclasses.asdict(widths)}, file)
    assert Widths(**load_state(file, CPU)["widths"]) == widths


@pytest.mark.parametrize("size", [0, 5, 200, -20])
def test_damaged_state_is_named(size, tmp_path):
    file = tmp_path / "state.pt"
    save_state({"step": 3, "weights": torch.arange(300)}, file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"state\.pt is damaged"):
        load_state(file, CPU)
    assert file.is_file()


def _state():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    return {"student": {"weight": weight}, "optimizer": optimizer.state_dict(), "step": 1, "widths": None, "name": "x"}


def test_finite_state_passes():
    check_state(_state(), 1)
    check_state({"step": 1}, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["weight", "second moment"])
def test_state_that_is_not_finite_is_found(part, value):
    state = _state()
    tensor = state["student"]["weight"].data if part == "weight" else state["optimizer"]["state"][0]["exp_avg_sq"]
    tensor[1] = value
    with pytest.raises(FloatingPointError, match="not finite after step 7: a gradient overflowed"):
        check_state(state, 7)


def test_every_flipped_bit_of_a_tensor_is_found(tmp_path):
    """torch.load does not compare checksums: it would resume from other numbers."""
    file = tmp_path / "state.pt"
    save_state({"step": 3, "weights": torch.arange(3000)}, file)
    data = bytearray(file.read_bytes())
    data[data.index(torch.arange(1000, 1004).numpy().tobytes())] ^= 4
    file.write_bytes(data)
    assert torch.load(file)["weights"].tolist() != list(range(3000))
    with pytest.raises(ValueError, match=r"state\.pt is damaged \(the checksum of .* is wrong\); remove it"):
        load_state(file, CPU)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "cpu:1", "meta"])
def test_state_is_loaded_to_any_device_of_accelerate(device, tmp_path):
    """Several CPU processes are on "cpu:0", a name that torch.load does not know."""
    file, device = tmp_path / "state.pt", torch.device(device)
    save_state({"step": 3, "optimizer": {"state": [(torch.arange(3), 0.5)]}}, file)
    (tensor, number), *_ = load_state(file, device)["optimizer"]["state"]
    assert (tensor.device.type, number) == (device.type, 0.5)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("x"), TypeError("x")])
def test_error_while_loading_a_whole_file_does_not_advise_to_remove_it(error, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    save_state({"step": 3}, tmp_path / "state.pt")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError, match=f"is whole but cannot be loaded here, keep it: {error}$"):
        load_state(tmp_path / "state.pt", CPU)


def test_file_of_something_else_is_told_so(tmp_path):
    torch.save([1, 2], tmp_path / "state.pt")
    with pytest.raises(ValueError, match="is not a training state of tomoe; choose another --out"):
        load_state(tmp_path / "state.pt", CPU)
