"""The slot engine: continuous batching on a plain transformers model."""
