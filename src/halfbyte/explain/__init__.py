"""Lessons that run halfbyte's own code on real bytes and narrate it; each asserts what it shows."""
