"""Sends messages between processes, and hosts the nodes of ``core``.

This package uses process groups and threads, but not Lightning. Nothing that arrives is unpickled. Every wait of a
process's main thread ends: at a time limit, or with the alarm that a lost peer sets off.
"""
