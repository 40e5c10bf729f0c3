"""psycopg 3, for threads and gevent and (`aio_*.py`) for asyncio. Names of its insides appear here only."""
