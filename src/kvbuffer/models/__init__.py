"""Model architectures and the loader for Hugging Face checkpoints."""
