"""A server that stands between an undone pool and PostgreSQL: its clients' transactions are savepoints of one session."""
