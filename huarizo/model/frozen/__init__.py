"""Linear layers of the frozen base in a storage of their own: int8, with both of their products."""
