"""Prometheus metrics of the experts, appended to vLLM's text on ``/metrics``.

They are neither a stat logger of vLLM nor in the default registry. A stat logger gets the scheduler's values, but
experts are chosen in the workers. With several API servers vLLM adds up the registries of its processes, and each would
report the same engine. A scrape therefore reads the counts from the engine (``ExpertClient``).
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tomoe_serving.api.expert_reports import ExpertReport


class ExpertCollector(Collector):
    """The metrics of one report."""

    def __init__(self, report: ExpertReport) -> None:
        self.report = report

    def collect(self) -> Iterator[Metric]:
        report = self.report
        tokens = CounterMetricFamily(
            "tomoe_expert_tokens",
            "Tokens (a count) that the layer's router sent to the expert since the start, of prompts and outputs, "
            "without padding and tokens found in the prefix cache.",
            labels=["layer", "expert"],
        )
        imbalance = GaugeMetricFamily(
            "tomoe_expert_load_imbalance",
            "Tokens of the layer's busiest expert over the mean of its experts (a ratio, 1 is balanced), over all "
            "tokens since the start.",
            labels=["layer"],
        )
        union = GaugeMetricFamily(
            "tomoe_neuron_union_ratio",
            "Share (0 to 1) of the layer's neurons that at least one token of a step uses, averaged over about 64 "
            "recent steps.",
            labels=["layer"],
        )
        paths = CounterMetricFamily(
            "tomoe_step_path",
            "Forward passes (a count) since the start by the execution path of the MLP: masked (vLLM's linear layers), "
            "shared_rows on CPUs, shared_gather, shared_dense or shared_grouped on GPUs, fused (vLLM's MoE).",
            labels=["path"],
        )
        for layer, row in enumerate(report.tokens):
            for expert, count in enumerate(row):
                tokens.add_metric([str(layer), str(expert)], count)
            if (ratio := report.load_imbalance[layer]) is not None:
                imbalance.add_metric([str(layer)], ratio)
                union.add_metric([str(layer)], report.neuron_union_ratio[layer])
        for path, count in sorted(report.step_paths.items()):
            paths.add_metric([path], count)
        yield from (tokens, imbalance, union, paths)


def exposition(report: ExpertReport) -> bytes:
    """The report in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(ExpertCollector(report))
    return generate_latest(registry)
