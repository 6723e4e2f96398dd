"""What `md2/loss.py` stands on: its inputs and output, tie-breaking noise, and the fast engine with Triton kernels."""
