"""What can be said of a model from its config alone: which layers are compressed, and what memory it takes."""
