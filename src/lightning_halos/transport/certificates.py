"""Who may take part in a run: the keys and certificates of the authority, the server and the regions, as files.

Nothing here opens a connection (that is in ``tls``). The formats and the cryptography are those of ``cryptography``.
A private key is read and written here, but no object keeps one, so that none can get into a log or an error.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lightning_halos.core.checks import check_count

Role = Literal["authority", "server", "region"]

DAYS = 365
AUTHORITY_DAYS = 3650
AUTHORITY_FILE, SERVER_FILE = "authority.pem", "server.pem"
_SERVER_NAME = "global server"
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_REGION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HOST_NAME = re.compile(r"(?=.{1,253}$)(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*")
_RESERVED = ("authority", "server")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Certificate:
    """What a certificate says.

    Attributes:
        name: The region's name, or who else it is for.
        role: What it is good for. A region's certificate cannot be used as a server, nor the reverse.
        hosts: Host names and addresses of a server.
        start: It is valid from then on, in UTC.
        end: It is valid until then, in UTC.
        serial: Its number, in hexadecimal digits.
    """

    name: str
    role: Role
    hosts: tuple[str, ...]
    start: datetime
    end: datetime
    serial: str


@dataclass(frozen=True)
class Keys:
    """What is in the file of one party, except the private key.

    Attributes:
        path: The file: a private key, its certificate, and the certificates of the authorities that are trusted.
        certificate: The party's certificate.
        authorities: The authorities' certificates as PEM text.
        authority: The start of the first authority's fingerprint (SHA-256), to compare two files by eye.
    """

    path: Path
    certificate: Certificate
    authorities: str
    authority: str


def make_authority(
    folder: str | Path, hosts: Iterable[str], days: int = DAYS, start: datetime | None = None
) -> list[Path]:
    """Makes an authority, and the certificate of a global server.

    Args:
        folder: A folder for the files. It is made if it does not exist.
        hosts: The host names and addresses at which regions reach the server. This machine is added.
        days: Number of days for which the server's certificate is valid. The authority's is valid for 10 years.
        start: When the certificates become valid. Default: now.

    Returns:
        The authority's file, which can make further certificates, and the server's.

    Raises:
        FileExistsError: If one of the files exists.
        ValueError: If a host or the number of days is not valid.
    """
    folder, start = Path(folder), start or _now()
    hosts = _checked_hosts(hosts)
    paths = [folder / AUTHORITY_FILE, folder / SERVER_FILE]
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} exists, and is left as it is. Choose another folder for a new authority.")
    end = start + timedelta(days=AUTHORITY_DAYS)
    _checked_days(days, start, end)
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    number = x509.SubjectKeyIdentifier.from_public_key(public).digest.hex()[:8]
    name = _named(f"lightning-halos authority {number}")
    usage = _usage(key_cert_sign=True, crl_sign=True)
    builder = _builder(name, name, public, public, start, end)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    certificate = builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(paths[0], _pem(key, certificate), replace=False)
    _issue(paths[1], (key, certificate), _SERVER_NAME, hosts, start, days, replace=False)
    return paths


def make_server(
    folder: str | Path,
    hosts: Iterable[str],
    days: int = DAYS,
    replace: bool = False,
    start: datetime | None = None,
) -> Path:
    """Makes a new key and certificate for the global server: for other hosts, or before the old one expires.

    Args:
        folder: The authority's folder.
        hosts: See :func:`make_authority`.
        days: Number of days for which it is valid.
        replace: Whether to replace the file if it exists.
        start: When it becomes valid. Default: now.

    Returns:
        The file.

    Raises:
        OSError: If the authority's file cannot be read, or the server's file exists.
        ValueError: If a host or the number of days is not valid.
    """
    path = Path(folder) / SERVER_FILE
    hosts = _checked_hosts(hosts)
    _issue(path, _authority(Path(folder)), _SERVER_NAME, hosts, start or _now(), days, replace)
    return path


def make_region(
    folder: str | Path, name: str, days: int = DAYS, replace: bool = False, start: datetime | None = None
) -> Path:
    """Makes a key and a certificate for a region.

    Args:
        folder: The authority's folder.
        name: The region's name: letters, digits, dots, hyphens and underscores, at most 63 of them.
        days: Number of days for which it is valid.
        replace: Whether to replace the file if it exists. The old certificate stays valid until it expires.
        start: When it becomes valid. Default: now.

    Returns:
        The file.

    Raises:
        OSError: If the authority's file cannot be read, or the region's file exists.
        ValueError: If the name or the number of days is not valid.
    """
    check_name(name)
    path = Path(folder) / f"{name}.pem"
    _issue(path, _authority(Path(folder)), name, None, start or _now(), days, replace)
    return path


def check_name(name: str) -> None:
    """Raises a ``ValueError`` unless a region can have this name."""
    if not _REGION_NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise ValueError(
            f"{name!r} cannot be the name of a region: it must consist of 1 to 63 letters, digits, '.', '-' and '_', "
            f"start with a letter or a digit, and not be {' or '.join(_RESERVED)}."
        )


def read_keys(path: str | Path) -> Keys:
    """Reads the file of a party.

    Args:
        path: A file that ``lightning-halos keys`` made.

    Returns:
        What is in it, except the private key.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it does not have what a party needs. The message says what is missing, never what is in the file.
    """
    path = Path(path)
    key, certificates = _read(path)
    certificate, *authorities = certificates
    if _public(key) != _public(certificate):
        raise ValueError(f"{path} has a private key and the certificate of another one. Make the file again.")
    described = describe(certificate, str(path))
    if described.role == "authority":
        authorities = [certificate]
    authorities = [one for one in authorities if _is_authority(one)]
    if not authorities:
        raise ValueError(f"{path} does not have the authority's certificate, which has to follow the party's own.")
    if not any(_issued(certificate, one) for one in authorities):
        raise ValueError(f"{path} has a certificate that is not from the authority in the same file. Make it again.")
    text = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in authorities).decode()
    return Keys(path, described, text, authorities[0].fingerprint(hashes.SHA256()).hex()[:16])


def describe(certificate: x509.Certificate | bytes, whose: str) -> Certificate:
    """Returns what a certificate says.

    Args:
        certificate: The certificate, or its DER bytes.
        whose: For the error.

    Raises:
        ValueError: If it is not one that ``lightning-halos keys`` makes.
    """
    if isinstance(certificate, bytes):
        certificate = x509.load_der_x509_certificate(certificate)
    extensions = certificate.extensions
    with contextlib.suppress(x509.ExtensionNotFound):
        if _is_authority(certificate):
            return _described(certificate, "authority", ())
        uses = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        if ExtendedKeyUsageOID.SERVER_AUTH in uses:
            names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            return _described(certificate, "server", tuple(str(one.value) for one in names))
        if ExtendedKeyUsageOID.CLIENT_AUTH in uses:
            return _described(certificate, "region", ())
    raise ValueError(f"{whose} has a certificate for neither a server nor a region. Make one: lightning-halos keys.")


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


def _checked_hosts(hosts: Iterable[str]) -> list[str]:
    """The hosts and those of this machine, without duplicates."""
    hosts = list(hosts)
    if not hosts:
        raise ValueError("Name at least one host at which the regions reach the server.")
    for host in hosts:
        if not _is_address(host) and not _HOST_NAME.fullmatch(host):
            raise ValueError(
                f"{host!r} is not the name or the address of a host: without a port, a scheme or brackets, such as "
                "halos.example.org, 203.0.113.7 or 2001:db8::7."
            )
    return list(dict.fromkeys([*hosts, *_LOCAL_HOSTS]))


def _is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return False


def _checked_days(days: int, start: datetime, authority_end: datetime) -> None:
    check_count("days", days)
    most = (authority_end - start).days
    if most < 1:
        raise ValueError(
            f"The authority has expired ({authority_end:%FT%TZ}). Make a new one: lightning-halos keys init"
        )
    if days > most:
        raise ValueError(f"days={days} is longer than the authority is valid: at most {most} days.")


_Signer = tuple[ec.EllipticCurvePrivateKey, x509.Certificate]


def _authority(folder: Path) -> _Signer:
    path = folder / AUTHORITY_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. `lightning-halos keys init {folder} --host HOST` makes it.")
    key, certificates = _read(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or describe(certificates[0], str(path)).role != "authority":
        raise ValueError(f"{path} is not an authority's file.")
    return key, certificates[0]


def _issue(
    path: Path,
    signer: _Signer,
    name: str,
    hosts: list[str] | None,
    start: datetime,
    days: int,
    replace: bool,
) -> None:
    """Writes a key and a certificate: the server's if there are hosts, else a region's."""
    if path.exists() and not replace:
        raise FileExistsError(
            f"{path} exists, and is left as it is. --replace makes a new key in its place: the old one stays valid "
            "until it expires or is revoked."
        )
    authority_key, authority = signer
    _checked_days(days, start, authority.not_valid_after_utc)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(
        _named(name),
        authority.subject,
        key.public_key(),
        authority_key.public_key(),
        start,
        start + timedelta(days=days),
    )
    use = ExtendedKeyUsageOID.CLIENT_AUTH if hosts is None else ExtendedKeyUsageOID.SERVER_AUTH
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    if hosts is not None:
        names = [
            x509.IPAddress(ipaddress.ip_address(host)) if _is_address(host) else x509.DNSName(host) for host in hosts
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    _write(path, _pem(key, builder.sign(authority_key, hashes.SHA256()), authority), replace)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer_public: ec.EllipticCurvePublicKey,
    start: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    own = x509.SubjectKeyIdentifier.from_public_key(public)
    issuers = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public)
    builder = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number(), start, end)
    return builder.add_extension(own, critical=False).add_extension(issuers, critical=False)


def _usage(digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(key: ec.EllipticCurvePrivateKey, *certificates: x509.Certificate) -> bytes:
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private + b"".join(certificate.public_bytes(encoding) for certificate in certificates)


def _write(path: Path, content: bytes, replace: bool) -> None:
    """Writes a file that only its owner can read, from its first byte on, completely or not at all."""
    target = path.with_name(f".{path.name}.{os.getpid()}") if replace else path
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        if replace:
            target.replace(path)
    except BaseException:
        target.unlink()
        raise


def _read(path: Path) -> tuple[PrivateKeyTypes, list[x509.Certificate]]:
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES)
    key, certificates = None, None
    with contextlib.suppress(ValueError, TypeError):  # nothing of the text gets into an error
        key = serialization.load_pem_private_key(content, None)
    with contextlib.suppress(ValueError):
        certificates = x509.load_pem_x509_certificates(content)
    if key is None or not certificates:
        raise ValueError(
            f"{path} must have a private key (PEM, not encrypted) and its certificate, as the files of "
            f"`lightning-halos keys`: {'a key' if key is None else 'a certificate'} is missing."
        )
    return key, certificates


def _public(holder: PrivateKeyTypes | x509.Certificate) -> bytes:
    public = holder.public_key()
    return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _is_authority(certificate: x509.Certificate) -> bool:
    with contextlib.suppress(x509.ExtensionNotFound):
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    return False


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    with contextlib.suppress(ValueError, TypeError, InvalidSignature):
        certificate.verify_directly_issued_by(authority)
        return True
    return False


def _described(certificate: x509.Certificate, role: Role, hosts: tuple[str, ...]) -> Certificate:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    name = str(names[0].value) if names else ""
    if role == "region":
        check_name(name)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return Certificate(name, role, hosts, start, end, f"{certificate.serial_number:x}")
