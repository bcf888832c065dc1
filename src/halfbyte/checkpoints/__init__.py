"""Checkpoints on disk: lazy reading, atomic writing, and finding the model a user named."""
