"""From a dense checkpoint to a ToMoE adapter and checkpoint. Trains where vLLM is not installed."""
