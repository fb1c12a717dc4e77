"""Values of the Triton kernels in Triton's interpreter. test_interpreted.py runs these files in new processes."""
