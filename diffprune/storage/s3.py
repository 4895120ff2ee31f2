"""S3 and what speaks its protocol, through s3fs."""

from __future__ import annotations

from typing import Any

from diffprune.errors import RemoteError
from diffprune.storage.clients import Client
from diffprune.storage.paths import RemotePath, Stat
from diffprune.storage.retries import Truncated, answer, retrying

_UNNAMED = (400, 403)  # the statuses whose reason a HEAD, which has no body, cannot tell


class S3Client(Client):
    """Reads are tied to the ETag that was indexed (``If-Match``). Credentials and endpoint are boto's (``AWS_…``)."""

    ties_reads = True

    def __init__(self, scheme: str) -> None:
        try:
            from fsspec.config import conf
        except ImportError:
            conf = {}  # the error comes from the base class
        # One try each: ``retrying`` counts them.
        network = {"retries": {"total_max_attempts": 1, "mode": "standard"}, "max_pool_connections": 64}
        network |= {"connect_timeout": 10, "read_timeout": 30, **conf.get("s3", {}).get("config_kwargs", {})}
        self.options = {"config_kwargs": network, "use_listings_cache": False}
        super().__init__(scheme)
        self.fs.retries = 1

    def head(self, path: RemotePath) -> Stat:
        bucket, key = self._place(path)

        def request() -> Stat:
            try:
                about = self._s3("head_object", Bucket=bucket, Key=key)
            except Exception as error:
                if answer(error)[0] in _UNNAMED:
                    self._range(path, 0, 1, "")  # says why
                raise
            return Stat(int(about["ContentLength"]), str(about.get("ETag", "")).strip('"'))

        if not key:
            raise FileNotFoundError(str(path))
        return retrying(str(path), request)

    def first(self, path: RemotePath, size: int) -> tuple[bytes, Stat]:
        """The first ``size`` bytes, fewer of a smaller object, and what ``head`` tells: one request for both."""
        bucket, key = self._place(path)

        async def ask() -> tuple[dict[str, Any], bytes]:
            response = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes=0-{size - 1}")
            async with response["Body"] as stream:
                return response, await stream.read()

        def request() -> tuple[bytes, Stat]:
            try:
                response, data = self._wait(ask, bytes_asked=size)
            except Exception as error:
                if answer(error)[0] != 416:
                    raise
                return b"", self.head(path)  # an empty object has no first byte
            told = str(response.get("ContentRange", "")).rpartition("/")[2]
            total = int(told) if told.isdecimal() else int(response["ContentLength"])
            if len(data) < min(size, total):
                raise Truncated(f"{min(size, total):,} bytes asked for, {len(data):,} received")
            return data, Stat(total, str(response.get("ETag", "")).strip('"'))

        if not key:
            raise FileNotFoundError(str(path))
        return retrying(str(path), request)

    def listing(self, folder: RemotePath, begin: str = "") -> dict[str, Stat | None]:
        bucket, key = self._place(folder)
        prefix = f"{key}/" if key else ""
        found: dict[str, Stat | None] = {}
        asked: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix + begin, "Delimiter": "/"}
        while True:
            where = f"{folder}/{begin}…"
            page = retrying(where, lambda: self._s3("list_objects_v2", **asked))
            for one in page.get("CommonPrefixes", []):
                found[one["Prefix"][len(prefix) :].rstrip("/")] = None
            for one in page.get("Contents", []):
                if one["Key"] != prefix:  # some tools leave an object for the folder itself
                    found[one["Key"][len(prefix) :]] = Stat(one["Size"], str(one.get("ETag", "")).strip('"'))
            if not page.get("IsTruncated"):
                return found
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def begin_upload(self, path: RemotePath) -> str:
        bucket, key = self._place(path)
        return retrying(str(path), lambda: self._s3("create_multipart_upload", Bucket=bucket, Key=key))["UploadId"]

    def upload_part(self, path: RemotePath, upload: str, number: int, data: bytes) -> dict[str, Any]:
        """A part of an upload, numbered from 1; returns what ``complete_upload`` has to be told of it."""
        bucket, key = self._place(path)

        def request() -> dict[str, Any]:
            about = {"Bucket": bucket, "Key": key, "UploadId": upload, "PartNumber": number}
            told = self._s3("upload_part", Body=data, bytes_asked=len(data), **about)
            checks = {name: told[name] for name in told if name.startswith("Checksum") and name != "ChecksumType"}
            return {"PartNumber": number, "ETag": told["ETag"], **checks}

        return retrying(f"{path}, part {number} ({len(data):,} bytes)", request)

    def complete_upload(self, path: RemotePath, upload: str, parts: list[dict[str, Any]], size: int) -> None:
        """Make the parts an object. An answer that was lost is no failure: then the object is there."""
        bucket, key = self._place(path)

        def request() -> None:
            about: dict[str, Any] = {
                "Bucket": bucket,
                "Key": key,
                "UploadId": upload,
                "MultipartUpload": {"Parts": parts},
            }
            try:
                self._s3("complete_multipart_upload", **about)
            except Exception as error:
                if answer(error)[1] != "NoSuchUpload":
                    raise
                there = self.head(path)
                if there.st_size != size or not there.version.endswith(f"-{len(parts)}"):
                    raise

        retrying(str(path), request)

    def abort_upload(self, path: RemotePath, upload: str) -> None:
        bucket, key = self._place(path)

        def request() -> None:
            try:
                self._s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
            except Exception as error:
                if answer(error)[1] != "NoSuchUpload":
                    raise

        retrying(str(path), request)

    def abort_others(self, path: RemotePath) -> None:
        """Remove the uploads of this very object that killed runs have left: unseen, but paid for."""
        bucket, key = self._place(path)
        try:
            told = retrying(str(path), lambda: self._s3("list_multipart_uploads", Bucket=bucket, Prefix=key))
        except RemoteError as error:
            if error.kind not in ("denied", "refused"):
                raise
            return  # may not list them; a lifecycle rule of the bucket has to remove them
        for one in told.get("Uploads", []):
            if one["Key"] == key:
                self.abort_upload(path, one["UploadId"])

    def put_bytes(self, path: RemotePath, data: bytes) -> None:
        """A small object, in one request."""
        bucket, key = self._place(path)

        def request() -> None:
            self._s3("put_object", Bucket=bucket, Key=key, Body=data, bytes_asked=len(data))

        retrying(str(path), request)

    def _range(self, path: RemotePath, offset: int, size: int, version: str) -> bytes:
        bucket, key = self._place(path)
        asked = {"Bucket": bucket, "Key": key, "Range": f"bytes={offset}-{offset + size - 1}"}
        asked |= {"IfMatch": f'"{version}"'} if version else {}

        async def body() -> bytes:
            response = await self.fs._call_s3("get_object", **asked)
            async with response["Body"] as stream:
                return await stream.read()

        return self._wait(body, bytes_asked=size)

    def _s3(self, method: str, bytes_asked: int = 0, **options: Any) -> dict[str, Any]:
        return self._wait(self.fs._call_s3, method, bytes_asked=bytes_asked, **options)

    def _place(self, path: RemotePath) -> tuple[str, str]:
        """Bucket and key."""
        bucket, _, key = str(path).partition("://")[2].partition("/")
        return bucket, key
