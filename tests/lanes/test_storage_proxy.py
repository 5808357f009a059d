"""Real S3 clients through the proxy, with the settings that Windmill's own clients hand out, over a folder and S3."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import windmill
from tests.support.servers import Azurite, SeaweedFS, missing
from tests.support.windmill import NEWEST, NPM, Place, Said, place, python

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
KINDS = pytest.mark.parametrize("kind", ["folder", "s3"])

EVERYTHING = '[{pattern = "**/*", allow = "read,write,delete,list"}]'
DUCKDB = "1.5.5"
"""The newest version whose extension is to be had from PyPI."""
HTTPFS = f"duckdb_extension_httpfs/extensions/v{DUCKDB}/httpfs.duckdb_extension"


@pytest.fixture
def lake(seaweedfs: SeaweedFS) -> SeaweedFS:
    """The S3 server, its bucket empty."""
    import boto3

    bucket = boto3.resource("s3", **direct(seaweedfs)).Bucket(seaweedfs.bucket)
    bucket.objects.all().delete()
    return seaweedfs


def direct(lake: SeaweedFS) -> dict[str, Any]:
    """boto3's arguments for the server itself."""
    return {
        "endpoint_url": lake.url,
        "region_name": "us-east-1",
        "aws_access_key_id": lake.access_key,
        "aws_secret_access_key": lake.resource["secretKey"],
    }


def config(kind: str, lake: SeaweedFS, more: str = "") -> str:
    storage = 'kind = "s3"\nresource = "u/admin/lake"' if kind == "s3" else 'kind = "folder"'
    return configured(storage, "s3", lake.resource, more)


def configured(storage: str, type: str, resource: dict[str, Any], more: str = "") -> str:
    value = ", ".join(f"{name} = {json.dumps(each)}" for name, each in resource.items())
    return (
        f'{windmill.CONFIG}\n[resources."u/admin/lake"]\ntype = "{type}"\nvalue = {{ {value} }}\n'
        f"[storage]\n{storage}\npermissions = {EVERYTHING}\n{more}"
    )


@asynccontextmanager
async def job(where: Path, kind: str, lake: SeaweedFS, more: str = "") -> AsyncIterator[tuple[Place, dict[str, str]]]:
    """A service with this kind of storage, and the environment of a job that runs until it is let go."""
    async with place(where, config(kind, lake, more)) as here:
        yield here, {**await here.job(), "HOME": str(where)}


async def client(code: str, env: dict[str, str], seconds: float = 300) -> Any:
    said = await python(NEWEST, code, env, seconds)
    assert said.code == 0, said.err
    return said.value


# --- boto3 ------------------------------------------------------------------------------------------------------------

BOTO3 = """
    import base64, io, os, boto3, httpx, wmill
    from botocore.config import Config
    from botocore.exceptions import ClientError
    from boto3.s3.transfer import TransferConfig
    settings = wmill.boto3_connection_settings()
    bucket = wmill.polars_connection_settings().s3_bucket
    s3 = boto3.client("s3", **settings)

    key = "boto/a b+ü=&.bin"
    s3.put_object(Bucket=bucket, Key=key, Body=b"hello", ContentType="text/x-mine", ContentDisposition="inline")
    found = s3.get_object(Bucket=bucket, Key=key)
    assert (found["Body"].read(), found["ContentType"]) == (b"hello", "text/x-mine")
    assert found["ContentDisposition"] == "inline"
    assert s3.get_object(Bucket=bucket, Key=key, Range="bytes=1-2")["Body"].read() == b"el"

    said = {"Metadata": {"source": "a b, c", "run-no": "7", "1st": "x"}, "CacheControl": "max-age=60"}
    said |= {"ContentEncoding": "gzip", "ContentLanguage": "de"}
    s3.put_object(Bucket=bucket, Key="said/first", Body=b"x", **said)
    s3.copy_object(Bucket=bucket, Key="said/copy", CopySource={"Bucket": bucket, "Key": "said/first"})
    for name in ("said/first", "said/copy"):
        for found in (s3.head_object(Bucket=bucket, Key=name), s3.get_object(Bucket=bucket, Key=name)):
            assert {each: found.get(each) for each in said} == said, found

    big = os.urandom(20 << 20) + b"end"
    parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20, max_concurrency=4)
    s3.upload_fileobj(io.BytesIO(big), bucket, "boto/big", ExtraArgs={"Metadata": {"no": "1"}}, Config=parts)
    back = io.BytesIO()
    s3.download_fileobj(bucket, "boto/big", back, Config=parts)
    assert back.getvalue() == big
    head = s3.head_object(Bucket=bucket, Key="boto/big")
    assert (head["ContentLength"], head["Metadata"]) == (len(big), {"no": "1"})
    listed = {each["Key"]: each for each in s3.list_objects_v2(Bucket=bucket, Prefix="boto/")["Contents"]}
    assert sorted(listed) == sorted([key, "boto/big"])
    assert listed["boto/big"]["ETag"] == head["ETag"]

    for algorithm in ("CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256"):
        s3.put_object(Bucket=bucket, Key="boto/sum", Body=io.BytesIO(b"x" * 100_000), ChecksumAlgorithm=algorithm)

    s3.copy({"Bucket": bucket, "Key": "boto/big"}, bucket, "boto/copy", Config=parts)
    assert s3.get_object(Bucket=bucket, Key="boto/copy")["Body"].read() == big

    for n in range(25):
        s3.put_object(Bucket=bucket, Key=f"boto/many/{n:03}", Body=b"")
    asked = {"Bucket": bucket, "Prefix": "boto/many/", "PaginationConfig": {"PageSize": 10}}
    pages = list(s3.get_paginator("list_objects_v2").paginate(**asked))
    names = [each["Key"] for page in pages for each in page.get("Contents", [])]
    assert (len(pages), names) == (3, [f"boto/many/{n:03}" for n in range(25)])
    assert len(s3.list_objects(Bucket=bucket, Prefix="boto/many/")["Contents"]) == 25
    folders = s3.list_objects_v2(Bucket=bucket, Prefix="boto/", Delimiter="/")["CommonPrefixes"]
    assert folders == [{"Prefix": "boto/many/"}]

    modern = boto3.client("s3", config=Config(signature_version="s3v4"), **settings)
    url = modern.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=60)
    assert httpx.get(url).content == b"hello"
    assert httpx.get(url.replace("Expires=60", "Expires=61")).status_code == 403
    url = modern.generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": "boto/put"}, ExpiresIn=60)
    assert httpx.put(url, content=b"by url").status_code == 200
    assert s3.get_object(Bucket=bucket, Key="boto/put")["Body"].read() == b"by url"

    def refused(work):
        try:
            work()
        except ClientError as error:
            return error.response["Error"]["Code"]

    for name, sum in (("CRC32", 4), ("CRC32C", 4), ("CRC64NVME", 8), ("SHA1", 20), ("SHA256", 32)):
        wrong = {f"Checksum{name}": base64.b64encode(bytes(sum)).decode()}
        assert refused(lambda: s3.put_object(Bucket=bucket, Key="boto/never", Body=b"x", **wrong)) == "BadDigest"

    for n in range(3):  # a refusal leaves the connection fit for what is asked next
        assert refused(lambda: s3.put_object(Bucket=bucket, Key="/boto", Body=b"x")) == "InvalidArgument"

    upload = s3.create_multipart_upload(Bucket=bucket, Key="boto/never")["UploadId"]
    s3.upload_part(Bucket=bucket, Key="boto/never", UploadId=upload, PartNumber=1, Body=b"x")
    assert len(s3.list_multipart_uploads(Bucket=bucket)["Uploads"]) == 1
    s3.abort_multipart_upload(Bucket=bucket, Key="boto/never", UploadId=upload)

    wrong = {**settings, "aws_secret_access_key": "x"}
    codes = [
        refused(lambda: s3.get_object(Bucket=bucket, Key="gone")),
        refused(lambda: s3.get_object(Bucket="other", Key="gone")),
        refused(lambda: s3.head_object(Bucket=bucket, Key="gone")),
        refused(lambda: s3.get_object_acl(Bucket=bucket, Key=key)),
        refused(lambda: boto3.client("s3", **wrong).list_objects_v2(Bucket=bucket)),
    ]
    s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": f"boto/many/{n:03}"} for n in range(25)]})
    assert "Contents" not in s3.list_objects_v2(Bucket=bucket, Prefix="boto/many/")
    for leaked in (os.environ.get("LAKE_SECRET", "?"), os.environ["WM_TOKEN"]):
        assert leaked not in str(settings)
    show([bucket, codes])
"""


@KINDS
async def test_boto3_does_all_that_people_do_with_a_bucket(tmp_path: Path, lake: SeaweedFS, kind: str) -> None:
    async with job(tmp_path, kind, lake) as (here, env):
        env["LAKE_SECRET"] = lake.resource["secretKey"]
        bucket, codes = await client(BOTO3, env)
        assert bucket == ("lake" if kind == "s3" else "objects")
        assert codes == ["NoSuchKey", "NoSuchBucket", "404", "NotImplemented", "SignatureDoesNotMatch"]
        assert list(here.where.rglob("uploads/*")) == []
        await here.let_go([])
        said = await python(NEWEST, BOTO3, env)  # whose job is over
        assert "Error" in said.err


async def test_boto3_does_the_same_with_a_container_of_azure(tmp_path: Path, azurite: Azurite) -> None:
    resource = azurite.create()
    storage = 'kind = "azure_blob"\nresource = "u/admin/lake"'
    async with place(tmp_path, configured(storage, "azure_blob", resource)) as here:
        env = {**await here.job(), "HOME": str(tmp_path), "LAKE_SECRET": resource["accessKey"]}
        bucket, codes = await client(BOTO3, env)
        assert bucket == resource["containerName"]
        assert codes == ["NoSuchKey", "NoSuchBucket", "404", "NotImplemented", "SignatureDoesNotMatch"]
        with azurite.client().get_container_client(bucket) as container:
            assert {"boto/a b+ü=&.bin", "boto/big", "boto/copy"} <= {blob.name for blob in container.list_blobs()}
        assert list(here.where.rglob("uploads/*")) == []


# --- Polars, s3fs, DuckDB ---------------------------------------------------------------------------------------------

POLARS = """
    import polars as pl, s3fs, wmill
    from wmill import S3Object
    where = {where!r}
    found = wmill.polars_connection_settings(where)
    bucket, options = found.s3_bucket, found.storage_options
    df = pl.DataFrame({{"n": range(300_000), "t": [f"text {{n % 1000}}" for n in range(300_000)]}})
    df.write_parquet(f"s3://{{bucket}}/pl/a.parquet", storage_options=options, row_group_size=50_000)
    df.lazy().sink_parquet(f"s3://{{bucket}}/pl/b.parquet", storage_options=options)
    df.head(1000).write_csv(f"s3://{{bucket}}/pl/c.csv", storage_options=options)
    assert pl.read_parquet(f"s3://{{bucket}}/pl/a.parquet", storage_options=options).equals(df)
    lazy = pl.scan_parquet(f"s3://{{bucket}}/pl/*.parquet", storage_options=options)
    assert lazy.filter(pl.col("n") >= 299_990).select(pl.len()).collect().item() == 20
    csv = pl.scan_csv(f"s3://{{bucket}}/pl/c.csv", storage_options=options)
    assert csv.select(pl.col("n").sum()).collect().item() == 499_500

    # As the page that introduces all this does it.
    fs = s3fs.S3FileSystem(**found.s3fs_args)
    output = "output/result.parquet"
    with fs.open(f"s3://{{bucket}}/{{output}}", mode="wb") as out:
        df.write_parquet(out)
    with fs.open(f"{{bucket}}/{{output}}", "rb") as file:
        assert pl.read_parquet(file).equals(df)
    names = [name.removeprefix(f"{{bucket}}/pl/") for name in fs.ls(f"{{bucket}}/pl")]
    assert sorted(names) == ["a.parquet", "b.parquet", "c.csv"]
    with fs.open(f"{{bucket}}/pl/big", "wb", block_size=5 << 20) as out:
        for n in range(12):
            out.write(bytes([n]) * (1 << 20))
    assert fs.info(f"{{bucket}}/pl/big")["size"] == 12 << 20
    assert fs.cat_file(f"{{bucket}}/pl/big", start=(5 << 20) - 1, end=(5 << 20) + 1) == bytes([4, 5])
    fs.mv(f"{{bucket}}/pl/big", f"{{bucket}}/pl/moved")
    assert not fs.exists(f"{{bucket}}/pl/big") and fs.exists(f"{{bucket}}/pl/moved")
    fs.rm(f"{{bucket}}/pl", recursive=True)
    assert not any(fs.exists(f"{{bucket}}/pl/{{name}}") for name in names)
    show(S3Object(s3=output))
"""


@KINDS
async def test_polars_and_s3fs_work_through_the_proxy(tmp_path: Path, lake: SeaweedFS, kind: str) -> None:
    async with job(tmp_path, kind, lake) as (_, env):
        assert await client(POLARS.format(where=""), env) == {"s3": "output/result.parquet"}


async def test_polars_and_s3fs_reach_a_resource_directly(tmp_path: Path, lake: SeaweedFS) -> None:
    async with job(tmp_path, "folder", lake) as (_, env):
        await client(POLARS.format(where="u/admin/lake"), env)
        info = await client("import wmill\nshow(wmill.boto3_connection_settings('u/admin/lake'))", env)
        assert info == {**direct(lake), "use_ssl": False}


async def test_a_public_storage_is_reached_directly(tmp_path: Path, lake: SeaweedFS) -> None:
    async with job(tmp_path, "s3", lake, "public = true\n") as (_, env):
        info = await client("import wmill\nshow(wmill.boto3_connection_settings())", env)
        assert info == {**direct(lake), "use_ssl": False}
        await client(POLARS.format(where=""), env)


def duckdb() -> Path:
    """A folder with DuckDB and its httpfs extension, from PyPI the first time."""
    folder = windmill.CACHE / f"duckdb-{DUCKDB}"
    if not folder.exists():
        part = windmill.CACHE / f"duckdb-{DUCKDB}.{os.getpid()}.part"
        packages = [f"duckdb=={DUCKDB}", f"duckdb-extension-httpfs=={DUCKDB}"]
        command = [*windmill._installer(), "--target", str(part), *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode != 0:
            missing(f"DuckDB with httpfs ({done.stderr.strip()[-200:]})")
        windmill._settle(part, folder)
    return folder


# The settings install the extension from DuckDB's own site. Here it lies where that would have put it.
DUCK = """
    import os, shutil, sys
    sys.path.insert(0, {folder!r})
    import duckdb, wmill
    os.chdir(os.environ["HOME"])
    assert duckdb.__version__ == {version!r}
    db = duckdb.connect()
    platform = db.execute("pragma platform").fetchone()[0]
    place = ".duckdb/extensions/v{version}/" + platform
    os.makedirs(place, exist_ok=True)
    shutil.copy(os.path.join({folder!r}, {httpfs!r}), place)
    found = wmill.duckdb_connection_settings({where!r})
    db.execute(found.connection_settings_str)
    bucket = found.s3_bucket
    db.execute(f"copy (select range n, 'text ' || range t from range(1000000)) to 's3://{{bucket}}/dk/a b.parquet'")
    db.execute(f"copy (select range n from range(1000)) to 's3://{{bucket}}/dk/c.csv' (header)")
    rows = db.execute(f"select count(*), sum(n) from 's3://{{bucket}}/dk/*.parquet'").fetchone()
    assert rows == (1000000, 499999500000)
    assert db.execute(f"select sum(n) from read_csv('s3://{{bucket}}/dk/c.csv')").fetchone() == (499500,)
    names = db.execute(f"select file from glob('s3://{{bucket}}/dk/**') order by 1").fetchall()
    show([name for (name,) in names])
"""


@pytest.mark.parametrize(("kind", "where"), [("folder", ""), ("s3", ""), ("folder", "u/admin/lake")])
async def test_duckdb_works_through_the_proxy_and_directly(
    tmp_path: Path, lake: SeaweedFS, kind: str, where: str
) -> None:
    folder = str(await asyncio.to_thread(duckdb))
    async with job(tmp_path, kind, lake) as (_, env):
        code = DUCK.format(folder=folder, version=DUCKDB, httpfs=HTTPFS, where=where)
        bucket = "lake" if where or kind == "s3" else "objects"
        assert await client(code, env) == [f"s3://{bucket}/dk/a b.parquet", f"s3://{bucket}/dk/c.csv"]


# --- TypeScript -------------------------------------------------------------------------------------------------------

SCRIPT = """
    import { S3Client } from "@bradenmacdonald/s3-lite-client";
    import { HelpersService, denoS3LightClientSettings, getPresignedS3PublicUrl, signS3Objects } from "windmill-client";
    const workspace = process.env.WM_WORKSPACE;
    const s3 = new S3Client(await denoS3LightClientSettings());
    await s3.putObject("ts/a b+ü.txt", "hello");
    const text = await (await s3.getObject("ts/a b+ü.txt")).text();
    const names = [];
    for await (const each of s3.listObjects({ prefix: "ts/" })) names.push(each.key);
    const big = new Uint8Array(12 << 20).fill(7);
    const stream = new ReadableStream({ start(to) { to.enqueue(big); to.close(); } });
    await s3.putObject("ts/big", stream, { partSize: 5 << 20 });
    const size = (await s3.statObject("ts/big")).size;
    const missing = await s3.exists("ts/gone");
    const polars = await HelpersService.polarsConnectionSettingsV2({ workspace, requestBody: {} });
    const duck = await HelpersService.duckdbConnectionSettingsV2({ workspace, requestBody: {} });
    const link = await getPresignedS3PublicUrl("s3:///ts/big");
    const body = await (await fetch(link)).arrayBuffer();
    const bad = (await fetch(link.replace("sig=", "sig=0"))).status;
    const [signed] = await signS3Objects([{ s3: "ts/big" }]);
    console.log(JSON.stringify({ text, names, size, missing, bytes: body.byteLength, bad, keys: Object.keys(signed),
      bucket: polars.s3_bucket, duck: duck.connection_settings_str.includes("s3_endpoint") }));
"""


def modules() -> Path:
    """A folder with Windmill's client and the S3 client that its settings are made for, from npm the first time."""
    folder = windmill.CACHE / f"s3-clients-{NPM}"
    if not folder.exists():
        npm = shutil.which("npm") or missing("npm")
        part = windmill.CACHE / f"s3-clients-{NPM}.{os.getpid()}.part"
        part.mkdir(parents=True)
        (part / "package.json").write_text("{}")
        packages = [f"windmill-client@{NPM}", "@bradenmacdonald/s3-lite-client@1.0.0"]
        done = subprocess.run(
            [npm, "install", "--silent", "--prefix", str(part), *packages], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            missing(f"the S3 client for TypeScript ({done.stderr.strip()[-200:]})")
        windmill._settle(part, folder)
    return folder


async def typescript(runtime: str, env: dict[str, str]) -> Said:
    folder = await asyncio.to_thread(modules)
    code = textwrap.dedent(SCRIPT)
    if runtime == "node":
        node = shutil.which("node") or missing("node")
        return await windmill._run([node, "--input-type=module", "-e", code], windmill._bare(env), 120, cwd=folder)
    file = folder / f"{os.getpid()}.mjs"
    file.write_text('import process from "node:process";\n' + code)
    try:
        command = [windmill.deno(), "run", "-A", "--no-lock", "--node-modules-dir=manual", str(file)]
        return await windmill._run(command, windmill._bare(env) | {"DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}, 120)
    finally:
        file.unlink()


@KINDS
@pytest.mark.parametrize("runtime", ["node", "deno"])
async def test_typescript_works_through_the_proxy(tmp_path: Path, lake: SeaweedFS, kind: str, runtime: str) -> None:
    async with job(tmp_path, kind, lake) as (_, env):
        assert (await typescript(runtime, env)).value == {
            "text": "hello",
            "names": ["ts/a b+ü.txt"],
            "size": 12 << 20,
            "missing": False,
            "bytes": 12 << 20,
            "bad": 403,
            "keys": ["s3", "presigned"],
            "bucket": "lake" if kind == "s3" else "objects",
            "duck": True,
        }


# --- what goes wrong --------------------------------------------------------------------------------------------------

BROKEN = """
    import os, socket, time, boto3, wmill
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials
    settings = wmill.boto3_connection_settings()
    bucket = wmill.polars_connection_settings().s3_bucket
    s3 = boto3.client("s3", **settings)
    upload = s3.create_multipart_upload(Bucket=bucket, Key="broken/parts")["UploadId"]
    keys = Credentials(settings["aws_access_key_id"], settings["aws_secret_access_key"])
    host, _, room = settings["endpoint_url"].removeprefix("http://").partition("/")
    for path in ("broken/whole", f"broken/parts?partNumber=1&uploadId={upload}"):
        request = AWSRequest("PUT", f"http://{host}/{room}/{bucket}/{path}", headers={"Content-Length": str(64 << 20)})
        request.context["payload_signing_enabled"] = False
        request.headers["X-Amz-Content-SHA256"] = "UNSIGNED-PAYLOAD"
        S3SigV4Auth(keys, "s3", "us-east-1").add_auth(request)
        lines = [f"PUT /{room}/{bucket}/{path} HTTP/1.1", f"Host: {host}"]
        lines += [f"{name}: {value}" for name, value in request.headers.items()]
        with socket.create_connection(host.split(":")) as wire:
            wire.sendall(("\\r\\n".join(lines) + "\\r\\n\\r\\n").encode() + os.urandom(24 << 20))
    show(upload)
"""


@KINDS
async def test_a_connection_that_breaks_in_the_middle_leaves_nothing(
    tmp_path: Path, lake: SeaweedFS, kind: str
) -> None:
    import boto3

    async with job(tmp_path, kind, lake) as (here, env):
        upload = await client(BROKEN, env)
        waiting = here.where / "data" / "uploads" / upload
        roots = [waiting, here.where / "data" / "objects"]

        def left() -> list[str]:
            files = [file for root in roots for file in root.rglob("*") if file.is_file()]
            return [file.name for file in files if file.name != "upload.json"]

        for _ in range(500):
            if not left():
                break
            await asyncio.sleep(0.02)  # another process: there is nothing to await
        assert left() == []
        s3 = boto3.client("s3", **direct(lake))
        assert "Contents" not in s3.list_objects_v2(Bucket=lake.bucket)
        for _ in range(500):
            if "Uploads" not in s3.list_multipart_uploads(Bucket=lake.bucket):
                break
            await asyncio.sleep(0.02)
        assert "Uploads" not in s3.list_multipart_uploads(Bucket=lake.bucket)


async def test_a_link_is_good_after_the_service_was_killed(tmp_path: Path, lake: SeaweedFS) -> None:
    async with job(tmp_path, "s3", lake) as (here, env):
        code = """
            import boto3, wmill
            s3 = boto3.client("s3", **wmill.boto3_connection_settings())
            s3.put_object(Bucket="lake", Key="a b", Body=b"hello")
            show(wmill.get_presigned_s3_public_url("s3:///a b"))
        """
        link = (await client(code, env)).partition("/api/")[2]
        assert (await here.service.ask("GET", f"/api/{link}".replace(" ", "%20"), None, {}))[0] == 200
        here.service.kill()
        here.service.start()
        await here.service.ready()
        path = f"/api/{link}".replace(" ", "%20")
        status, text = await here.service.ask("GET", path, None, {})
        assert (status, text) == (200, "hello")
        assert (await here.service.ask("GET", path + "0", None, {}))[0] == 403
        said = await python(NEWEST, code, env)  # the job died with the service
        assert said.code != 0


def test_the_service_needs_no_s3_client_of_ours() -> None:
    """Nothing that the lanes install is imported by the service."""
    code = "import sys, watcher.app\nassert not {'boto3', 'obstore', 'polars', 'duckdb'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
