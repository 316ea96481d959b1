"""The commands: what can be typed. Each one reads its options and calls one function of the library."""
