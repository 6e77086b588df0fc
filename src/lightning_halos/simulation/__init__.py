"""Simulation: the same servers, strategies and Trainer processes under the virtual clock of a described cluster.

Rules of this room: time is a number here. ``cluster`` describes, ``timing`` says how long things take, ``rounds`` says
who works when, ``world`` delivers messages in that order, and ``planner`` asks the same questions without training.
"""
