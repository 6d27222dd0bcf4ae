"""Heat maps, curves and strips, in the terminal and as files."""
