"""URL, conninfo string and mapping are one another without loss, and libpq reads them as we do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.config.conninfo import (
    KEYWORDS,
    parse,
    to_conninfo,
    to_url,
)
from penstock.errors import ConfigError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

pq = pytest.importorskip("psycopg.pq")
psycopg = pytest.importorskip("psycopg")

LIBPQ = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
# libpq 18 takes blanks off the ends of what is in a URL; older ones do not.
TRIMS = pq.version() >= 180000


def as_libpq_reads(text: str) -> dict[str, str]:
    return dict(psycopg.conninfo.conninfo_to_dict(text))


# -- every value, both ways -----------------------------------------------------------------------

awkward = st.sampled_from("%@/:?&=#[] ,'\\\"+;$\t\n\r\v\f\x01\x7fé東\U0001f418\u00a0\u2028")
texts = st.text(awkward | st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
hosts = st.sampled_from(
    [
        "::1",
        "fe80::1%eth0",
        "/run/pg",
        "@abstract",
        "db.example.com",
        "10.0.0.1",
        "[::1]",
        "",
        "a b",
    ]
)
places = st.lists(hosts | texts, min_size=1, max_size=3).map(",".join)
ports = st.lists(st.sampled_from(["5432", "1", "65535", ""]), min_size=1, max_size=3).map(",".join)
others = sorted(LIBPQ.intersection(KEYWORDS) - {"user", "password", "host", "port", "dbname"})
some = {
    "user": texts,
    "password": texts,
    "host": places,
    "port": ports | texts,
    "dbname": texts,
}
every_setting = st.builds(
    lambda first, rest: {**rest, **first},
    st.fixed_dictionaries({}, optional=some),
    st.dictionaries(st.sampled_from(others), texts, max_size=3),
)


@settings(max_examples=1_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(every_setting)
def test_settings_survive_both_notations_and_libpq_agrees(given: dict[str, str]) -> None:
    url, conninfo = to_url(given), to_conninfo(given)
    assert parse(url) == given
    assert parse(conninfo) == given
    assert as_libpq_reads(url) == given
    assert as_libpq_reads(conninfo) == given


# -- every text, read alike -----------------------------------------------------------------------

PIECES = """postgresql:// postgres:// postgresql: :// app app:pw @ : / ? & = , [ ] [::1] [fe80::1%25e] db
    :5432 :1 a,b /shop ?sslmode=require &connect_timeout=3 ssl=true ssl=false requiressl=1 requiressl=0
    %20 %40 %4 %zz %00 %c3%a9 host=db password=x user = 'a b' ' \\ \\' x=y sslmode port=1
    dbname= é # % + [] [::1]x [::1]:2 Host=db""".split()  # noqa: SIM905  a list would need as many quotes
BLANKS = [" ", "\n", "\t", "  "]


def text_of_pieces(rng: random.Random) -> str:
    first = rng.choice(["", "", "postgresql://", "postgres://", "postgresql://app:pw@db"])
    pieces = rng.choices([*PIECES, *BLANKS] if rng.random() < 0.7 else PIECES, k=rng.randint(0, 9))
    return first + "".join(pieces)


def read_by(reader: Callable[[str], dict[str, str]], text: str) -> dict[str, str] | None:
    try:
        return reader(text)
    except (ConfigError, psycopg.ProgrammingError, UnicodeDecodeError):
        return None


@pytest.mark.skipif(not TRIMS, reason="older versions of libpq keep blanks in a URL")
def test_any_text_is_read_as_libpq_reads_it_or_refused_as_libpq_does(rng: random.Random) -> None:
    taken = 0
    for _ in range(20_000):
        text = text_of_pieces(rng)
        ours, theirs = read_by(parse, text), read_by(as_libpq_reads, text)
        assert ours == theirs, text
        taken += ours is not None
    assert taken > 2_000, "most texts are wrong: the test tests little"


def test_our_list_of_keywords_is_libpqs() -> None:
    assert not LIBPQ - set(KEYWORDS), "libpq knows more: add them to KEYWORDS"


# -- how it looks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({}, "postgresql://"),
        ({"host": "db", "dbname": "shop", "user": "app"}, "postgresql://app@db/shop"),
        ({"user": "a@b", "password": "p:/?#%"}, "postgresql://a%40b:p%3A%2F%3F%23%25@"),
        ({"host": "::1", "port": "5432"}, "postgresql://[::1]:5432"),
        ({"host": "fe80::1%eth0"}, "postgresql://[fe80::1%25eth0]"),
        ({"host": "/run/pg", "dbname": "x"}, "postgresql://%2Frun%2Fpg/x"),
        ({"host": "a,b", "port": "1,2"}, "postgresql://a:1,b:2"),
        ({"host": "a,b", "port": "1"}, "postgresql:///?host=a%2Cb&port=1"),
        ({"host": "a,b"}, "postgresql:///?host=a%2Cb"),
        ({"port": "5433"}, "postgresql://:5433"),
        ({"host": "db", "sslmode": "require"}, "postgresql://db/?sslmode=require"),
        ({"password": ""}, "postgresql:///?password="),
    ],
)
def test_a_url_is_what_a_person_would_write(given: dict[str, str], url: str) -> None:
    assert to_url(given) == url
    assert parse(url) == given


@pytest.mark.parametrize(
    ("given", "conninfo"),
    [
        ({}, ""),
        ({"host": "db", "port": "5432"}, "host=db port=5432"),
        ({"password": "it's \\"}, r"password='it\'s \\'"),
        ({"user": ""}, "user=''"),
    ],
)
def test_a_conninfo_string_quotes_what_must_be(given: dict[str, str], conninfo: str) -> None:
    assert to_conninfo(given) == conninfo


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hunter2", "it is no URL and has no '='"),
        ("host=db password=hunter2 hunter2", "at character 26: '=' is missing after a name"),
        ("host=db password='hunter2", "at character 18: a closing single quote is missing"),
        ("hunter2=x", "at character 1: libpq has no connection parameter of that name"),
        ("postgresql://app:hun%ter2@db", "a '%' is not followed by two hexadecimal digits"),
        ("postgresql://app:hunter2%00@db", "it holds %00"),
        ("postgresql://app:hunter2%ff@db", "what is percent-encoded is not UTF-8"),
        ("postgresql://app:hun ter2@db", "it holds a blank"),
        ("postgresql://[hunter2", "the brackets around an IPv6 address are not right"),
        ("postgresql://db?hunter2", "each parameter has exactly one '='"),
        ("postgresql://db?hunter2=x", "a parameter that libpq does not know"),
        ("host=hunter2\0", "at character 13: it holds a NUL character"),
        ("host=hunter2\udc80", "at character 13: it holds half of a surrogate pair"),
    ],
)
def test_what_is_wrong_is_told_without_a_piece_of_the_text(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert told in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("write", [to_url, to_conninfo])
@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"pasword": "hunter2"}, "pasword"),
        ({"password": "hunter2\0"}, "password"),
        ({"password": "hunter2\ud800"}, "password"),
        ({"password": b"hunter2"}, "password"),
    ],
)
def test_what_cannot_be_written_is_named(write, given, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        write(given)
    assert caught.value.key == key
    assert "hunter2" not in str(caught.value)


def test_a_number_is_written_and_none_is_not_given() -> None:
    assert to_conninfo({"port": 5432, "user": None}) == "port=5432"  # type: ignore[dict-item]


def test_secrets_are_blank_in_what_is_read_and_written() -> None:
    url = "postgresql://app:hunter2@db/shop"
    assert "hunter2" not in repr(parse(url))
    assert "hunter2" not in repr(to_url(parse(url)))
    assert "hunter2" not in repr(to_conninfo(parse(url)))
