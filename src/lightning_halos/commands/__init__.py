"""The commands of ``lightning-halos``: a file for each has its summary, examples, arguments and function.

A command parses arguments, calls the package, prints and writes files; it computes nothing itself. It imports optional
and slow packages when it runs, so that ``--help`` is fast and works without them. What several commands share is in
``inputs``.
"""
