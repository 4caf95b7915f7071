"""The parts of `scripts/gpu_check.py`, each a function that measures and adds rows to a session."""
