"""How much a way of storing the cache changes what a model says. Scripts beside this folder print the tables."""
