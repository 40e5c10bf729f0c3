"""What every pool promises: threads, gevent and asyncio, over a fake server and a real one."""

import sys

if "pytest" in sys.modules:  # not in gevent's child
    import pytest

    # Their asserts are shown in full, as a test's own.
    pytest.register_assert_rewrite("tests.contract.scenarios", "tests.contract.world")
