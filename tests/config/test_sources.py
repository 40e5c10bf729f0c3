"""What mappings, the environment, TOML and INI files become; each thing that is wrong has its place."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from penstock import ConfigError, PoolConfig
from penstock.config.conninfo import KEYWORDS, parse
from penstock.config.loaders import many_from_env, many_from_file
from penstock.config.schema import PasswordFile, options_of

POST = """
[POSTGRES]
URL = localhost
PORT = 5432
USER = app
PW = 50%%of$what#is;in"here'
DB = shop
"""


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say all there is in the environment."""
    for name in list(os.environ):
        if name.startswith("PENSTOCK_") or name == "DATABASE_URL":
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a file into the current folder; gives its name, as a user would write it."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str | bytes) -> str:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


def settings_of(config: PoolConfig) -> dict[str, str]:
    conninfo = config.conninfo() if callable(config.conninfo) else config.conninfo
    return parse(conninfo)


# -- the post's file --------------------------------------------------------------------------------


def test_the_posts_file_works_as_it_is(write) -> None:
    config = PoolConfig.from_file(write("config.ini", POST))
    assert settings_of(config) == {
        "host": "localhost",
        "port": "5432",
        "user": "app",
        "password": "50%%of$what#is;in\"here'",
        "dbname": "shop",
    }
    assert config.name == "POSTGRES"


def test_its_url_may_be_a_url_and_keys_may_have_any_case(write) -> None:
    text = "[postgres]\nUrl: postgresql://app@db/shop\npw: x\nmax_Size: 4\n"
    config = PoolConfig.from_file(write("config.cfg", text), "POSTGRES")
    assert settings_of(config) == {"host": "db", "user": "app", "password": "x", "dbname": "shop"}
    assert config.max_size == 4


# -- connection settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["url", "uri", "dsn", "conninfo", "DATABASE_URL", "database_uri"])
@pytest.mark.parametrize("text", ["postgresql://app:x@db/shop", "host=db user=app password=x"])
def test_one_key_for_all_settings_is_kept_as_it_is(key: str, text: str) -> None:
    config = PoolConfig.from_mapping({key: text})
    assert config.conninfo == text
    assert "x" not in repr(config.conninfo).replace("***", "")


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_every_setting_of_libpq_is_a_key(keyword: str) -> None:
    value = {"port": "1", "sslmode": "allow", "gssencmode": "prefer", "channel_binding": "prefer",
             "target_session_attrs": "any", "load_balance_hosts": "random"}.get(keyword, "7")  # fmt: skip
    assert settings_of(PoolConfig.from_mapping({keyword: value})) == {keyword: value}


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({}, {}),
        ({"host": "db", "password": "", "user": None}, {"host": "db"}),
        ({"database": "shop"}, {"dbname": "shop"}),
        ({"db": "shop", "pw": "x"}, {"dbname": "shop", "password": "x"}),
        ({"url": "db.example.com"}, {"host": "db.example.com"}),
        ({"url": "::1", "port": 5433}, {"host": "::1", "port": "5433"}),
        ({"url": "/run/pg"}, {"host": "/run/pg"}),
        ({"url": " postgresql://db\n"}, {"host": "db"}),
        ({"host": ["a", "b"], "port": [1, 2]}, {"host": "a,b", "port": "1,2"}),
        ({"keepalives": False}, {"keepalives": "0"}),
        ({"url": "postgresql://db", "password": "p@:/%"}, {"host": "db", "password": "p@:/%"}),
        ({"url": "postgresql://db", "host": "db"}, {"host": "db"}),
        ({"service": "shop"}, {"service": "shop"}),
    ],
)
def test_settings_beside_one_another(given: dict[str, Any], settings: dict[str, str]) -> None:
    assert settings_of(PoolConfig.from_mapping(given)) == settings


def test_nothing_given_is_left_to_libpq() -> None:
    assert PoolConfig.from_mapping({}).conninfo == ""


def test_a_callable_is_taken_where_it_is_alone() -> None:
    def conninfo() -> str:
        return "host=db"

    assert PoolConfig.from_mapping({"conninfo": conninfo}).conninfo is conninfo
    with pytest.raises(ConfigError, match="let the callable return all of them"):
        PoolConfig.from_mapping({"conninfo": conninfo, "host": "db"})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"url": "mysql://app:hunter2@db"}, "option 'url' does not parse: a URL begins with"),
        ({"url": "postgresql+psycopg://app:hunter2@db"}, "without the driver's name"),
        ({"url": "jdbc:postgresql://db/shop"}, "without jdbc:"),
        ({"url": "db:5432"}, "give the port as a key of its own"),
        ({"url": "hunter2!"}, "neither a URL, nor a conninfo string, nor a host name"),
        ({"conninfo": "db"}, "neither a URL, nor a conninfo string, nor a host name"),
        ({"dsn": "host=db password=hunter2 3"}, "option 'dsn' does not parse at character 26"),
        ({"url": "postgresql://a@db", "user": "b"}, "option 'user' contradicts what the URL"),
        ({"url": "a", "uri": "a"}, "options 'url' and 'uri' say the same thing twice"),
        ({"pw": "hunter2", "password": "x"}, "options 'pw' and 'password' say the same thing"),
        ({"port": "hunter2"}, "option 'port' must be a port number, 1 to 65535, not what is"),
        ({"port": 0}, "option 'port' must be a port number"),
        ({"port": 65536}, "option 'port' must be a port number"),
        ({"port": True}, "option 'port' must be a text or a whole number, or a list of such"),
        ({"port": 1.5}, "not a value of type float"),
        ({"host": "a,b,c", "port": "1,2"}, "option 'port' must be one port, or as many as hosts"),
        ({"url": "postgresql://db:99999"}, "in option 'url', port is not a port number"),
        ({"url": "postgresql://db?sslmode=on"}, "in option 'url', sslmode is not one of disable"),
        ({"sslmode": "on"}, "option 'sslmode' must be one of disable, allow, prefer"),
        ({"connect_timeout": "5s"}, "option 'connect_timeout' must be a whole number"),
        ({"password": {"x": "hunter2"}}, "option 'password' must be a text or a whole number"),
        ({"password": "hunter2\0"}, "option 'password' must be a text without a NUL"),
        ({"username": "app"}, "unknown option 'username': did you mean 'user'?"),
        ({"passwrd": "hunter2"}, "unknown option 'passwrd': did you mean 'password'?"),
        ({"maxsize": 1}, "unknown option 'maxsize': did you mean 'max_size'?"),
        ({"pool_size": 1}, "unknown option 'pool_size': did you mean 'max_size'?"),
        ({"qqq": 1}, "unknown option 'qqq': see docs/configuration.md"),
        ({"HOST": "a", "host": "b"}, "options 'HOST' and 'host' say the same thing twice"),
    ],
)
def test_a_setting_that_is_wrong_is_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolConfig.from_mapping(given)
    assert told in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("given", [None, "url", [("url", "x")], {1: 2}])
def test_what_is_no_mapping_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="must be a mapping"):
        PoolConfig.from_mapping(given)


# -- pool options -------------------------------------------------------------------------------------


def test_options_and_settings_have_no_name_in_common() -> None:
    assert not set(options_of(PoolConfig)) & set(KEYWORDS)
    assert {*options_of(PoolConfig), "conninfo"} == {
        field.name for field in dataclasses.fields(PoolConfig)
    }


TEXTS = [
    ("min_size", "0", 0), ("max_size", "+20", 20), ("max_waiting", " 3 ", 3),
    ("timeout", "2.5", 2.5), ("timeout", "none", None), ("timeout", ".5", 0.5),
    ("max_lifetime", "None", None), ("max_idle", "60", 60.0), ("ping_after", "0", 0.0),
    ("reconnect_timeout", "NONE", None), ("overdue_after", "1", 1.0),
    ("statement_timeout_client", "1.5", 1.5), ("statement_timeout_client", "none", None),
    ("server_check_interval", "none", None), ("order", "fifo", "fifo"), ("reset", "session", "session"),
    ("reset", "none", None), ("autocommit", "yes", True), ("autocommit", "ON", True),
    ("read_write", "1", True), ("guard", "on", True), ("open", "false", False), ("open", "off", False), ("open", "no", False),
    ("name", "none", "none"), ("driver", "psycopg", "psycopg"), ("kwargs", "none", None),
    ("configure", "none", None), ("connection_class", "none", None),
    ("connection_class", "collections:Counter", __import__("collections").Counter),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "value"), TEXTS)
def test_a_text_becomes_what_the_option_wants(key: str, text: str, value: object) -> None:
    assert getattr(PoolConfig.from_mapping({key: text}), key) == value


@pytest.mark.parametrize("key", options_of(PoolConfig))
def test_every_option_can_be_given_as_a_text(key: str) -> None:
    example = {name: (text, value) for name, text, value in TEXTS}
    example |= {
        name: ("builtins:print", ...)
        for name, kind in options_of(PoolConfig).items()
        if "Call" in kind
    }
    text, _ = example[key]  # a new option needs an example above
    PoolConfig.from_mapping({key: text})


@pytest.mark.parametrize(
    ("key", "text", "allowed"),
    [
        ("max_size", "ten", "a whole number"),
        ("max_size", "1.0", "a whole number"),
        ("max_size", "", "a whole number"),
        ("max_size", "0", "a whole number, 1 or more"),
        ("max_size", "9" * 5000, "a whole number"),
        ("timeout", "5s", "a number of seconds, or none"),
        ("timeout", "nan", "a number of seconds, or none"),
        ("timeout", "-1", "a number of seconds, 0 or more, or None"),
        ("open", "maybe", "true or false"),
        ("order", "lilo", "one of"),
        ("reset", "always", '"rollback", "session", none, or "package.module:name"'),
        ("configure", "SET x", '"package.module:name"'),
        ("connection_class", "shop", '"package.module:name"'),
        ("connection_class", "shop_is_no_module:Connection", "something that can be imported"),
        ("connection_class", "builtins:print", "a class or None"),
        ("name", "", "a text or None"),
        ("kwargs", "x", '"package.module:name"'),
    ],
)
def test_a_text_that_does_not_fit_is_refused(key: str, text: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolConfig.from_mapping({key: text})
    assert caught.value.key == key
    assert f"option {key!r} must be {allowed}" in str(caught.value)


def test_a_callable_is_imported_when_it_is_first_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    write("late_module.py", "class Setup:\n    def __call__(c): ...\n    go = staticmethod(len)\n")
    config = PoolConfig.from_file(write("db.ini", "[a]\nconfigure = late_module:Setup.go\n"))
    assert "late_module" not in __import__("sys").modules
    assert config.configure is not None and config.configure([1, 2]) == 2
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_callable_that_is_not_there_is_named_with_its_place(write) -> None:
    config = PoolConfig.from_file(write("db.ini", "[a]\n\ncheck = no_such_module:check\n"))
    assert config.check is not None
    with pytest.raises(
        ConfigError, match=r"option 'check' must be .* at db\.ini:3: Module"
    ) as caught:
        config.check(None)
    assert (caught.value.key, caught.value.file, caught.value.line) == ("check", "db.ini", 3)


# -- the environment ------------------------------------------------------------------------------------


def test_variables_are_settings_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_URL", "postgresql://app@db/shop")
    monkeypatch.setenv("PENSTOCK_PASSWORD", "100%${x}$$")
    monkeypatch.setenv("PENSTOCK_MAX_SIZE", "4")
    monkeypatch.setenv("PENSTOCK_TIMEOUT", "")  # as compose files set what they do not have
    monkeypatch.setenv("DATABASE_URL", "postgresql://other/other")
    config = PoolConfig.from_env()
    assert settings_of(config) == {
        "user": "app", "host": "db", "dbname": "shop", "password": "100%${x}$$",
    }  # fmt: skip
    assert (config.max_size, config.timeout) == (4, 5.0)


def test_database_url_is_taken_where_nothing_else_says_where(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://db/shop")
    monkeypatch.setenv("PENSTOCK_MAX_SIZE", "4")
    assert PoolConfig.from_env().conninfo == "postgresql://db/shop"
    assert PoolConfig.from_env("SHOP_").conninfo == ""
    monkeypatch.setenv("DATABASE_URL", "sqlite:///hunter2")
    with pytest.raises(ConfigError, match="option 'DATABASE_URL' does not parse"):
        PoolConfig.from_env()
    monkeypatch.setenv("PENSTOCK_DATABASE_URI", "postgresql://db/own")
    assert PoolConfig.from_env().conninfo == "postgresql://db/own"


def test_an_unknown_variable_is_an_error_but_for_those_of_other_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for other in ("PG_BIN", "SEED", "TEST_SEED", "DEMO_X", "BINDS"):
        monkeypatch.setenv(f"PENSTOCK_{other}", "x")
    assert PoolConfig.from_env() == PoolConfig()
    monkeypatch.setenv("PENSTOCK_MAXSIZE", "4")
    with pytest.raises(
        ConfigError, match="option 'PENSTOCK_MAXSIZE': did you mean 'PENSTOCK_MAX_SIZE'"
    ):
        PoolConfig.from_env()


def test_variables_of_several_databases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_ORDERS__HOST", "a")
    monkeypatch.setenv("PENSTOCK_USER_DATA__MAX_SIZE", "4")
    monkeypatch.setenv("PENSTOCK_USER_DATA__HOST", "b")
    found = many_from_env("PENSTOCK_", PoolConfig)
    assert {name: config.conninfo for name, config in found.items()} == {
        "orders": "host=a",
        "user_data": "host=b",
    }
    assert (found["user_data"].max_size, found["user_data"].name) == (4, "user_data")
    monkeypatch.setenv("PENSTOCK_HOST", "c")
    assert many_from_env("PENSTOCK_", PoolConfig)["default"].conninfo == "host=c"
    monkeypatch.setenv("PENSTOCK_DEFAULT__HOST", "d")
    with pytest.raises(ConfigError, match="'PENSTOCK_HOST' is about the database 'default'"):
        many_from_env("PENSTOCK_", PoolConfig)
    monkeypatch.delenv("PENSTOCK_HOST")
    monkeypatch.setenv("PENSTOCK_TEST_X__Y", "of another part")
    monkeypatch.setenv("DATABASE_URL", "postgresql://not/needed")
    assert sorted(many_from_env("PENSTOCK_", PoolConfig)) == ["default", "orders", "user_data"]
    monkeypatch.setenv("PENSTOCK_ORDERS__HOTS", "a")
    with pytest.raises(ConfigError, match="did you mean 'PENSTOCK_ORDERS__HOST'"):
        many_from_env("PENSTOCK_", PoolConfig)


# -- files ------------------------------------------------------------------------------------------------

TOML = """\
# max_size of all
max_size = 7

[orders]
url = "postgresql://app@db/shop"
password = "${SHOP_PW}"
reset = "session"

[users]
host = [
    "a",
    "b",
]
port = 5433
max_size = 3
autocommit = true
[users.kwargs]
prepare_threshold = 3
"""


def test_toml_tables_are_databases_and_what_is_above_is_in_each(write, monkeypatch) -> None:
    monkeypatch.setenv("SHOP_PW", "p%$w ${SHOP_PW}$$")
    found = many_from_file(write("db.toml", TOML), (), PoolConfig)
    assert list(found) == ["orders", "users"]
    assert settings_of(found["orders"])["password"] == "p%$w ${SHOP_PW}$$"
    assert (found["orders"].max_size, found["orders"].reset) == (7, "session")
    assert settings_of(found["users"]) == {"host": "a,b", "port": "5433"}
    assert (found["users"].max_size, found["users"].autocommit) == (3, True)
    assert found["users"].kwargs == {"prepare_threshold": 3}


def test_a_toml_file_without_tables_is_one_database(write) -> None:
    found = many_from_file(
        write("db.toml", 'host = "db"\n[kwargs]\nprepare_threshold = 3\n'), (), PoolConfig
    )
    assert list(found) == ["default"]
    assert found["default"].conninfo == "host=db"


def test_a_section_may_be_inside_other_tables(write) -> None:
    path = write("pyproject.toml", '[project]\nname = "shop"\n[tool.penstock]\nmax_size = 2\n'
                 '[tool.penstock.orders]\nhost = "db"\n')  # fmt: skip
    config = PoolConfig.from_file(path, "tool.penstock.orders")
    assert (config.name, config.conninfo, config.max_size) == ("orders", "host=db", 2)


def test_ini_sections_are_databases_and_default_is_in_each(write) -> None:
    text = "[DEFAULT]\nuser = app\nmax_size = 4\n[a]\nhost = x\n[b]\nhost = y\nmax_size = 5\n"
    found = many_from_file(write("db.conf", text), (), PoolConfig)
    assert {name: config.max_size for name, config in found.items()} == {"a": 4, "b": 5}
    assert settings_of(found["b"]) == {"host": "y", "user": "app"}
    assert list(many_from_file("db.conf", ["b"], PoolConfig)) == ["b"]


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(write) -> None:
    text = "[a]\r\nhost = db\r\npw = x\r\n"
    config = PoolConfig.from_file(write("db.ini", b"\xef\xbb\xbf" + text.encode()))
    assert settings_of(config) == {"host": "db", "password": "x"}


def test_which_section_is_said_where_there_are_several(write) -> None:
    path = write("db.ini", "[a]\nhost = x\n[b]\nhost = y\n")
    with pytest.raises(ConfigError, match=r"several sections.*there is 'a', 'b': name one"):
        PoolConfig.from_file(path)
    with pytest.raises(ConfigError, match=r"no section 'c', at db\.ini: there is 'a', 'b'"):
        PoolConfig.from_file(path, "c")
    assert PoolConfig.from_file(path, "b").conninfo == "host=y"
    write("db.ini", "[a]\nhost = x\n[default]\nhost = y\n")
    assert PoolConfig.from_file(path).conninfo == "host=y"


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("[a]\nmax_size = ten\n", 2, "option 'max_size' of pool 'a' must be a whole number, not"),
        (
            "[a]\n\n# x\nMAX_SIZE = 0\n",
            4,
            "option 'MAX_SIZE' of pool 'a' must be a whole number, 1",
        ),
        ("[a]\nmin_size=3\nmax_size=2\n", 2, "option 'min_size' of pool 'a' must be at most max"),
        ("[a]\nmaxsize = 1\n", 2, "unknown option 'maxsize' of pool 'a'"),
        ("[a]\ncolour = red\n", 2, "unknown option 'colour' of pool 'a'"),
        ("[a]\nhost = x\nHost = y\n", 3, "option 'host': a key stands twice in this section"),
        ("[a]\nhost = x\n[b]\n[a]\n", 4, "a section of that name stands above, too"),
        ("host = x\n", 1, "a key stands before the first section"),
        ("[a]\nhost = x\nhunter2\n", 3, "this line is no 'key = value'"),
        ("[a]\nhost = x\n  port = 1\n", 2, "option 'host' goes on in the next line"),
        ("[a]\nhost = x\npw = ${NO_SUCH}\n", 3, "option 'pw' names 'NO_SUCH', which is not set"),
        ("[a]\npw = x${hunter2}\n", 2, "option 'pw' names a variable, which is not set"),
        ("[a]\npw = x${hunter2\n", 2, "a variable by '${' without a name and '}'"),
        ("[a]\npw = x\nhunter2: x\n", 3, "unknown option (its name is not shown"),
        ("[a]\nurl = postgresql://u:hunter2%@db\n", 2, "option 'url' does not parse"),
        ("[a]\nport = 0\n", 2, "option 'port' of pool 'a' must be a port number"),
        ("[a]\nconfigure = x\n", 2, "option 'configure' of pool 'a' must be \"package.module:name"),
        ("[a]\nkwargs = {}\n", 2, "option 'kwargs' of pool 'a'"),
        ("", None, "there is no section and no key in it"),
    ],
)
def test_what_is_wrong_in_an_ini_file_has_its_line(write, text: str, line: int, told: str) -> None:
    assert_wrong(write("db.ini", text), line, told)


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("[a]\nmax_size = 'ten'\n", 2, "option 'max_size' of pool 'a' must be a whole number, not"),
        ("[a]\nmax_size = 0\n", 2, "must be a whole number, 1 or more, not 0, at db.toml:2"),
        ("[a]\nopen = 1\n", 2, "option 'open' of pool 'a' must be True or False, not 1"),
        ("[a]\n# port\nx = '''\nport\n'''\n", 3, "unknown option 'x'"),
        ("[a]\nhost = 'x'\n[b]\nhost = 1.5\n", 4, "option 'host' of pool 'b' must be a text"),
        ("host = 'x'\nport = '''\n\n'''\n[a]\n", None, None),
        ("port = [\n1,\n0]\n[a]\n", 1, "option 'port' of pool 'a' must be a port number"),
        ("[a]\nhost = 'x'\nhost = 'y'\n", 3, "a key or a section stands here for the second time"),
        ("[a]\n[b]\n[a]\n", 3, "a key or a section stands here for the second time"),
        ("[a]\npassword = hunter2\n", 2, "a value cannot be read: texts stand between quotes"),
        ("[a]\npassword = 'hunter2\n", 2, "this line is not TOML"),
        ("[a]\nhunter2\n", 2, "'=' is missing after a key"),
        ('[a]\npassword = "hunter\\2"\n', 2, "a backslash in a text"),
        ("[a]\nx = " + "9" * 5000, None, "too long or nested too deep"),
        ("[a]\nx = " + "[" * 5000, None, ""),
        ("[a]\npassword = '${hunter2}'\n", 2, "names a variable, which is not set"),
        ("[a]\nhost = ['${NO_SUCH}']\n", 2, "names 'NO_SUCH'"),
        ("[a]\nkwargs.x = '${NO_SUCH}'\n", 2, "names 'NO_SUCH'"),
        ("[a]\nkwargs = 3\n", 2, "option 'kwargs' of pool 'a' must be a mapping"),
        ("[a]\nport = 1979-05-27\n", 2, "not a value of type date"),
        ("", None, "there is no section and no key in it"),
    ],
)
def test_what_is_wrong_in_a_toml_file_has_its_line(write, text: str, line: int, told: str) -> None:
    path = write("db.toml", text)
    if told is None:
        many_from_file(path, (), PoolConfig)
    else:
        assert_wrong(path, line, told)


def assert_wrong(path: str, line: int | None, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        many_from_file(path, (), PoolConfig)
    text = str(caught.value)
    assert told in text
    assert (caught.value.file, caught.value.line) == (path, line)
    assert (f"at {path}:{line}" if line else f"at {path}") in text
    assert "hunter" not in text
    assert caught.value.__context__ is None


def test_a_file_that_cannot_be_read_is_named(write, tmp_path: Path) -> None:
    cases = {
        "missing.ini": "cannot be read: No such file or directory, at missing.ini",
        "db.yaml": "option 'file' must be one of .toml, .ini, .cfg, .conf, not '.yaml', at db.yaml",
        "folder.ini": "cannot be read: Is a directory, at folder.ini",
        "nul\0.ini": "this cannot be the path of a file",
    }
    Path("folder.ini").mkdir()
    for path, told in cases.items():
        with pytest.raises(ConfigError) as caught:
            PoolConfig.from_file(path)
        assert told in str(caught.value)
        assert caught.value.__context__ is None


@pytest.mark.parametrize("text", ["pw = h\xfcnter2\n".encode("latin-1"), b"\xff\xfe[\0"])
@pytest.mark.parametrize("name", ["db.ini", "db.toml"])
def test_a_file_that_is_not_utf_8_is_named_with_the_line(write, name: str, text: bytes) -> None:
    with pytest.raises(ConfigError, match=f"not in UTF-8, at {name}:2: save it as UTF-8") as caught:
        PoolConfig.from_file(write(name, b"[a]\n" + text))
    assert caught.value.__context__ is None


def test_an_error_of_a_file_survives_pickling(write) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolConfig.from_file(write("db.ini", "[a]\nmaxsize = 1\n"))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.file, again.line) == (str(caught.value), "db.ini", 2)


# -- a password in a file of its own ------------------------------------------------------------------------


def test_a_password_file_is_read_at_each_connect(write, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    write("etc/pw", "it's %secret$\n")
    path = write("etc/db.ini", "[a]\nhost = db\npassword_file = pw\n")
    config = PoolConfig.from_file(path)
    assert settings_of(config) == {"host": "db", "password": "it's %secret$"}
    write("etc/pw", "new\r\n")
    assert settings_of(config)["password"] == "new"
    assert isinstance(config.conninfo, PasswordFile)
    assert pickle.loads(pickle.dumps(config)) == config
    assert "new" not in repr(config.conninfo) and "new" not in repr(config.conninfo())


@pytest.mark.parametrize(
    ("content", "more", "told"),
    [
        (None, "", "must be the path of a file that can be read, not one that gives: No such file"),
        (b"", "", "must be a file that holds a password, not an empty one"),
        (b"\n", "", "must be a file that holds a password, not an empty one"),
        (b"\xff", "", "must be a file in UTF-8, not one that is not"),
        (b"hunter2\0", "", "must be a text without a NUL character"),
        (b"hunter2", "password = x\n", "option 'password_file' is given, and a password, too"),
        (b"hunter2", "url = postgresql://a:x@db\n", "is given, and a password, too"),
    ],
)
def test_a_password_file_that_is_no_good_is_told_at_once(write, content, more, told) -> None:
    if content is not None:
        write("pw", content)
    with pytest.raises(ConfigError) as caught:
        PoolConfig.from_file(write("db.ini", f"[a]\npassword_file = pw\n{more}"))
    assert told in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert (caught.value.key, caught.value.line) == ("password_file", 2)
