"""The algorithm and all decisions of a run, without I/O.

This package imports only torch, and nothing else of lightning_halos: no sockets, threads, clock or Lightning. Its nodes
take a message and return messages, so that real processes and simulations can use the same code.
"""
