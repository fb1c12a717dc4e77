"""Products of 16-bit hidden states and float32 weights in Triton, as accurate as float32. Used by the routers."""
