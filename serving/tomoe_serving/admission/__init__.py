"""When a sequence may run: slots, queue, measured step times, and the SLO for the time per output token."""
