"""A job that is one region of a run, where it needs no global server, or finds none."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_halos import cli
from lightning_halos.transport.errors import PeerLostError
from tests.integration.conftest import Run
from tests.integration.harness import Result, free_port, torchrun_environments
from tests.integration.toys import Toy, halos, loader, make_trainer


def alone(folder: str, port: int) -> Result:
    """Validates, and tries to fit: with a callback that is refused, and without a server."""
    strategy = {"server": f"localhost:{port}", "keys": f"{folder}/us.pem", "regions": None, "timeout": 2}
    module = Toy()
    (found,) = make_trainer(halos(**strategy), devices="auto").validate(module, loader(60), verbose=False)
    averaging = StochasticWeightAveraging(swa_lrs=1e-2)
    refused = make_trainer(halos(**strategy), devices="auto", max_steps=4, callbacks=[averaging])
    with pytest.raises(ValueError, match="StochasticWeightAveraging keeps an average in one process"):
        refused.fit(module, loader())
    with pytest.raises((PeerLostError, RuntimeError)) as error:
        make_trainer(halos(**strategy), devices="auto", max_steps=4).fit(module, loader())
    return {"loss": found["val_loss"], "validated_on": module.validated_on[0], "error": str(error.value)}


def test_validation_is_of_the_job_alone_and_a_server_that_is_away_is_named(run: Run, tmp_path: Path) -> None:
    assert cli.main(["keys", "init", str(tmp_path), "--host", "localhost"]) == 0
    assert cli.main(["keys", "region", str(tmp_path), "us"]) == 0
    results = run(alone, str(tmp_path), port := free_port(), environments=torchrun_environments(1, 2))
    assert sorted(sample for result in results for sample in result["validated_on"]) == list(range(60))
    for result in results:
        assert result["loss"] == results[0]["loss"]
        assert f"The global server localhost:{port} could not be reached within timeout=2 s" in result["error"]
        assert "nothing listens there" in result["error"]
    for result in results[1:]:
        assert result["error"].startswith("rank 0 (region us) cannot join the run: ")
