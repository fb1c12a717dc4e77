"""Loads a checkpoint strictly: every tensor is used exactly once, or an error names those that are not.

vLLM's AutoWeightsLoader loads the tensors. It silently ignores unexpected ``.bias`` tensors and does not notice a
missing part of a fused parameter (q of qkv), so the names of the checkpoint's tensors are checked here.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, is_pp_missing_parameter

TIED_HEAD = "lm_head.weight"
"""Optional in a checkpoint with tied embeddings. vLLM's loader skips it there."""


def checkpoint_names(model: nn.Module, packed_modules: dict[str, list[str]]) -> set[str]:
    """Tensor names that a checkpoint of ``model`` must contain: its parameters' names, with fused modules split."""
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
    """Load ``weights`` into ``model``. Returns the names of the loaded parameters, as vLLM expects.

    The tensors of a quantization method (scales, zero points) are known to vLLM's loader only, so in a quantized
    checkpoint the check covers just the routers and masks (``expert_gate``, ``head_gate``).

    Raises ``ValueError`` with one line that names missing, unused or repeated tensors.
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
