"""Training data that all workers share."""
