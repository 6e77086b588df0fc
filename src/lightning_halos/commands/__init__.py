"""The commands of ``lightning-halos``. Each file has a function ``add``, which adds a parser, and one that runs it.

A command parses arguments, calls the package, prints and writes files; it computes nothing itself. It imports what it
needs when it runs, so that ``--help`` is fast and works without the optional packages.
"""
