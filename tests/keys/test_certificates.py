"""Key files and the list of revoked names."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from lightning_halos.transport.certificates import (
    Certificate,
    make_authority,
    make_region,
    make_server,
    read_keys,
)
from lightning_halos.transport.errors import CertificateRefusedError
from lightning_halos.transport.revocations import Revocations

NOW = datetime.now(timezone.utc)
PRIVATE = re.compile(r"PRIVATE KEY-----\s*(.+?)-----END", re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "deep" / "keys"
    make_authority(folder, ["halos.example.org", "2001:db8::7"])
    make_region(folder, "us-east", days=30)
    return folder


class TestFiles:
    def test_one_file_for_each_party(self, folder: Path) -> None:
        server, region = read_keys(folder / "server.pem"), read_keys(folder / "us-east.pem")
        authority = read_keys(folder / "authority.pem")
        assert [one.certificate.role for one in (authority, server, region)] == ["authority", "server", "region"]
        assert region.certificate.name == "us-east"
        assert server.certificate.hosts == ("halos.example.org", "2001:db8::7", "localhost", "127.0.0.1", "::1")
        assert authority.authorities == server.authorities == region.authorities
        assert (region.certificate.end - region.certificate.start).days == 30
        assert (server.certificate.end - server.certificate.start).days == 365
        assert not {path.name for path in folder.iterdir()} ^ {"authority.pem", "server.pem", "us-east.pem"}

    @pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
    @pytest.mark.parametrize(
        ("name", "purpose", "is_good"),
        [
            ("server", "sslserver", True),
            ("us-east", "sslclient", True),
            ("server", "sslclient", False),
            ("us-east", "sslserver", False),
        ],
    )
    def test_openssl_finds_a_certificate_good_for_its_own_purpose_only(
        self, folder: Path, name: str, purpose: str, is_good: bool
    ) -> None:
        options = ["-x509_strict", "-purpose", purpose, "-CAfile", str(folder / "authority.pem")]
        done = subprocess.run(
            ["openssl", "verify", *options, str(folder / f"{name}.pem")], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode == 0) == is_good, done

    def test_nobody_else_can_read_a_key_from_its_first_byte_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        modes: list[int] = []
        opened = os.fdopen

        def watched(descriptor: int, *arguments: str) -> object:
            found = os.fstat(descriptor)
            assert found.st_size == 0
            modes.append(stat.S_IMODE(found.st_mode))
            return opened(descriptor, *arguments)

        monkeypatch.setattr(os, "fdopen", watched)
        before = os.umask(0)
        try:
            make_authority(tmp_path / "new", ["localhost"])
            make_region(tmp_path / "new", "a")
            make_region(tmp_path / "new", "a", replace=True)
        finally:
            os.umask(before)
        assert modes == [0o600] * 4
        assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()} == {0o600}
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700

    def test_no_file_is_overwritten_unless_asked_for(self, tmp_path: Path) -> None:
        paths = [*make_authority(tmp_path, ["localhost"]), make_region(tmp_path, "a")]
        before = [path.read_bytes() for path in paths]
        for make in (
            lambda: make_authority(tmp_path, ["localhost"]),
            lambda: make_server(tmp_path, ["localhost"]),
            lambda: make_region(tmp_path, "a"),
        ):
            with pytest.raises(FileExistsError, match="left as it is"):
                make()
        assert [path.read_bytes() for path in paths] == before
        paths[0].unlink()
        with pytest.raises(FileExistsError, match=r"server\.pem exists"):
            make_authority(tmp_path, ["localhost"])
        assert not paths[0].exists()

    def test_a_replaced_key_is_another_one_and_the_folder_has_nothing_else(self, folder: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(folder, tmp_path / "keys")
        before, keys = (folder / "us-east.pem").read_text(), read_keys(folder / "us-east.pem")
        make_region(folder, "us-east", replace=True)
        make_server(folder, ["other.example.org"], days=7, replace=True)
        after = read_keys(folder / "us-east.pem")
        assert private_key(before) != private_key((folder / "us-east.pem").read_text())
        assert after.certificate.serial != keys.certificate.serial
        assert after.authorities == keys.authorities
        assert read_keys(folder / "server.pem").certificate.hosts[0] == "other.example.org"
        assert len(list(folder.iterdir())) == 3

    def test_a_failed_write_leaves_no_half_of_a_file(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = (folder / "us-east.pem").read_bytes()

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        for name in ("us-east", "new"):
            with pytest.raises(OSError, match="No space"):
                make_region(folder, name, replace=name == "us-east")
        assert (folder / "us-east.pem").read_bytes() == before
        assert len(list(folder.iterdir())) == 3


class TestMistakes:
    @pytest.mark.parametrize("name", ["", "../x", "a b", "a/b", ".hidden", "-x", "server", "Authority", "x" * 64, "é"])
    def test_a_name_that_no_region_can_have(self, folder: Path, name: str) -> None:
        with pytest.raises(ValueError, match="cannot be the name of a region"):
            make_region(folder, name)

    @pytest.mark.parametrize("host", ["", "https://x", "x:29600", "[::1]", "a b", "x..y", "10.0.0.1/8"])
    def test_what_is_no_host(self, tmp_path: Path, host: str) -> None:
        with pytest.raises(ValueError, match="not the name or the address of a host"):
            make_authority(tmp_path / "new", ["good.example.org", host])
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(("days", "text"), [(0, "days"), (-1, "days"), (3651, "at most 36"), (10**9, "at most")])
    def test_days_that_cannot_be(self, folder: Path, days: int, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            make_region(folder, "days", days=days)

    def test_an_authority_that_has_expired_or_is_missing(self, tmp_path: Path) -> None:
        make_authority(tmp_path, ["localhost"], start=NOW - timedelta(days=4000))
        with pytest.raises(ValueError, match="authority has expired"):
            make_region(tmp_path, "a")
        with pytest.raises(FileNotFoundError, match="keys init"):
            make_region(tmp_path / "elsewhere", "a")
        shutil.copy(tmp_path / "server.pem", tmp_path / "authority.pem")
        with pytest.raises(ValueError, match="not an authority's file"):
            make_region(tmp_path, "a")

    def test_a_file_that_is_not_a_key_file_says_what_is_missing_and_nothing_of_its_content(
        self, folder: Path, tmp_path: Path
    ) -> None:
        region, server = (folder / "us-east.pem").read_text(), (folder / "server.pem").read_text()
        secret = private_key(region)
        key, own, authority = (part + "\n" for part in re.split(r"(?<=-----)\n(?=-----BEGIN)", region.strip()))
        broken = key.replace(secret[10:20], "!" * 10)
        cases = {
            "": "a key is missing",
            "\0\1": "a key is missing",
            own + authority: "a key is missing",
            broken + own + authority: "a key is missing",
            key: "a certificate is missing",
            key + own[:200]: "a certificate is missing",
            key + own: "does not have the authority's certificate",
            key + authority: "certificate of another one",
            key + server.partition("-----END PRIVATE KEY-----\n")[2]: "certificate of another one",
        }
        for text, expected in cases.items():
            (tmp_path / "a.pem").write_text(text)
            with pytest.raises(ValueError, match=expected) as failure:
                read_keys(tmp_path / "a.pem")
            shown = str(failure.value) + repr(failure.value.__context__) + repr(failure.value.__cause__)
            assert secret[:12] not in shown
        make_authority(tmp_path / "other", ["localhost"])
        other = (tmp_path / "other" / "authority.pem").read_text().partition("-----END PRIVATE KEY-----\n")[2]
        (tmp_path / "a.pem").write_text(key + own + other)
        with pytest.raises(ValueError, match="not from the authority in the same file"):
            read_keys(tmp_path / "a.pem")
        with pytest.raises(FileNotFoundError):
            read_keys(tmp_path / "no.pem")

    def test_no_object_shows_the_private_key(self, folder: Path) -> None:
        keys = read_keys(folder / "us-east.pem")
        assert private_key((folder / "us-east.pem").read_text())[:12] not in repr(keys) + repr(vars(keys))


class TestRevocations:
    @pytest.fixture
    def revocations(self, tmp_path: Path) -> Revocations:
        return Revocations(tmp_path / "revoked")

    def test_without_a_file_nobody_is_revoked(self, revocations: Revocations) -> None:
        revocations.check(certificate("a"))

    def test_a_revoked_name_is_accepted_again_with_a_later_certificate(self, revocations: Revocations) -> None:
        revocations.check(certificate("a"))
        revocations.add("a")
        with pytest.raises(
            CertificateRefusedError, match=r"a \(number 1f\) is revoked: .*keys region FOLDER a --replace"
        ):
            revocations.check(certificate("a"))
        revocations.check(certificate("b"))
        revocations.check(replace(certificate("a"), start=NOW + timedelta(hours=1)))

    def test_a_name_without_a_time_is_refused_for_ever(self, revocations: Revocations) -> None:
        revocations.path.write_text("\ufeff# by hand\n\na\n  b  # lost\nc\t2020-01-01T00:00:00Z", encoding="utf-8")
        for name in "ab":
            with pytest.raises(CertificateRefusedError, match="Remove that line"):
                revocations.check(replace(certificate(name), start=NOW + timedelta(days=1000)))
        revocations.check(certificate("c"))
        revocations.add("c")  # the last line had no end
        with pytest.raises(CertificateRefusedError):
            revocations.check(certificate("c"))
        revocations.add("c", NOW - timedelta(days=100))  # an earlier time changes nothing
        with pytest.raises(CertificateRefusedError):
            revocations.check(certificate("c"))

    def test_changes_of_the_file_are_seen_also_of_the_same_size_within_a_moment(self, revocations: Revocations) -> None:
        for name in ("a", "b", "c"):
            revocations.path.write_text(name)
            with pytest.raises(CertificateRefusedError):
                revocations.check(certificate(name))
            revocations.check(certificate("d"))
        revocations.path.unlink()
        revocations.check(certificate("c"))

    def test_a_thread_that_finds_the_file_read_knows_what_is_in_it(self, tmp_path: Path) -> None:
        """As if all threads looked whenever one of them has noted something."""

        class Watched(Revocations):
            def __setattr__(self, name: str, value: object) -> None:
                super().__setattr__(name, value)
                if name == "_read_as" and value is not None:
                    with pytest.raises(CertificateRefusedError):
                        self.check(certificate("a"))
                    looks.append(name)

        looks: list[str] = []
        path = tmp_path / "revoked"
        path.write_text("a")
        os.utime(path, (1, 1))  # for long, so that it is not read again
        with pytest.raises(CertificateRefusedError):
            Watched(path).check(certificate("a"))
        assert looks

    @pytest.mark.parametrize("line", ["a,b", "a;", "a:", "a b", "b yesterday", "a 2020-01-01T00:00:00Z again"])
    def test_a_line_that_is_not_understood_lets_nobody_in(self, revocations: Revocations, line: str) -> None:
        revocations.path.write_text(f"{line}\nc\n")
        with pytest.raises(CertificateRefusedError):
            revocations.check(certificate("c"))  # all the same
        for name in "abd":
            with pytest.raises(OSError, match=f"revoked, line 1, is {line!r}. It must be a region's name"):
                revocations.check(certificate(name))

    def test_a_file_in_another_encoding_lets_nobody_in(self, revocations: Revocations) -> None:
        revocations.path.write_text("a\n", encoding="utf-16")
        with pytest.raises(OSError, match="is not a text in UTF-8"):
            revocations.check(certificate("b"))

    def test_a_file_that_cannot_be_read_is_another_error(self, revocations: Revocations) -> None:
        revocations.path.mkdir()
        with pytest.raises(IsADirectoryError):
            revocations.check(certificate("a"))

    def test_what_is_no_name_is_not_written(self, revocations: Revocations) -> None:
        with pytest.raises(ValueError, match="cannot be the name"):
            revocations.add("a\nb")
        assert not revocations.path.exists()


def certificate(name: str) -> Certificate:
    return Certificate(name, "region", (), NOW - timedelta(days=1), NOW + timedelta(days=1), "1f")


def private_key(text: str) -> str:
    found = PRIVATE.search(text)
    assert found
    return found[1]
