"""The MLP of ToMoE: its router, the three layouts of the experts, and the choice between them."""
