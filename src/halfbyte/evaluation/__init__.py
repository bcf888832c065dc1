"""Measuring a model: perplexity and throughput."""
