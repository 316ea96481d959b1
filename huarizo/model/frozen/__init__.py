"""The frozen base's linear layers in a quantised storage: int8, with both of their products."""
