"""A checkpoint replaces nothing until it is complete, and what was there before stays until then."""

import gc
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_halos.checkpoint import files
from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.manifest import NAME, Manifest
from lightning_halos.checkpoint.places import folder_of, is_complete, is_last, newest_complete
from lightning_halos.checkpoint.resume import available, find
from lightning_halos.checkpoint.saves import Save, Saves, State
from lightning_halos.checkpoint.writer import Writer, write_shard
from lightning_halos.core.messages import Marker

MANIFEST = Manifest("", "0.1.0", "HalosStrategy", [[0, 1]], {"elements": 3}, 0, None, [], [], {}, None)
NAMES = {"global.pt", "worker-0.pt"}


def begin(saves: Saves, path: Path, moment: str = "") -> Save:
    """Begins a save and writes its ``.ckpt`` file."""
    save = saves.begin(path, MANIFEST, NAMES, moment)
    save.hidden[path].write_text(save.marker.save)
    saves.file_written(save.marker.save, path)
    return save


def write_shards(saves: Saves, save: Save) -> None:
    saves.complete_manifest(save.marker.save, total=7, done=[(0, 7)])
    for name in sorted(NAMES):
        saves.written(write_shard(save.marker, name, {"value": 1}))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def complete(saves: Saves, save: Save) -> None:
    write_shards(saves, save)
    wait_for(lambda: save.state is State.COMPLETE)
    wait_until_idle(saves)


def wait_until_idle(saves: Saves) -> None:
    """Waits until the writer has done all that it was given."""
    done = threading.Event()
    saves.writer.submit(done.set, print)
    assert done.wait(30)


def saved(path: Path) -> Saves:
    saves = Saves()
    complete(saves, begin(saves, path))
    return saves


def usable(path: Path) -> bool:
    """Whether a run could resume from a file."""
    found = find(path, path.read_text())
    assert found is not None
    return all(found.read(name) == {"value": 1} for name in NAMES)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


def test_a_complete_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    saved(path)
    assert usable(path)
    assert is_complete(path)
    found = find(path, path.read_text())
    assert found is not None
    assert (found.manifest.total, found.manifest.done) == (7, [[0, 7]])


@pytest.mark.parametrize("name", ["step=1.ckpt", "step=2.ckpt", "last.ckpt", "hpc_ckpt_1.ckpt"])
def test_a_checkpoint_is_invisible_until_it_is_complete(tmp_path: Path, name: str) -> None:
    """Whatever its name, whether it is the first or a later one, and in which order its files are written."""
    saves, path = Saves(), tmp_path / name
    if name != "step=1.ckpt":
        complete(saves, begin(saves, tmp_path / "step=1.ckpt"))
    before = visible(tmp_path)
    save = begin(saves, path)
    assert save.state is State.PENDING
    saves.complete_manifest(save.marker.save, total=7)
    saves.written(write_shard(save.marker, "global.pt", {"value": 1}))
    wait_until_idle(saves)
    assert visible(tmp_path) == before
    saves.written(write_shard(save.marker, "worker-0.pt", {"value": 1}))
    wait_for(lambda: save.state is State.COMPLETE)
    assert usable(path)


@pytest.mark.parametrize("name", ["step=1.ckpt", "last.ckpt", "hpc_ckpt_1.ckpt"])
def test_a_file_may_be_shown_before_its_shards_are_complete(tmp_path: Path, name: str) -> None:
    """Unless a later run would choose it by its name."""
    saves, path = Saves(), tmp_path / name
    save = begin(saves, path)
    saves.show(save, path)
    assert path.exists() == (name == "step=1.ckpt")
    if path.exists():
        assert path.read_text() == save.marker.save
        with pytest.raises(CheckpointError, match=r"step=1.ckpt is incomplete"):
            usable(path)
    complete(saves, save)
    assert usable(path)
    assert sorted(file.name for file in Path(save.marker.folder).iterdir()) == sorted([*NAMES, NAME])
    newer = begin(saves, path)
    saves.show(newer, path)
    assert path.read_text() == save.marker.save


def test_a_file_that_is_shown_stays_without_shards_if_its_save_fails(tmp_path: Path) -> None:
    saves, path = Saves(), tmp_path / "step=1.ckpt"
    save = begin(saves, path)
    saves.show(save, path)
    with pytest.warns(UserWarning, match=r"step=1.ckpt is not complete"):
        saves.flush(0.0)
    assert find(path, path.read_text()) is None
    assert visible(tmp_path) == ["step=1.ckpt"]


def test_the_ckpt_file_may_be_written_after_all_shards(tmp_path: Path) -> None:
    saves, path = Saves(), tmp_path / "step=1.ckpt"
    save = saves.begin(path, MANIFEST, NAMES)
    write_shards(saves, save)
    wait_until_idle(saves)
    assert not path.exists()
    save.hidden[path].write_text(save.marker.save)
    saves.file_written(save.marker.save, path)
    saves.flush(10)
    assert usable(path)


def test_a_file_of_the_same_name_is_replaced_when_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    saves = saved(path)
    first = path.read_text()
    save = begin(saves, path)
    assert (path.read_text(), usable(path)) == (first, True)
    complete(saves, save)
    assert path.read_text() == save.marker.save != first
    assert usable(path)
    assert [folder.name for folder in folder_of(path).iterdir()] == [save.marker.save]  # nothing piles up


@pytest.mark.parametrize("name", ["last.ckpt", "step=2.ckpt"])
def test_a_crash_at_any_moment_leaves_a_complete_checkpoint(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every state of the disk while one checkpoint follows another, as a crash would leave it."""
    folder, crashed = tmp_path / "run", []

    def crash() -> None:
        crashed.append(tmp_path / f"crash {len(crashed)}")
        shutil.copytree(folder, crashed[-1])

    def crashing(module: object, function: str) -> None:
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *args, **kwargs: (crash(), original(*args, **kwargs), crash())[1])

    folder.mkdir()
    old = folder / "last.ckpt"
    saves = saved(old)
    for module, function in [(os, "replace"), (shutil, "rmtree"), (files, "sync_folder")]:
        crashing(module, function)
    save = begin(saves, folder / name)
    if name != old.name:
        saves.remove(old, old.unlink)  # as ModelCheckpoint does right after saving
    complete(saves, save)
    assert len(crashed) > 12
    for copy in crashed:
        left = list(copy.glob("*.ckpt"))
        # While a replaced checkpoint is removed, its shards go after its file; the successor is complete by then.
        assert left
        assert all(usable(path) for path in left)
    assert visible(folder) == [name]
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [Path(name).stem]


@pytest.mark.parametrize("name", sorted([*NAMES, NAME]))
def test_every_file_cut_off_at_any_byte_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "step=1.ckpt"
    saved(path)
    (folder,) = (tmp_path / "step=1").iterdir()
    content = (folder / name).read_bytes()
    for end in {0, 1, 10, len(content) // 3, len(content) // 2, len(content) - 1}:
        (folder / name).write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=name):
            usable(path)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        usable(path)


def test_a_shard_that_cannot_be_written_is_a_warning_and_the_older_checkpoint_stays(tmp_path: Path) -> None:
    old, path = tmp_path / "step=1.ckpt", tmp_path / "step=2.ckpt"
    saves = saved(old)
    save = begin(saves, path)
    saves.remove(old, old.unlink)
    saves.complete_manifest(save.marker.save, total=9)
    (Path(save.marker.folder) / "global.pt").mkdir()  # in its place
    with pytest.warns(UserWarning, match=r"step=2.ckpt is not complete: .*global.pt could not be written"):
        saves.written(write_shard(save.marker, "global.pt", {"value": 1}))
    assert saves.in_flight  # worker 0 still has its part in memory
    saves.written(write_shard(save.marker, "worker-0.pt", {"value": 1}))
    assert not saves.in_flight
    assert save.state is State.FAILED
    assert usable(old)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step=1", "step=1.ckpt"]  # nothing is left of it
    complete(saves, begin(saves, tmp_path / "step=3.ckpt"))
    assert visible(tmp_path) == ["step=3.ckpt"]  # now the old one is replaced


def test_an_older_checkpoint_stays_if_the_newer_one_has_failed_by_the_time_it_is_to_be_removed(tmp_path: Path) -> None:
    old = tmp_path / "step=1.ckpt"
    saves = saved(old)
    begin(saves, tmp_path / "step=2.ckpt")
    with pytest.warns(UserWarning, match=r"step=2.ckpt is not complete"):
        saves.flush(0.0)
    saves.remove(old, old.unlink)
    assert usable(old)
    complete(saves, begin(saves, tmp_path / "step=3.ckpt"))
    assert visible(tmp_path) == ["step=3.ckpt"]


def test_while_one_save_is_in_flight_the_next_is_left_out_and_what_it_replaces_stays(tmp_path: Path) -> None:
    saves, paths = saved(tmp_path / "step=1.ckpt"), [tmp_path / f"step={number}.ckpt" for number in range(5)]
    assert not saves.in_flight
    second = begin(saves, paths[2])
    saves.remove(paths[1], paths[1].unlink)
    assert saves.in_flight
    with pytest.warns(UserWarning, match=r"step=3.ckpt is not complete: an earlier one is not yet.*It is left out"):
        saves.leave_out(paths[3])
    saves.remove(paths[2], paths[2].unlink)  # as if step=3 were there
    complete(saves, second)
    assert visible(tmp_path) == ["step=2.ckpt"]
    fourth = begin(saves, paths[4])
    saves.remove(paths[3], lambda: None)
    assert visible(tmp_path) == ["step=2.ckpt"]
    complete(saves, fourth)
    assert visible(tmp_path) == ["step=4.ckpt"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step=4"]


def test_saves_that_are_always_left_out_in_between_do_not_fill_the_disk(tmp_path: Path) -> None:
    """As of a ModelCheckpoint(save_top_k=1) that saves twice in the time that a save takes."""
    saves, paths = Saves(), [tmp_path / f"step={number}.ckpt" for number in range(12)]
    for number in range(0, 12, 2):
        save = begin(saves, paths[number])
        if number:
            saves.remove(paths[number - 1], lambda: None)
        with pytest.warns(UserWarning, match="It is left out"):
            saves.leave_out(paths[number + 1])
        saves.remove(paths[number], paths[number].unlink)
        complete(saves, save)
        assert visible(tmp_path) == [paths[number].name]
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [paths[number].stem]


def test_two_files_of_one_moment_are_one_save(tmp_path: Path) -> None:
    """As ModelCheckpoint(save_last=True) asks for them. Each has all shards, whatever becomes of the other one."""
    saves, path, last = Saves(), tmp_path / "step=1.ckpt", tmp_path / "last.ckpt"
    save = begin(saves, path, "step 1")
    assert saves.pending("step 1") is save
    assert saves.pending("step 2") is None
    assert begin(saves, last, "step 1") is save
    assert visible(tmp_path) == []
    complete(saves, save)
    assert usable(path)
    assert usable(last)
    shards = [folder / save.marker.save / "global.pt" for folder in (folder_of(path), folder_of(last))]
    assert shards[0].samefile(shards[1])  # on the disk once
    saves.remove(path, path.unlink)
    assert visible(tmp_path) == ["last.ckpt"]
    assert usable(last)


def test_a_file_whose_shards_another_file_shares_on_the_disk_of_another_machine(tmp_path: Path) -> None:
    saves, path, last = Saves(), tmp_path / "step=1.ckpt", tmp_path / "last.ckpt"
    save = begin(saves, path, "step 1")
    begin(saves, last, "step 1")
    complete(saves, save)
    (folder_of(last) / save.marker.save / "worker-0.pt").unlink()  # it was written elsewhere, under the first name
    assert usable(last)


def test_a_moment_that_is_over_cannot_be_joined(tmp_path: Path) -> None:
    saves = Saves()
    save = begin(saves, tmp_path / "step=1.ckpt", "step 1")
    complete(saves, save)
    assert saves.pending("step 1") is None
    assert begin(saves, tmp_path / "last.ckpt", "step 1") is not save


def test_a_link_leads_to_a_complete_checkpoint_at_any_time(tmp_path: Path) -> None:
    """Like the link of ModelCheckpoint(save_last="link"): a dangling link would make a run start from scratch."""
    saves, last = Saves(), tmp_path / "last.ckpt"
    first = begin(saves, tmp_path / "step=1.ckpt")
    saves.link(tmp_path / "step=1.ckpt", last)
    assert not last.is_symlink()
    complete(saves, first)
    assert usable(last)
    second = begin(saves, tmp_path / "step=2.ckpt")
    saves.link(tmp_path / "step=2.ckpt", last)
    assert last.resolve() == tmp_path / "step=1.ckpt"
    complete(saves, second)
    assert last.resolve() == tmp_path / "step=2.ckpt"
    assert usable(last)
    saves.link(tmp_path / "step=3.ckpt", last)  # which was left out
    assert last.resolve() == tmp_path / "step=2.ckpt"
    saves.link(tmp_path / "step=1.ckpt", last)
    assert last.resolve() == tmp_path / "step=1.ckpt"


@pytest.mark.parametrize("where", ["begun", "complete"])
def test_where_links_are_not_possible_it_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def symlink_to(*_: object) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    saves, last = Saves(), tmp_path / "last.ckpt"
    last.mkdir()  # as a strategy that divides the model leaves it
    save = begin(saves, tmp_path / "step=1.ckpt")
    if where == "begun":
        saves.link(tmp_path / "step=1.ckpt", last)
    complete(saves, save)
    if where == "complete":
        saves.link(tmp_path / "step=1.ckpt", last)
    assert last.read_text() == save.marker.save
    assert not saves.in_flight
    assert visible(tmp_path) == ["last.ckpt", "step=1.ckpt"]


def test_a_link_that_cannot_be_made_is_a_warning_and_the_save_is_complete(tmp_path: Path) -> None:
    saves = Saves()
    save = begin(saves, tmp_path / "step=1.ckpt")
    saves.link(tmp_path / "step=1.ckpt", tmp_path / "nowhere" / "last.ckpt")
    with pytest.warns(UserWarning, match=r"last.ckpt could not be made a link to step=1.ckpt"):
        complete(saves, save)
    assert not saves.under_way
    assert usable(tmp_path / "step=1.ckpt")


def test_a_save_that_joins_none_may_begin_while_another_is_in_flight(tmp_path: Path) -> None:
    """That of a preemption, which must not wait."""
    old = tmp_path / "step=0.ckpt"
    saves = saved(old)
    first, urgent = begin(saves, tmp_path / "step=1.ckpt"), begin(saves, tmp_path / "last-preempted.ckpt")
    saves.remove(old, old.unlink)
    complete(saves, urgent)
    assert usable(tmp_path / "last-preempted.ckpt")
    assert not old.exists()
    complete(saves, first)
    assert visible(tmp_path) == ["last-preempted.ckpt", "step=1.ckpt"]


def test_a_shard_that_does_not_come_is_waited_for_no_longer_than_the_limit(tmp_path: Path) -> None:
    saves = Saves()
    save = begin(saves, tmp_path / "step=1.ckpt")
    saves.complete_manifest(save.marker.save, total=1)
    saves.written(write_shard(save.marker, "global.pt", {"value": 1}))
    with pytest.warns(UserWarning, match=r"step=1.ckpt is not complete: worker-0.pt did not arrive within 0.2 s"):
        saves.flush(0.2)
    assert not saves.in_flight
    assert list(tmp_path.iterdir()) == []


def test_a_wait_for_saves_can_be_interrupted(tmp_path: Path) -> None:
    saves = Saves()
    begin(saves, tmp_path / "step=1.ckpt")

    def interrupted() -> None:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        saves.flush(60, interrupted=interrupted)


def test_a_save_that_is_given_up_while_it_is_being_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves, write = Saves(), Manifest.write

    def late(manifest: Manifest, folder: Path) -> None:
        write(manifest, folder)
        with pytest.warns(UserWarning, match="did not arrive within 0 s"):
            saves.give_up(0)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", late)
        save = begin(saves, tmp_path / "step=1.ckpt")
        write_shards(saves, save)
        wait_until_idle(saves)
    assert save.state is State.FAILED
    assert list(tmp_path.iterdir()) == []
    complete(saves, begin(saves, tmp_path / "step=2.ckpt"))
    assert usable(tmp_path / "step=2.ckpt")


class AnythingError(BaseException):
    """What nobody expects."""


def test_whatever_the_writer_stumbles_over_is_a_failed_save_and_the_next_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saves = Saves()

    def broken(*_: object) -> None:
        raise AnythingError("the cat sat on the disk")

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", broken)
        write_shards(saves, save := begin(saves, tmp_path / "step=1.ckpt"))
        with pytest.warns(UserWarning, match=r"step=1.ckpt is not complete: .*the cat"):
            wait_until_idle(saves)
    assert save.state is State.FAILED
    assert "AnythingError" in caplog.text  # with its traceback
    complete(saves, begin(saves, tmp_path / "step=2.ckpt"))
    assert usable(tmp_path / "step=2.ckpt")


def test_a_shard_whose_writing_raises_anything_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AnythingError("the cat sat on the disk")

    writer, told = Writer(), []
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_state", broken)
        writer.shard(Marker("a" * 12, str(tmp_path)), "worker-1.pt", {}, told.append)
        wait_for(lambda: bool(told))
    (message,) = told
    assert (message.save, message.name, message.size) == ("a" * 12, "worker-1.pt", 0)
    assert message.error == "worker-1.pt: AnythingError('the cat sat on the disk')"
    writer.shard(Marker("a" * 12, str(tmp_path)), "worker-1.pt", {}, told.append)
    wait_for(lambda: len(told) == 2)
    assert told[1].error == ""


def test_a_writer_that_cannot_even_report_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    writer, done = Writer(), threading.Event()

    def broken(*_: object) -> None:
        raise AnythingError("the link is broken")

    writer.submit(broken, broken)
    writer.submit(done.set, print)
    assert done.wait(30)
    assert "could not be reported" in caplog.text


def test_threads_that_submit_the_first_jobs_at_the_same_moment_share_a_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else jobs would run at the same time, and an older checkpoint could replace a newer one."""
    writer, together, made, ran = Writer(), threading.Barrier(2), list[str](), set[int]()
    start = threading.Thread

    def slowly(*, name: str, **more: Any) -> threading.Thread:
        made.append(name)
        time.sleep(0.2)  # as if another thread went on here
        return start(name=name, **more)

    def submit() -> None:
        together.wait(30)
        writer.submit(lambda: ran.add(threading.get_ident()), print)

    threads = [start(target=submit, daemon=True) for _ in range(2)]
    monkeypatch.setattr(threading, "Thread", slowly)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    done = threading.Event()
    writer.submit(done.set, print)
    assert done.wait(30)
    assert made == ["halos writer"]
    assert len(ran) == 1


def test_a_writer_that_nobody_has_any_more_does_what_is_left_and_ends() -> None:
    writer, go_on, done = Writer(), threading.Event(), threading.Event()
    writer.submit(lambda: go_on.wait(30) and None, print)
    writer.submit(done.set, print)
    thread = writer._thread
    assert thread is not None
    del writer
    gc.collect()
    go_on.set()
    thread.join(30)
    assert done.is_set()
    assert not thread.is_alive()


def test_another_name_of_a_checkpoint_is_the_same_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path / "step=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    (tmp_path / "copy.ckpt").write_text((tmp_path / "step=1.ckpt").read_text())
    assert usable(tmp_path / "last.ckpt")
    assert usable(tmp_path / "copy.ckpt")


def test_a_file_that_was_taken_elsewhere_has_no_shards(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    saved(tmp_path / "here" / "step=1.ckpt")
    (tmp_path / "step=1.ckpt").write_text((tmp_path / "here" / "step=1.ckpt").read_text())
    assert find(tmp_path / "step=1.ckpt", (tmp_path / "step=1.ckpt").read_text()) is None


def test_a_manifest_of_another_save_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    saved(path)
    (folder,) = (tmp_path / "step=1").iterdir()
    fields = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**fields, "save": "another"}))
    with pytest.raises(CheckpointError, match="belongs to another save"):
        usable(path)


def test_a_later_format_is_refused_with_its_version(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    saved(path)
    (folder,) = (tmp_path / "step=1").iterdir()
    fields = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**fields, "format": 99, "version": "7.0"}))
    with pytest.raises(CheckpointError, match=r"has format 99, written by lightning-halos 7.0"):
        usable(path)


def test_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    for number in (1, 2):
        saved(tmp_path / f"step={number}.ckpt")
        time.sleep(0.02)
    begin(Saves(), tmp_path / "last.ckpt")
    (tmp_path / "step=3" / "0").mkdir(parents=True)
    (tmp_path / "step=3" / "0" / NAME).symlink_to("what is removed meanwhile")
    assert newest_complete(tmp_path / "last.ckpt") == tmp_path / "step=2.ckpt"
    assert newest_complete(tmp_path / "step=2.ckpt") == tmp_path / "step=1.ckpt"
    assert [is_last(Path(name)) for name in ("last.ckpt", "last-v1.ckpt", "step=1.ckpt")] == [True, True, False]


def test_what_lightning_chooses_in_slurm_by_the_name_of_a_folder(tmp_path: Path) -> None:
    path, other = tmp_path / "hpc_ckpt_1.ckpt", tmp_path / "step=1.ckpt"
    begin(Saves(), path)  # and then the job was killed
    assert folder_of(path).is_dir()
    with pytest.raises(CheckpointError, match=f"hpc_ckpt_1.ckpt was never completed.*Remove {folder_of(path)}"):
        available(path)
    saved(other)
    with pytest.warns(UserWarning, match=f"hpc_ckpt_1.ckpt was never completed.*{other} is used instead"):
        assert available(path) == other
    saved(path)
    assert available(path) == path


def test_nothing_is_said_when_all_is_well(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved(tmp_path / "step=1.ckpt")


def test_a_save_that_begins_while_an_older_one_of_its_name_is_being_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, path = saved(tmp_path / "last.ckpt"), tmp_path / "last.ckpt"
    write, newer = Manifest.write, []

    def begin_another(manifest: Manifest, folder: Path) -> None:
        write(manifest, folder)
        newer.append(begin(saves, path))

    older = begin(saves, path)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", begin_another)
        write_shards(saves, older)
        wait_until_idle(saves)
    assert older.state is State.COMPLETE
    assert usable(path)
    complete(saves, newer[0])
    assert path.read_text() == newer[0].marker.save
    assert usable(path)


def test_what_users_keep_in_a_folder_of_that_name_stays(tmp_path: Path) -> None:
    saves, path = Saves(), tmp_path / "step=1.ckpt"
    other = tmp_path / "step=1" / "exported" / "model.safetensors"
    other.parent.mkdir(parents=True)
    other.touch()
    complete(saves, begin(saves, path))
    complete(saves, begin(saves, path))
    saves.remove(path, path.unlink)
    assert [*path.with_suffix("").rglob("*")] == [other.parent, other]
