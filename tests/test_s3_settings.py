"""Connection settings: one resource in the words of each client."""

from __future__ import annotations

from typing import Any

import pytest

from watcher.server.windmill import s3_settings
from watcher.server.windmill.s3_settings import NoSettings, of_resource

MINIO = {
    "bucket": "lake",
    "region": "eu-west-3",
    "endPoint": "minio.example.com",
    "port": 9000,
    "useSSL": False,
    "pathStyle": True,
    "accessKey": "id",
    "secretKey": "it's secret",
}
R2 = {
    "bucket": "lake",
    "region": "auto",
    "endPoint": "https://abc.r2.cloudflarestorage.com/",
    "accessKey": "id",
    "secretKey": "s",
    "token": "session",
}
AMAZON = {"bucket": "lake", "region": "eu-west-3", "endPoint": "", "pathStyle": False}


@pytest.mark.parametrize(
    ("value", "url", "own_url"),
    [
        (MINIO, "http://minio.example.com:9000", "http://minio.example.com:9000"),
        (R2, "https://abc.r2.cloudflarestorage.com", "https://abc.r2.cloudflarestorage.com"),
        (AMAZON, "https://s3.eu-west-3.amazonaws.com", "https://lake.s3.eu-west-3.amazonaws.com"),
        ({**MINIO, "endPoint": "http://localhost:9000"}, "http://localhost:9000", "http://localhost:9000"),
        ({**MINIO, "endPoint": "http://x", "useSSL": True, "port": None}, "http://x", "http://x"),
        ({**MINIO, "endPoint": "x/s3", "port": 1}, "http://x:1/s3", "http://x:1/s3"),
        (
            {**AMAZON, "endPoint": "lake.oss.example.com"},
            "https://lake.oss.example.com",
            "https://lake.oss.example.com",
        ),
    ],
)
def test_the_scheme_the_port_and_the_bucket_find_their_place(value: Any, url: str, own_url: str) -> None:
    bucket = of_resource(value)
    assert (bucket.url, bucket.own_url) == (url, own_url)
    assert "secret" not in repr(bucket)


def test_boto3_is_given_what_it_needs_even_without_keys() -> None:
    info = s3_settings.info(of_resource(AMAZON))
    assert info == {
        "bucket": "lake",
        "region": "eu-west-3",
        "endPoint": "s3.eu-west-3.amazonaws.com",
        "useSSL": True,
        "pathStyle": False,
        "accessKey": None,
        "secretKey": None,
    }
    assert s3_settings.info(of_resource(R2))["token"] == "session"


def test_polars_and_s3fs_are_told_the_same_bucket() -> None:
    found = s3_settings.polars(of_resource(MINIO))
    assert found == {
        "s3fs_args": {
            "endpoint_url": "http://minio.example.com:9000",
            "key": "id",
            "secret": "it's secret",
            "use_ssl": False,
            "cache_regions": False,
            "client_kwargs": {"region_name": "eu-west-3"},
        },
        "storage_options": {
            "aws_endpoint_url": "http://minio.example.com:9000",
            "aws_access_key_id": "id",
            "aws_secret_access_key": "it's secret",
            "aws_region": "eu-west-3",
            "aws_allow_http": "true",
            "aws_virtual_hosted_style_request": "false",
        },
        "s3_bucket": "lake",
    }
    virtual = s3_settings.polars(of_resource(AMAZON))
    assert virtual["storage_options"]["aws_endpoint_url"] == "https://lake.s3.eu-west-3.amazonaws.com"
    assert virtual["storage_options"]["aws_virtual_hosted_style_request"] == "true"
    assert virtual["s3fs_args"]["config_kwargs"] == {"s3": {"addressing_style": "virtual"}}
    assert "key" not in virtual["s3fs_args"]


def test_duckdbs_statements_survive_a_quote_in_a_secret() -> None:
    found = s3_settings.duckdb(of_resource(MINIO))
    assert found["s3_bucket"] == "lake"
    assert found["connection_settings_str"].splitlines() == [
        "SET home_directory='./';",
        "INSTALL 'httpfs';",
        "SET s3_url_style='path';",
        "SET s3_region='eu-west-3';",
        "SET s3_endpoint='minio.example.com:9000';",
        "SET s3_use_ssl=0;",
        "SET s3_access_key_id='id';",
        "SET s3_secret_access_key='it''s secret';",
    ]
    assert "SET s3_session_token='session';" in s3_settings.duckdb(of_resource(R2))["connection_settings_str"]
    assert "url_style" not in s3_settings.duckdb(of_resource(AMAZON))["connection_settings_str"]


def test_duckdb_reaches_azure_by_a_secret_of_its_own() -> None:
    azure = {"accountName": "acct", "containerName": "lake", "accessKey": "a'b==", "useSSL": True}
    found = s3_settings.duckdb_azure(azure)
    assert found["azure_container_path"] == "az://lake"
    assert (
        "CREATE SECRET az_secret (TYPE AZURE, CONNECTION_STRING "
        "'DefaultEndpointsProtocol=https;AccountName=acct;AccountKey=a''b==');" in found["connection_settings_str"]
    )
    local = s3_settings.duckdb_azure({**azure, "endpoint": "127.0.0.1:10000", "useSSL": False})
    assert "BlobEndpoint=http://127.0.0.1:10000/acct" in local["connection_settings_str"]


@pytest.mark.parametrize("value", [None, "s3", [], {}, {"bucket": ""}, {"bucket": 1}, {"bucket": "b", "region": 5}])
def test_a_resource_that_is_none_says_what_it_lacks(value: Any) -> None:
    with pytest.raises(NoSettings):
        of_resource(value)


@pytest.mark.parametrize("value", [None, {}, {"accountName": "a"}, {"accountName": "a", "containerName": "c"}])
def test_an_azure_resource_that_is_none_says_what_it_lacks(value: Any) -> None:
    with pytest.raises(NoSettings):
        s3_settings.duckdb_azure(value)
