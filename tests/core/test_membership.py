"""A star of jobs: members join, leave, are cut off, are lost and return, and so does the global server."""

from __future__ import annotations

from lightning_halos.core.messages import Pull
from lightning_halos.core.protocol import GlobalState
from tests.core.star import Star


def test_a_run_of_two_jobs_from_the_first_join_to_the_final_model() -> None:
    star = Star(min_regions=2)
    first = star.job("eu")
    assert first.node is None
    second = star.job("us")
    assert first.node is not None
    assert second.node is not None
    for _ in range(4):
        for job in (first, second):
            assert isinstance(job.push(), Pull)
            star.check()
    first.push(stop=True, final=True)
    assert star.node.state is GlobalState.STOPPING
    second.push(final=True)
    assert star.node.state is GlobalState.FINISHED
    for job in (first, second):
        assert job.final().vector.tolist() == star.node.model.tolist()
        assert (job.final().position, job.final().stopped) == (20, True)
    assert star.node.budget.total == star.node.server.steps == 40


def test_a_job_that_does_not_decide_leaves_instead_of_stopping_the_run() -> None:
    star = Star(min_regions=2)
    first, second = star.job("eu"), star.job("us")
    for job in (first, second):
        job.push()
    second.push(stop=True, final=True)
    assert star.node.state is GlobalState.RUNNING
    assert (second.final().final, second.final().stopped) == (True, False)
    assert isinstance(first.push(), Pull)
    first.push(stop=True, final=True)
    assert star.node.state is GlobalState.FINISHED
    assert first.final().stopped
