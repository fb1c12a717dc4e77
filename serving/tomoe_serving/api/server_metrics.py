"""Prometheus metrics of the compute budget: slots, queue, time per output token, refused requests."""

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from tomoe_serving.api.compute_budget import BudgetSource


class ServerMetrics:
    """Prometheus collector; vLLM's ``/metrics`` exports the registry it is in."""

    def __init__(self, source: BudgetSource) -> None:
        self.source = source

    def collect(self):
        """Called at each scrape."""
        budget = self.source.read()
        gauges = {
            "tomoe_sequences_running": ("Sequences that hold a slot", budget.in_use.running),
            "tomoe_sequences_waiting": ("Sequences that wait for a slot", budget.in_use.waiting),
            "tomoe_sequences_capacity": ("Sequences that can run at once", budget.capacity.max_sequences),
            "tomoe_active_parameters_per_token": ("Parameters that a token uses", budget.cost.active_parameters),
            "tomoe_tpot_slo_ms": ("Target for the time per output token", budget.capacity.tpot_slo_ms),
            "tomoe_tpot_observed_ms": ("Time per output token, recent mean", budget.in_use.observed_tpot_ms),
            "tomoe_capacity_tokens_per_second": (
                "Modelled output with all slots in use",
                budget.capacity.tokens_per_s,
            ),
        }
        for name, (text, value) in gauges.items():
            if value is not None:
                yield GaugeMetricFamily(name, text, value=float(value))
        refused = CounterMetricFamily("tomoe_requests_refused", "Requests refused, by reason", labels=["reason"])
        for reason, count in budget.in_use.refused.items():
            refused.add_metric([reason], count)
        yield refused


def register_metrics(source: BudgetSource) -> None:
    """Add :class:`ServerMetrics` to the default registry of the process."""
    REGISTRY.register(ServerMetrics(source))
