"""Benchmarks that users run: ``kvbuffer bench``."""
