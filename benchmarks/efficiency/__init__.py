"""The efficiency study: what users gain over what they would pick instead.

``case.py`` and ``runs.py``: what is measured, and the YAML file that tells it; ``measures.py``: how, a function for
each measure; ``processes.py`` and ``largest.py``: rows in processes of their own, and how large a batch may be;
``tables.py``, ``plots.py`` and ``report.py``: what is made of the rows.
"""
