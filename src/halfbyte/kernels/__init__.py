"""The operations a model runs on, each with its reference, its fast implementations and what each supports."""
