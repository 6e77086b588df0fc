"""Lightning: the strategies, a worker's training loop, schedulers, and saving.

Only this package and the callbacks know Lightning's Trainer. Algorithms are in ``core``, connections in ``transport``.
"""
