"""What a stand-in makes of SQL, and of transactions that end in any order: without a server."""

from __future__ import annotations

import pytest

from pytest_penstock._stand_in.messages import (
    Hangup,
    Message,
    fields_of,
    report,
    with_hint,
)
from pytest_penstock._stand_in.savepoints import Stack, Transaction
from pytest_penstock._stand_in.statements import (
    Kind,
    local_settings,
    split,
    statement,
    statements,
)


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("begin", Kind.BEGIN),
        (" ; -- a\n/* b /* c */ */ BEGIN work;", Kind.BEGIN),
        ("start transaction isolation level serializable, read only", Kind.BEGIN),
        ("commit and no chain", Kind.COMMIT),
        ("END", Kind.COMMIT),
        ("abort", Kind.ROLLBACK),
        ("rollback transaction", Kind.ROLLBACK),
        ("rollback to a", Kind.ROLLBACK_TO),
        ("rollback work to savepoint a", Kind.ROLLBACK_TO),
        ("savepoint a", Kind.SAVEPOINT),
        ("release savepoint a", Kind.RELEASE),
        ("prepare transaction 'a'", Kind.TWO_PHASE),
        ("commit prepared 'a'", Kind.TWO_PHASE),
        ("rollback prepared 'a'", Kind.TWO_PHASE),
        ("prepare a as select 1", Kind.OTHER),
        ("deallocate all", Kind.DEALLOCATE),
        ("set transaction read only", Kind.READ_ONLY),
        ("set transaction isolation level serializable, read only", Kind.READ_ONLY),
        ("set transaction isolation level serializable", Kind.OTHER),
        ("set local transaction_read_only = on", Kind.READ_ONLY),
        ("set transaction_read_only to off", Kind.OTHER),
        ("set a", Kind.OTHER),
        ("declare c cursor for select 1", Kind.IN_BLOCK),
        ("declare c cursor with hold for select 1", Kind.OTHER),
        ('listen "Some channel"', Kind.LISTEN),
        ("select 1", Kind.OTHER),
        ("'begin'", Kind.OTHER),
        ("begins", Kind.OTHER),
        ("(select 1)", Kind.OTHER),
        ("%", Kind.OTHER),
        ("", Kind.EMPTY),
        (" ; /* nothing", Kind.EMPTY),
        ("-- begin", Kind.EMPTY),
    ],
)
def test_a_statement_is_known_by_its_first_words(sql, kind):
    assert statement(sql.encode()).kind is kind
    assert [each.kind for each in statements(sql.encode())] == [kind]


@pytest.mark.parametrize(
    ("sql", "parts"),
    [
        ("begin; select 1; commit", ["begin", "select 1", "commit"]),
        ("begin;; commit;", ["begin", "commit"]),
        ("begin; select ';commit', \";\", E'\\';', $$;$$, $a$;$$;$a$, $1; end", None),
        ("begin; select 1 -- ;\n + /* ; */ 2; end", None),
        ("begin; create rule r as on update to t do (select 1; select 2); end", None),
        ("begin; create function f() begin atomic select case when 1 then 2 end; end; end", None),
    ],
)
def test_statements_are_cut_where_they_end(sql, parts):
    found = [each.sql.decode().strip() for each in statements(sql.encode())]
    if parts is None:
        middle = sql.partition(";")[2].rpartition(";")[0].strip()
        parts = ["begin", middle, "end"]
    assert found == parts


@pytest.mark.parametrize(
    "sql", ["select 1; select 2", "select 'commit'; select 2", "update t set a = 1"]
)
def test_what_rules_no_transactions_is_left_in_one_piece(sql):
    assert [each.sql for each in statements(sql.encode())] == [sql.encode()]


def test_a_text_that_never_ends_is_one_statement():
    assert split(b"select 'a; b") == [b"select 'a", b" b"]  # the server will say what is wrong
    assert split(b"select $$ a; b") == [b"select $$ a; b"]


def test_names_are_as_the_server_takes_them():
    assert statement(b'savepoint "A""b"').name == b'A"b'
    assert statement(b"release Savepoint ABC").name == b"abc"
    assert statement(b"deallocate prepare _pg3_1").name == b"_pg3_1"
    assert statement(b"deallocate all").name is None


def test_begin_says_whether_it_may_write():
    assert statement(b"begin read only").read_only
    assert statement(b"begin isolation level repeatable read, read only, deferrable").read_only
    assert not statement(b"begin isolation level repeatable read").read_only


@pytest.mark.parametrize(
    ("sql", "params", "names"),
    [
        ("set local statement_timeout = 1", [], {b"statement_timeout"}),
        ('SET LOCAL "App.User" to 1', [], {b"app.user"}),
        ("set local time zone 'utc'", [], {b"timezone"}),
        ("select set_config('a.b', '1', true), set_config('c.d', '1', true)", [], {b"a.b", b"c.d"}),
        ("select pg_catalog.set_config($1, $2, true)", [b"a.b", b"1"], {b"a.b"}),
        ("select set_config($3, $2, true)", [b"a.b", b"1"], set()),
        ("set statement_timeout = 1", [], set()),
        ("select 1", [], set()),
    ],
)
def test_settings_of_a_transaction_are_found(sql, params, names):
    assert local_settings(sql.encode(), params) == names


def test_a_hint_is_added_where_there_is_none():
    plain, hinted = report("25001", "no"), report("25001", "no", hint="so there")
    assert fields_of(with_hint(Message(b"E", plain), "why")[5:])["H"] == b"why"
    assert with_hint(Message(b"E", hinted), "why") == hinted
    assert issubclass(Hangup, Exception)


# -- the stack ----------------------------------------------------------------------------------------


def begun(stack: Stack, owner: object, *, wrote: bool = True) -> Transaction:
    made, sql = stack.begin(owner)
    assert sql == b"savepoint " + made.savepoint
    if wrote:
        stack.heard(made, b"INSERT 0 1")
    return made


def test_only_one_owner_has_transactions_open():
    stack = Stack()
    one = begun(stack, "a")
    assert stack.may_begin("a")
    assert not stack.may_begin("b")
    assert stack.blocker("b") is one
    assert stack.may_begin(None), "the pool's own work goes between"


def test_a_commit_below_another_waits_for_it():
    stack = Stack()
    lower, upper = begun(stack, "a"), begun(stack, "a")
    assert stack.commit(lower) == b""
    assert stack.open == [lower, upper]
    assert stack.commit(upper) == b"release savepoint penstock_2; release savepoint penstock_1"
    assert stack.open == []


def test_a_rollback_of_the_upper_one_frees_the_ended_lower_one():
    stack = Stack()
    lower, upper = begun(stack, "a"), begun(stack, "a")
    stack.commit(lower)
    assert stack.roll_back(upper) == (
        b"rollback to savepoint penstock_2; release savepoint penstock_2; release savepoint penstock_1"
    )
    assert stack.open == []
    assert stack.lost == 0


def test_a_rollback_of_the_lower_one_dooms_the_upper_one_that_wrote():
    stack = Stack()
    lower, writer, reader = begun(stack, 1), begun(stack, 1), begun(stack, 1, wrote=False)
    stack.name(reader, b'a"b')
    assert stack.roll_back(lower) == (
        b"rollback to savepoint penstock_1; release savepoint penstock_1; savepoint penstock_2; "
        b'savepoint penstock_3; savepoint "a""b"'
    )
    assert (bool(writer.doomed), writer.failed) == (True, True)
    assert (bool(reader.doomed), reader.failed) == (False, False)


def test_work_below_an_upper_one_that_only_looked_stays():
    stack = Stack()
    lower, upper = begun(stack, 1), begun(stack, 1, wrote=False)
    stack.heard(upper, b"SELECT 1")
    stack.heard(lower, b"UPDATE 1")
    assert stack.roll_back(upper) == b"release savepoint penstock_2"
    assert not lower.doomed


def test_work_below_an_upper_one_that_wrote_is_doomed_with_it():
    stack = Stack()
    lower, upper = begun(stack, 1), begun(stack, 1)
    stack.heard(lower, b"UPDATE 1")
    stack.roll_back(upper)
    assert lower.doomed


def test_commits_inside_are_counted_when_they_are_lost():
    stack = Stack()
    lower, inner = begun(stack, 1), begun(stack, 1)
    stack.commit(inner)
    stack.roll_back(lower)
    assert stack.lost == 1


def test_savepoints_of_the_client_are_known_by_name():
    stack = Stack()
    one = begun(stack, 1)
    for name in (b"a", b"b", b"a", b"c"):
        stack.name(one, name)
    assert one.resort == b'"c"'
    stack.forget(one, b"a", keep=True)
    assert one.names == [b"a", b"b", b"a"]
    stack.forget(one, b"b", keep=False)
    assert one.names == [b"a"]
    stack.forget(one, b"unknown", keep=False)
    stack.forget(one, b"a", keep=False)
    assert one.resort == b"penstock_1"
