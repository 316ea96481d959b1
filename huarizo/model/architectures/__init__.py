"""The supported architectures as data: one file each, and the registry of them."""
