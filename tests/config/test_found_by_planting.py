"""What no other test noticed when it was planted (tests/planted), of secrets."""

from penstock.config.secret import Hidden, Secret


def test_a_slice_of_a_secret_is_secret_too() -> None:
    assert "hun" not in repr(Secret("hunter2")[:3])
    assert "h" not in repr(Secret("hunter2")[0])


def test_neither_a_secret_nor_a_box_shows_what_is_in_it() -> None:
    assert "hunter2" not in repr(Secret("hunter2"))
    assert "hunter2" not in repr(Hidden("hunter2"))
