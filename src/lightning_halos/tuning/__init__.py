"""Searches settings for a strategy on the virtual clock: the space, the trials, the study and the report.

It imports no strategy: the class to tune comes from its caller. Importing this package imports nothing else; the files
that need optuna, from the extra ``tune``, import it.
"""
