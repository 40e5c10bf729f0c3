"""gunicorn's server hooks: docs/gunicorn.md."""

from penstock.integrations.gunicorn.hooks import child_exit, post_worker_init, worker_exit

__all__ = ["child_exit", "post_worker_init", "worker_exit"]
