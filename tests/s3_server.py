"""A small S3 for tests: objects in memory, ranges, If-Match, listings by pages, multipart uploads; and what goes wrong.

    with serve() as server:                          # sets nothing; give server.environment to the client
        server.objects["bucket/a.tar"] = Object(b"…")
        server.faults.rates = {"error": 0.1, "cut": 0.1}

Faults are drawn from a seed, request by request. Checksums that a client sends are verified, signatures are not.
"""

from __future__ import annotations

import base64
import hashlib
import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

PAGE = 100  # objects of a listing's page


@dataclass
class Object:
    """An object, and how many parts it was uploaded in (0: in one request)."""

    data: bytes
    parts: int = 0
    tag: str = ""

    def __post_init__(self) -> None:
        self.tag = self.tag or hashlib.md5(self.data).hexdigest()


@dataclass
class Faults:
    """How often each fault comes, from 0 to 1; ``expired``: every request is refused for its credentials.

    "error": 500 InternalError, nothing done. "busy": 503 SlowDown, nothing done. "cut": half of the body, then the
    connection is closed. "dropped": the connection is closed without an answer, nothing done. "lost": the same, but
    done. "slow": the body comes after a pause.
    """

    rates: dict[str, float] = field(default_factory=dict)
    expired: bool = False
    denied: bool = False
    pause: float = 2.0  # seconds, of "slow"
    seed: int = 0
    most: int | None = None  # faults in all
    only: str = ""  # requests with this in "GET /bucket/key?query"
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()

    def draw(self, target: str) -> str | None:
        with self._lock:
            if self.only not in target or (self.most is not None and sum(self.seen.values()) >= self.most):
                return None
            at = self._random.random()
            for name, rate in self.rates.items():
                if at < rate:
                    self.seen[name] += 1
                    return name
                at -= rate
        return None


class S3Server(ThreadingHTTPServer):
    """``objects``: "bucket/key" -> Object; ``uploads``: id -> ("bucket/key", part number -> bytes)."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Empty, without faults."""
        self.objects: dict[str, Object] = {}
        self.uploads: dict[str, tuple[str, dict[int, bytes]]] = {}
        self.faults = Faults()
        self.smallest_part = 5 << 20  # bytes, but of the last
        self.anonymous = False  # also serve who does not sign, as a plain web server
        self.requests: list[tuple[str, str, str]] = []  # method, path with query, range
        self.sent = 0  # bytes of bodies
        self.stored: Counter[str] = Counter()  # how often each object was written
        self.unanswered: Counter[str] = Counter()  # and how often the client was not told so

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is none."""

    def count(self, method: str, part: str = "") -> int:
        return sum(one[0] == method and part in one[1] for one in self.requests)


@contextmanager
def serve() -> Iterator[S3Server]:
    server = S3Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.target = unquote(parts.path).lstrip("/")
        self.query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server, faults = self.server, self.server.faults
        with server.lock:
            server.requests.append((self.command, self.path, self.headers.get("Range", "")))
        self.fault = faults.draw(f"{self.command} {self.path}")
        if faults.expired:
            self._error(400, "ExpiredToken", "The provided token has expired.")
        elif faults.denied:
            self._error(403, "AccessDenied", "Access Denied")
        elif "Authorization" not in self.headers and not server.anonymous:
            self._error(403, "AccessDenied", "Anonymous access")
        elif self.fault == "error":
            self._error(500, "InternalError", "We encountered an internal error.")
        elif self.fault == "busy":
            self._error(503, "SlowDown", "Please reduce your request rate.")
        elif self.fault == "dropped":
            self._hang_up()
        else:
            with server.lock:
                answer = self._answer()
                if self.fault is not None:
                    server.unanswered[self.target] += 1
            if self.fault == "lost":
                self._hang_up()
            else:
                self._send(*answer)

    def _answer(self) -> tuple[int, dict[str, str], bytes]:
        if self.command in ("GET", "HEAD"):
            if "list-type" in self.query:
                return self._list()
            if "uploads" in self.query:
                return self._list_uploads()
            return self._get()
        if self.command == "PUT":
            return self._put()
        if self.command == "POST":
            return self._begin() if "uploads" in self.query else self._complete()
        if "uploadId" in self.query:
            if self.server.uploads.pop(self.query["uploadId"], None) is None:
                return self._told(404, "NoSuchUpload", "The specified upload does not exist.")
        else:
            self.server.objects.pop(self.target, None)
        return 204, {}, b""

    def _get(self) -> tuple[int, dict[str, str], bytes]:
        found = self.server.objects.get(self.target)
        if found is None:
            return self._told(404, "NoSuchKey", "The specified key does not exist.")
        wanted = self.headers.get("If-Match")
        if wanted is not None and wanted.strip('"') != found.tag:
            return self._told(412, "PreconditionFailed", "At least one of the pre-conditions did not hold")
        headers = {"ETag": f'"{found.tag}"', "Last-Modified": "Tue, 01 Jan 2030 00:00:00 GMT"}
        span = self.headers.get("Range")
        if span is None:
            return 200, headers, found.data
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(found.data))
        if start >= len(found.data):
            return self._told(416, "InvalidRange", "The requested range is not satisfiable")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(found.data)}"
        return 206, headers, found.data[start:stop]

    def _put(self) -> tuple[int, dict[str, str], bytes]:
        if self.headers.get("Content-Encoding") == "aws-chunked":
            return self._told(501, "NotImplemented", "aws-chunked")
        sum32 = self.headers.get("x-amz-checksum-crc32")
        if sum32 is not None and base64.b64decode(sum32) != zlib.crc32(self.body).to_bytes(4, "big"):
            return self._told(400, "BadDigest", "The CRC32 you specified did not match")
        tag = hashlib.md5(self.body).hexdigest()
        if "uploadId" in self.query:
            if self.query["uploadId"] not in self.server.uploads:
                return self._told(404, "NoSuchUpload", "The specified upload does not exist.")
            self.server.uploads[self.query["uploadId"]][1][int(self.query["partNumber"])] = self.body
        else:
            self.server.objects[self.target] = Object(self.body)
            self.server.stored[self.target] += 1
        return 200, {"ETag": f'"{tag}"'}, b""

    def _begin(self) -> tuple[int, dict[str, str], bytes]:
        upload = f"upload-{len(self.server.requests)}"
        self.server.uploads[upload] = (self.target, {})
        return self._xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")

    def _complete(self) -> tuple[int, dict[str, str], bytes]:
        found = self.server.uploads.get(self.query["uploadId"])
        if found is None:
            return self._told(404, "NoSuchUpload", "The specified upload does not exist.")
        tree = ElementTree.fromstring(self.body)
        space = tree.tag.partition("}")[0] + "}" if "}" in tree.tag else ""
        asked = [(int(p.find(f"{space}PartNumber").text), p.find(f"{space}ETag").text.strip('"')) for p in tree]
        parts = [found[1].get(number, b"") for number, _ in asked]
        if [hashlib.md5(part).hexdigest() for part in parts] != [tag for _, tag in asked] or asked != sorted(asked):
            return self._told(400, "InvalidPart", "One or more of the specified parts could not be found.")
        if any(len(part) < self.server.smallest_part for part in parts[:-1]):
            return self._told(400, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size")
        tag = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).hexdigest() + f"-{len(parts)}"
        self.server.objects[found[0]] = Object(b"".join(parts), len(parts), tag)
        self.server.stored[found[0]] += 1
        del self.server.uploads[self.query["uploadId"]]
        return self._xml("CompleteMultipartUploadResult", f'<ETag>"{tag}"</ETag>')

    def _list(self) -> tuple[int, dict[str, str], bytes]:
        bucket, prefix = self.target.rstrip("/"), self.query.get("prefix", "")
        delimiter, after = self.query.get("delimiter", ""), self.query.get("continuation-token", "")
        entries: dict[str, Object | None] = {}
        for name in sorted(self.server.objects):
            key = name.removeprefix(f"{bucket}/")
            if key == name or not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                entries[prefix + rest.partition(delimiter)[0] + delimiter] = None
            else:
                entries[key] = self.server.objects[name]
        names = [name for name in entries if name > after]
        page = names[: min(PAGE, int(self.query.get("max-keys", PAGE)))]
        xml = f"<KeyCount>{len(page)}</KeyCount><EncodingType>url</EncodingType>"
        xml += f"<IsTruncated>{str(len(page) < len(names)).lower()}</IsTruncated>"
        if len(page) < len(names):
            xml += f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"
        for name in page:
            one = entries[name]
            if one is None:
                xml += f"<CommonPrefixes><Prefix>{quote(name)}</Prefix></CommonPrefixes>"
            else:
                about = f"<Key>{quote(name)}</Key><Size>{len(one.data)}</Size><ETag>&quot;{one.tag}&quot;</ETag>"
                xml += f"<Contents>{about}<LastModified>2030-01-01T00:00:00.000Z</LastModified></Contents>"
        return self._xml("ListBucketResult", xml)

    def _list_uploads(self) -> tuple[int, dict[str, str], bytes]:
        bucket, prefix = self.target.rstrip("/"), self.query.get("prefix", "")
        xml = "<IsTruncated>false</IsTruncated>"
        for upload, (name, _) in self.server.uploads.items():
            key = name.removeprefix(f"{bucket}/")
            if key.startswith(prefix):
                xml += f"<Upload><Key>{quote(key)}</Key><UploadId>{upload}</UploadId></Upload>"
        return self._xml("ListMultipartUploadsResult", xml)

    def _xml(self, name: str, inside: str) -> tuple[int, dict[str, str], bytes]:
        space = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
        text = f'<?xml version="1.0" encoding="UTF-8"?><{name} {space}>{inside}</{name}>'
        return 200, {"Content-Type": "application/xml"}, text.encode()

    def _told(self, status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
        text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        return status, {"Content-Type": "application/xml"}, text.encode()

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(*self._told(status, code, message))

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "slow":
            time.sleep(self.server.faults.pause)
        if self.fault == "cut" and body:
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)
        self.server.sent += len(body)

    def _hang_up(self) -> None:
        self.close_connection = True
