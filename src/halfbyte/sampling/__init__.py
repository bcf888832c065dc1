"""From logits to a token: temperature, top-k, top-p."""
