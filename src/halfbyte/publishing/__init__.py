"""A checkpoint on its way to others: re-sharded copies, the model card, the hub."""
