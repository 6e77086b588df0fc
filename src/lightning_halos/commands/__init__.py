"""The commands of ``lightning-halos``, one a file: a function ``add`` that adds its parser, and one that runs it.

Rules of this room: a command reads arguments, calls, prints and writes files. It imports what it needs when it runs.
"""
