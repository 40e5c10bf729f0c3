"""What no other test noticed when it was planted (tests/planted), of secrets."""

from penstock.secret import Secret


def test_a_slice_of_a_secret_is_secret_too() -> None:
    assert "hun" not in repr(Secret("hunter2")[:3])
    assert "h" not in repr(Secret("hunter2")[0])
