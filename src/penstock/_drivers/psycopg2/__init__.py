"""psycopg2, for threads and gevent. Names of its insides appear here only."""
