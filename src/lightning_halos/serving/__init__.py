"""The global server as a process of its own, ``lightning-halos serve``, for regions that are jobs of their own.

It needs no GPU, no LightningModule and no data. The decisions are those of the nodes in ``core``; here are the clock,
the disk, and what the operator sees.
"""
