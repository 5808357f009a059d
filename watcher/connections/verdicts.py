"""What an error of a database's client means, and what to do about it. Pure: errors in, sentences out.

The sentences are ours: what a client says is shown only where nothing better is known, and never with a secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "ok", "dns", "refused", "unreachable", "timeout", "tls", "password", "no_database", "permissions", "version",
    "busy", "client", "other",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a test went: what is so, in a sentence, and what to do if that is wrong."""

    kind: Kind
    said: str
    do: str = ""
    version: str = ""

    @property
    def ok(self) -> bool:
        return self.kind == "ok"


@dataclass(frozen=True, slots=True)
class Place:
    """Where somebody tried to get: ``where`` is HOST:PORT, the rest as the resource has it."""

    type: str
    where: str
    user: str = ""
    database: str = ""

    @property
    def who(self) -> str:
        nobody = "the default user" if self.type == "redis" else "a connection without a user"
        return f"user {self.user}" if self.user else nobody


NO_TLS: Mapping[str, str] = {
    "postgresql": 'sslmode = "disable" if the way there is safe',
    "mysql": "ssl = false if the way there is safe",
    "mongodb": "tls = false if the way there is safe",
    "redis": "tls = false if the way there is safe",
    "upstash": "an https:// address",
    "s3": "useSSL = false if the way there is safe",
    "azure_blob": "useSSL = false if the way there is safe",
}
WITH_TLS: Mapping[str, str] = {
    "postgresql": 'sslmode = "require"', "mysql": "ssl = true", "mongodb": "tls = true", "redis": "tls = true",
    "upstash": "an https:// address", "s3": "useSSL = true", "azure_blob": "useSSL = true",
}  # fmt: skip
CERTIFICATE: Mapping[str, str] = {
    "postgresql": "put the authority's certificate into root_certificate_pem",
    "mysql": "name the authority's certificate file in ssl_ca",
    "mongodb": "name the authority's certificate file in tlsCAFile",
    "redis": "name the authority's certificate file in ssl_ca_certs",
}


def judge(error: BaseException, place: Place) -> Verdict:
    """The verdict on what a client raised."""
    chain = list(_chain(error))
    said = "\n".join(str(each) for each in chain)
    codes = {code for each in chain for code in _codes(each)}
    own = {"postgresql": _postgresql, "mysql": _mysql, "mongodb": _mongodb, "redis": _redis, "upstash": _upstash}
    return own[place.type](said, codes, place) or _network(said, chain, place) or _other(said, error, place)


def judge_store(error: BaseException, place: Place) -> Verdict:
    """The verdict on what object storage raised; ``place.database`` is its bucket or container."""
    chain = list(_chain(error))
    said = "\n".join(str(each) for each in chain)
    if _any(said, r"there is no (bucket|container)"):
        return Verdict("no_database", f"there is no {place.database}", "look for a typo in its name, or create it")
    if _any(said, r"SignatureDoesNotMatch", r"InvalidAccessKeyId", r"AuthorizationFailure", r"failed to authenticate",
            r"ExpiredToken", r"InvalidToken"):  # fmt: skip
        do = "copy the access key and the secret key once more, and look at this machine's clock"
        return Verdict("password", f"{place.where} does not take the keys of {place.database}", do)
    if _any(said, r"access is refused", r"AccessDenied"):
        do = "let an administrator allow it to list the bucket, to read objects and to write them"
        return Verdict("permissions", f"these keys may not list {place.database}", do)
    if isinstance(error, TimeoutError):
        do = "look at firewalls on the way, or give it longer with --timeout"
        return Verdict("timeout", f"{place.where} did not answer in time", do)
    if found := _network(said, chain, place):
        return found
    return Verdict("unreachable", _first(said), "correct the resource: bucket, region, endpoint and keys")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _codes(error: BaseException) -> Iterator[Any]:
    yield getattr(error, "sqlstate", None)
    yield getattr(error, "code", None)
    if error.args and isinstance(error.args[0], int):
        yield error.args[0]


def _any(said: str, *patterns: str) -> bool:
    return any(re.search(pattern, said, re.I) for pattern in patterns)


# --- the net ----------------------------------------------------------------------------------------------------------


def _network(said: str, chain: Sequence[BaseException], place: Place) -> Verdict | None:
    names = {type(each).__name__ for each in chain}
    host = re.sub(r":\d+\Z", "", place.where)
    if "gaierror" in names or _any(
        said, r"name or service not known", r"could not translate host name", r"failure in name resolution",
        r"failed to resolve", r"no address associated", r"dns query name does not exist", r"nodename nor servname",
        r"errno -[2-5]\b", r"resolution lifetime expired", r"all nameservers failed",
    ):  # fmt: skip
        more = ""
        if host.startswith("db.") and host.endswith(".supabase.co"):
            more = "; this one has an IPv6 address only: use the pooler's connection string where there is no IPv6"
        return Verdict(
            "dns", f"there is no host {host}", f"look for a typo in the host, and at this machine's DNS{more}"
        )
    if tls := _tls(said, place):
        return tls
    if "ConnectionRefusedError" in names or _any(said, r"connection refused", r"errno 111\b", r"os error 111"):
        do = "start the server, correct the port, or let it listen on that address"
        return Verdict("refused", f"nobody listens at {place.where}", do)
    if _any(said, r"no such file or directory") and "/" in place.where:
        return Verdict("refused", f"there is no socket {place.where}", "start the server, or correct its path")
    if _any(said, r"no route to host", r"network is unreachable", r"errno 1(01|13)\b"):
        return Verdict("unreachable", f"no way leads to {place.where}", "look at this machine's network and firewall")
    if names & {"TimeoutError", "timeout"} or _any(said, r"tim(ed|e) ?out", r"timeout expired"):
        do = "look at firewalls and allowed addresses on the way, or give it longer with --timeout"
        return Verdict("timeout", f"{place.where} did not answer in time", do)
    if _any(
        said, r"connection (was )?(reset|closed)", r"server closed the connection", r"lost connection",
        r"errno 104\b", r"unexpected eof", r"closed by server",
    ):  # fmt: skip
        do = f"perhaps it wants TLS ({WITH_TLS.get(place.type, 'https')}), or another kind of server listens there"
        return Verdict("unreachable", f"{place.where} hung up before it said anything", do)
    return None


def _tls(said: str, place: Place) -> Verdict | None:
    where = place.where
    if _any(said, r"certificate has expired", r"certificate is not yet valid"):
        return Verdict(
            "tls", f"the certificate of {where} is not valid today", "renew it, and look at this machine's clock"
        )
    if _any(said, r"hostname mismatch", r"does not match host ?name", r"not valid for", r"doesn't match"):
        return Verdict(
            "tls", f"the certificate of {where} is for another name", "connect by the name in the certificate"
        )
    if _any(said, r"certificate.{0,40}verify failed", r"self.signed", r"unable to get local issuer", r"unknown ca\b"):
        do = CERTIFICATE.get(place.type, "install the authority's certificate on this machine")
        return Verdict("tls", f"nobody whom this machine trusts vouches for the certificate of {where}", do)
    if _any(said, r"root certificate file .* does not exist"):
        return Verdict("tls", "the certificate to check the server's with is missing", CERTIFICATE[place.type])
    if _any(
        said, r"server does not support ssl", r"ssl is required but", r"wrong.version.number",
        r"record layer failure", r"packet length too long", r"ssl handshake failed", r"unexpected.eof.while",
        r"unexpected_eof", r"invalid.?contenttype", r"corrupt message",
    ):  # fmt: skip
        or_say = f", or say {NO_TLS[place.type]}" if place.type in NO_TLS else ""
        return Verdict("tls", f"{where} does not speak TLS", f"correct the port{or_say}")
    if _any(said, r"\bssl\b", r"\btls\b"):
        return Verdict("tls", f"no TLS connection to {where} came about", f"{_first(said)}")
    return None


def began_no_tls(place: Place) -> Verdict:
    """The verdict on a server that takes connections and never answers the first word of TLS."""
    do = f"correct the port, or say {NO_TLS[place.type]}; if it is only slow, give it longer with --timeout"
    return Verdict("tls", f"{place.where} takes connections, but does not speak TLS, or not in time", do)


def _other(said: str, error: BaseException, place: Place) -> Verdict:
    name = type(error).__name__
    return Verdict(
        "other", f"{place.where}: {_first(said) or name}", f"the client said so ({name}): see its documentation"
    )


def _first(said: str) -> str:
    line = next((line.strip() for line in said.splitlines() if line.strip()), "")
    return line[:200]


# --- each its own -----------------------------------------------------------------------------------------------------


def _password(place: Place) -> Verdict:
    return Verdict(
        "password", f"{place.where} does not take the password of {place.who}",
        "correct user and password in the resource, or the variable that it names",
    )  # fmt: skip


def _no_database(place: Place) -> Verdict:
    do = "look for a typo in its name, or create it"
    return Verdict("no_database", f"{place.where} has no database {place.database}", do)


def _postgresql(said: str, codes: set[Any], place: Place) -> Verdict | None:
    if "28P01" in codes or _any(said, r"password authentication failed", r"role \".*\" does not exist"):
        return _password(place)
    if _any(said, r"no password supplied", r"requires? password"):
        return Verdict("password", f"{place.where} wants a password from {place.who}", "add one to the resource")
    if _any(said, r"tenant or user not found", r"no tenant identifier"):
        do = "the user is postgres.PROJECT-REF, and the host that of the project's own region: copy both from Supabase"
        return Verdict("password", f"Supabase's pooler knows no project of {place.who}", do)
    if _any(said, r"endpoint id is not specified"):
        do = 'add options = "endpoint=ENDPOINT-ID" (the first part of the host), or use a newer libpq'
        return Verdict("other", "Neon does not know which endpoint is meant", do)
    if "3D000" in codes or _any(said, r"database \".*\" does not exist"):
        return _no_database(place)
    if _any(
        said,
        r"pg_hba\.conf (entry|rejects).*no encryption",
        r"ssl (connection is )?required",
        r"connection is insecure",
    ):
        return Verdict("tls", f"{place.where} wants TLS", f"say {WITH_TLS['postgresql']}")
    if "42501" in codes or _any(
        said, r"permission denied", r"not permitted to log in", r"pg_hba\.conf (entry|rejects)"
    ):
        do = f"let an administrator GRANT CONNECT ON DATABASE {place.database} to it, or allow it in pg_hba.conf"
        return Verdict("permissions", f"{place.who} may not connect to database {place.database}", do)
    if "53300" in codes or _any(said, r"too many (clients|connections)", r"remaining connection slots"):
        do = "close some, raise max_connections, or go through a pooler"
        return Verdict("busy", f"{place.where} has all the connections that it takes", do)
    if _any(said, r"database system is (starting up|shutting down)", r"not yet accepting"):
        return Verdict("busy", f"{place.where} is starting or stopping", "try again in a moment")
    if _any(said, r"channel binding", r"scram.*not supported"):
        do = "leave out channel_binding, or connect without a pooler between"
        return Verdict("password", f"{place.where} and this client share no way to log in", do)
    return None


def _mysql(said: str, codes: set[Any], place: Place) -> Verdict | None:
    if 1049 in codes:
        return _no_database(place)
    if 1044 in codes or 1142 in codes:
        do = f"let an administrator GRANT SELECT ON {place.database}.* to it"
        return Verdict("permissions", f"{place.who} may not use database {place.database}", do)
    if 1045 in codes or 1698 in codes:
        return _password(place)
    if 1130 in codes:
        do = "let an administrator create the user for this address"
        return Verdict("permissions", f"{place.where} takes no connections from this machine", do)
    if 3159 in codes:
        return Verdict("tls", f"{place.where} wants TLS", f"say {WITH_TLS['mysql']}")
    if 1040 in codes or 1203 in codes:
        return Verdict("busy", f"{place.where} has all the connections that it takes", "close some, or raise the limit")
    return None


def _mongodb(said: str, codes: set[Any], place: Place) -> Verdict | None:
    if codes & {18, 8000} or _any(said, r"authentication failed", r"bad auth"):
        verdict = _password(place)
        more = "; authSource (credential.db) names the database that knows the user, often admin"
        return Verdict(verdict.kind, verdict.said, verdict.do + more)
    if 13 in codes or _any(said, r"not authorized", r"requires authentication"):
        if not place.user:
            return Verdict("password", f"{place.where} wants a user and a password", "add a credential to the resource")
        do = f"let an administrator grant it the role read on {place.database}"
        return Verdict("permissions", f"{place.who} may not read database {place.database}", do)
    if _any(said, r"wire version", r"requires at least \d+ \(MongoDB"):
        return Verdict("version", f"{place.where} is too old for this client", "upgrade it to MongoDB 4.2 or later")
    if _any(said, r"no replica set members", r"does not match any", r"replicaset.*(mismatch|does not match)"):
        do = "correct replicaSet, or leave it out for a single server"
        return Verdict("other", f"{place.where} is not of that replica set", do)
    return None


def _redis(said: str, codes: set[Any], place: Place) -> Verdict | None:
    if _any(said, r"wrongpass", r"invalid username-password", r"invalid password", r"called without any password"):
        return _password(place)
    if _any(said, r"noauth", r"authentication required", r"already authenticated"):
        return Verdict("password", f"{place.where} wants a password", "add one to the resource")
    if _any(said, r"noperm", r"has no permissions"):
        do = "let an administrator allow it with ACL SETUSER, at least +@read +@connection"
        return Verdict("permissions", f"{place.who} may not do what is asked of it", do)
    if _any(said, r"db index is out of range"):
        do = "take a smaller number; 0 is always there"
        return Verdict("no_database", f"{place.where} has no database {place.database}", do)
    if _any(said, r"cluster support disabled", r"not in cluster mode", r"cluster mode is not enabled"):
        return Verdict("other", f"{place.where} is not of a cluster", "leave out cluster and nodes")
    if _any(said, r"clusterdown", r"slots are not covered"):
        return Verdict(
            "busy", f"the cluster of {place.where} does not work: some of its slots have no node", "repair it"
        )
    if _any(said, r"max number of clients"):
        return Verdict(
            "busy", f"{place.where} has all the connections that it takes", "close some, or raise maxclients"
        )
    if _any(said, r"is loading the dataset"):
        return Verdict("busy", f"{place.where} is starting", "try again in a moment")
    return None


def _upstash(said: str, codes: set[Any], place: Place) -> Verdict | None:
    if _any(said, r"wrongpass", r"unauthorized", r"invalid or missing auth token"):
        do = "copy UPSTASH_REDIS_REST_TOKEN from its console: it is not the password of every plan"
        return Verdict("password", f"{place.where} does not take the token", do)
    if _any(said, r"noperm", r"has no permissions"):
        return Verdict("permissions", "the token may not do what is asked of it", "take the token that may write, too")
    if _any(said, r"expecting value", r"jsondecodeerror", r"not valid json"):
        return Verdict(
            "other", f"{place.where} does not speak Upstash's REST", "copy UPSTASH_REDIS_REST_URL from its console"
        )
    return None
