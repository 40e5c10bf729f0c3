"""The pool for asyncio."""
