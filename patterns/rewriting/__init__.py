"""Matches become a graph over compressed buffers, and the plan to call it."""
