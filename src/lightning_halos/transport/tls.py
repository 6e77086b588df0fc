"""TLS 1.3 between the global server and the regions: the two contexts, and what each failure means.

Sockets are in ``connection``, certificates in ``certificates``. Everything cryptographic is done by ``ssl``.
"""

from __future__ import annotations

import logging
import ssl
import stat
from datetime import datetime, timezone

from lightning_halos.transport.certificates import Certificate, Keys, Role, describe

_log = logging.getLogger(__name__)

# Numbers of OpenSSL's X509_V_ERR_..., which `ssl` passes on without names.
_NOT_YET_VALID, _EXPIRED, _PURPOSE = 9, 10, 26
_UNKNOWN_AUTHORITY = {2, 18, 19, 20, 21, 30}
_WRONG_HOST = {62, 64}

_WHOSE = {"authority": "the authority's", "server": "the global server's", "region": "a region's"}

_NOT_TLS = {
    "BAD_PACKET_LENGTH",
    "BAD_RECORD_TYPE",
    "HTTPS_PROXY_REQUEST",
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
    "UNEXPECTED_MESSAGE",
    "UNKNOWN_PROTOCOL",
    "WRONG_VERSION_NUMBER",
}
_OLD_TLS = {
    "NO_PROTOCOLS_AVAILABLE",
    "TLSV1_ALERT_PROTOCOL_VERSION",
    "UNSUPPORTED_PROTOCOL",
    "VERSION_TOO_LOW",
    "WRONG_SSL_VERSION",
}


def server_context(keys: Keys) -> ssl.SSLContext:
    """The global server's side: a client has to show a region's certificate of the same authority.

    Args:
        keys: The server's.

    Returns:
        The context for ``wrap_socket(..., server_side=True)``.

    Raises:
        ValueError: If the keys are not a server's, or not valid now.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, keys, "server")
    # A ticket would let a client come back without showing its certificate again.
    context.num_tickets = 0
    return context


def client_context(keys: Keys) -> ssl.SSLContext:
    """A region's side: the server has to show the server's certificate of the same authority, for the host dialled.

    Args:
        keys: The region's.

    Returns:
        The context for ``wrap_socket(..., server_hostname=...)``.

    Raises:
        ValueError: If the keys are not a region's, or not valid now.
    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, keys, "region")


def peer_certificate(connection: ssl.SSLSocket | ssl.SSLObject) -> Certificate:
    """Returns the certificate that the peer has proven to be its own, after the handshake.

    Raises:
        ValueError: If it is not one that ``lightning-halos keys`` makes.
    """
    certificate = connection.getpeercert(binary_form=True)
    if certificate is None:
        raise ValueError("The peer showed no certificate.")
    return describe(certificate, "The peer")


def explain(error: OSError, keys: Keys) -> str:
    """Says what went wrong in a handshake, or at the first read or write after it, and what to do.

    In TLS 1.3 a client's handshake ends before the server has looked at its certificate. If the server refuses it, a
    later read or write fails.

    Args:
        error: The exception that ``ssl`` raised.
        keys: Those of this process: the server's, or a region's.

    Returns:
        Sentences without the peer's address, which the caller knows.
    """
    reason = getattr(error, "reason", None) or ""
    is_client = keys.certificate.role == "region"
    peer = "server" if is_client else "client"
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_certificate(error, keys, peer)
    if reason in _NOT_TLS:
        if is_client:
            return "What answers there does not speak TLS: another program listens at this port. Check host and port."
        return "The client does not speak TLS: it is another program, such as a scanner or a health check."
    if reason in _OLD_TLS:
        return f"The {peer} does not speak TLS 1.3: it is another program, or something between changes the connection."
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "The client showed no certificate: it is another program, such as a browser."
    if "ALERT" in reason:
        return _explain_alert(reason, keys, peer)
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError, BrokenPipeError)):
        if is_client:
            return (
                "The connection was closed before the server proved who it is: another program listens there, or a "
                "load balancer or port forwarding has nothing behind it, or the server is ending. Check host and port, "
                "and the server's log."
            )
        return "The client closed the connection before it proved who it is."
    return f"TLS with the {peer} failed: {error.strerror or error}"


def _context(protocol: int, keys: Keys, role: Role) -> ssl.SSLContext:
    _check_usable(keys, role)
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    # The authorities only, and complete chains only: a party's own certificate, also in the file, is no authority.
    context.load_verify_locations(cadata=keys.authorities)
    context.verify_flags = ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_TRUSTED_FIRST
    context.load_cert_chain(keys.path, password="")  # an encrypted key is an error instead of a question
    return context


def _check_usable(keys: Keys, role: Role) -> None:
    path, own, now = keys.path, keys.certificate, datetime.now(timezone.utc)
    if own.role != role:
        needed = "the global server needs server.pem, which `lightning-halos keys init` made"
        if role == "region":
            needed = "a region needs a file of its own: lightning-halos keys region FOLDER NAME"
        raise ValueError(f"{path} is {_WHOSE[own.role]}; {needed}.")
    if now < own.start:
        raise ValueError(f"{path} is not valid yet: it is from {own.start:%F %T} UTC. {_clock()}")
    if now > own.end:
        raise ValueError(f"{path} has expired at {own.end:%F %T} UTC. {_renew(keys)} {_clock()}")
    # A group may read it: where a Secret of Kubernetes is mounted for a user who is not root, it has to.
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IRWXO):
        _log.warning("%s has a private key, and others can access it: chmod 600 %s", path, path)


def _explain_certificate(error: ssl.SSLCertVerificationError, keys: Keys, peer: str) -> str:
    """This process refused the peer's certificate."""
    code = error.verify_code
    if code in _UNKNOWN_AUTHORITY:
        return (
            f"The {peer}'s certificate is not from the authority in {keys.path} ({keys.authority}). Both need keys of "
            "the same `lightning-halos keys init`; `lightning-halos keys show` prints a file's authority."
        )
    if code == _EXPIRED:
        name = "keys server FOLDER --host HOST" if peer == "server" else "keys region FOLDER NAME"
        return (
            f"The {peer}'s certificate has expired. Make a new one where the authority is: lightning-halos {name} "
            f"--replace. {_clock()}"
        )
    if code == _NOT_YET_VALID:
        return f"The {peer}'s certificate is not valid yet, so one machine's clock is wrong. {_clock()}"
    if code == _PURPOSE:
        if peer == "server":
            return "What answers there shows a region's key, not the server's: serve --keys takes server.pem."
        return "The client shows the server's key. A region needs a file of its own: lightning-halos keys region."
    if code in _WRONG_HOST:
        return (
            f"The server's certificate is for other hosts ({error.verify_message}). Make one for this host where the "
            "authority is, and start the server with it: lightning-halos keys server FOLDER --host HOST --replace."
        )
    return f"The {peer}'s certificate is not valid: {error.verify_message}."


def _explain_alert(reason: str, keys: Keys, peer: str) -> str:
    """The peer refused this process's certificate, and said why."""
    own, path = keys.certificate, keys.path
    if reason.endswith("UNKNOWN_CA"):
        return (
            f"The {peer} refused {path}, which is not from its authority but from {keys.authority}. Both need keys of "
            "the same `lightning-halos keys init`; `lightning-halos keys show` prints a file's authority."
        )
    if reason.endswith("CERTIFICATE_EXPIRED"):
        return f"The {peer} refused {path}: by its clock, it expired at {own.end:%F %T} UTC. {_renew(keys)} {_clock()}"
    if reason.endswith("UNSUPPORTED_CERTIFICATE"):
        return f"The {peer} refused {path}, which is the certificate of a {own.role}: what answers there is no {peer}."
    if reason.endswith("BAD_CERTIFICATE") and peer == "server":
        return (
            f"The server refused {path}: by its clock, it is not valid yet (it is from {own.start:%F %T} UTC), so one "
            f"machine's clock is wrong. {_clock()}"
        )
    if reason.endswith("BAD_CERTIFICATE"):
        return (
            f"The client refused {path}: it dials another host than {', '.join(own.hosts)}, or its clock is wrong. Its "
            "own error says which."
        )
    if reason.endswith("CERTIFICATE_REQUIRED"):
        return f"The {peer} wants a certificate, and got none."
    return f"The {peer} refused {path}: {reason.lower().replace('_', ' ')}."


def _renew(keys: Keys) -> str:
    name = (
        f"region FOLDER {keys.certificate.name}" if keys.certificate.role == "region" else "server FOLDER --host HOST"
    )
    return f"Make a new one where the authority is: lightning-halos keys {name} --replace."


def _clock() -> str:
    now = datetime.now(timezone.utc)
    return f"This machine's clock shows {now:%F %T} UTC; compare it with the other machine's (`date -u`)."
