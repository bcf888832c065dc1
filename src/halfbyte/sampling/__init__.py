"""From logits to a token: repetition penalty, temperature, top-k, top-p, min-p, one draw."""
