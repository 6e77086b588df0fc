"""What the processes of tests have imported when they are forked.

Nothing of it can go away, so garbage collections need not look at it: that would copy most of it into each process.
"""

import gc

import pytest  # noqa: F401
import torchmetrics  # noqa: F401

import lightning_halos.cli  # noqa: F401
import tests.star.roles  # noqa: F401

gc.collect()
gc.freeze()
