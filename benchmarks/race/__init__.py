"""The parts of ``benchmarks/network.py``: what is trained, how fast links should make it, the processes, the report."""
