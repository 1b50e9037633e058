"""Concurrent computation of quasi-independent layers: plans, their choice, and what they cost in quality."""
