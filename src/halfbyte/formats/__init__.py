"""INT4 layouts on disk, one file each: `pack` and `unpack` are pure and inverse to each other."""
