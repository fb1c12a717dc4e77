"""The op on GPUs: Triton kernels, their dispatch thresholds per device, and the record of their validation."""
