"""The MLP of ToMoE: the router, three layouts of the experts, and the choice between them."""
