"""How a budget of bytes is spread over layers, keys and values, and codes, by what texts of the user's own lose.

One forward and one backward of a text say how much an error of each attention's output weighs (``sensitivity.py``).
What each way of storing (``candidates.py``) puts that output off is computed from the same forward (``errors.py``). So
the loss of every candidate of every KV head is known (``measured.py``). Losses and bytes add up: an allocation
(``allocation.py``) chooses, for whole layers or for two groups of the heads of each (``grouping.py``).
"""
