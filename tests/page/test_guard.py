"""Which requests are let in: a table, since each line of it is an attack that others have seen."""

from __future__ import annotations

from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.page.guard import HEADERS, Door, Refused, SignedIn, judge

DOOR = Door(frozenset({"127.0.0.1:8090", "localhost:8090"}), token="right", path="/secret")
HOST = (b"host", b"127.0.0.1:8090")
COOKIE = (b"cookie", b"fastload=right")


@pytest.mark.parametrize(
    "headers",
    [
        [HOST, COOKIE],
        [(b"host", b"LocalHost:8090"), COOKIE],
        [HOST, COOKIE, (b"sec-fetch-site", b"same-origin")],
        [HOST, COOKIE, (b"sec-fetch-site", b"none")],
        [HOST, (b"cookie", b"other=1; fastload=right; more=2")],
        [HOST, (b"cookie", b"other=1"), COOKIE],
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_let_in(method: str, headers: list[tuple[bytes, bytes]]) -> None:
    assert judge(DOOR, method, headers, b"") is None


@pytest.mark.parametrize(
    "headers",
    [
        [COOKIE],
        [(b"host", b""), COOKIE],
        [(b"host", b"127.0.0.1"), COOKIE],
        [(b"host", b"127.0.0.1:80"), COOKIE],
        [(b"host", b"rebound.example:8090"), COOKIE],
        [(b"host", b"127.0.0.1:8090.example"), COOKIE],
        [(b"host", b"x@127.0.0.1:8090"), COOKIE],
        [(b"host", b"127.0.0.1:8090/../secret"), COOKIE],
        [(b"host", b"\xff"), COOKIE],
        [HOST, (b"host", b"rebound.example"), COOKIE],
        [HOST, HOST, COOKIE],
        [HOST, COOKIE, (b"sec-fetch-site", b"cross-site")],
        [HOST, COOKIE, (b"sec-fetch-site", b"same-site")],
        [HOST, COOKIE, (b"sec-fetch-site", b"same-origin"), (b"sec-fetch-site", b"cross-site")],
        [HOST],
        [HOST, (b"cookie", b"fastload=wrong")],
        [HOST, (b"cookie", b"fastload=")],
        [HOST, (b"cookie", b"fastload=righ\xff")],
        [HOST, (b"cookie", b"other=right")],
        [HOST, (b"x-forwarded-host", b"127.0.0.1:8090"), (b"authorization", b"right")],
    ],
)
def test_refused(headers: list[tuple[bytes, bytes]]) -> None:
    verdict = judge(DOOR, "GET", headers, b"")
    assert isinstance(verdict, Refused)
    assert verdict.status == HTTPStatus.FORBIDDEN
    assert "right" not in verdict.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE", "get", ""])
def test_other_methods_are_refused_also_with_the_token(method: str) -> None:
    for query in (b"", b"token=right"):
        verdict = judge(DOOR, method, [HOST, COOKIE], query)
        assert isinstance(verdict, Refused)
        assert verdict.status == HTTPStatus.METHOD_NOT_ALLOWED


def test_the_token_becomes_a_cookie_and_leaves_the_address() -> None:
    verdict = judge(DOOR, "GET", [HOST, (b"sec-fetch-site", b"none")], b"token=right")
    assert verdict == SignedIn("/secret/", "fastload=right; Path=/secret/; HttpOnly; SameSite=Strict")


@pytest.mark.parametrize("query", [b"token=wrong", b"token=right&token=right", b"token=r%00ight", b"token=%ff"])
def test_another_token_is_refused_also_with_the_cookie(query: bytes) -> None:
    assert isinstance(judge(DOOR, "GET", [HOST, COOKIE], query), Refused)


def test_another_site_cannot_sign_in() -> None:
    assert isinstance(judge(DOOR, "GET", [HOST, (b"sec-fetch-site", b"cross-site")], b"token=right"), Refused)
    assert isinstance(judge(DOOR, "GET", [(b"host", b"rebound.example")], b"token=right"), Refused)


def test_secrets_are_new_each_time_and_not_in_the_repr() -> None:
    one, other = Door(frozenset()), Door(frozenset())
    assert len({one.token, other.token, one.path, other.path}) == 4
    assert one.token not in repr(one)
    assert one.path not in repr(one)


def test_the_policy_allows_nothing_but_own_files() -> None:
    policy = dict(rule.split(" ", 1) for rule in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    sources = {source for name, value in policy.items() if name.endswith("-src") for source in value.split()}
    assert sources == {"'none'", "'self'"}


WORDS = st.sampled_from(
    [b"", b"127.0.0.1:8090", b"localhost:8090", b"rebound.example", b"fastload=right", b"right", b"none"]
)
NAMES = st.sampled_from([b"host", b"cookie", b"sec-fetch-site", b"authorization", b"x-forwarded-host", b"origin"])
QUERIES = st.sampled_from([b"", b"token", b"token=", b"token=righ", b"token=Right", b"tokens=right", b"a=token=right"])


@given(st.sampled_from(["GET", "HEAD", "POST"]), st.lists(st.tuples(NAMES, WORDS | st.binary(max_size=9))), QUERIES)
def test_nothing_but_the_host_the_method_and_the_token_lets_in(
    method: str, headers: list[tuple[bytes, bytes]], query: bytes
) -> None:
    verdict = judge(DOOR, method, headers, query)
    assert not isinstance(verdict, SignedIn)
    if verdict is None:
        assert method != "POST"
        assert [value for name, value in headers if name == b"host"] in ([b"127.0.0.1:8090"], [b"localhost:8090"])
        assert any(name == b"cookie" and b"fastload=right" in value for name, value in headers)
