"""Runs under a virtual clock: the nodes of ``core``, with messages delivered at the times of a described cluster.

This package has no threads, links or Lightning. ``training.worlds.simulated`` connects it to real worker processes.
"""
