"""Adds what shapes ToMoE's graph to the key of vLLM's compile caches.

vLLM stores compiled graphs on disk, drops their guards, and finds them by ``VllmConfig.compute_hash()`` and by the
sources that were traced. A ToMoE model depends on more: the layout of the experts follows from a validation record and
from free memory, thresholds from tuned tables, and an op's implementation from what is registered in this process.
Without these in the key, vLLM loads the graph of the masked layout for weights of the shared one after ``tomoe doctor``
has run, and ``tomoe tune`` has no effect.

``compute_hash`` includes ``additional_config``, is not cached, and is called in the first forward pass, after the model
was built.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig

from tomoe_vllm.kernels.expert_mlp.triton import dispatch
from tomoe_vllm.layers.mlp.layout import layer_shapes

KEY = "tomoe_graph"
"""Key of the digest in vLLM's ``additional_config``."""
_PACKAGE = Path(__file__).parents[1]
_SOURCES = ("compat", "hf", "kernels", "layers", "models")
"""Folders with code that decides what is traced. vLLM compares only the files that tracing entered."""


class _WithDigest:
    """An ``additional_config`` that is no dict, but an object with ``compute_hash``, together with the digest."""

    def __init__(self, config: Any, digest: str) -> None:
        self._config, self._digest = config, digest

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # of a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self._config, name)

    def compute_hash(self) -> str:
        return hashlib.sha256(f"{self._config.compute_hash()} {self._digest}".encode()).hexdigest()


def add_to_compile_key(vllm_config: VllmConfig, expert_layout: str) -> None:
    """Add :func:`graph_digest` to what vLLM hashes. Call it once all modules of the model are built."""
    digest = graph_digest(vllm_config, expert_layout)
    additional = vllm_config.additional_config
    # A new object: the old one may belong to the configs of other models too.
    vllm_config.additional_config = (
        {**additional, KEY: digest} if isinstance(additional, dict) else _WithDigest(additional, digest)
    )


def graph_digest(vllm_config: VllmConfig, expert_layout: str) -> str:
    """Digest of all inputs of the traced graph that vLLM's own hash does not cover.

    These are the layout, the thresholds of every layer, the implementations of our ops in this process (C++, Triton),
    and our sources with the versions of Triton and torch. The config with its overrides is in vLLM's hash.
    """
    config = vllm_config.model_config.hf_config
    facts = {
        "layout": expert_layout,
        "thresholds": [repr(dispatch.load_thresholds(shape)) for shape in layer_shapes(config)],
        "ops": {key: _registered_ops(key) for key in ("CPU", "CUDA")},
        "sources": _source_digest(),
        "kernels": dispatch.kernel_digest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _registered_ops(dispatch_key: str) -> list[str]:
    """Ops of this project with an implementation of their own for ``dispatch_key``."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(dispatch_key)
    return sorted(name for name in names if name.startswith("tomoe::"))


def _source_digest() -> str:
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for file in sorted((_PACKAGE / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(_PACKAGE)}\n".encode() + file.read_bytes())
    return digest.hexdigest()
