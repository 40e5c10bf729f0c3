"""The pool carries out what the machine decides: for threads and gevent (`sync`), and for asyncio (`aio`)."""
