"""Fine-tuning for scientific foundation models, as fast as the GPU allows, inside the memory you have."""

__version__ = "0.1.0"
