"""Foreign text and files are read in a child process, which may take so much time and memory and can be killed."""
