"""What the experts did: statistics, traces of single requests, and what a worker of vLLM answers about them."""
