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
    ``record``: the buffer of :func:`make_record`. ``is_sharded=False``: every rank holds the masks of all neurons.

    Before a checkpoint is loaded all experts keep the same neurons, of the right number, so ``--load-format dummy``,
    which does not set integers, works too.

    Raises ``ValueError`` for a tensor parallel size that does not divide the neurons, and while loading for a signature
    of another shape, dtype or number of neurons than the config says.
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
        masks = (
            _evenly_spaced(self.width, self.num_neurons).narrow(0, self.start, num_local).expand(self.num_experts, -1)
        )
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
        widths = unpack_signature(loaded, self.num_experts).sum(dim=1).tolist()
        if any(width != self.width for width in widths):
            raise ValueError(
                f"{self.prefix}.signature gives experts of {widths} neurons; config.json says {self.width}. "
                "Export the checkpoint again"
            )
        param.data.copy_(loaded.narrow(0, self.start, param.shape[0]))

    def masks(self) -> Tensor:
        """The masks of ``signature``, in the order of the checkpoint: [N, F / tp] bool."""
        return unpack_signature(self.signature.data, self.num_experts)

    def set_masks(self, masks: Tensor) -> None:
        """Set the masks and lists that the kernels read, after loading. ``masks``: [N, F / tp] bool.

        The first call allocates the lists. Later ones keep their addresses, which CUDA graphs contain. Raises
        ``ValueError`` if an expert then keeps more neurons of this rank than the lists hold.
        """
        self.expert_masks.copy_(masks)
        neuron_ids, widths = neuron_lists(masks)
        if not self.num_loads:
            self.neuron_ids, self.widths = neuron_ids, widths
        elif (width := neuron_ids.shape[1]) > self.neuron_ids.shape[1]:
            raise ValueError(
                f"{self.prefix}.signature gives a tensor-parallel rank {width} neurons of an expert, and the engine "
                f"was started with at most {self.neuron_ids.shape[1]}; restart it on the new checkpoint"
            )
        else:
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
