"""Values of the Triton kernels in Triton's interpreter: tests/test_interpreted.py runs these in another process."""
