"""The linear-attention operators as Triton kernels, for GPUs."""
