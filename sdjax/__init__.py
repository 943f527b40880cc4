"""sdjax: Stable Diffusion in JAX and Flax, trained on pods and sampled at scale."""

__version__ = "0.1.0"
