"""The unit of work that all frameworks share: one connection, one transaction, from the first use to the end."""
