"""Loads a checkpoint so that every tensor is used exactly once, or says which was not.

vLLM's AutoWeightsLoader places the tensors. It ignores every unexpected ``.bias`` in silence and does not see
that one part of a fused parameter never came (q of qkv), so names are checked here, on the checkpoint's side.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, is_pp_missing_parameter

TIED_HEAD = "lm_head.weight"
"""A tied checkpoint may hold it or not; vLLM's loader skips it where it is an alias."""


def checkpoint_names(model: nn.Module, packed_modules: dict[str, list[str]]) -> set[str]:
    """Names that a checkpoint of ``model`` must hold: its parameters' names, with fused modules taken apart."""
    names = set()
    for name, _ in model.named_parameters():
        module, _, parameter = name.rpartition(".")
        parent, _, fused = module.rpartition(".")
        parts = packed_modules.get(fused)
        names.update([f"{parent}.{part}.{parameter}" for part in parts] if parts else [name])
    return names


def load_strictly(
    model: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    *,
    mapper: WeightsMapper,
    packed_modules: dict[str, list[str]],
    is_tied: bool,
    is_quantized: bool,
) -> set[str]:
    """Load ``weights`` into ``model``; returns the names of the parameters loaded, as vLLM wants them.

    A quantized checkpoint adds tensors of its method (scales, zero points) that only vLLM's loader knows, so
    there the check covers the gates alone.

    Raises ``ValueError`` in one line that names missing, unused or repeated tensors.
    """
    expected = checkpoint_names(model, packed_modules)
    if is_quantized:
        expected = {name for name in expected if "_gate." in name}
    seen: set[str] = set()
    unused: list[str] = []

    def checked() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name in seen:
                raise ValueError(f"the checkpoint holds {name} twice")
            is_known = name in expected or (is_tied and name == TIED_HEAD) or is_pp_missing_parameter(name, model)
            if is_known or is_quantized:
                seen.add(name)
                yield name, tensor
            else:
                unused.append(name)

    loaded = AutoWeightsLoader(model).load_weights(checked(), mapper=mapper)
    problems = [
        f"{problem} {len(names)} tensor{'s' if len(names) > 1 else ''} ({_some(names)})"
        for problem, names in (("lacks", sorted(expected - seen)), ("holds unused", unused))
        if names
    ]
    if problems:
        raise ValueError(f"the checkpoint does not fit its config.json: it {' and '.join(problems)}. Export it again")
    return loaded


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
