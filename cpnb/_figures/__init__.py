"""Behind `cpnb.plots`: style, curves over ranks, and pictures of kernels."""
