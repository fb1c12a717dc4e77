"""The expert MLP on GPUs: Triton kernels, and the dispatch between them."""
