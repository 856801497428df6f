"""Language models that read a stream without an end: architectures, training and evaluation in JAX."""

__version__ = "0.1.0"
