"""Reads foreign text and files in a child process with limits on time and memory, which can be killed."""
