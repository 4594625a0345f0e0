"""Sequence packing for attention kernels: the loader is being written; nothing is exported yet."""
