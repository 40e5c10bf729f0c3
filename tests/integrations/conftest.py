"""What is asserted in files that several tests share is explained as in the tests themselves."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.integrations.bank_checks")
