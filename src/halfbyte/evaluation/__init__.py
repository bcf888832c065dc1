"""Measuring a model, its perplexity and throughput, and the samplers."""
