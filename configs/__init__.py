"""Experiment configurations: each file has get_config(arg) and imports no JAX."""
