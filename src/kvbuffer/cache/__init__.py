"""Where a request's memory lives: the plan, the pools, the tensors."""
