"""asyncpg. Names of its insides appear here only."""
