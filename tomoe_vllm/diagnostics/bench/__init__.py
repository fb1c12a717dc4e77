"""``tomoe bench``: speed and memory of a dense model and of ToMoE made from it, measured alternately."""
