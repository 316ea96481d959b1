"""The command line. Each command reads its options and calls the library."""
