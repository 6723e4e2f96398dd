"""The fast engine of `md2/loss.py`: photometric error, reprojection, Triton kernels."""
