"""The cost of programs, and the peak rates of chips."""
