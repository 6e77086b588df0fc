"""Predicts how an algorithm would run on a described cluster, without training anything.

It reads ``simulation`` and draws and prints what it finds. Nothing else imports it but the command line.
"""
