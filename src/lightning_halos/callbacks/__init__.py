"""Callbacks for users. They read the strategy's state and never change the training."""
