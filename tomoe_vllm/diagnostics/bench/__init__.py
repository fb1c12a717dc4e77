"""``tomoe bench``: dense and ToMoE of the same base, interleaved, with this machine's limit beside them."""
