"""The paper's environment, as the file that ships with the examples describes it."""

from pathlib import Path

from lightning_halos.simulation.cluster import SimulatedCluster

PAPER_FILE = Path(__file__).parents[2] / "examples" / "clusters" / "paper.yaml"
PAPER = SimulatedCluster.from_yaml(PAPER_FILE)
