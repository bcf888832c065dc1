"""From logits to a token: repetition penalty, filters, one draw; and the rejection of drafted tokens."""
