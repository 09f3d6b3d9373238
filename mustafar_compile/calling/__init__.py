"""What stands around a rewritten graph: what it is compiled with, and what happens at each call."""
