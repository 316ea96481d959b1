"""The commands. Each one reads its options and calls one function of the library."""
