"""The pool for threads and gevent."""
