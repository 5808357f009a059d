"""The real servers that lanes may ask for."""

from tests.support.servers import azurite, mariadb, mongodb, redis, seaweedfs

__all__ = ["azurite", "mariadb", "mongodb", "redis", "seaweedfs"]
