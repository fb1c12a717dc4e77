"""Where kernels are checked: a GPU with CUDA graphs and timers, or Triton's interpreter on the CPU without either."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tomoe_vllm.diagnostics.roofline import Chip

FLUSH_BYTES = 256 << 20
"""Written before each timed replay, so that it reads its weights from memory: more than the L2 of any GPU (B200: 126
MB)."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured call: ``replay`` runs it again on the same inputs and writes its result to ``output``."""

    replay: Callable[[], None]
    output: Tensor


class CudaDevice:
    """The current GPU."""

    type = "cuda"

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.type)

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        """Capture ``run`` into a CUDA graph. Raises if ``run`` synchronizes with the host."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
        return Graph(graph.replay, output)

    def milliseconds(self, graph: Graph, rounds: int = 20) -> float | None:
        """Median time of a replay with a cold L2."""
        return statistics.median(self.milliseconds_once(graph.replay) for _ in range(rounds))

    def milliseconds_once(self, replay: Callable[[], object]) -> float:
        """Time of one replay with a cold L2. The host launches it while the GPU still empties L2: it does not count."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def milliseconds_per_call(self, run: Callable[[], Tensor], calls: int = 40) -> float | None:
        """Time of one of many calls in a graph, of which each waits for the one before: what a layer of a step pays.

        The difference between ``calls`` and a fifth of them, so that the launch of the graph itself is not counted.
        """

        def chain(length: int) -> Graph:
            def run_all() -> Tensor:
                for _ in range(length - 1):
                    run()
                return run()

            return self.capture(run_all)

        few = calls // 5
        long, short = (self.milliseconds(chain(length)) for length in (calls, few))
        assert long is not None
        assert short is not None
        return (long - short) / (calls - few)

    def measured_chip(self) -> Chip:
        """Rates of the GPU: of a copy (bytes read and written), and of a large bfloat16 GEMM."""
        source = torch.empty(2**30, dtype=torch.uint8, device=self.type)
        target = torch.empty_like(source)
        copy_ms = self.milliseconds(self.capture(lambda: target.copy_(source)))
        matrix = torch.randn(8192, 8192, device=self.type).bfloat16()
        gemm_ms = self.milliseconds(self.capture(lambda: matrix @ matrix))
        assert copy_ms is not None
        assert gemm_ms is not None
        bandwidth, flops = 2 * source.numel() / (1e-3 * copy_ms), 2 * 8192**3 / (1e-3 * gemm_ms)
        return Chip(name=torch.cuda.get_device_name(), bandwidth=bandwidth, flops=flops)


class InterpretedDevice:
    """Triton's interpreter (TRITON_INTERPRET=1). A graph runs the call again; nothing is timed."""

    type = "cpu"

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        """Run once; a replay runs again and copies the result."""
        output = run()

        def replay() -> None:
            output.copy_(run())

        return Graph(replay, output)

    def milliseconds(self, graph: Graph, rounds: int = 20) -> float | None:
        """None: times of the interpreter say nothing."""
        return None

    def milliseconds_per_call(self, run: Callable[[], Tensor], calls: int = 40) -> float | None:
        """None, as :meth:`milliseconds`."""
        return None


Device = CudaDevice | InterpretedDevice
