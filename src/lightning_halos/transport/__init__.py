"""Sends messages between processes, and hosts the nodes of ``core``.

This package uses process groups and threads, but not Lightning. Nothing that arrives is unpickled, and every wait has a
time limit.
"""
