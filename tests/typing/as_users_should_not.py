"""What type checkers must refuse. Each line says which error it is; an ignore that is not needed fails.

pyright reads the same comments (`enableTypeIgnoreComments`), and is told to report unneeded ones.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true, reportUnusedExpression=false

from penstock import ConnectionPool

pool = ConnectionPool()

ConnectionPool(minsize=1)  # type: ignore[call-overload]  # no such option
ConnectionPool(min_size="1")  # type: ignore[call-overload]  # a number
ConnectionPool(order="random")  # type: ignore[call-overload]  # "lifo" or "fifo"
ConnectionPool(reset="all")  # type: ignore[call-overload]  # "rollback" or "session"
ConnectionPool(connection_class=42)  # type: ignore[call-overload]  # a class
ConnectionPool(driver="psycopg4")  # type: ignore[call-overload]  # no such driver
ConnectionPool("", 1)  # type: ignore[call-overload]  # options go by name
pool.connection(5.0, True)  # type: ignore[call-arg]  # so do those of a borrow
pool.putconn("connection")  # type: ignore[arg-type]  # one of its own
