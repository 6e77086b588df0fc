"""Runs under a virtual clock: the nodes of ``core``, with messages delivered at the times of a described cluster.

No threads, no Lightning and no links: ``training.worlds.simulated`` connects a network to real worker processes.
"""
