"""Linear-attention operators and the dense kernels around them: pure functions of tensors."""
