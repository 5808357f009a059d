"""The XML of the S3 API, out and in. Pure.

Source: the S3 API reference. Keys are escaped; with ``encoding-type=url`` they are percent-encoded as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from urllib.parse import quote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from watcher.objects import Meta
from watcher.server.windmill.sigv4 import Refusal

HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n'
_NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
MOST_DELETED = 1000
MOST_PARTS = 10_000

STATUS: Mapping[str, int] = {
    "AccessDenied": 403,
    "AuthorizationHeaderMalformed": 400,
    "AuthorizationQueryParametersError": 400,
    "BadDigest": 400,
    "EntityTooLarge": 400,
    "ExpiredToken": 400,
    "IncompleteBody": 400,
    "InsufficientStorage": 507,
    "InternalError": 500,
    "InvalidAccessKeyId": 403,
    "InvalidArgument": 400,
    "InvalidPart": 400,
    "InvalidPartOrder": 400,
    "InvalidRange": 416,
    "InvalidRequest": 400,
    "InvalidURI": 400,
    "MalformedXML": 400,
    "MetadataTooLarge": 400,
    "MethodNotAllowed": 405,
    "MissingContentLength": 411,
    "NoSuchBucket": 404,
    "NoSuchKey": 404,
    "NoSuchUpload": 404,
    "NotImplemented": 501,
    "PreconditionFailed": 412,
    "RequestTimeTooSkewed": 403,
    "ServiceUnavailable": 503,
    "SignatureDoesNotMatch": 403,
    "XAmzContentSHA256Mismatch": 400,
}
"""The HTTP status of each code."""


def element(name: str, text: str | int) -> str:
    return f"<{name}>{_escaped(str(text))}</{name}>"


def _escaped(text: str) -> str:
    return escape(text, {"\r": "&#13;", "\n": "&#10;"})


def document(root: str, inside: str, *, head: bool = True) -> str:
    return f"{HEAD if head else ''}<{root} {_NAMESPACE}>{inside}</{root}>"


def error(code: str, message: str, resource: str, request_id: str, *, head: bool = True) -> str:
    """``head`` False: the first line was sent already."""
    fields = {"Code": code, "Message": message, "Resource": resource, "RequestId": request_id}
    inside = "".join(element(name, value) for name, value in fields.items())
    return f"{HEAD if head else ''}<Error>{inside}</Error>"


def etag(text: str) -> str:
    """In quotes, as headers and listings have it."""
    return '"' + text.removeprefix("W/").strip('"') + '"'


def instant(at: datetime) -> str:
    return f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03}Z"


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing, and how it was asked for. ``after`` is where the next one begins; None: this was all."""

    bucket: str
    prefix: str
    delimiter: str
    most: int
    objects: Sequence[Meta]
    folders: Sequence[str]
    after: str | None
    encoded: bool
    token: str = ""  # V2: how this page was asked for
    next_token: str = ""
    start: str = ""  # V2: start-after; V1: marker


def listing(page: Page, *, version: int) -> str:
    """ListObjects (1) and ListObjectsV2 (2)."""

    def key(text: str) -> str:
        return quote(text, safe="/-_.~*") if page.encoded else text

    parts = [
        element("Name", page.bucket),
        element("Prefix", key(page.prefix)),
        element("MaxKeys", page.most),
        element("IsTruncated", "false" if page.after is None else "true"),
    ]
    if page.delimiter:
        parts.append(element("Delimiter", key(page.delimiter)))
    if page.encoded:
        parts.append(element("EncodingType", "url"))
    if version == 2:
        parts.append(element("KeyCount", len(page.objects) + len(page.folders)))
        more = {
            "ContinuationToken": page.token,
            "NextContinuationToken": page.next_token,
            "StartAfter": key(page.start),
        }
        parts += [element(name, value) for name, value in more.items() if value]
    else:
        parts.append(element("Marker", key(page.start)))
        if page.after is not None:
            parts.append(element("NextMarker", key(page.after)))
    for each in page.objects:
        parts.append(
            f"<Contents>{element('Key', key(each.key))}{element('LastModified', instant(each.modified))}"
            f"{element('ETag', etag(each.etag))}{element('Size', each.size)}"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )
    parts += [f"<CommonPrefixes>{element('Prefix', key(folder))}</CommonPrefixes>" for folder in page.folders]
    return document("ListBucketResult", "".join(parts))


def buckets(names: Iterable[str], at: datetime) -> str:
    inside = "".join(
        f"<Bucket>{element('Name', name)}{element('CreationDate', instant(at))}</Bucket>" for name in names
    )
    return document("ListAllMyBucketsResult", f"<Buckets>{inside}</Buckets>")


def location(region: str) -> str:
    return f"{HEAD}<LocationConstraint {_NAMESPACE}>{_escaped(region)}</LocationConstraint>"


def copied(root: str, of: str, at: datetime) -> str:
    return document(root, element("LastModified", instant(at)) + element("ETag", etag(of)))


def begun(bucket: str, key: str, upload: str) -> str:
    inside = element("Bucket", bucket) + element("Key", key) + element("UploadId", upload)
    return document("InitiateMultipartUploadResult", inside)


def completed(bucket: str, key: str, of: str, place: str, *, head: bool = True) -> str:
    inside = element("Location", place) + element("Bucket", bucket) + element("Key", key) + element("ETag", etag(of))
    return document("CompleteMultipartUploadResult", inside, head=head)


def parts(bucket: str, key: str, upload: str, found: Iterable[tuple[int, int, str, datetime]], most: int) -> str:
    """ListParts: number, size, ETag and time of each."""
    inside = [element("Bucket", bucket), element("Key", key), element("UploadId", upload), element("MaxParts", most)]
    inside.append("<IsTruncated>false</IsTruncated>")
    for number, size, of, at in found:
        inside.append(
            f"<Part>{element('PartNumber', number)}{element('LastModified', instant(at))}"
            f"{element('ETag', etag(of))}{element('Size', size)}</Part>"
        )
    return document("ListPartsResult", "".join(inside))


def uploads(bucket: str, found: Iterable[tuple[str, str, datetime]]) -> str:
    """ListMultipartUploads: key, id and beginning of each."""
    inside = [element("Bucket", bucket), "<IsTruncated>false</IsTruncated>"]
    for key, upload, at in found:
        inside.append(
            f"<Upload>{element('Key', key)}{element('UploadId', upload)}{element('Initiated', instant(at))}</Upload>"
        )
    return document("ListMultipartUploadsResult", "".join(inside))


def deleted(gone: Collection[str], failed: Mapping[str, tuple[str, str]]) -> str:
    """DeleteObjects: keys, and for each that is still there code and message."""
    inside = [f"<Deleted>{element('Key', key)}</Deleted>" for key in gone]
    for key, (code, message) in failed.items():
        inside.append(f"<Error>{element('Key', key)}{element('Code', code)}{element('Message', message)}</Error>")
    return document("DeleteResult", "".join(inside))


# --- in ---------------------------------------------------------------------------------------------------------------


def _root(raw: bytes) -> ElementTree.Element:
    if b"<!" in raw:  # no document type, and so no entities that grow
        raise Refusal("MalformedXML", "the XML must be plain elements")
    try:
        root = ElementTree.fromstring(raw)  # noqa: S314  (no entities: see above)
    except ElementTree.ParseError as problem:
        raise Refusal("MalformedXML", f"the body is not XML: {problem}") from problem
    for each in root.iter():
        each.tag = each.tag.rpartition("}")[2]
    return root


def parse_complete(raw: bytes) -> list[tuple[int, str]]:
    """The parts that an upload is made of: number and ETag, in order. Raises Refusal."""
    found = []
    for part in _root(raw).iter("Part"):
        number, of = part.findtext("PartNumber") or "", part.findtext("ETag") or ""
        if not number.strip().isdigit() or not of:
            raise Refusal("MalformedXML", "a part has a PartNumber and an ETag")
        found.append((int(number), of.strip().strip('"')))
    if not found or len(found) > MOST_PARTS:
        raise Refusal("MalformedXML", f"an upload has 1 to {MOST_PARTS} parts")
    if any(later[0] <= earlier[0] for earlier, later in pairwise(found)):
        raise Refusal("InvalidPartOrder", "the parts must be in order of their numbers")
    return found


def parse_delete(raw: bytes) -> tuple[list[str], bool]:
    """The keys to delete, and whether only failures are to be told. Raises Refusal."""
    root = _root(raw)
    keys = [each.findtext("Key") or "" for each in root.iter("Object")]
    if not keys or len(keys) > MOST_DELETED:
        raise Refusal("MalformedXML", f"1 to {MOST_DELETED} objects are deleted at once")
    return keys, root.findtext("Quiet") == "true"
