"""Graphs in one vocabulary, and questions about their nodes, sizes and views."""
