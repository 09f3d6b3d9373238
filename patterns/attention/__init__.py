"""Reading attention: every spelling becomes one ``Attention``."""
