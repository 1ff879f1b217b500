"""Fetch files over HTTP, with retries after stalls, disconnections and server errors that resume where the last ended.

Only the named addresses are requested. Redirects are followed to http and https addresses, never from https to http.
Addresses hold no secrets, since messages show them and runs store them: logins are read from ~/.netrc, or the file
`$NETRC`, and signatures from `$DPM_SCALES_QUERIES`, each sent only to its host.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import http.client
import netrc
import os
import random
import socket
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

from dpm_scales.errors import UserError, require

SCHEMES = ("http", "https")
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Pause in seconds between the first two tries, and the longest pause; pauses double in between."""

LEAST_RATE = 1024
"""Bytes per second, averaged over `timeout` seconds, below which a try ends."""

QUERIES = "DPM_SCALES_QUERIES"
"""Environment variable with queries that are added to the addresses of a host: "HOST?QUERY", separated by spaces."""

_SECRETS = ("signature", "token", "key", "secret", "passw", "auth", "credential", "jwt", "policy")
_CHUNK = 2**20
_AGAIN = (408, 416, 425, 429)  # and all from 500
_REFUSALS = {
    **dict.fromkeys((301, 302, 303, 307, 308), "; it leads to an address that is not followed"),
    401: "; it asks for a login, which belongs in ~/.netrc: machine HOST login NAME password WORD",
    403: "; access is refused",
    404: "; there is no such file",
}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class Patience:
    """Limits on waiting for a server.

    Args:
        tries: number of tries, 1 to 100.
        timeout: seconds without a byte, or with fewer than `LEAST_RATE` bytes per second, that end a try; > 0, at most
            3600.

    Raises: UserError for values out of range.
    """

    tries: int = 8
    timeout: float = 30.0

    def __post_init__(self) -> None:
        whole = isinstance(self.tries, int) and not isinstance(self.tries, bool) and 1 <= self.tries <= 100
        require(whole, f"tries={self.tries!r:.20}: allowed is a whole number from 1 to 100")
        number = isinstance(self.timeout, int | float) and not isinstance(self.timeout, bool)
        require(number and 0 < self.timeout <= 3600, f"timeout={self.timeout!r:.20}: allowed are 0 to 3600 seconds")


class FetchError(UserError):
    """A file that could not be fetched."""


class _AgainError(Exception):
    """A failed try, after which another may succeed; `pause` is the wait that the server requests, in seconds."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class _ChangedError(Exception):
    """A file whose size or checksum differs from the expected one."""


def is_url(place: str) -> bool:
    """Return whether a place is an address ``SCHEME://…``."""
    return "://" in place


def check_url(url: str) -> str:
    """Return the address. Raises UserError for schemes other than http and https, a login, or an invalid address."""
    try:
        parts = urlsplit(url)
        ok = parts.scheme in SCHEMES and bool(parts.hostname) and (parts.port or 1) > 0 and url.isprintable()
    except ValueError:
        ok = False
    advice = "allowed are http:// and https://, and paths of a mounted file system"
    require(ok and " " not in url, f"{shown(url)}: {advice}")
    line = "put a line into ~/.netrc: machine HOST login NAME password WORD"
    require("@" not in parts.netloc, f"{shown(url)}: the address holds a login; leave it out, and {line}")
    return url


def require_storable(place: str) -> None:
    """Raise UserError for an address with a signature or key in its query, which a run's folder would store."""
    if is_url(place) and "?" in place:
        names = [name.lower() for name, _ in parse_qsl(urlsplit(place).query, keep_blank_values=True)]
        secret = next((name for name in names if name == "sig" or any(word in name for word in _SECRETS)), None)
        host = urlsplit(place).netloc
        instead = f"leave the query out, and set the environment variable {QUERIES}='{host}?{secret}=…'"
        require(secret is None, f"{shown(place)}: its {secret!r} may be a secret, and runs store addresses; {instead}")


def shown(url: str) -> str:
    """Return an address for messages, without user, password and query; a path unchanged."""
    if not is_url(url):
        return url
    try:
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        return "the address"


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in SCHEMES or (old == "https" and new == "http"):
            raise FetchError(f"{shown(req.full_url)}: it leads to {new}://, which is not followed")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            _log_in(request)
        return request


def _sent(url: str) -> str:
    """Return an address as sent: escaped, and with the query for its host from `$DPM_SCALES_QUERIES`."""
    parts = urlsplit(url)
    queries = [parts.query] if parts.query else []
    for word in os.environ.get(QUERIES, "").split():
        host, _, query = word.partition("?")
        if query and host in (parts.netloc, parts.hostname):
            queries.append(query)
    plain = "/%:@!$&'()*+,;=~?"
    return urlunsplit(parts._replace(path=quote(parts.path, plain), query=quote("&".join(queries), plain), fragment=""))


def _log_in(request: urllib.request.Request) -> None:
    """Add the login for a request's host, if there is one; it is not sent to other hosts after a redirect."""
    host, named = urlsplit(request.full_url).hostname or "", os.environ.get("NETRC", "")
    try:
        logins = netrc.netrc(Path(named).expanduser()) if named else netrc.netrc()
    except FileNotFoundError:
        return
    except netrc.NetrcParseError as error:  # its message may contain a password
        where = f"{named or '~/.netrc'}, line {error.lineno}"
        raise FetchError(f"{where}: expected machine HOST login NAME password WORD, in a file for you alone") from error
    except (OSError, UnicodeError) as error:
        raise FetchError(f"{named or '~/.netrc'}: can't be read ({type(error).__name__})") from error
    if host in logins.hosts:
        name, _, word = logins.hosts[host]
        encoded = base64.b64encode(f"{name}:{word}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")


def fetch_text(url: str, most: int, patience: Patience = Patience()) -> bytes:  # noqa: B008 - frozen
    """Return a file of at most `most` bytes. Raises FetchError if it can't be fetched, or is larger."""
    file = BytesIO()
    fetch(url, file, most=most, patience=patience)
    return file.getvalue()


def fetch(
    url: str,
    file: BinaryIO,
    length: int | None = None,
    sha256: str | None = None,
    most: int = 2**48,
    patience: Patience = Patience(),  # noqa: B008 - frozen
) -> str:
    """Fetch `url` into an empty binary file, open for reading and writing; return the SHA-256.

    Args:
        url: address, http or https.
        file: the file to write.
        length, sha256: expected number of bytes and checksum; None for any.
        most: largest number of bytes.
        patience: number of tries and timeout of each.

    Raises: FetchError if no try succeeds, at once if the server refuses, or if the content is not the expected one
        twice.
    """
    check_url(url)
    download = _Download(url, file, length, most, patience.timeout)
    reason, changed, asked = "", 0, 0.0
    for number in range(patience.tries):
        if number:
            pause = min(FIRST_PAUSE * 2 ** (number - 1), LONGEST_PAUSE)
            # with jitter, since other processes may wait for the same server
            time.sleep(max(asked, pause * random.Random().uniform(0.75, 1.25)))
        asked = 0.0
        try:
            download.resume()
            return _checked(file, length, sha256)
        except _AgainError as error:
            reason, asked = str(error), error.pause
        except _ChangedError as error:
            reason, changed = str(error), changed + 1
            download.restart()
            if changed == 2:
                raise FetchError(
                    f"{shown(url)}: {reason}; it was changed, or the index is an older one: make that again with "
                    "dpm-scales data index"
                ) from error
    raise FetchError(f"{shown(url)}: could not be fetched in {patience.tries} tries; the last: {reason}")


class _Download:
    """A remote file, part of which may have been received.

    Args:
        url: its address.
        file: the local file.
        length: expected number of bytes; None for any up to `most`.
        most: largest number of bytes.
        timeout: seconds without a byte that end a try.
    """

    def __init__(self, url: str, file: BinaryIO, length: int | None, most: int, timeout: float) -> None:
        self.url, self.file, self.length, self.most, self.timeout = url, file, length, most, timeout
        self._opener = urllib.request.build_opener(_Redirects())
        self._mark = ""  # identifies the version of the content received so far

    def restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()

    def resume(self) -> None:
        """Fetch the missing part. Raises `_AgainError`, `_ChangedError`, or FetchError if the server refuses."""
        have = self.file.seek(0, 2)
        headers = {"User-Agent": "dpm-scales", "Accept-Encoding": "identity"}
        if have and self._mark:
            headers |= {"Range": f"bytes={have}-", "If-Range": self._mark}
        try:
            request = urllib.request.Request(_sent(self.url), headers=headers)
            _log_in(request)
            with self._opener.open(request, timeout=self.timeout) as response:
                self._receive(response, have)
        except urllib.error.HTTPError as error:
            error.close()
            self._refused(error.code, str(error.headers.get("Retry-After", "")))
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                told = f"the server's certificate is not trusted ({error.reason})"
                raise FetchError(f"{shown(self.url)}: {told}") from error
            raise _AgainError(_reason(error.reason, self.timeout)) from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise
            raise _AgainError(_reason(error, self.timeout)) from error

    def _receive(self, response: Any, have: int) -> None:
        goes_on = response.status == 206 and f"bytes {have}-" in response.headers.get("Content-Range", "")
        if not goes_on:
            self.restart()
            have = 0
        self._mark = _mark(response.headers)
        declared = response.headers.get("Content-Length", "")
        total = have + int(declared) if declared.isascii() and declared.isdigit() else None
        if self.length is not None and total is not None and total != self.length:
            raise _ChangedError(f"it has {total} bytes, and the index says {self.length}")
        limit = self.most if self.length is None else self.length
        began, before = time.monotonic(), have
        while chunk := response.read1(_CHUNK):
            have += len(chunk)
            if have > limit:
                raise _ChangedError(f"it has more than {limit} bytes")
            self.file.write(chunk)
            if (now := time.monotonic()) - began > self.timeout:
                if have - before < LEAST_RATE * (now - began):
                    raise _AgainError(f"only {have - before} bytes came in {now - began:.3g} seconds")
                began, before = now, have
        if have < (total if total is not None else self.length or 0):
            raise _AgainError(f"cut off after {have} bytes")

    def _refused(self, code: int, asked: str) -> None:
        """Raise the error for a status of the server."""
        if code == 416:  # the part received does not belong to the server's file
            self.restart()
        if code in _AGAIN or code >= 500:
            raise _AgainError(f"HTTP {code}", min(float(asked), LONGEST_PAUSE) if asked.isdigit() else 0.0)
        raise FetchError(f"{shown(self.url)}: HTTP {code}{_REFUSALS.get(code, '')}")


def _reason(error: object, timeout: float) -> str:
    if isinstance(error, socket.timeout | TimeoutError):
        return f"no byte came for {timeout:g} seconds"
    return str(error) or type(error).__name__


def _mark(headers: Any) -> str:
    """Return an identifier of the content's version, for resuming; empty if the server sends none."""
    tag = headers.get("ETag", "")
    return str(tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", ""))


def _checked(file: BinaryIO, length: int | None, sha256: str | None) -> str:
    """Return the SHA-256 of a file. Raises `_ChangedError` if it or the length differs from the expected one."""
    digest, have = hashlib.sha256(), 0
    file.seek(0)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        have += len(chunk)
    if length is not None and have != length:
        raise _ChangedError(f"it has {have} bytes, and the index says {length}")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise _ChangedError(f"its SHA-256 is {digest.hexdigest()[:12]}…, and the index says {sha256[:12]}…")
    return digest.hexdigest()
