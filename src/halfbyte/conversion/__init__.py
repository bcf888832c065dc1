"""From one layout on disk to another, and whether what is on disk is sound."""
