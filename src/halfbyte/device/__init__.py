"""The machine: instruction sets, cores, memory, torch devices."""
