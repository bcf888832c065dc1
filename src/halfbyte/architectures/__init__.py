"""The model's shape without its weights: skeleton, decoder blocks, names on disk."""
