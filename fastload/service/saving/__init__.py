"""Checkpoints on their way to the store, carried by the service."""
