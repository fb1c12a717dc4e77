"""Routes each token to one expert, and holds the masks of the experts."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.utils import set_weight_attrs

from tomoe_vllm.hf.tomoe_math import pack_signature, unpack_signature
from tomoe_vllm.kernels.expert_mlp.weight_layout import neuron_lists
from tomoe_vllm.kernels.route import route

STATISTICS_SETTING = "tomoe_expert_statistics"
"""Key of vLLM's ``additional_config`` that makes routers record their choices (``observability/``)."""


def make_record(num_experts: int) -> Tensor | None:
    """Buffer for the experts of one step's tokens: [maximum tokens per step] uint8. None if statistics are off.

    Raises ``ValueError`` for more than 255 experts: the value 255 means "not computed".
    """
    config = get_current_vllm_config()
    if not isinstance(config.additional_config, dict) or not config.additional_config.get(STATISTICS_SETTING):
        return None
    if num_experts > 255:
        raise ValueError(f"expert statistics count up to 255 experts, and the model has {num_experts}; leave them off")
    graph_tokens = config.compilation_config.max_cudagraph_capture_size or 0
    return torch.zeros(max(config.scheduler_config.max_num_batched_tokens, graph_tokens), dtype=torch.uint8)


class ToMoERouter(nn.Module):
    """Router and expert masks of one layer. The router is replicated; the masks are sharded like gate_up_proj.

    ``router.weight``: [N, D] float32. ``signature``: [F / tp, ceil(N / 8)] uint8, the checkpoint's bits, in its order.
    ``expert_masks``: [N, F / tp] in the model's dtype, and ``neuron_ids``, ``widths`` (:func:`neuron_lists`), the same
    information in the form that the kernels read; :meth:`set_masks` derives them. ``num_loads``: how often it did.
    ``loaded_widths``: kept neurons of each expert on this rank, by the signature that was loaded last. ``max_widths``:
    of the widest expert on each rank, by the first one. ``record``: the buffer of :func:`make_record`.
    ``is_sharded=False``: every rank holds the masks of all neurons.

    Before a checkpoint is loaded all experts keep the same neurons, of the right number, so ``--load-format dummy``,
    which does not set integers, works too.

    Raises ``ValueError`` for a tensor parallel size that does not divide the neurons, and while loading for a signature
    of another shape, dtype or number of neurons than the config says, or for a later one with more neurons of an expert
    on any rank than the first. All ranks raise then, so that none waits for another.
    """

    expert_masks: Tensor
    neuron_ids: Tensor
    widths: Tensor
    record: Tensor | None

    def __init__(self, config: PreTrainedConfig, layer_idx: int, prefix: str, *, is_sharded: bool = True) -> None:
        super().__init__()
        self.prefix = prefix
        self.num_experts = config.num_experts
        self.num_neurons = config.intermediate_size
        self.width = config.expert_intermediate_sizes[layer_idx]
        tp_size = get_tensor_model_parallel_world_size()
        if self.num_neurons % tp_size:
            raise ValueError(
                f"tensor parallel size {tp_size} does not divide intermediate_size {self.num_neurons}; "
                "choose one that does"
            )
        num_local = self.num_neurons // tp_size if is_sharded else self.num_neurons
        self.start = get_tensor_model_parallel_rank() * num_local if is_sharded else 0
        self.router = nn.Linear(config.hidden_size, self.num_experts, bias=False, dtype=torch.float32)
        evenly_spaced = _evenly_spaced(self.width, self.num_neurons).unflatten(0, (-1, num_local))
        self.max_widths: list[int] = evenly_spaced.sum(dim=1).tolist()
        masks = evenly_spaced[self.start // num_local].expand(self.num_experts, -1)
        self.loaded_widths: list[int] = masks.sum(dim=1).tolist()
        signature = pack_signature(masks)
        self.signature = nn.Parameter(signature, requires_grad=False)
        set_weight_attrs(self.signature, {"weight_loader": self._load_signature})
        self.register_buffer("expert_masks", masks.to(torch.get_default_dtype()), persistent=False)
        for name, lists in zip(("neuron_ids", "widths"), neuron_lists(self.expert_masks), strict=True):
            self.register_buffer(name, lists, persistent=False)
        self.register_buffer("record", make_record(self.num_experts), persistent=False)
        self.num_loads = 0

    def _load_signature(self, param: nn.Parameter, loaded: Tensor) -> None:
        shape = (self.num_neurons, param.shape[1])
        if loaded.shape != shape or loaded.dtype != torch.uint8:
            raise ValueError(
                f"{self.prefix}.signature is {loaded.dtype} {list(loaded.shape)}; it must be uint8 {list(shape)}"
            )
        num_local = param.shape[0]
        shares = unpack_signature(loaded, self.num_experts).unflatten(1, (-1, num_local)).sum(dim=2)  # [N, ranks]
        widths = shares.sum(dim=1).tolist()
        if any(width != self.width for width in widths):
            raise ValueError(
                f"{self.prefix}.signature gives experts of {widths} neurons; config.json says {self.width}. "
                "Export the checkpoint again"
            )
        max_widths: list[int] = shares.amax(dim=0).tolist()
        if not self.num_loads:
            self.max_widths = max_widths
        elif any(new > first for new, first in zip(max_widths, self.max_widths, strict=True)):
            raise ValueError(
                f"{self.prefix}.signature gives the tensor-parallel ranks up to {max_widths} neurons of an expert, and "
                f"the engine was started with {self.max_widths}; restart it on the new checkpoint"
            )
        self.loaded_widths = shares[:, self.start // num_local].tolist()
        param.data.copy_(loaded.narrow(0, self.start, num_local))

    def masks(self) -> Tensor:
        """The masks of ``signature``, in the order of the checkpoint: [N, F / tp] bool.

        Raises ``ValueError`` if they are not those that were loaded: sleep level 2 discards parameters.
        """
        masks = unpack_signature(self.signature.data, self.num_experts)
        if (widths := masks.sum(dim=1).tolist()) != self.loaded_widths:
            raise ValueError(
                f"{self.prefix}.signature gives experts of {widths} neurons and was loaded with {self.loaded_widths}, "
                "as after sleep level 2; include the masks in the reload"
            )
        return masks

    def set_masks(self, masks: Tensor) -> None:
        """Set the masks and lists that the kernels read, after loading. ``masks``: [N, F / tp] bool.

        The first call allocates the lists. Later ones keep their addresses, which CUDA graphs contain.
        """
        self.expert_masks.copy_(masks)
        neuron_ids, widths = neuron_lists(masks)
        if not self.num_loads:
            self.neuron_ids, self.widths = neuron_ids, widths
        else:
            width = neuron_ids.shape[1]
            self.neuron_ids[:, :width].copy_(neuron_ids)
            self.neuron_ids[:, width:] = 0
            self.widths.copy_(widths)
        self.num_loads += 1

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Expert of each token (eq. 3): [T, D] -> [T] int64."""
        return route(hidden_states, self.router.weight, self.record)

    def record_experts(self, router_logits: Tensor) -> None:
        """Record the top-1 experts of ``router_logits`` [T, N], for layers in which vLLM's fused MoE routes."""
        if self.record is not None:
            self.record.narrow(0, 0, router_logits.shape[0]).copy_(router_logits.argmax(dim=-1))


def _evenly_spaced(width: int, num_neurons: int) -> Tensor:
    """[F] bool with ``width`` ones at equal distances, so that tensor-parallel ranks get equal shares."""
    steps = torch.arange(num_neurons + 1) * width // num_neurons
    return steps[1:] > steps[:-1]
