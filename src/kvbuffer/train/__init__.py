"""Training, and the multi-level operators that grow and shrink checkpoints. Nothing of the server imports this."""
