"""PostgreSQL connection pools for Python web workers."""
