"""Fine-tuning for scientific foundation models, fast and inside the memory you have."""

__version__ = "0.1.0"
