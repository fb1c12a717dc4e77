"""Loads a checkpoint strictly: every tensor is used exactly once, or an error names those that are not.

vLLM's AutoWeightsLoader loads the tensors. It silently ignores unexpected ``.bias`` tensors and does not notice a
missing part of a fused parameter (q of qkv), so the names of the checkpoint's tensors are checked here.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, is_pp_missing_parameter

from tomoe_vllm.compat.reload import is_reloading, restore_layers

TIED_HEAD = "lm_head.weight"
"""Optional in a checkpoint with tied embeddings. vLLM's loader skips it there."""

ROTARY_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Buffers in old LLaMA checkpoints. vLLM's loader drops them, too."""

MASKS = (".signature", ".query_key_dims", ".value_dims")
"""Tensors that a reload may leave out, all of them together: fine-tuning does not change them."""

UNREADABLE_FORMATS = ("ipc_cache", "runai_streamer_sharded", "sharded_state", "tensorizer")
"""Load formats that restore the parameters of a running engine. Pruned ones would be pruned again."""


def require_readable(load_format: str) -> None:
    """Raise ``ValueError`` for a load format that does not read the checkpoint's own tensors."""
    if load_format in UNREADABLE_FORMATS:
        raise ValueError(
            f"--load-format {load_format} restores the parameters of a running engine, and those of ToMoE are pruned "
            "and lack the masks; use --load-format auto, or runai_streamer, with the exported checkpoint"
        )


def checkpoint_names(model: nn.Module, packed_modules: dict[str, list[str]]) -> set[str]:
    """Tensor names that a checkpoint of ``model`` must contain: its parameters' names, with fused modules split."""
    names = set()
    for name, _ in model.named_parameters():
        module, _, parameter = name.rpartition(".")
        parent, _, fused = module.rpartition(".")
        parts = packed_modules.get(fused)
        names.update([f"{parent}.{part}.{parameter}" for part in parts] if parts else [name])
    return names


class StrictLoader:
    """Loads and reloads the weights of ``model``, a model that was just constructed.

    The tensors of a quantization method (scales, zero points) are known to vLLM's loader only, so in a quantized
    checkpoint the check covers just the routers and masks (``expert_gate``, ``head_gate``).

    ``failure``: why the weights are incomplete after a failed reload, or None. The model must not run then.
    ``why_not_reloadable``: why the weights cannot be replaced, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mapper: WeightsMapper,
        packed_modules: dict[str, list[str]],
        is_tied: bool,
        is_quantized: bool,
        load_format: str,
        why_not_reloadable: str | None,
    ) -> None:
        self.model, self.mapper = model, mapper
        self.is_tied, self.is_quantized = is_tied, is_quantized
        self.load_format, self.why_not_reloadable = load_format, why_not_reloadable
        self.expected = checkpoint_names(model, packed_modules)
        if is_quantized:
            self.expected = {name for name in self.expected if "_gate." in name}
        self.is_loaded = False
        self.failure: str | None = None
        self._seen: set[str] = set()

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load ``weights``. Returns the names of the loaded parameters, as vLLM expects.

        The first call must bring all tensors. Later ones reload: vLLM may split the tensors between several calls, and
        :meth:`finish` checks that all came.

        Raises ``ValueError`` with one line that names missing, unused or repeated tensors, or says why the model cannot
        be reloaded; in the latter case the model is unchanged.
        """
        if not self.is_loaded:
            return self._load(weights)
        if not is_reloading(self.model):
            raise ValueError(
                "load_weights was called on a model that is already loaded, and whose weights were processed. Use "
                'reload_weights, as in llm.collective_rpc("reload_weights"), or a weight transfer'
            )
        try:
            if self.why_not_reloadable is not None:
                raise ValueError(f"{self.why_not_reloadable}. The weights are unchanged")
            loaded = self._load(weights)
        except Exception as error:
            restore_layers(self.model)
            self._seen.clear()
            if self.why_not_reloadable is None:
                self.failure = f"reloading the weights failed ({error})"
            raise
        if self._seen:  # until finish(), which an error in vLLM's own processing of the weights would skip
            self.failure = "reloading the weights did not end"
        return loaded

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        unused: list[str] = []

        def checked() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.endswith(ROTARY_BUFFERS):
                    continue
                if name in self._seen:
                    raise ValueError(f"the checkpoint holds {name} twice")
                is_known = name in self.expected or (self.is_tied and name == TIED_HEAD)
                if is_known or is_pp_missing_parameter(name, self.model) or self.is_quantized:
                    self._seen.add(name)
                    yield name, tensor
                else:
                    unused.append(name)

        loaded = AutoWeightsLoader(self.model).load_weights(checked(), mapper=self.mapper)
        _require_none(lacks=set() if self.is_loaded else self.expected - self._seen, unused=unused)
        return loaded

    def finish(self) -> bool:
        """Called when all weights are in place. Returns whether they were reloaded.

        Raises ``ValueError`` if tensors are missing from a reload, or if the load format did not call :meth:`load`.
        """
        if not self.is_loaded:
            if not self._seen and self.load_format != "dummy":
                raise ValueError(
                    f"--load-format {self.load_format} did not load the checkpoint's tensors; use --load-format auto"
                )
            self.is_loaded = True
            self._seen.clear()
            return False
        if not self._seen:
            return False
        lacks, self._seen = self.expected - self._seen, set()
        masks = {name for name in self.expected if name.endswith(MASKS)}
        try:
            _require_none(lacks=lacks - masks if masks <= lacks else lacks, unused=[])
        except ValueError as error:
            self.failure = f"reloading the weights failed ({error})"
            raise
        self.failure = None
        return True


def _require_none(*, lacks: set[str], unused: list[str]) -> None:
    problems = [
        f"{problem} {len(names)} tensor{'s' if len(names) > 1 else ''} ({_some(names)})"
        for problem, names in (("lacks", sorted(lacks)), ("holds unused", unused))
        if names
    ]
    if problems:
        raise ValueError(f"the checkpoint does not fit its config.json: it {' and '.join(problems)}. Export it again")


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
