"""InstCache: instructions predicted before they arrive, and answered from a table (Zou et al., arXiv 2411.13820)."""
