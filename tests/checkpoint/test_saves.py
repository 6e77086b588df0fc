"""A checkpoint counts only if it is complete, and the previous one stays until then."""

import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.manifest import NAME, Manifest
from lightning_halos.checkpoint.places import is_last, newest_whole
from lightning_halos.checkpoint.resume import find
from lightning_halos.checkpoint.saves import Save, Saves
from lightning_halos.checkpoint.writer import write_shard
from lightning_halos.core.messages import ShardWritten

MANIFEST = Manifest("", "0.1.0", "HalosStrategy", [[0, 1]], {"elements": 3}, 0, None, [], [], {}, None)
NAMES = {"global.pt", "worker-0.pt"}


def begin(saves: Saves, path: Path) -> Save:
    save = saves.begin(path, MANIFEST, NAMES)
    save.written_to.write_text(save.marker.save)
    saves.file_written(save.marker.save)
    return save


def complete(saves: Saves, save: Save, but: Sequence[Save] = ()) -> None:
    saves.know(save.marker.save, total=7, done=[(0, 7)])
    for name in NAMES:
        saves.written(write_shard(save.marker, name, {"value": 1}))
    saves.flush(10, but)


def whole(path: Path) -> Saves:
    saves = Saves()
    complete(saves, begin(saves, path))
    return saves


def usable(path: Path) -> bool:
    """Whether a run could resume from a file."""
    found = find(path, path.read_text())
    assert found is not None
    return all(found.read(name) == {"value": 1} for name in NAMES)


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    whole(tmp_path / "step=1.ckpt")
    assert usable(tmp_path / "step=1.ckpt")
    found = find(tmp_path / "step=1.ckpt", (tmp_path / "step=1.ckpt").read_text())
    assert found is not None
    assert (found.manifest.total, found.manifest.done) == (7, [[0, 7]])


def test_the_first_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    """An incomplete first checkpoint would keep a run from starting, because there is no other to resume from."""
    saves, path = Saves(), tmp_path / "step=1.ckpt"
    save = begin(saves, path)
    saves.know(save.marker.save, total=7)
    saves.written(write_shard(save.marker, "global.pt", {"value": 1}))
    assert not path.exists()
    saves.written(write_shard(save.marker, "worker-0.pt", {"value": 1}))
    saves.flush(10)
    assert usable(path)


def test_a_later_file_is_there_at_once_and_half_written_until_all_shards_are(tmp_path: Path) -> None:
    saves, path = whole(tmp_path / "step=1.ckpt"), tmp_path / "step=2.ckpt"
    save = begin(saves, path)
    assert path.exists()
    with pytest.raises(CheckpointError, match=r"step=2.ckpt is half-written: .*manifest.json is missing"):
        find(path, path.read_text())
    complete(saves, save)
    assert usable(path)


@pytest.mark.parametrize("is_written_first", [True, False])
def test_a_file_is_there_when_another_one_is_whole(tmp_path: Path, is_written_first: bool) -> None:
    """A link named last.ckpt leads to the file: a dangling link would make a run start from scratch."""
    saves, path = Saves(), tmp_path / "step=2.ckpt"
    first, second = begin(saves, tmp_path / "step=1.ckpt"), saves.begin(path, MANIFEST, NAMES)
    if not is_written_first:
        complete(saves, first, [second])
    second.written_to.write_text(second.marker.save)
    saves.file_written(second.marker.save)
    if is_written_first:
        assert not path.exists()
        complete(saves, first, [second])
    assert path.exists()
    assert newest_whole(path) == first.path
    complete(saves, second)
    assert usable(path)


def test_the_file_of_a_first_save_that_fails_is_there(tmp_path: Path) -> None:
    saves, path = Saves(), tmp_path / "step=1.ckpt"
    begin(saves, path)
    with pytest.warns(UserWarning, match=r"step=1.ckpt is not whole"):
        saves.flush(0.0)
    with pytest.raises(CheckpointError, match="half-written"):
        find(path, path.read_text())


def test_a_file_of_slurm_is_there_at_once(tmp_path: Path) -> None:
    """Lightning looks at the names in the folder, and would not find the file."""
    begin(Saves(), tmp_path / "hpc_ckpt_1.ckpt")
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()


def test_a_file_of_the_same_name_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    saves = whole(path)
    first = path.read_text()
    save = begin(saves, path)
    assert (path.read_text(), usable(path)) == (first, True)
    complete(saves, save)
    assert path.read_text() == save.marker.save != first
    assert usable(path)
    assert [folder.name for folder in (tmp_path / "last").iterdir()] == [save.marker.save]  # nothing piles up


def test_the_file_may_be_written_after_all_shards(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    saves = whole(path)
    save = saves.begin(path, MANIFEST, NAMES)
    saves.know(save.marker.save, total=9)
    for name in NAMES:
        saves.written(write_shard(save.marker, name, {"value": 1}))
    saves.flush(0.2, but=[save])
    assert path.read_text() != save.marker.save
    save.written_to.write_text(save.marker.save)
    saves.file_written(save.marker.save)
    saves.flush(10)
    assert path.read_text() == save.marker.save
    assert usable(path)
    assert [folder.name for folder in (tmp_path / "last").iterdir()] == [save.marker.save]


@pytest.mark.parametrize("name", ["last.ckpt", "step=2.ckpt"])
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, name: str) -> None:
    """Every state of the disk while one checkpoint follows another, as a crash would leave it."""
    old = tmp_path / "last.ckpt"
    saves = whole(old)
    save = begin(saves, tmp_path / name)
    if name != old.name:
        saves.remove(old, old.unlink)  # as ModelCheckpoint does right after saving
    moments = [lambda: None]
    for shard in sorted(NAMES):
        moments.append(lambda shard=shard: saves.written(write_shard(save.marker, shard, {"value": 1})))
    for moment in moments:
        moment()
        assert usable(old)
    saves.know(save.marker.save, total=1)
    saves.flush(10)
    assert usable(tmp_path / name)
    if name != "last.ckpt":
        assert not old.exists()
        assert not (tmp_path / "last").exists()


@pytest.mark.parametrize("name", sorted([*NAMES, NAME]))
def test_every_file_cut_off_at_any_byte_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "step=1.ckpt"
    whole(path)
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
    old = tmp_path / "step=1.ckpt"
    saves = whole(old)
    save = begin(saves, tmp_path / "step=2.ckpt")
    saves.remove(old, old.unlink)
    saves.know(save.marker.save, total=9)
    (save.folder / "global.pt").mkdir()  # in its place
    with pytest.warns(UserWarning, match=r"step=2.ckpt is not whole: .*global.pt could not be written"):
        saves.written(write_shard(save.marker, "global.pt", {"value": 1}))
    saves.written(write_shard(save.marker, "worker-0.pt", {"value": 1}))
    saves.flush(10)
    assert usable(old)
    with pytest.raises(CheckpointError, match=f"half-written.*newest whole checkpoint there is {old}"):
        find(save.path, save.path.read_text())
    complete(saves, third := begin(saves, tmp_path / "step=3.ckpt"))
    assert usable(third.path)
    assert not old.exists()  # now it is replaced


def test_an_older_checkpoint_stays_if_the_newer_one_has_failed_by_the_time_it_is_to_be_removed(tmp_path: Path) -> None:
    old = tmp_path / "step=1.ckpt"
    saves = whole(old)
    begin(saves, tmp_path / "step=2.ckpt")
    with pytest.warns(UserWarning, match=r"step=2.ckpt is not whole"):
        saves.flush(0.0)
    saves.remove(old, old.unlink)
    assert usable(old)
    complete(saves, third := begin(saves, tmp_path / "step=3.ckpt"))
    assert usable(third.path)
    assert not old.exists()


def test_an_older_checkpoint_stays_if_the_newest_failed_though_another_became_whole(tmp_path: Path) -> None:
    old = tmp_path / "step=1.ckpt"
    saves = whole(old)
    second, third = begin(saves, tmp_path / "step=2.ckpt"), begin(saves, tmp_path / "step=3.ckpt")
    for name in NAMES:
        saves.written(ShardWritten(third.marker.save, name, 1, "0"))
    with pytest.warns(UserWarning, match=r"step=3.ckpt is not whole: the disk burns"):
        saves.fail(third.marker.save, "the disk burns")
    saves.remove(old, old.unlink)
    saves.remove(second.path, second.path.unlink)
    complete(saves, second)
    assert usable(second.path)
    saves.remove(third.path, third.path.unlink)
    complete(saves, begin(saves, tmp_path / "step=4.ckpt"))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step=4", "step=4.ckpt"]


def test_so_many_saves_are_under_way_at_most(tmp_path: Path) -> None:
    saves = Saves()
    under_way = []
    while not saves.is_full:
        under_way.append(begin(saves, tmp_path / f"step={len(under_way)}.ckpt"))
    assert len(under_way) == 8
    complete(saves, under_way[0], but=under_way[1:])
    assert not saves.is_full


def test_a_shard_that_does_not_come_is_waited_for_no_longer_than_the_limit(tmp_path: Path) -> None:
    saves = Saves()
    save = begin(saves, tmp_path / "step=1.ckpt")
    saves.know(save.marker.save, total=1)
    saves.written(ShardWritten(save.marker.save, "global.pt", 1, "0"))
    start = time.monotonic()
    with pytest.warns(UserWarning, match="worker-0.pt did not come within 0.2 s"):
        saves.flush(0.2)
    assert time.monotonic() - start < 5


def test_a_wait_for_saves_can_be_interrupted(tmp_path: Path) -> None:
    saves = Saves()
    begin(saves, tmp_path / "step=1.ckpt")

    def interrupted() -> None:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        saves.flush(60, interrupted=interrupted)


def test_a_save_that_is_given_up_while_it_becomes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves, write = Saves(), Manifest.write

    def late(manifest: Manifest, folder: Path) -> None:
        write(manifest, folder)
        with pytest.warns(UserWarning, match="did not come within 0 s"):
            saves.give_up(0)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", late)
        complete(saves, begin(saves, tmp_path / "step=1.ckpt"))
        while not (tmp_path / "step=1.ckpt").exists():
            time.sleep(0.01)
    complete(saves, begin(saves, tmp_path / "step=2.ckpt"))
    assert usable(tmp_path / "step=2.ckpt")


def test_another_name_of_a_checkpoint_is_the_same_checkpoint(tmp_path: Path) -> None:
    whole(tmp_path / "step=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    (tmp_path / "copy.ckpt").write_text((tmp_path / "step=1.ckpt").read_text())
    assert usable(tmp_path / "last.ckpt")
    assert usable(tmp_path / "copy.ckpt")


def test_a_file_that_was_taken_elsewhere_has_no_shards(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    whole(tmp_path / "here" / "step=1.ckpt")
    (tmp_path / "step=1.ckpt").write_text((tmp_path / "here" / "step=1.ckpt").read_text())
    assert find(tmp_path / "step=1.ckpt", (tmp_path / "step=1.ckpt").read_text()) is None


def test_a_manifest_of_another_save_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    whole(path)
    (folder,) = (tmp_path / "step=1").iterdir()
    fields = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**fields, "save": "another"}))
    with pytest.raises(CheckpointError, match="belongs to another save"):
        usable(path)


def test_a_later_format_is_refused_with_its_version(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    whole(path)
    (folder,) = (tmp_path / "step=1").iterdir()
    fields = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**fields, "format": 99, "version": "7.0"}))
    with pytest.raises(CheckpointError, match=r"has format 99, written by lightning-halos 7.0"):
        usable(path)


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    for number in (1, 2):
        whole(tmp_path / f"step={number}.ckpt")
        time.sleep(0.02)
    begin(Saves(), tmp_path / "last.ckpt")
    (tmp_path / "step=3" / "0").mkdir(parents=True)
    (tmp_path / "step=3" / "0" / NAME).symlink_to("what is removed meanwhile")
    assert newest_whole(tmp_path / "last.ckpt") == tmp_path / "step=2.ckpt"
    assert newest_whole(tmp_path / "step=2.ckpt") == tmp_path / "step=1.ckpt"
    assert [is_last(Path(name)) for name in ("last.ckpt", "last-v1.ckpt", "step=1.ckpt")] == [True, True, False]


def test_nothing_is_said_when_all_is_well(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole(tmp_path / "step=1.ckpt")


@pytest.mark.parametrize("older_first", [True, False])
def test_saves_of_the_same_name_that_overlap(tmp_path: Path, older_first: bool) -> None:
    saves, path = Saves(), tmp_path / "last.ckpt"
    older, newer = begin(saves, path), begin(saves, path)
    for save, other in [(older, newer), (newer, older)] if older_first else [(newer, older), (older, newer)]:
        saves.know(save.marker.save, total=7)
        for name in NAMES:
            saves.written(write_shard(save.marker, name, {"value": 1}))
        saves.flush(10, but=[other])
        assert usable(path)
    assert path.read_text() == newer.marker.save
    assert (newer.folder / NAME).is_file()


def test_a_save_that_begins_while_an_older_one_of_its_name_becomes_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, path = whole(tmp_path / "last.ckpt"), tmp_path / "last.ckpt"
    write, newer = Manifest.write, []

    def begin_another(manifest: Manifest, folder: Path) -> None:
        write(manifest, folder)
        newer.append(begin(saves, path))

    older = begin(saves, path)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", begin_another)
        saves.know(older.marker.save, total=7)
        for name in NAMES:
            saves.written(write_shard(older.marker, name, {"value": 1}))
        while path.read_text() != older.marker.save or saves._saves.keys() != {newer[0].marker.save}:
            time.sleep(0.01)
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
