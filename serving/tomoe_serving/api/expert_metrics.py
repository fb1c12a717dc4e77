"""The experts' Prometheus metrics, shown on ``/metrics`` behind vLLM's own.

Why not a stat logger of vLLM's: it is told what the scheduler knows, and experts are chosen in the workers. Why not the
default registry: with several API servers vLLM sums the registries of its processes, and each of them would report the
same engine. So a scrape asks the engine (``ExpertClient``), and its absolute values are appended to vLLM's text.
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
            "Tokens (a count) that the layer's router sent to the expert since the start: prompts and answers, without "
            "padding and without what the prefix cache had.",
            labels=["layer", "expert"],
        )
        imbalance = GaugeMetricFamily(
            "tomoe_expert_load_imbalance",
            "Tokens of the layer's busiest expert over the mean of its experts (a ratio, 1 is even), over all tokens "
            "since the start.",
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
            "Forward passes (a count) since the start by the way they took through the MLP's weights: masked (all of "
            "them), shared_rows on CPUs, shared_gather, shared_dense or shared_grouped on GPUs, fused (vLLM's MoE).",
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
