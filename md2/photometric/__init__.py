"""The fast engine of `md2/loss.py`: SSIM, reprojection, Triton kernels."""
