"""Which request may run now: queue, measured step time, SLO."""
