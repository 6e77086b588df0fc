"""The connection to Lightning: the strategies, a worker's training loop, schedulers, and checkpoints.

Only this package and the callbacks use Lightning's Trainer. Algorithms are in ``core``, links in ``transport``.
"""
