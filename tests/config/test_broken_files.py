"""A thousand broken INI files and a thousand broken TOML files: each error has its place, none a secret."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

import pytest

from penstock import ConfigError
from penstock.config.loaders import many_from_file
from penstock.config.pool_config import PoolConfig
from tests.config.seen import shown

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

BROKEN = 1_000
# Letters that no word of an error's text has in a row: what is found there is the secret's.
LETTERS = "JQXZjqxz" * 3 + string.digits + "%$#;:=@/&?+-_.,!()[]{}<>|~^* "
ODD: tuple[str, ...] = (*"=:[]{}'\"\n\t\0#%$\\é", "${", "${X}", "\n\n")
PIECE = 5  # so many characters of a secret in a row are a piece of it


def secret(rng: random.Random) -> str:
    """Hard to write in either format without a mistake, but for quotes and backslashes."""
    text = "".join(rng.choices(LETTERS, k=rng.randint(8, 24)))
    return "Z" + text.replace("${", "$Q").strip() + "q"


def ini(rng: random.Random, secrets: list[str]) -> str:
    sections = []
    for name in rng.sample(["orders", "users", "POSTGRES", "default"], k=rng.randint(1, 3)):
        one, two, three = (secret(rng) for _ in range(3))
        secrets += [one, two, three]
        lines = rng.sample(
            [
                "URL = db.example.com", f"PW = {one}", "USER: app", "DB=shop", "PORT = 5432",
                "max_size = 4", "timeout = 2.5", "order = fifo", "# a comment", "sslmode = prefer",
                f"sslpassword = {two}", f"oauth_client_secret = {three}", "", "autocommit = yes",
            ],
            k=10,
        )  # fmt: skip
        sections += [f"[{name}]", *lines]
    return "\n".join(sections) + "\n"


def toml(rng: random.Random, secrets: list[str]) -> str:
    sections = []
    for name in rng.sample(["orders", "users", "POSTGRES", "default"], k=rng.randint(1, 3)):
        one, two, three = (secret(rng) for _ in range(3))
        secrets += [one, two, three]
        lines = rng.sample(
            [
                'host = ["a", "b"]', f"password = '{one}'", 'user = "app"', 'db = "shop"',
                "port = 5432", "max_size = 4", "timeout = 2.5", 'order = "fifo"', "# a comment",
                f'sslpassword = "{two}"', f"oauth_client_secret = '''\n{three}'''", "",
                "autocommit = true", f"kwargs = {{ password = '{three}', x = 1 }}",
            ],
            k=10,
        )  # fmt: skip
        sections += [f"[{name}]", *lines]
    return "\n".join(sections) + "\n"


def mutated(text: str, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        text = rng.choice(MUTATIONS)(text, rng)
    data = text.encode()
    if rng.random() < 0.03:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + b"\xff" + data[at:]
    return data


def delete(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) or 1)
    return text[:at] + text[at + rng.choice([1, 1, 1, 3, 30]) :]


def insert(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(ODD) + text[at:]


def cut(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) + 1)]


def on_lines(change: Callable[[list[str], random.Random], object]):
    def mutate(text: str, rng: random.Random) -> str:
        lines = text.split("\n")
        change(lines, rng)
        return "\n".join(lines)

    return mutate


def any_line(lines: list[str], rng: random.Random) -> int:
    return int(rng.randrange(len(lines)))


def without_delimiter(lines: list[str], rng: random.Random) -> None:
    at = any_line(lines, rng)
    lines[at] = lines[at].replace("=", rng.choice(["", " ", ":"]), 1)


def misspelt(lines: list[str], rng: random.Random) -> None:
    at = any_line(lines, rng)
    end = max(1, min(lines[at].find("=") % 40, 5))
    place = rng.randrange(end)
    lines[at] = lines[at][:place] + rng.choice(string.ascii_letters) + lines[at][place + 1 :]


def other_value(lines: list[str], rng: random.Random) -> None:
    at = any_line(lines, rng)
    key = lines[at].partition("=")[0]
    lines[at] = f"{key}= {rng.choice(['ten', '0', '-1', '1.5', 'yes', '', '[1', 'x:y', 'nan'])}"


def broken_in_two(lines: list[str], rng: random.Random) -> None:
    at = any_line(lines, rng)
    place = rng.randrange(len(lines[at]) + 1)
    lines[at : at + 1] = [lines[at][:place], lines[at][place:]]


def joined(lines: list[str], rng: random.Random) -> None:
    at = any_line(lines, rng)
    lines[at : at + 2] = ["".join(lines[at : at + 2])]


MUTATIONS: list[Callable[[str, random.Random], str]] = [
    delete, delete, insert, insert, cut,
    on_lines(without_delimiter), on_lines(misspelt), on_lines(other_value),
    on_lines(broken_in_two), on_lines(joined),
    on_lines(lambda lines, rng: lines.insert(any_line(lines, rng), rng.choice(lines))),
    on_lines(lambda lines, rng: lines.append(lines.pop(any_line(lines, rng)))),
    on_lines(lambda lines, rng: lines.insert(any_line(lines, rng), "  " + rng.choice(lines))),
]  # fmt: skip


def pieces_of(secrets: list[str], told: str) -> set[str]:
    return {
        one[at : at + PIECE]
        for one in secrets
        for at in range(len(one) - PIECE + 1)
        if one[at : at + PIECE].lower() in told
    }


@pytest.mark.parametrize(("suffix", "make"), [("ini", ini), ("toml", toml)])
def test_each_error_names_the_place_and_none_shows_a_piece_of_a_secret(
    suffix: str, make: Callable[[random.Random, list[str]], str], rng: random.Random, tmp_path: Path
) -> None:
    path = tmp_path / f"db.{suffix}"
    broken = with_line = 0
    while broken < BROKEN:
        secrets: list[str] = []
        content = mutated(make(rng, secrets), rng)
        path.write_bytes(content)
        error = error_of(path)
        if error is not None:  # what is still right is no error
            broken += 1
            with_line += error.line is not None
            assert error.file == str(path)
            assert error.line is None or 1 <= error.line <= content.count(b"\n") + 1
            assert str(path) in str(error)
            assert error.__context__ is None
            assert not pieces_of(secrets, shown(error).lower()), (str(error), content.decode())
    assert with_line > BROKEN * 0.9


def error_of(path: Path) -> ConfigError | None:
    """Any other exception is one of the test."""
    try:
        many_from_file(path, (), PoolConfig)
    except ConfigError as error:
        return error
    return None


def test_what_the_generators_write_is_right_before_it_is_broken(
    rng: random.Random, tmp_path: Path
) -> None:
    for suffix, make in (("ini", ini), ("toml", toml)):
        for _ in range(50):
            secrets: list[str] = []
            path = tmp_path / f"db.{suffix}"
            path.write_text(make(rng, secrets), encoding="utf-8")
            assert many_from_file(path, (), PoolConfig)
