"""Predicts how an algorithm would run on a described cluster, without training anything.

It uses ``simulation`` to compute durations, and writes tables, pictures and timelines. Only the command line imports
it.
"""
