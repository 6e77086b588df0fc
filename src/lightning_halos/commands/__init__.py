"""The commands of ``lightning-halos``: a file for each has its summary, examples, arguments and function.

A command parses arguments, calls the package, prints and writes files; it computes nothing itself. It imports what it
needs when it runs, so that ``--help`` is fast and works without the optional packages.
"""
