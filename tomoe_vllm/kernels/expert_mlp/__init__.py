"""The MLP of ToMoE on one copy of the weights."""
