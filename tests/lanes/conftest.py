"""The real servers that lanes may ask for."""

from tests.support.servers import mariadb, mongodb, redis, seaweedfs

__all__ = ["mariadb", "mongodb", "redis", "seaweedfs"]
