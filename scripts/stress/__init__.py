"""Parts of scripts/stress_registry.py. Only Python's standard library is needed."""
